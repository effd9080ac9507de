//! Vector ops that an x86-64 host computes with its own instruction, and access to the host's MXCSR.
//!
//! Inline assembly and not intrinsics: the compiler must neither fold nor reorder these, since they read the rounding
//! mode from MXCSR and leave sticky flags there. Floating-point ops need SSE4.1 ([`has_fp`]); FMA, half precision,
//! the comparisons of VEX, AES, PCLMULQDQ, GFNI and SHA each their feature.
#![allow(unsafe_code)] // Inline assembly is the only way to run an instruction under the ambient MXCSR.

use core::arch::asm;
use core::arch::x86_64::__m128i;
use std::arch::is_x86_feature_detected;

use crate::vecop::VecOp;

fn to_host(v: u128) -> __m128i {
    // SAFETY: both types are 16 bytes of plain data.
    unsafe { core::mem::transmute(v) }
}

fn from_host(v: __m128i) -> u128 {
    // SAFETY: both types are 16 bytes of plain data.
    unsafe { core::mem::transmute(v) }
}

/// The host's MXCSR.
pub(super) fn mxcsr() -> u32 {
    let mut v = 0u32;
    // SAFETY: stores four bytes to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut v, options(nostack, preserves_flags)) };
    v
}

/// Sets the host's MXCSR; all exceptions are masked whatever `v` says.
pub(super) fn set_mxcsr(v: u32) {
    let v = v & 0xffff | 0x1f80;
    // SAFETY: bits 15:0 are defined on every x86-64 processor (DAZ too), so this cannot fault; exceptions stay masked.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const v, options(nostack, preserves_flags, readonly)) };
}

/// Whether the host has every floating-point instruction used here.
fn has_fp() -> bool {
    is_x86_feature_detected!("sse4.1")
}

/// `ins a, b`: destination `a`.
macro_rules! two {
    ($ins:literal, $a:expr, $b:expr) => {{
        let mut r = to_host($a);
        // SAFETY: a register-only instruction; exceptions are masked.
        unsafe { asm!(concat!($ins, " {0}, {1}"), inout(xmm_reg) r, in(xmm_reg) to_host($b), options(nomem, nostack, preserves_flags)) };
        from_host(r)
    }};
}

/// `ins a, c, b`: destination `a`, VEX-encoded.
macro_rules! three {
    ($ins:literal, $a:expr, $b:expr, $c:expr) => {{
        let mut r = to_host($a);
        // SAFETY: a register-only instruction that the caller has asked the host for; exceptions are masked.
        unsafe {
            asm!(concat!($ins, " {0}, {1}, {2}"), inout(xmm_reg) r, in(xmm_reg) to_host($c), in(xmm_reg) to_host($b),
                options(nomem, nostack, preserves_flags));
        }
        from_host(r)
    }};
}

/// `ins r, a` where all of the destination is written.
macro_rules! one {
    ($ins:literal, $a:expr) => {{
        let r: __m128i;
        // SAFETY: a register-only instruction; exceptions are masked.
        unsafe { asm!(concat!($ins, " {0}, {1}"), out(xmm_reg) r, in(xmm_reg) to_host($a), options(nomem, nostack, preserves_flags)) };
        from_host(r)
    }};
}

/// `ins a, gpr`.
macro_rules! from_int {
    ($ins:literal, $a:expr, $b:expr) => {{
        let mut r = to_host($a);
        // SAFETY: a register-only instruction; exceptions are masked.
        unsafe { asm!($ins, inout(xmm_reg) r, in(reg) $b as u64, options(nomem, nostack, preserves_flags)) };
        from_host(r)
    }};
}

/// `ins gpr, a`.
macro_rules! to_int {
    ($ins:literal, $a:expr) => {{
        let r: u64;
        // SAFETY: a register-only instruction; exceptions are masked.
        unsafe { asm!($ins, out(reg) r, in(xmm_reg) to_host($a), options(nomem, nostack, preserves_flags)) };
        u128::from(r)
    }};
}

/// A comparison that sets ZF, PF and CF.
macro_rules! flags {
    ($ins:literal, $a:expr, $b:expr) => {{
        let r: u64;
        // SAFETY: a register-only instruction, exceptions masked; the flags pass through the stack.
        unsafe { asm!(concat!($ins, " {1}, {2}"), "pushfq", "pop {0}", out(reg) r, in(xmm_reg) to_host($a), in(xmm_reg) to_host($b)) };
        u128::from(r & 0x8d5)
    }};
}

macro_rules! with_imm {
    ($(#[$doc:meta])* $name:ident $ins:literal) => {
        $(#[$doc])*
        fn $name<const IMM: i32>(a: u128, b: u128) -> u128 {
            let mut r = to_host(a);
            // SAFETY: a register-only instruction; exceptions are masked.
            unsafe {
                asm!(concat!($ins, " {0}, {1}, {2}"), inout(xmm_reg) r, in(xmm_reg) to_host(b), const IMM,
                    options(nomem, nostack, preserves_flags));
            }
            from_host(r)
        }
    };
}
with_imm!(cmpps "cmpps");
with_imm!(cmppd "cmppd");
with_imm!(cmpss "cmpss");
with_imm!(cmpsd "cmpsd");
with_imm!(roundps "roundps");
with_imm!(roundpd "roundpd");
with_imm!(roundss "roundss");
with_imm!(roundsd "roundsd");
with_imm!(dpps "dpps");
with_imm!(dppd "dppd");
with_imm!(sha1rnds4 "sha1rnds4");
with_imm!(cvtps2ph "vcvtps2ph");

/// `ins r, a, b, imm`, VEX-encoded.
macro_rules! with_imm_vex {
    ($name:ident $ins:literal) => {
        fn $name<const IMM: i32>(a: u128, b: u128) -> u128 {
            let r: __m128i;
            // SAFETY: a register-only instruction that the caller has asked the host for; exceptions are masked.
            unsafe {
                asm!(concat!($ins, " {0}, {1}, {2}, {3}"), out(xmm_reg) r, in(xmm_reg) to_host(a), in(xmm_reg) to_host(b),
                    const IMM, options(nomem, nostack, preserves_flags));
            }
            from_host(r)
        }
    };
}
with_imm_vex!(vcmpps "vcmpps");
with_imm_vex!(vcmppd "vcmppd");
with_imm_vex!(vcmpss "vcmpss");
with_imm_vex!(vcmpsd "vcmpsd");

/// Calls `f::<imm>(a, b)` for the sixteen immediates from `16 * high`.
macro_rules! imm16 {
    ($f:ident, $high:literal, $imm:expr, $a:expr, $b:expr) => {
        match $imm & 15 {
            0 => $f::<{ $high * 16 }>($a, $b),
            1 => $f::<{ $high * 16 + 1 }>($a, $b),
            2 => $f::<{ $high * 16 + 2 }>($a, $b),
            3 => $f::<{ $high * 16 + 3 }>($a, $b),
            4 => $f::<{ $high * 16 + 4 }>($a, $b),
            5 => $f::<{ $high * 16 + 5 }>($a, $b),
            6 => $f::<{ $high * 16 + 6 }>($a, $b),
            7 => $f::<{ $high * 16 + 7 }>($a, $b),
            8 => $f::<{ $high * 16 + 8 }>($a, $b),
            9 => $f::<{ $high * 16 + 9 }>($a, $b),
            10 => $f::<{ $high * 16 + 10 }>($a, $b),
            11 => $f::<{ $high * 16 + 11 }>($a, $b),
            12 => $f::<{ $high * 16 + 12 }>($a, $b),
            13 => $f::<{ $high * 16 + 13 }>($a, $b),
            14 => $f::<{ $high * 16 + 14 }>($a, $b),
            _ => $f::<{ $high * 16 + 15 }>($a, $b),
        }
    };
}
macro_rules! imm256 {
    ($f:ident, $imm:expr, $a:expr, $b:expr) => {
        match $imm >> 4 {
            0 => imm16!($f, 0, $imm, $a, $b),
            1 => imm16!($f, 1, $imm, $a, $b),
            2 => imm16!($f, 2, $imm, $a, $b),
            3 => imm16!($f, 3, $imm, $a, $b),
            4 => imm16!($f, 4, $imm, $a, $b),
            5 => imm16!($f, 5, $imm, $a, $b),
            6 => imm16!($f, 6, $imm, $a, $b),
            7 => imm16!($f, 7, $imm, $a, $b),
            8 => imm16!($f, 8, $imm, $a, $b),
            9 => imm16!($f, 9, $imm, $a, $b),
            10 => imm16!($f, 10, $imm, $a, $b),
            11 => imm16!($f, 11, $imm, $a, $b),
            12 => imm16!($f, 12, $imm, $a, $b),
            13 => imm16!($f, 13, $imm, $a, $b),
            14 => imm16!($f, 14, $imm, $a, $b),
            _ => imm16!($f, 15, $imm, $a, $b),
        }
    };
}
macro_rules! imm8 {
    ($f:ident, $imm:expr, $a:expr, $b:expr) => {
        match $imm & 7 {
            0 => $f::<0>($a, $b),
            1 => $f::<1>($a, $b),
            2 => $f::<2>($a, $b),
            3 => $f::<3>($a, $b),
            4 => $f::<4>($a, $b),
            5 => $f::<5>($a, $b),
            6 => $f::<6>($a, $b),
            _ => $f::<7>($a, $b),
        }
    };
}

/// A floating-point op, where the host has its instruction.
pub(super) fn fp(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> Option<u128> {
    use VecOp::*;
    match op {
        Cvtph2ps | Cvtps2ph => is_x86_feature_detected!("f16c").then(|| half_precision(op, imm, a)),
        Cmpps | Cmppd | Cmpss | Cmpsd if imm & 0x18 != 0 => {
            is_x86_feature_detected!("avx").then(|| compare(op, imm, a, b))
        }
        _ if op as u16 >= Fmaddps as u16 && op as u16 <= Fmsubaddpd as u16 => {
            is_x86_feature_detected!("fma").then(|| fma(op, a, b, c))
        }
        _ => has_fp().then(|| arith(op, imm, a, b)),
    }
}

fn half_precision(op: VecOp, imm: u8, a: u128) -> u128 {
    match op {
        VecOp::Cvtph2ps => one!("vcvtph2ps", a),
        _ => imm8!(cvtps2ph, imm, a, a),
    }
}

/// Comparisons by the predicates that only VEX encodings have.
fn compare(op: VecOp, imm: u8, a: u128, b: u128) -> u128 {
    match (op, imm & 0x10 != 0) {
        (VecOp::Cmpps, false) => imm16!(vcmpps, 0, imm, a, b),
        (VecOp::Cmpps, true) => imm16!(vcmpps, 1, imm, a, b),
        (VecOp::Cmppd, false) => imm16!(vcmppd, 0, imm, a, b),
        (VecOp::Cmppd, true) => imm16!(vcmppd, 1, imm, a, b),
        (VecOp::Cmpss, false) => imm16!(vcmpss, 0, imm, a, b),
        (VecOp::Cmpss, true) => imm16!(vcmpss, 1, imm, a, b),
        (_, false) => imm16!(vcmpsd, 0, imm, a, b),
        (_, true) => imm16!(vcmpsd, 1, imm, a, b),
    }
}

/// Fused multiplication and addition: the 132 forms, whose destination is `a`.
fn fma(op: VecOp, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    match op {
        Fmaddps => three!("vfmadd132ps", a, b, c),
        Fmaddpd => three!("vfmadd132pd", a, b, c),
        Fmaddss => three!("vfmadd132ss", a, b, c),
        Fmaddsd => three!("vfmadd132sd", a, b, c),
        Fmsubps => three!("vfmsub132ps", a, b, c),
        Fmsubpd => three!("vfmsub132pd", a, b, c),
        Fmsubss => three!("vfmsub132ss", a, b, c),
        Fmsubsd => three!("vfmsub132sd", a, b, c),
        Fnmaddps => three!("vfnmadd132ps", a, b, c),
        Fnmaddpd => three!("vfnmadd132pd", a, b, c),
        Fnmaddss => three!("vfnmadd132ss", a, b, c),
        Fnmaddsd => three!("vfnmadd132sd", a, b, c),
        Fnmsubps => three!("vfnmsub132ps", a, b, c),
        Fnmsubpd => three!("vfnmsub132pd", a, b, c),
        Fnmsubss => three!("vfnmsub132ss", a, b, c),
        Fnmsubsd => three!("vfnmsub132sd", a, b, c),
        Fmaddsubps => three!("vfmaddsub132ps", a, b, c),
        Fmaddsubpd => three!("vfmaddsub132pd", a, b, c),
        Fmsubaddps => three!("vfmsubadd132ps", a, b, c),
        _ => three!("vfmsubadd132pd", a, b, c),
    }
}

/// Floating-point ops of two operands.
fn arith(op: VecOp, imm: u8, a: u128, b: u128) -> u128 {
    use VecOp::*;
    match op {
        Addps => two!("addps", a, b),
        Addpd => two!("addpd", a, b),
        Addss => two!("addss", a, b),
        Addsd => two!("addsd", a, b),
        Subps => two!("subps", a, b),
        Subpd => two!("subpd", a, b),
        Subss => two!("subss", a, b),
        Subsd => two!("subsd", a, b),
        Mulps => two!("mulps", a, b),
        Mulpd => two!("mulpd", a, b),
        Mulss => two!("mulss", a, b),
        Mulsd => two!("mulsd", a, b),
        Divps => two!("divps", a, b),
        Divpd => two!("divpd", a, b),
        Divss => two!("divss", a, b),
        Divsd => two!("divsd", a, b),
        Minps => two!("minps", a, b),
        Minpd => two!("minpd", a, b),
        Minss => two!("minss", a, b),
        Minsd => two!("minsd", a, b),
        Maxps => two!("maxps", a, b),
        Maxpd => two!("maxpd", a, b),
        Maxss => two!("maxss", a, b),
        Maxsd => two!("maxsd", a, b),
        Sqrtps => one!("sqrtps", a),
        Sqrtpd => one!("sqrtpd", a),
        Sqrtss => two!("sqrtss", a, b),
        Sqrtsd => two!("sqrtsd", a, b),
        Rcpps => one!("rcpps", a),
        Rcpss => two!("rcpss", a, b),
        Rsqrtps => one!("rsqrtps", a),
        Rsqrtss => two!("rsqrtss", a, b),
        Addsubps => two!("addsubps", a, b),
        Addsubpd => two!("addsubpd", a, b),
        Haddps => two!("haddps", a, b),
        Haddpd => two!("haddpd", a, b),
        Hsubps => two!("hsubps", a, b),
        Hsubpd => two!("hsubpd", a, b),
        Cmpps => imm8!(cmpps, imm, a, b),
        Cmppd => imm8!(cmppd, imm, a, b),
        Cmpss => imm8!(cmpss, imm, a, b),
        Cmpsd => imm8!(cmpsd, imm, a, b),
        Comiss => flags!("comiss", a, b),
        Comisd => flags!("comisd", a, b),
        Ucomiss => flags!("ucomiss", a, b),
        Ucomisd => flags!("ucomisd", a, b),
        Roundps => imm16!(roundps, 0, imm, a, a),
        Roundpd => imm16!(roundpd, 0, imm, a, a),
        Roundss => imm16!(roundss, 0, imm, a, b),
        Roundsd => imm16!(roundsd, 0, imm, a, b),
        Dpps => imm256!(dpps, imm, a, b),
        Dppd => imm256!(dppd, imm, a, b),
        _ => convert(op, a, b),
    }
}

fn convert(op: VecOp, a: u128, b: u128) -> u128 {
    use VecOp::*;
    match op {
        Cvtdq2ps => one!("cvtdq2ps", a),
        Cvtdq2pd => one!("cvtdq2pd", a),
        Cvtps2dq => one!("cvtps2dq", a),
        Cvttps2dq => one!("cvttps2dq", a),
        Cvtpd2dq => one!("cvtpd2dq", a),
        Cvttpd2dq => one!("cvttpd2dq", a),
        Cvtpd2ps => one!("cvtpd2ps", a),
        Cvtps2pd => one!("cvtps2pd", a),
        Cvtss2sd => two!("cvtss2sd", a, b),
        Cvtsd2ss => two!("cvtsd2ss", a, b),
        Cvtsi2ss32 => from_int!("cvtsi2ss {0}, {1:e}", a, b),
        Cvtsi2ss64 => from_int!("cvtsi2ss {0}, {1}", a, b),
        Cvtsi2sd32 => from_int!("cvtsi2sd {0}, {1:e}", a, b),
        Cvtsi2sd64 => from_int!("cvtsi2sd {0}, {1}", a, b),
        Cvtss2si32 => to_int!("cvtss2si {0:e}, {1}", a),
        Cvtss2si64 => to_int!("cvtss2si {0}, {1}", a),
        Cvttss2si32 => to_int!("cvttss2si {0:e}, {1}", a),
        Cvttss2si64 => to_int!("cvttss2si {0}, {1}", a),
        Cvtsd2si32 => to_int!("cvtsd2si {0:e}, {1}", a),
        Cvtsd2si64 => to_int!("cvtsd2si {0}, {1}", a),
        Cvttsd2si32 => to_int!("cvttsd2si {0:e}, {1}", a),
        Cvttsd2si64 => to_int!("cvttsd2si {0}, {1}", a),
        _ => unreachable!("{op:?} is not a floating-point op"),
    }
}

/// `ins a, b, 0`.
macro_rules! affine {
    ($ins:literal, $a:expr, $b:expr) => {{
        let mut r = to_host($a);
        // SAFETY: a register-only instruction that does not fault.
        unsafe { asm!(concat!($ins, " {0}, {1}, 0"), inout(xmm_reg) r, in(xmm_reg) to_host($b), options(nomem, nostack, preserves_flags)) };
        from_host(r)
    }};
}

fn splat(byte: u8) -> u128 {
    u128::from_le_bytes([byte; 16])
}

/// Cryptographic ops, where the host has the instruction.
pub(super) fn crypto(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> Option<u128> {
    use VecOp::*;
    let there = match op {
        Aesenc | Aesenclast | Aesdec | Aesdeclast | Aesimc | Aeskeygenassist => is_x86_feature_detected!("aes"),
        Pclmulqdq => is_x86_feature_detected!("pclmulqdq"),
        Gf2p8mulb | Gf2p8affineqb | Gf2p8affineinvqb => is_x86_feature_detected!("gfni"),
        _ => is_x86_feature_detected!("sha"),
    };
    there.then(|| match op {
        Aesenc => two!("aesenc", a, b),
        Aesenclast => two!("aesenclast", a, b),
        Aesdec => two!("aesdec", a, b),
        Aesdeclast => two!("aesdeclast", a, b),
        Aesimc => one!("aesimc", a),
        Aeskeygenassist => {
            let rcon = u128::from(imm) << 32 | u128::from(imm) << 96;
            let r: __m128i;
            // SAFETY: a register-only instruction that does not fault.
            unsafe { asm!("aeskeygenassist {0}, {1}, 0", out(xmm_reg) r, in(xmm_reg) to_host(a), options(nomem, nostack, preserves_flags)) };
            from_host(r) ^ rcon
        }
        Pclmulqdq => {
            let half = |v: u128, bit: u8| if imm & bit != 0 { v >> 64 } else { v };
            let mut r = to_host(half(a, 1));
            // SAFETY: a register-only instruction that does not fault.
            unsafe {
                asm!("pclmulqdq {0}, {1}, 0", inout(xmm_reg) r, in(xmm_reg) to_host(half(b, 0x10)), options(nomem, nostack, preserves_flags));
            }
            from_host(r)
        }
        Gf2p8mulb => two!("gf2p8mulb", a, b),
        Gf2p8affineqb => affine!("gf2p8affineqb", a, b) ^ splat(imm),
        Gf2p8affineinvqb => affine!("gf2p8affineinvqb", a, b) ^ splat(imm),
        Sha1rnds4 => match imm & 3 {
            0 => sha1rnds4::<0>(a, b),
            1 => sha1rnds4::<1>(a, b),
            2 => sha1rnds4::<2>(a, b),
            _ => sha1rnds4::<3>(a, b),
        },
        Sha1nexte => two!("sha1nexte", a, b),
        Sha1msg1 => two!("sha1msg1", a, b),
        Sha1msg2 => two!("sha1msg2", a, b),
        Sha256rnds2 => {
            let mut r = to_host(a);
            // SAFETY: a register-only instruction that does not fault; XMM0 is its implicit operand.
            unsafe {
                asm!("sha256rnds2 {0}, {1}, xmm0", inout(xmm_reg) r, in(xmm_reg) to_host(b), in("xmm0") to_host(c),
                    options(nomem, nostack, preserves_flags));
            }
            from_host(r)
        }
        Sha256msg1 => two!("sha256msg1", a, b),
        _ => two!("sha256msg2", a, b),
    })
}
