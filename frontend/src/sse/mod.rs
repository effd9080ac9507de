//! SSE to SSE4.2, AES, PCLMULQDQ, GFNI and SHA, in their legacy and, where there is one, VEX encodings: what the families share.
//!
//! Place: emitters of [`crate::table`]'s rows. Nearly every instruction is one vector op between reading its operands and
//! writing its destination; the rows name the shape and the op. The shapes serve both encodings ([`operands`] knows what
//! differs); instructions that exist only VEX-coded are in [`crate::avx`]. Invariants: registers are read and written in
//! halves of 128 bits (V128), so that values stay in SSA; 16-byte memory operands of legacy encodings are `ALIGNED` unless
//! the instruction says otherwise; under `SSE_UNMASKED` an op that touches MXCSR is followed by its check before the first `Put`.

use twofold_ir::VecOp;

use crate::translator::Translator;

pub mod convert;
pub mod crypto;
pub mod float;
pub mod int;
pub mod moves;
pub(crate) mod operands;
pub mod shuffle;
pub mod state;
pub mod string;

/// `Feature shape: Mnemonic…;` makes rows that call `shape(t, VecOp::Mnemonic)`; `Mnemonic/Vmnemonic` makes one for the VEX-coded
/// instruction too.
macro_rules! rows {
    ($name:ident; $($feature:ident $emit:ident: $($m:ident $(/ $v:ident)?)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::all(iced_x86::Mnemonic::$m, |t| $emit(t, twofold_ir::VecOp::$m))
                .feature(twofold_arch::cpuid::Feature::$feature)
                .need($crate::table::Need::SSE),
            $($crate::table::Row::vex(iced_x86::Mnemonic::$v, |t| $emit(t, twofold_ir::VecOp::$m)),)?
        )*)*];
    };
}
/// `Feature emitter: Mnemonic…;` makes rows that call `emitter(t)`, with VEX-coded ones as in `rows`; with `one`, `Code`s in
/// place of mnemonics.
macro_rules! plain_rows {
    ($name:ident; $($feature:ident $emit:ident: $($m:ident $(/ $v:ident)?)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::all(iced_x86::Mnemonic::$m, $emit)
                .feature(twofold_arch::cpuid::Feature::$feature)
                .need($crate::table::Need::SSE),
            $($crate::table::Row::vex(iced_x86::Mnemonic::$v, $emit),)?
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

/// The immediate of each half of a 256-bit instruction: most use the same, some go on where the low half's lanes end.
fn imm_halves(op: VecOp, imm: u8) -> [u8; 2] {
    match op {
        VecOp::Shufpd | VecOp::Blendpd => [imm, imm >> 2],
        VecOp::Mpsadbw => [imm, imm >> 3],
        VecOp::Blendps => [imm, imm >> 4],
        _ => [imm, imm],
    }
}

/// `op xmm, xmm/m128`, or `op ymm, ymm, ymm/m256`.
pub(crate) fn binary(t: &mut Translator<'_>, op: VecOp) {
    binary_with(t, op, 0);
}

/// The same with an immediate byte.
pub(crate) fn binary_imm(t: &mut Translator<'_>, op: VecOp) {
    binary_with(t, op, t.imm8());
}

/// The same with the immediate given.
pub(crate) fn binary_with(t: &mut Translator<'_>, op: VecOp, imm: u8) {
    let n = t.first();
    let a = t.register(n);
    let b = t.wide(n + 1);
    let v = t.halves(op, imm_halves(op, imm), &[a, b]);
    t.put_register(0, v);
}

/// `op xmm, xmm/m128` where the destination is only written.
pub(crate) fn unary(t: &mut Translator<'_>, op: VecOp) {
    unary_with(t, op, 0);
}

/// `op xmm, xmm/m128, imm8` where the destination is only written.
pub(crate) fn unary_imm(t: &mut Translator<'_>, op: VecOp) {
    unary_with(t, op, t.imm8());
}

/// The same with the immediate given.
pub(crate) fn unary_with(t: &mut Translator<'_>, op: VecOp, imm: u8) {
    let a = t.wide(1);
    let v = t.halves(op, imm_halves(op, imm), &[a]);
    t.put_register(0, v);
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

pub(crate) fn scalar(t: &mut Translator<'_>, op: VecOp, bytes: u32, imm: u8) {
    let n = t.first();
    let a = t.xmm(n);
    let b = t.xmm_or_part(n + 1, bytes);
    let v = t.vector(op, imm, &[a, b]);
    t.put_xmm(0, v);
}

/// `op xmm, xmm/m64` (m32, m16): the low part of the source alone, the destination only written. Twice as much of the
/// source for 256 bits.
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

pub(crate) fn from_low(t: &mut Translator<'_>, op: VecOp, bytes: u32) {
    if !t.is_256() {
        let a = t.xmm_or_part(1, bytes);
        let v = t.vector(op, 0, &[a]);
        return t.put_xmm(0, v);
    }
    let a = t.xmm_or_part(1, 2 * bytes);
    let upper = t.b.vec(VecOp::Psrldq, bytes as u8, &[a]);
    let v = t.halves(op, [0; 2], &[operands::Wide::full(a, upper)]);
    t.put_register(0, v);
}

/// `op xmm, xmm/m128` with XMM0 for a mask; VEX-coded the mask is an operand.
pub(crate) fn by_mask(t: &mut Translator<'_>, op: VecOp) {
    let n = t.first();
    let a = t.register(n);
    let b = t.wide(n + 1);
    let mask = if t.vex { t.register(3) } else { t.xmm0() };
    let v = t.halves(op, [0; 2], &[a, b, mask]);
    t.put_register(0, v);
}
