//! Condition codes and the lazy arithmetic flags: what `cc_op`, `cc_dst`, `cc_src`, `cc_src2` of the state mean.
//!
//! An instruction that sets flags stores what it computed, not the flags; [`arith_flags`] and [`eval_cond`] are the one
//! place that turns that into CF, PF, AF, ZF, SF, OF. The IR's flag pass and the back end specialise these same rules
//! for constant `cc_op`, and are tested against them.

use crate::control::rflags::{AF, CF, OF, PF, SF, ZF};

/// How the lazy flags were made. `res`, `a`, `b` are the instruction's result and operands, truncated to the width.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum CcKind {
    /// `cc_src` holds the six flags themselves, in RFLAGS positions. Width ignored.
    Flags,
    /// `dst = a + b`, `src = b`.
    Add,
    /// `dst = a + b + carry`, `src = b`, `src2 = carry` (0 or 1).
    Adc,
    /// `dst = a - b`, `src = b`. Also CMP, NEG (a = 0), CMPXCHG.
    Sub,
    /// `dst = a - b - borrow`, `src = b`, `src2 = borrow` (0 or 1).
    Sbb,
    /// `dst = res`; CF = OF = AF = 0.
    Logic,
    /// `dst = a + 1`, `src` = CF before (0 or 1).
    Inc,
    /// `dst = a - 1`, `src` = CF before (0 or 1).
    Dec,
    /// `dst = res`, `src` = the operand shifted left by count - 1: CF is its top bit, OF = CF ^ top bit of `dst`.
    Shl,
    /// `dst = res`, `src` = the operand shifted right by count - 1: CF is its bit 0, OF = top bit of `dst ^ src`. SHR and SAR.
    Shr,
    /// `dst` = low half of the product, `src` ≠ 0 exactly when CF = OF = 1.
    Mul,
    /// `dst = res`, CF = (`src` ≠ 0), OF = AF = 0 (BLSI).
    CarryNonzero,
    /// `dst = res`, CF = (`src` = 0), OF = AF = 0 (BLSR, BLSMSK, LZCNT, TZCNT).
    CarryZero,
}

impl CcKind {
    /// Every kind, in the order of its number.
    pub const ALL: [CcKind; 13] = {
        use CcKind::*;
        [Flags, Add, Adc, Sub, Sbb, Logic, Inc, Dec, Shl, Shr, Mul, CarryNonzero, CarryZero]
    };
}

/// A `cc_op` value: kind and operand width, `kind * 4 + log2(bytes)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct CcOp(pub u8);

impl CcOp {
    /// `cc_src` holds the flags.
    pub const FLAGS: CcOp = CcOp::new(CcKind::Flags, 3);
    /// The value for `kind` at a width of `1 << log2_bytes` bytes.
    #[must_use]
    pub const fn new(kind: CcKind, log2_bytes: u8) -> Self {
        Self((kind as u8) << 2 | log2_bytes)
    }
    /// The kind; a number no kind has reads as `Flags`, so that no state can make this panic.
    #[must_use]
    #[inline]
    pub const fn kind(self) -> CcKind {
        let n = (self.0 >> 2) as usize;
        if n < CcKind::ALL.len() { CcKind::ALL[n] } else { CcKind::Flags }
    }
    /// log2 of the operand width in bytes, 0..=3.
    #[must_use]
    #[inline]
    pub const fn log2_bytes(self) -> u8 {
        self.0 & 3
    }
    /// Operand width in bits.
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u32 {
        8 << self.log2_bytes()
    }
}

/// An instruction's condition, by its encoding (SDM Vol 1, "EFLAGS Condition Codes").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum CondCode {
    O,
    No,
    B,
    Nb,
    Z,
    Nz,
    Be,
    Nbe,
    S,
    Ns,
    P,
    Np,
    L,
    Nl,
    Le,
    Nle,
}

impl CondCode {
    /// All sixteen in encoding order.
    pub const ALL: [CondCode; 16] = {
        use CondCode::*;
        [O, No, B, Nb, Z, Nz, Be, Nbe, S, Ns, P, Np, L, Nl, Le, Nle]
    };
    /// Names in encoding order, as in `jCC`.
    pub const NAMES: [&'static str; 16] =
        ["o", "no", "b", "nb", "z", "nz", "be", "nbe", "s", "ns", "p", "np", "l", "nl", "le", "nle"];
    /// The condition that holds when this one does not.
    #[must_use]
    pub const fn negate(self) -> Self {
        Self::ALL[self as usize ^ 1]
    }
    /// Whether the condition holds for the flags `f`.
    #[must_use]
    #[inline]
    pub const fn holds(self, f: u64) -> bool {
        let lt = (f & SF != 0) != (f & OF != 0);
        let base = match self as u8 >> 1 {
            0 => f & OF != 0,
            1 => f & CF != 0,
            2 => f & ZF != 0,
            3 => f & (CF | ZF) != 0,
            4 => f & SF != 0,
            5 => f & PF != 0,
            6 => lt,
            _ => lt || f & ZF != 0,
        };
        base != (self as u8 & 1 != 0)
    }
}

/// CF, PF, AF, ZF, SF and OF in RFLAGS positions from the lazy flags. Bits above the width are ignored.
#[must_use]
#[inline]
pub const fn arith_flags(op: CcOp, dst: u64, src: u64, src2: u64) -> u64 {
    let kind = op.kind();
    if matches!(kind, CcKind::Flags) {
        return src & (CF | PF | AF | ZF | SF | OF);
    }
    let bits = op.bits();
    let mask = u64::MAX >> (64 - bits);
    let top = 1u64 << (bits - 1);
    let (d, s) = (dst & mask, src & mask);
    let mut f = 0;
    if d == 0 {
        f |= ZF;
    }
    if d & top != 0 {
        f |= SF;
    }
    if (d as u8).count_ones() & 1 == 0 {
        f |= PF;
    }
    let (cf, of, af) = match kind {
        CcKind::Flags | CcKind::Logic => (false, false, false),
        CcKind::Add | CcKind::Adc => {
            let c = if matches!(kind, CcKind::Adc) { src2 & 1 } else { 0 };
            let a = d.wrapping_sub(s).wrapping_sub(c) & mask;
            let cf = if c != 0 { d <= a } else { d < a };
            (cf, (a ^ d) & (s ^ d) & top != 0, (a ^ s ^ d) & 0x10 != 0)
        }
        CcKind::Sub | CcKind::Sbb => {
            let c = if matches!(kind, CcKind::Sbb) { src2 & 1 } else { 0 };
            let a = d.wrapping_add(s).wrapping_add(c) & mask;
            let cf = if c != 0 { a <= s } else { a < s };
            (cf, (a ^ s) & (a ^ d) & top != 0, (a ^ s ^ d) & 0x10 != 0)
        }
        CcKind::Inc => (src & 1 != 0, d == top, d & 0xf == 0),
        CcKind::Dec => (src & 1 != 0, d == top - 1, d & 0xf == 0xf),
        CcKind::Shl => (s & top != 0, (s ^ d) & top != 0, false),
        CcKind::Shr => (s & 1 != 0, (s ^ d) & top != 0, false),
        CcKind::Mul => (src != 0, src != 0, false),
        CcKind::CarryNonzero => (s != 0, false, false),
        CcKind::CarryZero => (s == 0, false, false),
    };
    if cf {
        f |= CF;
    }
    if of {
        f |= OF;
    }
    if af {
        f |= AF;
    }
    f
}

/// Whether `cond` holds for the lazy flags: [`arith_flags`] followed by [`CondCode::holds`].
#[must_use]
#[inline]
pub const fn eval_cond(cond: CondCode, op: CcOp, dst: u64, src: u64, src2: u64) -> bool {
    cond.holds(arith_flags(op, dst, src, src2))
}
