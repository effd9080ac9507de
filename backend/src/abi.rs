//! What translated code and the runtime agree on: how code leaves, the table of functions it calls, memory-access words.
//!
//! Place in the pipeline: between `thunks` (assembly) and `runtime`. The layouts are `repr(C)` and known to the assembly.
#![allow(unsafe_code)] // the types of functions that take the state by pointer

use std::sync::atomic::{AtomicU64, Ordering};

use twofold_arch::CpuState;
use twofold_arch::tbflags::MemMode;
use twofold_ir::{Helper, MemFlags, RmwOp, VecOp};

/// How control left translated code. In every case but [`Leave::Fault`], `state.rip` is the RIP of the next guest
/// instruction to execute (of the faulting one for `Raise`) and `state.budget` counts exactly what has retired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// Through a direct exit that is not linked; `tb` is the number given at installation, `slot` indexes its slots.
    Unlinked {
        /// The block's number.
        tb: u32,
        /// Which of its slots.
        slot: u16,
    },
    /// The jump cache has no entry for `state.rip`.
    Lookup,
    /// The budget ran out or somebody wants attention; nothing of the block at `state.rip` has been executed.
    Budget,
    /// A `Dispatch` exit: the key or the event state may have changed.
    Dispatch,
    /// A `Helped` exit: a helper has set `state.rip`.
    Helped,
    /// A `Raise` exit: the exception is in `state.fault` (`pending` = 1).
    Raise,
    /// A helper or memory access set `state.fault.pending`. `state.host_ret` is the return address of the call:
    /// [`crate::CodeMemory::tb_at`] finds the block, [`crate::InstalledTb::insn_at`] the guest instruction.
    /// `state.rip` is not set, and [`crate::InstalledTb::unretired`] has not been given back to the budget.
    Fault,
}

/// Reasons as the thunks return them, in the low byte.
#[cfg_attr(not(all(target_arch = "x86_64", not(portable_host))), allow(dead_code))]
pub(crate) mod reason {
    pub const UNLINKED: u64 = 1;
    pub const LOOKUP: u64 = 2;
    pub const BUDGET: u64 = 3;
    pub const DISPATCH: u64 = 4;
    pub const HELPED: u64 = 5;
    pub const RAISE: u64 = 6;
    pub const FAULT: u64 = 7;
}

impl Leave {
    /// Decodes what translated code returned.
    #[must_use]
    pub fn decode(word: u64) -> Leave {
        match word & 0xff {
            reason::UNLINKED => Leave::Unlinked { tb: (word >> 32) as u32, slot: (word >> 8) as u16 },
            reason::LOOKUP => Leave::Lookup,
            reason::BUDGET => Leave::Budget,
            reason::HELPED => Leave::Helped,
            reason::RAISE => Leave::Raise,
            reason::FAULT => Leave::Fault,
            _ => Leave::Dispatch,
        }
    }
    /// The word an unlinked slot returns.
    pub(crate) fn unlinked_word(tb: u32, slot: u16) -> u64 {
        u64::from(tb) << 32 | u64::from(slot) << 8 | reason::UNLINKED
    }
}

/// What a slow memory access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// Returns the value zero-extended; 16 bytes in `state.mem_result`.
    Load,
    /// Stores `lo` (its upper bits are not meaningful beyond the size); 16 bytes come in `state.mem_result`.
    Store,
    /// Atomic op with `lo`; returns the old value.
    Rmw(RmwOp),
    /// Atomic compare with `lo`, exchange with `hi`; returns the old value.
    CmpXchg,
}

/// The constant word that goes with a slow memory access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemInfo(pub u64);

impl MemInfo {
    /// Packs the word. Bits 3:0 log2 of the size in bytes, 7:4 kind, 15:8 flags, 17:16 mode, 27:24 atomic op.
    #[must_use]
    pub const fn new(kind: AccessKind, log2_bytes: u8, flags: MemFlags, mode: MemMode) -> Self {
        let (k, op) = match kind {
            AccessKind::Load => (0, 0),
            AccessKind::Store => (1, 0),
            AccessKind::Rmw(op) => (2, op as u64),
            AccessKind::CmpXchg => (3, 0),
        };
        Self(log2_bytes as u64 & 15 | k << 4 | (flags.0 as u64) << 8 | (mode as u64) << 16 | op << 24)
    }
    /// Size in bytes: 1, 2, 4, 8 or 16.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << (self.0 & 7)
    }
    /// Size of what is checked: 32 for the first half of such an access.
    #[must_use]
    pub const fn checked_bytes(self) -> u32 {
        self.flags().checked_bytes(self.bytes())
    }
    /// log2 of the size in bytes.
    #[must_use]
    pub const fn log2_bytes(self) -> u8 {
        self.0 as u8 & 7
    }
    /// What the access does.
    #[must_use]
    pub const fn kind(self) -> AccessKind {
        const OPS: [RmwOp; 8] =
            [RmwOp::Add, RmwOp::Sub, RmwOp::And, RmwOp::Or, RmwOp::Xor, RmwOp::Xchg, RmwOp::Xchg, RmwOp::Xchg];
        match self.0 >> 4 & 15 {
            0 => AccessKind::Load,
            1 => AccessKind::Store,
            2 => AccessKind::Rmw(OPS[(self.0 >> 24 & 7) as usize]),
            _ => AccessKind::CmpXchg,
        }
    }
    /// The IR op's flags.
    #[must_use]
    pub const fn flags(self) -> MemFlags {
        MemFlags((self.0 >> 8) as u8)
    }
    /// Which softmmu table was probed.
    #[must_use]
    pub const fn mode(self) -> MemMode {
        match self.0 >> 16 & 3 {
            0 => MemMode::User,
            1 => MemMode::SupervisorAc,
            _ => MemMode::Supervisor,
        }
    }
}

/// A slow memory access: `(state, linear address, MemInfo, lo, hi) -> result`. One that faults fills `state.fault` with
/// `pending` ≠ 0; its result is then ignored and translated code is left.
pub type MemFn = unsafe extern "C" fn(*mut CpuState, u64, u64, u64, u64) -> u64;

/// A helper: `(state, a0, a1, a2, a3) -> result`. One that faults fills `state.fault` with `pending` ≠ 0.
pub type HelperFn = unsafe extern "C" fn(*mut CpuState, u64, u64, u64, u64) -> u64;

/// The jump cache has no entry for `state.rip`: the host code there with `state.rip_base` set for it, or 0 to leave with
/// [`Leave::Lookup`].
pub type LookupFn = unsafe extern "C" fn(*mut CpuState) -> u64;

type CondFn = unsafe extern "C" fn(*mut CpuState, u64) -> u64;
type VecFn = unsafe extern "C" fn(u64, *mut [u128; 3]);

/// What `state.helpers` points to. The address must stay valid and fixed while translated code may run.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct HelperTable {
    pub(crate) load: MemFn,
    pub(crate) store: MemFn,
    pub(crate) atomic: MemFn,
    pub(crate) cond: CondFn,
    pub(crate) flags: CondFn,
    pub(crate) vec: VecFn,
    pub(crate) lookup: LookupFn,
    pub(crate) helpers: [HelperFn; Helper::ALL.len()],
}

impl HelperTable {
    /// A table of the runtime's functions; `helpers` is indexed by `Helper as usize`.
    #[must_use]
    pub fn new([load, store, atomic]: [MemFn; 3], lookup: LookupFn, helpers: [HelperFn; Helper::ALL.len()]) -> Self {
        Self { load, store, atomic, cond, flags, vec, lookup, helpers }
    }
}

unsafe extern "C" fn cond(state: *mut CpuState, cc: u64) -> u64 {
    // SAFETY: translated code passes the state it was entered with, and holds no other reference to it.
    let s = unsafe { &*state };
    let cc = twofold_arch::CondCode::ALL[(cc & 15) as usize];
    let op = twofold_arch::CcOp(s.cc_op as u8);
    u64::from(twofold_arch::flags::eval_cond(cc, op, s.cc_dst, s.cc_src, s.cc_src2))
}

unsafe extern "C" fn flags(state: *mut CpuState, _: u64) -> u64 {
    // SAFETY: as in `cond`.
    let s = unsafe { &*state };
    twofold_arch::flags::arith_flags(twofold_arch::CcOp(s.cc_op as u8), s.cc_dst, s.cc_src, s.cc_src2)
}

/// How often each vector op ran as a portable function in compiled code.
static PORTABLE: [AtomicU64; VecOp::ALL.len()] = [const { AtomicU64::new(0) }; VecOp::ALL.len()];

/// The vector ops that compiled code had computed by portable functions, with how often, in this process.
#[must_use]
pub fn portable_vec_ops() -> Vec<(&'static str, u64)> {
    let counts = PORTABLE.iter().map(|n| n.load(Ordering::Relaxed));
    VecOp::ALL.iter().map(|op| op.name()).zip(counts).filter(|x| x.1 != 0).collect()
}

/// `what` is the op's number and its immediate in bits 23:16; the result replaces the first operand.
unsafe extern "C" fn vec(what: u64, args: *mut [u128; 3]) {
    // SAFETY: the thunk passes the address of three operands on its own stack.
    let [a, b, c] = unsafe { args.read_unaligned() };
    if let Some(op) = VecOp::from_number(what as u16) {
        PORTABLE[op as usize].fetch_add(1, Ordering::Relaxed);
        let r = twofold_ir::vecop::eval(op, (what >> 16) as u8, a, b, c);
        // SAFETY: as above.
        unsafe { args.cast::<u128>().write_unaligned(r) };
    }
}
