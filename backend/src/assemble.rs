//! Makes a block of what Cranelift emitted: entry check, body without an unused frame, probes in the place of calls, the code
//! of side exits in the place of traps.
//!
//! Place in the pipeline: after Cranelift, on bytes; its result goes to code memory. What is written here (with `emit`) instead of
//! in CLIF costs Cranelift nothing, and could not be better.
//!
//! - *Frame*: Cranelift's tail calls insist on a frame pointer, and the Tail convention on the callee-saved registers. `enter`
//!   has saved all of those for everybody, so a block without spills is entered behind its prologue, leaves without the
//!   epilogue, and RBP stays the state all through it.
//! - *Side exits* are conditional jumps to traps, found by their source locations.
//!
//! Invariants: what does not look exactly as expected is an error or is left as it is. In a block that is `fixed` (branches
//! or constants whose places are not known) no byte moves: probes stay calls.

use twofold_ir::Block;

use crate::compiler::{CompileError, CompiledSlot, CompiledTb, Probe};
use crate::emit::{Buffers, Emitter, JMP, Place, Stub, UNFRAME};
use crate::lower::Lowered;
use crate::native::Native;
use crate::origin::Role;
use crate::thunk::Thunk;

/// What a relocation refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Thunk(Thunk),
    /// Index in `Lowered::slots`.
    Slot(u32),
    /// Index in `Lowered::probes`.
    Probe(u32),
    /// An op that is the host's own.
    Native(Native),
}

/// What Cranelift emitted.
#[derive(Debug, Default)]
pub(crate) struct Emitted {
    pub code: Vec<u8>,
    /// Relocations: offset of the 32-bit displacement, target, guest instruction. Ascending.
    pub relocs: Vec<(u32, Target, u16)>,
    /// Side exits: (start, end) of the code of the trap, index in `Lowered::exits`. Ascending.
    pub exits: Vec<(u32, u32, u32)>,
    /// Where each side exit's trap instruction is, by index.
    pub traps: Vec<u32>,
    /// If it is wanted: (start, end, source location), ascending.
    pub locations: Option<Vec<(u32, u32, u32)>>,
}

/// `push rbp; mov rbp, rsp`
const PROLOGUE: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];

/// Makes the block.
pub(crate) fn assemble(
    emitted: &Emitted,
    lowered: &Lowered,
    block: &Block,
    probe: Probe,
    counter: Option<u32>,
) -> Result<CompiledTb, CompileError> {
    let code = &emitted.code;
    let frame = frame(code).filter(|(_, epilogue)| {
        let mut jumps = emitted.relocs.iter().filter(|r| is_jump(code, r.0));
        jumps.all(|r| code[..r.0 as usize - 1].ends_with(epilogue))
    });
    let framed = frame.is_none();
    let (prologue, epilogue) = frame.unwrap_or_default();
    // Constants, if any, come after the last instruction, as traps do.
    let last = emitted.relocs.iter().map(|r| r.0 as usize + 4).max().ok_or(CompileError::Malformed)?;
    let fixed = lowered.fixed || code.len() != last + emitted.traps.len() * 2;

    let slots = lowered.slots.iter().map(|&off| CompiledSlot { at: 0, off, page: 0 }).collect();
    let mut buffers = Buffers::default();
    let mut a = Emitter::new(block, lowered.full, emitted.locations.is_some(), &mut buffers);
    a.out.reserve(code.len() + 256);
    (a.framed, a.slots) = (framed, slots);
    let entry = a.entry(fixed, prologue, counter);
    // Body: pieces between the places that are written anew.
    let (mut from, mut relocs) = (prologue, emitted.relocs.iter().peekable());
    let mut exits = emitted.exits.iter().peekable();
    let end = if fixed { code.len() } else { last };
    loop {
        let next_exit = exits.peek().map_or(u32::MAX, |e| e.1);
        match relocs.peek() {
            Some(&&(at, target, insn)) if at < next_exit => {
                relocs.next();
                let at = at as usize;
                if is_jump(code, at as u32) {
                    let start = at - 1 - epilogue.len();
                    a.copy(emitted, from, start)?;
                    a.mark(Role::Exit, insn);
                    let place = match target {
                        Target::Slot(n) => Place::Slot(n),
                        Target::Thunk(t) => Place::Thunk(t),
                        Target::Probe(_) | Target::Native(_) => return Err(CompileError::Malformed),
                    };
                    a.jump_out(place, fixed || probe == Probe::OutOfLine);
                    if fixed {
                        a.out.extend(std::iter::repeat_n(0xcc, epilogue.len()));
                    }
                } else {
                    a.copy(emitted, from, at - 1)?;
                    a.call(target, insn, lowered, fixed, !fixed && probe == Probe::Inline)?;
                }
                from = at + 4;
            }
            _ => {
                let Some(&(start, stop, index)) = exits.next() else { break };
                let at = side_exit(emitted, start, stop, index)?;
                a.copy(emitted, from, at)?;
                let side = *lowered.exits.get(index as usize).ok_or(CompileError::Malformed)?;
                let place = a.exit_place(side, emitted.insn_at(at));
                a.displacement(place);
                from = at + 4;
            }
        }
    }
    a.copy(emitted, from, end)?;
    Ok(CompiledTb { fixed, ..a.finish(entry, &mut buffers) })
}

/// Code in the five bytes of a call, if it fits.
pub(crate) fn in_place(code: &[u8]) -> Option<[u8; 5]> {
    const NOPS: [&[u8]; 6] =
        [&[], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00], &[0x0f, 0x1f, 0x40, 0], &[0x0f, 0x1f, 0x44, 0, 0]];
    let nop = NOPS[5usize.checked_sub(code.len())?];
    let mut out = [0; 5];
    out[..code.len()].copy_from_slice(code);
    out[code.len()..].copy_from_slice(nop);
    Some(out)
}

fn is_jump(code: &[u8], displacement: u32) -> bool {
    displacement >= 1 && code.get(displacement as usize - 1) == Some(&JMP)
}

/// Where the displacement of the conditional jump of a side exit is: the last in its range that goes to its trap.
fn side_exit(emitted: &Emitted, start: u32, stop: u32, index: u32) -> Result<usize, CompileError> {
    let code = &emitted.code;
    let trap = i64::from(*emitted.traps.get(index as usize).ok_or(CompileError::Malformed)?);
    let ends = (start + 6..=stop).rev();
    for end in ends {
        let Some([0x0f, 0x80..=0x8f, d @ ..]) = code.get(end as usize - 6..end as usize) else { continue };
        let to = d.try_into().map(i32::from_le_bytes).unwrap_or(0);
        if i64::from(end) + i64::from(to) == trap {
            return Ok(end as usize - 4);
        }
    }
    Err(CompileError::Codegen("a side exit's branch is not where it should be".into()))
}

/// The length of the prologue and the epilogue of a frame that holds saved registers only.
fn frame(code: &[u8]) -> Option<(usize, Vec<u8>)> {
    let mut rest = code.strip_prefix(&PROLOGUE)?;
    let mut restore = Vec::new();
    // `sub rsp, imm8` or `imm32`, undone by `add`.
    let sub = match rest {
        [0x48, 0x83, 0xec, _, ..] => 4,
        [0x48, 0x81, 0xec, ..] => 7,
        _ => 0,
    };
    if sub != 0 {
        let (head, tail) = rest.split_at_checked(sub)?;
        rest = tail;
        let mut at = 0;
        // `mov [rsp + at], reg`, undone by `mov reg, [rsp + at]`; the first is at 0 when nothing is spilled below.
        while let Some(insn) = saved(rest, at) {
            restore.extend([insn[0], 0x8b]);
            restore.extend(&insn[2..]);
            rest = &rest[insn.len()..];
            at += 8;
        }
        if at == 0 {
            return None;
        }
        restore.extend([0x48, head[1], 0xc4]);
        restore.extend(&head[3..]);
    }
    let prologue = code.len() - rest.len();
    restore.extend(UNFRAME);
    Some((prologue, restore))
}

/// `mov [rsp + at], reg` at the start of `code`, where `reg` is callee-saved.
fn saved(code: &[u8], at: u8) -> Option<&[u8]> {
    let [rex @ (0x48 | 0x4c), 0x89, modrm, 0x24, ..] = *code else { return None };
    let reg = (modrm >> 3 & 7) | (rex & 4) << 1;
    if !matches!(reg, 3 | 12..=15) {
        return None;
    }
    let len = match modrm & 0xc7 {
        0x04 if at == 0 => 4,
        0x44 if at != 0 && code.get(4) == Some(&at) => 5,
        _ => return None,
    };
    code.get(..len)
}

impl Emitted {
    /// The guest instruction that the byte at `at` is for, if that is noted.
    fn insn_at(&self, at: usize) -> u16 {
        let mut locations = self.locations.iter().flatten();
        locations.find(|l| (l.0 as usize..l.1 as usize).contains(&at)).map_or(0, |l| l.2 as u16)
    }
}

impl Emitter<'_> {
    /// Takes over Cranelift's code.
    fn copy(&mut self, emitted: &Emitted, from: usize, to: usize) -> Result<(), CompileError> {
        if let Some(locations) = &emitted.locations {
            self.origins.copied((from, to), self.out.len(), locations, |bits| (Role::Body, (0, bits as u16)));
        }
        self.out.extend(emitted.code.get(from..to).ok_or(CompileError::Malformed)?);
        Ok(())
    }

    fn call(
        &mut self,
        target: Target,
        insn: u16,
        lowered: &Lowered,
        lowered_fixed: bool,
        inline: bool,
    ) -> Result<(), CompileError> {
        let probe = match target {
            Target::Thunk(t) => {
                self.mark(Role::Body, insn);
                self.call_thunk(t, insn);
                return Ok(());
            }
            Target::Slot(_) => return Err(CompileError::Malformed),
            Target::Native(native) => {
                self.mark(Role::Body, insn);
                let code = native.bytes();
                if !lowered_fixed {
                    self.emit(&code);
                } else if let Some(code) = in_place(&code) {
                    self.emit(&code);
                } else {
                    let routine = self.stub(Stub::Native(native));
                    self.emit(&[0xe8]);
                    self.displacement(routine);
                }
                return Ok(());
            }
            Target::Probe(n) => *lowered.probes.get(n as usize).ok_or(CompileError::Malformed)?,
        };
        self.mark(Role::Access, insn);
        if inline {
            let field = self.probe(probe);
            self.fixups.push((field, self.stubs.len()));
            self.stubs.push(Stub::Miss(probe, self.here(), insn));
        } else if let Some(thunk) = Thunk::probe(probe, self.full) {
            self.call_thunk(thunk, insn);
        } else {
            let routine = self.stub(Stub::Routine(probe));
            self.emit(&[0xe8]);
            self.displacement(routine);
            let at = self.here();
            self.returns.push((at, insn));
        }
        Ok(())
    }
}
