//! SSE4.2 string comparison: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM.

use iced_x86::Mnemonic;
use twofold_ir::{Ty, Value, VecOp};

use crate::sse::operands::Wide;
use crate::sse::plain_rows;
use crate::table::Row;
use crate::translator::Translator;

/// Rows by mnemonic.
pub const ROWS: &[Row] = BY_MNEMONIC;

plain_rows! { BY_MNEMONIC;
    Sse42 compare: Pcmpistri/Vpcmpistri Pcmpistrm/Vpcmpistrm Pcmpestri/Vpcmpestri Pcmpestrm/Vpcmpestrm
        Pcmpestri64/Vpcmpestri64 Pcmpestrm64/Vpcmpestrm64;
}

/// The memory operand need not be aligned. The index goes to ECX, the mask to XMM0; both set the flags.
fn compare(t: &mut Translator<'_>) {
    use Mnemonic::*;
    let m = t.insn.mnemonic();
    let implicit = matches!(m, Pcmpistri | Pcmpistrm | Vpcmpistri | Vpcmpistrm);
    let index = matches!(m, Pcmpistri | Pcmpestri | Pcmpestri64 | Vpcmpistri | Vpcmpestri | Vpcmpestri64);
    let (op, flags_op) = match (implicit, index) {
        (true, true) => (VecOp::PcmpistrIndex, VecOp::PcmpistrFlags),
        (true, false) => (VecOp::PcmpistrMask, VecOp::PcmpistrFlags),
        (false, true) => (VecOp::PcmpestrIndex, VecOp::PcmpestrFlags),
        (false, false) => (VecOp::PcmpestrMask, VecOp::PcmpestrFlags),
    };
    let a = t.xmm(0);
    let b = t.xmm_or_part(1, 16);
    let mut args = vec![a, b];
    if !implicit {
        let c = lengths(t);
        args.push(c);
    }
    let imm = t.imm8();
    let result = t.b.vec(op, imm, &args);
    let flags = t.b.vec(flags_op, imm, &args);
    if index {
        t.put_gpr(1, result);
    } else {
        t.put_vector(0, Wide::half(result));
    }
    t.b.set_flags(flags);
}

/// The lengths in rAX and rDX, sign-extended from the operand size.
fn lengths(t: &mut Translator<'_>) -> Value {
    use Mnemonic::*;
    let wide = matches!(t.insn.mnemonic(), Pcmpestri64 | Pcmpestrm64 | Vpcmpestri64 | Vpcmpestrm64);
    let ty = if wide { Ty::I64 } else { Ty::I32 };
    let (a, d) = (t.get_gpr(ty, 0), t.get_gpr(ty, 2));
    let (a, d) = (t.b.sext(Ty::I64, a), t.b.sext(Ty::I64, d));
    t.b.pair(a, d)
}
