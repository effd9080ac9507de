//! SSE floating-point arithmetic and comparison.

use iced_x86::{Code, Mnemonic};
use twofold_arch::cpuid::Feature;
use twofold_ir::VecOp;

use crate::sse::{
    binary, binary_imm, binary_with, rows, scalar, scalar32, scalar32_imm, scalar64, scalar64_imm, unary, unary_imm,
};
use crate::table::{Need, Row};
use crate::translator::Translator;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// CMPSD by form: the string instruction has the same mnemonic.
pub const ROWS_ONE: &[Row] = &[
    Row::one(Code::Cmpsd_xmm_xmmm64_imm8, |t| compare64(t, VecOp::Cmpsd)).feature(Feature::Sse2).need(Need::SSE),
    Row::vex(Mnemonic::Vcmpsd, |t| compare64(t, VecOp::Cmpsd)),
];

rows! { BY_OP;
    Sse binary: Addps/Vaddps Subps/Vsubps Mulps/Vmulps Divps/Vdivps Minps/Vminps Maxps/Vmaxps;
    Sse2 binary: Addpd/Vaddpd Subpd/Vsubpd Mulpd/Vmulpd Divpd/Vdivpd Minpd/Vminpd Maxpd/Vmaxpd;
    Sse scalar32: Addss/Vaddss Subss/Vsubss Mulss/Vmulss Divss/Vdivss Minss/Vminss Maxss/Vmaxss Sqrtss/Vsqrtss
        Rcpss/Vrcpss Rsqrtss/Vrsqrtss;
    Sse2 scalar64: Addsd/Vaddsd Subsd/Vsubsd Mulsd/Vmulsd Divsd/Vdivsd Minsd/Vminsd Maxsd/Vmaxsd Sqrtsd/Vsqrtsd;
    Sse unary: Sqrtps/Vsqrtps Rcpps/Vrcpps Rsqrtps/Vrsqrtps;
    Sse2 unary: Sqrtpd/Vsqrtpd;
    Sse compare: Cmpps/Vcmpps;
    Sse2 compare: Cmppd/Vcmppd;
    Sse compare32: Cmpss/Vcmpss;
    Sse flags32: Comiss/Vcomiss Ucomiss/Vucomiss;
    Sse2 flags64: Comisd/Vcomisd Ucomisd/Vucomisd;
    Sse3 binary: Addsubps/Vaddsubps Addsubpd/Vaddsubpd Haddps/Vhaddps Haddpd/Vhaddpd Hsubps/Vhsubps Hsubpd/Vhsubpd;
    Sse41 binary_imm: Dpps/Vdpps Dppd/Vdppd;
    Sse41 unary_imm: Roundps/Vroundps Roundpd/Vroundpd;
    Sse41 scalar32_imm: Roundss/Vroundss;
    Sse41 scalar64_imm: Roundsd/Vroundsd;
}

/// The predicate: three bits in the legacy encoding, five in VEX.
fn predicate(t: &Translator<'_>) -> u8 {
    t.imm8() & if t.vex { 0x1f } else { 7 }
}
/// `cmpps xmm, xmm/m128, imm8`.
fn compare(t: &mut Translator<'_>, op: VecOp) {
    binary_with(t, op, predicate(t));
}
fn compare32(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 4, predicate(t));
}
fn compare64(t: &mut Translator<'_>, op: VecOp) {
    scalar(t, op, 8, predicate(t));
}

fn flags32(t: &mut Translator<'_>, op: VecOp) {
    flags(t, op, 4);
}
fn flags64(t: &mut Translator<'_>, op: VecOp) {
    flags(t, op, 8);
}

fn flags(t: &mut Translator<'_>, op: VecOp, bytes: u32) {
    let a = t.xmm(0);
    let b = t.xmm_or_part(1, bytes);
    let f = t.vector(op, 0, &[a, b]);
    t.b.set_flags(f);
}
