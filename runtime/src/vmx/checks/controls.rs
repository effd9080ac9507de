//! Checks on the VM-execution, VM-exit and VM-entry control fields (SDM Vol 3C, "Checks on VMX Controls").

use twofold_arch::control::{cr0, cr4};
use twofold_arch::paging::bits;
use twofold_arch::vmx::control::{exit, pin, proc, proc2, proc3, vmfunc};
use twofold_arch::vmx::ept::Eptp;
use twofold_arch::vmx::msr::{basic, ept_vpid, misc};
use twofold_arch::vmx::{ControlBit, EventType, Field, InterruptionInfo, Word};

use super::Heading::{Entry, Execution, Exit};
use super::{Check, Detail, Table, View, address, check, require, reserved};
use crate::vmx::caps::CR3_TARGETS;

type Outcome = Result<(), Detail>;

/// The checks whose fields seldom change.
pub(super) const TABLE: Table = Table {
    checks: CHECKS,
    memo: Some(0),
    watch: &[
        (Field::Vpid, Field::LastPidPointerIndex),
        (Field::IoBitmapA, Field::SpecCtrlShadow),
        (Field::PinControls, Field::EntryMsrLoadCount),
        (Field::TprThreshold, Field::InstructionTimeoutControl),
    ],
    also: &[],
};

/// The checks of the event to be injected, and what looks at guest memory.
pub(super) const EVERY_TIME: Table = Table { checks: CHECKS_EVERY_TIME, memo: None, watch: &[], also: &[] };

/// In the SDM's order. "Entry to SMM" and "deactivate dual-monitor treatment" are reserved here, where there is no
/// dual-monitor treatment.
const CHECKS: &[Check] = &[
    check("pin-reserved", Execution, |v| reserved(v, Word::Pin)),
    check("proc-reserved", Execution, |v| reserved(v, Word::Proc)),
    check("proc2-reserved", Execution, proc2_reserved),
    check("proc3-reserved", Execution, proc3_reserved),
    check("cr3-target-count", Execution, cr3_target_count),
    check("io-bitmap-address", Execution, io_bitmap_address),
    check("msr-bitmap-address", Execution, msr_bitmap_address),
    check("virtual-apic-address", Execution, virtual_apic_address),
    check("tpr-threshold-reserved", Execution, tpr_threshold_reserved),
    check("virtual-nmis-need-nmi-exiting", Execution, virtual_nmis),
    check("nmi-window-needs-virtual-nmis", Execution, nmi_window),
    check("apic-access-address", Execution, apic_access_address),
    check("apic-virtualization-needs-tpr-shadow", Execution, needs_tpr_shadow),
    check("x2apic-mode-excludes-apic-accesses", Execution, x2apic_mode),
    check("interrupt-delivery-needs-interrupt-exiting", Execution, interrupt_delivery),
    check("posted-interrupts-need-delivery", Execution, posted_interrupts),
    check("posted-interrupt-vector", Execution, posted_interrupt_vector),
    check("posted-interrupt-descriptor", Execution, posted_interrupt_descriptor),
    check("vpid-zero", Execution, vpid_zero),
    check("eptp-memory-type", Execution, eptp_memory_type),
    check("eptp-walk-length", Execution, eptp_walk_length),
    check("eptp-accessed-dirty", Execution, eptp_accessed_dirty),
    check("eptp-reserved", Execution, eptp_reserved),
    check("pml-needs-ept", Execution, pml_needs_ept),
    check("pml-address", Execution, pml_address),
    check("unrestricted-guest-needs-ept", Execution, unrestricted_guest),
    check("mode-based-execute-needs-ept", Execution, mode_based_execute),
    check("sub-page-write-needs-ept", Execution, sub_page_write),
    check("sub-page-permission-table", Execution, sub_page_permission_table),
    check("vm-functions-reserved", Execution, vm_functions_reserved),
    check("eptp-switching-needs-ept", Execution, eptp_switching),
    check("eptp-list-address", Execution, eptp_list_address),
    check("vmread-bitmap-address", Execution, vmread_bitmap_address),
    check("vmwrite-bitmap-address", Execution, vmwrite_bitmap_address),
    check("ve-information-address", Execution, ve_information_address),
    check("tsc-multiplier-zero", Execution, tsc_multiplier),
    check("ipi-virtualization-needs-tpr-shadow", Execution, ipi_virtualization),
    check("pid-pointer-table", Execution, pid_pointer_table),
    check("exit-reserved", Exit, |v| reserved(v, Word::Exit)),
    check("exit2-reserved", Exit, exit2_reserved),
    check("save-preemption-timer", Exit, save_preemption_timer),
    check("posted-interrupts-need-acknowledge", Exit, posted_interrupts_acknowledge),
    check("exit-msr-store-area", Exit, |v| msr_area(v, Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress)),
    check("exit-msr-load-area", Exit, |v| msr_area(v, Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress)),
    check("entry-reserved", Entry, |v| reserved(v, Word::Entry)),
    check("entry-msr-load-area", Entry, |v| msr_area(v, Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress)),
];

const CHECKS_EVERY_TIME: &[Check] = &[
    check("tpr-threshold-above-vtpr", Execution, tpr_threshold_above_vtpr),
    check("event-type", Entry, event_type),
    check("event-vector", Entry, event_vector),
    check("event-error-code-valid", Entry, event_error_code_valid),
    check("event-reserved", Entry, event_reserved),
    check("event-error-code", Entry, event_error_code),
    check("event-instruction-length", Entry, event_instruction_length),
];

/// `address` with bits 11:0 clear, when a control makes it matter.
fn page_if(v: &View<'_>, used: bool, field: Field) -> Outcome {
    if used { address(v, field, 12) } else { Ok(()) }
}

fn proc2_reserved(v: &View<'_>) -> Outcome {
    if v.proc(proc::SECONDARY) { reserved(v, Word::Proc2) } else { Ok(()) }
}

fn proc3_reserved(v: &View<'_>) -> Outcome {
    if v.proc(proc::TERTIARY) { reserved(v, Word::Proc3) } else { Ok(()) }
}

fn cr3_target_count(v: &View<'_>) -> Outcome {
    let n = v.get(Field::Cr3TargetCount);
    require!(n <= CR3_TARGETS, "CR3-target count {n} is more than the {CR3_TARGETS} that IA32_VMX_MISC reports")
}

fn io_bitmap_address(v: &View<'_>) -> Outcome {
    let used = v.proc(proc::IO_BITMAPS);
    page_if(v, used, Field::IoBitmapA)?;
    page_if(v, used, Field::IoBitmapB)
}

fn msr_bitmap_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc(proc::MSR_BITMAPS), Field::MsrBitmap)
}

fn virtual_apic_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc(proc::TPR_SHADOW), Field::VirtualApicAddress)
}

fn tpr_threshold_reserved(v: &View<'_>) -> Outcome {
    let threshold = v.get(Field::TprThreshold);
    let matters = v.proc(proc::TPR_SHADOW) && !v.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY);
    require!(!matters || threshold >> 4 == 0, "TPR threshold {threshold:#x} has one of bits 31:4 set")
}

fn tpr_threshold_above_vtpr(v: &View<'_>) -> Outcome {
    let virtualized = v.proc2(proc2::APIC_ACCESSES | proc2::VIRTUAL_INTERRUPT_DELIVERY);
    if !v.proc(proc::TPR_SHADOW) || virtualized || virtual_apic_address(v).is_err() {
        return Ok(());
    }
    /// Offset of VTPR in the virtual-APIC page.
    const VTPR: u64 = 0x80;
    let mut vtpr = [0];
    v.read(v.get(Field::VirtualApicAddress) | VTPR, &mut vtpr);
    let (threshold, class) = (v.get(Field::TprThreshold) & 15, u64::from(vtpr[0] >> 4));
    require!(threshold <= class, "TPR threshold {threshold} is above bits 7:4 of VTPR, {class}")
}

fn virtual_nmis(v: &View<'_>) -> Outcome {
    require!(v.pin(pin::NMI_EXITING) || !v.pin(pin::VIRTUAL_NMIS), "\"virtual NMIs\" is 1 while \"NMI exiting\" is 0")
}

fn nmi_window(v: &View<'_>) -> Outcome {
    require!(
        v.pin(pin::VIRTUAL_NMIS) || !v.proc(proc::NMI_WINDOW_EXITING),
        "\"NMI-window exiting\" is 1 while \"virtual NMIs\" is 0"
    )
}

fn apic_access_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::APIC_ACCESSES), Field::ApicAccessAddress)
}

fn needs_tpr_shadow(v: &View<'_>) -> Outcome {
    let virtualized = proc2::X2APIC_MODE | proc2::APIC_REGISTERS | proc2::VIRTUAL_INTERRUPT_DELIVERY;
    require!(
        v.proc(proc::TPR_SHADOW) || !v.proc2(virtualized),
        "\"virtualize x2APIC mode\", \"APIC-register virtualization\" or \"virtual-interrupt delivery\" is 1 while \"use \
         TPR shadow\" is 0"
    )
}

fn x2apic_mode(v: &View<'_>) -> Outcome {
    require!(
        !v.proc2(proc2::X2APIC_MODE) || !v.proc2(proc2::APIC_ACCESSES),
        "\"virtualize x2APIC mode\" and \"virtualize APIC accesses\" are both 1"
    )
}

fn interrupt_delivery(v: &View<'_>) -> Outcome {
    require!(
        v.pin(pin::EXTERNAL_INTERRUPT_EXITING) || !v.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY),
        "\"virtual-interrupt delivery\" is 1 while \"external-interrupt exiting\" is 0"
    )
}

fn posted_interrupts(v: &View<'_>) -> Outcome {
    require!(
        v.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY) || !v.pin(pin::POSTED_INTERRUPTS),
        "\"process posted interrupts\" is 1 while \"virtual-interrupt delivery\" is 0"
    )
}

fn posted_interrupts_acknowledge(v: &View<'_>) -> Outcome {
    require!(
        v.exit(exit::ACKNOWLEDGE_INTERRUPT) || !v.pin(pin::POSTED_INTERRUPTS),
        "\"process posted interrupts\" is 1 while \"acknowledge interrupt on exit\" is 0"
    )
}

fn posted_interrupt_vector(v: &View<'_>) -> Outcome {
    let vector = v.get(Field::PostedInterruptVector);
    require!(
        !v.pin(pin::POSTED_INTERRUPTS) || vector >> 8 == 0,
        "posted-interrupt notification vector {vector:#x} has one of bits 15:8 set"
    )
}

fn posted_interrupt_descriptor(v: &View<'_>) -> Outcome {
    if v.pin(pin::POSTED_INTERRUPTS) { address(v, Field::PostedInterruptDescriptor, 6) } else { Ok(()) }
}

fn vpid_zero(v: &View<'_>) -> Outcome {
    require!(!v.proc2(proc2::VPID) || v.get(Field::Vpid) != 0, "VPID is 0000H while \"enable VPID\" is 1")
}

/// The EPTP, when EPT is in use.
fn eptp(v: &View<'_>) -> Option<Eptp> {
    v.proc2(proc2::EPT).then(|| Eptp(v.get(Field::Eptp)))
}

fn eptp_memory_type(v: &View<'_>) -> Outcome {
    let Some(eptp) = eptp(v) else { return Ok(()) };
    let supported = match eptp.memory_type() {
        0 => v.caps.has_ept_vpid(ept_vpid::TYPE_UC),
        6 => v.caps.has_ept_vpid(ept_vpid::TYPE_WB),
        _ => false,
    };
    let (value, t) = (eptp.0, eptp.memory_type());
    require!(supported, "EPTP {value:#x} has memory type {t} that IA32_VMX_EPT_VPID_CAP does not report")
}

fn eptp_walk_length(v: &View<'_>) -> Outcome {
    let Some(eptp) = eptp(v) else { return Ok(()) };
    let supported = match eptp.levels() {
        4 => v.caps.has_ept_vpid(ept_vpid::WALK_4),
        5 => v.caps.has_ept_vpid(ept_vpid::WALK_5),
        _ => false,
    };
    let (value, n) = (eptp.0, eptp.levels());
    require!(supported, "EPTP {value:#x} has a page-walk length of {n} that IA32_VMX_EPT_VPID_CAP does not report")
}

fn eptp_accessed_dirty(v: &View<'_>) -> Outcome {
    let Some(eptp) = eptp(v) else { return Ok(()) };
    require!(
        !eptp.accessed_dirty() || v.caps.has_ept_vpid(ept_vpid::ACCESSED_DIRTY),
        "EPTP {:#x} has bit 6 set: there are no accessed and dirty flags for EPT",
        eptp.0
    )
}

fn eptp_reserved(v: &View<'_>) -> Outcome {
    let Some(eptp) = eptp(v) else { return Ok(()) };
    let shadow_stack = if v.caps.has_ept_vpid(ept_vpid::SUPERVISOR_SHADOW_STACK) { Eptp::SHADOW_STACK } else { 0 };
    let reserved = (bits(11, 7) & !shadow_stack) | bits(63, v.caps.phys_bits);
    require!(eptp.0 & reserved == 0, "EPTP {:#x} has reserved bits {:#x} set", eptp.0, eptp.0 & reserved)
}

/// A control that makes no sense without EPT.
fn needs_ept(v: &View<'_>, used: bool, name: &str) -> Outcome {
    require!(!used || v.proc2(proc2::EPT), "\"{name}\" is 1 while \"enable EPT\" is 0")
}

fn pml_needs_ept(v: &View<'_>) -> Outcome {
    needs_ept(v, v.proc2(proc2::PML), "enable PML")
}

fn pml_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::PML), Field::PmlAddress)
}

fn unrestricted_guest(v: &View<'_>) -> Outcome {
    needs_ept(v, v.unrestricted(), "unrestricted guest")
}

fn mode_based_execute(v: &View<'_>) -> Outcome {
    needs_ept(v, v.proc2(proc2::MODE_BASED_EXECUTE), "mode-based execute control for EPT")
}

fn sub_page_write(v: &View<'_>) -> Outcome {
    needs_ept(v, v.proc2(proc2::SUB_PAGE_WRITE), "sub-page write permissions for EPT")
}

fn sub_page_permission_table(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::SUB_PAGE_WRITE), Field::SubPagePermissionTable)
}

fn vm_functions_reserved(v: &View<'_>) -> Outcome {
    if v.proc2(proc2::VM_FUNCTIONS) { reserved(v, Word::VmFunc) } else { Ok(()) }
}

fn switches_eptp(v: &View<'_>) -> bool {
    v.proc2(proc2::VM_FUNCTIONS) && v.get(Field::VmFunctionControls) & vmfunc::EPTP_SWITCHING != 0
}

fn eptp_switching(v: &View<'_>) -> Outcome {
    needs_ept(v, switches_eptp(v), "EPTP switching")
}

fn eptp_list_address(v: &View<'_>) -> Outcome {
    page_if(v, switches_eptp(v), Field::EptpListAddress)
}

fn vmread_bitmap_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::VMCS_SHADOWING), Field::VmreadBitmap)
}

fn vmwrite_bitmap_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::VMCS_SHADOWING), Field::VmwriteBitmap)
}

fn ve_information_address(v: &View<'_>) -> Outcome {
    page_if(v, v.proc2(proc2::EPT_VIOLATION_VE), Field::VeInformationAddress)
}

fn tsc_multiplier(v: &View<'_>) -> Outcome {
    require!(
        !v.proc2(proc2::TSC_SCALING) || v.get(Field::TscMultiplier) != 0,
        "TSC multiplier is 0 while \"use TSC scaling\" is 1"
    )
}

fn ipi_virtualization(v: &View<'_>) -> Outcome {
    require!(
        v.proc(proc::TPR_SHADOW) || !v.proc3(proc3::IPI_VIRTUALIZATION),
        "\"IPI virtualization\" is 1 while \"use TPR shadow\" is 0"
    )
}

/// The PID-pointer table: 8-byte aligned, its last entry within the physical-address width.
fn pid_pointer_table(v: &View<'_>) -> Outcome {
    if !v.proc3(proc3::IPI_VIRTUALIZATION) {
        return Ok(());
    }
    address(v, Field::PidPointerTable, 3)?;
    let last = v.get(Field::PidPointerTable) + 8 * v.get(Field::LastPidPointerIndex) + 7;
    require!(v.physical(last), "the PID-pointer table ends at {last:#x}, beyond the physical-address width")
}

fn exit2_reserved(v: &View<'_>) -> Outcome {
    if v.exit(exit::SECONDARY) { reserved(v, Word::Exit2) } else { Ok(()) }
}

fn save_preemption_timer(v: &View<'_>) -> Outcome {
    require!(
        v.pin(pin::PREEMPTION_TIMER) || !v.exit(exit::SAVE_PREEMPTION_TIMER),
        "\"save VMX-preemption timer value\" is 1 while \"activate VMX-preemption timer\" is 0"
    )
}

/// An MSR area: 16-byte aligned, all of it within the physical-address width.
fn msr_area(v: &View<'_>, count: Field, at: Field) -> Outcome {
    let n = v.get(count);
    if n == 0 {
        return Ok(());
    }
    address(v, at, 4)?;
    // Cannot overflow: the address is below 2^52, the count below 2^32.
    let last = v.get(at) + n * 16 - 1;
    require!(
        v.physical(last),
        "{} {:#x} with {n} entries ends at {last:#x}, beyond the physical-address width",
        at.name(),
        v.get(at)
    )
}

// ---- event injection --------------------------------------------------------------------------------------------------

/// The event to be injected with its type, when that is one there is.
fn typed_event(v: &View<'_>) -> Option<(InterruptionInfo, EventType)> {
    let info = v.event()?;
    Some((info, info.kind()?))
}

fn event_type(v: &View<'_>) -> Outcome {
    let Some(info) = v.event() else { return Ok(()) };
    let mtf = v.caps.has(ControlBit { word: Word::Proc, mask: u64::from(proc::MONITOR_TRAP_FLAG) });
    let known = match info.kind() {
        None => false,
        Some(EventType::Other) => mtf,
        Some(_) => true,
    };
    require!(known, "VM-entry interruption information {:#x} has the reserved type {}", info.0, info.0 >> 8 & 7)
}

fn event_vector(v: &View<'_>) -> Outcome {
    let Some((info, kind)) = typed_event(v) else { return Ok(()) };
    let vector = info.vector();
    let fits = match kind {
        EventType::Nmi => vector == 2,
        EventType::HardwareException => vector <= 31,
        EventType::Other => vector == 0,
        _ => true,
    };
    require!(fits, "VM-entry interruption information {:#x} has vector {vector}, which {kind:?} cannot have", info.0)
}

/// Hardware exceptions that push an error code in protected mode.
fn pushes_error_code(v: &View<'_>, vector: u8) -> bool {
    let cp = v.caps.cr4_fixed().may & cr4::CET != 0;
    matches!(vector, 8 | 10..=14 | 17) || (vector == 21 && cp)
}

fn event_error_code_valid(v: &View<'_>) -> Outcome {
    let Some((info, kind)) = typed_event(v) else { return Ok(()) };
    let protected = !v.unrestricted() || v.cr0(cr0::PE);
    let has = info.has_error_code();
    let fits = if kind != EventType::HardwareException || !protected {
        !has
    } else {
        v.caps.has_basic(basic::NO_ERROR_CODE_CHECK) || has == pushes_error_code(v, info.vector())
    };
    let what = if has { "delivers an error code, which" } else { "delivers no error code, which" };
    require!(
        fits,
        "VM-entry interruption information {:#x} {what} {kind:?} of vector {} does not allow here",
        info.0,
        info.vector()
    )
}

fn event_reserved(v: &View<'_>) -> Outcome {
    let Some(info) = v.event() else { return Ok(()) };
    let set = info.0 & InterruptionInfo::ENTRY_RESERVED;
    require!(set == 0, "VM-entry interruption information {:#x} has reserved bits {set:#x} set", info.0)
}

fn event_error_code(v: &View<'_>) -> Outcome {
    let error = v.get(Field::EntryErrorCode);
    let delivers = v.event().is_some_and(InterruptionInfo::has_error_code);
    require!(!delivers || error >> 16 == 0, "VM-entry exception error code {error:#x} has one of bits 31:16 set")
}

fn event_instruction_length(v: &View<'_>) -> Outcome {
    let Some((_, kind)) = typed_event(v) else { return Ok(()) };
    let length = v.get(Field::EntryInstructionLength);
    let least = u64::from(!v.caps.has_misc(misc::INJECT_ZERO_LENGTH));
    require!(
        !kind.is_software() || (least..=15).contains(&length),
        "VM-entry instruction length {length} is not in the range {least} to 15 of a {kind:?}"
    )
}
