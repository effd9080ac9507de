//! A walk told step by step: each guest level, each EPT level under it, and the bits that decided. For `-d mmu`.
//!
//! Place in the pipeline: beside the TLB's fill, never in it. It runs the very walk of [`crate::walk`] on a [`GuestPhysical`] that
//! records. Invariant: nothing is changed, neither in memory nor in any cache.

use std::fmt;

use twofold_arch::exception::pf;
use twofold_arch::paging::{A, D, G, NX, P, PCD, PS, PWT, RW, US};
use twofold_arch::vmx::ept;
use twofold_arch::vmx::qualification::ept_violation as q;
use twofold_arch::{GuestPhysAddr, LinearAddr, PhysAddr};

use crate::ept::{EptAccess, EptControls, EptReason, EptStep, EptWalk};
use crate::mmu::{Mmu, check_linear};
use crate::nested::Nested;
use crate::rights::Rights;
use crate::space::{Access, AccessKind, AddressSpace, EptFault, Fault, PagingMode};
use crate::walk::{Direct, EntryWidth, Frame, GuestPhysical, Mapping, WalkCounts, reserved_bits, walk};

/// What a guest-physical access of a walk was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To read the guest's entry at this level (1 is the page table).
    Entry(u8),
    /// To set flags in the guest's entry there.
    Flags,
    /// It is the translation of the linear address.
    Translation,
}

/// One guest-physical access of a walk.
#[derive(Clone, Debug)]
pub struct TraceStep {
    /// What for.
    pub purpose: Purpose,
    /// Where.
    pub gpa: GuestPhysAddr,
    /// The guest's entry, if it was read.
    pub entry: Option<u64>,
    /// The EPT entries read, topmost first.
    pub ept: Vec<EptStep>,
    /// Why EPT refused, if it did.
    pub refused: Option<EptReason>,
    /// Where EPT put it.
    pub place: Option<PhysAddr>,
}

/// A walk, as it goes now.
#[derive(Clone, Debug)]
pub struct WalkTrace {
    space: AddressSpace,
    la: LinearAddr,
    access: Access,
    /// Its accesses to guest-physical memory, in order.
    pub steps: Vec<TraceStep>,
    /// How it ended.
    pub outcome: Result<Mapping, Fault>,
}

struct Recorder<'a> {
    memory: Direct<'a>,
    controls: Option<EptControls>,
    level: u8,
    steps: Vec<TraceStep>,
}

impl Recorder<'_> {
    fn step(&mut self, purpose: Purpose, gpa: GuestPhysAddr, access: &EptAccess) -> Result<(), EptFault> {
        let mut step =
            TraceStep { purpose, gpa, entry: None, ept: Vec::new(), refused: None, place: Some(gpa.without_ept()) };
        let mut result = Ok(());
        if let Some(controls) = &self.controls {
            let mut walk = EptWalk::new();
            match walk.look(controls, self.memory, gpa, access) {
                Ok(page) => step.place = Some(page.place(gpa)),
                Err((reason, fault)) => {
                    (step.refused, step.place) = (Some(reason), None);
                    result = Err(fault);
                }
            }
            step.ept = walk.read().to_vec();
        }
        self.steps.push(step);
        result
    }

    fn table_access(&self, write: bool, la: LinearAddr) -> EptAccess {
        let write = write || self.controls.is_some_and(|c| c.accessed_dirty);
        let (need, bits) = if write { (ept::R | ept::W, q::READ | q::WRITE) } else { (ept::R, q::READ) };
        EptAccess { need, qualification: (bits | q::LINEAR_VALID) as u32, la: Some(la) }
    }
}

impl GuestPhysical for Recorder<'_> {
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, la: LinearAddr) -> Result<u64, EptFault> {
        let access = self.table_access(false, la);
        let level = self.level;
        self.level = level.saturating_sub(1);
        self.step(Purpose::Entry(level), at, &access)?;
        let Some(step) = self.steps.last_mut() else { return Ok(0) };
        let entry = step.place.map_or(0, |pa| self.memory.load_entry(pa, width));
        step.entry = Some(entry);
        Ok(entry)
    }

    fn exchange_entry(
        &mut self,
        at: GuestPhysAddr,
        _width: EntryWidth,
        _old: u64,
        _new: u64,
        la: LinearAddr,
    ) -> Result<bool, EptFault> {
        let access = self.table_access(true, la);
        self.step(Purpose::Flags, at, &access)?;
        Ok(true)
    }

    fn resolve(
        &mut self,
        at: GuestPhysAddr,
        kind: AccessKind,
        rights: Rights,
        la: LinearAddr,
    ) -> Result<Frame, EptFault> {
        let Some(controls) = self.controls else {
            return self.memory.resolve(at, kind, rights, la);
        };
        let access = Nested::access(&controls, kind, Some((la, rights)));
        self.step(Purpose::Translation, at, &access)?;
        let page = EptWalk::new().look(&controls, self.memory, at, &access).map_err(|(_, fault)| fault)?;
        Ok(Nested::peek(self.memory, controls).frame(at, page, rights.user))
    }
}

impl Mmu {
    /// The walk that `access` to `la` would make now, told step by step, without side effects.
    #[must_use]
    pub fn trace_walk(&self, space: &AddressSpace, la: LinearAddr, access: Access) -> WalkTrace {
        let level = match space.mode {
            PagingMode::None => 0,
            PagingMode::Bits32 | PagingMode::Pae => 2,
            PagingMode::Level4 => 4,
            PagingMode::Level5 => 5,
        };
        let memory = Direct { phys: &self.phys, code: &self.code };
        let mut recorder = Recorder { memory, controls: EptControls::of(space), level, steps: Vec::new() };
        let outcome =
            check_linear(space, la).and_then(|la| walk(space, la, access, &mut recorder, &mut WalkCounts::default()));
        WalkTrace { space: *space, la, access, steps: recorder.steps, outcome }
    }
}

const fn guest_name(mode: PagingMode, level: u8) -> &'static str {
    match (mode, level) {
        (_, 5) => "PML5E",
        (_, 4) => "PML4E",
        (_, 3) => "PDPTE",
        (_, 2) => "PDE",
        _ => "PTE",
    }
}

/// Writes the names of the flags in `entry` that are set.
fn flags(f: &mut fmt::Formatter<'_>, entry: u64, names: &[(u64, &str)]) -> fmt::Result {
    for (bit, name) in names {
        if entry & bit != 0 {
            write!(f, " {name}")?;
        }
    }
    Ok(())
}

const GUEST_FLAGS: [(u64, &str); 9] =
    [(P, "P"), (RW, "RW"), (US, "US"), (PWT, "PWT"), (PCD, "PCD"), (A, "A"), (D, "D"), (G, "G"), (NX, "NX")];

const EPT_FLAGS: [(u64, &str); 9] = [
    (ept::R, "R"),
    (ept::W, "W"),
    (ept::X, "X"),
    (ept::XU, "XU"),
    (ept::A, "A"),
    (ept::D, "D"),
    (ept::IGNORE_PAT, "IPAT"),
    (ept::SUB_PAGE_WRITE, "SPP"),
    (ept::SUPPRESS_VE, "SVE"),
];

impl WalkTrace {
    fn ept_step(f: &mut fmt::Formatter<'_>, step: &EptStep) -> fmt::Result {
        write!(f, "    EPT {} at {:#x}: {:#x}", guest_name(PagingMode::Level5, step.level), step.at, step.entry)?;
        flags(f, step.entry, &EPT_FLAGS)?;
        if step.level == 1 || (step.level <= 3 && step.entry & ept::PS != 0) {
            let size = ["", "4 KiB", "2 MiB", "1 GiB"].get(usize::from(step.level)).copied().unwrap_or_default();
            write!(f, ", {size} page, memory type {}", (step.entry & ept::MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT)?;
        }
        writeln!(f)
    }

    fn guest_step(&self, f: &mut fmt::Formatter<'_>, step: &TraceStep) -> fmt::Result {
        match step.purpose {
            Purpose::Entry(level) => write!(f, "  {} at {:#x}: ", guest_name(self.space.mode, level), step.gpa)?,
            Purpose::Flags => write!(f, "  flags at {:#x}", step.gpa)?,
            Purpose::Translation => write!(f, "  translation {:#x}", step.gpa)?,
        }
        match (step.purpose, step.entry) {
            (Purpose::Entry(level), Some(entry)) => {
                write!(f, "{entry:#x}")?;
                flags(f, entry, &GUEST_FLAGS)?;
                if (2..=3).contains(&level) && entry & PS != 0 {
                    write!(f, " PS")?;
                }
            }
            (Purpose::Entry(_), None) => write!(f, "unread")?,
            _ => {}
        }
        writeln!(f)?;
        for ept in &step.ept {
            Self::ept_step(f, ept)?;
        }
        match (step.refused, step.place) {
            (Some(reason), _) => writeln!(f, "    EPT {reason}"),
            (None, Some(pa)) if !step.ept.is_empty() => writeln!(f, "    = {pa:#x}"),
            _ => Ok(()),
        }
    }

    /// Why guest paging refused.
    fn refusal(&self, f: &mut fmt::Formatter<'_>, error: u32) -> fmt::Result {
        let entries = || {
            self.steps.iter().filter_map(|s| match (s.purpose, s.entry) {
                (Purpose::Entry(level), Some(e)) => Some((level, e)),
                _ => None,
            })
        };
        let Some((level, last)) = entries().next_back() else { return write!(f, "the PDPTE register is not present") };
        let name = guest_name(self.space.mode, level);
        if error & pf::P == 0 {
            return write!(f, "the {name} is not present");
        }
        if error & pf::RSVD != 0 {
            let bits = reserved_bits(&self.space, last, u32::from(level));
            return write!(f, "reserved bits {bits:#x} are set in the {name}");
        }
        if error & pf::PK != 0 {
            return write!(f, "protection key {} forbids it", last >> 59 & 15);
        }
        let user_page = entries().all(|(_, e)| e & US != 0);
        let lacking = |bit: u64, set: bool| {
            entries().find(|(_, e)| (e & bit != 0) == set).map(|(l, _)| guest_name(self.space.mode, l))
        };
        let fetch = self.access.kind == AccessKind::Fetch;
        match (self.access.user, user_page) {
            (true, false) => write!(f, "US is 0 in the {}", lacking(US, false).unwrap_or(name)),
            (false, true) if fetch && self.space.smep => write!(f, "SMEP: the page is a user page"),
            _ if fetch => write!(f, "NX is 1 in the {}", lacking(NX, true).unwrap_or(name)),
            (false, true) if self.space.smap && (self.access.implicit || !self.access.ac) => {
                write!(f, "SMAP: the page is a user page")
            }
            _ => write!(f, "RW is 0 in the {}", lacking(RW, false).unwrap_or(name)),
        }
    }
}

/// One line for the access and how it ended, then one for each entry read.
impl fmt::Display for WalkTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.space;
        write!(f, "mmu: {:?} cr3 {:#x}", s.mode, s.cr3)?;
        if let Some(eptp) = s.eptp {
            write!(f, " eptp {eptp:#x}")?;
        }
        if s.vpid != 0 || s.pcid != 0 {
            write!(f, " vpid {:#x} pcid {:#x}", s.vpid, s.pcid)?;
        }
        let who = if self.access.user { "user" } else { "supervisor" };
        write!(f, " {who} {:?} la {:#x}: ", self.access.kind, self.la)?;
        match &self.outcome {
            Ok(m) => writeln!(f, "page {:#x} of 2^{} bytes, {:?}", m.page, m.shift, m.rights)?,
            Err(Fault::Page { error, .. }) => {
                write!(f, "#PF {error:#x}: ")?;
                self.refusal(f, *error)?;
                writeln!(f)?;
            }
            Err(Fault::NonCanonical { .. }) => writeln!(f, "not canonical")?,
            Err(Fault::Ept(fault)) => writeln!(f, "{:x?} at gpa {:#x}", fault.kind, fault.gpa)?,
        }
        if s.mode == PagingMode::Pae {
            let i = (self.la.0 >> 30 & 3) as usize;
            writeln!(f, "  PDPTE{i} register: {:#x}", s.pdptes.get(i).copied().unwrap_or(0))?;
        }
        self.steps.iter().try_for_each(|step| self.guest_step(f, step))
    }
}
