//! Runs a program that prints START and END lines, and takes the times between them from outside.
//!
//! On a machine with other work to do, wall time says little: so each line also samples the CPU time of every thread of the
//! child. The time of a run is that of the thread that worked most (an emulator's processor thread), which on an idle machine
//! is the wall time, as no program of the suite sleeps; what all threads took together is kept beside it.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// One run of one program, in seconds.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Between the two lines.
    pub wall: f64,
    /// CPU time of the busiest thread.
    pub busiest: f64,
    /// CPU time of all threads.
    pub all: f64,
    /// CPU time by the program's own account.
    pub own: f64,
    /// How many operations it did.
    pub operations: f64,
    /// What it computed.
    pub checksum: String,
}

/// What one process printed: samples by the name of the run.
pub type Samples = BTreeMap<String, Sample>;

/// CPU time of each live thread in seconds.
fn threads(pid: u32) -> HashMap<u32, f64> {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return HashMap::new() };
    dir.filter_map(|entry| {
        let entry = entry.ok()?;
        let tid = entry.file_name().to_str()?.parse().ok()?;
        let text = std::fs::read_to_string(entry.path().join("schedstat")).ok()?;
        let ns: f64 = text.split_whitespace().next()?.parse().ok()?;
        Some((tid, ns / 1e9))
    })
    .collect()
}

struct Started {
    name: String,
    at: Instant,
    threads: HashMap<u32, f64>,
}

/// `END name wall cpu operations checksum` against what was sampled at its START.
fn finish(started: &Started, rest: &str, at: Instant, now: &HashMap<u32, f64>) -> Option<Sample> {
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let &[name, _, cpu, operations, checksum] = fields.as_slice() else { return None };
    if name != started.name {
        return None;
    }
    let spent: Vec<f64> = now.iter().map(|(tid, t)| t - started.threads.get(tid).unwrap_or(&0.0)).collect();
    Some(Sample {
        wall: (at - started.at).as_secs_f64(),
        busiest: spent.iter().copied().fold(0.0, f64::max),
        all: spent.iter().sum(),
        own: cpu.parse::<f64>().ok()? / 1e9,
        operations: operations.parse().ok()?,
        checksum: checksum.to_owned(),
    })
}

/// Runs `command` to its end. `limit` is for each line; a child that says nothing for longer is killed.
///
/// # Errors
/// When it cannot be started, hangs, or ends with another status than 0; then the last lines are in the message.
pub fn take(command: &mut Command, limit: Duration) -> Result<Samples, String> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let mut child = child.map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    let out = child.stdout.take().ok_or("no stdout")?;
    let (lines, received) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n') {
            let Ok(line) = line else { return };
            if lines.send((String::from_utf8_lossy(&line).trim().to_owned(), Instant::now())).is_err() {
                return;
            }
        }
    });
    let (mut samples, mut started, mut last) = (Samples::new(), None::<Started>, String::new());
    let hung = loop {
        match received.recv_timeout(limit) {
            Ok((line, at)) => {
                let threads = threads(child.id());
                if let Some(name) = line.strip_prefix("START ") {
                    started = Some(Started { name: name.to_owned(), at, threads });
                } else if let (Some(rest), Some(begun)) = (line.strip_prefix("END "), &started)
                    && let Some(sample) = finish(begun, rest, at, &threads)
                {
                    samples.insert(begun.name.clone(), sample);
                }
                last = line;
            }
            Err(RecvTimeoutError::Timeout) => break true,
            Err(RecvTimeoutError::Disconnected) => break false,
        }
    };
    if hung {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    let _ = reader.join();
    match (hung, status.success()) {
        (true, _) => Err(format!("said nothing for {} s after {last:?}", limit.as_secs())),
        (false, false) => Err(format!("{status}; last line {last:?}")),
        (false, true) => Ok(samples),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_between_lines() {
        let script =
            "echo START a/b/0; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo END a/b/0 5 2000000000 3 ff";
        let samples = take(Command::new("sh").args(["-c", script]), Duration::from_secs(20)).expect("sh runs");
        let s = &samples["a/b/0"];
        assert_eq!((s.own, s.operations, s.checksum.as_str()), (2.0, 3.0, "ff"));
        assert!(s.wall > 0.0 && s.all >= s.busiest);
    }

    #[test]
    fn a_silent_child_is_killed_and_a_failing_one_is_told() {
        let hung = take(Command::new("sh").args(["-c", "echo x; exec sleep 30"]), Duration::from_millis(200));
        assert!(hung.is_err_and(|e| e.contains("said nothing")));
        let failed = take(Command::new("sh").args(["-c", "echo last; exit 3"]), Duration::from_secs(5));
        assert!(failed.is_err_and(|e| e.contains("last")));
    }
}
