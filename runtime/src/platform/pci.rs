//! The PCI devices that PC firmware looks for: a host bridge and an ISA bridge, configuration space alone.
//!
//! Place in the pipeline: ports 0xcf8 to 0xcff, with `--firmware` only; kernels that are started directly see no PCI. Firmware
//! reads from the host bridge that memory below 1 MiB is still ROM, copies itself there and switches it to RAM; it is RAM
//! from the start, so the switches are registers that keep what is written.

/// Bytes of a function's configuration space.
const LEN: usize = 256;

/// One function.
#[derive(Debug)]
struct Function {
    /// Device and function number as they are in an address: bits 15:8.
    devfn: u32,
    space: [u8; LEN],
}

impl Function {
    fn new(device: u32, vendor_and_device: u32, class: u32) -> Self {
        let mut space = [0; LEN];
        space[..4].copy_from_slice(&vendor_and_device.to_le_bytes());
        // Revision 0, then class, subclass and interface.
        space[8..12].copy_from_slice(&(class << 8).to_le_bytes());
        Self { devfn: device << 3, space }
    }
}

/// The bus.
#[derive(Debug)]
pub struct Pci {
    address: u32,
    functions: Vec<Function>,
}

impl Pci {
    /// A bus with an Intel 440FX host bridge and the ISA bridge of a PIIX3; or with nothing, not even itself.
    #[must_use]
    pub fn new(present: bool) -> Self {
        let bridges = || vec![Function::new(0, 0x1237_8086, 0x06_0000), Function::new(1, 0x7000_8086, 0x06_0100)];
        Self { address: 0, functions: if present { bridges() } else { Vec::new() } }
    }

    /// Reads `size` bytes from a port of the eight.
    #[must_use]
    pub fn read(&self, port: u16, size: u8) -> u32 {
        let ones = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
        if self.functions.is_empty() {
            return ones;
        }
        if port & 7 == 0 && size == 4 {
            return self.address;
        }
        if port & 4 == 0 || self.address >> 31 == 0 {
            return ones;
        }
        let first = (self.address & 0xfc) as usize + usize::from(port & 3);
        let devfn = self.address >> 8 & 0xffff;
        let Some(function) = self.functions.iter().find(|f| f.devfn == devfn) else { return ones };
        let byte = |i: usize| u32::from(function.space.get(first + i).copied().unwrap_or(0xff));
        (0..usize::from(size.min(4))).fold(0, |word, i| word | byte(i) << (8 * i))
    }

    /// Writes them.
    pub fn write(&mut self, port: u16, size: u8, value: u32) {
        if self.functions.is_empty() {
            return;
        }
        if port & 7 == 0 && size == 4 {
            self.address = value & 0x80ff_fffc;
        } else if port & 4 != 0 && self.address >> 31 != 0 {
            let first = (self.address & 0xfc) as usize + usize::from(port & 3);
            let devfn = self.address >> 8 & 0xffff;
            let Some(function) = self.functions.iter_mut().find(|f| f.devfn == devfn) else { return };
            for (i, byte) in value.to_le_bytes().into_iter().take(size.into()).enumerate() {
                // The command register, and what belongs to the device; there are no base addresses.
                if matches!(first + i, 4 | 5 | 0x3c | 0x40..LEN) {
                    function.space[first + i] = byte;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_finds_the_bridge_and_its_switches() {
        let mut pci = Pci::new(true);
        pci.write(0xcf8, 4, 0x8000_0000);
        assert_eq!(pci.read(0xcf8, 4), 0x8000_0000);
        assert_eq!((pci.read(0xcfc, 4), pci.read(0xcfe, 2)), (0x1237_8086, 0x1237));
        pci.write(0xcfc, 4, 0);
        assert_eq!(pci.read(0xcfc, 2), 0x8086, "the identity stays");
        pci.write(0xcf8, 4, 0x8000_0058);
        assert_eq!(pci.read(0xcfd, 1), 0);
        pci.write(0xcfd, 1, 0x30);
        assert_eq!(pci.read(0xcfc, 4), 0x3000);
        // Another device, another bus, a disabled address.
        for address in [0x8000_1000, 0x8001_0000, 0] {
            pci.write(0xcf8, 4, address);
            assert_eq!(pci.read(0xcfc, 4), u32::MAX);
        }
    }

    #[test]
    fn without_firmware_there_is_nothing() {
        let mut pci = Pci::new(false);
        pci.write(0xcf8, 4, 0x8000_0000);
        assert_eq!((pci.read(0xcf8, 4), pci.read(0xcfc, 2), pci.read(0xcff, 1)), (u32::MAX, 0xffff, 0xff));
    }
}
