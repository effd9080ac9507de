//! AES, PCLMULQDQ and SHA instructions.

use twofold_arch::Loc;
use twofold_ir::{Ty, VecOp};

use crate::sse::{binary, binary_imm, rows, unary, unary_imm};
use crate::table::Row;
use crate::translator::Translator;

/// Rows whose op has the mnemonic's name.
pub const ROWS: &[Row] = BY_OP;

rows! { BY_OP;
    Aes binary: Aesenc Aesenclast Aesdec Aesdeclast;
    Aes unary: Aesimc;
    Aes unary_imm: Aeskeygenassist;
    Pclmulqdq binary_imm: Pclmulqdq;
    Sha binary: Sha1nexte Sha1msg1 Sha1msg2 Sha256msg1 Sha256msg2;
    Sha binary_imm: Sha1rnds4;
    Sha by_xmm0: Sha256rnds2;
}

/// `op xmm, xmm/m128` with XMM0 for a third operand.
fn by_xmm0(t: &mut Translator<'_>, op: VecOp) {
    let a = t.xmm(0);
    let b = t.xmm_or_aligned(1);
    let c = t.b.get(Ty::V128, Loc::xmm(0));
    let v = t.b.vec(op, 0, &[a, b, c]);
    t.put_xmm(0, v);
}
