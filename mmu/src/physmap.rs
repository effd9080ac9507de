//! The physical map: what answers at a physical address, RAM, ROM, a device or nothing.
//!
//! Place in the pipeline: between walks, which make physical addresses, and RAM or the runtime's devices. RAM lies at 0 up
//! to 3 GiB, the rest of it from 4 GiB up. Invariants: RAM and ROM begin and end at page boundaries, so a page is one
//! kind of thing as far as the TLB is concerned; regions never overlap RAM outside the legacy hole, nor one another.

use std::fmt;
use std::sync::Arc;

use twofold_arch::{PAGE_SIZE, PhysAddr};

use crate::ram::{GuestRam, RamError};

/// RAM below 4 GiB ends here at the latest; devices live above.
pub const LOW_RAM_LIMIT: u64 = 3 << 30;
/// Where the RAM that does not fit below continues.
pub const HIGH_RAM_BASE: u64 = 4 << 30;
/// The legacy hole, which begins with VGA memory…
pub const HOLE_START: u64 = 0xa_0000;
/// … goes on with option ROMs and the BIOS …
pub const HOLE_ROMS: u64 = 0xc_0000;
/// … and ends at 1 MiB.
pub const HOLE_END: u64 = 0x10_0000;

/// What answers at 0xa0000..0xc0000. (0xc0000..0x100000 is RAM unless a ROM or a device is put over it.)
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LegacyHole {
    /// Nothing: reads all ones, writes are dropped.
    #[default]
    Unmapped,
    /// The device with this id.
    Mmio(u32),
    /// RAM.
    Ram,
}

/// What answers at a physical address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// RAM, at this byte offset.
    Ram(u64),
    /// Read-only memory.
    Rom {
        /// Which ROM, for [`PhysMap::rom`].
        index: u32,
        /// Byte offset in it.
        offset: u64,
    },
    /// A device.
    Mmio {
        /// The id given to [`PhysMap::add_mmio`].
        id: u32,
        /// Byte offset in the device's range.
        offset: u64,
    },
    /// Nothing: reads all ones, writes are dropped.
    Unmapped,
}

/// Why a region cannot be added.
#[derive(Debug)]
pub enum PhysMapError {
    /// It overlaps RAM or another region.
    Overlap(PhysAddr),
    /// Its size is 0, or it runs past the end of the address space.
    Size(PhysAddr),
    /// A ROM that is not made of whole pages.
    Unaligned(PhysAddr),
    /// No memory for a ROM.
    Ram(RamError),
}

impl fmt::Display for PhysMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PhysMapError::Overlap(a) => write!(f, "a region at {a:#x} overlaps memory or another region"),
            PhysMapError::Size(a) => write!(f, "a region at {a:#x} is empty or too large"),
            PhysMapError::Unaligned(a) => write!(f, "a ROM at {a:#x} does not begin and end at a page boundary"),
            PhysMapError::Ram(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for PhysMapError {}

#[derive(Clone, Copy, Debug)]
enum RegionKind {
    Rom(u32),
    Mmio(u32),
}

#[derive(Clone, Copy, Debug)]
struct Region {
    base: u64,
    /// Exclusive.
    end: u64,
    kind: RegionKind,
}

/// The physical map of a machine. Built once, then shared by reference.
#[derive(Debug)]
pub struct PhysMap {
    ram: Arc<GuestRam>,
    /// RAM below 4 GiB ends here.
    low_end: u64,
    /// RAM from 4 GiB ends here; equal to [`HIGH_RAM_BASE`] when there is none.
    high_end: u64,
    hole: LegacyHole,
    /// ROMs and devices, sorted by base.
    regions: Vec<Region>,
    roms: Vec<GuestRam>,
}

impl PhysMap {
    /// A map of `ram` and the legacy hole alone.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, hole: LegacyHole) -> Self {
        let low_end = ram.size().min(LOW_RAM_LIMIT);
        let high_end = HIGH_RAM_BASE + (ram.size() - low_end);
        Self { ram, low_end, high_end, hole, regions: Vec::new(), roms: Vec::new() }
    }

    /// Adds a device's range of `size` bytes, known by `id` from now on.
    ///
    /// # Errors
    /// [`PhysMapError`] when the range is empty or overlaps something.
    pub fn add_mmio(&mut self, base: PhysAddr, size: u64, id: u32) -> Result<(), PhysMapError> {
        self.add(base, size, RegionKind::Mmio(id))
    }

    /// Puts a ROM with these contents at `base`. In 0xc0000..0x100000 it hides the RAM there.
    ///
    /// # Errors
    /// [`PhysMapError`] when it is empty, not made of whole pages, or overlaps something.
    pub fn add_rom(&mut self, base: PhysAddr, contents: &[u8]) -> Result<(), PhysMapError> {
        let size = contents.len() as u64;
        if base.page_offset() != 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(PhysMapError::Unaligned(base));
        }
        let index = self.roms.len() as u32;
        self.add(base, size, RegionKind::Rom(index))?;
        let rom = GuestRam::new(size).map_err(PhysMapError::Ram)?;
        rom.write(0, contents);
        self.roms.push(rom);
        Ok(())
    }

    fn add(&mut self, base: PhysAddr, size: u64, kind: RegionKind) -> Result<(), PhysMapError> {
        let end = match base.0.checked_add(size) {
            Some(end) if size != 0 => end,
            _ => return Err(PhysMapError::Size(base)),
        };
        let base = base.0;
        let overlaps = |b: u64, e: u64| base < e && b < end;
        let hits_ram = overlaps(0, self.low_end.min(HOLE_START))
            || (self.low_end > HOLE_END && overlaps(HOLE_END, self.low_end))
            || overlaps(HIGH_RAM_BASE, self.high_end);
        if hits_ram || self.regions.iter().any(|r| overlaps(r.base, r.end)) {
            return Err(PhysMapError::Overlap(PhysAddr(base)));
        }
        let at = self.regions.partition_point(|r| r.base < base);
        self.regions.insert(at, Region { base, end, kind });
        Ok(())
    }

    /// The RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// ROM number `index` of a [`Target::Rom`].
    #[must_use]
    pub fn rom(&self, index: u32) -> Option<&GuestRam> {
        self.roms.get(index as usize)
    }

    /// RAM below 4 GiB is 0..this (less the legacy hole).
    #[must_use]
    pub fn low_ram_end(&self) -> PhysAddr {
        PhysAddr(self.low_end)
    }

    /// RAM from 4 GiB up ends here; 4 GiB itself when there is none.
    #[must_use]
    pub fn high_ram_end(&self) -> PhysAddr {
        PhysAddr(self.high_end)
    }

    /// The RAM offset of `pa`, if RAM answers there. The quick path of [`Self::target`].
    #[inline]
    #[must_use]
    pub fn ram_offset(&self, pa: PhysAddr) -> Option<u64> {
        let a = pa.0;
        if a < self.low_end {
            if a.wrapping_sub(HOLE_START) >= HOLE_END - HOLE_START {
                return Some(a);
            }
        } else if a.wrapping_sub(HIGH_RAM_BASE) < self.high_end - HIGH_RAM_BASE {
            return Some(a - HIGH_RAM_BASE + self.low_end);
        }
        match self.target_slow(a) {
            Target::Ram(offset) => Some(offset),
            _ => None,
        }
    }

    /// The physical address of a RAM offset (the inverse of [`Self::ram_offset`]).
    #[inline]
    #[must_use]
    pub fn phys_of_ram(&self, offset: u64) -> PhysAddr {
        PhysAddr(if offset < self.low_end { offset } else { offset - self.low_end + HIGH_RAM_BASE })
    }

    /// What answers at `pa`.
    #[inline]
    #[must_use]
    pub fn target(&self, pa: PhysAddr) -> Target {
        match self.ram_offset(pa) {
            Some(offset) => Target::Ram(offset),
            None => self.target_slow(pa.0),
        }
    }

    #[cold]
    fn target_slow(&self, a: u64) -> Target {
        let after = self.regions.partition_point(|r| r.base <= a);
        if let Some(r) = after.checked_sub(1).and_then(|i| self.regions.get(i))
            && a < r.end
        {
            let offset = a - r.base;
            return match r.kind {
                RegionKind::Rom(index) => Target::Rom { index, offset },
                RegionKind::Mmio(id) => Target::Mmio { id, offset },
            };
        }
        if (HOLE_START..HOLE_END).contains(&a) && a < self.low_end {
            if a >= HOLE_ROMS {
                return Target::Ram(a);
            }
            return match self.hole {
                LegacyHole::Unmapped => Target::Unmapped,
                LegacyHole::Mmio(id) => Target::Mmio { id, offset: a - HOLE_START },
                LegacyHole::Ram => Target::Ram(a),
            };
        }
        Target::Unmapped
    }

    /// Copies from physical memory: RAM and ROM as they are, all ones where a device or nothing answers.
    pub fn read(&self, pa: PhysAddr, buf: &mut [u8]) {
        let mut at = pa;
        for piece in page_pieces(pa, buf) {
            let done = match self.target(at) {
                Target::Ram(offset) => self.ram.read(offset, piece),
                Target::Rom { index, offset } => self.rom(index).is_some_and(|r| r.read(offset, piece)),
                Target::Mmio { .. } | Target::Unmapped => false,
            };
            if !done {
                piece.fill(0xff);
            }
            at = at.wrapping_add(piece.len() as u64);
        }
    }

    /// Copies to physical memory; what does not land in RAM is dropped. Tells nobody: a writer that may hit translated
    /// code also calls [`crate::CodePages::note_write`].
    pub fn write(&self, pa: PhysAddr, data: &[u8]) {
        let mut at = pa;
        let mut rest = data;
        while !rest.is_empty() {
            let n = rest.len().min((PAGE_SIZE - at.page_offset()) as usize);
            let (piece, tail) = rest.split_at(n);
            if let Some(offset) = self.ram_offset(at) {
                self.ram.write(offset, piece);
            }
            rest = tail;
            at = at.wrapping_add(n as u64);
        }
    }
}

/// `buf` cut where `pa + i` crosses a page.
fn page_pieces(pa: PhysAddr, buf: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    let first = buf.len().min((PAGE_SIZE - pa.page_offset()) as usize);
    let (head, tail) = buf.split_at_mut(first);
    std::iter::once(head).filter(|h| !h.is_empty()).chain(tail.chunks_mut(PAGE_SIZE as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(mib: u64, hole: LegacyHole) -> PhysMap {
        PhysMap::new(Arc::new(GuestRam::new(mib << 20).unwrap()), hole)
    }

    #[test]
    fn legacy_hole() {
        let m = map(4, LegacyHole::Mmio(7));
        assert_eq!(m.target(PhysAddr(0x9_ffff)), Target::Ram(0x9_ffff));
        assert_eq!(m.target(PhysAddr(0xa_0010)), Target::Mmio { id: 7, offset: 0x10 });
        assert_eq!(m.target(PhysAddr(0xc_0000)), Target::Ram(0xc_0000));
        assert_eq!(m.target(PhysAddr(0x10_0000)), Target::Ram(0x10_0000));
        assert_eq!(m.target(PhysAddr(4 << 20)), Target::Unmapped);
        assert_eq!(map(4, LegacyHole::Unmapped).target(PhysAddr(0xb_8000)), Target::Unmapped);
        assert_eq!(map(4, LegacyHole::Ram).ram_offset(PhysAddr(0xb_8000)), Some(0xb_8000));
    }

    #[test]
    fn rom_hides_ram_and_takes_no_writes() {
        let mut m = map(4, LegacyHole::Unmapped);
        m.add_rom(PhysAddr(0xf_0000), &[0x5a; 0x1_0000]).unwrap();
        assert!(matches!(m.add_rom(PhysAddr(0xf_f000), &[0; 0x1000]), Err(PhysMapError::Overlap(_))));
        assert!(matches!(m.add_mmio(PhysAddr(0x20_0000), 0x1000, 1), Err(PhysMapError::Overlap(_))));
        assert!(matches!(m.add_mmio(PhysAddr(u64::MAX), 2, 1), Err(PhysMapError::Size(_))));
        m.write(PhysAddr(0xe_fffe), &[1, 2, 3, 4]);
        let mut b = [0; 4];
        m.read(PhysAddr(0xe_fffe), &mut b);
        assert_eq!(b, [1, 2, 0x5a, 0x5a]);
        assert_eq!(m.target(PhysAddr(0xf_0004)), Target::Rom { index: 0, offset: 4 });
    }

    #[test]
    fn ram_above_four_gib() {
        // A layout check only: the RAM is never touched.
        let Ok(ram) = GuestRam::new((3 << 30) + (8 << 20)) else { return };
        let m = PhysMap::new(Arc::new(ram), LegacyHole::Unmapped);
        assert_eq!(m.low_ram_end(), PhysAddr(3 << 30));
        assert_eq!(m.high_ram_end(), PhysAddr((4 << 30) + (8 << 20)));
        assert_eq!(m.ram_offset(PhysAddr(4 << 30)), Some(3 << 30));
        assert_eq!(m.phys_of_ram(3 << 30), PhysAddr(4 << 30));
        assert_eq!(m.target(PhysAddr(3 << 30)), Target::Unmapped);
        assert_eq!(m.target(PhysAddr((4 << 30) + (8 << 20))), Target::Unmapped);
    }
}
