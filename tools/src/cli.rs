//! The command line: what may be said, what it means, what is wrong with it.
//!
//! Place in the pipeline: arguments come here after [`crate::qemu`] has spelled QEMU's options our way; a [`Config`] leaves.
//! Invariant: every value is checked here, before a file is opened, so a mistake costs one line and exit status 2.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use twofold_runtime::config::{
    Config, Console, DebugItem, DebugItems, FlushPolicy, MAX_CPUS, MAX_MEMORY, MIN_MEMORY, OnReset, Output, PerfMode,
    Tier,
};

const EXAMPLES: &str = "\
Examples:
  Boot a Linux kernel with an initramfs; its console is this terminal:
    twofold run --kernel vmlinuz --initrd initrd.zst --append console=ttyS0
  The same in QEMU's spelling:
    twofold run -kernel vmlinuz -initrd initrd.zst -append console=ttyS0 -m 512M -nographic
  A bare-metal test kernel, at most ten seconds, with statistics:
    twofold run --kernel test.elf --timeout 10 --stats stats.json; echo $?
    twofold stats stats.json
  Watch twofold work, without a download:
    twofold demo

On a terminal, Ctrl-a x quits and Ctrl-a h helps.

Exit status of run and demo:
  0    the guest powered off (or Ctrl-a x)
  odd  (v << 1) | 1, masked to 8 bits: the guest wrote v to port 0xf4
  2    bad usage, or a file that cannot be used
  4    --timeout ran out
  6    triple fault or reset, with --on-reset exit
  8    the guest can never wake: HLT with interrupts off
  10   an error in twofold itself
  128+n  signal n ended the run";

/// An x86 computer in software: a JIT with VMX and EPT.
#[derive(Debug, Parser)]
#[command(name = "twofold", version, after_help = EXAMPLES, disable_help_subcommand = true, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a kernel or firmware
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Run the embedded guest: every paging mode, faults, address-space switches, a hypervisor and its guests
    Demo(DemoArgs),
    /// Show CPU models and their features
    Cpu {
        /// What to show.
        #[command(subcommand)]
        what: Option<CpuCommand>,
    },
    /// Show a --stats file as tables for a person
    Stats {
        /// The file that `run --stats` wrote
        file: PathBuf,
    },
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, of twofold or of one of its commands
    Man {
        /// The command
        command: Option<String>,
    },
}

/// What to show about CPU models.
#[derive(Debug, Subcommand)]
pub enum CpuCommand {
    /// List the models
    List,
    /// Show a model's features and capabilities
    Show {
        /// MODEL[,+feature,-feature]
        model: String,
    },
}

/// Arguments of `demo`.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Write the guest to a file (a Multiboot image) instead of running it
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// How code is run
    #[arg(long, value_enum, default_value = "auto")]
    pub tier: TierArg,
    /// Write statistics to a file, or to standard output with -
    #[arg(long, value_name = "FILE|-", value_parser = parse_output)]
    pub stats: Option<Output>,
}

/// Arguments of `run`.
#[derive(Args, Debug)]
#[command(args_override_self = true)]
pub struct RunArgs {
    /// Kernel: Linux bzImage, ELF with a PVH note, or Multiboot 1
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub kernel: Option<PathBuf>,
    /// Firmware ROM (64K to 16M), started at the reset vector
    #[arg(long, value_name = "FILE", help_heading = "Guest", conflicts_with = "kernel")]
    pub firmware: Option<PathBuf>,
    /// Initial RAM disk; for Multiboot, modules: FILE[ ARGS][,FILE...]
    #[arg(long, value_name = "FILE", help_heading = "Guest", conflicts_with = "firmware")]
    pub initrd: Option<String>,
    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        help_heading = "Guest",
        allow_hyphen_values = true,
        default_value = "",
        hide_default_value = true
    )]
    pub append: String,
    /// Guest memory: bytes with K, M, G or T, or a number of MiB
    #[arg(short = 'm', long, value_name = "SIZE", help_heading = "Machine", default_value = "512M", value_parser = parse_memory, allow_hyphen_values = true)]
    pub memory: u64,
    /// Number of processors
    #[arg(long, value_name = "N", help_heading = "Machine", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CPUS as i64))]
    pub cpus: u32,
    /// CPU model and features; 'twofold cpu list' shows them
    #[arg(long, value_name = "MODEL[,+feature,-feature]", help_heading = "Machine", default_value = "max")]
    pub cpu: String,
    /// Serial port COM1
    #[arg(long, value_name = "stdio|file:PATH|none", help_heading = "Machine", default_value = "stdio", value_parser = parse_console)]
    pub serial: Console,
    /// Debug console, ports 0xe9 and 0x402
    #[arg(long, value_name = "stdio|file:PATH", help_heading = "Machine", default_value = "none", hide_default_value = true, value_parser = parse_console)]
    pub debugcon: Console,
    /// What a reset or triple fault does
    #[arg(long, value_enum, default_value = "exit", help_heading = "Machine")]
    pub on_reset: OnResetArg,
    /// How code is run
    #[arg(long, value_enum, default_value = "auto", help_heading = "Execution")]
    pub tier: TierArg,
    /// Keep hot loops out of the optimising tier, for comparison and for bisecting
    #[arg(long, hide = true)]
    pub no_regions: bool,
    /// Have Cranelift make blocks too, not only regions, for comparison and for bisecting
    #[arg(long, hide = true)]
    pub cranelift_blocks: bool,
    /// Most memory for translated code
    #[arg(long, value_name = "SIZE", default_value = "512M", help_heading = "Execution", value_parser = parse_code_memory)]
    pub code_memory: u64,
    /// Keep compiled code in this directory, so that a guest's next run starts warm; whoever can write there can run code
    #[arg(long, value_name = "DIR", help_heading = "Execution")]
    pub code_cache: Option<PathBuf>,
    /// What VMX transitions do to cached translations
    #[arg(long, value_enum, default_value = "tagged", help_heading = "Execution")]
    pub flush_policy: FlushArg,
    /// End the run after this long (exit status 4)
    #[arg(long, value_name = "SECONDS", help_heading = "Execution", value_parser = parse_seconds, allow_hyphen_values = true)]
    pub timeout: Option<Duration>,
    /// Write statistics to a file, or to standard output with -
    #[arg(long, value_name = "FILE|-", help_heading = "Seeing", value_parser = parse_output)]
    pub stats: Option<Output>,
    /// Tell perf about guest code: a map file, or a dump for 'perf inject --jit'
    #[arg(long, value_enum, help_heading = "Seeing")]
    pub perf: Option<PerfArg>,
    /// Names for guest addresses: a vmlinux or System.map; without it, Linux's own tables are found in guest memory
    #[arg(long, value_name = "FILE", help_heading = "Seeing")]
    pub symbols: Option<PathBuf>,
    /// Trace; '-d help' lists the items
    #[arg(short = 'd', value_name = "ITEM,ITEM...", help_heading = "Seeing", value_parser = parse_debug_items)]
    pub debug: Option<DebugArg>,
    /// Write traces to a file instead of standard error
    #[arg(long, value_name = "FILE", help_heading = "Seeing")]
    pub trace_file: Option<PathBuf>,
    /// Warnings of the QEMU spelling; see [`crate::qemu`].
    #[arg(long = "note", hide = true, action = ArgAction::Append)]
    pub notes: Vec<String>,
}

/// The value of `-d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugArg {
    /// `-d help`.
    Help,
    /// These.
    Items(DebugItems),
}

macro_rules! value_enum {
    ($(#[$doc:meta])* $name:ident => $target:ident { $($(#[$vdoc:meta])* $variant:ident),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub enum $name { $($(#[$vdoc])* $variant),* }
        impl From<$name> for $target {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => $target::$variant),* }
            }
        }
    };
}

value_enum!(
    /// `--tier`.
    TierArg => Tier {
        /// The evaluator for cold code, compiled code for warm
        Auto,
        /// The evaluator only
        Eval,
        /// Compile everything, quickly
        Quick,
        /// Compile everything, well
        Opt
    }
);
value_enum!(
    /// `--flush-policy`.
    FlushArg => FlushPolicy {
        /// Keep what VPID, PCID and EP4TA let us keep
        Tagged,
        /// Flush everything
        Full
    }
);
value_enum!(
    /// `--on-reset`.
    OnResetArg => OnReset {
        /// End the run with status 6
        Exit,
        /// Start the machine again
        Reset
    }
);
value_enum!(
    /// `--perf`.
    PerfArg => PerfMode {
        /// /tmp/perf-PID.map
        Map,
        /// jit-PID.dump
        Jitdump
    }
);

impl RunArgs {
    /// The run that these arguments ask for; without `escape`, which depends on the terminal.
    pub fn to_config(&self) -> Config {
        Config {
            kernel: self.kernel.clone(),
            firmware: self.firmware.clone(),
            initrd: self.initrd.clone(),
            append: self.append.clone(),
            memory: self.memory,
            cpus: self.cpus,
            cpu_model: self.cpu.clone(),
            serial: self.serial.clone(),
            debugcon: self.debugcon.clone(),
            tier: self.tier.into(),
            regions: !self.no_regions,
            cranelift_blocks: self.cranelift_blocks,
            code_memory: self.code_memory,
            code_cache: self.code_cache.clone(),
            flush_policy: self.flush_policy.into(),
            timeout: self.timeout,
            on_reset: self.on_reset.into(),
            stats: self.stats.clone(),
            perf: self.perf.map(Into::into),
            symbols: self.symbols.clone(),
            debug: match self.debug {
                Some(DebugArg::Items(items)) => items,
                _ => DebugItems::default(),
            },
            trace_file: self.trace_file.clone(),
            ..Config::default()
        }
    }
}

/// The text of `-d help`.
pub fn debug_help() -> String {
    DebugItem::ALL.iter().map(|(_, name, what)| format!("{name:<8} {what}\n")).collect()
}

/// As [`parse_memory`], within what code memory can be: near jumps reach 2 GiB.
fn parse_code_memory(text: &str) -> Result<u64, String> {
    match parse_memory(text)? {
        n if n < 2 << 20 => Err(String::from("translated code needs at least 2M")),
        n if n > 1 << 30 => Err(String::from("translated code can use at most 1G")),
        n => Ok(n),
    }
}

/// `512M`, `1G`, `65536K`; a bare number is MiB, as QEMU's `-m` has it.
fn parse_memory(text: &str) -> Result<u64, String> {
    const ADVICE: &str = "write a size such as 512M or 2G";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "M" | "m" | "MiB" => 20,
        "K" | "k" | "KiB" => 10,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return Err(format!("not a memory size; {ADVICE}")),
    };
    if number.is_empty() {
        return Err(format!("not a memory size; {ADVICE}"));
    }
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        Some(n) if n < MIN_MEMORY => Err(format!("the guest needs at least 1M of memory; {ADVICE}")),
        Some(n) if n > MAX_MEMORY => Err(format!("more than the machine can address (1T); {ADVICE}")),
        // The physical map is made of pages.
        Some(n) => Ok(n & !0xfff),
        None => Err(format!("more than the machine can address (1T); {ADVICE}")),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds =
        text.parse::<f64>().map_err(|_| String::from("not a number of seconds; write one such as 10 or 0.5"))?;
    if seconds <= 0.0 || seconds.is_nan() {
        return Err(String::from("the time must be more than zero"));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| String::from("more seconds than there are; leave --timeout out"))
}

fn parse_console(text: &str) -> Result<Console, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(Console::Stdio),
        None if text == "none" => Ok(Console::None),
        Some(("file", path)) if !path.is_empty() => Ok(Console::File(PathBuf::from(path))),
        _ => Err(String::from("write stdio, file:PATH or none")),
    }
}

fn parse_output(text: &str) -> Result<Output, String> {
    match text {
        "" => Err(String::from("name a file, or - for standard output")),
        "-" => Ok(Output::Stdout),
        path => Ok(Output::File(PathBuf::from(path))),
    }
}

fn parse_debug_items(text: &str) -> Result<DebugArg, String> {
    if text == "help" {
        return Ok(DebugArg::Help);
    }
    let mut items = DebugItems::default();
    for name in text.split(',').filter(|n| !n.is_empty()) {
        if !items.insert_named(name) {
            return Err(format!("there is no trace '{name}'; '-d help' lists them"));
        }
    }
    Ok(DebugArg::Items(items))
}

/// A usage error in one line: what is wrong and what to do.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut parts: Vec<String> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        let line = line.strip_prefix("error: ").unwrap_or(line);
        match parts.last_mut() {
            // A list that a colon announced, or the possible values, belong to their line.
            Some(last) if last.ends_with(':') || line.starts_with('[') => {
                last.push(' ');
                last.push_str(line);
            }
            _ => parts.push(line.to_owned()),
        }
    }
    format!("{}; 'twofold --help' shows how it is used", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(args: &[&str]) -> Result<RunArgs, String> {
        let args = ["twofold", "run"].iter().chain(args);
        match Cli::try_parse_from(args) {
            Ok(Cli { command: Command::Run(args) }) => Ok(*args),
            Ok(_) => panic!(),
            Err(e) => Err(one_line(&e)),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let config = run(&["--kernel", "k"]).unwrap().to_config();
        assert_eq!((config.memory, config.cpus, config.cpu_model.as_str()), (512 << 20, 1, "max"));
        assert_eq!((config.serial, config.debugcon), (Console::Stdio, Console::None));
        assert_eq!((config.tier, config.on_reset), (Tier::Auto, OnReset::Exit));
        assert!(config.stats.is_none() && config.timeout.is_none() && config.debug.is_empty());
    }

    #[test]
    fn everything_said() {
        let args = run(&[
            "--kernel=k",
            "--initrd",
            "i",
            "--append",
            "-x console=ttyS0",
            "--memory",
            "2G",
            "--cpus",
            "4",
            "--cpu",
            "max,-la57",
            "--serial",
            "file:/tmp/out",
            "--debugcon",
            "stdio",
            "--tier",
            "quick",
            "--flush-policy",
            "full",
            "--timeout",
            "1.5",
            "--on-reset",
            "reset",
            "--stats",
            "-",
            "--perf",
            "jitdump",
            "-d",
            "int,vmx",
            "--trace-file",
            "t",
        ]);
        let c = args.unwrap().to_config();
        assert_eq!((c.append.as_str(), c.memory, c.cpus), ("-x console=ttyS0", 2 << 30, 4));
        assert_eq!((c.serial, c.debugcon), (Console::File("/tmp/out".into()), Console::Stdio));
        assert_eq!((c.tier, c.flush_policy, c.on_reset), (Tier::Quick, FlushPolicy::Full, OnReset::Reset));
        assert_eq!(
            (c.timeout, c.stats, c.perf),
            (Some(Duration::from_millis(1500)), Some(Output::Stdout), Some(PerfMode::Jitdump))
        );
        assert!(c.debug.has(DebugItem::Int) && c.debug.has(DebugItem::Vmx) && !c.debug.has(DebugItem::Io));
    }

    #[test]
    fn memory_sizes() {
        for (text, bytes) in
            [("512M", 512u64 << 20), ("512", 512 << 20), ("1G", 1 << 30), ("4096K", 4 << 20), ("1T", 1 << 40)]
        {
            assert_eq!(parse_memory(text), Ok(bytes), "{text}");
        }
        for text in [
            "0",
            "0M",
            "",
            "M",
            "abc",
            "-5M",
            "512X",
            "1e9",
            "99999999999999999999",
            "18446744073709551615G",
            "1024T",
            "4K",
        ] {
            assert!(parse_memory(text).is_err(), "{text}");
            assert!(run(&["--kernel", "k", &format!("--memory={text}")]).unwrap_err().contains("memory"));
        }
    }

    #[test]
    fn mistakes_take_one_line_that_names_them() {
        for (args, named) in [
            (&["--kernel", "k", "--firmware", "f"][..], "--firmware"),
            (&["--kernel", "k", "--tier", "warp"], "warp"),
            (&["--kernel", "k", "--timeout", "-1"], "-1"),
            (&["--kernel", "k", "--timeout", "soon"], "soon"),
            (&["--kernel", "k", "--cpus", "0"], "0"),
            (&["--kernel", "k", "--cpus", "100000"], "100000"),
            (&["--kernel", "k", "--serial", "smoke"], "smoke"),
            (&["--kernel", "k", "-dnonsense"], "nonsense"),
            (&["--frobnicate"], "frobnicate"),
            (&["--kernel"], "--kernel"),
        ] {
            let text = run(args).unwrap_err();
            assert!(text.contains(named) && !text.contains('\n') && !text.contains("Usage"), "{text}");
        }
        assert!(run(&["--kernel", "k", "--tier", "warp"]).unwrap_err().contains("eval"));
    }

    #[test]
    fn the_last_of_a_repeated_option_counts() {
        assert_eq!(
            run(&["--kernel", "a", "--memory", "1G", "--kernel", "b", "-m", "16M"]).unwrap().to_config().memory,
            16 << 20
        );
    }

    #[test]
    fn the_debug_help_lists_every_item() {
        assert_eq!(debug_help().lines().count(), DebugItem::ALL.len());
        assert_eq!(parse_debug_items("help"), Ok(DebugArg::Help));
    }
}
