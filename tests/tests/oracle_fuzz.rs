//! Every instruction form of every feature the model `max` has, encoded at random with a fixed seed, on the host CPU, in the
//! evaluator and as host code. `cargo run --release -p twofold-tests --example soak` is the long run of the same.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use std::io::Write;
use twofold_tests::fuzz::Fuzzer;

/// Encodings of each form.
const ROUNDS: usize = 8;

#[test]
fn every_form() {
    let mut fuzzer = Fuzzer::new(20_240_601);
    for _ in 0..ROUNDS * fuzzer.forms() {
        fuzzer.step();
    }
    let report = &fuzzer.report;
    // Not `println!`: the counts are for those who do not ask for the output too.
    let _ = write!(std::io::stdout(), "{}", report.summary());
    assert!(report.differences.is_empty(), "{}", report.differences.join("\n"));
    let uncovered = fuzzer.forms() - report.runs.len();
    assert_eq!(uncovered, 0, "forms without an encoding");
}
