//! Strings: counting words, parsing and printing numbers, searching.

use crate::{Random, mix};
use std::collections::HashMap;
use std::fmt::Write;
use std::hash::{BuildHasherDefault, Hasher};

/// FNV-1a: the same order everywhere, and byte-wise as hashes of small programs are.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    }
}

/// Words of two to nine letters, some far more often than others.
fn prose(words: usize) -> String {
    let mut random = Random::new(5);
    let dictionary: Vec<String> = (0..2000)
        .map(|_| (0..2 + random.next() % 8).map(|_| char::from(b'a' + (random.next() % 26) as u8)).collect())
        .collect();
    let mut text = String::new();
    for i in 0..words {
        let (a, b) = (random.next() as usize % 2000, random.next() as usize % 2000);
        text.push_str(&dictionary[a.min(b)]);
        text.push(if i % 12 == 11 { '\n' } else { ' ' });
    }
    text
}

pub fn words(units: u64) -> Option<u64> {
    let (text, mut sum) = (prose(10_000), 0);
    for _ in 0..units {
        let mut counts: HashMap<&str, u32, BuildHasherDefault<Fnv>> = HashMap::default();
        for word in text.split_ascii_whitespace() {
            *counts.entry(word).or_default() += 1;
        }
        let mut sorted: Vec<_> = counts.into_iter().collect();
        sorted.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        sum = sorted.iter().fold(sum, |s, (w, n)| mix(s, w.len() as u64 + u64::from(*n)));
    }
    Some(sum)
}

pub fn parse_print(units: u64) -> Option<u64> {
    let (mut random, mut sum) = (Random::new(6), 0);
    for _ in 0..units {
        let mut text = String::new();
        for i in 0..500 {
            let n = random.next() >> (i % 50);
            let _ = write!(text, "{{\"id\": {n}, \"name\": \"item {:x}\", \"on\": {}}}, ", n & 0xffff, n & 1 == 0);
        }
        for field in text.split(['{', '}', ',', ':']).map(str::trim) {
            if let Ok(n) = field.parse::<u64>() {
                sum = mix(sum, n);
            } else if let Some(name) = field.strip_prefix("\"item ").and_then(|n| n.strip_suffix('"')) {
                sum = mix(sum, u64::from_str_radix(name, 16).unwrap_or(1));
            }
        }
    }
    Some(sum)
}

pub fn search(units: u64) -> Option<u64> {
    let (text, mut sum) = (prose(10_000), 0);
    for i in 0..units {
        let newlines = text.bytes().filter(|&b| b == b'\n').count();
        let needle = &text[(i as usize * 37) % 1000..][..9];
        let hits = text.matches(needle).count();
        let last = text.rfind("zq").unwrap_or(0);
        let upper = text.to_ascii_uppercase();
        let longest = upper.lines().map(str::len).max().unwrap_or(0);
        sum = mix(sum, (newlines + hits + last + longest) as u64);
    }
    Some(sum)
}
