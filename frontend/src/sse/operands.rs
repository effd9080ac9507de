//! Vector operands: registers and memory of 128 or 256 bits, in legacy and VEX encodings.
//!
//! Place: methods of [`Translator`] for the emitters of `sse` and `avx`, which serve both encodings. What differs is here. A VEX-coded
//! instruction has a destination of its own (its sources come one operand later), clears what it does not write of the
//! destination register, takes unaligned memory, and may be 256 bits wide: then it is two halves, each by the same op.

use iced_x86::{OpKind, Register};
use twofold_arch::{Loc, TbFlags};
use twofold_ir::{BinOp, Helper, MemFlags, Ty, Value, VecOp};

use crate::translator::{Access, Translator};

/// Number of the vector register `r`.
pub(crate) fn number(r: Register) -> u8 {
    let first = if r.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    (r as u32).wrapping_sub(first as u32) as u8 & 15
}

/// A vector operand: its low half and, in a 256-bit instruction, its high half.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wide {
    pub lo: Value,
    pub hi: Option<Value>,
}

impl Wide {
    /// 128 bits.
    pub fn half(lo: Value) -> Self {
        Self { lo, hi: None }
    }
    /// 256 bits.
    pub fn full(lo: Value, hi: Value) -> Self {
        Self { lo, hi: Some(hi) }
    }
    /// The same 128 bits for both halves of an instruction that is as wide as `other`.
    pub fn twice(lo: Value, other: Wide) -> Self {
        Self { lo, hi: other.hi.map(|_| lo) }
    }
}

impl Translator<'_> {
    // ---- registers -----------------------------------------------------------------------------------------------------

    /// Whether the instruction is 256 bits wide.
    pub(crate) fn is_256(&self) -> bool {
        self.vex && ((0..self.insn.op_count()).any(|n| self.is_ymm(n)) || self.insn.memory_size().size() == 32)
    }
    /// The operand that is the first source: in legacy encodings the destination.
    pub(crate) fn first(&self) -> u32 {
        u32::from(self.vex)
    }
    /// The low half of the vector register that is operand `n`.
    pub(crate) fn xmm(&mut self, n: u32) -> Value {
        let r = number(self.insn.op_register(n));
        self.b.get(Ty::V128, Loc::xmm(r))
    }
    /// The low half of vector register 0, an implicit operand of legacy encodings.
    pub(crate) fn xmm0(&mut self) -> Wide {
        Wide::half(self.b.get(Ty::V128, Loc::xmm(0)))
    }
    /// The vector register that is operand `n`, in its width.
    pub(crate) fn register(&mut self, n: u32) -> Wide {
        let lo = self.xmm(n);
        let high = Loc::ymm_high(number(self.insn.op_register(n)));
        Wide { lo, hi: self.is_ymm(n).then(|| self.b.get(Ty::V128, high)) }
    }
    /// Writes the low half of the vector register that is operand `n`. VEX-coded, the high half becomes 0.
    pub(crate) fn put_xmm(&mut self, n: u32, v: Value) {
        self.put_register(n, Wide::half(v));
    }
    /// Writes the vector register that is operand `n`; see [`Self::put_xmm`] for a high half that is not there.
    pub(crate) fn put_register(&mut self, n: u32, v: Wide) {
        self.put_vector(number(self.insn.op_register(n)), v);
    }
    /// The same by the register's number.
    pub(crate) fn put_vector(&mut self, r: u8, v: Wide) {
        let high = match v.hi {
            Some(hi) => Some(hi),
            None => self.vex.then(|| self.splat64(0)),
        };
        self.b.put(Loc::xmm(r), v.lo);
        if let Some(high) = high {
            self.b.put(Loc::ymm_high(r), high);
        }
    }
    /// Whether operand `n` is a vector register of 128 bits.
    pub(crate) fn is_xmm(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Register && self.insn.op_register(n).is_xmm()
    }
    /// Whether operand `n` is a vector register of 256 bits.
    pub(crate) fn is_ymm(&self, n: u32) -> bool {
        self.insn.op_kind(n) == OpKind::Register && self.insn.op_register(n).is_ymm()
    }
    /// Whether both sources are the same register.
    pub(crate) fn same_sources(&self) -> bool {
        let n = self.first();
        !self.is_mem(n + 1) && self.insn.op_register(n) == self.insn.op_register(n + 1)
    }

    // ---- memory --------------------------------------------------------------------------------------------------------

    /// Operand `n`, a register or all of a memory operand; legacy encodings want memory aligned.
    pub(crate) fn wide(&mut self, n: u32) -> Wide {
        if !self.is_mem(n) {
            return self.register(n);
        }
        if self.vex { self.load_wide(false) } else { Wide::half(self.load_aligned()) }
    }
    /// Operand `n`, a vector register or 16 bytes of memory, aligned in legacy encodings.
    pub(crate) fn xmm_or_aligned(&mut self, n: u32) -> Value {
        if !self.is_mem(n) {
            return self.xmm(n);
        }
        if self.vex { self.load_mem(Ty::V128) } else { self.load_aligned() }
    }
    /// Operand `n`, a vector register or `bytes` of memory, zero-extended.
    pub(crate) fn xmm_or_part(&mut self, n: u32, bytes: u32) -> Value {
        if !self.is_mem(n) {
            return self.xmm(n);
        }
        if bytes == 16 {
            return self.load_mem(Ty::V128);
        }
        let v = self.load_mem(Ty::int(bytes));
        self.widen(v)
    }
    /// Loads 16 bytes that must be aligned.
    pub(crate) fn load_aligned(&mut self) -> Value {
        // #GP for the alignment comes before any #AC, so no alignment check is emitted.
        let addr = self.mem_addr_unaligned(16, Access::Read);
        let flags = self.mem_flags().or(MemFlags::ALIGNED);
        self.b.load(Ty::V128, flags, addr)
    }
    /// Stores 16 bytes that must be aligned.
    pub(crate) fn store_aligned(&mut self, v: Value) {
        let addr = self.mem_addr_unaligned(16, Access::Write);
        let flags = self.mem_flags().or(MemFlags::ALIGNED);
        self.b.store(flags, addr, v);
    }
    /// Loads the memory operand in the instruction's width.
    pub(crate) fn load_wide(&mut self, aligned: bool) -> Wide {
        if !self.is_256() {
            return Wide::half(if aligned { self.load_aligned() } else { self.load_mem(Ty::V128) });
        }
        let (addr, first) = self.address_256(aligned, Access::Read);
        let lo = self.b.load(Ty::V128, first, addr);
        let second = self.displaced(addr, 16);
        let hi = self.b.load(Ty::V128, self.mem_flags(), second);
        Wide::full(lo, hi)
    }
    /// Stores to the memory operand.
    pub(crate) fn store_wide(&mut self, v: Wide, aligned: bool) {
        let Some(hi) = v.hi else {
            return if aligned { self.store_aligned(v.lo) } else { self.store_mem(v.lo) };
        };
        let (addr, first) = self.address_256(aligned, Access::Write);
        self.b.store(first, addr, v.lo);
        let second = self.displaced(addr, 16);
        self.b.store(self.mem_flags(), second, hi);
    }
    /// The address of a 32-byte memory operand, and the flags of the access to its first half.
    fn address_256(&mut self, aligned: bool, access: Access) -> (Value, MemFlags) {
        let flags = self.mem_flags().or(MemFlags::PAIR);
        if aligned {
            (self.mem_addr_unaligned(32, access), flags.or(MemFlags::ALIGNED))
        } else {
            (self.mem_addr(32, access), flags)
        }
    }
    /// A linear address further on, in an operand that has been checked whole.
    pub(crate) fn displaced(&mut self, addr: Value, by: u64) -> Value {
        let sum = self.b.bin_imm(BinOp::Add, addr, by);
        if self.is64() { sum } else { self.b.bin_imm(BinOp::And, sum, 0xffff_ffff) }
    }

    // ---- values --------------------------------------------------------------------------------------------------------

    /// An integer as a vector, zero-extended.
    pub(crate) fn widen(&mut self, v: Value) -> Value {
        let lo = self.b.zext(Ty::I64, v);
        let hi = self.c64(0);
        self.b.pair(lo, hi)
    }
    /// A constant vector of twice `half`.
    pub(crate) fn splat64(&mut self, half: u64) -> Value {
        let v = self.c64(half);
        self.b.pair(v, v)
    }
    /// The instruction's last operand, an immediate byte.
    pub(crate) fn imm8(&self) -> u8 {
        self.insn.immediate8()
    }
    /// A vector op; one that touches MXCSR is checked for unmasked exceptions when there can be any.
    pub(crate) fn vector(&mut self, op: VecOp, imm: u8, args: &[Value]) -> Value {
        self.checked(op, |t| t.b.vec(op, imm, args))
    }
    /// A vector op on each half of its operands, with an immediate for each.
    pub(crate) fn halves(&mut self, op: VecOp, imm: [u8; 2], args: &[Wide]) -> Wide {
        let mut list = [Value::NONE; 3];
        self.checked(op, |t| {
            let mut half = |t: &mut Self, imm, of: fn(&Wide) -> Option<Value>| {
                for (to, from) in list.iter_mut().zip(args) {
                    *to = of(from).unwrap_or(from.lo);
                }
                t.b.vec(op, imm, &list[..args.len()])
            };
            let lo = half(t, imm[0], |w| Some(w.lo));
            let wide = args.first().is_some_and(|w| w.hi.is_some());
            Wide { lo, hi: wide.then(|| half(t, imm[1], |w| w.hi)) }
        })
    }
    /// `f`, which emits ops of the kind of `op`, between the checks for unmasked exceptions.
    pub(crate) fn checked<R>(&mut self, op: VecOp, f: impl FnOnce(&mut Self) -> R) -> R {
        let checked = op.sig().touches_mxcsr && self.flags.has(TbFlags::SSE_UNMASKED);
        if checked {
            let before = self.c64(0);
            self.call(Helper::SseCheck, &[before]);
        }
        let r = f(self);
        if checked {
            let after = self.c64(1);
            self.call(Helper::SseCheck, &[after]);
        }
        r
    }
}
