//! What a translation depends on: the address space, the access, and the typed faults it can end in.
//!
//! Place in the pipeline: the runtime makes an [`AddressSpace`] from the control registers (and, in VMX non-root operation,
//! from the VMCS) whenever one of them changes, and hands it to every call of [`crate::Mmu`].

use twofold_arch::control::{cr0, cr4, efer};
use twofold_arch::exception::{Exception, pf};
use twofold_arch::paging::CR3_PCID;
use twofold_arch::tbflags::MemMode;
use twofold_arch::{GuestPhysAddr, LinearAddr};

use crate::ept::EptControls;

/// A paging mode (SDM Vol 3A, "Paging Modes and Control Bits").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub enum PagingMode {
    /// CR0.PG = 0: linear addresses are guest-physical addresses.
    #[default]
    None = 0,
    /// 32-bit paging.
    Bits32 = 1,
    /// PAE paging.
    Pae = 2,
    /// 4-level paging.
    Level4 = 3,
    /// 5-level paging.
    Level5 = 4,
}

impl PagingMode {
    /// All five in the order of their numbers.
    pub const ALL: [PagingMode; 5] =
        [PagingMode::None, PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5];
    /// The keys of `walks` in a `--stats` file, in the same order.
    pub const NAMES: [&'static str; 5] = ["none", "32bit", "pae", "4level", "5level"];

    /// The mode that the control registers select.
    #[must_use]
    pub const fn from_registers(cr0: u64, cr4: u64, efer: u64) -> Self {
        if cr0 & cr0::PG == 0 {
            PagingMode::None
        } else if cr4 & cr4::PAE == 0 {
            PagingMode::Bits32
        } else if efer & efer::LMA == 0 {
            PagingMode::Pae
        } else if cr4 & cr4::LA57 == 0 {
            PagingMode::Level4
        } else {
            PagingMode::Level5
        }
    }
}

/// Everything that decides how a linear address is translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSpace {
    /// The paging mode.
    pub mode: PagingMode,
    /// CR3 (or the value that a MOV put there, bit 63 excluded).
    pub cr3: u64,
    /// The PDPTE registers; used in PAE paging only.
    pub pdptes: [u64; 4],
    /// CR4.PCIDE.
    pub pcide: bool,
    /// The current PCID; 0 when CR4.PCIDE = 0.
    pub pcid: u16,
    /// The current VPID; 0 outside VMX non-root operation, and there when VPIDs are not enabled.
    pub vpid: u16,
    /// The EPT pointer while EPT is in use.
    pub eptp: Option<u64>,
    /// The VM-execution control "mode-based execute control for EPT".
    pub ept_mode_based: bool,
    /// The sub-page-permission-table pointer while the VM-execution control "sub-page write permissions for EPT" is 1.
    pub ept_sub_pages: Option<u64>,
    /// Whether the CPU has execute-only pages in EPT.
    pub ept_execute_only: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub pse: bool,
    /// CR4.PGE: the G flag counts.
    pub pge: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE: PKRU counts (4- and 5-level paging).
    pub pke: bool,
    /// CR4.PKS: IA32_PKRS counts (4- and 5-level paging).
    pub pks: bool,
    /// IA32_EFER.NXE.
    pub nxe: bool,
    /// PKRU. A change goes through [`crate::Mmu::set_pkru`].
    pub pkru: u32,
    /// IA32_PKRS.
    pub pkrs: u32,
    /// MAXPHYADDR: width of physical addresses, 32..=52.
    pub maxphyaddr: u8,
    /// Whether the CPU has 1 GiB pages; without them PS in a PDPTE is reserved.
    pub gigabyte_pages: bool,
}

impl AddressSpace {
    /// The address space after reset: no paging, all controls clear.
    #[must_use]
    pub const fn reset(maxphyaddr: u8) -> Self {
        Self {
            mode: PagingMode::None,
            cr3: 0,
            pdptes: [0; 4],
            pcide: false,
            pcid: 0,
            vpid: 0,
            eptp: None,
            ept_mode_based: false,
            ept_sub_pages: None,
            ept_execute_only: true,
            wp: false,
            pse: false,
            pge: false,
            smep: false,
            smap: false,
            pke: false,
            pks: false,
            nxe: false,
            pkru: 0,
            pkrs: 0,
            maxphyaddr,
            gigabyte_pages: true,
        }
    }

    /// This address space with what CR0, CR3, CR4 and IA32_EFER decide taken from them. The rest (PDPTE registers, VPID,
    /// EPTP, PKRU, PKRS, CPU properties) stays.
    #[must_use]
    pub const fn with_registers(mut self, cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Self {
        self.mode = PagingMode::from_registers(cr0, cr4, efer);
        self.cr3 = cr3;
        self.pcide = cr4 & cr4::PCIDE != 0;
        self.pcid = if self.pcide { (cr3 & CR3_PCID) as u16 } else { 0 };
        self.wp = cr0 & cr0::WP != 0;
        self.pse = cr4 & cr4::PSE != 0;
        self.pge = cr4 & cr4::PGE != 0;
        self.smep = cr4 & cr4::SMEP != 0;
        self.smap = cr4 & cr4::SMAP != 0;
        self.pke = cr4 & cr4::PKE != 0;
        self.pks = cr4 & cr4::PKS != 0;
        self.nxe = efer & efer::NXE != 0;
        self
    }

    /// The tag that EPT-derived translations carry: bits 51:12 of the EPTP.
    #[must_use]
    pub const fn ep4ta(&self) -> Option<u64> {
        match self.eptp {
            Some(e) => Some(e & twofold_arch::paging::ADDR),
            None => None,
        }
    }

    /// Width of canonical linear addresses, or `None` where linear addresses are 32 bits wide.
    #[inline]
    #[must_use]
    pub const fn canonical_width(&self) -> Option<u32> {
        match self.mode {
            PagingMode::Level4 => Some(48),
            PagingMode::Level5 => Some(57),
            PagingMode::None | PagingMode::Bits32 | PagingMode::Pae => None,
        }
    }

    /// The softmmu table an access uses.
    #[inline]
    #[must_use]
    pub const fn mem_mode(&self, access: Access) -> MemMode {
        if access.user {
            MemMode::User
        } else if self.smap && (access.implicit || !access.ac) {
            MemMode::Supervisor
        } else {
            MemMode::SupervisorAc
        }
    }

    /// What, besides the tables in memory, the rights of cached translations depend on. Two address spaces that differ
    /// here share no cached translation.
    pub(crate) fn shape(&self) -> u64 {
        let mut s = self.mode as u64 | u64::from(self.maxphyaddr) << 16;
        let controls =
            [self.wp, self.pse, self.pge, self.smep, self.smap, self.pke, self.pks, self.nxe, self.gigabyte_pages];
        for (i, b) in controls.into_iter().enumerate() {
            s |= u64::from(b) << (4 + i);
        }
        s | EptControls::of(self).map_or(0, |c| u64::from(c.shape()) << 32)
    }
}

/// What is done with the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write, and both halves of a read-modify-write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// An access to linear memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: AccessKind,
    /// A user-mode access: made at CPL 3 and not implicit.
    pub user: bool,
    /// An implicit supervisor access (descriptor tables, TSS): SMAP holds whatever RFLAGS.AC says.
    pub implicit: bool,
    /// RFLAGS.AC; only matters to explicit supervisor accesses.
    pub ac: bool,
}

impl Access {
    /// An access of `kind` by code whose data accesses use `mode` (see `TbFlags`).
    #[inline]
    #[must_use]
    pub const fn of(kind: AccessKind, mode: MemMode) -> Self {
        let (user, ac) = match mode {
            MemMode::User => (true, false),
            MemMode::SupervisorAc => (false, true),
            MemMode::Supervisor => (false, false),
        };
        Self { kind, user, implicit: false, ac }
    }
    /// A data read by code with `mode`.
    #[inline]
    #[must_use]
    pub const fn read(mode: MemMode) -> Self {
        Self::of(AccessKind::Read, mode)
    }
    /// A data write by code with `mode`.
    #[inline]
    #[must_use]
    pub const fn write(mode: MemMode) -> Self {
        Self::of(AccessKind::Write, mode)
    }
    /// An instruction fetch at CPL 3 (`user`) or below.
    #[inline]
    #[must_use]
    pub const fn fetch(user: bool) -> Self {
        Self { kind: AccessKind::Fetch, user, implicit: false, ac: false }
    }
    /// An implicit supervisor access, as to a descriptor table.
    #[inline]
    #[must_use]
    pub const fn implicit(kind: AccessKind) -> Self {
        Self { kind, user: false, implicit: true, ac: false }
    }
    /// Whether this is a write.
    #[inline]
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self.kind, AccessKind::Write)
    }
}

/// How an EPT walk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptFaultKind {
    /// An EPT violation, with bits 0–11 of its exit qualification.
    Violation(u32),
    /// An EPT misconfiguration.
    Misconfiguration,
    /// An accessed or dirty flag must be set, and the page-modification log is full.
    LogFull,
    /// The sub-page write permission of the address cannot be had.
    SubPage {
        /// The entry is not valid (an SPP miss); else it has reserved bits set (an SPP misconfiguration).
        miss: bool,
    },
}

/// A fault of the second translation stage; exits to L1 (a violation may become #VE instead).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptFault {
    /// What happened.
    pub kind: EptFaultKind,
    /// The guest-physical address whose translation failed.
    pub gpa: GuestPhysAddr,
    /// The linear address being translated, when there is one.
    pub la: Option<LinearAddr>,
    /// Bit 63 of the entry that decides whether a violation may become #VE: then it may not.
    pub suppress_ve: bool,
}

/// Why an access cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A page fault.
    Page {
        /// Error code (`arch::exception::pf`).
        error: u32,
        /// What CR2 gets: the first byte that could not be accessed.
        la: LinearAddr,
    },
    /// The address is not canonical: #SS for stack segments, else #GP, both with error code 0.
    NonCanonical {
        /// The address.
        la: LinearAddr,
    },
    /// EPT violation or misconfiguration.
    Ept(EptFault),
}

impl Fault {
    /// The exception to deliver; `stack` says that the segment is SS. `None` for EPT faults, which exit instead.
    #[must_use]
    pub const fn exception(&self, stack: bool) -> Option<Exception> {
        match *self {
            Fault::Page { error, la } => Some(Exception::page_fault(error, la.0)),
            Fault::NonCanonical { .. } if stack => Some(Exception::SS0),
            Fault::NonCanonical { .. } => Some(Exception::GP0),
            Fault::Ept(_) => None,
        }
    }
}

/// Why PDPTE registers cannot be loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PdpteError {
    /// A present PDPTE has a reserved bit set: #GP(0) on MOV to CR, a failed check on VM entry, an abort on VM exit.
    Reserved {
        /// Which of the four.
        index: u8,
    },
    /// The table could not be read through EPT.
    Ept(EptFault),
}

/// Error-code bits that the access alone decides.
#[inline]
pub(crate) const fn access_error_bits(space: &AddressSpace, access: Access) -> u32 {
    let mut e = 0;
    if access.user {
        e |= pf::U;
    }
    match access.kind {
        AccessKind::Read => {}
        AccessKind::Write => e |= pf::W,
        AccessKind::Fetch => {
            let pae = matches!(space.mode, PagingMode::Pae | PagingMode::Level4 | PagingMode::Level5);
            if space.smep || (pae && space.nxe) {
                e |= pf::I;
            }
        }
    }
    e
}
