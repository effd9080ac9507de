//! Page walks: from a linear address to a [`Mapping`] or a typed fault, one algorithm a paging mode.
//!
//! Place in the pipeline: under the TLB's fill. Walks are generic over [`GuestPhysical`], which is how paging-structure
//! entries are read and changed: directly ([`Direct`]), or through a second translation stage. Invariants: nothing is made
//! from an entry that is not present or has a reserved bit set (row A11); accessed and dirty flags are only set once the
//! access is known to be allowed, each by a compare-and-exchange against the entry that was checked (row A6); when an
//! entry changed meanwhile, the walk starts over.
//! Sources: SDM Vol 3A, "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging", "Access Rights",
//! "Page-Fault Exceptions", "Accessed and Dirty Flags".

use twofold_arch::exception::pf;
use twofold_arch::paging::{self, A, D, G, NX, P, PCD, PS, PWT, RW, US};
use twofold_arch::{GuestPhysAddr, LinearAddr, PAGE_MASK, PhysAddr};

use crate::code::CodePages;
use crate::physmap::PhysMap;
use crate::rights::{Rights, refusal};
use crate::space::{Access, AccessKind, AddressSpace, EptFault, Fault, PagingMode, PdpteError, access_error_bits};

/// Width of a paging-structure entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryWidth {
    /// 4 bytes: 32-bit paging.
    Four,
    /// 8 bytes: the other modes.
    Eight,
}

/// Where a guest-physical page is on the bus, and what the second stage allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The physical address that the guest-physical address translates to.
    pub pa: PhysAddr,
    /// log2 of the second stage's page size; 64 when there is no second stage.
    pub shift: u8,
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed (and, where the second stage has dirty flags, the flag is set).
    pub write: bool,
    /// Fetches are allowed.
    pub exec: bool,
    /// The second stage's memory type (UC 0, WC 1, WT 4, WP 5, WB 6), and whether it makes the guest's PAT be ignored.
    pub memory_type: Option<(u8, bool)>,
}

/// Guest-physical memory as a walk sees it: the seam between guest paging and what lies under it.
pub trait GuestPhysical {
    /// Reads the paging-structure entry at `at`, which is aligned, for the translation of `la`.
    ///
    /// # Errors
    /// [`EptFault`] when the second stage does not let the processor read there.
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, la: LinearAddr) -> Result<u64, EptFault>;

    /// Replaces the entry at `at` by `new` if it is still `old`, atomically; whether it was. Writes to what is no memory are
    /// dropped and count as done.
    ///
    /// # Errors
    /// [`EptFault`] when the second stage does not let the processor write there.
    fn exchange_entry(
        &mut self,
        at: GuestPhysAddr,
        width: EntryWidth,
        old: u64,
        new: u64,
        la: LinearAddr,
    ) -> Result<bool, EptFault>;

    /// Translates the guest-physical address that guest paging made of `la`, `rights` being what its entries allow.
    ///
    /// # Errors
    /// [`EptFault`] when the second stage has no translation or refuses an access of `kind`.
    fn resolve(
        &mut self,
        at: GuestPhysAddr,
        kind: AccessKind,
        rights: Rights,
        la: LinearAddr,
    ) -> Result<Frame, EptFault>;
}

/// Guest-physical memory without EPT: guest-physical addresses are physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Direct<'a> {
    /// The physical map.
    pub phys: &'a PhysMap,
    /// Told about accessed and dirty flags written to code pages.
    pub code: &'a CodePages,
}

impl Direct<'_> {
    /// The entry at `pa`.
    #[inline]
    pub(crate) fn load_entry(&self, pa: PhysAddr, width: EntryWidth) -> u64 {
        let value = self.phys.ram_offset(pa).and_then(|offset| match width {
            EntryWidth::Four => self.phys.ram().load_u32(offset).map(u64::from),
            EntryWidth::Eight => self.phys.ram().load_u64(offset),
        });
        value.unwrap_or_else(|| self.load_elsewhere(pa, width))
    }

    /// The 8-byte entry at `pa`.
    #[inline]
    pub(crate) fn load_u64(&self, pa: PhysAddr) -> u64 {
        self.load_entry(pa, EntryWidth::Eight)
    }

    #[cold]
    fn load_elsewhere(&self, pa: PhysAddr, width: EntryWidth) -> u64 {
        let mut b = [0; 8];
        let n = if width == EntryWidth::Four { 4 } else { 8 };
        self.phys.read(pa, &mut b[..n]);
        u64::from_le_bytes(b)
    }

    /// Replaces the entry at `pa` if it is still `old`; whether it was. True where there is no RAM.
    pub(crate) fn exchange(&self, pa: PhysAddr, width: EntryWidth, old: u64, new: u64) -> bool {
        let Some(offset) = self.phys.ram_offset(pa) else { return true };
        let (done, len) = match width {
            EntryWidth::Four => (self.phys.ram().exchange_u32(offset, old as u32, new as u32), 4),
            EntryWidth::Eight => (self.phys.ram().exchange_u64(offset, old, new), 8),
        };
        if done == Some(true) {
            self.code.note_write(pa, len);
        }
        done.unwrap_or(true)
    }

    pub(crate) fn exchange_u64(&self, pa: PhysAddr, old: u64, new: u64) -> bool {
        self.exchange(pa, EntryWidth::Eight, old, new)
    }
}

impl GuestPhysical for Direct<'_> {
    #[inline]
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, _la: LinearAddr) -> Result<u64, EptFault> {
        Ok(self.load_entry(at.without_ept(), width))
    }

    fn exchange_entry(
        &mut self,
        at: GuestPhysAddr,
        width: EntryWidth,
        old: u64,
        new: u64,
        _la: LinearAddr,
    ) -> Result<bool, EptFault> {
        Ok(self.exchange(at.without_ept(), width, old, new))
    }

    #[inline]
    fn resolve(
        &mut self,
        at: GuestPhysAddr,
        _kind: AccessKind,
        _rights: Rights,
        _la: LinearAddr,
    ) -> Result<Frame, EptFault> {
        Ok(Frame { pa: at.without_ept(), shift: 64, read: true, write: true, exec: true, memory_type: None })
    }
}

/// A view of guest-physical memory that changes nothing: what a debugger's walk uses.
#[derive(Debug)]
pub struct Peek<'a, M>(pub &'a mut M);

impl<M: GuestPhysical> GuestPhysical for Peek<'_, M> {
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, la: LinearAddr) -> Result<u64, EptFault> {
        self.0.read_entry(at, width, la)
    }
    fn exchange_entry(
        &mut self,
        _at: GuestPhysAddr,
        _width: EntryWidth,
        _old: u64,
        _new: u64,
        _la: LinearAddr,
    ) -> Result<bool, EptFault> {
        Ok(true)
    }
    fn resolve(
        &mut self,
        at: GuestPhysAddr,
        kind: AccessKind,
        rights: Rights,
        la: LinearAddr,
    ) -> Result<Frame, EptFault> {
        self.0.resolve(at, kind, rights, la)
    }
}

/// What a walk found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// The physical address of the 4 KiB page that holds the linear address.
    pub page: PhysAddr,
    /// Its guest-physical address; the same number when there is no EPT.
    pub guest_page: GuestPhysAddr,
    /// log2 of the page size: 12, 21, 22 or 30; the smaller one where a second stage's page is smaller. 12 without paging.
    pub shift: u8,
    /// log2 of the size of the guest's page alone: what INVLPG drops.
    pub guest_shift: u8,
    /// What the guest's entries allow.
    pub rights: Rights,
    /// What the second stage allows; all true without one.
    pub stage2: Frame,
    /// The G flag of the leaf, if CR4.PGE = 1.
    pub global: bool,
    /// The leaf's D flag is set (now).
    pub dirty: bool,
    /// The leaf's PAT, PCD, PWT as an index into IA32_PAT, 0..=7.
    pub pat_index: u8,
}

/// What a walk cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WalkCounts {
    /// Entries read.
    pub entries_read: u64,
    /// Accessed and dirty flags written (entries changed).
    pub ad_writes: u64,
}

/// The end of the walks of a region, which [`crate::structures`] remembers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Last {
    /// log2 of the size of the large page that `entry` maps; 12 where `entry` is the guest-physical address of a page table.
    pub shift: u8,
    pub entry: u64,
    /// AND of the entries' flags, the large page's included: RW, US, A.
    pub all: u64,
    /// OR of the entries' flags: NX.
    pub any: u64,
}

/// An entry that a walk used.
#[derive(Clone, Copy)]
struct Step {
    at: GuestPhysAddr,
    entry: u64,
}

/// The entries that a walk used, topmost first.
pub(crate) struct Steps {
    steps: [Step; 5],
    len: usize,
    /// Entries read, the one that ended the walk included.
    reads: u64,
    width: EntryWidth,
    /// AND of the entries' flags: RW, US, A.
    all: u64,
    /// OR of the entries' flags: NX.
    any: u64,
}

impl Steps {
    #[inline]
    pub fn new() -> Self {
        Self {
            steps: [Step { at: GuestPhysAddr(0), entry: 0 }; 5],
            len: 0,
            reads: 0,
            width: EntryWidth::Eight,
            all: u64::MAX,
            any: 0,
        }
    }

    #[inline]
    fn push(&mut self, at: GuestPhysAddr, entry: u64) {
        if let Some(s) = self.steps.get_mut(self.len) {
            *s = Step { at, entry };
            self.len += 1;
        }
        self.all &= entry;
        self.any |= entry;
    }

    /// After a walk that succeeded and found a page of `1 << shift` bytes: what its region's walks have in common.
    pub fn last(&self, shift: u8, write: bool) -> Option<Last> {
        let (leaf, above) = self.steps.get(..self.len)?.split_last()?;
        if shift > paging::SHIFT_4K {
            let entry = leaf.entry | if write { A | D } else { A };
            return Some(Last { shift, entry, all: self.all, any: self.any });
        }
        let all = above.iter().fold(u64::MAX, |all, s| all & s.entry);
        let any = above.iter().fold(0, |any, s| any | s.entry);
        Some(Last { shift, entry: leaf.at.0 & PAGE_MASK, all, any })
    }
}

/// The leaf entry of a walk.
struct Leaf {
    entry: u64,
    /// log2 of the page size.
    shift: u8,
    /// Guest-physical address of the page.
    base: u64,
    /// Where the entry keeps its PAT bit.
    pat: u64,
}

/// Walks the paging structures of `space` for `access` to `la`, sets accessed and dirty flags, and returns the mapping.
///
/// `la` must be canonical (4- and 5-level paging) or below 4 GiB (the other modes).
///
/// # Errors
/// [`Fault::Page`] with the SDM's error code, or [`Fault::Ept`] from the second stage.
#[inline]
pub fn walk<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    counts: &mut WalkCounts,
) -> Result<Mapping, Fault> {
    walk_noting(space, la, access, memory, counts, &mut Steps::new())
}

/// [`walk`], and the entries it used.
#[inline]
pub(crate) fn walk_noting<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    counts: &mut WalkCounts,
    steps: &mut Steps,
) -> Result<Mapping, Fault> {
    loop {
        let leaf = match space.mode {
            PagingMode::None => return unpaged(la, access, memory),
            PagingMode::Bits32 => walk_32(space, la, access, memory, steps),
            PagingMode::Pae => walk_pae(space, la, access, memory, steps),
            PagingMode::Level4 => walk_long::<4, M>(space, la, access, memory, steps),
            PagingMode::Level5 => walk_long::<5, M>(space, la, access, memory, steps),
        };
        counts.entries_read += steps.reads;
        let leaf = leaf?;
        if let Some(mapping) = finish(space, la, access, steps, &leaf, memory, counts)? {
            return Ok(mapping);
        }
        *steps = Steps::new();
    }
}

/// The end of a walk: from what an earlier walk of the region came to. `None`, with nothing changed in the guest's paging structures,
/// for all that is out of the ordinary: no permission, a flag to be set, an entry that is not present or malformed. Then a walk from the
/// top says what there is to say.
#[inline]
pub(crate) fn walk_last<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    counts: &mut WalkCounts,
    last: &Last,
) -> Option<Mapping> {
    let leaf = if last.shift > paging::SHIFT_4K {
        let base = match last.shift {
            paging::SHIFT_4M => paging::pse_address(last.entry),
            shift => last.entry & paging::ADDR & (u64::MAX << shift),
        };
        Leaf { entry: last.entry, shift: last.shift, base, pat: paging::PAT_LARGE }
    } else {
        last_entry(space, la, memory, counts, last.entry)?
    };
    let leaf_wants = if access.is_write() { A | D } else { A };
    let rights = rights_of(space, last.all & leaf.entry, last.any | leaf.entry, leaf.entry);
    if leaf.entry & leaf_wants != leaf_wants || refusal(space, rights, access).is_some() {
        return None;
    }
    mapping(space, la, access, rights, &leaf, memory).ok()
}

/// The entry of `la` in the page table at `table`, if it is present and well formed.
#[inline]
fn last_entry<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    memory: &mut M,
    counts: &mut WalkCounts,
    table: u64,
) -> Option<Leaf> {
    counts.entries_read += 1;
    let (at, width, reserved, address) = match space.mode {
        PagingMode::Bits32 => (table | (la.0 >> 12 & 0x3ff) << 2, EntryWidth::Four, 0, 0xffff_f000),
        PagingMode::Pae => {
            let reserved = paging::pae_reserved(u32::from(space.maxphyaddr), space.nxe);
            (table | (la.0 >> 12 & 0x1ff) << 3, EntryWidth::Eight, reserved, paging::ADDR)
        }
        _ => {
            let reserved = paging::long_reserved(u32::from(space.maxphyaddr), space.nxe);
            (table | (la.0 >> 12 & 0x1ff) << 3, EntryWidth::Eight, reserved, paging::ADDR)
        }
    };
    let entry = memory.read_entry(GuestPhysAddr(at), width, la).ok()?;
    if entry & P == 0 || entry & reserved != 0 {
        return None;
    }
    Some(Leaf { entry, shift: paging::SHIFT_4K, base: entry & address, pat: paging::PAT_4K })
}

/// CR0.PG = 0: everything is allowed, only the second stage may refuse.
fn unpaged<M: GuestPhysical>(la: LinearAddr, access: Access, memory: &mut M) -> Result<Mapping, Fault> {
    let rights = Rights { user: true, write: true, exec: true, pkey: 0 };
    let stage2 = memory.resolve(GuestPhysAddr(la.0), access.kind, rights, la).map_err(Fault::Ept)?;
    Ok(Mapping {
        page: stage2.pa.page(),
        guest_page: GuestPhysAddr(la.page().0),
        shift: paging::SHIFT_4K,
        guest_shift: paging::SHIFT_4K,
        rights,
        stage2,
        global: false,
        dirty: true,
        pat_index: 0,
    })
}

#[cold]
fn not_present(space: &AddressSpace, la: LinearAddr, access: Access) -> Fault {
    Fault::Page { error: access_error_bits(space, access), la }
}

#[cold]
fn reserved_bit(space: &AddressSpace, la: LinearAddr, access: Access) -> Fault {
    Fault::Page { error: access_error_bits(space, access) | pf::P | pf::RSVD, la }
}

/// 32-bit paging (SDM Vol 3A, "32-Bit Paging").
fn walk_32<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    steps: &mut Steps,
) -> Result<Leaf, Fault> {
    steps.width = EntryWidth::Four;
    let at = GuestPhysAddr((space.cr3 & 0xffff_f000) | (la.0 >> 22 & 0x3ff) << 2);
    let pde = memory.read_entry(at, EntryWidth::Four, la).map_err(Fault::Ept)?;
    steps.reads += 1;
    if pde & P == 0 {
        return Err(not_present(space, la, access));
    }
    steps.push(at, pde);
    if space.pse && pde & PS != 0 {
        if pde & paging::pse_reserved(u32::from(space.maxphyaddr)) != 0 {
            return Err(reserved_bit(space, la, access));
        }
        let base = paging::pse_address(pde);
        return Ok(Leaf { entry: pde, shift: paging::SHIFT_4M, base, pat: paging::PAT_LARGE });
    }
    let at = GuestPhysAddr((pde & 0xffff_f000) | (la.0 >> 12 & 0x3ff) << 2);
    let pte = memory.read_entry(at, EntryWidth::Four, la).map_err(Fault::Ept)?;
    steps.reads += 1;
    if pte & P == 0 {
        return Err(not_present(space, la, access));
    }
    steps.push(at, pte);
    let base = pte & 0xffff_f000;
    Ok(Leaf { entry: pte, shift: paging::SHIFT_4K, base, pat: paging::PAT_4K })
}

/// PAE paging (SDM Vol 3A, "PAE Paging"): starts from the PDPTE registers, which were checked when they were loaded.
fn walk_pae<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    steps: &mut Steps,
) -> Result<Leaf, Fault> {
    let pdpte = space.pdptes[(la.0 >> 30 & 3) as usize];
    if pdpte & P == 0 {
        return Err(not_present(space, la, access));
    }
    let reserved = paging::pae_reserved(u32::from(space.maxphyaddr), space.nxe);
    descend::<2, M>(space, la, access, pdpte & paging::ADDR, reserved, memory, steps)
}

/// 4-level and 5-level paging (SDM Vol 3A, "4-Level Paging and 5-Level Paging").
#[inline]
fn walk_long<const LEVELS: u32, M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    memory: &mut M,
    steps: &mut Steps,
) -> Result<Leaf, Fault> {
    let reserved = paging::long_reserved(u32::from(space.maxphyaddr), space.nxe);
    descend::<LEVELS, M>(space, la, access, space.cr3 & paging::ADDR, reserved, memory, steps)
}

/// Whether a 64-bit entry at `level` maps a page, and which bits are reserved in it besides those that are in all entries.
#[inline]
fn format(space: &AddressSpace, entry: u64, level: u32) -> (bool, u64) {
    let large_allowed = level == 2 || (level == 3 && space.gigabyte_pages);
    let is_leaf = level == 1 || (large_allowed && entry & PS != 0);
    let reserved = match level {
        1 => 0,
        _ if is_leaf => paging::large_reserved(3 + 9 * level as u8),
        // Where no page can be mapped, PS is reserved; in a PDE it selects the page size.
        2 => 0,
        _ => PS,
    };
    (is_leaf, reserved)
}

/// The reserved bits that are set in a present entry: for traces.
pub(crate) fn reserved_bits(space: &AddressSpace, entry: u64, level: u32) -> u64 {
    let maxphyaddr = u32::from(space.maxphyaddr);
    entry
        & match space.mode {
            PagingMode::None => 0,
            PagingMode::Bits32 if level == 2 && space.pse && entry & PS != 0 => paging::pse_reserved(maxphyaddr),
            PagingMode::Bits32 => 0,
            PagingMode::Pae => paging::pae_reserved(maxphyaddr, space.nxe) | format(space, entry, level).1,
            PagingMode::Level4 | PagingMode::Level5 => {
                paging::long_reserved(maxphyaddr, space.nxe) | format(space, entry, level).1
            }
        }
}

/// From a table of 64-bit entries at `level` (1 is the page table) down to the leaf.
#[inline]
fn descend<const LEVELS: u32, M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    top: u64,
    reserved: u64,
    memory: &mut M,
    steps: &mut Steps,
) -> Result<Leaf, Fault> {
    let mut table = top;
    let mut level = LEVELS;
    loop {
        let shift = 3 + 9 * level as u8;
        let at = GuestPhysAddr(table | (la.0 >> shift & 0x1ff) << 3);
        let entry = memory.read_entry(at, EntryWidth::Eight, la).map_err(Fault::Ept)?;
        steps.reads += 1;
        if entry & P == 0 {
            return Err(not_present(space, la, access));
        }
        let (is_leaf, here) = format(space, entry, level);
        if entry & (reserved | here) != 0 {
            return Err(reserved_bit(space, la, access));
        }
        steps.push(at, entry);
        if is_leaf {
            let base = entry & paging::ADDR & (u64::MAX << shift);
            let pat = if level == 1 { paging::PAT_4K } else { paging::PAT_LARGE };
            return Ok(Leaf { entry, shift, base, pat });
        }
        table = entry & paging::ADDR;
        level -= 1;
    }
}

/// Rights, accessed and dirty flags, second stage. `None`: an entry changed under the walk, which must start over.
#[inline]
fn finish<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    steps: &Steps,
    leaf: &Leaf,
    memory: &mut M,
    counts: &mut WalkCounts,
) -> Result<Option<Mapping>, Fault> {
    let rights = rights_of(space, steps.all, steps.any, leaf.entry);
    if let Some(error) = refusal(space, rights, access) {
        return Err(Fault::Page { error: error | access_error_bits(space, access), la });
    }
    let leaf_wants = if access.is_write() { A | D } else { A };
    if (steps.all & A == 0 || leaf.entry & leaf_wants != leaf_wants)
        && !set_flags(steps, leaf_wants, la, memory, counts)?
    {
        return Ok(None);
    }
    mapping(space, la, access, rights, leaf, memory).map(Some)
}

/// What entries allow, whose flags are `all` together and `any` of them.
#[inline]
fn rights_of(space: &AddressSpace, all: u64, any: u64, leaf: u64) -> Rights {
    let long = matches!(space.mode, PagingMode::Level4 | PagingMode::Level5);
    Rights {
        user: all & US != 0,
        write: all & RW != 0,
        // With EFER.NXE = 0 the bit is reserved, and 32-bit entries do not have it.
        exec: any & NX == 0,
        pkey: if long { (leaf >> paging::PKEY_SHIFT & 15) as u8 } else { 0 },
    }
}

/// The mapping that a leaf makes, once its flags are set.
#[inline]
fn mapping<M: GuestPhysical>(
    space: &AddressSpace,
    la: LinearAddr,
    access: Access,
    rights: Rights,
    leaf: &Leaf,
    memory: &mut M,
) -> Result<Mapping, Fault> {
    let at = GuestPhysAddr(leaf.base | la.0 & !(u64::MAX << leaf.shift));
    let stage2 = memory.resolve(at, access.kind, rights, la).map_err(Fault::Ept)?;
    let pat = u8::from(leaf.entry & leaf.pat != 0) << 2;
    let pcd_pwt = u8::from(leaf.entry & PCD != 0) << 1 | u8::from(leaf.entry & PWT != 0);
    Ok(Mapping {
        page: stage2.pa.page(),
        guest_page: at.page(),
        shift: leaf.shift.min(stage2.shift),
        guest_shift: leaf.shift,
        rights,
        stage2,
        global: space.pge && leaf.entry & G != 0,
        dirty: access.is_write() || leaf.entry & D != 0,
        pat_index: pat | pcd_pwt,
    })
}

/// Sets A in every entry used, and what `leaf_wants` says in the last. False when one of them changed meanwhile.
#[cold]
fn set_flags<M: GuestPhysical>(
    steps: &Steps,
    leaf_wants: u64,
    la: LinearAddr,
    memory: &mut M,
    counts: &mut WalkCounts,
) -> Result<bool, Fault> {
    let used = steps.steps.get(..steps.len).unwrap_or_default();
    for (i, step) in used.iter().enumerate() {
        let wants = if i + 1 == used.len() { leaf_wants } else { A };
        if step.entry & wants == wants {
            continue;
        }
        let new = step.entry | wants;
        if !memory.exchange_entry(step.at, steps.width, step.entry, new, la).map_err(Fault::Ept)? {
            return Ok(false);
        }
        counts.ad_writes += 1;
    }
    Ok(true)
}

/// Reads the PDPTE registers of PAE paging from the table that `cr3` points to (SDM Vol 3A, "PDPTE Registers").
///
/// # Errors
/// [`PdpteError::Reserved`] when a present entry has a reserved bit set: then nothing may be loaded.
pub fn load_pdptes<M: GuestPhysical>(cr3: u64, maxphyaddr: u8, memory: &mut M) -> Result<[u64; 4], PdpteError> {
    let mut pdptes = [0; 4];
    let reserved = paging::pdpte_reserved(u32::from(maxphyaddr));
    for (i, pdpte) in pdptes.iter_mut().enumerate() {
        let at = GuestPhysAddr((cr3 & 0xffff_ffe0) + 8 * i as u64);
        *pdpte = memory.read_entry(at, EntryWidth::Eight, LinearAddr(0)).map_err(PdpteError::Ept)?;
        if *pdpte & P != 0 && *pdpte & reserved != 0 {
            return Err(PdpteError::Reserved { index: i as u8 });
        }
    }
    Ok(pdptes)
}
