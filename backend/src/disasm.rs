//! Disassembly of host code for `-d out_asm` and the goldens.

use crate::compiler::CompiledTb;

/// Host code as text, one instruction a line; `base` is the address of its first byte, `symbol` names branch targets.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn disassemble(code: &[u8], base: u64, symbol: impl Fn(u64) -> Option<String>) -> String {
    use std::fmt::Write;

    use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter, OpKind};

    let mut decoder = Decoder::with_ip(64, code, base, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    formatter.options_mut().set_branch_leading_zeros(false);
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut out = String::new();
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let at = insn.ip() - base;
        let _ = write!(out, "{at:5x}  {line}");
        if matches!(insn.op0_kind(), OpKind::NearBranch64)
            && let Some(name) = symbol(insn.next_ip() - 4)
        {
            let _ = write!(out, "  ; {name}");
        }
        out.push('\n');
    }
    out
}

/// No disassembler for this host.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn disassemble(_code: &[u8], _base: u64, _symbol: impl Fn(u64) -> Option<String>) -> String {
    String::new()
}

impl CompiledTb {
    /// The code as text, from its entry on (constants, which few blocks have, look like instructions), with the thunks and slots it goes to by name.
    #[must_use]
    pub fn listing(&self) -> String {
        let name = |at: u64| {
            let call = self.calls.iter().find(|c| u64::from(c.0) == at).map(|c| c.1.name());
            let slot = self.slots.iter().position(|s| u64::from(s.at) == at);
            call.or_else(|| slot.map(|i| format!("slot {i} to {:#x}", self.slots[i].off)))
        };
        let entry = self.entry as usize;
        let text = disassemble(&self.code[entry..], u64::from(self.entry), name);
        // Padding after a jump that was moved over the epilogue is never reached.
        text.lines().filter(|l| !l.ends_with("int3")).flat_map(|l| [l, "\n"]).collect()
    }
    /// Number of host instructions, cold ones included.
    #[must_use]
    pub fn host_instructions(&self) -> usize {
        self.listing().lines().count()
    }
}
