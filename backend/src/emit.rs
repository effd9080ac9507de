//! The parts of a block that both of the quick tier's emitters write alike: entry check, memory access, ways out, slow paths.
//!
//! Place in the pipeline: under `direct`, which writes all of a block, and `assemble`, which puts Cranelift's code between these
//! parts. This is where the code is x86-64. RBP and RDI are the state all through a block (RBP not in one with a frame).
//!
//! - *Entry*: charges the budget and leaves when it or the attention word is negative; counts, if wanted. (Two loads of 32 bits: one of 64 would
//!   wait for the store of the block before to leave the store buffer.)
//! - *Jumps out* are near jumps with a relocation; calls of thunks and probes are near calls with one; a side exit is a
//!   conditional jump.

use twofold_arch::CodeSize;
use twofold_ir::{Block, Exit, MemFlags, SideExit, Ty};

use crate::abi::{AccessKind, MemInfo};
use crate::compiler::{CompiledSlot, CompiledTb};
use crate::direct::x64::{self, Mem, RAX, RCX, RDX, RSI, Rm};
use crate::layout;
use crate::lower::raise_word;
use crate::native::Native;
use crate::origin::{Origins, Role};
use crate::thunk::Thunk;

/// `mov rsp, rbp; pop rbp`
pub const UNFRAME: [u8; 4] = [0x48, 0x89, 0xec, 0x5d];
/// Multiple of the alignment of constants.
const HEADER: usize = 48;

/// Jump (`0xe9`), or `0x80 | condition` for a conditional one.
pub const JMP: u8 = 0xe9;
pub const JNE: u8 = 0x85;
const JS: u8 = 0x88;

/// Where a jump leads.
#[derive(Clone, Copy)]
pub enum Place {
    Thunk(Thunk),
    Slot(u32),
    Stub(usize),
}

/// Code that follows the body.
pub enum Stub {
    Budget,
    /// A side exit, of the guest instruction.
    Exit(SideExit, u16),
    /// The slow path of a probe in the body: back to the offset, on behalf of the guest instruction.
    Miss(MemInfo, u32, u16),
    /// The slow path of an access whose operands are anywhere.
    Slow(SlowAccess),
    /// A probe as a subroutine.
    Routine(MemInfo),
    /// A native op as a subroutine.
    Native(Native),
}

/// A memory access that the probe in the block does not do.
pub struct SlowAccess {
    pub info: MemInfo,
    /// The address: a register and what is added to it.
    pub address: (u8, i32),
    pub value: SlowValue,
    /// The register of a load's result.
    pub result: Option<u8>,
    /// Where in the block it goes on.
    pub back: u32,
    pub insn: u16,
}

/// What is stored.
pub enum SlowValue {
    /// Nothing.
    None,
    Reg(u8),
    Imm(i32),
    /// The operands of an atomic access are where the thunk wants them.
    Placed,
}

/// A block's code while it is written.
pub struct Emitter<'a> {
    pub out: Vec<u8>,
    pub block: &'a Block,
    pub full: bool,
    pub framed: bool,
    pub calls: Vec<(u32, Thunk)>,
    pub slots: Vec<CompiledSlot>,
    pub returns: Vec<(u32, u16)>,
    pub stubs: Vec<Stub>,
    /// Displacements that go to stubs.
    pub fixups: Vec<(u32, usize)>,
    pub origins: Origins,
    places: Vec<u32>,
}

/// Memory that is used for one block after the other. What is in it means nothing.
#[derive(Default)]
pub struct Buffers {
    code: Vec<u8>,
    calls: Vec<(u32, Thunk)>,
    slots: Vec<CompiledSlot>,
    returns: Vec<(u32, u16)>,
    stubs: Vec<Stub>,
    fixups: Vec<(u32, usize)>,
    places: Vec<u32>,
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").finish_non_exhaustive()
    }
}

impl Buffers {
    /// Takes back the memory of a block that nobody needs any more.
    pub fn recycle(&mut self, tb: CompiledTb) {
        (self.code, self.calls, self.slots, self.returns) = (tb.code, tb.calls, tb.slots, tb.returns);
    }
}

/// The vector without what is in it.
fn emptied<T>(mut v: Vec<T>) -> Vec<T> {
    v.clear();
    v
}

impl<'a> Emitter<'a> {
    /// Nothing yet of a block; `full` if called thunks must keep vector registers.
    pub fn new(block: &'a Block, full: bool, annotate: bool, buffers: &mut Buffers) -> Self {
        let Buffers { code, calls, slots, returns, stubs, fixups, places } = std::mem::take(buffers);
        let mut stubs = emptied(stubs);
        stubs.push(Stub::Budget);
        Self {
            out: emptied(code),
            block,
            full,
            framed: false,
            calls: emptied(calls),
            slots: emptied(slots),
            returns: emptied(returns),
            stubs,
            fixups: emptied(fixups),
            origins: Origins { wanted: annotate, list: Vec::new() },
            places: emptied(places),
        }
    }

    /// Writes what lies behind the body, and gives the block, which is entered at `entry`.
    pub fn finish(mut self, entry: usize, buffers: &mut Buffers) -> CompiledTb {
        self.finish_stubs();
        self.returns.sort_unstable();
        (buffers.stubs, buffers.fixups, buffers.places) = (self.stubs, self.fixups, self.places);
        CompiledTb {
            code: self.out,
            entry: entry as u32,
            calls: self.calls,
            slots: self.slots,
            returns: self.returns,
            charged: self.block.retired,
            size: self.block.flags.size(),
            fixed: false,
            framed: self.framed,
            first_slot: 0,
            sites: Vec::new(),
            origins: self.origins.list,
        }
    }

    /// What is emitted from here on is for guest instruction `insn`.
    pub fn mark(&mut self, role: Role, insn: u16) {
        self.origins.mark(self.out.len(), role, (0, insn));
    }
    pub fn emit(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }
    pub fn imm32(&mut self, v: u32) {
        self.out.extend(v.to_le_bytes());
    }
    pub fn here(&self) -> u32 {
        self.out.len() as u32
    }
    pub fn stub(&mut self, stub: Stub) -> Place {
        Place::Stub(self.stub_number(stub))
    }
    pub fn stub_number(&mut self, stub: Stub) -> usize {
        self.stubs.push(stub);
        self.stubs.len() - 1
    }
    pub fn displacement(&mut self, place: Place) {
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
    pub fn jump(&mut self, opcode: u8, place: Place) {
        if opcode != JMP {
            self.emit(&[0x0f]);
        }
        self.emit(&[opcode]);
        self.displacement(place);
    }
    pub fn call_thunk(&mut self, thunk: Thunk, insn: u16) {
        self.emit(&[0xe8]);
        self.displacement(Place::Thunk(thunk));
        let at = self.here();
        self.returns.push((at, insn));
    }

    /// The entry check; returns where it starts. In a fixed block the body keeps its alignment.
    pub fn entry(&mut self, fixed: bool, prologue: usize, counter: Option<u32>) -> usize {
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

    /// The probe and the access; what it may clobber is what its call's signature returns. Returns where the displacement
    /// of the jump to the slow path is.
    pub fn probe(&mut self, info: MemInfo) -> u32 {
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
    pub fn land(&mut self, field: u32) {
        let d = self.here().wrapping_sub(field + 4);
        self.out[field as usize..field as usize + 4].copy_from_slice(&d.to_le_bytes());
    }

    /// What comes before the slow thunk, and which it is.
    pub fn slow(&mut self, info: MemInfo) -> Thunk {
        if info.kind() == AccessKind::Store {
            // mov rcx, rdx
            self.emit(&[0x48, 0x89, 0xd1]);
        }
        // mov edx, info
        self.emit(&[0xba]);
        self.imm32(info.0 as u32);
        Thunk::slow(info.kind(), info.bytes() == 16, self.full)
    }

    /// The terminal: a jump to a slot or an exit thunk, or, in line, the jump cache. In a block with a frame its epilogue has been
    /// emitted: RBP is the state again.
    pub fn jump_out(&mut self, place: Place, out_of_line: bool) {
        let size = self.block.flags.size();
        match place {
            Place::Thunk(t) if !out_of_line && (t == Thunk::INDIRECT || t == Thunk::far(size)) => {
                self.jump_cache(t != Thunk::INDIRECT, size);
            }
            _ => self.jump(JMP, place),
        }
    }

    /// Through the jump cache to the RIP in RSI, for `far` to that plus `rip_base`.
    pub fn jump_cache(&mut self, far: bool, size: CodeSize) {
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
    pub fn exit_place(&mut self, side: SideExit, insn: u16) -> Place {
        let direct = matches!(side.exit, Exit::Jump { .. }) && side.retired == self.block.retired && !self.framed;
        if direct {
            return self.new_slot(side.exit);
        }
        self.stub(Stub::Exit(side, insn))
    }
    pub fn new_slot(&mut self, exit: Exit) -> Place {
        let Exit::Jump { off } = exit else { return Place::Stub(0) };
        self.slots.push(CompiledSlot { at: 0, off, page: 0 });
        Place::Slot(self.slots.len() as u32 - 1)
    }

    pub fn finish_stubs(&mut self) {
        let mut n = 0;
        while n < self.stubs.len() {
            self.places.push(self.here());
            // A stub makes no further ones.
            let stub = std::mem::replace(&mut self.stubs[n], Stub::Budget);
            self.finish_stub(stub);
            n += 1;
        }
        for &(field, n) in &self.fixups {
            let d = self.places[n].wrapping_sub(field + 4);
            self.out[field as usize..field as usize + 4].copy_from_slice(&d.to_le_bytes());
        }
    }

    pub fn finish_stub(&mut self, stub: Stub) {
        let size = self.block.flags.size();
        let (role, insn) = match stub {
            Stub::Budget => (Role::Budget, 0),
            Stub::Miss(_, _, insn) => (Role::Slow, insn),
            Stub::Slow(SlowAccess { insn, .. }) => (Role::Slow, insn),
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
            Stub::Slow(access) => self.slow_access(&access),
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

    fn slow_access(&mut self, access: &SlowAccess) {
        let (info, vector) = (access.info, access.info.bytes() == 16);
        let out = &mut self.out;
        match access.value {
            SlowValue::Reg(r) if vector => x64::load_vec(out, 0, Rm::R(r)),
            SlowValue::Reg(r) => x64::mov(out, RCX, r),
            SlowValue::Imm(imm) => x64::mov_imm(out, RCX, i64::from(imm) as u64),
            SlowValue::None | SlowValue::Placed => {}
        }
        x64::lea(out, Ty::I64, RSI, Mem::at(access.address.0, access.address.1));
        x64::mov_imm(out, RDX, info.0);
        self.call_thunk(Thunk::slow(info.kind(), vector, self.full), access.insn);
        match access.result {
            Some(r) if vector => x64::load_vec(&mut self.out, r, Rm::R(0)),
            Some(r) => x64::mov(&mut self.out, r, RAX),
            None => {}
        }
        self.emit(&[JMP]);
        let d = access.back.wrapping_sub(self.here() + 4);
        self.imm32(d);
    }

    pub fn exit(&mut self, exit: &Exit, size: CodeSize) {
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
            Exit::Helped => self.jump(JMP, Place::Thunk(Thunk::HELPED)),
            // To what is in RSI.
            Exit::Indirect { .. } => self.jump(JMP, Place::Thunk(Thunk::INDIRECT)),
        }
    }
}
