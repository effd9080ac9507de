//! The chipset's part in system management: the port that raises SMIs, and the registers that let it.
//!
//! Place in the pipeline: ports 0xb2 and 0xb3, and 0x630 to 0x637, where an ICH has these registers relative to the ACPI
//! block (which is at 0x600). After reset nothing is enabled, so a machine without SMM code never sees an SMI.

/// APM_CNT: a byte written here raises an SMI on every processor.
pub const COMMAND_PORT: u16 = 0xb2;
/// APM_STS: a byte that goes with the command.
pub const DATA_PORT: u16 = 0xb3;
/// SMI_EN; SMI_STS follows.
pub const FIRST_PORT: u16 = 0x630;
/// The last byte of SMI_STS.
pub const LAST_PORT: u16 = 0x637;

/// SMI_EN: SMIs are enabled at all.
const GLOBAL: u32 = 1 << 0;
/// SMI_EN: the command port raises them. SMI_STS: it has.
const COMMAND: u32 = 1 << 5;
/// Bits of SMI_EN that keep what is written: those two, end of SMI, the others of the port's kind.
const ENABLE_BITS: u32 = 0x7f;

/// The registers.
#[derive(Debug, Default)]
pub struct SmiControl {
    enable: u32,
    status: u32,
    command: u8,
    data: u8,
}

impl SmiControl {
    /// Reads a byte of a port.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        match port {
            COMMAND_PORT => self.command,
            DATA_PORT => self.data,
            _ => {
                let word = u64::from(self.enable) | u64::from(self.status) << 32;
                (word >> (8 * u32::from(port.wrapping_sub(FIRST_PORT) & 7))) as u8
            }
        }
    }

    /// Writes a byte of a port; whether it raises an SMI.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match port {
            COMMAND_PORT => {
                self.command = value;
                let raises = self.enable & (GLOBAL | COMMAND) == GLOBAL | COMMAND;
                self.status |= if raises { COMMAND } else { 0 };
                return raises;
            }
            DATA_PORT => self.data = value,
            _ => {
                let at = 8 * u32::from(port.wrapping_sub(FIRST_PORT) & 3);
                let bits = u32::from(value) << at;
                if port < FIRST_PORT + 4 {
                    self.enable = (self.enable & !(0xff << at) | bits) & ENABLE_BITS;
                } else {
                    // Writing 1 clears a status bit.
                    self.status &= !bits;
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_port_raises_smis_when_it_may() {
        let mut smi = SmiControl::default();
        assert!(!smi.write(COMMAND_PORT, 0x12), "not after reset");
        for enable in [1, 0x20] {
            smi.write(FIRST_PORT, enable);
            assert!(!smi.write(COMMAND_PORT, 0x12));
        }
        smi.write(FIRST_PORT, 0x21);
        smi.write(DATA_PORT, 0x34);
        assert!(!smi.write(DATA_PORT, 0x34), "data alone raise none");
        assert_eq!(smi.read(FIRST_PORT + 4), 0);
        assert!(smi.write(COMMAND_PORT, 0x56));
        assert_eq!((smi.read(COMMAND_PORT), smi.read(DATA_PORT)), (0x56, 0x34));
        assert_eq!((smi.read(FIRST_PORT), smi.read(FIRST_PORT + 4)), (0x21, 0x20));
        smi.write(FIRST_PORT + 4, 0x20);
        assert_eq!(smi.read(FIRST_PORT + 4), 0);
    }
}
