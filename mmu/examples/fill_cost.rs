//! Prints what the MMU's paths cost in nanoseconds: a miss with its walk and fill, a hit, flushes, a context switch.
//!
//! `cargo run --release -p twofold-mmu --example fill_cost`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use twofold_arch::tbflags::MemMode;
use twofold_arch::{LinearAddr, PhysAddr};
use twofold_mmu::{
    Access, AccessKind, AddressSpace, CodePages, FlushCause, FlushPolicy, GuestRam, LegacyHole, Mmu, PagingMode,
    PhysMap,
};

const RAM: u64 = 256 << 20;

/// The least of many rounds: other programs may be running.
fn time(what: &str, n: u64, mut f: impl FnMut(u64)) {
    const ROUNDS: u64 = 64;
    (0..n / 4).for_each(&mut f);
    let mut best = f64::INFINITY;
    for round in 0..ROUNDS {
        let start = Instant::now();
        (round * n / ROUNDS..(round + 1) * n / ROUNDS).for_each(&mut f);
        best = best.min(start.elapsed().as_nanos() as f64 / (n / ROUNDS) as f64);
    }
    println!("{what:60} {best:8.1} ns");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let phys = Arc::new(PhysMap::new(Arc::new(GuestRam::new(RAM)?), LegacyHole::Ram));
    let code = Arc::new(CodePages::new(PhysAddr(RAM)));
    let mut mmu = Mmu::new(Arc::clone(&phys), code, FlushPolicy::Tagged)?;
    let ram = phys.ram();
    // Two address spaces of 4-level paging, 128 page tables each: linear 0..256 MiB to the frames in a stride.
    let spaces = [0x10_0000u64, 0x20_0000].map(|root| {
        ram.store_u64(root, (root + 0x1000) | 0x67);
        ram.store_u64(root + 0x1000, (root + 0x2000) | 0x67);
        for d in 0..128 {
            let table = root + 0x3000 + d * 0x1000;
            ram.store_u64(root + 0x2000 + d * 8, table | 0x67);
            for i in 0..512 {
                ram.store_u64(table + i * 8, ((d * 512 + i) * 7 % (RAM >> 12)) << 12 | 0x67);
            }
        }
        AddressSpace {
            mode: PagingMode::Level4,
            cr3: root,
            pcide: true,
            pcid: (root >> 20) as u16,
            wp: true,
            pge: true,
            nxe: true,
            ..AddressSpace::reset(46)
        }
    });
    let [a, b] = &spaces;
    let _ = mmu.reset(a);
    let read = Access::read(MemMode::User);
    let la = |i: u64| LinearAddr((i * 37 % 65536) << 12 | 8);
    time("walk and fill, tables in the host's caches", 1 << 20, |i| {
        black_box(mmu.fill(a, LinearAddr((i % 256) << 12), read).ok());
    });
    time("walk and fill, 65,536 pages in a stride", 1 << 20, |i| {
        black_box(mmu.fill(a, la(i), read).ok());
    });
    time("slow-path read that hits", 1 << 22, |i| {
        black_box(mmu.read(a, LinearAddr((i % 256) << 12 | 16), 8, read).ok());
    });
    time("cached load", 1 << 24, |i| {
        black_box(mmu.load_cached(MemMode::User, LinearAddr((i % 256) << 12 | 16), 8));
    });
    time("INVLPG", 1 << 22, |i| mmu.invlpg(a, la(i)));
    time("MOV CR3 with bit 63, two contexts", 1 << 22, |i| {
        let _ = black_box(mmu.mov_cr3(if i % 2 == 0 { a } else { b }, true));
    });
    let _ = mmu.mov_cr3(a, false);
    time("MOV CR3 that flushes 64 pages, and their fills", 1 << 16, |_| {
        for p in 0..64 {
            black_box(mmu.translate(a, LinearAddr(p << 12), read).ok());
        }
        let _ = black_box(mmu.mov_cr3(a, false));
    });
    nested(&mut mmu, a, read);
    Ok(())
}

/// What a miss of an L2 costs beside one of an L1 with the same tables: EPT maps guest-physical addresses to themselves, in 4 KiB
/// pages, so that both walks read the same guest entries.
fn nested(mmu: &mut Mmu, l1: &AddressSpace, read: Access) {
    const EPT: u64 = 0x80_0000;
    let phys = Arc::clone(mmu.phys());
    let ram = phys.ram();
    ram.store_u64(EPT, (EPT + 0x1000) | 7);
    ram.store_u64(EPT + 0x1000, (EPT + 0x2000) | 7);
    for d in 0..RAM >> 21 {
        let table = EPT + 0x3000 + d * 0x1000;
        ram.store_u64(EPT + 0x2000 + d * 8, table | 7);
        for i in 0..512 {
            ram.store_u64(table + i * 8, (d * 512 + i) << 12 | 6 << 3 | 7);
        }
    }
    let near = |i: u64| LinearAddr((i % 256) << 12);
    let far = |i: u64| LinearAddr((i * 37 % 65536) << 12 | 8);
    let eptp = Some(EPT | 3 << 3 | 6);
    let l2 = AddressSpace { eptp, vpid: 1, ..*l1 };
    let flags = AddressSpace { eptp: eptp.map(|e| (e + 0x100_0000) | 1 << 6), ..l2 };
    for at in (0..0x3000 + (RAM >> 21 << 12)).step_by(8) {
        // A copy of the EPT for accessed and dirty flags.
        let e = ram.load_u64(EPT + at).unwrap_or(0);
        let down = if at < 0x3000 && e != 0 { 0x100_0000 } else { 0 };
        ram.store_u64(EPT + 0x100_0000 + at, e + down);
    }
    println!();
    for (what, space, caching) in [
        ("L1: ", l1, true),
        ("L2, guest-physical mappings cached: ", &l2, true),
        ("L2, the same with EPT accessed and dirty: ", &flags, true),
        ("L2, none cached: ", &l2, false),
    ] {
        let _ = mmu.vm_transition(space, FlushCause::VmEntry, true);
        mmu.set_walk_caching(caching);
        time(&format!("{what}miss, near"), 1 << 20, |i| {
            black_box(mmu.fill(space, near(i), read).ok());
        });
        time(&format!("{what}miss, far"), 1 << 20, |i| {
            black_box(mmu.fill(space, far(i), read).ok());
        });
    }
    mmu.set_walk_caching(true);
    time("VM entry and exit with VPID", 1 << 22, |i| {
        let (space, cause) = if i % 2 == 0 { (&l2, FlushCause::VmEntry) } else { (l1, FlushCause::VmExit) };
        let _ = black_box(mmu.vm_transition(space, cause, true));
    });
    time("INVEPT, single context", 1 << 20, |_| mmu.invept(eptp));
    let walks = mmu.stats().ept_walks;
    let _ = mmu.vm_transition(&l2, FlushCause::VmEntry, true);
    time("EPT walk alone, after INVEPT", 1 << 20, |i| {
        if i % 64 == 0 {
            mmu.invept(eptp);
        }
        black_box(mmu.guest_phys(&l2, twofold_arch::GuestPhysAddr(near(i).0), AccessKind::Read).ok());
    });
    assert!(mmu.stats().ept_walks > walks);
}
