//! The seam under the walks: a second translation stage that moves guest-physical pages about and can refuse them. What EPT
//! will plug into, tested with a fake.

mod common;
mod model;

use std::collections::HashMap;

use common::{Machine, OPS, WHO, access_of, plain, space_of};
use model::{Cpu, Memory, Mode, Op, Who};
use proptest::prelude::*;
use twofold_arch::{GuestPhysAddr, LinearAddr, PhysAddr};
use twofold_mmu::walk::WalkCounts;
use twofold_mmu::{
    AccessKind, AddressSpace, EntryWidth, EptFault, EptFaultKind, Fault, FlushPolicy, Frame, GuestPhysical, GuestRam,
    PdpteError, load_pdptes, rights::Rights, walk,
};

/// Guest-physical page number → (page number in RAM, writable). A page that is absent is an EPT violation.
struct FakeEpt<'a> {
    ram: &'a GuestRam,
    pages: HashMap<u64, (u64, bool)>,
}

/// Made-up qualifications, one a reason.
const READS: u32 = 1;
const WRITES: u32 = 2;

impl FakeEpt<'_> {
    fn find(&self, at: GuestPhysAddr, write: bool, la: LinearAddr) -> Result<u64, EptFault> {
        let fault = |q| EptFault { kind: EptFaultKind::Violation(q), gpa: at, la: Some(la), suppress_ve: false };
        match self.pages.get(&(at.0 >> 12)) {
            None => Err(fault(if write { WRITES } else { READS })),
            Some((_, false)) if write => Err(fault(WRITES)),
            Some((page, _)) => Ok(page << 12 | at.page_offset()),
        }
    }
}

impl GuestPhysical for FakeEpt<'_> {
    fn read_entry(&mut self, at: GuestPhysAddr, width: EntryWidth, la: LinearAddr) -> Result<u64, EptFault> {
        let bytes = if width == EntryWidth::Four { 4 } else { 8 };
        Ok(self.ram.load(self.find(at, false, la)?, bytes).unwrap())
    }
    fn exchange_entry(
        &mut self,
        at: GuestPhysAddr,
        width: EntryWidth,
        old: u64,
        new: u64,
        la: LinearAddr,
    ) -> Result<bool, EptFault> {
        let at = self.find(at, true, la)?;
        Ok(match width {
            EntryWidth::Four => self.ram.exchange_u32(at, old as u32, new as u32).unwrap(),
            EntryWidth::Eight => self.ram.exchange_u64(at, old, new).unwrap(),
        })
    }
    fn resolve(&mut self, at: GuestPhysAddr, kind: AccessKind, _: Rights, la: LinearAddr) -> Result<Frame, EptFault> {
        let pa = PhysAddr(self.find(at, kind == AccessKind::Write, la)?);
        let write = self.pages.get(&(at.0 >> 12)).is_some_and(|p| p.1);
        Ok(Frame { pa, shift: 12, read: true, write, exec: true, memory_type: None })
    }
}

const TABLES: u64 = 24;

/// Guest-physical memory of a few tables, and a leaf for each of the low linear pages.
fn guest_memory(mode: Mode, flags: &[u64]) -> (Cpu, Memory) {
    let mut m = Memory(vec![0; 64 << 12]);
    let (levels, width) = match mode {
        Mode::ThirtyTwo => (2, 4),
        Mode::Five => (5, 8),
        Mode::Four => (4, 8),
        _ => (2, 8),
    };
    for l in 1..levels {
        m.write(l << 12, width, (l + 1) << 12 | 7);
    }
    for (i, f) in flags.iter().enumerate() {
        let i = i as u64;
        m.write((levels << 12) + i * width, width, (TABLES + i % 32) << 12 | f);
    }
    (Cpu { cr3: 0x1000, pdptes: [0x1001, 0, 0, 0], ..plain(mode) }, m)
}

/// Puts guest-physical memory into RAM by `order`, pages in `missing` absent and those in `read_only` not writable.
fn scatter<'a>(ram: &'a GuestRam, m: &Memory, order: &[u64], missing: u64, read_only: u64) -> FakeEpt<'a> {
    let mut pages = HashMap::new();
    for (g, &h) in order.iter().enumerate() {
        assert!(ram.write(h << 12, &m.0[g << 12..][..4096]));
        if missing >> g & 1 == 0 {
            pages.insert(g as u64, (h, read_only >> g & 1 == 0));
        }
    }
    FakeEpt { ram, pages }
}

fn gather(ram: &GuestRam, order: &[u64]) -> Memory {
    let mut m = Memory(vec![0; order.len() << 12]);
    for (g, &h) in order.iter().enumerate() {
        assert!(ram.read(h << 12, &mut m.0[g << 12..][..4096]));
    }
    m
}

fn nested(cpu: &Cpu) -> AddressSpace {
    AddressSpace { eptp: Some(0x5e), vpid: 1, ..space_of(cpu) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Walks through the fake do what the model does on guest-physical memory, wherever its pages are; where the model
    /// needs a page that the fake does not have, they end in the fake's fault.
    #[test]
    fn nested_walks_are_the_models(
        mode in prop_oneof![Just(Mode::ThirtyTwo), Just(Mode::Pae), Just(Mode::Four), Just(Mode::Five)],
        flags in proptest::collection::vec((0..128u64).prop_map(|f| (f & 0x67) | 1), 32),
        order in Just((0..64u64).collect::<Vec<_>>()).prop_shuffle(),
        missing in prop_oneof![3 => Just(0u64), 1 => (0..64u32).prop_map(|b| 1 << b)],
        read_only in prop_oneof![3 => Just(0u64), 1 => (0..64u32).prop_map(|b| 1 << b)],
        tries in proptest::collection::vec((0..32u64, 0..OPS.len(), 0..WHO.len()), 1..24),
    ) {
        let machine = Machine::new();
        let (cpu, mut expected) = guest_memory(mode, &flags);
        let mut ept = scatter(machine.ram(), &expected, &order, missing, read_only);
        let mut mmu = machine.mmu(FlushPolicy::Tagged);
        let space = nested(&cpu);
        let _ = mmu.reset(&space);
        for (page, op, who) in tries {
            let (op, who, la) = (OPS[op], WHO[who], page << 12 | 0x18);
            let before = expected.clone();
            let theirs = model::access(&cpu, &mut expected, la, op, who);
            match mmu.fill_through(&space, LinearAddr(la), access_of(op, who), &mut ept) {
                Ok(t) => {
                    let gpa = theirs.expect("the model refuses").pa;
                    prop_assert_eq!(t.pa.0, order[(gpa >> 12) as usize] << 12 | 0x18);
                    prop_assert!(gather(machine.ram(), &order) == expected);
                }
                Err(Fault::Page { error, la: at }) => prop_assert_eq!((Err(error), at.0), (theirs, la)),
                Err(Fault::Ept(f)) => {
                    let bit = 1u64 << (f.gpa.0 >> 12);
                    prop_assert_eq!(f.la, Some(LinearAddr(la)));
                    match f.kind {
                        EptFaultKind::Violation(READS) => prop_assert!(missing & bit != 0),
                        EptFaultKind::Violation(_) => prop_assert!((missing | read_only) & bit != 0),
                        _ => prop_assert!(false),
                    }
                    // Flags set before the fault stay; the walk does not go on from there.
                    expected = gather(machine.ram(), &order);
                    for at in (0..before.0.len() as u64).step_by(8) {
                        prop_assert_eq!((before.read(at, 8) ^ expected.read(at, 8)) & !0x60_0000_0060, 0);
                    }
                }
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
        prop_assert!(mmu.stats().nested_walks > 0);
    }
}

/// A page that the second stage does not let be written gets no write tag, even if the guest's tables allow the write.
#[test]
fn second_stage_rights_limit_the_tags() {
    let machine = Machine::new();
    let (cpu, m) = guest_memory(Mode::Four, &[0x67; 32]);
    let order: Vec<u64> = (0..64).rev().collect();
    let mut ept = scatter(machine.ram(), &m, &order, 0, 1 << TABLES);
    let space = nested(&cpu);
    let mut mmu = machine.mmu(FlushPolicy::Tagged);
    let _ = mmu.reset(&space);
    let user = twofold_arch::tbflags::MemMode::User;
    mmu.fill_through(&space, LinearAddr(0), access_of(Op::Read, Who::User), &mut ept).unwrap();
    assert!(mmu.load_cached(user, LinearAddr(0), 8).is_some());
    assert!(!mmu.store_cached(user, LinearAddr(0), 8, 1));
    let fault = mmu.fill_through(&space, LinearAddr(0), access_of(Op::Write, Who::User), &mut ept).unwrap_err();
    let kind = EptFaultKind::Violation(WRITES);
    let la = Some(LinearAddr(0));
    assert_eq!(fault, Fault::Ept(EptFault { kind, gpa: GuestPhysAddr(TABLES << 12), la, suppress_ve: false }));
    assert_eq!(fault.exception(false), None, "an EPT fault exits, it is no exception");
    mmu.fill_through(&space, LinearAddr(0x1000), access_of(Op::Read, Who::User), &mut ept).unwrap();
    assert!(mmu.store_cached(user, LinearAddr(0x1000), 8, 1), "the neighbour's D flag was set already");
}

/// Paging off under the second stage: it alone translates.
#[test]
fn unpaged_under_the_second_stage() {
    let machine = Machine::new();
    let mut ept = FakeEpt { ram: machine.ram(), pages: HashMap::from([(3, (9, true))]) };
    let space = nested(&plain(Mode::None));
    let mut counts = WalkCounts::default();
    let access = access_of(Op::Write, Who::Implicit);
    assert_eq!(walk(&space, LinearAddr(0x3010), access, &mut ept, &mut counts).unwrap().page, PhysAddr(0x9000));
    assert!(matches!(walk(&space, LinearAddr(0x4010), access, &mut ept, &mut counts), Err(Fault::Ept(_))));
    assert_eq!(counts.entries_read, 0);
}

/// PDPTE loads go through the second stage too, and report its faults.
#[test]
fn a2_pdptes_through_the_second_stage() {
    let machine = Machine::new();
    machine.ram().store_u64(0x9040, 0x5001);
    let mut ept = FakeEpt { ram: machine.ram(), pages: HashMap::from([(3, (9, true))]) };
    assert_eq!(load_pdptes(0x3040, 40, &mut ept), Ok([0x5001, 0, 0, 0]));
    assert!(matches!(load_pdptes(0x4040, 40, &mut ept), Err(PdpteError::Ept(_))));
}
