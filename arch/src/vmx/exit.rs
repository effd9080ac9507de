//! VM exits: basic exit reasons with their names, the exit-reason field's flags, qualifications of entry failures
//! (SDM Vol 3D, "VMX Basic Exit Reasons"; Vol 3C, "Basic VM-Exit Information").

use super::error::numbered;

numbered! {
    /// A basic exit reason.
    ExitReason u16 {
        ExceptionOrNmi 0 "exception or NMI";
        ExternalInterrupt 1 "external interrupt";
        TripleFault 2 "triple fault";
        Init 3 "INIT signal";
        Sipi 4 "start-up IPI";
        IoSmi 5 "I/O SMI";
        OtherSmi 6 "other SMI";
        InterruptWindow 7 "interrupt window";
        NmiWindow 8 "NMI window";
        TaskSwitch 9 "task switch";
        Cpuid 10 "CPUID";
        Getsec 11 "GETSEC";
        Hlt 12 "HLT";
        Invd 13 "INVD";
        Invlpg 14 "INVLPG";
        Rdpmc 15 "RDPMC";
        Rdtsc 16 "RDTSC";
        Rsm 17 "RSM";
        Vmcall 18 "VMCALL";
        Vmclear 19 "VMCLEAR";
        Vmlaunch 20 "VMLAUNCH";
        Vmptrld 21 "VMPTRLD";
        Vmptrst 22 "VMPTRST";
        Vmread 23 "VMREAD";
        Vmresume 24 "VMRESUME";
        Vmwrite 25 "VMWRITE";
        Vmxoff 26 "VMXOFF";
        Vmxon 27 "VMXON";
        ControlRegister 28 "control-register access";
        MovDr 29 "MOV DR";
        Io 30 "I/O instruction";
        Rdmsr 31 "RDMSR";
        Wrmsr 32 "WRMSR";
        EntryGuestState 33 "VM-entry failure: invalid guest state";
        EntryMsrLoading 34 "VM-entry failure: MSR loading";
        Mwait 36 "MWAIT";
        MonitorTrapFlag 37 "monitor trap flag";
        Monitor 39 "MONITOR";
        Pause 40 "PAUSE";
        EntryMachineCheck 41 "VM-entry failure: machine-check event";
        TprBelowThreshold 43 "TPR below threshold";
        ApicAccess 44 "APIC access";
        VirtualizedEoi 45 "virtualized EOI";
        GdtrIdtr 46 "access to GDTR or IDTR";
        LdtrTr 47 "access to LDTR or TR";
        EptViolation 48 "EPT violation";
        EptMisconfiguration 49 "EPT misconfiguration";
        Invept 50 "INVEPT";
        Rdtscp 51 "RDTSCP";
        PreemptionTimer 52 "VMX-preemption timer expired";
        Invvpid 53 "INVVPID";
        Wbinvd 54 "WBINVD or WBNOINVD";
        Xsetbv 55 "XSETBV";
        ApicWrite 56 "APIC write";
        Rdrand 57 "RDRAND";
        Invpcid 58 "INVPCID";
        Vmfunc 59 "VMFUNC";
        Encls 60 "ENCLS";
        Rdseed 61 "RDSEED";
        PageModificationLogFull 62 "page-modification log full";
        Xsaves 63 "XSAVES";
        Xrstors 64 "XRSTORS";
        Pconfig 65 "PCONFIG";
        SubPagePermission 66 "SPP-related event";
        Umwait 67 "UMWAIT";
        Tpause 68 "TPAUSE";
        Loadiwkey 69 "LOADIWKEY";
        Enclv 70 "ENCLV";
        EnqcmdPasid 72 "ENQCMD PASID translation failure";
        EnqcmdsPasid 73 "ENQCMDS PASID translation failure";
        BusLock 74 "bus lock";
        InstructionTimeout 75 "instruction timeout";
        Seamcall 76 "SEAMCALL";
        Tdcall 77 "TDCALL";
        Rdmsrlist 78 "RDMSRLIST";
        Wrmsrlist 79 "WRMSRLIST";
    }
}

/// Highest basic exit reason plus one: the size of a table by reason.
pub const EXIT_REASONS: usize = 80;

/// Flags of the exit-reason field above the basic reason.
pub mod flag {
    #![allow(missing_docs)]
    pub const BUSY_SHADOW_STACK: u32 = 1 << 25;
    pub const BUS_LOCK: u32 = 1 << 26;
    pub const ENCLAVE: u32 = 1 << 27;
    pub const PENDING_MTF: u32 = 1 << 28;
    pub const FROM_ROOT: u32 = 1 << 29;
    pub const ENTRY_FAILURE: u32 = 1 << 31;
}

/// The exit qualification of a VM-entry failure due to invalid guest state (SDM Vol 3C, "VM-Entry Failures During or After
/// Loading Guest State"). After a failure of MSR loading the qualification is the number of the entry in the MSR area
/// instead, the first being 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u64)]
pub enum EntryFailure {
    /// Any check that has no number of its own.
    Other = 0,
    /// A PDPTE that was to be loaded has a reserved bit set.
    Pdpte = 2,
    /// Injection of an NMI into a guest that blocks events by STI.
    NmiBlockedBySti = 3,
    /// An invalid VMCS link pointer.
    LinkPointer = 4,
}
