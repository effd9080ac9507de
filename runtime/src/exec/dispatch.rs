//! The dispatcher: the loop that delivers events, finds the next block and runs it in its tier.
//!
//! Place in the pipeline: the top of execution, one call per vCPU. Invariants: on entry to a block `rip_base` and the page
//! offset agree with its linear address, `tb_flags` are those of its key; between blocks `state.rip` is valid and
//! `budget` has been charged exactly for what retired.
#![allow(unsafe_code)] // enters host code, and runs a program that stays in place while its block is in the store

use std::sync::atomic::Ordering;
use std::time::Duration;

use twofold_arch::control::rflags;
use twofold_arch::{Exception, LinearAddr, PAGE_MASK, PhysAddr, TbFlags};
use twofold_backend::Leave as CodeLeave;
use twofold_ir::eval::{Leave, Target};
use twofold_mmu::{FlushCause, JumpCacheEntry};

use super::counters::Phase;
use super::env::Env;
use super::tb::{TbId, TbKey, TierState};
use crate::config::{Control, DebugItem, StopReason};
use crate::cpu::{debug, interrupt, mode, smm};
use crate::fpu;
use crate::platform::{Outcome, signal};
use crate::vcpu::{Shutdown, Trap, Vcpu};
use crate::vmx;

/// Guest instructions between two looks at the clock.
const SLICE: i32 = 50_000;

/// `fault.pending` of an ordinary exception.
pub const PENDING_EXCEPTION: u32 = 1;
/// `fault.pending` of a VM exit.
pub const PENDING_VM_EXIT: u32 = 3;
/// `fault.pending` of a store into the running block: run the instruction again, alone.
pub const PENDING_RESTART: u32 = 2;

/// Why a vCPU stopped running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunEnd {
    /// The machine was powered off, reset or told to exit.
    Outcome(Outcome),
    /// Shutdown state.
    Shutdown(Shutdown),
    /// HLT that nothing can end.
    Halted,
    /// Somebody outside asked.
    Stopped(StopReason),
    /// The slice is used up, and other vCPUs wait for their turn.
    TurnOver,
    /// HLT, or waiting for a start-up IPI; other vCPUs may run.
    Asleep,
}

/// Where control goes after a block.
enum Next {
    /// Another block of the same physical page and key bits, at this page offset.
    SamePage(u16),
    /// `state.rip` is set; the key bits are unchanged but for those that say where the code is.
    Rip,
    /// `state.rip` is set; anything may have changed.
    Events,
    /// The instruction at `state.rip` did not complete.
    Trap(Trap),
    /// The instruction at `state.rip` runs again on its own.
    Restart,
    /// The instruction at `state.rip`, which was to run on its own, did not: something wants attention first.
    NotRun,
}

/// Runs `vcpu` until something ends the run.
pub fn run(vcpu: &mut Vcpu, control: &Control) -> RunEnd {
    fpu::enter(&vcpu.state);
    let end = run_loop(vcpu, control);
    fpu::leave(&mut vcpu.state);
    end
}

fn run_loop(vcpu: &mut Vcpu, control: &Control) -> RunEnd {
    let mut granted = vcpu.state.budget;
    let mut slices = 0;
    loop {
        vcpu.enter_phase(Phase::Dispatch);
        if let Err(end) = events(vcpu, control, &mut granted, &mut slices) {
            return end;
        }
        if let Err(s) = advance(vcpu) {
            settle(vcpu, &mut granted);
            return RunEnd::Shutdown(s);
        }
    }
}

/// Moves what was used of the budget into the count of retired instructions.
fn settle(vcpu: &mut Vcpu, granted: &mut i32) {
    vcpu.state.retired = vcpu.state.retired.wrapping_add_signed(i64::from(*granted) - i64::from(vcpu.state.budget));
    *granted = vcpu.state.budget;
}

/// Everything that happens between blocks: time, input, interrupts, sleep, the end.
fn events(vcpu: &mut Vcpu, control: &Control, granted: &mut i32, slices: &mut u32) -> Result<(), RunEnd> {
    loop {
        let wanted = vcpu.state.attention.load(Ordering::Relaxed) != 0;
        // A budget too small for the next block counts as used up.
        if wanted || vcpu.state.budget < 128 {
            vcpu.state.attention.store(0, Ordering::Release);
            if let Some(reason) = control.stopped() {
                settle(vcpu, granted);
                return Err(RunEnd::Stopped(reason));
            }
            let now = vcpu.shared.clock.now_ns();
            let (outcome, signals) = {
                let mut p = vcpu.platform();
                p.poll(now);
                (p.outcome(), p.signals(vcpu.index))
            };
            if let Some(o) = outcome {
                settle(vcpu, granted);
                return Err(RunEnd::Outcome(o));
            }
            settle(vcpu, granted);
            let used_up = vcpu.state.budget < 128;
            vcpu.state.budget = vmx::events::slice(vcpu, now, SLICE);
            *granted = vcpu.state.budget;
            if vcpu.in_turn {
                let yields = std::mem::take(&mut vcpu.yields);
                if *slices > 0 && (used_up || yields) {
                    return Err(RunEnd::TurnOver);
                }
                *slices += 1;
            }
            vcpu.smm.pending |= signals & signal::SMI != 0;
            if vcpu.smm.pending {
                smm::take(vcpu).map_err(RunEnd::Shutdown)?;
            }
            if signals & (signal::INIT | signal::SIPI) != 0 {
                start_up_signals(vcpu);
            }
        } else if vcpu.smm.pending {
            // Blocked until now, by a load of SS.
            smm::take(vcpu).map_err(RunEnd::Shutdown)?;
        }
        if vcpu.wait_for_sipi {
            return Err(RunEnd::Asleep);
        }
        if vcpu.vmx.non_root || vcpu.vmx.aborted {
            vmx::events::deliver(vcpu).map_err(RunEnd::Shutdown)?;
        } else {
            deliver_pending(vcpu).map_err(RunEnd::Shutdown)?;
        }
        if vcpu.state.halted == 0 {
            return Ok(());
        }
        if vcpu.in_turn {
            return Err(RunEnd::Asleep);
        }
        sleep(vcpu, control)?;
    }
}

/// INIT and start-up IPIs (SDM Vol 3A, "Multiple-Processor Initialization"). In VMX operation INIT waits for its end or for
/// a guest to exit from, and only a guest that waits for it takes a SIPI.
pub(crate) fn start_up_signals(vcpu: &mut Vcpu) {
    let index = vcpu.index;
    let signals = vcpu.platform().signals(index);
    if signals & (signal::INIT | signal::SIPI) == 0 {
        return;
    }
    if vcpu.smm.is_active() {
        // INIT waits for RSM.
        vcpu.platform().take_signal(index, signal::SIPI);
        return;
    }
    if vcpu.vmx.vmxon.is_some() {
        return vmx::events::start_up_signals(vcpu, signals);
    }
    if vcpu.platform().take_signal(index, signal::INIT) {
        crate::cpu::init(vcpu);
        vcpu.platform().init_apic(index);
        vcpu.wait_for_sipi = index != 0;
    }
    if vcpu.platform().take_signal(index, signal::SIPI) && std::mem::take(&mut vcpu.wait_for_sipi) {
        let page = vcpu.platform().sipi_vector(index);
        let cs = &mut vcpu.state.seg[1];
        cs.selector = u16::from(page) << 8;
        cs.base = u64::from(page) << 12;
        vcpu.state.rip = 0;
    }
}

/// One turn of the loop: events, then blocks until something may have changed.
#[cfg(test)]
pub(crate) fn step(vcpu: &mut Vcpu) -> Result<(), Shutdown> {
    vcpu.state.attention.store(0, Ordering::Relaxed);
    if vcpu.state.budget < 128 {
        vcpu.state.budget = SLICE;
    }
    smm::take(vcpu)?;
    start_up_signals(vcpu);
    if vcpu.vmx.non_root || vcpu.vmx.aborted {
        vmx::events::deliver(vcpu)?;
    } else {
        deliver_pending(vcpu)?;
    }
    if vcpu.state.halted == 0 { advance(vcpu) } else { Ok(()) }
}

/// Delivers an NMI or interrupt if one may be delivered now.
fn deliver_pending(vcpu: &mut Vcpu) -> Result<(), Shutdown> {
    let index = vcpu.index;
    if vcpu.state.shadow != 0 || !vcpu.shared.is_due(index) {
        return Ok(());
    }
    let interrupts_on = vcpu.state.rflags_sys & rflags::IF != 0;
    let nmis_on = vcpu.state.nmi_blocked == 0;
    let (nmi, pending) = {
        let mut p = vcpu.platform();
        let nmi = nmis_on && p.signals(index) & signal::NMI != 0;
        if !(nmi || interrupts_on && p.interrupt_pending(index).is_some()) {
            return Ok(());
        }
        (nmi, if nmi { None } else { Some(p.acknowledge(index)) })
    };
    if nmi {
        vcpu.platform().take_signal(index, signal::NMI);
        vcpu.state.halted = 0;
        vcpu.counters.nmis += 1;
        return interrupt::deliver(vcpu, interrupt::Event::Nmi);
    }
    if let Some(vector) = pending {
        vcpu.state.halted = 0;
        vcpu.counters.interrupts += 1;
        return interrupt::deliver(vcpu, interrupt::Event::Interrupt(vector));
    }
    Ok(())
}

/// HLT: waits for a timer, input or a kick.
fn sleep(vcpu: &mut Vcpu, control: &Control) -> Result<(), RunEnd> {
    let start = vcpu.shared.clock.now_ns();
    let (deadline, can_wake) = {
        let mut p = vcpu.platform();
        p.flush();
        (p.next_deadline(), p.can_wake())
    };
    let interrupts_on = vcpu.state.rflags_sys & rflags::IF != 0;
    // A guest's HLT ends by what exits, too.
    let timer = vcpu.vmx.timer;
    let deadline = [deadline, timer].into_iter().flatten().min();
    if (!interrupts_on && !vcpu.vmx.non_root) || (!can_wake && timer.is_none()) {
        return Err(RunEnd::Halted);
    }
    let limit = deadline.map_or(Duration::from_millis(100), |d| Duration::from_nanos(d.saturating_sub(start)));
    if !limit.is_zero() && control.stopped().is_none() {
        vcpu.waker.sleep(limit.min(Duration::from_secs(1)));
    }
    vcpu.state.attention.store(-1, Ordering::Relaxed);
    vcpu.counters.idle_ns += vcpu.shared.clock.now_ns().saturating_sub(start);
    Ok(())
}

/// What an instruction that runs on its own may owe a debug exception for.
struct Step {
    /// It began with RFLAGS.TF set.
    single: bool,
    /// It began under RFLAGS.RF.
    resume: u64,
    /// Software interrupts so far: one clears TF before a step could be reported.
    interrupts: u64,
}

impl Step {
    /// RFLAGS.RF holds for one instruction.
    fn begin(vcpu: &mut Vcpu, watching: bool) -> Self {
        let flags = vcpu.state.rflags_sys;
        vcpu.state.rflags_sys = flags & !rflags::RF;
        vcpu.watch.armed = watching;
        let interrupts = vcpu.counters.soft_interrupts;
        Self { single: flags & rflags::TF != 0, resume: flags & rflags::RF, interrupts }
    }

    /// The instruction did not run.
    fn undo(&self, vcpu: &mut Vcpu) {
        vcpu.watch.armed = false;
        vcpu.state.rflags_sys |= self.resume;
        vcpu.state.shadow = vcpu.vmx.shadow;
    }

    /// The instruction is done: its debug traps, which a load of SS puts off (data) or loses (single step). With `mtf`, an MTF
    /// VM exit comes before them and finds them pending.
    fn end(&self, vcpu: &mut Vcpu, mtf: bool) -> Result<(), Shutdown> {
        let blocked = vcpu.state.shadow & 2 != 0;
        let interrupted = vcpu.counters.soft_interrupts != self.interrupts;
        let mut bits = vcpu.watch.take(blocked);
        let single = vcpu.step_after.take().unwrap_or(self.single);
        if single && !blocked && !interrupted {
            bits |= interrupt::dr6::BS;
        }
        if bits != 0 && mtf {
            vmx::events::leave_pending(vcpu, bits);
            return Ok(());
        }
        if bits == 0 { Ok(()) } else { interrupt::debug_trap(vcpu, bits) }
    }
}

/// Runs blocks from `state.rip` until the key or the event state may have changed.
fn advance(vcpu: &mut Vcpu) -> Result<(), Shutdown> {
    if vcpu.debug.has(DebugItem::Tlb) {
        trace_tlb(vcpu);
    }
    let watching = debug::any_enabled(&vcpu.state);
    if watching && !vcpu.jit.restart {
        let hits = debug::instruction_hits(&vcpu.state);
        if hits != 0 {
            charge_exception(vcpu);
            return interrupt::debug_trap(vcpu, hits);
        }
    }
    let step = Step::begin(vcpu, watching);
    let trap_flag = vmx::monitor_trap_flag(vcpu);
    let alone = step.single || watching || vcpu.state.shadow != 0 || vcpu.jit.restart || trap_flag;
    vcpu.vmx.shadow = vcpu.state.shadow;
    vcpu.vmx.iret_unblocked = false;
    vcpu.state.shadow = 0;
    let world = vcpu.vmx.transitions;
    let mut flags = mode::tb_flags(&vcpu.state);
    if alone {
        flags.0 |= TbFlags::ONE_INSN;
    }
    (vcpu.state.tb_flags, vcpu.state.onward) = (flags.0, 0);
    vcpu.jit.alone = alone;
    vcpu.jit.restart = false;
    let next = chain(vcpu, flags);
    vcpu.jit.current = None;
    if vcpu.jit.tbs.has_dying() {
        vcpu.jit.tbs.quiescent();
    }
    match next {
        Next::Trap(trap) => {
            let held = vcpu.watch.take_held();
            charge_exception(vcpu);
            if held != 0 && vcpu.vmx.non_root {
                return vmx::events::trap_behind_mov_ss(vcpu, trap, held);
            }
            interrupt::deliver_trap(vcpu, trap)?;
        }
        Next::Restart => {
            vcpu.jit.restart = true;
            step.undo(vcpu);
            return Ok(());
        }
        Next::NotRun => {
            step.undo(vcpu);
            return Ok(());
        }
        _ if alone && vcpu.vmx.transitions == world => step.end(vcpu, trap_flag)?,
        _ => {
            vcpu.watch = debug::Watch::default();
            if vcpu.step_after.take() == Some(true) && vcpu.vmx.transitions == world {
                interrupt::single_step(vcpu)?;
            }
        }
    }
    if trap_flag && vcpu.vmx.transitions == world {
        vcpu.vmx.mtf_pending = true;
    }
    Ok(())
}

/// After a helper that set `state.rip` and may have changed the mode: translated code goes on there from the jump cache, if it would
/// not find the dispatcher doing anything else. What is due makes it leave at the first block's entry.
#[inline]
pub(crate) fn pass_on(vcpu: &mut Vcpu) {
    let state = &vcpu.state;
    if vcpu.jit.alone || state.shadow != 0 || vcpu.vmx.non_root || !vcpu.debug.is_empty() {
        return;
    }
    let flags = mode::tb_flags(state);
    if flags.has(TbFlags::TF) || !is_unlimited(flags) {
        return;
    }
    // RF holds for one instruction, and without breakpoints for none.
    vcpu.state.rflags_sys &= !rflags::RF;
    (vcpu.state.tb_flags, vcpu.state.onward) = (flags.0, 1);
    if vcpu.shared.is_due(vcpu.index) {
        vcpu.state.attention.store(-1, Ordering::Relaxed);
    }
}

/// Whether code may begin anywhere: where CS has a limit, the dispatcher looks at it.
#[inline]
fn is_unlimited(flags: TbFlags) -> bool {
    flags.is64() || flags.no_limit(1)
}

/// An exception takes of the budget, as an instruction does, though none retires: a handler that faults at once would keep
/// time, interrupts and the other processors waiting for ever.
fn charge_exception(vcpu: &mut Vcpu) {
    vcpu.state.budget -= 1;
    vcpu.state.retired = vcpu.state.retired.wrapping_sub(1);
}

/// Runs block after block while nothing but RIP changes, and the mode where host code has followed it.
fn chain(vcpu: &mut Vcpu, mut flags: TbFlags) -> Next {
    // The way out of the last block leads to this one only if nothing came between, such as a fault of the fetch.
    (vcpu.jit.link_from, vcpu.jit.fill_jump_cache) = (None, false);
    vcpu.jit.recording = 0;
    if let Some(code) = known_code(vcpu, flags) {
        vcpu.enter_phase(Phase::Code);
        match run_code(vcpu, code) {
            Next::Rip => {
                flags = TbFlags(vcpu.state.tb_flags);
                if flags.at(vcpu.state.rip) != flags {
                    return Next::Rip;
                }
            }
            other => return other,
        }
    } else {
        // Whoever comes here again finds it there.
        vcpu.jit.fill_jump_cache = !vcpu.jit.alone;
    }
    let mut id = match locate(vcpu, flags) {
        Ok(id) => id,
        Err(trap) => return Next::Trap(trap),
    };
    if vcpu.jit.sampled.take() == Some(vcpu.state.rip) {
        super::region::sample(vcpu, id);
    }
    connect(vcpu, id, flags);
    loop {
        let base = vcpu.state.rip_base;
        let n = i32::from(vcpu.jit.tbs.get(id).insns);
        if vcpu.state.budget < n || vcpu.state.attention.load(Ordering::Relaxed) < 0 {
            let off = vcpu.jit.tbs.get(id).key.pa.page_offset();
            set_rip(vcpu, off as i32);
            return if vcpu.jit.alone { Next::NotRun } else { Next::Events };
        }
        if vcpu.jit.compile_ready() {
            super::compile::install_ready(vcpu);
        }
        if vcpu.jit.policy.wait && vcpu.jit.tbs.get(id).tier == TierState::Cold {
            super::compile::compile_now(vcpu, id);
        }
        if vcpu.debug.has(DebugItem::Exec) {
            trace_block(vcpu, id);
        }
        let entry = entry(vcpu, id);
        let next = match entry {
            Some(entry) => {
                vcpu.enter_phase(Phase::Code);
                let next = run_code(vcpu, entry);
                flags = TbFlags(vcpu.state.tb_flags);
                next
            }
            None => {
                vcpu.enter_phase(Phase::Eval);
                run_eval(vcpu, id)
            }
        };
        let found = match next {
            Next::SamePage(off) if !flags.has(TbFlags::ONE_INSN) => same_page(vcpu, id, off, flags),
            Next::Rip if !flags.has(TbFlags::ONE_INSN) && flags.at(vcpu.state.rip) == flags => locate(vcpu, flags),
            Next::SamePage(off) => {
                set_rip(vcpu, i32::from(off));
                return Next::Events;
            }
            other => return other,
        };
        let from = id;
        id = match found {
            Ok(id) => id,
            Err(trap) => return Next::Trap(trap),
        };
        if vcpu.jit.recording != 0 {
            super::region::record(vcpu, from, id, base);
        }
        connect(vcpu, id, flags);
    }
}

/// The host code at `state.rip` from the jump cache, with `rip_base` set for it, when nothing asks for more than to run it.
#[inline]
fn known_code(vcpu: &mut Vcpu, flags: TbFlags) -> Option<u64> {
    let jit = &vcpu.jit;
    let plain = !jit.alone && jit.sampled.is_none() && jit.bypass.is_none() && !jit.compile_ready();
    if !plain || !is_unlimited(flags) || vcpu.debug.has(DebugItem::Exec) {
        return None;
    }
    let entry = vcpu.mmu.jump_get(vcpu.state.rip, flags.0.into())?;
    vcpu.state.rip_base = entry.rip_base;
    Some(entry.code)
}

/// The host code at `state.rip`, with `rip_base` set for it, when host code has not found it in the jump cache and nothing asks for
/// more than to run it.
pub(super) fn code_at_rip(vcpu: &mut Vcpu) -> Option<u64> {
    let (flags, rip) = (TbFlags(vcpu.state.tb_flags), vcpu.state.rip);
    let jit = &vcpu.jit;
    let plain = !jit.alone && jit.bypass.is_none() && !jit.compile_ready() && !jit.policy.regions_at_once;
    if !plain || !is_unlimited(flags) || flags.at(rip) != flags || !vcpu.debug.is_empty() {
        return None;
    }
    let la = linear_rip(vcpu, flags);
    // A fault is found again by whoever delivers it.
    let pa = vcpu.fetch_address(la).ok()?;
    let code = vcpu.jit.tbs.find_code(TbKey { pa, flags })?;
    vcpu.counters.code_lookups += 1;
    vcpu.state.rip_base = rip.wrapping_sub(la.page_offset());
    // Two that want the same entry by turns would put each other out; once in a while somebody who goes is right.
    if vcpu.mmu.jump_free(rip) || vcpu.counters.code_lookups.is_multiple_of(8) {
        let id = vcpu.jit.tbs.find(TbKey { pa, flags })?;
        fill_jump_cache(vcpu, id, flags, code);
    }
    Some(code)
}

/// Notes in the jump cache that the code at `state.rip`, that of block `id`, is `code`.
fn fill_jump_cache(vcpu: &mut Vcpu, id: TbId, flags: TbFlags, code: u64) {
    let la = linear_rip(vcpu, flags);
    let (rip, rip_base) = (vcpu.state.rip, vcpu.state.rip_base);
    let rips = &mut vcpu.jit.tbs.get_mut(id).cached_rips;
    if !rips.contains(&rip) {
        rips.push(rip);
    }
    vcpu.jump_insert(la, JumpCacheEntry { rip, flags: u64::from(flags.0), code, rip_base });
}

/// Where block `id` is entered; `None`: in the evaluator.
fn entry(vcpu: &mut Vcpu, id: TbId) -> Option<u64> {
    let tb = vcpu.jit.tbs.get(id);
    if vcpu.jit.recording != 0 {
        return None;
    }
    if vcpu.jit.bypass.is_some() && vcpu.jit.bypass.take() == Some(id) {
        return tb.code.as_ref().map(|c| c.entry);
    }
    tb.entry()
}

/// `-d exec`.
#[cold]
fn trace_block(vcpu: &mut Vcpu, id: TbId) {
    let tb = vcpu.jit.tbs.get(id);
    let rip = vcpu.state.rip_base.wrapping_add(tb.key.pa.page_offset());
    let text = format!("exec: {rip:016x} pa {:09x} flags {:08x} {:?}\n", tb.key.pa, tb.key.flags.0, tb.tier);
    vcpu.trace.write(&text);
}

/// `-d tlb`: what was flushed and switched since the last call.
#[cold]
fn trace_tlb(vcpu: &mut Vcpu) {
    let now = *vcpu.mmu.stats();
    let before = std::mem::replace(&mut vcpu.traced_mmu, now);
    let mut text = String::new();
    for cause in FlushCause::ALL {
        let n = now.flushes_by(cause) - before.flushes_by(cause);
        if n != 0 {
            text += &format!(" {} {n}", cause.name());
        }
    }
    let switches = now.context_switches - before.context_switches;
    if switches != 0 {
        text += &format!(" context switch {switches}");
    }
    if !text.is_empty() {
        let line = format!("tlb: before rip {:#x}:{text}\n", vcpu.state.rip);
        vcpu.trace.write(&line);
    }
}

/// Makes the way that host code just left by lead straight to block `id`, if that has host code.
fn connect(vcpu: &mut Vcpu, id: TbId, flags: TbFlags) {
    let link_from = vcpu.jit.link_from.take();
    let fill = std::mem::take(&mut vcpu.jit.fill_jump_cache);
    if link_from.is_none() && !fill {
        return;
    }
    let tb = vcpu.jit.tbs.get(id);
    if tb.code.is_none() {
        return;
    }
    match link_from {
        Some((from, slot)) if tb.second_page.is_none() => {
            vcpu.jit.link(from, slot, id);
            if vcpu.jit.policy.regions_at_once {
                super::region::eagerly(vcpu, id);
            }
        }
        // Where its second page is mapped is not known to whoever comes by a link.
        Some((from, slot)) => vcpu.jit.link_far(from, slot, flags),
        None => {}
    }
    let Some(code) = vcpu.jit.tbs.get(id).entry() else { return };
    if fill {
        fill_jump_cache(vcpu, id, flags, code);
    }
}

/// Sets `state.rip` to page offset `off`, truncated to the code size.
#[inline]
fn set_rip(vcpu: &mut Vcpu, off: i32) {
    let base = vcpu.state.rip_base;
    let rip = base.wrapping_add_signed(i64::from(off));
    // 16-bit code above 64 KiB, as VM entry and far jumps can begin it, has an EIP of 32 bits.
    let flags = TbFlags(vcpu.state.tb_flags);
    let high = flags.size() == twofold_arch::CodeSize::Bits16 && (0x1_0000..0x8000_0000).contains(&base);
    vcpu.state.rip = if high { rip as u32 as u64 } else { truncate_rip(flags, rip) };
}

#[inline]
fn truncate_rip(flags: TbFlags, rip: u64) -> u64 {
    match flags.size() {
        twofold_arch::CodeSize::Bits64 => rip,
        twofold_arch::CodeSize::Bits32 => rip as u32 as u64,
        twofold_arch::CodeSize::Bits16 => rip as u16 as u64,
    }
}

/// The linear address of `state.rip`.
fn linear_rip(vcpu: &Vcpu, flags: TbFlags) -> LinearAddr {
    if flags.is64() {
        LinearAddr(vcpu.state.rip)
    } else {
        LinearAddr(vcpu.state.rip.wrapping_add(vcpu.state.seg[1].base) & 0xffff_ffff)
    }
}

/// Finds or makes the block at `state.rip`, and sets `rip_base` for it.
fn locate(vcpu: &mut Vcpu, flags: TbFlags) -> Result<TbId, Trap> {
    vcpu.counters.lookups += 1;
    let la = linear_rip(vcpu, flags);
    if !flags.is64() && vcpu.state.rip > u64::from(vcpu.state.seg[1].limit) {
        return Err(Exception::GP0.into());
    }
    let pa = vcpu.fetch_address(la)?;
    vcpu.state.rip_base = vcpu.state.rip.wrapping_sub(la.page_offset());
    find_or_translate(vcpu, TbKey { pa, flags }, la)
}

/// The block at page offset `off` of the page that block `id` starts in.
fn same_page(vcpu: &mut Vcpu, id: TbId, off: u16, flags: TbFlags) -> Result<TbId, Trap> {
    let pa = PhysAddr((vcpu.jit.tbs.get(id).key.pa.0 & PAGE_MASK) + u64::from(off));
    let key = TbKey { pa, flags };
    let tbs = &mut vcpu.jit.tbs;
    let successors = tbs.get(id).successors;
    for (at, found) in successors {
        let tb = tbs.get(found);
        if at == off && tb.live && tb.key == key && tb.second_page.is_none() {
            return Ok(found);
        }
    }
    if let Some(found) = tbs.find(key)
        && tbs.get(found).second_page.is_none()
    {
        tbs.get_mut(id).successors = [(off, found), successors[0]];
        return Ok(found);
    }
    set_rip(vcpu, i32::from(off));
    locate(vcpu, flags)
}

fn find_or_translate(vcpu: &mut Vcpu, key: TbKey, la: LinearAddr) -> Result<TbId, Trap> {
    if let Some(id) = vcpu.jit.tbs.find(key) {
        let Some(second) = vcpu.jit.tbs.get(id).second_page else { return Ok(id) };
        // The second page's mapping is no part of the key; it must be what it was.
        let now = vcpu.fetch_address(LinearAddr((la.0 & PAGE_MASK).wrapping_add(0x1000)))?;
        if now == second {
            return Ok(id);
        }
        super::slow::drop_blocks(vcpu, &[id]);
    }
    super::translate::translate(vcpu, key, la)
}

/// Runs block `id` in the evaluator.
fn run_eval(vcpu: &mut Vcpu, id: TbId) -> Next {
    let tb = vcpu.jit.tbs.get_mut(id);
    tb.runs = tb.runs.saturating_add(1);
    let runs = tb.runs;
    if runs == vcpu.jit.policy.warm && vcpu.jit.tbs.get(id).tier == TierState::Cold {
        super::compile::promote(vcpu, id);
    }
    if vcpu.jit.tbs.get(id).program.is_none() {
        super::translate::ensure_program(vcpu, id);
    }
    let Some(program) = &vcpu.jit.tbs.get(id).program else { return Next::Trap(Exception::UD.into()) };
    let program: *const twofold_ir::eval::Program = &**program;
    vcpu.jit.current = Some(id);
    vcpu.counters.eval_blocks += 1;
    // SAFETY: nothing is added to the store while a block runs, so the program stays where it is; a block that dies while
    // it runs is only marked, and its place not reused before `quiescent`, which `advance` calls after this returns.
    let leave = unsafe { (*program).run(&mut Env::new(vcpu)) };
    match leave {
        Leave::Exit { to, retired, .. } => {
            vcpu.state.budget -= i32::from(retired);
            vcpu.counters.retired_eval += u64::from(retired);
            follow(vcpu, to)
        }
        Leave::Abandoned { insn } => {
            vcpu.state.budget -= i32::from(insn);
            vcpu.counters.retired_eval += u64::from(insn);
            let off = vcpu.jit.tbs.get(id).insn_offs.get(insn as usize).copied().unwrap_or_default();
            abandoned(vcpu, off.into())
        }
    }
}

/// Where an exit of the evaluator goes.
fn follow(vcpu: &mut Vcpu, to: Target) -> Next {
    match to {
        Target::Jump { off } => Next::SamePage(off),
        Target::JumpFar { off } => {
            set_rip(vcpu, off);
            Next::Rip
        }
        Target::Indirect { rip, .. } => {
            vcpu.state.rip = rip;
            Next::Rip
        }
        Target::Dispatch { off } => {
            set_rip(vcpu, off);
            Next::Events
        }
        Target::Helped => Next::Events,
        Target::Raise { off, exception } => {
            set_rip(vcpu, i32::from(off));
            Next::Trap(exception.into())
        }
    }
}

/// The instruction at `rip_base + off` was abandoned: reads what the helper or slow path raised.
fn abandoned(vcpu: &mut Vcpu, off: i32) -> Next {
    set_rip(vcpu, off);
    let fault = std::mem::take(&mut vcpu.state.fault);
    if fault.pending == PENDING_RESTART {
        return Next::Restart;
    }
    Next::Trap(Trap::from_record(&fault))
}

/// Runs host code from `entry` on, through every link, until it comes back.
fn run_code(vcpu: &mut Vcpu, entry: u64) -> Next {
    vcpu.jit.current = None;
    let state: *mut twofold_arch::CpuState = &mut *vcpu.state;
    // SAFETY: `entry` is the code of a live block, the state is this vCPU's with its helper table, TLB views and jump cache.
    match unsafe { twofold_backend::enter(state, entry) } {
        CodeLeave::Unlinked { tb, slot } => {
            vcpu.counters.chain_breaks += 1;
            vcpu.jit.link_from = Some((TbId(tb), slot));
            Next::Rip
        }
        CodeLeave::Lookup => {
            vcpu.counters.jump_cache_misses += 1;
            vcpu.jit.fill_jump_cache = true;
            Next::Rip
        }
        CodeLeave::Budget => {
            vcpu.counters.budget_exits += 1;
            if vcpu.state.budget < 128 {
                vcpu.jit.sampled = Some(vcpu.state.rip);
            }
            Next::Events
        }
        CodeLeave::Dispatch | CodeLeave::Helped => {
            vcpu.counters.dispatches += 1;
            Next::Events
        }
        CodeLeave::Raise => {
            let fault = std::mem::take(&mut vcpu.state.fault);
            Next::Trap(Trap::from_record(&fault))
        }
        CodeLeave::Fault => match vcpu.jit.fault_site(vcpu.state.host_ret) {
            Some((off, unretired)) => {
                vcpu.state.budget += unretired;
                abandoned(vcpu, off)
            }
            None => Next::Trap(Exception::UD.into()),
        },
    }
}
