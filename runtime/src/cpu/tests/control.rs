//! Control registers, MSRs, segments and CPUID (SDM Vol 3A, "Control Registers", "Paging"; Vol 2, MOV, LAR, LTR, XSETBV).

use twofold_arch::msr as m;
use twofold_arch::segment::attr;
use twofold_mmu::PagingMode;

use super::*;
use crate::cpu::segments::{self, load_seg, probe_selector};
use crate::cpu::{msr, ops};

#[test]
fn cr0_combinations_are_refused() {
    let mut v = vcpu();
    let base = v.state.cr0;
    for bad in [cr0::PG, cr0::NW, 1 << 32 | base] {
        assert_gp(cr::write_cr(&mut v, 0, bad), 0);
        assert_eq!(v.state.cr0, base);
    }
    // Undefined low bits are dropped, ET reads as 1.
    cr::write_cr0(&mut v, 1 << 10 | cr0::PE).unwrap();
    assert_eq!(v.state.cr0, cr0::PE | cr0::ET);
    // LMSW sets PE and cannot clear it.
    cr::lmsw(&mut v, 0, 0).unwrap();
    assert_ne!(v.state.cr0 & cr0::PE, 0);
}

#[test]
fn long_mode_needs_pae_and_is_left_only_from_compatibility_mode() {
    let mut v = vcpu();
    cr::write_efer(&mut v, efer::LME).unwrap();
    assert_gp(cr::write_cr(&mut v, 0, cr0::PE | cr0::PG), 0);
    let mut v = long_mode();
    assert_eq!(v.space.mode, PagingMode::Level4);
    let now = v.state.cr0;
    assert_gp(cr::write_cr(&mut v, 0, now & !cr0::PG), 0);
    assert_gp(cr::write_cr(&mut v, 4, 0), 0);
    assert_gp(cr::write_cr(&mut v, 4, cr4::PAE | cr4::LA57), 0);
    // EFER.LME may not change under paging; LMA is not software's to write.
    assert!(cr::write_efer(&mut v, efer::SCE).is_err());
    assert!(cr::write_efer(&mut v, 1 << 20).is_err());
    cr::write_efer(&mut v, efer::LME).unwrap();
    assert_eq!(v.state.efer, efer::LME | efer::LMA);
}

/// Row A4: five levels are turned on with paging off.
#[test]
fn five_level_paging_is_entered_with_paging_off() {
    let mut v = vcpu();
    poke64(&v, 0x7000, PML4 | 7);
    poke64(&v, PML4, 0x2007);
    poke64(&v, 0x2000, 0x3007);
    poke64(&v, 0x3000, 0x87);
    cr::write_cr4(&mut v, cr4::PAE | cr4::LA57).unwrap();
    cr::write_cr3(&mut v, 0x7000).unwrap();
    cr::write_efer(&mut v, efer::LME).unwrap();
    cr::write_cr0(&mut v, cr0::PE | cr0::PG).unwrap();
    assert_eq!(v.space.mode, PagingMode::Level5);
    poke64(&v, 0x1_0000, 77);
    assert_eq!(v.read(LinearAddr(0x1_0000), 8, MemAs::System), Ok(77));
    assert!(v.read(LinearAddr(1 << 56), 8, MemAs::System).is_err());
}

/// Row A2: a reserved bit in a PDPTE is #GP, and nothing is loaded.
#[test]
fn pdptes_are_loaded_and_checked_by_mov_cr3() {
    let mut v = vcpu();
    for i in 0..4 {
        poke64(&v, 0x4000 + 8 * i, 0x3001);
        poke64(&v, 0x5000 + 8 * i, 0x3001 | 1 << 5);
    }
    poke64(&v, 0x3000, 0x83);
    cr::write_cr4(&mut v, cr4::PAE).unwrap();
    cr::write_cr3(&mut v, 0x4000).unwrap();
    cr::write_cr0(&mut v, cr0::PE | cr0::PG).unwrap();
    assert_eq!((v.space.mode, v.state.pdpte), (PagingMode::Pae, [0x3001; 4]));
    assert_gp(cr::write_cr(&mut v, 3, 0x5000), 0);
    assert_eq!((v.state.cr3, v.state.pdpte), (0x4000, [0x3001; 4]));
    // Memory is not looked at again until a load.
    poke64(&v, 0x4000, 0);
    assert!(v.read(LinearAddr(0x1_0000), 4, MemAs::System).is_ok());
    cr::write_cr3(&mut v, 0x4000).unwrap();
    assert!(v.read(LinearAddr(0x1_0000), 4, MemAs::System).is_err());
}

#[test]
fn pcids_need_long_mode_and_an_empty_pcid() {
    let mut v = vcpu();
    assert_gp(cr::write_cr(&mut v, 4, cr4::PCIDE), 0);
    let mut v = long_mode();
    cr::write_cr3(&mut v, PML4 | 8).unwrap();
    assert_gp(cr::write_cr(&mut v, 4, cr4::PAE | cr4::PCIDE), 0);
    cr::write_cr3(&mut v, PML4).unwrap();
    // Bit 63 is reserved without PCIDs.
    assert_gp(cr::write_cr(&mut v, 3, PML4 | 1 << 63), 0);
    cr::write_cr4(&mut v, cr4::PAE | cr4::PGE | cr4::PCIDE).unwrap();
    cr::write_cr3(&mut v, PML4 | 5 | 1 << 63).unwrap();
    assert_eq!((v.state.cr3, v.space.pcid), (PML4 | 5, 5));
    // Physical addresses are 46 bits wide.
    assert_gp(cr::write_cr(&mut v, 3, 1 << 46), 0);
    let now = v.state.cr0;
    assert_gp(cr::write_cr(&mut v, 0, now & !cr0::PG), 0);
}

/// Rows A8 and A9: what MOV CR3, INVLPG and INVPCID drop shows in what a changed entry translates to.
#[test]
fn stale_translations_go_when_they_must() {
    let mut v = long_mode();
    // 4 KiB pages at 2 MiB: page 0 global, page 1 not.
    poke64(&v, 0x3008, 0x6007);
    poke64(&v, 0x6000, 0x10_0007 | 1 << 8);
    poke64(&v, 0x6008, 0x10_1007);
    cr::write_cr3(&mut v, PML4).unwrap();
    let (global, local) = (LinearAddr(2 << 20), LinearAddr((2 << 20) + 4096));
    for (pa, value) in [(0x10_0000, 1), (0x10_1000, 2), (0x10_2000, 3), (0x10_3000, 4)] {
        poke64(&v, pa, value);
    }
    let read = |v: &mut Vcpu, la| v.read(la, 8, MemAs::Cpl).unwrap();
    assert_eq!((read(&mut v, global), read(&mut v, local)), (1, 2));
    poke64(&v, 0x6000, 0x10_2007 | 1 << 8);
    poke64(&v, 0x6008, 0x10_3007);
    cr::write_cr3(&mut v, PML4).unwrap();
    assert_eq!(read(&mut v, local), 4);
    assert_eq!(read(&mut v, global), 1);
    cr::invlpg(&mut v, global.0).unwrap();
    assert_eq!(read(&mut v, global), 3);
    // INVPCID: types, reserved bits.
    poke64(&v, 0x6008, 0x10_1007);
    poke64(&v, 0x1_0000, 0);
    poke64(&v, 0x1_0008, local.0);
    cr::invpcid(&mut v, 0, 0x1_0000).unwrap();
    assert_eq!(read(&mut v, local), 2);
    assert_gp(cr::invpcid(&mut v, 4, 0x1_0000), 0);
    poke64(&v, 0x1_0000, 1 << 12);
    for kind in 0..4 {
        assert_gp(cr::invpcid(&mut v, kind, 0x1_0000), 0);
    }
    // A PCID counts only where a context is named.
    poke64(&v, 0x1_0000, 1);
    assert_gp(cr::invpcid(&mut v, 1, 0x1_0000), 0);
    cr::invpcid(&mut v, 2, 0x1_0000).unwrap();
    cr::invpcid(&mut v, 3, 0x1_0000).unwrap();
}

#[test]
fn xsetbv_and_pkru_have_their_checks() {
    let mut v = long_mode();
    assert_eq!(exception(cr::xsetbv(&mut v)), Exception::UD);
    assert_eq!(exception(cr::wrpkru(&mut v)), Exception::UD);
    cr::write_cr4(&mut v, cr4::PAE | cr4::OSXSAVE | cr4::PKE).unwrap();
    // AVX needs SSE, everything needs x87, bit 3 (MPX) is absent, and there is no XCR1.
    let writes =
        [(3u64, 0u64, true), (7, 0, true), (2, 0, false), (5, 0, false), (0xb, 0, false), (3, 1, false), (1, 0, true)];
    for (eax, ecx, ok) in writes {
        (v.state.gpr[0], v.state.gpr[1], v.state.gpr[2]) = (eax, ecx, 0);
        assert_eq!(cr::xsetbv(&mut v).is_ok(), ok, "{eax} {ecx}");
    }
    assert_eq!(v.state.xcr0, 1);
    (v.state.gpr[0], v.state.gpr[1], v.state.gpr[2]) = (0x5555_5554, 0, 0);
    cr::wrpkru(&mut v).unwrap();
    assert_eq!((v.state.pkru, v.space.pkru), (0x5555_5554, 0x5555_5554));
    v.state.gpr[2] = 1;
    assert_gp(cr::wrpkru(&mut v), 0);
}

#[test]
fn cr8_is_the_task_priority() {
    let mut v = long_mode();
    cr::write_cr(&mut v, 8, 5).unwrap();
    assert_eq!(v.platform().cr8(0), 5);
    assert_eq!(cr::read_cr(&mut v, 8), Ok(5));
    assert_gp(cr::write_cr(&mut v, 8, 16), 0);
}

#[test]
fn msrs_check_their_values() {
    let mut v = long_mode();
    for n in [m::LSTAR, m::CSTAR, m::FS_BASE, m::GS_BASE, m::KERNEL_GS_BASE, m::SYSENTER_ESP, m::SYSENTER_EIP] {
        assert!(msr::write(&mut v, n, 1 << 56).is_err(), "{n:#x}");
        msr::write(&mut v, n, 0xffff_8000_0000_0000).unwrap();
        assert_eq!(msr::read(&mut v, n), Ok(0xffff_8000_0000_0000), "{n:#x}");
    }
    assert!(msr::write(&mut v, m::PAT, 2).is_err());
    assert!(msr::write(&mut v, m::MTRR_DEF_TYPE, 2).is_err());
    msr::write(&mut v, m::MTRR_DEF_TYPE, 0xc06).unwrap();
    assert!(msr::write(&mut v, m::MTRR_PHYSBASE0 + 1, 1 << 50).is_err());
    assert!(msr::write(&mut v, m::FMASK, 1 << 32).is_err());
    assert!(msr::write(&mut v, m::XSS, 1).is_err());
    // Unknown: #GP(0), counted.
    assert_gp(msr::read(&mut v, 0x1234_5678), 0);
    assert!(msr::write(&mut v, 0x1234_5678, 0).is_err());
    assert_eq!((v.cold.unknown_msr_accesses, v.cold.unknown_msrs.len()), (2, 1));
    // RDMSR and WRMSR are for CPL 0.
    to_user(&mut v, 0x6000, 2);
    assert_gp(msr::rdmsr(&mut v), 0);
    assert_gp(msr::wrmsr(&mut v), 0);
}

/// SDM Vol 3B, "Time-Stamp Counter Adjustment": a write to the TSC moves IA32_TSC_ADJUST by as much, and the reverse.
#[test]
fn tsc_and_tsc_adjust_move_together() {
    let mut v = long_mode();
    v.shared.clock.set(1000);
    msr::write(&mut v, m::TSC, 5000).unwrap();
    assert_eq!(msr::read(&mut v, m::TSC), Ok(5000));
    assert_eq!(msr::read(&mut v, m::TSC_ADJUST), Ok(4000));
    msr::write(&mut v, m::TSC_ADJUST, 0).unwrap();
    assert_eq!(msr::read(&mut v, m::TSC), Ok(1000));
    v.state.cr4 |= cr4::TSD;
    ops::rdtsc(&mut v).unwrap();
    to_user(&mut v, 0x6000, 2);
    assert_gp(ops::rdtsc(&mut v), 0);
}

#[test]
fn segment_loads_are_checked() {
    let mut v = long_mode();
    // Code that is not readable, a system segment, not present.
    poke64(&v, GDT, 0);
    poke64(&v, GDT + 8, descriptor(0, 0xf_ffff, 0x99, 0xc));
    assert_eq!(load_seg(&mut v, 3, 8), Err(Exception::gp(8).into()));
    assert_eq!(load_seg(&mut v, 3, TSS_SEL), Err(Exception::gp(TSS_SEL.into()).into()));
    poke64(&v, GDT + 8, descriptor(0, 0xf_ffff, 0x13, 0xc));
    assert_eq!(load_seg(&mut v, 3, 8), Err(fault(Vector::SegmentNotPresent, 8).into()));
    assert_eq!(load_seg(&mut v, 2, 8), Err(fault(Vector::StackFault, 8).into()));
    assert_eq!(load_seg(&mut v, 3, 0x50), Err(Exception::gp(0x50).into()));
    // The Accessed bit is set in memory.
    poke64(&v, GDT + 8, descriptor(0x12_3000, 0xff, 0x92, 0x4));
    load_seg(&mut v, 3, 8).unwrap();
    assert_eq!(peek(&v, GDT + 13, 1), 0x93);
    assert_eq!((v.state.seg[3].base, v.state.seg[3].limit), (0x12_3000, 0xff));
    // Null SS: allowed in 64-bit mode below CPL 3.
    load_seg(&mut v, 2, 0).unwrap();
    assert_eq!(load_seg(&mut v, 2, 3), Err(Exception::GP0.into()));
    to_user(&mut v, 0x6000, 2);
    assert_eq!(load_seg(&mut v, 2, 3), Err(Exception::GP0.into()));
    assert_eq!(load_seg(&mut v, 3, KERNEL_DS), Err(Exception::gp(KERNEL_DS.into()).into()));
    load_seg(&mut v, 3, USER_DS).unwrap();
}

#[test]
fn probes_answer_through_zf() {
    use twofold_arch::control::rflags::{CF, ZF};
    let mut v = long_mode();
    v.state.set_rflags(CF);
    let mut probe = |selector, kind| {
        let value = probe_selector(&mut v, selector, kind).unwrap();
        assert_ne!(v.state.rflags() & CF, 0);
        (v.state.rflags() & ZF != 0).then_some(value)
    };
    assert_eq!(probe(KERNEL_DS, 0), Some(0x00c0_9300));
    assert_eq!(probe(KERNEL_DS, 1), Some(0xffff_ffff));
    assert_eq!(probe(TSS_SEL, 1), Some(0x67));
    assert_eq!((probe(KERNEL_CS, 2), probe(KERNEL_CS, 3)), (Some(0), None));
    assert_eq!((probe(0, 0), probe(0x50, 0)), (None, None));
}

#[test]
fn ltr_wants_an_available_tss() {
    let mut v = long_mode();
    assert_eq!(segments::ltr(&mut v, TSS_SEL), Err(Exception::gp(TSS_SEL.into()).into()));
    assert_eq!(segments::ltr(&mut v, 0), Err(Exception::GP0.into()));
    assert_eq!(segments::ltr(&mut v, TSS_SEL | 4), Err(Exception::gp(u32::from(TSS_SEL) | 4).into()));
    segments::lldt(&mut v, 0).unwrap();
    assert_ne!(v.state.seg[6].attr & attr::UNUSABLE, 0);
    // A selector in the LDT that is not there.
    assert_eq!(load_seg(&mut v, 3, 0xc), Err(Exception::gp(0xc).into()));
}

#[test]
fn debug_registers() {
    let mut v = long_mode();
    ops::write_dr(&mut v, 7, 0x401).unwrap();
    assert_eq!(ops::read_dr(&mut v, 5), Ok(0x401));
    assert_gp(ops::write_dr(&mut v, 7, 1 << 32), 0);
    v.state.cr4 |= cr4::DE;
    assert_eq!(exception(ops::read_dr(&mut v, 4)), Exception::UD);
    ops::write_dr(&mut v, 7, 1 << 13).unwrap();
    let fault = exception(ops::read_dr(&mut v, 0));
    assert_eq!(fault.vector, Vector::Debug);
    // Delivering the general-detect fault clears GD.
    super::super::deliver(&mut v, super::super::Event::Exception(fault)).unwrap();
    assert_eq!(v.state.dr[6] >> 13 & 1, 1);
    ops::read_dr(&mut v, 0).unwrap();
}
