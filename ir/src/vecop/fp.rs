//! Vector ops: fp.
use crate::vecop::VecOp;

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128) -> u128 {
    let _ = (imm, a, b);
    todo!("{op:?}")
}
