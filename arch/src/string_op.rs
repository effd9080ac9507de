//! The packed word that names a string instruction: what the front end passes to the string helpers.
//!
//! One place for both sides: `frontend` packs, `runtime` unpacks. Every 64-bit word unpacks to something valid.

/// Which string instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum StringKind {
    Movs = 0,
    Stos = 1,
    Lods = 2,
    Cmps = 3,
    Scas = 4,
    Ins = 5,
    Outs = 6,
}

/// Its repeat prefix. `Rep` is REPE for CMPS and SCAS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Repeat {
    None = 0,
    Rep = 1,
    Repne = 2,
}

/// A string instruction with everything that its bytes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct StringOp {
    /// The instruction.
    pub kind: StringKind,
    /// Its repeat prefix.
    pub repeat: Repeat,
    /// log2 of the element size in bytes, 0..=3.
    pub log2_bytes: u8,
    /// log2 of the address size in bytes, 1..=3.
    pub log2_addr: u8,
    /// Segment of the source operand (encoding order, 0..6): DS or an override. The destination is always ES.
    pub segment: u8,
}

impl StringOp {
    /// The word: kind 2:0, repeat 5:4, log2 of element size 9:8, log2 of address size 13:12, source segment 18:16.
    #[must_use]
    pub const fn pack(self) -> u64 {
        self.kind as u64
            | (self.repeat as u64) << 4
            | (self.log2_bytes as u64 & 3) << 8
            | (self.log2_addr as u64 & 3) << 12
            | (self.segment as u64 & 7) << 16
    }
    /// The instruction a word names.
    #[must_use]
    pub const fn unpack(word: u64) -> Self {
        let kind = match word & 7 {
            0 => StringKind::Movs,
            1 => StringKind::Stos,
            2 => StringKind::Lods,
            3 => StringKind::Cmps,
            4 => StringKind::Scas,
            5 => StringKind::Ins,
            _ => StringKind::Outs,
        };
        let repeat = match word >> 4 & 3 {
            0 => Repeat::None,
            1 => Repeat::Rep,
            _ => Repeat::Repne,
        };
        let log2_addr = match word >> 12 & 3 {
            0 => 3,
            n => n as u8,
        };
        let segment = match word >> 16 & 7 {
            n @ 0..=5 => n as u8,
            _ => 3,
        };
        Self { kind, repeat, log2_bytes: (word >> 8 & 3) as u8, log2_addr, segment }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_undoes_pack() {
        for kind in [StringKind::Movs, StringKind::Scas, StringKind::Ins, StringKind::Outs] {
            for repeat in [Repeat::None, Repeat::Rep, Repeat::Repne] {
                for (log2_bytes, log2_addr, segment) in [(0, 1, 0), (3, 3, 5), (2, 2, 3)] {
                    let op = StringOp { kind, repeat, log2_bytes, log2_addr, segment };
                    assert_eq!(StringOp::unpack(op.pack()), op);
                }
            }
        }
    }
}
