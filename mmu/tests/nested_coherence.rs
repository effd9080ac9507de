//! Coherence of linear, combined and guest-physical mappings (rows C5, C6, D1, D2, D5–D7, E1–E5): after any sequence of changes
//! to guest tables and EPT, accesses, invalidations, VM transitions and EPTP switches, an access gets a mapping that may
//! still be cached under its own tags or the current one, never another's; and every fault is that of memory as it is.

mod common;
mod model;

use std::collections::BTreeSet;

use common::{Machine, OPS, access_of, fault_of, plain, space_of};
use model::two_stage::{self, Ept};
use model::{Cpu, Memory, Mode, Op, Page, Who};
use proptest::prelude::*;
use twofold_arch::LinearAddr;
use twofold_arch::tbflags::MemMode;
use twofold_mmu::{AddressSpace, FlushCause, FlushPolicy, Invpcid, Invvpid, JumpCacheEntry, Mmu};

const SPACES: usize = 2;
const EPTS: usize = 2;
/// VPID 0 stands for VPIDs not in use.
const VPIDS: usize = 3;
const PCIDS: usize = SPACES + 1;
const LAS: usize = 3;
/// Four pages for each EPT, topmost first.
const EPT_TABLES: u64 = 0x1000;
/// Guest-physical and physical: four pages for each guest address space, topmost first.
const GUEST_TABLES: u64 = 0x2_0000;
/// Physical: another page table for each guest address space, where EPT may put the first.
const OTHER_TABLES: u64 = 0x3_0000;
/// Guest-physical data pages. Physical too, for L1.
const DATA: u64 = 0x4_0000;
const DATA_PAGES: u64 = 4;
/// Physical pages that EPT puts them on.
const FRAMES: u64 = 0x5_0000;

/// In a 2 MiB page at guest-physical address 0 these are the data pages.
fn la(i: usize) -> u64 {
    0x40_0000 + DATA + i as u64 * 0x1000
}

fn ept_top(e: usize) -> u64 {
    EPT_TABLES + e as u64 * 0x4000
}

fn guest_top(s: usize) -> u64 {
    GUEST_TABLES + s as u64 * 0x4000
}

fn guest_pt(s: usize) -> u64 {
    guest_top(s) + 0x3000
}

/// Where the entry of the region is.
fn guest_pde(s: usize) -> u64 {
    guest_top(s) + 0x2010
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Write a guest page-table entry, in the table itself or in the other one.
    Guest {
        space: usize,
        other: bool,
        la: usize,
        page: u64,
        flags: u64,
    },
    /// Write the guest's entry of the region: a 2 MiB page with these flags, or the page table.
    Region {
        space: usize,
        page: Option<u64>,
    },
    /// Write the EPT entry of a data page.
    Ept {
        ept: usize,
        page: u64,
        frame: u64,
        rights: u64,
    },
    /// Put a guest page table elsewhere.
    MoveTable {
        ept: usize,
        space: usize,
        other: bool,
    },
    Access {
        la: usize,
        op: usize,
        user: bool,
    },
    /// VM exit to L1, with this address space.
    Exit {
        space: usize,
    },
    /// VM entry.
    Enter {
        vpid: usize,
        space: usize,
        ept: usize,
    },
    MovCr3 {
        space: usize,
        keep: bool,
    },
    Invlpg {
        la: usize,
    },
    Invpcid {
        kind: u8,
        pcid: u16,
        la: usize,
    },
    Invvpid {
        kind: u8,
        vpid: u16,
        la: usize,
    },
    Invept {
        ept: Option<usize>,
    },
    /// VMFUNC.
    SwitchEptp {
        ept: usize,
    },
    /// Turn accessed and dirty flags on or off: at the next VM entry.
    Flags {
        ept: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let guest = (0..32u64).prop_map(|b| u64::from(b & 7 != 0) | (b & 1) << 1 | (b >> 3 & 1) << 2 | 1 << (2 * (b >> 4)));
    let rights = (0..16u64).prop_map(|b| [7, 7, 7, 7, 7, 7, 3, 5, 1, 4, 0, 7, 7, 5, 3, 7][b as usize]);
    prop_oneof![
        4 => (0..SPACES, any::<bool>(), 0..LAS, 0..DATA_PAGES, guest)
            .prop_map(|(space, other, la, page, flags)| Step::Guest { space, other, la, page, flags }),
        1 => (0..SPACES, proptest::option::of((0..8u64).prop_map(|b| 1 | (b & 3) << 1 | ((b >> 2) * 0x60))))
            .prop_map(|(space, page)| Step::Region { space, page }),
        4 => (0..EPTS, 0..DATA_PAGES, 0..16u64, rights)
            .prop_map(|(ept, page, frame, rights)| Step::Ept { ept, page, frame, rights }),
        1 => (0..EPTS, 0..SPACES, any::<bool>()).prop_map(|(ept, space, other)| Step::MoveTable { ept, space, other }),
        30 => (0..LAS, 0..OPS.len(), any::<bool>()).prop_map(|(la, op, user)| Step::Access { la, op, user }),
        2 => (0..SPACES).prop_map(|space| Step::Exit { space }),
        4 => (0..VPIDS, 0..SPACES, 0..EPTS).prop_map(|(vpid, space, ept)| Step::Enter { vpid, space, ept }),
        2 => (0..SPACES, any::<bool>()).prop_map(|(space, keep)| Step::MovCr3 { space, keep }),
        1 => (0..LAS).prop_map(|la| Step::Invlpg { la }),
        1 => (0..4u8, 0..PCIDS as u16, 0..LAS).prop_map(|(kind, pcid, la)| Step::Invpcid { kind, pcid, la }),
        2 => (0..4u8, 1..VPIDS as u16, 0..LAS).prop_map(|(kind, vpid, la)| Step::Invvpid { kind, vpid, la }),
        2 => proptest::option::of(0..EPTS).prop_map(|ept| Step::Invept { ept }),
        1 => (0..EPTS).prop_map(|ept| Step::SwitchEptp { ept }),
        1 => (0..EPTS).prop_map(|ept| Step::Flags { ept }),
    ]
}

/// A linear address's mapping: physical page; the guest's user, write; EPT's read, write, execute.
type Combined = (u64, bool, bool, bool, bool, bool);
/// What is cached for a region: the page table of a space, or a 2 MiB page with its user and write.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Region {
    Table(usize),
    Page(bool, bool),
}
/// A guest-physical page's mapping: physical page; read, write, execute.
type Physical = (u64, bool, bool, bool);

struct World {
    machine: Machine,
    mmu: Mmu,
    cpu: Cpu,
    pcide: bool,
    /// `None`: L1 runs.
    l2: Option<(usize, usize)>,
    space: usize,
    flags: [bool; EPTS],
    /// EPTPs as loaded: a changed control takes effect at a VM entry or a VMFUNC.
    eptp: u64,
    /// What may be cached: guest-physical mappings by EPT and page (data pages, then page tables).
    physical: Vec<BTreeSet<Physical>>,
    /// What may be cached: linear (EPT number 0) and combined (1…) mappings, by VPID, PCID, EPT and address.
    combined: Vec<BTreeSet<Combined>>,
    /// What the region, in which all addresses are, may be cached as, by VPID, PCID and EPT.
    regions: Vec<BTreeSet<Region>>,
    stale_hits: u32,
}

const GPA_PAGES: usize = DATA_PAGES as usize + SPACES;

impl World {
    fn new(pcide: bool, policy: FlushPolicy) -> Self {
        let machine = Machine::new();
        let ram = machine.ram();
        for e in 0..EPTS {
            for l in 0..3u64 {
                ram.store_u64(ept_top(e) + l * 0x1000, (ept_top(e) + (l + 1) * 0x1000) | 7);
            }
            for page in 0..0x80u64 {
                ram.store_u64(ept_top(e) + 0x3000 + page * 8, page << 12 | 6 << 3 | 7);
            }
            for page in 0..DATA_PAGES {
                let frame = FRAMES + (e as u64 * 8 + page) * 0x1000;
                ram.store_u64(ept_top(e) + 0x3000 + ((DATA >> 12) + page) * 8, frame | 6 << 3 | 7);
            }
        }
        for s in 0..SPACES {
            for l in 0..3u64 {
                let index = if l == 2 { 2 } else { 0 };
                ram.store_u64(guest_top(s) + l * 0x1000 + index * 8, (guest_top(s) + (l + 1) * 0x1000) | 7);
            }
        }
        for page in 0..16 {
            for base in [FRAMES, DATA] {
                for at in (0..0x1000).step_by(8) {
                    let pa = base + page * 0x1000;
                    ram.store_u64(pa + at, pa);
                }
            }
        }
        let mmu = machine.mmu(policy);
        let mut w = Self {
            machine,
            mmu,
            cpu: Cpu { pge: false, ..plain(Mode::Four) },
            pcide,
            l2: None,
            space: 0,
            flags: [false; EPTS],
            eptp: 0,
            physical: vec![BTreeSet::new(); EPTS * GPA_PAGES],
            combined: vec![BTreeSet::new(); VPIDS * PCIDS * (EPTS + 1) * LAS],
            regions: vec![BTreeSet::new(); VPIDS * PCIDS * (EPTS + 1)],
            stale_hits: 0,
        };
        let space = w.space();
        let _ = w.mmu.reset(&space);
        w.look();
        w
    }

    fn load_eptp(&mut self, e: usize) {
        self.eptp = ept_top(e) | 3 << 3 | u64::from(self.flags[e]) << 6 | 6;
    }

    fn pcid(&self) -> u16 {
        if self.pcide { self.space as u16 + 1 } else { 0 }
    }

    fn vpid(&self) -> usize {
        self.l2.map_or(0, |(vpid, _)| vpid)
    }

    fn cpu(&self) -> Cpu {
        Cpu { cr3: guest_top(self.space), ..self.cpu }
    }

    fn space(&self) -> AddressSpace {
        let base = AddressSpace { pcide: self.pcide, pcid: self.pcid(), ..space_of(&self.cpu()) };
        match self.l2 {
            None => base,
            Some((vpid, _)) => AddressSpace { vpid: vpid as u16, eptp: Some(self.eptp), ..base },
        }
    }

    fn ept(&self) -> Option<Ept> {
        let eptp = self.eptp;
        self.l2.map(|_| Ept { eptp, mode_based: false, execute_only: true, maxphyaddr: 46, pml: None })
    }

    fn slot(vpid: usize, pcid: usize, ept: usize, la: usize) -> usize {
        ((vpid * PCIDS + pcid) * (EPTS + 1) + ept) * LAS + la
    }

    fn ept_number(&self) -> usize {
        self.l2.map_or(0, |(_, e)| e + 1)
    }

    /// What `gpa` is mapped to by EPT `e` now.
    fn physical_now(&self, e: usize, gpa: u64) -> Option<Physical> {
        let entry = self.machine.ram().load_u64(ept_top(e) + 0x3000 + (gpa >> 12) * 8).unwrap();
        (entry & 7 != 0).then_some((entry & 0xf_ffff_f000, entry & 1 != 0, entry & 2 != 0, entry & 4 != 0))
    }

    fn gpa_of(page: usize) -> u64 {
        let data = DATA_PAGES as usize;
        if page < data { DATA + page as u64 * 0x1000 } else { guest_pt(page - data) }
    }

    /// What guest paging makes of an address by what is cached for its region: guest-physical page, user, write.
    fn guest_mappings(&self, region: Region, i: usize) -> Vec<(u64, bool, bool)> {
        let space = match region {
            Region::Page(user, write) => return vec![(la(i) & 0x1f_ffff, user, write)],
            Region::Table(space) => space,
        };
        let tables: Vec<u64> = match self.l2 {
            None => vec![guest_pt(space)],
            Some((_, e)) => {
                let of = &self.physical[e * GPA_PAGES + DATA_PAGES as usize + space];
                of.iter().map(|p| p.0).collect()
            }
        };
        let entries = tables.into_iter().map(|t| self.machine.ram().load_u64(t + (la(i) >> 12 & 511) * 8).unwrap());
        entries.filter(|e| e & 1 != 0).map(|e| (e & 0xf_ffff_f000, e & 4 != 0, e & 2 != 0)).collect()
    }

    /// Notes what the current context may cache now.
    fn look(&mut self) {
        if let Some((_, e)) = self.l2 {
            for page in 0..GPA_PAGES {
                if let Some(p) = self.physical_now(e, Self::gpa_of(page)) {
                    self.physical[e * GPA_PAGES + page].insert(p);
                }
            }
        }
        let (vpid, pcid, ept) = (self.vpid(), usize::from(self.pcid()), self.ept_number());
        let cached = &mut self.regions[Self::slot(vpid, pcid, ept, 0) / LAS];
        let entry = self.machine.ram().load_u64(guest_pde(self.space)).unwrap();
        let large = Region::Page(entry & 4 != 0, entry & 2 != 0);
        cached.insert(if entry & 0x80 != 0 { large } else { Region::Table(self.space) });
        let cached: Vec<Region> = cached.iter().copied().collect();
        for i in 0..LAS {
            let mut found = Vec::new();
            let guest: Vec<(u64, bool, bool)> = cached.iter().flat_map(|&r| self.guest_mappings(r, i)).collect();
            for (gpa, user, write) in guest {
                match self.l2 {
                    None => found.push((gpa, user, write, true, true, true)),
                    Some((_, e)) => {
                        let page = ((gpa - DATA) >> 12) as usize;
                        for &(pa, r, w, x) in &self.physical[e * GPA_PAGES + page] {
                            found.push((pa, user, write, r, w, x));
                        }
                    }
                }
            }
            self.combined[Self::slot(vpid, pcid, ept, i)].extend(found);
        }
    }

    /// Drops what is known of the linear and combined mappings that fit.
    fn cut(&mut self, vpid: Option<usize>, pcid: Option<usize>, ept: Option<usize>, address: Option<usize>) {
        for v in 0..VPIDS {
            for p in 0..PCIDS {
                for e in 0..=EPTS {
                    for i in 0..LAS {
                        let fits = |want: Option<usize>, x| want.is_none_or(|w| w == x);
                        if fits(vpid, v) && fits(pcid, p) && fits(ept, e) && fits(address, i) {
                            self.regions[Self::slot(v, p, e, 0) / LAS].clear();
                            self.combined[Self::slot(v, p, e, i)].clear();
                        }
                    }
                }
            }
        }
    }

    fn may(&self, i: usize, op: Op, who: Who, fits: impl Fn(u64) -> bool) -> bool {
        let slot = Self::slot(self.vpid(), usize::from(self.pcid()), self.ept_number(), i);
        self.combined[slot].iter().any(|&(pa, user, write, r, w, x)| {
            let page = Page { user_mode_address: user, writable: write, execute_disabled: false, key: 0 };
            let second = match op {
                Op::Read => r,
                Op::Write => w,
                Op::Fetch => x,
            };
            fits(pa) && second && model::allowed(&self.cpu(), page, op, who)
        })
    }

    fn memory(&self) -> Memory {
        self.machine.memory()
    }

    fn access(&mut self, i: usize, op: Op, user: bool) -> Result<(), TestCaseError> {
        let who = if user { Who::User } else { Who::Implicit };
        let (cpu, space) = (self.cpu(), self.space());
        let mut before = self.memory();
        let theirs = match self.ept() {
            None => model::access(&cpu, &mut before, la(i), op, who).map(|f| f.pa).map_err(two_stage::Fault::Page),
            Some(mut ept) => two_stage::access(&cpu, &mut ept, &mut before, la(i), op, who).map(|f| f.place.hpa),
        };
        match self.mmu.translate(&space, LinearAddr(la(i)), access_of(op, who)) {
            Ok(t) => {
                prop_assert!(self.may(i, op, who, |pa| pa == t.pa.0), "{op:?} at {:#x} went to {t:?}", la(i));
                self.stale_hits += u32::from(theirs != Ok(t.pa.0));
                if op == Op::Fetch {
                    let e = JumpCacheEntry { rip: la(i), flags: u64::from(user), code: t.pa.0, rip_base: la(i) };
                    self.mmu.jump_insert(LinearAddr(la(i)), e, t.global);
                }
            }
            Err(fault) => {
                let fault = fault_of(fault, la(i));
                prop_assert_eq!(Err(fault), theirs);
                if let (two_stage::Fault::Ept(two_stage::Refused::Violation { gpa, .. }), Some((vpid, e))) =
                    (fault, self.l2)
                {
                    // Row E3.
                    let pcid = usize::from(self.pcid());
                    for page in 0..GPA_PAGES {
                        if Self::gpa_of(page) == gpa & !0xfff {
                            self.physical[e * GPA_PAGES + page].clear();
                        }
                    }
                    self.cut(Some(vpid), Some(pcid), Some(e + 1), Some(i));
                }
            }
        }
        Ok(())
    }

    /// What translated code finds without asking.
    fn probes(&self) -> Result<(), TestCaseError> {
        for i in 0..LAS {
            for (mode, who) in [(MemMode::User, Who::User), (MemMode::SupervisorAc, Who::Implicit)] {
                if let Some(v) = self.mmu.load_cached(mode, LinearAddr(la(i)), 8) {
                    prop_assert!(self.may(i, Op::Read, who, |pa| pa == v), "probe at {:#x} found {v:#x}", la(i));
                    // Written back as it is, through the write tag if there is one.
                    if self.mmu.store_cached(mode, LinearAddr(la(i)), 8, v) {
                        prop_assert!(self.may(i, Op::Write, who, |pa| pa == v), "write tag at {:#x}", la(i));
                    }
                }
            }
            for (flags, who) in [(0, Who::Implicit), (1, Who::User)] {
                if let Some(e) = self.mmu.jump_get(la(i), flags) {
                    prop_assert!(self.may(i, Op::Fetch, who, |pa| pa == e.code), "jump cache at {:#x}", la(i));
                }
            }
        }
        Ok(())
    }

    fn transition(&mut self, to: Option<(usize, usize)>, space: usize) {
        // VPIDs are in use if either side of the transition says so: the VM's control.
        let vpid = if to.is_some() { to } else { self.l2 }.map_or(0, |(v, _)| v);
        let cause = if to.is_some() { FlushCause::VmEntry } else { FlushCause::VmExit };
        self.l2 = to;
        self.space = space;
        if let Some((_, e)) = to {
            self.load_eptp(e);
        }
        let new = self.space();
        let _ = self.mmu.vm_transition(&new, cause, vpid != 0);
        if vpid == 0 {
            self.cut(Some(0), None, None, None);
        }
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        let ram = self.machine.ram();
        match step {
            Step::Guest { space, other, la: i, page, flags } => {
                let table = if other { OTHER_TABLES + space as u64 * 0x1000 } else { guest_pt(space) };
                ram.store_u64(table + (la(i) >> 12 & 511) * 8, (DATA + page * 0x1000) | flags);
            }
            Step::Region { space, page } => {
                ram.store_u64(guest_pde(space), page.map_or(guest_pt(space) | 7, |flags| 0x80 | flags));
            }
            Step::Ept { ept, page, frame, rights } => {
                let at = ept_top(ept) + 0x3000 + ((DATA >> 12) + page) * 8;
                ram.store_u64(at, (FRAMES + frame * 0x1000) | 6 << 3 | rights);
            }
            Step::MoveTable { ept, space, other } => {
                let table = if other { OTHER_TABLES + space as u64 * 0x1000 } else { guest_pt(space) };
                ram.store_u64(ept_top(ept) + 0x3000 + (guest_pt(space) >> 12) * 8, table | 6 << 3 | 7);
            }
            Step::Access { la, op, user } => self.access(la, OPS[op], user)?,
            Step::Exit { space } if self.l2.is_some() => self.transition(None, space),
            Step::Enter { vpid, space, ept } => {
                if self.l2.is_some() {
                    self.transition(None, space);
                    self.look();
                }
                self.transition(Some((vpid, ept)), space);
            }
            Step::MovCr3 { space, keep } => {
                self.space = space;
                let new = self.space();
                let _ = self.mmu.mov_cr3(&new, keep);
                if !(keep && self.pcide) {
                    self.cut(Some(self.vpid()), Some(usize::from(self.pcid())), None, None);
                }
            }
            Step::Invlpg { la: i } => {
                let space = self.space();
                self.mmu.invlpg(&space, LinearAddr(la(i)));
                self.cut(Some(self.vpid()), Some(usize::from(self.pcid())), None, Some(i));
            }
            Step::Invpcid { kind, pcid, la: i } => {
                let pcid = if self.pcide { pcid } else { 0 };
                let (what, cut) = match kind {
                    0 => (Invpcid::Address { pcid, la: LinearAddr(la(i)) }, (Some(pcid), Some(i))),
                    1 => (Invpcid::Context { pcid }, (Some(pcid), None)),
                    2 => (Invpcid::AllWithGlobals, (None, None)),
                    _ => (Invpcid::All, (None, None)),
                };
                let space = self.space();
                self.mmu.invpcid(&space, what);
                self.cut(Some(self.vpid()), cut.0.map(usize::from), None, cut.1);
            }
            Step::Invvpid { kind, vpid, la: i } if self.l2.is_none() => {
                let (what, cut) = match kind {
                    0 => (Invvpid::Address { vpid, la: LinearAddr(la(i)) }, (Some(vpid), Some(i))),
                    1 => (Invvpid::Single { vpid }, (Some(vpid), None)),
                    2 => (Invvpid::All, (None, None)),
                    _ => (Invvpid::SingleRetainingGlobals { vpid }, (Some(vpid), None)),
                };
                self.mmu.invvpid(what);
                match cut.0 {
                    Some(v) => self.cut(Some(usize::from(v)), None, None, cut.1),
                    None => (1..VPIDS).for_each(|v| self.cut(Some(v), None, None, None)),
                }
            }
            Step::Invept { ept } if self.l2.is_none() => {
                self.mmu.invept(ept.map(ept_top));
                for e in 0..EPTS {
                    if ept.is_none_or(|x| x == e) {
                        self.cut(None, None, Some(e + 1), None);
                        self.physical[e * GPA_PAGES..][..GPA_PAGES].iter_mut().for_each(BTreeSet::clear);
                    }
                }
            }
            Step::SwitchEptp { ept } => {
                if let Some((vpid, _)) = self.l2 {
                    self.l2 = Some((vpid, ept));
                    self.load_eptp(ept);
                    let new = self.space();
                    let _ = self.mmu.switch_eptp(&new);
                }
            }
            Step::Flags { ept } => self.flags[ept] ^= true,
            Step::Exit { .. } | Step::Invvpid { .. } | Step::Invept { .. } => {}
        }
        self.look();
        self.probes()
    }
}

/// How many mappings were used that were not in memory any more, and how many misses the second level answered.
fn run(pcide: bool, policy: FlushPolicy, steps: &[Step]) -> Result<[u64; 3], TestCaseError> {
    let mut w = World::new(pcide, policy);
    for &s in steps {
        w.step(s)?;
    }
    let stats = w.mmu.stats();
    Ok([w.stale_hits.into(), stats.large_page_hits, stats.page_table_hits])
}

/// Rows C5, C6, D1, D2, D5, D7, E1, E2, E3, E4 with PCIDs. The cases together must have used mappings that were old and
/// still allowed, or they test nothing.
#[test]
fn c5_c6_d1_d2_d5_d7_e1_e2_e3_e4_coherent_under_tags() {
    let used = std::cell::Cell::new([0; 3]);
    proptest!(
        ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() },
        |(steps in proptest::collection::vec(step(), 1..300))| {
            let (before, now) = (used.get(), run(true, FlushPolicy::Tagged, &steps)?);
            used.set([0, 1, 2].map(|i| before[i] + now[i]));
        }
    );
    let [stale, pages, tables] = used.get();
    assert!(stale > 500, "{stale} accesses used an old mapping");
    assert!(pages > 500 && tables > 500, "{pages} misses found a large page, {tables} a page table");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    /// Row D6 too: without PCIDs everything is PCID 000H.
    #[test]
    fn d6_coherent_without_pcids(steps in proptest::collection::vec(step(), 1..300)) {
        run(false, FlushPolicy::Tagged, &steps)?;
    }

    /// The policy `full`.
    #[test]
    fn c5_e1_e2_e3_coherent_under_the_full_policy(steps in proptest::collection::vec(step(), 1..100)) {
        run(true, FlushPolicy::Full, &steps)?;
    }
}
