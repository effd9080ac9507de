//! How long a block takes to compile and to run, and how fast a hot loop is.
//!
//! `cargo run --release -p twofold-backend --example compilebench [-- asm|map|jitdump]`
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Machine, Rig, enter};
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CcKind, CodeSize, CondCode, Loc, TbFlags};
use twofold_backend::perf::{Profile, ProfileKind};
use twofold_backend::{Leave, Options, Probe};
use twofold_ir::{BinOp, Block, Builder, Exit, IntCc, MemFlags, Ty};

const FLAGS: TbFlags = TbFlags(CodeSize::Bits64 as u32 | (MemMode::Supervisor as u32) << TbFlags::MEM_SHIFT);

/// Ten instructions, three loads and a store among them, ending in a compare and branch to itself, as the passes leave it.
fn ten() -> Block {
    let mut b = Builder::new(FLAGS);
    let r = Loc::gpr;
    b.begin_insn(0, 4); // mov rax, [rdi + 8]
    let rdi = b.get(Ty::I64, r(7));
    let a = b.bin_imm(BinOp::Add, rdi, 8);
    let rax = b.load(Ty::I64, MemFlags::NONE, a);
    b.put(r(0), rax);
    b.begin_insn(4, 3); // add rax, rcx
    let rcx = b.get(Ty::I64, r(1));
    let rax = b.add(rax, rcx);
    b.put(r(0), rax);
    b.begin_insn(7, 4); // mov edx, [rsi + rcx*4]
    let rsi = b.get(Ty::I64, r(6));
    let x = b.bin_imm(BinOp::Shl, rcx, 2);
    let a = b.add(rsi, x);
    let edx = b.load(Ty::I32, MemFlags::NONE, a);
    let rdx = b.zext(Ty::I64, edx);
    b.put(r(2), rdx);
    b.begin_insn(11, 3); // xor rax, rdx
    let rax = b.xor(rax, rdx);
    b.put(r(0), rax);
    b.begin_insn(14, 4); // movzx r8d, byte [rdi]
    let v = b.load(Ty::I8, MemFlags::NONE, rdi);
    let r8 = b.zext(Ty::I64, v);
    b.put(r(8), r8);
    b.begin_insn(18, 4); // lea r9, [rax + r8]
    let r9 = b.add(rax, r8);
    b.put(r(9), r9);
    b.begin_insn(22, 4); // mov [rdi + 16], r9
    let a = b.bin_imm(BinOp::Add, rdi, 16);
    b.store(MemFlags::NONE, a, r9);
    b.begin_insn(26, 3); // inc rcx
    let rcx = b.bin_imm(BinOp::Add, rcx, 1);
    b.put(r(1), rcx);
    b.begin_insn(29, 3); // cmp rcx, r10
    let r10 = b.get(Ty::I64, r(10));
    let d = b.sub(rcx, r10);
    b.set_cc(CcKind::Sub, d, Some(r10), None);
    b.begin_insn(32, 2); // jne
    let c = b.cmp(IntCc::Ne, rcx, r10);
    b.exit_if(c, Exit::Jump { off: 0 }, true);
    b.finish(Exit::Jump { off: 34 }, true)
}

/// add, add, xor, dec, jnz: registers only.
fn hot() -> Block {
    let mut b = Builder::new(FLAGS);
    let r = Loc::gpr;
    b.begin_insn(0, 3);
    let (x, y) = (b.get(Ty::I64, r(0)), b.get(Ty::I64, r(3)));
    let x = b.add(x, y);
    b.put(r(0), x);
    b.begin_insn(3, 3);
    let z = b.get(Ty::I64, r(2));
    let z = b.add(z, x);
    b.put(r(2), z);
    b.begin_insn(6, 3);
    let w = b.get(Ty::I64, r(6));
    let w = b.xor(w, z);
    b.put(r(6), w);
    b.begin_insn(9, 3);
    let n = b.get(Ty::I64, r(1));
    let one = b.iconst(Ty::I64, 1);
    let n = b.sub(n, one);
    b.put(r(1), n);
    b.set_cc(CcKind::Dec, n, Some(one), None);
    b.begin_insn(12, 2);
    let c = b.cmp_imm(IntCc::Ne, n, 0);
    b.exit_if(c, Exit::Jump { off: 0 }, true);
    b.finish(Exit::Jump { off: 14 }, true)
}

/// Five instructions with one load, as the average block of a kernel has.
fn average() -> Block {
    let mut b = Builder::new(FLAGS);
    let r = Loc::gpr;
    b.begin_insn(0, 4); // mov rax, [rbx + 24]
    let rbx = b.get(Ty::I64, r(3));
    let a = b.bin_imm(BinOp::Add, rbx, 24);
    let rax = b.load(Ty::I64, MemFlags::NONE, a);
    b.put(r(0), rax);
    b.begin_insn(4, 3); // mov rdi, rbx
    b.put(r(7), rbx);
    b.begin_insn(7, 5); // mov esi, 5
    let c = b.iconst(Ty::I64, 5);
    b.put(r(6), c);
    b.begin_insn(12, 3); // test rax, rax
    b.set_cc(CcKind::Logic, rax, None, None);
    b.begin_insn(15, 2); // jz
    let c = b.cmp_imm(IntCc::Eq, rax, 0);
    b.exit_if(c, Exit::Jump { off: 100 }, true);
    b.finish(Exit::Jump { off: 17 }, true)
}

/// cmp + jcc through dynamic flags: what the first instruction of a block may need.
fn dynamic() -> Block {
    let mut b = Builder::new(FLAGS);
    b.begin_insn(0, 2);
    let c = b.cond(CondCode::Z);
    b.exit_if(c, Exit::Jump { off: 100 }, true);
    b.finish(Exit::Jump { off: 2 }, true)
}

fn machine() -> Box<Machine> {
    let mut m = Machine::new(1);
    m.state.tb_flags = FLAGS.0;
    m.fill = true;
    m.state.gpr = [0, 0, 0, 1, 0, 0, 0x10000, 0x2000_0000, 0, 0, 500, 0, 0, 0, 0, 0];
    m
}

fn main() {
    let asm = std::env::args().any(|a| a == "asm");
    // `-- map` and `-- jitdump`: to see that `perf report` names the blocks.
    let kind = std::env::args().find_map(|a| match a.as_str() {
        "map" => Some(ProfileKind::Map),
        "jitdump" => Some(ProfileKind::Jitdump),
        _ => None,
    });
    let mut profile = kind.map(|k| Profile::create(k).expect("profile"));
    for probe in [Probe::Inline, Probe::OutOfLine] {
        println!("{probe:?}");
        let mut rig = Rig::new(Options { probe, ..Options::default() });
        for (name, block) in [("ten", ten()), ("hot", hot()), ("average", average()), ("dynamic", dynamic())] {
            // The machine may be busy: the best of several batches.
            let us = (0..20)
                .map(|_| {
                    let t = Instant::now();
                    for _ in 0..100 {
                        rig.compile(&block);
                    }
                    t.elapsed().as_secs_f64() * 1e4
                })
                .fold(f64::MAX, f64::min);
            let tb = rig.compile(&block);
            println!("  {name:8} {us:6.1} µs to compile, {} bytes, {} instructions", tb.len(), tb.host_instructions());
            if asm {
                println!("{}", tb.listing());
            }
        }
        for (name, block, insns) in [("ten", ten(), 10.0), ("hot", hot(), 5.0)] {
            let tb = rig.install(&block);
            let again = tb.slots.iter().find(|s| s.off == 0).expect("slot");
            rig.memory.link(*again, tb.entry);
            if let Some(p) = &mut profile {
                let code = rig.memory.bytes(tb.code.clone());
                p.add(tb.code.start, &code, &format!("bench:{name}")).expect("profile");
                p.flush().expect("profile");
            }
            let mut m = machine();
            m.state.gpr[10] = 500;
            let (mut blocks, mut best) = (0u64, f64::MAX);
            for _ in 0..5 {
                let t = Instant::now();
                let mut n = 0u64;
                for _ in 0..2000 {
                    m.state.gpr[1] = if name == "hot" { 500 } else { 0 };
                    m.state.budget = 1_000_000;
                    let leave = enter(&mut m, tb.entry);
                    assert!(matches!(leave, Leave::Unlinked { .. }), "{leave:?}");
                    n += 500;
                }
                blocks += n;
                best = best.min(t.elapsed().as_secs_f64() / n as f64);
            }
            println!(
                "  {name:8} {:.2} ns a run, {:.2} G guest instructions/s ({blocks} blocks)",
                best * 1e9,
                insns / best / 1e9
            );
        }
    }
}
