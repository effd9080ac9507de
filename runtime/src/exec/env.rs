//! The world the evaluator sees: this vCPU's registers, memory through the softmmu TLB, helpers.
//!
//! Invariants: `state` and `vcpu` are the same vCPU's; the quick paths touch only what a TLB entry vouches for; whatever
//! misses goes through [`super::slow`], exactly as from host code.
#![allow(unsafe_code)] // reads and writes guest RAM at the host addresses that TLB entries give, and the state by offset

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use twofold_arch::{CpuState, Loc, PAGE_MASK, TbFlags};
use twofold_backend::{AccessKind, MemInfo};
use twofold_ir::eval::{Abandon, Env as EvalEnv, FILE_BASE, File};
use twofold_ir::{Helper, MemFlags, RmwOp, Ty};
use twofold_mmu::TlbEntry;

use super::slow;
use crate::vcpu::Vcpu;

/// A vCPU as the evaluator's environment.
pub struct Env {
    state: *mut CpuState,
    vcpu: *mut Vcpu,
    mode: usize,
    /// Host address of the softmmu table, read again after every slow path.
    flags: TbFlags,
    /// Data breakpoints are armed: every access goes the slow way, where they look.
    watched: bool,
}

impl Env {
    /// The environment of `vcpu`, for blocks of its current `tb_flags`. The caller does not touch `vcpu` while it lives.
    pub fn new(vcpu: &mut Vcpu) -> Self {
        let flags = TbFlags(vcpu.state.tb_flags);
        Self { state: &raw mut *vcpu.state, vcpu, mode: flags.mem_mode() as usize, flags, watched: vcpu.watch.armed }
    }

    /// The host address of `size` bytes at `la`, if the TLB has them.
    #[inline(always)]
    fn probe(&self, la: u64, size: u64, write: bool) -> Option<*mut u8> {
        if self.watched {
            return None;
        }
        // SAFETY: the view is of this vCPU's current context: `mask` keeps the entry inside the table.
        unsafe {
            let view = &(*self.state).tlb[self.mode];
            let entry = (view.table + (la >> 7 & view.mask)) as *const TlbEntry;
            let tag = if write { (*entry).write } else { (*entry).read };
            (la.wrapping_add(size - 1) & PAGE_MASK == tag).then(|| la.wrapping_add((*entry).addend) as *mut u8)
        }
    }

    #[cold]
    fn slow(&mut self, kind: AccessKind, ty: Ty, flags: MemFlags, addr: u64, lo: u64, hi: u64) -> Result<u64, Abandon> {
        let info = MemInfo::new(kind, ty.log2_bytes(), flags, self.flags.mem_mode());
        // SAFETY: `new` got it from a reference that nobody uses meanwhile.
        let vcpu = unsafe { &mut *self.vcpu };
        slow::access(vcpu, addr, info, lo, hi).ok_or(Abandon)
    }

    #[inline(always)]
    fn misaligned(flags: MemFlags, ty: Ty, addr: u64) -> bool {
        flags.has(MemFlags::ALIGNED) && addr & u64::from(flags.checked_bytes(ty.bytes()) - 1) != 0
    }
}

impl EvalEnv for Env {
    #[inline(always)]
    fn file(&mut self) -> &mut File {
        // SAFETY: the file is `FILE_WORDS` words inside the state (asserted where it is defined), 8-byte aligned.
        unsafe { &mut *self.state.cast::<u8>().add(FILE_BASE as usize).cast::<File>() }
    }
    #[inline]
    fn get(&mut self, ty: Ty, loc: Loc) -> u64 {
        let at = (loc.0 as usize).min(size_of::<CpuState>() - 8);
        // SAFETY: inside the state.
        unsafe {
            let p = self.state.cast::<u8>().add(at);
            match ty {
                Ty::I8 => u64::from(*p),
                Ty::I16 => u64::from(p.cast::<u16>().read_unaligned()),
                Ty::I32 => u64::from(p.cast::<u32>().read_unaligned()),
                Ty::I64 | Ty::V128 => p.cast::<u64>().read_unaligned(),
            }
        }
    }
    #[inline]
    fn put(&mut self, ty: Ty, loc: Loc, v: u64) {
        let at = (loc.0 as usize).min(size_of::<CpuState>() - 8);
        // SAFETY: inside the state.
        unsafe {
            let p = self.state.cast::<u8>().add(at);
            match ty {
                Ty::I8 => *p = v as u8,
                Ty::I16 => p.cast::<u16>().write_unaligned(v as u16),
                Ty::I32 => p.cast::<u32>().write_unaligned(v as u32),
                Ty::I64 | Ty::V128 => p.cast::<u64>().write_unaligned(v),
            }
        }
    }
    #[inline(always)]
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon> {
        let write = flags.has(MemFlags::WRITE_INTENT);
        if let Some(p) = self.probe(addr, u64::from(ty.bytes()), write)
            && !Self::misaligned(flags, ty, addr)
        {
            // SAFETY: the TLB entry vouches for the page; the access lies in it.
            return Ok(unsafe {
                match ty {
                    Ty::I8 => u64::from(p.read_volatile()),
                    Ty::I16 => u64::from(p.cast::<u16>().read_unaligned()),
                    Ty::I32 => u64::from(p.cast::<u32>().read_unaligned()),
                    Ty::I64 | Ty::V128 => p.cast::<u64>().read_unaligned(),
                }
            });
        }
        self.slow(AccessKind::Load, ty, flags, addr, 0, 0)
    }
    #[inline(always)]
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon> {
        let write = flags.has(MemFlags::WRITE_INTENT);
        if let Some(p) = self.probe(addr, flags.checked_bytes(16).into(), write)
            && !Self::misaligned(flags, Ty::V128, addr)
        {
            // SAFETY: as in `load`.
            return Ok(unsafe { p.cast::<u128>().read_unaligned() });
        }
        self.slow(AccessKind::Load, Ty::V128, flags, addr, 0, 0)?;
        // SAFETY: the slow path left the value there.
        let [lo, hi] = unsafe { (*self.state).mem_result };
        Ok(u128::from(hi) << 64 | u128::from(lo))
    }
    #[inline(always)]
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        if let Some(p) = self.probe(addr, u64::from(ty.bytes()), true)
            && !Self::misaligned(flags, ty, addr)
        {
            // SAFETY: as in `load`; the write tag vouches that the page may be written.
            unsafe {
                match ty {
                    Ty::I8 => p.write_volatile(v as u8),
                    Ty::I16 => p.cast::<u16>().write_unaligned(v as u16),
                    Ty::I32 => p.cast::<u32>().write_unaligned(v as u32),
                    Ty::I64 | Ty::V128 => p.cast::<u64>().write_unaligned(v),
                }
            }
            return Ok(());
        }
        self.slow(AccessKind::Store, ty, flags, addr, v, 0).map(drop)
    }
    #[inline(always)]
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon> {
        if let Some(p) = self.probe(addr, flags.checked_bytes(16).into(), true)
            && !Self::misaligned(flags, Ty::V128, addr)
        {
            // SAFETY: as in `store`.
            unsafe { p.cast::<u128>().write_unaligned(v) };
            return Ok(());
        }
        // SAFETY: the slow path takes the value from there.
        unsafe { (*self.state).mem_result = [v as u64, (v >> 64) as u64] };
        self.slow(AccessKind::Store, Ty::V128, flags, addr, 0, 0).map(drop)
    }
    #[inline]
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon> {
        if let Some(p) = self.probe(addr, u64::from(ty.bytes()), true)
            && addr & u64::from(ty.bytes() - 1) == 0
        {
            // SAFETY: as in `store`, and aligned.
            return Ok(unsafe { atomic_rmw(p, op, ty, v) });
        }
        self.slow(AccessKind::Rmw(op), ty, MemFlags::NONE, addr, v, 0)
    }
    #[inline]
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon> {
        if let Some(p) = self.probe(addr, u64::from(ty.bytes()), true)
            && addr & u64::from(ty.bytes() - 1) == 0
        {
            // SAFETY: as in `store`, and aligned.
            return Ok(unsafe { atomic_cmpxchg(p, ty, expected, new) });
        }
        self.slow(AccessKind::CmpXchg, ty, MemFlags::NONE, addr, expected, new)
    }
    #[inline]
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon> {
        let [a, b, c, d] = args;
        // SAFETY: the helper table's functions take the state of a live vCPU, which nobody else uses meanwhile.
        unsafe {
            let r = crate::cpu::HELPERS[helper as usize](self.state, a, b, c, d);
            if (*self.state).fault.pending != 0 { Err(Abandon) } else { Ok(r) }
        }
    }
}

/// # Safety
/// `p` points to an aligned integer of type `ty` in guest RAM.
pub(super) unsafe fn atomic_rmw(p: *mut u8, op: RmwOp, ty: Ty, v: u64) -> u64 {
    macro_rules! apply {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: aligned and in guest RAM, says the caller.
            let a = unsafe { <$atomic>::from_ptr(p.cast()) };
            let v = v as $int;
            u64::from(match op {
                RmwOp::Add => a.fetch_add(v, Ordering::SeqCst),
                RmwOp::Sub => a.fetch_sub(v, Ordering::SeqCst),
                RmwOp::And => a.fetch_and(v, Ordering::SeqCst),
                RmwOp::Or => a.fetch_or(v, Ordering::SeqCst),
                RmwOp::Xor => a.fetch_xor(v, Ordering::SeqCst),
                RmwOp::Xchg => a.swap(v, Ordering::SeqCst),
            })
        }};
    }
    match ty {
        Ty::I8 => apply!(AtomicU8, u8),
        Ty::I16 => apply!(AtomicU16, u16),
        Ty::I32 => apply!(AtomicU32, u32),
        Ty::I64 | Ty::V128 => apply!(AtomicU64, u64),
    }
}

/// # Safety
/// As [`atomic_rmw`].
pub(super) unsafe fn atomic_cmpxchg(p: *mut u8, ty: Ty, expected: u64, new: u64) -> u64 {
    macro_rules! apply {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: aligned and in guest RAM, says the caller.
            let a = unsafe { <$atomic>::from_ptr(p.cast()) };
            match a.compare_exchange(expected as $int, new as $int, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(old) | Err(old) => u64::from(old),
            }
        }};
    }
    match ty {
        Ty::I8 => apply!(AtomicU8, u8),
        Ty::I16 => apply!(AtomicU16, u16),
        Ty::I32 => apply!(AtomicU32, u32),
        Ty::I64 | Ty::V128 => apply!(AtomicU64, u64),
    }
}
