//! SIGINT, SIGTERM and SIGHUP end the guest, not the process: the terminal is restored and the statistics are written.
//!
//! Place in the pipeline: a thread of its own beside the run, which tells the run's [`Control`]. The second signal ends the process at
//! once, for a run that does not listen.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use twofold_runtime::config::{Control, StopReason};

use crate::terminal::Saved;

/// Starts to watch for signals. Without the thread the signals do what they always do.
pub fn watch(control: Control, terminal: Option<Saved>) {
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    let watcher = move || {
        let mut seen = false;
        for signal in signals.forever() {
            if std::mem::replace(&mut seen, true) {
                if let Some(terminal) = &terminal {
                    terminal.restore();
                }
                std::process::exit(128 + signal);
            }
            control.stop(StopReason::Signal(signal as u8));
        }
    };
    let _ = std::thread::Builder::new().name("signals".into()).spawn(watcher);
}
