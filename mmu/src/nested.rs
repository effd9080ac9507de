//! Guest-physical memory through EPT: what the guest's walk reads its tables through, and the cache of guest-physical
//! mappings that makes a nested walk cheap.
//!
//! Place in the pipeline: [`Nested`] is the [`GuestPhysical`] of [`crate::walk`] while EPT is in use; each reference of the walk
//! to a guest paging structure is a guest-physical access of its own (row F1). Invariants: a cached mapping is only used
//! under the EP4TA and the shape it was made under (rows D2, D7) and for an access that it allows; every refusal, and
//! every flag that must be set, comes from a walk of EPT as it is now. A writable mapping is only cached as such once its D
//! flag needs no setting, and a page is only written to by a cached mapping while that flag is set.
//! Sources: SDM Vol 3C, "Caching Translation Information", "EPT Violations", "Exit Qualification for EPT Violations".

use twofold_arch::vmx::ept::{D, PS, R, W};
use twofold_arch::vmx::qualification::ept_violation as q;
use twofold_arch::{GuestPhysAddr, LinearAddr, PAGE_SHIFT, PhysAddr};

use crate::ept::{EptAccess, EptControls, EptCounts, EptPage, EptWalk, Pml};
use crate::rights::Rights;
use crate::space::{AccessKind, EptFault};
use crate::walk::{Direct, EntryWidth, Frame, GuestPhysical};

const SMALL: usize = 4096;
const LARGE: usize = 1024;
const LARGE_SHIFT: u8 = 21;

/// A cached guest-physical mapping.
#[derive(Clone, Copy)]
struct Entry {
    /// Address of the guest-physical page (4 KiB, or 2 MiB), and in the low bits the epoch it was cached in.
    tag: u64,
    page: EptPage,
    /// Where the entry that maps the page is, with its D flag.
    leaf: PhysAddr,
}

const EMPTY: Entry = Entry { tag: 0, page: EptPage(0), leaf: PhysAddr(0) };

/// Epochs fit in a page offset; 0 is never current.
const EPOCHS: u64 = 1 << PAGE_SHIFT;

/// The guest-physical mappings of one EP4TA under one shape.
pub(crate) struct GpaCache {
    /// The EP4TA.
    pub top: u64,
    /// `EptControls::shape`.
    pub shape: u32,
    /// Time of the last switch to it.
    pub last_used: u64,
    epoch: u64,
    small: Box<[Entry; SMALL]>,
    /// By 2 MiB region: 2 MiB pages and pieces of 1 GiB pages; or (PS clear) the EPT page table of the region, with the
    /// rights that the entries above it have in common.
    large: Box<[Entry; LARGE]>,
}

impl std::fmt::Debug for GpaCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpaCache").field("top", &self.top).field("shape", &self.shape).finish_non_exhaustive()
    }
}

#[inline]
const fn slot(gpa: GuestPhysAddr, shift: u8, n: usize) -> usize {
    (gpa.0 >> shift) as usize & (n - 1)
}

impl GpaCache {
    pub fn new(c: &EptControls) -> Self {
        Self {
            top: c.top,
            shape: c.shape(),
            last_used: 0,
            epoch: 1,
            small: Box::new([EMPTY; SMALL]),
            large: Box::new([EMPTY; LARGE]),
        }
    }

    /// Empties it for another EP4TA or shape.
    pub fn reuse(&mut self, c: &EptControls) {
        self.flush();
        (self.top, self.shape) = (c.top, c.shape());
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        self.epoch += 1;
        if self.epoch == EPOCHS {
            self.epoch = 1;
            self.small.fill(EMPTY);
            self.large.fill(EMPTY);
        }
    }

    /// Drops what translates `gpa`.
    pub fn drop_page(&mut self, gpa: GuestPhysAddr) {
        self.small[slot(gpa, 12, SMALL)] = EMPTY;
        self.large[slot(gpa, LARGE_SHIFT, LARGE)] = EMPTY;
    }

    #[inline]
    fn find(&self, gpa: GuestPhysAddr) -> Option<&Entry> {
        let e = &self.small[slot(gpa, 12, SMALL)];
        if e.tag == gpa.page().0 | self.epoch {
            return Some(e);
        }
        let e = &self.large[slot(gpa, LARGE_SHIFT, LARGE)];
        (e.tag == self.large_tag(gpa) && e.page.0 & PS != 0).then_some(e)
    }

    #[inline]
    const fn large_tag(&self, gpa: GuestPhysAddr) -> u64 {
        gpa.0 >> LARGE_SHIFT << LARGE_SHIFT | self.epoch
    }

    /// The EPT page table that maps the region of `gpa`, if it is cached.
    fn table(&self, gpa: GuestPhysAddr) -> Option<EptPage> {
        let e = &self.large[slot(gpa, LARGE_SHIFT, LARGE)];
        (e.tag == self.large_tag(gpa) && e.page.0 & PS == 0).then_some(e.page)
    }

    /// Whether no page has the place of the page of `gpa`.
    #[inline]
    fn is_free(&self, gpa: GuestPhysAddr) -> bool {
        self.small[slot(gpa, 12, SMALL)].tag % EPOCHS != self.epoch
    }

    fn insert_small(&mut self, gpa: GuestPhysAddr, page: EptPage, walk: &EptWalk) {
        self.small[slot(gpa, 12, SMALL)] = Entry { tag: gpa.page().0 | self.epoch, page, leaf: walk.leaf() };
    }

    /// Caches what a walk found: a page, and on the way to a small one the table it is in.
    fn insert(&mut self, gpa: GuestPhysAddr, page: EptPage, walk: &EptWalk) {
        let region = if page.shift() == 12 {
            self.insert_small(gpa, page, walk);
            walk.table()
        } else {
            // A mapping of the address in the other array would be found first.
            self.small[slot(gpa, 12, SMALL)] = EMPTY;
            page
        };
        self.large[slot(gpa, LARGE_SHIFT, LARGE)] = Entry { tag: self.large_tag(gpa), page: region, leaf: walk.leaf() };
    }
}

/// Guest-physical memory through EPT.
pub struct Nested<'a> {
    memory: Direct<'a>,
    controls: EptControls,
    cache: Option<&'a mut GpaCache>,
    /// `None`: nothing may be changed, neither flags nor the cache.
    pml: Option<&'a mut Option<Pml>>,
    /// What a reference to a paging-structure entry needs.
    table: EptAccess,
    /// Use no cached mapping, but replace what is cached.
    pub(crate) bypass: bool,
    pub(crate) counts: EptCounts,
}

impl<'a> Nested<'a> {
    /// What the walk of a linear address uses.
    pub(crate) fn new(
        memory: Direct<'a>,
        controls: EptControls,
        cache: &'a mut GpaCache,
        pml: &'a mut Option<Pml>,
    ) -> Self {
        // With accessed and dirty flags for EPT, the processor's accesses to guest paging structures count as writes.
        let (need, bits) = if controls.accessed_dirty { (R | W | D, q::READ | q::WRITE) } else { (R, q::READ) };
        let table = EptAccess { need, qualification: (bits | q::LINEAR_VALID) as u32, la: None };
        let (cache, pml) = (Some(cache), Some(pml));
        Self { memory, controls, cache, pml, table, bypass: false, counts: EptCounts::default() }
    }

    /// As [`Self::new`], to load PDPTE registers: reads, whatever the flags, for no linear address.
    pub(crate) fn for_pdptes(mut self) -> Self {
        self.table = EptAccess { need: R, qualification: q::READ as u32, la: None };
        self
    }

    /// A view that changes nothing, uses no cached mapping and needs no rights: for debuggers and traces.
    pub(crate) fn peek(memory: Direct<'a>, controls: EptControls) -> Self {
        let table = EptAccess { need: 0, qualification: (q::READ | q::LINEAR_VALID) as u32, la: None };
        Self { memory, controls, cache: None, pml: None, table, bypass: true, counts: EptCounts::default() }
    }

    /// The page of `gpa`, if it is cached and has the rights in `need`.
    #[inline]
    fn cached(&mut self, gpa: GuestPhysAddr, need: u64) -> Option<EptPage> {
        if self.bypass {
            return None;
        }
        let page = self.cache.as_ref()?.find(gpa)?.page;
        if page.0 & need != need {
            return None;
        }
        self.counts.hits += 1;
        Some(page)
    }

    /// As [`Self::cached`], for a write, if the D flag of the entry that maps the page is still set. A processor may remember
    /// that it was; but those that cache only combined mappings of pages do not, and software has come to rely on seeing
    /// the flag set again after an invalidation of those alone, as a VM entry without VPIDs is.
    fn cached_dirty(&mut self, gpa: GuestPhysAddr, need: u64) -> Option<EptPage> {
        if self.controls.accessed_dirty && !self.bypass {
            let leaf = self.cache.as_ref()?.find(gpa)?.leaf;
            if self.memory.load_u64(leaf) & D == 0 {
                return None;
            }
        }
        self.cached(gpa, need)
    }

    /// The page of `gpa` for the access of `need` that a linear address ends in, by the EPT page table of its region, if that is
    /// cached. The page is cached only where that drives out no other: pages of data are many, and would take the places of
    /// those with paging structures.
    #[inline]
    fn in_region(&mut self, gpa: GuestPhysAddr, need: u64) -> Option<EptPage> {
        if self.bypass {
            return None;
        }
        let cache = self.cache.as_deref_mut()?;
        let table = cache.table(gpa)?;
        self.counts.walks += 1;
        self.counts.entries_read += 1;
        let access = EptAccess { need, qualification: 0, la: None };
        let mut walk = EptWalk::new();
        let page = walk.last_level(&self.controls, self.memory, gpa, table, &access)?;
        // The table may have been found in what is not in memory any more.
        self.counts.hits += 1;
        if cache.is_free(gpa) {
            cache.insert_small(gpa, page, &walk);
        }
        Some(page)
    }

    /// The page of `gpa`, if `access` is allowed.
    pub(crate) fn find(&mut self, gpa: GuestPhysAddr, access: &EptAccess) -> Result<EptPage, EptFault> {
        match self.cached(gpa, access.need) {
            Some(page) => Ok(page),
            None => self.find_uncached(gpa, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn find_uncached(&mut self, gpa: GuestPhysAddr, access: &EptAccess) -> Result<EptPage, EptFault> {
        let mut walk = EptWalk::new();
        if !self.bypass
            && let Some(cache) = self.cache.as_deref_mut()
            && let Some(table) = cache.table(gpa)
        {
            self.counts.walks += 1;
            self.counts.entries_read += 1;
            if let Some(page) = walk.last_level(&self.controls, self.memory, gpa, table, access) {
                // The table may have been found in what is not in memory any more.
                self.counts.hits += 1;
                cache.insert_small(gpa, page, &walk);
                return Ok(page);
            }
        }
        let Some(pml) = self.pml.as_deref_mut() else {
            return walk.look(&self.controls, self.memory, gpa, access).map_err(|(_, fault)| fault);
        };
        let page = walk.walk(&self.controls, self.memory, gpa, access, pml, &mut self.counts)?;
        if let Some(cache) = self.cache.as_deref_mut() {
            cache.insert(gpa, page, &walk);
        }
        Ok(page)
    }

    fn table_access(&self, la: LinearAddr) -> EptAccess {
        let la = (self.table.qualification & q::LINEAR_VALID as u32 != 0).then_some(la);
        EptAccess { la, ..self.table }
    }

    /// The rights that an access of `kind` needs; `user` says that the linear address is a user-mode one.
    #[inline]
    const fn need(controls: &EptControls, kind: AccessKind, user: bool) -> u64 {
        match kind {
            AccessKind::Read => R,
            AccessKind::Write => W | D,
            AccessKind::Fetch => controls.fetch_right(user),
        }
    }

    /// The access of `kind` to a guest-physical address that is (`Some`) or is not the translation of a linear address.
    pub(crate) fn access(controls: &EptControls, kind: AccessKind, linear: Option<(LinearAddr, Rights)>) -> EptAccess {
        let user = linear.is_none_or(|(_, r)| r.user);
        let need = Self::need(controls, kind, user);
        let mut bits = match kind {
            AccessKind::Read => q::READ,
            AccessKind::Write => q::WRITE,
            AccessKind::Fetch => q::FETCH,
        };
        if let Some((_, r)) = linear {
            bits |= q::LINEAR_VALID | q::TRANSLATION;
            for (on, bit) in
                [(r.user, q::LINEAR_USER), (r.write, q::LINEAR_WRITABLE), (!r.exec, q::LINEAR_EXECUTE_DISABLE)]
            {
                if on {
                    bits |= bit;
                }
            }
        }
        EptAccess { need, qualification: bits as u32, la: linear.map(|(la, _)| la) }
    }

    /// What the second stage says of a page, for a linear address that is (`user`) a user-mode one.
    #[inline]
    pub(crate) fn frame(&self, gpa: GuestPhysAddr, page: EptPage, user: bool) -> Frame {
        Frame {
            pa: page.place(gpa),
            shift: page.shift(),
            read: page.0 & R != 0,
            write: page.0 & (W | D) == W | D,
            exec: page.0 & self.controls.fetch_right(user) != 0,
            memory_type: Some((page.memory_type(), page.ignores_pat())),
        }
    }
}

impl GuestPhysical for Nested<'_> {
    #[inline]
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, la: LinearAddr) -> Result<u64, EptFault> {
        let page = match self.cached(at, self.table.need) {
            Some(page) => page,
            None => self.find_uncached(at, &self.table_access(la))?,
        };
        Ok(self.memory.load_entry(page.place(at), width))
    }

    fn exchange_entry(
        &mut self,
        at: GuestPhysAddr,
        width: EntryWidth,
        old: u64,
        new: u64,
        la: LinearAddr,
    ) -> Result<bool, EptFault> {
        if self.pml.is_none() {
            return Ok(true);
        }
        let qualification = (q::READ | q::WRITE | q::LINEAR_VALID) as u32;
        let access = EptAccess { need: W | D, qualification, la: Some(la) };
        let page = match self.cached_dirty(at, access.need) {
            Some(page) => page,
            None => self.find_uncached(at, &access)?,
        };
        Ok(self.memory.exchange(page.place(at), width, old, new))
    }

    #[inline]
    fn resolve(
        &mut self,
        at: GuestPhysAddr,
        kind: AccessKind,
        rights: Rights,
        la: LinearAddr,
    ) -> Result<Frame, EptFault> {
        let need = Self::need(&self.controls, kind, rights.user);
        let cached = if kind == AccessKind::Write { self.cached_dirty(at, need) } else { self.cached(at, need) };
        let page = match cached.or_else(|| self.in_region(at, need)) {
            Some(page) => page,
            None => {
                let access = Self::access(&self.controls, kind, Some((la, rights)));
                let access = if self.pml.is_none() { access.without_needs() } else { access };
                self.find_uncached(at, &access)?
            }
        };
        Ok(self.frame(at, page, rights.user))
    }
}
