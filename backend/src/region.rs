//! The optimising tier's compiler: blocks that lead to each other in, one piece of host code out.
//!
//! Place in the pipeline: `lower::region` makes the CLIF, Cranelift optimises; what comes out is installed like a block's code
//! and entered like it, at its first block. Unlike the quick tier's, the code is left as Cranelift wrote it, but for
//! registers that are saved without need.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::isa::OwnedTargetIsa;
use twofold_ir::Block;

use crate::assemble::{Emitted, Target, in_place};
use crate::code::MAX_TB_BYTES;
use crate::compiler::{CompileError, CompiledSlot, CompiledTb, Options, emitted, host_isa, verify};
use crate::lower::{Buffers, LoweredRegion, lower_region};
use crate::origin::{Origins, Role};

/// Slots of regions are numbered from here on, so that they differ from those of the root's own code.
pub const REGION_SLOTS: u16 = 0x8000;

/// What a block of a region counts: where the guest block that it stands for begins (RIP minus `rip_base`), and its entry of
/// the table at `CpuState::exec_counts`. A block that was joined of several has as many.
pub type Counter = (i32, u32);

/// What a region in several pages looks at when it is entered. Its pages are where they were as long as the epoch of the jump
/// cache and `rip_base` are those in its cell; else it calls the helper `EnterRegion`, and leaves if that gives 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guard {
    /// Host address of two words, an epoch and a `rip_base`. They must stay there as long as the code.
    pub cell: u64,
    /// What the helper gets.
    pub number: u32,
}

/// Room before the code: a multiple of the alignment of constants and loops.
const HEADER: usize = 64;
/// `mov rdi, rbp`: RBP is the state at entry, the function's parameter is in RDI.
const ENTRY: [u8; 3] = [0x48, 0x89, 0xef];

/// Compiles regions; keeps its buffers from one to the next.
pub struct RegionCompiler {
    options: Options,
    isa: OwnedTargetIsa,
    context: Context,
    control: ControlPlane,
    buffers: Buffers,
    annotate: bool,
}

impl std::fmt::Debug for RegionCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegionCompiler").field("options", &self.options).finish_non_exhaustive()
    }
}

impl RegionCompiler {
    /// A compiler for this host.
    ///
    /// # Errors
    /// [`CompileError::Unavailable`] when the host has no compile tier.
    pub fn new(options: Options) -> Result<Self, CompileError> {
        if !crate::available() {
            return Err(CompileError::Unavailable);
        }
        let isa = host_isa("speed").ok_or(CompileError::Unavailable)?;
        let (context, control, buffers) = (Context::new(), ControlPlane::default(), Buffers::default());
        Ok(Self { options, isa, context, control, buffers, annotate: false })
    }

    /// From now on, whether to note what guest instruction each piece of host code is from ([`CompiledTb::pieces`]).
    pub fn annotate(&mut self, wanted: bool) {
        self.annotate = wanted;
    }

    /// Compiles the blocks, entered at the first, as [`twofold_ir::passes::join_all`] makes them. All have the same key bits; with
    /// `counters` the code of each counts. Those of more than one page need a guard.
    ///
    /// # Errors
    /// See [`CompileError`]; the blocks then keep the code they have.
    pub fn compile(
        &mut self,
        blocks: &[Block],
        guard: Option<Guard>,
        counters: Option<&[Vec<Counter>]>,
    ) -> Result<CompiledTb, CompileError> {
        let result = catch_unwind(AssertUnwindSafe(|| self.compile_inner(blocks, guard, counters)));
        result.unwrap_or_else(|payload| {
            // What a panic left behind is not to be trusted.
            self.context = Context::new();
            self.control = ControlPlane::default();
            self.buffers = Buffers::default();
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Err(CompileError::Panic(text.unwrap_or("?").to_owned()))
        })
    }

    /// The CLIF text of a region (`-d clif`).
    ///
    /// # Errors
    /// As [`RegionCompiler::compile`].
    pub fn clif_text(&mut self, blocks: &[Block]) -> Result<String, CompileError> {
        self.context.clear();
        lower_region(&mut self.context.func, blocks, None, None, &mut self.buffers)?;
        Ok(self.context.func.display().to_string())
    }

    fn compile_inner(
        &mut self,
        blocks: &[Block],
        guard: Option<Guard>,
        counters: Option<&[Vec<Counter>]>,
    ) -> Result<CompiledTb, CompileError> {
        self.context.clear();
        let lowered = lower_region(&mut self.context.func, blocks, guard, counters, &mut self.buffers)?;
        if self.options.verify {
            verify(&self.context.func, &*self.isa)?;
        }
        let compiled = self.context.compile(&*self.isa, &mut self.control);
        compiled.map_err(|e| CompileError::Codegen(format!("{:?}", e.inner)))?;
        let buffer = &self.context.compiled_code().ok_or(CompileError::Malformed)?.buffer;
        if buffer.data().len() > MAX_TB_BYTES / 2 {
            return Err(CompileError::TooLarge);
        }
        let emitted = emitted(&self.context.func, buffer, 0, self.annotate)?;
        let size = blocks.first().ok_or(CompileError::Malformed)?.flags.size();
        place(&emitted, lowered, size)
    }
}

/// Puts the entry before the code, and what refers to the outside in lists.
fn place(emitted: &Emitted, lowered: LoweredRegion, size: twofold_arch::CodeSize) -> Result<CompiledTb, CompileError> {
    let (code, relocs) = (&emitted.code, &emitted.relocs);
    let mut origins = Origins { wanted: emitted.locations.is_some(), list: Vec::new() };
    origins.mark(HEADER - ENTRY.len(), Role::Entry, (0, 0));
    origins.copied((0, code.len()), HEADER, emitted.locations.as_deref().unwrap_or_default(), |bits| {
        let insn = lowered.site_insns.get(bits as usize & 0xffff).copied().unwrap_or_default();
        (Role::of_location(bits), insn)
    });
    origins.mark(HEADER + code.len(), Role::Shared, (0, 0));
    let mut out = vec![0xcc; HEADER - ENTRY.len()];
    out.extend(ENTRY);
    out.extend(code);
    let jumps = relocs.iter().filter(|r| code.get((r.0 as usize).wrapping_sub(1)) == Some(&0xe9));
    leave_out_saves(&mut out[HEADER..], jumps.map(|r| r.0 as usize - 1));
    let (mut calls, mut slots, mut returns) = (Vec::new(), Vec::new(), Vec::new());
    let mut routines = HashMap::new();
    for &(at, target, site) in relocs {
        let opcode = (at as usize).checked_sub(1).and_then(|i| code.get(i));
        let at = at + HEADER as u32;
        match target {
            Target::Thunk(t) => {
                calls.push((at, t));
                if opcode == Some(&0xe8) {
                    returns.push((at + 4, site));
                }
            }
            Target::Slot(n) => {
                let off = *lowered.slots.get(n as usize).ok_or(CompileError::Malformed)?;
                let page = lowered.slot_pages.get(n as usize).copied().unwrap_or_default();
                slots.push(CompiledSlot { at, off, page });
            }
            Target::Native(native) => {
                let call = at as usize - 1;
                let code = native.bytes();
                match in_place(&code) {
                    Some(code) => out[call..call + 5].copy_from_slice(&code),
                    None => {
                        let routine = *routines.entry(native).or_insert_with(|| {
                            let start = out.len() as u32;
                            out.extend(&code);
                            out.push(0xc3);
                            start
                        });
                        let d = routine.wrapping_sub(at + 4);
                        out[call + 1..call + 5].copy_from_slice(&d.to_le_bytes());
                    }
                }
            }
            Target::Probe(_) => return Err(CompileError::Malformed),
        }
    }
    returns.sort_unstable();
    Ok(CompiledTb {
        code: out,
        entry: (HEADER - ENTRY.len()) as u32,
        calls,
        slots,
        returns,
        charged: 0,
        size,
        fixed: true,
        framed: true,
        first_slot: REGION_SLOTS,
        sites: lowered.sites,
        origins: origins.list,
    })
}

/// `push rbp; mov rbp, rsp`
const PROLOGUE: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
/// `mov rsp, rbp; pop rbp`
const UNFRAME: [u8; 4] = [0x48, 0x89, 0xec, 0x5d];

/// `enter` has saved the callee-saved registers for everybody: saving them again at the start, and restoring them before the jumps
/// out, becomes NOPs. What does not look as expected stays.
fn leave_out_saves(code: &mut [u8], jumps: impl Iterator<Item = usize>) {
    let Some(rest) = code.strip_prefix(&PROLOGUE) else { return };
    // sub rsp, imm8 or imm32
    let sub = match rest {
        [0x48, 0x83, 0xec, ..] => 4,
        [0x48, 0x81, 0xec, ..] => 7,
        _ => return,
    };
    let start = PROLOGUE.len() + sub;
    let mut end = start;
    while let Some(n) = code.get(end..).and_then(saved) {
        end += n;
    }
    // Each `mov reg, [rsp + at]` undoes a `mov [rsp + at], reg`: one bit tells them apart.
    let saves: Vec<u8> = code[start..end].to_vec();
    let mut free = code[PROLOGUE.len()..start].to_vec();
    free[2] = 0xc4;
    let tail = [free.as_slice(), &UNFRAME].concat();
    nops(&mut code[start..end]);
    for jump in jumps {
        let Some(restores) = jump.checked_sub(tail.len() + saves.len()) else { continue };
        let (found, after) = code[restores..jump].split_at_mut(saves.len());
        let undone = found.iter().zip(&saves).all(|(&x, &y)| x == y || (x, y) == (0x8b, 0x89));
        if undone && after == tail {
            nops(found);
        }
    }
}

/// The length of `mov [rsp + at], reg` at the start of `code`, where `reg` is callee-saved.
fn saved(code: &[u8]) -> Option<usize> {
    let [rex @ (0x48 | 0x4c), 0x89, modrm, 0x24, ..] = *code else { return None };
    let reg = (modrm >> 3 & 7) | (rex & 4) << 1;
    let len = match modrm & 0xc7 {
        0x04 => 4,
        0x44 => 5,
        0x84 => 8,
        _ => return None,
    };
    (matches!(reg, 3 | 12..=15) && code.len() >= len).then_some(len)
}

fn nops(mut code: &mut [u8]) {
    const NOPS: [&[u8]; 9] = [
        &[0x90],
        &[0x66, 0x90],
        &[0x0f, 0x1f, 0x00],
        &[0x0f, 0x1f, 0x40, 0],
        &[0x0f, 0x1f, 0x44, 0, 0],
        &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
        &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
        &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        &[0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    ];
    while !code.is_empty() {
        let (head, rest) = code.split_at_mut(code.len().min(NOPS.len()));
        head.copy_from_slice(NOPS[head.len() - 1]);
        code = rest;
    }
}
