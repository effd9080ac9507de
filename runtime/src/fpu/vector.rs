//! Vector instructions that access memory element by element: masked moves and gathers.
//!
//! Invariants: an element that is masked off is not accessed. A masked move that faults has changed no register. A gather
//! that faults has completed the elements below the faulting one, and their mask bits are cleared, so that running it again
//! goes on from there (SDM Vol 2, "VGATHERDPS/VGATHERDPD").

use twofold_arch::vector_op::{Gather, MaskedMove};

use super::{Guest, Helped, SS, is64};
use crate::cpu::segments::seg_addr;
use crate::vcpu::{MemAs, Trap};

/// Element `i` of `1 << log2` bytes of a vector register.
fn get(reg: &[u64; 4], i: usize, log2: u8) -> u64 {
    if log2 == 3 { reg[i & 3] } else { reg[i >> 1 & 3] >> (32 * (i & 1)) & 0xffff_ffff }
}

fn set(reg: &mut [u64; 4], i: usize, log2: u8, v: u64) {
    if log2 == 3 {
        reg[i & 3] = v;
    } else {
        let (word, shift) = (&mut reg[i >> 1 & 3], 32 * (i & 1));
        *word = *word & !(0xffff_ffff << shift) | (v & 0xffff_ffff) << shift;
    }
}

/// Whether the top bit of element `i` is set.
fn chosen(mask: &[u64; 4], i: usize, log2: u8) -> bool {
    get(mask, i, log2) >> ((8 << log2) - 1) != 0
}

fn truncate(ea: u64, log2_addr: u8) -> u64 {
    if log2_addr >= 3 { ea } else { ea & ((1 << (8 << log2_addr)) - 1) }
}

/// The linear address of an element.
fn linear(v: &mut impl Guest, segment: u8, ea: u64, bytes: u32, write: bool) -> Result<u64, Trap> {
    if is64(v) {
        let base = if segment >= 4 { v.state().seg[usize::from(segment)].base } else { 0 };
        return Ok(base.wrapping_add(ea));
    }
    seg_addr(v.state(), segment.into(), ea, bytes, write)
}

fn behalf(segment: u8) -> MemAs {
    if u64::from(segment) == SS { MemAs::Stack } else { MemAs::Cpl }
}

/// `Helper::MaskedMove`.
///
/// # Errors
/// What the accesses raise.
pub fn masked_move(v: &mut impl Guest, ea: u64, word: u64) -> Helped {
    let m = MaskedMove::unpack(word);
    let (bytes, count) = (1usize << m.log2_bytes, (if m.wide { 32 } else { 16 }) >> m.log2_bytes);
    let mask = v.state().vec[usize::from(m.mask)];
    let data = v.state().vec[usize::from(m.data)];
    let mut out = [0; 4];
    // The operand is one piece: its elements do not wrap at the address size.
    let at = |i: usize| truncate(ea, m.log2_addr).wrapping_add((i * bytes) as u64);
    let on = (0..count).filter(|&i| chosen(&mask, i, m.log2_bytes));
    if !m.store {
        for i in on {
            let la = linear(v, m.segment, at(i), bytes as u32, false)?;
            let mut b = [0; 8];
            v.load(la, &mut b[..bytes], behalf(m.segment))?;
            set(&mut out, i, m.log2_bytes, u64::from_le_bytes(b));
        }
        v.state().vec[usize::from(m.data)] = out;
        return Ok(0);
    }
    // Two rounds, so that nothing is written when a later element faults.
    for i in on.clone() {
        let la = linear(v, m.segment, at(i), bytes as u32, true)?;
        v.check_store(la, bytes as u32, behalf(m.segment))?;
    }
    for i in on {
        let la = linear(v, m.segment, at(i), bytes as u32, true)?;
        v.store(la, &get(&data, i, m.log2_bytes).to_le_bytes()[..bytes], behalf(m.segment))?;
    }
    Ok(0)
}

/// `Helper::Gather`. Of mask elements that are not done yet nothing but the top bit means anything; they stay as they are.
///
/// # Errors
/// What the accesses raise.
pub fn gather(v: &mut impl Guest, base: u64, word: u64) -> Helped {
    let g = Gather::unpack(word);
    let (data, mask) = (usize::from(g.data), usize::from(g.mask));
    let (bytes, count) = (1usize << g.log2_bytes, g.count());
    let indexes = v.state().vec[usize::from(g.index)];
    for i in 0..count {
        if chosen(&v.state().vec[mask], i, g.log2_bytes) {
            let index = get(&indexes, i, g.log2_index);
            let index = if g.log2_index == 2 { index as u32 as i32 as i64 as u64 } else { index };
            let ea = truncate(base.wrapping_add(index << g.log2_scale), g.log2_addr);
            let la = linear(v, g.segment, ea, bytes as u32, false)?;
            let mut b = [0; 8];
            v.load(la, &mut b[..bytes], behalf(g.segment))?;
            set(&mut v.state().vec[data], i, g.log2_bytes, u64::from_le_bytes(b));
        }
        set(&mut v.state().vec[mask], i, g.log2_bytes, 0);
    }
    let s = v.state();
    s.vec[mask] = [0; 4];
    for i in count..32 >> g.log2_bytes {
        set(&mut s.vec[data], i, g.log2_bytes, 0);
    }
    Ok(0)
}
