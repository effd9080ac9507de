//! Raw memory at fixed addresses that translated code reads, and sets of entry numbers that are quick to walk and to clear.
//!
//! Place in the pipeline: under [`crate::tlb`] and [`crate::jump`]. Invariant: an array's memory never moves while it lives, and
//! what was never written, or was given back, is zero.
#![allow(unsafe_code)] // What translated code reads has no owner that Rust's references could show.

use memmap2::{MmapOptions, MmapRaw};

/// A fixed piece of raw memory for values that translated code reads.
pub(crate) struct RawArray<T: Copy> {
    map: MmapRaw,
    len: usize,
    _of: std::marker::PhantomData<T>,
}

impl<T: Copy> RawArray<T> {
    /// Room for `len` values; only what is written is committed.
    pub fn new(len: usize) -> std::io::Result<Self> {
        let mut options = MmapOptions::new();
        options.len(len * size_of::<T>());
        #[cfg(unix)]
        options.no_reserve_swap();
        let map = options.map_anon()?.into();
        Ok(Self { map, len, _of: std::marker::PhantomData })
    }

    /// Asks the host for large pages in what is written from now on.
    pub fn want_huge(&self) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn address(&self) -> u64 {
        self.map.as_mut_ptr().expose_provenance() as u64
    }

    #[inline]
    pub fn get(&self, i: usize) -> T {
        assert!(i < self.len);
        // SAFETY: in bounds; the mapping is page-aligned, zeroed or written by `set`, and every bit pattern is a `T` here
        // (both instances are structs of four `u64`). Translated code never writes to it.
        unsafe { self.map.as_mut_ptr().cast::<T>().add(i).read() }
    }

    #[inline]
    pub fn set(&self, i: usize, value: T) {
        assert!(i < self.len);
        // SAFETY: as in `get`; only the owning vCPU's thread writes, and not while it runs translated code.
        unsafe { self.map.as_mut_ptr().cast::<T>().add(i).write(value) }
    }

    /// Gives the memory of the values from `first` on back to the host, as far as it can: they are zero then. False when
    /// they stay what they are.
    pub fn give_back(&self, first: usize) -> bool {
        let (from, all) = (first * size_of::<T>(), self.len * size_of::<T>());
        #[cfg(target_os = "linux")]
        if from < all && from.is_multiple_of(4096) {
            // SAFETY: within the mapping, which is private and anonymous; nobody holds a reference into it.
            let advised =
                unsafe { libc::madvise(self.map.as_mut_ptr().add(from).cast(), all - from, libc::MADV_DONTNEED) };
            return advised == 0;
        }
        from >= all
    }
}

/// Calls `f` with every member of the word `bits` of number `w`.
#[inline]
pub(crate) fn each_bit(w: usize, mut bits: u64, mut f: impl FnMut(usize)) {
    while bits != 0 {
        f(w * 64 + bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// A set of small numbers. Walking and clearing it takes time by what is in it.
pub(crate) struct Bits {
    words: Vec<u64>,
    /// Which words may have members.
    some: Vec<u64>,
}

impl Bits {
    /// For numbers below `n`.
    pub fn new(n: usize) -> Self {
        let words = n.div_ceil(64);
        Self { words: vec![0; words], some: vec![0; words.div_ceil(64)] }
    }

    #[inline]
    pub fn insert(&mut self, i: usize) {
        let w = i / 64;
        if let (Some(word), Some(some)) = (self.words.get_mut(w), self.some.get_mut(w / 64)) {
            *word |= 1 << (i % 64);
            *some |= 1 << (w % 64);
        }
    }

    #[inline]
    pub fn remove(&mut self, i: usize) {
        if let Some(word) = self.words.get_mut(i / 64) {
            *word &= !(1 << (i % 64));
        }
    }

    #[inline]
    pub fn assign(&mut self, i: usize, on: bool) {
        if on {
            self.insert(i);
        } else {
            self.remove(i);
        }
    }

    #[inline]
    pub fn has(&self, i: usize) -> bool {
        self.words.get(i / 64).is_some_and(|w| w >> (i % 64) & 1 != 0)
    }

    #[inline]
    pub fn word(&self, w: usize) -> u64 {
        self.words.get(w).copied().unwrap_or(0)
    }

    /// Calls `f` with the number of each word of group `g` (4096 numbers) that may have members.
    #[inline]
    pub fn words_in(&mut self, g: usize, mut f: impl FnMut(&mut Self, usize)) {
        each_bit(g, self.some.get(g).copied().unwrap_or(0), |w| {
            f(self, w);
            if self.word(w) == 0 {
                self.some[g] &= !(1 << (w % 64));
            }
        });
    }

    /// The same for all words.
    #[inline]
    pub fn each_word(&mut self, mut f: impl FnMut(&mut Self, usize)) {
        (0..self.some.len()).for_each(|g| self.words_in(g, &mut f));
    }

    /// Takes out the members `bits` of word `w`.
    #[inline]
    pub fn remove_word(&mut self, w: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(w) {
            *word &= !bits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_walked_by_what_is_in_them() {
        let mut b = Bits::new(1 << 15);
        let members = [0, 63, 64, 4095, 4096, 20_000, (1 << 15) - 1];
        members.iter().for_each(|&i| b.insert(i));
        b.insert(1 << 15);
        b.insert(77);
        b.remove(77);
        let mut words = 0;
        let mut found = Vec::new();
        b.each_word(|b, w| {
            words += 1;
            each_bit(w, b.word(w), |i| found.push(i));
        });
        assert_eq!((found.as_slice(), words), (&members[..], 6));
        b.each_word(|b, w| b.remove_word(w, u64::MAX));
        b.each_word(|_, _| panic!("empty"));
        assert!(!b.has(0) && b.word(0) == 0 && !b.has(1 << 30));
    }

    #[test]
    fn memory_given_back_is_zero() {
        let a = RawArray::<[u64; 4]>::new(1 << 12).unwrap();
        (0..a.len()).for_each(|i| a.set(i, [7; 4]));
        if a.give_back(1 << 11) {
            assert_eq!(a.get(1 << 11), [0; 4]);
        }
        assert_eq!(a.get((1 << 11) - 1), [7; 4]);
        assert!(a.give_back(1 << 12));
    }
}
