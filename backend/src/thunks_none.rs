//! The thunks on hosts that have none: translated code is unavailable and everything runs in the evaluator.
#![allow(unsafe_code)] // the same signatures as the real thing

use twofold_arch::{CodeSize, CpuState};

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

/// A thunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Thunk(u16);

impl Thunk {
    pub fn index(self) -> usize {
        self.0 as usize
    }
    pub fn from_index(i: usize) -> Self {
        Self(i as u16)
    }
    pub fn unlinked(_size: CodeSize) -> Self {
        Self(0)
    }
    pub fn name(self) -> String {
        String::from("none")
    }
}

pub(crate) fn image() -> (Vec<u8>, Vec<u32>) {
    (Vec::new(), Vec::new())
}
