//! Row C5, C6, D5, E1 to E5 as a whole: random guests under `--flush-policy tagged` and `full` do the same, and everything that
//! L1 and L2 can see is the same after each exit.
//!
//! L1 is this test: between exits it changes VPID, EPTP, PCIDs and EPT itself, and invalidates what the SDM asks it to and no
//! more. L2 is random code that reads and writes its memory, changes its tables and invalidates what it has to.

use twofold_arch::LinearAddr;
use twofold_arch::vmx::control::vmfunc;
use twofold_arch::vmx::{invept, invvpid};
use twofold_mmu::{FlushPolicy, Mmu};

use super::numbers::{Named, Numbers, numbers, rounds};
use super::*;

/// RAM, and L2's guest-physical memory: 4 KiB pages by two EPTs.
const SIZE: u64 = crate::cpu::tests::RAM;
/// Tables of EPT k: `EPTS + k * 0x8000`, topmost first, then a page table for each 2 MiB.
const EPTS: u64 = 0x14_0000;
/// Tables of VPID v and address space s: `TABLES + (2 * v + s) * 0x4000`, topmost first.
const TABLES: u64 = 0x16_0000;
/// The window in L2's linear addresses, of as many pages; its guest-physical pages.
const WINDOW: u64 = 0x4000_0000;
const PAGES: u64 = 16;
const DATA: u64 = 0x20_0000;
const LIST: u64 = 0x13_0000;
const PML_LOG: u64 = 0x13_1000;

const AD: u64 = 1 << 6;
const WB: u64 = 6 << 3;

/// The same machine twice, but for the policy.
struct Pair([Box<Vcpu>; 2]);

impl Pair {
    fn both(&mut self, mut f: impl FnMut(&mut Vcpu)) {
        for v in &mut self.0 {
            f(v);
        }
    }
    fn set(&mut self, field: Field, value: u64) {
        self.both(|v| set(v, field, value));
    }
    fn get(&self, field: Field) -> u64 {
        get(&self.0[0], field)
    }
    fn poke64(&mut self, at: u64, value: u64) {
        self.both(|v| super::super::write_phys(v, at, &value.to_le_bytes()));
    }
    fn compare(&self, seed: u64, step: u64) {
        let [a, b] = &self.0;
        for field in Field::ALL {
            assert_eq!(get(a, field), get(b, field), "{field:?}, seed {seed} step {step}");
        }
        assert_eq!(a.state.gpr, b.state.gpr, "seed {seed} step {step}");
        assert_eq!((a.state.rip, a.state.cr2), (b.state.rip, b.state.cr2), "seed {seed} step {step}");
        assert_eq!(a.mmu.pml(), b.mmu.pml());
        let image = |v: &Vcpu| {
            let mut all = vec![0; SIZE as usize];
            v.shared.map.read(PhysAddr(0), &mut all);
            all
        };
        if step.is_multiple_of(8) {
            assert!(image(a) == image(b), "memory differs, seed {seed} step {step}");
        }
    }
}

fn tables_of(vpid: u64, space: u64) -> u64 {
    TABLES + (2 * vpid + space) * 0x4000
}

fn guest_pte(n: &mut Numbers) -> u64 {
    let mut flags = 0x7;
    for (unlikely, bit) in [(12, 1), (6, 2), (8, 4)] {
        if n.one_in(unlikely) {
            flags &= !bit;
        }
    }
    if n.one_in(4) {
        flags |= 1 << 8;
    }
    (DATA + n.below(PAGES) * 0x1000) | flags
}

fn ept_entry(n: &mut Numbers, page: u64) -> u64 {
    let rights = [7, 7, 7, 7, 5, 1, 3, 0, 2];
    let rights = n.of(&rights);
    page | WB | rights
}

fn build(seed: u64, n: &mut Numbers) -> Pair {
    let mut pair = Pair([FlushPolicy::Tagged, FlushPolicy::Full].map(|policy| {
        let mut v = with_guest();
        v.mmu = Mmu::new(v.shared.map.clone(), v.mmu.code().clone(), policy).unwrap();
        let space = v.space;
        v.mmu.reset(&space).store(&mut v.state);
        v
    }));
    // Both EPTs: memory is itself, but the data pages are elsewhere in the second.
    for k in 0..2 {
        let top = EPTS + k * 0x8000;
        pair.poke64(top, (top + 0x1000) | 7);
        pair.poke64(top + 0x1000, (top + 0x2000) | 7);
        for big in 0..2 {
            pair.poke64(top + 0x2000 + 8 * big, (top + 0x3000 + big * 0x1000) | 7);
            for i in 0..512 {
                let page = big << 21 | i << 12;
                let data = (DATA..DATA + PAGES * 0x1000).contains(&page);
                pair.poke64(
                    top + 0x3000 + big * 0x1000 + 8 * i,
                    (if data && k == 1 { page ^ 0x5000 } else { page }) | 7 | WB,
                );
            }
        }
    }
    for vpid in 0..3 {
        for space in 0..2 {
            let top = tables_of(vpid, space);
            pair.poke64(top, (top + 0x1000) | 7);
            // Memory as it is, in 2 MiB pages, and the window.
            pair.poke64(top + 0x1000, 0x3007);
            pair.poke64(top + 0x1008, (top + 0x2000) | 7);
            pair.poke64(top + 0x2000, (top + 0x3000) | 7);
            for i in 0..PAGES {
                let e = guest_pte(n);
                pair.poke64(top + 0x3000 + 8 * i, e);
            }
        }
    }
    for i in 0..PAGES * 512 {
        pair.poke64(DATA + 8 * i, seed.wrapping_mul(i | 1));
    }
    let cr4 = get(&pair.0[0], Field::GuestCr4) | cr4::PGE | cr4::PCIDE;
    pair.set(Field::GuestCr4, cr4);
    pair.set(Field::ExceptionBitmap, u64::from(u32::MAX));
    pair.set(Field::EptpListAddress, LIST);
    pair.set(Field::VmFunctionControls, vmfunc::EPTP_SWITCHING);
    pair.set(Field::PmlAddress, PML_LOG);
    pair.set(Field::PmlIndex, 511);
    pair
}

/// The current guest's tags.
#[derive(Clone, Copy)]
struct World {
    vpid: u64,
    /// EPT, and with which EPTP bits.
    ept: Option<u64>,
    pml: bool,
}

impl World {
    fn random(n: &mut Numbers) -> Self {
        let flags = n.of(&[0, AD]);
        let ept = (!n.one_in(4)).then_some(flags);
        Self { vpid: n.below(3), ept, pml: ept == Some(AD) && n.one_in(2) }
    }
    fn eptp(self, k: u64) -> u64 {
        (EPTS + k * 0x8000) | 6 | 3 << 3 | self.ept.unwrap_or(0)
    }
    /// Makes it the guest's.
    fn apply(self, pair: &mut Pair, n: &mut Numbers) {
        let mut controls = 0;
        if self.vpid != 0 {
            controls |= proc2::VPID;
        }
        if self.ept.is_some() {
            controls |= proc2::EPT | proc2::VM_FUNCTIONS;
        }
        if self.pml {
            controls |= proc2::PML;
        }
        pair.set(Field::Proc2Controls, u64::from(controls));
        pair.set(Field::Vpid, self.vpid);
        let k = n.below(2);
        pair.set(Field::Eptp, self.eptp(k));
        for k in 0..2 {
            pair.poke64(LIST + 8 * k, self.eptp(k));
        }
        let space = n.below(2);
        pair.set(Field::GuestCr3, tables_of(self.vpid, space) | space);
    }
}

/// A program of a few instructions that ends in HLT. `rbx` is the window, `r12` and `r13` are values for CR3, `r14` the page
/// table of the current address space.
fn program(n: &mut Numbers, world: World) -> Vec<u8> {
    let mut code = Vec::new();
    let mut space_known = true;
    for _ in 0..4 + n.below(12) {
        let page = n.below(PAGES);
        let at = ((page * 0x1000 + n.below(0x1000)) as u32).to_le_bytes();
        let with = |op: &[u8]| [op, &at].concat();
        match n.below(12) {
            // mov rax, [rbx+at]; mov [rbx+at], rax; add [rbx+at], rcx; xchg [rbx+at], rdx
            0 | 1 => code.extend(with(&[0x48, 0x8b, 0x83])),
            2 | 3 => code.extend(with(&[0x48, 0x89, 0x83])),
            4 => code.extend(with(&[0x48, 0x01, 0x8b])),
            5 => code.extend(with(&[0x48, 0x87, 0x93])),
            // lea rsi, [rbx+at]; lea rdi, [rbx+other]; mov ecx, n; rep movsb
            6 => {
                code.extend(with(&[0x48, 0x8d, 0xb3]));
                let other = ((n.below(PAGES) * 0x1000 + n.below(0x1000)) as u32).to_le_bytes();
                code.extend([0x48, 0x8d, 0xbb]);
                code.extend(other);
                code.extend([0xb9, n.below(200) as u8, 0, 0, 0, 0xf3, 0xa4]);
            }
            // mov cr3, r12 or r13, with r14 to match
            7 => {
                let second = n.one_in(2);
                code.extend(if second { [0x41, 0x0f, 0x22, 0xdd] } else { [0x41, 0x0f, 0x22, 0xdc] });
                // mov r14d, the page table
                code.extend([0x41, 0xbe]);
                code.extend(((tables_of(world.vpid, u64::from(second)) + 0x3000) as u32).to_le_bytes());
                space_known = true;
            }
            // mov eax, entry; mov [r14+8*page], rax; invlpg [rbx+page]
            8 | 9 if space_known => {
                code.push(0xb8);
                code.extend((guest_pte(n) as u32).to_le_bytes());
                code.extend([0x49, 0x89, 0x86]);
                code.extend(((8 * page) as u32).to_le_bytes());
                code.extend(with(&[0x0f, 0x01, 0xbb]));
            }
            // xor eax, eax; mov ecx, k; vmfunc
            10 if world.ept.is_some() => code.extend([0x31, 0xc0, 0xb9, n.below(2) as u8, 0, 0, 0, 0x0f, 0x01, 0xd4]),
            // mov rax, cr4; xor al, PGE; mov cr4, rax: all goes.
            11 => code.extend([0x0f, 0x20, 0xe0, 0x34, 0x80, 0x0f, 0x22, 0xe0]),
            _ => code.extend([0x0f, 0xa2]),
        }
    }
    code.push(0xf4);
    code
}

/// What L1 does between two runs, with the invalidation that it owes.
fn between(pair: &mut Pair, world: &mut World, n: &mut Numbers) {
    match n.below(8) {
        0 => {
            let before = *world;
            *world = World::random(n);
            // Changed EPTP bits of an EP4TA in use, or another PML, want an INVEPT.
            if world.ept != before.ept {
                pair.both(|v| inv(v, word::INVEPT, invept::ALL_CONTEXTS, 0));
            }
            world.apply(pair, n);
        }
        1 | 2 => {
            // An entry of either EPT.
            let k = n.below(2);
            let i = n.below(PAGES);
            let target = n.below(PAGES);
            let e = ept_entry(n, DATA + target * 0x1000);
            pair.poke64(EPTS + k * 0x8000 + 0x4000 + 8 * i, e);
            let eptp = world.eptp(k);
            let kind = n.of(&[invept::SINGLE_CONTEXT, invept::ALL_CONTEXTS]);
            pair.both(|v| inv(v, word::INVEPT, kind, eptp));
        }
        3 => {
            // An entry of L2's tables, of any VPID; VPID 0000H goes by itself at entry.
            let (vpid, space, i) = (n.below(3), n.below(2), n.below(PAGES));
            let e = guest_pte(n);
            pair.poke64(tables_of(vpid, space) + 0x3000 + 8 * i, e);
            if vpid != 0 {
                let kind = n.of(&[invvpid::ADDRESS, invvpid::SINGLE_CONTEXT, invvpid::ALL_CONTEXTS]);
                let la = WINDOW + i * 0x1000;
                pair.both(|v| {
                    poke64(v, POINTER + 8, la);
                    inv(v, word::INVVPID, kind, vpid);
                });
            }
        }
        4 => {
            // Another of the guest's address spaces, without a MOV to CR3 of its own.
            let space = n.below(2);
            pair.set(Field::GuestCr3, tables_of(world.vpid, space) | space);
        }
        _ => {}
    }
    // PML starts over.
    if n.one_in(3) {
        pair.set(Field::PmlIndex, 3);
    }
}

/// INVEPT or INVVPID.
fn inv(v: &mut Vcpu, which: u64, kind: u64, descriptor: u64) {
    if which == word::INVEPT {
        poke64(v, POINTER + 8, 0);
    }
    poke64(v, POINTER, descriptor);
    v.state.gpr[15] = kind;
    super::super::instructions::vmx(v, which | word::MEMORY, POINTER, 15, NEXT).unwrap();
    assert_eq!(outcome(v), Result_::Succeed);
}

#[test]
fn c5_c6_d5_e1_e2_e3_e4_e5_tagged_and_full_agree() {
    let (mut exits, mut misses) = ([0u32; 128], [0; 2]);
    for seed in rounds(40) {
        let (mut n, _named) = (numbers(seed), Named(seed));
        let mut pair = build(seed, &mut n);
        let mut world = World::random(&mut n);
        world.apply(&mut pair, &mut n);
        for step in 0..60 {
            let bytes = program(&mut n, world);
            let space = pair.get(Field::GuestCr3) & 1;
            let [first, second] = [0, 1].map(|s| tables_of(world.vpid, s) | s | n.of(&[0, 1 << 63]));
            let other = n.next();
            pair.both(|v| {
                super::super::write_phys(v, CODE, &bytes);
                v.state.gpr[3] = WINDOW;
                (v.state.gpr[12], v.state.gpr[13]) = (first, second);
                v.state.gpr[14] = tables_of(world.vpid, space) + 0x3000;
                v.state.gpr[1] = other;
                set(v, Field::GuestRip, CODE);
                set(v, Field::GuestInterruptibility, 0);
                set(v, Field::GuestActivity, 0);
                let rflags = get(v, Field::GuestRflags) & !rflags::RF;
                set(v, Field::GuestRflags, rflags);
                go(v);
            });
            pair.compare(seed, step);
            exits[(pair.get(Field::ExitReason) & 127) as usize] += 1;
            between(&mut pair, &mut world, &mut n);
        }
        for (sum, v) in misses.iter_mut().zip(&pair.0) {
            *sum += v.mmu.stats().misses;
        }
        // Nothing of L1's own was lost or mixed up.
        pair.both(|v| assert_eq!(v.read(LinearAddr(POINTER), 8, crate::vcpu::MemAs::System), Ok(peek64(v, POINTER))));
    }
    // The policies differ in what they keep, and the guests meet what there is to meet.
    assert!(misses[1] > misses[0] * 5 / 4, "{misses:?}");
    let [exceptions, cpuid, hlt, violations] = [0, 10, 12, 48].map(|r| exits[r]);
    assert!(exceptions > 20 && cpuid > 20 && hlt > 20 && violations > 20, "{exits:?}");
    assert!(exits[49] > 3 && exits[62] > 0, "{exits:?}");
}
