//! MXCSR between guest state and host register.
//!
//! While guest code runs, the host's MXCSR has the guest's rounding, DAZ, FTZ and flags, with all exceptions masked; new
//! flags collect there. `CpuState::mxcsr` has the guest's masks always, and its flags after [`collect`] or [`leave`].

use twofold_arch::CpuState;
use twofold_arch::fpu::mxcsr::{FLAGS, INIT, MASKS};
use twofold_ir::vecop::{host_mxcsr, set_host_mxcsr};

/// Before guest code runs.
pub fn enter(s: &CpuState) {
    set_host_mxcsr(s.mxcsr);
}

/// After guest code ran, before any floating point of our own.
pub fn leave(s: &mut CpuState) {
    collect(s);
    set_host_mxcsr(INIT);
}

/// Brings the flags raised so far into the state. Between [`enter`] and [`leave`].
pub fn collect(s: &mut CpuState) {
    s.mxcsr |= host_mxcsr() & FLAGS;
}

/// Gives the guest a new MXCSR. Between [`enter`] and [`leave`].
pub fn load(s: &mut CpuState, value: u32) {
    s.mxcsr = value;
    set_host_mxcsr(value);
}

/// Before an instruction whose exceptions are not all masked: clears the flags in the host, so that the new ones show.
pub fn begin_checked(s: &mut CpuState) {
    collect(s);
    set_host_mxcsr(s.mxcsr & !FLAGS);
}

/// After it: whether it raised an unmasked exception. The flags are in the state then; an unmasked exception that is found
/// before the computation (invalid, denormal, divide by zero) keeps those found after it from being reported.
///
/// Deviations, since the host runs masked: an exact tiny result with underflow unmasked goes unnoticed, PE may be set beside an
/// unmasked overflow, and the dot products report the flags of all their steps.
#[must_use]
pub fn end_checked(s: &mut CpuState) -> bool {
    const BEFORE: u32 = 0b111;
    let new = host_mxcsr() & FLAGS;
    let unmasked = new & !(s.mxcsr >> MASKS.trailing_zeros());
    s.mxcsr |= if unmasked & BEFORE != 0 { new & BEFORE } else { new };
    set_host_mxcsr(s.mxcsr);
    unmasked != 0
}
