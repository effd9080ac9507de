//! The I/O APIC: 24 pins, a redirection entry each, edge and level, EOI by broadcast or register.
//!
//! Place in the pipeline: the platform drives the pins and carries the messages to the local APICs (Intel 82093AA data
//! sheet; version 0x20 has the EOI register). Invariant: a level-triggered pin sends one message per EOI (remote IRR).

use super::lapic::{Delivery, Message, Target};

/// Number of pins.
pub const PINS: usize = 24;
/// Version 0x20, highest redirection entry 23.
const VERSION: u32 = 0x0017_0020;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are read-only.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
/// Vector, delivery, destination mode, polarity, trigger, mask, destination.
const DEFINED: u64 = 0xff00_0000_0001_ffff;

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    select: u8,
    id: u32,
    entry: [u64; PINS],
    /// Pins that are asserted now.
    asserted: u32,
    /// Edges seen and not yet sent.
    edges: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// After reset: every pin masked.
    #[must_use]
    pub fn new() -> Self {
        Self { select: 0, id: 0, entry: [MASKED; PINS], asserted: 0, edges: 0 }
    }

    /// Drives a pin; whether there may be a message to take.
    pub fn set_pin(&mut self, pin: u8, level: bool) -> bool {
        let bit = 1u32.checked_shl(u32::from(pin)).unwrap_or(0);
        let was = self.asserted & bit != 0;
        if usize::from(pin) >= PINS || was == level {
            return false;
        }
        self.asserted ^= bit;
        if level {
            self.edges |= bit;
        }
        level
    }

    /// The next message some pin has to send.
    pub fn take_message(&mut self) -> Option<Message> {
        for pin in 0..PINS {
            let (entry, bit) = (self.entry[pin], 1u32 << pin);
            if entry & MASKED != 0 {
                continue;
            }
            if entry & LEVEL != 0 {
                if self.asserted & bit == 0 || entry & REMOTE_IRR != 0 {
                    continue;
                }
                self.entry[pin] |= REMOTE_IRR;
            } else if self.edges & bit == 0 {
                continue;
            }
            self.edges &= !bit;
            let dest = (entry >> 56) as u32;
            return Some(Message {
                target: if entry & 1 << 11 != 0 { Target::Logical(dest) } else { Target::Physical(dest) },
                delivery: Delivery::from_bits(entry as u32),
                vector: entry as u8,
                level: entry & LEVEL != 0,
            });
        }
        None
    }

    /// A local APIC completed a level-triggered `vector`.
    pub fn eoi(&mut self, vector: u8) {
        for entry in self.entry.iter_mut().filter(|e| **e & LEVEL != 0 && **e as u8 == vector) {
            *entry &= !REMOTE_IRR;
        }
    }

    /// Reads the 32-bit register at `offset` of the page.
    #[must_use]
    pub fn mmio_read(&self, offset: u32) -> u32 {
        match offset {
            0x00 => u32::from(self.select),
            0x10 => match self.select {
                0 => self.id,
                1 => VERSION,
                2 => self.id,
                0x10..=0x3f => {
                    let entry = self.entry[usize::from(self.select - 0x10) / 2];
                    (if self.select & 1 == 0 { entry } else { entry >> 32 }) as u32
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` of the page. There may be messages to take afterwards.
    pub fn mmio_write(&mut self, offset: u32, value: u32) {
        match offset {
            0x00 => self.select = value as u8,
            0x10 => match self.select {
                0 => self.id = value & 0x0f00_0000,
                0x10..=0x3f => self.write_entry(usize::from(self.select - 0x10) / 2, self.select & 1 != 0, value),
                _ => {}
            },
            0x40 => self.eoi(value as u8),
            _ => {}
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32) {
        let old = self.entry[pin];
        let new = if high { old & 0xffff_ffff | u64::from(value) << 32 } else { old & !0xffff_ffff | u64::from(value) };
        let mut new = new & DEFINED & !READ_ONLY | old & READ_ONLY;
        if new & LEVEL == 0 {
            // Edge mode has no remote IRR; Linux flips the mode to clear a stuck one.
            new &= !REMOTE_IRR;
        }
        // An edge that came while the pin was masked is lost, as on the hardware.
        if old & MASKED != 0 {
            self.edges &= !(1 << pin);
        }
        self.entry[pin] = new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(io: &mut IoApic, reg: u8, value: u32) {
        io.mmio_write(0, u32::from(reg));
        io.mmio_write(0x10, value);
    }
    fn read(io: &mut IoApic, reg: u8) -> u32 {
        io.mmio_write(0, u32::from(reg));
        io.mmio_read(0x10)
    }

    #[test]
    fn identifies_itself() {
        let mut io = IoApic::new();
        assert_eq!(read(&mut io, 1), 0x0017_0020);
        write(&mut io, 0, 0xff00_0000);
        assert_eq!(read(&mut io, 0), 0x0f00_0000);
        assert_eq!(read(&mut io, 0x10), 0x0001_0000);
        assert_eq!(read(&mut io, 0xff), 0);
    }

    #[test]
    fn an_edge_sends_once() {
        let mut io = IoApic::new();
        write(&mut io, 0x10 + 2 * 4, 0x31);
        write(&mut io, 0x11 + 2 * 4, 0x0200_0000);
        assert!(io.set_pin(4, true));
        let m = io.take_message().unwrap();
        assert_eq!((m.vector, m.target, m.level), (0x31, Target::Physical(2), false));
        assert_eq!(io.take_message(), None);
        assert!(!io.set_pin(4, true));
        assert!(!io.set_pin(4, false));
        io.set_pin(4, true);
        assert!(io.take_message().is_some());
    }

    #[test]
    fn a_level_waits_for_its_eoi() {
        let mut io = IoApic::new();
        write(&mut io, 0x10 + 2 * 9, 0x8051);
        io.set_pin(9, true);
        assert!(io.take_message().unwrap().level);
        assert_eq!(io.take_message(), None);
        assert_eq!(read(&mut io, 0x10 + 2 * 9) & 1 << 14, 1 << 14);
        io.eoi(0x51);
        assert!(io.take_message().is_some(), "still asserted: sent again");
        io.set_pin(9, false);
        io.mmio_write(0x40, 0x51);
        assert_eq!(io.take_message(), None);
        assert_eq!(read(&mut io, 0x10 + 2 * 9) & 1 << 14, 0);
    }

    #[test]
    fn a_masked_edge_is_lost_and_pins_out_of_range_are_ignored() {
        let mut io = IoApic::new();
        io.set_pin(4, true);
        assert_eq!(io.take_message(), None);
        write(&mut io, 0x18, 0x31);
        assert_eq!(io.take_message(), None);
        assert!(!io.set_pin(24, true));
        assert!(!io.set_pin(200, true));
    }
}
