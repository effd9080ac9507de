//! Each integer op, by the evaluator and by the reference, against a plain model: all pairs of bytes, and wider operands near
//! the edges.

use twofold_arch::{Loc, TbFlags};
use twofold_ir::eval::{Leave, Program, Target, reference};
use twofold_ir::testing::{FakeEnv, Rng};
use twofold_ir::verify::verify;
use twofold_ir::{BinOp, Block, Builder, Exit, IndirectKind, IntCc, MemFlags, RmwOp, Ty, UnOp, Value};

const INTS: [Ty; 4] = [Ty::I8, Ty::I16, Ty::I32, Ty::I64];

/// A block of one instruction that jumps to the I64 that `f` makes.
fn make(f: impl FnOnce(&mut Builder) -> Value) -> Block {
    let mut b = Builder::new(TbFlags(2));
    b.begin_insn(0, 1);
    let v = f(&mut b);
    let rip = b.zext(Ty::I64, v);
    let block = b.finish(Exit::Indirect { rip, kind: IndirectKind::Jump }, true);
    verify(&block).unwrap();
    block
}

/// A block that makes a value from registers RAX and RCX, of type `ty`; the right one may be a constant.
fn from_registers(ty: Ty, right: Option<u64>, f: impl FnOnce(&mut Builder, Value, Value) -> Value) -> Block {
    make(|b| {
        let x = b.get(ty, Loc::gpr(0));
        let y = match right {
            Some(c) => b.iconst(ty, c),
            None => b.get(ty, Loc::gpr(1)),
        };
        f(b, x, y)
    })
}

struct Ways {
    block: Block,
    program: Program,
    env: FakeEnv,
}

impl Ways {
    fn new(block: Block) -> Self {
        Self { program: Program::new(&block), block, env: FakeEnv::new(9) }
    }
    /// The block's value for these registers, both ways.
    fn run(&mut self, a: u64, b: u64) -> u64 {
        let mut both = [false, true].map(|fast| {
            self.env.file[1..3].copy_from_slice(&[a, b]);
            let leave = if fast { self.program.run(&mut self.env) } else { reference::run(&self.block, &mut self.env) };
            match leave {
                Leave::Exit { to: Target::Indirect { rip, .. }, .. } => rip,
                other => panic!("{other:?}"),
            }
        });
        let [slow, fast] = &mut both;
        assert_eq!(slow, fast, "{}\n{}", self.block, self.program);
        *fast
    }
}

fn pairs(ty: Ty, rng: &mut Rng) -> Vec<(u64, u64)> {
    if ty == Ty::I8 {
        // With rubbish above the byte.
        return (0..0x10000u64).map(|n| (n & 0xff | 0xc300, n >> 8 | 0x9900)).collect();
    }
    (0..3000).map(|_| (rng.value(), rng.value())).collect()
}

/// The number a word is, as a signed one.
fn signed(ty: Ty, v: u64) -> i128 {
    let v = i128::from(v & ty.mask());
    if v >> (ty.bits() - 1) != 0 { v - (1i128 << ty.bits()) } else { v }
}

/// One step of a rotation.
fn rotate_once(ty: Ty, v: u64, left: bool) -> u64 {
    let top = ty.bits() - 1;
    if left { (v << 1 | v >> top & 1) & ty.mask() } else { v >> 1 | (v & 1) << top }
}

fn bin_model(op: BinOp, ty: Ty, a: u64, b: u64) -> u64 {
    let (a, b) = (a & ty.mask(), b & ty.mask());
    let (ua, ub) = (i128::from(a), i128::from(b));
    let (sa, sb) = (signed(ty, a), signed(ty, b));
    let n = b % u64::from(ty.bits());
    let r: i128 = match op {
        BinOp::Add => ua + ub,
        BinOp::Sub => ua - ub,
        BinOp::Mul => (u128::from(a).wrapping_mul(u128::from(b)) & u128::from(u64::MAX)) as i128,
        BinOp::UMulHi => ((u128::from(a) * u128::from(b)) >> ty.bits()) as i128,
        BinOp::SMulHi => (sa * sb) >> ty.bits(),
        BinOp::And => (0..64).map(|i| i128::from((a >> i & 1) * (b >> i & 1)) << i).sum(),
        BinOp::Or => (0..64).map(|i| i128::from((a >> i & 1).max(b >> i & 1)) << i).sum(),
        BinOp::Xor => (0..64).map(|i| i128::from(((a >> i & 1) + (b >> i & 1)) & 1) << i).sum(),
        BinOp::Shl => (0..n).fold(a, |v, _| (v << 1) & ty.mask()).into(),
        BinOp::Shr => (0..n).fold(a, |v, _| v / 2).into(),
        BinOp::Sar => sa.div_euclid(1 << n),
        BinOp::Rotl => (0..n).fold(a, |v, _| rotate_once(ty, v, true)).into(),
        BinOp::Rotr => (0..n).fold(a, |v, _| rotate_once(ty, v, false)).into(),
        BinOp::UDiv => {
            if b == 0 {
                0
            } else {
                ua / ub
            }
        }
        BinOp::URem => {
            if b == 0 {
                ua
            } else {
                ua % ub
            }
        }
        BinOp::SDiv => {
            if b == 0 {
                0
            } else {
                sa / sb
            }
        }
        BinOp::SRem => {
            if b == 0 {
                sa
            } else {
                sa % sb
            }
        }
    };
    r as u64 & ty.mask()
}

#[test]
fn two_operand_ops() {
    let mut rng = Rng(11);
    for op in BinOp::ALL {
        for ty in INTS {
            let pairs = pairs(ty, &mut rng);
            let mut ways = Ways::new(from_registers(ty, None, |b, x, y| b.bin(op, x, y)));
            for &(x, y) in &pairs {
                assert_eq!(ways.run(x, y), bin_model(op, ty, x, y), "{op:?} {ty:?} {x:#x} {y:#x}");
            }
            // With a constant on either side, which takes other words.
            for &(x, y) in pairs.iter().step_by(pairs.len() / 150) {
                let mut ways = Ways::new(from_registers(ty, Some(y), |b, x, y| b.bin(op, x, y)));
                assert_eq!(ways.run(x, 0), bin_model(op, ty, x, y), "{op:?} {ty:?} {x:#x} const {y:#x}");
                let mut ways = Ways::new(from_registers(ty, Some(y), |b, x, y| b.bin(op, y, x)));
                assert_eq!(ways.run(x, 0), bin_model(op, ty, y, x), "{op:?} {ty:?} const {y:#x} {x:#x}");
            }
        }
    }
}

#[test]
fn one_operand_ops() {
    let mut rng = Rng(12);
    for op in UnOp::ALL {
        for ty in INTS {
            if op == UnOp::Bswap && ty == Ty::I8 {
                continue;
            }
            let bits = ty.bits();
            let mut ways = Ways::new(from_registers(ty, Some(0), |b, x, _| b.un(op, x)));
            for (x, _) in pairs(ty, &mut rng) {
                let v = x & ty.mask();
                let bit = |i: u32| v >> i & 1;
                let want = match op {
                    UnOp::Not => ty.mask() - v,
                    UnOp::Neg => ((1i128 << bits) - i128::from(v)) as u64 & ty.mask(),
                    UnOp::Clz => (0..bits).rev().take_while(|&i| bit(i) == 0).count() as u64,
                    UnOp::Ctz => (0..bits).take_while(|&i| bit(i) == 0).count() as u64,
                    UnOp::Popcnt => (0..bits).map(bit).sum(),
                    UnOp::Bswap => (0..ty.bytes()).fold(0, |r, i| r << 8 | v >> (8 * i) & 0xff),
                };
                assert_eq!(ways.run(x, 0), want, "{op:?} {ty:?} {x:#x}");
            }
        }
    }
}

#[test]
fn comparisons_and_selections() {
    let mut rng = Rng(13);
    for cc in IntCc::ALL {
        for ty in INTS {
            let pairs = pairs(ty, &mut rng);
            let model = |x: u64, y: u64| {
                let (u, v) = (x & ty.mask(), y & ty.mask());
                let (s, t) = (signed(ty, x), signed(ty, y));
                match cc {
                    IntCc::Eq => u == v,
                    IntCc::Ne => u != v,
                    IntCc::Ult => u < v,
                    IntCc::Ule => u <= v,
                    IntCc::Ugt => u > v,
                    IntCc::Uge => u >= v,
                    IntCc::Slt => s < t,
                    IntCc::Sle => s <= t,
                    IntCc::Sgt => s > t,
                    IntCc::Sge => s >= t,
                }
            };
            assert!(
                pairs
                    .iter()
                    .all(|&(x, y)| cc.swapped() == cc || model(x, y) != model(y, x) || x & ty.mask() == y & ty.mask())
            );
            let mut value = Ways::new(from_registers(ty, None, |b, x, y| b.cmp(cc, x, y)));
            let mut select = Ways::new(from_registers(ty, None, |b, x, y| {
                let c = b.cmp(cc, x, y);
                b.select(c, x, y)
            }));
            // Fused with an exit: leaves to 1, else ends at 0.
            let exit = |right: Option<u64>| {
                Ways::new(from_registers(ty, right, |b, x, y| {
                    let c = b.cmp(cc, x, y);
                    let (yes, no) = (b.iconst(Ty::I64, 1), b.iconst(Ty::I64, 0));
                    b.exit_if(c, Exit::Indirect { rip: yes, kind: IndirectKind::Jump }, true);
                    no
                }))
            };
            let mut fused = exit(None);
            for &(x, y) in &pairs {
                let want = model(x, y);
                assert_eq!(value.run(x, y), u64::from(want), "{cc:?} {ty:?} {x:#x} {y:#x}");
                assert_eq!(select.run(x, y), if want { x } else { y } & ty.mask());
                assert_eq!(fused.run(x, y), u64::from(want), "fused {cc:?} {ty:?} {x:#x} {y:#x}");
            }
            for &(x, y) in pairs.iter().step_by(pairs.len() / 100) {
                assert_eq!(exit(Some(y)).run(x, 0), u64::from(model(x, y)), "fused {cc:?} {ty:?} {x:#x} const {y:#x}");
                let mut value = Ways::new(from_registers(ty, Some(y), |b, x, y| b.cmp(cc, y, x)));
                assert_eq!(value.run(x, 0), u64::from(model(y, x)), "{cc:?} {ty:?} const {y:#x} {x:#x}");
            }
        }
    }
}

#[test]
fn conversions() {
    let mut rng = Rng(14);
    for from in INTS {
        for to in INTS {
            for (x, _) in pairs(from, &mut rng).into_iter().take(2000) {
                if to.bytes() > from.bytes() {
                    let mut zext = Ways::new(from_registers(from, Some(0), |b, x, _| b.zext(to, x)));
                    assert_eq!(zext.run(x, 0), x & from.mask());
                    let mut sext = Ways::new(from_registers(from, Some(0), |b, x, _| b.sext(to, x)));
                    assert_eq!(sext.run(x, 0), signed(from, x) as u64 & to.mask());
                } else if to.bytes() < from.bytes() {
                    let mut trunc = Ways::new(from_registers(from, Some(0), |b, x, _| b.trunc(to, x)));
                    assert_eq!(trunc.run(x, 0), x & to.mask());
                }
            }
        }
    }
}

#[test]
fn fields_of_every_width_and_place() {
    let mut rng = Rng(15);
    for ty in INTS {
        // Inside a word, across two, in the last words of the file, and behind it.
        for loc in (16..40).chain(2040..2064).chain(2100..2104).map(Loc) {
            let v = rng.bits();
            let block = make(|b| {
                let c = b.get(ty, Loc::gpr(15));
                b.put(loc, c);
                b.get(ty, loc)
            });
            let mut slow = FakeEnv::new(5);
            slow.file[16] = v;
            let mut fast = slow.clone();
            let want = reference::run(&block, &mut slow);
            assert_eq!(Program::new(&block).run(&mut fast), want);
            assert_eq!(slow.digest(), fast.digest(), "{ty:?} {loc:?}");
            let Leave::Exit { to: Target::Indirect { rip, .. }, .. } = want else { panic!() };
            assert_eq!(rip, v & ty.mask(), "{ty:?} {loc:?}");
        }
    }
}

#[test]
fn memory_ops() {
    let mut rng = Rng(16);
    for ty in INTS {
        for op in RmwOp::ALL {
            let block = make(|b| {
                let addr = b.get(Ty::I64, Loc::gpr(0));
                let v = b.get(ty, Loc::gpr(1));
                let old = b.rmw(op, addr, v);
                let now = b.load(ty, MemFlags::NONE, addr);
                let old = b.zext(Ty::I64, old);
                b.put(Loc::gpr(2), old);
                now
            });
            let mut ways = Ways::new(block);
            for (addr, v) in (0..200).map(|_| (rng.value(), rng.value())) {
                ways.env.memory.clear();
                let program = &ways.program;
                ways.env.file[1..3].copy_from_slice(&[addr, v]);
                let Leave::Exit { to: Target::Indirect { rip, .. }, .. } = program.run(&mut ways.env) else { panic!() };
                let old = ways.env.file[3];
                let want = match op {
                    RmwOp::Add => old.wrapping_add(v),
                    RmwOp::Sub => old.wrapping_sub(v),
                    RmwOp::And => old & v,
                    RmwOp::Or => old | v,
                    RmwOp::Xor => old ^ v,
                    RmwOp::Xchg => v,
                };
                assert_eq!(rip, want & ty.mask(), "{op:?} {ty:?}");
            }
        }
    }
}

#[test]
fn a_block_with_too_many_live_values_still_runs() {
    let mut ways = Ways::new(make(|b| {
        let x = b.get(Ty::I64, Loc::gpr(0));
        let addr: Vec<Value> = (0..100).map(|i| b.bin_imm(BinOp::Add, x, i * 8)).collect();
        let all: Vec<Value> = addr.iter().map(|&a| b.load(Ty::I64, MemFlags::NONE, a)).collect();
        all.into_iter().reduce(|x, y| b.xor(x, y)).unwrap()
    }));
    assert!(ways.program.is_fallback());
    ways.run(0x1000, 0);
}
