//! G8: INIT and start-up IPIs in VMX operation, the wait-for-SIPI state, VMX aborts.

use twofold_arch::vmx::VMCS_ABORT_OFFSET;
use twofold_arch::vmx::event::activity;

use super::*;
use crate::platform::LAPIC_BASE;
use crate::vcpu::Shutdown;

/// Low words of the interrupt command register: INIT, start-up with vector 8, NMI.
const INIT: u64 = 0x4500;
const SIPI: u64 = 0x4608;
const NMI: u64 = 0x4400;

/// Sends a message to the processor itself.
fn send(v: &mut Vcpu, message: u64) {
    v.with_devices(|p| {
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x310), 4, 0);
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x300), 4, message);
    });
}

#[test]
fn g8_init_exits_from_a_guest() {
    let mut v = with_guest();
    // inc rax; jmp back
    code(&v, &[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
    poke(&v, HANDLER, &[0xeb, 0xfe]);
    enter(&mut v);
    dispatch::step(&mut v).unwrap();
    send(&mut v, INIT);
    assert_eq!(run_to_exit(&mut v), ExitReason::Init);
    assert_eq!((get(&v, Field::ExitQualification), v.state.rip), (0, HANDLER));
    assert!(v.state.gpr[0] > 1, "registers are not reset");
    // The exit consumed it: the guest goes on.
    enter(&mut v);
    for _ in 0..5 {
        dispatch::step(&mut v).unwrap();
    }
    assert!(v.vmx.non_root);
    // From HLT, too, and a SIPI is nothing to a guest that does not wait for one.
    send(&mut v, SIPI);
    v.state.halted = 1;
    dispatch::step(&mut v).unwrap();
    assert!(v.vmx.non_root);
    send(&mut v, INIT);
    assert_eq!(run_to_exit(&mut v), ExitReason::Init);
    assert_eq!(get(&v, Field::GuestActivity), u64::from(activity::HLT));
}

#[test]
fn g8_init_waits_while_in_root_operation() {
    let mut v = with_guest();
    // L1 spins; L2 as well.
    code(&v, &[0xeb, 0xfe]);
    poke(&v, HANDLER, &[0xeb, 0xfe]);
    v.state.rip = HANDLER;
    send(&mut v, INIT);
    for _ in 0..5 {
        dispatch::step(&mut v).unwrap();
    }
    assert_eq!((v.state.rip, v.vmx.vmxon), (HANDLER, Some(PhysAddr(VMXON))));
    // A VM entry exits at once, behind the event that it injects.
    for inject in [false, true] {
        if inject {
            send(&mut v, INIT);
            dispatch::step(&mut v).unwrap();
            set(&mut v, Field::EntryInterruptionInfo, u64::from(InterruptionInfo::VALID) | 3 << 8 | 6);
        }
        assert_eq!(go(&mut v), ExitReason::Init);
        let handler = crate::cpu::tests::HANDLERS + 0x60;
        assert_eq!(get(&v, Field::GuestRip), if inject { handler } else { CODE });
    }
    // When VMX operation ends it does what it does.
    send(&mut v, INIT);
    dispatch::step(&mut v).unwrap();
    assert_eq!(plain(&mut v, word::VMXOFF), Result_::Succeed);
    dispatch::start_up_signals(&mut v);
    assert_eq!((v.state.rip, v.state.cr0 & cr0::PE, v.vmx.vmxon), (0xfff0, 0, None));
}

#[test]
fn g8_wait_for_sipi() {
    let mut v = with_guest();
    set(&mut v, Field::GuestActivity, u64::from(activity::WAIT_FOR_SIPI));
    set_bits(&mut v, Field::PinControls, pin::NMI_EXITING | pin::EXTERNAL_INTERRUPT_EXITING | pin::PREEMPTION_TIMER);
    set_bits(&mut v, Field::PinControls, pin::VIRTUAL_NMIS);
    set_bits(&mut v, Field::ProcControls, proc::NMI_WINDOW_EXITING | proc::INTERRUPT_WINDOW_EXITING);
    set(&mut v, Field::GuestRflags, 0x202);
    enter(&mut v);
    // Nothing else ends it: no NMI, INIT, window or timer.
    send(&mut v, NMI);
    send(&mut v, INIT);
    v.shared.clock.advance(1_000_000);
    for _ in 0..5 {
        dispatch::step(&mut v).unwrap();
    }
    assert!(v.vmx.non_root && v.state.halted != 0);
    send(&mut v, SIPI);
    assert_eq!(run_to_exit(&mut v), ExitReason::Sipi);
    assert_eq!(get(&v, Field::ExitQualification), 8);
    assert_eq!(get(&v, Field::GuestActivity), u64::from(activity::WAIT_FOR_SIPI));
    assert_eq!(get(&v, Field::GuestRip), CODE);
    // INIT is pending still.
    set(&mut v, Field::GuestActivity, 0);
    assert_eq!(go(&mut v), ExitReason::Init);
}

#[test]
fn g8_windows_in_the_shutdown_state() {
    let mut v = with_guest();
    set(&mut v, Field::GuestActivity, u64::from(activity::SHUTDOWN));
    set_bits(&mut v, Field::PinControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    set_bits(&mut v, Field::ProcControls, proc::INTERRUPT_WINDOW_EXITING);
    set(&mut v, Field::GuestRflags, 0x202);
    enter(&mut v);
    for _ in 0..5 {
        dispatch::step(&mut v).unwrap();
    }
    assert!(v.vmx.non_root, "no interrupt window");
    send(&mut v, INIT);
    assert_eq!(run_to_exit(&mut v), ExitReason::Init);
    set_bits(&mut v, Field::ProcControls, proc::NMI_WINDOW_EXITING);
    assert_eq!(go(&mut v), ExitReason::NmiWindow);
}

/// The shutdown and the indicator of a VMX abort.
fn abort_of(v: &mut Vcpu) -> u64 {
    enter(v);
    for _ in 0..10_000 {
        if let Err(end) = dispatch::step(v) {
            assert_eq!(end, Shutdown::TripleFault);
            return peek64(v, VMCS + VMCS_ABORT_OFFSET) & 0xffff_ffff;
        }
        assert!(v.vmx.non_root, "no abort");
    }
    panic!("no abort");
}

#[test]
fn g8_vmx_aborts_of_the_msr_areas() {
    // 1: saving guest MSRs; 4: loading host MSRs.
    for (count, address, indicator) in [
        (Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress, 1),
        (Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress, 4),
    ] {
        let mut v = with_guest();
        code(&v, &[0xf4]);
        // No such MSR.
        poke64(&v, AREA, 0x1234_5678);
        set(&mut v, count, 1);
        set(&mut v, address, AREA);
        assert_eq!(abort_of(&mut v), indicator);
    }
}

#[test]
fn g8_c3_vmx_abort_of_the_host_pdptes() {
    let mut v = super::paging::pae_host();
    code(&v, &[0xf4]);
    // After the entry, which checks none of it, L1's table is damaged: a reserved bit in a present entry.
    poke64(&v, super::paging::HOST_PDPT + 24, 0x3001 | 1 << 1);
    assert_eq!(abort_of(&mut v), 2);
    // An entry that fails late exits likewise, and aborts likewise.
    let mut v = super::paging::pae_host();
    poke64(&v, super::paging::HOST_PDPT + 24, 0x3001 | 1 << 1);
    set(&mut v, Field::GuestRflags, 0);
    super::super::instructions::vmx(&mut v, word::VMLAUNCH, 0, 0, NEXT).unwrap();
    assert!(v.vmx.aborted);
    assert_eq!(dispatch::step(&mut v), Err(Shutdown::TripleFault));
    assert_eq!(peek64(&v, VMCS + VMCS_ABORT_OFFSET) & 0xffff_ffff, 2);
}
