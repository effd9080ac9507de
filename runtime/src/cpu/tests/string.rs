//! String instructions: results, exact registers on faults, overlap, direction, address sizes.

use twofold_arch::control::rflags;
use twofold_arch::{Repeat, StringKind, StringOp};

use super::*;
use crate::cpu::string::{string_io, string_op};

fn op(kind: StringKind, repeat: Repeat, log2_bytes: u8) -> u64 {
    StringOp { kind, repeat, log2_bytes, log2_addr: 3, segment: 3 }.pack()
}

fn set(v: &mut Vcpu, rcx: u64, rsi: u64, rdi: u64) {
    (v.state.gpr[1], v.state.gpr[6], v.state.gpr[7]) = (rcx, rsi, rdi);
}
fn regs(v: &Vcpu) -> (u64, u64, u64) {
    (v.state.gpr[1], v.state.gpr[6], v.state.gpr[7])
}

/// Runs to the end, however many calls it takes.
fn finish(v: &mut Vcpu, word: u64) {
    while string_op(v, word).unwrap() != 0 {}
}

#[test]
fn rep_movs_across_pages() {
    let mut v = long_mode();
    let data: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
    poke(&v, 0x10_0123, &data);
    set(&mut v, 10_000, 0x10_0123, 0x11_0ffe);
    finish(&mut v, op(StringKind::Movs, Repeat::Rep, 0));
    assert_eq!(regs(&v), (0, 0x10_0123 + 10_000, 0x11_0ffe + 10_000));
    let mut got = vec![0; 10_000];
    v.shared.map.read(PhysAddr(0x11_0ffe), &mut got);
    assert_eq!(got, data);
}

#[test]
fn a_large_copy_yields_and_goes_on() {
    let mut v = long_mode();
    set(&mut v, 0x2_8000, 0x10_0000, 0x18_0000);
    let word = op(StringKind::Movs, Repeat::Rep, 2);
    assert_eq!(string_op(&mut v, word), Ok(1));
    let (left, rsi, _) = regs(&v);
    assert_eq!(0x10_0000 + (0x2_8000 - left) * 4, rsi);
    set(&mut v, 0, 0x10_0000, 0x18_0000);
    assert_eq!(string_op(&mut v, word), Ok(0));
}

#[test]
fn overlapping_forward_copy_repeats_the_pattern() {
    let mut v = long_mode();
    poke(&v, 0x10_0000, b"abcdefgh");
    set(&mut v, 6, 0x10_0000, 0x10_0002);
    finish(&mut v, op(StringKind::Movs, Repeat::Rep, 0));
    assert_eq!(&peek64(&v, 0x10_0000).to_le_bytes(), b"abababab");
    // Backward with the destination above the source is memmove.
    poke(&v, 0x10_0000, b"abcdefgh");
    v.state.rflags_sys |= rflags::DF;
    set(&mut v, 6, 0x10_0005, 0x10_0007);
    finish(&mut v, op(StringKind::Movs, Repeat::Rep, 0));
    assert_eq!(&peek64(&v, 0x10_0000).to_le_bytes(), b"ababcdef");
    assert_eq!(regs(&v), (0, 0x0f_ffff, 0x10_0001));
    // Backward with the destination below the source repeats.
    poke(&v, 0x10_0000, b"abcdefgh");
    set(&mut v, 3, 0x10_0006, 0x10_0004);
    finish(&mut v, op(StringKind::Movs, Repeat::Rep, 1));
    assert_eq!(&peek64(&v, 0x10_0000).to_le_bytes(), b"ghghghgh");
}

#[test]
fn a_fault_leaves_the_registers_at_the_element_that_faulted() {
    let mut v = long_mode();
    // Memory ends at 4 MiB; the destination runs into it.
    set(&mut v, 100, 0x10_0000, 0x3f_fff0);
    let e = exception(string_op(&mut v, op(StringKind::Movs, Repeat::Rep, 2)));
    assert_eq!((e.vector, e.cr2, e.error), (Vector::PageFault, 0x40_0000, Some(2)));
    assert_eq!(regs(&v), (96, 0x10_0010, 0x40_0000));
    // An element across the border: nothing of it is written.
    set(&mut v, 3, 0x10_0000, 0x3f_fffa);
    poke(&v, 0x3f_fff8, &[0xee; 8]);
    let e = exception(string_op(&mut v, op(StringKind::Stos, Repeat::Rep, 2)));
    assert_eq!((e.vector, e.cr2), (Vector::PageFault, 0x40_0000));
    assert_eq!(regs(&v), (2, 0x10_0000, 0x3f_fffe));
    assert_eq!(peek(&v, 0x3f_fffe, 2), 0xeeee);
}

#[test]
fn stos_of_every_size() {
    for log2 in 0..4u8 {
        let mut v = long_mode();
        v.state.gpr[0] = 0x8877_6655_4433_2211;
        set(&mut v, 3, 0, 0x10_0ffd);
        finish(&mut v, op(StringKind::Stos, Repeat::Rep, log2));
        let n = 1u64 << log2;
        for i in 0..3 {
            let got = peek(&v, 0x10_0ffd + i * n, n as usize);
            assert_eq!(got, 0x8877_6655_4433_2211 & u64::MAX >> (64 - 8 * n));
        }
        assert_eq!(regs(&v), (0, 0, 0x10_0ffd + 3 * n));
    }
}

#[test]
fn scas_and_cmps_stop_on_their_conditions() {
    let mut v = long_mode();
    poke(&v, 0x10_0000, b"hello\0world");
    poke(&v, 0x11_0000, b"hello\0wOrld");
    v.state.gpr[0] = 0;
    set(&mut v, u64::MAX, 0, 0x10_0000);
    finish(&mut v, op(StringKind::Scas, Repeat::Repne, 0));
    assert_eq!((regs(&v).0, regs(&v).2), (u64::MAX - 6, 0x10_0006));
    assert_ne!(v.state.rflags() & rflags::ZF, 0);
    set(&mut v, 11, 0x10_0000, 0x11_0000);
    finish(&mut v, op(StringKind::Cmps, Repeat::Rep, 0));
    assert_eq!(regs(&v), (3, 0x10_0008, 0x11_0008));
    // 'o' - 'O': above, not equal.
    assert_eq!(v.state.rflags() & (rflags::ZF | rflags::CF), 0);
    // A count of 0 leaves the flags alone.
    v.state.set_rflags(rflags::ZF | rflags::CF);
    set(&mut v, 0, 0x10_0000, 0x11_0000);
    finish(&mut v, op(StringKind::Cmps, Repeat::Rep, 0));
    assert_eq!(v.state.rflags() & (rflags::ZF | rflags::CF), rflags::ZF | rflags::CF);
}

#[test]
fn address_sizes_wrap() {
    let mut v = vcpu();
    super::super::segments::load_seg(&mut v, 0, 0x1000).unwrap();
    super::super::segments::load_seg(&mut v, 3, 0x2000).unwrap();
    poke(&v, 0x2_fffe, b"xy");
    poke(&v, 0x2_0000, b"zw");
    (v.state.gpr[1], v.state.gpr[6], v.state.gpr[7]) = (0xabcd_0004, 0xabcd_fffe, 0xabcd_0010);
    let word = StringOp { kind: StringKind::Movs, repeat: Repeat::Rep, log2_bytes: 0, log2_addr: 1, segment: 3 }.pack();
    finish(&mut v, word);
    assert_eq!(&peek(&v, 0x1_0010, 4).to_le_bytes()[..4], b"xyzw");
    assert_eq!(regs(&v), (0xabcd_0000, 0xabcd_0002, 0xabcd_0014));
}

#[test]
fn lods_and_ports() {
    let mut v = long_mode();
    poke(&v, 0x10_0000, &[1, 2, 3, 4, 5, 6, 7, 8]);
    v.state.gpr[0] = u64::MAX;
    set(&mut v, 1, 0x10_0000, 0);
    finish(&mut v, op(StringKind::Lods, Repeat::Rep, 2));
    assert_eq!((v.state.gpr[0], v.state.gpr[6]), (0x0403_0201, 0x10_0004));
    v.state.gpr[2] = 0x80;
    set(&mut v, 3, 0x10_0000, 0x10_0100);
    assert_eq!(string_io(&mut v, op(StringKind::Outs, Repeat::Rep, 0)), Ok(0));
    assert_eq!((v.platform().post_code(), v.state.gpr[6]), (3, 0x10_0003));
    set(&mut v, 2, 0, 0x10_0100);
    assert_eq!(string_io(&mut v, op(StringKind::Ins, Repeat::Rep, 0)), Ok(0));
    assert_eq!(peek(&v, 0x10_0100, 2), 0x0303);
}

#[test]
fn single_stepping_does_one_element() {
    let mut v = long_mode();
    v.state.rflags_sys |= rflags::TF;
    set(&mut v, 3, 0x10_0000, 0x11_0000);
    let word = op(StringKind::Movs, Repeat::Rep, 3);
    assert_eq!(string_op(&mut v, word), Ok(1));
    assert_eq!(regs(&v), (2, 0x10_0008, 0x11_0008));
}

/// Against a model that moves element by element.
#[test]
fn random_copies_match_a_simple_model() {
    let mut v = long_mode();
    let mut x = 88_172_645_463_325_252u64;
    let mut next = move |n: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % n
    };
    let mut model: Vec<u8> = (0..0x4000u32).map(|i| (i ^ i >> 8) as u8).collect();
    poke(&v, 0x10_0000, &model);
    for _ in 0..500 {
        let (log2, down) = (next(4), next(2) == 1);
        let bytes = 1u64 << log2;
        let count = next(600);
        let span = count * bytes;
        let place =
            |r: u64| if down { span + r % (0x4000 - 2 * span.min(0x1fff) - 8) } else { r % (0x4000 - span - 8) };
        let (from, to) = (place(next(0x4000)), place(next(0x4000)));
        v.state.rflags_sys = if down { rflags::DF } else { 0 };
        set(&mut v, count, 0x10_0000 + from, 0x10_0000 + to);
        finish(&mut v, op(StringKind::Movs, Repeat::Rep, log2 as u8));
        for i in 0..count {
            let at = |base: u64| (if down { base - i * bytes } else { base + i * bytes }) as usize;
            let (f, t) = (at(from), at(to));
            let element: Vec<u8> = model[f..f + bytes as usize].to_vec();
            model[t..t + bytes as usize].copy_from_slice(&element);
        }
        let mut got = vec![0; 0x4000];
        v.shared.map.read(PhysAddr(0x10_0000), &mut got);
        assert!(got == model, "log2 {log2} down {down} count {count} from {from:#x} to {to:#x}");
    }
}
