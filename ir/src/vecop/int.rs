//! Integer vector ops: arithmetic, comparison, shifts, bit tests.

use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make, map, zip};

const ZF: u128 = 0x40;
const CF: u128 = 1;

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128) -> u128 {
    use VecOp::*;
    match op {
        And => a & b,
        Or => a | b,
        Xor => a ^ b,
        Andn => !a & b,
        Paddb => zip(a, b, u8::wrapping_add),
        Paddw => zip(a, b, u16::wrapping_add),
        Paddd => zip(a, b, u32::wrapping_add),
        Paddq => zip(a, b, u64::wrapping_add),
        Psubb => zip(a, b, u8::wrapping_sub),
        Psubw => zip(a, b, u16::wrapping_sub),
        Psubd => zip(a, b, u32::wrapping_sub),
        Psubq => zip(a, b, u64::wrapping_sub),
        Paddsb => zip(a, b, i8::saturating_add),
        Paddsw => zip(a, b, i16::saturating_add),
        Paddusb => zip(a, b, u8::saturating_add),
        Paddusw => zip(a, b, u16::saturating_add),
        Psubsb => zip(a, b, i8::saturating_sub),
        Psubsw => zip(a, b, i16::saturating_sub),
        Psubusb => zip(a, b, u8::saturating_sub),
        Psubusw => zip(a, b, u16::saturating_sub),
        Pcmpeqb => zip(a, b, |x: u8, y| if x == y { !0 } else { 0 }),
        Pcmpeqw => zip(a, b, |x: u16, y| if x == y { !0 } else { 0 }),
        Pcmpeqd => zip(a, b, |x: u32, y| if x == y { !0 } else { 0 }),
        Pcmpeqq => zip(a, b, |x: u64, y| if x == y { !0 } else { 0 }),
        Pcmpgtb => zip(a, b, |x: i8, y| -i8::from(x > y)),
        Pcmpgtw => zip(a, b, |x: i16, y| -i16::from(x > y)),
        Pcmpgtd => zip(a, b, |x: i32, y| -i32::from(x > y)),
        Pcmpgtq => zip(a, b, |x: i64, y| -i64::from(x > y)),
        Pminub => zip(a, b, |x: u8, y| x.min(y)),
        Pminuw => zip(a, b, |x: u16, y| x.min(y)),
        Pminud => zip(a, b, |x: u32, y| x.min(y)),
        Pminsb => zip(a, b, |x: i8, y| x.min(y)),
        Pminsw => zip(a, b, |x: i16, y| x.min(y)),
        Pminsd => zip(a, b, |x: i32, y| x.min(y)),
        Pmaxub => zip(a, b, |x: u8, y| x.max(y)),
        Pmaxuw => zip(a, b, |x: u16, y| x.max(y)),
        Pmaxud => zip(a, b, |x: u32, y| x.max(y)),
        Pmaxsb => zip(a, b, |x: i8, y| x.max(y)),
        Pmaxsw => zip(a, b, |x: i16, y| x.max(y)),
        Pmaxsd => zip(a, b, |x: i32, y| x.max(y)),
        Pavgb => zip(a, b, |x: u8, y: u8| ((u16::from(x) + u16::from(y) + 1) >> 1) as u8),
        Pavgw => zip(a, b, |x: u16, y: u16| ((u32::from(x) + u32::from(y) + 1) >> 1) as u16),
        Pabsb => map(a, i8::wrapping_abs),
        Pabsw => map(a, i16::wrapping_abs),
        Pabsd => map(a, i32::wrapping_abs),
        Psignb => zip(a, b, |x: i8, y: i8| x.wrapping_mul(y.signum())),
        Psignw => zip(a, b, |x: i16, y: i16| x.wrapping_mul(y.signum())),
        Psignd => zip(a, b, |x: i32, y: i32| x.wrapping_mul(y.signum())),
        Ptest => (if a & b == 0 { ZF } else { 0 }) | if !a & b == 0 { CF } else { 0 },
        Pmovmskb => top_bits(&u8::split(a), 7),
        Movmskps => top_bits(&u32::split(a), 31),
        Movmskpd => top_bits(&u64::split(a), 63),
        Pslldq => {
            if imm < 16 {
                a << (u32::from(imm) * 8)
            } else {
                0
            }
        }
        Psrldq => {
            if imm < 16 {
                a >> (u32::from(imm) * 8)
            } else {
                0
            }
        }
        Psllw | Pslld | Psllq | Psrlw | Psrld | Psrlq | Psraw | Psrad => shift(op, a, b as u64),
        PsllwImm => shift(Psllw, a, imm.into()),
        PslldImm => shift(Pslld, a, imm.into()),
        PsllqImm => shift(Psllq, a, imm.into()),
        PsrlwImm => shift(Psrlw, a, imm.into()),
        PsrldImm => shift(Psrld, a, imm.into()),
        PsrlqImm => shift(Psrlq, a, imm.into()),
        PsrawImm => shift(Psraw, a, imm.into()),
        PsradImm => shift(Psrad, a, imm.into()),
        Psllvd => zip(a, b, |x: u32, n| x.checked_shl(n).unwrap_or(0)),
        Psllvq => zip(a, b, |x: u64, n| if n < 64 { x << n } else { 0 }),
        Psrlvd => zip(a, b, |x: u32, n| x.checked_shr(n).unwrap_or(0)),
        Psrlvq => zip(a, b, |x: u64, n| if n < 64 { x >> n } else { 0 }),
        Psravd => zip(a, b, |x: i32, n| x >> (n as u32).min(31)),
        Phaddw => horizontal(a, b, i16::wrapping_add),
        Phaddd => horizontal(a, b, i32::wrapping_add),
        Phaddsw => horizontal(a, b, i16::saturating_add),
        Phsubw => horizontal(a, b, i16::wrapping_sub),
        Phsubd => horizontal(a, b, i32::wrapping_sub),
        Phsubsw => horizontal(a, b, i16::saturating_sub),
        _ => multiply(op, imm, a, b),
    }
}

/// Multiplications and sums of absolute differences: what widens.
fn multiply(op: VecOp, imm: u8, a: u128, b: u128) -> u128 {
    use VecOp::*;
    match op {
        Pmullw => zip(a, b, u16::wrapping_mul),
        Pmulld => zip(a, b, u32::wrapping_mul),
        Pmulhw => zip(a, b, |x: i16, y: i16| ((i32::from(x) * i32::from(y)) >> 16) as i16),
        Pmulhuw => zip(a, b, |x: u16, y: u16| ((u32::from(x) * u32::from(y)) >> 16) as u16),
        Pmulhrsw => zip(a, b, |x: i16, y: i16| ((((i32::from(x) * i32::from(y)) >> 14) + 1) >> 1) as i16),
        Pmuludq => zip(a, b, |x: u64, y: u64| (x & 0xffff_ffff) * (y & 0xffff_ffff)),
        Pmuldq => zip(a, b, |x: i64, y: i64| i64::from(x as i32) * i64::from(y as i32)),
        Pmaddwd => {
            let (x, y) = (i16::split(a), i16::split(b));
            let p = |i: usize| i32::from(x[i]) * i32::from(y[i]);
            make(|i| p(2 * i).wrapping_add(p(2 * i + 1)))
        }
        Pmaddubsw => {
            let (x, y) = (u8::split(a), i8::split(b));
            let p = |i: usize| (i16::from(y[i])) * i16::from(x[i]);
            make(|i| p(2 * i).saturating_add(p(2 * i + 1)))
        }
        Psadbw => {
            let (x, y) = (u8::split(a), u8::split(b));
            make(|q| (8 * q..8 * q + 8).map(|i| u64::from(x[i].abs_diff(y[i]))).sum::<u64>())
        }
        Mpsadbw => {
            let (x, y) = (u8::split(a), u8::split(b));
            let (from, block) = (usize::from(imm >> 2 & 1) * 4, usize::from(imm & 3) * 4);
            make(|i| (0..4).map(|j| u16::from(x[from + i + j].abs_diff(y[block + j]))).sum::<u16>())
        }
        Phminposuw => {
            let min = u16::split(a).into_iter().zip(0u128..).min().unwrap_or_default();
            u128::from(min.0) | min.1 << 16
        }
        _ => unreachable!("{op:?} is not an integer op"),
    }
}

fn shift(op: VecOp, a: u128, count: u64) -> u128 {
    use VecOp::*;
    let n = u32::try_from(count).unwrap_or(u32::MAX);
    match op {
        Psllw => map(a, |x: u16| x.checked_shl(n).unwrap_or(0)),
        Pslld => map(a, |x: u32| x.checked_shl(n).unwrap_or(0)),
        Psllq => map(a, |x: u64| x.checked_shl(n).unwrap_or(0)),
        Psrlw => map(a, |x: u16| x.checked_shr(n).unwrap_or(0)),
        Psrld => map(a, |x: u32| x.checked_shr(n).unwrap_or(0)),
        Psrlq => map(a, |x: u64| x.checked_shr(n).unwrap_or(0)),
        Psraw => map(a, |x: i16| x >> n.min(15)),
        _ => map(a, |x: i32| x >> n.min(31)),
    }
}

/// `f` of neighbouring lanes: `a`'s pairs make the low half, `b`'s the high half.
fn horizontal<L: Lane>(a: u128, b: u128, f: impl Fn(L, L) -> L) -> u128 {
    let (x, y) = (L::split(a), L::split(b));
    let (x, y) = (x.as_ref(), y.as_ref());
    let half = x.len() / 2;
    make(|i| if i < half { f(x[2 * i], x[2 * i + 1]) } else { f(y[2 * (i - half)], y[2 * (i - half) + 1]) })
}

fn top_bits<T: Copy + Into<u64>>(lanes: &[T], top: u32) -> u128 {
    lanes.iter().enumerate().fold(0, |r, (i, &x)| r | u128::from(x.into() >> top & 1) << i)
}
