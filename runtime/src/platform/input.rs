//! Input for COM1: a thread that reads a host stream, and the escape character of a terminal.
//!
//! Place in the pipeline: the only thread of the platform. It blocks in `read`, hands bytes over through a bounded queue and
//! kicks the vCPU. Invariants: a full queue stops reading (nothing is lost); end of file ends the thread, not the guest; the thread
//! keeps no reference that would keep the machine alive.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::config::{Control, Kick, StopReason};

/// Bytes that wait for the guest at most.
const QUEUE: usize = 4096;
/// Ctrl-a.
const ESCAPE: u8 = 0x01;

/// What `Ctrl-a h` prints.
pub const ESCAPE_HELP: &str =
    "\r\nCtrl-a h    this help\r\nCtrl-a x    quit twofold\r\nCtrl-a Ctrl-a    send Ctrl-a to the guest\r\n";

/// The guest's side of the queue.
#[derive(Debug)]
pub struct Input {
    bytes: Receiver<u8>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting: AtomicUsize,
    open: AtomicBool,
}

impl Input {
    /// Starts to read `source`. With `control`, the source is a terminal and the escape character is ours.
    #[must_use]
    pub fn spawn(source: impl Read + Send + 'static, kick: Kick, control: Option<Control>) -> Self {
        let (sender, bytes) = sync_channel(QUEUE);
        let shared = Arc::new(Shared { waiting: AtomicUsize::new(0), open: AtomicBool::new(true) });
        let reader = Reader { sender, shared: shared.clone(), kick, control, escaped: false };
        // A host that cannot start a thread leaves us without input, which a guest can live with.
        if std::thread::Builder::new().name("serial-input".into()).spawn(move || reader.run(source)).is_err() {
            shared.open.store(false, Ordering::Release);
        }
        Self { bytes, shared }
    }

    /// Whether bytes wait. One load.
    #[must_use]
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) != 0
    }

    /// Whether more may come.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.is_ready() || self.shared.open.load(Ordering::Acquire)
    }

    /// The next byte.
    pub fn take(&mut self) -> Option<u8> {
        let byte = self.bytes.try_recv().ok()?;
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(byte)
    }
}

struct Reader {
    sender: SyncSender<u8>,
    shared: Arc<Shared>,
    kick: Kick,
    control: Option<Control>,
    escaped: bool,
}

impl Reader {
    fn run(mut self, mut source: impl Read) {
        let mut buffer = [0u8; 256];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    if buffer.iter().take(n).try_for_each(|byte| self.handle(*byte)).is_none() {
                        break;
                    }
                    (self.kick)();
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.shared.open.store(false, Ordering::Release);
        (self.kick)();
    }

    /// One byte from the stream; none when nobody listens any more.
    fn handle(&mut self, byte: u8) -> Option<()> {
        let Some(control) = &self.control else { return self.send(byte) };
        if !std::mem::take(&mut self.escaped) {
            if byte == ESCAPE {
                self.escaped = true;
                return Some(());
            }
            return self.send(byte);
        }
        match byte {
            b'x' | b'X' => control.stop(StopReason::Quit),
            b'h' | b'H' | b'?' => eprint!("{ESCAPE_HELP}"),
            ESCAPE => return self.send(ESCAPE),
            other => {
                self.send(ESCAPE)?;
                return self.send(other);
            }
        }
        Some(())
    }

    fn send(&self, byte: u8) -> Option<()> {
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let sent = match self.sender.try_send(byte) {
            Ok(()) => true,
            Err(TrySendError::Full(byte)) => {
                (self.kick)();
                self.sender.send(byte).is_ok()
            }
            Err(TrySendError::Disconnected(_)) => false,
        };
        if !sent {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        sent.then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn drain(input: &mut Input) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut bytes = Vec::new();
        while input.is_open() && Instant::now() < end {
            match input.take() {
                Some(b) => bytes.push(b),
                None => std::thread::yield_now(),
            }
        }
        bytes
    }

    #[test]
    fn a_pipe_arrives_whole_and_closes() {
        let data: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let mut input = Input::spawn(std::io::Cursor::new(data.clone()), Arc::new(|| {}), None);
        assert_eq!(drain(&mut input), data);
        assert!(!input.is_open() && !input.is_ready());
    }

    #[test]
    fn ctrl_a_belongs_to_us_on_a_terminal() {
        let control = Control::default();
        let kicks = Arc::new(AtomicUsize::new(0));
        let k = kicks.clone();
        let kick: Kick = Arc::new(move || {
            k.fetch_add(1, Ordering::Relaxed);
        });
        let source = std::io::Cursor::new(b"a\x01\x01b\x01cx\x01x".to_vec());
        let mut input = Input::spawn(source, kick, Some(control.clone()));
        assert_eq!(drain(&mut input), b"a\x01b\x01cx");
        assert_eq!(control.stopped(), Some(StopReason::Quit));
        assert!(kicks.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn ctrl_a_is_a_byte_in_a_pipe() {
        let mut input = Input::spawn(std::io::Cursor::new(b"\x01x".to_vec()), Arc::new(|| {}), None);
        assert_eq!(drain(&mut input), b"\x01x");
    }
}
