//! The soak: every instruction form of every feature the model `max` has, encoded at random, on the host CPU and in each of
//! our tiers, with everything compared.
//!
//! One [`Fuzzer`] serves the test with its fixed seed and budget and the long run (`examples/soak.rs`). What is not
//! compared, and why, is in `docs/conformance.md`; [`masked`] and [`crate::generate::not_run`] are its sources.

use std::arch::is_x86_feature_detected;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

use crate::generate::{self, Sample, encode, not_run, of_features};
use crate::machine::{Machine, Tier};
use crate::native::{Form, Mode, Native, Regs, Rng, SCRATCH_LEN, difference, randomize, show};
use crate::oracle::{lanes, random_x87};

/// Runs of one encoding.
const RUNS: usize = 12;
/// Attempts to find an encoding.
const ATTEMPTS: usize = 60;

/// Whether twofold has a feature (`None`: it has not) and the host does.
#[must_use]
pub fn feature(f: CpuidFeature) -> Option<bool> {
    use CpuidFeature as F;
    Some(match f {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CPUID | F::MSR | F::TSC => {
            true
        }
        F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::CMOV | F::CX8 | F::FXSR | F::SYSCALL => true,
        F::MULTIBYTENOP | F::PAUSE | F::CLFSH | F::SEP | F::RDPMC | F::SMM => true,
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSSE3 => is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::POPCNT => is_x86_feature_detected!("popcnt"),
        F::LZCNT => is_x86_feature_detected!("lzcnt"),
        F::BMI1 => is_x86_feature_detected!("bmi1"),
        F::BMI2 => is_x86_feature_detected!("bmi2"),
        F::ADX => is_x86_feature_detected!("adx"),
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        F::AVX => is_x86_feature_detected!("avx"),
        F::AVX2 => is_x86_feature_detected!("avx2"),
        F::FMA => is_x86_feature_detected!("fma"),
        F::F16C => is_x86_feature_detected!("f16c"),
        F::GFNI => is_x86_feature_detected!("gfni"),
        F::VAES => is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        F::RDRAND | F::RDSEED | F::FSGSBASE | F::RDTSCP | F::RDPID | F::INVPCID | F::SMAP | F::PKU => true,
        F::XSAVE | F::XSAVEOPT | F::XSAVEC | F::XSAVES | F::VMX | F::INVEPT | F::INVVPID => true,
        F::PREFETCHW => is_x86_feature_detected!("sse3"),
        F::CLFLUSHOPT => cpuid7(1, 23),
        F::CLWB => cpuid7(1, 24),
        F::MOVDIRI => cpuid7(2, 27),
        F::SERIALIZE => cpuid7(3, 14),
        _ => return None,
    })
}

/// A bit of the host's CPUID leaf 7; register 1 is EBX, 2 ECX, 3 EDX.
fn cpuid7(register: usize, bit: u32) -> bool {
    let r = core::arch::x86_64::__cpuid_count(7, 0);
    [r.eax, r.ebx, r.ecx, r.edx][register] >> bit & 1 != 0
}

/// Why a form is compared in part or not at all on this kind of host, beyond what the SDM leaves undefined.
fn masked(s: &Sample) -> Masked {
    let mut m = Masked::default();
    let legacy = s.code.op_code().encoding() == EncodingKind::Legacy;
    // AMD processors let SHA operands be unaligned; the SDM does not.
    m.aligned = legacy && s.code.cpuid_features().contains(&CpuidFeature::SHA);
    // The SDM has CVTPI2PS from memory enter MMX state, which AMD processors do not.
    m.x87 = s.code == Code::Cvtpi2ps_xmm_mmm64;
    m
}

/// What is left out of a comparison.
#[derive(Clone, Copy, Default)]
struct Masked {
    aligned: bool,
    x87: bool,
}

/// What a run of the fuzzer did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Comparisons of a native run with one of ours.
    pub compared: u64,
    /// Encodings made.
    pub encodings: u64,
    /// Native runs.
    pub native: u64,
    /// Runs of each form.
    pub runs: BTreeMap<String, u64>,
    /// Encodings that the optimising tier did not compile.
    pub refused: u64,
    /// A line for each difference, at most one for an encoding.
    pub differences: Vec<String>,
}

impl Report {
    /// Counts in a few lines: comparisons, forms covered, forms never generated with the reason.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut out = String::new();
        let all: Vec<Code> = codes(|f| feature(f).is_some()).collect();
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        let mut missed = Vec::new();
        for &code in &all {
            match (self.runs.get(&format!("{code:?}")), not_run(code)) {
                (Some(_), _) => {}
                (None, Some(why)) => *reasons.entry(why).or_default() += 1,
                (None, None) if !of_features(code, |f| feature(f) == Some(true)) => {
                    *reasons.entry("the host lacks the feature").or_default() += 1;
                }
                (None, None) => missed.push(code),
            }
        }
        let few = self.runs.values().filter(|n| **n < 100).count();
        let _ =
            writeln!(out, "{few} forms ran fewer than 100 times; the optimising tier refused {} blocks", self.refused);
        let least = self.runs.iter().min_by_key(|r| r.1);
        let _ = writeln!(
            out,
            "{} comparisons ({} native runs of {} encodings): {} of {} forms covered, {} differences",
            self.compared,
            self.native,
            self.encodings,
            self.runs.len(),
            all.len(),
            self.differences.len()
        );
        if let Some((form, n)) = least {
            let _ = writeln!(out, "fewest runs: {n} of {form}");
        }
        for (why, n) in reasons {
            let _ = writeln!(out, "never generated: {n} forms: {why}");
        }
        let _ = writeln!(out, "never generated, without a reason: {} forms {missed:?}", missed.len());
        out
    }
}

/// The forms whose features all satisfy `has`.
fn codes(has: impl Fn(CpuidFeature) -> bool + Copy) -> impl Iterator<Item = Code> {
    Code::values().filter(move |&c| {
        matches!(c.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && of_features(c, has)
            && c.mnemonic() != Mnemonic::INVALID
    })
}

/// Makes samples and compares.
pub struct Fuzzer {
    rng: Rng,
    machine: Machine,
    /// What can be generated, with the modes that have it.
    forms: Vec<Code>,
    next: usize,
    /// The counts so far.
    pub report: Report,
}

impl Fuzzer {
    /// A fuzzer whose samples follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let forms = codes(|f| feature(f) == Some(true)).filter(|&c| not_run(c).is_none()).collect();
        let rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self { rng, machine: Machine::new(), forms, next: 0, report: Report::default() }
    }

    /// Number of forms that take turns.
    #[must_use]
    pub fn forms(&self) -> usize {
        self.forms.len()
    }

    /// Tries the next form in turn: one encoding, [`RUNS`] runs. The line of a difference, if there is one.
    pub fn step(&mut self) -> Option<String> {
        let code = self.forms[self.next];
        self.next = (self.next + 1) % self.forms.len();
        let mode = match self.rng.below(8) {
            0 | 1 => Mode::Bits32,
            2 => Mode::Bits16,
            _ => Mode::Bits64,
        };
        // A form that the mode does not have is made in one that has it.
        for mode in [mode, Mode::Bits64, Mode::Bits32, Mode::Bits16] {
            for _ in 0..ATTEMPTS {
                if let Some(s) = encode(code, mode, &mut self.rng) {
                    let line = self.check(s);
                    self.report.differences.extend(line.clone());
                    return line;
                }
            }
        }
        None
    }

    fn check(&mut self, s: Sample) -> Option<String> {
        let mut native = Native::lock();
        let form = form(&s, self.rng.below(4) != 0);
        native.set_code(&form.bytes, form.mode);
        self.machine.set_mode(form.mode);
        self.machine.show_code(&native.code_page());
        let masked = masked(&s);
        self.report.encodings += 1;
        let mut mem: Vec<u8> = (0..SCRATCH_LEN).map(|_| self.rng.next() as u8).collect();
        let mut like: Option<((u32, bool), crate::machine::Ready)> = None;
        let (mut native_mem, mut our_mem) = (mem.clone(), mem.clone());
        for i in 0..RUNS {
            let mut input = Regs::new();
            randomize(&mut input, &form, &mut self.rng);
            (form.prepare_mem)(&mut mem, &mut self.rng);
            s.prepare_memory(&input, &mut mem);
            if (form.skip)(&input) || masked.aligned && !aligned(&s, &input) {
                continue;
            }
            native_mem.copy_from_slice(&mem);
            let mut a = input.clone();
            let outcome = native.run(&mut a, &mut native_mem);
            self.report.native += 1;
            *self.report.runs.entry(format!("{:?}", s.code)).or_default() += 1;
            // Whether exceptions are unmasked shapes the translation.
            let x87_host = input.fcw() & 0x3f == 0x3f && input.fsw() & 0x80 == 0;
            let masks = (input.mxcsr() & 0x1f80, x87_host);
            if like.as_ref().is_none_or(|(m, _)| *m != masks) {
                like = Some((masks, self.machine.prepare(&form.bytes, &input)));
            }
            self.report.refused = self.machine.refused;
            let Some((_, ready)) = &like else { continue };
            let undefined = form.undefined | (form.undefined_for)(&input);
            for tier in [Tier::Eval, Tier::Quick, Tier::Region] {
                let mut b = input.clone();
                our_mem.copy_from_slice(&mem);
                let Some(ours) = self.machine.run(ready, tier, &mut b, &mut our_mem) else { continue };
                self.report.compared += 1;
                let d = difference(&form, undefined, (&a, outcome, &native_mem), (&b, ours, &our_mem));
                if let Some(d) = d {
                    let hex: String = form.bytes.iter().map(|b| format!("{b:02x}")).collect();
                    return Some(format!(
                        "{hex} {:?} {} [{tier:?}, run {i}]: {d}; input {}",
                        s.mode,
                        s.insn,
                        show(&input)
                    ));
                }
            }
        }
        None
    }
}

/// Whether the memory operand of a sample is aligned to 16 bytes.
fn aligned(s: &Sample, r: &Regs) -> bool {
    s.address(r).is_none_or(|a| a % 16 == 0)
}

/// The form of a sample: how its registers and memory are prepared and what it leaves undefined.
fn form(s: &Sample, masked_fp: bool) -> Form {
    let (a, b, c) = (s.clone(), s.clone(), s.clone());
    let x87 = generate::is_x87(s);
    let mut f = Form::new(format!("{:?}", s.code), &s.bytes)
        .mode(s.mode)
        .pointers(&[])
        .prepare(move |r: &mut Regs, rng: &mut Rng| {
            for i in 0..16 {
                let mut v = || u128::from(lanes(rng)) | u128::from(lanes(rng)) << 64;
                r.set_xmm(i, v());
                r.high[i] = v();
            }
            if rng.below(6) == 0 {
                // Small bytes: strings with zeroes and matches in them.
                let mask = 0x0303_0303_0303_0303_0303_0303_0303_0303u128;
                (0..16).for_each(|i| r.set_xmm(i, r.xmm(i) & mask));
                r.gpr[0] = rng.below(36).wrapping_sub(18);
                r.gpr[2] = rng.below(36).wrapping_sub(18);
            }
            random_x87(r, rng);
            r.set_mxcsr(random_mxcsr(rng, masked_fp || !generate::is_sse_float(&a)));
            a.prepare(r, rng);
        })
        .prepare_mem(|mem, rng| {
            for at in (SCRATCH_LEN / 2 - 128..SCRATCH_LEN / 2 + 384).step_by(8) {
                let v = if rng.below(2) == 0 { lanes(rng) } else { rng.value() };
                mem[at..at + 8].copy_from_slice(&v.to_le_bytes());
            }
        })
        .undefined_for(move |r| b.undefined_flags(r))
        .skip(move |r| c.undefined_result(r));
    f.compare_x87 = x87 && !masked(s).x87;
    f
}

fn random_mxcsr(rng: &mut Rng, masks: bool) -> u32 {
    // Overflow and underflow stay masked: see `runtime::fpu::mxcsr`.
    let masks = if masks { 0x1f80 } else { rng.next() as u32 & 0x1f80 | 0xc00 };
    masks
        | rng.next() as u32 & 0xe040 & if rng.below(2) == 0 { 0x6000 } else { 0xffff }
        | if rng.below(3) == 0 { rng.next() as u32 & 0x3f } else { 0 }
}
