//! The VM-exit instruction-information field (SDM Vol 3C, "Information for VM Exits Due to Instruction Execution").
//!
//! One builder serves all of the SDM's tables: an operand that an instruction does not have leaves its bits 0 (the SDM
//! calls them undefined). INS/OUTS and the memory operands of VMX instructions share the positions of address size and
//! segment; reg1 (6:3), the register flag (10) and reg2 (31:28) or the identity (29:28) are where the tables put them.

/// The parts of an instruction-information field.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InstructionInfo {
    /// log2 of the index scale, 0 … 3.
    pub scaling: u8,
    /// Bits 6:3: the register operand, where bit 10 says there is one instead of memory; RDRAND's destination.
    pub reg1: u8,
    /// 0: 16 bits, 1: 32, 2: 64.
    pub address_size: u8,
    /// Bit 10: the operand is a register.
    pub register: bool,
    /// Bits 12:11. LIDT and so on: 0 is 16 bits, 1 is 32. RDRAND and so on: 0 is 16 bits, 1 is 32, 2 is 64.
    pub operand_size: u8,
    /// Segment register by encoding.
    pub segment: u8,
    /// Index register.
    pub index: Option<u8>,
    /// Base register.
    pub base: Option<u8>,
    /// Bits 31:28: the second register, or the instruction's identity in bits 29:28.
    pub reg2: u8,
}

impl InstructionInfo {
    /// The field.
    #[must_use]
    pub const fn encode(&self) -> u32 {
        let mut v = (self.scaling & 3) as u32
            | ((self.reg1 & 15) as u32) << 3
            | ((self.address_size & 7) as u32) << 7
            | (self.register as u32) << 10
            | ((self.operand_size & 3) as u32) << 11
            | ((self.segment & 7) as u32) << 15
            | ((self.reg2 & 15) as u32) << 28;
        v |= match self.index {
            Some(r) => ((r & 15) as u32) << 18,
            None => 1 << 22,
        };
        v |= match self.base {
            Some(r) => ((r & 15) as u32) << 23,
            None => 1 << 27,
        };
        v
    }
}

/// Bits 29:28 for LGDT, LIDT, SGDT, SIDT.
pub mod table_identity {
    #![allow(missing_docs)]
    pub const SGDT: u8 = 0;
    pub const SIDT: u8 = 1;
    pub const LGDT: u8 = 2;
    pub const LIDT: u8 = 3;
}

/// Bits 29:28 for LLDT, LTR, SLDT, STR.
pub mod segment_identity {
    #![allow(missing_docs)]
    pub const SLDT: u8 = 0;
    pub const STR: u8 = 1;
    pub const LLDT: u8 = 2;
    pub const LTR: u8 = 3;
}
