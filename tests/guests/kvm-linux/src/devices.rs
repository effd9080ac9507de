//! The guest's ports: a 16550 on COM1 that prints on stdout, the port that ends the guest, and nothing else.
#![allow(unsafe_code)] // guest memory handed to KVM, signals

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::io::Write;
use std::rc::Rc;
use std::time::Instant;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

const COM1: u16 = 0x3f8;
const COM1_IRQ: u32 = 4;
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
const RTC_DATA: u16 = 0x71;
const EXIT: u16 = 0xf4;

/// How a guest ends by itself.
pub enum End {
    Status(u8),
    Reset,
}

/// An edge on an interrupt line.
struct Line(Rc<VmFd>);

impl Trigger for Line {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set_irq_line(COM1_IRQ, true)?;
        self.0.set_irq_line(COM1_IRQ, false)
    }
}

/// Prints whole lines, and says when the first with the awaited text came.
struct Console {
    line: Vec<u8>,
    start: Instant,
    mark: Option<String>,
}

impl Console {
    fn print(&mut self) {
        // Nobody is left to tell when stdout is gone.
        let _ = std::io::stdout().write_all(&self.line);
        let text = String::from_utf8_lossy(&self.line);
        if let Some(mark) = self.mark.take_if(|m| text.contains(m.as_str())) {
            println!("kvm-linux: {mark:?} after {:.3} s", self.start.elapsed().as_secs_f64());
        }
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        for &byte in data {
            self.line.push(byte);
            if byte == b'\n' {
                self.print();
            }
        }
        Ok(data.len())
    }

    /// The UART asks for this after each byte.
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// All ports.
pub struct Devices {
    com1: Serial<Line, NoEvents, Console>,
}

impl Devices {
    pub fn new(vm: Rc<VmFd>, start: Instant, mark: Option<String>) -> Self {
        Self { com1: Serial::new(Line(vm), Console { line: Vec::new(), start, mark }) }
    }

    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<End> {
        let &byte = data.first()?;
        match port {
            COM1..0x400 => {
                for &byte in data {
                    // A lost interrupt is no reason to stop: the guest polls too.
                    let _ = self.com1.write((port - COM1) as u8, byte);
                }
                None
            }
            KEYBOARD_COMMAND if byte == KEYBOARD_RESET => Some(End::Reset),
            EXIT => Some(End::Status(byte)),
            _ => None,
        }
    }

    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        match port {
            COM1..0x400 => data.iter_mut().for_each(|byte| *byte = self.com1.read((port - COM1) as u8)),
            // A clock that is not busy.
            RTC_DATA => data.fill(0),
            // No keyboard controller, but ready for the reset: it always has data, and always takes some.
            KEYBOARD_COMMAND => data.fill(0xfd),
            _ => data.fill(0xff),
        }
    }

    /// Prints a line that has not ended.
    pub fn flush(&mut self) {
        self.com1.writer_mut().print();
    }
}

pub fn give_memory(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the region is a mapping that lives until the process ends.
    unsafe { vm.set_user_memory_region(region) }
}

extern "C" fn alarm(_: i32) {}

/// Makes KVM_RUN return after so many seconds.
pub fn limit_time(seconds: u32) {
    // SAFETY: the handler does nothing; the signal interrupts the ioctl.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = alarm as *const () as usize;
        libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut());
        libc::alarm(seconds);
    }
}
