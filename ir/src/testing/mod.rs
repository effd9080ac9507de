//! For tests, here and of the back end: random blocks, and an environment that records all that a block does.
//!
//! Not part of the pipeline. Invariant: everything follows from a seed.

mod blocks;
mod fake;

use crate::helper::Helper;

pub use blocks::{Shape, random_block};
pub use fake::{Event, FakeEnv};

/// A small random-number generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    /// A number below `n` (which is not 0).
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 32) as usize % n.max(1)
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    /// One of `items`, which is not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
    /// A number of the kind that finds mistakes: small, all ones, single bits, anything.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => self.bits() & 0xf,
            2 => !(self.bits() & 0xf),
            3 => 1 << self.below(64),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.bits() as u32 as u64,
            6 => self.bits() as i8 as u64,
            _ => self.bits(),
        }
    }
}

/// Scrambles 64 bits.
#[must_use]
pub const fn mix(z: u64) -> u64 {
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// What a pure helper computes: as the instruction does, since the back end may use that.
#[must_use]
pub fn pure_helper(helper: Helper, [a, b, c, _]: [u64; 4]) -> u64 {
    match helper {
        Helper::Crc32 if c < 4 => {
            let mut crc = a as u32;
            for byte in &b.to_le_bytes()[..1 << c] {
                crc ^= u32::from(*byte);
                for _ in 0..8 {
                    crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                }
            }
            crc.into()
        }
        Helper::DivideWide if b < c => ((u128::from(b) << 64 | u128::from(a)) / u128::from(c)) as u64,
        Helper::DivideWide => a,
        Helper::Pdep | Helper::Pext => {
            let (mut r, mut k) = (0, 0);
            for i in (0..64).filter(|i| b >> i & 1 != 0) {
                let (from, to) = if helper == Helper::Pdep { (k, i) } else { (i, k) };
                r |= (a >> from & 1) << to;
                k += 1;
            }
            r
        }
        _ => [a, b, c].iter().fold(helper as u64, |h, &a| mix(h ^ a)),
    }
}
