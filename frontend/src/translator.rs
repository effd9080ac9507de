//! The emitters' context: the builder, the current instruction, its operands, and the ways an instruction can end a block.
//!
//! Place: every emitter gets a `&mut Translator`. Memory operands and the stack are in [`crate::address`]. Invariant the
//! emitters keep: in one instruction every op that can fault comes before the first `Put` (write_gpr, set_cc, push…).

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use twofold_arch::cpuid::{Feature, Features};
use twofold_arch::{CodeSize, CondCode, Exception, Loc, TbFlags};
use twofold_ir::{BinOp, Block, Builder, Exit, Helper, IndirectKind, MemFlags, Ty, Value};

/// Where an operand lives, with the address computed once.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A general-purpose register.
    Reg(Register),
    /// Memory at a linear address.
    Mem {
        /// The linear address, I64.
        addr: Value,
        /// STACK for accesses through SS.
        flags: MemFlags,
    },
}

/// How a memory operand will be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read only.
    Read,
    /// Written only, or read with the intent to write.
    Write,
}

/// Emits one block.
pub struct Translator<'a> {
    /// The block being built.
    pub b: Builder,
    /// The current instruction.
    pub insn: Instruction,
    /// Whether it is a VEX-coded vector instruction.
    pub vex: bool,
    /// The state that shapes the translation.
    pub flags: TbFlags,
    /// The CPU's features.
    pub features: Features,
    /// Page offset of the current instruction.
    pub off: u16,
    /// Page offset of the next instruction (4096 and more: in the following page).
    pub next: i32,
    /// All bytes, from the block's first.
    bytes: &'a [u8],
    /// Index of the current instruction in `bytes`.
    start: usize,
    end: Option<(Exit, bool)>,
    /// The block ends after the instruction behind this one.
    pub(crate) one_more: bool,
    /// Where the x87 registers are here, if that is known.
    pub(crate) x87: Option<X87Place>,
}

/// Where the x87 registers are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum X87Place {
    /// In the host's x87 unit.
    Host,
    /// In the guest state.
    State,
}

impl<'a> Translator<'a> {
    /// A translator for a block of `bytes` that starts at page offset `off`, in the memory of one that nobody needs any more.
    #[must_use]
    pub fn new(flags: TbFlags, features: Features, bytes: &'a [u8], off: u16, spare: Block) -> Self {
        Self {
            b: Builder::reusing(flags, spare),
            insn: crate::no_instruction(),
            vex: false,
            flags,
            features,
            off,
            next: i32::from(off),
            bytes,
            start: 0,
            end: None,
            one_more: false,
            x87: None,
        }
    }

    /// Begins the decoded instruction in `insn`, at `off` and at index `start` of the bytes.
    pub(crate) fn begin(&mut self, off: u16, start: usize) {
        let len = self.insn.len().clamp(1, crate::MAX_INSN_LEN);
        self.off = off;
        self.start = start;
        self.next = i32::from(off) + len as i32;
        self.b.begin_insn(off, len as u8);
    }

    /// The bytes of the current instruction.
    #[must_use]
    pub fn insn_bytes(&self) -> &'a [u8] {
        let end = (self.start + self.insn.len()).min(self.bytes.len());
        &self.bytes[self.start..end]
    }

    /// The finished block, if the current instruction ended it.
    pub(crate) fn take_finished(&mut self) -> Option<Block> {
        let (exit, retires) = self.end.take()?;
        Some(core::mem::take(&mut self.b).finish(exit, retires))
    }

    /// Ends the block after complete instructions.
    pub(crate) fn finish(self, exit: Exit) -> Block {
        self.b.finish(exit, true)
    }

    /// Whether the CPU has a feature.
    #[must_use]
    pub fn has(&self, f: Feature) -> bool {
        self.features.has(f)
    }
    /// Whether this is 64-bit code.
    #[must_use]
    pub fn is64(&self) -> bool {
        self.flags.is64()
    }
    /// Whether the instruction has a (valid) LOCK prefix.
    #[must_use]
    pub fn locked(&self) -> bool {
        self.insn.has_lock_prefix()
    }

    // ---- constants and helpers -----------------------------------------------------------------------------------------

    /// A constant of 64 bits.
    pub fn c64(&mut self, v: u64) -> Value {
        self.b.iconst(Ty::I64, v)
    }
    /// Calls a helper; narrower arguments are zero-extended.
    pub fn call(&mut self, helper: Helper, args: &[Value]) -> Value {
        if !helper.info().keeps_state() {
            self.x87 = None;
        }
        let mut wide = [Value::NONE; 4];
        for (w, &a) in wide.iter_mut().zip(args) {
            *w = self.b.zext(Ty::I64, a);
        }
        self.b.call(helper, &wide[..args.len().min(4)])
    }

    /// Brings the x87 registers to where they are wanted: to the host's unit only under `X87_HOST`.
    pub(crate) fn want_x87(&mut self, place: X87Place) {
        let known = if self.flags.has(TbFlags::X87_HOST) { self.x87 } else { Some(X87Place::State) };
        if known != Some(place) {
            let helper = if place == X87Place::Host { Helper::X87Ready } else { Helper::X87Park };
            self.call(helper, &[]);
            self.x87 = Some(place);
        }
    }

    // ---- registers -----------------------------------------------------------------------------------------------------

    /// Reads general-purpose register `n` (encoding order) at a width: its low bits.
    pub fn get_gpr(&mut self, ty: Ty, n: u8) -> Value {
        self.b.get(ty, Loc::gpr(n))
    }
    /// Writes register `n`: 64-bit values whole, 32-bit values zero-extended, narrower ones into the low bits.
    pub fn put_gpr(&mut self, n: u8, v: Value) {
        let loc = Loc::gpr(n);
        let wide = match self.b.ty(v) {
            Ty::I8 | Ty::I16 => {
                let ty = self.b.ty(v);
                let old = self.b.get(Ty::I64, loc);
                let kept = self.b.bin_imm(BinOp::And, old, !ty.mask());
                let v = self.b.zext(Ty::I64, v);
                self.b.or(kept, v)
            }
            _ => self.b.zext(Ty::I64, v),
        };
        self.b.put(loc, wide);
    }
    /// Reads a register operand (AH … BH included); its type is the register's width.
    pub fn read_gpr(&mut self, r: Register) -> Value {
        let (n, ty, high) = gpr(r);
        if high {
            let word = self.b.get(Ty::I16, Loc::gpr(n));
            let h = self.b.bin_imm(BinOp::Shr, word, 8);
            return self.b.trunc(Ty::I8, h);
        }
        self.get_gpr(ty, n)
    }
    /// Writes a register operand; `v` has the register's width.
    pub fn write_gpr(&mut self, r: Register, v: Value) {
        let (n, _, high) = gpr(r);
        if high {
            let old = self.b.get(Ty::I64, Loc::gpr(n));
            let kept = self.b.bin_imm(BinOp::And, old, !0xff00);
            let v = self.b.zext(Ty::I64, v);
            let v = self.b.bin_imm(BinOp::Shl, v, 8);
            let new = self.b.or(kept, v);
            return self.b.put(Loc::gpr(n), new);
        }
        self.put_gpr(n, v);
    }

    /// AL, AX, EAX or RAX.
    #[must_use]
    pub fn accumulator(&self, ty: Ty) -> Register {
        match ty {
            Ty::I8 => Register::AL,
            Ty::I16 => Register::AX,
            Ty::I32 => Register::EAX,
            _ => Register::RAX,
        }
    }

    // ---- operands ------------------------------------------------------------------------------------------------------

    /// The integer type of operand `n`. For an immediate: that of operand 0.
    #[must_use]
    pub fn op_ty(&self, n: u32) -> Ty {
        match self.insn.op_kind(n) {
            OpKind::Register => {
                let r = self.insn.op_register(n);
                if r.is_gpr() { gpr(r).1 } else { Ty::int(r.size() as u32) }
            }
            OpKind::Memory => Ty::int(self.insn.memory_size().size() as u32),
            _ if n > 0 => self.op_ty(0),
            _ => Ty::I64,
        }
    }
    /// Whether operand `n` is memory.
    #[must_use]
    pub fn is_mem(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Memory
    }
    /// Reads integer operand `n`.
    pub fn read_op(&mut self, n: u32) -> Value {
        let ty = self.op_ty(n);
        self.read_op_as(n, ty)
    }
    /// Reads integer operand `n` at width `ty`: immediates are given that width, memory is read at it, registers give
    /// their low bits.
    pub fn read_op_as(&mut self, n: u32, ty: Ty) -> Value {
        match self.insn.op_kind(n) {
            OpKind::Register => {
                let v = self.read_gpr(self.insn.op_register(n));
                if self.b.ty(v).bits() > ty.bits() { self.b.trunc(ty, v) } else { v }
            }
            OpKind::Memory => self.load_mem(ty),
            _ => {
                let imm = self.insn.try_immediate(n).unwrap_or(0);
                self.b.iconst(ty, imm)
            }
        }
    }
    /// Writes integer operand `n`, a register or memory.
    pub fn write_op(&mut self, n: u32, v: Value) {
        if self.is_mem(n) {
            self.store_mem(v);
        } else {
            self.write_gpr(self.insn.op_register(n), v);
        }
    }
    /// Operand `n` as a place: the address of a memory operand is computed now, for an access of `ty`.
    pub fn place(&mut self, n: u32, ty: Ty, access: Access) -> Place {
        if self.is_mem(n) {
            let addr = self.mem_addr(ty.bytes(), access);
            if access == Access::Write && self.locked() {
                self.claim_atomic(ty, addr);
            }
            Place::Mem { addr, flags: self.mem_flags() }
        } else {
            Place::Reg(self.insn.op_register(n))
        }
    }
    /// Before an atomic access: those cannot say that they go through SS, where an address that is not canonical is #SS.
    pub fn claim_atomic(&mut self, ty: Ty, addr: Value) {
        if self.is64() && self.mem_flags() == MemFlags::STACK {
            self.b.load(ty, MemFlags::STACK.or(MemFlags::WRITE_INTENT), addr);
        }
    }
    /// Reads a place that will be written afterwards.
    pub fn read_for_write(&mut self, place: Place, ty: Ty) -> Value {
        match place {
            Place::Reg(r) => {
                let v = self.read_gpr(r);
                self.b.trunc(ty, v)
            }
            Place::Mem { addr, flags } => self.b.load(ty, flags.or(MemFlags::WRITE_INTENT), addr),
        }
    }
    /// Writes a place. To memory, do it before the instruction's first `Put`.
    pub fn write_place(&mut self, place: Place, v: Value) {
        match place {
            Place::Reg(r) => self.write_gpr(r, v),
            Place::Mem { addr, flags } => self.b.store(flags, addr, v),
        }
    }

    // ---- ends ----------------------------------------------------------------------------------------------------------

    /// Ends the block with this instruction. `retires`: whether it counts as complete there.
    pub fn end(&mut self, exit: Exit, retires: bool) {
        self.end = Some((exit, retires));
    }
    /// Raises an exception at this instruction; the block ends.
    pub fn raise(&mut self, exception: Exception) {
        self.end(Exit::Raise { off: self.off, exception }, false);
    }
    /// Raises an exception at this instruction when `c` (I8) is not 0.
    pub fn raise_if(&mut self, c: Value, exception: Exception) {
        self.b.exit_if(c, Exit::Raise { off: self.off, exception }, false);
    }
    /// #UD for an instruction twofold does not have; notes it on the block.
    pub fn unimplemented(&mut self) {
        self.b.set_unimplemented(self.insn.code() as u16);
        self.raise(Exception::UD);
    }
    /// Ends the block after this instruction, to the dispatcher: state changed that the key or event delivery depends on.
    pub fn end_dispatch(&mut self) {
        self.end(Exit::Dispatch { off: self.next }, true);
    }
    /// Ends the block after the next instruction, which is one for which [`Self::next_is_plain`].
    pub fn end_after_next(&mut self) {
        self.one_more = true;
    }
    /// Whether the next instruction can be in this block and goes on to the one behind it; not if it is another STI.
    #[must_use]
    pub fn next_is_plain(&self) -> bool {
        if self.single() || self.next >= 4096 {
            return false;
        }
        let bytes = &self.bytes[(self.start + self.insn.len()).min(self.bytes.len())..];
        let bitness = match self.flags.size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let next = Decoder::new(bitness, bytes, DecoderOptions::NONE).decode();
        next.flow_control() == FlowControl::Next && next.mnemonic() != Mnemonic::Sti
    }
    /// Ends the block: a helper has set `state.rip`.
    pub fn end_helped(&mut self) {
        self.end(Exit::Helped, true);
    }
    /// Ends the block with a jump to the RIP in `rip` (I64, truncated to the operand size already).
    pub fn end_indirect(&mut self, rip: Value, kind: IndirectKind) {
        if self.single() {
            self.b.put(Loc::RIP, rip);
            return self.end_helped();
        }
        self.end(Exit::Indirect { rip, kind }, true);
    }
    /// The exit to RIP `rip_base + off`, linked unless this is a single-instruction block.
    #[must_use]
    pub fn direct_exit(&self, off: i32) -> Exit {
        match u16::try_from(off) {
            _ if self.single() => Exit::Dispatch { off },
            Ok(off) if off < 4096 => Exit::Jump { off },
            _ => Exit::JumpFar { off },
        }
    }
    /// Leaves for this same instruction when `c` (I8) is not 0, without counting it: it runs again.
    pub fn again_if(&mut self, c: Value) {
        self.b.exit_if(c, Exit::Dispatch { off: i32::from(self.off) }, false);
    }
    /// Whether blocks hold one instruction and are never chained (TF, exact stepping).
    #[must_use]
    pub fn single(&self) -> bool {
        self.flags.0 & (TbFlags::TF | TbFlags::ONE_INSN) != 0
    }
    /// RIP of the next instruction, I64.
    pub fn next_rip(&mut self) -> Value {
        let next = self.next;
        self.b.rip(next)
    }

    // ---- sizes ---------------------------------------------------------------------------------------------------------

    /// The width of RIP in this code size.
    #[must_use]
    pub fn rip_ty(&self) -> Ty {
        match self.flags.size() {
            CodeSize::Bits16 => Ty::I16,
            CodeSize::Bits32 => Ty::I32,
            CodeSize::Bits64 => Ty::I64,
        }
    }
    /// I8: whether a condition holds for the flags as they stand.
    pub fn cond(&mut self, cc: CondCode) -> Value {
        self.b.cond(cc)
    }
}

/// A general-purpose register's encoding, width, and whether it is AH … BH. Other registers read as RAX.
#[must_use]
pub fn gpr(r: Register) -> (u8, Ty, bool) {
    let n = r as u32;
    let (al, ah, spl) = (Register::AL as u32, Register::AH as u32, Register::SPL as u32);
    let (ax, eax, rax) = (Register::AX as u32, Register::EAX as u32, Register::RAX as u32);
    if (al..ah).contains(&n) {
        ((n - al) as u8, Ty::I8, false)
    } else if (ah..spl).contains(&n) {
        ((n - ah) as u8, Ty::I8, true)
    } else if (spl..ax).contains(&n) {
        ((n - spl) as u8 + 4, Ty::I8, false)
    } else if (ax..eax).contains(&n) {
        ((n - ax) as u8, Ty::I16, false)
    } else if (eax..rax).contains(&n) {
        ((n - eax) as u8, Ty::I32, false)
    } else if (rax..rax + 16).contains(&n) {
        ((n - rax) as u8, Ty::I64, false)
    } else {
        (0, Ty::I64, false)
    }
}

/// A segment register's encoding (ES 0 … GS 5).
#[must_use]
pub fn segment(r: Register) -> u8 {
    (r as u32).wrapping_sub(Register::ES as u32).min(5) as u8
}
