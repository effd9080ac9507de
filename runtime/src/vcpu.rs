//! One virtual processor: its registers, its translations of addresses, and the way it reaches memory and devices.
//!
//! A [`Vcpu`] belongs to one thread. What processors share is in [`Shared`]. The helpers of [`crate::cpu`] are functions
//! on `&mut Vcpu`; translated code works on [`Vcpu::state`] and comes back here through [`crate::exec::slow`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use twofold_arch::control::rflags;
use twofold_arch::state::FaultRecord;
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CpuState, Exception, LinearAddr, PAGE_SIZE, PhysAddr};
use twofold_mmu::mmu::BytesOutcome;
use twofold_mmu::{
    Access, AccessKind, AddressSpace, Fault, JumpCacheEntry, Mmu, MmuStats, Part, PhysMap, ReadOutcome, Target,
    Translation, WriteOutcome,
};

use crate::config::{DebugItem, DebugItems};
use crate::cpu::{ColdState, CpuModel, smm::Smm};
use crate::exec::counters::{Phase, Profile};
use crate::exec::dispatch::{PENDING_EXCEPTION, PENDING_VM_EXIT};
use crate::exec::turns::Broadcast;
use crate::exec::{Counters, Jit, Waker};
use crate::platform::{Platform, clock::Clock};
use crate::trace::Trace;
use crate::vmx::{self, VmxState};

/// Why an instruction was abandoned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trap {
    /// An exception to be delivered with RIP at the instruction.
    Exception(Exception),
    /// A VM exit, whose particulars are in [`Vcpu::vmx`].
    VmExit,
    /// It would write to the block that it runs in: it runs again on its own.
    Restart,
}

impl From<Exception> for Trap {
    fn from(e: Exception) -> Self {
        Trap::Exception(e)
    }
}

impl Trap {
    /// Writes the trap where translated code's caller finds it.
    pub fn record(self, record: &mut FaultRecord) {
        let e = match self {
            Trap::Exception(e) => e,
            Trap::VmExit => return record.pending = PENDING_VM_EXIT,
            Trap::Restart => return record.pending = crate::exec::dispatch::PENDING_RESTART,
        };
        record.pending = PENDING_EXCEPTION;
        record.vector = e.vector as u32;
        record.error = e.error.unwrap_or(0);
        record.has_error = u32::from(e.error.is_some());
        record.cr2 = e.cr2;
    }
    /// The trap in a record. A vector there is none of reads as #UD.
    #[must_use]
    pub fn from_record(record: &FaultRecord) -> Trap {
        if record.pending == PENDING_VM_EXIT {
            return Trap::VmExit;
        }
        let vector =
            twofold_arch::Vector::from_number(record.vector as u8).unwrap_or(twofold_arch::Vector::InvalidOpcode);
        Trap::Exception(Exception { vector, error: (record.has_error != 0).then_some(record.error), cr2: record.cr2 })
    }
}

/// On whose behalf memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemAs {
    /// An explicit access at the current privilege level, through a data segment: non-canonical is #GP(0).
    Cpl,
    /// An explicit access at the current privilege level through SS: non-canonical is #SS(0).
    Stack,
    /// An implicit supervisor access (descriptor tables, TSS, IDT): U/S = supervisor whatever the CPL, SMAP always applies.
    System,
    /// Explicit access to a stack of privilege level 0..2 while the CPL is still 3: supervisor rights, explicit for SMAP; #SS.
    InnerStack,
}

/// What ends the execution of guest code on this processor until somebody outside acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    /// A fault while a double fault was being delivered.
    TripleFault,
}

/// What all processors of a machine share.
#[derive(Debug)]
pub struct Shared {
    /// Guest memory and what else answers at physical addresses.
    pub map: Arc<PhysMap>,
    /// The devices.
    pub platform: Mutex<Platform>,
    /// Time.
    pub clock: Clock,
    due: Box<[Arc<AtomicBool>]>,
}

impl Shared {
    /// What the processors of a machine with these devices share.
    #[must_use]
    pub fn new(map: Arc<PhysMap>, platform: Platform, clock: Clock) -> Self {
        let due = platform.due();
        Self { map, platform: Mutex::new(platform), clock, due }
    }

    /// Whether an interrupt or a signal may wait for processor `index`. One load.
    #[inline]
    #[must_use]
    pub fn is_due(&self, index: usize) -> bool {
        self.due.get(index).is_none_or(|d| d.load(Ordering::Acquire))
    }

    /// The devices.
    pub fn platform(&self) -> MutexGuard<'_, Platform> {
        self.platform.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One virtual processor.
pub struct Vcpu {
    /// Its number, 0 for the boot processor.
    pub index: usize,
    /// The registers that translated code sees.
    pub state: Box<CpuState>,
    /// Its translations of addresses.
    pub mmu: Mmu,
    /// The address space of the current CR0, CR3, CR4, EFER: what `mmu` is asked with.
    pub space: AddressSpace,
    /// The CPU model: CPUID and capability MSRs.
    pub model: Arc<CpuModel>,
    /// What it shares with the others.
    pub shared: Arc<Shared>,
    /// Rarely used registers.
    pub cold: ColdState,
    /// Data breakpoints.
    pub watch: crate::cpu::debug::Watch,
    /// VMX.
    pub vmx: VmxState,
    /// System-management mode.
    pub smm: Smm,
    /// Counters of events.
    pub counters: Counters,
    /// Where its thread's time goes.
    pub profile: Profile,
    /// Blocks, tiers and host code.
    pub jit: Jit,
    /// Its ear for other threads.
    pub waker: Arc<Waker>,
    /// Runs in turn with others on one thread (see [`crate::exec::turns`]).
    pub in_turn: bool,
    /// A helper that a block called is at work: what it writes may be that block.
    pub in_helper: bool,
    /// Gives up the rest of its turn: it spins.
    pub yields: bool,
    /// SYSCALL or SYSRET ran with RFLAGS.TF set before or after it: whether a single-step trap follows.
    pub step_after: Option<bool>,
    /// Waits for a start-up IPI.
    pub wait_for_sipi: bool,
    /// What `-d` traces.
    pub debug: DebugItems,
    /// Where traces go.
    pub trace: Trace,
    /// What `-d tlb` has told already.
    pub traced_mmu: MmuStats,
}

impl Vcpu {
    /// Processor `index` of a machine, with registers of zero, run by `jit`. Quiet: no profile, no traces.
    #[must_use]
    pub fn new(index: usize, shared: Arc<Shared>, model: Arc<CpuModel>, mmu: Mmu, jit: Jit) -> Box<Self> {
        let mut vcpu = Box::new(Self {
            index,
            state: CpuState::zeroed(),
            mmu,
            space: AddressSpace::reset(model.phys_bits),
            model,
            shared,
            cold: ColdState::default(),
            vmx: VmxState::default(),
            smm: Smm::default(),
            counters: Counters::default(),
            profile: Profile::default(),
            jit,
            waker: Waker::new(),
            watch: crate::cpu::debug::Watch::default(),
            in_turn: false,
            in_helper: false,
            yields: false,
            step_after: None,
            wait_for_sipi: false,
            debug: DebugItems::default(),
            trace: Trace::default(),
            traced_mmu: MmuStats::default(),
        });
        vcpu.state.vcpu = std::ptr::from_mut(&mut *vcpu).expose_provenance() as u64;
        vcpu.state.helpers = std::ptr::from_ref(&*vcpu.jit.helpers).expose_provenance() as u64;
        vcpu
    }

    /// The devices.
    pub fn platform(&self) -> MutexGuard<'_, Platform> {
        self.shared.platform()
    }

    /// The guest's time-stamp counter.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.shared.clock.tsc().wrapping_add(self.state.msrs.tsc_offset)
    }

    /// Books the time since the last call on the phase that was, and begins `phase`. Returns the phase that was.
    #[inline]
    pub fn enter_phase(&mut self, phase: Phase) -> Phase {
        let was = self.profile.phase;
        if self.profile.on && was != phase {
            let now = self.shared.clock.now_ns();
            self.profile.ns[was as usize] += now.saturating_sub(self.profile.since);
            self.profile.since = now;
            self.profile.phase = phase;
        }
        was
    }

    /// Has the other vCPUs follow what this one does to the blocks, before their next turn.
    pub fn tell_others(&mut self, what: Broadcast) {
        if self.in_turn {
            self.jit.broadcasts.push(what);
        }
    }

    /// Whether anything but INIT, NMI and SMI can end its sleep.
    #[must_use]
    pub fn can_take_interrupts(&self) -> bool {
        !self.wait_for_sipi && (self.state.rflags_sys & rflags::IF != 0 || self.vmx.non_root)
    }

    /// Whether something that another processor sent since its last turn ends its sleep.
    #[must_use]
    pub fn is_woken(&self) -> bool {
        use crate::platform::signal;
        let p = self.platform();
        let signals = p.signals(self.index);
        let interrupt = self.can_take_interrupts() && p.interrupt_pending(self.index).is_some();
        interrupt || signals & signal::SIPI != 0 || signals & self.waking_signals() != 0
    }

    /// The signals that end its sleep.
    fn waking_signals(&self) -> u32 {
        use crate::platform::signal;
        match (self.wait_for_sipi, self.smm.is_active()) {
            (true, _) => 0,
            (_, true) => signal::NMI,
            _ => signal::NMI | signal::INIT | signal::SMI,
        }
    }

    /// PAUSE: it spins, so the processor it waits for should have its turn.
    pub fn pause(&mut self) {
        if self.in_turn {
            self.yields = true;
            self.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Reads a port.
    pub fn io_read(&mut self, port: u16, size: u8) -> u32 {
        self.counters.port_io += 1;
        self.watch_port(port, size);
        self.with_devices(|p| p.io_read(port, size))
    }

    /// Writes a port.
    pub fn io_write(&mut self, port: u16, size: u8, value: u32) {
        self.counters.port_io += 1;
        self.watch_port(port, size);
        self.with_devices(|p| p.io_write(port, size, value));
    }

    /// Does something with the devices, then sees to it that the dispatcher looks at what came of it.
    pub fn with_devices<R>(&mut self, f: impl FnOnce(&mut Platform) -> R) -> R {
        let index = self.index;
        let mut p = self.platform();
        let r = f(&mut p);
        let yields = self.in_turn && p.take_nmi_sent();
        let look = yields || p.outcome().is_some() || p.interrupt_pending(index).is_some() || p.signals(index) != 0;
        drop(p);
        self.yields |= yields;
        if look {
            self.state.attention.store(-1, std::sync::atomic::Ordering::Relaxed);
        }
        r
    }

    // ---- memory, as helpers ask for it -------------------------------------------------------------------------------

    #[inline]
    fn access(&self, kind: AccessKind, on_behalf: MemAs) -> Access {
        let s = &self.state;
        let ac = s.rflags_sys & rflags::AC != 0;
        match on_behalf {
            MemAs::System => Access::implicit(kind),
            MemAs::InnerStack => Access { kind, user: false, implicit: false, ac },
            MemAs::Cpl | MemAs::Stack => Access { kind, user: s.cpl == 3, implicit: false, ac },
        }
    }

    /// Reads 1, 2, 4 or 8 bytes, zero-extended.
    ///
    /// # Errors
    /// The exception of the access.
    #[inline]
    pub fn read(&mut self, la: LinearAddr, size: u32, on_behalf: MemAs) -> Result<u64, Trap> {
        let access = self.access(AccessKind::Read, on_behalf);
        if !self.watch.armed
            && let Some(value) = self.mmu.load_cached(self.space.mem_mode(access), la, size)
        {
            return Ok(value);
        }
        self.watch_for(la, u64::from(size), false, on_behalf);
        self.read_access(la, size, access, matches!(on_behalf, MemAs::Stack | MemAs::InnerStack))
    }

    /// Writes 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// The exception of the access; nothing is written then.
    #[inline]
    pub fn write(&mut self, la: LinearAddr, size: u32, value: u64, on_behalf: MemAs) -> Result<(), Trap> {
        let access = self.access(AccessKind::Write, on_behalf);
        if !self.watch.armed && self.mmu.store_cached(self.space.mem_mode(access), la, size, value) {
            return Ok(());
        }
        self.watch_for(la, u64::from(size), true, on_behalf);
        self.write_access(la, size, value, access, matches!(on_behalf, MemAs::Stack | MemAs::InnerStack))
    }

    /// `N` quadwords at `la`, when the TLB has them in one page and nobody watches; `None`: read them one by one.
    #[inline]
    pub fn read_quads<const N: usize>(&self, la: LinearAddr, on_behalf: MemAs) -> Option<[u64; N]> {
        let access = self.access(AccessKind::Read, on_behalf);
        if self.watch.armed { None } else { self.mmu.load_quads_cached(self.space.mem_mode(access), la) }
    }

    /// Writes quadwords from `la` on, when the TLB has them in one page and nobody watches; false: nothing was written, write
    /// them one by one.
    #[inline]
    pub fn write_quads(&mut self, la: LinearAddr, values: &[u64], on_behalf: MemAs) -> bool {
        let access = self.access(AccessKind::Write, on_behalf);
        !self.watch.armed && self.mmu.store_quads_cached(self.space.mem_mode(access), la, values)
    }

    /// Fills `buf` from guest memory.
    ///
    /// # Errors
    /// The exception of the access.
    pub fn read_bytes(&mut self, la: LinearAddr, buf: &mut [u8], on_behalf: MemAs) -> Result<(), Trap> {
        self.watch_for(la, buf.len() as u64, false, on_behalf);
        let access = self.access(AccessKind::Read, on_behalf);
        self.read_bytes_access(la, buf, access, matches!(on_behalf, MemAs::Stack | MemAs::InnerStack))
    }

    /// Copies `data` to guest memory.
    ///
    /// # Errors
    /// The exception of the access; nothing is written then.
    pub fn write_bytes(&mut self, la: LinearAddr, data: &[u8], on_behalf: MemAs) -> Result<(), Trap> {
        self.watch_for(la, data.len() as u64, true, on_behalf);
        let access = self.access(AccessKind::Write, on_behalf);
        self.write_bytes_access(la, data, access, matches!(on_behalf, MemAs::Stack | MemAs::InnerStack))
    }

    /// The host address of the byte at `la` and how many bytes follow it in its page, when they may be accessed there
    /// directly: RAM, and for writes no translated code.
    ///
    /// # Errors
    /// The exception of the access.
    pub fn host_span(
        &mut self,
        la: LinearAddr,
        write: bool,
        on_behalf: MemAs,
    ) -> Result<Option<(*mut u8, usize)>, Trap> {
        let access = self.access(if write { AccessKind::Write } else { AccessKind::Read }, on_behalf);
        let stack = matches!(on_behalf, MemAs::Stack | MemAs::InnerStack);
        let r = self.mmu.translate(&self.space, la, access);
        self.after_fill(la, access, r.as_ref().err());
        let t = r.map_err(|f| self.trap_of(f, stack))?;
        if write {
            // INS asks before it asks the device.
            self.guard_running_block(la, 8, access)?;
        }
        // Data breakpoints see single accesses only.
        let host = t.host.filter(|_| !self.watch.armed);
        Ok(host.map(|h| (std::ptr::with_exposed_provenance_mut(h as usize), (PAGE_SIZE - la.page_offset()) as usize)))
    }

    // ---- memory, as translated code asks for it ----------------------------------------------------------------------

    /// [`Vcpu::read`] by code whose data accesses use `mode`; `stack`: through SS.
    ///
    /// # Errors
    /// The exception of the access.
    pub fn read_mode(&mut self, la: LinearAddr, size: u32, mode: MemMode, stack: bool) -> Result<u64, Trap> {
        self.watch_access(la, u64::from(size), false);
        self.read_access(la, size, Access::read(mode), stack)
    }
    /// [`Vcpu::write`] by code whose data accesses use `mode`.
    ///
    /// # Errors
    /// The exception of the access; nothing is written then.
    pub fn write_mode(
        &mut self,
        la: LinearAddr,
        size: u32,
        value: u64,
        mode: MemMode,
        stack: bool,
    ) -> Result<(), Trap> {
        self.watch_access(la, u64::from(size), true);
        self.write_access(la, size, value, Access::write(mode), stack)
    }
    /// [`Vcpu::read_bytes`] by code whose data accesses use `mode`.
    ///
    /// # Errors
    /// The exception of the access.
    pub fn read_bytes_mode(&mut self, la: LinearAddr, buf: &mut [u8], mode: MemMode, stack: bool) -> Result<(), Trap> {
        self.watch_access(la, buf.len() as u64, false);
        self.read_bytes_access(la, buf, Access::read(mode), stack)
    }
    /// [`Vcpu::write_bytes`] by code whose data accesses use `mode`.
    ///
    /// # Errors
    /// The exception of the access; nothing is written then.
    pub fn write_bytes_mode(&mut self, la: LinearAddr, data: &[u8], mode: MemMode, stack: bool) -> Result<(), Trap> {
        self.watch_access(la, data.len() as u64, true);
        self.write_bytes_access(la, data, Access::write(mode), stack)
    }

    /// Whether `size` bytes at `la` may be written; the physical pieces of the access.
    ///
    /// # Errors
    /// The exception that a write would raise.
    pub fn resolve_write(
        &mut self,
        la: LinearAddr,
        size: u32,
        mode: MemMode,
        stack: bool,
    ) -> Result<twofold_mmu::Parts, Trap> {
        let r = self.mmu.resolve(&self.space, la, size, Access::write(mode));
        self.after_fill(la, Access::write(mode), r.as_ref().err());
        r.map_err(|f| self.trap_of(f, stack))
    }

    /// Where a write to the byte at `la` goes.
    ///
    /// # Errors
    /// The exception that a write would raise.
    pub fn translate_write(&mut self, la: LinearAddr, mode: MemMode, stack: bool) -> Result<Translation, Trap> {
        let access = Access::write(mode);
        let r = self.mmu.translate(&self.space, la, access);
        self.after_fill(la, access, r.as_ref().err());
        r.map_err(|f| self.trap_of(f, stack))
    }

    /// The physical address of the instruction byte at `la`.
    ///
    /// # Errors
    /// The exception of the fetch.
    pub fn fetch_address(&mut self, la: LinearAddr) -> Result<PhysAddr, Trap> {
        let user = self.state.cpl == 3;
        let r = self.mmu.translate_fetch(&self.space, la, user);
        self.after_fill(la, Access::fetch(user), r.as_ref().err());
        let pa = r.map_err(|f| self.trap_of(f, false))?.pa;
        if self.vmx.non_root {
            vmx::apic::check_fetch(self, la, pa)?;
        }
        Ok(pa)
    }

    /// Puts an entry in the jump cache for the code at `la`.
    pub fn jump_insert(&mut self, la: LinearAddr, entry: JumpCacheEntry) {
        let user = self.state.cpl == 3;
        let global = self.mmu.translate_fetch(&self.space, la, user).is_ok_and(|f| f.global);
        self.mmu.jump_insert(la, entry, global);
    }

    /// Data breakpoints look at an access. One that faults afterwards is forgotten with its instruction.
    #[inline]
    fn watch_access(&mut self, la: LinearAddr, size: u64, write: bool) {
        if self.watch.armed {
            crate::cpu::debug::note_access(&self.state, &mut self.watch, la, size, write);
        }
    }

    /// Breakpoints on ports look at an access.
    #[inline]
    fn watch_port(&mut self, port: u16, size: u8) {
        if self.watch.armed {
            crate::cpu::debug::note_port(&self.state, &mut self.watch, port, size);
        }
    }

    /// [`Vcpu::watch_access`] of a helper; the processor's own accesses to its tables do not count.
    #[inline]
    fn watch_for(&mut self, la: LinearAddr, size: u64, write: bool, on_behalf: MemAs) {
        if on_behalf != MemAs::System {
            self.watch_access(la, size, write);
        }
    }

    // ---- the one way to memory ----------------------------------------------------------------------------------------

    /// After anything that may have filled the TLB: a table that grew must be where translated code looks.
    #[inline]
    fn after_fill(&mut self, la: LinearAddr, access: Access, fault: Option<&Fault>) {
        if self.debug.has(DebugItem::Mmu) {
            self.trace_walk(la, access, fault);
        }
        if self.mmu.take_view_change() {
            self.mmu.view().store(&mut self.state);
        }
    }

    /// `-d mmu`: the walk that the last access needed, if it did, step by step.
    #[cold]
    fn trace_walk(&mut self, la: LinearAddr, access: Access, fault: Option<&Fault>) {
        let misses = self.mmu.stats().misses;
        if std::mem::replace(&mut self.traced_mmu.misses, misses) == misses {
            return;
        }
        // An access that crosses a page may have failed on the second.
        let at = match fault {
            Some(Fault::Page { la, .. } | Fault::NonCanonical { la }) => *la,
            Some(Fault::Ept(f)) => f.la.unwrap_or(la),
            None => la,
        };
        let walk = self.mmu.trace_walk(&self.space, at, access);
        let mut text = walk.to_string();
        if let Ok(m) = &walk.outcome
            && let Some((ept, ignore_pat)) = m.stage2.memory_type
        {
            use twofold_arch::vmx::ept::memory_type::{UC, effective, name};
            let (ept, pat) = (u64::from(ept), self.state.msrs.pat >> (8 * u32::from(m.pat_index & 7)) & 7);
            let off = self.state.cr0 & twofold_arch::control::cr0::CD != 0;
            let memory_type = if off { UC } else { effective(ept, ignore_pat, pat) };
            let ignored = if ignore_pat { ", ignored" } else { "" };
            text += &format!("  memory type {}: EPT {}, PAT {}{ignored}\n", name(memory_type), name(ept), name(pat));
        }
        self.trace.write(&text);
    }

    fn read_access(&mut self, la: LinearAddr, size: u32, access: Access, stack: bool) -> Result<u64, Trap> {
        let r = self.mmu.read(&self.space, la, size, access);
        self.after_fill(la, access, r.as_ref().err());
        match r.map_err(|f| self.trap_of(f, stack))? {
            ReadOutcome::Value(v) => Ok(v),
            ReadOutcome::Io(parts) => {
                let mut b = [0; 8];
                self.read_parts(la, parts.iter(), &mut b)?;
                Ok(u64::from_le_bytes(b))
            }
        }
    }

    /// A helper that is about to write to bytes of the block that called it must not: the rest of that block would be stale.
    fn guard_running_block(&mut self, la: LinearAddr, len: usize, access: Access) -> Result<(), Trap> {
        if !self.in_helper || self.jit.alone {
            return Ok(());
        }
        let (mut at, mut left) = (la, len as u64);
        while left != 0 {
            let n = left.min(PAGE_SIZE - at.page_offset());
            let r = self.mmu.translate(&self.space, at, access);
            self.after_fill(at, access, r.as_ref().err());
            // A fault is for the access itself to raise.
            let Ok(t) = r else { return Ok(()) };
            if self.mmu.code().touches(t.pa, n) && crate::exec::slow::is_running(self, t.pa, n) {
                return Err(Trap::Restart);
            }
            (at, left) = (LinearAddr(at.0.wrapping_add(n)), left - n);
        }
        Ok(())
    }

    fn write_access(&mut self, la: LinearAddr, size: u32, value: u64, access: Access, stack: bool) -> Result<(), Trap> {
        self.guard_running_block(la, size as usize, access)?;
        let r = self.mmu.write(&self.space, la, size, value, access);
        self.after_fill(la, access, r.as_ref().err());
        match r.map_err(|f| self.trap_of(f, stack))? {
            WriteOutcome::Done { code: false } => {}
            WriteOutcome::Done { code: true } => crate::exec::slow::drop_written(self),
            WriteOutcome::Io(parts) => self.write_parts(la, parts.iter(), &value.to_le_bytes())?,
        }
        Ok(())
    }

    fn read_bytes_access(&mut self, la: LinearAddr, buf: &mut [u8], access: Access, stack: bool) -> Result<(), Trap> {
        let r = self.mmu.read_bytes(&self.space, la, buf, access);
        self.after_fill(la, access, r.as_ref().err());
        if let BytesOutcome::Io(parts) = r.map_err(|f| self.trap_of(f, stack))? {
            self.read_parts(la, parts.into_iter(), buf)?;
        }
        Ok(())
    }

    fn write_bytes_access(&mut self, la: LinearAddr, data: &[u8], access: Access, stack: bool) -> Result<(), Trap> {
        self.guard_running_block(la, data.len(), access)?;
        let r = self.mmu.write_bytes(&self.space, la, data, access);
        self.after_fill(la, access, r.as_ref().err());
        match r.map_err(|f| self.trap_of(f, stack))? {
            BytesOutcome::Done { code: false } => {}
            BytesOutcome::Done { code: true } => crate::exec::slow::drop_written(self),
            BytesOutcome::Io(parts) => self.write_parts(la, parts.into_iter(), data)?,
        }
        Ok(())
    }

    /// Reads piece by piece: memory as memory, devices in accesses of at most 8 bytes.
    fn read_parts(&mut self, la: LinearAddr, parts: impl Iterator<Item = Part>, buf: &mut [u8]) -> Result<(), Trap> {
        let mut rest = buf;
        for part in parts {
            let n = (part.len as usize).min(rest.len());
            let (here, after) = std::mem::take(&mut rest).split_at_mut(n);
            rest = after;
            if !matches!(part.target, Target::Mmio { .. } | Target::Unmapped) {
                self.shared.map.read(part.pa, here);
                continue;
            }
            if matches!(part.target, Target::Mmio { id: Mmu::APIC_ACCESS, .. }) {
                vmx::apic::read_access(self, la, part.pa, here)?;
                continue;
            }
            for (i, chunk) in here.chunks_mut(8).enumerate() {
                let (pa, size, cpu) = (part.pa.wrapping_add(8 * i as u64), chunk.len() as u8, self.index);
                self.counters.mmio += 1;
                let value = self.with_devices(|p| p.mmio_read(cpu, pa, size));
                chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
            }
        }
        Ok(())
    }

    /// Writes piece by piece, like [`Self::read_parts`].
    fn write_parts(&mut self, la: LinearAddr, parts: impl Iterator<Item = Part>, data: &[u8]) -> Result<(), Trap> {
        let mut rest = data;
        for part in parts {
            let (here, after) = rest.split_at((part.len as usize).min(rest.len()));
            rest = after;
            if !matches!(part.target, Target::Mmio { .. } | Target::Unmapped) {
                self.shared.map.write(part.pa, here);
                if self.mmu.code().note_write(part.pa, here.len() as u64) {
                    crate::exec::slow::drop_written(self);
                }
                continue;
            }
            if matches!(part.target, Target::Mmio { id: Mmu::APIC_ACCESS, .. }) {
                vmx::apic::write_access(self, la, part.pa, here)?;
                continue;
            }
            for (i, chunk) in here.chunks(8).enumerate() {
                let mut b = [0; 8];
                b[..chunk.len()].copy_from_slice(chunk);
                let (pa, size, cpu) = (part.pa.wrapping_add(8 * i as u64), chunk.len() as u8, self.index);
                self.counters.mmio += 1;
                self.with_devices(|p| p.mmio_write(cpu, pa, size, u64::from_le_bytes(b)));
            }
        }
        Ok(())
    }

    /// The exception, or the VM exit, of a memory fault; `stack`: through SS.
    fn trap_of(&mut self, fault: Fault, stack: bool) -> Trap {
        match fault {
            Fault::Ept(fault) => vmx::ept_exit(self, &fault),
            fault => Trap::Exception(fault.exception(stack).unwrap_or(Exception::GP0)),
        }
    }
}
