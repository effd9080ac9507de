//! Vector ops on hosts without code for them: each is computed by its portable function.

use twofold_ir::VecOp;

/// Whether the host has CRC32, and PDEP and PEXT.
pub(crate) fn int_features() -> (bool, bool) {
    (false, false)
}

/// Whether the host has LZCNT, TZCNT and POPCNT.
pub(crate) fn bit_counts() -> bool {
    false
}
/// Whether the host has PINSRQ and PEXTRQ.
pub(crate) fn lanes() -> bool {
    false
}

/// Whether the host computes an op.
pub(crate) fn exists(_op: VecOp, _imm: u8) -> bool {
    false
}

/// The code of an op that [`exists`].
pub(crate) fn code(_op: VecOp, _imm: u8) -> Vec<u8> {
    Vec::new()
}
