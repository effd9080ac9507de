//! The state that shapes a translation besides its bytes. Each bit says what emitted code it changes.

/// Size of the code segment: default operand and address size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit code: real mode, virtual-8086, or CS.D = 0.
    Bits16 = 0,
    /// 32-bit code: CS.D = 1.
    Bits32 = 1,
    /// 64-bit code: CS.L = 1 in IA-32e mode.
    Bits64 = 2,
}

/// Which softmmu table a translation's data accesses use. Numbers index `CpuState::tlb`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum MemMode {
    /// CPL 3.
    User = 0,
    /// CPL < 3 with SMAP not enforced (RFLAGS.AC = 1, or CR4.SMAP = 0).
    SupervisorAc = 1,
    /// CPL < 3 with SMAP enforced: explicit access to user pages faults.
    Supervisor = 2,
}

/// The key bits of a translation block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct TbFlags(pub u32);

impl TbFlags {
    /// Bits 1:0, [`CodeSize`]: decoding, operand and address sizes, RIP truncation.
    pub const SIZE: u32 = 0b11;
    /// Bits 3:2, CPL: privilege checks.
    pub const CPL_SHIFT: u32 = 2;
    /// Bits 5:4, [`MemMode`]: which TLB table is probed.
    pub const MEM_SHIFT: u32 = 4;
    /// SS.B: stack pointer size outside 64-bit mode.
    pub const SS32: u32 = 1 << 6;
    /// CR0.PE = 1 and RFLAGS.VM = 0: instructions that #UD in real mode exist.
    pub const PROTECTED: u32 = 1 << 7;
    /// RFLAGS.VM: virtual-8086 mode.
    pub const VM86: u32 = 1 << 8;
    /// RFLAGS.TF: one instruction per block, a debug trap after it.
    pub const TF: u32 = 1 << 9;
    /// One instruction only (interrupt shadow, exact stepping); no chaining out.
    pub const ONE_INSN: u32 = 1 << 10;
    /// CR0.EM or CR0.TS: x87 raises #NM.
    pub const X87_NM: u32 = 1 << 11;
    /// CR0.MP and CR0.TS: WAIT raises #NM.
    pub const WAIT_NM: u32 = 1 << 12;
    /// CR0.EM, or CR4.OSFXSR = 0: SSE raises #UD.
    pub const SSE_UD: u32 = 1 << 13;
    /// CR0.TS: SSE raises #NM. MMX uses `X87_NM` for TS and `MMX_UD` for EM.
    pub const TS: u32 = 1 << 14;
    /// CR0.EM: MMX raises #UD.
    pub const MMX_UD: u32 = 1 << 15;
    /// CR4.OSXSAVE = 1 and XCR0 has SSE and AVX: VEX instructions run.
    pub const AVX: u32 = 1 << 16;
    /// CR0.AM, RFLAGS.AC and CPL 3: unaligned accesses raise #AC.
    pub const ALIGN_CHECK: u32 = 1 << 17;
    /// Bits 23:18, one per segment register in encoding order: expand-up, usable, readable, writable (CS: readable),
    /// limit 4 GiB, so no limit check is emitted. Never set in 64-bit code (there only FS and GS bases count).
    pub const NOLIMIT_SHIFT: u32 = 18;
    /// Bits 27:24 for ES, CS, SS, DS: base is 0, so no base is added.
    pub const ZERO_BASE_SHIFT: u32 = 24;
    /// SSE exceptions are not all masked in MXCSR: floating point takes the checking path.
    pub const SSE_UNMASKED: u32 = 1 << 28;
    /// 64-bit code under CR4.LA57: near branches take 57-bit targets.
    pub const WIDE_LINEAR: u32 = 1 << 29;
    /// 16-bit code, which `WIDE_LINEAR` does not concern, with EIP above 64 KiB: near branches lead below.
    pub const HIGH_IP: u32 = 1 << 29;
    /// 64-bit code, which `NOLIMIT_SHIFT` does not concern, so near to addresses that are not canonical that a direct branch may
    /// lead to one: such branches look.
    pub const NEAR_EDGE: u32 = 1 << 18;
    /// IA-32e mode is active (64-bit and compatibility mode).
    pub const LONG: u32 = 1 << 30;
    /// All x87 exceptions are masked, none is pending, and the host has an x87 unit: instructions run on it directly.
    pub const X87_HOST: u32 = 1 << 31;

    /// The code size.
    #[must_use]
    pub const fn size(self) -> CodeSize {
        match self.0 & Self::SIZE {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        }
    }
    /// Whether this is 64-bit code.
    #[must_use]
    pub const fn is64(self) -> bool {
        matches!(self.size(), CodeSize::Bits64)
    }
    /// [`TbFlags::HIGH_IP`].
    #[must_use]
    pub const fn high_ip(self) -> bool {
        matches!(self.size(), CodeSize::Bits16) && self.has(Self::HIGH_IP)
    }
    /// [`TbFlags::NEAR_EDGE`].
    #[must_use]
    pub const fn near_edge(self) -> bool {
        self.is64() && self.has(Self::NEAR_EDGE)
    }
    /// The key of the same code at `rip`: with the bits that say where it is.
    #[must_use]
    #[inline]
    pub const fn at(self, rip: u64) -> Self {
        // What a 32-bit displacement reaches, from anywhere in a page.
        const REACH: u64 = (1 << 31) + 0x1000;
        match self.size() {
            CodeSize::Bits32 => self,
            CodeSize::Bits16 if rip > 0xffff => Self(self.0 | Self::HIGH_IP),
            CodeSize::Bits16 => Self(self.0 & !Self::HIGH_IP),
            CodeSize::Bits64 => {
                let half = if self.has(Self::WIDE_LINEAR) { 1 << 56 } else { 1 << 47 };
                // Canonical addresses are in one piece, from 0 to twice `half`.
                let place = rip.wrapping_add(half);
                let edge = place < REACH || place >= 2 * half - REACH;
                Self(self.0 & !Self::NEAR_EDGE | if edge { Self::NEAR_EDGE } else { 0 })
            }
        }
    }
    /// Current privilege level.
    #[must_use]
    pub const fn cpl(self) -> u8 {
        (self.0 >> Self::CPL_SHIFT & 3) as u8
    }
    /// The table of ordinary data accesses.
    #[must_use]
    pub const fn mem_mode(self) -> MemMode {
        match self.0 >> Self::MEM_SHIFT & 3 {
            0 => MemMode::User,
            1 => MemMode::SupervisorAc,
            _ => MemMode::Supervisor,
        }
    }
    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }
    /// Whether segment `seg` (encoding order, 0..6) needs no limit or rights check.
    #[must_use]
    pub const fn no_limit(self, seg: u8) -> bool {
        self.0 >> (Self::NOLIMIT_SHIFT + seg as u32) & 1 != 0
    }
    /// Whether segment `seg` (ES, CS, SS, DS) has base 0; FS and GS never say so.
    #[must_use]
    pub const fn zero_base(self, seg: u8) -> bool {
        seg < 4 && self.0 >> (Self::ZERO_BASE_SHIFT + seg as u32) & 1 != 0
    }
}
