//! Guest memory: RAM and the physical map, page walks, the softmmu TLB with its tagged contexts, pages that hold code.
//!
//! Place in the pipeline: under the slow path of translated code, under fetch, and under every helper that touches
//! guest memory. This room sees an [`AddressSpace`], never a VMCS. Start at [`mmu`]: one [`Mmu`] per vCPU ties the rest
//! together. `unsafe` is confined to `ram`, `raw` and `tlb`.

pub mod code;
pub mod context;
pub mod ept;
pub mod guest_phys;
pub mod invalidate;
pub mod jump;
pub mod mmu;
pub mod nested;
pub mod physmap;
pub mod ram;
mod raw;
pub mod rights;
pub mod space;
pub mod stats;
mod structures;
mod sub_page;
pub mod tlb;
pub mod trace;
pub mod walk;

pub use code::{Beside, CodePages};
pub use context::View;
pub use ept::{EptControls, EptReason, EptStep, Pml};
pub use invalidate::{Invpcid, Invvpid};
pub use jump::{JUMP_CACHE_ENTRIES, JumpCacheEntry, jump_index};
pub use mmu::{BytesOutcome, Fetched, Mmu, Part, Parts, ReadOutcome, Translation, WriteOutcome};
pub use physmap::{LegacyHole, PhysMap, PhysMapError, Target};
pub use ram::{GuestRam, RamError};
pub use space::{Access, AccessKind, AddressSpace, EptFault, EptFaultKind, Fault, PagingMode, PdpteError};
pub use stats::{FlushCause, FlushPolicy, MmuStats};
pub use tlb::TlbEntry;
pub use trace::{TraceStep, WalkTrace};
pub use walk::{Direct, EntryWidth, Frame, GuestPhysical, Mapping, load_pdptes, walk};
