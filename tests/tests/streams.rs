//! Random code in 64-, 32- and 16-bit mode does the same in every tier: results, flags, faults with all registers, and the
//! number of instructions.
//!
//! A stream is a loop over slots of 16 bytes with an instruction each, so that a handler can go on behind a fault without
//! knowing lengths. Most memory operands are given an address in the data area first; the rest fault or hit what they hit.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

use iced_x86::code_asm::*;
use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use twofold_tests::generate::encode;
use twofold_tests::guest::{Bits, CODE, DATA, DATA16, END, Guest, HASHING, MAPPED, SKIP, pte};
use twofold_tests::insn::{Mode, Rng};

/// Instructions in a stream.
const LENGTH: usize = 160;
/// Times round the loop.
const ROUNDS: u32 = 400;
/// Bytes of data that operands are aimed at.
const SPAN: u64 = 0x2000;
/// Where the number of rounds is counted.
const COUNTER: u32 = HASHING + 0x400;

/// Instructions left out: those that end a stream, say what differs from run to run, or change what the guest stands on.
fn left_out(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let code = insn.op_code();
    let segment = |r: Register| r.is_segment_register();
    code.is_privileged()
        || code.must_be_cpl0()
        || insn.is_privileged()
        || insn.flow_control() != FlowControl::Next
        || insn.has_rep_prefix()
        || insn.has_repne_prefix()
        || insn.is_ip_rel_memory_operand()
        || (insn.op_count() > 0 && insn.op0_kind() == OpKind::Register && segment(insn.op0_register()))
        || matches!(
            insn.mnemonic(),
            Rdtsc
                | Rdtscp
                | Rdrand
                | Rdseed
                | Rdpmc
                | Rdpid
                | Cpuid
                | Popf
                | Popfd
                | Popfq
                | Sti
                | Cli
                | In
                | Out
                | Insb
                | Insw
                | Insd
                | Outsb
                | Outsw
                | Outsd
                | Lds
                | Les
                | Lfs
                | Lgs
                | Lss
                | Monitor
                | Mwait
                | Pause
                | Wrfsbase
                | Wrgsbase
                | Swapgs
                | Xbegin
                | Xend
                | Xabort
                | Umonitor
                | Umwait
                | Tpause
                | Rsm
                | Wrpkru
                | Enter
                | Xsave
                | Xsave64
                | Xsavec
                | Xsavec64
                | Xsaveopt
                | Xsaveopt64
        )
}

fn is_stack_pointer(r: Register) -> bool {
    r.is_gpr() && r.full_register() == Register::RSP
}

/// Puts an instruction into the slot that `at` is in, and NOPs behind it.
fn slot(guest: &mut Guest, at: u32, bytes: &[u8]) {
    assert!(bytes.len() <= 16);
    let mut all = bytes.to_vec();
    all.resize(16, 0x90);
    // Short slots end by one long NOP or by many short ones.
    let rest = 16 - bytes.len();
    if (3..=9).contains(&rest) && bytes.len().is_multiple_of(2) {
        let nop: &[u8] = match rest {
            3 => &[0x0f, 0x1f, 0x00],
            4 => &[0x0f, 0x1f, 0x40, 0x00],
            7 => &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
            8 => &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
            _ => &[],
        };
        if guest.bits != Bits::B16 && !nop.is_empty() {
            all[bytes.len()..].copy_from_slice(nop);
        }
    }
    guest.put(at, &all);
}

/// Loads of the registers of a memory operand, so that it lies in the data area.
fn aim(insn: &Instruction, bits: Bits, rng: &mut Rng) -> Option<Vec<u8>> {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    if base == Register::None || base == index || is_stack_pointer(base) || !base.is_gpr() {
        return None;
    }
    if index != Register::None && (!index.is_gpr() || index.full_register() == base.full_register()) {
        return None;
    }
    let scaled = if index == Register::None { 0 } else { rng.below(64) };
    let narrow = base.size() == 2;
    let target =
        (u64::from(if narrow { DATA16 } else { DATA }) + rng.below(SPAN)) & if rng.below(2) == 0 { !15 } else { !0 };
    let scale = if narrow { 1 } else { u64::from(insn.memory_index_scale()) };
    let start = target.wrapping_sub(insn.memory_displacement64()).wrapping_sub(scaled * scale);
    let mut a = CodeAssembler::new(match bits {
        Bits::B64 => 64,
        Bits::B32 => 32,
        Bits::B16 => 16,
    })
    .ok()?;
    for (register, value) in [(index, scaled), (base, start)] {
        if register == Register::None {
            continue;
        }
        let load = match register.size() {
            2 => Instruction::with2(mov16(register), register, value as u16 as i32),
            4 => Instruction::with2(mov32(register), register, value as u32 as i32),
            _ if value < 1 << 31 => {
                let r = register.full_register32();
                Instruction::with2(mov32(r), r, value as i32)
            }
            _ => Instruction::with2(Code::Mov_r64_imm64, register, value),
        };
        a.add_instruction(load.ok()?).ok()?;
    }
    let bytes = a.assemble(0).ok()?;
    (bytes.len() <= 16).then_some(bytes)
}
fn mov16(_: Register) -> Code {
    Code::Mov_r16_imm16
}
fn mov32(_: Register) -> Code {
    Code::Mov_r32_imm32
}

/// A stream of `codes`.
fn stream(bits: Bits, codes: &[Code], seed: u64) -> Guest {
    let mode = match bits {
        Bits::B64 => Mode::Bits64,
        Bits::B32 => Mode::Bits32,
        Bits::B16 => Mode::Bits16,
    };
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut info = InstructionInfoFactory::new();
    let mut guest = Guest::new(bits);
    protect(&mut guest);

    let first = CODE + 0x100;
    let first_ip = u64::from(if bits == Bits::B16 { first - CODE } else { first });
    // Before the loop: registers at random, no records.
    guest.assemble(CODE, |a| {
        for (at, value) in [(HASHING, 1), (SKIP, 1), (COUNTER, ROUNDS)] {
            a.mov(ebx, at)?;
            a.mov(dword_ptr(ebx), value)?;
        }
        for r in [eax, ecx, edx, ebx, ebp, esi, edi] {
            a.mov(r, rng.value() as u32)?;
        }
        if bits == Bits::B64 {
            for r in [r8, r9, r10, r11, r12, r13, r14, r15] {
                a.mov(r, rng.value())?;
            }
        }
        a.movd(xmm1, eax)?;
        a.pshufd(xmm2, xmm1, 0x1b)?;
        a.jmp(first_ip)
    });
    let mut at = first;
    let mut n = 0;
    while n < LENGTH {
        // Now and then a jump over a slot or two.
        if rng.below(12) == 0 {
            let over = 16 * (1 + rng.below(3)) as i8 + 14;
            slot(&mut guest, at, &[0x70 | rng.below(16) as u8, over as u8]);
            at += 16;
            n += 1;
            continue;
        }
        let code = codes[rng.below(codes.len() as u64) as usize];
        let Some(sample) = encode(code, mode, &mut rng) else { continue };
        let insn = &sample.insn;
        let used = info.info(insn);
        let writes_stack_pointer = used.used_registers().iter().any(|u| {
            is_stack_pointer(u.register())
                && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
        });
        if left_out(insn) || writes_stack_pointer || sample.bytes.len() > 15 {
            continue;
        }
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        let string = (0..insn.op_count())
            .any(|i| matches!(insn.op_kind(i), OpKind::MemoryESEDI | OpKind::MemoryESRDI | OpKind::MemoryESDI));
        if memory && rng.below(10) != 0 {
            let Some(loads) = aim(insn, bits, &mut rng) else { continue };
            slot(&mut guest, at, &loads);
            at += 16;
        } else if string && bits == Bits::B64 {
            // mov esi, data; mov edi, data
            let mut loads = vec![0xbe];
            loads.extend((DATA + rng.below(SPAN) as u32).to_le_bytes());
            loads.push(0xbf);
            loads.extend((DATA + rng.below(SPAN) as u32).to_le_bytes());
            slot(&mut guest, at, &loads);
            at += 16;
        }
        slot(&mut guest, at, &sample.bytes);
        at += 16;
        n += 1;
    }
    // Slots for the last jumps to land on; then everything is folded into the hash, and round again.
    for _ in 0..4 {
        slot(&mut guest, at, &[]);
        at += 16;
    }
    slot(&mut guest, at, &[0xcd, 0x50]);
    // The interrupt goes on at the next slot, too.
    guest.assemble(at + 16, |a| {
        let mut end = a.create_label();
        // In 16-bit code this is out of reach without a register; none may be left with the address in it.
        let save = |a: &mut CodeAssembler| if bits == Bits::B64 { a.push(rbx) } else { a.push(ebx) };
        let restore = |a: &mut CodeAssembler| if bits == Bits::B64 { a.pop(rbx) } else { a.pop(ebx) };
        save(a)?;
        a.mov(ebx, COUNTER)?;
        a.dec(dword_ptr(ebx))?;
        restore(a)?;
        a.je(end)?;
        a.jmp(first_ip)?;
        a.set_label(&mut end)?;
        a.int(END)
    });
    guest.dump(DATA, SPAN as u32 + 0x1000);
    guest.dump(DATA16, SPAN as u32 + 0x1000);
    guest
}

/// Nothing but the data, the stacks, the variables and the records can be written to.
fn protect(guest: &mut Guest) {
    for page in (0..MAPPED).step_by(0x1000) {
        let writable =
            matches!(page, 0x8000..0xc000 | 0x10_1000 | 0x14_0000..0x16_2000 | 0x17_7000 | 0x17_f000 | 0x18_0000);
        let present = page < 0x20_0000;
        if !writable {
            guest.map(page, if present { u64::from(page) | pte::P } else { 0 });
        }
    }
}

fn codes(of: impl Fn(Code) -> bool) -> Vec<Code> {
    let encodable = |code: &Code| {
        let info = code.op_code();
        info.is_instruction() && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
    };
    Code::values().filter(encodable).filter(|&code| of(code)).collect()
}

fn is_integer(code: Code) -> bool {
    use iced_x86::CpuidFeature::*;
    code.cpuid_features().iter().all(|f| {
        matches!(
            f,
            INTEL8086
                | INTEL8086_ONLY
                | INTEL186
                | INTEL286
                | INTEL386
                | INTEL486
                | X64
                | CMOV
                | CX8
                | CMPXCHG16B
                | BMI1
                | BMI2
                | ADX
                | MOVBE
                | POPCNT
                | LZCNT
        )
    })
}

fn run(bits: Bits, seeds: std::ops::Range<u64>, of: impl Fn(Code) -> bool) {
    let codes = codes(of);
    // TWOFOLD_STREAMS=1000 tries so many others, for a long look.
    let more = std::env::var("TWOFOLD_STREAMS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    for seed in seeds.chain(1000..1000 + more) {
        let guest = stream(bits, &codes, seed);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.run_in_all_tiers()));
        match result {
            // Not everything faulted: of a round's instructions at most half ended in the handler.
            Ok(ran) => {
                let faults = ran.hashed / u64::from(ROUNDS);
                assert!((1..LENGTH as u64 / 2).contains(&faults), "{bits:?} seed {seed}: {faults} exceptions a round");
            }
            Err(_) => panic!("{bits:?} seed {seed}"),
        }
    }
}

#[test]
fn integer_code_64() {
    run(Bits::B64, 1..9, is_integer);
}

#[test]
fn integer_code_32() {
    run(Bits::B32, 1..7, is_integer);
}

#[test]
fn integer_code_16() {
    run(Bits::B16, 1..7, is_integer);
}

#[test]
fn everything_64() {
    run(Bits::B64, 1..9, |_| true);
}

#[test]
fn everything_32() {
    run(Bits::B32, 1..7, |_| true);
}

#[test]
fn everything_16() {
    run(Bits::B16, 1..5, |_| true);
}
