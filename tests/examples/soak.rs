//! Compares instructions with the host CPU for as long as one likes: `soak --minutes N --seed S`.
//!
//! A line for each encoding that differs (bytes, disassembly, tier, difference, inputs); the exit status is 1 then. Counts
//! are printed once a minute and at the end.

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn main() -> std::process::ExitCode {
    use std::time::{Duration, Instant};
    use twofold_tests::fuzz::Fuzzer;

    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: f64| {
        let at = args.iter().position(|a| a == name);
        at.and_then(|i| args.get(i + 1)).and_then(|v| v.parse().ok()).unwrap_or(default)
    };
    if args.iter().any(|a| a == "--help") {
        println!("usage: soak [--minutes N] [--seed S] [--most DIFFERENCES]");
        return std::process::ExitCode::SUCCESS;
    }
    let limit = Duration::from_secs_f64(60.0 * value("--minutes", 1.0).max(0.0));
    let most = value("--most", 1000.0) as usize;
    let mut fuzzer = Fuzzer::new(value("--seed", 1.0) as u64);
    let start = Instant::now();
    let mut told = start;
    println!("{} forms", fuzzer.forms());
    while start.elapsed() < limit && fuzzer.report.differences.len() < most {
        for _ in 0..64 {
            if let Some(line) = fuzzer.step() {
                println!("{line}");
            }
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            let r = &fuzzer.report;
            println!(
                "{} s: {} comparisons, {} differences",
                start.elapsed().as_secs(),
                r.compared,
                r.differences.len()
            );
        }
    }
    print!("{}", fuzzer.report.summary());
    std::process::ExitCode::from(u8::from(!fuzzer.report.differences.is_empty()))
}

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
fn main() {
    println!("the native oracle needs an x86-64 host");
}
