//! Boots Debian's kernel under twofold and under QEMU's TCG in turn, in one run, and prints both times and their ratio.
//!
//! `cargo run --release -p twofold-benches --bin boot-vs-qemu -- [--runs 5] [--quiet] ...` (see `--help`). The runs are
//! paired (A B A B ...) after one warm-up of each, so a machine that slows down slows both. QEMU's microvm sometimes hangs
//! when it calibrates its clock on a busy machine; such runs are counted and made again.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use twofold_benches::{Run, build_twofold, measure, median, root};

const HELP: &str = "boot-vs-qemu: boots Debian's cloud kernel under twofold and QEMU TCG in turn

  --runs N          pairs of runs (default 5)
  --warm-up N       runs of each before (default 1)
  --quiet           add `quiet` to the kernel's command line
  --append TEXT     the kernel's command line (default: console=ttyS0)
  --memory SIZE     default 512M
  --guests DIR      default: $TWOFOLD_GUESTS, or target/guests; filled by tools/guests/fetch
  --kernel FILE     default: amd64.vmlinuz of the guests
  --initrd FILE     default: hello64.zst of the guests
  --twofold FILE    default: built by cargo, next to this program
  --qemu FILE       default: qemu-system-x86_64; `none` measures twofold alone
  --limit SECONDS   a run that takes longer is killed and counted as hung (default 15)
  --json FILE       the numbers for a program
  -- ARGS           further arguments for `twofold run`
";

/// How often a run that hangs is tried.
const TRIES: usize = 4;

struct Options {
    runs: usize,
    warm_up: usize,
    append: String,
    memory: String,
    kernel: PathBuf,
    initrd: PathBuf,
    twofold: PathBuf,
    qemu: Option<PathBuf>,
    limit: Duration,
    json: Option<PathBuf>,
    more: Vec<String>,
}

fn options() -> Result<Options, String> {
    let mut args = std::env::args().skip(1);
    let guests = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let (mut runs, mut warm_up, mut limit) = (5, 1, 15);
    let (mut append, mut memory) = ("console=ttyS0".to_owned(), "512M".to_owned());
    let (mut quiet, mut guests, mut more) = (false, guests, Vec::new());
    let (mut kernel, mut initrd, mut twofold, mut json) = (None, None, None, None);
    let mut qemu = "qemu-system-x86_64".to_owned();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let number = |text: String| text.parse().map_err(|_| format!("not a number: {text}"));
        match arg.as_str() {
            "--runs" => runs = number(value()?)?,
            "--warm-up" => warm_up = number(value()?)?,
            "--limit" => limit = number(value()?)?,
            "--quiet" => quiet = true,
            "--append" => append = value()?,
            "--memory" => memory = value()?,
            "--guests" => guests = value()?.into(),
            "--kernel" => kernel = Some(PathBuf::from(value()?)),
            "--initrd" => initrd = Some(PathBuf::from(value()?)),
            "--twofold" => twofold = Some(PathBuf::from(value()?)),
            "--qemu" => qemu = value()?,
            "--json" => json = Some(PathBuf::from(value()?)),
            "--" => more.extend(args.by_ref()),
            "--help" | "-h" => {
                print!("{HELP}");
                std::process::exit(0);
            }
            _ => return Err(format!("unknown argument {arg}; see --help")),
        }
    }
    if kernel.is_none() || initrd.is_none() {
        let fetched = Command::new(root().join("tools/guests/fetch")).arg(&guests).status();
        if !fetched.is_ok_and(|s| s.success()) {
            return Err("tools/guests/fetch failed; name files with --kernel and --initrd".to_owned());
        }
    }
    if quiet {
        append.push_str(" quiet");
    }
    let installed = |q: &str| Command::new(q).arg("--version").output().is_ok_and(|o| o.status.success());
    let qemu = (qemu != "none").then(|| {
        if !installed(&qemu) {
            eprintln!("boot-vs-qemu: no {qemu} (Debian: apt-get install qemu-system-x86); measuring twofold alone");
            return None;
        }
        Some(PathBuf::from(&qemu))
    });
    Ok(Options {
        runs: usize::max(runs, 1),
        warm_up,
        append,
        memory,
        kernel: kernel.unwrap_or_else(|| guests.join("amd64.vmlinuz")),
        initrd: initrd.unwrap_or_else(|| guests.join("hello64.zst")),
        twofold: twofold.map_or_else(build_twofold, Ok)?,
        qemu: qemu.flatten(),
        limit: Duration::from_secs(limit as u64),
        json,
        more,
    })
}

fn twofold_command(o: &Options) -> Command {
    let mut c = Command::new(&o.twofold);
    c.arg("run").arg("--kernel").arg(&o.kernel).arg("--initrd").arg(&o.initrd);
    c.args(["--append", &o.append, "--memory", &o.memory]).args(&o.more);
    c
}

fn qemu_command(o: &Options, qemu: &Path) -> Command {
    let mut c = Command::new(qemu);
    c.args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", &o.memory, "-nographic", "-no-reboot"]);
    c.arg("-kernel").arg(&o.kernel).arg("-initrd").arg(&o.initrd).args(["-append", &o.append]);
    c
}

/// One side's good runs, and how many hung or failed.
#[derive(Default)]
struct Side {
    good: Vec<Run>,
    hung: usize,
    failed: usize,
}

impl Side {
    /// One run, once more when it hangs, kept unless it is for warming up. Its wall time, if it was good.
    fn take(
        &mut self,
        name: &str,
        warm: bool,
        limit: Duration,
        command: impl Fn() -> Command,
    ) -> std::io::Result<Option<f64>> {
        for _ in 0..TRIES {
            let run = measure(&mut command(), "BOOT-OK", limit)?;
            let wall = run.wall.as_secs_f64();
            match (run.status, run.marker) {
                (Some(0), Some(_)) => {
                    if !warm {
                        self.good.push(run);
                    }
                    return Ok(Some(wall));
                }
                (None, _) => {
                    self.hung += 1;
                    eprintln!("{name}: killed after {wall:.1} s; last line: {:?}", run.stdout.lines().last());
                }
                (status, _) => {
                    self.failed += 1;
                    eprintln!(
                        "{name}: exit status {status:?} without BOOT-OK; stderr: {:?}",
                        run.stderr.lines().last()
                    );
                    return Ok(None);
                }
            }
        }
        Ok(None)
    }

    fn column(&self, of: impl Fn(&Run) -> f64) -> Vec<f64> {
        self.good.iter().map(of).collect()
    }

    fn wall(&self) -> Option<f64> {
        median(self.column(|r| r.wall.as_secs_f64()))
    }

    fn row(&self, name: &str) -> String {
        let walls = self.column(|r| r.wall.as_secs_f64());
        let (min, max) = (walls.iter().copied().fold(f64::MAX, f64::min), walls.iter().copied().fold(0.0, f64::max));
        let (Some(wall), Some(marker), Some(cpu), Some(rss)) = (
            self.wall(),
            median(self.column(|r| r.marker.unwrap_or_default().as_secs_f64())),
            median(self.column(|r| r.cpu.as_secs_f64())),
            median(self.column(|r| r.peak_rss as f64 / f64::from(1 << 20))),
        ) else {
            return format!("{name:<10} no good run ({} hung, {} failed)", self.hung, self.failed);
        };
        let (good, hung, failed) = (self.good.len(), self.hung, self.failed);
        format!(
            "{name:<10} {wall:>8.3} {min:>8.3} {max:>8.3} {marker:>10.3} {cpu:>8.2} {rss:>10.0} {good:>5} {hung:>5} {failed:>6}"
        )
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "wall_seconds": self.column(|r| r.wall.as_secs_f64()),
            "boot_ok_seconds": self.column(|r| r.marker.unwrap_or_default().as_secs_f64()),
            "cpu_seconds": self.column(|r| r.cpu.as_secs_f64()),
            "peak_rss_bytes": self.good.iter().map(|r| r.peak_rss).collect::<Vec<_>>(),
            "hung": self.hung,
            "failed": self.failed,
        })
    }
}

fn version(program: &Path) -> String {
    let out = Command::new(program).arg("--version").output();
    out.ok()
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .and_then(|s| s.lines().next().map(str::to_owned))
        .unwrap_or_else(|| "unknown version".to_owned())
}

fn bench(o: &Options) -> std::io::Result<ExitCode> {
    println!("kernel {}, {}, \"{}\"", o.kernel.display(), o.memory, o.append);
    println!("A: {} {}", version(&o.twofold), o.more.join(" "));
    if let Some(qemu) = &o.qemu {
        println!("B: {}, -M microvm -accel tcg -cpu max", version(qemu));
    }
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    for i in 0..o.warm_up + o.runs {
        let warm = i < o.warm_up;
        let a = ours.take("twofold", warm, o.limit, || twofold_command(o))?;
        let b = match &o.qemu {
            Some(qemu) => theirs.take("qemu", warm, o.limit, || qemu_command(o, qemu))?,
            None => None,
        };
        let note = if warm { " (warm-up)" } else { "" };
        let seconds = |wall: Option<f64>| wall.map_or("-".to_owned(), |s| format!("{s:.3}"));
        println!("  A {:>7}   B {:>7}{note}", seconds(a), seconds(b));
    }
    println!();
    println!("           wall s      min      max  BOOT-OK s    cpu s   peak MiB  good  hung failed");
    println!("{}", ours.row("twofold"));
    if o.qemu.is_some() {
        println!("{}", theirs.row("qemu tcg"));
    }
    let ratio = ours.wall().zip(theirs.wall()).map(|(a, b)| a / b);
    if let Some(ratio) = ratio {
        println!("ratio of medians, twofold / qemu tcg: {ratio:.2}");
    }
    if let Some(file) = &o.json {
        let all = serde_json::json!({
            "schema": "twofold-boot-vs-qemu/1", "append": o.append, "memory": o.memory,
            "twofold": ours.json(), "qemu": theirs.json(), "ratio": ratio,
        });
        std::fs::write(file, format!("{all:#}\n"))?;
    }
    Ok(if ours.good.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn main() -> ExitCode {
    match options().and_then(|o| bench(&o).map_err(|e| e.to_string())) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("boot-vs-qemu: error: {why}");
            ExitCode::from(2)
        }
    }
}
