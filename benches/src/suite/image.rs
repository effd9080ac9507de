//! The suite's guest: the static binary of its programs, and the initramfs that runs it.

use crate::root;
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

/// Builds the programs, linked statically. They have a target directory of their own: other flags would make cargo build
/// everything anew.
///
/// # Errors
/// When cargo cannot be run, or fails.
pub fn build() -> Result<PathBuf, String> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let target = own.ancestors().nth(2).ok_or("no target directory")?.join("bench-guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    cargo.args(["build", "--quiet", "--release", "-p", "bench-guest", "--target", TARGET, "--target-dir"]);
    let status = cargo.arg(&target).status().map_err(|e| format!("cargo: {e}"))?;
    let built = target.join(TARGET).join("release/bench-guest");
    status.success().then_some(built).ok_or_else(|| "cannot build bench-guest".to_owned())
}

/// A file of a cpio archive in the format "newc".
fn cpio_entry(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    out.extend_from_slice(b"070701");
    fields.iter().for_each(|f| out.extend_from_slice(format!("{f:08X}").as_bytes()));
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Writes the busybox initramfs of `guests` with the programs and the suite's init over it.
///
/// # Errors
/// When a file cannot be read or written.
pub fn initramfs(guests: &Path, programs: &Path, to: &Path) -> Result<(), String> {
    let read = |p: &Path| std::fs::read(p).map_err(|e| format!("{}: {e}", p.display()));
    let mut image = read(&guests.join("hello64.gz"))?;
    image.resize(image.len().next_multiple_of(4), 0);
    let mut cpio = Vec::new();
    cpio_entry(&mut cpio, "bin/bench-guest", 0o100_755, &read(programs)?);
    cpio_entry(&mut cpio, "tmp", 0o040_755, &[]);
    cpio_entry(&mut cpio, "init", 0o100_755, INIT.as_bytes());
    cpio_entry(&mut cpio, "TRAILER!!!", 0, &[]);
    image.extend(cpio);
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
