//! Memory that the inline probe does not reach: TLB misses, accesses across pages, devices, pages that hold code.
//!
//! Called from host code through the helper table and from the evaluator. Invariants: an access that faults has changed
//! nothing and says so in `state.fault`; a store into the running block does not happen, the instruction runs again on its
//! own instead; after any other store into translated bytes the blocks made from them are gone before the next block runs.
#![allow(unsafe_code)] // the boundary to host code: gets the vCPU from the state that code was entered with

use twofold_arch::tbflags::MemMode;
use twofold_arch::{CpuState, Exception, LinearAddr, PAGE_SIZE, PhysAddr};
use twofold_backend::{AccessKind, HelperTable, MemInfo};
use twofold_ir::{MemFlags, RmwOp};
use twofold_mmu::{Beside, Mmu, Target};

use super::dispatch::PENDING_RESTART;
use super::tb::TbId;
use super::turns::Broadcast;
use crate::vcpu::{Trap, Vcpu};

/// The table that host code calls through.
#[must_use]
pub fn helper_table() -> HelperTable {
    HelperTable::new([access_entry; 3], lookup_entry, *crate::cpu::HELPERS)
}

unsafe extern "C" fn access_entry(state: *mut CpuState, addr: u64, info: u64, lo: u64, hi: u64) -> u64 {
    // SAFETY: host code passes the state it was entered with; its vCPU is alive and lent to that code.
    let vcpu = unsafe { &mut *((*state).vcpu as *mut Vcpu) };
    access(vcpu, addr, MemInfo(info), lo, hi).unwrap_or(0)
}

unsafe extern "C" fn lookup_entry(state: *mut CpuState) -> u64 {
    // SAFETY: as for `access_entry`.
    let vcpu = unsafe { &mut *((*state).vcpu as *mut Vcpu) };
    super::dispatch::code_at_rip(vcpu).unwrap_or(0)
}

/// A memory access the slow way. `None`: it did not happen, `state.fault` says why.
pub fn access(vcpu: &mut Vcpu, addr: u64, info: MemInfo, lo: u64, hi: u64) -> Option<u64> {
    let result = perform(vcpu, LinearAddr(addr), info, lo, hi);
    match result {
        Ok(v) => Some(v),
        Err(Abandoned::Trap(trap)) => {
            trap.record(&mut vcpu.state.fault);
            None
        }
        Err(Abandoned::Restart) => {
            vcpu.state.fault.pending = PENDING_RESTART;
            None
        }
    }
}

/// Why an access did not happen.
enum Abandoned {
    Trap(Trap),
    Restart,
}

impl From<Trap> for Abandoned {
    fn from(t: Trap) -> Self {
        Abandoned::Trap(t)
    }
}

fn perform(vcpu: &mut Vcpu, la: LinearAddr, info: MemInfo, lo: u64, hi: u64) -> Result<u64, Abandoned> {
    let (size, flags) = (info.bytes(), info.flags());
    let whole = flags.checked_bytes(size);
    if flags.has(MemFlags::ALIGNED) && la.0 & u64::from(whole - 1) != 0 {
        return Err(Trap::from(Exception::GP0).into());
    }
    let stack = flags.has(MemFlags::STACK);
    let mode = info.mode();
    match info.kind() {
        AccessKind::Load => {
            vcpu.counters.slow_reads += 1;
            if flags.has(MemFlags::WRITE_INTENT) {
                // What is done between such a load and its store is not done twice.
                guard_running_block(vcpu, la, size, mode, stack)?;
            }
            if whole == 32 {
                vcpu.read_bytes_mode(la, &mut [0; 32], mode, stack)?;
            }
            if size == 16 {
                let mut b = [0; 16];
                vcpu.read_bytes_mode(la, &mut b, mode, stack)?;
                let (lo, hi) = b.split_at(8);
                vcpu.state.mem_result = [lo, hi].map(|h| u64::from_le_bytes(h.try_into().unwrap_or_default()));
                return Ok(0);
            }
            Ok(vcpu.read_mode(la, size, mode, stack)?)
        }
        AccessKind::Store => {
            vcpu.counters.slow_writes += 1;
            if whole == size && store_harmless(vcpu, la, size, lo, mode, stack)? {
                return Ok(0);
            }
            guard_running_block(vcpu, la, whole, mode, stack)?;
            if size == 16 {
                let [lo, hi] = vcpu.state.mem_result;
                let bytes = (u128::from(hi) << 64 | u128::from(lo)).to_le_bytes();
                vcpu.write_bytes_mode(la, &bytes, mode, stack)?;
            } else {
                vcpu.write_mode(la, size, lo, mode, stack)?;
            }
            drop_written(vcpu);
            Ok(0)
        }
        AccessKind::Rmw(op) => {
            vcpu.counters.slow_writes += 1;
            vcpu.resolve_write(la, size, mode, stack)?;
            guard_running_block(vcpu, la, size, mode, stack)?;
            let old = vcpu.read_mode(la, size, mode, stack)?;
            vcpu.write_mode(la, size, apply(op, old, lo), mode, stack)?;
            drop_written(vcpu);
            Ok(old)
        }
        AccessKind::CmpXchg => {
            vcpu.counters.slow_writes += 1;
            vcpu.resolve_write(la, size, mode, stack)?;
            guard_running_block(vcpu, la, size, mode, stack)?;
            let old = vcpu.read_mode(la, size, mode, stack)?;
            let mask = u64::MAX >> (64 - 8 * size.clamp(1, 8));
            vcpu.write_mode(la, size, if old == lo & mask { hi } else { old }, mode, stack)?;
            drop_written(vcpu);
            Ok(old)
        }
    }
}

fn apply(op: RmwOp, old: u64, v: u64) -> u64 {
    match op {
        RmwOp::Add => old.wrapping_add(v),
        RmwOp::Sub => old.wrapping_sub(v),
        RmwOp::And => old & v,
        RmwOp::Or => old | v,
        RmwOp::Xor => old ^ v,
        RmwOp::Xchg => v,
    }
}

/// A store in one page that leaves every translation good, as most are: to plain memory, beside the translations of a code page,
/// or of what is there already. False: nothing was done.
fn store_harmless(
    vcpu: &mut Vcpu,
    la: LinearAddr,
    size: u32,
    value: u64,
    mode: MemMode,
    stack: bool,
) -> Result<bool, Abandoned> {
    if !matches!(size, 1 | 2 | 4 | 8) || la.page_offset() + u64::from(size) > PAGE_SIZE || vcpu.watch.armed {
        return Ok(false);
    }
    let t = vcpu.translate_write(la, mode, stack)?;
    if t.host.is_some() {
        return Ok(vcpu.mmu.store_cached(mode, la, size, value));
    }
    if !t.code || t.sub_page {
        return Ok(false);
    }
    match vcpu.mmu.code().beside(t.pa, size.into()) {
        Beside::No => return Ok(vcpu.mmu.holds(t.pa, size, value)),
        Beside::Yes => {}
        Beside::Crowded => give_up(vcpu, t.pa),
    }
    Ok(vcpu.mmu.write_beside(t.pa, size, value))
}

/// Drops the blocks with bytes in the page of `pa`, which is written to much more than it is executed; not if one of them runs.
#[cold]
fn give_up(vcpu: &mut Vcpu, pa: PhysAddr) {
    if !runs_from(vcpu, pa.page(), PAGE_SIZE) {
        let ids = vcpu.jit.tbs.touching(pa.page(), PAGE_SIZE);
        vcpu.counters.smc_tbs_dropped += ids.len() as u64;
        drop_blocks(vcpu, &ids);
    }
}

/// A store into the block that is running must not happen under it: the instruction runs again, alone.
fn guard_running_block(
    vcpu: &mut Vcpu,
    la: LinearAddr,
    size: u32,
    mode: MemMode,
    stack: bool,
) -> Result<(), Abandoned> {
    let parts = vcpu.resolve_write(la, size, mode, stack)?;
    // What a write to the APIC-access page makes comes right after the instruction.
    if !vcpu.jit.alone && parts.iter().any(|p| matches!(p.target, Target::Mmio { id: Mmu::APIC_ACCESS, .. })) {
        return Err(Abandoned::Restart);
    }
    if !parts.iter().any(|p| vcpu.mmu.code().touches(p.pa, u64::from(p.len))) || vcpu.jit.alone {
        return Ok(());
    }
    if parts.iter().any(|p| is_running(vcpu, p.pa, u64::from(p.len))) {
        return Err(Abandoned::Restart);
    }
    Ok(())
}

/// Whether the block or region that is running was made from any of `len` bytes at `pa`, all in one page. Counted: whoever
/// asks gives the instruction up.
pub fn is_running(vcpu: &mut Vcpu, pa: PhysAddr, len: u64) -> bool {
    let is = runs_from(vcpu, pa, len);
    vcpu.counters.smc_restarts += u64::from(is);
    is
}

fn runs_from(vcpu: &Vcpu, pa: PhysAddr, len: u64) -> bool {
    let running = vcpu.jit.current.or_else(|| vcpu.jit.code_block(vcpu.state.host_ret));
    let Some(running) = running else { return false };
    let tb = vcpu.jit.tbs.get(running);
    let region = tb.region.as_ref().filter(|r| r.code.code.contains(&vcpu.state.host_ret));
    let hit = vcpu.jit.tbs.touching(pa, len);
    hit.iter().any(|id| *id == running || region.is_some_and(|r| r.members.contains(id)))
}

/// Drops the blocks that were made from bytes written since the last call.
pub fn drop_written(vcpu: &mut Vcpu) {
    if !vcpu.mmu.code().has_written() {
        return;
    }
    let code = vcpu.mmu.code().clone();
    for w in code.take_written() {
        vcpu.counters.smc_hits += 1;
        let hit = vcpu.jit.tbs.touching(w.pa, u64::from(w.len));
        if vcpu.debug.has(crate::config::DebugItem::Smc) {
            vcpu.trace.write(&format!("smc: {} bytes at {:#x}: {} blocks dropped\n", w.len, w.pa, hit.len()));
        }
        vcpu.counters.smc_tbs_dropped += hit.len() as u64;
        drop_blocks(vcpu, &hit);
    }
}

/// Takes blocks out of the store and out of everything that leads to them.
pub fn drop_blocks(vcpu: &mut Vcpu, ids: &[TbId]) {
    for &id in ids {
        let tb = vcpu.jit.tbs.get(id);
        if !tb.live {
            continue;
        }
        let (pa, len, second) = (tb.key.pa, u64::from(tb.len), tb.second_page);
        let first = len.min(0x1000 - pa.page_offset());
        vcpu.mmu.code().remove(pa, first);
        if let Some(page) = second {
            vcpu.mmu.code().remove(page, len - first);
        }
        super::region::drop_regions_of(vcpu, id);
        vcpu.jit.counts.end(id, vcpu.jit.tbs.get(id));
        let removed = vcpu.jit.tbs.remove(id);
        vcpu.jit.unlink(&removed.incoming);
        for rip in removed.cached_rips {
            vcpu.mmu.jump_forget(rip);
            vcpu.tell_others(Broadcast::Forget(rip));
        }
    }
}
