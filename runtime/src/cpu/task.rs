//! The task-state segment: stacks of inner levels, and task switches.
//!
//! Place in the pipeline: under `far` and `interrupt`. Invariant: everything that can fault on the outgoing side happens
//! before the first register changes; faults of the incoming task are raised in its own context, as the SDM has it.

use twofold_arch::control::{cr0, rflags};
use twofold_arch::segment::attr;
use twofold_arch::vmx::qualification::TaskSwitchSource;
use twofold_arch::{Exception, LinearAddr, Segment, Vector};

use super::control;
use super::mode::{CS, LDTR, SS, TR, is_canonical};
use super::segments::{fetch_descriptor, fetch_ldt, is_null, null_segment, real_segment, selector_fault, set_busy};
use super::stack::Stack;
use crate::vcpu::{MemAs, Trap, Vcpu};

/// Reads `size` bytes at `offset` of a TSS; `fault` when they are beyond its limit.
pub(super) fn read_tss(v: &mut Vcpu, tss: &Segment, offset: u32, size: u32, fault: Trap) -> Result<u64, Trap> {
    if u64::from(offset) + u64::from(size) - 1 > u64::from(tss.limit) || tss.attr & attr::UNUSABLE != 0 {
        return Err(fault);
    }
    v.read(LinearAddr(tss.base.wrapping_add(u64::from(offset))), size, MemAs::System)
}

/// The stack pointer of a 64-bit TSS: RSP0..=RSP2 for 0..=2, IST1..=IST7 for 4..=10.
pub(super) fn long_stack(v: &mut Vcpu, index: u32) -> Result<u64, Trap> {
    let tss = v.state.seg[TR];
    let sp = read_tss(v, &tss, 4 + 8 * index, 8, selector_fault(Vector::InvalidTss, tss.selector))?;
    if is_canonical(&v.state, sp) { Ok(sp) } else { Err(Exception::SS0.into()) }
}

/// SS and ESP of privilege level `dpl` from the TSS, SS with its descriptor after all checks.
pub(super) fn inner_stack(v: &mut Vcpu, dpl: u32) -> Result<(Segment, u64), Trap> {
    let tss = v.state.seg[TR];
    let fault = selector_fault(Vector::InvalidTss, tss.selector);
    let (sp, selector) = if tss.attr & 8 != 0 {
        (read_tss(v, &tss, 4 + 8 * dpl, 4, fault)?, read_tss(v, &tss, 8 + 8 * dpl, 2, fault)?)
    } else {
        (read_tss(v, &tss, 2 + 4 * dpl, 2, fault)?, read_tss(v, &tss, 4 + 4 * dpl, 2, fault)?)
    };
    let selector = selector as u16;
    if is_null(selector) {
        return Err(selector_fault(Vector::InvalidTss, 0));
    }
    let mut d = fetch_descriptor(v, selector, Vector::InvalidTss)?;
    if u32::from(selector & 3) != dpl || d.dpl() != dpl || d.is_system() || d.is_code() || !d.has_rw() {
        return Err(selector_fault(Vector::InvalidTss, selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::StackFault, selector));
    }
    d.set_accessed(v)?;
    Ok((d.segment(selector), sp))
}

/// What switches tasks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An exception or interrupt through a task gate.
    Interrupt,
    /// IRET with NT set.
    Return,
}

/// The task that the current TSS links to: where IRET with NT set goes.
pub(super) fn previous(v: &mut Vcpu) -> Result<u16, Trap> {
    let tss = v.state.seg[TR];
    Ok(read_tss(v, &tss, 0, 2, selector_fault(Vector::InvalidTss, tss.selector))? as u16)
}

/// What a TSS holds of a task, widths made uniform.
#[derive(Clone, Copy, Debug, Default)]
struct TaskImage {
    cr3: Option<u32>,
    rip: u32,
    flags: u32,
    gpr: [u32; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Field offsets of the two TSS formats (SDM Vol 3A, "Task-State Segment", "16-Bit Task-State Segment").
struct Layout {
    width: u32,
    rip: u32,
    flags: u32,
    gpr: u32,
    selectors: u32,
    segments: usize,
    ldt: u32,
    min_limit: u32,
}
const TSS32: Layout =
    Layout { width: 4, rip: 32, flags: 36, gpr: 40, selectors: 72, segments: 6, ldt: 96, min_limit: 103 };
const TSS16: Layout =
    Layout { width: 2, rip: 14, flags: 16, gpr: 18, selectors: 34, segments: 4, ldt: 42, min_limit: 43 };

fn layout(tss: &Segment) -> &'static Layout {
    if tss.attr & 8 != 0 { &TSS32 } else { &TSS16 }
}

/// Switches to the task whose TSS `selector` names (SDM Vol 3A, "Task Switching"). The outer error is the instruction's or
/// the delivery's own, with nothing changed; the inner one is raised by the new task, at its first instruction.
pub(super) fn switch(
    v: &mut Vcpu,
    selector: u16,
    cause: Cause,
    rip: u64,
    error: Option<u32>,
) -> Result<Result<(), Trap>, Trap> {
    let bad = if cause == Cause::Return { Vector::InvalidTss } else { Vector::GeneralProtection };
    if is_null(selector) || selector & 4 != 0 {
        return Err(selector_fault(bad, selector));
    }
    let d = fetch_descriptor(v, selector, bad)?;
    let busy = cause == Cause::Return;
    let expected = if busy { matches!(d.kind(), 3 | 11) } else { matches!(d.kind(), 1 | 9) };
    if !d.is_system() || !expected {
        return Err(selector_fault(bad, selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    let mut tss = d.segment(selector);
    let new = layout(&tss);
    if tss.limit < new.min_limit {
        return Err(selector_fault(Vector::InvalidTss, selector));
    }
    if v.vmx.non_root {
        let source = match cause {
            Cause::Call => TaskSwitchSource::Call,
            Cause::Return => TaskSwitchSource::Iret,
            Cause::Jump => TaskSwitchSource::Jmp,
            Cause::Interrupt => TaskSwitchSource::TaskGate,
        };
        return Err(crate::vmx::intercept::task_switch(v, selector, source));
    }
    let image = read_image(v, &tss)?;
    let old_tss = v.state.seg[TR];
    let mut flags = v.state.rflags();
    if cause == Cause::Return {
        flags &= !rflags::NT;
    }
    save_outgoing(v, &old_tss, rip, flags)?;
    if matches!(cause, Cause::Jump | Cause::Return) && !is_null(old_tss.selector) {
        let old = fetch_descriptor(v, old_tss.selector, Vector::InvalidTss)?;
        set_busy(v, &old, false)?;
    }
    let nested = matches!(cause, Cause::Call | Cause::Interrupt);
    if nested {
        v.write(LinearAddr(tss.base), 2, u64::from(old_tss.selector), MemAs::System)?;
    }
    if !busy {
        set_busy(v, &d, true)?;
    }
    tss.attr |= 2;
    v.state.seg[TR] = tss;
    v.state.cr0 |= cr0::TS;
    load_registers(v, &image, nested);
    Ok(enter(v, &image, new.width, error))
}

/// What happens in the new task's context: segments, the error code, the limit of CS, the debug trap.
fn enter(v: &mut Vcpu, image: &TaskImage, width: u32, error: Option<u32>) -> Result<(), Trap> {
    load_segments(v, image)?;
    if let Some(error) = error {
        let mut stack = Stack::current(&v.state);
        stack.push(v, width, u64::from(error))?;
        stack.commit(&mut v.state);
    }
    if v.state.rip > u64::from(v.state.seg[CS].limit) {
        return Err(Exception::GP0.into());
    }
    if image.trap {
        v.state.dr[6] |= super::interrupt::dr6::BT;
        return Err(Exception::new(Vector::Debug).into());
    }
    Ok(())
}

fn read_image(v: &mut Vcpu, tss: &Segment) -> Result<TaskImage, Trap> {
    let l = layout(tss);
    let fault = selector_fault(Vector::InvalidTss, tss.selector);
    let mut image = TaskImage::default();
    if l.width == 4 {
        image.cr3 = Some(read_tss(v, tss, 28, 4, fault)? as u32);
        image.trap = read_tss(v, tss, 100, 2, fault)? & 1 != 0;
    }
    image.rip = read_tss(v, tss, l.rip, l.width, fault)? as u32;
    image.flags = read_tss(v, tss, l.flags, l.width, fault)? as u32;
    for (i, r) in image.gpr.iter_mut().enumerate() {
        *r = read_tss(v, tss, l.gpr + i as u32 * l.width, l.width, fault)? as u32;
    }
    for i in 0..l.segments {
        image.selectors[i] = read_tss(v, tss, l.selectors + i as u32 * l.width, 2, fault)? as u16;
    }
    image.ldt = read_tss(v, tss, l.ldt, 2, fault)? as u16;
    Ok(image)
}

fn save_outgoing(v: &mut Vcpu, tss: &Segment, rip: u64, flags: u64) -> Result<(), Trap> {
    let l = layout(tss);
    if tss.attr & attr::UNUSABLE != 0 || tss.limit < l.min_limit {
        return Err(selector_fault(Vector::InvalidTss, tss.selector));
    }
    let at = |offset: u32| LinearAddr(tss.base.wrapping_add(u64::from(offset)));
    v.write(at(l.rip), l.width, rip, MemAs::System)?;
    v.write(at(l.flags), l.width, flags, MemAs::System)?;
    for i in 0..8 {
        let value = v.state.gpr[i as usize];
        v.write(at(l.gpr + i * l.width), l.width, value, MemAs::System)?;
    }
    for i in 0..l.segments {
        let selector = u64::from(v.state.seg[i].selector);
        v.write(at(l.selectors + i as u32 * l.width), 2, selector, MemAs::System)?;
    }
    Ok(())
}

fn load_registers(v: &mut Vcpu, image: &TaskImage, nested: bool) {
    if let Some(cr3) = image.cr3
        && v.state.cr0 & cr0::PG != 0
    {
        control::switch_cr3(v, u64::from(cr3));
    }
    let s = &mut v.state;
    let mut flags = u64::from(image.flags) & !rflags::RF;
    if nested {
        flags |= rflags::NT;
    }
    s.set_rflags(flags);
    for (r, value) in s.gpr.iter_mut().zip(image.gpr) {
        *r = u64::from(value);
    }
    s.rip = u64::from(image.rip);
    s.dr[7] &= !0x155;
    // Selectors are visible in the new task even when loading a descriptor faults.
    for i in 0..6 {
        s.seg[i] = null_segment(image.selectors[i]);
    }
    s.seg[LDTR] = null_segment(image.ldt);
    s.cpl = if flags & rflags::VM != 0 { 3 } else { u32::from(image.selectors[CS] & 3) };
}

fn load_segments(v: &mut Vcpu, image: &TaskImage) -> Result<(), Trap> {
    if !is_null(image.ldt) {
        v.state.seg[LDTR] = fetch_ldt(v, image.ldt, Vector::InvalidTss, Vector::InvalidTss)?;
    }
    if v.state.rflags_sys & rflags::VM != 0 {
        for i in 0..6 {
            let old = v.state.seg[i];
            v.state.seg[i] = real_segment(&old, image.selectors[i], true);
        }
        return Ok(());
    }
    let ts = |selector| selector_fault(Vector::InvalidTss, selector);
    let cpl = v.state.cpl;
    let selector = image.selectors[CS];
    if is_null(selector) {
        return Err(ts(0));
    }
    let mut d = fetch_descriptor(v, selector, Vector::InvalidTss)?;
    if !d.is_code() || if d.is_conforming() { d.dpl() > cpl } else { d.dpl() != cpl } {
        return Err(ts(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    d.set_accessed(v)?;
    v.state.seg[CS] = d.segment(selector);
    let selector = image.selectors[SS];
    if is_null(selector) {
        return Err(ts(0));
    }
    let mut d = fetch_descriptor(v, selector, Vector::InvalidTss)?;
    if d.is_system() || d.is_code() || !d.has_rw() || d.dpl() != cpl || u32::from(selector & 3) != cpl {
        return Err(ts(selector));
    }
    if !d.is_present() {
        return Err(selector_fault(Vector::StackFault, selector));
    }
    d.set_accessed(v)?;
    v.state.seg[SS] = d.segment(selector);
    for i in [0, 3, 4, 5] {
        let selector = image.selectors[i];
        if is_null(selector) {
            continue;
        }
        let mut d = fetch_descriptor(v, selector, Vector::InvalidTss)?;
        let conforming = d.is_code() && d.is_conforming();
        let reachable = conforming || (d.dpl() >= cpl && d.dpl() >= u32::from(selector & 3));
        if d.is_system() || (d.is_code() && !d.has_rw()) || !reachable {
            return Err(ts(selector));
        }
        if !d.is_present() {
            return Err(selector_fault(Vector::SegmentNotPresent, selector));
        }
        d.set_accessed(v)?;
        v.state.seg[i] = d.segment(selector);
    }
    Ok(())
}
