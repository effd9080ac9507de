//! The VMCS as the processor keeps it: every field in an array, and its image in the 4 KiB region in guest memory.
//!
//! Place in the pipeline: VMX instructions, VM entry and VM exit read and write fields here; the image is written at
//! VMCLEAR and when another VMCS becomes current, and read when one becomes current. Invariant: any image makes a valid
//! array, whatever the guest wrote there; only what the checks of VM entry accept has an effect.

use twofold_arch::PhysAddr;
use twofold_arch::vmx::field::COUNT;
use twofold_arch::vmx::{Field, Fields, Part, SHADOW_VMCS};
use twofold_mmu::PhysMap;

/// Byte offset of the launch state in the image: 1 is launched.
const LAUNCH_STATE: usize = 8;
/// Byte offset of the fields in the image, 8 bytes each in the order of their indexes.
const FIELDS: usize = 16;
/// Bytes of a VMCS region.
pub const REGION: usize = 4096;

const _: () = assert!(FIELDS + 8 * COUNT <= REGION);

/// A VMCS in the processor.
#[derive(Clone)]
pub struct Vmcs {
    values: [u64; COUNT],
    /// Launch state: launched, not clear.
    pub launched: bool,
    /// The shadow-VMCS indicator of the region.
    pub shadow: bool,
}

impl std::fmt::Debug for Vmcs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vmcs").field("launched", &self.launched).field("shadow", &self.shadow).finish_non_exhaustive()
    }
}

impl Default for Vmcs {
    fn default() -> Self {
        Self { values: [0; COUNT], launched: false, shadow: false }
    }
}

impl Fields for Vmcs {
    #[inline]
    fn get(&self, field: Field) -> u64 {
        self.values[field.index()]
    }
}

impl Vmcs {
    /// The field's value, zero-extended.
    #[inline]
    #[must_use]
    pub fn get(&self, field: Field) -> u64 {
        self.values[field.index()]
    }

    /// The field's low 32 bits.
    #[inline]
    #[must_use]
    pub fn get32(&self, field: Field) -> u32 {
        self.values[field.index()] as u32
    }

    /// All values, by [`Field::index`].
    #[inline]
    #[must_use]
    pub fn values(&self) -> &[u64; COUNT] {
        &self.values
    }

    /// Sets a field, cut to its width.
    #[inline]
    pub fn set(&mut self, field: Field, value: u64) {
        self.values[field.index()] = value & field.mask();
    }

    /// Sets a part of a field.
    pub fn set_part(&mut self, field: Field, part: Part, value: u64) {
        let old = self.get(field);
        self.set(field, merge(old, part, value));
    }

    /// The VMCS of the region at `at`.
    #[must_use]
    pub fn load(map: &PhysMap, at: PhysAddr) -> Self {
        let mut image = [0; FIELDS + 8 * COUNT];
        map.read(at, &mut image);
        let word = |o: usize| u32::from_le_bytes(image[o..o + 4].try_into().unwrap_or_default());
        let mut vmcs =
            Self { launched: word(LAUNCH_STATE) == 1, shadow: word(0) & SHADOW_VMCS != 0, ..Self::default() };
        for (field, bytes) in Field::ALL.iter().zip(image[FIELDS..].chunks_exact(8)) {
            vmcs.set(*field, u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
        }
        vmcs
    }

    /// Writes the fields and the launch state to the region at `at`; the revision and the abort indicator stay.
    pub fn store(&self, map: &PhysMap, at: PhysAddr) {
        let mut image = [0; FIELDS + 8 * COUNT - LAUNCH_STATE];
        image[..4].copy_from_slice(&u32::from(self.launched).to_le_bytes());
        for (bytes, value) in image[FIELDS - LAUNCH_STATE..].chunks_exact_mut(8).zip(self.values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        map.write(at.wrapping_add(LAUNCH_STATE as u64), &image);
    }

    /// Marks the region at `at`, which is not current, clear.
    pub fn clear_region(map: &PhysMap, at: PhysAddr) {
        map.write(at.wrapping_add(LAUNCH_STATE as u64), &[0; 4]);
    }

    /// Where a field is in the region at `at`.
    #[must_use]
    pub fn place(at: PhysAddr, field: Field) -> PhysAddr {
        at.wrapping_add((FIELDS + 8 * field.index()) as u64)
    }
}

/// The value of a field of which `part` becomes `value`.
#[must_use]
pub fn merge(old: u64, part: Part, value: u64) -> u64 {
    match part {
        Part::Full => value,
        Part::High => old & 0xffff_ffff | value << 32,
    }
}

/// What VMREAD of `part` gives of a field's value.
#[must_use]
pub fn extract(value: u64, part: Part) -> u64 {
    match part {
        Part::Full => value,
        Part::High => value >> 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use twofold_mmu::{GuestRam, LegacyHole};

    #[test]
    fn g1_contents_survive_in_memory() {
        let map = PhysMap::new(Arc::new(GuestRam::new(1 << 20).unwrap()), LegacyHole::default());
        let at = PhysAddr(0x3000);
        map.write(at, &[4, 0, 0, 0]);
        let mut v = Vmcs { launched: true, ..Vmcs::default() };
        for (i, f) in Field::ALL.into_iter().enumerate() {
            v.set(f, 0x1234_5678_9abc_0000 + i as u64);
        }
        v.set_part(Field::TscOffset, Part::High, 0x7);
        v.store(&map, at);
        let w = Vmcs::load(&map, at);
        assert!(w.launched && !w.shadow);
        assert!(Field::ALL.iter().all(|f| v.get(*f) == w.get(*f)));
        assert_eq!(extract(w.get(Field::TscOffset), Part::High), 7);
        let mut b = [0; 8];
        map.read(Vmcs::place(at, Field::HostRip), &mut b);
        assert_eq!(u64::from_le_bytes(b), v.get(Field::HostRip));
    }
}
