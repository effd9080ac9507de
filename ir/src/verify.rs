//! Checks the invariants of a block: SSA, operand types, exits, the instruction table.
//!
//! Runs in tests and debug builds after the front end and after the passes; who gets a block may rely on what is
//! checked here.

use core::fmt::Write as _;

use crate::block::{Block, Exit};
use crate::op::{MemFlags, Op, Ty, UnOp, Value};

/// Checks a block.
///
/// # Errors
/// Says which op breaks which rule.
pub fn verify(block: &Block) -> Result<(), String> {
    let mut check = Check { block, at: 0, exits_used: vec![false; block.exits.len()] };
    if block.ops.len() >= Value::NONE.index() {
        return Err(format!("{} ops: values have 16-bit numbers", block.ops.len()));
    }
    for (i, op) in block.ops.iter().enumerate() {
        check.at = i;
        check.op(op).map_err(|e| format!("op {i} {op:?}: {e}"))?;
    }
    check.at = block.ops.len();
    match &block.end {
        Some(end) => check.exit(end).map_err(|e| format!("terminal: {e}"))?,
        None => return Err("no terminal".into()),
    }
    check.insns()
}

struct Check<'a> {
    block: &'a Block,
    /// Operands must be made before this op.
    at: usize,
    exits_used: Vec<bool>,
}

type Outcome = Result<(), String>;

impl Check<'_> {
    /// `v` is an earlier value of type `ty`.
    fn is(&self, v: Value, ty: Ty) -> Outcome {
        let found = self.value(v)?;
        if found == ty { Ok(()) } else { Err(format!("v{} is {found:?}, not {ty:?}", v.0)) }
    }
    fn value(&self, v: Value) -> Result<Ty, String> {
        if v.index() >= self.at {
            return Err(format!("v{} is used before it is made", v.0));
        }
        self.block.ops[v.index()].result().ok_or_else(|| format!("v{} is an op without a value", v.0))
    }
    fn int(&self, ty: Ty) -> Outcome {
        if ty == Ty::V128 { Err("not an integer type".into()) } else { Ok(()) }
    }
    /// An integer of any type.
    fn integer(&self, v: Value) -> Result<Ty, String> {
        let ty = self.value(v)?;
        self.int(ty).map(|()| ty)
    }

    fn op(&mut self, op: &Op) -> Outcome {
        match *op {
            Op::Nop | Op::Rip { .. } | Op::Cond { .. } | Op::Flags => Ok(()),
            Op::Const { ty, imm } => {
                self.int(ty)?;
                if imm & !ty.mask() == 0 { Ok(()) } else { Err("constant wider than its type".into()) }
            }
            Op::Get { ty, loc } => self.loc(ty, loc.0),
            Op::Put { ty, loc, v } => self.loc(ty, loc.0).and_then(|()| self.is(v, ty)),
            Op::Bin { ty, a, b, .. } | Op::Cmp { ty, a, b, .. } => {
                self.int(ty)?;
                self.is(a, ty)?;
                self.is(b, ty)
            }
            Op::Un { op: UnOp::Bswap, ty: Ty::I8, .. } => Err("bswap of a byte".into()),
            Op::Un { ty, a, .. } => self.int(ty).and_then(|()| self.is(a, ty)),
            Op::Select { ty, c, a, b } => {
                self.is(c, Ty::I8)?;
                self.is(a, ty)?;
                self.is(b, ty)
            }
            Op::Zext { to, a } | Op::Sext { to, a } => {
                self.int(to)?;
                let from = self.integer(a)?;
                if to.bytes() > from.bytes() { Ok(()) } else { Err(format!("extension from {from:?}")) }
            }
            Op::Trunc { to, a } => {
                let from = self.integer(a)?;
                if to.bytes() < from.bytes() { Ok(()) } else { Err(format!("truncation from {from:?}")) }
            }
            Op::Pair { lo, hi } => self.is(lo, Ty::I64).and_then(|()| self.is(hi, Ty::I64)),
            Op::Half { a, .. } => self.is(a, Ty::V128),
            Op::Load { flags, addr, .. } => self.flags(flags).and_then(|()| self.is(addr, Ty::I64)),
            Op::Store { ty, flags, addr, v } => {
                self.flags(flags)?;
                self.is(addr, Ty::I64)?;
                self.is(v, ty)
            }
            Op::Rmw { ty, addr, v, .. } => {
                self.int(ty)?;
                self.is(addr, Ty::I64)?;
                self.is(v, ty)
            }
            Op::CmpXchg { ty, addr, expected, new } => {
                self.int(ty)?;
                self.is(addr, Ty::I64)?;
                self.is(expected, ty)?;
                self.is(new, ty)
            }
            Op::Vec { op, a, b, c, .. } => {
                for (v, ty) in [a, b, c].into_iter().zip(op.sig().args) {
                    match ty {
                        Some(ty) => self.is(v, ty)?,
                        None if v == Value::NONE => {}
                        None => return Err("too many operands".into()),
                    }
                }
                Ok(())
            }
            Op::Call { helper, args } => {
                let n = helper.info().args as usize;
                for (i, v) in args.into_iter().enumerate() {
                    if i < n {
                        self.is(v, Ty::I64)?;
                    } else if v != Value::NONE {
                        return Err("too many arguments".into());
                    }
                }
                Ok(())
            }
            Op::ExitIf { c, exit } => {
                self.is(c, Ty::I8)?;
                let Some(side) = self.block.exits.get(exit as usize) else { return Err("no such exit".into()) };
                if core::mem::replace(&mut self.exits_used[exit as usize], true) {
                    return Err("another op has this exit".into());
                }
                if side.retired as usize > self.block.insns.len() {
                    return Err(format!("retires {} instructions", side.retired));
                }
                self.exit(&side.exit)
            }
        }
    }

    fn flags(&self, flags: MemFlags) -> Outcome {
        if flags.0 < 16 { Ok(()) } else { Err(format!("unknown memory flags {:#x}", flags.0)) }
    }
    fn loc(&self, ty: Ty, loc: u16) -> Outcome {
        let size = size_of::<twofold_arch::CpuState>();
        if loc as usize + ty.bytes() as usize <= size && loc >= 8 {
            Ok(())
        } else {
            Err("outside the guest state".into())
        }
    }
    fn exit(&self, exit: &Exit) -> Outcome {
        match *exit {
            Exit::Jump { off } | Exit::Raise { off, .. } if off >= 4096 => Err(format!("page offset {off:#x}")),
            Exit::Indirect { rip, .. } => self.is(rip, Ty::I64),
            _ => Ok(()),
        }
    }

    fn insns(&self) -> Outcome {
        let b = self.block;
        let mut e = String::new();
        if b.insns.is_empty() {
            e.push_str("no guest instruction");
        } else if b.insns[0].first != 0 {
            e.push_str("the first instruction does not begin at op 0");
        }
        for w in b.insns.windows(2) {
            if w[0].first > w[1].first || w[0].off >= w[1].off {
                let _ = write!(e, "instructions at {:#x} and {:#x} are out of order", w[0].off, w[1].off);
            }
        }
        if let Some(x) = b.insns.iter().find(|x| x.first as usize > b.ops.len() || x.len == 0 || x.len > 15) {
            let _ = write!(e, "instruction at {:#x}: first op {}, {} bytes", x.off, x.first, x.len);
        }
        if b.retired as usize > b.insns.len() {
            let _ = write!(e, "retires {} of {} instructions", b.retired, b.insns.len());
        }
        if e.is_empty() { Ok(()) } else { Err(e) }
    }
}
