//! Vector ops: the list, operand types, and [`eval`], which computes each.
//!
//! Ops are named after the instruction they compute (without VEX): two-operand instructions `op xmm1, xmm2` are
//! `op(a, b)` with `a` the destination's old value. A scalar op (`..ss`, `..sd`) works on the low lane and takes the other
//! lanes from `a`. MMX instructions use the same ops with the value in the low 64 bits; the front end composes the few whose lanes
//! depend on the width. Results of type I64 are zero-extended; flag images have RFLAGS positions.
//!
//! Invariants: ops without `touches_mxcsr` are pure functions of operands and `imm`, total, and the same on every host.
//! Floating-point ops run under the host's MXCSR, which the runtime keeps equal to the guest's (all exceptions masked)
//! while guest code runs; sticky flags collect there.

use crate::op::Ty;

mod crypto;
mod fp;
mod fp_portable;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
mod host;
mod int;
mod lanes;
mod shuffle;
mod string;

pub use fp::{host_mxcsr, set_host_mxcsr};

/// Operand and result types of a vector op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VecSig {
    /// Operand types; `None` after the last.
    pub args: [Option<Ty>; 3],
    /// Result type.
    pub result: Ty,
    /// Whether the op depends on MXCSR and sets its flags.
    pub touches_mxcsr: bool,
}

/// Which file of `vecop/` computes an op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Group {
    Int,
    Shuffle,
    Fp,
    String,
    Crypto,
}

const fn ty(letter: &str) -> Option<Ty> {
    match letter.as_bytes() {
        b"v" => Some(Ty::V128),
        b"q" => Some(Ty::I64),
        _ => None,
    }
}

/// `group { Variant a b c = result [mxcsr]; }` with operand letters `v` (V128), `q` (I64), `_` (none).
macro_rules! vec_ops {
    ($($group:ident $mxcsr:literal { $($(#[$doc:meta])* $variant:ident $name:literal $a:literal $b:literal $c:literal $r:literal;)* })*) => {
        /// A vector op.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        #[allow(missing_docs)] // named after the instructions; the others have a comment
        pub enum VecOp { $($($(#[$doc])* $variant,)*)* }

        impl VecOp {
            /// Every op, in the order of its number.
            pub const ALL: &'static [VecOp] = &[$($(VecOp::$variant,)*)*];
            const TABLE: &'static [(&'static str, VecSig, Group)] = &[$($((
                $name,
                VecSig {
                    args: [ty($a), ty($b), ty($c)],
                    result: if let Some(t) = ty($r) { t } else { Ty::V128 },
                    touches_mxcsr: $mxcsr,
                },
                Group::$group,
            ),)*)*];
        }
    };
}

vec_ops! {
    Int false {
        And "and" "v" "v" "_" "v";
        Or "or" "v" "v" "_" "v";
        Xor "xor" "v" "v" "_" "v";
        /// !a & b.
        Andn "andn" "v" "v" "_" "v";
        Paddb "paddb" "v" "v" "_" "v";
        Paddw "paddw" "v" "v" "_" "v";
        Paddd "paddd" "v" "v" "_" "v";
        Paddq "paddq" "v" "v" "_" "v";
        Psubb "psubb" "v" "v" "_" "v";
        Psubw "psubw" "v" "v" "_" "v";
        Psubd "psubd" "v" "v" "_" "v";
        Psubq "psubq" "v" "v" "_" "v";
        Paddsb "paddsb" "v" "v" "_" "v";
        Paddsw "paddsw" "v" "v" "_" "v";
        Paddusb "paddusb" "v" "v" "_" "v";
        Paddusw "paddusw" "v" "v" "_" "v";
        Psubsb "psubsb" "v" "v" "_" "v";
        Psubsw "psubsw" "v" "v" "_" "v";
        Psubusb "psubusb" "v" "v" "_" "v";
        Psubusw "psubusw" "v" "v" "_" "v";
        Pmullw "pmullw" "v" "v" "_" "v";
        Pmulhw "pmulhw" "v" "v" "_" "v";
        Pmulhuw "pmulhuw" "v" "v" "_" "v";
        Pmulhrsw "pmulhrsw" "v" "v" "_" "v";
        Pmulld "pmulld" "v" "v" "_" "v";
        Pmuludq "pmuludq" "v" "v" "_" "v";
        Pmuldq "pmuldq" "v" "v" "_" "v";
        Pmaddwd "pmaddwd" "v" "v" "_" "v";
        /// Unsigned bytes of `a` times signed bytes of `b`.
        Pmaddubsw "pmaddubsw" "v" "v" "_" "v";
        Pcmpeqb "pcmpeqb" "v" "v" "_" "v";
        Pcmpeqw "pcmpeqw" "v" "v" "_" "v";
        Pcmpeqd "pcmpeqd" "v" "v" "_" "v";
        Pcmpeqq "pcmpeqq" "v" "v" "_" "v";
        Pcmpgtb "pcmpgtb" "v" "v" "_" "v";
        Pcmpgtw "pcmpgtw" "v" "v" "_" "v";
        Pcmpgtd "pcmpgtd" "v" "v" "_" "v";
        Pcmpgtq "pcmpgtq" "v" "v" "_" "v";
        Pminub "pminub" "v" "v" "_" "v";
        Pminuw "pminuw" "v" "v" "_" "v";
        Pminud "pminud" "v" "v" "_" "v";
        Pminsb "pminsb" "v" "v" "_" "v";
        Pminsw "pminsw" "v" "v" "_" "v";
        Pminsd "pminsd" "v" "v" "_" "v";
        Pmaxub "pmaxub" "v" "v" "_" "v";
        Pmaxuw "pmaxuw" "v" "v" "_" "v";
        Pmaxud "pmaxud" "v" "v" "_" "v";
        Pmaxsb "pmaxsb" "v" "v" "_" "v";
        Pmaxsw "pmaxsw" "v" "v" "_" "v";
        Pmaxsd "pmaxsd" "v" "v" "_" "v";
        Pavgb "pavgb" "v" "v" "_" "v";
        Pavgw "pavgw" "v" "v" "_" "v";
        Psadbw "psadbw" "v" "v" "_" "v";
        /// Block offsets from `imm`.
        Mpsadbw "mpsadbw" "v" "v" "_" "v";
        Pabsb "pabsb" "v" "_" "_" "v";
        Pabsw "pabsw" "v" "_" "_" "v";
        Pabsd "pabsd" "v" "_" "_" "v";
        Psignb "psignb" "v" "v" "_" "v";
        Psignw "psignw" "v" "v" "_" "v";
        Psignd "psignd" "v" "v" "_" "v";
        Phaddw "phaddw" "v" "v" "_" "v";
        Phaddd "phaddd" "v" "v" "_" "v";
        Phaddsw "phaddsw" "v" "v" "_" "v";
        Phsubw "phsubw" "v" "v" "_" "v";
        Phsubd "phsubd" "v" "v" "_" "v";
        Phsubsw "phsubsw" "v" "v" "_" "v";
        Phminposuw "phminposuw" "v" "_" "_" "v";
        /// Shift count: the low 64 bits of `b`; a count of the lane width or more gives 0 (sign fill for `Psra`).
        Psllw "psllw" "v" "v" "_" "v";
        Pslld "pslld" "v" "v" "_" "v";
        Psllq "psllq" "v" "v" "_" "v";
        Psrlw "psrlw" "v" "v" "_" "v";
        Psrld "psrld" "v" "v" "_" "v";
        Psrlq "psrlq" "v" "v" "_" "v";
        Psraw "psraw" "v" "v" "_" "v";
        Psrad "psrad" "v" "v" "_" "v";
        /// The same with the count in `imm` (0..=255).
        PsllwImm "psllw_imm" "v" "_" "_" "v";
        PslldImm "pslld_imm" "v" "_" "_" "v";
        PsllqImm "psllq_imm" "v" "_" "_" "v";
        PsrlwImm "psrlw_imm" "v" "_" "_" "v";
        PsrldImm "psrld_imm" "v" "_" "_" "v";
        PsrlqImm "psrlq_imm" "v" "_" "_" "v";
        PsrawImm "psraw_imm" "v" "_" "_" "v";
        PsradImm "psrad_imm" "v" "_" "_" "v";
        /// The same with a count for each lane.
        Psllvd "psllvd" "v" "v" "_" "v";
        Psllvq "psllvq" "v" "v" "_" "v";
        Psrlvd "psrlvd" "v" "v" "_" "v";
        Psrlvq "psrlvq" "v" "v" "_" "v";
        Psravd "psravd" "v" "v" "_" "v";
        /// Shifts of the whole register by `imm` bytes.
        Pslldq "pslldq" "v" "_" "_" "v";
        Psrldq "psrldq" "v" "_" "_" "v";
        /// I64: flags image of PTEST (ZF: a & b = 0; CF: !a & b = 0).
        Ptest "ptest" "v" "v" "_" "q";
        /// I64: the top bits of the lanes.
        Pmovmskb "pmovmskb" "v" "_" "_" "q";
        Movmskps "movmskps" "v" "_" "_" "q";
        Movmskpd "movmskpd" "v" "_" "_" "q";
    }
    Shuffle false {
        Packsswb "packsswb" "v" "v" "_" "v";
        Packssdw "packssdw" "v" "v" "_" "v";
        Packuswb "packuswb" "v" "v" "_" "v";
        Packusdw "packusdw" "v" "v" "_" "v";
        Punpcklbw "punpcklbw" "v" "v" "_" "v";
        Punpcklwd "punpcklwd" "v" "v" "_" "v";
        /// Also UNPCKLPS.
        Punpckldq "punpckldq" "v" "v" "_" "v";
        /// Also UNPCKLPD.
        Punpcklqdq "punpcklqdq" "v" "v" "_" "v";
        Punpckhbw "punpckhbw" "v" "v" "_" "v";
        Punpckhwd "punpckhwd" "v" "v" "_" "v";
        /// Also UNPCKHPS.
        Punpckhdq "punpckhdq" "v" "v" "_" "v";
        /// Also UNPCKHPD.
        Punpckhqdq "punpckhqdq" "v" "v" "_" "v";
        Pshufb "pshufb" "v" "v" "_" "v";
        /// Also MOVSLDUP (0xa0), MOVSHDUP (0xf5) and MOVDDUP (0x44).
        Pshufd "pshufd" "v" "_" "_" "v";
        Pshuflw "pshuflw" "v" "_" "_" "v";
        Pshufhw "pshufhw" "v" "_" "_" "v";
        Shufps "shufps" "v" "v" "_" "v";
        Shufpd "shufpd" "v" "v" "_" "v";
        /// `a:b` (`b` low) shifted right by `imm` bytes.
        Palignr "palignr" "v" "v" "_" "v";
        /// Insert the low bits of the I64 `b` at lane `imm` (modulo the lanes).
        Pinsrb "pinsrb" "v" "q" "_" "v";
        Pinsrw "pinsrw" "v" "q" "_" "v";
        Pinsrd "pinsrd" "v" "q" "_" "v";
        Pinsrq "pinsrq" "v" "q" "_" "v";
        /// I64: lane `imm` (modulo the lanes), zero-extended.
        Pextrb "pextrb" "v" "_" "_" "q";
        Pextrw "pextrw" "v" "_" "_" "q";
        Pextrd "pextrd" "v" "_" "_" "q";
        Pextrq "pextrq" "v" "_" "_" "q";
        /// Register form: lane `imm[7:6]` of `b` to lane `imm[5:4]`, then zeroes by `imm[3:0]`.
        Insertps "insertps" "v" "v" "_" "v";
        /// Lane by lane `b` where the top bit of `c`'s lane is set, else `a`.
        Pblendvb "pblendvb" "v" "v" "v" "v";
        Blendvps "blendvps" "v" "v" "v" "v";
        Blendvpd "blendvpd" "v" "v" "v" "v";
        Pblendw "pblendw" "v" "v" "_" "v";
        Blendps "blendps" "v" "v" "_" "v";
        Blendpd "blendpd" "v" "v" "_" "v";
        /// Low lane from `b`, the rest from `a` (MOVSS, MOVSD between registers).
        Movss "movss" "v" "v" "_" "v";
        Movsd "movsd" "v" "v" "_" "v";
        Pmovsxbw "pmovsxbw" "v" "_" "_" "v";
        Pmovsxbd "pmovsxbd" "v" "_" "_" "v";
        Pmovsxbq "pmovsxbq" "v" "_" "_" "v";
        Pmovsxwd "pmovsxwd" "v" "_" "_" "v";
        Pmovsxwq "pmovsxwq" "v" "_" "_" "v";
        Pmovsxdq "pmovsxdq" "v" "_" "_" "v";
        Pmovzxbw "pmovzxbw" "v" "_" "_" "v";
        Pmovzxbd "pmovzxbd" "v" "_" "_" "v";
        Pmovzxbq "pmovzxbq" "v" "_" "_" "v";
        Pmovzxwd "pmovzxwd" "v" "_" "_" "v";
        Pmovzxwq "pmovzxwq" "v" "_" "_" "v";
        Pmovzxdq "pmovzxdq" "v" "_" "_" "v";
        /// Lanes of `a` chosen by the lanes of `b`: their bits 1:0, or bit 1.
        Permilps "permilps" "v" "v" "_" "v";
        Permilpd "permilpd" "v" "v" "_" "v";
        /// Four of the eight lanes of `a` (0 to 3) and `b` (4 to 7), chosen by bits 2:0 of `c`'s lanes: half of VPERMD.
        Permd "permd" "v" "v" "v" "v";
    }
    Fp true {
        Addps "addps" "v" "v" "_" "v";
        Addpd "addpd" "v" "v" "_" "v";
        Addss "addss" "v" "v" "_" "v";
        Addsd "addsd" "v" "v" "_" "v";
        Subps "subps" "v" "v" "_" "v";
        Subpd "subpd" "v" "v" "_" "v";
        Subss "subss" "v" "v" "_" "v";
        Subsd "subsd" "v" "v" "_" "v";
        Mulps "mulps" "v" "v" "_" "v";
        Mulpd "mulpd" "v" "v" "_" "v";
        Mulss "mulss" "v" "v" "_" "v";
        Mulsd "mulsd" "v" "v" "_" "v";
        Divps "divps" "v" "v" "_" "v";
        Divpd "divpd" "v" "v" "_" "v";
        Divss "divss" "v" "v" "_" "v";
        Divsd "divsd" "v" "v" "_" "v";
        Minps "minps" "v" "v" "_" "v";
        Minpd "minpd" "v" "v" "_" "v";
        Minss "minss" "v" "v" "_" "v";
        Minsd "minsd" "v" "v" "_" "v";
        Maxps "maxps" "v" "v" "_" "v";
        Maxpd "maxpd" "v" "v" "_" "v";
        Maxss "maxss" "v" "v" "_" "v";
        Maxsd "maxsd" "v" "v" "_" "v";
        Sqrtps "sqrtps" "v" "_" "_" "v";
        Sqrtpd "sqrtpd" "v" "_" "_" "v";
        /// The root of `b`'s low lane, the rest from `a`.
        Sqrtss "sqrtss" "v" "v" "_" "v";
        Sqrtsd "sqrtsd" "v" "v" "_" "v";
        /// Comparison predicate in `imm[4:0]`.
        Cmpps "cmpps" "v" "v" "_" "v";
        Cmppd "cmppd" "v" "v" "_" "v";
        Cmpss "cmpss" "v" "v" "_" "v";
        Cmpsd "cmpsd" "v" "v" "_" "v";
        /// I64: flags image (ZF, PF, CF; OF, SF, AF are 0).
        Comiss "comiss" "v" "v" "_" "q";
        Comisd "comisd" "v" "v" "_" "q";
        Ucomiss "ucomiss" "v" "v" "_" "q";
        Ucomisd "ucomisd" "v" "v" "_" "q";
        Addsubps "addsubps" "v" "v" "_" "v";
        Addsubpd "addsubpd" "v" "v" "_" "v";
        Haddps "haddps" "v" "v" "_" "v";
        Haddpd "haddpd" "v" "v" "_" "v";
        Hsubps "hsubps" "v" "v" "_" "v";
        Hsubpd "hsubpd" "v" "v" "_" "v";
        Dpps "dpps" "v" "v" "_" "v";
        Dppd "dppd" "v" "v" "_" "v";
        /// Rounding control in `imm[3:0]`.
        Roundps "roundps" "v" "_" "_" "v";
        Roundpd "roundpd" "v" "_" "_" "v";
        Roundss "roundss" "v" "v" "_" "v";
        Roundsd "roundsd" "v" "v" "_" "v";
        Cvtdq2ps "cvtdq2ps" "v" "_" "_" "v";
        Cvtps2dq "cvtps2dq" "v" "_" "_" "v";
        Cvttps2dq "cvttps2dq" "v" "_" "_" "v";
        /// Results in the low 64 bits, zeroes above.
        Cvtpd2dq "cvtpd2dq" "v" "_" "_" "v";
        Cvttpd2dq "cvttpd2dq" "v" "_" "_" "v";
        Cvtpd2ps "cvtpd2ps" "v" "_" "_" "v";
        /// From the low 64 bits.
        Cvtps2pd "cvtps2pd" "v" "_" "_" "v";
        Cvtss2sd "cvtss2sd" "v" "v" "_" "v";
        Cvtsd2ss "cvtsd2ss" "v" "v" "_" "v";
        /// The I64 `b`'s low 32 bits, or all 64, signed, to the low lane.
        Cvtsi2ss32 "cvtsi2ss32" "v" "q" "_" "v";
        Cvtsi2ss64 "cvtsi2ss64" "v" "q" "_" "v";
        Cvtsi2sd32 "cvtsi2sd32" "v" "q" "_" "v";
        Cvtsi2sd64 "cvtsi2sd64" "v" "q" "_" "v";
        /// I64: zero-extended for 32; the integer indefinite value when invalid.
        Cvtss2si32 "cvtss2si32" "v" "_" "_" "q";
        Cvtss2si64 "cvtss2si64" "v" "_" "_" "q";
        Cvttss2si32 "cvttss2si32" "v" "_" "_" "q";
        Cvttss2si64 "cvttss2si64" "v" "_" "_" "q";
        Cvtsd2si32 "cvtsd2si32" "v" "_" "_" "q";
        Cvtsd2si64 "cvtsd2si64" "v" "_" "_" "q";
        Cvttsd2si32 "cvttsd2si32" "v" "_" "_" "q";
        Cvttsd2si64 "cvttsd2si64" "v" "_" "_" "q";
        /// `a * b + c` (Fnm: `-(a * b) + c`; ..sub: `- c`), rounded once. Of several NaNs the first in the order a, b, c.
        Fmaddps "fmaddps" "v" "v" "v" "v";
        Fmaddpd "fmaddpd" "v" "v" "v" "v";
        Fmaddss "fmaddss" "v" "v" "v" "v";
        Fmaddsd "fmaddsd" "v" "v" "v" "v";
        Fmsubps "fmsubps" "v" "v" "v" "v";
        Fmsubpd "fmsubpd" "v" "v" "v" "v";
        Fmsubss "fmsubss" "v" "v" "v" "v";
        Fmsubsd "fmsubsd" "v" "v" "v" "v";
        Fnmaddps "fnmaddps" "v" "v" "v" "v";
        Fnmaddpd "fnmaddpd" "v" "v" "v" "v";
        Fnmaddss "fnmaddss" "v" "v" "v" "v";
        Fnmaddsd "fnmaddsd" "v" "v" "v" "v";
        Fnmsubps "fnmsubps" "v" "v" "v" "v";
        Fnmsubpd "fnmsubpd" "v" "v" "v" "v";
        Fnmsubss "fnmsubss" "v" "v" "v" "v";
        Fnmsubsd "fnmsubsd" "v" "v" "v" "v";
        /// Subtracts in the even lanes and adds in the odd ones, or the other way round.
        Fmaddsubps "fmaddsubps" "v" "v" "v" "v";
        Fmaddsubpd "fmaddsubpd" "v" "v" "v" "v";
        Fmsubaddps "fmsubaddps" "v" "v" "v" "v";
        Fmsubaddpd "fmsubaddpd" "v" "v" "v" "v";
        /// From four half-precision numbers in the low 64 bits.
        Cvtph2ps "cvtph2ps" "v" "_" "_" "v";
        /// Rounding in `imm[1:0]`, or MXCSR's with `imm[2]`; results in the low 64 bits, zeroes above.
        Cvtps2ph "cvtps2ph" "v" "_" "_" "v";
    }
    Fp false {
        /// Exact; from the low 64 bits.
        Cvtdq2pd "cvtdq2pd" "v" "_" "_" "v";
        /// Approximations; on an x86 host the host's own (the SDM fixes the error only).
        Rcpps "rcpps" "v" "_" "_" "v";
        Rcpss "rcpss" "v" "v" "_" "v";
        Rsqrtps "rsqrtps" "v" "_" "_" "v";
        Rsqrtss "rsqrtss" "v" "v" "_" "v";
    }
    String false {
        /// PCMPISTRI's index (I64), PCMPISTRM's mask, and the flags image both set (I64).
        PcmpistrIndex "pcmpistr_index" "v" "v" "_" "q";
        PcmpistrMask "pcmpistr_mask" "v" "v" "_" "v";
        PcmpistrFlags "pcmpistr_flags" "v" "v" "_" "q";
        /// The same with explicit lengths: `c` holds the length of `a` (rAX) in the low half and of `b` (rDX) in the high half, both
        /// sign-extended to 64 bits.
        PcmpestrIndex "pcmpestr_index" "v" "v" "v" "q";
        PcmpestrMask "pcmpestr_mask" "v" "v" "v" "v";
        PcmpestrFlags "pcmpestr_flags" "v" "v" "v" "q";
    }
    Crypto false {
        Aesenc "aesenc" "v" "v" "_" "v";
        Aesenclast "aesenclast" "v" "v" "_" "v";
        Aesdec "aesdec" "v" "v" "_" "v";
        Aesdeclast "aesdeclast" "v" "v" "_" "v";
        Aesimc "aesimc" "v" "_" "_" "v";
        Aeskeygenassist "aeskeygenassist" "v" "_" "_" "v";
        Pclmulqdq "pclmulqdq" "v" "v" "_" "v";
        Gf2p8mulb "gf2p8mulb" "v" "v" "_" "v";
        /// The bytes of `a` (or their inverses) times the 8x8 bit matrix in the quadword of `b`, plus `imm`.
        Gf2p8affineqb "gf2p8affineqb" "v" "v" "_" "v";
        Gf2p8affineinvqb "gf2p8affineinvqb" "v" "v" "_" "v";
        Sha1rnds4 "sha1rnds4" "v" "v" "_" "v";
        Sha1nexte "sha1nexte" "v" "v" "_" "v";
        Sha1msg1 "sha1msg1" "v" "v" "_" "v";
        Sha1msg2 "sha1msg2" "v" "v" "_" "v";
        /// `c` is the implicit XMM0.
        Sha256rnds2 "sha256rnds2" "v" "v" "v" "v";
        Sha256msg1 "sha256msg1" "v" "v" "_" "v";
        Sha256msg2 "sha256msg2" "v" "v" "_" "v";
    }
}

impl VecOp {
    /// The op's operand and result types.
    #[must_use]
    pub const fn sig(self) -> VecSig {
        Self::TABLE[self as usize].1
    }
    /// The op's name in the text form.
    #[must_use]
    pub const fn name(self) -> &'static str {
        Self::TABLE[self as usize].0
    }
    /// The op of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<VecOp> {
        Self::TABLE.iter().position(|row| row.0 == name).map(|i| Self::ALL[i])
    }
    /// The op of that number (`op as u16`).
    #[must_use]
    pub fn from_number(n: u16) -> Option<VecOp> {
        Self::ALL.get(n as usize).copied()
    }
}

/// Computes a vector op. Operands and results of integer type are zero-extended. An absent operand is ignored.
#[must_use]
pub fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    match VecOp::TABLE[op as usize].2 {
        Group::Int => int::eval(op, imm, a, b),
        Group::Shuffle => shuffle::eval(op, imm, a, b, c),
        Group::Fp => fp::eval(op, imm, a, b, c),
        Group::String => string::eval(op, imm, a, b, c),
        Group::Crypto => crypto::eval(op, imm, a, b, c),
    }
}
