//! The benchmark suite: programs of every class in twofold, in QEMU's TCG and on the host in turn; a table, charts, history.
//!
//! `cargo run --release -p twofold-benches --bin suite` prints the table; `--write` also puts it into `docs/benchmarks.md`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use twofold_benches::suite::report::{Collected, System, bars, history, means, table};
use twofold_benches::suite::sample::{Samples, take};
use twofold_benches::suite::{chart, image};
use twofold_benches::{build_twofold, root};

const HELP: &str = "suite: benchmarks by class in twofold, QEMU TCG and natively, in turn

  --rounds N        boots of each system (default 3)
  --repeat N        warm runs of each program in a round (default 3)
  --only A,B        only these programs or classes
  --scale PERCENT   more or less work a run (default 100)
  --footprint       instead: time against code and data footprint; one of them with --only code, --only data
  --max-kib N       largest footprint (default: 65536 of code, 4194304 of data)
  --memory SIZE     of the guests (default 1024M; for footprints of data 5120M)
  --guests DIR      default: $TWOFOLD_GUESTS, or target/guests; filled by tools/guests/fetch
  --twofold FILE    default: built by cargo, next to this program
  --qemu FILE       default: qemu-system-x86_64; `none` leaves it out
  --no-native       leave out the host
  --limit SECONDS   a run that takes longer is killed and tried again (default 120)
  --write           put table and charts into docs/benchmarks.md, and a line into its history
  --json FILE       the numbers for a program, added as one line
  -- ARGS           further arguments for `twofold run`
";

/// How often a boot that hangs or fails is tried.
const TRIES: usize = 3;

struct Options {
    rounds: usize,
    guest: Vec<String>,
    footprint: bool,
    max_kib: Option<String>,
    memory: Option<String>,
    guests: PathBuf,
    twofold: PathBuf,
    qemu: Option<PathBuf>,
    native: bool,
    limit: Duration,
    write: bool,
    json: Option<PathBuf>,
    more: Vec<String>,
}

fn options() -> Result<Options, String> {
    let mut args = std::env::args().skip(1);
    let guests = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let (mut twofold, mut qemu) = (None, "qemu-system-x86_64".to_owned());
    let mut o = Options {
        rounds: 3,
        guest: Vec::new(),
        footprint: false,
        max_kib: None,
        memory: None,
        guests,
        twofold: PathBuf::new(),
        qemu: None,
        native: true,
        limit: Duration::from_secs(120),
        write: false,
        json: None,
        more: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let number = |text: String| text.parse::<usize>().map_err(|_| format!("not a number: {text}"));
        match arg.as_str() {
            "--rounds" => o.rounds = number(value()?)?.max(1),
            "--repeat" | "--only" | "--scale" => o.guest.extend([arg.clone(), value()?]),
            "--footprint" => o.footprint = true,
            "--max-kib" => o.max_kib = Some(value()?),
            "--memory" => o.memory = Some(value()?),
            "--guests" => o.guests = value()?.into(),
            "--twofold" => twofold = Some(PathBuf::from(value()?)),
            "--qemu" => qemu = value()?,
            "--no-native" => o.native = false,
            "--limit" => o.limit = Duration::from_secs(number(value()?)? as u64),
            "--write" => o.write = true,
            "--json" => o.json = Some(value()?.into()),
            "--" => o.more.extend(args.by_ref()),
            "--help" | "-h" => {
                print!("{HELP}");
                std::process::exit(0);
            }
            _ => return Err(format!("unknown argument {arg}; see --help")),
        }
    }
    if !o.guests.join("amd64.vmlinuz").exists() {
        let fetched = Command::new(root().join("tools/guests/fetch")).arg(&o.guests).status();
        if !fetched.is_ok_and(|s| s.success()) {
            return Err("tools/guests/fetch failed".to_owned());
        }
    }
    let installed = Command::new(&qemu).arg("--version").output().is_ok_and(|o| o.status.success());
    if !installed && qemu != "none" {
        eprintln!("suite: no {qemu} (Debian: apt-get install qemu-system-x86); doing without");
    }
    o.qemu = installed.then(|| qemu.into());
    o.twofold = twofold.map_or_else(build_twofold, Ok)?;
    Ok(o)
}

/// What is run where: the guest's files, and the arguments of its program.
struct Suite<'a> {
    options: &'a Options,
    programs: PathBuf,
    initrd: PathBuf,
    kernel: PathBuf,
}

impl Suite<'_> {
    fn command(&self, system: System, job: &[String]) -> Option<Command> {
        let o = self.options;
        // A frequency that is told need not be measured: QEMU's microvm cannot when the machine is busy.
        let khz = image::tsc_khz().filter(|_| system == System::Qemu);
        let told = khz.map_or(String::new(), |khz| format!("tsc_early_khz={khz} tsc=reliable "));
        // The largest footprints of data, and a kernel around them.
        let default = if job.first().is_some_and(|kind| kind == "data") { "5120M" } else { "1024M" };
        let memory = o.memory.as_deref().unwrap_or(default);
        let append = format!("console=ttyS0 quiet reboot=t {told}job={}", job.join("+"));
        match system {
            System::Twofold => {
                let mut c = Command::new(&o.twofold);
                c.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
                c.args(["--append", &append, "--memory", memory]).args(&o.more);
                Some(c)
            }
            System::Qemu => {
                let mut c = Command::new(o.qemu.as_ref()?);
                c.args(["-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", memory, "-nographic", "-no-reboot"]);
                c.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", &append]);
                Some(c)
            }
            System::Native => o.native.then(|| {
                let mut c = Command::new(&self.programs);
                c.args(job).arg("--pin");
                c
            }),
        }
    }

    fn take(&self, system: System, job: &[String]) -> Option<Samples> {
        for _ in 0..TRIES {
            match take(&mut self.command(system, job)?, self.options.limit) {
                Ok(samples) => return Some(samples),
                Err(why) => eprintln!("suite: {}: {why}", system.name()),
            }
        }
        None
    }

    /// The rounds, all systems in turn, so that a machine that slows down slows all of them.
    fn rounds(&self, jobs: &[Vec<String>]) -> Collected {
        let mut all = Collected::default();
        for round in 1..=self.options.rounds {
            for job in jobs {
                for system in System::ALL {
                    eprintln!("suite: round {round}, {}, {}", system.name(), job[0]);
                    if let Some(samples) = self.take(system, job) {
                        all.add(system, samples);
                    }
                }
            }
        }
        all
    }
}

/// The names of programs in the order in which they run.
fn order(programs: &Path) -> Vec<String> {
    let out = Command::new(programs).arg("list").output().map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&out).lines().map(str::to_owned).collect()
}

/// Today, as the Gregorian calendar has it.
fn today() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() / 86400) as i64;
    // Years begin in March, so that leap days come last; eras have 400 years.
    let z = days + 719_468;
    let (era, day) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let m = (5 * of_year + 2) / 153;
    let (month, carry) = if m < 10 { (m + 3, 0) } else { (m - 9, 1) };
    format!("{:04}-{month:02}-{:02}", year + era * 400 + carry, of_year - (153 * m + 2) / 5 + 1)
}

fn output_of(command: &mut Command) -> String {
    let out = command.output().ok().filter(|o| o.status.success()).map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&out).trim().to_owned()
}

fn head(o: &Options) -> serde_json::Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split(':').nth(1)).unwrap_or("").trim();
    serde_json::json!({
        "date": today(),
        "version": image::version(&o.twofold),
        "commit": output_of(Command::new("git").current_dir(root()).args(["describe", "--always", "--dirty"])),
        "qemu": o.qemu.as_ref().map(|q| image::version(q)),
        "host": cpu,
        "rounds": o.rounds,
    })
}

/// Replaces what stands between the marks `<!-- NAME -->` and `<!-- /NAME -->` of docs/benchmarks.md.
fn put(name: &str, text: &str) -> Result<(), String> {
    let path = root().join("docs/benchmarks.md");
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let page = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
    let from = page.find(&begin).ok_or_else(|| format!("no {begin}"))? + begin.len();
    let to = page.find(&end).ok_or_else(|| format!("no {end}"))?;
    std::fs::write(path, format!("{}\n{text}\n{}", &page[..from], &page[to..])).map_err(|e| e.to_string())
}

fn save(name: &str, text: &str) -> Result<(), String> {
    std::fs::write(root().join("docs").join(name), text).map_err(|e| e.to_string())
}

fn append(path: &Path, line: &str) -> Result<(), String> {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    std::fs::write(path, old + line).map_err(|e| e.to_string())
}

fn title(head: &serde_json::Value) -> String {
    let of = |key: &str| head[key].as_str().unwrap_or("-").to_owned();
    format!(
        "{}: {} ({}) and {} on {}, {} rounds.",
        of("date"),
        of("version"),
        of("commit"),
        of("qemu"),
        of("host"),
        head["rounds"]
    )
}

fn programs(o: &Options, suite: &Suite) -> Result<bool, String> {
    let mut job = vec!["run".to_owned()];
    job.extend(o.guest.iter().cloned());
    let all = suite.rounds(&[job]);
    let rows = all.rows(&order(&suite.programs));
    let head = head(o);
    let text = format!("{}\n\n{}\n{}", title(&head), means(&rows), table(&rows));
    println!("{text}");
    let line = history(&rows, &head);
    if let Some(file) = &o.json {
        append(file, &line)?;
    }
    if o.write {
        put("programs", &text)?;
        save("benchmarks.svg", &bars(&rows))?;
        append(&root().join("docs/benchmarks.jsonl"), &line)?;
    }
    Ok(!rows.is_empty() && rows.iter().all(|r| r.agrees))
}

fn footprint(o: &Options, suite: &Suite) -> Result<bool, String> {
    let job = |kind: &str, default: &str| {
        let kib = o.max_kib.clone().unwrap_or_else(|| default.to_owned());
        vec![kind.to_owned(), "--max-kib".to_owned(), kib]
    };
    let only = o.guest.iter().skip_while(|a| *a != "--only").nth(1);
    let wanted: Vec<_> = [
        ("code", "65536", &["first", "later"][..], "Time an instruction against hot code"),
        ("data", "4194304", &["later"][..], "Time an access against data"),
    ]
    .into_iter()
    .filter(|w| only.is_none_or(|kind| kind == w.0))
    .collect();
    let jobs: Vec<_> = wanted.iter().map(|&(kind, most, ..)| job(kind, most)).collect();
    let all = suite.rounds(&jobs);
    for (kind, _, phases, what) in wanted {
        let curves: Vec<chart::Curve> = System::ALL
            .iter()
            .flat_map(|&s| phases.iter().map(move |&p| (s, p)))
            .map(|(s, p)| (format!("{}, {p}", s.name()), all.curve(s, kind, p)))
            .filter(|c| !c.1.is_empty())
            .collect();
        let mut text = format!("{}\n\n{what}, ns:\n\n| KiB |", title(&head(o)));
        curves.iter().for_each(|c| text.push_str(&format!(" {} |", c.0)));
        text.push_str(&format!("\n|--:|{}\n", "--:|".repeat(curves.len())));
        for &(kib, _) in curves.first().map_or(&[][..], |c| &c.1) {
            text.push_str(&format!("| {kib} |"));
            for (_, points) in &curves {
                let at = points.iter().find(|p| p.0 == kib).map_or("–".to_owned(), |p| format!("{:.2}", p.1));
                text.push_str(&format!(" {at} |"));
            }
            text.push('\n');
        }
        println!("{text}");
        if o.write {
            put(&format!("footprint-{kind}"), &text)?;
            save(&format!("benchmarks-{kind}.svg"), &chart::curves(what, "ns", &curves))?;
        }
    }
    Ok(true)
}

fn bench(o: &Options) -> Result<bool, String> {
    let programs_file = image::build()?;
    let dir = programs_file.parent().ok_or("no directory")?.to_owned();
    let suite = Suite {
        options: o,
        initrd: dir.join("bench-initramfs"),
        programs: programs_file,
        kernel: o.guests.join("amd64.vmlinuz"),
    };
    image::initramfs(&o.guests, &suite.programs, &suite.initrd)?;
    if o.footprint { footprint(o, &suite) } else { programs(o, &suite) }
}

fn main() -> ExitCode {
    match options().and_then(|o| bench(&o)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("suite: error: {why}");
            ExitCode::from(2)
        }
    }
}
