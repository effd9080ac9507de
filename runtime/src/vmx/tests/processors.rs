//! B1, B2, E6: L1 with two processors that run the same L2: changes of its tables and of EPT reach a processor by an
//! invalidation made there. B3: what is translated ahead of execution leaves no trace.

use twofold_arch::vmx::{invept, invvpid};
use twofold_mmu::{FlushPolicy, Mmu};

use super::*;
use crate::config::Tier;
use crate::cpu::ColdState;
use crate::exec::Jit;
use crate::platform::{LAPIC_BASE, Platform, Setup};
use crate::trace::Trace;
use crate::vcpu::Shared;

/// EPT's page table for the second 2 MiB, the guest-physical page there, and the frames it moves between.
const TABLE: u64 = EPT + 0x3000;
const PAGE: u64 = 0x20_0000;
const FRAMES: [u64; 2] = [0x30_0000, 0x30_1000];
/// L2's own table for the linear page at 1 GiB, and the second processor's regions.
const L2_PDPT: u64 = 0x2000;
const L2_TABLE: u64 = 0x13_2000;
const LINEAR: u64 = 0x4000_0000;
const SECOND_VMXON: u64 = 0x13_4000;
const SECOND_VMCS: u64 = 0x13_5000;
const VPID: u64 = 5;

/// Two processors of one machine in VMX operation, with the same guest under the same EPT and VPID.
fn two() -> [Box<Vcpu>; 2] {
    let mut first = with_guest();
    let clock = first.shared.clock.clone();
    let platform = Platform::new(Setup::quiet(2, crate::cpu::tests::RAM, clock.clone()));
    let shared = std::sync::Arc::new(Shared::new(first.shared.map.clone(), platform, clock));
    first.shared = shared.clone();
    let mmu = Mmu::new(shared.map.clone(), first.mmu.code().clone(), FlushPolicy::Tagged).unwrap();
    let model = first.model.clone();
    let mut second = Vcpu::new(1, shared, model, mmu, Jit::new(Tier::Eval, Default::default()));
    second.cold = ColdState::new(2);
    second.trace = Trace::new(Box::new(std::io::sink()));
    crate::cpu::reset(&mut second);
    // Where the first one stands.
    let theirs = (first.state.cr0, first.state.cr3, first.state.cr4, first.state.efer);
    (second.state.cr0, second.state.cr3, second.state.cr4, second.state.efer) = theirs;
    (second.state.seg, second.state.gdtr, second.state.idtr) = (first.state.seg, first.state.gdtr, first.state.idtr);
    (second.state.rip, second.state.gpr) = (first.state.rip, first.state.gpr);
    crate::cpu::refresh_space(&mut second);
    let space = second.space;
    second.mmu.reset(&space).store(&mut second.state);
    for region in [SECOND_VMXON, SECOND_VMCS] {
        poke(&first, region, &REVISION.to_le_bytes());
    }
    assert_eq!(pointer(&mut second, word::VMXON, SECOND_VMXON), Result_::Succeed);
    assert_eq!(pointer(&mut second, word::VMCLEAR, SECOND_VMCS), Result_::Succeed);
    assert_eq!(pointer(&mut second, word::VMPTRLD, SECOND_VMCS), Result_::Succeed);

    let page = 7 | 6 << 3 | 1 << 7;
    poke64(&first, EPT, (EPT + 0x1000) | 7);
    poke64(&first, EPT + 0x1000, (EPT + 0x2000) | 7);
    poke64(&first, EPT + 0x2000, page);
    poke64(&first, EPT + 0x2008, TABLE | 7);
    for i in 0..512 {
        poke64(&first, TABLE + 8 * i, (PAGE + i * 0x1000) | 7 | 6 << 3);
    }
    poke64(&first, TABLE, FRAMES[0] | 7 | 6 << 3);
    poke64(&first, L2_PDPT + 8, (L2_TABLE + 0x1000) | 7);
    poke64(&first, L2_TABLE + 0x1000, L2_TABLE | 7);
    poke64(&first, L2_TABLE, PAGE | 7);
    // mov [rbx], rax; vmcall; jmp back
    code(&first, &[0x48, 0x89, 0x03, 0x0f, 0x01, 0xc1, 0xeb, 0xf8]);
    set_bits(&mut first, Field::Proc2Controls, proc2::EPT | proc2::VPID);
    set_bits(&mut first, Field::PinControls, pin::EXTERNAL_INTERRUPT_EXITING);
    set(&mut first, Field::Eptp, EPT | 6 | 3 << 3);
    set(&mut first, Field::Vpid, VPID);
    for field in Field::ALL {
        let value = get(&first, field);
        second.vmx.vmcs.set(field, value);
    }
    [first, second]
}

/// L2 stores `value` at `LINEAR`.
fn store(v: &mut Vcpu, value: u64) {
    (v.state.gpr[0], v.state.gpr[3]) = (value, LINEAR);
    set(v, Field::GuestRip, CODE);
    assert_eq!(go(v), ExitReason::Vmcall);
}

fn invalidate(v: &mut Vcpu, which: u64, kind: u64, descriptor: u64) {
    poke64(v, POINTER, descriptor);
    poke64(v, POINTER + 8, 0);
    v.state.gpr[15] = kind;
    super::super::instructions::vmx(v, which | word::MEMORY, POINTER, 15, NEXT).unwrap();
    assert_eq!(outcome(v), Result_::Succeed);
}

#[test]
fn b1_b2_e6_ept_shootdown_by_interrupt() {
    let [mut a, mut b] = two();
    let frames = |v: &Vcpu| FRAMES.map(|f| peek64(v, f));
    store(&mut a, 1);
    store(&mut b, 2);
    assert_eq!(frames(&a), [2, 0]);
    // The first one moves the page and invalidates its own translations.
    poke64(&a, TABLE, FRAMES[1] | 7 | 6 << 3);
    invalidate(&mut a, word::INVEPT, invept::SINGLE_CONTEXT, EPT | 6 | 3 << 3);
    store(&mut a, 3);
    assert_eq!(frames(&a), [2, 3]);
    // The other one uses the old mapping as a whole, still.
    store(&mut b, 4);
    assert_eq!(frames(&a), [4, 3]);
    // Until the interrupt that the first one sends has L1 leave its guest there and invalidate, too.
    a.with_devices(|p| {
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0xf0), 4, 0x1ff);
        p.mmio_write(1, PhysAddr(LAPIC_BASE + 0xf0), 4, 0x1ff);
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x310), 4, 1 << 24);
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x300), 4, 0x4050);
    });
    assert_eq!(go(&mut b), ExitReason::ExternalInterrupt);
    b.platform().acknowledge(1);
    invalidate(&mut b, word::INVEPT, invept::SINGLE_CONTEXT, EPT | 6 | 3 << 3);
    store(&mut b, 5);
    assert_eq!(frames(&a), [4, 5]);
    // The barrier is behind: the freed frame takes no more writes from anybody.
    poke64(&a, FRAMES[0], 0);
    for v in [&mut a, &mut b] {
        store(v, 6);
    }
    assert_eq!(frames(&a), [0, 6]);
}

#[test]
fn b1_e6_a_guest_that_moves_between_processors() {
    let [mut a, mut b] = two();
    let frames = |v: &Vcpu| FRAMES.map(|f| peek64(v, f));
    // The guest-physical page behind PAGE is the second frame.
    poke64(&a, TABLE + 8, FRAMES[1] | 7 | 6 << 3);
    store(&mut b, 1);
    // It goes to the other processor, and changes its own table there.
    store(&mut a, 2);
    poke64(&a, L2_TABLE, (PAGE + 0x1000) | 7);
    invalidate(&mut a, word::INVVPID, invvpid::SINGLE_CONTEXT, VPID);
    store(&mut a, 3);
    assert_eq!(frames(&a), [2, 3]);
    // And back: what the first processor cached for its VPID may be used until L1 drops it, as it does for a guest that moved.
    store(&mut b, 4);
    assert_eq!(frames(&a), [4, 3]);
    let walks = b.mmu.stats().ept_walks;
    invalidate(&mut b, word::INVVPID, invvpid::SINGLE_CONTEXT, VPID);
    store(&mut b, 5);
    assert_eq!(frames(&a), [4, 5]);
    assert!(b.mmu.stats().ept_walks <= walks + 1, "guest-physical mappings stay");
}

#[test]
fn b3_what_is_translated_ahead_leaves_no_trace() {
    let [mut v, _] = two();
    // The end of a 4 KiB page of code; behind it a page that is there, and one that is not.
    for (next, present) in [(1, true), (2, false)] {
        for i in 0..3 {
            let entry = if i == 2 && !present { 0 } else { (CODE + i * 0x1000) | 7 };
            poke64(&v, L2_TABLE + 8 * i, entry);
        }
        let last = LINEAR + next * 0x1000 - 9;
        // test eax, eax; jnz behind the page; cpuid; nop; jmp behind the page
        let bytes = [0x85, 0xc0, 0x75, 0x05, 0x0f, 0xa2, 0x90, 0xeb, 0x00];
        super::super::write_phys(&mut v, CODE + next * 0x1000 - 9, &bytes);
        set(&mut v, Field::GuestRip, last);
        invalidate(&mut v, word::INVVPID, invvpid::SINGLE_CONTEXT, VPID);
        v.state.gpr[0] = 0;
        for _ in 0..3 {
            set(&mut v, Field::GuestRip, last);
            v.state.gpr[0] = 0;
            assert_eq!(go(&mut v), ExitReason::Cpuid);
        }
        let [here, behind] = [next - 1, next].map(|i| peek64(&v, L2_TABLE + 8 * i) >> 5 & 1);
        assert_eq!((here, behind), (1, 0), "the page behind was not accessed");
    }
}

/// Two processors in HLT: the one that is sent an interrupt wakes, though no device and no timer ever would.
#[test]
fn halted_processors_wake_each_other() {
    let [mut a, mut b] = two();
    // The APICs' page: 1 GiB at 3 GiB as it is.
    poke64(&a, 0x2018, 0xc000_0087);
    for v in [&mut a, &mut b] {
        super::super::instructions::vmx(v, word::VMXOFF, 0, 0, NEXT).unwrap();
        let index = v.index;
        v.with_devices(|p| p.mmio_write(index, PhysAddr(LAPIC_BASE + 0xf0), 4, 0x1ff));
        let space = v.space;
        v.mmu.invlpg(&space, twofold_arch::LinearAddr(LAPIC_BASE));
    }
    let handler = crate::cpu::tests::HANDLERS + 0x500;
    // mov al, 7; out 0xf4, eax
    poke(&a, handler, &[0xb8, 7, 0, 0, 0, 0xe7, 0xf4]);
    // The first: sti; hlt; jmp back. The second: dword [rbx] = 0 (destination 0), dword [rbx-16] = 0x4050; sti; hlt; jmp back.
    poke(&a, CODE, &[0xfb, 0xf4, 0xeb, 0xfc]);
    let ipi = [0xc7, 0x03, 0, 0, 0, 0, 0xc7, 0x43, 0xf0, 0x50, 0x40, 0, 0, 0xfb, 0xf4, 0xeb, 0xfc];
    poke(&a, STACK, &ipi);
    (a.state.rip, b.state.rip) = (CODE, STACK);
    b.state.gpr[3] = LAPIC_BASE + 0x310;
    let mut both = [a, b];
    let (end, _) = crate::exec::turns::run(&mut both, &crate::config::Control::default());
    assert_eq!(end, crate::exec::RunEnd::Outcome(crate::platform::Outcome::DebugExit(7)));
}
