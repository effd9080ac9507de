//! The VM-execution, VM-exit and VM-entry control words, bit by bit (SDM Vol 3C, "VM-Execution Control Fields" and on).

use super::field::Field;

/// A word of control bits that a capability MSR governs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs)]
pub enum Word {
    Pin,
    Proc,
    Proc2,
    Proc3,
    Exit,
    Exit2,
    Entry,
    VmFunc,
}

/// One control bit (or several) of a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ControlBit {
    /// The word.
    pub word: Word,
    /// The bits in it.
    pub mask: u64,
}

macro_rules! words {
    ($($(#[$doc:meta])* $module:ident $word:ident $ty:ident { $($bit:ident $n:literal $name:literal;)* })*) => {
        $(
            $(#[$doc])*
            pub mod $module {
                #![allow(missing_docs)]
                $(pub const $bit: $ty = 1 << $n;)*
                /// Each bit with the SDM's name for it.
                pub const NAMES: &[(u32, &str)] = &[$(($n, $name)),*];
            }
        )*
        impl Word {
            /// All of them.
            pub const ALL: [Word; 8] = [$(Word::$word),*];
            /// The bits of the word with their names, lowest first.
            #[must_use]
            pub const fn names(self) -> &'static [(u32, &'static str)] {
                match self { $(Word::$word => $module::NAMES),* }
            }
        }
    };
}

words! {
    /// Pin-based VM-execution controls.
    pin Pin u32 {
        EXTERNAL_INTERRUPT_EXITING 0 "external-interrupt exiting";
        NMI_EXITING 3 "NMI exiting";
        VIRTUAL_NMIS 5 "virtual NMIs";
        PREEMPTION_TIMER 6 "activate VMX-preemption timer";
        POSTED_INTERRUPTS 7 "process posted interrupts";
    }
    /// Primary processor-based VM-execution controls.
    proc Proc u32 {
        INTERRUPT_WINDOW_EXITING 2 "interrupt-window exiting";
        TSC_OFFSETTING 3 "use TSC offsetting";
        HLT_EXITING 7 "HLT exiting";
        INVLPG_EXITING 9 "INVLPG exiting";
        MWAIT_EXITING 10 "MWAIT exiting";
        RDPMC_EXITING 11 "RDPMC exiting";
        RDTSC_EXITING 12 "RDTSC exiting";
        CR3_LOAD_EXITING 15 "CR3-load exiting";
        CR3_STORE_EXITING 16 "CR3-store exiting";
        TERTIARY 17 "activate tertiary controls";
        CR8_LOAD_EXITING 19 "CR8-load exiting";
        CR8_STORE_EXITING 20 "CR8-store exiting";
        TPR_SHADOW 21 "use TPR shadow";
        NMI_WINDOW_EXITING 22 "NMI-window exiting";
        MOV_DR_EXITING 23 "MOV-DR exiting";
        UNCONDITIONAL_IO_EXITING 24 "unconditional I/O exiting";
        IO_BITMAPS 25 "use I/O bitmaps";
        MONITOR_TRAP_FLAG 27 "monitor trap flag";
        MSR_BITMAPS 28 "use MSR bitmaps";
        MONITOR_EXITING 29 "MONITOR exiting";
        PAUSE_EXITING 30 "PAUSE exiting";
        SECONDARY 31 "activate secondary controls";
    }
    /// Secondary processor-based VM-execution controls.
    proc2 Proc2 u32 {
        APIC_ACCESSES 0 "virtualize APIC accesses";
        EPT 1 "enable EPT";
        DESCRIPTOR_TABLE_EXITING 2 "descriptor-table exiting";
        RDTSCP 3 "enable RDTSCP";
        X2APIC_MODE 4 "virtualize x2APIC mode";
        VPID 5 "enable VPID";
        WBINVD_EXITING 6 "WBINVD exiting";
        UNRESTRICTED_GUEST 7 "unrestricted guest";
        APIC_REGISTERS 8 "APIC-register virtualization";
        VIRTUAL_INTERRUPT_DELIVERY 9 "virtual-interrupt delivery";
        PAUSE_LOOP_EXITING 10 "PAUSE-loop exiting";
        RDRAND_EXITING 11 "RDRAND exiting";
        INVPCID 12 "enable INVPCID";
        VM_FUNCTIONS 13 "enable VM functions";
        VMCS_SHADOWING 14 "VMCS shadowing";
        ENCLS_EXITING 15 "enable ENCLS exiting";
        RDSEED_EXITING 16 "RDSEED exiting";
        PML 17 "enable PML";
        EPT_VIOLATION_VE 18 "EPT-violation #VE";
        CONCEAL_FROM_PT 19 "conceal VMX from PT";
        XSAVES 20 "enable XSAVES/XRSTORS";
        PASID_TRANSLATION 21 "PASID translation";
        MODE_BASED_EXECUTE 22 "mode-based execute control for EPT";
        SUB_PAGE_WRITE 23 "sub-page write permissions for EPT";
        PT_GUEST_PHYSICAL 24 "Intel PT uses guest physical addresses";
        TSC_SCALING 25 "use TSC scaling";
        USER_WAIT 26 "enable user wait and pause";
        PCONFIG 27 "enable PCONFIG";
        ENCLV_EXITING 28 "enable ENCLV exiting";
        BUS_LOCK_DETECTION 30 "VMM bus-lock detection";
        INSTRUCTION_TIMEOUT 31 "instruction timeout";
    }
    /// Tertiary processor-based VM-execution controls.
    proc3 Proc3 u64 {
        LOADIWKEY_EXITING 0 "LOADIWKEY exiting";
        HLAT 1 "enable HLAT";
        EPT_PAGING_WRITE 2 "EPT paging-write control";
        GUEST_PAGING_VERIFICATION 3 "guest-paging verification";
        IPI_VIRTUALIZATION 4 "IPI virtualization";
        MSR_LISTS 6 "enable MSR-list instructions";
        VIRTUALIZE_SPEC_CTRL 7 "virtualize IA32_SPEC_CTRL";
    }
    /// Primary VM-exit controls.
    exit Exit u32 {
        SAVE_DEBUG_CONTROLS 2 "save debug controls";
        HOST_ADDRESS_SPACE_SIZE 9 "host address-space size";
        LOAD_PERF_GLOBAL_CTRL 12 "load IA32_PERF_GLOBAL_CTRL";
        ACKNOWLEDGE_INTERRUPT 15 "acknowledge interrupt on exit";
        SAVE_PAT 18 "save IA32_PAT";
        LOAD_PAT 19 "load IA32_PAT";
        SAVE_EFER 20 "save IA32_EFER";
        LOAD_EFER 21 "load IA32_EFER";
        SAVE_PREEMPTION_TIMER 22 "save VMX-preemption timer value";
        CLEAR_BNDCFGS 23 "clear IA32_BNDCFGS";
        CONCEAL_FROM_PT 24 "conceal VMX from PT";
        CLEAR_RTIT_CTL 25 "clear IA32_RTIT_CTL";
        CLEAR_LBR_CTL 26 "clear IA32_LBR_CTL";
        CLEAR_UINV 27 "clear UINV";
        LOAD_CET 28 "load CET state";
        LOAD_PKRS 29 "load PKRS";
        SAVE_PERF_GLOBAL_CTRL 30 "save IA32_PERF_GLOBAL_CTRL";
        SECONDARY 31 "activate secondary controls";
    }
    /// Secondary VM-exit controls.
    exit2 Exit2 u64 {
        SAVE_FRED 0 "save FRED state";
        LOAD_FRED 1 "load FRED state";
        PREMATURELY_BUSY_SHADOW_STACK 3 "prematurely busy shadow stack";
    }
    /// VM-entry controls.
    entry Entry u32 {
        LOAD_DEBUG_CONTROLS 2 "load debug controls";
        IA32E_MODE_GUEST 9 "IA-32e mode guest";
        ENTRY_TO_SMM 10 "entry to SMM";
        DEACTIVATE_DUAL_MONITOR 11 "deactivate dual-monitor treatment";
        LOAD_PERF_GLOBAL_CTRL 13 "load IA32_PERF_GLOBAL_CTRL";
        LOAD_PAT 14 "load IA32_PAT";
        LOAD_EFER 15 "load IA32_EFER";
        LOAD_BNDCFGS 16 "load IA32_BNDCFGS";
        CONCEAL_FROM_PT 17 "conceal VMX from PT";
        LOAD_RTIT_CTL 18 "load IA32_RTIT_CTL";
        LOAD_UINV 19 "load UINV";
        LOAD_CET 20 "load CET state";
        LOAD_LBR_CTL 21 "load guest IA32_LBR_CTL";
        LOAD_PKRS 22 "load PKRS";
    }
    /// VM-function controls: bit n enables VM function n.
    vmfunc VmFunc u64 {
        EPTP_SWITCHING 0 "EPTP switching";
    }
}

impl Word {
    /// The VMCS field that holds the word.
    #[must_use]
    pub const fn field(self) -> Field {
        match self {
            Word::Pin => Field::PinControls,
            Word::Proc => Field::ProcControls,
            Word::Proc2 => Field::Proc2Controls,
            Word::Proc3 => Field::Proc3Controls,
            Word::Exit => Field::ExitControls,
            Word::Exit2 => Field::Exit2Controls,
            Word::Entry => Field::EntryControls,
            Word::VmFunc => Field::VmFunctionControls,
        }
    }
    /// What people call the word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Word::Pin => "pin-based VM-execution controls",
            Word::Proc => "primary processor-based VM-execution controls",
            Word::Proc2 => "secondary processor-based VM-execution controls",
            Word::Proc3 => "tertiary processor-based VM-execution controls",
            Word::Exit => "primary VM-exit controls",
            Word::Exit2 => "secondary VM-exit controls",
            Word::Entry => "VM-entry controls",
            Word::VmFunc => "VM-function controls",
        }
    }
    /// The bits that are reserved with the value 1 where the TRUE capability MSRs do not say otherwise: the default1 class
    /// (SDM Vol 3D, "Reserved Controls and Default Settings").
    #[must_use]
    pub const fn default1(self) -> u32 {
        match self {
            Word::Pin => 0x0000_0016,
            Word::Proc => 0x0401_e172,
            Word::Exit => 0x0003_6dff,
            Word::Entry => 0x0000_11ff,
            _ => 0,
        }
    }
    /// The name of bit `n`, if it has one.
    #[must_use]
    pub fn bit_name(self, n: u32) -> Option<&'static str> {
        self.names().iter().find(|(bit, _)| *bit == n).map(|(_, name)| *name)
    }
}
