//! Everything around the processors: the devices of the machine, its ports and device memory, its interrupts and time.
//!
//! Place in the pipeline: the vCPU loop owns one [`Platform`] (or locks it) and calls it for port I/O, device memory,
//! APIC registers, timers and interrupts; translated code never gets here without a helper in between. Invariants: no
//! call blocks except for output; whatever a guest writes, nothing panics; devices are told the time, they never look.
//! The only thread is the input reader of [`input`].
//!
//! Per turn of the vCPU loop: `poll(clock.now_ns())`, then `signals(cpu)` and `interrupt_pending(cpu)`, which are loads of cached
//! words; when halted, sleep until `next_deadline()` or a kick.

pub mod acpi_pm;
pub mod clock;
pub mod debug;
pub mod fw_cfg;
pub mod i8042;
pub mod input;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod smi;
pub mod uart;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use twofold_arch::PhysAddr;

pub use clock::Clock;
pub use input::Input;

use crate::config::{Config, Console, Kick};
use crate::run::Error;
use acpi_pm::AcpiPm;
use debug::{DebugConsole, TestDevices};
use fw_cfg::FwCfg;
use i8042::I8042;
use ioapic::IoApic;
use lapic::{Effect, LocalApic};
use pic::DualPic;
use pit::Pit;
use rtc::Rtc;
use uart::Uart;

/// Physical address of the local APICs' registers after a reset, one page. IA32_APIC_BASE moves them to anywhere that is no RAM, ROM or device.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Physical address of the I/O APIC's registers, one page.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The device memory there is, as (first byte, length): what the physical map sends to `mmio_read` and `mmio_write`.
pub const MMIO_REGIONS: [(PhysAddr, u64); 3] = [
    (PhysAddr(IOAPIC_BASE), 0x1000),
    (PhysAddr(LAPIC_BASE), 0x1000),
    (PhysAddr(debug::MEMORY_BASE), debug::MEMORY_SIZE),
];

/// Interrupt line of the real-time clock.
const IRQ_RTC: u8 = 8;
/// Interrupt line of COM1.
const IRQ_COM1: u8 = 4;
/// Interrupt line of the ACPI SCI.
pub const IRQ_SCI: u8 = 9;

/// What the guest did to the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// ACPI S5.
    PowerOff,
    /// Reset by ACPI, port 0xcf9, 0x92 or the keyboard controller.
    Reset,
    /// This value was written to the isa-debug-exit port.
    DebugExit(u32),
}

/// Bits of [`Platform::signals`].
pub mod signal {
    /// An NMI is to be delivered.
    pub const NMI: u32 = 1 << 0;
    /// An INIT arrived: reset this processor, then wait for SIPI unless it is the bootstrap processor.
    pub const INIT: u32 = 1 << 1;
    /// A start-up IPI arrived.
    pub const SIPI: u32 = 1 << 2;
    /// A system-management interrupt arrived.
    pub const SMI: u32 = 1 << 3;
}

/// What the devices counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Port reads.
    pub io_reads: u64,
    /// Port writes.
    pub io_writes: u64,
    /// Port accesses that nothing answered.
    pub io_unclaimed: u64,
    /// Device memory accesses.
    pub mmio: u64,
    /// Interrupts handed to a processor.
    pub interrupts: u64,
    /// Timer and input polls that found something due.
    pub polls: u64,
}

/// What a [`Platform`] is made from.
pub struct Setup {
    /// Number of processors, at least one.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The machine's clock.
    pub clock: Clock,
    /// Where COM1's output goes.
    pub serial_out: Box<dyn Write + Send>,
    /// Where the debug console's output goes.
    pub debugcon_out: Box<dyn Write + Send>,
    /// Where COM1's input comes from.
    pub input: Option<Input>,
    /// Firmware starts the machine: it finds the chips it looks for.
    pub firmware: bool,
}

impl Setup {
    /// A machine whose consoles lead nowhere; tests start from it.
    #[must_use]
    pub fn quiet(cpus: u32, memory: u64, clock: Clock) -> Self {
        Self {
            cpus,
            memory,
            clock,
            serial_out: Box::new(std::io::sink()),
            debugcon_out: Box::new(std::io::sink()),
            input: None,
            firmware: false,
        }
    }
}

struct Cpu {
    apic: LocalApic,
    /// The vector `interrupt_pending` answers, or [`NO_VECTOR`].
    pending: u16,
    signals: u32,
    sipi_vector: u8,
    due: Arc<AtomicBool>,
}

const NO_VECTOR: u16 = 0xffff;
const NEVER: u64 = u64::MAX;

/// All devices of the machine.
pub struct Platform {
    clock: Clock,
    cpus: Vec<Cpu>,
    nmi_sent: bool,
    smi: smi::SmiControl,
    pci: pci::Pci,
    ioapic: IoApic,
    pic: DualPic,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    i8042: I8042,
    debugcon: DebugConsole,
    test: TestDevices,
    fw_cfg: FwCfg,
    acpi: AcpiPm,
    input: Option<Input>,
    outcome: Option<Outcome>,
    /// Earliest time at which `poll` has something to do.
    deadline: u64,
    counters: Counters,
    unclaimed: BTreeSet<u16>,
    trace: Option<TraceSink>,
}

/// Takes one line of a trace.
pub type TraceSink = Box<dyn FnMut(&str) + Send>;

impl std::fmt::Debug for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Platform")
            .field("cpus", &self.cpus.len())
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

impl Platform {
    /// A machine just powered on.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let cpus = setup.cpus.clamp(1, crate::config::MAX_CPUS);
        let mut platform = Self {
            nmi_sent: false,
            smi: smi::SmiControl::default(),
            pci: pci::Pci::new(setup.firmware),
            cpus: (0..cpus).map(Cpu::new).collect(),
            ioapic: IoApic::new(),
            pic: DualPic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(setup.memory),
            uart: Uart::new(setup.serial_out),
            i8042: I8042::new(),
            debugcon: DebugConsole::new(setup.debugcon_out),
            test: TestDevices::default(),
            fw_cfg: FwCfg::new(cpus, setup.memory),
            acpi: AcpiPm::new(),
            input: setup.input,
            outcome: None,
            deadline: 0,
            counters: Counters::default(),
            unclaimed: BTreeSet::new(),
            trace: None,
            clock: setup.clock,
        };
        platform.reschedule();
        platform
    }

    /// A machine with the consoles `config` asks for. `kick` is called by the input reader when there is something to read.
    ///
    /// # Errors
    /// When a console file cannot be created.
    pub fn from_config(config: &Config, clock: Clock, kick: Kick) -> Result<Self, Error> {
        let open = |console: &Console, option: &str| -> Result<Box<dyn Write + Send>, Error> {
            Ok(match console {
                Console::Stdio => Box::new(std::io::stdout()),
                Console::None => Box::new(std::io::sink()),
                Console::File(path) => Box::new(std::fs::File::create(path).map_err(|e| {
                    Error::Usage(format!(
                        "{option}: cannot create {}: {e}; name a file in a directory you may write to",
                        path.display()
                    ))
                })?),
            })
        };
        let input = (config.serial == Console::Stdio).then(|| {
            let quit = config.escape.then(|| config.control.clone());
            Input::spawn(std::io::stdin(), kick, quit)
        });
        Ok(Self::new(Setup {
            cpus: config.cpus,
            memory: config.memory,
            clock,
            serial_out: open(&config.serial, "--serial")?,
            debugcon_out: open(&config.debugcon, "--debugcon")?,
            input,
            firmware: config.firmware.is_some(),
        }))
    }

    /// Every accessed port that nothing answers is reported here, once.
    pub fn set_trace(&mut self, trace: TraceSink) {
        self.trace = Some(trace);
    }

    /// What PC firmware leaves behind when it starts an operating system: the bootstrap processor's LINT0 takes the 8259s
    /// (virtual wire mode), LINT1 is NMI. Call it when a kernel is started without firmware.
    pub fn enter_virtual_wire_mode(&mut self) {
        self.cpus[0].apic.enter_virtual_wire_mode();
        self.refresh(0);
    }

    /// What a PC's BIOS leaves running besides: the 8259s at vectors 8 and 70H with the timer's line open, and the timer at
    /// 18.2 Hz.
    pub fn leave_as_bios(&mut self) {
        let writes = [
            (0x20, 0x11),
            (0x21, 8),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x70),
            (0xa1, 2),
            (0xa1, 1),
            (0x21, 0xfa),
            (0xa1, 0xff),
            (0x43, 0x34),
            (0x40, 0),
            (0x40, 0),
        ];
        for (port, value) in writes {
            self.io_write(port, 1, value);
        }
    }

    /// Whether an NMI or SMI went from one processor to others since this was last asked: who takes turns lets them have it.
    pub fn take_nmi_sent(&mut self) -> bool {
        std::mem::take(&mut self.nmi_sent)
    }

    /// The machine's devices as after a reset; consoles stay connected.
    pub fn reset(&mut self) {
        for (id, cpu) in self.cpus.iter_mut().enumerate() {
            *cpu = Cpu { due: cpu.due.clone(), ..Cpu::new(id as u32) };
            cpu.note_due();
        }
        self.ioapic = IoApic::new();
        self.pic = DualPic::new();
        self.pit = Pit::new();
        self.uart.reset();
        self.i8042 = I8042::new();
        self.acpi = AcpiPm::new();
        self.smi = smi::SmiControl::default();
        self.outcome = None;
        self.reschedule();
    }

    /// The machine's clock.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// What the guest did to the machine, when it did: the run ends, or the machine resets.
    #[must_use]
    #[inline]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// What the devices counted.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The last byte written to the POST port.
    #[must_use]
    pub fn post_code(&self) -> u8 {
        self.test.post
    }

    /// Writes out what the consoles still hold.
    pub fn flush(&mut self) {
        self.uart.flush();
        self.debugcon.flush();
    }

    // ---- time -------------------------------------------------------------------------------------------------------

    /// Lets everything happen that is due at `now` (of [`Platform::clock`]), and takes input.
    #[inline]
    pub fn poll(&mut self, now: u64) {
        if now >= self.deadline || (self.input.as_ref().is_some_and(Input::is_ready) && self.uart.has_room()) {
            self.poll_devices(now);
        }
    }

    /// When `poll` next has something to do, in nanoseconds of [`Platform::clock`]; none when only input can wake the
    /// machine.
    #[must_use]
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        (self.deadline != NEVER).then_some(self.deadline)
    }

    /// Whether an interrupt could still come by itself: a timer runs or input is open. When not, HLT with interrupts on
    /// never ends either.
    #[must_use]
    pub fn can_wake(&self) -> bool {
        self.deadline != NEVER || self.input.as_ref().is_some_and(Input::is_open)
    }

    fn poll_devices(&mut self, now: u64) {
        self.counters.polls += 1;
        for i in 0..self.cpus.len() {
            if self.cpus[i].apic.expire(now) {
                self.refresh(i);
            }
        }
        if self.pit.expire(now) {
            // A pulse that may have come and gone since the last poll still makes an edge.
            self.set_irq(0, false);
            self.set_irq(0, true);
        }
        self.set_irq(0, self.pit.irq(now));
        self.rtc.expire(now);
        self.set_irq(IRQ_RTC, self.rtc.irq());
        self.acpi.expire(now);
        self.set_irq(IRQ_SCI, self.acpi.irq());
        self.take_input();
        self.uart.expire(now);
        self.set_irq(IRQ_COM1, self.uart.irq());
        self.debugcon.expire(now);
        self.reschedule();
    }

    /// Fires a due APIC timer before its registers are read, so that count and interrupt agree.
    fn expire_apic(&mut self, cpu: usize, now: u64) {
        if self.cpus.get_mut(cpu).is_some_and(|c| c.apic.expire(now)) {
            self.refresh(cpu);
            self.reschedule();
        }
    }

    /// Moves waiting input into the UART, as far as there is room.
    fn take_input(&mut self) {
        let Some(input) = &mut self.input else { return };
        while self.uart.has_room() {
            match input.take() {
                Some(byte) => self.uart.receive(byte),
                None => break,
            }
        }
    }

    /// Recomputes the earliest deadline.
    fn reschedule(&mut self) {
        let timers = self.cpus.iter().filter_map(|c| c.apic.deadline());
        let devices = [
            self.pit.deadline(),
            self.rtc.deadline(),
            self.acpi.deadline(),
            self.uart.deadline(),
            self.debugcon.deadline(),
        ];
        self.deadline = timers.chain(devices.into_iter().flatten()).min().unwrap_or(NEVER);
    }

    // ---- interrupts -------------------------------------------------------------------------------------------------

    /// The vector that `acknowledge` would return now, for a processor that takes interrupts. One load.
    #[must_use]
    #[inline]
    pub fn interrupt_pending(&self, cpu: usize) -> Option<u8> {
        match self.cpus.get(cpu)?.pending {
            NO_VECTOR => None,
            v => Some(v as u8),
        }
    }

    /// The processor takes the pending interrupt; returns its vector (the spurious one when it has gone meanwhile).
    pub fn acknowledge(&mut self, cpu: usize) -> u8 {
        let Some(c) = self.cpus.get_mut(cpu) else { return 0xff };
        self.counters.interrupts += 1;
        let vector = match c.apic.acknowledge() {
            Some(vector) => vector,
            None if c.apic.accepts_extint() && self.pic.output() => self.pic.acknowledge(),
            None => c.apic.spurious_vector(),
        };
        self.refresh_all();
        vector
    }

    /// For each processor whether an interrupt or a signal waits for it: what can be asked without a lock.
    pub(crate) fn due(&self) -> Box<[Arc<AtomicBool>]> {
        self.cpus.iter().map(|c| c.due.clone()).collect()
    }

    /// NMI, INIT, SIPI and SMI that wait for this processor: bits of [`signal`]. One load.
    #[must_use]
    #[inline]
    pub fn signals(&self, cpu: usize) -> u32 {
        self.cpus.get(cpu).map_or(0, |c| c.signals)
    }

    /// Takes (clears) one of the signals; whether it was there.
    pub fn take_signal(&mut self, cpu: usize, bit: u32) -> bool {
        let Some(c) = self.cpus.get_mut(cpu) else { return false };
        let was = c.signals & bit != 0;
        c.signals &= !bit;
        c.note_due();
        was
    }

    /// The page number of the last start-up IPI.
    #[must_use]
    pub fn sipi_vector(&self, cpu: usize) -> u8 {
        self.cpus.get(cpu).map_or(0, |c| c.sipi_vector)
    }

    /// What INIT does to this processor's APIC (SDM Vol 3A, "Local APIC State After an INIT Reset").
    pub fn init_apic(&mut self, cpu: usize) {
        if let Some(c) = self.cpus.get_mut(cpu) {
            c.apic.init();
            self.refresh(cpu);
            self.reschedule();
        }
    }

    /// Whether IA32_APIC_BASE disables this processor's APIC.
    #[must_use]
    pub fn is_apic_disabled(&self, cpu: usize) -> bool {
        self.cpus.get(cpu).is_some_and(|c| c.apic.is_disabled())
    }

    /// CR8: the high four bits of the task priority.
    #[must_use]
    pub fn cr8(&self, cpu: usize) -> u64 {
        self.cpus.get(cpu).map_or(0, |c| u64::from(c.apic.tpr() >> 4))
    }

    /// Sets CR8 (0..=15).
    pub fn set_cr8(&mut self, cpu: usize, value: u64) {
        if let Some(c) = self.cpus.get_mut(cpu) {
            c.apic.set_tpr((value as u8 & 15) << 4);
            self.refresh(cpu);
        }
    }

    /// Drives an ISA interrupt line, at the 8259s and the I/O APIC (where line 0 is pin 2).
    fn set_irq(&mut self, irq: u8, level: bool) {
        let pin = if irq == 0 { 2 } else { irq };
        let pic = self.pic.set_irq(irq, level);
        let ioapic = self.ioapic.set_pin(pin, level);
        if ioapic {
            self.deliver_ioapic();
        }
        if pic {
            self.refresh_all();
        }
    }

    /// Drives a line for a test; those from 16 on lead to the I/O APIC alone.
    fn drive_line(&mut self, line: u8, level: bool) {
        if line < 16 {
            self.set_irq(line, level);
        } else if self.ioapic.set_pin(line, level) {
            self.deliver_ioapic();
        }
    }

    fn deliver_ioapic(&mut self) {
        while let Some(message) = self.ioapic.take_message() {
            self.deliver(message, None);
        }
    }

    /// Hands a message to the local APICs it is for.
    fn deliver(&mut self, message: lapic::Message, source: Option<usize>) {
        let lowest = message.delivery == lapic::Delivery::LowestPriority;
        for i in 0..self.cpus.len() {
            if !message.selects(&self.cpus[i].apic, i, source) {
                continue;
            }
            self.accept(i, &message);
            if lowest {
                break;
            }
        }
    }

    fn accept(&mut self, cpu: usize, message: &lapic::Message) {
        use lapic::Delivery;
        let Some(c) = self.cpus.get_mut(cpu) else { return };
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                c.apic.accept(message.vector, message.level);
                self.refresh(cpu);
            }
            Delivery::Nmi => c.signals |= signal::NMI,
            Delivery::Init => c.signals |= signal::INIT,
            Delivery::StartUp => {
                c.sipi_vector = message.vector;
                c.signals |= signal::SIPI;
            }
            Delivery::Smi => c.signals |= signal::SMI,
            // An ExtINT message has no 8259 to ask but ours, which LINT0 serves.
            Delivery::ExtInt | Delivery::Reserved => {}
        }
        if let Some(c) = self.cpus.get(cpu) {
            c.note_due();
        }
    }

    fn apply(&mut self, cpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EoiBroadcast(vector) => {
                self.ioapic.eoi(vector);
                self.deliver_ioapic();
            }
            Effect::Send(message) => {
                let others =
                    (0..self.cpus.len()).any(|i| i != cpu && message.selects(&self.cpus[i].apic, i, Some(cpu)));
                self.nmi_sent |= others && matches!(message.delivery, lapic::Delivery::Nmi | lapic::Delivery::Smi);
                self.deliver(message, Some(cpu));
            }
        }
        self.refresh(cpu);
        self.reschedule();
    }

    fn refresh(&mut self, cpu: usize) {
        let extint = self.pic.output();
        if let Some(c) = self.cpus.get_mut(cpu) {
            c.pending = match c.apic.pending_vector() {
                Some(v) => u16::from(v),
                None if extint && c.apic.accepts_extint() => u16::from(self.pic.peek()),
                None => NO_VECTOR,
            };
            c.note_due();
        }
    }

    fn refresh_all(&mut self) {
        for i in 0..self.cpus.len() {
            self.refresh(i);
        }
    }

    // ---- device memory and APIC registers ---------------------------------------------------------------------------

    /// Whether the registers of the processor's local APIC are in this page.
    fn is_apic_page(&self, cpu: usize, page: u64) -> bool {
        self.cpus.get(cpu).is_some_and(|c| c.apic.is_xapic() && c.apic.page() == page)
    }

    /// Reads `size` (1, 2, 4, 8) bytes of device memory as processor `cpu`; all ones where nothing is.
    pub fn mmio_read(&mut self, cpu: usize, addr: PhysAddr, size: u8) -> u64 {
        self.counters.mmio += 1;
        let now = self.clock.now_ns();
        self.expire_apic(cpu, now);
        let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        let word = match addr.0 & !0xfff {
            page if self.is_apic_page(cpu, page) => match self.cpus.get_mut(cpu) {
                Some(c) => u64::from(c.apic.mmio_read(addr.0 as u32 & 0xff0, now)),
                _ => return ones,
            },
            IOAPIC_BASE => u64::from(self.ioapic.mmio_read(addr.0 as u32 & 0xff0)),
            _ if (debug::MEMORY_BASE..debug::MEMORY_BASE + debug::MEMORY_SIZE).contains(&addr.0) => {
                return self.test.memory_read(addr.0 - debug::MEMORY_BASE, size.min(8));
            }
            _ => return ones,
        };
        // Registers are 32 bits wide on 16-byte boundaries; a narrow read gets its part of one.
        let offset = addr.0 as u32 & 15;
        if offset >= 4 { 0 } else { word >> (8 * offset) & ones }
    }

    /// Writes `size` bytes of device memory as processor `cpu`.
    pub fn mmio_write(&mut self, cpu: usize, addr: PhysAddr, size: u8, value: u64) {
        self.counters.mmio += 1;
        if (debug::MEMORY_BASE..debug::MEMORY_BASE + debug::MEMORY_SIZE).contains(&addr.0) {
            return self.test.memory_write(addr.0 - debug::MEMORY_BASE, size.min(8), value);
        }
        // Only aligned 32-bit writes are defined; wider ones count with their low half, narrower ones as they are.
        if addr.0 & 15 != 0 {
            return;
        }
        let now = self.clock.now_ns();
        match addr.0 & !0xfff {
            page if self.is_apic_page(cpu, page) => {
                let Some(c) = self.cpus.get_mut(cpu) else { return };
                let effect = c.apic.mmio_write(addr.0 as u32 & 0xff0, value as u32, now);
                self.apply(cpu, effect);
            }
            IOAPIC_BASE => {
                self.ioapic.mmio_write(addr.0 as u32 & 0xff0, value as u32);
                self.deliver_ioapic();
            }
            _ => {}
        }
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// The access raises #GP(0).
    #[allow(clippy::result_unit_err)] // #GP(0) is all there is to say
    pub fn apic_msr_read(&mut self, cpu: usize, msr: u32) -> Result<u64, ()> {
        let now = self.clock.now_ns();
        self.expire_apic(cpu, now);
        self.cpus.get_mut(cpu).ok_or(())?.apic.msr_read(msr, now)
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// The access raises #GP(0).
    #[allow(clippy::result_unit_err)] // #GP(0) is all there is to say
    pub fn apic_msr_write(&mut self, cpu: usize, msr: u32, value: u64) -> Result<(), ()> {
        let now = self.clock.now_ns();
        let effect = self.cpus.get_mut(cpu).ok_or(())?.apic.msr_write(msr, value, now)?;
        self.apply(cpu, effect);
        Ok(())
    }

    /// Tells the APIC the processor's TSC offset (guest TSC = clock + offset), which TSC deadlines are relative to.
    pub fn set_tsc_offset(&mut self, cpu: usize, offset: u64) {
        if let Some(c) = self.cpus.get_mut(cpu) {
            c.apic.set_tsc_offset(offset);
            self.reschedule();
        }
    }

    // ---- ports ------------------------------------------------------------------------------------------------------

    /// IN: reads `size` (1, 2, 4) bytes from `port`; all ones where nothing answers.
    pub fn io_read(&mut self, port: u16, size: u8) -> u32 {
        self.counters.io_reads += 1;
        let now = self.clock.now_ns();
        let value = match (port, size) {
            (_, 1) if !(0xcfc..=0xcff).contains(&port) => u32::from(self.port_read(port, now)),
            (0xcf8..=0xcff, _) => self.pci.read(port, size),
            (acpi_pm::FIRST_PORT..=acpi_pm::LAST_PORT, _) => self.acpi.read(port, size, now),
            (0x402, _) => u32::from(DebugConsole::PRESENT),
            _ => (0..size.min(4))
                .fold(0, |word, i| word | u32::from(self.port_read(port.wrapping_add(u16::from(i)), now)) << (8 * i)),
        };
        value & ones(size)
    }

    /// OUT: writes `size` (1, 2, 4) bytes to `port`.
    pub fn io_write(&mut self, port: u16, size: u8, value: u32) {
        self.counters.io_writes += 1;
        let now = self.clock.now_ns();
        let value = value & ones(size);
        match (port, size) {
            (0xf4, _) => self.outcome = self.outcome.or(Some(Outcome::DebugExit(value))),
            (_, 1) if !(0xcfc..=0xcff).contains(&port) => self.port_write(port, value as u8, now),
            (0xcf8..=0xcff, _) => self.pci.write(port, size, value),
            (acpi_pm::FIRST_PORT..=acpi_pm::LAST_PORT, _) => self.write_acpi(port, size, value, now),
            (fw_cfg::SELECTOR_PORT, 2) => self.fw_cfg.select(value as u16),
            _ => (0..size.min(4)).for_each(|i| {
                self.port_write(port.wrapping_add(u16::from(i)), (value >> (8 * i)) as u8, now);
            }),
        }
    }

    fn port_read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            uart::COM1..=uart::COM1_LAST => {
                let value = self.uart.read(port & 7);
                if port == uart::COM1 {
                    self.take_input();
                }
                self.after_uart();
                value
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let value = self.pic.read(port);
                self.refresh_all();
                value
            }
            0x40..=0x42 => self.pit.read(port & 3, now),
            0x61 => self.pit.read_port61(now),
            0x60 | 0x64 => self.i8042.read(port),
            0x71 => {
                let value = self.rtc.read(now);
                self.set_irq(IRQ_RTC, self.rtc.irq());
                value
            }
            0x80 => self.test.post,
            smi::COMMAND_PORT | smi::DATA_PORT | smi::FIRST_PORT..=smi::LAST_PORT => self.smi.read(port),
            debug::ECHO_PORT..=debug::ECHO_PORT_LAST => self.test.echo[usize::from(port & 3)],
            0x92 => 0x02,
            0xe9 | 0x402 => DebugConsole::PRESENT,
            0xf4 | 0xcf8..=0xcfb => 0xff,
            fw_cfg::DATA_PORT => self.fw_cfg.read(),
            acpi_pm::FIRST_PORT..=acpi_pm::LAST_PORT => self.acpi.read(port, 1, now) as u8,
            _ => {
                self.note_unclaimed("read", port);
                0xff
            }
        }
    }

    fn port_write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            uart::COM1..=uart::COM1_LAST => {
                self.uart.write(port & 7, value, now);
                self.after_uart();
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                self.pic.write(port, value);
                self.refresh_all();
            }
            0x40..=0x43 => {
                self.pit.write(port & 3, value, now);
                self.set_irq(0, self.pit.irq(now));
                self.reschedule();
            }
            0x61 => self.pit.write_port61(value, now),
            0x60 | 0x64 => {
                if self.i8042.write(port, value) {
                    self.request_reset();
                }
            }
            0x70 => self.rtc.select(value),
            0x71 => {
                self.rtc.write(value, now);
                self.set_irq(IRQ_RTC, self.rtc.irq());
                self.reschedule();
            }
            0x80 => self.test.post = value,
            smi::COMMAND_PORT | smi::DATA_PORT | smi::FIRST_PORT..=smi::LAST_PORT => {
                if self.smi.write(port, value) {
                    self.cpus.iter_mut().for_each(|c| {
                        c.signals |= signal::SMI;
                        c.note_due();
                    });
                    self.nmi_sent |= self.cpus.len() > 1;
                }
            }
            debug::ECHO_PORT..=debug::ECHO_PORT_LAST => self.test.echo[usize::from(port & 3)] = value,
            debug::FLUSH_PORT..=debug::FLUSH_PORT_LAST => {}
            debug::LINE_PORT..=debug::LINE_PORT_LAST => {
                self.drive_line((port - debug::LINE_PORT) as u8, value & 1 != 0)
            }
            0x92 if value & 1 != 0 => self.request_reset(),
            0x92 | 0xcf8 | 0xcfa | 0xcfb | fw_cfg::DATA_PORT => {}
            0xcf9 if value & 4 != 0 => self.request_reset(),
            0xcf9 => {}
            0xe9 | 0x402 => {
                self.debugcon.write(value, now);
                self.reschedule();
            }
            acpi_pm::FIRST_PORT..=acpi_pm::LAST_PORT => self.write_acpi(port, 1, u32::from(value), now),
            _ => self.note_unclaimed("write", port),
        }
    }

    fn write_acpi(&mut self, port: u16, size: u8, value: u32, now: u64) {
        if self.acpi.write(port, size, value, now) {
            self.outcome = self.outcome.or(Some(Outcome::PowerOff));
        }
        self.set_irq(IRQ_SCI, self.acpi.irq());
        self.reschedule();
    }

    fn after_uart(&mut self) {
        self.set_irq(IRQ_COM1, self.uart.irq());
        // A buffer that just got its first byte wants a flush; everything else about the UART happens at once.
        if let Some(at) = self.uart.deadline() {
            self.deadline = self.deadline.min(at);
        }
    }

    fn request_reset(&mut self) {
        self.outcome = self.outcome.or(Some(Outcome::Reset));
    }

    fn note_unclaimed(&mut self, what: &str, port: u16) {
        self.counters.io_unclaimed += 1;
        if self.unclaimed.insert(port)
            && let Some(trace) = &mut self.trace
        {
            trace(&format!("io: {what} of port {port:#06x}, which nothing answers"));
        }
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Cpu {
    fn new(id: u32) -> Self {
        Self { apic: LocalApic::new(id, id == 0), pending: NO_VECTOR, signals: 0, sipi_vector: 0, due: Arc::default() }
    }

    /// To be called after every change of `pending` or `signals`.
    fn note_due(&self) {
        self.due.store(self.pending != NO_VECTOR || self.signals != 0, Ordering::Release);
    }
}

const fn ones(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

#[cfg(test)]
mod tests;
