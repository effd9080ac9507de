//! Puts a bzImage, its initramfs, command line and boot parameters into guest memory (Linux's x86 boot protocol).
#![allow(unsafe_code)] // plain structures in guest memory

use crate::{Options, because};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use std::io::Cursor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The boot parameters, 4 KiB.
const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// End of conventional memory.
const EBDA: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
/// The kernel has a 64-bit entry point, 0x200 behind the 32-bit one (XLF_KERNEL_64).
const HAS_ENTRY_64: u16 = 1;

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Parameters {
    parameters: boot_params,
}

// SAFETY: the boot parameters are plain numbers, packed, as the protocol lays them out in memory.
unsafe impl ByteValued for Parameters {}

/// The files of a guest.
pub struct Image {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
}

/// Where the processor starts.
pub struct Entry {
    pub rip: u64,
    /// In 64-bit mode with paging, or in 32-bit protected mode without.
    pub long: bool,
    /// For RSI.
    pub parameters: u64,
}

impl Image {
    pub fn read(o: &Options) -> Result<Self, String> {
        let read = |path: &String| std::fs::read(path).map_err(because(path));
        Ok(Self { kernel: read(&o.kernel)?, initrd: o.initrd.as_ref().map_or(Ok(Vec::new()), read)? })
    }

    pub fn load(self, memory: &GuestMemoryMmap<()>, command_line: &str) -> Result<Entry, String> {
        let end = memory.last_addr().0 + 1;
        let high = GuestAddress(HIGH_MEMORY);
        let loaded =
            BzImage::load(memory, Some(high), &mut Cursor::new(self.kernel), Some(high)).map_err(because("kernel"))?;
        let mut hdr = loaded.setup_header.ok_or("kernel: no setup header")?;
        let initrd = (end - self.initrd.len() as u64) & !0xfff;
        if initrd < HIGH_MEMORY + u64::from(hdr.init_size) {
            return Err(format!("{} MiB of memory are too few", end >> 20));
        }
        memory.write_slice(&self.initrd, GuestAddress(initrd)).map_err(because("initrd"))?;
        let text = [command_line.as_bytes(), &[0]].concat();
        memory.write_slice(&text, GuestAddress(COMMAND_LINE)).map_err(because("command line"))?;
        hdr.type_of_loader = 0xff;
        (hdr.ramdisk_image, hdr.ramdisk_size) = (initrd as u32, self.initrd.len() as u32);
        hdr.cmd_line_ptr = COMMAND_LINE as u32;
        let mut p = boot_params { hdr, ..Default::default() };
        let map = [(0, EBDA), (HIGH_MEMORY, end - HIGH_MEMORY)];
        for (to, (addr, size)) in p.e820_table.iter_mut().zip(map) {
            *to = boot_e820_entry { addr, size, r#type: 1 };
        }
        p.e820_entries = map.len() as u8;
        memory.write_obj(Parameters { parameters: p }, GuestAddress(ZERO_PAGE)).map_err(because("boot parameters"))?;
        let long = hdr.xloadflags & HAS_ENTRY_64 != 0;
        let rip = HIGH_MEMORY + if long { 0x200 } else { 0 };
        Ok(Entry { rip, long, parameters: ZERO_PAGE })
    }
}
