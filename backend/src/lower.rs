//! IR to CLIF: one function a block, one file an op family.
//!
//! Place in the pipeline: called by `compiler` for a block that the passes have simplified. The function's one parameter is
//! the state; the terminal is a tail call, of a thunk or of a direct exit (a slot). Guest memory is accessed by a call, and a
//! side exit is a trap; `assemble` puts the real thing in the place of both. So nearly every block is one basic block, which
//! is what keeps compilation quick. Guest state is written through at each `Put`; values live in registers between. What is called in between
//! (thunks) keeps every register, see `thunks`.
//!
//! Invariants: the source location of an instruction is the index of its guest instruction; that is where return
//! addresses get theirs from. No Cranelift op is used that can trap.

mod exit;
mod int;
mod mem;
mod region;
mod vec;
mod wide;

pub(crate) use exit::raise_word;
pub(crate) use region::{LoweredRegion, lower_region};

use std::collections::HashMap;

use cranelift_codegen::cursor::{Cursor, FuncCursor};
use cranelift_codegen::ir::immediates::{Imm64, Offset32};
use cranelift_codegen::ir::{
    AbiParam, Endianness, ExtFuncData, ExternalName, FuncRef, Function, InstBuilder, MemFlags, MemFlagsData, Opcode,
    Signature, SourceLoc, Type, UserExternalName, Value as Clif, types,
};
use cranelift_codegen::isa::CallConv;
use twofold_arch::CodeSize;
use twofold_arch::fpu::X87Op;
use twofold_ir::{Block, Helper, Op, SideExit, Ty, Value};

use crate::abi::MemInfo;
use crate::compiler::CompileError;
use crate::layout;
use crate::native::Native;
use crate::thunk::Thunk;

/// Name space of external functions that are thunks; the index is the thunk's.
pub(crate) const NAME_THUNK: u32 = 0;
/// Name space of external functions that are direct exits; the index counts them.
pub(crate) const NAME_SLOT: u32 = 1;
/// Name space of external functions that are guest memory accesses; the index counts them.
pub(crate) const NAME_PROBE: u32 = 2;
/// Name space of external functions that are ops of the host; the index is [`crate::native::Native`]'s.
pub(crate) const NAME_NATIVE: u32 = 3;

/// A source location is the index of the guest instruction and, above this bit, for the trap that stands for a side exit,
/// the number of that exit in [`Lowered::exits`] plus 1.
pub(crate) const EXIT_SHIFT: u32 = 16;
/// Traps have a code of one byte; further side exits are blocks.
pub(crate) const MAX_TRAPS: usize = 200;

/// The CLIF type of every vector value; ops cast to what they need.
const V: Type = types::I8X16;

/// What one block's lowering leaves beside the function.
#[derive(Debug, Default)]
pub(crate) struct Lowered {
    /// Page offset of each direct exit's target, in the order of their external indexes.
    pub slots: Vec<u16>,
    /// Guest memory accesses, in the order of their external indexes.
    pub probes: Vec<MemInfo>,
    /// Side exits that are traps in the code: what to do there is for `assemble` to write.
    pub exits: Vec<SideExit>,
    /// Called thunks must keep vector registers.
    pub full: bool,
    /// There are branches or constants in the code whose places are not known, so that nothing in it may move.
    pub fixed: bool,
}

/// Buffers kept from block to block.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    values: Vec<Option<Clif>>,
    wide: Vec<Option<Clif>>,
    functions: Vec<((u32, u32, Shape), FuncRef)>,
}

/// Parameter and result lists of the thunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shape {
    /// Ends the function (`Tail`), or is called and keeps every register (`PreserveAll`).
    tail: bool,
    /// I64 parameters, the state included; none without it.
    ints: u8,
    /// Type of the last of them instead, if it may have anything in its upper bits.
    last: Ty,
    /// V128 parameters.
    vecs: u8,
    /// I64 results: RAX, RDX, RCX; those that mean nothing are registers the callee may change.
    rets: u8,
    /// V128 results.
    vec_rets: u8,
}

impl Shape {
    const fn tail(ints: u8) -> Self {
        Self { tail: true, ints, last: Ty::I64, vecs: 0, rets: 1, vec_rets: 0 }
    }
    const fn call(ints: u8, rets: u8) -> Self {
        Self { tail: false, ints, last: Ty::I64, vecs: 0, rets, vec_rets: 0 }
    }
}

struct Lowering<'a> {
    cur: FuncCursor<'a>,
    block: &'a Block,
    buf: &'a mut Buffers,
    out: &'a mut Lowered,
    state: Clif,
    /// The block has vector values, so called thunks must keep vector registers.
    full: bool,
    /// Flags of accesses to the state, and of accesses to guest memory.
    trusted: MemFlags,
    guest: MemFlags,
    signatures: Vec<(Shape, cranelift_codegen::ir::SigRef)>,
    /// What of the block is computed together, and what of it has been.
    fused: HashMap<usize, wide::Fused>,
    done: Vec<usize>,
}

/// Fills `func` (cleared) with the block's CLIF.
pub(crate) fn lower(func: &mut Function, block: &Block, buf: &mut Buffers) -> Result<Lowered, CompileError> {
    let mut out = Lowered::default();
    let end = block.end.ok_or(CompileError::Malformed)?;
    func.signature = signature(Shape::tail(1));
    let entry = func.dfg.make_block();
    func.layout.append_block(entry);
    let state = func.dfg.append_block_param(entry, types::I64);
    let trusted = func.dfg.mem_flags.insert_unchecked(MemFlagsData::trusted());
    let guest = func.dfg.mem_flags.insert_unchecked(MemFlagsData::new().with_notrap());
    buf.values.clear();
    buf.values.resize(block.ops.len(), None);
    buf.wide.clear();
    buf.wide.resize(block.ops.len(), None);
    buf.functions.clear();
    let full = block.ops.iter().any(|op| op.result() == Some(Ty::V128));
    out.full = full;
    let mut cur = FuncCursor::new(func);
    cur.goto_bottom(entry);
    cur.set_srcloc(SourceLoc::new(0));
    let mut l = Lowering {
        cur,
        block,
        buf,
        out: &mut out,
        state,
        full,
        trusted,
        guest,
        signatures: Vec::new(),
        fused: HashMap::new(),
        done: Vec::new(),
    };
    l.plan();
    let mut next_insn = 0;
    for (i, op) in block.ops.iter().enumerate() {
        while block.insns.get(next_insn).is_some_and(|insn| insn.first as usize <= i) {
            l.cur.set_srcloc(SourceLoc::new(next_insn as u32));
            next_insn += 1;
        }
        if !l.fuse(i)? {
            l.op(i, op)?;
        }
    }
    // Instructions without ops of their own, like a jump: the exit is theirs.
    if next_insn < block.insns.len() {
        l.cur.set_srcloc(SourceLoc::new(block.insns.len() as u32 - 1));
    }
    l.exit(&end, block.retired)?;
    Ok(out)
}

fn signature(shape: Shape) -> Signature {
    let mut s = Signature::new(if shape.tail { CallConv::Tail } else { CallConv::PreserveAll });
    s.params.extend((1..shape.ints).map(|_| AbiParam::new(types::I64)));
    s.params.extend((shape.ints != 0).then(|| AbiParam::new(clif(shape.last))));
    s.params.extend((0..shape.vecs).map(|_| AbiParam::new(V)));
    s.returns.extend((0..shape.rets).map(|_| AbiParam::new(types::I64)));
    s.returns.extend((0..shape.vec_rets).map(|_| AbiParam::new(V)));
    s
}

/// The CLIF type of an IR type.
fn clif(ty: Ty) -> Type {
    match ty {
        Ty::I8 => types::I8,
        Ty::I16 => types::I16,
        Ty::I32 => types::I32,
        Ty::I64 => types::I64,
        Ty::V128 => V,
    }
}

impl Lowering<'_> {
    // ---- values -----------------------------------------------------------------------------------------------------

    fn get(&self, v: Value) -> Result<Clif, CompileError> {
        self.buf.values.get(v.index()).copied().flatten().ok_or(CompileError::Malformed)
    }
    fn constant(&self, v: Value) -> Option<u64> {
        match self.block.ops.get(v.index()) {
            Some(&Op::Const { imm, .. }) => Some(imm),
            _ => None,
        }
    }
    fn set(&mut self, index: usize, v: Clif) {
        self.buf.values[index] = Some(v);
    }
    /// Sets an integer value of type `ty` from its zero-extended 64 bits.
    fn set_wide(&mut self, index: usize, ty: Ty, v: Clif) {
        if ty == Ty::I64 {
            return self.set(index, v);
        }
        let narrow = self.cur.ins().ireduce(clif(ty), v);
        self.set(index, narrow);
        self.buf.wide[index] = Some(v);
    }
    /// An integer value zero-extended to I64.
    fn zext64(&mut self, v: Value) -> Result<Clif, CompileError> {
        let x = self.get(v)?;
        if let Some(w) = self.buf.wide[v.index()] {
            return Ok(w);
        }
        if self.cur.func.dfg.value_type(x) == types::I64 {
            return Ok(x);
        }
        let w = match *self.block.op(v) {
            // The extension of a constant would be a load of it from memory.
            Op::Const { imm, .. } => self.const64(imm),
            _ => self.cur.ins().uextend(types::I64, x),
        };
        self.buf.wide[v.index()] = Some(w);
        Ok(w)
    }
    fn iconst(&mut self, ty: Type, imm: i64) -> Clif {
        // Immediates are kept masked to the type, as the verifier wants them.
        let mask = if ty.bits() >= 64 { -1 } else { (1i64 << ty.bits()) - 1 };
        let imm = Imm64::new(imm & mask);
        let (inst, dfg) = self.cur.ins().UnaryImm(Opcode::Iconst, ty, imm);
        dfg.first_result(inst)
    }
    fn const64(&mut self, imm: u64) -> Clif {
        self.iconst(types::I64, imm as i64)
    }

    // ---- state ------------------------------------------------------------------------------------------------------

    fn load_at(&mut self, ty: Type, base: Clif, offset: i32, flags: MemFlags) -> Clif {
        let (inst, dfg) = self.cur.ins().Load(Opcode::Load, ty, flags, Offset32::new(offset), base);
        dfg.first_result(inst)
    }
    fn store_at(&mut self, v: Clif, base: Clif, offset: i32, flags: MemFlags) {
        let ty = self.cur.func.dfg.value_type(v);
        self.cur.ins().Store(Opcode::Store, ty, flags, Offset32::new(offset), v, base);
    }
    /// Vector fields may be read and written at 8-byte alignment.
    fn load_state(&mut self, ty: Type, offset: usize) -> Clif {
        let flags = if ty == V { self.guest } else { self.trusted };
        self.load_at(ty, self.state, offset as i32, flags)
    }
    fn store_state(&mut self, v: Clif, offset: usize) {
        let flags = if self.cur.func.dfg.value_type(v) == V { self.guest } else { self.trusted };
        self.store_at(v, self.state, offset as i32, flags);
    }

    // ---- blocks and calls -------------------------------------------------------------------------------------------

    /// A new block at the end of the layout; the cursor stays.
    fn new_block(&mut self, cold: bool) -> cranelift_codegen::ir::Block {
        self.out.fixed = true;
        let b = self.cur.func.dfg.make_block();
        self.cur.func.layout.append_block(b);
        if cold {
            self.cur.func.layout.set_cold(b);
        }
        b
    }
    fn function(&mut self, space: u32, index: u32, shape: Shape) -> FuncRef {
        if let Some(&(_, f)) = self.buf.functions.iter().find(|(key, _)| *key == (space, index, shape)) {
            return f;
        }
        let signature = match self.signatures.iter().find(|(s, _)| *s == shape) {
            Some(&(_, s)) => s,
            None => {
                let s = self.cur.func.import_signature(signature(shape));
                self.signatures.push((shape, s));
                s
            }
        };
        let name = self.cur.func.declare_imported_user_function(UserExternalName { namespace: space, index });
        let data = ExtFuncData { name: ExternalName::user(name), signature, colocated: true, patchable: false };
        let f = self.cur.func.import_function(data);
        self.buf.functions.push(((space, index, shape), f));
        f
    }
    /// Calls a thunk; the state is the first argument.
    fn call_results(&mut self, thunk: Thunk, shape: Shape, args: &[Clif]) -> &[Clif] {
        self.call_named(NAME_THUNK, thunk.index() as u32, shape, args)
    }
    fn call_named(&mut self, space: u32, index: u32, shape: Shape, args: &[Clif]) -> &[Clif] {
        let f = self.function(space, index, shape);
        let mut all = [self.state; 6];
        all[1..=args.len()].copy_from_slice(args);
        let inst = self.cur.ins().call(f, &all[usize::from(shape.ints == 0)..=args.len()]);
        self.cur.func.dfg.inst_results(inst)
    }
    /// The same, for a thunk with one result or whose first is wanted.
    fn call(&mut self, thunk: Thunk, shape: Shape, args: &[Clif]) -> Option<Clif> {
        self.call_results(thunk, shape, args).first().copied()
    }
    /// Ends the block by going to a thunk; the state is the first argument.
    fn tail(&mut self, thunk: Thunk, args: &[Clif]) {
        let f = self.function(NAME_THUNK, thunk.index() as u32, Shape::tail(args.len() as u8 + 1));
        let mut all = [self.state; 5];
        all[1..=args.len()].copy_from_slice(args);
        self.cur.ins().return_call(f, &all[..=args.len()]);
    }

    // ---- ops --------------------------------------------------------------------------------------------------------

    fn op(&mut self, i: usize, op: &Op) -> Result<(), CompileError> {
        match *op {
            Op::Nop => {}
            Op::Const { ty, imm } => {
                let v = self.iconst(clif(ty), imm as i64);
                self.set(i, v);
            }
            Op::Get { ty, loc } => {
                let v = self.load_state(clif(ty), loc.0 as usize);
                self.set(i, v);
            }
            Op::Put { loc, v, .. } => {
                let v = self.get(v)?;
                self.store_state(v, loc.0 as usize);
            }
            Op::Rip { off } => {
                let v = self.rip(i64::from(off));
                self.set(i, v);
            }
            Op::Bin { op, ty, a, b } => self.bin(i, op, ty, a, b)?,
            Op::Un { op, ty, a } => self.un(i, op, ty, a)?,
            Op::Cmp { cc, a, b, .. } => self.cmp(i, cc, a, b)?,
            Op::Select { ty, c, a, b } => self.select(i, ty, c, a, b)?,
            Op::Zext { to, a } => self.zext(i, to, a)?,
            Op::Sext { to, a } => {
                let a = self.get(a)?;
                let v = self.cur.ins().sextend(clif(to), a);
                self.set(i, v);
            }
            Op::Trunc { to, a } => {
                let a = self.get(a)?;
                let v = self.cur.ins().ireduce(clif(to), a);
                self.set(i, v);
            }
            Op::Pair { lo, hi } => self.pair(i, lo, hi)?,
            Op::Half { a, hi } => self.half(i, a, hi)?,
            Op::Cond { cc } => {
                let cc = self.const64(cc as u64);
                if let Some(v) = self.call(Thunk::cond(self.full), Shape::call(2, 1), &[cc]) {
                    self.set_wide(i, Ty::I8, v);
                }
            }
            Op::Flags => {
                if let Some(v) = self.call(Thunk::flags(self.full), Shape::call(1, 1), &[]) {
                    self.set(i, v);
                }
            }
            Op::Load { ty, flags, addr } => self.load(i, ty, flags, addr)?,
            Op::Store { ty, flags, addr, v } => self.store(ty, flags, addr, v)?,
            Op::Rmw { op, ty, addr, v } => self.rmw(i, op, ty, addr, v)?,
            Op::CmpXchg { ty, addr, expected, new } => self.cmpxchg(i, ty, addr, expected, new)?,
            Op::Vec { op, imm, a, b, c } => self.vec(i, op, imm, [a, b, c])?,
            Op::Call { helper: Helper::X87Ready, .. } => {
                self.call(Thunk::x87_ready(self.full), Shape::call(1, 1), &[]);
            }
            Op::Call { helper: Helper::X87Do, args }
                if let Op::Const { imm, .. } = *self.block.op(args[0])
                    && let Some(native) = Native::x87(X87Op(imm as u16)) =>
            {
                let (lo, hi) = (self.get(args[1])?, self.get(args[2])?);
                let v = self.call_named(NAME_NATIVE, native.0, Shape::call(3, 1), &[lo, hi])[0];
                self.set(i, v);
            }
            Op::Call { helper, args } if let Some(native) = Native::helper(helper, self.constant(args[2])) => {
                let (a, b) = (self.get(args[0])?, self.get(args[1])?);
                let v = if helper == Helper::DivideWide {
                    let d = self.get(args[2])?;
                    self.call_named(NAME_NATIVE, native.0, Shape::call(4, 2), &[a, b, d])[0]
                } else {
                    self.call_named(NAME_NATIVE, native.0, Shape::call(3, 1), &[a, b])[0]
                };
                self.set(i, v);
            }
            Op::Call { helper, args } => {
                let n = args.iter().take_while(|&&a| a != Value::NONE).count();
                let mut values = [self.const64((layout::FN_HELPERS + helper as usize * 8) as u64); 5];
                for (to, &a) in values[1..].iter_mut().zip(&args[..n]) {
                    *to = self.get(a)?;
                }
                let shape = Shape::call(n as u8 + 2, 1);
                if let Some(v) = self.call(Thunk::helper(self.full), shape, &values[..=n]) {
                    self.set(i, v);
                }
            }
            Op::ExitIf { c, exit } => {
                let side = *self.block.exits.get(exit as usize).ok_or(CompileError::Malformed)?;
                let c = self.get(c)?;
                self.side_exit(c, side)?;
            }
        }
        Ok(())
    }

    /// `rip_base + off`, truncated to the code size.
    fn rip(&mut self, off: i64) -> Clif {
        let base = self.load_state(types::I64, layout::RIP_BASE);
        let v = self.cur.ins().iadd_imm_s(base, off);
        match self.block.flags.size() {
            CodeSize::Bits64 => v,
            CodeSize::Bits32 => {
                let low = self.cur.ins().ireduce(types::I32, v);
                self.cur.ins().uextend(types::I64, low)
            }
            CodeSize::Bits16 => self.cur.ins().band_imm_u(v, 0xffff),
        }
    }

    /// A vector value as another vector type.
    fn cast(&mut self, v: Clif, ty: Type) -> Clif {
        if self.cur.func.dfg.value_type(v) == ty {
            return v;
        }
        self.cur.ins().bitcast(ty, MemFlagsData::new().with_endianness(Endianness::Little), v)
    }
}
