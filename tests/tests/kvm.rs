//! KVM in L1: Debian's kernel loads kvm-intel, and a small VMM of ours runs a guest under it.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Outcome, kvm, scratch, twofold_with};

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

/// The busybox initramfs with the modules, the VMM and this test's init put over it.
fn initramfs(dir: &Path, test: &str) -> PathBuf {
    let mut files = kvm::modules(dir);
    files.push(("bin/kvm-hello", 0o755, kvm::program("kvm-hello")));
    files.push(("init", 0o755, INIT.as_bytes().to_vec()));
    kvm::write_initramfs(test, &kvm::initramfs(&dir.join("hello64.gz"), &files))
}

fn run_kvm(test: &str, parameters: &str, more: &[&str]) -> Option<Outcome> {
    let dir = kvm::guests("--kvm")?;
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
    kvm::expect_no_complaints(run);
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
