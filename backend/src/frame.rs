//! Takes the frame out of blocks that do not use it.
//!
//! Place in the pipeline: after Cranelift, on the bytes. Cranelift's tail calls on x86-64 insist on a frame pointer, so a
//! block begins with `push rbp; mov rbp, rsp` and each way out undoes that. A block without spills never looks at the frame:
//! it is entered after the prologue, and leaves by a jump alone. All ways out of a block are near jumps with a relocation,
//! which is how they are found; a jump is moved up over the epilogue, so nothing else in the code moves.

use crate::compiler::CompiledTb;

/// `push rbp; mov rbp, rsp`
const PROLOGUE: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
/// `mov rsp, rbp; pop rbp; jmp near`
const EPILOGUE: [u8; 5] = [0x48, 0x89, 0xec, 0x5d, 0xe9];

/// Removes the frame if every way out looks as it must.
pub(crate) fn remove(tb: &mut CompiledTb) {
    let code = tb.code.clone();
    let sub_rsp = |c: &[u8]| c.starts_with(&[0x48, 0x83, 0xec]) || c.starts_with(&[0x48, 0x81, 0xec]);
    if !code.starts_with(&PROLOGUE) || sub_rsp(&code[PROLOGUE.len()..]) {
        return;
    }
    // Where the displacement of each jump out is; calls of thunks return and need nothing.
    let jumps = tb.calls.iter_mut().map(|c| &mut c.0).chain(tb.slots.iter_mut().map(|s| &mut s.at));
    let jumps: Vec<&mut u32> = jumps.filter(|at| **at >= 1 && code[**at as usize - 1] == 0xe9).collect();
    let epilogue = |at: u32| at >= 5 && code[at as usize - 5..at as usize] == EPILOGUE;
    if !jumps.iter().all(|at| epilogue(**at)) {
        return;
    }
    for field in jumps {
        let at = *field as usize;
        tb.code[at - 5..at + 4].copy_from_slice(&[0xe9, 0, 0, 0, 0, 0xcc, 0xcc, 0xcc, 0xcc]);
        *field -= 4;
    }
    tb.entry = PROLOGUE.len() as u32;
}
