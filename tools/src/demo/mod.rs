//! The guest of `twofold demo`: one processor through real mode and every paging mode, then as a hypervisor of guests in each.
//!
//! The guest is made here, byte by byte, when the command runs: no download, no assembler, and the same image on any
//! host. [`image`] gives a Multiboot 1 file (a.out kludge), so any loader that knows the format can run it; `twofold demo
//! --image FILE` writes it out. What each file does:
//!
//! - [`layout`]: where everything lies in guest-physical memory;
//! - [`tables`]: GDT, IDT and page tables of all four modes, built by one algorithm;
//! - [`asm`]: a piece of code of one operand size: printing, fault handlers, checks;
//! - [`rows`]: the rows of the table the guest prints, written once for 32- and 64-bit code;
//! - [`program`]: the pieces in order, with the switches of mode between them;
//! - [`guests`]: the guests L2, in every paging mode: their programs, page tables and what a VMCS says of them;
//! - [`l1`]: the hypervisor L1, that runs them and looks at what each transition kept and dropped.
//!
//! The guest checks all it prints. It ends through ACPI's S5 (exit status 0) when everything was as expected, else by
//! isa-debug-exit (exit status 3), and 5 when faults do not stop.

mod asm;
mod guests;
mod l1;
mod layout;
mod program;
mod rows;
mod tables;

use layout::{IMAGE_BASE, IMAGE_SIZE};

/// How the machine that will run the guest powers off.
#[derive(Clone, Copy, Debug)]
pub struct PowerOff {
    /// I/O port of the ACPI PM1a control register.
    pub port: u16,
    /// What a 16-bit write there must be to enter S5: SLP_TYP and SLP_EN.
    pub value: u16,
}

/// The guest as a Multiboot 1 image.
///
/// # Errors
/// When an instruction cannot be encoded or a piece does not fit its place: a mistake in this module, found by its test.
pub fn image(power_off: PowerOff) -> Result<Vec<u8>, String> {
    let mut memory = Memory::new();
    program::build(&mut memory, power_off).map_err(|e| format!("the demo guest does not assemble: {e}"))?;
    memory.put32(IMAGE_BASE, &layout::multiboot_header())?;
    Ok(memory.bytes)
}

/// The image under construction, addressed as the guest will see it.
struct Memory {
    bytes: Vec<u8>,
}

impl Memory {
    fn new() -> Self {
        Memory { bytes: vec![0; IMAGE_SIZE as usize] }
    }

    /// Copies `bytes` to guest-physical `address`.
    fn put(&mut self, address: u32, bytes: &[u8]) -> Result<(), String> {
        let start = address.checked_sub(IMAGE_BASE).ok_or("below the image")? as usize;
        let place = self.bytes.get_mut(start..start + bytes.len()).ok_or("past the image")?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    /// The eight bytes at guest-physical `address`; 0 outside the image.
    fn get64(&self, address: u32) -> u64 {
        let start = address.wrapping_sub(IMAGE_BASE) as usize;
        let bytes = self.bytes.get(start..start + 8).unwrap_or_default();
        bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn put32(&mut self, address: u32, words: &[u32]) -> Result<(), String> {
        words.iter().zip((address..).step_by(4)).try_for_each(|(w, at)| self.put(at, &w.to_le_bytes()))
    }

    fn put64(&mut self, address: u32, words: &[u64]) -> Result<(), String> {
        words.iter().zip((address..).step_by(8)).try_for_each(|(w, at)| self.put(at, &w.to_le_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembles_and_has_a_multiboot_header() {
        let image = image(PowerOff { port: 0x604, value: 0x2000 }).expect("assembles");
        let word = |i: usize| u32::from_le_bytes([image[4 * i], image[4 * i + 1], image[4 * i + 2], image[4 * i + 3]]);
        assert_eq!(word(0), 0x1bad_b002);
        assert_eq!(word(0).wrapping_add(word(1)).wrapping_add(word(2)), 0);
        assert_eq!(word(5) - word(4), image.len() as u32, "the file is loaded whole");
    }
}
