//! The helper table: what translated code calls by number, as safe functions behind `extern "C"` thunks.
//!
//! Place in the pipeline: the boundary between translated code and the runtime. A helper's `Err` becomes a record in
//! `state.fault`, which the caller looks at; nothing unwinds and nothing panics. The evaluator comes the same way, or through
//! [`call_helper`].
#![allow(unsafe_code)] // thunks make a `&mut Vcpu` of the address in the state they are called with

use twofold_arch::CpuState;
use twofold_arch::fpu::X87Op;
use twofold_backend::HelperFn;
use twofold_ir::Helper;

use super::{Helped, control, far, interrupt, msr, ops, segments, smm, string};
use crate::fpu;
use crate::vcpu::Vcpu;

/// Number of helpers.
const COUNT: usize = Helper::ALL.len();

macro_rules! table {
    ($v:ident, $a:ident, $b:ident, $c:ident, $d:ident; $($name:ident => $body:expr,)*) => {
        #[inline(always)]
        fn run($v: &mut Vcpu, helper: Helper, [$a, $b, $c, $d]: [u64; 4]) -> Helped {
            match helper {
                $(Helper::$name => $body,)*
            }
        }

        /// The thunks, indexed by `Helper as usize`.
        pub const HELPERS: &[HelperFn; COUNT] = &{
            let mut table: [HelperFn; COUNT] = [thunk::<0>; COUNT];
            $(table[Helper::$name as usize] = thunk::<{ Helper::$name as usize }>;)*
            table
        };
    };
}

table! { v, a, b, c, d;
    SegAddr => segments::seg_addr(&v.state, a as usize, b, c as u32 & 0xff, c >> 8 & 1 != 0),
    CheckTarget => segments::check_target(&v.state, a),
    AlignCheck => ops::align_check(a, b),
    EnterRegion => Ok(u64::from(crate::exec::region::enter(v, a as u32))),
    DivideWide => Ok(ops::divide_wide(a, b, c)),
    RotateCarry => ops::rotate_carry(v, a, b, c),
    Bcd => ops::bcd(v, a, b),
    Crc32 => Ok(ops::crc32(a, b, c)),
    Pdep => Ok(ops::pdep(a, b)),
    Pext => Ok(ops::pext(a, b)),
    Cmpxchg8b => ops::cmpxchg8b(v, a),
    Cmpxchg16b => ops::cmpxchg16b(v, a),
    Rdrand => ops::random(v, a, false),
    Rdseed => ops::random(v, a, true),
    StringOp => string::string_op(v, a),
    StringIo => string::string_io(v, a),
    Enter => ops::enter(v, a, b, c),
    Bound => ops::bound(v, a, b, c),
    In => ops::port_in(v, a, b),
    Out => ops::port_out(v, a, b, c),
    Popf => ops::popf(v, a, b),
    Pushf => ops::pushf(v, a),
    Cli => ops::cli(v),
    Sti => ops::sti(v, a != 0),
    Hlt => ops::hlt(v),
    Pause => ops::pause(v),
    SoftInt => onward(v, |v| interrupt::soft_int(v, a as u8, b, c)),
    Iret => onward(v, |v| far::iret(v, a, b)),
    LoadSeg => segments::load_seg(v, a as usize, b as u16).map(|()| 0),
    FarJmp => far::far_jmp(v, a as u16, b, c, d),
    FarCall => far::far_call(v, a as u16, b, c, d),
    FarRet => far::far_ret(v, a, b),
    Syscall => onward(v, |v| far::syscall(v, a)),
    Sysret => onward(v, |v| far::sysret(v, a)),
    Sysenter => onward(v, far::sysenter),
    Sysexit => onward(v, |v| far::sysexit(v, a)),
    Swapgs => far::swapgs(v),
    FsGsBase => far::fs_gs_base(v, a, b),
    LoadTable => ops::load_table(v, a, b != 0, c),
    StoreTable => ops::store_table(v, a, b != 0, c),
    Lldt => segments::lldt(v, a as u16).map(|()| 0),
    Ltr => segments::ltr(v, a as u16).map(|()| 0),
    StoreSystem => ops::store_system(v, a),
    ProbeSelector => segments::probe_selector(v, a as u16, b),
    ReadCr => control::read_cr(v, a),
    WriteCr => control::write_cr(v, a, b),
    Lmsw => control::lmsw(v, a, b),
    Clts => control::clts(v),
    ReadDr => ops::read_dr(v, a),
    WriteDr => ops::write_dr(v, a, b),
    Rdmsr => msr::rdmsr(v),
    Wrmsr => msr::wrmsr(v),
    Rdtsc => ops::rdtsc(v),
    Rdtscp => ops::rdtscp(v),
    Rdpid => ops::rdpid(v),
    Rdpmc => ops::rdpmc(v),
    Cpuid => ops::cpuid(v),
    Xgetbv => control::xgetbv(v),
    Xsetbv => control::xsetbv(v),
    Rdpkru => control::rdpkru(v),
    Wrpkru => control::wrpkru(v),
    Invlpg => control::invlpg(v, a),
    Invpcid => control::invpcid(v, a, b),
    CacheControl => ops::cache_control(v, a),
    Monitor => ops::monitor(v, a),
    Mwait => ops::mwait(v),
    SetAc => ops::set_ac(v, a != 0),
    Vmx => crate::vmx::instructions::vmx(v, a, b, c, d),
    Rsm => smm::rsm(v),
    X87 => fpu::x87(v, a, b, c, d),
    X87Ready => {
        fpu::host::load(&mut v.state);
        Ok(0)
    },
    X87Do => Ok(fpu::host::execute(&mut v.state, X87Op(a as u16), b, c)),
    X87Park => {
        fpu::host::park(&mut v.state);
        Ok(0)
    },
    X87LoadControl => Ok(fpu::x87_load_control(v, a)),
    SaveState => fpu::save_state(v, a, b),
    RestoreState => fpu::restore_state(v, a, b),
    Ldmxcsr => fpu::ldmxcsr(v, a),
    Stmxcsr => Ok(fpu::stmxcsr(v)),
    MaskedMove => fpu::vector::masked_move(v, a, b),
    Gather => fpu::vector::gather(v, a, b),
    SseCheck => fpu::sse_check(v, a),
}

/// A transfer that translated code may follow by itself.
#[inline]
fn onward(v: &mut Vcpu, transfer: impl FnOnce(&mut Vcpu) -> Helped) -> Helped {
    let done = transfer(v)?;
    crate::exec::dispatch::pass_on(v);
    Ok(done)
}

/// Calls a helper; the safe way in.
///
/// # Errors
/// What the helper raised.
pub fn call_helper(v: &mut Vcpu, helper: Helper, args: [u64; 4]) -> Helped {
    run(v, helper, args)
}

/// Helper number `N` as translated code calls it.
///
/// # Safety
/// `state.vcpu` holds the (exposed) address of the live `Vcpu` that owns `state`, and nobody uses that `Vcpu` during the call.
unsafe extern "C" fn thunk<const N: usize>(state: *mut CpuState, a: u64, b: u64, c: u64, d: u64) -> u64 {
    // SAFETY: says the caller; `vcpu` was exposed when it was stored.
    let v = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Vcpu>((*state).vcpu as usize) };
    v.in_helper = true;
    let result = run(v, Helper::ALL[N], [a, b, c, d]);
    v.in_helper = false;
    match result {
        Ok(value) => value,
        Err(trap) => {
            trap.record(&mut v.state.fault);
            0
        }
    }
}

/// Calls a thunk as translated code does.
#[cfg(test)]
pub(super) fn call_thunk(helper: Helper, state: *mut CpuState, [a, b, c, d]: [u64; 4]) -> u64 {
    // SAFETY: the tests pass the state of a live vCPU.
    unsafe { HELPERS[helper as usize](state, a, b, c, d) }
}
