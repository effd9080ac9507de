//! Loops that change under the optimising tier: code that patches the loop it runs in, in every tier with the same outcome.

mod support;

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use support::loops::{BASE, ENTRY, digits, finish, in_every_tier};

const DATA: u32 = BASE - 0x1000;

/// A loop of several blocks that patches an immediate of one of them every 4,096 turns, by a store or by REP MOVSB, and in
/// the end prints the sum of all that the immediate was.
fn guest(by_string: bool) -> Result<Vec<u8>, IcedError> {
    // Twice: the first time to see where the block lies.
    let (_, patched) = assemble(by_string, ENTRY)?;
    Ok(assemble(by_string, patched)?.0)
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
    finish(&mut a)?;
    let done = a.assemble_options(ENTRY.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = done.label_ip(&patched)? as u32;
    Ok((done.inner.code_buffer, at))
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
    digits(sum)
}

#[track_caller]
fn check(by_string: bool) {
    let name = if by_string { "region-movs" } else { "region-store" };
    in_every_tier(name, &guest(by_string).expect("it assembles"), &expected(), &[], |_| {});
}

#[test]
fn a_loop_patched_by_a_store() {
    check(false);
}

#[test]
fn a_loop_patched_by_a_string_instruction() {
    check(true);
}
