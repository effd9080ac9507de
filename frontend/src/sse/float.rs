//! SSE floating-point arithmetic and comparison.

use iced_x86::Code;
use twofold_arch::cpuid::Feature;
use twofold_ir::VecOp;

use crate::sse::{binary, binary_imm, rows, scalar32, scalar32_imm, scalar64, scalar64_imm, unary, unary_imm};
use crate::table::{Need, Row};
use crate::translator::Translator;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;
/// CMPSD by form: the string instruction has the same mnemonic.
pub const ROWS_ONE: &[Row] =
    &[Row::one(Code::Cmpsd_xmm_xmmm64_imm8, |t| compare64(t, VecOp::Cmpsd)).feature(Feature::Sse2).need(Need::SSE)];

rows! { BY_OP;
    Sse binary: Addps Subps Mulps Divps Minps Maxps;
    Sse2 binary: Addpd Subpd Mulpd Divpd Minpd Maxpd;
    Sse scalar32: Addss Subss Mulss Divss Minss Maxss Sqrtss Rcpss Rsqrtss;
    Sse2 scalar64: Addsd Subsd Mulsd Divsd Minsd Maxsd Sqrtsd;
    Sse unary: Sqrtps Rcpps Rsqrtps;
    Sse2 unary: Sqrtpd;
    Sse compare: Cmpps;
    Sse2 compare: Cmppd;
    Sse compare32: Cmpss;
    Sse flags32: Comiss Ucomiss;
    Sse2 flags64: Comisd Ucomisd;
    Sse3 binary: Addsubps Addsubpd Haddps Haddpd Hsubps Hsubpd;
    Sse41 binary_imm: Dpps Dppd;
    Sse41 unary_imm: Roundps Roundpd;
    Sse41 scalar32_imm: Roundss;
    Sse41 scalar64_imm: Roundsd;
}

/// `cmpps xmm, xmm/m128, imm8`: three bits of predicate in the legacy encoding.
fn compare(t: &mut Translator<'_>, op: VecOp) {
    t.insn.set_immediate8(t.imm8() & 7);
    binary_imm(t, op);
}
fn compare32(t: &mut Translator<'_>, op: VecOp) {
    t.insn.set_immediate8(t.imm8() & 7);
    scalar32_imm(t, op);
}
fn compare64(t: &mut Translator<'_>, op: VecOp) {
    t.insn.set_immediate8(t.imm8() & 7);
    scalar64_imm(t, op);
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
