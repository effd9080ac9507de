//! The passes: from the front end's straightforward ops to few ops.

use crate::block::{Block, Exit};

/// Which passes run, and what they may assume.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Forward puts and gets to later gets.
    pub get_put: bool,
    /// Turn conditions on known lazy flags into comparisons.
    pub conds: bool,
    /// Constant folding and simple algebra.
    pub fold: bool,
    /// Remove puts that are overwritten before anybody can see them, and ops nobody uses.
    pub dead: bool,
    /// Whether the arithmetic flags are dead where an exit leads (all of them are overwritten there before anything can
    /// see them).
    pub flags_dead_at_exit: Option<&'a dyn Fn(&Exit) -> bool>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { get_put: true, conds: true, fold: true, dead: true, flags_dead_at_exit: None }
    }
}

/// The passes with the scratch memory they reuse from block to block.
#[derive(Debug, Default)]
pub struct Passes {}

impl Passes {
    /// Runs the passes on a valid block.
    pub fn run(&mut self, _block: &mut Block, _options: &Options<'_>) {}
}
