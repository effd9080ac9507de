//! The intermediate representation between guest instructions and host code.
//!
//! Pipeline: `frontend` builds a [`Block`] with a [`Builder`]; the [`passes`] simplify it; the evaluator
//! ([`eval`]) runs it as it is, the back end compiles it. Invariants that [`verify`](mod@verify) checks: SSA (a value is the index of
//! the op that made it, uses follow definitions), operand types as the op table says, one terminal, exits in range.
#![deny(unsafe_code)]

pub mod block;
pub mod builder;
pub mod eval;
pub mod helper;
pub mod names;
pub mod op;
pub mod parse;
pub mod passes;
pub mod softfloat;
pub mod testing;
pub mod text;
pub mod vecop;
pub mod verify;

pub use block::{Block, Exit, GuestInsn, IndirectKind, SideExit};
pub use builder::Builder;
pub use helper::Helper;
pub use op::{BinOp, IntCc, MemFlags, Op, RmwOp, Ty, UnOp, Value};
pub use vecop::VecOp;
