//! What a run is told: one plain value, made by the command line or a test, read once at the start.
//!
//! Place in the pipeline: between the `twofold` command and the machine. Nothing here opens a file or starts a thread;
//! [`Control`] is the only part that stays alive during a run.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Wakes a vCPU that executes or waits, from any thread.
pub type Kick = Arc<dyn Fn() + Send + Sync>;

/// Default guest memory: 512 MiB.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// The least memory a machine can have: 1 MiB, so that the legacy area exists.
pub const MIN_MEMORY: u64 = 1 << 20;
/// The most memory a machine can have: 1 TiB (the physical map keeps the addresses above for devices).
pub const MAX_MEMORY: u64 = 1 << 40;
/// The most virtual processors the tables and the APIC IDs allow.
pub const MAX_CPUS: u32 = 255;

/// Where the guest's serial port or debug console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Our standard input and output.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Nowhere.
    None,
}

/// Where a report goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output, after the guest's own.
    Stdout,
    /// A file, replaced.
    File(PathBuf),
}

/// How code is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tier {
    /// Cold code in the evaluator, warm code compiled.
    #[default]
    Auto,
    /// The evaluator only.
    Eval,
    /// Every block through the quick tier.
    Quick,
    /// Every block through the optimising tier.
    Opt,
}

/// What VMX transitions do to cached translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FlushPolicy {
    /// Keep what the architecture lets us keep.
    #[default]
    Tagged,
    /// Flush everything, for comparison and bisecting.
    Full,
}

/// What a reset or triple fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnReset {
    /// The run ends.
    #[default]
    Exit,
    /// The machine starts again.
    Reset,
}

/// What is written for `perf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerfMode {
    /// `/tmp/perf-PID.map`.
    Map,
    /// `jit-PID.dump` for `perf inject --jit`.
    Jitdump,
}

/// One trace of `-d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum DebugItem {
    InAsm,
    Ir,
    IrOpt,
    Clif,
    OutAsm,
    Exec,
    Int,
    Mmu,
    Tlb,
    Vmx,
    Smc,
    Io,
    Boot,
}

impl DebugItem {
    /// Every item with its spelling on the command line and what it shows.
    pub const ALL: [(DebugItem, &'static str, &'static str); 13] = [
        (DebugItem::InAsm, "in_asm", "guest instructions of each block as it is translated"),
        (DebugItem::Ir, "ir", "each block's IR as the front end made it"),
        (DebugItem::IrOpt, "ir_opt", "each block's IR after the passes"),
        (DebugItem::Clif, "clif", "Cranelift IR of each region, and of blocks that go through Cranelift"),
        (
            DebugItem::OutAsm,
            "out_asm",
            "guest instructions, IR and host code of each compiled block and region, interleaved",
        ),
        (DebugItem::Exec, "exec", "each block as the dispatcher enters it"),
        (DebugItem::Int, "int", "exceptions and interrupts as they are delivered"),
        (DebugItem::Mmu, "mmu", "page walks and their faults"),
        (DebugItem::Tlb, "tlb", "TLB flushes and context switches, with their cause"),
        (DebugItem::Vmx, "vmx", "VM entries and exits"),
        (DebugItem::Smc, "smc", "writes to pages that hold translated code"),
        (DebugItem::Io, "io", "accesses to ports and device memory that nothing answers"),
        (DebugItem::Boot, "boot", "what was loaded where, and the initial state"),
    ];
}

/// A set of [`DebugItem`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DebugItems(u32);

impl DebugItems {
    /// The set with `item`.
    #[must_use]
    pub const fn with(self, item: DebugItem) -> Self {
        Self(self.0 | 1 << item as u8)
    }
    /// Whether `item` is in the set.
    #[must_use]
    pub const fn has(self, item: DebugItem) -> bool {
        self.0 >> item as u8 & 1 != 0
    }
    /// Whether nothing is traced.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// Adds the item spelled `name`; false when there is none.
    pub fn insert_named(&mut self, name: &str) -> bool {
        match DebugItem::ALL.iter().find(|(_, n, _)| *n == name) {
            Some((item, _, _)) => {
                *self = self.with(*item);
                true
            }
            None => false,
        }
    }
}

/// Why somebody outside the guest wants the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// `Ctrl-a x`.
    Quit,
    /// This signal arrived.
    Signal(u8),
    /// `--timeout` ran out.
    Timeout,
}

/// A handle through which other threads end a run: keyboard, signals, timeout.
#[derive(Clone, Default)]
pub struct Control(Arc<ControlInner>);

#[derive(Default)]
struct ControlInner {
    /// 0: keep going; else an encoded [`StopReason`].
    reason: AtomicU32,
    kick: Mutex<Option<Kick>>,
}

impl Control {
    /// Asks the run to end. The first reason stands.
    pub fn stop(&self, reason: StopReason) {
        let code = match reason {
            StopReason::Quit => 1,
            StopReason::Timeout => 2,
            StopReason::Signal(n) => 0x100 | u32::from(n),
        };
        let _ = self.0.reason.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
        self.kick();
    }
    /// Why the run has to end, when it has to. One relaxed load.
    #[must_use]
    pub fn stopped(&self) -> Option<StopReason> {
        match self.0.reason.load(Ordering::Relaxed) {
            0 => None,
            1 => Some(StopReason::Quit),
            2 => Some(StopReason::Timeout),
            n => Some(StopReason::Signal(n as u8)),
        }
    }
    /// Says how to get the vCPU's attention; the run sets it when there is a vCPU.
    pub fn set_kick(&self, kick: Kick) {
        *self.0.kick.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
    }
    /// Gets the vCPU's attention.
    pub fn kick(&self) {
        let kick = self.0.kick.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(kick) = kick {
            kick();
        }
    }
    /// Starts a thread that stops the run with [`StopReason::Timeout`] after `limit`.
    pub fn arm_timeout(&self, limit: Duration) {
        let weak = Arc::downgrade(&self.0);
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            if let Some(inner) = weak.upgrade() {
                Control(inner).stop(StopReason::Timeout);
            }
        });
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Control").field(&self.stopped()).finish()
    }
}

/// Everything a run needs to know. `Default` is a machine with nothing to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kernel image: bzImage, PVH ELF or Multiboot.
    pub kernel: Option<PathBuf>,
    /// A kernel image made in memory; goes before `kernel`.
    pub kernel_image: Option<Arc<[u8]>>,
    /// Firmware ROM, instead of a kernel.
    pub firmware: Option<PathBuf>,
    /// `FILE` for Linux, `FILE[ ARGS][,FILE…]` for Multiboot modules.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of virtual processors.
    pub cpus: u32,
    /// CPU model with its `+feature,-feature` suffixes, as given.
    pub cpu_model: String,
    /// COM1.
    pub serial: Console,
    /// Ports 0xe9 and 0x402.
    pub debugcon: Console,
    /// Standard input is a terminal in raw mode: `Ctrl-a` is our escape character.
    pub escape: bool,
    /// How code is run.
    pub tier: Tier,
    /// Whether hot loops move up to the optimising tier; off for comparison and for bisecting.
    pub regions: bool,
    /// Whether Cranelift makes blocks too, in the background; for comparison and for bisecting.
    pub cranelift_blocks: bool,
    /// Most memory for host code, in bytes.
    pub code_memory: u64,
    /// Where compiled code is kept from run to run.
    pub code_cache: Option<PathBuf>,
    /// What VMX transitions flush.
    pub flush_policy: FlushPolicy,
    /// The run ends after this long.
    pub timeout: Option<Duration>,
    /// What a reset does.
    pub on_reset: OnReset,
    /// Where the statistics go.
    pub stats: Option<Output>,
    /// What is written for `perf`.
    pub perf: Option<PerfMode>,
    /// A vmlinux or System.map with names for guest addresses.
    pub symbols: Option<PathBuf>,
    /// Traces.
    pub debug: DebugItems,
    /// Where traces go; standard error without it.
    pub trace_file: Option<PathBuf>,
    /// Ends the run from outside.
    pub control: Control,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: None,
            kernel_image: None,
            firmware: None,
            initrd: None,
            append: String::new(),
            memory: DEFAULT_MEMORY,
            cpus: 1,
            cpu_model: String::from("max"),
            serial: Console::Stdio,
            debugcon: Console::None,
            escape: false,
            tier: Tier::Auto,
            regions: true,
            cranelift_blocks: false,
            code_memory: twofold_backend::CodeMemory::DEFAULT_CAPACITY as u64,
            code_cache: None,
            flush_policy: FlushPolicy::Tagged,
            timeout: None,
            on_reset: OnReset::Exit,
            stats: None,
            perf: None,
            symbols: None,
            debug: DebugItems::default(),
            trace_file: None,
            control: Control::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_items_are_found_by_their_spelling() {
        let mut items = DebugItems::default();
        for (_, name, _) in DebugItem::ALL {
            assert!(items.insert_named(name));
        }
        assert!(!items.insert_named("nonsense"));
        assert!(DebugItem::ALL.iter().all(|(item, _, _)| items.has(*item)));
    }

    #[test]
    fn the_first_stop_reason_stands_and_kicks() {
        let control = Control::default();
        let hits = Arc::new(AtomicU32::new(0));
        let seen = hits.clone();
        control.set_kick(Arc::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        assert_eq!(control.stopped(), None);
        control.stop(StopReason::Signal(15));
        control.stop(StopReason::Quit);
        assert_eq!(control.stopped(), Some(StopReason::Signal(15)));
        assert_eq!(hits.load(Ordering::Relaxed), 2);
    }
}
