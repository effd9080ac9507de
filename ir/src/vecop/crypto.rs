//! AES, carry-less multiplication, arithmetic in GF(2^8) and SHA, on the host's instructions where it has them.

use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make, zip};

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    if let Some(r) = crate::vecop::host::crypto(op, imm, a, b, c) {
        return r;
    }
    portable(op, imm, a, b, c)
}

fn portable(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    match op {
        Aesenc => mix_columns(shift_rows(sub_bytes(a, &SBOX), 1), [2, 3, 1, 1]) ^ b,
        Aesenclast => shift_rows(sub_bytes(a, &SBOX), 1) ^ b,
        Aesdec => mix_columns(shift_rows(sub_bytes(a, &INVERSE_SBOX), 3), [14, 11, 13, 9]) ^ b,
        Aesdeclast => shift_rows(sub_bytes(a, &INVERSE_SBOX), 3) ^ b,
        Aesimc => mix_columns(a, [14, 11, 13, 9]),
        Aeskeygenassist => {
            let x = u32::split(sub_bytes(a, &SBOX));
            let rotated = |w: u32| w.rotate_right(8) ^ u32::from(imm);
            u32::join([x[1], rotated(x[1]), x[3], rotated(x[3])])
        }
        Pclmulqdq => {
            let half = |v: u128, bit: u8| if imm & bit != 0 { v >> 64 } else { v & u128::from(u64::MAX) };
            let (x, y) = (half(a, 1), half(b, 0x10));
            (0..64).filter(|i| y >> i & 1 != 0).fold(0, |r, i| r ^ x << i)
        }
        Gf2p8mulb => zip(a, b, gmul),
        Gf2p8affineqb => affine(a, b, imm, |x| x),
        Gf2p8affineinvqb => affine(a, b, imm, inverse),
        _ => sha(op, imm, a, b, c),
    }
}

const fn xtime(x: u8) -> u8 {
    x << 1 ^ if x & 0x80 != 0 { 0x1b } else { 0 }
}

/// Product in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
const fn gmul(mut x: u8, mut y: u8) -> u8 {
    let mut r = 0;
    while y != 0 {
        if y & 1 != 0 {
            r ^= x;
        }
        x = xtime(x);
        y >>= 1;
    }
    r
}

/// The inverse in GF(2^8), 0 for 0: the 254th power.
fn inverse(x: u8) -> u8 {
    let mut r = 1;
    for _ in 0..254 {
        r = gmul(r, x);
    }
    r
}

/// Each byte's `f` times the bit matrix in the same quadword of `matrix`, whose byte 7 makes bit 0, plus `imm`.
fn affine(a: u128, matrix: u128, imm: u8, f: impl Fn(u8) -> u8) -> u128 {
    let (x, m) = (u8::split(a), u8::split(matrix));
    make(|i| {
        let v = f(x[i]);
        let row = |bit: usize| m[i / 8 * 8 + 7 - bit] & v;
        (0..8).fold(imm, |r, bit| r ^ ((row(bit).count_ones() as u8 & 1) << bit))
    })
}

/// FIPS 197's S-box: the inverse in GF(2^8), then an affine map.
const SBOX: [u8; 256] = {
    let mut table = [0x63; 256];
    // 3 generates the multiplicative group: p runs through it, q through the inverses (0xf6 is 3's).
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        p = gmul(p, 3);
        q = gmul(q, 0xf6);
        table[p as usize] = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4) ^ 0x63;
        if p == 1 {
            break;
        }
    }
    table
};

const INVERSE_SBOX: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[SBOX[i] as usize] = i as u8;
        i += 1;
    }
    table
};

fn sub_bytes(v: u128, table: &[u8; 256]) -> u128 {
    let x = u8::split(v);
    make(|i| table[usize::from(x[i])])
}

/// Row `r` (byte `r` of each column) moves by `r * step` columns.
fn shift_rows(v: u128, step: usize) -> u128 {
    let x = u8::split(v);
    make(|i| x[(i + i % 4 * step * 4) % 16])
}

/// Each column times the circulant matrix whose first row is `m`.
fn mix_columns(v: u128, m: [u8; 4]) -> u128 {
    let x = u8::split(v);
    make(|i| (0..4).fold(0, |r, k| r ^ gmul(x[i / 4 * 4 + k], m[(k + 4 - i % 4) % 4])))
}

/// SHA-1 and SHA-256 steps (SDM Vol 1, "Intel SHA Extensions").
fn sha(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let (x, y, w) = (u32::split(a), u32::split(b), u32::split(c));
    match op {
        Sha1rnds4 => sha1_rounds(imm & 3, x, y),
        Sha1nexte => u32::join([y[0], y[1], y[2], y[3].wrapping_add(x[3].rotate_left(30))]),
        Sha1msg1 => u32::join([x[0] ^ y[2], x[1] ^ y[3], x[2] ^ x[0], x[3] ^ x[1]]),
        Sha1msg2 => {
            let w16 = (x[3] ^ y[2]).rotate_left(1);
            let w17 = (x[2] ^ y[1]).rotate_left(1);
            let w18 = (x[1] ^ y[0]).rotate_left(1);
            u32::join([(x[0] ^ w16).rotate_left(1), w18, w17, w16])
        }
        Sha256rnds2 => sha256_rounds(x, y, w),
        Sha256msg1 => {
            let s0 = |v: u32| v.rotate_right(7) ^ v.rotate_right(18) ^ v >> 3;
            let next = [x[1], x[2], x[3], y[0]];
            make(|i| x[i].wrapping_add(s0(next[i])))
        }
        Sha256msg2 => {
            let s1 = |v: u32| v.rotate_right(17) ^ v.rotate_right(19) ^ v >> 10;
            let w16 = x[0].wrapping_add(s1(y[2]));
            let w17 = x[1].wrapping_add(s1(y[3]));
            u32::join([w16, w17, x[2].wrapping_add(s1(w16)), x[3].wrapping_add(s1(w17))])
        }
        _ => unreachable!("{op:?} is not a cryptographic op"),
    }
}

/// `x` holds A in the top lane down to D; `y` the message words, the first in the top lane, E already added to it.
fn sha1_rounds(group: u8, x: [u32; 4], y: [u32; 4]) -> u128 {
    let [mut d, mut c, mut b, mut a] = x;
    let mut e = 0u32;
    for w in y.into_iter().rev() {
        let (f, k) = match group {
            0 => (b & c ^ !b & d, 0x5a82_7999u32),
            1 => (b ^ c ^ d, 0x6ed9_eba1),
            2 => (b & c ^ b & d ^ c & d, 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6),
        };
        let next = f.wrapping_add(a.rotate_left(5)).wrapping_add(w).wrapping_add(e).wrapping_add(k);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    u32::join([d, c, b, a])
}

/// `x` holds C, D, G, H and `y` holds A, B, E, F from the top lane down; `w` two message words plus constants.
fn sha256_rounds(x: [u32; 4], y: [u32; 4], w: [u32; 4]) -> u128 {
    let [mut h, mut g, mut d, mut c] = x;
    let [mut f, mut e, mut b, mut a] = y;
    for wk in [w[0], w[1]] {
        let ch = e & f ^ !e & g;
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let maj = a & b ^ a & c ^ b & c;
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t = ch.wrapping_add(s1).wrapping_add(wk).wrapping_add(h);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t), c, b, a, t.wrapping_add(maj).wrapping_add(s0));
    }
    u32::join([f, e, b, a])
}

#[cfg(all(test, target_arch = "x86_64", not(portable_host)))]
mod tests {
    use super::*;

    /// The portable code against the host's instructions.
    #[test]
    fn portable_matches_host() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835u128;
        let mut next = || {
            seed = seed
                .wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645)
                .wrapping_add(0x5851_f42d_4c95_7f2d_1405_7b7e_f767_814f);
            seed ^ seed >> 61
        };
        let mut compared = 0;
        for op in VecOp::ALL.iter().copied().filter(|&o| VecOp::TABLE[o as usize].2 == crate::vecop::Group::Crypto) {
            for i in 0..500u32 {
                let (a, b, c) = (next(), next(), next());
                if let Some(h) = crate::vecop::host::crypto(op, i as u8, a, b, c) {
                    assert_eq!(portable(op, i as u8, a, b, c), h, "{op:?} {i}");
                    compared += 1;
                }
            }
        }
        println!("crypto: {compared} results compared with the host");
    }
}
