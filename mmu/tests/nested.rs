//! Nested walks against the slow two-stage model, on generated guest tables and EPT (rows C2, D2–D4, F1–F7, F11, F12).

mod common;
mod model;

use common::{Machine, OPS, RAM, WHO, access_of, fault_of, plain, pml_of, space_under};
use model::two_stage::{self, Ept};
use model::{Cpu, Memory, Mode, Op, Who};
use proptest::prelude::*;
use twofold_arch::{GuestPhysAddr, LinearAddr};
use twofold_mmu::{Fault, FlushPolicy, PdpteError};

/// Pages 1 to 5 are EPT tables, topmost first; page 6 is the page-modification log.
const EPT_TOP: u64 = 1;
const LOG: u64 = 6 << 12;
/// From here on, guest-physical pages and the pages they are put on.
const FIRST: u64 = 8;
const PAGES: u64 = RAM >> 12;

/// An entry of a guest table: the flags mostly sensible, the address mostly that of another table.
fn guest_entry() -> impl Strategy<Value = u64> {
    let flag = |likely: u32, bit: u32| (0..100u32).prop_map(move |x| u64::from(x < likely) << bit);
    let flags =
        (flag(97, 0), flag(80, 1), flag(80, 2), flag(30, 3), flag(30, 4), flag(50, 5), flag(50, 6), flag(15, 7));
    let more = (flag(50, 8), flag(10, 63), (0..16u64).prop_map(|k| if k < 8 { 0 } else { (k & 3) << 59 }));
    let odd = prop_oneof![20 => Just(0u64), 3 => (0..64u32).prop_map(|b| 1 << b), 1 => any::<u64>()];
    (flags, more, odd, FIRST..PAGES, 0..100u32).prop_map(|(f, g, odd, page, align)| {
        let flags = f.0 | f.1 | f.2 | f.3 | f.4 | f.5 | f.6 | f.7 | g.0 | g.1 | g.2;
        let address = if flags & 1 << 7 != 0 && align < 70 { 0 } else { page << 12 };
        let e = (flags | address) ^ odd;
        // Never the EPT tables themselves: the model and the crate need not agree on walks that change their own way.
        if e & 0x000f_ffff_ffff_f000 < FIRST << 12 && e & 1 << 7 == 0 { e | FIRST << 12 } else { e }
    })
}

/// `entry` with the bits in `twist` changed, unless that makes it name one of EPT's tables or the log: a walk that writes
/// to what EPT is made of changes its own way, and then what is cached and what a walk finds may differ.
fn twisted(entry: u64, twist: u64) -> u64 {
    let address = 0x000f_ffff_ffff_f000;
    if (entry ^ twist) & address < RAM && twist & address != 0 { entry } else { entry ^ twist }
}

/// What is wrong with an EPT entry, now and then.
fn ept_twist() -> impl Strategy<Value = u64> {
    prop_oneof![
        60 => Just(0u64),
        2 => (0..3u32).prop_map(|b| 1 << b),
        1 => Just(7u64),
        2 => (3..8u32).prop_map(|b| 1 << b),
        1 => (12..64u32).prop_map(|b| 1 << b),
        1 => Just(1 << 63 | 7),
        1 => Just(1 << 10),
    ]
}

#[derive(Clone, Debug)]
struct Tables {
    ept: Ept,
    memory: Memory,
}

fn ept() -> impl Strategy<Value = (Ept, u32)> {
    let width = prop_oneof![Just(32u32), Just(36), Just(39), Just(46), Just(48), Just(52)];
    let log = prop_oneof![3 => Just(None), 2 => Just(Some(511u16)), 1 => (0..3u16).prop_map(Some), 1 => Just(Some(512)), 1 => Just(Some(0xffff))];
    (any::<[bool; 4]>(), width, log, 0..100u32).prop_map(|(b, maxphyaddr, log, large)| {
        let ept = Ept {
            eptp: EPT_TOP << 12 | if b[0] { 4 << 3 } else { 3 << 3 } | u64::from(b[1]) << 6 | 6,
            mode_based: b[2],
            execute_only: b[3],
            maxphyaddr,
            pml: log.map(|index| (LOG, index)),
        };
        (ept, large)
    })
}

/// Guest-physical memory of guest tables everywhere, scattered by EPT.
fn tables(mode: Mode) -> impl Strategy<Value = Tables> {
    let width = if mode == Mode::ThirtyTwo { 4 } else { 8 };
    let pages = proptest::collection::vec(proptest::collection::vec(guest_entry(), 3), (PAGES - FIRST) as usize);
    let order = Just((FIRST..PAGES).collect::<Vec<_>>()).prop_shuffle();
    let leaves = proptest::collection::vec((0..32u64, ept_twist(), 0..4u64), PAGES as usize);
    let uppers = proptest::collection::vec((0..64u64, ept_twist()), 5);
    (ept(), pages, order, leaves, uppers).prop_map(move |((ept, large), pages, order, leaves, uppers)| {
        let mut m = Memory(vec![0; RAM as usize]);
        for (p, entries) in pages.iter().enumerate() {
            let base = (FIRST + p as u64) << 12;
            for i in 0..4096 / width {
                m.write(base + i * width, width, entries[(i as usize + p) % 3]);
            }
        }
        let levels: u64 = if ept.eptp >> 3 & 7 == 4 { 5 } else { 4 };
        // Rights mostly all, A and D by chance, memory type WB or UC.
        let rights = |x: u64| {
            let missing = match x & 15 {
                0 => 2,
                1 => 4,
                2 => 6,
                3 => 1 << 10,
                4 => 3,
                _ => 0,
            };
            (7 | 1 << 10) & !missing
        };
        for (i, &(x, twist)) in uppers.iter().take(levels as usize - 1).enumerate() {
            let at = (EPT_TOP + i as u64) << 12;
            let level = levels - i as u64;
            let e = if (level == 2 && large < 20) || (level == 3 && large < 6) {
                1 << 7 | 6 << 3 | (x >> 4 & 1) << 9
            } else {
                (EPT_TOP + i as u64 + 1) << 12
            };
            let rights = if x & 3 == 0 { rights(x >> 2) } else { 7 | 1 << 10 };
            m.write(at, 8, twisted(e | rights | (x >> 5) << 8, twist));
        }
        let leaf_table = (EPT_TOP + levels - 1) << 12;
        for (g, &(x, twist, kind)) in leaves.iter().enumerate() {
            let hpa = order.get(g.wrapping_sub(FIRST as usize)).copied().unwrap_or(FIRST);
            let memory_type = [6, 6, 0, 4][kind as usize] << 3 | (kind & 1) << 6;
            let flags = (x >> 4) << 8 | (kind >> 1) << 9;
            m.write(leaf_table + 8 * g as u64, 8, twisted(hpa << 12 | rights(x) | memory_type | flags, twist));
        }
        Tables { ept, memory: m }
    })
}

fn cpu(mode: Mode) -> impl Strategy<Value = Cpu> {
    (proptest::array::uniform8(any::<bool>()), FIRST..PAGES, 0..64u32, 0..64u32).prop_map(
        move |(f, table, pkru, pkrs)| Cpu {
            wp: f[0],
            // Without it a directory entry for a large page would name a table, which could be one of EPT's.
            pse: f[1] || mode == Mode::ThirtyTwo,
            pge: f[2],
            smep: f[3],
            smap: f[4],
            pke: f[5],
            pks: f[6],
            nxe: f[7],
            pkru,
            pkrs,
            cr3: table << 12,
            pdptes: [0, 1, 2, 3].map(|i| (FIRST + (table + i * 29) % (PAGES - FIRST)) << 12 | u64::from(i != 3)),
            ..plain(mode)
        },
    )
}

#[derive(Clone, Copy, Debug)]
struct Try {
    la: u64,
    op: Op,
    who: Who,
}

fn tries(mode: Mode) -> impl Strategy<Value = Vec<Try>> {
    let index = prop_oneof![4 => Just(0u64), 2 => 0..3u64, 1 => 0..512u64];
    let la = (index.clone(), index.clone(), index.clone(), index.clone(), index, FIRST..PAGES, 0..4096u64).prop_map(
        move |i| {
            let raw = i.0 << 48 | i.1 << 39 | i.2 << 30 | i.3 << 21 | i.4 << 12 | i.6;
            match mode {
                // Mostly what there is.
                Mode::None => raw & 0xffe0_0000 & (i.5 << 29) | i.5 << 12 | i.6,
                Mode::Five => ((raw << 7) as i64 >> 7) as u64,
                Mode::Four => ((raw << 16) as i64 >> 16) as u64,
                _ => raw & 0xffff_ffff,
            }
        },
    );
    let one = (la, 0..OPS.len(), 0..WHO.len()).prop_map(|(la, op, who)| Try { la, op: OPS[op], who: WHO[who] });
    proptest::collection::vec(one, 1..32)
}

/// Every access walks, with no guest-physical mapping cached: the same place, the same fault with qualification and address, the
/// same flags in both stages, the same log.
fn compare(cpu: &Cpu, tables: &Tables, tries: &[Try], outcomes: &mut [u32; 5]) -> Result<(), TestCaseError> {
    let machine = Machine::new();
    machine.set_memory(&tables.memory);
    let mut expected = tables.memory.clone();
    let mut ept = tables.ept;
    let cpu = Cpu { maxphyaddr: ept.maxphyaddr, ..*cpu };
    let space = space_under(&cpu, &ept);
    let mut mmu = machine.mmu(FlushPolicy::Tagged);
    mmu.set_walk_caching(false);
    mmu.set_pml(pml_of(&ept));
    let _ = mmu.reset(&space);
    for t in tries {
        let theirs = two_stage::access(&cpu, &mut ept, &mut expected, t.la, t.op, t.who);
        let ours = mmu.fill(&space, LinearAddr(t.la), access_of(t.op, t.who));
        match (ours, theirs) {
            (Ok(m), Ok(f)) => {
                outcomes[0] += 1;
                prop_assert_eq!(m.pa.0, f.place.hpa, "{:?}", t);
            }
            (Err(fault), Err(theirs)) => {
                prop_assert_eq!(fault_of(fault, t.la), theirs, "{:?}", t);
                outcomes[match theirs {
                    two_stage::Fault::Page(_) => 1,
                    two_stage::Fault::Ept(two_stage::Refused::Violation { .. }) => 2,
                    two_stage::Fault::Ept(two_stage::Refused::Misconfiguration { .. }) => 3,
                    two_stage::Fault::Ept(two_stage::Refused::LogFull { .. }) => 4,
                }] += 1;
            }
            (ours, theirs) => prop_assert!(false, "{t:?}: ours {ours:?}, the model's {theirs:?}"),
        }
        prop_assert_eq!(mmu.pml(), pml_of(&ept));
    }
    prop_assert!(machine.memory() == expected, "memory differs");
    Ok(())
}

/// As [`compare`], with every cache: where nobody changes the tables, hits answer what walks would.
fn compare_cached(cpu: &Cpu, tables: &Tables, tries: &[Try]) -> Result<(), TestCaseError> {
    let machine = Machine::new();
    machine.set_memory(&tables.memory);
    let mut expected = tables.memory.clone();
    let mut ept = tables.ept;
    let cpu = Cpu { maxphyaddr: ept.maxphyaddr, ..*cpu };
    let space = space_under(&cpu, &ept);
    let mut mmu = machine.mmu(FlushPolicy::Tagged);
    mmu.set_pml(pml_of(&ept));
    let _ = mmu.reset(&space);
    for t in tries.iter().chain(tries).chain(tries) {
        let theirs = two_stage::access(&cpu, &mut ept, &mut expected, t.la, t.op, t.who);
        match (mmu.translate(&space, LinearAddr(t.la), access_of(t.op, t.who)), theirs) {
            (Ok(m), Ok(f)) => prop_assert_eq!(m.pa.0, f.place.hpa, "{:?}", t),
            (Err(fault), Err(theirs)) => prop_assert_eq!(fault_of(fault, t.la), theirs, "{:?}", t),
            (ours, theirs) => prop_assert!(false, "{t:?}: ours {ours:?}, the model's {theirs:?}"),
        }
        prop_assert_eq!(mmu.pml(), pml_of(&ept));
    }
    prop_assert!(machine.memory() == expected, "memory differs");
    Ok(())
}

macro_rules! against_the_model {
    ($($name:ident, $cached:ident: $mode:expr;)*) => {
        $(
            #[test]
            fn $name() {
                let outcomes = std::cell::RefCell::new([0u32; 5]);
                proptest!(
                    ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() },
                    |(cpu in cpu($mode), tables in tables($mode), tries in tries($mode))| {
                        compare(&cpu, &tables, &tries, &mut outcomes.borrow_mut())?;
                    }
                );
                let [found, page, violation, misconfiguration, full] = *outcomes.borrow();
                assert!(found > 40 && violation > 100 && misconfiguration > 30, "{:?}", outcomes.borrow());
                assert!(full > 10 && (page > 100 || $mode == Mode::None), "{:?}", outcomes.borrow());
            }
        )*
        proptest! {
            #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $cached(cpu in cpu($mode), tables in tables($mode), tries in tries($mode)) {
                    compare_cached(&cpu, &tables, &tries)?;
                }
            )*
        }
    };
}

against_the_model! {
    // Rows D3, F2–F7: no paging under EPT.
    d3_f2_f3_f6_f7_unpaged_walks_are_the_models, d3_unpaged_hits_are_the_models: Mode::None;
    // Rows D4, F1–F7.
    f1_f2_f3_f6_f7_32bit_walks_are_the_models, f1_32bit_hits_are_the_models: Mode::ThirtyTwo;
    f1_f2_f3_f6_f7_pae_walks_are_the_models, f1_pae_hits_are_the_models: Mode::Pae;
    f1_f2_f3_f6_f7_4level_walks_are_the_models, f1_4level_hits_are_the_models: Mode::Four;
    f1_f2_f3_f6_f7_5level_walks_are_the_models, f1_5level_hits_are_the_models: Mode::Five;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Row F12: PDPTE loads through EPT, faults and flags included.
    #[test]
    fn f12_pdpte_loads_are_the_models(tables in tables(Mode::Pae), cr3s in proptest::collection::vec((FIRST..PAGES, 0..128u64), 1..8)) {
        let machine = Machine::new();
        machine.set_memory(&tables.memory);
        let mut expected = tables.memory.clone();
        let mut ept = tables.ept;
        let space = space_under(&Cpu { maxphyaddr: ept.maxphyaddr, ..plain(Mode::Pae) }, &ept);
        let mut mmu = machine.mmu(FlushPolicy::Tagged);
        mmu.set_pml(pml_of(&ept));
        for (page, i) in cr3s {
            let cr3 = page << 12 | i << 5;
            let theirs = two_stage::load_pdptes(&mut ept, &mut expected, cr3);
            match (mmu.load_pdptes(&space, cr3), theirs) {
                (Ok(a), Ok(Some(b))) => prop_assert_eq!(a, b),
                (Err(PdpteError::Reserved { .. }), Ok(None)) => {}
                (Err(PdpteError::Ept(f)), Err(e)) => {
                    prop_assert_eq!(fault_of(Fault::Ept(f), 0), two_stage::Fault::Ept(e));
                    prop_assert_eq!(f.la, None);
                }
                (a, b) => prop_assert!(false, "ours {a:?}, the model's {b:?}"),
            }
        }
        prop_assert!(machine.memory() == expected);
    }

    /// Guest-physical accesses for no linear address.
    #[test]
    fn f2_guest_physical_accesses_are_the_models(tables in tables(Mode::Four), tries in proptest::collection::vec((FIRST..PAGES, 0..4096u64, 0..OPS.len()), 1..12)) {
        let machine = Machine::new();
        machine.set_memory(&tables.memory);
        let mut expected = tables.memory.clone();
        let mut ept = tables.ept;
        let space = space_under(&Cpu { maxphyaddr: ept.maxphyaddr, ..plain(Mode::Four) }, &ept);
        let mut mmu = machine.mmu(FlushPolicy::Tagged);
        mmu.set_pml(pml_of(&ept));
        for (page, offset, op) in tries {
            let op = OPS[op];
            let want = two_stage::Request {
                read: op == Op::Read,
                write: op == Op::Write,
                fetch: (op == Op::Fetch).then_some(true),
                ..two_stage::Request::default()
            };
            let gpa = page << 12 | offset;
            let theirs = two_stage::access_gpa(&mut ept, &mut expected, gpa, want).map(|p| p.hpa);
            let ours = mmu.guest_phys(&space, GuestPhysAddr(gpa), access_of(op, Who::User).kind).map(|p| p.0);
            prop_assert_eq!(ours.map_err(|f| fault_of(Fault::Ept(f), 0)), theirs.map_err(two_stage::Fault::Ept));
        }
        prop_assert!(machine.memory() == expected);
    }
}
