//! Lowering of vector ops: Cranelift's where it is bit-exact, else the one host instruction in the place of a call, else the
//! portable function.
//!
//! Cranelift's floating-point ops are not used: they count as pure, so it may drop, duplicate, hoist and sink them, which MXCSR's
//! flags would show; it may swap the operands of a commutative one (which decides the NaN that comes out), its minimum and maximum
//! are IEEE's, and its conversions differ out of range.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I8, I8X16, I16, I16X8, I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{ConstantData, InstBuilder, Type, Value as Clif};
use twofold_ir::{Op, Ty, Value, VecOp};

use super::{Lowering, NAME_NATIVE, Shape, V};
use crate::compiler::CompileError;
use crate::native::Native;
use crate::thunk::Thunk;

impl Lowering<'_> {
    pub(super) fn pair(&mut self, i: usize, lo: Value, hi: Value) -> Result<(), CompileError> {
        let zero = matches!(*self.block.op(hi), Op::Const { imm: 0, .. });
        let (lo, hi) = (self.get(lo)?, self.get(hi)?);
        let mut v = self.cur.ins().scalar_to_vector(I64X2, lo);
        if !zero {
            v = self.cur.ins().insertlane(v, hi, 1);
        }
        let v = self.cast(v, V);
        self.set(i, v);
        Ok(())
    }

    pub(super) fn half(&mut self, i: usize, a: Value, hi: bool) -> Result<(), CompileError> {
        let a = self.get(a)?;
        let a = self.cast(a, I64X2);
        let v = self.cur.ins().extractlane(a, u8::from(hi));
        self.set(i, v);
        Ok(())
    }

    pub(super) fn vec(&mut self, i: usize, op: VecOp, imm: u8, args: [Value; 3]) -> Result<(), CompileError> {
        let sig = op.sig();
        let mut x = [self.state; 3];
        for (n, (to, &v)) in x.iter_mut().zip(&args).enumerate() {
            if sig.args[n].is_some() {
                *to = self.get(v)?;
            }
        }
        let v = match self.native(op, imm, x) {
            Some(v) => v,
            None => match Native::vec(op, imm) {
                Some(native) => self.vec_native(op, native, x)?,
                None => self.vec_eval(op, imm, x)?,
            },
        };
        let v = if sig.result == Ty::V128 { self.cast(v, V) } else { v };
        self.set(i, v);
        Ok(())
    }

    /// Has the op's instruction put here.
    fn vec_native(&mut self, op: VecOp, native: Native, x: [Clif; 3]) -> Result<Clif, CompileError> {
        let sig = op.sig();
        // Integer arguments come first in the list; registers are chosen by class, so order does not matter to the code.
        let mut list = Vec::with_capacity(3);
        let of = |ty: Ty| move |n: &usize| sig.args[*n] == Some(ty);
        list.extend((0..3).filter(of(Ty::I64)).map(|n| x[n]));
        let ints = list.len() as u8;
        list.extend((0..3).filter(of(Ty::V128)).map(|n| x[n]));
        let vecs = list.len() as u8 - ints;
        // The state only keeps an integer argument where it belongs.
        let ints = if ints == 0 { 0 } else { ints + 1 };
        let int = u8::from(sig.result == Ty::I64);
        let shape = Shape { vecs, vec_rets: 1 - int, ..Shape::call(ints, int) };
        let (shape, result) = if op == VecOp::Sha256rnds2 {
            list.rotate_right(1);
            (Shape { vec_rets: 2, ..shape }, 1)
        } else {
            (shape, 0)
        };
        self.call_named(NAME_NATIVE, native.0, shape, &list).get(result).copied().ok_or(CompileError::Malformed)
    }

    /// Calls the portable function.
    fn vec_eval(&mut self, op: VecOp, imm: u8, x: [Clif; 3]) -> Result<Clif, CompileError> {
        let sig = op.sig();
        let what = self.const64(op as u64 | u64::from(imm) << 16);
        let mut v = [what; 4];
        for n in 0..3 {
            v[n + 1] = match sig.args[n] {
                Some(Ty::V128) => x[n],
                Some(_) => {
                    let s = self.cur.ins().scalar_to_vector(I64X2, x[n]);
                    self.cast(s, V)
                }
                // Unused; any vector will do.
                None => v[1],
            };
        }
        // RAX is the thunk's to clobber: the first result.
        let shape = Shape { vecs: 3, vec_rets: 1, ..Shape::call(2, 1) };
        let r = self.call_results(Thunk::VEC_EVAL, shape, &v)[1];
        if sig.result == Ty::V128 {
            return Ok(r);
        }
        let r = self.cast(r, I64X2);
        Ok(self.cur.ins().extractlane(r, 0))
    }

    /// The op in Cranelift's own, where that computes the same.
    fn native(&mut self, op: VecOp, imm: u8, [a, b, c]: [Clif; 3]) -> Option<Clif> {
        use VecOp as O;
        let lanes = |v: O| match v {
            O::Paddb | O::Psubb | O::Pcmpeqb | O::Pcmpgtb | O::Pminub | O::Pminsb | O::Pmaxub | O::Pmaxsb => I8X16,
            O::Paddsb | O::Paddusb | O::Psubsb | O::Psubusb | O::Pavgb => I8X16,
            O::Paddw | O::Psubw | O::Pcmpeqw | O::Pcmpgtw | O::Pminuw | O::Pminsw | O::Pmaxuw | O::Pmaxsw => I16X8,
            O::Paddsw | O::Paddusw | O::Psubsw | O::Psubusw | O::Pavgw | O::Pmullw => I16X8,
            O::Paddd | O::Psubd | O::Pcmpeqd | O::Pcmpgtd | O::Pminud | O::Pminsd | O::Pmaxud | O::Pmaxsd => I32X4,
            O::Pmulld | O::Packssdw | O::Packusdw | O::Pabsd => I32X4,
            O::Packsswb | O::Packuswb | O::Pabsw => I16X8,
            O::Pmovsxwd | O::Pmovzxwd | O::Pmaddwd => I16X8,
            O::Pmovsxdq | O::Pmovzxdq => I32X4,
            O::Paddq | O::Psubq | O::Pcmpeqq | O::Pcmpgtq => I64X2,
            _ => V,
        };
        let v = match op {
            O::And => self.cur.ins().band(a, b),
            O::Or => self.cur.ins().bor(a, b),
            O::Xor => self.cur.ins().bxor(a, b),
            O::Andn => self.cur.ins().band_not(b, a),
            O::Paddb | O::Paddw | O::Paddd | O::Paddq => {
                self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().iadd(x, y))
            }
            O::Psubb | O::Psubw | O::Psubd | O::Psubq => {
                self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().isub(x, y))
            }
            O::Pmullw | O::Pmulld => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().imul(x, y)),
            O::Pcmpeqb | O::Pcmpeqw | O::Pcmpeqd | O::Pcmpeqq => {
                self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().icmp(IntCC::Equal, x, y))
            }
            O::Pcmpgtb | O::Pcmpgtw | O::Pcmpgtd | O::Pcmpgtq => {
                self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().icmp(IntCC::SignedGreaterThan, x, y))
            }
            O::Pminub | O::Pminuw | O::Pminud => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().umin(x, y)),
            O::Pmaxub | O::Pmaxuw | O::Pmaxud => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().umax(x, y)),
            O::Pminsb | O::Pminsw | O::Pminsd => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().smin(x, y)),
            O::Pmaxsb | O::Pmaxsw | O::Pmaxsd => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().smax(x, y)),
            O::Paddsb | O::Paddsw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().sadd_sat(x, y)),
            O::Paddusb | O::Paddusw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().uadd_sat(x, y)),
            O::Psubsb | O::Psubsw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().ssub_sat(x, y)),
            O::Psubusb | O::Psubusw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().usub_sat(x, y)),
            O::Packsswb | O::Packssdw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().snarrow(x, y)),
            O::Packuswb | O::Packusdw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().unarrow(x, y)),
            O::Pabsb | O::Pabsw | O::Pabsd => self.lanewise(lanes(op), a, a, |l, x, _| l.cur.ins().iabs(x)),
            O::Pmovsxbw | O::Pmovsxwd | O::Pmovsxdq => {
                self.lanewise(lanes(op), a, a, |l, x, _| l.cur.ins().swiden_low(x))
            }
            O::Pmovzxbw | O::Pmovzxwd | O::Pmovzxdq => {
                self.lanewise(lanes(op), a, a, |l, x, _| l.cur.ins().uwiden_low(x))
            }
            O::Pshufb => self.cur.ins().x86_pshufb(a, b),
            O::Pblendvb => self.cur.ins().blendv(c, b, a),
            O::Pavgb | O::Pavgw => self.lanewise(lanes(op), a, b, |l, x, y| l.cur.ins().avg_round(x, y)),
            O::PsllwImm | O::PsrlwImm | O::PsrawImm => return Some(self.shift_imm(op, I16X8, imm, a)),
            O::PslldImm | O::PsrldImm | O::PsradImm => return Some(self.shift_imm(op, I32X4, imm, a)),
            O::PsllqImm | O::PsrlqImm => return Some(self.shift_imm(op, I64X2, imm, a)),
            O::Pmovmskb => {
                let m = self.cur.ins().vhigh_bits(I32, a);
                return Some(self.cur.ins().uextend(I64, m));
            }
            O::Pinsrb => return Some(self.insert(I8X16, I8, imm & 15, a, b)),
            O::Pinsrw => return Some(self.insert(I16X8, I16, imm & 7, a, b)),
            O::Pinsrd => return Some(self.insert(I32X4, I32, imm & 3, a, b)),
            O::Pinsrq => return Some(self.insert(I64X2, I64, imm & 1, a, b)),
            O::Pextrb => return Some(self.extract(I8X16, imm & 15, a)),
            O::Pextrw => return Some(self.extract(I16X8, imm & 7, a)),
            O::Pextrd => return Some(self.extract(I32X4, imm & 3, a)),
            O::Pextrq => return Some(self.extract(I64X2, imm & 1, a)),
            O::Pslldq | O::Psrldq if imm > 15 => self.zero(),
            O::Pslldq => {
                let z = self.zero();
                self.shuffle(z, a, |n| 16 - imm + n)
            }
            O::Psrldq => {
                let z = self.zero();
                self.shuffle(a, z, |n| n + imm)
            }
            _ => self.shuffle_op(op, imm, a, b)?,
        };
        Some(v)
    }

    /// Ops that move whole bytes by a constant pattern.
    fn shuffle_op(&mut self, op: VecOp, imm: u8, a: Clif, b: Clif) -> Option<Clif> {
        use VecOp as O;
        // Interleaves lanes of `w` bytes from the halves that start at byte `from`.
        let unpack = |w: u8, from: u8| move |n: u8| ((n / w) & 1) * 16 + from + n / (2 * w) * w + n % w;
        // Lane `n` of 2-bit selectors.
        let sel = move |n: u8| imm >> (2 * n) & 3;
        Some(match op {
            O::Punpcklbw => self.shuffle(a, b, unpack(1, 0)),
            O::Punpcklwd => self.shuffle(a, b, unpack(2, 0)),
            O::Punpckldq => self.shuffle(a, b, unpack(4, 0)),
            O::Punpcklqdq => self.shuffle(a, b, unpack(8, 0)),
            O::Punpckhbw => self.shuffle(a, b, unpack(1, 8)),
            O::Punpckhwd => self.shuffle(a, b, unpack(2, 8)),
            O::Punpckhdq => self.shuffle(a, b, unpack(4, 8)),
            O::Punpckhqdq => self.shuffle(a, b, unpack(8, 8)),
            O::Pshufd => self.shuffle(a, a, |n| sel(n / 4) * 4 + n % 4),
            O::Pshuflw => self.shuffle(a, a, |n| if n < 8 { sel(n / 2) * 2 + n % 2 } else { n }),
            O::Pshufhw => self.shuffle(a, a, |n| if n < 8 { n } else { 8 + sel((n - 8) / 2) * 2 + n % 2 }),
            O::Shufps => self.shuffle(a, b, |n| u8::from(n >= 8) * 16 + sel(n / 4) * 4 + n % 4),
            O::Shufpd => self.shuffle(a, b, |n| n / 8 * 16 + (imm >> (n / 8) & 1) * 8 + n % 8),
            O::Palignr if imm < 32 => {
                if imm <= 16 {
                    self.shuffle(b, a, |n| n + imm)
                } else {
                    let z = self.zero();
                    self.shuffle(a, z, |n| (n + imm - 16).min(31))
                }
            }
            O::Palignr => self.zero(),
            O::Movss => self.shuffle(a, b, |n| if n < 4 { n + 16 } else { n }),
            O::Movsd => self.shuffle(a, b, |n| if n < 8 { n + 16 } else { n }),
            O::Pblendw => self.shuffle(a, b, |n| (imm >> (n / 2) & 1) * 16 + n),
            O::Blendps => self.shuffle(a, b, |n| (imm >> (n / 4) & 1) * 16 + n),
            O::Blendpd => self.shuffle(a, b, |n| (imm >> (n / 8) & 1) * 16 + n),
            _ => return None,
        })
    }

    fn lanewise(&mut self, t: Type, a: Clif, b: Clif, f: impl FnOnce(&mut Self, Clif, Clif) -> Clif) -> Clif {
        let (a, b) = (self.cast(a, t), self.cast(b, t));
        f(self, a, b)
    }

    fn shift_imm(&mut self, op: VecOp, t: Type, imm: u8, a: Clif) -> Clif {
        use VecOp as O;
        let bits = t.lane_bits() as u8;
        let arithmetic = matches!(op, O::PsrawImm | O::PsradImm);
        if imm >= bits && !arithmetic {
            return self.zero();
        }
        let a = self.cast(a, t);
        let n = i64::from(imm.min(bits - 1));
        let n = self.iconst(I32, n);
        match op {
            O::PsllwImm | O::PslldImm | O::PsllqImm => self.cur.ins().ishl(a, n),
            O::PsrlwImm | O::PsrldImm | O::PsrlqImm => self.cur.ins().ushr(a, n),
            _ => self.cur.ins().sshr(a, n),
        }
    }

    fn insert(&mut self, t: Type, lane: Type, at: u8, a: Clif, b: Clif) -> Clif {
        let a = self.cast(a, t);
        let b = if lane == I64 { b } else { self.cur.ins().ireduce(lane, b) };
        self.cur.ins().insertlane(a, b, at)
    }

    fn extract(&mut self, t: Type, at: u8, a: Clif) -> Clif {
        let a = self.cast(a, t);
        let v = self.cur.ins().extractlane(a, at);
        if t == I64X2 { v } else { self.cur.ins().uextend(I64, v) }
    }

    fn zero(&mut self) -> Clif {
        let c = self.cur.func.dfg.constants.insert(ConstantData::from(&[0u8; 16][..]));
        self.cur.ins().vconst(V, c)
    }

    /// Byte `n` of the result is byte `f(n)` of `a` (0..16) and `b` (16..32).
    fn shuffle(&mut self, a: Clif, b: Clif, f: impl Fn(u8) -> u8) -> Clif {
        let mut mask = [0u8; 16];
        for (n, to) in mask.iter_mut().enumerate() {
            *to = f(n as u8);
        }
        let imm = self.cur.func.dfg.immediates.push(ConstantData::from(&mask[..]));
        self.cur.ins().shuffle(a, b, imm)
    }
}
