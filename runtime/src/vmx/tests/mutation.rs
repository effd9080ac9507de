//! Valid VMCSs with random damage, entered and run: whatever they hold, the processor goes on or stops as the SDM says.

use std::collections::BTreeSet;

use super::numbers::{Named, Numbers, numbers, rounds};
use super::*;

/// Instructions that do something with what is damaged.
const PROGRAMS: &[&[u8]] = &[
    // cpuid; rdmsr; wrmsr; in al, dx; mov cr3, rax; mov rax, cr0; hlt
    &[0x0f, 0xa2, 0x0f, 0x32, 0x0f, 0x30, 0xec, 0x0f, 0x22, 0xd8, 0x0f, 0x20, 0xc0, 0xf4],
    // push rax; pop rcx; mov [rsi], rax; int3; int 0x20; ud2
    &[0x50, 0x59, 0x48, 0x89, 0x06, 0xcc, 0xcd, 0x20, 0x0f, 0x0b],
    // vmcall; vmread rax, rdx; vmfunc; pause; rdtsc; invlpg [rax]
    &[0x0f, 0x01, 0xc1, 0x0f, 0x78, 0xd0, 0x0f, 0x01, 0xd4, 0xf3, 0x90, 0x0f, 0x31, 0x0f, 0x01, 0x38],
    // sgdt [rsp]; lidt [rsp]; ltr ax; iretq; jmp $
    &[0x0f, 0x01, 0x04, 0x24, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x00, 0xd8, 0x48, 0xcf, 0xeb, 0xfe],
    // sti; hlt; mov ss, ax; nop; rep stosb
    &[0xfb, 0xf4, 0x8e, 0xd0, 0x90, 0xf3, 0xaa],
];

/// MSRs for the areas: good, checked, and refused ones.
const MSRS: [u64; 8] = [0x10, 0x174, 0x277, 0xc000_0080, 0xc000_0082, 0xc000_0102, 0x808, 0x480];

/// What became of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum End {
    Fail(u64),
    Exit(u64),
    Running,
    Stopped,
}

/// Words of EPT, and now and then a whole table, become something else.
fn damage_ept(v: &mut Vcpu, n: &mut Numbers, most: u64) {
    for _ in 0..n.below(most) {
        let at = EPT + 8 * n.below(1024);
        let value = n.odd(peek64(v, at));
        super::super::write_phys(v, at, &value.to_le_bytes());
    }
    if n.one_in(40) {
        let table = EPT + 0x1000 * n.below(3);
        for i in 0..512 {
            // Tables that name each other, themselves, L2's pages and nothing.
            let page = n.of(&[EPT, EPT + 0x1000, EPT + 0x2000, CODE, VMCS, crate::cpu::tests::RAM - 0x1000, 1 << 45]);
            let value = if n.one_in(4) { n.next() } else { page | n.below(0x1000) };
            super::super::write_phys(v, table + 8 * i, &value.to_le_bytes());
        }
    }
}

fn run_damaged(v: &mut Vcpu, n: &mut Numbers) -> End {
    if super::super::instructions::vmx(v, word::VMLAUNCH, 0, 0, NEXT).is_err() {
        return End::Stopped;
    }
    if !v.vmx.non_root && v.state.rip == NEXT {
        return End::Fail(get(v, Field::InstructionError));
    }
    for _ in 0..60 {
        if !v.vmx.non_root {
            return End::Exit(get(v, Field::ExitReason) & 0x8000_ffff);
        }
        if dispatch::step(v).is_err() {
            return End::Stopped;
        }
        if v.vmx.non_root && n.one_in(4) {
            // Another processor of L1 changes EPT under the guest, and may have this one told.
            damage_ept(v, n, 3);
            if n.one_in(2) {
                v.mmu.invept(None);
            }
        }
    }
    End::Running
}

/// G3, G4: a valid VMCS with one to four damaged fields, damaged EPT, also while the guest runs, any EPTP, and MSR areas
/// anywhere: outside RAM, across its end, on top of what is in use.
#[test]
fn g3_g4_damaged_vmcs_never_panics() {
    let mut ends = BTreeSet::new();
    for seed in rounds(1500) {
        let (mut n, _named) = (numbers(seed), Named(seed));
        let mut v = if seed % 2 == 0 { with_guest() } else { with_real_guest() };
        code(&v, PROGRAMS[n.below(PROGRAMS.len() as u64) as usize]);
        for i in 0..16 {
            v.state.gpr[i] = if n.below(3) == 0 { n.next() } else { n.below(0x20_0000) };
        }
        for word in [Word::Pin, Word::Proc, Word::Proc2, Word::Exit, Word::Entry] {
            if n.below(3) == 0 {
                let allowed = v.model.vmx.allowed(word);
                let bits = allowed.may & n.next() & n.next();
                let old = get(&v, word.field());
                set(&mut v, word.field(), old ^ bits & !allowed.must);
            }
        }
        if n.below(6) == 0 {
            set(&mut v, Field::ExceptionBitmap, 0xffff_ffff);
        }
        for _ in 0..n.below(4) {
            let field = Field::ALL[n.below(Field::ALL.len() as u64) as usize];
            let old = get(&v, field);
            let value = n.odd(old);
            set(&mut v, field, value);
        }
        for (count, at) in [
            (Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress),
            (Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress),
            (Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress),
        ] {
            if n.below(8) == 0 {
                let entries = n.below(6);
                let place = if n.one_in(3) { crate::cpu::tests::RAM - 16 * n.below(4) } else { n.odd(AREA) & !15 };
                set(&mut v, count, entries);
                set(&mut v, at, place);
                for i in 0..8 {
                    let msr = MSRS[n.below(MSRS.len() as u64) as usize];
                    let value = n.odd(0);
                    poke64(&v, AREA + 16 * i, msr);
                    poke64(&v, AREA + 16 * i + 8, value);
                }
            }
        }
        damage_ept(&mut v, &mut n, 3);
        if n.one_in(8) {
            let value = n.odd(get(&v, Field::Eptp));
            set(&mut v, Field::Eptp, value);
        }
        ends.insert(run_damaged(&mut v, &mut n));
    }
    let exits = ends.iter().filter(|e| matches!(e, End::Exit(r) if r >> 31 == 0)).count();
    // The damage is not so great that nothing else happens.
    assert!(exits >= 8, "{ends:?}");
    for expected in [End::Fail(7), End::Fail(8), End::Exit(0x8000_0021), End::Exit(0x8000_0022)] {
        assert!(ends.contains(&expected), "{expected:?} is not in {ends:?}");
    }
}
