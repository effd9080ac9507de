//! Bits of paging-structure entries, and which of them are reserved (SDM Vol 3A, "Paging").
//!
//! Pure definitions: the walks in `mmu` apply them. The `*_reserved` functions give the mask of bits that must be 0 in a
//! *present* entry; nothing is reserved in an entry whose P flag is 0.
#![allow(missing_docs)]

pub const P: u64 = 1 << 0;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
pub const PWT: u64 = 1 << 3;
pub const PCD: u64 = 1 << 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const NX: u64 = 1 << 63;

/// The PAT bit of an entry that maps a 4 KiB page.
pub const PAT_4K: u64 = 1 << 7;
/// The PAT bit of an entry that maps a larger page.
pub const PAT_LARGE: u64 = 1 << 12;
/// The lowest of the four protection-key bits.
pub const PKEY_SHIFT: u32 = 59;
/// Bits 51:12, where 64-bit entries keep a physical address.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
/// The PCID in CR3 when CR4.PCIDE = 1.
pub const CR3_PCID: u64 = 0xfff;
/// In the operand of MOV to CR3 when CR4.PCIDE = 1: keep the PCID's translations.
pub const CR3_KEEP: u64 = 1 << 63;

/// log2 of the page sizes.
pub const SHIFT_4K: u8 = 12;
pub const SHIFT_2M: u8 = 21;
pub const SHIFT_4M: u8 = 22;
pub const SHIFT_1G: u8 = 30;

/// Bits `hi:lo`.
#[inline]
#[must_use]
pub const fn bits(hi: u32, lo: u32) -> u64 {
    if hi < lo { 0 } else { (u64::MAX >> (63 - hi)) & (u64::MAX << lo) }
}

/// Reserved in every 64-bit entry of 4- and 5-level paging: bits 51:MAXPHYADDR, and NX when EFER.NXE = 0.
#[inline]
#[must_use]
pub const fn long_reserved(maxphyaddr: u32, nxe: bool) -> u64 {
    bits(51, maxphyaddr) | if nxe { 0 } else { NX }
}

/// Reserved in a PAE PDE or PTE: bits 62:MAXPHYADDR, and NX when EFER.NXE = 0.
#[inline]
#[must_use]
pub const fn pae_reserved(maxphyaddr: u32, nxe: bool) -> u64 {
    bits(62, maxphyaddr) | if nxe { 0 } else { NX }
}

/// Reserved in a PDPTE register of PAE paging: bits 2:1, 8:5 and 63:MAXPHYADDR.
#[inline]
#[must_use]
pub const fn pdpte_reserved(maxphyaddr: u32) -> u64 {
    bits(2, 1) | bits(8, 5) | bits(63, maxphyaddr)
}

/// Reserved, besides what is reserved in all entries, in a 64-bit entry that maps a page of `1 << shift` bytes: the
/// address bits below the page size other than the PAT bit.
#[inline]
#[must_use]
pub const fn large_reserved(shift: u8) -> u64 {
    bits(shift as u32 - 1, 13)
}

/// Reserved in a 32-bit PDE that maps a 4 MiB page: bit 21, and those bits of 20:13 that PSE-36 does not use because
/// MAXPHYADDR is below 40.
#[inline]
#[must_use]
pub const fn pse_reserved(maxphyaddr: u32) -> u64 {
    let m = if maxphyaddr > 40 { 40 } else { maxphyaddr };
    bits(21, m - 19)
}

/// The physical address of the 4 MiB page of a 32-bit PDE, PSE-36 bits included.
#[inline]
#[must_use]
pub const fn pse_address(pde: u64) -> u64 {
    (pde & 0xffc0_0000) | (pde & bits(20, 13)) << 19
}
