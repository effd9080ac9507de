//! VMCS fields: encodings, widths, kinds, names, and a dense index for storage (SDM Vol 3D, "Field Encoding in VMCS").
//!
//! [`Field`]'s value is the dense index; [`Field::decode`] takes what VMREAD and VMWRITE are given. Invariant: the enum is in
//! the order of the encodings, so that the index order is the architecture's.

use super::control::{ControlBit, Word, entry, exit, pin, proc, proc2, proc3, vmfunc};

/// How wide a field is (bits 14:13 of the encoding).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Width {
    W16 = 0,
    W64 = 1,
    W32 = 2,
    Natural = 3,
}

/// What a field is for (bits 11:10 of the encoding).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Kind {
    Control = 0,
    ReadOnly = 1,
    Guest = 2,
    Host = 3,
}

/// Which part of a field an encoding names (bit 0: the access type).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Part {
    /// All of it.
    Full,
    /// Bits 63:32 of a 64-bit field.
    High,
}

macro_rules! fields {
    ($($variant:ident $encoding:literal $name:literal $([$($need:path, $word:ident),*])?;)*) => {
        /// A VMCS field. `as usize` is its dense index.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Field { $($variant),* }

        /// Number of fields.
        pub const COUNT: usize = [$(Field::$variant),*].len();

        impl Field {
            /// All fields, in the order of their encodings.
            pub const ALL: [Field; COUNT] = [$(Field::$variant),*];
        }

        const ENCODINGS: [u16; COUNT] = [$($encoding),*];
        const NAMES: [&str; COUNT] = [$($name),*];
        const NEEDS: [&[ControlBit]; COUNT] = [$(&[$($(ControlBit { word: Word::$word, mask: $need as u64 }),*)?]),*];
    };
}

fields! {
    // 16-bit control fields.
    Vpid 0x0000 "virtual-processor identifier (VPID)" [proc2::VPID, Proc2];
    PostedInterruptVector 0x0002 "posted-interrupt notification vector" [pin::POSTED_INTERRUPTS, Pin];
    EptpIndex 0x0004 "EPTP index" [proc2::EPT_VIOLATION_VE, Proc2];
    HlatPrefixSize 0x0006 "HLAT prefix size" [proc3::HLAT, Proc3];
    LastPidPointerIndex 0x0008 "last PID-pointer index" [proc3::IPI_VIRTUALIZATION, Proc3];
    // 16-bit guest-state fields.
    GuestEsSelector 0x0800 "guest ES selector";
    GuestCsSelector 0x0802 "guest CS selector";
    GuestSsSelector 0x0804 "guest SS selector";
    GuestDsSelector 0x0806 "guest DS selector";
    GuestFsSelector 0x0808 "guest FS selector";
    GuestGsSelector 0x080a "guest GS selector";
    GuestLdtrSelector 0x080c "guest LDTR selector";
    GuestTrSelector 0x080e "guest TR selector";
    GuestInterruptStatus 0x0810 "guest interrupt status" [proc2::VIRTUAL_INTERRUPT_DELIVERY, Proc2];
    PmlIndex 0x0812 "PML index" [proc2::PML, Proc2];
    GuestUinv 0x0814 "guest UINV" [entry::LOAD_UINV, Entry];
    // 16-bit host-state fields.
    HostEsSelector 0x0c00 "host ES selector";
    HostCsSelector 0x0c02 "host CS selector";
    HostSsSelector 0x0c04 "host SS selector";
    HostDsSelector 0x0c06 "host DS selector";
    HostFsSelector 0x0c08 "host FS selector";
    HostGsSelector 0x0c0a "host GS selector";
    HostTrSelector 0x0c0c "host TR selector";
    // 64-bit control fields.
    IoBitmapA 0x2000 "address of I/O bitmap A";
    IoBitmapB 0x2002 "address of I/O bitmap B";
    MsrBitmap 0x2004 "address of MSR bitmaps" [proc::MSR_BITMAPS, Proc];
    ExitMsrStoreAddress 0x2006 "VM-exit MSR-store address";
    ExitMsrLoadAddress 0x2008 "VM-exit MSR-load address";
    EntryMsrLoadAddress 0x200a "VM-entry MSR-load address";
    ExecutiveVmcsPointer 0x200c "executive-VMCS pointer";
    PmlAddress 0x200e "PML address" [proc2::PML, Proc2];
    TscOffset 0x2010 "TSC offset" [proc::TSC_OFFSETTING, Proc];
    VirtualApicAddress 0x2012 "virtual-APIC address" [proc::TPR_SHADOW, Proc];
    ApicAccessAddress 0x2014 "APIC-access address" [proc2::APIC_ACCESSES, Proc2];
    PostedInterruptDescriptor 0x2016 "posted-interrupt descriptor address" [pin::POSTED_INTERRUPTS, Pin];
    VmFunctionControls 0x2018 "VM-function controls" [proc2::VM_FUNCTIONS, Proc2];
    Eptp 0x201a "EPT pointer (EPTP)" [proc2::EPT, Proc2];
    EoiExitBitmap0 0x201c "EOI-exit bitmap 0" [proc2::VIRTUAL_INTERRUPT_DELIVERY, Proc2];
    EoiExitBitmap1 0x201e "EOI-exit bitmap 1" [proc2::VIRTUAL_INTERRUPT_DELIVERY, Proc2];
    EoiExitBitmap2 0x2020 "EOI-exit bitmap 2" [proc2::VIRTUAL_INTERRUPT_DELIVERY, Proc2];
    EoiExitBitmap3 0x2022 "EOI-exit bitmap 3" [proc2::VIRTUAL_INTERRUPT_DELIVERY, Proc2];
    EptpListAddress 0x2024 "EPTP-list address" [vmfunc::EPTP_SWITCHING, VmFunc];
    VmreadBitmap 0x2026 "VMREAD-bitmap address" [proc2::VMCS_SHADOWING, Proc2];
    VmwriteBitmap 0x2028 "VMWRITE-bitmap address" [proc2::VMCS_SHADOWING, Proc2];
    VeInformationAddress 0x202a "virtualization-exception information address" [proc2::EPT_VIOLATION_VE, Proc2];
    XssExitingBitmap 0x202c "XSS-exiting bitmap" [proc2::XSAVES, Proc2];
    EnclsExitingBitmap 0x202e "ENCLS-exiting bitmap" [proc2::ENCLS_EXITING, Proc2];
    SubPagePermissionTable 0x2030 "sub-page-permission-table pointer" [proc2::SUB_PAGE_WRITE, Proc2];
    TscMultiplier 0x2032 "TSC multiplier" [proc2::TSC_SCALING, Proc2];
    Proc3Controls 0x2034 "tertiary processor-based VM-execution controls" [proc::TERTIARY, Proc];
    EnclvExitingBitmap 0x2036 "ENCLV-exiting bitmap" [proc2::ENCLV_EXITING, Proc2];
    LowPasidDirectory 0x2038 "low PASID directory address" [proc2::PASID_TRANSLATION, Proc2];
    HighPasidDirectory 0x203a "high PASID directory address" [proc2::PASID_TRANSLATION, Proc2];
    PconfigExitingBitmap 0x203e "PCONFIG-exiting bitmap" [proc2::PCONFIG, Proc2];
    HlatPointer 0x2040 "HLAT pointer (HLATP)" [proc3::HLAT, Proc3];
    PidPointerTable 0x2042 "PID-pointer table address" [proc3::IPI_VIRTUALIZATION, Proc3];
    Exit2Controls 0x2044 "secondary VM-exit controls" [exit::SECONDARY, Exit];
    SpecCtrlMask 0x204a "IA32_SPEC_CTRL mask" [proc3::VIRTUALIZE_SPEC_CTRL, Proc3];
    SpecCtrlShadow 0x204c "IA32_SPEC_CTRL shadow" [proc3::VIRTUALIZE_SPEC_CTRL, Proc3];
    // 64-bit read-only data fields.
    GuestPhysicalAddress 0x2400 "guest-physical address" [proc2::EPT, Proc2];
    // 64-bit guest-state fields.
    VmcsLinkPointer 0x2800 "VMCS link pointer";
    GuestDebugctl 0x2802 "guest IA32_DEBUGCTL";
    GuestPat 0x2804 "guest IA32_PAT" [entry::LOAD_PAT, Entry, exit::SAVE_PAT, Exit];
    GuestEfer 0x2806 "guest IA32_EFER" [entry::LOAD_EFER, Entry, exit::SAVE_EFER, Exit];
    GuestPerfGlobalCtrl 0x2808 "guest IA32_PERF_GLOBAL_CTRL" [entry::LOAD_PERF_GLOBAL_CTRL, Entry];
    GuestPdpte0 0x280a "guest PDPTE0" [proc2::EPT, Proc2];
    GuestPdpte1 0x280c "guest PDPTE1" [proc2::EPT, Proc2];
    GuestPdpte2 0x280e "guest PDPTE2" [proc2::EPT, Proc2];
    GuestPdpte3 0x2810 "guest PDPTE3" [proc2::EPT, Proc2];
    GuestBndcfgs 0x2812 "guest IA32_BNDCFGS" [entry::LOAD_BNDCFGS, Entry, exit::CLEAR_BNDCFGS, Exit];
    GuestRtitCtl 0x2814 "guest IA32_RTIT_CTL" [entry::LOAD_RTIT_CTL, Entry, exit::CLEAR_RTIT_CTL, Exit];
    GuestLbrCtl 0x2816 "guest IA32_LBR_CTL" [entry::LOAD_LBR_CTL, Entry];
    GuestPkrs 0x2818 "guest IA32_PKRS" [entry::LOAD_PKRS, Entry];
    // 64-bit host-state fields.
    HostPat 0x2c00 "host IA32_PAT" [exit::LOAD_PAT, Exit];
    HostEfer 0x2c02 "host IA32_EFER" [exit::LOAD_EFER, Exit];
    HostPerfGlobalCtrl 0x2c04 "host IA32_PERF_GLOBAL_CTRL" [exit::LOAD_PERF_GLOBAL_CTRL, Exit];
    HostPkrs 0x2c06 "host IA32_PKRS" [exit::LOAD_PKRS, Exit];
    // 32-bit control fields.
    PinControls 0x4000 "pin-based VM-execution controls";
    ProcControls 0x4002 "primary processor-based VM-execution controls";
    ExceptionBitmap 0x4004 "exception bitmap";
    PageFaultMask 0x4006 "page-fault error-code mask";
    PageFaultMatch 0x4008 "page-fault error-code match";
    Cr3TargetCount 0x400a "CR3-target count";
    ExitControls 0x400c "primary VM-exit controls";
    ExitMsrStoreCount 0x400e "VM-exit MSR-store count";
    ExitMsrLoadCount 0x4010 "VM-exit MSR-load count";
    EntryControls 0x4012 "VM-entry controls";
    EntryMsrLoadCount 0x4014 "VM-entry MSR-load count";
    EntryInterruptionInfo 0x4016 "VM-entry interruption-information field";
    EntryErrorCode 0x4018 "VM-entry exception error code";
    EntryInstructionLength 0x401a "VM-entry instruction length";
    TprThreshold 0x401c "TPR threshold" [proc::TPR_SHADOW, Proc];
    Proc2Controls 0x401e "secondary processor-based VM-execution controls" [proc::SECONDARY, Proc];
    PleGap 0x4020 "PLE_Gap" [proc2::PAUSE_LOOP_EXITING, Proc2];
    PleWindow 0x4022 "PLE_Window" [proc2::PAUSE_LOOP_EXITING, Proc2];
    InstructionTimeoutControl 0x4024 "instruction-timeout control" [proc2::INSTRUCTION_TIMEOUT, Proc2];
    // 32-bit read-only data fields.
    InstructionError 0x4400 "VM-instruction error";
    ExitReason 0x4402 "exit reason";
    ExitInterruptionInfo 0x4404 "VM-exit interruption information";
    ExitErrorCode 0x4406 "VM-exit interruption error code";
    IdtVectoringInfo 0x4408 "IDT-vectoring information field";
    IdtVectoringErrorCode 0x440a "IDT-vectoring error code";
    ExitInstructionLength 0x440c "VM-exit instruction length";
    ExitInstructionInfo 0x440e "VM-exit instruction information";
    // 32-bit guest-state fields.
    GuestEsLimit 0x4800 "guest ES limit";
    GuestCsLimit 0x4802 "guest CS limit";
    GuestSsLimit 0x4804 "guest SS limit";
    GuestDsLimit 0x4806 "guest DS limit";
    GuestFsLimit 0x4808 "guest FS limit";
    GuestGsLimit 0x480a "guest GS limit";
    GuestLdtrLimit 0x480c "guest LDTR limit";
    GuestTrLimit 0x480e "guest TR limit";
    GuestGdtrLimit 0x4810 "guest GDTR limit";
    GuestIdtrLimit 0x4812 "guest IDTR limit";
    GuestEsAccessRights 0x4814 "guest ES access rights";
    GuestCsAccessRights 0x4816 "guest CS access rights";
    GuestSsAccessRights 0x4818 "guest SS access rights";
    GuestDsAccessRights 0x481a "guest DS access rights";
    GuestFsAccessRights 0x481c "guest FS access rights";
    GuestGsAccessRights 0x481e "guest GS access rights";
    GuestLdtrAccessRights 0x4820 "guest LDTR access rights";
    GuestTrAccessRights 0x4822 "guest TR access rights";
    GuestInterruptibility 0x4824 "guest interruptibility state";
    GuestActivity 0x4826 "guest activity state";
    GuestSmbase 0x4828 "guest SMBASE";
    GuestSysenterCs 0x482a "guest IA32_SYSENTER_CS";
    PreemptionTimer 0x482e "VMX-preemption timer value" [pin::PREEMPTION_TIMER, Pin];
    // 32-bit host-state fields.
    HostSysenterCs 0x4c00 "host IA32_SYSENTER_CS";
    // Natural-width control fields.
    Cr0Mask 0x6000 "CR0 guest/host mask";
    Cr4Mask 0x6002 "CR4 guest/host mask";
    Cr0Shadow 0x6004 "CR0 read shadow";
    Cr4Shadow 0x6006 "CR4 read shadow";
    Cr3Target0 0x6008 "CR3-target value 0";
    Cr3Target1 0x600a "CR3-target value 1";
    Cr3Target2 0x600c "CR3-target value 2";
    Cr3Target3 0x600e "CR3-target value 3";
    // Natural-width read-only data fields.
    ExitQualification 0x6400 "exit qualification";
    IoRcx 0x6402 "I/O RCX";
    IoRsi 0x6404 "I/O RSI";
    IoRdi 0x6406 "I/O RDI";
    IoRip 0x6408 "I/O RIP";
    GuestLinearAddress 0x640a "guest-linear address";
    // Natural-width guest-state fields.
    GuestCr0 0x6800 "guest CR0";
    GuestCr3 0x6802 "guest CR3";
    GuestCr4 0x6804 "guest CR4";
    GuestEsBase 0x6806 "guest ES base";
    GuestCsBase 0x6808 "guest CS base";
    GuestSsBase 0x680a "guest SS base";
    GuestDsBase 0x680c "guest DS base";
    GuestFsBase 0x680e "guest FS base";
    GuestGsBase 0x6810 "guest GS base";
    GuestLdtrBase 0x6812 "guest LDTR base";
    GuestTrBase 0x6814 "guest TR base";
    GuestGdtrBase 0x6816 "guest GDTR base";
    GuestIdtrBase 0x6818 "guest IDTR base";
    GuestDr7 0x681a "guest DR7";
    GuestRsp 0x681c "guest RSP";
    GuestRip 0x681e "guest RIP";
    GuestRflags 0x6820 "guest RFLAGS";
    GuestPendingDebug 0x6822 "guest pending debug exceptions";
    GuestSysenterEsp 0x6824 "guest IA32_SYSENTER_ESP";
    GuestSysenterEip 0x6826 "guest IA32_SYSENTER_EIP";
    GuestSCet 0x6828 "guest IA32_S_CET" [entry::LOAD_CET, Entry];
    GuestSsp 0x682a "guest SSP" [entry::LOAD_CET, Entry];
    GuestSspTable 0x682c "guest IA32_INTERRUPT_SSP_TABLE_ADDR" [entry::LOAD_CET, Entry];
    // Natural-width host-state fields.
    HostCr0 0x6c00 "host CR0";
    HostCr3 0x6c02 "host CR3";
    HostCr4 0x6c04 "host CR4";
    HostFsBase 0x6c06 "host FS base";
    HostGsBase 0x6c08 "host GS base";
    HostTrBase 0x6c0a "host TR base";
    HostGdtrBase 0x6c0c "host GDTR base";
    HostIdtrBase 0x6c0e "host IDTR base";
    HostSysenterEsp 0x6c10 "host IA32_SYSENTER_ESP";
    HostSysenterEip 0x6c12 "host IA32_SYSENTER_EIP";
    HostRsp 0x6c14 "host RSP";
    HostRip 0x6c16 "host RIP";
    HostSCet 0x6c18 "host IA32_S_CET" [exit::LOAD_CET, Exit];
    HostSsp 0x6c1a "host SSP" [exit::LOAD_CET, Exit];
    HostSspTable 0x6c1c "host IA32_INTERRUPT_SSP_TABLE_ADDR" [exit::LOAD_CET, Exit];
}

/// Indexes 0 … 63 of each width and kind; 255: no such field.
const BY_ENCODING: [[u8; 64]; 16] = {
    let mut table = [[u8::MAX; 64]; 16];
    let mut i = 0;
    while i < COUNT {
        let e = ENCODINGS[i] as usize;
        assert!(e & 1 == 0 && e >> 1 & 0x1ff < 64 && e & 0x9000 == 0, "not an encoding of a full field");
        assert!(i == 0 || ENCODINGS[i - 1] < ENCODINGS[i], "fields are in the order of their encodings");
        table[e >> 13 << 2 | e >> 10 & 3][e >> 1 & 63] = i as u8;
        i += 1;
    }
    assert!(COUNT < u8::MAX as usize);
    table
};

impl Field {
    /// The field and the part of it that an operand of VMREAD or VMWRITE names.
    #[inline]
    #[must_use]
    pub const fn decode(encoding: u64) -> Option<(Field, Part)> {
        if encoding & !0x6fff != 0 || encoding >> 1 & 0x1ff > 63 {
            return None;
        }
        let e = encoding as usize;
        let i = BY_ENCODING[e >> 13 << 2 | e >> 10 & 3][e >> 1 & 63];
        if i == u8::MAX {
            return None;
        }
        let field = Field::ALL[i as usize];
        match (e & 1, field.width()) {
            (0, _) => Some((field, Part::Full)),
            (_, Width::W64) => Some((field, Part::High)),
            _ => None,
        }
    }
    /// The dense index, below [`COUNT`].
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
    /// The encoding of the full field.
    #[inline]
    #[must_use]
    pub const fn encoding(self) -> u32 {
        ENCODINGS[self as usize] as u32
    }
    /// Its width.
    #[inline]
    #[must_use]
    pub const fn width(self) -> Width {
        match self.encoding() >> 13 & 3 {
            0 => Width::W16,
            1 => Width::W64,
            2 => Width::W32,
            _ => Width::Natural,
        }
    }
    /// The bits a field of its width can hold, natural width being 64.
    #[inline]
    #[must_use]
    pub const fn mask(self) -> u64 {
        match self.width() {
            Width::W16 => 0xffff,
            Width::W32 => 0xffff_ffff,
            Width::W64 | Width::Natural => u64::MAX,
        }
    }
    /// What it is for.
    #[inline]
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self.encoding() >> 10 & 3 {
            0 => Kind::Control,
            1 => Kind::ReadOnly,
            2 => Kind::Guest,
            _ => Kind::Host,
        }
    }
    /// The SDM's name, with "guest" or "host" before those of the state areas.
    #[must_use]
    pub const fn name(self) -> &'static str {
        NAMES[self as usize]
    }
    /// The controls of which one must be supported for the field to exist; none: it always exists.
    #[must_use]
    pub const fn needs(self) -> &'static [ControlBit] {
        NEEDS[self as usize]
    }
    /// The selector field of guest segment register `n` (ES CS SS DS FS GS LDTR TR).
    #[inline]
    #[must_use]
    pub const fn guest_selector(n: usize) -> Field {
        Field::ALL[Field::GuestEsSelector as usize + (n & 7)]
    }
    /// The limit field of guest segment register `n`.
    #[inline]
    #[must_use]
    pub const fn guest_limit(n: usize) -> Field {
        Field::ALL[Field::GuestEsLimit as usize + (n & 7)]
    }
    /// The access-rights field of guest segment register `n`.
    #[inline]
    #[must_use]
    pub const fn guest_access_rights(n: usize) -> Field {
        Field::ALL[Field::GuestEsAccessRights as usize + (n & 7)]
    }
    /// The base field of guest segment register `n`.
    #[inline]
    #[must_use]
    pub const fn guest_base(n: usize) -> Field {
        Field::ALL[Field::GuestEsBase as usize + (n & 7)]
    }
    /// The field of guest PDPTE `n`.
    #[inline]
    #[must_use]
    pub const fn guest_pdpte(n: usize) -> Field {
        Field::ALL[Field::GuestPdpte0 as usize + (n & 3)]
    }
}

/// Anything that has the fields of a VMCS.
pub trait Fields {
    /// The field's value, zero-extended.
    fn get(&self, field: Field) -> u64;
}

impl<F: Fn(Field) -> u64> Fields for F {
    fn get(&self, field: Field) -> u64 {
        self(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_decodes_to_its_field_and_no_other_does() {
        let mut found = 0;
        for e in 0..0x1_0000u64 {
            if let Some((field, part)) = Field::decode(e) {
                found += 1;
                assert_eq!(u64::from(field.encoding()) | u64::from(part == Part::High), e);
                assert!(part == Part::Full || field.width() == Width::W64);
            }
        }
        let wide = Field::ALL.iter().filter(|f| f.width() == Width::W64).count();
        assert_eq!(found, COUNT + wide);
        assert_eq!(Field::decode(0x1_0000_0000), None);
        assert_eq!(Field::decode(u64::MAX), None);
    }

    #[test]
    fn known_encodings() {
        for (field, encoding) in [
            (Field::Vpid, 0),
            (Field::GuestTrSelector, 0x80e),
            (Field::HostTrSelector, 0xc0c),
            (Field::Eptp, 0x201a),
            (Field::TscMultiplier, 0x2032),
            (Field::Exit2Controls, 0x2044),
            (Field::GuestPhysicalAddress, 0x2400),
            (Field::GuestPkrs, 0x2818),
            (Field::HostEfer, 0x2c02),
            (Field::Proc2Controls, 0x401e),
            (Field::ExitInstructionInfo, 0x440e),
            (Field::GuestTrAccessRights, 0x4822),
            (Field::PreemptionTimer, 0x482e),
            (Field::GuestLinearAddress, 0x640a),
            (Field::GuestRflags, 0x6820),
            (Field::HostRip, 0x6c16),
        ] {
            assert_eq!(field.encoding(), encoding, "{field:?}");
        }
        assert_eq!(Field::guest_base(7), Field::GuestTrBase);
        assert_eq!(Field::guest_pdpte(3), Field::GuestPdpte3);
    }
}
