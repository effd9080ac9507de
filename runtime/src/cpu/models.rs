//! The named CPU models: what each processor is called, what it has, its caches and how far its CPUID goes.
//!
//! Place in the pipeline: [`super::cpuid`] builds a model from a row of [`MODELS`]. A processor has everything that its
//! generation or an earlier one brought ([`SINCE`], [`VMX_SINCE`]), less what the row takes away. What twofold does not
//! implement is not there: no AVX-512, TSX, MPX, SGX, performance monitoring, protection keys unless asked for.

use std::fmt;

use super::cpuid::Bit::{self, *};

/// Generations of Intel processors, oldest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum Generation {
    PentiumIII,
    /// No processor of Intel's: the baseline of x86-64.
    X86_64,
    Core,
    Nehalem,
    Westmere,
    SandyBridge,
    IvyBridge,
    Haswell,
    Broadwell,
    Skylake,
    IceLake,
    /// Everything twofold implements.
    Max,
}

/// A cache as leaf 4 has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    /// 1 data, 2 instructions, 3 both.
    pub kind: u8,
    /// Its level.
    pub level: u8,
    /// Number of sets; lines have 64 bytes.
    pub sets: u32,
    /// Number of ways.
    pub ways: u8,
    /// All processors share it.
    pub shared: bool,
}

impl Cache {
    /// Its size in KiB.
    #[must_use]
    pub const fn kib(&self) -> u32 {
        self.sets * self.ways as u32 * 64 / 1024
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            1 => "d",
            2 => "i",
            _ => "",
        };
        write!(f, "L{}{kind} {} KiB", self.level, self.kib())
    }
}

/// One processor.
#[derive(PartialEq, Eq, Debug)]
pub struct Model {
    /// Its name on the command line.
    pub name: &'static str,
    /// Other names it goes by there.
    pub aliases: &'static [&'static str],
    /// A line for people.
    pub about: &'static str,
    /// Its brand string; at most 47 bytes.
    pub brand: &'static str,
    /// Its generation.
    pub generation: Generation,
    /// Display family, display model, stepping.
    pub signature: (u32, u32, u32),
    /// MAXPHYADDR.
    pub phys_bits: u8,
    /// What its generation has and it has not.
    pub without: &'static [Bit],
    /// The same of VMX features.
    pub without_vmx: &'static [&'static str],
    /// Its caches.
    pub caches: &'static [Cache],
    /// Highest basic and extended leaf.
    pub leaves: (u32, u32),
    /// Leaf 2, for processors that have descriptors there.
    pub descriptors: [u32; 4],
}

/// "Use leaf 4."
const USE_LEAF_4: [u32; 4] = [0x00ff_ff01, 0, 0, 0];

const fn data(level: u8, sets: u32, ways: u8) -> Cache {
    Cache { kind: 1, level, sets, ways, shared: false }
}
const fn code(sets: u32, ways: u8) -> Cache {
    Cache { kind: 2, level: 1, sets, ways, shared: false }
}
const fn own(level: u8, sets: u32, ways: u8) -> Cache {
    Cache { kind: 3, level, sets, ways, shared: false }
}
const fn shared(level: u8, sets: u32, ways: u8) -> Cache {
    Cache { kind: 3, level, sets, ways, shared: true }
}

/// The caches of servers before Skylake.
const SERVER_CACHES: &[Cache] = &[data(1, 64, 8), code(64, 8), own(2, 512, 8), shared(3, 16384, 16)];

const fn server(name: &'static str, about: &'static str, generation: Generation, signature: (u32, u32, u32)) -> Model {
    Model {
        name,
        aliases: &[],
        about,
        brand: "twofold x86-64 processor",
        generation,
        signature,
        phys_bits: 46,
        without: &[],
        without_vmx: &[],
        caches: SERVER_CACHES,
        leaves: (0xd, 0x8000_0008),
        descriptors: USE_LEAF_4,
    }
}

/// APIC virtualization and the like came with servers first, and stayed there.
const CLIENT_VMX: &[&str] = &["vmx-apicv-register", "vmx-apicv-vid", "vmx-posted-intr", "vmx-apicv-x2apic"];

/// All models, the default first.
pub const MODELS: &[Model] = &[
    Model {
        aliases: &["host", "qemu64"],
        caches: &[data(1, 64, 8), code(64, 8), own(2, 1024, 16), shared(3, 16384, 16)],
        leaves: (0x1f, 0x8000_0008),
        ..server(
            "max",
            "every feature twofold implements, with an Ice Lake server's signature",
            Generation::Max,
            (6, 0x6a, 6),
        )
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Icelake)",
        caches: &[data(1, 64, 12), code(64, 8), own(2, 1024, 20), shared(3, 49152, 12)],
        leaves: (0x1f, 0x8000_0008),
        aliases: &["icelake"],
        ..server("icelake-server", "Ice Lake server, 2021, without AVX-512", Generation::IceLake, (6, 0x6a, 6))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Skylake)",
        caches: &[data(1, 64, 8), code(64, 8), own(2, 1024, 16), shared(3, 32768, 11)],
        leaves: (0x16, 0x8000_0008),
        without: &[Umip],
        ..server("skylake-server", "Skylake server, 2017, without AVX-512", Generation::Skylake, (6, 0x55, 4))
    },
    Model {
        brand: "Intel(R) Core(TM) Processor (Skylake)",
        caches: &[data(1, 64, 8), code(64, 8), own(2, 1024, 4), shared(3, 8192, 16)],
        leaves: (0x16, 0x8000_0008),
        phys_bits: 39,
        aliases: &["skylake"],
        without: &[Umip, Clwb, Pku],
        without_vmx: CLIENT_VMX,
        ..server("skylake-client", "Skylake client, 2015", Generation::Skylake, (6, 0x5e, 3))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Broadwell)",
        caches: &[data(1, 64, 8), code(64, 8), own(2, 512, 8), shared(3, 32768, 20)],
        leaves: (0x14, 0x8000_0008),
        ..server("broadwell", "Broadwell server, 2016", Generation::Broadwell, (6, 0x4f, 1))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Haswell)",
        ..server("haswell", "Haswell server, 2014", Generation::Haswell, (6, 0x3f, 2))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Ivy Bridge)",
        ..server("ivybridge", "Ivy Bridge server, 2013", Generation::IvyBridge, (6, 0x3e, 4))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Sandy Bridge)",
        ..server("sandybridge", "Sandy Bridge server, 2012: the first with AVX", Generation::SandyBridge, (6, 0x2d, 7))
    },
    Model {
        brand: "Intel(R) Xeon(R) Processor (Westmere)",
        caches: &[data(1, 64, 8), code(128, 4), own(2, 512, 8), shared(3, 12288, 16)],
        leaves: (0xb, 0x8000_0008),
        phys_bits: 40,
        ..server("westmere", "Westmere, 2010: AES, unrestricted guests", Generation::Westmere, (6, 0x2c, 2))
    },
    Model {
        brand: "Intel(R) Core(TM) Processor (Nehalem)",
        caches: &[data(1, 64, 8), code(128, 4), own(2, 512, 8), shared(3, 8192, 16)],
        leaves: (0xb, 0x8000_0008),
        phys_bits: 36,
        without: &[X2apic],
        ..server("nehalem", "Nehalem, 2008: SSE4.2, EPT and VPID", Generation::Nehalem, (6, 0x1a, 5))
    },
    Model {
        brand: "Intel(R) Core(TM)2 Processor (Conroe)",
        caches: &[data(1, 64, 8), code(64, 8), shared(2, 4096, 16)],
        leaves: (0xa, 0x8000_0008),
        phys_bits: 36,
        aliases: &["core2duo"],
        ..server("conroe", "Core 2, 2006: SSSE3, VMX without EPT", Generation::Core, (6, 0x0f, 6))
    },
    Model {
        caches: &[data(1, 64, 8), code(64, 8), own(2, 1024, 16), shared(3, 16384, 16)],
        leaves: (0x1f, 0x8000_0008),
        ..server(
            "base",
            "x86-64 as it was at first: SSE2, NX, no instruction that came later",
            Generation::X86_64,
            (6, 0x6a, 6),
        )
    },
    Model {
        // Its brand is number 2 of a table in the manual, not a string.
        brand: "",
        caches: &[],
        leaves: (2, 0),
        phys_bits: 36,
        aliases: &["pentiumiii", "coppermine"],
        descriptors: [0x0302_0101, 0, 0, 0x0c04_0882],
        ..server("pentium3", "Pentium III, 2000: 32 bits, SSE", Generation::PentiumIII, (6, 0x08, 6))
    },
];

/// The CPUID bits each generation brought.
pub const SINCE: &[(Generation, &[Bit])] = &[
    (
        Generation::PentiumIII,
        &[
            Fpu, Vme, De, Pse, Tsc, Msr, Pae, Mce, Cx8, Apic, Sep, Mtrr, Pge, Mca, Cmov, Pat, Pse36, Mmx, Fxsr, Sse,
            Hypervisor,
        ],
    ),
    (
        Generation::X86_64,
        // The last five are no instructions, but without them a guest calibrates timers and defends itself in vain.
        &[Clflush, Sse2, Ss, Syscall, Nx, Lm, Arat, InvariantTsc, SpecCtrl, ArchCapabilities, TscDeadline],
    ),
    (Generation::Core, &[Pni, Ssse3, Cx16, LahfLm, Vmx]),
    (Generation::Nehalem, &[Sse41, Sse42, Popcnt, Rdtscp, X2apic, InvariantTsc]),
    (Generation::Westmere, &[Aes, Pclmulqdq, Pcid, Pdpe1gb, Arat]),
    (Generation::SandyBridge, &[Xsave, Xsaveopt, Avx, TscDeadline]),
    (Generation::IvyBridge, &[Rdrand, F16c, Fsgsbase, Smep, Erms]),
    (Generation::Haswell, &[Fma, Avx2, Bmi1, Bmi2, Movbe, Lzcnt, Invpcid, TscAdjust, ZeroFcsFds, SpecCtrl, FlushL1d]),
    (Generation::Broadwell, &[Adx, Rdseed, Smap, Prefetchw]),
    (Generation::Skylake, &[Clflushopt, Clwb, Xsavec, Xgetbv1, Xsaves, Umip, Pku]),
    (Generation::IceLake, &[Sha, Gfni, Vaes, Vpclmulqdq, La57, Rdpid, Fsrm, ArchCapabilities]),
    (Generation::Max, &[Movdiri, Serialize, BhiCtrl]),
];

/// Bits of the baseline that named processors get in their own time, not with the baseline.
pub const BASELINE_ONLY: &[Bit] = &[Arat, InvariantTsc, SpecCtrl, ArchCapabilities, TscDeadline];

/// The VMX features that came after VMX itself.
pub const VMX_SINCE: &[(Generation, &[&str])] = &[
    (
        Generation::Nehalem,
        &[
            "vmx-secondary-ctls",
            "vmx-apicv-xapic",
            "vmx-ept",
            "vmx-desc-exit",
            "vmx-rdtscp-exit",
            "vmx-vpid",
            "vmx-wbinvd-exit",
            "vmx-vnmi",
            "vmx-vnmi-pending",
            "vmx-preemption-timer",
            "vmx-mtf",
            "vmx-true-ctls",
            "vmx-apicv-x2apic",
            "vmx-exit-save-preemption-timer",
            "vmx-exit-save-efer",
            "vmx-exit-load-efer",
            "vmx-entry-load-efer",
            "vmx-exit-save-pat",
            "vmx-exit-load-pat",
            "vmx-entry-load-pat",
        ],
    ),
    (Generation::Westmere, &["vmx-unrestricted-guest", "vmx-ple", "vmx-ept-1gb", "vmx-store-lma"]),
    (Generation::IvyBridge, &["vmx-rdrand-exit", "vmx-apicv-register", "vmx-apicv-vid", "vmx-posted-intr"]),
    (
        Generation::Haswell,
        &[
            "vmx-invpcid-exit",
            "vmx-vmfunc",
            "vmx-eptp-switching",
            "vmx-shadow-vmcs",
            "vmx-eptad",
            "vmx-vmwrite-vmexit-fields",
        ],
    ),
    (Generation::Broadwell, &["vmx-rdseed-exit", "vmx-pml", "vmx-ept-violation-ve"]),
    (
        Generation::Skylake,
        &["vmx-xsaves", "vmx-mbec", "vmx-tsc-scaling", "vmx-zero-len-inject", "vmx-ept-advanced-exitinfo"],
    ),
    (Generation::IceLake, &["vmx-page-walk-5"]),
];

/// Features that processors have and twofold does not: named so that asking for one is answered well.
pub const NOT_IMPLEMENTED: &[&str] = &[
    "3dnow",
    "3dnowext",
    "acpi",
    "amx-bf16",
    "amx-int8",
    "amx-tile",
    "avx-vnni",
    "avx512-4fmaps",
    "avx512-4vnniw",
    "avx512-bf16",
    "avx512-bitalg",
    "avx512-fp16",
    "avx512-vbmi",
    "avx512-vbmi2",
    "avx512-vnni",
    "avx512-vp2intersect",
    "avx512-vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vl",
    "cet-ibt",
    "cet-ss",
    "cldemote",
    "ds",
    "ds-cpl",
    "dtes64",
    "enqcmd",
    "est",
    "fred",
    "hle",
    "ht",
    "ia64",
    "intel-pt",
    "invlpgb",
    "keylocker",
    "lam",
    "lkgs",
    "mpx",
    "osxsave",
    "ospke",
    "pbe",
    "pconfig",
    "pdcm",
    "pks",
    "pmu",
    "pn",
    "rtm",
    "sgx",
    "sgx-lc",
    "shstk",
    "smx",
    "sse4a",
    "svm",
    "tm",
    "tm2",
    "tsxldtrk",
    "uintr",
    "waitpkg",
    "wbnoinvd",
    "xop",
    "xtpr",
];
