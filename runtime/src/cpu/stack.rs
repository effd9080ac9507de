//! A stack as far transfers and deliveries use it: pushes and pops that commit nothing until the caller does.
//!
//! Place in the pipeline: under `far`, `interrupt` and `task`. The stack pointer is a copy; whoever completes its
//! instruction writes it to RSP.

use twofold_arch::segment::attr;
use twofold_arch::vmx::ept::sppt::SUB_PAGE;
use twofold_arch::{CpuState, Exception, LinearAddr, Segment, Vector};

use super::mode::{SS, is_64bit};
use crate::vcpu::{MemAs, Trap, Vcpu};

/// Index of RSP in `CpuState::gpr`.
pub(super) const RSP: usize = 4;

/// A stack and the privilege it is accessed with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    /// The stack pointer, all 64 bits.
    pub sp: u64,
    /// Bits of the stack pointer that count.
    pub mask: u64,
    /// SS, for base and limit; not looked at in 64-bit mode.
    seg: Segment,
    /// 64-bit mode: no base, no limit.
    flat: bool,
    /// On whose behalf memory is accessed.
    access: MemAs,
    /// Selector part of the #SS error code for limit violations.
    error: u32,
}

impl Stack {
    /// The current stack.
    pub fn current(s: &CpuState) -> Self {
        let flat = is_64bit(s);
        let seg = s.seg[SS];
        let mask = if flat { u64::MAX } else { sp_mask(&seg) };
        Self { sp: s.gpr[RSP], mask, seg, flat, access: MemAs::Stack, error: 0 }
    }
    /// Another stack in a legacy mode or compatibility mode.
    pub fn legacy(seg: Segment, sp: u64, access: MemAs, error: u32) -> Self {
        Self { sp, mask: sp_mask(&seg), seg, flat: false, access, error }
    }
    /// Another stack in 64-bit mode.
    pub fn long(sp: u64, access: MemAs) -> Self {
        Self { sp, mask: u64::MAX, seg: Segment::default(), flat: true, access, error: 0 }
    }

    fn address(&self, sp: u64, size: u32) -> Result<LinearAddr, Trap> {
        if self.flat {
            return Ok(LinearAddr(sp));
        }
        let offset = sp & self.mask;
        let last = offset + u64::from(size) - 1;
        let inside = if self.seg.attr & (attr::CODE | attr::EC) == attr::EC {
            let top = if self.seg.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(self.seg.limit) && last <= top
        } else {
            last <= u64::from(self.seg.limit)
        };
        if !inside || self.seg.attr & attr::UNUSABLE != 0 {
            return Err(Exception::with_error(Vector::StackFault, self.error).into());
        }
        Ok(LinearAddr(self.seg.base.wrapping_add(offset) & 0xffff_ffff))
    }

    /// Pushes `size` (2, 4, 8) bytes.
    pub fn push(&mut self, v: &mut Vcpu, size: u32, value: u64) -> Result<(), Trap> {
        let sp = self.moved(0u64.wrapping_sub(u64::from(size)));
        let la = self.address(sp, size)?;
        v.write(la, size, value, self.access)?;
        self.sp = sp;
        Ok(())
    }

    /// Pushes quadwords on a flat stack, the last of `values` first.
    #[inline]
    pub fn push_quads(&mut self, v: &mut Vcpu, values: &[u64]) -> Result<(), Trap> {
        let sp = self.sp.wrapping_sub(8 * values.len() as u64);
        if self.flat && v.write_quads(LinearAddr(sp), values, self.access) {
            self.sp = sp;
            return Ok(());
        }
        values.iter().rev().try_for_each(|&value| self.push(v, 8, value))
    }

    /// Pops `N` values of `size` (2, 4, 8) bytes.
    #[inline]
    pub fn pops<const N: usize>(&mut self, v: &mut Vcpu, size: u32) -> Result<[u64; N], Trap> {
        if self.flat
            && size == 8
            && let Some(values) = v.read_quads(LinearAddr(self.sp), self.access)
        {
            self.sp = self.sp.wrapping_add(8 * N as u64);
            return Ok(values);
        }
        let mut values = [0; N];
        for value in &mut values {
            *value = self.pop(v, size)?;
        }
        Ok(values)
    }

    /// Pops `size` (2, 4, 8) bytes.
    pub fn pop(&mut self, v: &mut Vcpu, size: u32) -> Result<u64, Trap> {
        let la = self.address(self.sp, size)?;
        let value = v.read(la, size, self.access)?;
        self.sp = self.moved(u64::from(size));
        Ok(value)
    }

    /// What is `offset` bytes above the top, without popping.
    pub fn peek(&self, v: &mut Vcpu, offset: u64, size: u32) -> Result<u64, Trap> {
        let la = self.address(self.moved(offset), size)?;
        v.read(la, size, self.access)
    }

    /// Faults as a write of `size` bytes at the top would.
    pub fn check_write(&self, v: &mut Vcpu, size: u32) -> Result<(), Trap> {
        let la = self.address(self.sp, size)?;
        v.host_span(la, true, self.access)?;
        // The end may be in another page, or have another sub-page write permission.
        let last = LinearAddr(la.0.wrapping_add(u64::from(size).saturating_sub(1)) & !(SUB_PAGE - 1));
        if last.0 > la.0 {
            v.host_span(last, true, self.access)?;
        }
        Ok(())
    }

    /// The stack pointer `n` bytes on; bits that do not count stay.
    pub fn moved(&self, n: u64) -> u64 {
        self.sp & !self.mask | self.sp.wrapping_add(n) & self.mask
    }

    /// Makes this stack's pointer the processor's, on the same SS.
    pub fn commit(&self, s: &mut CpuState) {
        s.gpr[RSP] = self.sp;
    }
}

/// The bits of the stack pointer that a legacy stack segment uses.
pub(super) fn sp_mask(ss: &Segment) -> u64 {
    if ss.attr & attr::DB != 0 { 0xffff_ffff } else { 0xffff }
}
