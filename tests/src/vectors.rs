//! Recorded vectors: hashes of what a processor made of instructions, for hosts that have no such processor.
//!
//! The inputs are not in the file: they follow from its seed, and a hash of them tells when they are no longer those that were
//! recorded. What is hashed is what [`Scope`] says counts. A wrong result is taken for a right one once in 2^30 times.
//!
//! The file is text: a header, then a line for each form, with its name, the hash of its inputs, and five letters for each run
//! (dots where the result is undefined); or `-` and why there is nothing.

use std::collections::BTreeMap;

use iced_x86::Code;

use crate::cases::{Case, generated, sample};
use crate::generate::{processors_differ, undefined_status};
use crate::insn::{Hash, Regs, Rng, SCRATCH_LEN, Scope, Side, show_changes};
use crate::machine::Machine;

/// First line of a file.
const FORMAT: &str = "twofold instruction vectors, format 1";
/// How to make the file anew.
pub const RECORD: &str = "record again, on an x86-64 host: \
    cargo run --release -p twofold-tests --example vectors -- record tests/data/vectors.txt";

/// Which inputs are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What they follow from.
    pub seed: u64,
    /// Encodings of each form.
    pub encodings: usize,
    /// Runs of each encoding.
    pub runs: usize,
}

impl Plan {
    /// The plan of new files.
    pub const NEW: Self = Self { seed: 20_261_122, encodings: 6, runs: 3 };

    /// Makes a form's inputs, one run after the other, and tells `on`: the case, the run's number, registers and memory.
    /// Returns a hash of all inputs.
    pub fn walk(&self, code: Code, mut on: impl FnMut(&mut Case, usize, &Regs, &[u8])) -> u64 {
        let mut h = Hash::default();
        h.word(self.seed);
        h.bytes(name(code).as_bytes());
        let mut rng = Rng(h.0 | 1);
        let mut mem: Vec<u8> = (0..SCRATCH_LEN / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
        for encoding in 0..self.encodings {
            let Some(sample) = sample(code, &mut rng) else { continue };
            let mut case = Case::new(sample, rng.below(4) != 0);
            h.bytes(&case.form.bytes);
            for run in 0..self.runs {
                let Some(input) = case.input(&mut rng, &mut mem) else { continue };
                h.bytes(&input.fx);
                input.gpr.iter().for_each(|&v| h.word(v));
                input.high.iter().for_each(|&v| (h.word(v as u64), h.word((v >> 64) as u64)).0);
                h.word(input.flags);
                h.bytes(&mem);
                on(&mut case, encoding * self.runs + run, &input, &mem);
            }
        }
        h.0
    }
}

/// What counts of a case's run: as against a native run, less what may be otherwise on another processor.
#[must_use]
pub fn scope(case: &Case, input: &Regs) -> Scope {
    let undefined_status = undefined_status(case.sample.code);
    Scope { undefined_status, ..Scope::of(&case.form, case.undefined(input)) }
}

/// A form's name in the file.
#[must_use]
pub fn name(code: Code) -> String {
    format!("{code:?}")
}

/// Letters of 6 bits each.
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// Letters of a hash.
const WIDTH: usize = 5;

/// 30 bits of a hash.
fn letters(hash: u64) -> String {
    (0..WIDTH).map(|i| LETTERS[(hash >> (6 * i) & 63) as usize] as char).collect()
}

/// What is recorded of a form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// The hash of its inputs, and of each run's result.
    Runs {
        /// Of the inputs.
        inputs: String,
        /// Of the results, in one string.
        results: String,
    },
    /// Nothing, and why.
    Nothing(String),
}

/// A file of vectors.
#[derive(Clone, Debug)]
pub struct Vectors {
    /// Which inputs it is for.
    pub plan: Plan,
    /// The processors that it was recorded on: vendor, family, model, stepping, features.
    pub hosts: Vec<String>,
    /// Of each form.
    pub lines: BTreeMap<String, Line>,
}

impl Vectors {
    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        if lines.next() != Some(FORMAT) {
            return Err(format!("the first line is not \"{FORMAT}\"; {RECORD}"));
        }
        let mut file =
            Self { plan: Plan { seed: 0, encodings: 0, runs: 0 }, hosts: Vec::new(), lines: BTreeMap::new() };
        for line in lines {
            let (word, rest) = line.split_once(' ').ok_or_else(|| format!("bad line: {line}"))?;
            let number = || rest.parse::<u64>().map_err(|e| format!("{line}: {e}"));
            match word {
                "seed" => file.plan.seed = number()?,
                "encodings" => file.plan.encodings = number()? as usize,
                "runs" => file.plan.runs = number()? as usize,
                "host" => file.hosts.push(rest.to_owned()),
                "total" => {}
                _ => {
                    let (inputs, results) = rest.split_once(' ').ok_or_else(|| format!("bad line: {line}"))?;
                    let (inputs, results) = (inputs.to_owned(), results.to_owned());
                    let of = if inputs == "-" { Line::Nothing(results) } else { Line::Runs { inputs, results } };
                    file.lines.insert(word.to_owned(), of);
                }
            }
        }
        Ok(file)
    }

    /// The file's text.
    #[must_use]
    pub fn text(&self) -> String {
        let Plan { seed, encodings, runs } = self.plan;
        let mut out = format!("{FORMAT}\nseed {seed}\nencodings {encodings}\nruns {runs}\n");
        self.hosts.iter().for_each(|h| out += &format!("host {h}\n"));
        let (forms, runs) = self.counts();
        out += &format!("total {runs} runs of {forms} forms\n");
        for (name, line) in &self.lines {
            out += &match line {
                Line::Runs { inputs, results } => format!("{name} {inputs} {results}\n"),
                Line::Nothing(why) => format!("{name} - {why}\n"),
            };
        }
        out
    }

    /// Forms that have results, and results.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let of = |line: &Line| match line {
            Line::Runs { results, .. } => (results.len() - results.matches('.').count()) / WIDTH,
            Line::Nothing(_) => 0,
        };
        let runs: Vec<usize> = self.lines.values().map(of).filter(|&n| n != 0).collect();
        (runs.len(), runs.iter().sum())
    }
}

/// A form's line as results come in.
struct Recorder {
    results: Vec<String>,
}

impl Recorder {
    fn new(plan: &Plan) -> Self {
        Self { results: vec![".".repeat(WIDTH); plan.encodings * plan.runs] }
    }
    fn line(self, inputs: u64) -> Line {
        Line::Runs { inputs: letters(inputs), results: self.results.concat() }
    }
}

/// Records forms on this host: `run` makes the native run of a case (registers and memory updated), `has` says which forms
/// it can. Lines of an older file stay for forms that this host lacks, while their inputs are the same.
///
/// Our own tiers are compared on the way. A form on which they differ from the host is not recorded; the second result are the
/// differences.
pub fn record(
    host: String,
    plan: Plan,
    old: Option<&Vectors>,
    has: impl Fn(Code) -> bool,
    mut run: impl FnMut(&Case, &mut Regs, &mut [u8]) -> crate::insn::Outcome,
) -> (Vectors, Vec<String>) {
    let mut machine = Machine::new();
    let mut file = Vectors { plan, hosts: vec![host], lines: BTreeMap::new() };
    let mut different = Vec::new();
    for code in generated() {
        let line = if let Some(why) = processors_differ(code) {
            Line::Nothing(why.to_owned())
        } else if has(code) {
            let before = different.len();
            let mut r = Recorder::new(&plan);
            let inputs = plan.walk(code, |case, n, input, mem| {
                let (mut regs, mut after, scope) = (input.clone(), mem.to_vec(), scope(case, input));
                let outcome = run(case, &mut regs, &mut after);
                let native = (&regs, outcome, &after[..]);
                r.results[n] = letters(scope.hash(native, mem));
                show_code(&mut machine, case);
                let line = case.run(&mut machine, input, mem, |tier, ours| {
                    let d = crate::insn::difference(&scope, native, ours)?;
                    Some(format!("{} run {n} [{tier:?}]: {d}", name(code)))
                });
                different.extend(line);
            });
            if different.len() == before { r.line(inputs) } else { Line::Nothing(String::from("differs")) }
        } else {
            kept(code, plan, old).unwrap_or_else(|| Line::Nothing(String::from("the recording host lacks the feature")))
        };
        file.lines.insert(name(code), line);
    }
    if let Some(old) = old.filter(|_| generated().any(|c| !has(c) && kept(c, plan, old).is_some())) {
        file.hosts.extend(old.hosts.clone());
    }
    (file, different)
}

/// The line that an older file has for a form, if it is still good.
fn kept(code: Code, plan: Plan, old: Option<&Vectors>) -> Option<Line> {
    let line = old.filter(|o| o.plan == plan)?.lines.get(&name(code))?;
    let Line::Runs { inputs, .. } = line else { return None };
    (*inputs == letters(plan.walk(code, |_, _, _, _| {}))).then(|| line.clone())
}

/// What reads of the code page find: the instruction and NOPs.
fn show_code(machine: &mut Machine, case: &Case) {
    let mut page = [0x90; 0x1000];
    page[..case.form.bytes.len()].copy_from_slice(&case.form.bytes);
    machine.set_mode(case.form.mode);
    machine.show_code(&page);
}

/// What a replay did.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    /// Forms that have recorded results.
    pub forms: usize,
    /// Recorded results.
    pub runs: usize,
    /// Runs in each of our tiers.
    pub compared: BTreeMap<String, usize>,
    /// Forms without results, by reason.
    pub missing: BTreeMap<String, usize>,
    /// Forms whose inputs are no longer those that were recorded, or that the file does not know.
    pub stale: Vec<String>,
    /// A text for each form with a wrong result, the first of them: which run, the inputs, and all of our result.
    pub wrong: Vec<String>,
}

impl Replay {
    /// Replays one form.
    pub fn form(&mut self, machine: &mut Machine, file: &Vectors, code: Code) {
        let name = name(code);
        let (inputs, results) = match file.lines.get(&name) {
            Some(Line::Runs { inputs, results }) => (inputs, results),
            Some(Line::Nothing(why)) => return *self.missing.entry(why.clone()).or_default() += 1,
            None => return self.stale.push(format!("{name} is not in the file")),
        };
        let mut wrong = None;
        let mut runs = 0;
        let hash = file.plan.walk(code, |case, n, input, mem| {
            runs += 1;
            let scope = scope(case, input);
            show_code(machine, case);
            let seen = case.run(machine, input, mem, |tier, ours| {
                *self.compared.entry(format!("{tier:?}")).or_default() += 1;
                let right = results.get(n * WIDTH..(n + 1) * WIDTH) == Some(&letters(scope.hash(ours, mem)));
                (!right).then(|| (tier, shown(&scope, input, ours, mem)))
            });
            if wrong.is_none() {
                wrong = seen.map(|(tier, text)| {
                    format!("{} run {n} of seed {} [{tier:?}] ({name})\n{text}", case.name(), file.plan.seed)
                });
            }
        });
        if letters(hash) != *inputs {
            return self.stale.push(format!("{name} has other inputs"));
        }
        self.forms += 1;
        self.runs += runs;
        self.wrong.extend(wrong);
    }

    /// Replays all forms that are generated.
    #[must_use]
    pub fn all(file: &Vectors) -> Self {
        let mut replay = Self::default();
        let mut machine = Machine::new();
        generated().for_each(|code| replay.form(&mut machine, file, code));
        replay
    }

    /// Counts in a few lines.
    #[must_use]
    pub fn summary(&self) -> String {
        let tiers: Vec<String> = self.compared.iter().map(|(tier, n)| format!("{n} in {tier}")).collect();
        let mut out = format!("{} recorded runs of {} forms: {}\n", self.runs, self.forms, tiers.join(", "));
        for (why, n) in &self.missing {
            out += &format!("not recorded: {n} forms: {why}\n");
        }
        out += &format!("{} forms have wrong results\n", self.wrong.len());
        out
    }

    /// What is to be said when the file is stale.
    #[must_use]
    pub fn staleness(&self) -> Option<String> {
        let first = self.stale.first()?;
        let n = self.stale.len();
        Some(format!("inputs differ from the recorded ones ({n} forms; {first}): {RECORD}"))
    }
}

/// A run's inputs and what counts of its result.
#[must_use]
pub fn shown(scope: &Scope, input: &Regs, run: Side<'_>, before: &[u8]) -> String {
    let all = Scope { undefined: 0, undefined_status: 0, x87: true, ..*scope };
    let inputs = all.counted((input, crate::insn::Outcome::Done, before)).show();
    let what = scope.counted(run).show();
    format!("input  {inputs}\nresult {what}{}", show_changes(run.2, before))
}
