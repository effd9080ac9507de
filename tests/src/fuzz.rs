//! The soak: every instruction form of every feature the model `max` has, encoded at random, on the host CPU and in each of
//! our tiers, with everything compared.
//!
//! One [`Fuzzer`] serves the test with its fixed seed and budget and the long run (`examples/soak.rs`). What is not
//! compared, and why, is in `docs/conformance.md`; [`crate::cases`] and [`crate::generate::not_run`] are its sources.

use std::arch::is_x86_feature_detected;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, CpuidFeature};

use crate::cases::{Case, codes, generated, has, sample};
use crate::generate::{Sample, not_run, of_features};
use crate::insn::native::Native;
use crate::insn::{Rng, SCRATCH_LEN, Scope, difference, show};
use crate::machine::Machine;

/// Runs of one encoding.
const RUNS: usize = 12;

/// Whether the host has a feature of twofold's ([`has`]).
#[must_use]
pub fn feature(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match f {
        F::SSE3 | F::PREFETCHW => is_x86_feature_detected!("sse3"),
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
        F::CLFLUSHOPT => cpuid7(1, 23),
        F::CLWB => cpuid7(1, 24),
        F::MOVDIRI => cpuid7(2, 27),
        F::SERIALIZE => cpuid7(3, 14),
        // What every x86-64 has, and what is not run on the host.
        _ => has(f),
    }
}

/// Whether the host has a form.
#[must_use]
pub fn on_host(code: Code) -> bool {
    of_features(code, feature)
}

/// A bit of the host's CPUID leaf 7; register 1 is EBX, 2 ECX, 3 EDX.
fn cpuid7(register: usize, bit: u32) -> bool {
    let r = core::arch::x86_64::__cpuid_count(7, 0);
    [r.eax, r.ebx, r.ecx, r.edx][register] >> bit & 1 != 0
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
        let all: Vec<Code> = codes(has).collect();
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        let mut missed = Vec::new();
        for &code in &all {
            match (self.runs.get(&format!("{code:?}")), not_run(code)) {
                (Some(_), _) => {}
                (None, Some(why)) => *reasons.entry(why).or_default() += 1,
                (None, None) if !on_host(code) => {
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
        let forms = generated().filter(|&c| on_host(c)).collect();
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
        let sample = sample(code, &mut self.rng)?;
        let line = self.check(sample);
        self.report.differences.extend(line.clone());
        line
    }

    fn check(&mut self, sample: Sample) -> Option<String> {
        let mut native = Native::lock();
        let mut case = Case::new(sample, self.rng.below(4) != 0);
        native.set_code(&case.form.bytes, case.form.mode);
        self.machine.set_mode(case.form.mode);
        self.machine.show_code(&native.code_page());
        self.report.encodings += 1;
        let mut mem: Vec<u8> = (0..SCRATCH_LEN).map(|_| self.rng.next() as u8).collect();
        let mut native_mem = mem.clone();
        for i in 0..RUNS {
            let Some(input) = case.input(&mut self.rng, &mut mem) else { continue };
            native_mem.copy_from_slice(&mem);
            let mut a = input.clone();
            let outcome = native.run(&mut a, &mut native_mem);
            self.report.native += 1;
            *self.report.runs.entry(format!("{:?}", case.sample.code)).or_default() += 1;
            let (scope, name) = (Scope::of(&case.form, case.undefined(&input)), case.name());
            let report = &mut self.report;
            let different = case.run(&mut self.machine, &input, &mem, |tier, ours| {
                report.compared += 1;
                let d = difference(&scope, (&a, outcome, &native_mem), ours)?;
                Some(format!("{name} [{tier:?}, run {i}]: {d}; input {}", show(&input)))
            });
            self.report.refused = self.machine.refused;
            if different.is_some() {
                return different;
            }
        }
        None
    }
}
