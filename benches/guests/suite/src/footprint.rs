//! Time per guest instruction against hot code, and time per access against data, at growing sizes.
#![allow(unsafe_code)] // runs code made by `jit`

use crate::data::Memory;
use crate::jit::{CodeBuffer, write_function};
use crate::{Random, timed};

/// A function each: small enough that sizes of 1 KiB hold several, large enough that the call is not all.
const FUNCTION: usize = 256;

/// Functions of 256 bytes with a conditional jump in the middle, called through pointers in random order: the first pass, and
/// passes when what is hot has been compiled. An operation is an instruction.
pub fn code(max_kib: u64, instructions: u64) {
    let mut kib = 1;
    while kib <= max_kib {
        let functions = (kib as usize * 1024) / FUNCTION;
        let Some(mut buffer) = CodeBuffer::new(functions * FUNCTION) else { return };
        let mut random = Random::new(kib);
        let mut count = 0;
        for at in (0..functions).map(|f| f * FUNCTION) {
            count += write_hot(&mut buffer.bytes()[at..at + FUNCTION], &mut random);
        }
        let mut order: Vec<u32> = (0..functions as u32).collect();
        (1..functions).rev().for_each(|i| order.swap(i, random.next() as usize % (i + 1)));
        // The loop around the calls is six instructions or so.
        count += 6 * functions as u64;
        let pass = |x: u64| {
            // SAFETY: functions written above.
            order.iter().fold(x, |x, &f| unsafe { buffer.call(f as usize * FUNCTION, x) })
        };
        let passes = (instructions / count).max(4);
        let mut x = 1;
        let mut run = |phase: &str, passes: u64| {
            timed(&format!("code/{kib}/{phase}"), || {
                (0..passes).for_each(|_| x = pass(x));
                Some((count * passes, x))
            });
        };
        run("first", 1);
        run("middle", passes);
        run("later", passes);
        kib *= 2;
    }
}

/// A function in which about a third of the blocks are skipped; how many instructions it has on average.
fn write_hot(out: &mut [u8], random: &mut Random) -> u64 {
    // Two straight parts; between them: test al, 3; jnz over one instruction.
    let first = write_function(out, random, 13) - 1;
    out[first..first + 4].copy_from_slice(&[0xa8, 0x03, 0x75, 0x03]);
    out[first + 4..first + 7].copy_from_slice(&[0x48, 0xf7, 0xd0]); // not rax
    let second = first + 7;
    out[second..second + 3].copy_from_slice(&[0x48, 0x89, 0xc7]); // mov rdi, rax
    write_function(&mut out[second + 3..], random, 13);
    // 26 operations of 1.25 instructions, moves, test, jump, NOT now and then, RET
    38
}

/// Loads at random cache lines. An operation is an access.
pub fn data(max_kib: u64, accesses: u64) {
    let Some(memory) = Memory::new(max_kib as usize * 1024) else { return };
    let mut kib = 4;
    while kib <= max_kib {
        let length = kib as usize * 1024;
        timed(&format!("data/{kib}/first"), || Some((accesses / 4, memory.chase(length, 6, accesses / 4))));
        timed(&format!("data/{kib}/later"), || Some((accesses, memory.chase(length, 6, accesses))));
        kib *= 2;
    }
}
