//! Near branches to places that are none: non-canonical targets, and 16-bit code above 64 KiB (SDM Vol 2A, "JMP—Jump", "CALL—Call
//! Procedure").

use super::*;
use crate::exec::dispatch;

/// The handler of #GP.
const GP: u64 = HANDLERS + 13 * 16;
/// The last page below the non-canonical addresses, and the first above them.
const LAST: u64 = 0x7fff_ffff_f000;
const FIRST: u64 = 0xffff_8000_0000_0000;

/// 64-bit mode with 2 MiB of memory at both edges, each the upper half of RAM.
fn edges() -> Box<Vcpu> {
    let mut v = long_mode();
    for (entry, table, index) in [(255, 0x4000, 511), (256, 0x6000, 0)] {
        poke64(&v, PML4 + 8 * entry, table | 7);
        poke64(&v, table + 8 * index, (table + 0x1000) | 7);
        poke64(&v, table + 0x1000 + 8 * index, 0x20_0000 | 0x87);
    }
    poke(&v, GP, &[0xeb, 0xfe]);
    v.state.gpr[1] = 5;
    v
}

/// Runs code at `rip`, whose physical address is `pa`, until RIP is there again or at the handler of #GP.
fn run_at(v: &mut Vcpu, rip: u64, pa: u64, code: &[u8]) {
    poke(v, pa, code);
    v.state.rip = rip;
    v.state.gpr[4] = 0x1_f000;
    for _ in 0..8 {
        dispatch::step(v).unwrap();
    }
}

#[test]
fn a_direct_branch_to_a_non_canonical_target_faults_where_it_stands() {
    for (what, code) in [
        ("jmp", &[0xe9, 0, 0x10, 0, 0][..]),
        ("call", &[0xe8, 0, 0x10, 0, 0]),
        ("jz", &[0x0f, 0x84, 0, 0x10, 0, 0]),
        ("loop", &[0xe2, 0x70]),
    ] {
        let mut v = edges();
        // ZF.
        v.state.set_rflags(0x40);
        run_at(&mut v, LAST + 0xf90, 0x3f_ff90, code);
        assert_eq!(v.state.rip, GP, "{what}");
        let frame = [0, 8, 32].map(|at| peek64(&v, v.state.gpr[4] + at));
        assert_eq!(frame, [0, LAST + 0xf90, 0x1_f000], "{what}: error code, RIP, RSP");
        assert_eq!(
            (v.state.gpr[1], peek64(&v, 0x1_eff8)),
            (5, 0x18),
            "{what}: nothing was done (that is the frame's SS)"
        );
    }
    // Backwards from the first page above.
    let mut v = edges();
    run_at(&mut v, FIRST + 0x10, 0x20_0010, &[0xe8, 0, 0xf0, 0xff, 0xff]);
    assert_eq!((v.state.rip, peek64(&v, v.state.gpr[4] + 8)), (GP, FIRST + 0x10));
}

#[test]
fn branches_near_the_edge_that_stay_go_on() {
    let mut v = edges();
    v.state.set_rflags(0);
    // jz far out (not taken); jmp to the page before: there inc rcx; jmp $
    poke(&v, 0x3f_ef90, &[0x48, 0xff, 0xc1, 0xeb, 0xfe]);
    run_at(&mut v, LAST + 0xf90, 0x3f_ff90, &[0x0f, 0x84, 0, 0x10, 0, 0, 0xe9, 0xf5, 0xef, 0xff, 0xff]);
    assert_eq!((v.state.rip, v.state.gpr[1]), (LAST - 0x70 + 3, 6));
    // From far away into it: the key follows.
    let mut v = edges();
    v.state.gpr[0] = LAST + 0xf90;
    poke(&v, 0x3f_ff90, &[0xe8, 0, 0x10, 0, 0]);
    run_at(&mut v, 0x4_0000, 0x4_0000, &[0xff, 0xe0]);
    assert_eq!((v.state.rip, peek64(&v, v.state.gpr[4] + 8)), (GP, LAST + 0xf90));
}

#[test]
fn near_branches_of_16_bits_lead_below_64_kib() {
    // jmp short, jmp near, jc, loop, call: each to 4 above the next instruction.
    for (what, code) in [
        ("jmp short", &[0xeb, 4][..]),
        ("jmp near", &[0xe9, 4, 0]),
        ("jc", &[0x72, 4]),
        ("loop", &[0xe2, 4]),
        ("call", &[0xe8, 4, 0]),
    ] {
        let mut v = vcpu();
        v.state.seg[1] = twofold_arch::Segment { limit: u32::MAX, ..twofold_arch::Segment::real_mode(0, true) };
        v.state.set_rflags(1);
        v.state.gpr[1] = 5;
        let target = 0x2300 + code.len() as u64 + 4;
        poke(&v, target, &[0xeb, 0xfe]);
        run_at(&mut v, 0x1_2300, 0x1_2300, code);
        assert_eq!(v.state.rip, target, "{what}");
    }
    // Not taken, it stays above.
    let mut v = vcpu();
    v.state.seg[1] = twofold_arch::Segment { limit: u32::MAX, ..twofold_arch::Segment::real_mode(0, true) };
    v.state.set_rflags(0);
    run_at(&mut v, 0x1_2300, 0x1_2300, &[0x72, 4, 0xf4]);
    assert_eq!((v.state.rip, v.state.halted), (0x1_2303, 1));
}
