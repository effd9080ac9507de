//! The debug registers at work: breakpoints on instructions, data and I/O ports.
//!
//! Place in the pipeline: while DR7 enables a breakpoint the dispatcher runs one instruction at a time in the evaluator, asks
//! [`instruction_hits`] before it, and takes what the accesses of [`note_access`] gathered after it. Invariant: with no
//! breakpoint enabled nothing here runs (SDM Vol 3B, "Debug Registers").

use twofold_arch::control::{cr4, rflags};
use twofold_arch::{CpuState, LinearAddr};

use super::mode::{CS, is_64bit};

/// DR7: any of the local and global enables.
const ENABLES: u64 = 0xff;

/// What a breakpoint waits for (the R/W fields of DR7).
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
/// With CR4.DE only.
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;

/// Data breakpoints of one processor between their match and their delivery.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watch {
    /// A breakpoint is enabled, and an instruction runs: accesses are looked at.
    pub armed: bool,
    /// Bits of DR6 that the accesses of the running instruction matched.
    hits: u64,
    /// The same of a MOV to SS or POP SS, which puts them off until after the next instruction.
    held: u64,
}

impl Watch {
    /// INT1 is a debug exception itself: what waited for the instruction's end is reported with it.
    pub fn forget(&mut self) {
        (self.hits, self.held) = (0, 0);
    }

    /// Whether the running instruction has something to report.
    #[must_use]
    pub const fn has_hits(&self) -> bool {
        self.hits != 0
    }

    /// Forgets everything; what a load of SS has put off.
    #[must_use]
    pub fn take_held(&mut self) -> u64 {
        std::mem::take(self).held
    }

    /// What the instruction that ended has to report. `put_off`: it loaded SS.
    pub fn take(&mut self, put_off: bool) -> u64 {
        self.armed = false;
        let hits = std::mem::take(&mut self.hits);
        if put_off {
            self.held |= hits;
            return 0;
        }
        hits | std::mem::take(&mut self.held)
    }
}

/// Whether DR7 enables any breakpoint.
#[must_use]
#[inline]
pub const fn any_enabled(s: &CpuState) -> bool {
    s.dr[7] & ENABLES != 0
}

/// The enabled breakpoints: number, R/W field, length in bytes.
fn enabled(s: &CpuState) -> impl Iterator<Item = (usize, u64, u64)> {
    let dr7 = s.dr[7];
    (0..4).filter(move |n| dr7 >> (2 * n) & 3 != 0).map(move |n| {
        let field = dr7 >> (16 + 4 * n);
        let len = [1, 2, 8, 4][(field >> 2 & 3) as usize];
        (n, field & 3, len)
    })
}

/// The bits of DR6 for instruction breakpoints at `state.rip`; none under RFLAGS.RF or right after a load of SS.
#[must_use]
pub fn instruction_hits(s: &CpuState) -> u64 {
    if s.rflags_sys & rflags::RF != 0 || s.shadow & 2 != 0 {
        return 0;
    }
    let la = if is_64bit(s) { s.rip } else { s.rip.wrapping_add(s.seg[CS].base) & 0xffff_ffff };
    enabled(s).filter(|(n, what, _)| *what == EXECUTE && s.dr[*n] == la).fold(0, |bits, (n, ..)| bits | 1 << n)
}

/// Compares an access of `size` bytes with the data breakpoints.
#[cold]
pub fn note_access(s: &CpuState, watch: &mut Watch, la: LinearAddr, size: u64, write: bool) {
    for (n, what, len) in enabled(s) {
        if !(what == READ_WRITE || (what == WRITE && write)) {
            continue;
        }
        let start = s.dr[n] & !(len - 1);
        // Either begins inside the other.
        if la.0.wrapping_sub(start) < len || start.wrapping_sub(la.0) < size {
            watch.hits |= 1 << n;
        }
    }
}

/// Compares an access to `size` bytes from `port` with the breakpoints on ports. It is a trap, as those on data are.
#[cold]
pub fn note_port(s: &CpuState, watch: &mut Watch, port: u16, size: u8) {
    if s.cr4 & cr4::DE == 0 {
        return;
    }
    for (n, _, len) in enabled(s).filter(|(_, what, _)| *what == PORT) {
        let start = s.dr[n] & !(len - 1);
        if u64::from(port) < start.saturating_add(len) && start < u64::from(port) + u64::from(size) {
            watch.hits |= 1 << n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dr7: u64, dr1: u64) -> Box<CpuState> {
        let mut s = CpuState::zeroed();
        s.dr[1] = dr1;
        s.dr[7] = dr7;
        s
    }

    #[test]
    fn a_watchpoint_matches_any_byte_in_common() {
        // DR1, global, four bytes, writes.
        let s = state(0x00d0_0408, 0x1002);
        let hit = |la: u64, size: u64, write: bool| {
            let mut w = Watch::default();
            note_access(&s, &mut w, LinearAddr(la), size, write);
            w.take(false)
        };
        assert_eq!(hit(0x1000, 4, true), 2, "the address is aligned down to the length");
        assert_eq!(hit(0x1003, 1, true), 2);
        assert_eq!(hit(0xffd, 4, true), 2);
        assert_eq!(hit(0xff8, 8, true), 0);
        assert_eq!(hit(0x1004, 4, true), 0);
        assert_eq!(hit(0x1000, 4, false), 0);
    }

    #[test]
    fn a_breakpoint_on_a_port_matches_with_cr4_de() {
        // DR1, global, two bytes.
        let mut s = state(0x0060_0408, 0x3f8);
        let hit = |s: &CpuState, port: u16, size: u8| {
            let mut w = Watch::default();
            note_port(s, &mut w, port, size);
            w.take(false)
        };
        assert_eq!(hit(&s, 0x3f8, 1), 0, "without CR4.DE the encoding is undefined");
        s.cr4 = cr4::DE;
        assert_eq!(hit(&s, 0x3f9, 1), 2);
        assert_eq!(hit(&s, 0x3f6, 4), 2);
        assert_eq!(hit(&s, 0x3f6, 2), 0);
        assert_eq!(hit(&s, 0x3fa, 1), 0);
    }

    #[test]
    fn a_load_of_ss_puts_a_match_off_by_one_instruction() {
        let s = state(0x00f0_0408, 0x1000);
        let mut w = Watch::default();
        note_access(&s, &mut w, LinearAddr(0x1000), 2, false);
        assert_eq!(w.take(true), 0);
        assert_eq!(w.take(false), 2);
        assert_eq!(w.take(false), 0);
    }

    #[test]
    fn instruction_breakpoints_respect_rf_and_the_shadow_of_ss() {
        let mut s = state(0x0000_0404, 0x1234);
        s.rip = 0x1234;
        assert_eq!(instruction_hits(&s), 2);
        s.rflags_sys |= rflags::RF;
        assert_eq!(instruction_hits(&s), 0);
        s.rflags_sys = 0;
        s.shadow = 2;
        assert_eq!(instruction_hits(&s), 0);
    }
}
