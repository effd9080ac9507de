//! SSE shuffles, packs, blends, insertions, extractions and widening moves.

use iced_x86::Mnemonic;
use twofold_ir::{Ty, VecOp};

use crate::sse::{
    binary, binary_imm, by_mask, from_low16, from_low32, from_low64, plain_rows, rows, unary_imm, unary_with,
};
use crate::table::Row;
use crate::translator::{Translator, gpr};

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// The others.
pub const ROWS_PLAIN: &[Row] = PLAIN;

rows! { BY_OP;
    Sse2 binary: Packsswb/Vpacksswb Packssdw/Vpackssdw Packuswb/Vpackuswb Punpcklbw/Vpunpcklbw Punpcklwd/Vpunpcklwd
        Punpckldq/Vpunpckldq Punpcklqdq/Vpunpcklqdq
        Punpckhbw/Vpunpckhbw Punpckhwd/Vpunpckhwd Punpckhdq/Vpunpckhdq Punpckhqdq/Vpunpckhqdq;
    Sse41 binary: Packusdw/Vpackusdw;
    Ssse3 binary: Pshufb/Vpshufb;
    Sse2 unary_imm: Pshufd/Vpshufd Pshuflw/Vpshuflw Pshufhw/Vpshufhw;
    Sse binary_imm: Shufps/Vshufps;
    Sse2 binary_imm: Shufpd/Vshufpd;
    Ssse3 binary_imm: Palignr/Vpalignr;
    Sse41 binary_imm: Pblendw/Vpblendw Blendps/Vblendps Blendpd/Vblendpd;
    Sse41 by_mask: Pblendvb/Vpblendvb Blendvps/Vblendvps Blendvpd/Vblendvpd;
    Sse41 from_low64: Pmovsxbw/Vpmovsxbw Pmovsxwd/Vpmovsxwd Pmovsxdq/Vpmovsxdq Pmovzxbw/Vpmovzxbw Pmovzxwd/Vpmovzxwd
        Pmovzxdq/Vpmovzxdq;
    Sse41 from_low32: Pmovsxbd/Vpmovsxbd Pmovsxwq/Vpmovsxwq Pmovzxbd/Vpmovzxbd Pmovzxwq/Vpmovzxwq;
    Sse41 from_low16: Pmovsxbq/Vpmovsxbq Pmovzxbq/Vpmovzxbq;
    Sse41 insert: Pinsrb/Vpinsrb Pinsrd/Vpinsrd Pinsrq/Vpinsrq;
    Sse2 insert: Pinsrw/Vpinsrw;
    Sse41 extract: Pextrb/Vpextrb Pextrd/Vpextrd Pextrq/Vpextrq;
}

plain_rows! { PLAIN;
    Sse unpack: Unpcklps/Vunpcklps Unpckhps/Vunpckhps;
    Sse2 unpack: Unpcklpd/Vunpcklpd Unpckhpd/Vunpckhpd;
    Sse3 duplicate: Movsldup/Vmovsldup Movshdup/Vmovshdup;
    Sse41 insertps: Insertps/Vinsertps;
    Sse41 extractps: Extractps/Vextractps;
    Sse2 pextrw: Pextrw/Vpextrw;
}

fn unpack(t: &mut Translator<'_>) {
    use Mnemonic::*;
    let op = match t.insn.mnemonic() {
        Unpcklps | Vunpcklps => VecOp::Punpckldq,
        Unpckhps | Vunpckhps => VecOp::Punpckhdq,
        Unpcklpd | Vunpcklpd => VecOp::Punpcklqdq,
        _ => VecOp::Punpckhqdq,
    };
    binary(t, op);
}

fn duplicate(t: &mut Translator<'_>) {
    let even = matches!(t.insn.mnemonic(), Mnemonic::Movsldup | Mnemonic::Vmovsldup);
    unary_with(t, VecOp::Pshufd, if even { 0xa0 } else { 0xf5 });
}

/// `op xmm, r32/m8` (m16, m32, m64)`, imm8`.
fn insert(t: &mut Translator<'_>, op: VecOp) {
    let n = t.first();
    let x = if t.is_mem(n + 1) {
        let ty = match op {
            VecOp::Pinsrb => Ty::I8,
            VecOp::Pinsrw => Ty::I16,
            VecOp::Pinsrd => Ty::I32,
            _ => Ty::I64,
        };
        t.load_mem(ty)
    } else {
        t.read_gpr(t.insn.op_register(n + 1))
    };
    let x = t.b.zext(Ty::I64, x);
    let a = t.xmm(n);
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
    if t.is_mem(0) && !t.vex && !t.has(twofold_arch::cpuid::Feature::Sse41) {
        return t.raise(twofold_arch::Exception::UD);
    }
    extract(t, VecOp::Pextrw);
}

/// From memory the source is one lane, so the source selector does not count.
fn insertps(t: &mut Translator<'_>) {
    let n = t.first();
    let a = t.xmm(n);
    let imm = if t.is_mem(n + 1) { t.imm8() & 0x3f } else { t.imm8() };
    let b = t.xmm_or_part(n + 1, 4);
    let v = t.b.vec(VecOp::Insertps, imm, &[a, b]);
    t.put_xmm(0, v);
}
