//! x87, MXCSR and save-area definitions, and the words in which translated code hands such instructions to their helpers.

/// Bits of the x87 status word (SDM Vol 1, "x87 FPU Status Register").
pub mod fsw {
    #![allow(missing_docs)]
    pub const IE: u16 = 1 << 0;
    pub const DE: u16 = 1 << 1;
    pub const ZE: u16 = 1 << 2;
    pub const OE: u16 = 1 << 3;
    pub const UE: u16 = 1 << 4;
    pub const PE: u16 = 1 << 5;
    pub const SF: u16 = 1 << 6;
    pub const ES: u16 = 1 << 7;
    pub const C0: u16 = 1 << 8;
    pub const C1: u16 = 1 << 9;
    pub const C2: u16 = 1 << 10;
    pub const TOP_SHIFT: u16 = 11;
    pub const TOP: u16 = 7 << 11;
    pub const C3: u16 = 1 << 14;
    pub const B: u16 = 1 << 15;
    /// IE to PE.
    pub const EXCEPTIONS: u16 = 0x3f;
    /// C0 to C3.
    pub const CC: u16 = C0 | C1 | C2 | C3;
}

/// Fields of the x87 control word.
pub mod fcw {
    #![allow(missing_docs)]
    pub const MASKS: u16 = 0x3f;
    pub const PC: u16 = 3 << 8;
    pub const RC: u16 = 3 << 10;
    /// Bits that FLDCW stores; bit 6 reads as 1.
    pub const DEFINED: u16 = 0x1f3f;
    /// Reads as 1.
    pub const FIXED1: u16 = 0x40;
    /// After FNINIT.
    pub const INIT: u16 = 0x37f;
}

/// Fields of MXCSR (SDM Vol 1, "MXCSR Control and Status Register").
pub mod mxcsr {
    #![allow(missing_docs)]
    pub const FLAGS: u32 = 0x3f;
    pub const DAZ: u32 = 1 << 6;
    pub const MASKS: u32 = 0x1f80;
    pub const RC: u32 = 3 << 13;
    pub const FTZ: u32 = 1 << 15;
    /// Bits that may be 1; also the MXCSR_MASK field of a save area.
    pub const DEFINED: u32 = 0xffff;
    /// After reset and FNINIT-like initialisation by XRSTOR.
    pub const INIT: u32 = 0x1f80;
}

/// The `form` argument of `Helper::SaveState` and `Helper::RestoreState`: a kind, and bits.
///
/// The helpers take the rest from the state: code size and CPL from `tb_flags`, requested features from EDX:EAX.
pub mod area {
    /// The kind: one of the next five.
    pub const KIND: u64 = 7;
    /// FXSAVE, FXRSTOR: #GP(0) unless 16-byte aligned.
    pub const FXSAVE: u64 = 0;
    /// XSAVE, XRSTOR (standard form; XRSTOR takes the compacted form too). Like the following: #UD unless
    /// CR4.OSXSAVE, #NM for CR0.TS, #GP(0) unless 64-byte aligned.
    pub const XSAVE: u64 = 1;
    /// XSAVEOPT.
    pub const XSAVEOPT: u64 = 2;
    /// XSAVEC.
    pub const XSAVEC: u64 = 3;
    /// XSAVES, XRSTORS: CPL 0 only.
    pub const XSAVES: u64 = 4;
    /// REX.W: 64-bit instruction and operand pointers.
    pub const WIDE: u64 = 1 << 3;
    /// The operand goes through SS.
    pub const STACK: u64 = 1 << 4;
}

/// The first argument of `Helper::X87Do`, an instruction on the host's x87 unit.
///
/// Its result is what the instruction stores (of ten bytes the low eight; all of them are in `CpuState::x87_operand`), the
/// status word for FNSTSW, the flags for FCOMI and its kin. The next arguments are the memory operand's low eight bytes and the rest;
/// for FCMOVcc the first is the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct X87Op(pub u16);

/// What an x87 instruction has to do with memory or the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum X87Operand {
    /// Nothing.
    None,
    /// Loads that many bytes.
    Load(u8),
    /// Stores that many bytes.
    Store(u8),
    /// FNSTSW AX.
    Status,
    /// FCMOVcc: reads CF, ZF, PF.
    ReadsFlags,
    /// FCOMI and its kin: write all arithmetic flags.
    WritesFlags,
}

impl X87Op {
    const MEMORY: u16 = 1 << 11;
    /// FNSTSW AX.
    pub const STATUS: X87Op = X87Op(0x7e0);

    /// The instruction with an opcode (first byte & 7 << 8 | ModRM); of the memory forms only ModRM's `reg` counts.
    #[must_use]
    pub const fn new(opcode: u16, memory: bool) -> Self {
        Self(opcode & 0x7ff | if memory { Self::MEMORY } else { 0 })
    }
    /// Whether it is a memory form.
    #[must_use]
    pub const fn memory(self) -> bool {
        self.0 & Self::MEMORY != 0
    }
    /// First byte, 0xd8 … 0xdf.
    #[must_use]
    pub const fn first(self) -> u8 {
        0xd8 | (self.0 >> 8 & 7) as u8
    }
    /// The ModRM byte of a register form.
    #[must_use]
    pub const fn modrm(self) -> u8 {
        self.0 as u8
    }
    /// Field `reg` of the ModRM byte.
    #[must_use]
    pub const fn reg(self) -> u8 {
        self.0 as u8 >> 3 & 7
    }
    /// Its operand; `None` for what is not run this way: control, environments, packed decimals, and what does not exist.
    #[must_use]
    pub const fn operand(self) -> Option<X87Operand> {
        use X87Operand as X;
        let (first, modrm, reg) = (self.0 >> 8 & 7, self.modrm(), self.reg());
        if self.memory() {
            return Some(match (first, reg) {
                (0 | 2, _) | (1 | 3, 0) => X::Load(4),
                (1, 2 | 3) | (3, 1..=3) => X::Store(4),
                (3, 5) => X::Load(10),
                (3, 7) => X::Store(10),
                (4, _) | (5, 0) | (7, 5) => X::Load(8),
                (5, 1..=3) | (7, 7) => X::Store(8),
                (6, _) | (7, 0) => X::Load(2),
                (7, 1..=3) => X::Store(2),
                _ => return None,
            });
        }
        Some(match (first, modrm) {
            (0 | 4, 0xc0..)
            | (1, 0xc0..=0xd0 | 0xd8..=0xe1 | 0xe4 | 0xe5 | 0xe8..=0xee | 0xf0..)
            | (2, 0xe9)
            | (3, 0xe2)
            | (5, 0xc0..=0xef)
            | (6, 0xc0..=0xd7 | 0xd9 | 0xe0..)
            | (7, 0xc0..=0xdf) => X::None,
            (2 | 3, 0xc0..=0xdf) => X::ReadsFlags,
            (3 | 7, 0xe8..=0xf7) => X::WritesFlags,
            (7, 0xe0) => X::Status,
            _ => return None,
        })
    }
}

/// The last argument of `Helper::X87`.
pub mod x87 {
    /// Segment register of the memory operand, encoding order.
    pub const SEGMENT: u64 = 7;
    /// There is a memory operand.
    pub const MEMORY: u64 = 1 << 3;
    /// The operand size is 16 bits (form of FLDENV, FSTENV, FSAVE, FRSTOR).
    pub const OPERAND16: u64 = 1 << 4;
}
