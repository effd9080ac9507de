//! Makes a block of what Cranelift emitted: entry check, body without an unused frame, probes in the place of calls, the code
//! of side exits in the place of traps.
//!
//! Place in the pipeline: after Cranelift, on bytes; its result goes to code memory. This is where the code is x86-64. What
//! is written here instead of in CLIF costs Cranelift nothing, and could not be better.
//!
//! - *Entry*: charges the budget and leaves when it or the attention word is negative; counts, if wanted. (Two loads of 32 bits: one of 64 would
//!   wait for the store of the block before to leave the store buffer.)
//! - *Frame*: Cranelift's tail calls insist on a frame pointer, and the Tail convention on the callee-saved registers. `enter`
//!   has saved all of those for everybody, so a block without spills is entered behind its prologue, leaves without the
//!   epilogue, and RBP stays the state all through it.
//! - *Jumps out* are near jumps with a relocation; calls of thunks and probes are near calls with one; a side exit is a
//!   conditional jump to a trap, found by its source location.
//!
//! Invariants: what does not look exactly as expected is an error or is left as it is. In a block that is `fixed` (branches
//! or constants whose places are not known) no byte moves: probes stay calls.

use twofold_arch::CodeSize;
use twofold_ir::{Block, Exit, MemFlags, SideExit};

use crate::abi::{AccessKind, MemInfo};
use crate::compiler::{CompileError, CompiledSlot, CompiledTb, Probe};
use crate::layout;
use crate::lower::{Lowered, raise_word};
use crate::native::Native;
use crate::origin::{Origins, Role};
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
/// `mov rsp, rbp; pop rbp`
const UNFRAME: [u8; 4] = [0x48, 0x89, 0xec, 0x5d];
/// Multiple of the alignment of constants.
const HEADER: usize = 48;

/// Jump (`0xe9`), or `0x80 | condition` for a conditional one.
const JMP: u8 = 0xe9;
const JNE: u8 = 0x85;
const JS: u8 = 0x88;

#[derive(Clone, Copy)]
enum Place {
    Thunk(Thunk),
    Slot(u32),
    Stub(usize),
}

/// Code that follows the body.
enum Stub {
    Budget,
    /// A side exit, of the guest instruction.
    Exit(SideExit, u16),
    /// The slow path of a probe in the body: back to the offset, on behalf of the guest instruction.
    Miss(MemInfo, u32, u16),
    /// A probe as a subroutine.
    Routine(MemInfo),
    /// A native op as a subroutine.
    Native(Native),
}

struct Assembler<'a> {
    out: Vec<u8>,
    block: &'a Block,
    full: bool,
    framed: bool,
    calls: Vec<(u32, Thunk)>,
    slots: Vec<CompiledSlot>,
    returns: Vec<(u32, u16)>,
    stubs: Vec<Stub>,
    /// Displacements that go to stubs.
    fixups: Vec<(u32, usize)>,
    origins: Origins,
}

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

    let mut a = Assembler {
        out: Vec::with_capacity(code.len() + 256),
        block,
        full: lowered.full,
        framed,
        calls: Vec::new(),
        slots: lowered.slots.iter().map(|&off| CompiledSlot { at: 0, off, page: 0 }).collect(),
        returns: Vec::new(),
        stubs: vec![Stub::Budget],
        fixups: Vec::new(),
        origins: Origins { wanted: emitted.locations.is_some(), list: Vec::new() },
    };
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
                    a.jump_out(target, fixed || probe == Probe::OutOfLine);
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
    a.finish_stubs();
    a.returns.sort_unstable();
    Ok(CompiledTb {
        code: a.out,
        entry: entry as u32,
        calls: a.calls,
        slots: a.slots,
        returns: a.returns,
        charged: block.retired,
        size: block.flags.size(),
        fixed,
        framed,
        first_slot: 0,
        sites: Vec::new(),
        origins: a.origins.list,
    })
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

impl Assembler<'_> {
    /// Takes over Cranelift's code.
    fn copy(&mut self, emitted: &Emitted, from: usize, to: usize) -> Result<(), CompileError> {
        if let Some(locations) = &emitted.locations {
            self.origins.copied((from, to), self.out.len(), locations, |bits| (Role::Body, (0, bits as u16)));
        }
        self.out.extend(emitted.code.get(from..to).ok_or(CompileError::Malformed)?);
        Ok(())
    }
    /// What is emitted from here on is for guest instruction `insn`.
    fn mark(&mut self, role: Role, insn: u16) {
        self.origins.mark(self.out.len(), role, (0, insn));
    }
    fn emit(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }
    fn imm32(&mut self, v: u32) {
        self.out.extend(v.to_le_bytes());
    }
    fn here(&self) -> u32 {
        self.out.len() as u32
    }
    fn stub(&mut self, stub: Stub) -> Place {
        self.stubs.push(stub);
        Place::Stub(self.stubs.len() - 1)
    }
    fn displacement(&mut self, place: Place) {
        let at = self.here();
        match place {
            Place::Thunk(t) => self.calls.push((at, t)),
            Place::Slot(n) => {
                if let Some(s) = self.slots.get_mut(n as usize) {
                    s.at = at;
                }
            }
            Place::Stub(n) => self.fixups.push((at, n)),
        }
        self.imm32(0);
    }
    fn jump(&mut self, opcode: u8, place: Place) {
        if opcode != JMP {
            self.emit(&[0x0f]);
        }
        self.emit(&[opcode]);
        self.displacement(place);
    }
    fn call_thunk(&mut self, thunk: Thunk, insn: u16) {
        self.emit(&[0xe8]);
        self.displacement(Place::Thunk(thunk));
        let at = self.here();
        self.returns.push((at, insn));
    }

    /// The entry check; returns where it starts. In a fixed block the body keeps its alignment.
    fn entry(&mut self, fixed: bool, prologue: usize, counter: Option<u32>) -> usize {
        let n = self.block.retired;
        let wide = n > 127;
        let counter = counter.and_then(|c| i32::try_from(u64::from(c) * 8).ok());
        let len = if wide { 21 } else { 19 } + if counter.is_some() { 14 } else { 0 };
        if fixed {
            self.out.resize(HEADER + prologue - len, 0xcc);
        }
        let start = self.out.len();
        self.mark(Role::Entry, 0);
        // mov rdi, rbp; mov eax, [rdi]; sub eax, n; mov [rdi], eax; or eax, [rdi + 4]; js
        self.emit(&[0x48, 0x89, 0xef, 0x8b, 0x07]);
        if wide {
            self.emit(&[0x2d]);
            self.imm32(n.into());
        } else {
            self.emit(&[0x83, 0xe8, n as u8]);
        }
        self.emit(&[0x89, 0x07, 0x0b, 0x47, layout::ATTENTION as u8]);
        self.jump(JS, Place::Stub(0));
        if let Some(at) = counter {
            // mov rax, [rbp + exec_counts]; inc qword [rax + at]
            self.emit(&[0x48, 0x8b, 0x85]);
            self.imm32(layout::EXEC_COUNTS as u32);
            self.emit(&[0x48, 0xff, 0x80]);
            self.imm32(at as u32);
        }
        debug_assert_eq!(self.out.len(), start + len);
        start
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

    /// The probe and the access; what it may clobber is what its call's signature returns. Returns where the displacement
    /// of the jump to the slow path is.
    fn probe(&mut self, info: MemInfo) -> u32 {
        let kind = info.kind();
        let view = layout::tlb_view(info.mode() as usize);
        // mov rax, rsi; shr rax, 7; and rax, [rdi + mask]; add rax, [rdi + table]
        self.emit(&[0x48, 0x89, 0xf0, 0x48, 0xc1, 0xe8, layout::TLB_SHIFT as u8, 0x48, 0x23, 0x87]);
        self.imm32((view + layout::VIEW_MASK) as u32);
        self.emit(&[0x48, 0x03, 0x87]);
        self.imm32((view + layout::VIEW_TABLE) as u32);
        // The page of the last byte, in RCX for a store (whose value is in RDX), else in RDX.
        let reg: u8 = if kind == AccessKind::Store { 1 } else { 2 };
        let last = info.checked_bytes() as u8 - 1;
        let aligned = info.flags().has(MemFlags::ALIGNED);
        if last == 0 || aligned {
            self.emit(&[0x48, 0x89, 0xf0 | reg]);
        } else {
            self.emit(&[0x48, 0x8d, 0x46 | reg << 3, last]);
        }
        self.emit(&[0x48, 0x81, 0xe0 | reg]);
        self.imm32(0xffff_f000 | if aligned { u32::from(last) } else { 0 });
        // cmp reg, [rax + tag]; jne
        let write = kind != AccessKind::Load || info.flags().has(MemFlags::WRITE_INTENT);
        let tag = if write { layout::TLB_WRITE } else { layout::TLB_READ };
        self.emit(&[0x48, 0x3b, 0x40 | reg << 3, tag as u8]);
        self.emit(&[0x0f, JNE]);
        let miss = self.here();
        self.imm32(0);
        // mov rax, [rax + addend]
        self.emit(&[0x48, 0x8b, 0x40, layout::TLB_ADDEND as u8]);
        match (kind, info.log2_bytes()) {
            (AccessKind::Load, 0) => self.emit(&[0x0f, 0xb6, 0x04, 0x30]),
            (AccessKind::Load, 1) => self.emit(&[0x0f, 0xb7, 0x04, 0x30]),
            (AccessKind::Load, 2) => self.emit(&[0x8b, 0x04, 0x30]),
            (AccessKind::Load, 3) => self.emit(&[0x48, 0x8b, 0x04, 0x30]),
            (AccessKind::Load, _) => self.emit(&[0xf3, 0x0f, 0x6f, 0x04, 0x30]),
            (AccessKind::Store, 0) => self.emit(&[0x88, 0x14, 0x30]),
            (AccessKind::Store, 1) => self.emit(&[0x66, 0x89, 0x14, 0x30]),
            (AccessKind::Store, 2) => self.emit(&[0x89, 0x14, 0x30]),
            (AccessKind::Store, 3) => self.emit(&[0x48, 0x89, 0x14, 0x30]),
            (AccessKind::Store, _) => self.emit(&[0xf3, 0x0f, 0x7f, 0x04, 0x30]),
            // add rax, rsi
            _ => self.emit(&[0x48, 0x01, 0xf0]),
        }
        miss
    }
    /// Makes the displacement at `field` reach here.
    fn land(&mut self, field: u32) {
        let d = self.here().wrapping_sub(field + 4);
        self.out[field as usize..field as usize + 4].copy_from_slice(&d.to_le_bytes());
    }

    /// What comes before the slow thunk, and which it is.
    fn slow(&mut self, info: MemInfo) -> Thunk {
        if info.kind() == AccessKind::Store {
            // mov rcx, rdx
            self.emit(&[0x48, 0x89, 0xd1]);
        }
        // mov edx, info
        self.emit(&[0xba]);
        self.imm32(info.0 as u32);
        Thunk::slow(info.kind(), info.bytes() == 16, self.full)
    }

    /// The terminal: a jump to a slot or an exit thunk, or, in line, the jump cache.
    fn jump_out(&mut self, target: Target, out_of_line: bool) {
        let place = match target {
            Target::Slot(n) => Place::Slot(n),
            Target::Thunk(t) => {
                let size = self.block.flags.size();
                // A framed block's epilogue has been emitted: RBP is the state again.
                if !out_of_line && (t == Thunk::INDIRECT || t == Thunk::far(size)) {
                    return self.jump_cache(t != Thunk::INDIRECT, size);
                }
                Place::Thunk(t)
            }
            Target::Probe(_) | Target::Native(_) => Place::Stub(0),
        };
        self.jump(JMP, place);
    }

    /// Through the jump cache to the RIP in RSI, for `far` to that plus `rip_base`.
    fn jump_cache(&mut self, far: bool, size: CodeSize) {
        if far {
            // add rsi, [rbp + rip_base], truncated
            self.emit(&[0x48, 0x03, 0x75, layout::RIP_BASE as u8]);
            match size {
                CodeSize::Bits64 => {}
                CodeSize::Bits32 => self.emit(&[0x89, 0xf6]),
                CodeSize::Bits16 => self.emit(&[0x0f, 0xb7, 0xf6]),
            }
        }
        let miss = Place::Thunk(Thunk::INDIRECT);
        // mov rax, rsi; shr rax, 12; xor rax, rsi; and eax, mask; shl eax, 5; add rax, [rbp + jump_cache]
        self.emit(&[0x48, 0x89, 0xf0, 0x48, 0xc1, 0xe8, 12, 0x48, 0x31, 0xf0, 0x25]);
        self.imm32(layout::JC_MASK as u32);
        self.emit(&[0xc1, 0xe0, 5, 0x48, 0x03, 0x85]);
        self.imm32(layout::JUMP_CACHE as u32);
        // cmp [rax + rip], rsi; jne; cmp dword [rax + flags], flags; jne
        self.emit(&[0x48, 0x39, 0x70, layout::JC_RIP as u8]);
        self.jump(JNE, miss);
        self.emit(&[0x81, 0x78, layout::JC_FLAGS as u8]);
        self.imm32(self.block.flags.0);
        self.jump(JNE, miss);
        // mov rcx, [rax + rip_base]; mov [rbp + rip_base], rcx; jmp [rax + code]
        self.emit(&[0x48, 0x8b, 0x48, layout::JC_RIP_BASE as u8, 0x48, 0x89, 0x4d, layout::RIP_BASE as u8]);
        self.emit(&[0xff, 0x60, layout::JC_CODE as u8]);
    }

    /// Where a side exit's branch goes: a direct exit without anything else to do is the branch itself.
    fn exit_place(&mut self, side: SideExit, insn: u16) -> Place {
        let direct = matches!(side.exit, Exit::Jump { .. }) && side.retired == self.block.retired && !self.framed;
        if direct {
            return self.new_slot(side.exit);
        }
        self.stub(Stub::Exit(side, insn))
    }
    fn new_slot(&mut self, exit: Exit) -> Place {
        let Exit::Jump { off } = exit else { return Place::Stub(0) };
        self.slots.push(CompiledSlot { at: 0, off, page: 0 });
        Place::Slot(self.slots.len() as u32 - 1)
    }

    fn finish_stubs(&mut self) {
        let mut n = 0;
        let mut at = Vec::with_capacity(self.stubs.len());
        while n < self.stubs.len() {
            at.push(self.here());
            // A stub makes no further ones.
            let stub = std::mem::replace(&mut self.stubs[n], Stub::Budget);
            self.finish_stub(stub);
            n += 1;
        }
        for &(field, n) in &self.fixups {
            let d = at[n].wrapping_sub(field + 4);
            self.out[field as usize..field as usize + 4].copy_from_slice(&d.to_le_bytes());
        }
    }

    fn finish_stub(&mut self, stub: Stub) {
        let size = self.block.flags.size();
        let (role, insn) = match stub {
            Stub::Budget => (Role::Budget, 0),
            Stub::Miss(_, _, insn) => (Role::Slow, insn),
            Stub::Exit(_, insn) => (Role::Exit, insn),
            Stub::Routine(_) | Stub::Native(_) => (Role::Shared, 0),
        };
        self.mark(role, insn);
        match stub {
            Stub::Budget => {
                // mov esi, ...
                self.emit(&[0xbe]);
                self.imm32(u32::from(self.block.retired) << 16 | u32::from(self.block.start()));
                self.jump(JMP, Place::Thunk(Thunk::budget(size)));
            }
            Stub::Miss(info, back, insn) => {
                let thunk = self.slow(info);
                self.call_thunk(thunk, insn);
                self.emit(&[JMP]);
                let d = back.wrapping_sub(self.here() + 4);
                self.imm32(d);
            }
            Stub::Routine(info) => {
                let miss = self.probe(info);
                self.emit(&[0xc3]);
                self.land(miss);
                let thunk = self.slow(info);
                self.jump(JMP, Place::Thunk(thunk));
            }
            Stub::Native(native) => {
                self.emit(&native.bytes());
                self.emit(&[0xc3]);
            }
            Stub::Exit(side, _) => {
                if self.framed {
                    self.emit(&UNFRAME);
                }
                let back = i32::from(self.block.retired) - i32::from(side.retired);
                if back != 0 {
                    // add dword [rbp + budget], back
                    self.emit(&[0x81, 0x45, layout::BUDGET as u8]);
                    self.imm32(back as u32);
                }
                self.exit(&side.exit, size);
            }
        }
    }

    fn exit(&mut self, exit: &Exit, size: CodeSize) {
        match *exit {
            Exit::Jump { .. } => {
                let slot = self.new_slot(*exit);
                self.jump(JMP, slot);
            }
            Exit::JumpFar { off } | Exit::Dispatch { off } => {
                // mov rsi, sign-extended
                self.emit(&[0x48, 0xc7, 0xc6]);
                self.imm32(off as u32);
                let far = matches!(exit, Exit::JumpFar { .. });
                self.jump(JMP, Place::Thunk(if far { Thunk::far(size) } else { Thunk::dispatch(size) }));
            }
            Exit::Raise { off, exception } => {
                // mov esi, ...; mov edx, error; mov rcx, cr2
                self.emit(&[0xbe]);
                self.imm32(raise_word(off, &exception));
                self.emit(&[0xba]);
                self.imm32(exception.error.unwrap_or(0));
                self.emit(&[0x48, 0xb9]);
                self.out.extend(exception.cr2.to_le_bytes());
                self.jump(JMP, Place::Thunk(Thunk::raise(size)));
            }
            // Indirect ones are never traps.
            Exit::Helped | Exit::Indirect { .. } => self.jump(JMP, Place::Thunk(Thunk::HELPED)),
        }
    }
}
