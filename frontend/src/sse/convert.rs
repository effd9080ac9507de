//! SSE conversions between integers and floating point, and between precisions.

use iced_x86::Mnemonic;
use twofold_ir::{Ty, VecOp};

use crate::sse::{from_low64, plain_rows, rows, scalar32, scalar64, unary};
use crate::table::Row;
use crate::translator::{Translator, gpr};

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// Conversions with a general register.
pub const ROWS_GPR: &[Row] = GPR;

rows! { BY_OP;
    Sse2 unary: Cvtdq2ps/Vcvtdq2ps Cvtps2dq/Vcvtps2dq Cvttps2dq/Vcvttps2dq;
    Sse2 narrow: Cvtpd2dq/Vcvtpd2dq Cvttpd2dq/Vcvttpd2dq
        Cvtpd2ps/Vcvtpd2ps;
    Sse2 from_low64: Cvtdq2pd/Vcvtdq2pd Cvtps2pd/Vcvtps2pd;
    Sse2 scalar32: Cvtss2sd/Vcvtss2sd;
    Sse2 scalar64: Cvtsd2ss/Vcvtsd2ss;
}

plain_rows! { GPR;
    Sse from_gpr: Cvtsi2ss/Vcvtsi2ss;
    Sse2 from_gpr: Cvtsi2sd/Vcvtsi2sd;
    Sse to_gpr: Cvtss2si/Vcvtss2si Cvttss2si/Vcvttss2si;
    Sse2 to_gpr: Cvtsd2si/Vcvtsd2si Cvttsd2si/Vcvttsd2si;
}

/// `op xmm, xmm/m128`, or `op xmm, ymm/m256`: results of half the width.
fn narrow(t: &mut Translator<'_>, op: VecOp) {
    let a = t.wide(1);
    let r = t.halves(op, [0; 2], &[a]);
    let v = match r.hi {
        Some(hi) => t.b.vec(VecOp::Punpcklqdq, 0, &[r.lo, hi]),
        None => r.lo,
    };
    t.put_xmm(0, v);
}

/// `op xmm, r/m32` or `r/m64`.
fn from_gpr(t: &mut Translator<'_>) {
    let n = t.first();
    let x = t.read_op(n + 1);
    let op = match (t.insn.mnemonic(), t.b.ty(x)) {
        (Mnemonic::Cvtsi2ss | Mnemonic::Vcvtsi2ss, Ty::I64) => VecOp::Cvtsi2ss64,
        (Mnemonic::Cvtsi2ss | Mnemonic::Vcvtsi2ss, _) => VecOp::Cvtsi2ss32,
        (_, Ty::I64) => VecOp::Cvtsi2sd64,
        _ => VecOp::Cvtsi2sd32,
    };
    let x = t.b.zext(Ty::I64, x);
    let a = t.xmm(n);
    let v = t.vector(op, 0, &[a, x]);
    t.put_xmm(0, v);
}

/// `op r32/r64, xmm/m32` or `m64`.
fn to_gpr(t: &mut Translator<'_>) {
    let (n, ty, _) = gpr(t.insn.op_register(0));
    let wide = ty == Ty::I64;
    let (op, bytes) = match (t.insn.mnemonic(), wide) {
        (Mnemonic::Cvtss2si | Mnemonic::Vcvtss2si, false) => (VecOp::Cvtss2si32, 4),
        (Mnemonic::Cvtss2si | Mnemonic::Vcvtss2si, true) => (VecOp::Cvtss2si64, 4),
        (Mnemonic::Cvttss2si | Mnemonic::Vcvttss2si, false) => (VecOp::Cvttss2si32, 4),
        (Mnemonic::Cvttss2si | Mnemonic::Vcvttss2si, true) => (VecOp::Cvttss2si64, 4),
        (Mnemonic::Cvtsd2si | Mnemonic::Vcvtsd2si, false) => (VecOp::Cvtsd2si32, 8),
        (Mnemonic::Cvtsd2si | Mnemonic::Vcvtsd2si, true) => (VecOp::Cvtsd2si64, 8),
        (_, false) => (VecOp::Cvttsd2si32, 8),
        (_, true) => (VecOp::Cvttsd2si64, 8),
    };
    let a = t.xmm_or_part(1, bytes);
    let v = t.vector(op, 0, &[a]);
    let v = t.b.trunc(ty, v);
    t.put_gpr(n, v);
}
