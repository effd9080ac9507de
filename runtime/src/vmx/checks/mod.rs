//! The checks of VM entry, one small function each, in tables in the SDM's order (SDM Vol 3C, "VM Entries").
//!
//! Place in the pipeline: VMLAUNCH and VMRESUME call [`controls`], [`host`] and [`guest`] in this order; the first check
//! that fails makes a [`Failed`], which says what the instruction does and, in words, what is wrong. A [`Memo`] spares the
//! checks of what has not changed since the last entry. Invariants: checks
//! only read; a check that looks at what an earlier one has refused passes, so that one wrong thing fails one check;
//! whatever a VMCS holds, none panics. What belongs to a control that [`super::caps::ROWS`] does not have, has no check
//! of its own: the control is reserved.

use std::cell::OnceCell;
use std::fmt;
#[cfg(test)]
use std::{cell::RefCell, collections::BTreeSet};

use twofold_arch::control::{cr0, cr4, rflags};
use twofold_arch::paging::bits;
use twofold_arch::segment::attr;
use twofold_arch::vmx::control::{entry, proc, proc2};
use twofold_arch::vmx::{EntryFailure, ExitReason, Field, InterruptionInfo, VmError, Word};
use twofold_arch::{LinearAddr, SegReg};

use super::Vmcs;
use super::caps::{Allowed, Caps};

mod controls;
mod guest;
mod host;
mod memo;
mod msr_area;
mod nonregister;
mod segments;
#[cfg(test)]
mod tests;

pub use memo::{Memo, Table};
pub use msr_area::{MsrArea, msr_entry};

/// What is wrong, in words.
pub type Detail = Box<str>;

/// Where the SDM has a check.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs)]
pub enum Heading {
    Execution,
    Exit,
    Entry,
    HostControl,
    HostSegments,
    AddressSpace,
    GuestControl,
    GuestSegments,
    GuestTables,
    GuestRip,
    GuestNonRegister,
    GuestPdptes,
    MsrLoading,
}

impl Heading {
    /// The heading in SDM Vol 3C, "VM Entries".
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Execution => "VM-Execution Control Fields",
            Self::Exit => "VM-Exit Control Fields",
            Self::Entry => "VM-Entry Control Fields",
            Self::HostControl => "Checks on Host Control Registers, MSRs, and SSP",
            Self::HostSegments => "Checks on Host Segment and Descriptor-Table Registers",
            Self::AddressSpace => "Checks Related to Address-Space Size",
            Self::GuestControl => "Checks on Guest Control Registers, Debug Registers, and MSRs",
            Self::GuestSegments => "Checks on Guest Segment Registers",
            Self::GuestTables => "Checks on Guest Descriptor-Table Registers",
            Self::GuestRip => "Checks on Guest RIP, RFLAGS, and SSP",
            Self::GuestNonRegister => "Checks on Guest Non-Register State",
            Self::GuestPdptes => "Checks on Guest Page-Directory-Pointer-Table Entries",
            Self::MsrLoading => "Loading MSRs",
        }
    }
}

/// One check.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// What statistics call it; never changes its meaning.
    pub name: &'static str,
    /// Where the SDM has it.
    pub heading: Heading,
    /// The check.
    pub run: fn(&View<'_>) -> Result<(), Detail>,
}

const fn check(name: &'static str, heading: Heading, run: fn(&View<'_>) -> Result<(), Detail>) -> Check {
    Check { name, heading, run }
}

/// What the instruction does about a failed check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// VMfailValid with this error.
    Fail(VmError),
    /// A VM-entry failure: a VM exit with bit 31 of the exit reason set.
    Exit {
        /// Basic exit reason.
        reason: ExitReason,
        /// Exit qualification.
        qualification: u64,
    },
}

/// A check that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failed {
    /// The check's name.
    pub name: &'static str,
    /// Where the SDM has the check.
    pub heading: Heading,
    /// What is wrong, in words.
    pub detail: Detail,
    /// What follows.
    pub outcome: Outcome,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; SDM Vol 3C, {}", self.detail, self.heading.text())
    }
}

/// A check that failed, before it is known what follows.
struct Refused {
    check: &'static Check,
    detail: Detail,
}

impl Refused {
    fn with(self, outcome: impl FnOnce(&str) -> Outcome) -> Failed {
        let Check { name, heading, .. } = *self.check;
        Failed { name, heading, detail: self.detail, outcome: outcome(name) }
    }
}

impl Failed {
    /// Entry `number` (the first is 1) of the VM-entry MSR-load area was refused.
    #[must_use]
    pub fn msr_load(number: u64, detail: Detail) -> Self {
        Self {
            name: "entry-msr-load",
            heading: Heading::MsrLoading,
            detail: say(format_args!("entry {number} of the VM-entry MSR-load area: {detail}")),
            outcome: Outcome::Exit { reason: ExitReason::EntryMsrLoading, qualification: number },
        }
    }
}

/// What the checks look at.
pub struct View<'a> {
    /// The current VMCS.
    pub vmcs: &'a Vmcs,
    /// What the processor can do.
    pub caps: &'a Caps,
    /// The current-VMCS pointer.
    pub pointer: u64,
    /// IA32_EFER.LMA as VM entry begins.
    pub ia32e: bool,
    /// Reads guest physical memory.
    memory: &'a dyn Fn(u64, &mut [u8]),
    pin: u32,
    proc: u32,
    proc2: u32,
    entry: u32,
    rflags: u64,
    cr0: u64,
    pdptes: OnceCell<[u64; 4]>,
    segments: OnceCell<[GuestSegment; 8]>,
    #[cfg(test)]
    seen: RefCell<BTreeSet<Field>>,
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("pointer", &self.pointer).finish_non_exhaustive()
    }
}

impl<'a> View<'a> {
    /// What there is to check on entry with `vmcs`, whose region is at `pointer`. `memory` fills a buffer from a physical
    /// address, wherever that is.
    #[must_use]
    pub fn new(vmcs: &'a Vmcs, caps: &'a Caps, pointer: u64, ia32e: bool, memory: &'a dyn Fn(u64, &mut [u8])) -> Self {
        let proc = vmcs.get32(Field::ProcControls);
        Self {
            vmcs,
            caps,
            pointer,
            ia32e,
            memory,
            pin: vmcs.get32(Field::PinControls),
            proc,
            proc2: if proc & proc::SECONDARY != 0 { vmcs.get32(Field::Proc2Controls) } else { 0 },
            entry: vmcs.get32(Field::EntryControls),
            rflags: vmcs.get(Field::GuestRflags),
            cr0: vmcs.get(Field::GuestCr0),
            pdptes: OnceCell::new(),
            segments: OnceCell::new(),
            #[cfg(test)]
            seen: RefCell::default(),
        }
    }

    /// In tests: notes that a check looks at the field.
    #[inline]
    fn look(&self, field: Field) {
        let _ = field;
        #[cfg(test)]
        self.seen.borrow_mut().insert(field);
    }
    #[inline]
    fn get(&self, field: Field) -> u64 {
        self.look(field);
        self.vmcs.get(field)
    }
    #[inline]
    fn pin(&self, control: u32) -> bool {
        self.look(Field::PinControls);
        self.pin & control != 0
    }
    #[inline]
    fn proc(&self, control: u32) -> bool {
        self.look(Field::ProcControls);
        self.proc & control != 0
    }
    #[inline]
    fn proc2(&self, control: u32) -> bool {
        self.look(Field::ProcControls);
        self.look(Field::Proc2Controls);
        self.proc2 & control != 0
    }
    #[inline]
    fn proc3(&self, control: u64) -> bool {
        self.proc(proc::TERTIARY) && self.get(Field::Proc3Controls) & control != 0
    }
    #[inline]
    fn exit(&self, control: u32) -> bool {
        self.get(Field::ExitControls) & u64::from(control) != 0
    }
    #[inline]
    fn entry(&self, control: u32) -> bool {
        self.look(Field::EntryControls);
        self.entry & control != 0
    }
    /// The guest will be in IA-32e mode.
    #[inline]
    fn ia32e_guest(&self) -> bool {
        self.entry(entry::IA32E_MODE_GUEST)
    }
    /// The guest will be in virtual-8086 mode.
    #[inline]
    fn v86(&self) -> bool {
        self.rflags() & rflags::VM != 0
    }
    #[inline]
    fn rflags(&self) -> u64 {
        self.look(Field::GuestRflags);
        self.rflags
    }
    #[inline]
    fn unrestricted(&self) -> bool {
        self.proc2(proc2::UNRESTRICTED_GUEST)
    }
    #[inline]
    fn cr0(&self, bit: u64) -> bool {
        self.look(Field::GuestCr0);
        self.cr0 & bit != 0
    }
    /// The event to be injected.
    #[inline]
    fn event(&self) -> Option<InterruptionInfo> {
        let info = InterruptionInfo(self.get(Field::EntryInterruptionInfo) as u32);
        info.is_valid().then_some(info)
    }
    /// A linear address that a register of this processor can hold.
    #[inline]
    fn canonical(&self, value: u64) -> bool {
        LinearAddr(value).is_canonical(self.caps.linear_bits)
    }
    /// Whether all of `bits` are within the physical-address width.
    #[inline]
    fn physical(&self, address: u64) -> bool {
        address & bits(63, self.caps.phys_bits) == 0
    }
    fn read(&self, at: u64, buf: &mut [u8]) {
        (self.memory)(at, buf);
    }

    /// Whether the guest will use PAE paging.
    #[must_use]
    pub fn pae_guest(&self) -> bool {
        self.cr0(cr0::PG) && self.get(Field::GuestCr4) & cr4::PAE != 0 && !self.ia32e_guest()
    }

    /// The PDPTEs that the guest gets if it uses PAE paging: from the VMCS with EPT, else from the table that its CR3
    /// points to, which is read once.
    #[must_use]
    pub fn guest_pdptes(&self) -> [u64; 4] {
        *self.pdptes.get_or_init(|| {
            if self.proc2(proc2::EPT) {
                return core::array::from_fn(|i| self.get(Field::guest_pdpte(i)));
            }
            let mut table = [0; 32];
            self.read(self.get(Field::GuestCr3) & 0xffff_ffe0, &mut table);
            let mut entries = table.chunks_exact(8).map(|b| b.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)));
            core::array::from_fn(|_| entries.next().unwrap_or(0))
        })
    }

    /// Guest segment register `reg`.
    fn segment(&self, reg: SegReg) -> &GuestSegment {
        #[cfg(test)]
        for field in [Field::guest_selector, Field::guest_base, Field::guest_limit, Field::guest_access_rights] {
            self.look(field(reg as usize));
        }
        let all = self.segments.get_or_init(|| {
            SegReg::ALL.map(|reg| {
                let n = reg as usize;
                GuestSegment {
                    reg,
                    selector: self.vmcs.get(Field::guest_selector(n)),
                    base: self.vmcs.get(Field::guest_base(n)),
                    limit: self.vmcs.get32(Field::guest_limit(n)),
                    rights: self.vmcs.get32(Field::guest_access_rights(n)),
                }
            })
        });
        &all[reg as usize]
    }
}

/// A guest segment register as the VMCS has it.
#[derive(Clone, Copy)]
struct GuestSegment {
    reg: SegReg,
    selector: u64,
    base: u64,
    limit: u32,
    rights: u32,
}

impl GuestSegment {
    fn usable(&self) -> bool {
        self.rights & attr::UNUSABLE == 0
    }
    fn kind(&self) -> u32 {
        self.rights & attr::TYPE
    }
    fn dpl(&self) -> u32 {
        (self.rights & attr::DPL) >> attr::DPL_SHIFT
    }
    fn rpl(&self) -> u32 {
        self.selector as u32 & 3
    }
    /// Selector bit 2: the selector refers to the LDT.
    fn ti(&self) -> bool {
        self.selector & 4 != 0
    }
    fn name(&self) -> String {
        SegReg::NAMES[self.reg as usize].to_uppercase()
    }
}

/// `Ok` if `$ok`, else what is wrong.
macro_rules! require {
    ($ok:expr, $($words:tt)+) => {
        if $ok { Ok(()) } else { Err($crate::vmx::checks::say(format_args!($($words)+))) }
    };
}
use require;

#[cold]
fn say(words: fmt::Arguments<'_>) -> Detail {
    words.to_string().into_boxed_str()
}

/// An address that must be a multiple of `1 << low` and within the physical-address width.
#[inline]
fn address(v: &View<'_>, field: Field, low: u32) -> Result<(), Detail> {
    let value = v.get(field);
    require!(value & bits(low - 1, 0) == 0, "{} {value:#x} has one of bits {}:0 set", field.name(), low - 1)?;
    require!(
        v.physical(value),
        "{} {value:#x} is beyond the physical-address width of {} bits",
        field.name(),
        v.caps.phys_bits
    )
}

/// A value whose bits are fixed: names the first that is wrong.
#[cold]
fn fixed_bit(
    what: &str,
    value: u64,
    allowed: Allowed,
    name: impl Fn(u32) -> Option<&'static str>,
    msrs: [&str; 2],
) -> Detail {
    let (clear, set) = (allowed.must & !value, value & !allowed.may);
    let (bit, state, rule) = if clear != 0 {
        (clear.trailing_zeros(), "clear", format!("{} requires", msrs[0]))
    } else {
        (set.trailing_zeros(), "set", format!("{} forbids", msrs[1]))
    };
    let name = name(bit).map_or(String::new(), |n| format!(" ({n})"));
    say(format_args!("{what} {value:#x} has bit {bit}{name} {state} that {rule}"))
}

/// The capability MSR that governs a word of controls.
fn capability(v: &View<'_>, word: Word) -> &'static str {
    use twofold_arch::vmx::msr;
    let exact = v.caps.has_basic(msr::basic::TRUE_CONTROLS);
    msr::name(match (word, exact) {
        (Word::Pin, true) => msr::TRUE_PINBASED_CTLS,
        (Word::Pin, false) => msr::PINBASED_CTLS,
        (Word::Proc, true) => msr::TRUE_PROCBASED_CTLS,
        (Word::Proc, false) => msr::PROCBASED_CTLS,
        (Word::Proc2, _) => msr::PROCBASED_CTLS2,
        (Word::Proc3, _) => msr::PROCBASED_CTLS3,
        (Word::Exit, true) => msr::TRUE_EXIT_CTLS,
        (Word::Exit, false) => msr::EXIT_CTLS,
        (Word::Exit2, _) => msr::EXIT_CTLS2,
        (Word::Entry, true) => msr::TRUE_ENTRY_CTLS,
        (Word::Entry, false) => msr::ENTRY_CTLS,
        (Word::VmFunc, _) => msr::VMFUNC,
    })
}

/// The reserved bits of a word of controls.
#[inline]
fn reserved(v: &View<'_>, word: Word) -> Result<(), Detail> {
    let (value, allowed) = (v.get(word.field()), v.caps.allowed(word));
    if allowed.admits(value) {
        return Ok(());
    }
    let msr = capability(v, word);
    Err(fixed_bit(word.field().name(), value, allowed, |n| word.bit_name(n), [msr, msr]))
}

/// The names of CR0's bits.
fn cr0_name(bit: u32) -> Option<&'static str> {
    const NAMES: &[(u64, &str)] = &[(cr0::PE, "PE"), (cr0::NE, "NE"), (cr0::PG, "PG")];
    name_of(NAMES, bit)
}

/// The names of CR4's bits.
fn cr4_name(bit: u32) -> Option<&'static str> {
    const NAMES: &[(u64, &str)] = &[
        (cr4::VME, "VME"),
        (cr4::PVI, "PVI"),
        (cr4::TSD, "TSD"),
        (cr4::DE, "DE"),
        (cr4::PSE, "PSE"),
        (cr4::PAE, "PAE"),
        (cr4::MCE, "MCE"),
        (cr4::PGE, "PGE"),
        (cr4::PCE, "PCE"),
        (cr4::OSFXSR, "OSFXSR"),
        (cr4::OSXMMEXCPT, "OSXMMEXCPT"),
        (cr4::UMIP, "UMIP"),
        (cr4::LA57, "LA57"),
        (cr4::VMXE, "VMXE"),
        (cr4::SMXE, "SMXE"),
        (cr4::FSGSBASE, "FSGSBASE"),
        (cr4::PCIDE, "PCIDE"),
        (cr4::OSXSAVE, "OSXSAVE"),
        (cr4::SMEP, "SMEP"),
        (cr4::SMAP, "SMAP"),
        (cr4::PKE, "PKE"),
        (cr4::CET, "CET"),
        (cr4::PKS, "PKS"),
    ];
    name_of(NAMES, bit)
}

fn name_of(names: &[(u64, &'static str)], bit: u32) -> Option<&'static str> {
    names.iter().find(|(mask, _)| mask.trailing_zeros() == bit).map(|(_, name)| *name)
}

/// IA32_PAT holds memory types only.
fn pat(v: &View<'_>, field: Field) -> Result<(), Detail> {
    let value = v.get(field);
    let bad = value.to_le_bytes().iter().position(|t| !matches!(t, 0 | 1 | 4..=7));
    require!(bad.is_none(), "{} {value:#x} has no memory type in byte {}", field.name(), bad.unwrap_or(0))
}

fn canonical_field(v: &View<'_>, field: Field) -> Result<(), Detail> {
    let value = v.get(field);
    require!(v.canonical(value), "{} {value:#x} is not canonical", field.name())
}

/// The checks on VMX controls.
///
/// # Errors
/// The first that fails: VMfailValid(7).
pub fn controls(v: &View<'_>, memo: &mut Memo) -> Result<(), Failed> {
    memo.run(v, &[&controls::TABLE, &controls::EVERY_TIME])
        .map_err(|failed| failed.with(|_| Outcome::Fail(VmError::EntryControls)))
}

/// The checks on the host-state area, the address-space size included.
///
/// # Errors
/// The first that fails: VMfailValid(8).
pub fn host(v: &View<'_>, memo: &mut Memo) -> Result<(), Failed> {
    memo.run(v, &[&host::TABLE]).map_err(|failed| failed.with(|_| Outcome::Fail(VmError::EntryHostState)))
}

/// The checks on the guest-state area.
///
/// # Errors
/// The first that fails: a VM-entry failure with exit reason 33.
pub fn guest(v: &View<'_>, memo: &mut Memo) -> Result<(), Failed> {
    memo.run(v, &[&guest::TABLE, &segments::TABLE, &guest::EVERY_TIME, &nonregister::EVERY_TIME]).map_err(|failed| {
        failed.with(|name| {
            let qualification = match name {
                "guest-link-pointer" => EntryFailure::LinkPointer,
                "guest-pdptes" => EntryFailure::Pdpte,
                _ => EntryFailure::Other,
            };
            Outcome::Exit { reason: ExitReason::EntryGuestState, qualification: qualification as u64 }
        })
    })
}

/// The tables of checks, in the order in which they are made.
pub const TABLES: [&Table; 7] = [
    &controls::TABLE,
    &controls::EVERY_TIME,
    &host::TABLE,
    &guest::TABLE,
    &segments::TABLE,
    &guest::EVERY_TIME,
    &nonregister::EVERY_TIME,
];

/// Every check, in the order in which they are made.
pub fn all() -> impl Iterator<Item = &'static Check> {
    TABLES.into_iter().flat_map(|t| t.checks)
}
