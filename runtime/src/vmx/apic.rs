//! APIC virtualization: TPR shadow, the APIC-access page, APIC-register virtualization, x2APIC mode, virtual interrupts,
//! posted interrupts (SDM Vol 3C, "APIC Virtualization and Virtual Interrupts").
//!
//! Place in the pipeline: MOV CR8, RDMSR and WRMSR, accesses to the APIC-access page and the delivery of events come here in
//! VMX non-root operation. Exits that come after the instruction (TPR below threshold, APIC write, virtualized EOI) wait in
//! [`VmxState::trap_exit`] for the dispatcher. Invariant: RVI and SVI are in the VMCS field, where VM exit finds them.

use twofold_arch::control::rflags;
use twofold_arch::vmx::control::{pin, proc, proc2};
use twofold_arch::vmx::event::activity;
use twofold_arch::vmx::qualification::{ApicAccess, ApicAccessType};
use twofold_arch::vmx::{ExitReason, Field};
use twofold_arch::{Exception, LinearAddr, PhysAddr, msr};

use super::{Cause, PendingExit, write_phys};
use crate::cpu::interrupt::{self, Event};
use crate::platform::LAPIC_BASE;
use crate::vcpu::{Shutdown, Trap, Vcpu};

#[allow(unused_imports)] // for the documentation
use super::VmxState;

/// Offsets in the virtual-APIC page.
mod offset {
    pub const ID: u64 = 0x20;
    pub const VERSION: u64 = 0x30;
    pub const TPR: u64 = 0x80;
    pub const PPR: u64 = 0xa0;
    pub const EOI: u64 = 0xb0;
    pub const LDR: u64 = 0xd0;
    pub const SVR: u64 = 0xf0;
    pub const ISR: u64 = 0x100;
    pub const IRR: u64 = 0x200;
    pub const ESR: u64 = 0x280;
    pub const ICR_LOW: u64 = 0x300;
    pub const ICR_HIGH: u64 = 0x310;
    pub const LVT_TIMER: u64 = 0x320;
    pub const LVT_ERROR: u64 = 0x370;
    pub const INITIAL_COUNT: u64 = 0x380;
    pub const DIVIDE: u64 = 0x3e0;
}

fn proc2_has(v: &Vcpu, bit: u32) -> bool {
    v.vmx.controls.proc2 & bit != 0
}
fn tpr_shadow(v: &Vcpu) -> bool {
    v.vmx.controls.proc & proc::TPR_SHADOW != 0
}
fn delivers_virtual_interrupts(v: &Vcpu) -> bool {
    proc2_has(v, proc2::VIRTUAL_INTERRUPT_DELIVERY)
}

// ---- the virtual-APIC page ------------------------------------------------------------------------------------------------

fn at(v: &Vcpu, offset: u64) -> u64 {
    v.vmx.vmcs.get(Field::VirtualApicAddress).wrapping_add(offset)
}

fn read32(v: &Vcpu, offset: u64) -> u32 {
    let mut b = [0; 4];
    v.shared.map.read(PhysAddr(at(v, offset)), &mut b);
    u32::from_le_bytes(b)
}

fn write32(v: &mut Vcpu, offset: u64, value: u32) {
    let at = at(v, offset);
    write_phys(v, at, &value.to_le_bytes());
}

/// The 256 bits of VISR or VIRR.
fn bit_offset(base: u64, vector: u8) -> (u64, u32) {
    (base + u64::from(vector >> 5) * 16, 1 << (vector & 31))
}

fn set_bit(v: &mut Vcpu, base: u64, vector: u8, on: bool) {
    let (offset, bit) = bit_offset(base, vector);
    let old = read32(v, offset);
    write32(v, offset, if on { old | bit } else { old & !bit });
}

fn highest(v: &Vcpu, base: u64) -> u8 {
    (0..8u64)
        .rev()
        .find_map(|word| {
            let bits = read32(v, base + word * 16);
            (bits != 0).then(|| (word as u32 * 32 + 31 - bits.leading_zeros()) as u8)
        })
        .unwrap_or(0)
}

fn rvi(v: &Vcpu) -> u8 {
    v.vmx.vmcs.get(Field::GuestInterruptStatus) as u8
}
fn svi(v: &Vcpu) -> u8 {
    (v.vmx.vmcs.get(Field::GuestInterruptStatus) >> 8) as u8
}
fn set_status(v: &mut Vcpu, rvi: u8, svi: u8) {
    v.vmx.vmcs.set(Field::GuestInterruptStatus, u64::from(rvi) | u64::from(svi) << 8);
}

// ---- virtualization of single registers ------------------------------------------------------------------------------------

/// PPR virtualization.
fn virtualize_ppr(v: &mut Vcpu) {
    let (tpr, service) = (read32(v, offset::TPR) & 0xff, u32::from(svi(v)));
    let ppr = if tpr >> 4 >= service >> 4 { tpr } else { service & 0xf0 };
    write32(v, offset::PPR, ppr);
}

fn below_threshold(v: &Vcpu) -> bool {
    u64::from(read32(v, offset::TPR) >> 4 & 15) < v.vmx.vmcs.get(Field::TprThreshold) & 15
}

/// TPR virtualization, after VTPR changed.
fn virtualize_tpr(v: &mut Vcpu) {
    if delivers_virtual_interrupts(v) {
        virtualize_ppr(v);
    } else if below_threshold(v) {
        exit_afterwards(v, ExitReason::TprBelowThreshold, 0);
    }
}

/// EOI virtualization.
fn virtualize_eoi(v: &mut Vcpu) {
    let vector = svi(v);
    set_bit(v, offset::ISR, vector, false);
    let next = highest(v, offset::ISR);
    set_status(v, rvi(v), next);
    virtualize_ppr(v);
    let word = [Field::EoiExitBitmap0, Field::EoiExitBitmap1, Field::EoiExitBitmap2, Field::EoiExitBitmap3];
    if v.vmx.vmcs.get(word[usize::from(vector >> 6)]) >> (vector & 63) & 1 != 0 {
        exit_afterwards(v, ExitReason::VirtualizedEoi, u64::from(vector));
    }
}

/// Self-IPI virtualization.
fn virtualize_self_ipi(v: &mut Vcpu, vector: u8) {
    set_bit(v, offset::IRR, vector, true);
    set_status(v, rvi(v).max(vector), svi(v));
}

/// The exit comes when the instruction is complete.
fn exit_afterwards(v: &mut Vcpu, reason: ExitReason, qualification: u64) {
    v.vmx.trap_exit = Some(PendingExit::new(reason, Cause::Event, qualification));
    v.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
}

// ---- CR8 and MSRs -----------------------------------------------------------------------------------------------------------

/// MOV from CR8 under a TPR shadow.
#[must_use]
pub fn read_cr8(v: &Vcpu) -> Option<u64> {
    tpr_shadow(v).then(|| u64::from(read32(v, offset::TPR) >> 4 & 15))
}

/// MOV to CR8 under a TPR shadow; whether there is one.
pub fn write_cr8(v: &mut Vcpu, value: u64) -> bool {
    if !tpr_shadow(v) {
        return false;
    }
    write32(v, offset::TPR, (value as u32 & 15) << 4);
    virtualize_tpr(v);
    true
}

/// RDMSR of an x2APIC register in "virtualize x2APIC mode": its value, where that is virtual.
#[must_use]
pub fn read_msr(v: &Vcpu, number: u32) -> Option<u64> {
    if !(msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&number) || !proc2_has(v, proc2::X2APIC_MODE) {
        return None;
    }
    let offset = u64::from(number & 0xff) << 4;
    let virtual_ = offset == offset::TPR || proc2_has(v, proc2::APIC_REGISTERS);
    virtual_.then(|| super::read_u64(v, at(v, offset)))
}

/// WRMSR to an x2APIC register in "virtualize x2APIC mode"; whether it was virtual.
///
/// # Errors
/// #GP for reserved bits.
pub fn write_msr(v: &mut Vcpu, number: u32, value: u64) -> Result<bool, Trap> {
    const TPR: u32 = 0x808;
    const EOI: u32 = 0x80b;
    const SELF_IPI: u32 = 0x83f;
    if !matches!(number, TPR | EOI | SELF_IPI) || !proc2_has(v, proc2::X2APIC_MODE) {
        return Ok(false);
    }
    if number != TPR && !delivers_virtual_interrupts(v) {
        return Ok(false);
    }
    let reserved = if number == EOI { u64::MAX } else { !0xff };
    if value & reserved != 0 {
        return Err(Exception::GP0.into());
    }
    let offset = u64::from(number & 0xff) << 4;
    let page = at(v, offset);
    write_phys(v, page, &value.to_le_bytes());
    match number {
        TPR => virtualize_tpr(v),
        EOI => virtualize_eoi(v),
        // A vector below 16 is an APIC-write exit.
        _ if value < 16 => exit_afterwards(v, ExitReason::ApicWrite, offset),
        _ => virtualize_self_ipi(v, value as u8),
    }
    Ok(true)
}

// ---- the APIC-access page ---------------------------------------------------------------------------------------------------

/// The page whose accesses are virtualized, while there is one.
#[must_use]
pub fn access_page(v: &Vcpu) -> Option<PhysAddr> {
    proc2_has(v, proc2::APIC_ACCESSES).then(|| PhysAddr(v.vmx.vmcs.get(Field::ApicAccessAddress)))
}

/// Whether reads of the register at `offset` are virtual with "APIC-register virtualization".
fn is_readable(offset: u64) -> bool {
    use offset::*;
    matches!(offset, ID | VERSION | TPR | EOI | LDR | 0xe0 | SVR | ISR..=0x270 | ESR | ICR_LOW | ICR_HIGH)
        || matches!(offset, LVT_TIMER..=LVT_ERROR | INITIAL_COUNT | DIVIDE)
}

fn is_writable(offset: u64) -> bool {
    use offset::*;
    matches!(
        offset,
        ID | TPR | EOI | LDR | 0xe0 | SVR | ESR | ICR_LOW | ICR_HIGH | LVT_TIMER..=LVT_ERROR | INITIAL_COUNT | DIVIDE
    )
}

fn access_exit(v: &mut Vcpu, la: LinearAddr, offset: u64, kind: ApicAccessType) -> Trap {
    let kind = if v.vmx.vectoring.is_some() { ApicAccessType::LinearEventDelivery } else { kind };
    v.vmx.exit = PendingExit::new(ExitReason::ApicAccess, Cause::Instruction, ApicAccess::new(offset, kind).0);
    v.vmx.exit.linear = la.0;
    Trap::VmExit
}

/// A fetch from `pa`: from the APIC-access page it exits.
///
/// # Errors
/// The VM exit.
#[inline]
pub fn check_fetch(v: &mut Vcpu, la: LinearAddr, pa: PhysAddr) -> Result<(), Trap> {
    if access_page(v).is_none_or(|page| page != pa.page()) {
        return Ok(());
    }
    Err(access_exit(v, la, pa.page_offset(), ApicAccessType::LinearFetch))
}

/// A read of `buf.len()` bytes at `pa` in the APIC-access page.
///
/// # Errors
/// Its VM exit, when it is not virtualized.
pub fn read_access(v: &mut Vcpu, la: LinearAddr, pa: PhysAddr, buf: &mut [u8]) -> Result<(), Trap> {
    let at_page = pa.page_offset();
    let register = at_page & !15;
    let inside = (at_page & 15) as usize + buf.len() <= 4;
    let virtual_ = inside
        && tpr_shadow(v)
        && (register == offset::TPR || proc2_has(v, proc2::APIC_REGISTERS) && is_readable(register));
    if !virtual_ {
        return Err(access_exit(v, la, at_page, ApicAccessType::LinearRead));
    }
    v.shared.map.read(PhysAddr(at(v, at_page)), buf);
    Ok(())
}

/// A write at `pa` in the APIC-access page.
///
/// # Errors
/// Its VM exit, when it is not virtualized.
pub fn write_access(v: &mut Vcpu, la: LinearAddr, pa: PhysAddr, data: &[u8]) -> Result<(), Trap> {
    let at_page = pa.page_offset();
    let register = at_page & !15;
    let inside = (at_page & 15) as usize + data.len() <= 4;
    let vid = delivers_virtual_interrupts(v);
    let virtual_ = inside
        && tpr_shadow(v)
        && (register == offset::TPR
            || vid && matches!(register, offset::EOI | offset::ICR_LOW)
            || proc2_has(v, proc2::APIC_REGISTERS) && is_writable(register));
    if !virtual_ {
        return Err(access_exit(v, la, at_page, ApicAccessType::LinearWrite));
    }
    let page = at(v, at_page);
    write_phys(v, page, data);
    written(v, register, vid);
    Ok(())
}

/// APIC-write emulation.
fn written(v: &mut Vcpu, register: u64, vid: bool) {
    let value = read32(v, register);
    match register {
        offset::TPR => {
            write32(v, register, value & 0xff);
            virtualize_tpr(v);
        }
        offset::EOI if vid => {
            write32(v, register, 0);
            virtualize_eoi(v);
        }
        offset::ICR_LOW if vid && is_self_ipi(value) => virtualize_self_ipi(v, value as u8),
        offset::ICR_HIGH => write32(v, register, value & 0xff00_0000),
        _ => exit_afterwards(v, ExitReason::ApicWrite, register),
    }
}

/// A fixed, edge-triggered interrupt to self with a legal vector.
fn is_self_ipi(icr: u32) -> bool {
    const REST: u32 = 0xfff0_0000 | 3 << 16 | 1 << 15 | 1 << 13 | 1 << 12 | 7 << 8;
    icr & REST == 0 && icr >> 18 & 3 == 1 && icr as u8 >= 16
}

// ---- virtual interrupts -------------------------------------------------------------------------------------------------------

/// What VM entry does about the virtual APIC.
pub fn entered(v: &mut Vcpu) {
    if !tpr_shadow(v) {
        return;
    }
    if delivers_virtual_interrupts(v) {
        virtualize_ppr(v);
    } else if below_threshold(v) {
        exit_afterwards(v, ExitReason::TprBelowThreshold, 0);
    }
}

/// Delivers a pending virtual interrupt; whether there was one.
///
/// # Errors
/// Shutdown.
pub fn deliver_virtual(v: &mut Vcpu) -> Result<bool, Shutdown> {
    let on = v.state.rflags_sys & rflags::IF != 0;
    let blocked = matches!(v.vmx.activity, activity::SHUTDOWN | activity::WAIT_FOR_SIPI);
    if !delivers_virtual_interrupts(v) || !on || blocked || rvi(v) >> 4 <= (read32(v, offset::PPR) >> 4) as u8 {
        return Ok(false);
    }
    let vector = rvi(v);
    set_bit(v, offset::ISR, vector, true);
    set_bit(v, offset::IRR, vector, false);
    write32(v, offset::PPR, u32::from(vector) & 0xf0);
    let next = highest(v, offset::IRR);
    set_status(v, next, vector);
    v.state.halted = 0;
    v.counters.interrupts += 1;
    interrupt::deliver(v, Event::Interrupt(vector))?;
    Ok(true)
}

/// Posted-interrupt processing of an external interrupt with `vector`, if that is the notification vector.
pub fn post(v: &mut Vcpu, vector: u8) -> bool {
    if v.vmx.controls.pin & pin::POSTED_INTERRUPTS == 0
        || u64::from(vector) != v.vmx.vmcs.get(Field::PostedInterruptVector)
    {
        return false;
    }
    acknowledge_physical(v);
    let descriptor = v.vmx.vmcs.get(Field::PostedInterruptDescriptor);
    let mut image = [0; 64];
    v.shared.map.read(PhysAddr(descriptor), &mut image);
    // Outstanding notification.
    write_phys(v, descriptor.wrapping_add(32), &[image[32] & !1]);
    let mut top = 0;
    for (word, bytes) in image[..32].chunks_exact(4).enumerate() {
        let requests = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
        if requests == 0 {
            continue;
        }
        let at = offset::IRR + word as u64 * 16;
        let old = read32(v, at);
        write32(v, at, old | requests);
        top = (word as u32 * 32 + 31 - requests.leading_zeros()) as u8;
    }
    write_phys(v, descriptor, &[0; 32]);
    set_status(v, rvi(v).max(top), svi(v));
    true
}

/// EOI to the processor's own APIC.
fn acknowledge_physical(v: &mut Vcpu) {
    const X2APIC_EOI: u32 = 0x80b;
    let index = v.index;
    v.with_devices(|p| {
        if p.apic_msr_write(index, X2APIC_EOI, 0).is_err() {
            p.mmio_write(index, PhysAddr(LAPIC_BASE + 0xb0), 4, 0);
        }
    });
}
