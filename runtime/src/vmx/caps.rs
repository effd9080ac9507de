//! What VMX of this processor can do: one table of features, and the capability MSRs that follow from it.
//!
//! Place in the pipeline: made with the CPU model; RDMSR reads [`Caps::msr`], VMREAD and VMWRITE ask [`Caps::has_field`],
//! the checks of VM entry ask all of it. Invariant: what is not implemented is not in the MSRs. A feature is added by
//! turning its row of [`ROWS`] on once it works; fields, MSRs and the checks of reserved bits follow.

use std::fmt::Write as _;

use twofold_arch::vmx::control::{entry, exit, exit2, pin, proc, proc2, proc3, vmfunc};
use twofold_arch::vmx::msr::{self, basic, ept_vpid, misc};
use twofold_arch::vmx::{ControlBit, FEATURE_CONTROL_LOCK, FEATURE_CONTROL_VMX, Field, Word};

use crate::cpu::CpuModel;
use crate::cpu::cpuid::Bit;

/// The VMCS revision identifier of this processor: it changes with the layout of the image in a VMCS region.
pub const REVISION: u32 = super::REVISION;
/// The VMX-preemption timer counts down once when this bit of the TSC changes.
pub const PREEMPTION_TIMER_SHIFT: u32 = 5;
/// Number of CR3-target values.
pub const CR3_TARGETS: u64 = 4;
/// Recommended maximum number of entries in an MSR area; with more, what happens is undefined.
pub const MSR_LIST: u32 = 512;

/// What a row of the table is a bit of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A word of controls.
    Control(Word),
    /// IA32_VMX_EPT_VPID_CAP.
    EptVpid,
    /// IA32_VMX_MISC.
    Misc,
    /// IA32_VMX_BASIC.
    Basic,
}

/// A feature of VMX.
#[derive(Debug)]
pub struct Row {
    /// Where its bit is.
    pub place: Place,
    /// The bit, as a mask.
    pub mask: u64,
    /// Its name on the command line; QEMU's where that has one.
    pub name: &'static str,
    /// Whether it is implemented.
    pub on: bool,
    /// The CPUID feature without which it makes no sense.
    pub needs: Option<Bit>,
}

macro_rules! rows {
    ($($place:expr => { $($bit:path, $name:literal, $on:ident $(, $needs:ident)?;)* })*) => {
        /// Every feature with a bit of its own, implemented or not.
        pub const ROWS: &[Row] = &[$($(Row {
            place: $place,
            mask: $bit as u64,
            name: $name,
            on: rows!(@on $on),
            needs: rows!(@needs $($needs)?),
        }),*),*];
    };
    (@on on) => { true };
    (@on off) => { false };
    (@needs) => { None };
    (@needs $bit:ident) => { Some(Bit::$bit) };
}

// Bit, name, `on` when it is implemented, the CPUID bit it needs.
rows! {
    Place::Basic => {
        basic::INS_OUTS_INFO, "vmx-ins-outs", on;
        basic::TRUE_CONTROLS, "vmx-true-ctls", on;
        basic::NO_ERROR_CODE_CHECK, "vmx-any-errcode", off;
    }
    Place::Misc => {
        misc::STORE_LMA, "vmx-store-lma", on, Lm;
        misc::ACTIVITY_HLT, "vmx-activity-hlt", on;
        misc::ACTIVITY_SHUTDOWN, "vmx-activity-shutdown", on;
        misc::ACTIVITY_WAIT_FOR_SIPI, "vmx-activity-wait-sipi", on;
        misc::READ_SMBASE, "vmx-read-smbase", on;
        misc::VMWRITE_ANY, "vmx-vmwrite-vmexit-fields", on;
        misc::INJECT_ZERO_LENGTH, "vmx-zero-len-inject", on;
    }
    Place::Control(Word::Pin) => {
        pin::EXTERNAL_INTERRUPT_EXITING, "vmx-intr-exit", on;
        pin::NMI_EXITING, "vmx-nmi-exit", on;
        pin::VIRTUAL_NMIS, "vmx-vnmi", on;
        pin::PREEMPTION_TIMER, "vmx-preemption-timer", on;
        pin::POSTED_INTERRUPTS, "vmx-posted-intr", on, Apic;
    }
    Place::Control(Word::Proc) => {
        proc::INTERRUPT_WINDOW_EXITING, "vmx-vintr-pending", on;
        proc::TSC_OFFSETTING, "vmx-tsc-offset", on;
        proc::HLT_EXITING, "vmx-hlt-exit", on;
        proc::INVLPG_EXITING, "vmx-invlpg-exit", on;
        proc::MWAIT_EXITING, "vmx-mwait-exit", on;
        proc::RDPMC_EXITING, "vmx-rdpmc-exit", on;
        proc::RDTSC_EXITING, "vmx-rdtsc-exit", on;
        proc::CR3_LOAD_EXITING, "vmx-cr3-load-exit", on;
        proc::CR3_STORE_EXITING, "vmx-cr3-store-exit", on;
        proc::TERTIARY, "vmx-tertiary-ctls", off;
        proc::CR8_LOAD_EXITING, "vmx-cr8-load-exit", on, Lm;
        proc::CR8_STORE_EXITING, "vmx-cr8-store-exit", on, Lm;
        proc::TPR_SHADOW, "vmx-flexpriority", on;
        proc::NMI_WINDOW_EXITING, "vmx-vnmi-pending", on;
        proc::MOV_DR_EXITING, "vmx-movdr-exit", on;
        proc::UNCONDITIONAL_IO_EXITING, "vmx-io-exit", on;
        proc::IO_BITMAPS, "vmx-io-bitmap", on;
        proc::MONITOR_TRAP_FLAG, "vmx-mtf", on;
        proc::MSR_BITMAPS, "vmx-msr-bitmap", on;
        proc::MONITOR_EXITING, "vmx-monitor-exit", on;
        proc::PAUSE_EXITING, "vmx-pause-exit", on;
        proc::SECONDARY, "vmx-secondary-ctls", on;
    }
    Place::Control(Word::Proc2) => {
        proc2::APIC_ACCESSES, "vmx-apicv-xapic", on;
        proc2::EPT, "vmx-ept", on;
        proc2::DESCRIPTOR_TABLE_EXITING, "vmx-desc-exit", on;
        proc2::RDTSCP, "vmx-rdtscp-exit", on, Rdtscp;
        proc2::X2APIC_MODE, "vmx-apicv-x2apic", on, X2apic;
        proc2::VPID, "vmx-vpid", on;
        proc2::WBINVD_EXITING, "vmx-wbinvd-exit", on;
        proc2::UNRESTRICTED_GUEST, "vmx-unrestricted-guest", on;
        proc2::APIC_REGISTERS, "vmx-apicv-register", on;
        proc2::VIRTUAL_INTERRUPT_DELIVERY, "vmx-apicv-vid", on;
        proc2::PAUSE_LOOP_EXITING, "vmx-ple", on;
        proc2::RDRAND_EXITING, "vmx-rdrand-exit", on, Rdrand;
        proc2::INVPCID, "vmx-invpcid-exit", on, Invpcid;
        proc2::VM_FUNCTIONS, "vmx-vmfunc", on;
        proc2::VMCS_SHADOWING, "vmx-shadow-vmcs", on;
        proc2::RDSEED_EXITING, "vmx-rdseed-exit", on, Rdseed;
        proc2::PML, "vmx-pml", on;
        proc2::EPT_VIOLATION_VE, "vmx-ept-violation-ve", on;
        proc2::XSAVES, "vmx-xsaves", on, Xsaves;
        proc2::MODE_BASED_EXECUTE, "vmx-mbec", on;
        proc2::SUB_PAGE_WRITE, "vmx-spp", on;
        proc2::TSC_SCALING, "vmx-tsc-scaling", on;
    }
    Place::Control(Word::Proc3) => {
        proc3::IPI_VIRTUALIZATION, "vmx-ipi-virt", off;
    }
    Place::Control(Word::Exit) => {
        exit::SAVE_DEBUG_CONTROLS, "vmx-exit-save-debugctl", on;
        exit::HOST_ADDRESS_SPACE_SIZE, "vmx-exit-host-64", on, Lm;
        exit::ACKNOWLEDGE_INTERRUPT, "vmx-exit-ack-intr", on;
        exit::SAVE_PAT, "vmx-exit-save-pat", on, Pat;
        exit::LOAD_PAT, "vmx-exit-load-pat", on, Pat;
        exit::SAVE_EFER, "vmx-exit-save-efer", on;
        exit::LOAD_EFER, "vmx-exit-load-efer", on;
        exit::SAVE_PREEMPTION_TIMER, "vmx-exit-save-preemption-timer", on;
        exit::SECONDARY, "vmx-exit-secondary-ctls", off;
    }
    Place::Control(Word::Exit2) => {
        exit2::PREMATURELY_BUSY_SHADOW_STACK, "vmx-exit-busy-shadow-stack", off;
    }
    Place::Control(Word::Entry) => {
        entry::LOAD_DEBUG_CONTROLS, "vmx-entry-load-debugctl", on;
        entry::IA32E_MODE_GUEST, "vmx-entry-ia32e-mode", on, Lm;
        entry::LOAD_PAT, "vmx-entry-load-pat", on, Pat;
        entry::LOAD_EFER, "vmx-entry-load-efer", on;
    }
    Place::Control(Word::VmFunc) => {
        vmfunc::EPTP_SWITCHING, "vmx-eptp-switching", on;
    }
    Place::EptVpid => {
        ept_vpid::EXECUTE_ONLY, "vmx-ept-execonly", on;
        ept_vpid::WALK_4, "vmx-page-walk-4", on;
        ept_vpid::WALK_5, "vmx-page-walk-5", on;
        ept_vpid::TYPE_UC, "vmx-ept-uc", on;
        ept_vpid::TYPE_WB, "vmx-ept-wb", on;
        ept_vpid::PAGES_2M, "vmx-ept-2mb", on;
        ept_vpid::PAGES_1G, "vmx-ept-1gb", on;
        ept_vpid::INVEPT, "vmx-invept", on;
        ept_vpid::ACCESSED_DIRTY, "vmx-eptad", on;
        ept_vpid::ADVANCED_EXIT_INFO, "vmx-ept-advanced-exitinfo", on;
        ept_vpid::INVEPT_SINGLE, "vmx-invept-single-context", on;
        ept_vpid::INVEPT_ALL, "vmx-invept-all-context", on;
        ept_vpid::INVVPID, "vmx-invvpid", on;
        ept_vpid::INVVPID_ADDRESS, "vmx-invvpid-single-addr", on;
        ept_vpid::INVVPID_SINGLE, "vmx-invvpid-single-context", on;
        ept_vpid::INVVPID_ALL, "vmx-invvpid-all-context", on;
        ept_vpid::INVVPID_SINGLE_RETAINING_GLOBALS, "vmx-invvpid-single-context-noglobals", on;
    }
}

const _: () = assert!(ROWS.len() <= 128);

type At = (Place, u64);
const fn pin_(mask: u32) -> At {
    (Place::Control(Word::Pin), mask as u64)
}
const fn proc_(mask: u32) -> At {
    (Place::Control(Word::Proc), mask as u64)
}
const fn proc2_(mask: u32) -> At {
    (Place::Control(Word::Proc2), mask as u64)
}
const fn cap(mask: u64) -> At {
    (Place::EptVpid, mask)
}

/// Features that make no sense without another one: the left ones go when the right one is absent. In such an order that
/// one pass does it.
const DEPENDS: &[(At, At)] = &[
    ((Place::Control(Word::Proc3), u64::MAX), proc_(proc::TERTIARY)),
    ((Place::Control(Word::Proc2), u64::MAX), proc_(proc::SECONDARY)),
    ((Place::Control(Word::Exit2), u64::MAX), (Place::Control(Word::Exit), exit::SECONDARY as u64)),
    (pin_(pin::VIRTUAL_NMIS), pin_(pin::NMI_EXITING)),
    (proc_(proc::NMI_WINDOW_EXITING), pin_(pin::VIRTUAL_NMIS)),
    (proc2_(proc2::X2APIC_MODE | proc2::APIC_REGISTERS | proc2::VIRTUAL_INTERRUPT_DELIVERY), proc_(proc::TPR_SHADOW)),
    (pin_(pin::POSTED_INTERRUPTS), proc2_(proc2::VIRTUAL_INTERRUPT_DELIVERY)),
    (proc2_(proc2::UNRESTRICTED_GUEST | proc2::PML | proc2::EPT_VIOLATION_VE), proc2_(proc2::EPT)),
    (proc2_(proc2::MODE_BASED_EXECUTE | proc2::SUB_PAGE_WRITE), proc2_(proc2::EPT)),
    ((Place::Control(Word::VmFunc), vmfunc::EPTP_SWITCHING), proc2_(proc2::EPT)),
    ((Place::Control(Word::VmFunc), u64::MAX), proc2_(proc2::VM_FUNCTIONS)),
    (
        cap(ept_vpid::EXECUTE_ONLY
            | ept_vpid::WALK_4
            | ept_vpid::WALK_5
            | ept_vpid::TYPE_UC
            | ept_vpid::TYPE_WB
            | ept_vpid::PAGES_2M
            | ept_vpid::PAGES_1G
            | ept_vpid::INVEPT
            | ept_vpid::ACCESSED_DIRTY
            | ept_vpid::ADVANCED_EXIT_INFO),
        proc2_(proc2::EPT),
    ),
    (cap(ept_vpid::INVEPT_SINGLE | ept_vpid::INVEPT_ALL), cap(ept_vpid::INVEPT)),
    (proc2_(proc2::PML), cap(ept_vpid::ACCESSED_DIRTY)),
    (cap(ept_vpid::INVVPID), proc2_(proc2::VPID)),
    (
        cap(ept_vpid::INVVPID_ADDRESS
            | ept_vpid::INVVPID_SINGLE
            | ept_vpid::INVVPID_ALL
            | ept_vpid::INVVPID_SINGLE_RETAINING_GLOBALS),
        cap(ept_vpid::INVVPID),
    ),
    ((Place::Control(Word::Exit), exit::SAVE_PREEMPTION_TIMER as u64), pin_(pin::PREEMPTION_TIMER)),
];

/// Bits of the default1 class that software may clear, as the TRUE capability MSRs say.
const fn flexible(word: Word) -> u64 {
    match word {
        Word::Proc => (proc::CR3_LOAD_EXITING | proc::CR3_STORE_EXITING) as u64,
        Word::Exit => exit::SAVE_DEBUG_CONTROLS as u64,
        Word::Entry => entry::LOAD_DEBUG_CONTROLS as u64,
        _ => 0,
    }
}

/// The values that a word of controls may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    /// Bits that must be 1.
    pub must: u64,
    /// Bits that may be 1.
    pub may: u64,
}

impl Allowed {
    /// Whether `value` is one.
    #[must_use]
    pub const fn admits(self, value: u64) -> bool {
        value & self.must == self.must && value & !self.may == 0
    }
}

/// A set of rows of [`ROWS`], by index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RowSet(pub u128);

impl RowSet {
    /// Adds or removes a row.
    pub fn set(&mut self, row: usize, on: bool) {
        let bit = 1u128.checked_shl(row as u32).unwrap_or(0);
        self.0 = if on { self.0 | bit } else { self.0 & !bit };
    }
    /// Whether the row is there.
    #[must_use]
    pub fn has(self, row: usize) -> bool {
        self.0.checked_shr(row as u32).unwrap_or(0) & 1 != 0
    }
}

/// The VMX capabilities of a CPU model.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Caps {
    /// Whether there is VMX at all.
    present: bool,
    /// The rows that are there.
    pub rows: RowSet,
    /// By [`Word`]: what VM entry accepts, the TRUE capabilities where there are such.
    words: [Allowed; 8],
    basic: u64,
    misc: u64,
    ept_vpid: u64,
    cr4_fixed1: u64,
    /// MAXPHYADDR.
    pub phys_bits: u32,
    /// Width of linear addresses.
    pub linear_bits: u32,
    /// IA32_EFER bits that exist.
    pub efer_bits: u64,
    /// Fields that exist, by index.
    fields: [u64; 4],
}

/// CR0 bits that are 1 in VMX operation.
const CR0_FIXED0: u64 =
    twofold_arch::control::cr0::PE | twofold_arch::control::cr0::NE | twofold_arch::control::cr0::PG;
/// CR0 bits that may be 1 in VMX operation.
const CR0_FIXED1: u64 = 0xffff_ffff;
/// CR4 bits that are 1 in VMX operation.
const CR4_FIXED0: u64 = twofold_arch::control::cr4::VMXE;

impl Caps {
    /// The capabilities of a model without the rows of `removed`.
    #[must_use]
    pub fn new(model: &CpuModel, removed: RowSet) -> Self {
        Self::with_rows(model, RowSet(implemented().0 & !removed.0))
    }

    /// The capabilities of a model with those of `rows` that make sense: what the tests of the checks use, that must not
    /// depend on what is finished.
    #[must_use]
    pub fn with_rows(model: &CpuModel, rows: RowSet) -> Self {
        let mut caps = Self {
            present: model.has(Bit::Vmx),
            phys_bits: u32::from(model.phys_bits),
            linear_bits: u32::from(model.linear_bits().max(48)),
            cr4_fixed1: model.cr4_mask() | CR4_FIXED0,
            efer_bits: model.efer_mask(),
            ..Self::default()
        };
        if !caps.present {
            return caps;
        }
        let mut bits = [0u64; 11];
        for (i, row) in ROWS.iter().enumerate() {
            if rows.has(i) && row.needs.is_none_or(|bit| model.has(bit)) {
                bits[slot(row.place)] |= row.mask;
            }
        }
        for ((place, mask), (needs_place, needs)) in DEPENDS {
            if bits[slot(*needs_place)] & needs == 0 {
                bits[slot(*place)] &= !mask;
            }
        }
        for (i, row) in ROWS.iter().enumerate() {
            caps.rows.set(i, bits[slot(row.place)] & row.mask != 0);
        }
        let true_controls = bits[slot(Place::Basic)] & basic::TRUE_CONTROLS != 0;
        for word in Word::ALL {
            let default1 = u64::from(word.default1());
            let clearable = if true_controls { flexible(word) } else { 0 };
            let i = slot(Place::Control(word));
            // A default1 bit may be 1 whether or not it has a row.
            caps.words[word as usize] = Allowed { must: default1 & !clearable, may: bits[i] | default1 };
        }
        caps.basic = bits[slot(Place::Basic)]
            | u64::from(REVISION)
            | 4096 << basic::REGION_SIZE_SHIFT
            | 6 << basic::MEMORY_TYPE_SHIFT;
        caps.misc =
            bits[slot(Place::Misc)] | u64::from(PREEMPTION_TIMER_SHIFT) | CR3_TARGETS << misc::CR3_TARGETS_SHIFT;
        caps.ept_vpid = bits[slot(Place::EptVpid)];
        for field in Field::ALL {
            if field.needs().is_empty() || field.needs().iter().any(|c| caps.has(*c)) {
                caps.fields[field.index() >> 6] |= 1 << (field.index() & 63);
            }
        }
        caps
    }

    /// Whether there is VMX.
    #[must_use]
    pub const fn present(&self) -> bool {
        self.present
    }
    /// What VM entry accepts in a word of controls.
    #[must_use]
    #[inline]
    pub const fn allowed(&self, word: Word) -> Allowed {
        self.words[word as usize]
    }
    /// Whether all bits of `control` may be 1.
    #[must_use]
    #[inline]
    pub const fn has(&self, control: ControlBit) -> bool {
        self.words[control.word as usize].may & control.mask == control.mask
    }
    /// Whether all of these bits of the secondary processor-based controls may be 1.
    #[must_use]
    #[inline]
    pub const fn has_proc2(&self, mask: u32) -> bool {
        self.has(ControlBit { word: Word::Proc2, mask: mask as u64 })
    }
    /// Whether IA32_VMX_EPT_VPID_CAP has all of these bits.
    #[must_use]
    #[inline]
    pub const fn has_ept_vpid(&self, bits: u64) -> bool {
        self.ept_vpid & bits == bits
    }
    /// Whether IA32_VMX_MISC has all of these bits.
    #[must_use]
    #[inline]
    pub const fn has_misc(&self, bits: u64) -> bool {
        self.misc & bits == bits
    }
    /// Whether IA32_VMX_BASIC has all of these bits.
    #[must_use]
    #[inline]
    pub const fn has_basic(&self, bits: u64) -> bool {
        self.basic & bits == bits
    }
    /// Whether VMREAD and VMWRITE know the field.
    #[must_use]
    #[inline]
    pub const fn has_field(&self, field: Field) -> bool {
        self.fields[field.index() >> 6] >> (field.index() & 63) & 1 != 0
    }
    /// CR0 bits that must be 1 and that may be 1 in VMX operation.
    #[must_use]
    pub const fn cr0_fixed(&self) -> Allowed {
        Allowed { must: CR0_FIXED0, may: CR0_FIXED1 }
    }
    /// CR4 bits that must be 1 and that may be 1 in VMX operation.
    #[must_use]
    pub const fn cr4_fixed(&self) -> Allowed {
        Allowed { must: CR4_FIXED0, may: self.cr4_fixed1 }
    }
    /// IA32_FEATURE_CONTROL as firmware leaves it: locked, VMXON allowed outside SMX.
    #[must_use]
    pub const fn feature_control(&self) -> u64 {
        FEATURE_CONTROL_LOCK | if self.present { FEATURE_CONTROL_VMX } else { 0 }
    }

    /// The value of a capability MSR, if there is one of that number.
    #[must_use]
    pub fn msr(&self, number: u32) -> Option<u64> {
        // Low half: bits that must be 1; high half: bits that may be.
        let pair = |must: u64, may: u64| must & 0xffff_ffff | may << 32;
        let plain = |word: Word| pair(u64::from(word.default1()), self.allowed(word).may);
        let exact = |word: Word| pair(self.allowed(word).must, self.allowed(word).may);
        let proc_has = |mask: u32| self.has(ControlBit { word: Word::Proc, mask: u64::from(mask) });
        let exists = match number {
            msr::BASIC..=msr::VMCS_ENUM => true,
            msr::PROCBASED_CTLS2 => proc_has(proc::SECONDARY),
            msr::EPT_VPID_CAP => self.has_proc2(proc2::EPT) || self.has_proc2(proc2::VPID),
            msr::TRUE_PINBASED_CTLS..=msr::TRUE_ENTRY_CTLS => self.has_basic(basic::TRUE_CONTROLS),
            msr::VMFUNC => self.has_proc2(proc2::VM_FUNCTIONS),
            msr::PROCBASED_CTLS3 => proc_has(proc::TERTIARY),
            msr::EXIT_CTLS2 => self.has(ControlBit { word: Word::Exit, mask: u64::from(exit::SECONDARY) }),
            _ => false,
        };
        if !self.present || !exists {
            return None;
        }
        Some(match number {
            msr::BASIC => self.basic,
            msr::PINBASED_CTLS => plain(Word::Pin),
            msr::PROCBASED_CTLS => plain(Word::Proc),
            msr::EXIT_CTLS => plain(Word::Exit),
            msr::ENTRY_CTLS => plain(Word::Entry),
            msr::MISC => self.misc,
            msr::CR0_FIXED0 => CR0_FIXED0,
            msr::CR0_FIXED1 => CR0_FIXED1,
            msr::CR4_FIXED0 => CR4_FIXED0,
            msr::CR4_FIXED1 => self.cr4_fixed1,
            msr::VMCS_ENUM => self.vmcs_enum(),
            msr::PROCBASED_CTLS2 => exact(Word::Proc2),
            msr::EPT_VPID_CAP => self.ept_vpid,
            msr::TRUE_PINBASED_CTLS => exact(Word::Pin),
            msr::TRUE_PROCBASED_CTLS => exact(Word::Proc),
            msr::TRUE_EXIT_CTLS => exact(Word::Exit),
            msr::TRUE_ENTRY_CTLS => exact(Word::Entry),
            msr::VMFUNC => self.allowed(Word::VmFunc).may,
            msr::PROCBASED_CTLS3 => self.allowed(Word::Proc3).may,
            _ => self.allowed(Word::Exit2).may,
        })
    }

    /// The highest index of any field, in bits 9:1.
    fn vmcs_enum(&self) -> u64 {
        let indexes = Field::ALL.iter().filter(|f| self.has_field(**f)).map(|f| u64::from(f.encoding()) & 0x3fe);
        indexes.max().unwrap_or(0)
    }

    /// The names of the rows that are there, or that are not.
    pub fn names(&self, there: bool) -> impl Iterator<Item = &'static str> + '_ {
        ROWS.iter().enumerate().filter(move |(i, _)| self.rows.has(*i) == there).map(|(_, row)| row.name)
    }

    /// The capability MSRs for people: each with its value, then what that says.
    #[must_use]
    pub fn show(&self) -> String {
        let mut out = String::new();
        for number in msr::FIRST..=msr::LAST {
            let Some(value) = self.msr(number) else { continue };
            let _ = writeln!(out, "MSR {number:#x}  {value:#018x} {}", msr::name(number));
            let word = match number {
                msr::TRUE_PINBASED_CTLS => Some(Word::Pin),
                msr::TRUE_PROCBASED_CTLS => Some(Word::Proc),
                msr::PROCBASED_CTLS2 => Some(Word::Proc2),
                msr::PROCBASED_CTLS3 => Some(Word::Proc3),
                msr::TRUE_EXIT_CTLS => Some(Word::Exit),
                msr::EXIT_CTLS2 => Some(Word::Exit2),
                msr::TRUE_ENTRY_CTLS => Some(Word::Entry),
                msr::VMFUNC => Some(Word::VmFunc),
                _ => None,
            };
            if let Some(word) = word {
                for (n, name) in word.names() {
                    let Allowed { must, may } = self.allowed(word);
                    if may >> n & 1 != 0 {
                        let fixed = if must >> n & 1 != 0 { " (must be 1)" } else { "" };
                        let _ = writeln!(out, "    bit {n:>2} {name}{fixed}");
                    }
                }
            } else if number == msr::EPT_VPID_CAP {
                for (n, name) in ept_vpid::NAMES.iter().filter(|(n, _)| value >> n & 1 != 0) {
                    let _ = writeln!(out, "    bit {n:>2} {name}");
                }
            } else if number == msr::BASIC {
                let _ = writeln!(out, "    revision {REVISION:#x}, region of 4096 bytes, write-back");
            } else if number == msr::MISC {
                let _ = writeln!(
                    out,
                    "    preemption timer TSC / {}, {CR3_TARGETS} CR3-target values, MSR lists of {MSR_LIST}",
                    1 << PREEMPTION_TIMER_SHIFT
                );
            }
        }
        out
    }
}

/// The rows that are implemented.
#[must_use]
pub fn implemented() -> RowSet {
    let mut set = RowSet::default();
    for (i, row) in ROWS.iter().enumerate() {
        set.set(i, row.on);
    }
    set
}

/// The row of this name.
#[must_use]
pub fn row_named(name: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.name == name)
}

const fn slot(place: Place) -> usize {
    match place {
        Place::Control(word) => word as usize,
        Place::EptVpid => 8,
        Place::Misc => 9,
        Place::Basic => 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model with every row, implemented or not.
    fn all_rows() -> Caps {
        Caps::with_rows(&CpuModel::max().set(Bit::Vmx, true), RowSet(u128::MAX))
    }

    fn implemented_caps() -> Caps {
        Caps::new(&CpuModel::max().set(Bit::Vmx, true), RowSet::default())
    }

    /// G2: the capability MSRs say what is implemented, and that only.
    #[test]
    fn g2_a_control_may_be_1_exactly_when_its_row_is_on() {
        let caps = implemented_caps();
        for (i, row) in ROWS.iter().enumerate() {
            if let Place::Control(word) = row.place {
                let in_default1 = u64::from(word.default1()) & row.mask != 0;
                assert_eq!(caps.allowed(word).may & row.mask != 0, caps.rows.has(i) || in_default1, "{}", row.name);
            }
            assert!(row.on || !caps.rows.has(i), "{} is not implemented", row.name);
        }
        // Nothing beside the rows and the default1 class.
        for word in Word::ALL {
            let rows: u64 = ROWS.iter().filter(|r| r.place == Place::Control(word)).map(|r| r.mask).sum();
            assert_eq!(caps.allowed(word).may & !(rows | u64::from(word.default1())), 0, "{word:?}");
        }
    }

    /// G2: the plain MSRs hold the default1 class at 1, the TRUE ones free three of its bits and a fourth.
    #[test]
    fn g2_true_controls_free_the_default1_bits_that_may_be_0() {
        let caps = implemented_caps();
        for (plain, exact, word, free) in [
            (msr::PINBASED_CTLS, msr::TRUE_PINBASED_CTLS, Word::Pin, 0),
            (msr::PROCBASED_CTLS, msr::TRUE_PROCBASED_CTLS, Word::Proc, 0x18000),
            (msr::EXIT_CTLS, msr::TRUE_EXIT_CTLS, Word::Exit, 4),
            (msr::ENTRY_CTLS, msr::TRUE_ENTRY_CTLS, Word::Entry, 4),
        ] {
            let (plain, exact) = (caps.msr(plain).unwrap(), caps.msr(exact).unwrap());
            assert_eq!(plain as u32, word.default1());
            assert_eq!(plain as u32 ^ exact as u32, free);
            assert_eq!(plain >> 32, exact >> 32);
            // What must be 1 may be 1.
            assert_eq!(exact as u32 & !((exact >> 32) as u32), 0);
            assert_eq!(plain as u32 & !((plain >> 32) as u32), 0);
        }
    }

    /// G2: a feature that another one needs takes that one with it.
    #[test]
    fn g2_features_go_with_what_they_need() {
        let model = CpuModel::max().set(Bit::Vmx, true);
        let without = |name: &str| {
            let mut rows = RowSet(u128::MAX);
            rows.set(row_named(name).unwrap(), false);
            Caps::with_rows(&model, rows)
        };
        let no_ept = without("vmx-ept");
        let of_ept = proc2::UNRESTRICTED_GUEST | proc2::PML | proc2::EPT_VIOLATION_VE | proc2::MODE_BASED_EXECUTE;
        assert_eq!(no_ept.allowed(Word::Proc2).may & u64::from(of_ept | proc2::SUB_PAGE_WRITE), 0);
        assert!(!no_ept.has_ept_vpid(ept_vpid::INVEPT_ALL) && no_ept.has_ept_vpid(ept_vpid::INVVPID_ALL));
        assert!(!no_ept.has_field(Field::Eptp) && !no_ept.has_field(Field::GuestPdpte0));
        let no_secondary = without("vmx-secondary-ctls");
        assert_eq!(no_secondary.allowed(Word::Proc2).may, 0);
        assert_eq!(no_secondary.msr(msr::PROCBASED_CTLS2), None);
        assert_eq!(no_secondary.msr(msr::EPT_VPID_CAP), None);
        assert!(!no_secondary.has_field(Field::Proc2Controls) && !no_secondary.has_field(Field::Vpid));
        let no_vid = without("vmx-apicv-vid");
        assert_eq!(no_vid.allowed(Word::Pin).may & u64::from(pin::POSTED_INTERRUPTS), 0);
        let no_true = without("vmx-true-ctls");
        assert_eq!(no_true.msr(msr::TRUE_PINBASED_CTLS), None);
        assert_eq!(no_true.allowed(Word::Proc).must, u64::from(Word::Proc.default1()));
        // Without RDTSCP in CPUID, no control for it.
        let caps = Caps::with_rows(&model.clone().set(Bit::Rdtscp, false), RowSet(u128::MAX));
        assert!(!caps.has_proc2(proc2::RDTSCP));
    }

    /// G2: the fields of absent features are absent, and IA32_VMX_VMCS_ENUM gives the highest index of those present.
    #[test]
    fn g2_fields_follow_features() {
        let caps = all_rows();
        for field in [Field::EptpListAddress, Field::PreemptionTimer, Field::TscMultiplier, Field::GuestCr0] {
            assert!(caps.has_field(field), "{field:?}");
        }
        for field in [Field::GuestSsp, Field::HlatPointer, Field::GuestPkrs, Field::GuestBndcfgs] {
            assert!(!caps.has_field(field), "{field:?}");
        }
        let highest =
            Field::ALL.iter().filter(|f| caps.has_field(**f)).map(|f| f.encoding() >> 1 & 0x1ff).max().unwrap();
        assert_eq!(caps.msr(msr::VMCS_ENUM), Some(u64::from(highest) << 1));
    }

    /// G2: the fixed bits of CR0 and CR4 and the constants of IA32_VMX_BASIC and IA32_VMX_MISC.
    #[test]
    fn g2_fixed_bits_and_basic_information() {
        let caps = implemented_caps();
        assert_eq!(caps.msr(msr::CR0_FIXED0), Some(0x8000_0021));
        assert_eq!(caps.msr(msr::CR0_FIXED1), Some(0xffff_ffff));
        assert_eq!(caps.msr(msr::CR4_FIXED0), Some(0x2000));
        let cr4 = caps.msr(msr::CR4_FIXED1).unwrap();
        assert_eq!(cr4 & 0x2000, 0x2000);
        assert_eq!(cr4 & twofold_arch::control::cr4::CET, 0, "what CPUID does not show is not in CR4");
        let basic = caps.msr(msr::BASIC).unwrap();
        assert_eq!((basic >> 31 & 1, basic >> 32 & 0x1fff, basic >> 50 & 15), (0, 4096, 6));
        assert_eq!(caps.msr(msr::MISC).unwrap() >> 16 & 0x1ff, 4);
        assert_eq!(caps.feature_control(), 5);
    }

    /// G2: no VMX, no MSRs, IA32_FEATURE_CONTROL locked without it.
    #[test]
    fn g2_without_vmx_there_is_nothing() {
        let caps = Caps::new(&CpuModel::max().set(Bit::Vmx, false), RowSet::default());
        assert!((0x400..0x500).all(|n| caps.msr(n).is_none()));
        assert_eq!(caps.feature_control(), 1);
        assert!(caps.show().is_empty());
        let with = implemented_caps();
        assert!((0x400..0x480).chain(0x494..0x500).all(|n| with.msr(n).is_none()));
    }

    /// G2: every name is there once, and the readable form tells of every control that may be 1.
    #[test]
    fn g2_shown_in_a_readable_form() {
        let caps = implemented_caps();
        let mut names: Vec<_> = ROWS.iter().map(|r| r.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
        let text = caps.show();
        for line in ["IA32_VMX_BASIC", "bit  1 enable EPT", "bit 16 CR3-store exiting", "bit  6 4-level EPT"] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
