//! RDMSR and WRMSR: every model-specific register there is, its checks and where its value lives.
//!
//! Place in the pipeline: helpers. Registers that instructions use are in `CpuState::msrs`, rare ones in `ColdState`, the
//! APIC's in the platform. Invariant: an MSR that is not here raises #GP(0), is counted, and is reported once in the
//! trace `io`.

use twofold_arch::msr;
use twofold_arch::vmx::msr as vmx_msr;

use super::Helped;
use super::control::{edx_eax, set_edx_eax, write_efer};
use super::cpuid::{ARCH_CAPABILITIES, Bit};
use super::mode::is_canonical_base;
use super::segments::GP0;
use super::{ColdState, VARIABLE_MTRRS};
use crate::config::DebugItem;
use crate::platform::clock::BASE_MHZ;
use crate::vcpu::{Trap, Vcpu};
use crate::vmx::intercept;

/// IA32_PAT after reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE after reset: fast strings; branch trace storage and event-based sampling unavailable.
pub const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Bits of IA32_MISC_ENABLE that keep what is written: fast strings, thermal control, Enhanced SpeedStep, MONITOR, the limit
/// of CPUID, xTPR messages, execute disable. None of them changes anything here.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// Microcode revision that IA32_BIOS_SIGN_ID shows.
pub const MICROCODE_REVISION: u64 = 0x0d00_03f6;
/// IA32_DEBUGCTL bits that are not reserved.
pub const DEBUGCTL_DEFINED: u64 = 0xdfc3;
/// IA32_MTRRCAP: the variable ranges, fixed ranges, write-combining.
const MTRRCAP: u64 = VARIABLE_MTRRS as u64 | 1 << 8 | 1 << 10;
/// IA32_SPEC_CTRL bits that may be set: IBRS, STIBP, SSBD, IPRED_DIS_U, IPRED_DIS_S, RRSBA_DIS_U, RRSBA_DIS_S, BHI_DIS_S.
const SPEC_CTRL_MASK: u64 = 0b1 | 0b110 | 0b111_1000 | 1 << 10;

const MISC_FEATURES_ENABLES: u32 = 0x140;
const EBL_CR_POWERON: u32 = 0x2a;
const P5_MC_ADDR: u32 = 0x0;
const P5_MC_TYPE: u32 = 0x1;
const SMI_COUNT: u32 = 0x34;
const MTRR_PHYS_LAST: u32 = msr::MTRR_PHYSBASE0 + 2 * VARIABLE_MTRRS as u32 - 1;

/// The fixed-range MTRRs in the order of `ColdState::mtrr_fixed`.
const fn fixed_mtrr(number: u32) -> Option<usize> {
    match number {
        0x250 => Some(0),
        0x258 => Some(1),
        0x259 => Some(2),
        0x268..=0x26f => Some((number - 0x268) as usize + 3),
        _ => None,
    }
}

const fn is_memory_type(t: u64) -> bool {
    matches!(t & 0xff, 0 | 1 | 4 | 5 | 6)
}

/// All eight bytes are memory types; `uc_minus` says whether 7 is one.
fn are_memory_types(value: u64, uc_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|&t| is_memory_type(u64::from(t)) || (uc_minus && t == 7))
}

impl ColdState {
    /// What PC firmware leaves in the MTRRs: everything write-back, the VGA window uncached, both kinds enabled.
    pub fn firmware_mtrrs(&mut self) {
        const WB: u64 = 0x0606_0606_0606_0606;
        self.mtrr_fixed = [WB; 11];
        self.mtrr_fixed[2] = 0;
        self.mtrr_def_type = 1 << 11 | 1 << 10 | 6;
    }
}

/// RDMSR.
pub fn rdmsr(v: &mut Vcpu) -> Helped {
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    let number = v.state.gpr[1] as u32;
    if v.vmx.non_root {
        intercept::msr(v, number, false)?;
    }
    let value = match number {
        msr::TSC => intercept::tsc(v),
        _ => match v.vmx.non_root.then(|| crate::vmx::apic::read_msr(v, number)).flatten() {
            Some(value) => value,
            None => read(v, number)?,
        },
    };
    set_edx_eax(v, value);
    Ok(value)
}

/// WRMSR.
pub fn wrmsr(v: &mut Vcpu) -> Helped {
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    let (number, value) = (v.state.gpr[1] as u32, edx_eax(v));
    if v.vmx.non_root {
        intercept::msr(v, number, true)?;
        if crate::vmx::apic::write_msr(v, number, value)? {
            return Ok(0);
        }
    }
    write(v, number, value)?;
    Ok(0)
}

/// The value of an MSR; #GP(0) when there is none of that number.
pub fn read(v: &mut Vcpu, number: u32) -> Helped {
    if !exists(v, number) {
        return Err(unknown(v, "read", number));
    }
    let s = &v.state;
    let c = &v.cold;
    let value = match number {
        msr::TSC => v.tsc(),
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            let index = v.index;
            return v.with_devices(|p| p.apic_msr_read(index, number)).map_err(|()| GP0);
        }
        msr::PLATFORM_ID | P5_MC_ADDR | P5_MC_TYPE | EBL_CR_POWERON => 0,
        SMI_COUNT => u64::from(v.smm.count),
        msr::SMBASE if v.smm.is_active() && v.model.vmx.has_misc(vmx_msr::misc::READ_SMBASE) => u64::from(v.smm.base),
        msr::FEATURE_CONTROL => v.model.vmx.feature_control(),
        vmx_msr::FIRST..=vmx_msr::LAST => return v.model.vmx.msr(number).ok_or(GP0),
        msr::TSC_ADJUST if v.model.has(Bit::TscAdjust) => c.tsc_adjust,
        msr::SPEC_CTRL if v.model.has(Bit::SpecCtrl) => c.spec_ctrl,
        msr::BIOS_SIGN_ID => c.bios_sign_id,
        // Maximum non-turbo ratio in units of 100 MHz.
        msr::PLATFORM_INFO => u64::from(BASE_MHZ / 100) << 8,
        msr::ARCH_CAPABILITIES if v.model.has(Bit::ArchCapabilities) => ARCH_CAPABILITIES,
        MISC_FEATURES_ENABLES => c.misc_features,
        msr::SYSENTER_CS => s.msrs.sysenter_cs,
        msr::SYSENTER_ESP => s.msrs.sysenter_esp,
        msr::SYSENTER_EIP => s.msrs.sysenter_eip,
        msr::MCG_CAP => 0,
        msr::MCG_STATUS => c.mcg_status,
        msr::MISC_ENABLE => s.msrs.misc_enable,
        msr::DEBUGCTL => s.msrs.debugctl,
        msr::PAT => s.msrs.pat,
        msr::MTRRCAP => MTRRCAP,
        msr::MTRR_DEF_TYPE => c.mtrr_def_type,
        msr::MTRR_PHYSBASE0..=MTRR_PHYS_LAST => c.mtrr_variable[(number - msr::MTRR_PHYSBASE0) as usize],
        msr::XSS if v.model.has(Bit::Xsaves) => s.xss,
        msr::EFER => s.efer,
        msr::STAR => s.msrs.star,
        msr::LSTAR => s.msrs.lstar,
        msr::CSTAR => s.msrs.cstar,
        msr::FMASK => s.msrs.fmask,
        msr::FS_BASE => s.seg[4].base,
        msr::GS_BASE => s.seg[5].base,
        msr::KERNEL_GS_BASE => s.msrs.kernel_gs_base,
        msr::TSC_AUX if v.model.has(Bit::Rdtscp) => s.msrs.tsc_aux,
        _ => match fixed_mtrr(number) {
            Some(i) => c.mtrr_fixed[i],
            None => return Err(unknown(v, "read", number)),
        },
    };
    Ok(value)
}

/// Writes an MSR; #GP(0) when there is none of that number, or the value is not one it can hold.
pub fn write(v: &mut Vcpu, number: u32, value: u64) -> Result<(), Trap> {
    if !exists(v, number) {
        return Err(unknown(v, "write", number));
    }
    let canonical = is_canonical_base(v, value);
    let require = |ok: bool| if ok { Ok(()) } else { Err(GP0) };
    match number {
        msr::TSC => {
            let delta = value.wrapping_sub(v.tsc());
            shift_tsc(v, delta);
        }
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            // IA32_APIC_BASE.EXTD is reserved where there is no x2APIC mode.
            require(number != msr::APIC_BASE || v.model.has(Bit::X2apic) || value & 1 << 10 == 0)?;
            require(number != msr::APIC_BASE || value >> v.model.phys_bits == 0)?;
            let index = v.index;
            v.with_devices(|p| p.apic_msr_write(index, number, value)).map_err(|()| GP0)?;
        }
        msr::TSC_ADJUST if v.model.has(Bit::TscAdjust) => {
            let delta = value.wrapping_sub(v.cold.tsc_adjust);
            shift_tsc(v, delta);
        }
        // Locked, as firmware leaves it.
        msr::FEATURE_CONTROL => return Err(GP0),
        vmx_msr::FIRST..=vmx_msr::LAST => return Err(GP0),
        msr::SPEC_CTRL if v.model.has(Bit::SpecCtrl) => {
            require(value & !SPEC_CTRL_MASK == 0)?;
            v.cold.spec_ctrl = value;
        }
        msr::PRED_CMD if v.model.has(Bit::SpecCtrl) => require(value & !1 == 0)?,
        msr::FLUSH_CMD if v.model.has(Bit::FlushL1d) => require(value & !1 == 0)?,
        msr::BIOS_SIGN_ID => v.cold.bios_sign_id = value,
        P5_MC_ADDR | P5_MC_TYPE | EBL_CR_POWERON => {}
        // CPUID faulting and ring-3 MWAIT are not offered.
        MISC_FEATURES_ENABLES => require(value == 0)?,
        msr::SYSENTER_CS => v.state.msrs.sysenter_cs = value & 0xffff_ffff,
        msr::SYSENTER_ESP => {
            require(canonical)?;
            v.state.msrs.sysenter_esp = value;
        }
        msr::SYSENTER_EIP => {
            require(canonical)?;
            v.state.msrs.sysenter_eip = value;
        }
        msr::MCG_STATUS => {
            require(value == 0)?;
            v.cold.mcg_status = 0;
        }
        msr::MISC_ENABLE => v.state.msrs.misc_enable = value & MISC_ENABLE_WRITABLE | 1 << 11 | 1 << 12,
        msr::DEBUGCTL => {
            require(value & !DEBUGCTL_DEFINED == 0)?;
            v.state.msrs.debugctl = value & 0b11;
        }
        msr::PAT => {
            require(are_memory_types(value, true))?;
            v.state.msrs.pat = value;
        }
        msr::MTRR_DEF_TYPE => {
            require(value & !0xcff == 0 && is_memory_type(value))?;
            v.cold.mtrr_def_type = value;
        }
        msr::MTRR_PHYSBASE0..=MTRR_PHYS_LAST => write_variable_mtrr(v, number, value)?,
        msr::XSS if v.model.has(Bit::Xsaves) => require(value == 0)?,
        msr::EFER => write_efer(v, value)?,
        msr::STAR => v.state.msrs.star = value,
        msr::LSTAR => {
            require(canonical)?;
            v.state.msrs.lstar = value;
        }
        msr::CSTAR => {
            require(canonical)?;
            v.state.msrs.cstar = value;
        }
        msr::FMASK => {
            require(value >> 32 == 0)?;
            v.state.msrs.fmask = value;
        }
        msr::FS_BASE | msr::GS_BASE => {
            require(canonical)?;
            v.state.seg[(number - msr::FS_BASE) as usize + 4].base = value;
        }
        msr::KERNEL_GS_BASE => {
            require(canonical)?;
            v.state.msrs.kernel_gs_base = value;
        }
        msr::TSC_AUX if v.model.has(Bit::Rdtscp) => {
            require(value >> 32 == 0)?;
            v.state.msrs.tsc_aux = value;
        }
        _ => match fixed_mtrr(number) {
            Some(i) => {
                require(are_memory_types(value, false))?;
                v.cold.mtrr_fixed[i] = value;
            }
            None => return Err(unknown(v, "write", number)),
        },
    }
    Ok(())
}

/// Whether CPUID shows what the MSR belongs to; the rest of them is decided where they are read and written.
fn exists(v: &Vcpu, number: u32) -> bool {
    let needs: &[Bit] = match number {
        msr::TSC => &[Bit::Tsc],
        msr::APIC_BASE => &[Bit::Apic],
        msr::X2APIC_FIRST..=msr::X2APIC_LAST => &[Bit::X2apic],
        msr::TSC_DEADLINE => &[Bit::TscDeadline],
        msr::SYSENTER_CS | msr::SYSENTER_ESP | msr::SYSENTER_EIP => &[Bit::Sep],
        msr::MCG_CAP | msr::MCG_STATUS => &[Bit::Mca],
        msr::PAT => &[Bit::Pat],
        msr::MTRRCAP | msr::MTRR_DEF_TYPE | msr::MTRR_PHYSBASE0..=MTRR_PHYS_LAST => &[Bit::Mtrr],
        msr::EFER => &[Bit::Syscall, Bit::Nx, Bit::Lm],
        msr::STAR => &[Bit::Syscall],
        msr::LSTAR | msr::CSTAR | msr::FMASK | msr::FS_BASE | msr::GS_BASE | msr::KERNEL_GS_BASE => &[Bit::Lm],
        n if fixed_mtrr(n).is_some() => &[Bit::Mtrr],
        _ => return true,
    };
    needs.iter().any(|bit| v.model.has(*bit))
}

/// Moves the TSC, and IA32_TSC_ADJUST with it (SDM Vol 3B, "IA32_TSC_ADJUST Support").
fn shift_tsc(v: &mut Vcpu, delta: u64) {
    v.cold.tsc_adjust = v.cold.tsc_adjust.wrapping_add(delta);
    let offset = v.state.msrs.tsc_offset.wrapping_add(delta);
    v.state.msrs.tsc_offset = offset;
    let index = v.index;
    v.with_devices(|p| p.set_tsc_offset(index, offset));
}

fn write_variable_mtrr(v: &mut Vcpu, number: u32, value: u64) -> Result<(), Trap> {
    let i = (number - msr::MTRR_PHYSBASE0) as usize;
    let too_wide = value >> v.model.phys_bits != 0;
    // Even: base and type. Odd: mask and valid bit.
    let reserved = if i & 1 == 0 { value & 0xf00 != 0 || !is_memory_type(value) } else { value & 0x7ff != 0 };
    if too_wide || reserved {
        return Err(GP0);
    }
    v.cold.mtrr_variable[i] = value;
    Ok(())
}

#[cold]
fn unknown(v: &mut Vcpu, what: &str, number: u32) -> Trap {
    v.cold.unknown_msr_accesses += 1;
    // The set is bounded, whatever a guest tries.
    if v.cold.unknown_msrs.len() < 4096 && v.cold.unknown_msrs.insert(number) && v.debug.has(DebugItem::Io) {
        v.trace.write(&format!("io: {what} of MSR {number:#x}, which does not exist\n"));
    }
    GP0
}
