//! Broadcasts, permutations, and moves of 128-bit halves.

use iced_x86::{Mnemonic, OpKind};
use twofold_ir::{Ty, Value, VecOp};

use crate::avx::op_rows;
use crate::sse::operands::Wide;
use crate::sse::{binary, unary_imm};
use crate::table::Row;
use crate::translator::Translator;

/// Rows by mnemonic.
pub const ROWS: &[Row] = &[
    Row::vex(Mnemonic::Vpbroadcastb, |t| broadcast(t, 1)),
    Row::vex(Mnemonic::Vpbroadcastw, |t| broadcast(t, 2)),
    Row::vex(Mnemonic::Vpbroadcastd, |t| broadcast(t, 4)),
    Row::vex(Mnemonic::Vbroadcastss, |t| broadcast(t, 4)),
    Row::vex(Mnemonic::Vpbroadcastq, |t| broadcast(t, 8)),
    Row::vex(Mnemonic::Vbroadcastsd, |t| broadcast(t, 8)),
    Row::vex(Mnemonic::Vbroadcastf128, broadcast_128),
    Row::vex(Mnemonic::Vbroadcasti128, broadcast_128),
    Row::vex(Mnemonic::Vinsertf128, insert_128),
    Row::vex(Mnemonic::Vinserti128, insert_128),
    Row::vex(Mnemonic::Vextractf128, extract_128),
    Row::vex(Mnemonic::Vextracti128, extract_128),
    Row::vex(Mnemonic::Vperm2f128, permute_128),
    Row::vex(Mnemonic::Vperm2i128, permute_128),
    Row::vex(Mnemonic::Vpermq, permute_64),
    Row::vex(Mnemonic::Vpermpd, permute_64),
    Row::vex(Mnemonic::Vpermd, permute_32),
    Row::vex(Mnemonic::Vpermps, permute_32),
    Row::vex(Mnemonic::Vpblendd, blend_32),
];
/// The others, whose shape depends on whether they have an immediate.
pub const ROWS_IN_LANE: &[Row] = IN_LANE;

op_rows! { IN_LANE;
    in_lane: Vpermilps = Permilps Vpermilpd = Permilpd;
}

/// The low `bytes` of a register or memory in every lane.
fn broadcast(t: &mut Translator<'_>, bytes: u32) {
    let wide = t.is_256();
    let a = t.xmm_or_part(1, bytes);
    let v = match bytes {
        1 => {
            let zero = t.splat64(0);
            t.b.vec(VecOp::Pshufb, 0, &[a, zero])
        }
        2 => {
            let v = t.b.vec(VecOp::Pshuflw, 0, &[a]);
            t.b.vec(VecOp::Pshufd, 0, &[v])
        }
        4 => t.b.vec(VecOp::Pshufd, 0, &[a]),
        _ => t.b.vec(VecOp::Punpcklqdq, 0, &[a, a]),
    };
    t.put_register(0, Wide { lo: v, hi: wide.then_some(v) });
}

fn broadcast_128(t: &mut Translator<'_>) {
    let v = t.load_mem(Ty::V128);
    t.put_register(0, Wide::full(v, v));
}

/// `op ymm, ymm, xmm/m128, imm8`.
fn insert_128(t: &mut Translator<'_>) {
    let a = t.register(1);
    let b = t.xmm_or_part(2, 16);
    let v = if t.imm8() & 1 == 0 { Wide { lo: b, ..a } } else { Wide { hi: Some(b), ..a } };
    t.put_register(0, v);
}

/// `op xmm/m128, ymm, imm8`.
fn extract_128(t: &mut Translator<'_>) {
    let a = t.register(1);
    let v = half(a, t.imm8() & 1 != 0);
    if t.is_mem(0) { t.store_mem(v) } else { t.put_xmm(0, v) }
}

fn half(v: Wide, high: bool) -> Value {
    if high { v.hi.unwrap_or(v.lo) } else { v.lo }
}

/// Each half of the result is one of the four halves of the sources, or 0.
fn permute_128(t: &mut Translator<'_>) {
    let (a, b) = (t.register(1), t.wide(2));
    let imm = t.imm8();
    let mut pick = |sel: u8| {
        if sel & 8 != 0 {
            return t.splat64(0);
        }
        half(if sel & 2 == 0 { a } else { b }, sel & 1 != 0)
    };
    let v = Wide::full(pick(imm), pick(imm >> 4));
    t.put_register(0, v);
}

/// Four lanes of 64 bits by an immediate.
fn permute_64(t: &mut Translator<'_>) {
    let a = t.wide(1);
    let imm = t.imm8();
    let mut pair = |sel: u8| {
        let (x, y) = (half(a, sel & 2 != 0), half(a, sel & 8 != 0));
        t.b.vec(VecOp::Shufpd, sel & 1 | sel >> 1 & 2, &[x, y])
    };
    let v = Wide::full(pair(imm), pair(imm >> 4));
    t.put_register(0, v);
}

/// `op ymm, ymm, ymm/m256`: the first source chooses lanes of the second.
fn permute_32(t: &mut Translator<'_>) {
    let (index, a) = (t.register(1), t.wide(2));
    let (lo, hi) = (half(a, false), half(a, true));
    let v = t.halves(VecOp::Permd, [0; 2], &[Wide::full(lo, lo), Wide::full(hi, hi), index]);
    t.put_register(0, v);
}

fn blend_32(t: &mut Translator<'_>) {
    crate::sse::binary_imm(t, VecOp::Blendps);
}

/// Lanes of the same half by an immediate or by a vector.
fn in_lane(t: &mut Translator<'_>, op: VecOp) {
    if t.insn.op2_kind() != OpKind::Immediate8 {
        return binary(t, op);
    }
    if op == VecOp::Permilps {
        return unary_imm(t, VecOp::Pshufd);
    }
    let a = t.wide(1);
    let imm = t.imm8();
    let v = t.halves(VecOp::Shufpd, [imm, imm >> 2], &[a, a]);
    t.put_register(0, v);
}
