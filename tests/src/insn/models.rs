//! Simple models of the helpers that user-mode integer instructions call, so that the front end can be tested by itself.
use twofold_arch::Vector;
use twofold_arch::control::rflags;
use twofold_ir::Helper;
use twofold_ir::eval::Abandon;

use super::env::TestEnv;

/// What a helper does.
pub fn helper_model(env: &mut TestEnv, helper: Helper, a: [u64; 4]) -> Result<u64, Abandon> {
    match helper {
        Helper::DivideWide => {
            let n = u128::from(a[1]) << 64 | u128::from(a[0]);
            Ok(if a[1] < a[2] { (n / u128::from(a[2])) as u64 } else { a[0] })
        }
        Helper::RotateCarry => Ok(rotate_carry(env, a[0], a[1], a[2])),
        Helper::Crc32 => Ok(crc32(a[0] as u32, a[1], 1 << a[2])),
        Helper::Pdep => Ok(pdep(a[0], a[1])),
        Helper::Pext => Ok(pext(a[0], a[1])),
        Helper::Cmpxchg8b | Helper::Cmpxchg16b => cmpxchg_wide(env, a[0], helper == Helper::Cmpxchg16b),
        Helper::StringOp => string(env, a[0]),
        Helper::Popf => {
            let keep = env.state.rflags() & !(rflags::ARITH | rflags::DF);
            env.state.set_rflags(keep | a[0] & (rflags::ARITH | rflags::DF));
            Ok(0)
        }
        Helper::Enter => enter(env, a[0], a[1], 1 << a[2]),
        Helper::Pause | Helper::AlignCheck => Ok(0),
        Helper::Bcd => bcd(env, a[0], a[1]),
        Helper::SegAddr => {
            let seg = env.state.seg[a[0] as usize & 7];
            let bytes = a[2] & 0xff;
            if a[1] + bytes - 1 > u64::from(seg.limit) {
                return Err(env.fault(if a[0] == 2 { Vector::StackFault } else { Vector::GeneralProtection }));
            }
            Ok(seg.base + a[1])
        }
        Helper::CheckTarget if a[0] > u64::from(env.state.seg[1].limit) && !env.flat => {
            Err(env.fault(Vector::GeneralProtection))
        }
        Helper::CheckTarget => Ok(a[0]),
        _ => panic!("no model of {helper:?}"),
    }
}

fn rotate_carry(env: &mut TestEnv, value: u64, count: u64, how: u64) -> u64 {
    let bits = 8u32 << (how & 3);
    let right = how >> 8 != 0;
    let mask = u64::MAX >> (64 - bits);
    let mut v = value & mask;
    let f = env.state.rflags();
    let mut cf = f & 1;
    if count == 0 {
        return v;
    }
    for _ in 0..count {
        if right {
            let out = v & 1;
            v = v >> 1 | cf << (bits - 1);
            cf = out;
        } else {
            let out = v >> (bits - 1) & 1;
            v = (v << 1 | cf) & mask;
            cf = out;
        }
    }
    let top = v >> (bits - 1) & 1;
    let of = if right { top ^ (v >> (bits - 2) & 1) } else { top ^ cf };
    env.state.set_rflags(f & !(rflags::CF | rflags::OF) | cf | of << 11);
    v
}

fn crc32(mut crc: u32, v: u64, bytes: u32) -> u64 {
    for i in 0..bytes {
        crc ^= (v >> (8 * i)) as u32 & 0xff;
        for _ in 0..8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    u64::from(crc)
}

fn pdep(v: u64, mask: u64) -> u64 {
    let (mut out, mut n) = (0, 0);
    for i in 0..64 {
        if mask >> i & 1 != 0 {
            out |= (v >> n & 1) << i;
            n += 1;
        }
    }
    out
}

fn pext(v: u64, mask: u64) -> u64 {
    let (mut out, mut n) = (0, 0);
    for i in 0..64 {
        if mask >> i & 1 != 0 {
            out |= (v >> i & 1) << n;
            n += 1;
        }
    }
    out
}

fn cmpxchg_wide(env: &mut TestEnv, addr: u64, wide: bool) -> Result<u64, Abandon> {
    let n = if wide { 8 } else { 4 };
    if wide && !addr.is_multiple_of(16) {
        return Err(env.fault(Vector::GeneralProtection));
    }
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    let (lo, hi) = (env.read(addr, n)?, env.read(addr + n as u64, n)?);
    let g = env.state.gpr;
    let f = env.state.rflags();
    if lo == g[0] & mask && hi == g[2] & mask {
        env.write(addr, n, g[3])?;
        env.write(addr + n as u64, n, g[1])?;
        env.state.set_rflags(f | rflags::ZF);
    } else {
        env.state.gpr[0] = lo;
        env.state.gpr[2] = hi;
        env.state.set_rflags(f & !rflags::ZF);
    }
    Ok(0)
}

fn enter(env: &mut TestEnv, frame: u64, level: u64, bytes: u64) -> Result<u64, Abandon> {
    // The stack is 16 bits wide exactly when it is not flat.
    let (base, mask) = if env.flat { (0, u64::MAX) } else { (env.state.seg[2].base, 0xffff) };
    let (old_sp, old_bp) = (env.state.gpr[4], env.state.gpr[5]);
    let n = bytes as usize;
    let mut sp = old_sp.wrapping_sub(bytes) & mask;
    let mut bp = old_bp;
    env.write(base + sp, n, old_bp)?;
    let top = sp;
    for i in 0..level & 31 {
        let v = if i + 1 == level & 31 {
            top
        } else {
            bp = bp.wrapping_sub(bytes) & mask;
            env.read(base + bp, n)?
        };
        sp = sp.wrapping_sub(bytes) & mask;
        env.write(base + sp, n, v)?;
    }
    env.state.gpr[4] = old_sp & !mask | sp.wrapping_sub(frame) & mask;
    env.state.gpr[5] = if bytes == 2 { old_bp & !0xffff | top & 0xffff } else { old_bp & !mask & !0xffff_ffff | top };
    Ok(0)
}

fn string(env: &mut TestEnv, word: u64) -> Result<u64, Abandon> {
    use twofold_arch::string_op::{Repeat, StringKind, StringOp};
    let op = StringOp::unpack(word);
    let n = 1usize << op.log2_bytes;
    let am = if op.log2_addr == 3 { u64::MAX } else { (1 << (8 << op.log2_addr)) - 1 };
    let step = if env.state.rflags_sys & rflags::DF != 0 { (n as u64).wrapping_neg() } else { n as u64 };
    let wrap = |old: u64, new: u64| if op.log2_addr == 1 { old & !0xffff | new & am } else { new & am };
    let base = |env: &TestEnv, seg: u8| if env.flat { 0 } else { env.state.seg[usize::from(seg)].base };
    while env.state.gpr[1] & am != 0 {
        let (from, to) = (env.state.gpr[6] & am, env.state.gpr[7] & am);
        let (si, di) = (from + base(env, op.segment), to + base(env, 0));
        let mut stop = false;
        match op.kind {
            StringKind::Movs => {
                let v = env.read(si, n)?;
                env.write(di, n, v)?;
            }
            StringKind::Stos => {
                let v = env.state.gpr[0];
                env.write(di, n, v)?;
            }
            StringKind::Lods => {
                let v = env.read(si, n)?;
                let rax = &mut env.state.gpr[0];
                *rax = if n >= 4 { v } else { *rax & !((1 << (8 * n)) - 1) | v };
            }
            _ => {
                let a = if op.kind == StringKind::Cmps { env.read(si, n)? } else { env.state.gpr[0] };
                let b = env.read(di, n)?;
                let cc = twofold_arch::CcOp::new(twofold_arch::CcKind::Sub, op.log2_bytes);
                env.state.cc_op = u32::from(cc.0);
                env.state.cc_dst = a.wrapping_sub(b);
                env.state.cc_src = b;
                let equal = env.state.rflags() & rflags::ZF != 0;
                stop = equal == (op.repeat == Repeat::Repne);
            }
        }
        let g = &mut env.state.gpr;
        if !matches!(op.kind, StringKind::Stos | StringKind::Scas) {
            g[6] = wrap(g[6], from.wrapping_add(step));
        }
        if op.kind != StringKind::Lods {
            g[7] = wrap(g[7], to.wrapping_add(step));
        }
        g[1] = wrap(g[1], (g[1] & am).wrapping_sub(1));
        if stop {
            break;
        }
    }
    Ok(0)
}

fn bcd(env: &mut TestEnv, kind: u64, imm: u64) -> Result<u64, Abandon> {
    use rflags::{AF, CF, PF, SF, ZF};
    let f = env.state.rflags();
    let ax = env.state.gpr[0] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let (mut cf, mut af) = (f & CF != 0, f & AF != 0);
    let low = al & 15 > 9 || af;
    let new = match kind {
        0 | 1 => {
            let high = al > 0x99 || cf;
            let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
            cf = high || kind == 1 && low && al < 6;
            af = low;
            u16::from(if kind == 0 { al.wrapping_add(by) } else { al.wrapping_sub(by) }) | ax & 0xff00
        }
        2 | 3 => {
            (cf, af) = (low, low);
            let by = if low { 0x106 } else { 0 };
            // AAS subtracts 6 from AX, then 1 from AH.
            (if kind == 2 { ax.wrapping_add(by) } else { ax.wrapping_sub(by) }) & 0xff0f
        }
        4 if imm as u8 == 0 => return Err(env.fault(Vector::DivideError)),
        4 => u16::from(al / imm as u8) << 8 | u16::from(al % imm as u8),
        _ => u16::from(al.wrapping_add(ah.wrapping_mul(imm as u8))),
    };
    let low = new as u8;
    let bit = |on: bool, b: u64| if on { b } else { 0 };
    let image = bit(cf, CF)
        | bit(af, AF)
        | bit(low == 0, ZF)
        | bit(low > 127, SF)
        | bit(low.count_ones().is_multiple_of(2), PF);
    env.state.gpr[0] = env.state.gpr[0] & !0xffff | u64::from(new);
    env.state.set_rflags(f & !rflags::ARITH | image);
    Ok(0)
}
