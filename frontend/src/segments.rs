//! Segment registers and descriptor tables: MOV to and from segment registers, LDS LES LSS LFS LGS, LGDT and kin, LLDT
//! LTR SLDT STR, LAR LSL VERR VERW, SWAPGS, RDFSBASE and kin.
//!
//! Place: a family of the instruction table. PUSH and POP of segment registers are in `stack`, far transfers in `branch`.

use core::mem::offset_of;

use iced_x86::{Code, Mnemonic, Register};
use twofold_arch::cpuid::Feature;
use twofold_arch::{CondCode, CpuState, Exception, Loc};
use twofold_ir::{Helper, Ty, Value};

use crate::branch::load_far;
use crate::table::{Need, Row};
use crate::translator::{Access, Translator, segment};

const PROTECTED_CPL0: Need = Need::PROTECTED.and(Need::CPL0);
const FSGSBASE: Feature = Feature::Fsgsbase;

pub(crate) const ROWS: &[Row] = &[
    Row::one(Code::Mov_rm16_Sreg, read_segment),
    Row::one(Code::Mov_r32m16_Sreg, read_segment),
    Row::one(Code::Mov_r64m16_Sreg, read_segment),
    Row::one(Code::Mov_Sreg_rm16, write_segment),
    Row::one(Code::Mov_Sreg_r32m16, write_segment),
    Row::one(Code::Mov_Sreg_r64m16, write_segment),
    Row::all(Mnemonic::Les, |t| load_far_register(t, 0)),
    Row::all(Mnemonic::Lss, |t| load_far_register(t, 2)),
    Row::all(Mnemonic::Lds, |t| load_far_register(t, 3)),
    Row::all(Mnemonic::Lfs, |t| load_far_register(t, 4)),
    Row::all(Mnemonic::Lgs, |t| load_far_register(t, 5)),
    Row::all(Mnemonic::Lgdt, |t| load_table(t, 0)).need(Need::CPL0),
    Row::all(Mnemonic::Lidt, |t| load_table(t, 1)).need(Need::CPL0),
    Row::all(Mnemonic::Sgdt, |t| store_table(t, 0)),
    Row::all(Mnemonic::Sidt, |t| store_table(t, 1)),
    Row::all(Mnemonic::Lldt, |t| load_selector(t, Helper::Lldt)).need(PROTECTED_CPL0),
    Row::all(Mnemonic::Ltr, |t| load_selector(t, Helper::Ltr)).need(PROTECTED_CPL0),
    Row::all(Mnemonic::Sldt, |t| store_system(t, 0)).need(Need::PROTECTED),
    Row::all(Mnemonic::Str, |t| store_system(t, 1)).need(Need::PROTECTED),
    Row::all(Mnemonic::Smsw, |t| store_system(t, 2)),
    Row::all(Mnemonic::Lar, |t| probe(t, 0)).need(Need::PROTECTED),
    Row::all(Mnemonic::Lsl, |t| probe(t, 1)).need(Need::PROTECTED),
    Row::all(Mnemonic::Verr, |t| verify(t, 2)).need(Need::PROTECTED),
    Row::all(Mnemonic::Verw, |t| verify(t, 3)).need(Need::PROTECTED),
    Row::all(Mnemonic::Swapgs, swapgs).need(Need::BITS64).need(Need::CPL0),
    Row::all(Mnemonic::Rdfsbase, |t| read_base(t, 0)).feature(FSGSBASE).need(Need::BITS64),
    Row::all(Mnemonic::Rdgsbase, |t| read_base(t, 1)).feature(FSGSBASE).need(Need::BITS64),
    Row::all(Mnemonic::Wrfsbase, |t| write_base(t, 2)).feature(FSGSBASE).need(Need::BITS64),
    Row::all(Mnemonic::Wrgsbase, |t| write_base(t, 3)).feature(FSGSBASE).need(Need::BITS64),
];

fn read_segment(t: &mut Translator<'_>) {
    let n = segment(t.insn.op1_register());
    let v = t.b.get(Ty::I16, Loc::seg_selector(n));
    if t.is_mem(0) {
        return t.store_mem(v);
    }
    let to = t.op_ty(0);
    let v = t.b.zext(to, v);
    t.write_op(0, v);
}

fn write_segment(t: &mut Translator<'_>) {
    let r = t.insn.op0_register();
    if r == Register::CS || !r.is_segment_register() {
        return t.raise(Exception::UD);
    }
    let selector = t.read_op_as(1, Ty::I16);
    load_segment(t, segment(r), selector, true);
}

/// Loads a segment register, and ends the block where that changes the key or opens a shadow: outside 64-bit code any
/// segment's limit and base shape translations; `shadow` (MOV and POP) says that loading SS blocks events for an instruction.
pub(crate) fn load_segment(t: &mut Translator<'_>, seg: u8, selector: Value, shadow: bool) {
    let n = t.c64(u64::from(seg));
    t.call(Helper::LoadSeg, &[n, selector]);
    if seg == crate::address::SS && shadow {
        let mov_ss = t.b.iconst(Ty::I32, 2);
        t.b.put(Loc(offset_of!(CpuState, shadow) as u16), mov_ss);
    }
    if seg == crate::address::SS || !t.is64() {
        t.end_dispatch();
    }
}

fn load_far_register(t: &mut Translator<'_>, seg: u8) {
    let ty = t.op_ty(0);
    let (off, selector) = load_far(t, ty);
    load_segment(t, seg, selector, false);
    t.write_op(0, off);
}

/// Bytes of the base that LGDT and kin move: 3 with a 16-bit operand size, 8 in 64-bit code.
fn table_bytes(t: &Translator<'_>) -> u64 {
    match t.insn.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 3,
        Code::Lgdt_m1664 | Code::Lidt_m1664 | Code::Sgdt_m1664 | Code::Sidt_m1664 => 8,
        _ => 4,
    }
}

fn load_table(t: &mut Translator<'_>, idt: u64) {
    let bytes = table_bytes(t);
    let addr = t.mem_addr_unaligned(2 + bytes.max(4) as u32, Access::Read);
    let (idt, bytes) = (t.c64(idt), t.c64(bytes));
    t.call(Helper::LoadTable, &[addr, idt, bytes]);
}

fn store_table(t: &mut Translator<'_>, idt: u64) {
    let bytes = table_bytes(t);
    let addr = t.mem_addr_unaligned(2 + bytes as u32, Access::Write);
    let (idt, bytes) = (t.c64(idt), t.c64(bytes));
    t.call(Helper::StoreTable, &[addr, idt, bytes]);
}

fn load_selector(t: &mut Translator<'_>, helper: Helper) {
    if t.is_mem(0) {
        // A VM exit comes before the faults of the operand; reading the register has the same one.
        let sldt = t.c64(0);
        t.call(Helper::StoreSystem, &[sldt]);
    }
    let v = t.read_op_as(0, Ty::I16);
    t.call(helper, &[v]);
}

fn store_system(t: &mut Translator<'_>, what: u64) {
    let what = t.c64(what);
    let v = t.call(Helper::StoreSystem, &[what]);
    let ty = if t.is_mem(0) { Ty::I16 } else { t.op_ty(0) };
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

/// LAR and LSL: the destination is written when the helper has set ZF.
fn probe(t: &mut Translator<'_>, kind: u64) {
    let selector = t.read_op_as(1, Ty::I16);
    let kind = t.c64(kind);
    let v = t.call(Helper::ProbeSelector, &[selector, kind]);
    let (n, ty, _) = crate::translator::gpr(t.insn.op0_register());
    let ok = t.b.cond(CondCode::Z);
    if ty == Ty::I16 {
        let v = t.b.trunc(ty, v);
        let old = t.get_gpr(ty, n);
        let v = t.b.select(ok, v, old);
        return t.put_gpr(n, v);
    }
    let old = t.get_gpr(Ty::I64, n);
    let v = t.b.trunc(Ty::I32, v);
    let v = t.b.zext(Ty::I64, v);
    let v = t.b.select(ok, v, old);
    t.put_gpr(n, v);
}

fn verify(t: &mut Translator<'_>, kind: u64) {
    let selector = t.read_op_as(0, Ty::I16);
    let kind = t.c64(kind);
    t.call(Helper::ProbeSelector, &[selector, kind]);
}

/// Exchanges GS.base and IA32_KERNEL_GS_BASE.
fn swapgs(t: &mut Translator<'_>) {
    let gs = Loc::seg_base(5);
    let a = t.b.get(Ty::I64, gs);
    let b = t.b.get(Ty::I64, Loc::KERNEL_GS_BASE);
    t.b.put(gs, b);
    t.b.put(Loc::KERNEL_GS_BASE, a);
}

fn read_base(t: &mut Translator<'_>, which: u64) {
    let ty = t.op_ty(0);
    let (which, none) = (t.c64(which), t.c64(0));
    let v = t.call(Helper::FsGsBase, &[which, none]);
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

fn write_base(t: &mut Translator<'_>, which: u64) {
    let v = t.read_op(0);
    let which = t.c64(which);
    t.call(Helper::FsGsBase, &[which, v]);
}
