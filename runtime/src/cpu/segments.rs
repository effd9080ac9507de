//! Segmentation: descriptor fetch, loads of segment registers with their checks, probes, and checked segment addresses.
//!
//! Place in the pipeline: helpers of MOV/POP to segment registers, LLDT, LTR, LAR, LSL, VERR, VERW, and the parts that
//! `far`, `interrupt` and `task` share. Invariant: a segment register changes only after all checks passed.

use twofold_arch::control::rflags;
use twofold_arch::segment::attr;
use twofold_arch::{CpuState, Exception, LinearAddr, Segment, Vector};

use super::Helped;
use super::mode::{
    CS, LDTR, SS, TR, is_64bit, is_canonical, is_canonical_base, is_long, is_protected, is_v86, rip_mask,
};
use crate::vcpu::{MemAs, Trap, Vcpu};

/// #GP with a selector as its error code.
pub(super) const fn gp(selector: u16) -> Trap {
    Trap::Exception(Exception::gp((selector & !3) as u32))
}
/// #GP(0).
pub(super) const GP0: Trap = Trap::Exception(Exception::GP0);
/// #UD.
pub(super) const UD: Trap = Trap::Exception(Exception::UD);

/// An exception of `vector` with a selector as its error code.
pub(super) const fn selector_fault(vector: Vector, selector: u16) -> Trap {
    Trap::Exception(Exception::with_error(vector, (selector & !3) as u32))
}

/// Whether a selector is null.
pub(super) const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A segment descriptor and where it came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// Its eight bytes.
    pub raw: u64,
    /// Where they are.
    pub at: LinearAddr,
}

impl Descriptor {
    pub const fn segment(&self, selector: u16) -> Segment {
        Segment::from_descriptor(selector, self.raw)
    }
    pub const fn kind(&self) -> u32 {
        (self.raw >> 40 & 0xf) as u32
    }
    pub const fn is_system(&self) -> bool {
        self.raw >> 44 & 1 == 0
    }
    pub const fn is_code(&self) -> bool {
        self.raw >> 43 & 3 == 3
    }
    pub const fn is_conforming(&self) -> bool {
        self.raw >> 42 & 1 != 0
    }
    /// Readable code, or writable data.
    pub const fn has_rw(&self) -> bool {
        self.raw >> 41 & 1 != 0
    }
    pub const fn dpl(&self) -> u32 {
        (self.raw >> 45 & 3) as u32
    }
    pub const fn is_present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub const fn is_long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    pub const fn is_db(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }

    /// Sets the Accessed bit in memory when it is clear, locked.
    #[inline]
    pub fn set_accessed(&mut self, v: &mut Vcpu) -> Result<(), Trap> {
        const ACCESSED: u64 = 1 << 40;
        if self.raw & ACCESSED == 0 {
            self.raw |= ACCESSED;
            super::ops::update_byte(v, self.at.wrapping_add(5), 1, 0)?;
        }
        Ok(())
    }
}

/// Where the descriptor of a (non-null) selector is; `None` when outside its table.
fn descriptor_address(s: &CpuState, selector: u16, bytes: u64) -> Option<LinearAddr> {
    let index = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        let ldt = &s.seg[LDTR];
        if ldt.attr & attr::UNUSABLE != 0 || ldt.attr & attr::P == 0 {
            return None;
        }
        (ldt.base, u64::from(ldt.limit))
    } else {
        (s.gdtr.base, s.gdtr.limit)
    };
    if index + bytes - 1 > limit {
        return None;
    }
    let la = base.wrapping_add(index);
    Some(LinearAddr(if is_long(s) { la } else { la & 0xffff_ffff }))
}

/// Reads the descriptor of a non-null selector; `vector` (#GP, #TS) with the selector when it is outside its table.
#[inline]
pub(super) fn fetch_descriptor(v: &mut Vcpu, selector: u16, vector: Vector) -> Result<Descriptor, Trap> {
    let Some(at) = descriptor_address(&v.state, selector, 8) else {
        return Err(selector_fault(vector, selector));
    };
    let raw = v.read(at, 8, MemAs::System)?;
    Ok(Descriptor { raw, at })
}

/// The upper eight bytes of a 16-byte system descriptor: base bits 63:32. They must exist and have type 0.
pub(super) fn fetch_upper(v: &mut Vcpu, selector: u16) -> Result<u64, Trap> {
    let Some(at) = descriptor_address(&v.state, selector, 16) else { return Err(gp(selector)) };
    let upper = v.read(at.wrapping_add(8), 8, MemAs::System)?;
    if upper >> 40 & 0x1f != 0 {
        return Err(gp(selector));
    }
    Ok(upper << 32)
}

// ---- loads of segment registers ---------------------------------------------------------------------------------------

/// A null selector in a data segment register. Intel clears the base.
pub(super) const fn null_segment(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, attr: attr::UNUSABLE, selector, reserved: [0; 3] }
}

/// What a segment register holds after a load in real or virtual-8086 mode.
pub(super) fn real_segment(old: &Segment, selector: u16, v86: bool) -> Segment {
    if v86 {
        let mut seg = Segment::real_mode(selector, false);
        seg.attr |= attr::DPL;
        return seg;
    }
    // Real mode changes the base alone: limit, granularity and default size stay as protected mode left them.
    let keep = old.attr & (attr::DB | attr::G);
    let attr = keep | attr::P | attr::S | attr::RW | attr::ACCESSED;
    Segment { base: u64::from(selector) << 4, limit: old.limit, attr, selector, reserved: [0; 3] }
}

/// MOV, POP, LxS to a segment register (SDM Vol 2B, "MOV—Move").
pub fn load_seg(v: &mut Vcpu, index: usize, selector: u16) -> Result<(), Trap> {
    if index >= 6 || index == CS {
        return Err(UD);
    }
    let seg = if is_protected(&v.state) {
        if index == SS { protected_ss(v, selector)? } else { protected_data(v, selector)? }
    } else {
        real_segment(&v.state.seg[index], selector, is_v86(&v.state))
    };
    // The shadow of MOV SS and POP SS is the front end's to open: LSS has none.
    v.state.seg[index] = seg;
    Ok(())
}

fn protected_ss(v: &mut Vcpu, selector: u16) -> Result<Segment, Trap> {
    let cpl = v.state.cpl;
    let rpl = u32::from(selector & 3);
    if is_null(selector) {
        if !is_64bit(&v.state) || cpl == 3 || rpl != cpl {
            return Err(GP0);
        }
        return Ok(null_ss(selector, cpl));
    }
    let mut d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    if rpl != cpl || d.is_system() || d.is_code() || !d.has_rw() || d.dpl() != cpl {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::StackFault, selector));
    }
    d.set_accessed(v)?;
    Ok(d.segment(selector))
}

/// SS with a null selector in 64-bit mode: unusable, its DPL is the CPL.
pub(super) const fn null_ss(selector: u16, cpl: u32) -> Segment {
    Segment { base: 0, limit: 0, attr: attr::UNUSABLE | cpl << attr::DPL_SHIFT, selector, reserved: [0; 3] }
}

fn protected_data(v: &mut Vcpu, selector: u16) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Ok(null_segment(selector));
    }
    let mut d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let rpl = u32::from(selector & 3);
    if d.is_system() || (d.is_code() && !d.has_rw()) {
        return Err(gp(selector));
    }
    let conforming = d.is_code() && d.is_conforming();
    if !conforming && (rpl > d.dpl() || v.state.cpl > d.dpl()) {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    d.set_accessed(v)?;
    Ok(d.segment(selector))
}

/// LLDT (SDM Vol 2A).
pub fn lldt(v: &mut Vcpu, selector: u16) -> Result<(), Trap> {
    if !is_protected(&v.state) {
        return Err(UD);
    }
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        crate::vmx::intercept::ldtr_tr(v)?;
    }
    if is_null(selector) {
        v.state.seg[LDTR] = null_segment(selector);
        return Ok(());
    }
    v.state.seg[LDTR] = fetch_ldt(v, selector, Vector::GeneralProtection, Vector::SegmentNotPresent)?;
    Ok(())
}

/// The LDT a selector names, with `bad` raised for a wrong one and `absent` for one that is not present.
pub(super) fn fetch_ldt(v: &mut Vcpu, selector: u16, bad: Vector, absent: Vector) -> Result<Segment, Trap> {
    if selector & 4 != 0 {
        return Err(selector_fault(bad, selector));
    }
    let d = fetch_descriptor(v, selector, bad)?;
    if !d.is_system() || d.kind() != 2 {
        return Err(selector_fault(bad, selector));
    }
    if !d.is_present() {
        return Err(selector_fault(absent, selector));
    }
    let mut seg = d.segment(selector);
    if is_long(&v.state) {
        seg.base |= fetch_upper(v, selector)?;
        if !is_canonical_base(v, seg.base) {
            return Err(gp(selector));
        }
    }
    Ok(seg)
}

/// LTR (SDM Vol 2A): marks the TSS busy.
pub fn ltr(v: &mut Vcpu, selector: u16) -> Result<(), Trap> {
    if !is_protected(&v.state) {
        return Err(UD);
    }
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        crate::vmx::intercept::ldtr_tr(v)?;
    }
    if is_null(selector) {
        return Err(GP0);
    }
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let long = is_long(&v.state);
    if !d.is_system() || !(d.kind() == 9 || d.kind() == 1 && !long) {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    let mut seg = d.segment(selector);
    if long {
        seg.base |= fetch_upper(v, selector)?;
        if !is_canonical_base(v, seg.base) {
            return Err(gp(selector));
        }
    }
    set_busy(v, &d, true)?;
    seg.attr |= 2;
    v.state.seg[TR] = seg;
    Ok(())
}

/// Sets or clears the busy bit of a TSS descriptor in memory.
pub(super) fn set_busy(v: &mut Vcpu, d: &Descriptor, busy: bool) -> Result<(), Trap> {
    let (set, clear) = if busy { (2, 0) } else { (0, 2) };
    super::ops::update_byte(v, d.at.wrapping_add(5), set, clear)
}

// ---- probes -----------------------------------------------------------------------------------------------------------

/// LAR, LSL, VERR, VERW by `kind` 0..=3: the rights or limit, with ZF saying whether the selector may be used.
pub fn probe_selector(v: &mut Vcpu, selector: u16, kind: u64) -> Helped {
    if !is_protected(&v.state) {
        return Err(UD);
    }
    let value = probe(v, selector, kind)?;
    let arith = v.state.rflags() & rflags::ARITH & !rflags::ZF;
    v.state.cc_op = u32::from(twofold_arch::CcOp::FLAGS.0);
    v.state.cc_src = arith | if value.is_some() { rflags::ZF } else { 0 };
    Ok(value.unwrap_or(0))
}

fn probe(v: &mut Vcpu, selector: u16, kind: u64) -> Result<Option<u64>, Trap> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(at) = descriptor_address(&v.state, selector, 8) else { return Ok(None) };
    let raw = v.read(at, 8, MemAs::System)?;
    let d = Descriptor { raw, at };
    let long = is_long(&v.state);
    let (rpl, cpl) = (u32::from(selector & 3), v.state.cpl);
    let reachable = d.dpl() >= cpl && d.dpl() >= rpl;
    if d.is_system() {
        let known = match (kind, d.kind()) {
            (0, 2 | 9 | 11 | 12) | (1, 2 | 9 | 11) => true,
            (0, 1 | 3 | 4 | 5) | (1, 1 | 3) => !long,
            _ => false,
        };
        if !known || !reachable {
            return Ok(None);
        }
    } else {
        let conforming = d.is_code() && d.is_conforming();
        let usable = match kind {
            0 | 1 => true,
            2 => !d.is_code() || d.has_rw(),
            _ => !d.is_code() && d.has_rw(),
        };
        if !usable || !(conforming || reachable) {
            return Ok(None);
        }
    }
    Ok(Some(match kind {
        0 => raw >> 32 & 0x00f0_ff00,
        1 => u64::from(d.segment(selector).limit),
        _ => 0,
    }))
}

// ---- addresses --------------------------------------------------------------------------------------------------------

/// The linear address of `bytes` bytes at `offset` of a segment, after limit, rights and canonical checks
/// (SDM Vol 3A, "Limit Checking" and "Type Checking").
pub fn seg_addr(s: &CpuState, index: usize, offset: u64, bytes: u32, write: bool) -> Result<u64, Trap> {
    let index = index.min(5);
    let seg = &s.seg[index];
    let fault: Trap = if index == SS { Exception::SS0.into() } else { GP0 };
    if is_64bit(s) {
        let la = if index >= 4 { seg.base.wrapping_add(offset) } else { offset };
        let last = la.wrapping_add(u64::from(bytes.max(1)) - 1);
        return if is_canonical(s, la) && is_canonical(s, last) { Ok(la) } else { Err(fault) };
    }
    let offset = offset & 0xffff_ffff;
    if seg.attr & attr::UNUSABLE != 0 || seg.attr & attr::P == 0 {
        return Err(fault);
    }
    let is_code = seg.attr & attr::CODE != 0;
    if is_protected(s) {
        let allowed = match (is_code, write) {
            (true, true) => false,
            (false, false) => true,
            _ => seg.attr & attr::RW != 0,
        };
        if !allowed {
            return Err(fault);
        }
    }
    let last = offset + u64::from(bytes.max(1)) - 1;
    let inside = if !is_code && seg.attr & attr::EC != 0 {
        let top = if seg.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > u64::from(seg.limit) && last <= top
    } else {
        last <= u64::from(seg.limit)
    };
    if !inside {
        return Err(fault);
    }
    Ok(seg.base.wrapping_add(offset) & 0xffff_ffff)
}

/// The target of a near transfer, truncated to the code size; #GP(0) outside the CS limit or not canonical.
pub fn check_target(s: &CpuState, rip: u64) -> Helped {
    check_target_in(s, rip & rip_mask(s), &s.seg[CS])
}

/// Checks RIP against a code segment that is (or is about to be) in CS.
pub(super) fn check_target_in(s: &CpuState, rip: u64, cs: &Segment) -> Helped {
    let inside = if is_long(s) && cs.attr & attr::L != 0 { is_canonical(s, rip) } else { rip <= u64::from(cs.limit) };
    if inside { Ok(rip) } else { Err(GP0) }
}
