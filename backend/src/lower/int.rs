//! Lowering of integer ops: arithmetic, shifts, bit counts, comparisons, extensions. None may trap whatever the operands.

use cranelift_codegen::ir::condcodes::{CondCode, IntCC};
use cranelift_codegen::ir::{InstBuilder, Type, Value as Clif, types};
use twofold_ir::{BinOp, IntCc, Op, Ty, UnOp, Value};

use super::{Lowering, clif};
use crate::compiler::CompileError;

impl Lowering<'_> {
    pub(super) fn bin(&mut self, i: usize, op: BinOp, ty: Ty, a: Value, b: Value) -> Result<(), CompileError> {
        let (x, y) = (self.get(a)?, self.get(b)?);
        let t = clif(ty);
        let v = match op {
            BinOp::Add => self.cur.ins().iadd(x, y),
            BinOp::Sub => self.cur.ins().isub(x, y),
            BinOp::Mul => self.cur.ins().imul(x, y),
            BinOp::And => self.cur.ins().band(x, y),
            BinOp::Or => self.cur.ins().bor(x, y),
            BinOp::Xor => self.cur.ins().bxor(x, y),
            BinOp::Shl => self.cur.ins().ishl(x, y),
            BinOp::Shr => self.cur.ins().ushr(x, y),
            BinOp::Sar => self.cur.ins().sshr(x, y),
            BinOp::Rotl => self.cur.ins().rotl(x, y),
            BinOp::Rotr => self.cur.ins().rotr(x, y),
            BinOp::UMulHi | BinOp::SMulHi => self.mul_high(t, x, y, op == BinOp::SMulHi),
            BinOp::UDiv | BinOp::URem | BinOp::SDiv | BinOp::SRem => self.divide(op, t, x, y),
        };
        self.set(i, v);
        Ok(())
    }

    fn mul_high(&mut self, t: Type, x: Clif, y: Clif, signed: bool) -> Clif {
        if t == types::I64 {
            return if signed { self.cur.ins().smulhi(x, y) } else { self.cur.ins().umulhi(x, y) };
        }
        let double = if t == types::I32 { types::I64 } else { types::I32 };
        let (x, y) = (self.extend(double, x, signed), self.extend(double, y, signed));
        let p = self.cur.ins().imul(x, y);
        let p = self.cur.ins().ushr_imm_u(p, i64::from(t.bits()));
        self.cur.ins().ireduce(t, p)
    }

    fn extend(&mut self, to: Type, x: Clif, signed: bool) -> Clif {
        if self.cur.func.dfg.value_type(x) == to {
            x
        } else if signed {
            self.cur.ins().sextend(to, x)
        } else {
            self.cur.ins().uextend(to, x)
        }
    }

    /// Division with the cases that would trap taken out: the divisor is made 1 and the result chosen after.
    fn divide(&mut self, op: BinOp, t: Type, x: Clif, y: Clif) -> Clif {
        // Cranelift checks again, by branches.
        self.out.fixed = true;
        let signed = matches!(op, BinOp::SDiv | BinOp::SRem);
        let w = if t.bits() < 32 { types::I32 } else { t };
        let (x, y) = (self.extend(w, x, signed), self.extend(w, y, signed));
        let zero = self.cur.ins().icmp_imm_s(IntCC::Equal, y, 0);
        let one = self.iconst(w, 1);
        let mut d = self.cur.ins().select(zero, one, y);
        let minus = signed.then(|| self.cur.ins().icmp_imm_s(IntCC::Equal, y, -1));
        if let Some(minus) = minus {
            d = self.cur.ins().select(minus, one, d);
        }
        let v = match op {
            BinOp::UDiv => self.cur.ins().udiv(x, d),
            BinOp::URem => self.cur.ins().urem(x, d),
            BinOp::SDiv => self.cur.ins().sdiv(x, d),
            _ => self.cur.ins().srem(x, d),
        };
        let v = match op {
            BinOp::UDiv | BinOp::SDiv => {
                let v = match minus {
                    Some(minus) => {
                        let neg = self.cur.ins().ineg(x);
                        self.cur.ins().select(minus, neg, v)
                    }
                    None => v,
                };
                let none = self.iconst(w, 0);
                self.cur.ins().select(zero, none, v)
            }
            // x mod 1 = 0 is what x mod -1 is.
            _ => self.cur.ins().select(zero, x, v),
        };
        if w == t { v } else { self.cur.ins().ireduce(t, v) }
    }

    pub(super) fn un(&mut self, i: usize, op: UnOp, ty: Ty, a: Value) -> Result<(), CompileError> {
        let x = self.get(a)?;
        let v = match op {
            UnOp::Not => self.cur.ins().bnot(x),
            UnOp::Neg => self.cur.ins().ineg(x),
            UnOp::Bswap => {
                if ty == Ty::I8 {
                    x
                } else {
                    self.cur.ins().bswap(x)
                }
            }
            UnOp::Popcnt if ty.bits() >= 32 => self.cur.ins().popcnt(x),
            UnOp::Clz if ty.bits() >= 32 => self.cur.ins().clz(x),
            UnOp::Ctz if ty.bits() >= 32 => self.cur.ins().ctz(x),
            UnOp::Popcnt | UnOp::Clz | UnOp::Ctz => self.narrow_count(op, ty, a)?,
        };
        self.set(i, v);
        Ok(())
    }

    /// Bit counts of 8 and 16 bits in 32.
    fn narrow_count(&mut self, op: UnOp, ty: Ty, a: Value) -> Result<Clif, CompileError> {
        let wide = self.zext64(a)?;
        let wide = self.cur.ins().ireduce(types::I32, wide);
        let bits = i64::from(ty.bits());
        let v = match op {
            UnOp::Popcnt => self.cur.ins().popcnt(wide),
            UnOp::Clz => {
                let v = self.cur.ins().clz(wide);
                self.cur.ins().iadd_imm_s(v, bits - 32)
            }
            _ => {
                let stop = self.cur.ins().bor_imm_u(wide, 1 << bits);
                self.cur.ins().ctz(stop)
            }
        };
        Ok(self.cur.ins().ireduce(clif(ty), v))
    }

    pub(super) fn cmp(&mut self, i: usize, cc: IntCc, a: Value, b: Value) -> Result<(), CompileError> {
        let (x, y) = (self.get(a)?, self.get(b)?);
        let v = self.cur.ins().icmp(condition(cc), x, y);
        self.set(i, v);
        Ok(())
    }

    pub(super) fn select(&mut self, i: usize, ty: Ty, c: Value, a: Value, b: Value) -> Result<(), CompileError> {
        // Vectors are selected by a branch.
        self.out.fixed |= ty == Ty::V128;
        let (x, y) = (self.get(a)?, self.get(b)?);
        let constant = |v: Value| matches!(self.block.op(v), Op::Const { .. });
        // A constant is better second: first, it would be loaded from memory behind the code.
        let v = match *self.block.op(c) {
            Op::Cmp { cc, a: p, b: q, .. } if constant(a) && !constant(b) => {
                let (p, q) = (self.get(p)?, self.get(q)?);
                let c = self.cur.ins().icmp(condition(cc).complement(), p, q);
                self.cur.ins().select(c, y, x)
            }
            _ => {
                let c = self.get(c)?;
                self.cur.ins().select(c, x, y)
            }
        };
        self.set(i, v);
        Ok(())
    }

    pub(super) fn zext(&mut self, i: usize, to: Ty, a: Value) -> Result<(), CompileError> {
        if to == Ty::I64 {
            let v = self.zext64(a)?;
            self.set(i, v);
        } else {
            let x = self.get(a)?;
            let v = self.extend(clif(to), x, false);
            self.set(i, v);
            self.buf.wide[i] = self.buf.wide[a.index()];
        }
        Ok(())
    }
}

fn condition(cc: IntCc) -> IntCC {
    match cc {
        IntCc::Eq => IntCC::Equal,
        IntCc::Ne => IntCC::NotEqual,
        IntCc::Ult => IntCC::UnsignedLessThan,
        IntCc::Ule => IntCC::UnsignedLessThanOrEqual,
        IntCc::Ugt => IntCC::UnsignedGreaterThan,
        IntCc::Uge => IntCC::UnsignedGreaterThanOrEqual,
        IntCc::Slt => IntCC::SignedLessThan,
        IntCc::Sle => IntCC::SignedLessThanOrEqual,
        IntCc::Sgt => IntCC::SignedGreaterThan,
        IntCc::Sge => IntCC::SignedGreaterThanOrEqual,
    }
}
