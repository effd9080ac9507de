//! The forward walk: rewrites a block op by op, with what is known of the guest state and of operands.
//!
//! The rules are in `known` (gets and puts), `cond` (conditions on lazy flags) and `fold` (algebra). Invariant: the new block
//! has the same effects in the same order; an op that was replaced by a value is gone, and later operands name that value.

use twofold_arch::{CcKind, CcOp, Loc};

use super::known::{Held, Known};
use super::{Options, cond, fold};
use crate::block::{Block, Exit, SideExit};
use crate::op::{BinOp, Op, Ty, Value};

/// Memory kept from block to block.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    out: Vec<Op>,
    map: Vec<Value>,
    known: Known,
    consts: [u16; CONSTS],
}

/// How many constants are remembered, to use one op for several.
const CONSTS: usize = 16;

/// The walk's state.
pub(super) struct Forward<'a> {
    /// The new ops.
    pub out: &'a mut Vec<Op>,
    known: &'a mut Known,
    consts: &'a mut [u16; CONSTS],
    fold: bool,
    /// Side exits left.
    exits: usize,
}

/// Runs the walk.
pub(super) fn run(block: &mut Block, options: &Options<'_>, scratch: &mut Scratch) {
    // One op becomes a dozen at most, and values have 16-bit numbers.
    if block.ops.len() > Block::MAX_OPS + 1000 {
        return;
    }
    let Scratch { out, map, known, consts } = scratch;
    consts.fill(0);
    out.clear();
    map.clear();
    known.clear();
    map.reserve(block.ops.len());
    let mut f = Forward { out, known, consts, fold: options.fold, exits: 0 };
    let mut insns = block.insns.iter_mut();
    let mut insn = insns.next();
    for (i, &op) in block.ops.iter().enumerate() {
        while let Some(next) = insn.take_if(|x| x.first as usize <= i) {
            next.first = f.out.len() as u16;
            insn = insns.next();
        }
        // The commonest first, each with nothing done that it does not need.
        let v = match op {
            Op::Const { ty, imm } => f.iconst(ty, imm),
            Op::Get { ty, loc } if options.get_put => f.get(ty, loc),
            Op::Put { ty, loc, v } if options.get_put => f.put(ty, loc, map[v.index()]),
            Op::ExitIf { c, exit } => {
                if let Some(Exit::Indirect { rip, .. }) = block.exits.get_mut(exit as usize).map(|e| &mut e.exit) {
                    *rip = map[rip.index()];
                }
                f.op(Op::ExitIf { c: map[c.index()], exit }, options)
            }
            mut op => {
                op.map_operands(|v| map[v.index()]);
                f.op(op, options)
            }
        };
        map.push(v);
    }
    for insn in insn.into_iter().chain(insns) {
        insn.first = f.out.len() as u16;
    }
    if let Some(Exit::Indirect { rip, .. }) = &mut block.end {
        *rip = map[rip.index()];
    }
    if f.exits != block.exits.len() {
        drop_unused_exits(out, &mut block.exits);
    }
    std::mem::swap(&mut block.ops, out);
}

/// Renumbers the side exits that are left.
fn drop_unused_exits(ops: &mut [Op], exits: &mut Vec<SideExit>) {
    let mut kept = Vec::with_capacity(exits.len());
    for op in ops {
        if let Op::ExitIf { exit, .. } = op {
            let side = exits[*exit as usize];
            *exit = kept.len() as u16;
            kept.push(side);
        }
    }
    *exits = kept;
}

impl Forward<'_> {
    /// Rewrites one op; the value it makes now.
    fn op(&mut self, op: Op, options: &Options<'_>) -> Value {
        match op {
            Op::Nop => Value::NONE,
            Op::Rip { .. } | Op::Load { .. } | Op::Store { .. } => self.push(op),
            Op::Cond { cc } if options.conds => {
                self.cc_op().and_then(|op| cond::value(self, cc, op)).unwrap_or_else(|| self.push(op))
            }
            Op::Flags if options.conds && self.cc_op().is_some_and(|op| op.kind() == CcKind::Flags) => {
                let src = self.get(Ty::I64, Loc::CC_SRC);
                self.bin_imm(BinOp::And, Ty::I64, src, twofold_arch::control::rflags::ARITH)
            }
            Op::Flags if options.conds && self.logic_constant().is_some() => {
                let flags = self.logic_constant().unwrap_or(0);
                self.iconst(Ty::I64, flags)
            }
            Op::Flags if options.images => match self.cc_op() {
                Some(kind) => cond::image(self, kind),
                None => self.push(op),
            },
            Op::Call { helper, .. } => {
                let v = self.push(op);
                if helper.info().quiet {
                    Loc::X87.into_iter().for_each(|range| self.known.forget(range));
                } else if !helper.info().pure {
                    self.known.clear();
                }
                v
            }
            Op::ExitIf { c, .. } if self.fold && self.constant(c) == Some(0) => Value::NONE,
            Op::ExitIf { .. } => {
                self.exits += 1;
                self.emit(op)
            }
            _ => self.emit(op),
        }
    }

    /// Appends an op as it is.
    pub fn push(&mut self, op: Op) -> Value {
        self.out.push(op);
        Value(self.out.len() as u16 - 1)
    }
    /// Appends an op, or finds a simpler one or a value there is already.
    pub fn emit(&mut self, op: Op) -> Value {
        if !self.fold {
            return self.push(op);
        }
        let mut op = op;
        // Each step makes the op simpler; the bound is for safety only.
        for _ in 0..8 {
            match fold::step(self.out, &op) {
                fold::Step::Same => break,
                fold::Step::Op(simpler) => op = simpler,
                fold::Step::Value(v) => return v,
                fold::Step::WithConst { ty, imm, op: with } => {
                    op = with;
                    if let Op::Bin { b, .. } | Op::Cmp { b, .. } = &mut op {
                        *b = self.iconst(ty, imm);
                    }
                }
            }
        }
        match op {
            Op::Const { ty, imm } => self.iconst(ty, imm),
            _ => self.push(op),
        }
    }
    pub fn iconst(&mut self, ty: Ty, imm: u64) -> Value {
        let op = Op::Const { ty, imm: imm & ty.mask() };
        if !self.fold {
            return self.push(op);
        }
        let place = (imm as usize ^ imm as usize >> 4 ^ (ty as usize) << 2) % CONSTS;
        let seen = Value(self.consts[place]);
        if self.out.get(seen.index()) == Some(&op) {
            return seen;
        }
        let v = self.push(op);
        self.consts[place] = v.0;
        v
    }
    pub fn bin(&mut self, op: BinOp, ty: Ty, a: Value, b: Value) -> Value {
        self.emit(Op::Bin { op, ty, a, b })
    }
    pub fn bin_imm(&mut self, op: BinOp, ty: Ty, a: Value, imm: u64) -> Value {
        let b = self.iconst(ty, imm);
        self.bin(op, ty, a, b)
    }
    /// The low bits of a value of the same type or a wider one.
    pub fn trunc(&mut self, to: Ty, a: Value) -> Value {
        if self.ty(a) == to { a } else { self.emit(Op::Trunc { to, a }) }
    }
    pub fn ty(&self, v: Value) -> Ty {
        self.out[v.index()].result().unwrap_or(Ty::I64)
    }
    pub fn constant(&self, v: Value) -> Option<u64> {
        match self.out.get(v.index()) {
            Some(&Op::Const { imm, .. }) => Some(imm),
            _ => None,
        }
    }

    /// Reads a field: by a value that is known to be there, if there is one.
    pub fn get(&mut self, ty: Ty, loc: Loc) -> Value {
        if let Some(Held { v, ty: held, off }) = self.known.find(ty, loc) {
            if held == ty {
                return v;
            }
            let (v, held) = match held {
                Ty::V128 => (self.emit(Op::Half { a: v, hi: off >= 8 }), Ty::I64),
                _ => (v, held),
            };
            let shift = u64::from(off % 8) * 8;
            let v = if shift == 0 { v } else { self.bin_imm(BinOp::Shr, held, v, shift) };
            return self.trunc(ty, v);
        }
        let v = self.push(Op::Get { ty, loc });
        self.known.learn(ty, loc, v);
        v
    }

    /// Writes a field, unless it is known to hold the value already.
    fn put(&mut self, ty: Ty, loc: Loc, v: Value) -> Value {
        if !self.holds(ty, loc, v) {
            self.push(Op::Put { ty, loc, v });
            self.known.set(ty, loc, v);
        }
        Value::NONE
    }

    /// Whether `v` was got from a field that has been put since.
    pub fn is_overwritten(&self, v: Value) -> bool {
        match self.out[v.index()] {
            Op::Get { ty, loc } => self.known.find(ty, loc).is_none_or(|h| h.v != v),
            Op::Trunc { a, .. } => matches!(self.out[a.index()], Op::Get { .. }) && self.is_overwritten(a),
            _ => false,
        }
    }

    /// Whether the field is known to hold `v` already.
    fn holds(&self, ty: Ty, loc: Loc, v: Value) -> bool {
        self.known.find(ty, loc).is_some_and(|h| {
            h.ty == ty && h.off == 0 && (h.v == v || self.constant(v).is_some_and(|c| self.constant(h.v) == Some(c)))
        })
    }

    /// All flags, after a logic operation whose result is known: `xor eax, eax` before a chain of ADCX and ADOX.
    fn logic_constant(&self) -> Option<u64> {
        let op = self.cc_op().filter(|op| op.kind() == CcKind::Logic)?;
        let held = self.known.find(Ty::I64, Loc::CC_DST).filter(|h| h.off == 0 && h.ty == Ty::I64)?;
        self.constant(held.v).map(|dst| twofold_arch::flags::arith_flags(op, dst, 0, 0))
    }

    /// The lazy flags' kind, if it is known.
    fn cc_op(&self) -> Option<CcOp> {
        let held = self.known.find(Ty::I32, Loc::CC_OP).filter(|h| h.off == 0)?;
        self.constant(held.v).map(|c| CcOp(c as u8))
    }
}
