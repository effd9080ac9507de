//! The sub-page-permission table: which 128 bytes of a page that EPT does not let be written may be written all the same.
//!
//! Place in the pipeline: [`crate::ept`] asks for each eligible write that the EPT entries refuse. Invariant: nothing is cached; a page
//! that a write got to this way has no write tag in the TLB, so that every write to it asks again.
//! Sources: SDM Vol 3C, "Sub-Page Write Permissions", "SPP-Related VM Exits"; row F10.

use twofold_arch::paging::ADDR;
use twofold_arch::vmx::ept::sppt;
use twofold_arch::{GuestPhysAddr, PhysAddr};

use crate::ept::EptReason;
use crate::walk::Direct;

/// Whether the table at `table` lets the byte at `gpa` be written. An address wider than the table covers is a miss.
#[cold]
pub(crate) fn may_write(
    mut table: u64,
    maxphyaddr: u8,
    memory: Direct<'_>,
    gpa: GuestPhysAddr,
) -> Result<bool, EptReason> {
    if gpa.0 >> sppt::WIDTH != 0 {
        return Err(EptReason::SubPageMiss(4));
    }
    let entry = |table: u64, level: u8| memory.load_u64(PhysAddr(table | (gpa.0 >> (3 + 9 * level) & 0x1ff) << 3));
    for level in [4, 3, 2] {
        let entry = entry(table, level);
        if entry & sppt::VALID == 0 {
            return Err(EptReason::SubPageMiss(level));
        }
        let reserved = entry & sppt::reserved(u32::from(maxphyaddr));
        if reserved != 0 {
            return Err(EptReason::SubPageReserved(reserved));
        }
        table = entry & ADDR;
    }
    let vector = entry(table, 1);
    let reserved = vector & sppt::VECTOR_RESERVED;
    if reserved != 0 {
        return Err(EptReason::SubPageReserved(reserved));
    }
    Ok(vector & sppt::vector_bit(gpa.0) != 0)
}
