//! Delivery of exceptions and interrupts in every mode, with double and triple faults.
//!
//! Place in the pipeline: the dispatcher calls [`deliver`] with `state.rip` at the instruction that faulted (faults) or at the
//! next one (traps, interrupts); INT n and its relatives come through [`soft_int`]. Afterwards `state.rip` is the handler's.
//! Invariants: registers change only when a whole frame is on the stack; a delivery ends, whatever the guest's tables say.

use twofold_arch::control::{cr0, cr4, rflags};
use twofold_arch::vmx::event::{EventType, pending_debug};
use twofold_arch::vmx::{ExitReason, InterruptionInfo};
use twofold_arch::{Exception, LinearAddr, Segment, Vector};

use super::Helped;
use super::mode::{CS, SS, TR, iopl, is_canonical, is_long, is_v86};
use super::segments::{
    GP0, check_target_in, fetch_descriptor, gp, is_null, null_segment, null_ss, real_segment, selector_fault,
};
use super::stack::{RSP, Stack};
use super::task;
use crate::config::DebugItem;
use crate::vcpu::{MemAs, Shutdown, Trap, Vcpu};
use crate::vmx::{self, intercept};

/// Something to be delivered through the IDT that no instruction asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An exception. `state.rip` is at the instruction for faults, after it for traps.
    Exception(Exception),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// Bits of DR6.
pub mod dr6 {
    #![allow(missing_docs)]
    /// A general-detect exception (access to a debug register under DR7.GD).
    pub const BD: u64 = 1 << 13;
    /// A single step.
    pub const BS: u64 = 1 << 14;
    /// A task switch to a task with its T bit set.
    pub const BT: u64 = 1 << 15;
    /// Bits that read as 1.
    pub const FIXED1: u64 = 0xffff_0ff0;
}

/// Error-code bits of faults met during a delivery.
const EXT: u32 = 1;
const IDT: u32 = 2;

/// One delivery as the modes' routines see it.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    vector: u8,
    error: Option<u32>,
    /// RIP for the frame.
    rip: u64,
    /// INT n, INT3 or INTO: the gate's DPL counts.
    software: bool,
    /// RF in the frame's flags: a fault.
    rf: bool,
}

impl Delivery {
    fn idt_error(&self) -> u32 {
        u32::from(self.vector) << 3 | IDT
    }
    fn gp(&self) -> Trap {
        Exception::gp(self.idt_error()).into()
    }
    fn not_present(&self) -> Trap {
        Exception::with_error(Vector::SegmentNotPresent, self.idt_error()).into()
    }
}

/// Delivers an event, and whatever the delivery itself runs into.
///
/// # Errors
/// Shutdown, after a fault during the delivery of a double fault.
pub fn deliver(v: &mut Vcpu, event: Event) -> Result<(), Shutdown> {
    let mut event = event;
    // No block goes on behind this.
    v.in_helper = false;
    loop {
        if v.vmx.non_root {
            if intercept::event(v, &event) {
                return vmx::exit::perform(v);
            }
            intercept::begin_delivery(v, &event);
        }
        let d = prepare(v, &event);
        if v.debug.has(DebugItem::Int) {
            trace(v, &event);
        }
        let fault = match dispatch(v, &d) {
            Ok(()) => {
                v.state.shadow = 0;
                v.state.halted = 0;
                if event == Event::Nmi {
                    v.state.nmi_blocked = 1;
                }
                v.vmx.vectoring = None;
                return Ok(());
            }
            Err(Trap::Exception(e)) => with_ext(e),
            Err(Trap::Restart) => return Ok(()),
            Err(Trap::VmExit) => {
                v.vmx.exit.cause = vmx::Cause::Delivery { rf: d.rf };
                return vmx::exit::perform(v);
            }
        };
        let first = match event {
            Event::Exception(first) => Some(first.vector),
            Event::Interrupt(_) | Event::Nmi => None,
        };
        match nested(v, first, fault)? {
            Some(next) => event = Event::Exception(next),
            None => return Ok(()),
        }
    }
}

/// A fault met while an event (`first`: an exception of this vector) was delivered: what is delivered next; `None` when a VM
/// exit has taken its place.
fn nested(v: &mut Vcpu, first: Option<Vector>, fault: Exception) -> Result<Option<Exception>, Shutdown> {
    if !v.vmx.non_root {
        return first.map_or(Ok(fault), |first| combine(first, fault)).map(Some);
    }
    // The exception bitmap sees the fault itself before it can become a double fault.
    if intercept::event(v, &Event::Exception(fault)) {
        vmx::exit::perform(v)?;
        return Ok(None);
    }
    match first.map_or(Ok(fault), |first| combine(first, fault)) {
        Ok(next) => {
            if next.vector == Vector::DoubleFault {
                v.vmx.vectoring = None;
            }
            Ok(Some(next))
        }
        Err(Shutdown::TripleFault) => {
            v.vmx.vectoring = None;
            v.vmx.exit = vmx::PendingExit::new(ExitReason::TripleFault, vmx::Cause::Event, 0);
            vmx::exit::perform(v)?;
            Ok(None)
        }
    }
}

/// The event that a VM entry injects (SDM Vol 3C, "Event Injection"): delivered whatever the exception bitmap says of it.
///
/// # Errors
/// Shutdown, after a VMX abort.
pub fn inject(v: &mut Vcpu, info: InterruptionInfo, error: u32, length: u32) -> Result<(), Shutdown> {
    let software = info.kind().is_some_and(EventType::is_software);
    let kind = info.kind();
    let rip = if software {
        v.state.rip.wrapping_add(u64::from(length)) & super::mode::rip_mask(&v.state)
    } else {
        v.state.rip
    };
    let checked = matches!(kind, Some(EventType::SoftwareInterrupt | EventType::SoftwareException));
    let vector = info.vector();
    let d = Delivery { vector, error: info.has_error_code().then_some(error), rip, software: checked, rf: false };
    v.vmx.vectoring = Some(vmx::Vectoring { info, error, length: software.then_some(length) });
    v.in_helper = false;
    let result = if kind == Some(EventType::SoftwareInterrupt) && is_v86(&v.state) {
        soft_int_v86(v, &d)
    } else {
        dispatch(v, &d)
    };
    match result {
        Ok(()) => {
            (v.state.shadow, v.state.halted) = (0, 0);
            if kind == Some(EventType::Nmi) {
                if v.vmx.controls.virtual_nmis() {
                    v.vmx.virtual_nmi_blocked = true;
                } else {
                    v.state.nmi_blocked = 1;
                }
            }
            v.vmx.vectoring = None;
            Ok(())
        }
        Err(Trap::VmExit) => {
            v.vmx.exit.cause = vmx::Cause::Delivery { rf: v.state.rflags() & rflags::RF != 0 };
            vmx::exit::perform(v)
        }
        Err(Trap::Restart) => Ok(()),
        Err(Trap::Exception(e)) => {
            let fault = if checked { e } else { with_ext(e) };
            let first = (kind == Some(EventType::HardwareException)).then(|| Vector::from_number(vector)).flatten();
            match nested(v, first, fault)? {
                Some(next) => deliver(v, Event::Exception(next)),
                None => Ok(()),
            }
        }
    }
}

/// `-d int`.
#[cold]
fn trace(v: &mut Vcpu, event: &Event) {
    let s = &v.state;
    let text = format!("int: {event:x?} at rip {:#x} cpl {} rsp {:#x} retired {}\n", s.rip, s.cpl, s.gpr[4], s.retired);
    v.trace.write(&text);
}

/// Counts the event and works out what its frame holds.
fn prepare(v: &mut Vcpu, event: &Event) -> Delivery {
    let rip = v.state.rip;
    match *event {
        Event::Exception(e) => {
            let vector = e.vector as u8;
            v.counters.exceptions[usize::from(vector & 31)] += 1;
            match e.vector {
                Vector::PageFault => v.state.cr2 = e.cr2,
                // What is not a breakpoint's bit stays until software clears it.
                // DR7.GD is cleared before the handler runs, so that it may look at the debug registers.
                Vector::Debug if e.cr2 != 0 => {
                    let s = &mut v.state;
                    s.dr[6] = s.dr[6] & !0xf | e.cr2 | dr6::FIXED1;
                    s.dr[7] &= !(1 << 13);
                }
                _ => {}
            }
            // Traps and aborts push RF as it is (SDM Vol 3B, "RF Flag").
            let fault = !matches!(
                e.vector,
                Vector::Debug
                    | Vector::Nmi
                    | Vector::Breakpoint
                    | Vector::Overflow
                    | Vector::DoubleFault
                    | Vector::MachineCheck
            );
            Delivery { vector, error: e.error, rip, software: false, rf: fault }
        }
        // The dispatcher counts these two.
        Event::Interrupt(vector) => Delivery { vector, error: None, rip, software: false, rf: false },
        Event::Nmi => Delivery { vector: 2, error: None, rip, software: false, rf: false },
    }
}

/// A fault met while something outside the program's doing was delivered has EXT in its error code.
fn with_ext(mut e: Exception) -> Exception {
    if matches!(
        e.vector,
        Vector::InvalidTss | Vector::SegmentNotPresent | Vector::StackFault | Vector::GeneralProtection
    ) {
        e.error = e.error.map(|code| code | EXT);
    }
    e
}

/// SDM Vol 3A, "Conditions for Generating a Double Fault".
fn combine(first: Vector, second: Exception) -> Result<Exception, Shutdown> {
    let contributory = |v: Vector| {
        matches!(
            v,
            Vector::DivideError
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
        )
    };
    let double = match first {
        Vector::DoubleFault => return Err(Shutdown::TripleFault),
        Vector::PageFault => second.vector == Vector::PageFault || contributory(second.vector),
        first => contributory(first) && contributory(second.vector),
    };
    Ok(if double { Exception::with_error(Vector::DoubleFault, 0) } else { second })
}

fn dispatch(v: &mut Vcpu, d: &Delivery) -> Result<(), Trap> {
    if v.state.cr0 & cr0::PE == 0 {
        through_ivt(v, d, v.state.idtr.base, rflags::IF)
    } else if is_long(&v.state) {
        through_long_gate(v, d)
    } else {
        through_gate(v, d)
    }
}

/// Delivers what abandoned the instruction at `state.rip`.
///
/// # Errors
/// Shutdown, as [`deliver`].
pub fn deliver_trap(v: &mut Vcpu, trap: Trap) -> Result<(), Shutdown> {
    match trap {
        Trap::Exception(e) => deliver(v, Event::Exception(e)),
        Trap::VmExit => vmx::exit::perform(v),
        // The dispatcher sees to it.
        Trap::Restart => Ok(()),
    }
}

/// The debug trap after an instruction that began with RFLAGS.TF set; `state.rip` is at the next one.
///
/// # Errors
/// Shutdown, as [`deliver`].
pub fn single_step(v: &mut Vcpu) -> Result<(), Shutdown> {
    debug_trap(v, dr6::BS)
}

/// A debug exception after an instruction: sets `bits` in DR6 and delivers #DB with `state.rip` at the next instruction.
///
/// # Errors
/// Shutdown, as [`deliver`].
pub fn debug_trap(v: &mut Vcpu, bits: u64) -> Result<(), Shutdown> {
    v.vmx.shadow = v.state.shadow;
    // Those that VM entry left pending behind a MOV SS come with it.
    let pending = std::mem::take(&mut v.vmx.pending_debug) & (pending_debug::B | pending_debug::BS);
    let bits = bits | pending;
    deliver(v, Event::Exception(Exception { cr2: bits, ..Exception::new(Vector::Debug) }))
}

/// INT n, INT3, INTO, INT1 by `kind` 0..=3 (SDM Vol 2A, "INT n/INTO/INT3/INT1"). A fault is the instruction's own.
pub fn soft_int(v: &mut Vcpu, vector: u8, next_rip: u64, kind: u64) -> Helped {
    let icebp = kind == 3;
    let d = Delivery { vector, error: None, rip: next_rip, software: !icebp, rf: false };
    if v.vmx.non_root {
        let event = match kind {
            0 => EventType::SoftwareInterrupt,
            3 => EventType::PrivilegedSoftwareException,
            _ => EventType::SoftwareException,
        };
        if kind != 0 {
            intercept::software_exception(v, vector, event)?;
        }
        let info = InterruptionInfo::new(vector, event, false);
        v.vmx.vectoring = Some(vmx::Vectoring { info, error: 0, length: None });
    }
    let result = if is_v86(&v.state) && kind == 0 { soft_int_v86(v, &d) } else { dispatch(v, &d) };
    match result {
        Ok(()) => {
            v.counters.soft_interrupts += 1;
            if icebp {
                v.watch.forget();
            }
            v.state.shadow = 0;
            v.vmx.vectoring = None;
            Ok(0)
        }
        Err(Trap::Exception(e)) if icebp => Err(with_ext(e).into()),
        Err(Trap::VmExit) => {
            v.vmx.exit.cause = vmx::Cause::Delivery { rf: false };
            Err(Trap::VmExit)
        }
        Err(e) => Err(e),
    }
}

/// INT n in virtual-8086 mode (SDM Vol 3B, "Software Interrupt Handling Methods While in Virtual-8086 Mode").
fn soft_int_v86(v: &mut Vcpu, d: &Delivery) -> Result<(), Trap> {
    let privileged = iopl(&v.state) == 3;
    if v.state.cr4 & cr4::VME != 0 {
        let tss = v.state.seg[TR];
        let map = task::read_tss(v, &tss, 102, 2, GP0)?;
        let at = map.wrapping_sub(32).wrapping_add(u64::from(d.vector >> 3)) & 0xffff;
        let bits = task::read_tss(v, &tss, at as u32, 1, GP0)?;
        if bits >> (d.vector & 7) & 1 == 0 {
            let flag = if privileged { rflags::IF } else { rflags::VIF };
            return through_ivt(v, d, 0, flag);
        }
    }
    if privileged { through_gate(v, d) } else { Err(GP0) }
}

// ---- real mode --------------------------------------------------------------------------------------------------------

/// Through the interrupt vector table at `table`, with a 16-bit frame; `enable` (IF or VIF) is cleared.
fn through_ivt(v: &mut Vcpu, d: &Delivery, table: u64, enable: u64) -> Result<(), Trap> {
    let v86 = is_v86(&v.state);
    let at = u64::from(d.vector) * 4;
    if !v86 && at + 3 > v.state.idtr.limit {
        return Err(d.gp());
    }
    let access = if v86 { MemAs::Cpl } else { MemAs::System };
    let target = v.read(LinearAddr(table.wrapping_add(at) & 0xffff_ffff), 4, access)?;
    let mut image = v.state.rflags();
    if enable == rflags::VIF {
        image = image & !rflags::IF | rflags::IOPL | if image & rflags::VIF != 0 { rflags::IF } else { 0 };
    }
    let mut stack = Stack::current(&v.state);
    stack.push(v, 2, image)?;
    stack.push(v, 2, u64::from(v.state.seg[CS].selector))?;
    stack.push(v, 2, d.rip)?;
    let s = &mut v.state;
    let cs = real_segment(&s.seg[CS], (target >> 16) as u16, v86);
    let rip = check_target_in(s, target & 0xffff, &cs)?;
    stack.commit(s);
    s.rflags_sys &= !(enable | rflags::TF | rflags::RF | if v86 { 0 } else { rflags::AC });
    s.seg[CS] = cs;
    s.rip = rip;
    Ok(())
}

// ---- protected mode ---------------------------------------------------------------------------------------------------

/// Through a gate of a 32-bit IDT, from protected or virtual-8086 mode.
fn through_gate(v: &mut Vcpu, d: &Delivery) -> Result<(), Trap> {
    let at = u64::from(d.vector) * 8;
    if at + 7 > v.state.idtr.limit {
        return Err(d.gp());
    }
    let la = LinearAddr(v.state.idtr.base.wrapping_add(at) & 0xffff_ffff);
    let gate = v.read(la, 8, MemAs::System)?;
    let kind = gate >> 40 & 0x1f;
    let dpl = (gate >> 45 & 3) as u32;
    if !matches!(kind, 5 | 6 | 7 | 0xe | 0xf) || (d.software && dpl < v.state.cpl) {
        return Err(d.gp());
    }
    if gate >> 47 & 1 == 0 {
        return Err(d.not_present());
    }
    let selector = (gate >> 16) as u16;
    if kind == 5 {
        return task::switch(v, selector, task::Cause::Interrupt, d.rip, d.error)?;
    }
    let bytes = if kind & 8 != 0 { 4 } else { 2 };
    let offset = gate & 0xffff | if bytes == 4 { gate >> 32 & 0xffff_0000 } else { 0 };
    if is_null(selector) {
        return Err(GP0);
    }
    let mut code = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    let cpl = v.state.cpl;
    if !code.is_code() || code.dpl() > cpl {
        return Err(gp(selector));
    }
    if !code.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    let v86 = is_v86(&v.state);
    if v86 && new_cpl != 0 {
        return Err(gp(selector));
    }
    let cs = code.segment(selector & !3 | new_cpl as u16);
    let rip = check_target_in(&v.state, offset, &cs)?;
    let image = frame_flags(v, d);
    let (old_ss, old_sp) = (v.state.seg[SS].selector, v.state.gpr[RSP]);
    let mut new_ss: Option<Segment> = None;
    let mut stack = Stack::current(&v.state);
    if new_cpl < cpl {
        let (ss, sp) = task::inner_stack(v, new_cpl)?;
        stack = Stack::legacy(ss, sp, MemAs::InnerStack, u32::from(ss.selector & !3));
        if v86 {
            for i in [5, 4, 3, 0] {
                let data = u64::from(v.state.seg[i].selector);
                stack.push(v, bytes, data)?;
            }
        }
        stack.push(v, bytes, u64::from(old_ss))?;
        stack.push(v, bytes, old_sp)?;
        new_ss = Some(ss);
    }
    code.set_accessed(v)?;
    push_frame(v, &mut stack, bytes, image, d)?;
    let s = &mut v.state;
    if let Some(ss) = new_ss {
        s.seg[SS] = ss;
    }
    if v86 {
        for i in [0, 3, 4, 5] {
            s.seg[i] = null_segment(0);
        }
    }
    stack.commit(s);
    enter_handler(v, cs, rip, new_cpl, kind & 1 == 0);
    Ok(())
}

/// RFLAGS as the frame holds it.
#[inline]
fn frame_flags(v: &Vcpu, d: &Delivery) -> u64 {
    v.state.rflags() | if d.rf { rflags::RF } else { 0 }
}

/// Pushes flags, CS, RIP and the error code.
#[inline]
fn push_frame(v: &mut Vcpu, stack: &mut Stack, bytes: u32, image: u64, d: &Delivery) -> Result<(), Trap> {
    stack.push(v, bytes, image)?;
    stack.push(v, bytes, u64::from(v.state.seg[CS].selector))?;
    stack.push(v, bytes, d.rip)?;
    if let Some(error) = d.error {
        stack.push(v, bytes, u64::from(error))?;
    }
    Ok(())
}

/// The registers at the handler's first instruction.
#[inline]
fn enter_handler(v: &mut Vcpu, cs: Segment, rip: u64, cpl: u32, interrupt_gate: bool) {
    let s = &mut v.state;
    s.seg[CS] = cs;
    s.cpl = cpl;
    s.rip = rip;
    s.rflags_sys &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM | if interrupt_gate { rflags::IF } else { 0 });
}

// ---- IA-32e mode ------------------------------------------------------------------------------------------------------

/// Through a 16-byte gate (SDM Vol 3A, "Exception and Interrupt Handling in 64-bit Mode").
fn through_long_gate(v: &mut Vcpu, d: &Delivery) -> Result<(), Trap> {
    let at = u64::from(d.vector) * 16;
    if at + 15 > v.state.idtr.limit {
        return Err(d.gp());
    }
    let la = LinearAddr(v.state.idtr.base.wrapping_add(at));
    let [low, high] = match v.read_quads(la, MemAs::System) {
        Some(gate) => gate,
        None => [v.read(la, 8, MemAs::System)?, v.read(la.wrapping_add(8), 8, MemAs::System)?],
    };
    let kind = low >> 40 & 0x1f;
    let cpl = v.state.cpl;
    if kind & 0x1e != 0xe || (d.software && ((low >> 45 & 3) as u32) < cpl) {
        return Err(d.gp());
    }
    if low >> 47 & 1 == 0 {
        return Err(d.not_present());
    }
    let selector = (low >> 16) as u16;
    if is_null(selector) {
        return Err(GP0);
    }
    let mut code = fetch_descriptor(v, selector, Vector::GeneralProtection)?;
    if !code.is_code() || code.dpl() > cpl || !code.is_long() || code.is_db() {
        return Err(gp(selector));
    }
    if !code.is_present() {
        return Err(selector_fault(Vector::SegmentNotPresent, selector));
    }
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    let rip = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    if !is_canonical(&v.state, rip) {
        return Err(GP0);
    }
    let ist = low >> 32 & 7;
    let sp = if ist != 0 {
        task::long_stack(v, 3 + ist as u32)?
    } else if new_cpl < cpl {
        task::long_stack(v, new_cpl)?
    } else {
        v.state.gpr[RSP]
    };
    let access = if new_cpl < cpl { MemAs::InnerStack } else { MemAs::Stack };
    let image = frame_flags(v, d);
    let (old_ss, old_sp) = (u64::from(v.state.seg[SS].selector), v.state.gpr[RSP]);
    let mut stack = Stack::long(sp & !15, access);
    let old_cs = u64::from(v.state.seg[CS].selector);
    let frame = [d.error.unwrap_or(0).into(), d.rip, old_cs, image, old_sp, old_ss];
    stack.push_quads(v, &frame[usize::from(d.error.is_none())..])?;
    code.set_accessed(v)?;
    let s = &mut v.state;
    if new_cpl < cpl {
        s.seg[SS] = null_ss(new_cpl as u16, new_cpl);
    }
    s.gpr[RSP] = stack.sp;
    enter_handler(v, code.segment(selector & !3 | new_cpl as u16), rip, new_cpl, kind & 1 == 0);
    Ok(())
}
