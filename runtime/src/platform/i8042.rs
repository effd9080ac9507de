//! The keyboard controller, as far as software without a keyboard needs it: self-test, configuration byte, A20, reset.
//!
//! Place in the pipeline: ports 0x60 and 0x64. Nothing is attached to it, so it never interrupts and keyboard commands get no answer.

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    config: u8,
    output_port: u8,
    answer: Option<u8>,
    /// A command that waits for its data byte.
    command: Option<u8>,
    last_was_command: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl I8042 {
    /// After firmware: both ports disabled, A20 on.
    #[must_use]
    pub fn new() -> Self {
        Self { config: 0x34, output_port: 0x03, answer: None, command: None, last_was_command: false }
    }

    /// Reads port 0x60 or 0x64.
    pub fn read(&mut self, port: u16) -> u8 {
        if port == 0x60 {
            return self.answer.take().unwrap_or(0);
        }
        let full = if self.answer.is_some() { STATUS_OUTPUT_FULL } else { 0 };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        STATUS_UNLOCKED | STATUS_SYSTEM | full | command
    }

    /// Writes port 0x60 or 0x64; whether the machine is to be reset.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        self.last_was_command = port == 0x64;
        if port == 0x60 {
            return match self.command.take() {
                Some(0x60) => {
                    self.config = value;
                    false
                }
                Some(0xd1) => {
                    self.output_port = value;
                    value & 1 == 0
                }
                Some(0xd2 | 0xd3) => {
                    self.answer = Some(value);
                    false
                }
                _ => false,
            };
        }
        self.command = None;
        match value {
            0x20 => self.answer = Some(self.config),
            0xaa => self.answer = Some(0x55),
            // Tests of the two lines: "clock line stuck low" says that nothing is attached.
            0xab | 0xa9 => self.answer = Some(0x01),
            0xad => self.config |= 0x10,
            0xae => self.config &= !0x10,
            0xa7 => self.config |= 0x20,
            0xa8 => self.config &= !0x20,
            0xc0 => self.answer = Some(0),
            0xd0 => self.answer = Some(self.output_port),
            0x60 | 0xd1..=0xd4 => self.command = Some(value),
            // Pulse output lines: bit 0 is the reset line, active low.
            0xf0..=0xff => return value & 1 == 0,
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn self_test_and_configuration() {
        let mut kbc = I8042::new();
        assert_eq!(kbc.read(0x64) & STATUS_OUTPUT_FULL, 0);
        assert!(!kbc.write(0x64, 0xaa));
        assert_eq!(kbc.read(0x64) & STATUS_OUTPUT_FULL, 1);
        assert_eq!(kbc.read(0x60), 0x55);
        kbc.write(0x64, 0x60);
        kbc.write(0x60, 0x47);
        kbc.write(0x64, 0x20);
        assert_eq!(kbc.read(0x60), 0x47);
    }

    #[test]
    fn three_ways_to_reset() {
        assert!(I8042::new().write(0x64, 0xfe));
        assert!(!I8042::new().write(0x64, 0xff));
        let mut kbc = I8042::new();
        kbc.write(0x64, 0xd1);
        assert!(!kbc.write(0x60, 0xdf), "that only opens A20");
        kbc.write(0x64, 0xd1);
        assert!(kbc.write(0x60, 0xde));
    }

    #[test]
    fn a_keyboard_does_not_answer() {
        let mut kbc = I8042::new();
        assert!(!kbc.write(0x60, 0xff));
        assert_eq!(kbc.read(0x64) & STATUS_OUTPUT_FULL, 0);
    }
}
