//! Guest memory: RAM and the physical map, page walks, the softmmu TLB with its tagged contexts, pages that hold code.
//!
//! Place in the pipeline: under the slow path of translated code, under fetch, and under every helper that touches
//! guest memory. This room sees an [`AddressSpace`], never a VMCS. Start at [`mmu`]: one [`Mmu`] per vCPU ties the rest
//! together. `unsafe` is confined to `ram` and `tlb`.

pub mod code;
pub mod ept;
pub mod guest_phys;
pub mod invalidate;
pub mod mmu;
pub mod nested;
pub mod physmap;
pub mod ram;
pub mod rights;
pub mod space;
pub mod stats;
mod sub_page;
pub mod tlb;
pub mod trace;
pub mod walk;

pub use code::CodePages;
pub use ept::{EptControls, EptReason, EptStep, Pml};
pub use invalidate::{Invpcid, Invvpid};
pub use mmu::{BytesOutcome, Fetched, Mmu, Part, Parts, ReadOutcome, Translation, WriteOutcome};
pub use physmap::{LegacyHole, PhysMap, PhysMapError, Target};
pub use ram::{GuestRam, RamError};
pub use space::{Access, AccessKind, AddressSpace, EptFault, EptFaultKind, Fault, PagingMode, PdpteError};
pub use stats::{FlushCause, FlushPolicy, MmuStats};
pub use tlb::{JUMP_CACHE_ENTRIES, JumpCacheEntry, TlbEntry, View, jump_index};
pub use trace::{TraceStep, WalkTrace};
pub use walk::{Direct, EntryWidth, Frame, GuestPhysical, Mapping, load_pdptes, walk};
