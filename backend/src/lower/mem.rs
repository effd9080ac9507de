//! Lowering of guest memory accesses: calls that `assemble` replaces by the TLB probe and the access.
//!
//! Such a call has its operands in fixed registers and changes only those that it returns, so the register allocator makes
//! room for the probe where it will stand. A load gives the value (RAX, XMM0); an atomic access gives the host address, and
//! the atomic op follows. Where the slow path has done an access, that is a place in the state which holds the old value.

use cranelift_codegen::ir::{AtomicRmwOp, InstBuilder, MemFlagsData, Value as Clif};
use twofold_ir::{MemFlags, RmwOp, Ty, Value};

use super::{Lowering, NAME_PROBE, Shape, clif};
use crate::abi::{AccessKind, MemInfo};
use crate::compiler::CompileError;

impl Lowering<'_> {
    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), CompileError> {
        let addr = self.get(addr)?;
        let vector = ty == Ty::V128;
        let shape = Shape { vec_rets: u8::from(vector), ..Shape::call(2, 2) };
        let v = self.probe(AccessKind::Load, ty, flags, shape, &[addr])[if vector { 2 } else { 0 }];
        if vector {
            self.set(i, v);
        } else {
            self.set_wide(i, ty, v);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, ty: Ty, flags: MemFlags, addr: Value, v: Value) -> Result<(), CompileError> {
        let addr = self.get(addr)?;
        if ty == Ty::V128 {
            let x = self.get(v)?;
            let shape = Shape { vecs: 1, ..Shape::call(2, 3) };
            self.probe(AccessKind::Store, ty, flags, shape, &[addr, x]);
        } else {
            let x = self.get(v)?;
            self.probe(AccessKind::Store, ty, flags, Shape { last: ty, ..Shape::call(3, 3) }, &[addr, x]);
        }
        Ok(())
    }

    pub(super) fn rmw(&mut self, i: usize, op: RmwOp, ty: Ty, addr: Value, v: Value) -> Result<(), CompileError> {
        let host = self.atomic_address(AccessKind::Rmw(op), ty, addr, &[v])?;
        let x = self.get(v)?;
        // Some become loops.
        self.out.fixed |= matches!(op, RmwOp::And | RmwOp::Or | RmwOp::Xor);
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
        let host = self.atomic_address(AccessKind::CmpXchg, ty, addr, &[expected, new])?;
        let (e, n) = (self.get(expected)?, self.get(new)?);
        let old = self.cur.ins().atomic_cas(MemFlagsData::trusted(), host, e, n);
        self.set(i, old);
        Ok(())
    }

    fn atomic_address(&mut self, kind: AccessKind, ty: Ty, addr: Value, v: &[Value]) -> Result<Clif, CompileError> {
        // The third argument's place is the probe's: the operands are where the slow path wants them.
        let addr = self.get(addr)?;
        let mut args = [addr; 4];
        for (to, &v) in args[2..].iter_mut().zip(v) {
            *to = self.zext64(v)?;
        }
        let n = 2 + v.len();
        Ok(self.probe(kind, ty, MemFlags::NONE, Shape::call(n as u8 + 1, 2), &args[..n])[0])
    }

    fn probe(&mut self, kind: AccessKind, ty: Ty, flags: MemFlags, shape: Shape, args: &[Clif]) -> &[Clif] {
        let index = self.out.probes.len() as u32;
        self.out.probes.push(MemInfo::new(kind, ty.log2_bytes(), flags, self.block.flags.mem_mode()));
        self.call_named(NAME_PROBE, index, shape, args)
    }
}
