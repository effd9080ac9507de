//! IR to host code: the quick tier, its code memory, and the interface between translated code and the runtime.
//!
//! Place in the pipeline: after the IR's passes. [`Compiler`] turns a block into a [`CompiledTb`] (position-independent
//! bytes, on any thread); [`CodeMemory`] installs it and chains it; [`enter`] runs it and says how it left ([`Leave`]).
//!
//! Invariants: code memory is never writable and executable in one mapping; a fault leaves by an assembly thunk, so no
//! Rust frame is skipped; guest state is exact at every call out of translated code.
//!
//! On hosts other than x86-64 the crate compiles and [`available`] says no: everything runs in the evaluator.

mod abi;
mod assemble;
mod code;
mod compiler;
mod direct;
mod disasm;
mod emit;
mod layout;
mod lower;
mod native;
mod origin;
pub mod perf;
mod region;
mod stored;
mod thunk;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
mod thunks;
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
#[path = "thunks_none.rs"]
mod thunks;

pub use abi::{AccessKind, HelperFn, HelperTable, Leave, LookupFn, MemFn, MemInfo, portable_vec_ops};
pub use code::{CodeFull, CodeMemory, CodeStats, InstalledTb, SlotRef};
pub use compiler::{CompileError, CompileStats, CompiledTb, Compiler, Emitter, Options, Probe};
pub use direct::DirectEmitter;
pub use disasm::{HostInsn, HostPiece, disassemble};
pub use origin::Role;
pub use region::{Counter, Guard, REGION_SLOTS, RegionCompiler};
pub use stored::host_instructions;
pub use thunks::{available, enter};
