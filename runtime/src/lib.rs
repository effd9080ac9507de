//! The machine: virtual processors that execute through the tiers, the devices around them, and a run from start to end.
//!
//! Place in the pipeline: the top. [`run()`] builds a machine from a [`Config`] and runs it; [`exec`] is how guest code
//! executes; [`cpu`] is what translated code calls out to; [`platform`] is the devices; [`boot`] loads kernels.
#![deny(unsafe_code)]

pub mod boot;
pub mod config;
pub mod cpu;
pub mod exec;
pub mod fpu;
pub mod platform;
pub mod profile;
pub mod run;
pub mod stats;
pub mod symbols;
pub mod trace;
pub mod vcpu;
pub mod vmx;

pub use config::Config;
pub use run::{Ending, Error, RunOutcome, run};
pub use vcpu::{MemAs, Shared, Shutdown, Trap, Vcpu};
