//! Translates a flat file of 64-bit code from its first byte to its last, and prints what it cost and what was missing.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::time::Instant;

use twofold_arch::TbFlags;
use twofold_arch::cpuid::Features;
use twofold_frontend::{Request, code_name, translate_block};
use twofold_ir::Op;
use twofold_ir::passes::{Options, Passes};

fn main() {
    let Some(path) = std::env::args().nth(1) else { return eprintln!("usage: scan FILE") };
    let code = match std::fs::read(&path) {
        Ok(code) => code,
        Err(e) => return eprintln!("{path}: {e}"),
    };
    let flags = TbFlags(2 | TbFlags::PROTECTED | TbFlags::LONG | 2 << TbFlags::MEM_SHIFT);
    let mut passes = Passes::default();
    let (mut blocks, mut insns, mut ops, mut left) = (0u64, 0u64, 0u64, 0u64);
    let mut missing: BTreeMap<u16, u32> = BTreeMap::new();
    let mut helpers: BTreeMap<String, u32> = BTreeMap::new();
    let (mut translating, mut passing) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
    let mut at = 0;
    while at < code.len() {
        let off = at & 0xfff;
        let end = (at - off + 4096).min(code.len());
        let mut next_page = || {
            let mut tail = [0u8; 15];
            let n = code.len().saturating_sub(end).min(15);
            tail[..n].copy_from_slice(&code[end..end + n]);
            Some(tail)
        };
        let req = Request {
            flags,
            off: off as u16,
            page: &code[at..end],
            next_page: &mut next_page,
            features: Features::ALL,
            max_insns: 48,
        };
        let start = Instant::now();
        let Ok(mut block) = translate_block(req) else { break };
        translating += start.elapsed();
        blocks += 1;
        insns += block.insns.len() as u64;
        ops += block.ops.len() as u64;
        if block.unimplemented != 0 {
            *missing.entry(block.unimplemented).or_default() += 1;
        }
        for op in &block.ops {
            if let Op::Call { helper, .. } = op {
                *helpers.entry(format!("{helper:?}")).or_default() += 1;
            }
        }
        at += block.byte_len().max(1);
        let start = Instant::now();
        passes.run(&mut block, &Options::default());
        passing += start.elapsed();
        left += block.ops.len() as u64;
    }
    println!("{blocks} blocks, {insns} instructions, {ops} ops, {left} after the passes");
    println!(
        "translate {:.0} ns a block, {:.0} ns an instruction; passes {:.0} ns a block",
        translating.as_nanos() as f64 / blocks as f64,
        translating.as_nanos() as f64 / insns as f64,
        passing.as_nanos() as f64 / blocks as f64
    );
    println!("helpers: {helpers:?}");
    let missing: BTreeMap<String, u32> = missing.into_iter().map(|(c, n)| (code_name(c), n)).collect();
    println!("missing: {missing:?}");
}
