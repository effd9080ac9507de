//! Runs random machines for as long as one likes: `pages --minutes N --seed S`. Each machine's seed is told before it runs.

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn main() {
    use std::time::{Duration, Instant};
    use twofold_runtime::config::Tier;
    use twofold_tests::pages::Pages;

    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: f64| {
        let at = args.iter().position(|a| a == name);
        at.and_then(|i| args.get(i + 1)).and_then(|v| v.parse().ok()).unwrap_or(default)
    };
    if args.iter().any(|a| a == "--help") {
        return println!("usage: pages [--minutes N] [--seed S]");
    }
    let limit = Duration::from_secs_f64(60.0 * value("--minutes", 1.0).max(0.0));
    let mut seed = value("--seed", 1.0) as u64;
    let (start, mut machines, mut instructions) = (Instant::now(), 0, 0);
    while start.elapsed() < limit {
        // A panic or a hang is this seed's.
        eprint!("\rseed {seed} ");
        let mut pages = Pages::new(seed);
        for tier in [Tier::Eval, Tier::Auto, Tier::Quick, Tier::Opt] {
            (0..8).for_each(|_| pages.step(tier));
        }
        machines += pages.tally.machines;
        instructions += pages.tally.instructions;
        seed += 1;
    }
    println!("{machines} machines, {instructions} instructions");
}

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
fn main() {
    println!("the generator of instructions needs an x86-64 host");
}
