//! What virtualization costs: L2's speed against L1's, a VM entry and exit beside QEMU TCG's VMRUN, TLB misses under EPT, and
//! Debian booting Debian.
//!
//! `cargo run --release -p twofold-benches --bin vmx -- [--runs 5] [--only speed,exits,misses,boot] [--twofold FILE]`. Runs are
//! paired (A B A B ...), and a ratio is the median of the pairs' ratios. Times are CPU time, that of the guest without a turn
//! subtracted, because a busy machine stretches the others; the boots' are wall time.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use twofold_benches::hypervisor::{DATA_PAGES, FRAMES, MEMORY_MIB, Place, Work, image};
use twofold_benches::kernels::KERNELS;
use twofold_benches::{Run, build_twofold, guests, measure, median};

/// The loops that need no vector or x87 registers, which the hypervisor does not switch on.
const GENERAL: [&str; 6] = ["alu", "memory", "bignum", "branches", "calls", "indirect"];
const LIMIT: Duration = Duration::from_secs(120);
/// About how long a run lasts, in seconds.
const SECONDS: f64 = 0.5;

struct Bench {
    twofold: PathBuf,
    runs: usize,
    qemu: bool,
}

/// A guest, ready to run.
#[derive(Clone, Copy)]
struct Guest<'a> {
    place: Place,
    work: Work<'a>,
}

impl Bench {
    fn command(&self, place: Place, image: &Path) -> Command {
        let memory = format!("{MEMORY_MIB}M");
        if place == Place::Svm {
            let mut c = Command::new("qemu-system-x86_64");
            c.args(["-M", "pc", "-accel", "tcg", "-cpu", "max,+svm,+npt", "-m", &memory, "-nographic", "-no-reboot"]);
            c.args(["-nodefaults", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"]).arg(image);
            c
        } else {
            let mut c = Command::new(&self.twofold);
            c.args(["run", "--memory", &memory, "--serial", "none", "--kernel"]).arg(image);
            c
        }
    }

    /// CPU seconds of a run.
    fn time(&self, guest: Guest<'_>, turns: u64) -> Result<f64, String> {
        let file = std::env::temp_dir().join(format!("vmx-bench-{}", std::process::id()));
        let bytes = image(guest.place, guest.work, turns).map_err(|e| e.to_string())?;
        std::fs::write(&file, bytes).map_err(|e| e.to_string())?;
        let run = measure(&mut self.command(guest.place, &file), "", LIMIT);
        let _ = std::fs::remove_file(&file);
        let run = run.map_err(|e| e.to_string())?;
        match run.status {
            Some(1) => Ok(run.cpu.as_secs_f64()),
            status => Err(format!("{:?} {:?}: status {status:?}: {}", guest.place, guest.work, run.stderr.trim_end())),
        }
    }

    /// Nanoseconds a turn of each guest, in pairs: as many lists as guests.
    fn turns<const N: usize>(&self, guests: [Guest<'_>; N]) -> Result<[Vec<f64>; N], String> {
        let mut plan = Vec::new();
        for guest in guests {
            let start = (0..2).map(|_| self.time(guest, 0)).collect::<Result<Vec<_>, _>>()?;
            let start = start.into_iter().fold(f64::MAX, f64::min);
            let mut turns = 100_000;
            // The last of these warms up as well.
            loop {
                let time = self.time(guest, turns)? - start;
                if time >= SECONDS {
                    break;
                }
                turns = (turns as f64 * (1.3 * SECONDS / time.max(0.01)).clamp(1.3, 30.0)) as u64;
            }
            plan.push((guest, start, turns));
        }
        let mut all = [const { Vec::new() }; N];
        for _ in 0..self.runs {
            for ((guest, start, turns), to) in plan.iter().zip(&mut all) {
                to.push((self.time(*guest, *turns)? - start) / *turns as f64 * 1e9);
            }
        }
        Ok(all)
    }

    fn speed(&self) -> Result<(), String> {
        println!("\nL2's speed over L1's, the same loop with EPT and VPID (goal 0.95, at least 0.9):");
        println!("  {:<10} {:>9} {:>9} {:>7}", "loop", "L1 ns", "L2 ns", "ratio");
        let mut ratios = Vec::new();
        for kernel in KERNELS.iter().filter(|k| GENERAL.contains(&k.name)) {
            let work = Work::Kernel(kernel);
            let [one, two] = self.turns([Place::L1, Place::Vmx].map(|place| Guest { place, work }))?;
            let ratio = paired(&one, &two);
            ratios.push(ratio);
            println!("  {:<10} {:>9.2} {:>9.2} {ratio:>7.3}", kernel.name, middle(&one), middle(&two));
        }
        println!("  {:<10} {:>27.3}", "median", middle(&ratios));
        Ok(())
    }

    fn exits(&self) -> Result<(), String> {
        println!("\nVM entry and exit: CPUID in L2, KVM's controls, L1 moves RIP on (goal 0.7 us, at most 1 us):");
        let guest = |place| Guest { place, work: Work::Exit };
        if !self.qemu {
            let [ours] = self.turns([guest(Place::Vmx)])?;
            println!("  twofold, VMX: {:.3} us", middle(&ours) / 1e3);
            return Ok(());
        }
        let [ours, theirs] = self.turns([guest(Place::Vmx), guest(Place::Svm)])?;
        println!("  twofold, VMX:                  {:>7.3} us", middle(&ours) / 1e3);
        println!("  QEMU TCG, SVM, nested paging:  {:>7.3} us", middle(&theirs) / 1e3);
        println!("  ratio QEMU / twofold:          {:>7.2}", paired(&theirs, &ours));
        Ok(())
    }

    fn misses(&self) -> Result<(), String> {
        println!("\nTLB miss, 4-level paging of 4 KiB pages, in L2 under 4-level EPT of 4 KiB pages (at most 2.0):");
        println!("  {:<10} {:>9} {:>9} {:>7}", "frames", "L1 ns", "L2 ns", "ratio");
        for frames in [1 << 10, FRAMES] {
            let guest = |place, pages| Guest { place, work: Work::Pages { pages, frames } };
            // The last is what the loop takes without misses.
            let [one, two, hit] =
                self.turns([guest(Place::L1, DATA_PAGES), guest(Place::Vmx, DATA_PAGES), guest(Place::L1, 16)])?;
            let less = |all: &[f64]| all.iter().zip(&hit).map(|(t, h)| t - h).collect::<Vec<_>>();
            let (one, two) = (less(&one), less(&two));
            let what = format!("{} MiB", frames >> 8);
            println!("  {what:<10} {:>9.1} {:>9.1} {:>7.2}", middle(&one), middle(&two), paired(&two, &one));
        }
        Ok(())
    }

    fn boot(&self) -> Result<(), String> {
        println!(
            "\nDebian to userland: L2 from the start of the VMM, L1 alone from the start of twofold (at most 2.5):"
        );
        let guests = guests::boots()?;
        let command = |initrd: &Path, memory: &str| {
            let mut c = Command::new(&self.twofold);
            c.args(["run", "--memory", memory, "--append", "console=ttyS0 quiet", "--kernel"]).arg(&guests.kernel);
            c.arg("--initrd").arg(initrd);
            c
        };
        let limit = Duration::from_secs(300);
        let (mut l1, mut l2) = (Vec::new(), Vec::new());
        for i in 0..=self.runs {
            let alone = measure(&mut command(&guests.alone, "256M"), guests::USERLAND, limit);
            let nested = measure(&mut command(&guests.nested, "768M"), "", limit);
            let (alone, nested) = (alone.map_err(|e| e.to_string())?, nested.map_err(|e| e.to_string())?);
            let one = alone.marker.ok_or_else(|| format!("L1 did not boot: {}", alone.stderr))?.as_secs_f64();
            let two = l2_seconds(&nested)?;
            if i > 0 {
                l1.push(one);
                l2.push(two);
            }
            println!("  L1 {one:>7.3} s   L2 {two:>7.3} s{}", if i == 0 { " (warm-up)" } else { "" });
        }
        println!("  median L1 {:.3} s, L2 {:.3} s, ratio {:.2}", middle(&l1), middle(&l2), paired(&l2, &l1));
        Ok(())
    }
}

/// What the VMM printed: seconds from its start to L2's userland.
fn l2_seconds(run: &Run) -> Result<f64, String> {
    let text = format!("kvm-linux: \"{}\" after ", guests::USERLAND);
    run.stdout
        .split_once(&text)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| format!("L2 did not boot: status {:?}, {:?}", run.status, run.stdout.lines().last()))
}

fn middle(values: &[f64]) -> f64 {
    median(values.to_vec()).unwrap_or(f64::NAN)
}

/// The median of `a / b` of each pair.
fn paired(a: &[f64], b: &[f64]) -> f64 {
    median(a.iter().zip(b).map(|(a, b)| a / b).collect()).unwrap_or(f64::NAN)
}

fn bench() -> Result<(), String> {
    let (mut runs, mut twofold, mut only) = (5, None, "speed,exits,misses,boot".to_owned());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--runs" => runs = value()?.parse().map_err(|_| "--runs needs a number".to_owned())?,
            "--only" => only = value()?,
            "--twofold" => twofold = Some(PathBuf::from(value()?)),
            _ => return Err(format!("unknown argument {arg}; see the top of vmx.rs")),
        }
    }
    let qemu = Command::new("qemu-system-x86_64").arg("--version").output().is_ok_and(|o| o.status.success());
    if !qemu {
        eprintln!("vmx: no qemu-system-x86_64 here; leaving it out");
    }
    let bench = Bench { twofold: twofold.map_or_else(build_twofold, Ok)?, runs: usize::max(runs, 1), qemu };
    for part in only.split(',') {
        match part {
            "speed" => bench.speed()?,
            "exits" => bench.exits()?,
            "misses" => bench.misses()?,
            "boot" => bench.boot()?,
            _ => return Err(format!("unknown part {part}: speed, exits, misses or boot")),
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("vmx: error: {why}");
            ExitCode::from(2)
        }
    }
}
