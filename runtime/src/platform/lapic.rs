//! A local APIC: priorities, the vectors requested and in service, its timer, IPIs, in xAPIC and x2APIC mode.
//!
//! Place in the pipeline: one per processor, owned by the platform, which carries its [`Effect`]s to the other APICs and the
//! I/O APIC (SDM Vol 3A, "Advanced Programmable Interrupt Controller"). Invariants: told the time, never looks; `deadline`
//! is always right after any call, so the platform's next deadline can be a minimum over them.

use super::clock::CRYSTAL_NS;
use twofold_arch::msr;

/// Version register: 0x14, six LVT entries.
const VERSION: u32 = 0x0005_0014;
/// LVT and SVR bits.
const LVT_MASKED: u32 = 1 << 16;
const SVR_ENABLE: u32 = 1 << 8;
/// IA32_APIC_BASE bits.
const BASE_BSP: u64 = 1 << 8;
const BASE_EXTD: u64 = 1 << 10;
const BASE_EN: u64 = 1 << 11;
/// Error status bits.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Indices into `lvt`.
const TIMER: usize = 0;
const LINT0: usize = 3;
const LINT1: usize = 4;
const ERROR: usize = 5;

/// How a message is to be delivered (bits 10:8 of ICR, LVT and redirection entries).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Delivery {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl Delivery {
    /// From the three-bit field at bit 8.
    #[must_use]
    pub const fn from_bits(word: u32) -> Self {
        match word >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The APIC with this ID; all ones is everybody.
    Physical(u32),
    /// APICs whose logical ID matches; all ones is everybody.
    Logical(u32),
    /// Shorthand: the sender.
    Myself,
    /// Shorthand: everybody.
    All,
    /// Shorthand: everybody but the sender.
    Others,
}

/// An interrupt message on the way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whom it is for.
    pub target: Target,
    /// How.
    pub delivery: Delivery,
    /// Which vector.
    pub vector: u8,
    /// Level-triggered: the EOI goes back to the I/O APIC.
    pub level: bool,
}

impl Message {
    /// Whether `apic`, that of processor `cpu`, is a destination of a message that processor `source` sent (none: a device).
    #[must_use]
    pub fn selects(&self, apic: &LocalApic, cpu: usize, source: Option<usize>) -> bool {
        match self.target {
            Target::Myself => source == Some(cpu),
            Target::All => true,
            Target::Others => source != Some(cpu),
            Target::Physical(id) => apic.matches_physical(id, source.is_none()),
            Target::Logical(set) => apic.matches_logical(set, source.is_none()),
        }
    }
}

/// What a register write means for the rest of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A level-triggered vector was completed: the I/O APIC wants to know.
    EoiBroadcast(u8),
    /// Send this.
    Send(Message),
}

/// 256 bits, one per vector.
#[derive(Clone, Copy, Debug, Default)]
struct VectorSet([u32; 8]);

impl VectorSet {
    fn set(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] |= 1 << (v & 31);
    }
    fn clear(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] &= !(1 << (v & 31));
    }
    fn has(&self, v: u8) -> bool {
        self.0[usize::from(v >> 5)] >> (v & 31) & 1 != 0
    }
    fn highest(&self) -> Option<u8> {
        let word = (0..8u8).rev().find(|w| self.0[usize::from(*w)] != 0)?;
        Some(word * 32 + 31 - self.0[usize::from(word)].leading_zeros() as u8)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

/// One local APIC.
#[derive(Debug)]
pub struct LocalApic {
    /// The initial APIC ID; also the x2APIC ID.
    initial_id: u32,
    /// xAPIC ID, which software may change.
    id: u8,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// Errors seen by software (after a write) and gathered since.
    esr: u32,
    esr_gathered: u32,
    icr: u64,
    /// Timer, thermal, performance counter, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial_count: u32,
    divide: u32,
    /// When the count last started from `initial_count`.
    started: u64,
    /// When the timer fires next.
    deadline: Option<u64>,
    tsc_deadline: u64,
    tsc_offset: u64,
}

impl LocalApic {
    /// The APIC of processor `id` after power-up: enabled, in xAPIC mode, software-disabled.
    #[must_use]
    pub fn new(id: u32, bootstrap: bool) -> Self {
        Self {
            initial_id: id,
            id: id as u8,
            base: super::LAPIC_BASE | BASE_EN | if bootstrap { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            esr: 0,
            esr_gathered: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            initial_count: 0,
            divide: 0,
            started: 0,
            deadline: None,
            tsc_deadline: 0,
            tsc_offset: 0,
        }
    }

    /// INIT: as after power-up, but for IDs, IA32_APIC_BASE and the TSC's offset.
    pub fn init(&mut self) {
        let fresh = Self::new(self.initial_id, false);
        *self = Self { id: self.id, base: self.base, tsc_offset: self.tsc_offset, ldr: self.x2apic_ldr_or(0), ..fresh };
    }

    /// LINT0 takes the 8259s and LINT1 is NMI, as firmware leaves them.
    pub fn enter_virtual_wire_mode(&mut self) {
        self.svr |= SVR_ENABLE;
        self.lvt[LINT0] = 7 << 8;
        self.lvt[LINT1] = 4 << 8;
    }

    // ---- modes ------------------------------------------------------------------------------------------------------

    /// Globally enabled and in xAPIC mode: the registers are in memory.
    #[must_use]
    pub fn is_xapic(&self) -> bool {
        self.base & (BASE_EN | BASE_EXTD) == BASE_EN
    }

    /// Globally disabled.
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        self.base & BASE_EN == 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & (BASE_EN | BASE_EXTD) == BASE_EN | BASE_EXTD
    }

    fn is_enabled(&self) -> bool {
        self.base & BASE_EN != 0 && self.svr & SVR_ENABLE != 0
    }

    /// Whether the 8259s' output reaches the processor: the APIC is globally disabled, or LINT0 says ExtINT.
    #[must_use]
    pub fn accepts_extint(&self) -> bool {
        self.base & BASE_EN == 0
            || (self.lvt[LINT0] & LVT_MASKED == 0 && Delivery::from_bits(self.lvt[LINT0]) == Delivery::ExtInt)
    }

    /// Sets the TSC offset that deadlines are relative to.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        if self.timer_mode() == TimerMode::TscDeadline {
            self.arm_tsc_deadline();
        }
    }

    // ---- priorities -------------------------------------------------------------------------------------------------

    /// Task priority register, eight bits.
    #[must_use]
    pub fn tpr(&self) -> u8 {
        self.tpr
    }
    /// Sets the task priority register.
    pub fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
    }

    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The requested vector that the processor's priority lets through.
    #[must_use]
    pub fn pending_vector(&self) -> Option<u8> {
        if !self.is_enabled() {
            return None;
        }
        self.irr.highest().filter(|v| v & 0xf0 > self.ppr() & 0xf0)
    }

    /// The processor takes the pending vector: from requested to in service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        self.irr.clear(vector);
        self.isr.set(vector);
        Some(vector)
    }

    /// The vector of an interrupt that went away.
    #[must_use]
    pub fn spurious_vector(&self) -> u8 {
        self.svr as u8
    }

    /// A fixed interrupt arrives.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.is_enabled() {
            return;
        }
        if vector < 16 {
            self.gather_error(ESR_RECEIVE_ILLEGAL);
            return;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
    }

    fn gather_error(&mut self, bits: u32) {
        self.esr_gathered |= bits;
        let lvt = self.lvt[ERROR];
        // An error entry with an illegal vector would report itself for ever.
        if lvt & LVT_MASKED == 0 && lvt & 0xff >= 16 && self.is_enabled() {
            self.irr.set(lvt as u8);
            self.tmr.clear(lvt as u8);
        }
    }

    fn eoi(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.clear(vector);
        if self.tmr.has(vector) { Effect::EoiBroadcast(vector) } else { Effect::None }
    }

    // ---- destinations -----------------------------------------------------------------------------------------------

    fn x2apic_ldr(&self) -> u32 {
        (self.initial_id >> 4) << 16 | 1 << (self.initial_id & 15)
    }

    fn x2apic_ldr_or(&self, other: u32) -> u32 {
        if self.is_x2apic() { self.x2apic_ldr() } else { other }
    }

    /// `narrow`: the message has an eight-bit destination, whose broadcast is 0xff even in x2APIC mode.
    fn matches_physical(&self, id: u32, narrow: bool) -> bool {
        if self.is_x2apic() {
            id == u32::MAX || (narrow && id == 0xff) || id == self.initial_id
        } else {
            id & 0xff == 0xff || id == u32::from(self.id)
        }
    }

    fn matches_logical(&self, set: u32, narrow: bool) -> bool {
        if self.is_x2apic() {
            let own = self.x2apic_ldr();
            set == u32::MAX || (narrow && set == 0xff) || (set >> 16 == own >> 16 && set & own & 0xffff != 0)
        } else if set & 0xff == 0xff {
            true
        } else if self.dfr >> 28 == 0xf {
            set & self.ldr >> 24 != 0
        } else {
            // Cluster model: high nibble names the cluster, low nibble is a set of its members.
            let own = self.ldr >> 24;
            (set >> 4 & 15 == own >> 4 || set >> 4 & 15 == 15) && set & own & 15 != 0
        }
    }

    fn write_icr(&mut self, value: u64) -> Effect {
        // Delivery status (bit 12) reads as idle: messages arrive at once.
        self.icr = value & !(1 << 12);
        let low = value as u32;
        let delivery = Delivery::from_bits(low);
        let dest = if self.is_x2apic() { (value >> 32) as u32 } else { (value >> 56) as u32 };
        let target = match low >> 18 & 3 {
            0 if low & 1 << 11 != 0 => Target::Logical(dest),
            0 => Target::Physical(dest),
            1 => Target::Myself,
            2 => Target::All,
            _ => Target::Others,
        };
        let vector = low as u8;
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority if vector < 16 => {
                self.gather_error(ESR_SEND_ILLEGAL);
                Effect::None
            }
            // INIT level de-assert does nothing since the Pentium 4.
            Delivery::Init if low & 1 << 15 != 0 && low & 1 << 14 == 0 => Effect::None,
            _ => Effect::Send(Message { target, delivery, vector, level: false }),
        }
    }

    // ---- timer ------------------------------------------------------------------------------------------------------

    fn timer_mode(&self) -> TimerMode {
        match self.lvt[TIMER] >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            _ => TimerMode::TscDeadline,
        }
    }

    /// Nanoseconds per count.
    fn count_ns(&self) -> u64 {
        let shift = ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7;
        CRYSTAL_NS << shift
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial_count) * self.count_ns()
    }

    fn current_count(&self, now: u64) -> u32 {
        // A count that ended stays at zero, also when the timer becomes periodic.
        if self.deadline.is_none() || self.timer_mode() == TimerMode::TscDeadline {
            return 0;
        }
        let elapsed = now.saturating_sub(self.started) / self.count_ns();
        let initial = u64::from(self.initial_count);
        match self.timer_mode() {
            TimerMode::Periodic => (initial - elapsed % initial) as u32,
            _ => initial.saturating_sub(elapsed) as u32,
        }
    }

    fn write_initial_count(&mut self, value: u32, now: u64) {
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        self.initial_count = value;
        self.started = now;
        self.deadline = (value != 0).then(|| now.saturating_add(self.period_ns()));
    }

    fn write_divide(&mut self, value: u32, now: u64) {
        let left = self.current_count(now);
        self.divide = value & 0xb;
        if self.deadline.is_some() && self.timer_mode() != TimerMode::TscDeadline {
            // The rest of the count goes on at the new rate.
            let done = u64::from(self.initial_count.saturating_sub(left)) * self.count_ns();
            self.started = now.saturating_sub(done);
            self.deadline = Some(self.started.saturating_add(self.period_ns()));
        }
    }

    fn write_lvt_timer(&mut self, value: u32) {
        let was = self.timer_mode();
        self.lvt[TIMER] = value & 0x7_10ff | if self.is_software_disabled() { LVT_MASKED } else { 0 };
        let is = self.timer_mode();
        if (was == TimerMode::TscDeadline) != (is == TimerMode::TscDeadline) {
            self.deadline = None;
            self.initial_count = 0;
            self.tsc_deadline = 0;
        }
    }

    fn arm_tsc_deadline(&mut self) {
        // One TSC tick is one nanosecond.
        self.deadline = (self.tsc_deadline != 0).then(|| {
            let at = self.tsc_deadline.wrapping_sub(self.tsc_offset);
            // A guest TSC that runs ahead of the clock makes early deadlines look negative: they are due.
            if (at as i64) < 0 && self.tsc_deadline < self.tsc_offset { 0 } else { at }
        });
    }

    /// When the timer fires next.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Fires the timer if it is due; whether it fired.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(at) = self.deadline else { return false };
        if now < at {
            return false;
        }
        self.deadline = None;
        match self.timer_mode() {
            TimerMode::Periodic => {
                let period = self.period_ns().max(1);
                let missed = (now - at) / period;
                let next = at.saturating_add(period.saturating_mul(missed + 1));
                self.started = next - period;
                self.deadline = Some(next);
            }
            TimerMode::TscDeadline => self.tsc_deadline = 0,
            TimerMode::OneShot => {}
        }
        if self.lvt[TIMER] & LVT_MASKED == 0 {
            self.accept(self.lvt[TIMER] as u8, false);
        }
        true
    }

    // ---- registers --------------------------------------------------------------------------------------------------

    fn is_software_disabled(&self) -> bool {
        self.svr & SVR_ENABLE == 0
    }

    /// A register by its xAPIC offset, for both modes; none when there is no such register.
    fn read(&self, offset: u32, now: u64) -> Option<u32> {
        Some(match offset {
            0x020 if self.is_x2apic() => self.initial_id,
            0x020 => u32::from(self.id) << 24,
            0x030 => VERSION,
            0x080 => u32::from(self.tpr),
            0x090 => 0,
            0x0a0 => u32::from(self.ppr()),
            0x0d0 => self.x2apic_ldr_or(self.ldr),
            0x0e0 => self.dfr,
            0x0f0 => self.svr,
            0x100..=0x170 => self.isr.0[(offset >> 4 & 7) as usize],
            0x180..=0x1f0 => self.tmr.0[(offset >> 4 & 7) as usize],
            0x200..=0x270 => self.irr.0[(offset >> 4 & 7) as usize],
            0x280 => self.esr,
            0x300 => self.icr as u32,
            0x310 => (self.icr >> 32) as u32,
            0x320..=0x370 => self.lvt[((offset - 0x320) >> 4) as usize],
            0x380 => self.initial_count,
            0x390 => self.current_count(now),
            0x3e0 => self.divide,
            _ => return None,
        })
    }

    /// Writes a register by its xAPIC offset, ICR excepted; none when it cannot be written.
    fn write(&mut self, offset: u32, value: u32, now: u64) -> Option<Effect> {
        match offset {
            0x080 => self.tpr = value as u8,
            0x0b0 => return Some(self.eoi()),
            0x0f0 => {
                self.svr = value & 0x1ff;
                if self.is_software_disabled() {
                    self.lvt.iter_mut().for_each(|l| *l |= LVT_MASKED);
                }
            }
            0x280 => self.esr = std::mem::take(&mut self.esr_gathered),
            0x320 => self.write_lvt_timer(value),
            0x330..=0x370 => {
                let index = ((offset - 0x320) >> 4) as usize;
                let writable = match index {
                    LINT0 | LINT1 => 0x1_a7ff,
                    ERROR => 0x1_00ff,
                    _ => 0x1_07ff,
                };
                let masked = if self.is_software_disabled() { LVT_MASKED } else { 0 };
                self.lvt[index] = value & writable | masked;
            }
            0x380 => self.write_initial_count(value, now),
            0x3e0 => self.write_divide(value, now),
            _ => return None,
        }
        Some(Effect::None)
    }

    /// Reads the 32-bit register at `offset` of the page.
    pub fn mmio_read(&mut self, offset: u32, now: u64) -> u32 {
        self.read(offset, now).unwrap_or_else(|| {
            self.gather_error(ESR_ILLEGAL_REGISTER);
            0
        })
    }

    /// Writes the 32-bit register at `offset` of the page.
    pub fn mmio_write(&mut self, offset: u32, value: u32, now: u64) -> Effect {
        match offset {
            0x020 => self.id = (value >> 24) as u8,
            0x0d0 => self.ldr = value & 0xff00_0000,
            0x0e0 => self.dfr = value | 0x0fff_ffff,
            0x300 => return self.write_icr(self.icr & !0xffff_ffff | u64::from(value)),
            0x310 => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            _ => {
                return self.write(offset, value, now).unwrap_or_else(|| {
                    self.gather_error(ESR_ILLEGAL_REGISTER);
                    Effect::None
                });
            }
        }
        Effect::None
    }

    /// RDMSR.
    ///
    /// # Errors
    /// The access raises #GP(0).
    #[allow(clippy::result_unit_err)] // #GP(0) is all there is to say
    pub fn msr_read(&mut self, number: u32, now: u64) -> Result<u64, ()> {
        match number {
            msr::APIC_BASE => Ok(self.base),
            msr::TSC_DEADLINE => Ok(if self.timer_mode() == TimerMode::TscDeadline { self.tsc_deadline } else { 0 }),
            0x830 if self.is_x2apic() => Ok(self.icr),
            // DFR and the high half of ICR do not exist in x2APIC mode, EOI and SELF IPI cannot be read.
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() && !matches!(number, 0x80e | 0x831 | 0x809) => {
                self.read((number - msr::X2APIC_FIRST) << 4, now).map(u64::from).ok_or(())
            }
            _ => Err(()),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// The access raises #GP(0).
    #[allow(clippy::result_unit_err)] // #GP(0) is all there is to say
    pub fn msr_write(&mut self, number: u32, value: u64, now: u64) -> Result<Effect, ()> {
        match number {
            msr::APIC_BASE => self.write_base(value).map(|()| Effect::None),
            msr::TSC_DEADLINE => {
                if self.timer_mode() == TimerMode::TscDeadline {
                    self.tsc_deadline = value;
                    self.arm_tsc_deadline();
                    self.expire(now);
                }
                Ok(Effect::None)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() => self.x2apic_write(number, value, now),
            _ => Err(()),
        }
    }

    fn x2apic_write(&mut self, number: u32, value: u64, now: u64) -> Result<Effect, ()> {
        if number == 0x830 {
            return Ok(self.write_icr(value));
        }
        if value >> 32 != 0 {
            return Err(());
        }
        let value = value as u32;
        match number {
            0x80b | 0x828 if value != 0 => Err(()),
            0x83f if value > 0xff => Err(()),
            0x83f => Ok(self.write_icr(u64::from(value) | 1 << 18)),
            0x808 if value > 0xff => Err(()),
            _ => self.write((number - msr::X2APIC_FIRST) << 4, value, now).ok_or(()),
        }
    }

    /// The page of the registers in xAPIC mode.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.base & !0xfff
    }

    /// SDM Vol 3A, "x2APIC State Transitions": the modes that may follow one another.
    fn write_base(&mut self, value: u64) -> Result<(), ()> {
        let reserved = 0xff | 1 << 9 | !((1u64 << 46) - 1);
        let (was, is) = (self.base & (BASE_EN | BASE_EXTD), value & (BASE_EN | BASE_EXTD));
        let extended = BASE_EN | BASE_EXTD;
        if value & reserved != 0 || is == BASE_EXTD {
            return Err(());
        }
        if (was == extended && is == BASE_EN) || (was == 0 && is == extended) {
            return Err(());
        }
        if was != 0 && is == 0 {
            let fresh = Self::new(self.initial_id, false);
            *self = Self { tsc_offset: self.tsc_offset, ..fresh };
        }
        self.base = value;
        Ok(())
    }
}

#[cfg(test)]
#[path = "lapic_tests.rs"]
mod tests;
