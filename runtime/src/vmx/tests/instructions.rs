//! G1: every VMX instruction's failures by number, and the order of its checks.

use twofold_arch::vmx::{Part, VmError};

use super::*;
use Result_::{Invalid, Succeed, Valid};

fn valid(e: VmError) -> Result_ {
    Valid(u64::from(e.number()))
}

fn ud(r: Result<u64, Trap>) {
    assert_eq!(r, Err(Trap::Exception(Exception::UD)));
}
fn gp(r: Result<u64, Trap>) {
    assert_eq!(r, Err(Trap::Exception(Exception::GP0)));
}

const ALL: [u64; 12] = [
    word::VMXOFF,
    word::VMCLEAR,
    word::VMPTRLD,
    word::VMPTRST,
    word::VMREAD,
    word::VMWRITE,
    word::VMLAUNCH,
    word::VMRESUME,
    word::VMCALL,
    word::INVEPT,
    word::INVVPID,
    word::VMFUNC,
];

#[test]
fn g1_outside_vmx_operation_everything_is_undefined() {
    let mut v = l1();
    for which in ALL {
        ud(run(&mut v, which, VMCS));
    }
    let mut v = long_mode();
    ud(run(&mut v, word::VMXON, VMXON));
}

#[test]
fn g1_wrong_modes_are_undefined_before_privilege() {
    let mut v = vmx_operation();
    v.state.cpl = 3;
    for which in ALL.into_iter().filter(|w| *w != word::VMFUNC) {
        gp(run(&mut v, which, VMCS));
    }
    // Compatibility mode.
    v.state.seg[1].attr &= !attr::L;
    for which in ALL {
        ud(run(&mut v, which, VMCS));
    }
    let mut v = vmx_operation();
    v.state.rflags_sys |= rflags::VM;
    for which in ALL {
        ud(run(&mut v, which, VMCS));
    }
}

#[test]
fn g1_vmxon() {
    let mut v = l1();
    v.state.cpl = 1;
    gp(run(&mut v, word::VMXON, VMXON));
    v.state.cpl = 0;
    v.state.cr0 &= !cr0::NE;
    gp(run(&mut v, word::VMXON, VMXON));
    v.state.cr0 |= cr0::NE;
    for bad in [VMXON + 8, 1 << 46, CODE] {
        assert_eq!(pointer(&mut v, word::VMXON, bad), Invalid, "{bad:#x}");
    }
    assert_eq!(pointer(&mut v, word::VMXON, VMXON), Succeed);
    // Again: without a current VMCS VMfailInvalid, with one error 15.
    assert_eq!(pointer(&mut v, word::VMXON, VMXON), Invalid);
    assert_eq!(pointer(&mut v, word::VMPTRLD, VMCS), Succeed);
    assert_eq!(pointer(&mut v, word::VMXON, VMXON), valid(VmError::VmxonInRoot));
    // CR0 and CR4 are fixed now.
    gp(cr::write_cr4(&mut v, cr4::PAE).map(|()| 0));
    gp(cr::write_cr0(&mut v, cr0::PE | cr0::PG).map(|()| 0));
    assert_eq!(plain(&mut v, word::VMXOFF), Succeed);
    ud(run(&mut v, word::VMXOFF, 0));
}

#[test]
fn g1_vmclear_vmptrld_vmptrst() {
    let mut v = vmx_operation();
    assert_eq!(pointer(&mut v, word::VMCLEAR, 0x123), valid(VmError::VmclearAddress));
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMXON), valid(VmError::VmclearVmxonPointer));
    assert_eq!(pointer(&mut v, word::VMPTRLD, 1 << 50), valid(VmError::VmptrldAddress));
    assert_eq!(pointer(&mut v, word::VMPTRLD, VMXON), valid(VmError::VmptrldVmxonPointer));
    assert_eq!(pointer(&mut v, word::VMPTRLD, CODE), valid(VmError::VmptrldRevision));
    assert_eq!(pointer(&mut v, word::VMPTRST, 0), Succeed);
    assert_eq!(peek64(&v, POINTER), VMCS);
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMCS), Succeed);
    assert_eq!(pointer(&mut v, word::VMPTRST, 0), Succeed);
    assert_eq!(peek64(&v, POINTER), u64::MAX);
    // Without a current VMCS errors have no number.
    assert_eq!(pointer(&mut v, word::VMCLEAR, 0x123), Invalid);
}

#[test]
fn g1_contents_follow_vmptrld() {
    let mut v = vmx_operation();
    set(&mut v, Field::GuestRip, 0x1234);
    v.vmx.vmcs.launched = true;
    assert_eq!(pointer(&mut v, word::VMPTRLD, OTHER), Succeed);
    assert_eq!(get(&v, Field::GuestRip), 0);
    assert!(!v.vmx.vmcs.launched);
    set(&mut v, Field::GuestRip, 0x5678);
    assert_eq!(pointer(&mut v, word::VMPTRLD, VMCS), Succeed);
    assert_eq!(get(&v, Field::GuestRip), 0x1234);
    assert!(v.vmx.vmcs.launched);
    // VMCLEAR of one that is not current makes it clear.
    assert_eq!(pointer(&mut v, word::VMPTRLD, OTHER), Succeed);
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMCS), Succeed);
    assert_eq!(pointer(&mut v, word::VMPTRLD, VMCS), Succeed);
    assert!(!v.vmx.vmcs.launched);
    assert_eq!(get(&v, Field::GuestRip), 0x1234);
}

/// VMREAD or VMWRITE between RAX and the field whose encoding is in RDX.
fn field(v: &mut Vcpu, which: u64, encoding: u64, value: u64) -> (Result_, u64) {
    (v.state.gpr[0], v.state.gpr[2]) = (value, encoding);
    crate::vmx::instructions::vmx(v, which, 0, 2, NEXT).unwrap();
    (outcome(v), v.state.gpr[0])
}

#[test]
fn g1_vmread_vmwrite() {
    let mut v = vmx_operation();
    let rip = u64::from(Field::GuestRip.encoding());
    assert_eq!(field(&mut v, word::VMWRITE, rip, 0x1122_3344_5566_7788).0, Succeed);
    assert_eq!(field(&mut v, word::VMREAD, rip, 0), (Succeed, 0x1122_3344_5566_7788));
    // The two halves of a 64-bit field.
    let offset = u64::from(Field::TscOffset.encoding());
    assert_eq!(field(&mut v, word::VMWRITE, offset, 0x1_0000_0002).0, Succeed);
    assert_eq!(field(&mut v, word::VMWRITE, offset | 1, 0x7).0, Succeed);
    assert_eq!(field(&mut v, word::VMREAD, offset, 0), (Succeed, 0x7_0000_0002));
    assert_eq!(field(&mut v, word::VMREAD, offset | 1, 0), (Succeed, 7));
    assert_eq!(v.vmx.vmcs.get(Field::TscOffset) >> 32, 7);
    let _ = Part::Full;
    // Fields are cut to their width.
    let selector = u64::from(Field::GuestCsSelector.encoding());
    assert_eq!(field(&mut v, word::VMWRITE, selector, 0x12_3456).0, Succeed);
    assert_eq!(field(&mut v, word::VMREAD, selector, 0), (Succeed, 0x3456));
    // What is no field leaves the destination.
    for bad in [0x7777, 1 << 32, rip | 1, 0x6c80] {
        assert_eq!(field(&mut v, word::VMREAD, bad, 5), (valid(VmError::UnsupportedField), 5), "{bad:#x}");
        assert_eq!(field(&mut v, word::VMWRITE, bad, 5).0, valid(VmError::UnsupportedField));
    }
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMCS), Succeed);
    assert_eq!(field(&mut v, word::VMREAD, rip, 5), (Invalid, 5));
    assert_eq!(field(&mut v, word::VMWRITE, rip, 5).0, Invalid);
}

#[test]
fn g1_launch_state() {
    let mut v = with_guest();
    assert_eq!(plain(&mut v, word::VMCALL), valid(VmError::VmcallInRoot));
    assert_eq!(plain(&mut v, word::VMRESUME), valid(VmError::VmresumeNotLaunched));
    assert_eq!(v.state.rip, NEXT);
    v.vmx.vmcs.launched = true;
    assert_eq!(plain(&mut v, word::VMLAUNCH), valid(VmError::VmlaunchNotClear));
    v.vmx.vmcs.launched = false;
    v.vmx.shadow = 2;
    assert_eq!(plain(&mut v, word::VMLAUNCH), valid(VmError::EntryBlockedByMovSs));
    v.vmx.shadow = 0;
    set(&mut v, Field::Cr3TargetCount, 5);
    assert_eq!(plain(&mut v, word::VMLAUNCH), valid(VmError::EntryControls));
    set(&mut v, Field::Cr3TargetCount, 0);
    set(&mut v, Field::HostRip, 1 << 60);
    assert_eq!(plain(&mut v, word::VMLAUNCH), valid(VmError::EntryHostState));
    assert!(!v.vmx.vmcs.launched);
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMCS), Succeed);
    assert_eq!(plain(&mut v, word::VMLAUNCH), Invalid);
}

#[test]
fn e1_e2_g1_invept_invvpid_operands() {
    let mut v = vmx_operation();
    let mut inv = |which: u64, kind: u64, low: u64, high: u64| {
        v.state.gpr[0] = kind;
        poke64(&v, POINTER, low);
        poke64(&v, POINTER + 8, high);
        crate::vmx::instructions::vmx(&mut v, which | word::MEMORY, POINTER, 0, NEXT).unwrap();
        outcome(&v)
    };
    let bad = valid(VmError::InvalidOperand);
    let eptp = EPT | 6 | 3 << 3;
    assert_eq!(inv(word::INVEPT, 1, eptp, 0), Succeed);
    assert_eq!(inv(word::INVEPT, 2, 0, 0), Succeed);
    assert_eq!(inv(word::INVEPT, 0, eptp, 0), bad);
    assert_eq!(inv(word::INVEPT, 3, eptp, 0), bad);
    assert_eq!(inv(word::INVEPT, 1, eptp, 1), bad);
    assert_eq!(inv(word::INVEPT, 1, eptp | 1 << 8, 0), bad);
    assert_eq!(inv(word::INVEPT, 1, EPT | 3 | 3 << 3, 0), bad);
    for kind in 0..4 {
        assert_eq!(inv(word::INVVPID, kind, 1, 0x1000), Succeed, "{kind}");
        assert_eq!(inv(word::INVVPID, kind, 1 | 1 << 16, 0x1000), bad);
        assert_eq!(inv(word::INVVPID, kind, 0, 0x1000), if kind == 2 { Succeed } else { bad });
    }
    assert_eq!(inv(word::INVVPID, 0, 1, 1 << 60), bad);
    assert_eq!(inv(word::INVVPID, 1, 1, 1 << 60), Succeed);
    assert_eq!(inv(word::INVVPID, 4, 1, 0), bad);
}

#[test]
fn g1_g4_in_non_root_operation_they_exit() {
    for (bytes, reason) in [
        (&[0x0f, 0x01, 0xc1][..], ExitReason::Vmcall),
        (&[0x0f, 0x01, 0xc2], ExitReason::Vmlaunch),
        (&[0x0f, 0x01, 0xc3], ExitReason::Vmresume),
        (&[0x0f, 0x01, 0xc4], ExitReason::Vmxoff),
        (&[0x66, 0x0f, 0xc7, 0x30], ExitReason::Vmclear),
        (&[0xf3, 0x0f, 0xc7, 0x30], ExitReason::Vmxon),
        (&[0x0f, 0xc7, 0x30], ExitReason::Vmptrld),
        (&[0x0f, 0xc7, 0x38], ExitReason::Vmptrst),
        (&[0x0f, 0x78, 0xd0], ExitReason::Vmread),
        (&[0x0f, 0x79, 0xd0], ExitReason::Vmwrite),
        (&[0x66, 0x0f, 0x38, 0x80, 0x00], ExitReason::Invept),
        (&[0x66, 0x0f, 0x38, 0x81, 0x00], ExitReason::Invvpid),
    ] {
        let mut v = with_guest();
        code(&v, bytes);
        assert_eq!(go(&mut v), reason);
        assert_eq!(get(&v, Field::ExitInstructionLength), bytes.len() as u64, "{reason:?}");
        assert_eq!((get(&v, Field::GuestRip), v.state.rip), (CODE, HANDLER));
    }
}
