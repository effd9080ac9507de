//! Events in VMX non-root operation: injection, windows, the preemption timer, interrupts and NMIs that exit.
//!
//! Place in the pipeline: the dispatcher calls [`deliver`] between blocks, in place of its own delivery, while a guest runs.
//! The order is that of SDM Vol 3A, "Priority Among Concurrent Events", with what VMX adds to it.

use twofold_arch::control::rflags;
use twofold_arch::vmx::control::{exit, pin, proc};
use twofold_arch::vmx::event::{EventType, activity, pending_debug};
use twofold_arch::vmx::{ExitReason, Field, InterruptionInfo};

use super::{Cause, PendingExit};
use crate::cpu::interrupt;
use crate::platform::signal;
use crate::vcpu::{Shutdown, Trap, Vcpu};

/// A preemption timer that runs out sooner than this cuts the slice.
pub const SHORT_NS: u64 = 400_000;
/// The shortest slice.
const SHORTEST: i32 = 256;

/// How many instructions the guest may run before somebody looks at the clock again: at most `most`, and fewer towards the
/// end of the preemption timer.
#[must_use]
pub fn slice(v: &Vcpu, now: u64, most: i32) -> i32 {
    match v.vmx.timer {
        None => most,
        Some(at) => i32::try_from(at.saturating_sub(now) / 8).unwrap_or(most).clamp(SHORTEST, most),
    }
}

fn exit_by_event(v: &mut Vcpu, reason: ExitReason) -> Result<(), Shutdown> {
    v.vmx.exit = PendingExit::new(reason, Cause::Event, 0);
    super::exit::perform(v)
}

/// INIT and start-up IPIs in VMX operation (SDM Vol 3C, "Other Causes of VM Exits", "Waiting for SIPI"): INIT exits from a
/// guest and is blocked outside; a SIPI exits from a guest that waits for it and is lost elsewhere. What exits is left to
/// [`deliver`].
pub fn start_up_signals(v: &mut Vcpu, signals: u32) {
    let waits = v.vmx.non_root && v.vmx.activity == activity::WAIT_FOR_SIPI;
    if signals & signal::SIPI != 0 && !waits {
        let index = v.index;
        v.platform().take_signal(index, signal::SIPI);
    }
    v.vmx.init_pending = signals & signal::INIT != 0;
    v.vmx.sipi_pending = signals & signal::SIPI != 0 && waits;
}

/// Takes a pending INIT or SIPI that exits.
fn start_up_exit(v: &mut Vcpu) -> Result<(), Shutdown> {
    let index = v.index;
    if v.vmx.activity == activity::WAIT_FOR_SIPI {
        if !std::mem::take(&mut v.vmx.sipi_pending) {
            return Ok(());
        }
        v.platform().take_signal(index, signal::SIPI);
        let vector = v.platform().sipi_vector(index);
        v.vmx.exit = PendingExit::new(ExitReason::Sipi, Cause::Event, u64::from(vector));
        return super::exit::perform(v);
    }
    v.vmx.init_pending = false;
    v.platform().take_signal(index, signal::INIT);
    exit_by_event(v, ExitReason::Init)
}

/// Delivers what may be delivered now, or exits for it. Afterwards either may be the case: still in the guest, or in L1.
///
/// # Errors
/// Shutdown.
pub fn deliver(v: &mut Vcpu) -> Result<(), Shutdown> {
    if v.vmx.aborted {
        return Err(Shutdown::TripleFault);
    }
    // What happens from here on happens between instructions: an exit during a delivery is not in the last one's shadow.
    v.vmx.shadow = v.state.shadow;
    if v.vmx.inject.is_some() {
        inject_now(v)?;
        if !v.vmx.non_root {
            return Ok(());
        }
    }
    if v.vmx.init_pending || v.vmx.sipi_pending {
        start_up_exit(v)?;
        if !v.vmx.non_root {
            return Ok(());
        }
    }
    if let Some(pending) = v.vmx.trap_exit.take() {
        v.vmx.exit = pending;
        return super::exit::perform(v);
    }
    if v.vmx.mtf_pending {
        return exit_by_event(v, ExitReason::MonitorTrapFlag);
    }
    if v.state.shadow & 2 == 0 {
        pending_debug_trap(v)?;
        if !v.vmx.non_root {
            return Ok(());
        }
    }
    let waits = v.vmx.activity == activity::WAIT_FOR_SIPI;
    if !waits && v.vmx.timer.is_some_and(|at| v.shared.clock.now_ns() >= at) {
        return exit_by_event(v, ExitReason::PreemptionTimer);
    }
    let controls = v.vmx.controls;
    if v.state.shadow != 0 {
        return Ok(());
    }
    if controls.proc & proc::NMI_WINDOW_EXITING != 0 && !v.vmx.virtual_nmi_blocked && !waits {
        return exit_by_event(v, ExitReason::NmiWindow);
    }
    if nmi(v)? || !v.vmx.non_root {
        return Ok(());
    }
    let interrupts_on = v.state.rflags_sys & rflags::IF != 0;
    // What wakes the processor is what an interrupt would wake it from.
    let window = interrupts_on && !waits && v.vmx.activity != activity::SHUTDOWN;
    if controls.proc & proc::INTERRUPT_WINDOW_EXITING != 0 && window {
        return exit_by_event(v, ExitReason::InterruptWindow);
    }
    external_interrupt(v, interrupts_on)?;
    if v.vmx.non_root && controls.proc & proc::INTERRUPT_WINDOW_EXITING == 0 {
        super::apic::deliver_virtual(v)?;
    }
    Ok(())
}

/// Delivers the event that VM entry injects, if there is one, before anything else happens.
///
/// # Errors
/// Shutdown.
pub fn inject_now(v: &mut Vcpu) -> Result<(), Shutdown> {
    v.vmx.shadow = v.state.shadow;
    v.vmx.inject.take().map_or(Ok(()), |info| inject(v, info))
}

/// The event that VM entry injects.
fn inject(v: &mut Vcpu, info: InterruptionInfo) -> Result<(), Shutdown> {
    let error = v.vmx.vmcs.get32(Field::EntryErrorCode);
    let length = v.vmx.vmcs.get32(Field::EntryInstructionLength);
    interrupt::inject(v, info, error, length)
}

/// Leaves debug traps of the instruction just done, as DR6 would have them, for an exit that comes before them.
pub fn leave_pending(v: &mut Vcpu, bits: u64) {
    let enabled = if bits & pending_debug::B != 0 { pending_debug::ENABLED_BREAKPOINT } else { 0 };
    v.vmx.pending_debug |= bits & (pending_debug::B | pending_debug::BS) | enabled;
}

/// What abandoned an instruction behind a load of SS that a data breakpoint waits for: a VM exit finds `held` pending, and an
/// exception that does not exit drops it.
///
/// # Errors
/// Shutdown.
pub fn trap_behind_mov_ss(v: &mut Vcpu, trap: Trap, held: u64) -> Result<(), Shutdown> {
    let (before, world) = (v.vmx.pending_debug, v.vmx.transitions);
    leave_pending(v, held);
    interrupt::deliver_trap(v, trap)?;
    if v.vmx.transitions == world {
        v.vmx.pending_debug = before;
    }
    Ok(())
}

/// Delivers a debug exception that is pending.
fn pending_debug_trap(v: &mut Vcpu) -> Result<(), Shutdown> {
    let pending = std::mem::take(&mut v.vmx.pending_debug);
    if pending & (pending_debug::BS | pending_debug::ENABLED_BREAKPOINT) == 0 {
        return Ok(());
    }
    interrupt::debug_trap(v, pending & (pending_debug::BS | pending_debug::B))
}

/// Takes a pending NMI; whether there was one to take.
fn nmi(v: &mut Vcpu) -> Result<bool, Shutdown> {
    let index = v.index;
    if v.vmx.activity == activity::WAIT_FOR_SIPI {
        return Ok(false);
    }
    let exits = v.vmx.controls.pin & pin::NMI_EXITING != 0;
    if !v.shared.is_due(index) || v.platform().signals(index) & signal::NMI == 0 || (!exits && v.state.nmi_blocked != 0)
    {
        return Ok(false);
    }
    v.platform().take_signal(index, signal::NMI);
    v.counters.nmis += 1;
    if !exits {
        v.state.halted = 0;
    }
    interrupt::deliver(v, interrupt::Event::Nmi)?;
    Ok(true)
}

/// An external interrupt: exits, or goes to the guest as without VMX.
fn external_interrupt(v: &mut Vcpu, interrupts_on: bool) -> Result<(), Shutdown> {
    let index = v.index;
    let exits = v.vmx.controls.pin & pin::EXTERNAL_INTERRUPT_EXITING != 0;
    let blocked = matches!(v.vmx.activity, activity::WAIT_FOR_SIPI) || (!exits && v.vmx.activity == activity::SHUTDOWN);
    let none = blocked || (!exits && !interrupts_on) || !v.shared.is_due(index);
    if none || v.platform().interrupt_pending(index).is_none() {
        return Ok(());
    }
    if !exits {
        let vector = v.platform().acknowledge(index);
        v.state.halted = 0;
        v.counters.interrupts += 1;
        return interrupt::deliver(v, interrupt::Event::Interrupt(vector));
    }
    let mut pending = PendingExit::new(ExitReason::ExternalInterrupt, Cause::Event, 0);
    if v.vmx.vmcs.get32(Field::ExitControls) & exit::ACKNOWLEDGE_INTERRUPT != 0 {
        let vector = v.platform().acknowledge(index);
        v.counters.interrupts += 1;
        if super::apic::post(v, vector) {
            return Ok(());
        }
        pending.interruption = InterruptionInfo::new(vector, EventType::External, false);
    }
    v.vmx.exit = pending;
    super::exit::perform(v)
}
