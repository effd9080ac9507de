//! Data movement: MOV and its widening forms, CMOVcc, SETcc, XCHG, BSWAP, MOVBE, LEA, XLAT, the conversions of rAX.
//!
//! Place: a family of the instruction table. MOV to and from segment, control and debug registers is in `segments` and
//! `system`.

use iced_x86::{Code, Mnemonic, Register};
use twofold_arch::CondCode;
use twofold_arch::cpuid::Feature;
use twofold_ir::{BinOp, RmwOp, Ty, UnOp};

use crate::table::Row;
use crate::translator::{Access, Translator};

const fn row(m: Mnemonic, emit: crate::table::Emit) -> Row {
    Row::all(m, emit)
}

pub(crate) const ROWS: &[Row] = &[
    row(Mnemonic::Mov, mov),
    row(Mnemonic::Movzx, movzx),
    row(Mnemonic::Movsx, movsx),
    row(Mnemonic::Movsxd, movsx),
    row(Mnemonic::Movbe, movbe).feature(Feature::Movbe),
    row(Mnemonic::Movdiri, mov).feature(Feature::Movdiri),
    row(Mnemonic::Movnti, mov).feature(Feature::Sse2),
    row(Mnemonic::Bswap, bswap),
    row(Mnemonic::Lea, lea),
    row(Mnemonic::Xchg, xchg),
    Row::one(Code::Nopw, nop),
    Row::one(Code::Nopd, nop),
    Row::one(Code::Nopq, nop),
    row(Mnemonic::Nop, nop),
    row(Mnemonic::Reservednop, nop),
    row(Mnemonic::Endbr32, nop),
    row(Mnemonic::Endbr64, nop),
    row(Mnemonic::Rdsspd, nop),
    row(Mnemonic::Rdsspq, nop),
    row(Mnemonic::Prefetch, nop),
    row(Mnemonic::Prefetchw, nop),
    row(Mnemonic::Prefetchwt1, nop),
    row(Mnemonic::Prefetchnta, nop),
    row(Mnemonic::Prefetcht0, nop),
    row(Mnemonic::Prefetcht1, nop),
    row(Mnemonic::Prefetcht2, nop),
    row(Mnemonic::Cldemote, nop),
    row(Mnemonic::Prefetchit0, nop),
    row(Mnemonic::Prefetchit1, nop),
    row(Mnemonic::Xlatb, xlat),
    row(Mnemonic::Cbw, |t| convert(t, Ty::I8, Ty::I16)),
    row(Mnemonic::Cwde, |t| convert(t, Ty::I16, Ty::I32)),
    row(Mnemonic::Cdqe, |t| convert(t, Ty::I32, Ty::I64)),
    row(Mnemonic::Cwd, |t| sign_to_dx(t, Ty::I16)),
    row(Mnemonic::Cdq, |t| sign_to_dx(t, Ty::I32)),
    row(Mnemonic::Cqo, |t| sign_to_dx(t, Ty::I64)),
    row(Mnemonic::Cmovo, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovno, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovb, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovae, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmove, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovne, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovbe, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmova, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovs, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovns, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovp, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovnp, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovl, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovge, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovle, cmov).feature(Feature::Cmov),
    row(Mnemonic::Cmovg, cmov).feature(Feature::Cmov),
    row(Mnemonic::Seto, setcc),
    row(Mnemonic::Setno, setcc),
    row(Mnemonic::Setb, setcc),
    row(Mnemonic::Setae, setcc),
    row(Mnemonic::Sete, setcc),
    row(Mnemonic::Setne, setcc),
    row(Mnemonic::Setbe, setcc),
    row(Mnemonic::Seta, setcc),
    row(Mnemonic::Sets, setcc),
    row(Mnemonic::Setns, setcc),
    row(Mnemonic::Setp, setcc),
    row(Mnemonic::Setnp, setcc),
    row(Mnemonic::Setl, setcc),
    row(Mnemonic::Setge, setcc),
    row(Mnemonic::Setle, setcc),
    row(Mnemonic::Setg, setcc),
];

/// The condition of the current instruction.
pub(crate) fn condition(t: &Translator<'_>) -> CondCode {
    use iced_x86::ConditionCode as C;
    match t.insn.condition_code() {
        C::None | C::o => CondCode::O,
        C::no => CondCode::No,
        C::b => CondCode::B,
        C::ae => CondCode::Nb,
        C::e => CondCode::Z,
        C::ne => CondCode::Nz,
        C::be => CondCode::Be,
        C::a => CondCode::Nbe,
        C::s => CondCode::S,
        C::ns => CondCode::Ns,
        C::p => CondCode::P,
        C::np => CondCode::Np,
        C::l => CondCode::L,
        C::ge => CondCode::Nl,
        C::le => CondCode::Le,
        C::g => CondCode::Nle,
    }
}

fn mov(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let v = t.read_op_as(1, ty);
    t.write_op(0, v);
}

fn movzx(t: &mut Translator<'_>) {
    let to = t.op_ty(0);
    let v = t.read_op(1);
    let v = t.b.zext(to, v);
    t.write_op(0, v);
}

fn movsx(t: &mut Translator<'_>) {
    let to = t.op_ty(0);
    let v = t.read_op(1);
    // MOVSXD with a 16- or 32-bit operand size is a plain move.
    let v = if t.b.ty(v).bits() >= to.bits() { t.b.trunc(to, v) } else { t.b.sext(to, v) };
    t.write_op(0, v);
}

fn movbe(t: &mut Translator<'_>) {
    let v = t.read_op(1);
    let v = t.b.un(UnOp::Bswap, v);
    t.write_op(0, v);
}

fn bswap(t: &mut Translator<'_>) {
    let v = t.read_op(0);
    let v = if t.b.ty(v) == Ty::I16 { t.b.iconst(Ty::I16, 0) } else { t.b.un(UnOp::Bswap, v) };
    t.write_op(0, v);
}

fn lea(t: &mut Translator<'_>) {
    let to = t.op_ty(0);
    let ea = t.effective_address();
    let v = if t.b.ty(ea).bits() > to.bits() { t.b.trunc(to, ea) } else { t.b.zext(to, ea) };
    t.write_op(0, v);
}

fn xchg(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let (mem, reg) = if t.is_mem(1) { (1, 0) } else { (0, 1) };
    if t.is_mem(mem) {
        // Locked with or without the prefix.
        let v = t.read_op(reg);
        let addr = t.mem_addr(ty.bytes(), Access::Write);
        t.claim_atomic(ty, addr);
        let old = t.b.rmw(RmwOp::Xchg, addr, v);
        return t.write_op(reg, old);
    }
    let (a, b) = (t.read_op(0), t.read_op(1));
    t.write_op(0, b);
    t.write_op(1, a);
}

pub(crate) fn nop(_: &mut Translator<'_>) {}

fn xlat(t: &mut Translator<'_>) {
    let ty = t.addr_ty();
    let base = t.get_gpr(ty, 3);
    let al = t.get_gpr(Ty::I8, 0);
    let al = t.b.zext(ty, al);
    let ea = t.b.add(base, al);
    let seg = t.mem_segment();
    let addr = t.linear(seg, ea, 1, Access::Read);
    let flags = t.mem_flags();
    let v = t.b.load(Ty::I8, flags, addr);
    t.write_gpr(Register::AL, v);
}

fn convert(t: &mut Translator<'_>, from: Ty, to: Ty) {
    let v = t.get_gpr(from, 0);
    let v = t.b.sext(to, v);
    t.put_gpr(0, v);
}

fn sign_to_dx(t: &mut Translator<'_>, ty: Ty) {
    let v = t.get_gpr(ty, 0);
    let v = t.b.bin_imm(BinOp::Sar, v, u64::from(ty.bits() - 1));
    t.put_gpr(2, v);
}

fn cmov(t: &mut Translator<'_>) {
    // The source is read, and a 32-bit destination zero-extended, whether or not the condition holds.
    let v = t.read_op(1);
    let old = t.read_op(0);
    let c = t.b.cond(condition(t));
    let v = t.b.select(c, v, old);
    t.write_op(0, v);
}

fn setcc(t: &mut Translator<'_>) {
    let c = t.b.cond(condition(t));
    t.write_op(0, c);
}
