//! The benchmark suite's programs: one static binary that runs the same work in a guest and on the host, and prints its times.
//!
//! `bench-guest run [--repeat N] [--only A,B] [--scale PERCENT]` runs each program once cold and N times more; `bench-guest
//! code` and `bench-guest data` do so many operations at growing footprints. Each run is a line `START name/run` and a line
//! `END name/run wall-ns cpu-ns operations checksum`; the checksum is the same wherever it runs.

mod bignum;
mod crypto;
mod data;
mod float;
mod footprint;
mod integer;
mod interpreter;
mod jit;
mod memory;
mod simd;
mod system;
mod text;
mod x87;

use std::io::Write;
use std::time::Instant;

/// One program: what it is an example of, its name, its work, and how much of it is one run.
struct Program {
    class: &'static str,
    name: &'static str,
    work: fn(u64) -> Option<u64>,
    units: u64,
}

const fn program(class: &'static str, name: &'static str, work: fn(u64) -> Option<u64>, units: u64) -> Program {
    Program { class, name, work, units }
}

/// Units are such that QEMU's TCG takes about a third of a second for a run.
const PROGRAMS: &[Program] = &[
    program("integer", "sort", integer::sort, 220),
    program("integer", "queens", integer::queens, 1500),
    program("integer", "divide", integer::divide, 171400),
    program("integer", "edit-distance", integer::edit_distance, 150),
    program("calls", "recursion", integer::recursion, 35),
    program("calls", "virtual", integer::virtual_calls, 15000),
    program("interpreter", "vm-switch", interpreter::switch, 30),
    program("interpreter", "vm-table", interpreter::table, 18),
    program("strings", "words", text::words, 73),
    program("strings", "parse-print", text::parse_print, 330),
    program("strings", "search", text::search, 320),
    program("memory", "copy", memory::copy, 21),
    program("memory", "rep", memory::rep, 81),
    program("memory", "trees", memory::trees, 74),
    program("hash", "sha256", crypto::sha256, 800),
    program("hash", "crc-aes-tables", crypto::tables, 1300),
    program("hash", "chacha", crypto::chacha, 4000),
    program("hash", "aes-sha-ni", crypto::instructions, 4000),
    program("bignum", "modexp", bignum::modexp, 150),
    program("bignum", "print", bignum::print, 600),
    program("scalar-fp", "nbody", float::nbody, 1100),
    program("scalar-fp", "mandelbrot", float::mandelbrot, 1000),
    program("scalar-fp", "fft", float::fft, 710),
    program("vector-fp", "sse2-matrix", simd::matrix_sse2, 120),
    program("vector-fp", "fma-matrix", simd::matrix_fma, 200),
    program("vector-int", "sse2-pixels", simd::pixels_sse2, 2400),
    program("vector-int", "avx2-pixels", simd::pixels_avx2, 1300),
    program("x87", "x87-polynomial", x87::polynomial, 920),
    program("x87", "x87-divide", x87::divide, 1500),
    program("syscalls", "getppid", system::getppid, 580),
    program("syscalls", "files", system::files, 130),
    program("syscalls", "signals", system::signals, 64),
    program("processes", "fork", system::fork, 110),
    program("processes", "exec", system::exec, 32),
    program("page-faults", "touch", system::touch, 29),
    program("page-faults", "protect", system::protect, 81),
    program("switches", "pipe", system::pipe, 36),
    program("code-changes", "patch", jit::patch, 290),
    program("code-changes", "generate", jit::generate, 110),
    program("tlb", "chase-64K", data::chase_64k, 6000),
    program("tlb", "chase-1M", data::chase_1m, 260),
    program("tlb", "chase-8M", data::chase_8m, 220),
    program("tlb", "chase-64M", data::chase_64m, 130),
    program("tlb", "chase-256M", data::chase_256m, 64),
];

/// Pseudo-random numbers (xorshift), the same everywhere.
pub struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Mixes a value into a checksum.
fn mix(sum: u64, value: u64) -> u64 {
    (sum ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

/// Runs `work` between a line that says so and one with its outcome: wall time, this process's and its children's CPU time,
/// how many operations it was. Whoever reads the lines can take the time as well: not every guest's clock is fine enough.
fn timed(name: &str, work: impl FnOnce() -> Option<(u64, u64)>) {
    say(&format!("START {name}"));
    let (start, cpu) = (Instant::now(), system::cpu_nanoseconds());
    match work() {
        Some((operations, sum)) => {
            let (wall, cpu) = (start.elapsed().as_nanos(), system::cpu_nanoseconds() - cpu);
            say(&format!("END {name} {wall} {cpu} {operations} {sum:016x}"));
        }
        None => say(&format!("SKIP {name}")),
    }
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

fn run(repeat: u32, only: &[&str], scale: u64) {
    for p in PROGRAMS {
        if !only.is_empty() && !only.contains(&p.name) && !only.contains(&p.class) {
            continue;
        }
        let units = (p.units * scale / 100).max(1);
        for i in 0..=repeat {
            timed(&format!("{}/{}/{i}", p.class, p.name), || Some((1, (p.work)(units)?)));
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.iter().any(|a| a == "--pin") {
        system::pin();
    }
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let number = |name: &str, default: u64| value(name).and_then(|v| v.parse().ok()).unwrap_or(default);
    match args.get(1).map(String::as_str) {
        Some("run") => {
            let only: Vec<&str> = value("--only").map_or(Vec::new(), |v| v.split(',').collect());
            run(number("--repeat", 3) as u32, &only, number("--scale", 100));
        }
        Some("code") => footprint::code(number("--max-kib", 65536), number("--instructions", 30_000_000)),
        Some("data") => footprint::data(number("--max-kib", 4 << 20), number("--accesses", 4_000_000)),
        Some("list") => PROGRAMS.iter().for_each(|p| println!("{}/{}", p.class, p.name)),
        Some("nothing") => {}
        _ => {
            eprintln!(
                "usage: bench-guest run [--repeat N] [--only A,B] [--scale PERCENT] | code | data | list | nothing; --pin keeps to one processor"
            );
            std::process::exit(2);
        }
    }
}
