//! Several vCPUs in turn on one thread: each runs a slice, then the next one has the machinery.
//!
//! Place in the pipeline: above the dispatcher, for machines with more than one processor. Invariants: exactly one vCPU, the
//! one whose turn it is, holds the blocks and their host code ([`Jit`]); before a vCPU's turn begins it has done everything
//! that turns of others asked of all ([`Broadcast`]); a vCPU sees interrupts, INIT and SIPI at the start of its turn.

use std::sync::atomic::Ordering;
use std::time::Duration;

use twofold_arch::PhysAddr;

use super::dispatch::{self, RunEnd};
use crate::config::Control;
use crate::vcpu::Vcpu;

/// What one vCPU does to the blocks that the others' caches must follow.
#[derive(Clone, Copy, Debug)]
pub enum Broadcast {
    /// This page holds code now: writes to it take the slow path.
    Protect(PhysAddr),
    /// The code for this RIP is gone from host code.
    Forget(u64),
    /// Code memory was evicted: jump caches are empty.
    ForgetAll,
}

/// Runs the processors in turn until something ends the run. The first one holds the machinery at the start, and the one
/// that ended the run at the end: its place in `vcpus` is returned too.
pub fn run(vcpus: &mut [Box<Vcpu>], control: &Control) -> (RunEnd, usize) {
    if let [only] = vcpus {
        return (dispatch::run(only, control), 0);
    }
    for vcpu in vcpus.iter_mut() {
        vcpu.in_turn = true;
    }
    let mut holder = 0;
    loop {
        let mut asleep = 0;
        for i in 0..vcpus.len() {
            pass(vcpus, holder, i);
            holder = i;
            // Devices are looked at once a turn; a kick meant for any processor is noticed here.
            vcpus[i].state.attention.store(-1, Ordering::Relaxed);
            match dispatch::run(&mut vcpus[i], control) {
                RunEnd::TurnOver => {}
                RunEnd::Asleep => asleep += 1,
                end => return (end, i),
            }
        }
        if asleep == vcpus.len()
            && !vcpus.iter().any(|v| v.is_woken())
            && let Err(end) = sleep(vcpus, control)
        {
            return (end, holder);
        }
    }
}

/// Hands the machinery from one vCPU to another, with what the others have to follow.
fn pass(vcpus: &mut [Box<Vcpu>], from: usize, to: usize) {
    for b in std::mem::take(&mut vcpus[from].jit.broadcasts) {
        for (_, v) in vcpus.iter_mut().enumerate().filter(|(i, _)| *i != from) {
            match b {
                Broadcast::Protect(page) => v.mmu.revoke_write(page),
                Broadcast::Forget(rip) => v.mmu.jump_forget(rip),
                Broadcast::ForgetAll => v.mmu.jump_clear(),
            }
        }
    }
    if let Ok([a, b]) = vcpus.get_disjoint_mut([from, to]) {
        std::mem::swap(&mut a.jit, &mut b.jit);
        b.state.exec_counts = a.state.exec_counts;
    }
}

/// All processors wait: until a timer, input or a kick.
fn sleep(vcpus: &mut [Box<Vcpu>], control: &Control) -> Result<(), RunEnd> {
    let can_wake = vcpus.iter().any(|v| v.can_take_interrupts());
    let boot = &mut vcpus[0];
    let start = boot.shared.clock.now_ns();
    let (deadline, device) = {
        let mut p = boot.platform();
        p.flush();
        (p.next_deadline(), p.can_wake())
    };
    // A guest's HLT ends by its preemption timer, too.
    let timer = vcpus.iter().filter_map(|v| v.vmx.timer).min();
    let boot = &mut vcpus[0];
    if !can_wake || (!device && timer.is_none()) {
        return Err(RunEnd::Halted);
    }
    let deadline = [deadline, timer].into_iter().flatten().min();
    let limit = deadline.map_or(Duration::from_millis(100), |d| Duration::from_nanos(d.saturating_sub(start)));
    if !limit.is_zero() && control.stopped().is_none() {
        boot.waker.sleep(limit.min(Duration::from_secs(1)));
    }
    boot.counters.idle_ns += boot.shared.clock.now_ns().saturating_sub(start);
    Ok(())
}
