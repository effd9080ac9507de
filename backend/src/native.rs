//! The host's own instruction for an op, as bytes: what `assemble` and `region` put in the place of a call.
//!
//! Place in the pipeline: `lower` names them by [`Native`] as if they were functions, with operands and results in fixed
//! registers; nothing but results and RAX changes. No byte depends on where it lies, so the same code serves in the
//! middle of a block and, with a return behind it, as a subroutine. The 16 bytes below the stack pointer are scratch.

use twofold_arch::CpuState;
use twofold_arch::fpu::{X87Op, X87Operand};
use twofold_ir::{Helper, Ty, VecOp};

use crate::direct::x64::{self, Rm};

#[cfg_attr(all(target_arch = "x86_64", not(portable_host)), path = "native/vec.rs")]
#[cfg_attr(not(all(target_arch = "x86_64", not(portable_host))), path = "native/vec_none.rs")]
mod vec;

/// An op that the host computes, packed in the index of an external function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Native(pub u32);

const X87: u32 = 1 << 31;
const INT: u32 = 1 << 30;

/// Helpers that are one host instruction: CRC32 of 1, 2, 4, 8 bytes, PDEP, PEXT, DIV. Operands in RSI, RDX and RCX, the result in RAX; DIV
/// changes RDX.
const INTS: [&[u8]; 7] = [
    // mov eax, esi; crc32 eax, dl / dx / edx / rdx
    &[0x89, 0xf0, 0xf2, 0x0f, 0x38, 0xf0, 0xc2],
    &[0x89, 0xf0, 0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc2],
    &[0x89, 0xf0, 0xf2, 0x0f, 0x38, 0xf1, 0xc2],
    &[0x89, 0xf0, 0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc2],
    // pdep rax, rsi, rdx; pext rax, rsi, rdx
    &[0xc4, 0xe2, 0xcb, 0xf5, 0xc2],
    &[0xc4, 0xe2, 0xca, 0xf5, 0xc2],
    // mov rax, rsi; cmp rdx, rcx; jae over; div rcx. None divides that would trap.
    &[0x48, 0x89, 0xf0, 0x48, 0x39, 0xca, 0x73, 3, 0x48, 0xf7, 0xf1],
];

impl Native {
    /// An x87 instruction: its operand in RSI and DX, the result in RAX, the state in RDI. `None` when it is not run this way.
    pub fn x87(op: X87Op) -> Option<Self> {
        op.operand().map(|_| Self(X87 | u32::from(op.0)))
    }

    /// A helper that is one host instruction, if the host has it; `log2_bytes` for CRC32.
    pub fn helper(helper: Helper, log2_bytes: Option<u64>) -> Option<Self> {
        let (sse42, bmi2) = vec::int_features();
        let n = match helper {
            Helper::Crc32 if sse42 => log2_bytes.filter(|&n| n < 4)? as u32,
            Helper::Pdep if bmi2 => 4,
            Helper::Pext if bmi2 => 5,
            Helper::DivideWide if cfg!(all(target_arch = "x86_64", not(portable_host))) => 6,
            _ => return None,
        };
        Some(Self(INT | n))
    }

    /// A vector op, if the host has an instruction for it: see `native/vec.rs` for its registers.
    pub fn vec(op: VecOp, imm: u8) -> Option<Self> {
        vec::exists(op, imm).then_some(Self(u32::from(op as u16) | u32::from(imm) << 16))
    }

    /// The registers that the code of a vector op may have.
    pub fn form(self) -> Form {
        VecOp::from_number(self.0 as u16).map_or(Form::Fixed, |op| form(op, &self.bytes(), (self.0 >> 16) as u8))
    }

    /// The code.
    pub fn bytes(self) -> Vec<u8> {
        if self.0 & X87 != 0 {
            return x87(X87Op(self.0 as u16));
        }
        if self.0 & INT != 0 {
            return INTS.get((self.0 & 7) as usize).map_or_else(Vec::new, |code| code.to_vec());
        }
        VecOp::from_number(self.0 as u16).map_or_else(Vec::new, |op| vec::code(op, (self.0 >> 16) as u8))
    }
}

/// What registers an op's code can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// Those that [`Native::bytes`] says.
    Fixed,
    /// Any: the first operand's, where the result goes, and the second's.
    Two(AnyRegisters),
    /// Any: the result's and the operand's.
    One(AnyRegisters),
    /// Any: the first operand's, where the result goes, and a general one.
    Insert(AnyRegisters),
    /// Any: the operand's, where the result goes. The number stands where the other register would.
    Shift(AnyRegisters, u8),
}

/// A vector instruction without its registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct AnyRegisters {
    prefix: u8,
    op: [u8; 3],
    len: u8,
    imm: Option<u8>,
}

impl AnyRegisters {
    /// The instruction with these registers.
    pub fn put(self, out: &mut Vec<u8>, to: u8, from: u8) {
        x64::insn(out, self.prefix, false, false, &self.op[..usize::from(self.len)], to, Rm::R(from));
        out.extend(self.imm);
    }
}

/// Looks at the code for XMM0 and XMM1: an instruction without VEX has its registers in one byte, and their high bits in a REX.
fn form(op: VecOp, code: &[u8], imm: u8) -> Form {
    let sig = op.sig();
    // Its result is in XMM0 always.
    if op == VecOp::PcmpistrMask {
        return Form::Fixed;
    }
    let (prefix, rest) = match code {
        [p @ (0x66 | 0xf2 | 0xf3), rest @ ..] => (*p, rest),
        _ => (0, code),
    };
    let len = match rest {
        [0x0f, 0x38 | 0x3a, ..] => 3,
        [0x0f, ..] => 2,
        _ => return Form::Fixed,
    };
    let Some((opcode, tail)) = rest.split_at_checked(len) else { return Form::Fixed };
    let (registers, imm) = match *tail {
        [registers] => (registers, None),
        [registers, last] if last == imm => (registers, Some(imm)),
        _ => return Form::Fixed,
    };
    let mut op = [0; 3];
    op[..len].copy_from_slice(opcode);
    let any = AnyRegisters { prefix, op, len: len as u8, imm };
    const V: Option<Ty> = Some(Ty::V128);
    match (registers, sig.args, sig.result) {
        (0xc1, [V, V, None], Ty::V128) => Form::Two(any),
        (0xc0, [V, None, None], Ty::V128) => Form::One(any),
        (0xc6, [V, Some(_), None], Ty::V128) => Form::Insert(any),
        // A shift by an immediate has another number where the other register would be.
        (0xd0..=0xff, [V, None, None], Ty::V128) if registers & 7 == 0 => Form::Shift(any, registers >> 3 & 7),
        _ => Form::Fixed,
    }
}

/// Whether the host counts leading and trailing zeroes and set bits in one instruction.
pub(crate) fn bit_counts() -> bool {
    vec::bit_counts()
}
/// Whether the host moves single lanes of vectors (SSE4.1).
pub(crate) fn lanes() -> bool {
    vec::lanes()
}

/// `[rsp - 8]` and `[rsp - 16]` as the operand of an x87 instruction.
const BELOW_8: [u8; 3] = [0x44, 0x24, 0xf8];
const BELOW_16: [u8; 3] = [0x44, 0x24, 0xf0];

fn x87(op: X87Op) -> Vec<u8> {
    let Some(operand) = op.operand() else { return Vec::new() };
    let mut out = Vec::with_capacity(24);
    let memory = |[modrm, sib, disp]: [u8; 3]| [op.first(), modrm | op.reg() << 3, sib, disp];
    let register = [op.first(), op.modrm()];
    match operand {
        X87Operand::None => out.extend(register),
        // mov [rsp - 16], rsi; mov [rsp - 8], rdx
        X87Operand::Load(10) => {
            out.extend([0x48, 0x89, 0x74, 0x24, 0xf0, 0x48, 0x89, 0x54, 0x24, 0xf8]);
            out.extend(memory(BELOW_16));
        }
        // mov [rsp - 8], rsi
        X87Operand::Load(_) => {
            out.extend([0x48, 0x89, 0x74, 0x24, 0xf8]);
            out.extend(memory(BELOW_8));
        }
        // To [rdi + x87_operand]; mov rax, [rdi + x87_operand]
        X87Operand::Store(10) => {
            let at = (core::mem::offset_of!(CpuState, x87_operand) as u32).to_le_bytes();
            out.extend([op.first(), 0x87 | op.reg() << 3]);
            out.extend(at);
            out.extend([0x48, 0x8b, 0x87]);
            out.extend(at);
        }
        // mov rax, [rsp - 8] or narrower
        X87Operand::Store(n) => {
            out.extend(memory(BELOW_8));
            match n {
                2 => out.extend([0x0f, 0xb7]),
                4 => out.push(0x8b),
                _ => out.extend([0x48, 0x8b]),
            }
            out.extend(BELOW_8);
        }
        // movzx eax, ax
        X87Operand::Status => {
            out.extend(register);
            out.extend([0x0f, 0xb7, 0xc0]);
        }
        // mov eax, esi; shl eax, 8; sahf
        X87Operand::ReadsFlags => {
            out.extend([0x89, 0xf0, 0xc1, 0xe0, 8, 0x9e]);
            out.extend(register);
        }
        // lahf; movzx eax, ah; and eax, 0x45
        X87Operand::WritesFlags => {
            out.extend(register);
            out.extend([0x9f, 0x0f, 0xb6, 0xc4, 0x83, 0xe0, 0x45]);
        }
    }
    out
}
