//! SSE moves: whole registers, parts of them, to and from general registers, non-temporal and masked stores.

use iced_x86::{OpKind, Register};
use twofold_arch::Loc;
use twofold_ir::{MemFlags, Ty, VecOp};

use crate::sse::plain_rows;
use crate::table::Row;
use crate::translator::{Access, Translator, gpr, segment};

/// Rows by mnemonic.
pub const ROWS: &[Row] = BY_MNEMONIC;
/// Rows by form: mnemonics that other instructions share.
pub const ROWS_ONE: &[Row] = BY_CODE;

plain_rows! { BY_MNEMONIC;
    Sse mov_aligned: Movaps Movntps;
    Sse2 mov_aligned: Movapd Movdqa Movntpd Movntdq;
    Sse41 mov_aligned: Movntdqa;
    Sse mov_unaligned: Movups;
    Sse2 mov_unaligned: Movupd Movdqu;
    Sse3 mov_unaligned: Lddqu;
    Sse mov_low: Movlps Movss;
    Sse2 mov_low: Movlpd;
    Sse mov_high: Movhps;
    Sse2 mov_high: Movhpd;
    Sse movhlps: Movhlps;
    Sse movlhps: Movlhps;
    Sse2 movnti: Movnti;
    Sse2 maskmovdqu: Maskmovdqu;
    Sse3 movddup: Movddup;
}

plain_rows! { one BY_CODE;
    Sse2 mov_low: Movsd_xmm_xmmm64 Movsd_xmmm64_xmm;
    Sse2 movd: Movd_xmm_rm32 Movd_rm32_xmm Movq_xmm_rm64 Movq_rm64_xmm;
    Sse2 movq: Movq_xmm_xmmm64 Movq_xmmm64_xmm;
}

fn mov_aligned(t: &mut Translator<'_>) {
    if t.is_mem(0) {
        let v = t.xmm(1);
        t.store_aligned(v);
    } else {
        let v = t.xmm_or_aligned(1);
        t.put_xmm(0, v);
    }
}

fn mov_unaligned(t: &mut Translator<'_>) {
    if t.is_mem(0) {
        let v = t.xmm(1);
        t.store_mem(v);
    } else {
        let v = t.xmm_or_part(1, 16);
        t.put_xmm(0, v);
    }
}

/// MOVSS, MOVSD, MOVLPS, MOVLPD: the low part. A register source leaves the rest of the destination; a load clears it for
/// MOVSS and MOVSD and leaves it for MOVLPx.
fn mov_low(t: &mut Translator<'_>) {
    let bytes = if t.insn.mnemonic() == iced_x86::Mnemonic::Movss { 4 } else { 8 };
    if t.is_mem(0) {
        let v = t.xmm(1);
        let v = t.b.half(v, false);
        let v = t.b.trunc(Ty::int(bytes), v);
        return t.store_mem(v);
    }
    let keeps = matches!(t.insn.mnemonic(), iced_x86::Mnemonic::Movlps | iced_x86::Mnemonic::Movlpd);
    let v = if t.is_mem(1) && keeps {
        let lo = t.load_mem(Ty::I64);
        let old = t.xmm(0);
        let hi = t.b.half(old, true);
        t.b.pair(lo, hi)
    } else if t.is_mem(1) {
        t.xmm_or_part(1, bytes)
    } else {
        let (a, b) = (t.xmm(0), t.xmm(1));
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
    let old = t.xmm(0);
    let lo = t.b.half(old, false);
    let v = t.b.pair(lo, hi);
    t.put_xmm(0, v);
}

fn movhlps(t: &mut Translator<'_>) {
    let (a, b) = (t.xmm(0), t.xmm(1));
    let v = t.b.vec(VecOp::Punpckhqdq, 0, &[b, a]);
    t.put_xmm(0, v);
}

fn movlhps(t: &mut Translator<'_>) {
    let (a, b) = (t.xmm(0), t.xmm(1));
    let v = t.b.vec(VecOp::Punpcklqdq, 0, &[a, b]);
    t.put_xmm(0, v);
}

fn movddup(t: &mut Translator<'_>) {
    let a = t.xmm_or_part(1, 8);
    let lo = t.b.half(a, false);
    let v = t.b.pair(lo, lo);
    t.put_xmm(0, v);
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
