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

/// The code of the test below, and where its block is that it overwrites, which is `target` in the end.
fn another_number(target: u32) -> Result<(Vec<u8>, u32), IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let [mut main, mut jumps, mut again, mut other, mut twice] = [(); 5].map(|()| a.create_label());
    a.mov(esp, (BASE - 16) as i32)?;
    a.xor(eax, eax)?;
    a.xor(edi, edi)?;
    a.jmp(main)?;
    // A block that jumps to a loop in its page.
    a.set_label(&mut jumps)?;
    a.mov(ecx, 10)?;
    a.jmp(again)?;
    a.nops_with_size(32)?;
    a.set_label(&mut again)?;
    a.add(eax, ecx)?;
    a.rol(eax, 1)?;
    a.dec(ecx)?;
    a.jne(again)?;
    a.ret()?;
    // In another page, one that jumps somewhere else.
    a.nops_with_size(4096)?;
    a.set_label(&mut other)?;
    a.inc(edi)?;
    a.ret()?;
    a.set_label(&mut main)?;
    a.call(jumps)?;
    // The block is another one now; and its number is free when the dispatcher has been there.
    a.mov(dword_ptr(target + 1), 6_000_000)?;
    a.mov(esi, 2)?;
    a.mov(edx, 0x80)?;
    a.out(dx, al)?;
    a.set_label(&mut twice)?;
    a.call(other)?;
    a.call(jumps)?;
    a.mov(ecx, 1)?;
    a.dec(esi)?;
    a.jne(twice)?;
    a.add(eax, edi)?;
    finish(&mut a)?;
    let done = a.assemble_options(ENTRY.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = done.label_ip(&jumps)? as u32;
    Ok((done.inner.code_buffer, at))
}

/// A block that jumps to a loop is overwritten, and another block gets its number; then the loop becomes a region, which takes over
/// the jumps to its root. The dead block's must not be looked for in the one that has its number.
#[test]
fn a_number_that_another_block_has_now() {
    let (_, at) = another_number(ENTRY).expect("it assembles");
    let (code, _) = another_number(at).expect("it assembles");
    let turns = (1..=10u32).rev().chain((1..=6_000_000u32).rev()).chain((1..=6_000_000u32).rev());
    let sum = turns.fold(0u32, |sum, n| sum.wrapping_add(n).rotate_left(1));
    in_every_tier("region-numbers", &code, &digits(sum.wrapping_add(2)), &[], |_| {});
}
