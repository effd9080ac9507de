//! SMIs in VMX operation: the default treatment (SDM Vol 3C, "Default Treatment of SMIs and SMM with VMX Operation and SMX
//! Operation").

use super::*;
use crate::cpu::smm;
use crate::cpu::tests::smm::{NMI, SMI, send, smi};
use twofold_arch::vmx::event::activity;

const SMBASE: u64 = 0x3_0000;

#[test]
fn g8_an_smi_leaves_vmx_operation_and_rsm_returns_to_it() {
    let mut v = with_guest();
    set_bits(&mut v, Field::Proc2Controls, proc2::EPT);
    poke64(&v, EPT, (EPT + 0x1000) | 7);
    poke64(&v, EPT + 0x1000, 7 | 6 << 3 | 1 << 7);
    set(&mut v, Field::Eptp, EPT | 6 | 3 << 3);
    // inc rax; cpuid
    code(&v, &[0x48, 0xff, 0xc0, 0x0f, 0xa2]);
    enter(&mut v);
    let (cr4, space) = (v.state.cr4, v.space);
    smi(&mut v);
    assert!(v.vmx.vmxon.is_none() && !v.vmx.non_root && v.space.eptp.is_none());
    assert_eq!(v.state.cr4, 0);
    assert_eq!(peek64(&v, SMBASE + 0xfe40), cr4 & !cr4::VMXE);
    assert_eq!(peek64(&v, SMBASE + 0xfee0) & 1, 1);
    assert_eq!(peek64(&v, SMBASE + 0xfed8), EPT | 6 | 3 << 3);
    assert_eq!(peek64(&v, SMBASE + 0xffd8), CODE);
    // CR4.VMXE is reserved in SMM, so there is no VMX operation in it.
    assert_eq!(cr::write_cr4(&mut v, cr4::VMXE), Err(Trap::Exception(Exception::GP0)));
    assert_eq!(run(&mut v, word::VMXON, VMXON), Err(Trap::Exception(Exception::UD)));
    smm::rsm(&mut v).unwrap();
    assert!(v.vmx.non_root && v.vmx.vmxon.is_some());
    assert_eq!((v.state.cr4, v.space.eptp, v.space.mode), (cr4, space.eptp, space.mode));
    assert_eq!(run_to_exit(&mut v), ExitReason::Cpuid);
    assert_eq!(get(&v, Field::GuestRip), CODE + 3);
}

#[test]
fn g8_an_smi_in_root_operation() {
    let mut v = with_guest();
    let cr4 = v.state.cr4;
    smi(&mut v);
    assert_eq!(peek64(&v, SMBASE + 0xfee0) & 1, 0);
    assert_eq!(plain_trap(&mut v, word::VMXOFF), Trap::Exception(Exception::UD));
    smm::rsm(&mut v).unwrap();
    assert_eq!((v.state.cr4, v.vmx.vmxon, v.vmx.current), (cr4, Some(PhysAddr(VMXON)), Some(PhysAddr(VMCS))));
    code(&v, &[0x0f, 0xa2]);
    assert_eq!(go(&mut v), ExitReason::Cpuid);
}

fn plain_trap(v: &mut Vcpu, which: u64) -> Trap {
    super::super::instructions::vmx(v, which, 0, 0, NEXT).unwrap_err()
}

/// RSM with CR4.VMXE in the image shuts down.
#[test]
fn g8_rsm_refuses_vmxe() {
    let mut v = with_guest();
    smi(&mut v);
    let image = peek64(&v, SMBASE + 0xfe40);
    poke64(&v, SMBASE + 0xfe40, image | cr4::VMXE);
    smm::rsm(&mut v).unwrap();
    assert!(dispatch::step(&mut v).is_err());
}

/// A guest that waits in HLT takes the SMI and waits again; one that waits for a SIPI does not take it. An MTF VM exit that
/// was pending is pending after RSM, and virtual-NMI blocking is kept.
#[test]
fn g8_activity_and_what_was_pending() {
    let mut v = with_guest();
    poke(&v, SMBASE + 0x8000, &[0x0f, 0xaa]);
    code(&v, &[0x0f, 0xa2]);
    set_bits(&mut v, Field::PinControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    set(&mut v, Field::GuestActivity, u64::from(activity::HLT));
    set(&mut v, Field::GuestInterruptibility, 8);
    enter(&mut v);
    smi(&mut v);
    assert_eq!(peek64(&v, SMBASE + 0xff02) & 0xffff, 1);
    smm::rsm(&mut v).unwrap();
    assert!(v.vmx.virtual_nmi_blocked && v.state.halted != 0);
    send(&mut v, NMI);
    assert_eq!(run_to_exit(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::GuestActivity), u64::from(activity::HLT));
    assert_eq!(get(&v, Field::GuestInterruptibility), 8);
    // That exit has NMIs blocked.
    v.state.nmi_blocked = 0;

    set(&mut v, Field::GuestActivity, 0);
    enter(&mut v);
    v.vmx.mtf_pending = true;
    smi(&mut v);
    smm::rsm(&mut v).unwrap();
    assert_eq!(run_to_exit(&mut v), ExitReason::MonitorTrapFlag);

    set(&mut v, Field::GuestActivity, u64::from(activity::WAIT_FOR_SIPI));
    set(&mut v, Field::GuestInterruptibility, 0);
    enter(&mut v);
    send(&mut v, SMI);
    for _ in 0..3 {
        dispatch::step(&mut v).unwrap();
    }
    assert!(v.vmx.non_root && !v.smm.is_active());
    send(&mut v, 0x4608);
    dispatch::step(&mut v).unwrap();
    assert_eq!(get(&v, Field::ExitReason), u64::from(ExitReason::Sipi.number()));
}

/// The event that VM entry injects comes before an SMI.
#[test]
fn g8_injection_comes_first() {
    let mut v = with_guest();
    set(&mut v, Field::EntryInterruptionInfo, u64::from(InterruptionInfo::VALID) | 3 << 8 | 6);
    enter(&mut v);
    smi(&mut v);
    assert_eq!(peek64(&v, SMBASE + 0xffd8), crate::cpu::tests::HANDLERS + 0x60);
}
