//! What the MMU's test programs share: a small machine, and the model's terms in the crate's.
#![allow(dead_code)] // Each test program uses its own part.

use std::sync::Arc;

use twofold_mmu::{
    Access, AccessKind, AddressSpace, CodePages, EptFaultKind, Fault, FlushPolicy, GuestRam, LegacyHole, Mmu,
    PagingMode, PhysMap, Pml,
};

use crate::model::two_stage::{self, Ept};
use crate::model::{Cpu, Memory, Mode, Op, Who};

/// RAM of the small machine: all below the legacy hole, so that addresses are offsets.
pub const RAM: u64 = 0x8_0000;

pub struct Machine {
    pub phys: Arc<PhysMap>,
    pub code: Arc<CodePages>,
}

impl Machine {
    pub fn new() -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let phys = Arc::new(PhysMap::new(ram, LegacyHole::Unmapped));
        Self { phys, code: Arc::new(CodePages::new(twofold_arch::PhysAddr(RAM))) }
    }
    pub fn mmu(&self, policy: FlushPolicy) -> Mmu {
        Mmu::new(Arc::clone(&self.phys), Arc::clone(&self.code), policy).unwrap()
    }
    pub fn ram(&self) -> &GuestRam {
        self.phys.ram()
    }
    /// The contents of RAM.
    pub fn memory(&self) -> Memory {
        let mut m = vec![0; RAM as usize];
        assert!(self.ram().read(0, &mut m));
        Memory(m)
    }
    pub fn set_memory(&self, m: &Memory) {
        assert!(self.ram().write(0, &m.0));
    }
}

pub fn space_of(cpu: &Cpu) -> AddressSpace {
    AddressSpace {
        mode: match cpu.mode {
            Mode::None => PagingMode::None,
            Mode::ThirtyTwo => PagingMode::Bits32,
            Mode::Pae => PagingMode::Pae,
            Mode::Four => PagingMode::Level4,
            Mode::Five => PagingMode::Level5,
        },
        cr3: cpu.cr3,
        pdptes: cpu.pdptes,
        wp: cpu.wp,
        pse: cpu.pse,
        pge: cpu.pge,
        smep: cpu.smep,
        smap: cpu.smap,
        pke: cpu.pke,
        pks: cpu.pks,
        nxe: cpu.nxe,
        pkru: cpu.pkru,
        pkrs: cpu.pkrs,
        gigabyte_pages: cpu.page1gb,
        ..AddressSpace::reset(cpu.maxphyaddr as u8)
    }
}

pub fn access_of(op: Op, who: Who) -> Access {
    Access {
        kind: match op {
            Op::Read => AccessKind::Read,
            Op::Write => AccessKind::Write,
            Op::Fetch => AccessKind::Fetch,
        },
        user: who == Who::User,
        implicit: who == Who::Implicit,
        // Implicit accesses do not look at EFLAGS.AC.
        ac: matches!(who, Who::Explicit { ac: true } | Who::Implicit),
    }
}

pub const OPS: [Op; 3] = [Op::Read, Op::Write, Op::Fetch];
pub const WHO: [Who; 4] = [Who::User, Who::Explicit { ac: false }, Who::Explicit { ac: true }, Who::Implicit];

/// Controls that allow everything: 4-level paging, nothing enforced but WP and NX.
pub fn plain(mode: Mode) -> Cpu {
    Cpu {
        mode,
        cr3: 0,
        pdptes: [0; 4],
        wp: true,
        pse: true,
        pge: true,
        smep: false,
        smap: false,
        pke: false,
        pks: false,
        nxe: true,
        pkru: 0,
        pkrs: 0,
        maxphyaddr: 46,
        page1gb: true,
    }
}

/// The address space of `cpu` under `ept`.
pub fn space_under(cpu: &Cpu, ept: &Ept) -> AddressSpace {
    AddressSpace {
        eptp: Some(ept.eptp),
        ept_mode_based: ept.mode_based,
        ept_execute_only: ept.execute_only,
        vpid: 1,
        ..space_of(cpu)
    }
}

pub fn pml_of(ept: &Ept) -> Option<Pml> {
    ept.pml.map(|(address, index)| Pml { address: twofold_arch::PhysAddr(address), index })
}

/// A fault in the model's terms; the linear address in it must be `la` wherever there is one.
pub fn fault_of(fault: Fault, la: u64) -> two_stage::Fault {
    match fault {
        Fault::Page { error, la: at } => {
            assert_eq!(at.0, la);
            two_stage::Fault::Page(error)
        }
        Fault::Ept(f) => {
            let gpa = f.gpa.0;
            assert!(f.la.is_none_or(|at| at.0 == la));
            two_stage::Fault::Ept(match f.kind {
                EptFaultKind::Violation(qualification) => {
                    assert_eq!(f.la.is_some(), qualification >> 7 & 1 != 0);
                    two_stage::Refused::Violation { qualification, gpa, suppress_ve: f.suppress_ve }
                }
                EptFaultKind::Misconfiguration => two_stage::Refused::Misconfiguration { gpa },
                EptFaultKind::LogFull => two_stage::Refused::LogFull { gpa },
                EptFaultKind::SubPage { .. } => panic!("sub-page write permissions are off"),
            })
        }
        Fault::NonCanonical { .. } => panic!("canonical by construction"),
    }
}
