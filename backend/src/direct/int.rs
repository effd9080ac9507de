//! Integer ops: arithmetic, shifts, divisions, bit counts, comparisons, selections.
//!
//! What is above a value of 8 or 16 bits in its register is garbage unless the value is `clean`: sums do not mind, and what does clears
//! it first.

use twofold_ir::{BinOp, IntCc, Op, Ty, UnOp, Value};

use super::x64::{self, Alu, Mem, RAX, RCX, RDX, Rm, Shift};
use super::{Direct, Refused, alu_of, distance, scale};
use crate::native;

/// The width that an op of this type is done in when what is above does not matter.
fn wide(ty: Ty) -> Ty {
    if ty == Ty::I64 { ty } else { Ty::I32 }
}

impl Direct<'_> {
    pub(super) fn bin(&mut self, i: usize, op: BinOp, ty: Ty, a: Value, b: Value) -> Result<(), Refused> {
        if let Some(alu) = alu_of(op) {
            return self.alu(i, alu, ty, a, b);
        }
        match op {
            BinOp::Mul => self.multiply(i, ty, a, b),
            BinOp::UMulHi | BinOp::SMulHi => self.high_product(i, ty, a, b, op == BinOp::SMulHi),
            BinOp::UDiv | BinOp::URem | BinOp::SDiv | BinOp::SRem => self.divide(i, op, ty, a, b),
            BinOp::Rotl => self.shift(i, Shift::Rol, ty, a, b),
            BinOp::Rotr => self.shift(i, Shift::Ror, ty, a, b),
            BinOp::Shl => self.shift(i, Shift::Shl, ty, a, b),
            BinOp::Shr => self.shift(i, Shift::Shr, ty, a, b),
            _ => self.shift(i, Shift::Sar, ty, a, b),
        }
    }

    fn alu(&mut self, i: usize, op: Alu, ty: Ty, mut a: Value, mut b: Value) -> Result<(), Refused> {
        if op == Alu::Add && self.sum(i, ty, a, b)? {
            return Ok(());
        }
        let commutes = op != Alu::Sub;
        let constant = |d: &Self, v: Value| matches!(d.block.op(v), Op::Const { .. });
        if commutes
            && !constant(self, b)
            && (constant(self, a) || self.dies_in_register(b) && !self.dies_in_register(a))
        {
            std::mem::swap(&mut a, &mut b);
        }
        let w = wide(ty);
        if op == Alu::And
            && ty.bits() >= 32
            && let Op::Const { imm, .. } = *self.block.op(b)
            && let Some(from) = [Ty::I8, Ty::I16, Ty::I32].into_iter().find(|t| t.mask() == imm && *t != ty)
        {
            let rm = self.exact(a)?;
            let r = self.over(a)?;
            x64::load(self.out(), from, r, rm);
            self.set(i, r, true);
            return Ok(());
        }
        if let Some(imm) = self.imm(ty, b) {
            let (r, clean) = self.copy(a)?;
            x64::alu_imm(self.out(), w, op, Rm::R(r), imm);
            // Zeroes stay zeroes under zeroes.
            let kept = clean && imm >= 0 && matches!(op, Alu::And | Alu::Or | Alu::Xor);
            self.set(i, r, ty.bits() >= 32 || kept);
            return Ok(());
        }
        let rm = if ty == w { self.exact(b)? } else { Rm::R(self.reg(b)?) };
        let low = self.is_clean(b);
        let (r, clean) = self.copy(a)?;
        x64::alu(self.out(), w, op, r, rm);
        let kept = match op {
            Alu::And => clean && low,
            Alu::Or | Alu::Xor => clean && low,
            _ => false,
        };
        self.set(i, r, ty.bits() >= 32 || kept);
        Ok(())
    }

    /// An addition that is an address: of three operands, or with a scale.
    fn sum(&mut self, i: usize, ty: Ty, a: Value, b: Value) -> Result<bool, Refused> {
        let w = wide(ty);
        for (x, y) in [(a, b), (b, a)] {
            if self.p.info[y.index()].folded
                && let Op::Bin { op: BinOp::Shl, a: of, b: by, .. } = *self.block.op(y)
            {
                let (base, index) = (self.reg(x)?, self.reg(of)?);
                let index = Some((index, scale(self.block, by).ok_or(Refused::Malformed)?));
                let r = self.fresh()?;
                x64::lea(self.out(), w, r, Mem { base, index, disp: 0 });
                self.set(i, r, true);
                return Ok(true);
            }
        }
        if self.dies_in_register(a) || self.dies_in_register(b) {
            return Ok(false);
        }
        let clean = ty.bits() >= 32;
        if let Some(disp) = distance(self.block, b).filter(|_| ty == Ty::I64) {
            // In no register and not needed again: read into the result's.
            if self.p.info[a.index()].last as usize <= self.now {
                return Ok(false);
            }
            let base = self.reg(a)?;
            let r = self.fresh()?;
            x64::lea(self.out(), w, r, Mem::at(base, disp));
            self.set(i, r, clean);
            return Ok(true);
        }
        let needed = |d: &Self, v: Value| d.p.info[v.index()].last as usize > d.now;
        if !needed(self, a) || !needed(self, b) || a == b || self.imm(ty, b).is_some() || self.imm(ty, a).is_some() {
            return Ok(false);
        }
        let (base, index) = (self.reg(a)?, self.reg(b)?);
        let r = self.fresh()?;
        x64::lea(self.out(), w, r, Mem { base, index: Some((index, 0)), disp: 0 });
        self.set(i, r, clean);
        Ok(true)
    }

    fn multiply(&mut self, i: usize, ty: Ty, a: Value, b: Value) -> Result<(), Refused> {
        let w = wide(ty);
        if let Some(imm) = self.imm(ty, b) {
            let rm = if ty == w { self.exact(a)? } else { Rm::R(self.reg(a)?) };
            let r = self.over(a)?;
            x64::imul_imm(self.out(), w, r, rm, imm);
            self.set(i, r, ty.bits() >= 32);
            return Ok(());
        }
        if ty == Ty::I64 && self.product(i, a, b)? {
            return Ok(());
        }
        let rm = if ty == w { self.exact(b)? } else { Rm::R(self.reg(b)?) };
        let (r, _) = self.copy(a)?;
        x64::imul(self.out(), w, r, rm);
        self.set(i, r, ty.bits() >= 32);
        Ok(())
    }

    /// Both halves of a product by one instruction, if the upper one of the same values comes soon.
    fn product(&mut self, i: usize, a: Value, b: Value) -> Result<bool, Refused> {
        let wanted = Op::Bin { op: BinOp::UMulHi, ty: Ty::I64, a, b };
        let next = &self.block.ops[i + 1..];
        let Some(n) = next.iter().take(12).position(|op| *op == wanted) else { return Ok(false) };
        let high = i + 1 + n;
        let y = self.reg(b)?;
        self.arg(RAX, a)?;
        x64::unary(self.out(), Ty::I64, 4, y);
        for (op, from) in [(i, RAX), (high, RDX)] {
            let r = self.fresh()?;
            x64::mov(self.out(), r, from);
            self.set(op, r, true);
        }
        // Nothing is left to do for it.
        self.p.info[high].folded = true;
        Ok(true)
    }

    fn high_product(&mut self, i: usize, ty: Ty, a: Value, b: Value, signed: bool) -> Result<(), Refused> {
        if ty == Ty::I64 {
            let y = self.reg(b)?;
            self.arg(RAX, a)?;
            x64::unary(self.out(), ty, if signed { 5 } else { 4 }, y);
            let r = self.fresh()?;
            x64::mov(self.out(), r, RDX);
            self.set(i, r, true);
            return Ok(());
        }
        for (to, v) in [(RAX, a), (RDX, b)] {
            if signed {
                self.arg_sext(to, v, Ty::I64)?;
            } else {
                self.arg_zext(to, v)?;
            }
        }
        let r = self.fresh()?;
        let out = self.out();
        x64::imul(out, Ty::I64, RAX, Rm::R(RDX));
        x64::shift_imm(out, Ty::I64, Shift::Shr, RAX, ty.bits() as u8);
        x64::mov(out, r, RAX);
        self.set(i, r, ty == Ty::I32);
        Ok(())
    }

    /// Division in which the cases that would trap are jumped around.
    fn divide(&mut self, i: usize, op: BinOp, ty: Ty, a: Value, b: Value) -> Result<(), Refused> {
        let (signed, rem) = (matches!(op, BinOp::SDiv | BinOp::SRem), matches!(op, BinOp::URem | BinOp::SRem));
        let w = wide(ty);
        for (to, v) in [(RAX, a), (RCX, b)] {
            if signed {
                self.arg_sext(to, v, w)?;
            } else {
                self.arg_zext(to, v)?;
            }
        }
        let r = self.fresh()?;
        let out = self.out();
        // Without a division: RDX, the remainder, is the dividend, and the quotient 0.
        let jump = |out: &mut Vec<u8>, op: u8| {
            out.extend_from_slice(&[op, 0]);
            out.len()
        };
        let land = |out: &mut Vec<u8>, from: usize| out[from - 1] = (out.len() - from) as u8;
        x64::test(out, w, RCX, RCX);
        let divisor = jump(out, 0x75);
        x64::mov(out, RDX, RAX);
        x64::mov_imm(out, RAX, 0);
        let zero = jump(out, 0xeb);
        land(out, divisor);
        let mut minus = None;
        if signed {
            x64::alu_imm(out, w, Alu::Cmp, Rm::R(RCX), -1);
            let other = jump(out, 0x75);
            x64::unary(out, w, 3, RAX);
            x64::mov_imm(out, RDX, 0);
            minus = Some(jump(out, 0xeb));
            land(out, other);
            // cdq or cqo
            if w == Ty::I64 {
                out.push(0x48);
            }
            out.push(0x99);
        } else {
            x64::mov_imm(out, RDX, 0);
        }
        x64::unary(out, w, if signed { 7 } else { 6 }, RCX);
        land(out, zero);
        if let Some(minus) = minus {
            land(out, minus);
        }
        let from = if rem { RDX } else { RAX };
        x64::load(out, w, r, Rm::R(from));
        self.set(i, r, ty.bits() >= 32);
        Ok(())
    }

    fn shift(&mut self, i: usize, op: Shift, ty: Ty, a: Value, b: Value) -> Result<(), Refused> {
        let rotates = matches!(op, Shift::Rol | Shift::Ror);
        // Rotations are of the type's own width; a left shift does not mind what is above, a right one must have the right thing there.
        let w = if rotates { ty } else { wide(ty) };
        let count = match *self.block.op(b) {
            Op::Const { imm, .. } => Some((imm & u64::from(ty.bits() - 1)) as u8),
            _ => None,
        };
        if count.is_none() {
            self.arg(RCX, b)?;
            if ty != w {
                x64::alu_imm(self.out(), Ty::I32, Alu::And, Rm::R(RCX), ty.bits() as i32 - 1);
            }
        }
        let (r, mut clean) = self.copy(a)?;
        let out = self.out();
        match op {
            Shift::Shr if ty != w && !clean => {
                x64::load(out, ty, r, Rm::R(r));
                clean = true;
            }
            Shift::Sar if ty != w => {
                x64::load_signed(out, ty, w, r, Rm::R(r));
                clean = false;
            }
            Shift::Shl => clean = false,
            _ => {}
        }
        match count {
            // An instruction that shifts by nothing does not clear the upper half.
            Some(0) => {}
            Some(n) => {
                x64::shift_imm(out, w, op, r, n);
                clean |= ty == Ty::I32;
            }
            None => x64::shift_cl(out, w, op, r),
        }
        self.set(i, r, clean || ty == Ty::I64);
        Ok(())
    }

    pub(super) fn un(&mut self, i: usize, op: UnOp, ty: Ty, a: Value) -> Result<(), Refused> {
        let w = wide(ty);
        let count = match op {
            UnOp::Not | UnOp::Neg => {
                let (r, _) = self.copy(a)?;
                x64::unary(self.out(), w, if op == UnOp::Not { 2 } else { 3 }, r);
                self.set(i, r, ty.bits() >= 32);
                return Ok(());
            }
            UnOp::Bswap => {
                let (r, clean) = self.copy(a)?;
                let out = self.out();
                match ty {
                    Ty::I8 => {}
                    Ty::I16 => x64::shift_imm(out, ty, Shift::Rol, r, 8),
                    _ => x64::insn(out, 0, ty == Ty::I64, false, &[0x0f], 1, Rm::R(r)),
                }
                self.set(i, r, clean || ty.bits() >= 32);
                return Ok(());
            }
            UnOp::Popcnt => 0xb8,
            UnOp::Clz => 0xbd,
            UnOp::Ctz => 0xbc,
        };
        if !native::bit_counts() {
            return Err(Refused::Op);
        }
        self.arg_zext(RAX, a)?;
        let r = self.fresh()?;
        let out = self.out();
        if op == UnOp::Ctz && ty != w {
            x64::alu_imm(out, Ty::I32, Alu::Or, Rm::R(RAX), 1 << ty.bits());
        }
        x64::insn(out, 0xf3, ty == Ty::I64, false, &[0x0f, count], r, Rm::R(RAX));
        if op == UnOp::Clz && ty != w {
            x64::alu_imm(out, Ty::I32, Alu::Sub, Rm::R(r), 32 - ty.bits() as i32);
        }
        self.set(i, r, true);
        Ok(())
    }

    /// Compares; the condition that holds if the comparison does.
    pub(super) fn compare(&mut self, cc: IntCc, ty: Ty, mut a: Value, mut b: Value) -> Result<u8, Refused> {
        let mut cc = cc;
        let constant = |d: &Self, v: Value| matches!(d.block.op(v), Op::Const { .. });
        if constant(self, a) && !constant(self, b) {
            std::mem::swap(&mut a, &mut b);
            cc = cc.swapped();
        }
        if let Some(imm) = self.imm(ty, b) {
            let rm = self.exact(a)?;
            match rm {
                Rm::R(r) if imm == 0 => x64::test(self.out(), ty, r, r),
                _ => x64::alu_imm(self.out(), ty, Alu::Cmp, rm, imm),
            }
        } else {
            let r = self.reg(b)?;
            let rm = self.exact(a)?;
            x64::alu_to(self.out(), ty, Alu::Cmp, rm, r);
        }
        Ok(x64::condition(cc))
    }

    pub(super) fn select(&mut self, i: usize, ty: Ty, c: Value, a: Value, b: Value) -> Result<(), Refused> {
        // What the condition reads must not become the result's register before it has been read.
        let mut read = [c, c];
        if self.p.info[c.index()].folded
            && let Op::Cmp { a, b, .. } = *self.block.op(c)
        {
            read = [a, b];
        }
        if !self.p.info[c.index()].folded {
            self.reg(c)?;
        } else {
            for v in read {
                if !matches!(self.block.op(v), Op::Const { .. }) {
                    self.reg(v)?;
                }
            }
        }
        let x = self.reg(a)?;
        let (r, clean) = if read.contains(&b) {
            let from = self.reg(b)?;
            if ty == Ty::V128 {
                let r = self.fresh_vec()?;
                x64::load_vec(self.out(), r, Rm::R(from));
                (r, true)
            } else {
                let r = self.fresh()?;
                x64::mov(self.out(), r, from);
                (r, self.p.info[b.index()].clean)
            }
        } else {
            self.copy(b)?
        };
        let cc = self.truth(c)?;
        if ty == Ty::V128 {
            let out = self.out();
            out.extend_from_slice(&[0x70 | cc ^ 1, 0]);
            let from = out.len();
            x64::load_vec(out, r, Rm::R(x));
            out[from - 1] = (out.len() - from) as u8;
            self.set_vec(i, r);
        } else {
            x64::cmov(self.out(), wide(ty), cc, r, x);
            let other = self.p.info[a.index()].clean;
            self.set(i, r, ty.bits() >= 32 || clean && other);
        }
        Ok(())
    }
}
