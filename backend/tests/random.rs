//! Random blocks, compiled and run, against the reference evaluator: state, memory, everything observable in order, exits,
//! retired instructions, and faults at each point where one can happen.
#![allow(missing_docs)]
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

mod common;

use common::{Machine, RIP_BASE, Rig, enter};
use twofold_arch::{CodeSize, TbFlags};
use twofold_backend::{CompileStats, Emitter, Leave, Options, Probe};
use twofold_ir::Block;
use twofold_ir::eval::{self, Target, reference};
use twofold_ir::testing::{Rng, Shape, random_block};

fn block(rng: &mut Rng) -> Block {
    let shape = Shape::random(rng);
    let mut b = random_block(rng, shape);
    let mode = rng.below(3) as u32;
    b.flags = TbFlags(b.flags.0 | mode << TbFlags::MEM_SHIFT);
    b
}

fn truncate(b: &Block, rip: u64) -> u64 {
    match b.flags.size() {
        CodeSize::Bits16 => rip & 0xffff,
        CodeSize::Bits32 => rip & 0xffff_ffff,
        CodeSize::Bits64 => rip,
    }
}

/// Runs the block on two equal machines and compares. `runs` > 1 lets the TLB fill.
fn check(rig: &mut Rig, b: &Block, seed: u64, fault_at: usize, runs: usize) -> usize {
    let (mut a, mut c) = (Machine::new(seed), Machine::new(seed));
    for m in [&mut a, &mut c] {
        m.state.tb_flags = b.flags.0;
        m.fault_at = fault_at;
        m.fill = runs > 1;
    }
    let tb = rig.install(b);
    for run in 0..runs {
        let want = reference::run(b, &mut *a);
        c.state.fault.pending = 0;
        let budget = c.state.budget;
        let got = enter(&mut c, tb.entry);
        let text = || format!("seed {seed} fault {fault_at} run {run}\n{b:#?}\nwant {want:?} got {got:?}");
        let mut retired = (budget - c.state.budget) as u16;
        let at = |off: i64| truncate(b, RIP_BASE.wrapping_add(off as u64));
        match (want, got) {
            (eval::Leave::Abandoned { insn }, Leave::Fault) => {
                let host_ret = c.state.host_ret;
                assert_eq!(rig.memory.tb_at(host_ret), Some(tb.id));
                assert_eq!(tb.insn_at(host_ret), Some(insn as usize), "{}", text());
                c.state.budget += tb.unretired(insn.into());
                retired = (budget - c.state.budget) as u16;
                assert_eq!(retired, insn, "{}", text());
            }
            (eval::Leave::Exit { to, retired: n, .. }, got) => {
                assert_eq!(retired, n, "{}", text());
                let rip = c.state.rip;
                let ok = match (to, got) {
                    (Target::Jump { off }, Leave::Unlinked { tb: id, slot }) => {
                        id == tb.id && tb.slots[slot as usize].off == off && rip == at(off.into())
                    }
                    (Target::JumpFar { off }, Leave::Lookup) => rip == at(off.into()),
                    (Target::Indirect { rip: to, .. }, Leave::Lookup) => rip == to,
                    (Target::Dispatch { off }, Leave::Dispatch) => rip == at(off.into()),
                    (Target::Helped, Leave::Helped) => true,
                    (Target::Raise { off, exception }, Leave::Raise) => {
                        let f = c.state.fault;
                        let error = (f.has_error != 0).then_some(f.error);
                        rip == at(off.into()) && f.vector == exception.vector as u32 && error == exception.error
                    }
                    _ => false,
                };
                assert!(ok, "rip {rip:#x} {}", text());
            }
            _ => panic!("{}", text()),
        }
        if runs == 1 {
            for (n, (x, y)) in a.snapshots.iter().zip(&c.snapshots).enumerate() {
                if let Some(i) = (0..x.len()).find(|&i| x[i] != y[i]) {
                    panic!("event {n} word {i}: {:#x} {:#x} {:?} {}", x[i], y[i], a.trace[n], text());
                }
            }
            assert_eq!(a.trace, c.trace, "{}", text());
        }
        for (n, page) in &a.pages {
            if let Some(other) = c.pages.get(n) {
                assert!(page == other, "page {n:#x} {}", text());
            }
        }
        assert_eq!(a.state.gpr, c.state.gpr, "{}", text());
        assert_eq!(a.state.vec, c.state.vec, "{}", text());
        assert_eq!(a.digest(), c.digest(), "{}", text());
    }
    a.trace.len()
}

fn campaign(options: Options, seeds: std::ops::Range<u64>) -> CompileStats {
    let mut rig = Rig::new(options);
    for seed in seeds {
        let mut rng = Rng(seed * 77 + 1);
        let b = block(&mut rng);
        let events = check(&mut rig, &b, seed, usize::MAX, 1);
        for at in 0..events.min(6) {
            check(&mut rig, &b, seed, at, 1);
        }
        if events > 0 {
            check(&mut rig, &b, seed, usize::MAX, 3);
        }
    }
    rig.compiler.stats()
}

#[test]
fn random_blocks_direct() {
    let stats = campaign(Options::default(), 0..3000);
    println!("{} of {} blocks refused", stats.refused, stats.blocks);
    assert!(stats.refused * 20 < stats.blocks, "{stats:?}");
}

#[test]
fn random_blocks_inline() {
    campaign(Options { emitter: Emitter::Cranelift, probe: Probe::Inline, verify: true }, 0..1500);
}

#[test]
fn random_blocks_out_of_line() {
    campaign(Options { emitter: Emitter::Cranelift, probe: Probe::OutOfLine, verify: true }, 1000..2500);
}
