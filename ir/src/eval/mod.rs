//! The evaluator: runs a block without compiling it.
//!
//! Place in the pipeline: after the passes, for blocks that have not run often enough to be worth compiling.
//! [`Program::new`] lowers a block to words for a register machine whose registers are the guest state itself and some
//! temporaries beside it (`lower`, `word`); [`Program::run`] runs them (`run`). [`mod@reference`] runs the ops of a block one
//! by one, slowly: the model that everything else is tested against.

mod env;
mod lower;
pub mod reference;
mod run;
pub mod scalar;
mod word;

use std::cell::RefCell;

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

/// A block made ready to run.
///
/// All in one piece of memory, since most programs run seldom and are met in no cache: a header, the words of `word`, the
/// exit records, and the index of each guest instruction's first word, four to a word.
#[derive(Clone, Debug)]
pub struct Program {
    /// Empty when there is a fallback.
    words: Box<[u64]>,
    /// Run this by [`mod@reference`] instead: it needs more temporaries than there are.
    fallback: Option<Box<Block>>,
}

/// What [`Program`] owns, by reference: for callers whose programs move while they run.
#[derive(Clone, Copy, Debug)]
pub struct Code<'a> {
    words: &'a [u64],
    fallback: Option<&'a Block>,
}

impl Program {
    /// Lowers a block, which must be valid ([`crate::verify`]).
    #[must_use]
    pub fn new(block: &Block) -> Self {
        thread_local! {
            // Its scratch memory costs more to make than most blocks to lower.
            static LOWERER: RefCell<Lowerer> = RefCell::default();
        }
        LOWERER.with_borrow_mut(|l| l.lower(block))
    }
    /// What there is to run; stays where it is when the program is moved.
    #[must_use]
    #[inline]
    pub fn code(&self) -> Code<'_> {
        Code { words: &self.words, fallback: self.fallback.as_deref() }
    }
    /// Runs it.
    #[inline]
    pub fn run<E: Env>(&self, env: &mut E) -> Leave {
        self.code().run(env)
    }
    /// Bytes of memory it takes, for statistics.
    #[must_use]
    pub fn size(&self) -> usize {
        let fallback = self.fallback.as_ref().map_or(0, |b| b.ops.len() * size_of::<crate::Op>());
        size_of::<Self>() + self.words.len() * 8 + fallback
    }
    /// Number of words of code, for statistics.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.first().map_or(0, |h| *h as u16 as usize)
    }
    /// Whether there is no code: the terminal is all there is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether the block had more live values than there are temporaries, and runs slowly.
    #[must_use]
    pub fn is_fallback(&self) -> bool {
        self.fallback.is_some()
    }
}

impl core::fmt::Display for Program {
    /// The words, for people looking at what became of a block.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut words = self.words.iter().skip(1).take(self.len());
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
