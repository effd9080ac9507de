//! System-management mode: SMI delivery, the state save area, RSM (SDM Vol 3C, "System Management Mode").
//!
//! Place in the pipeline: the dispatcher calls [`take`] between instructions while an SMI is pending; RSM is a helper.
//! What the save map documents goes to memory at SMBASE + FC00H (processors without IA-32e mode: FE00H) and is loaded from
//! there; the rest, as the hidden parts of segment registers and all of VMX, stays inside the processor. SMRAM is ordinary
//! memory. Invariant: a state that RSM loads is one that the processor could have come to by itself, whatever the area
//! holds, or else it shuts down. Nothing here is looked at while guest code runs.

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::state::Table;
use twofold_arch::vmx::event::activity;
use twofold_arch::{PhysAddr, Segment};
use twofold_mmu::{AddressSpace, PagingMode, Pml};

use super::Helped;
use super::cpuid::Bit;
use super::interrupt::dr6;
use super::mode::{CS, LDTR, refresh_space};
use super::segments::UD;
use crate::config::DebugItem;
use crate::platform::signal;
use crate::vcpu::{Shutdown, Vcpu};
use crate::vmx::{self, VmxState};

/// SMBASE after reset.
pub const DEFAULT_BASE: u32 = 0x3_0000;
/// Where SMM code begins: EIP, and the distance from SMBASE.
const ENTRY: u64 = 0x8000;
/// The area's place: it ends 64 KiB above SMBASE. Offsets in the SDM count from SMBASE + 8000H, here from its first byte.
const AREA: u64 = 0xfc00;
const AREA_LEN: usize = 0x400;
/// What the SDM's offsets are to the area's.
const MAP: usize = 0x7c00;
/// The value of the I/O instruction restart field that restarts the instruction.
const RESTART_IO: u64 = 0xff;
/// The saved RFLAGS bits that RSM loads; VM is kept inside.
const FLAGS: u64 = rflags::ARITH | rflags::SYS & !rflags::VM;

/// System-management mode as one processor has it.
#[derive(Debug)]
pub struct Smm {
    /// SMBASE.
    pub base: u32,
    /// An SMI waits, or waits no more: [`take`] finds out.
    pub pending: bool,
    /// What was interrupted, while in SMM.
    inside: Option<Box<Interrupted>>,
    /// The port access that the pending SMI is synchronous to.
    port: Option<PortAccess>,
    /// SMIs taken since reset: MSR_SMI_COUNT.
    pub count: u32,
}

impl Default for Smm {
    fn default() -> Self {
        Self { base: DEFAULT_BASE, pending: false, inside: None, port: None, count: 0 }
    }
}

impl Smm {
    /// Whether the processor is in SMM.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.inside.is_some()
    }
}

/// An OUT that raised an SMI.
#[derive(Clone, Copy, Debug)]
struct PortAccess {
    rip: u64,
    port: u16,
    bytes: u8,
    immediate: bool,
}

/// What SMI delivery saves inside the processor.
#[derive(Debug)]
struct Interrupted {
    seg: [Segment; 8],
    gdtr: Table,
    idtr: Table,
    cpl: u32,
    v86: bool,
    nmi_blocked: u32,
    pdpte: [u64; 4],
    vmxe: bool,
    vmx: VmxState,
    space: AddressSpace,
    pml: Option<Pml>,
    port: Option<PortAccess>,
}

// ---- the save map -----------------------------------------------------------------------------------------------------

/// A field of the save map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Saved {
    Cr0,
    Cr3,
    Cr4,
    Flags,
    Efer,
    Ip,
    Dr6,
    Dr7,
    Selector(usize),
    Gpr(usize),
    LdtBase,
    GdtBase,
    IdtBase,
    LdtBaseHigh,
    GdtBaseHigh,
    IdtBaseHigh,
    IoMisc,
    IoIp,
    AutoHalt,
    IoRestart,
    Revision,
    Base,
    EptEnabled,
    Eptp,
}

/// A map: offset from SMBASE + 8000H, bytes, what.
type SaveMap = [(usize, usize, Saved)];

/// SDM Vol 3C, "SMRAM State Save Map for Intel 64 Architecture".
const LONG: &SaveMap = &[
    (0x7ff8, 8, Saved::Cr0),
    (0x7ff0, 8, Saved::Cr3),
    (0x7fe8, 8, Saved::Flags),
    (0x7fe0, 8, Saved::Efer),
    (0x7fd8, 8, Saved::Ip),
    (0x7fd0, 8, Saved::Dr6),
    (0x7fc8, 8, Saved::Dr7),
    (0x7fc4, 4, Saved::Selector(7)),
    (0x7fc0, 4, Saved::Selector(6)),
    (0x7fbc, 4, Saved::Selector(5)),
    (0x7fb8, 4, Saved::Selector(4)),
    (0x7fb4, 4, Saved::Selector(3)),
    (0x7fb0, 4, Saved::Selector(2)),
    (0x7fac, 4, Saved::Selector(1)),
    (0x7fa8, 4, Saved::Selector(0)),
    (0x7fa4, 4, Saved::IoMisc),
    (0x7f94, 8, Saved::Gpr(7)),
    (0x7f8c, 8, Saved::Gpr(6)),
    (0x7f84, 8, Saved::Gpr(5)),
    (0x7f7c, 8, Saved::Gpr(4)),
    (0x7f74, 8, Saved::Gpr(3)),
    (0x7f6c, 8, Saved::Gpr(2)),
    (0x7f64, 8, Saved::Gpr(1)),
    (0x7f5c, 8, Saved::Gpr(0)),
    (0x7f54, 8, Saved::Gpr(8)),
    (0x7f4c, 8, Saved::Gpr(9)),
    (0x7f44, 8, Saved::Gpr(10)),
    (0x7f3c, 8, Saved::Gpr(11)),
    (0x7f34, 8, Saved::Gpr(12)),
    (0x7f2c, 8, Saved::Gpr(13)),
    (0x7f24, 8, Saved::Gpr(14)),
    (0x7f1c, 8, Saved::Gpr(15)),
    (0x7f02, 2, Saved::AutoHalt),
    (0x7f00, 2, Saved::IoRestart),
    (0x7efc, 4, Saved::Revision),
    (0x7ef8, 4, Saved::Base),
    (0x7ee0, 4, Saved::EptEnabled),
    (0x7ed8, 8, Saved::Eptp),
    (0x7e9c, 4, Saved::LdtBase),
    (0x7e94, 4, Saved::IdtBase),
    (0x7e8c, 4, Saved::GdtBase),
    (0x7e40, 8, Saved::Cr4),
    (0x7de8, 8, Saved::IoIp),
    (0x7dd8, 4, Saved::IdtBaseHigh),
    (0x7dd4, 4, Saved::LdtBaseHigh),
    (0x7dd0, 4, Saved::GdtBaseHigh),
];

/// SDM Vol 3C, "SMRAM State Save Map". CR4 and the RIP of an I/O instruction have no place in it that is told.
const SHORT: &SaveMap = &[
    (0x7ffc, 4, Saved::Cr0),
    (0x7ff8, 4, Saved::Cr3),
    (0x7ff4, 4, Saved::Flags),
    (0x7ff0, 4, Saved::Ip),
    (0x7fec, 4, Saved::Gpr(7)),
    (0x7fe8, 4, Saved::Gpr(6)),
    (0x7fe4, 4, Saved::Gpr(5)),
    (0x7fe0, 4, Saved::Gpr(4)),
    (0x7fdc, 4, Saved::Gpr(3)),
    (0x7fd8, 4, Saved::Gpr(2)),
    (0x7fd4, 4, Saved::Gpr(1)),
    (0x7fd0, 4, Saved::Gpr(0)),
    (0x7fcc, 4, Saved::Dr6),
    (0x7fc8, 4, Saved::Dr7),
    (0x7fc4, 4, Saved::Selector(7)),
    (0x7fbc, 4, Saved::Selector(5)),
    (0x7fb8, 4, Saved::Selector(4)),
    (0x7fb4, 4, Saved::Selector(3)),
    (0x7fb0, 4, Saved::Selector(2)),
    (0x7fac, 4, Saved::Selector(1)),
    (0x7fa8, 4, Saved::Selector(0)),
    (0x7fa4, 4, Saved::IoMisc),
    (0x7f14, 4, Saved::Cr4),
    (0x7f10, 4, Saved::IoIp),
    (0x7f02, 2, Saved::AutoHalt),
    (0x7f00, 2, Saved::IoRestart),
    (0x7efc, 4, Saved::Revision),
    (0x7ef8, 4, Saved::Base),
];

/// The map and the revision identifier of the model: I/O instruction restart and SMBASE relocation in both.
fn save_map(v: &Vcpu) -> (&'static SaveMap, u32) {
    if v.model.has(Bit::Lm) { (LONG, 0x3_0101) } else { (SHORT, 0x3_0002) }
}

/// The area in memory.
fn read_area(v: &Vcpu) -> [u8; AREA_LEN] {
    let mut area = [0; AREA_LEN];
    v.shared.map.read(PhysAddr(u64::from(v.smm.base) + AREA), &mut area);
    area
}

/// A field of an area; 0 when the map has none such.
fn field(map: &SaveMap, area: &[u8; AREA_LEN], what: Saved) -> u64 {
    let Some((at, bytes, _)) = map.iter().find(|(_, _, saved)| *saved == what) else { return 0 };
    area[at - MAP..][..*bytes].iter().rev().fold(0, |value, &b| value << 8 | u64::from(b))
}

/// What SMI delivery saves in a field.
fn value_of(v: &Vcpu, what: Saved, revision: u32) -> u64 {
    let s = &v.state;
    let port = v.smm.port;
    let ept = v.vmx.non_root && v.vmx.controls.ept();
    match what {
        Saved::Cr0 => s.cr0,
        Saved::Cr3 => s.cr3,
        Saved::Cr4 => s.cr4 & !cr4::VMXE,
        Saved::Flags => s.rflags(),
        Saved::Efer => s.efer,
        Saved::Ip => s.rip,
        Saved::Dr6 => s.dr[6],
        Saved::Dr7 => s.dr[7],
        Saved::Selector(n) => u64::from(s.seg[n].selector),
        Saved::Gpr(n) => s.gpr[n],
        Saved::LdtBase => s.seg[LDTR].base,
        Saved::GdtBase => s.gdtr.base,
        Saved::IdtBase => s.idtr.base,
        Saved::LdtBaseHigh => s.seg[LDTR].base >> 32,
        Saved::GdtBaseHigh => s.gdtr.base >> 32,
        Saved::IdtBaseHigh => s.idtr.base >> 32,
        // IO_SMI, the length, the type (OUT by DX 0, immediate 8), the port.
        Saved::IoMisc => port.map_or(0, |p| {
            1 | u64::from(p.bytes) << 1 | if p.immediate { 8 << 4 } else { 0 } | u64::from(p.port) << 16
        }),
        Saved::IoIp => port.map_or(0, |p| p.rip),
        Saved::AutoHalt => u64::from(s.halted != 0 && v.vmx.activity == activity::ACTIVE),
        Saved::IoRestart => 0,
        Saved::Revision => u64::from(revision),
        Saved::Base => u64::from(v.smm.base),
        Saved::EptEnabled => u64::from(ept),
        Saved::Eptp if ept => v.space.eptp.unwrap_or(0),
        Saved::Eptp => 0,
    }
}

fn write_area(v: &mut Vcpu) {
    let (map, revision) = save_map(v);
    let mut area = read_area(v);
    for &(at, bytes, what) in map {
        let value = value_of(v, what, revision).to_le_bytes();
        area[at - MAP..][..bytes].copy_from_slice(&value[..bytes]);
    }
    // The short map is half as long.
    let first = if v.model.has(Bit::Lm) { 0 } else { 0x200 };
    vmx::write_phys(v, u64::from(v.smm.base) + AREA + first as u64, &area[first..]);
}

// ---- SMI delivery -----------------------------------------------------------------------------------------------------

/// An OUT that has just run on its own may have raised an SMI: what the save area says of it, should it be taken next.
pub fn note_port(v: &mut Vcpu, port: u16, bytes: u8) {
    let index = v.index;
    if v.smm.is_active() || v.platform().signals(index) & signal::SMI == 0 {
        return;
    }
    let immediate = vmx::exit::decode(v).immediate_port;
    v.smm.port = Some(PortAccess { rip: v.state.rip, port, bytes, immediate });
}

/// Enters SMM if an SMI is pending and not blocked: by SMM itself, by STI or MOV SS, by waiting for a start-up IPI.
///
/// # Errors
/// Shutdown, of the event that a VM entry was still to inject.
pub fn take(v: &mut Vcpu) -> Result<(), Shutdown> {
    let index = v.index;
    if v.platform().signals(index) & signal::SMI == 0 {
        (v.smm.pending, v.smm.port) = (false, None);
        return Ok(());
    }
    if v.smm.is_active() {
        // RSM has it looked for again.
        v.smm.pending = false;
        return Ok(());
    }
    let waits = v.wait_for_sipi || v.vmx.activity == activity::WAIT_FOR_SIPI;
    if v.state.shadow != 0 || waits || v.vmx.aborted {
        return Ok(());
    }
    // It is part of the VM entry.
    if v.vmx.inject.is_some() {
        vmx::events::inject_now(v)?;
    }
    v.platform().take_signal(index, signal::SMI);
    v.smm.pending = false;
    enter(v);
    Ok(())
}

/// SMI delivery.
fn enter(v: &mut Vcpu) {
    v.counters.smis += 1;
    v.smm.count = v.smm.count.wrapping_add(1);
    write_area(v);
    let port = v.smm.port.take();
    let pml = v.mmu.pml();
    let mut vmx = std::mem::take(&mut v.vmx);
    v.vmx.stats = std::mem::take(&mut vmx.stats);
    v.vmx.transitions = vmx.transitions + 1;
    let s = &v.state;
    v.smm.inside = Some(Box::new(Interrupted {
        seg: s.seg,
        gdtr: s.gdtr,
        idtr: s.idtr,
        cpl: s.cpl,
        v86: s.rflags_sys & rflags::VM != 0,
        nmi_blocked: s.nmi_blocked,
        pdpte: s.pdpte,
        vmxe: s.cr4 & cr4::VMXE != 0,
        vmx,
        space: v.space,
        pml,
        port,
    }));
    if v.debug.has(DebugItem::Int) {
        let text = format!("int: SMI at rip {:#x} cpl {} smbase {:#x}\n", v.state.rip, v.state.cpl, v.smm.base);
        v.trace.write(&text);
    }
    v.mmu.set_pml(None);
    v.mmu.set_apic_access(None);
    v.cold.monitor = None;
    initialize(v);
    (v.space.vpid, v.space.eptp) = (0, None);
    refresh_space(v);
    let view = v.mmu.enter_smm(&v.space);
    view.store(&mut v.state);
}

/// The registers as SMM code finds them (SDM Vol 3C, "Processor Register Initialization in SMM").
fn initialize(v: &mut Vcpu) {
    let base = v.smm.base;
    let s = &mut v.state;
    s.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
    (s.cr4, s.efer, s.dr[7]) = (0, 0, 0x400);
    s.set_rflags(rflags::FIXED1);
    let attr = attr::P | attr::S | attr::RW | attr::ACCESSED | attr::G;
    for seg in &mut s.seg[..6] {
        *seg = Segment { limit: u32::MAX, attr, ..Segment::default() };
    }
    s.seg[CS].selector = (base >> 4) as u16;
    s.seg[CS].base = u64::from(base);
    // No interrupt gets anywhere before the handler has loaded IDTR.
    s.idtr = Table::default();
    s.rip = ENTRY;
    (s.cpl, s.halted, s.shadow, s.nmi_blocked) = (0, 0, 0, 1);
}

// ---- RSM --------------------------------------------------------------------------------------------------------------

/// RSM (SDM Vol 2B): #UD outside SMM; invalid state in the save area shuts the processor down.
///
/// # Errors
/// #UD.
pub fn rsm(v: &mut Vcpu) -> Helped {
    let Some(mut inside) = v.smm.inside.take() else { return Err(UD) };
    let (map, _) = save_map(v);
    let area = read_area(v);
    let get = |what| field(map, &area, what);
    if !is_valid(v, map, &area, &inside) || !load_paging(v, map, &area, &mut inside) {
        if v.debug.has(DebugItem::Int) {
            v.trace.write("int: RSM with invalid state in the save area\n");
        }
        v.vmx.aborted = true;
        v.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
        return Ok(0);
    }
    let s = &mut v.state;
    for n in 0..if v.model.has(Bit::Lm) { 16 } else { 8 } {
        s.gpr[n] = get(Saved::Gpr(n));
    }
    s.set_rflags(get(Saved::Flags) & FLAGS | if inside.v86 && s.cr0 & cr0::PE != 0 { rflags::VM } else { 0 });
    s.rip = get(Saved::Ip);
    if get(Saved::IoRestart) == RESTART_IO && inside.port.is_some() {
        s.rip = get(Saved::IoIp);
    }
    s.dr[6] = get(Saved::Dr6) & 0xffff_ffff | dr6::FIXED1;
    s.dr[7] = get(Saved::Dr7) & 0xffff_2fff | 0x400;
    (s.seg, s.gdtr, s.idtr) = (inside.seg, inside.gdtr, inside.idtr);
    if s.efer & efer::LMA == 0 || s.seg[CS].attr & attr::L == 0 {
        s.rip &= 0xffff_ffff;
    }
    s.cpl = if s.cr0 & cr0::PE != 0 { inside.cpl } else { 0 };
    (s.nmi_blocked, s.shadow) = (inside.nmi_blocked, 0);
    let state = inside.vmx.activity;
    s.halted = u32::from(get(Saved::AutoHalt) & 1 != 0 || state != activity::ACTIVE);
    v.smm.base = get(Saved::Base) as u32;
    // What came meanwhile is seen to before the next instruction.
    s.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
    if v.debug.has(DebugItem::Int) {
        let text = format!("int: RSM to rip {:#x} cpl {} smbase {:#x}\n", v.state.rip, v.state.cpl, v.smm.base);
        v.trace.write(&text);
    }
    Ok(0)
}

/// Whether RSM accepts the control registers in the area (SDM Vol 3C, "Exiting From SMM").
fn is_valid(v: &Vcpu, map: &SaveMap, area: &[u8; AREA_LEN], inside: &Interrupted) -> bool {
    let get = |what| field(map, area, what);
    let (c0, c3, c4, ef) = (get(Saved::Cr0), get(Saved::Cr3), get(Saved::Cr4), get(Saved::Efer));
    let has = |bit: u64| c0 & bit != 0;
    if c0 >> 32 != 0 || (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return false;
    }
    // CR4.VMXE is kept inside, and reserved here.
    if c4 & !(v.model.cr4_mask() & !cr4::VMXE) != 0 || ef & !v.model.efer_mask() != 0 {
        return false;
    }
    let long = ef & efer::LMA != 0;
    if long != (ef & efer::LME != 0 && has(cr0::PG)) || (long && c4 & cr4::PAE == 0) {
        return false;
    }
    if !long && c4 & cr4::PCIDE != 0 || long && inside.v86 {
        return false;
    }
    c3 >> v.model.phys_bits == 0
}

/// Loads the control registers, VMX and the address space; false when the PDPTEs are bad.
fn load_paging(v: &mut Vcpu, map: &SaveMap, area: &[u8; AREA_LEN], inside: &mut Interrupted) -> bool {
    let get = |what| field(map, area, what);
    let s = &mut v.state;
    s.cr0 = get(Saved::Cr0) & cr0::DEFINED | cr0::ET;
    s.cr3 = get(Saved::Cr3);
    s.cr4 = get(Saved::Cr4) | if inside.vmxe { cr4::VMXE } else { 0 };
    s.efer = get(Saved::Efer);
    let (stats, transitions) = (std::mem::take(&mut v.vmx.stats), v.vmx.transitions);
    v.vmx = std::mem::take(&mut inside.vmx);
    (v.vmx.stats, v.vmx.transitions) = (stats, transitions + 1);
    inside.vmx.activity = v.vmx.activity;
    if v.vmx.vmxon.is_some() {
        v.state.cr0 |= vmx::intercept::cr0_must(v);
        v.state.cr4 |= vmx::intercept::cr4_must();
    }
    v.mmu.set_pml(inside.pml);
    if v.vmx.non_root {
        let page = vmx::apic::access_page(v);
        v.mmu.set_apic_access(page);
    }
    v.space = inside.space;
    v.state.pdpte = inside.pdpte;
    refresh_space(v);
    if v.space.mode == PagingMode::Pae && v.space.eptp.is_none() {
        let (space, cr3) = (v.space, v.state.cr3);
        let Ok(pdptes) = v.mmu.load_pdptes(&space, cr3) else { return false };
        v.state.pdpte = pdptes;
        refresh_space(v);
    }
    let view = v.mmu.leave_smm(&v.space);
    view.store(&mut v.state);
    true
}
