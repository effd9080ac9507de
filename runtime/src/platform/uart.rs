//! COM1: a 16550A UART whose line is our standard output and input.
//!
//! Place in the pipeline: ports 0x3f8 to 0x3ff and interrupt line 4 (National PC16550D data sheet). The line is infinitely fast:
//! a byte written is sent, so the transmitter is always empty. Invariants: output is gathered and written when the buffer is full,
//! a few milliseconds have passed, or on `flush`; a slow reader of ours slows the guest, it loses nothing.

use std::collections::VecDeque;
use std::io::Write;

/// First port.
pub const COM1: u16 = 0x3f8;
/// Last port.
pub const COM1_LAST: u16 = COM1 + 7;

const RX_FIFO: usize = 16;
/// Output is written at the latest when this much has gathered.
const OUT_LIMIT: usize = 4096;
/// Output waits at most this long.
pub const FLUSH_NS: u64 = 2_000_000;

const IER_RX: u8 = 1;
const IER_TX: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_TX_EMPTY: u8 = 0x60;
const MCR_LOOP: u8 = 0x10;
/// CTS, DSR and DCD: somebody listens.
const MSR_CONNECTED: u8 = 0xb0;

/// Output on its way to a host stream: gathered, and lost quietly when nobody reads it any more.
pub(super) struct Gathered {
    out: Box<dyn Write + Send>,
    bytes: Vec<u8>,
    flush_at: Option<u64>,
}

impl Gathered {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out, bytes: Vec::with_capacity(OUT_LIMIT), flush_at: None }
    }
    pub(super) fn push(&mut self, byte: u8, now: u64) {
        if self.bytes.is_empty() {
            self.flush_at = Some(now.saturating_add(FLUSH_NS));
        }
        self.bytes.push(byte);
        if self.bytes.len() >= OUT_LIMIT {
            self.flush();
        }
    }
    pub(super) fn flush(&mut self) {
        if !self.bytes.is_empty() {
            // A closed pipe is no reason to end the guest.
            let _ = self.out.write_all(&self.bytes).and_then(|()| self.out.flush());
            self.bytes.clear();
        }
        self.flush_at = None;
    }
    pub(super) fn deadline(&self) -> Option<u64> {
        self.flush_at
    }
    pub(super) fn expire(&mut self, now: u64) {
        if self.flush_at.is_some_and(|at| now >= at) {
            self.flush();
        }
    }
}

/// The UART.
pub struct Uart {
    line: Gathered,
    rx: VecDeque<u8>,
    ier: u8,
    fifo: bool,
    trigger: usize,
    lcr: u8,
    mcr: u8,
    /// Change bits of the modem status.
    msr_delta: u8,
    overrun: bool,
    scratch: u8,
    divisor: u16,
    /// The transmitter-empty interrupt waits to be read or overtaken.
    tx_interrupt: bool,
}

impl Uart {
    /// After power-up, sending to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            line: Gathered::new(out),
            rx: VecDeque::with_capacity(RX_FIFO),
            ier: 0,
            fifo: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            msr_delta: 0,
            overrun: false,
            scratch: 0,
            divisor: 12,
            tx_interrupt: false,
        }
    }

    /// A machine reset: the registers, not the line.
    pub fn reset(&mut self) {
        self.flush();
        let out = std::mem::replace(&mut self.line.out, Box::new(std::io::sink()));
        *self = Self::new(out);
    }

    /// Writes out what has gathered.
    pub fn flush(&mut self) {
        self.line.flush();
    }

    /// When output has to be written at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.line.deadline()
    }

    /// Writes output that has waited long enough.
    pub fn expire(&mut self, now: u64) {
        self.line.expire(now);
    }

    /// Whether another received byte fits. Without FIFO there is one place.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.rx.len() < if self.fifo { RX_FIFO } else { 1 } && self.mcr & MCR_LOOP == 0
    }

    /// A byte arrives on the line.
    pub fn receive(&mut self, byte: u8) {
        if self.rx.len() >= RX_FIFO {
            self.overrun = true;
        } else {
            self.rx.push_back(byte);
        }
    }

    /// Interrupt identification, without the FIFO bits: the highest of the four sources.
    fn identification(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            0x06
        } else if self.ier & IER_RX != 0 && self.rx.len() >= self.trigger {
            0x04
        } else if self.ier & IER_RX != 0 && !self.rx.is_empty() {
            0x0c // below the trigger level: the character timeout
        } else if self.ier & IER_TX != 0 && self.tx_interrupt {
            0x02
        } else if self.ier & IER_MODEM != 0 && self.msr_delta != 0 {
            0x00
        } else {
            0x01
        }
    }

    /// Level of the interrupt line.
    #[must_use]
    pub fn irq(&self) -> bool {
        self.identification() & 1 == 0
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP != 0 {
            // RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD.
            let m = self.mcr;
            (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        } else {
            MSR_CONNECTED
        }
    }

    /// Reads register `n`.
    pub fn read(&mut self, n: u16) -> u8 {
        let divisor = self.lcr & 0x80 != 0;
        match n {
            0 if divisor => self.divisor as u8,
            1 if divisor => (self.divisor >> 8) as u8,
            0 => self.rx.pop_front().unwrap_or(0),
            1 => self.ier,
            2 => {
                let id = self.identification();
                if id == 0x02 {
                    self.tx_interrupt = false;
                }
                id | if self.fifo { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let data = if self.rx.is_empty() { 0 } else { LSR_DATA };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TX_EMPTY | data | overrun
            }
            6 => self.modem_status() | std::mem::take(&mut self.msr_delta),
            _ => self.scratch,
        }
    }

    /// Writes register `n`.
    pub fn write(&mut self, n: u16, value: u8, now: u64) {
        let divisor = self.lcr & 0x80 != 0;
        match n {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if divisor => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            0 => {
                if self.mcr & MCR_LOOP != 0 {
                    self.receive(value);
                } else {
                    self.line.push(value, now);
                }
                self.tx_interrupt = true;
            }
            1 => {
                // Enabling the transmitter interrupt while it is empty raises it at once.
                if value & IER_TX != 0 && self.ier & IER_TX == 0 {
                    self.tx_interrupt = true;
                }
                self.ier = value & 0x0f;
            }
            2 => {
                let fifo = value & 1 != 0;
                if fifo != self.fifo || value & 2 != 0 {
                    self.rx.clear();
                }
                self.fifo = fifo;
                self.trigger = if fifo { [1, 4, 8, 14][usize::from(value >> 6)] } else { 1 };
            }
            3 => self.lcr = value,
            4 => {
                let before = self.modem_status();
                self.mcr = value & 0x1f;
                let changed = before ^ self.modem_status();
                // Delta bits are the high nibble's changes; RI counts when it ends.
                let ended_ri = before & 0x40 & changed;
                self.msr_delta |= (changed & 0xb0) >> 4 | ended_ri >> 4;
            }
            7 => self.scratch = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    pub struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);
    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().push(buf.to_vec());
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn uart() -> (Uart, Sink) {
        let sink = Sink::default();
        (Uart::new(Box::new(sink.clone())), sink)
    }

    #[test]
    fn output_gathers_until_it_is_due() {
        let (mut uart, sink) = uart();
        b"hello\n".iter().for_each(|b| uart.write(0, *b, 1000));
        assert!(sink.0.lock().unwrap().is_empty());
        assert_eq!(uart.deadline(), Some(1000 + FLUSH_NS));
        uart.expire(1000 + FLUSH_NS);
        assert_eq!(*sink.0.lock().unwrap(), vec![b"hello\n".to_vec()]);
        assert_eq!(uart.deadline(), None);
        (0..OUT_LIMIT).for_each(|_| uart.write(0, b'x', 0));
        assert_eq!(sink.0.lock().unwrap().len(), 2, "a full buffer does not wait");
    }

    #[test]
    fn linux_finds_a_16550a() {
        let (mut uart, _) = uart();
        uart.write(1, 0, 0);
        assert_eq!(uart.read(1) & 0xf, 0);
        uart.write(1, 0xf, 0);
        assert_eq!(uart.read(1) & 0xf, 0xf);
        uart.write(4, 0x1a, 0);
        assert_eq!(uart.read(6) & 0xf0, 0x90, "loopback test");
        uart.write(4, 0, 0);
        uart.write(2, 1, 0);
        assert_eq!(uart.read(2) >> 6, 3, "FIFOs work");
        uart.write(7, 0x5a, 0);
        assert_eq!(uart.read(7), 0x5a);
        uart.write(3, 0x80, 0);
        uart.write(0, 1, 0);
        uart.write(1, 0, 0);
        assert_eq!((uart.read(0), uart.read(1)), (1, 0));
    }

    #[test]
    fn transmitter_interrupt() {
        let (mut uart, _) = uart();
        assert!(!uart.irq());
        uart.write(1, IER_TX, 0);
        assert!(uart.irq());
        assert_eq!(uart.read(2), 0x02);
        assert!(!uart.irq(), "reading the identification clears it");
        uart.write(0, b'a', 0);
        assert!(uart.irq(), "the byte is gone at once");
        uart.write(1, 0, 0);
        assert!(!uart.irq());
    }

    #[test]
    fn receiver_interrupt_and_timeout() {
        let (mut uart, _) = uart();
        uart.write(2, 0x81, 0);
        uart.write(1, IER_RX, 0);
        uart.receive(b'a');
        assert_eq!(uart.read(2), 0xcc, "one byte: character timeout");
        (0..7).for_each(|_| uart.receive(b'b'));
        assert_eq!(uart.read(2), 0xc4);
        assert_eq!(uart.read(5), LSR_TX_EMPTY | LSR_DATA);
        assert_eq!(uart.read(0), b'a');
        (0..7).for_each(|_| assert_eq!(uart.read(0), b'b'));
        assert!(!uart.irq());
        assert_eq!(uart.read(5), LSR_TX_EMPTY);
    }

    #[test]
    fn overrun_is_reported_once() {
        let (mut uart, _) = uart();
        uart.write(2, 1, 0);
        uart.write(1, IER_LINE, 0);
        (0..17).for_each(|_| uart.receive(0));
        assert!(!uart.has_room());
        assert_eq!(uart.read(2) & 0xf, 0x06);
        assert_eq!(uart.read(5) & LSR_OVERRUN, LSR_OVERRUN);
        assert!(!uart.irq());
    }

    #[test]
    fn loopback_stays_inside() {
        let (mut uart, sink) = uart();
        uart.write(4, MCR_LOOP, 0);
        uart.write(0, 0x42, 0);
        assert_eq!(uart.read(0), 0x42);
        uart.flush();
        assert!(sink.0.lock().unwrap().is_empty());
    }

    #[test]
    fn reset_keeps_the_line() {
        let (mut uart, sink) = uart();
        uart.write(0, b'1', 0);
        uart.reset();
        uart.write(0, b'2', 0);
        uart.flush();
        assert_eq!(*sink.0.lock().unwrap(), vec![b"1".to_vec(), b"2".to_vec()]);
    }
}
