//! Debug exceptions where an instruction is not just an instruction: repeated strings, SYSCALL and SYSRET (SDM Vol 3B, "Debug
//! Exceptions").

use twofold_arch::control::rflags;

use super::*;
use crate::exec::dispatch;

const CODE: u64 = 0x4_0000;
/// Where the handler of #DB stays.
const DB: u64 = HANDLERS + 16;

/// 64-bit mode at CPL 0 with this code, and a #DB handler that waits.
fn with(code: &[u8]) -> Box<Vcpu> {
    let mut v = long_mode();
    poke(&v, CODE, code);
    poke(&v, DB, &[0xeb, 0xfe]);
    v.state.rip = CODE;
    v
}

/// Runs to the handler of #DB: RIP in its frame, and DR6's conditions, which are cleared.
fn to_db(v: &mut Vcpu) -> (u64, u64) {
    for _ in 0..100 {
        if v.state.rip == DB {
            let bits = v.state.dr[6] & 0xe00f;
            v.state.dr[6] &= !0xe00f;
            return (peek64(v, v.state.gpr[4]), bits);
        }
        dispatch::step(v).unwrap();
    }
    panic!("no #DB, rip {:#x}", v.state.rip);
}

/// RDI at 0x60000, eight elements, and a breakpoint on writes of one byte at `at`.
fn repeated(code: &[u8], at: u64) -> Box<Vcpu> {
    let mut v = with(code);
    (v.state.gpr[1], v.state.gpr[6], v.state.gpr[7]) = (8, 0x6_1000, 0x6_0000);
    (v.state.dr[0], v.state.dr[7]) = (at, 0x1_0402);
    v
}

#[test]
fn a_repeated_string_reports_a_breakpoint_after_its_iteration() {
    // rep stosb, rep movsb; jmp $
    for code in [[0xf3, 0xaa, 0xeb, 0xfe], [0xf3, 0xa4, 0xeb, 0xfe]] {
        let mut v = repeated(&code, 0x6_0003);
        assert_eq!(to_db(&mut v), (CODE, 1), "at the instruction, which goes on");
        assert_eq!((v.state.gpr[1], v.state.gpr[7]), (4, 0x6_0004));
        far::iret(&mut v, 3, 0).unwrap();
        for _ in 0..5 {
            dispatch::step(&mut v).unwrap();
        }
        assert_eq!((v.state.rip, v.state.gpr[1], v.state.gpr[7]), (CODE + 2, 0, 0x6_0008), "once only");
        // The last iteration's is reported behind the instruction.
        let mut v = repeated(&code, 0x6_0007);
        assert_eq!(to_db(&mut v), (CODE + 2, 1));
        assert_eq!(v.state.gpr[1], 0);
    }
}

/// A system call with RFLAGS.TF set, and a kernel that returns at once.
fn stepped_syscall(mask: u64) -> Box<Vcpu> {
    // syscall; nop; jmp $
    let mut v = with(&[0x0f, 0x05, 0x90, 0xeb, 0xfe]);
    poke(&v, 0x5_0000, &[0x48, 0x0f, 0x07]);
    v.state.msrs.lstar = 0x5_0000;
    v.state.msrs.star = u64::from(USER_CS32) << 48 | u64::from(KERNEL_CS) << 32;
    v.state.msrs.fmask = mask;
    to_user(&mut v, CODE, rflags::TF | 2);
    v
}

#[test]
fn a_kernel_that_masks_tf_sees_no_step_and_sysret_traps() {
    let mut v = stepped_syscall(rflags::TF | rflags::IF);
    assert_eq!(to_db(&mut v), (CODE + 2, 1 << 14), "as if SYSCALL had just completed");
    assert_eq!(peek64(&v, v.state.gpr[4] + 8), u64::from(USER_CS));
    far::iret(&mut v, 3, 0).unwrap();
    assert_eq!(to_db(&mut v), (CODE + 3, 1 << 14), "then one instruction at a time");
}

#[test]
fn a_kernel_that_does_not_is_stepped_into() {
    let mut v = stepped_syscall(0);
    assert_eq!(to_db(&mut v), (0x5_0000, 1 << 14));
}

/// Other processors' changes of a descriptor's byte are not lost when the Accessed and busy bits are set.
#[test]
fn accessed_and_busy_bits_are_set_locked() {
    let mut v = long_mode();
    let ram = v.shared.map.ram().clone();
    // The upper doubleword of the descriptors of KERNEL_DS and of the TSS, whose DPL the other processor flips.
    let places = [GDT + u64::from(KERNEL_DS) + 4, GDT + u64::from(TSS_SEL) + 4];
    let flip = move |at: u64, bits: u32| {
        loop {
            let old = ram.load_u32(at).unwrap();
            if ram.exchange_u32(at, old, old ^ bits) == Some(true) {
                return old ^ bits;
            }
        }
    };
    let other = flip.clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = stop.clone();
    let thread = std::thread::spawn(move || {
        let mut turns = 0u32;
        while !seen.load(std::sync::atomic::Ordering::Relaxed) || turns & 1 != 0 {
            for at in places {
                other(at, 0x2000);
            }
            turns += 1;
        }
    });
    for _ in 0..20_000 {
        // Accessed and busy are clear before, and set after.
        assert_eq!(flip(places[0], 0x100) & 0x100, 0);
        super::super::segments::load_seg(&mut v, 3, KERNEL_DS).unwrap();
        assert_eq!(flip(places[1], 0x200) & 0x200, 0);
        super::super::segments::ltr(&mut v, TSS_SEL).unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    thread.join().unwrap();
    let byte = |at| peek(&v, at + 1, 1);
    assert_eq!((byte(places[0]), byte(places[1])), (0x93, 0x8b));
}
