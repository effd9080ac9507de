//! Regions: which blocks become one function of the optimising tier, and what happens when one of them dies.
//!
//! Place in the pipeline: between the dispatcher, which says where time is spent, and the compile thread. Heat costs nothing:
//! whenever the budget runs out in host code, the block that would come next has been sampled. A block with a few samples
//! becomes the root of a region: what it leads to inside its page, as far as that leads back to it.
//!
//! Invariants: a region lives as long as all its members; its code is the entry of its root, and of nothing else. A member that
//! dies while the region runs makes it leave at the next edge that looks (see the back end's regions).

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use twofold_arch::{PAGE_MASK, PhysAddr, TbFlags};
use twofold_backend::{CompiledTb, InstalledTb};

use super::compile::{self, Piece};
use super::tb::{TbId, TbKey};
use super::turns::Broadcast;
use crate::vcpu::Vcpu;

/// Samples that make a root: more than a million guest instructions, about what a compilation costs (1 to 4 ms).
const HOT_SAMPLES: u32 = 24;
/// Most blocks of a region.
const MAX_BLOCKS: usize = 24;
/// Most guest instructions of a region.
const MAX_INSNS: usize = 400;

/// A region in code memory.
#[derive(Debug)]
pub struct Region {
    /// Its code.
    pub code: InstalledTb,
    /// Its blocks, the root among them.
    pub members: Vec<TbId>,
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
    if tb.samples >= HOT_SAMPLES && (again || tb.region_state == RegionState::None) {
        request(vcpu, id);
    }
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
    let refused = members.is_empty();
    let tb = vcpu.jit.tbs.get_mut(root);
    tb.region_state = if refused { RegionState::Refused } else { RegionState::Queued };
    if refused {
        vcpu.counters.regions_refused += 1;
        return;
    }
    vcpu.counters.region_requests += 1;
    let pieces = members.iter().map(|&id| Piece::of(vcpu, id)).collect();
    compile::push_region(vcpu, pieces);
}

/// The blocks of a region, the root first; none when nothing leads back to it.
fn select(vcpu: &Vcpu, root: TbId) -> Vec<TbId> {
    let tbs = &vcpu.jit.tbs;
    let key = tbs.get(root).key;
    let page = key.pa.0 & PAGE_MASK;
    let fits = |id: TbId| {
        let tb = tbs.get(id);
        tb.live && tb.second_page.is_none() && tb.code.is_some()
    };
    if key.flags.has(TbFlags::ONE_INSN) || !fits(root) {
        return Vec::new();
    }
    // Breadth first: what is near the root.
    let mut found = vec![root];
    let mut edges: HashMap<TbId, Vec<TbId>> = HashMap::new();
    let mut insns = usize::from(tbs.get(root).insns);
    let mut next = 0;
    while let Some(&id) = found.get(next) {
        next += 1;
        let slots = tbs.get(id).code.as_ref().map(|c| &*c.slots).unwrap_or_default();
        for slot in slots {
            let key = TbKey { pa: PhysAddr(page + u64::from(slot.off)), flags: key.flags };
            let Some(to) = tbs.peek(key).filter(|&to| fits(to)) else { continue };
            if !found.contains(&to) {
                let more = usize::from(tbs.get(to).insns);
                if found.len() >= MAX_BLOCKS || insns + more > MAX_INSNS {
                    continue;
                }
                insns += more;
                found.push(to);
            }
            edges.entry(to).or_default().push(id);
        }
    }
    // Those that lead back.
    let mut back = vec![root];
    let mut next = 0;
    while let Some(&id) = back.get(next) {
        next += 1;
        for &from in edges.get(&id).into_iter().flatten() {
            if !back.contains(&from) {
                back.push(from);
            }
        }
    }
    if edges.get(&root).is_none_or(Vec::is_empty) {
        return Vec::new();
    }
    found.retain(|id| back.contains(id));
    found
}

/// The compile thread has the code of a region of these blocks, the root first.
pub fn install(vcpu: &mut Vcpu, members: &[(TbId, u64)], compiled: &CompiledTb) {
    let Some(&(root, _)) = members.first() else { return };
    let alive = members.iter().all(|&(id, serial)| {
        let tb = vcpu.jit.tbs.get(id);
        tb.live && tb.serial == serial && tb.code.is_some()
    });
    if !alive {
        vcpu.counters.compile_stale += 1;
        let (id, serial) = members[0];
        let tb = vcpu.jit.tbs.get_mut(id);
        if tb.serial == serial {
            (tb.region_state, tb.samples) = (RegionState::None, 0);
        }
        return;
    }
    let Some(code) = &mut vcpu.jit.code else { return };
    let Ok(installed) = code.install(compiled, root.0) else {
        // Those that are hot will ask again when there is room.
        compile::evict(vcpu);
        let tb = vcpu.jit.tbs.get_mut(root);
        (tb.region_state, tb.samples) = (RegionState::None, 0);
        return;
    };
    vcpu.counters.regions += 1;
    vcpu.counters.code_bytes += compiled.len() as u64;
    let members: Vec<TbId> = members.iter().map(|m| m.0).collect();
    for &id in &members {
        vcpu.jit.tbs.get_mut(id).in_regions.push(root);
    }
    compile::profile(vcpu, root, &installed, "opt");
    let entry = installed.entry;
    let tb = vcpu.jit.tbs.get_mut(root);
    tb.region = Some(Box::new(Region { code: installed, members }));
    tb.region_state = RegionState::Installed;
    let incoming = tb.incoming.clone();
    for (from, slot) in incoming {
        if let (Some(source), Some(code)) = (vcpu.jit.slot(from, slot), &mut vcpu.jit.code) {
            code.link(source, entry);
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
    (tb.region_state, tb.samples) = (RegionState::None, 0);
    let incoming = std::mem::take(&mut tb.incoming);
    for &id in &region.members {
        vcpu.jit.tbs.get_mut(id).in_regions.retain(|&r| r != root);
    }
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
