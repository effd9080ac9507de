//! The guests of the nested-boot benchmark: Debian alone, and Debian with KVM, our VMM and Debian again inside.

use crate::root;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What either init prints first.
pub const USERLAND: &str = "USERLAND-REACHED";

const ALONE: &str = "#!/bin/busybox sh
/bin/busybox echo USERLAND-REACHED
/bin/busybox reboot -f
";

const L1: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
insmod /irqbypass.ko && insmod /kvm.ko && insmod /kvm-intel.ko
/bin/kvm-linux --kernel /kernel --initrd /initrd --append 'console=ttyS0 quiet reboot=k' --mark USERLAND-REACHED
poweroff -f
";

/// Files for `twofold run`.
#[derive(Debug)]
pub struct Boots {
    /// Debian's cloud kernel.
    pub kernel: PathBuf,
    /// An initramfs whose init says [`USERLAND`].
    pub alone: PathBuf,
    /// One whose init boots the other two under KVM.
    pub nested: PathBuf,
    /// Where the two are, until this is dropped.
    scratch: PathBuf,
}

impl Drop for Boots {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
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

/// The image `base` with files over it: name and contents, all executable.
fn initramfs(base: &[u8], files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut image = base.to_vec();
    image.resize(image.len().next_multiple_of(4), 0);
    for (name, data) in files {
        cpio_entry(&mut image, name, 0o100_755, data);
    }
    cpio_entry(&mut image, "TRAILER!!!", 0, &[]);
    image
}

/// The VMM for L1, linked statically, in a target directory of its own beside this program's.
fn vmm() -> Result<Vec<u8>, String> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let target = own.ancestors().nth(2).ok_or("no target directory")?.join("kvm-guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    cargo.args(["build", "--quiet", "--release", "-p", "kvm-linux", "--target", TARGET, "--target-dir"]).arg(&target);
    if !cargo.status().is_ok_and(|s| s.success()) {
        return Err("cannot build kvm-linux".to_owned());
    }
    read(&target.join(TARGET).join("release/kvm-linux"))
}

/// Makes them, from what `tools/guests/fetch --kvm` brings.
///
/// # Errors
/// When something cannot be fetched, built, read or written.
pub fn boots() -> Result<Boots, String> {
    let dir = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let fetched = Command::new(root().join("tools/guests/fetch")).arg("--kvm").arg(&dir).status();
    if !fetched.is_ok_and(|s| s.success()) {
        return Err("tools/guests/fetch failed".to_owned());
    }
    let kernel = dir.join("amd64.vmlinuz");
    let base = read(&dir.join("hello64.gz"))?;
    let alone = initramfs(&base, &[("init", ALONE.into())]);
    let module = |name: &str| read(&dir.join("kvm").join(name));
    let files = [
        ("irqbypass.ko", module("irqbypass.ko")?),
        ("kvm.ko", module("kvm.ko")?),
        ("kvm-intel.ko", module("kvm-intel.ko")?),
        ("bin/kvm-linux", vmm()?),
        ("kernel", read(&kernel)?),
        ("initrd", alone.clone()),
        ("init", L1.into()),
    ];
    let nested = initramfs(&base, &files);
    let scratch = std::env::temp_dir().join(format!("vmx-bench-{}-boot", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|e| e.to_string())?;
    let write = |name: &str, image: &[u8]| {
        let path = scratch.join(name);
        std::fs::write(&path, image).map(|()| path).map_err(|e| e.to_string())
    };
    let (alone, nested) = (write("alone", &alone)?, write("nested", &nested)?);
    Ok(Boots { kernel, alone, nested, scratch })
}
