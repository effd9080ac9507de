//! Addition, subtraction and logic: ADD ADC SUB SBB CMP AND OR XOR TEST INC DEC NEG NOT, CMPXCHG(8B/16B), XADD, ADCX/ADOX
//! and decimal adjustment.
//!
//! Place: a family of the instruction table. The shape of a read-modify-write: with LOCK one atomic op; without it a load
//! with the intent to write, then the store; registers and flags last.

use iced_x86::{Mnemonic, Register};
use twofold_arch::control::rflags;
use twofold_arch::cpuid::Feature;
use twofold_arch::{CcKind, CondCode};
use twofold_ir::{BinOp, Helper, IntCc, RmwOp, Ty, UnOp, Value};

use crate::table::{Need, Row};
use crate::translator::{Access, Place, Translator, gpr};

/// A two-operand operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alu {
    Add,
    Adc,
    Sub,
    Sbb,
    And,
    Or,
    Xor,
}

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Add, |t| alu(t, Alu::Add)),
    Row::all(Mnemonic::Adc, |t| alu(t, Alu::Adc)),
    Row::all(Mnemonic::Sub, |t| alu(t, Alu::Sub)),
    Row::all(Mnemonic::Sbb, |t| alu(t, Alu::Sbb)),
    Row::all(Mnemonic::And, |t| alu(t, Alu::And)),
    Row::all(Mnemonic::Or, |t| alu(t, Alu::Or)),
    Row::all(Mnemonic::Xor, |t| alu(t, Alu::Xor)),
    Row::all(Mnemonic::Cmp, cmp),
    Row::all(Mnemonic::Test, test),
    Row::all(Mnemonic::Inc, |t| inc_dec(t, BinOp::Add, RmwOp::Add, CcKind::Inc)),
    Row::all(Mnemonic::Dec, |t| inc_dec(t, BinOp::Sub, RmwOp::Sub, CcKind::Dec)),
    Row::all(Mnemonic::Neg, neg),
    Row::all(Mnemonic::Not, not),
    Row::all(Mnemonic::Cmpxchg, cmpxchg),
    Row::all(Mnemonic::Cmpxchg8b, cmpxchg8b).feature(Feature::Cx8),
    Row::all(Mnemonic::Cmpxchg16b, cmpxchg16b).feature(Feature::Cx16),
    Row::all(Mnemonic::Xadd, xadd),
    Row::all(Mnemonic::Adcx, |t| add_with_flag(t, rflags::CF)).feature(Feature::Adx),
    Row::all(Mnemonic::Adox, |t| add_with_flag(t, rflags::OF)).feature(Feature::Adx),
    Row::all(Mnemonic::Daa, |t| bcd(t, 0)),
    Row::all(Mnemonic::Das, |t| bcd(t, 1)),
    Row::all(Mnemonic::Aaa, |t| bcd(t, 2)),
    Row::all(Mnemonic::Aas, |t| bcd(t, 3)),
    Row::all(Mnemonic::Aam, |t| bcd(t, 4)),
    Row::all(Mnemonic::Aad, |t| bcd(t, 5)),
    Row::all(Mnemonic::Salc, salc),
    Row::all(Mnemonic::Arpl, arpl).need(Need::PROTECTED),
];

/// The carry flag as 0 or 1 of type `ty`.
fn carry(t: &mut Translator<'_>, ty: Ty) -> Value {
    let c = t.b.cond(CondCode::B);
    t.b.zext(ty, c)
}

fn alu(t: &mut Translator<'_>, op: Alu) {
    let ty = t.op_ty(0);
    // The idioms `xor r, r` and `sub r, r` make 0 whatever the register holds.
    if matches!(op, Alu::Xor | Alu::Sub) && !t.is_mem(0) && t.insn.op0_register() == t.insn.op1_register() {
        let zero = t.b.iconst(ty, 0);
        t.write_op(0, zero);
        return t.b.set_cc(CcKind::Logic, zero, None, None);
    }
    let c = if matches!(op, Alu::Adc | Alu::Sbb) { Some(carry(t, ty)) } else { None };
    let b = t.read_op_as(1, ty);
    let place = t.place(0, ty, Access::Write);
    let a = match place {
        Place::Mem { addr, .. } if t.locked() => {
            let (rmw, operand) = match op {
                Alu::Add => (RmwOp::Add, b),
                Alu::Sub => (RmwOp::Sub, b),
                Alu::And => (RmwOp::And, b),
                Alu::Or => (RmwOp::Or, b),
                Alu::Xor => (RmwOp::Xor, b),
                Alu::Adc | Alu::Sbb => {
                    let sum = t.b.add(b, c.unwrap_or(b));
                    (if op == Alu::Adc { RmwOp::Add } else { RmwOp::Sub }, sum)
                }
            };
            t.b.rmw(rmw, addr, operand)
        }
        _ => t.read_for_write(place, ty),
    };
    let (bin, kind) = match op {
        Alu::Add => (BinOp::Add, CcKind::Add),
        Alu::Adc => (BinOp::Add, CcKind::Adc),
        Alu::Sub => (BinOp::Sub, CcKind::Sub),
        Alu::Sbb => (BinOp::Sub, CcKind::Sbb),
        Alu::And => (BinOp::And, CcKind::Logic),
        Alu::Or => (BinOp::Or, CcKind::Logic),
        Alu::Xor => (BinOp::Xor, CcKind::Logic),
    };
    let mut r = t.b.bin(bin, a, b);
    if let Some(c) = c {
        r = t.b.bin(bin, r, c);
    }
    if !t.locked() {
        t.write_place(place, r);
    }
    let src = if kind == CcKind::Logic { None } else { Some(b) };
    t.b.set_cc(kind, r, src, c);
}

fn cmp(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let a = t.read_op(0);
    let b = t.read_op_as(1, ty);
    let r = t.b.sub(a, b);
    t.b.set_cc(CcKind::Sub, r, Some(b), None);
}

fn test(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let a = t.read_op(0);
    let same = !t.is_mem(0)
        && t.insn.op1_kind() == iced_x86::OpKind::Register
        && t.insn.op0_register() == t.insn.op1_register();
    let r = if same {
        a
    } else {
        let b = t.read_op_as(1, ty);
        t.b.and(a, b)
    };
    t.b.set_cc(CcKind::Logic, r, None, None);
}

fn inc_dec(t: &mut Translator<'_>, op: BinOp, rmw: RmwOp, kind: CcKind) {
    let ty = t.op_ty(0);
    let cf = t.b.cond(CondCode::B);
    let one = t.b.iconst(ty, 1);
    let place = t.place(0, ty, Access::Write);
    let r = match place {
        Place::Mem { addr, .. } if t.locked() => {
            let a = t.b.rmw(rmw, addr, one);
            t.b.bin(op, a, one)
        }
        _ => {
            let a = t.read_for_write(place, ty);
            let r = t.b.bin(op, a, one);
            t.write_place(place, r);
            r
        }
    };
    t.b.set_cc(kind, r, Some(cf), None);
}

fn neg(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let place = t.place(0, ty, Access::Write);
    let a = t.read_for_write(place, ty);
    let r = t.b.un(UnOp::Neg, a);
    match place {
        Place::Mem { addr, .. } if t.locked() => {
            // No atomic op negates: try to exchange, and run the instruction again when somebody was faster.
            let found = t.b.cmpxchg(addr, a, r);
            let lost = t.b.cmp(IntCc::Ne, found, a);
            t.again_if(lost);
        }
        _ => t.write_place(place, r),
    }
    t.b.set_cc(CcKind::Sub, r, Some(a), None);
}

fn not(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let place = t.place(0, ty, Access::Write);
    match place {
        Place::Mem { addr, .. } if t.locked() => {
            let ones = t.b.iconst(ty, u64::MAX);
            t.b.rmw(RmwOp::Xor, addr, ones);
        }
        _ => {
            let a = t.read_for_write(place, ty);
            let r = t.b.un(UnOp::Not, a);
            t.write_place(place, r);
        }
    }
}

fn cmpxchg(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let new = t.read_op(1);
    let acc = t.get_gpr(ty, 0);
    let place = t.place(0, ty, Access::Write);
    let old = match place {
        Place::Mem { addr, .. } if t.locked() => t.b.cmpxchg(addr, acc, new),
        _ => t.read_for_write(place, ty),
    };
    let r = t.b.sub(acc, old);
    let equal = t.b.cmp(IntCc::Eq, acc, old);
    match place {
        Place::Mem { addr, flags } if !t.locked() => {
            let v = t.b.select(equal, new, old);
            t.b.store(flags, addr, v);
        }
        Place::Mem { .. } => {}
        // A register destination goes first, so that the accumulator wins when it is both.
        Place::Reg(r) => put_if(t, r, equal, new, true),
    }
    put_if(t, t.accumulator(ty), equal, old, false);
    t.b.set_cc(CcKind::Sub, r, Some(old), None);
}

/// Writes a register when `c` is `when`; else all 64 bits of it stay.
fn put_if(t: &mut Translator<'_>, r: Register, c: Value, v: Value, when: bool) {
    let (n, ty, high) = gpr(r);
    let (now, v) = if ty == Ty::I32 { (t.get_gpr(Ty::I64, n), t.b.zext(Ty::I64, v)) } else { (t.read_gpr(r), v) };
    let v = if when { t.b.select(c, v, now) } else { t.b.select(c, now, v) };
    if high { t.write_gpr(r, v) } else { t.put_gpr(n, v) }
}

fn cmpxchg8b(t: &mut Translator<'_>) {
    let addr = t.mem_addr_unaligned(8, Access::Write);
    t.call(Helper::Cmpxchg8b, &[addr]);
}

fn cmpxchg16b(t: &mut Translator<'_>) {
    let addr = t.mem_addr_unaligned(16, Access::Write);
    t.call(Helper::Cmpxchg16b, &[addr]);
}

fn xadd(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let b = t.read_op(1);
    let place = t.place(0, ty, Access::Write);
    let (a, r) = match place {
        Place::Mem { addr, .. } if t.locked() => {
            let a = t.b.rmw(RmwOp::Add, addr, b);
            (a, t.b.add(a, b))
        }
        _ => {
            let a = t.read_for_write(place, ty);
            let r = t.b.add(a, b);
            if let Place::Mem { .. } = place {
                t.write_place(place, r);
            }
            (a, r)
        }
    };
    t.write_op(1, a);
    // When both operands are one register, the sum wins.
    if let Place::Reg(_) = place {
        t.write_place(place, r);
    }
    t.b.set_cc(CcKind::Add, r, Some(b), None);
}

/// ADCX (carry in and out through CF) and ADOX (through OF); the other flags stay.
fn add_with_flag(t: &mut Translator<'_>, flag: u64) {
    let ty = t.op_ty(0);
    let b = t.read_op(1);
    let a = t.read_op(0);
    let (cc, bit) = if flag == rflags::CF { (CondCode::B, 0) } else { (CondCode::O, 11) };
    let c = t.b.cond(cc);
    let c = t.b.zext(ty, c);
    let f = t.b.flags();
    let s = t.b.add(a, b);
    let r = t.b.add(s, c);
    let c1 = t.b.cmp(IntCc::Ult, s, a);
    let c2 = t.b.cmp(IntCc::Ult, r, s);
    let out = t.b.or(c1, c2);
    t.write_op(0, r);
    set_flag_bits(t, f, flag, &[(out, bit)]);
}

/// Sets the flags to the image `f` with the bits of `mask` replaced by 0/1 values shifted to their positions.
pub(crate) fn set_flag_bits(t: &mut Translator<'_>, f: Value, mask: u64, bits: &[(Value, u8)]) {
    let mut f = t.b.bin_imm(BinOp::And, f, !mask);
    for &(v, at) in bits {
        let v = t.b.zext(Ty::I64, v);
        let v = if at == 0 { v } else { t.b.bin_imm(BinOp::Shl, v, u64::from(at)) };
        f = t.b.or(f, v);
    }
    t.b.set_flags(f);
}

fn bcd(t: &mut Translator<'_>, kind: u64) {
    let imm = t.insn.immediate8();
    let kind = t.c64(kind);
    let imm = t.c64(u64::from(imm));
    t.call(Helper::Bcd, &[kind, imm]);
}

fn salc(t: &mut Translator<'_>) {
    let c = t.b.cond(CondCode::B);
    let v = t.b.un(UnOp::Neg, c);
    t.put_gpr(0, v);
}

fn arpl(t: &mut Translator<'_>) {
    let src = t.read_op_as(1, Ty::I16);
    let place = t.place(0, Ty::I16, Access::Write);
    let dst = t.read_for_write(place, Ty::I16);
    let a = t.b.bin_imm(BinOp::And, dst, 3);
    let b = t.b.bin_imm(BinOp::And, src, 3);
    let raise = t.b.cmp(IntCc::Ult, a, b);
    let high = t.b.bin_imm(BinOp::And, dst, !3);
    let new = t.b.or(high, b);
    let v = t.b.select(raise, new, dst);
    let f = t.b.flags();
    t.write_place(place, v);
    set_flag_bits(t, f, rflags::ZF, &[(raise, 6)]);
}
