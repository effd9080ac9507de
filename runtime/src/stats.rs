//! The `--stats` file: every counter of a run as JSON, schema `twofold-stats/1`. Keys are only ever added.

use serde_json::{Map, Value, json};
use twofold_mmu::{FlushCause, PagingMode};

use crate::exec::counters::Phase;
use crate::run::Ending;
use crate::vcpu::Vcpu;

/// Hottest blocks listed.
const HOT: usize = 50;

/// What the counters do not know about a run.
#[derive(Clone, Copy, Debug)]
pub struct RunFacts {
    /// How it ended.
    pub ending: Ending,
    /// Wall-clock seconds.
    pub wall: f64,
    /// Processor seconds of the process.
    pub cpu: f64,
    /// Peak resident set, bytes.
    pub peak_rss: u64,
    /// Guest memory, bytes.
    pub guest_memory: u64,
}

/// All counters of a run. `symbol` names a linear address.
#[must_use]
pub fn collect(vcpu: &Vcpu, facts: &RunFacts, symbol: impl Fn(u64) -> Option<String>) -> Value {
    let c = &vcpu.counters;
    let m = vcpu.mmu.stats();
    let code = vcpu.jit.code.as_ref().map(twofold_backend::CodeMemory::stats).unwrap_or_default();
    let platform = *vcpu.platform().counters();
    let retired = vcpu.state.retired;
    let exceptions: Map<String, Value> =
        c.exceptions.iter().enumerate().filter(|(_, n)| **n != 0).map(|(v, n)| (v.to_string(), json!(n))).collect();
    let flushes: Map<String, Value> =
        FlushCause::ALL.iter().map(|&f| (f.name().to_owned(), json!(m.flushes_by(f)))).collect();
    let walks: Map<String, Value> =
        PagingMode::ALL.iter().zip(PagingMode::NAMES).map(|(&p, n)| (n.to_owned(), json!(m.walks_in(p)))).collect();
    let seconds = |ns: u64| ns as f64 / 1e9;
    let phases: Map<String, Value> =
        Phase::NAMES.iter().zip(vcpu.profile.ns).map(|(n, ns)| ((*n).to_owned(), json!(seconds(ns)))).collect();
    let portable: Map<String, Value> =
        twofold_backend::portable_vec_ops().into_iter().map(|(name, n)| (name.to_owned(), json!(n))).collect();
    json!({
        "schema": "twofold-stats/1",
        "run": {
            "wall_seconds": facts.wall,
            "cpu_seconds": facts.cpu,
            "exit": format!("{:?}", facts.ending),
            "exit_status": facts.ending.exit_status(),
        },
        "translation": {
            "tbs": c.tbs_translated,
            "guest_instructions": c.insns_translated,
            "guest_bytes": c.bytes_translated,
            "live_tbs": vcpu.jit.tbs.live(),
            "compiled": { "quick": c.compiled, "opt": c.regions },
            "regions": {
                "requested": c.region_requests,
                "refused": c.regions_refused,
                "checks": c.region_checks,
                "misfits": c.region_misfits,
                "dropped": c.regions_dropped,
                "compile_seconds": seconds(c.region_ns),
            },
            "compile_requests": c.compile_requests,
            "compile_refused": c.compile_refused,
            "emitted": c.emitted,
            "emit_refused": c.emit_refused,
            "compile_stale": c.compile_stale,
            "compile_seconds": seconds(c.compile_ns),
            "code_bytes": c.code_bytes,
            "code_memory_peak": code.peak,
            "code_memory_limit": code.capacity,
            "cache": vcpu.jit.cache.as_ref().map(|cache| {
                let c = cache.stats();
                json!({ "loaded": c.loaded, "hits": c.hits, "misses": c.misses, "added": c.added })
            }),
            "evictions": c.evictions,
            "evicted_tbs": c.evicted_tbs,
            "unimplemented": c.unimplemented,
        },
        "execution": {
            "guest_instructions": retired,
            "by_tier": by_tier(c, retired),
            "eval_blocks": c.eval_blocks,
            "lookups": c.lookups,
            "code_lookups": c.code_lookups,
            "jump_cache_misses": c.jump_cache_misses,
            "jump_cache_clears": c.jump_cache_clears,
            "chain_breaks": c.chain_breaks,
            "links": code.links,
            "unlinks": code.unlinks,
            "dispatches": c.dispatches,
            "budget_exits": c.budget_exits,
            "interrupts": c.interrupts,
            "nmis": c.nmis,
            "smis": c.smis,
            "soft_interrupts": c.soft_interrupts,
            "exceptions": exceptions,
            "slow_reads": c.slow_reads,
            "slow_writes": c.slow_writes,
            "portable_vector_ops": portable,
            "port_io": c.port_io,
            "mmio": c.mmio,
            "io_unclaimed": platform.io_unclaimed,
        },
        "time": {
            "phases": phases,
            "compile_thread": seconds(c.compile_ns),
            "asleep": seconds(c.idle_ns),
        },
        "tlb": {
            "misses": m.misses,
            "walks": walks,
            "large_page_hits": m.large_page_hits,
            "page_table_hits": m.page_table_hits,
            "nested_walks": m.nested_walks,
            "entries_read": m.entries_read,
            "ad_writes": m.ad_writes,
            "faults": m.faults,
            "context_switches": m.context_switches,
            "table_growths": m.table_growths,
            "write_tags_revoked": m.write_tags_revoked,
            "flushes": flushes,
        },
        "smc": {
            "page_writes": vcpu.mmu.code().write_counts().0,
            "hits": c.smc_hits,
            "restarts": c.smc_restarts,
            "tbs_dropped": c.smc_tbs_dropped,
        },
        "vmx": vcpu.vmx.stats.json(),
        "hot": hot(vcpu, symbol),
        "memory": { "peak_rss": facts.peak_rss, "guest": facts.guest_memory },
    })
}

/// Guest instructions by tier. The tiers of host code are told apart by where the budget ran out.
fn by_tier(c: &crate::exec::Counters, retired: u64) -> Value {
    let code = retired.saturating_sub(c.retired_eval);
    let opt = (code as f64 * c.region_samples_inside as f64 / c.region_samples.max(1) as f64) as u64;
    json!({ "eval": c.retired_eval, "quick": code.saturating_sub(opt), "opt": opt })
}

/// The hottest blocks, by guest instructions executed.
fn hot(vcpu: &Vcpu, symbol: impl Fn(u64) -> Option<String>) -> Value {
    let mut blocks = vcpu.jit.executions();
    blocks.sort_by_key(|b| (std::cmp::Reverse(b.instructions()), b.rip));
    let rows = blocks.iter().take(HOT).map(|b| {
        json!({
            "address": format!("{:#x}", b.rip),
            "symbol": symbol(b.rip),
            "executions": b.times,
            "instructions": b.insns,
            "tier": b.tier,
        })
    });
    Value::Array(rows.collect())
}
