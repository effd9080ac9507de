//! The softmmu TLB: the tables that translated code probes, and the jump cache, grouped in contexts.
//!
//! Place in the pipeline: translated code reads the current context's tables through `CpuState::tlb`; only this vCPU's
//! [`crate::Mmu`] changes them. A context carries the SDM's tags (VPID, PCID, EP4TA), so that switching the address space
//! is switching a pointer. Invariants: a tag that can match stands for an access that the guest's paging structures
//! permitted when they were last read, to memory that needs no slow path; a table's memory never moves while its context
//! lives, so a stale mask in `CpuState` costs misses, never wrong answers.
#![allow(unsafe_code)] // The tables are read by translated code, so they are raw memory at fixed addresses.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapRaw};

use twofold_arch::state::TlbView;
use twofold_arch::tbflags::MemMode;
use twofold_arch::{CpuState, LinearAddr, PAGE_MASK, PAGE_SHIFT, PhysAddr};

use crate::rights::Permitted;
use crate::space::AccessKind;

/// One entry, as the probe reads it. A tag matches when it equals the linear page of the access's last byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Tag for data reads.
    pub read: u64,
    /// Tag for data writes.
    pub write: u64,
    /// Tag for fetches.
    pub exec: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

impl TlbEntry {
    /// An entry that matches nothing.
    pub const INVALID: Self = Self { read: u64::MAX, write: u64::MAX, exec: u64::MAX, addend: 0 };
}

/// In the low bits of a tag: the translation is good, but the access must take the slow path because the page is no memory
/// that may be accessed directly (a device, nothing, or for writes ROM).
pub(crate) const SLOW_IO: u64 = 1;
/// As above: the page holds translated code (write tags only).
pub(crate) const SLOW_CODE: u64 = 2;
const SLOW: u64 = SLOW_IO | SLOW_CODE;

/// One jump-cache entry, as translated code reads it. It matches when `rip` and `flags` are equal to the target's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct JumpCacheEntry {
    /// RIP of the target.
    pub rip: u64,
    /// `TbFlags` of the target, zero-extended.
    pub flags: u64,
    /// Host address of its code.
    pub code: u64,
    /// Value for `CpuState::rip_base`.
    pub rip_base: u64,
}

impl JumpCacheEntry {
    /// An entry that matches nothing.
    pub const INVALID: Self = Self { rip: u64::MAX, flags: u64::MAX, code: 0, rip_base: 0 };
}

/// Entries in a jump cache.
pub const JUMP_CACHE_ENTRIES: usize = 1 << 15;

/// Groups of 4096 entries: all targets in one page are in one group.
const JUMP_GROUPS: usize = JUMP_CACHE_ENTRIES / 4096;

/// The jump-cache index of a RIP: what emitted code computes too. Times 32 it is the byte offset of the entry.
#[inline]
#[must_use]
pub const fn jump_index(rip: u64) -> usize {
    ((rip ^ rip >> PAGE_SHIFT) & (JUMP_CACHE_ENTRIES as u64 - 1)) as usize
}

/// What `CpuState` must hold so that translated code uses the current context.
#[derive(Clone, Copy, Debug)]
#[must_use = "store it in the CpuState, or translated code goes on with the old context"]
pub struct View {
    /// The tables by [`MemMode`].
    pub tlb: [TlbView; 3],
    /// Host address of the jump cache.
    pub jump_cache: u64,
}

impl View {
    /// Stores the view where translated code finds it.
    #[inline]
    pub fn store(self, state: &mut CpuState) {
        state.tlb = self.tlb;
        state.jump_cache = self.jump_cache;
    }
}

const ENTRY: usize = size_of::<TlbEntry>();
const _: () = assert!(ENTRY == 32 && size_of::<JumpCacheEntry>() == 32);

/// A fixed piece of raw memory for `n` values that translated code reads.
struct RawArray<T: Copy> {
    map: MmapRaw,
    len: usize,
    _of: std::marker::PhantomData<T>,
}

impl<T: Copy> RawArray<T> {
    /// Room for `len` values; only what is written is committed.
    fn new(len: usize) -> std::io::Result<Self> {
        let map = MmapMut::map_anon(len * size_of::<T>())?.into();
        Ok(Self { map, len, _of: std::marker::PhantomData })
    }

    fn address(&self) -> u64 {
        self.map.as_mut_ptr().expose_provenance() as u64
    }

    #[inline]
    fn get(&self, i: usize) -> T {
        assert!(i < self.len);
        // SAFETY: in bounds; the mapping is page-aligned, zeroed or written by `set`, and every bit pattern is a `T` here
        // (both instances are structs of four `u64`). Translated code never writes to it.
        unsafe { self.map.as_mut_ptr().cast::<T>().add(i).read() }
    }

    #[inline]
    fn set(&self, i: usize, value: T) {
        assert!(i < self.len);
        // SAFETY: as in `get`; only the owning vCPU's thread writes, and not while it runs translated code.
        unsafe { self.map.as_mut_ptr().cast::<T>().add(i).write(value) }
    }
}

/// A set of small numbers that is quick to walk and to clear.
struct Bits(Box<[u64]>);

impl Bits {
    fn new(n: usize) -> Self {
        Self(vec![0; n.div_ceil(64)].into())
    }
    #[inline]
    fn assign(&mut self, i: usize, on: bool) {
        if let Some(w) = self.0.get_mut(i / 64) {
            *w = *w & !(1 << (i % 64)) | u64::from(on) << (i % 64);
        }
    }
    #[inline]
    fn has(&self, i: usize) -> bool {
        self.0.get(i / 64).is_some_and(|w| w >> (i % 64) & 1 != 0)
    }
    #[inline]
    fn word(&self, w: usize) -> u64 {
        self.0.get(w).copied().unwrap_or(0)
    }
}

/// Calls `f` with every member of the word `bits` of number `w`.
#[inline]
fn each_bit(w: usize, mut bits: u64, mut f: impl FnMut(usize)) {
    while bits != 0 {
        f(w * 64 + bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// Entries in a table at first.
const MIN_ENTRIES: usize = 512;
/// Entries in a table at most.
const MAX_ENTRIES: usize = 1 << 16;

/// What [`Table::lookup`] found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hit {
    /// Physical page.
    pub page: PhysAddr,
    /// `SLOW_*` bits of the tag.
    pub slow: u64,
    /// Host address minus linear address; meaningless with `SLOW_IO`.
    pub addend: u64,
    /// From a global mapping.
    pub global: bool,
}

/// A translation to be put in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEntry {
    pub la: LinearAddr,
    pub page: PhysAddr,
    pub addend: u64,
    /// Which tags are set; write only when the D flag is set.
    pub tags: Permitted,
    /// `SLOW_*` bits for read and exec tags.
    pub slow_read: u64,
    /// `SLOW_*` bits for the write tag.
    pub slow_write: u64,
    pub global: bool,
}

/// A direct-mapped table for one [`MemMode`].
pub(crate) struct Table {
    entries: RawArray<TlbEntry>,
    size: usize,
    used: Bits,
    global: Bits,
    /// The physical page of each entry, or `u64::MAX`.
    pages: Vec<u64>,
    /// Live entries replaced by another page's since the table last grew.
    conflicts: usize,
}

#[inline]
const fn matches(tag: u64, page: u64) -> bool {
    tag & !SLOW == page
}

impl Table {
    fn new() -> std::io::Result<Self> {
        let t = Self {
            entries: RawArray::new(MAX_ENTRIES)?,
            size: MIN_ENTRIES,
            used: Bits::new(MAX_ENTRIES),
            global: Bits::new(MAX_ENTRIES),
            pages: vec![u64::MAX; MIN_ENTRIES],
            conflicts: 0,
        };
        for i in 0..MIN_ENTRIES {
            t.entries.set(i, TlbEntry::INVALID);
        }
        Ok(t)
    }

    fn view(&self) -> TlbView {
        TlbView { mask: ((self.size - 1) * ENTRY) as u64, table: self.entries.address() }
    }

    #[inline]
    fn index(&self, la: LinearAddr) -> usize {
        (la.0 >> PAGE_SHIFT) as usize & (self.size - 1)
    }

    /// The translation of `la` for an access of `kind`, if one is cached.
    #[inline]
    pub(crate) fn lookup(&self, la: LinearAddr, kind: AccessKind) -> Option<Hit> {
        let i = self.index(la);
        let e = self.entries.get(i);
        let tag = match kind {
            AccessKind::Read => e.read,
            AccessKind::Write => e.write,
            AccessKind::Fetch => e.exec,
        };
        if !matches(tag, la.page().0) {
            return None;
        }
        let page = PhysAddr(self.pages.get(i).copied()?);
        Some(Hit { page, slow: tag & SLOW, addend: e.addend, global: self.global.has(i) })
    }

    /// The host address of `size` bytes at `la` if the probe of translated code hits.
    #[inline]
    fn probe(&self, la: LinearAddr, size: u32, tag: impl Fn(&TlbEntry) -> u64) -> Option<*mut u8> {
        let e = self.entries.get(self.index(la));
        let last = la.0.wrapping_add(u64::from(size) - 1);
        (last & PAGE_MASK == tag(&e))
            .then(|| std::ptr::with_exposed_provenance_mut(la.0.wrapping_add(e.addend) as usize))
    }

    /// Loads 1, 2, 4 or 8 bytes on a hit. Relies, as translated code does, on the memory behind a matching tag staying
    /// mapped while the context lives: `Mmu` holds the physical map for as long.
    #[inline]
    pub(crate) fn load(&self, la: LinearAddr, size: u32) -> Option<u64> {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return None;
        }
        let p = self.probe(la, size, |e| e.read)?;
        // SAFETY: a read tag that matches stands for a page of RAM or ROM that is mapped (see above), and the access does
        // not leave the page. Other vCPUs may write there; a guest that races gets what it gets on a processor.
        Some(unsafe {
            match size {
                1 => u64::from(p.read()),
                2 => u64::from(u16::from_le(p.cast::<u16>().read_unaligned())),
                4 => u64::from(u32::from_le(p.cast::<u32>().read_unaligned())),
                _ => u64::from_le(p.cast::<u64>().read_unaligned()),
            }
        })
    }

    /// Stores 1, 2, 4 or 8 bytes on a hit; false on a miss.
    #[inline]
    pub(crate) fn store(&self, la: LinearAddr, size: u32, value: u64) -> bool {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return false;
        }
        let Some(p) = self.probe(la, size, |e| e.write) else { return false };
        // SAFETY: as in `load`; a write tag that matches stands for RAM.
        unsafe {
            match size {
                1 => p.write(value as u8),
                2 => p.cast::<u16>().write_unaligned((value as u16).to_le()),
                4 => p.cast::<u32>().write_unaligned((value as u32).to_le()),
                _ => p.cast::<u64>().write_unaligned(value.to_le()),
            }
        }
        true
    }

    /// Puts a translation in, in the place of what was there. True when the table would do better with more entries.
    #[inline]
    pub(crate) fn install(&mut self, new: &NewEntry) -> bool {
        let i = self.index(new.la);
        let page = new.la.page().0;
        let tag = |on: bool, slow: u64| if on { page | slow } else { u64::MAX };
        if self.used.has(i) && !self.holds(i, page, PAGE_MASK) {
            self.conflicts += 1;
        }
        self.entries.set(
            i,
            TlbEntry {
                read: tag(new.tags.read, new.slow_read),
                write: tag(new.tags.write, new.slow_write),
                exec: tag(new.tags.exec, new.slow_read),
                addend: new.addend,
            },
        );
        if let Some(p) = self.pages.get_mut(i) {
            *p = new.page.page().0;
        }
        self.used.assign(i, true);
        self.global.assign(i, new.global);
        self.conflicts > self.size && self.size < MAX_ENTRIES
    }

    /// Doubles the table; what it holds stays.
    pub(crate) fn grow(&mut self) {
        let old = self.size;
        if old >= MAX_ENTRIES {
            return;
        }
        self.size = old * 2;
        self.conflicts = 0;
        self.pages.resize(self.size, u64::MAX);
        for i in 0..old {
            let e = self.entries.get(i);
            self.entries.set(i + old, TlbEntry::INVALID);
            let Some(tag) = [e.read, e.write, e.exec].into_iter().find(|&t| t != u64::MAX) else { continue };
            let to = self.index(LinearAddr(tag));
            if to != i {
                self.entries.set(to, e);
                let (page, global) = (self.pages.get(i).copied().unwrap_or(u64::MAX), self.global.has(i));
                self.drop_entry(i);
                if let Some(p) = self.pages.get_mut(to) {
                    *p = page;
                }
                self.used.assign(to, true);
                self.global.assign(to, global);
            }
        }
    }

    /// Whether entry `i` is for a linear page that agrees with `page` under `mask`.
    fn holds(&self, i: usize, page: u64, mask: u64) -> bool {
        let e = self.entries.get(i);
        [e.read, e.write, e.exec].into_iter().any(|t| t != u64::MAX && (t ^ page) & mask & PAGE_MASK == 0)
    }

    fn drop_entry(&mut self, i: usize) {
        self.entries.set(i, TlbEntry::INVALID);
        self.used.assign(i, false);
        self.global.assign(i, false);
        if let Some(p) = self.pages.get_mut(i) {
            *p = u64::MAX;
        }
    }

    /// Drops every entry (`globals` too), or all but those of global pages.
    fn flush(&mut self, globals: bool) {
        for w in 0..self.size / 64 {
            let keep = if globals { 0 } else { self.global.word(w) };
            each_bit(w, self.used.word(w) & !keep, |i| self.drop_entry(i));
        }
        self.conflicts /= 2;
    }

    /// Drops the entry of the page of `la`; with `globals_only`, only if it is global.
    #[inline]
    fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        let i = self.index(la);
        if self.used.has(i) && self.holds(i, la.page().0, PAGE_MASK) && (!globals_only || self.global.has(i)) {
            self.drop_entry(i);
        }
    }

    /// As [`Self::drop_page`] for all pages that agree with `la` under `mask`.
    fn drop_region(&mut self, la: LinearAddr, mask: u64, globals_only: bool) {
        // The pages of a region smaller than the table have places of their own, one after the other.
        let words = ((!mask >> PAGE_SHIFT) as usize / 64 + 1).min(self.size / 64);
        let first = (self.index(LinearAddr(la.0 & mask)) / 64) & !(words - 1);
        for w in first..first + words {
            let among = if globals_only { self.global.word(w) } else { u64::MAX };
            each_bit(w, self.used.word(w) & among, |i| {
                if self.holds(i, la.0, mask) {
                    self.drop_entry(i);
                }
            });
        }
    }

    /// Makes every write to physical page `page` take the slow path; how many tags that changed.
    fn revoke_write(&mut self, page: PhysAddr) -> u64 {
        let mut n = 0;
        for (i, &p) in self.pages.iter().enumerate() {
            if p == page.0 {
                let mut e = self.entries.get(i);
                if e.write != u64::MAX && e.write & SLOW == 0 {
                    e.write |= SLOW_CODE;
                    self.entries.set(i, e);
                    n += 1;
                }
            }
        }
        n
    }

    /// The page of `la` holds no code any more: its write tag may match again.
    pub(crate) fn restore_write(&mut self, la: LinearAddr) {
        let i = self.index(la);
        let mut e = self.entries.get(i);
        if e.write == la.page().0 | SLOW_CODE {
            e.write &= !SLOW_CODE;
            self.entries.set(i, e);
        }
    }
}

/// A jump cache and what of it is in use.
struct JumpCache {
    entries: RawArray<JumpCacheEntry>,
    used: Bits,
    global: Bits,
    /// Which words of `used` may have bits, by groups of 4096 entries.
    some: [u64; JUMP_GROUPS],
    /// Which linear pages have entries, by a hash of the page number.
    pages: [u64; 64],
    /// Some entry's linear address is not its RIP (a CS base): entries cannot be found by linear page.
    based: bool,
    /// Which linear pages somebody has looked at in this epoch, by a hash of the page number.
    watched: [u64; 64],
}

/// Numbers the epochs of all jump caches.
static EPOCHS: AtomicU64 = AtomicU64::new(1);

impl JumpCache {
    fn new() -> std::io::Result<Self> {
        // The last word pair holds the epoch.
        let entries = RawArray::new(JUMP_CACHE_ENTRIES + 1)?;
        // Memory not yet written holds RIP 0, for which only the first entry is looked at.
        entries.set(jump_index(0), JumpCacheEntry::INVALID);
        let bits = || Bits::new(JUMP_CACHE_ENTRIES);
        let (pages, watched) = ([0; 64], [0; 64]);
        let some = [0; JUMP_GROUPS];
        let mut new = Self { entries, used: bits(), global: bits(), some, pages, based: false, watched };
        new.begin_epoch();
        Ok(new)
    }

    /// Some mapping that was looked at may have changed.
    fn begin_epoch(&mut self) {
        let rip = EPOCHS.fetch_add(1, Ordering::Relaxed);
        self.entries.set(JUMP_CACHE_ENTRIES, JumpCacheEntry { rip, ..JumpCacheEntry::INVALID });
        self.watched = [0; 64];
    }

    /// The epoch, which ends when the mapping of `page`, or of another page that was asked for in it, may have changed.
    fn epoch(&mut self, page: LinearAddr) -> u64 {
        let (w, bit) = Self::page_bit(page);
        self.watched[w] |= bit;
        self.entries.get(JUMP_CACHE_ENTRIES).rip
    }

    const fn page_bit(la: LinearAddr) -> (usize, u64) {
        let h = la.0 >> PAGE_SHIFT;
        let h = h ^ h >> 12;
        ((h / 64 % 64) as usize, 1 << (h % 64))
    }

    fn insert(&mut self, la: LinearAddr, entry: JumpCacheEntry, global: bool) {
        let i = jump_index(entry.rip);
        self.entries.set(i, entry);
        self.used.assign(i, true);
        self.global.assign(i, global);
        self.some[i / 4096] |= 1 << (i / 64 % 64);
        let (w, bit) = Self::page_bit(la);
        self.pages[w] |= bit;
        self.based |= la.0 != entry.rip;
    }

    fn drop_entry(&mut self, i: usize) {
        self.entries.set(i, JumpCacheEntry::INVALID);
        self.used.assign(i, false);
        self.global.assign(i, false);
    }

    /// Drops the entries for which `gone` holds.
    fn drop_where(&mut self, mut gone: impl FnMut(&JumpCacheEntry, bool) -> bool) {
        (0..JUMP_GROUPS).for_each(|group| self.drop_in(group, &mut gone));
    }

    /// The same among the entries of one group.
    fn drop_in(&mut self, group: usize, mut gone: impl FnMut(&JumpCacheEntry, bool) -> bool) {
        each_bit(group, self.some[group], |w| {
            each_bit(w, self.used.word(w), |i| {
                if gone(&self.entries.get(i), self.global.has(i)) {
                    self.drop_entry(i);
                }
            });
            if self.used.word(w) == 0 {
                self.some[group] &= !(1 << (w % 64));
            }
        });
    }

    fn flush(&mut self, globals: bool) {
        self.begin_epoch();
        self.drop_where(|_, global| globals || !global);
        if globals {
            self.pages = [0; 64];
            self.based = false;
        }
    }

    /// Drops the entries whose code begins in the page of `la`, or in the page before it and may run into it.
    fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        let (w, bit) = Self::page_bit(la);
        if self.watched[w] & bit != 0 {
            self.begin_epoch();
        }
        let before = LinearAddr(la.page().0.wrapping_sub(1));
        let may_have = |a: LinearAddr| {
            let (w, bit) = Self::page_bit(a);
            self.pages[w] & bit != 0
        };
        if !may_have(la) && !may_have(before) {
            return;
        }
        let based = self.based;
        let (page, before) = (la.page().0, before.page().0);
        let gone = |e: &JumpCacheEntry, global: bool| {
            (global || !globals_only) && (based || e.rip & PAGE_MASK == page || e.rip & PAGE_MASK == before)
        };
        if based {
            return self.drop_where(gone);
        }
        // The offset in the page does not change the group.
        let (one, other) = (jump_index(page) / 4096, jump_index(before) / 4096);
        self.drop_in(one, gone);
        if other != one {
            self.drop_in(other, gone);
        }
    }

    /// Whether a set by [`Self::page_bit`] may have pages of the region of `la`.
    fn has_some(set: &[u64; 64], la: LinearAddr, mask: u64) -> bool {
        // The bits of an aligned 2 MiB are eight aligned words.
        const PART: u64 = 1 << 21;
        let parts = (!mask / PART).saturating_add(1);
        parts > 8
            || (0..parts).any(|n| {
                let (w, _) = Self::page_bit(LinearAddr((la.0 & mask).wrapping_add(n * PART)));
                set[w & !7..][..8].iter().any(|&bits| bits != 0)
            })
    }

    fn drop_region(&mut self, la: LinearAddr, mask: u64, globals_only: bool) {
        if Self::has_some(&self.watched, la, mask) {
            self.begin_epoch();
        }
        let based = self.based;
        let (w, bit) = Self::page_bit(LinearAddr((la.0 & mask).wrapping_sub(1)));
        if !based && self.pages[w] & bit == 0 && !Self::has_some(&self.pages, la, mask) {
            return;
        }
        self.drop_where(|e, global| {
            let near = |a: u64| (a ^ la.0) & mask & PAGE_MASK == 0;
            (global || !globals_only) && (based || near(e.rip) || near((e.rip | !PAGE_MASK).wrapping_add(1)))
        });
    }
}

/// The tags of a context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tags {
    pub vpid: u16,
    pub pcid: u16,
    /// `None`: linear mappings, made while EPT was not in use.
    pub ep4ta: Option<u64>,
}

/// The translations of one address space, as far as they are cached.
pub(crate) struct Context {
    pub tags: Tags,
    /// `AddressSpace::shape` under which the translations were made.
    pub shape: u64,
    pub pkru: u32,
    pub pkrs: u32,
    /// Bit 2i: a translation depends on PKRU's (PKRS's) rights for key i.
    pub pkru_used: u32,
    pub pkrs_used: u32,
    /// Time of the last switch to this context.
    pub last_used: u64,
    tables: [Table; 3],
    jumps: JumpCache,
    /// Which regions of the large-page size (2 or 4 MiB) had a large page, by a hash of the region's number.
    large: [u64; 16],
    /// log2 of that size.
    large_shift: u8,
    /// Which 1 GiB regions had a 1 GiB page, by a hash.
    huge: u64,
    /// Nothing was put in since the last full flush.
    empty: bool,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("tags", &self.tags).field("empty", &self.empty).finish_non_exhaustive()
    }
}

impl Context {
    /// An empty context.
    ///
    /// # Errors
    /// When the host has no memory for the tables.
    pub(crate) fn new(tags: Tags) -> std::io::Result<Self> {
        Ok(Self {
            tags,
            shape: 0,
            pkru: 0,
            pkrs: 0,
            pkru_used: 0,
            pkrs_used: 0,
            last_used: 0,
            tables: [Table::new()?, Table::new()?, Table::new()?],
            jumps: JumpCache::new()?,
            large: [0; 16],
            large_shift: 21,
            huge: 0,
            empty: true,
        })
    }

    pub(crate) fn view(&self) -> View {
        View { tlb: [0, 1, 2].map(|i: usize| self.tables[i].view()), jump_cache: self.jumps.entries.address() }
    }

    #[inline]
    pub(crate) fn table(&self, mode: MemMode) -> &Table {
        &self.tables[mode as usize]
    }

    #[inline]
    pub(crate) fn table_mut(&mut self, mode: MemMode) -> &mut Table {
        self.empty = false;
        &mut self.tables[mode as usize]
    }

    /// A page of `1 << shift` bytes at `la` is going to be cached in 4 KiB pieces.
    #[inline]
    pub(crate) fn note_large(&mut self, la: LinearAddr, shift: u8) {
        if shift >= 30 {
            self.huge |= 1 << (la.0 >> 30 & 63);
        } else {
            self.large_shift = shift;
            let (w, bit) = Self::large_bit(la, shift);
            self.large[w] |= bit;
        }
    }

    const fn large_bit(la: LinearAddr, shift: u8) -> (usize, u64) {
        let h = la.0 >> shift;
        ((h / 64 % 16) as usize, 1 << (h % 64))
    }

    /// Drops everything, or all but what came from global pages.
    pub(crate) fn flush(&mut self, globals: bool) {
        if self.empty {
            return;
        }
        for t in &mut self.tables {
            t.flush(globals);
        }
        self.jumps.flush(globals);
        if globals {
            self.large = [0; 16];
            self.huge = 0;
            self.pkru_used = 0;
            self.pkrs_used = 0;
            self.empty = true;
        }
    }

    /// Drops what is cached for `la`, every piece of a large page included; with `globals_only`, global pages alone.
    pub(crate) fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        if self.empty {
            return;
        }
        let (w, bit) = Self::large_bit(la, self.large_shift);
        let region = if self.huge >> (la.0 >> 30 & 63) & 1 != 0 {
            Some(30)
        } else if self.large[w] & bit != 0 {
            Some(self.large_shift)
        } else {
            None
        };
        match region {
            None => {
                for t in &mut self.tables {
                    t.drop_page(la, globals_only);
                }
                self.jumps.drop_page(la, globals_only);
            }
            Some(shift) => {
                let mask = u64::MAX << shift;
                for t in &mut self.tables {
                    t.drop_region(la, mask, globals_only);
                }
                self.jumps.drop_region(la, mask, globals_only);
            }
        }
    }

    pub(crate) fn revoke_write(&mut self, page: PhysAddr) -> u64 {
        if self.empty { 0 } else { self.tables.iter_mut().map(|t| t.revoke_write(page)).sum() }
    }

    pub(crate) fn jump_insert(&mut self, la: LinearAddr, entry: JumpCacheEntry, global: bool) {
        self.empty = false;
        self.jumps.insert(la, entry, global);
    }

    /// See [`crate::Mmu::code_epoch`].
    pub(crate) fn code_epoch(&mut self, page: LinearAddr) -> u64 {
        self.empty = false;
        self.jumps.epoch(page)
    }

    pub(crate) fn jump_get(&self, rip: u64) -> JumpCacheEntry {
        self.jumps.entries.get(jump_index(rip))
    }

    pub(crate) fn jump_forget(&mut self, rip: u64) {
        let i = jump_index(rip);
        if self.jumps.used.has(i) && self.jumps.entries.get(i).rip == rip {
            self.jumps.drop_entry(i);
        }
    }

    pub(crate) fn jump_drop_where(&mut self, mut gone: impl FnMut(&JumpCacheEntry) -> bool) {
        self.jumps.drop_where(|e, _| gone(e));
    }

    pub(crate) fn jump_clear(&mut self) {
        self.jumps.flush(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A view stored before a table grew probes by the old index. What it may find there must be dropped by an invalidation
    /// under the new one, so an entry that moved leaves nothing behind.
    #[test]
    fn growing_leaves_no_copies() {
        let mut t = Table::new().unwrap();
        let new = |page: u64| NewEntry {
            la: LinearAddr(page << PAGE_SHIFT),
            page: PhysAddr(page << PAGE_SHIFT),
            addend: 0,
            tags: Permitted { read: true, write: false, exec: page.is_multiple_of(2) },
            slow_read: 0,
            slow_write: 0,
            global: page.is_multiple_of(3),
        };
        let pages: Vec<u64> = (0..MIN_ENTRIES as u64).map(|i| i + (i % 5) * MIN_ENTRIES as u64).collect();
        for &p in &pages {
            t.install(&new(p));
        }
        t.grow();
        t.grow();
        for i in 0..t.size {
            let e = t.entries.get(i);
            assert!(e == TlbEntry::INVALID || t.index(LinearAddr(e.read)) == i);
            assert_eq!(t.used.has(i), e != TlbEntry::INVALID);
        }
        for &p in &pages {
            let hit = t.lookup(LinearAddr(p << PAGE_SHIFT), AccessKind::Read).unwrap();
            assert_eq!((hit.page.0, hit.global), (p << PAGE_SHIFT, p.is_multiple_of(3)));
        }
        t.flush(false);
        assert!(
            pages
                .iter()
                .all(|&p| t.lookup(LinearAddr(p << PAGE_SHIFT), AccessKind::Read).is_some() == p.is_multiple_of(3))
        );
        t.flush(true);
        assert!((0..t.size).all(|i| t.entries.get(i) == TlbEntry::INVALID));
    }
}
