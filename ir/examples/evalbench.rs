//! Times the evaluator on guest-like loops, and what a block costs before it can run: passes and lowering.
//!
//! `cargo run --release -p twofold-ir --example evalbench`

use std::hint::black_box;
use std::time::Duration;

use twofold_arch::{CcKind, CondCode, Loc, TbFlags};
use twofold_ir::eval::{Abandon, Env, FILE_WORDS, File, Leave, Lowerer, Program, Target};
use twofold_ir::passes::{Options, Passes};
use twofold_ir::{BinOp, Block, Builder, Exit, Helper, MemFlags, RmwOp, Ty, Value};

/// Processor time of this thread, where the system tells; other work on the machine then matters less.
struct Instant(Duration, std::time::Instant);

impl Instant {
    fn cpu() -> Option<Duration> {
        let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
        text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    }
    fn now() -> Self {
        Self(Self::cpu().unwrap_or_default(), std::time::Instant::now())
    }
    fn elapsed(&self) -> Duration {
        Self::cpu().map_or_else(|| self.1.elapsed(), |t| t - self.0)
    }
}

const RAM: usize = 1 << 16;

/// Memory is one array, with about the work of a softmmu hit on each access.
struct BenchEnv {
    file: Box<File>,
    tlb: Vec<[u64; 4]>,
    ram: Vec<u8>,
}

impl BenchEnv {
    fn new() -> Self {
        let tlb = (0..16u64).map(|i| [i << 12, i << 12, 0, 0]).collect();
        Self { file: Box::new([0; FILE_WORDS]), tlb, ram: vec![1; RAM + 16] }
    }
    #[inline(always)]
    fn at(&self, addr: u64, size: u64, write: usize) -> Result<usize, Abandon> {
        let e = &self.tlb[(addr >> 12) as usize & 15];
        if e[write] != addr.wrapping_add(size - 1) & !0xfff {
            return Err(Abandon);
        }
        Ok((addr.wrapping_add(e[3])) as usize & (RAM - 1))
    }
}

impl Env for BenchEnv {
    #[inline(always)]
    fn file(&mut self) -> &mut File {
        &mut self.file
    }
    fn get(&mut self, _: Ty, _: Loc) -> u64 {
        0
    }
    fn put(&mut self, _: Ty, _: Loc, _: u64) {}
    #[inline(always)]
    fn load(&mut self, ty: Ty, _: MemFlags, addr: u64) -> Result<u64, Abandon> {
        let i = self.at(addr, u64::from(ty.bytes()), 0)?;
        let m = self.ram[i..].first_chunk::<8>().ok_or(Abandon)?;
        Ok(u64::from_le_bytes(*m) & ty.mask())
    }
    fn load128(&mut self, _: MemFlags, _: u64) -> Result<u128, Abandon> {
        Err(Abandon)
    }
    #[inline(always)]
    fn store(&mut self, ty: Ty, _: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        let i = self.at(addr, u64::from(ty.bytes()), 1)?;
        let n = ty.bytes() as usize;
        self.ram.get_mut(i..i + n).ok_or(Abandon)?.copy_from_slice(&v.to_le_bytes()[..n]);
        Ok(())
    }
    fn store128(&mut self, _: MemFlags, _: u64, _: u128) -> Result<(), Abandon> {
        Err(Abandon)
    }
    fn rmw(&mut self, _: RmwOp, _: Ty, _: u64, _: u64) -> Result<u64, Abandon> {
        Err(Abandon)
    }
    fn cmpxchg(&mut self, _: Ty, _: u64, _: u64, _: u64) -> Result<u64, Abandon> {
        Err(Abandon)
    }
    fn call(&mut self, _: Helper, _: [u64; 4]) -> Result<u64, Abandon> {
        Err(Abandon)
    }
}

/// Emits guest instructions the way the front end does.
struct Asm {
    b: Builder,
    off: u16,
}

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RSP: u8 = 4;
const RBP: u8 = 5;
const RSI: u8 = 6;
const RDI: u8 = 7;

#[derive(Clone, Copy)]
enum Src {
    Reg(u8),
    Imm(i32),
    /// Base, displacement.
    Mem(u8, i32),
    /// Base, index, shift.
    Sib(u8, u8, u8),
}
use Src::{Imm, Mem, Reg, Sib};

impl Asm {
    fn new() -> Self {
        Self { b: Builder::new(TbFlags(2)), off: 0 }
    }
    fn begin(&mut self) {
        self.b.begin_insn(self.off, 4);
        self.off += 4;
    }
    fn addr(&mut self, s: Src) -> Value {
        let b = &mut self.b;
        match s {
            Mem(base, disp) => {
                let r = b.get(Ty::I64, Loc::gpr(base));
                if disp == 0 { r } else { b.bin_imm(BinOp::Add, r, disp as i64 as u64) }
            }
            Sib(base, index, shift) => {
                let r = b.get(Ty::I64, Loc::gpr(base));
                let x = b.get(Ty::I64, Loc::gpr(index));
                let x = b.bin_imm(BinOp::Shl, x, u64::from(shift));
                b.add(r, x)
            }
            Reg(_) | Imm(_) => unreachable!(),
        }
    }
    fn read(&mut self, ty: Ty, s: Src) -> Value {
        match s {
            Reg(r) => self.b.get(ty, Loc::gpr(r)),
            Imm(x) => self.b.iconst(ty, x as i64 as u64),
            Mem(..) | Sib(..) => {
                let a = self.addr(s);
                self.b.load(ty, MemFlags::NONE, a)
            }
        }
    }
    fn write(&mut self, r: u8, v: Value) {
        match self.b.ty(v) {
            Ty::I32 => {
                let v = self.b.zext(Ty::I64, v);
                self.b.put(Loc::gpr(r), v);
            }
            _ => self.b.put(Loc::gpr(r), v),
        }
    }
    fn mov(&mut self, ty: Ty, d: u8, s: Src) {
        self.begin();
        let v = self.read(ty, s);
        self.write(d, v);
    }
    fn movzx(&mut self, d: u8, from: Ty, s: Src) {
        self.begin();
        let v = self.read(from, s);
        let v = self.b.zext(Ty::I32, v);
        self.write(d, v);
    }
    fn store(&mut self, ty: Ty, m: Src, s: Src) {
        self.begin();
        let v = self.read(ty, s);
        let a = self.addr(m);
        self.b.store(MemFlags::NONE, a, v);
    }
    fn alu(&mut self, op: BinOp, ty: Ty, d: u8, s: Src) {
        self.begin();
        let y = self.read(ty, s);
        let x = self.read(ty, Reg(d));
        let v = self.b.bin(op, x, y);
        match op {
            BinOp::Add => self.b.set_cc(CcKind::Add, v, Some(y), None),
            BinOp::Sub => self.b.set_cc(CcKind::Sub, v, Some(y), None),
            _ => self.b.set_cc(CcKind::Logic, v, None, None),
        }
        self.write(d, v);
    }
    fn shift(&mut self, op: BinOp, ty: Ty, d: u8, n: u8) {
        self.begin();
        let x = self.read(ty, Reg(d));
        let before = self.b.bin_imm(op, x, u64::from(n) - 1);
        let v = self.b.bin_imm(op, x, u64::from(n));
        self.b.set_cc(if op == BinOp::Shl { CcKind::Shl } else { CcKind::Shr }, v, Some(before), None);
        self.write(d, v);
    }
    fn lea(&mut self, d: u8, s: Src) {
        self.begin();
        let v = self.addr(s);
        self.write(d, v);
    }
    fn cmp(&mut self, ty: Ty, x: Src, y: Src) {
        self.begin();
        let x = self.read(ty, x);
        let y = self.read(ty, y);
        let v = self.b.sub(x, y);
        self.b.set_cc(CcKind::Sub, v, Some(y), None);
    }
    fn test(&mut self, ty: Ty, x: u8, y: u8) {
        self.begin();
        let x = self.read(ty, Reg(x));
        let y = self.read(ty, Reg(y));
        let v = self.b.and(x, y);
        self.b.set_cc(CcKind::Logic, v, None, None);
    }
    fn dec(&mut self, ty: Ty, d: u8) {
        self.begin();
        let x = self.read(ty, Reg(d));
        let v = self.b.bin_imm(BinOp::Sub, x, 1);
        let c = self.b.cond(CondCode::B);
        self.b.set_cc(CcKind::Dec, v, Some(c), None);
        self.write(d, v);
    }
    fn push(&mut self, r: u8) {
        self.begin();
        let v = self.read(Ty::I64, Reg(r));
        let sp = self.read(Ty::I64, Reg(RSP));
        let sp = self.b.bin_imm(BinOp::Sub, sp, 8);
        self.b.store(MemFlags::STACK, sp, v);
        self.write(RSP, sp);
    }
    fn pop(&mut self, r: u8) {
        self.begin();
        let sp = self.read(Ty::I64, Reg(RSP));
        let v = self.b.load(Ty::I64, MemFlags::STACK, sp);
        let sp = self.b.bin_imm(BinOp::Add, sp, 8);
        self.write(RSP, sp);
        self.write(r, v);
    }
    fn call(mut self, target: u16) -> Block {
        self.begin();
        let ret = self.b.rip(i32::from(self.off));
        let sp = self.read(Ty::I64, Reg(RSP));
        let sp = self.b.bin_imm(BinOp::Sub, sp, 8);
        self.b.store(MemFlags::STACK, sp, ret);
        self.write(RSP, sp);
        self.b.finish(Exit::Jump { off: target }, true)
    }
    fn ret(mut self) -> Block {
        self.begin();
        let sp = self.read(Ty::I64, Reg(RSP));
        let v = self.b.load(Ty::I64, MemFlags::STACK, sp);
        let sp = self.b.bin_imm(BinOp::Add, sp, 8);
        self.write(RSP, sp);
        self.b.finish(Exit::Indirect { rip: v, kind: twofold_ir::IndirectKind::Return }, true)
    }
    /// `jcc target`, else to the second target.
    fn jcc(mut self, cc: CondCode, target: u16, otherwise: u16) -> Block {
        self.begin();
        let c = self.b.cond(cc);
        self.b.exit_if(c, Exit::Jump { off: target }, true);
        self.b.finish(Exit::Jump { off: otherwise }, true)
    }
    fn jmp(mut self, target: u16) -> Block {
        self.begin();
        self.b.finish(Exit::Jump { off: target }, true)
    }
}

/// Loops of blocks; block `n` is at offset `n`, and offset 99 is the end.
fn guests() -> Vec<(&'static str, Vec<Block>)> {
    let mut all = Vec::new();

    let mut a = Asm::new();
    a.alu(BinOp::Add, Ty::I64, RAX, Reg(RBX));
    a.alu(BinOp::Xor, Ty::I32, RDX, Reg(RAX));
    a.shift(BinOp::Shl, Ty::I64, RBX, 3);
    a.lea(RSI, Sib(RAX, RBX, 2));
    a.alu(BinOp::Sub, Ty::I64, RBX, Reg(RSI));
    a.alu(BinOp::And, Ty::I32, RDX, Imm(0xff_ffff));
    a.mov(Ty::I64, RDI, Reg(RDX));
    a.alu(BinOp::Add, Ty::I64, RCX, Imm(-1));
    all.push(("registers only", vec![a.jcc(CondCode::Nz, 0, 99)]));

    let mut a = Asm::new();
    a.movzx(RAX, Ty::I8, Mem(RSI, 0));
    a.store(Ty::I8, Mem(RDI, 0), Reg(RAX));
    a.alu(BinOp::Add, Ty::I64, RSI, Imm(1));
    a.alu(BinOp::Add, Ty::I64, RDI, Imm(1));
    a.alu(BinOp::And, Ty::I32, RSI, Imm(0x7fff));
    a.alu(BinOp::And, Ty::I32, RDI, Imm(0x7fff));
    a.dec(Ty::I64, RCX);
    all.push(("byte copy", vec![a.jcc(CondCode::Nz, 0, 99)]));

    // Short blocks with tests, as in kernel code.
    let mut a = Asm::new();
    a.mov(Ty::I64, RAX, Mem(RBP, 0x18));
    a.test(Ty::I64, RAX, RAX);
    let first = a.jcc(CondCode::Z, 3, 1);
    let mut a = Asm::new();
    a.mov(Ty::I32, RDX, Mem(RBP, 0x20));
    a.alu(BinOp::And, Ty::I32, RDX, Imm(0x10));
    a.cmp(Ty::I8, Mem(RBP, 0x28), Imm(3));
    let second = a.jcc(CondCode::Be, 2, 3);
    let mut a = Asm::new();
    a.lea(RDX, Sib(RDX, RAX, 3));
    a.store(Ty::I64, Mem(RBP, 0x40), Reg(RDX));
    let third = a.jmp(3);
    let mut a = Asm::new();
    a.alu(BinOp::Sub, Ty::I64, RCX, Imm(1));
    let last = a.jcc(CondCode::Nz, 0, 99);
    all.push(("short blocks", vec![first, second, third, last]));

    // Calls.
    let mut a = Asm::new();
    a.mov(Ty::I32, RDI, Imm(5));
    let call = a.call(1);
    let mut a = Asm::new();
    a.push(RBP);
    a.mov(Ty::I64, RBP, Reg(RSP));
    a.push(RBX);
    a.mov(Ty::I64, RBX, Reg(RDI));
    a.lea(RAX, Mem(RBX, 7));
    a.pop(RBX);
    a.pop(RBP);
    let callee = a.ret();
    let mut a = Asm::new();
    a.cmp(Ty::I64, Reg(RAX), Imm(100));
    let check = a.jcc(CondCode::Nbe, 99, 3);
    let mut a = Asm::new();
    a.alu(BinOp::Sub, Ty::I64, RCX, Imm(1));
    let last = a.jcc(CondCode::Nz, 0, 99);
    all.push(("call and return", vec![call, callee, check, last]));
    all
}

fn run(programs: &[Program], iterations: u64) -> (u64, u64) {
    let mut env = BenchEnv::new();
    let reg = |n: u8| 1 + n as usize;
    env.file[reg(RCX)] = iterations;
    env.file[reg(RBX)] = 3;
    env.file[reg(RBP)] = 0x1000;
    env.file[reg(RSP)] = 0x2000;
    env.file[reg(RSI)] = 0x3000;
    let (mut retired, mut blocks, mut at) = (0u64, 0u64, 0usize);
    while let Some(p) = programs.get(at) {
        blocks += 1;
        match p.run(&mut env) {
            Leave::Exit { to, retired: n, .. } => {
                retired += u64::from(n);
                at = match to {
                    Target::Jump { off } => off as usize,
                    Target::Indirect { .. } => 2,
                    _ => break,
                };
            }
            Leave::Abandoned { .. } => panic!("fault"),
        }
    }
    black_box(&env.file);
    (retired, blocks)
}

fn main() {
    let show = std::env::args().any(|a| a == "--show");
    let mut passes = Passes::default();
    let mut lowerer = Lowerer::default();
    for (name, blocks) in guests() {
        for optimise in [false, true] {
            let mut ready = blocks.clone();
            if optimise {
                ready.iter_mut().for_each(|b| passes.run(b, &Options::default()));
            }
            let programs: Vec<Program> = ready.iter().map(|b| lowerer.lower(b)).collect();
            let (retired, ran) = run(&programs, 1000);
            let start = Instant::now();
            let rounds = 4_000_000 / retired.max(1) * 10;
            for _ in 0..rounds {
                black_box(run(&programs, 1000));
            }
            let seconds = start.elapsed().as_secs_f64() / rounds as f64;
            let size = |f: fn(&Block) -> usize| ready.iter().map(f).sum::<usize>();
            println!(
                "{name:16} {:10} {:6.0} M instructions/s  {:5.1} ns/block  {:3} ops {:3} words",
                if optimise { "passes" } else { "no passes" },
                retired as f64 / seconds / 1e6,
                seconds * 1e9 / ran as f64,
                size(|b| b.ops.len()),
                programs.iter().map(Program::len).sum::<usize>(),
            );
            if show {
                programs.iter().for_each(|p| println!("{p}"));
            }
        }
    }

    // What a block costs before it runs.
    let all: Vec<Block> = guests().into_iter().flat_map(|(_, b)| b).collect();
    let count = |blocks: &[Block]| (blocks.iter().map(|b| b.ops.len()).sum::<usize>(), blocks.len());
    let (ops, n) = count(&all);
    let rounds = 20_000;
    let mut copies = all.clone();
    let start = Instant::now();
    for _ in 0..rounds {
        copies.clone_from(&all);
        black_box(&mut copies);
    }
    let copying = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for _ in 0..rounds {
        copies.clone_from(&all);
        copies.iter_mut().for_each(|b| passes.run(b, &Options::default()));
    }
    let passing = start.elapsed().as_secs_f64() - copying;
    let per = |seconds: f64| seconds * 1e9 / (rounds * n) as f64;
    println!(
        "\n{:.1} ops a block, {:.1} instructions",
        ops as f64 / n as f64,
        all.iter().map(|b| b.insns.len()).sum::<usize>() as f64 / n as f64
    );
    println!("passes   {:6.0} ns a block", per(passing));
    for (name, blocks) in [("as built", &all), ("after passes", &copies)] {
        let start = Instant::now();
        for _ in 0..rounds {
            for b in blocks {
                black_box(lowerer.lower(b));
            }
        }
        println!("lowering {:6.0} ns a block {name}", per(start.elapsed().as_secs_f64()));
    }
    let memory: usize = copies.iter().map(|b| lowerer.lower(b).size()).sum();
    println!("memory   {:6.0} bytes a block", memory as f64 / n as f64);
}
