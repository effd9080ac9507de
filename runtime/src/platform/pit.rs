//! The 8254 interval timer: three counters computed from the time, and port 0x61 in front of the third.
//!
//! Place in the pipeline: counter 0 drives interrupt line 0 (Intel 8254 data sheet). Nothing ticks: a counter's value and output
//! are functions of the time since it was loaded. Invariant: `deadline` is the next rising edge of counter 0.

/// Input frequency in Hz.
pub const PIT_HZ: u64 = 1_193_182;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(PIT_HZ) / 1_000_000_000) as u64
}

/// The first nanosecond at which `n` ticks have passed.
fn ns_after(n: u64) -> u64 {
    (u128::from(n) * 1_000_000_000).div_ceil(u128::from(PIT_HZ)).min(u128::from(u64::MAX)) as u64
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    Both,
}

#[derive(Debug)]
struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    /// 1..=0x10000 (BCD: 1..=10000).
    reload: u32,
    /// When the reload value was loaded; none while the counter waits for one (or, in modes 1 and 5, for the gate).
    loaded: Option<u64>,
    gate: bool,
    /// Ticks passed when the gate went low, in the modes where that stops the count.
    frozen: Option<u64>,
    low_written: Option<u8>,
    high_next: bool,
    latched: Option<u16>,
    status: Option<u8>,
    has_count: bool,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            reload: 0x1_0000,
            loaded: None,
            gate,
            frozen: None,
            low_written: None,
            high_next: false,
            latched: None,
            status: None,
            has_count: false,
        }
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        if let Some(t) = self.frozen {
            return Some(t);
        }
        self.loaded.map(|at| ticks(now.saturating_sub(at)))
    }

    fn output(&self, now: u64) -> bool {
        let reload = u64::from(self.reload);
        match (self.mode, self.elapsed(now)) {
            (0, None) => false,
            (_, None) => true,
            (0 | 1, Some(t)) => t >= reload,
            (2, Some(t)) => !self.gate || t % reload != reload - 1,
            (3, Some(t)) => !self.gate || t % reload < reload.div_ceil(2),
            (_, Some(t)) => t != reload,
        }
    }

    fn count(&self, now: u64) -> u16 {
        let reload = u64::from(self.reload);
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = match (self.mode, self.elapsed(now)) {
            (_, None) => reload,
            (2, Some(t)) => reload - t % reload,
            (3, Some(t)) => {
                // Counts down by two, twice per period.
                let half = t % reload * 2 % reload;
                (reload - half) & !1
            }
            (_, Some(t)) => (reload + modulus - t % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    fn load(&mut self, raw: u16, now: u64) {
        let value = if self.bcd { from_bcd(raw) } else { u32::from(raw) };
        self.reload = match (value, self.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            (1, _) if matches!(self.mode, 2 | 3) => 2,
            (v, _) => v,
        };
        self.has_count = true;
        if matches!(self.mode, 1 | 5) {
            return;
        }
        self.loaded = Some(now);
        self.frozen = (!self.gate).then_some(0);
    }

    fn write(&mut self, value: u8, now: u64) {
        match self.access {
            Access::Low => self.load(u16::from(value), now),
            Access::High => self.load(u16::from(value) << 8, now),
            Access::Both => match self.low_written.take() {
                None => {
                    self.low_written = Some(value);
                    if self.mode == 0 {
                        self.loaded = None;
                        self.frozen = None;
                    }
                }
                Some(low) => self.load(u16::from(value) << 8 | u16::from(low), now),
            },
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.count(now));
        match self.access {
            Access::Low => {
                self.latched = None;
                value as u8
            }
            Access::High => {
                self.latched = None;
                (value >> 8) as u8
            }
            Access::Both if self.high_next => {
                self.high_next = false;
                self.latched = None;
                (value >> 8) as u8
            }
            Access::Both => {
                self.high_next = true;
                value as u8
            }
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.status.is_none() {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::Both => 3,
            };
            let null_count = u8::from(!self.has_count) << 6;
            self.status =
                Some(u8::from(self.output(now)) << 7 | null_count | access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
        }
    }

    fn control(&mut self, value: u8, now: u64) {
        self.access = match value >> 4 & 3 {
            0 => return self.latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = value >> 1 & 7;
        *self = Self {
            access: self.access,
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: value & 1 != 0,
            reload: self.reload,
            ..Self::new(self.gate)
        };
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rising = gate && !self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rising && self.has_count => self.loaded = Some(now),
            2 | 3 if rising && self.loaded.is_some() => {
                self.loaded = Some(now);
                self.frozen = None;
            }
            0 | 4 if rising => {
                if let Some(t) = self.frozen.take() {
                    self.loaded = Some(now.saturating_sub(ns_after(t)));
                }
            }
            0 | 2 | 3 | 4 if !gate && self.loaded.is_some() && self.frozen.is_none() => self.frozen = self.elapsed(now),
            _ => {}
        }
    }

    /// The next rising edge of the output after `now`.
    fn next_edge(&self, now: u64) -> Option<u64> {
        let (at, reload) = (self.loaded?, u64::from(self.reload));
        if self.frozen.is_some() {
            return None;
        }
        let t = ticks(now.saturating_sub(at));
        let n = match self.mode {
            2 | 3 => (t / reload + 1) * reload,
            0 | 1 if t < reload => reload,
            4 | 5 if t <= reload => reload + 1,
            _ => return None,
        };
        Some(at.saturating_add(ns_after(n)))
    }
}

fn to_bcd(v: u16) -> u16 {
    (v / 1000 % 10) << 12 | (v / 100 % 10) << 8 | (v / 10 % 10) << 4 | (v % 10)
}

fn from_bcd(raw: u16) -> u32 {
    (0..4).rev().fold(0, |n, i| n * 10 + u32::from(raw >> (4 * i) & 15).min(9))
}

/// The timer and port 0x61.
#[derive(Debug)]
pub struct Pit {
    counter: [Counter; 3],
    /// Bits 0 and 1 of port 0x61: gate of counter 2, speaker.
    port61: u8,
    edge: Option<u64>,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// After power-up: no counter is loaded.
    #[must_use]
    pub fn new() -> Self {
        Self { counter: [Counter::new(true), Counter::new(true), Counter::new(false)], port61: 0, edge: None }
    }

    /// Level of interrupt line 0.
    #[must_use]
    pub fn irq(&self, now: u64) -> bool {
        // A counter that was never programmed is quiet.
        self.counter[0].has_count && self.counter[0].output(now)
    }

    /// When interrupt line 0 rises next.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.edge
    }

    /// Moves past the edges up to `now`; whether there was one.
    pub fn expire(&mut self, now: u64) -> bool {
        let due = self.edge.is_some_and(|at| now >= at);
        if due {
            self.edge = self.counter[0].next_edge(now);
        }
        due
    }

    /// Reads counter `n`.
    pub fn read(&mut self, n: u16, now: u64) -> u8 {
        match self.counter.get_mut(usize::from(n)) {
            Some(counter) => counter.read(now),
            None => 0xff,
        }
    }

    /// Writes counter `n`, or the control word (3).
    pub fn write(&mut self, n: u16, value: u8, now: u64) {
        match self.counter.get_mut(usize::from(n)) {
            Some(counter) => counter.write(value, now),
            None => match value >> 6 {
                3 => self.read_back(value, now),
                n => self.counter[usize::from(n)].control(value, now),
            },
        }
        self.edge = self.counter[0].next_edge(now);
    }

    fn read_back(&mut self, value: u8, now: u64) {
        for (i, counter) in self.counter.iter_mut().enumerate() {
            if value & 2 << i == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(now);
            }
            if value & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
    }

    /// Port 0x61: gate 2, speaker, the refresh toggle (every 15 µs) and output 2.
    #[must_use]
    pub fn read_port61(&self, now: u64) -> u8 {
        let refresh = ((now / 15_085) & 1) as u8;
        self.port61 | refresh << 4 | u8::from(self.counter[2].output(now)) << 5
    }

    /// Writes gate 2 and speaker.
    pub fn write_port61(&mut self, value: u8, now: u64) {
        self.port61 = value & 3;
        self.counter[2].set_gate(value & 1 != 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(pit: &mut Pit, n: u8, mode: u8, count: u16, now: u64) {
        pit.write(3, n << 6 | 0x30 | mode << 1, now);
        pit.write(u16::from(n), count as u8, now);
        pit.write(u16::from(n), (count >> 8) as u8, now);
    }

    #[test]
    fn rate_generator_ticks_on() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 11932, 0);
        let first = pit.deadline().unwrap();
        assert_eq!(first, ns_after(11932));
        assert!(!pit.expire(first - 1));
        assert!(pit.expire(first));
        assert_eq!(pit.deadline(), Some(ns_after(2 * 11932)));
        assert!(pit.expire(first * 10));
        assert!(pit.deadline().unwrap() > first * 10, "missed periods do not pile up");
    }

    #[test]
    fn terminal_count_rises_once() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 100, 50);
        assert!(!pit.irq(50));
        let at = pit.deadline().unwrap();
        assert!(pit.expire(at));
        assert!(pit.irq(at));
        assert_eq!(pit.deadline(), None);
        pit.write(3, 0x30, at);
        assert!(!pit.irq(at), "a control word takes the output down");
    }

    #[test]
    fn counts_are_latched_and_read_by_halves() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 0x1234, 0);
        let now = ns_after(0x34);
        pit.write(3, 0x00, now);
        assert_eq!((pit.read(0, now), pit.read(0, now + 1_000_000)), (0x00, 0x12));
    }

    #[test]
    fn square_wave() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 3, 1000, 0);
        assert!(pit.irq(ns_after(10)));
        assert!(!pit.irq(ns_after(600)));
        assert!(pit.irq(ns_after(1010)));
        assert_eq!(pit.deadline(), Some(ns_after(1000)));
    }

    #[test]
    fn software_strobe() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 4, 100, 0);
        assert!(pit.irq(0));
        assert!(!pit.irq(ns_after(100)));
        assert!(pit.irq(ns_after(101)));
        assert!(pit.expire(ns_after(101)));
        assert_eq!(pit.deadline(), None);
    }

    #[test]
    fn speaker_gate_times_a_delay() {
        // The way kernels calibrate: counter 2, mode 0, gate on, poll output bit.
        let mut pit = Pit::new();
        pit.write_port61(1, 0);
        program(&mut pit, 2, 0, 1000, 0);
        assert_eq!(pit.read_port61(ns_after(999)) & 0x21, 0x01);
        assert_eq!(pit.read_port61(ns_after(1000)) & 0x21, 0x21);
    }

    #[test]
    fn a_gate_stops_the_count() {
        let mut pit = Pit::new();
        pit.write_port61(1, 0);
        program(&mut pit, 2, 0, 1000, 0);
        pit.write_port61(0, ns_after(500));
        assert_eq!(pit.read_port61(ns_after(5000)) & 0x20, 0);
        pit.write_port61(1, ns_after(5000));
        assert_eq!(pit.read_port61(ns_after(5000 + 490)) & 0x20, 0);
        assert_eq!(pit.read_port61(ns_after(5000 + 502)) & 0x20, 0x20);
    }

    #[test]
    fn read_back_gives_status_then_count() {
        let mut pit = Pit::new();
        program(&mut pit, 1, 2, 500, 0);
        pit.write(3, 0xc4, 0);
        assert_eq!(pit.read(1, 0), 0x80 | 0x30 | 2 << 1);
        assert_eq!((pit.read(1, 0), pit.read(1, 0)), (0xf4, 0x01));
    }

    #[test]
    fn bcd_counts() {
        let mut pit = Pit::new();
        pit.write(3, 0x31 | 2 << 1, 0);
        pit.write(0, 0x00, 0);
        pit.write(0, 0x10, 0);
        assert_eq!(pit.deadline(), Some(ns_after(1000)));
        let now = ns_after(1);
        assert_eq!((pit.read(0, now), pit.read(0, now)), (0x99, 0x09));
    }

    #[test]
    fn nothing_panics() {
        let mut pit = Pit::new();
        let (mut seed, mut now) = (99u32, 0u64);
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            now += u64::from(seed >> 12);
            pit.write((seed >> 4 & 3) as u16, (seed >> 16) as u8, now);
            pit.read((seed >> 6 & 3) as u16, now);
            pit.write_port61((seed >> 24) as u8, now);
            let _ = pit.read_port61(now);
            pit.expire(now);
            let _ = pit.irq(now);
        }
    }
}
