//! The integer instruction forms that the native oracle runs, by encoding.

use crate::insn::{CODE, Form, MIDDLE, Regs, SCRATCH, SCRATCH_LEN, TAKEN};
use twofold_arch::control::rflags::{AF, ARITH, CF, DF, OF, PF, SF, ZF};

/// The r/m operand of an encoding.
#[derive(Clone, Copy, PartialEq)]
pub enum Rm {
    /// A register; for bytes without REX 4 to 7 are AH … BH.
    Reg(u8),
    /// `[rbx + 0x10]`.
    Mem,
}

/// Encodes prefixes, REX, opcode and ModRM. `size` in bytes chooses 66 and REX.W; `rex` forces a REX.
pub fn enc(size: u8, prefix: &[u8], rex: bool, opcode: &[u8], reg: u8, rm: Rm, imm: &[u8]) -> Vec<u8> {
    let mut v = Vec::new();
    v.extend(prefix);
    if size == 2 {
        v.push(0x66);
    }
    let b = match rm {
        Rm::Reg(r) => r >> 3,
        Rm::Mem => 0,
    };
    let r = 0x40 | u8::from(size == 8) << 3 | (reg >> 3) << 2 | b;
    if r != 0x40 || rex {
        v.push(r);
    }
    v.extend(opcode);
    match rm {
        Rm::Reg(n) => v.push(0xc0 | (reg & 7) << 3 | n & 7),
        Rm::Mem => v.extend([0x43 | (reg & 7) << 3, 0x10]),
    }
    v.extend(imm);
    v
}

#[allow(clippy::too_many_arguments)] // one per field of the encoding
/// A VEX-encoded instruction of map 0F38 (2) or 0F3A (3) with register operands.
fn vex(map: u8, pp: u8, w: bool, op: u8, reg: u8, vvvv: u8, rm: Rm, imm: &[u8]) -> Vec<u8> {
    let b = match rm {
        Rm::Reg(r) => r >> 3,
        Rm::Mem => 0,
    };
    let mut v = vec![
        0xc4,
        (u8::from(reg < 8)) << 7 | 1 << 6 | (1 - b) << 5 | map,
        u8::from(w) << 7 | (!vvvv & 15) << 3 | pp,
        op,
    ];
    match rm {
        Rm::Reg(n) => v.push(0xc0 | (reg & 7) << 3 | n & 7),
        Rm::Mem => v.extend([0x43 | (reg & 7) << 3, 0x10]),
    }
    v.extend(imm);
    v
}

const SIZES: [u8; 4] = [1, 2, 4, 8];

fn imm(size: u8, v: i64) -> Vec<u8> {
    v.to_le_bytes()[..usize::from(size.min(4))].to_vec()
}

/// All of them.
pub fn integer() -> Vec<Form> {
    let mut f = Vec::new();
    alu(&mut f);
    unary(&mut f);
    shifts(&mut f);
    bits(&mut f);
    moves(&mut f);
    exchange(&mut f);
    bmi(&mut f);
    addresses(&mut f);
    strings(&mut f);
    stack(&mut f);
    flags(&mut f);
    branches(&mut f);
    f
}

/// Register pairs worth trying: same, different, extended.
const PAIRS: [(u8, u8); 4] = [(0, 1), (2, 2), (6, 9), (12, 5)];

fn alu(f: &mut Vec<Form>) {
    const NAMES: [&str; 8] = ["add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"];
    for (n, name) in NAMES.iter().enumerate() {
        let base = (n as u8) << 3;
        for size in SIZES {
            let w = u8::from(size > 1);
            for (a, b) in PAIRS {
                f.push(Form::new(
                    format!("{name}{size} r{a}, r{b}"),
                    &enc(size, &[], true, &[base | w], b, Rm::Reg(a), &[]),
                ));
            }
            f.push(Form::new(format!("{name}{size} r, m"), &enc(size, &[], false, &[base | 2 | w], 2, Rm::Mem, &[])));
            f.push(Form::new(format!("{name}{size} m, r"), &enc(size, &[], false, &[base | w], 1, Rm::Mem, &[])));
            let mut acc = Vec::new();
            if size == 2 {
                acc.push(0x66);
            } else if size == 8 {
                acc.push(0x48);
            }
            acc.push(base | 4 | w);
            acc.extend(imm(size, -0x7f01_0203));
            f.push(Form::new(format!("{name}{size} acc, imm"), &acc));
            f.push(Form::new(
                format!("{name}{size} r, imm"),
                &enc(size, &[], true, &[0x80 | w], n as u8, Rm::Reg(5), &imm(size, 0x1234_5678)),
            ));
            f.push(Form::new(
                format!("{name}{size} m, imm"),
                &enc(size, &[], false, &[0x80 | w], n as u8, Rm::Mem, &imm(size, -2)),
            ));
            if size > 1 {
                f.push(Form::new(
                    format!("{name}{size} r, imm8"),
                    &enc(size, &[], false, &[0x83], n as u8, Rm::Reg(8), &[0xfe]),
                ));
            }
            if *name != "cmp" {
                f.push(Form::new(
                    format!("lock {name}{size} m, r"),
                    &enc(size, &[0xf0], false, &[base | w], 1, Rm::Mem, &[]),
                ));
                f.push(Form::new(
                    format!("lock {name}{size} m, imm"),
                    &enc(size, &[0xf0], false, &[0x80 | w], n as u8, Rm::Mem, &imm(size, 9)),
                ));
            }
        }
        // AH … BH.
        f.push(Form::new(format!("{name} ah, ch"), &enc(1, &[], false, &[base], 5, Rm::Reg(4), &[])));
        f.push(Form::new(format!("{name} dl, bh"), &enc(1, &[], false, &[base], 7, Rm::Reg(2), &[])));
        f.push(Form::new(format!("{name} dh, m"), &enc(1, &[], false, &[base | 2], 6, Rm::Mem, &[])));
    }
    for size in SIZES {
        let w = u8::from(size > 1);
        f.push(Form::new(format!("test{size} r, r"), &enc(size, &[], true, &[0x84 | w], 7, Rm::Reg(6), &[])));
        f.push(Form::new(format!("test{size} same"), &enc(size, &[], true, &[0x84 | w], 6, Rm::Reg(6), &[])));
        f.push(Form::new(format!("test{size} m, r"), &enc(size, &[], false, &[0x84 | w], 1, Rm::Mem, &[])));
        f.push(Form::new(
            format!("test{size} m, imm"),
            &enc(size, &[], false, &[0xf6 | w], 0, Rm::Mem, &imm(size, 0x55aa_1234)),
        ));
    }
}

fn unary(f: &mut Vec<Form>) {
    for size in SIZES {
        let w = u8::from(size > 1);
        for (rm, at) in [(Rm::Reg(0), "rax"), (Rm::Reg(9), "r9"), (Rm::Reg(2), "rdx"), (Rm::Mem, "m")] {
            let one = |op: u8, n: u8| enc(size, &[], rm == Rm::Reg(9), &[op | w], n, rm, &[]);
            f.push(Form::new(format!("inc{size} {at}"), &one(0xfe, 0)));
            f.push(Form::new(format!("dec{size} {at}"), &one(0xfe, 1)));
            f.push(Form::new(format!("not{size} {at}"), &one(0xf6, 2)));
            f.push(Form::new(format!("neg{size} {at}"), &one(0xf6, 3)));
            f.push(Form::new(format!("mul{size} {at}"), &one(0xf6, 4)).undefined(SF | ZF | AF | PF));
            f.push(Form::new(format!("imul{size} {at}"), &one(0xf6, 5)).undefined(SF | ZF | AF | PF));
            for (name, n) in [("div", 6), ("idiv", 7)] {
                let small = move |r: &mut Regs, rng: &mut crate::insn::Rng| {
                    // Mostly dividends whose quotient fits.
                    match rng.below(4) {
                        0 => r.gpr[2] = 0,
                        1 => r.gpr[2] = if r.gpr[0] >> (8 * u32::from(size) - 1) & 1 != 0 { u64::MAX } else { 0 },
                        2 => r.gpr[2] = rng.below(100),
                        _ => {}
                    }
                    if size == 1 && rng.below(2) == 0 {
                        r.gpr[0] &= !0xfe00;
                    }
                };
                f.push(Form::new(format!("{name}{size} {at}"), &one(0xf6, n)).undefined(ARITH).prepare(small));
            }
        }
        for (name, n, op) in [("inc", 0, 0xfe), ("dec", 1, 0xfe), ("not", 2, 0xf6), ("neg", 3, 0xf6)] {
            f.push(Form::new(format!("lock {name}{size} m"), &enc(size, &[0xf0], false, &[op | w], n, Rm::Mem, &[])));
        }
        if size > 1 {
            let u = SF | ZF | AF | PF;
            f.push(
                Form::new(format!("imul{size} r, r"), &enc(size, &[], false, &[0x0f, 0xaf], 1, Rm::Reg(10), &[]))
                    .undefined(u),
            );
            f.push(
                Form::new(format!("imul{size} r, m"), &enc(size, &[], false, &[0x0f, 0xaf], 1, Rm::Mem, &[]))
                    .undefined(u),
            );
            f.push(
                Form::new(format!("imul{size} r, r, imm8"), &enc(size, &[], false, &[0x6b], 1, Rm::Reg(2), &[0xf3]))
                    .undefined(u),
            );
            f.push(
                Form::new(
                    format!("imul{size} r, m, imm"),
                    &enc(size, &[], false, &[0x69], 9, Rm::Mem, &imm(size, 0x7654_3210)),
                )
                .undefined(u),
            );
        }
    }
    f.push(Form::new("inc ah", &[0xfe, 0xc4]));
    f.push(Form::new("neg ch", &[0xf6, 0xdd]));
    f.push(Form::new("mul dh", &[0xf6, 0xe6]).undefined(SF | ZF | AF | PF));
    f.push(Form::new("cbw", &[0x66, 0x98]));
    f.push(Form::new("cwde", &[0x98]));
    f.push(Form::new("cdqe", &[0x48, 0x98]));
    f.push(Form::new("cwd", &[0x66, 0x99]));
    f.push(Form::new("cdq", &[0x99]));
    f.push(Form::new("cqo", &[0x48, 0x99]));
}

/// Undefined flags of a shift (`rot` false) or rotate with the masked count `n`.
fn shift_undefined(n: u64, size: u8, rot: bool) -> u64 {
    let bits = u64::from(size) * 8;
    let mut u = 0;
    if n != 0 && !rot {
        u |= AF;
    }
    if n > 1 {
        u |= OF;
    }
    if !rot && n >= bits {
        u |= CF;
    }
    u
}

fn shifts(f: &mut Vec<Form>) {
    const NAMES: [&str; 8] = ["rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar"];
    for (n, name) in NAMES.iter().enumerate() {
        let rot = n < 4;
        for size in SIZES {
            let w = u8::from(size > 1);
            let mask = if size == 8 { 63 } else { 31 };
            for rm in [Rm::Reg(0), Rm::Reg(13), Rm::Mem] {
                for count in [0u8, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 0xff] {
                    let u = shift_undefined(u64::from(count) & mask, size, rot);
                    f.push(
                        Form::new(
                            format!("{name}{size} {count}"),
                            &enc(size, &[], false, &[0xc0 | w], n as u8, rm, &[count]),
                        )
                        .undefined(u),
                    );
                }
                f.push(
                    Form::new(format!("{name}{size} by 1"), &enc(size, &[], false, &[0xd0 | w], n as u8, rm, &[]))
                        .undefined(if rot { 0 } else { AF }),
                );
                f.push(
                    Form::new(format!("{name}{size} by cl"), &enc(size, &[], false, &[0xd2 | w], n as u8, rm, &[]))
                        .undefined_for(move |r| shift_undefined(r.gpr[1] & mask, size, rot))
                        .prepare(move |r, rng| {
                            r.gpr[1] = r.gpr[1] & !0xff | rng.below(if rng.0 & 1 == 0 { 34 } else { 256 })
                        }),
                );
            }
            f.push(
                Form::new(
                    format!("{name}{size} cl, cl"),
                    &enc(size, &[], false, &[0xd2 | w], n as u8, Rm::Reg(1), &[]),
                )
                .undefined_for(move |r| shift_undefined(r.gpr[1] & mask, size, rot)),
            );
        }
        f.push(Form::new(format!("{name} ah"), &[0xd0, 0xc4 | (n as u8) << 3]).undefined(if rot { 0 } else { AF }));
    }
    for (name, op) in [("shld", 0xa4), ("shrd", 0xac)] {
        for size in [2u8, 4, 8] {
            let mask = if size == 8 { 63 } else { 31 };
            for rm in [Rm::Reg(0), Rm::Reg(6), Rm::Mem] {
                for count in [0u8, 1, 3, 15, 16, 31, 32, 63] {
                    let n = u64::from(count) & mask;
                    if n > u64::from(size) * 8 {
                        continue;
                    }
                    let u = shift_undefined(n, 8, false);
                    f.push(
                        Form::new(
                            format!("{name}{size} {count}"),
                            &enc(size, &[], false, &[0x0f, op], 6, rm, &[count]),
                        )
                        .undefined(u),
                    );
                }
                f.push(
                    Form::new(format!("{name}{size} cl"), &enc(size, &[], false, &[0x0f, op | 1], 9, rm, &[]))
                        .undefined_for(move |r| shift_undefined(r.gpr[1] & mask, 8, false))
                        .skip(move |r| r.gpr[1] & mask > u64::from(size) * 8),
                );
            }
        }
    }
}

fn bits(f: &mut Vec<Form>) {
    let u = OF | SF | AF | PF;
    for size in [2u8, 4, 8] {
        for (name, op, n) in [("bt", 0xa3, 4), ("bts", 0xab, 5), ("btr", 0xb3, 6), ("btc", 0xbb, 7)] {
            f.push(
                Form::new(format!("{name}{size} r, r"), &enc(size, &[], false, &[0x0f, op], 9, Rm::Reg(2), &[]))
                    .undefined(u),
            );
            f.push(
                Form::new(format!("{name}{size} same"), &enc(size, &[], false, &[0x0f, op], 2, Rm::Reg(2), &[]))
                    .undefined(u),
            );
            let near = |r: &mut Regs, rng: &mut crate::insn::Rng| r.gpr[1] = rng.below(0x4000).wrapping_sub(0x2000);
            f.push(
                Form::new(format!("{name}{size} m, r"), &enc(size, &[], false, &[0x0f, op], 1, Rm::Mem, &[]))
                    .undefined(u)
                    .prepare(near),
            );
            if n > 4 {
                f.push(
                    Form::new(
                        format!("lock {name}{size} m, r"),
                        &enc(size, &[0xf0], false, &[0x0f, op], 1, Rm::Mem, &[]),
                    )
                    .undefined(u)
                    .prepare(near),
                );
                f.push(
                    Form::new(
                        format!("lock {name}{size} m, imm"),
                        &enc(size, &[0xf0], false, &[0x0f, 0xba], n, Rm::Mem, &[5]),
                    )
                    .undefined(u),
                );
            }
            for i in [0u8, 7, 17, 63, 0xff] {
                f.push(
                    Form::new(
                        format!("{name}{size} r, {i}"),
                        &enc(size, &[], false, &[0x0f, 0xba], n, Rm::Reg(11), &[i]),
                    )
                    .undefined(u),
                );
                f.push(
                    Form::new(format!("{name}{size} m, {i}"), &enc(size, &[], false, &[0x0f, 0xba], n, Rm::Mem, &[i]))
                        .undefined(u),
                );
            }
        }
        let scan = CF | OF | SF | AF | PF;
        for rm in [Rm::Reg(2), Rm::Reg(1), Rm::Mem] {
            f.push(Form::new(format!("bsf{size}"), &enc(size, &[], false, &[0x0f, 0xbc], 1, rm, &[])).undefined(scan));
            f.push(Form::new(format!("bsr{size}"), &enc(size, &[], false, &[0x0f, 0xbd], 1, rm, &[])).undefined(scan));
            f.push(
                Form::new(format!("tzcnt{size}"), &enc(size, &[0xf3], false, &[0x0f, 0xbc], 1, rm, &[])).undefined(u),
            );
            f.push(
                Form::new(format!("lzcnt{size}"), &enc(size, &[0xf3], false, &[0x0f, 0xbd], 1, rm, &[])).undefined(u),
            );
            f.push(Form::new(format!("popcnt{size}"), &enc(size, &[0xf3], false, &[0x0f, 0xb8], 1, rm, &[])));
        }
    }
    for rm in [Rm::Reg(2), Rm::Mem] {
        f.push(Form::new("crc32 b", &enc(4, &[0xf2], false, &[0x0f, 0x38, 0xf0], 1, rm, &[])));
        f.push(Form::new("crc32 w", &enc(2, &[0xf2], false, &[0x0f, 0x38, 0xf1], 1, rm, &[])));
        f.push(Form::new("crc32 d", &enc(4, &[0xf2], false, &[0x0f, 0x38, 0xf1], 1, rm, &[])));
        f.push(Form::new("crc32 q", &enc(8, &[0xf2], false, &[0x0f, 0x38, 0xf1], 1, rm, &[])));
        f.push(Form::new("crc32 qb", &enc(8, &[0xf2], false, &[0x0f, 0x38, 0xf0], 1, rm, &[])));
    }
}

fn moves(f: &mut Vec<Form>) {
    for size in SIZES {
        let w = u8::from(size > 1);
        f.push(Form::new(format!("mov{size} r, r"), &enc(size, &[], true, &[0x88 | w], 4, Rm::Reg(0), &[])));
        f.push(Form::new(format!("mov{size} m, r"), &enc(size, &[], false, &[0x88 | w], 9, Rm::Mem, &[])));
        f.push(Form::new(format!("mov{size} r, m"), &enc(size, &[], true, &[0x8a | w], 5, Rm::Mem, &[])));
        f.push(Form::new(format!("mov{size} m, imm"), &enc(size, &[], false, &[0xc6 | w], 0, Rm::Mem, &imm(size, -3))));
        f.push(Form::new(
            format!("mov{size} r, imm"),
            &enc(size, &[], false, &[0xc6 | w], 0, Rm::Reg(1), &imm(size, -3)),
        ));
        let mut b = if size == 2 { vec![0x66] } else { vec![] };
        if size == 8 {
            b.push(0x48);
        }
        b.push(if size == 1 { 0xb6 } else { 0xbe });
        b.extend(&0xfedc_ba98_7654_3210u64.to_le_bytes()[..usize::from(size)]);
        f.push(Form::new(format!("mov{size} short imm"), &b));
        // moffs64
        for op in [0xa0, 0xa2] {
            let mut b = if size == 2 { vec![0x66] } else { vec![] };
            if size == 8 {
                b.push(0x48);
            }
            b.push(op | w);
            b.extend((MIDDLE + 3).to_le_bytes());
            f.push(Form::new(format!("mov{size} moffs {op:x}"), &b));
            let mut b = vec![0x67];
            if size == 2 {
                b.push(0x66);
            }
            if size == 8 {
                b.push(0x48);
            }
            b.push(op | w);
            b.extend((MIDDLE as u32 + 3).to_le_bytes());
            f.push(Form::new(format!("mov{size} moffs32 {op:x}"), &b));
        }
        if size > 1 {
            for rm in [Rm::Reg(6), Rm::Reg(1), Rm::Mem] {
                for (name, op) in [("movzx b", 0xb6), ("movzx w", 0xb7), ("movsx b", 0xbe), ("movsx w", 0xbf)] {
                    f.push(Form::new(format!("{name}{size}"), &enc(size, &[], false, &[0x0f, op], 1, rm, &[])));
                    f.push(Form::new(format!("{name}{size} rex"), &enc(size, &[], true, &[0x0f, op], 1, rm, &[])));
                }
                f.push(Form::new(format!("movsxd{size}"), &enc(size, &[], false, &[0x63], 1, rm, &[])));
                f.push(Form::new(
                    format!("movbe{size} load"),
                    &enc(size, &[], false, &[0x0f, 0x38, 0xf0], 1, Rm::Mem, &[]),
                ));
                f.push(Form::new(
                    format!("movbe{size} store"),
                    &enc(size, &[], false, &[0x0f, 0x38, 0xf1], 1, Rm::Mem, &[]),
                ));
                for cc in 0..16u8 {
                    f.push(Form::new(
                        format!("cmov{cc}{size}"),
                        &enc(size, &[], false, &[0x0f, 0x40 | cc], 9, rm, &[]),
                    ));
                }
                f.push(Form::new(format!("lea{size}"), &enc(size, &[], false, &[0x8d], 1, Rm::Mem, &[])));
                f.push(Form::new(format!("nop{size}"), &enc(size, &[], false, &[0x0f, 0x1f], 0, rm, &[])));
            }
        }
    }
    for cc in 0..16u8 {
        for (rm, rex) in [(Rm::Reg(0), false), (Rm::Reg(5), false), (Rm::Reg(5), true), (Rm::Mem, false)] {
            f.push(Form::new(format!("set{cc}"), &enc(1, &[], rex, &[0x0f, 0x90 | cc], 0, rm, &[])));
        }
    }
    for r in [0u8, 1, 7, 10] {
        f.push(Form::new(format!("bswap4 {r}"), &[0x40 | r >> 3, 0x0f, 0xc8 | r & 7]));
        f.push(Form::new(format!("bswap8 {r}"), &[0x48 | r >> 3, 0x0f, 0xc8 | r & 7]));
    }
    f.push(Form::new("mov ah, bl", &[0x88, 0xdc]));
    f.push(Form::new("mov dl, ch", &[0x88, 0xea]));
    f.push(Form::new("mov bh, m", &[0x8a, 0x7b, 0x10]));
    f.push(Form::new("mov m, dh", &[0x88, 0x73, 0x10]));
    f.push(Form::new("mov ch, imm", &[0xb5, 0x99]));
    f.push(Form::new("xlat", &[0xd7]));
    f.push(Form::new("nop", &[0x90]));
    f.push(Form::new("pause", &[0xf3, 0x90]));
    f.push(Form::new("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa]));
    f.push(Form::new("prefetcht0", &[0x0f, 0x18, 0x4b, 0x10]));
    f.push(Form::new("prefetchw", &[0x0f, 0x0d, 0x4b, 0x10]));
    f.push(Form::new("movnti4", &[0x0f, 0xc3, 0x4b, 0x10]));
    f.push(Form::new("movnti8", &[0x48, 0x0f, 0xc3, 0x4b, 0x10]));
    // Hint NOPs, whatever they have come to mean on other CPUs.
    for op in 0x18..=0x1fu8 {
        for reg in 0..8u8 {
            for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3]] {
                for modrm in [&[0xc1 | reg << 3][..], &[0x43 | reg << 3, 0x10]] {
                    let bytes = [prefix, &[0x0f, op], modrm].concat();
                    f.push(Form::new(format!("hint {bytes:02x?}"), &bytes));
                }
            }
        }
    }
    f.push(Form::new("ud2", &[0x0f, 0x0b]));
    f.push(Form::new("lock nop is #UD", &[0xf0, 0x90]));
    f.push(Form::new("lock add reg is #UD", &[0xf0, 0x01, 0xc8]));
    f.push(Form::new("lfence", &[0x0f, 0xae, 0xe8]));
    f.push(Form::new("mfence", &[0x0f, 0xae, 0xf0]));
    f.push(Form::new("sfence", &[0x0f, 0xae, 0xf8]));
    f.push(Form::new("clflush", &[0x0f, 0xae, 0x7b, 0x10]));
    f.push(Form::new("hlt is #GP", &[0xf4]));
    f.push(Form::new("cli is #GP", &[0x0f, 0x06]));
    f.push(Form::new("mov load fault", &[0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0]));
    f.push(Form::new("mov non-canonical", &[0x48, 0x8b, 0x01]).prepare(|r, _| r.gpr[1] = 0x8000_0000_0000_0000));
}

fn exchange(f: &mut Vec<Form>) {
    for size in SIZES {
        let w = u8::from(size > 1);
        for rm in [Rm::Reg(1), Rm::Reg(9), Rm::Reg(0), Rm::Mem] {
            f.push(Form::new(format!("xchg{size}"), &enc(size, &[], true, &[0x86 | w], 9, rm, &[])));
            f.push(Form::new(format!("xadd{size}"), &enc(size, &[], true, &[0x0f, 0xc0 | w], 9, rm, &[])));
            // The accumulator often equals the destination.
            let same = |r: &mut Regs, rng: &mut crate::insn::Rng| {
                if rng.below(2) == 0 {
                    r.gpr[1] = r.gpr[0];
                    r.gpr[9] = r.gpr[0];
                }
                if rng.below(4) == 0 {
                    r.gpr[1] = r.gpr[0] & 0xffff_ffff;
                }
            };
            f.push(
                Form::new(
                    format!("cmpxchg{size} {}", rm == Rm::Mem),
                    &enc(size, &[], true, &[0x0f, 0xb0 | w], 9, rm, &[]),
                )
                .prepare(same),
            );
            f.push(
                Form::new(format!("cmpxchg{size} rdx"), &enc(size, &[], true, &[0x0f, 0xb0 | w], 2, rm, &[]))
                    .prepare(same),
            );
        }
        let equal = |r: &mut Regs, rng: &mut crate::insn::Rng| {
            r.gpr[3] = MIDDLE;
            r.gpr[0] = rng.below(3);
            r.gpr[2] = 0;
        };
        let small = |m: &mut [u8], rng: &mut crate::insn::Rng| {
            let at = SCRATCH_LEN / 2 + 16;
            m[at..at + 16].fill(0);
            m[at] = rng.below(3) as u8;
        };
        f.push(
            Form::new(format!("cmpxchg{size} m"), &enc(size, &[], true, &[0x0f, 0xb0 | w], 9, Rm::Mem, &[]))
                .prepare(equal)
                .prepare_mem(small),
        );
        f.push(
            Form::new(format!("lock cmpxchg{size} m"), &enc(size, &[0xf0], true, &[0x0f, 0xb0 | w], 9, Rm::Mem, &[]))
                .prepare(equal)
                .prepare_mem(small),
        );
        f.push(Form::new(format!("lock xadd{size} m"), &enc(size, &[0xf0], true, &[0x0f, 0xc0 | w], 9, Rm::Mem, &[])));
        f.push(Form::new(format!("cmpxchg{size} none"), &enc(size, &[0xf0], true, &[0x0f, 0xb0 | w], 9, Rm::Mem, &[])));
        if size >= 4 {
            f.push(
                Form::new(format!("cmpxchg{}b", size * 2), &enc(size, &[0xf0], false, &[0x0f, 0xc7], 1, Rm::Mem, &[]))
                    .prepare(equal)
                    .prepare_mem(small),
            );
            f.push(
                Form::new(format!("cmpxchg{}b no", size * 2), &enc(size, &[], false, &[0x0f, 0xc7], 1, Rm::Mem, &[]))
                    .prepare(|r, _| r.gpr[3] = MIDDLE),
            );
        }
        if size > 1 {
            let mut b = if size == 2 { vec![0x66] } else { vec![] };
            b.push(if size == 8 { 0x49 } else { 0x41 });
            b.push(0x92);
            f.push(Form::new(format!("xchg{size} acc"), &b));
        }
    }
    f.push(Form::new("xchg ah, al", &[0x86, 0xc4]));
    f.push(Form::new("xadd ah, bl", &[0x0f, 0xc0, 0xdc]));
    f.push(Form::new("cmpxchg16b unaligned", &[0x48, 0x0f, 0xc7, 0x4b, 0x11]).prepare(|r, _| r.gpr[3] = MIDDLE));
}

fn bmi(f: &mut Vec<Form>) {
    for w in [false, true] {
        for rm in [Rm::Reg(2), Rm::Reg(9), Rm::Mem] {
            let n = if w { 8 } else { 4 };
            f.push(Form::new(format!("andn{n}"), &vex(2, 0, w, 0xf2, 1, 6, rm, &[])).undefined(AF | PF));
            f.push(
                Form::new(format!("bextr{n}"), &vex(2, 0, w, 0xf7, 1, 6, rm, &[]))
                    .undefined(AF | SF | PF)
                    .prepare(|r, rng| r.gpr[6] = rng.below(80) | rng.below(80) << 8 | rng.next() << 16),
            );
            f.push(Form::new(format!("bextr{n} any"), &vex(2, 0, w, 0xf7, 1, 6, rm, &[])).undefined(AF | SF | PF));
            f.push(Form::new(format!("blsr{n}"), &vex(2, 0, w, 0xf3, 1, 6, rm, &[])).undefined(AF | PF));
            f.push(Form::new(format!("blsmsk{n}"), &vex(2, 0, w, 0xf3, 2, 6, rm, &[])).undefined(AF | PF));
            f.push(Form::new(format!("blsi{n}"), &vex(2, 0, w, 0xf3, 3, 6, rm, &[])).undefined(AF | PF));
            f.push(
                Form::new(format!("bzhi{n}"), &vex(2, 0, w, 0xf5, 1, 6, rm, &[]))
                    .undefined(AF | PF)
                    .prepare(|r, rng| r.gpr[6] = rng.below(80) | rng.next() << 8),
            );
            f.push(Form::new(format!("pdep{n}"), &vex(2, 3, w, 0xf5, 1, 6, rm, &[])));
            f.push(Form::new(format!("pext{n}"), &vex(2, 2, w, 0xf5, 1, 6, rm, &[])));
            f.push(Form::new(format!("mulx{n}"), &vex(2, 3, w, 0xf6, 1, 6, rm, &[])));
            f.push(Form::new(format!("mulx{n} same"), &vex(2, 3, w, 0xf6, 6, 6, rm, &[])));
            f.push(Form::new(format!("shlx{n}"), &vex(2, 1, w, 0xf7, 1, 6, rm, &[])));
            f.push(Form::new(format!("sarx{n}"), &vex(2, 2, w, 0xf7, 1, 6, rm, &[])));
            f.push(Form::new(format!("shrx{n}"), &vex(2, 3, w, 0xf7, 1, 6, rm, &[])));
            for i in [0u8, 1, 13, 31, 32, 63, 0xff] {
                f.push(Form::new(format!("rorx{n}"), &vex(3, 3, w, 0xf0, 1, 0, rm, &[i])));
            }
            f.push(Form::new(format!("adcx{n}"), &enc(n, &[0x66], false, &[0x0f, 0x38, 0xf6], 1, rm, &[])));
            f.push(Form::new(format!("adox{n}"), &enc(n, &[0xf3], false, &[0x0f, 0x38, 0xf6], 1, rm, &[])));
        }
    }
}

fn addresses(f: &mut Vec<Form>) {
    // LEA with every kind of address: nothing is accessed, so registers are random.
    let modrms: [&[u8]; 14] = [
        &[0x0a],
        &[0x4a, 0x80],
        &[0x8a, 0x78, 0x56, 0x34, 0x92],
        &[0x0c, 0x0a],
        &[0x0c, 0x4a],
        &[0x0c, 0x8a],
        &[0x0c, 0xca],
        &[0x4c, 0xf5, 0x40],
        &[0x8c, 0x2e, 1, 2, 3, 0xf4],
        &[0x0c, 0x25, 1, 2, 3, 0x84],
        &[0x0c, 0x2d, 1, 2, 3, 0x84],
        &[0x0d, 0x10, 0, 0, 0],
        &[0x0d, 0x10, 0, 0, 0x80],
        &[0x4c, 0x24, 0xf8],
    ];
    for m in modrms {
        for rex in [0x40u8, 0x48, 0x43, 0x4b, 0x4f] {
            for (p, name) in [(&[][..], "64"), (&[0x67][..], "32")] {
                let mut b = p.to_vec();
                b.push(rex);
                b.push(0x8d);
                b.extend(m);
                f.push(Form::new(format!("lea {name} {rex:x} {m:x?}"), &b).pointers(&[]));
                let mut b16 = vec![0x66];
                b16.extend(&b);
                f.push(Form::new(format!("lea16 {name} {rex:x} {m:x?}"), &b16).pointers(&[]));
            }
        }
    }
    // Loads and stores through base, index, scale, RIP, RBP, R12, R13 and 32-bit addresses.
    let index = |r: &mut Regs, rng: &mut crate::insn::Rng| {
        r.gpr[3] = MIDDLE;
        r.gpr[5] = MIDDLE;
        r.gpr[12] = MIDDLE;
        r.gpr[13] = MIDDLE;
        r.gpr[1] = rng.below(0x200).wrapping_sub(0x100);
    };
    let index32 = move |r: &mut Regs, rng: &mut crate::insn::Rng| {
        index(r, rng);
        r.gpr[1] &= 0xffff_ffff;
        r.gpr[3] |= 0xffff_ffff_0000_0000;
    };
    for (m, rex) in [
        (&[0x04u8, 0x0b][..], 0x48u8),
        (&[0x04, 0x4b], 0x48),
        (&[0x44, 0xcb, 0x20], 0x48),
        (&[0x45, 0x08], 0x48),
        (&[0x04, 0x24], 0x48),
        (&[0x04, 0x24], 0x49),
        (&[0x45, 0xf0], 0x49),
        (&[0x84, 0x8d, 0x40, 0, 0, 0], 0x48),
    ] {
        for op in [0x8bu8, 0x89, 0x03] {
            let mut b = vec![rex, op];
            b.extend(m);
            f.push(Form::new(format!("access {b:x?}"), &b).prepare(index));
        }
    }
    f.push(Form::new("access 32", &[0x67, 0x48, 0x8b, 0x04, 0x0b]).prepare(index32));
    let disp = (MIDDLE - CODE) as u32;
    for op in [0x8bu8, 0x89, 0x01] {
        let mut b = vec![0x48, op, 0x05];
        b.extend((disp - 7).to_le_bytes());
        f.push(Form::new("access rip", &b));
        let mut b = vec![0x67, 0x48, op, 0x05];
        b.extend((disp - 8).to_le_bytes());
        f.push(Form::new("access eip", &b));
        let mut b = vec![0x48, op, 0x04, 0x25];
        b.extend((SCRATCH as u32 + 8).to_le_bytes());
        f.push(Form::new("access abs", &b));
    }
    let mut b = vec![0x48, 0x81, 0x05];
    b.extend((disp - 11).to_le_bytes());
    b.extend([1, 2, 3, 4]);
    f.push(Form::new("add [rip], imm", &b));
}

fn strings(f: &mut Vec<Form>) {
    for (name, op) in [("movs", 0xa4u8), ("cmps", 0xa6), ("stos", 0xaa), ("lods", 0xac), ("scas", 0xae)] {
        for size in SIZES {
            for rep in [None, Some(0xf3u8), Some(0xf2)] {
                for addr32 in [false, true] {
                    let mut b: Vec<u8> = rep.into_iter().collect();
                    if addr32 {
                        b.push(0x67);
                    }
                    if size == 2 {
                        b.push(0x66);
                    }
                    if size == 8 {
                        b.push(0x48);
                    }
                    b.push(op | u8::from(size > 1));
                    f.push(Form::new(format!("{name}{size} {rep:x?} {addr32}"), &b).prepare(|r, rng| {
                        r.gpr[6] = MIDDLE + rng.below(64) - 32;
                        r.gpr[7] = MIDDLE + rng.below(64) - 32;
                        r.gpr[1] = rng.below(12);
                        if rng.below(3) == 0 {
                            r.flags |= DF;
                        }
                        if rng.below(3) == 0 {
                            r.gpr[7] = r.gpr[6];
                        }
                    }));
                }
            }
        }
    }
}

fn stack(f: &mut Vec<Form>) {
    for r in [0u8, 1, 4, 5, 7, 12, 15] {
        let rex = 0x40 | r >> 3;
        f.push(Form::new(format!("push {r}"), &[rex, 0x50 | r & 7]));
        f.push(Form::new(format!("pop {r}"), &[rex, 0x58 | r & 7]));
        f.push(Form::new(format!("push16 {r}"), &[0x66, rex, 0x50 | r & 7]));
        f.push(Form::new(format!("pop16 {r}"), &[0x66, rex, 0x58 | r & 7]));
    }
    f.push(Form::new("push imm8", &[0x6a, 0x85]));
    f.push(Form::new("push imm32", &[0x68, 1, 2, 3, 0x84]));
    f.push(Form::new("push16 imm8", &[0x66, 0x6a, 0x85]));
    f.push(Form::new("push16 imm", &[0x66, 0x68, 3, 0x84]));
    f.push(Form::new("push [rbx]", &[0xff, 0x73, 0x10]));
    f.push(Form::new("push [rsp+8]", &[0xff, 0x74, 0x24, 8]));
    f.push(Form::new("push16 [rbx]", &[0x66, 0xff, 0x73, 0x10]));
    f.push(Form::new("pop [rbx]", &[0x8f, 0x43, 0x10]));
    f.push(Form::new("pop [rsp+8]", &[0x8f, 0x44, 0x24, 8]));
    f.push(Form::new("pop16 [rsp+8]", &[0x66, 0x8f, 0x44, 0x24, 8]));
    f.push(Form::new("push fault", &[0x50]).prepare(|r, _| r.gpr[4] = SCRATCH));
    f.push(Form::new("pop [m] fault", &[0x8f, 0x03]).prepare(|r, _| r.gpr[3] = SCRATCH - 0x800));
    f.push(Form::new("leave", &[0xc9]).pointers(&[5]));
    f.push(Form::new("leave16", &[0x66, 0xc9]).pointers(&[5]));
    f.push(Form::new("leave fault", &[0xc9]).pointers(&[]));
    for level in [0u8, 1, 2, 5] {
        f.push(Form::new(format!("enter {level}"), &[0xc8, 0x20, 0, level]).pointers(&[5]));
    }
}

fn flags(f: &mut Vec<Form>) {
    for (name, b) in
        [("clc", 0xf8u8), ("stc", 0xf9), ("cmc", 0xf5), ("cld", 0xfc), ("std", 0xfd), ("lahf", 0x9f), ("sahf", 0x9e)]
    {
        f.push(Form::new(name, &[b]));
    }
    f.push(Form::new("pushf", &[0x9c]));
    f.push(Form::new("pushf16", &[0x66, 0x9c]));
    let image = |m: &mut [u8], rng: &mut crate::insn::Rng| {
        let at = SCRATCH_LEN / 2;
        let v = rng.next() & (ARITH | DF) | 0x202;
        m[at..at + 8].copy_from_slice(&v.to_le_bytes());
    };
    f.push(Form::new("popf", &[0x9d]).prepare_mem(image));
    f.push(Form::new("popf16", &[0x66, 0x9d]).prepare_mem(image));
}

fn branches(f: &mut Vec<Form>) {
    let d = TAKEN as u8;
    for cc in 0..16u8 {
        f.push(Form::new(format!("j{cc} rel8"), &[0x70 | cc, d]));
        f.push(Form::new(format!("j{cc} rel32"), &[0x0f, 0x80 | cc, d, 0, 0, 0]));
    }
    f.push(Form::new("jmp rel8", &[0xeb, d]));
    f.push(Form::new("jmp rel32", &[0xe9, d, 0, 0, 0]));
    f.push(Form::new("call rel32", &[0xe8, d, 0, 0, 0]));
    for (name, op) in [("loopne", 0xe0u8), ("loope", 0xe1), ("loop", 0xe2), ("jrcxz", 0xe3)] {
        let few = |r: &mut Regs, rng: &mut crate::insn::Rng| {
            if rng.below(2) == 0 {
                r.gpr[1] = rng.below(3) | (rng.below(2) * 0xdead) << 32;
            }
        };
        f.push(Form::new(name, &[op, d]).prepare(few));
        f.push(Form::new(format!("{name} 32"), &[0x67, op, d]).prepare(few));
    }
    // Indirect: the target is the taken path.
    let target = |len: usize| CODE + (len + TAKEN) as u64;
    let at_rsp = |len: usize| {
        move |m: &mut [u8], _: &mut crate::insn::Rng| {
            m[SCRATCH_LEN / 2..SCRATCH_LEN / 2 + 8].copy_from_slice(&target(len).to_le_bytes());
        }
    };
    f.push(Form::new("ret", &[0xc3]).prepare_mem(at_rsp(1)));
    f.push(Form::new("ret 8", &[0xc2, 8, 0]).prepare_mem(at_rsp(3)));
    f.push(Form::new("rep ret", &[0xf3, 0xc3]).prepare_mem(at_rsp(2)));
    f.push(Form::new("jmp rax", &[0xff, 0xe0]).prepare(move |r, _| r.gpr[0] = target(2)));
    f.push(Form::new("call r9", &[0x41, 0xff, 0xd1]).prepare(move |r, _| r.gpr[9] = target(3)));
    f.push(Form::new("jmp [rsp]", &[0xff, 0x24, 0x24]).prepare_mem(at_rsp(3)));
    f.push(Form::new("call [rsp]", &[0xff, 0x14, 0x24]).prepare_mem(at_rsp(3)));
    f.push(Form::new("call fault", &[0xe8, d, 0, 0, 0]).prepare(|r, _| r.gpr[4] = SCRATCH));
}
