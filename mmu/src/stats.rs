//! Counters of the MMU and the flush policy: what `--stats` calls `tlb` and `--flush-policy` chooses.

use crate::ept::EptCounts;
use crate::space::PagingMode;

/// Why translations were dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum FlushCause {
    MovCr3,
    Invlpg,
    Invpcid,
    CrBits,
    VmEntry,
    VmExit,
    Invvpid,
    Invept,
    EptViolation,
    Pkru,
    Evicted,
    Smm,
    Reset,
}

impl FlushCause {
    /// Every cause, in the order of its number.
    pub const ALL: [FlushCause; 13] = {
        use FlushCause::*;
        [MovCr3, Invlpg, Invpcid, CrBits, VmEntry, VmExit, Invvpid, Invept, EptViolation, Pkru, Evicted, Smm, Reset]
    };
    /// The keys of `flushes` in a `--stats` file, in the same order.
    pub const NAMES: [&'static str; 13] = [
        "mov_cr3",
        "invlpg",
        "invpcid",
        "cr_bits",
        "vm_entry",
        "vm_exit",
        "invvpid",
        "invept",
        "ept_violation",
        "pkru",
        "evicted",
        "smm",
        "reset",
    ];
    /// The key in a `--stats` file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// What an invalidation drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FlushPolicy {
    /// What the SDM says it drops, by VPID, PCID and EP4TA.
    #[default]
    Tagged,
    /// Everything, always: for comparison and for bisecting.
    Full,
}

/// Counters of one vCPU's MMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MmuStats {
    /// Accesses that the TLB could not answer, fetches included.
    pub misses: u64,
    /// Walks by [`PagingMode`], in the order of its number.
    pub walks: [u64; 5],
    /// Misses that a cached large page answered: no walk.
    pub large_page_hits: u64,
    /// Misses that a cached page table answered: one entry was read.
    pub page_table_hits: u64,
    /// Walks through EPT.
    pub nested_walks: u64,
    /// Paging-structure entries read.
    pub entries_read: u64,
    /// Accessed or dirty flags written.
    pub ad_writes: u64,
    /// Walks of EPT, several a nested walk at most.
    pub ept_walks: u64,
    /// EPT entries read.
    pub ept_entries_read: u64,
    /// Accessed or dirty flags written in EPT.
    pub ept_ad_writes: u64,
    /// Guest-physical translations that were cached.
    pub gpa_hits: u64,
    /// Pages put in the page-modification log.
    pub pml_logged: u64,
    /// Walks that ended in a fault.
    pub faults: u64,
    /// Switches to another TLB context.
    pub context_switches: u64,
    /// Tables that were doubled.
    pub table_growths: u64,
    /// Write tags taken back because a page came to hold code.
    pub write_tags_revoked: u64,
    /// Invalidations by [`FlushCause`], in the order of its number.
    pub flushes: [u64; 13],
}

impl MmuStats {
    pub(crate) fn count_ept(&mut self, c: &EptCounts) {
        self.ept_walks += c.walks;
        self.ept_entries_read += c.entries_read;
        self.ept_ad_writes += c.ad_writes;
        self.gpa_hits += c.hits;
        self.pml_logged += c.logged;
    }
    /// Walks in `mode`.
    #[must_use]
    pub const fn walks_in(&self, mode: PagingMode) -> u64 {
        self.walks[mode as usize]
    }
    /// Flushes for `cause`.
    #[must_use]
    pub const fn flushes_by(&self, cause: FlushCause) -> u64 {
        self.flushes[cause as usize]
    }
}
