//! Checks on guest control registers, debug registers, MSRs, descriptor-table registers, RIP and RFLAGS (SDM Vol 3C, "Checks
//! on the Guest State Area").

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::paging::bits;
use twofold_arch::segment::attr;
use twofold_arch::vmx::control::{entry, proc};
use twofold_arch::vmx::{EventType, Field};

use super::Heading::{GuestControl, GuestRip, GuestTables};
use super::{Check, Detail, Table, View, canonical_field, check, cr0_name, cr4_name, fixed_bit, pat, require};
use crate::cpu::msr::DEBUGCTL_DEFINED;

type Outcome = Result<(), Detail>;

/// The checks whose fields seldom change.
pub(super) const TABLE: Table = Table {
    checks: CHECKS,
    memo: Some(2),
    watch: &[
        (Field::GuestDebugctl, Field::GuestEfer),
        (Field::GuestGdtrLimit, Field::GuestIdtrLimit),
        (Field::GuestCr0, Field::GuestCr4),
        (Field::GuestGdtrBase, Field::GuestDr7),
        (Field::GuestSysenterEsp, Field::GuestSysenterEip),
    ],
    also: &[(Field::EntryControls, u64::MAX), (Field::ProcControls, SECONDARY), (Field::Proc2Controls, u64::MAX)],
};

/// The checks on RIP and RFLAGS.
pub(super) const EVERY_TIME: Table = Table { checks: CHECKS_EVERY_TIME, memo: None, watch: &[], also: &[] };

const SECONDARY: u64 = proc::SECONDARY as u64;

/// In the SDM's order.
const CHECKS: &[Check] = &[
    check("guest-cr0-fixed", GuestControl, cr0_fixed),
    check("guest-paging-needs-protection", GuestControl, paging_needs_protection),
    check("guest-cr4-fixed", GuestControl, cr4_fixed),
    check("guest-debugctl", GuestControl, debugctl),
    check("guest-ia32e-paging", GuestControl, ia32e_paging),
    check("guest-ia32e-pae", GuestControl, ia32e_pae),
    check("guest-pcide", GuestControl, pcide),
    check("guest-cr3-width", GuestControl, cr3_width),
    check("guest-dr7", GuestControl, dr7),
    check("guest-sysenter-canonical", GuestControl, sysenter),
    check("guest-pat", GuestControl, guest_pat),
    check("guest-efer-reserved", GuestControl, efer_reserved),
    check("guest-efer-lma", GuestControl, efer_lma),
    check("guest-efer-lme", GuestControl, efer_lme),
    check("guest-table-base-canonical", GuestTables, table_bases),
    check("guest-table-limit", GuestTables, table_limits),
];

const CHECKS_EVERY_TIME: &[Check] = &[
    check("guest-rip-32-bit", GuestRip, rip_32),
    check("guest-rip-canonical", GuestRip, rip_64),
    check("guest-rflags-reserved", GuestRip, rflags_reserved),
    check("guest-rflags-vm", GuestRip, rflags_vm),
    check("guest-rflags-if", GuestRip, rflags_if),
];

/// What CR0 may be: PE and PG are free in an unrestricted guest.
fn cr0_fixed(v: &View<'_>) -> Outcome {
    let mut allowed = v.caps.cr0_fixed();
    if v.unrestricted() {
        allowed.must &= !(cr0::PE | cr0::PG);
    }
    let value = v.get(Field::GuestCr0);
    if allowed.admits(value) {
        return Ok(());
    }
    Err(fixed_bit("guest CR0", value, allowed, cr0_name, ["IA32_VMX_CR0_FIXED0", "IA32_VMX_CR0_FIXED1"]))
}

fn paging_needs_protection(v: &View<'_>) -> Outcome {
    // Only an unrestricted guest gets here with PE = 0.
    require!(
        !v.unrestricted() || !v.cr0(cr0::PG) || v.cr0(cr0::PE),
        "guest CR0 {:#x} has bit 31 (PG) set and bit 0 (PE) clear",
        v.cr0
    )
}

fn cr4_fixed(v: &View<'_>) -> Outcome {
    let (value, allowed) = (v.get(Field::GuestCr4), v.caps.cr4_fixed());
    if allowed.admits(value) {
        return Ok(());
    }
    Err(fixed_bit("guest CR4", value, allowed, cr4_name, ["IA32_VMX_CR4_FIXED0", "IA32_VMX_CR4_FIXED1"]))
}

fn debugctl(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestDebugctl);
    let reserved = value & !DEBUGCTL_DEFINED;
    require!(
        !v.entry(entry::LOAD_DEBUG_CONTROLS) || reserved == 0,
        "guest IA32_DEBUGCTL {value:#x} has reserved bits {reserved:#x} set"
    )
}

fn ia32e_paging(v: &View<'_>) -> Outcome {
    // Where the guest is not unrestricted, CR0's fixed bits have been checked.
    require!(
        !v.ia32e_guest() || v.cr0(cr0::PG) || !v.unrestricted(),
        "guest CR0 {:#x} has bit 31 (PG) clear while \"IA-32e mode guest\" is 1",
        v.cr0
    )
}

fn ia32e_pae(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestCr4);
    require!(
        !v.ia32e_guest() || value & cr4::PAE != 0,
        "guest CR4 {value:#x} has bit 5 (PAE) clear while \"IA-32e mode guest\" is 1"
    )
}

fn pcide(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestCr4);
    require!(
        v.ia32e_guest() || value & cr4::PCIDE == 0,
        "guest CR4 {value:#x} has bit 17 (PCIDE) set while \"IA-32e mode guest\" is 0"
    )
}

fn cr3_width(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestCr3);
    require!(
        v.physical(value),
        "guest CR3 {value:#x} is beyond the physical-address width of {} bits",
        v.caps.phys_bits
    )
}

fn dr7(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestDr7);
    require!(!v.entry(entry::LOAD_DEBUG_CONTROLS) || value >> 32 == 0, "guest DR7 {value:#x} has one of bits 63:32 set")
}

fn sysenter(v: &View<'_>) -> Outcome {
    canonical_field(v, Field::GuestSysenterEsp)?;
    canonical_field(v, Field::GuestSysenterEip)
}

fn guest_pat(v: &View<'_>) -> Outcome {
    if v.entry(entry::LOAD_PAT) { pat(v, Field::GuestPat) } else { Ok(()) }
}

fn efer_reserved(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestEfer);
    let reserved = value & !v.caps.efer_bits;
    require!(
        !v.entry(entry::LOAD_EFER) || reserved == 0,
        "guest IA32_EFER {value:#x} has reserved bits {reserved:#x} set"
    )
}

fn efer_lma(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestEfer);
    let lma = value & efer::LMA != 0;
    require!(
        !v.entry(entry::LOAD_EFER) || lma == v.ia32e_guest(),
        "LMA of guest IA32_EFER {value:#x} is not \"IA-32e mode guest\", which is {}",
        u8::from(v.ia32e_guest())
    )
}

fn efer_lme(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestEfer);
    let (lma, lme) = (value & efer::LMA != 0, value & efer::LME != 0);
    require!(
        !v.entry(entry::LOAD_EFER) || !v.cr0(cr0::PG) || lma == lme || lma != v.ia32e_guest(),
        "LME and LMA of guest IA32_EFER {value:#x} differ while guest CR0 has bit 31 (PG) set"
    )
}

fn table_bases(v: &View<'_>) -> Outcome {
    canonical_field(v, Field::GuestGdtrBase)?;
    canonical_field(v, Field::GuestIdtrBase)
}

fn table_limits(v: &View<'_>) -> Outcome {
    for field in [Field::GuestGdtrLimit, Field::GuestIdtrLimit] {
        let value = v.get(field);
        require!(value >> 16 == 0, "{} {value:#x} has one of bits 31:16 set", field.name())?;
    }
    Ok(())
}

/// The guest will be in 64-bit mode.
fn code_64(v: &View<'_>) -> bool {
    v.ia32e_guest() && v.get(Field::GuestCsAccessRights) & u64::from(attr::L) != 0
}

fn rip_32(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestRip);
    require!(
        code_64(v) || value >> 32 == 0,
        "guest RIP {value:#x} has one of bits 63:32 set and the guest is not in 64-bit mode"
    )
}

/// Bits 63:N, N being the width of linear addresses: one bit less than canonicality asks for. An address that passes
/// and is not canonical makes the first fetch fault.
fn rip_64(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestRip);
    let (n, high) = (v.caps.linear_bits, bits(63, v.caps.linear_bits));
    require!(
        !code_64(v) || value & high == 0 || value & high == high,
        "guest RIP {value:#x} does not have bits 63:{n} all alike"
    )
}

fn rflags_reserved(v: &View<'_>) -> Outcome {
    let value = v.rflags();
    let reserved = value & !(rflags::ARITH | rflags::SYS | rflags::FIXED1);
    require!(reserved == 0, "guest RFLAGS {value:#x} has reserved bits {reserved:#x} set")?;
    require!(value & rflags::FIXED1 != 0, "guest RFLAGS {value:#x} has bit 1 clear")
}

fn rflags_vm(v: &View<'_>) -> Outcome {
    require!(
        !v.v86() || (!v.ia32e_guest() && v.cr0(cr0::PE)),
        "guest RFLAGS {:#x} has bit 17 (VM) set, and the guest is in IA-32e mode or not in protected mode",
        v.rflags()
    )
}

fn rflags_if(v: &View<'_>) -> Outcome {
    let external = v.event().is_some_and(|e| e.kind() == Some(EventType::External));
    require!(
        !external || v.rflags() & rflags::IF != 0,
        "guest RFLAGS {:#x} has bit 9 (IF) clear while an external interrupt is injected",
        v.rflags()
    )
}
