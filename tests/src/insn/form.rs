//! What is tested: an instruction's bytes with what is special about it, and the random values that it runs on.
use twofold_arch::control::rflags;

use super::env::Helpers;
use super::regs::{Mode, Regs};

/// A small fast generator (xorshift*), so that a failure can be repeated.
#[derive(Clone, Copy)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // a generator of numbers, not of a sequence with an end
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    /// A value as tests want it: a boundary, a small number, or anything.
    pub fn value(&mut self) -> u64 {
        const EDGES: [u64; 22] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x100,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            u64::MAX,
            u64::MAX - 1,
            0xaaaa_aaaa_aaaa_aaaa,
            0x5555_5555_5555_5555,
            0x0f,
            0x1234_5678_9abc_def0,
        ];
        match self.below(8) {
            0..=2 => EDGES[self.below(EDGES.len() as u64) as usize],
            3 => self.below(256),
            4 => EDGES[self.below(EDGES.len() as u64) as usize].wrapping_add(self.below(5)).wrapping_sub(2),
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
}

/// Changes registers before a run.
pub type Prepare = dyn Fn(&mut Regs, &mut Rng);
/// Changes the scratch memory before a run.
pub type PrepareMem = dyn Fn(&mut [u8], &mut Rng);

/// An instruction to check.
pub struct Form {
    /// What to call it in a failure.
    pub name: String,
    /// The code size it runs in.
    pub mode: Mode,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Flags it leaves undefined.
    pub undefined: u64,
    /// Registers that point into the scratch area, by encoding; rSP always does.
    pub pointers: Vec<u8>,
    /// Changes the random registers before the run.
    pub prepare: Box<Prepare>,
    /// Changes the scratch memory before the run.
    pub prepare_mem: Box<PrepareMem>,
    /// Says which flags are undefined for these inputs, beside `undefined`.
    pub undefined_for: Box<dyn Fn(&Regs) -> u64>,
    /// Whether x87 and MMX registers and instruction pointers are compared.
    pub compare_x87: bool,
    /// Whether the destination is undefined for these inputs: such a run is skipped.
    pub skip: Box<dyn Fn(&Regs) -> bool>,
    /// Extra helpers.
    pub helpers: Helpers,
}

#[allow(missing_docs)]
impl Form {
    /// Builder methods for the fields.
    #[must_use]
    pub fn undefined(mut self, flags: u64) -> Self {
        self.undefined |= flags;
        self
    }
    #[must_use]
    pub fn undefined_for(mut self, f: impl Fn(&Regs) -> u64 + 'static) -> Self {
        self.undefined_for = Box::new(f);
        self
    }
    #[must_use]
    pub fn prepare(mut self, f: impl Fn(&mut Regs, &mut Rng) + 'static) -> Self {
        self.prepare = Box::new(f);
        self
    }
    #[must_use]
    pub fn prepare_mem(mut self, f: impl Fn(&mut [u8], &mut Rng) + 'static) -> Self {
        self.prepare_mem = Box::new(f);
        self
    }
    #[must_use]
    pub fn skip(mut self, f: impl Fn(&Regs) -> bool + 'static) -> Self {
        self.skip = Box::new(f);
        self
    }
    #[must_use]
    pub fn pointers(mut self, regs: &[u8]) -> Self {
        self.pointers = regs.to_vec();
        self
    }
    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }
    /// A form with nothing special about it; memory operands are on RBX.
    #[must_use]
    pub fn new(name: impl Into<String>, bytes: &[u8]) -> Self {
        Self {
            name: name.into(),
            mode: Mode::Bits64,
            bytes: bytes.to_vec(),
            undefined: 0,
            pointers: vec![3],
            prepare: Box::new(|_, _| {}),
            prepare_mem: Box::new(|_, _| {}),
            undefined_for: Box::new(|_| 0),
            compare_x87: false,
            skip: Box::new(|_| false),
            helpers: |_, _, _| None,
        }
    }
}

/// Random registers, then what the form makes of them.
pub fn randomize(r: &mut Regs, form: &Form, rng: &mut Rng) {
    for (n, g) in r.gpr.iter_mut().enumerate() {
        if n == 4 || form.pointers.contains(&(n as u8)) {
            *g = form.mode.middle() + rng.below(8) * u64::from(n != 4);
        } else {
            *g = rng.value();
        }
        if form.mode != Mode::Bits64 && n < 8 {
            *g &= 0xffff_ffff;
        }
    }
    r.flags = rng.next() & rflags::ARITH;
    for i in 0..16 {
        r.set_xmm(i, u128::from(rng.value()) | u128::from(rng.value()) << 64);
    }
    for h in &mut r.high {
        *h = u128::from(rng.value()) | u128::from(rng.value()) << 64;
    }
    (form.prepare)(r, rng);
}
