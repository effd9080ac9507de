//! The registers and memory that a sample runs on: operands where the scratch area is, values that make it do something.

use iced_x86::{FlowControl, Mnemonic, OpKind, Register};
use twofold_arch::control::rflags;

use super::{Sample, target};
use crate::insn::{Mode, Regs, Rng, SCRATCH, TAKEN};

/// The register's number, and whether it can form addresses.
fn number(r: Register) -> Option<usize> {
    if !r.is_gpr() {
        return None;
    }
    Some(r.full_register() as usize - Register::RAX as usize)
}

impl Sample {
    /// Whether the instruction has a memory operand that ModRM says.
    pub(super) fn has_memory(&self) -> bool {
        (0..self.insn.op_count()).any(|n| self.insn.op_kind(n) == OpKind::Memory)
    }

    /// Gives registers and, in a few cases, memory, values that make the instruction do something.
    pub fn prepare(&self, r: &mut Regs, rng: &mut Rng) {
        let i = &self.insn;
        if i.is_string_instruction() {
            self.prepare_string(r, rng);
        }
        if matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && let Some(n) = number(i.op_register(1))
            && rng.below(8) != 0
        {
            r.gpr[n] = rng.below(0x4000).wrapping_sub(0x2000);
        }
        let shift = matches!(
            i.mnemonic(),
            Mnemonic::Shl
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Sal
                | Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
                | Mnemonic::Shld
                | Mnemonic::Shrd
        );
        if shift && rng.below(2) == 0 {
            r.gpr[1] = r.gpr[1] & !0xff | rng.below(34);
        }
        if matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && rng.below(4) != 0 {
            // Quotients that fit.
            r.gpr[2] = match rng.below(3) {
                0 => 0,
                1 => rng.below(16),
                _ => u64::MAX,
            };
        }
        if matches!(i.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) {
            r.gpr[5] = self.mode.middle() + rng.below(64) * 8;
        }
        if matches!(
            i.mnemonic(),
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz | Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne
        ) {
            r.gpr[1] = [0, 1, 2, 0x1_0000, 0x1_0000_0000, 0x1_0000_0001][rng.below(6) as usize];
        }
        if matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
            r.gpr[7] = self.mode.middle() + rng.below(64);
        }
        if i.mnemonic() == Mnemonic::Xlatb {
            r.gpr[3] = self.mode.middle().wrapping_sub(r.gpr[0] & 0xff);
        }
        if self.has_memory() {
            self.solve(r, rng);
        }
        if self.is_indirect() {
            let to = self.mode.rip() + (self.bytes.len() + TAKEN) as u64;
            if let Some(n) = number(i.op_register(0)) {
                r.gpr[n] = to;
            }
        }
    }

    fn is_indirect(&self) -> bool {
        matches!(self.insn.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
    }

    fn prepare_string(&self, r: &mut Regs, rng: &mut Rng) {
        let middle = self.mode.middle();
        let far = |rng: &mut Rng| if rng.below(32) == 0 { middle / 2 * 2 + 0x1ff8 } else { middle + rng.below(64) };
        r.gpr[6] = far(rng);
        r.gpr[7] = far(rng);
        r.gpr[1] = rng.below(20);
        if rng.below(4) == 0 {
            r.flags |= rflags::DF;
        }
    }

    /// Makes base and index give the target address.
    fn solve(&self, r: &mut Regs, rng: &mut Rng) {
        let i = &self.insn;
        let (base, index) = (number(i.memory_base()), number(i.memory_index()));
        let target = target(i, self.mode, rng);
        let disp = i.memory_displacement64();
        let scale = u64::from(i.memory_index_scale());
        let narrow = [i.memory_base(), i.memory_index()].iter().any(|r| r.is_gpr32() || r.is_gpr16());
        // Bits above the address size do not count.
        let garbage = if narrow && self.mode == Mode::Bits64 { rng.next() << 32 } else { 0 };
        let put = |r: &mut Regs, n: usize, v: u64| {
            let v = if narrow { v & 0xffff_ffff | garbage } else { v };
            r.gpr[n] = if self.mode == Mode::Bits64 { v } else { v & 0xffff_ffff };
        };
        match (base, index) {
            (Some(b), Some(x)) if b == x => put(r, b, target.wrapping_sub(disp) / (1 + scale)),
            (Some(b), Some(x)) => {
                if rng.below(2) == 0 {
                    put(r, x, rng.below(512));
                }
                let offset = r.gpr[x].wrapping_mul(scale);
                put(r, b, target.wrapping_sub(disp).wrapping_sub(offset));
            }
            (Some(b), None) => put(r, b, target.wrapping_sub(disp)),
            (None, Some(x)) => put(r, x, target.wrapping_sub(disp) / scale),
            (None, None) => {}
        }
        if i.is_vsib() {
            self.vector_indexes(r, rng);
        }
        // 16-bit addresses wrap at 64 KiB; where the scratch area is not there, they fault.
        if i.memory_base() == Register::BP && self.mode == Mode::Bits16 {
            r.gpr[5] &= 0xffff;
        }
    }

    /// Small indexes, some of them beyond the scratch area; masks with about half of the elements on.
    fn vector_indexes(&self, r: &mut Regs, rng: &mut Rng) {
        let i = &self.insn;
        let index = vector(i.memory_index());
        let wide = i.is_vsib64();
        let far = rng.below(8) == 0;
        let mut words = [0u64; 4];
        for w in &mut words {
            let mut one = || {
                let v = rng.below(512) as i64 - 256;
                if far && rng.below(4) == 0 { v * 0x4_0000 } else { v }
            };
            *w = if wide { one() as u64 } else { one() as u32 as u64 | (one() as u32 as u64) << 32 };
        }
        set_vector(r, index, words);
        let mask = vector(i.op_register(2));
        let bytes = i.memory_size().size().max(4);
        let mut words = [0u64; 4];
        for w in &mut words {
            let bits = if bytes == 8 { [63, 63] } else { [31, 63] };
            *w = rng.next() & 0x7fff_ffff_7fff_ffff;
            for b in bits {
                if rng.below(4) != 0 {
                    *w |= 1 << b;
                }
            }
        }
        set_vector(r, mask, words);
    }

    /// What memory must hold for the instruction to come back.
    pub fn prepare_memory(&self, r: &Regs, mem: &mut [u8]) {
        let to = self.mode.rip() + (self.bytes.len() + TAKEN) as u64;
        let mut put = |at: u64| {
            let base = if self.mode == Mode::Bits16 { 0 } else { SCRATCH };
            let at = at.wrapping_sub(base) as usize;
            for (to, b) in mem.iter_mut().skip(at).zip(to.to_le_bytes()) {
                *to = b;
            }
        };
        if self.insn.flow_control() == FlowControl::Return {
            put(r.gpr[4]);
        }
        let at = self.address(r).map(|a| if self.mode == Mode::Bits16 { a.wrapping_sub(SCRATCH) } else { a });
        if let Some(at) = at
            && self.is_indirect()
        {
            put(at);
        }
        // AMD's MXCSR has a bit more.
        if matches!(self.insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr)
            && let Some(a) = self.address(r).and_then(|a| usize::try_from(a.wrapping_sub(SCRATCH)).ok())
            && let Some(b) = mem.get_mut(a.saturating_add(2))
        {
            *b &= !2;
        }
    }

    /// The linear address of the memory operand.
    #[must_use]
    pub fn address(&self, r: &Regs) -> Option<u64> {
        if !self.has_memory() {
            return None;
        }
        let base = if self.mode == Mode::Bits16 { SCRATCH } else { 0 };
        let n = (0..self.insn.op_count()).find(|&n| self.insn.op_kind(n) == OpKind::Memory)?;
        let of = |reg: Register, _, _| {
            Some(if reg.is_segment_register() {
                base
            } else {
                mask_to(number(reg).map_or(0, |n| r.gpr[n]), reg.size())
            })
        };
        self.insn.virtual_address(n, 0, of)
    }
}

fn mask_to(v: u64, bytes: usize) -> u64 {
    if bytes >= 8 { v } else { v & ((1 << (8 * bytes)) - 1) }
}

/// Number of a vector register.
fn vector(r: Register) -> usize {
    let first = if r.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    (r as usize).wrapping_sub(first as usize) & 15
}

fn set_vector(r: &mut Regs, n: usize, words: [u64; 4]) {
    let [a, b, c, d] = words.map(u128::from);
    r.set_xmm(n, a | b << 64);
    r.high[n] = c | d << 64;
}
