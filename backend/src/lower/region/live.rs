//! Which slots a region's blocks need the values of: what is loaded at entry and handed on from block to block.
//!
//! Part of region lowering. A slot is live where its value may be read before it is replaced: by an op, by a partial write, or by a
//! write-back of what is dirty there. The others are not carried along; a value that nobody reads would still be loaded, moved
//! round each loop and take a register.

use twofold_ir::{Block, Exit, Op};

use super::slots::Slots;
use super::{Graph, dirty_after, impure};

/// Liveness of slots, as sets by bit.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// At the start of each block.
    pub head: Vec<u64>,
    /// After each op that calls for a new reading of everything: block, op, slots.
    pub after: Vec<(usize, usize, u64)>,
}

impl Live {
    pub fn new(blocks: &[Block], graph: &Graph, slots: &Slots) -> Self {
        let dirty: Vec<Vec<u64>> = blocks.iter().zip(&graph.dirty).map(|(b, &d)| dirty_before(b, slots, d)).collect();
        let mut live = Self { head: vec![0; blocks.len()], after: Vec::new() };
        let mut changed = true;
        while changed {
            changed = false;
            live.after.clear();
            for i in (0..blocks.len()).rev() {
                let now = live.block(i, &blocks[i], graph, slots, &dirty[i]);
                changed |= now != live.head[i];
                live.head[i] = now;
            }
        }
        live
    }

    /// What is live at the start of block `i`.
    fn block(&mut self, i: usize, b: &Block, graph: &Graph, slots: &Slots, dirty: &[u64]) -> u64 {
        // Whoever leaves writes back; so does an edge that looks at the budget.
        let exit = |head: &[u64], exit: &Exit, retired: u16, dirty: u64| match graph.target(exit, retired) {
            Some(to) if graph.checked.contains(&(i, to)) => head[to] | dirty,
            Some(to) => head[to],
            None => dirty,
        };
        let end = dirty.last().copied().unwrap_or(0);
        let mut live = b.end.as_ref().map_or(end, |e| exit(&self.head, e, b.retired, end));
        for (n, op) in b.ops.iter().enumerate().rev() {
            let dirty = dirty[n];
            match *op {
                Op::Get { ty, loc } => match slots.find(ty, loc) {
                    Some(p) => live |= 1 << p.slot,
                    None => live |= dirty,
                },
                Op::Put { ty, loc, .. } => match slots.find(ty, loc) {
                    Some(p) if slots.whole(p, ty) => live &= !(1 << p.slot),
                    Some(p) => live |= 1 << p.slot,
                    // Memory gets all of what it touches, and those slots are read again.
                    None => live |= dirty,
                },
                Op::ExitIf { exit: e, .. } => {
                    let side = b.exits.get(usize::from(e));
                    live |= side.map_or(dirty, |s| exit(&self.head, &s.exit, s.retired, dirty));
                }
                _ if impure(op) => {
                    self.after.push((i, n, live));
                    live = dirty;
                }
                Op::Load { .. }
                | Op::Store { .. }
                | Op::Rmw { .. }
                | Op::CmpXchg { .. }
                | Op::Cond { .. }
                | Op::Flags => live |= dirty,
                _ => {}
            }
        }
        live
    }
}

/// The dirty slots before each op of a block, and at its end.
fn dirty_before(b: &Block, slots: &Slots, mut dirty: u64) -> Vec<u64> {
    let mut all = Vec::with_capacity(b.ops.len() + 1);
    for op in &b.ops {
        all.push(dirty);
        dirty = dirty_after(slots, op, dirty);
    }
    all.push(dirty);
    all
}
