//! What the SDM leaves undefined of a sample's result, and what processors do differently.

use iced_x86::{Code, CpuidFeature, Mnemonic, OpKind, RflagsBits};
use twofold_arch::control::rflags;

use super::Sample;
use crate::insn::Regs;

impl Sample {
    /// Flags the instruction leaves undefined with these inputs.
    #[must_use]
    pub fn undefined_flags(&self, r: &Regs) -> u64 {
        use Mnemonic::*;
        let i = &self.insn;
        let bits = if i.op_count() == 0 { 0 } else { operand_bits(i) };
        match i.mnemonic() {
            Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
                let double = matches!(i.mnemonic(), Shld | Shrd);
                let last = i.op_count() - 1;
                let count = match i.op_kind(last) {
                    OpKind::Register => r.gpr[1],
                    _ => u64::from(i.immediate8()),
                };
                let n = count & if bits == 64 { 63 } else { 31 };
                let rotate = matches!(i.mnemonic(), Rol | Ror | Rcl | Rcr);
                let mut u = 0;
                if n != 0 && !rotate {
                    u |= rflags::AF;
                }
                if n > 1 {
                    u |= rflags::OF;
                }
                if !rotate && !double && n >= bits {
                    u |= rflags::CF;
                }
                u
            }
            _ => {
                let u = i.rflags_undefined();
                let bit = |on: u32, flag: u64| if u & on != 0 { flag } else { 0 };
                bit(RflagsBits::OF, rflags::OF)
                    | bit(RflagsBits::SF, rflags::SF)
                    | bit(RflagsBits::ZF, rflags::ZF)
                    | bit(RflagsBits::AF, rflags::AF)
                    | bit(RflagsBits::CF, rflags::CF)
                    | bit(RflagsBits::PF, rflags::PF)
            }
        }
    }

    /// Whether the destination is undefined with these inputs.
    #[must_use]
    pub fn undefined_result(&self, r: &Regs) -> bool {
        let i = &self.insn;
        match i.mnemonic() {
            // A count beyond a 16-bit operand.
            Mnemonic::Shld | Mnemonic::Shrd => {
                let count = if i.op2_kind() == OpKind::Register { r.gpr[1] } else { u64::from(i.immediate8()) };
                operand_bits(i) == 16 && count & 31 > 16
            }
            // On AMD processors CVTPI2PS from memory does not look for pending x87 exceptions.
            Mnemonic::Cvtpi2ps => self.has_memory() && r.fsw() & 0x80 != 0,
            _ => false,
        }
    }
}

fn operand_bits(i: &iced_x86::Instruction) -> u64 {
    match i.op0_kind() {
        OpKind::Register => i.op0_register().size() as u64 * 8,
        _ => i.memory_size().size() as u64 * 8,
    }
}

/// Whether the instruction reads or writes x87 or MMX registers.
#[must_use]
pub fn is_x87(s: &Sample) -> bool {
    let name = format!("{:?}", s.code);
    let features = s.code.cpuid_features();
    features
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX))
        || name.contains("_mm_")
        || name.ends_with("_mm")
        || name.contains("mmm64")
        || name.contains("_sti")
}

/// Whether the instruction computes with SSE floating point, and is checked well with exceptions unmasked.
#[must_use]
pub fn is_sse_float(s: &Sample) -> bool {
    let name = format!("{:?}", s.code).to_lowercase();
    // The dot products check after each of their steps; #XM may leave MMX state entered or not.
    let not = name.contains("dpps") || name.contains("dppd") || name.contains("_mm");
    let float = ["ps_", "pd_", "ss_", "sd_"].iter().any(|t| name.contains(t)) || name.contains("cvt");
    float && !not
}

/// Why a form's result is one thing on one processor and another on the next, so that it cannot be recorded: twofold
/// computes it by the host's own instruction, where there is one.
#[must_use]
pub fn processors_differ(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    match code.mnemonic() {
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss => {
            Some("an approximation, with an error bound and no more")
        }
        Fsin | Fcos | Fsincos | Fptan | Fpatan | F2xm1 | Fyl2x | Fyl2xp1 => {
            Some("a transcendental function, with an error bound and no more")
        }
        Fbld => Some("digits beyond 9 are undefined"),
        _ => None,
    }
}

/// Condition codes of the x87 status word that the SDM has an instruction leave undefined: all but C1, unless it is about them.
#[must_use]
pub fn undefined_status(code: Code) -> u16 {
    use Mnemonic::*;
    match code.mnemonic() {
        Fcom | Fcomp | Fcompp | Fucom | Fucomp | Fucompp | Ficom | Ficomp | Ftst | Fxam | Fprem | Fprem1 | Fninit => 0,
        _ => 0x4500,
    }
}
