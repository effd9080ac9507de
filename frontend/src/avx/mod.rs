//! AVX, AVX2, FMA and F16C instructions that have no legacy encoding.
//!
//! Place: families of [`crate::table`]. VEX forms of SSE instructions are rows of [`crate::sse`], whose operands and shapes
//! are used here too. Which feature a form belongs to, the table takes from the decoder.

use iced_x86::Mnemonic;
use twofold_arch::Loc;

use crate::table::Row;
use crate::translator::Translator;

pub mod arith;
pub mod memory;
pub mod permute;

/// Rows by mnemonic.
pub const ROWS: &[Row] = &[Row::vex(Mnemonic::Vzeroupper, zero_upper), Row::vex(Mnemonic::Vzeroall, zero_all)];

/// `shape: Vmnemonic = Op…;` makes rows that call `shape(t, VecOp::Op)`.
macro_rules! op_rows {
    ($name:ident; $($emit:ident: $($m:ident = $op:ident)*;)*) => {
        const $name: &[$crate::table::Row] = &[$($(
            $crate::table::Row::vex(iced_x86::Mnemonic::$m, |t| $emit(t, twofold_ir::VecOp::$op)),
        )*)*];
    };
}
pub(crate) use op_rows;

/// Registers that the mode has.
fn registers(t: &Translator<'_>) -> u8 {
    if t.is64() { 16 } else { 8 }
}

fn zero_upper(t: &mut Translator<'_>) {
    let zero = t.splat64(0);
    for n in 0..registers(t) {
        t.b.put(Loc::ymm_high(n), zero);
    }
}

fn zero_all(t: &mut Translator<'_>) {
    let zero = t.splat64(0);
    for n in 0..registers(t) {
        t.b.put(Loc::xmm(n), zero);
        t.b.put(Loc::ymm_high(n), zero);
    }
}
