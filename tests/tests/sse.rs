//! MMX, SSE to SSE4.2, AES, PCLMULQDQ and SHA: every form on the host CPU against translation and evaluation.
//!
//! The forms are made from the decoder's own table, so an instruction that gets a row is tested from then on.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use iced_x86::{
    Code, CpuidFeature, EncodingKind, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind as K, OpCodeTableKind,
};
use twofold_arch::TbFlags;
use twofold_tests::insn::{Form, MIDDLE, Mode, Regs, Rng, SCRATCH_LEN};
use twofold_tests::oracle::{USER32, USER64, helpers, helpers_of, run_forms};
use twofold_tests::values::{lanes, random_x87};

fn wanted(code: Code) -> bool {
    use CpuidFeature::*;
    let family =
        |f: &CpuidFeature| matches!(f, MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA);
    let info = code.op_code();
    let other = matches!(
        code.mnemonic(),
        Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Pause
            | Mnemonic::Crc32
            | Mnemonic::Popcnt
            | Mnemonic::Clflush
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Fisttp
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
    );
    info.encoding() == EncodingKind::Legacy
        && info.mode64()
        && info.is_instruction()
        && code.cpuid_features().iter().any(family)
        && !code.cpuid_features().contains(&D3NOW)
        && !other
}

/// Operands of one encoding of a form.
#[derive(Clone, Copy)]
enum Rm {
    Reg(u8),
    /// [rbx + disp8]
    Mem(i8),
}

/// The bytes of a form with these operands; `None` when it has no such encoding.
fn encode(info: &OpCodeInfo, reg: u8, rm: Rm, imm: u8) -> Option<Vec<u8>> {
    let kinds = info.op_kinds();
    let memory_only = kinds.iter().any(|k| matches!(k, K::mem));
    let register_only =
        kinds.iter().all(|k| !matches!(k, K::mem | K::xmm_or_mem | K::mm_or_mem | K::r32_or_mem | K::r64_or_mem));
    match rm {
        Rm::Reg(_) if memory_only => return None,
        Rm::Mem(_) if register_only => return None,
        _ => {}
    }
    let mut out = Vec::new();
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => out.push(0x66),
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {}
    }
    let rm_number = if let Rm::Reg(n) = rm { n } else { 3 };
    let rex = 0x40 | u8::from(info.operand_size() == 64) << 3 | reg >> 3 << 2 | rm_number >> 3;
    if rex != 0x40 {
        out.push(rex);
    }
    match info.table() {
        OpCodeTableKind::T0F => out.push(0x0f),
        OpCodeTableKind::T0F38 => out.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => out.extend([0x0f, 0x3a]),
        _ => return None,
    }
    out.push(info.op_code() as u8);
    if kinds.iter().any(|k| !matches!(k, K::imm8 | K::None)) {
        let reg_field = if info.group_index() >= 0 { info.group_index() as u8 } else { reg & 7 };
        match rm {
            Rm::Reg(n) => out.push(0xc0 | reg_field << 3 | n & 7),
            Rm::Mem(disp) => out.extend([0x43 | reg_field << 3, disp as u8]),
        }
    }
    if kinds.contains(&K::imm8) {
        out.push(imm);
    }
    Some(out)
}

fn random_mxcsr(rng: &mut Rng, masks: bool) -> u32 {
    let masks = if masks { 0x1f80 } else { rng.next() as u32 & 0x1f80 | 0xc00 };
    masks
        | rng.next() as u32 & 0xe040 & if rng.below(2) == 0 { 0x6000 } else { 0xffff }
        | if rng.below(3) == 0 { rng.next() as u32 & 0x3f } else { 0 }
}

fn form(code: Code, bytes: &[u8], masked: bool) -> Form {
    // AMD processors let SHA operands be unaligned; the SDM does not.
    let sha = code.cpuid_features().contains(&CpuidFeature::SHA);
    let mut f = Form::new(format!("{code:?} {bytes:02x?}"), bytes)
        .prepare(move |r: &mut Regs, rng: &mut Rng| {
            for i in 0..16 {
                r.set_xmm(i, u128::from(lanes(rng)) | u128::from(lanes(rng)) << 64);
            }
            // Equal operands, and strings with zeroes and matches in them.
            if rng.below(6) == 0 {
                r.set_xmm(2, r.xmm(1));
            }
            if rng.below(4) == 0 {
                for i in [1, 2, 9, 10] {
                    let mask = 0x0303_0303_0303_0303_0303_0303_0303_0303u128;
                    r.set_xmm(i, r.xmm(i) & mask);
                }
            }
            r.gpr[3] = MIDDLE + if !sha && rng.below(8) == 0 { rng.below(16) } else { 0 };
            r.gpr[7] = MIDDLE + rng.below(32);
            if rng.below(2) == 0 {
                r.gpr[0] = rng.below(36).wrapping_sub(18);
                r.gpr[2] = rng.below(36).wrapping_sub(18);
            }
            r.set_mxcsr(random_mxcsr(rng, masked));
            random_x87(r, rng);
        })
        .prepare_mem(|mem, rng| {
            for at in (SCRATCH_LEN / 2 - 64..SCRATCH_LEN / 2 + 64).step_by(8) {
                let v = lanes(rng);
                mem[at..at + 8].copy_from_slice(&v.to_le_bytes());
            }
        });
    // The SDM has CVTPI2PS from memory enter MMX state, which AMD processors do not.
    let enters = code == Code::Cvtpi2ps_xmm_mmm64 && bytes[2] < 0xc0;
    f.skip = Box::new(move |r| enters && r.fsw() & 0x80 != 0);
    // Whether #XM leaves MMX state entered differs between processors.
    f.compare_x87 = !enters && (masked || !format!("{code:?}").contains("_mm"));
    f.helpers = helpers;
    f
}

fn forms(masked: bool, pick: impl Fn(Code) -> bool) -> Vec<Form> {
    let mut out = Vec::new();
    for code in Code::values().filter(|&c| wanted(c) && pick(c)) {
        let info = code.op_code();
        let has_imm = info.op_kinds().contains(&K::imm8);
        for (reg, rm) in [(1, Rm::Reg(2)), (2, Rm::Reg(2)), (9, Rm::Reg(10)), (1, Rm::Mem(0)), (1, Rm::Mem(16))] {
            let first = matches!((reg, rm), (1, Rm::Reg(_)));
            let imms = match (has_imm, first) {
                (false, _) => vec![0],
                (true, true) => (0..=255).collect(),
                (true, false) => vec![0, 1, 2, 7, 0x0f, 0x1b, 0x40, 0x7d, 0x93, 0xff],
            };
            for imm in imms {
                if let Some(bytes) = encode(info, reg, rm, imm) {
                    out.push(form(code, &bytes, masked));
                }
            }
        }
    }
    out
}

fn has_imm(code: Code) -> bool {
    code.op_code().op_kinds().contains(&K::imm8)
}

#[test]
fn without_immediate() {
    run_forms("SSE and MMX", &forms(true, |c| !has_imm(c)), USER64, 200);
}

#[test]
fn with_immediate() {
    run_forms("SSE and MMX with an immediate", &forms(true, has_imm), USER64, 24);
}

/// Unmasked exceptions: #XM where the host raises SIGFPE, flags and registers as they are then. Overflow and underflow stay
/// masked, and the dot products (which check after each step) are left out: see `fpu::mxcsr`.
#[test]
fn unmasked_exceptions() {
    use CpuidFeature::*;
    let float = |c: Code| {
        let name = format!("{c:?}").to_lowercase();
        !name.starts_with("dp")
            && c.cpuid_features().iter().any(|f| matches!(f, SSE | SSE2 | SSE3 | SSE4_1))
            && (["ps_", "pd_", "ss_", "sd_"].iter().any(|s| name.contains(s)) || name.starts_with("cvt"))
    };
    let flags = TbFlags(USER64.0 | TbFlags::SSE_UNMASKED);
    run_forms("SSE floating point unmasked", &forms(false, float), flags, 40);
}

#[test]
fn in_32_bit_code() {
    let mut all = forms(true, |c| c.op_code().mode32() && c.op_code().operand_size() != 64);
    // Without REX prefixes, and few immediates.
    all.retain(|f| !f.bytes.iter().take(2).any(|b| (0x40..0x50).contains(b)));
    let mut last = Vec::new();
    all.retain(|f| {
        let (head, imm) = f.bytes.split_at(f.bytes.len() - 1);
        let again = last == head && imm[0] % 16 != 3;
        last = head.to_vec();
        !again
    });
    for f in &mut all {
        f.mode = Mode::Bits32;
        f.helpers = helpers_of::<{ USER32.0 }>;
    }
    run_forms("SSE and MMX in 32-bit code", &all, USER32, 40);
}
