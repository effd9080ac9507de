//! Image files: reading them, bounded access to their fields, and finding out what they are.
//!
//! Place in the pipeline: before the loaders. Invariant: no offset out of a file is used without a check; a field that is not there
//! is an error, never a panic.

use std::fmt;
use std::io::Read;
use std::path::Path;

use super::elf;
use super::error::{BootError, Problem};
use super::multiboot;

/// The formats we start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Linux boot protocol 2.x.
    BzImage,
    /// ELF with a PVH note.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "Linux bzImage",
            Self::Pvh => "ELF with a PVH entry",
            Self::Multiboot => "Multiboot 1 image",
        })
    }
}

/// The bytes of a file at an offset, or nothing when it ends before.
#[must_use]
pub fn slice(file: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    file.get(start..end)
}

/// A little-endian field of `N` bytes.
fn field<const N: usize>(file: &[u8], offset: u64, what: &'static str) -> Result<[u8; N], Problem> {
    slice(file, offset, N as u64).and_then(|s| s.try_into().ok()).ok_or(Problem::Truncated {
        what,
        needed: offset.saturating_add(N as u64),
        size: file.len() as u64,
    })
}

/// One byte of a file.
pub(crate) fn u8_at(file: &[u8], offset: u64, what: &'static str) -> Result<u8, Problem> {
    field::<1>(file, offset, what).map(|[b]| b)
}
/// Two bytes of a file.
pub(crate) fn u16_at(file: &[u8], offset: u64, what: &'static str) -> Result<u16, Problem> {
    field(file, offset, what).map(u16::from_le_bytes)
}
/// Four bytes of a file.
pub(crate) fn u32_at(file: &[u8], offset: u64, what: &'static str) -> Result<u32, Problem> {
    field(file, offset, what).map(u32::from_le_bytes)
}
/// Eight bytes of a file.
pub(crate) fn u64_at(file: &[u8], offset: u64, what: &'static str) -> Result<u64, Problem> {
    field(file, offset, what).map(u64::from_le_bytes)
}

/// Reads a whole file that is to go into `memory` bytes of guest memory.
pub(crate) fn read_file(path: &Path, memory: u64) -> Result<Vec<u8>, BootError> {
    let name = path.display().to_string();
    let error = |problem| BootError::new(&name, problem);
    let mut file = std::fs::File::open(path).map_err(|e| error(Problem::Read(e)))?;
    let size = file.metadata().map_err(|e| error(Problem::Read(e)))?.len();
    if size > memory {
        return Err(error(Problem::TooLarge { size, memory }));
    }
    // A pipe or a device says 0, or could go on for ever: the limit holds for it, too.
    let mut bytes = Vec::with_capacity(size as usize);
    let read =
        file.by_ref().take(memory.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| error(Problem::Read(e)))?;
    if read as u64 > memory {
        return Err(error(Problem::TooLarge { size: read as u64, memory }));
    }
    if bytes.is_empty() {
        return Err(error(Problem::Empty));
    }
    Ok(bytes)
}

/// Finds out what a kernel image is.
///
/// # Errors
/// [`Problem::Foreign`] for everything we do not start, with what it looks like.
pub fn detect(file: &[u8]) -> Result<Format, Problem> {
    if slice(file, 0x202, 4) == Some(b"HdrS") && slice(file, 0x1fe, 2) == Some(&[0x55, 0xaa]) {
        return Ok(Format::BzImage);
    }
    if multiboot::find_header(file).is_some() {
        return Ok(Format::Multiboot);
    }
    if file.starts_with(b"\x7fELF") {
        return match elf::Elf::parse(file)?.pvh_entry(file)? {
            Some(_) => Ok(Format::Pvh),
            None => Err(Problem::Foreign {
                looks_like: "an ELF file without a PVH note and without a Multiboot header",
                advice: "for Linux give the bzImage, or build vmlinux with CONFIG_PVH=y",
            }),
        };
    }
    Err(foreign(file))
}

/// What an image that we do not start looks like.
fn foreign(file: &[u8]) -> Problem {
    let at = |offset: u64, magic: &[u8]| slice(file, offset, magic.len() as u64) == Some(magic);
    const DECOMPRESS: &str = "decompress it first";
    const WRONG_FILE: &str = "give a bzImage, an ELF with a PVH note or a Multiboot kernel";
    let (looks_like, advice) = if at(0, b"\x1f\x8b") {
        ("a gzip-compressed file", DECOMPRESS)
    } else if at(0, b"\xfd7zXZ\0") {
        ("an xz-compressed file", DECOMPRESS)
    } else if at(0, b"\x28\xb5\x2f\xfd") {
        ("a zstd-compressed file", DECOMPRESS)
    } else if at(0, b"070701") || at(0, b"070702") {
        ("a cpio archive", "it belongs to --initrd")
    } else if at(0, b"QFI\xfb") {
        ("a qcow2 disk image", WRONG_FILE)
    } else if at(0x8001, b"CD001") {
        ("a CD image", "give the kernel that is on it")
    } else if at(0x38, b"ARM\x64") {
        ("a kernel for ARM64", "give one for x86")
    } else if at(0x30, b"RISCV\0\0\0") {
        ("a kernel for RISC-V", "give one for x86")
    } else if at(0, b"MZ") {
        ("an EFI or Windows program, not a bzImage", WRONG_FILE)
    } else if at(0x1fe, &[0x55, 0xaa]) {
        ("a boot sector or disk image", WRONG_FILE)
    } else if file.len() < 0x206 {
        ("too short for a kernel", "fetch or build it again")
    } else {
        ("not a kernel in any format twofold knows", WRONG_FILE)
    };
    Problem::Foreign { looks_like, advice }
}
