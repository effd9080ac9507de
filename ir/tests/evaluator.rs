//! The lowered program against the reference evaluator, on random blocks.

use twofold_ir::Block;
use twofold_ir::eval::{Leave, Program, reference};
use twofold_ir::testing::{FakeEnv, Rng, Shape, random_block};

/// Runs a block both ways, with a fault at event `fault_at`, and compares all there is to see. Returns the number of events.
fn compare(block: &Block, program: &Program, seed: u64, fault_at: usize) -> usize {
    let mut a = FakeEnv::new(seed);
    a.exact_flags = true;
    let mut b = a.clone();
    a.fault_at = fault_at;
    b.fault_at = fault_at;
    let want = reference::run(block, &mut a);
    let got = program.run(&mut b);
    let same = want == got && a.trace == b.trace && a.digest() == b.digest() && a.memory == b.memory;
    if !same {
        let first = a.trace.iter().zip(&b.trace).position(|(x, y)| x != y);
        panic!(
            "{:?} seed {seed:#x} fault {fault_at}: want {want:?} got {got:?}\nfirst difference {first:?} {:?} {:?}\n{}\n{program}",
            (0..256).filter(|&i| a.file[i] != b.file[i]).collect::<Vec<_>>(),
            first.map(|i| &a.trace[i]),
            first.map(|i| &b.trace[i]),
            block.ops.iter().enumerate().map(|(i, o)| format!("{i}: {o:?}\n")).collect::<String>(),
        );
    }
    a.trace.len()
}

#[test]
fn program_does_what_the_reference_does() {
    let mut rng = Rng(1);
    let (mut left, mut faults, mut fallbacks) = (0, 0, 0);
    for round in 0..30_000 {
        let shape = Shape::random(&mut rng);
        let block = random_block(&mut rng, shape);
        let program = Program::new(&block);
        fallbacks += usize::from(program.is_fallback());
        let events = compare(&block, &program, round, usize::MAX);
        for at in 0..events.min(6) {
            compare(&block, &program, round, at);
            faults += 1;
        }
        let mut env = FakeEnv::new(round);
        left += usize::from(
            matches!(program.run(&mut env), Leave::Exit { exit, .. } if (exit as usize) < block.exits.len()),
        );
    }
    assert!(left > 1000 && faults > 10_000, "{left} {faults}");
    assert!(fallbacks < 30, "{fallbacks} blocks had too many live values");
}
