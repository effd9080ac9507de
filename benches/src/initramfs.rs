//! Guests of the benchmarks: programs of ours linked statically, and initramfs images with files put over busybox's.

use crate::root;
use std::path::PathBuf;
use std::process::Command;

/// Builds a program for guests. Those in `dir` share a target directory of their own beside this program's: other flags would
/// make cargo build everything anew.
///
/// # Errors
/// When cargo cannot be run, or fails.
pub(crate) fn program(name: &str, dir: &str) -> Result<PathBuf, String> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let target = own.ancestors().nth(2).ok_or("no target directory")?.join(dir);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    cargo.args(["build", "--quiet", "--release", "-p", name, "--target", TARGET, "--target-dir"]).arg(&target);
    let status = cargo.status().map_err(|e| format!("cargo: {e}"))?;
    let built = target.join(TARGET).join("release").join(name);
    status.success().then_some(built).ok_or_else(|| format!("cannot build {name}"))
}

/// A file of an image: its name, mode and contents.
pub(crate) type File<'a> = (&'a str, u32, Vec<u8>);

/// The mode of a file that anybody may run.
pub(crate) const PROGRAM: u32 = 0o100_755;
/// The mode of a directory.
pub(crate) const DIRECTORY: u32 = 0o040_755;

/// `image` with files over it.
pub(crate) fn overlay(mut image: Vec<u8>, files: &[File<'_>]) -> Vec<u8> {
    image.resize(image.len().next_multiple_of(4), 0);
    for (name, mode, data) in files {
        cpio_entry(&mut image, name, *mode, data);
    }
    cpio_entry(&mut image, "TRAILER!!!", 0, &[]);
    image
}

/// A file of a cpio archive in the format "newc". What it is put in has a length that is a multiple of 4.
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
