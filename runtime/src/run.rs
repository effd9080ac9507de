//! A run from configuration to outcome: builds the machine, runs its processors, says how it ended.
//!
//! Place in the pipeline: the top of the runtime, called by the `twofold` command and by tests.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use twofold_backend::Emitter;
use twofold_mmu::{CodePages, GuestRam, LegacyHole, Mmu, PhysMap};

use crate::boot::{self, firmware};
use crate::config::{Config, DebugItem, OnReset, StopReason};
use crate::cpu::{self, CpuModel};
use crate::exec::cache::CodeCache;
use crate::exec::{self, RunEnd, Waker};
use crate::platform::clock::Clock;
use crate::platform::{MMIO_REGIONS, Outcome, Platform, debug};
use crate::profile::PerfLog;
use crate::stats::{self, RunFacts};
use crate::symbols::{SymbolTable, Symbols};
use crate::trace::Trace;
use crate::vcpu::{Shared, Shutdown, Vcpu};
use crate::vmx::VmxStats;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered the machine off.
    PowerOff,
    /// The guest wrote this value to the isa-debug-exit port.
    DebugExit(u32),
    /// The guest asked for a reset, and resets end the run.
    Reset,
    /// The guest triple-faulted, and resets end the run.
    TripleFault,
    /// HLT with interrupts off and nobody to wake it.
    Halted,
    /// Somebody outside the guest ended it.
    Stopped(StopReason),
}

impl Ending {
    /// The exit status of the `twofold` command.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Ending::PowerOff | Ending::Stopped(StopReason::Quit) => 0,
            Ending::DebugExit(v) => (v << 1 | 1) as u8,
            Ending::Stopped(StopReason::Timeout) => 4,
            Ending::Reset | Ending::TripleFault => 6,
            Ending::Halted => 8,
            Ending::Stopped(StopReason::Signal(n)) => 128u8.wrapping_add(n),
        }
    }
}

/// What a run leaves behind.
#[derive(Debug)]
pub struct RunOutcome {
    /// How it ended.
    pub ending: Ending,
    /// A register dump, for endings that want one (reset, triple fault, halted).
    pub registers: Option<String>,
    /// The statistics, JSON, when they were asked for.
    pub stats: Option<String>,
    /// What was written for `perf`, when it was asked for.
    pub profile: Option<PathBuf>,
    /// What is left of the machine.
    pub remains: Remains,
}

/// A machine that has ended. To take it apart takes time, which a process that ends with it saves by forgetting this.
pub struct Remains {
    _vcpus: Vec<Box<Vcpu>>,
}

impl fmt::Debug for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remains")
    }
}

/// Why a run could not start or go on.
#[derive(Debug)]
pub enum Error {
    /// What was asked for makes no sense, or a file cannot be used: exit status 2. One line: what, where, what to do.
    Usage(String),
    /// An error in twofold itself: exit status 10.
    Internal(String),
}

impl Error {
    /// The exit status of the `twofold` command.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Internal(_) => 10,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text) => f.write_str(text),
            Error::Internal(text) => write!(f, "internal: {text}"),
        }
    }
}

impl std::error::Error for Error {}

/// Runs a machine to its end.
///
/// # Errors
/// When the machine cannot be built as `config` says, or twofold itself fails.
pub fn run(config: &Config) -> Result<RunOutcome, Error> {
    let start = Instant::now();
    let mut symbols = load_symbols(config)?;
    let mut vcpus = Machine::new(config)?.boot(config)?;
    if let Some(kind) = config.perf {
        let log = PerfLog::create(kind, std::mem::take(&mut symbols), vcpus[0].jit.code.as_ref());
        let log = log.map_err(|e| Error::Usage(format!("--perf: cannot write in /tmp: {e}; leave the option out")))?;
        vcpus[0].jit.perf = Some(Box::new(log));
    }
    let waker = vcpus[0].waker.clone();
    config.control.set_kick(waker.as_kick());
    if let Some(limit) = config.timeout {
        config.control.arm_timeout(limit);
    }
    let (end, last) = loop {
        let (end, last) = exec::turns::run(&mut vcpus, &config.control);
        let again = matches!(end, RunEnd::Outcome(Outcome::Reset) | RunEnd::Shutdown(Shutdown::TripleFault));
        if config.on_reset != OnReset::Reset || !again || config.control.stopped().is_some() {
            break (end, last);
        }
        restart(&mut vcpus, last, config)?;
    };
    waker.detach();
    // The one that ended the run holds the blocks; the file tells of it and of what all retired.
    let total = vcpus.iter().map(|v| v.state.retired).sum();
    let vmx = vcpus.iter().fold(VmxStats::default(), |sum, v| sum.with(&v.vmx.stats));
    let vcpu = &mut vcpus[last];
    (vcpu.state.retired, vcpu.vmx.stats) = (total, vmx);
    vcpu.platform().flush();
    vcpu.trace.flush();
    let ending = match end {
        RunEnd::Outcome(Outcome::PowerOff) => Ending::PowerOff,
        RunEnd::Outcome(Outcome::DebugExit(v)) => Ending::DebugExit(v),
        RunEnd::Outcome(Outcome::Reset) => Ending::Reset,
        RunEnd::Shutdown(Shutdown::TripleFault) => Ending::TripleFault,
        // A machine does not end with a turn.
        RunEnd::Halted | RunEnd::TurnOver | RunEnd::Asleep => Ending::Halted,
        RunEnd::Stopped(reason) => Ending::Stopped(reason),
    };
    if let Some(Err(e)) = vcpu.jit.cache.as_mut().map(CodeCache::save) {
        vcpu.trace.warn_once("cache", &format!("the code cache is not written: {e}"));
    }
    let dump = matches!(ending, Ending::Reset | Ending::TripleFault | Ending::Halted);
    // What looking for symbols takes is not the guest's.
    let usage = usage();
    let facts = RunFacts {
        ending,
        wall: start.elapsed().as_secs_f64(),
        cpu: usage.cpu_seconds,
        peak_rss: usage.peak_rss,
        guest_memory: config.memory,
    };
    let mut profile = None;
    if let Some(log) = vcpu.jit.perf.take() {
        let (written, found) = log.finish(vcpu);
        symbols = found;
        profile =
            Some(written.map_err(|e| Error::Usage(format!("--perf: cannot write in /tmp: {e}; make room there")))?);
    }
    let stats = config.stats.is_some().then(|| {
        symbols.resolve(vcpu);
        let value = stats::collect(vcpu, &facts, |address| symbols.name(address));
        serde_json::to_string_pretty(&value).unwrap_or_default()
    });
    let registers = dump.then(|| dump_registers(vcpu));
    Ok(RunOutcome { ending, registers, stats, profile, remains: Remains { _vcpus: vcpus } })
}

/// The names that files give: what `--symbols` names, and the kernel when it is an ELF.
fn load_symbols(config: &Config) -> Result<Symbols, Error> {
    let mut symbols = Symbols::default();
    if let Some(path) = &config.symbols {
        symbols.add_file(SymbolTable::from_file(path).map_err(|e| Error::Usage(format!("--symbols: {e}")))?);
    }
    if config.stats.is_some() || config.perf.is_some() {
        let kernel = match (&config.kernel_image, &config.kernel) {
            (Some(image), _) => SymbolTable::from_elf(&image[..]),
            (None, Some(path)) => SymbolTable::from_elf_file(path),
            (None, None) => None,
        };
        kernel.into_iter().for_each(|table| symbols.add_file(table));
    }
    Ok(symbols)
}

/// Resets the machine: devices and processors are as after power-up, the guest is loaded again over the memory as it is
/// (a reset does not clear memory), and nothing that was translated is left. `last` is the processor with the machinery.
fn restart(vcpus: &mut [Box<Vcpu>], last: usize, config: &Config) -> Result<(), Error> {
    let blocks: Vec<_> = vcpus[last].jit.tbs.iter().map(|(id, _)| id).collect();
    exec::slow::drop_blocks(&mut vcpus[last], &blocks);
    vcpus[last].jit.tbs.quiescent();
    if let Ok([first, last]) = vcpus.get_disjoint_mut([0, last]) {
        std::mem::swap(&mut first.jit, &mut last.jit);
        first.state.exec_counts = last.state.exec_counts;
    }
    vcpus[0].platform().reset();
    let shared = vcpus[0].shared.clone();
    let loaded = boot::load(config, &shared.map).map_err(|e| Error::Usage(e.to_string()))?;
    for vcpu in vcpus.iter_mut() {
        cpu::reset(vcpu);
        vcpu.mmu.jump_clear();
        vcpu.jit.forget_exits();
        vcpu.wait_for_sipi = vcpu.index != 0;
        if loaded.without_firmware {
            vcpu.cold.firmware_mtrrs();
        }
    }
    let boot = &mut vcpus[0];
    if boot.debug.has(DebugItem::Boot) {
        for line in std::iter::once(&String::from("the machine is reset")).chain(&loaded.report) {
            boot.trace.write(&format!("boot: {line}\n"));
        }
    }
    enter_guest(boot, &loaded);
    // What was written to blocks before they went is of no interest now.
    let _ = boot.mmu.code().take_written();
    Ok(())
}

/// Makes the bootstrap processor, which has its reset values, begin with what was loaded.
fn enter_guest(boot: &mut Vcpu, loaded: &boot::Loaded) {
    loaded.entry.apply(&mut boot.state);
    cpu::refresh_space(boot);
    boot.mmu.reset(&boot.space).store(&mut boot.state);
    if loaded.without_firmware {
        boot.platform().enter_virtual_wire_mode();
    }
    if loaded.from_bios {
        boot.platform().leave_as_bios();
    }
}

/// The parts of a machine before anything runs.
struct Machine {
    shared: Arc<Shared>,
    model: Arc<CpuModel>,
    waker: Arc<Waker>,
}

impl Machine {
    fn new(config: &Config) -> Result<Self, Error> {
        let usage = |e: &dyn fmt::Display| Error::Usage(e.to_string());
        let model = CpuModel::parse(&config.cpu_model).map_err(|e| usage(&format!("--cpu: {e}")))?;
        let ram = GuestRam::new(config.memory).map_err(|e| usage(&format!("--memory: {e}")))?;
        let mut map = PhysMap::new(Arc::new(ram), LegacyHole::default());
        for (id, (base, size)) in MMIO_REGIONS.into_iter().enumerate() {
            // A firmware ROM may reach down to where a device for tests would be.
            if config.firmware.is_some() && base.0 == debug::MEMORY_BASE {
                continue;
            }
            map.add_mmio(base, size, id as u32).map_err(|e| Error::Internal(e.to_string()))?;
        }
        if let Some(path) = &config.firmware {
            firmware::map(path, &mut map).map_err(|e| usage(&e))?;
        }
        let waker = Waker::new();
        let clock = Clock::host();
        let platform = Platform::from_config(config, clock.clone(), waker.as_kick())?;
        let shared = Shared::new(Arc::new(map), platform, clock);
        Ok(Self { shared: Arc::new(shared), model: Arc::new(model), waker })
    }

    /// Loads the guest and makes the processors: the first one ready for its first instruction, the others waiting.
    fn boot(self, config: &Config) -> Result<Vec<Box<Vcpu>>, Error> {
        let loaded = boot::load(config, &self.shared.map).map_err(|e| Error::Usage(e.to_string()))?;
        let mut trace = open_trace(config)?;
        if config.debug.has(DebugItem::Boot) {
            for line in &loaded.report {
                trace.write(&format!("boot: {line}\n"));
            }
        }
        let map = &self.shared.map;
        let code = Arc::new(CodePages::new(map.high_ram_end().max(map.low_ram_end())));
        let mut vcpus = Vec::new();
        for index in 0..config.cpus as usize {
            let mut vcpu = self.vcpu(config, index, &code)?;
            vcpu.trace = trace.clone();
            vcpu.cold.cpus = config.cpus;
            cpu::reset(&mut vcpu);
            vcpu.wait_for_sipi = index != 0;
            if loaded.without_firmware {
                vcpu.cold.firmware_mtrrs();
            }
            vcpus.push(vcpu);
        }
        if config.debug.has(DebugItem::Io) {
            self.shared.platform().set_trace(Box::new(move |line| trace.write(&format!("{line}\n"))));
        }
        let boot = &mut vcpus[0];
        boot.waker = self.waker;
        boot.waker.attach(&boot.state.attention);
        enter_guest(boot, &loaded);
        Ok(vcpus)
    }

    fn vcpu(&self, config: &Config, index: usize, code: &Arc<CodePages>) -> Result<Box<Vcpu>, Error> {
        let policy = match config.flush_policy {
            crate::config::FlushPolicy::Tagged => twofold_mmu::FlushPolicy::Tagged,
            crate::config::FlushPolicy::Full => twofold_mmu::FlushPolicy::Full,
        };
        let mmu = Mmu::new(self.shared.map.clone(), code.clone(), policy)
            .map_err(|e| Error::Internal(format!("no memory for the TLB: {e}")))?;
        // The machinery goes round; whoever does not have it has one without host code.
        let tier = if index == 0 { config.tier } else { crate::config::Tier::Eval };
        let most = usize::try_from(config.code_memory).unwrap_or(usize::MAX);
        let emitter = if config.cranelift_blocks { Emitter::Cranelift } else { Emitter::Direct };
        let options = twofold_backend::Options { emitter, ..Default::default() };
        let mut jit = exec::Jit::with_code_memory(tier, options, most);
        let mut warning = None;
        if let (Some(dir), 0, true) = (&config.code_cache, index, config.debug.is_empty()) {
            let opened = CodeCache::open(dir, self.model.features);
            let cannot = |e| Error::Usage(format!("--code-cache: cannot make {}: {e}", dir.display()));
            let (cache, why) = opened.map_err(cannot)?;
            jit.set_cache(cache);
            warning = why;
        }
        jit.policy.regions &= config.regions;
        jit.policy.regions_at_once &= config.regions;
        let mut vcpu = Vcpu::new(index, self.shared.clone(), self.model.clone(), mmu, jit);
        vcpu.profile.on = config.stats.is_some();
        // Code that counts is another run's code no more.
        if config.stats.is_some() && vcpu.jit.cache.is_none() {
            vcpu.jit.counts.turn_on();
        }
        if let Some(why) = warning {
            vcpu.trace.warn_once("cache", &why);
        }
        vcpu.debug = config.debug;
        Ok(vcpu)
    }
}

fn open_trace(config: &Config) -> Result<Trace, Error> {
    let Some(path) = &config.trace_file else { return Ok(Trace::default()) };
    let file = std::fs::File::create(path).map_err(|e| {
        Error::Usage(format!(
            "--trace-file: cannot create {}: {e}; name a file in a directory you may write to",
            path.display()
        ))
    })?;
    Ok(Trace::new(Box::new(std::io::BufWriter::new(file))))
}

/// What the operating system says of this process.
struct Usage {
    cpu_seconds: f64,
    peak_rss: u64,
}

fn usage() -> Usage {
    // Peak resident set and processor time as /proc tells them; 0 where there is no /proc.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|v| v.trim().strip_suffix("kB")?.trim().parse().ok());
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    // Fields 14 and 15 of stat(5), in clock ticks of 10 ms.
    Usage { cpu_seconds: (ticks(11) + ticks(12)) as f64 / 100.0, peak_rss: kib.unwrap_or(0u64) * 1024 }
}

/// The registers, for a person.
#[must_use]
pub fn dump_registers(vcpu: &Vcpu) -> String {
    use std::fmt::Write;
    let s = &vcpu.state;
    let mut t = String::new();
    let _ = writeln!(t, "RIP {:016x}  RFLAGS {:08x}  CPL {}  {:?}", s.rip, s.rflags(), s.cpl, vcpu.space.mode);
    for row in 0..4 {
        for i in 0..4 {
            let n = row * 4 + i;
            let _ = write!(t, "{:<3} {:016x}  ", twofold_arch::Gpr::NAMES[n].to_uppercase(), s.gpr[n]);
        }
        t.truncate(t.trim_end().len());
        t.push('\n');
    }
    for (seg, name) in s.seg.iter().zip(twofold_arch::SegReg::NAMES) {
        let _ = writeln!(
            t,
            "{:<4} {:04x}  base {:016x}  limit {:08x}  attr {:05x}",
            name.to_uppercase(),
            seg.selector,
            seg.base,
            seg.limit,
            seg.attr
        );
    }
    let _ =
        writeln!(t, "GDTR {:016x} {:04x}  IDTR {:016x} {:04x}", s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit);
    let _ = writeln!(
        t,
        "CR0 {:08x}  CR2 {:016x}  CR3 {:016x}  CR4 {:08x}  EFER {:08x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer
    );
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_the_documented_ones() {
        assert_eq!(Ending::PowerOff.exit_status(), 0);
        assert_eq!(Ending::DebugExit(0).exit_status(), 1);
        assert_eq!(Ending::DebugExit(0x10).exit_status(), 0x21);
        assert_eq!(Ending::DebugExit(0xffff_ffff).exit_status(), 0xff);
        assert_eq!(Ending::Stopped(StopReason::Timeout).exit_status(), 4);
        assert_eq!(Ending::TripleFault.exit_status(), 6);
        assert_eq!(Ending::Reset.exit_status(), 6);
        assert_eq!(Ending::Halted.exit_status(), 8);
        assert_eq!(Ending::Stopped(StopReason::Signal(15)).exit_status(), 143);
        assert_eq!(Error::Usage(String::new()).exit_status(), 2);
        assert_eq!(Error::Internal(String::new()).exit_status(), 10);
    }
}
