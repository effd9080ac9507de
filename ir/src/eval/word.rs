//! The words of a lowered block: codes, fields, and the records of exits.
//!
//! A word is `code | d << 8 | a << 16 | b << 24 | imm << 32`. `d`, `a`, `b` index the [`super::File`]; what a code makes of
//! its fields is written at the code. Operands are used modulo the code's width, so a narrow value may sit in a word whose
//! upper bits are anything (`lower` knows when they are zero).

/// Packs a word.
pub(crate) const fn word(code: u8, d: u8, a: u8, b: u8, imm: u32) -> u64 {
    code as u64 | (d as u64) << 8 | (a as u64) << 16 | (b as u64) << 24 | (imm as u64) << 32
}

/// Packs a word with four more byte fields in the place of `imm`.
pub(crate) const fn word_bytes(code: u8, d: u8, a: u8, b: u8, rest: [u8; 4]) -> u64 {
    word(code, d, a, b, u32::from_le_bytes(rest))
}

/// The codes. `x` is the file's word `x`, `imm` the sign-extended immediate, `imm.n` byte `n` of it.
pub(crate) mod code {
    #![allow(missing_docs)]
    macro_rules! list {
        ($($(#[$doc:meta])* $name:ident)*) => {
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            #[repr(u8)]
            enum Number { $($name),* }
            $($(#[$doc])* pub const $name: u8 = Number::$name as u8;)*
            /// Their names, for people.
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];
        };
    }
    list! {
        /// d = a.
        MOV
        /// d = imm, b = imm.
        MOVI
        /// d = the next word.
        MOVX
        /// d = low 8, 16, 32 bits of a.
        ZX8 ZX16 ZX32
        /// d = low 8, 16, 32 bits of a, sign-extended to 64.
        SX8 SX16 SX32
        /// d = low 8, 16 bits of a, sign-extended to 32, zero-extended to 64.
        SX8D SX16D
        /// d = a >> imm.
        EXTRACT
        /// d, d + 1 = a, a + 1.
        MOV128
        /// d, d + 1 = a, b.
        PAIR
        /// d = state field: byte offset imm & 0xffff, type imm.2.
        GETE
        /// State field = a, as GETE.
        PUTE
        /// Low 8, 16, 32 bits of d = a; PUT8H: bits 15:8.
        PUT8 PUT8H PUT16 PUT32
        /// imm.1 bits of d from bit imm.0 on = a.
        PUTN
        /// Low 32 bits of d = imm.
        PUTI32
        /// b bits of d from bit a on = imm.
        PUTIN
        /// cc_src = a, cc_op = b.
        CC
        /// cc_src = imm, cc_op = b.
        CCI
        // Two-operand ops: d = imm.0 = a op b; and with I: d = b = a op imm.
        ADD SUB AND OR XOR MUL SHL SHR SAR ROTL ROTR
        ADD32 SUB32 AND32 OR32 XOR32 MUL32 SHL32 SHR32 SAR32 ROTL32 ROTR32
        ADDI SUBI ANDI ORI XORI MULI SHLI SHRI SARI ROTLI ROTRI
        ADDI32 SUBI32 ANDI32 ORI32 XORI32 MULI32 SHLI32 SHRI32 SARI32 ROTLI32 ROTRI32
        /// d = imm.0 = a + (b << imm.1).
        ADDSHL
        /// Any two-operand op imm.0 of type imm.1.
        BIN
        /// d = any one-operand op imm.0 of type imm.1 of a.
        UN
        /// d = comparison imm.0 of type imm.1.
        CMP
        /// d = comparison b & 15 of type b >> 4 of a and imm.
        CMPI
        /// d = imm.0 (8 bits) != 0 ? a : b.
        SELECT
        SELECT128
        /// d = condition a of the lazy flags.
        COND
        /// d = lazy flags.
        FLAGS
        // Leave when the comparison, of operands shifted left by d, holds: a with b, to exit record imm.
        XEQ XNE XULT XULE XUGT XUGE XSLT XSLE XSGT XSGE
        // Same, a with imm, to exit record b.
        XEQI XNEI XULTI XULEI XUGTI XUGEI XSLTI XSLEI XSGTI XSGEI
        /// Leave when condition a of the lazy flags holds, to exit record imm.
        XCOND
        // d = memory[a + imm], flags b.
        LD8 LD16 LD32 LD64 LD128
        // memory[a + imm] = b, flags d.
        ST8 ST16 ST32 ST64 ST128
        /// d = memory[a]; memory[a] = op imm.0 of type imm.1 of it and b.
        RMW
        /// d = memory[a], compared with b of type imm.1; memory[a] = imm.0 when equal.
        CMPXCHG
        /// d = helper a (b, imm.0, imm.1, imm.2).
        CALL
        /// d = vector op imm.1 | imm.2 << 8, immediate imm.3, of a, b, imm.0: all V128.
        VEC
        /// The same with types as the op's signature says.
        VECX
    }
}

/// A record of an exit, behind the code: `kind | retired << 3 | index << 16 | payload << 32`.
pub(crate) mod record {
    /// Payload: page offset.
    pub const JUMP: u64 = 0;
    /// Payload: signed distance from `rip_base`.
    pub const JUMP_FAR: u64 = 1;
    /// Payload: index of the word with the target, `IndirectKind` in bits 15:8.
    pub const INDIRECT: u64 = 2;
    /// Payload: signed distance from `rip_base`.
    pub const DISPATCH: u64 = 3;
    /// No payload.
    pub const HELPED: u64 = 4;
    /// Payload: page offset, in bits 31:16 the index of the vector in `text::VECTORS`. Two words follow: the error code, with bit 32
    /// set when there is one, and CR2.
    pub const RAISE: u64 = 5;

    /// The most instructions a record can count.
    pub const MAX_RETIRED: u16 = (1 << 13) - 1;
}
