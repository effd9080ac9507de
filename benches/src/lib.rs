//! What the whole-guest benchmarks share: timed child processes with peak memory, medians, and small guests to time.
//!
//! A measured run is a child process with closed stdin, one at a time. Its wall time is from spawn to exit; its CPU time is what
//! the kernel says when it has ended; peak resident memory is polled from `/proc` (`VmHWM` only grows, so the last poll before
//! the exit is the peak but for the last few milliseconds).
#![allow(unsafe_code)] // getrusage

pub mod guests;
pub mod hypervisor;
mod initramfs;
pub mod kernels;
pub mod suite;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One measured run.
#[derive(Clone, Debug)]
pub struct Run {
    /// From spawn to exit.
    pub wall: Duration,
    /// From spawn until the awaited text was on stdout, if it came.
    pub marker: Option<Duration>,
    /// User and system time of all threads.
    pub cpu: Duration,
    /// Peak resident memory in bytes.
    pub peak_rss: u64,
    /// Exit status; `None` when it was killed, by us after the limit or by a signal.
    pub status: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// Runs `command`; notes when `marker` appears on its stdout; kills it after `limit`.
///
/// # Errors
/// When the process cannot be started or waited for.
pub fn measure(command: &mut Command, marker: &str, limit: Duration) -> std::io::Result<Run> {
    let before = cpu_of_children();
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = child.id();
    let mut out = child.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
    let mut err = child.stderr.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
    let awaited = marker.as_bytes().to_vec();
    let stdout = std::thread::spawn(move || {
        let (mut all, mut seen, mut chunk) = (Vec::new(), None, [0; 4096]);
        while let Ok(n @ 1..) = out.read(&mut chunk) {
            let from = all.len().saturating_sub(awaited.len());
            all.extend_from_slice(&chunk[..n]);
            if seen.is_none() && !awaited.is_empty() && all[from..].windows(awaited.len()).any(|w| w == awaited) {
                seen = Some(start.elapsed());
            }
        }
        (all, seen)
    });
    let stderr = std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = err.read_to_end(&mut all);
        all
    });
    let mut peak_rss = 0;
    let status = loop {
        if let Some(rss) = peak_rss_of(pid) {
            peak_rss = rss;
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > limit {
            child.kill()?;
            break child.wait()?;
        }
        std::thread::sleep(Duration::from_millis(4));
    };
    let (wall, cpu) = (start.elapsed(), cpu_of_children().saturating_sub(before));
    let (stdout, marker) = stdout.join().unwrap_or_default();
    // It was written before the end, however late it was read.
    let marker = marker.map(|m| m.min(wall));
    let stderr = stderr.join().unwrap_or_default();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Run { wall, marker, cpu, peak_rss, status: status.code(), stdout: text(stdout), stderr: text(stderr) })
}

/// The repository's root.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Builds the `twofold` command in this program's own profile and names it.
///
/// # Errors
/// When cargo cannot be run, or fails.
pub fn build_twofold() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let profile = own.parent().ok_or("no directory")?;
    let target = profile.parent().ok_or("no target directory")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).args(["build", "--quiet", "-p", "twofold-tools", "--bin", "twofold", "--target-dir"]);
    cargo.arg(target);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    match cargo.status() {
        Ok(status) if status.success() => Ok(profile.join("twofold")),
        Ok(status) => Err(format!("cargo build failed: {status}")),
        Err(e) => Err(format!("cargo: {e}")),
    }
}

/// `VmHWM` of a live process in bytes.
fn peak_rss_of(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// User plus system time of all children that have been waited for.
fn cpu_of_children() -> Duration {
    // SAFETY: the structure is plain numbers, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// The middle value; `None` of nothing.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn measures_a_child() {
        let run = measure(Command::new("sh").args(["-c", "echo one; echo two"]), "two", Duration::from_secs(10));
        let run = run.expect("sh runs");
        assert_eq!(run.status, Some(0));
        assert!(run.marker.is_some_and(|m| m <= run.wall));
        assert_eq!(run.stdout, "one\ntwo\n");
    }

    #[test]
    fn kills_after_the_limit() {
        let run = measure(Command::new("sleep").arg("30"), "", Duration::from_millis(50)).expect("sleep runs");
        assert_eq!(run.status, None);
        assert!(run.wall < Duration::from_secs(5));
    }
}
