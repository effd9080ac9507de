//! What executes: the block store, the tiers' machinery and the policy that moves blocks between them.
//!
//! Held by whichever vCPU runs. Invariant: `queue` is `None` exactly when no tier above the evaluator is wanted or to be had.

use twofold_arch::{PhysAddr, TbFlags};
use twofold_backend::{CodeMemory, DirectEmitter, Emitter, HelperTable, Options, REGION_SLOTS, SlotRef};
use twofold_ir::Block;
use twofold_ir::passes::Passes;

use super::cache::CodeCache;
use super::compile::CompileQueue;
use super::counts::{ExecCounts, Executions};
use super::region::RegionCells;
use super::tb::{TbId, TbStore};
use super::turns::Broadcast;
use crate::config::Tier;
use crate::profile::PerfLog;

/// When a block moves up.
#[derive(Clone, Copy, Debug)]
pub struct TierPolicy {
    /// Whether blocks get host code when they are translated.
    pub at_once: bool,
    /// Evaluator runs after which a block without host code is sent to the compile thread.
    pub warm: u32,
    /// Whether the dispatcher waits for the compile thread (`--tier quick`: everything is compiled before it runs).
    pub wait: bool,
    /// Whether hot loops become regions.
    pub regions: bool,
    /// Whether that is done as soon as a loop is seen (`--tier opt`).
    pub regions_at_once: bool,
}

/// Evaluator runs before a block that was refused is worth a compilation by Cranelift (about 100 µs of another core), and one that was
/// evicted a place in code memory: where not all that is hot has room, it must not be written anew each time it comes round.
const WARM: u32 = 32;

/// The execution machinery.
pub struct Jit {
    /// All blocks.
    pub tbs: TbStore,
    /// The IR passes with their scratch memory.
    pub passes: Passes,
    /// A block that is not needed any more, for the memory it has.
    pub spare: Block,
    /// Host code; `None` when the evaluator runs everything.
    pub code: Option<CodeMemory>,
    /// Writes host code as blocks are translated.
    pub direct: DirectEmitter,
    /// What earlier runs compiled.
    pub cache: Option<CodeCache>,
    /// The compile thread.
    pub queue: Option<CompileQueue>,
    /// When blocks move up.
    pub policy: TierPolicy,
    /// What host code calls; its address is in the state.
    pub helpers: Box<HelperTable>,
    /// The block the evaluator runs.
    pub current: Option<TbId>,
    /// The next block is one instruction that runs alone, whatever it writes to.
    pub restart: bool,
    /// The block that runs is such a one.
    pub alone: bool,
    /// The slot that host code just left by, to be linked.
    pub link_from: Option<(TbId, u16)>,
    /// The RIP at which the budget ran out in host code.
    pub sampled: Option<u64>,
    /// Host code just left for want of a jump-cache entry.
    pub fill_jump_cache: bool,
    /// Serial number of the last block made.
    pub serial: u64,
    /// What the other vCPUs have to follow before their next turn.
    pub broadcasts: Vec<Broadcast>,
    /// How often blocks ran.
    pub counts: ExecCounts,
    /// Blocks of the path that is being recorded that are still to come.
    pub recording: u32,
    /// A root whose region does not fit the present mappings: its own code runs.
    pub bypass: Option<TbId>,
    /// What the regions in code memory look at.
    pub cells: RegionCells,
    /// What `--perf` gathers.
    pub perf: Option<Box<PerfLog>>,
}

impl Jit {
    /// The machinery for `tier`. Falls back to the evaluator alone where the host has no compile tier.
    #[must_use]
    pub fn new(tier: Tier, options: Options) -> Self {
        Self::with_code_memory(tier, options, CodeMemory::DEFAULT_CAPACITY)
    }

    /// The same with another bound for host code, in bytes.
    #[must_use]
    pub fn with_code_memory(tier: Tier, options: Options, most: usize) -> Self {
        let wanted = twofold_backend::available() && tier != Tier::Eval;
        let code = if wanted { CodeMemory::new(most).ok() } else { None };
        let queue = code.as_ref().and_then(|_| CompileQueue::start(options));
        let wait = tier != Tier::Auto;
        let policy = TierPolicy {
            at_once: queue.is_some() && options.emitter == Emitter::Direct,
            warm: if wait { 1 } else { WARM },
            wait,
            regions: matches!(tier, Tier::Auto | Tier::Opt),
            regions_at_once: tier == Tier::Opt,
        };
        Self {
            tbs: TbStore::default(),
            passes: Passes::default(),
            spare: Block::default(),
            code,
            direct: DirectEmitter::default(),
            cache: None,
            queue,
            policy,
            helpers: Box::new(super::slow::helper_table()),
            current: None,
            restart: false,
            alone: false,
            link_from: None,
            sampled: None,
            fill_jump_cache: false,
            serial: 0,
            broadcasts: Vec::new(),
            counts: ExecCounts::default(),
            recording: 0,
            bypass: None,
            cells: RegionCells::default(),
            perf: None,
        }
    }

    /// Uses the persistent cache, and fills it.
    pub fn set_cache(&mut self, cache: CodeCache) {
        if self.queue.is_some() {
            self.cache = Some(cache);
        }
    }

    /// Forgets how host code was last left: the machine is reset.
    pub fn forget_exits(&mut self) {
        (self.current, self.link_from) = (None, None);
        (self.restart, self.alone, self.fill_jump_cache) = (false, false, false);
        self.broadcasts.clear();
    }

    /// The block whose host code contains `host`.
    #[must_use]
    pub fn code_block(&self, host: u64) -> Option<TbId> {
        self.code.as_ref()?.tb_at(host).map(TbId)
    }

    /// Where a call from host code that returns to `host_ret` was made: the guest instruction's RIP minus `rip_base`, and
    /// what its abandonment gives back to the budget (charged at the block's entry, not retired).
    #[must_use]
    pub fn fault_site(&self, host_ret: u64) -> Option<(i32, i32)> {
        let tb = self.tbs.get(self.code_block(host_ret)?);
        if let Some(site) = tb.region.as_ref().and_then(|r| r.code.site(host_ret)) {
            return Some(site);
        }
        let code = tb.code.as_ref()?;
        let insn = code.insn_at(host_ret)?;
        Some((tb.insn_offs.get(insn).copied()?.into(), code.unretired(insn)))
    }

    /// What every block did, dead ones included: by the evaluator, and by host code if that is counted.
    #[must_use]
    pub fn executions(&self) -> Vec<Executions> {
        let live = self.tbs.iter().map(|(id, tb)| self.counts.executions(id, tb));
        live.chain(self.counts.gone()).collect()
    }

    /// Makes slot `slot` of block `from` lead straight to block `to`.
    pub fn link(&mut self, from: TbId, slot: u16, to: TbId) {
        let Some(entry) = self.tbs.get(to).entry() else { return };
        let Some(source) = self.slot(from, slot) else { return };
        // A page that was mapped anew while this code was on its way out.
        if self.slot_page(from, slot, source) != Some(self.tbs.get(to).key.pa.page()) {
            return;
        }
        if let Some(code) = &mut self.code {
            code.link(source, entry);
            self.tbs.get_mut(to).incoming.push((from, slot));
        }
    }

    /// Makes slot `slot` of block `from` lead through the jump cache.
    pub fn link_far(&mut self, from: TbId, slot: u16, flags: TbFlags) {
        if let (Some(source), Some(code)) = (self.slot(from, slot), &mut self.code) {
            code.link_far(source, flags.size());
        }
    }

    /// Makes slots leave to the dispatcher again.
    pub fn unlink(&mut self, slots: &[(TbId, u16)]) {
        for &(from, slot) in slots {
            if let (Some(source), Some(code)) = (self.slot(from, slot), &mut self.code) {
                code.unlink(source);
            }
        }
    }

    /// The physical page of the target of a slot.
    fn slot_page(&self, from: TbId, slot: u16, source: SlotRef) -> Option<PhysAddr> {
        let tb = self.tbs.get(from);
        if slot < REGION_SLOTS || source.page == 0 {
            return Some(tb.key.pa.page());
        }
        tb.region.as_ref()?.pages.iter().find(|p| p.0 == source.page).map(|p| p.1)
    }

    /// Slot `slot` of block `from`: of its own code, or of the region that it is the root of.
    #[must_use]
    pub fn slot(&self, from: TbId, slot: u16) -> Option<SlotRef> {
        let tb = self.tbs.get(from);
        let (code, slot) = match slot.checked_sub(REGION_SLOTS) {
            Some(slot) => (&tb.region.as_ref()?.code, slot),
            None => (tb.code.as_ref()?, slot),
        };
        code.slots.get(usize::from(slot)).copied()
    }

    /// Whether the compile thread has something to install. One load.
    #[inline]
    #[must_use]
    pub fn compile_ready(&self) -> bool {
        self.queue.as_ref().is_some_and(CompileQueue::has_ready)
    }
}
