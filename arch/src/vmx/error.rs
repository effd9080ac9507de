//! Why a VMX instruction failed: VM-instruction error numbers, and VMX-abort indicators (SDM Vol 3C, "VM Instruction Error
//! Numbers", "VMX Aborts").

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident $ty:ident { $($variant:ident $n:literal $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr($ty)]
        #[allow(missing_docs)]
        pub enum $name { $($variant = $n),* }

        impl $name {
            /// All of them.
            pub const ALL: &[$name] = &[$($name::$variant),*];
            /// The number software sees.
            #[must_use]
            pub const fn number(self) -> $ty {
                self as $ty
            }
            /// What the SDM calls it.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
            /// The one with this number.
            #[must_use]
            pub const fn from_number(n: $ty) -> Option<Self> {
                match n { $($n => Some($name::$variant),)* _ => None }
            }
        }
    };
}
pub(super) use numbered;

numbered! {
    /// A VM-instruction error number: what VMfailValid leaves in the VM-instruction error field.
    VmError u32 {
        VmcallInRoot 1 "VMCALL executed in VMX root operation";
        VmclearAddress 2 "VMCLEAR with invalid physical address";
        VmclearVmxonPointer 3 "VMCLEAR with VMXON pointer";
        VmlaunchNotClear 4 "VMLAUNCH with non-clear VMCS";
        VmresumeNotLaunched 5 "VMRESUME with non-launched VMCS";
        VmresumeAfterVmxoff 6 "VMRESUME after VMXOFF";
        EntryControls 7 "VM entry with invalid control field(s)";
        EntryHostState 8 "VM entry with invalid host-state field(s)";
        VmptrldAddress 9 "VMPTRLD with invalid physical address";
        VmptrldVmxonPointer 10 "VMPTRLD with VMXON pointer";
        VmptrldRevision 11 "VMPTRLD with incorrect VMCS revision identifier";
        UnsupportedField 12 "VMREAD/VMWRITE from/to unsupported VMCS component";
        ReadOnlyField 13 "VMWRITE to read-only VMCS component";
        VmxonInRoot 15 "VMXON executed in VMX root operation";
        EntryExecutivePointer 16 "VM entry with invalid executive-VMCS pointer";
        EntryExecutiveNotLaunched 17 "VM entry with non-launched executive VMCS";
        EntryExecutiveNotVmxon 18 "VM entry with executive-VMCS pointer not VMXON pointer";
        VmcallNotClear 19 "VMCALL with non-clear VMCS";
        VmcallExitControls 20 "VMCALL with invalid VM-exit control fields";
        VmcallMsegRevision 22 "VMCALL with incorrect MSEG revision identifier";
        VmxoffDualMonitor 23 "VMXOFF under dual-monitor treatment of SMIs and SMM";
        VmcallSmmFeatures 24 "VMCALL with invalid SMM-monitor features";
        EntryExecutiveControls 25 "VM entry with invalid VM-execution control fields in executive VMCS";
        EntryBlockedByMovSs 26 "VM entry with events blocked by MOV SS";
        InvalidOperand 28 "Invalid operand to INVEPT/INVVPID";
    }
}

numbered! {
    /// A VMX-abort indicator: what a VMX abort leaves in bytes 7:4 of the VMCS region.
    Abort u32 {
        SavingGuestMsrs 1 "failure in saving guest MSRs";
        HostPdptes 2 "host checking of the page-directory-pointer-table entries failed";
        CorruptVmcs 3 "current VMCS corrupted";
        LoadingHostMsrs 4 "failure on loading host MSRs";
        MachineCheck 5 "machine-check event during VM exit";
        HostNotIa32e 6 "in IA-32e mode before the VM exit and \"host address-space size\" was 0";
    }
}
