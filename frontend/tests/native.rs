//! User-mode integer instructions on the host CPU against translation and evaluation.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

#[path = "../../tests/src/insn/mod.rs"]
mod insn;

mod forms;
mod legacy;

use insn::native::{Native, check_block};
use insn::{Form, Runner, reference, translate_one};
use twofold_ir::eval::Program;
use twofold_ir::passes::{Options, Passes};

/// Runs all forms; prints how many runs were compared, fails with every form that differs.
fn run_all(what: &str, forms: &[Form], times: usize, simplify: bool, run: &mut Runner<'_>) {
    let mut native = Native::lock();
    let mut passes = Passes::default();
    let mut runs = 0;
    let mut failures = Vec::new();
    for form in forms {
        let mut block = translate_one(&form.bytes, form.mode.key());
        if let Err(e) = twofold_ir::verify::verify(&block) {
            failures.push(format!("{}: {e:?}", form.name));
        }
        if simplify {
            passes.run(&mut block, &Options::default());
        }
        match check_block(&mut native, form, &block, times, run) {
            Ok(n) => runs += n,
            Err(m) => failures.push(m.text),
        }
    }
    println!("{what}: {} forms, {runs} runs compared", forms.len());
    assert!(failures.is_empty(), "{} of {} forms differ:\n{}", failures.len(), forms.len(), failures.join("\n"));
}

#[test]
fn reference_evaluator() {
    run_all("reference evaluator", &forms::integer(), 100, false, &mut reference);
}

#[test]
fn passes_and_evaluator() {
    let mut run = |block: &twofold_ir::Block, env: &mut insn::TestEnv| Program::new(block).run(env);
    run_all("passes and evaluator", &forms::integer(), 100, true, &mut run);
}

#[test]
fn legacy_code_sizes() {
    run_all("16- and 32-bit code", &legacy::forms(), 100, false, &mut reference);
    let mut run = |block: &twofold_ir::Block, env: &mut insn::TestEnv| Program::new(block).run(env);
    run_all("16- and 32-bit code, evaluator", &legacy::forms(), 50, true, &mut run);
}
