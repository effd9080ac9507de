//! The MC146818 real-time clock and its CMOS memory: the host's time in UTC, memory sizes, interrupt line 8.
//!
//! Place in the pipeline: ports 0x70 and 0x71. The guest may set the time: the difference to the host's is kept. Invariant: the
//! time is a function of the host's real-time clock when a register is read; only enabled interrupts make deadlines.

use std::time::{SystemTime, UNIX_EPOCH};

const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    cmos: [u8; 128],
    /// Seconds the guest's clock is ahead of the host's.
    ahead: i64,
    /// Host real time in nanoseconds since 1970, minus the machine's clock.
    epoch_ns: Option<i128>,
    deadline: Option<u64>,
    /// When the periodic interrupt started, and how many ticks of it have been seen.
    periodic_from: u64,
    last_second: i64,
}

/// A calendar time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    /// Sunday is 1.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Days since 1970-01-01 of a Gregorian date.
fn days_from_civil(year: i64, month: u8, day: u8) -> i64 {
    // Years begin in March, so that the leap day is the last of a year.
    let y = if month <= 2 { year - 1 } else { year };
    let m = (i64::from(month) + 9) % 12;
    365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + i64::from(day) - 1 - 719_468
}

fn date_of(seconds: i64) -> Date {
    let days = seconds.div_euclid(86_400);
    let rest = seconds.rem_euclid(86_400);
    let mut year = 1970 + days.div_euclid(366);
    while days_from_civil(year + 1, 1, 1) <= days {
        year += 1;
    }
    let month = (1..=12).rev().find(|m| days_from_civil(year, *m, 1) <= days).unwrap_or(1);
    Date {
        year,
        month,
        day: (days - days_from_civil(year, month, 1) + 1) as u8,
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        hour: (rest / 3600) as u8,
        minute: (rest / 60 % 60) as u8,
        second: (rest % 60) as u8,
    }
}

impl Rtc {
    /// A clock of a machine with `memory` bytes of RAM.
    #[must_use]
    pub fn new(memory: u64) -> Self {
        let mut cmos = [0u8; 128];
        cmos[usize::from(REG_A)] = 0x26;
        cmos[usize::from(REG_B)] = B_24H;
        cmos[usize::from(REG_D)] = 0x80;
        let mut word = |low: usize, value: u64| {
            let value = u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
            cmos[low] = value[0];
            cmos[low + 1] = value[1];
        };
        let low = memory.min(crate::boot::LOW_RAM_END);
        let above_1m = low.saturating_sub(1 << 20);
        word(0x15, 640);
        word(0x17, above_1m >> 10);
        word(0x30, above_1m >> 10);
        word(0x34, low.saturating_sub(16 << 20) >> 16);
        let above_4g = memory.saturating_sub(low) >> 16;
        for (i, byte) in above_4g.to_le_bytes().iter().take(3).enumerate() {
            cmos[0x5b + i] = *byte;
        }
        Self { index: 0, cmos, ahead: 0, epoch_ns: None, deadline: None, periodic_from: 0, last_second: 0 }
    }

    fn guest_ns(&mut self, now: u64) -> i128 {
        // The host's clock is asked once; from then on both run together.
        let epoch = *self.epoch_ns.get_or_insert_with(|| {
            let host = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
            host - i128::from(now)
        });
        epoch + i128::from(now) + i128::from(self.ahead) * 1_000_000_000
    }

    fn guest_seconds(&mut self, now: u64) -> i64 {
        self.guest_ns(now).div_euclid(1_000_000_000) as i64
    }

    fn b(&self) -> u8 {
        self.cmos[usize::from(REG_B)]
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.b() & B_24H != 0 {
            return self.decode(raw);
        }
        self.decode(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    /// The time registers as they are now, unless the guest is setting them.
    fn update_registers(&mut self, now: u64) {
        if self.b() & B_SET != 0 {
            return;
        }
        let d = date_of(self.guest_seconds(now));
        let year = d.year.rem_euclid(10_000);
        for (register, value) in [
            (0x00, self.encode(d.second)),
            (0x02, self.encode(d.minute)),
            (0x04, self.encode_hour(d.hour)),
            (0x06, self.encode(d.weekday)),
            (0x07, self.encode(d.day)),
            (0x08, self.encode(d.month)),
            (0x09, self.encode((year % 100) as u8)),
            (CENTURY, self.encode((year / 100) as u8)),
        ] {
            self.cmos[usize::from(register)] = value;
        }
    }

    /// Takes the time registers as the guest's time.
    fn take_registers(&mut self, now: u64) {
        let c = |register: u8| self.cmos[usize::from(register)];
        let year = i64::from(self.decode(c(CENTURY))) * 100 + i64::from(self.decode(c(0x09)));
        let month = self.decode(c(0x08)).clamp(1, 12);
        let days = days_from_civil(year, month, self.decode(c(0x07)).clamp(1, 31));
        let clock = i64::from(self.decode_hour(c(0x04))) * 3600
            + i64::from(self.decode(c(0x02))) * 60
            + i64::from(self.decode(c(0x00)));
        let was = self.guest_seconds(now);
        self.ahead += days * 86_400 + clock - was;
        self.last_second = self.guest_seconds(now);
    }

    /// Selects a register (port 0x70; bit 7 would mask NMIs).
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads the selected register.
    pub fn read(&mut self, now: u64) -> u8 {
        match self.index {
            0x00..=0x09 | CENTURY => self.update_registers(now),
            REG_A => {
                // Update in progress: the 244 µs before a second begins.
                let into = self.guest_ns(now).rem_euclid(1_000_000_000);
                let uip = if self.b() & B_SET == 0 && into >= 1_000_000_000 - 244_000 { 0x80 } else { 0 };
                return self.cmos[usize::from(REG_A)] & 0x7f | uip;
            }
            REG_C => {
                self.gather_flags(now);
                return std::mem::take(&mut self.cmos[usize::from(REG_C)]);
            }
            _ => {}
        }
        self.cmos[usize::from(self.index)]
    }

    /// Writes the selected register.
    pub fn write(&mut self, value: u8, now: u64) {
        let index = usize::from(self.index);
        match self.index {
            REG_C | REG_D => return,
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | CENTURY => {
                self.update_registers(now);
                self.cmos[index] = value;
                if self.b() & B_SET == 0 {
                    self.take_registers(now);
                }
            }
            REG_A => {
                self.cmos[index] = value & 0x7f;
                self.periodic_from = now;
            }
            REG_B => {
                self.update_registers(now);
                let was = self.b();
                self.cmos[index] = if value & B_SET != 0 { value & !B_UPDATE } else { value };
                if was & B_SET != 0 && value & B_SET == 0 {
                    self.take_registers(now);
                }
                self.periodic_from = now;
                self.last_second = self.guest_seconds(now);
            }
            _ => self.cmos[index] = value,
        }
        self.schedule(now);
    }

    fn periodic_ns(&self) -> Option<u64> {
        let rate = u64::from(self.cmos[usize::from(REG_A)] & 15);
        // Rates 1 and 2 are those of 8 and 9.
        let shift = match rate {
            0 => return None,
            1 | 2 => rate + 6,
            n => n - 1,
        };
        Some((1_000_000_000u64 << shift) / 32_768)
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let d = date_of(second);
        let field = |register: u8, value: u8| {
            let alarm = self.cmos[usize::from(register)];
            alarm & 0xc0 == 0xc0 || alarm == value
        };
        field(1, self.encode(d.second)) && field(3, self.encode(d.minute)) && field(5, self.encode_hour(d.hour))
    }

    /// Sets the flags of what has happened since the last look.
    fn gather_flags(&mut self, now: u64) {
        let second = self.guest_seconds(now);
        let mut flags = 0;
        if self.b() & B_SET == 0 && second > self.last_second {
            flags |= 0x10;
            // A long sleep looks at no more than a day of seconds: every alarm comes round in one.
            let from = self.last_second.max(second - 86_400) + 1;
            if self.b() & B_ALARM != 0 && (from..=second).any(|s| self.alarm_matches(s)) {
                flags |= 0x20;
            }
        }
        self.last_second = second;
        if let Some(period) = self.periodic_ns() {
            let ticks = now.saturating_sub(self.periodic_from) / period;
            if ticks > 0 {
                flags |= 0x40;
                self.periodic_from += ticks * period;
            }
        }
        let c = self.cmos[usize::from(REG_C)] | flags;
        let raised = if c & self.b() & (B_PERIODIC | B_ALARM | B_UPDATE) != 0 { 0x80 } else { 0 };
        self.cmos[usize::from(REG_C)] = c & 0x70 | raised;
    }

    fn schedule(&mut self, now: u64) {
        let b = self.b();
        let periodic = (b & B_PERIODIC != 0).then(|| self.periodic_ns()).flatten();
        let periodic = periodic.map(|p| self.periodic_from.saturating_add(p).max(now));
        let second = (b & (B_ALARM | B_UPDATE) != 0 && b & B_SET == 0).then(|| {
            let into = self.guest_ns(now).rem_euclid(1_000_000_000) as u64;
            now.saturating_add(1_000_000_000 - into)
        });
        self.deadline = periodic.into_iter().chain(second).min();
    }

    /// When an enabled interrupt may come next.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Raises what is due.
    pub fn expire(&mut self, now: u64) {
        if self.deadline.is_some_and(|at| now >= at) {
            self.gather_flags(now);
            self.schedule(now);
        }
    }

    /// Level of interrupt line 8.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.cmos[usize::from(REG_C)] & 0x80 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(rtc: &mut Rtc, register: u8, now: u64) -> u8 {
        rtc.select(register);
        rtc.read(now)
    }
    fn put(rtc: &mut Rtc, register: u8, value: u8, now: u64) {
        rtc.select(register);
        rtc.write(value, now);
    }
    fn set_time(rtc: &mut Rtc, fields: [(u8, u8); 7], now: u64) {
        put(rtc, REG_B, B_SET | B_24H, now);
        fields.iter().for_each(|(r, v)| put(rtc, *r, *v, now));
        put(rtc, REG_B, B_24H, now);
    }

    #[test]
    fn calendar() {
        assert_eq!(days_from_civil(1970, 1, 1), 0);
        assert_eq!(days_from_civil(2000, 3, 1), 11_017);
        let d = date_of(951_782_400); // 2000-02-29, a Tuesday
        assert_eq!((d.year, d.month, d.day, d.weekday), (2000, 2, 29, 3));
        for day in 0..100_000 {
            let d = date_of(day * 86_400 + 86_399);
            assert_eq!(days_from_civil(d.year, d.month, d.day), day);
            assert_eq!((d.hour, d.minute, d.second), (23, 59, 59));
        }
    }

    #[test]
    fn tells_the_hosts_time() {
        let mut rtc = Rtc::new(512 << 20);
        let host = date_of(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64);
        let century = get(&mut rtc, CENTURY, 0);
        assert_eq!(i64::from(rtc.decode(century)), host.year / 100);
        let month = get(&mut rtc, 8, 0);
        assert_eq!(rtc.decode(month), host.month);
        assert_eq!(get(&mut rtc, REG_D, 0), 0x80);
    }

    #[test]
    fn the_guest_can_set_it_and_it_runs() {
        let mut rtc = Rtc::new(0);
        set_time(&mut rtc, [(CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)], 0);
        assert_eq!((get(&mut rtc, 9, 0), get(&mut rtc, 0, 0)), (0x99, 0x58));
        let later = 3_000_000_000;
        assert_eq!((get(&mut rtc, CENTURY, later), get(&mut rtc, 9, later), get(&mut rtc, 4, later)), (0x20, 0, 0));
        put(&mut rtc, REG_B, B_BINARY, later); // twelve-hour clock
        assert_eq!(get(&mut rtc, 4, later), 12);
    }

    #[test]
    fn memory_sizes() {
        let mut rtc = Rtc::new(512 << 20);
        assert_eq!(u16::from_le_bytes([get(&mut rtc, 0x34, 0), get(&mut rtc, 0x35, 0)]), (496 << 20 >> 16) as u16);
        assert_eq!(u16::from_le_bytes([get(&mut rtc, 0x15, 0), get(&mut rtc, 0x16, 0)]), 640);
    }

    #[test]
    fn periodic_interrupt() {
        let mut rtc = Rtc::new(0);
        put(&mut rtc, REG_A, 0x26, 0);
        put(&mut rtc, REG_B, B_24H | B_PERIODIC, 0);
        let at = rtc.deadline().unwrap();
        assert_eq!(at, 976_562, "1024 Hz");
        rtc.expire(at);
        assert!(rtc.irq());
        assert_eq!(get(&mut rtc, REG_C, at) & 0xc0, 0xc0);
        assert!(!rtc.irq());
        put(&mut rtc, REG_B, B_24H, at);
        assert_eq!(rtc.deadline(), None);
    }

    #[test]
    fn alarm_and_update_interrupts() {
        let mut rtc = Rtc::new(0);
        set_time(&mut rtc, [(CENTURY, 0x20), (9, 0x30), (8, 1), (7, 1), (4, 0x10), (2, 0), (0, 0)], 0);
        put(&mut rtc, 1, 0x05, 0);
        put(&mut rtc, 3, 0xff, 0);
        put(&mut rtc, 5, 0x10, 0);
        put(&mut rtc, REG_B, B_24H | B_ALARM, 0);
        let mut fired_at = None;
        while fired_at.is_none() {
            let at = rtc.deadline().unwrap();
            rtc.expire(at);
            fired_at = rtc.irq().then_some(at);
        }
        assert!((4_000_000_000..=6_000_000_000).contains(&fired_at.unwrap()), "{fired_at:?}");
    }

    #[test]
    fn nothing_panics() {
        let mut rtc = Rtc::new(1 << 40);
        let (mut seed, mut now) = (7u32, 0u64);
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            now += u64::from(seed) << (seed & 7);
            put(&mut rtc, (seed >> 24) as u8 & if seed & 256 == 0 { 15 } else { 127 }, (seed >> 16) as u8, now);
            get(&mut rtc, (seed >> 12) as u8, now);
            rtc.expire(now);
        }
    }
}
