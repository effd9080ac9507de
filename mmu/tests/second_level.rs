//! The second level of the TLB: large pages are cached as such, and page tables, so that a miss in the first walks nothing or reads one
//! entry; and what takes that away.

mod common;
mod model;

use common::{Machine, plain, space_of};
use model::Mode;
use twofold_arch::tbflags::MemMode;
use twofold_arch::{LinearAddr, PhysAddr};
use twofold_mmu::{Access, AddressSpace, FlushPolicy, Invpcid, Invvpid, Mmu};

const READ: Access = Access::read(MemMode::User);
const WRITE: Access = Access::write(MemMode::User);
const TOP: u64 = 0x1000;
const TABLE: u64 = 0x8000;
/// P, RW, US, A, D.
const ALL: u64 = 0x67;

struct Guest {
    m: Machine,
    mmu: Mmu,
    space: AddressSpace,
}

/// How a miss was answered.
#[derive(PartialEq, Eq, Debug)]
enum By {
    /// No miss.
    First,
    LargePage,
    PageTable,
    Walk,
}

impl Guest {
    fn new(mode: Mode) -> Self {
        let m = Machine::new();
        let cpu = model::Cpu { cr3: TOP, pse: true, ..plain(mode) };
        let pcid = u16::from(matches!(mode, Mode::Four | Mode::Five));
        let mut space = AddressSpace { pcide: pcid != 0, pcid, ..space_of(&cpu) };
        space.pdptes[0] = 0x3001;
        let mut mmu = m.mmu(FlushPolicy::Tagged);
        let _ = mmu.reset(&space);
        Self { m, mmu, space }
    }

    /// 4-level paging with this entry for the first 1 GiB, or for the first 2 MiB.
    fn four_level(pdpte: Option<u64>, pde: u64) -> Self {
        let g = Self::new(Mode::Four);
        g.set(TOP, 0x2000 | ALL);
        g.set(0x2000, pdpte.unwrap_or(0x3000 | ALL));
        g.set(0x3000, pde);
        (0..512).for_each(|i| g.set(TABLE + i * 8, (i % 64) << 12 | ALL));
        g
    }

    fn set(&self, at: u64, entry: u64) {
        self.m.ram().store_u64(at, entry);
    }

    fn access(&mut self, la: u64, access: Access) -> (By, Option<PhysAddr>) {
        let before = *self.mmu.stats();
        let pa = self.mmu.translate(&self.space, LinearAddr(la), access).ok().map(|t| t.pa);
        let now = self.mmu.stats();
        let walks = now.walks.iter().sum::<u64>() - before.walks.iter().sum::<u64>();
        let (pages, tables) =
            (now.large_page_hits - before.large_page_hits, now.page_table_hits - before.page_table_hits);
        assert_eq!(now.misses - before.misses, walks + pages + tables);
        let by = match (walks, pages, tables) {
            (0, 0, 0) => By::First,
            (0, 1, 0) => By::LargePage,
            (0, 0, 1) => By::PageTable,
            _ => By::Walk,
        };
        let read = now.entries_read - before.entries_read;
        assert!(by == By::Walk || read == tables, "{read} entries read for {by:?}");
        (by, pa)
    }
}

/// One walk for a large page of every size and mode; each of its 4 KiB pages after that is filled without.
#[test]
fn large_pages_are_cached_whole() {
    let large = |pa: u64| pa | 0x80 | ALL;
    for (mut g, size) in [(Guest::four_level(Some(large(0)), 0), 1 << 30), (Guest::four_level(None, large(0)), 1 << 21)]
    {
        assert_eq!(g.access(0x1008, READ), (By::Walk, Some(PhysAddr(0x1008))));
        assert_eq!(g.access(0x5010, READ), (By::LargePage, Some(PhysAddr(0x5010))));
        assert_eq!(g.access(size - 8, WRITE), (By::LargePage, Some(PhysAddr(size - 8))));
        assert_eq!(g.access(0x1008, WRITE).0, By::First);
    }
    let mut pae = Guest::new(Mode::Pae);
    pae.set(0x3000, large(0));
    assert_eq!([pae.access(8, READ).0, pae.access(0x1f_f000, WRITE).0], [By::Walk, By::LargePage]);
    // A 4 MiB page is two regions.
    let mut old = Guest::new(Mode::ThirtyTwo);
    old.set(TOP, large(0));
    assert_eq!([old.access(8, READ).0, old.access(0x1000, WRITE).0], [By::Walk, By::LargePage]);
    assert_eq!([old.access(0x20_0000, READ).0, old.access(0x20_1000, WRITE).0], [By::Walk, By::LargePage]);
    old.mmu.invlpg(&old.space.clone(), LinearAddr(0x3f_f000));
    assert_eq!([old.access(8, READ).0, old.access(0x20_0000, READ).0], [By::Walk, By::Walk]);
}

/// A page table that a walk went through is read directly, in every mode, whatever the linear address within its region.
#[test]
fn page_tables_are_cached() {
    let mut g = Guest::four_level(None, TABLE | ALL);
    assert_eq!(g.access(0x1008, READ), (By::Walk, Some(PhysAddr(0x1008))));
    assert_eq!(g.access(0x4_5010, WRITE), (By::PageTable, Some(PhysAddr(0x5010))));
    assert_eq!(g.access(0x20_0000, READ).0, By::Walk, "another region, which has nothing");
    let mut old = Guest::new(Mode::ThirtyTwo);
    old.set(TOP, TABLE | ALL);
    old.set(TABLE, 0x6000 << 32 | ALL << 32 | 0x5000 | ALL);
    assert_eq!(old.access(8, READ), (By::Walk, Some(PhysAddr(0x5008))));
    assert_eq!(old.access(0x1008, WRITE), (By::PageTable, Some(PhysAddr(0x6008))));
}

/// Rows A6, A10: a flag to be set, a refusal and an entry that is not there are for a walk from the top, which sees what the entries
/// above are now.
#[test]
fn a6_a10_what_is_not_plain_is_walked_for() {
    let mut g = Guest::four_level(None, 0x80 | ALL & !0x40);
    assert_eq!(g.access(0x1008, READ).0, By::Walk);
    assert_eq!(g.access(0x2008, READ).0, By::LargePage);
    assert_eq!(g.access(0x3008, WRITE).0, By::Walk, "sets the dirty flag");
    assert_eq!(g.m.ram().load_u64(0x3000), Some(0x80 | ALL));
    assert_eq!(g.access(0x4008, WRITE).0, By::LargePage, "which is known now");

    let mut g = Guest::four_level(None, TABLE | ALL & !2);
    g.set(TABLE + 0x30, 0x6000 | ALL & !0x20);
    g.set(TABLE + 0x38, 0);
    assert_eq!(g.access(0x1008, READ).0, By::Walk);
    assert_eq!(g.access(0x6000, READ).0, By::Walk, "sets the accessed flag");
    assert_eq!(g.access(0x7000, READ).1, None);
    assert_eq!(g.access(0x5000, WRITE).1, None, "the directory's entry refuses");
    g.set(0x3000, TABLE | ALL);
    assert_eq!(g.access(0x5000, WRITE), (By::Walk, Some(PhysAddr(0x5000))), "more rights need no invalidation");
    assert_eq!(g.access(0x4000, WRITE).0, By::PageTable);
    // The region is not mapped any more, nor is the page in the table that may still be cached: a fault.
    g.set(TABLE + 0x40, 0);
    g.set(0x3000, 0);
    assert_eq!(g.access(0x8000, READ).1, None);
}

/// What is invalidated goes from the second level too: INVLPG of any address takes the paging structures of the PCID.
#[test]
fn a8_invalidations_reach_the_second_level() {
    type Operation = fn(&mut Mmu, &AddressSpace);
    let operations: [(Operation, By); 8] = [
        (|m, s| m.invlpg(s, LinearAddr(0x7000_0000_0000)), By::Walk),
        (|m, s| m.invpcid(s, Invpcid::Address { pcid: 1, la: LinearAddr(0) }), By::Walk),
        (|m, s| m.invpcid(s, Invpcid::Context { pcid: 1 }), By::Walk),
        (|m, s| m.invpcid(s, Invpcid::Context { pcid: 2 }), By::PageTable),
        (|m, s| m.invpcid(s, Invpcid::All), By::Walk),
        (|m, s| _ = m.mov_cr3(s, false), By::Walk),
        (|m, s| _ = m.mov_cr3(s, true), By::PageTable),
        (|m, _| m.invvpid(Invvpid::Single { vpid: 0 }), By::Walk),
    ];
    for (n, (operation, expected)) in operations.into_iter().enumerate() {
        let mut g = Guest::four_level(None, TABLE | ALL);
        assert_eq!(g.access(0x1008, READ).0, By::Walk);
        assert_eq!(g.access(0x2008, READ).0, By::PageTable);
        operation(&mut g.mmu, &g.space);
        assert_eq!(g.access(0x3008, READ).0, expected, "operation {n}");
    }
    let mut g = Guest::four_level(None, TABLE | ALL);
    assert_eq!(g.access(0x1008, READ).0, By::Walk);
    g.mmu.set_walk_caching(false);
    assert_eq!(g.access(0x2008, READ).0, By::Walk, "switched off");
}
