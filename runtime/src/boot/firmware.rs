//! Firmware ROM images: mapped below 4 GiB and, their top 128 KiB, below 1 MiB.
//!
//! Place in the pipeline: before the physical map is shared; the processor then starts at the reset vector, the ROM's last 16 bytes.
//! The copy below 1 MiB is RAM (shadowed from the start): there is no chipset register by which firmware could unlock it.

use std::path::Path;

use twofold_arch::PhysAddr;
use twofold_mmu::PhysMap;

use super::error::{BootError, Problem};
use super::image;

const MIN: u64 = 64 << 10;
const MAX: u64 = 16 << 20;
/// As much of its top also appears below 1 MiB.
const LEGACY: u64 = 128 << 10;

/// Reads a ROM image and maps it.
///
/// # Errors
/// A file that cannot be read, or is no size a ROM can have.
pub fn map(path: &Path, map: &mut PhysMap) -> Result<(), BootError> {
    let rom = image::read_file(path, MAX)?;
    let name = path.display().to_string();
    map_image(&rom, map).map_err(|problem| BootError::new(&name, problem))
}

fn map_image(rom: &[u8], map: &mut PhysMap) -> Result<(), Problem> {
    let size = rom.len() as u64;
    if !(MIN..=MAX).contains(&size) || !size.is_multiple_of(0x1000) {
        return Err(Problem::RomSize(size));
    }
    let legacy = size.min(LEGACY);
    let top = &rom[(size - legacy) as usize..];
    map.add_rom(PhysAddr((1 << 32) - size), rom).map_err(|_| Problem::RomSize(size))?;
    map.write(PhysAddr((1 << 20) - legacy), top);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use twofold_mmu::{GuestRam, LegacyHole};

    #[test]
    fn both_places_show_the_top() {
        let mut map = PhysMap::new(Arc::new(GuestRam::new(4 << 20).unwrap()), LegacyHole::Unmapped);
        let rom: Vec<u8> = (0..256 << 10).map(|i: u32| (i >> 10) as u8).collect();
        map_image(&rom, &mut map).unwrap();
        let mut b = [0; 1];
        for (at, value) in [(0xffff_fff0, 255), (0xfffc_0000, 0), (0xf_fff0, 255), (0xe_0000, 128)] {
            map.read(PhysAddr(at), &mut b);
            assert_eq!(b[0], value, "{at:#x}");
        }
        for (at, after) in [(0xf_fff0, 1), (0xffff_fff0, 255)] {
            map.write(PhysAddr(at), &[1]);
            map.read(PhysAddr(at), &mut b);
            assert_eq!(b[0], after, "the shadow takes writes, the ROM does not");
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        let mut map = PhysMap::new(Arc::new(GuestRam::new(4 << 20).unwrap()), LegacyHole::Unmapped);
        for size in [0, 1, 0xffff, 0x1_0001, (16 << 20) + 0x1000] {
            assert!(matches!(map_image(&vec![0; size], &mut map), Err(Problem::RomSize(_))));
        }
    }
}
