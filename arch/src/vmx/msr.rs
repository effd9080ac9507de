//! The VMX capability MSRs: numbers and bits (SDM Vol 3D, "VMX Capability Reporting Facility").
#![allow(missing_docs)]

pub const BASIC: u32 = 0x480;
pub const PINBASED_CTLS: u32 = 0x481;
pub const PROCBASED_CTLS: u32 = 0x482;
pub const EXIT_CTLS: u32 = 0x483;
pub const ENTRY_CTLS: u32 = 0x484;
pub const MISC: u32 = 0x485;
pub const CR0_FIXED0: u32 = 0x486;
pub const CR0_FIXED1: u32 = 0x487;
pub const CR4_FIXED0: u32 = 0x488;
pub const CR4_FIXED1: u32 = 0x489;
pub const VMCS_ENUM: u32 = 0x48a;
pub const PROCBASED_CTLS2: u32 = 0x48b;
pub const EPT_VPID_CAP: u32 = 0x48c;
pub const TRUE_PINBASED_CTLS: u32 = 0x48d;
pub const TRUE_PROCBASED_CTLS: u32 = 0x48e;
pub const TRUE_EXIT_CTLS: u32 = 0x48f;
pub const TRUE_ENTRY_CTLS: u32 = 0x490;
pub const VMFUNC: u32 = 0x491;
pub const PROCBASED_CTLS3: u32 = 0x492;
pub const EXIT_CTLS2: u32 = 0x493;
/// First and last number of the range.
pub const FIRST: u32 = BASIC;
pub const LAST: u32 = EXIT_CTLS2;

/// The SDM's name of a capability MSR.
#[must_use]
pub const fn name(number: u32) -> &'static str {
    match number {
        BASIC => "IA32_VMX_BASIC",
        PINBASED_CTLS => "IA32_VMX_PINBASED_CTLS",
        PROCBASED_CTLS => "IA32_VMX_PROCBASED_CTLS",
        EXIT_CTLS => "IA32_VMX_EXIT_CTLS",
        ENTRY_CTLS => "IA32_VMX_ENTRY_CTLS",
        MISC => "IA32_VMX_MISC",
        CR0_FIXED0 => "IA32_VMX_CR0_FIXED0",
        CR0_FIXED1 => "IA32_VMX_CR0_FIXED1",
        CR4_FIXED0 => "IA32_VMX_CR4_FIXED0",
        CR4_FIXED1 => "IA32_VMX_CR4_FIXED1",
        VMCS_ENUM => "IA32_VMX_VMCS_ENUM",
        PROCBASED_CTLS2 => "IA32_VMX_PROCBASED_CTLS2",
        EPT_VPID_CAP => "IA32_VMX_EPT_VPID_CAP",
        TRUE_PINBASED_CTLS => "IA32_VMX_TRUE_PINBASED_CTLS",
        TRUE_PROCBASED_CTLS => "IA32_VMX_TRUE_PROCBASED_CTLS",
        TRUE_EXIT_CTLS => "IA32_VMX_TRUE_EXIT_CTLS",
        TRUE_ENTRY_CTLS => "IA32_VMX_TRUE_ENTRY_CTLS",
        VMFUNC => "IA32_VMX_VMFUNC",
        PROCBASED_CTLS3 => "IA32_VMX_PROCBASED_CTLS3",
        EXIT_CTLS2 => "IA32_VMX_EXIT_CTLS2",
        _ => "",
    }
}

/// IA32_VMX_BASIC: revision identifier 30:0, region size 44:32, memory type 53:50.
pub mod basic {
    pub const REGION_SIZE_SHIFT: u32 = 32;
    pub const PHYSICAL_32_BIT: u64 = 1 << 48;
    pub const DUAL_MONITOR: u64 = 1 << 49;
    pub const MEMORY_TYPE_SHIFT: u32 = 50;
    pub const INS_OUTS_INFO: u64 = 1 << 54;
    pub const TRUE_CONTROLS: u64 = 1 << 55;
    pub const NO_ERROR_CODE_CHECK: u64 = 1 << 56;
}

/// IA32_VMX_MISC: preemption-timer rate 4:0, CR3-target values 24:16, MSR-list size 27:25.
pub mod misc {
    pub const STORE_LMA: u64 = 1 << 5;
    pub const ACTIVITY_HLT: u64 = 1 << 6;
    pub const ACTIVITY_SHUTDOWN: u64 = 1 << 7;
    pub const ACTIVITY_WAIT_FOR_SIPI: u64 = 1 << 8;
    pub const INTEL_PT: u64 = 1 << 14;
    pub const READ_SMBASE: u64 = 1 << 15;
    pub const CR3_TARGETS_SHIFT: u32 = 16;
    pub const MSR_LIST_SHIFT: u32 = 25;
    pub const VMWRITE_ANY: u64 = 1 << 29;
    pub const INJECT_ZERO_LENGTH: u64 = 1 << 30;
}

/// IA32_VMX_EPT_VPID_CAP.
pub mod ept_vpid {
    pub const EXECUTE_ONLY: u64 = 1 << 0;
    pub const WALK_4: u64 = 1 << 6;
    pub const WALK_5: u64 = 1 << 7;
    pub const TYPE_UC: u64 = 1 << 8;
    pub const TYPE_WB: u64 = 1 << 14;
    pub const PAGES_2M: u64 = 1 << 16;
    pub const PAGES_1G: u64 = 1 << 17;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    pub const ADVANCED_EXIT_INFO: u64 = 1 << 22;
    pub const SUPERVISOR_SHADOW_STACK: u64 = 1 << 23;
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_ADDRESS: u64 = 1 << 40;
    pub const INVVPID_SINGLE: u64 = 1 << 41;
    pub const INVVPID_ALL: u64 = 1 << 42;
    pub const INVVPID_SINGLE_RETAINING_GLOBALS: u64 = 1 << 43;

    /// Each bit with a name for people.
    pub const NAMES: &[(u32, &str)] = &[
        (0, "execute-only pages"),
        (6, "4-level EPT"),
        (7, "5-level EPT"),
        (8, "EPT structures uncacheable"),
        (14, "EPT structures write-back"),
        (16, "2 MiB pages"),
        (17, "1 GiB pages"),
        (20, "INVEPT"),
        (21, "accessed and dirty flags"),
        (22, "advanced exit information for EPT violations"),
        (23, "supervisor shadow-stack control"),
        (25, "INVEPT single-context"),
        (26, "INVEPT all-context"),
        (32, "INVVPID"),
        (40, "INVVPID individual-address"),
        (41, "INVVPID single-context"),
        (42, "INVVPID all-context"),
        (43, "INVVPID single-context-retaining-globals"),
    ];
}
