//! The demo guest's GDT, IDTs and page tables: descriptors as the SDM lays them out, and one mapper for all four modes.

use super::Memory;
use super::layout::{GDT, IDTS, POINTERS, TABLES, selector};
use twofold_arch::paging::{G, P, PS, RW};
use twofold_arch::vmx::ept;

/// A paging mode as its tables see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paging {
    /// 32-bit paging: two levels of 4-byte entries.
    Bits32,
    /// PAE: four PDPTEs, then two levels of 8-byte entries.
    Pae,
    /// 4-level paging.
    Four,
    /// 5-level paging.
    Five,
}

impl Paging {
    /// Lowest linear-address bit that each level's index takes, from the root down.
    fn shifts(self) -> &'static [u32] {
        match self {
            Paging::Bits32 => &[22, 12],
            Paging::Pae => &[30, 21, 12],
            Paging::Four => &[39, 30, 21, 12],
            Paging::Five => &[48, 39, 30, 21, 12],
        }
    }

    fn entry_size(self) -> u32 {
        if self == Paging::Bits32 { 4 } else { 8 }
    }

    fn index(self, linear: u64, shift: u32) -> u32 {
        let bits = if self == Paging::Bits32 { 10 } else { 9 };
        (linear >> shift) as u32 & ((1 << bits) - 1)
    }

    /// Whether pointers are 64 bits wide.
    pub fn is_64_bit(self) -> bool {
        matches!(self, Paging::Four | Paging::Five)
    }
}

/// Allocates and fills page tables.
pub struct Tables {
    next: u32,
}

impl Tables {
    pub fn new() -> Self {
        Tables { next: TABLES }
    }

    /// Where the next table will be.
    pub fn next(&self) -> u32 {
        self.next
    }

    /// EPT that maps the first 2 MiB to themselves, write-back, in 4 KiB pages; where its last table is, with the pages.
    /// Returns the EPTP: four levels, accessed and dirty flags.
    pub fn ept(&mut self, memory: &mut Memory) -> Result<(u64, u32), String> {
        let tables = [self.page(), self.page(), self.page(), self.page()];
        for pair in tables.windows(2) {
            memory.put64(pair[0], &[u64::from(pair[1]) | ept::RWX])?;
        }
        let write_back = ept::memory_type::WB << ept::MEMORY_TYPE_SHIFT;
        for page in 0..512 {
            memory.put64(tables[3] + 8 * page, &[u64::from(page) << 12 | ept::RWX | write_back])?;
        }
        let eptp = u64::from(tables[0]) | ept::Eptp::ACCESSED_DIRTY | 3 << 3 | ept::memory_type::WB;
        Ok((eptp, tables[3]))
    }

    fn page(&mut self) -> u32 {
        let page = self.next;
        self.next += 0x1000;
        page
    }

    /// An address space that maps the first 4 MiB to themselves, with large global pages.
    pub fn space(&mut self, memory: &mut Memory, paging: Paging) -> Result<u32, String> {
        let root = self.page();
        let large = if paging == Paging::Bits32 { 22 } else { 21 };
        for start in (0..1u64 << 22).step_by(1 << large) {
            self.set(memory, root, paging, start, large, start | P | RW | PS | G)?;
        }
        Ok(root)
    }

    /// Sets the entry that maps `linear` at the level whose index starts at bit `shift`; makes the tables above it.
    /// Returns the entry's address.
    pub fn set(
        &mut self,
        memory: &mut Memory,
        root: u32,
        paging: Paging,
        linear: u64,
        shift: u32,
        entry: u64,
    ) -> Result<u32, String> {
        let mut table = root;
        for &level in paging.shifts() {
            let at = table + paging.index(linear, level) * paging.entry_size();
            if level == shift {
                self.write(memory, paging, at, entry)?;
                return Ok(at);
            }
            let found = Self::read(memory, paging, at);
            table = if found & P == 0 {
                let page = self.page();
                // RW and US are reserved in a PDPTE of PAE paging.
                let rights = if paging == Paging::Pae && level == 30 { P } else { P | RW };
                self.write(memory, paging, at, u64::from(page) | rights)?;
                page
            } else {
                found as u32 & !0xfff
            };
        }
        Err(format!("{paging:?} has no level at bit {shift}"))
    }

    /// The entry for `linear` at the level whose index starts at bit `shift`.
    pub fn entry(&self, memory: &Memory, root: u32, paging: Paging, linear: u64, shift: u32) -> Result<u64, String> {
        let mut table = root;
        for &level in paging.shifts() {
            let found = Self::read(memory, paging, table + paging.index(linear, level) * paging.entry_size());
            if level == shift {
                return Ok(found);
            }
            table = found as u32 & !0xfff;
        }
        Err(format!("{paging:?} has no level at bit {shift}"))
    }

    fn write(&self, memory: &mut Memory, paging: Paging, at: u32, entry: u64) -> Result<(), String> {
        if paging == Paging::Bits32 { memory.put32(at, &[entry as u32]) } else { memory.put64(at, &[entry]) }
    }

    fn read(memory: &Memory, paging: Paging, at: u32) -> u64 {
        let start = (at - super::IMAGE_BASE) as usize;
        let size = paging.entry_size() as usize;
        memory.bytes[start..start + size].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }
}

/// Writes the GDT and its pseudo-descriptor.
pub fn put_gdt(memory: &mut Memory) -> Result<(), String> {
    // Access byte: present, DPL 0, code or data, accessed. Flags: granularity, default size 32, long.
    let segment =
        |limit: u64, access: u64, flags: u64| limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52;
    let (code, data) = (0x9b, 0x93);
    memory.put64(GDT + u32::from(selector::CODE32), &[segment(0xf_ffff, code, 0xc)])?;
    memory.put64(GDT + u32::from(selector::DATA), &[segment(0xf_ffff, data, 0xc)])?;
    memory.put64(GDT + u32::from(selector::CODE16), &[segment(0xffff, code, 0)])?;
    memory.put64(GDT + u32::from(selector::DATA16), &[segment(0xffff, data, 0)])?;
    memory.put64(GDT + u32::from(selector::CODE64), &[segment(0, code, 0x2)])?;
    put_pointer(memory, POINTERS, 0x2f, GDT)
}

/// Where the pseudo-descriptor of the `n`th IDT lies; it is ten bytes long, which 64-bit code reads whole.
pub fn idt_pointer(n: u32) -> u32 {
    POINTERS + 0x10 * (n + 1)
}

/// Writes the `n`th IDT: interrupt gates for #GP and #PF, in the format of 32- or 64-bit code.
pub fn put_idt(memory: &mut Memory, n: u32, wide: bool, gp: u32, pf: u32) -> Result<(), String> {
    let base = IDTS + n * 0x1000;
    let code = if wide { selector::CODE64 } else { selector::CODE32 };
    for (vector, handler) in [(13, gp), (14, pf)] {
        let handler = u64::from(handler);
        let gate = handler & 0xffff | u64::from(code) << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
        memory.put64(base + vector * if wide { 16 } else { 8 }, &[gate])?;
    }
    put_pointer(memory, idt_pointer(n), if wide { 0x1ff } else { 0xff }, base)
}

fn put_pointer(memory: &mut Memory, at: u32, limit: u16, base: u32) -> Result<(), String> {
    memory.put(at, &limit.to_le_bytes())?;
    memory.put32(at + 2, &[base, 0])
}
