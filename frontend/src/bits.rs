//! Bit instructions: BT BTS BTR BTC, BSF BSR TZCNT LZCNT POPCNT, BMI1, BMI2's BZHI PDEP PEXT, CRC32.
//!
//! Place: a family of the instruction table. Shifts of BMI2 are in `shift`, MULX in `muldiv`, ADCX and ADOX in `arith`.

use iced_x86::{Mnemonic, OpKind};
use twofold_arch::CcKind;
use twofold_arch::control::rflags;
use twofold_arch::cpuid::Feature;
use twofold_ir::{BinOp, Helper, IntCc, RmwOp, Ty, UnOp, Value};

use crate::arith::set_flag_bits;
use crate::table::{Need, Row};
use crate::translator::{Access, Place, Translator};

/// What happens to the tested bit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bit {
    Keep,
    Set,
    Reset,
    Complement,
}

const fn bmi(m: Mnemonic, f: Feature, emit: crate::table::Emit) -> Row {
    Row::all(m, emit).feature(f).need(Need::PROTECTED)
}

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Bt, |t| bit(t, Bit::Keep)),
    Row::all(Mnemonic::Bts, |t| bit(t, Bit::Set)),
    Row::all(Mnemonic::Btr, |t| bit(t, Bit::Reset)),
    Row::all(Mnemonic::Btc, |t| bit(t, Bit::Complement)),
    Row::all(Mnemonic::Bsf, |t| scan(t, false)),
    Row::all(Mnemonic::Bsr, |t| scan(t, true)),
    Row::all(Mnemonic::Tzcnt, |t| if t.has(Feature::Bmi1) { count(t, UnOp::Ctz) } else { scan(t, false) }),
    Row::all(Mnemonic::Lzcnt, |t| if t.has(Feature::Lzcnt) { count(t, UnOp::Clz) } else { scan(t, true) }),
    Row::all(Mnemonic::Popcnt, popcnt).feature(Feature::Popcnt),
    Row::all(Mnemonic::Crc32, crc32).feature(Feature::Sse42),
    bmi(Mnemonic::Andn, Feature::Bmi1, andn),
    bmi(Mnemonic::Bextr, Feature::Bmi1, bextr),
    bmi(Mnemonic::Blsi, Feature::Bmi1, blsi),
    bmi(Mnemonic::Blsr, Feature::Bmi1, |t| low_bit(t, BinOp::And)),
    bmi(Mnemonic::Blsmsk, Feature::Bmi1, |t| low_bit(t, BinOp::Xor)),
    bmi(Mnemonic::Bzhi, Feature::Bmi2, bzhi),
    bmi(Mnemonic::Pdep, Feature::Bmi2, |t| deposit(t, Helper::Pdep)),
    bmi(Mnemonic::Pext, Feature::Bmi2, |t| deposit(t, Helper::Pext)),
];

fn bit(t: &mut Translator<'_>, what: Bit) {
    let ty = t.op_ty(0);
    let bits = u64::from(ty.bits());
    let access = if what == Bit::Keep { Access::Read } else { Access::Write };
    let index = t.read_op_as(1, ty);
    let place = if t.is_mem(0) && t.insn.op1_kind() == OpKind::Register {
        // The register is a signed bit offset into a string of bits at the operand.
        let wide = t.b.sext(Ty::I64, index);
        let unit = t.b.bin_imm(BinOp::Sar, wide, u64::from(bits.trailing_zeros()));
        let disp = t.b.bin_imm(BinOp::Shl, unit, u64::from(ty.log2_bytes()));
        let addr = t.mem_addr_plus(disp, ty.bytes(), access);
        if t.locked() {
            t.claim_atomic(ty, addr);
        }
        Place::Mem { addr, flags: t.mem_flags() }
    } else {
        t.place(0, ty, access)
    };
    let index = t.b.bin_imm(BinOp::And, index, bits - 1);
    let one = t.b.iconst(ty, 1);
    let mask = t.b.bin(BinOp::Shl, one, index);
    let old = match (what, place) {
        (Bit::Keep, Place::Reg(r)) => t.read_gpr(r),
        (Bit::Keep, Place::Mem { addr, flags }) => t.b.load(ty, flags, addr),
        (_, Place::Mem { addr, .. }) if t.locked() => match what {
            Bit::Set => t.b.rmw(RmwOp::Or, addr, mask),
            Bit::Complement => t.b.rmw(RmwOp::Xor, addr, mask),
            _ => {
                let keep = t.b.un(UnOp::Not, mask);
                t.b.rmw(RmwOp::And, addr, keep)
            }
        },
        _ => {
            let old = t.read_for_write(place, ty);
            let new = match what {
                Bit::Set => t.b.or(old, mask),
                Bit::Complement => t.b.xor(old, mask),
                _ => {
                    let keep = t.b.un(UnOp::Not, mask);
                    t.b.and(old, keep)
                }
            };
            t.write_place(place, new);
            old
        }
    };
    let cf = t.b.bin(BinOp::Shr, old, index);
    let cf = t.b.bin_imm(BinOp::And, cf, 1);
    let f = t.b.flags();
    set_flag_bits(t, f, rflags::CF, &[(cf, 0)]);
}

/// BSF and BSR: the destination stays when the source is 0.
fn scan(t: &mut Translator<'_>, reverse: bool) {
    let ty = t.op_ty(0);
    let a = t.read_op(1);
    let n = if reverse {
        let n = t.b.un(UnOp::Clz, a);
        t.b.bin_imm(BinOp::Xor, n, u64::from(ty.bits() - 1))
    } else {
        t.b.un(UnOp::Ctz, a)
    };
    let zero = t.b.cmp_imm(IntCc::Eq, a, 0);
    // The whole register stays, a 32-bit destination's upper half too.
    let (n_reg, _, _) = crate::translator::gpr(t.insn.op0_register());
    if ty == Ty::I16 {
        let old = t.get_gpr(Ty::I16, n_reg);
        let v = t.b.select(zero, old, n);
        t.put_gpr(n_reg, v);
    } else {
        let old = t.get_gpr(Ty::I64, n_reg);
        let n = t.b.zext(Ty::I64, n);
        let v = t.b.select(zero, old, n);
        t.put_gpr(n_reg, v);
    }
    t.b.set_cc(CcKind::Logic, a, None, None);
}

/// TZCNT and LZCNT: CF for a source of 0, ZF for a result of 0.
fn count(t: &mut Translator<'_>, op: UnOp) {
    let a = t.read_op(1);
    let r = t.b.un(op, a);
    t.write_op(0, r);
    t.b.set_cc(CcKind::CarryZero, r, Some(a), None);
}

fn popcnt(t: &mut Translator<'_>) {
    let a = t.read_op(1);
    let r = t.b.un(UnOp::Popcnt, a);
    t.write_op(0, r);
    // ZF for a source of 0, all others clear.
    let zero = t.b.cmp_imm(IntCc::Eq, a, 0);
    let z = t.b.zext(Ty::I64, zero);
    let f = t.b.bin_imm(BinOp::Shl, z, 6);
    t.b.set_flags(f);
}

fn crc32(t: &mut Translator<'_>) {
    let v = t.read_op(1);
    let (n, ty, _) = crate::translator::gpr(t.insn.op0_register());
    let crc = t.get_gpr(Ty::I32, n);
    let size = t.c64(u64::from(t.b.ty(v).log2_bytes()));
    let r = t.call(Helper::Crc32, &[crc, v, size]);
    let r = t.b.trunc(Ty::I32, r);
    let r = t.b.zext(ty, r);
    t.put_gpr(n, r);
}

fn andn(t: &mut Translator<'_>) {
    let b = t.read_op(2);
    let a = t.read_op(1);
    let a = t.b.un(UnOp::Not, a);
    let r = t.b.and(a, b);
    t.write_op(0, r);
    t.b.set_cc(CcKind::Logic, r, None, None);
}

/// `v` with only its low `n` bits (I64 `n`, any value up to 255) kept.
fn low_bits(t: &mut Translator<'_>, v: Value, n: Value) -> Value {
    let ty = t.b.ty(v);
    let n_ty = t.b.trunc(ty, n);
    let ones = t.b.iconst(ty, u64::MAX);
    let mask = t.b.bin(BinOp::Shl, ones, n_ty);
    let kept = t.b.un(UnOp::Not, mask);
    let kept = t.b.and(v, kept);
    let all = t.b.cmp_imm(IntCc::Uge, n, u64::from(ty.bits()));
    t.b.select(all, v, kept)
}

fn bextr(t: &mut Translator<'_>) {
    let a = t.read_op(1);
    let c = t.read_op(2);
    let ty = t.b.ty(a);
    let c = t.b.zext(Ty::I64, c);
    let start = t.b.bin_imm(BinOp::And, c, 0xff);
    let len = t.b.bin_imm(BinOp::Shr, c, 8);
    let len = t.b.bin_imm(BinOp::And, len, 0xff);
    let by = t.b.trunc(ty, start);
    let shifted = t.b.bin(BinOp::Shr, a, by);
    let gone = t.b.cmp_imm(IntCc::Uge, start, u64::from(ty.bits()));
    let zero = t.b.iconst(ty, 0);
    let shifted = t.b.select(gone, zero, shifted);
    let r = low_bits(t, shifted, len);
    t.write_op(0, r);
    t.b.set_cc(CcKind::Logic, r, None, None);
}

fn blsi(t: &mut Translator<'_>) {
    let a = t.read_op(1);
    let n = t.b.un(UnOp::Neg, a);
    let r = t.b.and(a, n);
    t.write_op(0, r);
    t.b.set_cc(CcKind::CarryNonzero, r, Some(a), None);
}

/// BLSR (`a & a - 1`) and BLSMSK (`a ^ a - 1`).
fn low_bit(t: &mut Translator<'_>, op: BinOp) {
    let a = t.read_op(1);
    let n = t.b.bin_imm(BinOp::Sub, a, 1);
    let r = t.b.bin(op, a, n);
    t.write_op(0, r);
    t.b.set_cc(CcKind::CarryZero, r, Some(a), None);
}

fn bzhi(t: &mut Translator<'_>) {
    let a = t.read_op(1);
    let i = t.read_op(2);
    let ty = t.b.ty(a);
    let i = t.b.zext(Ty::I64, i);
    let n = t.b.bin_imm(BinOp::And, i, 0xff);
    let r = low_bits(t, a, n);
    t.write_op(0, r);
    // CF when the index was beyond the operand.
    let beyond = t.b.cmp_imm(IntCc::Ugt, n, u64::from(ty.bits() - 1));
    t.b.set_cc(CcKind::CarryNonzero, r, Some(beyond), None);
}

fn deposit(t: &mut Translator<'_>, helper: Helper) {
    let mask = t.read_op(2);
    let a = t.read_op(1);
    let ty = t.b.ty(a);
    let r = t.call(helper, &[a, mask]);
    let r = t.b.trunc(ty, r);
    t.write_op(0, r);
}
