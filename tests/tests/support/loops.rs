//! Loops that print what they have computed, and must print the same in every tier.

use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{multiboot, scratch, twofold_with};

/// Where [`multiboot`] loads an image.
pub const BASE: u32 = 0x10_0000;
/// Where it starts the code.
pub const ENTRY: u32 = BASE + 32;

/// The end of a loop's guest: prints EAX as [`digits`] does, and ends the machine with status 1.
pub fn finish(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut digit = a.create_label();
    a.mov(ebx, eax)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut digit)?;
    a.rol(ebx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 15)?;
    a.add(eax, 0x41)?;
    a.out(0xe9, al)?;
    a.dec(ecx)?;
    a.jne(digit)?;
    a.xor(eax, eax)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()
}

/// Eight hexadecimal digits, from A to P.
pub fn digits(n: u32) -> String {
    (0..8).rev().map(|i| (b'A' + (n >> (4 * i) & 15) as u8) as char).collect()
}

/// Runs the code, which lies at [`ENTRY`], in each tier; it must print `want`. `after` gets each tier's name.
#[track_caller]
pub fn in_every_tier(test: &str, code: &[u8], want: &str, more: &[&str], mut after: impl FnMut(&str)) {
    let file = scratch(test).join("guest");
    std::fs::write(&file, multiboot(code)).expect("written");
    let file = file.to_str().expect("UTF-8 path");
    for tier in ["eval", "quick", "opt", "auto"] {
        let mut args = vec!["run", "--kernel", file, "--memory", "16M", "--serial", "none", "--debugcon", "stdio"];
        args.extend(["--tier", tier]);
        args.extend(more);
        let run = twofold_with(&args, Duration::from_secs(120));
        run.expect_status(1);
        assert!(run.stdout.contains(want), "{tier}: want {want}:\n{}", run.shown());
        after(tier);
    }
}
