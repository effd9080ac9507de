//! Virtual-machine extensions: VMCS fields, controls, exit reasons, qualifications, error numbers, EPT (SDM Vol 3C).
//!
//! Definitions only, named as the SDM names them; what they do is in `runtime::vmx` and in `mmu`. Invariant: nothing
//! here says what this processor implements; that is `runtime::vmx::caps`.

pub mod control;
pub mod ept;
pub mod error;
pub mod event;
pub mod exit;
pub mod field;
pub mod instruction;
pub mod msr;
pub mod qualification;

pub use control::{ControlBit, Word};
pub use error::{Abort, VmError};
pub use event::{EventType, InterruptionInfo};
pub use exit::{EntryFailure, ExitReason};
pub use field::{Field, Fields, Kind, Part, Width};
pub use instruction::InstructionInfo;

/// Byte offset of the VMCS revision identifier (and, in bit 31, the shadow-VMCS indicator) in a VMCS region.
pub const VMCS_REVISION_OFFSET: u64 = 0;
/// Byte offset of the VMX-abort indicator in a VMCS region.
pub const VMCS_ABORT_OFFSET: u64 = 4;
/// Bit 31 of a VMCS region's first four bytes: the region is a shadow VMCS.
pub const SHADOW_VMCS: u32 = 1 << 31;
/// The value of a VMCS pointer that points nowhere.
pub const NO_VMCS: u64 = u64::MAX;

/// IA32_FEATURE_CONTROL: locked until reset.
pub const FEATURE_CONTROL_LOCK: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON is allowed in SMX operation.
pub const FEATURE_CONTROL_VMX_IN_SMX: u64 = 1 << 1;
/// IA32_FEATURE_CONTROL: VMXON is allowed outside SMX operation.
pub const FEATURE_CONTROL_VMX: u64 = 1 << 2;

/// INVEPT types (SDM Vol 3C, "INVEPT— Invalidate Translations Derived from EPT").
pub mod invept {
    #![allow(missing_docs)]
    pub const SINGLE_CONTEXT: u64 = 1;
    pub const ALL_CONTEXTS: u64 = 2;
}

/// INVVPID types (SDM Vol 3C, "INVVPID— Invalidate Translations Based on VPID").
pub mod invvpid {
    #![allow(missing_docs)]
    pub const ADDRESS: u64 = 0;
    pub const SINGLE_CONTEXT: u64 = 1;
    pub const ALL_CONTEXTS: u64 = 2;
    pub const SINGLE_RETAINING_GLOBALS: u64 = 3;
}
