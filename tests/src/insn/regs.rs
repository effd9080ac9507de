//! The registers of one instruction's run as all sides take and give them, how a run ends, and where code and data are.
use twofold_arch::control::rflags;
use twofold_arch::{CpuState, TbFlags};

/// Linear address of the code page.
pub const CODE: u64 = 0x1000_0000;
/// Linear address of the scratch area; the pages before and after it are not mapped.
pub const SCRATCH: u64 = 0x1001_0000;
/// Its size.
pub const SCRATCH_LEN: usize = 0x4000;
/// Where pointer registers point by default: its middle.
pub const MIDDLE: u64 = SCRATCH + SCRATCH_LEN as u64 / 2;

/// The user-visible registers, as both sides take and give them.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Regs {
    /// An FXSAVE image.
    pub fx: [u8; 512],
    /// In encoding order.
    pub gpr: [u64; 16],
    /// RFLAGS: the six arithmetic flags and DF.
    pub flags: u64,
    /// 1 when a branch was taken (to [`TAKEN`] bytes after the instruction).
    pub taken: u64,
    /// The high halves of the vector registers; not on hosts without AVX.
    pub high: [u128; 16],
    /// What was raised: vector, error code and CR2 (of a page fault).
    pub raised: Option<Raised>,
}

/// An exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raised {
    /// Its vector.
    pub vector: u8,
    /// The error code of a page fault, else 0.
    pub error: u32,
    /// The address of a page fault, else 0.
    pub cr2: u64,
}

impl Raised {
    /// With what only page faults have dropped for others.
    #[must_use]
    pub fn new(vector: u8, error: u32, cr2: u64) -> Self {
        // Linux says "present" of all of its own half.
        let error = if cr2 >> 63 != 0 { error & !1 } else { error };
        if vector == 14 { Self { vector, error, cr2 } } else { Self { vector, error: 0, cr2: 0 } }
    }
}

/// What a run ended with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The instruction completed.
    Done,
    /// #DE.
    Divide,
    /// #UD.
    Undefined,
    /// #GP or #PF (a SIGSEGV natively).
    Protection,
    /// #SS or #AC (a SIGBUS natively).
    Bus,
    /// #XM or #MF: also SIGFPE natively, with #DE.
    Other,
}

impl Outcome {
    /// What an exception is natively: a signal.
    #[must_use]
    pub fn of_vector(vector: u32) -> Self {
        match vector {
            0 => Outcome::Divide,
            6 => Outcome::Undefined,
            13 | 14 => Outcome::Protection,
            12 | 17 => Outcome::Bus,
            16 | 19 => Outcome::Divide,
            _ => Outcome::Other,
        }
    }
}

/// Branch forms jump over this many bytes when taken: `jcc` and the like end in rel8 or rel32 = `TAKEN`.
pub const TAKEN: usize = 14;

impl Regs {
    /// All zero but the control words, which have their usual values.
    #[must_use]
    pub fn new() -> Self {
        let mut r = Self { fx: [0; 512], gpr: [0; 16], flags: 0, taken: 0, high: [0; 16], raised: None };
        r.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        r.set_mxcsr(0x1f80);
        r.gpr[4] = MIDDLE;
        r
    }
    /// MXCSR.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx[24], self.fx[25], self.fx[26], self.fx[27]])
    }
    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, v: u32) {
        self.fx[24..28].copy_from_slice(&v.to_le_bytes());
    }
    /// XMM register `n`.
    #[must_use]
    pub fn xmm(&self, n: usize) -> u128 {
        u128::from_le_bytes(self.fx[160 + 16 * n..176 + 16 * n].try_into().unwrap_or([0; 16]))
    }
    /// Sets XMM register `n`.
    pub fn set_xmm(&mut self, n: usize, v: u128) {
        self.fx[160 + 16 * n..176 + 16 * n].copy_from_slice(&v.to_le_bytes());
    }
    /// ST(`n`) (MMX: with TOP 0, MMn), 10 bytes.
    #[must_use]
    pub fn st(&self, n: usize) -> [u8; 10] {
        self.fx[32 + 16 * n..42 + 16 * n].try_into().unwrap_or([0; 10])
    }
    /// Sets ST(`n`) and marks nothing in the tag word.
    pub fn set_st(&mut self, n: usize, v: [u8; 10]) {
        self.fx[32 + 16 * n..42 + 16 * n].copy_from_slice(&v);
    }
    /// The status word.
    #[must_use]
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.fx[2], self.fx[3]])
    }
    /// Sets the control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.fx[0], self.fx[1]])
    }
    /// Sets the x87 control word.
    pub fn set_fcw(&mut self, v: u16) {
        self.fx[0..2].copy_from_slice(&v.to_le_bytes());
    }
    /// Sets the status word.
    pub fn set_fsw(&mut self, v: u16) {
        self.fx[2..4].copy_from_slice(&v.to_le_bytes());
    }
    /// Sets the abridged tag word.
    pub fn set_ftw(&mut self, v: u8) {
        self.fx[4] = v;
    }

    /// Puts the registers into a guest state.
    pub fn to_state(&self, s: &mut CpuState) {
        s.gpr = self.gpr;
        s.set_rflags(self.flags & (rflags::ARITH | rflags::DF) | rflags::IF);
        s.mxcsr = self.mxcsr();
        let word = |at: usize| u16::from_le_bytes([self.fx[at], self.fx[at + 1]]);
        (s.fcw, s.fsw, s.ftw, s.fop) = (word(0), word(2), word(4) & 0xff, word(6) & 0x7ff);
        s.fip = u64::from_le_bytes(self.fx[8..16].try_into().unwrap_or([0; 8]));
        s.fdp = u64::from_le_bytes(self.fx[16..24].try_into().unwrap_or([0; 8]));
        let top = usize::from(s.fsw >> 11 & 7);
        for i in 0..8 {
            let mut b = [0u8; 16];
            b[..10].copy_from_slice(&self.st(i));
            let v = u128::from_le_bytes(b);
            s.fpr[(top + i) & 7] = [v as u64, (v >> 64) as u64];
        }
        for i in 0..16 {
            let v = self.xmm(i);
            let high = self.high[i];
            s.vec[i] = [v as u64, (v >> 64) as u64, high as u64, (high >> 64) as u64];
        }
    }

    /// Takes the registers from a guest state.
    pub fn take_state(&mut self, s: &CpuState) {
        self.gpr = s.gpr;
        self.flags = s.rflags() & (rflags::ARITH | rflags::DF);
        self.set_mxcsr(s.mxcsr);
        self.set_fcw(s.fcw);
        self.set_fsw(s.fsw);
        self.set_ftw(s.ftw as u8);
        self.fx[6..8].copy_from_slice(&s.fop.to_le_bytes());
        self.fx[8..16].copy_from_slice(&s.fip.to_le_bytes());
        self.fx[16..24].copy_from_slice(&s.fdp.to_le_bytes());
        let top = usize::from(s.fsw >> 11 & 7);
        for i in 0..8 {
            let [lo, hi] = s.fpr[(top + i) & 7];
            let v = (u128::from(lo) | u128::from(hi) << 64).to_le_bytes();
            self.set_st(i, v[..10].try_into().unwrap_or([0; 10]));
        }
        for i in 0..16 {
            let [a, b, c, d] = s.vec[i].map(u128::from);
            self.set_xmm(i, a | b << 64);
            self.high[i] = c | d << 64;
        }
    }
}

impl Default for Regs {
    fn default() -> Self {
        Self::new()
    }
}

/// Limit of the 16-bit data segment: the scratch area.
pub const LIMIT16: u32 = SCRATCH_LEN as u32 - 1;

/// The code size a form runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit code.
    Bits64,
    /// 32-bit code with flat segments.
    Bits32,
    /// 16-bit protected-mode code: CS is based at the code page, DS, ES and SS at the scratch area with its size for limit.
    Bits16,
}

impl Mode {
    /// Where pointer registers point by default.
    #[must_use]
    pub fn middle(self) -> u64 {
        if self == Mode::Bits16 { SCRATCH_LEN as u64 / 2 } else { MIDDLE }
    }
    /// RIP of the instruction.
    #[must_use]
    pub fn rip(self) -> u64 {
        if self == Mode::Bits16 { 0 } else { CODE }
    }
    /// The key it is translated under.
    #[must_use]
    pub fn key(self) -> TbFlags {
        let user = 3 << TbFlags::CPL_SHIFT | TbFlags::PROTECTED | TbFlags::LONG;
        let flat = 0xf << TbFlags::NOLIMIT_SHIFT | 0xf << TbFlags::ZERO_BASE_SHIFT | TbFlags::SS32;
        TbFlags(match self {
            Mode::Bits64 => user | 2,
            Mode::Bits32 => user | 1 | flat,
            Mode::Bits16 => user,
        })
    }
}
