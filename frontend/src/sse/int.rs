//! SSE integer arithmetic, logic, comparison and shifts.

use twofold_ir::{Ty, VecOp};

use crate::sse::{binary, binary_imm, plain_rows, rows, unary};
use crate::table::Row;
use crate::translator::Translator;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// The others.
pub const ROWS_PLAIN: &[Row] = PLAIN;

rows! { BY_OP;
    Sse2 binary: Paddb Paddw Paddd Paddq Paddsb Paddsw Paddusb Paddusw Psubsb Psubsw Psubusb Psubusw
        Pmullw Pmulhw Pmulhuw Pmuludq Pmaddwd Pminub Pminsw Pmaxub Pmaxsw Pavgb Pavgw Psadbw;
    Sse2 cancel: Psubb Psubw Psubd Psubq Pcmpgtb Pcmpgtw Pcmpgtd;
    Sse42 cancel: Pcmpgtq;
    Sse2 equal: Pcmpeqb Pcmpeqw Pcmpeqd;
    Sse41 equal: Pcmpeqq;
    Ssse3 binary: Pmulhrsw Pmaddubsw Psignb Psignw Psignd Phaddw Phaddd Phaddsw Phsubw Phsubd Phsubsw;
    Ssse3 unary: Pabsb Pabsw Pabsd;
    Sse41 binary: Pmulld Pmuldq Pminuw Pminud Pminsb Pminsd Pmaxuw Pmaxud Pmaxsb Pmaxsd;
    Sse41 unary: Phminposuw;
    Sse41 binary_imm: Mpsadbw;
    Sse2 byte_shift: Pslldq Psrldq;
    Sse2 mask: Pmovmskb Movmskpd;
    Sse mask: Movmskps;
    Sse41 test: Ptest;
    Sse2 shift: Psllw Pslld Psllq Psrlw Psrld Psrlq Psraw Psrad;
}

plain_rows! { PLAIN;
    Sse and: Andps;
    Sse2 and: Andpd Pand;
    Sse or: Orps;
    Sse2 or: Orpd Por;
    Sse xor: Xorps;
    Sse2 xor: Xorpd Pxor;
    Sse andn: Andnps;
    Sse2 andn: Andnpd Pandn;
}

/// Whether both operands are the same register.
fn same(t: &Translator<'_>) -> bool {
    t.is_xmm(1) && t.insn.op_register(0) == t.insn.op_register(1)
}

fn and(t: &mut Translator<'_>) {
    binary(t, VecOp::And);
}
fn or(t: &mut Translator<'_>) {
    binary(t, VecOp::Or);
}
fn xor(t: &mut Translator<'_>) {
    cancel(t, VecOp::Xor);
}
fn andn(t: &mut Translator<'_>) {
    cancel(t, VecOp::Andn);
}

/// An op whose result is 0 when both operands are equal.
fn cancel(t: &mut Translator<'_>, op: VecOp) {
    if same(t) {
        let zero = t.splat64(0);
        return t.put_xmm(0, zero);
    }
    binary(t, op);
}

/// A comparison for equality: all ones when the operands are one register.
fn equal(t: &mut Translator<'_>, op: VecOp) {
    if same(t) {
        let ones = t.splat64(u64::MAX);
        return t.put_xmm(0, ones);
    }
    binary(t, op);
}

/// Shifts by an immediate or by the low half of an operand.
fn shift(t: &mut Translator<'_>, op: VecOp) {
    use VecOp::*;
    if t.is_xmm(1) || t.is_mem(1) {
        return binary(t, op);
    }
    let op = match op {
        Psllw => PsllwImm,
        Pslld => PslldImm,
        Psllq => PsllqImm,
        Psrlw => PsrlwImm,
        Psrld => PsrldImm,
        Psrlq => PsrlqImm,
        Psraw => PsrawImm,
        _ => PsradImm,
    };
    byte_shift(t, op);
}

/// `op xmm, imm8`.
fn byte_shift(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let v = t.b.vec(op, t.imm8(), &[a]);
    t.put_xmm(0, v);
}

/// `op r32/r64, xmm`.
fn mask(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(1);
    let v = t.b.vec(op, 0, &[a]);
    let v = t.b.trunc(Ty::I32, v);
    let (n, _, _) = crate::translator::gpr(t.insn.op_register(0));
    t.put_gpr(n, v);
}

fn test(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let b = t.xmm_or_aligned(1);
    let f = t.b.vec(op, 0, &[a, b]);
    t.b.set_flags(f);
}
