//! SSE shuffles, packs, blends, insertions, extractions and widening moves.

use iced_x86::Mnemonic;
use twofold_arch::Loc;
use twofold_ir::{Ty, VecOp};

use crate::sse::{binary, binary_imm, from_low16, from_low32, from_low64, plain_rows, rows, unary_imm};
use crate::table::Row;
use crate::translator::{Translator, gpr};

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// The others.
pub const ROWS_PLAIN: &[Row] = PLAIN;

rows! { BY_OP;
    Sse2 binary: Packsswb Packssdw Packuswb Punpcklbw Punpcklwd Punpckldq Punpcklqdq
        Punpckhbw Punpckhwd Punpckhdq Punpckhqdq;
    Sse41 binary: Packusdw;
    Ssse3 binary: Pshufb;
    Sse2 unary_imm: Pshufd Pshuflw Pshufhw;
    Sse binary_imm: Shufps;
    Sse2 binary_imm: Shufpd;
    Ssse3 binary_imm: Palignr;
    Sse41 binary_imm: Pblendw Blendps Blendpd;
    Sse41 by_xmm0: Pblendvb Blendvps Blendvpd;
    Sse41 from_low64: Pmovsxbw Pmovsxwd Pmovsxdq Pmovzxbw Pmovzxwd Pmovzxdq;
    Sse41 from_low32: Pmovsxbd Pmovsxwq Pmovzxbd Pmovzxwq;
    Sse41 from_low16: Pmovsxbq Pmovzxbq;
    Sse41 insert: Pinsrb Pinsrd Pinsrq;
    Sse2 insert: Pinsrw;
    Sse41 extract: Pextrb Pextrd Pextrq;
}

plain_rows! { PLAIN;
    Sse unpack: Unpcklps Unpckhps;
    Sse2 unpack: Unpcklpd Unpckhpd;
    Sse3 duplicate: Movsldup Movshdup;
    Sse41 insertps: Insertps;
    Sse41 extractps: Extractps;
    Sse2 pextrw: Pextrw;
}

fn unpack(t: &mut Translator<'_>) {
    let op = match t.insn.mnemonic() {
        Mnemonic::Unpcklps => VecOp::Punpckldq,
        Mnemonic::Unpckhps => VecOp::Punpckhdq,
        Mnemonic::Unpcklpd => VecOp::Punpcklqdq,
        _ => VecOp::Punpckhqdq,
    };
    binary(t, op);
}

fn duplicate(t: &mut Translator<'_>) {
    let imm = if t.insn.mnemonic() == Mnemonic::Movsldup { 0xa0 } else { 0xf5 };
    let a = t.xmm_or_aligned(1);
    let v = t.b.vec(VecOp::Pshufd, imm, &[a]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m128` with XMM0 for a mask.
fn by_xmm0(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let b = t.xmm_or_aligned(1);
    let c = t.b.get(Ty::V128, Loc::xmm(0));
    let v = t.b.vec(op, 0, &[a, b, c]);
    t.put_xmm(0, v);
}

/// `op xmm, r32/m8` (m16, m32, m64)`, imm8`.
fn insert(t: &mut Translator<'_>, op: VecOp) {
    let x = if t.is_mem(1) {
        let ty = match op {
            VecOp::Pinsrb => Ty::I8,
            VecOp::Pinsrw => Ty::I16,
            VecOp::Pinsrd => Ty::I32,
            _ => Ty::I64,
        };
        t.load_mem(ty)
    } else {
        t.read_gpr(t.insn.op_register(1))
    };
    let x = t.b.zext(Ty::I64, x);
    let a = t.xmm(0);
    let v = t.b.vec(op, t.imm8(), &[a, x]);
    t.put_xmm(0, v);
}

/// `op r32/m8` (m16, m32, m64)`, xmm, imm8`; registers are zero-extended.
fn extract(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(1);
    let v = t.b.vec(op, t.imm8(), &[a]);
    let ty = match op {
        VecOp::Pextrb => Ty::I8,
        VecOp::Pextrw => Ty::I16,
        VecOp::Pextrd => Ty::I32,
        _ => Ty::I64,
    };
    if t.is_mem(0) {
        let v = t.b.trunc(ty, v);
        return t.store_mem(v);
    }
    let (n, _, _) = gpr(t.insn.op_register(0));
    t.put_gpr(n, v);
}

fn extractps(t: &mut Translator<'_>) {
    extract(t, VecOp::Pextrd);
}

/// The register form is SSE2's, the memory form SSE4.1's.
fn pextrw(t: &mut Translator<'_>) {
    if t.is_mem(0) && !t.has(twofold_arch::cpuid::Feature::Sse41) {
        return t.raise(twofold_arch::Exception::UD);
    }
    extract(t, VecOp::Pextrw);
}

/// From memory the source is one lane, so the source selector does not count.
fn insertps(t: &mut Translator<'_>) {
    let a = t.xmm(0);
    let imm = if t.is_mem(1) { t.imm8() & 0x3f } else { t.imm8() };
    let b = t.xmm_or_part(1, 4);
    let v = t.b.vec(VecOp::Insertps, imm, &[a, b]);
    t.put_xmm(0, v);
}
