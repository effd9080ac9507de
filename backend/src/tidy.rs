//! Tidies up emitted code: takes out frames that are not used, and makes conditional branches to direct exits the exits
//! themselves.
//!
//! Place in the pipeline: after Cranelift, on the bytes. Cranelift's tail calls on x86-64 insist on a frame pointer and on
//! the callee-saved registers of the System V convention, so a block begins by saving and each way out undoes that. But
//! `enter` has saved all of those for everybody: a block without spills is entered after its prologue, and leaves by a jump
//! alone. Every way out of a block is a near jump with a relocation, which is how they are found. Only bytes of epilogues are
//! rewritten; nothing moves, so nothing else needs to change. What does not look exactly as expected is left alone.

use crate::compiler::CompiledTb;

/// `push rbp; mov rbp, rsp`
const PROLOGUE: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
/// `mov rsp, rbp; pop rbp; jmp near`
const EPILOGUE: [u8; 5] = [0x48, 0x89, 0xec, 0x5d, 0xe9];

/// Removes the frame if nothing but the saving of registers is in it and every way out looks as it must.
pub(crate) fn remove_frame(tb: &mut CompiledTb) {
    let Some((prologue, epilogue)) = frame(&tb.code) else { return };
    let code = &tb.code;
    // Where the displacement of each jump out is; calls of thunks return and need nothing.
    let jumps = tb.calls.iter_mut().map(|c| &mut c.0).chain(tb.slots.iter_mut().map(|s| &mut s.at));
    let jumps: Vec<&mut u32> = jumps.filter(|at| **at >= 1 && code[**at as usize - 1] == 0xe9).collect();
    if !jumps.iter().all(|at| code[..**at as usize].ends_with(&epilogue)) {
        return;
    }
    let back = epilogue.len() - 1;
    for field in jumps {
        let at = *field as usize;
        tb.code[at - 1 - back..at + 4].fill(0xcc);
        tb.code[at - 1 - back..at + 4 - back].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
        *field -= back as u32;
    }
    tb.entry = prologue as u32;
}

/// The length of the prologue and the epilogue up to the jump's opcode, when the frame holds saved registers only.
fn frame(code: &[u8]) -> Option<(usize, Vec<u8>)> {
    let mut rest = code.strip_prefix(&PROLOGUE)?;
    let mut restore = Vec::new();
    // `sub rsp, imm8` or `imm32`, undone by `add`.
    let sub = match rest {
        [0x48, 0x83, 0xec, _, ..] => 4,
        [0x48, 0x81, 0xec, ..] => 7,
        _ => 0,
    };
    if sub != 0 {
        let (head, tail) = rest.split_at_checked(sub)?;
        rest = tail;
        let mut at = 0;
        // `mov [rsp + at], reg`, undone by `mov reg, [rsp + at]`; the first is at 0 when nothing is spilled below.
        while let Some((insn, reg)) = saved(rest, at) {
            restore.extend([insn[0], 0x8b]);
            restore.extend(&insn[2..]);
            rest = &rest[insn.len()..];
            at += 8;
            debug_assert!(reg >= 3);
        }
        if at == 0 {
            return None;
        }
        restore.extend([0x48, head[1], 0xc4]);
        restore.extend(&head[3..]);
    }
    let prologue = code.len() - rest.len();
    restore.extend(EPILOGUE);
    Some((prologue, restore))
}

/// `mov [rsp + at], reg` at the start of `code`, where `reg` is callee-saved.
fn saved(code: &[u8], at: u8) -> Option<(&[u8], u8)> {
    let [rex @ (0x48 | 0x4c), 0x89, modrm, 0x24, ..] = *code else { return None };
    let reg = (modrm >> 3 & 7) | (rex & 4) << 1;
    if !matches!(reg, 3 | 12..=15) {
        return None;
    }
    let len = match modrm & 0xc7 {
        0x04 if at == 0 => 4,
        0x44 if at != 0 && code.get(4) == Some(&at) => 5,
        _ => return None,
    };
    Some((code.get(..len)?, reg))
}

/// Makes branches that go to a jump out into the way out: `branches` are (slot, end of its branch). Only without a frame, as
/// then the jump is all there is.
pub(crate) fn branches_to_slots(tb: &mut CompiledTb, branches: &[(u32, u32)]) {
    if tb.entry == 0 {
        return;
    }
    for &(slot, end) in branches {
        let Some(slot) = tb.slots.get_mut(slot as usize) else { continue };
        let Some(branch) = (end as usize).checked_sub(6).and_then(|from| tb.code.get(from..end as usize)) else { continue };
        let [0x0f, 0x80..=0x8f, d @ ..] = branch else { continue };
        let to = d.try_into().map(i32::from_le_bytes).unwrap_or(0);
        if i64::from(end) + i64::from(to) == i64::from(slot.at) - 1 {
            slot.at = end - 4;
        }
    }
}
