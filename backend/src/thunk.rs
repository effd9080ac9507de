//! The thunks by number: what each does, and its number in the order of the assembly.
//!
//! Place in the pipeline: `lower` and `assemble` name them, `thunks` defines them, `code` knows where they lie.

use twofold_arch::CodeSize;
use twofold_ir::MemFlags;

use crate::abi::{AccessKind, MemInfo};

/// A thunk by its number: the order in the assembly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Thunk(u16);

/// Slots of eight bytes above the return address of a block, for values that have no register: `thunks::enter` reserves them.
pub(crate) const SPILLS: usize = 32;

/// Log2 sizes × {load, store} of one (mode, stack, full) group of probing thunks.
const PROBES_PER_GROUP: u16 = 10;
const FIRST_PROBE: u16 = 38;
/// How many there are.
pub(crate) const THUNKS: u16 = FIRST_PROBE + 3 * 2 * 2 * PROBES_PER_GROUP;

impl Thunk {
    /// Far jump through the jump cache; the RIP is in RSI.
    pub const INDIRECT: Thunk = Thunk(15);
    /// Leave with `Helped`.
    pub const HELPED: Thunk = Thunk(16);

    const fn sized(base: u16, size: CodeSize) -> Self {
        Self(base + size as u16)
    }
    /// What a slot's exit stub calls.
    pub const fn unlinked(size: CodeSize) -> Self {
        Self::sized(0, size)
    }
    /// Leave with `Budget`; RSI: page offset, instructions to give back in bits 31:16.
    pub const fn budget(size: CodeSize) -> Self {
        Self::sized(3, size)
    }
    /// Leave with `Dispatch`; RSI: RIP minus `rip_base`.
    pub const fn dispatch(size: CodeSize) -> Self {
        Self::sized(6, size)
    }
    /// Leave with `Raise`; RSI: page offset, vector in bits 23:16, has-error in bit 24; RDX: error; RCX: CR2.
    pub const fn raise(size: CodeSize) -> Self {
        Self::sized(9, size)
    }
    /// Jump through the jump cache; RSI: RIP minus `rip_base`.
    pub const fn far(size: CodeSize) -> Self {
        Self::sized(12, size)
    }
    /// Call a helper; RSI: its byte offset in the table, RDX, RCX, R8, R9: arguments.
    pub const fn helper(full: bool) -> Self {
        Self(17 + full as u16)
    }
    /// RAX = condition RSI.
    pub const fn cond(full: bool) -> Self {
        Self(19 + full as u16)
    }
    /// RAX = the six flags.
    pub const fn flags(full: bool) -> Self {
        Self(21 + full as u16)
    }
    /// Slow access; RSI: address, RDX: `MemInfo`, RCX, R8: operands, or XMM0 for 16 bytes. The result of a load in RAX or
    /// XMM0; of an atomic access, where its old value is.
    pub const fn slow(kind: AccessKind, vector: bool, full: bool) -> Self {
        match (kind, vector) {
            (AccessKind::Load, false) => Self(23 + full as u16),
            (AccessKind::Store, false) => Self(25 + full as u16),
            (AccessKind::Rmw(_) | AccessKind::CmpXchg, _) => Self(27 + full as u16),
            (AccessKind::Load, true) => Self(29),
            (AccessKind::Store, true) => Self(30),
        }
    }
    /// XMM0 = vector op RSI (number, immediate in bits 23:16) of XMM0, XMM1, XMM2.
    pub const VEC_EVAL: Thunk = Thunk(31);
    /// What the exit stub of a slot calls whose target may only be reached through the jump cache.
    pub const fn slot_far(size: CodeSize) -> Self {
        Self::sized(32, size)
    }
    /// Brings the x87 registers into the host's unit, if they are not there.
    pub const fn x87_ready(full: bool) -> Self {
        Self(35 + full as u16)
    }
    /// RAX = RSI + RDX: for a sum in cold code, which Cranelift would otherwise compute on the hot way and keep.
    pub const SUM: Thunk = Thunk(37);
    /// Probe and access; RSI: address, RDX or XMM0: what to store; the result in RAX or XMM0. RAX, RDX and for a store RCX
    /// are clobbered. `None` for accesses that no thunk does.
    pub const fn probe(info: MemInfo, full: bool) -> Option<Self> {
        let (log2, flags, mode) = (info.log2_bytes(), info.flags(), info.mode());
        let store = match info.kind() {
            AccessKind::Load => 0,
            AccessKind::Store => 1,
            _ => return None,
        };
        if flags.0 & !MemFlags::STACK.0 != 0 || log2 > 4 {
            return None;
        }
        let group = (mode as u16 * 2 + flags.0 as u16) * 2 + full as u16;
        Some(Self(FIRST_PROBE + group * PROBES_PER_GROUP + store * 5 + log2 as u16))
    }
    /// Index in the list of offsets that `thunks::image` gives.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
    /// The thunk of that index.
    pub const fn from_index(i: usize) -> Self {
        Self(i as u16)
    }
    /// A name for profiles and disassembly.
    pub fn name(self) -> String {
        const FIXED: [&str; FIRST_PROBE as usize] = [
            "unlinked16",
            "unlinked32",
            "unlinked64",
            "budget16",
            "budget32",
            "budget64",
            "dispatch16",
            "dispatch32",
            "dispatch64",
            "raise16",
            "raise32",
            "raise64",
            "far16",
            "far32",
            "far64",
            "indirect",
            "helped",
            "helper",
            "helper_full",
            "cond",
            "cond_full",
            "flags",
            "flags_full",
            "slow_load",
            "slow_load_full",
            "slow_store",
            "slow_store_full",
            "slow_atomic",
            "slow_atomic_full",
            "slow_load_vec",
            "slow_store_vec",
            "vec_eval",
            "slot_far16",
            "slot_far32",
            "slot_far64",
            "x87_ready",
            "x87_ready_full",
            "sum",
        ];
        let i = self.0;
        if let Some(name) = FIXED.get(i as usize) {
            return format!("thunk_{name}");
        }
        let (g, n) = ((i - FIRST_PROBE) / PROBES_PER_GROUP, (i - FIRST_PROBE) % PROBES_PER_GROUP);
        format!(
            "thunk_{}{}{}_mode{}{}",
            if n < 5 { "load" } else { "store" },
            8 << (n % 5),
            if g & 2 != 0 { "_stack" } else { "" },
            g >> 2,
            if g & 1 != 0 { "_full" } else { "" },
        )
    }
}
