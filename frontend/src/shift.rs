//! Shifts and rotates: SHL SHR SAR, SHLD SHRD, ROL ROR RCL RCR, and BMI2's SHLX SHRX SARX RORX.
//!
//! Place: a family of the instruction table. A count of 0 (after masking) leaves every flag alone; with a count in CL the
//! lazy flags are selected, with an immediate the question is settled here.

use iced_x86::{Mnemonic, OpKind};
use twofold_arch::control::rflags;
use twofold_arch::cpuid::Feature;
use twofold_arch::{CcKind, CcOp, CondCode, Loc};
use twofold_ir::{BinOp, Helper, IntCc, Ty, Value};

use crate::arith::set_flag_bits;
use crate::table::{Need, Row};
use crate::translator::{Access, Translator};

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Shl, |t| shift(t, BinOp::Shl)),
    Row::all(Mnemonic::Sal, |t| shift(t, BinOp::Shl)),
    Row::all(Mnemonic::Shr, |t| shift(t, BinOp::Shr)),
    Row::all(Mnemonic::Sar, |t| shift(t, BinOp::Sar)),
    Row::all(Mnemonic::Rol, |t| rotate(t, BinOp::Rotl)),
    Row::all(Mnemonic::Ror, |t| rotate(t, BinOp::Rotr)),
    Row::all(Mnemonic::Rcl, |t| rotate_carry(t, false)),
    Row::all(Mnemonic::Rcr, |t| rotate_carry(t, true)),
    Row::all(Mnemonic::Shld, |t| double(t, BinOp::Shl)),
    Row::all(Mnemonic::Shrd, |t| double(t, BinOp::Shr)),
    Row::all(Mnemonic::Shlx, |t| shift_x(t, BinOp::Shl)).feature(Feature::Bmi2).need(Need::PROTECTED),
    Row::all(Mnemonic::Shrx, |t| shift_x(t, BinOp::Shr)).feature(Feature::Bmi2).need(Need::PROTECTED),
    Row::all(Mnemonic::Sarx, |t| shift_x(t, BinOp::Sar)).feature(Feature::Bmi2).need(Need::PROTECTED),
    Row::all(Mnemonic::Rorx, rorx).feature(Feature::Bmi2).need(Need::PROTECTED),
];

/// A shift count, masked to 5 or 6 bits.
#[derive(Clone, Copy)]
enum Count {
    Imm(u32),
    /// I8, masked.
    Cl(Value),
}

fn count(t: &mut Translator<'_>, n: u32, ty: Ty) -> Count {
    let mask = if ty == Ty::I64 { 63 } else { 31 };
    if t.insn.op_kind(n) == OpKind::Register {
        let cl = t.get_gpr(Ty::I8, 1);
        Count::Cl(t.b.bin_imm(BinOp::And, cl, mask))
    } else {
        Count::Imm((t.insn.try_immediate(n).unwrap_or(0) & mask) as u32)
    }
}

/// The count as a value of type `ty`, and the count minus 1.
fn count_values(t: &mut Translator<'_>, c: Count, ty: Ty) -> (Value, Value) {
    match c {
        Count::Imm(n) => (t.b.iconst(ty, u64::from(n)), t.b.iconst(ty, u64::from(n).wrapping_sub(1))),
        Count::Cl(v) => {
            let v = t.b.zext(ty, v);
            (v, t.b.bin_imm(BinOp::Sub, v, 1))
        }
    }
}

/// Sets the lazy flags `(kind, dst, src)` when the count is not 0.
fn set_cc_unless_zero(t: &mut Translator<'_>, c: Count, kind: CcKind, dst: Value, src: Value) {
    let Count::Cl(cl) = c else {
        return t.b.set_cc(kind, dst, Some(src), None);
    };
    let zero = t.b.cmp_imm(IntCc::Eq, cl, 0);
    let op = CcOp::new(kind, t.b.ty(dst).log2_bytes());
    for (loc, ty, new) in [
        (Loc::CC_DST, Ty::I64, t.b.zext(Ty::I64, dst)),
        (Loc::CC_SRC, Ty::I64, t.b.zext(Ty::I64, src)),
        (Loc::CC_OP, Ty::I32, t.b.iconst(Ty::I32, u64::from(op.0))),
    ] {
        let old = t.b.get(ty, loc);
        let v = t.b.select(zero, old, new);
        t.b.put(loc, v);
    }
}

fn shift(t: &mut Translator<'_>, op: BinOp) {
    let ty = t.op_ty(0);
    let c = count(t, 1, ty);
    let place = t.place(0, ty, Access::Write);
    let a = t.read_for_write(place, ty);
    // Counts go to 31 for bytes and words: shift in 32 bits.
    let wide = if ty == Ty::I64 { Ty::I64 } else { Ty::I32 };
    let w = if op == BinOp::Sar { t.b.sext(wide, a) } else { t.b.zext(wide, a) };
    let (n, n1) = count_values(t, c, wide);
    let r = t.b.bin(op, w, n);
    let r = t.b.trunc(ty, r);
    if let Count::Imm(0) = c {
        return t.write_place(place, r);
    }
    let s = t.b.bin(op, w, n1);
    let s = t.b.trunc(ty, s);
    t.write_place(place, r);
    set_cc_unless_zero(t, c, if op == BinOp::Shl { CcKind::Shl } else { CcKind::Shr }, r, s);
}

fn rotate(t: &mut Translator<'_>, op: BinOp) {
    let ty = t.op_ty(0);
    let c = count(t, 1, ty);
    let place = t.place(0, ty, Access::Write);
    let a = t.read_for_write(place, ty);
    let (n, _) = count_values(t, c, ty);
    let r = t.b.bin(op, a, n);
    if let Count::Imm(0) = c {
        return t.write_place(place, r);
    }
    let top = u64::from(ty.bits() - 1);
    let old = t.b.flags();
    // ROL: CF is the result's bit 0, OF its top bit xor CF. ROR: CF is the top bit, OF the two top bits' xor.
    let (cf, of) = if op == BinOp::Rotl {
        let cf = t.b.bin_imm(BinOp::And, r, 1);
        let high = t.b.bin_imm(BinOp::Shr, r, top);
        (cf, t.b.xor(high, cf))
    } else {
        let cf = t.b.bin_imm(BinOp::Shr, r, top);
        let below = t.b.bin_imm(BinOp::Shr, r, top - 1);
        let below = t.b.bin_imm(BinOp::And, below, 1);
        (cf, t.b.xor(cf, below))
    };
    t.write_place(place, r);
    match c {
        Count::Imm(_) => set_flag_bits(t, old, rflags::CF | rflags::OF, &[(cf, 0), (of, 11)]),
        Count::Cl(cl) => {
            let kept = t.b.bin_imm(BinOp::And, old, !(rflags::CF | rflags::OF));
            let cf = t.b.zext(Ty::I64, cf);
            let of = t.b.zext(Ty::I64, of);
            let of = t.b.bin_imm(BinOp::Shl, of, 11);
            let new = t.b.or(kept, cf);
            let new = t.b.or(new, of);
            let zero = t.b.cmp_imm(IntCc::Eq, cl, 0);
            let f = t.b.select(zero, old, new);
            t.b.set_flags(f);
        }
    }
}

/// RCL and RCR: by one bit inline; by more the helper rotates and sets the flags.
fn rotate_carry(t: &mut Translator<'_>, right: bool) {
    let ty = t.op_ty(0);
    let c = count(t, 1, ty);
    let place = t.place(0, ty, Access::Write);
    // The load has the intent to write: what the store could raise is raised here, before the helper sets the flags.
    let a = t.read_for_write(place, ty);
    if let Count::Imm(1) = c {
        let (r, cf, of) = rotate_carry_once(t, a, right);
        let old = t.b.flags();
        t.write_place(place, r);
        return set_flag_bits(t, old, rflags::CF | rflags::OF, &[(cf, 0), (of, 11)]);
    }
    let (n, _) = count_values(t, c, Ty::I64);
    let how = t.c64(u64::from(ty.log2_bytes()) | u64::from(right) << 8);
    let r = t.call(Helper::RotateCarry, &[a, n, how]);
    let r = t.b.trunc(ty, r);
    t.write_place(place, r);
}

/// `a` rotated through CF by one bit, with the new CF and OF.
fn rotate_carry_once(t: &mut Translator<'_>, a: Value, right: bool) -> (Value, Value, Value) {
    let ty = t.b.ty(a);
    let top = u64::from(ty.bits() - 1);
    let c = t.b.cond(CondCode::B);
    let c = t.b.zext(ty, c);
    if right {
        let low = t.b.bin_imm(BinOp::And, a, 1);
        let half = t.b.bin_imm(BinOp::Shr, a, 1);
        let high = t.b.bin_imm(BinOp::Shl, c, top);
        // The old top bit is now the second.
        let was = t.b.bin_imm(BinOp::Shr, a, top);
        let of = t.b.xor(was, c);
        return (t.b.or(half, high), low, of);
    }
    let cf = t.b.bin_imm(BinOp::Shr, a, top);
    let twice = t.b.bin_imm(BinOp::Shl, a, 1);
    let r = t.b.or(twice, c);
    let high = t.b.bin_imm(BinOp::Shr, r, top);
    let of = t.b.xor(high, cf);
    (r, cf, of)
}

fn double(t: &mut Translator<'_>, op: BinOp) {
    let ty = t.op_ty(0);
    let c = count(t, 2, ty);
    let b = t.read_op(1);
    let place = t.place(0, ty, Access::Write);
    let a = t.read_for_write(place, ty);
    if let Count::Imm(0) = c {
        return t.write_place(place, a);
    }
    let left = op == BinOp::Shl;
    let (r, s) = if ty == Ty::I16 { double16(t, left, a, b, c) } else { double_wide(t, left, a, b, c, ty) };
    t.write_place(place, r);
    set_cc_unless_zero(t, c, if left { CcKind::Shl } else { CcKind::Shr }, r, s);
}

/// 32- and 64-bit: `a` shifted by n, filled from `b`; and `a` shifted by n - 1.
fn double_wide(t: &mut Translator<'_>, left: bool, a: Value, b: Value, c: Count, ty: Ty) -> (Value, Value) {
    let (n, n1) = count_values(t, c, ty);
    let (op, back) = if left { (BinOp::Shl, BinOp::Shr) } else { (BinOp::Shr, BinOp::Shl) };
    let s = t.b.bin(op, a, n1);
    let high = t.b.bin(op, a, n);
    // b moved the other way by bits - n, in two steps so that n = 0 gives 0.
    let rest = t.b.bin_imm(BinOp::Xor, n, u64::from(ty.bits() - 1));
    let fill = t.b.bin_imm(back, b, 1);
    let fill = t.b.bin(back, fill, rest);
    (t.b.or(high, fill), s)
}

/// 16-bit: counts above 16 are undefined; here they go on through a : b : a.
fn double16(t: &mut Translator<'_>, left: bool, a: Value, b: Value, c: Count) -> (Value, Value) {
    let (n, n1) = count_values(t, c, Ty::I64);
    let (a, b) = (t.b.zext(Ty::I64, a), t.b.zext(Ty::I64, b));
    let top = t.b.bin_imm(BinOp::Shl, a, 32);
    let middle = t.b.bin_imm(BinOp::Shl, b, 16);
    let x = t.b.or(top, middle);
    let x = t.b.or(x, a);
    let (op, at) = if left { (BinOp::Shl, 32) } else { (BinOp::Shr, 0) };
    let mut cut = |n| {
        let v = t.b.bin(op, x, n);
        let v = if at == 0 { v } else { t.b.bin_imm(BinOp::Shr, v, at) };
        t.b.trunc(Ty::I16, v)
    };
    (cut(n), cut(n1))
}

fn shift_x(t: &mut Translator<'_>, op: BinOp) {
    let a = t.read_op(1);
    let n = t.read_op(2);
    let r = t.b.bin(op, a, n);
    t.write_op(0, r);
}

fn rorx(t: &mut Translator<'_>) {
    let a = t.read_op(1);
    let n = u64::from(t.insn.immediate8());
    let r = t.b.bin_imm(BinOp::Rotr, a, n);
    t.write_op(0, r);
}
