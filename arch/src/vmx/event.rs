//! Events as VMCS fields hold them: interruption information, interruptibility, activity, pending debug exceptions
//! (SDM Vol 3C, "Guest Non-Register State", "VM-Entry Controls for Event Injection", "VM-Exit Information Fields").

/// What kind of event an interruption-information field holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum EventType {
    /// An external interrupt.
    External = 0,
    /// A non-maskable interrupt.
    Nmi = 2,
    /// A hardware exception: a fault or a trap.
    HardwareException = 3,
    /// INT n.
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3 or INTO.
    SoftwareException = 6,
    /// VM entry: a pending MTF VM exit (vector 0). VM exit: SYSCALL, SYSENTER.
    Other = 7,
}

impl EventType {
    /// The type of this number; 1 is reserved.
    #[must_use]
    pub const fn from_number(n: u32) -> Option<Self> {
        use EventType::*;
        Some(match n & 7 {
            0 => External,
            2 => Nmi,
            3 => HardwareException,
            4 => SoftwareInterrupt,
            5 => PrivilegedSoftwareException,
            6 => SoftwareException,
            7 => Other,
            _ => return None,
        })
    }
    /// Whether the event comes from an instruction, whose length then matters.
    #[must_use]
    pub const fn is_software(self) -> bool {
        matches!(self, Self::SoftwareInterrupt | Self::PrivilegedSoftwareException | Self::SoftwareException)
    }
}

/// The format of VM-entry interruption information, VM-exit interruption information and IDT-vectoring information:
/// vector 7:0, type 10:8, error code valid 11, NMI unblocking due to IRET 12 (exit only), valid 31.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Bit 11.
    pub const ERROR_CODE: u32 = 1 << 11;
    /// Bit 12, in VM-exit interruption information.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    /// Bit 31.
    pub const VALID: u32 = 1 << 31;
    /// Bits 30:12, reserved on entry.
    pub const ENTRY_RESERVED: u32 = 0x7fff_f000;

    /// A valid one.
    #[must_use]
    pub const fn new(vector: u8, kind: EventType, error_code: bool) -> Self {
        Self(vector as u32 | (kind as u32) << 8 | if error_code { Self::ERROR_CODE } else { 0 } | Self::VALID)
    }
    /// Vector.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }
    /// Type; `None` when it is the reserved one.
    #[must_use]
    pub const fn kind(self) -> Option<EventType> {
        EventType::from_number(self.0 >> 8)
    }
    /// Whether there is an error code to deliver or that was delivered.
    #[must_use]
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }
    /// Whether the field holds an event at all.
    #[inline]
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }
}

/// Guest interruptibility state.
pub mod interruptibility {
    #![allow(missing_docs)]
    pub const STI: u32 = 1 << 0;
    pub const MOV_SS: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const ENCLAVE: u32 = 1 << 4;
    /// Bits 31:5.
    pub const RESERVED: u32 = !0x1f;
}

/// Guest activity state.
pub mod activity {
    #![allow(missing_docs)]
    pub const ACTIVE: u32 = 0;
    pub const HLT: u32 = 1;
    pub const SHUTDOWN: u32 = 2;
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// Guest pending debug exceptions; the exit qualification of a debug exception has the same low bits.
pub mod pending_debug {
    #![allow(missing_docs)]
    pub const B: u64 = 0xf;
    pub const BLD: u64 = 1 << 11;
    pub const ENABLED_BREAKPOINT: u64 = 1 << 12;
    pub const BS: u64 = 1 << 14;
    pub const RTM: u64 = 1 << 16;
}

/// IA32_DEBUGCTL bits that VM entry looks at.
pub mod debugctl {
    #![allow(missing_docs)]
    pub const LBR: u64 = 1 << 0;
    pub const BTF: u64 = 1 << 1;
    pub const BUS_LOCK_DETECT: u64 = 1 << 2;
}
