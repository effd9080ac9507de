//! Guest memory accesses of a region: the probe in line, the slow path in a cold block that writes back dirty registers first.
//!
//! Part of region lowering. The slow path is a thunk's call, which keeps every register. Stores, and loads that probe for
//! themselves, lie behind the join of both ways, once: what the slow path has loaded, or a place for what it has stored already, is
//! in the state, and the join is told where. In a block of its own on the way of a hit, a store would keep what it stores from being
//! seen by the code that follows, and Cranelift would compute that again there. A load of a window lies on the way of a hit.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{AtomicRmwOp, Block as ClifBlock, BlockArg, InstBuilder, Type, Value as Clif, types};
use twofold_arch::CodeSize;
use twofold_ir::{MemFlags, RmwOp, Ty, Value};

use super::windows::Base;
use super::{RegionLowering, Role};
use crate::abi::{AccessKind, MemInfo};
use crate::compiler::CompileError;
use crate::layout;
use crate::lower::{Shape, V, clif};
use crate::origin::Role as Part;
use crate::thunk::Thunk;

/// The two ways of an access: where the cursor is after a probe.
struct Probed {
    /// Host address, and what makes it of the linear one.
    host: Clif,
    addend: Clif,
    slow: ClifBlock,
    next: ClifBlock,
    info: MemInfo,
    /// The window that the access opens, and its addend.
    opens: Option<(usize, Clif)>,
}

impl RegionLowering<'_> {
    /// Emits the probe; the cursor is then on the way of a hit.
    fn probe(
        &mut self,
        role: Role,
        kind: AccessKind,
        ty: Ty,
        flags: MemFlags,
        addr: Clif,
        result: Option<Type>,
    ) -> Probed {
        self.part(Part::Access);
        let info = MemInfo::new(kind, ty.log2_bytes(), flags, self.l.block.flags.mem_mode());
        let (slow, hit, next) = (self.l.new_block(true), self.l.new_block(false), self.l.new_block(false));
        if let Some(t) = result {
            self.l.cur.func.dfg.append_block_param(next, t);
        }
        if let Role::Member(window) = role
            && let Some(&addend) = self.windows.get(&window)
        {
            // It is a multiple of the page size, or 0. (A test against zero would read it twice when it is spilled.)
            let none = self.l.cur.ins().icmp_imm_u(IntCC::UnsignedLessThan, addend, 2);
            self.l.cur.ins().brif(none, slow, &[], hit, &[]);
            self.l.cur.goto_bottom(hit);
            let host = self.l.cur.ins().iadd(addr, addend);
            return Probed { host, addend, slow, next, info, opens: None };
        }
        let view = layout::tlb_view(info.mode() as usize);
        // The tag is loaded next to what uses it, so that Cranelift makes it a memory operand.
        let table = self.l.load_state(types::I64, view + layout::VIEW_TABLE);
        let index = self.l.cur.ins().ushr_imm_u(addr, i64::from(layout::TLB_SHIFT));
        let mask = self.l.load_state(types::I64, view + layout::VIEW_MASK);
        let index = self.l.cur.ins().band(index, mask);
        let entry = self.l.cur.ins().iadd(table, index);
        let size = i64::from(info.checked_bytes());
        let (from, span) = match role {
            Role::First(_, from, end, _) => (self.l.cur.ins().iadd_imm_s(addr, from), end - from),
            _ => (addr, size),
        };
        let write =
            kind != AccessKind::Load || flags.has(MemFlags::WRITE_INTENT) || matches!(role, Role::First(_, _, _, true));
        let field = if write { layout::TLB_WRITE } else { layout::TLB_READ };
        let tag = self.l.cur.ins().load(types::I64, self.tlb, entry, field);
        let offset = self.l.cur.ins().isub(from, tag);
        let miss = if flags.has(MemFlags::ALIGNED) {
            self.l.cur.ins().band_imm_s(offset, -4096 | (size - 1))
        } else {
            self.l.cur.ins().icmp_imm_u(IntCC::UnsignedGreaterThan, offset, 4096 - span)
        };
        self.l.cur.ins().brif(miss, slow, &[], hit, &[]);
        self.l.cur.goto_bottom(hit);
        let addend = self.l.cur.ins().load(types::I64, self.tlb, entry, layout::TLB_ADDEND);
        let host = self.l.cur.ins().iadd(addr, addend);
        let opens = match role {
            Role::First(window, ..) => {
                self.l.cur.func.dfg.append_block_param(next, types::I64);
                Some((window, addend))
            }
            _ => None,
        };
        Probed { host, addend, slow, next, info, opens }
    }

    /// The thunk of the slow way: one that probes again where that is worth it, since only the window has been missed.
    fn slow_thunk(&self, p: &Probed, windowed: bool) -> Option<Thunk> {
        if windowed { Thunk::probe(p.info, self.l.full) } else { None }
    }

    /// Ends the way of a hit with `fast` and goes to the slow one.
    fn end_fast(&mut self, p: &Probed, fast: Option<Clif>) -> Result<(), CompileError> {
        let opens = p.opens.map(|o| o.1);
        let args: Vec<BlockArg> = fast.into_iter().chain(opens).map(BlockArg::Value).collect();
        self.l.cur.ins().jump(p.next, &args);
        self.l.cur.goto_bottom(p.slow);
        self.part(Part::Slow);
        self.write_back()
    }
    /// Ends the slow way; the cursor is then after the access.
    fn rejoin(&mut self, p: &Probed, slow: Option<Clif>) -> Option<Clif> {
        let none = p.opens.map(|_| self.l.const64(0));
        let args: Vec<BlockArg> = slow.into_iter().chain(none).map(BlockArg::Value).collect();
        self.l.cur.ins().jump(p.next, &args);
        self.l.cur.goto_bottom(p.next);
        self.part(Part::Access);
        if let (Some((window, _)), Some(&v)) = (p.opens, self.l.cur.func.dfg.block_params(p.next).last()) {
            self.windows.insert(window, v);
        }
        self.l.cur.func.dfg.block_params(p.next).first().copied()
    }

    /// Ends the slow way of a load or store; the address then is that of guest memory or, after the slow way, of `mem_result`.
    /// `cold` is the address as the slow way has it.
    fn rejoin_at(&mut self, p: &Probed, addr: Clif, cold: Clif) -> Result<Clif, CompileError> {
        let place = self.l.cur.ins().iadd_imm_s(self.l.state, layout::MEM_RESULT as i64);
        let addend = self.l.cur.ins().isub(place, cold);
        let addend = self.rejoin(p, Some(addend)).ok_or(CompileError::Malformed)?;
        Ok(self.l.cur.ins().iadd(addr, addend))
    }

    /// An address in cold code, computed there.
    fn cold_address(&mut self, addr: Value) -> Result<Clif, CompileError> {
        let (base, disp) = match self.places[addr.index()] {
            // The value that a base is named after may itself be at a distance from it.
            (Base::Value(n), at) if n != addr.0 => {
                (self.l.get(Value(n))?, at.wrapping_sub(self.places[usize::from(n)].1))
            }
            (Base::Rip, at) if self.l.block.flags.size() == CodeSize::Bits64 => {
                (self.l.load_state(types::I64, layout::RIP_BASE), at)
            }
            _ => return self.l.get(addr),
        };
        let disp = self.l.const64(disp as u64);
        self.l.call(Thunk::SUM, Shape::call(3, 1), &[base, disp]).ok_or(CompileError::Malformed)
    }

    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), CompileError> {
        let at = self.l.get(addr)?;
        let (role, vector) = (self.roles[i], ty == Ty::V128);
        let alone = role == Role::Alone;
        // Where the addend lives on, the value is what both ways bring: another copy of the addend costs an instruction.
        let joined = if vector && !alone { V } else { types::I64 };
        let p = self.probe(role, AccessKind::Load, ty, flags, at, Some(joined));
        let fast = if alone { p.addend } else { self.load_host(ty, p.host) };
        self.end_fast(&p, Some(fast))?;
        let cold = self.cold_address(addr)?;
        let slow = if let Some(thunk) = self.slow_thunk(&p, !alone) {
            let shape = Shape { vec_rets: u8::from(vector), ..Shape::call(2, 2) };
            self.l.call_results(thunk, shape, &[cold])[if vector { 2 } else { 0 }]
        } else {
            let thunk = Thunk::slow(AccessKind::Load, vector, self.l.full);
            let shape = Shape { vec_rets: u8::from(vector), ..Shape::call(3, 1) };
            let info = self.l.const64(p.info.0);
            self.l.call_results(thunk, shape, &[cold, info])[usize::from(vector)]
        };
        let v = if alone {
            self.l.store_state(slow, layout::MEM_RESULT);
            let host = self.rejoin_at(&p, at, cold)?;
            self.load_host(ty, host)
        } else {
            self.rejoin(&p, Some(slow)).ok_or(CompileError::Malformed)?
        };
        if vector {
            self.l.set(i, v);
        } else {
            self.l.set_wide(i, ty, v);
        }
        self.part(Part::Body);
        Ok(())
    }

    /// A load from host memory, zero-extended.
    fn load_host(&mut self, ty: Ty, host: Clif) -> Clif {
        let guest = self.guest;
        let ins = self.l.cur.ins();
        match ty {
            Ty::I8 => ins.uload8(types::I64, guest, host, 0),
            Ty::I16 => ins.uload16(types::I64, guest, host, 0),
            Ty::I32 => ins.uload32(guest, host, 0),
            Ty::I64 => ins.load(types::I64, guest, host, 0),
            Ty::V128 => ins.load(V, guest, host, 0),
        }
    }

    pub(super) fn store(
        &mut self,
        i: usize,
        ty: Ty,
        flags: MemFlags,
        addr: Value,
        v: Value,
    ) -> Result<(), CompileError> {
        let (at, x) = (self.l.get(addr)?, self.l.get(v)?);
        let role = self.roles[i];
        let p = self.probe(role, AccessKind::Store, ty, flags, at, Some(types::I64));
        let x = if ty == Ty::V128 { self.l.cast(x, V) } else { x };
        self.end_fast(&p, Some(p.addend))?;
        let vector = ty == Ty::V128;
        let shape = |ints: u8, rets: u8| match vector {
            true => Shape { vecs: 1, ..Shape::call(ints - 1, rets) },
            false => Shape { last: ty, ..Shape::call(ints, rets) },
        };
        let cold = self.cold_address(addr)?;
        if let Some(thunk) = self.slow_thunk(&p, role != Role::Alone) {
            self.l.call(thunk, shape(3, 3), &[cold, x]);
        } else {
            let info = self.l.const64(p.info.0);
            self.l.call(Thunk::slow(AccessKind::Store, vector, self.l.full), shape(4, 1), &[cold, info, x]);
        }
        let host = self.rejoin_at(&p, at, cold)?;
        self.l.cur.ins().store(self.guest, x, host, 0);
        self.part(Part::Body);
        Ok(())
    }

    pub(super) fn rmw(&mut self, i: usize, op: RmwOp, ty: Ty, addr: Value, v: Value) -> Result<(), CompileError> {
        let (addr, x, wide) = (self.l.get(addr)?, self.l.get(v)?, self.l.zext64(v)?);
        let kind = AccessKind::Rmw(op);
        let p = self.probe(Role::Alone, kind, ty, MemFlags::NONE, addr, Some(clif(ty)));
        let op = match op {
            RmwOp::Add => AtomicRmwOp::Add,
            RmwOp::Sub => AtomicRmwOp::Sub,
            RmwOp::And => AtomicRmwOp::And,
            RmwOp::Or => AtomicRmwOp::Or,
            RmwOp::Xor => AtomicRmwOp::Xor,
            RmwOp::Xchg => AtomicRmwOp::Xchg,
        };
        let fast = self.l.cur.ins().atomic_rmw(clif(ty), self.guest, op, p.host, x);
        self.atomic_result(i, ty, kind, &p, fast, &[addr, wide])
    }

    pub(super) fn cmpxchg(
        &mut self,
        i: usize,
        ty: Ty,
        addr: Value,
        expected: Value,
        new: Value,
    ) -> Result<(), CompileError> {
        let (addr, e, n) = (self.l.get(addr)?, self.l.get(expected)?, self.l.get(new)?);
        let (wide_e, wide_n) = (self.l.zext64(expected)?, self.l.zext64(new)?);
        let p = self.probe(Role::Alone, AccessKind::CmpXchg, ty, MemFlags::NONE, addr, Some(clif(ty)));
        let fast = self.l.cur.ins().atomic_cas(self.guest, p.host, e, n);
        self.atomic_result(i, ty, AccessKind::CmpXchg, &p, fast, &[addr, wide_e, wide_n])
    }

    fn atomic_result(
        &mut self,
        i: usize,
        ty: Ty,
        kind: AccessKind,
        p: &Probed,
        fast: Clif,
        args: &[Clif],
    ) -> Result<(), CompileError> {
        self.end_fast(p, Some(fast))?;
        let info = self.l.const64(p.info.0);
        let args = &[&args[..1], &[info], &args[1..]].concat();
        let thunk = Thunk::slow(kind, false, self.l.full);
        let shape = Shape::call(args.len() as u8 + 1, 1);
        let at = self.l.call(thunk, shape, args).ok_or(CompileError::Malformed)?;
        let slow = self.l.load_at(clif(ty), at, 0, self.l.trusted);
        let v = self.rejoin(p, Some(slow)).ok_or(CompileError::Malformed)?;
        self.l.set(i, v);
        self.part(Part::Body);
        Ok(())
    }
}
