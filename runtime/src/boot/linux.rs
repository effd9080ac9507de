//! The Linux boot protocol: bzImage kernels, entered in 64-bit mode where they can, else in 32-bit mode.
//!
//! Place in the pipeline: one of the loaders (Linux documentation, "The Linux/x86 Boot Protocol"). The kernel's real-mode part is not
//! run: its setup header goes into boot_params, which we fill in ourselves.

use twofold_arch::PhysAddr;

use super::error::{BootError, Problem};
use super::image::{slice, u8_at, u16_at, u32_at, u64_at};
use super::{EntryMode, EntryState, Guest, e820, layout, read_side_file};

/// Setup header fields, by offset in the file and in boot_params.
mod field {
    pub const SETUP_SECTS: u64 = 0x1f1;
    pub const SYS_SIZE: u64 = 0x1f4;
    pub const VID_MODE: u64 = 0x1fa;
    pub const JUMP: u64 = 0x201;
    pub const VERSION: u64 = 0x206;
    pub const TYPE_OF_LOADER: u64 = 0x210;
    pub const LOAD_FLAGS: u64 = 0x211;
    pub const CODE32_START: u64 = 0x214;
    pub const RAMDISK_IMAGE: u64 = 0x218;
    pub const RAMDISK_SIZE: u64 = 0x21c;
    pub const HEAP_END: u64 = 0x224;
    pub const CMD_LINE_PTR: u64 = 0x228;
    pub const INITRD_ADDR_MAX: u64 = 0x22c;
    pub const KERNEL_ALIGNMENT: u64 = 0x230;
    pub const RELOCATABLE: u64 = 0x234;
    pub const XLOAD_FLAGS: u64 = 0x236;
    pub const CMDLINE_SIZE: u64 = 0x238;
    pub const PREF_ADDRESS: u64 = 0x258;
    pub const INIT_SIZE: u64 = 0x260;
}
/// Other boot_params fields.
mod param {
    pub const EXT_MEM_K: usize = 0x002;
    pub const ACPI_RSDP: usize = 0x070;
    pub const ALT_MEM_K: usize = 0x1e0;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
}

const LOADED_HIGH: u8 = 1 << 0;
const CAN_USE_HEAP: u8 = 1 << 7;
const XLF_KERNEL_64: u16 = 1 << 0;
const SETUP_HEADER: u64 = 0x1f1;

/// What the setup header says, with the defaults of protocols that did not have a field yet.
#[derive(Clone, Copy, Debug)]
struct Setup {
    version: u16,
    /// Where the protected-mode kernel begins in the file.
    kernel_at: u64,
    /// Its size by the header, in bytes; 16 too many at most.
    kernel_size: u64,
    load_flags: u8,
    code32_start: u64,
    initrd_max: u64,
    alignment: u64,
    relocatable: bool,
    has_64bit_entry: bool,
    command_line_max: usize,
    pref_address: u64,
    init_size: u64,
    /// End of the header in the file.
    header_end: u64,
}

impl Setup {
    fn parse(file: &[u8]) -> Result<Self, Problem> {
        const WHAT: &str = "Linux setup header";
        let byte = |at| u8_at(file, at, WHAT);
        let word = |at| u32_at(file, at, WHAT);
        let version = u16_at(file, field::VERSION, WHAT)?;
        let since = |v: u16| version >= v;
        let sectors = match byte(field::SETUP_SECTS)? {
            0 => 4,
            n => u64::from(n),
        };
        let load_flags = if since(0x200) { byte(field::LOAD_FLAGS)? } else { 0 };
        let xload = if since(0x20c) { u16_at(file, field::XLOAD_FLAGS, WHAT)? } else { 0 };
        // Before 2.04 the size had 16 bits.
        let paragraphs =
            if since(0x204) { word(field::SYS_SIZE)? } else { u32::from(u16_at(file, field::SYS_SIZE, WHAT)?) };
        Ok(Self {
            version,
            kernel_at: (sectors + 1) * 512,
            kernel_size: u64::from(paragraphs) * 16,
            load_flags,
            code32_start: u64::from(word(field::CODE32_START)?),
            initrd_max: if since(0x203) { u64::from(word(field::INITRD_ADDR_MAX)?) } else { 0x37ff_ffff },
            alignment: if since(0x205) { u64::from(word(field::KERNEL_ALIGNMENT)?) } else { 0 },
            relocatable: since(0x205) && byte(field::RELOCATABLE)? != 0,
            has_64bit_entry: xload & XLF_KERNEL_64 != 0,
            command_line_max: if since(0x206) { word(field::CMDLINE_SIZE)? as usize } else { 255 },
            pref_address: if since(0x20a) { u64_at(file, field::PREF_ADDRESS, WHAT)? } else { 0x10_0000 },
            init_size: if since(0x20a) { u64::from(word(field::INIT_SIZE)?) } else { 0 },
            header_end: 0x202 + u64::from(byte(field::JUMP)?),
        })
    }
}

pub(crate) fn load(guest: &mut Guest<'_>) -> Result<EntryState, BootError> {
    let file = guest.kernel;
    let setup = Setup::parse(file).map_err(|p| guest.error(p))?;
    if setup.version < 0x202 || setup.load_flags & LOADED_HIGH == 0 {
        return Err(guest.error(Problem::Foreign {
            looks_like: "a Linux kernel older than boot protocol 2.02, or a zImage",
            advice: "give a bzImage of Linux 2.4 or later",
        }));
    }
    // The size is in paragraphs, so the file may end up to 15 bytes earlier; signatures make it longer.
    let size = file.len() as u64;
    let needed = setup.kernel_at + setup.kernel_size;
    if size + 15 < needed || size <= setup.kernel_at {
        return Err(guest.error(Problem::Truncated { what: "kernel", needed: needed.max(setup.kernel_at + 1), size }));
    }
    let kernel = slice(file, setup.kernel_at, size - setup.kernel_at).unwrap_or_default();
    let room = setup.init_size.max(kernel.len() as u64);
    let at = load_address(guest, &setup, room)?;
    guest.map.write(PhysAddr(at), kernel);
    guest.note(format!(
        "Linux boot protocol {}.{:02}: kernel of {:#x} bytes at {at:#x}, {room:#x} with what it unpacks",
        setup.version >> 8,
        setup.version & 0xff,
        kernel.len()
    ));
    let command_line = guest.write_command_line(setup.command_line_max)?;
    let initrd = place_initrd(guest, &setup, at + room)?;
    write_boot_params(guest, &setup, at, command_line, initrd)?;
    let entry = if setup.has_64bit_entry {
        EntryState::kernel(EntryMode::Long64, at + 0x200)
    } else {
        EntryState::kernel(EntryMode::Protected32, at)
    };
    Ok(EntryState { rsi: layout::ZERO_PAGE, ..entry })
}

/// Where the protected-mode kernel goes: where it prefers, or, when that does not fit, as low as it may.
fn load_address(guest: &Guest<'_>, setup: &Setup, room: u64) -> Result<u64, BootError> {
    const KERNEL: &str = "the kernel";
    if !setup.relocatable {
        let at = if setup.version >= 0x20a { setup.pref_address } else { setup.code32_start };
        return guest.check_room(KERNEL, at, room).map(|()| at);
    }
    let preferred = setup.pref_address;
    if (1 << 20..1 << 32).contains(&preferred) && guest.check_room(KERNEL, preferred, room).is_ok() {
        return Ok(preferred);
    }
    let alignment = setup.alignment.max(1);
    if !alignment.is_power_of_two() || alignment > 1 << 30 {
        return Err(guest.error(Problem::BadField { what: "the kernel's alignment", value: setup.alignment }));
    }
    let lowest = (1u64 << 20).next_multiple_of(alignment);
    guest.check_room(KERNEL, lowest, room).map(|()| lowest)
}

/// Puts the initial RAM disk as high as the kernel lets us; returns address and size.
fn place_initrd(guest: &mut Guest<'_>, setup: &Setup, kernel_end: u64) -> Result<Option<(u64, u64)>, BootError> {
    let Some(path) = &guest.config.initrd else { return Ok(None) };
    let data = read_side_file(path, guest.config.memory)?;
    let len = data.len() as u64;
    let top = guest.map.low_ram_end().0.min(setup.initrd_max.saturating_add(1));
    let at = top.saturating_sub(len) & !0xfff;
    if at < kernel_end || at + len > top {
        let problem = Problem::NoRoom { what: "the initrd", addr: at, len, memory: guest.config.memory };
        return Err(BootError::new(path, problem));
    }
    guest.map.write(PhysAddr(at), &data);
    guest.note(format!("initrd: {len:#x} bytes at {at:#x}"));
    Ok(Some((at, len)))
}

fn write_boot_params(
    guest: &Guest<'_>,
    setup: &Setup,
    kernel: u64,
    command_line: u64,
    initrd: Option<(u64, u64)>,
) -> Result<(), BootError> {
    let mut page = [0u8; 4096];
    let header = slice(guest.kernel, SETUP_HEADER, setup.header_end - SETUP_HEADER).ok_or_else(|| {
        let size = guest.kernel.len() as u64;
        guest.error(Problem::Truncated { what: "Linux setup header", needed: setup.header_end, size })
    })?;
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(SETUP_HEADER as usize, header);
    put(field::TYPE_OF_LOADER as usize, &[0xff]);
    put(field::LOAD_FLAGS as usize, &[setup.load_flags | CAN_USE_HEAP]);
    put(field::VID_MODE as usize, &0xffffu16.to_le_bytes());
    put(field::HEAP_END as usize, &0xfe00u16.to_le_bytes());
    put(field::CODE32_START as usize, &(kernel as u32).to_le_bytes());
    put(field::CMD_LINE_PTR as usize, &(command_line as u32).to_le_bytes());
    let (initrd_at, initrd_len) = initrd.unwrap_or((0, 0));
    put(field::RAMDISK_IMAGE as usize, &(initrd_at as u32).to_le_bytes());
    put(field::RAMDISK_SIZE as usize, &(initrd_len as u32).to_le_bytes());
    let above_1m = guest.map.low_ram_end().0.saturating_sub(1 << 20) >> 10;
    put(param::EXT_MEM_K, &(above_1m.min(0xffff) as u16).to_le_bytes());
    put(param::ALT_MEM_K, &(above_1m as u32).to_le_bytes());
    put(param::ACPI_RSDP, &guest.rsdp.to_le_bytes());
    let map = e820::map(guest.config.memory);
    put(param::E820_ENTRIES, &[map.len() as u8]);
    for (i, entry) in map.iter().enumerate() {
        put(param::E820_TABLE + 20 * i, &entry.to_bytes());
    }
    guest.map.write(PhysAddr(layout::ZERO_PAGE), &page);
    Ok(())
}
