//! Floating-point vector ops: by the host's own instruction where that is exact, else portably.

use crate::vecop::{VecOp, fp_portable};

/// Computes a floating-point op under the ambient MXCSR.
pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    if let Some(r) = crate::vecop::host::fp(op, imm, a, b, c) {
        return r;
    }
    fp_portable::eval(op, imm, a, b, c)
}

/// The host's MXCSR; the reset value on hosts without one.
#[must_use]
pub fn host_mxcsr() -> u32 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    return crate::vecop::host::mxcsr();
    #[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
    0x1f80
}

/// Makes the host's MXCSR (rounding, DAZ, FTZ, sticky flags) what `guest` says, with all exceptions masked. The caller
/// puts the former value back before any Rust floating point runs. Does nothing on hosts without one.
pub fn set_host_mxcsr(guest: u32) {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    crate::vecop::host::set_mxcsr(guest);
    #[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
    let _ = guest;
}
