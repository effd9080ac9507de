//! Floating-point state: the x87 helper, the save areas, MXCSR.
//!
//! Place: what translated code calls for x87 instructions and for whole-state saves; SSE arithmetic itself is IR
//! (`twofold_ir::vecop`). The cores ([`x87`], [`env`], [`area`]) are functions on `CpuState` and bytes; this file joins them to a
//! [`Guest`]'s memory: a vCPU, or a test's. Invariant: nothing of the state changes before the instruction's last possible fault.

pub mod area;
pub mod env;
pub mod host;
pub mod mxcsr;
#[cfg(any(test, not(all(target_arch = "x86_64", not(portable_host)))))]
mod soft;
pub mod vector;
pub mod x87;

use twofold_arch::control::{cr0, cr4, rflags, xcr0};
use twofold_arch::fpu::{area as form, fcw, fsw, mxcsr as mx, x87 as word};
use twofold_arch::{CpuState, Exception, LinearAddr, TbFlags, Vector};

use crate::cpu::cpuid::Bit;
use crate::vcpu::{MemAs, Trap, Vcpu};

/// A helper's result.
type Helped = Result<u64, Trap>;

/// A processor whose state these helpers work on, with its memory.
pub trait Guest {
    /// The registers.
    fn state(&mut self) -> &mut CpuState;
    /// Fills `buf` from memory.
    ///
    /// # Errors
    /// The exception of the access.
    fn load(&mut self, la: u64, buf: &mut [u8], on_behalf: MemAs) -> Result<(), Trap>;
    /// Writes memory, all of `data` or nothing.
    ///
    /// # Errors
    /// The exception of the access.
    fn store(&mut self, la: u64, data: &[u8], on_behalf: MemAs) -> Result<(), Trap>;
    /// Whether `bytes` bytes could be written.
    ///
    /// # Errors
    /// The exception that a store would raise.
    fn check_store(&mut self, la: u64, bytes: u32, on_behalf: MemAs) -> Result<(), Trap>;
    /// PKRU changes.
    fn set_pkru(&mut self, value: u32) {
        self.state().pkru = value;
    }
    /// Whether the x87 code and data selectors always read as 0 (CPUID.7.EBX bit 13).
    fn zero_selectors(&self) -> bool;
}

impl Guest for Vcpu {
    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }
    fn load(&mut self, la: u64, buf: &mut [u8], on_behalf: MemAs) -> Result<(), Trap> {
        self.read_bytes(LinearAddr(la), buf, on_behalf)
    }
    fn store(&mut self, la: u64, data: &[u8], on_behalf: MemAs) -> Result<(), Trap> {
        self.write_bytes(LinearAddr(la), data, on_behalf)
    }
    fn check_store(&mut self, la: u64, bytes: u32, on_behalf: MemAs) -> Result<(), Trap> {
        let mode = TbFlags(self.state.tb_flags).mem_mode();
        self.resolve_write(LinearAddr(la), bytes, mode, on_behalf == MemAs::Stack).map(drop)
    }
    fn set_pkru(&mut self, value: u32) {
        crate::cpu::control::set_pkru(self, value);
    }
    fn zero_selectors(&self) -> bool {
        self.model.has(Bit::ZeroFcsFds)
    }
}

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
pub fn x87(v: &mut impl Guest, opcode: u64, la: u64, rip: u64, how: u64) -> Helped {
    host::park(v.state());
    let memory = how & word::MEMORY != 0;
    let Some(insn) = x87::decode(opcode as u16, memory) else { return fault(Exception::UD) };
    if insn.waits && v.state().fsw & fsw::ES != 0 && v.state().cr0 & cr0::NE != 0 {
        return fault(Exception::new(Vector::X87Fault));
    }
    let on_behalf = if how & word::SEGMENT == SS { MemAs::Stack } else { MemAs::Cpl };
    match insn.kind {
        x87::Kind::Nop => {}
        x87::Kind::Init => x87::init(v.state()),
        x87::Kind::ClearExceptions => x87::clear_exceptions(v.state()),
        x87::Kind::StoreStatus => {
            if memory {
                let w = v.state().fsw;
                v.store(la, &w.to_le_bytes(), on_behalf)?;
            }
        }
        x87::Kind::StoreControl => {
            let w = v.state().fcw;
            v.store(la, &w.to_le_bytes(), on_behalf)?;
        }
        x87::Kind::LoadControl => {
            let mut w = [0; 2];
            v.load(la, &mut w, on_behalf)?;
            x87::load_control(v.state(), u16::from_le_bytes(w));
        }
        x87::Kind::LoadEnv | x87::Kind::Restore => {
            let layout = layout(v, how);
            let (mut buf, n) = ([0; env::MAX_LEN], layout.len(insn.kind == x87::Kind::Restore));
            v.load(la, &mut buf[..n], on_behalf)?;
            env::load(v.state(), layout, &buf[..n]);
        }
        x87::Kind::StoreEnv | x87::Kind::Save => {
            let layout = layout(v, how);
            let n = layout.len(insn.kind == x87::Kind::Save);
            let buf = env::store(v.state(), layout);
            v.store(la, &buf[..n], on_behalf)?;
            if insn.kind == x87::Kind::Save { x87::init(v.state()) } else { x87::mask_all(v.state()) }
        }
        x87::Kind::Compute { bytes, stores } => {
            let mut operand = [0; 16];
            if memory && !stores {
                v.load(la, &mut operand[..bytes], on_behalf)?;
            }
            let done = x87::compute(v.state(), opcode as u16, memory, &mut operand);
            if stores && done.stored {
                v.store(la, &operand[..bytes], on_behalf)?;
            }
            done.commit(v.state());
            note_pointers(v, opcode, la, rip, how);
        }
    }
    Ok(v.state().fsw.into())
}

/// `Helper::X87LoadControl`: FLDCW. 1 when an exception is unmasked now.
pub fn x87_load_control(v: &mut impl Guest, value: u64) -> u64 {
    let value = value as u16;
    let masked = value & fcw::MASKS == fcw::MASKS;
    if masked && v.state().x87_live != 0 {
        v.state().fcw = value & fcw::DEFINED | fcw::FIXED1;
        host::set_control(v.state().fcw);
        return 0;
    }
    host::park(v.state());
    x87::load_control(v.state(), value);
    (!masked).into()
}

/// Before guest code runs.
pub fn enter(s: &CpuState) {
    mxcsr::enter(s);
}

/// After guest code ran, before any floating point of our own: all of the guest's state is in `s`.
pub fn leave(s: &mut CpuState) {
    mxcsr::leave(s);
    host::park(s);
}

/// Records the last instruction's opcode and pointers. Selectors read as 0 on models that say so.
fn note_pointers(v: &mut impl Guest, opcode: u64, la: u64, rip: u64, how: u64) {
    let selectors = !v.zero_selectors();
    let s = v.state();
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
fn layout(v: &mut impl Guest, how: u64) -> env::Layout {
    let s = v.state();
    let protected = s.cr0 & cr0::PE != 0 && s.rflags_sys & rflags::VM == 0;
    env::Layout { protected, bits16: how & word::OPERAND16 != 0 }
}

/// `Helper::Ldmxcsr`.
///
/// # Errors
/// #GP(0) for a reserved bit.
pub fn ldmxcsr(v: &mut impl Guest, value: u64) -> Helped {
    if value as u32 & !mx::DEFINED != 0 {
        return fault(Exception::GP0);
    }
    mxcsr::load(v.state(), value as u32);
    Ok(0)
}

/// `Helper::Stmxcsr`: MXCSR with the flags that guest code has raised so far.
pub fn stmxcsr(v: &mut impl Guest) -> u64 {
    mxcsr::collect(v.state());
    v.state().mxcsr.into()
}

/// `Helper::SseCheck`: before (0) and after (1) an SSE instruction under unmasked exceptions.
///
/// # Errors
/// #XM, or #UD with CR4.OSXMMEXCPT = 0, when the instruction raised an unmasked exception.
pub fn sse_check(v: &mut impl Guest, phase: u64) -> Helped {
    if phase == 0 {
        mxcsr::begin_checked(v.state());
        return Ok(0);
    }
    if !mxcsr::end_checked(v.state()) {
        return Ok(0);
    }
    let os = v.state().cr4 & cr4::OSXMMEXCPT != 0;
    fault(if os { Exception::new(Vector::SimdFault) } else { Exception::UD })
}

fn is64(v: &mut impl Guest) -> bool {
    TbFlags(v.state().tb_flags).is64()
}

fn on_behalf_of(how: u64) -> MemAs {
    if how & form::STACK != 0 { MemAs::Stack } else { MemAs::Cpl }
}

/// The checks of XSAVE, XRSTOR and their kin before memory is touched; the components asked for.
fn extended_checks(v: &mut impl Guest, la: u64, how: u64) -> Result<u64, Trap> {
    let s = v.state();
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
pub fn save_state(v: &mut impl Guest, la: u64, how: u64) -> Helped {
    host::park(v.state());
    mxcsr::collect(v.state());
    let view = area::View { wide: how & form::WIDE != 0, xmm16: is64(v) };
    let behalf = on_behalf_of(how);
    if how & form::KIND == form::FXSAVE {
        if la & 15 != 0 {
            return fault(Exception::GP0);
        }
        let image = area::legacy(v.state(), view);
        let end = if v.state().cr4 & cr4::OSFXSR != 0 { view.legacy_len() } else { area::XMM };
        v.store(la, &image[..end], behalf)?;
        return Ok(0);
    }
    let wanted = extended_checks(v, la, how)?;
    let compact = matches!(how & form::KIND, form::XSAVEC | form::XSAVES);
    let mut old_bv = [0; 8];
    if !compact {
        v.load(la.wrapping_add(512), &mut old_bv, behalf)?;
    }
    let plan = area::plan_save(v.state(), how & form::KIND, wanted, u64::from_le_bytes(old_bv));
    let image = area::legacy(v.state(), view);
    for range in area::legacy_ranges(plan.written, plan.mxcsr, view) {
        v.store(la.wrapping_add(range.start as u64), &image[range], behalf)?;
    }
    if plan.written & area::AVX != 0 {
        let high = area::avx(v.state());
        v.store(la.wrapping_add(area::EXTENDED as u64), &high[..view.avx_len()], behalf)?;
    }
    if plan.written & xcr0::PKRU != 0 {
        let pkru = u64::from(v.state().pkru).to_le_bytes();
        v.store(la.wrapping_add(area::pkru_offset(plan.xcomp_bv) as u64), &pkru, behalf)?;
    }
    let mut header = [0; 16];
    header[..8].copy_from_slice(&plan.xstate_bv.to_le_bytes());
    header[8..].copy_from_slice(&plan.xcomp_bv.to_le_bytes());
    v.store(la.wrapping_add(512), &header[..if compact { 16 } else { 8 }], behalf)?;
    Ok(0)
}

/// `Helper::RestoreState`: FXRSTOR, XRSTOR, XRSTORS.
///
/// # Errors
/// #UD, #NM or #GP by the instruction's rules, and what the loads raise.
pub fn restore_state(v: &mut impl Guest, la: u64, how: u64) -> Helped {
    host::park(v.state());
    let view = area::View { wide: how & form::WIDE != 0, xmm16: is64(v) };
    let behalf = on_behalf_of(how);
    let mut legacy = [0; 512];
    let n = view.legacy_len();
    if how & form::KIND == form::FXSAVE {
        if la & 15 != 0 {
            return fault(Exception::GP0);
        }
        v.load(la, &mut legacy[..n], behalf)?;
        let sse = v.state().cr4 & cr4::OSFXSR != 0;
        if sse && !area::valid_mxcsr(&legacy) {
            return fault(Exception::GP0);
        }
        area::load_x87(v.state(), &legacy, view);
        if sse {
            area::load_xmm(v.state(), &legacy, view);
            mxcsr::load(v.state(), area::mxcsr_of(&legacy));
        }
        return Ok(0);
    }
    let wanted = extended_checks(v, la, how)?;
    let mut header = [0; 64];
    v.load(la.wrapping_add(512), &mut header, behalf)?;
    let enabled = if how & form::KIND == form::XSAVES { v.state().xcr0 | v.state().xss } else { v.state().xcr0 };
    let plan = match area::plan_restore(&header, how & form::KIND, wanted, enabled) {
        Some(p) => p,
        None => return fault(Exception::GP0),
    };
    v.load(la, &mut legacy[..n], behalf)?;
    if plan.mxcsr && !area::valid_mxcsr(&legacy) {
        return fault(Exception::GP0);
    }
    let mut high = [0; 256];
    if plan.load & area::AVX != 0 {
        v.load(la.wrapping_add(area::EXTENDED as u64), &mut high[..view.avx_len()], behalf)?;
    }
    let mut pkru = [0; 4];
    if plan.load & xcr0::PKRU != 0 {
        v.load(la.wrapping_add(plan.pkru_at as u64), &mut pkru, behalf)?;
    }
    if (plan.load | plan.init) & xcr0::PKRU != 0 {
        v.set_pkru(u32::from_le_bytes(pkru));
    }
    mxcsr::collect(v.state());
    area::restore(v.state(), &plan, &legacy, &high, view);
    let new = v.state().mxcsr;
    mxcsr::load(v.state(), new);
    Ok(0)
}
