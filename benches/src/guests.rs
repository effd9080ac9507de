//! The guests of the nested-boot benchmark: Debian alone, and Debian with KVM, our VMM and Debian again inside.

use crate::initramfs::{PROGRAM, overlay, program};
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
    let alone = overlay(base.clone(), &[("init", PROGRAM, ALONE.into())]);
    let module = |name: &str| read(&dir.join("kvm").join(name));
    let files = [
        ("irqbypass.ko", PROGRAM, module("irqbypass.ko")?),
        ("kvm.ko", PROGRAM, module("kvm.ko")?),
        ("kvm-intel.ko", PROGRAM, module("kvm-intel.ko")?),
        ("bin/kvm-linux", PROGRAM, read(&program("kvm-linux", "kvm-guests")?)?),
        ("kernel", PROGRAM, read(&kernel)?),
        ("initrd", PROGRAM, alone.clone()),
        ("init", PROGRAM, L1.into()),
    ];
    let nested = overlay(base, &files);
    let scratch = std::env::temp_dir().join(format!("vmx-bench-{}-boot", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|e| e.to_string())?;
    let write = |name: &str, image: &[u8]| {
        let path = scratch.join(name);
        std::fs::write(&path, image).map(|()| path).map_err(|e| e.to_string())
    };
    let (alone, nested) = (write("alone", &alone)?, write("nested", &nested)?);
    Ok(Boots { kernel, alone, nested, scratch })
}
