//! One vCPU's MMU: walks, TLB contexts and code pages tied together.
//!
//! Place in the pipeline: the slow path of translated code, fetch, and every helper that touches guest memory come here.
//! Invariants: the current context always carries the tags and the shape of the address space that the caller passes in
//! (the functions that change the address space see to it); an access that crosses a page has both pages checked before
//! its first byte is read or written; a fault is only ever returned from a walk of memory as it is now (row A10).

use std::sync::Arc;

use twofold_arch::paging::SHIFT_4K;
use twofold_arch::tbflags::MemMode;
use twofold_arch::vmx::ept::sppt::SUB_PAGE;
use twofold_arch::{LinearAddr, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PhysAddr};

use crate::code::CodePages;
use crate::context::{Context, Tags, View};
use crate::ept::{EptControls, Pml};
use crate::jump::JumpCacheEntry;
use crate::nested::{GpaCache, Nested};
use crate::physmap::{PhysMap, Target};
use crate::rights::permitted;
use crate::space::{Access, AccessKind, AddressSpace, Fault};
use crate::stats::{FlushPolicy, MmuStats};
use crate::tlb::{Hit, NewEntry, SLOW_CODE, SLOW_IO, most_entries};
use crate::walk::{Direct, GuestPhysical, Mapping, Peek, Steps, WalkCounts, walk, walk_last, walk_noting};

/// Where an access goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address of the byte.
    pub pa: PhysAddr,
    /// The host address of the byte, good to the end of its page, when the access may be made there directly.
    pub host: Option<u64>,
    /// A write to a page that holds translated code: report it to [`CodePages::note_write`].
    pub code: bool,
    /// From a global page.
    pub global: bool,
    /// A write that only sub-page write permissions allow: to this byte and to the end of its 128 bytes, and now.
    pub sub_page: bool,
}

/// Where an instruction's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fetched {
    /// The physical address of the byte; with the page offset cleared, that of the code page.
    pub pa: PhysAddr,
    /// The host address of the byte, good to the end of its page; `None` when a device or nothing answers. The bytes may
    /// change at any time: copy them with [`PhysMap::read`].
    pub host: Option<u64>,
    /// From a global page: what [`Mmu::jump_insert`] wants to know.
    pub global: bool,
}

/// The part of an access that lies in one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Physical address of its first byte.
    pub pa: PhysAddr,
    /// Bytes.
    pub len: u32,
    /// What answers there.
    pub target: Target,
}

/// The one or two parts of an access of at most a page, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// The part in the first page.
    pub first: Part,
    /// The part in the page after it.
    pub second: Option<Part>,
}

impl Parts {
    /// The parts in order.
    pub fn iter(&self) -> impl Iterator<Item = Part> {
        std::iter::once(self.first).chain(self.second)
    }
    fn has_io(&self) -> bool {
        self.iter().any(|p| matches!(p.target, Target::Mmio { .. } | Target::Unmapped))
    }
}

/// What [`Mmu::read`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadOutcome {
    /// The value, zero-extended.
    Value(u64),
    /// Nothing was read: a device answers to at least one part, so the caller makes the access part by part.
    Io(Parts),
}

/// What [`Mmu::write`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteOutcome {
    /// Written. `code`: translated code was hit, and waits in [`CodePages::take_written`].
    Done {
        /// Translated code was hit.
        code: bool,
    },
    /// Nothing was written: a device answers to at least one part, so the caller makes the access part by part.
    Io(Parts),
}

/// What [`Mmu::read_bytes`] or [`Mmu::write_bytes`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BytesOutcome {
    /// Copied. `code`: translated code was hit, and waits in [`CodePages::take_written`].
    Done {
        /// Translated code was hit.
        code: bool,
    },
    /// Nothing was copied: a device answers to at least one part, so the caller makes the access part by part.
    Io(Vec<Part>),
}

/// One vCPU's MMU.
#[derive(Debug)]
pub struct Mmu {
    pub(crate) phys: Arc<PhysMap>,
    pub(crate) code: Arc<CodePages>,
    pub(crate) policy: FlushPolicy,
    pub(crate) contexts: Vec<Context>,
    /// Entries that a table may grow to.
    pub(crate) most_entries: usize,
    pub(crate) current: usize,
    pub(crate) clock: u64,
    pub(crate) view_changed: bool,
    /// A bit a page of physical memory: some context may hold a write tag for it that matches.
    pub(crate) write_cached: Vec<u64>,
    /// Guest-physical mappings by EP4TA and shape.
    pub(crate) gpa_caches: Vec<GpaCache>,
    /// The one used last.
    pub(crate) gpa_current: usize,
    /// Walks use cached paging structures, large pages and guest-physical mappings.
    pub(crate) walk_caching: bool,
    pub(crate) pml: Option<Pml>,
    pub(crate) apic_access: Option<PhysAddr>,
    pub(crate) stats: MmuStats,
}

pub(crate) const fn tags_of(space: &AddressSpace) -> Tags {
    Tags { vpid: space.vpid, pcid: space.pcid, ep4ta: space.ep4ta() }
}

impl Mmu {
    /// The MMU of a vCPU that has just been reset.
    ///
    /// # Errors
    /// When the host has no memory for the TLB.
    pub fn new(phys: Arc<PhysMap>, code: Arc<CodePages>, policy: FlushPolicy) -> std::io::Result<Self> {
        let pages = phys.high_ram_end().0.max(phys.low_ram_end().0) >> PAGE_SHIFT;
        let most = most_entries(pages);
        let context = Context::new(Tags { vpid: 0, pcid: 0, ep4ta: None }, most)?;
        Ok(Self {
            phys,
            code,
            policy,
            contexts: vec![context],
            most_entries: most,
            current: 0,
            clock: 0,
            view_changed: false,
            write_cached: vec![0; pages.div_ceil(64) as usize],
            gpa_caches: Vec::new(),
            gpa_current: 0,
            walk_caching: true,
            pml: None,
            apic_access: None,
            stats: MmuStats::default(),
        })
    }

    /// What the `CpuState` must hold for translated code to use the current context.
    pub fn view(&self) -> View {
        self.contexts[self.current].view()
    }

    /// Whether a table grew since the last call: then [`Self::view`] should be stored again. Being late costs misses only.
    #[inline]
    pub fn take_view_change(&mut self) -> bool {
        std::mem::take(&mut self.view_changed)
    }

    /// Whether walks use cached paging structures, large pages and guest-physical mappings (they do at first): off for comparison
    /// and for bisecting.
    pub fn set_walk_caching(&mut self, on: bool) {
        self.walk_caching = on;
    }

    /// Page-modification logging, as VM entry sets it (`None`: off); it only works with accessed and dirty flags for EPT.
    pub fn set_pml(&mut self, pml: Option<Pml>) {
        self.pml = pml;
    }

    /// Page-modification logging with its index as it is now, which VM exit stores.
    #[must_use]
    pub fn pml(&self) -> Option<Pml> {
        self.pml
    }

    /// The APIC-access page, as VM entry sets it (`None`: none): accesses to it are the caller's, like a device's with the
    /// number [`Self::APIC_ACCESS`]. Translations made before are not affected.
    pub fn set_apic_access(&mut self, page: Option<PhysAddr>) {
        self.apic_access = page;
    }

    /// What [`Target::Mmio`] calls the APIC-access page.
    pub const APIC_ACCESS: u32 = u32::MAX;

    /// What answers at `pa`.
    #[inline]
    fn target(&self, pa: PhysAddr) -> Target {
        if self.apic_access == Some(PhysAddr(pa.0 & PAGE_MASK)) {
            return Target::Mmio { id: Self::APIC_ACCESS, offset: pa.page_offset() };
        }
        self.phys.target(pa)
    }

    /// The physical map.
    #[must_use]
    pub fn phys(&self) -> &Arc<PhysMap> {
        &self.phys
    }

    /// The machine's code pages.
    #[must_use]
    pub fn code(&self) -> &Arc<CodePages> {
        &self.code
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &MmuStats {
        &self.stats
    }
}

// Translation.
impl Mmu {
    /// Where an access of one byte (or of several in one page) goes: from the TLB, else by a walk.
    ///
    /// # Errors
    /// [`Fault`], from a walk of memory as it is now.
    #[inline]
    pub fn translate(&mut self, space: &AddressSpace, la: LinearAddr, access: Access) -> Result<Translation, Fault> {
        let mode = space.mem_mode(access);
        debug_assert_eq!(
            self.contexts[self.current].tags,
            tags_of(space),
            "the address space was changed behind the MMU"
        );
        match self.contexts[self.current].table(mode).lookup(la, access.kind) {
            Some(hit) => Ok(self.use_hit(space, la, access, hit)),
            None => self.fill(space, la, access),
        }
    }

    #[inline]
    fn use_hit(&mut self, space: &AddressSpace, la: LinearAddr, access: Access, hit: Hit) -> Translation {
        let mut slow = hit.slow;
        if slow & SLOW_CODE != 0 && !self.code.is_code(hit.page) {
            self.contexts[self.current].table_mut(space.mem_mode(access)).restore_write(la);
            self.note_write_tag(hit.page);
            slow &= !SLOW_CODE;
        }
        Translation {
            pa: PhysAddr(hit.page.0 | la.page_offset()),
            host: (slow == 0).then(|| la.0.wrapping_add(hit.addend)),
            code: slow & SLOW_CODE != 0,
            global: hit.global,
            sub_page: false,
        }
    }

    /// Walks for `access` and puts the translation in the TLB: what a miss calls.
    ///
    /// # Errors
    /// [`Fault`] as the SDM says.
    #[inline(never)]
    pub fn fill(&mut self, space: &AddressSpace, la: LinearAddr, access: Access) -> Result<Translation, Fault> {
        if let Some(controls) = EptControls::of(space) {
            return self.fill_nested(space, controls, la, access);
        }
        let mut memory = Direct { phys: &self.phys, code: &self.code };
        let mut counts = WalkCounts::default();
        if self.walk_caching
            && let Some(last) = self.contexts[self.current].last(la, access.is_write())
            && let Some(mapping) = walk_last(space, la, access, &mut memory, &mut counts, &last)
        {
            return Ok(self.settle_last(space, la, access, &mapping, counts));
        }
        let mut steps = Steps::new();
        let found =
            check_linear(space, la).and_then(|la| walk_noting(space, la, access, &mut memory, &mut counts, &mut steps));
        self.settle(space, la, access, found, counts, &steps)
    }

    /// [`Self::fill`] while EPT is in use.
    fn fill_nested(
        &mut self,
        space: &AddressSpace,
        controls: EptControls,
        la: LinearAddr,
        access: Access,
    ) -> Result<Translation, Fault> {
        let cache = self.gpa_cache(&controls);
        let memory = Direct { phys: &self.phys, code: &self.code };
        let mut nested = Nested::new(memory, controls, &mut self.gpa_caches[cache], &mut self.pml);
        nested.bypass = !self.walk_caching;
        let mut counts = WalkCounts::default();
        if self.walk_caching
            && let Some(last) = self.contexts[self.current].last(la, access.is_write())
        {
            let found = walk_last(space, la, access, &mut nested, &mut counts, &last);
            if let Some(mapping) = found {
                let ept = nested.counts;
                self.stats.count_ept(&ept);
                return Ok(self.settle_last(space, la, access, &mapping, counts));
            }
        }
        let mut steps = Steps::new();
        let found = check_linear(space, la).and_then(|la| {
            let found = walk_noting(space, la, access, &mut nested, &mut counts, &mut steps);
            if found.is_err() && nested.counts.hits != 0 {
                // The fault may come of a guest-physical mapping that is not in memory any more.
                nested.bypass = true;
                steps = Steps::new();
                return walk_noting(space, la, access, &mut nested, &mut counts, &mut steps);
            }
            found
        });
        let ept = nested.counts;
        self.stats.count_ept(&ept);
        if let Err(Fault::Ept(fault)) = &found {
            self.ept_fault(space, fault);
        }
        self.settle(space, la, access, found, counts, &steps)
    }

    /// The end of a miss that the second level answered.
    #[inline]
    fn settle_last(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        access: Access,
        m: &Mapping,
        counts: WalkCounts,
    ) -> Translation {
        self.stats.misses += 1;
        self.stats.entries_read += counts.entries_read;
        if counts.entries_read == 0 {
            self.stats.large_page_hits += 1;
        } else {
            self.stats.page_table_hits += 1;
        }
        self.install(space, la, access, m)
    }

    /// [`Self::fill`] with paging-structure entries read and guest-physical addresses resolved by `memory`.
    ///
    /// # Errors
    /// [`Fault`] as the SDM says.
    pub fn fill_through<M: GuestPhysical>(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        access: Access,
        memory: &mut M,
    ) -> Result<Translation, Fault> {
        let mut counts = WalkCounts::default();
        let found = check_linear(space, la).and_then(|la| walk(space, la, access, memory, &mut counts));
        // The second level learns nothing: it would not know whose memory that was.
        self.settle(space, la, access, found, counts, &Steps::new())
    }

    /// The end of a miss that was walked for: counts, and if the walk found one, the translation installed.
    #[inline]
    fn settle(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        access: Access,
        found: Result<Mapping, Fault>,
        counts: WalkCounts,
        steps: &Steps,
    ) -> Result<Translation, Fault> {
        self.stats.misses += 1;
        self.stats.walks[space.mode as usize] += 1;
        self.stats.nested_walks += u64::from(space.eptp.is_some());
        self.stats.entries_read += counts.entries_read;
        self.stats.ad_writes += counts.ad_writes;
        match found {
            Ok(mapping) => {
                let la = check_linear(space, la)?;
                if let Some(last) = steps.last(mapping.guest_shift, access.is_write()) {
                    self.contexts[self.current].learn(la, &last);
                }
                Ok(self.install(space, la, access, &mapping))
            }
            Err(fault) => {
                self.stats.faults += 1;
                Err(fault)
            }
        }
    }

    /// Puts a mapping in the current context's table for `access`.
    fn install(&mut self, space: &AddressSpace, la: LinearAddr, access: Access, m: &Mapping) -> Translation {
        let mode = space.mem_mode(access);
        let mut tags = permitted(space, m.rights, mode);
        tags.read &= m.stage2.read;
        // Without the D flag the first write must walk again, to set it.
        tags.write &= m.stage2.write && m.dirty;
        tags.exec &= m.stage2.exec;
        let (host, slow_read, slow_write) = match self.target(m.page) {
            Target::Ram(offset) => {
                let code = self.code.is_code(m.page);
                (self.phys.ram().host_page(offset), 0, if code { SLOW_CODE } else { 0 })
            }
            Target::Rom { index, offset } => (self.phys.rom(index).and_then(|r| r.host_page(offset)), 0, SLOW_IO),
            Target::Mmio { .. } | Target::Unmapped => (None, SLOW_IO, SLOW_IO),
        };
        let (slow_read, slow_write) = if host.is_some() { (slow_read, slow_write) } else { (SLOW_IO, SLOW_IO) };
        if tags.write && slow_write == 0 {
            self.note_write_tag(m.page);
        }
        let addend = host.unwrap_or(0).wrapping_sub(la.page().0);
        let context = &mut self.contexts[self.current];
        if m.rights.user {
            context.pkru_used |= u32::from(space.pke) << (2 * u32::from(m.rights.pkey));
        } else {
            context.pkrs_used |= u32::from(space.pks) << (2 * u32::from(m.rights.pkey));
        }
        if m.guest_shift > SHIFT_4K {
            context.note_large(la, m.guest_shift);
        }
        let table = context.table_mut(mode);
        let new = NewEntry { la, page: m.page, addend, tags, slow_read, slow_write, global: m.global };
        if table.install(&new) && table.grow() {
            self.stats.table_growths += 1;
            self.view_changed = true;
        }
        let slow = if access.is_write() { slow_write } else { slow_read };
        let sub_page = access.is_write() && !m.stage2.write;
        Translation {
            pa: PhysAddr(m.page.0 | la.page_offset()),
            host: (slow == 0 && !sub_page).then(|| la.0.wrapping_add(addend)),
            code: slow & SLOW_CODE != 0,
            global: m.global,
            sub_page,
        }
    }

    #[inline]
    fn note_write_tag(&mut self, page: PhysAddr) {
        let n = page.0 >> PAGE_SHIFT;
        if let Some(w) = self.write_cached.get_mut((n / 64) as usize) {
            *w |= 1 << (n % 64);
        }
    }

    /// Loads 1, 2, 4 or 8 bytes, zero-extended, if translated code's probe would hit: what the evaluator tries before
    /// [`Self::read`].
    #[inline]
    #[must_use]
    pub fn load_cached(&self, mode: MemMode, la: LinearAddr, size: u32) -> Option<u64> {
        self.contexts[self.current].table(mode).load(la, size)
    }

    /// Stores 1, 2, 4 or 8 bytes if translated code's probe would hit; false when it would not, and nothing is done.
    #[inline]
    #[must_use]
    pub fn store_cached(&self, mode: MemMode, la: LinearAddr, size: u32, value: u64) -> bool {
        self.contexts[self.current].table(mode).store(la, size, value)
    }

    /// As [`Self::load_cached`], `N` quadwords in one page.
    #[inline]
    #[must_use]
    pub fn load_quads_cached<const N: usize>(&self, mode: MemMode, la: LinearAddr) -> Option<[u64; N]> {
        self.contexts[self.current].table(mode).load_quads(la)
    }

    /// As [`Self::store_cached`], quadwords in one page, the first at the lowest address.
    #[inline]
    #[must_use]
    pub fn store_quads_cached(&self, mode: MemMode, la: LinearAddr, values: &[u64]) -> bool {
        self.contexts[self.current].table(mode).store_quads(la, values)
    }

    /// Where the instruction byte at `la` is, for code at CPL 3 (`user`) or below.
    ///
    /// # Errors
    /// [`Fault`] of the fetch.
    pub fn translate_fetch(&mut self, space: &AddressSpace, la: LinearAddr, user: bool) -> Result<Fetched, Fault> {
        let t = self.translate(space, la, Access::fetch(user))?;
        Ok(Fetched { pa: t.pa, host: t.host, global: t.global })
    }

    /// What `la` is mapped to, whatever the rights, without side effects: for debuggers and traces.
    ///
    /// # Errors
    /// [`Fault`] when it is not mapped.
    pub fn probe(&self, space: &AddressSpace, la: LinearAddr) -> Result<Mapping, Fault> {
        let la = check_linear(space, la)?;
        let free = AddressSpace { smap: false, pke: false, pks: false, ..*space };
        let access = Access { kind: AccessKind::Read, user: false, implicit: false, ac: true };
        let mut memory = Direct { phys: &self.phys, code: &self.code };
        let counts = &mut WalkCounts::default();
        match EptControls::of(space) {
            None => walk(&free, la, access, &mut Peek(&mut memory), counts),
            Some(controls) => walk(&free, la, access, &mut Nested::peek(memory, controls), counts),
        }
    }
}

/// The canonical check, and 32-bit wrap where linear addresses have 32 bits.
#[inline]
pub(crate) fn check_linear(space: &AddressSpace, la: LinearAddr) -> Result<LinearAddr, Fault> {
    match space.canonical_width() {
        Some(width) if !la.is_canonical(width) => Err(Fault::NonCanonical { la }),
        Some(_) => Ok(la),
        None => Ok(LinearAddr(la.0 & 0xffff_ffff)),
    }
}

// Reading and writing.
impl Mmu {
    /// Where an access of `len` bytes in one page goes.
    #[inline]
    fn translate_part(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        len: u64,
        access: Access,
    ) -> Result<PhysAddr, Fault> {
        let t = self.translate(space, la, access)?;
        if t.sub_page {
            self.check_sub_pages(space, la, len, access)?;
        }
        Ok(t.pa)
    }

    /// A write of `len` bytes to a page with sub-page write permissions, which allow the first: whether they allow the rest.
    #[cold]
    fn check_sub_pages(&mut self, space: &AddressSpace, la: LinearAddr, len: u64, access: Access) -> Result<(), Fault> {
        let mut done = SUB_PAGE - la.0 % SUB_PAGE;
        while done < len {
            self.translate(space, la.wrapping_add(done), access)?;
            done += SUB_PAGE;
        }
        Ok(())
    }

    /// The parts of an access of `len` (1..=4096) bytes, all pages checked for it.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses.
    #[inline]
    pub fn resolve(&mut self, space: &AddressSpace, la: LinearAddr, len: u32, access: Access) -> Result<Parts, Fault> {
        let room = (PAGE_SIZE - la.page_offset()) as u32;
        let first = self.translate_part(space, la, u64::from(len.min(room)), access)?;
        let mut parts =
            Parts { first: Part { pa: first, len: len.min(room), target: self.target(first) }, second: None };
        if len > room {
            let pa = self.translate_part(space, la.wrapping_add(u64::from(room)), u64::from(len - room), access)?;
            parts.second = Some(Part { pa, len: len - room, target: self.target(pa) });
        }
        Ok(parts)
    }

    /// Reads `size` (1..=8) bytes.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses.
    pub fn read(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        size: u32,
        access: Access,
    ) -> Result<ReadOutcome, Fault> {
        if access.kind == AccessKind::Read
            && let Some(value) = self.load_cached(space.mem_mode(access), la, size)
        {
            return Ok(ReadOutcome::Value(value));
        }
        let parts = self.resolve(space, la, size, access)?;
        if let (Target::Ram(offset), None) = (parts.first.target, parts.second)
            && let Some(value) = self.phys.ram().load(offset, size)
        {
            return Ok(ReadOutcome::Value(value));
        }
        if parts.has_io() {
            return Ok(ReadOutcome::Io(parts));
        }
        let mut b = [0; 8];
        let mut rest = b.get_mut(..size as usize).unwrap_or_default();
        for part in parts.iter() {
            let (here, after) = std::mem::take(&mut rest).split_at_mut_checked(part.len as usize).unwrap_or_default();
            self.phys.read(part.pa, here);
            rest = after;
        }
        Ok(ReadOutcome::Value(u64::from_le_bytes(b)))
    }

    /// Whether the RAM at `pa` holds the low `size` (1, 2, 4, 8) bytes of `value` already.
    #[must_use]
    pub fn holds(&self, pa: PhysAddr, size: u32, value: u64) -> bool {
        let Target::Ram(offset) = self.target(pa) else { return false };
        let mask = u64::MAX >> (64 - 8 * size.clamp(1, 8));
        self.phys.ram().load(offset, size).is_some_and(|old| old == value & mask)
    }

    /// Writes the low `size` (1, 2, 4, 8) bytes of `value` to RAM at `pa`, where no translations were made from; false: not done.
    #[must_use]
    pub fn write_beside(&self, pa: PhysAddr, size: u32, value: u64) -> bool {
        match self.target(pa) {
            Target::Ram(offset) => self.phys.ram().store(offset, value, size),
            _ => false,
        }
    }

    /// Writes the low `size` (1..=8) bytes of `value`.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses; nothing is written then.
    pub fn write(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        size: u32,
        value: u64,
        access: Access,
    ) -> Result<WriteOutcome, Fault> {
        if access.is_write() && self.store_cached(space.mem_mode(access), la, size, value) {
            return Ok(WriteOutcome::Done { code: false });
        }
        let parts = self.resolve(space, la, size, access)?;
        if let (Target::Ram(offset), None) = (parts.first.target, parts.second)
            && self.phys.ram().store(offset, value, size)
        {
            return Ok(WriteOutcome::Done { code: self.code.note_write(parts.first.pa, u64::from(size)) });
        }
        if parts.has_io() {
            return Ok(WriteOutcome::Io(parts));
        }
        let b = value.to_le_bytes();
        let mut rest = b.get(..size as usize).unwrap_or_default();
        let mut code = false;
        for part in parts.iter() {
            let (here, after) = rest.split_at_checked(part.len as usize).unwrap_or_default();
            self.phys.write(part.pa, here);
            code |= self.code.note_write(part.pa, here.len() as u64);
            rest = after;
        }
        Ok(WriteOutcome::Done { code })
    }

    /// The parts of an access of any length, all pages checked for it.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses.
    pub fn resolve_bytes(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        len: usize,
        access: Access,
    ) -> Result<Vec<Part>, Fault> {
        let mut parts = Vec::with_capacity(len / PAGE_SIZE as usize + 2);
        let mut done = 0;
        while done < len {
            let at = la.wrapping_add(done as u64);
            let n = (len - done).min((PAGE_SIZE - at.page_offset()) as usize);
            let pa = self.translate_part(space, at, n as u64, access)?;
            parts.push(Part { pa, len: n as u32, target: self.target(pa) });
            done += n;
        }
        Ok(parts)
    }

    /// Reads `buf.len()` bytes.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses; `buf` is untouched then.
    pub fn read_bytes(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        buf: &mut [u8],
        access: Access,
    ) -> Result<BytesOutcome, Fault> {
        let parts = self.resolve_bytes(space, la, buf.len(), access)?;
        if parts.iter().any(|p| matches!(p.target, Target::Mmio { .. } | Target::Unmapped)) {
            return Ok(BytesOutcome::Io(parts));
        }
        let mut rest = buf;
        for part in parts {
            let (here, after) = rest.split_at_mut_checked(part.len as usize).unwrap_or_default();
            self.phys.read(part.pa, here);
            rest = after;
        }
        Ok(BytesOutcome::Done { code: false })
    }

    /// Writes `data`. Every page is checked before the first byte is written.
    ///
    /// # Errors
    /// [`Fault`] of the first page that refuses; nothing is written then.
    pub fn write_bytes(
        &mut self,
        space: &AddressSpace,
        la: LinearAddr,
        data: &[u8],
        access: Access,
    ) -> Result<BytesOutcome, Fault> {
        let parts = self.resolve_bytes(space, la, data.len(), access)?;
        if parts.iter().any(|p| matches!(p.target, Target::Mmio { .. } | Target::Unmapped)) {
            return Ok(BytesOutcome::Io(parts));
        }
        let mut rest = data;
        let mut code = false;
        for part in parts {
            let (here, after) = rest.split_at_checked(part.len as usize).unwrap_or_default();
            self.phys.write(part.pa, here);
            code |= self.code.note_write(part.pa, here.len() as u64);
            rest = after;
        }
        Ok(BytesOutcome::Done { code })
    }
}

// Code pages and the jump cache.
impl Mmu {
    /// A translation was made from `len` bytes at `pa` (in one page): from now on writes to the page take the slow path on
    /// this vCPU. True when the page is newly a code page, and the other vCPUs must [`Self::revoke_write`] too.
    pub fn protect(&mut self, pa: PhysAddr, len: u64) -> bool {
        let newly = self.code.add(pa, len);
        if newly {
            self.revoke_write(pa);
        }
        newly
    }

    /// Gives up the write tags for the page of `pa` in all contexts.
    pub fn revoke_write(&mut self, pa: PhysAddr) {
        let n = pa.0 >> PAGE_SHIFT;
        let Some(word) = self.write_cached.get_mut((n / 64) as usize) else { return };
        if *word >> (n % 64) & 1 == 0 {
            return;
        }
        *word &= !(1 << (n % 64));
        for c in &mut self.contexts {
            self.stats.write_tags_revoked += c.revoke_write(pa.page());
        }
    }

    /// Puts an entry in the current context's jump cache. `la` is the linear address of its RIP; `global` says that the
    /// page its code begins in is global ([`Fetched::global`]).
    pub fn jump_insert(&mut self, la: LinearAddr, entry: JumpCacheEntry, global: bool) {
        // An instruction is at most 15 bytes long; one that may run into the next page depends on that page's mapping too.
        let global = global && la.page_offset() <= PAGE_SIZE - 15;
        self.contexts[self.current].jump_insert(la, entry, global);
    }

    /// The current context's epoch, which code compares with the word behind the jump cache. As long as it lasts, the mappings of
    /// the pages asked for in it have not changed.
    pub fn code_epoch(&mut self, page: LinearAddr) -> u64 {
        self.contexts[self.current].code_epoch(page)
    }

    /// The current context's jump-cache entry for `rip`, if it is for `rip` and `flags`.
    #[inline]
    #[must_use]
    pub fn jump_get(&self, rip: u64, flags: u64) -> Option<JumpCacheEntry> {
        let e = self.contexts[self.current].jump_get(rip);
        (e.rip == rip && e.flags == flags).then_some(e)
    }

    /// Whether no code is noted in the current context's jump cache where that for `rip` would be.
    #[must_use]
    pub fn jump_free(&self, rip: u64) -> bool {
        self.contexts[self.current].jump_get(rip).code == 0
    }

    /// Drops the entry for `rip` from every context's jump cache.
    pub fn jump_forget(&mut self, rip: u64) {
        for c in &mut self.contexts {
            c.jump_forget(rip);
        }
    }

    /// Drops the entries for which `gone` holds from every context's jump cache.
    pub fn jump_drop_where(&mut self, mut gone: impl FnMut(&JumpCacheEntry) -> bool) {
        for c in &mut self.contexts {
            c.jump_drop_where(&mut gone);
        }
    }

    /// Empties every context's jump cache, as when all translated code is dropped.
    pub fn jump_clear(&mut self) {
        for c in &mut self.contexts {
            c.jump_clear();
        }
    }
}
