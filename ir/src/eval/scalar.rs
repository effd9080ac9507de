//! What the integer ops compute: the one definition that the evaluator, constant folding and the tests share.
//!
//! Operands are used modulo their width; results are zero-extended.

use crate::op::{BinOp, IntCc, RmwOp, Ty, UnOp};

/// Sign-extends the low bits of `v` that `ty` has.
#[must_use]
#[inline]
pub const fn signed(ty: Ty, v: u64) -> i64 {
    let unused = 64 - if ty.bits() > 64 { 64 } else { ty.bits() };
    ((v << unused) as i64) >> unused
}

/// A two-operand op.
#[must_use]
#[inline]
pub fn bin(op: BinOp, ty: Ty, a: u64, b: u64) -> u64 {
    let bits = ty.bits().min(64);
    let mask = ty.mask();
    let (a, b) = (a & mask, b & mask);
    let (sa, sb) = (signed(ty, a), signed(ty, b));
    let n = b as u32 & (bits - 1);
    let r = match op {
        BinOp::Add => a.wrapping_add(b),
        BinOp::Sub => a.wrapping_sub(b),
        BinOp::Mul => a.wrapping_mul(b),
        BinOp::UMulHi => ((u128::from(a) * u128::from(b)) >> bits) as u64,
        BinOp::SMulHi => ((i128::from(sa) * i128::from(sb)) >> bits) as u64,
        BinOp::And => a & b,
        BinOp::Or => a | b,
        BinOp::Xor => a ^ b,
        BinOp::Shl => a << n,
        BinOp::Shr => a >> n,
        BinOp::Sar => (sa >> n) as u64,
        BinOp::Rotl | BinOp::Rotr => {
            let n = if op == BinOp::Rotl { n } else { (bits - n) & (bits - 1) };
            if n == 0 { a } else { a << n | a >> (bits - n) }
        }
        BinOp::UDiv => a.checked_div(b).unwrap_or(0),
        BinOp::URem => a.checked_rem(b).unwrap_or(a),
        BinOp::SDiv if b == 0 => 0,
        BinOp::SDiv => sa.wrapping_div(sb) as u64,
        BinOp::SRem if b == 0 => a,
        BinOp::SRem => sa.wrapping_rem(sb) as u64,
    };
    r & mask
}

/// A one-operand op.
#[must_use]
#[inline]
pub fn un(op: UnOp, ty: Ty, a: u64) -> u64 {
    let bits = ty.bits().min(64);
    let mask = ty.mask();
    let a = a & mask;
    let r = match op {
        UnOp::Not => !a,
        UnOp::Neg => a.wrapping_neg(),
        UnOp::Clz => u64::from(a.leading_zeros() - (64 - bits)),
        UnOp::Ctz => u64::from(a.trailing_zeros().min(bits)),
        UnOp::Popcnt => u64::from(a.count_ones()),
        UnOp::Bswap => a.swap_bytes() >> (64 - bits),
    };
    r & mask
}

/// Whether a comparison holds.
#[must_use]
#[inline]
pub fn cmp(cc: IntCc, ty: Ty, a: u64, b: u64) -> bool {
    let unused = 64 - ty.bits().min(64);
    let (a, b) = (a << unused, b << unused);
    match cc {
        IntCc::Eq => a == b,
        IntCc::Ne => a != b,
        IntCc::Ult => a < b,
        IntCc::Ule => a <= b,
        IntCc::Ugt => a > b,
        IntCc::Uge => a >= b,
        IntCc::Slt => (a as i64) < b as i64,
        IntCc::Sle => a as i64 <= b as i64,
        IntCc::Sgt => a as i64 > b as i64,
        IntCc::Sge => a as i64 >= b as i64,
    }
}

/// What an atomic op writes to memory that holds `old`.
#[must_use]
#[inline]
pub fn rmw(op: RmwOp, ty: Ty, old: u64, v: u64) -> u64 {
    let r = match op {
        RmwOp::Add => old.wrapping_add(v),
        RmwOp::Sub => old.wrapping_sub(v),
        RmwOp::And => old & v,
        RmwOp::Or => old | v,
        RmwOp::Xor => old ^ v,
        RmwOp::Xchg => v,
    };
    r & ty.mask()
}
