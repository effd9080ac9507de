//! Makes one graph of a region's blocks: places relative to the root's page, indirect exits guessed, and what only follows one
//! other block joined to it, so that the other passes see further.
//!
//! Before the other passes. Invariant: the result does what the blocks did one after the other. In a region `rip_base` is that of
//! the root's page all the time: a direct exit names its target by the distance from there, as `Jump` in the root's page and as
//! `JumpFar` outside it. Side exits of a joined block count the guest instructions of those before.

use crate::block::{Block, Exit, SideExit};
use crate::op::{IntCc, Op, Ty, Value};

/// A block of a region.
#[derive(Clone, Debug)]
pub struct Part<T> {
    /// As the front end makes it.
    pub block: Block,
    /// Its page, in bytes from the root's.
    pub page: i32,
    /// Where an indirect exit at its end has been seen to lead: distances from the root's `rip_base`, likeliest first.
    pub guesses: Vec<i32>,
    /// What goes with it, and with what it becomes part of.
    pub tags: Vec<T>,
}

/// Joins what can be joined of a region's blocks, the first of which is its entry.
#[must_use]
pub fn join_all<T>(parts: Vec<Part<T>>) -> (Vec<Block>, Vec<Vec<T>>) {
    let mut all: Vec<Option<(Block, Vec<T>)>> = parts.into_iter().map(|p| Some(prepare(p))).collect();
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

/// The block with its places relative to the root's page and its guesses made.
fn prepare<T>(part: Part<T>) -> (Block, Vec<T>) {
    let mut block = part.block;
    if part.page != 0 {
        rebase(&mut block, part.page);
    }
    guess(&mut block, &part.guesses);
    (block, part.tags)
}

fn rebase(block: &mut Block, page: i32) {
    for op in &mut block.ops {
        if let Op::Rip { off } = op {
            *off = off.wrapping_add(page);
        }
    }
    let moved = |exit: &mut Exit| match exit {
        Exit::Jump { off } => *exit = direct(page.wrapping_add(i32::from(*off))),
        Exit::JumpFar { off } => *exit = direct(page.wrapping_add(*off)),
        Exit::Dispatch { off } => *off = page.wrapping_add(*off),
        Exit::Indirect { .. } | Exit::Helped | Exit::Raise { .. } => {}
    };
    block.exits.iter_mut().map(|s| &mut s.exit).chain(&mut block.end).for_each(moved);
    block.insns.iter_mut().for_each(|insn| insn.page = page);
}

fn direct(place: i32) -> Exit {
    match u16::try_from(place) {
        Ok(off) if off < 0x1000 => Exit::Jump { off },
        _ => Exit::JumpFar { off: place },
    }
}

/// Compares where an indirect exit goes with each guess.
fn guess(block: &mut Block, guesses: &[i32]) {
    let Some(Exit::Indirect { rip, kind }) = block.end else { return };
    let Some((&last, others)) = guesses.split_last() else { return };
    if usize::from(block.retired) != block.insns.len() {
        return;
    }
    let retired = block.retired;
    let mut compare = |place: i32, cc: IntCc, exit: Exit| {
        let a = Value(block.ops.len() as u16);
        let c = Value(a.0 + 1);
        let n = block.exits.len() as u16;
        block.ops.push(Op::Rip { off: place });
        block.ops.push(Op::Cmp { cc, ty: Ty::I64, a: rip, b: a });
        block.ops.push(Op::ExitIf { c, exit: n });
        block.exits.push(SideExit { exit, retired });
    };
    for &place in others {
        compare(place, IntCc::Eq, direct(place));
    }
    compare(last, IntCc::Ne, Exit::Indirect { rip, kind });
    block.end = Some(direct(last));
}

/// Where a direct exit leads, from the root's `rip_base`.
#[must_use]
pub fn place_of(exit: &Exit) -> Option<i32> {
    match *exit {
        Exit::Jump { off } => Some(off.into()),
        Exit::JumpFar { off } => Some(off),
        _ => None,
    }
}

/// The block that `a`, which has been taken out of `all`, can be joined with.
fn follower<T>(all: &[Option<(Block, Vec<T>)>], a: &Block) -> Option<usize> {
    let place = place_of(a.end.as_ref()?)?;
    // What a helper does may end the region; that is looked at between blocks.
    let impure = |op: &Op| matches!(op, Op::Call { helper, .. } if !helper.info().keeps_state());
    if usize::from(a.retired) != a.insns.len() || a.place() == place || a.ops.iter().any(impure) {
        return None;
    }
    let n = all.iter().position(|b| b.as_ref().is_some_and(|b| b.0.place() == place))?;
    let b = &all[n].as_ref()?.0;
    let leads = |e: &&Exit| place_of(e) == Some(place);
    let entries = all.iter().flatten().map(|x| &x.0).chain([a]).flat_map(exits).filter(leads).count();
    let fits = a.ops.len() + b.ops.len() <= Block::MAX_OPS / 2;
    (n != 0 && entries == 1 && fits && !a.crosses_page && !b.crosses_page).then_some(n)
}

fn exits(b: &Block) -> impl Iterator<Item = &Exit> {
    b.exits.iter().map(|s| &s.exit).chain(&b.end)
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
