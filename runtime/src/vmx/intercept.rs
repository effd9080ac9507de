//! What instructions and exceptions do in VMX non-root operation: exit, or behave differently (SDM Vol 3C, "VMX Non-Root
//! Operation").
//!
//! Place in the pipeline: called by the helpers of [`crate::cpu`] where [`crate::vmx::VmxState::non_root`] holds, after the checks
//! that come before exits (#UD, privilege, the I/O permission bitmap) and before anything else. A function that returns
//! `Err` has raised its exit or exception; the instruction is abandoned as by a fault.

use twofold_arch::control::{cr0, cr4};
use twofold_arch::vmx::control::{pin, proc, proc2};
use twofold_arch::vmx::event::{EventType, pending_debug};
use twofold_arch::vmx::qualification::{CrAccess, CrAccessType, DrAccess, IoAccess, TaskSwitch, TaskSwitchSource};
use twofold_arch::vmx::{ExitReason, Field, InterruptionInfo};
use twofold_arch::{Exception, Vector};

use super::{Cause, PendingExit, Vectoring, bitmap_bit, instruction_exit, msrs};
use crate::cpu::interrupt::{Event, dr6};
use crate::vcpu::{Trap, Vcpu};

/// Whether an instruction goes on.
type Passed = Result<(), Trap>;

fn exits_if(v: &mut Vcpu, when: bool, reason: ExitReason) -> Passed {
    if when { Err(instruction_exit(v, reason, 0)) } else { Ok(()) }
}

fn proc(v: &Vcpu, bit: u32) -> bool {
    v.vmx.controls.proc & bit != 0
}
fn proc2(v: &Vcpu, bit: u32) -> bool {
    v.vmx.controls.proc2 & bit != 0
}

/// #UD where a control that enables the instruction is 0.
fn enabled(v: &Vcpu, bit: u32) -> Passed {
    if proc2(v, bit) { Ok(()) } else { Err(Exception::UD.into()) }
}

// ---- instructions ---------------------------------------------------------------------------------------------------------

/// An instruction that always exits.
pub fn always(v: &mut Vcpu, reason: ExitReason) -> Passed {
    Err(instruction_exit(v, reason, 0))
}

/// HLT.
pub fn hlt(v: &mut Vcpu) -> Passed {
    let when = proc(v, proc::HLT_EXITING);
    exits_if(v, when, ExitReason::Hlt)
}

/// INVLPG of `la`.
pub fn invlpg(v: &mut Vcpu, la: u64) -> Passed {
    if proc(v, proc::INVLPG_EXITING) {
        return Err(instruction_exit(v, ExitReason::Invlpg, la));
    }
    Ok(())
}

/// INVPCID.
pub fn invpcid(v: &mut Vcpu) -> Passed {
    enabled(v, proc2::INVPCID)?;
    let when = proc(v, proc::INVLPG_EXITING);
    exits_if(v, when, ExitReason::Invpcid)
}

/// RDPMC.
pub fn rdpmc(v: &mut Vcpu) -> Passed {
    let when = proc(v, proc::RDPMC_EXITING);
    exits_if(v, when, ExitReason::Rdpmc)
}

/// RDTSC, and RDTSCP after its #UD.
pub fn rdtsc(v: &mut Vcpu, reason: ExitReason) -> Passed {
    let when = proc(v, proc::RDTSC_EXITING);
    exits_if(v, when, reason)
}

/// A guest that reads a time past the end of its preemption timer has exited before. The clock is read after the TSC was.
#[inline]
pub fn timer_first(v: &mut Vcpu) -> Passed {
    if v.vmx.timer.is_none_or(|at| v.shared.clock.now_ns() < at) {
        return Ok(());
    }
    // The instruction has not begun.
    v.state.shadow = v.vmx.shadow;
    v.vmx.exit = PendingExit::new(ExitReason::PreemptionTimer, Cause::Event, 0);
    Err(Trap::VmExit)
}

/// RDTSCP and RDPID exist when "enable RDTSCP" is 1.
pub fn rdtscp_exists(v: &Vcpu) -> Passed {
    enabled(v, proc2::RDTSCP)
}

/// WBINVD and WBNOINVD.
pub fn wbinvd(v: &mut Vcpu) -> Passed {
    let when = proc2(v, proc2::WBINVD_EXITING);
    exits_if(v, when, ExitReason::Wbinvd)
}

/// MONITOR.
pub fn monitor(v: &mut Vcpu) -> Passed {
    let when = proc(v, proc::MONITOR_EXITING);
    exits_if(v, when, ExitReason::Monitor)
}

/// MWAIT; bit 0 of the qualification: a monitor is armed.
pub fn mwait(v: &mut Vcpu) -> Passed {
    if proc(v, proc::MWAIT_EXITING) {
        let armed = u64::from(v.cold.monitor.is_some());
        return Err(instruction_exit(v, ExitReason::Mwait, armed));
    }
    Ok(())
}

/// RDRAND and RDSEED.
pub fn random(v: &mut Vcpu, seed: bool) -> Passed {
    let (bit, reason) =
        if seed { (proc2::RDSEED_EXITING, ExitReason::Rdseed) } else { (proc2::RDRAND_EXITING, ExitReason::Rdrand) };
    let when = proc2(v, bit);
    exits_if(v, when, reason)
}

/// XSAVES and XRSTORS: `components` is EDX:EAX and the components that are supervisor state.
pub fn xsaves(v: &mut Vcpu, restore: bool, components: u64) -> Passed {
    enabled(v, proc2::XSAVES)?;
    let when = components & v.state.xss & v.vmx.vmcs.get(Field::XssExitingBitmap) != 0;
    exits_if(v, when, if restore { ExitReason::Xrstors } else { ExitReason::Xsaves })
}

/// LGDT, LIDT, SGDT, SIDT.
pub fn gdtr_idtr(v: &mut Vcpu) -> Passed {
    let when = proc2(v, proc2::DESCRIPTOR_TABLE_EXITING);
    exits_if(v, when, ExitReason::GdtrIdtr)
}

/// LLDT, LTR, SLDT, STR.
pub fn ldtr_tr(v: &mut Vcpu) -> Passed {
    let when = proc2(v, proc2::DESCRIPTOR_TABLE_EXITING);
    exits_if(v, when, ExitReason::LdtrTr)
}

/// PAUSE, PAUSE-loop exiting included (SDM Vol 3C, "Changes to Instruction Behavior in VMX Non-Root Operation").
pub fn pause(v: &mut Vcpu) -> Passed {
    if proc(v, proc::PAUSE_EXITING) {
        return always(v, ExitReason::Pause);
    }
    if v.state.cpl != 0 || !proc2(v, proc2::PAUSE_LOOP_EXITING) {
        return Ok(());
    }
    let now = v.tsc();
    let (first, last) = v.vmx.pause_loop;
    let gap = v.vmx.vmcs.get(Field::PleGap);
    if last == 0 || now.wrapping_sub(last) > gap {
        v.vmx.pause_loop = (now, now);
        return Ok(());
    }
    v.vmx.pause_loop = (first, now);
    if now.wrapping_sub(first) > v.vmx.vmcs.get(Field::PleWindow) {
        v.vmx.pause_loop = (0, 0);
        return always(v, ExitReason::Pause);
    }
    Ok(())
}

/// The time-stamp counter as a guest reads it (SDM Vol 3C, "Time-Stamp Counter Offset and Multiplier").
#[must_use]
pub fn tsc(v: &Vcpu) -> u64 {
    let tsc = v.tsc();
    if !v.vmx.non_root || !proc(v, proc::TSC_OFFSETTING) {
        return tsc;
    }
    let scaled = if proc2(v, proc2::TSC_SCALING) {
        ((u128::from(tsc) * u128::from(v.vmx.vmcs.get(Field::TscMultiplier))) >> 48) as u64
    } else {
        tsc
    };
    scaled.wrapping_add(v.vmx.vmcs.get(Field::TscOffset))
}

// ---- control and debug registers -------------------------------------------------------------------------------------------

/// CR0 as MOV from CR0 and SMSW read it.
#[must_use]
pub fn visible_cr0(v: &Vcpu) -> u64 {
    let mask = v.vmx.vmcs.get(Field::Cr0Mask);
    v.state.cr0 & !mask | v.vmx.vmcs.get(Field::Cr0Shadow) & mask
}

/// CR4 as MOV from CR4 reads it.
#[must_use]
pub fn visible_cr4(v: &Vcpu) -> u64 {
    let mask = v.vmx.vmcs.get(Field::Cr4Mask);
    v.state.cr4 & !mask | v.vmx.vmcs.get(Field::Cr4Shadow) & mask
}

fn cr_exit(v: &mut Vcpu, number: u64, kind: CrAccessType) -> Trap {
    instruction_exit(v, ExitReason::ControlRegister, CrAccess::mov(number as u8, kind, 0).0)
}

/// MOV from CRn.
pub fn read_cr(v: &mut Vcpu, number: u64) -> Passed {
    let when = match number {
        3 => proc(v, proc::CR3_STORE_EXITING),
        8 => proc(v, proc::CR8_STORE_EXITING),
        _ => false,
    };
    if when { Err(cr_exit(v, number, CrAccessType::MovFrom)) } else { Ok(()) }
}

/// MOV to CRn: the value to load, with the bits that belong to the host as they are.
pub fn write_cr(v: &mut Vcpu, number: u64, value: u64) -> Result<u64, Trap> {
    let (mask, shadow, real) = match number {
        0 => (v.vmx.vmcs.get(Field::Cr0Mask), v.vmx.vmcs.get(Field::Cr0Shadow), v.state.cr0),
        4 => (v.vmx.vmcs.get(Field::Cr4Mask), v.vmx.vmcs.get(Field::Cr4Shadow), v.state.cr4),
        3 if proc(v, proc::CR3_LOAD_EXITING) && !is_cr3_target(v, value) => {
            return Err(cr_exit(v, number, CrAccessType::MovTo));
        }
        8 if proc(v, proc::CR8_LOAD_EXITING) => return Err(cr_exit(v, number, CrAccessType::MovTo)),
        _ => return Ok(value),
    };
    if (value ^ shadow) & mask != 0 {
        return Err(cr_exit(v, number, CrAccessType::MovTo));
    }
    Ok(value & !mask | real & mask)
}

fn is_cr3_target(v: &Vcpu, value: u64) -> bool {
    let targets = [Field::Cr3Target0, Field::Cr3Target1, Field::Cr3Target2, Field::Cr3Target3];
    let count = v.vmx.vmcs.get(Field::Cr3TargetCount).min(4) as usize;
    targets[..count].iter().any(|f| v.vmx.vmcs.get(*f) == value)
}

/// CLTS: whether CR0.TS is to be cleared.
pub fn clts(v: &mut Vcpu) -> Result<bool, Trap> {
    if v.vmx.vmcs.get(Field::Cr0Mask) & cr0::TS == 0 {
        return Ok(true);
    }
    if v.vmx.vmcs.get(Field::Cr0Shadow) & cr0::TS != 0 {
        return Err(instruction_exit(v, ExitReason::ControlRegister, CrAccess::clts().0));
    }
    Ok(false)
}

/// LMSW: the value of CR0's low four bits to load, PE aside; `la` is where its operand is, if in memory.
pub fn lmsw(v: &mut Vcpu, value: u64, la: u64) -> Result<u64, Trap> {
    const REST: u64 = cr0::MP | cr0::EM | cr0::TS;
    let (mask, shadow) = (v.vmx.vmcs.get(Field::Cr0Mask), v.vmx.vmcs.get(Field::Cr0Shadow));
    let sets_pe = value & !shadow & mask & cr0::PE != 0;
    if sets_pe || (value ^ shadow) & mask & REST != 0 {
        let trap = instruction_exit(v, ExitReason::ControlRegister, CrAccess::lmsw(value as u16, false).0);
        v.vmx.exit.linear = la;
        return Err(trap);
    }
    Ok(value & !mask | v.state.cr0 & mask)
}

/// The CR0 bits that must be 1 in VMX operation; in an unrestricted guest PE and PG are free.
#[must_use]
pub fn cr0_must(v: &Vcpu) -> u64 {
    let must = v.model.vmx.cr0_fixed().must;
    if v.vmx.non_root && proc2(v, proc2::UNRESTRICTED_GUEST) { must & !(cr0::PE | cr0::PG) } else { must }
}

/// The CR4 bits that must be 1 in VMX operation.
#[must_use]
pub const fn cr4_must() -> u64 {
    cr4::VMXE
}

/// MOV to or from DRn.
pub fn mov_dr(v: &mut Vcpu, number: u64, from_dr: bool) -> Passed {
    if proc(v, proc::MOV_DR_EXITING) {
        let number = number as u8 & 7;
        return Err(instruction_exit(v, ExitReason::MovDr, DrAccess::new(number, from_dr, 0).0));
    }
    Ok(())
}

// ---- ports and MSRs ---------------------------------------------------------------------------------------------------------

/// Whether an access to `size` ports from `port` on exits.
fn io_exits(v: &Vcpu, port: u16, size: u32) -> bool {
    if !proc(v, proc::IO_BITMAPS) {
        return proc(v, proc::UNCONDITIONAL_IO_EXITING);
    }
    // Around the top of the I/O space: exits (SDM Vol 3C, "I/O-Bitmap Addresses").
    u32::from(port) + size > 0x1_0000
        || (0..size).any(|i| {
            let port = port.wrapping_add(i as u16);
            let field = if port < 0x8000 { Field::IoBitmapA } else { Field::IoBitmapB };
            bitmap_bit(v, v.vmx.vmcs.get(field), u64::from(port & 0x7fff))
        })
}

/// IN and OUT.
pub fn io(v: &mut Vcpu, port: u16, size: u32, input: bool) -> Passed {
    if io_exits(v, port, size) {
        let qualification = IoAccess::new(port, size as u8, input, false, false, false).0;
        return Err(instruction_exit(v, ExitReason::Io, qualification));
    }
    Ok(())
}

/// INS and OUTS; `la` is the linear address of the memory operand.
pub fn string_io(v: &mut Vcpu, port: u16, size: u32, input: bool, rep: bool, la: u64) -> Passed {
    if io_exits(v, port, size) {
        let qualification = IoAccess::new(port, size as u8, input, true, rep, false).0;
        let trap = instruction_exit(v, ExitReason::Io, qualification);
        v.vmx.exit.linear = la;
        return Err(trap);
    }
    Ok(())
}

/// RDMSR and WRMSR.
pub fn msr(v: &mut Vcpu, index: u32, write: bool) -> Passed {
    let when = !proc(v, proc::MSR_BITMAPS) || msrs::intercepted(v, index, write);
    exits_if(v, when, if write { ExitReason::Wrmsr } else { ExitReason::Rdmsr })
}

// ---- task switches ------------------------------------------------------------------------------------------------------------

/// A task switch always exits.
pub fn task_switch(v: &mut Vcpu, selector: u16, source: TaskSwitchSource) -> Trap {
    let cause = if source == TaskSwitchSource::TaskGate { Cause::Delivery { rf: false } } else { Cause::Instruction };
    v.vmx.exit = PendingExit::new(ExitReason::TaskSwitch, cause, TaskSwitch::new(selector, source).0);
    Trap::VmExit
}

// ---- events -------------------------------------------------------------------------------------------------------------------

/// An exception as interruption information.
#[must_use]
pub fn exception_info(e: &Exception) -> InterruptionInfo {
    InterruptionInfo::new(e.vector as u8, EventType::HardwareException, e.error.is_some())
}

/// Whether the exception bitmap makes an exception of `vector` exit.
#[must_use]
pub fn bitmap_exits(v: &Vcpu, vector: u8, error: u32) -> bool {
    let bit = vector < 32 && v.vmx.controls.exceptions >> vector & 1 != 0;
    if vector != Vector::PageFault as u8 {
        return bit;
    }
    let (mask, wanted) = (v.vmx.vmcs.get32(Field::PageFaultMask), v.vmx.vmcs.get32(Field::PageFaultMatch));
    (error & mask == wanted) == bit
}

/// Raises the exit of an event about to be delivered, if the controls want it. The event that was being delivered when this
/// one came up stays in [`super::VmxState::vectoring`].
pub fn event(v: &mut Vcpu, event: &Event) -> bool {
    match event {
        Event::Exception(e) => exception(v, e),
        Event::Nmi if v.vmx.controls.pin & pin::NMI_EXITING != 0 => {
            let mut exit = PendingExit::new(ExitReason::ExceptionOrNmi, Cause::Event, 0);
            exit.interruption = InterruptionInfo::new(2, EventType::Nmi, false);
            v.vmx.exit = exit;
            true
        }
        Event::Nmi | Event::Interrupt(_) => false,
    }
}

fn exception(v: &mut Vcpu, e: &Exception) -> bool {
    if !bitmap_exits(v, e.vector as u8, e.error.unwrap_or(0)) {
        return false;
    }
    let is_trap = matches!(e.vector, Vector::Debug | Vector::DoubleFault | Vector::MachineCheck);
    let qualification = match e.vector {
        Vector::PageFault => e.cr2,
        // Debug exceptions: the bits that DR6 would get.
        Vector::Debug => e.cr2 & (pending_debug::B | dr6::BD | dr6::BS),
        _ => 0,
    };
    let mut exit = PendingExit::new(ExitReason::ExceptionOrNmi, Cause::Delivery { rf: !is_trap }, qualification);
    exit.interruption = exception_info(e);
    if v.vmx.iret_unblocked && e.vector != Vector::DoubleFault && v.vmx.vectoring.is_none() {
        exit.interruption.0 |= InterruptionInfo::NMI_UNBLOCKING;
    }
    exit.error = e.error.unwrap_or(0);
    if let Some(n) = v.vmx.stats.exceptions.get_mut(usize::from(e.vector as u8)) {
        *n += 1;
    }
    v.vmx.exit = exit;
    true
}

/// INT3, INTO and INT1 in a guest; INT n never exits by itself.
pub fn software_exception(v: &mut Vcpu, vector: u8, kind: EventType) -> Passed {
    if !bitmap_exits(v, vector, 0) {
        return Ok(());
    }
    let mut exit = PendingExit::new(ExitReason::ExceptionOrNmi, Cause::Delivery { rf: false }, 0);
    exit.interruption = InterruptionInfo::new(vector, kind, false);
    v.vmx.exit = exit;
    Err(Trap::VmExit)
}

/// Notes the event whose delivery begins.
pub fn begin_delivery(v: &mut Vcpu, event: &Event) {
    let (info, error) = match event {
        Event::Exception(e) => (exception_info(e), e.error.unwrap_or(0)),
        Event::Interrupt(n) => (InterruptionInfo::new(*n, EventType::External, false), 0),
        Event::Nmi => (InterruptionInfo::new(2, EventType::Nmi, false), 0),
    };
    v.vmx.vectoring = Some(Vectoring { info, error, length: None });
}

/// IRET: blocking by NMI ends (SDM Vol 3C, "Changes to Instruction Behavior in VMX Non-Root Operation").
pub fn iret(v: &mut Vcpu) {
    if v.vmx.controls.virtual_nmis() {
        v.vmx.virtual_nmi_blocked = false;
    } else if v.vmx.controls.pin & pin::NMI_EXITING == 0 {
        v.state.nmi_blocked = 0;
    }
}
