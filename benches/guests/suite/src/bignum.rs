//! Big numbers: modular exponentiation by Montgomery's method with 64-bit limbs, and decimal printing by long division.

use crate::{Random, mix};

const LIMBS: usize = 32;

type Number = [u64; LIMBS];

/// a * b + c + carry: low word, high word.
fn multiply_add(a: u64, b: u64, c: u64, carry: u64) -> (u64, u64) {
    let wide = u128::from(a) * u128::from(b) + u128::from(c) + u128::from(carry);
    (wide as u64, (wide >> 64) as u64)
}

fn subtract_if_not_less(a: &mut [u64], n: &Number, top: u64) {
    let less = top == 0 && a.iter().rev().lt(n.iter().rev());
    if less {
        return;
    }
    let mut borrow = false;
    for (x, &y) in a.iter_mut().zip(n) {
        let (d, b1) = x.overflowing_sub(y);
        let (d, b2) = d.overflowing_sub(u64::from(borrow));
        (*x, borrow) = (d, b1 || b2);
    }
}

/// a * b / 2^2048 mod n; `inverse` is -1/n mod 2^64.
#[inline(never)]
fn montgomery(a: &Number, b: &Number, n: &Number, inverse: u64) -> Number {
    let mut t = [0u64; LIMBS + 2];
    for &x in a {
        let mut carry = 0;
        for (d, &y) in t.iter_mut().zip(b) {
            (*d, carry) = multiply_add(x, y, *d, carry);
        }
        let (sum, over) = t[LIMBS].overflowing_add(carry);
        (t[LIMBS], t[LIMBS + 1]) = (sum, u64::from(over));
        let m = t[0].wrapping_mul(inverse);
        let (_, mut carry) = multiply_add(m, n[0], t[0], 0);
        for j in 1..LIMBS {
            (t[j - 1], carry) = multiply_add(m, n[j], t[j], carry);
        }
        let (sum, over) = t[LIMBS].overflowing_add(carry);
        (t[LIMBS - 1], t[LIMBS]) = (sum, t[LIMBS + 1] + u64::from(over));
    }
    let top = t[LIMBS];
    let mut result: Number = std::array::from_fn(|i| t[i]);
    subtract_if_not_less(&mut result, n, top);
    result
}

pub fn modexp(units: u64) -> Option<u64> {
    let mut random = Random::new(13);
    let mut n: Number = std::array::from_fn(|_| random.next());
    (n[0], n[LIMBS - 1]) = (n[0] | 1, n[LIMBS - 1] | 1 << 63);
    let inverse = (0..6).fold(1u64, |x, _| x.wrapping_mul(2u64.wrapping_sub(n[0].wrapping_mul(x)))).wrapping_neg();
    let mut x: Number = std::array::from_fn(|_| random.next() >> 1);
    let base = x;
    for i in 0..units * 100 {
        x = montgomery(&x, &x, &n, inverse);
        if i % 3 == 0 {
            x = montgomery(&x, &base, &n, inverse);
        }
    }
    Some(x.iter().fold(0, |s, &w| mix(s, w)))
}

/// Divides in place; the remainder.
fn divide_small(number: &mut [u64], by: u64) -> u64 {
    number.iter_mut().rev().fold(0, |remainder, limb| {
        let wide = u128::from(remainder) << 64 | u128::from(*limb);
        *limb = (wide / u128::from(by)) as u64;
        (wide % u128::from(by)) as u64
    })
}

pub fn print(units: u64) -> Option<u64> {
    let mut sum = 0;
    for i in 0..units {
        // A factorial, then its decimal digits.
        let mut number = vec![1u64];
        for f in 2..300 + i % 8 {
            let mut carry = 0;
            for limb in &mut number {
                (*limb, carry) = multiply_add(*limb, f, 0, carry);
            }
            if carry != 0 {
                number.push(carry);
            }
        }
        while !number.is_empty() {
            sum = mix(sum, divide_small(&mut number, 1_000_000_000));
            while number.last() == Some(&0) {
                number.pop();
            }
        }
    }
    Some(sum)
}
