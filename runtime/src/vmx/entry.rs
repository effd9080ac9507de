//! VM entry: checks, the guest state that is loaded, MSR loading, and the event to inject (SDM Vol 3C, "VM Entries").
//!
//! Place in the pipeline: [`enter`] is called by VMLAUNCH and VMRESUME after their own checks. The event is delivered by the
//! dispatcher ([`super::events`]), because its delivery may itself exit. Invariant: before the guest-state checks pass
//! nothing has changed but the VM-instruction error field.

use twofold_arch::control::{cr0, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::state::Table;
use twofold_arch::vmx::control::{entry, pin, proc, proc2};
use twofold_arch::vmx::event::{EventType, activity, interruptibility};
use twofold_arch::vmx::msr::ept_vpid;
use twofold_arch::vmx::{ExitReason, Field, InterruptionInfo, NO_VMCS, VmError};
use twofold_arch::{PhysAddr, Segment};
use twofold_mmu::{FlushCause, Pml};

use super::checks::{self, Failed, MsrArea, Outcome, View};
use super::exit::{self, CR0_KEPT};
use super::{Controls, msrs};
use crate::config::DebugItem;
use crate::cpu::{interrupt::dr6, refresh_space};
use crate::vcpu::{Shutdown, Vcpu};

/// The VMX-preemption timer counts down by one each time this bit of the TSC changes.
pub const TIMER_SHIFT: u32 = super::caps::PREEMPTION_TIMER_SHIFT;

const SS: usize = 2;

/// Enters the guest of the current VMCS. `Err(n)` is VMfailValid(n); a failure after that point has made its VM exit.
///
/// # Errors
/// The VM-instruction error of a failed check of the controls or the host state.
pub fn enter(v: &mut Vcpu, launch: bool) -> Result<(), VmError> {
    let start = v.shared.clock.now_ns();
    check_before(v)?;
    v.vmx.controls = Controls::of(&v.vmx.vmcs);
    let pdptes = match check_guest(v) {
        Ok(pdptes) => pdptes,
        Err((reason, qualification)) => {
            fail(v, reason, qualification);
            return Ok(());
        }
    };
    load_guest(v);
    if let Some(pdptes) = pdptes {
        v.state.pdpte = pdptes;
    }
    v.vmx.non_root = true;
    v.vmx.transitions += 1;
    address_space(v);
    let (count, at) = (v.vmx.vmcs.get(Field::EntryMsrLoadCount), v.vmx.vmcs.get(Field::EntryMsrLoadAddress));
    if count != 0
        && let Err((number, detail)) = msrs::load(v, MsrArea::EntryLoad, count, at)
    {
        note_failure(v, &Failed::msr_load(number, detail));
        fail(v, ExitReason::EntryMsrLoading, number);
        return Ok(());
    }
    if launch {
        v.vmx.vmcs.launched = true;
    }
    load_non_register(v);
    super::apic::entered(v);
    let info = InterruptionInfo(v.vmx.vmcs.get32(Field::EntryInterruptionInfo));
    if info.is_valid() {
        inject_later(v, info);
    }
    v.vmx.stats.entered(start, v.shared.clock.now_ns());
    if v.debug.has(DebugItem::Vmx) {
        trace(v, launch, info);
    }
    Ok(())
}

/// The checks before VM entry's point of no return: controls and host state.
fn check_before(v: &mut Vcpu) -> Result<(), VmError> {
    let memory = |at: u64, buf: &mut [u8]| v.shared.map.read(PhysAddr(at), buf);
    let pointer = v.vmx.current.map_or(NO_VMCS, |p| p.0);
    let view = View::new(&v.vmx.vmcs, &v.model.vmx, pointer, v.state.efer & efer::LMA != 0, &memory);
    let memo = &mut v.vmx.memo;
    let Err(failed) = checks::controls(&view, memo).and_then(|()| checks::host(&view, memo)) else { return Ok(()) };
    note_failure(v, &failed);
    match failed.outcome {
        Outcome::Fail(error) => Err(error),
        Outcome::Exit { .. } => Err(VmError::EntryHostState),
    }
}

/// The checks on the guest-state area. `Ok`: the PDPTEs as they were checked, when the guest uses them (row C2).
fn check_guest(v: &mut Vcpu) -> Result<Option<[u64; 4]>, (ExitReason, u64)> {
    let memory = |at: u64, buf: &mut [u8]| v.shared.map.read(PhysAddr(at), buf);
    let pointer = v.vmx.current.map_or(NO_VMCS, |p| p.0);
    let view = View::new(&v.vmx.vmcs, &v.model.vmx, pointer, v.state.efer & efer::LMA != 0, &memory);
    let Err(failed) = checks::guest(&view, &mut v.vmx.memo) else {
        return Ok(view.pae_guest().then(|| view.guest_pdptes()));
    };
    note_failure(v, &failed);
    match failed.outcome {
        Outcome::Exit { reason, qualification } => Err((reason, qualification)),
        Outcome::Fail(_) => Err((ExitReason::EntryGuestState, 0)),
    }
}

/// Counts and tells the check that failed.
#[cold]
fn note_failure(v: &mut Vcpu, failed: &Failed) {
    v.vmx.stats.failed(failed.name);
    if v.debug.has(DebugItem::Vmx) {
        v.trace.write(&format!("vmx: entry failed, check {}: {failed}\n", failed.name));
    }
}

/// The VM exit of a failed entry. A VMX abort in it shuts the processor down at the next look at events.
fn fail(v: &mut Vcpu, reason: ExitReason, qualification: u64) {
    if let Err(Shutdown::TripleFault) = exit::entry_failure(v, reason, qualification) {
        v.vmx.aborted = true;
    }
}

// ---- loading guest state --------------------------------------------------------------------------------------------------

/// SDM Vol 3C, "Loading Guest State".
fn load_guest(v: &mut Vcpu) {
    let vmcs = &v.vmx.vmcs;
    let get = |f: Field| vmcs.get(f);
    let controls = vmcs.get32(Field::EntryControls);
    let s = &mut v.state;
    s.cr0 = s.cr0 & CR0_KEPT | get(Field::GuestCr0) & !CR0_KEPT & cr0::DEFINED;
    s.cr3 = get(Field::GuestCr3);
    s.cr4 = get(Field::GuestCr4);
    if controls & entry::LOAD_DEBUG_CONTROLS != 0 {
        s.dr[7] = get(Field::GuestDr7) & 0xffff_2fff | 0x400;
        s.msrs.debugctl = get(Field::GuestDebugctl);
    }
    s.msrs.sysenter_cs = get(Field::GuestSysenterCs);
    s.msrs.sysenter_esp = get(Field::GuestSysenterEsp);
    s.msrs.sysenter_eip = get(Field::GuestSysenterEip);
    if controls & entry::LOAD_EFER != 0 {
        s.efer = get(Field::GuestEfer);
    } else {
        let long = controls & entry::IA32E_MODE_GUEST != 0;
        s.efer &= !efer::LMA;
        if long {
            s.efer |= efer::LMA;
        }
        if s.cr0 & cr0::PG != 0 {
            s.efer = s.efer & !efer::LME | if long { efer::LME } else { 0 };
        }
    }
    if controls & entry::LOAD_PAT != 0 {
        s.msrs.pat = get(Field::GuestPat);
    }
    for n in 0..8 {
        s.seg[n] = Segment {
            base: get(Field::guest_base(n)),
            limit: get(Field::guest_limit(n)) as u32,
            attr: get(Field::guest_access_rights(n)) as u32 & 0x1_f0ff,
            selector: get(Field::guest_selector(n)) as u16,
            ..Segment::default()
        };
    }
    s.gdtr = Table { base: get(Field::GuestGdtrBase), limit: get(Field::GuestGdtrLimit) & 0xffff };
    s.idtr = Table { base: get(Field::GuestIdtrBase), limit: get(Field::GuestIdtrLimit) & 0xffff };
    s.rip = get(Field::GuestRip);
    s.gpr[4] = get(Field::GuestRsp);
    s.set_rflags(get(Field::GuestRflags) | rflags::FIXED1);
    s.cpl = if s.rflags_sys & rflags::VM != 0 { 3 } else { (s.seg[SS].attr & attr::DPL) >> attr::DPL_SHIFT };
    s.dr[6] |= dr6::FIXED1;
}

/// Makes the guest's address space the current one.
fn address_space(v: &mut Vcpu) {
    let controls = v.vmx.controls;
    v.space.vpid = if controls.vpid() { v.vmx.vmcs.get(Field::Vpid) as u16 } else { 0 };
    v.space.eptp = controls.ept().then(|| v.vmx.vmcs.get(Field::Eptp));
    v.space.ept_mode_based = controls.proc2 & proc2::MODE_BASED_EXECUTE != 0;
    v.space.ept_sub_pages =
        (controls.proc2 & proc2::SUB_PAGE_WRITE != 0).then(|| v.vmx.vmcs.get(Field::SubPagePermissionTable));
    v.space.ept_execute_only = v.model.vmx.has_ept_vpid(ept_vpid::EXECUTE_ONLY);
    let pml = (controls.proc2 & proc2::PML != 0).then(|| Pml {
        address: PhysAddr(v.vmx.vmcs.get(Field::PmlAddress)),
        index: v.vmx.vmcs.get(Field::PmlIndex) as u16,
    });
    v.mmu.set_pml(pml);
    let page = super::apic::access_page(v);
    v.mmu.set_apic_access(page);
    refresh_space(v);
    let view = v.mmu.vm_transition(&v.space, FlushCause::VmEntry, controls.vpid());
    view.store(&mut v.state);
}

/// Activity, interruptibility, pending debug exceptions, timers.
fn load_non_register(v: &mut Vcpu) {
    let vmcs = &v.vmx.vmcs;
    let blocking = vmcs.get32(Field::GuestInterruptibility);
    let active = vmcs.get32(Field::GuestActivity);
    let timer = vmcs.get(Field::PreemptionTimer);
    let controls = v.vmx.controls;
    v.vmx.pending_debug = vmcs.get(Field::GuestPendingDebug);
    let s = &mut v.state;
    s.shadow =
        u32::from(blocking & interruptibility::STI != 0) | u32::from(blocking & interruptibility::MOV_SS != 0) << 1;
    let nmi = blocking & interruptibility::NMI != 0;
    if controls.virtual_nmis() {
        v.vmx.virtual_nmi_blocked = nmi;
    } else {
        s.nmi_blocked = u32::from(nmi);
    }
    s.halted = u32::from(active != activity::ACTIVE);
    v.vmx.activity = if active == activity::HLT { activity::ACTIVE } else { active };
    v.vmx.timer = None;
    if controls.pin & pin::PREEMPTION_TIMER != 0 {
        let left = timer << TIMER_SHIFT;
        v.vmx.timer = Some(v.shared.clock.now_ns().saturating_add(left));
        if left < super::events::SHORT_NS {
            // The dispatcher cuts the slice.
            v.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
        }
    }
    (v.vmx.mtf_pending, v.vmx.trap_exit) = (false, None);
    v.vmx.vectoring = None;
    v.vmx.iret_unblocked = false;
    v.vmx.pause_loop = (0, 0);
    v.cold.monitor = None;
}

/// The event of the VM-entry interruption-information field is delivered before the guest's first instruction.
fn inject_later(v: &mut Vcpu, info: InterruptionInfo) {
    v.state.halted = 0;
    v.vmx.activity = activity::ACTIVE;
    if info.kind() == Some(EventType::Other) {
        v.vmx.mtf_pending = true;
        return;
    }
    v.vmx.inject = Some(info);
}

/// `-d vmx`: an entry.
#[cold]
fn trace(v: &mut Vcpu, launch: bool, info: InterruptionInfo) {
    let s = &v.state;
    let c = v.vmx.controls;
    let mut line = format!(
        "vmx: {} rip {:#x} cs {:#x} cpl {} {:?} vpid {} eptp {:#x}",
        if launch { "launch" } else { "resume" },
        s.rip,
        s.seg[1].selector,
        s.cpl,
        v.space.mode,
        v.space.vpid,
        v.space.eptp.unwrap_or(0)
    );
    if info.is_valid() {
        line += &format!(" inject {:#x}", info.0);
    }
    if c.proc & proc::INTERRUPT_WINDOW_EXITING != 0 {
        line += " interrupt-window";
    }
    if c.proc2 & proc2::UNRESTRICTED_GUEST != 0 && s.cr0 & cr0::PG == 0 {
        line += " unpaged";
    }
    line.push('\n');
    v.trace.write(&line);
}
