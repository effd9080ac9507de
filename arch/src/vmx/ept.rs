//! EPT: the EPTP, and the bits of EPT paging-structure entries (SDM Vol 3C, "The Extended Page Table Mechanism").
#![allow(missing_docs)]

use crate::paging::bits;

/// Bits of an EPT entry.
pub const R: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
/// Execute; with mode-based execute control, execute from supervisor-mode linear addresses.
pub const X: u64 = 1 << 2;
/// R, W and X: an entry with none of them (and, with mode-based execute control, not bit 10) is not present.
pub const RWX: u64 = R | W | X;
/// Leaf: memory type, bits 5:3.
pub const MEMORY_TYPE: u64 = 7 << 3;
pub const MEMORY_TYPE_SHIFT: u32 = 3;
/// Leaf: ignore the guest's PAT.
pub const IGNORE_PAT: u64 = 1 << 6;
/// The entry maps a page (PDPTE, PDE).
pub const PS: u64 = 1 << 7;
pub const A: u64 = 1 << 8;
pub const D: u64 = 1 << 9;
/// With mode-based execute control: execute from user-mode linear addresses.
pub const XU: u64 = 1 << 10;
/// Leaf, with guest-paging verification.
pub const VERIFY_GUEST_PAGING: u64 = 1 << 57;
/// Leaf, with EPT paging-write control.
pub const PAGING_WRITE: u64 = 1 << 58;
/// Leaf, with supervisor shadow-stack control.
pub const SUPERVISOR_SHADOW_STACK: u64 = 1 << 60;
/// 4 KiB leaf, with sub-page write permissions.
pub const SUB_PAGE_WRITE: u64 = 1 << 61;
/// Leaf: an EPT violation here is a VM exit, not #VE.
pub const SUPPRESS_VE: u64 = 1 << 63;
/// Bits 51:12.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Memory types as EPT entries and EPTPs encode them.
pub mod memory_type {
    pub const UC: u64 = 0;
    pub const WC: u64 = 1;
    pub const WT: u64 = 4;
    pub const WP: u64 = 5;
    pub const WB: u64 = 6;

    /// Whether `t` is a memory type at all; 2, 3 and 7 are reserved.
    #[inline]
    #[must_use]
    pub const fn is_valid(t: u64) -> bool {
        matches!(t, UC | WC | WT | WP | WB)
    }

    /// Uncached as only the PAT has it: UC, which the type of the memory may turn into WC.
    pub const UC_MINUS: u64 = 7;

    /// The type that accesses to a page have, from EPT's, its ignore-PAT flag and the PAT's, while CR0.CD is 0 (SDM Vol 3C,
    /// "Memory Type Used for Translated Guest-Physical Addresses"; Vol 3A, "Selecting Memory Types for Pentium III and More
    /// Recent Processor Families", with EPT's type for the MTRRs').
    #[must_use]
    pub const fn effective(ept: u64, ignore_pat: bool, pat: u64) -> u64 {
        if ignore_pat {
            return ept;
        }
        match (pat, ept) {
            (WB, ept) => ept,
            (WC, _) | (UC_MINUS, WC | WP) => WC,
            (WT, WT | WP | WB) => WT,
            (WP, WT | WP | WB) => WP,
            _ => UC,
        }
    }

    /// The name of a type.
    #[must_use]
    pub const fn name(t: u64) -> &'static str {
        match t {
            UC => "UC",
            WC => "WC",
            WT => "WT",
            WP => "WP",
            WB => "WB",
            UC_MINUS => "UC-",
            _ => "reserved",
        }
    }
}

/// Reserved in every present EPT entry: bits 51:MAXPHYADDR.
#[inline]
#[must_use]
pub const fn reserved(maxphyaddr: u32) -> u64 {
    bits(51, maxphyaddr)
}

/// Reserved, besides, in an entry that references another EPT paging structure: 7:3 (6:3 above which bit 7 is PS = 0).
/// At the top levels, where no page can be mapped, bit 7 is reserved too.
#[inline]
#[must_use]
pub const fn table_reserved(may_map_page: bool) -> u64 {
    if may_map_page { bits(6, 3) } else { bits(7, 3) }
}

/// Reserved, besides, in an entry that maps a page of `1 << shift` bytes: address bits below the page size.
#[inline]
#[must_use]
pub const fn page_reserved(shift: u8) -> u64 {
    bits(shift as u32 - 1, 12)
}

/// The extended-page-table pointer: memory type 2:0, walk length minus 1 5:3, accessed/dirty enable 6, supervisor shadow
/// stack enable 7, address of the EPT PML4 (PML5) table 51:12.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(transparent)]
pub struct Eptp(pub u64);

impl Eptp {
    pub const ACCESSED_DIRTY: u64 = 1 << 6;
    pub const SHADOW_STACK: u64 = 1 << 7;

    /// Memory type of accesses to EPT structures.
    #[must_use]
    pub const fn memory_type(self) -> u64 {
        self.0 & 7
    }
    /// Levels of the walk: 4 or 5 when valid.
    #[must_use]
    pub const fn levels(self) -> u64 {
        (self.0 >> 3 & 7) + 1
    }
    /// Whether accessed and dirty flags are kept.
    #[must_use]
    pub const fn accessed_dirty(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }
    /// The physical address of the top table: EP4TA, what cached mappings are tagged with.
    #[must_use]
    pub const fn table(self) -> u64 {
        self.0 & ADDR
    }
}

/// The sub-page-permission table (SDM Vol 3C, "Sub-Page Write Permissions"): four levels of 8-byte entries, of which the last
/// is a vector of permissions: bit 2i for the i-th 128 bytes of the page.
pub mod sppt {
    use crate::paging::bits;

    /// The entry references a table.
    pub const VALID: u64 = 1 << 0;
    /// Reserved in a vector: the odd bits.
    pub const VECTOR_RESERVED: u64 = 0xaaaa_aaaa_aaaa_aaaa;
    /// Bytes that one permission is for.
    pub const SUB_PAGE: u64 = 128;
    /// Guest-physical addresses that the four levels cover.
    pub const WIDTH: u32 = 48;

    /// Reserved in a valid entry that references a table: all but bit 0 and the table's address.
    #[inline]
    #[must_use]
    pub const fn reserved(maxphyaddr: u32) -> u64 {
        !(VALID | bits(maxphyaddr - 1, 12))
    }

    /// The bit of a vector that lets the byte at this guest-physical address be written.
    #[inline]
    #[must_use]
    pub const fn vector_bit(gpa: u64) -> u64 {
        1 << (2 * (gpa >> 7 & 31))
    }
}

/// The virtualization-exception information area, by byte offset (SDM Vol 3C, "Virtualization Exceptions").
pub mod ve_info {
    pub const EXIT_REASON: u64 = 0;
    pub const BUSY: u64 = 4;
    pub const EXIT_QUALIFICATION: u64 = 8;
    pub const GUEST_LINEAR_ADDRESS: u64 = 16;
    pub const GUEST_PHYSICAL_ADDRESS: u64 = 24;
    pub const EPTP_INDEX: u64 = 32;
}

/// Entries of a page-modification log; the PML index counts down from `PML_ENTRIES - 1`.
pub const PML_ENTRIES: u64 = 512;
/// Entries of an EPTP list.
pub const EPTP_LIST_ENTRIES: u64 = 512;

#[cfg(test)]
mod tests {
    /// Row F11: the SDM's table, a line for each type of the PAT.
    #[test]
    fn f11_effective_memory_types() {
        use super::memory_type::*;
        let ept = [UC, WC, WT, WP, WB];
        for (pat, expected) in [
            (UC, [UC, UC, UC, UC, UC]),
            (UC_MINUS, [UC, WC, UC, WC, UC]),
            (WC, [WC, WC, WC, WC, WC]),
            (WT, [UC, UC, WT, WT, WT]),
            (WP, [UC, UC, WP, WP, WP]),
            (WB, ept),
        ] {
            for (e, expected) in ept.into_iter().zip(expected) {
                assert_eq!(effective(e, false, pat), expected, "EPT {}, PAT {}", name(e), name(pat));
                assert_eq!(effective(e, true, pat), e);
            }
        }
    }
}
