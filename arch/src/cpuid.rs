//! CPU features that decide whether an instruction exists.

/// A feature the front end asks about before it translates an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Feature {
    X87,
    Mmx,
    Sse,
    Sse2,
    Sse3,
    Ssse3,
    Sse41,
    Sse42,
    Cmov,
    Cx8,
    Cx16,
    Popcnt,
    Lzcnt,
    Bmi1,
    Bmi2,
    Adx,
    Movbe,
    Aes,
    Pclmulqdq,
    Sha,
    Fxsr,
    Xsave,
    Xsaveopt,
    Xsavec,
    Xsaves,
    Rdrand,
    Rdseed,
    Fsgsbase,
    Rdtscp,
    Rdpid,
    Clflush,
    Clflushopt,
    Clwb,
    LongMode,
    Syscall,
    Sysenter,
    Nx,
    LahfLm,
    Invpcid,
    Smap,
    Smep,
    Umip,
    Pku,
    Monitor,
    Avx,
    Avx2,
    Fma,
    F16c,
    Gfni,
    Vaes,
    Vpclmulqdq,
    Prefetchw,
    Serialize,
    Movdiri,
    Movdir64b,
    Vmx,
    Waitpkg,
    Fsrm,
    Tsc,
    Msr,
    /// The x87 code and data selectors read as 0.
    ZeroFcsFds,
}

/// The set of features a CPU model has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(pub u128);

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);
    /// Every feature there is a name for; tests use it.
    pub const ALL: Features = Features(u128::MAX);
    /// Whether `f` is in the set.
    #[must_use]
    pub const fn has(self, f: Feature) -> bool {
        self.0 >> f as u8 & 1 != 0
    }
    /// Whether all of `other` are in the set.
    #[must_use]
    pub const fn has_all(self, other: Features) -> bool {
        other.0 & !self.0 == 0
    }
    /// The set with `f`.
    #[must_use]
    pub const fn with(self, f: Feature) -> Self {
        Self(self.0 | 1 << f as u8)
    }
    /// The set without `f`.
    #[must_use]
    pub const fn without(self, f: Feature) -> Self {
        Self(self.0 & !(1 << f as u8))
    }
}
