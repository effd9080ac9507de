//! Floating-point vector ops: by the host's own instruction where that is exact, else portably.

use crate::vecop::{VecOp, fp_portable};

/// Computes a floating-point op under the ambient MXCSR.
pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    if let Some(r) = crate::vecop::host::fp(op, imm, a, b, c) {
        return r;
    }
    let mxcsr = host_mxcsr();
    let (r, flags) = fp_portable::eval(op, imm, a, b, c, mxcsr);
    if flags & !mxcsr != 0 {
        set_host_mxcsr(mxcsr | flags);
    }
    r
}

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
thread_local! {
    /// In the place of a host's register.
    static MXCSR: core::cell::Cell<u32> = const { core::cell::Cell::new(0x1f80) };
}

/// The host's MXCSR; on hosts without one, this thread's.
#[must_use]
pub fn host_mxcsr() -> u32 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    return crate::vecop::host::mxcsr();
    #[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
    MXCSR.get()
}

/// Makes the host's MXCSR (rounding, DAZ, FTZ, sticky flags) what `guest` says, with all exceptions masked. The caller
/// puts the former value back before any Rust floating point runs. On hosts without one, it is this thread's.
pub fn set_host_mxcsr(guest: u32) {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    crate::vecop::host::set_mxcsr(guest);
    #[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
    MXCSR.set(guest & 0xffff | 0x1f80);
}
