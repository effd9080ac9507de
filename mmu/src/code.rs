//! Code pages: which physical pages, and which 64-byte chunks of them, hold bytes that live translations were made from.
//!
//! Place in the pipeline: the runtime adds a translation's bytes when it makes it and removes them when it drops it; the
//! TLB fill asks [`CodePages::is_code`] so that no write tag ever matches on such a page; every writer (slow path,
//! accessed/dirty updates, devices) reports to [`CodePages::note_write`], and the runtime takes what was hit from
//! [`CodePages::take_written`] and drops the translations. Shared by all vCPUs. Invariant: the bitmap bit of a page is set
//! exactly while the page has an entry in the table.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hashbrown::HashMap;

use twofold_arch::{PAGE_SHIFT, PAGE_SIZE, PhysAddr};

/// log2 of the bytes in a chunk.
const CHUNK_SHIFT: u32 = 6;
const CHUNKS: usize = 64;

/// One page with live translations.
#[derive(Clone, Debug)]
struct Page {
    /// Live translations that have bytes in the page.
    blocks: u32,
    /// Live translations that have bytes in each chunk.
    chunks: [u32; CHUNKS],
    /// Bit i: `chunks[i] != 0`.
    mask: u64,
    /// Writes beside its translations until they stand in the way, and how many that is in all.
    left: u32,
    limit: u32,
}

/// What a write to a code page is to the translations made from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beside {
    /// It may be to their bytes.
    No,
    /// It is to other bytes of the page.
    Yes,
    /// The same, as so many before it: the page is data rather than code, and would do better without its translations.
    Crowded,
}

/// Writes beside translations that have them given up, the first time: they have taken about as long as making them anew. Each
/// further time it is twice as many.
const CROWDED: u32 = 4096;
/// Pages whose limits are remembered.
const MAX_LIMITS: usize = 4096;

/// A range of physical memory with translated code that was written to. Does not cross a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// First byte written.
    pub pa: PhysAddr,
    /// Bytes written.
    pub len: u32,
}

/// The code pages of a machine.
#[derive(Debug)]
pub struct CodePages {
    /// A bit a page, up to the end of RAM.
    bitmap: Box<[AtomicU64]>,
    pages: Mutex<HashMap<u64, Page>>,
    /// Limits of pages that were crowded, by page number.
    limits: Mutex<HashMap<u64, u32>>,
    written: Mutex<Vec<Written>>,
    pending: AtomicBool,
    page_writes: AtomicU64,
    code_writes: AtomicU64,
}

/// The chunks that `len` bytes from page offset `off` touch, as a mask; the range is cut at the page's end.
fn chunk_mask(off: u64, len: u64) -> u64 {
    if len == 0 || off >= PAGE_SIZE {
        return 0;
    }
    let last = off.saturating_add(len - 1).min(PAGE_SIZE - 1) >> CHUNK_SHIFT;
    let first = off >> CHUNK_SHIFT;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// Calls `f` with the number of each chunk of a mask.
fn each_chunk(mut mask: u64, mut f: impl FnMut(usize)) {
    while mask != 0 {
        f(mask.trailing_zeros() as usize);
        mask &= mask - 1;
    }
}

/// A lock that another thread's panic left behind is still good: every update below is complete in itself.
fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl CodePages {
    /// No code page yet, in a machine whose RAM ends at `ram_end`. Pages above are never code pages (ROM cannot change).
    #[must_use]
    pub fn new(ram_end: PhysAddr) -> Self {
        let pages = ram_end.0.div_ceil(PAGE_SIZE);
        Self {
            bitmap: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pages: Mutex::default(),
            limits: Mutex::default(),
            written: Mutex::default(),
            pending: AtomicBool::new(false),
            page_writes: AtomicU64::new(0),
            code_writes: AtomicU64::new(0),
        }
    }

    /// Whether the page of `pa` has live translations.
    #[inline]
    #[must_use]
    pub fn is_code(&self, pa: PhysAddr) -> bool {
        let page = pa.0 >> PAGE_SHIFT;
        self.bitmap.get((page / 64) as usize).is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// A translation was made from `len` bytes at `pa`, all in one page. True when the page was no code page before: then
    /// every vCPU must give up its write tags for it ([`crate::Mmu::revoke_write`]) before the translation may run.
    #[must_use]
    pub fn add(&self, pa: PhysAddr, len: u64) -> bool {
        let number = pa.0 >> PAGE_SHIFT;
        let Some(word) = self.bitmap.get((number / 64) as usize) else { return false };
        let mut pages = lock(&self.pages);
        let page = pages.entry(number).or_insert_with(|| {
            let limit = lock(&self.limits).get(&number).copied().unwrap_or(CROWDED);
            Page { blocks: 0, chunks: [0; CHUNKS], mask: 0, left: limit, limit }
        });
        page.blocks += 1;
        let mask = chunk_mask(pa.page_offset(), len);
        each_chunk(mask, |i| page.chunks[i] += 1);
        page.mask |= mask;
        let bit = 1 << (number % 64);
        word.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// The translation made from these bytes is gone. True when it was the page's last: writes need no watching now.
    pub fn remove(&self, pa: PhysAddr, len: u64) -> bool {
        let number = pa.0 >> PAGE_SHIFT;
        let mut pages = lock(&self.pages);
        let Some(page) = pages.get_mut(&number) else { return false };
        let mask = chunk_mask(pa.page_offset(), len);
        each_chunk(mask, |i| {
            page.chunks[i] = page.chunks[i].saturating_sub(1);
            if page.chunks[i] == 0 {
                page.mask &= !(1 << i);
            }
        });
        page.blocks = page.blocks.saturating_sub(1);
        if page.blocks != 0 {
            return false;
        }
        pages.remove(&number);
        if let Some(word) = self.bitmap.get((number / 64) as usize) {
            word.fetch_and(!(1 << (number % 64)), Ordering::AcqRel);
        }
        true
    }

    /// Every translation is gone.
    pub fn clear(&self) {
        let mut pages = lock(&self.pages);
        pages.clear();
        for word in &self.bitmap {
            word.store(0, Ordering::Release);
        }
    }

    /// Whether `len` bytes at `pa`, in one page, share a 64-byte chunk with translated code.
    #[must_use]
    pub fn touches(&self, pa: PhysAddr, len: u64) -> bool {
        self.is_code(pa)
            && lock(&self.pages)
                .get(&(pa.0 >> PAGE_SHIFT))
                .is_some_and(|p| p.mask & chunk_mask(pa.page_offset(), len) != 0)
    }

    /// What a write of `len` bytes at `pa`, in one code page, is to the page's translations. One beside them is counted.
    #[must_use]
    pub fn beside(&self, pa: PhysAddr, len: u64) -> Beside {
        let number = pa.0 >> PAGE_SHIFT;
        let mut pages = lock(&self.pages);
        let Some(page) = pages.get_mut(&number) else { return Beside::No };
        if page.mask & chunk_mask(pa.page_offset(), len) != 0 {
            return Beside::No;
        }
        self.page_writes.fetch_add(1, Ordering::Relaxed);
        page.left -= 1;
        if page.left != 0 {
            return Beside::Yes;
        }
        page.limit = page.limit.saturating_mul(2);
        page.left = page.limit;
        let mut limits = lock(&self.limits);
        if limits.len() >= MAX_LIMITS {
            limits.clear();
        }
        limits.insert(number, page.limit);
        Beside::Crowded
    }

    /// `len` bytes at `pa` were written. If translated code is touched, it is queued for [`Self::take_written`] and the
    /// answer is true.
    #[inline]
    pub fn note_write(&self, pa: PhysAddr, len: u64) -> bool {
        let mut hit = false;
        let (mut at, mut left) = (pa, len);
        while left > 0 {
            let n = left.min(PAGE_SIZE - at.page_offset());
            if self.is_code(at) {
                hit |= self.note_page_write(at, n);
            }
            left -= n;
            at = at.wrapping_add(n);
        }
        hit
    }

    #[cold]
    fn note_page_write(&self, pa: PhysAddr, len: u64) -> bool {
        self.page_writes.fetch_add(1, Ordering::Relaxed);
        if !self.touches(pa, len) {
            return false;
        }
        self.code_writes.fetch_add(1, Ordering::Relaxed);
        lock(&self.written).push(Written { pa, len: len as u32 });
        self.pending.store(true, Ordering::Release);
        true
    }

    /// Whether [`Self::take_written`] has something; one load.
    #[inline]
    #[must_use]
    pub fn has_written(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// The writes to translated code since the last call. The caller drops the translations they touch before it runs
    /// translated code again.
    #[must_use]
    pub fn take_written(&self) -> Vec<Written> {
        let mut written = lock(&self.written);
        self.pending.store(false, Ordering::Release);
        std::mem::take(&mut *written)
    }

    /// Slow-path writes to code pages so far, and how many of them touched translated code.
    #[must_use]
    pub fn write_counts(&self) -> (u64, u64) {
        (self.page_writes.load(Ordering::Relaxed), self.code_writes.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_code_while_it_has_blocks() {
        let c = CodePages::new(PhysAddr(0x10_0000));
        assert!(c.add(PhysAddr(0x2010), 16));
        assert!(!c.add(PhysAddr(0x203c), 8), "already a code page");
        assert!(c.is_code(PhysAddr(0x2fff)) && !c.is_code(PhysAddr(0x3000)));
        assert!(c.touches(PhysAddr(0x2000), 1), "same chunk");
        assert!(c.touches(PhysAddr(0x2040), 1) && !c.touches(PhysAddr(0x2080), 0xf80));
        assert!(!c.note_write(PhysAddr(0x2080), 8) && !c.has_written());
        assert!(c.note_write(PhysAddr(0x1ffc), 8) && c.has_written());
        assert_eq!(c.take_written(), [Written { pa: PhysAddr(0x2000), len: 4 }]);
        assert!(!c.has_written());
        assert!(!c.remove(PhysAddr(0x203c), 8));
        assert!(!c.touches(PhysAddr(0x2040), 1) && c.touches(PhysAddr(0x2030), 1));
        assert!(c.remove(PhysAddr(0x2010), 16));
        assert!(!c.is_code(PhysAddr(0x2000)) && !c.touches(PhysAddr(0x2010), 4));
        assert_eq!(c.write_counts(), (2, 1));
    }

    #[test]
    fn writes_beside_code_crowd_it_out() {
        let c = CodePages::new(PhysAddr(0x10_0000));
        for limit in [CROWDED, 2 * CROWDED, 4 * CROWDED] {
            assert!(c.add(PhysAddr(0x2000), 16));
            assert_eq!(c.beside(PhysAddr(0x203f), 2), Beside::No);
            assert!((1..limit).all(|_| c.beside(PhysAddr(0x2040), 8) == Beside::Yes));
            assert_eq!(c.beside(PhysAddr(0x2ff8), 8), Beside::Crowded);
            assert_eq!(c.beside(PhysAddr(0x2ff8), 8), Beside::Yes, "who cannot give them up is asked again later");
            assert!(c.remove(PhysAddr(0x2000), 16));
        }
        assert_eq!(c.beside(PhysAddr(0x2040), 8), Beside::No, "no code page");
    }

    #[test]
    fn addresses_outside_ram_are_harmless() {
        let c = CodePages::new(PhysAddr(0x10_0000));
        assert!(!c.add(PhysAddr(u64::MAX), 1));
        assert!(!c.remove(PhysAddr(u64::MAX), u64::MAX));
        assert!(!c.note_write(PhysAddr(u64::MAX - 3), 16));
        assert_eq!(chunk_mask(0, u64::MAX), u64::MAX);
        assert_eq!(chunk_mask(0xfff, 1), 1 << 63);
    }
}
