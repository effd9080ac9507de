//! Vector ops that move lanes: pack, unpack, shuffle, blend, insert, extract, widen.

use crate::vecop::VecOp;
use crate::vecop::lanes::{Lane, make, zip};

pub(super) fn eval(op: VecOp, imm: u8, a: u128, b: u128, c: u128) -> u128 {
    use VecOp::*;
    match op {
        Packsswb => pack(a, b, |x: i16| x.clamp(-128, 127) as i8),
        Packssdw => pack(a, b, |x: i32| x.clamp(-32768, 32767) as i16),
        Packuswb => pack(a, b, |x: i16| x.clamp(0, 255) as u8),
        Packusdw => pack(a, b, |x: i32| x.clamp(0, 65535) as u16),
        Punpcklbw => unpack::<u8>(a, b, false),
        Punpcklwd => unpack::<u16>(a, b, false),
        Punpckldq => unpack::<u32>(a, b, false),
        Punpcklqdq => unpack::<u64>(a, b, false),
        Punpckhbw => unpack::<u8>(a, b, true),
        Punpckhwd => unpack::<u16>(a, b, true),
        Punpckhdq => unpack::<u32>(a, b, true),
        Punpckhqdq => unpack::<u64>(a, b, true),
        Pshufb => {
            let x = u8::split(a);
            zip(0, b, |_, i: u8| if i & 0x80 != 0 { 0 } else { x[usize::from(i & 15)] })
        }
        Pshufd => {
            let x = u32::split(a);
            make(|i| x[pick(imm, i)])
        }
        Pshuflw => {
            let x = u16::split(a);
            make(|i| if i < 4 { x[pick(imm, i)] } else { x[i] })
        }
        Pshufhw => {
            let x = u16::split(a);
            make(|i| if i < 4 { x[i] } else { x[4 + pick(imm, i - 4)] })
        }
        Shufps => {
            let (x, y) = (u32::split(a), u32::split(b));
            make(|i| if i < 2 { x[pick(imm, i)] } else { y[pick(imm, i)] })
        }
        Shufpd => {
            let (x, y) = (u64::split(a), u64::split(b));
            make(|i| if i == 0 { x[usize::from(imm & 1)] } else { y[usize::from(imm >> 1 & 1)] })
        }
        Palignr => match u32::from(imm) * 8 {
            0 => b,
            n @ 1..=127 => b >> n | a << (128 - n),
            n @ 128..=255 => a >> (n - 128),
            _ => 0,
        },
        Pinsrb => insert(a, b, 8, imm),
        Pinsrw => insert(a, b, 16, imm),
        Pinsrd => insert(a, b, 32, imm),
        Pinsrq => insert(a, b, 64, imm),
        Pextrb => u128::from((a >> (u32::from(imm & 15) * 8)) as u8),
        Pextrw => u128::from((a >> (u32::from(imm & 7) * 16)) as u16),
        Pextrd => u128::from((a >> (u32::from(imm & 3) * 32)) as u32),
        Pextrq => u128::from((a >> (u32::from(imm & 1) * 64)) as u64),
        Insertps => {
            let mut x = u32::split(a);
            x[usize::from(imm >> 4 & 3)] = u32::split(b)[usize::from(imm >> 6)];
            make(|i| if imm >> i & 1 != 0 { 0 } else { x[i] })
        }
        Pblendvb => blend::<u8>(a, b, |i| u8::split(c)[i] >> 7 != 0),
        Blendvps => blend::<u32>(a, b, |i| u32::split(c)[i] >> 31 != 0),
        Blendvpd => blend::<u64>(a, b, |i| u64::split(c)[i] >> 63 != 0),
        Pblendw => blend::<u16>(a, b, |i| imm >> i & 1 != 0),
        Blendps => blend::<u32>(a, b, |i| imm >> i & 1 != 0),
        Blendpd => blend::<u64>(a, b, |i| imm >> i & 1 != 0),
        Movss => blend::<u32>(a, b, |i| i == 0),
        Movsd => blend::<u64>(a, b, |i| i == 0),
        Pmovsxbw => widen(a, |x: i8| i16::from(x)),
        Pmovsxbd => widen(a, |x: i8| i32::from(x)),
        Pmovsxbq => widen(a, |x: i8| i64::from(x)),
        Pmovsxwd => widen(a, |x: i16| i32::from(x)),
        Pmovsxwq => widen(a, |x: i16| i64::from(x)),
        Pmovsxdq => widen(a, |x: i32| i64::from(x)),
        Pmovzxbw => widen(a, |x: u8| u16::from(x)),
        Pmovzxbd => widen(a, |x: u8| u32::from(x)),
        Pmovzxbq => widen(a, |x: u8| u64::from(x)),
        Pmovzxwd => widen(a, |x: u16| u32::from(x)),
        Pmovzxwq => widen(a, |x: u16| u64::from(x)),
        Pmovzxdq => widen(a, |x: u32| u64::from(x)),
        Permilps => {
            let x = u32::split(a);
            zip(0, b, |_, i: u32| x[i as usize & 3])
        }
        Permilpd => {
            let x = u64::split(a);
            zip(0, b, |_, i: u64| x[i as usize >> 1 & 1])
        }
        Permd => {
            let (x, y) = (u32::split(a), u32::split(b));
            zip(0, c, |_, i: u32| if i & 4 == 0 { x[i as usize & 3] } else { y[i as usize & 3] })
        }
        _ => unreachable!("{op:?} is not a shuffle"),
    }
}

/// Two-bit selector `i` of `imm`.
fn pick(imm: u8, i: usize) -> usize {
    usize::from(imm >> (2 * i) & 3)
}

/// `f` of the lanes of `a`, then of `b`, in lanes of half the width.
fn pack<W: Lane, N: Lane>(a: u128, b: u128, f: impl Fn(W) -> N) -> u128 {
    let (x, y) = (W::split(a), W::split(b));
    let (x, y) = (x.as_ref(), y.as_ref());
    make(|i| if i < x.len() { f(x[i]) } else { f(y[i - x.len()]) })
}

/// Lanes of the low (or high) halves of `a` and `b` in turn.
fn unpack<L: Lane>(a: u128, b: u128, high: bool) -> u128 {
    let (x, y) = (L::split(a), L::split(b));
    let (x, y) = (x.as_ref(), y.as_ref());
    let from = if high { x.len() / 2 } else { 0 };
    make(|i| if i % 2 == 0 { x[from + i / 2] } else { y[from + i / 2] })
}

fn insert(a: u128, value: u128, bits: u32, lane: u8) -> u128 {
    let shift = u32::from(lane) * bits % 128;
    let mask = u128::MAX >> (128 - bits);
    a & !(mask << shift) | (value & mask) << shift
}

fn blend<L: Lane>(a: u128, b: u128, second: impl Fn(usize) -> bool) -> u128 {
    let (x, y) = (L::split(a), L::split(b));
    make(|i| if second(i) { y.as_ref()[i] } else { x.as_ref()[i] })
}

/// `f` of the lowest lanes, in wider lanes.
fn widen<N: Lane, W: Lane>(a: u128, f: impl Fn(N) -> W) -> u128 {
    let x = N::split(a);
    make(|i| f(x.as_ref()[i]))
}
