//! Profiles: `/tmp/perf-PID.map` and jitdump, so that `perf report` names translated code.

use std::fs::File;
use std::io::{self, BufWriter, Write};

/// Writes `/tmp/perf-PID.map`: one line a block.
#[derive(Debug)]
pub struct PerfMap {
    out: BufWriter<File>,
}

impl PerfMap {
    /// Creates the file for this process.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create() -> io::Result<Self> {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        Ok(Self { out: BufWriter::new(File::create(path)?) })
    }
    /// Notes that `len` bytes at host address `start` are `name`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, start: u64, len: u64, name: &str) -> io::Result<()> {
        writeln!(self.out, "{start:x} {len:x} {name}")
    }
    /// Writes out what is buffered.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
