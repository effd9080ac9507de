//! Elementary functions to more bits than the x87 has: series on numbers with 127-bit significands.
//!
//! Results are good to some 120 bits, so that they round to 64 as the exact ones do, but in one case of about 2^50.

use twofold_ir::softfloat::{Number, Round};

/// The natural logarithm of 2, its leading bit at bit 126 and worth 1/2.
const LN_2: u128 = 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af >> 1;
/// The binary logarithm of e; the leading bit is worth 1.
const LOG2_E: u128 = 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88 >> 1;
/// Pi; the leading bit is worth 2.
const PI: u128 = 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1 >> 1;
/// Half of pi as the x87 reduces its operands by: 66 bits, the leading one worth 1 (SDM Vol 1, Approximation of Pi).
const HALF_PI: u128 = 0xc90f_daa2_2168_c234 << 2 | 3;

fn constant(exponent: i32, significand: u128) -> Number {
    Number::Finite { negative: false, exponent, significand }
}

/// Pi times a power of two.
pub fn pi(scale: i32) -> Number {
    constant(1 + scale, PI)
}

pub fn plus(a: Number, b: Number) -> Number {
    a.plus(b, Round::Nearest).unwrap_or(a)
}

/// The 256-bit product of two numbers below 2^127, divided by 2^126; the last bit is sticky.
fn multiply(a: u128, b: u128) -> u128 {
    const LOW: u128 = u64::MAX as u128;
    let (a1, a0, b1, b0) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let (low, high) = (a0 * b0, a1 * b1);
    // Below 2^128: the high halves are below 2^63.
    let middle = a1 * b0 + a0 * b1;
    let (low, carry) = low.overflowing_add(middle << 64);
    let high = high + (middle >> 64) + u128::from(carry);
    (high << 2 | low >> 126) | u128::from(low << 2 != 0)
}

pub fn times(a: Number, b: Number) -> Number {
    match (a, b) {
        (
            Number::Finite { negative, exponent, significand },
            Number::Finite { negative: n, exponent: e, significand: s },
        ) => Number::new(negative != n, exponent + e - 126, multiply(significand, s)),
        _ => a.times(b).unwrap_or(a),
    }
}

pub fn over(a: Number, b: Number) -> Number {
    let (
        Number::Finite { negative, exponent, significand },
        Number::Finite { negative: n, exponent: e, significand: s },
    ) = (a, b)
    else {
        return a.over(b).unwrap_or(a);
    };
    let (mut quotient, mut rest) = (0u128, significand);
    for _ in 0..128 {
        quotient = quotient << 1 | u128::from(rest >= s);
        rest = (if rest >= s { rest - s } else { rest }) << 1;
    }
    Number::new(negative != n, exponent - e - 127, quotient | u128::from(rest != 0))
}

/// Divided by a small number.
fn part(a: Number, n: u128) -> Number {
    match a {
        // Some bits more, that the quotient loses.
        Number::Finite { negative, exponent, significand } => {
            let (whole, rest) = (significand / n, significand % n);
            let more = (rest << 16) / n;
            let lost = whole.leading_zeros().saturating_sub(1).min(16);
            Number::new(negative, exponent - 126 - lost as i32, whole << lost | more >> (16 - lost))
        }
        _ => a,
    }
}

/// Whether a term no longer counts.
fn vanishes(term: Number, sum: Number) -> bool {
    match (term, sum) {
        (Number::Finite { exponent, .. }, Number::Finite { exponent: e, .. }) => exponent < e - 130,
        _ => term.is_zero(),
    }
}

/// `t + t^3 r/3 + t^5 r^2/5 ...` with `square` being `t^2 r`.
fn odd_series(t: Number, square: Number) -> Number {
    let (mut power, mut sum) = (t, t);
    for n in 1..100 {
        power = times(power, square);
        let term = part(power, 2 * n + 1);
        if vanishes(term, sum) {
            break;
        }
        sum = plus(sum, term);
    }
    sum
}

/// `first + first * r / (n (n + 1)) + ...`, `n` going up by two.
fn even_series(first: Number, r: Number, mut n: u128) -> Number {
    let (mut term, mut sum) = (first, first);
    while !vanishes(term, sum) {
        term = part(times(term, r), n * (n + 1));
        sum = plus(sum, term);
        n += 2;
    }
    sum
}

/// `2^x - 1`, for `x` from -1 to 1.
pub fn power_less_one(x: Number) -> Number {
    let y = times(x, constant(-1, LN_2));
    let (mut term, mut sum, mut n) = (y, y, 2);
    while !vanishes(term, sum) {
        term = part(times(term, y), n);
        sum = plus(sum, term);
        n += 1;
    }
    sum
}

/// The binary logarithm of `(2 + 2t) / (2 - 2t)`, for small `t`.
fn logarithm_of_ratio(t: Number) -> Number {
    let ln = odd_series(t, times(t, t));
    // Twice that, by log2 e.
    times(ln, constant(1, LOG2_E))
}

/// The binary logarithm of a number above zero.
pub fn logarithm(x: Number) -> Number {
    let Number::Finite { exponent, significand, .. } = x else { return x };
    // Between the square roots of 1/2 and 2.
    let high = significand >> 62 > 0xb504_f333_f9de_6484;
    let m = constant(-i32::from(high), significand);
    let exponent = exponent + i32::from(high);
    let one = Number::integer(1);
    let t = over(plus(m, one.negated()), plus(m, one));
    plus(Number::integer(exponent.into()), logarithm_of_ratio(t))
}

/// The binary logarithm of `1 + x`, for `x` not far from zero.
pub fn logarithm_plus_one(x: Number) -> Number {
    logarithm_of_ratio(over(x, plus(x, Number::integer(2))))
}

/// The sine and cosine of a number below 2^63.
pub fn sine_cosine(x: Number) -> (Number, Number) {
    let (r, quadrant) = reduce(x.with_sign(false));
    let minus_square = times(r, r).negated();
    let sine = even_series(r, minus_square, 2);
    let cosine = even_series(Number::integer(1), minus_square, 1);
    let (s, c) = match quadrant & 3 {
        0 => (sine, cosine),
        1 => (cosine, sine.negated()),
        2 => (sine.negated(), cosine.negated()),
        _ => (cosine.negated(), sine),
    };
    (if x.negative() { s.negated() } else { s }, c)
}

/// A number above zero less a multiple of [`HALF_PI`], which is between -1/4 and 1/4 of pi, and the multiple.
fn reduce(x: Number) -> (Number, u64) {
    let Number::Finite { exponent, significand, .. } = x else { return (x, 0) };
    if exponent < -1 {
        return (x, 0);
    }
    // In units of 2^-65, the 64 bits of the operand first.
    let mut shift = (exponent + 2) as u32;
    let (mut rest, mut multiple) = (significand >> 63, 0u64);
    loop {
        let by = shift.min(60);
        rest <<= by;
        multiple = (multiple << by).wrapping_add((rest / HALF_PI) as u64);
        rest %= HALF_PI;
        shift -= by;
        if shift == 0 {
            break;
        }
    }
    let above = 2 * rest > HALF_PI;
    let rest = if above { HALF_PI - rest } else { rest };
    (Number::new(above, -65, rest), multiple.wrapping_add(above.into()))
}

/// The arc tangent of `y / x`, both above zero.
pub fn arc_tangent(y: Number, x: Number) -> Number {
    let steep = y.compare(x).is_gt();
    let t = if steep { over(x, y) } else { over(y, x) };
    let one = Number::integer(1);
    // Beyond the tangent of pi / 8, from pi / 4 on.
    let far = matches!(t, Number::Finite { exponent: -1.., .. })
        || matches!(t, Number::Finite { exponent: -2, significand, .. } if significand >> 120 > 0x6a);
    let t = if far { over(plus(t, one.negated()), plus(t, one)) } else { t };
    let angle = odd_series(t, times(t, t).negated());
    let angle = if far { plus(angle, pi(-2)) } else { angle };
    if steep { plus(pi(-1), angle.negated()) } else { angle }
}
