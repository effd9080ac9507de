//! Prints a block as text; [`crate::parse`] reads it back.
//!
//! A line an op, under the guest instruction it belongs to; a value is `v` and the number of its op; places of the
//! guest state have the names of [`crate::names`]. Goldens and traces use this form.

use core::fmt::{self, Display};

use twofold_arch::{CondCode, Exception, Loc, Vector};

use crate::block::{Block, Exit, IndirectKind};
use crate::names;
use crate::op::{MemFlags, Op, Ty, Value};

/// Names of the exceptions, without `#`.
pub(crate) const VECTORS: [(Vector, &str); 19] = {
    use Vector::*;
    [
        (DivideError, "de"),
        (Debug, "db"),
        (Nmi, "nmi"),
        (Breakpoint, "bp"),
        (Overflow, "of"),
        (BoundRange, "br"),
        (InvalidOpcode, "ud"),
        (DeviceNotAvailable, "nm"),
        (DoubleFault, "df"),
        (InvalidTss, "ts"),
        (SegmentNotPresent, "np"),
        (StackFault, "ss"),
        (GeneralProtection, "gp"),
        (PageFault, "pf"),
        (X87Fault, "mf"),
        (AlignmentCheck, "ac"),
        (MachineCheck, "mc"),
        (SimdFault, "xm"),
        (Virtualization, "ve"),
    ]
};

/// Suffixes of memory ops.
pub(crate) const MEM_FLAGS: [(MemFlags, &str); 4] = [
    (MemFlags::STACK, "stack"),
    (MemFlags::WRITE_INTENT, "write"),
    (MemFlags::ALIGNED, "aligned"),
    (MemFlags::PAIR, "pair"),
];

/// An enum's name in the text form: its Rust name in lower case.
pub(crate) fn lower(x: impl fmt::Debug) -> String {
    format!("{x:?}").to_ascii_lowercase()
}

impl Display for Ty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["i8", "i16", "i32", "i64", "v128"][*self as usize])
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

struct Name(Loc);

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&names::name(self.0))
    }
}

struct Flags(MemFlags);

impl Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MEM_FLAGS.iter().filter(|x| self.0.has(x.0)).try_for_each(|x| write!(f, ".{}", x.1))
    }
}

/// A number with its sign.
struct Signed(i32);

impl Display for Signed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:#x}", if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs())
    }
}

impl Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Exit::Jump { off } => write!(f, "jump {off:#x}"),
            Exit::JumpFar { off } => write!(f, "jump_far {}", Signed(off)),
            Exit::Indirect { rip, kind } => {
                let kind = match kind {
                    IndirectKind::Jump => "jump",
                    IndirectKind::Call => "call",
                    IndirectKind::Return => "return",
                };
                write!(f, "indirect.{kind} {rip}")
            }
            Exit::Dispatch { off } => write!(f, "dispatch {}", Signed(off)),
            Exit::Helped => f.write_str("helped"),
            Exit::Raise { off, exception: Exception { vector, error, cr2 } } => {
                let name = VECTORS.iter().find(|x| x.0 == vector).map_or("?", |x| x.1);
                write!(f, "raise {off:#x} {name}")?;
                if let Some(error) = error {
                    write!(f, " error {error:#x}")?;
                }
                if cr2 != 0 {
                    write!(f, " cr2 {cr2:#x}")?;
                }
                Ok(())
            }
        }
    }
}

impl Display for Op {
    /// The op without the value it makes; a side exit by number only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Nop => f.write_str("nop"),
            Op::Const { ty, imm } => write!(f, "const.{ty} {imm:#x}"),
            Op::Get { ty, loc } => write!(f, "get.{ty} {}", Name(loc)),
            Op::Put { ty, loc, v } => write!(f, "put.{ty} {}, {v}", Name(loc)),
            Op::Rip { off } => write!(f, "rip {}", Signed(off)),
            Op::Bin { op, ty, a, b } => write!(f, "{}.{ty} {a}, {b}", lower(op)),
            Op::Un { op, ty, a } => write!(f, "{}.{ty} {a}", lower(op)),
            Op::Cmp { cc, ty, a, b } => write!(f, "cmp.{}.{ty} {a}, {b}", lower(cc)),
            Op::Select { ty, c, a, b } => write!(f, "select.{ty} {c}, {a}, {b}"),
            Op::Zext { to, a } => write!(f, "zext.{to} {a}"),
            Op::Sext { to, a } => write!(f, "sext.{to} {a}"),
            Op::Trunc { to, a } => write!(f, "trunc.{to} {a}"),
            Op::Pair { lo, hi } => write!(f, "pair {lo}, {hi}"),
            Op::Half { a, hi } => write!(f, "half.{} {a}", if hi { "hi" } else { "lo" }),
            Op::Cond { cc } => write!(f, "cond.{}", CondCode::NAMES[cc as usize]),
            Op::Flags => f.write_str("flags"),
            Op::Load { ty, flags, addr } => write!(f, "load.{ty}{} {addr}", Flags(flags)),
            Op::Store { ty, flags, addr, v } => write!(f, "store.{ty}{} {addr}, {v}", Flags(flags)),
            Op::Rmw { op, ty, addr, v } => write!(f, "rmw.{}.{ty} {addr}, {v}", lower(op)),
            Op::CmpXchg { ty, addr, expected, new } => write!(f, "cmpxchg.{ty} {addr}, {expected}, {new}"),
            Op::Vec { op, imm, a, b, c } => {
                write!(f, "vec.{} {imm:#x}", op.name())?;
                [a, b, c].iter().filter(|v| **v != Value::NONE).try_for_each(|v| write!(f, ", {v}"))
            }
            Op::Call { helper, args } => {
                write!(f, "call.{}", helper.info().name)?;
                for (i, v) in args.iter().filter(|v| **v != Value::NONE).enumerate() {
                    write!(f, "{} {v}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Op::ExitIf { c, exit } => write!(f, "exit_if.{exit} {c}"),
        }
    }
}

impl Block {
    /// Op `i` as text: the value it makes, if any, the op, and where a side exit goes.
    #[must_use]
    pub fn line(&self, i: usize) -> impl Display {
        core::fmt::from_fn(move |f| {
            let Some(op) = self.ops.get(i) else { return Ok(()) };
            if op.result().is_some() {
                write!(f, "v{i} = ")?;
            }
            write!(f, "{op}")?;
            match *op {
                Op::ExitIf { exit, .. } => match self.exits.get(exit as usize) {
                    Some(side) => write!(f, " retired {} {}", side.retired, side.exit),
                    None => Ok(()),
                },
                _ => Ok(()),
            }
        })
    }
}

impl Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let crosses = if self.crosses_page { " crosses_page" } else { "" };
        writeln!(f, "block flags {:#x} retired {}{crosses}", self.flags.0, self.retired)?;
        let mut insns = self.insns.iter().peekable();
        let mut used = vec![false; self.exits.len()];
        for (i, op) in self.ops.iter().enumerate() {
            while let Some(x) = insns.next_if(|x| x.first as usize <= i) {
                writeln!(f, "insn {:#x} len {}", x.off, x.len)?;
            }
            if let Op::ExitIf { exit, .. } = *op
                && let Some(used) = used.get_mut(exit as usize)
            {
                *used = true;
            }
            writeln!(f, "  {}", self.line(i))?;
        }
        for x in insns {
            writeln!(f, "insn {:#x} len {}", x.off, x.len)?;
        }
        // A side exit whose op was removed keeps its number.
        for (i, side) in self.exits.iter().enumerate().filter(|x| !used[x.0]) {
            writeln!(f, "unused {i} retired {} {}", side.retired, side.exit)?;
        }
        match &self.end {
            Some(end) => writeln!(f, "end {end}"),
            None => Ok(()),
        }
    }
}
