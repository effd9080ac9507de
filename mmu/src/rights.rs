//! Access rights: whether a translation permits an access, and how its refusal shows in the error code (row A5).
//!
//! Place in the pipeline: between a walk and its mapping, and when the fill turns a mapping into TLB tags. The rules are
//! written once, in `data_allowed`, `key_refuses` and `fetch_allowed`; both users call those.
//! Source: SDM Vol 3A, "Determination of Access Rights", "Protection Keys", "Page-Fault Exceptions".

use twofold_arch::exception::pf;
use twofold_arch::tbflags::MemMode;

use crate::space::{Access, AccessKind, AddressSpace, PagingMode};

/// What the paging-structure entries of a translation allow, all levels combined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    /// U/S is 1 at every level: a user-mode address.
    pub user: bool,
    /// R/W is 1 at every level.
    pub write: bool,
    /// No level forbids fetches.
    pub exec: bool,
    /// The leaf's protection key; 0 outside 4- and 5-level paging.
    pub pkey: u8,
}

/// The accesses of one [`MemMode`] that a translation permits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permitted {
    /// Data reads.
    pub read: bool,
    /// Data writes, the dirty flag aside.
    pub write: bool,
    /// Fetches.
    pub exec: bool,
}

/// Whether the protection key refuses a data access.
#[inline]
fn key_refuses(space: &AddressSpace, r: Rights, write: bool, user_access: bool) -> bool {
    let (on, register) = if r.user { (space.pke, space.pkru) } else { (space.pks, space.pkrs) };
    if !on || !matches!(space.mode, PagingMode::Level4 | PagingMode::Level5) {
        return false;
    }
    let bits = register >> (2 * u32::from(r.pkey & 15)) & 3;
    let (access_disable, write_disable) = (bits & 1 != 0, bits & 2 != 0);
    access_disable || (write && write_disable && (user_access || space.wp))
}

/// Whether the rights other than the protection key permit a data access of `mode`.
#[inline]
fn data_allowed(space: &AddressSpace, r: Rights, write: bool, mode: MemMode) -> bool {
    if space.mode == PagingMode::None {
        return true;
    }
    match mode {
        MemMode::User => r.user && (r.write || !write),
        MemMode::Supervisor if r.user && space.smap => false,
        MemMode::Supervisor | MemMode::SupervisorAc => r.write || !write || !space.wp,
    }
}

/// Whether a fetch is permitted.
#[inline]
fn fetch_allowed(space: &AddressSpace, r: Rights, user_access: bool) -> bool {
    if space.mode == PagingMode::None {
        return true;
    }
    r.exec && if user_access { r.user } else { !(r.user && space.smep) }
}

/// `None` when `access` is permitted, else the error-code bits that the refusal adds: P, and PK where a key refuses.
#[inline]
pub(crate) fn refusal(space: &AddressSpace, r: Rights, access: Access) -> Option<u32> {
    if access.kind == AccessKind::Fetch {
        return (!fetch_allowed(space, r, access.user)).then_some(pf::P);
    }
    let write = access.is_write();
    let key = key_refuses(space, r, write, access.user);
    if !key && data_allowed(space, r, write, space.mem_mode(access)) {
        return None;
    }
    Some(pf::P | if key { pf::PK } else { 0 })
}

/// Everything that code whose accesses use `mode` may do.
#[inline]
pub(crate) fn permitted(space: &AddressSpace, r: Rights, mode: MemMode) -> Permitted {
    let user = mode == MemMode::User;
    Permitted {
        read: data_allowed(space, r, false, mode) && !key_refuses(space, r, false, user),
        write: data_allowed(space, r, true, mode) && !key_refuses(space, r, true, user),
        exec: fetch_allowed(space, r, user),
    }
}
