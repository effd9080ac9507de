//! Guest instructions a second in hot loops: the evaluator, compiled code, and QEMU's TCG side by side, in one run.
//!
//! `cargo run --release -p twofold-benches --bin guest-speed -- [--seconds 0.5] [--engines eval,auto,quick,qemu]
//! [--kernels alu,...]`. The time of the same guest with no turns (start-up, and QEMU's firmware) is subtracted.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use twofold_benches::kernels::{KERNELS, Kernel};
use twofold_benches::{build_twofold, measure};

const LIMIT: Duration = Duration::from_secs(120);

struct Engine {
    name: String,
    /// What a start costs that no loop is to blame for, in seconds.
    start: f64,
}

impl Engine {
    fn command(&self, twofold: &Path, image: &Path) -> Command {
        if self.name == "qemu" {
            let mut c = Command::new("qemu-system-x86_64");
            c.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "64M", "-nographic", "-no-reboot"]);
            c.args(["-nodefaults", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"]).arg(image);
            c
        } else {
            let mut c = Command::new(twofold);
            c.args(["run", "--memory", "64M", "--serial", "none", "--tier", &self.name, "--kernel"]).arg(image);
            c
        }
    }

    /// Seconds of a run of `turns`.
    fn time(&self, twofold: &Path, kernel: &Kernel, turns: u64) -> Result<f64, String> {
        let file = std::env::temp_dir().join(format!("guest-speed-{}-{}", std::process::id(), kernel.name));
        let image = kernel.image(turns).map_err(|e| e.to_string())?;
        std::fs::write(&file, image).map_err(|e| e.to_string())?;
        let run = measure(&mut self.command(twofold, &file), "", LIMIT);
        let _ = std::fs::remove_file(&file);
        let run = run.map_err(|e| format!("{}: {e}", self.name))?;
        match run.status {
            Some(1) => Ok(run.wall.as_secs_f64()),
            status => Err(format!("{}, {}: status {status:?}: {}", self.name, kernel.name, run.stderr.trim_end())),
        }
    }

    /// Guest instructions a second; the run is made longer until it lasts `seconds`.
    fn speed(&self, twofold: &Path, kernel: &Kernel, seconds: f64) -> Result<f64, String> {
        let mut turns = 200_000;
        loop {
            let time = self.time(twofold, kernel, turns)? - self.start;
            if time >= seconds || turns > 1 << 40 {
                return Ok(turns as f64 * kernel.instructions / time);
            }
            turns = (turns as f64 * (1.2 * seconds / time.max(0.01)).clamp(2.0, 40.0)) as u64;
        }
    }
}

fn bench() -> Result<(), String> {
    let mut seconds = 0.5;
    let mut engines = "eval,quick,qemu".to_owned();
    let mut kernels: Vec<String> = KERNELS.iter().map(|k| k.name.to_owned()).collect();
    let mut twofold: Option<PathBuf> = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--seconds" => seconds = value()?.parse().map_err(|_| "--seconds needs a number".to_owned())?,
            "--engines" => engines = value()?,
            "--kernels" => kernels = value()?.split(',').map(str::to_owned).collect(),
            "--twofold" => twofold = Some(value()?.into()),
            _ => return Err(format!("unknown argument {arg}; see the top of guest-speed.rs")),
        }
    }
    let twofold = twofold.map_or_else(build_twofold, Ok)?;
    let mut all = Vec::new();
    for name in engines.split(',') {
        if name == "qemu" && Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
            eprintln!("guest-speed: no qemu-system-x86_64 here; leaving it out");
            continue;
        }
        let mut engine = Engine { name: name.to_owned(), start: 0.0 };
        let starts = (0..3).map(|_| engine.time(&twofold, &KERNELS[0], 0)).collect::<Result<Vec<_>, _>>()?;
        engine.start = starts.into_iter().fold(f64::MAX, f64::min);
        all.push(engine);
    }
    println!("million guest instructions a second; start-up subtracted:");
    print!("{:<10} {:<28}", "loop", "");
    all.iter().for_each(|e| print!(" {:>9}", e.name));
    println!();
    for kernel in KERNELS.iter().filter(|k| kernels.iter().any(|n| n == k.name)) {
        print!("{:<10} {:<28}", kernel.name, kernel.what);
        for engine in &all {
            print!(" {:>9.0}", engine.speed(&twofold, kernel, seconds)? / 1e6);
        }
        println!();
    }
    print!("{:<10} {:<28}", "start-up", "milliseconds");
    all.iter().for_each(|e| print!(" {:>9.0}", e.start * 1e3));
    println!();
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("guest-speed: error: {why}");
            ExitCode::from(2)
        }
    }
}
