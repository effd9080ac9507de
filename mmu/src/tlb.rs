//! The softmmu TLB's tables: what translated code probes for a memory access.
//!
//! Place in the pipeline: translated code reads the current context's tables through `CpuState::tlb`; only this vCPU's
//! [`crate::Mmu`] changes them, a table for each [`MemMode`](twofold_arch::tbflags::MemMode) in every [`crate::context`].
//! Invariants: a tag that can match stands for an access that the guest's paging structures permitted when they were last
//! read, to memory that needs no slow path; a table's memory never moves while its context lives, so a stale mask in
//! `CpuState` costs misses, never wrong answers. What a flush or the search for a physical page costs goes by the entries
//! that are in use, not by the table's size.
#![allow(unsafe_code)] // A matching tag promises host memory, which is accessed here as translated code does.

use twofold_arch::state::TlbView;
use twofold_arch::{LinearAddr, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PhysAddr};

use crate::raw::{Bits, RawArray, each_bit};
use crate::rights::Permitted;
use crate::space::AccessKind;

/// One entry, as the probe reads it. A tag matches when it equals the linear page of the access's last byte.
///
/// A tag is always the address of a page: one that must not match is that of a page whose entry is elsewhere, whatever the table's
/// size. So an access of n bytes hits exactly when its address minus the tag is at most 4096 - n, unsigned, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Tag for data reads. An entry in use has its linear page here whatever may be done there, by exclusive or with what is
    /// in the way.
    pub read: u64,
    /// Tag for data writes.
    pub write: u64,
    /// The physical page, and in the low bits what only the slow path asks for.
    pub page: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

/// In a tag: the translation is good, but the access must take the slow path because the page is no memory that may be accessed
/// directly (a device, nothing, or for writes ROM).
pub(crate) const SLOW_IO: u64 = 1 << 18;
/// As above: the page holds translated code (write tags only).
pub(crate) const SLOW_CODE: u64 = 1 << 19;
const SLOW: u64 = SLOW_IO | SLOW_CODE;
/// In a tag: the access is not permitted, or not known to be.
const DENIED: u64 = 1 << 20;
const REASONS: u64 = SLOW | DENIED;
// They are bits of the index, and none makes a page of its neighbour.
const _: () = assert!(REASONS >> PAGE_SHIFT < MIN_ENTRIES as u64 && SLOW_IO > 1 << PAGE_SHIFT);

impl TlbEntry {
    /// Entry `i` when it matches nothing. Memory not yet written says so too: its tags are of page 0, whose entry is the first.
    const fn absent(i: usize) -> Self {
        let tag = if i == 0 { DENIED } else { 0 };
        Self { read: tag, write: tag, page: 0, addend: 0 }
    }

    /// The linear page of entry `i`, if it is in use.
    const fn linear(&self, i: usize) -> u64 {
        self.read & !REASONS | (i as u64) << PAGE_SHIFT & REASONS
    }
}

/// In the low bits of [`TlbEntry::page`]: fetches are permitted.
const EXEC: u64 = 1;
/// The mapping is global.
const GLOBAL: u64 = 2;
/// Fetches find no memory.
const EXEC_IO: u64 = 4;
/// The entry is in use.
const USED: u64 = 8;

const ENTRY: usize = size_of::<TlbEntry>();
const _: () = assert!(ENTRY == 32);

/// Entries in a table at first.
pub(crate) const MIN_ENTRIES: usize = 512;
/// Entries in a table at most in machines with little memory.
const FEW_ENTRIES: usize = 1 << 16;
/// Entries in a table that is so large that more of it had better be in large pages of the host.
const HUGE_ENTRIES: usize = 1 << 15;
/// Entries in a table at most.
const MAX_ENTRIES: usize = 1 << 20;

/// Entries in a table at most in a machine with so many pages of RAM: room for all of them.
pub(crate) fn most_entries(pages: u64) -> usize {
    let pages = usize::try_from(pages).unwrap_or(MAX_ENTRIES).min(MAX_ENTRIES);
    pages.next_power_of_two().max(FEW_ENTRIES)
}

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

/// A direct-mapped table for one `MemMode`.
pub(crate) struct Table {
    entries: RawArray<TlbEntry>,
    size: usize,
    used: Bits,
    global: Bits,
    /// Entries in use.
    live: usize,
    /// Live entries replaced by another page's since the table last grew.
    conflicts: usize,
}

impl Table {
    /// An empty table that may grow to `most` entries.
    pub(crate) fn new(most: usize) -> std::io::Result<Self> {
        let t = Self {
            entries: RawArray::new(most.max(MIN_ENTRIES))?,
            size: MIN_ENTRIES,
            used: Bits::new(MIN_ENTRIES),
            global: Bits::new(MIN_ENTRIES),
            live: 0,
            conflicts: 0,
        };
        t.entries.set(0, TlbEntry::absent(0));
        Ok(t)
    }

    pub(crate) fn view(&self) -> TlbView {
        TlbView { mask: ((self.size - 1) * ENTRY) as u64, table: self.entries.address() }
    }

    #[inline]
    fn index(&self, la: LinearAddr) -> usize {
        (la.0 >> PAGE_SHIFT) as usize & (self.size - 1)
    }

    /// The translation of `la` for an access of `kind`, if one is cached.
    #[inline]
    pub(crate) fn lookup(&self, la: LinearAddr, kind: AccessKind) -> Option<Hit> {
        let e = self.entries.get(self.index(la));
        let page = la.page().0;
        let slow = match kind {
            AccessKind::Read => e.read ^ page,
            AccessKind::Write => e.write ^ page,
            AccessKind::Fetch if e.page & EXEC != 0 => {
                ((e.read ^ page) & !REASONS) | ((e.page & EXEC_IO) / EXEC_IO * SLOW_IO)
            }
            AccessKind::Fetch => return None,
        };
        if slow & !SLOW != 0 || e.page & USED == 0 {
            return None;
        }
        Some(Hit { page: PhysAddr(e.page & PAGE_MASK), slow, addend: e.addend, global: e.page & GLOBAL != 0 })
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

    /// Loads `N` quadwords on a hit for all of them, in one page.
    #[inline]
    pub(crate) fn load_quads<const N: usize>(&self, la: LinearAddr) -> Option<[u64; N]> {
        if la.page_offset() > PAGE_SIZE - 8 * N as u64 {
            return None;
        }
        let p = self.probe(la, 8 * N as u32, |e| e.read)?.cast::<u64>();
        // SAFETY: as in `load`; all of them are in the page.
        Some(std::array::from_fn(|i| u64::from_le(unsafe { p.add(i).read_unaligned() })))
    }

    /// Stores quadwords on a hit for all of them, in one page; false on a miss.
    #[inline]
    pub(crate) fn store_quads(&self, la: LinearAddr, values: &[u64]) -> bool {
        let size = size_of_val(values) as u64;
        if size == 0 || size > PAGE_SIZE || la.page_offset() > PAGE_SIZE - size {
            return false;
        }
        let Some(p) = self.probe(la, size as u32, |e| e.write) else { return false };
        for (i, value) in values.iter().enumerate() {
            // SAFETY: as in `store`; all of them are in the page.
            unsafe { p.cast::<u64>().add(i).write_unaligned(value.to_le()) };
        }
        true
    }

    /// Puts a translation in, in the place of what was there. True when the table would do better with more entries.
    #[inline]
    pub(crate) fn install(&mut self, new: &NewEntry) -> bool {
        let i = self.index(new.la);
        let page = new.la.page().0;
        if !self.used.has(i) {
            self.used.insert(i);
            self.live += 1;
        } else if !self.holds(i, page, PAGE_MASK) {
            self.conflicts += 1;
        }
        self.global.assign(i, new.global);
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let exec = bit(new.tags.exec, EXEC) | bit(new.slow_read != 0, EXEC_IO);
        self.entries.set(
            i,
            TlbEntry {
                read: page ^ new.slow_read ^ bit(!new.tags.read, DENIED),
                write: page ^ new.slow_write ^ bit(!new.tags.write, DENIED),
                page: new.page.page().0 | USED | exec | bit(new.global, GLOBAL),
                addend: new.addend,
            },
        );
        self.conflicts > self.size / 2 && self.size < self.entries.len()
    }

    /// Doubles the table if it is full enough for that to help; what it holds stays. Whether it did.
    pub(crate) fn grow(&mut self) -> bool {
        self.conflicts = 0;
        // Pages that meet in one place of a table that is all but empty are as likely to meet in a larger one.
        if self.size >= self.entries.len() || self.live < self.size / 16 {
            return false;
        }
        if self.size == HUGE_ENTRIES {
            // Its entries are read at random: fewer host TLB misses.
            self.entries.want_huge();
        }
        self.resize(self.size * 2);
        true
    }

    fn resize(&mut self, size: usize) {
        let mut held = Vec::with_capacity(self.live);
        self.used.each_word(|used, w| each_bit(w, used.word(w), |i| held.push((i, self.entries.get(i)))));
        // A view from before this goes on probing by the old index: what moves leaves nothing behind.
        held.iter().for_each(|&(i, _)| self.entries.set(i, TlbEntry::absent(i)));
        self.size = size;
        (self.used, self.global, self.live) = (Bits::new(size), Bits::new(size), 0);
        for (i, e) in held {
            let i = self.index(LinearAddr(e.linear(i)));
            self.live += usize::from(!self.used.has(i));
            self.entries.set(i, e);
            self.used.insert(i);
            self.global.assign(i, e.page & GLOBAL != 0);
        }
    }

    /// Makes a table that holds little small again, and gives its memory back. Only when the view is stored anew after it.
    pub(crate) fn shrink(&mut self) {
        let size = (self.live * 4).next_power_of_two().max(MIN_ENTRIES);
        if size < self.size {
            self.resize(size);
            self.conflicts = 0;
            self.entries.give_back(size);
        }
    }

    /// Whether entry `i`, which is in use, is for a linear page that agrees with `page` under `mask`.
    #[inline]
    fn holds(&self, i: usize, page: u64, mask: u64) -> bool {
        (self.entries.get(i).linear(i) ^ page) & mask & PAGE_MASK == 0
    }

    #[inline]
    fn drop_entry(&mut self, i: usize) {
        self.entries.set(i, TlbEntry::absent(i));
        self.used.remove(i);
        self.global.remove(i);
        self.live -= 1;
    }

    /// Drops every entry (`globals` too), or all but those of global pages.
    pub(crate) fn flush(&mut self, globals: bool) {
        let Self { entries, used, global, live, .. } = self;
        used.each_word(|used, w| {
            let drop = used.word(w) & if globals { u64::MAX } else { !global.word(w) };
            each_bit(w, drop, |i| entries.set(i, TlbEntry::absent(i)));
            used.remove_word(w, drop);
            global.remove_word(w, drop);
            *live -= drop.count_ones() as usize;
        });
        self.conflicts /= 2;
    }

    /// Drops the entry of the page of `la`; with `globals_only`, only if it is global.
    #[inline]
    pub(crate) fn drop_page(&mut self, la: LinearAddr, globals_only: bool) {
        let i = self.index(la);
        if self.used.has(i) && self.holds(i, la.page().0, PAGE_MASK) && (!globals_only || self.global.has(i)) {
            self.drop_entry(i);
        }
    }

    /// As [`Self::drop_page`] for all pages that agree with `la` under `mask`.
    pub(crate) fn drop_region(&mut self, la: LinearAddr, mask: u64, globals_only: bool) {
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
    pub(crate) fn revoke_write(&mut self, page: PhysAddr) -> u64 {
        let mut n = 0;
        let Self { entries, used, .. } = self;
        used.each_word(|used, w| {
            each_bit(w, used.word(w), |i| {
                let mut e = entries.get(i);
                if e.page & PAGE_MASK == page.0 && e.write == e.linear(i) {
                    e.write ^= SLOW_CODE;
                    entries.set(i, e);
                    n += 1;
                }
            });
        });
        n
    }

    /// The page of `la` holds no code any more: its write tag may match again.
    pub(crate) fn restore_write(&mut self, la: LinearAddr) {
        let i = self.index(la);
        let mut e = self.entries.get(i);
        if e.write == la.page().0 ^ SLOW_CODE {
            e.write ^= SLOW_CODE;
            self.entries.set(i, e);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A view stored before a table grew probes by the old index. What it may find there must be dropped by an invalidation
    /// under the new one, so an entry that moved leaves nothing behind.
    #[test]
    fn growing_leaves_no_copies() {
        let mut t = Table::new(FEW_ENTRIES).unwrap();
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
        assert!(t.grow() && t.grow());
        let empty = |t: &Table, i: usize| t.entries.get(i) == TlbEntry::absent(i);
        for i in 0..t.size {
            assert!(empty(&t, i) || t.index(LinearAddr(t.entries.get(i).linear(i))) == i);
            assert_eq!(t.used.has(i), !empty(&t, i));
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
        assert!((0..t.size).all(|i| empty(&t, i)));
        assert_eq!(t.live, 0);
        assert!(!t.grow(), "an empty table is large enough");
        t.shrink();
        assert_eq!(t.size, MIN_ENTRIES);
    }
}
