//! x86-64 instructions as bytes: the few shapes that `direct` writes.
//!
//! Place in the pipeline: under `direct`. Registers are numbers as the processor counts them; widths are IR types. An instruction of
//! 8 or 16 bits writes only those; one of 32 clears the upper half.

use twofold_ir::{IntCc, Ty};

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RBX: u8 = 3;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const R8: u8 = 8;
pub const R10: u8 = 10;
pub const R11: u8 = 11;
pub const R12: u8 = 12;
pub const R13: u8 = 13;
pub const R14: u8 = 14;
pub const R15: u8 = 15;

/// `[base + index << scale + disp]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mem {
    pub base: u8,
    /// Not RSP.
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

impl Mem {
    pub const fn at(base: u8, disp: i32) -> Self {
        Self { base, index: None, disp }
    }
}

/// A register or memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rm {
    R(u8),
    M(Mem),
}

impl From<Mem> for Rm {
    fn from(m: Mem) -> Self {
        Rm::M(m)
    }
}

/// The two-operand instructions that share their encodings, by the number in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts and rotates by the number in their encodings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shift {
    Rol = 0,
    Ror = 1,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// The condition of a jump, SETcc or CMOVcc that holds after `cmp a, b` when the comparison does.
pub fn condition(cc: IntCc) -> u8 {
    match cc {
        IntCc::Eq => 4,
        IntCc::Ne => 5,
        IntCc::Ult => 2,
        IntCc::Uge => 3,
        IntCc::Ule => 6,
        IntCc::Ugt => 7,
        IntCc::Slt => 12,
        IntCc::Sge => 13,
        IntCc::Sle => 14,
        IntCc::Sgt => 15,
    }
}

/// Any instruction: a mandatory prefix (or 0), REX.W, whether a REX is needed for a byte register, opcode, operands.
pub fn insn(out: &mut Vec<u8>, prefix: u8, w: bool, force: bool, op: &[u8], reg: u8, rm: Rm) {
    let mut buf = [0u8; 20];
    let mut n = 0;
    let mut push = |b: u8| {
        buf[n] = b;
        n += 1;
    };
    if prefix != 0 {
        push(prefix);
    }
    let (base, index) = match rm {
        Rm::R(r) => (r, 0),
        Rm::M(m) => (m.base, m.index.map_or(0, |i| i.0)),
    };
    let rex = 0x40 | u8::from(w) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
    if rex != 0x40 || force {
        push(rex);
    }
    op.iter().for_each(|&b| push(b));
    let reg = (reg & 7) << 3;
    match rm {
        Rm::R(r) => push(0xc0 | reg | r & 7),
        Rm::M(m) => {
            let low = m.base & 7;
            // RBP and R13 without displacement would mean something else.
            let mode = match m.disp {
                0 if low != 5 => 0,
                -128..=127 => 0x40,
                _ => 0x80,
            };
            match m.index {
                Some((index, scale)) => {
                    push(mode | reg | 4);
                    push(scale << 6 | (index & 7) << 3 | low);
                }
                None => {
                    push(mode | reg | low);
                    if low == 4 {
                        push(0x24);
                    }
                }
            }
            match mode {
                0 => {}
                0x40 => push(m.disp as u8),
                _ => m.disp.to_le_bytes().iter().for_each(|&b| push(b)),
            }
        }
    }
    out.extend_from_slice(&buf[..n]);
}

fn byte_reg(r: u8) -> bool {
    (4..8).contains(&r)
}

/// An integer instruction of a width: `op` is its opcode for 16 bits and more, one less than which is that for 8.
fn sized(out: &mut Vec<u8>, ty: Ty, op: u8, reg: u8, rm: Rm, reg_is_operand: bool) {
    let rm_byte = matches!(rm, Rm::R(r) if byte_reg(r));
    match ty {
        Ty::I8 => insn(out, 0, false, rm_byte || reg_is_operand && byte_reg(reg), &[op - 1], reg, rm),
        Ty::I16 => insn(out, 0x66, false, false, &[op], reg, rm),
        _ => insn(out, 0, ty == Ty::I64, false, &[op], reg, rm),
    }
}

/// `op reg, rm`.
pub fn alu(out: &mut Vec<u8>, ty: Ty, op: Alu, reg: u8, rm: Rm) {
    sized(out, ty, (op as u8) << 3 | 3, reg, rm, true);
}
/// `op rm, reg`.
pub fn alu_to(out: &mut Vec<u8>, ty: Ty, op: Alu, rm: Rm, reg: u8) {
    sized(out, ty, (op as u8) << 3 | 1, reg, rm, true);
}
/// `op rm, imm`.
pub fn alu_imm(out: &mut Vec<u8>, ty: Ty, op: Alu, rm: Rm, imm: i32) {
    if ty == Ty::I8 {
        sized(out, ty, 0x81, op as u8, rm, false);
        out.push(imm as u8);
    } else if i32::from(imm as i8) == imm {
        sized(out, ty, 0x83, op as u8, rm, false);
        out.push(imm as u8);
    } else {
        sized(out, ty, 0x81, op as u8, rm, false);
        out.extend_from_slice(&imm.to_le_bytes()[..if ty == Ty::I16 { 2 } else { 4 }]);
    }
}
/// `test a, b`.
pub fn test(out: &mut Vec<u8>, ty: Ty, a: u8, b: u8) {
    sized(out, ty, 0x85, b, Rm::R(a), true);
}
/// `mov rm, reg` in full width of the type.
pub fn store(out: &mut Vec<u8>, ty: Ty, to: Mem, reg: u8) {
    sized(out, ty, 0x89, reg, to.into(), true);
}
/// `mov rm, imm`, sign-extended to 64 bits.
pub fn store_imm(out: &mut Vec<u8>, ty: Ty, to: Mem, imm: i32) {
    sized(out, ty, 0xc7, 0, to.into(), false);
    let n = (ty.bytes() as usize).min(4);
    out.extend_from_slice(&imm.to_le_bytes()[..n]);
}
/// Loads and zero-extends to 64 bits.
pub fn load(out: &mut Vec<u8>, ty: Ty, reg: u8, rm: Rm) {
    let force = matches!(rm, Rm::R(r) if byte_reg(r));
    match ty {
        Ty::I8 => insn(out, 0, false, force, &[0x0f, 0xb6], reg, rm),
        Ty::I16 => insn(out, 0, false, false, &[0x0f, 0xb7], reg, rm),
        _ => insn(out, 0, ty == Ty::I64, false, &[0x8b], reg, rm),
    }
}
/// Loads and sign-extends to 64 bits, or to 32 and then zeroes.
pub fn load_signed(out: &mut Vec<u8>, from: Ty, to: Ty, reg: u8, rm: Rm) {
    let force = matches!(rm, Rm::R(r) if byte_reg(r));
    let w = to == Ty::I64;
    match from {
        Ty::I8 => insn(out, 0, w, force, &[0x0f, 0xbe], reg, rm),
        Ty::I16 => insn(out, 0, w, false, &[0x0f, 0xbf], reg, rm),
        Ty::I32 if w => insn(out, 0, true, false, &[0x63], reg, rm),
        _ => insn(out, 0, w, false, &[0x8b], reg, rm),
    }
}
/// `mov to, from`, all 64 bits; nothing if they are the same.
pub fn mov(out: &mut Vec<u8>, to: u8, from: u8) {
    if to != from {
        insn(out, 0, true, false, &[0x8b], to, Rm::R(from));
    }
}
/// `mov reg, imm` in the shortest form that leaves the flags alone.
pub fn mov_imm(out: &mut Vec<u8>, reg: u8, imm: u64) {
    if let Ok(imm) = u32::try_from(imm) {
        if reg >= 8 {
            out.push(0x41);
        }
        out.push(0xb8 | reg & 7);
        out.extend_from_slice(&imm.to_le_bytes());
    } else if let Ok(imm) = i32::try_from(imm as i64) {
        insn(out, 0, true, false, &[0xc7], 0, Rm::R(reg));
        out.extend_from_slice(&imm.to_le_bytes());
    } else {
        out.extend_from_slice(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
        out.extend_from_slice(&imm.to_le_bytes());
    }
}
/// `lea reg, [mem]`, or the move that it is.
pub fn lea(out: &mut Vec<u8>, ty: Ty, reg: u8, m: Mem) {
    let w = ty == Ty::I64;
    if m.index.is_none() && m.disp == 0 {
        if w && reg == m.base {
            return;
        }
        insn(out, 0, w, false, &[0x8b], reg, Rm::R(m.base));
    } else {
        insn(out, 0, w, false, &[0x8d], reg, m.into());
    }
}
/// `shift reg, n`.
pub fn shift_imm(out: &mut Vec<u8>, ty: Ty, op: Shift, reg: u8, n: u8) {
    sized(out, ty, 0xc1, op as u8, Rm::R(reg), false);
    out.push(n);
}
/// `shift reg, cl`.
pub fn shift_cl(out: &mut Vec<u8>, ty: Ty, op: Shift, reg: u8) {
    sized(out, ty, 0xd3, op as u8, Rm::R(reg), false);
}
/// `imul reg, rm`.
pub fn imul(out: &mut Vec<u8>, ty: Ty, reg: u8, rm: Rm) {
    insn(out, 0, ty == Ty::I64, false, &[0x0f, 0xaf], reg, rm);
}
/// `imul reg, rm, imm`.
pub fn imul_imm(out: &mut Vec<u8>, ty: Ty, reg: u8, rm: Rm, imm: i32) {
    insn(out, 0, ty == Ty::I64, false, &[0x69], reg, rm);
    out.extend_from_slice(&imm.to_le_bytes());
}
/// An instruction of opcode 0xf7 on a register of 32 or 64 bits: 2 NOT, 3 NEG, 4 MUL, 5 IMUL, 6 DIV, 7 IDIV.
pub fn unary(out: &mut Vec<u8>, ty: Ty, number: u8, reg: u8) {
    insn(out, 0, ty == Ty::I64, false, &[0xf7], number, Rm::R(reg));
}
/// `setcc al; movzx reg, al`.
pub fn set(out: &mut Vec<u8>, cc: u8, reg: u8) {
    out.extend_from_slice(&[0x0f, 0x90 | cc, 0xc0]);
    insn(out, 0, false, false, &[0x0f, 0xb6], reg, Rm::R(RAX));
}
/// `cmovcc reg, from`.
pub fn cmov(out: &mut Vec<u8>, ty: Ty, cc: u8, reg: u8, from: u8) {
    insn(out, 0, ty == Ty::I64, false, &[0x0f, 0x40 | cc], reg, Rm::R(from));
}
/// `movups xmm, rm`, or `movaps` between registers; nothing if they are the same.
pub fn load_vec(out: &mut Vec<u8>, xmm: u8, rm: Rm) {
    match rm {
        Rm::R(from) if from == xmm => {}
        Rm::R(_) => insn(out, 0, false, false, &[0x0f, 0x28], xmm, rm),
        Rm::M(_) => insn(out, 0, false, false, &[0x0f, 0x10], xmm, rm),
    }
}
/// `movups mem, xmm`.
pub fn store_vec(out: &mut Vec<u8>, to: Mem, xmm: u8) {
    insn(out, 0, false, false, &[0x0f, 0x11], xmm, to.into());
}
/// `movq xmm, rm`; the upper half becomes 0.
pub fn movq_to(out: &mut Vec<u8>, xmm: u8, reg: u8) {
    insn(out, 0x66, true, false, &[0x0f, 0x6e], xmm, Rm::R(reg));
}
/// `movq reg, xmm`.
pub fn movq_from(out: &mut Vec<u8>, reg: u8, xmm: u8) {
    insn(out, 0x66, true, false, &[0x0f, 0x7e], xmm, Rm::R(reg));
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

    fn text(f: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut code = Vec::new();
        f(&mut code);
        let mut decoder = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE);
        let mut all = Vec::new();
        while decoder.can_decode() {
            let mut s = String::new();
            NasmFormatter::new().format(&decoder.decode(), &mut s);
            all.push(s);
        }
        all.join("; ")
    }

    #[test]
    fn bases_and_displacements() {
        for (base, name) in [(RBX, "rbx"), (RSP, "rsp"), (RBP, "rbp"), (R12, "r12"), (R13, "r13")] {
            for (disp, tail) in [(0, ""), (1, "+1"), (-128, "-80h"), (0x1234, "+1234h")] {
                let m = Mem::at(base, disp);
                assert_eq!(text(|o| load(o, Ty::I64, R11, m.into())), format!("mov r11,[{name}{tail}]"));
            }
        }
        let m = Mem { base: R13, index: Some((R12, 3)), disp: 8 };
        assert_eq!(text(|o| lea(o, Ty::I32, RBX, m)), "lea ebx,[r13+r12*8+8]");
    }

    #[test]
    fn widths() {
        assert_eq!(text(|o| alu(o, Ty::I8, Alu::Cmp, RSI, Rm::R(R10))), "cmp sil,r10b");
        assert_eq!(text(|o| alu(o, Ty::I8, Alu::Cmp, RBX, Rm::R(RSI))), "cmp bl,sil");
        assert_eq!(text(|o| alu_imm(o, Ty::I16, Alu::Xor, Rm::R(RBX), 0x1234)), "xor bx,1234h");
        assert_eq!(text(|o| alu_imm(o, Ty::I64, Alu::Sub, Rm::R(R15), -8)), "sub r15,0FFFFFFFFFFFFFFF8h");
        assert_eq!(text(|o| store_imm(o, Ty::I8, Mem::at(RBP, 8), 7)), "mov byte [rbp+8],7");
        assert_eq!(text(|o| mov_imm(o, R10, 1 << 40)), "mov r10,10000000000h");
        assert_eq!(text(|o| mov_imm(o, RBX, u64::MAX)), "mov rbx,0FFFFFFFFFFFFFFFFh");
        assert_eq!(text(|o| load_signed(o, Ty::I8, Ty::I64, RBX, Rm::R(RSI))), "movsx rbx,sil");
        assert_eq!(text(|o| shift_imm(o, Ty::I8, Shift::Rol, RBX, 3)), "rol bl,3");
        assert_eq!(text(|o| movq_from(o, R11, 9)), "movq r11,xmm9");
    }
}
