//! The fw_cfg device: named and numbered items that tell firmware and test kernels about the machine.
//!
//! Place in the pipeline: selector port 0x510 (16 bits), data port 0x511 (bytes). Layout after QEMU's "fw_cfg" specification;
//! without the DMA interface. Invariant: reading past an item's end gives zeroes.

/// Selector port.
pub const SELECTOR_PORT: u16 = 0x510;
/// Data port.
pub const DATA_PORT: u16 = 0x511;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const NOGRAPHIC: u16 = 0x04;
const NB_CPUS: u16 = 0x05;
const BOOT_MENU: u16 = 0x0e;
const MAX_CPUS: u16 = 0x0f;
const FILE_DIR: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: Vec<(u16, Vec<u8>)>,
    files: Vec<(String, u16, u32)>,
    selected: u16,
    offset: usize,
}

impl FwCfg {
    /// The items of a machine with `cpus` processors and `memory` bytes.
    #[must_use]
    pub fn new(cpus: u32, memory: u64) -> Self {
        let cpus = (cpus as u16).to_le_bytes().to_vec();
        let items = vec![
            (SIGNATURE, b"QEMU".to_vec()),
            (ID, 1u32.to_le_bytes().to_vec()),
            (RAM_SIZE, memory.to_le_bytes().to_vec()),
            (NOGRAPHIC, vec![1, 0]),
            (NB_CPUS, cpus.clone()),
            // There is no disk to boot from at once: firmware asks.
            (BOOT_MENU, vec![1, 0]),
            (MAX_CPUS, cpus),
        ];
        let mut device = Self { items, files: Vec::new(), selected: SIGNATURE, offset: 0 };
        let e820: Vec<u8> =
            crate::boot::e820::map(memory).iter().flat_map(crate::boot::e820::Entry::to_bytes).collect();
        device.add_file("etc/e820", e820);
        device
    }

    /// Adds a named item.
    pub fn add_file(&mut self, name: &str, data: Vec<u8>) {
        let key = FIRST_FILE + self.files.len() as u16;
        self.files.push((name.to_owned(), key, data.len() as u32));
        self.items.push((key, data));
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (name, key, size) in &self.files {
            directory.extend(size.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0, 0]);
            let mut field = [0u8; 56];
            field.iter_mut().take(55).zip(name.bytes()).for_each(|(to, from)| *to = from);
            directory.extend(field);
        }
        self.items.retain(|(key, _)| *key != FILE_DIR);
        self.items.push((FILE_DIR, directory));
    }

    /// Selects an item and goes to its start.
    pub fn select(&mut self, key: u16) {
        // Bit 14 selected an item for writing once; bit 15 marks items of the architecture's own.
        self.selected = key & !0x4000;
        self.offset = 0;
    }

    /// The next byte of the selected item.
    pub fn read(&mut self) -> u8 {
        let item = self.items.iter().find(|(key, _)| *key == self.selected);
        let byte = item.and_then(|(_, data)| data.get(self.offset)).copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(f: &mut FwCfg, key: u16, n: usize) -> Vec<u8> {
        f.select(key);
        (0..n).map(|_| f.read()).collect()
    }

    #[test]
    fn numbered_items() {
        let mut f = FwCfg::new(3, 512 << 20);
        assert_eq!(item(&mut f, SIGNATURE, 5), b"QEMU\0");
        assert_eq!(item(&mut f, NB_CPUS, 2), [3, 0]);
        assert_eq!(item(&mut f, MAX_CPUS, 2), [3, 0]);
        assert_eq!(item(&mut f, RAM_SIZE, 8), (512u64 << 20).to_le_bytes());
        assert_eq!(item(&mut f, 0x1234, 2), [0, 0]);
        assert_eq!(item(&mut f, 0x8000, 2), [0, 0], "no ACPI tables of our own, not the signature");
    }

    #[test]
    fn files_are_found_through_the_directory() {
        let mut f = FwCfg::new(1, 64 << 20);
        f.add_file("opt/test", b"hello".to_vec());
        let dir = item(&mut f, FILE_DIR, 4 + 128);
        assert_eq!(dir[..4], 2u32.to_be_bytes());
        let second = &dir[4 + 64..];
        assert_eq!(second[..4], 5u32.to_be_bytes());
        assert_eq!(&second[8..16], b"opt/test");
        let key = u16::from_be_bytes([second[4], second[5]]);
        assert_eq!(item(&mut f, key, 6), b"hello\0");
        let size = u32::from_be_bytes([dir[4], dir[5], dir[6], dir[7]]);
        assert_eq!(size % 20, 0);
        assert!(size > 0);
    }
}
