//! G5: injection, IDT vectoring, windows, the exception bitmap, interrupts and NMIs, blocking, timers.

use twofold_arch::vmx::event::EventType;

use super::*;
use crate::cpu::tests::HANDLERS;

fn inject(v: &mut Vcpu, vector: u8, kind: EventType, error: Option<u32>) {
    set(v, Field::EntryInterruptionInfo, u64::from(InterruptionInfo::new(vector, kind, error.is_some()).0));
    set(v, Field::EntryErrorCode, u64::from(error.unwrap_or(0)));
}

/// Puts HLT at the handler of every vector.
fn handlers(v: &Vcpu) {
    for n in 0..256 {
        poke(v, HANDLERS + 16 * n, &[0xf4]);
    }
}

#[test]
fn g5_injection_of_every_type() {
    for (vector, kind, error, next) in [
        (0x40, EventType::External, None, 0),
        (2, EventType::Nmi, None, 0),
        (13, EventType::HardwareException, Some(0x18), 0),
        (0x50, EventType::SoftwareInterrupt, None, 2),
        (3, EventType::SoftwareException, None, 1),
        (1, EventType::PrivilegedSoftwareException, None, 1),
    ] {
        let mut v = with_guest();
        handlers(&v);
        inject(&mut v, vector, kind, error);
        set(&mut v, Field::EntryInstructionLength, 1);
        if kind == EventType::SoftwareInterrupt {
            set(&mut v, Field::EntryInstructionLength, 2);
        }
        if kind == EventType::External {
            set(&mut v, Field::GuestRflags, 0x202);
        }
        // The exception bitmap does not matter to what is injected.
        set(&mut v, Field::ExceptionBitmap, 0xffff_ffff);
        assert_eq!(go(&mut v), ExitReason::Hlt, "{kind:?}");
        assert_eq!(get(&v, Field::GuestRip), HANDLERS + 16 * u64::from(vector));
        let pushed = if error.is_some() { 8 } else { 0 };
        let rsp = get(&v, Field::GuestRsp);
        assert_eq!(rsp, STACK - 40 - pushed);
        assert_eq!(peek64(&v, rsp + pushed), CODE + next, "{kind:?}");
        if let Some(error) = error {
            assert_eq!(peek64(&v, rsp), u64::from(error));
        }
        assert_eq!(get(&v, Field::EntryInterruptionInfo) >> 31, 0);
        assert_eq!(get(&v, Field::IdtVectoringInfo), 0);
        let nmi = get(&v, Field::GuestInterruptibility) >> 3 & 1;
        assert_eq!(nmi, u64::from(kind == EventType::Nmi));
    }
}

#[test]
fn g5_exit_during_injection_has_vectoring_information() {
    let mut v = with_guest();
    inject(&mut v, 0x40, EventType::SoftwareInterrupt, None);
    set(&mut v, Field::EntryInstructionLength, 2);
    // No stack: a page fault during the delivery.
    set(&mut v, Field::GuestRsp, 0x4000_0000);
    set(&mut v, Field::ExceptionBitmap, 1 << 14);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0b0e);
    assert_eq!(get(&v, Field::IdtVectoringInfo), 0x8000_0440);
    assert_eq!(get(&v, Field::ExitInstructionLength), 2);
    assert_eq!(get(&v, Field::ExitQualification), 0x3fff_fff8);
    assert_eq!(get(&v, Field::GuestRip), CODE);
    assert_eq!(v.state.cr2, 0);
}

#[test]
fn g5_exception_bitmap_and_page_fault_mask() {
    let mut v = with_guest();
    // ud2
    code(&v, &[0x0f, 0x0b]);
    set(&mut v, Field::ExceptionBitmap, 1 << 6);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0306);
    assert_eq!(get(&v, Field::GuestRflags) & rflags::RF, rflags::RF);
    assert_eq!(v.vmx.stats.exceptions[6], 1);
    let mut v = with_guest();
    handlers(&v);
    // mov [0x40000000], eax
    code(&v, &[0x89, 0x04, 0x25, 0, 0, 0, 0x40]);
    // Only not-present faults of reads match; this is a write.
    set(&mut v, Field::ExceptionBitmap, 1 << 14);
    set(&mut v, Field::PageFaultMask, 3);
    set(&mut v, Field::PageFaultMatch, 0);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 14 * 16);
    assert_eq!(v.state.cr2, 0x4000_0000);
    set(&mut v, Field::PageFaultMatch, 2);
    set(&mut v, Field::GuestRip, CODE);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!((get(&v, Field::ExitErrorCode), get(&v, Field::ExitQualification)), (2, 0x4000_0000));
}

#[test]
fn g5_software_exceptions_have_their_length() {
    let mut v = with_guest();
    code(&v, &[0xcc]);
    set(&mut v, Field::ExceptionBitmap, 1 << 3);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0603);
    assert_eq!((get(&v, Field::ExitInstructionLength), get(&v, Field::GuestRip)), (1, CODE));
    // INT n does not exit by itself; a fault in its delivery has it as the vectored event.
    let mut v = with_guest();
    code(&v, &[0xcd, 0x40]);
    set(&mut v, Field::GuestIdtrLimit, 0x3ff);
    set(&mut v, Field::ExceptionBitmap, 1 << 13);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0b0d);
    assert_eq!(get(&v, Field::ExitErrorCode), 0x40 << 3 | 2);
    assert_eq!(get(&v, Field::IdtVectoringInfo), 0x8000_0440);
    assert_eq!(get(&v, Field::ExitInstructionLength), 2);
}

#[test]
fn g5_double_and_triple_faults() {
    let mut v = with_guest();
    code(&v, &[0x0f, 0x0b]);
    // No IDT: #UD, #GP, #DF, shutdown.
    set(&mut v, Field::GuestIdtrLimit, 0);
    assert_eq!(go(&mut v), ExitReason::TripleFault);
    assert_eq!(get(&v, Field::IdtVectoringInfo), 0);
    set(&mut v, Field::ExceptionBitmap, 1 << 8);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0b08);
    assert_eq!(get(&v, Field::IdtVectoringInfo), 0);
}

#[test]
fn g5_interrupt_window() {
    let mut v = with_guest();
    // nop; sti; nop; nop
    code(&v, &[0x90, 0xfb, 0x90, 0x90, 0xf4]);
    set_bits(&mut v, Field::ProcControls, proc::INTERRUPT_WINDOW_EXITING);
    assert_eq!(go(&mut v), ExitReason::InterruptWindow);
    // After the instruction that follows STI.
    assert_eq!(get(&v, Field::GuestRip), CODE + 3);
    assert_eq!(get(&v, Field::GuestInterruptibility), 0);
    // At once when it is open already.
    assert_eq!(go(&mut v), ExitReason::InterruptWindow);
    assert_eq!(get(&v, Field::GuestRip), CODE + 3);
}

#[test]
fn g5_blocking_by_sti_is_saved_and_loaded() {
    let mut v = with_guest();
    // sti; hlt
    code(&v, &[0xfb, 0xf4, 0x90, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestInterruptibility), 1);
    set_bits(&mut v, Field::ProcControls, proc::INTERRUPT_WINDOW_EXITING);
    set(&mut v, Field::GuestRip, CODE + 2);
    assert_eq!(go(&mut v), ExitReason::InterruptWindow);
    assert_eq!(get(&v, Field::GuestRip), CODE + 3);
}

#[test]
fn g5_virtual_nmis() {
    let mut v = with_guest();
    handlers(&v);
    set_bits(&mut v, Field::PinControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    set_bits(&mut v, Field::ProcControls, proc::NMI_WINDOW_EXITING);
    // The handler: iretq, back to nop; hlt.
    poke(&v, HANDLERS + 2 * 16, &[0x48, 0xcf]);
    code(&v, &[0x90, 0xf4]);
    inject(&mut v, 2, EventType::Nmi, None);
    assert_eq!(go(&mut v), ExitReason::NmiWindow);
    // The window opened with IRET.
    assert_eq!(get(&v, Field::GuestRip), CODE);
    assert_eq!(get(&v, Field::GuestInterruptibility), 0);
    assert_eq!(v.state.nmi_blocked, 0);
}

#[test]
fn g5_preemption_timer() {
    let mut v = with_guest();
    code(&v, &[0xeb, 0xfe]);
    set_bits(&mut v, Field::PinControls, pin::PREEMPTION_TIMER);
    set_bits(&mut v, Field::ExitControls, exit::SAVE_PREEMPTION_TIMER);
    set(&mut v, Field::PreemptionTimer, 0);
    assert_eq!(go(&mut v), ExitReason::PreemptionTimer);
    assert_eq!(get(&v, Field::GuestRip), CODE);
    set(&mut v, Field::PreemptionTimer, 10);
    enter(&mut v);
    v.shared.clock.advance(10 * 32 - 1);
    dispatch::step(&mut v).unwrap();
    assert!(v.vmx.non_root);
    v.shared.clock.advance(1);
    assert_eq!(run_to_exit(&mut v), ExitReason::PreemptionTimer);
    assert_eq!(get(&v, Field::PreemptionTimer), 0);
    // What is left is saved.
    code(&v, &[0xf4]);
    v.mmu.code().note_write(PhysAddr(CODE), 1);
    crate::exec::slow::drop_written(&mut v);
    set(&mut v, Field::PreemptionTimer, 10);
    enter(&mut v);
    v.shared.clock.advance(3 * 32);
    assert_eq!(run_to_exit(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::PreemptionTimer), 7);
}

#[test]
fn g5_monitor_trap_flag() {
    let mut v = with_guest();
    handlers(&v);
    set_bits(&mut v, Field::ProcControls, proc::MONITOR_TRAP_FLAG);
    code(&v, &[0x90, 0x90, 0x0f, 0x0b]);
    for n in 1..3 {
        assert_eq!(go(&mut v), ExitReason::MonitorTrapFlag);
        assert_eq!(get(&v, Field::GuestRip), CODE + n);
    }
    // After the delivery of a fault, at its handler.
    assert_eq!(go(&mut v), ExitReason::MonitorTrapFlag);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 6 * 16);
    // Injected: pending before anything runs.
    let controls = get(&v, Field::ProcControls) & !u64::from(proc::MONITOR_TRAP_FLAG);
    set(&mut v, Field::ProcControls, controls);
    inject(&mut v, 0, EventType::Other, None);
    assert_eq!(go(&mut v), ExitReason::MonitorTrapFlag);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 6 * 16);
}

#[test]
fn g5_hlt_activity_state() {
    let mut v = with_guest();
    handlers(&v);
    let controls = get(&v, Field::ProcControls) & !u64::from(proc::HLT_EXITING);
    set(&mut v, Field::ProcControls, controls);
    set_bits(&mut v, Field::PinControls, pin::PREEMPTION_TIMER);
    set(&mut v, Field::PreemptionTimer, 100);
    code(&v, &[0xf4]);
    enter(&mut v);
    dispatch::step(&mut v).unwrap();
    assert_eq!((v.state.halted, v.vmx.non_root), (1, true));
    v.shared.clock.advance(100 * 32);
    assert_eq!(run_to_exit(&mut v), ExitReason::PreemptionTimer);
    assert_eq!((get(&v, Field::GuestActivity), v.state.halted), (1, 0));
    // Entered halted, an injected event wakes it.
    inject(&mut v, 0x40, EventType::External, None);
    set(&mut v, Field::GuestRflags, 0x202);
    set_bits(&mut v, Field::ProcControls, proc::HLT_EXITING);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 0x40 * 16);
}

#[test]
fn g5_pending_debug_exceptions() {
    let mut v = with_guest();
    code(&v, &[0xf4]);
    set(&mut v, Field::GuestPendingDebug, 1 << 14);
    set(&mut v, Field::GuestRflags, 0x102);
    set(&mut v, Field::ExceptionBitmap, 2);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::ExitInterruptionInfo), 0x8000_0301);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (1 << 14, CODE));
    assert_eq!(v.state.dr[6] & 1 << 14, 0);
}

/// A data breakpoint that MOV SS has put off is pending when the next instruction exits (SDM Vol 3C, "Saving Non-Register State").
#[test]
fn g5_a_breakpoint_behind_mov_ss_is_pending_at_the_exit() {
    use twofold_arch::vmx::event::{interruptibility, pending_debug};
    let mut v = with_guest();
    poke64(&v, 0x7_0000, u64::from(KERNEL_DS));
    // mov ss, [0x70000]; cpuid
    code(&v, &[0x8e, 0x14, 0x25, 0, 0, 7, 0, 0x0f, 0xa2]);
    set_bits(&mut v, Field::EntryControls, entry::LOAD_DEBUG_CONTROLS);
    set(&mut v, Field::GuestDr7, 0x3_0402);
    v.state.dr[0] = 0x7_0000;
    assert_eq!(go(&mut v), ExitReason::Cpuid);
    let pending = get(&v, Field::GuestPendingDebug);
    assert_eq!(pending, 1 | pending_debug::ENABLED_BREAKPOINT);
    assert_eq!(get(&v, Field::GuestInterruptibility), u64::from(interruptibility::MOV_SS));
    // It comes after the instruction that L1 has emulated.
    skip(&mut v);
    set(&mut v, Field::GuestInterruptibility, 0);
    poke(&v, crate::cpu::tests::HANDLERS + 16, &[0x0f, 0xa2]);
    assert_eq!(go(&mut v), ExitReason::Cpuid);
    assert_eq!((get(&v, Field::GuestRip), v.state.dr[6] & 0xf), (crate::cpu::tests::HANDLERS + 16, 1));
}
