//! The rows of the demo's table, written once for all paging modes: an access that faults and is repaired, and a CR3 switch.

use super::Memory;
use super::asm::Piece;
use super::layout::{FRAMES, var};
use super::tables::{Paging, Tables};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use twofold_arch::paging::{NX, P, PS, RW};

/// What every row writes and reads back, and the function in [`CODE_FRAME`] returns.
const GOOD: u32 = 0x600d_f00d;
/// `MOV CR3` pairs of a switch row.
pub const SWITCHES: u32 = 1000;

/// The frame with a function that returns [`GOOD`].
const CODE_FRAME: u32 = FRAMES;
/// The frames that address spaces A and B map at one linear address.
const FRAME_A: u32 = FRAMES + 0x1000;
const FRAME_B: u32 = FRAMES + 0x2000;
/// The first of the frames that repairs map, each used once.
const FRESH: u32 = FRAMES + 0x3000;

/// Fills the frames.
pub fn put_frames(memory: &mut Memory) -> Result<(), String> {
    // mov eax, GOOD; ret
    memory.put(CODE_FRAME, &[0xb8])?;
    memory.put32(CODE_FRAME + 1, &[GOOD])?;
    memory.put(CODE_FRAME + 5, &[0xc3])?;
    memory.put32(FRAME_A, &[0xaaaa_aaaa])?;
    memory.put32(FRAME_B, &[0xbbbb_bbbb])
}

/// What a row does to its linear address, and why that faults the first time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// A write; the page is not present.
    NotPresent,
    /// A write; the page is read-only and CR0.WP is set.
    ReadOnly,
    /// A call; the page is not executable.
    NoExecute,
    /// A read; a reserved bit is set: bit 62 of a PAE entry, or PS of the root's entry.
    Reserved,
    /// A read; the address is not canonical.
    NonCanonical,
}

/// A row: an access and its fault.
#[derive(Clone, Copy, Debug)]
pub struct FaultRow {
    pub cause: Cause,
    pub linear: u64,
}

impl FaultRow {
    fn error(self) -> u64 {
        match self.cause {
            Cause::NotPresent => 0x02,
            Cause::ReadOnly => 0x03,
            Cause::NoExecute => 0x11,
            Cause::Reserved => 0x09,
            Cause::NonCanonical => 0,
        }
    }

    fn verb(self) -> &'static str {
        match self.cause {
            Cause::NotPresent | Cause::ReadOnly => "write",
            Cause::NoExecute => "call ",
            Cause::Reserved | Cause::NonCanonical => "read ",
        }
    }

    fn story(self) -> &'static str {
        match self.cause {
            Cause::NotPresent => "not present; mapped it:",
            Cause::ReadOnly => "read-only; allowed it:",
            Cause::NoExecute => "NX; allowed it, ran:",
            Cause::Reserved => "reserved bit; cleared:",
            Cause::NonCanonical => "not canonical; skipped",
        }
    }
}

/// A mode's rows, with what they need in memory.
pub struct ModeRows {
    paging: Paging,
    /// As the table's first column says it.
    name: &'static str,
    faults: Vec<(FaultRow, u32, u64)>,
    switch_at: u64,
    /// Roots of address spaces A and B.
    pub roots: [u32; 2],
    /// Where the tables of both begin and end.
    pub tables: [u32; 2],
}

impl ModeRows {
    /// Builds both address spaces, with the pages of `faults` in A and a page of its own in each at `switch_at`.
    pub fn new(
        memory: &mut Memory,
        tables: &mut Tables,
        paging: Paging,
        name: &'static str,
        faults: &[FaultRow],
        switch_at: u64,
    ) -> Result<Self, String> {
        let start = tables.next();
        let a = tables.space(memory, paging)?;
        let b = tables.space(memory, paging)?;
        tables.set(memory, a, paging, switch_at, 12, u64::from(FRAME_A) | P | RW)?;
        tables.set(memory, b, paging, switch_at, 12, u64::from(FRAME_B) | P | RW)?;
        let mut rows = Vec::new();
        for (i, &row) in faults.iter().enumerate() {
            let fresh = u64::from(FRESH + 0x1000 * (4 * paging as u32 + i as u32));
            let code = u64::from(CODE_FRAME);
            // The entry as the access finds it, and as the handler leaves it.
            let (before, after) = match row.cause {
                Cause::NotPresent => (0, fresh | P | RW),
                Cause::ReadOnly => (fresh | P, fresh | P | RW),
                Cause::NoExecute => (code | P | NX, code | P),
                Cause::Reserved if paging == Paging::Pae => (code | P | 1 << 62, code | P),
                Cause::Reserved | Cause::NonCanonical => (0, 0),
            };
            let (at, after) = if row.cause == Cause::NonCanonical {
                (0, 0)
            } else if row.cause == Cause::Reserved && paging != Paging::Pae {
                // A whole path, then PS in the root's entry, where it is reserved.
                tables.set(memory, a, paging, row.linear, 12, code | P)?;
                let shift = if paging == Paging::Five { 48 } else { 39 };
                let good = tables.entry(memory, a, paging, row.linear, shift)?;
                let at = tables.set(memory, a, paging, row.linear, shift, good | PS)?;
                (at, good)
            } else {
                (tables.set(memory, a, paging, row.linear, 12, before)?, after)
            };
            rows.push((row, at, after));
        }
        let ends = [start, tables.next()];
        Ok(ModeRows { paging, name, faults: rows, switch_at, roots: [a, b], tables: ends })
    }

    /// The linear address that both address spaces map to a page of their own.
    pub fn switch_at(&self) -> u64 {
        self.switch_at
    }

    /// Emits all rows; the processor is in this mode, in address space A.
    pub fn emit(&self, p: &mut Piece) -> Result<(), IcedError> {
        let mut name = self.name;
        for &(row, at, after) in &self.faults {
            self.emit_fault(p, name, row, at, after)?;
            name = "";
        }
        self.emit_switch(p)
    }

    /// Digits of a linear address.
    fn digits(&self) -> usize {
        if self.paging.is_64_bit() { 16 } else { 8 }
    }

    fn emit_fault(&self, p: &mut Piece, name: &str, row: FaultRow, at: u32, after: u64) -> Result<(), IcedError> {
        for variable in [var::VECTOR, var::ERROR, var::CR2, var::COUNT, var::VALUE, var::RESUME] {
            p.set(variable, 0)?;
        }
        p.set(var::FIX_AT, at.into())?;
        p.set(var::FIX, after)?;
        self.emit_access(p, row)?;

        let digits = self.digits();
        let access = format!("{} {:0digits$x}", row.verb(), row.linear);
        p.say(&format!("{name:<9}{access:<23}"))?;
        p.when(var::VECTOR, 14, |p| p.say("#PF "))?;
        p.when(var::VECTOR, 13, |p| p.say("#GP "))?;
        p.when(var::VECTOR, 0, |p| p.say("none"))?;
        p.say_hex(var::ERROR, 4)?;
        p.say("  ")?;
        p.when(var::VECTOR, 14, |p| {
            p.say_hex(var::CR2, digits as u32)?;
            p.say(&" ".repeat(18 - digits))
        })?;
        p.when(var::VECTOR, 13, |p| p.say("-                 "))?;
        p.say(row.story())?;
        let vector = if row.cause == Cause::NonCanonical {
            13
        } else {
            p.say(" ")?;
            p.say_hex(var::VALUE, 8)?;
            p.expect(var::CR2, row.linear)?;
            14
        };
        p.expect(var::VECTOR, vector)?;
        p.expect(var::ERROR, row.error())?;
        p.expect(var::COUNT, 1)?;
        p.expect(var::VALUE, if vector == 13 { 0 } else { GOOD.into() })?;
        p.end_row()
    }

    /// The access itself; its result goes to `VALUE`.
    fn emit_access(&self, p: &mut Piece, row: FaultRow) -> Result<(), IcedError> {
        let wide = self.paging.is_64_bit();
        let linear = row.linear;
        let a = &mut p.a;
        let mut resume = a.create_label();
        if row.cause == Cause::NonCanonical {
            a.lea(rax, ptr(resume))?;
            a.mov(dword_ptr(var::RESUME), eax)?;
        }
        if wide {
            a.mov(rbx, linear)?
        } else {
            a.mov(ebx, linear as u32)?
        }
        match row.cause {
            Cause::NotPresent | Cause::ReadOnly if wide => {
                a.mov(dword_ptr(rbx), GOOD)?;
                a.mov(eax, dword_ptr(rbx))?;
            }
            Cause::NotPresent | Cause::ReadOnly => {
                a.mov(dword_ptr(ebx), GOOD)?;
                a.mov(eax, dword_ptr(ebx))?;
            }
            Cause::NoExecute if wide => a.call(rbx)?,
            Cause::NoExecute => a.call(ebx)?,
            // The addresses are odd: from its second byte on the function in the frame is GOOD itself.
            Cause::Reserved | Cause::NonCanonical if wide => a.mov(eax, dword_ptr(rbx))?,
            Cause::Reserved | Cause::NonCanonical => a.mov(eax, dword_ptr(ebx))?,
        }
        a.mov(dword_ptr(var::VALUE), eax)?;
        a.set_label(&mut resume)?;
        a.nop()
    }

    /// Switches between A and B and reads one linear address in each, with nothing invalidated by hand.
    fn emit_switch(&self, p: &mut Piece) -> Result<(), IcedError> {
        let wide = self.paging.is_64_bit();
        let [a_root, b_root] = self.roots;
        p.set(var::CR3_A, a_root.into())?;
        p.set(var::CR3_B, b_root.into())?;
        if wide {
            // PCID 1 and 2, and bit 63: keep what is cached for the PCID.
            p.when(var::PCID, 1, |p| {
                p.a.mov(rax, cr4)?;
                p.a.bts(rax, 17)?;
                p.a.mov(cr4, rax)?;
                p.set(var::CR3_A, u64::from(a_root) | 1 | 1 << 63)?;
                p.set(var::CR3_B, u64::from(b_root) | 2 | 1 << 63)
            })?;
        }
        let a = &mut p.a;
        let mut again = a.create_label();
        a.mov(ecx, SWITCHES)?;
        if wide {
            a.mov(rbx, self.switch_at)?
        } else {
            a.mov(ebx, self.switch_at as u32)?
        }
        a.set_label(&mut again)?;
        for (cr3_of, seen, value) in [(var::CR3_B, var::CR2, 0xbbbb_bbbbu32), (var::CR3_A, var::VALUE, 0xaaaa_aaaa)] {
            let mut right = a.create_label();
            if wide {
                a.mov(rax, qword_ptr(cr3_of))?;
                a.mov(cr3, rax)?;
                a.mov(eax, dword_ptr(rbx))?;
            } else {
                a.mov(eax, dword_ptr(cr3_of))?;
                a.mov(cr3, eax)?;
                a.mov(eax, dword_ptr(ebx))?;
            }
            a.mov(dword_ptr(seen), eax)?;
            a.cmp(eax, value as i32)?;
            a.je(right)?;
            a.mov(dword_ptr(var::ROW_WRONG), 1)?;
            a.set_label(&mut right)?;
            a.nop()?;
        }
        a.dec(ecx)?;
        a.jne(again)?;
        if wide {
            // PCIDs only exist in 64-bit mode; PCID 0 must be current when they go.
            p.when(var::PCID, 1, |p| {
                p.a.mov(eax, a_root)?;
                p.a.mov(cr3, rax)?;
                p.a.mov(rax, cr4)?;
                p.a.btr(rax, 17)?;
                p.a.mov(cr4, rax)
            })?;
        }
        let digits = self.digits();
        let access = format!("CR3   {:0digits$x}", self.switch_at);
        p.say(&format!("{:<9}{access:<23}-         -                 A ", ""))?;
        p.say_hex(var::VALUE, 8)?;
        p.say(", B ")?;
        p.say_hex(var::CR2, 8)?;
        p.say(&format!("; {SWITCHES} times"))?;
        if wide {
            p.when(var::PCID, 1, |p| p.say(", PCID 1/2"))?;
        }
        p.end_row()
    }
}
