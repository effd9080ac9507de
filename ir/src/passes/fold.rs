//! Constant folding and algebra: one step from an op to a simpler one.
//!
//! Part of the forward walk; what the ops compute is `eval::scalar`'s. Rules are local: an op, its operands' ops, and
//! sometimes theirs.

use crate::eval::scalar;
use crate::op::{BinOp, IntCc, Op, Ty, Value};

/// What an op becomes.
pub(super) enum Step {
    /// Nothing simpler is known.
    Same,
    /// This.
    Op(Op),
    /// A value there is already.
    Value(Value),
    /// A two-operand op or comparison whose right operand is to be a new constant of this type.
    WithConst { ty: Ty, imm: u64, op: Op },
}

fn constant(out: &[Op], v: Value) -> Option<u64> {
    match out.get(v.index()) {
        Some(&Op::Const { imm, .. }) => Some(imm),
        _ => None,
    }
}
fn ty(out: &[Op], v: Value) -> Ty {
    out.get(v.index()).and_then(Op::result).unwrap_or(Ty::I64)
}
fn fold(ty: Ty, imm: u64) -> Step {
    Step::Op(Op::Const { ty, imm: imm & ty.mask() })
}

/// How far `zeros` looks.
const DEPTH: u32 = 6;

/// Whether a value is 0 or 1.
fn is_truth(out: &[Op], v: Value, depth: u32) -> bool {
    match out[v.index()] {
        Op::Cmp { .. } | Op::Cond { .. } => true,
        Op::Bin { op: BinOp::And | BinOp::Or | BinOp::Xor, a, b, .. } if depth > 0 => {
            is_truth(out, a, depth - 1) && is_truth(out, b, depth - 1)
        }
        _ => false,
    }
}

/// Bits of a value that are known to be 0; those above its type are.
fn zeros(out: &[Op], v: Value, depth: u32) -> u64 {
    let ty = ty(out, v);
    let above = !ty.mask();
    if depth == 0 {
        return above;
    }
    let depth = depth - 1;
    above
        | match out[v.index()] {
            Op::Const { imm, .. } => !imm,
            Op::Cmp { .. } | Op::Cond { .. } => !1,
            Op::Zext { a, .. } => zeros(out, a, depth),
            Op::Bin { op: BinOp::And, a, b, .. } => match constant(out, b) {
                // The rest would not tell more: masks are joined.
                Some(c) => !c,
                None => zeros(out, a, depth) | zeros(out, b, depth),
            },
            Op::Bin { op: BinOp::Or | BinOp::Xor, a, b, .. } => zeros(out, a, depth) & zeros(out, b, depth),
            Op::Bin { op: BinOp::Shl, a, b, .. } => match constant(out, b) {
                Some(n) if n < u64::from(ty.bits()) => zeros(out, a, depth) << n | ((1 << n) - 1),
                _ => 0,
            },
            _ => 0,
        }
}

/// One step of simplification of `op`, whose operands are in `out`.
pub(super) fn step(out: &[Op], op: &Op) -> Step {
    match *op {
        Op::Bin { op, ty, a, b } => bin(out, op, ty, a, b),
        Op::Un { op, ty, a } => constant(out, a).map_or(Step::Same, |a| fold(ty, scalar::un(op, ty, a))),
        Op::Cmp { cc, ty, a, b } => cmp(out, cc, ty, a, b),
        Op::Select { ty, c, a, b } => select(out, ty, c, a, b),
        Op::Zext { to, a } => extend(out, to, a, false),
        Op::Sext { to, a } => extend(out, to, a, true),
        Op::Trunc { to, a } => trunc(out, to, a),
        Op::Half { a, hi } => match out[a.index()] {
            Op::Pair { lo, hi: high } => Step::Value(if hi { high } else { lo }),
            _ => Step::Same,
        },
        Op::Pair { lo, hi } => match (out[lo.index()], out[hi.index()]) {
            (Op::Half { a, hi: false }, Op::Half { a: b, hi: true }) if a == b => Step::Value(a),
            _ => Step::Same,
        },
        Op::ExitIf { c, exit } => match out[c.index()] {
            // A condition made from a condition.
            Op::Cmp { cc: IntCc::Ne, ty: Ty::I8, a, b } if constant(out, b) == Some(0) => {
                Step::Op(Op::ExitIf { c: a, exit })
            }
            _ => Step::Same,
        },
        _ => Step::Same,
    }
}

fn bin(out: &[Op], op: BinOp, ty: Ty, a: Value, b: Value) -> Step {
    let (ca, cb) = (constant(out, a), constant(out, b));
    if let (Some(x), Some(y)) = (ca, cb) {
        return fold(ty, scalar::bin(op, ty, x, y));
    }
    if ca.is_some() && op.commutes() {
        return Step::Op(Op::Bin { op, ty, a: b, b: a });
    }
    if a == b {
        match op {
            BinOp::And | BinOp::Or => return Step::Value(a),
            BinOp::Xor | BinOp::Sub => return fold(ty, 0),
            _ => {}
        }
    }
    match cb {
        Some(c) => bin_const(out, op, ty, a, c),
        None => Step::Same,
    }
}

/// With the constant `c` on the right.
fn bin_const(out: &[Op], op: BinOp, ty: Ty, a: Value, c: u64) -> Step {
    let bits = u64::from(ty.bits());
    let ones = ty.mask();
    match op {
        BinOp::Add | BinOp::Sub | BinOp::Or | BinOp::Xor if c == 0 => Step::Value(a),
        BinOp::Shl | BinOp::Shr | BinOp::Sar | BinOp::Rotl | BinOp::Rotr if c.is_multiple_of(bits) => Step::Value(a),
        BinOp::And if c == 0 => fold(ty, 0),
        BinOp::And if c == ones => Step::Value(a),
        BinOp::Or if c == ones => fold(ty, ones),
        BinOp::Mul if c == 0 => fold(ty, 0),
        BinOp::Mul | BinOp::UDiv if c == 1 => Step::Value(a),
        BinOp::Mul if c.is_power_of_two() => Step::WithConst {
            ty,
            imm: u64::from(c.trailing_zeros()),
            op: Op::Bin { op: BinOp::Shl, ty, a, b: Value::NONE },
        },
        BinOp::And => match out[a.index()] {
            Op::Cmp { .. } | Op::Cond { .. } if c & 1 != 0 => Step::Value(a),
            // The bits above a zero extension are clear.
            Op::Zext { a: x, .. } if c & self::ty(out, x).mask() == self::ty(out, x).mask() => Step::Value(a),
            Op::Bin { op: BinOp::And, a: x, b, .. } => match constant(out, b) {
                Some(d) if c & d == d => Step::Value(a),
                Some(d) => Step::WithConst { ty, imm: c & d, op: Op::Bin { op, ty, a: x, b: Value::NONE } },
                None => Step::Same,
            },
            // What the mask takes away need not be put in.
            Op::Bin { op: BinOp::Or, a: x, b: y, .. } => {
                let without = |x| Step::WithConst { ty, imm: c, op: Op::Bin { op, ty, a: x, b: Value::NONE } };
                match (zeros(out, x, DEPTH), zeros(out, y, DEPTH)) {
                    (_, zeros) if zeros & c == c => without(x),
                    (zeros, _) if zeros & c == c => without(y),
                    (x, y) if (x & y | c) & ones == ones => Step::Value(a),
                    _ => Step::Same,
                }
            }
            Op::Bin { op: BinOp::Shl, .. } | Op::Zext { .. } if (zeros(out, a, DEPTH) | c) & ones == ones => {
                Step::Value(a)
            }
            _ => Step::Same,
        },
        _ => Step::Same,
    }
}

fn cmp(out: &[Op], cc: IntCc, ty: Ty, a: Value, b: Value) -> Step {
    let (ca, cb) = (constant(out, a), constant(out, b));
    if let (Some(x), Some(y)) = (ca, cb) {
        return fold(Ty::I8, u64::from(scalar::cmp(cc, ty, x, y)));
    }
    if a == b {
        return fold(Ty::I8, u64::from(scalar::cmp(cc, ty, 0, 0)));
    }
    if ca.is_some() {
        return Step::Op(Op::Cmp { cc: cc.swapped(), ty, a: b, b: a });
    }
    let Some(c) = cb else { return Step::Same };
    match (cc, c) {
        (IntCc::Ult, 0) => return fold(Ty::I8, 0),
        (IntCc::Uge, 0) => return fold(Ty::I8, 1),
        (IntCc::Ugt, 0) => return Step::Op(Op::Cmp { cc: IntCc::Ne, ty, a, b }),
        (IntCc::Ule, 0) => return Step::Op(Op::Cmp { cc: IntCc::Eq, ty, a, b }),
        _ => {}
    }
    match out[a.index()] {
        // A truth value compared with 0.
        Op::Cmp { .. } | Op::Cond { .. } if c == 0 && cc == IntCc::Ne => Step::Value(a),
        Op::Bin { .. } if c == 0 && cc == IntCc::Ne && ty == Ty::I8 && is_truth(out, a, DEPTH) => Step::Value(a),
        // Nothing is shifted out.
        Op::Bin { op: BinOp::Shl, a: x, b: n, .. }
            if c == 0
                && matches!(cc, IntCc::Eq | IntCc::Ne)
                && constant(out, n).is_some_and(|n| {
                    n < u64::from(ty.bits())
                        && zeros(out, x, DEPTH).leading_ones() as u64 >= n + 64 - u64::from(ty.bits())
                }) =>
        {
            Step::Op(Op::Cmp { cc, ty, a: x, b })
        }
        Op::Cmp { cc: inner, ty, a, b } if c == 0 && cc == IntCc::Eq => {
            Step::Op(Op::Cmp { cc: inner.negated(), ty, a, b })
        }
        Op::Cond { cc: inner } if c == 0 && cc == IntCc::Eq => cond_negated(out, a, inner),
        Op::Bin { op: BinOp::Sub | BinOp::Xor, a, b, .. } if c == 0 && matches!(cc, IntCc::Eq | IntCc::Ne) => {
            Step::Op(Op::Cmp { cc, ty, a, b })
        }
        Op::Zext { a: x, .. }
            if matches!(cc, IntCc::Eq | IntCc::Ne | IntCc::Ult | IntCc::Ule | IntCc::Ugt | IntCc::Uge) =>
        {
            let narrow = self::ty(out, x);
            if c <= narrow.mask() {
                Step::WithConst { ty: narrow, imm: c, op: Op::Cmp { cc, ty: narrow, a: x, b: Value::NONE } }
            } else {
                Step::Same
            }
        }
        _ => Step::Same,
    }
}

/// The negation of the condition at `a`, when the flags have not changed since: it is the last op.
fn cond_negated(out: &[Op], a: Value, cc: twofold_arch::CondCode) -> Step {
    let since = &out[a.index() + 1..];
    if since.iter().all(|op| matches!(op, Op::Const { .. })) {
        Step::Op(Op::Cond { cc: cc.negate() })
    } else {
        Step::Same
    }
}

fn select(out: &[Op], ty: Ty, c: Value, a: Value, b: Value) -> Step {
    if a == b {
        return Step::Value(a);
    }
    match constant(out, c) {
        Some(0) => return Step::Value(b),
        Some(_) => return Step::Value(a),
        None => {}
    }
    match out[c.index()] {
        Op::Cmp { cc, ty: Ty::I8, a: x, b: zero } if constant(out, zero) == Some(0) => match cc {
            IntCc::Ne => Step::Op(Op::Select { ty, c: x, a, b }),
            IntCc::Eq => Step::Op(Op::Select { ty, c: x, a: b, b: a }),
            _ => Step::Same,
        },
        _ => Step::Same,
    }
}

fn extend(out: &[Op], to: Ty, a: Value, signed: bool) -> Step {
    let from = ty(out, a);
    match out[a.index()] {
        Op::Const { imm, .. } => fold(to, if signed { scalar::signed(from, imm) as u64 } else { imm }),
        // What was zero-extended is not negative.
        Op::Zext { a, .. } => Step::Op(Op::Zext { to, a }),
        Op::Sext { a, .. } if signed => Step::Op(Op::Sext { to, a }),
        Op::Cmp { .. } | Op::Cond { .. } if signed => Step::Op(Op::Zext { to, a }),
        _ => Step::Same,
    }
}

fn trunc(out: &[Op], to: Ty, a: Value) -> Step {
    match out[a.index()] {
        Op::Const { imm, .. } => fold(to, imm),
        Op::Trunc { a, .. } => Step::Op(Op::Trunc { to, a }),
        Op::Zext { a: x, .. } | Op::Sext { a: x, .. } if ty(out, x) == to => Step::Value(x),
        Op::Zext { a: x, .. } | Op::Sext { a: x, .. } if ty(out, x).bytes() > to.bytes() => {
            Step::Op(Op::Trunc { to, a: x })
        }
        Op::Zext { a: x, .. } => Step::Op(Op::Zext { to, a: x }),
        Op::Sext { a: x, .. } => Step::Op(Op::Sext { to, a: x }),
        _ => Step::Same,
    }
}
