//! The quick tier's own emitter: a block from IR to host code in one walk over its ops.
//!
//! Place in the pipeline: `compiler` asks it first. What it has no code for it refuses, and the block goes through Cranelift, whose
//! code is hardly better where there is one basic block, and takes ten times as long to make.
//!
//! - *Places* (`places`): a value is in a register, in a field of the state that still holds it, in a spill slot, or several of these.
//!   Constants and reads of the state are nowhere until an op needs them. Guest state is written at each `Put`, so giving up a
//!   register that has been put costs nothing.
//! - *Folding*: an op that is used once, by an op whose instruction can do it too, is computed there: a comparison by the jump
//!   or the conditional move, a distance and a scale in an address.
//! - *Registers*: RAX, RCX, RDX, RSI, R8, R9 and XMM0 to XMM2 hold nothing from one op to the next: operands of calls, of instructions
//!   with fixed registers and of the host's own ops ([`crate::native`]) go there. RBP and RDI are the state.
//! - The entry, memory accesses, ways out and slow paths are `emit`'s.

mod int;
mod mem;
mod places;
mod vec;
pub(crate) mod x64;

use std::panic::{AssertUnwindSafe, catch_unwind};

use twofold_arch::CodeSize;
use twofold_arch::fpu::X87Op;
use twofold_ir::{BinOp, Block, Exit, Helper, Op, Ty, Value};

use crate::compiler::CompiledTb;
use crate::emit::{Buffers, Emitter, JMP, Place};
use crate::layout;
use crate::native::Native;
use crate::origin::Role;
use crate::thunk::Thunk;
use places::{Info, Places};
use x64::{Alu, Mem, RAX, RBP, RCX, RDX, RSI, Rm};

/// Emits blocks; keeps its memory from one to the next.
#[derive(Debug, Default)]
pub struct DirectEmitter {
    places: Places,
    buffers: Buffers,
    annotate: bool,
}

impl DirectEmitter {
    /// From now on, whether to note what guest instruction each piece of host code is from ([`CompiledTb::pieces`]).
    pub fn annotate(&mut self, wanted: bool) {
        self.annotate = wanted;
    }

    /// Emits a block; with `counter` its code adds one to that entry of the table at `CpuState::exec_counts` each time. `None` when
    /// there is something in it that only Cranelift has code for.
    pub fn emit(&mut self, block: &Block, counter: Option<u32>) -> Option<CompiledTb> {
        // As with Cranelift: whatever is wrong with a block is no reason to end the machine. The next one begins anew.
        let tb = catch_unwind(AssertUnwindSafe(|| emit(block, counter, self))).ok()?.ok()?;
        tb.fits().then_some(tb)
    }

    /// Takes back the memory of a block that nobody needs any more: the next one is written there.
    pub fn recycle(&mut self, tb: CompiledTb) {
        self.buffers.recycle(tb);
    }
}

/// Why a block is left to Cranelift.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refused {
    /// An op that this host has no instruction for.
    Op,
    /// More values at once than there are places.
    Places,
    /// Not a block.
    Malformed,
}

struct Direct<'a> {
    e: Emitter<'a>,
    block: &'a Block,
    p: &'a mut Places,
    /// The op that is being emitted.
    now: usize,
    /// Its guest instruction.
    insn: u16,
}

fn emit(block: &Block, counter: Option<u32>, emitter: &mut DirectEmitter) -> Result<CompiledTb, Refused> {
    let DirectEmitter { places, buffers, annotate } = emitter;
    let end = block.end.ok_or(Refused::Malformed)?;
    let full = block.ops.iter().any(|op| op.result() == Some(Ty::V128));
    places.start(block, &end);
    fold(block, &mut places.info);
    let e = Emitter::new(block, full, *annotate, buffers);
    let mut d = Direct { e, block, p: places, now: 0, insn: 0 };
    let entry = d.e.entry(false, 0, counter);
    let mut insns = block.insns.iter().enumerate().peekable();
    for (i, op) in block.ops.iter().enumerate() {
        while let Some((n, _)) = insns.next_if(|(_, insn)| insn.first as usize <= i) {
            d.insn = n as u16;
        }
        if d.p.info[i].folded {
            continue;
        }
        d.now = i;
        d.p.begin(i);
        d.e.mark(Role::Body, d.insn);
        d.op(i, op)?;
        d.finish_op(i, op);
    }
    // Instructions without ops of their own, like a jump: the exit is theirs.
    if let Some((n, _)) = insns.last() {
        d.insn = n as u16;
    }
    d.now = block.ops.len();
    d.p.begin(d.now);
    d.e.mark(Role::Exit, d.insn);
    d.end(&end)?;
    Ok(d.e.finish(entry, buffers))
}

/// Finds the ops that are computed where they are used.
fn fold(block: &Block, info: &mut [Info]) {
    for (i, op) in block.ops.iter().enumerate() {
        if info[i].uses != 1 {
            continue;
        }
        let user = info[i].last;
        let Some(by) = block.ops.get(usize::from(user)) else { continue };
        let me = Value(i as u16);
        let constant = |v: Value| matches!(block.op(v), Op::Const { .. });
        let (a, b) = match *op {
            Op::Cmp { a, b, .. } => match *by {
                Op::ExitIf { .. } => (a, b),
                Op::Select { c, .. } if c == me => (a, b),
                _ => continue,
            },
            Op::Bin { op: BinOp::Add, ty: Ty::I64, a, b } if distance(block, b).is_some() => match *by {
                Op::Load { addr, .. } | Op::Store { addr, .. } if addr == me => (a, b),
                _ => continue,
            },
            Op::Bin { op: BinOp::Shl, ty: Ty::I64, a, b } if scale(block, b).is_some() => match *by {
                Op::Bin { op: BinOp::Add, a: x, b: y, .. } => {
                    let other = if x == me { y } else { x };
                    if constant(other) || info[other.index()].folded {
                        continue;
                    }
                    (a, b)
                }
                _ => continue,
            },
            _ => continue,
        };
        info[i].folded = true;
        for v in [a, b] {
            let last = &mut info[v.index()].last;
            *last = (*last).max(user);
        }
    }
}

/// A constant that can be added in an address.
fn distance(block: &Block, v: Value) -> Option<i32> {
    match *block.op(v) {
        Op::Const { imm, .. } => i32::try_from(imm as i64).ok().filter(|d| d.unsigned_abs() < 1 << 30),
        _ => None,
    }
}

/// The number of a shift that an address can do.
fn scale(block: &Block, v: Value) -> Option<u8> {
    match *block.op(v) {
        Op::Const { imm: imm @ 1..=3, .. } => Some(imm as u8),
        _ => None,
    }
}

/// Field of the state at an offset.
fn state(offset: usize) -> Mem {
    Mem::at(RBP, offset as i32)
}

impl Direct<'_> {
    fn out(&mut self) -> &mut Vec<u8> {
        &mut self.e.out
    }
    fn ty(&self, v: Value) -> Ty {
        self.block.ops.get(v.index()).and_then(Op::result).unwrap_or(Ty::I64)
    }

    fn op(&mut self, i: usize, op: &Op) -> Result<(), Refused> {
        match *op {
            Op::Nop | Op::Const { .. } => {}
            Op::Get { loc, .. } => self.p.at_home(i, loc.0),
            Op::Put { ty, loc, v } => self.put(ty, loc.0, v)?,
            Op::Rip { off } => self.rip(i, off)?,
            Op::Bin { op, ty, a, b } => self.bin(i, op, ty, a, b)?,
            Op::Un { op, ty, a } => self.un(i, op, ty, a)?,
            Op::Cmp { cc, ty, a, b } => {
                let cc = self.compare(cc, ty, a, b)?;
                let r = self.fresh()?;
                x64::set(self.out(), cc, r);
                self.set(i, r, true);
            }
            Op::Select { ty, c, a, b } => self.select(i, ty, c, a, b)?,
            Op::Zext { a, .. } => {
                let (r, clean) = self.copy(a)?;
                if !clean {
                    let from = self.ty(a);
                    x64::load(self.out(), from, r, Rm::R(r));
                }
                self.set(i, r, true);
            }
            Op::Sext { to, a } => {
                let from = self.ty(a);
                let rm = self.exact(a)?;
                let r = self.over(a)?;
                x64::load_signed(self.out(), from, to, r, rm);
                self.set(i, r, to.bits() >= 32);
            }
            Op::Trunc { a, .. } => {
                let (r, _) = self.copy(a)?;
                self.set(i, r, false);
            }
            Op::Pair { lo, hi } => self.pair(i, lo, hi)?,
            Op::Half { a, hi } => self.half(i, a, hi)?,
            Op::Cond { cc } => {
                x64::mov_imm(self.out(), RSI, cc as u64);
                self.call(Thunk::cond(self.e.full));
                self.take_rax(i)?;
            }
            Op::Flags => {
                self.call(Thunk::flags(self.e.full));
                self.take_rax(i)?;
            }
            Op::Load { ty, flags, addr } => self.load(i, ty, flags, addr)?,
            Op::Store { ty, flags, addr, v } => self.store(ty, flags, addr, v)?,
            Op::Rmw { op, ty, addr, v } => self.rmw(i, op, ty, addr, v)?,
            Op::CmpXchg { ty, addr, expected, new } => self.cmpxchg(i, ty, addr, expected, new)?,
            Op::Vec { op, imm, a, b, c } => self.vector(i, op, imm, [a, b, c])?,
            Op::Call { helper, args } => self.helper(i, helper, args)?,
            Op::ExitIf { c, exit } => {
                let side = *self.block.exits.get(usize::from(exit)).ok_or(Refused::Malformed)?;
                if let Exit::Indirect { rip, .. } = side.exit {
                    self.arg(RSI, rip)?;
                }
                let cc = self.truth(c)?;
                let place = self.e.exit_place(side, self.insn);
                self.e.jump(0x80 | cc, place);
            }
        }
        Ok(())
    }

    /// Gives free what op `i` was the last to use.
    fn finish_op(&mut self, i: usize, op: &Op) {
        let (p, block) = (&mut *self.p, self.block);
        if let Some(rip) = indirect(block, op) {
            p.release(rip);
        }
        op.for_each_operand(|v| {
            if p.info[v.index()].folded {
                block.op(v).for_each_operand(|w| p.release(w));
            }
            p.release(v);
        });
        if p.info[i].uses == 0 {
            p.forget(i);
        }
    }

    fn put(&mut self, ty: Ty, loc: u16, v: Value) -> Result<(), Refused> {
        let to = state(loc.into());
        if let Op::Const { imm, .. } = *self.block.op(v) {
            self.overwritten(loc, ty)?;
            if let Some(imm) = immediate(ty, imm) {
                x64::store_imm(self.out(), ty, to, imm);
            } else {
                x64::mov_imm(self.out(), RAX, imm);
                x64::store(self.out(), ty, to, RAX);
            }
            return Ok(());
        }
        let r = self.reg(v)?;
        self.overwritten(loc, ty)?;
        if ty == Ty::V128 {
            x64::store_vec(self.out(), to, r);
        } else {
            x64::store(self.out(), ty, to, r);
        }
        self.p.put_home(v, loc);
        Ok(())
    }

    /// `rip_base + off`, truncated to the code size.
    fn rip(&mut self, i: usize, off: i32) -> Result<(), Refused> {
        let r = self.fresh()?;
        let size = self.block.flags.size();
        let ty = if size == CodeSize::Bits64 { Ty::I64 } else { Ty::I32 };
        let out = self.out();
        x64::load(out, Ty::I64, r, state(layout::RIP_BASE).into());
        if off != 0 || ty == Ty::I32 {
            x64::lea(out, ty, r, Mem::at(r, off));
        }
        if size == CodeSize::Bits16 {
            x64::load(out, Ty::I16, r, Rm::R(r));
        }
        self.set(i, r, true);
        Ok(())
    }

    /// Sets the host's flags by `c`; the condition that holds when it is not 0.
    fn truth(&mut self, c: Value) -> Result<u8, Refused> {
        if self.p.info[c.index()].folded
            && let Op::Cmp { cc, ty, a, b } = *self.block.op(c)
        {
            return self.compare(cc, ty, a, b);
        }
        let r = self.reg(c)?;
        x64::test(self.out(), Ty::I8, r, r);
        Ok(5)
    }

    fn call(&mut self, thunk: Thunk) {
        self.e.call_thunk(thunk, self.insn);
    }

    /// RAX is the value of op `i`.
    fn take_rax(&mut self, i: usize) -> Result<(), Refused> {
        if self.p.info[i].uses != 0 {
            let r = self.fresh()?;
            x64::mov(self.out(), r, RAX);
            self.set(i, r, true);
        }
        Ok(())
    }

    fn helper(&mut self, i: usize, helper: Helper, args: [Value; 4]) -> Result<(), Refused> {
        let constant = |v: Value| match self.block.ops.get(v.index()) {
            Some(&Op::Const { imm, .. }) => Some(imm),
            _ => None,
        };
        let native = match helper {
            Helper::X87Do => constant(args[0]).and_then(|op| Native::x87(X87Op(op as u16))),
            _ => Native::helper(helper, constant(args[2])),
        };
        if !helper.info().pure {
            self.forget_homes()?;
        }
        if helper == Helper::X87Ready {
            self.call(Thunk::x87_ready(self.e.full));
            return Ok(());
        }
        if let Some(native) = native {
            let skip = usize::from(helper == Helper::X87Do);
            self.arg(RSI, args[skip])?;
            self.arg(RDX, args[skip + 1])?;
            if helper == Helper::DivideWide {
                self.arg(RCX, args[2])?;
            }
            let code = native.bytes();
            self.e.emit(&code);
            return self.take_rax(i);
        }
        for (to, v) in [RDX, RCX, x64::R8, x64::R8 + 1].into_iter().zip(args) {
            if v != Value::NONE {
                self.arg(to, v)?;
            }
        }
        x64::mov_imm(self.out(), RSI, (layout::FN_HELPERS + helper as usize * 8) as u64);
        self.call(Thunk::helper(self.e.full));
        self.take_rax(i)
    }

    /// The terminal.
    fn end(&mut self, end: &Exit) -> Result<(), Refused> {
        let size = self.block.flags.size();
        match *end {
            Exit::Jump { .. } => {
                let slot = self.e.new_slot(*end);
                self.e.jump(JMP, slot);
            }
            Exit::JumpFar { off } => {
                x64::mov_imm(self.out(), RSI, i64::from(off) as u64);
                self.e.jump_out(Place::Thunk(Thunk::far(size)), false);
            }
            Exit::Indirect { rip, .. } => {
                self.arg(RSI, rip)?;
                self.e.jump_out(Place::Thunk(Thunk::INDIRECT), false);
            }
            Exit::Dispatch { .. } | Exit::Helped | Exit::Raise { .. } => self.e.exit(end, size),
        }
        Ok(())
    }
}

/// The target of a side exit that is a value.
fn indirect(block: &Block, op: &Op) -> Option<Value> {
    match op {
        Op::ExitIf { exit, .. } => match block.exits.get(usize::from(*exit))?.exit {
            Exit::Indirect { rip, .. } => Some(rip),
            _ => None,
        },
        _ => None,
    }
}

/// A constant as the immediate of an instruction of this width.
fn immediate(ty: Ty, imm: u64) -> Option<i32> {
    match ty {
        Ty::I8 => Some(i32::from(imm as i8)),
        Ty::I16 => Some(i32::from(imm as i16)),
        Ty::I32 => Some(imm as i32),
        _ => i32::try_from(imm as i64).ok(),
    }
}

/// The instruction for an op that has one of the common encodings.
fn alu_of(op: BinOp) -> Option<Alu> {
    match op {
        BinOp::Add => Some(Alu::Add),
        BinOp::Sub => Some(Alu::Sub),
        BinOp::And => Some(Alu::And),
        BinOp::Or => Some(Alu::Or),
        BinOp::Xor => Some(Alu::Xor),
        _ => None,
    }
}
