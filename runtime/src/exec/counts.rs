//! How often each block ran: the table that counting host code adds to, and what is remembered of blocks that died.
//!
//! Place in the pipeline: beside the block store, kept only when statistics or a profile are wanted; the evaluator counts
//! its runs in the blocks themselves. Invariant: the table covers every block of the store before its host code runs, and
//! its address is in `CpuState::exec_counts` again after it moved.

use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashMap;
use twofold_arch::CpuState;

use super::tb::{Tb, TbId, TierState};

/// A dead block is remembered when it ran this many guest instructions.
const WORTH_REMEMBERING: u64 = 4096;
/// Dead blocks remembered.
const MOST_REMEMBERED: usize = 1 << 16;

/// What a block did, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Executions {
    /// Linear RIP at its first translation.
    pub rip: u64,
    /// Physical address of its first byte.
    pub pa: u64,
    /// Guest instructions in it.
    pub insns: u16,
    /// Times it was entered.
    pub times: u64,
    /// The highest tier that it was in.
    pub tier: &'static str,
}

impl Executions {
    /// Guest instructions executed, if it was never left half way.
    #[must_use]
    pub fn instructions(&self) -> u64 {
        self.times.saturating_mul(u64::from(self.insns))
    }
}

/// The counts of all blocks.
#[derive(Debug, Default)]
pub struct ExecCounts {
    on: bool,
    /// By block id. Host code adds without a lock prefix: one vCPU's code, one table.
    table: Vec<AtomicU64>,
    /// Dead blocks by (RIP, physical address).
    gone: HashMap<(u64, u64), Executions>,
}

impl ExecCounts {
    /// Counts from now on; to be called before the first block is made.
    pub fn turn_on(&mut self) {
        self.on = true;
    }

    /// The entry that host code of block `id` adds to; none when nothing is counted.
    #[must_use]
    pub fn counter(&self, id: TbId) -> Option<u32> {
        self.on.then_some(id.0)
    }

    /// Block `id` is new: its count begins at 0, and `state` knows where the table is.
    pub fn begin(&mut self, id: TbId, state: &mut CpuState) {
        if !self.on {
            return;
        }
        let i = id.0 as usize;
        if i >= self.table.len() {
            let len = (i + 1).next_power_of_two().max(1 << 12);
            self.table.resize_with(len, AtomicU64::default);
            state.exec_counts = self.table.as_ptr().expose_provenance() as u64;
        }
        self.table[i].store(0, Ordering::Relaxed);
    }

    /// Block `id` goes on counting its evaluator's runs from 0; these are kept here.
    pub fn keep(&mut self, id: TbId, runs: u32) {
        if let Some(n) = self.table.get(id.0 as usize) {
            n.fetch_add(u64::from(runs), Ordering::Relaxed);
        }
    }

    /// Block `id` dies.
    pub fn end(&mut self, id: TbId, tb: &Tb) {
        if !self.on {
            return;
        }
        let did = self.executions(id, tb);
        if did.instructions() < WORTH_REMEMBERING || self.gone.len() >= MOST_REMEMBERED {
            return;
        }
        self.gone
            .entry((did.rip, did.pa))
            .and_modify(|e| {
                e.times += did.times;
                e.insns = e.insns.max(did.insns);
                e.tier = did.tier;
            })
            .or_insert(did);
    }

    /// What block `id` did so far.
    #[must_use]
    pub fn executions(&self, id: TbId, tb: &Tb) -> Executions {
        let counted = self.table.get(id.0 as usize).map_or(0, |n| n.load(Ordering::Relaxed));
        Executions {
            rip: tb.rip,
            pa: tb.key.pa.0,
            insns: tb.insns,
            times: counted + u64::from(tb.runs),
            tier: match tb.tier {
                TierState::Compiled if tb.in_regions.is_empty() => "quick",
                TierState::Compiled => "opt",
                _ => "eval",
            },
        }
    }

    /// The dead blocks that did something.
    pub fn gone(&self) -> impl Iterator<Item = Executions> + '_ {
        self.gone.values().copied()
    }
}
