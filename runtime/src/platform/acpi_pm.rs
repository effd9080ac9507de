//! The ACPI fixed hardware: PM1a event and control registers, the PM timer, sleep state S5.
//!
//! Place in the pipeline: ports 0x600 to 0x60b, named by the FADT (ACPI specification, "ACPI Hardware Specification"). The machine
//! is always in ACPI mode. Invariant: the timer counts 3.579545 MHz of the machine's clock in 24 bits.

/// PM1a event block: status, enable.
pub const PM1_EVENT: u16 = 0x600;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x604;
/// PM timer.
pub const PM_TIMER: u16 = 0x608;
/// First port of the device.
pub const FIRST_PORT: u16 = 0x600;
/// Last port of the device.
pub const LAST_PORT: u16 = 0x60b;
/// SLP_TYP of the soft-off state, as the DSDT's `\_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The reset register of the FADT and what to write to it.
pub const RESET_PORT: u16 = 0xcf9;
/// The value to write to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x06;
/// Frequency of the PM timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const TIMER_STATUS: u16 = 1 << 0;
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Timer, bus master, global, power button, sleep button, RTC, PCIe wake, wake.
const STATUS_BITS: u16 = 0xc731;
const ENABLE_BITS: u16 = 0x4721;

/// The registers.
#[derive(Debug)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    deadline: Option<u64>,
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new()
    }
}

impl AcpiPm {
    /// After power-up, in ACPI mode.
    #[must_use]
    pub fn new() -> Self {
        Self { status: 0, enable: 0, control: SCI_ENABLE, deadline: None }
    }

    fn ticks(now: u64) -> u64 {
        (u128::from(now) * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u64
    }

    /// Reads `size` bytes at `port`.
    #[must_use]
    pub fn read(&self, port: u16, size: u8, now: u64) -> u32 {
        let block: u128 = u128::from(self.status)
            | u128::from(self.enable) << 16
            | u128::from(self.control) << 32
            | u128::from(Self::ticks(now) as u32 & 0xff_ffff) << 64;
        let word = (block >> (8 * u32::from(port.wrapping_sub(FIRST_PORT) & 15))) as u32;
        match size {
            1 => word & 0xff,
            2 => word & 0xffff,
            _ => word,
        }
    }

    /// Writes `size` bytes at `port`; whether the machine is to be powered off.
    pub fn write(&mut self, port: u16, size: u8, value: u32, now: u64) -> bool {
        let mut off = false;
        for i in 0..u16::from(size.min(4)) {
            let byte = (value >> (8 * i)) as u8;
            off |= self.write_byte(port.wrapping_add(i), byte);
        }
        self.schedule(now);
        off
    }

    fn write_byte(&mut self, port: u16, value: u8) -> bool {
        let shift = 8 * (port & 1);
        let bits = u16::from(value) << shift;
        let keep = 0xff00 >> shift;
        match port & !1 {
            // Writing 1 clears a status bit.
            PM1_EVENT => self.status &= !bits,
            0x602 => self.enable = (self.enable & keep | bits) & ENABLE_BITS,
            PM1_CONTROL => {
                self.control = (self.control & keep | bits) & 0x1c06 | SCI_ENABLE;
                // SLP_EN is write-only; the type is that of the same byte.
                return bits & SLEEP_ENABLE != 0 && (self.control >> 10 & 7) as u8 == SLEEP_TYPE_S5;
            }
            _ => {}
        }
        false
    }

    fn schedule(&mut self, now: u64) {
        // The timer's status bit is set whenever bit 23 changes.
        self.deadline = (self.enable & TIMER_STATUS != 0 && self.status & TIMER_STATUS == 0).then(|| {
            let next = ((Self::ticks(now) >> 23) + 1) << 23;
            (u128::from(next) * 1_000_000_000).div_ceil(u128::from(PM_TIMER_HZ)) as u64
        });
    }

    /// When the timer interrupts next, if it may.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Sets the timer status when it is due.
    pub fn expire(&mut self, now: u64) {
        if self.deadline.is_some_and(|at| now >= at) {
            self.status |= TIMER_STATUS;
            self.schedule(now);
        }
    }

    /// Level of the system control interrupt.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.status & self.enable & STATUS_BITS != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_off() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.read(PM1_CONTROL, 2, 0), 1, "always in ACPI mode");
        assert!(!pm.write(PM1_CONTROL, 2, 5 << 10 | 1, 0), "the type alone does nothing");
        assert!(!pm.write(PM1_CONTROL, 2, 3 << 10 | 1 << 13, 0), "another state");
        assert!(pm.write(PM1_CONTROL, 2, 5 << 10 | 1 << 13 | 1, 0));
        assert_eq!(pm.read(PM1_CONTROL, 2, 0), 5 << 10 | 1, "SLP_EN reads as 0");
        assert!(pm.write(PM1_CONTROL + 1, 1, 0x34, 0), "by its high byte alone");
    }

    #[test]
    fn timer_counts_and_wraps_at_24_bits() {
        let pm = AcpiPm::new();
        assert_eq!(pm.read(PM_TIMER, 4, 1_000_000_000), 3_579_545);
        assert_eq!(pm.read(PM_TIMER, 4, 5_000_000_000), 17_897_725 & 0xff_ffff);
    }

    #[test]
    fn timer_interrupt() {
        let mut pm = AcpiPm::new();
        pm.write(0x602, 2, 1, 0);
        let at = pm.deadline().unwrap();
        assert_eq!(at / 1_000_000, 2343);
        pm.expire(at);
        assert!(pm.irq());
        pm.write(PM1_EVENT, 2, 1, at);
        assert!(!pm.irq());
        assert!(pm.deadline().unwrap() > at);
    }

    #[test]
    fn enable_bits_are_kept() {
        let mut pm = AcpiPm::new();
        pm.write(0x602, 2, 0xffff, 0);
        assert_eq!(pm.read(0x602, 2, 0), u32::from(ENABLE_BITS));
    }
}
