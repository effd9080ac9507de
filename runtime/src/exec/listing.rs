//! `-d out_asm`: guest instructions, their IR and the host code made of them, interleaved, for a person to read.
//!
//! Place in the pipeline: on the compile thread, after the code is made and only if it is asked for. The host code is shown in the
//! order in which it lies. An instruction's IR stands before the first of its code; instructions without any are shown where
//! they would be. What is marked `~` has no origin: the compiler's moves and spills, and what its optimiser made anew.

use std::collections::HashSet;
use std::fmt::Write;

use twofold_arch::TbFlags;
use twofold_backend::{CompiledTb, HostPiece, Role};
use twofold_ir::{Block, Op};

use super::compile::Piece;

/// A block of a region, and an instruction in it.
type Insn = (u16, u16);

struct Listing<'a> {
    root: &'a Piece,
    /// The other blocks of a region.
    others: Option<&'a [Piece]>,
    flags: TbFlags,
    blocks: &'a [Block],
    /// Instructions with host code of their own, and those that have been shown.
    coded: HashSet<Insn>,
    shown: HashSet<Insn>,
    /// What the code that was shown last is.
    last: Option<(Role, Insn)>,
    out: String,
}

/// The text: `blocks` are what was compiled of the root and, in a region, the others.
pub fn listing(
    root: &Piece,
    others: Option<&[Piece]>,
    flags: TbFlags,
    blocks: &[Block],
    compiled: &CompiledTb,
) -> String {
    let pieces = compiled.pieces();
    let coded = pieces.iter().filter(|p| own(p.role)).map(|p| p.insn).collect();
    let mut l = Listing { root, others, flags, blocks, coded, shown: HashSet::new(), last: None, out: String::new() };
    l.summary(&pieces);
    for piece in &pieces {
        l.piece(piece);
    }
    for at in l.instructions() {
        l.guest_insn(at);
    }
    l.out
}

/// Whether code of this kind stands where its guest instruction does.
fn own(role: Role) -> bool {
    matches!(role, Role::Body | Role::Access)
}

/// Adds a line. Writing to a string does not fail.
macro_rules! line {
    ($self:ident, $($text:tt)*) => {{ let _ = writeln!($self.out, $($text)*); }};
}

impl Listing<'_> {
    /// How much of everything there is.
    fn summary(&mut self, pieces: &[HostPiece]) {
        let insns: usize = self.blocks.iter().map(|b| b.insns.len()).sum();
        let ops = self.blocks.iter().flat_map(|b| &b.ops).filter(|op| **op != Op::Nop).count();
        let host: usize = pieces.iter().map(|p| p.code.len()).sum();
        let bytes: usize = pieces.iter().flat_map(|p| &p.code).map(|i| i.bytes.len()).sum();
        let tier = if self.others.is_none() { "quick tier" } else { "region" };
        let blocks = if self.blocks.len() == 1 { String::new() } else { format!("{} blocks, ", self.blocks.len()) };
        line!(
            self,
            "{tier}: {blocks}{insns} guest instructions, {ops} IR ops, {host} host instructions in {bytes} bytes"
        );
        let roles =
            [Role::Entry, Role::Body, Role::Access, Role::Exit, Role::Budget, Role::Slow, Role::Shared, Role::Between];
        let mut counts = Vec::new();
        for role in roles {
            let n: usize = pieces.iter().filter(|p| p.role == role).map(|p| p.code.len()).sum();
            if n != 0 {
                counts.push(format!("{} {n}", role.name()));
            }
        }
        line!(self, "host instructions by purpose: {}", counts.join(", "));
    }

    fn instructions(&self) -> Vec<Insn> {
        let blocks = self.blocks.iter().enumerate();
        blocks.flat_map(|(b, block)| (0..block.insns.len()).map(move |i| (b as u16, i as u16))).collect()
    }

    fn piece(&mut self, piece: &HostPiece) {
        // In the middle of whatever it is.
        if piece.role != Role::Between {
            let last = self.last.replace((piece.role, piece.insn));
            if last != self.last {
                self.heading(piece, last);
            }
        }
        for i in &piece.code {
            let hex: String = i.bytes.iter().map(|b| format!("{b:02x}")).collect();
            let mark = if piece.role == Role::Between { '~' } else { ' ' };
            line!(self, "   {mark}{:5x}  {hex:<22}  {}", i.at, i.text);
        }
    }

    /// What the code that follows is, after what was shown `last`.
    fn heading(&mut self, piece: &HostPiece, last: Option<(Role, Insn)>) {
        let ((block, insn), name) = (piece.insn, piece.role.name());
        match piece.role {
            role if own(role) => {
                // Those before that became nothing.
                for before in (0..insn).map(|i| (block, i)) {
                    if !self.coded.contains(&before) {
                        self.guest_insn(before);
                    }
                }
                let again = !self.guest_insn(piece.insn);
                if again && last.is_none_or(|l| !own(l.0) || l.1 != piece.insn) {
                    let more = self.short_name(piece.insn);
                    line!(self, "  -- {name}, more of {more}");
                } else if again || role == Role::Access {
                    line!(self, "  -- {name}");
                }
            }
            role @ (Role::Slow | Role::Exit) => {
                if role == Role::Exit {
                    self.guest_insn(piece.insn);
                }
                let of = self.short_name(piece.insn);
                line!(self, "  -- {name} of {of}");
            }
            _ => line!(self, "  -- {name}"),
        }
    }

    /// A guest instruction and its IR, once; whether that was now.
    fn guest_insn(&mut self, at: Insn) -> bool {
        let Some(block) = self.blocks.get(usize::from(at.0)) else { return false };
        if !self.shown.insert(at) {
            return false;
        }
        let text = self.guest_line(at);
        line!(self, "{text}");
        let i = usize::from(at.1);
        let ops = match (block.insns.get(i), block.insns.get(i + 1)) {
            (Some(x), Some(next)) => usize::from(x.first)..usize::from(next.first),
            (Some(x), None) => usize::from(x.first)..block.ops.len(),
            _ => 0..0,
        };
        for n in ops.filter(|&n| block.ops.get(n) != Some(&Op::Nop)) {
            line!(self, "  | {}", block.line(n));
        }
        if i + 1 == block.insns.len()
            && let Some(end) = &block.end
        {
            line!(self, "  | end {end}");
        }
        true
    }

    /// The instruction's address, bytes and text.
    fn guest_line(&self, at: Insn) -> String {
        let insn = self.blocks.get(usize::from(at.0)).and_then(|b| b.insns.get(usize::from(at.1)));
        let Some(insn) = insn else { return String::from("?") };
        let (place, len) = (insn.place(), usize::from(insn.len));
        let pieces = std::iter::once(self.root).chain(self.others.unwrap_or_default());
        let bytes = pieces.filter_map(|p| p.guest_bytes(place, len)).next().unwrap_or_default();
        let text = twofold_frontend::disassemble(self.flags, self.root.rip_of(place), bytes);
        text.lines().next().unwrap_or("?").to_owned()
    }

    /// The same in short.
    fn short_name(&self, at: Insn) -> String {
        let line = self.guest_line(at);
        let (address, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let text = rest.trim_start().split_once(' ').map_or(rest, |x| x.1).trim_start();
        format!("{address} {text}")
    }
}
