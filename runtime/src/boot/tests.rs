//! Images made by hand, whole and damaged, through the front door.

use super::*;
use std::path::PathBuf;
use std::sync::Arc;
use twofold_arch::segment::attr;
use twofold_mmu::{GuestRam, LegacyHole};

const MEMORY: u64 = 64 << 20;

fn memory_map(memory: u64) -> PhysMap {
    PhysMap::new(Arc::new(GuestRam::new(memory).unwrap()), LegacyHole::Unmapped)
}
fn read(map: &PhysMap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    map.read(PhysAddr(at), &mut bytes);
    bytes
}
fn word(map: &PhysMap, at: u64) -> u32 {
    u32::from_le_bytes(read(map, at, 4).try_into().unwrap())
}
fn quad(map: &PhysMap, at: u64) -> u64 {
    u64::from_le_bytes(read(map, at, 8).try_into().unwrap())
}

/// A file that goes away with the test.
struct TempFile(PathBuf);
impl TempFile {
    fn new(contents: &[u8]) -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("twofold-boot-test-{}-{n}", std::process::id()));
        std::fs::write(&path, contents).unwrap();
        Self(path)
    }
    fn name(&self) -> String {
        self.0.display().to_string()
    }
}
impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn config(kernel: &TempFile) -> Config {
    Config { kernel: Some(kernel.0.clone()), memory: MEMORY, append: "console=ttyS0 quiet".into(), ..Config::default() }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of protocol 2.15: four setup sectors and a kernel of `0xc0de` words.
fn bzimage() -> Vec<u8> {
    let kernel: Vec<u8> = (0..0x2000u32).flat_map(|i| (0xc0de_0000 | i).to_le_bytes()).collect();
    let mut file = vec![0u8; 5 * 512];
    put(&mut file, 0x1f1, &[4]);
    put(&mut file, 0x1f4, &(kernel.len() as u32 / 16).to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut file, 0x234, &[1]);
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut file, 0x260, &0x20_0000u32.to_le_bytes());
    file.extend(kernel);
    file
}

/// An ELF with one segment at 2 MiB and, when asked for, a PVH note.
fn elf(is_64: bool, note: bool) -> Vec<u8> {
    let (ehsize, phsize) = if is_64 { (64, 56) } else { (52, 32) };
    let mut file = vec![0u8; 0x1000];
    put(&mut file, 0, &[0x7f, b'E', b'L', b'F', 1 + u8::from(is_64), 1, 1]);
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &(if is_64 { 62u16 } else { 3 }).to_le_bytes());
    let headers = [(1u32, 0x800u64, 0x20_0000u64, 0x400u64, 0x2000u64), (4, 0x400, 0, 20, 20)];
    let counts = [phsize as u16, if note { 2 } else { 1 }];
    if is_64 {
        put(&mut file, 24, &0x20_0010u64.to_le_bytes());
        put(&mut file, 32, &(ehsize as u64).to_le_bytes());
        put(&mut file, 54, &counts[0].to_le_bytes());
        put(&mut file, 56, &counts[1].to_le_bytes());
    } else {
        put(&mut file, 24, &0x20_0010u32.to_le_bytes());
        put(&mut file, 28, &(ehsize as u32).to_le_bytes());
        put(&mut file, 42, &counts[0].to_le_bytes());
        put(&mut file, 44, &counts[1].to_le_bytes());
    }
    for (i, (kind, offset, addr, file_size, mem_size)) in headers.into_iter().enumerate() {
        let at = ehsize + i * phsize;
        put(&mut file, at, &kind.to_le_bytes());
        if is_64 {
            for (n, v) in
                [(8, offset), (16, addr | 0xffff_ffff_8000_0000), (24, addr), (32, file_size), (40, mem_size), (48, 4)]
            {
                put(&mut file, at + n, &v.to_le_bytes());
            }
        } else {
            for (n, v) in [(4, offset), (8, addr), (12, addr), (16, file_size), (20, mem_size), (28, 4)] {
                put(&mut file, at + n, &(v as u32).to_le_bytes());
            }
        }
    }
    for (n, v) in [(0, 4u32), (4, 4), (8, 18)] {
        put(&mut file, 0x400 + n, &v.to_le_bytes());
    }
    put(&mut file, 0x40c, b"Xen\0");
    put(&mut file, 0x410, &0x20_0040u32.to_le_bytes());
    (0..0x400).for_each(|i| file[0x800 + i] = i as u8 | 1);
    file
}

fn multiboot_header(file: &mut [u8], at: usize, flags: u32, addresses: &[u32]) {
    let magic = 0x1bad_b002u32;
    put(file, at, &magic.to_le_bytes());
    put(file, at + 4, &flags.to_le_bytes());
    put(file, at + 8, &0u32.wrapping_sub(magic).wrapping_sub(flags).to_le_bytes());
    addresses.iter().enumerate().for_each(|(i, a)| put(file, at + 12 + 4 * i, &a.to_le_bytes()));
}

fn multiboot_aout() -> Vec<u8> {
    let mut file = vec![0x90u8; 0x3000];
    // The header is at 0x1040 of the file and 0x100040 in memory; bytes from 0x1000 on are loaded.
    multiboot_header(&mut file, 0x1040, 1 << 16 | 3, &[0x10_0040, 0x10_0000, 0x10_1800, 0x10_4000, 0x10_0080]);
    file
}

#[test]
fn a_64_bit_linux_kernel() {
    let (kernel, initrd) = (TempFile::new(&bzimage()), TempFile::new(&[7u8; 5000]));
    let map = memory_map(MEMORY);
    let loaded = load(&Config { initrd: Some(initrd.name()), ..config(&kernel) }, &map).unwrap();
    assert_eq!(
        loaded.entry,
        EntryState { rsi: layout::ZERO_PAGE, ..EntryState::kernel(EntryMode::Long64, 0x100_0200) }
    );
    assert!(loaded.without_firmware && loaded.report.len() >= 4, "{:?}", loaded.report);
    assert_eq!(word(&map, 0x100_0000), 0xc0de_0000);
    assert_eq!(word(&map, 0x100_7ffc), 0xc0de_1fff);
    let zero_page = layout::ZERO_PAGE;
    assert_eq!(read(&map, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(read(&map, zero_page + 0x210, 2), [0xff, 0x81]);
    let command_line = u64::from(word(&map, zero_page + 0x228));
    assert_eq!(read(&map, command_line, 20), b"console=ttyS0 quiet\0");
    let (at, len) = (word(&map, zero_page + 0x218), word(&map, zero_page + 0x21c));
    assert_eq!((u64::from(at), len), (MEMORY - 0x2000, 5000));
    assert_eq!(read(&map, u64::from(at) + 4999, 2), [7, 0]);
    assert_eq!(quad(&map, zero_page + 0x70), layout::ACPI);
    let entries = read(&map, zero_page + 0x1e8, 1)[0];
    assert_eq!(usize::from(entries), e820::map(MEMORY).len());
    assert_eq!(quad(&map, zero_page + 0x2d0 + 8), e820::CONVENTIONAL_END);
    // The identity map reaches its last page.
    let pd = quad(&map, (quad(&map, quad(&map, layout::PAGE_TABLES) & !0xfff) + 24) & !0xfff | 0xff8);
    assert_eq!(quad(&map, layout::PAGE_TABLES_END - 8), 0xffe0_00e3, "{pd:#x}");
}

#[test]
fn entry_states_are_what_the_protocols_want() {
    let mut state = CpuState::zeroed();
    state.gpr[2] = 0x1234;
    EntryState { rsi: 0x7000, ..EntryState::kernel(EntryMode::Long64, 0x100_0200) }.apply(&mut state);
    assert_eq!((state.rip, state.gpr[6], state.gpr[2], state.rflags()), (0x100_0200, 0x7000, 0, 2));
    let cs = state.seg[SegReg::Cs as usize];
    assert!(cs.has(attr::L | attr::P | attr::CODE | attr::S) && !cs.has(attr::DB));
    assert_eq!(
        (cs.selector, state.seg[SegReg::Ss as usize].selector, state.seg[SegReg::Ss as usize].limit),
        (0x10, 0x18, u32::MAX)
    );
    assert_eq!(
        (state.cr0, state.cr3, state.cr4, state.efer),
        (cr0::PE | cr0::ET | cr0::PG, layout::PAGE_TABLES, cr4::PAE, 0x500)
    );
    assert_eq!(state.seg[SegReg::Tr as usize].attr & 0x8f, 0x8b);

    EntryState::kernel(EntryMode::Protected32, 0x10_0000).apply(&mut state);
    let cs = state.seg[SegReg::Cs as usize];
    assert!(cs.has(attr::DB) && !cs.has(attr::L));
    assert_eq!((state.cr0, state.cr4, state.efer), (cr0::PE | cr0::ET, 0, 0));

    state.gpr[2] = 0x906e0;
    EntryState::RESET.apply(&mut state);
    let cs = state.seg[SegReg::Cs as usize];
    assert_eq!((cs.selector, cs.base, state.rip, state.gpr[2]), (0xf000, 0xffff_0000, 0xfff0, 0x906e0));
    assert_eq!(state.cr0, 0x6000_0010);
}

#[test]
fn kernels_without_the_64_bit_entry_start_in_32_bits() {
    let mut file = bzimage();
    put(&mut file, 0x236, &[0, 0]);
    let kernel = TempFile::new(&file);
    let entry = load(&config(&kernel), &memory_map(MEMORY)).unwrap().entry;
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected32, 0x100_0000));
    // Protocol 2.04: no preferred address, not relocatable.
    put(&mut file, 0x206, &0x204u16.to_le_bytes());
    let kernel = TempFile::new(&file);
    let entry = load(&config(&kernel), &memory_map(MEMORY)).unwrap().entry;
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected32, 0x10_0000));
}

#[test]
fn a_relocatable_kernel_goes_lower_in_little_memory() {
    let kernel = TempFile::new(&bzimage());
    let config = Config { memory: 8 << 20, ..config(&kernel) };
    assert_eq!(load(&config, &memory_map(8 << 20)).unwrap().entry.rip, 0x20_0200);
}

#[test]
fn pvh_kernels_of_both_classes() {
    for is_64 in [false, true] {
        let (kernel, initrd) = (TempFile::new(&elf(is_64, true)), TempFile::new(&[9u8; 100]));
        let map = memory_map(MEMORY);
        map.write(PhysAddr(0x20_0400), &[0xff; 16]);
        let loaded = load(&Config { initrd: Some(initrd.name()), ..config(&kernel) }, &map).unwrap();
        assert_eq!((loaded.entry.mode, loaded.entry.rip), (EntryMode::Protected32, 0x20_0040));
        let info = loaded.entry.rbx;
        assert_eq!((word(&map, info), word(&map, info + 4), word(&map, info + 12)), (0x336e_c578, 1, 1));
        let module = quad(&map, info + 16);
        assert_eq!((quad(&map, module), quad(&map, module + 8)), (MEMORY - 0x1000, 100));
        assert_eq!(read(&map, quad(&map, info + 24), 8), b"console=");
        assert_eq!(quad(&map, info + 32), layout::ACPI);
        assert_eq!(word(&map, info + 48) as usize, e820::map(MEMORY).len());
        assert_eq!(quad(&map, quad(&map, info + 40) + 8), e820::CONVENTIONAL_END);
        assert_eq!(read(&map, 0x20_0000, 4), [1, 1, 3, 3]);
        assert_eq!(read(&map, 0x20_0400, 16), [0; 16], "bss is cleared");
    }
}

#[test]
fn multiboot_elf_with_modules() {
    let mut file = elf(false, false);
    multiboot_header(&mut file, 0x200, 3, &[]);
    let (kernel, a, b) = (TempFile::new(&file), TempFile::new(&[1; 10]), TempFile::new(&[2; 5000]));
    let map = memory_map(MEMORY);
    let initrd = Some(format!("{} with args,{}", a.name(), b.name()));
    let loaded = load(&Config { initrd, ..config(&kernel) }, &map).unwrap();
    assert_eq!((loaded.entry.rip, loaded.entry.rax), (0x20_0010, 0x2bad_b002));
    let info = loaded.entry.rbx;
    assert_eq!(word(&map, info), 0x24d);
    assert_eq!((word(&map, info + 4), word(&map, info + 8)), (639, (MEMORY as u32 >> 10) - 1024));
    let line = format!("{} console=ttyS0 quiet\0", kernel.name());
    assert_eq!(read(&map, word(&map, info + 16).into(), line.len()), line.as_bytes());
    assert_eq!(word(&map, info + 20), 2);
    let mods = u64::from(word(&map, info + 24));
    assert_eq!((word(&map, mods), word(&map, mods + 4)), (0x20_2000, 0x20_200a));
    assert_eq!((word(&map, mods + 16), word(&map, mods + 20)), (0x20_3000, 0x20_3000 + 5000));
    let text = format!("{} with args\0", a.name());
    assert_eq!(read(&map, word(&map, mods + 8).into(), text.len()), text.as_bytes());
    assert_eq!(read(&map, 0x20_3000, 1), [2]);
    let mmap = u64::from(word(&map, info + 48));
    assert_eq!((word(&map, mmap), quad(&map, mmap + 12)), (20, e820::CONVENTIONAL_END));
}

#[test]
fn multiboot_by_addresses() {
    let kernel = TempFile::new(&multiboot_aout());
    let map = memory_map(MEMORY);
    map.write(PhysAddr(0x10_1800), &[0xff; 8]);
    let entry = load(&config(&kernel), &map).unwrap().entry;
    assert_eq!((entry.mode, entry.rip), (EntryMode::Protected32, 0x10_0080));
    assert_eq!(word(&map, 0x10_0040), 0x1bad_b002);
    assert_eq!(read(&map, 0x10_17ff, 3), [0x90, 0, 0]);
}

#[test]
fn an_image_linked_at_32_kib_loads_and_our_data_stays_out_of_it() {
    let mut file = vec![0x90u8; 0x3000];
    multiboot_header(&mut file, 0x1040, 1 << 16 | 3, &[0x8040, 0x8000, 0x9800, 0xc000, 0x8080]);
    let kernel = TempFile::new(&file);
    let map = memory_map(MEMORY);
    let entry = load(&config(&kernel), &map).unwrap().entry;
    assert_eq!(entry.rip, 0x8080);
    assert_eq!(read(&map, 0x8080, 0x100), [0x90; 0x100]);
    assert_eq!(read(&map, 0x9800, 0x2800), [0; 0x2800]);
    assert!(entry.rbx >= layout::START);
}

/// Loads, and checks that a refusal is one line that names the file.
fn try_load(file: &[u8], memory: u64) -> Result<Loaded, String> {
    let kernel = TempFile::new(file);
    let config = Config { memory, ..config(&kernel) };
    load(&config, &memory_map(memory)).map_err(|e| {
        let text = e.to_string();
        assert!(!text.contains('\n') && text.starts_with(&kernel.name()), "{text}");
        text[kernel.name().len() + 2..].to_owned()
    })
}

#[test]
fn foreign_files_are_named() {
    let padded = |magic: &[u8], at: usize| {
        let mut file = vec![0u8; 0x9000];
        put(&mut file, at, magic);
        file
    };
    for (magic, at, expected) in [
        (&b"\x1f\x8b\x08"[..], 0, "gzip"),
        (b"\xfd7zXZ\0", 0, "xz"),
        (b"\x28\xb5\x2f\xfd", 0, "zstd"),
        (b"070701", 0, "cpio"),
        (b"QFI\xfb", 0, "qcow2"),
        (b"CD001", 0x8001, "CD image"),
        (b"ARM\x64", 0x38, "ARM64"),
        (b"RISCV\0\0\0", 0x30, "RISC-V"),
        (b"MZ", 0, "EFI"),
        (b"\x55\xaa", 0x1fe, "boot sector"),
        (b"hello", 0, "not a kernel"),
    ] {
        let text = try_load(&padded(magic, at), MEMORY).unwrap_err();
        assert!(text.contains(expected), "{text}");
    }
    assert!(try_load(b"x", MEMORY).unwrap_err().contains("too short"));
    assert!(try_load(b"", MEMORY).unwrap_err().contains("empty"));
    assert!(try_load(&elf(true, false), MEMORY).unwrap_err().contains("PVH"));
    let mut arm = elf(true, true);
    put(&mut arm, 18, &183u16.to_le_bytes());
    assert!(try_load(&arm, MEMORY).unwrap_err().contains("another processor"));
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let images = [bzimage(), elf(false, true), elf(true, true), multiboot_aout()];
    for image in images {
        // How much of the file a loader really needs.
        let needed = match image::detect(&image).unwrap() {
            image::Format::BzImage => image.len() - 15,
            image::Format::Pvh => 0x800 + 0x400,
            image::Format::Multiboot => 0x1000 + 0x1800,
        };
        for len in (1..needed).step_by(37).chain([needed - 1]) {
            let text = try_load(&image[..len], 4 << 20).expect_err(&format!("{len} of {needed} bytes"));
            assert!(!text.is_empty());
        }
    }
}

#[test]
fn little_memory_is_an_error_not_a_panic() {
    for image in [bzimage(), elf(true, true), multiboot_aout()] {
        let text = try_load(&image, 1 << 20).unwrap_err();
        assert!(text.contains("--memory"), "{text}");
    }
    let kernel = TempFile::new(&bzimage());
    let initrd = TempFile::new(&vec![0u8; 7 << 20]);
    let config = Config { memory: 8 << 20, initrd: Some(initrd.name()), ..config(&kernel) };
    let text = load(&config, &memory_map(8 << 20)).unwrap_err().to_string();
    assert!(text.starts_with(&initrd.name()) && text.contains("--memory"), "{text}");
    let config = Config { memory: 6 << 20, ..config };
    assert!(load(&config, &memory_map(6 << 20)).unwrap_err().to_string().contains("7 MiB"));
}

#[test]
fn missing_files_and_long_command_lines() {
    let nothing = load(&Config::default(), &memory_map(MEMORY)).unwrap_err().to_string();
    assert!(nothing.contains("--kernel"), "{nothing}");
    let missing = Config { kernel: Some("/nonexistent/vmlinuz".into()), ..Config::default() };
    assert!(
        load(&missing, &memory_map(MEMORY))
            .unwrap_err()
            .to_string()
            .starts_with("/nonexistent/vmlinuz: cannot be read")
    );
    let directory = Config { kernel: Some(std::env::temp_dir()), ..Config::default() };
    assert!(load(&directory, &memory_map(MEMORY)).unwrap_err().to_string().contains("cannot be read"));
    let kernel = TempFile::new(&bzimage());
    let long = Config { append: "x".repeat(2048), ..config(&kernel) };
    assert!(load(&long, &memory_map(MEMORY)).unwrap_err().to_string().contains("2047"));
    let initrd = Config { initrd: Some("/nonexistent/initrd".into()), ..config(&kernel) };
    assert!(load(&initrd, &memory_map(MEMORY)).unwrap_err().to_string().starts_with("/nonexistent/initrd"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    /// Whatever a damaged image says, loading ends with a value or with one line.
    #[test]
    fn mutated_images_never_panic(
        which in 0usize..5,
        edits in proptest::collection::vec((0usize..0x1100, proptest::num::u64::ANY, 1usize..9), 1..6),
        cut in 0usize..0x4000,
    ) {
        let mut image = match which {
            0 => bzimage(),
            1 => elf(false, true),
            2 => elf(true, true),
            3 => multiboot_aout(),
            _ => { let mut e = elf(false, false); multiboot_header(&mut e, 0x200, 3, &[]); e }
        };
        for (at, value, len) in edits {
            // Most fields are in the first 0x300 bytes, or around the Multiboot header.
            let at = if at % 3 == 0 { at } else if which == 3 { 0x1040 + at % 0x40 } else { at % 0x300 };
            let end = (at + len).min(image.len());
            if at < end {
                image[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
        }
        image.truncate(image.len() - cut.saturating_sub(0x3000).min(image.len() - 1));
        let _ = try_load(&image, 8 << 20);
    }
}
