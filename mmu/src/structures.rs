//! The second level of the TLB: large pages as such, and the paging structures that walks can start from.
//!
//! Place in the pipeline: what a miss in [`crate::tlb`] asks before it walks from CR3. A large page's entry answers for each
//! of its 4 KiB pages without a memory reference; a cached page table leaves one entry to read. Part of a TLB context, so that under
//! EPT these are combined mappings of that EP4TA, with guest-physical addresses that still go through EPT
//! ([`crate::nested`] has the cache of that). Invariants: an entry was made by a walk that succeeded, so its accessed flags are
//! set; a walk that starts here and fails says nothing, the walk from the top does (row A10).
//! Sources: SDM Vol 3A, "Caching Paging-Related Information about Translation", "Paging-Structure Caches".

use twofold_arch::LinearAddr;
use twofold_arch::paging::{D, NX, RW, SHIFT_1G, SHIFT_2M, SHIFT_4K, US};

use crate::walk::Last;

/// One region's entry.
#[derive(Clone, Copy)]
struct Entry {
    /// The region's address, and in the low bits the epoch it was cached in.
    tag: u64,
    /// The entry that maps a large page, or the guest-physical address of the table.
    word: u64,
    /// RW and US, the AND of all entries used, and NX, the OR of them; and [`Last::shift`] from bit [`SHIFT`] on.
    rights: u64,
}

const EMPTY: Entry = Entry { tag: 0, word: 0, rights: 0 };

/// Where an entry's rights have the page's size.
const SHIFT: u32 = 8;

/// The entries for regions of one size.
struct Level {
    shift: u8,
    entries: Box<[Entry]>,
}

impl Level {
    fn new(shift: u8, n: usize) -> Self {
        Self { shift, entries: vec![EMPTY; n].into() }
    }

    #[inline]
    fn place(&self, la: LinearAddr) -> usize {
        let n = la.0 >> self.shift;
        // The upper half's addresses meet the lower half's in their low bits.
        (n ^ n >> 12) as usize & (self.entries.len() - 1)
    }

    #[inline]
    const fn tag(&self, la: LinearAddr, epoch: u64) -> u64 {
        la.0 >> self.shift << self.shift | epoch
    }

    #[inline]
    fn find(&self, la: LinearAddr, epoch: u64) -> Option<&Entry> {
        self.entries.get(self.place(la)).filter(|e| e.tag == self.tag(la, epoch))
    }

    #[inline]
    fn put(&mut self, la: LinearAddr, epoch: u64, word: u64, rights: u64) {
        let (i, tag) = (self.place(la), self.tag(la, epoch));
        if let Some(e) = self.entries.get_mut(i) {
            *e = Entry { tag, word, rights };
        }
    }
}

/// Epochs fit in an address within the smallest region; 0 is never current.
const EPOCHS: u64 = 1 << 21;

/// The large pages and paging structures that a context has cached.
pub(crate) struct Structures {
    epoch: u64,
    /// 2 MiB regions, with a large page (or half a 4 MiB page) or a page table; and 1 GiB pages. Made when first used.
    levels: Option<[Level; 2]>,
}

impl Structures {
    pub const fn new() -> Self {
        Self { epoch: 1, levels: None }
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        let Some(levels) = &mut self.levels else { return };
        self.epoch += 1;
        if self.epoch == EPOCHS {
            self.epoch = 1;
            levels.iter_mut().for_each(|l| l.entries.fill(EMPTY));
        }
    }

    /// Drops what may be a large page of `la`; tables may stay.
    pub fn drop_pages(&mut self, la: LinearAddr) {
        for level in self.levels.iter_mut().flatten() {
            // A 4 MiB page is cached in two halves.
            for la in [la, LinearAddr(la.0 ^ 1 << level.shift)] {
                let i = level.place(la);
                level.entries[i] = EMPTY;
            }
        }
    }

    /// The end of a walk of `la`. A write needs a page whose D flag is set.
    #[inline]
    pub fn find(&self, la: LinearAddr, write: bool) -> Option<Last> {
        let levels = self.levels.as_ref()?;
        let e = levels.iter().find_map(|level| level.find(la, self.epoch))?;
        let last =
            Last { shift: (e.rights >> SHIFT) as u8, entry: e.word, all: e.rights | !(RW | US), any: e.rights & NX };
        (!write || last.shift == SHIFT_4K || last.entry & D != 0).then_some(last)
    }

    /// Caches what a walk of `la` that succeeded came to.
    #[inline]
    pub fn learn(&mut self, la: LinearAddr, last: &Last) {
        let levels = self.levels.get_or_insert_with(|| [Level::new(SHIFT_2M, 2048), Level::new(SHIFT_1G, 64)]);
        let level = &mut levels[usize::from(last.shift >= SHIFT_1G)];
        let rights = last.all & (RW | US) | last.any & NX | u64::from(last.shift) << SHIFT;
        level.put(la, self.epoch, last.entry, rights);
    }
}
