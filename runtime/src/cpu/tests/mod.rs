//! Tests of the system side of the processor: a vCPU with a few MiB of memory, no translated code, expectations from the SDM.

mod branch;
mod control;
mod debug;
mod deliver;
mod legacy;
mod ops;
mod pkru;
pub(crate) mod smm;
mod string;

use std::sync::Arc;

use twofold_arch::control::{cr0, cr4, efer};
use twofold_arch::{CpuState, Exception, LinearAddr, PhysAddr, Vector};
use twofold_mmu::{CodePages, FlushPolicy, GuestRam, LegacyHole, Mmu, PhysMap};

use super::{ColdState, CpuModel, Helped, control as cr, far};
use crate::config::Tier;
use crate::exec::Jit;
use crate::platform::{Clock, Platform, Setup};
use crate::trace::Trace;
use crate::vcpu::{MemAs, Shared, Trap, Vcpu};

/// Bytes of memory.
pub(crate) const RAM: u64 = 4 << 20;
/// Where the tests keep their tables.
pub(crate) const PML4: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x8000;
pub(crate) const IDT: u64 = 0x9000;
pub(crate) const TSS: u64 = 0xb000;
/// Stack of CPL 0, of IST1, of CPL 3; they grow down from here.
const RSP0: u64 = 0x2_0000;
const IST1: u64 = 0x2_2000;
const USER_RSP: u64 = 0x2_4000;
/// A handler's address is this plus 16 times its vector.
pub(crate) const HANDLERS: u64 = 0x3_0000;

pub(crate) const KERNEL_CS: u16 = 0x10;
pub(crate) const KERNEL_DS: u16 = 0x18;
const USER_CS32: u16 = 0x23;
const USER_DS: u16 = 0x2b;
const USER_CS: u16 = 0x33;
pub(crate) const TSS_SEL: u16 = 0x40;

/// A reset vCPU.
pub(crate) fn vcpu() -> Box<Vcpu> {
    vcpu_of(CpuModel::max())
}

pub(crate) fn vcpu_of(model: CpuModel) -> Box<Vcpu> {
    let map = Arc::new(PhysMap::new(Arc::new(GuestRam::new(RAM).unwrap()), LegacyHole::default()));
    let clock = Clock::manual();
    let platform = Platform::new(Setup::quiet(1, RAM, clock.clone()));
    let code = Arc::new(CodePages::new(PhysAddr(RAM)));
    let mmu = Mmu::new(map.clone(), code, FlushPolicy::Tagged).unwrap();
    let shared = Arc::new(Shared::new(map, platform, clock));
    let mut v = Vcpu::new(0, shared, Arc::new(model), mmu, Jit::new(Tier::Eval, Default::default()));
    v.cold = ColdState::new(1);
    v.trace = Trace::new(Box::new(std::io::sink()));
    super::reset(&mut v);
    v
}

pub(crate) fn poke(v: &Vcpu, pa: u64, data: &[u8]) {
    v.shared.map.write(PhysAddr(pa), data);
}
pub(crate) fn poke64(v: &Vcpu, pa: u64, value: u64) {
    poke(v, pa, &value.to_le_bytes());
}
pub(crate) fn peek(v: &Vcpu, pa: u64, bytes: usize) -> u64 {
    let mut b = [0; 8];
    v.shared.map.read(PhysAddr(pa), &mut b[..bytes]);
    u64::from_le_bytes(b)
}
pub(crate) fn peek64(v: &Vcpu, pa: u64) -> u64 {
    peek(v, pa, 8)
}

/// A descriptor from base, limit (in bytes or pages), access byte and the flags nibble (G, D/B, L, AVL).
fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// A 64-bit gate.
pub(crate) fn long_gate(v: &Vcpu, vector: u64, selector: u16, offset: u64, access: u64, ist: u64) {
    let low = offset & 0xffff | u64::from(selector) << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xffff) << 48;
    poke64(v, IDT + vector * 16, low);
    poke64(v, IDT + vector * 16 + 8, offset >> 32);
}

/// A vCPU in 64-bit mode at CPL 0: memory identity-mapped (user-accessible), GDT, IDT with an interrupt gate for each vector,
/// TSS with RSP0 and IST1.
pub(crate) fn long_mode() -> Box<Vcpu> {
    let mut v = vcpu();
    poke64(&v, PML4, 0x2007);
    poke64(&v, 0x2000, 0x3007);
    for i in 0..2 {
        poke64(&v, 0x3000 + 8 * i, i << 21 | 0x87);
    }
    for (selector, d) in [
        (KERNEL_CS, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
        (KERNEL_DS, descriptor(0, 0xf_ffff, 0x93, 0xc)),
        (USER_CS32 & !3, descriptor(0, 0xf_ffff, 0xfb, 0xc)),
        (USER_DS & !3, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
        (USER_CS & !3, descriptor(0, 0xf_ffff, 0xfb, 0xa)),
        (TSS_SEL, descriptor(TSS, 0x67, 0x89, 0)),
        (TSS_SEL + 8, 0),
    ] {
        poke64(&v, GDT + u64::from(selector), d);
    }
    for vector in 0..256 {
        long_gate(&v, vector, KERNEL_CS, HANDLERS + 16 * vector, 0x8e, 0);
    }
    poke64(&v, TSS + 4, RSP0);
    poke64(&v, TSS + 0x24, IST1);
    v.state.gdtr = twofold_arch::state::Table { base: GDT, limit: 0x4f };
    v.state.idtr = twofold_arch::state::Table { base: IDT, limit: 0xfff };
    cr::write_cr4(&mut v, cr4::PAE | cr4::PGE | cr4::OSFXSR).unwrap();
    cr::write_cr3(&mut v, PML4).unwrap();
    cr::write_efer(&mut v, efer::LME | efer::SCE | efer::NXE).unwrap();
    cr::write_cr0(&mut v, cr0::PE | cr0::PG | cr0::WP | cr0::ET | cr0::NE).unwrap();
    v.state.seg[1].limit = u32::MAX;
    far::far_jmp(&mut v, KERNEL_CS, 0x5000, 2, 0).unwrap();
    for i in [0, 2, 3, 4, 5] {
        super::segments::load_seg(&mut v, i, KERNEL_DS).unwrap();
    }
    super::segments::ltr(&mut v, TSS_SEL).unwrap();
    v.state.gpr[4] = 0x1_f008;
    v
}

/// Puts a 64-bit-mode vCPU at CPL 3, by IRET, with RFLAGS `flags`.
pub(crate) fn to_user(v: &mut Vcpu, rip: u64, flags: u64) {
    let sp = 0x1_e000;
    for (i, x) in [rip, USER_CS.into(), flags, USER_RSP, USER_DS.into()].into_iter().enumerate() {
        poke64(v, sp + 8 * i as u64, x);
    }
    v.state.gpr[4] = sp;
    far::iret(v, 3, 0).unwrap();
    assert_eq!(v.state.cpl, 3);
}

/// The exception a helper raised.
fn exception(r: Helped) -> Exception {
    match r.expect_err("no exception") {
        Trap::Exception(e) => e,
        Trap::VmExit => panic!("a VM exit"),
        Trap::Restart => panic!("no block runs"),
    }
}
fn assert_gp(r: Helped, error: u32) {
    assert_eq!(exception(r), Exception::gp(error));
}
fn fault(vector: Vector, error: u32) -> Exception {
    Exception::with_error(vector, error)
}
