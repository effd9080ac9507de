//! Walks against the slow model, on generated page tables and by row of the paging rules (A1–A7, A11).

mod common;
mod model;

use common::{Machine, OPS, RAM, WHO, access_of, plain, space_of};
use model::{Cpu, Memory, Mode, Op, Who};
use proptest::prelude::*;
use twofold_arch::{GuestPhysAddr, LinearAddr, PhysAddr};
use twofold_mmu::walk::WalkCounts;
use twofold_mmu::{Direct, Fault, FlushPolicy, PdpteError, load_pdptes, walk};

/// The first table page of the generated structures; earlier pages stay zero.
const FIRST_TABLE: u64 = 1;
const TABLES: u64 = 50;

/// An entry: the flags mostly sensible, the address mostly a table in RAM.
fn entry() -> impl Strategy<Value = u64> {
    let flag = |likely: u32, bit: u32| (0..100u32).prop_map(move |x| u64::from(x < likely) << bit);
    let flags = (
        flag(96, 0),
        flag(70, 1),
        flag(70, 2),
        flag(30, 3),
        flag(30, 4),
        flag(50, 5),
        flag(50, 6),
        flag(25, 7),
        flag(50, 8),
        flag(15, 63),
    )
        .prop_map(|f| f.0 | f.1 | f.2 | f.3 | f.4 | f.5 | f.6 | f.7 | f.8 | f.9);
    let key = prop_oneof![4 => Just(0u64), 3 => (0..4u64).prop_map(|k| k << 59), 1 => (0..16u64).prop_map(|k| k << 59)];
    // PAE reserves bits 62:52, so keys there are an accident worth having only now and then.
    let odd = prop_oneof![12 => Just(0u64), 3 => (0..64u32).prop_map(|b| 1 << b), 1 => any::<u64>()];
    let page = FIRST_TABLE..FIRST_TABLE + TABLES;
    (flags, key, odd, page, 0..100u32).prop_map(|(flags, key, odd, page, align)| {
        let address = if flags & 1 << 7 != 0 && align < 70 { 0 } else { page << 12 };
        (flags | key | address) ^ odd
    })
}

fn cpu(mode: Mode) -> impl Strategy<Value = Cpu> {
    let flags = proptest::array::uniform9(any::<bool>());
    let table = FIRST_TABLE..FIRST_TABLE + TABLES;
    let width = prop_oneof![Just(32u32), Just(36), Just(39), Just(40), Just(46), Just(48), Just(52)];
    (flags, table, width, any::<u32>(), any::<u32>(), any::<bool>()).prop_map(
        move |(f, table, maxphyaddr, a, b, few)| {
            let (pkru, pkrs) = if few { (a & 0x30, b & 0xc3) } else { (a, b) };
            Cpu {
                wp: f[0],
                pse: f[1],
                pge: f[2],
                smep: f[3],
                smap: f[4],
                pke: f[5],
                pks: f[6],
                nxe: f[7],
                page1gb: f[8],
                maxphyaddr,
                pkru,
                pkrs,
                cr3: table << 12,
                ..plain(mode)
            }
        },
    )
}

/// An access, its linear address drawn from few so that structures are shared.
#[derive(Clone, Copy, Debug)]
struct Try {
    la: u64,
    op: Op,
    who: Who,
}

fn tries(mode: Mode) -> impl Strategy<Value = Vec<Try>> {
    let index = prop_oneof![4 => Just(0u64), 2 => 0..3u64, 1 => 0..512u64];
    let la = (index.clone(), index.clone(), index.clone(), index.clone(), index, 0..4096u64).prop_map(move |i| {
        let raw = i.0 << 48 | i.1 << 39 | i.2 << 30 | i.3 << 21 | i.4 << 12 | i.5;
        match mode {
            Mode::Five => ((raw << 7) as i64 >> 7) as u64,
            Mode::Four => ((raw << 16) as i64 >> 16) as u64,
            _ => raw & 0xffff_ffff,
        }
    });
    let one = (la, 0..OPS.len(), 0..WHO.len()).prop_map(|(la, op, who)| Try { la, op: OPS[op], who: WHO[who] });
    proptest::collection::vec(one, 1..12)
}

/// Page tables: entries for the low indices of every table page (and a few others), so that walks find them.
fn memory(mode: Mode) -> impl Strategy<Value = Memory> {
    let width = if mode == Mode::ThirtyTwo { 4 } else { 8 };
    let per_page = proptest::collection::vec(entry(), 4);
    (proptest::collection::vec(per_page, TABLES as usize), any::<u64>()).prop_map(move |(pages, noise)| {
        let mut m = Memory(vec![0; RAM as usize]);
        for (p, entries) in pages.iter().enumerate() {
            let base = (FIRST_TABLE + p as u64) << 12;
            for i in 0..4096 / width {
                // Three of four entries repeat the page's four, which makes hits likely whatever the index.
                let e = entries[(i as usize + p) % 4];
                let e = if noise >> (i % 61) & 3 == 3 { e ^ (noise.rotate_left(i as u32) & 0x63) } else { e };
                m.write(base + i * width, width, e);
            }
        }
        m
    })
}

fn compare(cpu: &Cpu, start: &Memory, tries: &[Try]) -> Result<(), TestCaseError> {
    let machine = Machine::new();
    machine.set_memory(start);
    let mut expected = start.clone();
    let mut cpu = *cpu;
    if cpu.mode == Mode::Pae {
        // The PDPTE registers hold what a load lets through.
        let mut direct = Direct { phys: &machine.phys, code: &machine.code };
        let ours = load_pdptes(cpu.cr3, cpu.maxphyaddr as u8, &mut direct);
        let theirs = model::load_pdptes(cpu.cr3, cpu.maxphyaddr, start);
        prop_assert_eq!(ours.ok(), theirs);
        let page = |i: u64| (FIRST_TABLE + (cpu.cr3 >> 12).wrapping_mul(7 + i) % TABLES) << 12 | u64::from(i != 3);
        cpu.pdptes = theirs.unwrap_or([0, 1, 2, 3].map(page));
    }
    let space = space_of(&cpu);
    for t in tries {
        let theirs = model::access(&cpu, &mut expected, t.la, t.op, t.who);
        let mut counts = WalkCounts::default();
        let mut direct = Direct { phys: &machine.phys, code: &machine.code };
        let ours = walk(&space, LinearAddr(t.la), access_of(t.op, t.who), &mut direct, &mut counts);
        match (ours, theirs) {
            (Ok(m), Ok(f)) => {
                prop_assert_eq!(m.page.0 | t.la & 0xfff, f.pa, "{:?}", t);
                prop_assert_eq!(m.guest_page, GuestPhysAddr(m.page.0));
                prop_assert_eq!(u32::from(m.shift), f.size, "{:?}", t);
                prop_assert_eq!((m.global, m.dirty), (f.global, f.dirty), "{:?}", t);
                prop_assert_eq!(u64::from(m.pat_index), f.pat, "{:?}", t);
            }
            (Err(Fault::Page { error, la }), Err(e)) => {
                prop_assert_eq!(error, e, "{:?}", t);
                prop_assert_eq!(la.0, t.la);
            }
            (ours, theirs) => prop_assert!(false, "{t:?}: ours {ours:?}, the model's {theirs:?}"),
        }
    }
    prop_assert!(machine.memory() == expected, "memory differs");
    Ok(())
}

/// As [`compare`], through the TLB: with tables that nobody changes, hits answer what walks would.
fn compare_cached(cpu: &Cpu, start: &Memory, tries: &[Try]) -> Result<(), TestCaseError> {
    let machine = Machine::new();
    machine.set_memory(start);
    let mut mmu = machine.mmu(FlushPolicy::Tagged);
    let mut cpu = *cpu;
    cpu.pdptes = [0, 1, 2, 3].map(|i| (FIRST_TABLE + i * 9) << 12 | 1);
    let space = space_of(&cpu);
    let _ = mmu.reset(&space);
    let mut expected = start.clone();
    for t in tries.iter().chain(tries) {
        let theirs = model::access(&cpu, &mut expected, t.la, t.op, t.who);
        match (mmu.translate(&space, LinearAddr(t.la), access_of(t.op, t.who)), theirs) {
            (Ok(ours), Ok(f)) => prop_assert_eq!(ours.pa.0, f.pa, "{:?}", t),
            (Err(Fault::Page { error, la }), Err(e)) => prop_assert_eq!((error, la.0), (e, t.la)),
            (ours, theirs) => prop_assert!(false, "{t:?}: ours {ours:?}, the model's {theirs:?}"),
        }
    }
    prop_assert!(machine.memory() == expected, "memory differs");
    Ok(())
}

macro_rules! against_the_model {
    ($($name:ident, $cached:ident: $mode:expr;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $name(cpu in cpu($mode), m in memory($mode), tries in tries($mode)) {
                    compare(&cpu, &m, &tries)?;
                }
                #[test]
                fn $cached(cpu in cpu($mode), m in memory($mode), tries in tries($mode)) {
                    compare_cached(&cpu, &m, &tries)?;
                }
            )*
        }
    };
}

against_the_model! {
    // Rows A1, A5, A6, A7, A11.
    a1_32bit_walks_are_the_models, a1_32bit_hits_are_the_models: Mode::ThirtyTwo;
    // Rows A2, A5, A6, A7, A11.
    a2_pae_walks_are_the_models, a2_pae_hits_are_the_models: Mode::Pae;
    // Rows A3, A5, A6, A7, A11.
    a3_4level_walks_are_the_models, a3_4level_hits_are_the_models: Mode::Four;
    // Rows A4, A5, A6, A7, A11.
    a4_5level_walks_are_the_models, a4_5level_hits_are_the_models: Mode::Five;
}

/// A machine with one mapped 4 KiB page at linear 0 and the place of its leaf entry.
fn one_page(mode: Mode, middle: u64, leaf: u64) -> (Cpu, Memory, u64) {
    let mut cpu = plain(mode);
    let mut m = Memory(vec![0; RAM as usize]);
    let (levels, width) = match mode {
        Mode::None | Mode::ThirtyTwo => (2, 4),
        Mode::Pae => (2, 8),
        Mode::Four => (4, 8),
        Mode::Five => (5, 8),
    };
    cpu.cr3 = 0x1000;
    cpu.pdptes = [0x1001, 0, 0, 0];
    for l in 1..levels {
        m.write(l << 12, width, (l + 1) << 12 | middle);
    }
    m.write(levels << 12, width, 0x2_0000 | leaf);
    (cpu, m, levels << 12)
}

fn run(cpu: &Cpu, m: &Memory, la: u64, op: Op, who: Who) -> (Result<u64, u32>, Memory) {
    let machine = Machine::new();
    machine.set_memory(m);
    let mut direct = Direct { phys: &machine.phys, code: &machine.code };
    let r = walk(&space_of(cpu), LinearAddr(la), access_of(op, who), &mut direct, &mut WalkCounts::default());
    let r = match r {
        Ok(m) => Ok(m.page.0 | la & 0xfff),
        Err(Fault::Page { error, .. }) => Err(error),
        Err(other) => panic!("{other:?}"),
    };
    (r, machine.memory())
}

/// Row A5, every combination: mode × controls × rights × key rights × access, each against the list in the SDM.
#[test]
fn a5_every_combination_of_rights() {
    let machine = Machine::new();
    let mut refused = 0u32;
    let mut total = 0u32;
    for mode in [Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five] {
        for rights in 0..8u64 {
            let nx = if mode == Mode::ThirtyTwo { 0 } else { (rights >> 2) << 63 };
            let key = if matches!(mode, Mode::Four | Mode::Five) { 5 << 59 } else { 0 };
            let (base, m, _) = one_page(mode, 0x27, 0x61 | (rights & 3) << 1 | key);
            for controls in 0..128u32 {
                let on = |b: u32| controls >> b & 1 != 0;
                let nxe = on(4);
                let mut m = m.clone();
                if nxe && nx != 0 {
                    let leaf = base_leaf(mode);
                    let e = m.read(leaf, 8);
                    m.write(leaf, 8, e | nx);
                }
                machine.set_memory(&m);
                for keys in 0..4u32 {
                    let cpu = Cpu {
                        wp: on(0),
                        smep: on(1),
                        smap: on(2),
                        pke: on(3),
                        nxe,
                        pks: on(5),
                        pge: on(6),
                        pkru: keys << 10,
                        pkrs: (keys ^ 1) << 10,
                        ..base
                    };
                    let space = space_of(&cpu);
                    for op in OPS {
                        for who in WHO {
                            let mut direct = Direct { phys: &machine.phys, code: &machine.code };
                            let mut counts = WalkCounts::default();
                            let ours = walk(&space, LinearAddr(8), access_of(op, who), &mut direct, &mut counts);
                            let theirs = model::access(&cpu, &mut m, 8, op, who);
                            total += 1;
                            match (ours, theirs) {
                                (Ok(a), Ok(b)) => assert_eq!(a.page.0 + 8, b.pa),
                                (Err(Fault::Page { error, .. }), Err(e)) => {
                                    refused += 1;
                                    assert_eq!(error, e, "{cpu:?} {op:?} {who:?} rights {rights}");
                                }
                                (a, b) => panic!("{cpu:?} {op:?} {who:?} rights {rights}: {a:?} {b:?}"),
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(total > 190_000 && refused > total / 5, "{refused} of {total}");
}

fn base_leaf(mode: Mode) -> u64 {
    match mode {
        Mode::Four => 4 << 12,
        Mode::Five => 5 << 12,
        _ => 2 << 12,
    }
}

/// Row A1: a 4 MiB page with PSE-36 bits, its reserved bits by MAXPHYADDR, and CR4.PSE = 0, where PS means nothing.
#[test]
fn a1_pse36() {
    let mut m = Memory(vec![0; RAM as usize]);
    // Page at 0x2a_4040_0000: bits 39:32 = 0x2a in bits 20:13.
    m.write(0x1000, 4, 0x4040_0000 | 0x2a << 13 | 0x87);
    let cpu = Cpu { cr3: 0x1000, ..plain(Mode::ThirtyTwo) };
    assert_eq!(run(&cpu, &m, 0x12_3456, Op::Read, Who::User).0, Ok(0x2a_4052_3456));
    // 36 bits: address bits 39:36 (bits 20:17) are reserved, and 0x2a has one of them.
    let narrow = Cpu { maxphyaddr: 36, ..cpu };
    assert_eq!(run(&narrow, &m, 0, Op::Read, Who::User).0, Err(0b1101));
    m.write(0x1000, 4, 0x4040_0000 | 1 << 21 | 0x87);
    assert_eq!(run(&cpu, &m, 0, Op::Write, Who::Implicit).0, Err(0b1011));
    m.write(0x1000, 4, 0x2087);
    m.write(0x2000, 4, 0x3007);
    let no_pse = Cpu { pse: false, ..cpu };
    assert_eq!(run(&no_pse, &m, 0x10, Op::Read, Who::User).0, Ok(0x3010));
}

/// Row A1: 32-bit paging has no NX, whatever EFER.NXE says, and CR0.WP = 0 lets the supervisor write anywhere.
#[test]
fn a1_no_nx_and_wp() {
    let (cpu, m, _) = one_page(Mode::ThirtyTwo, 7, 5);
    assert_eq!(run(&cpu, &m, 0, Op::Fetch, Who::User).0, Ok(0x2_0000));
    assert_eq!(run(&cpu, &m, 0, Op::Write, Who::Implicit).0, Err(0b11));
    assert_eq!(run(&Cpu { wp: false, ..cpu }, &m, 0, Op::Write, Who::Implicit).0, Ok(0x2_0000));
    assert_eq!(run(&Cpu { wp: false, ..cpu }, &m, 0, Op::Write, Who::User).0, Err(0b111));
}

/// Row A2: each reserved bit of a PDPTE refuses the load; bits that are ignored do not; absent entries are not checked; and
/// a walk uses the registers, never memory.
#[test]
fn a2_pdpte_registers() {
    let machine = Machine::new();
    let mut direct = Direct { phys: &machine.phys, code: &machine.code };
    for bit in 1..64u32 {
        for i in 0..4u64 {
            machine.ram().fill(0x1000, 0, 0x1000);
            machine.ram().store_u64(0x1020 + 8 * i, 1 << bit | 1);
            let reserved = matches!(bit, 1 | 2 | 5..=8) || bit >= 40;
            let loaded = load_pdptes(0x1020, 40, &mut direct);
            assert_eq!(loaded.is_err(), reserved, "bit {bit}");
            if reserved {
                assert_eq!(loaded, Err(PdpteError::Reserved { index: i as u8 }));
            }
            machine.ram().store_u64(0x1020 + 8 * i, 1 << bit);
            assert!(load_pdptes(0x1020, 40, &mut direct).is_ok());
        }
    }
    let (cpu, m, _) = one_page(Mode::Pae, 7, 7);
    // No PDPT anywhere in memory: CR3's page is the page directory itself.
    assert_eq!(run(&cpu, &m, 0, Op::Read, Who::User).0, Ok(0x2_0000));
    assert_eq!(run(&Cpu { pdptes: [0; 4], ..cpu }, &m, 0, Op::Read, Who::User).0, Err(0b100));
}

/// Rows A3 and A4: 1 GiB and 2 MiB pages, PS reserved in a PML4E and a PML5E, and in a PDPTE of a CPU without 1 GiB pages.
#[test]
fn a3_a4_large_pages() {
    for mode in [Mode::Four, Mode::Five] {
        let levels: u64 = if mode == Mode::Four { 4 } else { 5 };
        let (cpu, m, _) = one_page(mode, 7, 7);
        for level in 2..=levels {
            // The entry at `level` lies in table page `levels - level + 1`.
            let at = (levels - level + 1) << 12;
            let mut m = m.clone();
            m.write(at, 8, 0x87);
            let expected = match level {
                2 => Ok(0x1f_5678),
                3 => Ok(0x3fff_5678 & 0x1f_ffff),
                _ => Err(0b1101),
            };
            assert_eq!(run(&cpu, &m, 0x1f_5678, Op::Read, Who::User).0, expected, "{mode:?} level {level}");
            if level == 3 {
                let small = Cpu { page1gb: false, ..cpu };
                assert_eq!(run(&small, &m, 0x1f_5678, Op::Read, Who::User).0, Err(0b1101));
            }
        }
    }
}

/// Row A3: canonical addresses, at the edges of both widths; the caller makes #GP or #SS of the typed fault.
#[test]
fn a3_canonical() {
    let machine = Machine::new();
    for (mode, edge) in [(Mode::Four, 1u64 << 47), (Mode::Five, 1 << 56)] {
        let (cpu, m, _) = one_page(mode, 7, 7);
        machine.set_memory(&m);
        let space = space_of(&cpu);
        let mut mmu = machine.mmu(FlushPolicy::Tagged);
        let _ = mmu.reset(&space);
        for la in [edge, edge.wrapping_neg() - 1, u64::MAX >> 1, 1 << 63] {
            let fault = mmu.translate(&space, LinearAddr(la), access_of(Op::Read, Who::User)).unwrap_err();
            assert_eq!(fault, Fault::NonCanonical { la: LinearAddr(la) });
            assert_eq!(fault.exception(false), Some(twofold_arch::Exception::GP0));
            assert_eq!(fault.exception(true), Some(twofold_arch::Exception::SS0));
        }
        for la in [edge - 1, edge.wrapping_neg(), u64::MAX] {
            let fault = mmu.translate(&space, LinearAddr(la), access_of(Op::Read, Who::User)).unwrap_err();
            assert!(matches!(fault, Fault::Page { error: 4, .. }), "{la:#x} {fault:?}");
        }
        // An access across the edge faults on its second page.
        let r = mmu.read(&space, LinearAddr(edge - 4), 8, access_of(Op::Read, Who::User));
        assert!(matches!(r, Err(Fault::Page { .. })));
    }
}

/// Row A6: which access sets which flag, at every level; refused accesses set none.
#[test]
fn a6_accessed_and_dirty() {
    for mode in [Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five] {
        // Read-only to the user.
        let (cpu, m, leaf) = one_page(mode, 7, 5);
        let width = if mode == Mode::ThirtyTwo { 4 } else { 8 };
        let (r, after) = run(&cpu, &m, 0, Op::Write, Who::User);
        assert!(r.is_err() && after == m, "{mode:?}: a refused write leaves memory alone");
        let (r, after) = run(&cpu, &m, 0, Op::Read, Who::User);
        assert!(r.is_ok());
        for at in (0x1000..=leaf).step_by(0x1000) {
            assert_eq!(after.read(at, width), m.read(at, width) | 0x20, "{mode:?}: A and no D at {at:#x}");
        }
        let (r, after) = run(&Cpu { wp: false, ..cpu }, &m, 0, Op::Write, Who::Implicit);
        assert!(r.is_ok());
        assert_eq!(after.read(leaf, width), m.read(leaf, width) | 0x60);
        assert_eq!(after.read(0x1000, width), m.read(0x1000, width) | 0x20, "{mode:?}: no D above the leaf");
    }
}

/// Row A6: a translation that a read cached with D = 0 is walked again by the first write, which sets D; a write tag that
/// could match before would lose it.
#[test]
fn a6_first_write_sets_dirty() {
    let (cpu, m, leaf) = one_page(Mode::Four, 7, 7);
    let machine = Machine::new();
    machine.set_memory(&m);
    let space = space_of(&cpu);
    let mut mmu = machine.mmu(FlushPolicy::Tagged);
    let _ = mmu.reset(&space);
    let (read, write) = (access_of(Op::Read, Who::User), access_of(Op::Write, Who::User));
    let user = twofold_arch::tbflags::MemMode::User;
    mmu.read(&space, LinearAddr(0), 8, read).unwrap();
    assert!(mmu.load_cached(user, LinearAddr(0), 8).is_some());
    assert!(!mmu.store_cached(user, LinearAddr(0), 8, 1), "no write tag while D = 0");
    assert_eq!(machine.ram().load_u64(leaf).unwrap() & 0x60, 0x20);
    mmu.write(&space, LinearAddr(0), 8, 1, write).unwrap();
    assert_eq!(machine.ram().load_u64(leaf).unwrap() & 0x60, 0x60);
    assert!(mmu.store_cached(user, LinearAddr(8), 8, 2));
    assert_eq!(machine.ram().load_u64(0x2_0008), Some(2));
    assert_eq!(mmu.stats().misses, 2);
}

/// Row A7: reserved address bits for every width, in every 64-bit mode; and PAT, PCD, PWT as an index.
#[test]
fn a7_maxphyaddr_and_memory_type() {
    for mode in [Mode::Pae, Mode::Four, Mode::Five] {
        for width in 32..=52u32 {
            for bit in 32..63u32 {
                let (cpu, mut m, leaf) = one_page(mode, 7, 7);
                let e = m.read(leaf, 8);
                m.write(leaf, 8, e | 1 << bit);
                let cpu = Cpu { maxphyaddr: width, ..cpu };
                let top = if mode == Mode::Pae { 62 } else { 51 };
                let (r, _) = run_walk(&cpu, &m);
                assert_eq!(r.is_err(), bit >= width && bit <= top, "{mode:?}, width {width}, bit {bit}");
            }
        }
    }
    for pat in 0..8u64 {
        let (cpu, m, _) = one_page(Mode::Four, 7, 7 | (pat & 3) << 3 | (pat >> 2) << 7);
        assert_eq!(run_walk(&cpu, &m).0.unwrap().pat_index, pat as u8);
    }
}

fn run_walk(cpu: &Cpu, m: &Memory) -> (Result<twofold_mmu::Mapping, Fault>, Memory) {
    let machine = Machine::new();
    machine.set_memory(m);
    let mut direct = Direct { phys: &machine.phys, code: &machine.code };
    let access = access_of(Op::Read, Who::User);
    let r = walk(&space_of(cpu), LinearAddr(0), access, &mut direct, &mut WalkCounts::default());
    (r, machine.memory())
}

/// Tables in ROM, in a device and in nothing: no panic, accessed flags are dropped, nothing reads as all ones.
#[test]
fn a11_tables_outside_ram() {
    let machine = Machine::new();
    let mut direct = Direct { phys: &machine.phys, code: &machine.code };
    for cr3 in [0xa_0000u64, 0xffff_f000, 0x000f_ffff_ffff_f000] {
        for mode in [Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five] {
            let cpu = Cpu { cr3, pdptes: [cr3 | 1; 4], maxphyaddr: 52, ..plain(mode) };
            let access = access_of(Op::Write, Who::Implicit);
            let r = walk(&space_of(&cpu), LinearAddr(0x1000), access, &mut direct, &mut WalkCounts::default());
            match mode {
                // All ones is a good 32-bit entry but for bit 21 of a 4 MiB page.
                Mode::ThirtyTwo => assert!(matches!(r, Err(Fault::Page { error: 0b1011, .. })), "{r:?}"),
                _ => assert!(matches!(r, Err(Fault::Page { .. })), "{r:?}"),
            }
        }
    }
    // A debugger's look changes nothing.
    let (cpu, m, _) = one_page(Mode::Four, 3, 1);
    machine.set_memory(&m);
    let mmu = machine.mmu(FlushPolicy::Tagged);
    assert_eq!(mmu.probe(&space_of(&cpu), LinearAddr(0)).unwrap().page, PhysAddr(0x2_0000));
    assert!(machine.memory() == m);
}

/// Row B4 as far as walks go: three threads change the same entries, two by walking and one as software does; nothing is lost.
#[test]
fn b4_flags_set_by_two_walkers_at_once() {
    let (cpu, m, leaf) = one_page(Mode::Four, 7, 7);
    let machine = Machine::new();
    for round in 0..20 {
        machine.set_memory(&m);
        for i in 0..512 {
            machine.ram().store_u64(leaf + i * 8, 0x2_0007);
        }
        let walker = |op| {
            let mut direct = Direct { phys: &machine.phys, code: &machine.code };
            for i in 0..512 {
                let access = access_of(op, Who::User);
                walk(&space_of(&cpu), LinearAddr(i << 12), access, &mut direct, &mut WalkCounts::default()).unwrap();
            }
        };
        std::thread::scope(|s| {
            s.spawn(|| walker(Op::Read));
            s.spawn(|| walker(Op::Write));
            s.spawn(|| {
                for i in 0..512 {
                    let at = leaf + i * 8;
                    while !{
                        let old = machine.ram().load_u64(at).unwrap();
                        machine.ram().exchange_u64(at, old, old | 1 << 9).unwrap()
                    } {}
                }
            });
        });
        for i in 0..512 {
            assert_eq!(machine.ram().load_u64(leaf + i * 8), Some(0x2_0267), "round {round}, entry {i}");
        }
    }
}
