//! Guest machine code → IR: decodes with iced-x86 and emits one block of [`twofold_ir`] ops.
//!
//! Place in the pipeline: first. [`translate_block`] decodes instruction by instruction; each one's row in [`table`] says
//! what must hold before it (feature, mode, CPL) and which emitter writes its ops. Invariants: a translation depends on
//! the bytes, the [`TbFlags`] and the page offset alone, never on RIP or registers; every byte sequence becomes ops or an
//! exception; in an instruction all ops that can fault come before its first `Put`.
#![deny(unsafe_code)]

pub mod address;
pub mod table;
pub mod translator;

mod arith;
mod avx;
mod bits;
mod branch;
mod flags;
mod mmx;
mod moves;
mod muldiv;
mod segments;
mod shift;
mod sse;
mod stack;
mod string;
mod system;
pub mod vmx;
mod x87;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};
use twofold_arch::cpuid::Features;
use twofold_arch::{CodeSize, Exception, TbFlags};
use twofold_ir::{Block, Exit};

pub use translator::Translator;

/// Longest instruction, in bytes.
pub const MAX_INSN_LEN: usize = 15;
/// A block ends when it has this many ops, so that no instruction can take it past [`Block::MAX_OPS`].
const OPS_HEADROOM: usize = 3000;

/// What to translate.
pub struct Request<'a> {
    /// The state that shapes the translation.
    pub flags: TbFlags,
    /// Linear page offset of the first instruction.
    pub off: u16,
    /// The bytes from `off` to the end of the page; not empty.
    pub page: &'a [u8],
    /// The first 15 bytes of the following page, if it can be fetched. Called at most once, and only when the first
    /// instruction goes on in that page.
    pub next_page: &'a mut dyn FnMut() -> Option<[u8; MAX_INSN_LEN]>,
    /// The CPU model's features.
    pub features: Features,
    /// Most instructions in the block; at least one is translated.
    pub max_insns: usize,
}

/// The first instruction goes on in the following page, and that page cannot be fetched: the caller raises its fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchFault;

/// Translates the block that starts at `req.off`.
///
/// # Errors
/// [`FetchFault`] when the very first instruction crosses into a page that cannot be fetched.
pub fn translate_block(req: Request<'_>) -> Result<Block, FetchFault> {
    translate_block_in(req, Block::default())
}

/// The same in the memory of a block that nobody needs any more.
///
/// # Errors
/// As [`translate_block`].
pub fn translate_block_in(req: Request<'_>, spare: Block) -> Result<Block, FetchFault> {
    let page = &req.page[..req.page.len().min(4096 - usize::from(req.off & 0xfff))];
    let bitness = match req.flags.size() {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let one_insn = req.flags.0 & (TbFlags::TF | TbFlags::ONE_INSN) != 0;
    let max_insns = if one_insn { 1 } else { req.max_insns.max(1) };
    let mut decoder = Decoder::with_ip(bitness, page, u64::from(req.off), DecoderOptions::NONE);
    let mut t = Translator::new(req.flags, req.features, page, req.off, spare);
    let mut last = false;
    loop {
        let start = decoder.position();
        let off = req.off + start as u16;
        decoder.decode_out(&mut t.insn);
        if t.insn.code() == Code::INVALID && decoder.last_error() == DecoderError::NoMoreBytes {
            if start != 0 {
                // Not a same-page link: the instruction is a block of its own, found by both its pages.
                return Ok(t.finish(Exit::JumpFar { off: i32::from(off) }));
            }
            return translate_crossing(req, page, bitness, std::mem::take(&mut t.b).into_block());
        }
        t.begin(off, start);
        translate_insn(&mut t);
        if let Some(block) = t.take_finished() {
            return Ok(block);
        }
        if std::mem::take(&mut t.one_more) {
            last = true;
            continue;
        }
        if last || t.next >= 4096 || t.b.insn_count() >= max_insns || t.b.len() >= OPS_HEADROOM {
            let exit = t.direct_exit(t.next);
            return Ok(t.finish(exit));
        }
    }
}

/// Translates the one instruction whose first bytes are `head` and which goes on in the next page.
fn translate_crossing(req: Request<'_>, head: &[u8], bitness: u32, spare: Block) -> Result<Block, FetchFault> {
    let tail = (req.next_page)().ok_or(FetchFault)?;
    let mut bytes = [0u8; 2 * MAX_INSN_LEN];
    let head = &head[..head.len().min(MAX_INSN_LEN)];
    bytes[..head.len()].copy_from_slice(head);
    bytes[head.len()..head.len() + MAX_INSN_LEN].copy_from_slice(&tail);
    let bytes = &bytes[..head.len() + MAX_INSN_LEN];
    let mut t = Translator::new(req.flags, req.features, bytes, req.off, spare);
    Decoder::with_ip(bitness, bytes, u64::from(req.off), DecoderOptions::NONE).decode_out(&mut t.insn);
    t.b.set_crosses_page();
    t.begin(req.off, 0);
    translate_insn(&mut t);
    if let Some(block) = t.take_finished() {
        return Ok(block);
    }
    let exit = t.direct_exit(t.next);
    Ok(t.finish(exit))
}

/// Checks and emits the instruction that `t` stands at.
fn translate_insn(t: &mut Translator<'_>) {
    if t.insn.code() == Code::INVALID {
        // More than 15 bytes is #GP(0), whatever they are; iced stops after 15.
        let e = if t.insn.len() >= MAX_INSN_LEN { Exception::GP0 } else { Exception::UD };
        return t.raise(e);
    }
    let Some(row) = table::lookup(t.insn.code()) else {
        t.unimplemented();
        return;
    };
    if let Err(e) = table::check(row, t) {
        return t.raise(e);
    }
    t.vex = row.is_vex();
    (row.emit)(t);
}

/// The name of the instruction form that `Block::unimplemented` holds.
#[must_use]
pub fn code_name(code: u16) -> String {
    Code::try_from(usize::from(code)).map_or_else(|_| format!("code {code}"), |c| format!("{c:?}"))
}

/// An instruction that is nothing yet.
fn no_instruction() -> Instruction {
    Instruction::default()
}

/// The instructions of a block as text, a line each: address, bytes, assembly (`-d in_asm`).
#[must_use]
pub fn disassemble(flags: TbFlags, rip: u64, bytes: &[u8]) -> String {
    use iced_x86::FastFormatter;
    use std::fmt::Write;
    let bitness = match flags.size() {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let mut out = String::new();
    let mut formatter = FastFormatter::new();
    for insn in Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE) {
        let at = insn.ip().wrapping_sub(rip) as usize;
        let mut hex = String::new();
        for b in bytes.get(at..at + insn.len()).unwrap_or_default() {
            let _ = write!(hex, "{b:02x}");
        }
        let _ = write!(out, "{:016x}  {hex:<30}  ", insn.ip());
        formatter.format(&insn, &mut out);
        out.push('\n');
    }
    out
}
