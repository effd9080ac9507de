//! The packed words that name a masked move or a gather: what the front end passes to their helpers.
//!
//! One place for both sides: `frontend` packs, `runtime` unpacks. Every 64-bit word unpacks to something valid.

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct MaskedMove {
    /// Memory is written, else read.
    pub store: bool,
    /// 256 bits, else 128.
    pub wide: bool,
    /// log2 of the element size in bytes: 2 or 3.
    pub log2_bytes: u8,
    /// Vector register that is loaded or stored.
    pub data: u8,
    /// Vector register whose elements' top bits choose.
    pub mask: u8,
    /// Segment of the memory operand (encoding order, 0..6).
    pub segment: u8,
    /// log2 of the address size in bytes: 1, 2 or 3.
    pub log2_addr: u8,
}

impl MaskedMove {
    /// The word: store 0, wide 1, log2 of element size 3:2, address size 5:4, segment 10:8, data 15:12, mask 19:16.
    #[must_use]
    pub const fn pack(self) -> u64 {
        self.store as u64
            | (self.wide as u64) << 1
            | (self.log2_bytes as u64 & 3) << 2
            | (self.log2_addr as u64 & 3) << 4
            | (self.segment as u64 & 7) << 8
            | (self.data as u64 & 15) << 12
            | (self.mask as u64 & 15) << 16
    }
    /// The move a word names.
    #[must_use]
    pub const fn unpack(word: u64) -> Self {
        Self {
            store: word & 1 != 0,
            wide: word & 2 != 0,
            log2_bytes: if word >> 2 & 1 != 0 { 3 } else { 2 },
            data: (word >> 12 & 15) as u8,
            mask: (word >> 16 & 15) as u8,
            segment: segment(word >> 8),
            log2_addr: address_size(word >> 4),
        }
    }
}

/// VGATHERDPS and its kin.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Gather {
    /// 256 bits in the wider of data and indexes, else 128.
    pub wide: bool,
    /// log2 of the data element size in bytes: 2 or 3.
    pub log2_bytes: u8,
    /// log2 of the index size in bytes: 2 or 3.
    pub log2_index: u8,
    /// log2 of the scale, 0..=3.
    pub log2_scale: u8,
    /// Vector register that is written.
    pub data: u8,
    /// Vector register whose elements' top bits choose, and are cleared.
    pub mask: u8,
    /// Vector register of the indexes.
    pub index: u8,
    /// Segment of the memory operand (encoding order, 0..6).
    pub segment: u8,
    /// log2 of the address size in bytes: 1, 2 or 3.
    pub log2_addr: u8,
}

impl Gather {
    /// The word: as [`MaskedMove::pack`], with index size 0 (1 for 64 bits), index 23:20, scale 25:24.
    #[must_use]
    pub const fn pack(self) -> u64 {
        (self.log2_index == 3) as u64
            | (self.wide as u64) << 1
            | (self.log2_bytes as u64 & 3) << 2
            | (self.log2_addr as u64 & 3) << 4
            | (self.segment as u64 & 7) << 8
            | (self.data as u64 & 15) << 12
            | (self.mask as u64 & 15) << 16
            | (self.index as u64 & 15) << 20
            | (self.log2_scale as u64 & 3) << 24
    }
    /// The gather a word names.
    #[must_use]
    pub const fn unpack(word: u64) -> Self {
        Self {
            wide: word & 2 != 0,
            log2_bytes: if word >> 2 & 1 != 0 { 3 } else { 2 },
            log2_index: if word & 1 != 0 { 3 } else { 2 },
            log2_scale: (word >> 24 & 3) as u8,
            data: (word >> 12 & 15) as u8,
            mask: (word >> 16 & 15) as u8,
            index: (word >> 20 & 15) as u8,
            segment: segment(word >> 8),
            log2_addr: address_size(word >> 4),
        }
    }
    /// Number of elements.
    #[must_use]
    pub const fn count(self) -> usize {
        let widest = if self.log2_bytes > self.log2_index { self.log2_bytes } else { self.log2_index };
        (if self.wide { 32 } else { 16 }) >> widest
    }
}

const fn segment(bits: u64) -> u8 {
    match bits & 7 {
        n @ 0..=5 => n as u8,
        _ => 3,
    }
}

const fn address_size(bits: u64) -> u8 {
    match bits & 3 {
        0 => 3,
        n => n as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_was_packed() {
        for seed in 0..4096u64 {
            let word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let m = MaskedMove::unpack(word);
            assert_eq!(MaskedMove::unpack(m.pack()), m);
            let g = Gather::unpack(word);
            assert_eq!(Gather::unpack(g.pack()), g);
            assert!(matches!(g.count(), 2 | 4 | 8));
        }
    }
}
