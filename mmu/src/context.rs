//! TLB contexts: the tables and the jump cache of one address space, under the tags that the SDM gives them.
//!
//! Place in the pipeline: [`crate::Mmu`] keeps several and makes one the current one; [`crate::invalidate`] says what is
//! dropped. A context carries the SDM's tags (VPID, PCID, EP4TA), so that switching the address space is switching a pointer.

use std::fmt;

use twofold_arch::state::TlbView;
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CpuState, LinearAddr, PhysAddr};

use crate::jump::{JumpCache, JumpCacheEntry};
use crate::structures::Structures;
use crate::tlb::Table;
use crate::walk::Last;

/// What `CpuState` must hold so that translated code uses the current context.
#[derive(Clone, Copy, Debug)]
#[must_use = "store it in the CpuState, or translated code goes on with the old context"]
pub struct View {
    /// The tables by [`MemMode`].
    pub tlb: [TlbView; 3],
    /// Host address of the jump cache.
    pub jump_cache: u64,
}

impl View {
    /// Stores the view where translated code finds it.
    #[inline]
    pub fn store(self, state: &mut CpuState) {
        state.tlb = self.tlb;
        state.jump_cache = self.jump_cache;
    }
}

/// The tags of a context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tags {
    pub vpid: u16,
    pub pcid: u16,
    /// `None`: linear mappings, made while EPT was not in use.
    pub ep4ta: Option<u64>,
}

/// Which regions had a large page: an invalidation of one address there drops what came of the whole page. By a hash, so that a
/// region may be taken for one that had; that costs time only.
#[derive(Default)]
struct LargeRegions {
    /// 2 MiB or 4 MiB pages, and 1 GiB pages; none yet if empty.
    seen: Vec<u64>,
    /// log2 of the smaller size.
    shift: u8,
    /// There was a 1 GiB page.
    huge: bool,
}

impl LargeRegions {
    const WORDS: usize = 1024;

    #[inline]
    const fn place(la: LinearAddr, shift: u8) -> (usize, u64) {
        let h = ((la.0 >> shift).wrapping_add(shift as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (h as usize / 64, 1 << (h % 64))
    }

    #[inline]
    fn insert(&mut self, la: LinearAddr, shift: u8) {
        if self.seen.is_empty() {
            self.seen.resize(Self::WORDS, 0);
        }
        if shift >= 30 {
            self.huge = true;
        } else {
            self.shift = shift;
        }
        let (w, bit) = Self::place(la, shift);
        self.seen[w] |= bit;
    }

    fn has(&self, la: LinearAddr, shift: u8) -> bool {
        let (w, bit) = Self::place(la, shift);
        self.seen.get(w).is_some_and(|word| word & bit != 0)
    }

    /// log2 of the size of the largest page that there may have been at `la`, if larger than 4 KiB.
    #[inline]
    fn of(&self, la: LinearAddr) -> Option<u8> {
        if self.seen.is_empty() {
            return None;
        }
        let sizes = [self.huge.then_some(30), (self.shift != 0).then_some(self.shift)];
        sizes.into_iter().flatten().find(|&shift| self.has(la, shift))
    }

    fn clear(&mut self) {
        self.seen.clear();
        (self.shift, self.huge) = (0, false);
    }
}

/// The translations of one address space, as far as they are cached.
pub(crate) struct Context {
    pub tags: Tags,
    /// `AddressSpace::shape` under which the translations were made.
    pub shape: u64,
    pub pkru: u32,
    pub pkrs: u32,
    /// Bit 2i: a translation depends on PKRU's (PKRS's) rights for key i.
    pub pkru_used: u32,
    pub pkrs_used: u32,
    /// Time of the last switch to this context.
    pub last_used: u64,
    tables: [Table; 3],
    jumps: JumpCache,
    structures: Structures,
    /// Which regions had a large page.
    large: LargeRegions,
    /// Nothing was put in since the last full flush.
    empty: bool,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("tags", &self.tags).field("empty", &self.empty).finish_non_exhaustive()
    }
}

impl Context {
    /// An empty context, whose tables may grow to `most` entries.
    ///
    /// # Errors
    /// When the host has no memory for the tables.
    pub(crate) fn new(tags: Tags, most: usize) -> std::io::Result<Self> {
        Ok(Self {
            tags,
            shape: 0,
            pkru: 0,
            pkrs: 0,
            pkru_used: 0,
            pkrs_used: 0,
            last_used: 0,
            tables: [Table::new(most)?, Table::new(most)?, Table::new(most)?],
            jumps: JumpCache::new()?,
            structures: Structures::new(),
            large: LargeRegions::default(),
            empty: true,
        })
    }

    pub(crate) fn view(&self) -> View {
        View { tlb: [0, 1, 2].map(|i: usize| self.tables[i].view()), jump_cache: self.jumps.address() }
    }

    #[inline]
    pub(crate) fn table(&self, mode: MemMode) -> &Table {
        &self.tables[mode as usize]
    }

    #[inline]
    pub(crate) fn table_mut(&mut self, mode: MemMode) -> &mut Table {
        self.empty = false;
        &mut self.tables[mode as usize]
    }

    /// See [`Structures::find`].
    #[inline]
    pub(crate) fn last(&self, la: LinearAddr, write: bool) -> Option<Last> {
        self.structures.find(la, write)
    }

    /// A walk of `la` succeeded.
    #[inline]
    pub(crate) fn learn(&mut self, la: LinearAddr, last: &Last) {
        self.empty = false;
        self.structures.learn(la, last);
    }

    /// A page of `1 << shift` bytes at `la` is going to be cached in 4 KiB pieces.
    #[inline]
    pub(crate) fn note_large(&mut self, la: LinearAddr, shift: u8) {
        self.large.insert(la, shift);
    }

    /// Gives back the memory of tables that hold little. The view is to be stored anew.
    pub(crate) fn shrink(&mut self) {
        self.tables.iter_mut().for_each(Table::shrink);
    }

    /// Drops everything, or all but what came from global pages.
    pub(crate) fn flush(&mut self, globals: bool) {
        if self.empty {
            return;
        }
        for t in &mut self.tables {
            t.flush(globals);
        }
        self.jumps.flush(globals);
        self.structures.flush();
        if globals {
            self.large.clear();
            self.pkru_used = 0;
            self.pkrs_used = 0;
            self.empty = true;
        }
    }

    /// Drops what is cached for `la`, every piece of a large page included, and the paging structures of all addresses; with
    /// `globals_only`, global pages alone.
    pub(crate) fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        if self.empty {
            return;
        }
        if globals_only {
            self.structures.drop_pages(la);
        } else {
            self.structures.flush();
        }
        match self.large.of(la) {
            None => {
                for t in &mut self.tables {
                    t.drop_page(la, globals_only);
                }
                self.jumps.drop_page(la, globals_only);
            }
            Some(shift) => {
                let mask = u64::MAX << shift;
                for t in &mut self.tables {
                    t.drop_region(la, mask, globals_only);
                }
                self.jumps.drop_region(la, mask, globals_only);
            }
        }
    }

    pub(crate) fn revoke_write(&mut self, page: PhysAddr) -> u64 {
        if self.empty { 0 } else { self.tables.iter_mut().map(|t| t.revoke_write(page)).sum() }
    }

    pub(crate) fn jump_insert(&mut self, la: LinearAddr, entry: JumpCacheEntry, global: bool) {
        self.empty = false;
        self.jumps.insert(la, entry, global);
    }

    /// See [`crate::Mmu::code_epoch`].
    pub(crate) fn code_epoch(&mut self, page: LinearAddr) -> u64 {
        self.empty = false;
        self.jumps.epoch(page)
    }

    pub(crate) fn jump_get(&self, rip: u64) -> JumpCacheEntry {
        self.jumps.get(rip)
    }

    pub(crate) fn jump_forget(&mut self, rip: u64) {
        self.jumps.forget(rip);
    }

    pub(crate) fn jump_drop_where(&mut self, gone: impl FnMut(&JumpCacheEntry) -> bool) {
        self.jumps.drop_where(false, gone);
    }

    pub(crate) fn jump_clear(&mut self) {
        self.jumps.flush(true);
    }
}
