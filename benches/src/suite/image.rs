//! The suite's guest: the static binary of its programs, and the initramfs that runs it.

use crate::initramfs::{DIRECTORY, PROGRAM, overlay, program};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t tmpfs tmp /tmp
read line </proc/cmdline
job=${line##*job=}
/bin/bench-guest $(echo \"$job\" | tr + ' ')
poweroff -f
";

/// Builds the programs.
///
/// # Errors
/// When cargo cannot be run, or fails.
pub fn build() -> Result<PathBuf, String> {
    program("bench-guest", "bench-guests")
}

/// Writes the busybox initramfs of `guests` with the programs and the suite's init over it.
///
/// # Errors
/// When a file cannot be read or written.
pub fn initramfs(guests: &Path, programs: &Path, to: &Path) -> Result<(), String> {
    let read = |p: &Path| std::fs::read(p).map_err(|e| format!("{}: {e}", p.display()));
    let files =
        [("bin/bench-guest", PROGRAM, read(programs)?), ("tmp", DIRECTORY, Vec::new()), ("init", PROGRAM, INIT.into())];
    let image = overlay(read(&guests.join("hello64.gz"))?, &files);
    std::fs::write(to, image).map_err(|e| format!("{}: {e}", to.display()))
}

/// The frequency of the host's time-stamp counter in kHz, measured. A guest that is told need not calibrate, which under
/// QEMU's microvm fails for ever on a busy machine.
#[must_use]
pub fn tsc_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let mhz = text.lines().find_map(|l| l.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok())?;
    Some((mhz * 1000.0) as u64)
}

/// The program's version of itself: the first line of `--version`.
#[must_use]
pub fn version(program: &Path) -> String {
    let out = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok();
    let text = out.and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
