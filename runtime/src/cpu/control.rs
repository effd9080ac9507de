//! Control registers, EFER, XCR0, PKRU and invalidation: their checks, and exactly the TLB effects they have.
//!
//! Place in the pipeline: helpers of MOV to and from CRn, LMSW, CLTS, XSETBV, INVLPG, INVPCID and WRPKRU; `msr` calls
//! [`write_efer`]. Invariant: after every change that paging depends on, `space`, the mmu's current context and the views in
//! the state agree.

use twofold_arch::control::{cr0, cr4, efer, rflags, xcr0};
use twofold_arch::segment::attr;
use twofold_arch::vmx::ExitReason;
use twofold_arch::{LinearAddr, Segment};
use twofold_mmu::{AddressSpace, PagingMode, PdpteError};

use super::Helped;
use super::cpuid::Bit;
use super::mode::{TR, is_64bit, is_canonical, is_canonical_base, is_long, refresh_space};
use super::segments::{GP0, UD};
use crate::vcpu::{MemAs, Trap, Vcpu};
use crate::vmx::{self, intercept};

/// Bit 63 of a value moved to CR3: do not invalidate.
const CR3_NO_INVALIDATE: u64 = 1 << 63;

/// Helpers for CPL 0 only check again what the front end has checked.
fn privileged(v: &Vcpu) -> Result<(), Trap> {
    if v.state.cpl == 0 { Ok(()) } else { Err(GP0) }
}

// ---- reads ------------------------------------------------------------------------------------------------------------

/// MOV from CRn.
pub fn read_cr(v: &mut Vcpu, number: u64) -> Helped {
    privileged(v)?;
    if v.vmx.non_root {
        intercept::read_cr(v, number)?;
        match number {
            0 => return Ok(intercept::visible_cr0(v)),
            4 => return Ok(intercept::visible_cr4(v)),
            8 if let Some(value) = vmx::apic::read_cr8(v) => return Ok(value),
            _ => {}
        }
    }
    let s = &v.state;
    match number {
        0 => Ok(s.cr0),
        2 => Ok(s.cr2),
        3 => Ok(s.cr3),
        4 => Ok(s.cr4),
        8 => {
            let value = v.platform().cr8(v.index);
            v.state.cr8 = value;
            Ok(value)
        }
        _ => Err(UD),
    }
}

// ---- writes -----------------------------------------------------------------------------------------------------------

/// MOV to CRn (SDM Vol 2B, "MOV—Move to/from Control Registers").
pub fn write_cr(v: &mut Vcpu, number: u64, value: u64) -> Helped {
    privileged(v)?;
    let value = if v.vmx.non_root { intercept::write_cr(v, number, value)? } else { value };
    match number {
        0 => write_cr0(v, value)?,
        2 => v.state.cr2 = value,
        3 => write_cr3(v, value)?,
        4 => write_cr4(v, value)?,
        8 if value & !15 == 0 && v.vmx.non_root && vmx::apic::write_cr8(v, value) => {}
        8 if value & !15 == 0 => {
            v.state.cr8 = value;
            let index = v.index;
            v.with_devices(|p| p.set_cr8(index, value));
        }
        8 => return Err(GP0),
        _ => return Err(UD),
    }
    Ok(0)
}

/// The PDPTE registers from the table that `cr3` points to; #GP(0) for reserved bits.
fn read_pdptes(v: &mut Vcpu, cr3: u64) -> Result<[u64; 4], Trap> {
    let space = v.space;
    match v.mmu.load_pdptes(&space, cr3) {
        Ok(pdptes) => Ok(pdptes),
        Err(PdpteError::Reserved { .. }) => Err(GP0),
        Err(PdpteError::Ept(fault)) => Err(vmx::ept_exit(v, &fault)),
    }
}

/// Stores new values of the registers that paging depends on, and lets the mmu drop what that invalidates.
fn set_controls(v: &mut Vcpu, new: Controls) {
    let old: AddressSpace = v.space;
    v.state.cr0 = new.cr0;
    v.state.cr4 = new.cr4;
    v.state.efer = new.efer;
    if let Some(pdptes) = new.pdptes {
        v.state.pdpte = pdptes;
    }
    refresh_space(v);
    if old != v.space {
        let view = v.mmu.controls_changed(&old, &v.space);
        view.store(&mut v.state);
    }
}

struct Controls {
    cr0: u64,
    cr4: u64,
    efer: u64,
    pdptes: Option<[u64; 4]>,
}

/// MOV to CR0.
pub fn write_cr0(v: &mut Vcpu, value: u64) -> Result<(), Trap> {
    if value >> 32 != 0 {
        return Err(GP0);
    }
    let s = &v.state;
    let value = value & cr0::DEFINED | cr0::ET;
    let has = |bit: u64| value & bit != 0;
    if v.vmx.vmxon.is_some() && !value & intercept::cr0_must(v) != 0 {
        return Err(GP0);
    }
    if (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return Err(GP0);
    }
    if !has(cr0::WP) && s.cr4 & cr4::CET != 0 {
        return Err(GP0);
    }
    let (was_paging, paging) = (s.cr0 & cr0::PG != 0, has(cr0::PG));
    let mut new_efer = s.efer;
    if paging && !was_paging && s.efer & efer::LME != 0 {
        let tss16 = s.seg[TR].attr & (attr::TYPE & !2) == 1;
        if s.cr4 & cr4::PAE == 0 || s.seg[1].attr & attr::L != 0 || tss16 {
            return Err(GP0);
        }
        new_efer |= efer::LMA;
    }
    if !paging && was_paging {
        if is_64bit(s) || s.cr4 & cr4::PCIDE != 0 {
            return Err(GP0);
        }
        new_efer &= !efer::LMA;
    }
    let mode = PagingMode::from_registers(value, s.cr4, new_efer);
    let reload = (s.cr0 ^ value) & (cr0::PG | cr0::CD | cr0::NW) != 0;
    let pdptes = if mode == PagingMode::Pae && reload { Some(read_pdptes(v, v.state.cr3)?) } else { None };
    let left_protected = v.state.cr0 & cr0::PE != 0 && value & cr0::PE == 0;
    let controls = Controls { cr0: value, cr4: v.state.cr4, efer: new_efer, pdptes };
    set_controls(v, controls);
    if left_protected {
        v.state.cpl = 0;
    }
    Ok(())
}

/// MOV to CR3.
pub fn write_cr3(v: &mut Vcpu, value: u64) -> Result<(), Trap> {
    let s = &v.state;
    let long = is_long(s);
    let pcide = s.cr4 & cr4::PCIDE != 0;
    let mut value = value;
    let mut keep = false;
    if long {
        if pcide {
            keep = value & CR3_NO_INVALIDATE != 0;
            value &= !CR3_NO_INVALIDATE;
        }
        if value >> v.model.phys_bits != 0 {
            return Err(GP0);
        }
    }
    if v.space.mode == PagingMode::Pae {
        v.state.pdpte = read_pdptes(v, value)?;
    }
    v.state.cr3 = value;
    refresh_space(v);
    let view = v.mmu.mov_cr3(&v.space, keep);
    view.store(&mut v.state);
    Ok(())
}

/// CR3 of a task switch: legacy modes only. A reserved bit in a PDPTE leaves the old registers.
pub(super) fn switch_cr3(v: &mut Vcpu, value: u64) {
    // The SDM raises #GP in the new task's context for bad PDPTEs; the address space then stays the old one.
    let _ = write_cr3(v, value);
}

/// MOV to CR4.
pub fn write_cr4(v: &mut Vcpu, value: u64) -> Result<(), Trap> {
    let no_vmx = if v.smm.is_active() { cr4::VMXE } else { 0 };
    if value & !(v.model.cr4_mask() & !no_vmx) != 0 || (v.vmx.vmxon.is_some() && !value & intercept::cr4_must() != 0) {
        return Err(GP0);
    }
    let s = &v.state;
    let changed = s.cr4 ^ value;
    if is_long(s) && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
        return Err(GP0);
    }
    if changed & value & cr4::PCIDE != 0 && (!is_long(s) || s.cr3 & 0xfff != 0) {
        return Err(GP0);
    }
    let mode = PagingMode::from_registers(s.cr0, value, s.efer);
    let reload = changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0;
    let pdptes = if mode == PagingMode::Pae && reload { Some(read_pdptes(v, s.cr3)?) } else { None };
    let controls = Controls { cr0: v.state.cr0, cr4: value, efer: v.state.efer, pdptes };
    set_controls(v, controls);
    Ok(())
}

/// WRMSR to IA32_EFER.
pub fn write_efer(v: &mut Vcpu, value: u64) -> Result<(), Trap> {
    let mut mask = efer::LMA;
    for (bit, feature) in [(efer::SCE, Bit::Syscall), (efer::LME, Bit::Lm), (efer::NXE, Bit::Nx)] {
        if v.model.has(feature) {
            mask |= bit;
        }
    }
    let s = &v.state;
    if value & !mask != 0 || ((s.efer ^ value) & efer::LME != 0 && s.cr0 & cr0::PG != 0) {
        return Err(GP0);
    }
    // LMA is the processor's to say.
    let value = value & !efer::LMA | s.efer & efer::LMA;
    let controls = Controls { cr0: s.cr0, cr4: s.cr4, efer: value, pdptes: None };
    set_controls(v, controls);
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set, not cleared. `la` is where its operand is, if in memory.
pub fn lmsw(v: &mut Vcpu, value: u64, la: u64) -> Helped {
    privileged(v)?;
    let value = if v.vmx.non_root { intercept::lmsw(v, value, la)? } else { value };
    let keep_pe = v.state.cr0 & cr0::PE;
    let value = v.state.cr0 & !0xf | value & 0xf | keep_pe;
    write_cr0(v, value)?;
    Ok(0)
}

/// CLTS.
pub fn clts(v: &mut Vcpu) -> Helped {
    privileged(v)?;
    if v.vmx.non_root && !intercept::clts(v)? {
        return Ok(0);
    }
    v.state.cr0 &= !cr0::TS;
    Ok(0)
}

/// XGETBV: XCR0, or with ECX = 1 the components in use.
pub fn xgetbv(v: &mut Vcpu) -> Helped {
    crate::fpu::host::park(&mut v.state);
    let s = &v.state;
    if s.cr4 & cr4::OSXSAVE == 0 {
        return Err(UD);
    }
    match s.gpr[1] as u32 {
        0 => Ok(s.xcr0),
        1 if v.model.has(Bit::Xgetbv1) => {
            let mxcsr = if s.mxcsr != twofold_arch::fpu::mxcsr::INIT { xcr0::SSE } else { 0 };
            Ok(s.xcr0 & (crate::fpu::area::in_use(s) | mxcsr))
        }
        _ => Err(GP0),
    }
    .inspect(|value| set_edx_eax(v, *value))
}

/// XSETBV.
pub fn xsetbv(v: &mut Vcpu) -> Helped {
    if v.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(UD);
    }
    privileged(v)?;
    if v.vmx.non_root {
        intercept::always(v, ExitReason::Xsetbv)?;
    }
    let value = edx_eax(v);
    let avx_without_sse = value & (xcr0::SSE | xcr0::AVX) == xcr0::AVX;
    let bad = value & xcr0::X87 == 0 || value & !v.model.xcr0_mask() != 0 || avx_without_sse;
    if v.state.gpr[1] as u32 != 0 || bad {
        return Err(GP0);
    }
    v.state.xcr0 = value;
    Ok(0)
}

/// EDX:EAX.
pub(super) fn edx_eax(v: &Vcpu) -> u64 {
    v.state.gpr[2] << 32 | v.state.gpr[0] & 0xffff_ffff
}

/// Sets RDX and RAX to the halves of a value.
pub(super) fn set_edx_eax(v: &mut Vcpu, value: u64) {
    v.state.gpr[0] = value & 0xffff_ffff;
    v.state.gpr[2] = value >> 32;
}

// ---- protection keys --------------------------------------------------------------------------------------------------

/// RDPKRU.
pub fn rdpkru(v: &mut Vcpu) -> Helped {
    if v.state.cr4 & cr4::PKE == 0 {
        return Err(UD);
    }
    if v.state.gpr[1] as u32 != 0 {
        return Err(GP0);
    }
    let pkru = u64::from(v.state.pkru);
    set_edx_eax(v, pkru);
    Ok(pkru)
}

/// WRPKRU.
pub fn wrpkru(v: &mut Vcpu) -> Helped {
    if v.state.cr4 & cr4::PKE == 0 {
        return Err(UD);
    }
    if v.state.gpr[1] as u32 != 0 || v.state.gpr[2] as u32 != 0 {
        return Err(GP0);
    }
    let value = v.state.gpr[0] as u32;
    set_pkru(v, value);
    Ok(0)
}

/// Sets PKRU (WRPKRU, XRSTOR).
pub fn set_pkru(v: &mut Vcpu, value: u32) {
    if v.state.pkru != value {
        v.state.pkru = value;
        v.space.pkru = value;
        v.mmu.set_pkru(&v.space);
    }
}

// ---- invalidation -----------------------------------------------------------------------------------------------------

/// INVLPG. A non-canonical address does nothing.
pub fn invlpg(v: &mut Vcpu, la: u64) -> Helped {
    privileged(v)?;
    if v.vmx.non_root {
        intercept::invlpg(v, la)?;
    }
    if !is_long(&v.state) || is_canonical(&v.state, la) {
        v.mmu.invlpg(&v.space, LinearAddr(la));
    }
    Ok(0)
}

/// INVPCID (SDM Vol 2A).
pub fn invpcid(v: &mut Vcpu, kind: u64, la: u64) -> Helped {
    use twofold_mmu::Invpcid;
    privileged(v)?;
    if v.vmx.non_root {
        intercept::invpcid(v)?;
    }
    let low = v.read(LinearAddr(la), 8, MemAs::Cpl)?;
    let address = v.read(LinearAddr(la.wrapping_add(8)), 8, MemAs::Cpl)?;
    let pcid = low as u16 & 0xfff;
    let pcids = v.state.cr4 & cr4::PCIDE != 0;
    // The kinds that name no context look at the reserved bits of the descriptor all the same, not at its PCID.
    if low >> 12 != 0 || (kind <= 1 && !pcids && pcid != 0) {
        return Err(GP0);
    }
    let what = match kind {
        0 if is_canonical_base(v, address) => Invpcid::Address { pcid, la: LinearAddr(address) },
        1 => Invpcid::Context { pcid },
        2 => Invpcid::AllWithGlobals,
        3 => Invpcid::All,
        _ => return Err(GP0),
    };
    v.mmu.invpcid(&v.space, what);
    Ok(0)
}

// ---- reset ------------------------------------------------------------------------------------------------------------

/// INIT: like a reset, but MSRs, MTRRs, caches, the x87 and vector state, XCR0 and SMBASE stay (SDM Vol 3A, "Processor State After
/// Reset", the table's column for INIT).
pub fn init(v: &mut Vcpu) {
    crate::fpu::host::park(&mut v.state);
    let s = &v.state;
    let caches = s.cr0 & (cr0::CD | cr0::NW);
    let fpu = (s.fcw, s.fsw, s.ftw, s.fop, s.fip, s.fdp, s.fcs, s.fds);
    let (fpr, vec, mxcsr) = (s.fpr, s.vec, s.mxcsr);
    let (msrs, xcr0, xss, pkru) = (s.msrs, s.xcr0, s.xss, s.pkru);
    let cold = std::mem::take(&mut v.cold);
    let (base, count) = (v.smm.base, v.smm.count);
    reset(v);
    let s = &mut v.state;
    s.cr0 = s.cr0 & !(cr0::CD | cr0::NW) | caches;
    (s.fcw, s.fsw, s.ftw, s.fop, s.fip, s.fdp, s.fcs, s.fds) = fpu;
    (s.fpr, s.vec, s.mxcsr) = (fpr, vec, mxcsr);
    (s.msrs, s.xcr0, s.xss, s.pkru) = (msrs, xcr0, xss, pkru);
    v.cold = super::ColdState { monitor: None, ..cold };
    (v.smm.base, v.smm.count) = (base, count);
    refresh_space(v);
    let view = v.mmu.reset(&v.space);
    view.store(&mut v.state);
}

/// The registers after power-up or reset (SDM Vol 3A, "Processor State After Reset"); the platform resets its own part.
pub fn reset(v: &mut Vcpu) {
    let keep = (v.state.helpers, v.state.vcpu, v.state.retired, v.state.budget);
    let s = &mut v.state;
    s.gpr = [0; 16];
    s.gpr[2] = u64::from(v.model.signature());
    s.set_rflags(0);
    s.rip = 0xfff0;
    s.rip_base = 0;
    for i in 0..6 {
        s.seg[i] = Segment::real_mode(0, false);
    }
    s.seg[1] = Segment { base: 0xffff_0000, selector: 0xf000, ..Segment::real_mode(0, true) };
    s.seg[6] = Segment { limit: 0xffff, attr: attr::P | 2, ..Segment::default() };
    s.seg[TR] = Segment { limit: 0xffff, attr: attr::P | 11, ..Segment::default() };
    s.gdtr = twofold_arch::state::Table { base: 0, limit: 0xffff };
    s.idtr = twofold_arch::state::Table { base: 0, limit: 0xffff };
    s.cr0 = cr0::CD | cr0::NW | cr0::ET;
    (s.cr2, s.cr3, s.cr4, s.cr8) = (0, 0, 0, 0);
    (s.efer, s.xcr0, s.xss, s.pkru, s.cpl) = (0, 1, 0, 0, 0);
    s.dr = [0, 0, 0, 0, 0, 0, super::interrupt::dr6::FIXED1, 0x400];
    s.msrs = twofold_arch::state::Msrs {
        pat: super::msr::PAT_RESET,
        misc_enable: super::msr::MISC_ENABLE_RESET,
        ..Default::default()
    };
    (s.shadow, s.nmi_blocked, s.halted) = (0, 0, 0);
    s.pdpte = [0; 4];
    crate::fpu::host::park(s);
    (s.mxcsr, s.fcw, s.fsw, s.ftw) = (0x1f80, 0x40, 0, 0);
    s.vec = [[0; 4]; 16];
    s.fpr = [[0; 2]; 8];
    s.fault = Default::default();
    (s.helpers, s.vcpu, s.retired, s.budget) = keep;
    s.rflags_sys &= !rflags::RF;
    v.vmx = vmx::VmxState { stats: std::mem::take(&mut v.vmx.stats), ..vmx::VmxState::default() };
    v.smm = super::smm::Smm::default();
    v.cold = super::ColdState { cpus: v.cold.cpus, ..super::ColdState::new(v.cold.rng) };
    v.space = AddressSpace::reset(v.model.phys_bits);
    refresh_space(v);
    let view = v.mmu.reset(&v.space);
    view.store(&mut v.state);
}
