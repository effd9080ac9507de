//! G3: the checks on guest non-register state and PDPTEs.

use Field::*;
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{pin, proc2};

use super::checks;
use super::states::BEYOND;
use crate::vmx::caps::REVISION;

const IF: u64 = 1 << 9;
const TF: u64 = 1 << 8;
const STI: u64 = 1;
const MOV_SS: u64 = 2;
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT: u64 = 3;
const BS: u64 = 1 << 14;

checks! {
    g3_guest_activity "guest-activity" {
        fails long: |s| s.set(GuestActivity, 4);
        fails long: |s| s.set(GuestActivity, 0xffff_ffff);
        fails long: |s| { s.without("vmx-activity-hlt"); s.set(GuestActivity, HLT) };
        fails long: |s| { s.without("vmx-activity-shutdown"); s.set(GuestActivity, SHUTDOWN) };
        fails long: |s| { s.without("vmx-activity-wait-sipi"); s.set(GuestActivity, WAIT) };
        passes long: |s| s.set(GuestActivity, WAIT);
    }
    g3_guest_hlt_dpl "guest-hlt-dpl" {
        fails long: |s| {
            s.set(GuestCsAccessRights, 0xa0fb);
            s.set(GuestSsAccessRights, 0xc0f3);
            s.set(GuestActivity, HLT)
        };
        passes long: |s| s.set(GuestActivity, HLT);
    }
    g3_guest_activity_blocking "guest-activity-blocking" {
        fails long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, STI); s.set(GuestActivity, HLT) };
        fails long: |s| { s.set(GuestInterruptibility, MOV_SS); s.set(GuestActivity, SHUTDOWN) };
        passes long: |s| { s.set(GuestInterruptibility, 8); s.set(GuestActivity, HLT) };
    }
    g3_guest_activity_event "guest-activity-event" {
        fails long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0b0d) };
        fails long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0603) };
        fails long: |s| { s.set(GuestActivity, SHUTDOWN); s.or(GuestRflags, IF); s.inject(0x8000_0020) };
        fails long: |s| { s.set(GuestActivity, SHUTDOWN); s.inject(0x8000_0301) };
        fails long: |s| { s.set(GuestActivity, SHUTDOWN); s.inject(0x8000_0700) };
        fails long: |s| { s.set(GuestActivity, WAIT); s.inject(0x8000_0202) };
        passes long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0202) };
        passes long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0301) };
        passes long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0312) };
        passes long: |s| { s.set(GuestActivity, HLT); s.inject(0x8000_0700) };
        passes long: |s| { s.set(GuestActivity, HLT); s.or(GuestRflags, IF); s.inject(0x8000_0020) };
        passes long: |s| { s.set(GuestActivity, SHUTDOWN); s.inject(0x8000_0312) };
        passes long: |s| { s.set(GuestActivity, SHUTDOWN); s.inject(0x8000_0202) };
    }
    g3_guest_interruptibility_reserved "guest-interruptibility-reserved" {
        fails long: |s| s.set(GuestInterruptibility, 1 << 5);
        fails long: |s| s.set(GuestInterruptibility, 1 << 31);
    }
    g3_guest_blocking_sti_and_mov_ss "guest-blocking-sti-and-mov-ss" {
        fails long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, STI | MOV_SS) };
        passes long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, STI) };
        passes long: |s| s.set(GuestInterruptibility, MOV_SS);
    }
    g3_guest_blocking_sti_if "guest-blocking-sti-if" {
        fails long: |s| s.set(GuestInterruptibility, STI);
    }
    g3_guest_blocking_interrupt "guest-blocking-interrupt" {
        fails long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, STI); s.inject(0x8000_0020) };
        fails long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, MOV_SS); s.inject(0x8000_0020) };
        passes long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, 8); s.inject(0x8000_0020) };
        passes long: |s| { s.set(GuestInterruptibility, MOV_SS); s.inject(0x8000_0b0d) };
    }
    g3_guest_blocking_nmi "guest-blocking-nmi" {
        fails long: |s| { s.set(GuestInterruptibility, MOV_SS); s.inject(0x8000_0202) };
        // The SDM leaves this one to the processor.
        passes long: |s| { s.or(GuestRflags, IF); s.set(GuestInterruptibility, STI); s.inject(0x8000_0202) };
    }
    g3_guest_blocking_smi "guest-blocking-smi" {
        fails long: |s| s.set(GuestInterruptibility, 4);
    }
    g3_guest_blocking_virtual_nmi "guest-blocking-virtual-nmi" {
        fails long: |s| { s.set(GuestInterruptibility, 8); s.inject(0x8000_0202) };
        passes long: |s| { s.no_pin(pin::VIRTUAL_NMIS); s.set(GuestInterruptibility, 8); s.inject(0x8000_0202) };
        passes long: |s| s.set(GuestInterruptibility, 8);
    }
    g3_guest_interruptibility_enclave "guest-interruptibility-enclave" {
        fails long: |s| s.set(GuestInterruptibility, 0x10);
    }
    g3_guest_pending_debug_reserved "guest-pending-debug-reserved" {
        fails long: |s| s.set(GuestPendingDebug, 1 << 4);
        fails long: |s| s.set(GuestPendingDebug, 1 << 11);
        fails long: |s| s.set(GuestPendingDebug, 1 << 13);
        fails long: |s| s.set(GuestPendingDebug, 1 << 15);
        fails long: |s| s.set(GuestPendingDebug, 1 << 17);
        fails long: |s| s.set(GuestPendingDebug, 1 << 63);
        passes long: |s| s.set(GuestPendingDebug, 0x500f);
    }
    g3_guest_pending_debug_bs "guest-pending-debug-bs" {
        fails long: |s| { s.or(GuestRflags, IF | TF); s.set(GuestInterruptibility, STI) };
        fails long: |s| { s.set(GuestInterruptibility, MOV_SS); s.set(GuestPendingDebug, BS) };
        fails long: |s| { s.set(GuestActivity, HLT); s.or(GuestRflags, TF) };
        fails long: |s| {
            s.or(GuestRflags, TF);
            s.set(GuestDebugctl, 2);
            s.set(GuestInterruptibility, MOV_SS);
            s.set(GuestPendingDebug, BS)
        };
        passes long: |s| { s.or(GuestRflags, IF | TF); s.set(GuestInterruptibility, STI); s.set(GuestPendingDebug, BS) };
        passes long: |s| { s.or(GuestRflags, TF); s.set(GuestDebugctl, 2); s.set(GuestInterruptibility, MOV_SS) };
        passes long: |s| s.or(GuestRflags, TF);
        passes long: |s| s.set(GuestPendingDebug, BS);
    }
    g3_guest_pending_debug_rtm "guest-pending-debug-rtm" {
        fails long: |s| s.set(GuestPendingDebug, 1 << 16 | 1 << 12);
    }
    g3_guest_link_pointer "guest-link-pointer" {
        fails long: |s| s.set(VmcsLinkPointer, 0x3001);
        fails long: |s| s.set(VmcsLinkPointer, BEYOND);
        fails long: |s| { s.put(0x7000, &REVISION.to_le_bytes()); s.set(VmcsLinkPointer, 0x7000) };
        fails long: |s| { s.put(0x3000, &(REVISION + 1).to_le_bytes()); s.set(VmcsLinkPointer, 0x3000) };
        fails long: |s| { s.put(0x3000, &(REVISION | 1 << 31).to_le_bytes()); s.set(VmcsLinkPointer, 0x3000) };
        fails long: |s| {
            s.proc2(proc2::VMCS_SHADOWING);
            s.put(0x3000, &REVISION.to_le_bytes());
            s.set(VmcsLinkPointer, 0x3000)
        };
        passes long: |s| { s.put(0x3000, &REVISION.to_le_bytes()); s.set(VmcsLinkPointer, 0x3000) };
        passes long: |s| {
            s.proc2(proc2::VMCS_SHADOWING);
            s.put(0x3000, &(REVISION | 1 << 31).to_le_bytes());
            s.set(VmcsLinkPointer, 0x3000)
        };
    }
    /// C2, G3: PDPTEs come from the VMCS with EPT and from memory without, and reserved bits of present ones are refused.
    c2_g3_guest_pdptes "guest-pdptes" {
        fails pae: |s| s.or(GuestPdpte0, 2);
        fails pae: |s| s.or(GuestPdpte1, 1 << 5);
        fails pae: |s| s.or(GuestPdpte2, BEYOND);
        fails pae: |s| s.or(GuestPdpte3, 1 << 63);
        fails pae_shadow: |s| s.put(0x1000, &[3]);
        fails pae_shadow: |s| s.put(0x101f, &[0x80]);
        fails pae_shadow: |s| { s.set(GuestCr3, 0x1020); s.put(0x1038, &[7]) };
        passes pae: |s| s.set(GuestPdpte1, !1);
        passes pae: |s| s.put(0x1000, &[0xff; 32]);
        passes pae_shadow: |s| s.put(0x1008, &[0xfe; 8]);
        // Without PAE paging they do not count.
        passes long: |s| s.set(GuestPdpte0, u64::MAX);
        passes real: |s| s.set(GuestPdpte0, u64::MAX);
        passes pae: |s| { s.clear(GuestCr0, 1 << 31); s.set(GuestPdpte0, u64::MAX) };
        passes pae: |s| { s.clear(GuestCr4, 1 << 5); s.set(GuestPdpte0, u64::MAX) };
    }
}
