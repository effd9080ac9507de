//! x87 instructions: every opcode on the host CPU against translation, evaluation and the runtime's helper.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use twofold_arch::TbFlags;
use twofold_tests::insn::{Form, MIDDLE, Mode, Regs, Rng, SCRATCH_LEN};
use twofold_tests::oracle::{USER32, USER64, helpers, helpers_of, run_forms};
use twofold_tests::values::{float32, float64};

/// Keys under which instructions run on the host's unit directly.
const HOST64: TbFlags = TbFlags(USER64.0 | TbFlags::X87_HOST);
const HOST32: TbFlags = TbFlags(USER32.0 | TbFlags::X87_HOST);

/// An 80-bit value: the edges of the format, or random near 1.
fn extended(rng: &mut Rng) -> [u8; 10] {
    const EXPONENTS: [u16; 14] =
        [0, 0, 1, 0x3ffe, 0x3fff, 0x4000, 0x4001, 0x400e, 0x401e, 0x403e, 0x403d, 0x7ffe, 0x7fff, 0x7fff];
    const MANTISSAS: [u64; 10] = [
        0,
        0x8000_0000_0000_0000,
        0xc000_0000_0000_0000,
        0xffff_ffff_ffff_ffff,
        0x8000_0000_0000_0001,
        1,
        0x4000_0000_0000_0000,
        0xffff_ff80_0000_0000,
        0xffff_ffff_ffff_f800,
        0xa000_0000_0000_0000,
    ];
    let sign = (rng.next() as u16) << 15;
    let (e, m) = match rng.below(8) {
        0..=2 => (EXPONENTS[rng.below(14) as usize], MANTISSAS[rng.below(10) as usize]),
        3 => (0x3fff + rng.below(8) as u16, rng.next() | 1 << 63),
        4 => (0x3fc0 + rng.below(128) as u16, rng.next() | 1 << 63),
        5 => {
            // A small integer.
            let n = rng.below(2000) + 1;
            (0x403e - n.leading_zeros() as u16, n << n.leading_zeros())
        }
        6 => (EXPONENTS[rng.below(14) as usize], rng.next() | 1 << 63),
        _ => (rng.next() as u16 & 0x7fff, rng.next() | u64::from(rng.below(8) != 0) << 63),
    };
    let mut v = [0; 10];
    v[..8].copy_from_slice(&m.to_le_bytes());
    v[8..].copy_from_slice(&(e | sign).to_le_bytes());
    v
}

/// Registers, tags, TOP, control word with any precision, rounding and masks, sticky flags, at times a pending exception.
fn randomize(r: &mut Regs, rng: &mut Rng) {
    for i in 0..8 {
        r.set_st(i, extended(rng));
    }
    let tags = match rng.below(4) {
        0 => rng.next() as u8,
        1 => 0xff,
        _ => !(1 << rng.below(8)) & !(1u8 << rng.below(8)),
    };
    r.set_ftw(tags);
    let masks = if rng.below(3) == 0 { rng.next() as u16 & 0x3f } else { 0x3f };
    let fcw = 0x40 | masks | rng.next() as u16 & 0x1f00;
    r.set_fcw(fcw);
    let mut fsw = rng.next() as u16 & 0x7f7f & !(0x3f & !masks);
    if rng.below(2) == 0 {
        fsw &= 0x7f00;
    }
    if masks != 0x3f && rng.below(8) == 0 {
        fsw |= 0x8080 | 0x3f & !masks;
    }
    r.set_fsw(fsw);
    r.gpr[3] = MIDDLE + if rng.below(4) == 0 { rng.below(16) } else { 0 };
}

/// Operands of every memory format at [rbx].
fn operands(mem: &mut [u8], rng: &mut Rng) {
    let at = SCRATCH_LEN / 2;
    let (kind, random) = (rng.below(5), rng.value());
    match kind {
        0 => mem[at..at + 4].copy_from_slice(&float32(rng).to_le_bytes()),
        1 => mem[at..at + 8].copy_from_slice(&float64(rng).to_le_bytes()),
        2 => mem[at..at + 10].copy_from_slice(&extended(rng)),
        3 => {
            // Packed decimal.
            for b in &mut mem[at..at + 10] {
                *b = rng.below(10) as u8 | (rng.below(10) as u8) << 4;
            }
        }
        _ => mem[at..at + 8].copy_from_slice(&random.to_le_bytes()),
    }
}

fn form(bytes: &[u8]) -> Form {
    let mut f = Form::new(format!("{bytes:02x?}"), bytes).prepare(randomize).prepare_mem(operands);
    f.compare_x87 = true;
    f.helpers = helpers;
    f
}

/// With all exceptions masked.
fn masked(mut forms: Vec<Form>) -> Vec<Form> {
    for f in &mut forms {
        f.prepare = Box::new(|r, rng| {
            randomize(r, rng);
            r.set_fcw(r.fcw() | 0x3f);
            r.set_fsw(r.fsw() & !0x8080);
        });
    }
    forms
}

fn register() -> Vec<Form> {
    let mut forms = Vec::new();
    for first in 0xd8..=0xdfu8 {
        for modrm in 0xc0..=0xffu8 {
            forms.push(form(&[first, modrm]));
        }
    }
    forms.push(form(&[0x9b]));
    forms
}

#[test]
fn register_forms() {
    run_forms("x87 register forms", &register(), USER64, 400);
}

#[test]
fn masked_register_forms() {
    run_forms("x87 register forms, masked", &masked(register()), HOST64, 400);
}

fn at_rbx() -> Vec<Form> {
    let mut forms = Vec::new();
    for first in 0xd8..=0xdfu8 {
        for reg in 0..8u8 {
            // FNSTENV and FNSAVE store pointers, which the harness's own code changes; `save_area` has them.
            if !matches!((first, reg), (0xd9 | 0xdd, 6)) {
                forms.push(form(&[first, reg << 3 | 3]));
                forms.push(form(&[0x66, first, reg << 3 | 0x43, 0]));
            }
        }
    }
    forms
}

#[test]
fn memory_forms() {
    run_forms("x87 memory forms", &at_rbx(), USER64, 600);
}

#[test]
fn masked_memory_forms() {
    run_forms("x87 memory forms, masked", &masked(at_rbx()), HOST64, 600);
}

fn at_rbx32() -> Vec<Form> {
    let mut forms = at_rbx();
    for f in &mut forms {
        f.mode = Mode::Bits32;
        f.helpers = helpers_of::<{ USER32.0 }>;
    }
    forms
}

#[test]
fn memory_forms_in_32_bit_code() {
    run_forms("x87 memory forms in 32-bit code", &at_rbx32(), USER32, 200);
}

#[test]
fn masked_memory_forms_in_32_bit_code() {
    run_forms("x87 memory forms in 32-bit code, masked", &masked(at_rbx32()), HOST32, 200);
}
