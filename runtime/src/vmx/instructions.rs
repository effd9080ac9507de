//! The VMX instructions (SDM Vol 3C, "VMX Instruction Reference"): checks in their order, VMsucceed, VMfailInvalid,
//! VMfailValid.
//!
//! Place in the pipeline: the helper `Vmx`. Order of checks: #UD (not in VMX operation, real mode, virtual-8086 mode,
//! compatibility mode), then the VM exit in non-root operation, then #GP(0) for CPL > 0, then operands.

use twofold_arch::control::{cr4, rflags};
use twofold_arch::vmx::control::{proc2, vmfunc};
use twofold_arch::vmx::msr::ept_vpid;
use twofold_arch::vmx::{
    ExitReason, FEATURE_CONTROL_LOCK, FEATURE_CONTROL_VMX, Field, Kind, Part, SHADOW_VMCS, VmError, invept, invvpid,
};
use twofold_arch::{CcOp, Exception, LinearAddr, PAGE_SIZE, PhysAddr};
use twofold_frontend::vmx::word;
use twofold_mmu::Invvpid;

use super::caps::REVISION;
use super::vmcs::{Vmcs, extract, merge};
use super::{bitmap_bit, entry, instruction_exit};
use crate::cpu::mode::{is_64bit, is_canonical, is_long, is_protected, is_v86};
use crate::cpu::{Helped, is_64bit as code_is_64bit};
use crate::vcpu::{MemAs, Trap, Vcpu};

const GP0: Trap = Trap::Exception(Exception::GP0);
const UD: Trap = Trap::Exception(Exception::UD);

/// How an instruction failed.
enum Fail {
    /// VMfailInvalid.
    Invalid,
    /// VMfail: with a current VMCS VMfailValid and its number, without one VMfailInvalid.
    Error(VmError),
    /// It did not complete.
    Trap(Trap),
}

impl From<Trap> for Fail {
    fn from(t: Trap) -> Self {
        Fail::Trap(t)
    }
}
impl From<VmError> for Fail {
    fn from(e: VmError) -> Self {
        Fail::Error(e)
    }
}

/// Any VMX instruction: the instruction word of `frontend::vmx::word`, the linear address of its memory operand, the number
/// of its second register operand, RIP of the next instruction.
pub fn vmx(v: &mut Vcpu, word: u64, la: u64, reg: u64, next_rip: u64) -> Helped {
    let which = word & word::INSTRUCTION;
    check(v, which, reg as usize & 15)?;
    if word & word::CHECK != 0 {
        return Ok(0);
    }
    let access = if word & word::STACK != 0 { MemAs::Stack } else { MemAs::Cpl };
    let operand = Operand {
        la: LinearAddr(la),
        access,
        memory: word & word::MEMORY != 0,
        reg: (word >> word::REG_SHIFT & 15) as usize,
    };
    let reg = reg as usize & 15;
    let entered = matches!(which, word::VMLAUNCH | word::VMRESUME);
    let transitions = v.vmx.transitions;
    let result = match which {
        word::VMXON => vmxon(v, &operand),
        word::VMXOFF => vmxoff(v),
        word::VMCLEAR => vmclear(v, &operand),
        word::VMPTRLD => vmptrld(v, &operand),
        word::VMPTRST => vmptrst(v, &operand),
        word::VMREAD => vmread(v, &operand, reg),
        word::VMWRITE => vmwrite(v, &operand, reg),
        word::VMLAUNCH => launch(v, true),
        word::VMRESUME => launch(v, false),
        word::VMCALL => Err(VmError::VmcallInRoot.into()),
        word::INVEPT => run_invept(v, &operand, reg),
        word::INVVPID => run_invvpid(v, &operand, reg),
        word::VMFUNC => vmfunc(v),
        _ => Err(UD.into()),
    };
    let moved = v.vmx.transitions != transitions;
    if entered && !moved {
        v.state.rip = next_rip;
    }
    match result {
        Ok(()) if which == word::VMFUNC || moved => {}
        Ok(()) => set_flags(v, 0),
        Err(Fail::Invalid) => set_flags(v, rflags::CF),
        Err(Fail::Error(_)) if v.vmx.current.is_none() => set_flags(v, rflags::CF),
        Err(Fail::Error(e)) => {
            // Of the current VMCS, when a guest's VMREAD or VMWRITE of the shadow VMCS fails as well.
            v.vmx.vmcs.set(Field::InstructionError, u64::from(e.number()));
            set_flags(v, rflags::ZF);
        }
        Err(Fail::Trap(t)) => return Err(t),
    }
    Ok(0)
}

/// VMsucceed, VMfailInvalid and VMfailValid: one flag or none.
fn set_flags(v: &mut Vcpu, image: u64) {
    v.state.cc_op = u32::from(CcOp::FLAGS.0);
    v.state.cc_src = image;
}

/// What comes before the operands.
fn check(v: &mut Vcpu, which: u64, reg: usize) -> Result<(), Trap> {
    let s = &v.state;
    let compatibility = is_long(s) && !is_64bit(s);
    let wrong_mode = !is_protected(s) || compatibility;
    let outside = v.vmx.vmxon.is_none();
    if which == word::VMXON {
        if wrong_mode || s.cr4 & cr4::VMXE == 0 {
            return Err(UD);
        }
        if outside {
            return vmxon_allowed(v);
        }
    } else if outside {
        return Err(UD);
    }
    if which == word::VMFUNC {
        return check_vmfunc(v);
    }
    if which == word::VMCALL && v.vmx.non_root {
        return Err(instruction_exit(v, ExitReason::Vmcall, 0));
    }
    if wrong_mode || is_v86(s) {
        return Err(UD);
    }
    if (which == word::INVEPT && !v.model.vmx.has_ept_vpid(ept_vpid::INVEPT))
        || (which == word::INVVPID && !v.model.vmx.has_ept_vpid(ept_vpid::INVVPID))
    {
        return Err(UD);
    }
    if v.vmx.non_root && !shadowed(v, which, reg) {
        return Err(instruction_exit(v, exit_reason(which), 0));
    }
    if v.state.cpl != 0 { Err(GP0) } else { Ok(()) }
}

/// Whether the instruction goes to the shadow VMCS: VMREAD and VMWRITE of fields whose bits in the bitmaps are clear.
fn shadowed(v: &Vcpu, which: u64, reg: usize) -> bool {
    let bitmap = match which {
        word::VMREAD => Field::VmreadBitmap,
        word::VMWRITE => Field::VmwriteBitmap,
        _ => return false,
    };
    let encoding = encoding(v, reg);
    v.vmx.controls.proc2 & proc2::VMCS_SHADOWING != 0
        && encoding >> 15 == 0
        && !bitmap_bit(v, v.vmx.vmcs.get(bitmap), encoding)
}

fn exit_reason(which: u64) -> ExitReason {
    match which {
        word::VMXON => ExitReason::Vmxon,
        word::VMXOFF => ExitReason::Vmxoff,
        word::VMCLEAR => ExitReason::Vmclear,
        word::VMPTRLD => ExitReason::Vmptrld,
        word::VMPTRST => ExitReason::Vmptrst,
        word::VMREAD => ExitReason::Vmread,
        word::VMWRITE => ExitReason::Vmwrite,
        word::VMLAUNCH => ExitReason::Vmlaunch,
        word::VMRESUME => ExitReason::Vmresume,
        word::VMCALL => ExitReason::Vmcall,
        word::INVEPT => ExitReason::Invept,
        word::INVVPID => ExitReason::Invvpid,
        _ => ExitReason::Vmfunc,
    }
}

// ---- operands -----------------------------------------------------------------------------------------------------------

struct Operand {
    la: LinearAddr,
    access: MemAs,
    memory: bool,
    reg: usize,
}

impl Operand {
    fn pointer(&self, v: &mut Vcpu) -> Result<u64, Trap> {
        v.read(self.la, 8, self.access)
    }
}

/// Bytes of VMREAD's and VMWRITE's operands.
fn width(v: &Vcpu) -> u32 {
    if code_is_64bit(&v.state) { 8 } else { 4 }
}

/// Whether a pointer to a region is aligned and inside the physical address width.
fn is_region(v: &Vcpu, at: u64) -> bool {
    at & (PAGE_SIZE - 1) == 0 && at >> v.model.phys_bits == 0
}

fn revision(v: &Vcpu, at: u64) -> u32 {
    let mut b = [0; 4];
    v.shared.map.read(PhysAddr(at), &mut b);
    u32::from_le_bytes(b)
}

// ---- VMX operation ------------------------------------------------------------------------------------------------------

/// What VMXON outside VMX operation needs before it looks at its operand.
fn vmxon_allowed(v: &Vcpu) -> Result<(), Trap> {
    let s = &v.state;
    let caps = &v.model.vmx;
    let fixed = |value: u64, a: super::caps::Allowed| value & a.must == a.must && value & !a.may == 0;
    let enabled = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX;
    let locked_on = caps.feature_control() & enabled == enabled;
    if s.cpl != 0 || !fixed(s.cr0, caps.cr0_fixed()) || !fixed(s.cr4, caps.cr4_fixed()) || !locked_on {
        return Err(GP0);
    }
    Ok(())
}

fn vmxon(v: &mut Vcpu, operand: &Operand) -> Result<(), Fail> {
    if v.vmx.vmxon.is_some() {
        return Err(VmError::VmxonInRoot.into());
    }
    let at = operand.pointer(v)?;
    if !is_region(v, at) || revision(v, at) != REVISION {
        return Err(Fail::Invalid);
    }
    v.vmx.vmxon = Some(PhysAddr(at));
    v.vmx.current = None;
    v.cold.monitor = None;
    Ok(())
}

fn vmxoff(v: &mut Vcpu) -> Result<(), Fail> {
    release_current(v);
    v.vmx.vmxon = None;
    if std::mem::take(&mut v.vmx.init_pending) {
        // The dispatcher finds it still pending.
        v.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(())
}

/// Writes the current VMCS back to its region; there is none afterwards.
fn release_current(v: &mut Vcpu) {
    if let Some(at) = v.vmx.current.take() {
        let map = v.shared.map.clone();
        v.vmx.vmcs.store(&map, at);
        if v.mmu.code().note_write(at, PAGE_SIZE) {
            crate::exec::slow::drop_written(v);
        }
    }
}

fn vmclear(v: &mut Vcpu, operand: &Operand) -> Result<(), Fail> {
    let at = operand.pointer(v)?;
    if !is_region(v, at) {
        return Err(VmError::VmclearAddress.into());
    }
    if v.vmx.vmxon == Some(PhysAddr(at)) {
        return Err(VmError::VmclearVmxonPointer.into());
    }
    if v.vmx.current == Some(PhysAddr(at)) {
        v.vmx.vmcs.launched = false;
        release_current(v);
    } else {
        let map = v.shared.map.clone();
        Vmcs::clear_region(&map, PhysAddr(at));
    }
    Ok(())
}

fn vmptrld(v: &mut Vcpu, operand: &Operand) -> Result<(), Fail> {
    let at = operand.pointer(v)?;
    if !is_region(v, at) {
        return Err(VmError::VmptrldAddress.into());
    }
    if v.vmx.vmxon == Some(PhysAddr(at)) {
        return Err(VmError::VmptrldVmxonPointer.into());
    }
    let found = revision(v, at);
    let shadow_allowed = v.model.vmx.has_proc2(proc2::VMCS_SHADOWING);
    if found & !SHADOW_VMCS != REVISION || (found & SHADOW_VMCS != 0 && !shadow_allowed) {
        return Err(VmError::VmptrldRevision.into());
    }
    if v.vmx.current != Some(PhysAddr(at)) {
        release_current(v);
        let map = v.shared.map.clone();
        v.vmx.vmcs = Vmcs::load(&map, PhysAddr(at));
        v.vmx.current = Some(PhysAddr(at));
    }
    Ok(())
}

fn vmptrst(v: &mut Vcpu, operand: &Operand) -> Result<(), Fail> {
    let value = v.vmx.current.map_or(twofold_arch::vmx::NO_VMCS, |at| at.0);
    v.write(operand.la, 8, value, operand.access)?;
    Ok(())
}

// ---- fields -------------------------------------------------------------------------------------------------------------

/// The shadow VMCS that an access in non-root operation goes to.
fn shadow_target(v: &Vcpu) -> Result<u64, Fail> {
    match v.vmx.vmcs.get(Field::VmcsLinkPointer) {
        twofold_arch::vmx::NO_VMCS => Err(Fail::Invalid),
        at => Ok(at),
    }
}

/// The field that an encoding names, if this processor has it.
fn field(v: &Vcpu, encoding: u64) -> Result<(Field, Part), Fail> {
    match Field::decode(encoding) {
        Some((f, part)) if v.model.vmx.has_field(f) => Ok((f, part)),
        _ => Err(VmError::UnsupportedField.into()),
    }
}

fn encoding(v: &Vcpu, reg: usize) -> u64 {
    let value = v.state.gpr[reg];
    if width(v) == 8 { value } else { value & 0xffff_ffff }
}

fn vmread(v: &mut Vcpu, operand: &Operand, reg: usize) -> Result<(), Fail> {
    let encoding = encoding(v, reg);
    let value = if v.vmx.non_root {
        let at = shadow_target(v)?;
        let (f, part) = field(v, encoding)?;
        extract(super::read_u64(v, Vmcs::place(PhysAddr(at), f).0), part)
    } else {
        if v.vmx.current.is_none() {
            return Err(Fail::Invalid);
        }
        let (f, part) = field(v, encoding)?;
        extract(v.vmx.vmcs.get(f), part)
    };
    let bytes = width(v);
    if operand.memory {
        v.write(operand.la, bytes, value, operand.access)?;
    } else {
        v.state.gpr[operand.reg] = if bytes == 8 { value } else { value & 0xffff_ffff };
    }
    Ok(())
}

fn vmwrite(v: &mut Vcpu, operand: &Operand, reg: usize) -> Result<(), Fail> {
    let bytes = width(v);
    let encoding = encoding(v, reg);
    let target = if v.vmx.non_root { Some(shadow_target(v)?) } else { None };
    if target.is_none() && v.vmx.current.is_none() {
        return Err(Fail::Invalid);
    }
    let value = if operand.memory {
        v.read(operand.la, bytes, operand.access)?
    } else if bytes == 8 {
        v.state.gpr[operand.reg]
    } else {
        v.state.gpr[operand.reg] & 0xffff_ffff
    };
    let (f, part) = field(v, encoding)?;
    if f.kind() == Kind::ReadOnly && !v.model.vmx.has_misc(twofold_arch::vmx::msr::misc::VMWRITE_ANY) {
        return Err(VmError::ReadOnlyField.into());
    }
    match target {
        None => v.vmx.vmcs.set_part(f, part, value),
        Some(at) => {
            let place = Vmcs::place(PhysAddr(at), f).0;
            let new = merge(super::read_u64(v, place), part, value) & f.mask();
            super::write_phys(v, place, &new.to_le_bytes());
        }
    }
    Ok(())
}

// ---- entry --------------------------------------------------------------------------------------------------------------

fn launch(v: &mut Vcpu, launch: bool) -> Result<(), Fail> {
    if v.vmx.current.is_none() || v.vmx.vmcs.shadow {
        return Err(Fail::Invalid);
    }
    if v.vmx.shadow & 2 != 0 {
        return Err(VmError::EntryBlockedByMovSs.into());
    }
    match (launch, v.vmx.vmcs.launched) {
        (true, true) => return Err(VmError::VmlaunchNotClear.into()),
        (false, false) => return Err(VmError::VmresumeNotLaunched.into()),
        _ => {}
    }
    Ok(entry::enter(v, launch)?)
}

// ---- invalidation ---------------------------------------------------------------------------------------------------------

fn descriptor(v: &mut Vcpu, operand: &Operand) -> Result<(u64, u64), Trap> {
    let low = v.read(operand.la, 8, operand.access)?;
    let high = v.read(operand.la.wrapping_add(8), 8, operand.access)?;
    Ok((low, high))
}

fn kind(v: &Vcpu, reg: usize) -> u64 {
    if code_is_64bit(&v.state) { v.state.gpr[reg] } else { v.state.gpr[reg] & 0xffff_ffff }
}

fn run_invept(v: &mut Vcpu, operand: &Operand, reg: usize) -> Result<(), Fail> {
    let kind = kind(v, reg);
    let has = |bit: u64| v.model.vmx.has_ept_vpid(bit);
    let supported = match kind {
        invept::SINGLE_CONTEXT => has(ept_vpid::INVEPT_SINGLE),
        invept::ALL_CONTEXTS => has(ept_vpid::INVEPT_ALL),
        _ => false,
    };
    if !supported {
        return Err(VmError::InvalidOperand.into());
    }
    let (eptp, reserved) = descriptor(v, operand)?;
    let one = kind == invept::SINGLE_CONTEXT;
    if reserved != 0 || one && !super::is_valid_eptp(v, eptp) {
        return Err(VmError::InvalidOperand.into());
    }
    v.mmu.invept(one.then_some(eptp));
    Ok(())
}

fn run_invvpid(v: &mut Vcpu, operand: &Operand, reg: usize) -> Result<(), Fail> {
    let kind = kind(v, reg);
    let has = |bit: u64| v.model.vmx.has_ept_vpid(bit);
    let supported = match kind {
        invvpid::ADDRESS => has(ept_vpid::INVVPID_ADDRESS),
        invvpid::SINGLE_CONTEXT => has(ept_vpid::INVVPID_SINGLE),
        invvpid::ALL_CONTEXTS => has(ept_vpid::INVVPID_ALL),
        invvpid::SINGLE_RETAINING_GLOBALS => has(ept_vpid::INVVPID_SINGLE_RETAINING_GLOBALS),
        _ => false,
    };
    if !supported {
        return Err(VmError::InvalidOperand.into());
    }
    let (low, la) = descriptor(v, operand)?;
    let vpid = low as u16;
    if low >> 16 != 0 || kind != invvpid::ALL_CONTEXTS && vpid == 0 {
        return Err(VmError::InvalidOperand.into());
    }
    let what = match kind {
        invvpid::ADDRESS if !is_canonical(&v.state, la) => return Err(VmError::InvalidOperand.into()),
        invvpid::ADDRESS => Invvpid::Address { vpid, la: LinearAddr(la) },
        invvpid::SINGLE_CONTEXT => Invvpid::Single { vpid },
        invvpid::ALL_CONTEXTS => Invvpid::All,
        _ => Invvpid::SingleRetainingGlobals { vpid },
    };
    v.mmu.invvpid(what);
    Ok(())
}

// ---- VM functions ---------------------------------------------------------------------------------------------------------

fn check_vmfunc(v: &mut Vcpu) -> Result<(), Trap> {
    let function = v.state.gpr[0] as u32;
    if !v.vmx.non_root || v.vmx.controls.proc2 & proc2::VM_FUNCTIONS == 0 || function >= 64 {
        return Err(UD);
    }
    if v.vmx.vmcs.get(Field::VmFunctionControls) >> function & 1 == 0 {
        return Err(instruction_exit(v, ExitReason::Vmfunc, 0));
    }
    Ok(())
}

/// VMFUNC with the checks passed: EPTP switching is the one function there is.
fn vmfunc(v: &mut Vcpu) -> Result<(), Fail> {
    let function = v.state.gpr[0] as u32;
    let index = v.state.gpr[1] as u32;
    let list = v.vmx.vmcs.get(Field::EptpListAddress);
    let eptp = super::read_u64(v, list.wrapping_add(8 * u64::from(index & 511)));
    let known = 1u64 << function == vmfunc::EPTP_SWITCHING;
    if !known || u64::from(index) >= twofold_arch::vmx::ept::EPTP_LIST_ENTRIES || !super::is_valid_eptp(v, eptp) {
        return Err(instruction_exit(v, ExitReason::Vmfunc, 0).into());
    }
    v.vmx.vmcs.set(Field::Eptp, eptp);
    if v.vmx.controls.proc2 & proc2::EPT_VIOLATION_VE != 0 {
        v.vmx.vmcs.set(Field::EptpIndex, u64::from(index));
    }
    v.space.eptp = Some(eptp);
    let view = v.mmu.switch_eptp(&v.space);
    view.store(&mut v.state);
    Ok(())
}
