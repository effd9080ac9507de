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
    Sse2 unary: Cvtdq2ps Cvtps2dq Cvttps2dq Cvtpd2dq Cvttpd2dq Cvtpd2ps;
    Sse2 from_low64: Cvtdq2pd Cvtps2pd;
    Sse2 scalar32: Cvtss2sd;
    Sse2 scalar64: Cvtsd2ss;
}

plain_rows! { GPR;
    Sse from_gpr: Cvtsi2ss;
    Sse2 from_gpr: Cvtsi2sd;
    Sse to_gpr: Cvtss2si Cvttss2si;
    Sse2 to_gpr: Cvtsd2si Cvttsd2si;
}

/// `op xmm, r/m32` or `r/m64`.
fn from_gpr(t: &mut Translator<'_>) {
    let x = t.read_op(1);
    let op = match (t.insn.mnemonic(), t.b.ty(x)) {
        (Mnemonic::Cvtsi2ss, Ty::I64) => VecOp::Cvtsi2ss64,
        (Mnemonic::Cvtsi2ss, _) => VecOp::Cvtsi2ss32,
        (_, Ty::I64) => VecOp::Cvtsi2sd64,
        _ => VecOp::Cvtsi2sd32,
    };
    let x = t.b.zext(Ty::I64, x);
    let a = t.xmm(0);
    let v = t.vector(op, 0, &[a, x]);
    t.put_xmm(0, v);
}

/// `op r32/r64, xmm/m32` or `m64`.
fn to_gpr(t: &mut Translator<'_>) {
    let (n, ty, _) = gpr(t.insn.op_register(0));
    let wide = ty == Ty::I64;
    let (op, bytes) = match (t.insn.mnemonic(), wide) {
        (Mnemonic::Cvtss2si, false) => (VecOp::Cvtss2si32, 4),
        (Mnemonic::Cvtss2si, true) => (VecOp::Cvtss2si64, 4),
        (Mnemonic::Cvttss2si, false) => (VecOp::Cvttss2si32, 4),
        (Mnemonic::Cvttss2si, true) => (VecOp::Cvttss2si64, 4),
        (Mnemonic::Cvtsd2si, false) => (VecOp::Cvtsd2si32, 8),
        (Mnemonic::Cvtsd2si, true) => (VecOp::Cvtsd2si64, 8),
        (_, false) => (VecOp::Cvttsd2si32, 8),
        (_, true) => (VecOp::Cvttsd2si64, 8),
    };
    let a = t.xmm_or_part(1, bytes);
    let v = t.vector(op, 0, &[a]);
    let v = t.b.trunc(ty, v);
    t.put_gpr(n, v);
}
