//! Random regions, loops included, against the reference evaluator that runs their blocks one after the other: state, memory,
//! everything observable in order, exits, retired instructions, faults at each point where one can happen, and the budget.
#![allow(missing_docs)]
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

mod common;

use common::{Machine, RIP_BASE, enter};
use twofold_arch::{CcKind, CcOp, CodeSize, CondCode, Loc, TbFlags};
use twofold_backend::{CodeMemory, InstalledTb, Leave, Options, REGION_SLOTS, RegionCompiler};
use twofold_ir::eval::{self, Target, reference};
use twofold_ir::passes::{Options as PassOptions, Part, Passes, join_all};
use twofold_ir::testing::{Rng, Shape, random_block};
use twofold_ir::{BinOp, Block, Builder, Exit, IntCc, MemFlags, Ty};

/// Bytes from one block to the next.
const STRIDE: u16 = 128;

fn blocks(rng: &mut Rng) -> Vec<Block> {
    let n = 1 + rng.below(5);
    let flags = TbFlags(rng.below(3) as u32 | (rng.below(3) as u32) << TbFlags::MEM_SHIFT);
    (0..n)
        .map(|i| {
            let mut b = loop {
                let shape = Shape::random(rng);
                let b = random_block(rng, shape);
                if b.retired > 0 {
                    break b;
                }
            };
            b.flags = flags;
            b.insns.iter_mut().for_each(|insn| insn.off += i as u16 * STRIDE);
            for side in &mut b.exits {
                redirect(rng, &mut side.exit, n, 2);
            }
            if let Some(end) = &mut b.end {
                redirect(rng, end, n, 6);
            }
            b
        })
        .collect()
}

/// Makes an exit lead to one of `n` blocks, most of the time.
fn redirect(rng: &mut Rng, exit: &mut Exit, n: usize, odds: usize) {
    if !rng.one_in(odds) {
        *exit = Exit::Jump { off: rng.below(n) as u16 * STRIDE };
    }
}

fn truncate(b: &Block, rip: u64) -> u64 {
    match b.flags.size() {
        CodeSize::Bits16 => rip & 0xffff,
        CodeSize::Bits32 => rip & 0xffff_ffff,
        CodeSize::Bits64 => rip,
    }
}

/// How the reference left.
enum Left {
    Exit(Target),
    Fault(u16),
    /// Between blocks, at this page offset.
    At(u16),
}

/// Runs blocks until they leave, or until `retired` instructions are done and the next block starts at `stop`.
fn model(blocks: &[Block], m: &mut Machine, stop: Option<(i32, u16)>) -> (Left, i32) {
    let (mut at, mut retired) = (0, 0);
    for step in 0.. {
        let b = &blocks[at];
        if stop == Some((retired, b.start())) {
            return (Left::At(b.start()), retired);
        }
        assert!(step < 10_000, "the reference does not leave, stop {stop:?}");
        match reference::run(b, m) {
            eval::Leave::Abandoned { insn } => {
                return (Left::Fault(b.insns[insn as usize].off), retired + i32::from(insn));
            }
            eval::Leave::Exit { to, retired: n, .. } => {
                retired += i32::from(n);
                match to {
                    Target::Jump { off } if n > 0 && blocks.iter().any(|b| b.start() == off) => {
                        at = blocks.iter().position(|b| b.start() == off).unwrap_or(0);
                    }
                    _ => return (Left::Exit(to), retired),
                }
            }
        }
    }
    unreachable!()
}

struct Rig {
    compiler: RegionCompiler,
    memory: CodeMemory,
}

impl Rig {
    fn install(&mut self, blocks: &[Block]) -> InstalledTb {
        let tb = self.compiler.compile(blocks, None, None).unwrap_or_else(|e| panic!("{e}\n{blocks:#?}"));
        loop {
            match self.memory.install(&tb, 5) {
                Ok(tb) => return tb,
                Err(_) => drop(self.memory.evict_oldest()),
            }
        }
    }
}

/// How a run goes.
#[derive(Clone, Copy, Debug)]
struct Case {
    seed: u64,
    fault_at: usize,
    budget: i32,
    /// More than one lets the TLB fill.
    runs: usize,
}

fn check(rig: &mut Rig, tb: &InstalledTb, blocks: &[Block], case: Case) -> usize {
    let Case { seed, fault_at, budget, runs } = case;
    let (mut a, mut c) = (Machine::new(seed), Machine::new(seed));
    for m in [&mut a, &mut c] {
        m.state.tb_flags = blocks[0].flags.0;
        m.fault_at = fault_at;
        m.fill = runs > 1;
    }
    for run in 0..runs {
        c.state.fault.pending = 0;
        c.state.budget = budget;
        let got = enter(&mut c, tb.entry);
        let mut did = budget - c.state.budget;
        let rip = c.state.rip;
        let at = |off: i64| truncate(&blocks[0], RIP_BASE.wrapping_add(off as u64));
        let mut stop = None;
        if got == Leave::Budget {
            let b = blocks.iter().find(|b| at(b.start().into()) == rip).expect("a block starts there");
            assert!(c.state.budget < 0, "seed {seed} left with {}", c.state.budget);
            stop = Some((did, b.start()));
        }
        let (want, retired) = model(blocks, &mut a, stop);
        let text = |what: &str| format!("{what}: {case:?} run {run} {got:?}\n{blocks:#?}");
        let ok = match (&want, got) {
            (Left::At(off), Leave::Budget) => rip == at((*off).into()),
            (Left::Fault(off), Leave::Fault) => {
                let host_ret = c.state.host_ret;
                assert_eq!(rig.memory.tb_at(host_ret), Some(tb.id));
                let (o, back) = tb.site(host_ret).expect("a site");
                did -= back;
                o == i32::from(*off)
            }
            (Left::Exit(to), got) => match (*to, got) {
                (Target::Jump { off }, Leave::Unlinked { tb: id, slot }) => {
                    let slot = tb.slots[usize::from(slot - REGION_SLOTS)];
                    id == tb.id && slot.off == off && rip == at(off.into())
                }
                (Target::JumpFar { off }, Leave::Lookup) => rip == at(off.into()),
                (Target::Indirect { rip: to, .. }, Leave::Lookup) => rip == to,
                (Target::Dispatch { off }, Leave::Dispatch) => rip == at(off.into()),
                (Target::Helped, Leave::Helped) => true,
                (Target::Raise { off, exception }, Leave::Raise) => {
                    rip == at(off.into()) && c.state.fault.vector == exception.vector as u32
                }
                _ => false,
            },
            _ => false,
        };
        assert!(ok, "{}", text("exit"));
        assert_eq!(did, retired, "{}", text("retired"));
        if runs == 1 {
            for (n, (x, y)) in a.snapshots.iter().zip(&c.snapshots).enumerate() {
                if let Some(i) = (0..x.len()).find(|&i| x[i] != y[i]) {
                    panic!("event {n} word {i}: {:#x} {:#x} {:?} {}", x[i], y[i], a.trace[n], text("state"));
                }
            }
            assert!(a.trace == c.trace, "{}", text("trace"));
        }
        for (n, page) in &a.pages {
            if let Some(other) = c.pages.get(n) {
                assert!(page == other, "page {n:#x} {}", text("memory"));
            }
        }
        assert_eq!(a.state.gpr, c.state.gpr, "{}", text("gpr"));
        assert_eq!(a.state.vec, c.state.vec, "{}", text("vec"));
        assert_eq!(a.digest(), c.digest(), "{}", text("state"));
    }
    a.trace.len()
}

fn campaign(seeds: std::ops::Range<u64>, optimise: bool) {
    let options = Options { verify: true, ..Options::default() };
    let compiler = RegionCompiler::new(options).expect("compiler");
    let mut rig = Rig { compiler, memory: CodeMemory::new(8 << 20).expect("code memory") };
    let mut passes = Passes::default();
    for seed in seeds {
        let mut rng = Rng(seed * 91 + 7);
        let mut b = blocks(&mut rng);
        // The passes may leave other words behind where the flags do not need them: the reference runs what they made.
        if optimise {
            let part = |block: Block| Part::<()> { block, page: 0, guesses: Vec::new(), tags: Vec::new() };
            b = join_all(b.into_iter().map(part).collect()).0;
            b.iter_mut().for_each(|b| passes.run(b, &PassOptions::HOST));
        }
        let tb = rig.install(&b);
        let plain = Case { seed, fault_at: usize::MAX, budget: 150, runs: 1 };
        let events = check(&mut rig, &tb, &b, plain);
        check(&mut rig, &tb, &b, Case { budget: 3, ..plain });
        for _ in 0..events.min(6) {
            check(&mut rig, &tb, &b, Case { fault_at: rng.below(events), ..plain });
        }
        if events > 0 {
            check(&mut rig, &tb, &b, Case { runs: 3, ..plain });
        }
    }
}

#[test]
fn random_regions() {
    campaign(0..1000, false);
}

#[test]
fn random_regions_after_passes() {
    campaign(1000..2500, true);
}

/// A region that would never leave is left when somebody wants attention.
#[test]
fn attention_ends_a_loop() {
    let text = "block flags 0x2 retired 1\ninsn 0x0 len 1\na = get.i64 rax\none = const.i64 0x1\nb = add.i64 a, one\n\
                put.i64 rax, b\nend jump 0x0\n";
    let b = twofold_ir::parse::parse(text).expect("a block");
    let mut rig = Rig {
        compiler: RegionCompiler::new(Options::default()).expect("compiler"),
        memory: CodeMemory::new(8 << 20).expect("code memory"),
    };
    let tb = rig.install(&[b]);
    let mut m = Machine::new(1);
    m.state.budget = i32::MAX;
    let before = m.state.gpr[0];
    let wanted = std::ptr::from_ref(&m.state.attention) as usize;
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        // SAFETY: the machine outlives the thread; the word is atomic.
        #[allow(unsafe_code)]
        let attention = unsafe { &*(wanted as *const std::sync::atomic::AtomicI32) };
        attention.store(-1, std::sync::atomic::Ordering::Release);
    });
    assert_eq!(enter(&mut m, tb.entry), Leave::Budget);
    thread.join().expect("no panic");
    assert_eq!(m.state.rip, RIP_BASE);
    let did = m.state.gpr[0].wrapping_sub(before);
    assert_eq!(did, (i32::MAX - m.state.budget) as u64);
    assert!(did > 1000);
}

/// Accesses near each other share a probe: across page borders, backwards, with faults at each of them.
#[test]
fn windows_cross_pages() {
    let text = "block flags 0x2 retired 4\n\
                insn 0x0 len 4\np = get.i64 rbx\na = load.i64 p\n\
                insn 0x4 len 4\neight = const.i64 0x8\nq = add.i64 p, eight\nb = load.i32 q\nw = zext.i64 b\n\
                s = add.i64 a, w\nput.i64 rax, s\n\
                insn 0x8 len 4\nback = const.i64 0x11\nr = sub.i64 p, back\nstore.i64 r, s\n\
                insn 0xc len 4\nt = add.i64 r, eight\nc = load.i16 t\nstore.i16 t, c\n\
                step = const.i64 0x2b\nn = add.i64 p, step\nput.i64 rbx, n\n\
                end jump 0x0\n";
    let b = [twofold_ir::parse::parse(text).expect("a block")];
    let mut rig = Rig {
        compiler: RegionCompiler::new(Options { verify: true, ..Options::default() }).expect("compiler"),
        memory: CodeMemory::new(8 << 20).expect("code memory"),
    };
    let tb = rig.install(&b);
    let plain = Case { seed: 3, fault_at: usize::MAX, budget: 1000, runs: 1 };
    let events = check(&mut rig, &tb, &b, plain);
    assert!(events > 1000);
    for at in 0..40 {
        check(&mut rig, &tb, &b, Case { fault_at: at * 7, ..plain });
        check(&mut rig, &tb, &b, Case { seed: at as u64, runs: 4, ..plain });
    }
}

/// A chain of additions, subtractions and products of 64 bits with carries between, as the front end makes it.
fn chain(rng: &mut Rng) -> Block {
    let mut b = Builder::new(TbFlags(CodeSize::Bits64 as u32));
    let edge = [0, 1, 2, u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1];
    let n = 4 + rng.below(16);
    for i in 0..n {
        b.begin_insn(i as u16 * 4, 4);
        let reg = Loc::gpr(rng.below(6) as u8);
        let c = b.cond(CondCode::B);
        let c = b.zext(Ty::I64, c);
        let x = b.get(Ty::I64, reg);
        let y = match rng.below(4) {
            0 => b.iconst(Ty::I64, edge[rng.below(edge.len())]),
            1 => {
                let at = b.get(Ty::I64, Loc::gpr(7));
                b.load(Ty::I64, MemFlags::NONE, at)
            }
            _ => b.get(Ty::I64, Loc::gpr(rng.below(6) as u8)),
        };
        match rng.below(8) {
            0 => {
                let (lo, hi) = (b.bin(BinOp::Mul, x, y), b.bin(BinOp::UMulHi, x, y));
                b.put(Loc::gpr(0), lo);
                b.put(Loc::gpr(2), hi);
            }
            1 => {
                let s = b.add(x, y);
                b.put(reg, s);
                b.set_cc(CcKind::Add, s, Some(y), None);
            }
            2 => {
                let s = b.sub(x, y);
                b.put(reg, s);
                b.set_cc(CcKind::Sub, s, Some(y), None);
            }
            3 => {
                // SETB and ADD, as compilers do.
                let r = b.add(x, c);
                b.put(reg, r);
                b.set_cc(CcKind::Add, r, Some(c), None);
            }
            4 => {
                // ADCX.
                let (s, f) = (b.add(x, y), b.flags());
                let r = b.add(s, c);
                let (c1, c2) = (b.cmp(IntCc::Ult, s, x), b.cmp(IntCc::Ult, r, s));
                let out = b.or(c1, c2);
                b.put(reg, r);
                let out = b.zext(Ty::I64, out);
                let f = b.bin_imm(BinOp::And, f, !1);
                let f = b.or(f, out);
                b.set_flags(f);
            }
            5 => {
                let s = b.sub(x, y);
                let s = b.sub(s, c);
                b.put(reg, s);
                b.set_cc(CcKind::Sbb, s, Some(y), Some(c));
            }
            _ => {
                let s = b.add(x, y);
                let s = b.add(s, c);
                b.put(reg, s);
                b.set_cc(CcKind::Adc, s, Some(y), Some(c));
            }
        }
    }
    b.finish(Exit::Jump { off: 0 }, true)
}

/// Carries that stay in the host's flags, and products in one instruction, are what the reference makes of them.
#[test]
fn carry_chains() {
    let mut rig = Rig {
        compiler: RegionCompiler::new(Options { verify: true, ..Options::default() }).expect("compiler"),
        memory: CodeMemory::new(8 << 20).expect("code memory"),
    };
    let (mut passes, mut chained) = (Passes::default(), [0; 2]);
    let mut quick = common::Rig::new(Options { verify: true, ..Options::default() });
    for seed in 0..400 {
        let raw = chain(&mut Rng(seed * 77 + 5));
        let mut b = raw.clone();
        passes.run(&mut b, &PassOptions::HOST);
        let outcome = |b: &Block| {
            let mut m = Machine::new(seed);
            reference::run(b, &mut *m);
            let s = &m.state;
            (s.gpr, twofold_arch::flags::arith_flags(CcOp(s.cc_op as u8), s.cc_dst, s.cc_src, s.cc_src2))
        };
        assert_eq!(outcome(&raw), outcome(&b), "the passes: {seed}\n{raw}{b}");
        let mut m = Machine::new(seed);
        m.state.tb_flags = b.flags.0;
        let one = quick.install(&b);
        assert!(matches!(enter(&mut m, one.entry), Leave::Unlinked { .. }));
        let s = &m.state;
        let did = (s.gpr, twofold_arch::flags::arith_flags(CcOp(s.cc_op as u8), s.cc_dst, s.cc_src, s.cc_src2));
        assert_eq!(did, outcome(&b), "the quick tier: {seed}\n{b}");
        let b = [b];
        let tb = rig.compiler.compile(&b, None, None).expect("code").listing();
        chained[0] += usize::from(tb.contains(" adc "));
        chained[1] += usize::from(tb.contains(" sbb "));
        let tb = rig.install(&b);
        let plain = Case { seed, fault_at: usize::MAX, budget: 100, runs: 1 };
        let events = check(&mut rig, &tb, &b, plain);
        for at in 0..events.min(3) {
            check(&mut rig, &tb, &b, Case { fault_at: at, ..plain });
        }
        check(&mut rig, &tb, &b, Case { runs: 3, ..plain });
    }
    assert!(chained[0] > 200 && chained[1] > 80, "{chained:?}");
}
