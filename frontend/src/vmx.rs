//! VMX instructions, and what a VM exit says about the instruction that caused it.
//!
//! Place: a family of the instruction table; and, beside the table, [`describe`], which decodes one instruction again when
//! it has exited: its length, its VM-exit instruction information and its displacement (SDM Vol 3C, "Information for VM
//! Exits Due to Instruction Execution"). Doing that at the exit keeps it out of translated code.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use twofold_arch::TbFlags;
use twofold_arch::cpuid::Feature;
use twofold_ir::{Helper, Ty};

use crate::address::SS;
use crate::table::Row;
use crate::translator::{Access, Translator, gpr, segment};

/// The instruction word of [`Helper::Vmx`].
pub mod word {
    #![allow(missing_docs)]
    pub const INSTRUCTION: u64 = 0xff;
    pub const VMXON: u64 = 0;
    pub const VMXOFF: u64 = 1;
    pub const VMCLEAR: u64 = 2;
    pub const VMPTRLD: u64 = 3;
    pub const VMPTRST: u64 = 4;
    pub const VMREAD: u64 = 5;
    pub const VMWRITE: u64 = 6;
    pub const VMLAUNCH: u64 = 7;
    pub const VMRESUME: u64 = 8;
    pub const VMCALL: u64 = 9;
    pub const INVEPT: u64 = 10;
    pub const INVVPID: u64 = 11;
    pub const VMFUNC: u64 = 12;
    /// Only the checks that come before the operands.
    pub const CHECK: u64 = 1 << 8;
    /// The primary operand is memory, at the linear address in the second argument.
    pub const MEMORY: u64 = 1 << 9;
    /// The memory operand is in SS.
    pub const STACK: u64 = 1 << 10;
    /// Number of the register that is the primary operand.
    pub const REG_SHIFT: u64 = 16;
}

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Vmxon, |t| pointer(t, word::VMXON)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmclear, |t| pointer(t, word::VMCLEAR)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmptrld, |t| pointer(t, word::VMPTRLD)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmptrst, |t| pointer(t, word::VMPTRST)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmread, |t| field(t, word::VMREAD)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmwrite, |t| field(t, word::VMWRITE)).feature(Feature::Vmx),
    Row::all(Mnemonic::Invept, |t| invalidate(t, word::INVEPT)).feature(Feature::Vmx),
    Row::all(Mnemonic::Invvpid, |t| invalidate(t, word::INVVPID)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmxoff, |t| plain(t, word::VMXOFF)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmcall, |t| plain(t, word::VMCALL)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmfunc, |t| plain(t, word::VMFUNC)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmlaunch, |t| enter(t, word::VMLAUNCH)).feature(Feature::Vmx),
    Row::all(Mnemonic::Vmresume, |t| enter(t, word::VMRESUME)).feature(Feature::Vmx),
];

/// Calls the helper with an instruction word, an address and a second register operand's number.
fn call(t: &mut Translator<'_>, word: u64, address: Option<twofold_ir::Value>, reg: u64) {
    let zero = t.c64(0);
    let (word, reg) = (t.c64(word), t.c64(reg));
    let next = t.next_rip();
    t.call(Helper::Vmx, &[word, address.unwrap_or(zero), reg, next]);
}

/// The address of the memory operand; what the instruction refuses before it looks at the operand comes first.
fn address(t: &mut Translator<'_>, which: u64, bytes: u32, access: Access) -> (twofold_ir::Value, u64) {
    if !t.is64() {
        call(t, which | word::CHECK, None, 0);
    }
    let stack = if t.mem_segment() == SS { word::STACK } else { 0 };
    (t.mem_addr_unaligned(bytes, access), which | word::MEMORY | stack)
}

fn pointer(t: &mut Translator<'_>, which: u64) {
    let access = if which == word::VMPTRST { Access::Write } else { Access::Read };
    let (at, word) = address(t, which, 8, access);
    call(t, word, Some(at), 0);
    t.end_dispatch();
}

/// VMREAD and VMWRITE: the primary operand is `r/m`, the register operand names the field.
fn field(t: &mut Translator<'_>, which: u64) {
    let read = which == word::VMREAD;
    let (rm, reg) = if read { (0, 1) } else { (1, 0) };
    let encoding = u64::from(gpr(t.insn.op_register(reg)).0);
    if t.is_mem(rm) {
        let bytes = if t.is64() { 8 } else { 4 };
        let (at, word) = address(t, which, bytes, if read { Access::Write } else { Access::Read });
        call(t, word, Some(at), encoding);
    } else {
        let n = u64::from(gpr(t.insn.op_register(rm)).0);
        call(t, which | n << word::REG_SHIFT, None, encoding);
    }
}

fn invalidate(t: &mut Translator<'_>, which: u64) {
    let kind = u64::from(gpr(t.insn.op0_register()).0);
    let (at, word) = address(t, which, 16, Access::Read);
    call(t, word, Some(at), kind);
    t.end_dispatch();
}

fn plain(t: &mut Translator<'_>, which: u64) {
    call(t, which, None, 0);
    t.end_dispatch();
}

/// VMLAUNCH and VMRESUME: the helper sets RIP, in whichever world it then is.
fn enter(t: &mut Translator<'_>, which: u64) {
    call(t, which, None, 0);
    t.end_helped();
}

/// An instruction as a VM exit describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Described {
    /// Its length in bytes.
    pub length: u32,
    /// VM-exit instruction information, 0 for instructions that have none.
    pub info: u32,
    /// The displacement of a memory operand, sign-extended; for RIP-relative operands the address.
    pub displacement: u64,
    /// The port operand of IN or OUT is an immediate.
    pub immediate_port: bool,
    /// An operand is memory.
    pub memory: bool,
    /// A register operand: of MOV to or from a control or debug register, and of RDRAND and RDSEED.
    pub register: u8,
    /// Segment of the memory operand (or of the string source), in encoding order.
    pub segment: u8,
}

/// Decodes the instruction in `bytes` at `rip`; `None` when there is none.
#[must_use]
pub fn describe(flags: TbFlags, rip: u64, bytes: &[u8]) -> Option<Described> {
    let bitness = match flags.size() {
        twofold_arch::CodeSize::Bits16 => 16,
        twofold_arch::CodeSize::Bits32 => 32,
        twofold_arch::CodeSize::Bits64 => 64,
    };
    let mut insn = Instruction::default();
    Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE).decode_out(&mut insn);
    if insn.code() == Code::INVALID {
        return None;
    }
    let mut d = Described {
        length: insn.len() as u32,
        info: info(&insn, bitness),
        displacement: displacement(&insn),
        immediate_port: (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Immediate8),
        memory: has_memory(&insn),
        register: 0,
        segment: segment(insn.memory_segment()),
    };
    let registers = (0..insn.op_count()).filter(|&n| insn.op_kind(n) == OpKind::Register).map(|n| insn.op_register(n));
    if let Some(r) = registers.into_iter().find(|r| r.is_gpr()) {
        d.register = gpr(r).0;
    }
    Some(d)
}

fn displacement(insn: &Instruction) -> u64 {
    if !has_memory(insn) {
        return 0;
    }
    let d = insn.memory_displacement64();
    match (insn.memory_base(), insn.memory_displ_size()) {
        (Register::RIP | Register::EIP, _) => d,
        // iced zero-extends displacements of 16- and 32-bit addresses.
        _ => match address_size(insn) {
            0 => d as u16 as i16 as u64,
            1 => d as u32 as i32 as u64,
            _ => d,
        },
    }
}

fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory)
}

/// 0, 1, 2 for 16-, 32-, 64-bit addresses.
fn address_size(insn: &Instruction) -> u32 {
    let base = insn.memory_base();
    let r = if base != Register::None { base } else { insn.memory_index() };
    match r {
        Register::RIP => 2,
        Register::EIP => 1,
        Register::None => match insn.memory_displ_size() {
            2 => 0,
            8 => 2,
            _ => 1,
        },
        r => match gpr(r).1 {
            Ty::I16 => 0,
            Ty::I32 => 1,
            _ => 2,
        },
    }
}

/// The bits that all formats with a memory operand share.
fn memory_bits(insn: &Instruction) -> u32 {
    let mut v = address_size(insn) << 7 | u32::from(segment(insn.memory_segment())) << 15;
    let index = insn.memory_index();
    if index.is_gpr() {
        v |= insn.memory_index_scale().trailing_zeros() | u32::from(gpr(index).0) << 18;
    } else {
        v |= 1 << 22;
    }
    let base = insn.memory_base();
    if base.is_gpr() { v | u32::from(gpr(base).0) << 23 } else { v | 1 << 27 }
}

fn string_bits(insn: &Instruction) -> u32 {
    let size = (0..insn.op_count()).find_map(|n| match insn.op_kind(n) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(0),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(1),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(2),
        _ => None,
    });
    let outs = (0..insn.op_count())
        .any(|n| matches!(insn.op_kind(n), OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI));
    let seg = if outs { u32::from(segment(insn.memory_segment())) } else { 0 };
    size.unwrap_or(0) << 7 | seg << 15
}

fn info(insn: &Instruction, bitness: u32) -> u32 {
    let reg = |n: u32| u32::from(gpr(insn.op_register(n)).0);
    match insn.mnemonic() {
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            string_bits(insn)
        }
        Mnemonic::Invept | Mnemonic::Invvpid | Mnemonic::Invpcid => memory_bits(insn) | reg(0) << 28,
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt => {
            let which = match insn.mnemonic() {
                Mnemonic::Sgdt => 0,
                Mnemonic::Sidt => 1,
                Mnemonic::Lgdt => 2,
                _ => 3,
            };
            let wide = match insn.code() {
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16 => 0,
                _ => u32::from(bitness != 64),
            };
            memory_bits(insn) | wide << 11 | which << 28
        }
        Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Lldt | Mnemonic::Ltr => {
            let which = match insn.mnemonic() {
                Mnemonic::Sldt => 0,
                Mnemonic::Str => 1,
                Mnemonic::Lldt => 2,
                _ => 3,
            };
            let operand = if has_memory(insn) { memory_bits(insn) } else { reg(0) << 3 | 1 << 10 };
            operand | which << 28
        }
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            let size = match gpr(insn.op0_register()).1 {
                Ty::I16 => 0,
                Ty::I32 => 1,
                _ => 2,
            };
            reg(0) << 3 | size << 11
        }
        Mnemonic::Vmread if has_memory(insn) => memory_bits(insn) | reg(1) << 28,
        Mnemonic::Vmread => reg(0) << 3 | 1 << 10 | reg(1) << 28,
        Mnemonic::Vmwrite if has_memory(insn) => memory_bits(insn) | reg(0) << 28,
        Mnemonic::Vmwrite => reg(1) << 3 | 1 << 10 | reg(0) << 28,
        Mnemonic::Vmclear
        | Mnemonic::Vmptrld
        | Mnemonic::Vmptrst
        | Mnemonic::Vmxon
        | Mnemonic::Xsaves
        | Mnemonic::Xsaves64
        | Mnemonic::Xrstors
        | Mnemonic::Xrstors64 => memory_bits(insn),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: TbFlags = TbFlags(2);

    #[test]
    fn g4_memory_operands() {
        // vmptrld [rbx + rcx*4 + 0x10]
        let d = describe(LONG, 0x1000, &[0x0f, 0xc7, 0x74, 0x8b, 0x10]).unwrap();
        assert_eq!((d.length, d.displacement), (5, 0x10));
        assert_eq!(d.info, 2 | 2 << 7 | 3 << 15 | 1 << 18 | 3 << 23);
        // vmclear [rip - 8]
        let d = describe(LONG, 0x1000, &[0x66, 0x0f, 0xc7, 0x35, 0xf8, 0xff, 0xff, 0xff]).unwrap();
        assert_eq!(d.displacement, 0x1000);
        assert_eq!(d.info & (1 << 22 | 1 << 27), 1 << 22 | 1 << 27);
    }

    #[test]
    fn g4_register_operands() {
        // vmread rax, rdx: destination rax, field in rdx
        let d = describe(LONG, 0, &[0x0f, 0x78, 0xd0]).unwrap();
        assert_eq!(d.info, 1 << 10 | 2 << 28);
        // vmwrite rdx, rax: field in rdx, source rax
        let d = describe(LONG, 0, &[0x0f, 0x79, 0xd0]).unwrap();
        assert_eq!(d.info, 1 << 10 | 2 << 28);
        // out 0x80, al
        assert!(describe(LONG, 0, &[0xe6, 0x80]).unwrap().immediate_port);
    }
}
