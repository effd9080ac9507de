//! Vectors: matrix products with SSE2 and with FMA, and pixels with SSE2 and AVX2.
#![allow(unsafe_code)] // intrinsics

use crate::{Random, mix};
use std::arch::x86_64::*;

const N: usize = 64;

fn matrices() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut random = Random::new(14);
    let mut matrix = || (0..N * N).map(|_| (random.next() % 1000) as f32 / 500.0 - 1.0).collect::<Vec<f32>>();
    (matrix(), matrix(), vec![0.0; N * N])
}

fn checksum(c: &[f32]) -> Option<u64> {
    Some(c.iter().fold(0, |s, x| mix(s, u64::from(x.to_bits()))))
}

/// c = a * b + c / 2
fn multiply_sse2(a: &[f32], b: &[f32], c: &mut [f32]) {
    for i in 0..N {
        for j in (0..N).step_by(8) {
            // SAFETY: rows have `N` elements, a multiple of eight.
            unsafe {
                let half = _mm_set1_ps(0.5);
                let out = c.as_mut_ptr().add(i * N + j);
                let mut x = _mm_mul_ps(_mm_loadu_ps(out), half);
                let mut y = _mm_mul_ps(_mm_loadu_ps(out.add(4)), half);
                for k in 0..N {
                    let factor = _mm_set1_ps(*a.get_unchecked(i * N + k));
                    let row = b.as_ptr().add(k * N + j);
                    x = _mm_add_ps(x, _mm_mul_ps(factor, _mm_loadu_ps(row)));
                    y = _mm_add_ps(y, _mm_mul_ps(factor, _mm_loadu_ps(row.add(4))));
                }
                _mm_storeu_ps(out, x);
                _mm_storeu_ps(out.add(4), y);
            }
        }
    }
}

pub fn matrix_sse2(units: u64) -> Option<u64> {
    let (a, b, mut c) = matrices();
    (0..units).for_each(|_| multiply_sse2(&a, &b, &mut c));
    checksum(&c)
}

#[target_feature(enable = "avx2,fma")]
fn multiply_fma(a: &[f32], b: &[f32], c: &mut [f32]) {
    for i in 0..N {
        for j in (0..N).step_by(16) {
            // SAFETY: rows have `N` elements, a multiple of sixteen.
            unsafe {
                let half = _mm256_set1_ps(0.5);
                let out = c.as_mut_ptr().add(i * N + j);
                let mut x = _mm256_mul_ps(_mm256_loadu_ps(out), half);
                let mut y = _mm256_mul_ps(_mm256_loadu_ps(out.add(8)), half);
                for k in 0..N {
                    let factor = _mm256_set1_ps(*a.get_unchecked(i * N + k));
                    let row = b.as_ptr().add(k * N + j);
                    x = _mm256_fmadd_ps(factor, _mm256_loadu_ps(row), x);
                    y = _mm256_fmadd_ps(factor, _mm256_loadu_ps(row.add(8)), y);
                }
                _mm256_storeu_ps(out, x);
                _mm256_storeu_ps(out.add(8), y);
            }
        }
    }
}

pub fn matrix_fma(units: u64) -> Option<u64> {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return None;
    }
    let (a, b, mut c) = matrices();
    // SAFETY: the features have just been looked for.
    (0..units).for_each(|_| unsafe { multiply_fma(&a, &b, &mut c) });
    checksum(&c)
}

fn pictures() -> (Vec<u8>, Vec<u8>) {
    let mut random = Random::new(15);
    let mut picture = || (0..32 * 1024).map(|_| random.next() as u8).collect::<Vec<u8>>();
    (picture(), picture())
}

/// Blends `b` into `a` by a weight, and sums the absolute differences.
fn blend_sse2(a: &mut [u8], b: &[u8], weight: i16) -> u64 {
    // SAFETY: SSE2 is always there; chunks have sixteen bytes.
    unsafe {
        let (zero, w) = (_mm_setzero_si128(), _mm_set1_epi16(weight));
        let mut total = zero;
        for (x, y) in a.chunks_exact_mut(16).zip(b.chunks_exact(16)) {
            let (p, q) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(y.as_ptr().cast()));
            let blend = |p: __m128i, q: __m128i| {
                let d = _mm_mullo_epi16(_mm_sub_epi16(q, p), w);
                _mm_add_epi16(p, _mm_srai_epi16::<8>(d))
            };
            let low = blend(_mm_unpacklo_epi8(p, zero), _mm_unpacklo_epi8(q, zero));
            let high = blend(_mm_unpackhi_epi8(p, zero), _mm_unpackhi_epi8(q, zero));
            let r = _mm_max_epu8(_mm_packus_epi16(low, high), _mm_avg_epu8(p, q));
            total = _mm_add_epi64(total, _mm_sad_epu8(r, p));
            _mm_storeu_si128(x.as_mut_ptr().cast(), r);
        }
        (_mm_cvtsi128_si64(total) as u64).wrapping_add(_mm_cvtsi128_si64(_mm_srli_si128::<8>(total)) as u64)
    }
}

pub fn pixels_sse2(units: u64) -> Option<u64> {
    let (mut a, b) = pictures();
    Some((0..units).fold(0, |s, i| {
        if i % 8 == 0 {
            a.reverse();
        }
        mix(s, blend_sse2(&mut a, &b, (i % 100) as i16))
    }))
}

#[target_feature(enable = "avx2")]
fn shuffle_avx2(a: &mut [u8], b: &[u8], turn: i8) -> u64 {
    let mut total = _mm256_setzero_si256();
    let order = _mm256_add_epi8(_mm256_set1_epi64x(0x0706_0504_0302_0100), _mm256_set1_epi8(turn & 7));
    for (x, y) in a.chunks_exact_mut(32).zip(b.chunks_exact(32)) {
        // SAFETY: chunks have 32 bytes.
        unsafe {
            let (p, q) = (_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(y.as_ptr().cast()));
            let s = _mm256_shuffle_epi8(_mm256_xor_si256(p, q), order);
            let m = _mm256_maddubs_epi16(s, q);
            let k = _mm256_cmpgt_epi8(p, q);
            let r = _mm256_blendv_epi8(_mm256_subs_epu8(p, m), _mm256_add_epi8(s, p), k);
            total = _mm256_add_epi64(total, _mm256_sad_epu8(r, p));
            _mm256_storeu_si256(x.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0x93>(r));
        }
    }
    let half = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256::<1>(total));
    (_mm_cvtsi128_si64(half) as u64).wrapping_add(_mm_extract_epi64::<1>(half) as u64)
}

pub fn pixels_avx2(units: u64) -> Option<u64> {
    if !is_x86_feature_detected!("avx2") {
        return None;
    }
    let (mut a, b) = pictures();
    // SAFETY: AVX2 has just been looked for.
    Some((0..units).fold(0, |s, i| mix(s, unsafe { shuffle_avx2(&mut a, &b, i as i8) })))
}
