//! Conversations with the whole machine through its ports and device memory, the way drivers hold them.

use super::*;
use std::sync::{Arc, Mutex};

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);
impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn machine(cpus: u32) -> Platform {
    Platform::new(Setup::quiet(cpus, 512 << 20, Clock::manual()))
}
fn lapic(p: &mut Platform, cpu: usize, offset: u64, value: u32) {
    p.mmio_write(cpu, PhysAddr(LAPIC_BASE + offset), 4, value.into());
}
fn ioapic(p: &mut Platform, register: u32, value: u32) {
    p.mmio_write(0, PhysAddr(IOAPIC_BASE), 4, register.into());
    p.mmio_write(0, PhysAddr(IOAPIC_BASE + 0x10), 4, value.into());
}
fn route(p: &mut Platform, pin: u32, low: u32) {
    ioapic(p, 0x11 + 2 * pin, 0);
    ioapic(p, 0x10 + 2 * pin, low);
}

#[test]
fn is_send() {
    fn send<T: Send>() {}
    send::<Platform>();
    send::<Clock>();
}

#[test]
fn tsc_deadline_wakes_a_halted_processor() {
    let mut p = machine(1);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    lapic(&mut p, 0, 0x320, 0x4_00ec);
    assert_eq!(p.next_deadline(), None);
    assert!(!p.can_wake());
    p.apic_msr_write(0, 0x6e0, 4_000_000).unwrap();
    assert_eq!(p.next_deadline(), Some(4_000_000));
    p.clock().set(3_999_999);
    p.poll(3_999_999);
    assert_eq!(p.interrupt_pending(0), None);
    p.clock().set(4_000_000);
    p.poll(4_000_000);
    assert_eq!(p.interrupt_pending(0), Some(0xec));
    assert_eq!(p.acknowledge(0), 0xec);
    assert_eq!(p.interrupt_pending(0), None);
    assert_eq!(p.next_deadline(), None);
    lapic(&mut p, 0, 0xb0, 0);
}

/// Looking at the count of a timer that has just run out must not swallow its interrupt.
#[test]
fn reading_an_expired_timer_keeps_its_interrupt() {
    for reader in 0..3 {
        let mut p = machine(1);
        lapic(&mut p, 0, 0xf0, 0x1ff);
        lapic(&mut p, 0, 0x3e0, 0xb);
        lapic(&mut p, 0, 0x320, if reader == 2 { 0x4_0040 } else { 0x40 });
        lapic(&mut p, 0, 0x380, 10);
        p.apic_msr_write(0, 0x6e0, 10 * clock::CRYSTAL_NS).unwrap();
        p.clock().set(10 * clock::CRYSTAL_NS);
        match reader {
            0 => assert_eq!(p.mmio_read(0, PhysAddr(LAPIC_BASE + 0x390), 4), 0),
            1 => assert_eq!(p.mmio_read(0, PhysAddr(LAPIC_BASE + 0x220), 4), 1),
            _ => assert_eq!(p.apic_msr_read(0, 0x6e0), Ok(0)),
        }
        assert_eq!((p.interrupt_pending(0), p.next_deadline()), (Some(0x40), None), "reader {reader}");
    }
}

#[test]
fn serial_transmits_by_interrupt_through_the_ioapic() {
    let sink = Sink::default();
    let setup = Setup { serial_out: Box::new(sink.clone()), ..Setup::quiet(1, 1 << 20, Clock::manual()) };
    let mut p = Platform::new(setup);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    route(&mut p, 4, 0x24);
    p.io_write(0x3f9, 1, 2);
    for byte in b"console" {
        assert_eq!(p.interrupt_pending(0), Some(0x24));
        assert_eq!(p.acknowledge(0), 0x24);
        assert_eq!(p.io_read(0x3fa, 1) & 0xf, 2);
        p.io_write(0x3f8, 1, u32::from(*byte));
        assert_eq!(p.io_read(0x3fd, 1) & 0x60, 0x60);
        assert_eq!(p.interrupt_pending(0), None, "in service");
        lapic(&mut p, 0, 0xb0, 0);
    }
    assert!(sink.0.lock().unwrap().is_empty());
    let at = p.next_deadline().expect("output wants to be flushed");
    p.clock().set(at);
    p.poll(at);
    assert_eq!(*sink.0.lock().unwrap(), b"console");
    p.io_write(0x3f8, 1, u32::from(b'!'));
    drop(p);
    assert_eq!(*sink.0.lock().unwrap(), b"console!", "the rest is written at the end");
}

#[test]
fn serial_input_arrives_as_far_as_there_is_room() {
    let input = Input::spawn(std::io::Cursor::new(vec![b'x'; 40]), Arc::new(|| {}), None);
    let mut p = Platform::new(Setup { input: Some(input), ..Setup::quiet(1, 1 << 20, Clock::manual()) });
    p.io_write(0x3fa, 1, 1);
    p.io_write(0x3f9, 1, 1);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    route(&mut p, 4, 0x24);
    let mut seen = 0;
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while seen < 40 && std::time::Instant::now() < end {
        p.poll(0);
        if p.interrupt_pending(0).is_none() {
            std::thread::yield_now();
            continue;
        }
        assert_eq!(p.acknowledge(0), 0x24);
        while p.io_read(0x3fd, 1) & 1 != 0 {
            assert_eq!(p.io_read(0x3f8, 1), u32::from(b'x'));
            seen += 1;
        }
        lapic(&mut p, 0, 0xb0, 0);
    }
    assert_eq!(seen, 40);
}

#[test]
fn timer_through_the_8259_in_virtual_wire_mode() {
    let mut p = machine(1);
    p.enter_virtual_wire_mode();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        p.io_write(port, 1, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        p.io_write(port, 1, value);
    }
    // Programming the counter raises its output once: that is an edge, too.
    assert_eq!(p.acknowledge(0), 0x30);
    p.io_write(0x20, 1, 0x20);
    for tick in 1..=3 {
        let at = p.next_deadline().unwrap();
        assert_eq!(at / 1_000_000, tick * 10 - u64::from(at < tick * 10_000_000));
        p.clock().set(at);
        p.poll(at);
        assert_eq!(p.interrupt_pending(0), Some(0x30));
        assert_eq!(p.acknowledge(0), 0x30);
        assert_eq!(p.interrupt_pending(0), None);
        p.io_write(0x20, 1, 0x20);
    }
}

#[test]
fn timer_through_ioapic_pin_2() {
    let mut p = machine(1);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    route(&mut p, 2, 0x30);
    for (port, value) in [(0x43, 0x30), (0x40, 100), (0x40, 0)] {
        p.io_write(port, 1, value);
    }
    assert_eq!(p.interrupt_pending(0), None);
    let at = p.next_deadline().unwrap();
    p.clock().set(at);
    p.poll(at);
    assert_eq!(p.interrupt_pending(0), Some(0x30));
    assert_eq!(p.next_deadline(), None);
}

#[test]
fn starting_another_processor() {
    let mut p = machine(2);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    lapic(&mut p, 0, 0x310, 1 << 24);
    lapic(&mut p, 0, 0x300, 0xc500);
    assert_eq!((p.signals(0), p.signals(1)), (0, signal::INIT));
    assert!(p.take_signal(1, signal::INIT));
    p.init_apic(1);
    lapic(&mut p, 0, 0x300, 0x8500);
    assert_eq!(p.signals(1), 0);
    lapic(&mut p, 0, 0x300, 0x469a);
    assert_eq!((p.signals(1), p.sipi_vector(1)), (signal::SIPI, 0x9a));
    assert!(p.take_signal(1, signal::SIPI) && !p.take_signal(1, signal::SIPI));
    lapic(&mut p, 1, 0xf0, 0x1ff);
    lapic(&mut p, 0, 0x300, 0xc_40fd);
    assert_eq!((p.interrupt_pending(0), p.interrupt_pending(1)), (None, Some(0xfd)));
    lapic(&mut p, 1, 0x300, 0x8_0400);
    assert_eq!((p.signals(0), p.signals(1)), (signal::NMI, signal::NMI));
    assert_eq!((p.signals(7), p.interrupt_pending(7)), (0, None), "no such processor");
}

#[test]
fn x2apic_mode_closes_the_page() {
    let mut p = machine(1);
    let base = p.apic_msr_read(0, 0x1b).unwrap();
    p.apic_msr_write(0, 0x1b, base | 1 << 10).unwrap();
    assert_eq!(p.mmio_read(0, PhysAddr(LAPIC_BASE + 0x30), 4), 0xffff_ffff);
    p.apic_msr_write(0, 0x80f, 0x1ff).unwrap();
    p.apic_msr_write(0, 0x83f, 0x77).unwrap();
    assert_eq!(p.interrupt_pending(0), Some(0x77));
    p.set_cr8(0, 8);
    assert_eq!(p.interrupt_pending(0), None);
    assert_eq!(p.apic_msr_read(0, 0x808), Ok(0x80));
    p.apic_msr_write(0, 0x808, 0).unwrap();
    assert_eq!((p.cr8(0), p.acknowledge(0)), (0, 0x77));
    assert_eq!(p.apic_msr_write(0, 0x80b, 0), Ok(()));
    assert_eq!(p.apic_msr_read(0, 0x8ff), Err(()));
}

#[test]
fn level_interrupt_with_eoi_broadcast() {
    let mut p = machine(1);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    route(&mut p, u32::from(IRQ_SCI), 0x8051);
    p.io_write(acpi_pm::PM1_EVENT + 2, 2, 1);
    let at = p.next_deadline().unwrap();
    p.clock().set(at);
    p.poll(at);
    assert_eq!(p.acknowledge(0), 0x51);
    lapic(&mut p, 0, 0xb0, 0);
    assert_eq!(p.interrupt_pending(0), Some(0x51), "still asserted");
    assert_eq!(p.acknowledge(0), 0x51);
    p.io_write(acpi_pm::PM1_EVENT, 2, 1);
    lapic(&mut p, 0, 0xb0, 0);
    assert_eq!(p.interrupt_pending(0), None);
}

#[test]
fn outcomes() {
    for (port, size, value, outcome) in [
        (0xf4u16, 2u8, 0x10u32, Outcome::DebugExit(0x10)),
        (0xf4, 4, 0x1_0010, Outcome::DebugExit(0x1_0010)),
        (0xf4, 1, 0x33, Outcome::DebugExit(0x33)),
        (0x64, 1, 0xfe, Outcome::Reset),
        (0xcf9, 1, 0x06, Outcome::Reset),
        (0x92, 1, 0x01, Outcome::Reset),
        (acpi_pm::PM1_CONTROL, 2, 5 << 10 | 1 << 13, Outcome::PowerOff),
    ] {
        let mut p = machine(1);
        assert_eq!(p.outcome(), None);
        p.io_write(port, size, value);
        assert_eq!(p.outcome(), Some(outcome), "port {port:#x}");
        p.io_write(0x64, 1, 0xfe);
        assert_eq!(p.outcome(), Some(outcome), "the first one stands");
        p.reset();
        assert_eq!(p.outcome(), None);
    }
}

#[test]
fn what_is_not_there_reads_all_ones() {
    let mut p = machine(1);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let s = seen.clone();
    p.set_trace(Box::new(move |line| s.lock().unwrap().push(line.to_owned())));
    p.io_write(0xcf8, 4, 0x8000_0000);
    assert_eq!(p.io_read(0xcf8, 4), 0xffff_ffff, "no PCI");
    assert_eq!((p.io_read(0x2f8, 1), p.io_read(0x3c0, 2), p.io_read(0x1ce, 4)), (0xff, 0xffff, 0xffff_ffff));
    p.io_read(0x2f8, 1);
    p.io_read(0xffff, 4);
    assert_eq!(p.mmio_read(0, PhysAddr(0xfed0_0000), 8), u64::MAX);
    let lines = seen.lock().unwrap();
    assert_eq!(lines.iter().filter(|l| l.contains("0x02f8")).count(), 1);
    assert!(p.counters().io_unclaimed >= 8);
}

#[test]
fn test_devices() {
    let sink = Sink::default();
    let setup = Setup { debugcon_out: Box::new(sink.clone()), ..Setup::quiet(2, 512 << 20, Clock::manual()) };
    let mut p = Platform::new(setup);
    assert_eq!((p.io_read(0xe9, 1), p.io_read(0x402, 1)), (0xe9, 0xe9));
    b"ok".iter().for_each(|b| p.io_write(0xe9, 1, u32::from(*b)));
    p.io_write(0x402, 1, u32::from(b'\n'));
    p.io_write(0x80, 1, 0x5a);
    assert_eq!(p.post_code(), 0x5a);
    p.flush();
    assert_eq!(*sink.0.lock().unwrap(), b"ok\n");
    p.io_write(0x510, 2, 0);
    let signature: Vec<u32> = (0..4).map(|_| p.io_read(0x511, 1)).collect();
    assert_eq!(signature, b"QEMU".map(u32::from));
    p.io_write(0x510, 2, 5);
    assert_eq!(p.io_read(0x511, 1), 2);
}

#[test]
fn no_guest_access_panics() {
    let mut p = machine(2);
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let ports =
        [0x20, 0x21, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x3f8, 0x3fc, 0x510, 0x511, 0x600, 0x604, 0x60b, 0xcf8];
    for _ in 0..200_000 {
        let (r, value) = (next(), next() as u32);
        let port =
            if r & 7 == 0 { (r >> 8) as u16 } else { ports[(r >> 8) as usize % ports.len()] + (r >> 16 & 3) as u16 };
        let size = [1u8, 2, 4][(r >> 24) as usize % 3];
        let cpu = (r >> 30 & 1) as usize;
        p.io_write(port, size, value);
        p.io_read(port, size);
        let page = if r >> 33 & 1 == 0 { LAPIC_BASE } else { IOAPIC_BASE };
        p.mmio_write(cpu, PhysAddr(page + (r >> 34 & 0xfff)), size, value.into());
        p.mmio_read(cpu, PhysAddr(page + (r >> 46 & 0xfff)), [1, 2, 4, 8][(r >> 60 & 3) as usize]);
        let _ = p.apic_msr_write(cpu, 0x800 + (r >> 40 & 0xff) as u32, value.into());
        p.clock().advance(u64::from(value) >> (r >> 50 & 31));
        let now = p.clock().now_ns();
        p.poll(now);
        if p.interrupt_pending(cpu).is_some() {
            p.acknowledge(cpu);
        }
    }
}

#[test]
fn test_devices_echo_and_drive_lines() {
    let mut p = machine(1);
    p.io_write(0xe0, 4, 0x1234_5678);
    assert_eq!((p.io_read(0xe0, 4), p.io_read(0xe2, 2), p.io_read(0xe1, 1)), (0x1234_5678, 0x1234, 0x56));
    let at = |offset: u64| PhysAddr(debug::MEMORY_BASE + offset);
    p.mmio_write(0, at(8), 8, 0x0102_0304_0506_0708);
    assert_eq!(p.mmio_read(0, at(9), 2), 0x0607);
    assert_eq!(p.mmio_read(0, at(debug::MEMORY_SIZE - 1), 4), 0);
    lapic(&mut p, 0, 0xf0, 0x1ff);
    route(&mut p, 14, 0x77);
    p.io_write(debug::LINE_PORT + 14, 1, 1);
    assert_eq!(p.interrupt_pending(0), Some(0x77));
}
