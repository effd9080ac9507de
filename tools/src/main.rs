//! The `twofold` command: parses the command line, runs the guest, ends with the documented exit status.
//!
//! Place in the pipeline: above everything; no logic of the machine lives here. Arguments go through [`qemu`] (QEMU's spelling) to
//! [`cli`] (what may be said), then to [`command`] (what is done).

mod cli;
mod command;
mod demo;
mod qemu;
mod signals;
mod stats;
mod terminal;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use twofold_runtime::Error;

fn main() -> ExitCode {
    let status = match parse() {
        Ok(Some(cli)) => command::dispatch(cli),
        Ok(None) => Ok(0),
        Err(text) => Err(Error::Usage(text)),
    };
    let status = status.unwrap_or_else(|e| {
        let text: String = e.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = writeln!(std::io::stderr(), "twofold: error: {text}");
        e.exit_status()
    });
    let _ = std::io::stdout().flush();
    ExitCode::from(status)
}

/// The command line; none when it only asked for help, which has been printed.
fn parse() -> Result<Option<cli::Cli>, String> {
    let args = std::env::args_os().skip(1).map(OsString::into_string);
    let args: Vec<String> = args
        .collect::<Result<_, _>>()
        .map_err(|arg| format!("the argument {} is not UTF-8; rename the file", arg.to_string_lossy()))?;
    let args = qemu::normalise(args)?;
    match cli::Cli::try_parse_from(std::iter::once(String::from("twofold")).chain(args)) {
        Ok(cli) => Ok(Some(cli)),
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let _ = e.print();
            Ok(None)
        }
        Err(e)
            if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
                || e.kind() == ErrorKind::MissingSubcommand =>
        {
            Err(String::from("no command; 'twofold --help' lists them, 'twofold demo' shows what this is"))
        }
        Err(e) => Err(cli::one_line(&e)),
    }
}
