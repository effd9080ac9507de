//! What of a run counts, and the comparison of two runs.
use super::form::Form;
use super::regs::{Mode, Outcome, Raised, Regs, SCRATCH, SCRATCH_LEN};

/// How a run ended: registers, outcome, scratch memory.
pub type Side<'a> = (&'a Regs, Outcome, &'a [u8]);

/// Which part of a run's result counts.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// The code size: outside 64-bit code the upper halves and the upper registers are nobody's.
    pub mode: Mode,
    /// Flags that are undefined.
    pub undefined: u64,
    /// Whether x87 and MMX registers count.
    pub x87: bool,
    /// Bits of the x87 status word that are undefined.
    pub undefined_status: u16,
}

/// What of a run counts, the rest being 0: two runs agree when this and the memory are the same.
#[derive(Clone, PartialEq, Eq)]
pub struct Counted {
    outcome: Outcome,
    raised: Option<Raised>,
    gpr: [u64; 16],
    flags: u64,
    taken: u64,
    xmm: [u128; 16],
    high: [u128; 16],
    mxcsr: u32,
    /// Control, status and tag word.
    x87_words: [u8; 6],
    st: [[u8; 10]; 8],
}

impl Scope {
    /// The scope of a form's comparison on a native run, with the flags that are undefined for its inputs.
    #[must_use]
    pub fn of(form: &Form, undefined: u64) -> Self {
        Self { mode: form.mode, undefined, x87: form.compare_x87, undefined_status: 0 }
    }

    /// What counts of a run.
    #[must_use]
    pub fn counted(&self, (r, outcome, _): Side<'_>) -> Counted {
        let (count, mask) = if self.mode == Mode::Bits64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
        let done = outcome == Outcome::Done;
        let mut c = Counted {
            outcome,
            raised: r.raised,
            gpr: [0; 16],
            flags: if done { r.flags & !self.undefined } else { 0 },
            taken: if done { r.taken } else { 0 },
            xmm: [0; 16],
            high: [0; 16],
            mxcsr: r.mxcsr(),
            x87_words: [0; 6],
            st: [[0; 10]; 8],
        };
        for n in 0..count {
            (c.gpr[n], c.xmm[n], c.high[n]) = (r.gpr[n] & mask, r.xmm(n), r.high[n]);
        }
        if self.x87 {
            c.x87_words.copy_from_slice(&r.fx[..6]);
            c.x87_words[2..4].copy_from_slice(&(r.fsw() & !self.undefined_status).to_le_bytes());
            c.st = core::array::from_fn(|n| r.st(n));
        }
        c
    }

    /// A hash of what counts of a run that began with the memory `before`.
    #[must_use]
    pub fn hash(&self, run: Side<'_>, before: &[u8]) -> u64 {
        let c = self.counted(run);
        let mut h = Hash::default();
        let (vector, error, cr2) = c.raised.map_or((0xff, 0, 0), |r| (r.vector, r.error, r.cr2));
        for v in [c.outcome as u64, vector.into(), error.into(), cr2, c.flags, c.taken, c.mxcsr.into()] {
            h.word(v);
        }
        c.gpr.iter().for_each(|&v| h.word(v));
        for v in c.xmm.iter().chain(&c.high) {
            h.word(*v as u64);
            h.word((v >> 64) as u64);
        }
        h.bytes(&c.x87_words);
        c.st.iter().for_each(|st| h.bytes(st));
        // Of the memory, what has changed.
        for (at, (new, old)) in run.2.chunks(8).zip(before.chunks(8)).enumerate() {
            if new != old {
                h.word(at as u64);
                h.bytes(new);
            }
        }
        h.0
    }
}

impl Counted {
    /// All of it that is not 0, a line for each kind of register.
    #[must_use]
    pub fn show(&self) -> String {
        let mut s = format!("{:?} {:x?} taken={} flags={:x}", self.outcome, self.raised, self.taken, self.flags);
        s += "\n ";
        for (name, v) in twofold_arch::Gpr::NAMES.iter().zip(self.gpr) {
            s += &format!(" {name}={v:x}");
        }
        s += &format!("\n  mxcsr={:x}", self.mxcsr);
        for n in (0..16).filter(|&n| self.xmm[n] != 0 || self.high[n] != 0) {
            s += &format!(" ymm{n}={:032x}_{:032x}", self.high[n], self.xmm[n]);
        }
        s += &format!("\n  fcw fsw ftw={:02x?}", self.x87_words);
        for (n, st) in self.st.iter().enumerate().filter(|(_, st)| **st != [0; 10]) {
            s += &format!(" st{n}={:x}", st.iter().rev().fold(0u128, |v, b| v << 8 | u128::from(*b)));
        }
        s
    }
}

/// Where memory has changed, and what is there now: eight bytes at a time.
#[must_use]
pub fn show_changes(after: &[u8], before: &[u8]) -> String {
    let words = after.chunks(8).zip(before.chunks(8)).enumerate().filter(|(_, (new, old))| new != old);
    let lines = words.map(|(n, (new, _))| format!("\n  [{:#x}] {new:02x?}", SCRATCH + 8 * n as u64));
    lines.collect()
}

/// A 64-bit hash of words: each is mixed in by a multiplication whose high half is folded back.
pub struct Hash(pub u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    /// Mixes in a word.
    pub fn word(&mut self, v: u64) {
        let m = (self.0 ^ v).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.0 = (m ^ m >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ m >> 29;
    }
    /// Mixes in bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        for part in b.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.word(u64::from_le_bytes(word));
        }
    }
}

/// What differs first between a native run and one of ours, in one line.
#[must_use]
pub fn difference(scope: &Scope, native: Side<'_>, ours: Side<'_>) -> Option<String> {
    let (a, b) = (scope.counted(native), scope.counted(ours));
    let line = |what: &str, host: String, here: String| Some(format!("{what} {host} on the host, {here} here"));
    if a.outcome != b.outcome {
        return Some(format!("host {:?}, ours {:?}", a.outcome, b.outcome));
    }
    if a.raised != b.raised {
        return Some(format!("host {:x?}, ours {:x?}", a.raised, b.raised));
    }
    if let Some(n) = (0..16).find(|&n| a.gpr[n] != b.gpr[n]) {
        let name = twofold_arch::Gpr::NAMES[n];
        return line(&format!("{name} is"), format!("{:#x}", a.gpr[n]), format!("{:#x}", b.gpr[n]));
    }
    if a.flags != b.flags {
        return line("flags are", format!("{:#x}", a.flags), format!("{:#x}", b.flags));
    }
    if a.taken != b.taken {
        return line("taken", a.taken.to_string(), b.taken.to_string());
    }
    for (what, a, b) in [("", a.xmm, b.xmm), ("'s high half", a.high, b.high)] {
        if let Some(n) = (0..16).find(|&n| a[n] != b[n]) {
            return line(&format!("ymm{n}{what} is"), format!("{:#034x}", a[n]), format!("{:#034x}", b[n]));
        }
    }
    if a.mxcsr != b.mxcsr {
        return line("mxcsr is", format!("{:#x}", a.mxcsr), format!("{:#x}", b.mxcsr));
    }
    if a.x87_words != b.x87_words {
        return line("fcw fsw ftw are", format!("{:x?}", a.x87_words), format!("{:x?}", b.x87_words));
    }
    if let Some(n) = (0..8).find(|&n| a.st[n] != b.st[n]) {
        return line(&format!("st{n} is"), format!("{:x?}", a.st[n]), format!("{:x?}", b.st[n]));
    }
    let at = native.2.iter().zip(ours.2).position(|(x, y)| x != y)?;
    let (x, y) = (&native.2[at..(at + 8).min(SCRATCH_LEN)], &ours.2[at..(at + 8).min(SCRATCH_LEN)]);
    line(&format!("memory at {:#x} is", SCRATCH + at as u64), format!("{x:x?}"), format!("{y:x?}"))
}

/// The registers in one line.
#[must_use]
pub fn show(r: &Regs) -> String {
    let mut s = String::new();
    for n in 0..16 {
        s += &format!("{}={:x} ", twofold_arch::Gpr::NAMES[n], r.gpr[n]);
    }
    s + &format!("flags={:x} mxcsr={:x} xmm0={:x} xmm1={:x}", r.flags, r.mxcsr(), r.xmm(0), r.xmm(1))
}
