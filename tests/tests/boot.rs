//! Boots real Debian kernels with the built command: what init printed, the exit status, and a time limit.

mod support;

use std::path::Path;
use std::time::Duration;
use support::{Outcome, guests, twofold_with};

/// Far above any run that goes well; a loaded two-core machine still ends in time.
const LIMIT: Duration = Duration::from_secs(240);

fn boot(dir: &Path, kernel: &str, initrd: &str, more: &[&str]) -> Outcome {
    let (kernel, initrd) = (dir.join(kernel), dir.join(initrd));
    let mut args = vec!["run", "--kernel", kernel.to_str().expect("UTF-8 path")];
    args.extend(["--initrd", initrd.to_str().expect("UTF-8 path")]);
    args.extend(["--append", "console=ttyS0", "--memory", "512M"]);
    args.extend(more);
    twofold_with(&args, LIMIT)
}

#[track_caller]
fn expect_booted(run: &Outcome, machine: &str) {
    run.expect_status(0);
    assert!(run.stdout.lines().any(|l| l.trim_end() == "BOOT-OK"), "init ran:\n{}", run.shown());
    assert!(run.stdout.contains(&format!("UP {machine} ")), "uname -m says {machine}:\n{}", run.shown());
    assert!(run.stdout.contains("reboot: Power down"), "powered off through ACPI:\n{}", run.shown());
    for bad in ["Oops", "BUG:", "Call Trace:", "WARNING: CPU"] {
        assert!(!run.stdout.contains(bad), "the kernel complained ({bad}):\n{}", run.shown());
    }
}

/// The main job: Debian's amd64 cloud kernel to busybox and power-off.
#[test]
fn debian_amd64() {
    let Some(dir) = guests(false) else { return };
    expect_booted(&boot(&dir, "amd64.vmlinuz", "hello64.zst", &[]), "x86_64");
}

/// An initramfs that the kernel has to gunzip, and QEMU's spelling of the options.
#[test]
fn debian_amd64_with_qemus_options() {
    let Some(dir) = guests(false) else { return };
    let (kernel, initrd) = (dir.join("amd64.vmlinuz"), dir.join("hello64.gz"));
    let (kernel, initrd) = (kernel.to_str().expect("UTF-8"), initrd.to_str().expect("UTF-8"));
    let args = ["run", "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet", "-m", "512M"];
    let run = twofold_with(&[&args[..], &["-smp", "1", "-nographic", "-no-reboot"]].concat(), LIMIT);
    run.expect_status(0);
    assert!(run.stdout.contains("BOOT-OK"), "{}", run.shown());
}

/// `--stats` after a boot: the schema's name and the counters that say the tiers did their work.
#[test]
fn debian_amd64_stats() {
    let Some(dir) = guests(false) else { return };
    let file = support::scratch("boot-stats").join("stats.json");
    let run = boot(&dir, "amd64.vmlinuz", "hello64.zst", &["--stats", file.to_str().expect("UTF-8")]);
    expect_booted(&run, "x86_64");
    let text = std::fs::read_to_string(&file).expect("the stats file was written");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(stats["schema"], "twofold-stats/1");
    for key in ["run", "translation", "execution", "tlb", "smc", "hot", "memory"] {
        assert!(!stats[key].is_null(), "{key} is missing: {text}");
    }
}

/// A shell on the serial console that one types at.
#[test]
fn debian_amd64_shell() {
    let Some(dir) = guests(false) else { return };
    let mut command = std::process::Command::new(support::twofold());
    command.arg("run").arg("--kernel").arg(dir.join("amd64.vmlinuz")).arg("--initrd").arg(dir.join("hello64.zst"));
    command.args(["--append", "console=ttyS0 quiet rdinit=/bin/busybox -- sh"]);
    let script = [("/ # ", "echo six times seven is $((6*7))\r"), ("/ # ", "/bin/busybox poweroff -f\r")];
    let run = support::converse(&mut command, &script, LIMIT);
    run.expect_status(0);
    assert!(run.stdout.contains("six times seven is 42"), "{}", run.shown());
}

/// 32-bit paging.
#[test]
fn debian_686() {
    let Some(dir) = guests(true) else { return };
    expect_booted(&boot(&dir, "686.vmlinuz", "hello32.zst", &[]), "i686");
}

/// PAE.
#[test]
fn debian_686_pae() {
    let Some(dir) = guests(true) else { return };
    expect_booted(&boot(&dir, "pae.vmlinuz", "hello32.zst", &[]), "i686");
}

/// A 32-bit userland on the 64-bit kernel: compatibility mode, SYSENTER or INT 0x80.
#[test]
fn debian_amd64_with_32_bit_userland() {
    let Some(dir) = guests(true) else { return };
    expect_booted(&boot(&dir, "amd64.vmlinuz", "hello32.zst", &[]), "x86_64");
}

/// Old processors: no long mode on one, no XSAVE, no x2APIC and timers to calibrate on the other.
#[test]
fn debian_on_old_processors() {
    let Some(dir) = guests(true) else { return };
    let run = boot(&dir, "686.vmlinuz", "hello32.gz", &["--cpu", "pentium3"]);
    expect_booted(&run, "i686");
    assert!(run.stdout.contains("Pentium III"), "{}", run.shown());
    let run = boot(&dir, "amd64.vmlinuz", "hello64.gz", &["--cpu", "nehalem,-mca"]);
    expect_booted(&run, "x86_64");
    assert!(run.stdout.contains("(family: 0x6, model: 0x1a, stepping: 0x5)"), "{}", run.shown());
}

/// A file that `tools/guests/fetch --more` makes.
fn more(name: &str) -> Option<std::path::PathBuf> {
    let file = guests(false)?.join(name);
    assert!(file.exists(), "run tools/guests/fetch --more first");
    Some(file)
}

/// Linux 6.12.
#[test]
#[ignore = "needs a kernel from backports: tools/guests/fetch --more"]
fn debian_newer_kernel() {
    let Some(kernel) = more("newer.vmlinuz") else { return };
    let dir = kernel.parent().expect("a directory");
    expect_booted(&boot(dir, "newer.vmlinuz", "hello64.zst", &[]), "x86_64");
}

/// SeaBIOS as PCs have it, from the reset vector to its menu.
#[test]
#[ignore = "needs SeaBIOS: tools/guests/fetch --more"]
fn seabios_comes_to_its_boot_menu() {
    let Some(rom) = more("seabios.bin") else { return };
    let mut command = std::process::Command::new(support::twofold());
    command.arg("run").arg("--firmware").arg(rom).args(["--memory", "64M", "--timeout", "25", "--debugcon", "none"]);
    let run = support::converse(&mut command, &[("for boot menu", "\x1b")], LIMIT);
    run.expect_status(4);
    assert!(run.stdout.contains("Select boot device"), "{}", run.shown());
}

/// memtest86+ on 32 MiB: a whole pass without an error. Its last test waits most of three minutes to see whether memory forgets.
#[test]
#[ignore = "takes minutes; needs memtest86+: tools/guests/fetch --more"]
fn memtest_finds_no_error() {
    let Some(kernel) = more("memtest.bin") else { return };
    let mut command = std::process::Command::new(support::twofold());
    command.arg("run").arg("--kernel").arg(kernel).args(["--append", "console=ttyS0,115200", "--memory", "32M"]);
    command.args(["--timeout", "900"]);
    // Escape ends it with a reset.
    let run = support::converse(&mut command, &[("Pass:  1", "\x1b")], 10 * LIMIT);
    run.expect_status(6);
    assert!(run.stdout.contains("Bit fade test"), "{}", run.shown());
    assert!(run.stdout.contains("Errors: 0") && !run.stdout.contains("Errors: 1"), "{}", run.shown());
}
