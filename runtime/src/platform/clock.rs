//! Time as the guest sees it: host nanoseconds since the machine started, and a constant TSC.
//!
//! Place in the pipeline: read by RDTSC and by every timer. Invariants: never goes back; the guest's TSC ticks at exactly
//! [`TSC_HZ`] of the same clock that drives the timers, so a TSC deadline and a nanosecond deadline are the same number.
#![allow(unsafe_code)] // RDTSC has no safe spelling; it reads a counter and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Frequency of the guest's TSC. One tick is one nanosecond, which makes every conversion exact.
pub const TSC_HZ: u64 = 1_000_000_000;
/// CPUID.15H:ECX, the core crystal clock; the local APIC timer counts it (before its divider).
pub const CRYSTAL_HZ: u32 = 25_000_000;
/// CPUID.15H:EAX, denominator of TSC / crystal.
pub const TSC_RATIO_DENOMINATOR: u32 = 1;
/// CPUID.15H:EBX, numerator of TSC / crystal.
pub const TSC_RATIO_NUMERATOR: u32 = (TSC_HZ / CRYSTAL_HZ as u64) as u32;
/// CPUID.16H:EAX, base frequency in MHz.
pub const BASE_MHZ: u32 = (TSC_HZ / 1_000_000) as u32;
/// Nanoseconds a crystal tick takes.
pub const CRYSTAL_NS: u64 = 1_000_000_000 / CRYSTAL_HZ as u64;

/// A clock; clones read the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    /// Host TSC, scaled: `(rdtsc - base) * mult >> 32`.
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    HostTsc { base: u64, mult: u64 },
    /// The operating system's monotonic clock.
    Monotonic(Instant),
    /// Set by hand: tests, and time that counts instructions.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// The host's clock, starting at 0 now. Takes about a millisecond to calibrate where the host has an invariant TSC.
    #[must_use]
    pub fn host() -> Self {
        #[cfg(all(target_arch = "x86_64", not(portable_host)))]
        if let Some(source) = host_tsc::calibrate() {
            return Self(source);
        }
        Self(Source::Monotonic(Instant::now()))
    }
    /// A clock that stands still until [`Clock::set`] or [`Clock::advance`].
    #[must_use]
    pub fn manual() -> Self {
        Self(Source::Manual(Arc::new(AtomicU64::new(0))))
    }
    /// Nanoseconds since the clock was made.
    #[must_use]
    #[inline]
    pub fn now_ns(&self) -> u64 {
        match &self.0 {
            #[cfg(all(target_arch = "x86_64", not(portable_host)))]
            Source::HostTsc { base, mult } => host_tsc::now(*base, *mult),
            Source::Monotonic(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Source::Manual(ns) => ns.load(Ordering::Relaxed),
        }
    }
    /// The guest's TSC, before a vCPU's offset.
    #[must_use]
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.now_ns()
    }
    /// Moves a manual clock on by `ns`; other clocks go by themselves.
    pub fn advance(&self, ns: u64) {
        if let Source::Manual(now) = &self.0 {
            now.fetch_add(ns, Ordering::Relaxed);
        }
    }
    /// Sets a manual clock to `ns`, never back.
    pub fn set(&self, ns: u64) {
        if let Source::Manual(now) = &self.0 {
            now.fetch_max(ns, Ordering::Relaxed);
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
mod host_tsc {
    use super::Source;
    use core::arch::x86_64::{__cpuid, _rdtsc};
    use std::time::{Duration, Instant};

    fn rdtsc() -> u64 {
        // SAFETY: RDTSC only reads a counter; every x86-64 host we run on allows it in user mode.
        unsafe { _rdtsc() }
    }

    pub fn now(base: u64, mult: u64) -> u64 {
        // Another core's TSC may read a hair less than the base did on this one.
        let ticks = rdtsc().saturating_sub(base);
        ((u128::from(ticks) * u128::from(mult)) >> 32) as u64
    }

    fn is_invariant() -> bool {
        __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
    }

    /// The TSC and the monotonic clock at one moment: the tightest of a few tries.
    fn pair() -> (u64, Instant) {
        let mut best = (u64::MAX, 0, Instant::now());
        for _ in 0..8 {
            let before = rdtsc();
            let at = Instant::now();
            let after = rdtsc();
            let gap = after.wrapping_sub(before);
            if gap < best.0 {
                best = (gap, before + gap / 2, at);
            }
        }
        (best.1, best.2)
    }

    pub fn calibrate() -> Option<Source> {
        if !is_invariant() {
            return None;
        }
        let (base, start) = pair();
        while start.elapsed() < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        let (end, stop) = pair();
        let ns = stop.duration_since(start).as_nanos();
        let ticks = u128::from(end.checked_sub(base)?);
        let mult = u64::try_from((ns << 32).checked_div(ticks)?).ok()?;
        // Below 100 MHz or above 100 GHz something is wrong with this counter.
        let plausible = 1u64 << 32;
        (mult < plausible * 10 && mult > plausible / 100).then_some(Source::HostTsc { base, mult })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_clock_follows_the_monotonic_clock() {
        let clock = Clock::host();
        let (t0, i0) = (clock.now_ns(), Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ours = clock.now_ns() - t0;
        let host = i0.elapsed().as_nanos() as u64;
        assert!(ours.abs_diff(host) < host / 100, "ours {ours} ns, host {host} ns");
    }

    #[test]
    fn host_clock_never_goes_back() {
        let clock = Clock::host();
        let mut last = 0;
        for _ in 0..10_000 {
            let now = clock.now_ns();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn advertised_ratio_is_exact() {
        assert_eq!(u64::from(CRYSTAL_HZ) * u64::from(TSC_RATIO_NUMERATOR) / u64::from(TSC_RATIO_DENOMINATOR), TSC_HZ);
    }
}
