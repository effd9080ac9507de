//! Linux under KVM in L1: Debian boots Debian, 64- and 32-bit, with and without what VMX offers to help, and KVM in L2 again.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Outcome, kvm, scratch, twofold_with};

/// Far above any run that goes well.
const LIMIT: Duration = Duration::from_secs(400);

/// L1: `kvm_intel=...` of its command line goes to the module.
const L1_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
insmod /irqbypass.ko
insmod /kvm.ko
insmod /kvm-intel.ko $(sed -n 's/.*kvm_intel=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ') && echo KVM-LOADED
/bin/kvm-linux --kernel /l2.vmlinuz --initrd /l2.initrd --memory $(cat /l2.memory) \
  --append "console=ttyS0 quiet reboot=k" --timeout 300 && echo L2-ENDED
poweroff -f
"#;

/// L2: says what it is, and runs L3 when it has what that takes.
const L2_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "L2 userland $(uname -m) $(echo $((6*7)))"
grep -m1 ^flags /proc/cpuinfo
[ -f /kvm-intel.ko ] && insmod /irqbypass.ko && insmod /kvm.ko && insmod /kvm-intel.ko && /bin/kvm-hello 10
[ -f /l3.vmlinuz ] && /bin/kvm-linux --kernel /l3.vmlinuz --initrd /l3.initrd --memory 192 \
  --append "console=ttyS0 quiet reboot=k" --timeout 300
reboot -f
"#;

/// L3, when it is Linux.
const L3_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox echo "L3 userland $(/bin/busybox uname -m)"
/bin/busybox reboot -f
"#;

/// What L2 is.
#[derive(Clone, Copy)]
struct L2 {
    kernel: &'static str,
    base: &'static str,
    /// What `uname -m` says.
    machine: &'static str,
    /// What it runs itself.
    l3: L3,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum L3 {
    Nothing,
    /// A few instructions under KVM.
    Hello,
    /// And Debian.
    Linux,
}

const AMD64: L2 = L2 { kernel: "amd64.vmlinuz", base: "hello64.gz", machine: "x86_64", l3: L3::Nothing };
const PAE: L2 = L2 { kernel: "pae.vmlinuz", base: "hello32.gz", machine: "i686", l3: L3::Nothing };
const NON_PAE: L2 = L2 { kernel: "686.vmlinuz", base: "hello32.gz", machine: "i686", l3: L3::Nothing };
const WITH_L3: L2 = L2 { l3: L3::Hello, ..AMD64 };
const WITH_LINUX: L2 = L2 { l3: L3::Linux, ..AMD64 };

/// L1's initramfs, which holds L2's kernel and initramfs.
fn initramfs(dir: &Path, test: &str, l2: L2) -> PathBuf {
    let mut inner = vec![("init", 0o755, L2_INIT.as_bytes().to_vec())];
    if l2.l3 != L3::Nothing {
        inner.extend(kvm::modules(dir));
        inner.push(("bin/kvm-hello", 0o755, kvm::program("kvm-hello")));
    }
    let base = dir.join(l2.base);
    let kernel = std::fs::read(dir.join(l2.kernel)).expect("L2's kernel");
    let mut memory = "256";
    if l2.l3 == L3::Linux {
        let init = ("init", 0o755, L3_INIT.as_bytes().to_vec());
        inner.push(("bin/kvm-linux", 0o755, kvm::program("kvm-linux")));
        inner.push(("l3.vmlinuz", 0o644, kernel.clone()));
        inner.push(("l3.initrd", 0o644, kvm::initramfs(&base, &[init])));
        memory = "512";
    }
    let mut files = kvm::modules(dir);
    files.push(("init", 0o755, L1_INIT.as_bytes().to_vec()));
    files.push(("bin/kvm-linux", 0o755, kvm::program("kvm-linux")));
    files.push(("l2.vmlinuz", 0o644, kernel));
    files.push(("l2.memory", 0o644, memory.into()));
    files.push(("l2.initrd", 0o644, kvm::initramfs(&base, &inner)));
    kvm::write_initramfs(test, &kvm::initramfs(&dir.join("hello64.gz"), &files))
}

/// Boots L1, which boots L2, and checks what L2's userland printed. `None` without guests.
#[track_caller]
fn boot(test: &str, l2: L2, parameters: &str, more: &[&str]) -> Option<Outcome> {
    let dir = kvm::guests("--all")?;
    kvm::guests("--kvm")?;
    let (kernel, initrd) = (dir.join("amd64.vmlinuz"), initramfs(&dir, test, l2));
    let append = format!("console=ttyS0 quiet {parameters}");
    let mut args = vec!["run", "--memory", "1G", "--kernel", kernel.to_str().expect("UTF-8 path")];
    args.extend(["--initrd", initrd.to_str().expect("UTF-8 path"), "--append", &append]);
    args.extend(more);
    let run = twofold_with(&args, LIMIT);
    run.expect_status(0);
    let userland = format!("L2 userland {} 42", l2.machine);
    for wanted in ["KVM-LOADED", &userland, "guest ended with status 0", "L2-ENDED"] {
        assert!(run.stdout.contains(wanted), "{wanted}:\n{}", run.shown());
    }
    kvm::expect_no_complaints(&run);
    Some(run)
}

/// KVM with everything it finds. Returning to the guest with its VPID drops nothing, and every entry succeeds.
#[test]
fn debian_boots_debian() {
    let stats = scratch("kvm-linux-stats").join("stats.json");
    let Some(run) = boot("kvm-linux", AMD64, "", &["--stats", stats.to_str().expect("UTF-8 path")]) else { return };
    assert!(run.stdout.contains(" hypervisor "), "L2 knows that it has a hypervisor:\n{}", run.shown());
    let text = std::fs::read_to_string(&stats).expect("the stats file was written");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(stats["vmx"]["exits"]["EPT violation"]["count"].as_u64() >= Some(1000), "{}", stats["vmx"]);
    assert_eq!(stats["vmx"]["entry_failures"], serde_json::json!({}));
    for cause in ["vm_entry", "vm_exit"] {
        assert_eq!(stats["tlb"]["flushes"][cause].as_u64().unwrap_or(0), 0, "{}", stats["tlb"]);
    }
}

/// D1: shadow paging. KVM keeps page tables of its own for L2 and sees its faults, CR3 loads and INVLPGs.
#[test]
fn debian_boots_debian_by_shadow_paging() {
    boot("kvm-linux-ept", AMD64, "kvm_intel=ept=0", &[]);
}

/// Without VPIDs every entry and exit flushes.
#[test]
fn debian_boots_debian_without_vpid() {
    boot("kvm-linux-vpid", AMD64, "kvm_intel=vpid=0", &[]);
}

/// Real mode by virtual-8086 mode and KVM's emulator.
#[test]
fn debian_boots_debian_without_unrestricted_guest() {
    boot("kvm-linux-unrestricted", AMD64, "kvm_intel=unrestricted_guest=0", &[]);
}

/// C6: PAE paging under EPT, whose PDPTEs are VMCS fields.
#[test]
fn debian_boots_a_pae_kernel() {
    boot("kvm-linux-pae", PAE, "", &[]);
}

/// 32-bit paging under EPT.
#[test]
fn debian_boots_a_kernel_without_pae() {
    boot("kvm-linux-686", NON_PAE, "", &[]);
}

/// 32-bit paging without EPT: KVM's shadow tables are PAE or 4-level, L2's are not.
#[test]
fn debian_boots_a_kernel_without_pae_by_shadow_paging() {
    boot("kvm-linux-686-ept", NON_PAE, "kvm_intel=ept=0", &[]);
}

/// The same outcome when every transition flushes everything.
#[test]
fn debian_boots_debian_and_everything_is_flushed() {
    boot("kvm-linux-full", AMD64, "", &["--flush-policy", "full"]);
}

/// G9, L3: KVM in L2 runs a guest, so L1's KVM emulates VMX for it: shadow VMCSs, merged bitmaps, EPT on EPT.
#[test]
fn l2_runs_a_guest() {
    let Some(run) = boot("kvm-linux-l3", WITH_L3, "", &[]) else { return };
    assert!(run.stdout.contains("KVM-HELLO-OK"), "{}", run.shown());
}

/// Linux in Linux in Linux: a VM exit of L3 is half a dozen of L2.
#[test]
#[ignore = "half a minute of CPU time"]
fn l2_runs_debian() {
    let Some(run) = boot("kvm-linux-l3-linux", WITH_LINUX, "", &[]) else { return };
    assert!(run.stdout.contains("L3 userland x86_64"), "{}", run.shown());
}
