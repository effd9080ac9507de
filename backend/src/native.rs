//! The host's own instruction for an op, as bytes: what `assemble` and `region` put in the place of a call.
//!
//! Place in the pipeline: `lower` names them by [`Native`] as if they were functions, with operands and results in fixed
//! registers; nothing but results and RAX changes. No byte depends on where it lies, so the same code serves in the
//! middle of a block and, with a return behind it, as a subroutine. The 16 bytes below the stack pointer are scratch.

use twofold_arch::CpuState;
use twofold_arch::fpu::{X87Op, X87Operand};
use twofold_ir::{Helper, VecOp};

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
