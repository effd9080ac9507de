//! Disassembly of host code for `-d out_asm` and the goldens.

use crate::compiler::CompiledTb;
use crate::origin::{Origin, Role};

/// A host instruction as text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostInsn {
    /// Where it is, from the start of what was disassembled; of a [`CompiledTb`], from its entry.
    pub at: u32,
    /// Its bytes. Those of calls, jumps to thunks and slots do not have their displacement yet.
    pub bytes: Vec<u8>,
    /// The instruction, with the name of the thunk or slot that it goes to.
    pub text: String,
}

/// Host instructions, one behind the other, that are there for one reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostPiece {
    /// The reason.
    pub role: Role,
    /// Index of the block (0 but in regions), and of the guest instruction in it; means nothing for some roles.
    pub insn: (u16, u16),
    /// The instructions.
    pub code: Vec<HostInsn>,
}

/// Host code as text, one instruction a line; `base` is the address of its first byte, `symbol` names branch targets.
#[must_use]
pub fn disassemble(code: &[u8], base: u64, symbol: impl Fn(u64) -> Option<String>) -> String {
    instructions(code, base, symbol).iter().map(|i| format!("{:5x}  {}\n", i.at, i.text)).collect()
}

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn instructions(code: &[u8], base: u64, symbol: impl Fn(u64) -> Option<String>) -> Vec<HostInsn> {
    use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter, OpKind};

    let mut decoder = Decoder::with_ip(64, code, base, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    formatter.options_mut().set_branch_leading_zeros(false);
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut out = Vec::new();
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let mut text = String::new();
        formatter.format(&insn, &mut text);
        let at = (insn.ip() - base) as usize;
        if matches!(insn.op0_kind(), OpKind::NearBranch64)
            && let Some(name) = symbol(insn.next_ip() - 4)
        {
            text += "  ; ";
            text += &name;
        }
        out.push(HostInsn { at: at as u32, bytes: code[at..at + insn.len()].to_vec(), text });
    }
    out
}

/// No disassembler for this host.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
fn instructions(_code: &[u8], _base: u64, _symbol: impl Fn(u64) -> Option<String>) -> Vec<HostInsn> {
    Vec::new()
}

impl CompiledTb {
    /// The thunk or slot whose displacement is at offset `at`.
    fn target(&self, at: u64) -> Option<String> {
        let call = self.calls.iter().find(|c| u64::from(c.0) == at).map(|c| c.1.name());
        let slot = self.slots.iter().position(|s| u64::from(s.at) == at);
        call.or_else(|| {
            slot.map(|i| format!("slot {i} to {:#x}", i64::from(self.slots[i].page) + i64::from(self.slots[i].off)))
        })
    }

    /// The code as text, from its entry on (constants, which few blocks have, look like instructions), with the thunks and slots it goes to by name.
    #[must_use]
    pub fn listing(&self) -> String {
        let entry = self.entry as usize;
        let text = disassemble(&self.code[entry..], 0, |at| self.target(at + u64::from(self.entry)));
        // Padding after a jump that was moved over the epilogue is never reached.
        text.lines().filter(|l| !l.ends_with("int3")).flat_map(|l| [l, "\n"]).collect()
    }
    /// Number of host instructions, cold ones included.
    #[must_use]
    pub fn host_instructions(&self) -> usize {
        self.listing().lines().count()
    }

    /// The code in the order in which it lies, divided by what it is for; one piece where that was not noted
    /// ([`crate::Compiler::annotate`]).
    #[must_use]
    pub fn pieces(&self) -> Vec<HostPiece> {
        let entry = self.entry;
        let unknown = [Origin { at: entry, role: Role::Between, insn: (0, 0) }];
        let origins = if self.origins.is_empty() { &unknown[..] } else { &self.origins };
        let ends = origins[1..].iter().map(|o| o.at).chain([self.code.len() as u32]);
        let pieces = origins.iter().zip(ends).map(|(o, end)| {
            let bytes = &self.code[o.at as usize..end as usize];
            let mut code = if o.role == Role::Data {
                constants(bytes)
            } else {
                instructions(bytes, (o.at - entry).into(), |at| self.target(at + u64::from(entry)))
            };
            code.retain(|i| i.text != "int3");
            code.iter_mut().for_each(|i| i.at += o.at - entry);
            HostPiece { role: o.role, insn: o.insn, code }
        });
        pieces.filter(|p| !p.code.is_empty()).collect()
    }
}

/// Constants, sixteen bytes a line.
fn constants(bytes: &[u8]) -> Vec<HostInsn> {
    let lines = bytes.chunks(16).enumerate();
    lines.map(|(n, b)| HostInsn { at: n as u32 * 16, bytes: b.to_vec(), text: String::from("(data)") }).collect()
}
