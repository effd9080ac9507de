//! Which fields of the guest state a region keeps in values: general-purpose registers, lazy flags, vector registers by halves.
//!
//! Part of region lowering. Other fields, and accesses that lie across two of these, go to memory.

use cranelift_codegen::ir::types::{I8, I16, I16X8, I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{InstBuilder, Type, Value as Clif};
use twofold_arch::Loc;
use twofold_ir::{Block, Op, Ty};

use super::{RegionLowering, is_vector, members};
use crate::compiler::CompileError;
use crate::lower::{V, clif};

/// Part of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    /// Index of the slot.
    pub slot: usize,
    /// Byte offset in it.
    pub off: u16,
}

/// The slots of a region: at most 52, so that a set is a word.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Byte offset in the state and type.
    fields: Vec<(u16, Type)>,
}

const GPRS: core::ops::Range<u16> = Loc::gpr(0).0..Loc::gpr(15).0 + 8;
const VECS: core::ops::Range<u16> = Loc::xmm(0).0..Loc::xmm(15).0 + 32;

/// The start and the bytes of the field that an access lies in.
fn field(ty: Ty, loc: Loc) -> Option<(u16, u16)> {
    let n = ty.bytes() as u16;
    let (start, size) = if GPRS.contains(&loc.0) || (Loc::CC_DST.0..Loc::CC_SRC2.0 + 8).contains(&loc.0) {
        (loc.0 & !7, 8)
    } else if (Loc::CC_OP.0..Loc::CC_OP.0 + 4).contains(&loc.0) {
        (Loc::CC_OP.0, 4)
    } else if VECS.contains(&loc.0) && loc.0.is_multiple_of(n) {
        (loc.0 & !15, 16)
    } else {
        return None;
    };
    (loc.0 + n <= start + size).then_some((start, size))
}
const _: () =
    assert!(Loc::gpr(0).0.is_multiple_of(8) && Loc::CC_DST.0.is_multiple_of(8) && Loc::xmm(0).0.is_multiple_of(16));

impl Slots {
    pub fn new(blocks: &[Block]) -> Self {
        let mut s = Self::default();
        for op in blocks.iter().flat_map(|b| &b.ops) {
            let (Op::Get { ty, loc } | Op::Put { ty, loc, .. }) = *op else { continue };
            let Some((start, size)) = field(ty, loc) else { continue };
            let ty = match size {
                16 => V,
                _ if loc.0 + ty.bytes() as u16 > start + 4 => I64,
                _ => I32,
            };
            match s.fields.iter_mut().find(|f| f.0 == start) {
                Some(f) if ty == I64 => f.1 = I64,
                Some(_) => {}
                None => s.fields.push((start, ty)),
            }
        }
        s
    }
    pub fn len(&self) -> usize {
        self.fields.len()
    }
    pub fn field(&self, i: usize) -> (usize, Type) {
        let (loc, ty) = self.fields[i];
        (loc.into(), ty)
    }
    pub fn has_vectors(&self) -> bool {
        self.fields.iter().any(|f| is_vector(f.1))
    }
    pub fn find(&self, ty: Ty, loc: Loc) -> Option<Place> {
        let (start, _) = field(ty, loc)?;
        let slot = self.fields.iter().position(|f| f.0 == start)?;
        Some(Place { slot, off: loc.0 - start })
    }
    /// Whether an access of type `ty` has all of its slot.
    pub fn whole(&self, p: Place, ty: Ty) -> bool {
        p.off == 0 && clif(ty) == self.fields[p.slot].1
    }
    /// Whether a slot is written back late.
    pub fn lazy(&self, slot: usize) -> bool {
        let loc = self.fields[slot].0;
        !GPRS.contains(&loc)
    }
    /// The slots of the lazy flags.
    pub fn flags(&self) -> u64 {
        self.overlapping(Loc::CC_DST.0, Loc::CC_OP.0 + 4)
    }
    /// The slots with bytes in a range.
    fn overlapping(&self, from: u16, to: u16) -> u64 {
        let hit = |f: &(u16, Type)| f.0 < to && f.0 + f.1.bytes() as u16 > from;
        self.fields.iter().enumerate().filter(|(_, f)| hit(f)).fold(0, |m, (i, _)| m | 1 << i)
    }
}

/// The vector type with lanes of an integer type.
fn lanes(ty: Ty) -> Type {
    match ty {
        Ty::I16 => I16X8,
        Ty::I32 => I32X4,
        Ty::I64 => I64X2,
        Ty::I8 | Ty::V128 => V,
    }
}

impl RegionLowering<'_> {
    pub(super) fn get(&mut self, ty: Ty, loc: Loc) -> Result<Clif, CompileError> {
        let Some(p) = self.slots.find(ty, loc) else {
            self.write_back_slots(self.dirty & self.slots.overlapping(loc.0, loc.0 + ty.bytes() as u16))?;
            return Ok(self.l.load_state(clif(ty), loc.0.into()));
        };
        let (v, have) = (self.value(p.slot)?, self.slots.field(p.slot).1);
        if is_vector(have) {
            if ty == Ty::V128 {
                return Ok(v);
            }
            let v = self.l.cast(v, lanes(ty));
            return Ok(self.l.cur.ins().extractlane(v, (p.off / ty.bytes() as u16) as u8));
        }
        let shift = i64::from(p.off) * 8;
        let v = if shift == 0 { v } else { self.l.cur.ins().ushr_imm_u(v, shift) };
        Ok(if clif(ty) == have { v } else { self.l.cur.ins().ireduce(clif(ty), v) })
    }

    pub(super) fn put(&mut self, ty: Ty, loc: Loc, v: Clif) -> Result<(), CompileError> {
        let Some(p) = self.slots.find(ty, loc) else {
            let hit = self.slots.overlapping(loc.0, loc.0 + ty.bytes() as u16);
            // Memory gets all of it, and is then as new as the values.
            self.write_back_slots(self.dirty & hit)?;
            self.l.store_state(v, loc.0.into());
            for i in members(hit, self.slots.len()) {
                let (loc, ty) = self.slots.field(i);
                self.values[i] = Some(self.l.load_state(ty, loc));
            }
            return Ok(());
        };
        let have = self.slots.field(p.slot).1;
        let lazy = self.slots.lazy(p.slot);
        if lazy {
            self.dirty |= 1 << p.slot;
        } else {
            self.l.store_state(v, loc.0.into());
        }
        let new = if self.slots.whole(p, ty) {
            v
        } else if is_vector(have) {
            let old = self.value(p.slot)?;
            let old = self.l.cast(old, lanes(ty));
            let new = self.l.cur.ins().insertlane(old, v, (p.off / ty.bytes() as u16) as u8);
            self.l.cast(new, V)
        } else {
            let old = self.value(p.slot)?;
            self.insert(old, have, v, ty, p.off)
        };
        self.values[p.slot] = Some(new);
        Ok(())
    }

    /// `old` with the bytes from `off` on replaced.
    fn insert(&mut self, old: Clif, have: Type, v: Clif, ty: Ty, off: u16) -> Clif {
        let shift = i64::from(off) * 8;
        let mut new = self.l.cur.ins().uextend(have, v);
        if shift != 0 {
            new = self.l.cur.ins().ishl_imm_u(new, shift);
        }
        let keep = self.l.iconst(have, !((ty.mask() << shift) as i64));
        let old = self.l.cur.ins().band(old, keep);
        debug_assert!(have == I64 || have == I32 || have == I16 || have == I8);
        self.l.cur.ins().bor(old, new)
    }
}
