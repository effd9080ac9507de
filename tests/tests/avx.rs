//! AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ and GFNI: every form on the host CPU against translation and evaluation.
//!
//! The forms are made from the decoder's own table, so an instruction that gets a row is tested from then on. Features that
//! the host does not have are left out, and counted.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use iced_x86::{Code, CpuidFeature, EncodingKind};
use std::arch::is_x86_feature_detected;
use twofold_arch::TbFlags;
use twofold_tests::generate::{Sample, encode, of_features};
use twofold_tests::insn;
use twofold_tests::insn::{Form, Mode, Regs, Rng, SCRATCH_LEN};
use twofold_tests::oracle::{AVX32, AVX64, USER32, USER64, helpers_of, run_forms};
use twofold_tests::values::lanes;

/// Whether twofold has a feature and, if so, whether the host does.
fn host(f: CpuidFeature) -> Option<bool> {
    Some(match f {
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
        CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        CpuidFeature::GFNI => is_x86_feature_detected!("gfni"),
        _ => return None,
    })
}

/// The forms of these features: VEX-coded, and GFNI's legacy ones.
fn codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|&c| {
        let gfni = c.cpuid_features() == [CpuidFeature::GFNI];
        (c.op_code().encoding() == EncodingKind::VEX || gfni && c.op_code().encoding() == EncodingKind::Legacy)
            && of_features(c, |f| host(f).is_some())
    })
}

fn random_mxcsr(rng: &mut Rng, masks: bool) -> u32 {
    let masks = if masks { 0x1f80 } else { rng.next() as u32 & 0x1f80 | 0xc00 };
    masks
        | rng.next() as u32 & 0xe040 & if rng.below(2) == 0 { 0x6000 } else { 0xffff }
        | if rng.below(3) == 0 { rng.next() as u32 & 0x3f } else { 0 }
}

fn form<const KEY: u32>(sample: Sample, masked: bool) -> Form {
    let name = format!("{:?} {} {:02x?}", sample.code, sample.insn, sample.bytes);
    let mode = sample.mode;
    let again = sample.clone();
    let mut f = Form::new(name, &sample.bytes)
        .mode(mode)
        .pointers(&[])
        .prepare(move |r: &mut Regs, rng: &mut Rng| {
            for i in 0..16 {
                let mut v = || u128::from(lanes(rng)) | u128::from(lanes(rng)) << 64;
                r.set_xmm(i, v());
                r.high[i] = v();
            }
            // Strings with zeroes and matches in them.
            if rng.below(4) == 0 {
                let mask = 0x0303_0303_0303_0303_0303_0303_0303_0303u128;
                (0..16).for_each(|i| r.set_xmm(i, r.xmm(i) & mask));
                r.gpr[0] = rng.below(36).wrapping_sub(18);
                r.gpr[2] = rng.below(36).wrapping_sub(18);
            }
            r.set_mxcsr(random_mxcsr(rng, masked));
            sample.prepare(r, rng);
        })
        .prepare_mem(|mem, rng| {
            for at in (SCRATCH_LEN / 2 - 64..SCRATCH_LEN / 2 + 256).step_by(8) {
                let v = lanes(rng);
                mem[at..at + 8].copy_from_slice(&v.to_le_bytes());
            }
        })
        .undefined_for(move |r| again.undefined_flags(r));
    f.helpers = helpers_of::<KEY>;
    f
}

/// `encodings` different encodings of each form that `pick` wants.
fn forms<const KEY: u32>(mode: Mode, encodings: usize, masked: bool, pick: impl Fn(Code) -> bool) -> Vec<Form> {
    let mut rng = Rng(0x5eed);
    let mut out = Vec::new();
    let (mut absent, mut failed) = (0, Vec::new());
    for code in codes().filter(|&c| pick(c)) {
        if !of_features(code, |f| host(f) == Some(true)) {
            absent += 1;
            continue;
        }
        if mode != Mode::Bits64 && !code.op_code().mode32() {
            continue;
        }
        let mut made = 0;
        for _ in 0..encodings * 40 {
            if made == encodings {
                break;
            }
            if let Some(s) = encode(code, mode, &mut rng) {
                out.push(form::<KEY>(s, masked));
                made += 1;
            }
        }
        if made == 0 {
            failed.push(code);
        }
    }
    assert!(failed.is_empty(), "no encoding found of {failed:?}");
    if absent != 0 {
        println!("{absent} forms left out: the host has not got them");
    }
    out
}

fn has_imm(code: Code) -> bool {
    code.op_code().op_kinds().contains(&iced_x86::OpCodeOperandKind::imm8)
}

#[test]
fn without_immediate() {
    let all = forms::<{ AVX64.0 }>(Mode::Bits64, 12, true, |c| !has_imm(c));
    run_forms("AVX", &all, AVX64, 40);
}

#[test]
fn with_immediate() {
    let all = forms::<{ AVX64.0 }>(Mode::Bits64, 64, true, has_imm);
    run_forms("AVX with an immediate", &all, AVX64, 12);
}

#[test]
fn in_32_bit_code() {
    let all = forms::<{ AVX32.0 }>(Mode::Bits32, 8, true, |_| true);
    run_forms("AVX in 32-bit code", &all, AVX32, 20);
}

/// Unmasked exceptions, as for SSE.
#[test]
fn unmasked_exceptions() {
    const KEY: TbFlags = TbFlags(AVX64.0 | TbFlags::SSE_UNMASKED);
    let float = |c: Code| {
        let name = format!("{c:?}").to_lowercase();
        !name.contains("vdp") && (["ps_", "pd_", "ss_", "sd_"].iter().any(|s| name.contains(s)) || name.contains("cvt"))
    };
    let all = forms::<{ KEY.0 }>(Mode::Bits64, 4, false, float);
    run_forms("AVX unmasked", &all, KEY, 30);
}

/// Without the operating system's consent every VEX-coded form is #UD, and so it is in real mode.
#[test]
fn not_enabled() {
    use twofold_ir::Exit;
    let mut rng = Rng(7);
    let real = TbFlags(AVX32.0 & !TbFlags::PROTECTED);
    let ts = TbFlags(AVX64.0 | TbFlags::TS);
    let mut checked = 0;
    for code in codes().filter(|c| c.op_code().encoding() == EncodingKind::VEX) {
        for (key, mode, vector) in
            [(USER64, Mode::Bits64, 6), (USER32, Mode::Bits32, 6), (real, Mode::Bits32, 6), (ts, Mode::Bits64, 7)]
        {
            let Some(s) = (0..40).find_map(|_| encode(code, mode, &mut rng)) else { continue };
            let block = insn::translate_one(&s.bytes, key);
            let Some(Exit::Raise { exception, .. }) = block.end else { panic!("{code:?} {key:?}: {:?}", block.end) };
            assert_eq!(exception.vector as u8, vector, "{code:?} {key:?}");
            checked += 1;
        }
    }
    println!("{checked} forms refused");
}
