//! x87 instructions: each is one call of `Helper::X87`, which reads its operands and does all checks but #NM.
//!
//! The helper gets the opcode, the linear address of the memory operand, the instruction's RIP and a word of
//! [`twofold_arch::fpu::x87`]. FNSTSW AX takes its result from the helper.

use iced_x86::{Mnemonic, OpKind};
use twofold_arch::cpuid::Feature;
use twofold_arch::fpu::{fsw, x87 as word};
use twofold_arch::{Exception, Loc, TbFlags, Vector};
use twofold_ir::{BinOp, Helper, IntCc, Ty};

use crate::table::{Need, Row};
use crate::translator::{Access, Translator};

macro_rules! rows {
    ($($feature:ident: $($m:ident)*;)*) => {
        /// Every x87 instruction, and WAIT.
        pub const ROWS: &[Row] = &[
            $($(Row::all(Mnemonic::$m, x87).feature(Feature::$feature).need(Need::X87),)*)*
            Row::all(Mnemonic::Wait, wait).need(Need::WAIT),
        ];
    };
}

rows! {
    X87: F2xm1 Fabs Fadd Faddp Fbld Fbstp Fchs Fcom Fcomp Fcompp Fcos Fdecstp Fdiv Fdivp Fdivr Fdivrp Ffree Ffreep
        Fiadd Ficom Ficomp Fidiv Fidivr Fild Fimul Fincstp Fist Fistp Fisub Fisubr Fld Fld1 Fldcw Fldenv
        Fldl2e Fldl2t Fldlg2 Fldln2 Fldpi Fldz Fmul Fmulp Fnclex Fndisi Fneni Fninit Fnop Fnsave Fnsetpm Fnstcw Fnstenv
        Fnstsw Fpatan Fprem Fprem1 Fptan Frndint Frstor Fscale Fsin Fsincos Fsqrt Fst Fstp Fstpnce Fsub Fsubp Fsubr
        Fsubrp Ftst Fucom Fucomp Fucompp Fxam Fxch Fxtract Fyl2x Fyl2xp1;
    Cmov: Fcmovb Fcmovbe Fcmove Fcmovnb Fcmovnbe Fcmovne Fcmovnu Fcmovu Fcomi Fcomip Fucomi Fucomip;
    Sse3: Fisttp;
}

/// Index of the opcode byte (D8 … DF) after the prefixes.
fn opcode_index(bytes: &[u8]) -> usize {
    bytes.iter().position(|b| (0xd8..=0xdf).contains(b)).unwrap_or(0)
}

/// Whether the memory operand is written.
fn stores(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fnstcw | Fnstsw | Fnstenv | Fnsave)
}

/// Whether the memory operand of an instruction that waits can fault before it is accessed.
fn address_may_fault(t: &Translator<'_>) -> bool {
    use Mnemonic::*;
    let waits = !matches!(t.insn.mnemonic(), Fnstcw | Fnstsw | Fnstenv | Fnsave);
    let limit = !t.is64() && !t.flags.no_limit(t.mem_segment());
    waits && (limit || t.flags.has(TbFlags::ALIGN_CHECK))
}

fn x87(t: &mut Translator<'_>) {
    let bytes = t.insn_bytes();
    let at = opcode_index(bytes);
    let byte = |i: usize| u64::from(bytes.get(i).copied().unwrap_or(0));
    let opcode = (byte(at) & 7) << 8 | byte(at + 1);
    let operand16 = bytes[..at].contains(&0x66) != (t.rip_ty() == Ty::I16);
    let mut how = if operand16 { word::OPERAND16 } else { 0 };
    let memory = (0..t.insn.op_count()).any(|n| t.is_mem(n));
    let addr = if memory {
        how |= word::MEMORY | u64::from(t.mem_segment());
        let access = if stores(t.insn.mnemonic()) { Access::Write } else { Access::Read };
        if address_may_fault(t) {
            // A pending exception comes first: FNOP waits for it.
            let (fnop, none, rip) = (t.c64(0x1d0), t.c64(0), t.b.rip(i32::from(t.off)));
            t.call(Helper::X87, &[fnop, none, rip, none]);
        }
        let size = t.insn.memory_size().size() as u32;
        if size.is_power_of_two() { t.mem_addr(size, access) } else { t.mem_addr_unaligned(size, access) }
    } else {
        t.c64(0)
    };
    let opcode = t.c64(opcode);
    let rip = t.b.rip(i32::from(t.off));
    let how = t.c64(how);
    let r = t.call(Helper::X87, &[opcode, addr, rip, how]);
    if t.insn.op_count() > 0 && t.insn.op_kind(0) == OpKind::Register && t.insn.op_register(0).is_gpr() {
        let ax = t.b.trunc(Ty::I16, r);
        t.put_gpr(0, ax);
    }
}

/// WAIT: #MF for a pending x87 exception.
fn wait(t: &mut Translator<'_>) {
    let w = t.b.get(Ty::I16, Loc::FSW);
    let es = t.b.bin_imm(BinOp::And, w, u64::from(fsw::ES));
    let pending = t.b.cmp_imm(IntCc::Ne, es, 0);
    t.raise_if(pending, Exception::new(Vector::X87Fault));
}
