//! Vector thunks: for each op that one host instruction computes, that instruction and a return.
//!
//! Place in the pipeline: `lower` calls them for what Cranelift has no bit-exact op for. Operands are in XMM0, XMM1 and RSI,
//! the result in XMM0 or RAX, every other register keeps its value; so a call costs little more than the instruction, and
//! NaNs, MXCSR flags and out-of-range conversions are the host's own.

use twofold_ir::VecOp;

macro_rules! vec_thunks {
    ($($op:ident $asm:literal;)*) => {
        /// The ops that have a thunk, in the order of the thunks.
        pub(crate) const OPS: &[VecOp] = &[$(VecOp::$op),*];
        core::arch::global_asm!(
            ".section .text.twofold_thunks_vec,\"ax\",@progbits",
            ".globl twofold_vec_start",
            ".globl twofold_vec_end",
            ".globl twofold_vec_table",
            ".hidden twofold_vec_table",
            ".hidden twofold_vec_start",
            ".hidden twofold_vec_end",
            ".pushsection .rodata.twofold_vec_table,\"a\",@progbits",
            ".p2align 2",
            "twofold_vec_table:",
            ".popsection",
            ".p2align 4",
            "twofold_vec_start:",
            $(concat!(
                ".p2align 3, 0xcc\n771:\n.pushsection .rodata.twofold_vec_table,\"a\",@progbits\n",
                ".long 771b - twofold_vec_start\n.popsection\n", $asm, "\nret"),)*
            "twofold_vec_end:",
            ".previous",
        );
    };
}

vec_thunks! {
    Paddsb "paddsb xmm0, xmm1";
    Paddsw "paddsw xmm0, xmm1";
    Paddusb "paddusb xmm0, xmm1";
    Paddusw "paddusw xmm0, xmm1";
    Psubsb "psubsb xmm0, xmm1";
    Psubsw "psubsw xmm0, xmm1";
    Psubusb "psubusb xmm0, xmm1";
    Psubusw "psubusw xmm0, xmm1";
    Pmullw "pmullw xmm0, xmm1";
    Pmulhw "pmulhw xmm0, xmm1";
    Pmulhuw "pmulhuw xmm0, xmm1";
    Pmulhrsw "pmulhrsw xmm0, xmm1";
    Pmulld "pmulld xmm0, xmm1";
    Pmuludq "pmuludq xmm0, xmm1";
    Pmuldq "pmuldq xmm0, xmm1";
    Pmaddwd "pmaddwd xmm0, xmm1";
    Pmaddubsw "pmaddubsw xmm0, xmm1";
    Pminub "pminub xmm0, xmm1";
    Pminuw "pminuw xmm0, xmm1";
    Pminud "pminud xmm0, xmm1";
    Pminsb "pminsb xmm0, xmm1";
    Pminsw "pminsw xmm0, xmm1";
    Pminsd "pminsd xmm0, xmm1";
    Pmaxub "pmaxub xmm0, xmm1";
    Pmaxuw "pmaxuw xmm0, xmm1";
    Pmaxud "pmaxud xmm0, xmm1";
    Pmaxsb "pmaxsb xmm0, xmm1";
    Pmaxsw "pmaxsw xmm0, xmm1";
    Pmaxsd "pmaxsd xmm0, xmm1";
    Pavgb "pavgb xmm0, xmm1";
    Pavgw "pavgw xmm0, xmm1";
    Psadbw "psadbw xmm0, xmm1";
    Psignb "psignb xmm0, xmm1";
    Psignw "psignw xmm0, xmm1";
    Psignd "psignd xmm0, xmm1";
    Phaddw "phaddw xmm0, xmm1";
    Phaddd "phaddd xmm0, xmm1";
    Phaddsw "phaddsw xmm0, xmm1";
    Phsubw "phsubw xmm0, xmm1";
    Phsubd "phsubd xmm0, xmm1";
    Phsubsw "phsubsw xmm0, xmm1";
    Psllw "psllw xmm0, xmm1";
    Pslld "pslld xmm0, xmm1";
    Psllq "psllq xmm0, xmm1";
    Psrlw "psrlw xmm0, xmm1";
    Psrld "psrld xmm0, xmm1";
    Psrlq "psrlq xmm0, xmm1";
    Psraw "psraw xmm0, xmm1";
    Psrad "psrad xmm0, xmm1";
    Packsswb "packsswb xmm0, xmm1";
    Packssdw "packssdw xmm0, xmm1";
    Packuswb "packuswb xmm0, xmm1";
    Packusdw "packusdw xmm0, xmm1";
    Pshufb "pshufb xmm0, xmm1";
    Addps "addps xmm0, xmm1";
    Addpd "addpd xmm0, xmm1";
    Addss "addss xmm0, xmm1";
    Addsd "addsd xmm0, xmm1";
    Subps "subps xmm0, xmm1";
    Subpd "subpd xmm0, xmm1";
    Subss "subss xmm0, xmm1";
    Subsd "subsd xmm0, xmm1";
    Mulps "mulps xmm0, xmm1";
    Mulpd "mulpd xmm0, xmm1";
    Mulss "mulss xmm0, xmm1";
    Mulsd "mulsd xmm0, xmm1";
    Divps "divps xmm0, xmm1";
    Divpd "divpd xmm0, xmm1";
    Divss "divss xmm0, xmm1";
    Divsd "divsd xmm0, xmm1";
    Minps "minps xmm0, xmm1";
    Minpd "minpd xmm0, xmm1";
    Minss "minss xmm0, xmm1";
    Minsd "minsd xmm0, xmm1";
    Maxps "maxps xmm0, xmm1";
    Maxpd "maxpd xmm0, xmm1";
    Maxss "maxss xmm0, xmm1";
    Maxsd "maxsd xmm0, xmm1";
    Sqrtss "sqrtss xmm0, xmm1";
    Sqrtsd "sqrtsd xmm0, xmm1";
    Addsubps "addsubps xmm0, xmm1";
    Addsubpd "addsubpd xmm0, xmm1";
    Haddps "haddps xmm0, xmm1";
    Haddpd "haddpd xmm0, xmm1";
    Hsubps "hsubps xmm0, xmm1";
    Hsubpd "hsubpd xmm0, xmm1";
    Cvtss2sd "cvtss2sd xmm0, xmm1";
    Cvtsd2ss "cvtsd2ss xmm0, xmm1";
    Rcpss "rcpss xmm0, xmm1";
    Rsqrtss "rsqrtss xmm0, xmm1";
    Pabsb "pabsb xmm0, xmm0";
    Pabsw "pabsw xmm0, xmm0";
    Pabsd "pabsd xmm0, xmm0";
    Phminposuw "phminposuw xmm0, xmm0";
    Sqrtps "sqrtps xmm0, xmm0";
    Sqrtpd "sqrtpd xmm0, xmm0";
    Cvtdq2ps "cvtdq2ps xmm0, xmm0";
    Cvtps2dq "cvtps2dq xmm0, xmm0";
    Cvttps2dq "cvttps2dq xmm0, xmm0";
    Cvtpd2dq "cvtpd2dq xmm0, xmm0";
    Cvttpd2dq "cvttpd2dq xmm0, xmm0";
    Cvtpd2ps "cvtpd2ps xmm0, xmm0";
    Cvtps2pd "cvtps2pd xmm0, xmm0";
    Cvtdq2pd "cvtdq2pd xmm0, xmm0";
    Rcpps "rcpps xmm0, xmm0";
    Rsqrtps "rsqrtps xmm0, xmm0";
    Pmovsxbw "pmovsxbw xmm0, xmm0";
    Pmovsxbd "pmovsxbd xmm0, xmm0";
    Pmovsxbq "pmovsxbq xmm0, xmm0";
    Pmovsxwd "pmovsxwd xmm0, xmm0";
    Pmovsxwq "pmovsxwq xmm0, xmm0";
    Pmovsxdq "pmovsxdq xmm0, xmm0";
    Pmovzxbw "pmovzxbw xmm0, xmm0";
    Pmovzxbd "pmovzxbd xmm0, xmm0";
    Pmovzxbq "pmovzxbq xmm0, xmm0";
    Pmovzxwd "pmovzxwd xmm0, xmm0";
    Pmovzxwq "pmovzxwq xmm0, xmm0";
    Pmovzxdq "pmovzxdq xmm0, xmm0";
    Pmovmskb "pmovmskb eax, xmm0";
    Movmskps "movmskps eax, xmm0";
    Movmskpd "movmskpd eax, xmm0";
    Comiss "comiss xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
    Comisd "comisd xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
    Ucomiss "ucomiss xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
    Ucomisd "ucomisd xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x45";
    Ptest "ptest xmm0, xmm1\nlahf\nmovzx eax, ah\nand eax, 0x41";
    Cvtsi2ss32 "cvtsi2ss xmm0, esi";
    Cvtsi2ss64 "cvtsi2ss xmm0, rsi";
    Cvtss2si32 "cvtss2si eax, xmm0";
    Cvtss2si64 "cvtss2si rax, xmm0";
    Cvttss2si32 "cvttss2si eax, xmm0";
    Cvttss2si64 "cvttss2si rax, xmm0";
    Cvtsi2sd32 "cvtsi2sd xmm0, esi";
    Cvtsi2sd64 "cvtsi2sd xmm0, rsi";
    Cvtsd2si32 "cvtsd2si eax, xmm0";
    Cvtsd2si64 "cvtsd2si rax, xmm0";
    Cvttsd2si32 "cvttsd2si eax, xmm0";
    Cvttsd2si64 "cvttsd2si rax, xmm0";
}
