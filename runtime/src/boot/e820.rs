//! The memory map that the machine tells its guests, in the BIOS's E820 form.
//!
//! Place in the pipeline: used by every boot protocol and fw_cfg. Invariant: agrees with `mmu`'s physical map.

use twofold_mmu::physmap::{HIGH_RAM_BASE, LOW_RAM_LIMIT};

/// Conventional memory ends here; the EBDA's place follows.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
const HOLE_START: u64 = 0xa_0000;
const BIOS_START: u64 = super::layout::ACPI;
const MIB: u64 = 1 << 20;

/// Kind of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
}

impl Entry {
    /// The twenty bytes of the BIOS call, which boot_params and fw_cfg use too.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 20] {
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&self.base.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes
    }
}

/// The map of a machine with `memory` bytes of RAM.
#[must_use]
pub fn map(memory: u64) -> Vec<Entry> {
    let low = memory.min(LOW_RAM_LIMIT);
    let range = |base: u64, end: u64, kind| Entry { base, len: end.saturating_sub(base), kind };
    let entries = [
        range(0, CONVENTIONAL_END.min(low), Kind::Ram),
        range(CONVENTIONAL_END, HOLE_START, Kind::Reserved),
        range(BIOS_START, MIB, Kind::Reserved),
        range(MIB, low, Kind::Ram),
        // Where the I/O APIC, the local APICs and the firmware ROM are.
        range(0xfec0_0000, 0x1_0000_0000, Kind::Reserved),
        range(HIGH_RAM_BASE, HIGH_RAM_BASE + (memory - low), Kind::Ram),
    ];
    entries.into_iter().filter(|e| e.len != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(memory: u64) -> u64 {
        map(memory).iter().filter(|e| e.kind == Kind::Ram).map(|e| e.len).sum()
    }

    #[test]
    fn ranges_are_sorted_and_apart() {
        for memory in [1 << 20, 2 << 20, 512 << 20, 3 << 30, 4 << 30, 1 << 40] {
            let map = map(memory);
            assert!(map.windows(2).all(|w| w[0].base + w[0].len <= w[1].base), "{map:?}");
        }
    }

    #[test]
    fn all_memory_but_the_hole_is_there() {
        assert_eq!(ram(512 << 20), (512 << 20) - (MIB - CONVENTIONAL_END));
        assert_eq!(ram(8 << 30), (8 << 30) - (MIB - CONVENTIONAL_END));
        assert_eq!(map(8 << 30).last().unwrap().base, 4 << 30);
        assert_eq!(map(8 << 30).last().unwrap().len, 5 << 30);
    }
}
