//! Where `-d` traces and one-time warnings go.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The trace output of a run: standard error, or a file. Clones write to the same place.
#[derive(Clone)]
pub struct Trace(Arc<Mutex<Inner>>);

struct Inner {
    out: Box<dyn Write + Send>,
    warned: BTreeSet<String>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trace").finish_non_exhaustive()
    }
}

impl Default for Trace {
    fn default() -> Self {
        Self::new(Box::new(std::io::stderr()))
    }
}

impl Trace {
    /// Traces to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Mutex::new(Inner { out, warned: BTreeSet::new() })))
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Writes text. A trace that cannot be written is no reason to stop a guest.
    pub fn write(&mut self, text: &str) {
        let _ = self.lock().out.write_all(text.as_bytes());
    }
    /// Writes what is buffered.
    pub fn flush(&mut self) {
        let _ = self.lock().out.flush();
    }
    /// Warns on standard error, once for each `key`.
    pub fn warn_once(&mut self, key: &str, text: &str) {
        if self.lock().warned.insert(key.to_owned()) {
            eprintln!("twofold: warning: {text}");
        }
    }
}
