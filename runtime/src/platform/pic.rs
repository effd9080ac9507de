//! The two 8259A interrupt controllers of a PC, the second behind line 2 of the first.
//!
//! Place in the pipeline: the platform drives the lines; the output reaches a processor through its local APIC's LINT0
//! (Intel 8259A data sheet; the edge/level registers 0x4d0 and 0x4d1 are the PIIX's). Invariant: nothing is lost when a line
//! rises while masked, and a line that falls before it is acknowledged gives the spurious vector 7.

/// The pair.
#[derive(Debug)]
pub struct DualPic {
    first: Pic,
    second: Pic,
}

#[derive(Debug, Default)]
struct Pic {
    /// Lines as they are.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Lines that are level-triggered.
    elcr: u8,
    base: u8,
    /// The line with the highest priority.
    top: u8,
    /// Which initialisation word comes next; 0 when none.
    init: u8,
    /// ICW1 said there is an ICW4.
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Pic {
    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1u8 << (line & 7);
        let was = self.lines & bit != 0;
        if level {
            self.lines |= bit;
            if !was || self.elcr & bit != 0 {
                self.irr |= bit;
            }
        } else {
            self.lines &= !bit;
            // An edge request lives only as long as its line is high, too: that is where spurious interrupts come from.
            self.irr &= !bit;
        }
    }

    /// The line that wants the output, by priority.
    fn winner(&self) -> Option<u8> {
        let requests = self.irr & !self.imr;
        if requests == 0 {
            return None;
        }
        // Special mask mode: lines in service block only what is not masked; otherwise they block everything below.
        let blocking = if self.special_mask { self.isr & !self.imr } else { self.isr };
        (0..8).map(|i| (self.top + i) & 7).find_map(|line| {
            let bit = 1u8 << line;
            if blocking & bit != 0 && !(self.special_nested && line == 2 && requests & bit != 0) {
                return Some(None);
            }
            (requests & bit != 0).then_some(Some(line))
        })?
    }

    fn enter_service(&mut self, line: u8) {
        let bit = 1u8 << line;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.top = (line + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 clears everything but the lines and their triggers.
            let edge_requests = 0;
            let level_requests = self.lines & self.elcr;
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                irr: edge_requests | level_requests,
                init: 2,
                wants_icw4: value & 1 != 0,
                ..Self::default()
            };
        } else if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.poll = true;
            }
            if value & 0x02 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => {
                let line = (0..8).map(|i| (self.top + i) & 7).find(|l| self.isr & 1 << l != 0);
                if let Some(line) = line {
                    self.isr &= !(1 << line);
                    if value >> 5 == 5 {
                        self.top = (line + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            6 => self.top = (named + 1) & 7,
            7 => {
                self.isr &= !(1 << named);
                self.top = (named + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            2 => {
                self.base = value & 0xf8;
                self.init = 3;
            }
            3 => self.init = if self.wants_icw4 { 4 } else { 0 },
            4 => {
                self.special_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = 0;
            }
            _ => self.imr = value,
        }
    }

    /// The poll command's answer: 0x80 and the line, which enters service.
    fn take_poll(&mut self) -> u8 {
        self.poll = false;
        match self.winner() {
            Some(line) => {
                self.enter_service(line);
                0x80 | line
            }
            None => 0,
        }
    }
}

impl Default for DualPic {
    fn default() -> Self {
        Self::new()
    }
}

impl DualPic {
    /// After power-up: not initialised, and every line masked, as firmware leaves them.
    #[must_use]
    pub fn new() -> Self {
        let pic = |base| Pic { imr: 0xff, base, ..Pic::default() };
        Self { first: pic(0x08), second: pic(0x70) }
    }

    /// Drives a line (0..16); whether the output may have changed.
    pub fn set_irq(&mut self, irq: u8, level: bool) -> bool {
        let pic = if irq < 8 { &mut self.first } else { &mut self.second };
        let before = (pic.irr, pic.lines);
        pic.set_line(irq & 7, level);
        let changed = (pic.irr, pic.lines) != before;
        if changed {
            self.cascade();
        }
        changed
    }

    fn cascade(&mut self) {
        let wants = self.second.winner().is_some();
        self.first.set_line(2, wants);
    }

    /// The INTR output.
    #[must_use]
    pub fn output(&self) -> bool {
        self.first.winner().is_some()
    }

    /// The vector an acknowledge would give now.
    #[must_use]
    pub fn peek(&self) -> u8 {
        match self.first.winner() {
            Some(2) => self.second.base | self.second.winner().unwrap_or(7),
            Some(line) => self.first.base | line,
            None => self.first.base | 7,
        }
    }

    /// The processor's interrupt acknowledge; returns the vector.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = self.peek();
        if let Some(line) = self.first.winner() {
            self.first.enter_service(line);
            if line == 2
                && let Some(line) = self.second.winner()
            {
                self.second.enter_service(line);
            }
        }
        self.cascade();
        vector
    }

    /// Reads port 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    pub fn read(&mut self, port: u16) -> u8 {
        let pic = if matches!(port, 0x20 | 0x21 | 0x4d0) { &mut self.first } else { &mut self.second };
        let value = match port {
            0x4d0 | 0x4d1 => pic.elcr,
            _ if pic.poll => pic.take_poll(),
            0x21 | 0xa1 => pic.imr,
            _ if pic.read_isr => pic.isr,
            _ => pic.irr,
        };
        self.cascade();
        value
    }

    /// Writes one of the same ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.first.write_command(value),
            0x21 => self.first.write_data(value),
            0xa0 => self.second.write_command(value),
            0xa1 => self.second.write_data(value),
            // Timer, keyboard, cascade, RTC and coprocessor lines are always edges.
            0x4d0 => self.first.elcr = value & 0xf8,
            0x4d1 => self.second.elcr = value & 0xde,
            _ => {}
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initialised() -> DualPic {
        let mut pic = DualPic::new();
        for (port, words) in [(0x20, [0x11, 0x30, 0x04, 0x01]), (0xa0, [0x11, 0x38, 0x02, 0x01])] {
            pic.write(port, words[0]);
            words[1..].iter().for_each(|w| pic.write(port + 1, *w));
        }
        pic
    }

    #[test]
    fn masks_read_back() {
        let mut pic = initialised();
        pic.write(0x21, 0xfb);
        pic.write(0xa1, 0x5a);
        assert_eq!((pic.read(0x21), pic.read(0xa1)), (0xfb, 0x5a));
    }

    #[test]
    fn priority_and_eoi() {
        let mut pic = initialised();
        pic.set_irq(4, true);
        pic.set_irq(1, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x31);
        assert!(!pic.output(), "line 4 waits for line 1");
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x10);
        pic.write(0x20, 0x64);
        assert_eq!(pic.read(0x20), 0);
        assert!(!pic.output(), "an edge is served once");
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert!(pic.output());
    }

    #[test]
    fn the_second_controller_cascades() {
        let mut pic = initialised();
        pic.set_irq(8, true);
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x38);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn a_line_that_falls_is_spurious() {
        let mut pic = initialised();
        pic.set_irq(3, true);
        pic.set_irq(3, false);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0, "nothing in service");
    }

    #[test]
    fn level_lines_come_again() {
        let mut pic = initialised();
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn automatic_eoi_rotation_and_poll() {
        let mut pic = DualPic::new();
        for (port, w) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3)] {
            pic.write(port, w);
        }
        pic.write(0x20, 0x80);
        pic.set_irq(0, true);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x20);
        pic.set_irq(0, false);
        pic.set_irq(0, true);
        assert_eq!(pic.acknowledge(), 0x21, "line 0 went to the back");
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x80);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
    }

    #[test]
    fn nothing_panics() {
        let mut pic = initialised();
        let mut seed = 12345u32;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][(seed >> 8) as usize % 6];
            pic.write(port, (seed >> 16) as u8);
            pic.set_irq((seed >> 24) as u8 & 15, seed & 64 != 0);
            pic.read(port);
            if pic.output() {
                pic.acknowledge();
            }
        }
    }
}
