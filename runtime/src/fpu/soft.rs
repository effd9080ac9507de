//! The x87 in integers, for hosts that have none: every computing instruction, as [`super::x87::decode`] knows them.
//!
//! Results, flags, condition codes, tags and responses to unmasked exceptions are those of the host's unit on x86-64, which the
//! test below compares with; those of the transcendental functions are the exact ones, rounded.

use core::cmp::Ordering;

use twofold_arch::control::rflags;
use twofold_arch::fpu::{fcw, fsw};
use twofold_ir::softfloat::{Context, EXTENDED, Format, Number, Round};

use super::host::Registers;

mod bcd;
mod functions;
mod real;
#[cfg(all(test, target_arch = "x86_64", not(portable_host)))]
mod tests;
mod wide;

use real::{Kind, Real, choose_nan, format_of};

/// An exception is not masked: the instruction ends here and changes nothing but the status word.
struct Stop;

type Step<T = ()> = Result<T, Stop>;

/// What an instruction does besides its result.
const POP: usize = 1;
const POP_TWICE: usize = 2;

/// The unit while it runs one instruction.
struct Unit {
    r: Registers,
    flags: u64,
}

/// Runs an instruction; see [`super::host`] for what is what.
#[must_use]
pub fn run(r: Registers, first: u16, modrm: u8, memory: bool, flags: u64, operand: &mut [u8; 16]) -> (Registers, u64) {
    let mut unit = Unit { r: Registers { fsw: r.fsw & !fsw::C1, ..r }, flags: flags & rflags::ARITH | 2 };
    let done = if memory { unit.memory(first & 7, modrm >> 3 & 7, operand) } else { unit.register(first & 7, modrm) };
    // Stopped or not: what has been raised is in the status word.
    drop(done);
    (unit.r, unit.flags)
}

impl Unit {
    fn physical(&self, i: usize) -> usize {
        (usize::from(self.r.fsw >> fsw::TOP_SHIFT & 7) + i) & 7
    }
    fn is_empty(&self, i: usize) -> bool {
        self.r.ftw >> self.physical(i) & 1 == 0
    }
    fn st(&self, i: usize) -> Real {
        let [significand, high] = self.r.fpr[self.physical(i)];
        Real { significand, high: high as u16 }
    }
    fn set(&mut self, i: usize, v: Real) {
        let p = self.physical(i);
        self.r.fpr[p] = [v.significand, v.high.into()];
        self.r.ftw |= 1 << p;
    }
    fn free(&mut self, i: usize) {
        self.r.ftw &= !(1 << self.physical(i));
    }
    fn move_top(&mut self, by: u16) {
        let top = (self.r.fsw >> fsw::TOP_SHIFT).wrapping_add(by) & 7;
        self.r.fsw = self.r.fsw & !fsw::TOP | top << fsw::TOP_SHIFT;
    }
    fn pop(&mut self, times: usize) {
        for _ in 0..times {
            self.free(0);
            self.move_top(1);
        }
    }

    /// Raises exceptions that are found before there is a result.
    fn raise(&mut self, exceptions: u16) -> Step {
        self.r.fsw |= exceptions;
        if exceptions & fsw::EXCEPTIONS & !self.r.fcw != 0 { Err(Stop) } else { Ok(()) }
    }
    fn underflow(&mut self) -> Step {
        self.raise(fsw::IE | fsw::SF)
    }
    fn round(&self) -> Round {
        Round::new(u32::from(self.r.fcw >> 10))
    }
    /// The format of results of the basic operations.
    fn precision(&self) -> Format {
        let precision = match self.r.fcw & fcw::PC {
            0 => 24,
            0x200 => 53,
            _ => 64,
        };
        Format { precision, ..EXTENDED }
    }

    /// Rounds a result to a register's. One that is too great or too small for it is scaled when that exception is not masked.
    fn rounded(&mut self, n: Number, format: Format) -> Real {
        const BIAS: i32 = 0x6000;
        let unbounded = Format { min: i32::MIN / 2, max: i32::MAX / 2, ..format };
        let mut ctx = Context::new(self.round(), false);
        let scale = match n.round(unbounded, &mut ctx) {
            Number::Finite { exponent, .. } if exponent > format.max && self.r.fcw & fsw::OE == 0 => {
                Some((-BIAS, fsw::OE))
            }
            Number::Finite { exponent, .. } if exponent < format.min && self.r.fcw & fsw::UE == 0 => {
                Some((BIAS, fsw::UE))
            }
            _ => None,
        };
        let mut ctx = Context::new(self.round(), false);
        let mut n = n;
        if let (Some((by, exception)), Number::Finite { negative, exponent, significand }) = (scale, n) {
            self.r.fsw |= exception;
            n = Number::Finite { negative, exponent: exponent + by, significand };
        }
        let mut n = n.round(format, &mut ctx);
        // Only FSCALE gets so far that scaling does not help.
        let still = ctx.flags as u16 & !self.r.fcw;
        if still & fsw::OE != 0 {
            (n, ctx.up) = (Number::Infinity(n.negative()), true);
        } else if still & fsw::UE != 0 {
            (n, ctx.up) = (Number::Zero(n.negative()), false);
        }
        self.r.fsw |= ctx.flags as u16 | if ctx.up { fsw::C1 } else { 0 };
        Real::of(n)
    }

    /// What comes out of operands that are not both numbers, after the exceptions.
    fn not_numbers(&mut self, a: (Real, Kind), b: (Real, Kind)) -> Step<Option<Real>> {
        let kinds = [a.1, b.1];
        if kinds.contains(&Kind::Unsupported) {
            self.raise(fsw::IE)?;
            return Ok(Some(Real::INDEFINITE));
        }
        if kinds.contains(&Kind::Signaling) {
            self.raise(fsw::IE)?;
        } else if !kinds.contains(&Kind::Quiet) {
            return Ok(None);
        }
        Ok(Some(choose_nan(a.0, b.0)))
    }

    /// A result that is invalid.
    fn invalid(&mut self) -> Step<Real> {
        self.raise(fsw::IE)?;
        Ok(Real::INDEFINITE)
    }

    /// FADD, FMUL, FSUB, FSUBR, FDIV, FDIVR by their number in opcodes.
    fn arith(&mut self, op: u8, a: (Real, Kind), b: (Real, Kind)) -> Step<Real> {
        if let Some(nan) = self.not_numbers(a, b)? {
            return Ok(nan);
        }
        let (a, b) = if matches!(op, 5 | 7) { (b, a) } else { (a, b) };
        let (Kind::Number(x, dx), Kind::Number(y, dy)) = (a.1, b.1) else { return Ok(Real::INDEFINITE) };
        let r = match op {
            0 => x.plus(y, self.round()),
            1 => x.times(y),
            4 | 5 => x.plus(y.negated(), self.round()),
            _ => x.over(y),
        };
        let Some(r) = r else { return self.invalid() };
        if op >= 6 && y.is_zero() && !x.is_infinite() {
            self.raise(fsw::ZE)?;
        } else if dx || dy {
            self.raise(fsw::DE)?;
        }
        Ok(self.rounded(r, self.precision()))
    }

    /// Compares; `None` is unordered. `quiet`: only signaling NaNs are invalid. `note` gets the outcome, also that of denormal
    /// operands when their exception is not masked and the instruction ends here.
    fn order(&mut self, a: (Real, Kind), b: (Real, Kind), quiet: bool, note: fn(&mut Self, Option<Ordering>)) -> Step {
        let (Kind::Number(x, dx), Kind::Number(y, dy)) = (a.1, b.1) else {
            if !quiet || [a.1, b.1].iter().any(|k| matches!(k, Kind::Signaling | Kind::Unsupported)) {
                self.raise(fsw::IE)?;
            }
            note(self, None);
            return Ok(());
        };
        note(self, Some(x.compare(y)));
        if dx || dy { self.raise(fsw::DE) } else { Ok(()) }
    }

    /// FCOM and kin: compares ST(0) with another operand (`None`: an empty register).
    fn compare(&mut self, other: Option<(Real, Kind)>, quiet: bool, note: fn(&mut Self, Option<Ordering>)) -> Step {
        match other {
            Some(b) if !self.is_empty(0) => {
                let a = (self.st(0), self.st(0).kind());
                self.order(a, b, quiet, note)
            }
            _ => {
                self.underflow()?;
                note(self, None);
                Ok(())
            }
        }
    }

    fn set_condition(&mut self, order: Option<Ordering>) {
        let code = match order {
            None => fsw::C3 | fsw::C2 | fsw::C0,
            Some(Ordering::Less) => fsw::C0,
            Some(Ordering::Equal) => fsw::C3,
            Some(Ordering::Greater) => 0,
        };
        self.r.fsw = self.r.fsw & !(fsw::C3 | fsw::C2 | fsw::C0) | code;
    }

    fn set_flags(&mut self, order: Option<Ordering>) {
        let code = match order {
            None => rflags::ZF | rflags::PF | rflags::CF,
            Some(Ordering::Less) => rflags::CF,
            Some(Ordering::Equal) => rflags::ZF,
            Some(Ordering::Greater) => 0,
        };
        self.flags = self.flags & !rflags::ARITH | code;
    }

    /// A register as an operand; `None` when it is empty.
    fn operand(&self, i: usize) -> Option<(Real, Kind)> {
        (!self.is_empty(i)).then(|| (self.st(i), self.st(i).kind()))
    }

    /// `ST(to) = ST(0) op other`, or a comparison (2, 3).
    fn basic(&mut self, op: u8, other: Option<(Real, Kind)>, to: usize, pops: usize) -> Step {
        if matches!(op, 2 | 3) {
            self.compare(other, false, Self::set_condition)?;
            self.pop(pops + usize::from(op == 3));
            return Ok(());
        }
        let r = match other {
            Some(b) if !self.is_empty(0) => {
                let a = (self.st(0), self.st(0).kind());
                self.arith(op, a, b)?
            }
            _ => {
                self.underflow()?;
                Real::INDEFINITE
            }
        };
        self.set(to, r);
        self.pop(pops);
        Ok(())
    }

    /// Makes room on the stack, or raises what a full one does; false when the masked response has been made.
    fn push(&mut self) -> Step<bool> {
        let full = !self.is_empty(7);
        if full {
            self.r.fsw |= fsw::C1;
            self.raise(fsw::IE | fsw::SF)?;
        }
        self.move_top(7);
        if full {
            self.set(0, Real::INDEFINITE);
        }
        Ok(!full)
    }

    fn load(&mut self, v: Real) -> Step {
        if self.push()? {
            self.set(0, v);
        }
        Ok(())
    }

    fn load_float(&mut self, bits: u64, bytes: usize) -> Step {
        if !self.is_empty(7) {
            return self.push().map(drop);
        }
        let (v, kind) = Real::from_memory(bits, bytes);
        let v = match kind {
            Kind::Signaling => {
                self.raise(fsw::IE)?;
                v.quiet()
            }
            // Not masked, it still loads.
            Kind::Number(_, true) => {
                self.r.fsw |= fsw::DE;
                v
            }
            _ => v,
        };
        self.load(v)
    }

    /// ST(0) as a single or double, with the exceptions of the conversion.
    fn narrowed(&mut self, bytes: usize) -> Step<u64> {
        let (format, width) = format_of(bytes);
        let v = self.st(0);
        if self.is_empty(0) {
            self.underflow()?;
            return Ok(Real::INDEFINITE.nan_to_memory(bytes));
        }
        let n = match v.kind() {
            Kind::Unsupported => {
                self.raise(fsw::IE)?;
                return Ok(Real::INDEFINITE.nan_to_memory(bytes));
            }
            Kind::Signaling => {
                self.raise(fsw::IE)?;
                return Ok(v.nan_to_memory(bytes));
            }
            Kind::Quiet => return Ok(v.nan_to_memory(bytes)),
            Kind::Number(n, _) => n,
        };
        // Unmasked overflow and underflow leave memory alone; whether they occur is decided before anything is stored.
        let mut ctx = Context::new(self.round(), false);
        let unbounded = Format { min: i32::MIN / 2, max: i32::MAX / 2, ..format };
        if let Number::Finite { exponent, .. } = n.round(unbounded, &mut ctx) {
            if exponent > format.max {
                self.raise(fsw::OE)?;
            }
            if exponent < format.min && self.r.fcw & fsw::UE == 0 {
                self.raise(fsw::UE)?;
            }
        }
        let mut ctx = Context::new(self.round(), false);
        let n = n.round(format, &mut ctx);
        self.r.fsw |= ctx.flags as u16 | if ctx.up { fsw::C1 } else { 0 };
        Ok(n.to_bits(format, width))
    }

    /// ST(0) as an integer of some bytes; the integer indefinite value when it does not fit.
    fn integer(&mut self, bytes: usize, round: Round) -> Step<u64> {
        let bits = 8 * bytes as u32;
        let indefinite = 1u64 << (bits - 1);
        if self.is_empty(0) {
            self.underflow()?;
            return Ok(indefinite);
        }
        let n = match self.st(0).kind() {
            Kind::Number(n, _) => n.to_integer(round).map(|i| (n, i)),
            _ => None,
        };
        match n {
            Some((n, (v, inexact))) if v >= -(1 << (bits - 1)) && v < 1 << (bits - 1) => {
                self.note_inexact(n, Number::integer(v), inexact);
                Ok(v as u64)
            }
            _ => {
                self.raise(fsw::IE)?;
                Ok(indefinite)
            }
        }
    }

    /// PE, and C1 when rounding to an integer made the magnitude greater.
    fn note_inexact(&mut self, before: Number, after: Number, inexact: bool) {
        if inexact {
            let up = after.with_sign(false).compare(before.with_sign(false)) == Ordering::Greater;
            self.r.fsw |= fsw::PE | if up { fsw::C1 } else { 0 };
        }
    }

    fn memory(&mut self, first: u16, reg: u8, operand: &mut [u8; 16]) -> Step {
        let word = u64::from_le_bytes(core::array::from_fn(|i| operand[i]));
        let int = |v: i64| Some((Real::of(Number::integer(v.into())), Kind::Number(Number::integer(v.into()), false)));
        match (first, reg) {
            (0, _) => self.basic(reg, Some(Real::from_memory(word & 0xffff_ffff, 4)), 0, 0),
            (4, _) => self.basic(reg, Some(Real::from_memory(word, 8)), 0, 0),
            (2, _) => self.basic(reg, int((word as i32).into()), 0, 0),
            (6, _) => self.basic(reg, int((word as i16).into()), 0, 0),
            (1, 0) => self.load_float(word & 0xffff_ffff, 4),
            (5, 0) => self.load_float(word, 8),
            (3, 0) => self.load(Real::of(Number::integer((word as i32).into()))),
            (7, 0) => self.load(Real::of(Number::integer((word as i16).into()))),
            (7, 5) => self.load(Real::of(Number::integer((word as i64).into()))),
            (3, 5) => {
                let high = u16::from_le_bytes([operand[8], operand[9]]);
                self.load(Real { significand: word, high })
            }
            (7, 4) => self.load(bcd::load(operand)),
            (1 | 5, _) if reg != 1 => {
                let bytes = if first == 1 { 4 } else { 8 };
                put(operand, self.narrowed(bytes)?, bytes);
                self.pop(usize::from(reg == 3));
                Ok(())
            }
            (3, 1..=3) | (5, 1) | (7, 1..=3 | 7) => {
                let bytes = match (first, reg) {
                    (3, _) => 4,
                    (5, _) | (7, 7) => 8,
                    _ => 2,
                };
                let round = if reg == 1 { Round::Zero } else { self.round() };
                put(operand, self.integer(bytes, round)?, bytes);
                self.pop(usize::from(reg != 2));
                Ok(())
            }
            (3, 7) => {
                let v = if self.is_empty(0) {
                    self.underflow()?;
                    Real::INDEFINITE
                } else {
                    self.st(0)
                };
                put(operand, v.significand, 8);
                operand[8..10].copy_from_slice(&v.high.to_le_bytes());
                self.pop(POP);
                Ok(())
            }
            (7, 6) => {
                let image = self.bcd_image()?;
                operand[..10].copy_from_slice(&image);
                self.pop(POP);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// ST(0) as packed decimal.
    fn bcd_image(&mut self) -> Step<[u8; 10]> {
        if self.is_empty(0) {
            self.underflow()?;
            return Ok(bcd::INDEFINITE);
        }
        if let Kind::Number(n, _) = self.st(0).kind() {
            let (whole, inexact) = n.to_whole(self.round());
            if let Some(image) = bcd::store(whole) {
                self.note_inexact(n, whole, inexact);
                return Ok(image);
            }
        }
        self.raise(fsw::IE)?;
        Ok(bcd::INDEFINITE)
    }

    fn register(&mut self, first: u16, modrm: u8) -> Step {
        let (op, i) = (modrm >> 3 & 7, usize::from(modrm & 7));
        let other = self.operand(i);
        match (first, op) {
            (0, _) => self.basic(op, other, 0, 0),
            // FCOM and FCOMP have their places here too.
            (4, 2 | 3) => self.basic(op, other, 0, 0),
            (4, _) => self.basic(op, other, i, 0),
            (6, 2) => self.basic(3, other, 0, 0),
            (6, 3) => self.basic(3, other, 0, POP),
            (6, _) => self.basic(op, other, i, POP),
            (1, 0) => match other {
                Some((v, _)) => self.load(v),
                // Before a full stack, which may come to it.
                None => {
                    self.underflow()?;
                    self.move_top(7);
                    self.set(0, Real::INDEFINITE);
                    Ok(())
                }
            },
            (1, 1) | (5 | 7, 1) => self.exchange(i),
            (1, 3) => {
                self.store_unchecked(i);
                Ok(())
            }
            (5, 2 | 3) | (7, 2 | 3) => self.store_register(i, usize::from((first, op) != (5, 2))),
            (1, 2) => Ok(()),
            (1, _) => self.single(modrm),
            (2, 5) => {
                self.compare(self.operand(1), true, Self::set_condition)?;
                self.pop(POP_TWICE);
                Ok(())
            }
            (2 | 3, 0..=3) => self.conditional_move(first == 3, op, i),
            (5 | 7, 0) => {
                self.free(i);
                self.pop(usize::from(first == 7));
                Ok(())
            }
            (5, 4 | 5) => {
                self.compare(other, true, Self::set_condition)?;
                self.pop(usize::from(op == 5));
                Ok(())
            }
            (3 | 7, 5 | 6) => {
                self.compare(other, op == 5, Self::set_flags)?;
                self.pop(usize::from(first == 7));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn exchange(&mut self, i: usize) -> Step {
        if self.is_empty(0) || self.is_empty(i) {
            self.underflow()?;
        }
        let value = |u: &Self, n| u.operand(n).map_or(Real::INDEFINITE, |o| o.0);
        let (a, b) = (value(self, 0), value(self, i));
        self.set(0, b);
        self.set(i, a);
        Ok(())
    }

    fn store_register(&mut self, i: usize, pops: usize) -> Step {
        let v = if self.is_empty(0) {
            self.underflow()?;
            Real::INDEFINITE
        } else {
            self.st(0)
        };
        self.set(i, v);
        self.pop(pops);
        Ok(())
    }

    /// FSTPNCE: an empty register is popped, and not copied.
    fn store_unchecked(&mut self, i: usize) {
        if let Some((v, _)) = self.operand(0) {
            self.set(i, v);
        }
        self.pop(POP);
    }

    fn conditional_move(&mut self, negated: bool, condition: u8, i: usize) -> Step {
        let flag = [rflags::CF, rflags::ZF, rflags::CF | rflags::ZF, rflags::PF][usize::from(condition & 3)];
        if self.is_empty(0) || self.is_empty(i) {
            self.underflow()?;
            self.set(0, Real::INDEFINITE);
        } else if (self.flags & flag != 0) != negated {
            self.set(0, self.st(i));
        }
        Ok(())
    }
}

fn put(operand: &mut [u8; 16], v: u64, bytes: usize) {
    operand[..bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
}
