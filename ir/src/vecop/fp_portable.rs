//! Floating-point vector ops without the host's help: x86's rules for NaNs, minima and invalid conversions.
//!
//! For hosts that are not x86-64 (or lack SSE4.1). Deviation: rounds to nearest even always, does not flush or ignore
//! denormals and sets no MXCSR flags.

use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make, zip};

/// What the ops need of f32 and f64, on their bits.
trait Float: Lane + PartialEq {
    /// The default ("real indefinite") NaN.
    const INDEFINITE: Self;
    fn is_nan(self) -> bool;
    fn quiet(self) -> Self;
    fn less(self, o: Self) -> bool;
    fn equal(self, o: Self) -> bool;
    fn raw(self, op: Arith, o: Self) -> Self;
    fn negate(self) -> Self;
    fn fused(self, b: Self, c: Self) -> Self;
    fn sqrt(self) -> Self;
    fn round(self, mode: u8) -> Self;
    fn to_f64(self) -> f64;
    fn from_f64(v: f64) -> Self;
    fn all_ones(on: bool) -> Self;
}

#[derive(Clone, Copy)]
enum Arith {
    Add,
    Sub,
    Mul,
    Div,
}

macro_rules! float {
    ($bits:ty, $f:ty, $quiet:literal, $indefinite:literal) => {
        impl Float for $bits {
            const INDEFINITE: Self = $indefinite;
            fn is_nan(self) -> bool {
                <$f>::from_bits(self).is_nan()
            }
            fn quiet(self) -> Self {
                self | $quiet
            }
            fn less(self, o: Self) -> bool {
                <$f>::from_bits(self) < <$f>::from_bits(o)
            }
            fn equal(self, o: Self) -> bool {
                <$f>::from_bits(self) == <$f>::from_bits(o)
            }
            fn raw(self, op: Arith, o: Self) -> Self {
                let (x, y) = (<$f>::from_bits(self), <$f>::from_bits(o));
                let r = match op {
                    Arith::Add => x + y,
                    Arith::Sub => x - y,
                    Arith::Mul => x * y,
                    Arith::Div => x / y,
                };
                r.to_bits()
            }
            fn negate(self) -> Self {
                self ^ !(Self::MAX >> 1)
            }
            fn fused(self, b: Self, c: Self) -> Self {
                <$f>::from_bits(self).mul_add(<$f>::from_bits(b), <$f>::from_bits(c)).to_bits()
            }
            fn sqrt(self) -> Self {
                <$f>::from_bits(self).sqrt().to_bits()
            }
            fn round(self, mode: u8) -> Self {
                let x = <$f>::from_bits(self);
                let r = match mode {
                    1 => x.floor(),
                    2 => x.ceil(),
                    3 => x.trunc(),
                    _ => x.round_ties_even(),
                };
                r.to_bits()
            }
            fn to_f64(self) -> f64 {
                f64::from(<$f>::from_bits(self))
            }
            fn from_f64(v: f64) -> Self {
                (v as $f).to_bits()
            }
            fn all_ones(on: bool) -> Self {
                if on { !0 } else { 0 }
            }
        }
    };
}
float!(u32, f32, 0x0040_0000, 0xffc0_0000);
float!(u64, f64, 0x0008_0000_0000_0000, 0xfff8_0000_0000_0000);

fn arith<F: Float>(op: Arith, a: F, b: F) -> F {
    if a.is_nan() {
        return a.quiet();
    }
    if b.is_nan() {
        return b.quiet();
    }
    let r = a.raw(op, b);
    if r.is_nan() { F::INDEFINITE } else { r }
}

/// The second operand unless the first is strictly less: so for NaNs and for zeroes of either sign.
fn min<F: Float>(a: F, b: F) -> F {
    if a.less(b) { a } else { b }
}

fn max<F: Float>(a: F, b: F) -> F {
    if b.less(a) { a } else { b }
}

fn sqrt<F: Float>(a: F) -> F {
    if a.is_nan() {
        return a.quiet();
    }
    let r = a.sqrt();
    if r.is_nan() { F::INDEFINITE } else { r }
}

fn round<F: Float>(imm: u8, a: F) -> F {
    let mode = if imm & 4 != 0 { 0 } else { imm & 3 };
    if a.is_nan() { a.quiet() } else { a.round(mode) }
}

/// The predicates: four comparisons, those with unordered counted the other way (bit 3), each negated (bit 2). Bit 4 says
/// which of them signal.
fn compare<F: Float>(imm: u8, a: F, b: F) -> F {
    let unordered = a.is_nan() || b.is_nan();
    let swap = imm & 8 != 0;
    let base = match imm & 3 {
        0 => a.equal(b) || swap && unordered,
        1 => a.less(b) || swap && unordered,
        2 => a.less(b) || a.equal(b) || swap && unordered,
        _ => unordered && !swap,
    };
    F::all_ones(base != (imm & 4 != 0))
}

/// `a * b + c`; the first NaN in this order comes out.
fn fused<F: Float>(a: F, b: F, c: F) -> F {
    if let Some(nan) = [a, b, c].into_iter().find(|x| x.is_nan()) {
        return nan.quiet();
    }
    let r = a.fused(b, c);
    if r.is_nan() { F::INDEFINITE } else { r }
}

/// [`fused`] in the first `n` lanes, the rest from `a`; `minus` negates the product, `subtract(i)` the addend of lane `i`.
fn fused_lanes<F: Float>(n: usize, minus: bool, subtract: impl Fn(usize) -> bool, a: u128, b: u128, c: u128) -> u128 {
    let (x, y, z) = (F::split(a), F::split(b), F::split(c));
    // Only numbers change sign, so that NaNs keep theirs.
    let signed = |v: F, on: bool| if on && !v.is_nan() { v.negate() } else { v };
    make(|i| {
        let (x, y, z) = (x.as_ref()[i], y.as_ref()[i], z.as_ref()[i]);
        if i < n { fused(signed(x, minus), y, signed(z, subtract(i))) } else { x }
    })
}

fn fma(op: VecOp, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let ps = |n, minus, sub| fused_lanes::<u32>(n, minus, |_| sub, a, b, c);
    let pd = |n, minus, sub| fused_lanes::<u64>(n, minus, |_| sub, a, b, c);
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
        Fmaddsubps => fused_lanes::<u32>(4, false, |i| i % 2 == 0, a, b, c),
        Fmaddsubpd => fused_lanes::<u64>(2, false, |i| i % 2 == 0, a, b, c),
        Fmsubaddps => fused_lanes::<u32>(4, false, |i| i % 2 != 0, a, b, c),
        Fmsubaddpd => fused_lanes::<u64>(2, false, |i| i % 2 != 0, a, b, c),
        _ => unreachable!("{op:?} is not a floating-point op"),
    }
}

/// A half-precision number as a single.
fn half_to_single(h: u16) -> u32 {
    let (sign, exponent, fraction) = (u32::from(h & 0x8000) << 16, h >> 10 & 31, u32::from(h & 0x3ff));
    match exponent {
        31 if fraction != 0 => sign | 0x7fc0_0000 | fraction << 13,
        31 => sign | 0x7f80_0000,
        // Exact: ten bits times 2^-24.
        0 => sign | (fraction as f32 * f32::from_bits(103 << 23)).to_bits(),
        e => sign | (u32::from(e) + 112) << 23 | fraction << 13,
    }
}

/// A single as a half-precision number, by a rounding mode as in MXCSR.
fn single_to_half(x: u32, mode: u8) -> u16 {
    let (negative, magnitude) = (x >> 31 != 0, x & 0x7fff_ffff);
    let sign = (x >> 16 & 0x8000) as u16;
    if magnitude >= 0x7f80_0000 {
        let nan = magnitude > 0x7f80_0000;
        return sign | 0x7c00 | if nan { 0x200 | (magnitude >> 13) as u16 & 0x3ff } else { 0 };
    }
    let exponent = (magnitude >> 23) as i32 - 127;
    let fraction = u64::from(magnitude & 0x7f_ffff) | if magnitude >> 23 != 0 { 1 << 23 } else { 0 };
    // Bits of the fraction below the last that the result has.
    let drop = if exponent >= -14 { 13 } else { (-1 - exponent).min(40) };
    let (whole, rest, tie) = (fraction >> drop, fraction & ((1 << drop) - 1), 1u64 << (drop - 1));
    let up = match mode & 3 {
        0 => rest > tie || rest == tie && whole & 1 != 0,
        1 => negative && rest != 0,
        2 => !negative && rest != 0,
        _ => false,
    };
    let rounded = whole + u64::from(up) + ((exponent.max(-15) + 14).max(0) as u64) * 0x400;
    if rounded < 0x7c00 {
        return sign | rounded as u16;
    }
    let to_infinity = matches!((mode & 3, negative), (0, _) | (1, true) | (2, false));
    sign | if to_infinity { 0x7c00 } else { 0x7bff }
}

fn flags<F: Float>(a: F, b: F) -> u128 {
    if a.is_nan() || b.is_nan() {
        0x45
    } else if a.less(b) {
        1
    } else if a.equal(b) {
        0x40
    } else {
        0
    }
}

/// The low lane from `low`, the rest from `a`.
fn scalar<F: Float>(a: u128, b: u128, f: impl Fn(F, F) -> F) -> u128 {
    let mut x = F::split(a);
    let r = f(x.as_ref()[0], F::split(b).as_ref()[0]);
    x.as_mut()[0] = r;
    F::join(x)
}

fn horizontal<F: Float>(op: Arith, a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    let (x, y) = (x.as_ref(), y.as_ref());
    let h = x.len() / 2;
    make(|i| {
        let (v, k) = if i < h { (x, i) } else { (y, i - h) };
        arith(op, v[2 * k], v[2 * k + 1])
    })
}

fn add_sub<F: Float>(a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    make(|i| arith(if i % 2 == 0 { Arith::Sub } else { Arith::Add }, x.as_ref()[i], y.as_ref()[i]))
}

fn dot<F: Float>(imm: u8, a: u128, b: u128) -> u128 {
    let (x, y) = (F::split(a), F::split(b));
    let n = x.as_ref().len();
    let product = |i: usize| {
        if imm >> (4 + i) & 1 != 0 { arith(Arith::Mul, x.as_ref()[i], y.as_ref()[i]) } else { F::default() }
    };
    let mut sum = arith(Arith::Add, product(0), product(1));
    if n == 4 {
        sum = arith(Arith::Add, sum, arith(Arith::Add, product(2), product(3)));
    }
    make(|i| if imm >> i & 1 != 0 { sum } else { F::default() })
}

/// To a signed integer of 32 or 64 bits; the integer indefinite value when it does not fit.
fn to_int(v: f64, bits: u32, truncate: bool) -> u64 {
    let r = if truncate { v.trunc() } else { v.round_ties_even() };
    let limit = if bits == 32 { 2_147_483_648.0 } else { 9_223_372_036_854_775_808.0 };
    let n = if r >= -limit && r < limit { r as i64 } else { i64::MIN >> (64 - bits) };
    n as u64 & (u64::MAX >> (64 - bits))
}

fn narrow(a: u64) -> u32 {
    if a.is_nan() {
        (a >> 32 & 0x8000_0000) as u32 | 0x7fc0_0000 | (a >> 29 & 0x3f_ffff) as u32
    } else {
        u32::from_f64(a.to_f64())
    }
}

fn wide(a: u32) -> u64 {
    if a.is_nan() {
        u64::from(a & 0x8000_0000) << 32 | 0x7ff8_0000_0000_0000 | u64::from(a & 0x3f_ffff) << 29
    } else {
        a.to_f64().to_bits()
    }
}

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    match op {
        Addps => zip::<u32>(a, b, |x, y| arith(Arith::Add, x, y)),
        Addpd => zip::<u64>(a, b, |x, y| arith(Arith::Add, x, y)),
        Addss => scalar::<u32>(a, b, |x, y| arith(Arith::Add, x, y)),
        Addsd => scalar::<u64>(a, b, |x, y| arith(Arith::Add, x, y)),
        Subps => zip::<u32>(a, b, |x, y| arith(Arith::Sub, x, y)),
        Subpd => zip::<u64>(a, b, |x, y| arith(Arith::Sub, x, y)),
        Subss => scalar::<u32>(a, b, |x, y| arith(Arith::Sub, x, y)),
        Subsd => scalar::<u64>(a, b, |x, y| arith(Arith::Sub, x, y)),
        Mulps => zip::<u32>(a, b, |x, y| arith(Arith::Mul, x, y)),
        Mulpd => zip::<u64>(a, b, |x, y| arith(Arith::Mul, x, y)),
        Mulss => scalar::<u32>(a, b, |x, y| arith(Arith::Mul, x, y)),
        Mulsd => scalar::<u64>(a, b, |x, y| arith(Arith::Mul, x, y)),
        Divps => zip::<u32>(a, b, |x, y| arith(Arith::Div, x, y)),
        Divpd => zip::<u64>(a, b, |x, y| arith(Arith::Div, x, y)),
        Divss => scalar::<u32>(a, b, |x, y| arith(Arith::Div, x, y)),
        Divsd => scalar::<u64>(a, b, |x, y| arith(Arith::Div, x, y)),
        Minps => zip::<u32>(a, b, min),
        Minpd => zip::<u64>(a, b, min),
        Minss => scalar::<u32>(a, b, min),
        Minsd => scalar::<u64>(a, b, min),
        Maxps => zip::<u32>(a, b, max),
        Maxpd => zip::<u64>(a, b, max),
        Maxss => scalar::<u32>(a, b, max),
        Maxsd => scalar::<u64>(a, b, max),
        Sqrtps => zip::<u32>(a, a, |x, _| sqrt(x)),
        Sqrtpd => zip::<u64>(a, a, |x, _| sqrt(x)),
        Sqrtss => scalar::<u32>(a, b, |_, y| sqrt(y)),
        Sqrtsd => scalar::<u64>(a, b, |_, y| sqrt(y)),
        Rcpps => zip::<u32>(a, a, |x, _| arith(Arith::Div, 1f32.to_bits(), x)),
        Rcpss => scalar::<u32>(a, b, |_, y| arith(Arith::Div, 1f32.to_bits(), y)),
        Rsqrtps => zip::<u32>(a, a, |x, _| arith(Arith::Div, 1f32.to_bits(), sqrt(x))),
        Rsqrtss => scalar::<u32>(a, b, |_, y| arith(Arith::Div, 1f32.to_bits(), sqrt(y))),
        Addsubps => add_sub::<u32>(a, b),
        Addsubpd => add_sub::<u64>(a, b),
        Haddps => horizontal::<u32>(Arith::Add, a, b),
        Haddpd => horizontal::<u64>(Arith::Add, a, b),
        Hsubps => horizontal::<u32>(Arith::Sub, a, b),
        Hsubpd => horizontal::<u64>(Arith::Sub, a, b),
        Cmpps => zip::<u32>(a, b, |x, y| compare(imm, x, y)),
        Cmppd => zip::<u64>(a, b, |x, y| compare(imm, x, y)),
        Cmpss => scalar::<u32>(a, b, |x, y| compare(imm, x, y)),
        Cmpsd => scalar::<u64>(a, b, |x, y| compare(imm, x, y)),
        Comiss | Ucomiss => flags(a as u32, b as u32),
        Comisd | Ucomisd => flags(a as u64, b as u64),
        Roundps => zip::<u32>(a, a, |x, _| round(imm, x)),
        Roundpd => zip::<u64>(a, a, |x, _| round(imm, x)),
        Roundss => scalar::<u32>(a, b, |_, y| round(imm, y)),
        Roundsd => scalar::<u64>(a, b, |_, y| round(imm, y)),
        Dpps => dot::<u32>(imm, a, b),
        Dppd => dot::<u64>(imm, a, b),
        Cvtph2ps => {
            let h = u16::split(a);
            make(|i| half_to_single(h[i]))
        }
        Cvtps2ph => {
            let (s, mode) = (u32::split(a), if imm & 4 != 0 { 0 } else { imm });
            make(|i| if i < 4 { single_to_half(s[i], mode) } else { 0 })
        }
        _ => convert(op, a, b, c),
    }
}

fn convert(op: VecOp, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let (s, d) = (u32::split(a), u64::split(a));
    let low = |x: u128, lane: u128| x & !u128::from(u64::MAX) | lane;
    match op {
        Cvtdq2ps => make(|i| (s[i] as i32 as f32).to_bits()),
        Cvtdq2pd => make(|i| f64::from(s[i] as i32).to_bits()),
        Cvtps2dq => make(|i| to_int(s[i].to_f64(), 32, false) as u32),
        Cvttps2dq => make(|i| to_int(s[i].to_f64(), 32, true) as u32),
        Cvtpd2dq => make(|i| if i < 2 { to_int(d[i].to_f64(), 32, false) as u32 } else { 0 }),
        Cvttpd2dq => make(|i| if i < 2 { to_int(d[i].to_f64(), 32, true) as u32 } else { 0 }),
        Cvtpd2ps => make(|i| if i < 2 { narrow(d[i]) } else { 0 }),
        Cvtps2pd => make(|i| wide(s[i])),
        Cvtss2sd => low(a, wide(b as u32).into()),
        Cvtsd2ss => a & !0xffff_ffff | u128::from(narrow(b as u64)),
        Cvtsi2ss32 => a & !0xffff_ffff | u128::from((b as i32 as f32).to_bits()),
        Cvtsi2ss64 => a & !0xffff_ffff | u128::from((b as i64 as f32).to_bits()),
        Cvtsi2sd32 => low(a, f64::from(b as i32).to_bits().into()),
        Cvtsi2sd64 => low(a, (b as i64 as f64).to_bits().into()),
        Cvtss2si32 => to_int(s[0].to_f64(), 32, false).into(),
        Cvtss2si64 => to_int(s[0].to_f64(), 64, false).into(),
        Cvttss2si32 => to_int(s[0].to_f64(), 32, true).into(),
        Cvttss2si64 => to_int(s[0].to_f64(), 64, true).into(),
        Cvtsd2si32 => to_int(d[0].to_f64(), 32, false).into(),
        Cvtsd2si64 => to_int(d[0].to_f64(), 64, false).into(),
        Cvttsd2si32 => to_int(d[0].to_f64(), 32, true).into(),
        Cvttsd2si64 => to_int(d[0].to_f64(), 64, true).into(),
        _ => fma(op, a, b, c),
    }
}

#[cfg(all(test, target_arch = "x86_64", not(portable_host)))]
mod tests {
    use super::*;
    use crate::vecop::{Group, host};

    /// Results against the host's instructions under the reset MXCSR; approximations and flags aside.
    #[test]
    fn portable_matches_host() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835u128;
        let mut next = || {
            seed = seed
                .wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645)
                .wrapping_add(0x5851_f42d_4c95_7f2d_1405_7b7e_f767_814f);
            seed ^ seed >> 61
        };
        const EDGES: [u64; 12] = [
            0,
            0x8000_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_1234_0000,
            0x7ff0_0000_0000_0001,
            0x3ff0_0000_0000_0000,
            0x41df_ffff_ffc0_0000,
            0x0000_0000_0000_0001,
            0x7f80_0001_ff80_0000,
            0x3f80_0000_7fc0_0001,
            0x4004_0000_4020_0000,
        ];
        let mut compared = 0;
        for op in VecOp::ALL.iter().copied().filter(|&o| VecOp::TABLE[o as usize].2 == Group::Fp) {
            if matches!(op, VecOp::Rcpps | VecOp::Rcpss | VecOp::Rsqrtps | VecOp::Rsqrtss) {
                continue;
            }
            for i in 0..2000usize {
                let edge = |n: usize, r: u128| {
                    if n.is_multiple_of(3) {
                        u128::from(EDGES[n / 3 % 12]) | u128::from(EDGES[n / 7 % 12]) << 64
                    } else {
                        r
                    }
                };
                let (a, b, c) = (edge(i, next()), edge(i / 5, next()), edge(i / 11, next()));
                if let Some(h) = host::fp(op, i as u8, a, b, c) {
                    assert_eq!(eval(op, i as u8, a, b, c), h, "{op:?} {i} {a:x} {b:x} {c:x}");
                    compared += 1;
                }
            }
        }
        println!("floating point: {compared} results compared with the host");
    }
}
