//! Runs the built `twofold` command for the integration tests: finds the binary, the guests, and limits each run's time.
#![allow(dead_code)]

pub mod kvm;
pub mod loops;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_path_buf()
}

/// The directory cargo built this test into (`target/release`), and whether that is the release profile.
fn profile_dir() -> (PathBuf, bool) {
    let exe = std::env::current_exe().expect("own path");
    let dir = exe.parent().and_then(Path::parent).expect("tests run from target/PROFILE/deps").to_path_buf();
    let release = dir.file_name().is_some_and(|n| n == "release");
    (dir, release)
}

/// The `twofold` binary: `TWOFOLD_BIN`, or built now by cargo (which does nothing when it is fresh) in this test's own
/// profile. `cargo test` alone does not build another package's binary.
pub fn twofold() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(path) = std::env::var_os("TWOFOLD_BIN") {
            return path.into();
        }
        let (dir, release) = profile_dir();
        let target = dir.parent().expect("target directory");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(root()).args(["build", "--quiet", "-p", "twofold-tools", "--bin", "twofold", "--target-dir"]);
        cargo.arg(target);
        if release {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success(), "cannot build the twofold binary");
        dir.join("twofold")
    })
}

/// The guests directory, filled by `tools/guests/fetch` on first use. `None` when `TWOFOLD_NO_GUESTS` asks to do without.
pub fn guests(all: bool) -> Option<PathBuf> {
    if std::env::var_os("TWOFOLD_NO_GUESTS").is_some() {
        eprintln!("skipped: TWOFOLD_NO_GUESTS is set");
        return None;
    }
    let dir = std::env::var_os("TWOFOLD_GUESTS").map_or_else(|| root().join("target/guests"), PathBuf::from);
    let mut fetch = Command::new(root().join("tools/guests/fetch"));
    if all {
        fetch.arg("--all");
    }
    let done = fetch.arg(&dir).output().expect("tools/guests/fetch runs");
    assert!(
        done.status.success(),
        "no guests (set TWOFOLD_NO_GUESTS=1 to test without): {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Some(dir)
}

/// A directory for one test's files, emptied.
pub fn scratch(test: &str) -> PathBuf {
    let dir = profile_dir().0.join("test-scratch").join(test);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("scratch directory");
    dir
}

/// What a run of the command left.
pub struct Outcome {
    /// Exit status; `None` when a signal ended it (128 + signal is not a status of ours).
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub wall: Duration,
}

impl Outcome {
    /// Asserts the exit status, that nothing panicked, and shows both outputs when that fails.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        assert!(!self.stderr.contains("panicked at"), "panicked:\n{}", self.shown());
        assert!(!self.stderr.contains("RUST_BACKTRACE"), "panicked:\n{}", self.shown());
        assert_eq!(self.status, Some(status), "exit status:\n{}", self.shown());
        self
    }

    /// Asserts status 2 and exactly one `twofold: error:` line, which names `what`.
    #[track_caller]
    pub fn expect_refused(&self, what: &str) -> &Self {
        self.expect_status(2);
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.starts_with("twofold: error:")).collect();
        assert_eq!(errors.len(), 1, "one error line:\n{}", self.shown());
        assert!(
            errors[0].to_lowercase().contains(&what.to_lowercase()),
            "the error should name {what:?}: {}",
            errors[0]
        );
        assert!(self.stdout.is_empty(), "stdout belongs to the guest:\n{}", self.shown());
        self
    }

    /// Both outputs, the last 4,000 characters of each.
    pub fn shown(&self) -> String {
        let tail = |s: &str| -> String {
            let skip = s.chars().count().saturating_sub(4000);
            s.chars().skip(skip).collect()
        };
        let (out, err) = (tail(&self.stdout), tail(&self.stderr));
        format!("status {:?} after {:?}\n--- stdout\n{out}\n--- stderr\n{err}", self.status, self.wall)
    }
}

/// Runs `command` with stdin closed; kills it and fails the test after `limit`.
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Outcome {
    converse(command, &[], limit)
}

/// Runs `command`; each time the first of a pair's texts appears on stdout (after where the one before did), types the
/// second. Kills it and fails the test after `limit`.
#[track_caller]
pub fn converse(command: &mut Command, script: &[(&str, &str)], limit: Duration) -> Outcome {
    let start = Instant::now();
    let stdin = if script.is_empty() { Stdio::null() } else { Stdio::piped() };
    let mut child =
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    let mut keyboard = child.stdin.take();
    let mut out = child.stdout.take().expect("piped");
    let mut err = child.stderr.take().expect("piped");
    let script: Vec<(String, String)> = script.iter().map(|&(a, b)| (a.to_owned(), b.to_owned())).collect();
    let stdout = std::thread::spawn(move || {
        let (mut all, mut from, mut chunk) = (Vec::new(), 0, [0; 4096]);
        let mut script = script.into_iter().peekable();
        while let Ok(n @ 1..) = out.read(&mut chunk) {
            all.extend_from_slice(&chunk[..n]);
            while let Some((awaited, typed)) = script.peek() {
                let Some(at) = all[from..].windows(awaited.len()).position(|w| w == awaited.as_bytes()) else { break };
                from += at + awaited.len();
                if let Some(keyboard) = &mut keyboard {
                    let _ = keyboard.write_all(typed.as_bytes()).and_then(|()| keyboard.flush());
                }
                script.next();
            }
        }
        String::from_utf8_lossy(&all).into_owned()
    });
    let stderr = std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = err.read_to_end(&mut all);
        String::from_utf8_lossy(&all).into_owned()
    });
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if start.elapsed() > limit {
            late = true;
            let _ = child.kill();
            break child.wait().expect("wait");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let outcome = Outcome {
        status: status.code(),
        wall: start.elapsed(),
        stdout: stdout.join().expect("reader"),
        stderr: stderr.join().expect("reader"),
    };
    assert!(!late, "still running after {limit:?}:\n{}", outcome.shown());
    outcome
}

/// `twofold ARGS`, ended after `limit`.
#[track_caller]
pub fn twofold_with<S: AsRef<std::ffi::OsStr>>(args: &[S], limit: Duration) -> Outcome {
    run(Command::new(twofold()).args(args), limit)
}

/// A Multiboot 1 image (a.out kludge) that is loaded at 1 MiB and starts with `code` in flat 32-bit protected mode.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const HEADER: u32 = 32;
    let flags: u32 = 1 << 16;
    let end = LOAD + HEADER + u32::try_from(code.len()).expect("small");
    let words =
        [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags), LOAD, LOAD, end, end + 0x1000, LOAD + HEADER];
    let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    image.extend_from_slice(code);
    image
}
