//! Instruction forms of 16- and 32-bit code: what 64-bit code does not have, and what differs there.

use crate::insn::{Form, Mode, Regs, Rng, SCRATCH_LEN, TAKEN};
use twofold_arch::control::rflags::{AF, ARITH, CF, DF, OF, PF, SF, ZF};

/// Both code sizes, and in each both operand sizes.
pub fn forms() -> Vec<Form> {
    let mut f = Vec::new();
    for mode in [Mode::Bits16, Mode::Bits32] {
        for size in [2u8, 4] {
            sized(&mut f, mode, size);
        }
        addresses(&mut f, mode);
        bytes(&mut f, mode);
    }
    f
}

/// The operand-size prefix, if `size` is not the code size's own.
fn prefix(mode: Mode, size: u8) -> Vec<u8> {
    if (mode == Mode::Bits16) == (size == 2) { vec![] } else { vec![0x66] }
}

/// ModRM and displacement of `[(e)bx + 0x10]` with `reg`.
fn memory(mode: Mode, reg: u8) -> [u8; 2] {
    [if mode == Mode::Bits16 { 0x47 } else { 0x43 } | reg << 3, 0x10]
}

fn imm(size: u8, v: u32) -> Vec<u8> {
    v.to_le_bytes()[..usize::from(size)].to_vec()
}

fn sized(f: &mut Vec<Form>, mode: Mode, size: u8) {
    let enc = |opcode: &[u8], rest: &[u8]| [&prefix(mode, size), opcode, rest].concat();
    let mut add = |name: &str, bytes: Vec<u8>| {
        f.push(Form::new(format!("{mode:?} {name}{size}"), &bytes).mode(mode));
        f.len() - 1
    };
    for n in 0..8u8 {
        let base = n << 3;
        add(&format!("alu{n} r, r"), enc(&[base | 1], &[0xca]));
        add(&format!("alu{n} m, r"), enc(&[base | 1], &memory(mode, 1)));
        add(&format!("alu{n} r, m"), enc(&[base | 3], &memory(mode, 6)));
        add(&format!("alu{n} acc, imm"), enc(&[base | 5], &imm(size, 0x8123_4567)));
        add(&format!("alu{n} m, imm"), enc(&[0x81], &[&memory(mode, n)[..], &imm(size, 0x7fff_fffe)].concat()));
        add(&format!("alu{n} r, imm8"), enc(&[0x83], &[0xc0 | base | 6, 0x80]));
        if n < 8 && n != 4 {
            add(&format!("inc {n}"), enc(&[0x40 | n], &[]));
            add(&format!("dec {n}"), enc(&[0x48 | n], &[]));
        }
        add(&format!("push {n}"), enc(&[0x50 | n], &[]));
        add(&format!("pop {n}"), enc(&[0x58 | n], &[]));
        add(&format!("mov {n}, imm"), enc(&[0xb8 | n], &imm(size, 0x89ab_cdef)));
    }
    add("push imm8", enc(&[0x6a], &[0x85]));
    add("push imm", enc(&[0x68], &imm(size, 0x8123_4567)));
    add("push m", enc(&[0xff], &memory(mode, 6)));
    add("pop m", enc(&[0x8f], &memory(mode, 0)));
    add("pusha", enc(&[0x60], &[]));
    add("popa", enc(&[0x61], &[]));
    add("pushf", enc(&[0x9c], &[]));
    add("mov m, r", enc(&[0x89], &memory(mode, 5)));
    add("mov r, m", enc(&[0x8b], &memory(mode, 5)));
    add("mov m, imm", enc(&[0xc7], &[&memory(mode, 0)[..], &imm(size, 0x8123_4567)].concat()));
    add("xchg m, r", enc(&[0x87], &memory(mode, 2)));
    add("xchg acc, cx", enc(&[0x91], &[]));
    add("test", enc(&[0x85], &memory(mode, 2)));
    add("not", enc(&[0xf7], &memory(mode, 2)));
    add("neg", enc(&[0xf7], &memory(mode, 3)));
    add("lea", enc(&[0x8d], &memory(mode, 3)));
    add("movzx", enc(&[0x0f, 0xb6], &memory(mode, 3)));
    add("movsx", enc(&[0x0f, 0xbe], &memory(mode, 3)));
    add("movzx w", enc(&[0x0f, 0xb7], &memory(mode, 3)));
    add("xadd", enc(&[0x0f, 0xc1], &memory(mode, 3)));
    add("cmpxchg", enc(&[0x0f, 0xb1], &memory(mode, 3)));
    add("cmov", enc(&[0x0f, 0x44], &memory(mode, 3)));
    add("cbw", enc(&[0x98], &[]));
    add("cwd", enc(&[0x99], &[]));
    add("shl 1", enc(&[0xd1], &[0xe2]));
    f.last_mut().unwrap().undefined = AF;
    let scan = CF | OF | SF | AF | PF;
    for (name, op) in [("bsf", 0xbcu8), ("bsr", 0xbd)] {
        f.push(
            Form::new(format!("{mode:?} {name}{size}"), &enc(&[0x0f, op], &memory(mode, 3))).mode(mode).undefined(scan),
        );
    }
    for (name, op) in [("bt", 0xa3u8), ("bts", 0xab)] {
        let form = Form::new(format!("{mode:?} {name}{size} m, r"), &enc(&[0x0f, op], &memory(mode, 1))).mode(mode);
        f.push(
            form.undefined(OF | SF | AF | PF)
                .prepare(|r, rng| r.gpr[1] = rng.below(0x1000).wrapping_sub(0x800) as u32 as u64),
        );
    }
    for (name, n) in [("mul", 4u8), ("imul", 5)] {
        f.push(
            Form::new(format!("{mode:?} {name}{size}"), &enc(&[0xf7], &memory(mode, n)))
                .mode(mode)
                .undefined(SF | ZF | AF | PF),
        );
    }
    for (name, n) in [("div", 6u8), ("idiv", 7)] {
        let form =
            Form::new(format!("{mode:?} {name}{size}"), &enc(&[0xf7], &memory(mode, n))).mode(mode).undefined(ARITH);
        f.push(form.prepare(|r, rng| r.gpr[2] = rng.below(3)));
    }
    f.push(Form::new(format!("{mode:?} leave{size}"), &enc(&[0xc9], &[])).mode(mode).pointers(&[5]));
    for level in [0u8, 1, 3] {
        f.push(
            Form::new(format!("{mode:?} enter{size} {level}"), &enc(&[0xc8], &[0x10, 0, level]))
                .mode(mode)
                .pointers(&[5])
                .prepare(move |r, _| {
                    if mode == Mode::Bits16 {
                        r.gpr[5] &= 0xffff
                    }
                }),
        );
    }
    let image = |m: &mut [u8], rng: &mut Rng| {
        let v = rng.next() & (ARITH | DF) | 0x202;
        m[SCRATCH_LEN / 2..SCRATCH_LEN / 2 + 8].copy_from_slice(&v.to_le_bytes());
    };
    f.push(Form::new(format!("{mode:?} popf{size}"), &enc(&[0x9d], &[])).mode(mode).prepare_mem(image));
    branches(f, mode, size);
    strings(f, mode, size);
}

fn branches(f: &mut Vec<Form>, mode: Mode, size: u8) {
    let enc = |opcode: &[u8], rest: &[u8]| [&prefix(mode, size), opcode, rest].concat();
    // A 16-bit operand size cuts EIP, which would leave the code page in flat 32-bit code.
    if mode == Mode::Bits32 && size == 2 {
        return;
    }
    let d = TAKEN as u32;
    for cc in 0..16u8 {
        f.push(Form::new(format!("{mode:?} j{cc} rel8 {size}"), &enc(&[0x70 | cc], &[TAKEN as u8])).mode(mode));
        f.push(Form::new(format!("{mode:?} j{cc} rel {size}"), &enc(&[0x0f, 0x80 | cc], &imm(size, d))).mode(mode));
    }
    f.push(Form::new(format!("{mode:?} jmp rel {size}"), &enc(&[0xe9], &imm(size, d))).mode(mode));
    f.push(Form::new(format!("{mode:?} call rel {size}"), &enc(&[0xe8], &imm(size, d))).mode(mode));
    f.push(
        Form::new(format!("{mode:?} jmp out {size}"), &enc(&[0xe9], &imm(size, 0x7fff_7f00)))
            .mode(mode)
            .skip(move |_| size == 2 || mode == Mode::Bits32),
    );
    for (name, op) in [("loopne", 0xe0u8), ("loope", 0xe1), ("loop", 0xe2), ("jcxz", 0xe3)] {
        for p in [&[][..], &[0x67]] {
            let bytes = [p, &enc(&[op], &[TAKEN as u8])].concat();
            f.push(Form::new(format!("{mode:?} {name} {size} {p:x?}"), &bytes).mode(mode).prepare(|r, rng| {
                if rng.below(2) == 0 {
                    r.gpr[1] = rng.below(3) | (rng.below(2) * 0xdead) << 16;
                }
            }));
        }
    }
    let to = move |len: usize| mode.rip() + (len + TAKEN) as u64;
    let at_sp = move |len: usize| {
        move |m: &mut [u8], _: &mut Rng| {
            m[SCRATCH_LEN / 2..SCRATCH_LEN / 2 + 4].copy_from_slice(&(to(len) as u32).to_le_bytes())
        }
    };
    let mut indirect = |name: &str, bytes: Vec<u8>| {
        let len = bytes.len();
        f.push(Form::new(format!("{mode:?} {name} {size}"), &bytes).mode(mode).prepare_mem(at_sp(len)).prepare(
            move |r: &mut Regs, rng| {
                // Sometimes a target beyond the limit of 16-bit CS.
                r.gpr[0] = if mode == Mode::Bits16 && rng.below(4) == 0 { 0x1_0000 } else { 0 } | to(len);
            },
        ));
    };
    indirect("ret", enc(&[0xc3], &[]));
    indirect("ret n", enc(&[0xc2], &[8, 0]));
    indirect("jmp eax", enc(&[0xff], &[0xe0]));
    indirect("call eax", enc(&[0xff], &[0xd0]));
    f.push(Form::new(format!("{mode:?} bound{size}"), &enc(&[0x62], &memory(mode, 1))).mode(mode).skip(|_| true));
}

fn strings(f: &mut Vec<Form>, mode: Mode, size: u8) {
    for (name, op) in [("movs", 0xa5u8), ("cmps", 0xa7), ("stos", 0xab), ("lods", 0xad), ("scas", 0xaf)] {
        for p in [&[][..], &[0xf3], &[0xf2], &[0x67], &[0xf3, 0x67]] {
            let bytes = [p, &prefix(mode, size), &[op]].concat();
            // 16-bit addresses reach nothing through flat segments.
            if mode == Mode::Bits32 && p.contains(&0x67) {
                continue;
            }
            f.push(Form::new(format!("{mode:?} {name}{size} {p:x?}"), &bytes).mode(mode).prepare(move |r, rng| {
                r.gpr[6] = mode.middle() + rng.below(64) - 32;
                r.gpr[7] = mode.middle() + rng.below(64) - 32;
                r.gpr[1] = rng.below(12);
                if rng.below(3) == 0 {
                    r.flags |= DF;
                }
                if mode == Mode::Bits16 && !p.contains(&0x67) {
                    for n in [1, 6, 7] {
                        r.gpr[n] |= rng.below(4) << 16;
                    }
                }
            }));
        }
    }
}

fn addresses(f: &mut Vec<Form>, mode: Mode) {
    // LEA through every 16-bit and 32-bit ModRM.
    let p16: &[u8] = if mode == Mode::Bits16 { &[] } else { &[0x67] };
    let p32: &[u8] = if mode == Mode::Bits32 { &[] } else { &[0x67] };
    for size in [2u8, 4] {
        for m in 0..3u8 {
            for rm in 0..8u8 {
                let bytes = [p16, &prefix(mode, size), &[0x8d, m << 6 | 3 << 3 | rm, 0x85, 0x91]].concat();
                let len = bytes.len()
                    - match m {
                        0 if rm == 6 => 0,
                        0 => 2,
                        1 => 1,
                        _ => 0,
                    };
                f.push(Form::new(format!("{mode:?} lea{size} a16 {m} {rm}"), &bytes[..len]).mode(mode).pointers(&[]));
                let tail: &[u8] = if rm == 4 { &[0x8e, 1, 2, 3, 0x84] } else { &[1, 2, 3, 0x84] };
                let bytes = [p32, &prefix(mode, size), &[0x8d, m << 6 | 3 << 3 | rm], tail].concat();
                let len = bytes.len()
                    - match m {
                        0 if rm == 5 => 0,
                        0 => 4,
                        1 => 3,
                        _ => 0,
                    };
                f.push(Form::new(format!("{mode:?} lea{size} a32 {m} {rm}"), &bytes[..len]).mode(mode).pointers(&[]));
            }
        }
    }
    if mode == Mode::Bits16 {
        // Loads through BX+SI, BP+DI (SS), with wrap-around and beyond the limit.
        for rm in 0..8u8 {
            for op in [0x8au8, 0x8b, 0x89] {
                f.push(
                    Form::new(format!("{mode:?} access {op:x} {rm}"), &[op, 0x80 | rm, 0x10, 0x00]).mode(mode).prepare(
                        |r, rng| {
                            r.gpr[3] = 0x1000 + rng.below(0x1800);
                            r.gpr[5] = 0x1000 + rng.below(0x1800);
                            r.gpr[6] = rng.below(0x2000).wrapping_sub(0x1000) & 0xffff;
                            r.gpr[7] = if rng.below(4) == 0 { 0x3fee + rng.below(6) } else { rng.below(0x1000) };
                        },
                    ),
                );
            }
        }
        for op in [0xa0u8, 0xa1, 0xa2, 0xa3] {
            f.push(Form::new(format!("{mode:?} moffs {op:x}"), &[op, 0x34, 0x12]).mode(mode));
        }
        f.push(Form::new("push at 0", &[0x50]).mode(mode).prepare(|r, rng| r.gpr[4] = rng.below(6)));
        f.push(Form::new("push with high bits", &[0x50]).mode(mode).prepare(|r, _| r.gpr[4] |= 0x1234_0000));
    }
}

fn bytes(f: &mut Vec<Form>, mode: Mode) {
    let undefined =
        [("daa", 0x27u8, OF), ("das", 0x2f, OF), ("aaa", 0x37, OF | SF | ZF | PF), ("aas", 0x3f, OF | SF | ZF | PF)];
    for (name, op, u) in undefined {
        f.push(Form::new(format!("{mode:?} {name}"), &[op]).mode(mode).undefined(u));
    }
    for base in [0u8, 1, 7, 10, 16, 255] {
        f.push(Form::new(format!("{mode:?} aam {base}"), &[0xd4, base]).mode(mode).undefined(OF | AF | CF));
        f.push(Form::new(format!("{mode:?} aad {base}"), &[0xd5, base]).mode(mode).undefined(OF | AF | CF));
    }
    f.push(Form::new(format!("{mode:?} salc"), &[0xd6]).mode(mode));
    f.push(Form::new(format!("{mode:?} xlat"), &[0xd7]).mode(mode));
    f.push(Form::new(format!("{mode:?} lahf"), &[0x9f]).mode(mode));
    f.push(Form::new(format!("{mode:?} sahf"), &[0x9e]).mode(mode));
    f.push(Form::new(format!("{mode:?} arpl"), &[0x63, 0xc8]).mode(mode));
    f.push(Form::new(format!("{mode:?} arpl m"), &[&[0x63][..], &memory(mode, 1)].concat()).mode(mode));
    f.push(Form::new(format!("{mode:?} inc byte"), &[&[0xfe][..], &memory(mode, 0)].concat()).mode(mode));
    f.push(Form::new(format!("{mode:?} movs b"), &[0xa4]).mode(mode).prepare(move |r, _| {
        r.gpr[6] = mode.middle();
        r.gpr[7] = mode.middle() + 9;
    }));
}
