//! Segment registers with their hidden parts, in the format of a VMCS access-rights field.

/// A segment register: selector and the cached descriptor.
///
/// `attr` has the layout of a VMCS access-rights field (SDM Vol 3C, "Guest Register State"): type 3:0, S 4, DPL 6:5,
/// P 7, AVL 12, L 13, D/B 14, G 15, unusable 16. `limit` is in bytes, granularity already applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u32,
    /// Access rights.
    pub attr: u32,
    /// The visible selector.
    pub selector: u16,
    /// Keeps the size a multiple of 8.
    pub reserved: [u16; 3],
}

/// Bits of [`Segment::attr`].
pub mod attr {
    #![allow(missing_docs)]
    pub const TYPE: u32 = 0xf;
    pub const ACCESSED: u32 = 1 << 0;
    /// Data: writable. Code: readable.
    pub const RW: u32 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub const EC: u32 = 1 << 2;
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const DPL: u32 = 3 << 5;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

impl Segment {
    /// Descriptor privilege level, 0..=3.
    #[must_use]
    pub const fn dpl(&self) -> u8 {
        ((self.attr & attr::DPL) >> attr::DPL_SHIFT) as u8
    }
    /// Requested privilege level of the selector, 0..=3.
    #[must_use]
    pub const fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    /// Whether `attr` has all of `bits`.
    #[must_use]
    pub const fn has(&self, bits: u32) -> bool {
        self.attr & bits == bits
    }
    /// The eight bytes of a code or data descriptor, without base bits above 31, as `(base, limit, attr)`.
    #[must_use]
    pub const fn from_descriptor(selector: u16, raw: u64) -> Self {
        let base = (raw >> 16 & 0xff_ffff) | (raw >> 32 & 0xff00_0000);
        let mut limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        let attr = (raw >> 40 & 0xf0ff) as u32;
        if attr & attr::G != 0 {
            limit = limit << 12 | 0xfff;
        }
        Self { base, limit, attr, selector, reserved: [0; 3] }
    }
    /// A real-mode segment: base is 16 times the selector, limit 64 KiB, read/write data (or code when `code`).
    #[must_use]
    pub const fn real_mode(selector: u16, code: bool) -> Self {
        let attr = attr::P | attr::S | attr::RW | attr::ACCESSED | if code { attr::CODE } else { 0 };
        Self { base: (selector as u64) << 4, limit: 0xffff, attr, selector, reserved: [0; 3] }
    }
}
