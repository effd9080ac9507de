//! Packed decimal: FBLD and FBSTP.

use twofold_ir::softfloat::Number;

use super::real::Real;

/// What FBSTP stores of what has no packed decimal form.
pub const INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];

/// Eighteen digits and a sign. Digits beyond 9 count as what they are.
pub fn load(image: &[u8; 16]) -> Real {
    let magnitude = image[..9].iter().rev().fold(0i128, |v, b| v * 100 + i128::from(b >> 4) * 10 + i128::from(b & 15));
    Real::of(Number::integer(magnitude).with_sign(image[9] & 0x80 != 0))
}

/// The image of a whole number; `None` when it has more than eighteen digits.
pub fn store(n: Number) -> Option<[u8; 10]> {
    let (value, _) = n.to_integer(twofold_ir::softfloat::Round::Zero)?;
    let mut magnitude = value.unsigned_abs();
    if magnitude >= 1_000_000_000_000_000_000 {
        return None;
    }
    let mut image = [0; 10];
    for byte in &mut image[..9] {
        let two = (magnitude % 100) as u8;
        *byte = (two / 10) << 4 | (two % 10);
        magnitude /= 100;
    }
    image[9] = u8::from(n.negative()) << 7;
    Some(image)
}
