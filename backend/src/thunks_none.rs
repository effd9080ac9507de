//! The thunks on hosts that have none: translated code is unavailable and everything runs in the evaluator.
#![allow(unsafe_code)] // the same signatures as the real thing

use twofold_arch::CpuState;

use crate::abi::Leave;

/// Whether this host runs translated code.
#[must_use]
pub fn available() -> bool {
    false
}

/// Never called: nothing can be installed.
///
/// # Safety
/// None needed; the real one has conditions.
pub unsafe fn enter(_state: *mut CpuState, _entry: u64) -> Leave {
    Leave::Dispatch
}

pub(crate) fn image() -> (Vec<u8>, Vec<u32>) {
    (Vec::new(), Vec::new())
}
