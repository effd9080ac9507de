//! Random numbers for tests of random guests, the same each time, and how long such a test goes on.

use std::time::{Duration, Instant};

use super::*;

/// A small generator of numbers.
pub(super) struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
    /// A number of an unlikely kind.
    pub fn odd(&mut self, old: u64) -> u64 {
        match self.below(9) {
            0 => self.next(),
            1 | 2 => old ^ 1 << self.below(64),
            3 => u64::MAX << self.below(64),
            4 => self.next() >> self.below(64),
            // The end of the physical addresses, devices, and pages that are something already.
            5 => self.of(&[0x1000_0000, 1 << 45, (1 << 46) - 0x1000, 0xfee0_0000, EPT, VMCS, CODE]),
            6 => old.wrapping_add(1),
            // At and across the end of RAM.
            7 => crate::cpu::tests::RAM.wrapping_sub(self.below(5) * 8),
            _ => self.below(16),
        }
    }
}

/// The seeds of a test's rounds: `usual` of them, or as many as `TWOFOLD_SOAK_SECONDS` lasts, from `TWOFOLD_SOAK_SEED` on.
pub(super) fn rounds(usual: u64) -> impl Iterator<Item = u64> {
    let number = |name| std::env::var(name).ok().and_then(|s: String| s.parse::<u64>().ok());
    let end = number("TWOFOLD_SOAK_SECONDS").map(|s| Instant::now() + Duration::from_secs(s));
    let first = number("TWOFOLD_SOAK_SEED").unwrap_or(1);
    (0..).take_while(move |n| end.map_or(*n < usual, |end| Instant::now() < end)).map(move |n| first.wrapping_add(n))
}

/// Says the seed of the round if it panics.
pub(super) struct Named(pub u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

/// The generator of a round.
pub(super) fn numbers(seed: u64) -> Numbers {
    let mut n = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..8 {
        n.next();
    }
    n
}
