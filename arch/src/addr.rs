//! The three kinds of guest address, as types that do not convert into one another by accident.
//!
//! `LinearAddr` → guest paging → `GuestPhysAddr` → EPT → `PhysAddr` (the emulated bus). Invariant: there is no `From`
//! between them; with EPT off, [`GuestPhysAddr::without_ept`] is the one place where the identity is spelled.

use core::fmt;

/// log2 of the smallest page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Mask of the page number bits of an address.
pub const PAGE_MASK: u64 = !(PAGE_SIZE - 1);

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address rounded down to its 4 KiB page.
            #[inline]
            #[must_use]
            pub const fn page(self) -> Self {
                Self(self.0 & PAGE_MASK)
            }
            /// The offset of the address in its 4 KiB page, 0..4096.
            #[inline]
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.0 & !PAGE_MASK
            }
            /// The address `n` bytes on, modulo 2^64.
            #[inline]
            #[must_use]
            pub const fn wrapping_add(self, n: u64) -> Self {
                Self(self.0.wrapping_add(n))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address!(
    /// A linear address: what segmentation makes, what guest paging translates.
    LinearAddr
);
address!(
    /// A guest-physical address: what guest paging makes, what EPT translates.
    GuestPhysAddr
);
address!(
    /// A physical address on the emulated bus.
    PhysAddr
);

impl GuestPhysAddr {
    /// With EPT off, guest-physical addresses are physical addresses (SDM Vol 3C, "The Extended Page Table Mechanism").
    #[inline]
    #[must_use]
    pub const fn without_ept(self) -> PhysAddr {
        PhysAddr(self.0)
    }
}

impl LinearAddr {
    /// Whether the address is canonical for linear addresses of `width` bits (48, or 57 with CR4.LA57).
    #[inline]
    #[must_use]
    pub const fn is_canonical(self, width: u32) -> bool {
        let unused = 64 - width;
        ((self.0 << unused) as i64 >> unused) as u64 == self.0
    }
}
