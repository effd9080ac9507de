//! The ops of the IR: their operands, types and effects.
//!
//! Integers are 8, 16, 32 or 64 bits wide and wrap; vectors are 128 bits. There is no undefined behaviour in any op: what
//! an op does for every input is written at the op. An op that can fault leaves the block with the guest state exact as of
//! the start of its guest instruction.

use twofold_arch::{CondCode, Loc};

use crate::helper::Helper;
use crate::vecop::VecOp;

/// An SSA value: the index of the op that made it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Value(pub u16);

impl Value {
    /// An absent operand.
    pub const NONE: Value = Value(u16::MAX);
    /// The value's op index.
    #[must_use]
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The type of a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Ty {
    I8,
    I16,
    I32,
    I64,
    V128,
}

impl Ty {
    /// Every type, in the order of its number.
    pub const ALL: [Ty; 5] = [Ty::I8, Ty::I16, Ty::I32, Ty::I64, Ty::V128];
    /// Width in bytes.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> u32 {
        match self {
            Ty::I8 => 1,
            Ty::I16 => 2,
            Ty::I32 => 4,
            Ty::I64 => 8,
            Ty::V128 => 16,
        }
    }
    /// Width in bits.
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u32 {
        self.bytes() * 8
    }
    /// log2 of the width in bytes.
    #[must_use]
    #[inline]
    pub const fn log2_bytes(self) -> u8 {
        self as u8
    }
    /// Mask of the bits of an integer type (all 64 for I64 and V128).
    #[must_use]
    #[inline]
    pub const fn mask(self) -> u64 {
        match self {
            Ty::I8 => 0xff,
            Ty::I16 => 0xffff,
            Ty::I32 => 0xffff_ffff,
            Ty::I64 | Ty::V128 => u64::MAX,
        }
    }
    /// The integer type of `bytes` (1, 2, 4 or 8; anything else is I64).
    #[must_use]
    pub const fn int(bytes: u32) -> Ty {
        match bytes {
            1 => Ty::I8,
            2 => Ty::I16,
            4 => Ty::I32,
            _ => Ty::I64,
        }
    }
}

/// Two-operand integer ops; both operands and the result have the op's type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum BinOp {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// Low half of a * b.
    Mul,
    /// High half of the unsigned product.
    UMulHi,
    /// High half of the signed product.
    SMulHi,
    /// a & b
    And,
    /// a | b
    Or,
    /// a ^ b
    Xor,
    /// a << (b mod bits)
    Shl,
    /// a >> (b mod bits), zero fill
    Shr,
    /// a >> (b mod bits), sign fill
    Sar,
    /// Rotate left by b mod bits.
    Rotl,
    /// Rotate right by b mod bits.
    Rotr,
    /// Unsigned a / b; 0 when b = 0.
    UDiv,
    /// Unsigned a mod b; a when b = 0.
    URem,
    /// Signed a / b toward zero; 0 when b = 0; wraps for MIN / -1.
    SDiv,
    /// Signed remainder; a when b = 0; 0 for MIN / -1.
    SRem,
}

/// One-operand integer ops; operand and result have the op's type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum UnOp {
    /// !a
    Not,
    /// -a
    Neg,
    /// Leading zero bits; the width when a = 0.
    Clz,
    /// Trailing zero bits; the width when a = 0.
    Ctz,
    /// Bits set.
    Popcnt,
    /// Bytes in reverse order (I16, I32, I64).
    Bswap,
}

/// Integer comparisons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum IntCc {
    Eq,
    Ne,
    Ult,
    Ule,
    Ugt,
    Uge,
    Slt,
    Sle,
    Sgt,
    Sge,
}

impl IntCc {
    /// Every comparison, in the order of its number.
    pub const ALL: [IntCc; 10] = {
        use IntCc::*;
        [Eq, Ne, Ult, Ule, Ugt, Uge, Slt, Sle, Sgt, Sge]
    };
    /// The comparison that holds for (b, a) when this one holds for (a, b).
    #[must_use]
    pub const fn swapped(self) -> Self {
        use IntCc::*;
        match self {
            Eq => Eq,
            Ne => Ne,
            Ult => Ugt,
            Ule => Uge,
            Ugt => Ult,
            Uge => Ule,
            Slt => Sgt,
            Sle => Sge,
            Sgt => Slt,
            Sge => Sle,
        }
    }
    /// The comparison that holds when this one does not.
    #[must_use]
    pub const fn negated(self) -> Self {
        use IntCc::*;
        match self {
            Eq => Ne,
            Ne => Eq,
            Ult => Uge,
            Ule => Ugt,
            Ugt => Ule,
            Uge => Ult,
            Slt => Sge,
            Sle => Sgt,
            Sgt => Sle,
            Sge => Slt,
        }
    }
}

impl BinOp {
    /// Every op, in the order of its number.
    pub const ALL: [BinOp; 17] = {
        use BinOp::*;
        [Add, Sub, Mul, UMulHi, SMulHi, And, Or, Xor, Shl, Shr, Sar, Rotl, Rotr, UDiv, URem, SDiv, SRem]
    };
    /// Whether the operands can be exchanged.
    #[must_use]
    pub const fn commutes(self) -> bool {
        use BinOp::*;
        matches!(self, Add | Mul | UMulHi | SMulHi | And | Or | Xor)
    }
}

impl UnOp {
    /// Every op, in the order of its number.
    pub const ALL: [UnOp; 6] = {
        use UnOp::*;
        [Not, Neg, Clz, Ctz, Popcnt, Bswap]
    };
}

/// Atomic read-modify-write ops.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum RmwOp {
    Add,
    Sub,
    And,
    Or,
    Xor,
    Xchg,
}

impl RmwOp {
    /// Every op, in the order of its number.
    pub const ALL: [RmwOp; 6] = {
        use RmwOp::*;
        [Add, Sub, And, Or, Xor, Xchg]
    };
}

/// What a memory op says beside its address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct MemFlags(pub u8);

impl MemFlags {
    /// An ordinary access.
    pub const NONE: MemFlags = MemFlags(0);
    /// Through SS: a non-canonical address raises #SS, not #GP.
    pub const STACK: MemFlags = MemFlags(1);
    /// The load is for a read-modify-write: it must fault as a write does, and the page must be writable.
    pub const WRITE_INTENT: MemFlags = MemFlags(2);
    /// An address that is not a multiple of the access size raises #GP(0) (MOVAPS and the like).
    pub const ALIGNED: MemFlags = MemFlags(4);
    /// The first half of an access of 32 bytes: it faults as the whole would (and `ALIGNED` means a multiple of 32), so that
    /// the second half, an access of its own, cannot.
    pub const PAIR: MemFlags = MemFlags(8);
    /// Whether all of `f` are set.
    #[must_use]
    #[inline]
    pub const fn has(self, f: MemFlags) -> bool {
        self.0 & f.0 == f.0
    }
    /// Size of what is checked by an access of `bytes` bytes.
    #[must_use]
    #[inline]
    pub const fn checked_bytes(self, bytes: u32) -> u32 {
        if self.has(MemFlags::PAIR) { 2 * bytes } else { bytes }
    }
    /// Both sets of flags.
    #[must_use]
    pub const fn or(self, f: MemFlags) -> MemFlags {
        MemFlags(self.0 | f.0)
    }
}

/// One op. 16 bytes; the value it makes, if any, is its index in the block.
#[derive(Clone, Copy, PartialEq, Debug)]
#[allow(missing_docs)]
pub enum Op {
    /// Nothing; passes leave it where an op was deleted, compaction removes it.
    Nop,
    /// An integer constant, zero-extended in `imm`.
    Const {
        ty: Ty,
        imm: u64,
    },
    /// Reads a field of the guest state.
    Get {
        ty: Ty,
        loc: Loc,
    },
    /// Writes a field of the guest state.
    Put {
        ty: Ty,
        loc: Loc,
        v: Value,
    },
    /// I64: `rip_base + off`, truncated to 16 or 32 bits outside 64-bit code.
    Rip {
        off: i32,
    },
    Bin {
        op: BinOp,
        ty: Ty,
        a: Value,
        b: Value,
    },
    Un {
        op: UnOp,
        ty: Ty,
        a: Value,
    },
    /// I8: 1 when the comparison of two values of type `ty` holds, else 0.
    Cmp {
        cc: IntCc,
        ty: Ty,
        a: Value,
        b: Value,
    },
    /// `a` when `c` (I8) is not 0, else `b`. Any type.
    Select {
        ty: Ty,
        c: Value,
        a: Value,
        b: Value,
    },
    /// Zero extension to a wider integer type.
    Zext {
        to: Ty,
        a: Value,
    },
    /// Sign extension to a wider integer type.
    Sext {
        to: Ty,
        a: Value,
    },
    /// The low bits of a wider integer.
    Trunc {
        to: Ty,
        a: Value,
    },
    /// V128 from two I64.
    Pair {
        lo: Value,
        hi: Value,
    },
    /// The low (`hi` false) or high I64 of a V128.
    Half {
        a: Value,
        hi: bool,
    },
    /// I8: whether a condition holds for the lazy flags as they stand here.
    Cond {
        cc: CondCode,
    },
    /// I64: the six arithmetic flags as they stand here, in RFLAGS positions.
    Flags,
    /// Reads guest memory at a linear address (I64). Can fault.
    Load {
        ty: Ty,
        flags: MemFlags,
        addr: Value,
    },
    /// Writes guest memory at a linear address (I64). Can fault.
    Store {
        ty: Ty,
        flags: MemFlags,
        addr: Value,
        v: Value,
    },
    /// Atomically replaces memory by `op(memory, v)`; the value is what memory held. Integer types. Can fault (as a write).
    Rmw {
        op: RmwOp,
        ty: Ty,
        addr: Value,
        v: Value,
    },
    /// Atomic compare and exchange; the value is what memory held. Memory is always written. Can fault (as a write).
    CmpXchg {
        ty: Ty,
        addr: Value,
        expected: Value,
        new: Value,
    },
    /// A vector op; operand and result types are `op.sig()`.
    Vec {
        op: VecOp,
        imm: u8,
        a: Value,
        b: Value,
        c: Value,
    },
    /// Calls the runtime with up to four I64 arguments; the value is I64. See [`Helper`] for effects.
    Call {
        helper: Helper,
        args: [Value; 4],
    },
    /// Leaves through side exit `exit` when `c` (I8) is not 0.
    ExitIf {
        c: Value,
        exit: u16,
    },
}

const _: () = assert!(size_of::<Op>() == 16);

impl Op {
    /// The type of the value the op makes, if it makes one.
    #[must_use]
    #[inline]
    pub fn result(&self) -> Option<Ty> {
        match *self {
            Op::Nop | Op::Put { .. } | Op::Store { .. } | Op::ExitIf { .. } => None,
            Op::Const { ty, .. }
            | Op::Get { ty, .. }
            | Op::Bin { ty, .. }
            | Op::Un { ty, .. }
            | Op::Select { ty, .. }
            | Op::Load { ty, .. }
            | Op::Rmw { ty, .. }
            | Op::CmpXchg { ty, .. } => Some(ty),
            Op::Zext { to, .. } | Op::Sext { to, .. } | Op::Trunc { to, .. } => Some(to),
            Op::Cmp { .. } | Op::Cond { .. } => Some(Ty::I8),
            Op::Rip { .. } | Op::Flags | Op::Half { .. } | Op::Call { .. } => Some(Ty::I64),
            Op::Pair { .. } => Some(Ty::V128),
            Op::Vec { op, .. } => Some(op.sig().result),
        }
    }

    /// Calls `f` with each operand.
    #[inline]
    pub fn for_each_operand(&self, mut f: impl FnMut(Value)) {
        let mut copy = *self;
        copy.map_operands(|v| {
            f(v);
            v
        });
    }

    /// Replaces each operand by `f` of it.
    #[inline]
    pub fn map_operands(&mut self, mut f: impl FnMut(Value) -> Value) {
        let mut g = |v: &mut Value| {
            if *v != Value::NONE {
                *v = f(*v);
            }
        };
        match self {
            Op::Nop | Op::Const { .. } | Op::Get { .. } | Op::Rip { .. } | Op::Cond { .. } | Op::Flags => {}
            Op::Put { v, .. } => g(v),
            Op::Bin { a, b, .. } | Op::Cmp { a, b, .. } => {
                g(a);
                g(b);
            }
            Op::Un { a, .. } | Op::Zext { a, .. } | Op::Sext { a, .. } | Op::Trunc { a, .. } | Op::Half { a, .. } => {
                g(a)
            }
            Op::Select { c, a, b, .. } => {
                g(c);
                g(a);
                g(b);
            }
            Op::Pair { lo, hi } => {
                g(lo);
                g(hi);
            }
            Op::Load { addr, .. } => g(addr),
            Op::Store { addr, v, .. } | Op::Rmw { addr, v, .. } => {
                g(addr);
                g(v);
            }
            Op::CmpXchg { addr, expected, new, .. } => {
                g(addr);
                g(expected);
                g(new);
            }
            Op::Vec { a, b, c, .. } => {
                g(a);
                g(b);
                g(c);
            }
            Op::Call { args, .. } => args.iter_mut().for_each(g),
            Op::ExitIf { c, .. } => g(c),
        }
    }

    /// Whether the op can abandon the block with a fault.
    #[must_use]
    #[inline]
    pub fn can_fault(&self) -> bool {
        match self {
            Op::Load { .. } | Op::Store { .. } | Op::Rmw { .. } | Op::CmpXchg { .. } => true,
            Op::Call { helper, .. } => helper.info().faults,
            _ => false,
        }
    }

    /// Whether the op must stay even if its value is unused.
    #[must_use]
    #[inline]
    pub fn has_effect(&self) -> bool {
        match self {
            Op::Put { .. } | Op::ExitIf { .. } => true,
            Op::Call { helper, .. } => !helper.info().pure,
            Op::Vec { op, .. } => op.sig().touches_mxcsr,
            _ => self.can_fault(),
        }
    }
}
