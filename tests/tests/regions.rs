//! Loops that change under the optimising tier: code that patches the loop it runs in, in every tier with the same outcome.

mod support;

use std::time::Duration;

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use support::{scratch, twofold_with};

const BASE: u32 = 0x10_0000;
const ENTRY: u32 = BASE + 0x40;
const DATA: u32 = BASE - 0x1000;

/// A loop of several blocks that patches an immediate of one of them every 4,096 turns, by a store or by REP MOVSB, and in
/// the end prints the sum of all that the immediate was.
fn guest(by_string: bool) -> Result<Vec<u8>, IcedError> {
    // Twice: the first time to see where the block lies.
    let (_, patched) = assemble(by_string, ENTRY)?;
    Ok(image(&assemble(by_string, patched)?.0))
}

/// The code, and where the block is that it patches, which is `target` in the end.
fn assemble(by_string: bool, target: u32) -> Result<(Vec<u8>, u32), IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut again, mut skip, mut no_patch, mut patched) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(esp, (BASE - 16) as i32)?;
    a.xor(eax, eax)?;
    a.mov(ebx, 3_000_000)?;
    a.xor(edx, edx)?;
    a.set_label(&mut again)?;
    a.test(ebx, 1)?;
    a.jne(skip)?;
    // The immediate is the last four bytes.
    a.set_label(&mut patched)?;
    a.add(eax, 0x1234_5678)?;
    a.set_label(&mut skip)?;
    a.test(ebx, 0xfff)?;
    a.jne(no_patch)?;
    a.inc(edx)?;
    if by_string {
        a.mov(dword_ptr(DATA), edx)?;
        a.mov(esi, DATA)?;
        a.mov(edi, target + 1)?;
        a.mov(ecx, 4)?;
        a.rep().movsb()?;
    } else {
        a.mov(dword_ptr(target + 1), edx)?;
    }
    a.set_label(&mut no_patch)?;
    a.dec(ebx)?;
    a.jne(again)?;
    // Eight hexadecimal digits.
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
    a.hlt()?;
    let done = a.assemble_options(ENTRY.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = done.label_ip(&patched)? as u32;
    Ok((done.inner.code_buffer, at))
}

/// A Multiboot image of the code.
fn image(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; (ENTRY - BASE) as usize];
    image.extend(code);
    let end = BASE + image.len() as u32;
    let flags = 1 << 16;
    let header = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags), BASE, BASE, end, end + 0x1000, ENTRY];
    for (i, word) in header.into_iter().enumerate() {
        image[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
    }
    image
}

/// What it prints, by the same loop here.
fn expected() -> String {
    let (mut sum, mut immediate, mut patches) = (0u32, 0x1234_5678u32, 0);
    for turn in (1..=3_000_000u32).rev() {
        if turn & 1 == 0 {
            sum = sum.wrapping_add(immediate);
        }
        if turn & 0xfff == 0 {
            patches += 1;
            immediate = patches;
        }
    }
    (0..8).rev().map(|i| (b'A' + (sum >> (4 * i) & 15) as u8) as char).collect()
}

#[track_caller]
fn check(by_string: bool) {
    let dir = scratch(if by_string { "region-movs" } else { "region-store" });
    let file = dir.join("guest");
    std::fs::write(&file, guest(by_string).expect("it assembles")).expect("written");
    let file = file.to_str().expect("UTF-8 path");
    for tier in ["eval", "quick", "opt", "auto"] {
        let args =
            ["run", "--kernel", file, "--memory", "16M", "--serial", "none", "--debugcon", "stdio", "--tier", tier];
        let run = twofold_with(&args, Duration::from_secs(120));
        run.expect_status(1);
        assert!(run.stdout.contains(&expected()), "{tier}: want {}:\n{}", expected(), run.shown());
    }
}

#[test]
fn a_loop_patched_by_a_store() {
    check(false);
}

#[test]
fn a_loop_patched_by_a_string_instruction() {
    check(true);
}
