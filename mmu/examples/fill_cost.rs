//! Prints what the MMU's paths cost in nanoseconds: a miss with its walk and fill, a hit, flushes, a context switch.
//!
//! `cargo run --release -p twofold-mmu --example fill_cost`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use twofold_arch::tbflags::MemMode;
use twofold_arch::{LinearAddr, PhysAddr};
use twofold_mmu::{Access, AddressSpace, CodePages, FlushPolicy, GuestRam, LegacyHole, Mmu, PagingMode, PhysMap};

const RAM: u64 = 256 << 20;

fn time(what: &str, n: u64, mut f: impl FnMut(u64)) {
    (0..n / 4).for_each(&mut f);
    let start = Instant::now();
    (0..n).for_each(&mut f);
    println!("{what:44} {:8.1} ns", start.elapsed().as_nanos() as f64 / n as f64);
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
    Ok(())
}
