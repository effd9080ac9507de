//! Records and replays instruction vectors: `vectors record FILE [SEED ENCODINGS RUNS]`, `vectors check FILE`,
//! `vectors show FILE FORM`.
//!
//! `record` runs every form on the host CPU, and in our tiers to see that they agree; `check` replays a file in our tiers;
//! `show` prints a form's inputs and results in each tier (and on the host CPU, where that can be), for a comparison by eye.

use std::process::ExitCode;

use twofold_tests::cases::generated;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
use twofold_tests::insn::{Outcome, Regs};
use twofold_tests::machine::Machine;
use twofold_tests::vectors::{Plan, Replay, Vectors, name, scope, shown};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["record", file] => record(file, Plan::NEW),
        ["record", file, seed, encodings, runs] => plan(seed, encodings, runs).and_then(|plan| record(file, plan)),
        ["check", file] => check(file),
        ["show", file, form] => show(file, form),
        _ => Err(String::from("usage: vectors record FILE [SEED ENCODINGS RUNS] | check FILE | show FILE FORM")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vectors: {e}");
            ExitCode::FAILURE
        }
    }
}

fn plan(seed: &str, encodings: &str, runs: &str) -> Result<Plan, String> {
    let number = |s: &str| s.parse::<u64>().map_err(|e| format!("{s}: {e}"));
    Ok(Plan { seed: number(seed)?, encodings: number(encodings)? as usize, runs: number(runs)? as usize })
}

fn read(file: &str) -> Result<Vectors, String> {
    Vectors::parse(&std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?)
}

fn check(file: &str) -> Result<(), String> {
    let replay = Replay::all(&read(file)?);
    replay.wrong.iter().for_each(|w| println!("{w}"));
    print!("{}", replay.summary());
    match replay.staleness() {
        Some(e) => Err(e),
        None if replay.wrong.is_empty() => Ok(()),
        None => Err(format!("{} forms differ", replay.wrong.len())),
    }
}

fn show(file: &str, form: &str) -> Result<(), String> {
    let plan = read(file)?.plan;
    let code = generated().find(|&c| name(c) == form).ok_or_else(|| format!("no form {form} is generated"))?;
    let mut machine = Machine::new();
    plan.walk(code, |case, n, input, mem| {
        let scope = scope(case, input);
        machine.set_mode(case.form.mode);
        println!("{} run {n}", case.name());
        case.run(&mut machine, input, mem, |tier, run| {
            println!("{tier:?}: {}", shown(&scope, input, run, mem));
            None::<()>
        });
        #[cfg(all(target_arch = "x86_64", not(portable_host)))]
        {
            let (mut regs, mut after) = (input.clone(), mem.to_vec());
            let outcome = native(case, &mut regs, &mut after);
            println!("host: {}", shown(&scope, input, (&regs, outcome, &after), mem));
        }
    });
    Ok(())
}

/// Runs a case on the host CPU.
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn native(case: &twofold_tests::cases::Case, regs: &mut Regs, mem: &mut [u8]) -> Outcome {
    let mut native = twofold_tests::insn::native::Native::lock();
    native.set_code(&case.form.bytes, case.form.mode);
    native.run(regs, mem)
}

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn record(file: &str, plan: Plan) -> Result<(), String> {
    use twofold_tests::fuzz::on_host;
    use twofold_tests::vectors;

    let old = read(file).ok();
    let host = host(&|f| generated().any(|c| c.cpuid_features().contains(&f) && on_host(c)));
    let (vectors, different) = vectors::record(host, plan, old.as_ref(), on_host, native);
    different.iter().for_each(|d| println!("{d}"));
    let (forms, runs) = vectors.counts();
    println!("{runs} runs of {forms} forms");
    std::fs::write(file, vectors.text()).map_err(|e| format!("{file}: {e}"))?;
    if different.is_empty() { Ok(()) } else { Err(format!("{} runs differ: not recorded", different.len())) }
}

/// Vendor, family, model and stepping of the host, and which of the forms' features it has.
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn host(has: &dyn Fn(iced_x86::CpuidFeature) -> bool) -> String {
    use std::arch::x86_64::__cpuid;
    let (zero, one) = (__cpuid(0), __cpuid(1));
    let bytes = [zero.ebx, zero.edx, zero.ecx].map(u32::to_le_bytes).concat();
    let vendor = String::from_utf8_lossy(&bytes).into_owned();
    let base = one.eax >> 8 & 15;
    let family = if base == 15 { base + (one.eax >> 20 & 0xff) } else { base };
    let model = one.eax >> 4 & 15 | (one.eax >> 16 & 15) << 4;
    let features: Vec<String> =
        iced_x86::CpuidFeature::values().filter(|&f| has(f)).map(|f| format!("{f:?}").to_lowercase()).collect();
    format!("{vendor} family {family} model {model} stepping {}: {}", one.eax & 15, features.join(" "))
}

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
fn record(_file: &str, _plan: Plan) -> Result<(), String> {
    Err(String::from("recording needs an x86-64 host"))
}
