//! The forms that are generated, and for each encoding the inputs it runs on: what the soak and the recorded vectors share.
//!
//! Nothing here depends on the host, and the same seed makes the same cases everywhere.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

use crate::generate::{self, Sample, encode, not_run, of_features};
use crate::insn::{Form, Mode, Regs, Rng, SCRATCH_LEN, Side, randomize};
use crate::machine::{Machine, Ready, Tier};
use crate::values::{lanes, random_x87};

/// Attempts to find an encoding.
const ATTEMPTS: usize = 60;

/// Whether twofold has a feature, and instructions of it are made.
#[must_use]
pub fn has(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CPUID
            | F::MSR
            | F::TSC
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::CMOV
            | F::CX8
            | F::FXSR
            | F::SYSCALL
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::CLFSH
            | F::SEP
            | F::RDPMC
            | F::SMM
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::MOVBE
            | F::CMPXCHG16B
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::RDRAND
            | F::RDSEED
            | F::FSGSBASE
            | F::RDTSCP
            | F::RDPID
            | F::INVPCID
            | F::SMAP
            | F::PKU
            | F::XSAVE
            | F::XSAVEOPT
            | F::XSAVEC
            | F::XSAVES
            | F::VMX
            | F::INVEPT
            | F::INVVPID
            | F::PREFETCHW
            | F::CLFLUSHOPT
            | F::CLWB
            | F::MOVDIRI
            | F::SERIALIZE
    )
}

/// The forms whose features all satisfy `has`.
pub fn codes(has: impl Fn(CpuidFeature) -> bool + Copy) -> impl Iterator<Item = Code> {
    Code::values().filter(move |&c| {
        matches!(c.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && of_features(c, has)
            && c.mnemonic() != Mnemonic::INVALID
    })
}

/// The forms that are generated, in the order of the decoder's table.
pub fn generated() -> impl Iterator<Item = Code> {
    codes(has).filter(|&c| not_run(c).is_none())
}

/// An encoding of a form, in a code size at random or, when it has none there, another.
pub fn sample(code: Code, rng: &mut Rng) -> Option<Sample> {
    let mode = match rng.below(8) {
        0 | 1 => Mode::Bits32,
        2 => Mode::Bits16,
        _ => Mode::Bits64,
    };
    let modes = [mode, Mode::Bits64, Mode::Bits32, Mode::Bits16];
    modes.into_iter().find_map(|mode| (0..ATTEMPTS).find_map(|_| encode(code, mode, rng)))
}

/// An encoding with all that is needed to run it.
pub struct Case {
    /// The encoding.
    pub sample: Sample,
    /// How its registers and memory are prepared, and what it leaves undefined.
    pub form: Form,
    masked: Masked,
    ready: Option<((u32, bool), Ready)>,
}

impl Case {
    /// A case; `masked_fp` has SSE exceptions all masked.
    #[must_use]
    pub fn new(sample: Sample, masked_fp: bool) -> Self {
        let (form, masked) = (form(&sample, masked_fp), masked(&sample));
        Self { sample, form, masked, ready: None }
    }

    /// The next inputs: registers, and the scratch memory as it becomes. `None` when its result is undefined for them.
    pub fn input(&self, rng: &mut Rng, mem: &mut [u8]) -> Option<Regs> {
        let mut input = Regs::new();
        randomize(&mut input, &self.form, rng);
        (self.form.prepare_mem)(mem, rng);
        self.sample.prepare_memory(&input, mem);
        let skipped = (self.form.skip)(&input) || self.masked.aligned && !aligned(&self.sample, &input);
        (!skipped).then_some(input)
    }

    /// Flags that are undefined for these inputs.
    #[must_use]
    pub fn undefined(&self, input: &Regs) -> u64 {
        self.form.undefined | (self.form.undefined_for)(input)
    }

    /// Runs it in each of our tiers that this host has, on copies of `input` and `mem`; `on` is told how each run ended.
    pub fn run<T>(
        &mut self,
        machine: &mut Machine,
        input: &Regs,
        mem: &[u8],
        mut on: impl FnMut(Tier, Side<'_>) -> Option<T>,
    ) -> Option<T> {
        // Whether exceptions are unmasked shapes the translation.
        let masks = (input.mxcsr() & 0x1f80, input.fcw() & 0x3f == 0x3f && input.fsw() & 0x80 == 0);
        if self.ready.as_ref().is_none_or(|(m, _)| *m != masks) {
            self.ready = Some((masks, machine.prepare(&self.form.bytes, input)));
        }
        let (_, ready) = self.ready.as_ref()?;
        let mut after = mem.to_vec();
        Tier::ALL.into_iter().find_map(|tier| {
            let mut regs = input.clone();
            after.copy_from_slice(mem);
            let outcome = machine.run(ready, tier, &mut regs, &mut after)?;
            on(tier, (&regs, outcome, &after))
        })
    }

    /// Its bytes, code size and text.
    #[must_use]
    pub fn name(&self) -> String {
        let hex: String = self.form.bytes.iter().map(|b| format!("{b:02x}")).collect();
        format!("{hex} {:?} {}", self.sample.mode, self.sample.insn)
    }
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
