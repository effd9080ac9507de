//! What the evaluator needs from whoever runs it: the guest state's words, guest memory, helpers.
//!
//! `runtime` implements [`Env`] on its vCPU, tests on a fake. All methods are meant to inline.

use twofold_arch::{CpuState, Loc};

use crate::helper::Helper;
use crate::op::{MemFlags, RmwOp, Ty};

/// The op faulted, or wants to leave: what happened is in the guest state (`state.fault`). The guest instruction is
/// abandoned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Abandon;

/// Number of words in a [`File`].
pub const FILE_WORDS: usize = 256;

/// Byte offset in `CpuState` of the first word of a [`File`]: just behind `budget` and `attention`, which other threads
/// write.
pub const FILE_BASE: u16 = core::mem::offset_of!(CpuState, rip_base) as u16;

/// The part of the guest state that the evaluator addresses by word: the 256 words of `CpuState` from byte
/// [`FILE_BASE`] on. It holds the registers, the lazy flags, vector registers, segment bases and the evaluator's own
/// temporaries (`CpuState::temps`), so an operand is a one-byte index whichever of them it is.
pub type File = [u64; FILE_WORDS];

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(FILE_BASE == 8);
    assert!(size_of::<CpuState>() >= FILE_BASE as usize + FILE_WORDS * 8);
    assert!(offset_of!(CpuState, temps) + 64 * 8 <= FILE_BASE as usize + FILE_WORDS * 8);
};

/// What the evaluator runs on.
///
/// Integers are passed zero-extended, and must be returned so. Addresses are linear. A memory access that faults changes
/// nothing and returns [`Abandon`]. None of the memory methods changes the words of the file.
pub trait Env {
    /// The words of the guest state from [`FILE_BASE`] on. Must always be the same memory.
    fn file(&mut self) -> &mut File;
    /// Reads an integer field of the guest state outside the file, or one that is not within one aligned word.
    fn get(&mut self, ty: Ty, loc: Loc) -> u64;
    /// Writes an integer field of the guest state outside the file, or one that is not within one aligned word.
    fn put(&mut self, ty: Ty, loc: Loc, v: u64);
    /// Reads guest memory. `ty` is a constant at each call.
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon>;
    /// Reads 16 bytes of guest memory.
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon>;
    /// Writes guest memory; `v` may have bits set above `ty`, which are ignored. `ty` is a constant at each call.
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon>;
    /// Writes 16 bytes of guest memory.
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon>;
    /// Atomic read-modify-write; returns what memory held.
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon>;
    /// Atomic compare and exchange; returns what memory held. Memory is written (with what it held) when it differs.
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon>;
    /// Calls a helper; missing arguments are 0. It may read and change any of the guest state except `temps`.
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon>;
}
