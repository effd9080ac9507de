//! ELF executables, as far as a loader needs them: loadable segments, entry point, the PVH note.
//!
//! Place in the pipeline: used by the PVH and Multiboot loaders. Both classes, little-endian x86 only.

use super::error::Problem;
use super::image::{slice, u16_at, u32_at, u64_at};
use super::{BootError, Guest};
use twofold_arch::PhysAddr;

const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note type of the 32-bit physical entry point (name "Xen").
const XEN_PHYS32_ENTRY: u32 = 18;
/// Far more than any kernel has; a damaged count must not keep us busy.
const MAX_SEGMENTS: u16 = 256;

/// One program header.
#[derive(Clone, Copy, Debug)]
pub struct ProgramHeader {
    /// Its type.
    pub kind: u32,
    /// Where its bytes are in the file.
    pub offset: u64,
    /// Linear address.
    pub vaddr: u64,
    /// Physical address.
    pub paddr: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub mem_size: u64,
    /// Alignment.
    pub align: u64,
}

/// A parsed file.
#[derive(Clone, Debug)]
pub struct Elf {
    /// ELFCLASS64.
    pub is_64: bool,
    /// Entry point.
    pub entry: u64,
    /// Program headers.
    pub headers: Vec<ProgramHeader>,
}

impl Elf {
    /// Parses the headers.
    ///
    /// # Errors
    /// Not an x86 ELF executable, or a damaged one.
    pub fn parse(file: &[u8]) -> Result<Self, Problem> {
        const WHAT: &str = "ELF header";
        let ident = slice(file, 0, 16).ok_or(Problem::Truncated { what: WHAT, needed: 16, size: file.len() as u64 })?;
        let is_64 = match (ident[4], ident[5]) {
            (1, 1) => false,
            (2, 1) => true,
            (1 | 2, 2) => {
                return Err(Problem::Foreign { looks_like: "a big-endian ELF file", advice: "give a kernel for x86" });
            }
            (class, _) => return Err(Problem::BadField { what: "the ELF class", value: u64::from(class) }),
        };
        let machine = u16_at(file, 18, WHAT)?;
        if machine != MACHINE_386 && machine != MACHINE_X86_64 {
            return Err(Problem::Foreign {
                looks_like: "an ELF file for another processor",
                advice: "give a kernel for x86",
            });
        }
        let (entry, table, size_at) = if is_64 {
            (u64_at(file, 24, WHAT)?, u64_at(file, 32, WHAT)?, 54)
        } else {
            (u64::from(u32_at(file, 24, WHAT)?), u64::from(u32_at(file, 28, WHAT)?), 42)
        };
        let entry_size = u16_at(file, size_at, WHAT)?;
        let count = u16_at(file, size_at + 2, WHAT)?;
        let expected = if is_64 { 56 } else { 32 };
        if count > 0 && entry_size < expected {
            return Err(Problem::BadField { what: "the size of an ELF program header", value: u64::from(entry_size) });
        }
        if count > MAX_SEGMENTS {
            return Err(Problem::BadField { what: "the number of ELF program headers", value: u64::from(count) });
        }
        let headers = (0..u64::from(count))
            .map(|i| program_header(file, table.saturating_add(i * u64::from(entry_size)), is_64))
            .collect::<Result<_, _>>()?;
        Ok(Self { is_64, entry, headers })
    }

    /// The physical entry point of the PVH note, if there is one.
    ///
    /// # Errors
    /// A note segment that lies outside of the file.
    pub fn pvh_entry(&self, file: &[u8]) -> Result<Option<u64>, Problem> {
        for header in self.headers.iter().filter(|h| h.kind == PT_NOTE) {
            let notes = slice(file, header.offset, header.file_size).ok_or(Problem::Truncated {
                what: "ELF notes",
                needed: header.offset.saturating_add(header.file_size),
                size: file.len() as u64,
            })?;
            // Xen's notes are padded to four bytes whatever the segment says, GNU property notes to eight.
            let align = if header.align == 8 { 8 } else { 4 };
            if let Some(entry) = find_note(notes, align).or_else(|| find_note(notes, 4)) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Copies the loadable segments to their physical addresses; returns the end of the highest.
    pub(crate) fn load(&self, guest: &mut Guest<'_>) -> Result<u64, BootError> {
        let mut end = 0;
        for header in self.headers.iter().filter(|h| h.kind == PT_LOAD && h.mem_size != 0) {
            if header.file_size > header.mem_size {
                let problem = Problem::BadField { what: "the file size of an ELF segment", value: header.file_size };
                return Err(guest.error(problem));
            }
            let bytes = slice(guest.kernel, header.offset, header.file_size).ok_or_else(|| {
                guest.error(Problem::Truncated {
                    what: "ELF segment",
                    needed: header.offset.saturating_add(header.file_size),
                    size: guest.kernel.len() as u64,
                })
            })?;
            guest.check_room("an ELF segment", header.paddr, header.mem_size)?;
            guest.map.write(PhysAddr(header.paddr), bytes);
            guest.clear(header.paddr + header.file_size, header.mem_size - header.file_size);
            guest.note(format!("segment: {:#x} bytes at {:#x}", header.mem_size, header.paddr));
            end = end.max(header.paddr + header.mem_size);
        }
        if end == 0 {
            return Err(guest.error(Problem::Foreign {
                looks_like: "an ELF file with nothing to load",
                advice: "give a linked kernel, not an object file",
            }));
        }
        Ok(end)
    }
}

fn program_header(file: &[u8], at: u64, is_64: bool) -> Result<ProgramHeader, Problem> {
    const WHAT: &str = "ELF program headers";
    let word = |n: u64| u32_at(file, at.saturating_add(n), WHAT).map(u64::from);
    let quad = |n: u64| u64_at(file, at.saturating_add(n), WHAT);
    let kind = word(0)? as u32;
    Ok(if is_64 {
        ProgramHeader {
            kind,
            offset: quad(8)?,
            vaddr: quad(16)?,
            paddr: quad(24)?,
            file_size: quad(32)?,
            mem_size: quad(40)?,
            align: quad(48)?,
        }
    } else {
        ProgramHeader {
            kind,
            offset: word(4)?,
            vaddr: word(8)?,
            paddr: word(12)?,
            file_size: word(16)?,
            mem_size: word(20)?,
            align: word(28)?,
        }
    })
}

/// The PVH entry in a run of notes whose names and descriptions are padded to `align`.
fn find_note(notes: &[u8], align: u64) -> Option<u64> {
    const WHAT: &str = "ELF note";
    let mut at = 0u64;
    loop {
        let name_size = u64::from(u32_at(notes, at, WHAT).ok()?);
        let desc_size = u64::from(u32_at(notes, at + 4, WHAT).ok()?);
        let kind = u32_at(notes, at + 8, WHAT).ok()?;
        let name = at + 12;
        let desc = (name + name_size).next_multiple_of(align);
        if kind == XEN_PHYS32_ENTRY && slice(notes, name, name_size) == Some(b"Xen\0") {
            return match desc_size {
                4 => u32_at(notes, desc, WHAT).ok().map(u64::from),
                8 => u64_at(notes, desc, WHAT).ok(),
                _ => None,
            };
        }
        at = (desc + desc_size).next_multiple_of(align);
    }
}
