//! Real mode, 32-bit protected mode, virtual-8086 mode, call gates and task switches (SDM Vol 3A, "Interrupt and Exception
//! Handling", "Task Management"; Vol 3B, "8086 Emulation").

use twofold_arch::control::rflags;
use twofold_arch::segment::attr;

use super::*;
use crate::cpu::interrupt::{Event, deliver, soft_int};
use crate::cpu::segments::{load_seg, ltr, seg_addr};

const CS0: u16 = 0x08;
const DS0: u16 = 0x10;
const CS3: u16 = 0x1b;
const DS3: u16 = 0x23;
const TSS_A: u16 = 0x28;
const TSS_B: u16 = 0x30;
const GATE: u16 = 0x38;
const TASK_GATE: u16 = 0x40;
const TSS_B_AT: u64 = 0xc000;
const ESP0: u64 = 0x2_0000;

fn gate(v: &Vcpu, vector: u64, selector: u16, offset: u64, access: u64) {
    poke64(v, IDT + vector * 8, offset & 0xffff | u64::from(selector) << 16 | access << 40 | (offset >> 16) << 48);
}

/// Unpaged 32-bit protected mode at CPL 0.
fn protected() -> Box<Vcpu> {
    let mut v = vcpu();
    for (selector, d) in [
        (CS0, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
        (DS0, descriptor(0, 0xf_ffff, 0x93, 0xc)),
        (CS3 & !3, descriptor(0, 0xf_ffff, 0xfb, 0xc)),
        (DS3 & !3, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
        (TSS_A, descriptor(TSS, 0x200, 0x89, 0)),
        (TSS_B, descriptor(TSS_B_AT, 0x67, 0x89, 0)),
        // Call gate to CS0:0x7000 with two parameters, for everybody.
        (GATE, 0x7000 | u64::from(CS0) << 16 | 2 << 32 | 0xec << 40),
        (TASK_GATE, u64::from(TSS_B) << 16 | 0xe5 << 40),
    ] {
        poke64(&v, GDT + u64::from(selector), d);
    }
    for vector in 0..256 {
        gate(&v, vector, CS0, HANDLERS + 16 * vector, 0x8e);
    }
    poke(&v, TSS + 4, &(ESP0 as u32).to_le_bytes());
    poke(&v, TSS + 8, &u32::from(DS0).to_le_bytes());
    poke(&v, TSS + 102, &0x88u16.to_le_bytes());
    v.state.gdtr = twofold_arch::state::Table { base: GDT, limit: 0x47 };
    v.state.idtr = twofold_arch::state::Table { base: IDT, limit: 0x7ff };
    cr::write_cr0(&mut v, cr0::PE).unwrap();
    v.state.seg[1].limit = u32::MAX;
    far::far_jmp(&mut v, CS0, 0x5000, 2, 0).unwrap();
    for i in [0, 2, 3, 4, 5] {
        load_seg(&mut v, i, DS0).unwrap();
    }
    ltr(&mut v, TSS_A).unwrap();
    v.state.gpr[4] = 0x1_f000;
    v
}

fn push32(v: &mut Vcpu, value: u64) {
    v.state.gpr[4] -= 4;
    poke(v, v.state.gpr[4], &(value as u32).to_le_bytes());
}
fn frame(v: &Vcpu, n: u64) -> Vec<u64> {
    (0..n).map(|i| peek(v, v.state.gpr[4] + 4 * i, 4)).collect()
}

fn to_ring3(v: &mut Vcpu, flags: u64) {
    for x in [u64::from(DS3), 0x2_4000, flags, u64::from(CS3), 0x6000] {
        push32(v, x);
    }
    far::iret(v, 2, 0).unwrap();
    assert_eq!((v.state.cpl, v.state.rip, v.state.gpr[4]), (3, 0x6000, 0x2_4000));
}

#[test]
fn real_mode_goes_through_the_vector_table() {
    let mut v = vcpu();
    poke(&v, 0x21 * 4, &[0x34, 0x12, 0x00, 0x10]);
    far::far_jmp(&mut v, 0x200, 0x10, 1, 0).unwrap();
    assert_eq!((v.state.seg[1].base, v.state.rip), (0x2000, 0x10));
    v.state.gpr[4] = 0xabcd_1000;
    v.state.set_rflags(rflags::IF | rflags::CF);
    soft_int(&mut v, 0x21, 0x12, 0).unwrap();
    assert_eq!((v.state.seg[1].selector, v.state.seg[1].base, v.state.rip), (0x1000, 0x1_0000, 0x1234));
    // The upper half of ESP is not touched.
    assert_eq!(v.state.gpr[4], 0xabcd_0ffa);
    assert_eq!(peek(&v, 0xffa, 6), 0x0203_0200_0012);
    assert_eq!(v.state.rflags_sys & rflags::IF, 0);
    far::iret(&mut v, 1, 0).unwrap();
    assert_eq!((v.state.rip, v.state.seg[1].selector, v.state.gpr[4]), (0x12, 0x200, 0xabcd_1000));
    assert_eq!(v.state.rflags(), rflags::IF | rflags::CF | 2);
    // A stack at 1: the push wraps beyond the limit, #SS without an error code, which needs the stack too: shutdown.
    v.state.gpr[4] = 1;
    assert!(deliver(&mut v, Event::Exception(Exception::UD)).is_err());
}

#[test]
fn real_mode_loads_change_the_base_alone() {
    let mut v = protected();
    cr::write_cr0(&mut v, 0).unwrap();
    load_seg(&mut v, 3, 0x1234).unwrap();
    // "Unreal mode": the 4 GiB limit stays.
    assert_eq!((v.state.seg[3].base, v.state.seg[3].limit), (0x1_2340, u32::MAX));
    assert_eq!(v.state.cpl, 0);
}

#[test]
fn ring_3_interrupt_takes_the_tss_stack_and_iret_drops_inner_segments() {
    let mut v = protected();
    to_ring3(&mut v, rflags::IF);
    assert_eq!(v.state.seg[0].attr, attr::UNUSABLE);
    deliver(&mut v, Event::Exception(Exception::gp(0x10))).unwrap();
    assert_eq!((v.state.cpl, v.state.seg[2].selector, v.state.gpr[4]), (0, DS0, ESP0 - 24));
    let flags = rflags::IF | rflags::RF | 2;
    assert_eq!(frame(&v, 6), [0x10, 0x6000, u64::from(CS3), flags, 0x2_4000, u64::from(DS3)]);
    assert_eq!(v.state.rip, HANDLERS + 16 * 13);
    v.state.gpr[4] += 4;
    load_seg(&mut v, 3, DS0).unwrap();
    load_seg(&mut v, 5, DS3).unwrap();
    far::iret(&mut v, 2, 0).unwrap();
    assert_eq!((v.state.cpl, v.state.seg[3].selector, v.state.seg[5].selector), (3, 0, DS3));
}

#[test]
fn bad_inner_stacks_are_invalid_tss() {
    let mut v = protected();
    to_ring3(&mut v, 2);
    // SS0 with the wrong DPL; the #TS handler uses the same stack: double fault, then shutdown.
    poke(&v, TSS + 8, &u32::from(DS3).to_le_bytes());
    assert!(deliver(&mut v, Event::Interrupt(0x30)).is_err());
    assert_eq!((v.counters.exceptions[10], v.counters.exceptions[8]), (1, 1));
    let mut v = protected();
    to_ring3(&mut v, 2);
    poke(&v, TSS + 8, &u32::from(DS3).to_le_bytes());
    gate(&v, 0x80, CS0, 0x7000, 0xee);
    assert_eq!(exception(soft_int(&mut v, 0x80, 0x6002, 0)), fault(Vector::InvalidTss, u32::from(DS3) & !3));
    assert_eq!((v.state.cpl, v.state.gpr[4]), (3, 0x2_4000));
}

#[test]
fn sixteen_bit_gates_push_words() {
    let mut v = protected();
    gate(&v, 0x20, CS0, 0xffff_7000, 0x86);
    deliver(&mut v, Event::Interrupt(0x20)).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4]), (0x7000, 0x1_f000 - 6));
}

#[test]
fn call_gate_copies_parameters_and_far_return_releases_them() {
    let mut v = protected();
    to_ring3(&mut v, 2);
    push32(&mut v, 0x11);
    push32(&mut v, 0x22);
    let user_sp = v.state.gpr[4];
    far::far_call(&mut v, GATE | 3, 0xdead, 2, 0x6005).unwrap();
    assert_eq!((v.state.cpl, v.state.rip, v.state.seg[1].selector), (0, 0x7000, CS0));
    assert_eq!(v.state.gpr[4], ESP0 - 24);
    assert_eq!(frame(&v, 6), [0x6005, u64::from(CS3), 0x22, 0x11, user_sp, u64::from(DS3)]);
    far::far_ret(&mut v, 2, 8).unwrap();
    assert_eq!((v.state.cpl, v.state.rip, v.state.gpr[4]), (3, 0x6005, user_sp + 8));
    // Not through a gate: a CALL to a segment of another level.
    assert_gp(far::far_call(&mut v, CS0 | 3, 0, 2, 0), CS0.into());
}

fn task_b(v: &Vcpu) {
    let word = |at: u64, value: u64| poke(v, TSS_B_AT + at, &(value as u32).to_le_bytes());
    word(32, 0x7100);
    word(36, 2 | rflags::ZF);
    for i in 0..8 {
        word(40 + 4 * i, 0x100 + i);
    }
    word(56, 0x1_d000);
    for (i, s) in [DS0, CS0, DS0, DS0, DS0, 0].into_iter().enumerate() {
        word(72 + 4 * i as u64, s.into());
    }
    word(100, 0x68 << 16);
}

#[test]
fn call_to_a_tss_and_nested_return() {
    let mut v = protected();
    task_b(&v);
    v.state.gpr[0] = 0xaaaa;
    v.state.set_rflags(rflags::IF);
    far::far_call(&mut v, TSS_B, 0, 2, 0x5007).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[0], v.state.gpr[4]), (0x7100, 0x100, 0x1_d000));
    assert_eq!(v.state.rflags(), 2 | rflags::ZF | rflags::NT);
    assert_ne!(v.state.cr0 & cr0::TS, 0);
    // The outgoing task is saved, both are busy, and the new one links back.
    assert_eq!((peek(&v, TSS + 32, 4), peek(&v, TSS + 40, 4), peek(&v, TSS + 36, 4)), (0x5007, 0xaaaa, rflags::IF | 2));
    assert_eq!(peek(&v, TSS_B_AT, 2), u64::from(TSS_A));
    let access = |v: &Vcpu, s: u16| peek(v, GDT + u64::from(s) + 5, 1);
    assert_eq!((access(&v, TSS_A), access(&v, TSS_B)), (0x8b, 0x8b));
    // A busy TSS cannot be called.
    assert_gp(far::far_call(&mut v, TSS_B, 0, 2, 0), TSS_B.into());
    far::iret(&mut v, 2, 0x7123).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[0], v.state.seg[7].selector), (0x5007, 0xaaaa, TSS_A));
    assert_eq!((access(&v, TSS_A), access(&v, TSS_B)), (0x8b, 0x89));
    assert_eq!(v.state.rflags(), rflags::IF | 2);
    assert_eq!(peek(&v, TSS_B_AT + 36, 4) & rflags::NT, 0);
    assert_eq!(peek(&v, TSS_B_AT + 32, 4), 0x7123);
}

#[test]
fn what_the_new_task_raises_is_delivered_in_its_context() {
    let mut v = protected();
    task_b(&v);
    // DS is beyond the GDT: #TS with the new task's CS:EIP in the frame, on its stack.
    poke(&v, TSS_B_AT + 84, &0x1000u32.to_le_bytes());
    far::far_jmp(&mut v, TSS_B, 0, 2, 0x5007).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4]), (HANDLERS + 16 * 10, 0x1_d000 - 16));
    assert_eq!(frame(&v, 3), [0x1000, 0x7100, u64::from(CS0)]);
    assert_eq!(v.state.seg[7].selector, TSS_B);
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code() {
    let mut v = protected();
    task_b(&v);
    gate(&v, 8, TSS_B, 0, 0x85);
    deliver(&mut v, Event::Exception(fault(Vector::DoubleFault, 0))).unwrap();
    assert_eq!((v.state.rip, v.state.gpr[4]), (0x7100, 0x1_d000 - 4));
    assert_eq!(peek(&v, TSS + 32, 4), 0x5000);
}

#[test]
fn jump_through_a_task_gate_leaves_the_old_task_available() {
    let mut v = protected();
    task_b(&v);
    far::far_jmp(&mut v, TASK_GATE, 0, 2, 0x5007).unwrap();
    assert_eq!(v.state.rflags_sys & rflags::NT, 0);
    assert_eq!(peek(&v, GDT + u64::from(TSS_A) + 5, 1), 0x89);
}

fn to_v86(v: &mut Vcpu, flags: u64) {
    // GS FS DS ES SS ESP EFLAGS CS EIP.
    for x in [6, 5, 4, 3, 0x2000, 0xffe, flags | rflags::VM, 0x1000, 0x10] {
        push32(v, x);
    }
    far::iret(v, 2, 0).unwrap();
    assert_eq!((v.state.cpl, v.state.seg[1].base, v.state.seg[2].base), (3, 0x1_0000, 0x2_0000));
    assert_eq!([0, 3, 4, 5].map(|i| v.state.seg[i].selector), [3, 4, 5, 6]);
}

#[test]
fn virtual_8086_mode_is_entered_and_left() {
    let mut v = protected();
    to_v86(&mut v, rflags::IF);
    deliver(&mut v, Event::Interrupt(0x20)).unwrap();
    assert_eq!((v.state.cpl, v.state.rflags_sys & rflags::VM), (0, 0));
    assert_eq!(v.state.gpr[4], ESP0 - 36);
    assert_eq!(frame(&v, 9), [0x10, 0x1000, rflags::IF | rflags::VM | 2, 0xffe, 0x2000, 3, 4, 5, 6]);
    assert_eq!(v.state.seg[3].attr, attr::UNUSABLE);
    far::iret(&mut v, 2, 0).unwrap();
    assert_ne!(v.state.rflags_sys & rflags::VM, 0);
    // INT n with IOPL < 3 is #GP(0); INT3 is not IOPL-sensitive.
    assert_gp(soft_int(&mut v, 0x21, 0x12, 0), 0);
    gate(&v, 3, CS0, 0x7000, 0xee);
    soft_int(&mut v, 3, 0x11, 1).unwrap();
    assert_eq!(v.state.rip, 0x7000);
}

#[test]
fn vme_redirects_software_interrupts() {
    let mut v = protected();
    cr::write_cr4(&mut v, cr4::VME).unwrap();
    poke(&v, 0x21 * 4, &[0x34, 0x12, 0x00, 0x30]);
    to_v86(&mut v, rflags::VIF);
    // The redirection bitmap (32 bytes under the I/O map at 0x88) is clear: the 8086 handler.
    soft_int(&mut v, 0x21, 0x12, 0).unwrap();
    assert_eq!((v.state.seg[1].selector, v.state.rip), (0x3000, 0x1234));
    assert_eq!(v.state.rflags_sys & rflags::VIF, 0);
    // VIF shows as IF in the frame, IOPL as 3.
    assert_eq!(peek(&v, 0x2_0000 + 0xffc, 2) & (rflags::IF | rflags::IOPL), rflags::IF | rflags::IOPL);
    far::iret(&mut v, 1, 0).unwrap();
    assert_ne!(v.state.rflags_sys & rflags::VIF, 0);
    poke(&v, TSS + 0x68 + 4, &[2]);
    assert_gp(soft_int(&mut v, 0x21, 0x12, 0), 0);
}

#[test]
fn segment_limits_and_rights() {
    let mut v = protected();
    // Expand-down, 16-bit, limit 0xfff: valid from 0x1000 to 0xffff.
    poke64(&v, GDT + 0x40, descriptor(0x1000, 0xfff, 0x97, 0));
    load_seg(&mut v, 3, 0x40).unwrap();
    let s = &v.state;
    assert_eq!(seg_addr(s, 3, 0x1000, 4, true), Ok(0x2000));
    assert_gp(seg_addr(s, 3, 0xfff, 1, false), 0);
    assert_gp(seg_addr(s, 3, 0xfffe, 4, false), 0);
    // Writing through CS.
    assert_gp(seg_addr(s, 1, 0, 1, true), 0);
    assert_eq!(seg_addr(s, 1, 4, 4, false), Ok(4));
    load_seg(&mut v, 3, 0).unwrap();
    assert_gp(seg_addr(&v.state, 3, 0, 1, false), 0);
    v.state.seg[2].limit = 0xffff;
    assert_eq!(exception(seg_addr(&v.state, 2, 0xfffd, 4, true)), Exception::SS0);
}

#[test]
fn io_permission_bitmap() {
    let mut v = protected();
    to_ring3(&mut v, 2);
    // Port 0x80 .. allowed, 0x81 not: bits of byte 0x10 of the map at 0x88.
    poke(&v, TSS + 0x88 + 0x10, &[0b10]);
    assert!(crate::cpu::ops::port_in(&mut v, 0x80, 1).is_ok());
    assert_gp(crate::cpu::ops::port_in(&mut v, 0x81, 1), 0);
    assert_gp(crate::cpu::ops::port_in(&mut v, 0x80, 2), 0);
    // Beyond the limit of the TSS.
    assert_gp(crate::cpu::ops::port_in(&mut v, 0xffff, 1), 0);
}
