//! Where values are: registers, fields of the state, spill slots; and what an op asks of them.
//!
//! Invariants: a value that is used later is in at least one place, unless it is a constant. A field counts as a value's home while
//! nothing has been written to it; whoever writes says so first ([`Direct::overwritten`]). A register that the op at hand uses is
//! pinned: making room never takes it.

use twofold_ir::{Block, Exit, Op, Ty, Value};

use super::x64::{self, Mem, R10, R11, R12, R13, R14, R15, RBX, RSP, Rm};
use super::{Direct, Refused, immediate, state};
use crate::thunk::SPILLS;

/// What is known of a value.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// By how many operands it is used.
    pub uses: u16,
    /// The last op that uses it; the number of ops if that is the terminal.
    pub last: u16,
    /// Its register, vectors' from [`XMM`] on.
    reg: u8,
    /// Its spill slot.
    spill: u8,
    /// Offset of a field of the state that holds it.
    home: u16,
    /// Its register has zeroes above it.
    pub clean: bool,
    /// It is computed by the op that uses it.
    pub folded: bool,
}

const NONE: u8 = u8::MAX;
const NOWHERE: u16 = u16::MAX;
/// Number of XMM0 among all registers.
const XMM: u8 = 16;
/// What values may live in.
const GPRS: [u8; 7] = [RBX, R10, R11, R14, R15, R12, R13];
const XMMS: [u8; 13] = [19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31];

impl Info {
    const NEW: Info = Info { uses: 0, last: 0, reg: NONE, spill: NONE, home: NOWHERE, clean: false, folded: false };
}

/// Where everything is.
#[derive(Debug, Default)]
pub struct Places {
    pub info: Vec<Info>,
    /// The value in each register.
    owner: [Option<u16>; 32],
    /// Registers that the op at hand needs.
    pinned: u32,
    /// Spill slots in use.
    spilled: u64,
    /// Values that have a home; also some that are not needed any more.
    homed: Vec<u16>,
    now: usize,
}

impl Places {
    /// Begins a block: counts who uses what.
    pub fn start(&mut self, block: &Block, end: &Exit) {
        self.info.clear();
        self.info.resize(block.ops.len(), Info::NEW);
        (self.owner, self.pinned, self.spilled) = ([None; 32], 0, 0);
        self.homed.clear();
        let info = &mut self.info;
        let mut used = |v: Value, by: usize| {
            if let Some(x) = info.get_mut(v.index()) {
                (x.uses, x.last) = (x.uses + 1, by as u16);
            }
        };
        for (i, op) in block.ops.iter().enumerate() {
            op.for_each_operand(|v| used(v, i));
            super::indirect(block, op).into_iter().for_each(|rip| used(rip, i));
        }
        if let Exit::Indirect { rip, .. } = *end {
            used(rip, block.ops.len());
        }
    }
    /// Begins op `i`.
    pub fn begin(&mut self, i: usize) {
        (self.now, self.pinned) = (i, 0);
    }
    fn dying(&self, v: Value) -> bool {
        usize::from(self.info[v.index()].last) <= self.now
    }
    /// Op `i` reads a field: nothing to do until it is used.
    pub fn at_home(&mut self, i: usize, loc: u16) {
        self.info[i].home = loc;
        self.homed.push(i as u16);
    }
    /// A value has been written to a field.
    pub fn put_home(&mut self, v: Value, loc: u16) {
        let x = &mut self.info[v.index()];
        if usize::from(x.last) > self.now && x.home == NOWHERE {
            x.home = loc;
            self.homed.push(v.0);
        }
    }
    /// The op at hand was perhaps the last to use `v`.
    pub fn release(&mut self, v: Value) {
        if self.dying(v) {
            self.forget(v.index());
        }
    }
    /// A value is not needed any more.
    pub fn forget(&mut self, i: usize) {
        let x = &mut self.info[i];
        if x.reg != NONE {
            self.owner[usize::from(x.reg)] = None;
        }
        if x.spill != NONE {
            self.spilled &= !(3 << x.spill);
        }
        (x.reg, x.spill, x.home) = (NONE, NONE, NOWHERE);
    }
}

/// The register of vectors' registers' numbers as instructions have it.
fn number(reg: u8) -> u8 {
    reg & 15
}

/// Slots are pairs of eight bytes above the return address of the block.
fn slot(n: u8) -> Mem {
    Mem::at(RSP, 8 + 8 * i32::from(n))
}

impl Direct<'_> {
    /// A free register, pinned.
    fn make_room(&mut self, vector: bool) -> Result<u8, Refused> {
        let all: &[u8] = if vector { &XMMS } else { &GPRS };
        let free = |p: &super::Places, r: u8| p.owner[usize::from(r)].is_none() && p.pinned >> r & 1 == 0;
        let r = match all.iter().copied().find(|&r| free(self.p, r)) {
            Some(r) => r,
            None => self.evict(all)?,
        };
        self.p.pinned |= 1 << r;
        Ok(r)
    }

    /// Takes a register away from the value that is needed last, preferring one that is elsewhere too.
    fn evict(&mut self, all: &[u8]) -> Result<u8, Refused> {
        let mut best: Option<((bool, u16), u8, u16)> = None;
        for &r in all {
            let Some(v) = self.p.owner[usize::from(r)].filter(|_| self.p.pinned >> r & 1 == 0) else { continue };
            let x = &self.p.info[usize::from(v)];
            let constant = matches!(self.block.ops[usize::from(v)], Op::Const { .. });
            let key = (constant || x.home != NOWHERE || x.spill != NONE, x.last);
            if best.is_none_or(|b| key > b.0) {
                best = Some((key, r, v));
            }
        }
        let ((elsewhere, _), r, v) = best.ok_or(Refused::Places)?;
        if !elsewhere {
            let n = (0..SPILLS as u8).step_by(2).find(|n| self.p.spilled >> n & 3 == 0).ok_or(Refused::Places)?;
            self.p.spilled |= 3 << n;
            self.p.info[usize::from(v)].spill = n;
            if r >= XMM {
                x64::store_vec(self.out(), slot(n), number(r));
            } else {
                x64::store(self.out(), Ty::I64, slot(n), r);
            }
        }
        self.p.owner[usize::from(r)] = None;
        self.p.info[usize::from(v)].reg = NONE;
        Ok(r)
    }

    /// Register `r` (a vector's by its own number) is the value of op `i`.
    pub(super) fn set(&mut self, i: usize, r: u8, clean: bool) {
        let x = &mut self.p.info[i];
        (x.reg, x.clean) = (r, clean);
        self.p.owner[usize::from(r)] = Some(i as u16);
    }
    pub(super) fn set_vec(&mut self, i: usize, xmm: u8) {
        self.set(i, xmm + XMM, true);
    }

    /// A register for the result of the op at hand.
    pub(super) fn fresh(&mut self) -> Result<u8, Refused> {
        self.make_room(false)
    }
    pub(super) fn fresh_vec(&mut self) -> Result<u8, Refused> {
        self.make_room(true).map(number)
    }

    /// Fills register `r` with a value that is in none. Whether there are zeroes above it.
    fn fill(&mut self, r: u8, v: Value) -> Result<bool, Refused> {
        let (x, ty) = (self.p.info[v.index()], self.ty(v));
        let vector = ty == Ty::V128;
        if let Op::Const { imm, .. } = *self.block.op(v) {
            x64::mov_imm(self.out(), r, imm);
            Ok(true)
        } else if x.spill != NONE {
            if vector {
                x64::load_vec(self.out(), number(r), slot(x.spill).into());
            } else {
                x64::load(self.out(), Ty::I64, r, slot(x.spill).into());
            }
            Ok(x.clean)
        } else if x.home != NOWHERE {
            let from = state(x.home.into()).into();
            if vector {
                x64::load_vec(self.out(), number(r), from);
            } else {
                x64::load(self.out(), ty, r, from);
            }
            Ok(true)
        } else {
            Err(Refused::Malformed)
        }
    }

    /// The register that a value is in, pinned; vectors' by their own numbers.
    pub(super) fn reg(&mut self, v: Value) -> Result<u8, Refused> {
        let r = self.p.info.get(v.index()).ok_or(Refused::Malformed)?.reg;
        if r != NONE {
            self.p.pinned |= 1 << r;
            return Ok(number(r));
        }
        let r = self.make_room(self.ty(v) == Ty::V128)?;
        let clean = self.fill(r, v)?;
        self.set(v.index(), r, clean);
        Ok(number(r))
    }

    /// A value in register `to`, one that holds nothing from op to op; vectors' by their own numbers.
    pub(super) fn arg(&mut self, to: u8, v: Value) -> Result<(), Refused> {
        let vector = self.ty(v) == Ty::V128;
        match self.p.info.get(v.index()).ok_or(Refused::Malformed)?.reg {
            NONE => {
                self.fill(if vector { to + XMM } else { to }, v)?;
            }
            r if vector => x64::load_vec(self.out(), to, Rm::R(number(r))),
            r => x64::mov(self.out(), to, r),
        }
        Ok(())
    }
    /// The same, with zeroes above it.
    pub(super) fn arg_zext(&mut self, to: u8, v: Value) -> Result<(), Refused> {
        self.arg(to, v)?;
        let ty = self.ty(v);
        if ty != Ty::I64 && !self.is_clean(v) {
            x64::load(self.out(), ty, to, Rm::R(to));
        }
        Ok(())
    }
    /// The same, with its sign above it, in 32 bits or more.
    pub(super) fn arg_sext(&mut self, to: u8, v: Value, wide: Ty) -> Result<(), Refused> {
        self.arg(to, v)?;
        let ty = self.ty(v);
        if ty != Ty::I64 {
            x64::load_signed(self.out(), ty, wide, to, Rm::R(to));
        }
        Ok(())
    }

    /// Whether reading the value, from wherever it is, gives zeroes above it.
    pub(super) fn is_clean(&self, v: Value) -> bool {
        let x = &self.p.info[v.index()];
        (x.reg == NONE && x.spill == NONE) || x.clean
    }

    /// The register of a value that nobody needs after the op at hand, for the result to go to; or a new one. It holds the value only
    /// if that was in it. Whatever else the op reads must have its registers by now.
    pub(super) fn over(&mut self, v: Value) -> Result<u8, Refused> {
        let r = self.p.info[v.index()].reg;
        if r == NONE || !self.p.dying(v) {
            return self.make_room(self.ty(v) == Ty::V128).map(number);
        }
        self.p.pinned |= 1 << r;
        self.p.owner[usize::from(r)] = None;
        self.p.info[v.index()].reg = NONE;
        Ok(number(r))
    }
    /// A register with the value in it, which the op at hand may change, and whether there are zeroes above it. Whatever else the
    /// op reads must have its registers by now.
    pub(super) fn copy(&mut self, v: Value) -> Result<(u8, bool), Refused> {
        let x = self.p.info[v.index()];
        let vector = self.ty(v) == Ty::V128;
        if x.reg == NONE {
            let r = self.make_room(vector)?;
            let clean = self.fill(r, v)?;
            return Ok((number(r), clean));
        }
        let r = self.over(v)?;
        if vector {
            x64::load_vec(self.out(), r, Rm::R(number(x.reg)));
        } else {
            x64::mov(self.out(), r, x.reg);
        }
        Ok((r, x.clean))
    }
    /// Whether [`Direct::copy`] would be free.
    pub(super) fn dies_in_register(&self, v: Value) -> bool {
        self.p.info[v.index()].reg != NONE && self.p.dying(v)
    }

    /// The value as the operand of an instruction of exactly its width: its register, or memory if this is its last use.
    pub(super) fn exact(&mut self, v: Value) -> Result<Rm, Refused> {
        let x = self.p.info.get(v.index()).ok_or(Refused::Malformed)?;
        if x.reg == NONE && self.p.dying(v) {
            if x.spill != NONE {
                return Ok(Rm::M(slot(x.spill)));
            } else if x.home != NOWHERE {
                return Ok(Rm::M(state(x.home.into())));
            }
        }
        self.reg(v).map(Rm::R)
    }
    /// The constant, if it can be an immediate.
    pub(super) fn imm(&self, ty: Ty, v: Value) -> Option<i32> {
        match *self.block.op(v) {
            Op::Const { imm, .. } => immediate(ty, imm),
            _ => None,
        }
    }
    /// Where in the state a vector lies that is in no register.
    pub(super) fn home_of(&self, v: Value) -> Option<u16> {
        let x = self.p.info.get(v.index())?;
        (x.reg == NONE && x.home != NOWHERE).then_some(x.home)
    }

    /// A field is about to be written: what still is to be read from it moves to a register.
    pub(super) fn overwritten(&mut self, loc: u16, ty: Ty) -> Result<(), Refused> {
        let mut n = 0;
        while n < self.p.homed.len() {
            let v = Value(self.p.homed[n]);
            let (home, bytes) = (self.p.info[v.index()].home, self.ty(v).bytes() as u16);
            if home == NOWHERE {
                self.p.homed.swap_remove(n);
            } else if home < loc + ty.bytes() as u16 && loc < home + bytes {
                self.move_out(v)?;
                self.p.homed.swap_remove(n);
            } else {
                n += 1;
            }
        }
        Ok(())
    }
    /// Any field may be about to be written.
    pub(super) fn forget_homes(&mut self) -> Result<(), Refused> {
        while let Some(v) = self.p.homed.pop() {
            self.move_out(Value(v))?;
        }
        Ok(())
    }
    fn move_out(&mut self, v: Value) -> Result<(), Refused> {
        let x = self.p.info[v.index()];
        let needed = usize::from(x.last) > self.now || x.uses != 0 && usize::from(x.last) == self.now;
        if needed && x.reg == NONE && x.spill == NONE && x.home != NOWHERE {
            self.reg(v)?;
        }
        self.p.info[v.index()].home = NOWHERE;
        Ok(())
    }
}
