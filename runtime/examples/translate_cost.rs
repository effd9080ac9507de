//! What making a block costs, stage by stage: front end, passes, emitter, and what the runtime adds.
//!
//! `cargo run --release -p twofold-runtime --example translate_cost -- [ELF] [BLOCKS]`: translates the 64-bit code of an ELF
//! file (its own, unless one is named) block behind block, as user code. Instruction counts are steadier than time:
//! `valgrind --tool=callgrind` before the program. A third argument names the one stage to be measured.
#![allow(missing_docs)]

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object::{Object, ObjectSection, SectionKind};
use twofold_arch::{CodeSize, LinearAddr, PhysAddr, TbFlags};
use twofold_backend::DirectEmitter;
use twofold_frontend::{MAX_INSN_LEN, Request, translate_block};
use twofold_ir::Block;
use twofold_ir::passes::{Options as PassOptions, Passes};
use twofold_mmu::{CodePages, FlushPolicy, GuestRam, LegacyHole, Mmu, PhysMap};
use twofold_runtime::config::Tier;
use twofold_runtime::cpu::cpuid::CpuModel;
use twofold_runtime::exec::Jit;
use twofold_runtime::exec::tb::TbKey;
use twofold_runtime::exec::translate::{MAX_INSNS, translate};
use twofold_runtime::platform::{Clock, Platform, Setup};
use twofold_runtime::{Shared, Vcpu};

/// Where the code lies in guest memory.
const BASE: u64 = 0x10_0000;
const ROUNDS: usize = 9;
const FLAGS: TbFlags = TbFlags(
    CodeSize::Bits64 as u32
        | 3 << TbFlags::CPL_SHIFT
        | TbFlags::SS32
        | 0b1111 << TbFlags::ZERO_BASE_SHIFT
        | TbFlags::LONG
        | TbFlags::PROTECTED
        | TbFlags::AVX
        | TbFlags::X87_HOST,
);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let file = args.next().map_or_else(std::env::current_exe, |f| Ok(f.into()))?;
    let blocks = args.next().map_or(Ok(20_000), |n| n.parse())?;
    let only = args.next();
    let code = text(&std::fs::read(file)?)?;
    let features = CpuModel::max().features;
    let places = places(&code, blocks);
    let insns: usize = places.iter().map(|&at| front(&code, at, features).insns.len()).sum();
    println!("{} blocks, {:.1} instructions each", places.len(), insns as f64 / places.len() as f64);
    let (mut passes, mut emitter) = (Passes::default(), DirectEmitter::default());
    let stage = |name: &str, f: &mut dyn FnMut() -> Duration| {
        if only.as_deref().is_none_or(|o| o == name) {
            let rounds = if only.is_some() { 3 * ROUNDS } else { ROUNDS };
            // The fastest: other programs may be running.
            let best = (0..rounds).map(|_| f()).min().unwrap_or_default();
            println!("{name:8} {:6.0} ns a block", best.as_nanos() as f64 / places.len() as f64);
        }
    };
    stage("front", &mut || time(|| places.iter().for_each(|&at| drop(black_box(front(&code, at, features))))));
    let blocks: Vec<Block> = places.iter().map(|&at| front(&code, at, features)).collect();
    stage("passes", &mut || {
        let mut blocks = blocks.clone();
        time(|| blocks.iter_mut().for_each(|block| passes.run(block, &PassOptions::HOST)))
    });
    let mut short = blocks.clone();
    short.iter_mut().for_each(|block| passes.run(block, &PassOptions::HOST));
    stage("emitter", &mut || {
        time(|| short.iter().for_each(|block| emitter.emit(block, None).into_iter().for_each(|tb| emitter.recycle(tb))))
    });
    drop((blocks, short));
    stage("whole", &mut || {
        let mut vcpu = vcpu(&code).expect("a processor");
        time(|| {
            for &at in &places {
                let pa = PhysAddr(BASE + at as u64);
                black_box(translate(&mut vcpu, TbKey { pa, flags: FLAGS }, LinearAddr(pa.0)).is_ok());
            }
        })
    });
    Ok(())
}

/// The program's code.
fn text(file: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let elf = object::File::parse(file)?;
    let mut all = Vec::new();
    for section in elf.sections().filter(|s| s.kind() == SectionKind::Text) {
        all.extend_from_slice(section.data()?);
    }
    all.truncate(all.len() & !0xfff);
    Ok(all)
}

/// Where blocks begin, each behind the last.
fn places(code: &[u8], most: usize) -> Vec<usize> {
    let features = CpuModel::max().features;
    let (mut at, mut places) = (0, Vec::new());
    while places.len() < most && at + 4096 < code.len() {
        places.push(at);
        at += front(code, at, features).byte_len().max(1);
    }
    places
}

fn front(code: &[u8], at: usize, features: twofold_arch::cpuid::Features) -> Block {
    let page = &code[at..(at & !0xfff) + 0x1000];
    let mut next_page = || code[(at & !0xfff) + 0x1000..].first_chunk::<MAX_INSN_LEN>().copied();
    let off = (at & 0xfff) as u16;
    let request = Request { flags: FLAGS, off, page, next_page: &mut next_page, features, max_insns: MAX_INSNS };
    translate_block(request).unwrap_or_default()
}

/// A processor without paging, with the code in its memory.
fn vcpu(code: &[u8]) -> Result<Box<Vcpu>, Box<dyn Error>> {
    let ram = (BASE + code.len() as u64).next_multiple_of(1 << 20);
    let map = Arc::new(PhysMap::new(Arc::new(GuestRam::new(ram)?), LegacyHole::default()));
    map.write(PhysAddr(BASE), code);
    let clock = Clock::manual();
    let platform = Platform::new(Setup::quiet(1, ram, clock.clone()));
    let mmu = Mmu::new(map.clone(), Arc::new(CodePages::new(PhysAddr(ram))), FlushPolicy::Tagged)?;
    let shared = Arc::new(Shared::new(map, platform, clock));
    Ok(Vcpu::new(0, shared, Arc::new(CpuModel::max()), mmu, Jit::new(Tier::Auto, Default::default())))
}

fn time(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}
