//! Exit qualifications: one small type for each layout (SDM Vol 3C, "Exit Qualification").

/// A control-register access (exit reason 28).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct CrAccess(pub u64);

/// What a control-register access did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum CrAccessType {
    MovTo = 0,
    MovFrom = 1,
    Clts = 2,
    Lmsw = 3,
}

impl CrAccess {
    /// MOV to or from CR`number`, general-purpose register `gpr`.
    #[must_use]
    pub const fn mov(number: u8, kind: CrAccessType, gpr: u8) -> Self {
        Self((number & 15) as u64 | (kind as u64) << 4 | ((gpr & 15) as u64) << 8)
    }
    /// CLTS.
    #[must_use]
    pub const fn clts() -> Self {
        Self((CrAccessType::Clts as u64) << 4)
    }
    /// LMSW of `source`, from memory or not.
    #[must_use]
    pub const fn lmsw(source: u16, memory: bool) -> Self {
        Self((CrAccessType::Lmsw as u64) << 4 | (memory as u64) << 6 | (source as u64) << 16)
    }
    /// Number of the control register.
    #[must_use]
    pub const fn number(self) -> u8 {
        (self.0 & 15) as u8
    }
    /// Which access.
    #[must_use]
    pub const fn kind(self) -> CrAccessType {
        match self.0 >> 4 & 3 {
            0 => CrAccessType::MovTo,
            1 => CrAccessType::MovFrom,
            2 => CrAccessType::Clts,
            _ => CrAccessType::Lmsw,
        }
    }
    /// The general-purpose register of a MOV.
    #[must_use]
    pub const fn gpr(self) -> u8 {
        (self.0 >> 8 & 15) as u8
    }
    /// LMSW's source operand.
    #[must_use]
    pub const fn lmsw_source(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// MOV DR (exit reason 29).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct DrAccess(pub u64);

impl DrAccess {
    /// MOV to (or from) DR`number`, general-purpose register `gpr`.
    #[must_use]
    pub const fn new(number: u8, from_dr: bool, gpr: u8) -> Self {
        Self((number & 7) as u64 | (from_dr as u64) << 4 | ((gpr & 15) as u64) << 8)
    }
}

/// An I/O instruction (exit reason 30).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct IoAccess(pub u64);

impl IoAccess {
    /// An access of `size` (1, 2 or 4) bytes.
    #[must_use]
    pub const fn new(port: u16, size: u8, input: bool, string: bool, rep: bool, immediate: bool) -> Self {
        Self(
            (size.wrapping_sub(1) & 7) as u64
                | (input as u64) << 3
                | (string as u64) << 4
                | (rep as u64) << 5
                | (immediate as u64) << 6
                | (port as u64) << 16,
        )
    }
    /// Bytes.
    #[must_use]
    pub const fn size(self) -> u8 {
        (self.0 & 7) as u8 + 1
    }
    /// IN or INS.
    #[must_use]
    pub const fn is_input(self) -> bool {
        self.0 & 1 << 3 != 0
    }
    /// INS or OUTS.
    #[must_use]
    pub const fn is_string(self) -> bool {
        self.0 & 1 << 4 != 0
    }
    /// The port.
    #[must_use]
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// A task switch (exit reason 9).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct TaskSwitch(pub u64);

/// What asked for a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum TaskSwitchSource {
    Call = 0,
    Iret = 1,
    Jmp = 2,
    TaskGate = 3,
}

impl TaskSwitch {
    /// A switch to the task of TSS `selector`.
    #[must_use]
    pub const fn new(selector: u16, source: TaskSwitchSource) -> Self {
        Self(selector as u64 | (source as u64) << 30)
    }
}

/// An access to the APIC-access page (exit reason 44).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct ApicAccess(pub u64);

/// What accessed the APIC-access page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum ApicAccessType {
    LinearRead = 0,
    LinearWrite = 1,
    LinearFetch = 2,
    LinearEventDelivery = 3,
    PhysicalEventDelivery = 10,
    /// Guest-physical access for an instruction fetch or during instruction execution.
    Physical = 15,
}

impl ApicAccess {
    /// An access at `offset` in the page.
    #[must_use]
    pub const fn new(offset: u64, kind: ApicAccessType) -> Self {
        Self(offset & 0xfff | (kind as u64) << 12)
    }
}

/// An EPT violation (exit reason 48); the same layout serves #VE.
pub mod ept_violation {
    #![allow(missing_docs)]
    /// The access was a data read, write, instruction fetch.
    pub const READ: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const FETCH: u64 = 1 << 2;
    /// The AND of the entries' R, W, X (supervisor-mode X) and user-mode X bits.
    pub const READABLE: u64 = 1 << 3;
    pub const WRITABLE: u64 = 1 << 4;
    pub const EXECUTABLE: u64 = 1 << 5;
    pub const USER_EXECUTABLE: u64 = 1 << 6;
    /// The guest-linear-address field is valid.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// The access was to the linear address's translation, not to a guest paging-structure entry.
    pub const TRANSLATION: u64 = 1 << 8;
    /// Advanced exit information: the linear address is a user-mode, read/write, execute-disable one.
    pub const LINEAR_USER: u64 = 1 << 9;
    pub const LINEAR_WRITABLE: u64 = 1 << 10;
    pub const LINEAR_EXECUTE_DISABLE: u64 = 1 << 11;
    pub const NMI_UNBLOCKING: u64 = 1 << 12;
    pub const SHADOW_STACK: u64 = 1 << 13;
    pub const SUPERVISOR_SHADOW_STACK: u64 = 1 << 14;
    pub const PAGING_VERIFICATION: u64 = 1 << 15;
    pub const ASYNCHRONOUS: u64 = 1 << 16;
}

/// An SPP-related event (exit reason 66).
pub mod spp {
    #![allow(missing_docs)]
    /// 1: SPP miss; 0: SPP misconfiguration.
    pub const MISS: u64 = 1 << 11;
    pub const NMI_UNBLOCKING: u64 = 1 << 12;
}
