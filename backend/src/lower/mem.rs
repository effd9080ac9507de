//! Lowering of guest memory accesses: the TLB probe, in the block or in a thunk, and what happens on a miss.
//!
//! Inline, an access is: entry of the address, tag compare, `host = addend + address`, access at `host`. A miss calls a slow
//! thunk, which does the whole access and gives a place in the state as `host`: the load there finds the value, the store
//! goes nowhere, the atomic op on it yields the old value. So a miss joins before the access and costs the hot path nothing.

use cranelift_codegen::cursor::Cursor;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{AtomicRmwOp, InstBuilder, MemFlagsData, Opcode, Value as Clif, immediates::Offset32, types};
use twofold_ir::{BinOp, MemFlags, Op, RmwOp, Ty, Value};

use super::{Lowering, Shape, clif};
use crate::abi::{AccessKind, MemInfo};
use crate::compiler::{CompileError, Probe};
use crate::layout;
use crate::thunks::Thunk;

impl Lowering<'_> {
    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), CompileError> {
        let value = addr;
        let addr = self.get(addr)?;
        let vector = ty == Ty::V128;
        if let Some(thunk) = self.probe_thunk(AccessKind::Load, ty, flags) {
            // RDX is the thunk's to clobber: the second result.
            let shape = if vector { Shape { vec_rets: 1, ..Shape::call(2, 2) } } else { Shape::call(2, 2) };
            let v = self.call_results(thunk, shape, &[addr])[if vector { 2 } else { 0 }];
            if vector {
                self.set(i, v);
            } else {
                self.set_wide(i, ty, v);
            }
            return Ok(());
        }
        let host = self.host_address(AccessKind::Load, ty, flags, value, &[])?;
        let guest = self.guest;
        match ty {
            Ty::I64 | Ty::V128 => {
                let v = self.load_at(clif(ty), host, 0, guest);
                self.set(i, v);
            }
            Ty::I8 | Ty::I16 | Ty::I32 => {
                let op = match ty {
                    Ty::I8 => Opcode::Uload8,
                    Ty::I16 => Opcode::Uload16,
                    _ => Opcode::Uload32,
                };
                let (inst, dfg) = self.cur.ins().Load(op, types::I64, guest, Offset32::new(0), host);
                let v = dfg.first_result(inst);
                self.set_wide(i, ty, v);
            }
        }
        Ok(())
    }

    pub(super) fn store(&mut self, ty: Ty, flags: MemFlags, addr: Value, v: Value) -> Result<(), CompileError> {
        let value = addr;
        let addr = self.get(addr)?;
        let x = self.get(v)?;
        if let Some(thunk) = self.probe_thunk(AccessKind::Store, ty, flags) {
            if ty == Ty::V128 {
                self.call(thunk, Shape { vecs: 1, ..Shape::call(2, 1) }, &[addr, x]);
            } else {
                // The upper bits do not matter, but they must be a register's.
                let x = self.zext64(v)?;
                self.call(thunk, Shape::call(3, 1), &[addr, x]);
            }
            return Ok(());
        }
        let host = self.host_address(AccessKind::Store, ty, flags, value, &[v])?;
        let guest = self.guest;
        self.store_at(x, host, 0, guest);
        Ok(())
    }

    pub(super) fn rmw(&mut self, i: usize, op: RmwOp, ty: Ty, addr: Value, v: Value) -> Result<(), CompileError> {
        let x = self.get(v)?;
        let host = self.host_address(AccessKind::Rmw(op), ty, MemFlags::NONE, addr, &[v])?;
        let op = match op {
            RmwOp::Add => AtomicRmwOp::Add,
            RmwOp::Sub => AtomicRmwOp::Sub,
            RmwOp::And => AtomicRmwOp::And,
            RmwOp::Or => AtomicRmwOp::Or,
            RmwOp::Xor => AtomicRmwOp::Xor,
            RmwOp::Xchg => AtomicRmwOp::Xchg,
        };
        let old = self.cur.ins().atomic_rmw(clif(ty), MemFlagsData::trusted(), op, host, x);
        self.set(i, old);
        Ok(())
    }

    pub(super) fn cmpxchg(
        &mut self,
        i: usize,
        ty: Ty,
        addr: Value,
        expected: Value,
        new: Value,
    ) -> Result<(), CompileError> {
        let (e, n) = (self.get(expected)?, self.get(new)?);
        let host = self.host_address(AccessKind::CmpXchg, ty, MemFlags::NONE, addr, &[expected, new])?;
        let old = self.cur.ins().atomic_cas(MemFlagsData::trusted(), host, e, n);
        self.set(i, old);
        Ok(())
    }

    /// The thunk that does this access, where accesses are out of line.
    fn probe_thunk(&self, kind: AccessKind, ty: Ty, flags: MemFlags) -> Option<Thunk> {
        if self.options.probe == Probe::Inline {
            return None;
        }
        Thunk::probe(kind, ty.log2_bytes(), flags, self.block.flags.mem_mode(), self.full)
    }

    /// Probes the TLB; `operands` are what the slow path needs beside the address.
    fn host_address(
        &mut self,
        kind: AccessKind,
        ty: Ty,
        flags: MemFlags,
        address: Value,
        operands: &[Value],
    ) -> Result<Clif, CompileError> {
        let addr = self.get(address)?;
        let mode = self.block.flags.mem_mode();
        let view = layout::tlb_view(mode as usize);
        let size = i64::from(ty.bytes());
        let vector = ty == Ty::V128;
        let mut args = [addr; 4];
        for (to, &v) in args[2..].iter_mut().zip(operands) {
            *to = self.get(v)?;
        }

        let index = self.cur.ins().ushr_imm_u(addr, i64::from(layout::TLB_SHIFT));
        let mask = self.load_state(types::I64, view + layout::VIEW_MASK);
        let index = self.cur.ins().band(index, mask);
        let table = self.load_state(types::I64, view + layout::VIEW_TABLE);
        let entry = self.cur.ins().iadd(index, table);
        let page = if size == 1 {
            self.cur.ins().band_imm_s(addr, -4096)
        } else if flags.has(MemFlags::ALIGNED) {
            self.cur.ins().band_imm_s(addr, -4096 | (size - 1))
        } else {
            let (base, off) = self.base_and_offset(address)?;
            let last = self.cur.ins().iadd_imm_s(base, off.wrapping_add(size - 1));
            self.cur.ins().band_imm_s(last, -4096)
        };
        let write = kind != AccessKind::Load || flags.has(MemFlags::WRITE_INTENT);
        let trusted = self.trusted;
        let tag = self.load_at(types::I64, entry, if write { layout::TLB_WRITE } else { layout::TLB_READ }, trusted);
        let miss = self.cur.ins().icmp(IntCC::NotEqual, page, tag);
        let addend = self.load_at(types::I64, entry, layout::TLB_ADDEND, trusted);
        let host = self.cur.ins().iadd(addend, addr);

        let cold = self.new_block(true);
        let join = self.new_block(false);
        let result = self.cur.func.dfg.append_block_param(join, types::I64);
        self.cur.ins().brif(miss, cold, &[], join, &[host.into()]);
        self.cur.goto_bottom(cold);
        let info = MemInfo::new(kind, ty.log2_bytes(), flags, mode);
        args[1] = self.const64(info.0);
        let thunk = Thunk::slow(kind, vector, self.full);
        let n = 2 + operands.len();
        let shape = if vector {
            Shape { vecs: operands.len() as u8, ..Shape::call(3, 1) }
        } else {
            for a in &mut args[2..n] {
                if self.cur.func.dfg.value_type(*a) != types::I64 {
                    *a = self.cur.ins().uextend(types::I64, *a);
                }
            }
            Shape::call(n as u8 + 1, 1)
        };
        let there = self.call(thunk, shape, &args[..n]).ok_or(CompileError::Malformed)?;
        self.cur.ins().jump(join, &[there.into()]);
        self.cur.goto_bottom(join);
        Ok(result)
    }

    /// A 64-bit value as another plus a constant: itself plus 0 if it is no such sum.
    fn base_and_offset(&self, v: Value) -> Result<(Clif, i64), CompileError> {
        if let Op::Bin { op: BinOp::Add, ty: Ty::I64, a, b } = *self.block.op(v)
            && let Op::Const { imm, .. } = *self.block.op(b)
        {
            return Ok((self.get(a)?, imm as i64));
        }
        Ok((self.get(v)?, 0))
    }
}
