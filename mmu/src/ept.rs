//! The EPT walk: from a guest-physical address to a physical page, or a typed EPT fault.
//!
//! Place in the pipeline: under [`crate::nested`], which caches what is found here and puts it under the guest's walk.
//! Invariants: nothing is made of an entry that is not present or misconfigured (row D4); a misconfiguration found on the way
//! down comes before any violation (row F3); accessed and dirty flags are only set for an access that the entries
//! allow, each by a compare-and-exchange against the entry that was checked, and only when the page-modification log
//! has room (rows F6, F7).
//! Sources: SDM Vol 3C, "The Extended Page Table Mechanism (EPT)", "EPT-Induced VM Exits", "Accessed and Dirty Flags for EPT",
//! "Page-Modification Logging", "Mode-Based Execute Control".

use std::fmt;

use twofold_arch::vmx::ept::{
    self, A, ADDR, D, Eptp, IGNORE_PAT, MEMORY_TYPE, PS, R, SUB_PAGE_WRITE, SUPPRESS_VE, W, X, XU,
};
use twofold_arch::vmx::qualification::ept_violation as q;
use twofold_arch::{GuestPhysAddr, LinearAddr, PhysAddr};

use crate::space::{AddressSpace, EptFault, EptFaultKind};
use crate::sub_page;
use crate::walk::Direct;

/// What governs EPT walks: the EPTP, the controls and the processor's properties.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptControls {
    /// Physical address of the top table.
    pub top: u64,
    /// Levels of the walk: 4 or 5. Anything else translates nothing.
    pub levels: u8,
    /// EPTP bit 6: accessed and dirty flags are kept.
    pub accessed_dirty: bool,
    /// The VM-execution control "mode-based execute control for EPT".
    pub mode_based: bool,
    /// The sub-page-permission-table pointer, while sub-page write permissions are in use. What is cached does not depend on
    /// it: a page that has them is cached as one that cannot be written to.
    pub sub_pages: Option<u64>,
    /// The processor has execute-only pages.
    pub execute_only: bool,
    /// Width of physical addresses.
    pub maxphyaddr: u8,
}

impl EptControls {
    /// Those of `space`, if EPT is in use there.
    #[inline]
    #[must_use]
    pub const fn of(space: &AddressSpace) -> Option<Self> {
        let Some(raw) = space.eptp else { return None };
        let eptp = Eptp(raw);
        Some(Self {
            top: eptp.table(),
            levels: eptp.levels() as u8,
            accessed_dirty: eptp.accessed_dirty(),
            mode_based: space.ept_mode_based,
            sub_pages: space.ept_sub_pages,
            execute_only: space.ept_execute_only,
            maxphyaddr: space.maxphyaddr,
        })
    }

    /// What, besides the tables, the guest-physical mappings of an EP4TA depend on. Mappings are only used under the shape
    /// that they were made under.
    #[inline]
    #[must_use]
    pub const fn shape(&self) -> u32 {
        self.levels as u32
            | (self.accessed_dirty as u32) << 4
            | (self.mode_based as u32) << 5
            | (self.execute_only as u32) << 6
            | (self.maxphyaddr as u32) << 8
    }

    /// Width of the guest-physical addresses that can be translated.
    const fn width(&self) -> u32 {
        12 + 9 * self.levels as u32
    }

    const fn present(&self, entry: u64) -> bool {
        entry & (ept::RWX | if self.mode_based { XU } else { 0 }) != 0
    }

    /// The bit that a fetch needs; `user` says that the linear address is a user-mode one.
    #[inline]
    #[must_use]
    pub const fn fetch_right(&self, user: bool) -> u64 {
        if self.mode_based && user { XU } else { X }
    }

    /// What is wrong with a present entry at `level` (1 is the page table), if anything.
    #[inline]
    fn misconfigured(&self, entry: u64, level: u8) -> Option<EptReason> {
        if entry & R == 0 {
            if entry & W != 0 {
                return Some(EptReason::WriteOnly);
            }
            if !self.execute_only {
                return Some(EptReason::ExecuteOnly);
            }
        }
        let maps = is_leaf(entry, level);
        let here = if maps { ept::page_reserved(3 + 9 * level) } else { ept::table_reserved(matches!(level, 2 | 3)) };
        let reserved = entry & (ept::reserved(u32::from(self.maxphyaddr)) | here);
        if reserved != 0 {
            return Some(EptReason::Reserved(reserved));
        }
        let memory_type = (entry & MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT;
        (maps && !ept::memory_type::is_valid(memory_type)).then_some(EptReason::MemoryType(memory_type as u8))
    }
}

const fn is_leaf(entry: u64, level: u8) -> bool {
    level == 1 || (matches!(level, 2 | 3) && entry & PS != 0)
}

/// Why an EPT walk ended in a fault: for traces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptReason {
    /// The guest-physical address is wider than the walk translates.
    TooWide,
    /// The EPTP's walk length is none.
    WalkLength,
    /// The last entry read is not present.
    NotPresent,
    /// Writable and not readable.
    WriteOnly,
    /// Executable and not readable, on a processor without execute-only pages.
    ExecuteOnly,
    /// These reserved bits are set.
    Reserved(u64),
    /// A reserved memory type.
    MemoryType(u8),
    /// These rights (entry bits) are missing in the AND of the entries.
    Missing(u64),
    /// The page-modification log is full.
    LogFull,
    /// The entry at this level of the sub-page-permission table is not valid.
    SubPageMiss(u8),
    /// These reserved bits are set in an entry of the sub-page-permission table.
    SubPageReserved(u64),
}

impl fmt::Display for EptReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EptReason::TooWide => write!(f, "violation: the address is wider than the walk"),
            EptReason::WalkLength => write!(f, "misconfiguration: the EPTP has no valid walk length"),
            EptReason::NotPresent => write!(f, "violation: not present"),
            EptReason::WriteOnly => write!(f, "misconfiguration: W without R"),
            EptReason::ExecuteOnly => write!(f, "misconfiguration: X without R, which this CPU does not have"),
            EptReason::Reserved(bits) => write!(f, "misconfiguration: reserved bits {bits:#x} are set"),
            EptReason::MemoryType(t) => write!(f, "misconfiguration: memory type {t} is reserved"),
            EptReason::Missing(bits) => {
                write!(f, "violation: the entries do not all have")?;
                for (bit, name) in [(R, " R"), (W, " W"), (X, " X"), (XU, " XU")] {
                    if bits & bit != 0 {
                        f.write_str(name)?;
                    }
                }
                Ok(())
            }
            EptReason::LogFull => write!(f, "the page-modification log is full"),
            EptReason::SubPageMiss(level) => write!(f, "SPP miss: the L{level}E is not valid"),
            EptReason::SubPageReserved(bits) => write!(f, "SPP misconfiguration: reserved bits {bits:#x} are set"),
        }
    }
}

/// Page-modification logging, while it is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pml {
    /// Physical address of the log.
    pub address: PhysAddr,
    /// The PML index: the next entry to write; above 511 the log is full.
    pub index: u16,
}

/// An access to a guest-physical address, in the terms of EPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct EptAccess {
    /// The rights it needs: R, W, X, XU as in an entry; and D when it must be set.
    pub need: u64,
    /// Exit-qualification bits that the access decides: 2:0 and 11:7.
    pub qualification: u32,
    /// The linear address, when there is one.
    pub la: Option<LinearAddr>,
}

impl EptAccess {
    /// A write to the translation of a linear address, as opposed to one to a guest paging-structure entry or to an address
    /// that is the translation of none: those are not eligible for sub-page write permissions.
    const fn is_translated_write(&self) -> bool {
        let bits = (q::LINEAR_VALID | q::TRANSLATION) as u32;
        self.need & W != 0 && self.qualification & bits == bits
    }

    /// The same access needing no right at all.
    pub const fn without_needs(self) -> Self {
        Self { need: 0, ..self }
    }
}

/// A page as EPT maps it, in one word, laid out as a leaf entry is: bits 51:12 the physical address of the (large) page, R,
/// W, X and XU the AND of all entries, memory type and IPAT the leaf's, [`D`] set when a write need not set anything,
/// [`PS`] set for 2 MiB and 1 GiB, and [`Self::HUGE`] for 1 GiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct EptPage(pub u64);

impl EptPage {
    pub const HUGE: u64 = 1 << 8;

    #[inline]
    pub const fn shift(self) -> u8 {
        if self.0 & PS == 0 {
            12
        } else if self.0 & Self::HUGE == 0 {
            21
        } else {
            30
        }
    }
    #[inline]
    pub const fn memory_type(self) -> u8 {
        ((self.0 & MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT) as u8
    }
    #[inline]
    pub const fn ignores_pat(self) -> bool {
        self.0 & IGNORE_PAT != 0
    }
    /// Where the page puts `gpa`.
    #[inline]
    pub const fn place(self, gpa: GuestPhysAddr) -> PhysAddr {
        let mask = u64::MAX << self.shift();
        PhysAddr(self.0 & ADDR & mask | gpa.0 & !mask)
    }
}

/// What EPT walks cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EptCounts {
    /// Walks of EPT.
    pub walks: u64,
    /// EPT entries read.
    pub entries_read: u64,
    /// Accessed and dirty flags written.
    pub ad_writes: u64,
    /// Entries written to the page-modification log.
    pub logged: u64,
    /// Guest-physical translations that were cached.
    pub hits: u64,
}

/// An entry that an EPT walk read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EptStep {
    /// 5 (PML5) to 1 (page table).
    pub level: u8,
    /// Where the entry is.
    pub at: PhysAddr,
    /// The entry.
    pub entry: u64,
}

/// One walk of EPT, with what it read.
pub(crate) struct EptWalk {
    pub steps: [EptStep; 5],
    pub len: usize,
}

impl EptWalk {
    pub const fn new() -> Self {
        Self { steps: [EptStep { level: 0, at: PhysAddr(0), entry: 0 }; 5], len: 0 }
    }

    pub fn read(&self) -> &[EptStep] {
        self.steps.get(..self.len).unwrap_or_default()
    }

    fn push(&mut self, step: EptStep) {
        if let Some(s) = self.steps.get_mut(self.len) {
            *s = step;
            self.len += 1;
        }
    }

    /// Reads entries down to the leaf: the AND of all, and the leaf's level.
    fn descend(&mut self, c: &EptControls, memory: Direct<'_>, gpa: GuestPhysAddr) -> Result<(u64, u8), EptReason> {
        self.len = 0;
        if !matches!(c.levels, 4 | 5) {
            return Err(EptReason::WalkLength);
        }
        if gpa.0 >> c.width() != 0 {
            return Err(EptReason::TooWide);
        }
        let mut table = c.top;
        let mut level = c.levels;
        let mut all = u64::MAX;
        loop {
            let at = PhysAddr(table | (gpa.0 >> (3 + 9 * level) & 0x1ff) << 3);
            let entry = memory.load_u64(at);
            self.push(EptStep { level, at, entry });
            if !c.present(entry) {
                return Err(EptReason::NotPresent);
            }
            if let Some(reason) = c.misconfigured(entry, level) {
                return Err(reason);
            }
            all &= entry;
            if is_leaf(entry, level) {
                return Ok((all, level));
            }
            table = entry & ADDR;
            level -= 1;
        }
    }

    /// Walks for `access`, without side effects. The rights that the entries have are checked, flags are not looked at.
    pub fn look(
        &mut self,
        c: &EptControls,
        memory: Direct<'_>,
        gpa: GuestPhysAddr,
        access: &EptAccess,
    ) -> Result<EptPage, (EptReason, EptFault)> {
        let outcome = self.descend(c, memory, gpa);
        let rights = ept::RWX | if c.mode_based { XU } else { 0 };
        let (all, reason) = match outcome {
            Ok((all, level)) => {
                let missing = access.need & rights & !all;
                if missing == 0 {
                    return Ok(self.page(c, all & rights, level));
                }
                match self.sub_page(c, memory, gpa, access, (all, level)) {
                    Ok(true) => return Ok(self.page(c, all & rights, level)),
                    Ok(false) => (all & rights, EptReason::Missing(missing)),
                    Err(reason) => (all & rights, reason),
                }
            }
            Err(reason) => (0, reason),
        };
        Err((reason, self.fault(gpa, access, all, reason)))
    }

    /// Whether sub-page write permissions allow what the entries, whose AND is `all`, do not.
    fn sub_page(
        &self,
        c: &EptControls,
        memory: Direct<'_>,
        gpa: GuestPhysAddr,
        access: &EptAccess,
        (all, level): (u64, u8),
    ) -> Result<bool, EptReason> {
        let Some(table) = c.sub_pages else { return Ok(false) };
        let leaf = self.read().last().map_or(0, |s| s.entry);
        let page = level == 1 && leaf & SUB_PAGE_WRITE != 0 && all & (R | W) == R;
        if !page || !access.is_translated_write() {
            return Ok(false);
        }
        sub_page::may_write(table, c.maxphyaddr, memory, gpa)
    }

    /// Where the last entry read is.
    pub fn leaf(&self) -> PhysAddr {
        self.read().last().map_or(PhysAddr(0), |s| s.at)
    }

    /// After a walk that ended at the last level: the page table used, with the rights that the entries above have in common.
    pub fn table(&self) -> EptPage {
        let Some((leaf, above)) = self.read().split_last() else { return EptPage(0) };
        let rights = above.iter().fold(ept::RWX | XU, |all, s| all & s.entry);
        EptPage(leaf.at.page().0 | rights)
    }

    /// The page that maps `gpa` in the page table `table` ([`Self::table`]), if it is there, `access` is allowed, and there is no
    /// flag to set. For all else there is [`Self::walk`].
    #[inline]
    pub fn last_level(
        &mut self,
        c: &EptControls,
        memory: Direct<'_>,
        gpa: GuestPhysAddr,
        table: EptPage,
        access: &EptAccess,
    ) -> Option<EptPage> {
        let at = PhysAddr(table.0 & ADDR | (gpa.0 >> 12 & 0x1ff) << 3);
        let entry = memory.load_u64(at);
        self.push(EptStep { level: 1, at, entry });
        let flags = if c.accessed_dirty { A } else { 0 };
        if !c.present(entry) || c.misconfigured(entry, 1).is_some() || entry & flags != flags {
            return None;
        }
        let rights = ept::RWX | if c.mode_based { XU } else { 0 };
        let page = self.page(c, table.0 & entry & rights, 1);
        (page.0 & access.need == access.need).then_some(page)
    }

    #[inline]
    fn page(&self, c: &EptControls, rights: u64, level: u8) -> EptPage {
        let leaf = self.read().last().map_or(0, |s| s.entry);
        let size = match level {
            1 => 0,
            2 => PS,
            _ => PS | EptPage::HUGE,
        };
        let clean = if c.accessed_dirty { leaf & D } else { D };
        EptPage(leaf & (ADDR | MEMORY_TYPE | IGNORE_PAT) | rights | size | clean)
    }

    fn fault(&self, gpa: GuestPhysAddr, access: &EptAccess, all: u64, reason: EptReason) -> EptFault {
        let kind = match reason {
            EptReason::TooWide | EptReason::NotPresent | EptReason::Missing(_) => {
                let mut bits = access.qualification;
                for (right, bit) in [(R, q::READABLE), (W, q::WRITABLE), (X, q::EXECUTABLE), (XU, q::USER_EXECUTABLE)] {
                    if all & right != 0 {
                        bits |= bit as u32;
                    }
                }
                EptFaultKind::Violation(bits)
            }
            EptReason::LogFull => EptFaultKind::LogFull,
            EptReason::SubPageMiss(_) => EptFaultKind::SubPage { miss: true },
            EptReason::SubPageReserved(_) => EptFaultKind::SubPage { miss: false },
            _ => EptFaultKind::Misconfiguration,
        };
        // Of the entry that was not present, else of the leaf.
        let suppress_ve = self.read().last().is_some_and(|s| s.entry & SUPPRESS_VE != 0);
        EptFault { kind, gpa, la: access.la, suppress_ve }
    }

    /// Walks for `access`, sets accessed and dirty flags and logs the page.
    pub fn walk(
        &mut self,
        c: &EptControls,
        memory: Direct<'_>,
        gpa: GuestPhysAddr,
        access: &EptAccess,
        pml: &mut Option<Pml>,
        counts: &mut EptCounts,
    ) -> Result<EptPage, EptFault> {
        loop {
            counts.walks += 1;
            let looked = self.look(c, memory, gpa, access);
            counts.entries_read += self.len as u64;
            let page = looked.map_err(|(_, fault)| fault)?;
            let write = access.need & W != 0;
            if !c.accessed_dirty || !self.wants_flags(write) {
                return Ok(page);
            }
            if pml.is_some_and(|p| u64::from(p.index) >= ept::PML_ENTRIES) {
                return Err(self.fault(gpa, access, 0, EptReason::LogFull));
            }
            if let Some(dirtied) = self.set_flags(memory, write, counts) {
                if dirtied {
                    log_page(memory, gpa, pml, counts);
                }
                return Ok(if write { EptPage(page.0 | D) } else { page });
            }
            // An entry changed under the walk: start over.
        }
    }

    fn wants_flags(&self, write: bool) -> bool {
        let steps = self.read();
        steps.iter().any(|s| s.entry & A == 0) || (write && steps.last().is_some_and(|s| s.entry & D == 0))
    }

    /// Sets A in every entry used, and D in the last if `write`. Whether D was set newly; `None` when an entry had changed.
    fn set_flags(&self, memory: Direct<'_>, write: bool, counts: &mut EptCounts) -> Option<bool> {
        let steps = self.read();
        let mut dirtied = false;
        for (i, step) in steps.iter().enumerate() {
            let leaf = i + 1 == steps.len();
            let wants = if leaf && write { A | D } else { A };
            if step.entry & wants == wants {
                continue;
            }
            if !memory.exchange_u64(step.at, step.entry, step.entry | wants) {
                return None;
            }
            counts.ad_writes += 1;
            dirtied |= leaf && write && step.entry & D == 0;
        }
        Some(dirtied)
    }
}

/// A dirty flag was set: the page goes into the log.
fn log_page(memory: Direct<'_>, gpa: GuestPhysAddr, pml: &mut Option<Pml>, counts: &mut EptCounts) {
    if let Some(pml) = pml {
        let at = pml.address.wrapping_add(8 * u64::from(pml.index));
        memory.phys.write(at, &gpa.page().0.to_le_bytes());
        memory.code.note_write(at, 8);
        pml.index = pml.index.wrapping_sub(1);
        counts.logged += 1;
    }
}
