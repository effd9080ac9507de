//! The modes that follow from the registers: the key bits of translations, and the address space.
//!
//! Place in the pipeline: the dispatcher calls [`tb_flags`] after everything that may have changed the mode;
//! [`refresh_space`] runs when a control register that paging depends on changed.

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::fpu::{fcw, fsw};
use twofold_arch::segment::attr;
use twofold_arch::{CpuState, Segment, TbFlags};

use crate::vcpu::Vcpu;

/// Index of CS in `CpuState::seg`.
pub(super) const CS: usize = 1;
/// Index of SS in `CpuState::seg`.
pub(super) const SS: usize = 2;
/// Index of LDTR in `CpuState::seg`.
pub(super) const LDTR: usize = 6;
/// Index of TR in `CpuState::seg`.
pub(super) const TR: usize = 7;

/// Whether IA-32e mode is active.
#[must_use]
#[inline]
pub const fn is_long(s: &CpuState) -> bool {
    s.efer & efer::LMA != 0
}

/// Whether 64-bit code runs.
#[must_use]
#[inline]
pub const fn is_64bit(s: &CpuState) -> bool {
    s.efer & efer::LMA != 0 && s.seg[CS].attr & attr::L != 0
}

/// Whether CR0.PE = 1 and RFLAGS.VM = 0.
#[must_use]
#[inline]
pub const fn is_protected(s: &CpuState) -> bool {
    s.cr0 & cr0::PE != 0 && s.rflags_sys & rflags::VM == 0
}

/// Whether the processor is in virtual-8086 mode.
#[must_use]
#[inline]
pub const fn is_v86(s: &CpuState) -> bool {
    s.cr0 & cr0::PE != 0 && s.rflags_sys & rflags::VM != 0
}

/// IOPL, 0..=3.
#[must_use]
#[inline]
pub const fn iopl(s: &CpuState) -> u32 {
    (s.rflags_sys >> 12) as u32 & 3
}

/// Width of canonical linear addresses.
#[must_use]
#[inline]
pub const fn canonical_width(s: &CpuState) -> u32 {
    if s.cr4 & cr4::LA57 != 0 { 57 } else { 48 }
}

/// Whether `la` is canonical under CR4.LA57.
#[must_use]
#[inline]
pub const fn is_canonical(s: &CpuState, la: u64) -> bool {
    twofold_arch::LinearAddr(la).is_canonical(canonical_width(s))
}

/// Whether a base or entry point that is loaded into a register is canonical: those are compared with the width that the
/// processor supports, whether or not 5-level paging is on (SDM Vol 1, "Canonicality Checking").
#[must_use]
#[inline]
pub fn is_canonical_base(v: &Vcpu, la: u64) -> bool {
    twofold_arch::LinearAddr(la).is_canonical(u32::from(v.model.linear_bits().max(48)))
}

/// Mask of RIP and near offsets in the code that runs.
#[must_use]
#[inline]
pub const fn rip_mask(s: &CpuState) -> u64 {
    if is_64bit(s) {
        u64::MAX
    } else if s.seg[CS].attr & attr::DB != 0 {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// The key bits of a translation made now, at `state.rip`.
#[must_use]
pub fn tb_flags(s: &CpuState) -> TbFlags {
    let rf = s.rflags_sys;
    let mut f = s.cpl << TbFlags::CPL_SHIFT;
    let mem = if s.cpl == 3 {
        0
    } else if s.cr4 & cr4::SMAP == 0 || rf & rflags::AC != 0 {
        1
    } else {
        2
    };
    f |= mem << TbFlags::MEM_SHIFT;
    if is_64bit(s) {
        f |= 2 | TbFlags::SS32 | 0b1111 << TbFlags::ZERO_BASE_SHIFT;
        f |= if s.cr4 & cr4::LA57 != 0 { TbFlags::WIDE_LINEAR } else { 0 };
    } else {
        f |= segment_flags(s);
    }
    let bit = |on: bool, flag: u32| if on { flag } else { 0 };
    f |= bit(s.efer & efer::LMA != 0, TbFlags::LONG);
    if s.cr0 & cr0::PE != 0 {
        f |= if rf & rflags::VM != 0 { TbFlags::VM86 } else { TbFlags::PROTECTED };
    }
    if rf & (rflags::TF | rflags::AC) != 0 {
        f |= bit(rf & rflags::TF != 0, TbFlags::TF);
        f |= bit(rf & rflags::AC != 0 && s.cr0 & cr0::AM != 0 && s.cpl == 3, TbFlags::ALIGN_CHECK);
    }
    f |= bit(s.shadow != 0, TbFlags::ONE_INSN);
    f |= bit(s.cr0 & (cr0::EM | cr0::TS) != 0, TbFlags::X87_NM);
    f |= bit(s.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS, TbFlags::WAIT_NM);
    f |= bit(s.cr0 & cr0::EM != 0 || s.cr4 & cr4::OSFXSR == 0, TbFlags::SSE_UD);
    f |= bit(s.cr0 & cr0::TS != 0, TbFlags::TS);
    f |= bit(s.cr0 & cr0::EM != 0, TbFlags::MMX_UD);
    f |= bit(s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & 6 == 6, TbFlags::AVX);
    f |= bit(s.mxcsr & 0x1f80 != 0x1f80, TbFlags::SSE_UNMASKED);
    let masked = s.fcw & fcw::MASKS == fcw::MASKS && s.fsw & fsw::ES == 0;
    f |= bit(masked && cfg!(all(target_arch = "x86_64", not(portable_host))), TbFlags::X87_HOST);
    TbFlags(f).at(s.rip)
}

/// Code size, stack size, and which segments are flat, outside 64-bit mode.
fn segment_flags(s: &CpuState) -> u32 {
    let mut f = 0;
    if s.seg[CS].attr & attr::DB != 0 {
        f |= 1;
    }
    if s.seg[SS].attr & attr::DB != 0 {
        f |= TbFlags::SS32;
    }
    for (i, seg) in s.seg.iter().enumerate().take(6) {
        if needs_no_check(seg, i == CS) {
            f |= 1 << (TbFlags::NOLIMIT_SHIFT as usize + i);
        }
        if i < 4 && seg.base == 0 {
            f |= 1 << (TbFlags::ZERO_BASE_SHIFT as usize + i);
        }
    }
    f
}

/// Whether every access through the segment passes: expand-up, usable, readable and writable (CS: readable), 4 GiB.
fn needs_no_check(seg: &Segment, cs: bool) -> bool {
    if seg.limit != u32::MAX || seg.attr & (attr::UNUSABLE | attr::P | attr::S) != attr::P | attr::S {
        return false;
    }
    if cs && seg.attr & attr::CODE != 0 {
        seg.attr & attr::RW != 0
    } else {
        seg.attr & (attr::CODE | attr::EC | attr::RW) == attr::RW
    }
}

/// Makes the address space that `mmu` is asked with from CR0, CR3, CR4, EFER, PKRU and the PDPTE registers.
pub fn refresh_space(v: &mut Vcpu) {
    let s = &v.state;
    let mut space = v.space.with_registers(s.cr0, s.cr3, s.cr4, s.efer);
    space.pdptes = s.pdpte;
    space.pkru = s.pkru;
    space.maxphyaddr = v.model.phys_bits;
    space.gigabyte_pages = v.model.has(super::cpuid::Bit::Pdpe1gb);
    v.space = space;
}
