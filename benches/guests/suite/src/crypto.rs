//! Hashes and ciphers: SHA-256 and ChaCha in plain code, CRC-32 and AES by tables, and the instructions for AES, SHA and
//! carry-less multiplication.
#![allow(unsafe_code)] // intrinsics

use crate::{Random, mix};
use std::arch::x86_64::*;

/// The first 32 bits of the fractional parts of the roots (square for the state, cube for the constants) of the primes.
fn roots(count: usize, root: fn(f64) -> f64) -> Vec<u32> {
    let prime = |n: &u32| !(2..*n).any(|d| n.is_multiple_of(d));
    (2..).filter(prime).take(count).map(|p| (root(f64::from(p)).fract() * 4_294_967_296.0) as u32).collect()
}

fn sha256_block(h: &mut [u32; 8], k: &[u32], block: &[u8]) {
    let mut w = [0u32; 64];
    for (x, bytes) in w.iter_mut().zip(block.chunks_exact(4)) {
        *x = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    for i in 16..64 {
        let (a, b) = (w[i - 15], w[i - 2]);
        let s0 = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
        let s1 = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
        w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
    }
    let mut v = *h;
    for i in 0..64 {
        let [a, b, c, d, e, f, g, x] = v;
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let t1 = x.wrapping_add(s1).wrapping_add((e & f) ^ (!e & g)).wrapping_add(k[i]).wrapping_add(w[i]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        v = [t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g];
    }
    h.iter_mut().zip(v).for_each(|(x, y)| *x = x.wrapping_add(y));
}

pub fn sha256(units: u64) -> Option<u64> {
    let (mut random, k) = (Random::new(10), roots(64, f64::cbrt));
    let mut h: [u32; 8] = roots(8, f64::sqrt).try_into().ok()?;
    let data: Vec<u8> = (0..64 * 256).map(|_| random.next() as u8).collect();
    for _ in 0..units {
        data.chunks_exact(64).for_each(|block| sha256_block(&mut h, &k, block));
    }
    Some(h.iter().fold(0, |s, &x| mix(s, u64::from(x))))
}

/// Multiplication by x in AES's field.
fn double(x: u8) -> u8 {
    (x << 1) ^ if x & 0x80 != 0 { 0x1b } else { 0 }
}

/// AES's S-box, from powers of the generator 3 and the affine map.
fn s_box() -> [u8; 256] {
    let (mut powers, mut logs, mut x) = ([0u8; 256], [0u8; 256], 1u8);
    for (i, power) in powers.iter_mut().enumerate() {
        *power = x;
        logs[usize::from(x)] = (i % 255) as u8;
        x ^= double(x);
    }
    std::array::from_fn(|i| {
        let inverse = if i == 0 { 0 } else { powers[(255 - usize::from(logs[i])) % 255] };
        (0..5).fold(0x63, |s, r| s ^ inverse.rotate_left(r))
    })
}

/// A round's four tables: S-box and column mix in one.
fn round_tables() -> [[u32; 256]; 4] {
    let s = s_box();
    std::array::from_fn(|t| {
        std::array::from_fn(|i| {
            let (one, two) = (s[i], double(s[i]));
            u32::from_le_bytes([two, one, one, two ^ one]).rotate_left(8 * t as u32)
        })
    })
}

pub fn tables(units: u64) -> Option<u64> {
    let mut random = Random::new(11);
    let crc_table: [u32; 256] =
        std::array::from_fn(|i| (0..8).fold(i as u32, |c, _| if c & 1 != 0 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 }));
    let t = round_tables();
    let keys: Vec<u32> = (0..44).map(|_| random.next() as u32).collect();
    let mut data: Vec<u32> = (0..2048).map(|_| random.next() as u32).collect();
    let mut crc = !0u32;
    for _ in 0..units {
        for block in data.chunks_exact_mut(4) {
            for key in keys.chunks_exact(4) {
                let column = |i: usize| {
                    let byte = |j: usize| (block[(i + j) % 4] >> (8 * j)) as usize & 255;
                    t[0][byte(0)] ^ t[1][byte(1)] ^ t[2][byte(2)] ^ t[3][byte(3)] ^ key[i]
                };
                let next = [column(0), column(1), column(2), column(3)];
                block.copy_from_slice(&next);
            }
        }
        for byte in data.iter().flat_map(|w| w.to_le_bytes()) {
            crc = crc_table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
        }
    }
    Some(u64::from(crc))
}

fn quarter(s: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    for (x, y, z, r) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        s[x] = s[x].wrapping_add(s[y]);
        s[z] = (s[z] ^ s[x]).rotate_left(r);
    }
}

pub fn chacha(units: u64) -> Option<u64> {
    let mut random = Random::new(12);
    let mut state: [u32; 16] = std::array::from_fn(|_| random.next() as u32);
    let mut sum = 0;
    for _ in 0..units * 100 {
        let mut s = state;
        for _ in 0..10 {
            (0..4).for_each(|i| quarter(&mut s, i, 4 + i, 8 + i, 12 + i));
            (0..4).for_each(|i| quarter(&mut s, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4));
        }
        s.iter_mut().zip(state).for_each(|(x, y)| *x = x.wrapping_add(y));
        sum = mix(sum, u64::from(s[3]) << 32 | u64::from(s[12]));
        state[12] = state[12].wrapping_add(1);
    }
    Some(sum)
}

#[target_feature(enable = "aes,sha,pclmulqdq,sse4.1,ssse3")]
fn with_instructions(units: u64) -> u64 {
    let mut blocks = [_mm_set1_epi64x(0x0123_4567_89ab_cdef); 4];
    let (mut abef, mut cdgh) = (_mm_set1_epi32(0x6a09_e667), _mm_set1_epi32(0x3c6e_f372));
    let mut tag = _mm_set_epi64x(5, 7);
    for i in 0..units * 100 {
        let key = _mm_set_epi64x(i as i64, 0x5555);
        for _ in 0..10 {
            for b in &mut blocks {
                *b = _mm_aesenc_si128(*b, key);
            }
        }
        for b in &mut blocks {
            *b = _mm_aesenclast_si128(*b, key);
        }
        let mut m = blocks;
        for _ in 0..16 {
            let k = _mm_add_epi32(m[0], key);
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32::<0x0e>(k));
            let next = _mm_add_epi32(_mm_sha256msg1_epu32(m[0], m[1]), _mm_alignr_epi8::<4>(m[3], m[2]));
            m = [m[1], m[2], m[3], _mm_sha256msg2_epu32(next, m[3])];
        }
        for b in blocks {
            tag = _mm_xor_si128(tag, b);
            let (low, high) = (_mm_clmulepi64_si128::<0x00>(tag, key), _mm_clmulepi64_si128::<0x11>(tag, key));
            tag = _mm_xor_si128(low, _mm_shuffle_epi32::<0x4e>(high));
        }
    }
    let all = [abef, cdgh, tag, blocks[0], blocks[3]];
    all.iter().fold(0, |s, &x| mix(mix(s, _mm_extract_epi64::<0>(x) as u64), _mm_extract_epi64::<1>(x) as u64))
}

pub fn instructions(units: u64) -> Option<u64> {
    let there = is_x86_feature_detected!("aes") && is_x86_feature_detected!("sha");
    let there = there && is_x86_feature_detected!("pclmulqdq") && is_x86_feature_detected!("sse4.1");
    // SAFETY: the features have just been looked for (SSSE3 comes with SSE4.1).
    there.then(|| unsafe { with_instructions(units) })
}
