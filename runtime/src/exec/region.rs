//! Regions: which blocks become one function of the optimising tier, and what happens when one of them dies.
//!
//! Place in the pipeline: between the dispatcher, which says where time is spent, and the compile thread. Heat costs nothing:
//! whenever the budget runs out in host code, the block that would come next has been sampled. From some of the samples on the
//! path is recorded for a while: the evaluator runs it block by block, and what leads where is noted (`Tb::edges`). A block
//! with a few samples becomes the root of a region: what it most often leads to, over calls, returns, other indirect jumps and
//! page borders.
//!
//! Invariants: a region lives as long as all its members; its code is the entry of its root, and of nothing else. A member that
//! dies while the region runs makes it leave at the next edge that looks (see the back end's regions). A region in several
//! pages is entered only where they are mapped as when it was made: [`enter`] says so, for an epoch of the TLB context.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use twofold_arch::{LinearAddr, PAGE_MASK, PhysAddr, TbFlags};
use twofold_backend::{CompiledTb, Guard, InstalledTb};

use super::compile::{self, Piece};
use super::tb::{Edge, TbId, TbKey};
use super::turns::Broadcast;
use crate::vcpu::Vcpu;

/// Samples that make a root: half a million guest instructions.
const HOT_SAMPLES: u32 = 10;
/// Blocks that are recorded after a sample.
const PATH: u32 = 64;
/// Most blocks of a region.
const MAX_BLOCKS: usize = 24;
/// Most guest instructions of a region.
const MAX_INSNS: usize = 200;
/// Most pages.
const MAX_PAGES: usize = 8;
/// All ways from the root. No floating point here: while guest code runs, the host's MXCSR is the guest's, flags and all.
const FLOW: u64 = 1 << 32;
/// Blocks that are reached by fewer of the ways from the root are left out.
const MIN_FLOW: u64 = FLOW / 16;
/// Fewer guest instructions are not worth a region that is no loop.
const MIN_INSNS: usize = 16;
/// Targets of an indirect exit that are tried one after the other.
const MAX_GUESSES: usize = 3;
/// Ways out that are noted of a block.
const MAX_EDGES: usize = 8;
/// Entries under other mappings that end a region.
const MAX_MISFITS: u32 = 16;

/// A region in code memory.
#[derive(Debug)]
pub struct Region {
    /// Its code.
    pub code: InstalledTb,
    /// Its blocks, the root among them.
    pub members: Vec<TbId>,
    /// Its pages other than the root's: distance from it, physical address.
    pub pages: Vec<(i32, PhysAddr)>,
    /// Times it was entered where other pages were mapped.
    misfits: u32,
}

/// A block of a region.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The block.
    pub id: TbId,
    /// Its serial number: the id may be another's by now.
    pub serial: u64,
    /// Its page, in bytes from the root's.
    pub page: i32,
}

/// Where a block is on its way to be the root of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RegionState {
    /// No reason for one yet.
    #[default]
    None,
    /// At the compile thread.
    Queued,
    /// Has one.
    Installed,
    /// Leads nowhere, or the compiler refused it.
    Refused,
}

/// What the code of regions in several pages compares when it is entered: an epoch and a `rip_base` each.
#[derive(Debug)]
pub struct RegionCells {
    words: Box<[AtomicU64]>,
    roots: Vec<Option<TbId>>,
}

impl Default for RegionCells {
    fn default() -> Self {
        Self { words: (0..2 * Self::COUNT).map(|_| AtomicU64::new(0)).collect(), roots: Vec::new() }
    }
}

impl RegionCells {
    const COUNT: usize = 4096;

    /// A cell for the region of `root`, if one is left. It fits no epoch.
    fn allot(&mut self, root: TbId) -> Option<Guard> {
        // One that was never installed may have been left behind.
        let own = self.roots.iter().position(|r| *r == Some(root));
        let free = own.or_else(|| self.roots.iter().position(Option::is_none));
        let number = match free {
            Some(n) => n,
            None if self.roots.len() < Self::COUNT => {
                self.roots.push(None);
                self.roots.len() - 1
            }
            None => return None,
        };
        self.roots[number] = Some(root);
        self.words[2 * number].store(0, Ordering::Relaxed);
        Some(Guard { cell: self.words[2 * number].as_ptr() as u64, number: number as u32 })
    }

    /// The region of `root` is no more.
    pub fn release(&mut self, root: TbId) {
        for (n, owner) in self.roots.iter_mut().enumerate().filter(|(_, r)| **r == Some(root)) {
            *owner = None;
            self.words[2 * n].store(0, Ordering::Relaxed);
        }
    }
}

/// The budget ran out where block `id` begins.
pub fn sample(vcpu: &mut Vcpu, id: TbId) {
    vcpu.counters.region_samples += 1;
    vcpu.counters.region_samples_inside += u64::from(!vcpu.jit.tbs.get(id).in_regions.is_empty());
    if !vcpu.jit.policy.regions {
        return;
    }
    let tb = vcpu.jit.tbs.get_mut(id);
    tb.samples = tb.samples.saturating_add(1);
    // What leads nowhere may lead back later.
    let again = tb.region_state == RegionState::Refused && tb.samples.is_power_of_two();
    let open = tb.region_state == RegionState::None || again;
    if tb.samples >= HOT_SAMPLES && open {
        request(vcpu, id);
    } else if open && tb.samples.is_multiple_of(2) {
        vcpu.jit.recording = PATH;
    }
}

/// Block `from`, whose `rip_base` was `base`, has led to block `to`.
pub fn record(vcpu: &mut Vcpu, from: TbId, to: TbId, base: u64) {
    vcpu.jit.recording -= 1;
    let serial = vcpu.jit.tbs.get(to).serial;
    let Ok(page) = i32::try_from(vcpu.state.rip_base.wrapping_sub(base) as i64) else { return };
    let edges = &mut vcpu.jit.tbs.get_mut(from).edges;
    if let Some(edge) = edges.iter_mut().find(|e| e.to == to && e.serial == serial && e.page == page) {
        edge.count += 1;
        return;
    }
    // The rarest makes room.
    if edges.len() >= MAX_EDGES
        && let Some(rarest) = (0..edges.len()).min_by_key(|&i| edges[i].count)
    {
        edges.swap_remove(rarest);
    }
    edges.push(Edge { to, serial, page, count: 1 });
}

/// Tries to make a region at once (`--tier opt`), when a link to block `id` has closed what may be a loop.
pub fn eagerly(vcpu: &mut Vcpu, id: TbId) {
    if vcpu.jit.tbs.get(id).region_state != RegionState::None {
        return;
    }
    request(vcpu, id);
    if vcpu.jit.tbs.get(id).region_state == RegionState::Queued {
        compile::wait_for_region(vcpu, id);
    } else {
        // More of its loop may be found later.
        vcpu.jit.tbs.get_mut(id).region_state = RegionState::None;
    }
}

/// Asks for a region rooted at block `root`.
fn request(vcpu: &mut Vcpu, root: TbId) {
    let members = select(vcpu, root);
    let several = members.iter().any(|m| vcpu.jit.tbs.get(m.id).pages(m.page).any(|p| p.0 != 0));
    let guard = if several { vcpu.jit.cells.allot(root) } else { None };
    let refused = members.is_empty() || several && guard.is_none();
    let tb = vcpu.jit.tbs.get_mut(root);
    tb.region_state = if refused { RegionState::Refused } else { RegionState::Queued };
    if refused {
        vcpu.counters.regions_refused += 1;
        return;
    }
    vcpu.counters.region_requests += 1;
    let pieces = members.iter().map(|m| Piece::of(vcpu, m.id).at(m.page, guesses(vcpu, m, &members))).collect();
    compile::push_region(vcpu, pieces, guard);
}

/// The ways out of block `id` that still lead somewhere: taken ones, or with `--tier opt`, where nothing is recorded, the direct
/// ones inside its page.
fn edges(vcpu: &Vcpu, id: TbId) -> Vec<Edge> {
    let tbs = &vcpu.jit.tbs;
    let tb = tbs.get(id);
    let fits = |to: TbId, serial: u64| {
        let tb = tbs.get(to);
        tb.live && tb.serial == serial && (tb.second_page.is_none() || !vcpu.jit.policy.regions_at_once)
    };
    if !vcpu.jit.policy.regions_at_once {
        return tb.edges.iter().copied().filter(|e| fits(e.to, e.serial)).collect();
    }
    let slots = tb.code.as_ref().map(|c| &*c.slots).unwrap_or_default();
    let key = |off: u16| TbKey { pa: PhysAddr((tb.key.pa.0 & PAGE_MASK) + u64::from(off)), flags: tb.key.flags };
    let found = slots.iter().filter_map(|slot| tbs.peek(key(slot.off)));
    let edge = |to: TbId| Edge { to, serial: tbs.get(to).serial, page: 0, count: 1 };
    found.map(edge).filter(|e| fits(e.to, e.serial)).collect()
}

/// The blocks of a region, the root first; none when what follows is not worth it.
fn select(vcpu: &Vcpu, root: TbId) -> Vec<Member> {
    let tbs = &vcpu.jit.tbs;
    let tb = tbs.get(root);
    if tb.key.flags.has(TbFlags::ONE_INSN) || !tb.live || tb.second_page.is_some() || tb.code.is_none() {
        return Vec::new();
    }
    let mut found: Vec<Member> = Vec::new();
    let mut pages: HashMap<i32, PhysAddr> = HashMap::new();
    // How much of what passes the root comes by.
    let mut flows: HashMap<(TbId, i32), u64> = HashMap::from([((root, 0), FLOW)]);
    let (mut insns, mut back) = (0, false);
    while found.len() < MAX_BLOCKS {
        let best = flows.iter().max_by(|a, b| a.1.cmp(b.1).then(b.0.cmp(a.0)));
        let Some((&(id, page), &flow)) = best else { break };
        flows.remove(&(id, page));
        if flow < MIN_FLOW {
            break;
        }
        let tb = tbs.get(id);
        let places = tb.pages(page);
        let mapped = places.clone().all(|(page, pa)| pages.get(&page).is_none_or(|&p| p == pa));
        let fits = insns + usize::from(tb.insns) <= MAX_INSNS && tb.key.flags == tbs.get(root).key.flags;
        if !fits || !mapped || pages.len() >= MAX_PAGES {
            continue;
        }
        insns += usize::from(tb.insns);
        pages.extend(places);
        found.push(Member { id, serial: tb.serial, page });
        let edges = edges(vcpu, id);
        let total: u32 = edges.iter().map(|e| e.count).sum();
        for e in edges {
            let to = (e.to, page.wrapping_add(e.page));
            back |= to == (root, 0);
            if !found.iter().any(|m| m.id == e.to) {
                // At most `FLOW` times a 32-bit count.
                *flows.entry(to).or_default() += flow.min(FLOW) * u64::from(e.count) / u64::from(total.max(1));
            }
        }
    }
    if back || found.len() > 1 && insns >= MIN_INSNS && !vcpu.jit.policy.regions_at_once { found } else { Vec::new() }
}

/// Where the end of a member leads to in the region, likeliest last, as distances from the root's `rip_base`.
fn guesses(vcpu: &Vcpu, member: &Member, members: &[Member]) -> Vec<i32> {
    let mut list: Vec<(u32, i32)> = Vec::new();
    for e in edges(vcpu, member.id) {
        let page = member.page.wrapping_add(e.page);
        if members.iter().any(|m| m.id == e.to && m.page == page) {
            let off = vcpu.jit.tbs.get(e.to).key.pa.page_offset() as i32;
            list.push((e.count, page.wrapping_add(off)));
        }
    }
    list.sort_unstable_by_key(|g| std::cmp::Reverse(*g));
    list.truncate(MAX_GUESSES);
    list.iter().rev().map(|g| g.1).collect()
}

/// Whether region `number`, which is being entered, may run: its pages are mapped as when it was made. If not, its root's own code
/// is next.
pub fn enter(vcpu: &mut Vcpu, number: u32) -> bool {
    let root = vcpu.jit.cells.roots.get(number as usize).copied().flatten();
    let Some(root) = root else { return false };
    let Some(region) = &vcpu.jit.tbs.get(root).region else { return false };
    let pages = region.pages.clone();
    vcpu.counters.region_checks += 1;
    let base = vcpu.state.rip_base;
    let flags = TbFlags(vcpu.state.tb_flags);
    let linear = |page: i32| {
        let rip = base.wrapping_add_signed(page.into());
        let la = if flags.is64() { rip } else { rip.wrapping_add(vcpu.state.seg[1].base) & 0xffff_ffff };
        LinearAddr(la)
    };
    let places: Vec<_> = pages.into_iter().map(|(page, pa)| (linear(page), pa)).collect();
    let fits = places.iter().all(|&(la, pa)| vcpu.fetch_address(la).is_ok_and(|found| found.page() == pa));
    if fits {
        // Looking them up changes nothing of what was looked up before.
        let epoch = places.iter().fold(0, |_, &(la, _)| vcpu.mmu.code_epoch(la));
        let words = &vcpu.jit.cells.words;
        words[2 * number as usize].store(epoch, Ordering::Relaxed);
        words[2 * number as usize + 1].store(base, Ordering::Relaxed);
    } else {
        vcpu.counters.region_misfits += 1;
        vcpu.jit.bypass = Some(root);
    }
    // What was looked up may have ended it: a walk writes to page tables.
    let Some(region) = &mut vcpu.jit.tbs.get_mut(root).region else { return false };
    region.misfits += u32::from(!fits);
    if region.misfits >= MAX_MISFITS {
        drop_region(vcpu, root);
        vcpu.jit.tbs.get_mut(root).region_state = RegionState::Refused;
    }
    fits
}

/// The compile thread has the code of a region of these blocks, the root first.
pub fn install(vcpu: &mut Vcpu, members: &[Member], compiled: &CompiledTb) {
    let Some(&Member { id: root, serial, .. }) = members.first() else { return };
    let alive = members.iter().all(|m| {
        let tb = vcpu.jit.tbs.get(m.id);
        tb.live && tb.serial == m.serial
    });
    if !alive || vcpu.jit.tbs.get(root).code.is_none() {
        vcpu.counters.compile_stale += 1;
        let tb = vcpu.jit.tbs.get_mut(root);
        if tb.serial == serial {
            (tb.region_state, tb.samples) = (RegionState::None, 0);
            vcpu.jit.cells.release(root);
        }
        return;
    }
    let Some(code) = &mut vcpu.jit.code else { return };
    let Ok(installed) = code.install(compiled, root.0) else {
        // Those that are hot will ask again when there is room.
        compile::evict(vcpu);
        vcpu.jit.cells.release(root);
        let tb = vcpu.jit.tbs.get_mut(root);
        (tb.region_state, tb.samples) = (RegionState::None, 0);
        return;
    };
    vcpu.counters.regions += 1;
    vcpu.counters.code_bytes += compiled.len() as u64;
    let mut pages: Vec<(i32, PhysAddr)> = Vec::new();
    for m in members {
        let tb = vcpu.jit.tbs.get_mut(m.id);
        tb.in_regions.push(root);
        pages.extend(tb.pages(m.page).filter(|p| p.0 != 0));
    }
    pages.sort_unstable();
    pages.dedup();
    compile::profile(vcpu, root, &installed, "opt");
    let entry = installed.entry;
    let tb = vcpu.jit.tbs.get_mut(root);
    let before = tb.entry();
    let members = members.iter().map(|m| m.id).collect();
    tb.region = Some(Box::new(Region { code: installed, members, pages, misfits: 0 }));
    tb.region_state = RegionState::Installed;
    let incoming = tb.incoming.clone();
    vcpu.jit.tbs.entry_changed(root);
    // Of those that linked to it some have died since, and their numbers are others'.
    for (from, slot) in incoming {
        if let (Some(before), Some(source), Some(code)) = (before, vcpu.jit.slot(from, slot), &mut vcpu.jit.code) {
            code.relink(source, before, entry);
        }
    }
    forget_root(vcpu, root);
}

/// Takes a root out of the jump caches.
fn forget_root(vcpu: &mut Vcpu, root: TbId) {
    for rip in std::mem::take(&mut vcpu.jit.tbs.get_mut(root).cached_rips) {
        vcpu.mmu.jump_forget(rip);
        vcpu.tell_others(Broadcast::Forget(rip));
    }
}

/// Ends the region rooted at `root`: its root goes back to its own code.
pub fn drop_region(vcpu: &mut Vcpu, root: TbId) {
    let tb = vcpu.jit.tbs.get_mut(root);
    let Some(region) = tb.region.take() else { return };
    vcpu.jit.tbs.entry_changed(root);
    let tb = vcpu.jit.tbs.get_mut(root);
    (tb.region_state, tb.samples) = (RegionState::None, 0);
    let incoming = std::mem::take(&mut tb.incoming);
    for &id in &region.members {
        vcpu.jit.tbs.get_mut(id).in_regions.retain(|&r| r != root);
    }
    vcpu.jit.cells.release(root);
    vcpu.jit.unlink(&incoming);
    forget_root(vcpu, root);
    vcpu.counters.regions_dropped += 1;
    // It may be what runs.
    vcpu.state.attention.store(-1, Ordering::Relaxed);
}

/// Ends every region that block `id` is a member of.
pub fn drop_regions_of(vcpu: &mut Vcpu, id: TbId) {
    for root in std::mem::take(&mut vcpu.jit.tbs.get_mut(id).in_regions) {
        drop_region(vcpu, root);
    }
}
