//! Memory: the C library's copies and fills at many sizes, the string instructions, and trees of small allocations.
#![allow(unsafe_code)] // the string instructions

use crate::{Random, mix};
use std::collections::BTreeMap;
use std::hint::black_box;

pub fn copy(units: u64) -> Option<u64> {
    let mut random = Random::new(7);
    let (mut a, mut b) = (vec![0u8; 1 << 17], vec![0u8; 1 << 17]);
    a.iter_mut().for_each(|x| *x = random.next() as u8);
    let mut sum = 0;
    for _ in 0..units {
        for _ in 0..1000 {
            let bits = random.next();
            let length = (bits as usize & 0xffff) >> (bits >> 60);
            let (from, to) = ((bits >> 16) as usize & 0xffff, (bits >> 32) as usize & 0xffff);
            b[to..to + length].copy_from_slice(&a[from..from + length]);
            a.copy_within(to..to + length, from);
            b[from..from + length / 4].fill(bits as u8);
            sum = mix(sum, u64::from(black_box(&a[from..from + length]) == black_box(&b[to..to + length])));
        }
    }
    Some(b.chunks(97).fold(sum, |s, c| mix(s, u64::from(c[0]))))
}

fn rep_movs(to: &mut [u8], from: &[u8]) {
    let n = to.len().min(from.len());
    // SAFETY: `n` bytes of both slices.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to.as_mut_ptr() => _, inout("rsi") from.as_ptr() => _)
    };
}

fn rep_stos(to: &mut [u8], value: u64) {
    // SAFETY: whole quadwords of the slice.
    unsafe {
        std::arch::asm!("rep stosq", inout("rcx") to.len() / 8 => _, inout("rdi") to.as_mut_ptr() => _, in("rax") value)
    };
}

fn rep_scas(within: &[u8], wanted: u8) -> usize {
    let mut left = within.len();
    // SAFETY: reads at most the slice.
    unsafe {
        std::arch::asm!("repne scasb", inout("rcx") left, inout("rdi") within.as_ptr() => _, in("al") wanted);
    };
    within.len() - left
}

fn rep_cmps(a: &[u8], b: &[u8]) -> usize {
    let n = a.len().min(b.len());
    let mut left = n;
    // SAFETY: reads at most `n` bytes of both slices.
    unsafe {
        std::arch::asm!("cmp rcx, rcx", "repe cmpsb", inout("rcx") left,
            inout("rdi") a.as_ptr() => _, inout("rsi") b.as_ptr() => _);
    };
    n - left
}

pub fn rep(units: u64) -> Option<u64> {
    let mut random = Random::new(8);
    let (mut a, mut b) = (vec![1u8; 1 << 16], vec![2u8; 1 << 16]);
    let mut sum = 0;
    for _ in 0..units {
        for _ in 0..1000 {
            let bits = random.next();
            let length = (bits as usize & 0x3fff) >> (bits >> 61 << 1);
            let (from, to) = ((bits >> 16) as usize & 0x7fff, (bits >> 32) as usize & 0x7fff);
            rep_stos(&mut a[from..from + length], bits);
            rep_movs(&mut b[to..to + length], &a[from..from + length]);
            let short = length.min(64);
            sum = mix(sum, rep_scas(&b[to..to + short], bits as u8) as u64);
            sum = mix(sum, rep_cmps(&a[from..from + short], &b[to..to + short]) as u64);
        }
    }
    Some(b.chunks(97).fold(sum, |s, c| mix(s, u64::from(c[0]))))
}

#[derive(Default)]
struct Node {
    key: u64,
    children: [Option<Box<Node>>; 2],
}

fn insert(mut at: &mut Option<Box<Node>>, key: u64) {
    while let Some(node) = at {
        at = &mut node.children[usize::from(key > node.key)];
    }
    *at = Some(Box::new(Node { key, ..Node::default() }));
}

fn walk(at: &Option<Box<Node>>) -> u64 {
    at.as_ref().map_or(1, |n| mix(walk(&n.children[0]), n.key).wrapping_add(walk(&n.children[1])))
}

pub fn trees(units: u64) -> Option<u64> {
    let (mut random, mut sum) = (Random::new(9), 0);
    for _ in 0..units {
        let mut root = None;
        (0..2000).for_each(|_| insert(&mut root, random.next()));
        sum = mix(sum, walk(&root));
        let mut map = BTreeMap::new();
        for i in 0..2000u64 {
            map.insert(random.next() % 4096, vec![i; (i % 17) as usize]);
            if i % 3 == 0 {
                map.pop_first();
            }
        }
        sum = map.iter().fold(sum, |s, (k, v)| mix(s, *k + v.len() as u64));
    }
    Some(sum)
}
