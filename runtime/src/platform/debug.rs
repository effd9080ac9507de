//! Devices for guests under test: the debug console (ports 0xe9 and 0x402) and the POST port 0x80.
//!
//! Place in the pipeline: the platform's ports. The isa-debug-exit port 0xf4 has no state; the platform itself makes it an outcome.

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

/// The POST port's latch.
#[derive(Debug, Default)]
pub struct TestDevices {
    /// The last byte written to port 0x80.
    pub post: u8,
}
