//! The recorded vectors in each of our tiers, on every host: what a real processor made of each form, without that processor.
#![allow(missing_docs)]

use std::io::Write;

use iced_x86::Code;
use twofold_tests::cases::Case;
use twofold_tests::insn::{Outcome, Regs, Side};
use twofold_tests::machine::Machine;
use twofold_tests::vectors::{Line, RECORD, Replay, Vectors, name, scope};

fn file() -> Vectors {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/vectors.txt");
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}; {RECORD}"));
    Vectors::parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The replay of one form.
fn one(file: &Vectors, code: Code) -> Replay {
    let mut replay = Replay::default();
    replay.form(&mut Machine::new(), file, code);
    replay
}

#[test]
fn every_form_as_recorded() {
    let file = file();
    let replay = Replay::all(&file);
    // Not `println!`: the counts are for those who do not ask for the output too.
    let _ = write!(std::io::stdout(), "{}", replay.summary());
    assert_eq!(replay.staleness(), None);
    assert!(replay.wrong.is_empty(), "{}", replay.wrong.join("\n"));
    assert_eq!((replay.forms, replay.runs), file.counts());
    assert!(replay.runs > 30_000, "too few to mean anything");
    let in_tier = |tier: &str| replay.compared.get(tier).copied().unwrap_or(0);
    assert_eq!(in_tier("Eval"), replay.runs);
    let compiled = if twofold_backend::available() { replay.runs } else { 0 };
    assert_eq!((in_tier("Quick"), in_tier("Region")), (compiled, compiled));
}

#[test]
fn a_damaged_record_is_a_wrong_result_of_its_form_and_run() {
    let mut file = file();
    let (code, other) = (Code::Add_rm32_r32, Code::Sub_rm32_r32);
    let Some(Line::Runs { results, .. }) = file.lines.get_mut(&name(code)) else { panic!("no results") };
    // The fourth run's last letter.
    let damaged = if results.as_bytes()[19] == b'A' { "B" } else { "A" };
    results.replace_range(19..20, damaged);
    let replay = one(&file, code);
    assert_eq!(replay.wrong.len(), 1);
    assert!(
        replay.wrong[0].contains("run 3 of seed") && replay.wrong[0].contains("Add_rm32_r32"),
        "{}",
        replay.wrong[0]
    );
    assert!(one(&file, other).wrong.is_empty());
}

/// Changes one thing of a result.
type Damage = fn(&mut Regs, &mut Outcome, &mut [u8]);

/// Whether a hash notices each kind of damage.
fn noticed(code: Code, damages: &[(&str, Damage)], expected: bool) {
    let mut machine = Machine::new();
    file().plan.walk(code, |case: &mut Case, n, input, mem| {
        machine.set_mode(case.form.mode);
        let scope = scope(case, input);
        case.run(&mut machine, input, mem, |tier, (regs, outcome, after): Side<'_>| {
            let right = scope.hash((regs, outcome, after), mem);
            // Flags do not count after a fault.
            for (what, damage) in damages.iter().filter(|(what, _)| outcome == Outcome::Done || !what.contains("flag"))
            {
                let (mut regs, mut outcome, mut after) = (regs.clone(), outcome, after.to_vec());
                damage(&mut regs, &mut outcome, &mut after);
                let hash = scope.hash((&regs, outcome, &after), mem);
                assert_eq!(hash & 0x3fff_ffff != right & 0x3fff_ffff, expected, "{code:?} run {n} {tier:?}: {what}");
            }
            None::<()>
        });
    });
}

#[test]
fn a_damaged_result_has_another_hash() {
    noticed(
        Code::Paddb_mm_mmm64,
        &[
            ("a general register", |r, _, _| r.gpr[3] ^= 1 << 17),
            ("an arithmetic flag", |r, _, _| r.flags ^= 1),
            ("a vector register", |r, _, _| r.set_xmm(7, r.xmm(7) ^ 1 << 127)),
            ("a high half", |r, _, _| r.high[2] ^= 1),
            ("MXCSR", |r, _, _| r.set_mxcsr(r.mxcsr() ^ 0x20)),
            ("an MMX register", |r, _, _| r.fx[32 + 16 * 5] ^= 4),
            ("the tag word", |r, _, _| r.fx[4] ^= 0x80),
            ("TOP", |r, _, _| r.set_fsw(r.fsw() ^ 0x800)),
            ("memory", |_, _, m| m[5] ^= 1),
            ("how it ended", |_, o, _| *o = Outcome::Other),
            ("the exception", |r, _, _| r.raised = Some(twofold_tests::insn::Raised::new(14, 4, 0x1234_5678))),
        ],
        true,
    );
}

#[test]
fn what_the_sdm_leaves_undefined_has_no_part_in_a_hash() {
    // AND leaves AF undefined, FADD C0, C2 and C3.
    noticed(Code::And_rm32_r32, &[("the auxiliary carry flag", |r, _, _| r.flags ^= 0x10)], false);
    noticed(Code::Fadd_st0_sti, &[("a condition code", |r, _, _| r.set_fsw(r.fsw() ^ 0x4100))], false);
}

#[test]
fn changed_inputs_ask_for_a_new_recording() {
    let code = Code::Fmul_m64fp;
    let good = file();
    let mut file = good.clone();
    file.plan.seed += 1;
    let message = one(&file, code).staleness().unwrap_or_default();
    assert!(message.starts_with("inputs differ from the recorded ones (1 forms; Fmul_m64fp"), "{message}");
    assert!(message.contains("record again"), "{message}");
    file = good;
    file.lines.remove(&name(code));
    assert!(one(&file, code).staleness().is_some_and(|m| m.contains("is not in the file")));
    assert!(Vectors::parse("something else").is_err_and(|e| e.contains("record again")));
}

#[test]
fn a_file_reads_back_as_it_was_written() {
    let file = file();
    let again = Vectors::parse(&file.text()).unwrap();
    assert_eq!((again.plan, &again.hosts, &again.lines), (file.plan, &file.hosts, &file.lines));
}
