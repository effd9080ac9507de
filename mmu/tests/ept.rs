//! EPT by row, one rule at a time (rows A9, C5, C6, D2–D7, E2, E3, E5, F1–F8, F10–F12), on tables a reader can follow.

mod common;
mod model;

use common::{Machine, access_of, plain, space_of};
use model::{Mode, Op, Who};
use twofold_arch::tbflags::MemMode;
use twofold_arch::{GuestPhysAddr, LinearAddr, PhysAddr};
use twofold_mmu::{
    AccessKind, AddressSpace, EptFault, EptFaultKind, Fault, FlushCause, FlushPolicy, Mmu, PdpteError, Pml,
};

/// EPT tables, topmost first: four or five pages.
const EPT: u64 = 0x1000;
/// Guest tables, topmost first; guest-physical, and EPT maps them to themselves.
const GUEST: u64 = 0x1_0000;
/// The guest-physical page that linear 0 is mapped to, and where EPT puts it.
const PAGE: u64 = 0x2_0000;
const FRAME: u64 = 0x3_0000;
const LOG: u64 = 0x6_0000;

const R: u64 = 1;
const W: u64 = 2;
const X: u64 = 4;
const WB: u64 = 6 << 3;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const XU: u64 = 1 << 10;

const AD: u64 = 1 << 6;

/// Qualification bits, spelled out.
const LINEAR: u32 = 1 << 7;
const FINAL: u32 = 1 << 8;
/// The guest page of [`Bench`] is a user page, read/write, and executable.
const ADVANCED: u32 = 1 << 9 | 1 << 10;

/// A machine with a guest page at linear 0 under EPT.
struct Bench {
    machine: Machine,
    mmu: Mmu,
    space: AddressSpace,
    levels: u64,
}

impl Bench {
    fn new(levels: u64, flags: u64) -> Self {
        Self::with_policy(levels, flags, FlushPolicy::Tagged)
    }

    fn with_policy(levels: u64, flags: u64, policy: FlushPolicy) -> Self {
        let machine = Machine::new();
        let ram = machine.ram();
        for l in 1..levels {
            ram.store_u64(EPT + (l - 1) * 0x1000, (EPT + l * 0x1000) | R | W | X | XU);
        }
        for page in 0..0x80u64 {
            ram.store_u64(EPT + (levels - 1) * 0x1000 + page * 8, page << 12 | WB | R | W | X | XU);
        }
        for l in 0..3u64 {
            ram.store_u64(GUEST + l * 0x1000, (GUEST + (l + 1) * 0x1000) | 0x27);
        }
        ram.store_u64(GUEST + 0x3000, PAGE | 0x67);
        let space = AddressSpace {
            eptp: Some(EPT | (levels - 1) << 3 | flags | 6),
            vpid: 1,
            cr3: GUEST,
            ..space_of(&plain(Mode::Four))
        };
        let mut mmu = machine.mmu(policy);
        let _ = mmu.reset(&space);
        let b = Self { machine, mmu, space, levels };
        b.set_leaf(PAGE, FRAME | WB | R | W | X | XU);
        b
    }

    /// Where the EPT entry of `gpa` at `level` is.
    fn at(&self, gpa: u64, level: u64) -> u64 {
        EPT + (self.levels - level) * 0x1000 + (gpa >> (3 + 9 * level) & 511) * 8
    }
    fn set_leaf(&self, gpa: u64, entry: u64) {
        self.machine.ram().store_u64(self.at(gpa, 1), entry);
    }
    fn entry(&self, gpa: u64, level: u64) -> u64 {
        self.machine.ram().load_u64(self.at(gpa, level)).unwrap()
    }
    fn guest(&self, at: u64) -> u64 {
        self.machine.ram().load_u64(at).unwrap()
    }
    fn set_guest(&self, at: u64, entry: u64) {
        self.machine.ram().store_u64(at, entry);
    }
    fn fresh(&mut self) {
        let space = self.space;
        let _ = self.mmu.reset(&space);
    }
    /// An access with nothing cached.
    fn walk(&mut self, la: u64, op: Op, who: Who) -> Result<u64, Fault> {
        self.fresh();
        self.access(la, op, who)
    }
    fn access(&mut self, la: u64, op: Op, who: Who) -> Result<u64, Fault> {
        self.mmu.translate(&self.space, LinearAddr(la), access_of(op, who)).map(|t| t.pa.0)
    }
    fn user(&mut self, op: Op) -> Result<u64, Fault> {
        self.walk(8, op, Who::User)
    }
}

fn violation(r: Result<u64, Fault>) -> (u32, u64) {
    match r {
        Err(Fault::Ept(EptFault { kind: EptFaultKind::Violation(q), gpa, .. })) => (q, gpa.0),
        other => panic!("no violation: {other:x?}"),
    }
}

fn is_misconfiguration<T>(r: &Result<T, Fault>, at: u64) -> bool {
    matches!(r, Err(Fault::Ept(EptFault { kind: EptFaultKind::Misconfiguration, gpa, .. })) if gpa.0 == at)
}

/// Row F1: 4- and 5-level walks, 4 KiB, 2 MiB and 1 GiB pages, and the smaller of the two stages' page sizes.
#[test]
fn f1_page_sizes() {
    for levels in [4, 5] {
        let mut b = Bench::new(levels, 0);
        assert_eq!(b.user(Op::Read), Ok(FRAME + 8));
        let m = b.mmu.probe(&b.space, LinearAddr(8)).unwrap();
        assert_eq!((m.page.0, m.guest_page.0, m.shift, m.guest_shift), (FRAME, PAGE, 12, 12));
        for level in [2, 3] {
            // Maps everything to itself.
            let at = b.at(PAGE, level);
            b.set_guest(at, 0x80 | WB | R | W | X);
            assert_eq!(b.user(Op::Write), Ok(PAGE + 8), "{levels} levels, page at {level}");
            let m = b.mmu.probe(&b.space, LinearAddr(8)).unwrap();
            assert_eq!((m.shift, m.guest_shift), (12, 12), "the guest's page is smaller");
            // A large page of the guest.
            let pde = b.guest(GUEST + 0x2000);
            b.set_guest(GUEST + 0x2000, 0xe7);
            let m = b.mmu.probe(&b.space, LinearAddr(8)).unwrap();
            assert_eq!((m.page.0, m.shift, m.guest_shift), (0, 21, 21));
            b.set_guest(GUEST + 0x2000, pde);
        }
        // No page can be mapped higher up.
        let top = b.at(PAGE, 4);
        b.set_guest(top, 0x80 | R | W | X);
        assert!(is_misconfiguration(&b.user(Op::Read), GUEST));
    }
    // Wider than the walk translates: nothing is present there.
    for (levels, bit) in [(4, 48), (5, 51)] {
        let mut b = Bench::new(levels, 0);
        b.space.maxphyaddr = 52;
        b.set_guest(GUEST + 0x3000, 1 << bit | 0x67);
        assert_eq!(violation(b.user(Op::Read)), (1 | LINEAR | FINAL | ADVANCED, 1 << bit | 8));
    }
    for length in [0, 1, 2, 5, 7] {
        let mut b = Bench::new(4, 0);
        b.space.eptp = Some(EPT | length << 3 | 6);
        assert!(is_misconfiguration(&b.user(Op::Read), GUEST), "walk length {length} does not exist");
    }
}

/// Row F2: the qualification of each kind of access to the page itself, by the rights of its leaf.
#[test]
fn f2_qualification_of_the_translation() {
    for rights in [0, R, R | W, R | X, X] {
        for (op, need, bit) in [(Op::Read, R, 1), (Op::Write, W, 2), (Op::Fetch, X, 4)] {
            let mut b = Bench::new(4, 0);
            b.set_leaf(PAGE, FRAME | WB | rights);
            let r = b.user(op);
            if rights & need != 0 {
                assert_eq!(r, Ok(FRAME + 8));
                continue;
            }
            let expected = bit | (rights as u32) << 3 | LINEAR | FINAL | ADVANCED;
            assert_eq!(violation(r), (expected, PAGE + 8), "{op:?} with rights {rights}");
        }
    }
    // The AND over the levels.
    let mut b = Bench::new(4, 0);
    let at = b.at(PAGE, 2);
    b.set_guest(at, (EPT + 0x3000) | R | X);
    assert_eq!(violation(b.user(Op::Write)).0, 2 | 1 << 3 | 1 << 5 | LINEAR | FINAL | ADVANCED);
}

/// Row F2: advanced exit information says what guest paging makes of the linear address.
#[test]
fn f2_advanced_information() {
    for (entry, user, write, xd) in
        [(0x67u64, 1, 1, 0), (0x63, 0, 1, 0), (0x65, 1, 0, 0), (0x61, 0, 0, 0), (0x67 | 1 << 63, 1, 1, 1)]
    {
        let mut b = Bench::new(4, 0);
        b.set_guest(GUEST + 0x3000, PAGE | entry);
        b.set_leaf(PAGE, 0);
        let expected = 1 | LINEAR | FINAL | user << 9 | write << 10 | xd << 11;
        assert_eq!(violation(b.walk(8, Op::Read, Who::Implicit)).0, expected, "{entry:#x}");
    }
    // Without paging every linear address is a user-mode, writable, executable one (row D3).
    let mut b = Bench::new(4, 0);
    b.space.mode = twofold_mmu::PagingMode::None;
    b.set_leaf(PAGE, 0);
    assert_eq!(violation(b.walk(PAGE + 8, Op::Fetch, Who::Implicit)), (4 | LINEAR | FINAL | ADVANCED, PAGE + 8));
}

/// Rows F1 and F2: accesses to guest paging structures. Reads while EPT keeps no flags, and read-modify-writes to set the
/// guest's; writes always when it does.
#[test]
fn f2_qualification_of_page_walks() {
    let pte = GUEST + 0x3000;
    let table = |rights: u64| pte | WB | rights;
    // Absent.
    for (flags, bits) in [(0, 1), (AD, 3)] {
        for op in [Op::Read, Op::Write, Op::Fetch] {
            let mut b = Bench::new(4, flags);
            b.set_leaf(pte, 0);
            assert_eq!(violation(b.user(op)), (bits | LINEAR, pte));
        }
    }
    // Read-only, flags off: only an A or D flag that must be set is in the way.
    for (guest, op, ok) in [
        (0x07, Op::Read, false),
        (0x07, Op::Fetch, false),
        (0x27, Op::Read, true),
        (0x27, Op::Fetch, true),
        (0x27, Op::Write, false),
        (0x67, Op::Write, true),
    ] {
        let mut b = Bench::new(4, 0);
        b.set_guest(pte, PAGE | guest);
        b.set_leaf(pte, table(R));
        let r = b.user(op);
        if ok {
            assert_eq!(r, Ok(FRAME + 8));
        } else {
            assert_eq!(violation(r), (3 | 1 << 3 | LINEAR, pte), "{guest:#x} {op:?}");
            assert_eq!(b.guest(pte), PAGE | guest, "nothing was set");
        }
    }
    // Read-only, flags on: nothing can be translated.
    for op in [Op::Read, Op::Write, Op::Fetch] {
        let mut b = Bench::new(4, AD);
        b.set_leaf(pte, table(R | X));
        assert_eq!(violation(b.user(op)), (3 | 1 << 3 | 1 << 5 | LINEAR, pte));
    }
    // The entry's own address, not its page's.
    let mut b = Bench::new(4, 0);
    b.set_leaf(pte, 0);
    assert_eq!(violation(b.walk(0x1f_f123, Op::Read, Who::User)), (1 | LINEAR, pte + 0xff8));
}

/// Guest page faults come after the EPT faults of the walk and before those of the page.
#[test]
fn f2_order_of_faults() {
    let mut b = Bench::new(4, 0);
    b.set_guest(GUEST + 0x3000, PAGE | 0x65);
    b.set_leaf(PAGE, 0);
    assert!(matches!(b.user(Op::Write), Err(Fault::Page { error: 7, .. })), "the guest's refusal comes first");
    assert_eq!(violation(b.user(Op::Read)).1, PAGE + 8);
    b.set_leaf(GUEST + 0x3000, 0);
    assert_eq!(violation(b.user(Op::Write)).1, GUEST + 0x3000);
}

/// Row F3: every bit of every level, reserved or not, and the rights and memory types that do not exist.
#[test]
fn f3_misconfigurations() {
    for levels in [4u64, 5] {
        for (level, page) in [(5, false), (4, false), (3, false), (3, true), (2, false), (2, true), (1, true)] {
            if level > levels {
                continue;
            }
            for bit in 0..64u32 {
                let mut b = Bench::new(levels, 0);
                b.space.maxphyaddr = 40;
                if !page && (12..40).contains(&bit) {
                    continue; // Another table.
                }
                let at = b.at(GUEST, level);
                let base = if page && level > 1 { 0x80 | WB | R | W | X } else { b.entry(GUEST, level) };
                b.set_guest(at, base ^ 1 << bit);
                let reserved = match (level, page) {
                    _ if (40..=51).contains(&bit) => true,
                    // W and X without R.
                    _ if bit == 0 => true,
                    (4 | 5, _) => (3..=7).contains(&bit),
                    (3, false) => (3..=6).contains(&bit),
                    (2, false) => (3..=6).contains(&bit),
                    (3, true) => (12..=29).contains(&bit),
                    (2, true) => (12..=20).contains(&bit),
                    _ => false,
                };
                // WB with one bit the other way is 7 or WP, 4 is WT, 2 is reserved.
                let bad_type = page && matches!(bit, 3 | 5);
                // An entry of the other kind.
                let other_kind = matches!(level, 2 | 3) && bit == 7;
                let r = b.user(Op::Read);
                if !other_kind {
                    let found = is_misconfiguration(&r, GUEST);
                    assert_eq!(found, reserved || bad_type, "{levels} levels, {level} {page} bit {bit}: {r:x?}");
                }
            }
        }
    }
    for memory_type in 0..8u64 {
        let mut b = Bench::new(4, 0);
        b.set_leaf(PAGE, FRAME | memory_type << 3 | R | W | X);
        assert_eq!(is_misconfiguration(&b.user(Op::Read), PAGE + 8), matches!(memory_type, 2 | 3 | 7));
    }
    for rights in 0..8u64 {
        for (mode_based, execute_only) in [(false, false), (false, true), (true, false), (true, true)] {
            for user_execute in [false, true] {
                let mut b = Bench::new(4, 0);
                (b.space.ept_mode_based, b.space.ept_execute_only) = (mode_based, execute_only);
                b.set_leaf(PAGE, FRAME | WB | rights | if user_execute { XU } else { 0 });
                let executable = rights & X != 0 || (mode_based && user_execute);
                let bad = rights & R == 0 && (rights & W != 0 || (executable && !execute_only));
                assert_eq!(is_misconfiguration(&b.user(Op::Read), PAGE + 8), bad, "{rights:#x} {user_execute}");
            }
        }
    }
}

/// Row F3: a misconfiguration anywhere on the way comes before the violation that an entry above it makes; but nothing is read
/// below an entry that is not present.
#[test]
fn f3_priority_over_violations() {
    let mut b = Bench::new(4, 0);
    let at = b.at(PAGE, 3);
    b.set_guest(at, (EPT + 0x2000) | R);
    b.set_leaf(PAGE, FRAME | 7 << 3 | R);
    b.set_leaf(GUEST, GUEST | WB | R);
    assert!(is_misconfiguration(&b.user(Op::Write), PAGE + 8));
    b.set_leaf(PAGE, 7 << 3);
    assert!(matches!(violation(b.user(Op::Write)), (_, gpa) if gpa == PAGE + 8), "not present has no memory type");
}

/// Row F4: an execute-only page can be fetched from and not read, also once it is cached.
#[test]
fn f4_execute_only() {
    let mut b = Bench::new(4, 0);
    b.set_leaf(PAGE, FRAME | WB | X);
    assert_eq!(b.user(Op::Fetch), Ok(FRAME + 8));
    assert_eq!(b.access(0x10, Op::Fetch, Who::User), Ok(FRAME + 0x10));
    assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_none());
    assert_eq!(violation(b.access(0x18, Op::Read, Who::User)), (1 | 1 << 5 | LINEAR | FINAL | ADVANCED, PAGE + 0x18));
    assert_eq!(violation(b.access(0, Op::Write, Who::User)).0 & 7, 2);
}

/// Row F5: with mode-based execute control, bit 10 governs fetches from user-mode linear addresses, whoever fetches.
#[test]
fn f5_mode_based_execute() {
    for (rights, user_ok, supervisor_ok) in
        [(0, false, false), (X, false, true), (XU, true, false), (X | XU, true, true)]
    {
        for user_page in [false, true] {
            let mut b = Bench::new(4, 0);
            b.space.ept_mode_based = true;
            b.set_guest(GUEST + 0x3000, PAGE | if user_page { 0x67 } else { 0x63 });
            b.set_leaf(PAGE, FRAME | WB | R | rights);
            let ok = if user_page { user_ok } else { supervisor_ok };
            for who in [Who::User, Who::Implicit] {
                if who == Who::User && !user_page {
                    continue;
                }
                let r = b.walk(8, Op::Fetch, who);
                if ok {
                    assert_eq!(r, Ok(FRAME + 8));
                } else {
                    let bits = 4 | 1 << 3 | (rights as u32 & 4) << 3 | (rights as u32 >> 10 & 1) << 6;
                    let advanced = u32::from(user_page) << 9 | 1 << 10;
                    assert_eq!(violation(r).0, bits | LINEAR | FINAL | advanced);
                }
                // A read caches the page; what it says of fetches must be right too.
                b.fresh();
                b.access(8, Op::Read, who).unwrap();
                assert_eq!(b.access(8, Op::Fetch, who).is_ok(), ok);
            }
        }
    }
    // Without the control bit 10 means nothing: an entry with it alone is not present.
    let mut b = Bench::new(4, 0);
    b.set_leaf(PAGE, FRAME | WB | XU);
    assert_eq!(violation(b.user(Op::Fetch)).0, 4 | LINEAR | FINAL | ADVANCED);
    b.space.ept_mode_based = true;
    assert_eq!(b.user(Op::Fetch), Ok(FRAME + 8));
}

/// Row F6: what sets which flag; nothing without EPTP bit 6, and nothing by an access that is refused.
#[test]
fn f6_accessed_and_dirty() {
    let flags = |b: &Bench, gpa: u64| [4, 3, 2, 1].map(|l| b.entry(gpa, l) & (A | D));
    for (op, leaf) in [(Op::Read, A), (Op::Fetch, A), (Op::Write, A | D)] {
        let mut b = Bench::new(4, AD);
        b.user(op).unwrap();
        assert_eq!(flags(&b, PAGE), [A, A, A, leaf], "{op:?}");
        for table in 0..4 {
            let at = GUEST + table * 0x1000;
            assert_eq!(flags(&b, at), [A, A, A, A | D], "references to guest tables are writes");
        }
        let mut b = Bench::new(4, 0);
        b.user(op).unwrap();
        assert_eq!(flags(&b, PAGE), [0; 4]);
    }
    let mut b = Bench::new(4, AD);
    b.set_leaf(PAGE, FRAME | WB | R);
    assert!(b.user(Op::Write).is_err());
    assert_eq!(b.entry(PAGE, 1), FRAME | WB | R);
    // The D flag of a large page is in the entry that maps it.
    let mut b = Bench::new(4, AD);
    let at = b.at(PAGE, 2);
    b.set_guest(at, 0x80 | WB | R | W | X);
    b.user(Op::Write).unwrap();
    assert_eq!(b.guest(at), 0x80 | WB | R | W | X | A | D);
}

/// Row F6: a page cached by a read has no write tag while EPT's D flag is clear; the first write walks, sets it, and then has.
#[test]
fn f6_first_write_sets_dirty() {
    let mut b = Bench::new(4, AD);
    b.access(0, Op::Read, Who::User).unwrap();
    assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_some());
    assert!(!b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 1), "no write tag while D = 0");
    assert_eq!(b.entry(PAGE, 1) & D, 0);
    b.access(0, Op::Write, Who::User).unwrap();
    assert_eq!(b.entry(PAGE, 1) & D, D);
    assert!(b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 1));
    // Without flags there is nothing to set.
    let mut b = Bench::new(4, 0);
    b.access(0, Op::Read, Who::User).unwrap();
    assert!(b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 1));
}

/// Row F6: software clears D and invalidates; the next write sets it again.
#[test]
fn f6_dirty_after_clearing() {
    let mut b = Bench::new(4, AD);
    b.access(0, Op::Write, Who::User).unwrap();
    b.set_leaf(PAGE, b.entry(PAGE, 1) & !D);
    b.mmu.invept(b.space.eptp);
    assert!(!b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 1));
    b.access(0, Op::Write, Who::User).unwrap();
    assert_eq!(b.entry(PAGE, 1) & D, D);
}

/// Row F6: software that clears D and has only combined mappings dropped, as a VM entry without VPIDs does, sees it set again.
#[test]
fn f6_dirty_after_clearing_without_invept() {
    for large in [false, true] {
        let mut b = Bench::new(4, AD);
        b.space.vpid = 0;
        if large {
            b.set_guest(b.at(PAGE, 2), 0x80 | WB | R | W | X);
        }
        b.fresh();
        let (level, op) = (if large { 2 } else { 1 }, Op::Write);
        b.access(0, op, Who::User).unwrap();
        b.set_guest(b.at(PAGE, level), b.entry(PAGE, level) & !D);
        let space = b.space;
        let _ = b.mmu.vm_transition(&space, FlushCause::VmEntry, false);
        b.access(0, op, Who::User).unwrap();
        assert_eq!(b.entry(PAGE, level) & D, D);
    }
}

/// Row F7: each page that becomes dirty is logged once, aligned, downwards; at index FFFFH the log is full, and the access that
/// would set a flag is not made.
#[test]
fn f7_page_modification_log() {
    let mut b = Bench::new(4, AD);
    b.fresh();
    b.mmu.set_pml(Some(Pml { address: PhysAddr(LOG), index: 511 }));
    b.access(0x123, Op::Write, Who::User).unwrap();
    let logged: Vec<u64> = (0..6).map(|i| b.guest(LOG + (511 - i) * 8)).collect();
    assert_eq!(logged, [GUEST, GUEST + 0x1000, GUEST + 0x2000, GUEST + 0x3000, PAGE, 0]);
    assert_eq!(b.mmu.pml().unwrap().index, 506);
    b.access(0x456, Op::Write, Who::User).unwrap();
    assert_eq!(b.mmu.pml().unwrap().index, 506, "it was dirty");

    for (index, left) in [(0u16, 0xffff), (512, 512), (0xffff, 0xffff)] {
        b.set_leaf(PAGE, FRAME | WB | R | W | X | A);
        b.mmu.invept(None);
        b.mmu.set_pml(Some(Pml { address: PhysAddr(LOG), index }));
        b.access(0, Op::Read, Who::User).unwrap();
        let r = b.access(0, Op::Write, Who::User);
        assert_eq!(r.is_ok(), index == 0);
        if index != 0 {
            let Err(Fault::Ept(f)) = r else { panic!("{r:?}") };
            assert_eq!((f.kind, f.gpa.0), (EptFaultKind::LogFull, PAGE));
            assert_eq!(b.entry(PAGE, 1) & D, 0);
        }
        assert_eq!(b.mmu.pml().unwrap().index, left);
    }
    // An A flag that must be set looks at the index too.
    b.set_leaf(PAGE, FRAME | WB | R | W | X);
    assert!(matches!(b.user(Op::Read), Err(Fault::Ept(EptFault { kind: EptFaultKind::LogFull, .. }))));
    assert_eq!(b.entry(PAGE, 1) & A, 0);
    // A full log is no matter while nothing has to be set.
    b.set_leaf(PAGE, FRAME | WB | R | W | X | A | D);
    assert_eq!(b.user(Op::Write), Ok(FRAME + 8));
}

/// Row F8: whether a violation may become #VE is said by bit 63 of the entry that is not present, else of the leaf.
#[test]
fn f8_suppress_ve() {
    let suppressed = |b: &mut Bench| match b.user(Op::Write) {
        Err(Fault::Ept(f)) => f.suppress_ve,
        other => panic!("{other:?}"),
    };
    for bit in [0, 1 << 63] {
        let mut b = Bench::new(4, 0);
        b.set_leaf(PAGE, bit);
        assert_eq!(suppressed(&mut b), bit != 0);
        b.set_leaf(PAGE, FRAME | WB | R | bit);
        assert_eq!(suppressed(&mut b), bit != 0);
        // In an entry that references a table the bit means nothing.
        let at = b.at(PAGE, 2);
        b.set_guest(at, b.guest(at) | 1 << 63);
        assert_eq!(suppressed(&mut b), bit != 0);
        b.set_guest(at, bit);
        assert_eq!(suppressed(&mut b), bit != 0);
    }
}

/// Row F11: the memory type and ignore-PAT of EPT, and the guest's PAT index, are in the mapping.
#[test]
fn f11_memory_types() {
    for (memory_type, ignore) in [(0u8, false), (1, true), (4, false), (5, true), (6, false)] {
        let mut b = Bench::new(4, 0);
        b.set_guest(GUEST + 0x3000, PAGE | 0x67 | 1 << 3 | 1 << 7);
        b.set_leaf(PAGE, FRAME | u64::from(memory_type) << 3 | u64::from(ignore) << 6 | R);
        b.user(Op::Read).unwrap();
        let m = b.mmu.probe(&b.space, LinearAddr(0)).unwrap();
        assert_eq!((m.stage2.memory_type, m.pat_index), (Some((memory_type, ignore)), 5));
    }
}

/// Row F12: PDPTE loads are reads that are no part of a linear address's translation; they set no D flag.
#[test]
fn f12_pdpte_loads() {
    for flags in [0, AD] {
        let mut b = Bench::new(4, flags);
        b.set_guest(PAGE + 0x20, 0);
        b.set_guest(FRAME + 0x20, 0x5001);
        assert_eq!(b.mmu.load_pdptes(&b.space, PAGE + 0x20), Ok([0x5001, 0, 0, 0]));
        assert_eq!(b.entry(PAGE, 1) & (A | D), if flags == AD { A } else { 0 });
        b.set_guest(FRAME + 0x28, 3);
        assert_eq!(b.mmu.load_pdptes(&b.space, PAGE + 0x20), Err(PdpteError::Reserved { index: 1 }));
        b.set_leaf(PAGE, FRAME | WB | R);
        b.set_guest(FRAME + 0x28, 0);
        assert!(b.mmu.load_pdptes(&b.space, PAGE + 0x20).is_ok(), "no write");
        b.set_leaf(PAGE, FRAME | WB | X);
        let Err(PdpteError::Ept(f)) = b.mmu.load_pdptes(&b.space, PAGE + 0x20) else { panic!() };
        assert_eq!((f.kind, f.gpa.0, f.la), (EptFaultKind::Violation(1 | 1 << 5), PAGE + 0x20, None));
        b.set_leaf(PAGE, FRAME | 7 << 3 | R);
        let Err(PdpteError::Ept(f)) = b.mmu.load_pdptes(&b.space, PAGE + 0x20) else { panic!() };
        assert_eq!(f.kind, EptFaultKind::Misconfiguration);
    }
}

/// Guest-physical reads and writes: through EPT, every page checked first; without EPT, physical.
#[test]
fn guest_physical_memory() {
    let mut b = Bench::new(4, AD);
    b.set_leaf(PAGE + 0x1000, 0x4_0000 | WB | R);
    let space = b.space;
    b.mmu.guest_phys_write(&space, GuestPhysAddr(PAGE + 0xff8), &[7; 8]).unwrap();
    assert_eq!(b.guest(FRAME + 0xff8), 0x0707_0707_0707_0707);
    assert_eq!(b.entry(PAGE, 1) & D, D);
    let mut buf = [0; 16];
    b.mmu.guest_phys_read(&space, GuestPhysAddr(PAGE + 0xff8), &mut buf).unwrap();
    assert_eq!(buf[..9], [7, 7, 7, 7, 7, 7, 7, 7, 0]);
    let fault = b.mmu.guest_phys_write(&space, GuestPhysAddr(PAGE + 0xff8), &[9; 16]).unwrap_err();
    assert_eq!((fault.kind, fault.gpa.0), (EptFaultKind::Violation(2 | 1 << 3), PAGE + 0x1000));
    assert_eq!(b.guest(FRAME + 0xff8), 0x0707_0707_0707_0707, "nothing was written");
    let l1 = AddressSpace { eptp: None, ..space };
    assert_eq!(b.mmu.guest_phys(&l1, GuestPhysAddr(0x1234), AccessKind::Write), Ok(PhysAddr(0x1234)));
    assert_eq!(b.mmu.guest_phys_probe(&space, GuestPhysAddr(PAGE + 1)), Ok(PhysAddr(FRAME + 1)));
}

/// Row D2 and E5: guest-physical mappings are cached: another linear address walks the guest's tables and EPT no more; and a
/// VM exit and re-entry with the same VPID walk nothing at all.
#[test]
fn d2_e5_nothing_is_walked_twice() {
    let mut b = Bench::new(4, AD);
    b.set_guest(GUEST + 0x3008, PAGE | 0x67);
    b.access(0, Op::Write, Who::User).unwrap();
    let walks = b.mmu.stats().ept_walks;
    assert!(walks >= 5);
    b.access(0x1000, Op::Write, Who::User).unwrap();
    assert_eq!(b.mmu.stats().ept_walks, walks);
    assert_eq!(b.mmu.stats().misses, 2);
    let l1 = AddressSpace { eptp: None, vpid: 0, ..b.space };
    for _ in 0..3 {
        let _ = b.mmu.vm_transition(&l1, FlushCause::VmExit, true);
        let _ = b.mmu.vm_transition(&b.space, FlushCause::VmEntry, true);
        assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_some());
        b.access(0x1000, Op::Write, Who::User).unwrap();
    }
    assert_eq!((b.mmu.stats().ept_walks, b.mmu.stats().misses), (walks, 2));
    // Row C6: L2's own flushes walk the guest's tables again, EPT never.
    let space = b.space;
    let _ = b.mmu.mov_cr3(&space, false);
    b.access(0, Op::Write, Who::User).unwrap();
    b.mmu.invlpg(&space, LinearAddr(0));
    b.access(0, Op::Write, Who::User).unwrap();
    assert_eq!((b.mmu.stats().ept_walks, b.mmu.stats().misses), (walks, 4));
}

/// Row C5: without VPIDs a transition drops what L2 cached for linear addresses, and no guest-physical mapping (E4).
#[test]
fn c5_e4_transitions_without_vpids() {
    let mut b = Bench::new(4, 0);
    b.space.vpid = 0;
    b.fresh();
    b.access(0, Op::Read, Who::User).unwrap();
    let (walks, misses) = (b.mmu.stats().ept_walks, b.mmu.stats().misses);
    let l1 = AddressSpace { eptp: None, ..b.space };
    let _ = b.mmu.vm_transition(&l1, FlushCause::VmExit, false);
    let _ = b.mmu.vm_transition(&b.space, FlushCause::VmEntry, false);
    assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_none());
    b.access(0, Op::Read, Who::User).unwrap();
    assert_eq!((b.mmu.stats().ept_walks, b.mmu.stats().misses), (walks, misses + 1));
}

/// Row D3: without paging, EPT alone translates; each guest-physical page on its own.
#[test]
fn d3_no_paging() {
    let mut b = Bench::new(4, 0);
    b.space.mode = twofold_mmu::PagingMode::None;
    assert_eq!(b.walk(PAGE + 5, Op::Write, Who::Implicit), Ok(FRAME + 5));
    assert_eq!(b.access(PAGE + 0x1005, Op::Read, Who::Implicit), Ok(PAGE + 0x1005));
    assert_eq!(b.mmu.stats().entries_read, 0, "no guest entry");
}

/// Row D4: what was not present or misconfigured needs no invalidation to become usable.
#[test]
fn d4_nothing_is_made_of_bad_entries() {
    for bad in [0, FRAME | WB | W, FRAME | 7 << 3 | R] {
        let mut b = Bench::new(4, 0);
        b.set_leaf(PAGE, bad);
        assert!(b.user(Op::Read).is_err());
        b.set_leaf(PAGE, FRAME | WB | R);
        assert_eq!(b.access(0, Op::Read, Who::User), Ok(FRAME));
    }
}

/// Row D5: the same VPID and PCID under two EP4TAs, and two VPIDs under one, side by side.
#[test]
fn d5_tags_do_not_leak() {
    let mut b = Bench::new(4, 0);
    // Another EPT, which puts the page elsewhere.
    let other = 0x8000;
    for l in 1..4u64 {
        b.set_guest(other + (l - 1) * 0x1000, (other + l * 0x1000) | 7);
    }
    for page in 0..0x80u64 {
        b.set_guest(other + 0x3000 + page * 8, page << 12 | WB | 7);
    }
    let second = AddressSpace { eptp: Some(other | 3 << 3 | 6), ..b.space };
    let third = AddressSpace { vpid: 2, ..b.space };
    let first = b.space;
    for _ in 0..2 {
        for (space, place) in [(&first, FRAME), (&second, PAGE), (&third, FRAME)] {
            let _ = b.mmu.switch_eptp(space);
            let t = b.mmu.translate(space, LinearAddr(0), access_of(Op::Read, Who::User)).unwrap();
            assert_eq!(t.pa.0, place);
        }
    }
    assert_eq!(b.mmu.stats().misses, 3, "all three were still there");
    b.mmu.invept(second.eptp);
    for (space, cached) in [(&first, true), (&second, false), (&third, true)] {
        let _ = b.mmu.switch_eptp(space);
        assert_eq!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_some(), cached);
    }
}

/// Row D7: the same EP4TA with accessed and dirty flags turned on, and with another walk length: the flags are kept from then on
/// whatever was cached.
#[test]
fn d7_changed_eptp_controls() {
    let mut b = Bench::new(4, 0);
    b.access(0, Op::Write, Who::User).unwrap();
    assert!(b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 1));
    b.space.eptp = b.space.eptp.map(|e| e | AD);
    let _ = b.mmu.vm_transition(&b.space, FlushCause::VmEntry, true);
    b.access(0, Op::Write, Who::User).unwrap();
    assert_eq!(b.entry(PAGE, 1) & (A | D), A | D);
    // Read as a 5-level walk, the same tables give other pages: the PML4 is taken for a PML5, and so on down.
    b.space.eptp = b.space.eptp.map(|e| e & !(7 << 3) | 4 << 3);
    let _ = b.mmu.vm_transition(&b.space, FlushCause::VmEntry, true);
    assert!(b.access(0, Op::Write, Who::User).is_err());
}

/// Row E2: INVEPT, single and all, drops combined and guest-physical mappings; before it the old ones may be used.
#[test]
fn e2_invept() {
    for single in [true, false] {
        let mut b = Bench::new(4, 0);
        b.access(0, Op::Read, Who::User).unwrap();
        b.set_leaf(PAGE, 0x4_0000 | WB | R);
        assert_eq!(b.access(0, Op::Read, Who::User), Ok(FRAME), "still cached");
        // A guest-physical mapping serves another linear address.
        b.set_guest(GUEST + 0x3008, PAGE | 0x67);
        assert_eq!(b.access(0x1000, Op::Read, Who::User), Ok(FRAME));
        b.mmu.invept(b.space.eptp.filter(|_| single));
        assert_eq!(b.access(0, Op::Read, Who::User), Ok(0x4_0000));
        assert_eq!(b.access(0x1000, Op::Read, Who::User), Ok(0x4_0000));
    }
}

/// Row E2: INVEPT of one region's EPT page table: a table that was freed is not read again.
#[test]
fn e2_invept_forgets_tables() {
    let mut b = Bench::new(4, 0);
    b.access(0, Op::Read, Who::User).unwrap();
    // The same page table elsewhere, with the page on another frame.
    for page in 0..0x80u64 {
        b.set_guest(0x9000 + page * 8, b.guest(EPT + 0x3000 + page * 8));
    }
    b.set_guest(0x9000 + (PAGE >> 12) * 8, 0x4_0000 | WB | R);
    let at = b.at(PAGE, 2);
    b.set_guest(at, 0x9000 | 7);
    b.mmu.invept(b.space.eptp);
    b.set_guest(EPT + 0x3000 + (PAGE >> 12) * 8, 0x5_0000 | WB | R);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(0x4_0000));
}

/// Row E3: a violation drops the mappings of its address; others stay.
#[test]
fn e3_violations_drop_the_address() {
    let mut b = Bench::new(4, 0);
    b.set_guest(GUEST + 0x3008, (PAGE + 0x1000) | 0x67);
    b.set_leaf(PAGE, FRAME | WB | R);
    b.access(0, Op::Read, Who::User).unwrap();
    b.access(0x1000, Op::Read, Who::User).unwrap();
    b.set_leaf(PAGE, 0x4_0000 | WB | R);
    b.set_leaf(PAGE + 0x1000, 0x5_0000 | WB | R);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(FRAME), "old, and allowed");
    assert_eq!(violation(b.access(0, Op::Write, Who::User)).1, PAGE);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(0x4_0000), "dropped by the violation");
    assert_eq!(b.access(0x1000, Op::Read, Who::User), Ok(PAGE + 0x1000), "not this one's");
    assert_eq!(b.mmu.stats().flushes_by(FlushCause::EptViolation), 1);
}

/// Row E3: a violation in a 2 MiB page drops its guest-physical mapping, which serves other linear addresses too.
#[test]
fn e3_violations_drop_large_pages() {
    let mut b = Bench::new(4, 0);
    b.set_guest(GUEST + 0x3008, (PAGE + 0x1000) | 0x67);
    let at = b.at(PAGE, 2);
    b.set_guest(at, 0x80 | WB | R | X);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(PAGE));
    // The tables are on that page too, and it moves to page tables; all but one page where it was.
    b.set_guest(at, (EPT + 0x3000) | R | W | X);
    b.set_leaf(PAGE, FRAME | WB | R);
    assert_eq!(violation(b.access(0, Op::Write, Who::User)).1, PAGE);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(FRAME));
    assert_eq!(b.access(0x1000, Op::Read, Who::User), Ok(PAGE + 0x1000));
}

/// Row E1: INVVPID of one VPID drops global pages, its retaining kind does not; of all VPIDs, not VPID 0000H.
#[test]
fn e1_invvpid_and_global_pages() {
    use twofold_mmu::Invvpid;
    for (what, local, global) in [
        (Invvpid::Single { vpid: 1 }, false, false),
        (Invvpid::SingleRetainingGlobals { vpid: 1 }, false, true),
        (Invvpid::All, false, false),
        (Invvpid::Single { vpid: 2 }, true, true),
        (Invvpid::Address { vpid: 1, la: LinearAddr(0x1fff) }, true, false),
    ] {
        let mut b = Bench::new(4, 0);
        b.space.pge = true;
        b.set_guest(GUEST + 0x3008, PAGE | 0x167);
        b.fresh();
        let walks = |b: &Bench| b.mmu.stats().ept_walks;
        for la in [0, 0x1000] {
            b.access(la, Op::Read, Who::User).unwrap();
        }
        let before = walks(&b);
        b.mmu.invvpid(what);
        let cached = |la| b.mmu.load_cached(MemMode::User, LinearAddr(la), 8).is_some();
        assert_eq!((cached(0), cached(0x1000)), (local, global), "{what:?}");
        b.access(0, Op::Read, Who::User).unwrap();
        assert_eq!(walks(&b), before, "no guest-physical mapping goes");
    }
    let mut b = Bench::new(4, 0);
    b.space.vpid = 0;
    b.fresh();
    b.access(0, Op::Read, Who::User).unwrap();
    b.mmu.invvpid(Invvpid::All);
    assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_some());
}

/// Row C6: what L2 invalidates is of its VPID alone.
#[test]
fn c6_l2_invalidates_its_own_vpid() {
    for operation in 0..4 {
        let mut b = Bench::new(4, 0);
        let (l2, other) = (b.space, AddressSpace { vpid: 2, ..b.space });
        for space in [&other, &l2] {
            let _ = b.mmu.vm_transition(space, FlushCause::VmEntry, true);
            b.mmu.translate(space, LinearAddr(0), access_of(Op::Read, Who::User)).unwrap();
        }
        let walks = b.mmu.stats().ept_walks;
        match operation {
            0 => drop(b.mmu.mov_cr3(&l2, false)),
            1 => b.mmu.invlpg(&l2, LinearAddr(0)),
            2 => b.mmu.invpcid(&l2, twofold_mmu::Invpcid::AllWithGlobals),
            _ => drop(b.mmu.controls_changed(&l2, &AddressSpace { pge: !l2.pge, ..l2 })),
        }
        assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_none(), "operation {operation}");
        let _ = b.mmu.vm_transition(&other, FlushCause::VmEntry, true);
        assert!(b.mmu.load_cached(MemMode::User, LinearAddr(0), 8).is_some(), "operation {operation}");
        let _ = b.mmu.vm_transition(&l2, FlushCause::VmEntry, true);
        b.access(0, Op::Read, Who::User).unwrap();
        assert_eq!(b.mmu.stats().ept_walks, walks, "guest-physical mappings stay");
    }
}

/// Rows B1, B2 and E6 as far as translations go: two processors, each with its own cache; a change reaches one by its own
/// invalidation, and after that the old frame takes no write.
#[test]
fn b1_b2_e6_shootdown_on_two_processors() {
    let mut b = Bench::new(4, 0);
    let space = b.space;
    let mut second = b.machine.mmu(FlushPolicy::Tagged);
    let _ = second.reset(&space);
    let write = access_of(Op::Write, Who::User);
    for mmu in [&mut b.mmu, &mut second] {
        assert!(mmu.write(&space, LinearAddr(0), 8, 1, write).is_ok());
    }
    // Either stage moves the page.
    for nested in [false, true] {
        let (old, new) = if nested { (0x5_0000, 0x4_0000) } else { (FRAME, 0x5_0000) };
        if nested {
            b.set_leaf(0x5_0000, 0x4_0000 | WB | R | W | X);
            b.mmu.invept(space.eptp);
        } else {
            b.set_guest(GUEST + 0x3000, 0x5_0000 | 0x67);
            b.mmu.invlpg(&space, LinearAddr(0));
        }
        b.mmu.write(&space, LinearAddr(0), 8, 2, write).unwrap();
        assert_eq!(b.guest(new), 2);
        second.write(&space, LinearAddr(0), 8, 3, write).unwrap();
        assert_eq!((b.guest(old), b.guest(new)), (3, 2), "the other processor's mapping is old, whole and allowed");
        if nested {
            second.invept(space.eptp);
        } else {
            second.invlpg(&space, LinearAddr(0));
        }
        second.write(&space, LinearAddr(0), 8, 4, write).unwrap();
        assert_eq!((b.guest(old), b.guest(new)), (3, 4), "nothing goes to the old frame");
    }
}

/// Row B3: looking at translations, as a tracer or an ahead-of-time translator does, sets no flag in either stage and faults nowhere.
#[test]
fn b3_looking_changes_nothing() {
    let mut b = Bench::new(4, AD);
    b.mmu.set_pml(Some(Pml { address: PhysAddr(LOG), index: 511 }));
    b.set_guest(GUEST + 0x3000, PAGE | 7);
    let before = b.machine.memory();
    let stats = *b.mmu.stats();
    assert_eq!(b.mmu.probe(&b.space, LinearAddr(0)).unwrap().page, PhysAddr(FRAME));
    let _ = b.mmu.trace_walk(&b.space, LinearAddr(0), access_of(Op::Write, Who::User));
    b.mmu.guest_phys_probe(&b.space, GuestPhysAddr(PAGE)).unwrap();
    assert!(b.machine.memory() == before);
    assert_eq!((*b.mmu.stats(), b.mmu.pml().unwrap().index), (stats, 511));
}

/// Rows A10 and E3: rights that software added without an invalidation are seen: a cached refusal is never delivered.
#[test]
fn a10_no_spurious_violation() {
    let mut b = Bench::new(4, 0);
    b.set_leaf(PAGE, FRAME | WB | R);
    b.access(0, Op::Read, Who::User).unwrap();
    b.set_leaf(PAGE, FRAME | WB | R | W | X);
    assert_eq!(b.access(0, Op::Write, Who::User), Ok(FRAME));
    assert_eq!(b.access(0, Op::Fetch, Who::User), Ok(FRAME));
    // Nor a page fault that comes of a page table's old place.
    let pt = GUEST + 0x3000;
    b.set_leaf(pt, 0x7_0000 | WB | 7);
    b.set_guest(0x7_0008, PAGE | 0x67);
    assert_eq!(b.access(0x1000, Op::Read, Who::User), Ok(FRAME));
}

/// Row A9 under EPT: a 2 MiB page of the guest on 4 KiB pages of EPT is cached in pieces, and INVLPG drops them all.
#[test]
fn a9_invlpg_of_a_large_page_on_small_ones() {
    let mut b = Bench::new(4, 0);
    b.set_guest(GUEST + 0x2000, 0xe7);
    for page in [0x20u64, 0x21, 0x30] {
        b.access(page << 12, Op::Read, Who::User).unwrap();
    }
    let space = b.space;
    b.mmu.invlpg(&space, LinearAddr(0x1_0000));
    for page in [0x20u64, 0x21, 0x30] {
        assert!(b.mmu.load_cached(MemMode::User, LinearAddr(page << 12), 8).is_none());
    }
}

/// The policy `full` drops guest-physical mappings too, at everything.
#[test]
fn e2_full_policy() {
    let mut b = Bench::with_policy(4, 0, FlushPolicy::Full);
    b.access(0, Op::Read, Who::User).unwrap();
    b.set_leaf(PAGE, 0x4_0000 | WB | R);
    let space = b.space;
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(FRAME));
    let _ = b.mmu.vm_transition(&space, FlushCause::VmEntry, true);
    assert_eq!(b.access(0, Op::Read, Who::User), Ok(0x4_0000));
}

/// EPT tables, log and frames anywhere: outside RAM, in a device's place, at the end of the address space. No panic, and nothing
/// found where nothing is.
#[test]
fn bad_addresses() {
    for top in [0xa_0000u64, 0x7_f000, 0xffff_f000, 0x000f_ffff_ffff_f000] {
        for flags in [0, AD] {
            let mut b = Bench::new(4, flags);
            b.space.maxphyaddr = 52;
            b.space.eptp = Some(top | 3 << 3 | flags | 6);
            b.mmu.set_pml(Some(Pml { address: PhysAddr(!0xfff), index: 511 }));
            let r = b.user(Op::Write);
            assert!(matches!(r, Err(Fault::Ept(_))), "{top:#x}: {r:?}");
        }
    }
    let mut b = Bench::new(4, AD);
    b.space.maxphyaddr = 52;
    b.mmu.set_pml(Some(Pml { address: PhysAddr(!0xfff), index: 511 }));
    b.set_leaf(PAGE, 0x000f_ffff_ffff_f000 | WB | R | W | X);
    let t = b.mmu.translate(&b.space, LinearAddr(8), access_of(Op::Write, Who::User)).unwrap();
    assert_eq!((t.pa.0, t.host), (0x000f_ffff_ffff_f008, None));
}

/// The sub-page-permission table, topmost first.
const SPPT: u64 = 0x7_0000;
const SPP: u64 = 1 << 61;

/// A machine whose page at linear 0 cannot be written to but for the sub-pages in `vector`.
fn with_sub_pages(levels: u64, flags: u64, vector: u64) -> Bench {
    let mut b = Bench::new(levels, flags);
    for at in [SPPT, SPPT + 0x1000, SPPT + 0x2000] {
        b.set_guest(at, (at + 0x1000) | 1);
    }
    b.set_guest(SPPT + 0x3000 + (PAGE >> 9), vector);
    b.set_leaf(PAGE, FRAME | WB | R | X | XU | SPP);
    b.space.ept_sub_pages = Some(SPPT);
    b
}

/// Sub-pages 0, 1 and 3.
const SOME: u64 = 1 | 1 << 2 | 1 << 6;

/// Row F10: each write asks for the permission of its 128 bytes; what is refused is an EPT violation like another.
#[test]
fn f10_sub_page_permissions() {
    for (levels, flags) in [(4, 0), (4, AD), (5, AD)] {
        let mut b = with_sub_pages(levels, flags, SOME);
        b.fresh();
        let write = access_of(Op::Write, Who::User);
        let refused = 2 | 1 << 3 | 1 << 5 | LINEAR | FINAL | ADVANCED;
        for la in (0..0x1000).step_by(64).chain((0..0x1000).rev().step_by(64)) {
            let t = b.mmu.translate(&b.space, LinearAddr(la), write);
            if SOME >> (la / 128 * 2) & 1 != 0 {
                let t = t.unwrap();
                assert_eq!((t.pa.0, t.host, t.sub_page), (FRAME + la, None, true));
            } else {
                assert_eq!(violation(t.map(|t| t.pa.0)), (refused, PAGE + la));
            }
            let t = b.mmu.translate(&b.space, LinearAddr(la), access_of(Op::Read, Who::User)).unwrap();
            assert!(t.host.is_some() && !t.sub_page);
            assert!(!b.mmu.store_cached(MemMode::User, LinearAddr(0), 8, 0));
        }
        // Nothing of the table is cached.
        b.set_guest(SPPT + 0x3000 + (PAGE >> 9), SOME | 1 << 4);
        assert_eq!(b.access(0x100, Op::Write, Who::User), Ok(FRAME + 0x100));
        b.space.ept_sub_pages = None;
        assert_eq!(violation(b.access(0, Op::Write, Who::User)), (refused, PAGE));
    }
}

/// Row F10: a write completes when all the sub-pages it touches allow it; else nothing of it is made.
#[test]
fn f10_writes_across_sub_pages() {
    let mut b = with_sub_pages(4, 0, SOME);
    b.fresh();
    let access = access_of(Op::Write, Who::User);
    for (la, fails) in [(0x7c, None), (0xf8, None), (0xfc, Some(0x100)), (0x17c, Some(0x17c)), (0x1fc, Some(0x200))] {
        b.set_guest(FRAME + la, 0);
        let r = b.mmu.write(&b.space, LinearAddr(la), 8, 0x1111_1111_1111_1111, access);
        match fails {
            None => assert!(r.is_ok() && b.guest(FRAME + la) == 0x1111_1111_1111_1111),
            Some(at) => assert_eq!((violation(r.map(|_| 0)).1, b.guest(FRAME + la)), (PAGE + at, 0)),
        }
    }
    let bytes = |b: &mut Bench, n: usize| b.mmu.write_bytes(&b.space, LinearAddr(0x10), &vec![0x22; n], access);
    assert!(bytes(&mut b, 0xf0).is_ok());
    assert_eq!(b.guest(FRAME + 0xf8), 0x2222_2222_2222_2222);
    b.set_guest(FRAME + 0x10, 0);
    assert_eq!(violation(bytes(&mut b, 0x1f0).map(|_| 0)).1, PAGE + 0x100);
    assert_eq!(b.guest(FRAME + 0x10), 0);
}

/// Row F10: which pages and which accesses are eligible.
#[test]
fn f10_what_is_eligible() {
    let mut b = with_sub_pages(4, 0, 0);
    let is_violation = |r| violation(r).0 & 7 == 2;
    // A page that can be written to does not ask; one that cannot be read is not eligible; a right that is missing above is.
    b.set_leaf(PAGE, FRAME | WB | R | W | X | SPP);
    assert_eq!(b.user(Op::Write), Ok(FRAME + 8));
    b.set_guest(SPPT + 0x3000 + (PAGE >> 9), SOME);
    b.set_leaf(PAGE, FRAME | WB | X | SPP);
    assert!(is_violation(b.user(Op::Write)));
    b.set_leaf(PAGE, FRAME | WB | R | SPP);
    let at = b.at(PAGE, 2);
    b.set_guest(at, b.guest(at) & !W);
    assert_eq!(b.user(Op::Write), Ok(FRAME + 8));
    // A large page; and an address that is the translation of no linear address.
    b.set_guest(at, R | WB | 1 << 7 | SPP);
    assert!(is_violation(b.user(Op::Write)));
    let mut b = with_sub_pages(4, 0, SOME);
    b.fresh();
    assert!(b.mmu.guest_phys(&b.space, GuestPhysAddr(PAGE), AccessKind::Write).is_err());
    // A flag to set in a guest paging-structure entry.
    b.set_guest(SPPT + 0x3000 + ((GUEST + 0x3000) >> 9), 0x5555_5555_5555_5555);
    b.set_leaf(GUEST + 0x3000, (GUEST + 0x3000) | WB | R | SPP);
    b.set_guest(GUEST + 0x3000, PAGE | 7);
    assert_eq!(violation(b.user(Op::Read)), (3 | 1 << 3 | LINEAR, GUEST + 0x3000));
    b.set_guest(GUEST + 0x3000, PAGE | 0x67);
    assert_eq!(b.user(Op::Write), Ok(FRAME + 8));
}

/// Row F10: a write that is allowed sets the dirty flag and is logged.
#[test]
fn f10_dirty_flag_and_log() {
    let mut b = with_sub_pages(4, AD, SOME);
    b.fresh();
    for page in 0..4 {
        b.set_leaf(GUEST + page * 0x1000, (GUEST + page * 0x1000) | WB | R | W | A | D);
    }
    b.mmu.set_pml(Some(Pml { address: PhysAddr(LOG), index: 511 }));
    b.access(0x8, Op::Write, Who::User).unwrap();
    b.access(0x88, Op::Write, Who::User).unwrap();
    assert_eq!(b.entry(PAGE, 1) & (A | D | W), A | D);
    assert_eq!((b.guest(LOG + 511 * 8), b.mmu.pml().unwrap().index), (PAGE, 510));
}

/// Row F10: SPP misses and SPP misconfigurations.
#[test]
fn f10_misses_and_misconfigurations() {
    let event = |b: &mut Bench| match b.user(Op::Write) {
        Err(Fault::Ept(EptFault { kind: EptFaultKind::SubPage { miss }, gpa, la, .. })) => {
            assert_eq!((gpa.0 & 0xfff, la), (8, Some(LinearAddr(8))));
            miss
        }
        other => panic!("{other:x?}"),
    };
    let mut b = with_sub_pages(4, 0, SOME);
    for at in [SPPT, SPPT + 0x1000, SPPT + 0x2000] {
        let good = b.guest(at);
        for bit in (1..12).chain(46..64) {
            b.set_guest(at, good | 1 << bit);
            assert!(!event(&mut b), "bit {bit}");
            b.set_guest(at, (good | 1 << bit) & !1);
            assert!(event(&mut b), "bit {bit}");
        }
        b.set_guest(at, 0);
        assert!(event(&mut b));
        // Only writes that the EPT entries refuse get that far.
        assert_eq!(b.user(Op::Read), Ok(FRAME + 8));
        b.set_guest(at, good);
        assert_eq!(b.user(Op::Write), Ok(FRAME + 8));
    }
    for bit in (1..64).step_by(2) {
        b.set_guest(SPPT + 0x3000 + (PAGE >> 9), SOME | 1 << bit);
        assert!(!event(&mut b));
    }
    b.set_guest(SPPT + 0x1000, 0);
    let text = b.mmu.trace_walk(&b.space, LinearAddr(8), access_of(Op::Write, Who::User)).to_string();
    assert!(text.contains("EPT SPP miss: the L3E is not valid") && text.contains("R X XU SPP"), "{text}");
    // An address that four levels do not cover.
    let mut b = with_sub_pages(5, 0, SOME);
    b.space.maxphyaddr = 52;
    b.set_guest(EPT + 8, (EPT + 0x1000) | R | W | X | XU);
    b.set_guest(GUEST + 0x3000, 1 << 48 | PAGE | 0x67);
    assert!(event(&mut b));
}

/// `-d mmu`: the steps of a nested walk, and what decided.
#[test]
fn traces_tell_what_decided() {
    let mut b = Bench::new(4, 0);
    b.set_leaf(PAGE, FRAME | WB | R);
    let write = access_of(Op::Write, Who::User);
    let t = b.mmu.trace_walk(&b.space, LinearAddr(8), write);
    assert_eq!(t.steps.len(), 5);
    assert!(t.steps.iter().all(|s| s.ept.len() == 4));
    let text = t.to_string();
    assert!(text.contains("EPT violation: the entries do not all have W"), "{text}");
    assert_eq!(violation(b.user(Op::Write)).1, PAGE + 8);
    let at = b.at(GUEST + 0x2000, 2);
    b.set_guest(at, 1 << 45 | 7);
    b.space.maxphyaddr = 40;
    let text = b.mmu.trace_walk(&b.space, LinearAddr(8), write).to_string();
    assert!(text.contains("EPT misconfiguration: reserved bits 0x200000000000 are set"), "{text}");
    let direct = AddressSpace { eptp: None, ..b.space };
    for (entry, expected) in [
        (0, "the PTE is not present"),
        (PAGE | 0x65, "RW is 0 in the PTE"),
        (PAGE | 0x63, "US is 0 in the PTE"),
        (PAGE | 0x67 | 1 << 41, "reserved bits 0x20000000000 are set in the PTE"),
    ] {
        b.set_guest(GUEST + 0x3000, entry);
        let text = b.mmu.trace_walk(&direct, LinearAddr(8), write).to_string();
        assert!(text.contains(expected), "{text}");
    }
    assert_eq!(b.entry(PAGE, 1), FRAME | WB | R, "nothing was changed");
}
