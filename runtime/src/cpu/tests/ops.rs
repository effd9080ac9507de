//! Integer helpers, flags helpers and identification, against hand-computed results.

use twofold_arch::control::rflags::{self, AF, CF, OF, SF, ZF};
use twofold_ir::Helper;

use super::*;
use crate::cpu::{call_helper, ops};

/// RAX and RDX after a division by RBX, or `None` when it raised #DE.
fn divided(code: &[u8], rax: u64, rdx: u64, rbx: u64) -> Option<(u64, u64)> {
    let mut v = long_mode();
    (v.state.gpr[0], v.state.gpr[2], v.state.gpr[3], v.state.rip) = (rax, rdx, rbx, 0x6000);
    // HLT ends it.
    poke(&v, 0x6000, &[code, &[0xf4]].concat());
    super::super::refresh_space(&mut v);
    crate::exec::dispatch::step(&mut v).unwrap();
    if v.state.rip == HANDLERS {
        assert_eq!((v.state.gpr[0], v.state.gpr[2]), (rax, rdx), "a fault changes nothing");
        return None;
    }
    assert_eq!(v.state.rip, 0x6001 + code.len() as u64);
    Some((v.state.gpr[0], v.state.gpr[2]))
}

const DIV8: &[u8] = &[0xf6, 0xf3];
const DIV32: &[u8] = &[0xf7, 0xf3];
const DIV64: &[u8] = &[0x48, 0xf7, 0xf3];
const IDIV8: &[u8] = &[0xf6, 0xfb];
const IDIV32: &[u8] = &[0xf7, 0xfb];
const IDIV64: &[u8] = &[0x48, 0xf7, 0xfb];

#[test]
fn division_and_its_limits() {
    assert_eq!(divided(DIV64, 100, 0, 7), Some((14, 2)));
    assert_eq!(divided(DIV64, 100, 0, 0), None);
    // Quotient too large.
    assert_eq!(divided(DIV64, 0, 7, 7), None);
    assert_eq!(divided(DIV64, u64::MAX, 6, 7), Some((u64::MAX, 6)));
    let (q, r) = divided(DIV64, 5, 6, 7).expect("fits");
    assert_eq!(u128::from(q) * 7 + u128::from(r), (6u128 << 64) + 5);
    assert_eq!(divided(DIV8, 0x1234_0205, 3, 0x10), Some((0x1234_0520, 3)));
    assert_eq!(divided(DIV8, 0x1000, 3, 0x10), None);
    // 32-bit results clear the upper halves.
    assert_eq!(divided(DIV32, u64::MAX, 0xffff_ffff_0000_0000, 2), Some((0x7fff_ffff, 1)));
    assert_eq!(divided(DIV32, 0, 2, 0xffff_ffff_0000_0002), None);
    assert_eq!(ops::divide_wide(9, 0, 0), 9, "what would trap gives the low half");
}

#[test]
fn signed_division_and_its_limits() {
    let minus = |n: i64| n.wrapping_neg() as u64;
    assert_eq!(divided(IDIV64, minus(7), u64::MAX, 2), Some((minus(3), minus(1))));
    assert_eq!(divided(IDIV64, 7, 0, minus(2)), Some((minus(3), 1)));
    assert_eq!(divided(IDIV64, minus(7), u64::MAX, minus(2)), Some((3, minus(1))));
    assert_eq!(divided(IDIV64, 0, 0, minus(2)), Some((0, 0)));
    // -2^64 / 2 is the least that fits, and 2^64 / 2 does not.
    assert_eq!(divided(IDIV64, 0, u64::MAX, 2), Some((1 << 63, 0)));
    assert_eq!(divided(IDIV64, 0, 1, 2), None);
    assert_eq!(divided(IDIV64, 0, 1, minus(2)), Some((1 << 63, 0)));
    assert_eq!(divided(IDIV64, u64::MAX, 0, 2), Some((u64::MAX >> 1, 1)));
    assert_eq!(divided(IDIV64, 5, 0, 0), None);
    // MIN / -1 at each width.
    assert_eq!(divided(IDIV64, 1 << 63, u64::MAX, u64::MAX), None);
    assert_eq!(divided(IDIV32, 0x8000_0000, 0xffff_ffff, u64::MAX), None);
    assert_eq!(divided(IDIV64, 0, 1 << 63, u64::MAX), None);
    assert_eq!(divided(IDIV64, 0, 1 << 63, 1 << 63), None);
    assert_eq!(divided(IDIV8, 0xff80, 0, 0xff), None, "128 does not fit");
    assert_eq!(divided(IDIV8, 0xff81, 0, 0xff), Some((0x007f, 0)));
}

#[test]
fn rotates_through_carry_match_a_bit_by_bit_model() {
    let mut v = vcpu();
    for log2 in 0..4u64 {
        let bits = 8 << log2;
        for right in [false, true] {
            for count in 0..70u64 {
                for carry in [0, 1] {
                    let value = 0xa5c3_96f0_1234_8001u64 & u64::MAX >> (64 - bits);
                    v.state.set_rflags(carry | AF);
                    let got = ops::rotate_carry(&mut v, value, count, log2 | u64::from(right) << 8).unwrap();
                    let (mut x, mut c) = (value, carry);
                    for _ in 0..count & if bits == 64 { 63 } else { 31 } {
                        if right {
                            let out = x & 1;
                            x = x >> 1 | c << (bits - 1);
                            c = out;
                        } else {
                            let out = x >> (bits - 1) & 1;
                            x = (x << 1 | c) & u64::MAX >> (64 - bits);
                            c = out;
                        }
                    }
                    assert_eq!((got, v.state.rflags() & CF), (x, c), "bits {bits} right {right} count {count}");
                    assert_ne!(v.state.rflags() & AF, 0);
                }
            }
        }
    }
    v.state.set_rflags(0);
    ops::rotate_carry(&mut v, 0x40, 1, 0).unwrap();
    assert_ne!(v.state.rflags() & OF, 0);
}

#[test]
fn decimal_adjustments() {
    let mut v = vcpu();
    let mut run = |kind, ax: u64, flags, imm| {
        v.state.gpr[0] = ax;
        v.state.set_rflags(flags);
        ops::bcd(&mut v, kind, imm).unwrap();
        (v.state.gpr[0] & 0xffff, v.state.rflags() & (CF | AF))
    };
    // SDM Vol 2A, DAA: 79H + 35H = AEH, adjusted 14H with CF.
    assert_eq!(run(0, 0xae, 0, 0), (0x14, CF | AF));
    assert_eq!(run(0, 0x12, 0, 0), (0x12, 0));
    // DAS: 35H - 47H = EEH with borrows, adjusted 88H with CF.
    assert_eq!(run(1, 0xee, CF | AF, 0), (0x88, CF | AF));
    assert_eq!(run(2, 0x000b, 0, 0), (0x0101, CF | AF));
    assert_eq!(run(3, 0x02fe, AF, 0), (0x0108, CF | AF));
    assert_eq!(run(4, 0x003f, 0, 10), (0x0603, 0));
    assert_eq!(run(5, 0x0603, 0, 10), (0x003f, 0));
    assert_eq!(exception(ops::bcd(&mut v, 4, 0)), Exception::DE);
}

#[test]
fn crc_and_bit_deposits() {
    // CRC-32C of "123456789" is E3069283H.
    let crc = b"123456789".iter().fold(0xffff_ffff, |c, &b| ops::crc32(c, b.into(), 0));
    assert_eq!(crc ^ 0xffff_ffff, 0xe306_9283);
    let eight = ops::crc32(0, 0x0807_0605_0403_0201, 3);
    assert_eq!(eight, (1..=8).fold(0, |c, b| ops::crc32(c, b, 0)));
    assert_eq!(ops::pdep(0b1011, 0xf0f0), 0xb0);
    assert_eq!(ops::pext(0x1234, 0xff00), 0x12);
    assert_eq!(ops::pext(ops::pdep(0x1234_5678, 0xff00_ff00_ff00_ff00), 0xff00_ff00_ff00_ff00), 0x1234_5678);
}

#[test]
fn wide_compare_and_exchange() {
    let mut v = long_mode();
    poke64(&v, 0x10_0000, 0x1111_2222_3333_4444);
    (v.state.gpr[0], v.state.gpr[2]) = (0x3333_4444, 0x1111_2222);
    (v.state.gpr[3], v.state.gpr[1]) = (5, 6);
    v.state.set_rflags(CF | SF);
    ops::cmpxchg8b(&mut v, 0x10_0000).unwrap();
    assert_eq!(peek64(&v, 0x10_0000), 6 << 32 | 5);
    assert_eq!(v.state.rflags() & (CF | SF | ZF), CF | SF | ZF);
    ops::cmpxchg8b(&mut v, 0x10_0000).unwrap();
    assert_eq!((v.state.gpr[0], v.state.gpr[2], v.state.rflags() & ZF), (5, 6, 0));
    // Across a page border.
    poke64(&v, 0x10_0ffc, 6 << 32 | 5);
    ops::cmpxchg8b(&mut v, 0x10_0ffc).unwrap();
    assert_ne!(v.state.rflags() & ZF, 0);

    assert_gp(ops::cmpxchg16b(&mut v, 0x10_0008), 0);
    poke64(&v, 0x10_0010, 5);
    poke64(&v, 0x10_0018, 6);
    (v.state.gpr[3], v.state.gpr[1]) = (7, 8);
    ops::cmpxchg16b(&mut v, 0x10_0010).unwrap();
    assert_eq!((peek64(&v, 0x10_0010), peek64(&v, 0x10_0018)), (7, 8));
    ops::cmpxchg16b(&mut v, 0x10_0010).unwrap();
    assert_eq!((v.state.gpr[0], v.state.gpr[2], v.state.rflags() & ZF), (7, 8, 0));
}

#[test]
fn popf_changes_what_the_privilege_allows() {
    let mut v = long_mode();
    ops::popf(&mut v, u64::MAX, 3).unwrap();
    let all =
        rflags::ARITH | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
    assert_eq!(v.state.rflags(), all | 2);
    v.state.set_rflags(0);
    to_user(&mut v, 0x6000, 2);
    ops::popf(&mut v, u64::MAX, 3).unwrap();
    assert_eq!(v.state.rflags(), all & !(rflags::IOPL | rflags::IF) | 2);
    assert_eq!(ops::pushf(&mut v, 3).unwrap(), v.state.rflags());
    // CLI and STI follow IOPL.
    assert_gp(ops::cli(&mut v), 0);
    v.state.rflags_sys |= rflags::IOPL;
    ops::sti(&mut v, false).unwrap();
    assert_ne!(v.state.rflags_sys & rflags::IF, 0);
    assert_eq!(v.state.shadow, 1);
}

#[test]
fn enter_builds_frames() {
    let mut v = long_mode();
    v.state.gpr[4] = 0x1_8000;
    v.state.gpr[5] = 0x1_9000;
    poke64(&v, 0x1_9000 - 8, 0xaaaa);
    ops::enter(&mut v, 0x20, 2, 3).unwrap();
    // Saved RBP, one copied frame pointer, the new frame pointer, 32 bytes.
    assert_eq!((v.state.gpr[5], v.state.gpr[4]), (0x1_8000 - 8, 0x1_8000 - 24 - 0x20));
    assert_eq!([8, 16, 24].map(|d| peek64(&v, 0x1_8000 - d)), [0x1_9000, 0xaaaa, 0x1_8000 - 8]);
}

#[test]
fn umip_guards_table_reads() {
    let mut v = long_mode();
    v.state.cr4 |= cr4::UMIP;
    ops::store_table(&mut v, 0x10_0000, true, 8).unwrap();
    assert_eq!((peek(&v, 0x10_0000, 2), peek64(&v, 0x10_0002)), (0xfff, IDT));
    to_user(&mut v, 0x6000, 2);
    assert_gp(ops::store_table(&mut v, 0x10_0000, true, 8), 0);
    assert_gp(ops::store_system(&mut v, 2), 0);
}

#[test]
fn lgdt_wants_a_canonical_base() {
    let mut v = long_mode();
    poke(&v, 0x10_0000, &0x7fu16.to_le_bytes());
    // With CR4.LA57 = 0, but a processor that has 5-level paging.
    poke64(&v, 0x10_0002, 1 << 56);
    assert_gp(ops::load_table(&mut v, 0x10_0000, false, 8), 0);
    poke64(&v, 0x10_0002, 1 << 47);
    ops::load_table(&mut v, 0x10_0000, false, 8).unwrap();
    poke64(&v, 0x10_0002, 0xffff_8000_0000_0000);
    ops::load_table(&mut v, 0x10_0000, false, 8).unwrap();
    assert_eq!((v.state.gdtr.base, v.state.gdtr.limit), (0xffff_8000_0000_0000, 0x7f));
}

#[test]
fn random_numbers_follow_from_the_seed() {
    let draw = || {
        let mut v = vcpu();
        (
            ops::random(&mut v, 3, false).unwrap(),
            ops::random(&mut v, 1, true).unwrap(),
            v.state.rflags() & rflags::ARITH,
        )
    };
    let (a, b, flags) = draw();
    assert_eq!(draw(), (a, b, flags));
    assert!(a != 0 && b < 1 << 16);
    assert_eq!(flags, CF);
}

#[test]
fn cpuid_clears_upper_halves() {
    let mut v = long_mode();
    v.state.gpr[..4].fill(u64::MAX << 32);
    call_helper(&mut v, Helper::Cpuid, [0; 4]).unwrap();
    assert!(v.state.gpr[..4].iter().all(|&r| r >> 32 == 0));
}

/// The table's thunks turn a trap into a record, and have an entry for every helper.
#[test]
fn thunks_record_what_was_raised() {
    let mut v = vcpu();
    let state: *mut CpuState = &mut *v.state;
    assert_eq!(crate::cpu::HELPERS.len(), Helper::ALL.len());
    let call = crate::cpu::table::call_thunk(Helper::Bcd, state, [4, 0, 0, 0]);
    assert_eq!(call, 0);
    assert_eq!((v.state.fault.pending, v.state.fault.vector, v.state.fault.has_error), (1, 0, 0));
    v.state.fault.pending = 0;
    assert_eq!(crate::cpu::table::call_thunk(Helper::Pdep, state, [3, 0xf0, 0, 0]), 0x30);
}

/// XSAVES and XRSTORS outside CPL 0 are #GP(0), whatever the segment of the operand says.
#[test]
fn xsaves_asks_for_the_cpl_before_the_segment() {
    for modrm in [0x2d, 0x1d] {
        let mut v = long_mode();
        cr::write_cr4(&mut v, cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE).unwrap();
        to_user(&mut v, 0x6000, 2);
        v.state.seg[1].attr = v.state.seg[1].attr & !twofold_arch::segment::attr::L | twofold_arch::segment::attr::DB;
        v.state.seg[2].limit = 0x10;
        // XSAVES or XRSTORS SS:[0x5000].
        poke(&v, 0x6000, &[0x36, 0x0f, 0xc7, modrm, 0, 0x50, 0, 0]);
        super::super::refresh_space(&mut v);
        crate::exec::dispatch::step(&mut v).unwrap();
        assert_eq!(v.state.rip, HANDLERS + 16 * 13);
    }
}
