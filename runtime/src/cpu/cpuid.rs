//! CPU models: which features a processor has, what CPUID says about it, and how models are named on the command line.
//!
//! Place in the pipeline: made once from `--cpu`, shared by all processors. The front end asks `features` whether an
//! instruction exists; CPUID, the control-register checks and the capability MSRs ask [`CpuModel::has`]. Invariant: both
//! answers come from the same set of CPUID bits.

use std::fmt::Write as _;

use twofold_arch::control::xcr0;
use twofold_arch::cpuid::{Feature, Features};

use super::models::{self, Cache, Generation, Model};
use crate::fpu::area;
use crate::platform::clock::{BASE_MHZ, CRYSTAL_HZ, TSC_RATIO_DENOMINATOR, TSC_RATIO_NUMERATOR};
use crate::vmx::caps::{self, Caps, RowSet};

/// A register that CPUID fills.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Reg {
    A = 0,
    B = 1,
    C = 2,
    D = 3,
}

/// Where a CPUID bit is: leaf, subleaf, register, bit.
type Place = (u32, u32, Reg, u8);

macro_rules! cpuid_bits {
    ($($variant:ident $name:literal $leaf:literal $sub:literal $reg:ident $bit:literal $([$feature:ident])? $($max:ident)?;)*) => {
        /// A feature bit of CPUID, by the name Linux and QEMU give it.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Bit { $($variant),* }

        struct Row {
            bit: Bit,
            name: &'static str,
            place: Place,
            feature: Option<Feature>,
            in_max: bool,
        }

        const ROWS: &[Row] = &[$(Row {
            bit: Bit::$variant,
            name: $name,
            place: ($leaf, $sub, Reg::$reg, $bit),
            #[allow(unused_mut, unused_assignments)]
            feature: { let mut f = None; $(f = Some(Feature::$feature);)? f },
            #[allow(unused_mut, unused_assignments)]
            in_max: { let mut m = false; $(m = stringify!($max).len() == 3;)? m },
        }),*];
    };
}

// Name, place, the front end's feature, and `max` when the model `max` has it.
cpuid_bits! {
    Fpu "fpu" 1 0 D 0 [X87] max;
    Vme "vme" 1 0 D 1 max;
    De "de" 1 0 D 2 max;
    Pse "pse" 1 0 D 3 max;
    Tsc "tsc" 1 0 D 4 [Tsc] max;
    Msr "msr" 1 0 D 5 [Msr] max;
    Pae "pae" 1 0 D 6 max;
    Mce "mce" 1 0 D 7 max;
    Cx8 "cx8" 1 0 D 8 [Cx8] max;
    Apic "apic" 1 0 D 9 max;
    Sep "sep" 1 0 D 11 [Sysenter] max;
    Mtrr "mtrr" 1 0 D 12 max;
    Pge "pge" 1 0 D 13 max;
    Mca "mca" 1 0 D 14 max;
    Cmov "cmov" 1 0 D 15 [Cmov] max;
    Pat "pat" 1 0 D 16 max;
    Pse36 "pse36" 1 0 D 17 max;
    Clflush "clflush" 1 0 D 19 [Clflush] max;
    Mmx "mmx" 1 0 D 23 [Mmx] max;
    Fxsr "fxsr" 1 0 D 24 [Fxsr] max;
    Sse "sse" 1 0 D 25 [Sse] max;
    Sse2 "sse2" 1 0 D 26 [Sse2] max;
    Ss "ss" 1 0 D 27 max;
    Pni "sse3" 1 0 C 0 [Sse3] max;
    Pclmulqdq "pclmulqdq" 1 0 C 1 [Pclmulqdq] max;
    Monitor "monitor" 1 0 C 3 [Monitor];
    Vmx "vmx" 1 0 C 5 [Vmx] max;
    Ssse3 "ssse3" 1 0 C 9 [Ssse3] max;
    Fma "fma" 1 0 C 12 [Fma] max;
    Cx16 "cx16" 1 0 C 13 [Cx16] max;
    Pcid "pcid" 1 0 C 17 max;
    Sse41 "sse4.1" 1 0 C 19 [Sse41] max;
    Sse42 "sse4.2" 1 0 C 20 [Sse42] max;
    X2apic "x2apic" 1 0 C 21 max;
    Movbe "movbe" 1 0 C 22 [Movbe] max;
    Popcnt "popcnt" 1 0 C 23 [Popcnt] max;
    TscDeadline "tsc-deadline" 1 0 C 24 max;
    Aes "aes" 1 0 C 25 [Aes] max;
    Xsave "xsave" 1 0 C 26 [Xsave] max;
    Avx "avx" 1 0 C 28 [Avx] max;
    F16c "f16c" 1 0 C 29 [F16c] max;
    Rdrand "rdrand" 1 0 C 30 [Rdrand] max;
    Hypervisor "hypervisor" 1 0 C 31 max;
    Arat "arat" 6 0 A 2 max;
    Fsgsbase "fsgsbase" 7 0 B 0 [Fsgsbase] max;
    TscAdjust "tsc-adjust" 7 0 B 1 max;
    Bmi1 "bmi1" 7 0 B 3 [Bmi1] max;
    Avx2 "avx2" 7 0 B 5 [Avx2] max;
    FdpExcptnOnly "fdp-excptn-only" 7 0 B 6;
    Smep "smep" 7 0 B 7 [Smep] max;
    Bmi2 "bmi2" 7 0 B 8 [Bmi2] max;
    Erms "erms" 7 0 B 9 max;
    Invpcid "invpcid" 7 0 B 10 [Invpcid] max;
    ZeroFcsFds "zero-fcs-fds" 7 0 B 13 [ZeroFcsFds] max;
    Rdseed "rdseed" 7 0 B 18 [Rdseed] max;
    Adx "adx" 7 0 B 19 [Adx] max;
    Smap "smap" 7 0 B 20 [Smap] max;
    Clflushopt "clflushopt" 7 0 B 23 [Clflushopt] max;
    Clwb "clwb" 7 0 B 24 [Clwb] max;
    Sha "sha" 7 0 B 29 [Sha] max;
    Umip "umip" 7 0 C 2 [Umip] max;
    Pku "pku" 7 0 C 3 [Pku] max;
    Gfni "gfni" 7 0 C 8 [Gfni] max;
    Vaes "vaes" 7 0 C 9 [Vaes] max;
    Vpclmulqdq "vpclmulqdq" 7 0 C 10 [Vpclmulqdq] max;
    La57 "la57" 7 0 C 16 max;
    Rdpid "rdpid" 7 0 C 22 [Rdpid] max;
    Movdiri "movdiri" 7 0 C 27 [Movdiri] max;
    Movdir64b "movdir64b" 7 0 C 28 [Movdir64b];
    Fsrm "fsrm" 7 0 D 4 [Fsrm] max;
    Serialize "serialize" 7 0 D 14 [Serialize] max;
    SpecCtrl "spec-ctrl" 7 0 D 26 max;
    FlushL1d "flush-l1d" 7 0 D 28 max;
    ArchCapabilities "arch-capabilities" 7 0 D 29 max;
    BhiCtrl "bhi-ctrl" 7 2 D 4 max;
    Xsaveopt "xsaveopt" 0xd 1 A 0 [Xsaveopt] max;
    Xsavec "xsavec" 0xd 1 A 1 [Xsavec] max;
    Xgetbv1 "xgetbv1" 0xd 1 A 2 max;
    Xsaves "xsaves" 0xd 1 A 3 [Xsaves] max;
    LahfLm "lahf-lm" 0x8000_0001 0 C 0 [LahfLm] max;
    Lzcnt "lzcnt" 0x8000_0001 0 C 5 [Lzcnt] max;
    Prefetchw "prefetchw" 0x8000_0001 0 C 8 [Prefetchw] max;
    Syscall "syscall" 0x8000_0001 0 D 11 [Syscall] max;
    Nx "nx" 0x8000_0001 0 D 20 [Nx] max;
    Pdpe1gb "pdpe1gb" 0x8000_0001 0 D 26 max;
    Rdtscp "rdtscp" 0x8000_0001 0 D 27 [Rdtscp] max;
    Lm "lm" 0x8000_0001 0 D 29 [LongMode] max;
    InvariantTsc "invtsc" 0x8000_0007 0 D 8 max;
}

const _: () = assert!(ROWS.len() <= 128);

/// What leaf 0x40000000 answers in EBX, ECX, EDX.
const HYPERVISOR_SIGNATURE: &[u8; 12] = b"twofold\0\0\0\0\0";

/// IA32_ARCH_CAPABILITIES: translated code does not run ahead of what the guest's program says, so the guest need not
/// defend itself: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO,
/// PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// The part of a processor's state that CPUID shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuidState {
    /// (x2)APIC ID.
    pub apic_id: u32,
    /// Number of processors of the machine.
    pub cpus: u32,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
}

/// A CPU model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuModel {
    /// What it was asked for as: `max`, `max,-la57`, …
    pub name: String,
    /// Display family.
    pub family: u32,
    /// Display model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// Features that decide whether an instruction exists.
    pub features: Features,
    /// MAXPHYADDR.
    pub phys_bits: u8,
    /// The CPUID feature bits, by row.
    bits: u128,
    /// Features of VMX that were taken away.
    without_vmx: RowSet,
    /// The named model it began as.
    base: &'static Model,
    /// What VMX can do.
    pub vmx: Caps,
}

impl Default for CpuModel {
    fn default() -> Self {
        Self::max()
    }
}

impl CpuModel {
    /// The model `max`.
    #[must_use]
    pub fn max() -> Self {
        Self::named(&models::MODELS[0])
    }

    /// A named model as it is.
    fn named(base: &'static Model) -> Self {
        let bits = match base.generation {
            Generation::Max => ROWS.iter().filter(|r| r.in_max).fold(0, |b, r| b | 1 << r.bit as u8),
            generation => bits_of(generation),
        };
        let later =
            models::VMX_SINCE.iter().filter(|(since, _)| *since > base.generation).flat_map(|(_, names)| *names);
        let mut without_vmx = RowSet::default();
        for name in later.chain(base.without_vmx) {
            if let Some(i) = caps::ROWS.iter().position(|r| r.name == *name) {
                without_vmx.set(i, true);
            }
        }
        let (family, model, stepping) = base.signature;
        let mut model = Self {
            name: base.name.to_string(),
            family,
            model,
            stepping,
            features: Features::NONE,
            phys_bits: base.phys_bits,
            bits: base.without.iter().fold(bits, |b, bit| b & !(1 << *bit as u8)),
            without_vmx,
            base,
            vmx: Caps::default(),
        };
        model.derive();
        model
    }

    /// Recomputes what follows from the bits, after dropping bits that need another one that is absent.
    fn derive(&mut self) {
        use Bit::*;
        let needs: &[(Bit, Bit)] = &[
            (Sse, Fxsr),
            (Sse2, Sse),
            (Pni, Sse2),
            (Ssse3, Pni),
            (Sse41, Ssse3),
            (Sse42, Sse41),
            (Aes, Sse2),
            (Pclmulqdq, Sse2),
            (Sha, Sse2),
            (Gfni, Sse2),
            (Avx, Xsave),
            (Avx, Sse42),
            (Avx2, Avx),
            (Fma, Avx),
            (F16c, Avx),
            (Vaes, Avx),
            (Vaes, Aes),
            (Vpclmulqdq, Avx),
            (Vpclmulqdq, Pclmulqdq),
            (Xsaveopt, Xsave),
            (Xsavec, Xsave),
            (Xgetbv1, Xsave),
            (Xsaves, Xsavec),
            (Pcid, Lm),
            (La57, Lm),
            (Pdpe1gb, Lm),
            (Invpcid, Pcid),
            (X2apic, Apic),
            (TscDeadline, Apic),
        ];
        for (bit, need) in needs {
            if !self.has(*need) {
                self.bits &= !(1 << *bit as u8);
            }
        }
        self.features = ROWS
            .iter()
            .filter(|r| self.has(r.bit))
            .filter_map(|r| r.feature)
            .fold(Features::NONE, |set, feature| set.with(feature));
        self.vmx = Caps::new(self, self.without_vmx);
    }

    /// The CR4 bits the processor has.
    #[must_use]
    pub fn cr4_mask(&self) -> u64 {
        use twofold_arch::control::cr4;
        let rows: [(u64, Bit); 19] = [
            (cr4::VME | cr4::PVI, Bit::Vme),
            (cr4::TSD, Bit::Tsc),
            (cr4::DE, Bit::De),
            (cr4::PSE, Bit::Pse),
            (cr4::PAE, Bit::Pae),
            (cr4::MCE, Bit::Mce),
            (cr4::PGE, Bit::Pge),
            (cr4::PCE, Bit::Fpu),
            (cr4::OSFXSR, Bit::Fxsr),
            (cr4::OSXMMEXCPT, Bit::Sse),
            (cr4::UMIP, Bit::Umip),
            (cr4::LA57, Bit::La57),
            (cr4::VMXE, Bit::Vmx),
            (cr4::FSGSBASE, Bit::Fsgsbase),
            (cr4::PCIDE, Bit::Pcid),
            (cr4::OSXSAVE, Bit::Xsave),
            (cr4::SMEP, Bit::Smep),
            (cr4::SMAP, Bit::Smap),
            (cr4::PKE, Bit::Pku),
        ];
        rows.iter().filter(|(_, bit)| self.has(*bit)).fold(0, |mask, (bits, _)| mask | bits)
    }

    /// The IA32_EFER bits the processor has.
    #[must_use]
    pub fn efer_mask(&self) -> u64 {
        use twofold_arch::control::efer;
        let rows = [(efer::SCE, Bit::Syscall), (efer::LME | efer::LMA, Bit::Lm), (efer::NXE, Bit::Nx)];
        rows.iter().filter(|(_, bit)| self.has(*bit)).fold(0, |mask, (bits, _)| mask | bits)
    }

    /// Whether CPUID shows `bit`.
    #[must_use]
    #[inline]
    pub const fn has(&self, bit: Bit) -> bool {
        self.bits >> bit as u8 & 1 != 0
    }

    /// The model with or without `bit`.
    #[must_use]
    pub fn set(mut self, bit: Bit, on: bool) -> Self {
        self.bits = if on { self.bits | 1 << bit as u8 } else { self.bits & !(1 << bit as u8) };
        self.derive();
        self
    }

    /// The model that `MODEL[,+feature,-feature…]` names.
    ///
    /// # Errors
    /// One line that says what is unknown and what to do.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',').map(str::trim);
        let base = parts.next().unwrap_or_default();
        let is_meant = |m: &&Model| same_name(m.name, base) || m.aliases.iter().any(|alias| same_name(alias, base));
        let Some(found) = models::MODELS.iter().find(is_meant) else {
            let names: Vec<&str> = models::MODELS.iter().map(|m| m.name).collect();
            return Err(format!("unknown CPU model '{base}'; choose one of: {}", names.join(", ")));
        };
        let mut model = Self::named(found);
        for part in parts.filter(|p| !p.is_empty()) {
            let (on, name) = match (part.strip_prefix('+'), part.strip_prefix('-'), part.split_once('=')) {
                (Some(name), _, _) => (true, name),
                (_, Some(name), _) => (false, name),
                (_, _, Some((name, "on"))) => (true, name),
                (_, _, Some((name, "off"))) => (false, name),
                _ => return Err(format!("CPU feature '{part}' needs a sign; write '+{part}' or '-{part}'")),
            };
            if let Some(i) = caps::ROWS.iter().position(|r| same_name(r.name, name)) {
                if on && !caps::ROWS[i].on {
                    return Err(format!("VMX feature '{name}' is not implemented; leave it out"));
                }
                model.without_vmx.set(i, !on);
                continue;
            }
            let Some(row) = ROWS.iter().find(|r| same_name(r.name, name) || also_called(r.bit, name)) else {
                if models::NOT_IMPLEMENTED.iter().any(|known| same_name(known, name)) {
                    if !on {
                        continue;
                    }
                    return Err(format!("CPU feature '{name}' is not implemented; leave it out"));
                }
                return Err(format!("unknown CPU feature '{name}'; 'twofold cpu show {base}' lists them"));
            };
            if on && !Self::max().has(row.bit) {
                return Err(format!("CPU feature '{name}' is not implemented; leave it out"));
            }
            model.bits = if on { model.bits | 1 << row.bit as u8 } else { model.bits & !(1 << row.bit as u8) };
            if on {
                model.derive()
            }
        }
        model.name = text.to_string();
        model.derive();
        Ok(model)
    }

    /// Names and descriptions of all models.
    pub fn list() -> impl Iterator<Item = (&'static str, &'static str)> {
        models::MODELS.iter().map(|m| (m.name, m.about))
    }

    /// The names of the features the model has.
    pub fn feature_names(&self) -> impl Iterator<Item = &'static str> + '_ {
        ROWS.iter().filter(|r| self.has(r.bit)).map(|r| r.name)
    }

    /// The model for people: signature, widths, features present and absent.
    #[must_use]
    pub fn show(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "model      {}", self.name);
        let _ = writeln!(
            out,
            "signature  GenuineIntel family {} model {} stepping {} ({:#x})",
            self.family,
            self.model,
            self.stepping,
            self.signature()
        );
        let _ = writeln!(out, "brand      {}", if self.base.brand.is_empty() { "number 2" } else { self.base.brand });
        let caches: Vec<String> = self.base.caches.iter().map(Cache::to_string).collect();
        let _ = writeln!(out, "caches     {}", if caches.is_empty() { "by leaf 2".into() } else { caches.join(", ") });
        let _ = writeln!(
            out,
            "leaves     up to {:#x}{}",
            self.max_leaf(),
            match self.max_extended_leaf() {
                0 => String::new(),
                n => format!(" and {n:#x}"),
            }
        );
        let _ = writeln!(out, "addresses  {} bits physical, {} bits linear", self.phys_bits, self.linear_bits());
        let wrap = |out: &mut String, title: &str, names: Vec<&str>| {
            let mut line = String::new();
            let mut title = title;
            for name in names {
                if line.len() + name.len() > 98 {
                    let _ = writeln!(out, "{title:<11}{}", line.trim_end());
                    title = "";
                    line.clear();
                }
                line.push_str(name);
                line.push(' ');
            }
            if !line.is_empty() {
                let _ = writeln!(out, "{title:<11}{}", line.trim_end());
            }
        };
        wrap(&mut out, "features", self.feature_names().collect());
        wrap(&mut out, "absent", ROWS.iter().filter(|r| !self.has(r.bit)).map(|r| r.name).collect());
        if self.has(Bit::Vmx) {
            wrap(&mut out, "VMX", self.vmx.names(true).collect());
            wrap(&mut out, "VMX absent", self.vmx.names(false).collect());
        }
        if self.has(Bit::ArchCapabilities) {
            let _ = writeln!(out, "MSR 0x10a  {ARCH_CAPABILITIES:#018x} IA32_ARCH_CAPABILITIES");
        }
        out.push_str(&self.vmx.show());
        out
    }

    /// CPUID.1:EAX.
    #[must_use]
    pub const fn signature(&self) -> u32 {
        let (family, extended_family) = if self.family > 15 { (15, self.family - 15) } else { (self.family, 0) };
        (self.stepping & 15)
            | (self.model & 15) << 4
            | family << 8
            | (self.model >> 4 & 15) << 16
            | extended_family << 20
    }

    /// Width of linear addresses that the CPU supports.
    #[must_use]
    pub const fn linear_bits(&self) -> u8 {
        match (self.has(Bit::La57), self.has(Bit::Lm)) {
            (true, _) => 57,
            (false, true) => 48,
            (false, false) => 32,
        }
    }

    /// Highest basic leaf: the processor's, or that of a feature it was given.
    fn max_leaf(&self) -> u32 {
        let leaves = ROWS.iter().filter(|r| self.has(r.bit)).map(|r| r.place.0);
        leaves.filter(|l| *l < 0x4000_0000).fold(self.base.leaves.0, u32::max)
    }

    /// The same of the extended leaves, or 0.
    fn max_extended_leaf(&self) -> u32 {
        let leaves = ROWS.iter().filter(|r| self.has(r.bit)).map(|r| r.place.0);
        leaves.filter(|l| *l >= 0x8000_0000).fold(self.base.leaves.1, u32::max)
    }

    /// The XCR0 bits that may be set.
    #[must_use]
    pub const fn xcr0_mask(&self) -> u64 {
        if !self.has(Bit::Xsave) {
            return 0;
        }
        let avx = if self.has(Bit::Avx) { xcr0::AVX } else { 0 };
        let pkru = if self.has(Bit::Pku) { xcr0::PKRU } else { 0 };
        xcr0::X87 | xcr0::SSE | avx | pkru
    }

    /// CPUID: EAX, EBX, ECX, EDX of a leaf (SDM Vol 2A, "CPUID—CPU Identification").
    #[must_use]
    pub fn cpuid(&self, leaf: u32, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        let max_basic = self.max_leaf();
        let leaf = match leaf {
            0x4000_0000..=0x4fff_ffff if self.has(Bit::Hypervisor) => leaf,
            n if n >= 0x8000_0000 && n <= self.max_extended_leaf() => leaf,
            n if n <= max_basic => n,
            // "If a value entered for CPUID.EAX is higher than the maximum … the data for the highest basic leaf is returned".
            _ => max_basic,
        };
        let mut regs = self.leaf(leaf, subleaf, max_basic, state);
        for row in ROWS {
            let (l, s, reg, bit) = row.place;
            // Leaves 1, 6 and the extended ones ignore ECX.
            if l == leaf && (s == subleaf || !matches!(l, 7 | 0xd)) && self.has(row.bit) {
                regs[reg as usize] |= 1 << bit;
            }
        }
        regs
    }

    /// What a leaf says besides feature bits.
    fn leaf(&self, leaf: u32, subleaf: u32, max_basic: u32, state: &CpuidState) -> [u32; 4] {
        use twofold_arch::control::cr4;
        let cpus = state.cpus.max(1);
        let ids = cpus.next_power_of_two();
        match leaf {
            0 => {
                let [b, d, c] = words(b"GenuineIntel");
                [max_basic, b, c, d]
            }
            1 => {
                // The line that CLFLUSH flushes, in units of 8 bytes; the number of a brand that is no string.
                let line = if self.has(Bit::Clflush) { 8 << 8 } else { 0 };
                let brand = if self.base.brand.is_empty() { 2 } else { 0 };
                let ebx = state.apic_id << 24 | ids.min(255) << 16 | line | brand;
                let ecx = if state.cr4 & cr4::OSXSAVE != 0 { 1 << 27 } else { 0 };
                let edx = if cpus > 1 { 1 << 28 } else { 0 };
                [self.signature(), ebx, ecx, edx]
            }
            2 => self.base.descriptors,
            4 => self.cache_leaf(subleaf, ids),
            7 if subleaf == 0 => [2, 0, if state.cr4 & cr4::PKE != 0 { 1 << 4 } else { 0 }, 0],
            0xb | 0x1f => topology_leaf(subleaf, state.apic_id, cpus),
            0xd => self.xsave_leaf(subleaf, state.xcr0),
            0x15 => [TSC_RATIO_DENOMINATOR, TSC_RATIO_NUMERATOR, CRYSTAL_HZ, 0],
            0x16 => [BASE_MHZ, BASE_MHZ, (CRYSTAL_HZ / 1_000_000).max(1), 0],
            0x4000_0000 => {
                let [b, c, d] = words(HYPERVISOR_SIGNATURE);
                [0x4000_0000, b, c, d]
            }
            0x8000_0000 => [self.max_extended_leaf(), 0, 0, 0],
            0x8000_0002..=0x8000_0004 => {
                let mut brand = [0u8; 48];
                let text = self.base.brand.as_bytes();
                brand[..text.len()].copy_from_slice(text);
                let at = (leaf - 0x8000_0002) as usize * 16;
                core::array::from_fn(|i| {
                    let b = at + i * 4;
                    u32::from_le_bytes([brand[b], brand[b + 1], brand[b + 2], brand[b + 3]])
                })
            }
            0x8000_0006 => [0, 0, self.level_2_word(), 0],
            0x8000_0008 => [u32::from(self.phys_bits) | u32::from(self.linear_bits()) << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// Deterministic cache parameters.
    fn cache_leaf(&self, subleaf: u32, ids: u32) -> [u32; 4] {
        let Some(cache) = self.base.caches.get(subleaf as usize) else { return [0; 4] };
        let sharing = if cache.shared { ids } else { 1 };
        let kind = u32::from(cache.kind) | u32::from(cache.level) << 5;
        let eax = kind | 1 << 8 | (sharing - 1) << 14 | (ids.min(64) - 1) << 26;
        [eax, (u32::from(cache.ways) - 1) << 22 | 63, cache.sets - 1, 0]
    }

    /// CPUID.80000006H:ECX: the second-level cache, with lines of 64 bytes.
    fn level_2_word(&self) -> u32 {
        let Some(cache) = self.base.caches.iter().find(|c| c.level == 2) else { return 0 };
        let ways = match cache.ways {
            4 => 4,
            8 => 6,
            16 => 8,
            _ => 7,
        };
        cache.kib() << 16 | ways << 12 | 64
    }

    fn xsave_leaf(&self, subleaf: u32, enabled: u64) -> [u32; 4] {
        if !self.has(Bit::Xsave) {
            return [0; 4];
        }
        let size = |components: u64, compacted: bool| area::area_len(components, compacted) as u32;
        match subleaf {
            0 => [self.xcr0_mask() as u32, size(enabled, false), size(self.xcr0_mask(), false), 0],
            1 if self.has(Bit::Xsavec) => [0, size(enabled, true), 0, 0],
            2 if self.has(Bit::Avx) => [area::AVX_LEN as u32, area::EXTENDED as u32, 0, 0],
            9 if self.has(Bit::Pku) => [area::PKRU_LEN as u32, area::PKRU as u32, 0, 0],
            _ => [0; 4],
        }
    }
}

/// Extended topology: one thread a core, all cores in one package.
fn topology_leaf(subleaf: u32, apic_id: u32, cpus: u32) -> [u32; 4] {
    let shift = cpus.next_power_of_two().trailing_zeros();
    match subleaf {
        0 => [0, 1, 1 << 8, apic_id],
        1 => [shift, cpus, 2 << 8 | 1, apic_id],
        n => [0, 0, n & 0xff, apic_id],
    }
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    core::array::from_fn(|i| u32::from_le_bytes([text[i * 4], text[i * 4 + 1], text[i * 4 + 2], text[i * 4 + 3]]))
}

/// The CPUID bits of a generation.
fn bits_of(generation: Generation) -> u128 {
    let brought = models::SINCE.iter().filter(|(since, _)| *since <= generation);
    brought.fold(0, |all, (since, bits)| {
        let early = |bit: &&Bit| {
            *since == Generation::X86_64 && generation > Generation::X86_64 && models::BASELINE_ONLY.contains(bit)
        };
        bits.iter().filter(|bit| !early(bit)).fold(all, |all, bit| all | 1 << *bit as u8)
    })
}

/// Names that Linux, QEMU or the manuals have for a bit besides ours.
fn also_called(bit: Bit, name: &str) -> bool {
    let names: &[&str] = match bit {
        Bit::Pni => &["pni"],
        Bit::Lzcnt => &["abm"],
        Bit::Prefetchw => &["3dnowprefetch"],
        Bit::Sha => &["sha-ni"],
        Bit::Cx8 => &["cmpxchg8b"],
        Bit::Cx16 => &["cmpxchg16b"],
        Bit::Nx => &["xd"],
        Bit::InvariantTsc => &["constant-tsc", "nonstop-tsc"],
        Bit::Lm => &["em64t"],
        Bit::Clflush => &["clfsh"],
        Bit::Pclmulqdq => &["pclmul"],
        _ => &[],
    };
    names.iter().any(|n| same_name(n, name))
}

/// `-`, `_` and `.` in feature names are interchangeable or may be left out, case does not count.
fn same_name(a: &str, b: &str) -> bool {
    let plain = |s: &str| -> String {
        s.chars().filter(|c| !matches!(c, '-' | '_' | '.')).map(|c| c.to_ascii_lowercase()).collect()
    };
    plain(a) == plain(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(cpus: u32) -> CpuidState {
        CpuidState { apic_id: 0, cpus, cr4: 0, xcr0: 1 }
    }

    #[test]
    fn max_is_genuine_intel_and_has_what_linux_wants() {
        let m = CpuModel::max();
        let [max, b, c, d] = m.cpuid(0, 0, &state(1));
        assert!(max >= 0x16);
        let text: Vec<u8> = [b, d, c].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(text, b"GenuineIntel");
        assert_eq!(m.cpuid(1, 0, &state(1))[0], 0x606a6);
        // CPUID.15H: crystal × numerator / denominator is the TSC's frequency.
        let [den, num, hz, _] = m.cpuid(0x15, 0, &state(1));
        assert_eq!(u64::from(hz) * u64::from(num) / u64::from(den), crate::platform::clock::TSC_HZ);
        assert!(m.features.has(Feature::Cx16) && m.features.has(Feature::Avx2) && m.features.has(Feature::Vmx));
    }

    #[test]
    fn flags_are_parsed_and_refused_in_one_line() {
        let m = CpuModel::parse("max,-la57,-pcid").unwrap();
        assert!(!m.has(Bit::La57) && !m.has(Bit::Pcid) && !m.has(Bit::Invpcid));
        assert_eq!(m.cpuid(0x8000_0008, 0, &state(1))[0] >> 8 & 0xff, 48);
        assert!(CpuModel::parse("max,+sse4_2").is_ok());
        for bad in ["pentium", "max,+avx9", "max,la57", "", "max,+movdir64b"] {
            let e = CpuModel::parse(bad).unwrap_err();
            assert!(!e.contains('\n') && !e.is_empty(), "{e}");
        }
    }

    #[test]
    fn turning_a_feature_off_turns_off_what_needs_it() {
        let m = CpuModel::parse("max,-xsave").unwrap();
        assert!(!m.features.has(Feature::Xsaves));
        assert!(!m.features.has(Feature::Avx) && !m.features.has(Feature::Fma));
        assert_eq!(m.cpuid(0xd, 0, &state(1)), [0; 4]);
        let m = CpuModel::parse("max,-avx").unwrap();
        assert!(!m.features.has(Feature::Avx2) && !m.features.has(Feature::Vaes) && m.features.has(Feature::Aes));
        assert_eq!(m.cpuid(0xd, 0, &state(1)), [0x203, 576, 840, 0]);
        assert_eq!(m.cpuid(0xd, 2, &state(1)), [0; 4]);
    }

    #[test]
    fn save_area_grows_with_xcr0() {
        let m = CpuModel::max();
        assert_eq!(m.cpuid(0xd, 0, &state(1)), [0x207, 576, 840, 0]);
        let sizes = |xcr0| {
            let s = CpuidState { xcr0, ..state(1) };
            (m.cpuid(0xd, 0, &s)[1], m.cpuid(0xd, 1, &s)[1])
        };
        assert_eq!([3, 7, 0x203, 0x207].map(sizes), [(576, 576), (832, 832), (840, 584), (840, 840)]);
        assert_eq!(m.cpuid(0xd, 2, &state(1)), [256, 576, 0, 0]);
        assert_eq!(m.cpuid(0xd, 9, &state(1)), [8, 832, 0, 0]);
        let m = CpuModel::parse("max,-pku").unwrap();
        assert_eq!(m.cpuid(0xd, 0, &state(1)), [7, 576, 832, 0]);
        assert_eq!(m.cpuid(0xd, 9, &state(1)), [0; 4]);
    }

    /// Signatures and widths as the manuals have them, in every model's own leaves.
    #[test]
    fn named_models_are_what_they_say() {
        let rows: [(&str, u32, u32, u32, u32); 6] = [
            ("pentium3", 0x686, 2, 36, 32),
            ("conroe", 0x6f6, 0xa, 36, 48),
            ("Nehalem", 0x106a5, 0xb, 36, 48),
            ("Skylake-Client", 0x506e3, 0x16, 39, 48),
            ("skylake_server", 0x50654, 0x16, 46, 48),
            ("IceLake", 0x606a6, 0x1f, 46, 57),
        ];
        for (name, signature, leaves, physical, linear) in rows {
            let m = CpuModel::parse(name).unwrap();
            assert_eq!(m.cpuid(1, 0, &state(1))[0], signature, "{name}");
            assert_eq!(m.cpuid(0, 0, &state(1))[0], leaves, "{name}");
            assert_eq!((u32::from(m.phys_bits), u32::from(m.linear_bits())), (physical, linear), "{name}");
            if m.max_extended_leaf() != 0 {
                assert_eq!(m.cpuid(0x8000_0008, 0, &state(1))[0] & 0xffff, linear << 8 | physical, "{name}");
            }
        }
        let old = CpuModel::parse("pentium3").unwrap();
        // There are no extended leaves: the highest basic one answers, here with descriptors of caches.
        assert_eq!(old.cpuid(0x8000_0000, 0, &state(1)), old.cpuid(2, 0, &state(1)));
        assert_eq!(old.cpuid(1, 0, &state(1))[1] & 0xff, 2);
        assert_eq!(old.cpuid(4, 0, &state(1)), old.cpuid(2, 0, &state(1)));
    }

    /// Each model has what the one before it has, and nothing that its time did not know.
    #[test]
    fn generations_grow() {
        let bits = |name: &str| CpuModel::parse(name).unwrap().bits;
        let order = ["pentium3", "conroe", "nehalem", "westmere", "sandybridge", "ivybridge", "haswell", "broadwell"];
        for pair in order.windows(2) {
            assert_eq!(bits(pair[0]) & !bits(pair[1]), 0, "{pair:?}");
        }
        assert_eq!(bits("skylake-client") & !bits("skylake-server"), 0);
        assert_eq!(bits("icelake-server") & !CpuModel::max().bits, 0);
        let has = |name: &str, bit| CpuModel::parse(name).unwrap().has(bit);
        for (first, bit) in [
            ("conroe", Bit::Ssse3),
            ("nehalem", Bit::Popcnt),
            ("westmere", Bit::Aes),
            ("sandybridge", Bit::Avx),
            ("ivybridge", Bit::Smep),
            ("haswell", Bit::Avx2),
            ("broadwell", Bit::Smap),
        ] {
            let at = order.iter().position(|n| *n == first).unwrap();
            assert!(has(first, bit) && !has(order[at - 1], bit), "{first} {bit:?}");
        }
        assert!(!has("pentium3", Bit::Lm) && !has("pentium3", Bit::Nx) && !has("pentium3", Bit::Sse2));
    }

    /// The VMX capabilities are those of their time, and make sense together.
    #[test]
    fn vmx_of_named_models() {
        use twofold_arch::vmx::control::proc2;
        let vmx = |name: &str| CpuModel::parse(name).unwrap().vmx;
        assert!(vmx("pentium3").show().is_empty());
        assert_eq!(vmx("conroe").allowed(twofold_arch::vmx::Word::Proc2).may, 0);
        assert!(vmx("nehalem").has_proc2(proc2::EPT) && !vmx("nehalem").has_proc2(proc2::UNRESTRICTED_GUEST));
        assert!(vmx("westmere").has_proc2(proc2::UNRESTRICTED_GUEST));
        assert!(vmx("haswell").has_proc2(proc2::VMCS_SHADOWING) && !vmx("haswell").has_proc2(proc2::PML));
        assert!(!vmx("skylake-client").has_proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY));
        assert!(vmx("skylake-server").has_proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY | proc2::TSC_SCALING));
        // Whatever a list names exists.
        let names =
            models::VMX_SINCE.iter().flat_map(|(_, n)| *n).chain(models::MODELS.iter().flat_map(|m| m.without_vmx));
        for name in names {
            assert!(caps::ROWS.iter().any(|r| r.name == *name), "{name}");
        }
    }

    #[test]
    fn models_and_features_have_one_name_each() {
        let mut names: Vec<String> = models::MODELS
            .iter()
            .flat_map(|m| m.aliases.iter().chain([&m.name]))
            .chain(ROWS.iter().map(|r| &r.name))
            .chain(models::NOT_IMPLEMENTED)
            .map(|n| n.replace(['-', '_', '.'], ""))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(models::MODELS.iter().all(|m| m.brand.len() < 48));
        let message = CpuModel::parse("max,+avx512f").unwrap_err();
        assert!(message.contains("not implemented"), "{message}");
        assert!(CpuModel::parse("max,-avx512f,-rtm").is_ok());
        // A feature from another time brings its leaf.
        let m = CpuModel::parse("pentium3,+smep").unwrap();
        assert_eq!(m.cpuid(7, 0, &state(1))[1], 1 << 7);
    }

    /// What compilers call x86-64-v3.
    #[test]
    fn max_is_x86_64_v3() {
        use Feature::*;
        let m = CpuModel::max();
        for f in [Avx, Avx2, Bmi1, Bmi2, F16c, Fma, Lzcnt, Movbe, Xsave, Cx16, LahfLm, Popcnt, Sse42, Ssse3] {
            assert!(m.features.has(f), "{f:?}");
        }
    }

    #[test]
    fn dynamic_bits_follow_cr4() {
        use twofold_arch::control::cr4;
        let m = CpuModel::max();
        let s = CpuidState { cr4: cr4::OSXSAVE | cr4::PKE, ..state(1) };
        assert_ne!(m.cpuid(1, 0, &s)[2] & 1 << 27, 0);
        assert_ne!(m.cpuid(7, 0, &s)[2] & 1 << 4, 0);
        assert_eq!(m.cpuid(1, 0, &state(1))[2] & 1 << 27, 0);
    }

    #[test]
    fn topology_of_three_processors() {
        let m = CpuModel::max();
        let s = CpuidState { apic_id: 2, ..state(3) };
        assert_eq!(m.cpuid(0xb, 0, &s), [0, 1, 0x100, 2]);
        assert_eq!(m.cpuid(0xb, 1, &s), [2, 3, 0x201, 2]);
        let ebx = m.cpuid(1, 0, &s)[1];
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (2, 4));
    }
}
