//! Checks on guest non-register state and PDPTEs (SDM Vol 3C, "Checks on Guest Non-Register State", "Checks on Guest
//! Page-Directory-Pointer-Table Entries").
//!
//! That an NMI is injected while blocking by STI is in effect is one of the things the SDM leaves to the processor; this one
//! allows it, so the exit qualification 3 does not occur.

use twofold_arch::control::rflags;
use twofold_arch::paging::{P, pdpte_reserved};
use twofold_arch::segment::attr;
use twofold_arch::vmx::control::{pin, proc2};
use twofold_arch::vmx::event::{activity, debugctl, interruptibility, pending_debug};
use twofold_arch::vmx::msr::misc;
use twofold_arch::vmx::{EventType, Field, NO_VMCS, SHADOW_VMCS};

use super::Heading::{GuestNonRegister, GuestPdptes};
use super::{Check, Detail, Table, View, address, check, require};
use crate::vmx::caps::REVISION;

type Outcome = Result<(), Detail>;

/// All of them each time: injection, blocking and activity change from entry to entry, and the rest reads memory.
pub(super) const EVERY_TIME: Table = Table { checks: CHECKS, memo: None, watch: &[], also: &[] };

/// In the SDM's order.
const CHECKS: &[Check] = &[
    check("guest-activity", GuestNonRegister, activity_supported),
    check("guest-hlt-dpl", GuestNonRegister, hlt_dpl),
    check("guest-activity-blocking", GuestNonRegister, activity_blocking),
    check("guest-activity-event", GuestNonRegister, activity_event),
    check("guest-interruptibility-reserved", GuestNonRegister, interruptibility_reserved),
    check("guest-blocking-sti-and-mov-ss", GuestNonRegister, sti_and_mov_ss),
    check("guest-blocking-sti-if", GuestNonRegister, sti_if),
    check("guest-blocking-interrupt", GuestNonRegister, blocking_interrupt),
    check("guest-blocking-nmi", GuestNonRegister, blocking_nmi),
    check("guest-blocking-smi", GuestNonRegister, blocking_smi),
    check("guest-blocking-virtual-nmi", GuestNonRegister, blocking_virtual_nmi),
    check("guest-interruptibility-enclave", GuestNonRegister, enclave),
    check("guest-pending-debug-reserved", GuestNonRegister, pending_debug_reserved),
    check("guest-pending-debug-bs", GuestNonRegister, pending_debug_bs),
    check("guest-pending-debug-rtm", GuestNonRegister, pending_debug_rtm),
    check("guest-link-pointer", GuestNonRegister, link_pointer),
    check("guest-pdptes", GuestPdptes, pdptes),
];

fn activity_state(v: &View<'_>) -> u32 {
    v.get(Field::GuestActivity) as u32
}

fn activity_supported(v: &View<'_>) -> Outcome {
    let state = activity_state(v);
    let supported = match state {
        activity::ACTIVE => true,
        activity::HLT => v.caps.has_misc(misc::ACTIVITY_HLT),
        activity::SHUTDOWN => v.caps.has_misc(misc::ACTIVITY_SHUTDOWN),
        activity::WAIT_FOR_SIPI => v.caps.has_misc(misc::ACTIVITY_WAIT_FOR_SIPI),
        _ => false,
    };
    require!(supported, "guest activity state {state} is not one that IA32_VMX_MISC reports")
}

fn hlt_dpl(v: &View<'_>) -> Outcome {
    // Not v.segment(): that gathers all eight registers.
    let dpl = v.get(Field::GuestSsAccessRights) >> attr::DPL_SHIFT & 3;
    require!(activity_state(v) != activity::HLT || dpl == 0, "guest activity state is HLT while DPL of SS is {dpl}")
}

/// Blocking by STI or MOV SS.
fn blocked(v: &View<'_>, by: u32) -> bool {
    v.get(Field::GuestInterruptibility) & u64::from(by) != 0
}

fn activity_blocking(v: &View<'_>) -> Outcome {
    let state = activity_state(v);
    require!(
        state == activity::ACTIVE || !blocked(v, interruptibility::STI | interruptibility::MOV_SS),
        "guest activity state is {state} while events are blocked by STI or MOV SS"
    )
}

/// An event that the activity state would block cannot be injected.
fn activity_event(v: &View<'_>) -> Outcome {
    let Some(event) = v.event() else { return Ok(()) };
    let state = activity_state(v);
    let admitted = match (state, event.kind()) {
        (activity::HLT, Some(EventType::External | EventType::Nmi | EventType::Other)) => true,
        // #DB and #MC.
        (activity::HLT, Some(EventType::HardwareException)) => matches!(event.vector(), 1 | 18),
        (activity::SHUTDOWN, Some(EventType::Nmi)) => true,
        (activity::SHUTDOWN, Some(EventType::HardwareException)) => event.vector() == 18,
        (activity::HLT | activity::SHUTDOWN | activity::WAIT_FOR_SIPI, _) => false,
        _ => true,
    };
    require!(admitted, "the event {:#x} cannot be injected in activity state {state}", event.0)
}

fn interruptibility_reserved(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestInterruptibility);
    require!(
        value & u64::from(interruptibility::RESERVED) == 0,
        "guest interruptibility state {value:#x} has one of bits 31:5 set"
    )
}

fn sti_and_mov_ss(v: &View<'_>) -> Outcome {
    require!(
        !(blocked(v, interruptibility::STI) && blocked(v, interruptibility::MOV_SS)),
        "guest interruptibility state has blocking by STI and by MOV SS both"
    )
}

fn sti_if(v: &View<'_>) -> Outcome {
    require!(
        !blocked(v, interruptibility::STI) || v.rflags() & rflags::IF != 0,
        "guest interruptibility state has blocking by STI while guest RFLAGS {:#x} has bit 9 (IF) clear",
        v.rflags()
    )
}

fn injects(v: &View<'_>, kind: EventType) -> bool {
    v.event().is_some_and(|e| e.kind() == Some(kind))
}

fn blocking_interrupt(v: &View<'_>) -> Outcome {
    require!(
        !injects(v, EventType::External) || !blocked(v, interruptibility::STI | interruptibility::MOV_SS),
        "an external interrupt is injected while events are blocked by STI or MOV SS"
    )
}

fn blocking_nmi(v: &View<'_>) -> Outcome {
    require!(
        !injects(v, EventType::Nmi) || !blocked(v, interruptibility::MOV_SS),
        "an NMI is injected while events are blocked by MOV SS"
    )
}

fn blocking_smi(v: &View<'_>) -> Outcome {
    require!(
        !blocked(v, interruptibility::SMI),
        "guest interruptibility state has blocking by SMI outside system-management mode"
    )
}

fn blocking_virtual_nmi(v: &View<'_>) -> Outcome {
    require!(
        !v.pin(pin::VIRTUAL_NMIS) || !injects(v, EventType::Nmi) || !blocked(v, interruptibility::NMI),
        "an NMI is injected while virtual NMIs are blocked"
    )
}

fn enclave(v: &View<'_>) -> Outcome {
    require!(
        !blocked(v, interruptibility::ENCLAVE),
        "guest interruptibility state has bit 4 (enclave interruption) set: there are no enclaves"
    )
}

fn pending_debug_reserved(v: &View<'_>) -> Outcome {
    use pending_debug::{B, BS, ENABLED_BREAKPOINT, RTM};
    let value = v.get(Field::GuestPendingDebug);
    let reserved = value & !(B | ENABLED_BREAKPOINT | BS | RTM);
    require!(reserved == 0, "guest pending debug exceptions {value:#x} have reserved bits {reserved:#x} set")
}

/// Where a debug exception is held back, a pending single step is there exactly when TF asks for one.
fn pending_debug_bs(v: &View<'_>) -> Outcome {
    let held = blocked(v, interruptibility::STI | interruptibility::MOV_SS) || activity_state(v) == activity::HLT;
    if !held {
        return Ok(());
    }
    let steps = v.rflags() & rflags::TF != 0 && v.get(Field::GuestDebugctl) & debugctl::BTF == 0;
    let value = v.get(Field::GuestPendingDebug);
    require!(
        steps == (value & pending_debug::BS != 0),
        "bit 14 (BS) of guest pending debug exceptions {value:#x} does not agree with RFLAGS.TF and IA32_DEBUGCTL.BTF"
    )
}

fn pending_debug_rtm(v: &View<'_>) -> Outcome {
    let value = v.get(Field::GuestPendingDebug);
    require!(
        value & pending_debug::RTM == 0,
        "guest pending debug exceptions {value:#x} have bit 16 (RTM) set: there are no transactions"
    )
}

fn link_pointer(v: &View<'_>) -> Outcome {
    let pointer = v.get(Field::VmcsLinkPointer);
    if pointer == NO_VMCS {
        return Ok(());
    }
    address(v, Field::VmcsLinkPointer, 12)?;
    require!(pointer != v.pointer, "VMCS link pointer {pointer:#x} is the current-VMCS pointer")?;
    let mut head = [0; 4];
    v.read(pointer, &mut head);
    let head = u32::from_le_bytes(head);
    let (revision, shadow) = (head & !SHADOW_VMCS, head & SHADOW_VMCS != 0);
    require!(
        revision == REVISION,
        "the VMCS at link pointer {pointer:#x} has revision {revision:#x}, not {REVISION:#x}"
    )?;
    require!(
        shadow == v.proc2(proc2::VMCS_SHADOWING),
        "the shadow-VMCS indicator of the VMCS at link pointer {pointer:#x} is not \"VMCS shadowing\""
    )
}

fn pdptes(v: &View<'_>) -> Outcome {
    if !v.pae_guest() {
        return Ok(());
    }
    let reserved = pdpte_reserved(v.caps.phys_bits);
    for (i, entry) in v.guest_pdptes().into_iter().enumerate() {
        require!(
            entry & P == 0 || entry & reserved == 0,
            "guest PDPTE{i} {entry:#x} has reserved bits {:#x} set",
            entry & reserved
        )?;
    }
    Ok(())
}
