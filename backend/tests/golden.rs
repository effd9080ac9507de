//! Emitted host code for hot idioms, with the number of host instructions: what a change of the lowering does to them is
//! seen in the diff. `TWOFOLD_BLESS=1` writes the files anew.
#![allow(missing_docs)]
#![cfg(target_arch = "x86_64")]

use std::fmt::Write;
use std::path::Path;

use twofold_arch::tbflags::MemMode;
use twofold_arch::{CcKind, CodeSize, CondCode, Loc, TbFlags};
use twofold_backend::{Compiler, Options, Probe};
use twofold_ir::{BinOp, Block, Builder, Exit, Helper, IndirectKind, IntCc, MemFlags, RmwOp, Ty, VecOp};

const FLAGS: TbFlags = TbFlags(CodeSize::Bits64 as u32 | (MemMode::Supervisor as u32) << TbFlags::MEM_SHIFT);

fn one(end: Exit, build: impl FnOnce(&mut Builder)) -> Block {
    let mut b = Builder::new(FLAGS);
    b.begin_insn(0x100, 4);
    build(&mut b);
    b.finish(end, true)
}

fn idioms() -> Vec<(&'static str, &'static str, Block)> {
    let r = Loc::gpr;
    let next = Exit::Jump { off: 0x104 };
    let mut list = vec![
        ("nothing", "nop", one(next, |_| {})),
        (
            "add_reg",
            "add rax, rbx (flags known dead)",
            one(next, |b| {
                let (x, y) = (b.get(Ty::I64, r(0)), b.get(Ty::I64, r(3)));
                let v = b.add(x, y);
                b.put(r(0), v);
            }),
        ),
        (
            "load64",
            "mov rax, [rbx + 8]",
            one(next, |b| {
                let x = b.get(Ty::I64, r(3));
                let a = b.bin_imm(BinOp::Add, x, 8);
                let v = b.load(Ty::I64, MemFlags::NONE, a);
                b.put(r(0), v);
            }),
        ),
        (
            "load8",
            "movzx eax, byte [rbx + rcx]",
            one(next, |b| {
                let (x, y) = (b.get(Ty::I64, r(3)), b.get(Ty::I64, r(1)));
                let a = b.add(x, y);
                let v = b.load(Ty::I8, MemFlags::NONE, a);
                let v = b.zext(Ty::I64, v);
                b.put(r(0), v);
            }),
        ),
        (
            "store32",
            "mov [rbx], eax",
            one(next, |b| {
                let a = b.get(Ty::I64, r(3));
                let v = b.get(Ty::I32, r(0));
                b.store(MemFlags::NONE, a, v);
            }),
        ),
        (
            "push",
            "push rbp",
            one(next, |b| {
                let sp = b.get(Ty::I64, r(4));
                let sp = b.bin_imm(BinOp::Sub, sp, 8);
                let v = b.get(Ty::I64, r(5));
                b.store(MemFlags::STACK, sp, v);
                b.put(r(4), sp);
            }),
        ),
        (
            "cmp_jcc",
            "cmp rax, rbx; jb 0x100",
            one(next, |b| {
                let (x, y) = (b.get(Ty::I64, r(0)), b.get(Ty::I64, r(3)));
                let d = b.sub(x, y);
                b.set_cc(CcKind::Sub, d, Some(y), None);
                b.begin_insn(0x104, 2);
                let c = b.cmp(IntCc::Ult, x, y);
                b.exit_if(c, Exit::Jump { off: 0x100 }, true);
            }),
        ),
        (
            "jcc_unknown_flags",
            "jz 0x100",
            one(next, |b| {
                let c = b.cond(CondCode::Z);
                b.exit_if(c, Exit::Jump { off: 0x100 }, true);
            }),
        ),
        (
            "lock_xadd",
            "lock xadd [rbx], eax",
            one(next, |b| {
                let a = b.get(Ty::I64, r(3));
                let v = b.get(Ty::I32, r(0));
                let old = b.rmw(RmwOp::Add, a, v);
                let old = b.zext(Ty::I64, old);
                b.put(r(0), old);
            }),
        ),
        (
            "pxor_load",
            "pxor xmm0, [rbx]",
            one(next, |b| {
                let a = b.get(Ty::I64, r(3));
                let m = b.load(Ty::V128, MemFlags::ALIGNED, a);
                let x = b.get(Ty::V128, Loc::xmm(0));
                let v = b.vec(VecOp::Xor, 0, &[x, m]);
                b.put(Loc::xmm(0), v);
            }),
        ),
        (
            "addsd",
            "addsd xmm0, xmm1",
            one(next, |b| {
                let (x, y) = (b.get(Ty::V128, Loc::xmm(0)), b.get(Ty::V128, Loc::xmm(1)));
                let v = b.vec(VecOp::Addsd, 0, &[x, y]);
                b.put(Loc::xmm(0), v);
            }),
        ),
        (
            "helper",
            "rdmsr",
            one(Exit::Dispatch { off: 0x104 }, |b| {
                b.call(Helper::Rdmsr, &[]);
            }),
        ),
        ("call_far", "jmp to another page", one(Exit::JumpFar { off: 0x5000 }, |_| {})),
    ];
    let mut b = Builder::new(FLAGS);
    b.begin_insn(0x100, 1);
    let sp = b.get(Ty::I64, r(4));
    let rip = b.load(Ty::I64, MemFlags::STACK, sp);
    let sp = b.bin_imm(BinOp::Add, sp, 8);
    b.put(r(4), sp);
    list.push(("ret", "ret", b.finish(Exit::Indirect { rip, kind: IndirectKind::Return }, true)));
    list
}

#[test]
fn emitted_code_is_as_recorded() {
    // What is emitted depends on the host's features; the files are from a host with these.
    let has = std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi2");
    if !has {
        return;
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bless = std::env::var_os("TWOFOLD_BLESS").is_some();
    let mut stale = Vec::new();
    for (name, what, block) in idioms() {
        let mut text = format!("; {what}\n");
        for probe in [Probe::Inline, Probe::OutOfLine] {
            let mut compiler = Compiler::new(Options { probe, verify: true }).unwrap();
            let tb = compiler.compile(&block).unwrap();
            let listing = tb.listing();
            compiler.annotate(true);
            let noted = compiler.compile(&block).unwrap();
            assert_eq!(noted.listing(), listing, "{name}: to note where code is from changes none of it");
            let pieces: usize = noted.pieces().iter().map(|p| p.code.len()).sum();
            assert_eq!(pieces, listing.lines().count(), "{name}");
            let _ = write!(text, "\n; {probe:?}: {} instructions\n{listing}", listing.lines().count());
        }
        let path = dir.join(format!("{name}.txt"));
        if bless {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, text).unwrap();
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
            stale.push(format!("{}\n{text}", path.display()));
        }
    }
    assert!(stale.is_empty(), "emitted code changed; bless it if it is meant to:\n{}", stale.join("\n"));
}
