//! Checks on guest segment registers (SDM Vol 3C, "Checks on Guest Segment Registers").
//!
//! A row checks one property of one register, or of those that share the rule. In virtual-8086 mode the code and data
//! registers have three rules of their own and none of the others.

use twofold_arch::SegReg::{self, Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};
use twofold_arch::control::{cr0, rflags};
use twofold_arch::segment::attr;
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{entry, proc, proc2};

use super::Heading::GuestSegments;
use super::{Check, Detail, GuestSegment, Table, View, check, require};

type Outcome = Result<(), Detail>;

pub(super) const TABLE: Table = Table {
    checks: CHECKS,
    memo: Some(3),
    watch: &[
        (Field::GuestEsSelector, Field::GuestTrSelector),
        (Field::GuestEsLimit, Field::GuestTrLimit),
        (Field::GuestEsAccessRights, Field::GuestTrAccessRights),
        (Field::GuestEsBase, Field::GuestTrBase),
    ],
    also: &[
        (Field::EntryControls, entry::IA32E_MODE_GUEST as u64),
        (Field::ProcControls, proc::SECONDARY as u64),
        (Field::Proc2Controls, proc2::UNRESTRICTED_GUEST as u64),
        (Field::GuestRflags, rflags::VM),
        (Field::GuestCr0, cr0::PE),
    ],
};

/// In the SDM's order: selectors, bases, limits, then access rights by their parts.
const CHECKS: &[Check] = &[
    check("guest-tr-ti", GuestSegments, tr_ti),
    check("guest-ldtr-ti", GuestSegments, ldtr_ti),
    check("guest-ss-rpl", GuestSegments, ss_rpl),
    check("guest-v86-base", GuestSegments, v86_base),
    check("guest-segment-base-canonical", GuestSegments, base_canonical),
    check("guest-segment-base-high", GuestSegments, base_high),
    check("guest-v86-limit", GuestSegments, v86_limit),
    check("guest-v86-access-rights", GuestSegments, v86_access_rights),
    check("guest-cs-type", GuestSegments, cs_type),
    check("guest-ss-type", GuestSegments, ss_type),
    check("guest-data-type", GuestSegments, data_type),
    check("guest-segment-s", GuestSegments, s_flag),
    check("guest-cs-dpl", GuestSegments, cs_dpl),
    check("guest-ss-dpl-rpl", GuestSegments, ss_dpl_rpl),
    check("guest-ss-dpl-zero", GuestSegments, ss_dpl_zero),
    check("guest-data-dpl", GuestSegments, data_dpl),
    check("guest-segment-present", GuestSegments, present),
    check("guest-segment-reserved", GuestSegments, reserved),
    check("guest-cs-d-and-l", GuestSegments, cs_d_and_l),
    check("guest-segment-granularity", GuestSegments, granularity),
    check("guest-tr-type", GuestSegments, tr_type),
    check("guest-tr-s", GuestSegments, |v| system_s(v, Tr)),
    check("guest-tr-present", GuestSegments, |v| system_present(v, Tr)),
    check("guest-tr-reserved", GuestSegments, |v| system_reserved(v, Tr)),
    check("guest-tr-granularity", GuestSegments, |v| system_granularity(v, Tr)),
    check("guest-tr-unusable", GuestSegments, tr_unusable),
    check("guest-ldtr-type", GuestSegments, ldtr_type),
    check("guest-ldtr-s", GuestSegments, |v| system_s(v, Ldtr)),
    check("guest-ldtr-present", GuestSegments, |v| system_present(v, Ldtr)),
    check("guest-ldtr-reserved", GuestSegments, |v| system_reserved(v, Ldtr)),
    check("guest-ldtr-granularity", GuestSegments, |v| system_granularity(v, Ldtr)),
];

/// The registers that hold code, data and stack.
const PLAIN: [SegReg; 6] = [Cs, Ss, Ds, Es, Fs, Gs];
const DATA: [SegReg; 4] = [Ds, Es, Fs, Gs];

/// Type of a read/write, accessed, expand-up data segment: what CS may be in an unrestricted guest.
const DATA_RW_ACCESSED: u32 = 3;

impl GuestSegment {
    /// For the access rights of code and data registers: CS, and the others when usable, outside virtual-8086 mode.
    fn counts(&self, v: &View<'_>) -> bool {
        !v.v86() && (self.reg == Cs || self.usable())
    }
    /// The granularity flag agrees with the limit.
    fn granular(&self) -> bool {
        let g = self.rights & attr::G != 0;
        (self.limit & 0xfff == 0xfff || !g) && (self.limit >> 20 == 0 || g)
    }
    fn says(&self, ok: bool, what: &str) -> Outcome {
        require!(ok, "guest {} access rights {:#x}: {what}", self.name(), self.rights)
    }
}

/// Runs a rule over the registers of `regs` whose access rights count.
fn each<const N: usize>(v: &View<'_>, regs: [SegReg; N], rule: impl Fn(&GuestSegment) -> Outcome) -> Outcome {
    regs.into_iter().map(|reg| v.segment(reg)).filter(|s| s.counts(v)).try_for_each(rule)
}

// ---- selectors, bases, limits -----------------------------------------------------------------------------------------

fn tr_ti(v: &View<'_>) -> Outcome {
    let s = v.segment(Tr);
    require!(!s.ti(), "guest TR selector {:#x} has TI set", s.selector)
}

fn ldtr_ti(v: &View<'_>) -> Outcome {
    let s = v.segment(Ldtr);
    require!(!s.usable() || !s.ti(), "guest LDTR selector {:#x} has TI set while LDTR is usable", s.selector)
}

fn ss_rpl(v: &View<'_>) -> Outcome {
    let (ss, cs) = (v.segment(Ss), v.segment(Cs));
    require!(
        v.v86() || v.unrestricted() || ss.rpl() == cs.rpl(),
        "RPL of guest SS selector {:#x} is not that of CS selector {:#x}",
        ss.selector,
        cs.selector
    )
}

fn v86_base(v: &View<'_>) -> Outcome {
    if !v.v86() {
        return Ok(());
    }
    PLAIN.into_iter().map(|reg| v.segment(reg)).try_for_each(|s| {
        require!(
            s.base == s.selector << 4,
            "guest {} base {:#x} is not selector {:#x} times 16 in virtual-8086 mode",
            s.name(),
            s.base,
            s.selector
        )
    })
}

fn base_canonical(v: &View<'_>) -> Outcome {
    for s in [Tr, Fs, Gs, Ldtr].map(|reg| v.segment(reg)) {
        // Virtual-8086 mode has a sharper rule for FS and GS.
        let matters = match s.reg {
            Ldtr => s.usable(),
            Tr => true,
            _ => !v.v86(),
        };
        require!(!matters || v.canonical(s.base), "guest {} base {:#x} is not canonical", s.name(), s.base)?;
    }
    Ok(())
}

fn base_high(v: &View<'_>) -> Outcome {
    each(v, [Cs, Ss, Ds, Es], |s| {
        require!(s.base >> 32 == 0, "guest {} base {:#x} has one of bits 63:32 set", s.name(), s.base)
    })
}

fn v86_limit(v: &View<'_>) -> Outcome {
    if !v.v86() {
        return Ok(());
    }
    PLAIN.into_iter().map(|reg| v.segment(reg)).try_for_each(|s| {
        require!(s.limit == 0xffff, "guest {} limit {:#x} is not FFFFH in virtual-8086 mode", s.name(), s.limit)
    })
}

// ---- access rights of code and data -----------------------------------------------------------------------------------

fn v86_access_rights(v: &View<'_>) -> Outcome {
    if !v.v86() {
        return Ok(());
    }
    PLAIN
        .into_iter()
        .map(|reg| v.segment(reg))
        .try_for_each(|s| s.says(s.rights == 0xf3, "not F3H in virtual-8086 mode"))
}

fn cs_type(v: &View<'_>) -> Outcome {
    each(v, [Cs], |s| {
        let code = matches!(s.kind(), 9 | 11 | 13 | 15);
        s.says(code || (v.unrestricted() && s.kind() == DATA_RW_ACCESSED), "the type is not that of accessed code")
    })
}

fn ss_type(v: &View<'_>) -> Outcome {
    each(v, [Ss], |s| s.says(matches!(s.kind(), 3 | 7), "the type is not that of read/write accessed data"))
}

fn data_type(v: &View<'_>) -> Outcome {
    each(v, DATA, |s| {
        s.says(s.rights & attr::ACCESSED != 0, "the type has bit 0 (accessed) clear")?;
        let readable = s.rights & attr::CODE == 0 || s.rights & attr::RW != 0;
        s.says(readable, "the type is that of execute-only code")
    })
}

fn s_flag(v: &View<'_>) -> Outcome {
    each(v, PLAIN, |s| s.says(s.rights & attr::S != 0, "S is 0"))
}

fn cs_dpl(v: &View<'_>) -> Outcome {
    let ss = v.segment(Ss).dpl();
    each(v, [Cs], |s| match s.kind() {
        DATA_RW_ACCESSED => s.says(s.dpl() == 0, "DPL is not 0 though the type is that of data"),
        9 | 11 => s.says(s.dpl() == ss, "DPL of non-conforming code is not that of SS"),
        13 | 15 => s.says(s.dpl() <= ss, "DPL of conforming code is above that of SS"),
        _ => Ok(()),
    })
}

fn ss_dpl_rpl(v: &View<'_>) -> Outcome {
    let s = v.segment(Ss);
    s.says(v.v86() || v.unrestricted() || s.dpl() == s.rpl(), "DPL is not the selector's RPL")
}

fn ss_dpl_zero(v: &View<'_>) -> Outcome {
    let (s, cs) = (v.segment(Ss), v.segment(Cs));
    let level_0 = cs.kind() == DATA_RW_ACCESSED || !v.cr0(cr0::PE);
    s.says(v.v86() || !level_0 || s.dpl() == 0, "DPL is not 0 though CS has the type of data or CR0.PE is 0")
}

fn data_dpl(v: &View<'_>) -> Outcome {
    if v.unrestricted() {
        return Ok(());
    }
    each(v, DATA, |s| s.says(s.kind() > 11 || s.dpl() >= s.rpl(), "DPL is below the selector's RPL"))
}

fn present(v: &View<'_>) -> Outcome {
    each(v, PLAIN, |s| s.says(s.rights & attr::P != 0, "P is 0"))
}

/// Bits 11:8 and 31:17.
const RESERVED: u32 = 0xf00 | 0xfffe_0000;

fn reserved(v: &View<'_>) -> Outcome {
    each(v, PLAIN, |s| s.says(s.rights & RESERVED == 0, "a reserved bit is set"))
}

fn cs_d_and_l(v: &View<'_>) -> Outcome {
    each(v, [Cs], |s| {
        let both = s.rights & (attr::L | attr::DB) == attr::L | attr::DB;
        s.says(!v.ia32e_guest() || !both, "L and D are both 1 while \"IA-32e mode guest\" is 1")
    })
}

fn granularity(v: &View<'_>) -> Outcome {
    each(v, PLAIN, |s| {
        require!(
            s.granular(),
            "guest {} limit {:#x} and G of access rights {:#x} do not agree",
            s.name(),
            s.limit,
            s.rights
        )
    })
}

// ---- access rights of TR and LDTR -------------------------------------------------------------------------------------

/// A system segment register whose access rights count: TR always, LDTR when usable.
fn system<'a>(v: &'a View<'_>, reg: SegReg) -> Option<&'a GuestSegment> {
    let s = v.segment(reg);
    (reg == Tr || s.usable()).then_some(s)
}

fn tr_type(v: &View<'_>) -> Outcome {
    let s = v.segment(Tr);
    let busy = s.kind() == 11 || (s.kind() == 3 && !v.ia32e_guest());
    s.says(busy, "the type is not that of a busy TSS of the guest's mode")
}

fn ldtr_type(v: &View<'_>) -> Outcome {
    system(v, Ldtr).map_or(Ok(()), |s| s.says(s.kind() == 2, "the type is not that of an LDT"))
}

fn system_s(v: &View<'_>, reg: SegReg) -> Outcome {
    system(v, reg).map_or(Ok(()), |s| s.says(s.rights & attr::S == 0, "S is 1"))
}

fn system_present(v: &View<'_>, reg: SegReg) -> Outcome {
    system(v, reg).map_or(Ok(()), |s| s.says(s.rights & attr::P != 0, "P is 0"))
}

fn system_reserved(v: &View<'_>, reg: SegReg) -> Outcome {
    system(v, reg).map_or(Ok(()), |s| s.says(s.rights & RESERVED == 0, "a reserved bit is set"))
}

fn system_granularity(v: &View<'_>, reg: SegReg) -> Outcome {
    system(v, reg).map_or(Ok(()), |s| {
        require!(
            s.granular(),
            "guest {} limit {:#x} and G of access rights {:#x} do not agree",
            s.name(),
            s.limit,
            s.rights
        )
    })
}

fn tr_unusable(v: &View<'_>) -> Outcome {
    let s = v.segment(Tr);
    s.says(s.usable(), "TR is unusable")
}
