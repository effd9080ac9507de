//! Code memory: where translated code lives, how it is installed, chained, found by address and evicted.
//!
//! Place in the pipeline: between `compiler` (bytes) and `runtime` (which block is which). The memory is mapped twice, once
//! writable and once executable; no mapping is both. The thunks are copied to its start, so that every call and jump
//! from a block is a near one. The rest is divided into regions that are filled one after the other and freed as a whole,
//! oldest first. Blocks are position-independent but for 32-bit displacements patched here; a direct exit is a near
//! jump whose displacement is one store to change (placed so that it does not straddle a cache line).
#![allow(unsafe_code)] // maps memory and writes machine code into it

use std::io;
use std::ops::Range;

use twofold_arch::CodeSize;

use crate::abi::Leave;
use crate::compiler::CompiledTb;
use crate::thunk::Thunk;
use crate::thunks;

/// Bytes of a region; no block is larger than [`MAX_TB_BYTES`].
const REGION: usize = 1 << 20;
/// Bytes reserved for the thunks.
const THUNK_AREA: usize = 64 << 10;
/// The largest block that can be installed.
pub(crate) const MAX_TB_BYTES: usize = REGION / 4;
/// Bytes of a slot's exit stub: a call of the thunk, the word it returns, the target's offset.
const STUB: usize = 5 + 8 + 4;
/// Alignment of a block's entry.
const ALIGN: usize = 16;

/// No region is free: evict one ([`CodeMemory::evict_oldest`]) and try again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodeFull;

impl std::fmt::Display for CodeFull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("code memory is full")
    }
}
impl std::error::Error for CodeFull {}

/// A direct exit of an installed block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotRef {
    /// Page offset of the guest instruction it goes to.
    pub off: u16,
    /// Its page, in bytes from the block's, or the region's root's.
    pub page: i32,
    /// Where the displacement is, from the start of code memory.
    at: u32,
    /// Where the exit stub is.
    stub: u32,
}

/// A block in code memory.
#[derive(Clone, Debug)]
pub struct InstalledTb {
    /// The number given at installation.
    pub id: u32,
    /// Host address to enter it at.
    pub entry: u64,
    /// Host addresses of its code.
    pub code: Range<u64>,
    /// Its direct exits, in the order `Leave::Unlinked` numbers them.
    pub slots: Box<[SlotRef]>,
    /// Guest instructions that its entry charges to the budget.
    pub charged: u16,
    returns: Box<[(u32, u16)]>,
    sites: Box<[(i32, u16)]>,
}

impl InstalledTb {
    /// Index of the guest instruction whose call returns to host address `host_ret`.
    #[must_use]
    pub fn insn_at(&self, host_ret: u64) -> Option<usize> {
        let off = u32::try_from(host_ret.checked_sub(self.code.start)?).ok()?;
        let i = self.returns.binary_search_by_key(&off, |r| r.0).ok()?;
        Some(self.returns[i].1 as usize)
    }
    /// Of a region's code: RIP minus `rip_base` of the guest instruction whose call returns to host address `host_ret`, and what to
    /// add to the budget when it is abandoned.
    #[must_use]
    pub fn site(&self, host_ret: u64) -> Option<(i32, i32)> {
        let &(off, back) = self.sites.get(self.insn_at(host_ret)?)?;
        Some((off, back.into()))
    }
    /// What to add to the budget when the block is abandoned at guest instruction `insn`: those charged and not retired.
    #[must_use]
    pub fn unretired(&self, insn: usize) -> i32 {
        i32::from(self.charged) - insn as i32
    }
}

/// Counters of code memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CodeStats {
    /// The cap, in bytes.
    pub capacity: u64,
    /// Bytes in use, thunks included.
    pub used: u64,
    /// The most that was ever in use.
    pub peak: u64,
    /// Blocks installed, ever.
    pub installed: u64,
    /// Bytes installed, ever.
    pub installed_bytes: u64,
    /// Regions evicted.
    pub evictions: u64,
    /// Blocks that died by eviction.
    pub evicted: u64,
    /// Slots linked.
    pub links: u64,
    /// Slots unlinked.
    pub unlinks: u64,
}

struct Region {
    used: usize,
    /// (start, end, number) in ascending order, offsets in code memory.
    tbs: Vec<(u32, u32, u32)>,
}

/// The code memory of one machine.
pub struct CodeMemory {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    thunks: Vec<u32>,
    regions: Vec<Region>,
    /// Regions in use, oldest first; the last is being filled.
    filled: std::collections::VecDeque<usize>,
    free: Vec<usize>,
    stats: CodeStats,
}

// SAFETY: the mappings belong to this value alone; what is written through `&mut self` only is plain bytes.
unsafe impl Send for CodeMemory {}

impl std::fmt::Debug for CodeMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeMemory").field("rx", &self.rx).field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl CodeMemory {
    /// The default cap in bytes.
    pub const DEFAULT_CAPACITY: usize = 512 << 20;

    /// Reserves code memory of at most `capacity` bytes (at least two regions). Pages are only taken when written.
    ///
    /// # Errors
    /// When the host gives no memory file or mapping, or has no thunks (not an x86-64).
    pub fn new(capacity: usize) -> io::Result<Self> {
        if !thunks::available() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "no translated code on this host"));
        }
        let count = (capacity / REGION).clamp(2, 1024);
        let len = THUNK_AREA + count * REGION;
        let (rw, rx) = map_twice(len)?;
        let (bytes, thunks) = thunks::image();
        assert!(bytes.len() <= THUNK_AREA, "thunks outgrew their area");
        // SAFETY: `rw` has at least THUNK_AREA bytes and nothing else refers to them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), rw, bytes.len()) };
        let regions = (0..count).map(|_| Region { used: 0, tbs: Vec::new() }).collect();
        let free = (0..count).rev().collect();
        let stats = CodeStats { capacity: len as u64, used: THUNK_AREA as u64, ..CodeStats::default() };
        Ok(Self { rw, rx, len, thunks, regions, filled: Default::default(), free, stats })
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> CodeStats {
        self.stats
    }

    /// Copies a block in and gives it a number. Its direct exits are unlinked.
    ///
    /// # Errors
    /// [`CodeFull`] when no region is free.
    pub fn install(&mut self, tb: &CompiledTb, id: u32) -> Result<InstalledTb, CodeFull> {
        let total = tb.code.len() + tb.slots.len() * STUB + 64 + ALIGN;
        let region = self.region_for(total)?;
        let base = THUNK_AREA + region * REGION;
        let start = place(base + self.regions[region].used, tb);
        let end = start + tb.code.len() + tb.slots.len() * STUB;

        self.write(start, &tb.code);
        for &(at, thunk) in &tb.calls {
            let at = start + at as usize;
            self.patch(at, self.thunks[thunk.index()] as usize);
        }
        let mut slots = Vec::with_capacity(tb.slots.len());
        for (i, s) in tb.slots.iter().enumerate() {
            let stub = start + tb.code.len() + i * STUB;
            self.write(stub, &[0xe8]);
            self.patch(stub + 1, self.thunks[Thunk::unlinked(tb.size).index()] as usize);
            self.write(stub + 5, &Leave::unlinked_word(id, tb.first_slot + i as u16).to_le_bytes());
            self.write(stub + 13, &u32::from(s.off).to_le_bytes());
            let at = start + s.at as usize;
            self.patch(at, stub);
            slots.push(SlotRef { off: s.off, page: s.page, at: at as u32, stub: stub as u32 });
        }

        let r = &mut self.regions[region];
        self.stats.used += (end - base - r.used) as u64;
        self.stats.peak = self.stats.peak.max(self.stats.used);
        self.stats.installed += 1;
        self.stats.installed_bytes += (end - start) as u64;
        r.used = end - base;
        r.tbs.push((start as u32, end as u32, id));
        let rx = self.rx as u64;
        Ok(InstalledTb {
            id,
            entry: rx + start as u64 + u64::from(tb.entry),
            code: rx + start as u64..rx + end as u64,
            slots: slots.into(),
            charged: tb.charged,
            returns: tb.returns.clone().into(),
            sites: tb.sites.clone().into(),
        })
    }

    /// Makes a direct exit jump to `entry`, the entry of an installed block.
    pub fn link(&mut self, slot: SlotRef, entry: u64) {
        self.stats.links += 1;
        self.patch(slot.at as usize, (entry - self.rx as u64) as usize);
    }

    /// Makes a direct exit that jumps to `from`, the entry of an installed block, jump to `to` instead; one that does not stays.
    pub fn relink(&mut self, slot: SlotRef, from: u64, to: u64) {
        let at = slot.at as usize;
        assert!(at + 4 <= self.len);
        // SAFETY: the four bytes are inside the mapping, which only this value writes.
        let displacement = unsafe { self.rw.add(at).cast::<i32>().read_unaligned() };
        if (at as i64 + 4 + i64::from(displacement)) as u64 == from - self.rx as u64 {
            self.link(slot, to);
        }
    }

    /// Makes a direct exit that is not linked go through the jump cache, for good.
    pub fn link_far(&mut self, slot: SlotRef, size: CodeSize) {
        self.patch(slot.stub as usize + 1, self.thunks[Thunk::slot_far(size).index()] as usize);
    }

    /// Makes a direct exit leave to the dispatcher again.
    pub fn unlink(&mut self, slot: SlotRef) {
        self.stats.unlinks += 1;
        self.patch(slot.at as usize, slot.stub as usize);
    }

    /// The number of the block whose code `host` points into.
    #[must_use]
    pub fn tb_at(&self, host: u64) -> Option<u32> {
        let off = usize::try_from(host.checked_sub(self.rx as u64)?).ok()?;
        let region = self.regions.get(off.checked_sub(THUNK_AREA)? / REGION)?;
        let i = region.tbs.partition_point(|t| t.0 as usize <= off).checked_sub(1)?;
        let (_, end, id) = region.tbs[i];
        (off < end as usize).then_some(id)
    }

    /// Frees the oldest region and returns the numbers of the blocks that were in it, dead ones included. The caller must
    /// unlink what still jumps to them, drop them from every jump cache, and see to it that no processor runs in them.
    pub fn evict_oldest(&mut self) -> Vec<u32> {
        let Some(region) = self.filled.pop_front() else { return Vec::new() };
        let r = &mut self.regions[region];
        let ids: Vec<u32> = r.tbs.drain(..).map(|t| t.2).collect();
        self.stats.used -= r.used as u64;
        self.stats.evictions += 1;
        self.stats.evicted += ids.len() as u64;
        let used = std::mem::take(&mut r.used);
        // A stale jump into freed code traps instead of running something else.
        // SAFETY: the range is inside the mapping and no block lives in it.
        unsafe { std::ptr::write_bytes(self.rw.add(THUNK_AREA + region * REGION), 0xcc, used) };
        self.free.insert(0, region);
        ids
    }

    /// The bytes at `code` (a range that [`InstalledTb::code`] gave), for traces and profiles.
    #[must_use]
    pub fn bytes(&self, code: Range<u64>) -> Vec<u8> {
        let base = self.rx as u64;
        if code.start < base || code.end < code.start || code.end - base > self.len as u64 {
            return Vec::new();
        }
        let (off, n) = ((code.start - base) as usize, (code.end - code.start) as usize);
        // SAFETY: the range is inside the mapping; `&self` rules out a write at the same time.
        unsafe { std::slice::from_raw_parts(self.rw.add(off), n).to_vec() }
    }

    /// Host address of each thunk with its name, for profiles.
    #[must_use]
    pub fn thunk_symbols(&self) -> Vec<(u64, String)> {
        let name = |(i, &off): (usize, &u32)| (self.rx as u64 + u64::from(off), Thunk::from_index(i).name());
        self.thunks.iter().enumerate().map(name).collect()
    }

    fn region_for(&mut self, total: usize) -> Result<usize, CodeFull> {
        if let Some(&last) = self.filled.back()
            && self.regions[last].used + total <= REGION
        {
            return Ok(last);
        }
        let region = self.free.pop().ok_or(CodeFull)?;
        self.filled.push_back(region);
        Ok(region)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: the range is inside the mapping, which only this value writes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rw.add(at), bytes.len()) };
    }

    /// Sets the 32-bit displacement at `at` so that it reaches `target`.
    fn patch(&mut self, at: usize, target: usize) {
        assert!(at + 4 <= self.len);
        let displacement = (target as i64 - (at as i64 + 4)) as i32;
        // SAFETY: the four bytes are inside the mapping; x86 stores them at once unless they straddle a cache line.
        unsafe { self.rw.add(at).cast::<i32>().write_unaligned(displacement) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `map_twice` with this length.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}

/// The first aligned place at or after `at` where no slot's displacement straddles a cache line, if a near one has that.
fn place(at: usize, tb: &CompiledTb) -> usize {
    let start = at.next_multiple_of(ALIGN);
    let good = |s: &usize| tb.slots.iter().all(|slot| (s + slot.at as usize) % 64 <= 60);
    (0..4).map(|i| start + i * ALIGN).find(good).unwrap_or(start)
}

/// Shared anonymous memory, mapped writable and again executable. (Not a memory file: `perf` looks into its map of symbols
/// for anonymous memory only.)
fn map_twice(len: usize) -> io::Result<(*mut u8, *mut u8)> {
    let check = |p: *mut libc::c_void| if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p) };
    // SAFETY: plain system calls on fresh mappings, whose results are checked. A resize from a length of 0 makes a second
    // mapping of the same pages.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let rw = check(libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0))?;
        let unmap_rw = |e| {
            libc::munmap(rw, len);
            e
        };
        let rx = check(libc::mremap(rw, 0, len, libc::MREMAP_MAYMOVE)).map_err(unmap_rw)?;
        if libc::mprotect(rx, len, libc::PROT_READ | libc::PROT_EXEC) != 0 {
            let e = io::Error::last_os_error();
            libc::munmap(rx, len);
            return Err(unmap_rw(e));
        }
        Ok((rw.cast(), rx.cast()))
    }
}
