//! Memory operands and the stack: effective addresses, segmentation, loads and stores.
//!
//! Place: methods of [`Translator`]. An effective address is computed at the address size and zero-extended; segmentation
//! then gives the linear address: in 64-bit code only FS and GS add a base, elsewhere the `TbFlags` say which segments
//! need neither base nor limit, and the helper `SegAddr` does the rest. Outside 64-bit code linear addresses are 32 bits.

use iced_x86::{OpKind, Register};
use twofold_arch::{Loc, TbFlags};
use twofold_ir::{BinOp, Helper, MemFlags, Ty, Value};

use crate::translator::{Access, Translator, gpr, segment};

/// SS in encoding order.
pub const SS: u8 = 2;
/// DS in encoding order.
pub const DS: u8 = 3;
/// ES in encoding order.
pub const ES: u8 = 0;

impl Translator<'_> {
    /// The address size of the memory operand.
    #[must_use]
    pub fn addr_ty(&self) -> Ty {
        let i = &self.insn;
        let r = if i.memory_base() != Register::None { i.memory_base() } else { i.memory_index() };
        match r {
            Register::None => match i.memory_displ_size() {
                2 => Ty::I16,
                8 => Ty::I64,
                _ => Ty::I32,
            },
            Register::RIP => Ty::I64,
            Register::EIP => Ty::I32,
            r => gpr(r).1,
        }
    }

    /// The effective address of the memory operand, at the address size.
    pub fn effective_address(&mut self) -> Value {
        let ty = self.addr_ty();
        let disp = self.insn.memory_displacement64();
        let (base, index) = (self.insn.memory_base(), self.insn.memory_index());
        if matches!(base, Register::RIP | Register::EIP) {
            return self.rip_relative(ty, disp);
        }
        let mut sum = None;
        if base != Register::None {
            sum = Some(self.get_gpr(ty, gpr(base).0));
        }
        if index != Register::None && index.is_gpr() {
            let mut x = self.get_gpr(ty, gpr(index).0);
            let scale = self.insn.memory_index_scale().trailing_zeros();
            if scale != 0 {
                x = self.b.bin_imm(BinOp::Shl, x, u64::from(scale));
            }
            sum = Some(match sum {
                Some(s) => self.b.add(s, x),
                None => x,
            });
        }
        match sum {
            Some(s) if disp & ty.mask() == 0 => s,
            Some(s) => self.b.bin_imm(BinOp::Add, s, disp),
            None => self.b.iconst(ty, disp),
        }
    }

    /// RIP-relative: the decoder ran with the page offset for RIP, so `target` is relative to `rip_base`.
    fn rip_relative(&mut self, ty: Ty, target: u64) -> Value {
        if ty == Ty::I32 {
            let v = self.b.rip(target as u32 as i32);
            return self.b.trunc(Ty::I32, v);
        }
        if let Ok(off) = i32::try_from(target as i64) {
            return self.b.rip(off);
        }
        let base = self.b.rip(0);
        self.b.bin_imm(BinOp::Add, base, target)
    }

    /// The segment of the memory operand (encoding order).
    #[must_use]
    pub fn mem_segment(&self) -> u8 {
        let seg = segment(self.insn.memory_segment());
        if !self.is64() || seg > DS {
            return seg;
        }
        // In 64-bit code overrides by ES, CS, SS and DS do not count, not even for which exception is raised.
        match self.insn.memory_base() {
            Register::RSP | Register::ESP | Register::RBP | Register::EBP => SS,
            _ => DS,
        }
    }
    /// STACK when the memory operand goes through SS.
    #[must_use]
    pub fn mem_flags(&self) -> MemFlags {
        if self.mem_segment() == SS { MemFlags::STACK } else { MemFlags::NONE }
    }

    /// The linear address of the memory operand for an access of `bytes`, with the checks that come before the access.
    pub fn mem_addr(&mut self, bytes: u32, access: Access) -> Value {
        let ea = self.effective_address();
        let seg = self.mem_segment();
        self.linear(seg, ea, bytes, access)
    }
    /// The linear address of the memory operand without access checks of size or alignment (INVLPG, CLFLUSH, helpers that
    /// check themselves use `bytes` 1).
    pub fn mem_addr_unaligned(&mut self, bytes: u32, access: Access) -> Value {
        let ea = self.effective_address();
        let seg = self.mem_segment();
        self.segmented(seg, ea, bytes, access)
    }
    /// The linear address of the memory operand displaced by `disp` bytes (a second part of the operand, or a bit string).
    pub fn mem_addr_plus(&mut self, disp: Value, bytes: u32, access: Access) -> Value {
        let ea = self.effective_address();
        let ty = self.b.ty(ea);
        let disp = self.b.trunc(ty, disp);
        let ea = self.b.add(ea, disp);
        let seg = self.mem_segment();
        self.linear(seg, ea, bytes, access)
    }

    /// `segment:offset` → linear address with limit, rights and alignment checks as the key demands. `ea` is at the address
    /// size.
    pub fn linear(&mut self, seg: u8, ea: Value, bytes: u32, access: Access) -> Value {
        let addr = self.segmented(seg, ea, bytes, access);
        if bytes > 1 && self.flags.has(TbFlags::ALIGN_CHECK) {
            let n = self.c64(u64::from(bytes));
            self.call(Helper::AlignCheck, &[addr, n]);
        }
        addr
    }

    fn segmented(&mut self, seg: u8, ea: Value, bytes: u32, access: Access) -> Value {
        if self.is64() {
            let ea = self.b.zext(Ty::I64, ea);
            if seg < 4 {
                return ea;
            }
            let base = self.b.get(Ty::I64, Loc::seg_base(seg));
            return self.b.add(ea, base);
        }
        // Outside protected mode every segment is at least 64 KiB, readable and writable.
        let in_64k = bytes == 1 && self.b.ty(ea) == Ty::I16 && !self.flags.has(TbFlags::PROTECTED);
        if self.flags.no_limit(seg) || in_64k {
            if self.flags.zero_base(seg) {
                return self.b.zext(Ty::I64, ea);
            }
            let ea = self.b.zext(Ty::I32, ea);
            let base = self.b.get(Ty::I32, Loc::seg_base(seg));
            let sum = self.b.add(ea, base);
            return self.b.zext(Ty::I64, sum);
        }
        let seg = self.c64(u64::from(seg));
        let how = self.c64(u64::from(bytes) | u64::from(access == Access::Write) << 8);
        self.call(Helper::SegAddr, &[seg, ea, how])
    }

    /// Loads the memory operand as `ty` (V128 too).
    pub fn load_mem(&mut self, ty: Ty) -> Value {
        self.load_mem_flags(ty, MemFlags::NONE)
    }
    /// Loads the memory operand with extra flags (ALIGNED).
    pub fn load_mem_flags(&mut self, ty: Ty, flags: MemFlags) -> Value {
        let addr = self.mem_addr(ty.bytes(), Access::Read);
        let flags = flags.or(self.mem_flags());
        self.b.load(ty, flags, addr)
    }
    /// Stores `v` to the memory operand.
    pub fn store_mem(&mut self, v: Value) {
        self.store_mem_flags(v, MemFlags::NONE);
    }
    /// Stores `v` to the memory operand with extra flags (ALIGNED).
    pub fn store_mem_flags(&mut self, v: Value, flags: MemFlags) {
        let bytes = self.b.ty(v).bytes();
        let addr = self.mem_addr(bytes, Access::Write);
        let flags = flags.or(self.mem_flags());
        self.b.store(flags, addr, v);
    }

    // ---- the stack -----------------------------------------------------------------------------------------------------

    /// The width of the stack pointer.
    #[must_use]
    pub fn stack_ty(&self) -> Ty {
        if self.is64() {
            Ty::I64
        } else if self.flags.has(TbFlags::SS32) {
            Ty::I32
        } else {
            Ty::I16
        }
    }
    /// The stack pointer, at its width.
    pub fn sp(&mut self) -> Value {
        let ty = self.stack_ty();
        self.get_gpr(ty, 4)
    }
    /// Writes the stack pointer.
    pub fn put_sp(&mut self, sp: Value) {
        self.put_gpr(4, sp);
    }
    /// Reads `ty` at the stack offset `sp`.
    pub fn load_stack(&mut self, ty: Ty, sp: Value) -> Value {
        let addr = self.linear(SS, sp, ty.bytes(), Access::Read);
        self.b.load(ty, MemFlags::STACK, addr)
    }
    /// Writes `v` at the stack offset `sp`.
    pub fn store_stack(&mut self, sp: Value, v: Value) {
        let bytes = self.b.ty(v).bytes();
        let addr = self.linear(SS, sp, bytes, Access::Write);
        self.b.store(MemFlags::STACK, addr, v);
    }
    /// Pushes `v`: the store, then the stack pointer.
    pub fn push(&mut self, v: Value) {
        let bytes = self.b.ty(v).bytes();
        let sp = self.sp();
        let sp = self.b.bin_imm(BinOp::Sub, sp, u64::from(bytes));
        self.store_stack(sp, v);
        self.put_sp(sp);
    }
    /// Reads the top of the stack; the value, and the stack pointer to put afterwards.
    pub fn pop(&mut self, ty: Ty) -> (Value, Value) {
        let sp = self.sp();
        let v = self.load_stack(ty, sp);
        let sp = self.b.bin_imm(BinOp::Add, sp, u64::from(ty.bytes()));
        (v, sp)
    }
    /// The address size of a string instruction or an instruction that counts in rCX.
    #[must_use]
    pub fn string_addr_ty(&self) -> Ty {
        for n in 0..self.insn.op_count() {
            match self.insn.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return Ty::I16,
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return Ty::I32,
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return Ty::I64,
                _ => {}
            }
        }
        self.rip_ty()
    }
}
