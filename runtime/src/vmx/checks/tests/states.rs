//! Valid states to mutate: guests in each mode with controls like KVM's.

use std::collections::BTreeMap;

use twofold_arch::vmx::control::{entry, exit, pin, proc, proc2};
use twofold_arch::vmx::{Field, NO_VMCS, Word};

use super::super::View;
use crate::cpu::CpuModel;
use crate::cpu::cpuid::Bit;
use crate::vmx::Vmcs;
use crate::vmx::caps::{Caps, RowSet, row_named};

/// Everything VM entry looks at.
pub(super) struct State {
    /// What it is.
    pub what: &'static str,
    pub vmcs: Vmcs,
    caps: Caps,
    rows: RowSet,
    pub pointer: u64,
    pub ia32e: bool,
    memory: BTreeMap<u64, u8>,
}

/// The first address beyond the physical-address width.
pub(super) const BEYOND: u64 = 1 << 46;
/// An address that no linear-address width makes canonical.
pub(super) const CROOKED: u64 = 1 << 60;
const PAT: u64 = 0x0007_0406_0007_0406;
/// SCE, LME, LMA, NXE.
const EFER_LONG: u64 = 0xd01;

fn model() -> CpuModel {
    CpuModel::max().set(Bit::Vmx, true)
}

impl State {
    pub fn set(&mut self, field: Field, value: u64) {
        self.vmcs.set(field, value);
    }
    pub fn or(&mut self, field: Field, bits: u64) {
        self.set(field, self.vmcs.get(field) | bits);
    }
    pub fn clear(&mut self, field: Field, bits: u64) {
        self.set(field, self.vmcs.get(field) & !bits);
    }
    pub fn pin(&mut self, on: u32) {
        self.or(Field::PinControls, on.into());
    }
    pub fn proc(&mut self, on: u32) {
        self.or(Field::ProcControls, on.into());
    }
    pub fn proc2(&mut self, on: u32) {
        self.or(Field::Proc2Controls, on.into());
    }
    pub fn no_pin(&mut self, off: u32) {
        self.clear(Field::PinControls, off.into());
    }
    pub fn no_proc(&mut self, off: u32) {
        self.clear(Field::ProcControls, off.into());
    }
    pub fn no_proc2(&mut self, off: u32) {
        self.clear(Field::Proc2Controls, off.into());
    }
    pub fn exit(&mut self, on: u32) {
        self.or(Field::ExitControls, on.into());
    }
    pub fn no_exit(&mut self, off: u32) {
        self.clear(Field::ExitControls, off.into());
    }
    pub fn entry(&mut self, on: u32) {
        self.or(Field::EntryControls, on.into());
    }
    pub fn no_entry(&mut self, off: u32) {
        self.clear(Field::EntryControls, off.into());
    }
    /// Without EPT and what needs it.
    pub fn no_ept(&mut self) {
        self.no_proc2(proc2::EPT | proc2::UNRESTRICTED_GUEST);
    }
    /// The VM-entry interruption-information field.
    pub fn inject(&mut self, info: u64) {
        self.set(Field::EntryInterruptionInfo, info);
    }
    /// Bytes in memory.
    pub fn put(&mut self, at: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            self.memory.insert(at + i as u64, *b);
        }
    }
    /// The processor does not have this feature.
    pub fn without(&mut self, name: &str) {
        self.rows.set(row_named(name).expect("a feature"), false);
        self.rows(self.rows.0);
    }
    /// The processor has this feature.
    pub fn with(&mut self, name: &str) {
        self.rows.set(row_named(name).expect("a feature"), true);
        self.rows(self.rows.0);
    }
    /// The processor has these features.
    pub fn rows(&mut self, rows: u128) {
        self.rows = RowSet(rows);
        self.caps = Caps::with_rows(&model(), self.rows);
    }
    /// Selector, base, limit, access rights of guest segment register `n`.
    fn segment(&mut self, n: usize, selector: u64, base: u64, limit: u64, rights: u64) {
        self.set(Field::guest_selector(n), selector);
        self.set(Field::guest_base(n), base);
        self.set(Field::guest_limit(n), limit);
        self.set(Field::guest_access_rights(n), rights);
    }
    /// A usable LDTR.
    pub fn ldtr(&mut self) {
        self.segment(6, 0x48, 0x9000, 0xff, 0x82);
    }

    /// Calls `f` with the view of the state.
    pub fn with_view<R>(&self, f: impl FnOnce(&View<'_>) -> R) -> R {
        let memory = |at: u64, buf: &mut [u8]| {
            for (i, b) in buf.iter_mut().enumerate() {
                *b = self.memory.get(&at.wrapping_add(i as u64)).copied().unwrap_or(0);
            }
        };
        f(&View::new(&self.vmcs, &self.caps, self.pointer, self.ia32e, &memory))
    }
}

/// A 64-bit guest under EPT with VPID, "unrestricted guest" 1, of a 64-bit host.
pub(super) fn long() -> State {
    let mut rows = RowSet(u128::MAX);
    rows.set(row_named("vmx-any-errcode").expect("a feature"), false);
    let caps = Caps::with_rows(&model(), rows);
    let mut s = State {
        what: "long",
        vmcs: Vmcs::default(),
        caps,
        rows,
        pointer: 0x7000,
        ia32e: true,
        memory: BTreeMap::new(),
    };
    for word in [Word::Pin, Word::Proc, Word::Exit, Word::Entry] {
        s.set(word.field(), s.caps.allowed(word).must);
    }
    s.pin(pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    s.proc(
        proc::HLT_EXITING | proc::TSC_OFFSETTING | proc::MSR_BITMAPS | proc::UNCONDITIONAL_IO_EXITING | proc::SECONDARY,
    );
    s.proc2(proc2::EPT | proc2::VPID | proc2::UNRESTRICTED_GUEST | proc2::RDTSCP | proc2::INVPCID | proc2::XSAVES);
    s.exit(exit::HOST_ADDRESS_SPACE_SIZE | exit::ACKNOWLEDGE_INTERRUPT | exit::SAVE_DEBUG_CONTROLS);
    s.exit(exit::SAVE_PAT | exit::LOAD_PAT | exit::SAVE_EFER | exit::LOAD_EFER);
    s.entry(entry::LOAD_DEBUG_CONTROLS | entry::IA32E_MODE_GUEST | entry::LOAD_PAT | entry::LOAD_EFER);
    s.set(Field::Vpid, 1);
    // Write-back, four levels, accessed and dirty flags.
    s.set(Field::Eptp, 0x10_0000 | 1 << 6 | 3 << 3 | 6);
    s.set(Field::MsrBitmap, 0x6000);
    // What controls that are off here will want to be valid.
    s.set(Field::TscMultiplier, 1 << 48);
    s.set(Field::PostedInterruptVector, 0xf2);
    s.set(Field::VirtualApicAddress, 0x2000);
    s.set(Field::VmcsLinkPointer, NO_VMCS);

    s.set(Field::HostCr0, 0x8005_0033);
    s.set(Field::HostCr3, 0x1000);
    s.set(Field::HostCr4, 0x20a0 | 1 << 13);
    for (field, selector) in
        [(Field::HostCsSelector, 0x10), (Field::HostSsSelector, 0x18), (Field::HostTrSelector, 0x40)]
    {
        s.set(field, selector);
    }
    s.set(Field::HostRip, 0x1_0000);
    s.set(Field::HostPat, PAT);
    s.set(Field::HostEfer, EFER_LONG);

    s.set(Field::GuestCr0, 0x8000_0021);
    s.set(Field::GuestCr3, 0x1000);
    s.set(Field::GuestCr4, 1 << 13 | 1 << 5);
    s.set(Field::GuestDr7, 0x400);
    s.set(Field::GuestPat, PAT);
    s.set(Field::GuestEfer, EFER_LONG);
    s.segment(1, 0x10, 0, 0xffff_ffff, 0xa09b);
    for n in [0, 2, 3, 4, 5] {
        s.segment(n, 0x18, 0, 0xffff_ffff, 0xc093);
    }
    s.segment(6, 0, 0, 0, 0x1_0000);
    s.segment(7, 0x40, 0x8000, 0x67, 0x8b);
    s.set(Field::GuestGdtrLimit, 0x7f);
    s.set(Field::GuestIdtrLimit, 0xfff);
    s.set(Field::GuestRip, 0x1_0000);
    s.set(Field::GuestRflags, 2);
    s
}

/// [`long`] with "unrestricted guest" 0.
pub(super) fn restricted() -> State {
    let mut s = long();
    s.what = "restricted";
    s.no_proc2(proc2::UNRESTRICTED_GUEST);
    s
}

/// A 32-bit guest with PAE paging under EPT.
pub(super) fn pae() -> State {
    let mut s = long();
    s.what = "pae";
    s.no_entry(entry::IA32E_MODE_GUEST);
    s.set(Field::GuestEfer, 0);
    s.set(Field::GuestCsAccessRights, 0xc09b);
    for n in 0..4 {
        s.set(Field::guest_pdpte(n), 0x2001 + 0x1000 * n as u64);
    }
    s
}

/// [`pae`] without EPT: the PDPTEs are in memory.
pub(super) fn pae_shadow() -> State {
    let mut s = pae();
    s.what = "pae_shadow";
    s.no_ept();
    for n in 0..4 {
        s.set(Field::guest_pdpte(n), u64::MAX);
        s.put(0x1000 + 8 * n as u64, &(0x2001 + 0x1000 * n as u64).to_le_bytes());
    }
    s
}

/// A guest in real-address mode.
pub(super) fn real() -> State {
    let mut s = pae();
    s.what = "real";
    s.set(Field::GuestCr0, 0x20);
    s.set(Field::GuestCr4, 1 << 13);
    s.segment(1, 0xf000, 0xf_0000, 0xffff, 0x9b);
    for n in [0, 2, 3, 4, 5] {
        s.segment(n, 0, 0, 0xffff, 0x93);
    }
    s.set(Field::GuestRip, 0xfff0);
    s
}

/// A guest in virtual-8086 mode with 32-bit paging, not unrestricted.
pub(super) fn v86() -> State {
    let mut s = restricted();
    s.what = "v86";
    s.no_entry(entry::IA32E_MODE_GUEST | entry::LOAD_EFER);
    s.set(Field::GuestCr4, 1 << 13);
    s.set(Field::GuestRflags, 1 << 17 | 3 << 12 | 2);
    for n in 0..6 {
        s.segment(n, 0x1000 * n as u64, 0x1_0000 * n as u64, 0xffff, 0xf3);
    }
    s.set(Field::GuestRip, 0x100);
    s
}

/// [`pae`] of a 32-bit host.
pub(super) fn host_32() -> State {
    let mut s = pae();
    s.what = "host_32";
    s.ia32e = false;
    s.no_exit(exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER);
    s.no_entry(entry::LOAD_EFER);
    s
}
