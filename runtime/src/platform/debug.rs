//! Devices for guests under test: the debug console (ports 0xe9 and 0x402), the POST port 0x80, and what QEMU calls pc-testdev:
//! ports that keep what is written to them (0xe0) or drive interrupt lines (0x2000), and memory that only a device reaches.
//!
//! Place in the pipeline: the platform's ports and device memory. The isa-debug-exit port 0xf4 has no state; the platform itself
//! makes it an outcome.

use super::uart::Gathered;
use std::io::Write;

/// The debug console: what is written appears, nothing can be read.
pub struct DebugConsole {
    line: Gathered,
}

impl DebugConsole {
    /// What a read of the port gives: the sign by which guests find it.
    pub const PRESENT: u8 = 0xe9;

    /// A console that writes to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { line: Gathered::new(out) }
    }
    /// A byte from the guest.
    pub fn write(&mut self, byte: u8, now: u64) {
        self.line.push(byte, now);
    }
    /// Writes out what has gathered.
    pub fn flush(&mut self) {
        self.line.flush();
    }
    /// When output has to be written at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.line.deadline()
    }
    /// Writes output that has waited long enough.
    pub fn expire(&mut self, now: u64) {
        self.line.expire(now);
    }
}

/// First of four ports that keep what is written to them.
pub const ECHO_PORT: u16 = 0xe0;
/// Last of them.
pub const ECHO_PORT_LAST: u16 = 0xe3;
/// A write here would unmap a page on the host of another emulator; it does nothing.
pub const FLUSH_PORT: u16 = 0xe4;
/// Last of its four bytes.
pub const FLUSH_PORT_LAST: u16 = 0xe7;
/// First of the ports that each drive an interrupt line: bit 0 is the level.
pub const LINE_PORT: u16 = 0x2000;
/// Last of them.
pub const LINE_PORT_LAST: u16 = 0x2017;
/// Device memory that reads as it was written.
pub const MEMORY_BASE: u64 = 0xff00_0000;
/// Its size in bytes.
pub const MEMORY_SIZE: u64 = 0x1_0000;

/// What the test devices hold.
#[derive(Debug, Default)]
pub struct TestDevices {
    /// The last byte written to port 0x80.
    pub post: u8,
    /// The bytes at [`ECHO_PORT`].
    pub echo: [u8; 4],
    /// The bytes at [`MEMORY_BASE`], once something was written.
    memory: Vec<u8>,
}

impl TestDevices {
    /// Reads `size` (1..=8) bytes at `offset` of the memory.
    #[must_use]
    pub fn memory_read(&self, offset: u64, size: u8) -> u64 {
        (0..u64::from(size)).fold(0, |word, i| {
            let byte = self.memory.get((offset + i) as usize).copied().unwrap_or(0);
            word | u64::from(byte) << (8 * i)
        })
    }

    /// Writes `size` (1..=8) bytes at `offset` of the memory.
    pub fn memory_write(&mut self, offset: u64, size: u8, value: u64) {
        self.memory.resize(MEMORY_SIZE as usize, 0);
        for (i, byte) in value.to_le_bytes().into_iter().take(usize::from(size)).enumerate() {
            if let Some(place) = self.memory.get_mut(offset as usize + i) {
                *place = byte;
            }
        }
    }
}
