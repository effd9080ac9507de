//! PKRU as component 9 of the XSAVE feature set (SDM Vol 1, "PKRU State").

use twofold_arch::control::xcr0;
use twofold_arch::fpu::area as form;

use super::*;
use crate::cpu::{control, mode};
use crate::fpu::{self, area};

/// Where the area is.
const AREA: u64 = 0x4_0000;
const ALL: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;
const COMPACT: u64 = 1 << 63;

/// 64-bit mode with all components enabled, and EDX:EAX asking for `wanted`.
fn with(wanted: u64) -> Box<Vcpu> {
    let mut v = long_mode();
    v.state.cr4 |= cr4::OSXSAVE | cr4::PKE;
    v.state.xcr0 = ALL;
    v.state.tb_flags = mode::tb_flags(&v.state).0;
    fpu::x87::init(&mut v.state);
    ask(&mut v, wanted);
    v
}
fn ask(v: &mut Vcpu, wanted: u64) {
    (v.state.gpr[0], v.state.gpr[2]) = (wanted & 0xffff_ffff, wanted >> 32);
}
fn header(v: &Vcpu) -> (u64, u64) {
    (peek64(v, AREA + 512), peek64(v, AREA + 520))
}

#[test]
fn xsetbv_takes_bit_9() {
    let mut v = with(0);
    for (value, good) in [(ALL, true), (1 | xcr0::PKRU, true), (xcr0::PKRU, false), (ALL | 1 << 8, false)] {
        v.state.gpr[1] = 0;
        ask(&mut v, value);
        assert_eq!(control::xsetbv(&mut v).is_ok(), good, "{value:#x}");
    }
    let mut v = vcpu_of(CpuModel::parse("max,-pku").unwrap());
    v.state.cr4 |= cr4::OSXSAVE;
    v.state.gpr[1] = 0;
    ask(&mut v, ALL);
    assert_gp(control::xsetbv(&mut v), 0);
}

#[test]
fn each_form_saves_and_restores_it() {
    for (save, compact) in [(form::XSAVE, false), (form::XSAVEOPT, false), (form::XSAVEC, true), (form::XSAVES, true)] {
        for (wanted, at) in [(ALL, 832), (xcr0::PKRU, if compact { 576 } else { 832 })] {
            let mut v = with(wanted);
            poke(&v, AREA, &[0xff; 512]);
            poke(&v, AREA + 576, &[0xff; 272]);
            control::set_pkru(&mut v, 0x5555_5554);
            v.state.vec[1][2] = 7;
            fpu::save_state(&mut *v, AREA, save).unwrap();
            assert_eq!(peek64(&v, AREA + at), 0x5555_5554, "{save} {wanted:#x}");
            assert_eq!(area::pkru_offset(header(&v).1), at as usize);
            assert_eq!(header(&v).1, if compact { COMPACT | wanted } else { 0 });
            assert_eq!(header(&v).0 & (xcr0::PKRU | xcr0::AVX), wanted & (xcr0::PKRU | xcr0::AVX));
            control::set_pkru(&mut v, 3);
            let restore = if compact { form::XSAVES } else { form::XSAVE };
            fpu::restore_state(&mut *v, AREA, restore).unwrap();
            assert_eq!((v.state.pkru, v.space.pkru), (0x5555_5554, 0x5555_5554));
        }
    }
}

/// A PKRU of 0 is the initial configuration: XSAVEOPT and XSAVEC leave it out, XRSTOR makes it so.
#[test]
fn the_initial_configuration_is_zero() {
    for save in [form::XSAVE, form::XSAVEOPT, form::XSAVEC] {
        let mut v = with(ALL);
        poke(&v, AREA, &[0; 576]);
        poke64(&v, AREA + 832, 0x77);
        fpu::save_state(&mut *v, AREA, save).unwrap();
        assert_eq!(header(&v).0 & xcr0::PKRU, 0);
        assert_eq!(peek64(&v, AREA + 832), if save == form::XSAVE { 0 } else { 0x77 }, "{save}");
        control::set_pkru(&mut v, 0xc);
        fpu::restore_state(&mut *v, AREA, form::XSAVE).unwrap();
        assert_eq!((v.state.pkru, v.space.pkru), (0, 0));
    }
    // XINUSE.
    let mut v = with(ALL);
    v.state.gpr[1] = 1;
    assert_eq!(control::xgetbv(&mut v), Ok(0));
    control::set_pkru(&mut v, 4);
    v.state.gpr[1] = 1;
    assert_eq!(control::xgetbv(&mut v), Ok(xcr0::PKRU));
}

#[test]
fn what_is_not_asked_for_stays() {
    let mut v = with(ALL & !xcr0::PKRU);
    control::set_pkru(&mut v, 0x30);
    poke64(&v, AREA + 832, 0x77);
    fpu::save_state(&mut *v, AREA, form::XSAVE).unwrap();
    assert_eq!((header(&v).0 & xcr0::PKRU, peek64(&v, AREA + 832)), (0, 0x77));
    fpu::restore_state(&mut *v, AREA, form::XSAVE).unwrap();
    assert_eq!(v.state.pkru, 0x30);
    // Not enabled in XCR0: the header may not name it.
    v.state.xcr0 = ALL & !xcr0::PKRU;
    poke64(&v, AREA + 512, ALL);
    assert_gp(fpu::restore_state(&mut *v, AREA, form::XSAVE), 0);
}

/// A restore changes what data accesses may do at once: translations of the TLB that depend on the key go.
#[test]
fn a_restored_pkru_takes_effect() {
    let mut v = with(ALL);
    // Both pages of 2 MiB for users, the second with key 1.
    let entry = peek64(&v, 0x3008);
    poke64(&v, 0x3008, entry | 1 << 59);
    control::write_cr3(&mut v, PML4).unwrap();
    let cr4 = v.state.cr4;
    v.state.cr4 &= !cr4::PKE;
    control::write_cr4(&mut v, cr4).unwrap();
    let read = |v: &mut Vcpu| v.read(LinearAddr(0x20_0000), 4, MemAs::Cpl).is_ok();
    v.state.cpl = 3;
    assert!(read(&mut v));
    control::set_pkru(&mut v, 1 << 2);
    assert!(!read(&mut v));
    fpu::save_state(&mut *v, AREA, form::XSAVE).unwrap();
    control::set_pkru(&mut v, 0);
    assert!(read(&mut v));
    fpu::restore_state(&mut *v, AREA, form::XSAVE).unwrap();
    assert!(!read(&mut v));
}
