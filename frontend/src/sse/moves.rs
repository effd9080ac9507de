//! SSE moves: whole registers, parts of them, to and from general registers, non-temporal and masked stores.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use twofold_arch::Loc;
use twofold_ir::{MemFlags, Ty, VecOp};

use crate::sse::operands::Wide;
use crate::sse::plain_rows;
use crate::table::Row;
use crate::translator::{Access, Translator, gpr, segment};

/// Rows by mnemonic.
pub const ROWS: &[Row] = BY_MNEMONIC;
/// Rows by form: mnemonics that other instructions share.
pub const ROWS_ONE: &[Row] = BY_CODE;
/// VEX-coded twins of those.
pub const ROWS_VEX: &[Row] = VEX;

plain_rows! { BY_MNEMONIC;
    Sse mov_aligned: Movaps/Vmovaps Movntps/Vmovntps;
    Sse2 mov_aligned: Movapd/Vmovapd Movdqa/Vmovdqa Movntpd/Vmovntpd Movntdq/Vmovntdq;
    Sse41 mov_aligned: Movntdqa/Vmovntdqa;
    Sse mov_unaligned: Movups/Vmovups;
    Sse2 mov_unaligned: Movupd/Vmovupd Movdqu/Vmovdqu;
    Sse3 mov_unaligned: Lddqu/Vlddqu;
    Sse mov_low: Movlps/Vmovlps Movss/Vmovss;
    Sse2 mov_low: Movlpd/Vmovlpd;
    Sse mov_high: Movhps/Vmovhps;
    Sse2 mov_high: Movhpd/Vmovhpd;
    Sse movhlps: Movhlps/Vmovhlps;
    Sse movlhps: Movlhps/Vmovlhps;
    Sse2 movnti: Movnti;
    Sse2 maskmovdqu: Maskmovdqu/Vmaskmovdqu;
    Sse3 movddup: Movddup/Vmovddup;
}

plain_rows! { one BY_CODE;
    Sse2 mov_low: Movsd_xmm_xmmm64 Movsd_xmmm64_xmm;
    Sse2 movd: Movd_xmm_rm32 Movd_rm32_xmm Movq_xmm_rm64 Movq_rm64_xmm;
    Sse2 movq: Movq_xmm_xmmm64 Movq_xmmm64_xmm;
}

const VEX: &[Row] = &[
    Row::vex(Mnemonic::Vmovsd, mov_low),
    Row::vex(Mnemonic::Vmovd, movd),
    Row::vex(Mnemonic::Vmovq, |t| {
        let to_gpr = matches!(t.insn.code(), Code::VEX_Vmovq_xmm_rm64 | Code::VEX_Vmovq_rm64_xmm);
        if to_gpr { movd(t) } else { movq(t) }
    }),
];

fn mov_aligned(t: &mut Translator<'_>) {
    mov(t, true);
}

fn mov_unaligned(t: &mut Translator<'_>) {
    mov(t, false);
}

fn mov(t: &mut Translator<'_>, aligned: bool) {
    if t.is_mem(0) {
        let v = t.register(1);
        return t.store_wide(v, aligned);
    }
    let v = if t.is_mem(1) { t.load_wide(aligned) } else { t.register(1) };
    t.put_register(0, v);
}

/// MOVSS, MOVSD, MOVLPS, MOVLPD: the low part. A register source leaves the rest of the first source; a load clears it for
/// MOVSS and MOVSD and leaves it for MOVLPx.
fn mov_low(t: &mut Translator<'_>) {
    use Mnemonic::*;
    let m = t.insn.mnemonic();
    let bytes = if matches!(m, Movss | Vmovss) { 4 } else { 8 };
    if t.is_mem(0) {
        let v = t.xmm(1);
        let v = t.b.half(v, false);
        let v = t.b.trunc(Ty::int(bytes), v);
        return t.store_mem(v);
    }
    let n = t.first();
    let v = if matches!(m, Movlps | Movlpd | Vmovlps | Vmovlpd) {
        let lo = t.load_mem(Ty::I64);
        let old = t.xmm(n);
        let hi = t.b.half(old, true);
        t.b.pair(lo, hi)
    } else if t.is_mem(1) {
        t.xmm_or_part(1, bytes)
    } else {
        let (a, b) = (t.xmm(n), t.xmm(n + 1));
        t.b.vec(if bytes == 4 { VecOp::Movss } else { VecOp::Movsd }, 0, &[a, b])
    };
    t.put_xmm(0, v);
}

/// MOVHPS, MOVHPD between memory and the high half.
fn mov_high(t: &mut Translator<'_>) {
    if t.is_mem(0) {
        let v = t.xmm(1);
        let v = t.b.half(v, true);
        return t.store_mem(v);
    }
    let hi = t.load_mem(Ty::I64);
    let old = t.xmm(t.first());
    let lo = t.b.half(old, false);
    let v = t.b.pair(lo, hi);
    t.put_xmm(0, v);
}

fn movhlps(t: &mut Translator<'_>) {
    let n = t.first();
    let (a, b) = (t.xmm(n), t.xmm(n + 1));
    let v = t.b.vec(VecOp::Punpckhqdq, 0, &[b, a]);
    t.put_xmm(0, v);
}

fn movlhps(t: &mut Translator<'_>) {
    let n = t.first();
    let (a, b) = (t.xmm(n), t.xmm(n + 1));
    let v = t.b.vec(VecOp::Punpcklqdq, 0, &[a, b]);
    t.put_xmm(0, v);
}

/// The low lane of each half twice. 128 bits need no more than that lane.
fn movddup(t: &mut Translator<'_>) {
    let a = if t.is_256() { t.wide(1) } else { Wide::half(t.xmm_or_part(1, 8)) };
    let v = t.halves(VecOp::Punpcklqdq, [0; 2], &[a, a]);
    t.put_register(0, v);
}

/// MOVD and MOVQ between a vector and a general register (or memory).
fn movd(t: &mut Translator<'_>) {
    if t.is_xmm(0) {
        let v = t.read_op(1);
        let v = t.widen(v);
        return t.put_xmm(0, v);
    }
    let v = t.xmm(1);
    let v = t.b.half(v, false);
    let ty = t.op_ty(0);
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

/// MOVQ between vector registers or memory: the low half, zero-extended in a register.
fn movq(t: &mut Translator<'_>) {
    let v = t.xmm_or_part(1, 8);
    let lo = t.b.half(v, false);
    if t.is_mem(0) {
        return t.store_mem(lo);
    }
    let v = t.widen(lo);
    t.put_xmm(0, v);
}

fn movnti(t: &mut Translator<'_>) {
    let v = t.read_op(1);
    t.store_mem(v);
}

/// Bytes of operand 1 chosen by the top bits of operand 2's, to DS:rDI (another segment by prefix).
///
/// Deviation: the sixteen bytes are read, merged and written back, so another processor's store between could be lost, and
/// an all-zero mask may fault.
fn maskmovdqu(t: &mut Translator<'_>) {
    let addr = t.masked_store_address(16);
    let (src, mask) = (t.xmm(1), t.xmm(2));
    let old = t.b.load(Ty::V128, MemFlags::WRITE_INTENT, addr);
    let v = t.b.vec(VecOp::Pblendvb, 0, &[old, src, mask]);
    t.b.store(MemFlags::NONE, addr, v);
}

impl Translator<'_> {
    /// The linear address of MASKMOVQ's and MASKMOVDQU's implicit operand.
    pub(crate) fn masked_store_address(&mut self, bytes: u32) -> twofold_ir::Value {
        let ty = match self.insn.op_kind(0) {
            OpKind::MemorySegDI => Ty::I16,
            OpKind::MemorySegEDI => Ty::I32,
            _ => Ty::I64,
        };
        let rdi = self.b.get(ty, Loc::gpr(gpr(Register::RDI).0));
        let seg = segment(self.insn.memory_segment());
        self.linear(seg, rdi, bytes, Access::Write)
    }
}
