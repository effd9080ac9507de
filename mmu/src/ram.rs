//! Guest RAM: one anonymous, lazily committed mapping, shared by all vCPUs and devices.
//!
//! Place in the pipeline: the bottom. [`crate::physmap`] decides which offset a physical address is; nothing here knows
//! physical addresses. Invariants: every access is bounds-checked against the mapping, no reference into guest memory
//! is ever handed out (other vCPUs and translated code write to it at any time), only values, copies and, for TLB
//! addends, page addresses.
#![allow(unsafe_code)] // Guest memory is shared with translated code and other vCPUs, so it can only be raw memory.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use twofold_arch::{PAGE_MASK, PAGE_SIZE};

/// Why there is no guest RAM.
#[derive(Debug)]
pub enum RamError {
    /// Zero bytes were asked for.
    Zero,
    /// More was asked for than the machine has; both in bytes.
    TooMuch {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of physical memory in the machine.
        machine: u64,
    },
    /// The host refused the mapping.
    Map {
        /// Bytes asked for.
        asked: u64,
        /// The host's reason.
        error: std::io::Error,
    },
}

impl fmt::Display for RamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RamError::Zero => write!(f, "guest memory of 0 bytes: give the guest at least 1M"),
            RamError::TooMuch { asked, machine } => write!(
                f,
                "guest memory of {} MiB is more than this machine's {} MiB: give the guest less",
                asked >> 20,
                machine >> 20
            ),
            RamError::Map { asked, error } => {
                write!(f, "cannot map {} MiB of guest memory: {error}: give the guest less", asked >> 20)
            }
        }
    }
}

impl std::error::Error for RamError {}

/// Bytes that host huge pages want the mapping aligned to.
const HUGE: u64 = 2 << 20;

/// Guest RAM. Zero at first; pages are committed when first touched.
pub struct GuestRam {
    // Keeps the mapping alive; `base` points into it.
    _map: MmapRaw,
    base: *mut u8,
    size: u64,
}

// SAFETY: the mapping is plain memory owned by `_map` for the life of `self`; every access below is atomic, or a raw copy
// that makes no reference, as befits memory that a guest's processors race on.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Bytes of physical memory of the machine we run on, or `u64::MAX` when it does not say.
fn machine_memory() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    match (u64::try_from(pages), u64::try_from(size)) {
        (Ok(pages), Ok(size)) if pages > 0 => pages.saturating_mul(size),
        _ => u64::MAX,
    }
}

macro_rules! typed_access {
    ($load:ident, $store:ident, $ty:ty, $atomic:ty) => {
        /// Loads a little-endian value at byte `offset`; `None` when it does not lie in RAM. Atomic when aligned.
        #[inline]
        #[must_use]
        pub fn $load(&self, offset: u64) -> Option<$ty> {
            let p = self.at(offset, size_of::<$ty>() as u64)?;
            // SAFETY: `at` checked that the value's bytes lie in the mapping; the atomic is only made when aligned.
            let v = unsafe {
                if p.addr() % align_of::<$atomic>() == 0 {
                    (*p.cast::<$atomic>()).load(Ordering::Relaxed)
                } else {
                    p.cast::<$ty>().read_unaligned()
                }
            };
            Some(<$ty>::from_le(v))
        }

        /// Stores a little-endian value at byte `offset`; false when it does not lie in RAM. Atomic when aligned.
        #[inline]
        pub fn $store(&self, offset: u64, value: $ty) -> bool {
            let Some(p) = self.at(offset, size_of::<$ty>() as u64) else { return false };
            let value = value.to_le();
            // SAFETY: as in the load.
            unsafe {
                if p.addr() % align_of::<$atomic>() == 0 {
                    (*p.cast::<$atomic>()).store(value, Ordering::Relaxed);
                } else {
                    p.cast::<$ty>().write_unaligned(value);
                }
            }
            true
        }
    };
}

impl GuestRam {
    /// Maps `size` bytes (rounded up to a page) of zeroed guest memory.
    ///
    /// # Errors
    /// [`RamError`] when `size` is 0, more than the machine has, or the host refuses.
    pub fn new(size: u64) -> Result<Self, RamError> {
        if size == 0 {
            return Err(RamError::Zero);
        }
        let machine = machine_memory();
        if size > machine {
            return Err(RamError::TooMuch { asked: size, machine });
        }
        let too_much = RamError::TooMuch { asked: size, machine };
        let Some(rounded) = size.checked_add(PAGE_SIZE - 1).map(|s| s & PAGE_MASK) else { return Err(too_much) };
        let Some(len) = rounded.checked_add(HUGE).and_then(|l| usize::try_from(l).ok()) else { return Err(too_much) };
        let mut options = MmapOptions::new();
        options.len(len);
        #[cfg(unix)]
        options.no_reserve_swap();
        let map: MmapRaw = options.map_anon().map_err(|error| RamError::Map { asked: size, error })?.into();
        #[cfg(target_os = "linux")]
        if rounded >= HUGE {
            // Fewer host page faults and host TLB misses; without it everything still works.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        let raw = map.as_mut_ptr();
        let base = raw.wrapping_add(raw.align_offset(HUGE as usize).min(HUGE as usize));
        Ok(Self { _map: map, base, size: rounded })
    }

    /// Size in bytes, a multiple of the page size.
    #[inline]
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    #[inline]
    fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if len <= self.size && offset <= self.size - len { Some(self.base.wrapping_add(offset as usize)) } else { None }
    }

    typed_access!(load_u8, store_u8, u8, AtomicU8);
    typed_access!(load_u16, store_u16, u16, AtomicU16);
    typed_access!(load_u32, store_u32, u32, AtomicU32);
    typed_access!(load_u64, store_u64, u64, AtomicU64);

    /// Replaces the aligned doubleword at `offset` by `new` if it is `old`. `None` when it is outside RAM or unaligned,
    /// else whether it was replaced.
    #[inline]
    #[must_use]
    pub fn exchange_u32(&self, offset: u64, old: u32, new: u32) -> Option<bool> {
        let p = self.at(offset, 4)?.cast::<AtomicU32>();
        if !p.is_aligned() {
            return None;
        }
        // SAFETY: in bounds by `at`, aligned by the check above.
        let cell = unsafe { &*p };
        Some(cell.compare_exchange(old.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }

    /// Replaces the aligned quadword at `offset` by `new` if it is `old`. `None` when it is outside RAM or unaligned,
    /// else whether it was replaced.
    #[inline]
    #[must_use]
    pub fn exchange_u64(&self, offset: u64, old: u64, new: u64) -> Option<bool> {
        let p = self.at(offset, 8)?.cast::<AtomicU64>();
        if !p.is_aligned() {
            return None;
        }
        // SAFETY: in bounds by `at`, aligned by the check above.
        let cell = unsafe { &*p };
        Some(cell.compare_exchange(old.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }

    /// Loads 1, 2, 4 or 8 bytes, zero-extended.
    #[inline]
    #[must_use]
    pub fn load(&self, offset: u64, size: u32) -> Option<u64> {
        match size {
            1 => self.load_u8(offset).map(u64::from),
            2 => self.load_u16(offset).map(u64::from),
            4 => self.load_u32(offset).map(u64::from),
            8 => self.load_u64(offset),
            _ => {
                let mut b = [0; 8];
                self.read(offset, b.get_mut(..size as usize)?).then(|| u64::from_le_bytes(b))
            }
        }
    }

    /// Stores the low `size` (1, 2, 4 or 8) bytes of `value`; false when they do not lie in RAM.
    #[inline]
    pub fn store(&self, offset: u64, value: u64, size: u32) -> bool {
        match size {
            1 => self.store_u8(offset, value as u8),
            2 => self.store_u16(offset, value as u16),
            4 => self.store_u32(offset, value as u32),
            8 => self.store_u64(offset, value),
            _ => value.to_le_bytes().get(..size as usize).is_some_and(|b| self.write(offset, b)),
        }
    }

    /// Copies RAM from `offset` into `buf`; false, and nothing copied, when the range does not lie in RAM.
    #[inline]
    #[must_use]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let Some(p) = self.at(offset, buf.len() as u64) else { return false };
        // SAFETY: the source is in bounds by `at`; `buf` is an exclusive reference, so they do not overlap.
        unsafe { p.copy_to_nonoverlapping(buf.as_mut_ptr(), buf.len()) };
        true
    }

    /// Copies `data` to RAM at `offset`; false, and nothing copied, when the range does not lie in RAM.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Some(p) = self.at(offset, data.len() as u64) else { return false };
        // SAFETY: as in `read`, the other way round.
        unsafe { p.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        true
    }

    /// Fills `len` bytes from `offset` with `byte`; false when the range does not lie in RAM.
    pub fn fill(&self, offset: u64, byte: u8, len: u64) -> bool {
        let Some(p) = self.at(offset, len) else { return false };
        // SAFETY: in bounds by `at`.
        unsafe { p.write_bytes(byte, len as usize) };
        true
    }

    /// Copies `len` bytes within RAM, as memmove does; false when either range does not lie in RAM.
    pub fn copy_within(&self, from: u64, to: u64, len: u64) -> bool {
        let (Some(s), Some(d)) = (self.at(from, len), self.at(to, len)) else { return false };
        // SAFETY: both in bounds by `at`; `copy` allows overlap.
        unsafe { s.copy_to(d, len as usize) };
        true
    }

    /// The host address of the page that holds `offset`, for a TLB addend; `None` outside RAM. Valid as long as `self`.
    #[inline]
    #[must_use]
    pub fn host_page(&self, offset: u64) -> Option<u64> {
        self.at(offset & PAGE_MASK, PAGE_SIZE).map(|p| p.expose_provenance() as u64)
    }

    /// The host address of byte 0 of RAM.
    #[must_use]
    pub fn host_base(&self) -> u64 {
        self.base.expose_provenance() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_nothing_and_too_much() {
        assert!(matches!(GuestRam::new(0), Err(RamError::Zero)));
        let e = GuestRam::new(u64::MAX).unwrap_err();
        assert!(matches!(e, RamError::TooMuch { .. }));
        assert!(!e.to_string().contains('\n'));
        assert!(GuestRam::new(1 << 60).is_err());
    }

    #[test]
    fn accesses_are_bounded() {
        let ram = GuestRam::new(0x1234).unwrap();
        assert_eq!(ram.size(), 0x2000);
        assert!(ram.store_u64(0x1ff8, 0x1122_3344_5566_7788));
        assert_eq!(ram.load_u64(0x1ff8), Some(0x1122_3344_5566_7788));
        assert_eq!(ram.load_u32(0x1ffb), Some(0x2233_4455), "unaligned");
        assert_eq!(ram.load_u64(0x1ff9), None);
        assert_eq!(ram.load_u8(0x2000), None);
        assert_eq!(ram.load_u8(u64::MAX), None);
        assert!(!ram.store_u16(0x1fff, 1));
        assert!(!ram.write(0x1fff, &[1, 2]));
        assert!(!ram.read(u64::MAX - 1, &mut [0; 4]));
        assert!(!ram.fill(1, 0, u64::MAX));
        assert_eq!(ram.load(0x1ff8, 3), Some(0x66_7788));
        assert_eq!(ram.exchange_u64(0x1ff8, 0x1122_3344_5566_7788, 5), Some(true));
        assert_eq!(ram.exchange_u64(0x1ff8, 4, 6), Some(false));
        assert_eq!(ram.exchange_u64(0x1ff1, 0, 6), None);
        assert_eq!(ram.exchange_u32(0x2000, 0, 6), None);
        assert!(ram.host_page(0x1fff).is_some() && ram.host_page(0x2000).is_none());
    }
}
