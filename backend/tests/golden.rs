//! Emitted host code for hot idioms, with the number of host instructions: what a change of the lowering does to them is
//! seen in the diff. `TWOFOLD_BLESS=1` writes the files anew.
#![allow(missing_docs)]
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

use std::fmt::Write;
use std::path::Path;

use twofold_arch::tbflags::MemMode;
use twofold_arch::{CcKind, CodeSize, CondCode, Loc, TbFlags};
use twofold_backend::{Compiler, Options, Probe, RegionCompiler, Role};
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

/// Idioms of several instructions, as the front end makes them; the passes run first.
const TEXTS: [(&str, &str, &str); 7] = [
    (
        "call",
        "call 0x200",
        "insn 0x100 len 5\n r = rip 0x105\n sp = get.i64 rsp\n n = const.i64 0x8\n t = sub.i64 sp, n\n\
         store.i64.stack t, r\n put.i64 rsp, t\nend jump 0x200\n",
    ),
    (
        "call_indirect",
        "call rax",
        "insn 0x100 len 2\n to = get.i64 rax\n r = rip 0x102\n sp = get.i64 rsp\n n = const.i64 0x8\n\
         t = sub.i64 sp, n\n h = const.i64 0x38\n c = sar.i64 to, h\n one = const.i64 0x1\n d = add.i64 c, one\n\
         bad = cmp.ugt.i64 d, one\n exit_if.0 bad retired 0 raise 0x100 gp error 0x0\n store.i64.stack t, r\n\
         put.i64 rsp, t\nend indirect.call to\n",
    ),
    (
        "jump_indirect",
        "jmp [rbx + rcx * 8]",
        "insn 0x100 len 3\n b = get.i64 rbx\n i = get.i64 rcx\n n = const.i64 0x3\n o = shl.i64 i, n\n\
         a = add.i64 b, o\n to = load.i64 a\n h = const.i64 0x38\n c = sar.i64 to, h\n one = const.i64 0x1\n\
         d = add.i64 c, one\n bad = cmp.ugt.i64 d, one\n exit_if.0 bad retired 0 raise 0x100 gp error 0x0\n\
         end indirect.jump to\n",
    ),
    (
        "push_pop",
        "push rbx; pop rcx",
        "insn 0x100 len 1\n sp = get.i64 rsp\n n = const.i64 0x8\n t = sub.i64 sp, n\n v = get.i64 rbx\n\
         store.i64.stack t, v\n put.i64 rsp, t\n\
         insn 0x101 len 1\n s = get.i64 rsp\n w = load.i64.stack s\n m = const.i64 0x8\n u = add.i64 s, m\n\
         put.i64 rsp, u\n put.i64 rcx, w\nend jump 0x102\n",
    ),
    (
        "adc_chain",
        "add rax, rsi; adc rdx, rdi; adc rcx, 0",
        "insn 0x100 len 3\n a = get.i64 rax\n b = get.i64 rsi\n s = add.i64 a, b\n put.i64 rax, s\n\
         put.i64 cc_dst, s\n put.i64 cc_src, b\n k = const.i32 0x7\n put.i32 cc_op, k\n\
         insn 0x103 len 3\n c = cond.b\n n = zext.i64 c\n d = get.i64 rdx\n e = get.i64 rdi\n f = add.i64 d, e\n\
         g = add.i64 f, n\n put.i64 rdx, g\n put.i64 cc_dst, g\n put.i64 cc_src, e\n put.i64 cc_src2, n\n\
         l = const.i32 0xb\n put.i32 cc_op, l\n\
         insn 0x106 len 4\n o = cond.b\n p = zext.i64 o\n q = get.i64 rcx\n z = const.i64 0x0\n r = add.i64 q, z\n\
         t = add.i64 r, p\n put.i64 rcx, t\n put.i64 cc_dst, t\n put.i64 cc_src, z\n put.i64 cc_src2, p\n\
         m = const.i32 0xb\n put.i32 cc_op, m\nend jump 0x10a\n",
    ),
    (
        "div64",
        "div rbx",
        "insn 0x100 len 3\n d = get.i64 rbx\n lo = get.i64 rax\n hi = get.i64 rdx\n big = cmp.uge.i64 hi, d\n\
         exit_if.0 big retired 0 raise 0x100 de\n q = call.divide_wide lo, hi, d\n w = mul.i64 q, d\n\
         r = sub.i64 lo, w\n put.i64 rax, q\n put.i64 rdx, r\nend jump 0x103\n",
    ),
    (
        "rep_movs",
        "rep movsb",
        "insn 0x100 len 2\n w = const.i64 0x10\n m = call.string_op w\n c = trunc.i8 m\n\
         exit_if.0 c retired 0 jump 0x100\nend jump 0x102\n",
    ),
];

/// Loops of one block, which become regions.
const LOOPS: [(&str, &str, &str); 3] = [
    (
        "region_sum",
        "again: add rax, [rsi + rcx * 8 - 8]; dec rcx; jnz again",
        "insn 0x100 len 5\n p = get.i64 rsi\n i = get.i64 rcx\n n = const.i64 0x3\n o = shl.i64 i, n\n\
         b = add.i64 p, o\n e = const.i64 0xfffffffffffffff8\n a = add.i64 b, e\n v = load.i64 a\n\
         x = get.i64 rax\n s = add.i64 x, v\n put.i64 rax, s\n\
         insn 0x105 len 3\n one = const.i64 0x1\n j = sub.i64 i, one\n put.i64 rcx, j\n put.i64 cc_dst, j\n\
         put.i64 cc_src, x\n k = const.i32 0x1f\n put.i32 cc_op, k\n\
         insn 0x108 len 2\n z = const.i64 0x0\n c = cmp.ne.i64 j, z\n exit_if.0 c retired 3 jump 0x100\n\
         end jump 0x10a\n",
    ),
    (
        "region_update",
        "again: mov rax, [rsi]; lea rax, [rax + rbx]; mov [rsi], rax; lea rsi, [rsi + 8]; cmp rsi, rdi; jne again",
        "insn 0x100 len 3\n p = get.i64 rsi\n v = load.i64 p\n insn 0x103 len 4\n x = get.i64 rbx\n s = add.i64 v, x\n\
         put.i64 rax, s\n insn 0x107 len 3\n store.i64 p, s\n insn 0x10a len 4\n n = const.i64 0x8\n q = add.i64 p, n\n\
         put.i64 rsi, q\n insn 0x10e len 3\n e = get.i64 rdi\n d = sub.i64 q, e\n put.i64 cc_dst, d\n put.i64 cc_src, e\n\
         k = const.i32 0xf\n put.i32 cc_op, k\n insn 0x111 len 2\n c = cmp.ne.i64 q, e\n\
         exit_if.0 c retired 6 jump 0x100\nend jump 0x113\n",
    ),
    (
        "region_mul_add",
        "again: mov rax, r9; mul rbx; add rax, r8; adc rdx, 0; mov r8, rdx; dec rcx; jnz again",
        "insn 0x100 len 3\n a = get.i64 r9\n insn 0x103 len 3\n b = get.i64 rbx\n lo = mul.i64 a, b\n hi = umulhi.i64 a, b\n\
         insn 0x106 len 3\n c = get.i64 r8\n s = add.i64 lo, c\n put.i64 rax, s\n\
         insn 0x109 len 4\n o = cmp.ult.i64 s, c\n w = zext.i64 o\n h = add.i64 hi, w\n put.i64 rdx, h\n\
         insn 0x10d len 3\n put.i64 r8, h\n\
         insn 0x110 len 3\n i = get.i64 rcx\n one = const.i64 0x1\n j = sub.i64 i, one\n put.i64 rcx, j\n\
         insn 0x113 len 2\n z = const.i64 0x0\n e = cmp.ne.i64 j, z\n exit_if.0 e retired 7 jump 0x100\nend jump 0x115\n",
    ),
];

fn parsed(text: &str) -> Block {
    let retired = text.matches("insn ").count();
    let text = format!("block flags {:#x} retired {retired}\n{text}", FLAGS.0);
    let mut block = twofold_ir::parse::parse(&text).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    twofold_ir::verify::verify(&block).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    twofold_ir::passes::Passes::default().run(&mut block, &twofold_ir::passes::Options::HOST);
    block
}

/// A region's code with what each piece of it is for.
fn region(block: Block) -> String {
    let mut compiler = RegionCompiler::new(Options { verify: true, ..Options::default() }).unwrap();
    compiler.annotate(true);
    let code = compiler.compile(&[block], None, None).unwrap();
    let pieces = code.pieces();
    let mut text = format!("\n; region: {} instructions\n", pieces.iter().map(|p| p.code.len()).sum::<usize>());
    let mut last = "";
    for piece in &pieces {
        if piece.role != Role::Between && piece.role.name() != last {
            last = piece.role.name();
            let _ = writeln!(text, "; {last}");
        }
        for i in &piece.code {
            let _ = writeln!(text, "{:5x}  {}", i.at, i.text);
        }
    }
    text
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
    let mut golden = |name: &str, text: &str| {
        let path = dir.join(format!("{name}.txt"));
        if bless {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, text).unwrap();
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(text) {
            stale.push(format!("{}\n{text}", path.display()));
        }
    };
    let texts = TEXTS.iter().map(|&(name, what, text)| (name, what, parsed(text)));
    for (name, what, block) in idioms().into_iter().chain(texts) {
        let mut text = format!("; {what}\n");
        for probe in [Probe::Inline, Probe::OutOfLine] {
            let mut compiler = Compiler::new(Options { probe, verify: true, ..Options::default() }).unwrap();
            let tb = compiler.compile(&block).unwrap();
            let listing = tb.listing();
            compiler.annotate(true);
            let noted = compiler.compile(&block).unwrap();
            assert_eq!(noted.listing(), listing, "{name}: to note where code is from changes none of it");
            let pieces: usize = noted.pieces().iter().map(|p| p.code.len()).sum();
            assert_eq!(pieces, listing.lines().count(), "{name}");
            let _ = write!(text, "\n; {probe:?}: {} instructions\n{listing}", listing.lines().count());
        }
        golden(name, &text);
    }
    for (name, what, text) in LOOPS {
        golden(name, &format!("; {what}\n{}", region(parsed(text))));
    }
    assert!(stale.is_empty(), "emitted code changed; bless it if it is meant to:\n{}", stale.join("\n"));
}
