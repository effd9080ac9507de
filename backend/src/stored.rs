//! Compiled code as bytes that outlive the process: how a [`CompiledTb`] is written, and read back with every offset checked.
//!
//! Place in the pipeline: beside `compiler`, for a cache that keeps its results. Code refers to thunks by number and to helpers by
//! their places in a table, so bytes mean something to the very same build on a host with the same instructions only:
//! [`host_instructions`] is for the cache to compare, the build is its own affair.
#![cfg_attr(all(target_arch = "x86_64", not(portable_host)), allow(unsafe_code))] // asks CPUID

use twofold_arch::CodeSize;

use crate::code::MAX_TB_BYTES;
use crate::compiler::{CompiledSlot, CompiledTb};
use crate::thunk::{THUNKS, Thunk};

/// What of the host decides which code is made: the processor's signature and features.
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
#[must_use]
pub fn host_instructions() -> String {
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    // The highest leaf comes first; leaf 1 has this processor's own number in EBX, so that is left out.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 has CPUID, and a leaf that is not there gives something harmless.
    let (one, seven, more, extended) =
        unsafe { (__cpuid_count(1, 0), __cpuid_count(7, 0), __cpuid_count(7, 1), __cpuid_count(0x8000_0001, 0)) };
    #[target_feature(enable = "xsave")]
    fn state_components() -> u64 {
        // SAFETY: XCR0 exists where OSXSAVE is set, which the caller has looked at.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: as said.
    let xcr0 = if one.ecx >> 27 & 1 != 0 { unsafe { state_components() } } else { 0 };
    let words = [one.eax, one.ecx, one.edx, seven.ebx, seven.ecx, seven.edx, more.eax, extended.ecx, extended.edx];
    let words: Vec<String> = words.iter().map(|w| format!("{w:08x}")).collect();
    format!("x86-64 {} {xcr0:x}", words.join(" "))
}

/// What of the host decides which code is made: nothing, as none is.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
#[must_use]
pub fn host_instructions() -> String {
    String::from("none")
}

/// Takes little-endian numbers off the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
    fn u8(&mut self) -> Option<u8> {
        Some(self.bytes(1)?[0])
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }
    fn list<T>(&mut self, n: u16, mut one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        (0..n).map(|_| one(self)).collect()
    }
}

fn count(n: usize) -> Option<[u8; 2]> {
    u16::try_from(n).ok().map(u16::to_le_bytes)
}

impl CompiledTb {
    /// Appends this block to `out`; `false` and nothing when it is a region's code, or has more of something than there is room
    /// to count.
    #[must_use]
    pub fn store(&self, out: &mut Vec<u8>) -> bool {
        let counts = [self.calls.len(), self.slots.len(), self.returns.len()].map(count);
        let [Some(calls), Some(slots), Some(returns)] = counts else { return false };
        if self.first_slot != 0 || !self.sites.is_empty() {
            return false;
        }
        out.extend((self.code.len() as u32).to_le_bytes());
        out.extend(self.entry.to_le_bytes());
        out.extend(self.charged.to_le_bytes());
        out.extend([self.size as u8, u8::from(self.fixed) | u8::from(self.framed) << 1]);
        [calls, slots, returns].iter().for_each(|n| out.extend(n));
        for &(at, thunk) in &self.calls {
            out.extend(at.to_le_bytes());
            out.extend((thunk.index() as u16).to_le_bytes());
        }
        for slot in &self.slots {
            out.extend(slot.at.to_le_bytes());
            out.extend(slot.off.to_le_bytes());
        }
        for &(at, insn) in &self.returns {
            out.extend(at.to_le_bytes());
            out.extend(insn.to_le_bytes());
        }
        out.extend(&self.code);
        true
    }

    /// Reads what [`CompiledTb::store`] wrote. `None` when the bytes are anything else: what comes back can be installed
    /// whatever they were, as every place that installation writes to lies in the code.
    #[must_use]
    pub fn load(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        let (len, entry) = (r.u32()?, r.u32()?);
        let (charged, size, bits) = (r.u16()?, r.u8()?, r.u8()?);
        let counts = [r.u16()?, r.u16()?, r.u16()?];
        let size = match size {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            2 => CodeSize::Bits64,
            _ => return None,
        };
        let field = |at: u32| at.checked_add(4).is_some_and(|end| end <= len);
        let calls = r.list(counts[0], |r| {
            let (at, thunk) = (r.u32()?, usize::from(r.u16()?));
            (field(at) && thunk < usize::from(THUNKS)).then(|| (at, Thunk::from_index(thunk)))
        })?;
        let slots = r.list(counts[1], |r| {
            let (at, off) = (r.u32()?, r.u16()?);
            field(at).then_some(CompiledSlot { at, off, page: 0 })
        })?;
        let returns = r.list(counts[2], |r| Some((r.u32()?, r.u16()?)))?;
        let code = r.bytes(len as usize)?.to_vec();
        let fits = code.len() + slots.len() * 32 <= MAX_TB_BYTES;
        if !r.0.is_empty() || entry >= len || !fits || !returns.is_sorted() {
            return None;
        }
        let (fixed, framed) = (bits & 1 != 0, bits & 2 != 0);
        let (first_slot, sites, origins) = (0, Vec::new(), Vec::new());
        Some(Self { code, entry, calls, slots, returns, charged, size, fixed, framed, first_slot, sites, origins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> CompiledTb {
        CompiledTb {
            code: vec![0x90; 40],
            entry: 3,
            calls: vec![(4, Thunk::HELPED), (20, Thunk::from_index(usize::from(THUNKS) - 1))],
            slots: vec![CompiledSlot { at: 36, off: 0xffe, page: 0 }],
            returns: vec![(8, 0), (24, 2)],
            charged: 5,
            size: CodeSize::Bits64,
            fixed: true,
            framed: false,
            first_slot: 0,
            sites: Vec::new(),
            origins: Vec::new(),
        }
    }

    #[test]
    fn what_is_stored_comes_back() {
        let mut bytes = Vec::new();
        assert!(block().store(&mut bytes));
        let back = CompiledTb::load(&bytes).expect("well-formed");
        assert_eq!(format!("{back:?}"), format!("{:?}", block()));
    }

    /// Whatever the bytes, nothing outside the code would be written at installation.
    #[test]
    fn damaged_bytes_are_refused_or_harmless() {
        let mut good = Vec::new();
        assert!(block().store(&mut good));
        for n in 0..good.len() {
            assert!(CompiledTb::load(&good[..n]).is_none(), "cut to {n}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[n] ^= 1 << bit;
                if let Some(tb) = CompiledTb::load(&bad) {
                    let len = tb.code.len();
                    assert!((tb.entry as usize) < len);
                    let at = tb.calls.iter().map(|c| c.0).chain(tb.slots.iter().map(|s| s.at));
                    at.for_each(|at| assert!(at as usize + 4 <= len));
                    tb.calls.iter().for_each(|c| assert!(c.1.index() < usize::from(THUNKS)));
                }
            }
        }
        good.push(0);
        assert!(CompiledTb::load(&good).is_none(), "more than a block");
    }

    #[test]
    fn host_instructions_do_not_change() {
        assert_eq!(host_instructions(), host_instructions());
    }
}
