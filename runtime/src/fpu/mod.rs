//! Floating-point state: the x87 helper, the save areas, MXCSR.
//!
//! Place: what translated code calls for x87 instructions and for whole-state saves; SSE arithmetic itself is IR
//! (`twofold_ir::vecop`). The cores ([`x87`], [`env`], [`area`]) are functions on `CpuState` and bytes; this file joins them to a
//! vCPU's memory. Invariant: nothing of the state changes before the instruction's last possible fault.

pub mod area;
pub mod env;
pub mod host;
pub mod mxcsr;
pub mod x87;

use twofold_arch::control::{cr0, cr4, rflags};
use twofold_arch::fpu::{area as form, fsw, mxcsr as mx, x87 as word};
use twofold_arch::{Exception, LinearAddr, TbFlags, Vector};

use crate::cpu::cpuid::Bit;
use crate::vcpu::{MemAs, Trap, Vcpu};

/// A helper's result.
type Helped = Result<u64, Trap>;

fn fault<T>(e: Exception) -> Result<T, Trap> {
    Err(Trap::Exception(e))
}

/// SS in encoding order.
const SS: u64 = 2;

/// `Helper::X87`: any x87 instruction. The result is the status word, for FNSTSW AX.
///
/// Deviations: with CR0.NE = 0 a pending exception is ignored instead of signalled through FERR#.
///
/// # Errors
/// #MF for a pending exception, and what the memory operand raises.
pub fn x87(v: &mut Vcpu, opcode: u64, la: u64, rip: u64, how: u64) -> Helped {
    let memory = how & word::MEMORY != 0;
    let Some(insn) = x87::decode(opcode as u16, memory) else { return fault(Exception::UD) };
    if insn.waits && v.state.fsw & fsw::ES != 0 && v.state.cr0 & cr0::NE != 0 {
        return fault(Exception::new(Vector::X87Fault));
    }
    let on_behalf = if how & word::SEGMENT == SS { MemAs::Stack } else { MemAs::Cpl };
    let at = LinearAddr(la);
    match insn.kind {
        x87::Kind::Nop => {}
        x87::Kind::Init => x87::init(&mut v.state),
        x87::Kind::ClearExceptions => x87::clear_exceptions(&mut v.state),
        x87::Kind::StoreStatus => {
            if memory {
                v.write(at, 2, v.state.fsw.into(), on_behalf)?;
            }
        }
        x87::Kind::StoreControl => v.write(at, 2, v.state.fcw.into(), on_behalf)?,
        x87::Kind::LoadControl => {
            let w = v.read(at, 2, on_behalf)? as u16;
            x87::load_control(&mut v.state, w);
        }
        x87::Kind::LoadEnv | x87::Kind::Restore => {
            let layout = layout(v, how);
            let (mut buf, n) = ([0; env::MAX_LEN], layout.len(insn.kind == x87::Kind::Restore));
            v.read_bytes(at, &mut buf[..n], on_behalf)?;
            env::load(&mut v.state, layout, &buf[..n]);
        }
        x87::Kind::StoreEnv | x87::Kind::Save => {
            let layout = layout(v, how);
            let n = layout.len(insn.kind == x87::Kind::Save);
            let buf = env::store(&v.state, layout);
            v.write_bytes(at, &buf[..n], on_behalf)?;
            if insn.kind == x87::Kind::Save { x87::init(&mut v.state) } else { x87::mask_all(&mut v.state) }
        }
        x87::Kind::Compute { bytes, stores } => {
            let mut operand = [0; 16];
            if memory && !stores {
                v.read_bytes(at, &mut operand[..bytes], on_behalf)?;
            }
            let Some(done) = x87::compute(&v.state, opcode as u16, memory, &mut operand) else {
                return fault(Exception::UD);
            };
            if stores && done.stored {
                v.write_bytes(at, &operand[..bytes], on_behalf)?;
            }
            done.commit(&mut v.state);
            note_pointers(v, opcode, la, rip, how);
        }
    }
    Ok(v.state.fsw.into())
}

/// Records the last instruction's opcode and pointers. Selectors read as 0 on models that say so.
fn note_pointers(v: &mut Vcpu, opcode: u64, la: u64, rip: u64, how: u64) {
    let selectors = !v.model.has(Bit::ZeroFcsFds);
    let s = &mut v.state;
    s.fop = opcode as u16 & 0x7ff;
    s.fip = rip;
    s.fcs = if selectors { s.seg[1].selector } else { 0 };
    if how & word::MEMORY != 0 {
        let seg = s.seg[(how & word::SEGMENT) as usize];
        s.fdp = la.wrapping_sub(seg.base);
        s.fds = if selectors { seg.selector } else { 0 };
    }
}

/// The layout of an environment in memory: protected or real mode (and virtual-8086), 16 or 32 bits.
fn layout(v: &Vcpu, how: u64) -> env::Layout {
    let s = &v.state;
    let protected = s.cr0 & cr0::PE != 0 && s.rflags_sys & rflags::VM == 0;
    env::Layout { protected, bits16: how & word::OPERAND16 != 0 }
}

/// `Helper::Ldmxcsr`.
///
/// # Errors
/// #GP(0) for a reserved bit.
pub fn ldmxcsr(v: &mut Vcpu, value: u64) -> Helped {
    if value as u32 & !mx::DEFINED != 0 {
        return fault(Exception::GP0);
    }
    mxcsr::load(&mut v.state, value as u32);
    Ok(0)
}

/// `Helper::Stmxcsr`: MXCSR with the flags that guest code has raised so far.
pub fn stmxcsr(v: &mut Vcpu) -> u64 {
    mxcsr::collect(&mut v.state);
    v.state.mxcsr.into()
}

/// `Helper::SseCheck`: before (0) and after (1) an SSE instruction under unmasked exceptions.
///
/// # Errors
/// #XM, or #UD with CR4.OSXMMEXCPT = 0, when the instruction raised an unmasked exception.
pub fn sse_check(v: &mut Vcpu, phase: u64) -> Helped {
    if phase == 0 {
        mxcsr::begin_checked(&mut v.state);
        return Ok(0);
    }
    if !mxcsr::end_checked(&mut v.state) {
        return Ok(0);
    }
    let os = v.state.cr4 & cr4::OSXMMEXCPT != 0;
    fault(if os { Exception::new(Vector::SimdFault) } else { Exception::UD })
}

fn is64(v: &Vcpu) -> bool {
    TbFlags(v.state.tb_flags).is64()
}

fn on_behalf_of(how: u64) -> MemAs {
    if how & form::STACK != 0 { MemAs::Stack } else { MemAs::Cpl }
}

/// The checks of XSAVE, XRSTOR and their kin before memory is touched; the components asked for.
fn extended_checks(v: &Vcpu, la: u64, how: u64) -> Result<u64, Trap> {
    let s = &v.state;
    if s.cr4 & cr4::OSXSAVE == 0 {
        return fault(Exception::UD);
    }
    if s.cr0 & cr0::TS != 0 {
        return fault(Exception::NM);
    }
    let supervisor = how & form::KIND == form::XSAVES;
    if supervisor && s.cpl != 0 || la & 63 != 0 {
        return fault(Exception::GP0);
    }
    let enabled = if supervisor { s.xcr0 | s.xss } else { s.xcr0 };
    Ok(enabled & (s.gpr[2] << 32 | s.gpr[0] & 0xffff_ffff))
}

/// `Helper::SaveState`: FXSAVE, XSAVE, XSAVEOPT, XSAVEC, XSAVES (see [`twofold_arch::fpu::area`]).
///
/// # Errors
/// #UD, #NM or #GP by the instruction's rules, and what the stores raise; a store that faults after others leaves those done.
pub fn save_state(v: &mut Vcpu, la: u64, how: u64) -> Helped {
    mxcsr::collect(&mut v.state);
    let view = area::View { wide: how & form::WIDE != 0, xmm16: is64(v) };
    let behalf = on_behalf_of(how);
    let write = |v: &mut Vcpu, at: usize, bytes: &[u8]| v.write_bytes(LinearAddr(la.wrapping_add(at as u64)), bytes, behalf);
    if how & form::KIND == form::FXSAVE {
        if la & 15 != 0 {
            return fault(Exception::GP0);
        }
        let image = area::legacy(&v.state, view);
        let end = if v.state.cr4 & cr4::OSFXSR != 0 { view.legacy_len() } else { area::XMM };
        write(v, 0, &image[..end])?;
        return Ok(0);
    }
    let wanted = extended_checks(v, la, how)?;
    let compact = matches!(how & form::KIND, form::XSAVEC | form::XSAVES);
    let old_bv = if compact { 0 } else { v.read(LinearAddr(la.wrapping_add(512)), 8, behalf)? };
    let plan = area::plan_save(&v.state, how & form::KIND, wanted, old_bv);
    let image = area::legacy(&v.state, view);
    for range in area::legacy_ranges(plan.written, plan.mxcsr, view) {
        write(v, range.start, &image[range])?;
    }
    if plan.written & area::AVX != 0 {
        let high = area::avx(&v.state);
        write(v, area::EXTENDED, &high[..view.avx_len()])?;
    }
    let mut header = [0; 16];
    header[..8].copy_from_slice(&plan.xstate_bv.to_le_bytes());
    header[8..].copy_from_slice(&plan.xcomp_bv.to_le_bytes());
    write(v, 512, &header[..if compact { 16 } else { 8 }])?;
    Ok(0)
}

/// `Helper::RestoreState`: FXRSTOR, XRSTOR, XRSTORS.
///
/// # Errors
/// #UD, #NM or #GP by the instruction's rules, and what the loads raise.
pub fn restore_state(v: &mut Vcpu, la: u64, how: u64) -> Helped {
    let view = area::View { wide: how & form::WIDE != 0, xmm16: is64(v) };
    let behalf = on_behalf_of(how);
    let mut legacy = [0; 512];
    let n = view.legacy_len();
    if how & form::KIND == form::FXSAVE {
        if la & 15 != 0 {
            return fault(Exception::GP0);
        }
        v.read_bytes(LinearAddr(la), &mut legacy[..n], behalf)?;
        let sse = v.state.cr4 & cr4::OSFXSR != 0;
        if sse && !area::valid_mxcsr(&legacy) {
            return fault(Exception::GP0);
        }
        area::load_x87(&mut v.state, &legacy, view);
        if sse {
            area::load_xmm(&mut v.state, &legacy, view);
            mxcsr::load(&mut v.state, area::mxcsr_of(&legacy));
        }
        return Ok(0);
    }
    let wanted = extended_checks(v, la, how)?;
    let mut header = [0; 64];
    v.read_bytes(LinearAddr(la.wrapping_add(512)), &mut header, behalf)?;
    let enabled = if how & form::KIND == form::XSAVES { v.state.xcr0 | v.state.xss } else { v.state.xcr0 };
    let plan = match area::plan_restore(&header, how & form::KIND, wanted, enabled) {
        Some(p) => p,
        None => return fault(Exception::GP0),
    };
    v.read_bytes(LinearAddr(la), &mut legacy[..n], behalf)?;
    if plan.mxcsr && !area::valid_mxcsr(&legacy) {
        return fault(Exception::GP0);
    }
    let mut high = [0; 256];
    if plan.load & area::AVX != 0 {
        v.read_bytes(LinearAddr(la.wrapping_add(area::EXTENDED as u64)), &mut high[..view.avx_len()], behalf)?;
    }
    mxcsr::collect(&mut v.state);
    area::restore(&mut v.state, &plan, &legacy, &high, view);
    let new = v.state.mxcsr;
    mxcsr::load(&mut v.state, new);
    Ok(0)
}
