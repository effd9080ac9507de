//! G6: TPR shadow, the APIC-access page, APIC-register virtualization, x2APIC mode, virtual interrupts, posted interrupts.

use super::*;
use crate::cpu::tests::HANDLERS;

/// The APIC-access page and the virtual-APIC page.
const ACCESS: u64 = 0x12_0000;
const PAGE: u64 = 0x12_1000;
const DESCRIPTOR: u64 = 0x12_2000;

/// A guest with a TPR shadow and these secondary controls.
fn guest(controls: u32) -> Box<Vcpu> {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::TPR_SHADOW);
    set_bits(&mut v, Field::Proc2Controls, controls);
    set(&mut v, Field::VirtualApicAddress, PAGE);
    set(&mut v, Field::ApicAccessAddress, ACCESS);
    for n in 0..256 {
        poke(&v, HANDLERS + 16 * n, &[0xf4]);
    }
    v
}

/// With virtual-interrupt delivery, which needs external-interrupt exiting.
fn delivering(controls: u32) -> Box<Vcpu> {
    let mut v = guest(controls | proc2::VIRTUAL_INTERRUPT_DELIVERY);
    set_bits(&mut v, Field::PinControls, pin::EXTERNAL_INTERRUPT_EXITING);
    v
}

fn register(v: &Vcpu, offset: u64) -> u64 {
    peek64(v, PAGE + offset) & 0xffff_ffff
}

#[test]
fn g6_cr8_goes_to_the_tpr_shadow() {
    let mut v = guest(0);
    // mov cr8, rax; mov rbx, cr8; hlt
    code(&v, &[0x44, 0x0f, 0x22, 0xc0, 0x44, 0x0f, 0x20, 0xc3, 0xf4]);
    v.state.gpr[0] = 9;
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!((v.state.gpr[3], register(&v, 0x80)), (9, 0x90));
    assert_eq!(v.platform().cr8(0), 0);
    // Below the threshold: an exit after the instruction.
    set(&mut v, Field::TprThreshold, 8);
    set(&mut v, Field::GuestRip, CODE);
    v.state.gpr[0] = 7;
    assert_eq!(go(&mut v), ExitReason::TprBelowThreshold);
    assert_eq!((get(&v, Field::GuestRip), register(&v, 0x80)), (CODE + 4, 0x70));
}

#[test]
fn g6_apic_access_page() {
    let mut v = guest(proc2::APIC_ACCESSES);
    poke64(&v, PAGE + 0x80, 0x55);
    poke64(&v, PAGE + 0x20, 0x66);
    v.state.gpr[3] = ACCESS;
    // mov eax, [rbx+0x80]; mov ecx, [rbx+0x20]
    code(&v, &[0x8b, 0x83, 0x80, 0, 0, 0, 0x8b, 0x4b, 0x20, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!(v.state.gpr[0], 0x55);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x20, CODE + 6));
    assert_eq!(get(&v, Field::ExitInstructionLength), 3);
    // With APIC-register virtualization that one is virtual, too; the reserved registers are not.
    set_bits(&mut v, Field::Proc2Controls, proc2::APIC_REGISTERS);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(v.state.gpr[1], 0x66);
    // L1 reads its page as memory.
    assert_eq!(peek64(&v, ACCESS + 0x80), 0);
}

#[test]
fn g6_apic_writes() {
    let mut v = guest(proc2::APIC_ACCESSES | proc2::APIC_REGISTERS);
    v.state.gpr[3] = ACCESS;
    v.state.gpr[0] = 0x1234_5678;
    // mov [rbx+0x310], eax; mov [rbx+0x320], eax; nop; hlt
    code(&v, &[0x89, 0x83, 0x10, 3, 0, 0, 0x89, 0x83, 0x20, 3, 0, 0, 0x90, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::ApicWrite);
    // Trap-like: the write is made, RIP is behind it.
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x320, CODE + 12));
    assert_eq!((register(&v, 0x310), register(&v, 0x320)), (0x1200_0000, 0x1234_5678));
    // Without the control a write exits before it is made.
    let mut v = guest(proc2::APIC_ACCESSES);
    v.state.gpr[3] = ACCESS;
    code(&v, &[0x89, 0x83, 0x20, 3, 0, 0]);
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x1320, CODE));
}

#[test]
fn g6_x2apic_mode() {
    let mut v = delivering(proc2::X2APIC_MODE | proc2::APIC_REGISTERS);
    set_bits(&mut v, Field::ProcControls, proc::MSR_BITMAPS);
    set(&mut v, Field::MsrBitmap, BITMAP);
    poke64(&v, PAGE + 0x20, 0x77);
    // mov ecx, 0x802; rdmsr; mov ebx, eax; mov ecx, 0x808; mov eax, 0x40; xor edx, edx; wrmsr; hlt
    code(
        &v,
        &[
            0xb9, 2, 8, 0, 0, 0x0f, 0x32, 0x89, 0xc3, 0xb9, 8, 8, 0, 0, 0xb8, 0x40, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x30,
            0xf4,
        ],
    );
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!((v.state.gpr[3], register(&v, 0x80), register(&v, 0xa0)), (0x77, 0x40, 0x40));
}

#[test]
fn g6_virtual_interrupts_by_priority_and_eoi() {
    let mut v = delivering(proc2::APIC_ACCESSES | proc2::APIC_REGISTERS);
    // 0x41 and 0x82 are requested.
    poke64(&v, PAGE + 0x200 + 0x20, 1 << 1);
    poke64(&v, PAGE + 0x200 + 0x40, 1 << 2);
    set(&mut v, Field::GuestInterruptStatus, 0x82);
    // sti; nop; nop; hlt
    code(&v, &[0xfb, 0x90, 0x90, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 0x82 * 16);
    assert_eq!(get(&v, Field::GuestInterruptStatus), 0x8241);
    assert_eq!((register(&v, 0x140), register(&v, 0xa0)), (1 << 2, 0x80));
    assert_eq!(peek64(&v, get(&v, Field::GuestRsp)), CODE + 2);
    // EOI: mov [rbx+0xb0], eax; sti; nop. The next one comes.
    code(&v, &[0x89, 0x83, 0xb0, 0, 0, 0, 0xfb, 0x90, 0xf4]);
    v.mmu.code().note_write(PhysAddr(CODE), 9);
    crate::exec::slow::drop_written(&mut v);
    v.state.gpr[3] = ACCESS;
    set(&mut v, Field::GuestRip, CODE);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 0x41 * 16);
    assert_eq!(get(&v, Field::GuestInterruptStatus), 0x4100);
    // The EOI-exit bitmap makes an EOI exit, after the instruction.
    set(&mut v, Field::EoiExitBitmap1, 1 << 1);
    set(&mut v, Field::GuestRip, CODE);
    assert_eq!(go(&mut v), ExitReason::VirtualizedEoi);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x41, CODE + 6));
    assert_eq!(get(&v, Field::GuestInterruptStatus), 0);
}

/// KVM with shadow paging: the exit said "blocking by STI", and the event could not be injected again.
#[test]
fn g6_an_interrupt_that_faults_is_not_in_the_shadow_of_the_sti_before() {
    let mut v = delivering(0);
    poke64(&v, PAGE + 0x200 + 0x40, 1 << 2);
    set(&mut v, Field::GuestInterruptStatus, 0x82);
    set(&mut v, Field::ExceptionBitmap, 1 << 14);
    // No stack to push to.
    set(&mut v, Field::GuestRsp, 1 << 40);
    // sti; nop; hlt
    code(&v, &[0xfb, 0x90, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!(get(&v, Field::IdtVectoringInfo), 0x8000_0082);
    assert_eq!((get(&v, Field::GuestRip), get(&v, Field::GuestInterruptibility)), (CODE + 2, 0));
}

#[test]
fn g6_self_ipi() {
    let mut v = delivering(proc2::APIC_ACCESSES);
    (v.state.gpr[3], v.state.gpr[0]) = (ACCESS, 1 << 18 | 0x51);
    set(&mut v, Field::GuestRflags, 0x202);
    // mov [rbx+0x300], eax; nop; hlt
    code(&v, &[0x89, 0x83, 0, 3, 0, 0, 0x90, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 0x51 * 16);
    assert_eq!(peek64(&v, get(&v, Field::GuestRsp)), CODE + 6);
    // To somebody else: an APIC-write exit.
    v.state.gpr[0] = 0x51;
    set(&mut v, Field::GuestRip, CODE);
    assert_eq!(go(&mut v), ExitReason::ApicWrite);
    assert_eq!(get(&v, Field::ExitQualification), 0x300);
}

#[test]
fn g6_posted_interrupts() {
    let mut v = delivering(0);
    set_bits(&mut v, Field::PinControls, pin::POSTED_INTERRUPTS);
    set_bits(&mut v, Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT);
    set(&mut v, Field::PostedInterruptVector, 0xf2);
    set(&mut v, Field::PostedInterruptDescriptor, DESCRIPTOR);
    poke64(&v, DESCRIPTOR, 1 << 0x33);
    poke64(&v, DESCRIPTOR + 32, 1);
    set(&mut v, Field::GuestRflags, 0x202);
    code(&v, &[0xeb, 0xfe]);
    enter(&mut v);
    assert!(super::super::apic::post(&mut v, 0xf2));
    assert!(!super::super::apic::post(&mut v, 0xf3));
    assert_eq!((peek64(&v, DESCRIPTOR), peek64(&v, DESCRIPTOR + 32)), (0, 0));
    assert_eq!(run_to_exit(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::GuestRip), HANDLERS + 0x33 * 16);
    assert_eq!(get(&v, Field::GuestInterruptStatus), 0x3300);
}

/// String instructions, the stack and the fetch meet the APIC-access page like any access.
#[test]
fn g6_apic_access_page_by_strings_stack_and_fetch() {
    let mut v = guest(proc2::APIC_ACCESSES);
    poke64(&v, PAGE + 0x80, 0x55);
    // movsd; rep movsd; hlt: TPR is virtual, what lies behind it in its 16 bytes is not.
    code(&v, &[0xa5, 0xf3, 0xa5, 0xf4]);
    (v.state.gpr[6], v.state.gpr[7], v.state.gpr[1]) = (ACCESS + 0x80, AREA, 2);
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!((peek64(&v, AREA), v.state.gpr[1]), (0x55, 2));
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x84, CODE + 1));
    assert_eq!(get(&v, Field::ExitInstructionLength), 2);
    // From the other side: the iteration before is done.
    (v.state.gpr[6], v.state.gpr[7]) = (AREA, ACCESS - 4);
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!((get(&v, Field::ExitQualification), v.state.gpr[1]), (1 << 12, 1));
    assert_eq!((get(&v, Field::GuestLinearAddress), v.state.gpr[7]), (ACCESS, ACCESS));
    // push rax; call; enter: wider than 32 bits. RSP is as before.
    for bytes in [&[0x50u8][..], &[0xe8, 0, 0, 0, 0], &[0xc8, 0, 0, 0], &[0x9c]] {
        let mut v = guest(proc2::APIC_ACCESSES);
        code(&v, bytes);
        set(&mut v, Field::GuestRsp, ACCESS + 0x88);
        assert_eq!(go(&mut v), ExitReason::ApicAccess, "{bytes:x?}");
        assert_eq!(get(&v, Field::ExitQualification), 0x80 | 1 << 12);
        assert_eq!(get(&v, Field::GuestRsp), ACCESS + 0x88);
    }
    // jmp rbx
    let mut v = guest(proc2::APIC_ACCESSES);
    code(&v, &[0xff, 0xe3]);
    v.state.gpr[3] = ACCESS + 0x30;
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (0x30 | 2 << 12, ACCESS + 0x30));
    // An interrupt delivered to such a stack.
    let mut v = guest(proc2::APIC_ACCESSES);
    code(&v, &[0xcd, 0x40]);
    set(&mut v, Field::GuestRsp, ACCESS + 0x80);
    assert_eq!(go(&mut v), ExitReason::ApicAccess);
    assert_eq!(get(&v, Field::ExitQualification), 0x78 | 3 << 12);
    assert_eq!(get(&v, Field::IdtVectoringInfo) & 0xff, 0x40);
}
