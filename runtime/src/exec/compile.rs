//! Host code: written for a block when it is translated, and by the background compile thread for regions and what the emitter
//! refuses: they go out as bytes, come back as host code, and are installed between blocks.
//!
//! Place in the pipeline: beside the dispatcher. The thread translates the bytes again (a few microseconds) instead of
//! every block keeping its IR. Invariants: an answer is installed only if its block is still the one that was asked for;
//! the thread owns its compiler and never touches guest state.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use twofold_arch::TbFlags;
use twofold_arch::cpuid::Features;
use twofold_backend::{CompileError, CompiledTb, Compiler, Guard, Options, RegionCompiler};
use twofold_frontend::{MAX_INSN_LEN, Request, translate_block};
use twofold_ir::Block;
use twofold_ir::passes::{Options as PassOptions, Part, Passes, join_all};

use super::cache::Source;
use super::listing::listing;
use super::region::{Member, RegionState};
use super::tb::{TbId, TierState};
use super::turns::Broadcast;
use crate::config::{DebugItem, DebugItems};
use crate::vcpu::Vcpu;

/// A block as the compile thread gets it.
pub struct Piece {
    id: TbId,
    serial: u64,
    off: u16,
    insns: usize,
    bytes: Vec<u8>,
    /// The linear address that it had when it was translated, for traces.
    rip: u64,
    /// The entry of the table of execution counts that its code adds to.
    counter: Option<u32>,
    /// Of a region's block: its page, in bytes from the root's, and where its indirect exit has been seen to lead.
    place: (i32, Vec<i32>),
}

impl Piece {
    /// Block `id`.
    #[must_use]
    pub fn of(vcpu: &Vcpu, id: TbId) -> Self {
        let tb = vcpu.jit.tbs.get(id);
        let (pa, len, rip) = (tb.key.pa, tb.len as usize, tb.rip);
        let mut bytes = vec![0; len];
        let first = len.min(0x1000 - pa.page_offset() as usize);
        vcpu.shared.map.read(pa, &mut bytes[..first]);
        if let Some(page) = tb.second_page {
            vcpu.shared.map.read(page, &mut bytes[first..]);
        }
        let (off, insns, counter) = (pa.page_offset() as u16, tb.insns as usize, vcpu.jit.counts.counter(id));
        Self { id, serial: tb.serial, off, insns, bytes, rip, counter, place: (0, Vec::new()) }
    }

    /// The block's IR as the front end makes it.
    #[must_use]
    pub fn translate(&self, flags: TbFlags, features: Features) -> Option<Block> {
        let in_page = self.bytes.len().min(0x1000 - self.off as usize);
        let (page, rest) = self.bytes.split_at(in_page);
        let mut next_page = || {
            let mut tail = [0; MAX_INSN_LEN];
            let n = rest.len().min(MAX_INSN_LEN);
            tail[..n].copy_from_slice(&rest[..n]);
            Some(tail)
        };
        let (off, max_insns) = (self.off, self.insns);
        translate_block(Request { flags, off, page, next_page: &mut next_page, features, max_insns }).ok()
    }

    /// The bytes of an instruction that is `place` bytes from the start of the root's page, if it is one of this block's.
    #[must_use]
    pub fn guest_bytes(&self, place: i32, len: usize) -> Option<&[u8]> {
        let start = place.checked_sub(self.place.0.checked_add(i32::from(self.off))?)?;
        self.bytes.get(usize::try_from(start).ok()?..)?.get(..len)
    }
    /// The linear address `place` bytes from the start of this block's page.
    #[must_use]
    pub fn rip_of(&self, place: i32) -> u64 {
        self.rip.wrapping_sub(self.off.into()).wrapping_add_signed(place.into())
    }

    fn member(&self) -> Member {
        Member { id: self.id, serial: self.serial, page: self.place.0 }
    }

    /// The same in a region, see [`Part`].
    #[must_use]
    pub fn at(self, page: i32, guesses: Vec<i32>) -> Self {
        Self { place: (page, guesses), ..self }
    }
}

/// What to compile.
struct Job {
    /// The block, or the root of a region.
    root: Piece,
    /// The other blocks of a region.
    others: Option<Vec<Piece>>,
    /// Of a region in several pages.
    guard: Option<Guard>,
    flags: TbFlags,
    features: Features,
    /// `-d clif,out_asm`: the texts that are wanted.
    texts: DebugItems,
}

/// Its host code.
struct Done {
    id: TbId,
    serial: u64,
    ns: u64,
    result: Result<CompiledTb, CompileError>,
    text: String,
    /// Of a region: its blocks.
    members: Option<Vec<Member>>,
}

/// Jobs that wait.
#[derive(Default)]
struct Waiting {
    blocks: VecDeque<Job>,
    regions: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    filled: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn push(&self, job: Job) {
        let mut waiting = self.lock();
        if job.others.is_some() {
            waiting.regions.push_back(job);
        } else {
            waiting.blocks.push_back(job);
        }
        drop(waiting);
        self.filled.notify_one();
    }
    /// The next job; `None` when there will be none.
    fn pop(&self) -> Option<Job> {
        let mut waiting = self.lock();
        loop {
            if waiting.closed {
                return None;
            }
            // A region takes as long as a hundred blocks, which would go on in the evaluator.
            if let Some(job) = waiting.blocks.pop_front() {
                return Some(job);
            }
            if let Some(job) = waiting.regions.pop_front() {
                return Some(job);
            }
            waiting = self.filled.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
    fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_one();
    }
}

/// The compile thread as the dispatcher sees it.
pub struct CompileQueue {
    inbox: Arc<Inbox>,
    done: Receiver<Done>,
    ready: Arc<AtomicUsize>,
}

impl CompileQueue {
    /// Starts the thread; `None` when this host has no compiler or no thread to give.
    #[must_use]
    pub fn start(options: Options) -> Option<Self> {
        let compiler = Compiler::new(options).ok()?;
        let inbox = Arc::new(Inbox::default());
        let (out, done) = channel();
        let ready = Arc::new(AtomicUsize::new(0));
        let (todo, counter) = (inbox.clone(), ready.clone());
        std::thread::Builder::new()
            .name(String::from("twofold-compile"))
            .spawn(move || worker(compiler, options, &todo, &out, &counter))
            .ok()?;
        Some(Self { inbox, done, ready })
    }

    /// Whether host code waits to be installed. One relaxed load.
    #[inline]
    #[must_use]
    pub fn has_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed) != 0
    }
}

impl Drop for CompileQueue {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

fn worker(mut compiler: Compiler, options: Options, todo: &Inbox, out: &Sender<Done>, ready: &AtomicUsize) {
    let mut passes = Passes::default();
    let mut regions = None;
    while let Some(job) = todo.pop() {
        let start = Instant::now();
        let mut text = String::new();
        let result = match job.root.translate(job.flags, job.features) {
            Some(block) if job.others.is_some() => {
                regions = regions.or_else(|| RegionCompiler::new(options).ok());
                match &mut regions {
                    Some(regions) => compile_region(regions, &job, block, &mut passes, &mut text),
                    None => Err(CompileError::Unavailable),
                }
            }
            Some(mut block) => {
                passes.run(&mut block, &PassOptions::HOST);
                if job.texts.has(DebugItem::Clif) {
                    text += &compiler.clif_text(&block).unwrap_or_else(|e| format!("{e}\n"));
                }
                let annotate = job.texts.has(DebugItem::OutAsm);
                compiler.annotate(annotate);
                let compiled = compiler.compile_counted(&block, job.root.counter);
                if let (true, Ok(compiled)) = (annotate, &compiled) {
                    text += &listing(&job.root, None, job.flags, &[block], compiled);
                }
                compiled
            }
            None => Err(CompileError::Malformed),
        };
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Counted first: the dispatcher may look for an answer that is not there yet, never miss one that is.
        ready.fetch_add(1, Ordering::Release);
        let members = job.others.map(|others| std::iter::once(&job.root).chain(&others).map(Piece::member).collect());
        let done = Done { id: job.root.id, serial: job.root.serial, ns, result, text, members };
        if out.send(done).is_err() {
            return;
        }
    }
}

/// A region's code.
fn compile_region(
    regions: &mut RegionCompiler,
    job: &Job,
    root: Block,
    passes: &mut Passes,
    text: &mut String,
) -> Result<CompiledTb, CompileError> {
    let others = job.others.as_deref().unwrap_or_default();
    let part = |piece: &Piece, block: Block| {
        let (page, guesses) = piece.place.clone();
        let tags = piece.counter.into_iter().map(|c| (page + i32::from(piece.off), c)).collect();
        Part { block, page, guesses, tags }
    };
    let mut parts = vec![part(&job.root, root)];
    for piece in others {
        parts.push(part(piece, piece.translate(job.flags, job.features).ok_or(CompileError::Malformed)?));
    }
    let (mut blocks, counters) = join_all(parts);
    for block in &mut blocks {
        passes.run(block, &PassOptions::HOST);
    }
    if job.texts.has(DebugItem::Clif) {
        *text += &regions.clif_text(&blocks).unwrap_or_else(|e| format!("{e}\n"));
    }
    let annotate = job.texts.has(DebugItem::OutAsm);
    regions.annotate(annotate);
    let compiled = regions.compile(&blocks, job.guard, Some(&counters))?;
    if annotate {
        *text += &listing(&job.root, Some(others), job.flags, &blocks, &compiled);
    }
    Ok(compiled)
}

/// Asks for host code for block `id`, which the emitter has refused or is not to write.
pub fn request(vcpu: &mut Vcpu, id: TbId) {
    let features = vcpu.model.features;
    let tb = vcpu.jit.tbs.get(id);
    if tb.tier != TierState::Cold || vcpu.jit.queue.is_none() || tb.key.flags.has(TbFlags::ONE_INSN) {
        return;
    }
    let flags = tb.key.flags;
    let job = Job { root: Piece::of(vcpu, id), others: None, guard: None, flags, features, texts: vcpu.debug };
    if let Some(queue) = &vcpu.jit.queue {
        queue.inbox.push(job);
        vcpu.jit.tbs.get_mut(id).tier = TierState::Queued;
        vcpu.counters.compile_requests += 1;
    }
}

/// Asks for a region of these blocks, the root first.
pub fn push_region(vcpu: &mut Vcpu, mut pieces: Vec<Piece>, guard: Option<Guard>) {
    if pieces.is_empty() {
        return;
    }
    let others = pieces.split_off(1);
    let Some(root) = pieces.pop() else { return };
    let (features, texts, flags) = (vcpu.model.features, vcpu.debug, vcpu.jit.tbs.get(root.id).key.flags);
    if let Some(queue) = &vcpu.jit.queue {
        queue.inbox.push(Job { root, others: Some(others), guard, flags, features, texts });
    }
}

/// Waits for the region rooted at block `id` (`--tier opt`).
pub fn wait_for_region(vcpu: &mut Vcpu, id: TbId) {
    while vcpu.jit.tbs.get(id).region_state == RegionState::Queued {
        let Some(queue) = &mut vcpu.jit.queue else { return };
        let Ok(done) = queue.done.recv() else { return };
        take(vcpu, done);
    }
}

/// Gives block `id` host code at once. `false` if that is left to the compile thread.
pub(super) fn emit(vcpu: &mut Vcpu, id: TbId, block: &Block) -> bool {
    let start = vcpu.profile.on.then(Instant::now);
    let annotate = vcpu.debug.has(DebugItem::OutAsm);
    vcpu.jit.direct.annotate(annotate);
    let counter = vcpu.jit.counts.counter(id);
    let Some(compiled) = vcpu.jit.direct.emit(block, counter) else {
        vcpu.counters.emit_refused += 1;
        return false;
    };
    keep(vcpu, id, &compiled);
    install(vcpu, id, &compiled);
    vcpu.counters.emitted += 1;
    vcpu.counters.compile_ns += start.map_or(0, |s| u64::try_from(s.elapsed().as_nanos()).unwrap_or(u64::MAX));
    if annotate {
        let tb = vcpu.jit.tbs.get(id);
        let (rip, flags, entry) = (tb.rip, tb.key.flags, tb.code.as_ref().map(|c| c.entry));
        let text = listing(&Piece::of(vcpu, id), None, flags, std::slice::from_ref(block), &compiled);
        show(vcpu, rip, entry, &text);
    }
    vcpu.jit.direct.recycle(compiled);
    true
}

/// Block `id` has run in the evaluator often enough to have host code: again, if it was evicted, else by the compile thread.
pub(super) fn promote(vcpu: &mut Vcpu, id: TbId) {
    if !(vcpu.jit.policy.at_once && emit_again(vcpu, id)) {
        request(vcpu, id);
    }
}

/// Gives block `id` host code. `false` if that is left to the compile thread.
fn emit_again(vcpu: &mut Vcpu, id: TbId) -> bool {
    let tb = vcpu.jit.tbs.get(id);
    let (flags, features) = (tb.key.flags, vcpu.model.features);
    if flags.has(TbFlags::ONE_INSN) || tb.tier != TierState::Cold {
        return false;
    }
    let Some(mut block) = Piece::of(vcpu, id).translate(flags, features) else { return false };
    vcpu.jit.passes.run(&mut block, &PassOptions::HOST);
    emit(vcpu, id, &block)
}

/// Has block `id` compiled, and waits for it (`--tier quick`).
pub fn compile_now(vcpu: &mut Vcpu, id: TbId) {
    promote(vcpu, id);
    while vcpu.jit.tbs.get(id).tier == TierState::Queued {
        let Some(queue) = &mut vcpu.jit.queue else { return };
        let Ok(done) = queue.done.recv() else { return };
        take(vcpu, done);
    }
}

/// Installs all host code that has come back.
pub fn install_ready(vcpu: &mut Vcpu) {
    while let Some(done) = vcpu.jit.queue.as_mut().and_then(|q| q.done.try_recv().ok()) {
        take(vcpu, done);
    }
}

/// Installs an answer of the compile thread, if it is still wanted.
fn take(vcpu: &mut Vcpu, done: Done) {
    if let Some(queue) = &vcpu.jit.queue {
        queue.ready.fetch_sub(1, Ordering::Relaxed);
    }
    vcpu.counters.compile_ns += done.ns;
    let tb = vcpu.jit.tbs.get(done.id);
    if !tb.live || tb.serial != done.serial {
        vcpu.counters.compile_stale += 1;
        return;
    }
    let (rip, text) = (tb.rip, done.text);
    if let Some(members) = done.members {
        vcpu.counters.region_ns += done.ns;
        match done.result {
            Ok(compiled) => {
                super::region::install(vcpu, &members, &compiled);
                let entry = vcpu.jit.tbs.get(done.id).region.as_ref().map(|r| r.code.entry);
                show(vcpu, rip, entry, &text);
            }
            Err(error) => {
                show(vcpu, rip, None, &text);
                vcpu.counters.regions_refused += 1;
                vcpu.jit.cells.release(done.id);
                vcpu.jit.tbs.get_mut(done.id).region_state = RegionState::Refused;
                vcpu.trace.warn_once("region", &format!("a loop stays in the quick tier: {error}"));
            }
        }
        return;
    }
    match done.result {
        Ok(compiled) => {
            keep(vcpu, done.id, &compiled);
            install(vcpu, done.id, &compiled);
            let entry = vcpu.jit.tbs.get(done.id).code.as_ref().map(|c| c.entry);
            show(vcpu, rip, entry, &text);
        }
        Err(error) => {
            show(vcpu, rip, None, &text);
            vcpu.counters.compile_refused += 1;
            vcpu.jit.tbs.get_mut(done.id).tier = TierState::Refused;
            vcpu.trace.warn_once("compile", &format!("a block stays in the evaluator: {error}"));
        }
    }
}

/// `-d clif,out_asm`: what was compiled, and where its host code now lies.
fn show(vcpu: &mut Vcpu, rip: u64, entry: Option<u64>, text: &str) {
    if text.is_empty() {
        return;
    }
    let place = entry.map_or(String::from("not installed"), |entry| format!("host code from {entry:#x} on"));
    vcpu.trace.write(&format!("{rip:016x}: {place}\n{text}\n"));
}

/// `-d out_asm`: a block that an earlier run compiled.
#[cold]
pub(super) fn show_cached(vcpu: &mut Vcpu, id: TbId, compiled: &CompiledTb) {
    let (piece, flags, features) = (Piece::of(vcpu, id), vcpu.jit.tbs.get(id).key.flags, vcpu.model.features);
    let Some(mut block) = piece.translate(flags, features) else { return };
    vcpu.jit.passes.run(&mut block, &PassOptions::HOST);
    let tb = vcpu.jit.tbs.get(id);
    let (rip, entry) = (tb.rip, tb.code.as_ref().map(|c| c.entry));
    let text = listing(&piece, None, flags, &[block], compiled);
    show(vcpu, rip, entry, &format!("from the code cache: what is for which instruction is not kept there\n{text}"));
}

/// `--perf`: notes the code of block `id`, or of the region that it is the root of.
pub(super) fn profile(vcpu: &mut Vcpu, id: TbId, installed: &twofold_backend::InstalledTb, tier: &'static str) {
    let rip = vcpu.jit.tbs.get(id).rip;
    let (Some(mut log), Some(code)) = (vcpu.jit.perf.take(), &vcpu.jit.code) else { return };
    if log.installed(code, installed, rip, tier) {
        log.write(vcpu);
    }
    vcpu.jit.perf = Some(log);
}

/// Keeps a block's host code for later runs.
fn keep(vcpu: &mut Vcpu, id: TbId, compiled: &CompiledTb) {
    let Some(cache) = &mut vcpu.jit.cache else { return };
    let tb = vcpu.jit.tbs.get(id);
    if tb.second_page.is_some() {
        return;
    }
    let off = tb.key.pa.page_offset() as u16;
    let mut bytes = [0; 0x1000];
    let bytes = &mut bytes[..super::cache::wanted(tb.len).min(0x1000 - usize::from(off))];
    vcpu.shared.map.read(tb.key.pa, bytes);
    cache.add(Source { flags: tb.key.flags, off, bytes }, tb.len, &tb.insn_offs, compiled);
}

/// Puts host code in code memory; evicts the oldest when there is no room.
pub(super) fn install(vcpu: &mut Vcpu, id: TbId, compiled: &CompiledTb) {
    for _ in 0..2 {
        let Some(code) = &mut vcpu.jit.code else { return };
        match code.install(compiled, id.0) {
            Ok(installed) => {
                vcpu.counters.compiled += 1;
                vcpu.counters.code_bytes += compiled.len() as u64;
                profile(vcpu, id, &installed, "quick");
                vcpu.jit.tbs.set_code(id, installed);
                return;
            }
            Err(_full) => evict(vcpu),
        }
    }
    vcpu.jit.tbs.get_mut(id).tier = TierState::Refused;
}

/// Frees the oldest part of code memory: its blocks go back to the evaluator.
pub(super) fn evict(vcpu: &mut Vcpu) {
    let Some(code) = &mut vcpu.jit.code else { return };
    vcpu.counters.evictions += 1;
    for number in code.evict_oldest() {
        super::region::drop_region(vcpu, TbId(number));
        super::region::drop_regions_of(vcpu, TbId(number));
        let tb = vcpu.jit.tbs.get_mut(TbId(number));
        // A dead block's id may be another's by now, with code elsewhere.
        if !tb.live || tb.code.take().is_none() {
            continue;
        }
        (tb.tier, tb.program) = (TierState::Cold, None);
        // A region that is being made of it does not fit any more.
        vcpu.jit.serial += 1;
        tb.serial = vcpu.jit.serial;
        vcpu.jit.counts.keep(TbId(number), std::mem::take(&mut tb.runs));
        tb.cached_rips.clear();
        let incoming = std::mem::take(&mut tb.incoming);
        vcpu.jit.tbs.entry_changed(TbId(number));
        vcpu.counters.evicted_tbs += 1;
        vcpu.jit.unlink(&incoming);
    }
    vcpu.mmu.jump_clear();
    vcpu.tell_others(Broadcast::ForgetAll);
    vcpu.counters.jump_cache_clears += 1;
}
