//! The x87's 80-bit numbers: what their bits mean, and which NaN comes out of two.

use twofold_ir::softfloat::{DOUBLE, EXTENDED, Format, Number, SINGLE};

/// A register's value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Real {
    /// The significand, with the integer bit.
    pub significand: u64,
    /// Sign and exponent.
    pub high: u16,
}

/// What a register holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A pseudo-NaN, pseudo-infinity or unnormal.
    Unsupported,
    /// A NaN that signals.
    Signaling,
    /// A NaN that does not.
    Quiet,
    /// Anything else, and whether it is denormal (or pseudo-denormal).
    Number(Number, bool),
}

impl Real {
    /// The default NaN.
    pub const INDEFINITE: Self = Self { significand: 3 << 62, high: 0xffff };

    /// What it is.
    pub fn kind(self) -> Kind {
        let (negative, field) = (self.high >> 15 != 0, i32::from(self.high & 0x7fff));
        let (integer, quiet) = (self.significand >> 63 != 0, self.significand >> 62 & 1 != 0);
        match field {
            0 => {
                let unit = EXTENDED.min - 63;
                Kind::Number(Number::new(negative, unit, self.significand.into()), self.significand != 0)
            }
            _ if !integer => Kind::Unsupported,
            0x7fff if self.significand << 1 == 0 => Kind::Number(Number::Infinity(negative), false),
            0x7fff if quiet => Kind::Quiet,
            0x7fff => Kind::Signaling,
            _ => Kind::Number(Number::new(negative, field - 0x3fff - 63, self.significand.into()), false),
        }
    }

    /// A NaN that does not signal.
    pub fn quiet(self) -> Self {
        Self { significand: self.significand | 1 << 62, ..self }
    }

    /// The register's value of a number that has been rounded to [`EXTENDED`].
    pub fn of(n: Number) -> Self {
        let sign = u16::from(n.negative()) << 15;
        match n {
            Number::Zero(_) => Self { significand: 0, high: sign },
            Number::Infinity(_) => Self { significand: 1 << 63, high: sign | 0x7fff },
            Number::Finite { exponent, significand, .. } => {
                let below = (EXTENDED.min - exponent).max(0) as u32;
                let significand = if below < 64 { (significand >> (63 + below)) as u64 } else { 0 };
                let field = if below != 0 { 0 } else { (exponent + 0x3fff) as u16 };
                Self { significand, high: sign | field }
            }
        }
    }

    /// The value of a single (4 bytes) or double.
    pub fn from_memory(bits: u64, bytes: usize) -> (Self, Kind) {
        let (format, width) = format_of(bytes);
        let fraction_bits = format.precision - 1;
        let magnitude = bits & ((1 << (width - 1)) - 1);
        let infinity = Number::Infinity(false).to_bits(format, width);
        if magnitude > infinity {
            let significand = 1 << 63 | (bits & ((1 << fraction_bits) - 1)) << (63 - fraction_bits);
            let real = Self { significand, high: ((bits >> (width - 1)) as u16) << 15 | 0x7fff };
            return (real, real.kind());
        }
        let (n, denormal) = Number::from_bits(bits, format, width);
        (Self::of(n), Kind::Number(n, denormal))
    }

    /// A NaN as a single or double.
    pub fn nan_to_memory(self, bytes: usize) -> u64 {
        let (format, width) = format_of(bytes);
        let infinity = Number::Infinity(self.high >> 15 != 0).to_bits(format, width);
        infinity | self.quiet().significand << 1 >> (65 - format.precision)
    }
}

/// The format of a memory operand of 4 or 8 bytes, and its width in bits.
pub fn format_of(bytes: usize) -> (Format, u32) {
    if bytes == 4 { (SINGLE, 32) } else { (DOUBLE, 64) }
}

/// The NaN that comes out of two operands, one of which is a NaN: a quiet one before a signaling one, the greater significand,
/// the positive one (SDM Vol 1, Rules for Handling NaNs).
pub fn choose_nan(a: Real, b: Real) -> Real {
    let chosen = match (a.kind(), b.kind()) {
        (Kind::Quiet, Kind::Signaling) => a,
        (Kind::Signaling, Kind::Quiet) => b,
        (Kind::Quiet | Kind::Signaling, Kind::Quiet | Kind::Signaling) => {
            let key = |r: Real| (r.significand, r.high >> 15 == 0);
            if key(a) >= key(b) { a } else { b }
        }
        (Kind::Quiet | Kind::Signaling, _) => a,
        _ => b,
    };
    chosen.quiet()
}
