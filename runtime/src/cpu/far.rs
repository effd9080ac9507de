//! Far transfers: JMP, CALL and RET through segments and gates, IRET, and the fast system calls.
//!
//! Place in the pipeline: helpers that end a block and set `state.rip`. Task switches are in `task`. Invariant: registers
//! change only after every check and memory access of the instruction succeeded.

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::{CpuState, Segment, Vector};

use super::Helped;
use super::mode::{CS, SS, iopl, is_64bit, is_canonical, is_canonical_base, is_long, is_protected, is_v86};
use super::segments::{
    Descriptor, GP0, UD, check_target_in, fetch_descriptor, fetch_upper, gp, is_null, null_segment, null_ss,
    real_segment, selector_fault,
};
use super::stack::{RSP, Stack, sp_mask};
use super::task;
use crate::vcpu::{MemAs, Trap, Vcpu};

const RCX: usize = 1;
const RDX: usize = 2;
const R11: usize = 11;

/// The low `1 << log2` bytes of a value.
pub(super) const fn truncate(value: u64, log2: u64) -> u64 {
    match log2 {
        0 => value & 0xff,
        1 => value & 0xffff,
        2 => value & 0xffff_ffff,
        _ => value,
    }
}

/// A flat segment as the fast system calls load it: base 0, limit 4 GiB, present, accessed.
const fn flat(selector: u16, kind: u32, dpl: u32, extra: u32) -> Segment {
    let attr = kind | attr::S | attr::P | attr::G | dpl << attr::DPL_SHIFT | extra;
    Segment { base: 0, limit: u32::MAX, attr, selector, reserved: [0; 3] }
}
const CODE: u32 = 0xb;
const DATA: u32 = 0x3;

// ---- direct targets and call gates ------------------------------------------------------------------------------------

/// CS for a JMP or CALL to the code segment `d`; CPL stays.
fn direct_target(v: &mut Vcpu, selector: u16, mut d: Descriptor) -> Result<Segment, Trap> {
    let (cpl, rpl) = (v.state.cpl, u32::from(selector & 3));
    if !d.is_code() || (is_long(&v.state) && d.is_long() && d.is_db()) {
        return Err(gp(selector));
    }
    let allowed = if d.is_conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
    if !allowed {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    d.set_accessed(v)?;
    Ok(d.segment(selector & !3 | cpl as u16))
}

/// A call gate after its own checks, and the code descriptor it leads to.
struct Gate {
    selector: u16,
    offset: u64,
    params: u32,
    bytes: u32,
    code: Descriptor,
}

fn read_gate(v: &mut Vcpu, selector: u16, d: &Descriptor) -> Result<Gate, Trap> {
    let long = is_long(&v.state);
    if d.dpl() < v.state.cpl || d.dpl() < u32::from(selector & 3) {
        return Err(gp(selector));
    }
    let mut offset = d.raw & 0xffff | d.raw >> 32 & 0xffff_0000;
    let bytes = match (long, d.kind()) {
        (true, _) => 8,
        (false, 0xc) => 4,
        _ => {
            offset &= 0xffff;
            2
        }
    };
    if long {
        offset |= fetch_upper(v, selector)?;
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    let target = (d.raw >> 16) as u16;
    if is_null(target) {
        return Err(GP0);
    }
    let code = fetch_descriptor(v, target, Vector::GeneralProtection)?;
    if !code.is_code() || code.dpl() > v.state.cpl || (long && (!code.is_long() || code.is_db())) {
        return Err(gp(target));
    }
    if !code.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, target));
    }
    Ok(Gate { selector: target, offset, params: (d.raw >> 32) as u32 & 31, bytes, code })
}

/// What a system descriptor is to a far JMP or CALL.
enum System {
    CallGate,
    TaskGate,
    Tss,
}

fn classify(s: &CpuState, selector: u16, d: &Descriptor) -> Result<System, Trap> {
    match (d.kind(), is_long(s)) {
        (0xc, _) | (4, false) => Ok(System::CallGate),
        (5, false) => Ok(System::TaskGate),
        (1 | 9, false) => Ok(System::Tss),
        _ => Err(gp(selector)),
    }
}

/// The TSS selector a JMP or CALL to a task gate or TSS switches to, after the checks of the gate or descriptor.
fn task_target(v: &mut Vcpu, selector: u16, d: &Descriptor, gate: bool) -> Result<u16, Trap> {
    if d.dpl() < v.state.cpl || d.dpl() < u32::from(selector & 3) {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    Ok(if gate { (d.raw >> 16) as u16 } else { selector })
}

/// A task switch by an instruction, to the task of `tss` or, without one, the one the current TSS links to. What the new
/// task raises before its first instruction is delivered here, in its context.
fn switch_task(v: &mut Vcpu, tss: Option<u16>, cause: task::Cause, next_rip: u64) -> Helped {
    let tss = match tss {
        Some(tss) => tss,
        None => task::previous(v)?,
    };
    if let Err(trap) = task::switch(v, tss, cause, next_rip, None)? {
        // A shutdown shows again when the same trap is delivered once more.
        super::interrupt::deliver_trap(v, trap).map_err(|_| trap)?;
    }
    Ok(0)
}

/// Far JMP (SDM Vol 2A, "JMP—Jump").
pub fn far_jmp(v: &mut Vcpu, selector: u16, offset: u64, log2: u64, next_rip: u64) -> Helped {
    let offset = truncate(offset, log2);
    if !is_protected(&v.state) {
        return real_transfer(v, selector, offset);
    }
    if is_null(selector) {
        return Err(GP0);
    }
    let d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let (cs, rip) = if d.is_system() {
        match classify(&v.state, selector, &d)? {
            System::CallGate => {
                let mut g = read_gate(v, selector, &d)?;
                if !g.code.is_conforming() && g.code.dpl() != v.state.cpl {
                    return Err(gp(g.selector));
                }
                g.code.set_accessed(v)?;
                (g.code.segment(g.selector & !3 | v.state.cpl as u16), g.offset)
            }
            kind => {
                let tss = task_target(v, selector, &d, matches!(kind, System::TaskGate))?;
                return switch_task(v, Some(tss), task::Cause::Jump, next_rip);
            }
        }
    } else {
        (direct_target(v, selector, d)?, offset)
    };
    let rip = check_target_in(&v.state, rip, &cs)?;
    v.state.seg[CS] = cs;
    v.state.rip = rip;
    Ok(0)
}

fn real_transfer(v: &mut Vcpu, selector: u16, offset: u64) -> Helped {
    let cs = real_segment(&v.state.seg[CS], selector, is_v86(&v.state));
    let rip = check_target_in(&v.state, offset, &cs)?;
    v.state.seg[CS] = cs;
    v.state.rip = rip;
    Ok(0)
}

/// Far CALL (SDM Vol 2A, "CALL—Call Procedure").
pub fn far_call(v: &mut Vcpu, selector: u16, offset: u64, log2: u64, next_rip: u64) -> Helped {
    let offset = truncate(offset, log2);
    let bytes = 1 << log2.clamp(1, 3);
    let old_cs = u64::from(v.state.seg[CS].selector);
    if !is_protected(&v.state) {
        let mut stack = Stack::current(&v.state);
        let cs = real_segment(&v.state.seg[CS], selector, is_v86(&v.state));
        check_target_in(&v.state, offset, &cs)?;
        stack.push(v, bytes, old_cs)?;
        stack.push(v, bytes, next_rip)?;
        real_transfer(v, selector, offset)?;
        stack.commit(&mut v.state);
        return Ok(0);
    }
    if is_null(selector) {
        return Err(GP0);
    }
    let d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let (cs, rip, bytes) = if d.is_system() {
        match classify(&v.state, selector, &d)? {
            System::CallGate => {
                let mut g = read_gate(v, selector, &d)?;
                if !g.code.is_conforming() && g.code.dpl() < v.state.cpl {
                    return call_inner(v, g, next_rip);
                }
                g.code.set_accessed(v)?;
                (g.code.segment(g.selector & !3 | v.state.cpl as u16), g.offset, g.bytes)
            }
            kind => {
                let tss = task_target(v, selector, &d, matches!(kind, System::TaskGate))?;
                return switch_task(v, Some(tss), task::Cause::Call, next_rip);
            }
        }
    } else {
        (direct_target(v, selector, d)?, offset, bytes)
    };
    let rip = check_target_in(&v.state, rip, &cs)?;
    let mut stack = Stack::current(&v.state);
    stack.push(v, bytes, old_cs)?;
    stack.push(v, bytes, next_rip)?;
    stack.commit(&mut v.state);
    v.state.seg[CS] = cs;
    v.state.rip = rip;
    Ok(0)
}

/// CALL through a gate to a more privileged level.
fn call_inner(v: &mut Vcpu, mut g: Gate, next_rip: u64) -> Helped {
    let dpl = g.code.dpl();
    let old = Stack::current(&v.state);
    let (old_cs, old_ss) = (v.state.seg[CS].selector, v.state.seg[SS].selector);
    let (ss, mut stack) = if is_long(&v.state) {
        let sp = task::long_stack(v, dpl)?;
        (null_ss(dpl as u16, dpl), Stack::long(sp, MemAs::InnerStack))
    } else {
        let (ss, sp) = task::inner_stack(v, dpl)?;
        (ss, Stack::legacy(ss, sp, MemAs::InnerStack, u32::from(ss.selector & !3)))
    };
    g.code.set_accessed(v)?;
    let cs = g.code.segment(g.selector & !3 | dpl as u16);
    let rip = check_target_in(&v.state, g.offset, &cs)?;
    stack.push(v, g.bytes, u64::from(old_ss))?;
    stack.push(v, g.bytes, old.sp)?;
    if g.bytes < 8 {
        for i in (0..g.params).rev() {
            let value = old.peek(v, u64::from(i * g.bytes), g.bytes)?;
            stack.push(v, g.bytes, value)?;
        }
    }
    stack.push(v, g.bytes, u64::from(old_cs))?;
    stack.push(v, g.bytes, next_rip)?;
    let s = &mut v.state;
    s.seg[CS] = cs;
    s.seg[SS] = ss;
    s.gpr[RSP] = stack.sp;
    s.cpl = dpl;
    s.rip = rip;
    Ok(0)
}

// ---- returns ----------------------------------------------------------------------------------------------------------

/// CS for a return to `selector` (far RET, IRET).
fn return_cs(v: &mut Vcpu, selector: u16) -> Result<Segment, Trap> {
    if is_null(selector) {
        return Err(GP0);
    }
    let mut d = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let rpl = u32::from(selector & 3);
    let allowed = d.is_code() && rpl >= v.state.cpl && if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !allowed || (is_long(&v.state) && d.is_long() && d.is_db()) {
        return Err(gp(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    d.set_accessed(v)?;
    Ok(d.segment(selector))
}

/// SS for a return to privilege level `cpl`, into 64-bit code or not.
fn return_ss(v: &mut Vcpu, selector: u16, cpl: u32, to_64bit: bool) -> Result<Segment, Trap> {
    let rpl = u32::from(selector & 3);
    if is_null(selector) {
        return if to_64bit && cpl != 3 && rpl == cpl { Ok(null_ss(selector, cpl)) } else { Err(GP0) };
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

/// After a return to an outer level, data segments that level may not use become null.
fn drop_inner_segments(s: &mut CpuState, cpl: u32) {
    for i in [0, 3, 4, 5] {
        let seg = &mut s.seg[i];
        let conforming = seg.attr & (attr::CODE | attr::EC) == attr::CODE | attr::EC;
        if seg.attr & attr::UNUSABLE == 0 && !conforming && u32::from(seg.dpl()) < cpl {
            // The hidden base stays: 64-bit code still addresses through those of FS and GS.
            *seg = Segment { base: seg.base, ..null_segment(0) };
        }
    }
}

/// Goes to another stack on a return: SS, RSP, CPL.
fn enter_outer_stack(s: &mut CpuState, ss: Segment, sp: u64, to_64bit: bool) {
    s.seg[SS] = ss;
    // Returning to a 16-bit stack replaces SP alone; the inner ESP's upper half shows through.
    let mask = if to_64bit { u64::MAX } else { sp_mask(&ss) };
    s.gpr[RSP] = if mask == 0xffff { s.gpr[RSP] & !mask | sp & mask } else { sp & mask };
}

/// Far RET (SDM Vol 2B, "RET—Return From Procedure").
pub fn far_ret(v: &mut Vcpu, log2: u64, release: u64) -> Helped {
    let bytes = 1 << log2.clamp(1, 3);
    let mut stack = Stack::current(&v.state);
    let rip = stack.pop(v, bytes)?;
    let selector = stack.pop(v, bytes)? as u16;
    if !is_protected(&v.state) {
        stack.sp = stack.moved(release);
        real_transfer(v, selector, rip)?;
        stack.commit(&mut v.state);
        return Ok(0);
    }
    let cs = return_cs(v, selector)?;
    let cpl = u32::from(selector & 3);
    let to_64bit = is_long(&v.state) && cs.attr & attr::L != 0;
    let rip = check_target_in(&v.state, rip, &cs)?;
    stack.sp = stack.moved(release);
    if cpl == v.state.cpl {
        stack.commit(&mut v.state);
    } else {
        let sp = stack.pop(v, bytes)?;
        let ss_selector = stack.pop(v, bytes)? as u16;
        let ss = return_ss(v, ss_selector, cpl, to_64bit)?;
        let s = &mut v.state;
        enter_outer_stack(s, ss, sp, to_64bit);
        let mask = if to_64bit { u64::MAX } else { sp_mask(&ss) };
        s.gpr[RSP] = s.gpr[RSP] & !mask | s.gpr[RSP].wrapping_add(release) & mask;
        s.cpl = cpl;
        drop_inner_segments(s, cpl);
    }
    v.state.seg[CS] = cs;
    v.state.rip = rip;
    Ok(0)
}

/// The flags an IRET at the current CPL may change, for an operand of `bytes`. RF is never kept: it would be cleared
/// by the next instruction, and nothing before that looks at it.
fn iret_flags_mask(s: &CpuState, bytes: u32) -> u64 {
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if s.cpl <= iopl(s) {
        mask |= rflags::IF;
    }
    if s.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if bytes > 2 {
        mask |= rflags::AC | rflags::ID;
        if s.cpl == 0 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    mask
}

/// Sets the flags of `mask` from `image`; RF becomes clear.
pub(super) fn merge_flags(s: &mut CpuState, image: u64, mask: u64) {
    let kept = s.rflags() & !(mask | rflags::RF);
    s.set_rflags(kept | image & mask);
}

/// IRET (SDM Vol 2A, "IRET/IRETD/IRETQ—Interrupt Return").
pub fn iret(v: &mut Vcpu, log2: u64, next_rip: u64) -> Helped {
    let bytes = 1 << log2.clamp(1, 3);
    if !is_protected(&v.state) {
        iret_real(v, bytes)?;
    } else if v.state.rflags_sys & rflags::NT != 0 {
        if is_long(&v.state) {
            return Err(GP0);
        }
        switch_task(v, None, task::Cause::Return, next_rip)?;
    } else {
        iret_protected(v, bytes)?;
    }
    if v.vmx.non_root {
        crate::vmx::intercept::iret(v);
    } else {
        v.state.nmi_blocked = 0;
    }
    Ok(0)
}

fn iret_protected(v: &mut Vcpu, bytes: u32) -> Result<(), Trap> {
    let mut stack = Stack::current(&v.state);
    let (rip, selector, image, mut above) = if is_64bit(&v.state) {
        let [rip, selector, image, sp, ss] = stack.pops(v, bytes)?;
        (rip, selector as u16, image, Some((sp, ss as u16)))
    } else {
        let [rip, selector, image] = stack.pops(v, bytes)?;
        (rip, selector as u16, image, None)
    };
    let long = is_long(&v.state);
    if !long && bytes == 4 && image & rflags::VM != 0 && v.state.cpl == 0 {
        return return_to_v86(v, stack, rip, selector, image);
    }
    let cpl = u32::from(selector & 3);
    if above.is_none() && cpl > v.state.cpl {
        let [sp, ss] = stack.pops(v, bytes)?;
        above = Some((sp, ss as u16));
    }
    let cs = return_cs(v, selector)?;
    let to_64bit = long && cs.attr & attr::L != 0;
    let rip = check_target_in(&v.state, rip, &cs)?;
    let mask = iret_flags_mask(&v.state, bytes);
    if let Some((sp, ss)) = above {
        let ss = return_ss(v, ss, cpl, to_64bit)?;
        enter_outer_stack(&mut v.state, ss, sp, to_64bit);
        if cpl > v.state.cpl {
            drop_inner_segments(&mut v.state, cpl);
        }
    } else {
        stack.commit(&mut v.state);
    }
    let s = &mut v.state;
    merge_flags(s, image, mask);
    // RF holds off instruction breakpoints for the one instruction that is returned to.
    if bytes > 2 {
        s.rflags_sys |= image & rflags::RF;
    }
    s.cpl = cpl;
    s.seg[CS] = cs;
    s.rip = rip;
    Ok(())
}

fn return_to_v86(v: &mut Vcpu, mut stack: Stack, rip: u64, cs: u16, image: u64) -> Result<(), Trap> {
    let sp = stack.pop(v, 4)?;
    let mut selectors = [0u16; 6];
    // SS, ES, DS, FS, GS lie above ESP in this order.
    for i in [SS, 0, 3, 4, 5] {
        selectors[i] = stack.pop(v, 4)? as u16;
    }
    selectors[CS] = cs;
    let s = &mut v.state;
    s.set_rflags(image & !rflags::RF);
    for (i, selector) in selectors.into_iter().enumerate() {
        s.seg[i] = real_segment(&s.seg[i], selector, true);
    }
    s.gpr[RSP] = sp;
    s.cpl = 3;
    s.rip = rip & 0xffff;
    Ok(())
}

fn iret_real(v: &mut Vcpu, bytes: u32) -> Result<(), Trap> {
    let v86 = is_v86(&v.state);
    let vme = v.state.cr4 & cr4::VME != 0;
    let restricted = v86 && iopl(&v.state) != 3;
    if restricted && (bytes != 2 || !vme) {
        return Err(GP0);
    }
    let mut stack = Stack::current(&v.state);
    let rip = stack.pop(v, bytes)?;
    let selector = stack.pop(v, bytes)? as u16;
    let mut image = stack.pop(v, bytes)?;
    let cs = real_segment(&v.state.seg[CS], selector, v86);
    let rip = check_target_in(&v.state, rip, &cs)?;
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if restricted {
        // SDM Vol 3B, "Virtual-8086 Mode Extensions": IF of the image goes to VIF.
        let pending = v.state.rflags_sys & rflags::VIP != 0;
        if (image & rflags::IF != 0 && pending) || image & rflags::TF != 0 {
            return Err(GP0);
        }
        image = image & !rflags::VIF | if image & rflags::IF != 0 { rflags::VIF } else { 0 };
        mask |= rflags::VIF;
    } else {
        mask |= rflags::IF;
        if !v86 {
            mask |= rflags::IOPL;
        }
        if bytes > 2 {
            mask |= rflags::AC | rflags::ID;
        }
    }
    let s = &mut v.state;
    stack.commit(s);
    merge_flags(s, image, mask);
    s.seg[CS] = cs;
    s.rip = rip;
    Ok(())
}

// ---- fast system calls ------------------------------------------------------------------------------------------------

/// SYSCALL (SDM Vol 2B). It and SYSRET end in a single-step trap if RFLAGS.TF is set after them, not before: a kernel that masks TF
/// sees none, and the trap comes as SYSRET returns.
pub fn syscall(v: &mut Vcpu, next_rip: u64) -> Helped {
    let s = &mut v.state;
    if s.efer & efer::SCE == 0 || !is_64bit(s) {
        return Err(UD);
    }
    let image = s.rflags() & !rflags::RF;
    s.gpr[RCX] = next_rip;
    s.gpr[R11] = image;
    s.set_rflags(image & !s.msrs.fmask);
    if image & rflags::TF != 0 {
        v.step_after = Some(s.rflags_sys & rflags::TF != 0);
    }
    let selector = (s.msrs.star >> 32) as u16 & 0xfffc;
    s.seg[CS] = flat(selector, CODE, 0, attr::L);
    s.seg[SS] = flat(selector.wrapping_add(8), DATA, 0, attr::DB);
    s.cpl = 0;
    s.rip = s.msrs.lstar;
    Ok(0)
}

/// SYSRET (SDM Vol 2B).
pub fn sysret(v: &mut Vcpu, log2: u64) -> Helped {
    let s = &mut v.state;
    if s.efer & efer::SCE == 0 || !is_64bit(s) {
        return Err(UD);
    }
    if s.cpl != 0 || (log2 == 3 && !is_canonical(s, s.gpr[RCX])) {
        return Err(GP0);
    }
    let base = (s.msrs.star >> 48) as u16;
    if log2 == 3 {
        s.seg[CS] = flat(base.wrapping_add(16) | 3, CODE, 3, attr::L);
        s.rip = s.gpr[RCX];
    } else {
        s.seg[CS] = flat(base | 3, CODE, 3, attr::DB);
        s.rip = s.gpr[RCX] & 0xffff_ffff;
    }
    s.seg[SS] = flat(base.wrapping_add(8) | 3, DATA, 3, attr::DB);
    s.cpl = 3;
    let image = s.gpr[R11];
    let was_stepping = s.rflags_sys & rflags::TF != 0;
    // RF and VM are not loaded.
    s.set_rflags(image & 0x3c_7fd7 & !rflags::RF);
    let steps = image & rflags::TF != 0;
    if steps || was_stepping {
        v.step_after = Some(steps);
    }
    Ok(0)
}

/// SYSENTER (SDM Vol 2B).
pub fn sysenter(v: &mut Vcpu) -> Helped {
    let s = &mut v.state;
    if s.cr0 & cr0::PE == 0 || s.msrs.sysenter_cs & 0xfffc == 0 {
        return Err(GP0);
    }
    let long = is_long(s);
    s.rflags_sys &= !(rflags::VM | rflags::IF | rflags::RF);
    let selector = s.msrs.sysenter_cs as u16 & 0xfffc;
    s.seg[CS] = flat(selector, CODE, 0, if long { attr::L } else { attr::DB });
    s.seg[SS] = flat(selector.wrapping_add(8), DATA, 0, attr::DB);
    s.cpl = 0;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    s.gpr[RSP] = s.msrs.sysenter_esp & mask;
    s.rip = s.msrs.sysenter_eip & mask;
    Ok(0)
}

/// SYSEXIT (SDM Vol 2B).
pub fn sysexit(v: &mut Vcpu, log2: u64) -> Helped {
    let s = &mut v.state;
    if s.msrs.sysenter_cs & 0xfffc == 0 || s.cr0 & cr0::PE == 0 || s.cpl != 0 || is_v86(s) {
        return Err(GP0);
    }
    let selector = s.msrs.sysenter_cs as u16 & 0xfffc;
    if log2 == 3 {
        if !is_canonical(s, s.gpr[RCX]) || !is_canonical(s, s.gpr[RDX]) {
            return Err(GP0);
        }
        s.seg[CS] = flat(selector.wrapping_add(32) | 3, CODE, 3, attr::L);
        s.seg[SS] = flat(selector.wrapping_add(40) | 3, DATA, 3, attr::DB);
        s.gpr[RSP] = s.gpr[RCX];
        s.rip = s.gpr[RDX];
    } else {
        s.seg[CS] = flat(selector.wrapping_add(16) | 3, CODE, 3, attr::DB);
        s.seg[SS] = flat(selector.wrapping_add(24) | 3, DATA, 3, attr::DB);
        s.gpr[RSP] = s.gpr[RCX] & 0xffff_ffff;
        s.rip = s.gpr[RDX] & 0xffff_ffff;
    }
    s.cpl = 3;
    Ok(0)
}

/// SWAPGS (SDM Vol 2B).
pub fn swapgs(v: &mut Vcpu) -> Helped {
    let s = &mut v.state;
    if !is_64bit(s) {
        return Err(UD);
    }
    if s.cpl != 0 {
        return Err(GP0);
    }
    core::mem::swap(&mut s.seg[5].base, &mut s.msrs.kernel_gs_base);
    Ok(0)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE by `which` 0..=3; `value` is written, or what is read is returned.
pub fn fs_gs_base(v: &mut Vcpu, which: u64, value: u64) -> Helped {
    let s = &mut v.state;
    if !is_64bit(s) || s.cr4 & cr4::FSGSBASE == 0 {
        return Err(UD);
    }
    let index = 4 + (which & 1) as usize;
    if which & 2 == 0 {
        return Ok(s.seg[index].base);
    }
    if !is_canonical_base(v, value) {
        return Err(GP0);
    }
    v.state.seg[index].base = value;
    Ok(0)
}
