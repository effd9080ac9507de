//! The FXSAVE and XSAVE areas: layout, what each instruction writes and loads (SDM Vol 1, "Managing State Using the XSAVE
//! Feature Set").
//!
//! Functions on `CpuState` and bytes; the flags of `CpuState::mxcsr` are current when they are called.

use core::ops::Range;

use twofold_arch::CpuState;
use twofold_arch::control::xcr0;
use twofold_arch::fpu::{area as form, fsw, mxcsr};

use crate::fpu::x87;

/// Component bit of YMM_Hi128.
pub const AVX: u64 = xcr0::AVX;
/// Offset of the XMM registers.
pub const XMM: usize = 160;
/// Offset of the first extended component, standard or compacted.
pub const EXTENDED: usize = 576;
/// Bytes of the AVX component.
pub const AVX_LEN: usize = 256;
/// Offset of the PKRU component, standard form.
pub const PKRU: usize = EXTENDED + AVX_LEN;
/// Bytes of the PKRU component: the register, and as many that are 0.
pub const PKRU_LEN: usize = 8;
/// Components that have a place here.
const KNOWN: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::PKRU;
const MXCSR: usize = 24;

/// The mode's say in the layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// REX.W: 64-bit pointers.
    pub wide: bool,
    /// 64-bit mode: sixteen vector registers, else eight.
    pub xmm16: bool,
}

impl View {
    fn registers(self) -> usize {
        if self.xmm16 { 16 } else { 8 }
    }
    /// Bytes of the legacy region in use.
    #[must_use]
    pub fn legacy_len(self) -> usize {
        XMM + 16 * self.registers()
    }
    /// Bytes of the AVX component in use.
    #[must_use]
    pub fn avx_len(self) -> usize {
        16 * self.registers()
    }
}

/// The legacy region with everything in it.
#[must_use]
pub fn legacy(s: &CpuState, view: View) -> [u8; 512] {
    let mut out = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &s.fcw.to_le_bytes());
    put(2, &s.fsw.to_le_bytes());
    put(4, &[s.ftw as u8]);
    put(6, &(s.fop & 0x7ff).to_le_bytes());
    if view.wide {
        put(8, &s.fip.to_le_bytes());
        put(16, &s.fdp.to_le_bytes());
    } else {
        put(8, &(s.fip as u32).to_le_bytes());
        put(12, &s.fcs.to_le_bytes());
        put(16, &(s.fdp as u32).to_le_bytes());
        put(20, &s.fds.to_le_bytes());
    }
    put(MXCSR, &s.mxcsr.to_le_bytes());
    put(28, &mxcsr::DEFINED.to_le_bytes());
    let top = usize::from(s.fsw >> fsw::TOP_SHIFT & 7);
    for i in 0..8 {
        let [lo, hi] = s.fpr[(top + i) & 7];
        put(32 + 16 * i, &lo.to_le_bytes());
        put(40 + 16 * i, &(hi as u16).to_le_bytes());
    }
    for (i, v) in s.vec.iter().enumerate() {
        put(XMM + 16 * i, &v[0].to_le_bytes());
        put(XMM + 8 + 16 * i, &v[1].to_le_bytes());
    }
    out
}

/// The AVX component.
#[must_use]
pub fn avx(s: &CpuState) -> [u8; 256] {
    let mut out = [0; 256];
    for (at, v) in out.chunks_exact_mut(16).zip(&s.vec) {
        at[..8].copy_from_slice(&v[2].to_le_bytes());
        at[8..].copy_from_slice(&v[3].to_le_bytes());
    }
    out
}

/// The components that are not in their initial configuration (XINUSE). MXCSR does not count.
#[must_use]
pub fn in_use(s: &CpuState) -> u64 {
    let x87 = s.fcw != twofold_arch::fpu::fcw::INIT
        || (s.fsw | s.ftw | s.fop | s.fcs | s.fds) != 0
        || (s.fip | s.fdp) != 0
        || s.fpr.iter().any(|r| r[0] | r[1] & 0xffff != 0);
    let sse = s.vec.iter().any(|v| v[0] | v[1] != 0);
    let avx = s.vec.iter().any(|v| v[2] | v[3] != 0);
    let bit = |on: bool, b: u64| if on { b } else { 0 };
    bit(x87, xcr0::X87) | bit(sse, xcr0::SSE) | bit(avx, xcr0::AVX) | bit(s.pkru != 0, xcr0::PKRU)
}

/// Where the PKRU component is: in the compacted form behind those before it that XCOMP_BV names.
#[must_use]
pub const fn pkru_offset(xcomp_bv: u64) -> usize {
    if xcomp_bv >> 63 == 0 || xcomp_bv & xcr0::AVX != 0 { PKRU } else { EXTENDED }
}

/// Bytes of an area with the components `components`.
#[must_use]
pub const fn area_len(components: u64, compacted: bool) -> usize {
    if components & xcr0::PKRU != 0 {
        pkru_offset(components | if compacted { 1 << 63 } else { 0 }) + PKRU_LEN
    } else {
        EXTENDED + if components & xcr0::AVX != 0 { AVX_LEN } else { 0 }
    }
}

/// What a save writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Save {
    /// Components to write.
    pub written: u64,
    /// Whether MXCSR and its mask are written.
    pub mxcsr: bool,
    /// New XSTATE_BV.
    pub xstate_bv: u64,
    /// New XCOMP_BV; only the compacting instructions write it.
    pub xcomp_bv: u64,
}

/// What a save by `kind` of the components `wanted` writes, with `old_bv` in the header.
#[must_use]
pub fn plan_save(s: &CpuState, kind: u64, wanted: u64, old_bv: u64) -> Save {
    let used = in_use(s) & wanted;
    if matches!(kind, form::XSAVEC | form::XSAVES) {
        // Compacted, MXCSR belongs to the SSE component.
        let sse = wanted & xcr0::SSE != 0 && s.mxcsr != mxcsr::INIT;
        let bv = used | if sse { xcr0::SSE } else { 0 };
        return Save { written: bv, mxcsr: bv & xcr0::SSE != 0, xstate_bv: bv, xcomp_bv: 1 << 63 | wanted };
    }
    let written = if kind == form::XSAVEOPT { used } else { wanted & KNOWN };
    Save { written, mxcsr: wanted & (xcr0::SSE | xcr0::AVX) != 0, xstate_bv: old_bv & !wanted | used, xcomp_bv: 0 }
}

/// The parts of the legacy region that are written.
pub fn legacy_ranges(written: u64, mxcsr: bool, view: View) -> impl Iterator<Item = Range<usize>> {
    let part = |on: bool, r: Range<usize>| on.then_some(r);
    let (x87, sse) = (written & xcr0::X87 != 0, written & xcr0::SSE != 0);
    let parts = if x87 && sse && mxcsr {
        [Some(0..view.legacy_len()), None, None, None]
    } else {
        [part(x87, 0..MXCSR), part(mxcsr, MXCSR..32), part(x87, 32..XMM), part(sse, XMM..view.legacy_len())]
    };
    parts.into_iter().flatten()
}

/// What a restore loads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restore {
    /// Components loaded from memory.
    pub load: u64,
    /// Components put into their initial configuration.
    pub init: u64,
    /// Whether MXCSR is loaded from memory.
    pub mxcsr: bool,
    /// Whether MXCSR is initialised.
    pub mxcsr_init: bool,
    /// Where the PKRU component is.
    pub pkru_at: usize,
}

/// What a restore by `kind` of the components `wanted` does with a header; `None` for #GP(0).
#[must_use]
pub fn plan_restore(header: &[u8; 64], kind: u64, wanted: u64, enabled: u64) -> Option<Restore> {
    let qword = |i: usize| header[i..i + 8].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    let (bv, comp) = (qword(0), qword(8));
    let compact = comp >> 63 != 0;
    let bad = if compact {
        let comp = comp & !(1 << 63);
        comp & !enabled != 0 || bv & !comp != 0 || header[16..].iter().any(|&b| b != 0)
    } else {
        kind == form::XSAVES || comp != 0 || bv & !enabled != 0 || header[16..24].iter().any(|&b| b != 0)
    };
    if bad {
        return None;
    }
    let load = wanted & bv & KNOWN;
    let init = wanted & !bv & KNOWN;
    let pkru_at = pkru_offset(comp);
    Some(if compact {
        Restore { load, init, mxcsr: load & xcr0::SSE != 0, mxcsr_init: init & xcr0::SSE != 0, pkru_at }
    } else {
        Restore { load, init, mxcsr: wanted & (xcr0::SSE | xcr0::AVX) != 0, mxcsr_init: false, pkru_at }
    })
}

/// MXCSR in a legacy region.
#[must_use]
pub fn mxcsr_of(legacy: &[u8; 512]) -> u32 {
    u32::from_le_bytes([legacy[MXCSR], legacy[MXCSR + 1], legacy[MXCSR + 2], legacy[MXCSR + 3]])
}

/// Whether a legacy region's MXCSR has no reserved bit set.
#[must_use]
pub fn valid_mxcsr(legacy: &[u8; 512]) -> bool {
    mxcsr_of(legacy) & !mxcsr::DEFINED == 0
}

/// Loads the x87 part.
pub fn load_x87(s: &mut CpuState, legacy: &[u8; 512], view: View) {
    let word = |at: usize| u16::from_le_bytes([legacy[at], legacy[at + 1]]);
    let dword = |at: usize| u64::from(word(at)) | u64::from(word(at + 2)) << 16;
    let qword = |at: usize| dword(at) | dword(at + 4) << 32;
    s.ftw = legacy[4].into();
    s.fop = word(6) & 0x7ff;
    if view.wide {
        (s.fip, s.fdp, s.fcs, s.fds) = (qword(8), qword(16), 0, 0);
    } else {
        (s.fip, s.fdp, s.fcs, s.fds) = (dword(8), dword(16), word(12), word(20));
    }
    s.fsw = word(2);
    x87::load_control(s, word(0));
    let top = usize::from(s.fsw >> fsw::TOP_SHIFT & 7);
    for i in 0..8 {
        s.fpr[(top + i) & 7] = [qword(32 + 16 * i), word(40 + 16 * i).into()];
    }
}

/// Loads the XMM registers.
pub fn load_xmm(s: &mut CpuState, legacy: &[u8; 512], view: View) {
    for (v, b) in s.vec.iter_mut().zip(legacy[XMM..view.legacy_len()].chunks_exact(16)) {
        (v[0], v[1]) = halves(b);
    }
}

fn halves(b: &[u8]) -> (u64, u64) {
    let v = b.iter().rev().fold(0u128, |v, &b| v << 8 | u128::from(b));
    (v as u64, (v >> 64) as u64)
}

/// Does what a restore planned.
pub fn restore(s: &mut CpuState, plan: &Restore, legacy: &[u8; 512], high: &[u8; 256], view: View) {
    let n = view.registers();
    if plan.load & xcr0::X87 != 0 {
        load_x87(s, legacy, view);
    } else if plan.init & xcr0::X87 != 0 {
        x87::init(s);
        s.fpr = [[0; 2]; 8];
    }
    if plan.load & xcr0::SSE != 0 {
        load_xmm(s, legacy, view);
    } else if plan.init & xcr0::SSE != 0 {
        s.vec[..n].iter_mut().for_each(|v| (v[0], v[1]) = (0, 0));
    }
    if plan.load & xcr0::AVX != 0 {
        for (v, b) in s.vec.iter_mut().zip(high[..view.avx_len()].chunks_exact(16)) {
            (v[2], v[3]) = halves(b);
        }
    } else if plan.init & xcr0::AVX != 0 {
        s.vec[..n].iter_mut().for_each(|v| (v[2], v[3]) = (0, 0));
    }
    if plan.mxcsr {
        s.mxcsr = mxcsr_of(legacy);
    } else if plan.mxcsr_init {
        s.mxcsr = mxcsr::INIT;
    }
}
