//! Multiplication and division: MUL, IMUL in its three forms, MULX, DIV, IDIV.
//!
//! Place: a family of the instruction table.

use iced_x86::{Mnemonic, Register};
use twofold_arch::cpuid::Feature;
use twofold_arch::{CcKind, Exception};
use twofold_ir::{BinOp, Helper, IntCc, Ty, Value};

use crate::table::{Need, Row};
use crate::translator::Translator;

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Mul, |t| mul(t, false)),
    Row::all(Mnemonic::Imul, imul),
    Row::all(Mnemonic::Mulx, mulx).feature(Feature::Bmi2).need(Need::PROTECTED),
    Row::all(Mnemonic::Div, |t| div(t, false)),
    Row::all(Mnemonic::Idiv, |t| div(t, true)),
];

/// Both halves of a product of values of type `ty`.
fn product(t: &mut Translator<'_>, a: Value, b: Value, signed: bool) -> (Value, Value) {
    let ty = t.b.ty(a);
    if ty == Ty::I64 {
        let lo = t.b.bin(BinOp::Mul, a, b);
        let hi = t.b.bin(if signed { BinOp::SMulHi } else { BinOp::UMulHi }, a, b);
        return (lo, hi);
    }
    let wide = Ty::int(ty.bytes() * 2);
    let p = wide_product(t, a, b, wide, signed);
    let lo = t.b.trunc(ty, p);
    let hi = t.b.bin_imm(BinOp::Shr, p, u64::from(ty.bits()));
    (lo, t.b.trunc(ty, hi))
}

fn wide_product(t: &mut Translator<'_>, a: Value, b: Value, wide: Ty, signed: bool) -> Value {
    let (a, b) = if signed { (t.b.sext(wide, a), t.b.sext(wide, b)) } else { (t.b.zext(wide, a), t.b.zext(wide, b)) };
    t.b.bin(BinOp::Mul, a, b)
}

/// What CF and OF hang on: not 0 exactly when the high half is significant.
fn overflow(t: &mut Translator<'_>, lo: Value, hi: Value, signed: bool) -> Value {
    if !signed {
        return hi;
    }
    let sign = t.b.bin_imm(BinOp::Sar, lo, u64::from(t.b.ty(lo).bits() - 1));
    t.b.xor(hi, sign)
}

/// One-operand MUL and IMUL: rDX:rAX (AX for bytes) = rAX * operand.
fn mul(t: &mut Translator<'_>, signed: bool) {
    let ty = t.op_ty(0);
    let b = t.read_op(0);
    let a = t.get_gpr(ty, 0);
    if ty == Ty::I8 {
        let p = wide_product(t, a, b, Ty::I16, signed);
        let lo = t.b.trunc(Ty::I8, p);
        let hi = t.b.bin_imm(BinOp::Shr, p, 8);
        let hi = t.b.trunc(Ty::I8, hi);
        let src = overflow(t, lo, hi, signed);
        t.put_gpr(0, p);
        return t.b.set_cc(CcKind::Mul, lo, Some(src), None);
    }
    let (lo, hi) = product(t, a, b, signed);
    let src = overflow(t, lo, hi, signed);
    t.put_gpr(0, lo);
    t.put_gpr(2, hi);
    t.b.set_cc(CcKind::Mul, lo, Some(src), None);
}

fn imul(t: &mut Translator<'_>) {
    if t.insn.op_count() == 1 {
        return mul(t, true);
    }
    let ty = t.op_ty(0);
    let (a, b) =
        if t.insn.op_count() == 2 { (t.read_op(0), t.read_op(1)) } else { (t.read_op(1), t.read_op_as(2, ty)) };
    let (lo, hi) = product(t, a, b, true);
    let src = overflow(t, lo, hi, true);
    t.write_op(0, lo);
    t.b.set_cc(CcKind::Mul, lo, Some(src), None);
}

fn mulx(t: &mut Translator<'_>) {
    let b = t.read_op(2);
    let ty = t.b.ty(b);
    let a = t.get_gpr(ty, 2);
    let (lo, hi) = product(t, a, b, false);
    // When both destinations are one register, it gets the high half.
    t.write_op(1, lo);
    t.write_op(0, hi);
}

/// DIV of RDX:RAX. The quotient fits when the high half is below the divisor, which 0 never allows.
fn div_wide(t: &mut Translator<'_>, d: Value) {
    let (lo, hi) = (t.get_gpr(Ty::I64, 0), t.get_gpr(Ty::I64, 2));
    let too_big = t.b.cmp(IntCc::Uge, hi, d);
    t.raise_if(too_big, Exception::DE);
    let q = t.call(Helper::DivideWide, &[lo, hi, d]);
    put_quotient(t, lo, d, q);
}

/// IDIV of RDX:RAX: the magnitudes are divided. With all bits the sign, `x ^ sign` and one more is the magnitude.
fn idiv_wide(t: &mut Translator<'_>, d: Value) {
    let (lo, hi) = (t.get_gpr(Ty::I64, 0), t.get_gpr(Ty::I64, 2));
    let sign = t.b.bin_imm(BinOp::Sar, hi, 63);
    let (low, high) = (t.b.xor(lo, sign), t.b.xor(hi, sign));
    let low = t.b.sub(low, sign);
    let carry = t.b.cmp_imm(IntCc::Eq, low, 0);
    let carry = t.b.zext(Ty::I64, carry);
    let carry = t.b.and(carry, sign);
    let high = t.b.add(high, carry);
    let d_sign = t.b.bin_imm(BinOp::Sar, d, 63);
    let magnitude = t.b.xor(d, d_sign);
    let magnitude = t.b.sub(magnitude, d_sign);
    let too_big = t.b.cmp(IntCc::Uge, high, magnitude);
    t.raise_if(too_big, Exception::DE);
    let q = t.call(Helper::DivideWide, &[low, high, magnitude]);
    let q_sign = t.b.xor(sign, d_sign);
    let q = t.b.xor(q, q_sign);
    let q = t.b.sub(q, q_sign);
    // A quotient of another sign than it should have did not fit.
    let other = t.b.xor(q, q_sign);
    let other = t.b.cmp_imm(IntCc::Slt, other, 0);
    let not_zero = t.b.cmp_imm(IntCc::Ne, q, 0);
    let too_big = t.b.and(other, not_zero);
    t.raise_if(too_big, Exception::DE);
    put_quotient(t, lo, d, q);
}

/// The remainder is what the quotient leaves of the low half, modulo 2^64.
fn put_quotient(t: &mut Translator<'_>, lo: Value, d: Value, q: Value) {
    let whole = t.b.bin(BinOp::Mul, q, d);
    let r = t.b.sub(lo, whole);
    t.put_gpr(0, q);
    t.put_gpr(2, r);
}

/// DIV and IDIV. 8-, 16- and 32-bit dividends fit in an I64.
fn div(t: &mut Translator<'_>, signed: bool) {
    let ty = t.op_ty(0);
    let d = t.read_op(0);
    if ty == Ty::I64 {
        return if signed { idiv_wide(t, d) } else { div_wide(t, d) };
    }
    let wide = if signed { t.b.sext(Ty::I64, d) } else { t.b.zext(Ty::I64, d) };
    let (dividend, high) = dividend(t, ty, signed);
    let q = if signed {
        let zero = t.b.cmp_imm(IntCc::Eq, wide, 0);
        t.raise_if(zero, Exception::DE);
        t.b.bin(BinOp::SDiv, dividend, wide)
    } else {
        // As of RDX:RAX: only what fits is divided.
        let too_big = t.b.cmp(IntCc::Uge, high, wide);
        t.raise_if(too_big, Exception::DE);
        let zero = t.c64(0);
        t.call(Helper::DivideWide, &[dividend, zero, wide])
    };
    // One division does.
    let whole = t.b.bin(BinOp::Mul, q, wide);
    let r = t.b.sub(dividend, whole);
    let narrow = t.b.trunc(ty, q);
    if signed {
        // MIN / -1 of 64-bit dividends wraps to a quotient that does not fit either.
        let back = t.b.sext(Ty::I64, narrow);
        let too_big = t.b.cmp(IntCc::Ne, back, q);
        t.raise_if(too_big, Exception::DE);
    }
    let r = t.b.trunc(ty, r);
    t.put_gpr(0, narrow);
    if ty == Ty::I8 {
        t.write_gpr(Register::AH, r);
    } else {
        t.put_gpr(2, r);
    }
}

/// AX, DX:AX or EDX:EAX as an I64, and its upper half.
fn dividend(t: &mut Translator<'_>, ty: Ty, signed: bool) -> (Value, Value) {
    if ty == Ty::I8 {
        let ax = t.get_gpr(Ty::I16, 0);
        let n = if signed { t.b.sext(Ty::I64, ax) } else { t.b.zext(Ty::I64, ax) };
        let high = t.b.bin_imm(BinOp::Shr, n, 8);
        return (n, high);
    }
    let (lo, hi) = (t.get_gpr(ty, 0), t.get_gpr(ty, 2));
    let lo = t.b.zext(Ty::I64, lo);
    let hi = if signed { t.b.sext(Ty::I64, hi) } else { t.b.zext(Ty::I64, hi) };
    let shifted = t.b.bin_imm(BinOp::Shl, hi, u64::from(ty.bits()));
    (t.b.or(shifted, lo), hi)
}
