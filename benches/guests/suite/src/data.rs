//! Dependent accesses at random places: one a page for TLB misses, one a cache line for footprints.
#![allow(unsafe_code)] // the mapping and unchecked accesses in it

/// Memory that is all there: written once a page, without huge pages of the guest kernel.
pub struct Memory {
    start: *mut u8,
    length: usize,
}

impl Memory {
    pub fn new(length: usize) -> Option<Self> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping wherever the kernel likes, written within its length.
        unsafe {
            let p = libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0);
            if p == libc::MAP_FAILED {
                return None;
            }
            let start: *mut u8 = p.cast();
            libc::madvise(p, length, libc::MADV_NOHUGEPAGE);
            (0..length).step_by(4096).for_each(|at| start.add(at).write_volatile(0));
            Some(Self { start, length })
        }
    }

    /// `count` loads, each address depending on the load before, at every `1 << step` bytes of the first `length` (powers
    /// of two) in the order of a congruential generator, which comes to each once a period.
    pub fn chase(&self, length: usize, step: u32, count: u64) -> u64 {
        assert!(length.is_power_of_two() && length <= self.length && length >> step > 0);
        let mask = (length >> step) - 1;
        let (mut at, mut sum) = (0usize, 0u64);
        for _ in 0..count {
            // Pages are read at different lines, so that not all of them meet in the same sets of the host's caches.
            let spread = if step >= 12 { (at & 63) << 6 } else { 0 };
            // SAFETY: `at` is at most `mask`.
            let loaded = unsafe { self.start.add((at << step) + spread).read_volatile() };
            at = at.wrapping_mul(0x5851_f42d).wrapping_add(0x3619).wrapping_add(usize::from(loaded)) & mask;
            sum = sum.wrapping_add(at as u64);
        }
        sum
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

thread_local! {
    /// The mapping of the last chase: the page faults of making it belong to the cold run.
    static LAST: std::cell::RefCell<Option<Memory>> = const { std::cell::RefCell::new(None) };
}

fn chase(length: usize, units: u64) -> Option<u64> {
    LAST.with_borrow_mut(|last| {
        if last.as_ref().is_none_or(|m| m.length != length) {
            *last = None;
            *last = Some(Memory::new(length)?);
        }
        Some(last.as_ref()?.chase(length, 12, units * 10_000))
    })
}

pub fn chase_64k(units: u64) -> Option<u64> {
    chase(64 << 10, units)
}

pub fn chase_1m(units: u64) -> Option<u64> {
    chase(1 << 20, units)
}

pub fn chase_8m(units: u64) -> Option<u64> {
    chase(8 << 20, units)
}

pub fn chase_64m(units: u64) -> Option<u64> {
    chase(64 << 20, units)
}

pub fn chase_256m(units: u64) -> Option<u64> {
    chase(256 << 20, units)
}
