//! Floating-point vector ops without the host's help: x86's rules for NaNs, flags and what MXCSR says.
//!
//! For hosts that are not x86-64 (or lack SSE4.1). Results and flags are those of the instructions with all exceptions
//! masked; only the approximations (RCPPS and kin) differ, being exact.

use core::cell::Cell;
use core::cmp::Ordering;

use crate::softfloat::{Context, DOUBLE, Format, HALF, Number, Round, SINGLE, flag};
use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make, zip};

/// f32 and f64 as their bits.
trait Float: Lane + PartialEq {
    const FORMAT: Format;
    const WIDTH: u32;
    fn bits(self) -> u64;
    fn of(bits: u64) -> Self;
    fn all_ones(on: bool) -> Self {
        Self::of(if on { u64::MAX } else { 0 })
    }
    /// The bit that quiet NaNs have set.
    fn quiet_bit() -> u64 {
        1 << (Self::FORMAT.precision - 2)
    }
    /// All bits but the sign.
    fn magnitude(self) -> u64 {
        self.bits() & ((1 << (Self::WIDTH - 1)) - 1)
    }
    fn infinity() -> u64 {
        Number::Infinity(false).to_bits(Self::FORMAT, Self::WIDTH)
    }
    /// The default ("real indefinite") NaN.
    fn indefinite() -> Self {
        Self::of(u64::MAX << (Self::FORMAT.precision - 2))
    }
    fn is_nan(self) -> bool {
        self.magnitude() > Self::infinity()
    }
    fn is_signaling(self) -> bool {
        self.is_nan() && self.bits() & Self::quiet_bit() == 0
    }
    fn quiet(self) -> Self {
        Self::of(self.bits() | Self::quiet_bit())
    }
    fn negate(self) -> Self {
        Self::of(self.bits() ^ 1 << (Self::WIDTH - 1))
    }
}

impl Float for u32 {
    const FORMAT: Format = SINGLE;
    const WIDTH: u32 = 32;
    fn bits(self) -> u64 {
        self.into()
    }
    fn of(bits: u64) -> Self {
        bits as u32
    }
}

impl Float for u64 {
    const FORMAT: Format = DOUBLE;
    const WIDTH: u32 = 64;
    fn bits(self) -> u64 {
        self
    }
    fn of(bits: u64) -> Self {
        bits
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Arith {
    Add,
    Sub,
    Mul,
    Div,
}

/// What MXCSR asks for, and the flags that an op raises.
struct Unit {
    round: Round,
    daz: bool,
    ftz: bool,
    flags: Cell<u32>,
}

impl Unit {
    fn new(mxcsr: u32) -> Self {
        let (daz, ftz) = (mxcsr & 0x40 != 0, mxcsr & 0x8000 != 0);
        Self { round: Round::new(mxcsr >> 13), daz, ftz, flags: Cell::new(0) }
    }
    fn raise(&self, flags: u32) {
        self.flags.set(self.flags.get() | flags);
    }
    /// A number, and DE when it is denormal; with DAZ, zero.
    fn operand<F: Float>(&self, x: F) -> (Number, u32) {
        match Number::from_bits(x.bits(), F::FORMAT, F::WIDTH) {
            (n, true) if self.daz => (Number::Zero(n.negative()), 0),
            (n, denormal) => (n, if denormal { flag::DE } else { 0 }),
        }
    }
    /// The first NaN of some operands, quiet; IE when one of them signals.
    fn nan<F: Float>(&self, operands: &[F]) -> Option<F> {
        let nan = operands.iter().find(|x| x.is_nan())?;
        if operands.iter().any(|x| x.is_signaling()) {
            self.raise(flag::IE);
        }
        Some(nan.quiet())
    }
    fn invalid<F: Float>(&self) -> F {
        self.raise(flag::IE);
        F::indefinite()
    }
    fn rounded<F: Float>(&self, n: Number) -> F {
        self.rounded_as(n, self.round, self.ftz)
    }
    fn rounded_as<F: Float>(&self, n: Number, round: Round, ftz: bool) -> F {
        let mut ctx = Context::new(round, ftz);
        let n = n.round(F::FORMAT, &mut ctx);
        self.raise(ctx.flags);
        F::of(n.to_bits(F::FORMAT, F::WIDTH))
    }

    fn arith<F: Float>(&self, op: Arith, a: F, b: F) -> F {
        if let Some(nan) = self.nan(&[a, b]) {
            return nan;
        }
        let ((x, dx), (y, dy)) = (self.operand(a), self.operand(b));
        let r = match op {
            Arith::Add => x.plus(y, self.round),
            Arith::Sub => x.plus(y.negated(), self.round),
            Arith::Mul => x.times(y),
            Arith::Div => x.over(y),
        };
        let Some(r) = r else { return self.invalid() };
        if op == Arith::Div && y.is_zero() && !x.is_infinite() {
            self.raise(flag::ZE);
        } else {
            self.raise(dx | dy);
        }
        self.rounded(r)
    }

    /// Whether one is less than the other; `None` with a NaN among them, which is invalid.
    fn ordered<F: Float>(&self, a: F, b: F) -> Option<Ordering> {
        if a.is_nan() || b.is_nan() {
            self.raise(flag::IE);
            return None;
        }
        let ((x, dx), (y, dy)) = (self.operand(a), self.operand(b));
        self.raise(dx | dy);
        Some(x.compare(y))
    }

    /// The second operand unless the first is on the side that is asked for: so for NaNs and for zeroes of either sign.
    fn pick<F: Float>(&self, side: Ordering, a: F, b: F) -> F {
        let x = if self.ordered(a, b) == Some(side) { a } else { b };
        if x.is_nan() { x } else { F::of(self.operand(x).0.to_bits(F::FORMAT, F::WIDTH)) }
    }

    fn sqrt<F: Float>(&self, a: F) -> F {
        if let Some(nan) = self.nan(&[a]) {
            return nan;
        }
        let (x, denormal) = self.operand(a);
        let Some(r) = x.sqrt() else { return self.invalid() };
        self.raise(denormal);
        self.rounded(r)
    }

    fn round<F: Float>(&self, imm: u8, a: F) -> F {
        if let Some(nan) = self.nan(&[a]) {
            return nan;
        }
        let mode = if imm & 4 != 0 { self.round } else { Round::new(imm.into()) };
        let (whole, inexact) = self.operand(a).0.to_whole(mode);
        if inexact && imm & 8 == 0 {
            self.raise(flag::PE);
        }
        F::of(whole.to_bits(F::FORMAT, F::WIDTH))
    }

    /// The predicates: four comparisons, those with unordered counted the other way (bit 3), each negated (bit 2). Less and
    /// less or equal signal for every NaN, the others for signaling ones; bit 4 has it the other way.
    fn compare<F: Float>(&self, imm: u8, a: F, b: F) -> F {
        let unordered = a.is_nan() || b.is_nan();
        let signals = matches!(imm & 3, 1 | 2) != (imm & 0x10 != 0);
        let order = if unordered && !signals {
            self.nan(&[a, b]);
            None
        } else {
            self.ordered(a, b)
        };
        let swap = imm & 8 != 0;
        let (less, equal) = (order == Some(Ordering::Less), order == Some(Ordering::Equal));
        let base = match imm & 3 {
            0 => equal || swap && unordered,
            1 => less || swap && unordered,
            2 => less || equal || swap && unordered,
            _ => unordered && !swap,
        };
        F::all_ones(base != (imm & 4 != 0))
    }

    /// ZF, PF and CF of a comparison; `quiet` ones are invalid only for signaling NaNs.
    fn compare_flags<F: Float>(&self, quiet: bool, a: F, b: F) -> u128 {
        if quiet && self.nan(&[a, b]).is_some() {
            return 0x45;
        }
        match self.ordered(a, b) {
            None => 0x45,
            Some(Ordering::Less) => 1,
            Some(Ordering::Equal) => 0x40,
            Some(Ordering::Greater) => 0,
        }
    }

    /// `a * b + c`; the first NaN in this order comes out.
    fn fused<F: Float>(&self, a: F, b: F, c: F) -> F {
        if let Some(nan) = self.nan(&[a, b, c]) {
            return nan;
        }
        let ((x, dx), (y, dy), (z, dz)) = (self.operand(a), self.operand(b), self.operand(c));
        let Some(r) = x.times(y).and_then(|p| p.plus(z, self.round)) else { return self.invalid() };
        self.raise(dx | dy | dz);
        self.rounded(r)
    }

    /// The reciprocal, or that of the square root: no flags, the default rounding, denormals are zero.
    fn reciprocal<F: Float>(root: bool, a: F) -> F {
        let quiet = Unit { round: Round::Nearest, daz: true, ftz: true, flags: Cell::new(0) };
        let one = Number::integer(1);
        let x = if root && !a.is_nan() { quiet.sqrt(a) } else { a };
        if x.is_nan() {
            return x.quiet();
        }
        one.over(quiet.operand(x).0).map_or(x, |r| quiet.rounded(r))
    }

    /// To a signed integer of 32 or 64 bits; the integer indefinite value when it does not fit.
    fn to_int<F: Float>(&self, a: F, bits: u32, truncate: bool) -> u64 {
        let mask = u64::MAX >> (64 - bits);
        let indefinite = 1 << (bits - 1);
        let mode = if truncate { Round::Zero } else { self.round };
        let n = if a.is_nan() { None } else { self.operand(a).0.to_integer(mode) };
        match n {
            Some((v, inexact)) if v >= -(1 << (bits - 1)) && v < 1 << (bits - 1) => {
                self.raise(if inexact { flag::PE } else { 0 });
                v as u64 & mask
            }
            _ => {
                self.raise(flag::IE);
                indefinite
            }
        }
    }

    fn int<F: Float>(&self, v: i64) -> F {
        self.rounded(Number::integer(v.into()))
    }

    fn narrow(&self, a: u64) -> u32 {
        if let Some(nan) = self.nan(&[a]) {
            return (nan >> 32 & 0x8000_0000) as u32 | 0x7fc0_0000 | (nan >> 29 & 0x3f_ffff) as u32;
        }
        let (x, denormal) = self.operand(a);
        self.raise(denormal);
        self.rounded(x)
    }

    fn wide(&self, a: u32) -> u64 {
        if let Some(nan) = self.nan(&[a]) {
            return u64::from(nan & 0x8000_0000) << 32 | 0x7ff8_0000_0000_0000 | u64::from(nan & 0x3f_ffff) << 29;
        }
        let (x, denormal) = self.operand(a);
        self.raise(denormal);
        x.to_bits(DOUBLE, 64)
    }

    /// A half-precision number as a single; denormal ones are nothing special.
    fn half_to_single(&self, h: u16) -> u32 {
        let (sign, fraction) = (u32::from(h & 0x8000) << 16, u32::from(h & 0x3ff));
        if h & 0x7c00 == 0x7c00 && fraction != 0 {
            if fraction & 0x200 == 0 {
                self.raise(flag::IE);
            }
            return sign | 0x7fc0_0000 | fraction << 13;
        }
        Number::from_bits(h.into(), HALF, 16).0.to_bits(SINGLE, 32) as u32
    }

    /// A single as a half-precision number; FTZ has no say.
    fn single_to_half(&self, x: u32, imm: u8) -> u16 {
        if let Some(nan) = self.nan(&[x]) {
            return (nan >> 16 & 0x8000) as u16 | 0x7e00 | (nan >> 13) as u16 & 0x3ff;
        }
        let mode = if imm & 4 != 0 { self.round } else { Round::new(imm.into()) };
        let (n, denormal) = self.operand(x);
        self.raise(denormal);
        let mut ctx = Context::new(mode, false);
        let n = n.round(HALF, &mut ctx);
        self.raise(ctx.flags);
        n.to_bits(HALF, 16) as u16
    }
}

/// `fused` in the first `n` lanes, the rest from `a`; `minus` negates the product, `subtract(i)` the addend of lane `i`.
fn fused_lanes<F: Float>(
    u: &Unit,
    n: usize,
    minus: bool,
    subtract: impl Fn(usize) -> bool,
    a: u128,
    b: u128,
    c: u128,
) -> u128 {
    let (x, y, z) = (F::split(a), F::split(b), F::split(c));
    // Only numbers change sign, so that NaNs keep theirs.
    let signed = |v: F, on: bool| if on && !v.is_nan() { v.negate() } else { v };
    make(|i| {
        let (x, y, z) = (x.as_ref()[i], y.as_ref()[i], z.as_ref()[i]);
        if i < n { u.fused(signed(x, minus), y, signed(z, subtract(i))) } else { x }
    })
}

fn fma(u: &Unit, op: VecOp, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let ps = |n, minus, sub| fused_lanes::<u32>(u, n, minus, |_| sub, a, b, c);
    let pd = |n, minus, sub| fused_lanes::<u64>(u, n, minus, |_| sub, a, b, c);
    match op {
        Fmaddps => ps(4, false, false),
        Fmsubps => ps(4, false, true),
        Fnmaddps => ps(4, true, false),
        Fnmsubps => ps(4, true, true),
        Fmaddss => ps(1, false, false),
        Fmsubss => ps(1, false, true),
        Fnmaddss => ps(1, true, false),
        Fnmsubss => ps(1, true, true),
        Fmaddpd => pd(2, false, false),
        Fmsubpd => pd(2, false, true),
        Fnmaddpd => pd(2, true, false),
        Fnmsubpd => pd(2, true, true),
        Fmaddsd => pd(1, false, false),
        Fmsubsd => pd(1, false, true),
        Fnmaddsd => pd(1, true, false),
        Fnmsubsd => pd(1, true, true),
        Fmaddsubps => fused_lanes::<u32>(u, 4, false, |i| i % 2 == 0, a, b, c),
        Fmaddsubpd => fused_lanes::<u64>(u, 2, false, |i| i % 2 == 0, a, b, c),
        Fmsubaddps => fused_lanes::<u32>(u, 4, false, |i| i % 2 != 0, a, b, c),
        Fmsubaddpd => fused_lanes::<u64>(u, 2, false, |i| i % 2 != 0, a, b, c),
        _ => unreachable!("{op:?} is not a floating-point op"),
    }
}

/// The low lane from `low`, the rest from `a`.
fn scalar<F: Float>(a: u128, b: u128, f: impl Fn(F, F) -> F) -> u128 {
    let mut x = F::split(a);
    let r = f(x.as_ref()[0], F::split(b).as_ref()[0]);
    x.as_mut()[0] = r;
    F::join(x)
}

fn horizontal<F: Float>(u: &Unit, op: Arith, a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    let (x, y) = (x.as_ref(), y.as_ref());
    let h = x.len() / 2;
    make(|i| {
        let (v, k) = if i < h { (x, i) } else { (y, i - h) };
        u.arith(op, v[2 * k], v[2 * k + 1])
    })
}

fn add_sub<F: Float>(u: &Unit, a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    make(|i| u.arith(if i % 2 == 0 { Arith::Sub } else { Arith::Add }, x.as_ref()[i], y.as_ref()[i]))
}

fn dot<F: Float>(u: &Unit, imm: u8, a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    let n = x.as_ref().len();
    let product = |i: usize| {
        if imm >> (4 + i) & 1 != 0 { u.arith(Arith::Mul, x.as_ref()[i], y.as_ref()[i]) } else { F::default() }
    };
    let mut sum = u.arith(Arith::Add, product(0), product(1));
    if n == 4 {
        sum = u.arith(Arith::Add, sum, u.arith(Arith::Add, product(2), product(3)));
    }
    make(|i| if imm >> i & 1 != 0 { sum } else { F::default() })
}

/// Computes an op under an MXCSR; also the flags it raises.
pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128, mxcsr: u32) -> (u128, u32) {
    let unit = Unit::new(mxcsr);
    let r = compute(&unit, op, imm, a, b, c);
    (r, unit.flags.get())
}

fn compute(u: &Unit, op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    match op {
        Addps => zip::<u32>(a, b, |x, y| u.arith(Arith::Add, x, y)),
        Addpd => zip::<u64>(a, b, |x, y| u.arith(Arith::Add, x, y)),
        Addss => scalar::<u32>(a, b, |x, y| u.arith(Arith::Add, x, y)),
        Addsd => scalar::<u64>(a, b, |x, y| u.arith(Arith::Add, x, y)),
        Subps => zip::<u32>(a, b, |x, y| u.arith(Arith::Sub, x, y)),
        Subpd => zip::<u64>(a, b, |x, y| u.arith(Arith::Sub, x, y)),
        Subss => scalar::<u32>(a, b, |x, y| u.arith(Arith::Sub, x, y)),
        Subsd => scalar::<u64>(a, b, |x, y| u.arith(Arith::Sub, x, y)),
        Mulps => zip::<u32>(a, b, |x, y| u.arith(Arith::Mul, x, y)),
        Mulpd => zip::<u64>(a, b, |x, y| u.arith(Arith::Mul, x, y)),
        Mulss => scalar::<u32>(a, b, |x, y| u.arith(Arith::Mul, x, y)),
        Mulsd => scalar::<u64>(a, b, |x, y| u.arith(Arith::Mul, x, y)),
        Divps => zip::<u32>(a, b, |x, y| u.arith(Arith::Div, x, y)),
        Divpd => zip::<u64>(a, b, |x, y| u.arith(Arith::Div, x, y)),
        Divss => scalar::<u32>(a, b, |x, y| u.arith(Arith::Div, x, y)),
        Divsd => scalar::<u64>(a, b, |x, y| u.arith(Arith::Div, x, y)),
        Minps => zip::<u32>(a, b, |x, y| u.pick(Ordering::Less, x, y)),
        Minpd => zip::<u64>(a, b, |x, y| u.pick(Ordering::Less, x, y)),
        Minss => scalar::<u32>(a, b, |x, y| u.pick(Ordering::Less, x, y)),
        Minsd => scalar::<u64>(a, b, |x, y| u.pick(Ordering::Less, x, y)),
        Maxps => zip::<u32>(a, b, |x, y| u.pick(Ordering::Greater, x, y)),
        Maxpd => zip::<u64>(a, b, |x, y| u.pick(Ordering::Greater, x, y)),
        Maxss => scalar::<u32>(a, b, |x, y| u.pick(Ordering::Greater, x, y)),
        Maxsd => scalar::<u64>(a, b, |x, y| u.pick(Ordering::Greater, x, y)),
        Sqrtps => zip::<u32>(a, a, |x, _| u.sqrt(x)),
        Sqrtpd => zip::<u64>(a, a, |x, _| u.sqrt(x)),
        Sqrtss => scalar::<u32>(a, b, |_, y| u.sqrt(y)),
        Sqrtsd => scalar::<u64>(a, b, |_, y| u.sqrt(y)),
        Rcpps => zip::<u32>(a, a, |x, _| Unit::reciprocal(false, x)),
        Rcpss => scalar::<u32>(a, b, |_, y| Unit::reciprocal(false, y)),
        Rsqrtps => zip::<u32>(a, a, |x, _| Unit::reciprocal(true, x)),
        Rsqrtss => scalar::<u32>(a, b, |_, y| Unit::reciprocal(true, y)),
        Addsubps => add_sub::<u32>(u, a, b),
        Addsubpd => add_sub::<u64>(u, a, b),
        Haddps => horizontal::<u32>(u, Arith::Add, a, b),
        Haddpd => horizontal::<u64>(u, Arith::Add, a, b),
        Hsubps => horizontal::<u32>(u, Arith::Sub, a, b),
        Hsubpd => horizontal::<u64>(u, Arith::Sub, a, b),
        Cmpps => zip::<u32>(a, b, |x, y| u.compare(imm, x, y)),
        Cmppd => zip::<u64>(a, b, |x, y| u.compare(imm, x, y)),
        Cmpss => scalar::<u32>(a, b, |x, y| u.compare(imm, x, y)),
        Cmpsd => scalar::<u64>(a, b, |x, y| u.compare(imm, x, y)),
        Comiss | Ucomiss => u.compare_flags(op == Ucomiss, a as u32, b as u32),
        Comisd | Ucomisd => u.compare_flags(op == Ucomisd, a as u64, b as u64),
        Roundps => zip::<u32>(a, a, |x, _| u.round(imm, x)),
        Roundpd => zip::<u64>(a, a, |x, _| u.round(imm, x)),
        Roundss => scalar::<u32>(a, b, |_, y| u.round(imm, y)),
        Roundsd => scalar::<u64>(a, b, |_, y| u.round(imm, y)),
        Dpps => dot::<u32>(u, imm, a, b),
        Dppd => dot::<u64>(u, imm, a, b),
        Cvtph2ps => {
            let h = u16::split(a);
            make(|i| u.half_to_single(h[i]))
        }
        Cvtps2ph => {
            let s = u32::split(a);
            make(|i| if i < 4 { u.single_to_half(s[i], imm) } else { 0 })
        }
        _ => convert(u, op, a, b, c),
    }
}

fn convert(u: &Unit, op: VecOp, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let (s, d) = (u32::split(a), u64::split(a));
    let low = |x: u128, lane: u128| x & !u128::from(u64::MAX) | lane;
    match op {
        Cvtdq2ps => make(|i| u.int::<u32>((s[i] as i32).into())),
        Cvtdq2pd => make(|i| u.int::<u64>((s[i] as i32).into())),
        Cvtps2dq => make(|i| u.to_int(s[i], 32, false) as u32),
        Cvttps2dq => make(|i| u.to_int(s[i], 32, true) as u32),
        Cvtpd2dq => make(|i| if i < 2 { u.to_int(d[i], 32, false) as u32 } else { 0 }),
        Cvttpd2dq => make(|i| if i < 2 { u.to_int(d[i], 32, true) as u32 } else { 0 }),
        Cvtpd2ps => make(|i| if i < 2 { u.narrow(d[i]) } else { 0 }),
        Cvtps2pd => make(|i| u.wide(s[i])),
        Cvtss2sd => low(a, u.wide(b as u32).into()),
        Cvtsd2ss => a & !0xffff_ffff | u128::from(u.narrow(b as u64)),
        Cvtsi2ss32 => a & !0xffff_ffff | u128::from(u.int::<u32>((b as i32).into())),
        Cvtsi2ss64 => a & !0xffff_ffff | u128::from(u.int::<u32>(b as i64)),
        Cvtsi2sd32 => low(a, u.int::<u64>((b as i32).into()).into()),
        Cvtsi2sd64 => low(a, u.int::<u64>(b as i64).into()),
        Cvtss2si32 => u.to_int(s[0], 32, false).into(),
        Cvtss2si64 => u.to_int(s[0], 64, false).into(),
        Cvttss2si32 => u.to_int(s[0], 32, true).into(),
        Cvttss2si64 => u.to_int(s[0], 64, true).into(),
        Cvtsd2si32 => u.to_int(d[0], 32, false).into(),
        Cvtsd2si64 => u.to_int(d[0], 64, false).into(),
        Cvttsd2si32 => u.to_int(d[0], 32, true).into(),
        Cvttsd2si64 => u.to_int(d[0], 64, true).into(),
        _ => fma(u, op, a, b, c),
    }
}

#[cfg(all(test, target_arch = "x86_64", not(portable_host)))]
mod tests {
    use super::*;
    use crate::vecop::{Group, host};

    const EDGES: [u64; 20] = [
        0,
        0x8000_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_1234_0000,
        0x7ff0_0000_0000_0001,
        0x3ff0_0000_0000_0000,
        0x41df_ffff_ffc0_0000,
        0x0000_0000_0000_0001,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x7f80_0001_ff80_0000,
        0x3f80_0000_7fc0_0001,
        0x4004_0000_4020_0000,
        0x0080_0000_0000_0001,
        0x807f_ffff_7f7f_ffff,
        0x3f80_0001_3f7f_ffff,
        0x36a0_0000_0000_0000,
        0x4f00_0000_cf00_0000,
    ];

    /// Numbers whose exponents are near one another or near the formats' ends, so that results round, overflow and vanish.
    fn operand(r: u128) -> u128 {
        let lane64 = |r: u64, how: u64| match how % 6 {
            0 => EDGES[(r >> 32) as usize % EDGES.len()],
            1 => r & 0x800f_ffff_ffff_ffff | (1020 + (r >> 52) % 8) << 52,
            2 => r & 0x800f_ffff_ffff_ffff | ((r >> 52) % 70) << 52,
            3 => r & 0x807f_ffff_807f_ffff | (120 + (r >> 24) % 8) << 23 | (120 + (r >> 56) % 8) << 55,
            4 => r & 0x807f_ffff_807f_ffff | ((r >> 24) % 40) << 23 | ((r >> 56) % 40) << 55,
            _ => r,
        };
        let how = (r >> 13) as u64;
        u128::from(lane64(r as u64, how)) | u128::from(lane64((r >> 64) as u64, how / 6)) << 64
    }

    /// Results and flags against the host's instructions, under every rounding, with DAZ and FTZ; approximations aside.
    #[test]
    fn portable_matches_host() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835u128;
        let mut next = || {
            seed = seed
                .wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645)
                .wrapping_add(0x5851_f42d_4c95_7f2d_1405_7b7e_f767_814f);
            seed ^ seed >> 61
        };
        let (mut compared, mut wrong) = (0, Vec::new());
        for op in VecOp::ALL.iter().copied().filter(|&o| VecOp::TABLE[o as usize].2 == Group::Fp) {
            if matches!(op, VecOp::Rcpps | VecOp::Rcpss | VecOp::Rsqrtps | VecOp::Rsqrtss) {
                continue;
            }
            let before = wrong.len();
            for i in 0..6000usize {
                let r = next();
                let (a, b, c) = (operand(next()), operand(next()), operand(next()));
                // Rounding; DAZ and FTZ now and then.
                let mxcsr = 0x1f80 | (r & 0x6000) as u32 | if r >> 20 & 3 == 0 { r as u32 & 0x8040 } else { 0 };
                let saved = host::mxcsr();
                host::set_mxcsr(mxcsr);
                let expected = host::fp(op, i as u8, a, b, c);
                let flags = host::mxcsr() & 0x3f;
                host::set_mxcsr(saved);
                let Some(expected) = expected else { continue };
                compared += 1;
                let ours = eval(op, i as u8, a, b, c, mxcsr);
                if ours != (expected, flags) && wrong.len() - before < 3 {
                    wrong.push(format!(
                        "{op:?} {i} mxcsr {mxcsr:x} {a:032x} {b:032x} {c:032x}: {expected:032x} {flags:x}, ours {:032x} {:x}",
                        ours.0, ours.1
                    ));
                }
            }
        }
        println!("floating point: {compared} results compared with the host");
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
