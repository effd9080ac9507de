//! What VMX counted: entries, exits by reason with their time, entry failures by check.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use twofold_arch::vmx::ExitReason;
use twofold_arch::vmx::exit::EXIT_REASONS;

/// The time that exits of one reason took L1, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Handling {
    /// Of all of them.
    pub sum: u64,
    /// Of the shortest; 0 when there was none.
    pub min: u64,
    /// Of the longest.
    pub max: u64,
}

impl Handling {
    fn add(&mut self, ns: u64) {
        self.sum += ns;
        // A clock may stand still; 0 means that nothing was timed.
        let ns = ns.max(1);
        self.min = if self.min == 0 { ns } else { self.min.min(ns) };
        self.max = self.max.max(ns);
    }
    fn with(self, other: Self) -> Self {
        let min = [self.min, other.min].into_iter().filter(|ns| *ns != 0).min().unwrap_or(0);
        Self { sum: self.sum + other.sum, min, max: self.max.max(other.max) }
    }
}

/// Counters of VMX events.
#[derive(Clone, Debug)]
pub struct VmxStats {
    /// VM entries that got as far as the guest.
    pub entries: u64,
    /// VM exits by basic reason.
    pub exits: [u64; EXIT_REASONS],
    /// From an exit, by its reason, to the next entry: what L1 did about it.
    pub handling: [Handling; EXIT_REASONS],
    /// Nanoseconds in the guest.
    pub guest_ns: u64,
    /// Nanoseconds that entries and exits themselves took.
    pub transition_ns: u64,
    /// Exceptions among the exits with reason 0, by vector.
    pub exceptions: [u64; 32],
    /// Entries that failed, by the check that failed.
    pub failures: BTreeMap<String, u64>,
    /// When the last transition ended, and the reason of the exit it was (none: an entry).
    pub since: u64,
    /// The reason of the last exit.
    pub last_reason: Option<u16>,
}

impl Default for VmxStats {
    fn default() -> Self {
        Self {
            entries: 0,
            exits: [0; EXIT_REASONS],
            handling: [Handling::default(); EXIT_REASONS],
            guest_ns: 0,
            transition_ns: 0,
            exceptions: [0; 32],
            failures: BTreeMap::new(),
            since: 0,
            last_reason: None,
        }
    }
}

impl VmxStats {
    /// An entry from `start` to `end`, nanoseconds.
    pub fn entered(&mut self, start: u64, end: u64) {
        self.entries += 1;
        self.transition_ns += end.saturating_sub(start);
        self.handled(start);
        self.since = end;
    }

    /// L1 has been handling an exit until now; whether it has. When not, the guest ran.
    fn handled(&mut self, now: u64) -> bool {
        let Some(reason) = self.last_reason.take() else { return false };
        if let Some(handling) = self.handling.get_mut(usize::from(reason)) {
            handling.add(now.saturating_sub(self.since));
        }
        true
    }

    /// An exit, or an entry that failed with one, from `start` to `end`, nanoseconds.
    pub fn exited(&mut self, reason: ExitReason, start: u64, end: u64) {
        let n = reason.number();
        if let Some(count) = self.exits.get_mut(usize::from(n)) {
            *count += 1;
        }
        if !self.handled(start) {
            self.guest_ns += start.saturating_sub(self.since);
        }
        self.transition_ns += end.saturating_sub(start);
        self.since = end;
        self.last_reason = Some(n);
    }

    /// What this processor and another one counted.
    #[must_use]
    pub fn with(mut self, other: &Self) -> Self {
        self.entries += other.entries;
        self.guest_ns += other.guest_ns;
        self.transition_ns += other.transition_ns;
        for (mine, theirs) in self.exits.iter_mut().zip(&other.exits) {
            *mine += theirs;
        }
        for (mine, theirs) in self.handling.iter_mut().zip(&other.handling) {
            *mine = mine.with(*theirs);
        }
        for (mine, theirs) in self.exceptions.iter_mut().zip(&other.exceptions) {
            *mine += theirs;
        }
        for (check, n) in &other.failures {
            *self.failures.entry(check.clone()).or_insert(0) += n;
        }
        self
    }

    /// Counts an entry that failed at `check`.
    pub fn failed(&mut self, check: &str) {
        // A guest that fails in ever new ways must not fill L0's memory.
        if self.failures.len() < 1024 || self.failures.contains_key(check) {
            *self.failures.entry(check.to_owned()).or_insert(0) += 1;
        }
    }

    /// The `vmx` object of a `--stats` file.
    #[must_use]
    pub fn json(&self) -> Value {
        let seconds = |ns: u64| ns as f64 / 1e9;
        let exits: Map<String, Value> = ExitReason::ALL
            .iter()
            .filter_map(|r| {
                let i = usize::from(r.number());
                let (n, time) = (*self.exits.get(i)?, *self.handling.get(i)?);
                let row = || {
                    json!({
                        "count": n,
                        "seconds": seconds(time.sum),
                        "min_seconds": seconds(time.min),
                        "max_seconds": seconds(time.max),
                    })
                };
                (n != 0).then(|| (r.text().to_owned(), row()))
            })
            .collect();
        let exceptions: Map<String, Value> = self
            .exceptions
            .iter()
            .enumerate()
            .filter(|(_, n)| **n != 0)
            .map(|(i, n)| (i.to_string(), json!(n)))
            .collect();
        json!({
            "entries": self.entries,
            "exits": exits,
            "exception_exits": exceptions,
            "guest_seconds": seconds(self.guest_ns),
            "transition_seconds": seconds(self.transition_ns),
            "entry_failures": self.failures,
        })
    }
}
