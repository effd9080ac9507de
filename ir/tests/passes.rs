//! Every pass, and all of them, on random blocks: what a block does stays the same.

use twofold_arch::{CcKind, CcOp, CondCode, Loc, TbFlags, flags};
use twofold_ir::eval::{Leave, Program, Target, reference};
use twofold_ir::passes::{Options, Passes};
use twofold_ir::testing::{FakeEnv, Rng, Shape, random_block};
use twofold_ir::verify::verify;
use twofold_ir::{Block, Builder, Exit, Op, Ty};

fn run(seed: u64, fault_at: usize, f: impl FnOnce(&mut FakeEnv) -> Leave) -> (Leave, FakeEnv) {
    let mut env = FakeEnv::new(seed);
    env.fault_at = fault_at;
    let mut leave = f(&mut env);
    if let Leave::Exit { exit, .. } = &mut leave {
        // The passes may renumber the side exits.
        *exit = 0;
    }
    (leave, env)
}

/// Compares what two blocks do, one of them run both ways. Returns the number of events.
fn compare(before: &Block, after: &Block, program: &Program, seed: u64, fault_at: usize) -> usize {
    let (want, a) = run(seed, fault_at, |env| reference::run(before, env));
    let ways: [&dyn Fn(&mut FakeEnv) -> Leave; 2] = [&|env| reference::run(after, env), &|env| program.run(env)];
    for (way, f) in ways.into_iter().enumerate() {
        let (got, b) = run(seed, fault_at, f);
        if want != got || a.trace != b.trace || a.digest() != b.digest() || a.memory != b.memory {
            let first = a.trace.iter().zip(&b.trace).position(|(x, y)| x != y);
            let words: Vec<usize> = (0..256).filter(|&i| a.file[i] != b.file[i]).collect();
            panic!(
                "seed {seed:#x} fault {fault_at} way {way}: want {want:?}, got {got:?}; words {words:?}; event {first:?} {:?} {:?}\n\
                 before:\n{before}\nafter:\n{after}\n{program}",
                first.map(|i| &a.trace[i]),
                first.map(|i| &b.trace[i]),
            );
        }
    }
    a.trace.len()
}

fn preserves(options: &Options<'_>, rounds: u64) {
    let mut rng = Rng(rounds);
    let mut passes = Passes::default();
    let (mut ops_before, mut ops_after) = (0, 0);
    for round in 0..rounds {
        let shape = Shape::random(&mut rng);
        let before = random_block(&mut rng, shape);
        verify(&before).unwrap_or_else(|e| panic!("generator: {e}\n{before}"));
        let mut after = before.clone();
        passes.run(&mut after, options);
        verify(&after).unwrap_or_else(|e| panic!("{options:?}: {e}\nbefore:\n{before}\nafter:\n{after}"));
        ops_before += before.ops.len();
        ops_after += after.ops.len();
        let program = Program::new(&after);
        let events = compare(&before, &after, &program, round, usize::MAX);
        for at in 0..events.min(4) {
            compare(&before, &after, &program, round, at);
        }
    }
    println!("{options:?}: {ops_before} ops became {ops_after}");
}

#[test]
fn get_put_alone() {
    preserves(&Options { get_put: true, ..Options::NONE }, 10_000);
}
#[test]
fn conditions() {
    preserves(&Options { get_put: true, conds: true, ..Options::NONE }, 10_000);
}
#[test]
fn folding_alone() {
    preserves(&Options { fold: true, ..Options::NONE }, 10_000);
}
#[test]
fn dead_alone() {
    preserves(&Options { dead: true, ..Options::NONE }, 10_000);
}
#[test]
fn everything_but_folding() {
    preserves(&Options { fold: false, ..Options::default() }, 10_000);
}
#[test]
fn for_the_host() {
    preserves(&Options::HOST, 10_000);
}
#[test]
fn the_whole_pipeline() {
    preserves(&Options::default(), 30_000);
}

#[test]
fn flags_that_are_dead_at_an_exit_are_not_left_behind() {
    let text = "block flags 0x2 retired 1\ninsn 0x0 len 3\na = get.i64 rax\nb = get.i64 rbx\nd = sub.i64 a, b\n\
                put.i64 cc_dst, d\nput.i64 cc_src, b\nk = const.i32 0xf\nput.i32 cc_op, k\n\
                c = cond.z\nexit_if.0 c retired 1 jump 0x10\nend jump 0x20\n";
    let puts = |dead: &[u16]| {
        let mut block = twofold_ir::parse::parse(text).unwrap();
        let at = |e: &Exit| matches!(e, Exit::Jump { off } if dead.contains(off));
        Passes::default().run(&mut block, &Options { flags_dead_at_exit: Some(&at), ..Options::default() });
        verify(&block).unwrap();
        block.ops.iter().filter(|o| matches!(o, Op::Put { .. })).count()
    };
    assert_eq!(puts(&[]), 3);
    assert_eq!(puts(&[0x10]), 3);
    assert_eq!(puts(&[0x20]), 3);
    assert_eq!(puts(&[0x10, 0x20]), 0);
}

/// A condition on flags of a known kind, by the passes, against `arch::flags`.
fn check_condition(passes: &mut Passes, op: CcOp, cc: CondCode, values: &[[u64; 3]], visible: bool) {
    let mut b = Builder::new(TbFlags(2));
    b.begin_insn(0, 1);
    let ty = Ty::ALL[op.log2_bytes() as usize];
    // The operands come from registers; DST is made by the op itself where that is to be found.
    let (x, y) = (b.get(Ty::I64, Loc::gpr(0)), b.get(Ty::I64, Loc::gpr(1)));
    let z = b.get(Ty::I64, Loc::gpr(2));
    let (xs, ys) = (b.trunc(ty, x), b.trunc(ty, y));
    let dst = match op.kind() {
        CcKind::Sub if visible => Some(b.sub(xs, ys)),
        CcKind::Add if visible => Some(b.add(xs, ys)),
        _ => None,
    };
    match dst {
        Some(d) => b.set_cc(op.kind(), d, Some(ys), None),
        None => {
            b.put(Loc::CC_DST, x);
            b.put(Loc::CC_SRC, y);
            b.put(Loc::CC_SRC2, z);
            let c = b.iconst(Ty::I32, u64::from(op.0));
            b.put(Loc::CC_OP, c);
        }
    }
    let c = b.cond(cc);
    let c = b.zext(Ty::I64, c);
    let mut block = b.finish(Exit::Indirect { rip: c, kind: twofold_ir::IndirectKind::Jump }, true);
    passes.run(&mut block, &Options::default());
    assert!(!block.ops.iter().any(|o| matches!(o, Op::Cond { .. })), "{op:?} {cc:?} is resolved");
    let program = Program::new(&block);
    let mut env = FakeEnv::new(1);
    for &[x, y, z] in values {
        env.file[1..4].copy_from_slice(&[x, y, z]);
        let d = match op.kind() {
            CcKind::Sub if dst.is_some() => x.wrapping_sub(y) & ty.mask(),
            CcKind::Add if dst.is_some() => x.wrapping_add(y) & ty.mask(),
            _ => x,
        };
        let want = flags::eval_cond(cc, op, d, y, z);
        match program.run(&mut env) {
            Leave::Exit { to: Target::Indirect { rip, .. }, .. } => {
                assert_eq!(rip, u64::from(want), "{op:?} {:?} {cc:?} {d:#x} {y:#x} {z:#x}\n{block}", op.kind());
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn conditions_are_those_of_arch_flags() {
    let mut passes = Passes::default();
    let mut rng = Rng(7);
    // All pairs of bytes, with both carries; for wider operands what is near the edges, and anything.
    let bytes: Vec<[u64; 3]> = (0..0x20000u64).map(|n| [n & 0xff | 0xab00, n >> 8 & 0xff, n >> 16]).collect();
    let wide: Vec<[u64; 3]> = (0..20_000).map(|_| [rng.value(), rng.value(), rng.value()]).collect();
    for kind in CcKind::ALL {
        for cc in CondCode::ALL {
            for log2 in 0..4 {
                let op = CcOp::new(kind, log2);
                for visible in [false, true] {
                    if visible && !matches!(kind, CcKind::Add | CcKind::Sub) {
                        continue;
                    }
                    check_condition(&mut passes, op, cc, if log2 == 0 { &bytes } else { &wide }, visible);
                }
            }
        }
    }
}
