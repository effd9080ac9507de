//! Guest memory: the TLB probe and the access in line, what a miss does behind the block.
//!
//! An address is a register and a distance, which the access itself can add. The probe changes RAX and RDX; a slow path keeps every
//! register but those that it gives results in, so nothing has to be saved for it.

use twofold_ir::{BinOp, MemFlags, Op, RmwOp, Ty, Value};

use super::x64::{self, Alu, Mem, R8, RAX, RCX, RDX, RSI, Rm};
use super::{Direct, Refused, distance, state};
use crate::abi::{AccessKind, MemInfo};
use crate::emit::{JNE, SlowAccess, SlowValue, Stub};
use crate::layout;
use crate::origin::Role;

impl Direct<'_> {
    /// The address as a register and a distance.
    fn address(&mut self, addr: Value) -> Result<(u8, i32), Refused> {
        if self.p.info[addr.index()].folded
            && let Op::Bin { op: BinOp::Add, a, b, .. } = *self.block.op(addr)
        {
            return Ok((self.reg(a)?, distance(self.block, b).ok_or(Refused::Malformed)?));
        }
        Ok((self.reg(addr)?, 0))
    }

    /// The value that the register of [`Direct::address`] holds.
    fn base(&self, addr: Value) -> Value {
        match *self.block.op(addr) {
            Op::Bin { a, .. } if self.p.info[addr.index()].folded => a,
            _ => addr,
        }
    }

    fn info(&self, kind: AccessKind, ty: Ty, flags: MemFlags) -> MemInfo {
        MemInfo::new(kind, ty.log2_bytes(), flags, self.block.flags.mem_mode())
    }

    /// Leaves in RAX what makes a host address of the linear one. Returns where the displacement of the jump to the slow path is.
    fn probe(&mut self, info: MemInfo, (base, disp): (u8, i32)) -> u32 {
        let insn = self.insn;
        self.e.mark(Role::Access, insn);
        let view = layout::tlb_view(info.mode() as usize);
        let last = info.checked_bytes() as i32 - 1;
        let aligned = info.flags().has(MemFlags::ALIGNED);
        let write = info.kind() != AccessKind::Load || info.flags().has(MemFlags::WRITE_INTENT);
        let tag = if write { layout::TLB_WRITE } else { layout::TLB_READ };
        let out = self.out();
        x64::lea(out, Ty::I64, RAX, Mem::at(base, disp));
        x64::shift_imm(out, Ty::I64, x64::Shift::Shr, RAX, layout::TLB_SHIFT as u8);
        x64::alu(out, Ty::I64, Alu::And, RAX, state(view + layout::VIEW_MASK).into());
        x64::alu(out, Ty::I64, Alu::Add, RAX, state(view + layout::VIEW_TABLE).into());
        // The page of the last byte, and, if it matters, the bits that an aligned address has not.
        x64::lea(out, Ty::I64, RDX, Mem::at(base, if aligned { disp } else { disp + last }));
        x64::alu_imm(out, Ty::I64, Alu::And, Rm::R(RDX), -4096 | if aligned { last } else { 0 });
        x64::alu(out, Ty::I64, Alu::Cmp, RDX, Mem::at(RAX, tag).into());
        out.extend_from_slice(&[0x0f, JNE, 0, 0, 0, 0]);
        let miss = self.e.here() - 4;
        x64::load(self.out(), Ty::I64, RAX, Mem::at(RAX, layout::TLB_ADDEND).into());
        miss
    }

    /// The slow path goes on here.
    fn slow(&mut self, miss: u32, info: MemInfo, address: (u8, i32), value: SlowValue, result: Option<u8>) {
        let (back, insn) = (self.e.here(), self.insn);
        let access = SlowAccess { info, address, value, result, back, insn };
        let stub = self.e.stub_number(Stub::Slow(access));
        self.e.fixups.push((miss, stub));
        self.e.mark(Role::Body, insn);
    }

    pub(super) fn load(&mut self, i: usize, ty: Ty, flags: MemFlags, addr: Value) -> Result<(), Refused> {
        let info = self.info(AccessKind::Load, ty, flags);
        let (base, disp) = self.address(addr)?;
        // The register of the address may be the result's: it is read first.
        let r = match ty {
            Ty::V128 => self.fresh_vec()?,
            _ => self.over(self.base(addr))?,
        };
        let miss = self.probe(info, (base, disp));
        let from = Rm::M(Mem { base: RAX, index: Some((base, 0)), disp });
        if ty == Ty::V128 {
            x64::load_vec(self.out(), r, from);
            self.slow(miss, info, (base, disp), SlowValue::None, Some(r));
            self.set_vec(i, r);
        } else {
            x64::load(self.out(), ty, r, from);
            self.slow(miss, info, (base, disp), SlowValue::None, Some(r));
            self.set(i, r, true);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, ty: Ty, flags: MemFlags, addr: Value, v: Value) -> Result<(), Refused> {
        let info = self.info(AccessKind::Store, ty, flags);
        let (base, disp) = self.address(addr)?;
        let imm = self.imm(ty, v);
        let r = if imm.is_some() { 0 } else { self.reg(v)? };
        let miss = self.probe(info, (base, disp));
        let to = Mem { base: RAX, index: Some((base, 0)), disp };
        let value = match imm {
            Some(imm) => {
                x64::store_imm(self.out(), ty, to, imm);
                SlowValue::Imm(imm)
            }
            None if ty == Ty::V128 => {
                x64::store_vec(self.out(), to, r);
                SlowValue::Reg(r)
            }
            None => {
                x64::store(self.out(), ty, to, r);
                SlowValue::Reg(r)
            }
        };
        self.slow(miss, info, (base, disp), value, None);
        Ok(())
    }

    /// The host address of an atomic access in RAX; where the slow path has done it, that of a copy of the old value.
    fn atomic(&mut self, kind: AccessKind, ty: Ty, addr: Value) -> Result<(), Refused> {
        let info = self.info(kind, ty, MemFlags::NONE);
        let (base, disp) = self.address(addr)?;
        let miss = self.probe(info, (base, disp));
        x64::lea(self.out(), Ty::I64, RAX, Mem { base: RAX, index: Some((base, 0)), disp });
        self.slow(miss, info, (base, disp), SlowValue::Placed, None);
        Ok(())
    }

    pub(super) fn rmw(&mut self, i: usize, op: RmwOp, ty: Ty, addr: Value, v: Value) -> Result<(), Refused> {
        self.arg_zext(RCX, v)?;
        self.atomic(AccessKind::Rmw(op), ty, addr)?;
        let r = self.fresh()?;
        let out = self.out();
        let at = Mem::at(RAX, 0);
        // The instruction of 8 or more bits whose opcode for more is `op`, of RCX.
        let with_rcx = |out: &mut Vec<u8>, op: &[u8]| {
            let mut op = op.to_vec();
            if ty == Ty::I8
                && let Some(last) = op.last_mut()
            {
                *last -= 1;
            }
            let prefix = if ty == Ty::I16 { 0x66 } else { 0 };
            x64::insn(out, prefix, ty == Ty::I64, false, &op, RCX, at.into());
        };
        match op {
            RmwOp::Xchg => with_rcx(out, &[0x87]),
            RmwOp::Add | RmwOp::Sub => {
                if op == RmwOp::Sub {
                    x64::unary(out, Ty::I64, 3, RCX);
                }
                out.push(0xf0);
                with_rcx(out, &[0x0f, 0xc1]);
            }
            RmwOp::And | RmwOp::Or | RmwOp::Xor => {
                // mov rdx, rax; mov rax, [rdx]; again: mov rsi, rax; op rsi, rcx; lock cmpxchg [rdx], rsi; jne again; mov rcx, rax
                let op = match op {
                    RmwOp::And => Alu::And,
                    RmwOp::Or => Alu::Or,
                    _ => Alu::Xor,
                };
                x64::mov(out, RDX, RAX);
                x64::load(out, ty, RAX, Mem::at(RDX, 0).into());
                let again = out.len();
                x64::mov(out, RSI, RAX);
                x64::alu(out, Ty::I64, op, RSI, Rm::R(RCX));
                exchange(out, ty, RSI);
                let back = (again as i64 - (out.len() as i64 + 2)) as u8;
                out.extend_from_slice(&[0x75, back]);
                x64::mov(out, RCX, RAX);
            }
        }
        x64::load(out, ty, r, Rm::R(RCX));
        self.set(i, r, true);
        Ok(())
    }

    pub(super) fn cmpxchg(
        &mut self,
        i: usize,
        ty: Ty,
        addr: Value,
        expected: Value,
        new: Value,
    ) -> Result<(), Refused> {
        self.arg_zext(RCX, expected)?;
        self.arg_zext(R8, new)?;
        self.atomic(AccessKind::CmpXchg, ty, addr)?;
        let r = self.fresh()?;
        let out = self.out();
        x64::mov(out, RDX, RAX);
        x64::mov(out, RAX, RCX);
        exchange(out, ty, R8);
        x64::load(out, ty, r, Rm::R(RAX));
        self.set(i, r, true);
        Ok(())
    }
}

/// `lock cmpxchg [rdx], reg`
fn exchange(out: &mut Vec<u8>, ty: Ty, reg: u8) {
    let op = [0x0f, if ty == Ty::I8 { 0xb0 } else { 0xb1 }];
    out.push(0xf0);
    // RSI as a byte needs a REX.
    let prefix = if ty == Ty::I16 { 0x66 } else { 0 };
    x64::insn(out, prefix, ty == Ty::I64, ty == Ty::I8, &op, reg, Mem::at(RDX, 0).into());
}
