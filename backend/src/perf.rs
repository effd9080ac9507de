//! Profiles: `/tmp/perf-PID.map` and jitdump, so that `perf report` names translated code.
//!
//! Place in the pipeline: the runtime tells a [`Profile`] of each block it installs, with a name it makes of guest symbols.
//! A map holds names only; a jitdump (`perf record -k mono`, then `perf inject --jit`) also the code, so that `perf annotate`
//! works and memory may be used again for other blocks.
#![allow(unsafe_code)] // maps one page of the jitdump, which is how `perf` learns of it

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

/// Which kind of profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProfileKind {
    /// `/tmp/perf-PID.map`.
    Map,
    /// `/tmp/jit-PID.dump`.
    Jitdump,
}

/// A profile being written.
#[derive(Debug)]
pub struct Profile {
    kind: ProfileKind,
    out: BufWriter<File>,
    path: PathBuf,
    index: u64,
    /// The page that tells `perf` of the jitdump, mapped while the profile lives.
    marker: Option<Marker>,
}

#[derive(Debug)]
struct Marker(*mut libc::c_void, usize);

// SAFETY: the mapping is only ever unmapped.
unsafe impl Send for Marker {}

impl Drop for Marker {
    fn drop(&mut self) {
        // SAFETY: mapped by `Profile::create` with this length.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const HEADER: u32 = 40;
const CODE_LOAD: u32 = 0;
/// Of a load record, before name and code.
const LOAD_HEADER: usize = 56;

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
const ELF_MACHINE: u32 = 62;
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
const ELF_MACHINE: u32 = 183;

impl Profile {
    /// Creates the profile's file for this process in `/tmp`, where `perf` looks for it.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(kind: ProfileKind) -> io::Result<Self> {
        let pid = std::process::id();
        let path = PathBuf::from(match kind {
            ProfileKind::Map => format!("/tmp/perf-{pid}.map"),
            ProfileKind::Jitdump => format!("/tmp/jit-{pid}.dump"),
        });
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        let mut profile = Self { kind, out: BufWriter::new(file), path, index: 0, marker: None };
        if kind == ProfileKind::Jitdump {
            let mut h = Vec::new();
            for word in [MAGIC, VERSION, HEADER, ELF_MACHINE, 0, pid] {
                h.extend(word.to_le_bytes());
            }
            h.extend(timestamp().to_le_bytes());
            h.extend(0u64.to_le_bytes());
            profile.out.write_all(&h)?;
            profile.out.flush()?;
            profile.marker = Some(mark(profile.out.get_ref())?);
        }
        Ok(profile)
    }

    /// Where it is written.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Notes that `code` has been put at host address `start` and is called `name`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, start: u64, code: &[u8], name: &str) -> io::Result<()> {
        self.add_at(timestamp(), start, code.len() as u32, code, name)
    }

    /// Notes that at time `at` (of [`timestamp`]) code of `len` bytes was put at host address `start`. A map needs no `code`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add_at(&mut self, at: u64, start: u64, len: u32, code: &[u8], name: &str) -> io::Result<()> {
        if self.kind == ProfileKind::Map {
            return writeln!(self.out, "{start:x} {len:x} {name}");
        }
        let size = LOAD_HEADER + name.len() + 1 + code.len();
        let pid = std::process::id();
        let mut r = Vec::with_capacity(size);
        r.extend(CODE_LOAD.to_le_bytes());
        r.extend((size as u32).to_le_bytes());
        r.extend(at.to_le_bytes());
        r.extend(pid.to_le_bytes());
        r.extend(pid.to_le_bytes());
        for word in [start, start, code.len() as u64, self.index] {
            r.extend(word.to_le_bytes());
        }
        r.extend(name.bytes().map(|b| if b == 0 { b'?' } else { b }));
        r.push(0);
        r.extend(code);
        self.index += 1;
        self.out.write_all(&r)
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds, which `perf record -k mono` uses too.
#[must_use]
pub fn timestamp() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists and `t` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn mark(file: &File) -> io::Result<Marker> {
    use std::os::fd::AsRawFd;
    let len = 4096;
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: a fresh mapping of a file of ours, checked, that nobody reads.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Marker(p, len)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_a_line_and_a_jitdump_a_record_for_each_block() {
        let mut map = Profile::create(ProfileKind::Map).unwrap();
        map.add(0x1000, &[0x90; 16], "guest:do_idle+0x12").unwrap();
        map.flush().unwrap();
        assert_eq!(std::fs::read_to_string(map.path()).unwrap(), "1000 10 guest:do_idle+0x12\n");
        std::fs::remove_file(map.path()).unwrap();

        let mut dump = Profile::create(ProfileKind::Jitdump).unwrap();
        dump.add(0x2000, &[0xc3; 3], "a").unwrap();
        dump.add(0x3000, &[0xcc; 2], "bc").unwrap();
        dump.flush().unwrap();
        let bytes = std::fs::read(dump.path()).unwrap();
        std::fs::remove_file(dump.path()).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4), word(8), word(20)), (MAGIC, VERSION, HEADER, std::process::id()));
        let first = HEADER as usize;
        assert_eq!((word(first), word(first + 4)), (CODE_LOAD, LOAD_HEADER as u32 + 2 + 3));
        assert_eq!(&bytes[first + LOAD_HEADER..first + LOAD_HEADER + 5], b"a\0\xc3\xc3\xc3");
        let second = first + word(first + 4) as usize;
        assert_eq!((word(second + 24), word(second + 48)), (0x3000, 1));
        assert_eq!(bytes.len(), second + word(second + 4) as usize);
    }
}
