//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM Vol 1, "Intel SSE4.2 String and Text Processing").
//!
//! `imm`: bits 1:0 element (unsigned byte, unsigned word, signed byte, signed word), 3:2 aggregation, 5:4 polarity, 6 which
//! end the index counts from, or whether the mask is expanded to lanes.

use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make};

/// One of the two strings: elements widened to i32, and how many are valid.
struct Str {
    at: [i32; 16],
    len: usize,
}

/// `len` from a register: its absolute value, at most the number of elements. `None`: up to the first zero.
fn string(v: u128, imm: u8, len: Option<u64>) -> Str {
    let mut at = [0; 16];
    let n = elements(imm);
    for (i, e) in at.iter_mut().enumerate().take(n) {
        *e = match imm & 3 {
            0 => i32::from(u8::split(v)[i]),
            1 => i32::from(u16::split(v)[i]),
            2 => i32::from(i8::split(v)[i]),
            _ => i32::from(i16::split(v)[i]),
        };
    }
    let len = match len {
        Some(l) => (l as i64).unsigned_abs().min(n as u64) as usize,
        None => at[..n].iter().position(|&e| e == 0).unwrap_or(n),
    };
    Str { at, len }
}

fn elements(imm: u8) -> usize {
    if imm & 1 == 0 { 16 } else { 8 }
}

/// The comparison's bits, one an element of `b`, before the polarity (IntRes1).
fn aggregate(imm: u8, a: &Str, b: &Str) -> u16 {
    let n = elements(imm);
    let valid_a = &a.at[..a.len];
    let holds = |j: usize| match imm >> 2 & 3 {
        0 => j < b.len && valid_a.contains(&b.at[j]),
        1 => j < b.len && valid_a.chunks_exact(2).any(|r| r[0] <= b.at[j] && b.at[j] <= r[1]),
        2 => {
            if j < a.len && j < b.len {
                a.at[j] == b.at[j]
            } else {
                j >= a.len && j >= b.len
            }
        }
        _ => (0..n - j).all(|i| i >= a.len || i + j < b.len && a.at[i] == b.at[i + j]),
    };
    (0..n).fold(0, |r, j| r | u16::from(holds(j)) << j)
}

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    let explicit = matches!(op, PcmpestrIndex | PcmpestrMask | PcmpestrFlags);
    let x = string(a, imm, explicit.then_some(c as u64));
    let y = string(b, imm, explicit.then_some((c >> 64) as u64));
    let n = elements(imm);
    let all = (0xffffu32 >> (16 - n)) as u16;
    let one = aggregate(imm, &x, &y);
    let two = match imm >> 4 & 3 {
        1 => !one & all,
        3 => one ^ ((1u32 << y.len) - 1) as u16,
        _ => one,
    };
    match op {
        PcmpistrIndex | PcmpestrIndex => match (two, imm & 0x40) {
            (0, _) => n as u128,
            (_, 0) => two.trailing_zeros().into(),
            _ => (15 - two.leading_zeros()).into(),
        },
        PcmpistrMask | PcmpestrMask => match (imm & 0x40, n) {
            (0, _) => two.into(),
            (_, 16) => make(|i| if two >> i & 1 != 0 { 0xffu8 } else { 0 }),
            _ => make(|i| if two >> i & 1 != 0 { 0xffffu16 } else { 0 }),
        },
        _ => {
            let bit = |on: bool, flag: u128| if on { flag } else { 0 };
            bit(two != 0, 1) | bit(y.len < n, 0x40) | bit(x.len < n, 0x80) | bit(two & 1 != 0, 0x800)
        }
    }
}
