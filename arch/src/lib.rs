//! x86 definitions shared by every room: addresses, registers, control bits, exceptions, the guest state's layout.
//!
//! Place in the pipeline: under everything. No dependencies, no `unsafe`, no behaviour beyond pure functions of
//! architectural definitions.
#![forbid(unsafe_code)]

pub mod addr;
pub mod control;
pub mod cpuid;
pub mod exception;
pub mod flags;
pub mod fpu;
pub mod msr;
pub mod paging;
pub mod regs;
pub mod segment;
pub mod state;
pub mod string_op;
pub mod tbflags;
pub mod vector_op;
pub mod vmx;

pub use addr::{GuestPhysAddr, LinearAddr, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PhysAddr};
pub use exception::{Exception, Vector};
pub use flags::{CcKind, CcOp, CondCode};
pub use regs::{Gpr, SegReg};
pub use segment::Segment;
pub use state::{CpuState, Loc};
pub use string_op::{Repeat, StringKind, StringOp};
pub use tbflags::{CodeSize, TbFlags};
