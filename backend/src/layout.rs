//! Byte layouts that emitted code and the assembly thunks share with `arch` and `mmu`.
//!
//! Place in the pipeline: used by `lower` and `thunks`. The asserts tie the numbers to the types they mirror.
#![cfg_attr(not(all(target_arch = "x86_64", not(portable_host))), allow(dead_code))] // no thunks there

use core::mem::offset_of;

use twofold_arch::CpuState;
use twofold_arch::state::{FaultRecord, TlbView};
use twofold_ir::Helper;
use twofold_mmu::{JUMP_CACHE_ENTRIES, JumpCacheEntry, TlbEntry, jump_index};

use crate::abi::HelperTable;

// What is said about `mmu`'s layouts below.
const _: () = {
    assert!(size_of::<TlbEntry>() == 32 && size_of::<JumpCacheEntry>() == 32);
    assert!(TLB_READ as usize == offset_of!(TlbEntry, read) && TLB_WRITE as usize == offset_of!(TlbEntry, write));
    assert!(TLB_ADDEND as usize == offset_of!(TlbEntry, addend) && 1 << TLB_SHIFT == 4096 / 32);
    assert!(JC_RIP == offset_of!(JumpCacheEntry, rip) && JC_FLAGS == offset_of!(JumpCacheEntry, flags));
    assert!(JC_CODE == offset_of!(JumpCacheEntry, code) && JC_RIP_BASE == offset_of!(JumpCacheEntry, rip_base));
    assert!(JC_MASK == JUMP_CACHE_ENTRIES - 1);
    let rip = 0xffff_ffff_8123_4567;
    assert!(jump_index(rip) == (rip >> 12 ^ rip) as usize & JC_MASK);
};

/// Offset in a TLB entry of the tag for reads.
pub const TLB_READ: i32 = 0;
/// Offset in a TLB entry of the tag for writes.
pub const TLB_WRITE: i32 = 8;
/// Offset in a TLB entry of the value that makes a host address of a linear address.
pub const TLB_ADDEND: i32 = 24;
/// `addr >> TLB_SHIFT & mask` is the byte offset of an address's TLB entry.
pub const TLB_SHIFT: u32 = 7;

/// Offset in a jump-cache entry of RIP.
pub const JC_RIP: usize = 0;
/// Offset in a jump-cache entry of the `TbFlags` word.
pub const JC_FLAGS: usize = 8;
/// Offset in a jump-cache entry of the host entry point.
pub const JC_CODE: usize = 16;
/// Offset in a jump-cache entry of the block's `rip_base`.
pub const JC_RIP_BASE: usize = 24;

/// Offset in a jump cache of its epoch.
pub const JC_EPOCH: usize = JUMP_CACHE_ENTRIES * size_of::<JumpCacheEntry>() + offset_of!(JumpCacheEntry, rip);

/// Mask of a jump-cache index: `(rip >> 12 ^ rip) & JC_MASK`, see `mmu::jump_index`.
pub const JC_MASK: usize = 0x7fff;

/// Offset of the `TlbView` of a memory mode in the state.
pub const fn tlb_view(mode: usize) -> usize {
    offset_of!(CpuState, tlb) + mode * size_of::<TlbView>()
}
/// Offset of `TlbView::mask`.
pub const VIEW_MASK: usize = offset_of!(TlbView, mask);
/// Offset of `TlbView::table`.
pub const VIEW_TABLE: usize = offset_of!(TlbView, table);

pub const BUDGET: usize = offset_of!(CpuState, budget);
pub const ATTENTION: usize = offset_of!(CpuState, attention);
pub const RIP_BASE: usize = offset_of!(CpuState, rip_base);
pub const RIP: usize = offset_of!(CpuState, rip);
pub const JUMP_CACHE: usize = offset_of!(CpuState, jump_cache);
pub const TB_FLAGS: usize = offset_of!(CpuState, tb_flags);
pub const ONWARD: usize = offset_of!(CpuState, onward);
pub const HOST_SP: usize = offset_of!(CpuState, host_sp);
pub const HOST_RET: usize = offset_of!(CpuState, host_ret);
pub const MEM_RESULT: usize = offset_of!(CpuState, mem_result);
pub const EXEC_COUNTS: usize = offset_of!(CpuState, exec_counts);
pub const HELPERS: usize = offset_of!(CpuState, helpers);
pub const CC_OP: usize = offset_of!(CpuState, cc_op);
pub const CC_DST: usize = offset_of!(CpuState, cc_dst);
pub const CC_SRC: usize = offset_of!(CpuState, cc_src);
pub const X87_LIVE: usize = offset_of!(CpuState, x87_live);
pub const FAULT_PENDING: usize = offset_of!(CpuState, fault) + offset_of!(FaultRecord, pending);
pub const FAULT_VECTOR: usize = offset_of!(CpuState, fault) + offset_of!(FaultRecord, vector);
pub const FAULT_ERROR: usize = offset_of!(CpuState, fault) + offset_of!(FaultRecord, error);
pub const FAULT_HAS_ERROR: usize = offset_of!(CpuState, fault) + offset_of!(FaultRecord, has_error);
pub const FAULT_CR2: usize = offset_of!(CpuState, fault) + offset_of!(FaultRecord, cr2);

pub const FN_LOAD: usize = offset_of!(HelperTable, load);
pub const FN_STORE: usize = offset_of!(HelperTable, store);
pub const FN_ATOMIC: usize = offset_of!(HelperTable, atomic);
pub const FN_COND: usize = offset_of!(HelperTable, cond);
pub const FN_FLAGS: usize = offset_of!(HelperTable, flags);
pub const FN_LOOKUP: usize = offset_of!(HelperTable, lookup);
pub const FN_VEC: usize = offset_of!(HelperTable, vec);
pub const FN_HELPERS: usize = offset_of!(HelperTable, helpers);
pub const FN_X87_READY: usize = FN_HELPERS + Helper::X87Ready as usize * 8;
