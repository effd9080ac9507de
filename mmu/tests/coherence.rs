//! TLB coherence (rows A8–A10, D1, D6): after any sequence of table changes, accesses and invalidations, every access gets
//! the current mapping or an old one that nothing has invalidated yet, and every fault is that of memory as it is.

mod common;
mod model;

use common::{Machine, OPS, WHO, access_of, plain, space_of};
use model::{Cpu, Memory, Mode, Op, Page, Who};
use proptest::prelude::*;
use twofold_arch::LinearAddr;
use twofold_arch::tbflags::MemMode;
use twofold_mmu::{AddressSpace, Fault, FlushPolicy, Invpcid, JumpCacheEntry, Mmu};

const SPACES: usize = 3;
/// Physical pages: each space has four table pages from here (PML4, PDPT, PD, PT), then two more for its 2 MiB region.
const TABLES: u64 = 0x10_000;
/// The kernel's PDPT, PD, PT and the PT of its 2 MiB region, shared by all spaces.
const KERNEL: u64 = 0x30_000;
/// Frames to map.
const FRAMES: u64 = 0x40_000;

const USER: u64 = 0x40_0000;
const USER_LARGE: u64 = 0x80_0000;
const SUPER: u64 = 0xffff_ffff_8000_0000;
const SUPER_LARGE: u64 = 0xffff_ffff_8020_0000;

/// The linear addresses that are used. Several share a TLB index, and 2 MiB regions are looked at in several places.
const LAS: [u64; 14] = [
    USER,
    USER + 0x1000,
    USER + 0x2008,
    USER + 0x1f_f000,
    USER_LARGE,
    USER_LARGE + 0x1000,
    USER_LARGE + 0x1f_f010,
    SUPER,
    SUPER + 0x1000,
    SUPER + 0x2ff8,
    SUPER + 0x1f_f000,
    SUPER_LARGE,
    SUPER_LARGE + 0x1000,
    SUPER_LARGE + 0x1f_f000,
];

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Write the page-table entry of `LAS[la]` in a space (the kernel's are everybody's).
    Map {
        space: usize,
        la: usize,
        frame: u64,
        flags: u64,
    },
    /// Write the PDE of the 2 MiB region of `LAS[la]`: a table, a large page, or nothing.
    Region {
        space: usize,
        la: usize,
        kind: u64,
        flags: u64,
    },
    Access {
        la: usize,
        op: usize,
        who: usize,
    },
    /// The same everywhere: what one walk found out helps the next.
    Sweep {
        op: usize,
        who: usize,
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
        space: usize,
        la: usize,
    },
    Toggle {
        bit: u8,
    },
    Pkru {
        value: u32,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let flags = (0..64u64).prop_map(|b| {
        // P mostly; RW, US, G, A, D, a key of 0 or 1, NX sometimes.
        u64::from(b & 7 != 0)
            | (b & 1) << 1
            | (b >> 1 & 1) << 2
            | (b >> 2 & 1) << 8
            | (b >> 3 & 1) << 6
            | u64::from(b >> 1 & 3 != 0) << 5
            | (b >> 4 & 1) << 59
            | u64::from(b >> 3 == 7) << 63
    });
    let la = 0..LAS.len();
    prop_oneof![
        5 => (0..SPACES, la.clone(), 0..8u64, flags.clone())
            .prop_map(|(space, la, frame, flags)| Step::Map { space, la, frame, flags }),
        1 => (0..SPACES, la.clone(), 0..4u64, flags)
            .prop_map(|(space, la, kind, flags)| Step::Region { space, la, kind, flags }),
        12 => (la.clone(), 0..OPS.len(), 0..WHO.len()).prop_map(|(la, op, who)| Step::Access { la, op, who }),
        4 => (0..OPS.len(), 0..WHO.len()).prop_map(|(op, who)| Step::Sweep { op, who }),
        3 => (0..SPACES, any::<bool>()).prop_map(|(space, keep)| Step::MovCr3 { space, keep }),
        2 => la.clone().prop_map(|la| Step::Invlpg { la }),
        2 => (0..4u8, 0..SPACES, la).prop_map(|(kind, space, la)| Step::Invpcid { kind, space, la }),
        1 => (0..4u8).prop_map(|bit| Step::Toggle { bit }),
        1 => (0..16u32).prop_map(|value| Step::Pkru { value }),
    ]
}

/// What a linear address was mapped to, and until when.
#[derive(Clone, Copy)]
struct Past {
    mapped: Option<(Page, u64, bool)>,
    /// `u64::MAX`: it still is.
    until: u64,
}

struct World {
    machine: Machine,
    mmu: Mmu,
    cpu: Cpu,
    pcide: bool,
    current: usize,
    time: u64,
    history: Vec<Vec<Past>>,
    /// The same by way of a page table that the region's PDE does not point to any more, but that may still be cached.
    by_table: Vec<Vec<Past>>,
    /// Whether it may.
    table_cached: Vec<bool>,
    /// When non-global translations of (space, address) were last invalidated, and global ones of the address.
    cut_local: Vec<u64>,
    cut_global: Vec<u64>,
}

fn same(a: Option<(Page, u64, bool)>, b: Option<(Page, u64, bool)>) -> bool {
    let key = |x: Option<(Page, u64, bool)>| {
        x.map(|(p, pa, g)| (p.user_mode_address, p.writable, p.execute_disabled, p.key, pa, g))
    };
    key(a) == key(b)
}

fn note(history: &mut Vec<Past>, now: Option<(Page, u64, bool)>, time: u64) {
    match history.last_mut() {
        Some(last) if same(last.mapped, now) => return,
        Some(last) => last.until = time,
        None => {}
    }
    history.push(Past { mapped: now, until: u64::MAX });
}

/// For an address in a region that may be a large page: where its PDE is, and the page table that it points to otherwise.
fn region(space: usize, la: u64) -> Option<(u64, u64)> {
    match (la >= SUPER, la >> 21 & 7) {
        (true, 0) | (false, 2) => None,
        (true, _) => Some((KERNEL + 0x1008, KERNEL + 0x3000)),
        (false, _) => Some((tables_of(space) + 0x2020, tables_of(space) + 0x4000)),
    }
}

fn tables_of(space: usize) -> u64 {
    TABLES + space as u64 * 0x6000
}

impl World {
    fn new(pcide: bool, policy: FlushPolicy) -> Self {
        let machine = Machine::new();
        let ram = machine.ram();
        for s in 0..SPACES {
            let t = tables_of(s);
            for l in 0..3 {
                ram.store_u64(t + l * 0x1000, (t + (l + 1) * 0x1000) | 7);
            }
            // PML4[511] is the kernel's; PD[2] the user's table, PD[0] too, which no address uses.
            ram.store_u64(t + 511 * 8, KERNEL | 7);
            ram.store_u64(t + 0x2000 + 2 * 8, (t + 0x3000) | 7);
            ram.store_u64(t + 0x2000 + 4 * 8, (t + 0x4000) | 7);
        }
        ram.store_u64(KERNEL + 510 * 8, (KERNEL + 0x1000) | 7);
        ram.store_u64(KERNEL + 0x1000, (KERNEL + 0x2000) | 7);
        ram.store_u64(KERNEL + 0x1008, (KERNEL + 0x3000) | 7);
        for f in 0..8 {
            for at in (0..0x1000).step_by(8) {
                ram.store_u64(FRAMES + f * 0x1000 + at, 0xf00d_0000 + f);
            }
        }
        let cpu = Cpu { cr3: tables_of(0), pke: true, ..plain(Mode::Four) };
        let mmu = machine.mmu(policy);
        let n = SPACES * LAS.len();
        let mut w = Self {
            machine,
            mmu,
            cpu,
            pcide,
            current: 0,
            time: 1,
            history: (0..n).map(|_| Vec::new()).collect(),
            by_table: (0..n).map(|_| Vec::new()).collect(),
            table_cached: vec![false; n],
            cut_local: vec![0; n],
            cut_global: vec![0; LAS.len()],
        };
        let space = w.space(0);
        let _ = w.mmu.reset(&space);
        w.look();
        w
    }

    fn space(&self, s: usize) -> AddressSpace {
        let cpu = Cpu { cr3: tables_of(s), ..self.cpu };
        let pcid = if self.pcide { s as u16 + 1 } else { 0 };
        AddressSpace { pcide: self.pcide, pcid, ..space_of(&cpu) }
    }

    fn memory(&self) -> Memory {
        self.machine.memory()
    }

    /// Notes what every address is mapped to now, and what it would be by a cached page table.
    fn look(&mut self) {
        let m = self.memory();
        let mut tables = self.memory();
        for (pde, table) in (0..SPACES).flat_map(|s| [region(s, USER_LARGE), region(s, SUPER_LARGE)]).flatten() {
            tables.write(pde, 8, table | 7);
        }
        for s in 0..SPACES {
            let cpu = Cpu { cr3: tables_of(s), ..self.cpu };
            for (i, &la) in LAS.iter().enumerate() {
                let n = s * LAS.len() + i;
                note(&mut self.history[n], model::peek(&cpu, &m, la), self.time);
                let Some((pde, _)) = region(s, la) else { continue };
                let is_table = m.read(pde, 8) & 0x80 == 0;
                self.table_cached[n] |= is_table;
                let now = if self.table_cached[n] && !is_table { model::peek(&cpu, &tables, la) } else { None };
                note(&mut self.by_table[n], now, self.time);
            }
        }
    }

    /// Everything that an access to `LAS[la]` may find mapped.
    fn possible(&self, la: usize) -> Vec<(Page, u64, bool)> {
        let mut all = Vec::new();
        for s in 0..SPACES {
            let n = s * LAS.len() + la;
            for p in self.history[n].iter().chain(&self.by_table[n]) {
                let Some(m) = p.mapped else { continue };
                let alive = if m.2 {
                    p.until > self.cut_global[la]
                } else {
                    s == self.current && p.until > self.cut_local[s * LAS.len() + la]
                };
                // Another space's global mapping counts only once cached; one that is in memory there may be cached.
                if alive {
                    all.push(m);
                }
            }
        }
        all
    }

    fn cut(&mut self, space: Option<usize>, la: Option<usize>, globals: bool) {
        for s in 0..SPACES {
            if space.is_some_and(|x| x != s) {
                continue;
            }
            for (i, &at) in LAS.iter().enumerate() {
                if la.is_none_or(|x| self.same_page(x, i)) {
                    self.cut_local[s * LAS.len() + i] = self.time;
                }
                // INVLPG drops all paging structures that are cached, INVPCID of an address only those that it needs.
                if globals || la.is_none_or(|x| LAS[x] >> 21 == at >> 21) {
                    self.table_cached[s * LAS.len() + i] = false;
                }
            }
        }
        if globals {
            for i in 0..LAS.len() {
                if la.is_none_or(|x| self.same_page(x, i)) {
                    self.cut_global[i] = self.time;
                }
            }
        }
    }

    /// Whether INVLPG of one address must drop the other: only if they are the same page for sure.
    fn same_page(&self, a: usize, b: usize) -> bool {
        if LAS[a] >> 12 == LAS[b] >> 12 {
            return true;
        }
        // In a 2 MiB region that has been a large page all the time since either was invalidated, yes; the histories of
        // such pages are cut together.
        let large = |i: usize| {
            (0..SPACES).all(|s| {
                let h = &self.history[s * LAS.len() + i];
                h.iter().all(|p| p.mapped.is_none_or(|m| m.1 & 0x1f_ffff == LAS[i] & 0x1f_ffff))
            })
        };
        LAS[a] >> 21 == LAS[b] >> 21 && large(a) && large(b)
    }

    fn check_access(&mut self, la: usize, op: Op, who: Who) -> Result<(), TestCaseError> {
        let space = self.space(self.current);
        let cpu = Cpu { cr3: tables_of(self.current), ..self.cpu };
        let possible = self.possible(la);
        let mut before = self.memory();
        let walks = self.mmu.stats().walks;
        let r = self.mmu.translate(&space, LinearAddr(LAS[la]), access_of(op, who));
        match r {
            Ok(t) => {
                let fits = |m: &&(Page, u64, bool)| m.1 == t.pa.0 && model::allowed(&cpu, m.0, op, who);
                prop_assert!(possible.iter().any(|m| fits(&m)), "{:#x} {op:?} {who:?} went to {t:?}", LAS[la]);
                if self.mmu.stats().walks != walks {
                    // A walk: of memory as it is, with the flags set there.
                    let theirs = model::access(&cpu, &mut before, LAS[la], op, who);
                    prop_assert_eq!(theirs.map(|f| f.pa), Ok(t.pa.0));
                    prop_assert!(self.memory() == before, "flags of {op:?} {who:?} at {:#x}", LAS[la]);
                }
                if op == Op::Fetch {
                    let flags = u64::from(who == Who::User);
                    let e = JumpCacheEntry { rip: LAS[la], flags, code: t.pa.0, rip_base: LAS[la] & !0xfff };
                    self.mmu.jump_insert(LinearAddr(LAS[la]), e, t.global);
                }
            }
            Err(Fault::Page { error, la: at }) => {
                prop_assert_eq!(at.0, LAS[la]);
                prop_assert_eq!(Err(error), model::access(&cpu, &mut before, LAS[la], op, who));
            }
            Err(other) => prop_assert!(false, "{other:?}"),
        }
        Ok(())
    }

    /// What translated code would find without asking: every table and the jump cache, at every address.
    fn check_probes(&self) -> Result<(), TestCaseError> {
        let cpu = Cpu { cr3: tables_of(self.current), ..self.cpu };
        for (i, &la) in LAS.iter().enumerate() {
            let possible = self.possible(i);
            let may = |op, who, f: &dyn Fn(u64) -> bool| {
                possible.iter().any(|m| f(m.1) && model::allowed(&cpu, m.0, op, who))
            };
            let modes = [
                (MemMode::User, Who::User),
                (MemMode::SupervisorAc, Who::Explicit { ac: true }),
                (MemMode::Supervisor, Who::Explicit { ac: false }),
            ];
            for (mode, who) in modes {
                if let Some(v) = self.mmu.load_cached(mode, LinearAddr(la), 4) {
                    let holds = |pa| self.machine.ram().load_u32(pa).map(u64::from) == Some(v);
                    prop_assert!(may(Op::Read, who, &holds), "probe for reading at {la:#x} as {who:?}");
                }
            }
            for (flags, who) in [(0, Who::Implicit), (1, Who::User)] {
                if let Some(e) = self.mmu.jump_get(la, flags) {
                    prop_assert!(may(Op::Fetch, who, &|pa| pa == e.code), "jump cache at {la:#x} as {who:?}");
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        self.time += 1;
        match step {
            Step::Map { space, la, frame, flags } => {
                let index = LAS[la] >> 12 & 511;
                let table = match (LAS[la] >= SUPER, LAS[la] >> 21 & 7) {
                    (true, 0) => KERNEL + 0x2000,
                    (true, _) => KERNEL + 0x3000,
                    (false, 2) => tables_of(space) + 0x3000,
                    (false, _) => tables_of(space) + 0x4000,
                };
                self.machine.ram().store_u64(table + index * 8, (FRAMES + frame * 0x1000) | flags);
                self.look();
            }
            Step::Region { space, la, kind, flags } => {
                let Some((pde, table)) = region(space, LAS[la]) else { return Ok(()) };
                let value = if kind == 0 { table | 7 } else { (kind - 1) << 21 | 0x80 | flags };
                self.machine.ram().store_u64(pde, value);
                self.look();
            }
            Step::Access { la, op, who } => self.check_access(la, OPS[op], WHO[who])?,
            Step::Sweep { op, who } => {
                for la in 0..LAS.len() {
                    self.check_access(la, OPS[op], WHO[who])?;
                }
            }
            Step::MovCr3 { space, keep } => {
                let new = self.space(space);
                let _ = self.mmu.mov_cr3(&new, keep);
                self.current = space;
                if !(keep && self.pcide) {
                    // Without PCIDs all spaces are PCID 0.
                    let of = if self.pcide { Some(space) } else { None };
                    self.cut(of, None, false);
                    self.look();
                }
            }
            Step::Invlpg { la } => {
                let space = self.space(self.current);
                self.mmu.invlpg(&space, LinearAddr(LAS[la]));
                let of = if self.pcide { Some(self.current) } else { None };
                self.cut(of, Some(la), true);
                self.look();
            }
            Step::Invpcid { kind, space, la } => {
                let now = self.space(self.current);
                let pcid = self.space(space).pcid;
                let of = if self.pcide { Some(space) } else { None };
                let (what, cut) = match kind {
                    0 => (Invpcid::Address { pcid, la: LinearAddr(LAS[la]) }, (of, Some(la), false)),
                    1 => (Invpcid::Context { pcid }, (of, None, false)),
                    2 => (Invpcid::AllWithGlobals, (None, None, true)),
                    _ => (Invpcid::All, (None, None, false)),
                };
                self.mmu.invpcid(&now, what);
                self.cut(cut.0, cut.1, cut.2);
                self.look();
            }
            Step::Toggle { bit } => {
                let old = self.space(self.current);
                match bit {
                    0 => self.cpu.pge ^= true,
                    1 => self.cpu.smep ^= true,
                    2 => self.cpu.smap ^= true,
                    _ => self.cpu.wp ^= true,
                }
                let new = self.space(self.current);
                let _ = self.mmu.controls_changed(&old, &new);
                if bit == 0 {
                    self.look();
                    self.cut(None, None, true);
                    self.look();
                }
            }
            Step::Pkru { value } => {
                self.cpu.pkru = value;
                let new = self.space(self.current);
                self.mmu.set_pkru(&new);
            }
        }
        self.check_probes()
    }
}

/// How often the second level answered: large pages and page tables.
fn run(pcide: bool, policy: FlushPolicy, steps: &[Step]) -> Result<(u64, u64), TestCaseError> {
    let mut w = World::new(pcide, policy);
    for &s in steps {
        w.step(s)?;
    }
    Ok((w.mmu.stats().large_page_hits, w.mmu.stats().page_table_hits))
}

/// Rows A8, A9, A10 with CR4.PCIDE = 1. The cases together must have used the second level, or they do not test that.
#[test]
fn a8_a9_a10_coherent_with_pcids() {
    let (pages, tables) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    proptest!(
        ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() },
        |(steps in proptest::collection::vec(step(), 1..150))| {
            let used = run(true, FlushPolicy::Tagged, &steps)?;
            pages.set(pages.get() + used.0);
            tables.set(tables.get() + used.1);
        }
    );
    assert!(pages.get() > 20 && tables.get() > 1000, "{} large pages, {} page tables", pages.get(), tables.get());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rows A8, A9, A10 and D6: with CR4.PCIDE = 0 everything is PCID 000H.
    #[test]
    fn a8_a9_a10_d6_coherent_without_pcids(steps in proptest::collection::vec(step(), 1..150)) {
        run(false, FlushPolicy::Tagged, &steps)?;
    }

    /// The policy `full` is coherent too.
    #[test]
    fn a10_coherent_under_the_full_policy(steps in proptest::collection::vec(step(), 1..80)) {
        run(true, FlushPolicy::Full, &steps)?;
    }
}
