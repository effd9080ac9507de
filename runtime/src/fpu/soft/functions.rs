//! The instructions on ST(0) and ST(1) that are no basic arithmetic: signs, tests, constants, remainders, roots, logarithms.
//!
//! The transcendental ones are computed to many more bits ([`wide`]) and rounded once.

use core::cmp::Ordering;

use twofold_arch::fpu::fsw;
use twofold_ir::softfloat::{EXTENDED, Number, Round};

use super::real::{Kind, Real};
use super::{Step, Unit, wide};

/// FLD1 to FLDZ: sign and exponent, the significand rounded down, and whether it is nearer to the next.
const CONSTANTS: [(u16, u64, bool, bool); 7] = [
    (0x3fff, 1 << 63, false, true),
    (0x4000, 0xd49a_784b_cd1b_8afe, false, false),
    (0x3fff, 0xb8aa_3b29_5c17_f0bb, true, false),
    (0x4000, 0xc90f_daa2_2168_c234, true, false),
    (0x3ffd, 0x9a20_9a84_fbcf_f798, true, false),
    (0x3ffe, 0xb172_17f7_d1cf_79ab, true, false),
    (0, 0, false, true),
];

impl Unit {
    /// The instructions D9 E0 to D9 FF.
    pub(super) fn single(&mut self, modrm: u8) -> Step {
        match modrm {
            0xe0 | 0xe1 => self.change_sign(modrm == 0xe0),
            0xe4 => {
                let zero = (Real { significand: 0, high: 0 }, Kind::Number(Number::Zero(false), false));
                self.compare(Some(zero), false, Self::set_condition)
            }
            0xe5 => {
                self.examine();
                Ok(())
            }
            0xe8..=0xee => {
                let (high, down, nearer, exact) = CONSTANTS[usize::from(modrm - 0xe8)];
                let up = !exact && (self.round() == Round::Up || self.round() == Round::Nearest && nearer);
                self.load(Real { significand: down + u64::from(up), high })
            }
            0xf4 => self.extract(),
            0xf6 | 0xf7 => {
                self.move_top(if modrm == 0xf6 { 7 } else { 1 });
                Ok(())
            }
            0xf5 | 0xf8 | 0xfd | 0xf1 | 0xf3 | 0xf9 => self.two_operands(modrm),
            0xfa | 0xfc | 0xf0 | 0xf2 | 0xfb | 0xfe | 0xff => self.one_operand(modrm),
            _ => Ok(()),
        }
    }

    fn change_sign(&mut self, flip: bool) -> Step {
        if self.is_empty(0) {
            self.underflow()?;
            self.set(0, Real::INDEFINITE);
            return Ok(());
        }
        let v = self.st(0);
        self.set(0, Real { high: if flip { v.high ^ 0x8000 } else { v.high & 0x7fff }, ..v });
        Ok(())
    }

    /// FXAM.
    fn examine(&mut self) {
        let v = self.st(0);
        let class = match v.kind() {
            _ if self.is_empty(0) => fsw::C3 | fsw::C0,
            Kind::Unsupported => 0,
            Kind::Signaling | Kind::Quiet => fsw::C0,
            Kind::Number(Number::Infinity(_), _) => fsw::C2 | fsw::C0,
            Kind::Number(Number::Zero(_), _) => fsw::C3,
            Kind::Number(_, true) => fsw::C3 | fsw::C2,
            Kind::Number(_, false) => fsw::C2,
        };
        let sign = if v.high >> 15 != 0 { fsw::C1 } else { 0 };
        self.r.fsw = self.r.fsw & !fsw::CC | class | sign;
    }

    /// FXTRACT: the exponent, and on top of it the significand.
    fn extract(&mut self) -> Step {
        if self.is_empty(0) || !self.is_empty(7) {
            if self.is_empty(0) {
                self.underflow()?;
                self.set(0, Real::INDEFINITE);
                self.move_top(7);
                self.set(0, Real::INDEFINITE);
            } else {
                self.push()?;
                self.set(1, Real::INDEFINITE);
            }
            return Ok(());
        }
        let v = self.st(0);
        let (exponent, significand) = match v.kind() {
            Kind::Number(Number::Zero(_), _) => {
                self.raise(fsw::ZE)?;
                (Real::of(Number::Infinity(true)), v)
            }
            Kind::Number(Number::Infinity(_), _) => (Real::of(Number::Infinity(false)), v),
            Kind::Number(Number::Finite { negative, exponent, significand }, denormal) => {
                if denormal {
                    self.raise(fsw::DE)?;
                }
                let significand = Number::Finite { negative, exponent: 0, significand };
                (Real::of(Number::integer(exponent.into())), Real::of(significand))
            }
            Kind::Unsupported => {
                let nan = self.invalid()?;
                (nan, nan)
            }
            kind => {
                if kind == Kind::Signaling {
                    self.raise(fsw::IE)?;
                }
                (v.quiet(), v.quiet())
            }
        };
        self.set(0, exponent);
        self.move_top(7);
        self.set(0, significand);
        Ok(())
    }

    /// The instructions that replace ST(0), or push beside: FSQRT, FRNDINT, F2XM1, FPTAN, FSINCOS, FSIN, FCOS.
    fn one_operand(&mut self, modrm: u8) -> Step {
        let pushes = matches!(modrm, 0xf2 | 0xfb);
        if self.is_empty(0) || pushes && !self.is_empty(7) {
            return self.no_operand(pushes);
        }
        let v = self.st(0);
        let (n, denormal) = match v.kind() {
            Kind::Number(n, denormal) => (n, denormal),
            kind => {
                if kind != Kind::Quiet {
                    self.raise(fsw::IE)?;
                }
                let nan = if kind == Kind::Unsupported { Real::INDEFINITE } else { v.quiet() };
                return self.replace(nan, pushes.then_some(nan));
            }
        };
        if modrm == 0xfa || modrm == 0xfc {
            let r = self.root_or_whole(modrm == 0xfa, n, denormal)?;
            return self.replace(r, None);
        }
        self.function(modrm, n, denormal)
    }

    /// The responses to an empty ST(0), and to a full stack.
    fn no_operand(&mut self, pushes: bool) -> Step {
        if !self.is_empty(0) {
            self.r.fsw |= fsw::C1;
        }
        self.underflow()?;
        self.replace(Real::INDEFINITE, pushes.then_some(Real::INDEFINITE))
    }

    fn replace(&mut self, v: Real, pushed: Option<Real>) -> Step {
        self.set(0, v);
        if let Some(v) = pushed {
            self.move_top(7);
            self.set(0, v);
        }
        Ok(())
    }

    fn root_or_whole(&mut self, root: bool, n: Number, denormal: bool) -> Step<Real> {
        if root {
            let Some(r) = n.sqrt() else { return self.invalid() };
            if denormal {
                self.raise(fsw::DE)?;
            }
            return Ok(self.rounded(r, self.precision()));
        }
        if denormal {
            self.raise(fsw::DE)?;
        }
        let (whole, inexact) = n.to_whole(self.round());
        self.note_inexact(n, whole, inexact);
        Ok(Real::of(whole))
    }

    fn function(&mut self, modrm: u8, n: Number, denormal: bool) -> Step {
        let trigonometric = modrm != 0xf0;
        if trigonometric && n.is_infinite() {
            let nan = self.invalid()?;
            return self.replace(nan, matches!(modrm, 0xf2 | 0xfb).then_some(nan));
        }
        if denormal {
            self.raise(fsw::DE)?;
        }
        if trigonometric {
            // Beyond 2^63 the operand is out of range, and stays.
            if matches!(n, Number::Finite { exponent: 63.., .. }) {
                self.r.fsw |= fsw::C2;
                return Ok(());
            }
            self.r.fsw &= !fsw::C2;
        }
        let one = Number::integer(1);
        if modrm == 0xf0 {
            let r = match n {
                Number::Infinity(true) => one.negated(),
                Number::Finite { exponent: ..0, .. } => wide::power_less_one(n),
                _ if n.compare(one.negated()).is_eq() => Number::new(true, -1, 1),
                // One is exact; beyond it the result is undefined.
                _ => n,
            };
            let r = self.rounded(r, EXTENDED);
            return self.replace(r, None);
        }
        let (sine, cosine) = if n.is_zero() { (n, one) } else { wide::sine_cosine(n) };
        match modrm {
            0xf2 => {
                let r = if n.is_zero() { n } else { wide::over(sine, cosine) };
                let r = self.rounded(r, EXTENDED);
                self.replace(r, Some(Real::of(one)))
            }
            0xfb => {
                let (s, c) = (self.rounded(sine, EXTENDED), self.rounded(cosine, EXTENDED));
                self.replace(s, Some(c))
            }
            _ => {
                let r = self.rounded(if modrm == 0xfe { sine } else { cosine }, EXTENDED);
                self.replace(r, None)
            }
        }
    }

    /// FPREM, FPREM1, FSCALE, which replace ST(0); FYL2X, FPATAN, FYL2XP1, which replace ST(1) and pop.
    fn two_operands(&mut self, modrm: u8) -> Step {
        let pops = usize::from(matches!(modrm, 0xf1 | 0xf3 | 0xf9));
        if matches!(modrm, 0xf5 | 0xf8) {
            self.r.fsw &= !fsw::C2;
        }
        let r = match (self.operand(0), self.operand(1)) {
            (Some(a), Some(b)) => match self.not_numbers(a, b)? {
                Some(nan) => nan,
                None => {
                    let (Kind::Number(x, dx), Kind::Number(y, dy)) = (a.1, b.1) else { return Ok(()) };
                    let denormal = dx || dy;
                    match modrm {
                        0xf5 | 0xf8 => self.remainder(modrm == 0xf5, x, y, denormal)?,
                        0xfd => self.scale(x, y, denormal)?,
                        0xf3 => self.arc_tangent(x, y, denormal)?,
                        _ => self.logarithm(modrm == 0xf9, x, y, denormal)?,
                    }
                }
            },
            _ => {
                self.underflow()?;
                Real::INDEFINITE
            }
        };
        self.set(pops, r);
        self.pop(pops);
        Ok(())
    }

    /// FPREM, and FPREM1, whose quotient is the nearest.
    fn remainder(&mut self, nearest: bool, x: Number, y: Number, denormal: bool) -> Step<Real> {
        if x.is_infinite() || y.is_zero() {
            return self.invalid();
        }
        if denormal {
            self.raise(fsw::DE)?;
        }
        self.r.fsw &= !(fsw::C0 | fsw::C3);
        let (
            Number::Finite { negative, exponent: ex, significand: sx },
            Number::Finite { exponent: ey, significand: sy, .. },
        ) = (x, y)
        else {
            return Ok(self.rounded(x, EXTENDED));
        };
        let distance = ex - ey;
        if distance < -1 || distance < 0 && !nearest {
            return Ok(self.rounded(x, EXTENDED));
        }
        // Both as integers of 64 bits times a power of two; a half more for the divisor where the dividend is below it.
        let (dividend, mut divisor) = (sx >> 63, sy >> 63);
        // What is left when it takes more than one step is the processor's own choice.
        let partial = distance >= 64;
        let shift = if partial { 32 + distance % 32 } else { distance.max(0) };
        let mut unit = if partial { ey + distance - shift } else { ey };
        if distance < 0 {
            divisor <<= 1;
            unit -= 1;
        }
        let (mut quotient, mut rest) = ((dividend << shift) / divisor, (dividend << shift) % divisor);
        let mut sign = negative;
        if nearest && !partial && (2 * rest > divisor || 2 * rest == divisor && quotient & 1 != 0) {
            rest = divisor - rest;
            quotient += 1;
            sign = !sign;
        }
        let bit = |n: u32, flag: u16| if quotient >> n & 1 != 0 { flag } else { 0 };
        self.r.fsw |= if partial { fsw::C2 } else { bit(2, fsw::C0) | bit(1, fsw::C3) };
        if rest == 0 {
            sign = negative;
        }
        let r = self.rounded(Number::new(sign, unit - 63, rest), EXTENDED);
        self.r.fsw |= if partial { 0 } else { bit(0, fsw::C1) };
        Ok(r)
    }

    fn scale(&mut self, x: Number, y: Number, denormal: bool) -> Step<Real> {
        if let Number::Infinity(down) = y {
            if if down { x.is_infinite() } else { x.is_zero() } {
                return self.invalid();
            }
            if denormal {
                self.raise(fsw::DE)?;
            }
            let r = if down { Number::Zero(x.negative()) } else { Number::Infinity(x.negative()) };
            return Ok(Real::of(r));
        }
        if denormal {
            self.raise(fsw::DE)?;
        }
        let by = y
            .to_whole(Round::Zero)
            .0
            .to_integer(Round::Zero)
            .map_or(if y.negative() { -1 << 20 } else { 1 << 20 }, |v| v.0);
        let by = by.clamp(-1 << 20, 1 << 20) as i32;
        Ok(match x {
            Number::Finite { negative, exponent, significand } => {
                self.rounded(Number::Finite { negative, exponent: exponent + by, significand }, EXTENDED)
            }
            _ => Real::of(x),
        })
    }

    /// FPATAN: the angle of the point (ST(0), ST(1)).
    fn arc_tangent(&mut self, x: Number, y: Number, denormal: bool) -> Step<Real> {
        if denormal {
            self.raise(fsw::DE)?;
        }
        let angle = match (y, x) {
            // Zero, or pi.
            _ if y.is_zero() || x.is_infinite() && !y.is_infinite() => {
                if x.negative() {
                    wide::pi(0)
                } else {
                    Number::Zero(false)
                }
            }
            _ if x.is_infinite() => {
                let quarter = wide::pi(-2);
                if x.negative() { wide::plus(wide::pi(0), quarter.negated()) } else { quarter }
            }
            _ if x.is_zero() || y.is_infinite() => wide::pi(-1),
            _ => {
                let acute = wide::arc_tangent(y.with_sign(false), x.with_sign(false));
                if x.negative() { wide::plus(wide::pi(0), acute.negated()) } else { acute }
            }
        };
        Ok(self.rounded(angle.with_sign(y.negative()), EXTENDED))
    }

    /// FYL2X: `y * log2(x)`; FYL2XP1: `y * log2(x + 1)`.
    fn logarithm(&mut self, plus_one: bool, x: Number, y: Number, denormal: bool) -> Step<Real> {
        let one = Number::integer(1);
        let at = if plus_one { Number::Zero(false) } else { one };
        // The logarithm's sign, and whether it is infinite or zero.
        let side = x.compare(at);
        let negative = y.negative() != (side == Ordering::Less || side == Ordering::Equal && plus_one && x.negative());
        let bottom = !plus_one && x.is_zero();
        let infinite = x.is_infinite() || bottom;
        if x.negative() && !x.is_zero() && !plus_one
            || side == Ordering::Equal && y.is_infinite()
            || infinite && y.is_zero()
            || plus_one && x == Number::Infinity(true)
        {
            return self.invalid();
        }
        if bottom && !y.is_infinite() {
            self.raise(fsw::ZE)?;
        } else if denormal {
            self.raise(fsw::DE)?;
        }
        if infinite || y.is_infinite() {
            return Ok(Real::of(Number::Infinity(negative)));
        }
        if side == Ordering::Equal || y.is_zero() {
            return Ok(Real::of(Number::Zero(negative)));
        }
        let log = if plus_one { wide::logarithm_plus_one(x) } else { wide::logarithm(x) };
        Ok(self.rounded(wide::times(y, log), EXTENDED))
    }
}
