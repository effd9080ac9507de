//! Fused multiplication and addition, half precision, shifts by lane, VTESTPS and VTESTPD.

use twofold_ir::{MemFlags, Ty, VecOp};

use crate::avx::op_rows;
use crate::sse::binary;
use crate::sse::int::set_test_flags;
use crate::sse::operands::Wide;
use crate::table::Row;
use crate::translator::{Access, Translator};

/// Rows by mnemonic.
pub const ROWS: &[Row] = BY_OP;

op_rows! { BY_OP;
    binary: Vpsllvd = Psllvd Vpsllvq = Psllvq Vpsrlvd = Psrlvd Vpsrlvq = Psrlvq Vpsravd = Psravd;
    test: Vtestps = Cmpps Vtestpd = Cmppd;
    from_half: Vcvtph2ps = Cvtph2ps;
    to_half: Vcvtps2ph = Cvtps2ph;
    fused_132: Vfmadd132ps = Fmaddps Vfmadd132pd = Fmaddpd Vfmadd132ss = Fmaddss Vfmadd132sd = Fmaddsd
        Vfmsub132ps = Fmsubps Vfmsub132pd = Fmsubpd Vfmsub132ss = Fmsubss Vfmsub132sd = Fmsubsd
        Vfnmadd132ps = Fnmaddps Vfnmadd132pd = Fnmaddpd Vfnmadd132ss = Fnmaddss Vfnmadd132sd = Fnmaddsd
        Vfnmsub132ps = Fnmsubps Vfnmsub132pd = Fnmsubpd Vfnmsub132ss = Fnmsubss Vfnmsub132sd = Fnmsubsd
        Vfmaddsub132ps = Fmaddsubps Vfmaddsub132pd = Fmaddsubpd
        Vfmsubadd132ps = Fmsubaddps Vfmsubadd132pd = Fmsubaddpd;
    fused_213: Vfmadd213ps = Fmaddps Vfmadd213pd = Fmaddpd Vfmadd213ss = Fmaddss Vfmadd213sd = Fmaddsd
        Vfmsub213ps = Fmsubps Vfmsub213pd = Fmsubpd Vfmsub213ss = Fmsubss Vfmsub213sd = Fmsubsd
        Vfnmadd213ps = Fnmaddps Vfnmadd213pd = Fnmaddpd Vfnmadd213ss = Fnmaddss Vfnmadd213sd = Fnmaddsd
        Vfnmsub213ps = Fnmsubps Vfnmsub213pd = Fnmsubpd Vfnmsub213ss = Fnmsubss Vfnmsub213sd = Fnmsubsd
        Vfmaddsub213ps = Fmaddsubps Vfmaddsub213pd = Fmaddsubpd
        Vfmsubadd213ps = Fmsubaddps Vfmsubadd213pd = Fmsubaddpd;
    fused_231: Vfmadd231ps = Fmaddps Vfmadd231pd = Fmaddpd Vfmadd231ss = Fmaddss Vfmadd231sd = Fmaddsd
        Vfmsub231ps = Fmsubps Vfmsub231pd = Fmsubpd Vfmsub231ss = Fmsubss Vfmsub231sd = Fmsubsd
        Vfnmadd231ps = Fnmaddps Vfnmadd231pd = Fnmaddpd Vfnmadd231ss = Fnmaddss Vfnmadd231sd = Fnmaddsd
        Vfnmsub231ps = Fnmsubps Vfnmsub231pd = Fnmsubpd Vfnmsub231ss = Fnmsubss Vfnmsub231sd = Fnmsubsd
        Vfmaddsub231ps = Fmaddsubps Vfmaddsub231pd = Fmaddsubpd
        Vfmsubadd231ps = Fmsubaddps Vfmsubadd231pd = Fmsubaddpd;
}

fn fused_132(t: &mut Translator<'_>, op: VecOp) {
    fused(t, op, [0, 2, 1]);
}
fn fused_213(t: &mut Translator<'_>, op: VecOp) {
    fused(t, op, [1, 0, 2]);
}
fn fused_231(t: &mut Translator<'_>, op: VecOp) {
    fused(t, op, [1, 2, 0]);
}

/// `order`: which operands are multiplicand, multiplier and addend.
fn fused(t: &mut Translator<'_>, op: VecOp, order: [usize; 3]) {
    let scalar = scalar_bytes(op);
    let dst = t.register(0);
    let second = t.register(1);
    let third = match scalar {
        Some(bytes) => Wide::half(t.xmm_or_part(2, bytes)),
        None => t.wide(2),
    };
    let all = [dst, second, third];
    let v = t.halves(op, [0; 2], &order.map(|n| all[n]));
    let v = match scalar {
        // The upper lanes are the destination's.
        Some(bytes) if order[0] != 0 => {
            let low = if bytes == 4 { VecOp::Movss } else { VecOp::Movsd };
            Wide::half(t.b.vec(low, 0, &[dst.lo, v.lo]))
        }
        _ => v,
    };
    t.put_register(0, v);
}

/// The operand size of a scalar op.
fn scalar_bytes(op: VecOp) -> Option<u32> {
    match op {
        VecOp::Fmaddss | VecOp::Fmsubss | VecOp::Fnmaddss | VecOp::Fnmsubss => Some(4),
        VecOp::Fmaddsd | VecOp::Fmsubsd | VecOp::Fnmaddsd | VecOp::Fnmsubsd => Some(8),
        _ => None,
    }
}

/// VTESTPS and VTESTPD are PTEST of the top bits.
fn test(t: &mut Translator<'_>, op: VecOp) {
    let a = t.register(0);
    let b = t.wide(1);
    let top = t.splat64(if op == VecOp::Cmpps { 0x8000_0000_8000_0000 } else { 1 << 63 });
    let top = Wide::twice(top, a);
    let a = t.halves(VecOp::And, [0; 2], &[a, top]);
    let b = t.halves(VecOp::And, [0; 2], &[b, top]);
    set_test_flags(t, VecOp::Ptest, a, b);
}

fn from_half(t: &mut Translator<'_>, op: VecOp) {
    crate::sse::from_low64(t, op);
}

/// `vcvtps2ph xmm/m64, xmm, imm8`, or `xmm/m128, ymm, imm8`.
fn to_half(t: &mut Translator<'_>, op: VecOp) {
    let a = t.register(1);
    let imm = t.imm8() & 7;
    let ty = if a.hi.is_some() { Ty::V128 } else { Ty::I64 };
    let place = t.is_mem(0).then(|| (t.mem_addr(ty.bytes(), Access::Write), t.mem_flags()));
    if let Some((addr, flags)) = place {
        // A store that faults must leave no flags in MXCSR.
        t.b.load(ty, flags.or(MemFlags::WRITE_INTENT), addr);
    }
    let r = t.halves(op, [imm; 2], &[a]);
    let v = match r.hi {
        Some(hi) => t.b.vec(VecOp::Punpcklqdq, 0, &[r.lo, hi]),
        None => r.lo,
    };
    let Some((addr, flags)) = place else {
        return t.put_xmm(0, v);
    };
    let v = if ty == Ty::V128 { v } else { t.b.half(v, false) };
    t.b.store(flags, addr, v);
}
