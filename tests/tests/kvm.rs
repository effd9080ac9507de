//! KVM in L1: Debian's kernel loads kvm-intel, and a small VMM of ours runs a guest under it.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use support::{Outcome, root, scratch, twofold_with};

/// Far above any run that goes well.
const LIMIT: Duration = Duration::from_secs(240);

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
insmod /irqbypass.ko
insmod /kvm.ko
insmod /kvm-intel.ko $(sed -n 's/.*kvm_intel=\\([^ ]*\\).*/\\1/p' /proc/cmdline | tr , ' ') && echo KVM-LOADED
/bin/kvm-hello 100
poweroff -f
";

/// The guests with KVM's modules; `None` when `TWOFOLD_NO_GUESTS` asks to do without.
fn guests() -> Option<PathBuf> {
    if std::env::var_os("TWOFOLD_NO_GUESTS").is_some() {
        eprintln!("skipped: TWOFOLD_NO_GUESTS is set");
        return None;
    }
    let dir = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let done = Command::new(root().join("tools/guests/fetch")).arg("--kvm").arg(&dir).output().expect("fetch runs");
    assert!(done.status.success(), "no guests: {}", String::from_utf8_lossy(&done.stderr));
    Some(dir)
}

/// The VMM, linked statically. It has a target directory of its own: other flags would make cargo build everything anew.
fn kvm_hello() -> PathBuf {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let exe = std::env::current_exe().expect("own path");
    let target = exe.ancestors().nth(3).expect("tests run from target/PROFILE/deps").join("kvm-guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    cargo.args(["build", "--quiet", "--release", "-p", "kvm-hello", "--target", TARGET, "--target-dir"]).arg(&target);
    assert!(cargo.status().expect("cargo runs").success(), "cannot build kvm-hello");
    target.join(TARGET).join("release/kvm-hello")
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

/// The busybox initramfs with the modules, the VMM and this test's init put over it.
fn initramfs(dir: &Path, test: &str) -> PathBuf {
    let read = |p: PathBuf| std::fs::read(&p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
    let mut image = read(dir.join("hello64.gz"));
    image.resize(image.len().next_multiple_of(4), 0);
    let mut cpio = Vec::new();
    for module in ["irqbypass.ko", "kvm.ko", "kvm-intel.ko"] {
        cpio_entry(&mut cpio, module, 0o100_644, &read(dir.join("kvm").join(module)));
    }
    cpio_entry(&mut cpio, "bin/kvm-hello", 0o100_755, &read(kvm_hello()));
    cpio_entry(&mut cpio, "init", 0o100_755, INIT.as_bytes());
    cpio_entry(&mut cpio, "TRAILER!!!", 0, &[]);
    image.extend(cpio);
    let path = scratch(test).join("initramfs");
    std::fs::write(&path, image).expect("the scratch directory is writable");
    path
}

fn run_kvm(test: &str, parameters: &str, more: &[&str]) -> Option<Outcome> {
    let dir = guests()?;
    let (kernel, initrd) = (dir.join("amd64.vmlinuz"), initramfs(&dir, test));
    let append = format!("console=ttyS0 {parameters}");
    let mut args = vec!["run", "--kernel", kernel.to_str().expect("UTF-8 path")];
    args.extend(["--initrd", initrd.to_str().expect("UTF-8 path"), "--append", &append]);
    args.extend(more);
    Some(twofold_with(&args, LIMIT))
}

#[track_caller]
fn expect_kvm(run: &Outcome) {
    run.expect_status(0);
    for wanted in ["KVM-LOADED", "KVM-HELLO-OK"] {
        assert!(run.stdout.contains(wanted), "{wanted}:\n{}", run.shown());
    }
    for bad in ["Oops", "BUG:", "Call Trace:", "WARNING: CPU", "dump_vmcs"] {
        assert!(!run.stdout.contains(bad), "the kernel complained ({bad}):\n{}", run.shown());
    }
}

/// KVM with everything it finds; the statistics tell of its entries and exits.
#[test]
fn kvm_runs_a_guest() {
    let stats = scratch("kvm-stats").join("stats.json");
    let Some(run) = run_kvm("kvm", "", &["--stats", stats.to_str().expect("UTF-8 path")]) else { return };
    expect_kvm(&run);
    let text = std::fs::read_to_string(&stats).expect("the stats file was written");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(stats["vmx"]["exits"]["I/O instruction"]["count"].as_u64() >= Some(102), "{}", stats["vmx"]);
    assert_eq!(stats["vmx"]["entry_failures"], serde_json::json!({}));
}

/// C2, D1, G7: shadow paging, no VPIDs, real mode by virtual-8086 mode, and the policy that flushes everything.
#[test]
fn kvm_variants() {
    for (test, parameters) in [
        ("kvm-ept", "kvm_intel=ept=0"),
        ("kvm-vpid", "kvm_intel=vpid=0"),
        ("kvm-unrestricted", "kvm_intel=unrestricted_guest=0"),
    ] {
        let Some(run) = run_kvm(test, parameters, &[]) else { return };
        expect_kvm(&run);
    }
    let Some(run) = run_kvm("kvm-full", "", &["--flush-policy", "full"]) else { return };
    expect_kvm(&run);
}

/// `-vmx` takes VMX away: kvm-intel refuses to load.
#[test]
fn kvm_needs_vmx() {
    let Some(run) = run_kvm("kvm-none", "", &["--cpu", "max,-vmx"]) else { return };
    run.expect_status(0);
    assert!(!run.stdout.contains("KVM-LOADED"), "{}", run.shown());
}
