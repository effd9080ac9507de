//! A translation block in IR: ops, side exits, terminal, and which guest instruction each op belongs to.

use twofold_arch::{Exception, TbFlags};

use crate::op::{Op, Ty, Value};

/// What kind of indirect transfer a terminal is; return prediction uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs)]
pub enum IndirectKind {
    Jump,
    Call,
    Return,
}

/// How control leaves a block. All page offsets are of the linear page the block starts in; RIP is `rip_base + off`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Exit {
    /// A direct transfer inside the page (`off` < 4096): a patchable slot.
    Jump {
        /// Page offset of the target.
        off: u16,
    },
    /// A direct transfer to another page: a jump-cache probe with a constant index.
    JumpFar {
        /// Target RIP minus `rip_base`.
        off: i32,
    },
    /// An indirect transfer to the RIP in a value (I64, already truncated to the operand size): a jump-cache probe.
    Indirect {
        /// The target RIP.
        rip: Value,
        /// Jump, call or return.
        kind: IndirectKind,
    },
    /// To the dispatcher, with `state.rip` set to `rip_base + off`: something changed that the key or the event state
    /// depends on.
    Dispatch {
        /// Next RIP minus `rip_base`.
        off: i32,
    },
    /// To the dispatcher; a helper has set `state.rip`.
    Helped,
    /// Raise an exception at the instruction at page offset `off` (a fault: RIP is the instruction's own).
    Raise {
        /// Page offset of the faulting instruction.
        off: u16,
        /// The exception.
        exception: Exception,
    },
}

/// A side exit: where it goes, and how many guest instructions of the block are complete when it is taken.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SideExit {
    /// Where it goes.
    pub exit: Exit,
    /// Guest instructions retired.
    pub retired: u16,
}

/// A guest instruction of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestInsn {
    /// Page offset of its first byte.
    pub off: u16,
    /// Its page, in bytes from the page that `rip_base` stands for: not 0 in regions only.
    pub page: i32,
    /// Length in bytes, 1..=15.
    pub len: u8,
    /// Index of its first op; it owns the ops up to the next instruction's first.
    pub first: u16,
}

impl GuestInsn {
    /// Its RIP minus `rip_base`.
    #[must_use]
    pub fn place(&self) -> i32 {
        self.page.wrapping_add(i32::from(self.off))
    }
}

/// A translation block.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Block {
    /// The key bits it was translated under.
    pub flags: TbFlags,
    /// The ops; a value is an index into this.
    pub ops: Vec<Op>,
    /// Side exits, which `ExitIf` names by index.
    pub exits: Vec<SideExit>,
    /// The terminal.
    pub end: Option<Exit>,
    /// The guest instructions, in order. A block that only raises an exception at its start may have one that never retires.
    pub insns: Vec<GuestInsn>,
    /// How many of `insns` are retired when the terminal is reached.
    pub retired: u16,
    /// The (only) instruction lies in two pages.
    pub crosses_page: bool,
    /// An instruction form that the front end does not have (its own number for it), for a one-time note; 0: none. The block
    /// raises #UD there.
    pub unimplemented: u16,
}

impl Block {
    /// Upper bound of ops in a block; the front end ends a block before it.
    pub const MAX_OPS: usize = 4000;

    /// The op that made `v`.
    #[must_use]
    pub fn op(&self, v: Value) -> &Op {
        &self.ops[v.index()]
    }
    /// The type of `v`.
    ///
    /// # Panics
    /// When `v` is not a value; the verifier rules that out.
    #[must_use]
    pub fn ty(&self, v: Value) -> Ty {
        self.op(v).result().expect("operand is not a value")
    }
    /// The index in `insns` of the guest instruction that op `index` belongs to.
    #[must_use]
    pub fn insn_of(&self, index: usize) -> usize {
        self.insns.partition_point(|i| i.first as usize <= index).saturating_sub(1)
    }
    /// Page offset of the first instruction.
    #[must_use]
    pub fn start(&self) -> u16 {
        self.insns.first().map_or(0, |i| i.off)
    }
    /// Where the first instruction is: its RIP minus `rip_base`.
    #[must_use]
    pub fn place(&self) -> i32 {
        self.insns.first().map_or(0, GuestInsn::place)
    }
    /// Number of guest bytes the block was made from.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.insns.last().map_or(0, |i| i.off as usize + i.len as usize) - self.start() as usize
    }
}
