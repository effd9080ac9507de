//! The PVH boot protocol: an ELF kernel entered in 32-bit protected mode with a start_info structure.
//!
//! Place in the pipeline: one of the loaders. Structures after Xen's public header "hvm/start_info.h".

use twofold_arch::PhysAddr;

use super::elf::Elf;
use super::error::{BootError, Problem};
use super::{EntryMode, EntryState, Guest, e820, layout, read_side_file};

const MAGIC: u32 = 0x336e_c578;
/// Where the memory map goes, behind start_info and the module list.
const MEMORY_MAP: u64 = layout::INFO + 0x100;
const MODULE_LIST: u64 = layout::INFO + 0x80;

pub(crate) fn load(guest: &mut Guest<'_>) -> Result<EntryState, BootError> {
    let file = guest.kernel;
    let elf = Elf::parse(file).map_err(|p| guest.error(p))?;
    let entry = elf.pvh_entry(file).map_err(|p| guest.error(p))?.unwrap_or(elf.entry);
    if entry > u64::from(u32::MAX) {
        return Err(guest.error(Problem::BadField { what: "the PVH entry point", value: entry }));
    }
    let end = elf.load(guest)?;
    let command_line = guest.write_command_line(usize::MAX)?;
    let module = match &guest.config.initrd {
        Some(path) => Some(place_module(guest, path, end)?),
        None => None,
    };
    write_start_info(guest, command_line, module);
    Ok(EntryState { rbx: layout::INFO, ..EntryState::kernel(EntryMode::Protected32, entry) })
}

/// Puts the initial file system at the top of low memory; returns address and size.
fn place_module(guest: &mut Guest<'_>, path: &str, kernel_end: u64) -> Result<(u64, u64), BootError> {
    let data = read_side_file(path, guest.config.memory)?;
    let len = data.len() as u64;
    let top = guest.map.low_ram_end().0;
    let at = top.saturating_sub(len) & !0xfff;
    if at < kernel_end.max(1 << 20) {
        return Err(BootError::new(
            path,
            Problem::NoRoom { what: "the initrd", addr: at, len, memory: guest.config.memory },
        ));
    }
    guest.map.write(PhysAddr(at), &data);
    guest.note(format!("initrd: {len:#x} bytes at {at:#x}"));
    Ok((at, len))
}

fn write_start_info(guest: &Guest<'_>, command_line: u64, module: Option<(u64, u64)>) {
    let map = e820::map(guest.config.memory);
    let mut info = Vec::with_capacity(56);
    info.extend(MAGIC.to_le_bytes());
    info.extend(1u32.to_le_bytes()); // version with a memory map
    info.extend(0u32.to_le_bytes());
    info.extend(u32::from(module.is_some()).to_le_bytes());
    let modules = if module.is_some() { MODULE_LIST } else { 0 };
    for quad in [modules, command_line, guest.rsdp, MEMORY_MAP] {
        info.extend(quad.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    guest.map.write(PhysAddr(layout::INFO), &info);
    if let Some((at, len)) = module {
        let entry: Vec<u8> = [at, len, 0, 0].iter().flat_map(|q| q.to_le_bytes()).collect();
        guest.map.write(PhysAddr(MODULE_LIST), &entry);
    }
    let entries: Vec<u8> = map.iter().flat_map(|e| e.to_bytes().into_iter().chain([0; 4])).collect();
    guest.map.write(PhysAddr(MEMORY_MAP), &entries);
}
