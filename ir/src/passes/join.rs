//! Joins the blocks of a region where one leads to the next and nothing else does, so that the other passes see further.
//!
//! Before the other passes. Invariant: the joined block does what the two did one after the other; side exits of the second count
//! the guest instructions of the first.

use crate::block::{Block, Exit};
use crate::op::{Op, Value};

/// Joins what can be joined of a region's blocks, the first of which is its entry. What goes with a block (`tags`) goes with what
/// it becomes part of.
#[must_use]
pub fn join_all<T>(blocks: Vec<Block>, tags: Vec<Vec<T>>) -> (Vec<Block>, Vec<Vec<T>>) {
    let mut all: Vec<Option<(Block, Vec<T>)>> = blocks.into_iter().zip(tags).map(Some).collect();
    for i in 0..all.len() {
        while let Some((mut a, mut tags)) = all[i].take() {
            let next = follower(&all, &a).and_then(|n| all[n].take());
            let Some((b, more)) = next else {
                all[i] = Some((a, tags));
                break;
            };
            append(&mut a, b);
            tags.extend(more);
            all[i] = Some((a, tags));
        }
    }
    all.into_iter().flatten().unzip()
}

/// The block that `a`, which has been taken out of `all`, can be joined with.
fn follower<T>(all: &[Option<(Block, Vec<T>)>], a: &Block) -> Option<usize> {
    let Some(Exit::Jump { off }) = a.end else { return None };
    // What a helper does may end the region; that is looked at between blocks.
    let impure = |op: &Op| matches!(op, Op::Call { helper, .. } if !helper.info().pure);
    if usize::from(a.retired) != a.insns.len() || a.start() == off || a.ops.iter().any(impure) {
        return None;
    }
    let n = all.iter().position(|b| b.as_ref().is_some_and(|b| b.0.start() == off))?;
    let b = &all[n].as_ref()?.0;
    let entries = all.iter().flatten().map(|x| &x.0).chain([a]).flat_map(exits).filter(|e| leads_to(e, off)).count();
    let fits = a.ops.len() + b.ops.len() <= Block::MAX_OPS / 2;
    (n != 0 && entries == 1 && fits && !a.crosses_page && !b.crosses_page).then_some(n)
}

fn exits(b: &Block) -> impl Iterator<Item = &Exit> {
    b.exits.iter().map(|s| &s.exit).chain(&b.end)
}

fn leads_to(exit: &Exit, to: u16) -> bool {
    matches!(*exit, Exit::Jump { off } if off == to)
}

/// Makes `b` the end of `a`.
fn append(a: &mut Block, b: Block) {
    let (base, first_exit, done) = (a.ops.len() as u16, a.exits.len() as u16, a.retired);
    let moved = |v: Value| Value(v.0 + base);
    let moved_exit = |exit: Exit| match exit {
        Exit::Indirect { rip, kind } => Exit::Indirect { rip: moved(rip), kind },
        other => other,
    };
    a.ops.extend(b.ops.into_iter().map(|mut op| {
        op.map_operands(moved);
        if let Op::ExitIf { exit, .. } = &mut op {
            *exit += first_exit;
        }
        op
    }));
    a.exits.extend(b.exits.into_iter().map(|mut side| {
        side.exit = moved_exit(side.exit);
        side.retired += done;
        side
    }));
    a.insns.extend(b.insns.into_iter().map(|mut insn| {
        insn.first += base;
        insn
    }));
    a.end = b.end.map(moved_exit);
    a.retired += b.retired;
}
