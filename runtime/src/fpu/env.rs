//! The x87 environment and state in memory: FLDENV, FNSTENV, FNSAVE, FRSTOR in their four layouts (SDM Vol 1, "Saving the
//! x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE").

use twofold_arch::CpuState;
use twofold_arch::fpu::fsw;

use crate::fpu::x87;

/// Length of the longest layout, with registers.
pub const MAX_LEN: usize = 28 + 80;

/// A layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Protected mode: selectors and offsets. Else linear addresses of 20 or 32 bits.
    pub protected: bool,
    /// 14 bytes in place of 28.
    pub bits16: bool,
}

impl Layout {
    fn env_len(self) -> usize {
        if self.bits16 { 14 } else { 28 }
    }
    /// Bytes of the environment, or of the whole state.
    #[must_use]
    pub fn len(self, registers: bool) -> usize {
        self.env_len() + if registers { 80 } else { 0 }
    }
}

/// The full tag word: 0 valid, 1 zero, 2 special, 3 empty, for each physical register.
#[must_use]
pub fn full_tags(s: &CpuState) -> u16 {
    (0..8).fold(0, |tags, i| {
        let [lo, hi] = s.fpr[i];
        let tag = match (hi & 0x7fff, lo) {
            _ if s.ftw >> i & 1 == 0 => 3,
            (0, 0) => 1,
            (0 | 0x7fff, _) => 2,
            _ if lo >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * i)
    })
}

/// The abridged form of a full tag word.
fn abridged(tags: u16) -> u16 {
    (0..8).filter(|i| tags >> (2 * i) & 3 != 3).fold(0, |t, i| t | 1 << i)
}

/// The state in a layout; the caller stores as much of it as the instruction does.
#[must_use]
pub fn store(s: &CpuState, layout: Layout) -> [u8; MAX_LEN] {
    let mut out = [0; MAX_LEN];
    let linear = |offset: u64, selector: u16| offset.wrapping_add(u64::from(selector) << 4) as u32;
    let (ip, dp) = (linear(s.fip, s.fcs), linear(s.fdp, s.fds));
    let tags = full_tags(s);
    if layout.bits16 {
        let (fop, top) = (s.fop & 0x7ff, |a: u32| (a >> 16 & 0xf) as u16);
        let pointers = if layout.protected {
            [s.fip as u16, s.fcs, s.fdp as u16, s.fds]
        } else {
            [ip as u16, top(ip) << 12 | fop, dp as u16, top(dp) << 12]
        };
        let words = [s.fcw, s.fsw, tags].into_iter().chain(pointers);
        for (w, at) in words.zip(out.chunks_exact_mut(2)) {
            at.copy_from_slice(&w.to_le_bytes());
        }
    } else {
        // The unused upper halves read as ones on every processor since the 486.
        let wide = |w: u16| 0xffff_0000 | u32::from(w);
        let fop = u32::from(s.fop & 0x7ff);
        let pointers = if layout.protected {
            [s.fip as u32, fop << 16 | u32::from(s.fcs), s.fdp as u32, wide(s.fds)]
        } else {
            [wide(ip as u16), (ip >> 16) << 12 | fop, wide(dp as u16), (dp >> 16) << 12]
        };
        let words = [wide(s.fcw), wide(s.fsw), wide(tags)].into_iter().chain(pointers);
        for (w, at) in words.zip(out.chunks_exact_mut(4)) {
            at.copy_from_slice(&w.to_le_bytes());
        }
    }
    let top = s.fsw >> fsw::TOP_SHIFT & 7;
    for (i, at) in out[layout.env_len()..].chunks_exact_mut(10).take(8).enumerate() {
        let [lo, hi] = s.fpr[(usize::from(top) + i) & 7];
        at[..8].copy_from_slice(&lo.to_le_bytes());
        at[8..].copy_from_slice(&(hi as u16).to_le_bytes());
    }
    out
}

/// Loads an environment, and the registers if `bytes` goes on.
pub fn load(s: &mut CpuState, layout: Layout, bytes: &[u8]) {
    let unit = if layout.bits16 { 2 } else { 4 };
    let word = |i: usize| {
        let mut w = [0; 4];
        if let Some(b) = bytes.get(i * unit..(i + 1) * unit) {
            w[..unit].copy_from_slice(b);
        }
        u32::from_le_bytes(w)
    };
    match (layout.protected, layout.bits16) {
        (true, true) => {
            (s.fip, s.fcs, s.fdp, s.fds) = (word(3).into(), word(4) as u16, word(5).into(), word(6) as u16);
            s.fop = 0;
        }
        (true, false) => {
            (s.fip, s.fcs, s.fdp, s.fds) = (word(3).into(), word(4) as u16, word(5).into(), word(6) as u16);
            s.fop = (word(4) >> 16) as u16 & 0x7ff;
        }
        (false, _) => {
            // Bits 31:16 (19:16) of the linear addresses are in bits 27:12 (15:12) of the next word.
            let high = |i: usize| u64::from(word(i) >> 12 & 0xffff) << 16;
            (s.fip, s.fdp) = (high(4) | u64::from(word(3) & 0xffff), high(6) | u64::from(word(5) & 0xffff));
            (s.fcs, s.fds) = (0, 0);
            s.fop = word(4) as u16 & 0x7ff;
        }
    }
    s.ftw = abridged(word(2) as u16);
    s.fsw = word(1) as u16;
    x87::load_control(s, word(0) as u16);
    let top = s.fsw >> fsw::TOP_SHIFT & 7;
    let registers = bytes.get(layout.env_len()..).unwrap_or_default();
    for (i, r) in registers.chunks_exact(10).take(8).enumerate() {
        let mut v = [0; 16];
        v[..10].copy_from_slice(r);
        let v = u128::from_le_bytes(v);
        s.fpr[(usize::from(top) + i) & 7] = [v as u64, (v >> 64) as u64];
    }
}
