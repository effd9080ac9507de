//! The x87 instructions: what each opcode is, and its computation on the guest's state.
//!
//! An instruction that computes runs on the host's own x87 unit (see [`super::host`]) with the guest's registers, tags,
//! control word and flags, so precision, rounding, NaNs, stack faults, condition codes and the responses to unmasked
//! exceptions are the processor's. The rest (control and environment) is done here. On hosts that are not x86-64 `soft` has
//! its place.

use twofold_arch::fpu::{fcw, fsw};
use twofold_arch::{CcOp, CpuState};

use crate::fpu::host;

/// What an instruction does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the instructions' own names
pub enum Kind {
    /// FNENI, FNDISI, FNSETPM: nothing since the 387.
    Nop,
    Init,
    ClearExceptions,
    StoreStatus,
    StoreControl,
    LoadControl,
    LoadEnv,
    StoreEnv,
    Restore,
    Save,
    /// Anything on the register stack.
    Compute {
        /// Size of the memory operand.
        bytes: usize,
        /// Whether the memory operand is written, not read.
        stores: bool,
    },
}

/// A decoded instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Insn {
    /// What it does.
    pub kind: Kind,
    /// Whether a pending exception raises #MF first.
    pub waits: bool,
}

/// The instruction of an opcode (first byte & 7 << 8 | ModRM); `None` when there is none.
#[must_use]
pub fn decode(opcode: u16, memory: bool) -> Option<Insn> {
    let (first, modrm) = (opcode >> 8 & 7, opcode as u8);
    let kind = if memory { decode_memory(first, modrm >> 3 & 7)? } else { decode_register(first, modrm)? };
    let waits = !matches!(
        kind,
        Kind::Nop
            | Kind::Init
            | Kind::ClearExceptions
            | Kind::StoreStatus
            | Kind::StoreControl
            | Kind::StoreEnv
            | Kind::Save
    );
    Some(Insn { kind, waits })
}

fn decode_memory(first: u16, reg: u8) -> Option<Kind> {
    let load = |bytes| Kind::Compute { bytes, stores: false };
    let store = |bytes| Kind::Compute { bytes, stores: true };
    Some(match (first, reg) {
        (0 | 2, _) | (1 | 3, 0) => load(4),
        (1, 2 | 3) | (3, 1..=3) => store(4),
        (1, 4) => Kind::LoadEnv,
        (1, 5) => Kind::LoadControl,
        (1, 6) => Kind::StoreEnv,
        (1, 7) => Kind::StoreControl,
        (3, 5) | (7, 4) => load(10),
        (3, 7) | (7, 6) => store(10),
        (4, _) | (5, 0) | (7, 5) => load(8),
        (5, 1..=3) | (7, 7) => store(8),
        (5, 4) => Kind::Restore,
        (5, 6) => Kind::Save,
        (5, 7) => Kind::StoreStatus,
        (6, _) | (7, 0) => load(2),
        (7, 1..=3) => store(2),
        _ => return None,
    })
}

fn decode_register(first: u16, modrm: u8) -> Option<Kind> {
    let exists = match first {
        0 | 4 => true,
        1 => matches!(modrm, 0xc0..=0xd0 | 0xd8..=0xe1 | 0xe4 | 0xe5 | 0xe8..=0xee | 0xf0..=0xff),
        2 => matches!(modrm, 0xc0..=0xdf | 0xe9),
        3 => matches!(modrm, 0xc0..=0xe4 | 0xe8..=0xf7),
        5 => matches!(modrm, 0xc0..=0xef),
        6 => matches!(modrm, 0xc0..=0xd7 | 0xd9 | 0xe0..=0xff),
        _ => matches!(modrm, 0xc0..=0xe0 | 0xe8..=0xf7),
    };
    let compute = Kind::Compute { bytes: 0, stores: false };
    exists.then_some(match (first, modrm) {
        (3, 0xe0 | 0xe1 | 0xe4) => Kind::Nop,
        (3, 0xe2) => Kind::ClearExceptions,
        (3, 0xe3) => Kind::Init,
        (7, 0xe0) => Kind::StoreStatus,
        _ => compute,
    })
}

/// The status word with ES and B as its flags and the masks have it.
#[must_use]
pub fn summarised(status: u16, control: u16) -> u16 {
    let status = status & !(fsw::ES | fsw::B);
    if status & fsw::EXCEPTIONS & !control != 0 { status | fsw::ES | fsw::B } else { status }
}

/// FNINIT.
pub fn init(s: &mut CpuState) {
    (s.fcw, s.fsw, s.ftw, s.fop) = (fcw::INIT, 0, 0, 0);
    (s.fip, s.fdp, s.fcs, s.fds) = (0, 0, 0, 0);
}

/// FNCLEX.
pub fn clear_exceptions(s: &mut CpuState) {
    s.fsw &= !(fsw::EXCEPTIONS | fsw::SF | fsw::ES | fsw::B);
}

/// What FNSTENV does after storing.
pub fn mask_all(s: &mut CpuState) {
    s.fcw |= fcw::MASKS;
    s.fsw = summarised(s.fsw, s.fcw);
}

/// FLDCW; also the control word of an environment or save area.
pub fn load_control(s: &mut CpuState, value: u16) {
    s.fcw = value & fcw::DEFINED | fcw::FIXED1;
    s.fsw = summarised(s.fsw, s.fcw);
}

/// The outcome of a computing instruction, before it is made the guest's.
#[derive(Clone, Debug)]
pub struct Done {
    registers: host::Registers,
    flags: Option<u64>,
    /// Whether a store's operand has been produced (not after an unmasked exception that forbids it).
    pub stored: bool,
}

impl Done {
    /// Makes it the guest's state.
    pub fn commit(self, s: &mut CpuState) {
        let r = self.registers;
        (s.fpr, s.ftw) = (r.fpr, r.ftw);
        // Flags are sticky; the host ran without the old ones.
        let status = r.fsw | s.fsw & (fsw::EXCEPTIONS | fsw::SF);
        s.fsw = summarised(status, s.fcw);
        if let Some(f) = self.flags {
            s.cc_op = CcOp::FLAGS.0.into();
            s.cc_src = f;
        }
    }
}

/// Whether the instruction is FCOMI, FUCOMI, FCOMIP or FUCOMIP, which set EFLAGS.
fn sets_flags(first: u16, modrm: u8) -> bool {
    matches!((first, modrm), (3 | 7, 0xe8..=0xf7))
}

/// Runs a computing instruction on a copy of the x87 state. `operand` is the memory operand, read or written.
#[must_use]
pub fn compute(s: &CpuState, opcode: u16, memory: bool, operand: &mut [u8; 16]) -> Done {
    let (first, modrm) = (opcode >> 8 & 7, opcode as u8);
    let registers = host::Registers {
        fpr: s.fpr,
        fcw: s.fcw,
        // Old flags would trap in the host when unmasked; they are put back in `commit`.
        fsw: s.fsw & !(fsw::EXCEPTIONS | fsw::SF | fsw::ES | fsw::B),
        ftw: s.ftw,
    };
    let (registers, flags) = host::run(registers, first, modrm, memory, s.rflags(), operand);
    let unmasked = registers.fsw & fsw::EXCEPTIONS & !s.fcw;
    Done {
        registers,
        flags: (!memory && sets_flags(first, modrm)).then_some(flags & twofold_arch::control::rflags::ARITH),
        stored: unmasked & !fsw::PE == 0,
    }
}
