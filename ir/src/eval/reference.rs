//! Runs the ops of a block one by one, straight from their definitions.
//!
//! Slow and plain: the model that [`super::Program`] and the passes are tested against, and the fallback for a block with
//! more live values than there are temporaries. Invariant: values are kept zero-extended.

use twofold_arch::{CcOp, CodeSize, Loc, flags};

use super::env::{Abandon, Env, FILE_BASE, FILE_WORDS};
use super::{Leave, Target, scalar};
use crate::block::{Block, Exit};
use crate::op::{Op, Ty, Value};
use crate::vecop;

/// Runs a block.
pub fn run<E: Env>(block: &Block, env: &mut E) -> Leave {
    let mut values = vec![0u128; block.ops.len()];
    for (i, op) in block.ops.iter().enumerate() {
        if let Op::ExitIf { c, exit } = *op {
            if value(&values, c) as u8 != 0 {
                let (to, retired) = match block.exits.get(exit as usize) {
                    Some(side) => (resolve(&side.exit, &values), side.retired),
                    None => (Target::Helped, 0),
                };
                return Leave::Exit { to, exit, retired };
            }
            continue;
        }
        match step(block, op, &values, env) {
            Ok(v) => values[i] = v,
            Err(Abandon) => return Leave::Abandoned { insn: block.insn_of(i) as u16 },
        }
    }
    let to = block.end.as_ref().map_or(Target::Helped, |e| resolve(e, &values));
    Leave::Exit { to, exit: block.exits.len() as u16, retired: block.retired }
}

fn value(values: &[u128], v: Value) -> u128 {
    values.get(v.index()).copied().unwrap_or(0)
}

fn resolve(exit: &Exit, values: &[u128]) -> Target {
    match *exit {
        Exit::Jump { off } => Target::Jump { off },
        Exit::JumpFar { off } => Target::JumpFar { off },
        Exit::Indirect { rip, kind } => Target::Indirect { rip: value(values, rip) as u64, kind },
        Exit::Dispatch { off } => Target::Dispatch { off },
        Exit::Helped => Target::Helped,
        Exit::Raise { off, exception } => Target::Raise { off, exception },
    }
}

/// The index of the word that holds all of `loc..loc + bytes`, and the bit offset in it.
pub(crate) const fn word_of(loc: Loc, bytes: u32) -> Option<(usize, u32)> {
    let Some(rel) = loc.0.checked_sub(FILE_BASE) else { return None };
    let (word, byte) = ((rel / 8) as usize, (rel % 8) as u32);
    if word < FILE_WORDS && byte + bytes <= 8 { Some((word, byte * 8)) } else { None }
}

/// Reads a field of the guest state.
pub fn get<E: Env>(env: &mut E, ty: Ty, loc: Loc) -> u128 {
    if ty == Ty::V128 {
        let lo = get(env, Ty::I64, loc);
        return lo | get(env, Ty::I64, Loc(loc.0.wrapping_add(8))) << 64;
    }
    u128::from(match word_of(loc, ty.bytes()) {
        Some((word, shift)) => env.file()[word] >> shift & ty.mask(),
        None => env.get(ty, loc),
    })
}

/// Writes a field of the guest state.
pub fn put<E: Env>(env: &mut E, ty: Ty, loc: Loc, v: u128) {
    if ty == Ty::V128 {
        put(env, Ty::I64, loc, v & u128::from(u64::MAX));
        return put(env, Ty::I64, Loc(loc.0.wrapping_add(8)), v >> 64);
    }
    match word_of(loc, ty.bytes()) {
        Some((word, shift)) => {
            let w = &mut env.file()[word];
            *w = *w & !(ty.mask() << shift) | (v as u64 & ty.mask()) << shift;
        }
        None => env.put(ty, loc, v as u64 & ty.mask()),
    }
}

/// The six arithmetic flags as they stand.
pub fn lazy_flags<E: Env>(env: &mut E) -> u64 {
    let op = CcOp(get(env, Ty::I8, Loc::CC_OP) as u8);
    let mut field = |loc| get(env, Ty::I64, loc) as u64;
    flags::arith_flags(op, field(Loc::CC_DST), field(Loc::CC_SRC), field(Loc::CC_SRC2))
}

fn step<E: Env>(block: &Block, op: &Op, values: &[u128], env: &mut E) -> Result<u128, Abandon> {
    let wide = |v| value(values, v);
    let int = |v| value(values, v) as u64;
    let r = match *op {
        Op::Nop | Op::ExitIf { .. } => 0,
        Op::Const { ty, imm } => imm & ty.mask(),
        Op::Get { ty, loc } => return Ok(get(env, ty, loc)),
        Op::Put { ty, loc, v } => {
            put(env, ty, loc, wide(v));
            0
        }
        Op::Rip { off } => rip(block.flags.size(), get(env, Ty::I64, Loc::RIP_BASE) as u64, off),
        Op::Bin { op, ty, a, b } => scalar::bin(op, ty, int(a), int(b)),
        Op::Un { op, ty, a } => scalar::un(op, ty, int(a)),
        Op::Cmp { cc, ty, a, b } => u64::from(scalar::cmp(cc, ty, int(a), int(b))),
        Op::Select { c, a, b, .. } => return Ok(if int(c) != 0 { wide(a) } else { wide(b) }),
        Op::Zext { a, .. } => int(a),
        Op::Sext { to, a } => scalar::signed(block.ty(a), int(a)) as u64 & to.mask(),
        Op::Trunc { to, a } => int(a) & to.mask(),
        Op::Pair { lo, hi } => return Ok(wide(lo) | wide(hi) << 64),
        Op::Half { a, hi } => (wide(a) >> if hi { 64 } else { 0 }) as u64,
        Op::Cond { cc } => u64::from(cc.holds(lazy_flags(env))),
        Op::Flags => lazy_flags(env),
        Op::Load { ty: Ty::V128, flags, addr } => return env.load128(flags, int(addr)),
        Op::Load { ty, flags, addr } => env.load(ty, flags, int(addr))?,
        Op::Store { ty: Ty::V128, flags, addr, v } => return env.store128(flags, int(addr), wide(v)).map(|()| 0),
        Op::Store { ty, flags, addr, v } => return env.store(ty, flags, int(addr), int(v)).map(|()| 0),
        Op::Rmw { op, ty, addr, v } => env.rmw(op, ty, int(addr), int(v))?,
        Op::CmpXchg { ty, addr, expected, new } => env.cmpxchg(ty, int(addr), int(expected), int(new))?,
        Op::Vec { op, imm, a, b, c } => return Ok(vecop::eval(op, imm, wide(a), wide(b), wide(c))),
        Op::Call { helper, args } => env.call(helper, args.map(int))?,
    };
    Ok(u128::from(r))
}

/// `rip_base + off`, truncated to the code size.
#[must_use]
pub const fn rip(size: CodeSize, base: u64, off: i32) -> u64 {
    let v = base.wrapping_add(off as i64 as u64);
    match size {
        CodeSize::Bits16 => v as u16 as u64,
        CodeSize::Bits32 => v as u32 as u64,
        CodeSize::Bits64 => v,
    }
}
