//! What tests with KVM in L1 share: KVM's modules, programs for L1, and initramfs images with files put over busybox's.

use super::{Outcome, root, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of an initramfs: its name, permissions and contents.
pub type File = (&'static str, u32, Vec<u8>);

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The guests that `option` of `tools/guests/fetch` adds; `None` when `TWOFOLD_NO_GUESTS` asks to do without.
pub fn guests(option: &str) -> Option<PathBuf> {
    if std::env::var_os("TWOFOLD_NO_GUESTS").is_some() {
        eprintln!("skipped: TWOFOLD_NO_GUESTS is set");
        return None;
    }
    let dir = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let done = Command::new(root().join("tools/guests/fetch")).arg(option).arg(&dir).output().expect("fetch runs");
    assert!(done.status.success(), "no guests: {}", String::from_utf8_lossy(&done.stderr));
    Some(dir)
}

/// A program of `tests/guests`, linked statically. These have a target directory of their own: other flags would make cargo
/// build everything anew.
pub fn program(name: &str) -> Vec<u8> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let exe = std::env::current_exe().expect("own path");
    let target = exe.ancestors().nth(3).expect("tests run from target/PROFILE/deps").join("kvm-guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    cargo.args(["build", "--quiet", "--release", "-p", name, "--target", TARGET, "--target-dir"]).arg(&target);
    assert!(cargo.status().expect("cargo runs").success(), "cannot build {name}");
    read(&target.join(TARGET).join("release").join(name))
}

/// KVM's modules for L1's kernel.
pub fn modules(guests: &Path) -> Vec<File> {
    let module = |name| (name, 0o644, read(&guests.join("kvm").join(name)));
    ["irqbypass.ko", "kvm.ko", "kvm-intel.ko"].map(module).into()
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

/// The image `base` with `files` over it.
pub fn initramfs(base: &Path, files: &[File]) -> Vec<u8> {
    const REGULAR: u32 = 0o100_000;
    let mut image = read(base);
    image.resize(image.len().next_multiple_of(4), 0);
    for (name, mode, data) in files {
        cpio_entry(&mut image, name, REGULAR | mode, data);
    }
    cpio_entry(&mut image, "TRAILER!!!", 0, &[]);
    image
}

/// Writes an image into the test's scratch directory.
pub fn write_initramfs(test: &str, image: &[u8]) -> PathBuf {
    let path = scratch(test).join("initramfs");
    std::fs::write(&path, image).expect("the scratch directory is writable");
    path
}

/// No kernel, of L1 or of L2, complained.
#[track_caller]
pub fn expect_no_complaints(run: &Outcome) {
    for bad in ["Oops", "BUG:", "Call Trace:", "WARNING: CPU", "dump_vmcs"] {
        assert!(!run.stdout.contains(bad), "the kernel complained ({bad}):\n{}", run.shown());
    }
}
