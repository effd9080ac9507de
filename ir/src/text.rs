//! Prints a block as text; [`crate::parse`] reads it back.

use core::fmt;

use crate::block::Block;

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{self:?}")
    }
}
