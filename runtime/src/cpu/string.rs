//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS with every size, segment, direction and prefix.
//!
//! Place in the pipeline: helpers `StringOp` and `StringIo`. A repeated instruction does a bounded amount of work per call and
//! says whether it has to run again. Invariants: RSI, RDI, RCX and the flags are those of the completed iterations when an
//! iteration faults; runs inside pages of plain RAM go through host memory at once, everything else element by element.
#![allow(unsafe_code)] // bulk copies, fills and scans of guest RAM through the host spans that the TLB vouches for

use twofold_arch::{CcKind, CcOp, LinearAddr, Repeat, StringKind, StringOp};

use super::Helped;
use super::mode::is_64bit;
use super::ops::check_io;
use super::segments::seg_addr;
use crate::vcpu::{MemAs, Trap, Vcpu};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;

/// Bytes a call moves at most before the dispatcher gets a look.
const MAX_BYTES: u64 = 64 << 10;
/// Elements a call handles one by one before the dispatcher gets a look.
const MAX_SINGLE: u64 = 4096;

/// What a call returns: the instruction is complete.
const DONE: u64 = 0;
/// What a call returns: the same instruction must run again.
const AGAIN: u64 = 1;

/// A string instruction in execution.
struct Run {
    op: StringOp,
    bytes: u64,
    addr_mask: u64,
    /// DF: addresses go down.
    down: bool,
    /// Offsets are linear addresses (but for FS and GS bases) and nothing is limited.
    flat: bool,
}

/// MOVS, STOS, LODS, CMPS, SCAS.
pub fn string_op(v: &mut Vcpu, word: u64) -> Helped {
    let run = Run::new(v, word);
    if run.op.repeat == Repeat::None {
        run.step(v)?;
        return Ok(DONE);
    }
    run.repeat(v)
}

/// INS, OUTS.
pub fn string_io(v: &mut Vcpu, word: u64) -> Helped {
    let run = Run::new(v, word);
    let port = v.state.gpr[RDX] as u16;
    check_io(v, port, run.bytes as u32)?;
    let rep = run.op.repeat != Repeat::None;
    if v.vmx.non_root && (!rep || run.count(v) != 0) {
        let input = run.op.kind == StringKind::Ins;
        let la = run.address(v, !input, input)?.0;
        crate::vmx::intercept::string_io(v, port, run.bytes as u32, input, rep, la)?;
    }
    if run.op.repeat == Repeat::None {
        run.step(v)?;
        return Ok(DONE);
    }
    run.repeat(v)
}

impl Run {
    fn new(v: &Vcpu, word: u64) -> Self {
        let op = StringOp::unpack(word);
        let addr_mask = match op.log2_addr {
            1 => 0xffff,
            2 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let down = v.state.rflags_sys & twofold_arch::control::rflags::DF != 0;
        let io = matches!(op.kind, StringKind::Ins | StringKind::Outs);
        let bytes = (1u64 << op.log2_bytes).min(if io { 4 } else { 8 });
        Self { op, bytes, addr_mask, down, flat: is_64bit(&v.state) }
    }

    /// Elements left.
    fn count(&self, v: &Vcpu) -> u64 {
        v.state.gpr[RCX] & self.addr_mask
    }

    /// Writes an address-sized register: 32-bit results clear the upper half, 16-bit ones keep it.
    fn set(&self, v: &mut Vcpu, reg: usize, value: u64) {
        let old = v.state.gpr[reg];
        v.state.gpr[reg] = match self.op.log2_addr {
            1 => old & !0xffff | value & 0xffff,
            _ => value & self.addr_mask,
        };
    }

    /// Moves an index register on by `n` elements.
    fn advance(&self, v: &mut Vcpu, reg: usize, n: u64) {
        let by = n.wrapping_mul(self.bytes);
        let old = v.state.gpr[reg];
        self.set(v, reg, if self.down { old.wrapping_sub(by) } else { old.wrapping_add(by) });
    }

    fn uses_source(&self) -> bool {
        matches!(self.op.kind, StringKind::Movs | StringKind::Lods | StringKind::Cmps | StringKind::Outs)
    }
    fn uses_destination(&self) -> bool {
        !matches!(self.op.kind, StringKind::Lods | StringKind::Outs)
    }

    /// The linear address of the element at RSI or RDI.
    #[inline]
    fn address(&self, v: &Vcpu, source: bool, write: bool) -> Result<LinearAddr, Trap> {
        let (reg, segment) = if source { (RSI, self.op.segment as usize) } else { (RDI, 0) };
        let offset = v.state.gpr[reg] & self.addr_mask;
        if self.flat {
            let base = if segment >= 4 { v.state.seg[segment].base } else { 0 };
            return Ok(LinearAddr(base.wrapping_add(offset)));
        }
        seg_addr(&v.state, segment, offset, self.bytes as u32, write).map(LinearAddr)
    }

    /// The access kind of the source operand; the destination is never a stack.
    fn source_access(&self) -> MemAs {
        if self.op.segment == 2 { MemAs::Stack } else { MemAs::Cpl }
    }

    /// One iteration; registers change only when all of it succeeded. For CMPS and SCAS, whether the elements were equal.
    fn step(&self, v: &mut Vcpu) -> Result<bool, Trap> {
        let n = self.bytes as u32;
        let mut equal = true;
        match self.op.kind {
            StringKind::Movs => {
                let from = self.address(v, true, false)?;
                let to = self.address(v, false, true)?;
                let value = v.read(from, n, self.source_access())?;
                v.write(to, n, value, MemAs::Cpl)?;
            }
            StringKind::Stos => {
                let to = self.address(v, false, true)?;
                let value = v.state.gpr[RAX];
                v.write(to, n, value, MemAs::Cpl)?;
            }
            StringKind::Lods => {
                let from = self.address(v, true, false)?;
                let value = v.read(from, n, self.source_access())?;
                self.set_accumulator(v, value);
            }
            StringKind::Cmps => {
                let from = self.address(v, true, false)?;
                let with = self.address(v, false, false)?;
                let a = v.read(from, n, self.source_access())?;
                let b = v.read(with, n, MemAs::Cpl)?;
                equal = self.compare(v, a, b);
            }
            StringKind::Scas => {
                let with = self.address(v, false, false)?;
                let b = v.read(with, n, MemAs::Cpl)?;
                let a = v.state.gpr[RAX];
                equal = self.compare(v, a, b);
            }
            StringKind::Ins => {
                let to = self.address(v, false, true)?;
                // All of it must be writable before the device is asked.
                v.host_span(to, true, MemAs::Cpl)?;
                crate::fpu::Guest::check_store(v, to.0, n, MemAs::Cpl)?;
                let value = v.io_read(v.state.gpr[RDX] as u16, n as u8);
                v.write(to, n, u64::from(value), MemAs::Cpl)?;
            }
            StringKind::Outs => {
                let from = self.address(v, true, false)?;
                let value = v.read(from, n, self.source_access())?;
                v.io_write(v.state.gpr[RDX] as u16, n as u8, value as u32);
            }
        }
        if self.uses_source() {
            self.advance(v, RSI, 1);
        }
        if self.uses_destination() {
            self.advance(v, RDI, 1);
        }
        Ok(equal)
    }

    fn set_accumulator(&self, v: &mut Vcpu, value: u64) {
        let old = v.state.gpr[RAX];
        v.state.gpr[RAX] = match self.bytes {
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Sets the flags as CMP does; whether the operands are equal.
    fn compare(&self, v: &mut Vcpu, a: u64, b: u64) -> bool {
        let mask = u64::MAX >> (64 - 8 * self.bytes);
        let (a, b) = (a & mask, b & mask);
        let s = &mut v.state;
        s.cc_op = u32::from(CcOp::new(CcKind::Sub, self.op.log2_bytes).0);
        s.cc_dst = a.wrapping_sub(b) & mask;
        s.cc_src = b;
        a == b
    }

    /// A repeated instruction: as much as one call may do.
    fn repeat(&self, v: &mut Vcpu) -> Helped {
        // A single step is one iteration, and so is what an MTF VM exit follows.
        let stepping = v.state.rflags_sys & twofold_arch::control::rflags::TF != 0 || crate::vmx::monitor_trap_flag(v);
        let mut budget = if stepping { self.bytes } else { MAX_BYTES };
        let mut singles = 0;
        loop {
            let left = self.count(v);
            if left == 0 {
                return Ok(DONE);
            }
            if budget == 0 || singles >= MAX_SINGLE {
                return Ok(AGAIN);
            }
            let n = self.bulk(v, left.min(budget.div_ceil(self.bytes)))?;
            match n {
                Bulk::Did(n) => {
                    budget = budget.saturating_sub(n * self.bytes);
                    self.set_count(v, left - n);
                }
                Bulk::Stopped(n) => {
                    self.set_count(v, left - n);
                    return Ok(DONE);
                }
                Bulk::None => {
                    singles += 1;
                    budget = budget.saturating_sub(self.bytes);
                    let equal = self.step(v)?;
                    self.set_count(v, left - 1);
                    if self.stops(equal) {
                        return Ok(DONE);
                    }
                    // A breakpoint is reported after the iteration that met it, with RIP at this instruction.
                    if v.watch.has_hits() && left != 1 {
                        return Ok(AGAIN);
                    }
                }
            }
        }
    }

    fn set_count(&self, v: &mut Vcpu, value: u64) {
        self.set(v, RCX, value);
    }

    /// Whether REPE or REPNE ends after an iteration with this outcome.
    fn stops(&self, equal: bool) -> bool {
        match self.op.kind {
            StringKind::Cmps | StringKind::Scas => equal != (self.op.repeat == Repeat::Rep),
            _ => false,
        }
    }

    /// How many elements from the current index on lie in one page of plain RAM, and where the lowest byte is.
    /// `None` when the element at the index has to go its own way.
    fn span(&self, v: &mut Vcpu, source: bool, write: bool, want: u64) -> Result<Option<(*mut u8, u64)>, Trap> {
        let reg = if source { RSI } else { RDI };
        let offset = v.state.gpr[reg] & self.addr_mask;
        // The run must neither wrap the address size nor cross the segment's limit.
        let room = if self.down { offset / self.bytes + 1 } else { (self.addr_mask - offset) / self.bytes };
        let mut n = want.min(room.max(1));
        let la = self.address(v, source, write)?;
        let in_page = la.page_offset();
        if in_page + self.bytes > 4096 {
            return Ok(None);
        }
        n = n.min(if self.down { in_page / self.bytes + 1 } else { (4096 - in_page) / self.bytes });
        if !self.flat && n > 1 {
            let last = (n - 1) * self.bytes;
            let end = if self.down { offset - last } else { offset + last };
            let segment = if source { self.op.segment as usize } else { 0 };
            match seg_addr(&v.state, segment, end, self.bytes as u32, write) {
                // Contiguous in linear space, too.
                Ok(end_la) if end_la == if self.down { la.0.wrapping_sub(last) } else { la.0.wrapping_add(last) } => {}
                _ => n = 1,
            }
        }
        let access = if source { self.source_access() } else { MemAs::Cpl };
        let Some((host, _)) = v.host_span(la, write, access)? else { return Ok(None) };
        let back = if self.down { (n - 1) * self.bytes } else { 0 };
        // `back` bytes below `la` are in the same page, so they are in the same host page.
        Ok(Some((host.wrapping_sub(back as usize), n)))
    }

    /// Up to `want` iterations at once through host memory.
    fn bulk(&self, v: &mut Vcpu, want: u64) -> Result<Bulk, Trap> {
        match self.op.kind {
            StringKind::Movs => self.bulk_movs(v, want),
            StringKind::Stos => self.bulk_stos(v, want),
            StringKind::Scas => self.bulk_scas(v, want),
            StringKind::Cmps => self.bulk_cmps(v, want),
            StringKind::Lods | StringKind::Ins | StringKind::Outs => Ok(Bulk::None),
        }
    }

    fn bulk_movs(&self, v: &mut Vcpu, want: u64) -> Result<Bulk, Trap> {
        let Some((from, n)) = self.span(v, true, false, want)? else { return Ok(Bulk::None) };
        let Some((to, m)) = self.span(v, false, true, n)? else { return Ok(Bulk::None) };
        // Translating the destination may have moved what the source was found through, never guest RAM itself.
        let from = if self.down { from.wrapping_add(((n - m) * self.bytes) as usize) } else { from };
        let len = (m * self.bytes) as usize;
        let (f, t) = (from as usize, to as usize);
        // Element by element, a forward copy to a bit above the source repeats what it has just written.
        let repeats = if self.down { f > t && f - t < len } else { t > f && t - f < len };
        // SAFETY: both spans are `len` bytes inside one page of guest RAM each, as `host_span` says; guest RAM is plain
        // bytes that other vCPUs may change meanwhile, as the guest's own memory model has it.
        unsafe {
            if !repeats {
                core::ptr::copy(from, to, len);
            } else {
                for i in 0..m {
                    let i = (if self.down { m - 1 - i } else { i } * self.bytes) as usize;
                    copy_element(from.add(i), to.add(i), self.bytes);
                }
            }
        }
        self.advance(v, RSI, m);
        self.advance(v, RDI, m);
        Ok(Bulk::Did(m))
    }

    fn bulk_stos(&self, v: &mut Vcpu, want: u64) -> Result<Bulk, Trap> {
        let Some((to, n)) = self.span(v, false, true, want)? else { return Ok(Bulk::None) };
        let value = v.state.gpr[RAX];
        let bytes = &value.to_le_bytes()[..self.bytes as usize];
        // SAFETY: `n` elements inside one page of guest RAM.
        unsafe {
            if bytes.iter().all(|&b| b == bytes[0]) {
                core::ptr::write_bytes(to, bytes[0], (n * self.bytes) as usize);
            } else {
                for i in 0..n {
                    core::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add((i * self.bytes) as usize), bytes.len());
                }
            }
        }
        self.advance(v, RDI, n);
        Ok(Bulk::Did(n))
    }

    fn bulk_scas(&self, v: &mut Vcpu, want: u64) -> Result<Bulk, Trap> {
        let Some((at, n)) = self.span(v, false, false, want)? else { return Ok(Bulk::None) };
        let value = v.state.gpr[RAX];
        let mask = u64::MAX >> (64 - 8 * self.bytes);
        for i in 0..n {
            let k = if self.down { n - 1 - i } else { i };
            // SAFETY: element `k` of `n` inside one page of guest RAM.
            let b = unsafe { load_element(at.add((k * self.bytes) as usize), self.bytes) };
            let equal = value & mask == b;
            if self.stops(equal) || i + 1 == n {
                self.compare(v, value, b);
                self.advance(v, RDI, i + 1);
                return Ok(if self.stops(equal) { Bulk::Stopped(i + 1) } else { Bulk::Did(n) });
            }
        }
        Ok(Bulk::None)
    }

    fn bulk_cmps(&self, v: &mut Vcpu, want: u64) -> Result<Bulk, Trap> {
        let Some((x, n)) = self.span(v, true, false, want)? else { return Ok(Bulk::None) };
        let Some((y, m)) = self.span(v, false, false, n)? else { return Ok(Bulk::None) };
        let x = if self.down { x.wrapping_add(((n - m) * self.bytes) as usize) } else { x };
        for i in 0..m {
            let k = (if self.down { m - 1 - i } else { i } * self.bytes) as usize;
            // SAFETY: element of spans of `m` elements inside one page of guest RAM each.
            let (a, b) = unsafe { (load_element(x.add(k), self.bytes), load_element(y.add(k), self.bytes)) };
            if self.stops(a == b) || i + 1 == m {
                self.compare(v, a, b);
                self.advance(v, RSI, i + 1);
                self.advance(v, RDI, i + 1);
                return Ok(if self.stops(a == b) { Bulk::Stopped(i + 1) } else { Bulk::Did(m) });
            }
        }
        Ok(Bulk::None)
    }
}

/// What a bulk step did.
enum Bulk {
    /// This many iterations, and the instruction goes on.
    Did(u64),
    /// This many iterations, and the condition of REPE or REPNE ended it.
    Stopped(u64),
    /// Nothing: the next iteration has to be done on its own.
    None,
}

/// # Safety
/// `from` and `to` point to `bytes` (1, 2, 4, 8) bytes of guest RAM.
#[inline]
unsafe fn copy_element(from: *const u8, to: *mut u8, bytes: u64) {
    // SAFETY: says the caller.
    unsafe {
        match bytes {
            1 => to.write_volatile(from.read_volatile()),
            2 => to.cast::<u16>().write_unaligned(from.cast::<u16>().read_unaligned()),
            4 => to.cast::<u32>().write_unaligned(from.cast::<u32>().read_unaligned()),
            _ => to.cast::<u64>().write_unaligned(from.cast::<u64>().read_unaligned()),
        }
    }
}

/// # Safety
/// `at` points to `bytes` (1, 2, 4, 8) bytes of guest RAM.
#[inline]
unsafe fn load_element(at: *const u8, bytes: u64) -> u64 {
    // SAFETY: says the caller.
    unsafe {
        match bytes {
            1 => u64::from(at.read_volatile()),
            2 => u64::from(at.cast::<u16>().read_unaligned()),
            4 => u64::from(at.cast::<u32>().read_unaligned()),
            _ => at.cast::<u64>().read_unaligned(),
        }
    }
}
