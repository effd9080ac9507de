//! RFLAGS: CLC STC CMC, CLD STD, LAHF SAHF, PUSHF POPF, CLI STI, CLAC STAC.
//!
//! Place: a family of the instruction table. The six arithmetic flags are lazy; DF, IF, AC and the rest are bits of
//! `CpuState::rflags_sys`.

use iced_x86::{Mnemonic, Register};
use twofold_arch::control::rflags;
use twofold_arch::cpuid::Feature;
use twofold_arch::{Exception, Loc, TbFlags};
use twofold_ir::{BinOp, Helper, Ty, Value};

use crate::table::Row;
use crate::translator::Translator;

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Clc, |t| carry(t, |t, f| t.b.bin_imm(BinOp::And, f, !rflags::CF))),
    Row::all(Mnemonic::Stc, |t| carry(t, |t, f| t.b.bin_imm(BinOp::Or, f, rflags::CF))),
    Row::all(Mnemonic::Cmc, |t| carry(t, |t, f| t.b.bin_imm(BinOp::Xor, f, rflags::CF))),
    Row::all(Mnemonic::Cld, |t| sys_bits(t, BinOp::And, !rflags::DF)),
    Row::all(Mnemonic::Std, |t| sys_bits(t, BinOp::Or, rflags::DF)),
    Row::all(Mnemonic::Lahf, lahf),
    Row::all(Mnemonic::Sahf, sahf),
    Row::all(Mnemonic::Pushf, |t| pushf(t, Ty::I16)),
    Row::all(Mnemonic::Pushfd, |t| pushf(t, Ty::I32)),
    Row::all(Mnemonic::Pushfq, |t| pushf(t, Ty::I64)),
    Row::all(Mnemonic::Popf, |t| popf(t, Ty::I16)),
    Row::all(Mnemonic::Popfd, |t| popf(t, Ty::I32)),
    Row::all(Mnemonic::Popfq, |t| popf(t, Ty::I64)),
    Row::all(Mnemonic::Cli, cli),
    Row::all(Mnemonic::Sti, sti),
    Row::all(Mnemonic::Clac, |t| set_ac(t, 0)).feature(Feature::Smap),
    Row::all(Mnemonic::Stac, |t| set_ac(t, 1)).feature(Feature::Smap),
];

fn carry(t: &mut Translator<'_>, change: fn(&mut Translator<'_>, Value) -> Value) {
    let f = t.b.flags();
    let f = change(t, f);
    t.b.set_flags(f);
}

fn sys_bits(t: &mut Translator<'_>, op: BinOp, bits: u64) {
    let f = t.b.get(Ty::I64, Loc::RFLAGS_SYS);
    let f = t.b.bin_imm(op, f, bits);
    t.b.put(Loc::RFLAGS_SYS, f);
}

fn lahf(t: &mut Translator<'_>) {
    if t.is64() && !t.has(Feature::LahfLm) {
        return t.raise(Exception::UD);
    }
    let f = t.b.flags();
    let f = t.b.bin_imm(BinOp::Or, f, rflags::FIXED1);
    let f = t.b.trunc(Ty::I8, f);
    t.write_gpr(Register::AH, f);
}

fn sahf(t: &mut Translator<'_>) {
    if t.is64() && !t.has(Feature::LahfLm) {
        return t.raise(Exception::UD);
    }
    let ah = t.read_gpr(Register::AH);
    let ah = t.b.zext(Ty::I64, ah);
    let low = t.b.bin_imm(BinOp::And, ah, rflags::ARITH & 0xff);
    let f = t.b.flags();
    let of = t.b.bin_imm(BinOp::And, f, rflags::OF);
    let f = t.b.or(of, low);
    t.b.set_flags(f);
}

fn pushf(t: &mut Translator<'_>, ty: Ty) {
    let image = if t.flags.has(TbFlags::VM86) {
        let size = t.c64(u64::from(ty.log2_bytes()));
        t.call(Helper::Pushf, &[size])
    } else {
        let arith = t.b.flags();
        let sys = t.b.get(Ty::I64, Loc::RFLAGS_SYS);
        let sys = t.b.bin_imm(BinOp::And, sys, rflags::SYS & !(rflags::RF | rflags::VM));
        let f = t.b.or(arith, sys);
        t.b.bin_imm(BinOp::Or, f, rflags::FIXED1)
    };
    let v = t.b.trunc(ty, image);
    t.push(v);
}

fn popf(t: &mut Translator<'_>, ty: Ty) {
    let (v, sp) = t.pop(ty);
    let size = t.c64(u64::from(ty.log2_bytes()));
    t.call(Helper::Popf, &[v, size]);
    t.put_sp(sp);
    // What the dispatcher would have to see, the helper has it look at.
    t.end(t.direct_exit(t.next), true);
}

fn cli(t: &mut Translator<'_>) {
    if t.flags.cpl() == 0 && !t.flags.has(TbFlags::VM86) {
        return sys_bits(t, BinOp::And, !rflags::IF);
    }
    t.call(Helper::Cli, &[]);
}

fn sti(t: &mut Translator<'_>) {
    let covers_next = t.next_is_plain();
    let told = t.c64(covers_next.into());
    t.call(Helper::Sti, &[told]);
    if covers_next {
        t.end_after_next();
    } else {
        t.end_dispatch();
    }
}

fn set_ac(t: &mut Translator<'_>, set: u64) {
    // #UD, not #GP, above CPL 0.
    if t.flags.cpl() != 0 {
        return t.raise(Exception::UD);
    }
    let set = t.c64(set);
    t.call(Helper::SetAc, &[set]);
    t.end_dispatch();
}
