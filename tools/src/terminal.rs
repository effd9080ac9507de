//! The terminal of a run: raw while the guest has it, as it was afterwards, however the run ends.
//!
//! Place in the pipeline: around `twofold_runtime::run`. Invariants: a pipe or a closed input is left alone; settings are restored on
//! return, on panic and on the second signal.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

/// The terminal's settings before the run; a clone restores them, too, and only the first to do it does it.
#[derive(Clone)]
pub struct Saved(Arc<Mutex<Option<Termios>>>);

/// Restores the terminal when dropped.
pub struct RawMode(Saved);

impl RawMode {
    /// Makes the terminal on standard input raw: no echo, no lines, no signals from keys. Output keeps its line ends. Does
    /// nothing when standard input is not a terminal.
    pub fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN);
        raw.input_modes.remove(
            InputModes::BRKINT
                | InputModes::ICRNL
                | InputModes::INLCR
                | InputModes::IGNCR
                | InputModes::ISTRIP
                | InputModes::IXON,
        );
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(Saved(Arc::new(Mutex::new(Some(before))))))
    }

    /// A handle that restores from elsewhere.
    pub fn saved(&self) -> Saved {
        self.0.clone()
    }
}

impl Saved {
    /// Gives the terminal its settings back, once.
    pub fn restore(&self) {
        if let Some(before) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &before);
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.0.restore();
    }
}
