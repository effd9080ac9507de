//! Guest memory accesses of a region: the probe in line, the slow path in a cold block that writes back dirty registers first.
//!
//! Part of region lowering. The slow path is a thunk's call, which keeps every register. Loads and stores themselves lie
//! behind the join of both ways, once: what the slow path has loaded, or a place for what it has stored already, is in the
//! state, and the join is told where. In a block of its own on the way of a hit, a store would keep what it stores from being seen by
//! the code that follows, and Cranelift would compute that again there.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{AtomicRmwOp, Block as ClifBlock, BlockArg, InstBuilder, Type, Value as Clif, types};
use twofold_ir::{MemFlags, RmwOp, Ty, Value};

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
            self.l.cur.ins().brif(addend, hit, &[], slow, &[]);
            self.l.cur.goto_bottom(hit);
            let host = self.l.cur.ins().iadd(addr, addend);
            return Probed { host, addend, slow, next, info, opens: None };
        }
        let view = layout::tlb_view(info.mode() as usize);
        let mask = self.l.load_state(types::I64, view + layout::VIEW_MASK);
        let table = self.l.load_state(types::I64, view + layout::VIEW_TABLE);
        let index = self.l.cur.ins().ushr_imm_u(addr, i64::from(layout::TLB_SHIFT));
        let index = self.l.cur.ins().band(index, mask);
        let entry = self.l.cur.ins().iadd(table, index);
        let last = i64::from(info.checked_bytes()) - 1;
        let aligned = flags.has(MemFlags::ALIGNED);
        let (from, last) = match role {
            Role::First(_, from, end, _) => (self.l.cur.ins().iadd_imm_s(addr, from), end - 1),
            _ => (addr, last),
        };
        let page = if aligned || last == 0 { addr } else { self.l.cur.ins().iadd_imm_s(addr, last) };
        let page = self.l.cur.ins().band_imm_s(page, -4096 | if aligned { last } else { 0 });
        let write =
            kind != AccessKind::Load || flags.has(MemFlags::WRITE_INTENT) || matches!(role, Role::First(_, _, _, true));
        let field = if write { layout::TLB_WRITE } else { layout::TLB_READ };
        let tag = self.l.cur.ins().load(types::I64, self.tlb, entry, field);
        let miss = if let Role::First(..) = role {
            // Both ends.
            let start = self.l.cur.ins().band_imm_s(from, -4096);
            let (x, y) = (self.l.cur.ins().bxor(start, tag), self.l.cur.ins().bxor(page, tag));
            self.l.cur.ins().bor(x, y)
        } else {
            self.l.cur.ins().icmp(IntCC::NotEqual, page, tag)
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
    fn end_fast(&mut self, p: &Probed, fast: Option<Clif>) {
        let opens = p.opens.map(|o| o.1);
        let args: Vec<BlockArg> = fast.into_iter().chain(opens).map(BlockArg::Value).collect();
        self.l.cur.ins().jump(p.next, &args);
        self.l.cur.goto_bottom(p.slow);
        self.part(Part::Slow);
        self.write_back();
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
    fn rejoin_at(&mut self, p: &Probed, addr: Clif) -> Result<Clif, CompileError> {
        let place = self.l.cur.ins().iadd_imm_s(self.l.state, layout::MEM_RESULT as i64);
        let addend = self.l.cur.ins().isub(place, addr);
        let addend = self.rejoin(p, Some(addend)).ok_or(CompileError::Malformed)?;
        Ok(self.l.cur.ins().iadd(addr, addend))
    }

    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), CompileError> {
        let addr = self.l.get(addr)?;
        let role = self.roles[i];
        let p = self.probe(role, AccessKind::Load, ty, flags, addr, Some(types::I64));
        self.end_fast(&p, Some(p.addend));
        let vector = ty == Ty::V128;
        let slow = if let Some(thunk) = self.slow_thunk(&p, role != Role::Alone) {
            let shape = Shape { vec_rets: u8::from(vector), ..Shape::call(2, 2) };
            self.l.call_results(thunk, shape, &[addr])[if vector { 2 } else { 0 }]
        } else {
            let thunk = Thunk::slow(AccessKind::Load, vector, self.l.full);
            let shape = Shape { vec_rets: u8::from(vector), ..Shape::call(3, 1) };
            let info = self.l.const64(p.info.0);
            self.l.call_results(thunk, shape, &[addr, info])[usize::from(vector)]
        };
        self.l.store_state(slow, layout::MEM_RESULT);
        let host = self.rejoin_at(&p, addr)?;
        let guest = self.guest;
        let ins = self.l.cur.ins();
        let v = match ty {
            Ty::I8 => ins.uload8(types::I64, guest, host, 0),
            Ty::I16 => ins.uload16(types::I64, guest, host, 0),
            Ty::I32 => ins.uload32(guest, host, 0),
            Ty::I64 => ins.load(types::I64, guest, host, 0),
            Ty::V128 => ins.load(V, guest, host, 0),
        };
        if ty == Ty::V128 {
            self.l.set(i, v);
        } else {
            self.l.set_wide(i, ty, v);
        }
        self.part(Part::Body);
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        i: usize,
        ty: Ty,
        flags: MemFlags,
        addr: Value,
        v: Value,
    ) -> Result<(), CompileError> {
        let (addr, x) = (self.l.get(addr)?, self.l.get(v)?);
        let role = self.roles[i];
        let p = self.probe(role, AccessKind::Store, ty, flags, addr, Some(types::I64));
        let x = if ty == Ty::V128 { self.l.cast(x, V) } else { x };
        self.end_fast(&p, Some(p.addend));
        let vector = ty == Ty::V128;
        let shape = |ints: u8, rets: u8| match vector {
            true => Shape { vecs: 1, ..Shape::call(ints - 1, rets) },
            false => Shape { last: ty, ..Shape::call(ints, rets) },
        };
        if let Some(thunk) = self.slow_thunk(&p, role != Role::Alone) {
            self.l.call(thunk, shape(3, 3), &[addr, x]);
        } else {
            let info = self.l.const64(p.info.0);
            self.l.call(Thunk::slow(AccessKind::Store, vector, self.l.full), shape(4, 1), &[addr, info, x]);
        }
        let host = self.rejoin_at(&p, addr)?;
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
        self.end_fast(p, Some(fast));
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
