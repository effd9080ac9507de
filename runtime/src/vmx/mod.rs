//! VMX: root and non-root operation, VM entries and exits, and everything an instruction does differently in a guest.
//!
//! Place in the pipeline: beside [`crate::cpu`]. Helpers and the delivery of events ask [`intercept`] and [`events`] when
//! `vcpu.vmx.non_root`; an exit is raised like a fault, as [`Trap::VmExit`] with its particulars in [`VmxState::exit`],
//! and made by [`exit::perform`]. [`instructions`] are the VMX instructions, [`entry`] is VM entry. Invariants: the
//! controls in [`VmxState::controls`] are those of the current VMCS while in non-root operation; nothing a guest puts in a
//! VMCS, an MSR area or a bitmap address makes L0 panic or leave guest memory, because all of it goes through the
//! physical map.

pub mod apic;
pub mod caps;
pub mod checks;
pub mod entry;
pub mod events;
pub mod exit;
pub mod instructions;
pub mod intercept;
pub mod msrs;
pub mod stats;
pub mod vmcs;

#[cfg(test)]
mod tests;

use twofold_arch::control::cr0;
use twofold_arch::vmx::control::{pin, proc, proc2};
use twofold_arch::vmx::ept::{Eptp, ve_info};
use twofold_arch::vmx::msr::ept_vpid;
use twofold_arch::vmx::qualification::{ept_violation, spp};
use twofold_arch::vmx::{ExitReason, Field, InterruptionInfo};
use twofold_arch::{Exception, LinearAddr, PhysAddr, Vector};
use twofold_mmu::{EptFault, EptFaultKind};

use crate::vcpu::{Trap, Vcpu};
pub use stats::VmxStats;
pub use vmcs::Vmcs;

/// The VMCS revision identifier of this processor.
pub const REVISION: u32 = 0x0002_f01d;

/// VMX as one processor has it.
#[derive(Debug, Default)]
pub struct VmxState {
    /// The VMXON pointer; none outside VMX operation.
    pub vmxon: Option<PhysAddr>,
    /// The current-VMCS pointer.
    pub current: Option<PhysAddr>,
    /// The current VMCS.
    pub vmcs: Vmcs,
    /// What has passed the checks of VM entry.
    pub memo: checks::Memo,
    /// VMX non-root operation.
    pub non_root: bool,
    /// The execution controls in force, in non-root operation.
    pub controls: Controls,
    /// The exit that [`Trap::VmExit`] stands for.
    pub exit: PendingExit,
    /// Instructions that exited before.
    pub decoded: exit::Decoded,
    /// The event being delivered in non-root operation: what IDT-vectoring information is made from.
    pub vectoring: Option<Vectoring>,
    /// Blocking by STI (1) or MOV SS (2) as the current instruction began.
    pub shadow: u32,
    /// Blocking by NMI as the current instruction began.
    pub iret_unblocked: bool,
    /// Virtual-NMI blocking.
    pub virtual_nmi_blocked: bool,
    /// When the VMX-preemption timer runs out, in nanoseconds of the machine's clock.
    pub timer: Option<u64>,
    /// An exit that comes after the instruction that caused it.
    pub trap_exit: Option<PendingExit>,
    /// An MTF VM exit is pending.
    pub mtf_pending: bool,
    /// Pending debug exceptions that VM entry loaded, in the format of the VMCS field.
    pub pending_debug: u64,
    /// The guest's activity state while it is not active (see `arch::vmx::event::activity`).
    pub activity: u32,
    /// VM entries and exits so far: who notes it before and after knows whether the world changed.
    pub transitions: u64,
    /// An INIT signal is blocked: it exits from the next guest, or takes effect when VMX operation ends.
    pub init_pending: bool,
    /// A start-up IPI arrived for a guest that waits for one.
    pub sipi_pending: bool,
    /// PAUSE-loop exiting: TSC of the first and the latest PAUSE of the loop.
    pub pause_loop: (u64, u64),
    /// The event that VM entry is to inject.
    pub inject: Option<InterruptionInfo>,
    /// A VMX abort happened where it could not be told: the processor shuts down.
    pub aborted: bool,
    /// Counters.
    pub stats: VmxStats,
}

/// The execution controls of a VM entry.
#[derive(Clone, Copy, Debug, Default)]
pub struct Controls {
    /// Pin-based controls.
    pub pin: u32,
    /// Primary processor-based controls.
    pub proc: u32,
    /// Secondary processor-based controls, 0 when not activated.
    pub proc2: u32,
    /// Exception bitmap.
    pub exceptions: u32,
}

impl Controls {
    /// The controls in a VMCS.
    #[must_use]
    pub fn of(vmcs: &Vmcs) -> Self {
        let proc = vmcs.get32(Field::ProcControls);
        let proc2 = if proc & proc::SECONDARY != 0 { vmcs.get32(Field::Proc2Controls) } else { 0 };
        Self { pin: vmcs.get32(Field::PinControls), proc, proc2, exceptions: vmcs.get32(Field::ExceptionBitmap) }
    }
    /// Whether EPT is in use.
    #[must_use]
    pub fn ept(&self) -> bool {
        self.proc2 & proc2::EPT != 0
    }
    /// Whether VPIDs are in use.
    #[must_use]
    pub fn vpid(&self) -> bool {
        self.proc2 & proc2::VPID != 0
    }
    /// Whether NMIs are virtual.
    #[must_use]
    pub fn virtual_nmis(&self) -> bool {
        self.pin & pin::VIRTUAL_NMIS != 0
    }
}

/// What kind of thing exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cause {
    /// An instruction: its length and information are saved, RF is saved clear.
    #[default]
    Instruction,
    /// A fault of the instruction's memory accesses, that restarts it: RF is saved set.
    Fault,
    /// An event, between instructions.
    Event,
    /// An event that an instruction or VM entry would deliver, with this RF in its frame.
    Delivery {
        /// RF as the frame would have it.
        rf: bool,
    },
}

/// The particulars of an exit.
#[derive(Clone, Copy, Debug)]
pub struct PendingExit {
    /// The basic exit reason.
    pub reason: ExitReason,
    /// What kind of thing it is.
    pub cause: Cause,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest-linear address.
    pub linear: u64,
    /// Guest-physical address.
    pub physical: u64,
    /// VM-exit interruption information.
    pub interruption: InterruptionInfo,
    /// VM-exit interruption error code.
    pub error: u32,
    /// Length of the software interrupt or exception that exits.
    pub length: Option<u32>,
}

impl Default for PendingExit {
    fn default() -> Self {
        Self::new(ExitReason::TripleFault, Cause::Event, 0)
    }
}

impl PendingExit {
    /// An exit with a qualification.
    #[must_use]
    pub const fn new(reason: ExitReason, cause: Cause, qualification: u64) -> Self {
        let interruption = InterruptionInfo(0);
        Self { reason, cause, qualification, linear: 0, physical: 0, interruption, error: 0, length: None }
    }
}

/// An event in the course of delivery.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vectoring {
    /// As IDT-vectoring information.
    pub info: InterruptionInfo,
    /// Its error code.
    pub error: u32,
    /// Length of the instruction, for software events.
    pub length: Option<u32>,
}

/// Raises the VM exit of an instruction.
#[must_use]
pub fn instruction_exit(v: &mut Vcpu, reason: ExitReason, qualification: u64) -> Trap {
    v.vmx.exit = PendingExit::new(reason, Cause::Instruction, qualification);
    Trap::VmExit
}

/// Raises the VM exit that an EPT fault makes.
#[must_use]
pub fn ept_exit(v: &mut Vcpu, fault: &EptFault) -> Trap {
    if let EptFaultKind::Violation(bits) = fault.kind
        && !fault.suppress_ve
        && v.vmx.controls.proc2 & proc2::EPT_VIOLATION_VE != 0
        && virtualization_exception(v, fault, u64::from(bits))
    {
        return Exception::new(Vector::Virtualization).into();
    }
    let la = fault.la.map_or(0, |la| la.0);
    v.vmx.exit = match fault.kind {
        EptFaultKind::Violation(bits) => {
            let nmi = if v.vmx.iret_unblocked { ept_violation::NMI_UNBLOCKING } else { 0 };
            PendingExit::new(ExitReason::EptViolation, Cause::Fault, u64::from(bits) | nmi)
        }
        EptFaultKind::Misconfiguration => PendingExit::new(ExitReason::EptMisconfiguration, Cause::Fault, 0),
        EptFaultKind::LogFull => {
            let nmi = if v.vmx.iret_unblocked { ept_violation::NMI_UNBLOCKING } else { 0 };
            PendingExit::new(ExitReason::PageModificationLogFull, Cause::Fault, nmi)
        }
        EptFaultKind::SubPage { miss } => {
            let miss = if miss { spp::MISS } else { 0 };
            let nmi = if v.vmx.iret_unblocked { spp::NMI_UNBLOCKING } else { 0 };
            PendingExit::new(ExitReason::SubPagePermission, Cause::Fault, miss | nmi)
        }
    };
    v.vmx.exit.linear = la;
    v.vmx.exit.physical = fault.gpa.0;
    Trap::VmExit
}

/// Turns a convertible EPT violation into #VE (SDM Vol 3C, "Virtualization Exceptions"); false when it must exit.
fn virtualization_exception(v: &mut Vcpu, fault: &EptFault, qualification: u64) -> bool {
    let area = v.vmx.vmcs.get(Field::VeInformationAddress);
    let mut busy = [0; 4];
    v.shared.map.read(PhysAddr(area.wrapping_add(ve_info::BUSY)), &mut busy);
    if v.state.cr0 & cr0::PE == 0 || v.vmx.vectoring.is_some() || busy != [0; 4] {
        return false;
    }
    let mut image = [0; 40];
    let mut put = |at: u64, value: u64| image[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
    put(ve_info::EXIT_REASON, u64::from(ExitReason::EptViolation.number()) | 0xffff_ffff << 32);
    put(ve_info::EXIT_QUALIFICATION, qualification);
    put(ve_info::GUEST_LINEAR_ADDRESS, fault.la.map_or(0, |la| la.0));
    put(ve_info::GUEST_PHYSICAL_ADDRESS, fault.gpa.0);
    put(ve_info::EPTP_INDEX, v.vmx.vmcs.get(Field::EptpIndex));
    // The area ends after the 16-bit EPTP index.
    write_phys(v, area, &image[..34]);
    true
}

/// Whether the monitor trap flag makes each instruction of the guest exit.
#[inline]
#[must_use]
pub fn monitor_trap_flag(v: &Vcpu) -> bool {
    v.vmx.non_root && v.vmx.controls.proc & proc::MONITOR_TRAP_FLAG != 0
}

/// Whether VM entry accepts an EPTP.
#[must_use]
pub fn is_valid_eptp(v: &Vcpu, eptp: u64) -> bool {
    let caps = &v.model.vmx;
    let e = Eptp(eptp);
    let memory_type = match e.memory_type() {
        0 => caps.has_ept_vpid(ept_vpid::TYPE_UC),
        6 => caps.has_ept_vpid(ept_vpid::TYPE_WB),
        _ => false,
    };
    let levels = match e.levels() {
        4 => caps.has_ept_vpid(ept_vpid::WALK_4),
        5 => caps.has_ept_vpid(ept_vpid::WALK_5),
        _ => false,
    };
    let flags = !e.accessed_dirty() || caps.has_ept_vpid(ept_vpid::ACCESSED_DIRTY);
    memory_type && levels && flags && eptp & 0xf80 == 0 && eptp >> v.model.phys_bits == 0
}

/// Reads eight bytes of guest physical memory.
pub(crate) fn read_u64(v: &Vcpu, at: u64) -> u64 {
    let mut b = [0; 8];
    v.shared.map.read(PhysAddr(at), &mut b);
    u64::from_le_bytes(b)
}

/// Writes to guest physical memory, translated code there included.
pub(crate) fn write_phys(v: &mut Vcpu, at: u64, data: &[u8]) {
    v.shared.map.write(PhysAddr(at), data);
    if v.mmu.code().note_write(PhysAddr(at), data.len() as u64) {
        crate::exec::slow::drop_written(v);
    }
}

/// The bit of a bitmap in guest physical memory.
pub(crate) fn bitmap_bit(v: &Vcpu, base: u64, bit: u64) -> bool {
    let mut b = [0];
    v.shared.map.read(PhysAddr(base.wrapping_add(bit >> 3)), &mut b);
    b[0] >> (bit & 7) & 1 != 0
}

/// `state.rip` as a linear address.
pub(crate) fn linear_rip(v: &Vcpu) -> LinearAddr {
    if crate::cpu::is_64bit(&v.state) {
        LinearAddr(v.state.rip)
    } else {
        LinearAddr(v.state.rip.wrapping_add(v.state.seg[1].base) & 0xffff_ffff)
    }
}
