//! Masked moves and gathers: elements that are masked off are not accessed, so a helper does each.

use iced_x86::{Mnemonic, Register};
use twofold_arch::vector_op::{Gather, MaskedMove};
use twofold_ir::{BinOp, Helper, Ty, Value};

use crate::sse::operands::number;
use crate::table::Row;
use crate::translator::{Translator, gpr};

/// Rows by mnemonic.
pub const ROWS: &[Row] = &[
    Row::vex(Mnemonic::Vmaskmovps, |t| masked(t, 2)),
    Row::vex(Mnemonic::Vmaskmovpd, |t| masked(t, 3)),
    Row::vex(Mnemonic::Vpmaskmovd, |t| masked(t, 2)),
    Row::vex(Mnemonic::Vpmaskmovq, |t| masked(t, 3)),
    Row::vex(Mnemonic::Vgatherdps, |t| gather(t, 2, 2)),
    Row::vex(Mnemonic::Vpgatherdd, |t| gather(t, 2, 2)),
    Row::vex(Mnemonic::Vgatherdpd, |t| gather(t, 3, 2)),
    Row::vex(Mnemonic::Vpgatherdq, |t| gather(t, 3, 2)),
    Row::vex(Mnemonic::Vgatherqps, |t| gather(t, 2, 3)),
    Row::vex(Mnemonic::Vpgatherqd, |t| gather(t, 2, 3)),
    Row::vex(Mnemonic::Vgatherqpd, |t| gather(t, 3, 3)),
    Row::vex(Mnemonic::Vpgatherqq, |t| gather(t, 3, 3)),
];

/// `op ymm, ymm, m256` or `op m256, ymm, ymm`; the second operand is the mask.
fn masked(t: &mut Translator<'_>, log2_bytes: u8) {
    let store = t.is_mem(0);
    let ea = t.effective_address();
    let data = number(t.insn.op_register(if store { 2 } else { 0 }));
    let word = MaskedMove {
        store,
        wide: t.is_256(),
        log2_bytes,
        data,
        mask: number(t.insn.op_register(1)),
        segment: t.mem_segment(),
        log2_addr: t.b.ty(ea).log2_bytes(),
    };
    let word = t.c64(word.pack());
    t.call(Helper::MaskedMove, &[ea, word]);
}

/// `op ymm, vm32y, ymm`: the helper writes data and mask itself, element by element, so that it goes on after a fault.
fn gather(t: &mut Translator<'_>, log2_bytes: u8, log2_index: u8) {
    let base = base_address(t);
    let word = Gather {
        wide: t.is_256() || t.insn.memory_index().is_ymm(),
        log2_bytes,
        log2_index,
        log2_scale: t.insn.memory_index_scale().trailing_zeros() as u8,
        data: number(t.insn.op_register(0)),
        mask: number(t.insn.op_register(2)),
        index: number(t.insn.memory_index()),
        segment: t.mem_segment(),
        log2_addr: t.b.ty(base).log2_bytes(),
    };
    let word = t.c64(word.pack());
    t.call(Helper::Gather, &[base, word]);
}

/// Base and displacement of a vector-indexed operand, at the address size.
fn base_address(t: &mut Translator<'_>) -> Value {
    let disp = t.insn.memory_displacement64();
    match t.insn.memory_base() {
        Register::None => {
            let ty = if t.insn.memory_displ_size() == 8 { Ty::I64 } else { Ty::I32 };
            t.b.iconst(ty, disp)
        }
        base => {
            let (n, ty, _) = gpr(base);
            let base = t.get_gpr(ty, n);
            t.b.bin_imm(BinOp::Add, base, disp)
        }
    }
}
