//! Random valid blocks.

use twofold_arch::{CcKind, CondCode, Exception, Loc, TbFlags};

use super::Rng;
use crate::block::{Block, Exit, IndirectKind};
use crate::builder::Builder;
use crate::helper::Helper;
use crate::op::{BinOp, IntCc, MemFlags, RmwOp, Ty, UnOp, Value};
use crate::vecop::VecOp;

/// What a random block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Guest instructions.
    pub insns: usize,
    /// Ops in each, roughly.
    pub ops: usize,
    /// Vector ops too.
    pub vectors: bool,
    /// Memory, helpers and side exits too.
    pub effects: bool,
}

impl Shape {
    /// A shape made from a seed.
    #[must_use]
    pub fn random(rng: &mut Rng) -> Self {
        let insns = 1 + rng.below(8);
        Self { insns, ops: 1 + rng.below(14), vectors: rng.one_in(3), effects: !rng.one_in(4) }
    }
}

const INTS: [Ty; 4] = [Ty::I8, Ty::I16, Ty::I32, Ty::I64];

struct Gen<'a> {
    rng: &'a mut Rng,
    b: Builder,
    values: Vec<Value>,
}

impl Gen<'_> {
    fn keep(&mut self, v: Value) -> Value {
        self.values.push(v);
        v
    }
    /// A value of a type: a recent one, or a new one.
    fn value(&mut self, ty: Ty) -> Value {
        for _ in 0..4 {
            if self.values.is_empty() || self.rng.one_in(8) {
                break;
            }
            let back = if self.rng.one_in(6) { self.values.len() } else { self.values.len().min(8) };
            let v = self.values[self.values.len() - 1 - self.rng.below(back)];
            if self.b.ty(v) == ty {
                return v;
            }
        }
        self.fresh(ty)
    }
    fn fresh(&mut self, ty: Ty) -> Value {
        if ty == Ty::V128 {
            let v = if self.rng.one_in(2) {
                let loc = self.vector_loc();
                self.b.get(Ty::V128, loc)
            } else {
                let (lo, hi) = (self.value(Ty::I64), self.value(Ty::I64));
                self.b.pair(lo, hi)
            };
            return self.keep(v);
        }
        let v = match self.rng.below(5) {
            0 => {
                let imm = self.rng.value();
                self.b.iconst(ty, imm)
            }
            1 if ty != Ty::I8 => {
                let from = self.rng.pick(&INTS[..ty as usize]);
                let a = self.value_or_get(from);
                if self.rng.one_in(2) { self.b.zext(ty, a) } else { self.b.sext(ty, a) }
            }
            2 if ty != Ty::I64 => {
                let from = self.rng.pick(&INTS[ty as usize + 1..]);
                let a = self.value_or_get(from);
                self.b.trunc(ty, a)
            }
            _ => {
                let loc = self.loc(ty);
                self.b.get(ty, loc)
            }
        };
        self.keep(v)
    }
    fn value_or_get(&mut self, ty: Ty) -> Value {
        let found = self.values.iter().rev().take(6).copied().find(|&v| self.b.ty(v) == ty);
        match found {
            Some(v) if !self.rng.one_in(4) => v,
            _ => {
                let loc = self.loc(ty);
                let v = self.b.get(ty, loc);
                self.keep(v)
            }
        }
    }
    /// A place of an integer in the guest state; few places, so that they meet.
    fn loc(&mut self, ty: Ty) -> Loc {
        let gpr = Loc::gpr(self.rng.below(4) as u8);
        match self.rng.below(16) {
            0 if ty == Ty::I8 => Loc(gpr.0 + 1),
            1 => Loc(Loc::xmm(self.rng.below(2) as u8).0 + 8 * self.rng.below(2) as u16),
            2 => self.rng.pick(&[Loc::CC_DST, Loc::CC_SRC, Loc::seg_base(4), Loc::CR0, Loc::RFLAGS_SYS]),
            3 if ty != Ty::I64 => Loc(gpr.0 + 4 - ty.bytes() as u16 / 4 * 4),
            4 if self.rng.one_in(4) => Loc(gpr.0 + self.rng.below(8) as u16),
            _ => gpr,
        }
    }
    fn vector_loc(&mut self) -> Loc {
        let x = Loc::xmm(self.rng.below(3) as u8);
        if self.rng.one_in(12) { Loc(x.0 + 8) } else { x }
    }

    fn bin(&mut self) {
        let ty = self.rng.pick(&INTS);
        let common = [BinOp::Add, BinOp::Sub, BinOp::And, BinOp::Or, BinOp::Xor, BinOp::Shl, BinOp::Shr];
        let op = if self.rng.one_in(3) { self.rng.pick(&BinOp::ALL) } else { self.rng.pick(&common) };
        let a = self.value(ty);
        let v = if self.rng.one_in(3) {
            let imm = self.rng.value();
            self.b.bin_imm(op, a, imm)
        } else {
            let c = self.value(ty);
            self.b.bin(op, a, c)
        };
        self.keep(v);
    }
    fn cmp(&mut self) -> Value {
        let ty = self.rng.pick(&INTS);
        let cc = self.rng.pick(&IntCc::ALL);
        let a = self.value(ty);
        let v = if self.rng.one_in(2) {
            let imm = self.rng.value();
            self.b.cmp_imm(cc, a, imm)
        } else {
            let c = self.value(ty);
            self.b.cmp(cc, a, c)
        };
        self.keep(v)
    }
    fn set_cc(&mut self) {
        let kind = self.rng.pick(&CcKind::ALL);
        if kind == CcKind::Flags {
            let f = self.value(Ty::I64);
            return self.b.set_flags(f);
        }
        let ty = self.rng.pick(&INTS);
        let (a, c) = (self.value(ty), self.value(ty));
        let dst = match kind {
            CcKind::Add => self.b.add(a, c),
            CcKind::Sub if !self.rng.one_in(4) => self.b.sub(a, c),
            CcKind::Logic => self.b.and(a, c),
            _ => self.value(ty),
        };
        self.keep(dst);
        let one = self.rng.value() & 1;
        let src2 = (kind == CcKind::Adc || kind == CcKind::Sbb).then(|| self.b.iconst(ty, one));
        let src = (kind != CcKind::Logic).then_some(c);
        self.b.set_cc(kind, dst, src, src2);
    }
    fn misc(&mut self) {
        let ty = self.rng.pick(&INTS);
        let v = match self.rng.below(6) {
            0 => {
                let op = self.rng.pick(&UnOp::ALL);
                let a = self.value(if op == UnOp::Bswap && ty == Ty::I8 { Ty::I32 } else { ty });
                self.b.un(op, a)
            }
            1 => {
                let ty = if self.rng.one_in(4) { Ty::V128 } else { ty };
                let (c, x, y) = (self.value(Ty::I8), self.value(ty), self.value(ty));
                self.b.select(c, x, y)
            }
            2 => {
                let off = self.rng.bits() as i32;
                self.b.rip(off)
            }
            3 => self.b.flags(),
            4 => {
                let cc = self.rng.pick(&CondCode::ALL);
                self.b.cond(cc)
            }
            _ => self.cmp(),
        };
        self.keep(v);
    }
    fn vector(&mut self) {
        match self.rng.below(4) {
            0 => {
                let a = self.value(Ty::V128);
                let hi = self.rng.one_in(2);
                let v = self.b.half(a, hi);
                self.keep(v);
            }
            1 => {
                let (v, loc) = (self.value(Ty::V128), self.vector_loc());
                self.b.put(loc, v);
            }
            _ => {
                let op = self.rng.pick(VecOp::ALL);
                if op.sig().touches_mxcsr {
                    return;
                }
                let args: Vec<Value> = op.sig().args.iter().flatten().map(|&t| self.value(t)).collect();
                let imm = self.rng.bits() as u8;
                let v = self.b.vec(op, imm, &args);
                self.keep(v);
            }
        }
    }
    fn address(&mut self) -> Value {
        let v = self.value(Ty::I64);
        match self.rng.below(4) {
            0 => v,
            1 => {
                let shift = self.rng.below(4) as u64;
                let x = self.value(Ty::I64);
                let x = self.b.bin_imm(BinOp::Shl, x, shift);
                let s = self.b.add(v, x);
                self.b.bin_imm(BinOp::Add, s, 0x40)
            }
            2 => self.b.bin_imm(BinOp::Sub, v, 8),
            _ => {
                let imm = self.rng.value();
                self.b.bin_imm(BinOp::Add, v, imm)
            }
        }
    }
    fn effect(&mut self, vectors: bool) {
        let ty = if vectors && self.rng.one_in(4) { Ty::V128 } else { self.rng.pick(&INTS) };
        let flags = self.rng.pick(&[MemFlags::NONE, MemFlags::STACK, MemFlags::WRITE_INTENT]);
        match self.rng.below(10) {
            0..=2 => {
                let a = self.address();
                let v = self.b.load(ty, flags, a);
                self.keep(v);
                if ty == Ty::I64 && self.rng.one_in(2) {
                    let loc = self.loc(ty);
                    self.b.put(loc, v);
                }
            }
            3..=5 => {
                let (a, v) = (self.address(), self.value(ty));
                self.b.store(flags, a, v);
            }
            6 => {
                let ty = self.rng.pick(&INTS);
                let op = self.rng.pick(&RmwOp::ALL);
                let (a, v) = (self.address(), self.value(ty));
                let v = self.b.rmw(op, a, v);
                self.keep(v);
            }
            7 => {
                let ty = self.rng.pick(&INTS);
                let (a, x, y) = (self.address(), self.value(ty), self.value(ty));
                let v = self.b.cmpxchg(a, x, y);
                self.keep(v);
            }
            8 => {
                // Those that are quiet mean something together only.
                let helper = self.rng.pick(Helper::ALL);
                let helper = if helper.info().quiet { Helper::X87 } else { helper };
                let args: Vec<Value> = (0..helper.info().args).map(|_| self.value(Ty::I64)).collect();
                let v = self.b.call(helper, &args);
                self.keep(v);
            }
            _ => {
                let c = match self.rng.below(3) {
                    0 => self.cmp(),
                    1 => {
                        let cc = self.rng.pick(&CondCode::ALL);
                        self.b.cond(cc)
                    }
                    _ => self.value(Ty::I8),
                };
                let exit = self.exit();
                let retires = self.rng.one_in(2);
                // Leave seldom enough that the rest is tested too.
                let c = if self.rng.one_in(2) {
                    let zero = self.b.cmp_imm(IntCc::Eq, c, 0x55);
                    self.keep(zero)
                } else {
                    c
                };
                self.b.exit_if(c, exit, retires);
            }
        }
    }
    fn exit(&mut self) -> Exit {
        let off = self.rng.below(4096) as u16;
        match self.rng.below(6) {
            0 => Exit::JumpFar { off: self.rng.bits() as i32 },
            1 => {
                let kind = self.rng.pick(&[IndirectKind::Jump, IndirectKind::Call, IndirectKind::Return]);
                Exit::Indirect { rip: self.value(Ty::I64), kind }
            }
            2 => Exit::Dispatch { off: self.rng.bits() as i32 },
            3 => Exit::Helped,
            4 => Exit::Raise { off, exception: self.rng.pick(&[Exception::UD, Exception::GP0, Exception::gp(8)]) },
            _ => Exit::Jump { off },
        }
    }
}

/// A random valid block.
#[must_use]
pub fn random_block(rng: &mut Rng, shape: Shape) -> Block {
    let flags = TbFlags(rng.below(3) as u32);
    let mut g = Gen { rng, b: Builder::new(flags), values: Vec::new() };
    for i in 0..shape.insns {
        g.b.begin_insn((i * 4) as u16, 4);
        for _ in 0..shape.ops {
            match g.rng.below(12) {
                0..=2 => g.bin(),
                3 | 4 => {
                    let ty = g.rng.pick(&[Ty::I8, Ty::I16, Ty::I32, Ty::I64, Ty::I64, Ty::I64]);
                    let (v, loc) = (g.value(ty), g.loc(ty));
                    g.b.put(loc, v);
                }
                5 | 6 => g.set_cc(),
                7 => g.misc(),
                8 | 9 if shape.effects => g.effect(shape.vectors),
                10 if shape.vectors => g.vector(),
                _ => {
                    let ty = g.rng.pick(&INTS);
                    g.fresh(ty);
                }
            }
        }
    }
    let end = g.exit();
    let retires = g.rng.one_in(2);
    g.b.finish(end, retires)
}
