//! Deliveries and returns in IA-32e mode (SDM Vol 3A, "Exception and Interrupt Handling in 64-bit Mode"; Vol 2, IRET,
//! SYSCALL, SYSRET, INT n).

use twofold_arch::control::rflags;
use twofold_arch::segment::attr;

use super::*;
use crate::cpu::interrupt::{self, Event, deliver, soft_int};
use crate::cpu::{is_64bit, msr};
use crate::vcpu::Shutdown;

fn handler(vector: u64) -> u64 {
    HANDLERS + 16 * vector
}

#[test]
fn harness_is_in_64_bit_mode() {
    let v = long_mode();
    assert!(is_64bit(&v.state));
    assert_eq!((v.state.cpl, v.state.rip), (0, 0x5000));
    // LTR marked the TSS busy in memory.
    assert_eq!(peek(&v, GDT + u64::from(TSS_SEL) + 5, 1), 0x8b);
}

#[test]
fn page_fault_from_user_switches_to_rsp0() {
    let mut v = long_mode();
    to_user(&mut v, 0x6000, rflags::IF | 2 | rflags::CF);
    let e = Exception::page_fault(6, 0xdead_0000);
    deliver(&mut v, Event::Exception(e)).unwrap();
    assert_eq!(v.state.rip, handler(14));
    assert_eq!((v.state.cpl, v.state.cr2), (0, 0xdead_0000));
    assert_eq!(v.state.seg[1].selector, KERNEL_CS);
    // SS is null with RPL = new CPL.
    assert_eq!((v.state.seg[2].selector, v.state.seg[2].attr & attr::UNUSABLE != 0), (0, true));
    let sp = v.state.gpr[4];
    assert_eq!(sp, RSP0 - 48);
    let frame: Vec<u64> = (0..6).map(|i| peek64(&v, sp + 8 * i)).collect();
    let flags = rflags::IF | rflags::RF | rflags::CF | 2;
    assert_eq!(frame, [6, 0x6000, USER_CS.into(), flags, USER_RSP, USER_DS.into()]);
    // An interrupt gate clears IF; TF, NT, RF are clear.
    assert_eq!(v.state.rflags_sys & (rflags::IF | rflags::TF | rflags::NT | rflags::RF), 0);
    assert_eq!(v.counters.exceptions[14], 1);
}

#[test]
fn interrupt_at_cpl_0_aligns_the_stack_and_keeps_ss() {
    let mut v = long_mode();
    v.state.set_rflags(rflags::IF);
    deliver(&mut v, Event::Interrupt(0x40)).unwrap();
    // RSP was 8 past a 16-byte boundary; it is aligned down before the pushes.
    let sp = v.state.gpr[4];
    assert_eq!(sp, 0x1_f000 - 40);
    let frame: Vec<u64> = (0..5).map(|i| peek64(&v, sp + 8 * i)).collect();
    assert_eq!(frame, [0x5000, KERNEL_CS.into(), rflags::IF | 2, 0x1_f008, KERNEL_DS.into()]);
    assert_eq!(v.state.seg[2].selector, KERNEL_DS);
    assert_eq!(v.state.rflags_sys & rflags::IF, 0);
    // And back.
    far::iret(&mut v, 3, 0).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4]), (0x5000, 0x1_f008));
    assert_ne!(v.state.rflags_sys & rflags::IF, 0);
}

#[test]
fn trap_gate_keeps_if_and_ist_switches_at_cpl_0() {
    let mut v = long_mode();
    v.state.set_rflags(rflags::IF);
    long_gate(&v, 3, KERNEL_CS, handler(3), 0xef, 1);
    soft_int(&mut v, 3, 0x5001, 1).unwrap();
    assert_eq!(v.state.gpr[4], IST1 - 40);
    assert_ne!(v.state.rflags_sys & rflags::IF, 0);
    // The frame returns after INT3, and its flags have no RF.
    assert_eq!(peek64(&v, IST1 - 40), 0x5001);
    assert_eq!(peek64(&v, IST1 - 24) & rflags::RF, 0);
}

#[test]
fn software_interrupt_checks_the_gates_dpl() {
    let mut v = long_mode();
    long_gate(&v, 0x80, KERNEL_CS, handler(0x80), 0xee, 0);
    to_user(&mut v, 0x6000, 2);
    let before = (v.state.rip, v.state.gpr);
    assert_gp(soft_int(&mut v, 0x81, 0x6002, 0), 0x81 * 8 + 2);
    assert_eq!((v.state.rip, v.state.gpr), before);
    soft_int(&mut v, 0x80, 0x6002, 0).unwrap();
    assert_eq!(v.state.rip, handler(0x80));
    assert_eq!(peek64(&v, v.state.gpr[4]), 0x6002);
    assert_eq!(v.counters.soft_interrupts, 1);
}

#[test]
fn an_external_interrupt_through_a_bad_gate_sets_ext() {
    let mut v = long_mode();
    long_gate(&v, 0x21, KERNEL_CS, handler(0x21), 0x0e, 0);
    deliver(&mut v, Event::Interrupt(0x21)).unwrap();
    assert_eq!(v.state.rip, handler(11));
    assert_eq!(peek64(&v, v.state.gpr[4]), 0x21 * 8 + 2 + 1);
    // Beyond the limit of the IDT: #GP.
    let mut v = long_mode();
    v.state.idtr.limit = 16 * 0x20 - 1;
    deliver(&mut v, Event::Interrupt(0x21)).unwrap();
    assert_eq!(v.state.rip, handler(13));
    assert_eq!(peek64(&v, v.state.gpr[4]), 0x21 * 8 + 2 + 1);
}

#[test]
fn contributory_faults_double_and_then_shut_down() {
    let mut v = long_mode();
    long_gate(&v, 13, KERNEL_CS, handler(13), 0x0e, 0);
    deliver(&mut v, Event::Exception(Exception::GP0)).unwrap();
    assert_eq!(v.state.rip, handler(8));
    assert_eq!(peek64(&v, v.state.gpr[4]), 0);
    assert_eq!(v.counters.exceptions[8], 1);

    // #PF, then #NP during its delivery: #DF.
    let mut v = long_mode();
    long_gate(&v, 14, KERNEL_CS, handler(14), 0x0e, 0);
    deliver(&mut v, Event::Exception(Exception::page_fault(0, 1))).unwrap();
    assert_eq!(v.state.rip, handler(8));

    // A benign first exception: serial, not double.
    let mut v = long_mode();
    long_gate(&v, 6, KERNEL_CS, handler(6), 0x0e, 0);
    deliver(&mut v, Event::Exception(Exception::UD)).unwrap();
    assert_eq!(v.state.rip, handler(11));

    let mut v = long_mode();
    v.state.idtr.limit = 0;
    assert_eq!(deliver(&mut v, Event::Exception(Exception::UD)), Err(Shutdown::TripleFault));
}

#[test]
fn a_page_fault_on_the_inner_stack_is_a_page_fault_with_its_address() {
    let mut v = long_mode();
    poke64(&v, TSS + 4, 0x80_0000);
    poke64(&v, TSS + 0x24, IST1);
    long_gate(&v, 14, KERNEL_CS, handler(14), 0x8e, 1);
    to_user(&mut v, 0x6000, 2);
    deliver(&mut v, Event::Interrupt(0x40)).unwrap();
    assert_eq!(v.state.rip, handler(14));
    assert_eq!(v.state.cr2, 0x80_0000 - 8);
    // Supervisor write to a page that is not present, with the interrupted program in the frame.
    assert_eq!(peek64(&v, v.state.gpr[4]), 2);
    assert_eq!(peek64(&v, v.state.gpr[4] + 8), 0x6000);
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut v = long_mode();
    deliver(&mut v, Event::Nmi).unwrap();
    assert_eq!((v.state.rip, v.state.nmi_blocked), (handler(2), 1));
    far::iret(&mut v, 3, 0).unwrap();
    assert_eq!(v.state.nmi_blocked, 0);
}

#[test]
fn single_step_sets_bs_and_clears_tf_in_the_handler() {
    let mut v = long_mode();
    v.state.set_rflags(rflags::TF | rflags::IF);
    interrupt::single_step(&mut v).unwrap();
    assert_eq!(v.state.rip, handler(1));
    assert_ne!(v.state.dr[6] & interrupt::dr6::BS, 0);
    assert_eq!(v.state.rflags_sys & rflags::TF, 0);
    let image = peek64(&v, v.state.gpr[4] + 16);
    assert_eq!(image & (rflags::TF | rflags::RF), rflags::TF);
}

#[test]
fn iret_checks_before_it_changes_anything() {
    let frame = |v: &Vcpu, words: [u64; 5]| {
        for (i, w) in words.into_iter().enumerate() {
            poke64(v, 0x1_e000 + 8 * i as u64, w);
        }
    };
    let cases: [([u64; 5], Exception); 6] = [
        // RIP not canonical.
        ([1 << 60, USER_CS.into(), 2, USER_RSP, USER_DS.into()], Exception::GP0),
        // Null CS; CS a data segment; CS with an RPL below the CPL's is impossible here; beyond the limit.
        ([0, 0, 2, USER_RSP, USER_DS.into()], Exception::GP0),
        ([0, KERNEL_DS.into(), 2, USER_RSP, USER_DS.into()], Exception::gp(KERNEL_DS.into())),
        ([0, 0x1003, 2, USER_RSP, USER_DS.into()], Exception::gp(0x1000)),
        // Null SS for CPL 3; SS with another DPL.
        ([0, USER_CS.into(), 2, USER_RSP, 3], Exception::GP0),
        ([0, USER_CS.into(), 2, USER_RSP, (KERNEL_DS | 3).into()], Exception::gp(KERNEL_DS.into())),
    ];
    for (words, expected) in cases {
        let mut v = long_mode();
        v.state.gpr[4] = 0x1_e000;
        frame(&v, words);
        let before = (v.state.rip, v.state.gpr, v.state.seg, v.state.cpl, v.state.rflags());
        assert_eq!(exception(far::iret(&mut v, 3, 0)), expected, "{words:x?}");
        assert_eq!((v.state.rip, v.state.gpr, v.state.seg, v.state.cpl, v.state.rflags()), before);
    }
}

#[test]
fn iret_in_ring_3_keeps_iopl_and_if() {
    let mut v = long_mode();
    to_user(&mut v, 0x6000, 2 | rflags::IF);
    let words = [0x6100, USER_CS.into(), rflags::IOPL | rflags::AC | rflags::ZF, USER_RSP, USER_DS.into()];
    for (i, w) in words.into_iter().enumerate() {
        poke64(&v, 0x2_3000 + 8 * i as u64, w);
    }
    v.state.gpr[4] = 0x2_3000;
    far::iret(&mut v, 3, 0).unwrap();
    assert_eq!(v.state.rip, 0x6100);
    assert_eq!(v.state.rflags(), rflags::IF | rflags::AC | rflags::ZF | 2);
}

#[test]
fn iret_to_32_bit_user_drops_kernel_data_segments() {
    let mut v = long_mode();
    for (i, x) in [0x6000, USER_CS32.into(), 2, 0xffff_f000, USER_DS.into()].into_iter().enumerate() {
        poke64(&v, 0x1_e000 + 8 * i as u64, x);
    }
    v.state.gpr[4] = 0x1_e000;
    far::iret(&mut v, 3, 0).unwrap();
    assert!(!is_64bit(&v.state));
    assert_eq!(v.state.gpr[4], 0xffff_f000);
    for i in [0, 3, 4, 5] {
        assert_eq!((v.state.seg[i].selector, v.state.seg[i].attr), (0, attr::UNUSABLE));
    }
}

#[test]
fn syscall_and_sysret_round_trip() {
    let mut v = long_mode();
    msr::write(&mut v, twofold_arch::msr::STAR, 0x0023_0010 << 32).unwrap();
    msr::write(&mut v, twofold_arch::msr::LSTAR, 0xffff_8000_0000_1000).unwrap();
    msr::write(&mut v, twofold_arch::msr::FMASK, rflags::IF | rflags::TF | rflags::DF).unwrap();
    to_user(&mut v, 0x6000, rflags::IF | rflags::CF | 2);
    far::syscall(&mut v, 0x6002).unwrap();
    assert_eq!((v.state.rip, v.state.cpl), (0xffff_8000_0000_1000, 0));
    assert_eq!((v.state.gpr[1], v.state.gpr[11]), (0x6002, rflags::IF | rflags::CF | 2));
    assert_eq!((v.state.seg[1].selector, v.state.seg[2].selector), (0x10, 0x18));
    assert_eq!(v.state.rflags(), rflags::CF | 2);
    assert!(is_64bit(&v.state));
    far::sysret(&mut v, 3).unwrap();
    assert_eq!((v.state.rip, v.state.cpl), (0x6002, 3));
    assert_eq!((v.state.seg[1].selector, v.state.seg[2].selector), (0x33, 0x2b));
    assert_eq!(v.state.rflags(), rflags::IF | rflags::CF | 2);
    // At CPL 3, and without EFER.SCE.
    assert_gp(far::sysret(&mut v, 3), 0);
    v.state.efer &= !efer::SCE;
    assert_eq!(exception(far::syscall(&mut v, 0)), Exception::UD);
}

#[test]
fn sysret_to_a_non_canonical_address_faults_in_ring_0() {
    let mut v = long_mode();
    v.state.gpr[1] = 1 << 47;
    assert_gp(far::sysret(&mut v, 3), 0);
    assert_eq!(v.state.cpl, 0);
}

#[test]
fn sysenter_and_sysexit() {
    let mut v = long_mode();
    assert_gp(far::sysenter(&mut v), 0);
    v.state.msrs.sysenter_cs = 0x10;
    v.state.msrs.sysenter_esp = RSP0;
    v.state.msrs.sysenter_eip = 0x7000;
    to_user(&mut v, 0x6000, rflags::IF);
    far::sysenter(&mut v).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4], v.state.cpl), (0x7000, RSP0, 0));
    assert_eq!(v.state.rflags_sys & rflags::IF, 0);
    (v.state.gpr[1], v.state.gpr[2]) = (USER_RSP, 0x6010);
    far::sysexit(&mut v, 3).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4], v.state.cpl), (0x6010, USER_RSP, 3));
    assert_eq!((v.state.seg[1].selector, v.state.seg[2].selector), (0x33, 0x3b));
}

/// Whatever is in the tables, a delivery ends and nothing panics.
#[test]
fn deliveries_through_garbage_end() {
    let mut v = long_mode();
    let mut x = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for round in 0..3000 {
        for i in 0..64 {
            poke64(&v, IDT + 8 * i, next());
        }
        for i in 0..9 {
            poke64(&v, GDT + 8 * i, next());
        }
        v.state.rip = next();
        v.state.gpr[4] = if round & 1 == 0 { RSP0 } else { next() };
        let event = match round % 4 {
            0 => Event::Interrupt(next() as u8),
            1 => Event::Nmi,
            2 => Event::Exception(Exception::page_fault(0, next())),
            _ => Event::Exception(Exception::GP0),
        };
        let _ = deliver(&mut v, event);
        let _ = far::iret(&mut v, 1 + next() % 3, 0);
        let _ = far::far_call(&mut v, next() as u16, next(), 2, 0);
        let _ = far::far_ret(&mut v, 2, next() & 0xffff);
    }
}

/// A handler that faults at once never retires an instruction, and yet its processor's turn ends.
#[test]
fn an_endless_fault_ends_its_turn() {
    let mut v = long_mode();
    // Every #UD is delivered on the same stack, to UD2.
    long_gate(&v, 6, KERNEL_CS, HANDLERS + 16 * 6, 0x8e, 1);
    poke(&v, HANDLERS + 16 * 6, &[0x0f, 0x0b]);
    v.state.rip = HANDLERS + 16 * 6;
    v.in_turn = true;
    let retired = v.state.retired;
    let end = crate::exec::run(&mut v, &crate::config::Control::default());
    assert_eq!(end, crate::exec::RunEnd::TurnOver);
    assert_eq!(v.state.retired, retired);
    assert_eq!(v.state.rip, HANDLERS + 16 * 6);
}
