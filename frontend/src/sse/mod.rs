//! SSE to SSE4.2, AES, PCLMULQDQ and SHA in their legacy encodings: what the families share.
//!
//! Place: emitters of [`crate::table`]'s rows. Nearly every instruction is one vector op between reading its operands and
//! writing its destination; the rows name the shape and the op. Invariants: registers are read and written whole (V128),
//! so that values stay in SSA; 16-byte memory operands are `ALIGNED` unless the instruction says otherwise; under
//! `SSE_UNMASKED` an op that touches MXCSR is followed by its check before the first `Put`.

use iced_x86::{OpKind, Register};
use twofold_arch::{Loc, TbFlags};
use twofold_ir::{Helper, MemFlags, Ty, Value, VecOp};

use crate::translator::{Access, Translator};

pub mod convert;
pub mod crypto;
pub mod float;
pub mod int;
pub mod moves;
pub mod shuffle;
pub mod state;
pub mod string;

/// `Feature shape: Mnemonic…;` makes rows that call `shape(t, VecOp::Mnemonic)`.
macro_rules! rows {
    ($name:ident; $($feature:ident $emit:ident: $($m:ident)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::all(iced_x86::Mnemonic::$m, |t| $emit(t, twofold_ir::VecOp::$m))
                .feature(twofold_arch::cpuid::Feature::$feature)
                .need($crate::table::Need::SSE),
        )*)*];
    };
}
/// `Feature emitter: Mnemonic…;` makes rows that call `emitter(t)`; with `one`, `Code`s in place of mnemonics.
macro_rules! plain_rows {
    ($name:ident; $($feature:ident $emit:ident: $($m:ident)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::all(iced_x86::Mnemonic::$m, $emit)
                .feature(twofold_arch::cpuid::Feature::$feature)
                .need($crate::table::Need::SSE),
        )*)*];
    };
    (one $name:ident; $($feature:ident $emit:ident: $($c:ident)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::one(iced_x86::Code::$c, $emit)
                .feature(twofold_arch::cpuid::Feature::$feature)
                .need($crate::table::Need::SSE),
        )*)*];
    };
}
pub(crate) use {plain_rows, rows};

/// Number of the vector register `r`.
pub(crate) fn number(r: Register) -> u8 {
    (r as u32).wrapping_sub(Register::XMM0 as u32) as u8 & 15
}

impl Translator<'_> {
    /// The vector register that is operand `n`.
    pub(crate) fn xmm(&mut self, n: u32) -> Value {
        let r = number(self.insn.op_register(n));
        self.b.get(Ty::V128, Loc::xmm(r))
    }
    /// Writes the vector register that is operand `n`.
    pub(crate) fn put_xmm(&mut self, n: u32, v: Value) {
        let r = number(self.insn.op_register(n));
        self.b.put(Loc::xmm(r), v);
    }
    /// Whether operand `n` is a vector register.
    pub(crate) fn is_xmm(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Register && self.insn.op_register(n).is_xmm()
    }
    /// Operand `n`, a vector register or 16 bytes of aligned memory.
    pub(crate) fn xmm_or_aligned(&mut self, n: u32) -> Value {
        if self.is_mem(n) { self.load_aligned() } else { self.xmm(n) }
    }
    /// Operand `n`, a vector register or `bytes` of memory, zero-extended.
    pub(crate) fn xmm_or_part(&mut self, n: u32, bytes: u32) -> Value {
        if !self.is_mem(n) {
            return self.xmm(n);
        }
        if bytes == 16 {
            return self.load_mem(Ty::V128);
        }
        let v = self.load_mem(Ty::int(bytes));
        self.widen(v)
    }
    /// An integer as a vector, zero-extended.
    pub(crate) fn widen(&mut self, v: Value) -> Value {
        let lo = self.b.zext(Ty::I64, v);
        let hi = self.c64(0);
        self.b.pair(lo, hi)
    }
    /// A constant vector of twice `half`.
    pub(crate) fn splat64(&mut self, half: u64) -> Value {
        let v = self.c64(half);
        self.b.pair(v, v)
    }
    /// Loads 16 bytes that must be aligned.
    pub(crate) fn load_aligned(&mut self) -> Value {
        // #GP for the alignment comes before any #AC, so no alignment check is emitted.
        let addr = self.mem_addr_unaligned(16, Access::Read);
        let flags = self.mem_flags().or(MemFlags::ALIGNED);
        self.b.load(Ty::V128, flags, addr)
    }
    /// Stores 16 bytes that must be aligned.
    pub(crate) fn store_aligned(&mut self, v: Value) {
        let addr = self.mem_addr_unaligned(16, Access::Write);
        let flags = self.mem_flags().or(MemFlags::ALIGNED);
        self.b.store(flags, addr, v);
    }
    /// The instruction's last operand, an immediate byte.
    pub(crate) fn imm8(&self) -> u8 {
        self.insn.immediate8()
    }
    /// A vector op; one that touches MXCSR is checked for unmasked exceptions when there can be any.
    pub(crate) fn vector(&mut self, op: VecOp, imm: u8, args: &[Value]) -> Value {
        let checked = op.sig().touches_mxcsr && self.flags.has(TbFlags::SSE_UNMASKED);
        if checked {
            let before = self.c64(0);
            self.call(Helper::SseCheck, &[before]);
        }
        let v = self.b.vec(op, imm, args);
        if checked {
            let after = self.c64(1);
            self.call(Helper::SseCheck, &[after]);
        }
        v
    }
}

/// `op xmm, xmm/m128`.
pub(crate) fn binary(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let b = t.xmm_or_aligned(1);
    let v = t.vector(op, 0, &[a, b]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m128, imm8`.
pub(crate) fn binary_imm(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let b = t.xmm_or_aligned(1);
    let v = t.vector(op, t.imm8(), &[a, b]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m128` where the destination is only written.
pub(crate) fn unary(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm_or_aligned(1);
    let v = t.vector(op, 0, &[a]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m128, imm8` where the destination is only written.
pub(crate) fn unary_imm(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm_or_aligned(1);
    let v = t.vector(op, t.imm8(), &[a]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m32`.
pub(crate) fn scalar32(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 4, 0);
}
/// `op xmm, xmm/m64`.
pub(crate) fn scalar64(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 8, 0);
}
/// `op xmm, xmm/m32, imm8`.
pub(crate) fn scalar32_imm(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 4, t.imm8());
}
/// `op xmm, xmm/m64, imm8`.
pub(crate) fn scalar64_imm(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 8, t.imm8());
}

fn scalar(t: &mut Translator<'_>, op: VecOp, bytes: u32, imm: u8) {
    let a = t.xmm(0);
    let b = t.xmm_or_part(1, bytes);
    let v = t.vector(op, imm, &[a, b]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m64` (m32, m16): the low part of the source alone, the destination only written.
pub(crate) fn from_low64(t: &mut Translator<'_>, op: VecOp) {
    from_low(t, op, 8);
}
/// The same from 32 bits.
pub(crate) fn from_low32(t: &mut Translator<'_>, op: VecOp) {
    from_low(t, op, 4);
}
/// The same from 16 bits.
pub(crate) fn from_low16(t: &mut Translator<'_>, op: VecOp) {
    from_low(t, op, 2);
}

fn from_low(t: &mut Translator<'_>, op: VecOp, bytes: u32) {
    let a = t.xmm_or_part(1, bytes);
    let v = t.vector(op, 0, &[a]);
    t.put_xmm(0, v);
}
