//! AES, PCLMULQDQ, GFNI and SHA instructions.

use crate::sse::{binary, binary_imm, by_mask, rows, unary, unary_imm};
use crate::table::Row;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;

rows! { BY_OP;
    Aes binary: Aesenc/Vaesenc Aesenclast/Vaesenclast Aesdec/Vaesdec Aesdeclast/Vaesdeclast;
    Aes unary: Aesimc/Vaesimc;
    Aes unary_imm: Aeskeygenassist/Vaeskeygenassist;
    Pclmulqdq binary_imm: Pclmulqdq/Vpclmulqdq;
    Gfni binary: Gf2p8mulb/Vgf2p8mulb;
    Gfni binary_imm: Gf2p8affineqb/Vgf2p8affineqb Gf2p8affineinvqb/Vgf2p8affineinvqb;
    Sha binary: Sha1nexte Sha1msg1 Sha1msg2 Sha256msg1 Sha256msg2;
    Sha binary_imm: Sha1rnds4;
    Sha by_mask: Sha256rnds2;
}
