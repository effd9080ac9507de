//! Instructions too long for IR that are no transfers: division, BCD, wide compare-exchange, ports, flags, tables, debug
//! registers, time, identification.
//!
//! Place in the pipeline: helpers. Invariant: registers and flags change only when nothing can fault any more.
#![allow(unsafe_code)] // CMPXCHG8B and CMPXCHG16B on guest RAM are host atomics

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use twofold_arch::control::{cr4, rflags};
use twofold_arch::segment::attr;
use twofold_arch::vmx::ExitReason;
use twofold_arch::{CcOp, Exception, LinearAddr, Vector};

use super::Helped;
use super::cpuid::{Bit, CpuidState};
use super::far::{merge_flags, truncate};
use super::interrupt::dr6;
use super::mode::{TR, iopl, is_canonical_base, is_protected, is_v86};
use super::segments::{GP0, UD};
use super::stack::Stack;
use super::task::read_tss;
use crate::vcpu::{MemAs, Trap, Vcpu};
use crate::vmx::intercept;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RBP: usize = 5;

/// #DE.
const DE: Trap = Trap::Exception(Exception::DE);

/// Sets the arithmetic flags of `mask` from `image`; the others stay.
fn set_arith(v: &mut Vcpu, image: u64, mask: u64) {
    let s = &mut v.state;
    let kept = if mask == rflags::ARITH { 0 } else { s.rflags() & rflags::ARITH & !mask };
    s.cc_op = u32::from(CcOp::FLAGS.0);
    s.cc_src = kept | image & mask;
}

/// Writes the accumulator and rDX of an operand size: two bytes keep what is above, four clear it.
fn put(v: &mut Vcpu, reg: usize, log2: u64, value: u64) {
    let old = v.state.gpr[reg];
    v.state.gpr[reg] = match log2 {
        0 => old & !0xff | value & 0xff,
        1 => old & !0xffff | value & 0xffff,
        2 => value & 0xffff_ffff,
        _ => value,
    };
}

// ---- division ---------------------------------------------------------------------------------------------------------

/// The quotient of 128 bits, `high` and `low`, if it has no more than 64; else `low`.
#[must_use]
pub fn divide_wide(low: u64, high: u64, divisor: u64) -> u64 {
    if high >= divisor {
        return low;
    }
    ((u128::from(high) << 64 | u128::from(low)) / u128::from(divisor)) as u64
}

// ---- rotates through carry, BCD ---------------------------------------------------------------------------------------

/// RCL and RCR: the rotated value; CF and OF set.
pub fn rotate_carry(v: &mut Vcpu, value: u64, count: u64, how: u64) -> Helped {
    let log2 = how & 3;
    let right = how >> 8 & 1 != 0;
    let bits = 8u32 << log2;
    let value = truncate(value, log2);
    let count = count as u32 & if bits == 64 { 63 } else { 31 };
    if count == 0 {
        return Ok(value);
    }
    let flags = v.state.rflags();
    let count = count % (bits + 1);
    // The value with CF on top, bits + 1 wide.
    let wide = u128::from(flags & rflags::CF) << bits | u128::from(value);
    let mask = (1u128 << (bits + 1)) - 1;
    let left = if right { bits + 1 - count } else { count };
    let rotated = if left == 0 || left == bits + 1 { wide } else { (wide << left | wide >> (bits + 1 - left)) & mask };
    let result = truncate(rotated as u64, log2);
    let carry = (rotated >> bits) as u64 & 1;
    let top = result >> (bits - 1) & 1;
    let overflow = if right { top ^ result >> (bits - 2) & 1 } else { top ^ carry };
    let image = carry | if overflow != 0 { rflags::OF } else { 0 };
    set_arith(v, image, rflags::CF | rflags::OF);
    Ok(result)
}

/// SF, ZF and PF of a byte.
fn szp(al: u8) -> u64 {
    twofold_arch::flags::arith_flags(CcOp::new(twofold_arch::CcKind::Logic, 0), u64::from(al), 0, 0)
}

/// DAA, DAS, AAA, AAS, AAM, AAD by `kind` 0..=5.
pub fn bcd(v: &mut Vcpu, kind: u64, imm: u64) -> Helped {
    let flags = v.state.rflags();
    let (cf, af) = (flags & rflags::CF != 0, flags & rflags::AF != 0);
    let ax = v.state.gpr[RAX] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let low_adjust = al & 0xf > 9 || af;
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let (ax, image) = match kind {
        0 | 1 => {
            let high_adjust = al > 0x99 || cf;
            let mut by = 0u8;
            if low_adjust {
                by = 6;
            }
            if high_adjust {
                by = by.wrapping_add(0x60);
            }
            let borrow = kind == 1 && low_adjust && al < 6;
            let r = if kind == 0 { al.wrapping_add(by) } else { al.wrapping_sub(by) };
            let image = szp(r) | flag(high_adjust || borrow, rflags::CF) | flag(low_adjust, rflags::AF);
            (u16::from(ah) << 8 | u16::from(r), image)
        }
        2 | 3 => {
            let r = match (low_adjust, kind) {
                (false, _) => ax,
                (true, 2) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(6).wrapping_sub(0x100),
            };
            let r = r & 0xff0f;
            (r, szp(r as u8) | flag(low_adjust, rflags::CF | rflags::AF))
        }
        4 => {
            let base = imm as u8;
            if base == 0 {
                return Err(DE);
            }
            let (q, r) = (al / base, al % base);
            (u16::from(q) << 8 | u16::from(r), szp(r))
        }
        _ => {
            let r = al.wrapping_add(ah.wrapping_mul(imm as u8));
            (u16::from(r), szp(r))
        }
    };
    put(v, RAX, 1, u64::from(ax));
    set_arith(v, image, rflags::ARITH);
    Ok(0)
}

// ---- bit manipulation (pure) --------------------------------------------------------------------------------------------

const CRC32C: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut k = 0;
        while k < 8 {
            c = if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
            k += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

/// CRC32: the CRC-32C of `1 << log2` bytes of `value`.
#[must_use]
pub fn crc32(crc: u64, value: u64, log2: u64) -> u64 {
    let bytes = value.to_le_bytes();
    let crc = bytes[..1 << log2.min(3)].iter().fold(crc as u32, |c, &b| CRC32C[usize::from(c as u8 ^ b)] ^ c >> 8);
    u64::from(crc)
}

/// PDEP.
#[must_use]
pub fn pdep(value: u64, mask: u64) -> u64 {
    let (mut r, mut m, mut value) = (0, mask, value);
    while m != 0 {
        if value & 1 != 0 {
            r |= m & m.wrapping_neg();
        }
        value >>= 1;
        m &= m - 1;
    }
    r
}

/// PEXT.
#[must_use]
pub fn pext(value: u64, mask: u64) -> u64 {
    let (mut r, mut m, mut bit) = (0, mask, 1u64);
    while m != 0 {
        if value & m & m.wrapping_neg() != 0 {
            r |= bit;
        }
        bit <<= 1;
        m &= m - 1;
    }
    r
}

/// RDRAND and RDSEED: a value, with CF set and the other flags clear. SplitMix64 from the vCPU's seed: the same seed makes
/// the same run.
pub fn random(v: &mut Vcpu, log2: u64, seed: bool) -> Helped {
    if v.vmx.non_root {
        intercept::random(v, seed)?;
    }
    v.cold.rng = v.cold.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = v.cold.rng;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    set_arith(v, rflags::CF, rflags::ARITH);
    Ok(truncate(z, log2))
}

/// Sets and clears bits of a byte in a descriptor table, locked (SDM Vol 3A, "Automatic Locking").
pub(super) fn update_byte(v: &mut Vcpu, la: LinearAddr, set: u8, clear: u8) -> Result<(), Trap> {
    if let Some((p, _)) = v.host_span(la, true, MemAs::System)? {
        // SAFETY: a byte of guest RAM, as `host_span` says.
        let cell = unsafe { AtomicU8::from_ptr(p) };
        // It always has a new value.
        let _ = cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |b| Some(b & !clear | set));
        return Ok(());
    }
    let byte = v.read(la, 1, MemAs::System)? as u8;
    v.write(la, 1, u64::from(byte & !clear | set), MemAs::System)
}

// ---- wide compare and exchange ------------------------------------------------------------------------------------------

/// CMPXCHG8B; always atomic when aligned.
pub fn cmpxchg8b(v: &mut Vcpu, la: u64) -> Helped {
    let g = &v.state.gpr;
    let expected = g[RDX] << 32 | g[RAX] & 0xffff_ffff;
    let new = g[RCX] << 32 | g[RBX] & 0xffff_ffff;
    let at = LinearAddr(la);
    let old = match v.host_span(at, true, MemAs::Cpl)? {
        Some((p, _)) if la & 7 == 0 => {
            // SAFETY: eight aligned bytes of guest RAM, as `host_span` says.
            let cell = unsafe { AtomicU64::from_ptr(p.cast()) };
            match cell.compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(old) | Err(old) => old,
            }
        }
        _ => {
            let mut b = [0; 8];
            crate::fpu::Guest::check_store(v, la, 8, MemAs::Cpl)?;
            v.read_bytes(at, &mut b, MemAs::Cpl)?;
            let old = u64::from_le_bytes(b);
            let value = if old == expected { new } else { old };
            v.write_bytes(at, &value.to_le_bytes(), MemAs::Cpl)?;
            old
        }
    };
    let equal = old == expected;
    if !equal {
        v.state.gpr[RAX] = old & 0xffff_ffff;
        v.state.gpr[RDX] = old >> 32;
    }
    set_arith(v, if equal { rflags::ZF } else { 0 }, rflags::ZF);
    Ok(0)
}

/// CMPXCHG16B.
pub fn cmpxchg16b(v: &mut Vcpu, la: u64) -> Helped {
    if la & 15 != 0 {
        return Err(GP0);
    }
    let g = &v.state.gpr;
    let expected = u128::from(g[RDX]) << 64 | u128::from(g[RAX]);
    let new = u128::from(g[RCX]) << 64 | u128::from(g[RBX]);
    let at = LinearAddr(la);
    let old = match v.host_span(at, true, MemAs::Cpl)? {
        Some((p, _)) => {
            // SAFETY: sixteen aligned bytes of guest RAM, as `host_span` says.
            unsafe { exchange_128(p.cast(), expected, new) }
        }
        None => {
            let mut b = [0; 16];
            v.read_bytes(at, &mut b, MemAs::Cpl)?;
            let old = u128::from_le_bytes(b);
            let value = if old == expected { new } else { old };
            v.write_bytes(at, &value.to_le_bytes(), MemAs::Cpl)?;
            old
        }
    };
    let equal = old == expected;
    if !equal {
        v.state.gpr[RAX] = old as u64;
        v.state.gpr[RDX] = (old >> 64) as u64;
    }
    set_arith(v, if equal { rflags::ZF } else { 0 }, rflags::ZF);
    Ok(0)
}

/// Compares and exchanges 16 bytes; what was there.
///
/// # Safety
/// `p` points to 16 aligned bytes that stay valid.
unsafe fn exchange_128(p: *mut u128, expected: u128, new: u128) -> u128 {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        let (mut lo, mut hi) = (expected as u64, (expected >> 64) as u64);
        // In assembly: the intrinsic becomes a call of a library that nobody links. RBX is LLVM's own.
        // SAFETY: the host has the instruction; the rest is the caller's.
        unsafe {
            core::arch::asm!(
                "xchg {new_lo}, rbx",
                "lock cmpxchg16b [{p}]",
                "mov rbx, {new_lo}",
                p = in(reg) p,
                new_lo = inout(reg) new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") lo,
                inout("rdx") hi,
                options(nostack),
            );
        }
        return u128::from(hi) << 64 | u128::from(lo);
    }
    // Hosts without a 16-byte exchange: atomic only against this same function.
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: says the caller.
    unsafe {
        let old = p.read();
        if old == expected {
            p.write(new);
        }
        old
    }
}

// ---- ENTER, BOUND -------------------------------------------------------------------------------------------------------

/// PAUSE: on a machine that runs its processors in turn, the next one has its turn.
pub fn pause(v: &mut Vcpu) -> Helped {
    if v.vmx.non_root {
        intercept::pause(v)?;
    }
    v.pause();
    Ok(0)
}

/// ENTER (SDM Vol 2A).
pub fn enter(v: &mut Vcpu, frame: u64, level: u64, log2: u64) -> Helped {
    let bytes = 1u32 << log2.clamp(1, 3);
    let level = level & 31;
    let mut stack = Stack::current(&v.state);
    let bp = v.state.gpr[RBP];
    stack.push(v, bytes, bp)?;
    let frame_pointer = stack.sp;
    if level > 0 {
        let mut display = stack;
        display.sp = bp;
        for _ in 1..level {
            display.sp = display.moved(0u64.wrapping_sub(u64::from(bytes)));
            let value = display.peek(v, 0, bytes)?;
            stack.push(v, bytes, value)?;
        }
        stack.push(v, bytes, frame_pointer)?;
    }
    stack.sp = stack.moved(0u64.wrapping_sub(frame));
    stack.check_write(v, bytes)?;
    put(v, RBP, log2.clamp(1, 3), frame_pointer);
    stack.commit(&mut v.state);
    Ok(0)
}

/// BOUND.
pub fn bound(v: &mut Vcpu, index: u64, la: u64, log2: u64) -> Helped {
    let bytes = 1u32 << log2.clamp(1, 2);
    let signed = |x: u64| if bytes == 2 { i64::from(x as i16) } else { i64::from(x as i32) };
    let lower = signed(v.read(LinearAddr(la), bytes, MemAs::Cpl)?);
    let upper = signed(v.read(LinearAddr(la.wrapping_add(u64::from(bytes))), bytes, MemAs::Cpl)?);
    let index = signed(index);
    if index < lower || index > upper {
        return Err(Exception::new(Vector::BoundRange).into());
    }
    Ok(0)
}

/// #AC when `la` is not aligned for an access of `bytes`.
pub fn align_check(la: u64, bytes: u64) -> Helped {
    let n = bytes.max(1).next_power_of_two();
    if la & (n - 1) != 0 { Err(Exception::with_error(Vector::AlignmentCheck, 0).into()) } else { Ok(0) }
}

// ---- ports --------------------------------------------------------------------------------------------------------------

/// Whether the program may access the port (SDM Vol 1, "I/O Privilege Level" and "I/O Permission Bit Map").
pub(super) fn check_io(v: &mut Vcpu, port: u16, bytes: u32) -> Result<(), Trap> {
    let s = &v.state;
    if !is_v86(s) && (!is_protected(s) || s.cpl <= iopl(s)) {
        return Ok(());
    }
    let tss = s.seg[TR];
    if tss.attr & (attr::UNUSABLE | 8) != 8 {
        return Err(GP0);
    }
    let map = read_tss(v, &tss, 102, 2, GP0)? as u32;
    let bits = read_tss(v, &tss, map + u32::from(port >> 3), 2, GP0)?;
    let wanted = (1u64 << bytes) - 1;
    if bits >> (port & 7) & wanted != 0 { Err(GP0) } else { Ok(()) }
}

/// IN.
pub fn port_in(v: &mut Vcpu, port: u64, bytes: u64) -> Helped {
    check_io(v, port as u16, bytes as u32 & 7)?;
    if v.vmx.non_root {
        intercept::io(v, port as u16, bytes as u32 & 7, true)?;
    }
    Ok(u64::from(v.io_read(port as u16, bytes as u8)))
}

/// OUT.
pub fn port_out(v: &mut Vcpu, port: u64, bytes: u64, value: u64) -> Helped {
    check_io(v, port as u16, bytes as u32 & 7)?;
    if v.vmx.non_root {
        intercept::io(v, port as u16, bytes as u32 & 7, false)?;
    }
    let raises_smi = port as u16 == crate::platform::smi::COMMAND_PORT;
    if raises_smi && v.in_helper && !v.jit.alone {
        // The SMI comes right after this instruction.
        return Err(Trap::Restart);
    }
    v.io_write(port as u16, bytes as u8, value as u32);
    if raises_smi {
        super::smm::note_port(v, port as u16, bytes as u8);
    }
    Ok(0)
}

// ---- flags --------------------------------------------------------------------------------------------------------------

/// POPF: sets what the privilege level lets it set.
pub fn popf(v: &mut Vcpu, value: u64, log2: u64) -> Helped {
    let s = &mut v.state;
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    let mut image = value;
    if is_v86(s) && iopl(s) != 3 {
        if s.cr4 & cr4::VME == 0 || log2 != 1 {
            return Err(GP0);
        }
        let wants_if = value & rflags::IF != 0;
        if (wants_if && s.rflags_sys & rflags::VIP != 0) || value & rflags::TF != 0 {
            return Err(GP0);
        }
        image = value & !rflags::VIF | if wants_if { rflags::VIF } else { 0 };
        mask |= rflags::VIF;
    } else {
        if s.cpl <= iopl(s) {
            mask |= rflags::IF;
        }
        if s.cpl == 0 {
            mask |= rflags::IOPL;
        }
        if log2 != 1 {
            mask |= rflags::AC | rflags::ID;
        }
    }
    let old = s.rflags_sys;
    merge_flags(s, image, mask);
    let changed = old ^ s.rflags_sys;
    if changed & (rflags::TF | rflags::AC | rflags::VIF) != 0 {
        s.attention.store(-1, Ordering::Relaxed);
    }
    if changed & s.rflags_sys & rflags::IF != 0 {
        interrupts_enabled(v);
    }
    Ok(0)
}

/// RFLAGS.IF was set in the middle of translated code: the next block does not begin before the dispatcher has seen what that lets
/// happen.
fn interrupts_enabled(v: &mut Vcpu) {
    if v.vmx.non_root || v.shared.is_due(v.index) {
        v.state.attention.store(-1, Ordering::Relaxed);
    }
}

/// PUSHF: the image to push.
pub fn pushf(v: &mut Vcpu, log2: u64) -> Helped {
    let s = &v.state;
    let image = s.rflags() & !(rflags::RF | rflags::VM);
    if is_v86(s) && iopl(s) != 3 {
        if s.cr4 & cr4::VME == 0 || log2 != 1 {
            return Err(GP0);
        }
        let virtual_if = if image & rflags::VIF != 0 { rflags::IF } else { 0 };
        return Ok(image & !rflags::IF | rflags::IOPL | virtual_if);
    }
    Ok(image)
}

/// Which interrupt flag CLI and STI may change.
fn interrupt_flag(v: &Vcpu) -> Result<u64, Trap> {
    let s = &v.state;
    if s.cpl <= iopl(s) || !(is_protected(s) || is_v86(s)) {
        return Ok(rflags::IF);
    }
    let virtual_allowed = if is_v86(s) { s.cr4 & cr4::VME != 0 } else { s.cr4 & cr4::PVI != 0 && s.cpl == 3 };
    if virtual_allowed { Ok(rflags::VIF) } else { Err(GP0) }
}

/// CLI.
pub fn cli(v: &mut Vcpu) -> Helped {
    v.state.rflags_sys &= !interrupt_flag(v)?;
    Ok(0)
}

/// STI: the next instruction still runs with interrupts held off. `covers_next`: it is the last of the same block, so that they
/// are whatever this does.
pub fn sti(v: &mut Vcpu, covers_next: bool) -> Helped {
    let flag = interrupt_flag(v)?;
    let s = &mut v.state;
    if flag == rflags::VIF && s.rflags_sys & rflags::VIP != 0 {
        return Err(GP0);
    }
    let begins = flag == rflags::IF && s.rflags_sys & rflags::IF == 0;
    s.rflags_sys |= flag;
    if flag == rflags::VIF {
        s.attention.store(-1, Ordering::Relaxed);
    }
    if begins && covers_next {
        // For a VM exit of that instruction.
        v.vmx.shadow |= 1;
        interrupts_enabled(v);
    } else if begins {
        s.shadow |= 1;
    }
    Ok(0)
}

/// CLAC and STAC.
pub fn set_ac(v: &mut Vcpu, set: bool) -> Helped {
    if v.state.cpl != 0 || is_v86(&v.state) {
        return Err(UD);
    }
    if set {
        v.state.rflags_sys |= rflags::AC;
    } else {
        v.state.rflags_sys &= !rflags::AC;
    }
    Ok(0)
}

/// HLT.
pub fn hlt(v: &mut Vcpu) -> Helped {
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        intercept::hlt(v)?;
    }
    v.state.halted = 1;
    Ok(0)
}

// ---- tables -------------------------------------------------------------------------------------------------------------

/// LGDT and LIDT; `base_bytes` is 3, 4 or 8.
pub fn load_table(v: &mut Vcpu, la: u64, idt: bool, base_bytes: u64) -> Helped {
    if v.state.cpl != 0 || is_v86(&v.state) {
        return Err(GP0);
    }
    if v.vmx.non_root {
        intercept::gdtr_idtr(v)?;
    }
    let limit = v.read(LinearAddr(la), 2, MemAs::Cpl)?;
    let bytes = if base_bytes == 8 { 8 } else { 4 };
    let mut base = v.read(LinearAddr(la.wrapping_add(2)), bytes, MemAs::Cpl)?;
    if base_bytes == 3 {
        base &= 0xff_ffff;
    }
    if base_bytes == 8 && !is_canonical_base(v, base) {
        return Err(GP0);
    }
    let table = twofold_arch::state::Table { base, limit };
    if idt {
        v.state.idtr = table;
    } else {
        v.state.gdtr = table;
    }
    Ok(0)
}

/// UMIP: system-table reads are for CPL 0.
fn check_umip(v: &Vcpu) -> Result<(), Trap> {
    if v.state.cr4 & cr4::UMIP != 0 && v.state.cpl > 0 { Err(GP0) } else { Ok(()) }
}

/// SGDT and SIDT; `base_bytes` is 4 or 8.
pub fn store_table(v: &mut Vcpu, la: u64, idt: bool, base_bytes: u64) -> Helped {
    check_umip(v)?;
    if v.vmx.non_root {
        intercept::gdtr_idtr(v)?;
    }
    let table = if idt { v.state.idtr } else { v.state.gdtr };
    let mut image = [0; 10];
    image[..2].copy_from_slice(&(table.limit as u16).to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let bytes = if base_bytes == 8 { 10 } else { 6 };
    v.write_bytes(LinearAddr(la), &image[..bytes], MemAs::Cpl)?;
    Ok(0)
}

/// SLDT, STR, SMSW by `what` 0..=2: the value.
pub fn store_system(v: &mut Vcpu, what: u64) -> Helped {
    if what < 2 && !is_protected(&v.state) {
        return Err(UD);
    }
    check_umip(v)?;
    if v.vmx.non_root {
        if what == 2 {
            return Ok(intercept::visible_cr0(v));
        }
        intercept::ldtr_tr(v)?;
    }
    Ok(match what {
        0 => u64::from(v.state.seg[6].selector),
        1 => u64::from(v.state.seg[TR].selector),
        _ => v.state.cr0,
    })
}

// ---- debug registers ------------------------------------------------------------------------------------------------------

/// The register a number names: 4 and 5 are 6 and 7 unless CR4.DE.
fn debug_register(v: &mut Vcpu, number: u64, read: bool) -> Result<usize, Trap> {
    let named = number;
    let number = number as usize & 15;
    let number = match number {
        0..=3 | 6 | 7 => number,
        4 | 5 if v.state.cr4 & cr4::DE == 0 => number + 2,
        _ => return Err(UD),
    };
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        intercept::mov_dr(v, named, read)?;
    }
    if v.state.dr[7] & 1 << 13 != 0 {
        return Err(Exception { cr2: dr6::BD, ..Exception::new(Vector::Debug) }.into());
    }
    Ok(number)
}

/// MOV from DRn.
pub fn read_dr(v: &mut Vcpu, number: u64) -> Helped {
    let n = debug_register(v, number, true)?;
    Ok(v.state.dr[n])
}

/// MOV to DRn.
pub fn write_dr(v: &mut Vcpu, number: u64, value: u64) -> Helped {
    let n = debug_register(v, number, false)?;
    if n >= 6 && value >> 32 != 0 {
        return Err(GP0);
    }
    v.state.dr[n] = match n {
        6 => value & 0xe00f | dr6::FIXED1,
        7 => value & 0xffff_2fff | 1 << 10,
        _ => value,
    };
    Ok(0)
}

// ---- time and identification ------------------------------------------------------------------------------------------------

fn check_tsd(v: &Vcpu) -> Result<(), Trap> {
    if v.state.cr4 & cr4::TSD != 0 && v.state.cpl > 0 { Err(GP0) } else { Ok(()) }
}

/// RDTSC.
pub fn rdtsc(v: &mut Vcpu) -> Helped {
    check_tsd(v)?;
    if v.vmx.non_root {
        intercept::rdtsc(v, ExitReason::Rdtsc)?;
    }
    let tsc = intercept::tsc(v);
    intercept::timer_first(v)?;
    super::control::set_edx_eax(v, tsc);
    Ok(tsc)
}

/// RDTSCP.
pub fn rdtscp(v: &mut Vcpu) -> Helped {
    if v.vmx.non_root {
        intercept::rdtscp_exists(v)?;
    }
    check_tsd(v)?;
    if v.vmx.non_root {
        intercept::rdtsc(v, ExitReason::Rdtscp)?;
    }
    let tsc = intercept::tsc(v);
    intercept::timer_first(v)?;
    super::control::set_edx_eax(v, tsc);
    v.state.gpr[RCX] = v.state.msrs.tsc_aux & 0xffff_ffff;
    Ok(tsc)
}

/// RDPMC: there are no counters.
pub fn rdpmc(v: &mut Vcpu) -> Helped {
    if v.state.cr4 & cr4::PCE == 0 && v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        intercept::rdpmc(v)?;
    }
    Err(GP0)
}

/// RDPID.
pub fn rdpid(v: &mut Vcpu) -> Helped {
    if v.vmx.non_root {
        intercept::rdtscp_exists(v)?;
    }
    Ok(v.state.msrs.tsc_aux)
}

/// CPUID.
pub fn cpuid(v: &mut Vcpu) -> Helped {
    if v.vmx.non_root {
        intercept::always(v, ExitReason::Cpuid)?;
    }
    let s = &v.state;
    let state = CpuidState { apic_id: v.index as u32, cpus: v.cold.cpus, cr4: s.cr4, xcr0: s.xcr0 };
    let (leaf, subleaf) = (s.gpr[RAX] as u32, s.gpr[RCX] as u32);
    let [a, b, c, mut d] = v.model.cpuid(leaf, subleaf, &state);
    if leaf == 1 {
        // A local APIC that IA32_APIC_BASE disables is as good as absent.
        if v.platform().is_apic_disabled(v.index) {
            d &= !(1 << 9);
        }
        v.cold.bios_sign_id = super::msr::MICROCODE_REVISION << 32;
    }
    let g = &mut v.state.gpr;
    (g[RAX], g[RBX], g[RCX], g[RDX]) = (u64::from(a), u64::from(b), u64::from(c), u64::from(d));
    Ok(0)
}

// ---- the rest ---------------------------------------------------------------------------------------------------------------

/// INVD and WBINVD: there are no caches to write back.
pub fn cache_control(v: &mut Vcpu, what: u64) -> Helped {
    if v.state.cpl != 0 {
        return Err(GP0);
    }
    if v.vmx.non_root {
        if what == 0 {
            intercept::always(v, ExitReason::Invd)?;
        }
        intercept::wbinvd(v)?;
    }
    Ok(0)
}

/// MONITOR.
pub fn monitor(v: &mut Vcpu, la: u64) -> Helped {
    if !v.model.has(Bit::Monitor) || v.state.cpl != 0 {
        return Err(UD);
    }
    if v.vmx.non_root {
        intercept::monitor(v)?;
    }
    if v.state.gpr[RCX] != 0 {
        return Err(GP0);
    }
    v.read(LinearAddr(la), 1, MemAs::Cpl)?;
    v.cold.monitor = Some(la);
    Ok(0)
}

/// MWAIT: may end at any time for any reason, and does at once.
pub fn mwait(v: &mut Vcpu) -> Helped {
    if !v.model.has(Bit::Monitor) || v.state.cpl != 0 {
        return Err(UD);
    }
    if v.vmx.non_root {
        intercept::mwait(v)?;
    }
    v.cold.monitor = None;
    Ok(0)
}
