//! The commands: each takes its arguments and gives an exit status.
//!
//! Place in the pipeline: between the parsed command line and the runtime. Invariants: the guest's output alone is on standard
//! output, with what `--stats -` asks for after it; every message of ours is on standard error.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;

use clap::CommandFactory;
use twofold_runtime::config::{Config, Console, Output};
use twofold_runtime::cpu::CpuModel;
use twofold_runtime::platform::acpi_pm;
use twofold_runtime::{Ending, Error, run};

use crate::cli::{Cli, Command, CpuCommand, DebugArg, DemoArgs, RunArgs, debug_help};
use crate::demo;
use crate::signals;
use crate::stats;
use crate::terminal::RawMode;

/// Does what the command line says; returns the exit status.
///
/// # Errors
/// One line for a person, with the exit status it goes with.
pub fn dispatch(cli: Cli) -> Result<u8, Error> {
    match cli.command {
        Command::Run(args) => run_guest(&args),
        Command::Demo(args) => run_demo(&args),
        Command::Cpu { what } => show_cpu(what.unwrap_or(CpuCommand::List)),
        Command::Stats { file } => stats::show(&file).map_err(Error::Usage).and_then(print),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "twofold", &mut script);
            print(String::from_utf8_lossy(&script).into_owned())
        }
        Command::Man { command } => manual(command.as_deref()),
    }
}

/// Prints to standard output; a reader that went away is no error.
fn print(text: String) -> Result<u8, Error> {
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

fn manual(command: Option<&str>) -> Result<u8, Error> {
    let mut all = Cli::command();
    all.build();
    let page = match command {
        None => all,
        Some(name) => all
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| Error::Usage(format!("there is no command '{name}'; 'twofold --help' lists them")))?,
    };
    let mut text = Vec::new();
    let rendered = clap_mangen::Man::new(page).render(&mut text);
    rendered.map_err(|e| Error::Internal(format!("the manual page: {e}")))?;
    print(String::from_utf8_lossy(&text).into_owned())
}

fn show_cpu(what: CpuCommand) -> Result<u8, Error> {
    print(match what {
        CpuCommand::List => CpuModel::list().map(|(name, about)| format!("{name:<15} {about}\n")).collect(),
        CpuCommand::Show { model } => CpuModel::parse(&model).map_err(Error::Usage)?.show(),
    })
}

fn run_guest(args: &RunArgs) -> Result<u8, Error> {
    if args.debug == Some(DebugArg::Help) {
        return print(debug_help());
    }
    if args.kernel.is_none() && args.firmware.is_none() {
        return Err(Error::Usage(String::from(
            "nothing to run; give --kernel FILE or --firmware FILE, or try 'twofold demo'",
        )));
    }
    for note in &args.notes {
        eprintln!("twofold: note: {note}");
    }
    execute(args.to_config())
}

fn run_demo(args: &DemoArgs) -> Result<u8, Error> {
    let power_off =
        demo::PowerOff { port: acpi_pm::PM1_CONTROL, value: u16::from(acpi_pm::SLEEP_TYPE_S5) << 10 | 1 << 13 };
    let image = demo::image(power_off).map_err(Error::Internal)?;
    if let Some(path) = &args.image {
        return std::fs::write(path, image).map(|()| 0).map_err(|e| cannot_write(path, &e));
    }
    execute(Config {
        kernel_image: Some(Arc::from(image)),
        memory: 64 << 20,
        tier: args.tier.into(),
        stats: args.stats.clone(),
        ..Config::default()
    })
}

fn cannot_write(path: &Path, e: &std::io::Error) -> Error {
    Error::Usage(format!("{}: cannot be written: {e}; name a file in a directory you may write to", path.display()))
}

/// Runs a guest with the terminal and the signals of this process.
fn execute(mut config: Config) -> Result<u8, Error> {
    // A run of minutes must not find out at its end that its statistics have no place to go.
    let stats_file = match &config.stats {
        Some(Output::File(path)) => Some((path.clone(), File::create(path).map_err(|e| cannot_write(path, &e))?)),
        _ => None,
    };
    config.escape = config.serial == Console::Stdio && std::io::stdin().is_terminal();
    let raw = config.escape.then(RawMode::enter).flatten();
    config.escape = raw.is_some();
    signals::watch(config.control.clone(), raw.as_ref().map(RawMode::saved));
    let result = run(&config);
    drop(raw);
    let outcome = result?;
    report(outcome.ending, outcome.registers.as_deref());
    if let Some(path) = &outcome.profile {
        eprintln!("twofold: note: the profile for perf is {}", path.display());
    }
    if let Some(json) = &outcome.stats {
        match stats_file {
            Some((path, mut file)) => writeln!(file, "{json}").map_err(|e| cannot_write(&path, &e))?,
            None => {
                let _ = writeln!(std::io::stdout(), "{json}");
            }
        }
    }
    // The process ends now; its memory goes back at once.
    std::mem::forget(outcome.remains);
    Ok(outcome.ending.exit_status())
}

/// Says on standard error why a run ended, unless the guest wanted it so.
fn report(ending: Ending, registers: Option<&str>) {
    let what = match ending {
        Ending::PowerOff | Ending::DebugExit(_) | Ending::Stopped(_) => return,
        Ending::Reset => "the guest reset the machine; --on-reset reset would start it again",
        Ending::TripleFault => "triple fault: an exception while a double fault was delivered; the registers were",
        Ending::Halted => "the guest can never wake: HLT with interrupts off; the registers were",
    };
    eprintln!("twofold: {what}");
    if let Some(registers) = registers {
        eprintln!("{}", registers.trim_end());
    }
}
