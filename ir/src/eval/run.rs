//! Runs the words of a lowered block: one loop, one match.
//!
//! Invariants: code has no jumps, so the loop is an iteration over a slice; operands are one-byte indices into 256 words,
//! so there are no bounds checks; an op reads all its operands before it writes.

use twofold_arch::{CcOp, CondCode, Exception, Loc};

use super::env::{Abandon, Env, File};
use super::word::{code, record};
use super::{Code, Leave, Target, reference, scalar};
use crate::block::IndirectKind;
use crate::helper::Helper;
use crate::op::{BinOp, IntCc, MemFlags, RmwOp, Ty, UnOp};
use crate::text::VECTORS;
use crate::vecop::{self, VecOp};

#[inline(always)]
const fn d(w: u64) -> usize {
    (w >> 8) as u8 as usize
}
#[inline(always)]
const fn a(w: u64) -> usize {
    (w >> 16) as u8 as usize
}
#[inline(always)]
const fn b(w: u64) -> usize {
    (w >> 24) as u8 as usize
}
/// The immediate, sign-extended.
#[inline(always)]
const fn imm(w: u64) -> u64 {
    ((w as i64) >> 32) as u64
}
/// Byte `n` of the immediate.
#[inline(always)]
const fn byte(w: u64, n: u32) -> usize {
    (w >> (32 + 8 * n)) as u8 as usize
}
#[inline(always)]
const fn flags(x: usize) -> MemFlags {
    MemFlags(x as u8)
}
#[inline(always)]
const fn ty(x: usize) -> Ty {
    match x {
        0 => Ty::I8,
        1 => Ty::I16,
        2 => Ty::I32,
        _ => Ty::I64,
    }
}
#[inline(always)]
fn int_cc(x: usize) -> IntCc {
    IntCc::ALL[x % IntCc::ALL.len()]
}
#[inline(always)]
fn get128(f: &File, i: usize) -> u128 {
    u128::from(f[i & 255]) | u128::from(f[(i + 1) & 255]) << 64
}
#[inline(always)]
fn put128(f: &mut File, i: usize, v: u128) {
    f[i & 255] = v as u64;
    f[(i + 1) & 255] = (v >> 64) as u64;
}

/// A two-operand op on words.
#[inline(always)]
fn bin(f: &mut File, w: u64, op: impl Fn(u64, u64) -> u64) {
    let r = op(f[a(w)], f[b(w)]);
    f[d(w)] = r;
    f[byte(w, 0)] = r;
}
#[inline(always)]
fn bin32(f: &mut File, w: u64, op: impl Fn(u32, u32) -> u32) {
    bin(f, w, |a, b| u64::from(op(a as u32, b as u32)));
}
/// A two-operand op with an immediate.
#[inline(always)]
fn bini(f: &mut File, w: u64, op: impl Fn(u64, u64) -> u64) {
    let r = op(f[a(w)], imm(w));
    f[d(w)] = r;
    f[b(w)] = r;
}
#[inline(always)]
fn bini32(f: &mut File, w: u64, op: impl Fn(u32, u32) -> u32) {
    bini(f, w, |a, b| u64::from(op(a as u32, b as u32)));
}
/// Replaces `bits` bits of a word from bit `shift` on.
#[inline(always)]
fn insert(old: u64, v: u64, shift: u32, bits: u32) -> u64 {
    let mask = u64::MAX >> (64 - bits.clamp(1, 64));
    let shift = shift & 63;
    old & !(mask << shift) | (v & mask) << shift
}

const fn file_word(loc: Loc) -> usize {
    ((loc.0 - super::FILE_BASE) / 8) as usize
}

const CC_DST: usize = file_word(Loc::CC_DST);
const CC_SRC: usize = file_word(Loc::CC_SRC);
const CC_SRC2: usize = file_word(Loc::CC_SRC2);
const CC_OP: usize = file_word(Loc::CC_OP);

/// The six flags from the lazy ones.
#[inline(never)]
fn lazy_flags(f: &File) -> u64 {
    twofold_arch::flags::arith_flags(CcOp(f[CC_OP] as u8), f[CC_DST], f[CC_SRC], f[CC_SRC2])
}
#[inline(never)]
fn cond(f: &File, cc: usize) -> bool {
    CondCode::ALL[cc & 15].holds(lazy_flags(f))
}

macro_rules! exits {
    ($all:ident, $file:ident, $w:ident, $rhs:expr, $index:expr, |$x:ident, $y:ident| $holds:expr) => {{
        let shift = d($w) as u32 & 63;
        let $x = $file[a($w)] << shift;
        let $y = $rhs << shift;
        if $holds {
            return leave($all, $file, $index);
        }
    }};
}

impl Code<'_> {
    /// Runs it.
    #[allow(clippy::too_many_lines)] // the match
    pub fn run<E: Env>(self, env: &mut E) -> Leave {
        let all = self.words;
        let Some(&header) = all.first() else { return self.run_fallback(env) };
        let Some(words) = all.get(1..1 + header as u16 as usize) else { return self.run_fallback(env) };
        let mut words = words.iter();
        macro_rules! attempt {
            ($e:expr) => {
                match $e {
                    Ok(v) => v,
                    Err(Abandon) => return abandon(all, words.len()),
                }
            };
        }
        macro_rules! load {
            ($ty:ident, $w:ident) => {{
                let addr = env.file()[a($w)].wrapping_add(imm($w));
                let v = attempt!(env.load(Ty::$ty, flags(b($w)), addr));
                env.file()[d($w)] = v;
            }};
        }
        macro_rules! store {
            ($ty:ident, $w:ident) => {{
                let f = env.file();
                let (addr, v) = (f[a($w)].wrapping_add(imm($w)), f[b($w)]);
                attempt!(env.store(Ty::$ty, flags(d($w)), addr, v));
            }};
        }
        macro_rules! exit {
            ($w:ident, |$x:ident, $y:ident| $holds:expr) => {{
                let f = env.file();
                exits!(all, f, $w, f[b($w)], imm($w) as usize, |$x, $y| $holds)
            }};
        }
        macro_rules! exiti {
            ($w:ident, |$x:ident, $y:ident| $holds:expr) => {{
                let f = env.file();
                exits!(all, f, $w, imm($w), b($w), |$x, $y| $holds)
            }};
        }
        while let Some(&w) = words.next() {
            let f = env.file();
            match w as u8 {
                code::MOV => f[d(w)] = f[a(w)],
                code::MOVI => {
                    f[d(w)] = imm(w);
                    f[b(w)] = imm(w);
                }
                code::MOVX => f[d(w)] = words.next().copied().unwrap_or(0),
                code::ZX8 => f[d(w)] = u64::from(f[a(w)] as u8),
                code::ZX16 => f[d(w)] = u64::from(f[a(w)] as u16),
                code::ZX32 => f[d(w)] = u64::from(f[a(w)] as u32),
                code::SX8 => f[d(w)] = f[a(w)] as i8 as u64,
                code::SX16 => f[d(w)] = f[a(w)] as i16 as u64,
                code::SX32 => f[d(w)] = f[a(w)] as i32 as u64,
                code::SX8D => f[d(w)] = u64::from(f[a(w)] as i8 as u32),
                code::SX16D => f[d(w)] = u64::from(f[a(w)] as i16 as u32),
                code::EXTRACT => f[d(w)] = f[a(w)] >> (imm(w) & 63),
                code::MOV128 => {
                    let v = get128(f, a(w));
                    put128(f, d(w), v);
                }
                code::PAIR => {
                    let v = u128::from(f[a(w)]) | u128::from(f[b(w)]) << 64;
                    put128(f, d(w), v);
                }
                code::GETE => {
                    let v = env.get(ty(byte(w, 2)), Loc(imm(w) as u16));
                    env.file()[d(w)] = v;
                }
                code::PUTE => {
                    let (ty, v) = (ty(byte(w, 2)), f[a(w)]);
                    env.put(ty, Loc(imm(w) as u16), v & ty.mask());
                }
                code::PUT8 => f[d(w)] = insert(f[d(w)], f[a(w)], 0, 8),
                code::PUT8H => f[d(w)] = insert(f[d(w)], f[a(w)], 8, 8),
                code::PUT16 => f[d(w)] = insert(f[d(w)], f[a(w)], 0, 16),
                code::PUT32 => f[d(w)] = insert(f[d(w)], f[a(w)], 0, 32),
                code::PUTN => f[d(w)] = insert(f[d(w)], f[a(w)], byte(w, 0) as u32, byte(w, 1) as u32),
                code::PUTI32 => f[d(w)] = insert(f[d(w)], imm(w), 0, 32),
                code::CC => {
                    f[CC_SRC] = f[a(w)];
                    f[CC_OP] = insert(f[CC_OP], b(w) as u64, 0, 32);
                }
                code::CCI => {
                    f[CC_SRC] = imm(w);
                    f[CC_OP] = insert(f[CC_OP], b(w) as u64, 0, 32);
                }
                code::PUTIN => f[d(w)] = insert(f[d(w)], imm(w), a(w) as u32, b(w) as u32),

                code::ADD => bin(f, w, u64::wrapping_add),
                code::SUB => bin(f, w, u64::wrapping_sub),
                code::AND => bin(f, w, |a, b| a & b),
                code::OR => bin(f, w, |a, b| a | b),
                code::XOR => bin(f, w, |a, b| a ^ b),
                code::MUL => bin(f, w, u64::wrapping_mul),
                code::SHL => bin(f, w, |a, b| a << (b & 63)),
                code::SHR => bin(f, w, |a, b| a >> (b & 63)),
                code::SAR => bin(f, w, |a, b| (a as i64 >> (b & 63)) as u64),
                code::ROTL => bin(f, w, |a, b| a.rotate_left(b as u32 & 63)),
                code::ROTR => bin(f, w, |a, b| a.rotate_right(b as u32 & 63)),
                code::ADD32 => bin32(f, w, u32::wrapping_add),
                code::SUB32 => bin32(f, w, u32::wrapping_sub),
                code::AND32 => bin32(f, w, |a, b| a & b),
                code::OR32 => bin32(f, w, |a, b| a | b),
                code::XOR32 => bin32(f, w, |a, b| a ^ b),
                code::MUL32 => bin32(f, w, u32::wrapping_mul),
                code::SHL32 => bin32(f, w, |a, b| a << (b & 31)),
                code::SHR32 => bin32(f, w, |a, b| a >> (b & 31)),
                code::SAR32 => bin32(f, w, |a, b| (a as i32 >> (b & 31)) as u32),
                code::ROTL32 => bin32(f, w, |a, b| a.rotate_left(b & 31)),
                code::ROTR32 => bin32(f, w, |a, b| a.rotate_right(b & 31)),
                code::ADDI => bini(f, w, u64::wrapping_add),
                code::SUBI => bini(f, w, u64::wrapping_sub),
                code::ANDI => bini(f, w, |a, b| a & b),
                code::ORI => bini(f, w, |a, b| a | b),
                code::XORI => bini(f, w, |a, b| a ^ b),
                code::MULI => bini(f, w, u64::wrapping_mul),
                code::SHLI => bini(f, w, |a, b| a << (b & 63)),
                code::SHRI => bini(f, w, |a, b| a >> (b & 63)),
                code::SARI => bini(f, w, |a, b| (a as i64 >> (b & 63)) as u64),
                code::ROTLI => bini(f, w, |a, b| a.rotate_left(b as u32 & 63)),
                code::ROTRI => bini(f, w, |a, b| a.rotate_right(b as u32 & 63)),
                code::ADDI32 => bini32(f, w, u32::wrapping_add),
                code::SUBI32 => bini32(f, w, u32::wrapping_sub),
                code::ANDI32 => bini32(f, w, |a, b| a & b),
                code::ORI32 => bini32(f, w, |a, b| a | b),
                code::XORI32 => bini32(f, w, |a, b| a ^ b),
                code::MULI32 => bini32(f, w, u32::wrapping_mul),
                code::SHLI32 => bini32(f, w, |a, b| a << (b & 31)),
                code::SHRI32 => bini32(f, w, |a, b| a >> (b & 31)),
                code::SARI32 => bini32(f, w, |a, b| (a as i32 >> (b & 31)) as u32),
                code::ROTLI32 => bini32(f, w, |a, b| a.rotate_left(b & 31)),
                code::ROTRI32 => bini32(f, w, |a, b| a.rotate_right(b & 31)),
                code::ADDSHL => bin(f, w, |a, b| a.wrapping_add(b << (byte(w, 1) & 63))),
                code::BIN => f[d(w)] = any_bin(byte(w, 0), ty(byte(w, 1)), f[a(w)], f[b(w)]),
                code::UN => f[d(w)] = any_un(byte(w, 0), ty(byte(w, 1)), f[a(w)]),
                code::CMP => {
                    let r = scalar::cmp(int_cc(byte(w, 0)), ty(byte(w, 1)), f[a(w)], f[b(w)]);
                    f[d(w)] = u64::from(r);
                }
                code::CMPI => {
                    let r = scalar::cmp(int_cc(b(w) & 15), ty(b(w) >> 4), f[a(w)], imm(w));
                    f[d(w)] = u64::from(r);
                }
                code::SELECT => f[d(w)] = if f[byte(w, 0)] as u8 != 0 { f[a(w)] } else { f[b(w)] },
                code::SELECT128 => {
                    let v = get128(f, if f[byte(w, 0)] as u8 != 0 { a(w) } else { b(w) });
                    put128(f, d(w), v);
                }
                code::COND => f[d(w)] = u64::from(cond(f, a(w))),
                code::FLAGS => f[d(w)] = lazy_flags(f),

                code::XEQ => exit!(w, |x, y| x == y),
                code::XNE => exit!(w, |x, y| x != y),
                code::XULT => exit!(w, |x, y| x < y),
                code::XULE => exit!(w, |x, y| x <= y),
                code::XUGT => exit!(w, |x, y| x > y),
                code::XUGE => exit!(w, |x, y| x >= y),
                code::XSLT => exit!(w, |x, y| (x as i64) < y as i64),
                code::XSLE => exit!(w, |x, y| x as i64 <= y as i64),
                code::XSGT => exit!(w, |x, y| x as i64 > y as i64),
                code::XSGE => exit!(w, |x, y| x as i64 >= y as i64),
                code::XEQI => exiti!(w, |x, y| x == y),
                code::XNEI => exiti!(w, |x, y| x != y),
                code::XULTI => exiti!(w, |x, y| x < y),
                code::XULEI => exiti!(w, |x, y| x <= y),
                code::XUGTI => exiti!(w, |x, y| x > y),
                code::XUGEI => exiti!(w, |x, y| x >= y),
                code::XSLTI => exiti!(w, |x, y| (x as i64) < y as i64),
                code::XSLEI => exiti!(w, |x, y| x as i64 <= y as i64),
                code::XSGTI => exiti!(w, |x, y| x as i64 > y as i64),
                code::XSGEI => exiti!(w, |x, y| x as i64 >= y as i64),
                code::XCOND => {
                    if cond(f, d(w)) {
                        return leave(all, f, imm(w) as usize);
                    }
                }

                code::LD8 => load!(I8, w),
                code::LD16 => load!(I16, w),
                code::LD32 => load!(I32, w),
                code::LD64 => load!(I64, w),
                code::LD128 => {
                    let addr = f[a(w)].wrapping_add(imm(w));
                    let v = attempt!(env.load128(flags(b(w)), addr));
                    put128(env.file(), d(w), v);
                }
                code::ST8 => store!(I8, w),
                code::ST16 => store!(I16, w),
                code::ST32 => store!(I32, w),
                code::ST64 => store!(I64, w),
                code::ST128 => {
                    let (addr, v) = (f[a(w)].wrapping_add(imm(w)), get128(f, b(w)));
                    attempt!(env.store128(flags(d(w)), addr, v));
                }
                code::RMW => {
                    let (op, ty) = (RmwOp::ALL[byte(w, 0) % RmwOp::ALL.len()], ty(byte(w, 1)));
                    let (addr, v) = (f[a(w)], f[b(w)] & ty.mask());
                    let v = attempt!(env.rmw(op, ty, addr, v));
                    env.file()[d(w)] = v;
                }
                code::CMPXCHG => {
                    let ty = ty(byte(w, 1));
                    let (addr, expected, new) = (f[a(w)], f[b(w)] & ty.mask(), f[byte(w, 0)] & ty.mask());
                    let v = attempt!(env.cmpxchg(ty, addr, expected, new));
                    env.file()[d(w)] = v;
                }
                code::CALL => {
                    let helper = Helper::ALL[a(w) % Helper::ALL.len()];
                    let n = helper.info().args;
                    let at = |i: u8, slot: usize| if i < n { f[slot] } else { 0 };
                    let args = [at(0, b(w)), at(1, byte(w, 0)), at(2, byte(w, 1)), at(3, byte(w, 2))];
                    let v = attempt!(env.call(helper, args));
                    env.file()[d(w)] = v;
                }
                code::VEC => {
                    let r = vecop::eval(
                        vec_op(w),
                        byte(w, 3) as u8,
                        get128(f, a(w)),
                        get128(f, b(w)),
                        get128(f, byte(w, 0)),
                    );
                    put128(f, d(w), r);
                }
                code::VECX => vec_mixed(f, w),
                _ => debug_assert!(false, "no such code"),
            }
        }
        leave(all, env.file(), 0)
    }

    #[cold]
    fn run_fallback<E: Env>(self, env: &mut E) -> Leave {
        match self.fallback {
            Some(block) => reference::run(block, env),
            None => Leave::Exit { to: Target::Helped, exit: 0, retired: 0 },
        }
    }
}

/// The end of the run at a fault, with `left` words of code not yet begun.
#[cold]
fn abandon(words: &[u64], left: usize) -> Leave {
    let header = words.first().copied().unwrap_or(0);
    let [code, records, insns] = [0, 16, 32].map(|shift| (header >> shift) as u16 as usize);
    let at = code.saturating_sub(left + 1);
    let table = words.get(1 + code + records..).unwrap_or_default();
    let start = |i: usize| table.get(i / 4).map_or(usize::MAX, |w| (w >> (i % 4 * 16)) as u16 as usize);
    // The last instruction that starts at or before the word.
    let (mut low, mut high) = (0, insns);
    while low < high {
        let mid = (low + high) / 2;
        if start(mid) <= at { low = mid + 1 } else { high = mid }
    }
    Leave::Abandoned { insn: low.saturating_sub(1) as u16 }
}

/// The end of the run through exit record `index`.
#[inline(never)]
fn leave(words: &[u64], f: &File, index: usize) -> Leave {
    let header = words.first().copied().unwrap_or(0);
    let at = 1 + header as u16 as usize + index;
    let r = words.get(at).copied().unwrap_or(record::HELPED);
    let payload = (r >> 32) as u32;
    let to = match r & 7 {
        record::JUMP => Target::Jump { off: payload as u16 },
        record::JUMP_FAR => Target::JumpFar { off: payload as i32 },
        record::INDIRECT => {
            let kind = match payload >> 8 {
                0 => IndirectKind::Jump,
                1 => IndirectKind::Call,
                _ => IndirectKind::Return,
            };
            Target::Indirect { rip: f[payload as u8 as usize], kind }
        }
        record::DISPATCH => Target::Dispatch { off: payload as i32 },
        record::RAISE => raise(words, at, payload),
        _ => Target::Helped,
    };
    Leave::Exit { to, exit: (r >> 16) as u16, retired: (r >> 3) as u16 & record::MAX_RETIRED }
}

#[cold]
fn raise(words: &[u64], at: usize, payload: u32) -> Target {
    let word = |n| words.get(at + n).copied().unwrap_or(0);
    let exception = Exception {
        vector: VECTORS[(payload >> 16) as usize % VECTORS.len()].0,
        error: (word(1) >> 32 != 0).then_some(word(1) as u32),
        cr2: word(2),
    };
    Target::Raise { off: payload as u16, exception }
}

#[inline(never)]
fn any_bin(op: usize, ty: Ty, a: u64, b: u64) -> u64 {
    scalar::bin(BinOp::ALL[op % BinOp::ALL.len()], ty, a, b)
}
#[inline(never)]
fn any_un(op: usize, ty: Ty, a: u64) -> u64 {
    scalar::un(UnOp::ALL[op % UnOp::ALL.len()], ty, a)
}
#[inline(always)]
fn vec_op(w: u64) -> VecOp {
    VecOp::ALL[(w >> 40) as u16 as usize % VecOp::ALL.len()]
}
/// A vector op with integer operands or result.
#[inline(never)]
fn vec_mixed(f: &mut File, w: u64) {
    let op = vec_op(w);
    let sig = op.sig();
    let arg = |n: usize, slot: usize| match sig.args[n] {
        Some(Ty::V128) => get128(f, slot),
        Some(ty) => u128::from(f[slot & 255] & ty.mask()),
        None => 0,
    };
    let r = vecop::eval(op, byte(w, 3) as u8, arg(0, a(w)), arg(1, b(w)), arg(2, byte(w, 0)));
    if sig.result == Ty::V128 {
        put128(f, d(w), r);
    } else {
        f[d(w)] = r as u64;
    }
}
