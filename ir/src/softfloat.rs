//! Binary floating point in integers: rounding, exceptions and tiny results as x86 has them, on every host.
//!
//! For hosts that are not x86-64, where the evaluator's vector ops and the x87 have no instruction to fall back on. A
//! [`Number`] is exact but for its last bit, which is sticky; [`Number::round`] brings it to a [`Format`] and collects the
//! flags in a [`Context`]. What becomes of NaNs is the callers' affair: SSE and the x87 choose differently.
//!
//! All exceptions are masked. Tininess is detected after rounding (SDM Vol 1, Numeric Underflow Exception).

/// Exception flags, as in MXCSR and the x87 status word.
pub mod flag {
    /// Invalid operation.
    pub const IE: u32 = 1;
    /// Denormal operand.
    pub const DE: u32 = 2;
    /// Division by zero.
    pub const ZE: u32 = 4;
    /// Overflow.
    pub const OE: u32 = 8;
    /// Underflow.
    pub const UE: u32 = 16;
    /// Inexact result.
    pub const PE: u32 = 32;
}

/// A rounding mode, numbered as in MXCSR and the x87 control word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Round {
    /// To the nearest, ties to even.
    Nearest,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
    /// Towards zero.
    Zero,
}

impl Round {
    /// The mode of a number's low two bits.
    #[must_use]
    pub fn new(n: u32) -> Self {
        [Self::Nearest, Self::Down, Self::Up, Self::Zero][(n & 3) as usize]
    }
}

/// What a result is rounded to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    /// Bits of the significand, with the integer bit.
    pub precision: u32,
    /// Exponent of the smallest normal number.
    pub min: i32,
    /// Exponent of the greatest.
    pub max: i32,
}

/// 16 bits.
pub const HALF: Format = Format { precision: 11, min: -14, max: 15 };
/// 32 bits.
pub const SINGLE: Format = Format { precision: 24, min: -126, max: 127 };
/// 64 bits.
pub const DOUBLE: Format = Format { precision: 53, min: -1022, max: 1023 };
/// The x87's own 80 bits.
pub const EXTENDED: Format = Format { precision: 64, min: -16382, max: 16383 };

/// How operations round, and what they raised.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The rounding mode.
    pub round: Round,
    /// Whether tiny results become zero.
    pub ftz: bool,
    /// Exceptions raised so far.
    pub flags: u32,
    /// Whether the last rounding made the magnitude greater.
    pub up: bool,
}

impl Context {
    /// With no flags.
    #[must_use]
    pub fn new(round: Round, ftz: bool) -> Self {
        Self { round, ftz, flags: 0, up: false }
    }
    /// Raises exceptions.
    pub fn raise(&mut self, flags: u32) {
        self.flags |= flags;
    }
}

/// Where a finite number's leading bit is.
const TOP: u32 = 126;

/// A number, not a NaN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Number {
    /// Zero with its sign (true: negative).
    Zero(bool),
    /// Infinity with its sign.
    Infinity(bool),
    /// `significand / 2^126 * 2^exponent`.
    Finite {
        /// Its sign.
        negative: bool,
        /// Of its leading bit.
        exponent: i32,
        /// The leading bit is bit 126; bit 0 may stand for more bits below.
        significand: u128,
    },
}

use Number::{Finite, Infinity, Zero};

/// Shifts right; bits that fall out are or-ed into the last.
fn shift_sticky(v: u128, n: u32) -> u128 {
    match n {
        0 => v,
        1..128 => v >> n | u128::from(v << (128 - n) != 0),
        _ => u128::from(v != 0),
    }
}

/// The quotient of significands, the last bit sticky; its leading bit is bit 126 or 125.
fn divide_significands(a: u128, b: u128) -> u128 {
    // Both have 64 bits at the top, and nothing below.
    let (a, b) = (a >> (TOP - 63), b >> (TOP - 63));
    let first = (a << 63) / b;
    let rest = (a << 63) % b;
    // The first quotient has 63 or 64 bits.
    let second = (rest << 63) / b;
    (first << 63 | second) | u128::from(!(rest << 63).is_multiple_of(b))
}

impl Number {
    /// The number `significand * 2^exponent`; bit 0 may stand for more bits below.
    #[must_use]
    pub fn new(negative: bool, exponent: i32, significand: u128) -> Self {
        if significand == 0 {
            return Zero(negative);
        }
        let zeros = significand.leading_zeros();
        // Bit 127 is not used.
        if zeros == 0 {
            let significand = shift_sticky(significand, 1);
            return Finite { negative, exponent: exponent + 127, significand };
        }
        Finite { negative, exponent: exponent + 127 - zeros as i32, significand: significand << (zeros - 1) }
    }
    /// A signed integer.
    #[must_use]
    pub fn integer(v: i128) -> Self {
        Self::new(v < 0, 0, v.unsigned_abs())
    }
    /// Whether it is negative, zeroes and infinities too.
    #[must_use]
    pub fn negative(self) -> bool {
        match self {
            Zero(n) | Infinity(n) | Finite { negative: n, .. } => n,
        }
    }
    /// The same with a sign.
    #[must_use]
    pub fn with_sign(self, negative: bool) -> Self {
        match self {
            Zero(_) => Zero(negative),
            Infinity(_) => Infinity(negative),
            Finite { exponent, significand, .. } => Finite { negative, exponent, significand },
        }
    }
    /// The same with the other sign.
    #[must_use]
    pub fn negated(self) -> Self {
        self.with_sign(!self.negative())
    }
    /// Whether it is zero.
    #[must_use]
    pub fn is_zero(self) -> bool {
        matches!(self, Zero(_))
    }
    /// Whether it is infinite.
    #[must_use]
    pub fn is_infinite(self) -> bool {
        matches!(self, Infinity(_))
    }

    /// The sum; of zeroes and of what cancels, the sign is as the rounding mode has it. `None`: infinities that cancel.
    #[must_use]
    pub fn plus(self, o: Self, round: Round) -> Option<Self> {
        Some(match (self, o) {
            (Infinity(a), Infinity(b)) => return (a == b).then_some(self),
            (Infinity(_), _) => self,
            (_, Infinity(_)) => o,
            (Zero(a), Zero(b)) => Zero(if a == b { a } else { round == Round::Down }),
            (Zero(_), _) => o,
            (_, Zero(_)) => self,
            (Finite { negative, exponent, significand }, Finite { negative: n, exponent: e, significand: s }) => {
                // A bit of room for the carry.
                let (mut a, mut b, mut top) =
                    ((negative, significand >> 1 | significand & 1), (n, s >> 1 | s & 1), exponent);
                if (e, s) > (exponent, significand) {
                    (a, b, top) = (b, a, e);
                }
                let b = (b.0, shift_sticky(b.1, exponent.abs_diff(e)));
                let sum = if a.0 == b.0 { a.1 + b.1 } else { a.1 - b.1 };
                if sum == 0 { Zero(round == Round::Down) } else { Self::new(a.0, top - TOP as i32 + 1, sum) }
            }
        })
    }

    /// The product. `None`: zero times infinity. Significands of 64 bits at most.
    #[must_use]
    pub fn times(self, o: Self) -> Option<Self> {
        let negative = self.negative() != o.negative();
        Some(match (self, o) {
            (Infinity(_), Zero(_)) | (Zero(_), Infinity(_)) => return None,
            (Infinity(_), _) | (_, Infinity(_)) => Infinity(negative),
            (Zero(_), _) | (_, Zero(_)) => Zero(negative),
            (Finite { exponent, significand, .. }, Finite { exponent: e, significand: s, .. }) => {
                let product = (significand >> (TOP - 63)) * (s >> (TOP - 63));
                Self::new(negative, exponent + e - 126, product)
            }
        })
    }

    /// The quotient. `None`: zero by zero, infinity by infinity. A finite number by zero is an infinity. Significands of 64 bits.
    #[must_use]
    pub fn over(self, o: Self) -> Option<Self> {
        let negative = self.negative() != o.negative();
        Some(match (self, o) {
            (Infinity(_), Infinity(_)) | (Zero(_), Zero(_)) => return None,
            (Infinity(_), _) | (_, Zero(_)) => Infinity(negative),
            (Zero(_), _) | (_, Infinity(_)) => Zero(negative),
            (Finite { exponent, significand, .. }, Finite { exponent: e, significand: s, .. }) => {
                Self::new(negative, exponent - e - 126, divide_significands(significand, s))
            }
        })
    }

    /// The square root. `None`: of a number below zero. Significands of 64 bits at most.
    #[must_use]
    pub fn sqrt(self) -> Option<Self> {
        let Finite { negative, exponent, significand } = self else {
            return (self.is_zero() || !self.negative()).then_some(self);
        };
        if negative {
            return None;
        }
        // An even exponent; the radicand's pairs of bits from the top, then zeroes.
        let odd = exponent & 1;
        let mut radicand = significand << odd;
        let (mut root, mut rest) = (0u128, 0u128);
        for _ in 0..70 {
            rest = rest << 2 | radicand >> 126;
            radicand <<= 2;
            let trial = root << 2 | 1;
            root <<= 1;
            if rest >= trial {
                rest -= trial;
                root |= 1;
            }
        }
        Some(Self::new(false, (exponent - odd) / 2 - 70, root << 1 | u128::from(rest != 0)))
    }

    /// Brings a number to a format, infinities and zeroes unchanged.
    #[must_use]
    pub fn round(self, format: Format, ctx: &mut Context) -> Self {
        ctx.up = false;
        let Finite { negative, exponent, significand } = self else { return self };
        let drop = TOP + 1 - format.precision;
        let (unbounded, _) = cut(significand, drop, negative, ctx.round);
        let tiny = exponent + i32::from(unbounded >> (TOP + 1) != 0) < format.min;
        if tiny && ctx.ftz {
            ctx.raise(flag::UE | flag::PE);
            return Zero(negative);
        }
        let exponent_kept = exponent.max(format.min);
        let (rounded, inexact) =
            cut(shift_sticky(significand, exponent.abs_diff(exponent_kept)), drop, negative, ctx.round);
        if inexact {
            ctx.raise(flag::PE | if tiny { flag::UE } else { 0 });
            ctx.up = rounded > shift_sticky(significand, exponent.abs_diff(exponent_kept));
        }
        let result = Self::new(negative, exponent_kept - TOP as i32, rounded);
        match result {
            Finite { exponent, .. } if exponent > format.max => {
                ctx.raise(flag::OE | flag::PE);
                let infinite = match ctx.round {
                    Round::Nearest => true,
                    Round::Down => negative,
                    Round::Up => !negative,
                    Round::Zero => false,
                };
                ctx.up = infinite;
                let greatest = (1 << (TOP + 1)) - (1 << drop);
                if infinite {
                    Infinity(negative)
                } else {
                    Finite { negative, exponent: format.max, significand: greatest }
                }
            }
            _ => result,
        }
    }

    /// As an integer, and whether it was none. `None`: infinite, or beyond 127 bits.
    #[must_use]
    pub fn to_integer(self, round: Round) -> Option<(i128, bool)> {
        match self {
            Zero(_) => Some((0, false)),
            Infinity(_) => None,
            Finite { exponent: 125.., .. } => None,
            Finite { negative, exponent, significand } => {
                // Fixed point with a bit for what is below one half.
                let fixed = shift_sticky(significand, (124 - exponent) as u32);
                let (whole, inexact) = cut(fixed, 2, negative, round);
                let whole = (whole >> 2) as i128;
                Some((if negative { -whole } else { whole }, inexact))
            }
        }
    }

    /// As a whole number of the same kind, and whether it was none; the sign stays.
    #[must_use]
    pub fn to_whole(self, round: Round) -> (Self, bool) {
        match self {
            Finite { negative, exponent, .. } if exponent < 120 => {
                let (v, inexact) = self.to_integer(round).unwrap_or((0, false));
                (Self::new(negative, 0, v.unsigned_abs()), inexact)
            }
            _ => (self, false),
        }
    }

    /// Whether it is less than, equal to or greater than another; zeroes are equal.
    #[must_use]
    pub fn compare(self, o: Self) -> core::cmp::Ordering {
        let key = |n: Self| match n {
            Zero(_) => (0, 0, 0),
            Infinity(negative) => (if negative { -1 } else { 1 }, i32::MAX, 0),
            Finite { negative, exponent, significand } => (if negative { -1 } else { 1 }, exponent, significand),
        };
        let (a, b) = (key(self), key(o));
        let magnitudes = (a.1, a.2).cmp(&(b.1, b.2));
        a.0.cmp(&b.0).then(if a.0 < 0 { magnitudes.reverse() } else { magnitudes })
    }

    /// The bits of an IEEE format of `width` bits; the number has been rounded to it.
    #[must_use]
    pub fn to_bits(self, format: Format, width: u32) -> u64 {
        let sign = u64::from(self.negative()) << (width - 1);
        let fraction_bits = format.precision - 1;
        sign | match self {
            Zero(_) => 0,
            Infinity(_) => ((format.max - format.min + 2) as u64) << fraction_bits,
            Finite { exponent, significand, .. } => {
                let below = (format.min - exponent).max(0) as u32;
                let s = (significand >> (TOP - fraction_bits + below)) as u64;
                // The integer bit adds 1 to a normal number's exponent field.
                s + (((exponent.max(format.min) - format.min) as u64) << fraction_bits)
            }
        }
    }

    /// From the bits of an IEEE format of `width` bits that are no NaN, and whether it is denormal.
    #[must_use]
    pub fn from_bits(bits: u64, format: Format, width: u32) -> (Self, bool) {
        let negative = bits >> (width - 1) & 1 != 0;
        let fraction_bits = format.precision - 1;
        let field = (bits >> fraction_bits) as i32 & (format.max - format.min + 2);
        let fraction = u128::from(bits & ((1 << fraction_bits) - 1));
        let unit = |field: i32| format.min + field - 1 - fraction_bits as i32;
        if field == format.max - format.min + 2 {
            (Infinity(negative), false)
        } else if field == 0 {
            (Self::new(negative, unit(1), fraction), fraction != 0)
        } else {
            (Self::new(negative, unit(field), fraction | 1 << fraction_bits), false)
        }
    }
}

/// Rounds away the low `drop` bits, and whether there were any.
fn cut(v: u128, drop: u32, negative: bool, round: Round) -> (u128, bool) {
    let (whole, rest, tie) = (v >> drop, v & ((1 << drop) - 1), 1u128 << (drop - 1));
    let up = match round {
        Round::Nearest => rest > tie || rest == tie && whole & 1 != 0,
        Round::Down => negative && rest != 0,
        Round::Up => !negative && rest != 0,
        Round::Zero => false,
    };
    ((whole + u128::from(up)) << drop, rest != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To nearest even, against the host's doubles and singles, whatever the host.
    #[test]
    fn doubles_and_singles_as_rust_has_them() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut next = || {
            seed ^= seed >> 12;
            seed ^= seed << 25;
            seed ^= seed >> 27;
            seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
        };
        let mut ctx = Context::new(Round::Nearest, false);
        let mut double = |n: Option<Number>| n.map(|n| n.round(DOUBLE, &mut ctx).to_bits(DOUBLE, 64));
        let expected = |v: f64| (!v.is_nan()).then(|| v.to_bits());
        for _ in 0..20_000 {
            // Exponents near one another, so that there is something to round.
            let mut one = || f64::from_bits(next() & 0x803f_ffff_ffff_ffff | (next() % 2) << 54 | 0x3f << 56);
            let (a, b, c) = (one(), one(), one());
            let n = |v: f64| Number::from_bits(v.to_bits(), DOUBLE, 64).0;
            assert_eq!(double(n(a).plus(n(b), Round::Nearest)), expected(a + b), "{a:e} + {b:e}");
            assert_eq!(double(n(a).times(n(b))), expected(a * b), "{a:e} * {b:e}");
            assert_eq!(double(n(a).over(n(b))), expected(a / b), "{a:e} / {b:e}");
            assert_eq!(double(n(a).sqrt()), expected(a.sqrt()), "root of {a:e}");
            let fused = n(a).times(n(b)).and_then(|p| p.plus(n(c), Round::Nearest));
            assert_eq!(double(fused), expected(a.mul_add(b, c)), "{a:e} * {b:e} + {c:e}");
            assert_eq!(Some(n(a).compare(n(b))), a.partial_cmp(&b));
        }
        let mut ctx = Context::new(Round::Nearest, false);
        for _ in 0..20_000 {
            let v = f64::from_bits(next());
            if !v.is_nan() {
                let single = Number::from_bits(v.to_bits(), DOUBLE, 64).0.round(SINGLE, &mut ctx).to_bits(SINGLE, 32);
                assert_eq!(single, u64::from((v as f32).to_bits()), "{v:e} as a single");
            }
        }
    }

    /// A tiny result is one after rounding: what rounds to the smallest normal number is not.
    #[test]
    fn tininess_is_detected_after_rounding() {
        let mut ctx = Context::new(Round::Nearest, false);
        // 2^-126 less half of a last place's half, and less a whole half.
        let below = |bits: u32| Number::new(false, -126 - 40, (1 << 40) - (1 << (40 - bits)));
        let smallest = Number::new(false, -126, 1);
        assert_eq!(below(26).round(SINGLE, &mut ctx), smallest);
        assert_eq!(ctx.flags, flag::PE);
        assert_eq!(below(24).round(SINGLE, &mut ctx), smallest);
        assert_eq!(ctx.flags, flag::PE | flag::UE);
    }
}
