//! The passes: from the front end's straightforward ops to few ops.
//!
//! Place in the pipeline: between `frontend` and the evaluator or back end. Two walks over the block, each linear:
//! a forward one that rewrites op by op (`forward`, with its rules in `known`, `cond` and `fold`), and a backward one that
//! finds what nobody sees (`dead`). Invariants they keep: memory ops, helpers and exits stay, in order, each with the guest state
//! exact as it was; only `cc_*` words that the current `cc_op` does not use may hold something else.

mod cond;
mod dead;
mod fold;
mod forward;
mod join;
mod known;
mod lookahead;

pub use join::{Part, join_all, place_of};
pub use lookahead::overwrites_flags;

use crate::block::{Block, Exit};

/// Which passes run, and what they may assume.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Forward puts and gets to later gets.
    pub get_put: bool,
    /// Turn conditions on known lazy flags into comparisons (needs `get_put` to know them).
    pub conds: bool,
    /// Turn images of known lazy flags into ops: more of them, for host code, where that is less than a call.
    pub images: bool,
    /// Constant folding and simple algebra.
    pub fold: bool,
    /// Remove puts that are overwritten before anybody can see them, and ops nobody uses.
    pub dead: bool,
    /// Whether the arithmetic flags are dead where an exit leads (all of them are overwritten there before anything can
    /// see them). [`overwrites_flags`] tells for a block, and says what is given up.
    pub flags_dead_at_exit: Option<&'a dyn Fn(&Exit) -> bool>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { get_put: true, conds: true, images: false, fold: true, dead: true, flags_dead_at_exit: None }
    }
}

impl Options<'_> {
    /// All passes, for what becomes host code.
    pub const HOST: Options<'static> =
        Options { get_put: true, conds: true, images: true, fold: true, dead: true, flags_dead_at_exit: None };
    /// No pass at all.
    pub const NONE: Options<'static> =
        Options { get_put: false, conds: false, images: false, fold: false, dead: false, flags_dead_at_exit: None };
}

impl core::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let on = [
            ("get_put", self.get_put),
            ("conds", self.conds),
            ("images", self.images),
            ("fold", self.fold),
            ("dead", self.dead),
        ];
        f.debug_set().entries(on.iter().filter(|x| x.1).map(|x| x.0)).finish()
    }
}

/// The passes with the scratch memory they reuse from block to block.
#[derive(Debug, Default)]
pub struct Passes {
    forward: forward::Scratch,
    dead: dead::Scratch,
}

impl Passes {
    /// Runs the passes on a valid block.
    pub fn run(&mut self, block: &mut Block, options: &Options<'_>) {
        if options.get_put || options.conds || options.fold {
            forward::run(block, options, &mut self.forward);
        }
        if options.dead {
            dead::run(block, options, &mut self.dead);
        }
    }
}
