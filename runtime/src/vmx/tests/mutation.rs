//! Valid VMCSs with random damage, entered and run: whatever they hold, the processor goes on or stops as the SDM says.

use std::collections::BTreeSet;

use super::*;

/// A small generator of numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// A number of an unlikely kind.
    fn odd(&mut self, old: u64) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 | 2 => old ^ 1 << self.below(64),
            3 => u64::MAX << self.below(64),
            4 => self.next() >> self.below(64),
            // The end of RAM, of the physical addresses, and pages that are something already.
            5 => [0x1000_0000, 1 << 45, (1 << 46) - 0x1000, 0xfee0_0000, EPT, VMCS, CODE][self.below(7) as usize],
            6 => old.wrapping_add(1),
            _ => self.below(16),
        }
    }
}

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

fn run_damaged(v: &mut Vcpu) -> End {
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
    }
    End::Running
}

/// G3, G4: a valid VMCS with one to four damaged fields, damaged EPT, and MSR areas anywhere.
#[test]
fn g3_g4_damaged_vmcs_never_panics() {
    let mut n = Numbers(0x2545_f491_4f6c_dd1d);
    let mut ends = BTreeSet::new();
    for round in 0..1500u64 {
        let mut v = if round % 2 == 0 { with_guest() } else { with_real_guest() };
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
                let place = n.odd(AREA) & !15;
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
        for _ in 0..n.below(3) {
            let at = EPT + 8 * n.below(1024);
            let value = n.odd(peek64(&v, at));
            poke64(&v, at, value);
        }
        ends.insert(run_damaged(&mut v));
    }
    let exits = ends.iter().filter(|e| matches!(e, End::Exit(r) if r >> 31 == 0)).count();
    // The damage is not so great that nothing else happens.
    assert!(exits >= 8, "{ends:?}");
    for expected in [End::Fail(7), End::Fail(8), End::Exit(0x8000_0021), End::Exit(0x8000_0022)] {
        assert!(ends.contains(&expected), "{expected:?} is not in {ends:?}");
    }
}
