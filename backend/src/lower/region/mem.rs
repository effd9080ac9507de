//! Guest memory accesses of a region: the probe in line, the slow path in a cold block that writes back dirty registers first.
//!
//! Part of region lowering. The slow path is a thunk's call, which keeps every register.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{AtomicRmwOp, Block as ClifBlock, BlockArg, InstBuilder, Type, Value as Clif, types};
use twofold_ir::{MemFlags, RmwOp, Ty, Value};

use super::RegionLowering;
use crate::abi::{AccessKind, MemInfo};
use crate::compiler::CompileError;
use crate::layout;
use crate::lower::{Shape, V, clif};
use crate::thunk::Thunk;

/// The two ways of an access: where the cursor is after a probe.
struct Probed {
    /// Host address.
    host: Clif,
    slow: ClifBlock,
    next: ClifBlock,
    info: Clif,
}

impl RegionLowering<'_> {
    /// Emits the probe; the cursor is then on the way of a hit.
    fn probe(&mut self, kind: AccessKind, ty: Ty, flags: MemFlags, addr: Clif, result: Option<Type>) -> Probed {
        let info = MemInfo::new(kind, ty.log2_bytes(), flags, self.l.block.flags.mem_mode());
        let view = layout::tlb_view(info.mode() as usize);
        let mask = self.l.load_state(types::I64, view + layout::VIEW_MASK);
        let table = self.l.load_state(types::I64, view + layout::VIEW_TABLE);
        let index = self.l.cur.ins().ushr_imm_u(addr, i64::from(layout::TLB_SHIFT));
        let index = self.l.cur.ins().band(index, mask);
        let entry = self.l.cur.ins().iadd(table, index);
        let last = i64::from(info.bytes()) - 1;
        let aligned = flags.has(MemFlags::ALIGNED);
        let page = if aligned || last == 0 { addr } else { self.l.cur.ins().iadd_imm_s(addr, last) };
        let page = self.l.cur.ins().band_imm_s(page, -4096 | if aligned { last } else { 0 });
        let write = kind != AccessKind::Load || flags.has(MemFlags::WRITE_INTENT);
        let field = if write { layout::TLB_WRITE } else { layout::TLB_READ };
        let tag = self.l.cur.ins().load(types::I64, self.tlb, entry, field);
        let miss = self.l.cur.ins().icmp(IntCC::NotEqual, page, tag);
        let (slow, hit, next) = (self.l.new_block(true), self.l.new_block(false), self.l.new_block(false));
        self.l.cur.ins().brif(miss, slow, &[], hit, &[]);
        if let Some(t) = result {
            self.l.cur.func.dfg.append_block_param(next, t);
        }
        self.l.cur.goto_bottom(slow);
        self.write_back();
        let info = self.l.const64(info.0);
        self.l.cur.goto_bottom(hit);
        let addend = self.l.cur.ins().load(types::I64, self.tlb, entry, layout::TLB_ADDEND);
        let host = self.l.cur.ins().iadd(addr, addend);
        Probed { host, slow, next, info }
    }

    /// Ends the way of a hit with `fast` and goes to the slow one.
    fn to_slow(&mut self, p: &Probed, fast: Option<Clif>) {
        let args: Vec<BlockArg> = fast.map(BlockArg::Value).into_iter().collect();
        self.l.cur.ins().jump(p.next, &args);
        self.l.cur.goto_bottom(p.slow);
    }
    /// Ends the slow way; the cursor is then after the access.
    fn rejoin(&mut self, p: &Probed, slow: Option<Clif>) -> Option<Clif> {
        let args: Vec<BlockArg> = slow.map(BlockArg::Value).into_iter().collect();
        self.l.cur.ins().jump(p.next, &args);
        self.l.cur.goto_bottom(p.next);
        self.l.cur.func.dfg.block_params(p.next).first().copied()
    }

    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), CompileError> {
        let addr = self.l.get(addr)?;
        let t = if ty == Ty::V128 { V } else { types::I64 };
        let p = self.probe(AccessKind::Load, ty, flags, addr, Some(t));
        let (guest, host) = (self.guest, p.host);
        let ins = self.l.cur.ins();
        let fast = match ty {
            Ty::I8 => ins.uload8(types::I64, guest, host, 0),
            Ty::I16 => ins.uload16(types::I64, guest, host, 0),
            Ty::I32 => ins.uload32(guest, host, 0),
            Ty::I64 | Ty::V128 => ins.load(t, guest, host, 0),
        };
        self.to_slow(&p, Some(fast));
        let thunk = Thunk::slow(AccessKind::Load, ty == Ty::V128, self.l.full);
        let slow = if ty == Ty::V128 {
            self.l.call_results(thunk, Shape { vec_rets: 1, ..Shape::call(3, 1) }, &[addr, p.info])[1]
        } else {
            self.l.call_results(thunk, Shape::call(3, 1), &[addr, p.info])[0]
        };
        let v = self.rejoin(&p, Some(slow)).ok_or(CompileError::Malformed)?;
        if ty == Ty::V128 {
            self.l.set(i, v);
        } else {
            self.l.set_wide(i, ty, v);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, ty: Ty, flags: MemFlags, addr: Value, v: Value) -> Result<(), CompileError> {
        let (addr, x) = (self.l.get(addr)?, self.l.get(v)?);
        let p = self.probe(AccessKind::Store, ty, flags, addr, None);
        let x = if ty == Ty::V128 { self.l.cast(x, V) } else { x };
        self.l.cur.ins().store(self.guest, x, p.host, 0);
        self.to_slow(&p, None);
        let thunk = Thunk::slow(AccessKind::Store, ty == Ty::V128, self.l.full);
        let shape = if ty == Ty::V128 {
            Shape { vecs: 1, ..Shape::call(3, 1) }
        } else {
            Shape { last: ty, ..Shape::call(4, 1) }
        };
        self.l.call(thunk, shape, &[addr, p.info, x]);
        self.rejoin(&p, None);
        Ok(())
    }

    pub(super) fn rmw(&mut self, i: usize, op: RmwOp, ty: Ty, addr: Value, v: Value) -> Result<(), CompileError> {
        let (addr, x, wide) = (self.l.get(addr)?, self.l.get(v)?, self.l.zext64(v)?);
        let kind = AccessKind::Rmw(op);
        let p = self.probe(kind, ty, MemFlags::NONE, addr, Some(clif(ty)));
        let op = match op {
            RmwOp::Add => AtomicRmwOp::Add,
            RmwOp::Sub => AtomicRmwOp::Sub,
            RmwOp::And => AtomicRmwOp::And,
            RmwOp::Or => AtomicRmwOp::Or,
            RmwOp::Xor => AtomicRmwOp::Xor,
            RmwOp::Xchg => AtomicRmwOp::Xchg,
        };
        let fast = self.l.cur.ins().atomic_rmw(clif(ty), self.guest, op, p.host, x);
        self.atomic_result(i, ty, kind, &p, fast, &[addr, p.info, wide])
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
        let p = self.probe(AccessKind::CmpXchg, ty, MemFlags::NONE, addr, Some(clif(ty)));
        let fast = self.l.cur.ins().atomic_cas(self.guest, p.host, e, n);
        self.atomic_result(i, ty, AccessKind::CmpXchg, &p, fast, &[addr, p.info, wide_e, wide_n])
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
        self.to_slow(p, Some(fast));
        let thunk = Thunk::slow(kind, false, self.l.full);
        let shape = Shape::call(args.len() as u8 + 1, 1);
        let at = self.l.call(thunk, shape, args).ok_or(CompileError::Malformed)?;
        let slow = self.l.load_at(clif(ty), at, 0, self.l.trusted);
        let v = self.rejoin(p, Some(slow)).ok_or(CompileError::Malformed)?;
        self.l.set(i, v);
        Ok(())
    }
}
