//! Multiboot 1: ELF kernels and the a.out kludge, modules, memory map, command lines.
//!
//! Place in the pipeline: one of the loaders (Multiboot Specification version 0.6.96). Modules come from `--initrd FILE[ ARGS][,FILE…]`,
//! a comma in a name is doubled.

use twofold_arch::PhysAddr;

use super::elf::Elf;
use super::error::{BootError, Problem};
use super::image::{slice, u32_at};
use super::{EntryMode, EntryState, Guest, e820, layout, read_side_file};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies within this much of the file.
const SEARCH: u64 = 8192;
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Requirements we meet: page-aligned modules, memory information. Video mode (bit 2) we do not.
const FLAG_VIDEO: u32 = 1 << 2;
const FLAGS_KNOWN: u32 = 0x7;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

const LOADER_NAME: u64 = layout::INFO + 0x80;
const MEMORY_MAP: u64 = layout::INFO + 0x100;
/// Module entries of 16 bytes first, their strings behind.
const MODULE_STRINGS: u64 = layout::MODULES + 0x1000;
const MAX_MODULES: usize = 256;

/// A Multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where it is in the file.
    pub offset: u64,
    /// Its flags.
    pub flags: u32,
}

/// Looks for a header: magic, flags and a sum of zero on a four-byte boundary.
#[must_use]
pub fn find_header(file: &[u8]) -> Option<Header> {
    (0..SEARCH.min(file.len() as u64)).step_by(4).find_map(|offset| {
        let word = |n: u64| u32_at(file, offset + n, "").ok();
        if word(0)? != HEADER_MAGIC {
            return None;
        }
        let (flags, sum) = (word(4)?, word(8)?);
        (HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0).then_some(Header { offset, flags })
    })
}

pub(crate) fn load(guest: &mut Guest<'_>) -> Result<EntryState, BootError> {
    let file = guest.kernel;
    let Some(header) = find_header(file) else {
        return Err(guest.error(Problem::BadField { what: "the Multiboot magic", value: 0 }));
    };
    if header.flags & 0xffff & !FLAGS_KNOWN != 0 {
        let problem = Problem::BadField { what: "the set of Multiboot requirements", value: u64::from(header.flags) };
        return Err(guest.error(problem));
    }
    if header.flags & FLAG_VIDEO != 0 {
        guest.note(String::from("the kernel asks for a video mode; there is no display"));
    }
    let (entry, end) = if header.flags & FLAG_ADDRESSES != 0 {
        load_by_addresses(guest, header)?
    } else {
        let elf = Elf::parse(file).map_err(|p| guest.error(p))?;
        (elf.entry, elf.load(guest)?)
    };
    if entry > u64::from(u32::MAX) {
        return Err(guest.error(Problem::BadField { what: "the entry point", value: entry }));
    }
    let command_line = write_command_line(guest)?;
    let modules = load_modules(guest, end)?;
    write_info(guest, command_line, modules);
    Ok(EntryState {
        rax: u64::from(LOADER_MAGIC),
        rbx: layout::INFO,
        ..EntryState::kernel(EntryMode::Protected32, entry)
    })
}

/// By tradition the command line begins with the kernel's own name.
fn write_command_line(guest: &mut Guest<'_>) -> Result<u64, BootError> {
    let text = format!("{} {}", guest.name, guest.config.append);
    let text = text.trim_end();
    let max = (layout::COMMAND_LINE_END - layout::COMMAND_LINE) as usize - 1;
    if text.len() > max {
        return Err(guest.error(Problem::CommandLineTooLong { len: text.len(), max }));
    }
    guest.map.write(PhysAddr(layout::COMMAND_LINE), text.as_bytes());
    guest.map.write(PhysAddr(layout::COMMAND_LINE + text.len() as u64), &[0]);
    guest.note(format!("command line at {:#x}: {text}", layout::COMMAND_LINE));
    Ok(layout::COMMAND_LINE)
}

/// The a.out kludge: the header says what goes where. Returns entry point and end.
fn load_by_addresses(guest: &mut Guest<'_>, header: Header) -> Result<(u64, u64), BootError> {
    const WHAT: &str = "Multiboot address fields";
    let file = guest.kernel;
    let word = |n: u64| u32_at(file, header.offset + n, WHAT).map(u64::from).map_err(|p| guest.error(p));
    let (header_addr, load, load_end, bss_end, entry) = (word(12)?, word(16)?, word(20)?, word(24)?, word(28)?);
    let bad = |what, value| guest.error(Problem::BadField { what, value });
    // The header's own place in memory tells which byte of the file goes to the load address.
    let before = header_addr.checked_sub(load).ok_or_else(|| bad("the Multiboot load address", load))?;
    let start = header.offset.checked_sub(before).ok_or_else(|| bad("the Multiboot header address", header_addr))?;
    let len = match load_end {
        0 => file.len() as u64 - start,
        end => end.checked_sub(load).ok_or_else(|| bad("the Multiboot load end address", end))?,
    };
    let bytes = slice(file, start, len).ok_or_else(|| {
        guest.error(Problem::Truncated {
            what: "Multiboot image",
            needed: start.saturating_add(len),
            size: file.len() as u64,
        })
    })?;
    let bss = bss_end.saturating_sub(load + len);
    guest.check_room("the kernel", load, len + bss)?;
    guest.map.write(PhysAddr(load), bytes);
    guest.clear(load + len, bss);
    guest.note(format!("kernel: {:#x} bytes at {load:#x}", len + bss));
    Ok((entry, load + len + bss))
}

/// `FILE[ ARGS][,FILE…]`, a doubled comma standing for one.
fn split_modules(text: &str) -> Vec<String> {
    let mut modules = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, modules.last_mut()) {
            (',', _) if rest.peek() != Some(&',') => modules.push(String::new()),
            (c, Some(last)) => {
                if c == ',' {
                    rest.next();
                }
                last.push(c);
            }
            _ => {}
        }
    }
    modules.retain(|m| !m.trim().is_empty());
    modules
}

/// Loads the modules page by page behind the kernel; returns their number.
fn load_modules(guest: &mut Guest<'_>, kernel_end: u64) -> Result<u32, BootError> {
    let Some(text) = &guest.config.initrd else { return Ok(0) };
    let modules = split_modules(text);
    if modules.len() > MAX_MODULES {
        return Err(guest.error(Problem::TooManyModules(modules.len())));
    }
    let mut at = kernel_end.max(1 << 20).next_multiple_of(0x1000);
    let mut string_at = MODULE_STRINGS;
    for (i, module) in modules.iter().enumerate() {
        let path = module.split_once(' ').map_or(module.as_str(), |(path, _)| path);
        let data = read_side_file(path, guest.config.memory)?;
        let len = data.len() as u64;
        if at + len > guest.map.low_ram_end().0 {
            let problem = Problem::NoRoom { what: "a module", addr: at, len, memory: guest.config.memory };
            return Err(BootError::new(path, problem));
        }
        if string_at + module.len() as u64 + 1 > layout::MODULES_END {
            let max = (layout::MODULES_END - MODULE_STRINGS) as usize - 1;
            return Err(BootError::new(path, Problem::CommandLineTooLong { len: module.len(), max }));
        }
        guest.map.write(PhysAddr(at), &data);
        guest.map.write(PhysAddr(string_at), module.as_bytes());
        guest.map.write(PhysAddr(string_at + module.len() as u64), &[0]);
        let entry: Vec<u8> = [at, at + len, string_at, 0].iter().flat_map(|v| (*v as u32).to_le_bytes()).collect();
        guest.map.write(PhysAddr(layout::MODULES + 16 * i as u64), &entry);
        guest.note(format!("module: {len:#x} bytes at {at:#x}: {module}"));
        at = (at + len).next_multiple_of(0x1000);
        string_at += module.len() as u64 + 1;
    }
    Ok(modules.len() as u32)
}

fn write_info(guest: &Guest<'_>, command_line: u64, modules: u32) {
    let memory = guest.config.memory;
    let map = e820::map(memory);
    let map_bytes: Vec<u8> = map.iter().flat_map(|e| 20u32.to_le_bytes().into_iter().chain(e.to_bytes())).collect();
    let upper_kib = (guest.map.low_ram_end().0.saturating_sub(1 << 20) >> 10) as u32;
    let mut flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    if modules > 0 {
        flags |= INFO_MODULES;
    }
    let mut info = [0u32; 22];
    info[0] = flags;
    info[1] = (e820::CONVENTIONAL_END >> 10) as u32;
    info[2] = upper_kib;
    info[4] = command_line as u32;
    info[5] = modules;
    info[6] = layout::MODULES as u32;
    info[11] = map_bytes.len() as u32;
    info[12] = MEMORY_MAP as u32;
    info[16] = LOADER_NAME as u32;
    let bytes: Vec<u8> = info.iter().flat_map(|w| w.to_le_bytes()).collect();
    guest.map.write(PhysAddr(layout::INFO), &bytes);
    guest.map.write(PhysAddr(LOADER_NAME), b"twofold\0");
    guest.map.write(PhysAddr(MEMORY_MAP), &map_bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_lists() {
        assert_eq!(split_modules("a b c,d"), ["a b c", "d"]);
        assert_eq!(split_modules("a,,b,c"), ["a,b", "c"]);
        assert_eq!(split_modules(""), [""; 0]);
        assert_eq!(split_modules(",x,"), ["x"]);
    }

    #[test]
    fn headers_are_aligned_and_summed() {
        let mut file = vec![0u8; 9000];
        let mut put = |at: usize, flags: u32| {
            file[at..at + 4].copy_from_slice(&HEADER_MAGIC.to_le_bytes());
            file[at + 4..at + 8].copy_from_slice(&flags.to_le_bytes());
            let sum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
            file[at + 8..at + 12].copy_from_slice(&sum.to_le_bytes());
        };
        put(8192, 0);
        put(6, 1);
        put(400, 3);
        assert_eq!(find_header(&file), Some(Header { offset: 400, flags: 3 }));
        file[404] ^= 1;
        assert_eq!(find_header(&file), None, "wrong sum, misaligned, or beyond the first 8 KiB");
        assert_eq!(find_header(&HEADER_MAGIC.to_le_bytes()), None);
    }
}
