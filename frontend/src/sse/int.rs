//! SSE integer arithmetic, logic, comparison and shifts.

use twofold_ir::{BinOp, Ty, VecOp};

use crate::sse::operands::Wide;
use crate::sse::{binary, binary_imm, plain_rows, rows, unary};
use crate::table::Row;
use crate::translator::Translator;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// The others.
pub const ROWS_PLAIN: &[Row] = PLAIN;

rows! { BY_OP;
    Sse2 binary: Paddb/Vpaddb Paddw/Vpaddw Paddd/Vpaddd Paddq/Vpaddq Paddsb/Vpaddsb Paddsw/Vpaddsw Paddusb/Vpaddusb
        Paddusw/Vpaddusw Psubsb/Vpsubsb Psubsw/Vpsubsw Psubusb/Vpsubusb Psubusw/Vpsubusw
        Pmullw/Vpmullw Pmulhw/Vpmulhw Pmulhuw/Vpmulhuw Pmuludq/Vpmuludq Pmaddwd/Vpmaddwd Pminub/Vpminub Pminsw/Vpminsw
        Pmaxub/Vpmaxub Pmaxsw/Vpmaxsw Pavgb/Vpavgb Pavgw/Vpavgw Psadbw/Vpsadbw;
    Sse2 cancel: Psubb/Vpsubb Psubw/Vpsubw Psubd/Vpsubd Psubq/Vpsubq Pcmpgtb/Vpcmpgtb Pcmpgtw/Vpcmpgtw Pcmpgtd/Vpcmpgtd;
    Sse42 cancel: Pcmpgtq/Vpcmpgtq;
    Sse2 equal: Pcmpeqb/Vpcmpeqb Pcmpeqw/Vpcmpeqw Pcmpeqd/Vpcmpeqd;
    Sse41 equal: Pcmpeqq/Vpcmpeqq;
    Ssse3 binary: Pmulhrsw/Vpmulhrsw Pmaddubsw/Vpmaddubsw Psignb/Vpsignb Psignw/Vpsignw Psignd/Vpsignd Phaddw/Vphaddw
        Phaddd/Vphaddd Phaddsw/Vphaddsw Phsubw/Vphsubw Phsubd/Vphsubd Phsubsw/Vphsubsw;
    Ssse3 unary: Pabsb/Vpabsb Pabsw/Vpabsw Pabsd/Vpabsd;
    Sse41 binary: Pmulld/Vpmulld Pmuldq/Vpmuldq Pminuw/Vpminuw Pminud/Vpminud Pminsb/Vpminsb Pminsd/Vpminsd
        Pmaxuw/Vpmaxuw Pmaxud/Vpmaxud Pmaxsb/Vpmaxsb Pmaxsd/Vpmaxsd;
    Sse41 unary: Phminposuw/Vphminposuw;
    Sse41 binary_imm: Mpsadbw/Vmpsadbw;
    Sse2 byte_shift: Pslldq/Vpslldq Psrldq/Vpsrldq;
    Sse2 mask: Pmovmskb/Vpmovmskb Movmskpd/Vmovmskpd;
    Sse mask: Movmskps/Vmovmskps;
    Sse41 test: Ptest/Vptest;
    Sse2 shift: Psllw/Vpsllw Pslld/Vpslld Psllq/Vpsllq Psrlw/Vpsrlw Psrld/Vpsrld Psrlq/Vpsrlq Psraw/Vpsraw Psrad/Vpsrad;
}

plain_rows! { PLAIN;
    Sse and: Andps/Vandps;
    Sse2 and: Andpd/Vandpd Pand/Vpand;
    Sse or: Orps/Vorps;
    Sse2 or: Orpd/Vorpd Por/Vpor;
    Sse xor: Xorps/Vxorps;
    Sse2 xor: Xorpd/Vxorpd Pxor/Vpxor;
    Sse andn: Andnps/Vandnps;
    Sse2 andn: Andnpd/Vandnpd Pandn/Vpandn;
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
    if t.same_sources() {
        let zero = t.splat64(0);
        return t.put_xmm(0, zero);
    }
    binary(t, op);
}

/// A comparison for equality: all ones when the operands are one register.
fn equal(t: &mut Translator<'_>, op: VecOp) {
    if t.same_sources() {
        let ones = t.splat64(u64::MAX);
        let hi = t.is_256().then_some(ones);
        return t.put_register(0, Wide { lo: ones, hi });
    }
    binary(t, op);
}

/// Shifts by an immediate or by the low half of an operand of 128 bits.
fn shift(t: &mut Translator<'_>, op: VecOp) {
    use VecOp::*;
    let n = t.first();
    if t.is_xmm(n + 1) || t.is_mem(n + 1) {
        let a = t.register(n);
        let count = t.xmm_or_aligned(n + 1);
        let v = t.halves(op, [0; 2], &[a, Wide::half(count)]);
        return t.put_register(0, v);
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
    let n = t.first();
    let a = t.register(n);
    let imm = t.imm8();
    let v = t.halves(op, [imm; 2], &[a]);
    t.put_register(0, v);
}

/// `op r32/r64, xmm`: the high half's bits follow the low half's.
fn mask(t: &mut Translator<'_>, op: VecOp) {
    let a = t.register(1);
    let mut v = t.b.vec(op, 0, &[a.lo]);
    if let Some(hi) = a.hi {
        let lanes = match op {
            VecOp::Pmovmskb => 16,
            VecOp::Movmskps => 4,
            _ => 2,
        };
        let hi = t.b.vec(op, 0, &[hi]);
        let hi = t.b.bin_imm(BinOp::Shl, hi, lanes);
        v = t.b.or(v, hi);
    }
    let v = t.b.trunc(Ty::I32, v);
    let (n, _, _) = crate::translator::gpr(t.insn.op_register(0));
    t.put_gpr(n, v);
}

fn test(t: &mut Translator<'_>, op: VecOp) {
    let a = t.register(0);
    let b = t.wide(1);
    set_test_flags(t, op, a, b);
}

/// PTEST's flags, each of which must hold for both halves.
pub(crate) fn set_test_flags(t: &mut Translator<'_>, op: VecOp, a: Wide, b: Wide) {
    let mut f = t.b.vec(op, 0, &[a.lo, b.lo]);
    if let (Some(a), Some(b)) = (a.hi, b.hi) {
        let hi = t.b.vec(op, 0, &[a, b]);
        f = t.b.and(f, hi);
    }
    t.b.set_flags(f);
}
