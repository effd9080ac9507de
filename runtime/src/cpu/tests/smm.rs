//! System-management mode: the save area, the state on entry, RSM and what it refuses, blocking (SDM Vol 3C, "System
//! Management Mode").

use twofold_arch::control::rflags;
use twofold_arch::msr;
use twofold_arch::segment::attr;

use super::*;
use crate::cpu::{msr as msrs, smm};
use crate::exec::dispatch;
use crate::platform::{LAPIC_BASE, smi};
use crate::vcpu::Shutdown;

/// Low words of the interrupt command register, to the processor itself: SMI, NMI, INIT.
pub(crate) const SMI: u64 = 0x4200;
pub(crate) const NMI: u64 = 0x4400;
const INIT: u64 = 0x4500;
const BASE: u64 = 0x3_0000;
/// Where the tests' code is.
const CODE: u64 = 0x4_0000;

pub(crate) fn send(v: &mut Vcpu, message: u64) {
    v.with_devices(|p| {
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x310), 4, 0);
        p.mmio_write(0, PhysAddr(LAPIC_BASE + 0x300), 4, message);
    });
}

/// Sends an SMI and has it taken.
pub(crate) fn smi(v: &mut Vcpu) {
    send(v, SMI);
    smm::take(v).unwrap();
    assert!(v.smm.is_active());
}

/// What lies at this offset of the SDM's map.
fn saved(v: &Vcpu, base: u64, offset: u64, bytes: usize) -> u64 {
    peek(v, base + 0x8000 + offset, bytes)
}
fn save(v: &Vcpu, offset: u64, value: u64) {
    poke64(v, BASE + 0x8000 + offset, value);
}
fn run(v: &mut Vcpu, turns: u32) {
    for _ in 0..turns {
        dispatch::step(v).unwrap();
    }
}

/// 64-bit mode at CPL 3 with a different value in each register.
fn busy() -> Box<Vcpu> {
    let mut v = long_mode();
    to_user(&mut v, 0x1234_5678, rflags::IF | rflags::CF | rflags::ZF | 2);
    for (n, r) in v.state.gpr.iter_mut().enumerate() {
        *r = 0x1111_2222_3333_0000 | n as u64;
    }
    v.state.gdtr.base = 0xffff_8000_0000_0000 | GDT;
    v.state.idtr.base = 0xffff_9000_0000_0000 | IDT;
    v.state.seg[6].base = 0xffff_a000_0000_b000;
    v.state.dr[7] = 0x455;
    v
}

#[test]
fn the_save_map_is_the_sdms() {
    let mut v = busy();
    let before = v.state.seg;
    let (cr0, cr4, efer) = (v.state.cr0, v.state.cr4, v.state.efer);
    smi(&mut v);
    for (offset, bytes, value) in [
        (0x7ff8, 8, cr0),
        (0x7ff0, 8, PML4),
        (0x7fe8, 8, 0x243),
        (0x7fe0, 8, efer),
        (0x7fd8, 8, 0x1234_5678),
        (0x7fd0, 8, 0xffff_0ff0),
        (0x7fc8, 8, 0x455),
        (0x7fc4, 4, u64::from(TSS_SEL)),
        (0x7fb0, 4, u64::from(USER_DS)),
        (0x7fac, 4, u64::from(USER_CS)),
        (0x7fa4, 4, 0),
        (0x7f02, 2, 0),
        (0x7f00, 2, 0),
        (0x7efc, 4, 0x3_0101),
        (0x7ef8, 4, BASE),
        (0x7ee0, 4, 0),
        (0x7e9c, 4, 0xb000),
        (0x7e94, 4, IDT),
        (0x7e8c, 4, GDT),
        (0x7e40, 8, cr4),
        (0x7dd8, 4, 0xffff_9000),
        (0x7dd4, 4, 0xffff_a000),
        (0x7dd0, 4, 0xffff_8000),
    ] {
        assert_eq!(saved(&v, BASE, offset, bytes), value, "{offset:#x}");
    }
    // RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15.
    let places = [0x7f5c, 0x7f64, 0x7f6c, 0x7f74, 0x7f7c, 0x7f84, 0x7f8c, 0x7f94];
    for (n, offset) in places.into_iter().chain((0..8).map(|n| 0x7f54 - 8 * n)).enumerate() {
        assert_eq!(saved(&v, BASE, offset, 8), 0x1111_2222_3333_0000 | n as u64, "{n}");
    }
    // And all of it comes back.
    smm::rsm(&mut v).unwrap();
    assert!(!v.smm.is_active());
    let s = &v.state;
    assert_eq!((s.seg, s.cr0, s.cr3, s.cr4, s.efer), (before, cr0, PML4, cr4, efer));
    assert_eq!((s.rip, s.rflags(), s.cpl, s.dr[7]), (0x1234_5678, 0x243, 3, 0x455));
    assert_eq!((s.gdtr.base, s.idtr.base), (0xffff_8000_0000_0000 | GDT, 0xffff_9000_0000_0000 | IDT));
    assert!(s.gpr.iter().enumerate().all(|(n, r)| *r == 0x1111_2222_3333_0000 | n as u64));
}

#[test]
fn a_processor_without_ia32e_mode_has_the_short_map() {
    let mut v = vcpu_of(CpuModel::parse("pentium3").unwrap());
    far::far_jmp(&mut v, 0x200, 0x10, 1, 0).unwrap();
    v.state.gpr[..8].copy_from_slice(&[10, 11, 12, 13, 14, 15, 16, 17]);
    v.state.cr4 = cr4::PSE;
    smi(&mut v);
    let at = |offset| saved(&v, BASE, offset, 4);
    assert_eq!((at(0x7ffc), at(0x7ff4), at(0x7ff0)), (0x6000_0010, 2, 0x10));
    assert_eq!((at(0x7fd0), at(0x7fd4), at(0x7fe0), at(0x7fec)), (10, 11, 14, 17));
    assert_eq!((at(0x7fac), at(0x7efc), at(0x7ef8)), (0x200, 0x3_0002, BASE));
    assert_eq!(v.state.cr4, 0);
    v.state.gpr[0] = 0;
    poke(&v, BASE + 0x8000 + 0x7fd4, &[99]);
    smm::rsm(&mut v).unwrap();
    let s = &v.state;
    assert_eq!((s.gpr[0], s.gpr[1], s.rip, s.seg[1].base, s.cr4), (10, 99, 0x10, 0x2000, cr4::PSE));
}

#[test]
fn registers_on_entry() {
    let mut v = busy();
    v.state.cr0 |= cr0::TS | cr0::MP;
    let kept = v.state.cr0 & !(cr0::PE | cr0::PG | cr0::TS);
    smi(&mut v);
    let s = &v.state;
    assert_eq!((s.cr0, s.cr4, s.efer, s.dr[7]), (kept, 0, 0, 0x400));
    assert_eq!((s.rip, s.rflags(), s.cpl), (0x8000, 2, 0));
    assert_eq!((s.seg[1].selector, s.seg[1].base), (0x3000, BASE));
    for (n, seg) in s.seg[..6].iter().enumerate() {
        assert_eq!((seg.limit, seg.dpl()), (u32::MAX, 0), "{n}");
        assert!(n == 1 || (seg.selector, seg.base) == (0, 0), "{n}");
    }
    assert_eq!(s.nmi_blocked, 1);
    assert_eq!(s.seg[1].attr & attr::DB, 0, "16-bit code");
}

/// An SMI handler in its own right: relocates, writes a register in the save area, returns; the next SMI goes elsewhere.
#[test]
fn a_handler_relocates_smram() {
    let mut v = long_mode();
    // mov dword [0x3fef8], 0x50000; inc dword [0x3ff5c]; rsm
    let relocate = [0x66, 0x67, 0xc7, 0x05, 0xf8, 0xfe, 3, 0, 0, 0, 5, 0];
    let count = [0x66, 0x67, 0xff, 0x05, 0x5c, 0xff, 3, 0, 0x0f, 0xaa];
    poke(&v, BASE + 0x8000, &relocate);
    poke(&v, BASE + 0x8000 + 12, &count);
    // add dword [0x5ff5c], 16; rsm
    poke(&v, 0x5_8000, &[0x66, 0x67, 0x83, 0x05, 0x5c, 0xff, 5, 0, 16, 0x0f, 0xaa]);
    // inc rbx; jmp back
    poke(&v, CODE, &[0x48, 0xff, 0xc3, 0xeb, 0xfb]);
    (v.state.rip, v.state.gpr[0]) = (CODE, 100);
    send(&mut v, SMI);
    run(&mut v, 4);
    assert!(!v.smm.is_active());
    assert_eq!((v.state.gpr[0], v.smm.base, v.smm.count), (101, 0x5_0000, 1));
    assert!(v.state.gpr[3] != 0, "the program goes on in 64-bit mode");
    for total in [117, 133] {
        send(&mut v, SMI);
        run(&mut v, 4);
        assert_eq!(v.state.gpr[0], total);
    }
    assert_eq!(saved(&v, 0x5_0000, 0x7ef8, 4), 0x5_0000);
    assert_eq!(msrs::read(&mut v, 0x34).unwrap(), 3, "MSR_SMI_COUNT");
    assert_eq!(v.counters.smis, 3);
}

#[test]
fn a_halted_processor_halts_again_or_not() {
    for clear in [false, true] {
        let mut v = long_mode();
        // mov word [0x3ff02], 0; rsm
        let handler: &[u8] = if clear { &[0x67, 0xc7, 0x05, 2, 0xff, 3, 0, 0, 0, 0x0f, 0xaa] } else { &[0x0f, 0xaa] };
        poke(&v, BASE + 0x8000, handler);
        // hlt; inc rbx; jmp $
        poke(&v, CODE, &[0xf4, 0x48, 0xff, 0xc3, 0xeb, 0xfe]);
        v.state.rip = CODE;
        run(&mut v, 2);
        assert_eq!((v.state.halted, v.state.rip), (1, CODE + 1));
        smi(&mut v);
        assert_eq!((v.state.halted, saved(&v, BASE, 0x7f02, 2)), (0, 1));
        run(&mut v, 4);
        assert_eq!((v.state.halted, v.state.gpr[3]), if clear { (0, 1) } else { (1, 0) });
    }
}

#[test]
fn rsm_is_undefined_outside_smm() {
    let mut v = long_mode();
    assert_eq!(exception(smm::rsm(&mut v)), Exception::UD);
    poke(&v, CODE, &[0x0f, 0xaa]);
    v.state.rip = CODE;
    run(&mut v, 1);
    assert_eq!(peek64(&v, v.state.gpr[4]), CODE, "delivered through vector 6 with RIP at the RSM");
}

#[test]
fn invalid_state_shuts_down() {
    let good_cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::ET | cr0::NE;
    for (what, offset, value) in [
        ("a reserved bit of CR4", 0x7e40, cr4::PAE | 1 << 15),
        ("CR4.VMXE", 0x7e40, cr4::PAE | cr4::VMXE),
        ("no PAE in IA-32e mode", 0x7e40, 0),
        ("PG without PE", 0x7ff8, good_cr0 & !cr0::PE),
        ("NW without CD", 0x7ff8, good_cr0 | cr0::NW),
        ("a high bit of CR0", 0x7ff8, good_cr0 | 1 << 32),
        ("a reserved bit of EFER", 0x7fe0, efer::LME | efer::LMA | 2),
        ("LMA without LME", 0x7fe0, efer::LMA),
        ("CR3 above the physical addresses", 0x7ff0, 1 << 52),
    ] {
        let mut v = busy();
        smi(&mut v);
        save(&v, offset, value);
        smm::rsm(&mut v).unwrap();
        assert_eq!(dispatch::step(&mut v), Err(Shutdown::TripleFault), "{what}");
    }
    // PCIDs outside IA-32e mode.
    let mut v = vcpu();
    smi(&mut v);
    save(&v, 0x7e40, cr4::PCIDE);
    smm::rsm(&mut v).unwrap();
    assert_eq!(dispatch::step(&mut v), Err(Shutdown::TripleFault));
}

#[test]
fn nmi_init_and_smi_wait_for_rsm() {
    let mut v = long_mode();
    // SMM: inc ecx; loop on memory that the test sets; rsm
    poke(&v, BASE + 0x8000, &[0x67, 0x80, 0x3d, 0, 0, 6, 0, 0, 0x74, 0xf6, 0x0f, 0xaa]);
    poke(&v, CODE, &[0xeb, 0xfe]);
    poke(&v, HANDLERS + 32, &[0xeb, 0xfe]);
    v.state.rip = CODE;
    smi(&mut v);
    for message in [NMI, SMI] {
        send(&mut v, message);
        run(&mut v, 2);
        assert!(v.smm.is_active() && v.smm.count == 1);
    }
    poke(&v, 0x6_0000, &[1]);
    // RSM, the second SMI, RSM, the NMI.
    run(&mut v, 6);
    assert_eq!((v.smm.count, v.state.rip), (2, HANDLERS + 32));
    // In the NMI's handler NMIs are blocked, after an SMI as before.
    smi(&mut v);
    run(&mut v, 2);
    assert!(!v.smm.is_active());
    assert_eq!(v.state.nmi_blocked, 1);
    // INIT resets, and keeps SMBASE.
    poke(&v, 0x6_0000, &[0]);
    v.smm.base = 0x3_0000;
    smi(&mut v);
    save(&v, 0x7ef8, 0x5_0000);
    send(&mut v, INIT);
    run(&mut v, 2);
    assert!(v.smm.is_active());
    poke(&v, 0x6_0000, &[1]);
    run(&mut v, 1);
    assert!(!v.smm.is_active());
    dispatch::start_up_signals(&mut v);
    assert_eq!((v.state.rip, v.state.cr0 & cr0::PE, v.smm.base), (0xfff0, 0, 0x5_0000));
}

/// SMIs are not recognized in the shadow of a load of SS.
#[test]
fn mov_ss_puts_an_smi_off() {
    let mut v = long_mode();
    poke(&v, CODE, &[0x48, 0xff, 0xc3, 0xeb, 0xfe]);
    (v.state.rip, v.state.shadow) = (CODE, 2);
    send(&mut v, SMI);
    dispatch::step(&mut v).unwrap();
    assert!(!v.smm.is_active());
    smm::take(&mut v).unwrap();
    assert_eq!((v.smm.is_active(), saved(&v, BASE, 0x7fd8, 8), v.state.gpr[3]), (true, CODE + 3, 1));
}

#[test]
fn the_base_can_be_read_in_smm_only() {
    let mut v = long_mode();
    assert!(msrs::read(&mut v, msr::SMBASE).is_err());
    smi(&mut v);
    assert_eq!(msrs::read(&mut v, msr::SMBASE), Ok(BASE));
    assert!(msrs::write(&mut v, msr::SMBASE, 0).is_err());
    smm::rsm(&mut v).unwrap();
    assert!(msrs::read(&mut v, msr::SMBASE).is_err());
}

/// The chipset's port: the SMI comes right after the OUT, which the save area names, and which may run again.
#[test]
fn an_smi_by_port_can_restart_the_instruction() {
    for (out, kind, restart) in [(&[0xe6, 0xb2][..], 8, false), (&[0xee, 0x90], 0, false), (&[0xe6, 0xb2], 8, true)] {
        let mut v = long_mode();
        v.with_devices(|p| p.io_write(smi::FIRST_PORT, 1, 0x21));
        // A handler that counts in EBX's place and, the first time only, asks for the restart.
        let mut handler = vec![0x66, 0x67, 0xff, 0x05, 0x74, 0xff, 3, 0];
        if restart {
            // cmp byte [0x3ff74], 1; jne +9; mov word [0x3ff00], 0xff
            handler.extend([0x67, 0x80, 0x3d, 0x74, 0xff, 3, 0, 1, 0x75, 9]);
            handler.extend([0x67, 0xc7, 0x05, 0, 0xff, 3, 0, 0xff, 0]);
        }
        handler.extend([0x0f, 0xaa]);
        poke(&v, BASE + 0x8000, &handler);
        // inc rcx; mov dl, 0xb2; out; inc rcx; jmp $
        poke(&v, CODE, &[0x48, 0xff, 0xc1, 0xb2, 0xb2]);
        poke(&v, CODE + 5, out);
        poke(&v, CODE + 7, &[0x48, 0xff, 0xc1, 0xeb, 0xfe]);
        (v.state.rip, v.state.gpr[2]) = (CODE, 0);
        run(&mut v, 20);
        assert_eq!(saved(&v, BASE, 0x7fa4, 4), 0xb2_0003 | kind << 4, "{restart}");
        let after = CODE + 5 + if kind == 8 { 2 } else { 1 };
        assert_eq!((saved(&v, BASE, 0x7de8, 8), saved(&v, BASE, 0x7fd8, 8)), (CODE + 5, after));
        assert_eq!((v.state.gpr[3], v.state.gpr[1]), (if restart { 2 } else { 1 }, 2));
    }
}

/// Without the chipset's leave the port is a port.
#[test]
fn the_port_raises_nothing_after_reset() {
    let mut v = long_mode();
    poke(&v, CODE, &[0xe6, 0xb2, 0x48, 0xff, 0xc1, 0xeb, 0xfe]);
    v.state.rip = CODE;
    run(&mut v, 4);
    assert_eq!((v.smm.count, v.state.gpr[1]), (0, 1));
}

/// SDM Vol 3A, "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT".
#[test]
fn init_keeps_what_a_reset_clears() {
    let mut v = long_mode();
    v.state.xcr0 = 7;
    v.state.vec[3] = [1, 2, 3, 4];
    v.state.fpr[2] = [5, 6];
    (v.state.fcw, v.state.mxcsr, v.state.msrs.lstar) = (0x27f, 0x1fa0, 0x1234);
    (v.cold.mtrr_def_type, v.state.msrs.tsc_offset) = (0xc06, 77);
    v.state.cr0 &= !(cr0::CD | cr0::NW);
    super::super::init(&mut v);
    let s = &v.state;
    assert_eq!((s.rip, s.cr0, s.cr4, s.efer, s.gpr[0]), (0xfff0, cr0::ET, 0, 0, 0));
    assert_eq!((s.xcr0, s.vec[3], s.fpr[2]), (7, [1, 2, 3, 4], [5, 6]));
    assert_eq!((s.fcw, s.mxcsr, s.msrs.lstar, s.msrs.tsc_offset), (0x27f, 0x1fa0, 0x1234, 77));
    assert_eq!(v.cold.mtrr_def_type, 0xc06);
    super::super::reset(&mut v);
    let s = &v.state;
    assert_eq!((s.xcr0, s.vec[3], s.fcw, s.mxcsr, s.msrs.lstar), (1, [0; 4], 0x40, 0x1f80, 0));
    assert_eq!((v.cold.mtrr_def_type, v.smm.base), (0, smm::DEFAULT_BASE));
}

/// Whatever the save area holds, RSM loads it or shuts down, and the processor goes on from there.
#[test]
fn a_damaged_save_area_never_panics() {
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (mut down, mut up) = (0, 0);
    for round in 0..200 {
        let mut v = if round & 1 == 0 { busy() } else { vcpu() };
        smi(&mut v);
        for _ in 0..=random() % 3 {
            let at = [0x7ff8, 0x7ff0, 0x7fe8, 0x7fe0, 0x7fd8, 0x7e40, 0x7ef8, 0x7f00][random() as usize & 7];
            let old = saved(&v, BASE, at, 8);
            save(&v, at, if random() & 1 == 0 { old ^ 1 << (random() & 31) } else { random() });
        }
        smm::rsm(&mut v).unwrap();
        let ended = (0..4).any(|_| dispatch::step(&mut v).is_err());
        *(if ended { &mut down } else { &mut up }) += 1;
        v.smm.pending = false;
    }
    assert!(down > 20 && up > 5, "{down} {up}");
}
