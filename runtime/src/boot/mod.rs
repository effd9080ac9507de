//! Starting a guest: what kind of image it is, where it goes, and the state the first processor begins in.
//!
//! Place in the pipeline: once, before the vCPU loop. [`load`] fills guest memory and returns an [`EntryState`], a plain value;
//! [`EntryState::apply`] makes a processor's registers of it. Invariants: an image is untrusted bytes, so every offset is
//! checked and every refusal is a [`BootError`] of one line; what the loaders put below 1 MiB lies in [`layout`].

pub mod acpi;
pub mod e820;
pub mod elf;
pub mod error;
pub mod firmware;
pub mod image;
pub mod linux;
pub mod multiboot;
pub mod pvh;

use std::borrow::Cow;
use std::path::Path;

use twofold_arch::control::{cr0, cr4, efer};
use twofold_arch::state::Table;
use twofold_arch::{CpuState, PhysAddr, SegReg, Segment};
use twofold_mmu::PhysMap;

pub use error::{BootError, Problem};

use crate::config::Config;
use image::Format;

/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = twofold_mmu::physmap::LOW_RAM_LIMIT;

/// Where the loaders put their own data: one stretch in the upper half of conventional memory, where images linked below
/// 1 MiB rarely lie, and the reserved area under 1 MiB. It stays clear of the last pages of conventional memory, which kernels
/// like to take for their own trampolines.
pub mod layout {
    #![allow(missing_docs)]
    pub const GDT: u64 = 0x500;
    /// Below this there are the tables of real mode and our GDT.
    pub const FIRST_FREE: u64 = 0x1000;
    /// Our data: from here …
    pub const START: u64 = 0x6_8000;
    /// PVH start_info or Multiboot information.
    pub const INFO: u64 = START;
    /// Linux boot_params, one page.
    pub const ZERO_PAGE: u64 = 0x6_9000;
    /// The initial stack, one page, grows down from here.
    pub const STACK_TOP: u64 = 0x6_b000;
    /// PML4, PDPT and four page directories: the identity map of 4 GiB.
    pub const PAGE_TABLES: u64 = 0x6_b000;
    pub const PAGE_TABLES_END: u64 = 0x7_1000;
    /// Module list and their command lines.
    pub const MODULES: u64 = 0x7_1000;
    pub const MODULES_END: u64 = 0x8_0000;
    pub const COMMAND_LINE: u64 = 0x8_0000;
    pub const COMMAND_LINE_END: u64 = 0x9_0000;
    /// … to here.
    pub const END: u64 = COMMAND_LINE_END;
    pub const ACPI: u64 = 0xe_0000;
    pub const ACPI_END: u64 = 0xf_0000;
}

/// The mode a processor starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit mode, identity-mapped by the page tables at [`layout::PAGE_TABLES`].
    Long64,
    /// 32-bit protected mode, flat segments, paging off.
    Protected32,
    /// As after reset: real mode, CS base 0xffff0000.
    Real16,
}

/// The registers of the bootstrap processor at its first instruction. Those not named are as after reset, or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// Mode, and with it segments and control registers.
    pub mode: EntryMode,
    /// First instruction.
    pub rip: u64,
    /// RAX: the Multiboot magic.
    pub rax: u64,
    /// RBX: Multiboot information, PVH start_info.
    pub rbx: u64,
    /// RSI: Linux boot_params.
    pub rsi: u64,
}

/// A guest in memory.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How the bootstrap processor starts.
    pub entry: EntryState,
    /// Whether there is no firmware, so that the platform has to be left as firmware leaves it
    /// (`Platform::enter_virtual_wire_mode`).
    pub without_firmware: bool,
    /// Whether a loader under a PC's firmware is what the guest thinks it comes from (`Platform::leave_as_bios`).
    pub from_bios: bool,
    /// What went where, a line each, for `-d boot`.
    pub report: Vec<String>,
}

/// Loads what `config` names into the memory of `map`, which is zero or may be overwritten. A firmware ROM is not loaded but
/// mapped, with [`firmware::map`], before `map` is shared.
///
/// # Errors
/// [`BootError`], for anything wrong with a file, or with it in so much memory.
pub fn load(config: &Config, map: &PhysMap) -> Result<Loaded, BootError> {
    let (name, file) = match (&config.kernel_image, &config.kernel, &config.firmware) {
        (Some(image), _, _) => (String::from("kernel"), Cow::Borrowed(&image[..])),
        (None, Some(path), _) => (path.display().to_string(), Cow::Owned(image::read_file(path, config.memory)?)),
        (None, None, Some(_)) => {
            return Ok(Loaded {
                entry: EntryState::RESET,
                without_firmware: false,
                from_bios: false,
                report: Vec::new(),
            });
        }
        (None, None, None) => return Err(BootError::new("nothing to run", Problem::NoKernel)),
    };
    let mut report = Vec::new();
    let rsdp = acpi::write_tables(map, config.cpus);
    let mut guest = Guest { config, map, kernel: &file, name: &name, rsdp, report: &mut report };
    let format = image::detect(&file).map_err(|problem| BootError::new(&name, problem))?;
    guest.note(format!("{name}: {format}"));
    let entry = match format {
        Format::BzImage => linux::load(&mut guest)?,
        Format::Multiboot => multiboot::load(&mut guest)?,
        Format::Pvh => pvh::load(&mut guest)?,
    };
    guest.note(format!("entry: {:?} at {:#x}", entry.mode, entry.rip));
    write_gdt(map, entry.mode);
    if entry.mode == EntryMode::Long64 {
        write_identity_map(map);
    }
    let from_bios = format == Format::Multiboot;
    if from_bios {
        write_interrupt_vectors(map);
    }
    Ok(Loaded { entry, without_firmware: true, from_bios, report })
}

/// Real-mode interrupt vectors as a PC's firmware has them ready: all return at once, that of the timer after its EOI. The
/// code is in 16 bytes of the BIOS data area that are for anybody.
fn write_interrupt_vectors(map: &PhysMap) {
    const CODE: u16 = 0x4f0;
    const TIMER: u64 = 8;
    // PUSH AX; MOV AL, 20H; OUT 20H, AL; POP AX; IRET
    const EOI: [u8; 7] = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
    map.write(PhysAddr(u64::from(CODE)), &EOI);
    for vector in 0..256 {
        let offset = if vector == TIMER { CODE } else { CODE + EOI.len() as u16 - 1 };
        map.write(PhysAddr(4 * vector), &u32::from(offset).to_le_bytes());
    }
}

/// What a loader works with.
pub(crate) struct Guest<'a> {
    pub config: &'a Config,
    pub map: &'a PhysMap,
    pub kernel: &'a [u8],
    pub name: &'a str,
    /// Physical address of the ACPI root pointer.
    pub rsdp: u64,
    pub report: &'a mut Vec<String>,
}

impl Guest<'_> {
    pub fn error(&self, problem: Problem) -> BootError {
        BootError::new(self.name, problem)
    }

    pub fn note(&mut self, line: String) {
        self.report.push(line);
    }

    /// Checks that `len` bytes of `what` fit into RAM at `addr` and do not hit our own data.
    pub fn check_room(&self, what: &'static str, addr: u64, len: u64) -> Result<(), BootError> {
        let end = addr.checked_add(len);
        let low = self.map.low_ram_end().0;
        let fits = match end {
            None => false,
            Some(end) if addr >= layout::FIRST_FREE && end <= layout::START.min(low) => true,
            Some(end) if addr >= layout::END && end <= layout_hole_start().min(low) => true,
            Some(end) => {
                (addr >= 1 << 20 && end <= low)
                    || (addr >= twofold_mmu::physmap::HIGH_RAM_BASE && end <= self.map.high_ram_end().0)
            }
        };
        if fits || len == 0 {
            Ok(())
        } else {
            Err(self.error(Problem::NoRoom { what, addr, len, memory: self.config.memory }))
        }
    }

    /// Writes the command line, NUL-terminated, where every boot protocol may have it; returns its address.
    pub fn write_command_line(&mut self, max: usize) -> Result<u64, BootError> {
        let text = self.config.append.as_bytes();
        let max = max.min((layout::COMMAND_LINE_END - layout::COMMAND_LINE) as usize - 1);
        if text.len() > max {
            return Err(self.error(Problem::CommandLineTooLong { len: text.len(), max }));
        }
        if text.contains(&0) {
            return Err(self.error(Problem::CommandLineNul));
        }
        self.map.write(PhysAddr(layout::COMMAND_LINE), text);
        self.map.write(PhysAddr(layout::COMMAND_LINE + text.len() as u64), &[0]);
        self.note(format!("command line at {:#x}: {}", layout::COMMAND_LINE, self.config.append));
        Ok(layout::COMMAND_LINE)
    }

    /// Makes `len` bytes at `addr` zero, without touching (and so committing) memory that is zero already.
    pub fn clear(&self, addr: u64, len: u64) {
        static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];
        let mut chunk = vec![0u8; ZEROES.len()];
        let (mut at, end) = (addr, addr.saturating_add(len));
        while at < end {
            let n = ((end - at) as usize).min(ZEROES.len());
            self.map.read(PhysAddr(at), &mut chunk[..n]);
            if chunk[..n] != ZEROES[..n] {
                self.map.write(PhysAddr(at), &ZEROES[..n]);
            }
            at += n as u64;
        }
    }
}

const fn layout_hole_start() -> u64 {
    // The last KiB of conventional memory is the EBDA by tradition.
    e820::CONVENTIONAL_END
}

/// Reads the file of an option such as `--initrd`.
pub(crate) fn read_side_file(path: &str, memory: u64) -> Result<Vec<u8>, BootError> {
    image::read_file(Path::new(path), memory)
}

const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS of minimal length at 0, so that TR holds something consistent.
const TSS: u64 = 0x0000_8b00_0000_0067;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const fn gdt(mode: EntryMode) -> [u64; 6] {
    let code = match mode {
        EntryMode::Long64 => CODE64,
        _ => CODE32,
    };
    [0, 0, code, DATA, TSS, 0]
}

fn write_gdt(map: &PhysMap, mode: EntryMode) {
    let bytes: Vec<u8> = gdt(mode).iter().flat_map(|d| d.to_le_bytes()).collect();
    map.write(PhysAddr(layout::GDT), &bytes);
}

/// 4 GiB mapped to themselves with 2 MiB pages.
fn write_identity_map(map: &PhysMap) {
    const PRESENT_WRITABLE: u64 = 0x3;
    const ACCESSED_DIRTY_LARGE: u64 = 0xe0;
    let mut tables = vec![0u64; ((layout::PAGE_TABLES_END - layout::PAGE_TABLES) / 8) as usize];
    let pdpt = layout::PAGE_TABLES + 0x1000;
    tables[0] = pdpt | PRESENT_WRITABLE;
    for i in 0..4 {
        tables[512 + i] = (pdpt + 0x1000 * (i as u64 + 1)) | PRESENT_WRITABLE;
    }
    for (i, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (i as u64) << 21 | ACCESSED_DIRTY_LARGE | PRESENT_WRITABLE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    map.write(PhysAddr(layout::PAGE_TABLES), &bytes);
}

impl EntryState {
    /// The state after a reset: firmware's first instruction at 0xfffffff0.
    pub const RESET: Self = Self { mode: EntryMode::Real16, rip: 0xfff0, rax: 0, rbx: 0, rsi: 0 };

    /// A processor that starts a kernel.
    #[must_use]
    pub const fn kernel(mode: EntryMode, rip: u64) -> Self {
        Self { mode, rip, rax: 0, rbx: 0, rsi: 0 }
    }

    /// Puts a processor that has its reset values into this state: mode, segments, descriptor tables, control registers and
    /// the named registers. RDX keeps what reset gave it in real mode (the processor's signature), else it is 0.
    pub fn apply(&self, state: &mut CpuState) {
        let rdx = state.gpr[2];
        state.gpr = [0; 16];
        state.gpr[0] = self.rax;
        state.gpr[3] = self.rbx;
        state.gpr[6] = self.rsi;
        state.rip = self.rip;
        state.cpl = 0;
        state.halted = 0;
        state.set_rflags(0);
        if self.mode == EntryMode::Real16 {
            state.gpr[2] = rdx;
            self.apply_real(state);
        } else {
            state.gpr[4] = layout::STACK_TOP;
            self.apply_protected(state);
        }
    }

    fn apply_real(self, state: &mut CpuState) {
        for seg in [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            state.seg[seg as usize] = Segment::real_mode(0, false);
        }
        state.seg[SegReg::Cs as usize] = Segment { base: 0xffff_0000, ..Segment::real_mode(0xf000, true) };
        state.seg[SegReg::Ldtr as usize] = Segment { limit: 0xffff, attr: 0x82, ..Segment::default() };
        state.seg[SegReg::Tr as usize] = Segment { limit: 0xffff, attr: 0x8b, ..Segment::default() };
        state.gdtr = Table { base: 0, limit: 0xffff };
        state.idtr = Table { base: 0, limit: 0xffff };
        state.cr0 = cr0::CD | cr0::NW | cr0::ET;
        state.cr3 = 0;
        state.cr4 = 0;
        state.efer = 0;
    }

    fn apply_protected(self, state: &mut CpuState) {
        let descriptors = gdt(self.mode);
        let load = |selector: u16| Segment::from_descriptor(selector, descriptors[usize::from(selector >> 3)]);
        for seg in [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            state.seg[seg as usize] = load(DATA_SELECTOR);
        }
        state.seg[SegReg::Cs as usize] = load(CODE_SELECTOR);
        state.seg[SegReg::Tr as usize] = load(TSS_SELECTOR);
        state.seg[SegReg::Ldtr as usize] =
            Segment { attr: twofold_arch::segment::attr::UNUSABLE, ..Segment::default() };
        state.gdtr = Table { base: layout::GDT, limit: descriptors.len() as u64 * 8 - 1 };
        state.idtr = Table { base: 0, limit: 0 };
        state.cr0 = cr0::PE | cr0::ET;
        state.cr3 = 0;
        state.cr4 = 0;
        state.efer = 0;
        if self.mode == EntryMode::Long64 {
            state.cr0 |= cr0::PG;
            state.cr3 = layout::PAGE_TABLES;
            state.cr4 = cr4::PAE;
            state.efer = efer::LME | efer::LMA;
        }
    }
}

#[cfg(test)]
mod tests;
