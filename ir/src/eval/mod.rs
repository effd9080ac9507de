//! The evaluator: runs a block without compiling it.
//!
//! Place in the pipeline: after the passes, for blocks that have not run often enough to be worth compiling.
//! [`Program::new`] lowers a block to words for a register machine whose registers are the guest state itself and some
//! temporaries beside it (`lower`, `word`); [`Program::run`] runs them (`run`). [`reference`] runs the ops of a block one
//! by one, slowly: the model that everything else is tested against.

mod env;
pub mod reference;
pub mod scalar;

use twofold_arch::Exception;

pub use env::{Abandon, Env, FILE_BASE, FILE_WORDS, File};

use crate::block::{Block, IndirectKind};

/// Where control goes, with its values resolved. See [`crate::Exit`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Target {
    /// Direct, inside the page: the page offset.
    Jump {
        /// Page offset of the target.
        off: u16,
    },
    /// Direct, to another page.
    JumpFar {
        /// Target RIP minus `rip_base`.
        off: i32,
    },
    /// Indirect.
    Indirect {
        /// The target RIP.
        rip: u64,
        /// Jump, call or return.
        kind: IndirectKind,
    },
    /// To the dispatcher; the caller sets `state.rip` to `rip_base + off`.
    Dispatch {
        /// Next RIP minus `rip_base`.
        off: i32,
    },
    /// To the dispatcher; a helper has set `state.rip`.
    Helped,
    /// Raise an exception.
    Raise {
        /// Page offset of the instruction it is raised at.
        off: u16,
        /// The exception.
        exception: Exception,
    },
}

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Leave {
    /// By a side exit or the terminal.
    Exit {
        /// Where to.
        to: Target,
        /// Index of the side exit in `Block::exits`; their number for the terminal.
        exit: u16,
        /// Guest instructions retired.
        retired: u16,
    },
    /// By a fault, recorded in the guest state.
    Abandoned {
        /// Index of the guest instruction that did not complete: as many were retired before it.
        insn: u16,
    },
}

/// A block made ready to run.
#[derive(Clone, Debug)]
pub struct Program {
    block: Box<Block>,
}

impl Program {
    /// Lowers a block, which must be valid ([`crate::verify`]).
    #[must_use]
    pub fn new(block: &Block) -> Self {
        Self { block: Box::new(block.clone()) }
    }
    /// Runs it.
    pub fn run<E: Env>(&self, env: &mut E) -> Leave {
        reference::run(&self.block, env)
    }
    /// Bytes of memory it takes, for statistics.
    #[must_use]
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.block.ops.len() * 16
    }
}
