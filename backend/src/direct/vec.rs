//! Vector ops: the host's instruction with any registers where it has the common form, else with its fixed ones, else the portable
//! function.

use twofold_ir::{Ty, Value, VecOp};

use super::x64::{self, RAX, RSI, Rm};
use super::{Direct, Refused, state};
use crate::native::{self, Form, Native};
use crate::thunk::Thunk;

impl Direct<'_> {
    pub(super) fn pair(&mut self, i: usize, lo: Value, hi: Value) -> Result<(), Refused> {
        let zero = self.imm(Ty::I64, hi) == Some(0);
        if !zero && !native::lanes() {
            return Err(Refused::Op);
        }
        let low = self.reg(lo)?;
        let high = if zero { 0 } else { self.reg(hi)? };
        let r = self.fresh_vec()?;
        let out = self.out();
        x64::movq_to(out, r, low);
        if !zero {
            // pinsrq r, high, 1
            x64::insn(out, 0x66, true, false, &[0x0f, 0x3a, 0x22], r, Rm::R(high));
            out.push(1);
        }
        self.set_vec(i, r);
        Ok(())
    }

    pub(super) fn half(&mut self, i: usize, a: Value, hi: bool) -> Result<(), Refused> {
        if let Some(home) = self.home_of(a) {
            let r = self.fresh()?;
            let from = state(usize::from(home) + 8 * usize::from(hi));
            x64::load(self.out(), Ty::I64, r, from.into());
            self.set(i, r, true);
            return Ok(());
        }
        if hi && !native::lanes() {
            return Err(Refused::Op);
        }
        let x = self.reg(a)?;
        let r = self.fresh()?;
        let out = self.out();
        if hi {
            // pextrq r, x, 1
            x64::insn(out, 0x66, true, false, &[0x0f, 0x3a, 0x16], x, Rm::R(r));
            out.push(1);
        } else {
            x64::movq_from(out, r, x);
        }
        self.set(i, r, true);
        Ok(())
    }

    pub(super) fn vector(&mut self, i: usize, op: VecOp, imm: u8, args: [Value; 3]) -> Result<(), Refused> {
        let sig = op.sig();
        let Some(native) = Native::vec(op, imm) else { return self.portable(i, op, imm, args) };
        match native.form() {
            Form::Two(code) | Form::Insert(code) => {
                let b = self.reg(args[1])?;
                let (r, _) = self.copy(args[0])?;
                code.put(self.out(), r, b);
                self.set_vec(i, r);
                return Ok(());
            }
            Form::One(code) => {
                let a = self.reg(args[0])?;
                let r = self.fresh_vec()?;
                code.put(self.out(), r, a);
                self.set_vec(i, r);
                return Ok(());
            }
            Form::Shift(code, number) => {
                let (r, _) = self.copy(args[0])?;
                code.put(self.out(), number, r);
                self.set_vec(i, r);
                return Ok(());
            }
            Form::Fixed => {}
        }
        let vectors = (0..3).filter(|&n| sig.args[n] == Some(Ty::V128));
        // SHA256RNDS2 has its third operand in XMM0, and its result where the first was.
        let last = op == VecOp::Sha256rnds2;
        for (xmm, n) in vectors.enumerate() {
            let xmm = if last { (xmm as u8 + 1) % 3 } else { xmm as u8 };
            self.arg(xmm, args[n])?;
        }
        if let Some(n) = (0..3).find(|&n| sig.args[n] == Some(Ty::I64)) {
            self.arg(RSI, args[n])?;
        }
        let code = native.bytes();
        self.e.emit(&code);
        if sig.result == Ty::V128 { self.take_xmm(i, u8::from(last)) } else { self.take_rax(i) }
    }

    fn take_xmm(&mut self, i: usize, from: u8) -> Result<(), Refused> {
        let r = self.fresh_vec()?;
        x64::load_vec(self.out(), r, Rm::R(from));
        self.set_vec(i, r);
        Ok(())
    }

    fn portable(&mut self, i: usize, op: VecOp, imm: u8, args: [Value; 3]) -> Result<(), Refused> {
        let sig = op.sig();
        for (n, &v) in args.iter().enumerate() {
            match sig.args[n] {
                Some(Ty::V128) => self.arg(n as u8, v)?,
                Some(_) => {
                    self.arg(RAX, v)?;
                    x64::movq_to(self.out(), n as u8, RAX);
                }
                None => {}
            }
        }
        x64::mov_imm(self.out(), RSI, op as u64 | u64::from(imm) << 16);
        self.call(Thunk::VEC_EVAL);
        if sig.result == Ty::V128 {
            return self.take_xmm(i, 0);
        }
        x64::movq_from(self.out(), RAX, 0);
        self.take_rax(i)
    }
}
