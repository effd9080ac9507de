//! VM exits: what is recorded, the guest state that is saved, the host state that is loaded (SDM Vol 3C, "VM Exits").
//!
//! Place in the pipeline: [`perform`] is called by the dispatcher and by event delivery when [`Trap::VmExit`] was raised;
//! afterwards the registers are L1's and `state.rip` is its handler. Invariant: between the first field written and the
//! last register loaded nothing can fail but what the SDM calls a VMX abort.

use std::fmt::Write as _;

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::state::Table;
use twofold_arch::tbflags::TbFlags;
use twofold_arch::vmx::control::{entry, exit, pin};
use twofold_arch::vmx::event::{EventType, activity, interruptibility};
use twofold_arch::vmx::exit::flag;
use twofold_arch::vmx::{Abort, ExitReason, Field, InterruptionInfo};
use twofold_arch::{LinearAddr, PAGE_SIZE, Segment};
use twofold_frontend::vmx::{Described, describe};
use twofold_mmu::walk::{Direct, load_pdptes};
use twofold_mmu::{FlushCause, PagingMode};

use super::checks::MsrArea;
use super::{Cause, PendingExit, msrs};
use crate::config::DebugItem;
use crate::cpu::{interrupt::dr6, mode, refresh_space};
use crate::vcpu::{Shutdown, Vcpu};

const CS: usize = 1;
const SS: usize = 2;
const FS: usize = 4;
const GS: usize = 5;
const LDTR: usize = 6;
const TR: usize = 7;

/// Makes the VM exit in `v.vmx.exit`.
///
/// # Errors
/// Shutdown, after a VMX abort.
pub fn perform(v: &mut Vcpu) -> Result<(), Shutdown> {
    let start = v.shared.clock.now_ns();
    let exit = v.vmx.exit;
    record(v, &exit);
    save_guest(v, &exit);
    leave(v, u32::from(exit.reason.number()), start)
}

/// The VM exit of an entry that failed after its checks of the controls: no guest state is saved, and the rest of the exit
/// is as usual (SDM Vol 3C, "VM-Entry Failures During or After Loading Guest State").
///
/// # Errors
/// Shutdown, after a VMX abort.
pub fn entry_failure(v: &mut Vcpu, reason: ExitReason, qualification: u64) -> Result<(), Shutdown> {
    let start = v.shared.clock.now_ns();
    let vmcs = &mut v.vmx.vmcs;
    vmcs.set(Field::ExitReason, u64::from(u32::from(reason.number()) | flag::ENTRY_FAILURE));
    vmcs.set(Field::ExitQualification, qualification);
    load_host(v, FlushCause::VmExit)?;
    load_msrs(v)?;
    v.vmx.stats.exited(reason, start, v.shared.clock.now_ns());
    if v.debug.has(DebugItem::Vmx) {
        trace(v, reason);
    }
    Ok(())
}

/// From the saved guest state on.
fn leave(v: &mut Vcpu, reason: u32, start: u64) -> Result<(), Shutdown> {
    let reason_value = ExitReason::from_number(reason as u16).unwrap_or(ExitReason::TripleFault);
    if v.debug.has(DebugItem::Vmx) {
        trace(v, reason_value);
    }
    store_msrs(v, start)?;
    load_host(v, FlushCause::VmExit)?;
    if reason_value == ExitReason::ExceptionOrNmi {
        let info = InterruptionInfo(v.vmx.vmcs.get32(Field::ExitInterruptionInfo));
        if info.kind() == Some(EventType::Nmi) {
            v.state.nmi_blocked = 1;
        }
    }
    load_msrs(v)?;
    v.vmx.stats.exited(reason_value, start, v.shared.clock.now_ns());
    Ok(())
}

// ---- information ------------------------------------------------------------------------------------------------------

/// Instructions that exited, as they were decoded: a guest exits at the same few places again and again.
#[derive(Debug, Default)]
pub struct Decoded([Place; 16]);

/// One of them; empty when its length is 0.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    rip: u64,
    flags: TbFlags,
    bytes: [u8; 15],
    described: Described,
}

impl Decoded {
    const fn slot(rip: u64) -> usize {
        (rip ^ rip >> 4) as usize & 15
    }

    /// The instruction at `rip`, if it is still the same bytes.
    fn find(&self, rip: u64, flags: TbFlags, bytes: &[u8]) -> Option<Described> {
        let place = &self.0[Self::slot(rip)];
        let length = place.described.length as usize;
        let same = length != 0 && (place.rip, place.flags) == (rip, flags);
        (same && bytes.get(..length) == place.bytes.get(..length)).then_some(place.described)
    }

    fn note(&mut self, rip: u64, flags: TbFlags, bytes: [u8; 15], described: Described) {
        self.0[Self::slot(rip)] = Place { rip, flags, bytes, described };
    }
}

/// The instruction at `state.rip`, decoded once more. An instruction that cannot be read any more has length 0.
#[must_use]
pub fn decode(v: &mut Vcpu) -> Described {
    let la = super::linear_rip(v);
    let mut bytes = [0; 15];
    let Ok(pa) = v.fetch_address(la) else { return Described::default() };
    let here = ((PAGE_SIZE - la.page_offset()) as usize).min(bytes.len());
    v.shared.map.read(pa, &mut bytes[..here]);
    let flags = mode::tb_flags(&v.state);
    let rip = v.state.rip;
    if let Some(d) = v.vmx.decoded.find(rip, flags, &bytes[..here]) {
        return d;
    }
    if let Some(d) = describe(flags, rip, &bytes[..here]) {
        v.vmx.decoded.note(rip, flags, bytes, d);
        return d;
    }
    let next = LinearAddr(la.0.wrapping_add(here as u64));
    if here < bytes.len()
        && let Ok(pa) = v.fetch_address(next)
    {
        v.shared.map.read(pa, &mut bytes[here..]);
    }
    describe(flags, rip, &bytes).unwrap_or_default()
}

/// The exit-information fields.
fn record(v: &mut Vcpu, exit: &PendingExit) {
    let mut qualification = exit.qualification;
    let mut length = exit.length;
    let mut info = None;
    let vectoring = v.vmx.vectoring.take();
    // A software event has its instruction's length, unless VM entry injected it.
    let software = |i: InterruptionInfo| i.is_valid() && i.kind().is_some_and(EventType::is_software);
    let by_instruction =
        software(exit.interruption) || vectoring.is_some_and(|e| software(e.info) && e.length.is_none());
    if exit.cause == Cause::Instruction || by_instruction && length.is_none() || exit.reason == ExitReason::TaskSwitch {
        let d = decode(v);
        length = length.or(vectoring.and_then(|e| e.length)).or(Some(d.length));
        info = Some(d.info);
        qualification = complete(exit.reason, qualification, &d);
    }
    let vmcs = &mut v.vmx.vmcs;
    vmcs.set(Field::ExitReason, u64::from(exit.reason.number()));
    vmcs.set(Field::ExitQualification, qualification);
    vmcs.set(Field::GuestLinearAddress, exit.linear);
    vmcs.set(Field::GuestPhysicalAddress, exit.physical);
    vmcs.set(Field::ExitInterruptionInfo, u64::from(exit.interruption.0));
    vmcs.set(Field::ExitErrorCode, u64::from(exit.error));
    let (idt, error) = vectoring.map_or((0, 0), |e| (e.info.0, e.error));
    vmcs.set(Field::IdtVectoringInfo, u64::from(idt));
    vmcs.set(Field::IdtVectoringErrorCode, u64::from(error));
    if let Some(length) = length.or(vectoring.and_then(|e| e.length)) {
        vmcs.set(Field::ExitInstructionLength, u64::from(length));
    }
    if let Some(info) = info {
        vmcs.set(Field::ExitInstructionInfo, u64::from(info));
    }
    // Injection happens once.
    let entry = vmcs.get(Field::EntryInterruptionInfo);
    vmcs.set(Field::EntryInterruptionInfo, entry & !u64::from(InterruptionInfo::VALID));
}

/// The exit qualification with what only decoding tells: the general-purpose register, the operand's form, the displacement.
fn complete(reason: ExitReason, qualification: u64, d: &Described) -> u64 {
    match reason {
        // MOV to or from CRn; CLTS has no register, LMSW says whether its operand is memory.
        ExitReason::ControlRegister if qualification >> 4 & 3 < 2 => qualification | u64::from(d.register) << 8,
        ExitReason::ControlRegister if qualification >> 4 & 3 == 3 => qualification | u64::from(d.memory) << 6,
        ExitReason::MovDr => qualification | u64::from(d.register) << 8,
        ExitReason::Io => qualification | u64::from(d.immediate_port) << 6,
        _ if has_displacement(reason) => d.displacement,
        _ => qualification,
    }
}

/// Whether the exit qualification is the displacement of the instruction's memory operand.
fn has_displacement(reason: ExitReason) -> bool {
    use ExitReason::*;
    matches!(
        reason,
        Vmclear
            | Vmptrld
            | Vmptrst
            | Vmread
            | Vmwrite
            | Vmxon
            | GdtrIdtr
            | LdtrTr
            | Invept
            | Invvpid
            | Invpcid
            | Xsaves
            | Xrstors
    )
}

// ---- saving guest state -------------------------------------------------------------------------------------------------

fn save_guest(v: &mut Vcpu, pending: &PendingExit) {
    let exit_controls = v.vmx.vmcs.get32(Field::ExitControls);
    let controls = v.vmx.controls;
    let s = &v.state;
    let vmcs = &mut v.vmx.vmcs;
    vmcs.set(Field::GuestCr0, s.cr0);
    vmcs.set(Field::GuestCr3, s.cr3);
    vmcs.set(Field::GuestCr4, s.cr4);
    if exit_controls & exit::SAVE_DEBUG_CONTROLS != 0 {
        vmcs.set(Field::GuestDr7, s.dr[7]);
        vmcs.set(Field::GuestDebugctl, s.msrs.debugctl);
    }
    vmcs.set(Field::GuestSysenterCs, s.msrs.sysenter_cs);
    vmcs.set(Field::GuestSysenterEsp, s.msrs.sysenter_esp);
    vmcs.set(Field::GuestSysenterEip, s.msrs.sysenter_eip);
    if exit_controls & exit::SAVE_PAT != 0 {
        vmcs.set(Field::GuestPat, s.msrs.pat);
    }
    if exit_controls & exit::SAVE_EFER != 0 {
        vmcs.set(Field::GuestEfer, s.efer);
    }
    for (n, seg) in s.seg.iter().enumerate() {
        let mut rights = seg.attr & 0x1_f0ff;
        if n == SS {
            rights = rights & !attr::DPL | s.cpl << attr::DPL_SHIFT;
        }
        vmcs.set(Field::guest_selector(n), u64::from(seg.selector));
        vmcs.set(Field::guest_base(n), seg.base);
        vmcs.set(Field::guest_limit(n), u64::from(seg.limit));
        vmcs.set(Field::guest_access_rights(n), u64::from(rights));
    }
    vmcs.set(Field::GuestGdtrBase, s.gdtr.base);
    vmcs.set(Field::GuestGdtrLimit, s.gdtr.limit);
    vmcs.set(Field::GuestIdtrBase, s.idtr.base);
    vmcs.set(Field::GuestIdtrLimit, s.idtr.limit);
    vmcs.set(Field::GuestRip, s.rip);
    vmcs.set(Field::GuestRsp, s.gpr[4]);
    let mut flags = s.rflags();
    match pending.cause {
        Cause::Instruction => flags &= !rflags::RF,
        Cause::Fault | Cause::Delivery { rf: true } => flags |= rflags::RF,
        Cause::Event | Cause::Delivery { .. } => {}
    }
    vmcs.set(Field::GuestRflags, flags);
    // PAE paging under EPT: the PDPTE registers are part of the guest state.
    if controls.ept() {
        for n in 0..4 {
            vmcs.set(Field::guest_pdpte(n), s.pdpte[n]);
        }
    }
    // With unrestricted guests the control follows LMA.
    let mut entry_controls = vmcs.get32(Field::EntryControls) & !entry::IA32E_MODE_GUEST;
    if s.efer & efer::LMA != 0 {
        entry_controls |= entry::IA32E_MODE_GUEST;
    }
    vmcs.set(Field::EntryControls, u64::from(entry_controls));
    if controls.pin & pin::PREEMPTION_TIMER != 0 && exit_controls & exit::SAVE_PREEMPTION_TIMER != 0 {
        let now = v.shared.clock.now_ns();
        let left = v.vmx.timer.map_or(0, |at| at.saturating_sub(now) >> super::entry::TIMER_SHIFT);
        let left = if pending.reason == ExitReason::PreemptionTimer { 0 } else { left.min(u64::from(u32::MAX)) };
        vmcs.set(Field::PreemptionTimer, left);
    }
    if let Some(pml) = v.mmu.pml() {
        v.vmx.vmcs.set(Field::PmlIndex, u64::from(pml.index));
        v.mmu.set_pml(None);
    }
    save_non_register(v, pending);
}

/// Activity, interruptibility, pending debug exceptions.
fn save_non_register(v: &mut Vcpu, pending: &PendingExit) {
    // An instruction that did not complete is still in the shadow it began in.
    let shadow = match pending.cause {
        Cause::Instruction | Cause::Fault | Cause::Delivery { .. } => v.vmx.shadow,
        Cause::Event => v.state.shadow,
    };
    let nmi = if v.vmx.controls.virtual_nmis() { v.vmx.virtual_nmi_blocked } else { v.state.nmi_blocked != 0 };
    let mut blocking = 0;
    if shadow & 1 != 0 {
        blocking |= interruptibility::STI;
    }
    if shadow & 2 != 0 {
        blocking |= interruptibility::MOV_SS;
    }
    if nmi {
        blocking |= interruptibility::NMI;
    }
    let active = match (v.state.halted, v.vmx.activity) {
        (0, _) => activity::ACTIVE,
        (_, activity::ACTIVE) => activity::HLT,
        (_, other) => other,
    };
    let vmcs = &mut v.vmx.vmcs;
    vmcs.set(Field::GuestInterruptibility, u64::from(blocking));
    vmcs.set(Field::GuestActivity, u64::from(active));
    vmcs.set(Field::GuestPendingDebug, v.vmx.pending_debug);
}

fn store_msrs(v: &mut Vcpu, start: u64) -> Result<(), Shutdown> {
    let (count, at) = (v.vmx.vmcs.get(Field::ExitMsrStoreCount), v.vmx.vmcs.get(Field::ExitMsrStoreAddress));
    if count == 0 {
        return Ok(());
    }
    match msrs::store(v, count, at, start) {
        Ok(()) => Ok(()),
        Err(_) => Err(abort(v, Abort::SavingGuestMsrs)),
    }
}

fn load_msrs(v: &mut Vcpu) -> Result<(), Shutdown> {
    let (count, at) = (v.vmx.vmcs.get(Field::ExitMsrLoadCount), v.vmx.vmcs.get(Field::ExitMsrLoadAddress));
    if count == 0 {
        return Ok(());
    }
    match msrs::load(v, MsrArea::ExitLoad, count, at) {
        Ok(()) => Ok(()),
        Err(_) => Err(abort(v, Abort::LoadingHostMsrs)),
    }
}

/// A VMX abort: its indicator goes to the VMCS region, the processor shuts down.
fn abort(v: &mut Vcpu, why: Abort) -> Shutdown {
    if let Some(at) = v.vmx.current {
        let map = v.shared.map.clone();
        map.write(at.wrapping_add(twofold_arch::vmx::VMCS_ABORT_OFFSET), &why.number().to_le_bytes());
        v.vmx.vmcs.store(&map, at);
    }
    if v.debug.has(DebugItem::Vmx) {
        v.trace.write(&format!("vmx: abort {}: {}\n", why.number(), why.text()));
    }
    Shutdown::TripleFault
}

// ---- loading host state -------------------------------------------------------------------------------------------------

/// CR0 bits that transitions do not change.
pub(super) const CR0_KEPT: u64 = cr0::ET | cr0::NW | cr0::CD;

/// The host state (SDM Vol 3C, "Loading Host State").
fn load_host(v: &mut Vcpu, cause: FlushCause) -> Result<(), Shutdown> {
    let vpid = v.vmx.controls.vpid();
    let controls = v.vmx.vmcs.get32(Field::ExitControls);
    let long = controls & exit::HOST_ADDRESS_SPACE_SIZE != 0;
    let vmcs = &v.vmx.vmcs;
    let get = |f: Field| vmcs.get(f);
    let s = &mut v.state;
    s.cr0 = s.cr0 & CR0_KEPT | get(Field::HostCr0) & !CR0_KEPT & cr0::DEFINED;
    s.cr3 = get(Field::HostCr3);
    s.cr4 = get(Field::HostCr4);
    if long {
        s.cr4 |= cr4::PAE;
    } else {
        s.cr4 &= !cr4::PCIDE;
    }
    s.dr[7] = 0x400;
    s.msrs.debugctl = 0;
    s.msrs.sysenter_cs = get(Field::HostSysenterCs);
    s.msrs.sysenter_esp = get(Field::HostSysenterEsp);
    s.msrs.sysenter_eip = get(Field::HostSysenterEip);
    let mode_bits = if long { efer::LMA | efer::LME } else { 0 };
    s.efer = s.efer & !(efer::LMA | efer::LME) | mode_bits;
    if controls & exit::LOAD_EFER != 0 {
        s.efer = get(Field::HostEfer);
    }
    if controls & exit::LOAD_PAT != 0 {
        s.msrs.pat = get(Field::HostPat);
    }
    host_segments(s, vmcs, long);
    s.gdtr = Table { base: get(Field::HostGdtrBase), limit: 0xffff };
    s.idtr = Table { base: get(Field::HostIdtrBase), limit: 0xffff };
    s.rip = get(Field::HostRip);
    s.gpr[4] = get(Field::HostRsp);
    if !long {
        s.rip &= 0xffff_ffff;
        s.gpr[4] &= 0xffff_ffff;
    }
    s.set_rflags(rflags::FIXED1);
    (s.shadow, s.halted, s.cpl) = (0, 0, 0);
    // DR6 keeps the guest's value; a host that cares saves it.
    s.dr[6] |= dr6::FIXED1;
    v.vmx.non_root = false;
    v.vmx.activity = activity::ACTIVE;
    (v.vmx.timer, v.vmx.mtf_pending, v.vmx.pending_debug, v.vmx.shadow) = (None, false, 0, 0);
    (v.vmx.virtual_nmi_blocked, v.vmx.iret_unblocked) = (false, false);
    (v.vmx.vectoring, v.vmx.trap_exit) = (None, None);
    v.mmu.set_apic_access(None);
    v.vmx.transitions += 1;
    v.cold.monitor = None;
    let pae = PagingMode::from_registers(v.state.cr0, v.state.cr4, v.state.efer) == PagingMode::Pae;
    if pae {
        let (phys, code) = (v.mmu.phys().clone(), v.mmu.code().clone());
        match load_pdptes(v.state.cr3, v.model.phys_bits, &mut Direct { phys: &phys, code: &code }) {
            Ok(pdptes) => v.state.pdpte = pdptes,
            Err(_) => return Err(abort(v, Abort::HostPdptes)),
        }
    }
    v.space.vpid = 0;
    v.space.eptp = None;
    v.mmu.set_pml(None);
    refresh_space(v);
    let view = v.mmu.vm_transition(&v.space, cause, vpid);
    view.store(&mut v.state);
    Ok(())
}

fn host_segments(s: &mut twofold_arch::CpuState, vmcs: &super::Vmcs, long: bool) {
    let get = |f: Field| vmcs.get(f);
    const FLAT: u32 = attr::P | attr::S | attr::G | attr::ACCESSED | attr::RW;
    let size = if long { attr::L } else { attr::DB };
    s.seg[CS] = Segment {
        selector: get(Field::HostCsSelector) as u16,
        limit: u32::MAX,
        attr: FLAT | attr::CODE | size,
        ..Segment::default()
    };
    let data = [
        (0, Field::HostEsSelector),
        (SS, Field::HostSsSelector),
        (3, Field::HostDsSelector),
        (FS, Field::HostFsSelector),
        (GS, Field::HostGsSelector),
    ];
    for (n, field) in data {
        let selector = get(field) as u16;
        let usable = selector != 0 || n == SS && !long;
        let attr = if usable { FLAT | attr::DB } else { attr::UNUSABLE };
        s.seg[n] = Segment { selector, limit: if usable { u32::MAX } else { 0 }, attr, ..Segment::default() };
    }
    s.seg[FS].base = get(Field::HostFsBase);
    s.seg[GS].base = get(Field::HostGsBase);
    s.seg[TR] = Segment {
        base: get(Field::HostTrBase),
        limit: 0x67,
        attr: attr::P | 11,
        selector: get(Field::HostTrSelector) as u16,
        ..Segment::default()
    };
    s.seg[LDTR] = Segment { attr: attr::UNUSABLE, ..Segment::default() };
}

// ---- trace ------------------------------------------------------------------------------------------------------------

/// `-d vmx`: an exit, with the guest's state as it was saved.
#[cold]
fn trace(v: &mut Vcpu, reason: ExitReason) {
    let g = |f: Field| v.vmx.vmcs.get(f);
    let mut line = format!(
        "vmx: exit {} ({}) qualification {:#x} rip {:#x} length {}",
        reason.number(),
        reason.text(),
        g(Field::ExitQualification),
        g(Field::GuestRip),
        g(Field::ExitInstructionLength),
    );
    for (name, field) in [
        ("interruption", Field::ExitInterruptionInfo),
        ("error", Field::ExitErrorCode),
        ("vectoring", Field::IdtVectoringInfo),
        ("gpa", Field::GuestPhysicalAddress),
        ("gla", Field::GuestLinearAddress),
    ] {
        if g(field) != 0 {
            let _ = write!(line, " {name} {:#x}", g(field));
        }
    }
    line.push('\n');
    v.trace.write(&line);
}
