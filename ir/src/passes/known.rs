//! What is known of the guest state at a point of a block: which value a field holds.
//!
//! Part of the forward walk. Kept per eight-byte word: the last value got or put that is still all in place. Writing part of a
//! word forgets the rest of it.

use twofold_arch::Loc;

use crate::op::{Ty, Value};

/// Words that are tracked, from byte 0 of the state on.
const WORDS: usize = 512;

/// A value in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// The value.
    pub v: Value,
    /// Its type; a vector is held by two words.
    pub ty: Ty,
    /// Byte offset in the word of the value's first byte; 8 in the second word of a vector.
    pub off: u8,
}

#[derive(Debug)]
pub(super) struct Known {
    /// An entry counts when its epoch is the current one.
    words: Box<[(u32, Held); WORDS]>,
    epoch: u32,
}

impl Default for Known {
    fn default() -> Self {
        let none = (0, Held { v: Value::NONE, ty: Ty::I8, off: 0 });
        Self { words: Box::new([none; WORDS]), epoch: 0 }
    }
}

/// The words a field has bytes in, all tracked, or `None` when it is outside.
fn words(ty: Ty, loc: Loc) -> (usize, usize) {
    (loc.0 as usize / 8, (loc.0 as usize + ty.bytes() as usize - 1) / 8)
}

impl Known {
    /// Forgets everything.
    pub fn clear(&mut self) {
        if self.epoch == u32::MAX {
            *self = Self::default();
        }
        self.epoch += 1;
    }

    /// Forgets the words of a range of bytes.
    pub fn forget(&mut self, range: core::ops::Range<u16>) {
        let words = usize::from(range.start / 8)..usize::from(range.end.div_ceil(8)).min(WORDS);
        self.words.get_mut(words).into_iter().flatten().for_each(|e| e.0 = 0);
    }

    fn word(&self, w: usize) -> Option<Held> {
        self.words.get(w).filter(|e| e.0 == self.epoch).map(|e| e.1)
    }

    /// What the word of `loc` holds, if all of the field is in it. `off` is then relative to the field: how many bytes the field's first
    /// byte is into the value.
    pub fn find(&self, ty: Ty, loc: Loc) -> Option<Held> {
        let (w, last) = words(ty, loc);
        let held = self.word(w)?;
        let at = (loc.0 % 8) as u8;
        if ty == Ty::V128 {
            let second = self.word(w + 1)?;
            let whole = held.ty == Ty::V128 && held.off == 0 && second == Held { off: 8, ..held };
            return (whole && at == 0).then_some(held);
        }
        if w != last {
            return None;
        }
        if held.ty == Ty::V128 {
            return Some(Held { off: held.off + at, ..held });
        }
        let inside = at >= held.off && at + ty.bytes() as u8 <= held.off + held.ty.bytes() as u8;
        inside.then(|| Held { off: at - held.off, ..held })
    }

    /// The field now holds `v`: it was put, or got.
    pub fn set(&mut self, ty: Ty, loc: Loc, v: Value) {
        let (w, last) = words(ty, loc);
        let off = (loc.0 % 8) as u8;
        if ty == Ty::V128 && off == 0 && last < WORDS {
            self.words[w] = (self.epoch, Held { v, ty, off: 0 });
            self.words[w + 1] = (self.epoch, Held { v, ty, off: 8 });
        } else if w == last && w < WORDS {
            self.words[w] = (self.epoch, Held { v, ty, off });
        } else {
            for w in w..=last {
                if let Some(e) = self.words.get_mut(w) {
                    e.0 = 0;
                }
            }
        }
    }

    /// A get made `v`: remembers it unless the word holds something that says more.
    pub fn learn(&mut self, ty: Ty, loc: Loc, v: Value) {
        let (w, last) = words(ty, loc);
        // A narrow get beside what is known must not make it forgotten.
        if ty == Ty::V128 || (w == last && self.word(w).is_none()) || ty == Ty::I64 && w == last {
            self.set(ty, loc, v);
        }
    }
}
