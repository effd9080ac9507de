//! Tests of the local APIC: registers, priorities, timers, x2APIC mode.

use super::*;

fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(0, true);
    apic.mmio_write(0xf0, 0x1ff, 0);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, false);
    let base = apic.msr_read(msr::APIC_BASE, 0).unwrap();
    apic.msr_write(msr::APIC_BASE, base | BASE_EXTD, 0).unwrap();
    apic.msr_write(0x80f, 0x1ff, 0).unwrap();
    apic
}

#[test]
fn reset_values() {
    let mut apic = LocalApic::new(3, true);
    assert_eq!(apic.mmio_read(0x20, 0), 3 << 24);
    assert_eq!(apic.mmio_read(0x30, 0), VERSION);
    assert_eq!(apic.mmio_read(0xe0, 0), u32::MAX);
    assert_eq!(apic.mmio_read(0xf0, 0), 0xff);
    for lvt in (0x320..=0x370).step_by(0x10) {
        assert_eq!(apic.mmio_read(lvt, 0), LVT_MASKED);
    }
    assert_eq!(apic.msr_read(msr::APIC_BASE, 0), Ok(0xfee0_0900));
}

#[test]
fn priorities_nest_and_eoi_unwinds() {
    let mut apic = enabled();
    apic.accept(0x31, false);
    assert_eq!(apic.acknowledge(), Some(0x31));
    assert_eq!(apic.mmio_read(0xa0, 0), 0x30);
    apic.accept(0x35, false);
    assert_eq!(apic.pending_vector(), None, "same class waits");
    apic.accept(0x40, true);
    assert_eq!(apic.acknowledge(), Some(0x40));
    assert_eq!(apic.mmio_write(0xb0, 0, 0), Effect::EoiBroadcast(0x40));
    assert_eq!(apic.mmio_write(0xb0, 0, 0), Effect::None);
    assert_eq!(apic.acknowledge(), Some(0x35));
    apic.mmio_write(0xb0, 0, 0);
    assert_eq!(apic.mmio_write(0xb0, 0, 0), Effect::None, "EOI with nothing in service");
}

#[test]
fn task_priority_holds_back() {
    let mut apic = enabled();
    apic.accept(0x5f, false);
    apic.set_tpr(0x50);
    assert_eq!(apic.pending_vector(), None);
    apic.set_tpr(0x4f);
    assert_eq!(apic.pending_vector(), Some(0x5f));
    assert_eq!(apic.mmio_read(0xa0, 0), 0x4f);
}

#[test]
fn software_disabled_takes_nothing_and_masks() {
    let mut apic = enabled();
    apic.mmio_write(0x320, 0x20, 0);
    apic.mmio_write(0xf0, 0xff, 0);
    apic.accept(0x40, false);
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(apic.mmio_read(0x320, 0), 0x1_0020);
    apic.mmio_write(0x320, 0x20, 0);
    assert_eq!(apic.mmio_read(0x320, 0), 0x1_0020, "the mask cannot be cleared while disabled");
}

#[test]
fn one_shot_timer() {
    let mut apic = enabled();
    apic.mmio_write(0x3e0, 0xb, 0); // divide by 1
    apic.mmio_write(0x320, 0x40, 0);
    apic.mmio_write(0x380, 1000, 500);
    assert_eq!(apic.deadline(), Some(500 + 1000 * CRYSTAL_NS));
    assert_eq!(apic.mmio_read(0x390, 500 + 400 * CRYSTAL_NS), 600);
    assert!(!apic.expire(500 + 999 * CRYSTAL_NS));
    assert!(apic.expire(500 + 1000 * CRYSTAL_NS));
    assert_eq!(apic.acknowledge(), Some(0x40));
    assert_eq!(apic.deadline(), None);
    assert_eq!(apic.mmio_read(0x390, 1 << 40), 0);
}

#[test]
fn every_divider() {
    for (bits, divider) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)] {
        let mut apic = enabled();
        apic.mmio_write(0x3e0, bits, 0);
        apic.mmio_write(0x380, 10, 0);
        assert_eq!(apic.deadline(), Some(10 * divider * CRYSTAL_NS), "divide configuration {bits:#x}");
    }
}

#[test]
fn periodic_timer_keeps_its_phase() {
    let mut apic = enabled();
    apic.mmio_write(0x3e0, 0xb, 0);
    apic.mmio_write(0x320, 0x2_0040, 0);
    apic.mmio_write(0x380, 100, 0);
    let period = 100 * CRYSTAL_NS;
    assert!(apic.expire(3 * period + 7));
    assert_eq!(apic.deadline(), Some(4 * period));
    assert_eq!(apic.mmio_read(0x390, 4 * period - 10 * CRYSTAL_NS), 10);
    apic.mmio_write(0x380, 0, 0);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn tsc_deadline_timer() {
    let mut apic = enabled();
    assert_eq!(apic.msr_write(msr::TSC_DEADLINE, 99, 0), Ok(Effect::None));
    assert_eq!(apic.deadline(), None, "ignored in another mode");
    apic.mmio_write(0x320, 0x4_0041, 0);
    apic.mmio_write(0x380, 5, 0);
    assert_eq!(apic.deadline(), None);
    apic.msr_write(msr::TSC_DEADLINE, 1000, 0).unwrap();
    assert_eq!(apic.msr_read(msr::TSC_DEADLINE, 0), Ok(1000));
    assert_eq!(apic.deadline(), Some(1000));
    apic.set_tsc_offset(300);
    assert_eq!(apic.deadline(), Some(700));
    assert!(apic.expire(700));
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(apic.msr_read(msr::TSC_DEADLINE, 700), Ok(0));
    apic.mmio_write(0xb0, 0, 0);
    apic.msr_write(msr::TSC_DEADLINE, 10, 800).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x41), "a deadline in the past fires at once");
    apic.msr_write(msr::TSC_DEADLINE, 10_000, 800).unwrap();
    apic.mmio_write(0x320, 0x41, 0);
    assert_eq!(apic.deadline(), None, "leaving the mode disarms");
}

#[test]
fn ipis_say_whom_they_are_for() {
    let mut apic = enabled();
    apic.mmio_write(0x310, 0x0200_0000, 0);
    let Effect::Send(m) = apic.mmio_write(0x300, 0x4045, 0) else { panic!() };
    assert_eq!((m.target, m.vector, m.delivery), (Target::Physical(2), 0x45, Delivery::Fixed));
    assert!(m.selects(&LocalApic::new(2, false), 2, Some(0)));
    assert!(!m.selects(&LocalApic::new(1, false), 1, Some(0)));
    let Effect::Send(m) = apic.mmio_write(0x300, 0xc_4500, 0) else { panic!() };
    assert_eq!((m.target, m.delivery), (Target::Others, Delivery::Init));
    assert_eq!(apic.mmio_write(0x300, 0x8500, 0), Effect::None, "INIT de-assert");
    assert_eq!(apic.mmio_write(0x300, 0x4005, 0), Effect::None, "illegal vector");
    apic.mmio_write(0x280, 0, 0);
    assert_eq!(apic.mmio_read(0x280, 0), ESR_SEND_ILLEGAL);
    apic.mmio_write(0x280, 0, 0);
    assert_eq!(apic.mmio_read(0x280, 0), 0);
}

#[test]
fn logical_destinations() {
    let mut apic = enabled();
    apic.mmio_write(0xd0, 0x0200_0000, 0);
    assert!(apic.matches_logical(0x06, false));
    assert!(!apic.matches_logical(0x01, false));
    apic.mmio_write(0xe0, 0x0fff_ffff, 0);
    apic.mmio_write(0xd0, 0x3200_0000, 0);
    assert!(apic.matches_logical(0x32, false));
    assert!(apic.matches_logical(0xf2, false));
    assert!(!apic.matches_logical(0x42, false));
    let x2 = x2apic(0x25);
    assert!(x2.matches_logical(0x0002_0020, false));
    assert!(!x2.matches_logical(0x0001_0020, false));
    assert!(x2.matches_physical(0x25, false));
    assert!(x2.matches_physical(0xff, true) && !x2.matches_physical(0xff, false));
}

#[test]
fn x2apic_registers() {
    let mut apic = x2apic(0x25);
    assert!(!apic.is_xapic());
    assert_eq!(apic.msr_read(0x802, 0), Ok(0x25));
    assert_eq!(apic.msr_read(0x80d, 0), Ok(0x0002_0020));
    assert_eq!(apic.msr_read(0x80e, 0), Err(()), "no DFR");
    assert_eq!(apic.msr_read(0x80b, 0), Err(()), "EOI cannot be read");
    assert_eq!(apic.msr_write(0x80b, 1, 0), Err(()));
    assert_eq!(apic.msr_write(0x802, 1, 0), Err(()), "the ID cannot be written");
    assert_eq!(apic.msr_write(0x808, 1 << 32, 0), Err(()));
    let Ok(Effect::Send(m)) = apic.msr_write(0x830, 0x7_0000_0033, 0) else { panic!() };
    assert_eq!(m.target, Target::Physical(7));
    let Ok(Effect::Send(m)) = apic.msr_write(0x83f, 0x44, 0) else { panic!() };
    assert_eq!((m.target, m.vector), (Target::Myself, 0x44));
    assert_eq!(apic.msr_read(0x83f, 0), Err(()));
}

#[test]
fn apic_base_transitions() {
    let mut apic = LocalApic::new(0, true);
    let xapic = 0xfee0_0900;
    assert_eq!(apic.msr_write(msr::APIC_BASE, 0xfee0_0500, 0), Err(()), "EXTD without EN");
    assert_eq!(apic.msr_write(msr::APIC_BASE, xapic | 1, 0), Err(()), "reserved");
    assert_eq!(apic.msr_write(msr::APIC_BASE, xapic | BASE_EXTD, 0), Ok(Effect::None));
    assert_eq!(apic.msr_write(msr::APIC_BASE, xapic, 0), Err(()), "x2APIC to xAPIC");
    assert_eq!(apic.msr_write(msr::APIC_BASE, 0xfee0_0100, 0), Ok(Effect::None));
    assert_eq!(apic.msr_write(msr::APIC_BASE, xapic | BASE_EXTD, 0), Err(()), "disabled to x2APIC");
    assert!(apic.accepts_extint(), "a disabled APIC lets the 8259s through");
    assert_eq!(apic.msr_write(msr::APIC_BASE, xapic, 0), Ok(Effect::None));
    assert_eq!(apic.msr_read(0x802, 0), Err(()), "x2APIC registers in xAPIC mode");
}

#[test]
fn virtual_wire_mode() {
    let mut apic = LocalApic::new(0, true);
    assert!(!apic.accepts_extint());
    apic.enter_virtual_wire_mode();
    assert!(apic.accepts_extint());
    apic.mmio_write(0x350, LVT_MASKED | 0x700, 0);
    assert!(!apic.accepts_extint());
}

#[test]
fn no_register_and_no_value_panics() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for x2 in [false, true] {
        let mut apic = if x2 { x2apic(0) } else { enabled() };
        for _ in 0..50_000 {
            let (r, v, now) = (next(), next(), next() >> (next() & 63));
            let value = v >> (r >> 40 & 63);
            apic.mmio_write(r as u32 & 0xff0, value as u32, now);
            apic.mmio_read((r >> 12) as u32 & 0xff0, now);
            let _ = apic.msr_write(0x800 + (r >> 24 & 0xff) as u32, value, now);
            let _ = apic.msr_write(msr::TSC_DEADLINE, v, now);
            apic.set_tsc_offset(v);
            apic.expire(now);
            apic.acknowledge();
        }
    }
}
