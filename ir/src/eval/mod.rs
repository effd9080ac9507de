//! The evaluator: runs a block without compiling it.
//!
//! Place in the pipeline: after the passes, for blocks that have not run often enough to be worth compiling.
//! [`Program::new`] lowers a block to words for a register machine whose registers are the guest state itself and some
//! temporaries beside it (`lower`, `word`); [`Program::run`] runs them (`run`). [`reference`] runs the ops of a block one
//! by one, slowly: the model that everything else is tested against.

mod env;
mod lower;
pub mod reference;
mod run;
pub mod scalar;
mod word;

use twofold_arch::Exception;

pub use env::{Abandon, Env, FILE_BASE, FILE_WORDS, File};
pub use lower::Lowerer;

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

/// A block made ready to run: the words of `word`, then the exit records, then the index of each guest instruction's first
/// word, four to a word.
#[derive(Clone, Debug)]
pub struct Program {
    words: Box<[u64]>,
    /// Words of code, records, and entries of the instruction table.
    code: u16,
    records: u16,
    insns: u16,
    extra: Option<Box<Extra>>,
}

/// What few programs have.
#[derive(Clone, Debug)]
struct Extra {
    /// Run this by [`reference`] instead: it needs more temporaries than there are.
    fallback: Option<Block>,
    /// The exceptions of `Raise` exits.
    raises: Vec<Exception>,
}

impl Program {
    /// Lowers a block, which must be valid ([`crate::verify`]). To lower many, keep a [`Lowerer`].
    #[must_use]
    pub fn new(block: &Block) -> Self {
        Lowerer::default().lower(block)
    }
    /// Bytes of memory it takes, for statistics.
    #[must_use]
    pub fn size(&self) -> usize {
        let fallback = self.extra.as_ref().and_then(|e| e.fallback.as_ref());
        size_of::<Self>() + self.words.len() * 8 + fallback.map_or(0, |b| b.ops.len() * size_of::<crate::Op>())
    }
    /// Number of words of code, for statistics.
    #[must_use]
    pub fn len(&self) -> usize {
        self.code as usize
    }
    /// Whether there is no code: the terminal is all there is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.code == 0
    }
    /// Whether the block had more live values than there are temporaries, and runs slowly.
    #[must_use]
    pub fn is_fallback(&self) -> bool {
        self.extra.as_ref().is_some_and(|e| e.fallback.is_some())
    }
}

impl core::fmt::Display for Program {
    /// The words, for people looking at what became of a block.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut words = self.words.iter().take(self.code as usize);
        while let Some(&w) = words.next() {
            let [code, d, a, b, ..] = w.to_le_bytes();
            let name = word::code::NAMES.get(code as usize).copied().unwrap_or("?");
            write!(f, "{name:8} {d:3} {a:3} {b:3} {:#x}", (w >> 32) as u32)?;
            match if code == word::code::MOVX { words.next() } else { None } {
                Some(x) => writeln!(f, " {x:#x}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}
