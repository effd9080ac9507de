//! What the runtime counts while it runs: one plain struct, turned into the `--stats` file at the end.
//!
//! Every slow path has a counter here or in the mmu's own statistics.

/// What a vCPU's thread is doing, for the time profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Phase {
    /// Events, lookups, delivery of exceptions, device polls.
    #[default]
    Dispatch,
    /// Front end and passes.
    Translate,
    /// The evaluator, with the slow paths and helpers it calls.
    Eval,
    /// Host code, with the slow paths and helpers it calls.
    Code,
    /// Asleep in HLT.
    Idle,
}

impl Phase {
    /// All phases, in the order of their numbers.
    pub const NAMES: [&'static str; 5] = ["dispatch", "translate", "eval", "code", "idle"];
}

/// Where the time of a vCPU's thread went; kept only when asked for.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Whether it is kept.
    pub on: bool,
    /// The phase since `since`.
    pub phase: Phase,
    /// Host nanoseconds.
    pub since: u64,
    /// Nanoseconds by phase.
    pub ns: [u64; 5],
}

/// Counters of one vCPU's execution.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub tbs_translated: u64,
    /// Guest instructions in them.
    pub insns_translated: u64,
    /// Guest bytes in them.
    pub bytes_translated: u64,
    /// Time asleep in HLT.
    pub idle_ns: u64,
    /// Instructions retired in the evaluator.
    pub retired_eval: u64,
    /// Blocks run in the evaluator.
    pub eval_blocks: u64,
    /// Times the dispatcher looked for a block.
    pub lookups: u64,
    /// Exits from host code through a slot that was not linked.
    pub chain_breaks: u64,
    /// Exits from host code because the jump cache had no entry.
    pub jump_cache_misses: u64,
    /// Exits from host code to the dispatcher that the block asked for.
    pub dispatches: u64,
    /// Exits from host code because the budget ran out or somebody wanted attention.
    pub budget_exits: u64,
    /// Jump caches cleared because blocks with host code died.
    pub jump_cache_clears: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
    /// NMIs delivered.
    pub nmis: u64,
    /// Times that system-management mode was entered.
    pub smis: u64,
    /// Exceptions delivered, by vector.
    pub exceptions: [u64; 32],
    /// Software interrupts delivered.
    pub soft_interrupts: u64,
    /// Memory slow paths taken.
    pub slow_reads: u64,
    /// Memory slow paths taken for writes.
    pub slow_writes: u64,
    /// Accesses to device memory.
    pub mmio: u64,
    /// Port accesses.
    pub port_io: u64,
    /// Writes to pages that hold translated code.
    pub smc_writes: u64,
    /// Of them, writes that touched translated bytes.
    pub smc_hits: u64,
    /// Of them, writes by a block to its own bytes: the instruction runs again on its own.
    pub smc_restarts: u64,
    /// Blocks dropped because their bytes changed.
    pub smc_tbs_dropped: u64,
    /// Blocks sent to the compile thread.
    pub compile_requests: u64,
    /// Blocks that came back with host code.
    pub compiled: u64,
    /// Times the budget ran out in host code.
    pub region_samples: u64,
    /// Of them, where a block of a region would come next.
    pub region_samples_inside: u64,
    /// Regions sent to the compile thread.
    pub region_requests: u64,
    /// Regions installed.
    pub regions: u64,
    /// Times it was looked whether a region's pages are where they were.
    pub region_checks: u64,
    /// Times they were not.
    pub region_misfits: u64,
    /// Roots without a loop, and regions the compiler refused.
    pub regions_refused: u64,
    /// Regions that ended because a member died.
    pub regions_dropped: u64,
    /// Time of the compile thread for regions, host nanoseconds; part of `compile_ns`.
    pub region_ns: u64,
    /// Blocks the compiler refused.
    pub compile_refused: u64,
    /// Times host code was found for it that the jump cache did not have.
    pub code_lookups: u64,
    /// Blocks that got host code when they were translated.
    pub emitted: u64,
    /// Blocks that the direct emitter left to the compile thread.
    pub emit_refused: u64,
    /// Blocks that died while they were compiled.
    pub compile_stale: u64,
    /// Time of the compile thread, host nanoseconds.
    pub compile_ns: u64,
    /// Host code bytes made.
    pub code_bytes: u64,
    /// Regions of code memory evicted.
    pub evictions: u64,
    /// Blocks that lost their host code to eviction.
    pub evicted_tbs: u64,
    /// Instructions the front end does not know, as translated.
    pub unimplemented: u64,
}
