//! Vector ops that are one host instruction (or two): their code.
//!
//! Place in the pipeline: what [`super::Native`] gives for vector ops. Operands are in XMM0, XMM1, XMM2 and RSI, the result in XMM0 or
//! RAX (of SHA256RNDS2 in XMM1, with its third operand in XMM0); nothing else changes. NaNs, MXCSR flags and
//! out-of-range conversions are so the host's own. The assembler makes the code; an immediate is its last byte, or the one that
//! is [`MARK`].
#![allow(unsafe_code)] // assembly, and the bytes that it made

use std::arch::is_x86_feature_detected as has;
use std::sync::OnceLock;

use twofold_ir::VecOp;

struct Row {
    op: VecOp,
    feature: Feature,
    imm: Imm,
}

/// Where a row's immediate is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Imm {
    None,
    Last,
    Marked,
}

/// Stands for an immediate in the code.
const MARK: u8 = 0xa5;

/// What the host must have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Feature {
    Avx,
    Avx2,
    Fma,
    F16c,
    Sse42,
    Aes,
    Pclmulqdq,
    Sha,
    Gfni,
}

impl Feature {
    fn there(self) -> bool {
        match self {
            Feature::Avx => has!("avx"),
            Feature::Avx2 => has!("avx2"),
            Feature::Fma => has!("fma"),
            Feature::F16c => has!("f16c"),
            Feature::Sse42 => has!("sse4.2") && has!("ssse3"),
            Feature::Aes => has!("aes"),
            Feature::Pclmulqdq => has!("pclmulqdq"),
            Feature::Sha => has!("sha"),
            Feature::Gfni => has!("gfni"),
        }
    }
}

macro_rules! imm {
    (imm) => {
        Imm::Last
    };
    (mid) => {
        Imm::Marked
    };
    (op) => {
        Imm::None
    };
}

macro_rules! natives {
    ($($feature:ident { $($kind:ident $op:ident $asm:literal;)* })*) => {
        const ROWS: &[Row] = &[$($(Row { op: VecOp::$op, feature: Feature::$feature, imm: imm!($kind) }),*),*];
        core::arch::global_asm!(
            ".section .text.twofold_native,\"ax\",@progbits",
            ".globl twofold_native_start",
            ".globl twofold_native_table",
            ".hidden twofold_native_table",
            ".hidden twofold_native_start",
            ".pushsection .rodata.twofold_native_table,\"a\",@progbits",
            ".p2align 2",
            "twofold_native_table:",
            ".popsection",
            "twofold_native_start:",
            $($(concat!(
                "771:\n", $asm, "\n772:\n.pushsection .rodata.twofold_native_table,\"a\",@progbits\n",
                ".long 771b - twofold_native_start, 772b - 771b\n.popsection\n"),)*)*
            ".previous",
        );
    };
}

unsafe extern "C" {
    static twofold_native_start: u8;
    static twofold_native_table: [[u32; 2]; ROWS.len()];
}

fn row(op: VecOp, imm: u8) -> Option<usize> {
    // Looked for once: with an immediate below 8, and with another.
    static FOUND: OnceLock<Vec<[Option<usize>; 2]>> = OnceLock::new();
    let find = |op: VecOp, large: bool| {
        let compare = matches!(op, VecOp::Cmpps | VecOp::Cmppd | VecOp::Cmpss | VecOp::Cmpsd);
        let fits = |r: &Row| r.op == op && r.feature.there() && (!compare || !large || r.feature == Feature::Avx);
        ROWS.iter().position(fits)
    };
    let all = FOUND.get_or_init(|| VecOp::ALL.iter().map(|&op| [find(op, false), find(op, true)]).collect());
    all[op as usize][usize::from(imm >= 8)]
}

/// Whether the host has CRC32, and PDEP and PEXT.
pub(crate) fn int_features() -> (bool, bool) {
    (has!("sse4.2"), has!("bmi2"))
}

/// Whether the host has LZCNT, TZCNT and POPCNT.
pub(crate) fn bit_counts() -> bool {
    has!("lzcnt") && has!("bmi1") && has!("popcnt")
}
/// Whether the host has PINSRQ and PEXTRQ.
pub(crate) fn lanes() -> bool {
    has!("sse4.1")
}

/// Whether the host computes an op.
pub(crate) fn exists(op: VecOp, imm: u8) -> bool {
    row(op, imm).is_some()
}

/// The code of an op that [`exists`].
pub(crate) fn code(op: VecOp, imm: u8) -> Vec<u8> {
    let Some(n) = row(op, imm) else { return Vec::new() };
    // SAFETY: the symbols are a table with an entry a row, and the code that its entries delimit; nobody writes them.
    let mut code = unsafe {
        let [start, len] = twofold_native_table[n];
        std::slice::from_raw_parts((&raw const twofold_native_start).add(start as usize), len as usize).to_vec()
    };
    let place = match ROWS[n].imm {
        Imm::None => None,
        Imm::Last => code.last_mut(),
        Imm::Marked => code.iter_mut().find(|b| **b == MARK),
    };
    if let Some(place) = place {
        *place = imm;
    }
    code
}

natives! {
    Fma {
        op Fmaddps "vfmadd132ps xmm0, xmm2, xmm1";
        op Fmaddpd "vfmadd132pd xmm0, xmm2, xmm1";
        op Fmaddss "vfmadd132ss xmm0, xmm2, xmm1";
        op Fmaddsd "vfmadd132sd xmm0, xmm2, xmm1";
        op Fmsubps "vfmsub132ps xmm0, xmm2, xmm1";
        op Fmsubpd "vfmsub132pd xmm0, xmm2, xmm1";
        op Fmsubss "vfmsub132ss xmm0, xmm2, xmm1";
        op Fmsubsd "vfmsub132sd xmm0, xmm2, xmm1";
        op Fnmaddps "vfnmadd132ps xmm0, xmm2, xmm1";
        op Fnmaddpd "vfnmadd132pd xmm0, xmm2, xmm1";
        op Fnmaddss "vfnmadd132ss xmm0, xmm2, xmm1";
        op Fnmaddsd "vfnmadd132sd xmm0, xmm2, xmm1";
        op Fnmsubps "vfnmsub132ps xmm0, xmm2, xmm1";
        op Fnmsubpd "vfnmsub132pd xmm0, xmm2, xmm1";
        op Fnmsubss "vfnmsub132ss xmm0, xmm2, xmm1";
        op Fnmsubsd "vfnmsub132sd xmm0, xmm2, xmm1";
        op Fmaddsubps "vfmaddsub132ps xmm0, xmm2, xmm1";
        op Fmaddsubpd "vfmaddsub132pd xmm0, xmm2, xmm1";
        op Fmsubaddps "vfmsubadd132ps xmm0, xmm2, xmm1";
        op Fmsubaddpd "vfmsubadd132pd xmm0, xmm2, xmm1";
    }
    Avx {
        op Pblendvb "vpblendvb xmm0, xmm0, xmm1, xmm2";
        op Blendvps "vblendvps xmm0, xmm0, xmm1, xmm2";
        op Blendvpd "vblendvpd xmm0, xmm0, xmm1, xmm2";
        op Permilps "vpermilps xmm0, xmm0, xmm1";
        op Permilpd "vpermilpd xmm0, xmm0, xmm1";
        imm Cmpps "vcmpps xmm0, xmm0, xmm1, 0";
        imm Cmppd "vcmppd xmm0, xmm0, xmm1, 0";
        imm Cmpss "vcmpss xmm0, xmm0, xmm1, 0";
        imm Cmpsd "vcmpsd xmm0, xmm0, xmm1, 0";
    }
    Avx2 {
        op Psllvd "vpsllvd xmm0, xmm0, xmm1";
        op Psllvq "vpsllvq xmm0, xmm0, xmm1";
        op Psrlvd "vpsrlvd xmm0, xmm0, xmm1";
        op Psrlvq "vpsrlvq xmm0, xmm0, xmm1";
        op Psravd "vpsravd xmm0, xmm0, xmm1";
        op Permd "vinserti128 ymm0, ymm0, xmm1, 1\nvpermd ymm0, ymm2, ymm0\nvzeroupper";
    }
    F16c {
        op Cvtph2ps "vcvtph2ps xmm0, xmm0";
        imm Cvtps2ph "vcvtps2ph xmm0, xmm0, 0";
    }
    Aes {
        op Aesenc "aesenc xmm0, xmm1";
        op Aesenclast "aesenclast xmm0, xmm1";
        op Aesdec "aesdec xmm0, xmm1";
        op Aesdeclast "aesdeclast xmm0, xmm1";
        op Aesimc "aesimc xmm0, xmm0";
        imm Aeskeygenassist "aeskeygenassist xmm0, xmm0, 0";
    }
    Pclmulqdq {
        imm Pclmulqdq "pclmulqdq xmm0, xmm1, 0";
    }
    Sha {
        imm Sha1rnds4 "sha1rnds4 xmm0, xmm1, 0";
        op Sha1nexte "sha1nexte xmm0, xmm1";
        op Sha1msg1 "sha1msg1 xmm0, xmm1";
        op Sha1msg2 "sha1msg2 xmm0, xmm1";
        op Sha256msg1 "sha256msg1 xmm0, xmm1";
        op Sha256msg2 "sha256msg2 xmm0, xmm1";
        op Sha256rnds2 "sha256rnds2 xmm1, xmm2, xmm0";
    }
    Gfni {
        op Gf2p8mulb "gf2p8mulb xmm0, xmm1";
        imm Gf2p8affineqb "gf2p8affineqb xmm0, xmm1, 0";
        imm Gf2p8affineinvqb "gf2p8affineinvqb xmm0, xmm1, 0";
    }
    Sse42 {
        op And "pand xmm0, xmm1";
        op Or "por xmm0, xmm1";
        op Xor "pxor xmm0, xmm1";
        op Andn "pandn xmm0, xmm1";
        op Paddb "paddb xmm0, xmm1";
        op Paddw "paddw xmm0, xmm1";
        op Paddd "paddd xmm0, xmm1";
        op Paddq "paddq xmm0, xmm1";
        op Psubb "psubb xmm0, xmm1";
        op Psubw "psubw xmm0, xmm1";
        op Psubd "psubd xmm0, xmm1";
        op Psubq "psubq xmm0, xmm1";
        op Pcmpeqb "pcmpeqb xmm0, xmm1";
        op Pcmpeqw "pcmpeqw xmm0, xmm1";
        op Pcmpeqd "pcmpeqd xmm0, xmm1";
        op Pcmpgtb "pcmpgtb xmm0, xmm1";
        op Pcmpgtw "pcmpgtw xmm0, xmm1";
        op Pcmpgtd "pcmpgtd xmm0, xmm1";
        op Punpcklbw "punpcklbw xmm0, xmm1";
        op Punpcklwd "punpcklwd xmm0, xmm1";
        op Punpckldq "punpckldq xmm0, xmm1";
        op Punpcklqdq "punpcklqdq xmm0, xmm1";
        op Punpckhbw "punpckhbw xmm0, xmm1";
        op Punpckhwd "punpckhwd xmm0, xmm1";
        op Punpckhdq "punpckhdq xmm0, xmm1";
        op Punpckhqdq "punpckhqdq xmm0, xmm1";
        op Movss "movss xmm0, xmm1";
        op Movsd "movsd xmm0, xmm1";
        imm PsllwImm "psllw xmm0, 0";
        imm PslldImm "pslld xmm0, 0";
        imm PsllqImm "psllq xmm0, 0";
        imm PsrlwImm "psrlw xmm0, 0";
        imm PsrldImm "psrld xmm0, 0";
        imm PsrlqImm "psrlq xmm0, 0";
        imm PsrawImm "psraw xmm0, 0";
        imm PsradImm "psrad xmm0, 0";
        imm Pslldq "pslldq xmm0, 0";
        imm Psrldq "psrldq xmm0, 0";
        imm Pshufd "pshufd xmm0, xmm0, 0";
        imm Pshuflw "pshuflw xmm0, xmm0, 0";
        imm Pshufhw "pshufhw xmm0, xmm0, 0";
        imm Shufps "shufps xmm0, xmm1, 0";
        imm Shufpd "shufpd xmm0, xmm1, 0";
        imm Palignr "palignr xmm0, xmm1, 0";
        imm Pblendw "pblendw xmm0, xmm1, 0";
        imm Blendps "blendps xmm0, xmm1, 0";
        imm Blendpd "blendpd xmm0, xmm1, 0";
        imm Pinsrb "pinsrb xmm0, esi, 0";
        imm Pinsrw "pinsrw xmm0, esi, 0";
        imm Pinsrd "pinsrd xmm0, esi, 0";
        imm Pinsrq "pinsrq xmm0, rsi, 0";
        imm Pextrb "pextrb eax, xmm0, 0";
        imm Pextrw "pextrw eax, xmm0, 0";
        imm Pextrd "pextrd eax, xmm0, 0";
        imm Pextrq "pextrq rax, xmm0, 0";
        op Paddsb "paddsb xmm0, xmm1";
        op Paddsw "paddsw xmm0, xmm1";
        op Paddusb "paddusb xmm0, xmm1";
        op Paddusw "paddusw xmm0, xmm1";
        op Psubsb "psubsb xmm0, xmm1";
        op Psubsw "psubsw xmm0, xmm1";
        op Psubusb "psubusb xmm0, xmm1";
        op Psubusw "psubusw xmm0, xmm1";
        op Pmullw "pmullw xmm0, xmm1";
        op Pmulhw "pmulhw xmm0, xmm1";
        op Pmulhuw "pmulhuw xmm0, xmm1";
        op Pmulhrsw "pmulhrsw xmm0, xmm1";
        op Pmulld "pmulld xmm0, xmm1";
        op Pmuludq "pmuludq xmm0, xmm1";
        op Pmuldq "pmuldq xmm0, xmm1";
        op Pmaddwd "pmaddwd xmm0, xmm1";
        op Pmaddubsw "pmaddubsw xmm0, xmm1";
        op Pminub "pminub xmm0, xmm1";
        op Pminuw "pminuw xmm0, xmm1";
        op Pminud "pminud xmm0, xmm1";
        op Pminsb "pminsb xmm0, xmm1";
        op Pminsw "pminsw xmm0, xmm1";
        op Pminsd "pminsd xmm0, xmm1";
        op Pmaxub "pmaxub xmm0, xmm1";
        op Pmaxuw "pmaxuw xmm0, xmm1";
        op Pmaxud "pmaxud xmm0, xmm1";
        op Pmaxsb "pmaxsb xmm0, xmm1";
        op Pmaxsw "pmaxsw xmm0, xmm1";
        op Pmaxsd "pmaxsd xmm0, xmm1";
        op Pavgb "pavgb xmm0, xmm1";
        op Pavgw "pavgw xmm0, xmm1";
        op Psadbw "psadbw xmm0, xmm1";
        op Psignb "psignb xmm0, xmm1";
        op Psignw "psignw xmm0, xmm1";
        op Psignd "psignd xmm0, xmm1";
        op Phaddw "phaddw xmm0, xmm1";
        op Phaddd "phaddd xmm0, xmm1";
        op Phaddsw "phaddsw xmm0, xmm1";
        op Phsubw "phsubw xmm0, xmm1";
        op Phsubd "phsubd xmm0, xmm1";
        op Phsubsw "phsubsw xmm0, xmm1";
        op Psllw "psllw xmm0, xmm1";
        op Pslld "pslld xmm0, xmm1";
        op Psllq "psllq xmm0, xmm1";
        op Psrlw "psrlw xmm0, xmm1";
        op Psrld "psrld xmm0, xmm1";
        op Psrlq "psrlq xmm0, xmm1";
        op Psraw "psraw xmm0, xmm1";
        op Psrad "psrad xmm0, xmm1";
        op Packsswb "packsswb xmm0, xmm1";
        op Packssdw "packssdw xmm0, xmm1";
        op Packuswb "packuswb xmm0, xmm1";
        op Packusdw "packusdw xmm0, xmm1";
        op Pshufb "pshufb xmm0, xmm1";
        op Addps "addps xmm0, xmm1";
        op Addpd "addpd xmm0, xmm1";
        op Addss "addss xmm0, xmm1";
        op Addsd "addsd xmm0, xmm1";
        op Subps "subps xmm0, xmm1";
        op Subpd "subpd xmm0, xmm1";
        op Subss "subss xmm0, xmm1";
        op Subsd "subsd xmm0, xmm1";
        op Mulps "mulps xmm0, xmm1";
        op Mulpd "mulpd xmm0, xmm1";
        op Mulss "mulss xmm0, xmm1";
        op Mulsd "mulsd xmm0, xmm1";
        op Divps "divps xmm0, xmm1";
        op Divpd "divpd xmm0, xmm1";
        op Divss "divss xmm0, xmm1";
        op Divsd "divsd xmm0, xmm1";
        op Minps "minps xmm0, xmm1";
        op Minpd "minpd xmm0, xmm1";
        op Minss "minss xmm0, xmm1";
        op Minsd "minsd xmm0, xmm1";
        op Maxps "maxps xmm0, xmm1";
        op Maxpd "maxpd xmm0, xmm1";
        op Maxss "maxss xmm0, xmm1";
        op Maxsd "maxsd xmm0, xmm1";
        op Sqrtss "sqrtss xmm0, xmm1";
        op Sqrtsd "sqrtsd xmm0, xmm1";
        op Addsubps "addsubps xmm0, xmm1";
        op Addsubpd "addsubpd xmm0, xmm1";
        op Haddps "haddps xmm0, xmm1";
        op Haddpd "haddpd xmm0, xmm1";
        op Hsubps "hsubps xmm0, xmm1";
        op Hsubpd "hsubpd xmm0, xmm1";
        op Cvtss2sd "cvtss2sd xmm0, xmm1";
        op Cvtsd2ss "cvtsd2ss xmm0, xmm1";
        op Rcpss "rcpss xmm0, xmm1";
        op Rsqrtss "rsqrtss xmm0, xmm1";
        op Pabsb "pabsb xmm0, xmm0";
        op Pabsw "pabsw xmm0, xmm0";
        op Pabsd "pabsd xmm0, xmm0";
        op Phminposuw "phminposuw xmm0, xmm0";
        op Sqrtps "sqrtps xmm0, xmm0";
        op Sqrtpd "sqrtpd xmm0, xmm0";
        op Cvtdq2ps "cvtdq2ps xmm0, xmm0";
        op Cvtps2dq "cvtps2dq xmm0, xmm0";
        op Cvttps2dq "cvttps2dq xmm0, xmm0";
        op Cvtpd2dq "cvtpd2dq xmm0, xmm0";
        op Cvttpd2dq "cvttpd2dq xmm0, xmm0";
        op Cvtpd2ps "cvtpd2ps xmm0, xmm0";
        op Cvtps2pd "cvtps2pd xmm0, xmm0";
        op Cvtdq2pd "cvtdq2pd xmm0, xmm0";
        op Rcpps "rcpps xmm0, xmm0";
        op Rsqrtps "rsqrtps xmm0, xmm0";
        op Pmovsxbw "pmovsxbw xmm0, xmm0";
        op Pmovsxbd "pmovsxbd xmm0, xmm0";
        op Pmovsxbq "pmovsxbq xmm0, xmm0";
        op Pmovsxwd "pmovsxwd xmm0, xmm0";
        op Pmovsxwq "pmovsxwq xmm0, xmm0";
        op Pmovsxdq "pmovsxdq xmm0, xmm0";
        op Pmovzxbw "pmovzxbw xmm0, xmm0";
        op Pmovzxbd "pmovzxbd xmm0, xmm0";
        op Pmovzxbq "pmovzxbq xmm0, xmm0";
        op Pmovzxwd "pmovzxwd xmm0, xmm0";
        op Pmovzxwq "pmovzxwq xmm0, xmm0";
        op Pmovzxdq "pmovzxdq xmm0, xmm0";
        op Pmovmskb "pmovmskb eax, xmm0";
        op Movmskps "movmskps eax, xmm0";
        op Movmskpd "movmskpd eax, xmm0";
        op Comiss "comiss xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
        op Comisd "comisd xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
        op Ucomiss "ucomiss xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
        op Ucomisd "ucomisd xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
        op Ptest "ptest xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x41";
        op Cvtsi2ss32 "cvtsi2ss xmm0, esi";
        op Cvtsi2ss64 "cvtsi2ss xmm0, rsi";
        op Cvtss2si32 "cvtss2si eax, xmm0";
        op Cvtss2si64 "cvtss2si rax, xmm0";
        op Cvttss2si32 "cvttss2si eax, xmm0";
        op Cvttss2si64 "cvttss2si rax, xmm0";
        op Cvtsi2sd32 "cvtsi2sd xmm0, esi";
        op Cvtsi2sd64 "cvtsi2sd xmm0, rsi";
        op Cvtsd2si32 "cvtsd2si eax, xmm0";
        op Cvtsd2si64 "cvtsd2si rax, xmm0";
        op Cvttsd2si32 "cvttsd2si eax, xmm0";
        op Cvttsd2si64 "cvttsd2si rax, xmm0";
        op Pcmpeqq "pcmpeqq xmm0, xmm1";
        op Pcmpgtq "pcmpgtq xmm0, xmm1";
        mid PcmpistrIndex "push rcx\npcmpistri xmm0, xmm1, 0xa5\nmov eax, ecx\npop rcx";
        imm PcmpistrMask "pcmpistrm xmm0, xmm1, 0";
        mid PcmpistrFlags "push rcx\npcmpistri xmm0, xmm1, 0xa5\npop rcx\nlahf\nseto al\nxchg al, ah\nshl ah, 3\nand eax, 0x8c1";
        // With REX.W: the lengths have 64 bits. Of 32 bits they have been sign-extended.
        mid PcmpestrIndex "push rcx\npush rdx\nmovq rax, xmm2\npextrq rdx, xmm2, 1\n.byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xc1, 0xa5\nmov eax, ecx\npop rdx\npop rcx";
        mid PcmpestrFlags "push rcx\npush rdx\nmovq rax, xmm2\npextrq rdx, xmm2, 1\n.byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xc1, 0xa5\npop rdx\npop rcx\nlahf\nseto al\nxchg al, ah\nshl ah, 3\nand eax, 0x8c1";
        mid PcmpestrMask "push rax\npush rdx\nmovq rax, xmm2\npextrq rdx, xmm2, 1\n.byte 0x66, 0x48, 0x0f, 0x3a, 0x60, 0xc1, 0xa5\npop rdx\npop rax";
        imm Mpsadbw "mpsadbw xmm0, xmm1, 0";
        imm Insertps "insertps xmm0, xmm1, 0";
        imm Cmpps "cmpps xmm0, xmm1, 0";
        imm Cmppd "cmppd xmm0, xmm1, 0";
        imm Cmpss "cmpss xmm0, xmm1, 0";
        imm Cmpsd "cmpsd xmm0, xmm1, 0";
        imm Roundps "roundps xmm0, xmm0, 0";
        imm Roundpd "roundpd xmm0, xmm0, 0";
        imm Roundss "roundss xmm0, xmm1, 0";
        imm Roundsd "roundsd xmm0, xmm1, 0";
        imm Dpps "dpps xmm0, xmm1, 0";
        imm Dppd "dppd xmm0, xmm1, 0";
    }
}
