//! The softmmu TLB from outside: tags and contexts, invalidation by cause, growth, code pages, page-crossing accesses, the
//! jump cache.

mod common;
mod model;

use std::sync::Arc;

use common::{Machine, access_of, plain, space_of};
use model::{Mode, Op, Who};
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CpuState, GuestPhysAddr, LinearAddr, PhysAddr};
use twofold_mmu::mmu::BytesOutcome;
use twofold_mmu::{
    Access, AddressSpace, CodePages, EptFault, EptFaultKind, Fault, FlushCause, FlushPolicy, GuestRam, Invpcid,
    Invvpid, JUMP_CACHE_ENTRIES, JumpCacheEntry, LegacyHole, Mmu, PhysMap, ReadOutcome, Target, WriteOutcome,
    jump_index,
};

const READ: Access = Access::read(MemMode::User);
const WRITE: Access = Access::write(MemMode::User);

/// Page tables in four pages from `at`: linear page i → `frame + i` (512 pages) with `flags`.
fn tables(m: &Machine, at: u64, frame: impl Fn(u64) -> u64, flags: u64) {
    for l in 0..3 {
        m.ram().store_u64(at + (l << 12), (at + ((l + 1) << 12)) | 7);
    }
    for i in 0..512 {
        m.ram().store_u64(at + (3 << 12) + i * 8, frame(i) << 12 | flags);
    }
}

fn space(cr3: u64, pcid: u16) -> AddressSpace {
    let cpu = model::Cpu { cr3, ..plain(Mode::Four) };
    AddressSpace { pcide: pcid != 0, pcid, ..space_of(&cpu) }
}

fn ready(policy: FlushPolicy, flags: u64) -> (Machine, Mmu, AddressSpace) {
    let m = Machine::new();
    tables(&m, 0x1000, |i| 0x20 + i % 16, flags);
    let s = space(0x1000, 1);
    let mut mmu = m.mmu(policy);
    let _ = mmu.reset(&s);
    (m, mmu, s)
}

fn cached(mmu: &Mmu, la: u64) -> bool {
    mmu.load_cached(MemMode::User, LinearAddr(la), 8).is_some()
}

/// Row A8: with CR3 bit 63 a PCID's translations are still there after the way to another PCID and back; without it they
/// are not. Row D5's shape: contexts never leak into each other. Switching is changing the view, walking nothing.
#[test]
fn a8_pcids_keep_their_translations() {
    let (m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    tables(&m, 0x6000, |i| 0x40 + i % 16, 0x67);
    let b = space(0x6000, 2);
    mmu.read(&a, LinearAddr(0x3000), 8, READ).unwrap();
    let view_a = mmu.view();
    let view_b = mmu.mov_cr3(&b, true);
    assert_ne!(view_a.tlb[0].table, view_b.tlb[0].table);
    assert_ne!(view_a.jump_cache, view_b.jump_cache);
    assert!(!cached(&mmu, 0x3000));
    mmu.write(&b, LinearAddr(0x3000), 8, 7, WRITE).unwrap();
    assert_eq!(m.ram().load_u64(0x43 << 12), Some(7));
    let walks = mmu.stats().walks;
    let mut state = CpuState::zeroed();
    mmu.mov_cr3(&a, true).store(&mut state);
    assert_eq!((state.tlb[0].table, state.jump_cache), (view_a.tlb[0].table, view_a.jump_cache));
    assert!(cached(&mmu, 0x3000));
    assert_eq!(mmu.read(&a, LinearAddr(0x3000), 8, READ).unwrap(), ReadOutcome::Value(0));
    let _ = mmu.mov_cr3(&b, true);
    assert_eq!(mmu.read(&b, LinearAddr(0x3000), 8, READ).unwrap(), ReadOutcome::Value(7));
    assert_eq!(mmu.stats().walks, walks, "nothing was walked again");
    assert_eq!(mmu.stats().flushes_by(FlushCause::MovCr3), 0);
    let _ = mmu.mov_cr3(&a, false);
    assert!(!cached(&mmu, 0x3000));
    assert_eq!(mmu.stats().flushes_by(FlushCause::MovCr3), 1);
}

/// Row A8: global pages survive MOV CR3 and INVPCID 0, 1 and 3, and go by CR4.PGE, INVPCID 2 and INVLPG, the last in every PCID.
#[test]
fn a8_a9_global_pages() {
    let (_m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x167);
    let b = space(0x1000, 2);
    let la = LinearAddr(0x5000);
    let fill = |mmu: &mut Mmu, s: &AddressSpace| {
        mmu.read(s, la, 8, READ).unwrap();
    };
    fill(&mut mmu, &a);
    let _ = mmu.mov_cr3(&a, false);
    assert!(cached(&mmu, 0x5000));
    mmu.invpcid(&a, Invpcid::Context { pcid: 1 });
    mmu.invpcid(&a, Invpcid::All);
    assert!(cached(&mmu, 0x5000));
    mmu.invpcid(&a, Invpcid::AllWithGlobals);
    assert!(!cached(&mmu, 0x5000));
    fill(&mut mmu, &a);
    let _ = mmu.mov_cr3(&b, true);
    mmu.invlpg(&b, la);
    let _ = mmu.mov_cr3(&a, true);
    assert!(!cached(&mmu, 0x5000), "INVLPG in another PCID drops a global page here");
    fill(&mut mmu, &a);
    let _ = mmu.mov_cr3(&b, true);
    fill(&mut mmu, &b);
    let off = AddressSpace { pge: false, ..b };
    let _ = mmu.controls_changed(&b, &off);
    let _ = mmu.controls_changed(&off, &b);
    assert!(!cached(&mmu, 0x5000));
    let _ = mmu.mov_cr3(&a, true);
    assert!(!cached(&mmu, 0x5000), "in every PCID");
    assert_eq!(mmu.stats().flushes_by(FlushCause::CrBits), 2);
}

/// Row A9: INVLPG of any address in a large page drops all of its pieces, in tables and jump cache; a neighbour stays.
#[test]
fn a9_invlpg_of_a_large_page() {
    for (shift, mode) in [(21, Mode::Four), (30, Mode::Four), (21, Mode::Pae), (22, Mode::ThirtyTwo)] {
        let m = Machine::new();
        let cpu = model::Cpu { cr3: 0x1000, pdptes: [0x1001; 4], ..plain(mode) };
        match (mode, shift) {
            (Mode::Four, 21) => {
                tables(&m, 0x1000, |i| i, 0x67);
                (0..2).for_each(|i| assert!(m.ram().store_u64(0x3000 + i * 8, 0xe7)));
            }
            (Mode::Four, _) => {
                m.ram().store_u64(0x1000, 0x2007);
                (0..2).for_each(|i| assert!(m.ram().store_u64(0x2000 + i * 8, 0xe7)));
            }
            (Mode::Pae, _) => (0..2).for_each(|i| assert!(m.ram().store_u64(0x1000 + i * 8, 0xe7))),
            _ => (0..2).for_each(|i| assert!(m.ram().store_u32(0x1000 + i * 4, 0xe7))),
        }
        let s = space_of(&cpu);
        let mut mmu = m.mmu(FlushPolicy::Tagged);
        let _ = mmu.reset(&s);
        let size = 1u64 << shift;
        let pieces = [0x1000, 0x7f000, size + 0x1000];
        for la in pieces {
            mmu.read(&s, LinearAddr(la), 8, READ).unwrap();
            let e = JumpCacheEntry { rip: la + 5, flags: 1, code: 1, rip_base: la };
            mmu.jump_insert(LinearAddr(la + 5), e, false);
        }
        mmu.invlpg(&s, LinearAddr(size - 0x1000));
        let left = pieces.map(|la| (cached(&mmu, la), mmu.jump_get(la + 5, 1).is_some()));
        assert_eq!(left, [(false, false), (false, false), (true, true)], "{mode:?} {shift}");
    }
}

/// Row A9: changes of control bits that matter drop translations; others drop nothing. (WP, SMEP, SMAP, PKE, NXE have no
/// invalidation in the SDM's table but hold at once, so their change must not leave an old right behind.)
#[test]
fn a9_control_bits() {
    let (_m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x65);
    let sup = access_of(Op::Write, Who::Explicit { ac: true });
    assert!(mmu.write(&a, LinearAddr(0), 8, 1, sup).is_err());
    let no_wp = AddressSpace { wp: false, ..a };
    let _ = mmu.controls_changed(&a, &no_wp);
    mmu.write(&no_wp, LinearAddr(0), 8, 1, sup).unwrap();
    assert!(mmu.store_cached(MemMode::SupervisorAc, LinearAddr(0), 8, 1));
    let _ = mmu.controls_changed(&no_wp, &a);
    assert!(!mmu.store_cached(MemMode::SupervisorAc, LinearAddr(0), 8, 1));
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    let _ = mmu.controls_changed(&a, &a);
    assert!(cached(&mmu, 0), "a change of CR0.TS, say, drops nothing");
    // The context of another PCID finds out when it is switched to.
    let b = AddressSpace { pcid: 2, ..a };
    let _ = mmu.mov_cr3(&b, true);
    let smap = AddressSpace { smap: true, ..b };
    let _ = mmu.controls_changed(&b, &smap);
    let _ = mmu.mov_cr3(&AddressSpace { smap: true, ..a }, true);
    assert!(!cached(&mmu, 0));
}

/// Row A9: clearing CR4.PCIDE drops every PCID's translations; setting it drops none.
#[test]
fn a9_pcide() {
    let (_m, mut mmu, b) = ready(FlushPolicy::Tagged, 0x67);
    mmu.read(&b, LinearAddr(0x1000), 8, READ).unwrap();
    let zero = AddressSpace { pcid: 0, ..b };
    let _ = mmu.mov_cr3(&zero, true);
    mmu.read(&zero, LinearAddr(0x1000), 8, READ).unwrap();
    let off = AddressSpace { pcide: false, ..zero };
    let _ = mmu.controls_changed(&zero, &off);
    assert!(!cached(&mmu, 0x1000));
    mmu.read(&off, LinearAddr(0x1000), 8, READ).unwrap();
    let _ = mmu.controls_changed(&off, &zero);
    assert!(cached(&mmu, 0x1000));
    let _ = mmu.mov_cr3(&b, true);
    assert!(!cached(&mmu, 0x1000));
}

/// Row A5 with the TLB: a change of PKRU holds at once, and costs nothing while no page has the key.
#[test]
fn a5_pkru_changes() {
    let (m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    m.ram().store_u64(0x4000 + 8, 0x21067 | 3 << 59);
    let on = AddressSpace { pke: true, ..a };
    let _ = mmu.controls_changed(&a, &on);
    mmu.read(&on, LinearAddr(0), 8, READ).unwrap();
    let mut now = AddressSpace { pkru: 0x40, ..on };
    mmu.set_pkru(&now);
    assert!(cached(&mmu, 0) && mmu.stats().flushes_by(FlushCause::Pkru) == 0);
    let fault = mmu.read(&now, LinearAddr(0x1000), 8, READ).unwrap_err();
    assert_eq!(fault, Fault::Page { error: 0b10_0101, la: LinearAddr(0x1000) });
    now.pkru = 0;
    mmu.set_pkru(&now);
    mmu.read(&now, LinearAddr(0x1000), 8, READ).unwrap();
    // A change on the way through another context is noticed too.
    let other = AddressSpace { pcid: 9, ..now };
    let _ = mmu.mov_cr3(&other, true);
    let _ = mmu.mov_cr3(&AddressSpace { pkru: 0x40, ..now }, true);
    assert!(!cached(&mmu, 0x1000));
}

/// Rows C5, E1, E2, E3 as far as the TLB goes: which contexts VMX operations drop, and that re-entry walks nothing (E5).
#[test]
fn c5_e1_e2_e3_e5_vmx_invalidations() {
    let run = |op: &dyn Fn(&mut Mmu, &AddressSpace)| {
        let (_m, mut mmu, l1) = ready(FlushPolicy::Tagged, 0x67);
        let l2 = AddressSpace { vpid: 5, ..l1 };
        let l2b = AddressSpace { vpid: 6, ..l1 };
        for s in [&l1, &l2, &l2b] {
            let _ = mmu.vm_transition(s, FlushCause::VmEntry, true);
            mmu.read(s, LinearAddr(0x2000), 8, READ).unwrap();
        }
        let _ = mmu.vm_transition(&l2, FlushCause::VmExit, true);
        op(&mut mmu, &l2);
        [l1, l2, l2b].map(|s| {
            let _ = mmu.vm_transition(&s, FlushCause::VmEntry, true);
            cached(&mmu, 0x2000)
        })
    };
    assert_eq!(run(&|_, _| ()), [true; 3]);
    assert_eq!(run(&|m, s| m.invlpg(s, LinearAddr(0x2000))), [true, false, true]);
    assert_eq!(run(&|m, _| m.invvpid(Invvpid::Address { vpid: 6, la: LinearAddr(0x2000) })), [true, true, false]);
    assert_eq!(run(&|m, _| m.invvpid(Invvpid::Single { vpid: 6 })), [true, true, false]);
    assert_eq!(run(&|m, _| m.invvpid(Invvpid::SingleRetainingGlobals { vpid: 5 })), [true, false, true]);
    assert_eq!(run(&|m, _| m.invvpid(Invvpid::All)), [true, false, false]);
    assert_eq!(run(&|m, _| m.invept(None)), [true; 3], "INVEPT drops no linear mapping");
    assert_eq!(run(&|m, s| _ = m.vm_transition(s, FlushCause::VmExit, false)), [false, true, true]);
    let fault = EptFault {
        kind: EptFaultKind::Misconfiguration,
        gpa: GuestPhysAddr(0),
        la: Some(LinearAddr(0x2000)),
        suppress_ve: false,
    };
    assert_eq!(run(&|m, s| m.ept_fault(s, &fault)), [true, false, true]);
}

/// The policy `full` drops everything at everything.
#[test]
fn full_policy_flushes_all() {
    let (m, mut mmu, a) = ready(FlushPolicy::Full, 0x167);
    tables(&m, 0x6000, |i| 0x40 + i % 16, 0x67);
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    let b = space(0x6000, 2);
    let _ = mmu.mov_cr3(&b, true);
    let _ = mmu.mov_cr3(&a, true);
    assert!(!cached(&mmu, 0));
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    mmu.invlpg(&a, LinearAddr(0x10_0000));
    assert!(!cached(&mmu, 0));
}

/// More address spaces than contexts: the one not used for longest goes, and answers stay right.
#[test]
fn contexts_are_reused() {
    let (_m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    for round in 0..3 {
        for pcid in 1..40 {
            let s = AddressSpace { pcid, ..a };
            let _ = mmu.mov_cr3(&s, true);
            let value = mmu.read(&s, LinearAddr(0x1000), 8, READ).unwrap();
            assert_eq!(value, ReadOutcome::Value(0), "round {round}");
        }
    }
    assert!(mmu.stats().flushes_by(FlushCause::Evicted) > 60);
}

/// Tables grow with use; growing keeps what is cached, the address of the table, and what an old view may still probe.
#[test]
fn tables_grow() {
    let ram = Arc::new(GuestRam::new(64 << 20).unwrap());
    let phys = Arc::new(PhysMap::new(ram, LegacyHole::Ram));
    let code = Arc::new(CodePages::new(PhysAddr(64 << 20)));
    let mut mmu = Mmu::new(phys, code, FlushPolicy::Tagged).unwrap();
    let s = AddressSpace::reset(46);
    let before = mmu.reset(&s);
    let sup = Access::write(MemMode::SupervisorAc);
    for round in 0..4u64 {
        for page in 0..8192u64 {
            mmu.write(&s, LinearAddr(page << 12), 8, page + round, sup).unwrap();
        }
    }
    assert!(mmu.take_view_change() && !mmu.take_view_change());
    let after = mmu.view();
    let of = MemMode::SupervisorAc as usize;
    assert_eq!(after.tlb[of].table, before.tlb[of].table);
    assert_eq!(after.tlb[of].mask, (8192 - 1) * 32);
    assert!(mmu.stats().table_growths > 0);
    let misses = mmu.stats().misses;
    for page in 0..8192u64 {
        let la = LinearAddr(page << 12);
        assert_eq!(mmu.read(&s, la, 8, Access::read(MemMode::SupervisorAc)).unwrap(), ReadOutcome::Value(page + 3));
    }
    assert_eq!(mmu.stats().misses, misses, "all of it fits now");
    let _ = mmu.reset(&s);
    assert!((0..8192).all(|p| mmu.load_cached(MemMode::SupervisorAc, LinearAddr(p << 12), 8).is_none()));
}

/// A page with live translations is written by the slow path alone, in every context and by every alias; writes to translated
/// bytes are reported, others are not; with the last translation the protection goes.
#[test]
fn code_pages_are_write_protected() {
    let (m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    let b = AddressSpace { pcid: 2, ..a };
    let code_page = PhysAddr(0x23 << 12);
    // Linear pages 3 and 19 are the same frame.
    for s in [&b, &a] {
        let _ = mmu.mov_cr3(s, true);
        for page in [3u64, 19] {
            mmu.write(s, LinearAddr(page << 12), 8, 0, WRITE).unwrap();
            assert!(mmu.store_cached(MemMode::User, LinearAddr(page << 12), 8, 0));
        }
    }
    assert!(mmu.protect(PhysAddr(code_page.0 + 0x100), 0x20));
    assert!(!mmu.protect(PhysAddr(code_page.0 + 0x800), 0x20));
    assert_eq!(mmu.stats().write_tags_revoked, 4);
    for s in [&b, &a] {
        let _ = mmu.mov_cr3(s, true);
        for page in [3u64, 19] {
            assert!(!mmu.store_cached(MemMode::User, LinearAddr(page << 12), 8, 0));
            assert!(cached(&mmu, page << 12), "reading goes on");
        }
    }
    let misses = mmu.stats().misses;
    let write = |mmu: &mut Mmu, la: u64| mmu.write(&a, LinearAddr(la), 8, 0xcc, WRITE).unwrap();
    assert_eq!(write(&mut mmu, 0x3200), WriteOutcome::Done { code: false });
    assert_eq!(write(&mut mmu, 0x13118), WriteOutcome::Done { code: true });
    assert_eq!(mmu.stats().misses, misses, "a slow write needs no walk");
    assert_eq!(m.code.take_written().len(), 1);
    assert!(mmu.translate(&a, LinearAddr(0x3100), WRITE).unwrap().code);
    mmu.invlpg(&a, LinearAddr(0x3000));
    assert_eq!(write(&mut mmu, 0x3200), WriteOutcome::Done { code: false });
    assert!(!mmu.store_cached(MemMode::User, LinearAddr(0x3000), 8, 0), "nor does a new fill give a write tag");
    m.code.remove(PhysAddr(code_page.0 + 0x100), 0x20);
    assert!(!mmu.store_cached(MemMode::User, LinearAddr(0x3000), 8, 0));
    m.code.remove(PhysAddr(code_page.0 + 0x800), 0x20);
    assert_eq!(write(&mut mmu, 0x3100), WriteOutcome::Done { code: false });
    assert!(mmu.store_cached(MemMode::User, LinearAddr(0x3000), 8, 0), "fast again");
    assert!(mmu.protect(code_page, 1), "and protected again");
    assert!(!mmu.store_cached(MemMode::User, LinearAddr(0x3000), 8, 0));
}

/// A page table that is also a code page: accessed and dirty flags count as writes to it.
#[test]
fn flags_in_a_page_table_are_writes_to_code() {
    let (m, mut mmu, a) = ready(FlushPolicy::Tagged, 7);
    assert!(mmu.protect(PhysAddr(0x4000), 8));
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    let hit = m.code.take_written();
    assert_eq!((hit.len(), hit[0].pa, hit[0].len), (1, PhysAddr(0x4000), 8));
}

/// Accesses that cross a page: both pages are checked before the first byte is written, each by its own mapping.
#[test]
fn page_crossing_accesses() {
    let (m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    m.ram().store_u64(0x4000 + 2 * 8, 0x2a067);
    let at = LinearAddr(0x1ffd);
    assert_eq!(mmu.write(&a, at, 8, 0x0807_0605_0403_0201, WRITE).unwrap(), WriteOutcome::Done { code: false });
    assert_eq!(m.ram().load(0x2_1ffd, 3), Some(0x03_0201));
    assert_eq!(m.ram().load(0x2_a000, 5), Some(0x08_0706_0504));
    assert_eq!(mmu.read(&a, at, 8, READ).unwrap(), ReadOutcome::Value(0x0807_0605_0403_0201));
    assert!(mmu.load_cached(MemMode::User, at, 8).is_none(), "the probe misses");
    // The second page is read-only.
    m.ram().store_u64(0x4000 + 2 * 8, 0x2a065);
    mmu.invlpg(&a, LinearAddr(0x2000));
    let fault = mmu.write(&a, at, 8, u64::MAX, WRITE).unwrap_err();
    assert_eq!(fault, Fault::Page { error: 7, la: LinearAddr(0x2000) });
    assert_eq!(m.ram().load(0x2_1ffd, 3), Some(0x03_0201), "nothing was written");
    let data = [0xee; 0x1800];
    let fault = mmu.write_bytes(&a, LinearAddr(0x0c00), &data, WRITE).unwrap_err();
    assert_eq!(fault, Fault::Page { error: 7, la: LinearAddr(0x2000) });
    assert_eq!(m.ram().load_u8(0x2_0c00), Some(0));
    mmu.write_bytes(&a, LinearAddr(0x4c00), &data, WRITE).unwrap();
    let mut back = [0; 0x1800];
    assert_eq!(mmu.read_bytes(&a, LinearAddr(0x4c00), &mut back, READ).unwrap(), BytesOutcome::Done { code: false });
    assert_eq!(back, data);
    // 32-bit linear addresses wrap.
    let flat = AddressSpace { pcide: true, pcid: 1, ..AddressSpace::reset(46) };
    let _ = mmu.controls_changed(&a, &flat);
    let parts = mmu.resolve(&flat, LinearAddr(0xffff_fffe), 4, READ).unwrap();
    assert_eq!(parts.second.unwrap().pa, PhysAddr(0));
}

/// Devices, ROM and nothing: what is not RAM never gets a write tag, and devices and nothing are handed to the caller.
#[test]
fn not_ram() {
    let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
    let mut map = PhysMap::new(ram, LegacyHole::Mmio(3));
    map.add_rom(PhysAddr(0xf_0000), &[0x90; 0x1_0000]).unwrap();
    map.add_mmio(PhysAddr(0xfee0_0000), 0x1000, 4).unwrap();
    let code = Arc::new(CodePages::new(PhysAddr(1 << 20)));
    let mut mmu = Mmu::new(Arc::new(map), code, FlushPolicy::Tagged).unwrap();
    let s = AddressSpace::reset(46);
    let _ = mmu.reset(&s);
    let (r, w) = (Access::read(MemMode::SupervisorAc), Access::write(MemMode::SupervisorAc));
    assert_eq!(mmu.read(&s, LinearAddr(0xf_0000), 4, r).unwrap(), ReadOutcome::Value(0x9090_9090));
    assert_eq!(mmu.load_cached(MemMode::SupervisorAc, LinearAddr(0xf_0004), 2), Some(0x9090));
    assert_eq!(mmu.write(&s, LinearAddr(0xf_0000), 4, 0, w).unwrap(), WriteOutcome::Done { code: false });
    assert!(!mmu.store_cached(MemMode::SupervisorAc, LinearAddr(0xf_0000), 4, 0));
    assert_eq!(mmu.read(&s, LinearAddr(0xf_0000), 4, r).unwrap(), ReadOutcome::Value(0x9090_9090));
    assert!(mmu.translate_fetch(&s, LinearAddr(0xf_fff0), false).unwrap().host.is_some());
    let ReadOutcome::Io(parts) = mmu.read(&s, LinearAddr(0xfee0_0ffe), 4, r).unwrap() else { panic!("a device") };
    assert_eq!(parts.first.target, Target::Mmio { id: 4, offset: 0xffe });
    assert_eq!((parts.first.len, parts.second.unwrap().target), (2, Target::Unmapped));
    assert!(mmu.translate_fetch(&s, LinearAddr(0xfee0_0000), false).unwrap().host.is_none());
    let WriteOutcome::Io(parts) = mmu.write(&s, LinearAddr(0x9_ffff), 2, 0x1234, w).unwrap() else { panic!("VGA") };
    assert!(matches!(parts.first.target, Target::Ram(0x9_ffff)));
    // What is nothing is handed to the caller, too: local APICs can be moved there.
    for la in [0xffff_fffe, 0xd000_0000] {
        let ReadOutcome::Io(parts) = mmu.read(&s, LinearAddr(la), 4, r).unwrap() else { panic!("{la:x}") };
        assert_eq!(parts.first.target, Target::Unmapped);
        assert!(matches!(mmu.write(&s, LinearAddr(la), 2, 1, w).unwrap(), WriteOutcome::Io(_)));
    }
    assert!(matches!(mmu.read_bytes(&s, LinearAddr(0xa_0000), &mut [0; 16], r).unwrap(), BytesOutcome::Io(_)));
}

/// The jump cache dies with what it was made from: locals by MOV CR3, pages by INVLPG (and code that runs into the page from
/// the one before), all by a change of rights; entries can be forgotten by RIP and by code address.
#[test]
fn jump_cache_follows_invalidations() {
    let (_m, mut mmu, a) = ready(FlushPolicy::Tagged, 0x67);
    let insert = |mmu: &mut Mmu, rip: u64, global: bool| {
        let e = JumpCacheEntry { rip, flags: 2, code: rip + 1, rip_base: rip & !0xfff };
        mmu.jump_insert(LinearAddr(rip), e, global);
    };
    let has = |mmu: &Mmu, rip: u64| mmu.jump_get(rip, 2).is_some();
    for (rip, global) in [(0x1ff0u64, false), (0x2010, false), (0x3010, false), (0x7010, true)] {
        insert(&mut mmu, rip, global);
    }
    assert!(mmu.jump_get(0x2010, 3).is_none());
    mmu.invlpg(&a, LinearAddr(0x2000));
    assert_eq!([0x1ff0, 0x2010, 0x3010, 0x7010].map(|r| has(&mmu, r)), [false, false, true, true]);
    let _ = mmu.mov_cr3(&a, false);
    assert_eq!([0x3010, 0x7010].map(|r| has(&mmu, r)), [false, true]);
    insert(&mut mmu, 0x3010, false);
    mmu.jump_forget(0x3010);
    mmu.jump_drop_where(|e| e.code == 0x7011);
    assert_eq!([0x3010, 0x7010].map(|r| has(&mmu, r)), [false, false]);
    // A CS base: the linear page says nothing about the RIP, so INVLPG takes all.
    let e = JumpCacheEntry { rip: 0x10, flags: 2, code: 1, rip_base: 0 };
    mmu.jump_insert(LinearAddr(0x5010), e, false);
    mmu.invlpg(&a, LinearAddr(0x5000));
    assert!(!has(&mmu, 0x10));
    // Code that may run into the next page is not kept across MOV CR3: that page may not be global.
    insert(&mut mmu, 0x7ff8, true);
    let _ = mmu.mov_cr3(&a, false);
    assert!(!has(&mmu, 0x7ff8));
    insert(&mut mmu, 0x3010, true);
    let smep = AddressSpace { smep: true, ..a };
    let _ = mmu.controls_changed(&a, &smep);
    assert!(!has(&mmu, 0x3010));
    insert(&mut mmu, 0x3010, true);
    mmu.jump_clear();
    assert!(!has(&mmu, 0x3010));
    assert!((0..1 << 20).step_by(977).all(|rip| jump_index(rip) < JUMP_CACHE_ENTRIES));
}

/// The counters that `--stats` shows.
#[test]
fn counters() {
    let (_m, mut mmu, a) = ready(FlushPolicy::Tagged, 7);
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    mmu.read(&a, LinearAddr(0), 8, READ).unwrap();
    mmu.write(&a, LinearAddr(0), 8, 0, WRITE).unwrap();
    let s = mmu.stats();
    // The write needs a flag set, so it walks too, after a look at the entry.
    assert_eq!((s.misses, s.walks[3], s.entries_read), (2, 2, 9));
    // A in four entries, then D in the leaf.
    assert_eq!(s.ad_writes, 5);
    assert!(mmu.read(&a, LinearAddr(1 << 40), 8, READ).is_err());
    assert_eq!(mmu.stats().faults, 1);
}
