//! MMX instructions, and the SSE ones that touch MMX registers.
//!
//! Place: rows by form, since the mnemonics are shared with SSE. The vector ops work on the low 64 bits of a V128; where lanes
//! depend on the register's width, both operands are joined into one V128 first. Every instruction here raises #MF for a
//! pending x87 exception before it touches memory, then makes TOP 0 and all tags valid; EMMS empties the tags. A write
//! sets the register's exponent bits to ones (SDM Vol 1, "Effect of MMX Instructions on the x87 FPU Tag Word").
//!
//! Deviation: a pending exception is #MF even when CR0.NE = 0.

use iced_x86::{Code, Mnemonic, Register};
use twofold_arch::cpuid::Feature;
use twofold_arch::fpu::fsw;
use twofold_arch::{Exception, Loc, TbFlags, Vector};
use twofold_ir::{BinOp, IntCc, MemFlags, Ty, Value, VecOp};

use crate::table::{Need, Row};
use crate::translator::{Translator, X87Place, gpr};

/// `Feature shape: Code = Op…;`
macro_rules! forms {
    ($name:ident $need:expr; $($feature:ident $emit:ident: $($c:ident = $op:ident)*;)*) => {
        const $name: &[Row] = &[$($(
            Row::one(Code::$c, |t| $emit(t, VecOp::$op)).feature(Feature::$feature).need($need),
        )*)*];
    };
}

/// Forms on MMX registers and memory.
pub const ROWS: &[Row] = FORMS;
/// Moves.
pub const ROWS_MOVES: &[Row] = &[
    Row::all(Mnemonic::Emms, emms).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movd_mm_rm32, to_mm).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movq_mm_rm64, to_mm).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movd_rm32_mm, from_mm).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movq_rm64_mm, from_mm).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movq_mm_mmm64, movq).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movq_mmm64_mm, movq).feature(Feature::Mmx).need(Need::MMX),
    Row::one(Code::Movntq_m64_mm, movq).feature(Feature::Sse).need(Need::MMX),
    Row::one(Code::Maskmovq_rDI_mm_mm, maskmovq).feature(Feature::Sse).need(Need::MMX),
    Row::one(Code::Movq2dq_xmm_mm, movq2dq).feature(Feature::Sse2).need(Need::SSE),
    Row::one(Code::Movdq2q_mm_xmm, movdq2q).feature(Feature::Sse2).need(Need::SSE),
];
/// Conversions between MMX and XMM registers.
pub const ROWS_CONVERT: &[Row] = CONVERT;

forms! { FORMS Need::MMX;
    Mmx binary: Paddb_mm_mmm64 = Paddb Paddw_mm_mmm64 = Paddw Paddd_mm_mmm64 = Paddd
        Paddsb_mm_mmm64 = Paddsb Paddsw_mm_mmm64 = Paddsw Paddusb_mm_mmm64 = Paddusb Paddusw_mm_mmm64 = Paddusw
        Psubb_mm_mmm64 = Psubb Psubw_mm_mmm64 = Psubw Psubd_mm_mmm64 = Psubd
        Psubsb_mm_mmm64 = Psubsb Psubsw_mm_mmm64 = Psubsw Psubusb_mm_mmm64 = Psubusb Psubusw_mm_mmm64 = Psubusw
        Pmullw_mm_mmm64 = Pmullw Pmulhw_mm_mmm64 = Pmulhw Pmaddwd_mm_mmm64 = Pmaddwd
        Pcmpeqb_mm_mmm64 = Pcmpeqb Pcmpeqw_mm_mmm64 = Pcmpeqw Pcmpeqd_mm_mmm64 = Pcmpeqd
        Pcmpgtb_mm_mmm64 = Pcmpgtb Pcmpgtw_mm_mmm64 = Pcmpgtw Pcmpgtd_mm_mmm64 = Pcmpgtd
        Pand_mm_mmm64 = And Pandn_mm_mmm64 = Andn Por_mm_mmm64 = Or Pxor_mm_mmm64 = Xor
        Psllw_mm_mmm64 = Psllw Pslld_mm_mmm64 = Pslld Psllq_mm_mmm64 = Psllq
        Psrlw_mm_mmm64 = Psrlw Psrld_mm_mmm64 = Psrld Psrlq_mm_mmm64 = Psrlq
        Psraw_mm_mmm64 = Psraw Psrad_mm_mmm64 = Psrad
        Punpcklbw_mm_mmm32 = Punpcklbw Punpcklwd_mm_mmm32 = Punpcklwd Punpckldq_mm_mmm32 = Punpckldq;
    Mmx high: Punpckhbw_mm_mmm64 = Punpcklbw Punpckhwd_mm_mmm64 = Punpcklwd Punpckhdq_mm_mmm64 = Punpckldq;
    Mmx joined: Packsswb_mm_mmm64 = Packsswb Packssdw_mm_mmm64 = Packssdw Packuswb_mm_mmm64 = Packuswb;
    Mmx shift: Psllw_mm_imm8 = PsllwImm Pslld_mm_imm8 = PslldImm Psllq_mm_imm8 = PsllqImm
        Psrlw_mm_imm8 = PsrlwImm Psrld_mm_imm8 = PsrldImm Psrlq_mm_imm8 = PsrlqImm
        Psraw_mm_imm8 = PsrawImm Psrad_mm_imm8 = PsradImm;
    Sse binary: Pavgb_mm_mmm64 = Pavgb Pavgw_mm_mmm64 = Pavgw Pminub_mm_mmm64 = Pminub Pminsw_mm_mmm64 = Pminsw
        Pmaxub_mm_mmm64 = Pmaxub Pmaxsw_mm_mmm64 = Pmaxsw Pmulhuw_mm_mmm64 = Pmulhuw Psadbw_mm_mmm64 = Psadbw;
    Sse shuffle: Pshufw_mm_mmm64_imm8 = Pshuflw;
    Sse insert: Pinsrw_mm_r32m16_imm8 = Pinsrw Pinsrw_mm_r64m16_imm8 = Pinsrw;
    Sse extract: Pextrw_r32_mm_imm8 = Pextrw Pextrw_r64_mm_imm8 = Pextrw
        Pmovmskb_r32_mm = Pmovmskb Pmovmskb_r64_mm = Pmovmskb;
    Sse2 binary: Paddq_mm_mmm64 = Paddq Psubq_mm_mmm64 = Psubq Pmuludq_mm_mmm64 = Pmuludq;
    Ssse3 binary: Pmaddubsw_mm_mmm64 = Pmaddubsw Pmulhrsw_mm_mmm64 = Pmulhrsw
        Psignb_mm_mmm64 = Psignb Psignw_mm_mmm64 = Psignw Psignd_mm_mmm64 = Psignd;
    Ssse3 unary: Pabsb_mm_mmm64 = Pabsb Pabsw_mm_mmm64 = Pabsw Pabsd_mm_mmm64 = Pabsd;
    Ssse3 joined: Phaddw_mm_mmm64 = Phaddw Phaddd_mm_mmm64 = Phaddd Phaddsw_mm_mmm64 = Phaddsw
        Phsubw_mm_mmm64 = Phsubw Phsubd_mm_mmm64 = Phsubd Phsubsw_mm_mmm64 = Phsubsw;
    Ssse3 pshufb: Pshufb_mm_mmm64 = Pshufb;
    Ssse3 palignr: Palignr_mm_mmm64_imm8 = Psrldq;
}

forms! { CONVERT Need::SSE;
    Sse to_xmm: Cvtpi2ps_xmm_mmm64 = Cvtdq2ps;
    Sse2 to_xmm: Cvtpi2pd_xmm_mmm64 = Cvtdq2pd;
    Sse from_xmm: Cvtps2pi_mm_xmmm64 = Cvtps2dq Cvttps2pi_mm_xmmm64 = Cvttps2dq;
    Sse2 from_xmm: Cvtpd2pi_mm_xmmm128 = Cvtpd2dq Cvttpd2pi_mm_xmmm128 = Cvttpd2dq;
}

fn number(r: Register) -> u8 {
    (r as u32).wrapping_sub(Register::MM0 as u32) as u8 & 7
}

impl Translator<'_> {
    /// #MF when an x87 exception is pending; the registers are in the state then.
    fn check_x87_pending(&mut self) {
        self.want_x87(X87Place::State);
        if self.flags.has(TbFlags::X87_HOST) {
            return;
        }
        let w = self.b.get(Ty::I16, Loc::FSW);
        let es = self.b.bin_imm(BinOp::And, w, u64::from(fsw::ES));
        let pending = self.b.cmp_imm(IntCc::Ne, es, 0);
        self.raise_if(pending, Exception::new(Vector::X87Fault));
    }
    /// TOP = 0, and every tag valid (or empty).
    fn set_tags(&mut self, tags: u64) {
        let w = self.b.get(Ty::I16, Loc::FSW);
        let w = self.b.bin_imm(BinOp::And, w, u64::from(!fsw::TOP));
        self.b.put(Loc::FSW, w);
        let tags = self.b.iconst(Ty::I16, tags);
        self.b.put(Loc::FTW, tags);
    }
    /// Operand `n`, an MMX register or memory of `bytes`, zero-extended.
    fn mm_or_part(&mut self, n: u32, bytes: u32) -> Value {
        let v = if self.is_mem(n) {
            self.load_mem(Ty::int(bytes))
        } else {
            let r = number(self.insn.op_register(n));
            self.b.get(Ty::I64, Loc::fpr(r))
        };
        self.widen(v)
    }
    fn mm(&mut self, n: u32) -> Value {
        self.mm_or_part(n, 8)
    }
    /// Writes the low half of `v` to the MMX register that is operand `n`, and enters MMX state.
    fn put_mm(&mut self, n: u32, v: Value) {
        let v = self.b.half(v, false);
        self.put_mm64(n, v);
    }
    fn put_mm64(&mut self, n: u32, v: Value) {
        let loc = Loc::fpr(number(self.insn.op_register(n)));
        self.b.put(loc, v);
        let ones = self.c64(0xffff);
        self.b.put(Loc(loc.0 + 8), ones);
        self.set_tags(0xff);
    }
}

/// `op mm, mm/m64` (m32 for the low unpacks).
fn binary(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = t.mm(0);
    let bytes = t.insn.memory_size().size() as u32;
    let b = t.mm_or_part(1, if bytes == 4 { 4 } else { 8 });
    let v = t.b.vec(op, 0, &[a, b]);
    t.put_mm(0, v);
}

fn unary(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = t.mm(1);
    let v = t.b.vec(op, 0, &[a]);
    t.put_mm(0, v);
}

/// The high unpacks: the second half of what the 128-bit low unpack makes of 64-bit operands.
fn high(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let (a, b) = (t.mm(0), t.mm(1));
    let v = t.b.vec(op, 0, &[a, b]);
    let v = t.b.half(v, true);
    t.put_mm64(0, v);
}

/// Packs and horizontal ops: both operands side by side in one vector.
fn joined(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let (a, b) = (t.mm(0), t.mm(1));
    let ab = t.b.vec(VecOp::Punpcklqdq, 0, &[a, b]);
    let v = t.b.vec(op, 0, &[ab, ab]);
    t.put_mm(0, v);
}

fn shift(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = t.mm(0);
    let v = t.b.vec(op, t.imm8(), &[a]);
    t.put_mm(0, v);
}

fn shuffle(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = t.mm(1);
    let v = t.b.vec(op, t.imm8(), &[a]);
    t.put_mm(0, v);
}

/// The indices count modulo 8.
fn pshufb(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let (a, b) = (t.mm(0), t.mm(1));
    let bits = t.splat64(0x8787_8787_8787_8787);
    let b = t.b.vec(VecOp::And, 0, &[b, bits]);
    let v = t.b.vec(op, 0, &[a, b]);
    t.put_mm(0, v);
}

fn palignr(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let (a, b) = (t.mm(0), t.mm(1));
    let ba = t.b.vec(VecOp::Punpcklqdq, 0, &[b, a]);
    let v = t.b.vec(op, t.imm8(), &[ba]);
    t.put_mm(0, v);
}

fn insert(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let x = if t.is_mem(1) { t.load_mem(Ty::I16) } else { t.read_gpr(t.insn.op_register(1)) };
    let x = t.b.zext(Ty::I64, x);
    let a = t.mm(0);
    let v = t.b.vec(op, t.imm8() & 3, &[a, x]);
    t.put_mm(0, v);
}

/// PEXTRW and PMOVMSKB: to a general register, zero-extended.
fn extract(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = t.mm(1);
    let imm = if op == VecOp::Pextrw { t.imm8() & 3 } else { 0 };
    let v = t.b.vec(op, imm, &[a]);
    let (n, _, _) = gpr(t.insn.op_register(0));
    t.put_gpr(n, v);
    t.set_tags(0xff);
}

fn emms(t: &mut Translator<'_>) {
    t.check_x87_pending();
    t.set_tags(0);
}

fn to_mm(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let v = t.read_op(1);
    let v = t.b.zext(Ty::I64, v);
    t.put_mm64(0, v);
}

fn from_mm(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let ty = t.op_ty(0);
    let v = t.b.get(ty, Loc::fpr(number(t.insn.op_register(1))));
    t.write_op(0, v);
    t.set_tags(0xff);
}

fn movq(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let v = t.mm(1);
    if !t.is_mem(0) {
        return t.put_mm(0, v);
    }
    let v = t.b.half(v, false);
    t.store_mem(v);
    t.set_tags(0xff);
}

/// As MASKMOVDQU, with eight bytes and the same deviation.
fn maskmovq(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let addr = t.masked_store_address(8);
    let (src, mask) = (t.mm(1), t.mm(2));
    let old = t.b.load(Ty::I64, MemFlags::WRITE_INTENT, addr);
    let old = t.widen(old);
    let v = t.b.vec(VecOp::Pblendvb, 0, &[old, src, mask]);
    let v = t.b.half(v, false);
    t.b.store(MemFlags::NONE, addr, v);
    t.set_tags(0xff);
}

fn movq2dq(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let v = t.mm(1);
    t.put_xmm(0, v);
    t.set_tags(0xff);
}

fn movdq2q(t: &mut Translator<'_>) {
    t.check_x87_pending();
    let v = t.xmm(1);
    t.put_mm(0, v);
}

/// CVTPI2PS and CVTPI2PD. The latter neither looks at nor changes x87 state when its source is memory.
fn to_xmm(t: &mut Translator<'_>, op: VecOp) {
    let enters = !t.is_mem(1) || op == VecOp::Cvtdq2ps;
    if enters {
        t.check_x87_pending();
    }
    let a = t.mm(1);
    let mut v = t.vector(op, 0, &[a]);
    if op == VecOp::Cvtdq2ps {
        let lo = t.b.half(v, false);
        let old = t.xmm(0);
        let hi = t.b.half(old, true);
        v = t.b.pair(lo, hi);
    }
    t.put_xmm(0, v);
    if enters {
        t.set_tags(0xff);
    }
}

/// CVT(T)PS2PI from a register's low half or memory, CVT(T)PD2PI from all sixteen bytes.
fn from_xmm(t: &mut Translator<'_>, op: VecOp) {
    t.check_x87_pending();
    let a = if matches!(op, VecOp::Cvtpd2dq | VecOp::Cvttpd2dq) {
        t.xmm_or_aligned(1)
    } else {
        // The high lanes must not raise anything.
        let v = t.xmm_or_part(1, 8);
        let lo = t.b.half(v, false);
        t.widen(lo)
    };
    let v = t.vector(op, 0, &[a]);
    t.put_mm(0, v);
}
