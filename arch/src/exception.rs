//! Exception vectors and the exception as a value (SDM Vol 3A, "Interrupt and Exception Handling").

/// An exception vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87Fault = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFault = 19,
    Virtualization = 20,
}

impl Vector {
    /// The vector with this number, if it is an exception's.
    #[must_use]
    pub const fn from_number(n: u8) -> Option<Self> {
        use Vector::*;
        Some(match n {
            0 => DivideError,
            1 => Debug,
            2 => Nmi,
            3 => Breakpoint,
            4 => Overflow,
            5 => BoundRange,
            6 => InvalidOpcode,
            7 => DeviceNotAvailable,
            8 => DoubleFault,
            10 => InvalidTss,
            11 => SegmentNotPresent,
            12 => StackFault,
            13 => GeneralProtection,
            14 => PageFault,
            16 => X87Fault,
            17 => AlignmentCheck,
            18 => MachineCheck,
            19 => SimdFault,
            20 => Virtualization,
            _ => return None,
        })
    }
}

/// An exception to be delivered: vector, error code where the vector has one, CR2 for a page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Which exception.
    pub vector: Vector,
    /// The error code, for vectors that push one.
    pub error: Option<u32>,
    /// The faulting linear address, for a page fault.
    pub cr2: u64,
}

impl Exception {
    /// An exception without an error code.
    #[must_use]
    pub const fn new(vector: Vector) -> Self {
        Self { vector, error: None, cr2: 0 }
    }
    /// An exception with an error code.
    #[must_use]
    pub const fn with_error(vector: Vector, error: u32) -> Self {
        Self { vector, error: Some(error), cr2: 0 }
    }
    /// #UD.
    pub const UD: Self = Self::new(Vector::InvalidOpcode);
    /// #NM.
    pub const NM: Self = Self::new(Vector::DeviceNotAvailable);
    /// #DE.
    pub const DE: Self = Self::new(Vector::DivideError);
    /// #GP(0).
    pub const GP0: Self = Self::with_error(Vector::GeneralProtection, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_error(Vector::StackFault, 0);
    /// #GP(error).
    #[must_use]
    pub const fn gp(error: u32) -> Self {
        Self::with_error(Vector::GeneralProtection, error)
    }
    /// #PF with its error code and the faulting linear address.
    #[must_use]
    pub const fn page_fault(error: u32, cr2: u64) -> Self {
        Self { vector: Vector::PageFault, error: Some(error), cr2 }
    }
}

/// Page-fault error code bits (SDM Vol 3A, "Page-Fault Exceptions").
pub mod pf {
    #![allow(missing_docs)]
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
    pub const PK: u32 = 1 << 5;
}
