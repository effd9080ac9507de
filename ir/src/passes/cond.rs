//! Conditions on lazy flags whose kind is known, as comparisons of the operands.
//!
//! Part of the forward walk. The rules are those of `arch::flags`, written again in IR; the tests compare the two for every
//! kind, condition and width.

use twofold_arch::{CcKind, CcOp, CondCode, Loc};

use super::forward::Forward;
use crate::op::{BinOp, IntCc, Op, Ty, UnOp, Value};

/// The lazy flags at a point of the block.
struct Flags<'a, 'f> {
    f: &'a mut Forward<'f>,
    kind: CcKind,
    ty: Ty,
    /// Result and operand, at the width.
    d: Value,
    s: Value,
}

/// The value of condition `cc` for flags of kind `op`.
pub(super) fn value(f: &mut Forward<'_>, cc: CondCode, op: CcOp) -> Option<Value> {
    let kind = op.kind();
    let negate = cc as u8 & 1 != 0;
    if kind == CcKind::Flags {
        return Some(from_image(f, cc as u8 >> 1, negate));
    }
    let mut flags = Flags::new(f, op);
    let v = match cc as u8 >> 1 {
        0 => flags.overflow(),
        1 => flags.carry(),
        2 => flags.zero(),
        3 => flags.below_or_equal(),
        4 => flags.sign(),
        5 => flags.parity(),
        6 => flags.less(),
        _ => flags.less_or_equal(),
    };
    Some(if negate { flags.not(v) } else { v })
}

/// The six flags in RFLAGS positions, for lazy flags of kind `op`.
pub(super) fn image(f: &mut Forward<'_>, op: CcOp) -> Value {
    use twofold_arch::control::rflags::ARITH;
    let kind = op.kind();
    if kind == CcKind::Flags {
        let src = f.get(Ty::I64, Loc::CC_SRC);
        return f.bin_imm(BinOp::And, Ty::I64, src, ARITH);
    }
    let mut flags = Flags::new(f, op);
    let bits = [(flags.carry(), 0), (flags.parity(), 2), (flags.zero(), 6), (flags.sign(), 7), (flags.overflow(), 11)];
    let mut image = flags.adjust();
    for (bit, at) in bits {
        let bit = flags.f.emit(Op::Zext { to: Ty::I64, a: bit });
        let bit = flags.f.bin_imm(BinOp::Shl, Ty::I64, bit, at);
        image = flags.f.bin(BinOp::Or, Ty::I64, image, bit);
    }
    image
}

/// From the six flags in RFLAGS positions.
fn from_image(f: &mut Forward<'_>, pair: u8, negate: bool) -> Value {
    use twofold_arch::control::rflags::{CF, OF, PF, SF, ZF};
    let image = f.get(Ty::I64, Loc::CC_SRC);
    let mask = match pair {
        0 => OF,
        1 => CF,
        2 => ZF,
        3 => CF | ZF,
        4 => SF,
        5 => PF,
        _ => SF | OF,
    };
    let image = if pair >= 6 {
        // SF (bit 7) against OF (bit 11), in bit 7.
        let of = f.bin_imm(BinOp::Shr, Ty::I64, image, 4);
        let lt = f.bin(BinOp::Xor, Ty::I64, of, image);
        let lt = f.bin_imm(BinOp::And, Ty::I64, lt, SF);
        if pair == 6 {
            lt
        } else {
            let zf = f.bin_imm(BinOp::And, Ty::I64, image, ZF);
            f.bin(BinOp::Or, Ty::I64, lt, zf)
        }
    } else {
        f.bin_imm(BinOp::And, Ty::I64, image, mask)
    };
    let zero = f.iconst(Ty::I64, 0);
    f.emit(Op::Cmp { cc: if negate { IntCc::Eq } else { IntCc::Ne }, ty: Ty::I64, a: image, b: zero })
}

impl<'a, 'f> Flags<'a, 'f> {
    fn new(f: &'a mut Forward<'f>, op: CcOp) -> Self {
        let (kind, ty) = (op.kind(), Ty::ALL[op.log2_bytes() as usize]);
        let d = f.get(Ty::I64, Loc::CC_DST);
        let d = f.trunc(ty, d);
        let s = if kind == CcKind::Logic {
            d
        } else {
            let s = f.get(Ty::I64, Loc::CC_SRC);
            // Only MUL asks whether all of the word is zero.
            if kind == CcKind::Mul { s } else { f.trunc(ty, s) }
        };
        Self { f, kind, ty, d, s }
    }

    fn cmp(&mut self, cc: IntCc, a: Value, b: Value) -> Value {
        let ty = self.f.ty(a);
        self.f.emit(Op::Cmp { cc, ty, a, b })
    }
    fn cmp_imm(&mut self, cc: IntCc, a: Value, imm: u64) -> Value {
        let ty = self.f.ty(a);
        let b = self.f.iconst(ty, imm);
        self.cmp(cc, a, b)
    }
    fn bin(&mut self, op: BinOp, a: Value, b: Value) -> Value {
        let ty = self.f.ty(a);
        self.f.bin(op, ty, a, b)
    }
    fn constant(&mut self, v: bool) -> Value {
        self.f.iconst(Ty::I8, u64::from(v))
    }
    fn not(&mut self, v: Value) -> Value {
        if let Op::Cmp { cc, ty, a, b } = self.f.out[v.index()] {
            return self.f.push(Op::Cmp { cc: cc.negated(), ty, a, b });
        }
        self.cmp_imm(IntCc::Eq, v, 0)
    }
    /// `src2 & 1`, at the width.
    fn carry_in(&mut self) -> Value {
        let c = self.f.get(Ty::I64, Loc::CC_SRC2);
        let c = self.f.trunc(self.ty, c);
        self.f.bin_imm(BinOp::And, self.ty, c, 1)
    }
    /// The left operand of an addition or subtraction: found, or computed back.
    fn left(&mut self) -> Value {
        let (d, s) = (self.d, self.s);
        if let Op::Bin { op, ty, a, b } = self.f.out[d.index()] {
            let same = b == s || self.f.constant(s).is_some_and(|c| self.f.constant(b) == Some(c));
            match (self.kind, op) {
                (CcKind::Sub, BinOp::Sub) | (CcKind::Add, BinOp::Add) if ty == self.ty && same => return a,
                (CcKind::Add, BinOp::Add) if ty == self.ty && a == s => return b,
                _ => {}
            }
        }
        if self.kind == CcKind::Sbb
            && let Op::Bin { op: BinOp::Sub, a: first, b: carry, .. } = self.f.out[d.index()]
            && let Op::Bin { op: BinOp::Sub, ty, a, b } = self.f.out[first.index()]
            && ty == Ty::I64
            && b == s
            && carry == self.f.get(Ty::I64, Loc::CC_SRC2)
        {
            return a;
        }
        let carry = matches!(self.kind, CcKind::Adc | CcKind::Sbb).then(|| self.carry_in());
        let op = if matches!(self.kind, CcKind::Add | CcKind::Adc) { BinOp::Sub } else { BinOp::Add };
        let a = self.bin(op, d, s);
        match carry {
            Some(c) => self.bin(op, a, c),
            None => a,
        }
    }

    fn zero(&mut self) -> Value {
        // The operands of a subtraction say the same, but where it has overwritten one (SUB, DEC) its old value would have to
        // be kept for that.
        if let Op::Bin { op: BinOp::Sub, a, .. } = self.f.out[self.d.index()]
            && self.f.is_overwritten(a)
        {
            let b = self.f.iconst(self.ty, 0);
            return self.f.push(Op::Cmp { cc: IntCc::Eq, ty: self.ty, a: self.d, b });
        }
        self.cmp_imm(IntCc::Eq, self.d, 0)
    }
    fn sign(&mut self) -> Value {
        self.cmp_imm(IntCc::Slt, self.d, 0)
    }
    fn parity(&mut self) -> Value {
        let low = self.f.trunc(Ty::I8, self.d);
        let ones = self.f.emit(Op::Un { op: UnOp::Popcnt, ty: Ty::I8, a: low });
        let odd = self.f.bin_imm(BinOp::And, Ty::I8, ones, 1);
        self.cmp_imm(IntCc::Eq, odd, 0)
    }
    fn carry(&mut self) -> Value {
        let (d, s) = (self.d, self.s);
        match self.kind {
            CcKind::Flags | CcKind::Logic => self.constant(false),
            CcKind::Add => self.cmp(IntCc::Ult, d, s),
            CcKind::Sub => {
                let a = self.left();
                self.cmp(IntCc::Ult, a, s)
            }
            CcKind::Adc | CcKind::Sbb => {
                let left = if self.kind == CcKind::Adc { d } else { self.left() };
                let c = self.carry_in();
                let c = self.f.trunc(Ty::I8, c);
                let below = self.cmp(IntCc::Ult, left, s);
                let equal = self.cmp(IntCc::Eq, left, s);
                let equal = self.bin(BinOp::And, equal, c);
                self.bin(BinOp::Or, below, equal)
            }
            CcKind::Inc | CcKind::Dec | CcKind::Shr => {
                let bit = self.f.trunc(Ty::I8, s);
                self.f.bin_imm(BinOp::And, Ty::I8, bit, 1)
            }
            CcKind::Shl => self.cmp_imm(IntCc::Slt, s, 0),
            CcKind::Mul | CcKind::CarryNonzero => self.cmp_imm(IntCc::Ne, s, 0),
            CcKind::CarryZero => self.cmp_imm(IntCc::Eq, s, 0),
        }
    }
    fn overflow(&mut self) -> Value {
        let (d, s) = (self.d, self.s);
        let top = 1u64 << (self.ty.bits() - 1);
        match self.kind {
            CcKind::Flags | CcKind::Logic | CcKind::CarryNonzero | CcKind::CarryZero => self.constant(false),
            CcKind::Add | CcKind::Adc | CcKind::Sub | CcKind::Sbb => {
                let a = self.left();
                let ad = self.bin(BinOp::Xor, a, d);
                let other = if matches!(self.kind, CcKind::Add | CcKind::Adc) { d } else { a };
                let s = self.bin(BinOp::Xor, other, s);
                let both = self.bin(BinOp::And, ad, s);
                self.cmp_imm(IntCc::Slt, both, 0)
            }
            CcKind::Inc => self.cmp_imm(IntCc::Eq, d, top),
            CcKind::Dec => self.cmp_imm(IntCc::Eq, d, top - 1),
            CcKind::Shl | CcKind::Shr => {
                let changed = self.bin(BinOp::Xor, s, d);
                self.cmp_imm(IntCc::Slt, changed, 0)
            }
            CcKind::Mul => self.cmp_imm(IntCc::Ne, s, 0),
        }
    }
    /// AF, in its place.
    fn adjust(&mut self) -> Value {
        let (d, s) = (self.d, self.s);
        let wrapped = match self.kind {
            CcKind::Add | CcKind::Adc | CcKind::Sub | CcKind::Sbb => {
                let a = self.left();
                let x = self.bin(BinOp::Xor, a, s);
                let x = self.bin(BinOp::Xor, x, d);
                let x = if self.ty == Ty::I64 { x } else { self.f.emit(Op::Zext { to: Ty::I64, a: x }) };
                return self.f.bin_imm(BinOp::And, Ty::I64, x, 0x10);
            }
            CcKind::Inc => 0,
            CcKind::Dec => 0xf,
            _ => return self.f.iconst(Ty::I64, 0),
        };
        let low = self.f.trunc(Ty::I8, d);
        let low = self.f.bin_imm(BinOp::And, Ty::I8, low, 0xf);
        let af = self.cmp_imm(IntCc::Eq, low, wrapped);
        let af = self.f.emit(Op::Zext { to: Ty::I64, a: af });
        self.f.bin_imm(BinOp::Shl, Ty::I64, af, 4)
    }
    fn below_or_equal(&mut self) -> Value {
        match self.kind {
            CcKind::Sub => {
                let a = self.left();
                self.cmp(IntCc::Ule, a, self.s)
            }
            CcKind::Logic => self.zero(),
            _ => {
                let (c, z) = (self.carry(), self.zero());
                self.bin(BinOp::Or, c, z)
            }
        }
    }
    fn less(&mut self) -> Value {
        match self.kind {
            CcKind::Sub => {
                let a = self.left();
                self.cmp(IntCc::Slt, a, self.s)
            }
            CcKind::Logic | CcKind::CarryNonzero | CcKind::CarryZero => self.sign(),
            _ => {
                let (s, o) = (self.sign(), self.overflow());
                self.bin(BinOp::Xor, s, o)
            }
        }
    }
    fn less_or_equal(&mut self) -> Value {
        match self.kind {
            CcKind::Sub => {
                let a = self.left();
                self.cmp(IntCc::Sle, a, self.s)
            }
            CcKind::Logic => self.cmp_imm(IntCc::Sle, self.d, 0),
            _ => {
                let (l, z) = (self.less(), self.zero());
                self.bin(BinOp::Or, l, z)
            }
        }
    }
}
