//! The jump cache: where translated code finds the code for a RIP, and the epoch of what it was made from.
//!
//! Place in the pipeline: translated code reads it through `CpuState::jump_cache`; a part of each TLB context, and dropped with the
//! mappings of the pages that its entries' code begins in or may run into. Invariant: the pages of all entries are in `pages`
//! (unless `based`), so that what an invalidation of a page costs goes by the entries of that page.

use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashMap;

use twofold_arch::{LinearAddr, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};

use crate::raw::{Bits, RawArray, each_bit};

/// One jump-cache entry, as translated code reads it. It matches when `rip` and `flags` are equal to the target's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct JumpCacheEntry {
    /// RIP of the target.
    pub rip: u64,
    /// `TbFlags` of the target, zero-extended.
    pub flags: u64,
    /// Host address of its code.
    pub code: u64,
    /// Value for `CpuState::rip_base`.
    pub rip_base: u64,
}

const _: () = assert!(size_of::<JumpCacheEntry>() == 32);

impl JumpCacheEntry {
    /// An entry that matches nothing.
    pub const INVALID: Self = Self { rip: u64::MAX, flags: u64::MAX, code: 0, rip_base: 0 };
}

/// Entries in a jump cache.
pub const JUMP_CACHE_ENTRIES: usize = 1 << 15;

/// Pages noted before those without entries are sought and forgotten.
const MANY_PAGES: usize = 4096;

/// The jump-cache index of a RIP: what emitted code computes too. Times 32 it is the byte offset of the entry.
#[inline]
#[must_use]
pub const fn jump_index(rip: u64) -> usize {
    ((rip ^ rip >> PAGE_SHIFT) & (JUMP_CACHE_ENTRIES as u64 - 1)) as usize
}

/// A jump cache and what of it is in use.
pub(crate) struct JumpCache {
    entries: RawArray<JumpCacheEntry>,
    used: Bits,
    global: Bits,
    /// The linear pages that have entries, by page number. All RIPs of a page are in one group of 4096 entries (the offset does
    /// not change the upper bits of the index); in which of the group's 64 words.
    pages: HashMap<u64, u64>,
    /// Some entry's linear address is not its RIP (a CS base): entries cannot be found by linear page.
    based: bool,
    /// Which linear pages somebody has looked at in this epoch.
    watched: Watched,
}

/// Linear pages that somebody has looked at: by a hash of the page number, and one by one as long as they are few. May say yes
/// too often.
struct Watched {
    hashed: [u64; 64],
    pages: Vec<u64>,
    /// There are more than are told apart.
    many: bool,
}

impl Watched {
    /// Pages that are told apart.
    const FEW: usize = 64;

    fn new() -> Self {
        Self { hashed: [0; 64], pages: Vec::with_capacity(Self::FEW), many: false }
    }

    fn clear(&mut self) {
        self.hashed = [0; 64];
        self.pages.clear();
        self.many = false;
    }

    /// The bit of the page of `la`. Those of an aligned 2 MiB are eight aligned words.
    const fn bit(la: LinearAddr) -> (usize, u64) {
        let h = la.0 >> PAGE_SHIFT;
        let h = h ^ h >> 12;
        ((h / 64 % 64) as usize, 1 << (h % 64))
    }

    fn add(&mut self, la: LinearAddr) {
        let (w, bit) = Self::bit(la);
        let page = la.page().0;
        if self.hashed[w] & bit != 0 && self.pages.contains(&page) {
            return;
        }
        self.hashed[w] |= bit;
        if self.pages.len() < Self::FEW {
            self.pages.push(page);
        } else {
            self.many = true;
        }
    }

    #[inline]
    fn has(&self, la: LinearAddr) -> bool {
        let (w, bit) = Self::bit(la);
        self.hashed[w] & bit != 0 && (self.many || self.pages.contains(&la.page().0))
    }

    /// Whether a page that agrees with `la` under `mask` may be among them.
    fn has_region(&self, la: LinearAddr, mask: u64) -> bool {
        const PART: u64 = 1 << 21;
        if !self.many {
            return self.pages.iter().any(|p| (p ^ la.0) & mask & PAGE_MASK == 0);
        }
        let parts = (!mask / PART).saturating_add(1);
        parts > 8
            || (0..parts).any(|n| {
                let (w, _) = Self::bit(LinearAddr((la.0 & mask).wrapping_add(n * PART)));
                self.hashed[w & !7..][..8].iter().any(|&bits| bits != 0)
            })
    }
}

/// Numbers the epochs of all jump caches.
static EPOCHS: AtomicU64 = AtomicU64::new(1);

impl JumpCache {
    pub fn new() -> std::io::Result<Self> {
        // The last entry holds the epoch.
        let entries = RawArray::new(JUMP_CACHE_ENTRIES + 1)?;
        // Memory not yet written holds RIP 0, for which only the first entry is looked at.
        entries.set(jump_index(0), JumpCacheEntry::INVALID);
        let bits = || Bits::new(JUMP_CACHE_ENTRIES);
        let mut new = Self {
            entries,
            used: bits(),
            global: bits(),
            pages: HashMap::new(),
            based: false,
            watched: Watched::new(),
        };
        new.begin_epoch();
        Ok(new)
    }

    pub fn address(&self) -> u64 {
        self.entries.address()
    }

    /// Some mapping that was looked at may have changed.
    fn begin_epoch(&mut self) {
        let rip = EPOCHS.fetch_add(1, Ordering::Relaxed);
        self.entries.set(JUMP_CACHE_ENTRIES, JumpCacheEntry { rip, ..JumpCacheEntry::INVALID });
        self.watched.clear();
    }

    /// The epoch, which ends when the mapping of `page`, or of another page that was asked for in it, may have changed.
    pub fn epoch(&mut self, page: LinearAddr) -> u64 {
        self.watched.add(page);
        self.entries.get(JUMP_CACHE_ENTRIES).rip
    }

    /// The entry at the place of `rip`.
    pub fn get(&self, rip: u64) -> JumpCacheEntry {
        self.entries.get(jump_index(rip))
    }

    pub fn insert(&mut self, la: LinearAddr, entry: JumpCacheEntry, global: bool) {
        let i = jump_index(entry.rip);
        self.entries.set(i, entry);
        self.used.insert(i);
        self.global.assign(i, global);
        self.note_page(la, i);
        self.based |= la.0 != entry.rip;
    }

    fn note_page(&mut self, la: LinearAddr, i: usize) {
        *self.pages.entry(la.0 >> PAGE_SHIFT).or_insert(0) |= 1 << (i / 64 % 64);
    }

    fn drop_entry(&mut self, i: usize) {
        self.entries.set(i, JumpCacheEntry::INVALID);
        self.used.remove(i);
        self.global.remove(i);
    }

    /// Drops the entry for `rip`.
    pub fn forget(&mut self, rip: u64) {
        let i = jump_index(rip);
        if self.used.has(i) && self.entries.get(i).rip == rip {
            self.drop_entry(i);
        }
    }

    /// Drops the entries for which `gone` holds, among all or only the global ones.
    pub fn drop_where(&mut self, globals_only: bool, mut gone: impl FnMut(&JumpCacheEntry) -> bool) {
        let Self { entries, used, global, .. } = self;
        used.each_word(|used, w| {
            let mut drop = 0;
            let among = if globals_only { global.word(w) } else { u64::MAX };
            each_bit(w, used.word(w) & among, |i| {
                if gone(&entries.get(i)) {
                    entries.set(i, JumpCacheEntry::INVALID);
                    drop |= 1 << (i % 64);
                }
            });
            used.remove_word(w, drop);
            global.remove_word(w, drop);
        });
    }

    /// Drops every entry (`globals` too), or all but those of global pages.
    pub fn flush(&mut self, globals: bool) {
        self.begin_epoch();
        let Self { entries, used, global, .. } = self;
        used.each_word(|used, w| {
            let drop = used.word(w) & if globals { u64::MAX } else { !global.word(w) };
            each_bit(w, drop, |i| entries.set(i, JumpCacheEntry::INVALID));
            used.remove_word(w, drop);
            global.remove_word(w, drop);
        });
        if globals {
            self.pages.clear();
            self.based = false;
        } else if self.pages.len() > MANY_PAGES && !self.based {
            self.renew_pages();
        }
    }

    /// Forgets the pages whose entries are gone.
    #[cold]
    fn renew_pages(&mut self) {
        let Self { entries, used, pages, .. } = self;
        pages.clear();
        used.each_word(|used, w| {
            each_bit(w, used.word(w), |i| {
                *pages.entry(entries.get(i).rip >> PAGE_SHIFT).or_insert(0) |= 1 << (i / 64 % 64);
            });
        });
    }

    /// Drops the entries whose code begins in the page of number `page`.
    fn drop_entries_of(&mut self, page: u64, globals_only: bool) {
        let Some(&words) = self.pages.get(&page) else { return };
        let group = jump_index(page << PAGE_SHIFT) / 4096;
        let mut stay = 0;
        each_bit(group, words, |w| {
            let among = if globals_only { self.global.word(w) } else { u64::MAX };
            stay |= if globals_only { 1 << (w % 64) } else { 0 };
            each_bit(w, self.used.word(w) & among, |i| {
                if self.entries.get(i).rip >> PAGE_SHIFT == page {
                    self.drop_entry(i);
                }
            });
        });
        if stay == 0 {
            self.pages.remove(&page);
        }
    }

    /// Drops the entries whose code begins in the page of `la`, or in the page before it and may run into it.
    pub fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        if self.watched.has(la) {
            self.begin_epoch();
        }
        let page = la.0 >> PAGE_SHIFT;
        let before = la.page().0.wrapping_sub(PAGE_SIZE) >> PAGE_SHIFT;
        if !self.based {
            self.drop_entries_of(page, globals_only);
            self.drop_entries_of(before, globals_only);
        } else if self.pages.contains_key(&page) || self.pages.contains_key(&before) {
            self.drop_where(globals_only, |_| true);
        }
    }

    /// As [`Self::drop_page`] for all pages that agree with `la` under `mask`.
    pub fn drop_region(&mut self, la: LinearAddr, mask: u64, globals_only: bool) {
        if self.watched.has_region(la, mask) {
            self.begin_epoch();
        }
        let (first, count) = ((la.0 & mask) >> PAGE_SHIFT, (!mask >> PAGE_SHIFT) + 1);
        // The page before the region, too.
        let distance = |page: u64| page.wrapping_sub(first).wrapping_add(1) & u64::MAX >> PAGE_SHIFT;
        let gone: Vec<u64> = if (self.pages.len() as u64) < count {
            self.pages.keys().copied().filter(|&p| distance(p) <= count).collect()
        } else {
            let all = (0..=count).map(|n| first.wrapping_add(n).wrapping_sub(1) & u64::MAX >> PAGE_SHIFT);
            all.filter(|p| self.pages.contains_key(p)).collect()
        };
        if self.based && !gone.is_empty() {
            return self.drop_where(globals_only, |_| true);
        }
        gone.into_iter().for_each(|page| self.drop_entries_of(page, globals_only));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is dropped is what looking at every entry would find, also after pages were forgotten.
    #[test]
    fn entries_are_found_by_page() {
        let mut jumps = JumpCache::new().unwrap();
        let mut random = 1u64;
        let mut next = |n: u64| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (random >> 33) % n
        };
        let live = |j: &JumpCache| -> Vec<(u64, bool)> {
            let all = (0..JUMP_CACHE_ENTRIES).filter(|&i| j.used.has(i));
            all.map(|i| (j.entries.get(i).rip, j.global.has(i))).collect()
        };
        for round in 0..200 {
            for _ in 0..next(400) {
                let rip = (next(3) << 38) + (next(8192) << 12) + next(4096);
                let entry = JumpCacheEntry { rip, flags: 0, code: 1, rip_base: 0 };
                jumps.insert(LinearAddr(rip), entry, next(2) == 0);
            }
            let before = live(&jumps);
            let la = LinearAddr((next(3) << 38) + (next(8192) << 12));
            let (globals_only, mask) = (next(2) == 0, u64::MAX << [12, 21, 22, 30][round % 4]);
            let gone: Box<dyn Fn(u64, bool) -> bool> = if round % 10 == 9 {
                jumps.flush(false);
                Box::new(|_, global| !global)
            } else {
                if mask == PAGE_SIZE.wrapping_neg() {
                    jumps.drop_page(la, globals_only);
                } else {
                    jumps.drop_region(la, mask, globals_only);
                }
                let near = move |a: u64| (a ^ la.0) & mask == 0;
                Box::new(move |rip, global| {
                    (global || !globals_only) && (near(rip) || near((rip | (PAGE_SIZE - 1)).wrapping_add(1)))
                })
            };
            let expected: Vec<_> = before.into_iter().filter(|&(rip, global)| !gone(rip, global)).collect();
            assert_eq!(live(&jumps), expected, "round {round}");
            assert!(expected.iter().all(|&(rip, _)| jumps.pages.contains_key(&(rip >> PAGE_SHIFT))));
        }
        assert!(jumps.pages.len() < 3 * 8192);
        jumps.flush(true);
        assert!(live(&jumps).is_empty() && jumps.pages.is_empty());
    }
}
