//! `twofold stats`: a `--stats` file as tables and bars for a person.
//!
//! Place in the pipeline: reads what a run wrote; knows only the schema. Keys may be added to the schema at any time, so what the
//! tables do not name is listed at the end.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

/// The schema this reads; keys are only ever added to it.
const SCHEMA: &str = "twofold-stats/1";
/// Characters of a full bar.
const BAR: f64 = 40.0;
/// Rows of the table of hot blocks.
const HOTTEST: usize = 20;

/// The file as text.
///
/// # Errors
/// One line: the file cannot be read or is not a statistics file.
pub fn show(path: &Path) -> Result<String, String> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: cannot be read: {e}; check the path"))?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| format!("{name}: not JSON ({e}); give a file that 'twofold run --stats' wrote"))?;
    match value.get("schema").and_then(Value::as_str) {
        Some(SCHEMA) => Ok(Report::new(&value).text()),
        _ => Err(format!("{name}: the schema is not {SCHEMA}; give a file that 'twofold run --stats' wrote")),
    }
}

/// The text under construction.
struct Report<'v> {
    all: &'v Value,
    out: String,
    /// JSON pointers of what has been shown.
    shown: BTreeSet<String>,
}

impl<'v> Report<'v> {
    fn new(all: &'v Value) -> Self {
        Report { all, out: String::new(), shown: BTreeSet::from([String::from("/schema")]) }
    }

    fn text(mut self) -> String {
        self.run();
        self.time();
        self.bars("Guest instructions by tier", "/execution/by_tier");
        self.translation();
        self.tlb();
        self.bars("TLB flushes by cause", "/tlb/flushes");
        self.bars("Page walks by paging mode", "/tlb/walks");
        self.exceptions();
        self.exits();
        self.hot();
        self.rest();
        self.out
    }

    /// The value at a JSON pointer, which counts as shown.
    fn get(&mut self, pointer: &str) -> Option<&'v Value> {
        let value = self.all.pointer(pointer)?;
        self.shown.insert(pointer.to_owned());
        Some(value)
    }

    fn number(&mut self, pointer: &str) -> f64 {
        self.get(pointer).and_then(Value::as_f64).unwrap_or(0.0)
    }

    fn heading(&mut self, title: &str) {
        if !self.out.is_empty() {
            self.out.push('\n');
        }
        let _ = writeln!(self.out, "{title}");
    }

    fn row(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.out, "  {name:<26} {value:>16}");
    }

    fn run(&mut self) {
        let exit = self.get("/run/exit").and_then(Value::as_str).unwrap_or("?").to_owned();
        let status = self.number("/run/exit_status");
        let (wall, cpu) = (self.number("/run/wall_seconds"), self.number("/run/cpu_seconds"));
        let instructions = self.number("/execution/guest_instructions");
        let (peak, guest) = (self.number("/memory/peak_rss"), self.number("/memory/guest"));
        self.heading("Run");
        self.row("ended by", &format!("{exit} ({status})"));
        self.row("wall time", &seconds(wall));
        self.row("CPU time", &seconds(cpu));
        self.row("guest instructions", &count(instructions));
        if wall > 0.0 {
            self.row("instructions a second", &count(instructions / wall));
        }
        self.row("peak memory", &format!("{:.0} MiB", peak / f64::from(1 << 20)));
        self.row("guest memory", &format!("{:.0} MiB", guest / f64::from(1 << 20)));
    }

    /// The vCPU's thread by what it was doing.
    fn time(&mut self) {
        let Some(Value::Object(phases)) = self.get("/time/phases") else { return };
        let rows: Vec<(&str, f64)> = phases.iter().map(|(k, v)| (k.as_str(), v.as_f64().unwrap_or(0.0))).collect();
        let total: f64 = rows.iter().map(|r| r.1).sum();
        if total <= 0.0 {
            return;
        }
        self.heading("Time of the processor's thread");
        for (name, value) in rows {
            self.bar(name, &seconds(value), value / total);
        }
        let (compiling, asleep) = (self.number("/time/compile_thread"), self.number("/time/asleep"));
        self.row("beside it, compiling", &seconds(compiling));
        self.row("asleep in HLT", &seconds(asleep));
    }

    fn translation(&mut self) {
        if self.all.get("translation").is_none() {
            return;
        }
        self.heading("Translation");
        for (name, pointer) in [
            ("blocks translated", "/translation/tbs"),
            ("guest instructions in them", "/translation/guest_instructions"),
            ("host code bytes", "/translation/code_bytes"),
            ("evictions", "/translation/evictions"),
            ("links made", "/execution/links"),
            ("jump-cache misses", "/execution/jump_cache_misses"),
            ("code writes, blocks dropped", "/smc/tbs_dropped"),
        ] {
            let value = self.number(pointer);
            self.row(name, &count(value));
        }
        let Some(Value::Object(tiers)) = self.get("/translation/compiled") else { return };
        for (tier, value) in tiers {
            self.row(&format!("compiled, {tier}"), &count(value.as_f64().unwrap_or(0.0)));
        }
        let compile = self.number("/translation/compile_seconds");
        self.row("compile time", &seconds(compile));
    }

    fn tlb(&mut self) {
        if self.all.get("tlb").is_none() {
            return;
        }
        self.heading("Address translation");
        for (name, pointer) in [
            ("TLB misses", "/tlb/misses"),
            ("entries read by walks", "/tlb/entries_read"),
            ("nested walks", "/tlb/nested_walks"),
            ("faults found", "/tlb/faults"),
            ("context switches", "/tlb/context_switches"),
        ] {
            let value = self.number(pointer);
            self.row(name, &count(value));
        }
    }

    /// An object of counts, without the zeros, the largest first.
    fn bars(&mut self, title: &str, pointer: &str) {
        let Some(Value::Object(object)) = self.get(pointer) else { return };
        let mut rows: Vec<(&str, f64)> = object.iter().map(|(k, v)| (k.as_str(), v.as_f64().unwrap_or(0.0))).collect();
        rows.retain(|r| r.1 > 0.0);
        if rows.is_empty() {
            return;
        }
        rows.sort_by(|a, b| b.1.total_cmp(&a.1));
        let total: f64 = rows.iter().map(|r| r.1).sum();
        self.heading(title);
        for (name, value) in rows {
            self.bar(name, &count(value), value / total);
        }
    }

    fn bar(&mut self, name: &str, value: &str, share: f64) {
        let bar = "#".repeat((share * BAR).round() as usize);
        let line = format!("  {name:<26} {value:>16} {:>5.1} %  {bar}", share * 100.0);
        let _ = writeln!(self.out, "{}", line.trim_end());
    }

    fn exceptions(&mut self) {
        let interrupts = self.number("/execution/interrupts");
        let Some(Value::Object(vectors)) = self.get("/execution/exceptions") else { return };
        self.heading("Events delivered");
        self.row("interrupts", &count(interrupts));
        for (vector, value) in vectors {
            let name = vector.parse().map_or_else(|_| vector.clone(), exception);
            self.row(&name, &count(value.as_f64().unwrap_or(0.0)));
        }
    }

    /// VM exits by reason: how many, and what L1 took for each, from the exit to the next entry; the costliest first.
    fn exits(&mut self) {
        let entries = self.number("/vmx/entries");
        let Some(Value::Object(exits)) = self.get("/vmx/exits") else { return };
        if entries == 0.0 && exits.is_empty() {
            return;
        }
        self.heading("VM exits");
        let (guest, transitions) = (self.number("/vmx/guest_seconds"), self.number("/vmx/transition_seconds"));
        self.row("entries", &count(entries));
        self.row("in the guest", &format!("{guest:.3} s"));
        self.row("entering and leaving", &format!("{transitions:.3} s"));
        let mut rows: Vec<_> = exits.iter().map(|(reason, value)| (reason.as_str(), Exits::of(value))).collect();
        rows.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds).then(b.1.count.total_cmp(&a.1.count)));
        let all = rows.iter().fold((0.0, 0.0), |sum, (_, e)| (sum.0 + e.count, sum.1 + e.seconds));
        let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
        let _ = writeln!(
            self.out,
            "  {:<30} {:>12} {:>7} {:>11} {:>7} {:>10} {:>10} {:>10}",
            "reason", "exits", "share", "handled s", "share", "mean µs", "min µs", "max µs"
        );
        for (reason, e) in rows {
            let mean = if e.count > 0.0 { e.seconds / e.count } else { 0.0 };
            let _ = writeln!(
                self.out,
                "  {:<30} {:>12} {:>5.1} % {:>11.4} {:>5.1} % {:>10.2} {:>10.2} {:>10.2}",
                reason,
                count(e.count),
                share(e.count, all.0),
                e.seconds,
                share(e.seconds, all.1),
                1e6 * mean,
                1e6 * e.min,
                1e6 * e.max,
            );
        }
    }

    fn hot(&mut self) {
        let Some(Value::Array(blocks)) = self.get("/hot") else { return };
        if blocks.is_empty() {
            return;
        }
        let total = self.number("/execution/guest_instructions");
        self.heading("Hottest blocks");
        let _ = writeln!(
            self.out,
            "  {:<18} {:>14} {:>6} {:>7}  {:<6} symbol",
            "address", "executions", "insns", "share", "tier"
        );
        for block in blocks.iter().take(HOTTEST) {
            let text = |key: &str| block.get(key).and_then(Value::as_str).unwrap_or("");
            let number = |key: &str| block.get(key).and_then(Value::as_f64).unwrap_or(0.0);
            let retired = number("executions") * number("instructions");
            let line = format!(
                "  {:<18} {:>14} {:>6} {:>5.1} %  {:<6} {}",
                text("address"),
                count(number("executions")),
                number("instructions"),
                if total > 0.0 { 100.0 * retired / total } else { 0.0 },
                text("tier"),
                text("symbol"),
            );
            let _ = writeln!(self.out, "{}", line.trim_end());
        }
    }

    /// What no table has named.
    fn rest(&mut self) {
        let mut rows = Vec::new();
        leaves(self.all, String::new(), &self.shown, &mut rows);
        if rows.is_empty() {
            return;
        }
        self.heading("Everything else");
        for (pointer, value) in rows {
            let name = pointer.trim_start_matches('/').replace('/', ".");
            let _ = writeln!(self.out, "  {name:<40} {value}");
        }
    }
}

/// The exits of one reason.
struct Exits {
    count: f64,
    seconds: f64,
    min: f64,
    max: f64,
}

impl Exits {
    fn of(value: &Value) -> Self {
        let number = |key: &str| value.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        Exits {
            count: value.as_f64().unwrap_or_else(|| number("count")),
            seconds: number("seconds"),
            min: number("min_seconds"),
            max: number("max_seconds"),
        }
    }
}

/// The leaves of `value` that are not below a pointer in `shown`.
fn leaves(value: &Value, pointer: String, shown: &BTreeSet<String>, rows: &mut Vec<(String, String)>) {
    if shown.contains(&pointer) {
        return;
    }
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, v)| leaves(v, format!("{pointer}/{key}"), shown, rows));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, v)| leaves(v, format!("{pointer}/{i}"), shown, rows));
        }
        Value::String(text) => rows.push((pointer, text.clone())),
        Value::Number(n) if n.is_u64() => rows.push((pointer, count(n.as_f64().unwrap_or(0.0)))),
        other => rows.push((pointer, other.to_string())),
    }
}

/// A whole number with its thousands apart.
fn count(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && c.is_ascii_digit() && !out.ends_with('-') {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn seconds(value: f64) -> String {
    format!("{value:.3} s")
}

/// An exception by its vector.
fn exception(vector: u8) -> String {
    const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF", "15",
        "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
    NAMES.get(usize::from(vector)).map_or_else(|| format!("vector {vector}"), |name| format!("{name} ({vector})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands() {
        assert_eq!(count(0.0), "0");
        assert_eq!(count(999.0), "999");
        assert_eq!(count(1000.0), "1,000");
        assert_eq!(count(1_234_567.0), "1,234,567");
        assert_eq!(count(-1000.0), "-1,000");
    }

    #[test]
    fn tables_and_what_they_do_not_know() {
        let value = serde_json::json!({
            "schema": SCHEMA,
            "run": {"exit": "PowerOff", "exit_status": 0, "wall_seconds": 2.0, "cpu_seconds": 2.5},
            "execution": {"guest_instructions": 4000, "by_tier": {"eval": 1000, "quick": 3000}, "exceptions": {"14": 7}},
            "hot": [{"address": "0x1000", "executions": 100, "instructions": 10, "symbol": "memcpy", "tier": "quick"}],
            "vmx": {"entries": 12, "exits": {
                "HLT": {"count": 2, "seconds": 0.25, "min_seconds": 0.0},
                "CPUID": {"count": 10, "seconds": 0.75, "min_seconds": 0.05, "max_seconds": 0.1},
            }},
            "added_later": {"deep": {"key": 12345}},
        });
        let text = Report::new(&value).text();
        for part in [
            "PowerOff (0)",
            "2,000",
            "75.0 %  ##############################",
            "#PF (14)",
            "25.0 %  quick  memcpy",
            "added_later.deep.key                     12,345",
            "CPUID                                    10  83.3 %      0.7500  75.0 %   75000.00   50000.00  100000.00\n  HLT",
        ] {
            assert!(text.contains(part), "{part:?} is missing:\n{text}");
        }
        assert!(!text.contains("schema"), "{text}");
    }

    #[test]
    fn foreign_shapes_do_no_harm() {
        for value in [
            serde_json::json!({"schema": SCHEMA}),
            serde_json::json!({"schema": SCHEMA, "run": 3, "hot": {"a": 1}, "tlb": [], "execution": {"exceptions": [1]}}),
            serde_json::json!({"schema": SCHEMA, "hot": [1, null, {"address": 7}], "time": {"phases": {"code": "x"}}}),
        ] {
            assert!(Report::new(&value).text().contains("Run"));
        }
    }
}
