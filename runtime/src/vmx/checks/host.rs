//! Checks on the host-state area and those related to address-space size (SDM Vol 3C, "Checks on Host-State Area", "Checks
//! Related to Address-Space Size").

use twofold_arch::control::{cr4, efer};
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{entry, exit};
use twofold_arch::{LinearAddr, paging};

use super::Heading::{AddressSpace, HostControl, HostSegments};
use super::{Check, Detail, Table, View, canonical_field, check, cr0_name, cr4_name, fixed_bit, pat, require};

type Outcome = Result<(), Detail>;

pub(super) const TABLE: Table = Table {
    checks: CHECKS,
    memo: Some(1),
    watch: &[
        (Field::HostEsSelector, Field::HostTrSelector),
        (Field::HostPat, Field::HostPkrs),
        (Field::HostCr0, Field::HostRip),
    ],
    also: &[(Field::ExitControls, u64::MAX), (Field::EntryControls, u64::MAX)],
};

/// In the SDM's order. That "IA-32e mode guest" is 0 when "host address-space size" is, follows from the two checks on the
/// mode in which VM entry begins.
const CHECKS: &[Check] = &[
    check("host-cr0-fixed", HostControl, cr0_fixed),
    check("host-cr4-fixed", HostControl, cr4_fixed),
    check("host-cr3-width", HostControl, cr3_width),
    check("host-sysenter-canonical", HostControl, sysenter),
    check("host-pat", HostControl, host_pat),
    check("host-efer-reserved", HostControl, efer_reserved),
    check("host-efer-mode", HostControl, efer_mode),
    check("host-selector-rpl-ti", HostSegments, selector_bits),
    check("host-cs-null", HostSegments, cs_null),
    check("host-tr-null", HostSegments, tr_null),
    check("host-ss-null", HostSegments, ss_null),
    check("host-base-canonical", HostSegments, bases),
    check("outside-ia32e-mode", AddressSpace, outside_ia32e),
    check("inside-ia32e-mode", AddressSpace, inside_ia32e),
    check("host-32-bit-pcide", AddressSpace, narrow_host_pcide),
    check("host-32-bit-rip", AddressSpace, narrow_host_rip),
    check("host-64-bit-pae", AddressSpace, wide_host_pae),
    check("host-64-bit-rip", AddressSpace, wide_host_rip),
];

/// The host will be in IA-32e mode.
fn wide(v: &View<'_>) -> bool {
    v.exit(exit::HOST_ADDRESS_SPACE_SIZE)
}

fn cr0_fixed(v: &View<'_>) -> Outcome {
    let (value, allowed) = (v.get(Field::HostCr0), v.caps.cr0_fixed());
    if allowed.admits(value) {
        return Ok(());
    }
    Err(fixed_bit("host CR0", value, allowed, cr0_name, ["IA32_VMX_CR0_FIXED0", "IA32_VMX_CR0_FIXED1"]))
}

fn cr4_fixed(v: &View<'_>) -> Outcome {
    let (value, allowed) = (v.get(Field::HostCr4), v.caps.cr4_fixed());
    if allowed.admits(value) {
        return Ok(());
    }
    Err(fixed_bit("host CR4", value, allowed, cr4_name, ["IA32_VMX_CR4_FIXED0", "IA32_VMX_CR4_FIXED1"]))
}

fn cr3_width(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostCr3);
    require!(v.physical(value), "host CR3 {value:#x} is beyond the physical-address width of {} bits", v.caps.phys_bits)
}

fn sysenter(v: &View<'_>) -> Outcome {
    canonical_field(v, Field::HostSysenterEsp)?;
    canonical_field(v, Field::HostSysenterEip)
}

fn host_pat(v: &View<'_>) -> Outcome {
    if v.exit(exit::LOAD_PAT) { pat(v, Field::HostPat) } else { Ok(()) }
}

fn efer_reserved(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostEfer);
    let reserved = value & !v.caps.efer_bits;
    require!(!v.exit(exit::LOAD_EFER) || reserved == 0, "host IA32_EFER {value:#x} has reserved bits {reserved:#x} set")
}

fn efer_mode(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostEfer);
    let want = if wide(v) { efer::LMA | efer::LME } else { 0 };
    require!(
        !v.exit(exit::LOAD_EFER) || value & (efer::LMA | efer::LME) == want,
        "LMA and LME of host IA32_EFER {value:#x} are not both \"host address-space size\", which is {}",
        u8::from(wide(v))
    )
}

fn selector_bits(v: &View<'_>) -> Outcome {
    use Field::*;
    for field in
        [HostCsSelector, HostSsSelector, HostDsSelector, HostEsSelector, HostFsSelector, HostGsSelector, HostTrSelector]
    {
        let value = v.get(field);
        require!(value & 7 == 0, "{} {value:#x} has RPL or TI set", field.name())?;
    }
    Ok(())
}

fn cs_null(v: &View<'_>) -> Outcome {
    require!(v.get(Field::HostCsSelector) != 0, "host CS selector is 0000H")
}

fn tr_null(v: &View<'_>) -> Outcome {
    require!(v.get(Field::HostTrSelector) != 0, "host TR selector is 0000H")
}

fn ss_null(v: &View<'_>) -> Outcome {
    require!(
        wide(v) || v.get(Field::HostSsSelector) != 0,
        "host SS selector is 0000H while \"host address-space size\" is 0"
    )
}

fn bases(v: &View<'_>) -> Outcome {
    use Field::*;
    for field in [HostFsBase, HostGsBase, HostGdtrBase, HostIdtrBase, HostTrBase] {
        canonical_field(v, field)?;
    }
    Ok(())
}

fn outside_ia32e(v: &View<'_>) -> Outcome {
    require!(
        v.ia32e || (!wide(v) && !v.entry(entry::IA32E_MODE_GUEST)),
        "\"host address-space size\" or \"IA-32e mode guest\" is 1 on VM entry outside IA-32e mode"
    )
}

fn inside_ia32e(v: &View<'_>) -> Outcome {
    require!(!v.ia32e || wide(v), "\"host address-space size\" is 0 on VM entry in IA-32e mode")
}

fn narrow_host_pcide(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostCr4);
    require!(
        wide(v) || value & cr4::PCIDE == 0,
        "host CR4 {value:#x} has bit 17 (PCIDE) set while \"host address-space size\" is 0"
    )
}

fn narrow_host_rip(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostRip);
    require!(
        wide(v) || value & paging::bits(63, 32) == 0,
        "host RIP {value:#x} has one of bits 63:32 set while \"host address-space size\" is 0"
    )
}

fn wide_host_pae(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostCr4);
    require!(
        !wide(v) || value & cr4::PAE != 0,
        "host CR4 {value:#x} has bit 5 (PAE) clear while \"host address-space size\" is 1"
    )
}

/// Unlike registers that hold addresses, RIP is judged by the paging mode it will run in.
fn wide_host_rip(v: &View<'_>) -> Outcome {
    let value = v.get(Field::HostRip);
    let width = if v.get(Field::HostCr4) & cr4::LA57 != 0 { 57 } else { 48 };
    require!(!wide(v) || LinearAddr(value).is_canonical(width), "host RIP {value:#x} is not canonical")
}
