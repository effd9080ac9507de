//! What the processor does that is not in translated code: system instructions, far transfers, interrupts, registers.
//!
//! Place in the pipeline: called by the helpers that blocks call out to ([`table`]) and by the dispatcher
//! ([`deliver`], [`tb_flags`]). Everything is a safe function on `&mut Vcpu`; the thunks of [`table`] are the boundary.
//! Invariants: an instruction that returns `Err` has changed nothing a guest can see but memory it may have written
//! (and Accessed bits); nothing a guest does panics.

pub mod control;
pub mod cpuid;
pub mod debug;
pub mod far;
pub mod interrupt;
pub mod mode;
pub mod models;
pub mod msr;
pub mod ops;
pub mod segments;
pub mod smm;
pub mod stack;
pub mod string;
pub mod table;
pub mod task;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;

pub use control::{init, reset};
pub use cpuid::CpuModel;
pub use interrupt::{Event, debug_trap, deliver};
pub use mode::{is_64bit, refresh_space, tb_flags};
pub use table::{HELPERS, call_helper};

use crate::vcpu::Trap;

/// What a helper makes.
pub type Helped = Result<u64, Trap>;

/// Number of variable-range MTRRs.
pub const VARIABLE_MTRRS: usize = 8;

/// Registers that translated code never looks at and helpers rarely do.
#[derive(Clone, Debug)]
pub struct ColdState {
    /// Number of processors of the machine, for CPUID's topology.
    pub cpus: u32,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// IA32_MTRR_FIX*, in the order of their numbers.
    pub mtrr_fixed: [u64; 11],
    /// IA32_MTRR_PHYSBASEn and PHYSMASKn, alternating.
    pub mtrr_variable: [u64; 2 * VARIABLE_MTRRS],
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_BIOS_SIGN_ID; software writes 0, CPUID loads the revision.
    pub bios_sign_id: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// MSR_MISC_FEATURES_ENABLES.
    pub misc_features: u64,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// Linear address that MONITOR armed.
    pub monitor: Option<u64>,
    /// State of the random number generator behind RDRAND and RDSEED.
    pub rng: u64,
    /// MSRs nobody knows that were accessed, so that each is reported once.
    pub unknown_msrs: BTreeSet<u32>,
    /// Accesses to MSRs nobody knows.
    pub unknown_msr_accesses: u64,
}

impl ColdState {
    /// The registers after reset. The random numbers follow from `seed` alone.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            cpus: 1,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 2 * VARIABLE_MTRRS],
            spec_ctrl: 0,
            tsc_adjust: 0,
            bios_sign_id: msr::MICROCODE_REVISION << 32,
            mcg_status: 0,
            misc_features: 0,
            feature_control: 1,
            monitor: None,
            rng: seed,
            unknown_msrs: BTreeSet::new(),
            unknown_msr_accesses: 0,
        }
    }

    /// A seed from the host's entropy.
    #[must_use]
    pub fn host_seed() -> u64 {
        use std::hash::{BuildHasher, Hasher};
        // RandomState is keyed from the operating system's entropy.
        std::collections::hash_map::RandomState::new().build_hasher().finish()
    }
}

impl Default for ColdState {
    fn default() -> Self {
        Self::new(Self::host_seed())
    }
}
