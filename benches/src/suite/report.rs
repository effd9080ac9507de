//! The suite's numbers: medians and spread, ratios and geometric means, as a table, as a line of history, as charts.

use super::chart;
use super::sample::{Sample, Samples};
use crate::median;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Where a program ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// This program.
    Twofold,
    /// QEMU's TCG.
    Qemu,
    /// The host.
    Native,
}

impl System {
    /// All three, in the order in which they run and are shown.
    pub const ALL: [Self; 3] = [Self::Twofold, Self::Qemu, Self::Native];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["twofold", "QEMU TCG", "native"][self as usize]
    }

    /// The time that is compared. On the host the program's own account, which has its children's time in it.
    fn seconds(self, sample: &Sample) -> f64 {
        if self == Self::Native { sample.own } else { sample.busiest }
    }
}

/// Every sample of every round, by run name and system.
#[derive(Default)]
pub struct Collected(BTreeMap<String, BTreeMap<System, Vec<Sample>>>);

/// Times of one program on one system, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median of first runs.
    pub cold: f64,
    /// Median of later runs.
    pub warm: f64,
    /// Half of the range of later runs, as a part of their median.
    pub spread: f64,
    /// Median of the CPU time of all threads in later runs.
    pub all: f64,
}

/// One program.
pub struct Row {
    /// What it is an example of.
    pub class: String,
    /// Its name.
    pub name: String,
    /// Its times.
    pub times: BTreeMap<System, Times>,
    /// Whether it computed the same everywhere.
    pub agrees: bool,
}

impl Row {
    /// How many times longer `a` takes than `b`.
    #[must_use]
    pub fn ratio(&self, a: System, b: System, of: fn(&Times) -> f64) -> Option<f64> {
        Some(of(self.times.get(&a)?) / of(self.times.get(&b)?))
    }
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    median(values.collect()).unwrap_or(f64::NAN)
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| (values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp())
}

impl Collected {
    /// Adds what one process printed.
    pub fn add(&mut self, system: System, samples: Samples) {
        for (name, sample) in samples {
            self.0.entry(name).or_default().entry(system).or_default().push(sample);
        }
    }

    /// The programs in `order` (class/name), with their times.
    #[must_use]
    pub fn rows(&self, order: &[String]) -> Vec<Row> {
        order.iter().filter_map(|program| self.row(program)).collect()
    }

    fn row(&self, program: &str) -> Option<Row> {
        let (class, name) = program.split_once('/')?;
        let runs: Vec<_> = (0..).map_while(|i| self.0.get(&format!("{program}/{i}"))).collect();
        let first = runs.first()?;
        let later: &[_] = if runs.len() > 1 { &runs[1..] } else { &runs };
        let mut times = BTreeMap::new();
        for (&system, cold) in *first {
            let samples = || later.iter().filter_map(|r| r.get(&system)).flatten();
            let warm = middle(samples().map(|s| system.seconds(s)));
            let (low, high) = samples()
                .map(|s| system.seconds(s))
                .fold((f64::MAX, 0.0), |(l, h), t| (f64::min(l, t), f64::max(h, t)));
            let spread = (high - low) / 2.0 / warm;
            let cold = middle(cold.iter().map(|s| system.seconds(s)));
            times.insert(system, Times { cold, warm, spread, all: middle(samples().map(|s| s.all)) });
        }
        let agrees = runs.iter().all(|r| {
            let mut sums = r.values().flatten().map(|s| &s.checksum);
            let first = sums.next();
            sums.all(|s| Some(s) == first)
        });
        Some(Row { class: class.to_owned(), name: name.to_owned(), times, agrees })
    }

    /// Nanoseconds an operation against footprint, of runs named `kind/kib/phase`.
    #[must_use]
    pub fn curve(&self, system: System, kind: &str, phase: &str) -> Vec<(f64, f64)> {
        let mut points: Vec<(f64, f64)> = self
            .0
            .iter()
            .filter_map(|(name, samples)| {
                let kib = name.strip_prefix(kind)?.strip_prefix('/')?.strip_suffix(phase)?.strip_suffix('/')?;
                let samples = samples.get(&system)?;
                Some((kib.parse().ok()?, middle(samples.iter().map(|s| system.seconds(s) * 1e9 / s.operations))))
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    }
}

/// Geometric mean over the classes of the geometric mean in each, of a ratio of the rows.
#[must_use]
pub fn over_classes(rows: &[Row], ratio: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
    let mut classes: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    rows.iter().filter_map(|r| Some((r, ratio(r)?))).for_each(|(r, v)| classes.entry(&r.class).or_default().push(v));
    geometric_mean(&classes.values().filter_map(|v| geometric_mean(v)).collect::<Vec<_>>())
}

fn cell(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |v| if v >= 9.95 { format!("{v:.0}") } else { format!("{v:.2}") })
}

/// The table of all programs.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| class | program | twofold ms | ± % | all threads | cold | QEMU ms | ± % | cold | native ms | QEMU / twofold | cold | \
         twofold / native |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in rows {
        let of = |system, f: fn(&Times) -> f64| row.times.get(&system).map(f);
        let ms = |v: Option<f64>| v.map_or("–".to_owned(), |v| format!("{:.0}", v * 1e3));
        let percent = |v: Option<f64>| v.map_or("–".to_owned(), |v| format!("{:.0}", v * 1e2));
        let (t, q, n) = (System::Twofold, System::Qemu, System::Native);
        let native = of(n, |t| t.warm).map_or("–".to_owned(), |v| format!("{:.1}", v * 1e3));
        let note = if row.agrees { "" } else { " (results differ!)" };
        let _ = writeln!(
            out,
            "| {} | {}{note} | {} | {} | {} | {} | {} | {} | {} | {native} | {} | {} | {} |",
            row.class,
            row.name,
            ms(of(t, |t| t.warm)),
            percent(of(t, |t| t.spread)),
            ms(of(t, |t| t.all)),
            ms(of(t, |t| t.cold)),
            ms(of(q, |t| t.warm)),
            percent(of(q, |t| t.spread)),
            ms(of(q, |t| t.cold)),
            cell(row.ratio(q, t, |t| t.warm)),
            cell(row.ratio(q, t, |t| t.cold)),
            cell(row.ratio(t, n, |t| t.warm)),
        );
    }
    out
}

/// The means, a line each.
#[must_use]
pub fn means(rows: &[Row]) -> String {
    let (t, q, n) = (System::Twofold, System::Qemu, System::Native);
    let mut out = String::new();
    let mean = |a, b, of: fn(&Times) -> f64| cell(over_classes(rows, |r| r.ratio(a, b, of)));
    let _ = writeln!(out, "- QEMU's time / twofold's, geometric mean over classes: **{}**", mean(q, t, |t| t.warm));
    let _ = writeln!(out, "- the same of first (cold) runs: {}", mean(q, t, |t| t.cold));
    let _ = writeln!(
        out,
        "- twofold's time / native: {}; QEMU's / native: {}",
        mean(t, n, |t| t.warm),
        mean(q, n, |t| t.warm)
    );
    out
}

/// Rows for a chart: each class's ratio of QEMU's time to twofold's.
#[must_use]
pub fn bars(rows: &[Row]) -> String {
    let (t, q) = (System::Twofold, System::Qemu);
    let shown: Vec<(String, f64)> =
        rows.iter().filter_map(|r| Some((format!("{}: {}", r.class, r.name), r.ratio(q, t, |t| t.warm)?))).collect();
    chart::bars("How many times faster than QEMU TCG (warm)", &shown)
}

/// One line of history.
#[must_use]
pub fn history(rows: &[Row], head: &serde_json::Value) -> String {
    let (t, q, n) = (System::Twofold, System::Qemu, System::Native);
    let mut line = head.clone();
    let round = |v: f64| (v * 1e4).round() / 1e4;
    let mean = |a, b, of: fn(&Times) -> f64| over_classes(rows, |r| r.ratio(a, b, of)).map(round);
    line["qemu_over_twofold"] = mean(q, t, |t| t.warm).into();
    line["qemu_over_twofold_cold"] = mean(q, t, |t| t.cold).into();
    line["twofold_over_native"] = mean(t, n, |t| t.warm).into();
    let programs: serde_json::Map<String, serde_json::Value> = rows
        .iter()
        .map(|r| {
            let times = System::ALL.map(|s| r.times.get(&s).map(|t| serde_json::json!([round(t.warm), round(t.cold)])));
            (r.name.clone(), serde_json::json!(times))
        })
        .collect();
    line["seconds_warm_cold_by_system"] = programs.into();
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: f64) -> Sample {
        Sample { wall: 9.0, busiest: seconds, all: seconds, own: seconds, operations: 1.0, checksum: "ff".to_owned() }
    }

    fn collected() -> Collected {
        let mut all = Collected::default();
        for (system, warm) in [(System::Twofold, 1.0), (System::Qemu, 4.0), (System::Native, 0.5)] {
            for (class, factor) in [("a/x", 1.0), ("b/y", 4.0)] {
                let of = |i: u32, t: f64| (format!("{class}/{i}"), sample(t));
                let runs = [of(0, 8.0), of(1, warm), of(2, warm * if system == System::Qemu { factor } else { 1.0 })];
                all.add(system, runs.into_iter().collect());
            }
        }
        all
    }

    #[test]
    fn medians_ratios_means() {
        let rows = collected().rows(&["a/x".to_owned(), "b/y".to_owned(), "c/none".to_owned()]);
        assert_eq!(rows.len(), 2);
        let ratio = |r: &Row| r.ratio(System::Qemu, System::Twofold, |t| t.warm);
        assert_eq!(ratio(&rows[0]), Some(4.0));
        // The median of 4 and 16.
        assert_eq!(ratio(&rows[1]), Some(10.0));
        assert!(over_classes(&rows, ratio).is_some_and(|m| (m - 40f64.sqrt()).abs() < 1e-9));
        assert_eq!(rows[0].ratio(System::Qemu, System::Twofold, |t| t.cold), Some(1.0));
        assert_eq!(table(&rows).lines().count(), 4);
        assert!(bars(&rows).contains("b: y"));
        let line: serde_json::Value = serde_json::from_str(&history(&rows, &serde_json::json!({}))).expect("JSON");
        assert_eq!(line["twofold_over_native"], 2.0);
    }

    #[test]
    fn curves_are_sorted_by_footprint() {
        let mut all = Collected::default();
        let samples = [("code/16/later", 3.0), ("code/4/later", 2.0), ("code/4/first", 9.0), ("data/4/later", 1.0)];
        all.add(System::Qemu, samples.iter().map(|&(n, t)| (n.to_owned(), sample(t * 1e-9))).collect());
        let curve = all.curve(System::Qemu, "code", "later");
        assert_eq!(curve.iter().map(|p| p.0).collect::<Vec<_>>(), [4.0, 16.0]);
        assert!((curve[0].1 - 2.0).abs() < 1e-9);
    }
}
