//! Vector ops: what each computes, in portable code, and its operand types.
//!
//! Floating-point ops run under the host's MXCSR, which the runtime keeps equal to the guest's (all exceptions masked)
//! while guest code runs; sticky flags collect there.

use crate::op::Ty;

/// Operand and result types of a vector op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VecSig {
    /// Operand types; `None` after the last.
    pub args: [Option<Ty>; 3],
    /// Result type.
    pub result: Ty,
    /// Whether the op depends on MXCSR and sets its flags.
    pub touches_mxcsr: bool,
}

/// A vector op.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum VecOp {
    /// a ^ b.
    Xor,
}

impl VecOp {
    /// The op's operand and result types.
    #[must_use]
    pub const fn sig(self) -> VecSig {
        VecSig { args: [Some(Ty::V128), Some(Ty::V128), None], result: Ty::V128, touches_mxcsr: false }
    }
}

/// Computes a vector op; integers are zero-extended.
#[must_use]
pub fn eval(op: VecOp, _imm: u8, a: u128, b: u128, _c: u128) -> u128 {
    match op {
        VecOp::Xor => a ^ b,
    }
}
