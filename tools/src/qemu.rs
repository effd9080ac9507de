//! QEMU's spelling of our options, so that a script written for `qemu-system-x86_64` needs one word changed.
//!
//! Place in the pipeline: before [`crate::cli`], on plain strings. Invariant: what changes nothing here is dropped with a note on
//! standard error; what would change the guest's machine in a way we cannot give is an error.

/// What an option of QEMU's becomes.
enum Meaning {
    /// This option of ours, with the value that follows.
    Value(&'static str),
    /// The value that follows, translated.
    With(fn(&str) -> Result<Vec<String>, String>),
    /// These arguments.
    Flag(&'static [&'static str]),
    /// Nothing to do; a value follows.
    IgnoredValue,
    /// Cannot be had.
    Missing(&'static str),
}

/// The options we know.
const OPTIONS: &[(&str, Meaning)] = &[
    ("kernel", Meaning::Value("--kernel")),
    ("initrd", Meaning::Value("--initrd")),
    ("append", Meaning::Value("--append")),
    ("bios", Meaning::Value("--firmware")),
    ("cpu", Meaning::Value("--cpu")),
    ("D", Meaning::Value("--trace-file")),
    ("m", Meaning::With(memory)),
    ("smp", Meaning::With(processors)),
    ("serial", Meaning::With(serial)),
    ("debugcon", Meaning::With(debugcon)),
    ("device", Meaning::With(device)),
    ("nographic", Meaning::Flag(&["--serial=stdio"])),
    ("no-reboot", Meaning::Flag(&["--on-reset=exit"])),
    ("no-shutdown", Meaning::Missing("the run ends when the guest powers off; leave it out")),
    ("nodefaults", Meaning::Flag(&[])),
    ("no-user-config", Meaning::Flag(&[])),
    ("enable-kvm", Meaning::Flag(&["--note=-enable-kvm is ignored: twofold always translates"])),
    ("M", Meaning::With(machine)),
    ("machine", Meaning::With(machine)),
    ("accel", Meaning::With(accelerator)),
    ("display", Meaning::IgnoredValue),
    ("vga", Meaning::IgnoredValue),
    ("monitor", Meaning::IgnoredValue),
    ("parallel", Meaning::IgnoredValue),
    ("net", Meaning::With(network)),
    ("nic", Meaning::With(network)),
    ("name", Meaning::IgnoredValue),
    ("rtc", Meaning::IgnoredValue),
    ("s", Meaning::Missing("the GDB server is not implemented yet; leave it out")),
    ("S", Meaning::Missing("there is no monitor to start the guest from; leave it out")),
    ("gdb", Meaning::Missing("the GDB server is not implemented yet; leave it out")),
    ("hda", Meaning::Missing("there are no disks yet; give an initramfs with --initrd")),
    ("drive", Meaning::Missing("there are no disks yet; give an initramfs with --initrd")),
    ("cdrom", Meaning::Missing("there are no disks yet; give an initramfs with --initrd")),
    ("netdev", Meaning::Missing("there is no network yet; leave it out")),
];

/// Rewrites the arguments after the program's name. `run` may be left out when the first argument is one of QEMU's options.
///
/// # Errors
/// One line about an option that cannot be had.
pub fn normalise(args: impl IntoIterator<Item = String>) -> Result<Vec<String>, String> {
    let mut args = args.into_iter().peekable();
    let mut out = Vec::new();
    match args.peek() {
        Some(first) if find(first).is_some() => out.push(String::from("run")),
        Some(first) if first == "run" => out.extend(args.next()),
        // The other commands have no options of QEMU's.
        _ => return Ok(args.collect()),
    }
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(args);
            break;
        }
        let Some((name, meaning)) = find(&arg) else {
            let takes_value = arg.starts_with("--") && !arg.contains('=') && arg != "--help" && arg != "--version";
            out.push(arg);
            // The value of an option of ours is not looked at: `--append -kernel` is text.
            if takes_value {
                out.extend(args.next());
            }
            continue;
        };
        let mut value =
            || args.next().ok_or_else(|| format!("{arg} needs a value; 'twofold run --help' shows how it is used"));
        match meaning {
            Meaning::Value(ours) => out.push(format!("{ours}={}", value()?)),
            Meaning::With(translate) => {
                let value = value()?;
                out.extend(translate(&value).map_err(|e| format!("-{name} {value}: {e}"))?);
            }
            Meaning::Flag(ours) => out.extend(ours.iter().map(|s| (*s).to_owned())),
            Meaning::IgnoredValue => {
                value()?;
            }
            Meaning::Missing(advice) => return Err(format!("-{name}: {advice}")),
        }
    }
    Ok(out)
}

/// The option that `arg` is in QEMU's spelling: one dash, or two where we have no such option.
fn find(arg: &str) -> Option<(&'static str, &'static Meaning)> {
    let name = arg.strip_prefix('-')?;
    OPTIONS.iter().find(|(n, _)| *n == name).map(|(n, m)| (*n, m))
}

/// The value of `key` in `a,key=value`, or the first part when that has no key.
fn part<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split(',').enumerate().find_map(|(i, part)| match part.split_once('=') {
        Some((k, v)) => (k == key).then_some(v),
        None => (i == 0).then_some(part),
    })
}

fn memory(value: &str) -> Result<Vec<String>, String> {
    let size = part(value, "size").ok_or("write a size such as 512M")?;
    Ok(vec![format!("--memory={size}")])
}

fn processors(value: &str) -> Result<Vec<String>, String> {
    let cpus = part(value, "cpus").ok_or("write a number of processors")?;
    Ok(vec![format!("--cpus={cpus}")])
}

fn console(value: &str) -> Result<String, String> {
    Ok(match value {
        "stdio" | "mon:stdio" => String::from("stdio"),
        "none" | "null" => String::from("none"),
        file if file.starts_with("file:") => file.to_owned(),
        _ => return Err(String::from("write stdio, file:PATH or none")),
    })
}

fn serial(value: &str) -> Result<Vec<String>, String> {
    Ok(vec![format!("--serial={}", console(value)?)])
}

fn debugcon(value: &str) -> Result<Vec<String>, String> {
    Ok(vec![format!("--debugcon={}", console(value)?)])
}

fn device(value: &str) -> Result<Vec<String>, String> {
    // Always there; its port and width do not matter as long as they are the usual ones.
    let mut parts = value.split(',');
    let (name, options) = (parts.next(), parts);
    match name {
        Some("isa-debug-exit") => {
            for option in options {
                if let Some(("iobase", port)) = option.split_once('=')
                    && !matches!(port, "0xf4" | "0xF4" | "244")
                {
                    return Err(String::from("the port is 0xf4 and cannot be changed"));
                }
            }
            Ok(Vec::new())
        }
        _ => Err(String::from("there is no such device; leave it out")),
    }
}

fn machine(value: &str) -> Result<Vec<String>, String> {
    Ok(vec![format!("--note=-M {value} is ignored: there is one machine, an ACPI PC without PCI")])
}

fn accelerator(value: &str) -> Result<Vec<String>, String> {
    Ok(match part(value, "accel") {
        Some("tcg") => Vec::new(),
        _ => vec![format!("--note=-accel {value} is ignored: twofold always translates")],
    })
}

fn network(value: &str) -> Result<Vec<String>, String> {
    if value == "none" { Ok(Vec::new()) } else { Err(String::from("there is no network yet; leave it out")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(args: &[&str]) -> Result<Vec<String>, String> {
        normalise(args.iter().map(|s| (*s).to_owned()))
    }

    #[test]
    fn a_qemu_line_becomes_ours() {
        let args = [
            "run",
            "-kernel",
            "k",
            "-initrd",
            "i",
            "-append",
            "-a b=c",
            "-m",
            "size=1G,slots=2",
            "-smp",
            "2,cores=2",
            "-cpu",
            "max",
            "-serial",
            "mon:stdio",
            "-nographic",
            "-no-reboot",
            "-display",
            "none",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
            "-accel",
            "tcg",
            "-nic",
            "none",
        ];
        assert_eq!(
            ours(&args).unwrap(),
            [
                "run",
                "--kernel=k",
                "--initrd=i",
                "--append=-a b=c",
                "--memory=1G",
                "--cpus=2",
                "--cpu=max",
                "--serial=stdio",
                "--serial=stdio",
                "--on-reset=exit"
            ]
        );
    }

    #[test]
    fn run_may_be_left_out() {
        assert_eq!(ours(&["-kernel", "k"]).unwrap(), ["run", "--kernel=k"]);
        assert_eq!(ours(&["--help"]).unwrap(), ["--help"]);
        assert_eq!(ours(&["-h"]).unwrap(), ["-h"]);
        assert_eq!(ours(&[]).unwrap(), [""; 0]);
    }

    #[test]
    fn our_own_spelling_is_left_alone() {
        let args = ["run", "--kernel", "-kernel", "--append", "-m", "-d", "int", "--memory=1G", "--", "-smp"];
        assert_eq!(ours(&args).unwrap(), args);
        assert_eq!(ours(&["stats", "-kernel"]).unwrap(), ["stats", "-kernel"]);
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        for (args, named) in [
            (&["run", "-s"][..], "GDB"),
            (&["run", "-S"], "-S"),
            (&["run", "-drive", "file=x"], "disk"),
            (&["run", "-device", "virtio-net"], "virtio-net"),
            (&["run", "-device", "isa-debug-exit,iobase=0x501"], "0xf4"),
            (&["run", "-serial", "pty"], "pty"),
            (&["run", "-kernel"], "needs a value"),
            (&["run", "-net", "user"], "network"),
        ] {
            let text = ours(args).unwrap_err();
            assert!(text.contains(named) && !text.contains('\n'), "{text}");
        }
        let noted = ours(&["run", "-M", "microvm", "-kernel", "k"]).unwrap();
        assert!(noted[1].starts_with("--note=-M microvm"), "{noted:?}");
    }
}
