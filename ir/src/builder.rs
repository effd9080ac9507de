//! Builds a block op by op: one method an op, the checks that cost nothing, and the idioms every emitter needs.

use twofold_arch::{CcKind, CcOp, CondCode, Loc, TbFlags};

use crate::block::{Block, Exit, GuestInsn, SideExit};
use crate::helper::Helper;
use crate::op::{BinOp, IntCc, MemFlags, Op, RmwOp, Ty, UnOp, Value};
use crate::vecop::VecOp;

/// Appends ops to a block.
#[derive(Debug, Default)]
pub struct Builder {
    block: Block,
}

#[allow(missing_docs)] // one method an op; the ops are documented
impl Builder {
    #[must_use]
    pub fn new(flags: TbFlags) -> Self {
        Self::reusing(flags, Block::default())
    }
    /// A builder in the memory of a block that nobody needs any more.
    #[must_use]
    pub fn reusing(flags: TbFlags, spare: Block) -> Self {
        let Block { mut ops, mut exits, mut insns, .. } = spare;
        ops.clear();
        exits.clear();
        insns.clear();
        ops.reserve(128);
        insns.reserve(16);
        Self { block: Block { flags, ops, exits, insns, ..Block::default() } }
    }
    /// The block as it is, without an end.
    #[must_use]
    pub fn into_block(self) -> Block {
        self.block
    }
    /// The block so far.
    #[must_use]
    pub fn block(&self) -> &Block {
        &self.block
    }
    /// Number of ops so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.block.ops.len()
    }
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.block.ops.is_empty()
    }
    /// Starts the guest instruction at page offset `off`.
    pub fn begin_insn(&mut self, off: u16, len: u8) {
        self.block.insns.push(GuestInsn { off, page: 0, len, first: self.block.ops.len() as u16 });
    }
    /// Takes back everything since the last `begin_insn`, and that too.
    pub fn undo_insn(&mut self) {
        if let Some(i) = self.block.insns.pop() {
            self.block.ops.truncate(i.first as usize);
            let exits = self.block.ops.iter().filter(|o| matches!(o, Op::ExitIf { .. })).count();
            self.block.exits.truncate(exits);
        }
    }
    /// Guest instructions begun so far.
    #[must_use]
    pub fn insn_count(&self) -> usize {
        self.block.insns.len()
    }
    /// Ends the block. `retired` says whether the last instruction begun is complete at the terminal.
    #[must_use]
    pub fn finish(mut self, end: Exit, last_retires: bool) -> Block {
        self.block.end = Some(end);
        self.block.retired =
            (self.block.insns.len() - usize::from(!last_retires && !self.block.insns.is_empty())) as u16;
        self.block
    }
    pub fn set_crosses_page(&mut self) {
        self.block.crosses_page = true;
    }
    /// Notes that the block raises #UD for an instruction form the front end does not have.
    pub fn set_unimplemented(&mut self, form: u16) {
        self.block.unimplemented = form;
    }

    fn push(&mut self, op: Op) -> Value {
        let v = Value(self.block.ops.len() as u16);
        self.block.ops.push(op);
        v
    }
    /// The type of a value.
    #[must_use]
    pub fn ty(&self, v: Value) -> Ty {
        self.block.ty(v)
    }
    /// The constant a value is, if it is one.
    #[must_use]
    pub fn as_const(&self, v: Value) -> Option<u64> {
        match *self.block.op(v) {
            Op::Const { imm, .. } => Some(imm),
            _ => None,
        }
    }

    pub fn iconst(&mut self, ty: Ty, imm: u64) -> Value {
        self.push(Op::Const { ty, imm: imm & ty.mask() })
    }
    pub fn get(&mut self, ty: Ty, loc: Loc) -> Value {
        self.push(Op::Get { ty, loc })
    }
    pub fn put(&mut self, loc: Loc, v: Value) {
        let ty = self.ty(v);
        self.push(Op::Put { ty, loc, v });
    }
    pub fn rip(&mut self, off: i32) -> Value {
        self.push(Op::Rip { off })
    }
    pub fn bin(&mut self, op: BinOp, a: Value, b: Value) -> Value {
        let ty = self.ty(a);
        debug_assert_eq!(ty, self.ty(b));
        self.push(Op::Bin { op, ty, a, b })
    }
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.bin(BinOp::Add, a, b)
    }
    pub fn sub(&mut self, a: Value, b: Value) -> Value {
        self.bin(BinOp::Sub, a, b)
    }
    pub fn and(&mut self, a: Value, b: Value) -> Value {
        self.bin(BinOp::And, a, b)
    }
    pub fn or(&mut self, a: Value, b: Value) -> Value {
        self.bin(BinOp::Or, a, b)
    }
    pub fn xor(&mut self, a: Value, b: Value) -> Value {
        self.bin(BinOp::Xor, a, b)
    }
    /// `op` with a constant of `a`'s type.
    pub fn bin_imm(&mut self, op: BinOp, a: Value, imm: u64) -> Value {
        let ty = self.ty(a);
        let b = self.iconst(ty, imm);
        self.bin(op, a, b)
    }
    pub fn un(&mut self, op: UnOp, a: Value) -> Value {
        let ty = self.ty(a);
        self.push(Op::Un { op, ty, a })
    }
    pub fn cmp(&mut self, cc: IntCc, a: Value, b: Value) -> Value {
        let ty = self.ty(a);
        debug_assert_eq!(ty, self.ty(b));
        self.push(Op::Cmp { cc, ty, a, b })
    }
    pub fn cmp_imm(&mut self, cc: IntCc, a: Value, imm: u64) -> Value {
        let ty = self.ty(a);
        let b = self.iconst(ty, imm);
        self.cmp(cc, a, b)
    }
    pub fn select(&mut self, c: Value, a: Value, b: Value) -> Value {
        let ty = self.ty(a);
        debug_assert_eq!(ty, self.ty(b));
        self.push(Op::Select { ty, c, a, b })
    }
    /// Zero extension; the value itself when it has that type already.
    pub fn zext(&mut self, to: Ty, a: Value) -> Value {
        if self.ty(a) == to { a } else { self.push(Op::Zext { to, a }) }
    }
    /// Sign extension; the value itself when it has that type already.
    pub fn sext(&mut self, to: Ty, a: Value) -> Value {
        if self.ty(a) == to { a } else { self.push(Op::Sext { to, a }) }
    }
    /// Truncation; the value itself when it has that type already.
    pub fn trunc(&mut self, to: Ty, a: Value) -> Value {
        if self.ty(a) == to { a } else { self.push(Op::Trunc { to, a }) }
    }
    pub fn pair(&mut self, lo: Value, hi: Value) -> Value {
        self.push(Op::Pair { lo, hi })
    }
    pub fn half(&mut self, a: Value, hi: bool) -> Value {
        self.push(Op::Half { a, hi })
    }
    pub fn cond(&mut self, cc: CondCode) -> Value {
        self.push(Op::Cond { cc })
    }
    pub fn flags(&mut self) -> Value {
        self.push(Op::Flags)
    }
    pub fn load(&mut self, ty: Ty, flags: MemFlags, addr: Value) -> Value {
        self.push(Op::Load { ty, flags, addr })
    }
    pub fn store(&mut self, flags: MemFlags, addr: Value, v: Value) {
        let ty = self.ty(v);
        self.push(Op::Store { ty, flags, addr, v });
    }
    pub fn rmw(&mut self, op: RmwOp, addr: Value, v: Value) -> Value {
        let ty = self.ty(v);
        self.push(Op::Rmw { op, ty, addr, v })
    }
    pub fn cmpxchg(&mut self, addr: Value, expected: Value, new: Value) -> Value {
        let ty = self.ty(new);
        self.push(Op::CmpXchg { ty, addr, expected, new })
    }
    pub fn vec(&mut self, op: VecOp, imm: u8, args: &[Value]) -> Value {
        let at = |i: usize| args.get(i).copied().unwrap_or(Value::NONE);
        self.push(Op::Vec { op, imm, a: at(0), b: at(1), c: at(2) })
    }
    /// Calls a helper; arguments must be I64.
    pub fn call(&mut self, helper: Helper, args: &[Value]) -> Value {
        debug_assert_eq!(args.len(), helper.info().args as usize, "{helper:?}");
        debug_assert!(args.iter().all(|&a| self.ty(a) == Ty::I64), "{helper:?}");
        let at = |i: usize| args.get(i).copied().unwrap_or(Value::NONE);
        self.push(Op::Call { helper, args: [at(0), at(1), at(2), at(3)] })
    }
    /// Leaves through `exit` when `c` is not 0. `retires` says whether the current instruction counts as complete there.
    pub fn exit_if(&mut self, c: Value, exit: Exit, retires: bool) {
        let index = self.block.exits.len() as u16;
        let retired = (self.block.insns.len() - usize::from(!retires && !self.block.insns.is_empty())) as u16;
        self.block.exits.push(SideExit { exit, retired });
        self.push(Op::ExitIf { c, exit: index });
    }

    /// Sets the lazy flags. `dst` gives the width; `src` and `src2` may be narrower than I64 and are zero-extended.
    pub fn set_cc(&mut self, kind: CcKind, dst: Value, src: Option<Value>, src2: Option<Value>) {
        let op = CcOp::new(kind, self.ty(dst).log2_bytes());
        let d = self.zext(Ty::I64, dst);
        self.put(Loc::CC_DST, d);
        if let Some(s) = src {
            let s = self.zext(Ty::I64, s);
            self.put(Loc::CC_SRC, s);
        }
        if let Some(s) = src2 {
            let s = self.zext(Ty::I64, s);
            self.put(Loc::CC_SRC2, s);
        }
        let c = self.iconst(Ty::I32, u64::from(op.0));
        self.put(Loc::CC_OP, c);
    }
    /// Sets the six flags to the I64 value `flags` (RFLAGS positions).
    pub fn set_flags(&mut self, flags: Value) {
        self.put(Loc::CC_SRC, flags);
        let c = self.iconst(Ty::I32, u64::from(CcOp::FLAGS.0));
        self.put(Loc::CC_OP, c);
    }
}
