//! Chaining, the jump cache, the budget, code memory: what happens between blocks.
#![allow(missing_docs)]
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

mod common;

use common::{Machine, RIP_BASE, Rig, enter};
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CodeSize, Exception, Loc, TbFlags};
use twofold_backend::{CodeFull, CodeMemory, Leave, Options, Probe};
use twofold_ir::{BinOp, Block, Builder, Exit, Helper, IndirectKind, MemFlags, Ty};

const FLAGS: TbFlags = TbFlags(CodeSize::Bits64 as u32 | (MemMode::Supervisor as u32) << TbFlags::MEM_SHIFT);

/// `insns` instructions that each add 1 to a register, then `end`.
fn adder(start: u16, reg: u8, insns: u16, end: Exit) -> Block {
    let mut b = Builder::new(FLAGS);
    for i in 0..insns {
        b.begin_insn(start + i, 1);
        let v = b.get(Ty::I64, Loc::gpr(reg));
        let v = b.bin_imm(BinOp::Add, v, 1);
        b.put(Loc::gpr(reg), v);
    }
    b.finish(end, true)
}

fn machine() -> Box<Machine> {
    let mut m = Machine::new(1);
    m.state.gpr = [0; 16];
    m.state.tb_flags = FLAGS.0;
    m
}

fn rig() -> Rig {
    Rig::new(Options { verify: true, ..Options::default() })
}

#[test]
fn a_linked_loop_runs_until_the_budget_is_gone() {
    let mut rig = rig();
    let a = rig.install(&adder(0x10, 0, 3, Exit::Jump { off: 0x20 }));
    let b = rig.install(&adder(0x20, 1, 2, Exit::Jump { off: 0x10 }));
    let mut m = machine();
    assert_eq!(enter(&mut m, a.entry), Leave::Unlinked { tb: a.id, slot: 0 });
    assert_eq!(m.state.rip, RIP_BASE + 0x20);
    rig.memory.link(a.slots[0], b.entry);
    assert_eq!(enter(&mut m, a.entry), Leave::Unlinked { tb: b.id, slot: 0 });
    assert_eq!(m.state.rip, RIP_BASE + 0x10);
    rig.memory.link(b.slots[0], a.entry);
    m.state.budget = 1004;
    m.state.gpr = [0; 16];
    assert_eq!(enter(&mut m, a.entry), Leave::Budget);
    // 200 rounds of 5, then a block of 3, and 1 is left of 1,004: not enough for 2.
    assert_eq!((m.state.budget, m.state.rip), (1, RIP_BASE + 0x20));
    assert_eq!((m.state.gpr[0], m.state.gpr[1]), (603, 400));
    rig.memory.unlink(b.slots[0]);
    m.state.budget = 1000;
    assert_eq!(enter(&mut m, a.entry), Leave::Unlinked { tb: b.id, slot: 0 });
    assert_eq!(m.state.budget, 995);
    assert_eq!((rig.memory.stats().links, rig.memory.stats().unlinks), (2, 1));
}

#[test]
fn attention_stops_a_loop_before_the_next_block() {
    let mut rig = rig();
    let a = rig.install(&adder(0x10, 0, 3, Exit::Jump { off: 0x10 }));
    rig.memory.link(a.slots[0], a.entry);
    let mut m = machine();
    *m.state.attention.get_mut() = -1;
    m.state.budget = 100;
    assert_eq!(enter(&mut m, a.entry), Leave::Budget);
    assert_eq!((m.state.budget, m.state.rip, m.state.gpr[0]), (100, RIP_BASE + 0x10, 0));
    // The attention word is somebody else's: it is not written.
    assert_eq!(*m.state.attention.get_mut(), -1);
}

#[test]
fn another_thread_gets_attention() {
    let mut rig = rig();
    let a = rig.install(&adder(0x10, 0, 1, Exit::Jump { off: 0x10 }));
    rig.memory.link(a.slots[0], a.entry);
    let mut m = machine();
    m.state.budget = i32::MAX;
    let flag = &raw const m.state.attention as usize;
    std::thread::scope(|s| {
        s.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(5));
            // SAFETY: the state outlives the scope.
            #[allow(unsafe_code)]
            let flag = unsafe { &*(flag as *const std::sync::atomic::AtomicI32) };
            flag.store(-1, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(enter(&mut m, a.entry), Leave::Budget);
    });
    assert_eq!(m.state.gpr[0], (i32::MAX - m.state.budget) as u64);
}

#[test]
fn far_and_indirect_jumps_go_through_the_jump_cache() {
    for size in [CodeSize::Bits64, CodeSize::Bits32, CodeSize::Bits16] {
        let flags = TbFlags(size as u32);
        let mask = match size {
            CodeSize::Bits64 => u64::MAX,
            CodeSize::Bits32 => 0xffff_ffff,
            CodeSize::Bits16 => 0xffff,
        };
        let mut rig = rig();
        let mut b = Builder::new(flags);
        b.begin_insn(8, 2);
        let far = rig.install(&b.finish(Exit::JumpFar { off: -0x7fff }, true));
        let mut b = Builder::new(flags);
        b.begin_insn(8, 2);
        let rip = b.get(Ty::I64, Loc::gpr(2));
        let indirect = rig.install(&b.finish(Exit::Indirect { rip, kind: IndirectKind::Return }, true));
        let mut t = Builder::new(flags);
        t.begin_insn(1, 1);
        let target = rig.install(&t.finish(Exit::Dispatch { off: 5 }, true));

        let mut m = machine();
        m.state.tb_flags = flags.0;
        m.state.rip_base = 0x3000;
        let rip = 0x3000u64.wrapping_sub(0x7fff) & mask;
        m.state.gpr[2] = rip;
        for entry in [far.entry, indirect.entry] {
            m.jumps.fill([u64::MAX; 4]);
            m.state.rip_base = 0x3000;
            assert_eq!(enter(&mut m, entry), Leave::Lookup);
            assert_eq!(m.state.rip, rip);
            let base = rip & !0xfff;
            let good = [rip, flags.0.into(), target.entry, base];
            m.jumps[twofold_mmu::jump_index(rip)] = good;
            m.state.budget = 100;
            assert_eq!(enter(&mut m, entry), Leave::Dispatch);
            assert_eq!((m.state.rip_base, m.state.rip, m.state.budget), (base, base + 5, 98));
            for wrong in [[rip ^ 1 << 40, good[1], good[2], base], [rip, good[1] ^ 1 << 9, good[2], base]] {
                m.jumps[twofold_mmu::jump_index(rip)] = wrong;
                m.state.rip_base = 0x3000;
                assert_eq!(enter(&mut m, entry), Leave::Lookup);
            }
        }
    }
}

#[test]
fn a_block_that_spills_chains_too() {
    let mut rig = rig();
    let mut b = Builder::new(FLAGS);
    b.begin_insn(0, 4);
    // Twenty values that live across everything.
    let values: Vec<_> = (0..20u64)
        .map(|i| {
            let v = b.get(Ty::I64, Loc::gpr((i % 16) as u8));
            b.bin_imm(BinOp::Add, v, i)
        })
        .collect();
    let one = b.iconst(Ty::I64, 1);
    let _ = b.call(Helper::Crc32, &[one, one, one]);
    let mut sum = values[0];
    for (i, &v) in values.iter().enumerate().skip(1) {
        sum = b.add(sum, v);
        let sum_i = b.bin_imm(BinOp::Rotl, sum, i as u64);
        sum = b.xor(sum_i, v);
    }
    b.put(Loc::gpr(0), sum);
    let block = b.finish(Exit::Jump { off: 0x10 }, true);
    let spilling = rig.install(&block);
    let plain = rig.install(&adder(0x10, 1, 1, Exit::Jump { off: 0 }));
    rig.memory.link(spilling.slots[0], plain.entry);
    rig.memory.link(plain.slots[0], spilling.entry);
    let mut m = machine();
    let mut model = machine();
    m.state.budget = 2000;
    assert_eq!(enter(&mut m, spilling.entry), Leave::Budget);
    for _ in 0..1000 {
        twofold_ir::eval::reference::run(&block, &mut *model);
        model.state.gpr[1] += 1;
    }
    assert_eq!(m.state.gpr, model.state.gpr);
}

#[test]
fn exceptions_carry_their_code() {
    let mut rig = rig();
    for exception in [Exception::UD, Exception::gp(0x123), Exception::page_fault(7, 0xdead_beef_0000)] {
        let mut b = Builder::new(FLAGS);
        b.begin_insn(0x123, 4);
        b.begin_insn(0x127, 2);
        let tb = rig.install(&b.finish(Exit::Raise { off: 0x127, exception }, false));
        assert_eq!(tb.charged, 1);
        let mut m = machine();
        m.state.budget = 10;
        assert_eq!(enter(&mut m, tb.entry), Leave::Raise);
        assert_eq!((m.state.rip, m.state.budget), (RIP_BASE + 0x127, 9));
        let f = m.state.fault;
        assert_eq!((f.pending, f.vector), (1, exception.vector as u32));
        assert_eq!((f.has_error != 0).then_some(f.error), exception.error);
        assert_eq!(f.cr2, exception.cr2);
    }
}

#[test]
fn a_helper_knows_where_it_was_called() {
    let mut rig = rig();
    let mut b = Builder::new(FLAGS);
    for i in 0..3 {
        b.begin_insn(i * 2, 2);
        b.call(Helper::Pause, &[]);
    }
    let tb = rig.install(&b.finish(Exit::Helped, true));
    let mut m = machine();
    assert_eq!(enter(&mut m, tb.entry), Leave::Helped);
    let at: Vec<_> = m.rets.iter().map(|&r| tb.insn_at(r)).collect();
    assert_eq!(at, [Some(0), Some(1), Some(2)]);
    assert_eq!(tb.insn_at(tb.code.start), None);
    assert_eq!(tb.insn_at(0), None);
    assert_eq!(rig.memory.tb_at(tb.code.end), None);
    assert_eq!(rig.memory.tb_at(0), None);
    assert_eq!(rig.memory.tb_at(u64::MAX), None);
}

#[test]
fn accesses_that_cross_or_miss_take_the_slow_path_and_others_do_not() {
    for probe in [Probe::Inline, Probe::OutOfLine] {
        let mut rig = Rig::new(Options { probe, verify: true, ..Options::default() });
        for ty in [Ty::I8, Ty::I16, Ty::I32, Ty::I64, Ty::V128] {
            for flags in [MemFlags::NONE, MemFlags::STACK, MemFlags::ALIGNED] {
                let mut b = Builder::new(FLAGS);
                b.begin_insn(0, 4);
                let a = b.get(Ty::I64, Loc::gpr(3));
                let v = b.load(ty, flags, a);
                b.put(Loc::xmm(1), v);
                let a = b.get(Ty::I64, Loc::gpr(4));
                b.store(flags, a, v);
                let tb = rig.install(&b.finish(Exit::Helped, true));
                let size = u64::from(ty.bytes());
                for off in (0..40).chain(4096 - 40..4096) {
                    let mut m = machine();
                    m.fill_tlb(0x5000);
                    m.fill_tlb(0x6000);
                    let addr = 0x5000 + off;
                    m.state.gpr[3] = addr;
                    m.state.gpr[4] = 0x6000 + off;
                    let want = m.read(addr, size as u32);
                    let slow = off + size > 4096 || flags == MemFlags::ALIGNED && off % size != 0;
                    m.state.vec[1] = [0; 4];
                    assert_eq!(enter(&mut m, tb.entry), Leave::Helped);
                    assert_eq!(m.slow, if slow { 2 } else { 0 }, "{probe:?} {ty:?} {flags:?} {off:#x}");
                    let got = u128::from(m.state.vec[1][0]) | u128::from(m.state.vec[1][1]) << 64;
                    assert_eq!(got, want);
                    assert_eq!(m.read(0x6000 + off, size as u32), want);
                }
            }
        }
    }
}

#[test]
fn no_mapping_is_writable_and_executable() {
    let _rig = rig();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours: Vec<&str> = maps.lines().filter(|l| l.contains("/dev/zero")).collect();
    assert!(ours.iter().any(|l| l.contains("rw-s")) && ours.iter().any(|l| l.contains("r-xs")), "{maps}");
    assert!(!maps.contains("rwx"), "{maps}");
}

#[test]
fn a_full_memory_evicts_its_oldest_region() {
    let mut rig = rig();
    let tb = rig.compile(&adder(0, 0, 500, Exit::Jump { off: 0 }));
    let mut memory = CodeMemory::new(2 << 20).unwrap();
    let mut live = Vec::new();
    let mut id = 0;
    while let Ok(t) = memory.install(&tb, id) {
        live.push(t);
        id += 1;
    }
    assert_eq!(memory.install(&tb, id).unwrap_err(), CodeFull);
    let full = memory.stats().used;
    assert!(full <= memory.stats().capacity && full > 2 << 20);
    let dead = memory.evict_oldest();
    assert!(!dead.is_empty() && dead.iter().copied().eq(0..dead.len() as u32));
    assert!(memory.stats().used < full);
    assert_eq!(memory.tb_at(live[0].entry), None);
    let last = live.last().unwrap();
    assert_eq!(memory.tb_at(last.entry), Some(last.id));
    // What was evicted is filled again, the rest still runs.
    let again = memory.install(&tb, id).unwrap();
    assert_eq!(again.code, live[0].code);
    let mut m = machine();
    for t in [&again, last] {
        assert_eq!(enter(&mut m, t.entry), Leave::Unlinked { tb: t.id, slot: 0 });
    }
    assert_eq!(m.state.gpr[0], 1000);
    let s = memory.stats();
    assert_eq!((s.evictions, s.evicted, s.peak), (1, dead.len() as u64, full));
    assert_eq!(memory.evict_oldest().len() + memory.evict_oldest().len(), live.len() - dead.len() + 1);
    assert!(memory.evict_oldest().is_empty());
}

#[test]
fn malformed_blocks_are_errors() {
    let mut rig = rig();
    assert!(rig.compiler.compile(&Block::default()).is_err());
    let mut b = adder(0, 0, 1, Exit::Helped);
    b.ops.remove(0);
    assert!(rig.compiler.compile(&b).is_err());
    // And the compiler goes on working.
    let b = adder(0, 0, 1, Exit::Helped);
    assert!(rig.compiler.compile(&b).is_ok());
    let text = rig.compiler.clif_text(&b).unwrap();
    assert!(text.contains("return_call"), "{text}");
}

#[test]
fn a_counting_block_counts_its_executions() {
    let mut rig = rig();
    let block = adder(0x10, 0, 3, Exit::Jump { off: 0x10 });
    let tb = rig.compiler.compile_counted(&block, Some(5)).unwrap();
    let tb = rig.memory.install(&tb, 1).unwrap();
    rig.memory.link(tb.slots[0], tb.entry);
    let counts = [0u64; 8];
    let mut m = machine();
    m.state.exec_counts = counts.as_ptr() as u64;
    m.state.budget = 300;
    assert_eq!(enter(&mut m, tb.entry), Leave::Budget);
    assert_eq!(std::hint::black_box(&counts), &[0, 0, 0, 0, 0, 100, 0, 0]);
}
