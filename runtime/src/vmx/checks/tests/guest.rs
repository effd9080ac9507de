//! G3: the checks on guest control registers, MSRs, descriptor tables, RIP and RFLAGS.

use Field::*;
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{entry, proc2};

use super::checks;
use super::states::{BEYOND, CROOKED};

const VM: u64 = 1 << 17;
const IF: u64 = 1 << 9;

checks! {
    /// G2, G3, G7: the fixed bits, of which an unrestricted guest is free of PE and PG.
    g3_g7_guest_cr0_fixed "guest-cr0-fixed" {
        fails restricted: |s| s.clear(GuestCr0, 1);
        fails restricted: |s| s.clear(GuestCr0, 1 << 31);
        fails long: |s| s.clear(GuestCr0, 1 << 5);
        fails long: |s| s.or(GuestCr0, 1 << 32);
        passes real: |s| s.or(GuestCr0, 1);
        passes long: |s| s.or(GuestCr0, 0x7fff_ffde);
    }
    g3_g7_guest_paging_needs_protection "guest-paging-needs-protection" {
        fails real: |s| s.or(GuestCr0, 1 << 31);
        passes real: |s| s.or(GuestCr0, 1 << 31 | 1);
    }
    g3_guest_cr4_fixed "guest-cr4-fixed" {
        fails long: |s| s.clear(GuestCr4, 1 << 13);
        fails long: |s| s.or(GuestCr4, 1 << 23);
        fails real: |s| s.clear(GuestCr4, 1 << 13);
        passes long: |s| s.or(GuestCr4, 1 << 17 | 1 << 12);
    }
    g3_guest_debugctl "guest-debugctl" {
        fails long: |s| s.set(GuestDebugctl, 1 << 2);
        fails long: |s| s.set(GuestDebugctl, 1 << 63);
        passes long: |s| s.set(GuestDebugctl, 3);
        passes long: |s| { s.no_entry(entry::LOAD_DEBUG_CONTROLS); s.set(GuestDebugctl, 1 << 2) };
    }
    /// C1, G3: IA-32e mode comes with paging and PAE or not at all.
    c1_g3_guest_ia32e_paging "guest-ia32e-paging" {
        fails long: |s| s.clear(GuestCr0, 1 << 31);
    }
    c1_g3_guest_ia32e_pae "guest-ia32e-pae" {
        fails long: |s| s.clear(GuestCr4, 1 << 5);
        passes pae: |s| s.clear(GuestCr4, 1 << 5);
    }
    c1_g3_guest_pcide "guest-pcide" {
        fails pae: |s| s.or(GuestCr4, 1 << 17);
        fails real: |s| s.or(GuestCr4, 1 << 17);
        passes long: |s| s.or(GuestCr4, 1 << 17);
    }
    g3_guest_cr3_width "guest-cr3-width" {
        fails long: |s| s.or(GuestCr3, BEYOND);
        fails pae: |s| s.or(GuestCr3, 1 << 63);
        passes long: |s| s.or(GuestCr3, BEYOND >> 1 | 0xfff);
    }
    g3_guest_dr7 "guest-dr7" {
        fails long: |s| s.or(GuestDr7, 1 << 32);
        passes long: |s| { s.no_entry(entry::LOAD_DEBUG_CONTROLS); s.or(GuestDr7, 1 << 32) };
    }
    g3_guest_sysenter_canonical "guest-sysenter-canonical" {
        fails long: |s| s.set(GuestSysenterEsp, CROOKED);
        fails real: |s| s.set(GuestSysenterEip, CROOKED);
        passes long: |s| s.set(GuestSysenterEip, u64::MAX);
    }
    g3_guest_pat "guest-pat" {
        fails long: |s| s.set(GuestPat, 2);
        fails long: |s| s.set(GuestPat, 0xff << 24);
        passes long: |s| { s.no_entry(entry::LOAD_PAT); s.set(GuestPat, 2) };
    }
    g3_guest_efer_reserved "guest-efer-reserved" {
        fails long: |s| s.or(GuestEfer, 1 << 12);
        passes long: |s| { s.no_entry(entry::LOAD_EFER); s.or(GuestEfer, 1 << 12) };
    }
    c1_g3_guest_efer_lma "guest-efer-lma" {
        fails long: |s| s.set(GuestEfer, 1 << 8);
        fails long: |s| s.set(GuestEfer, 0);
        fails pae: |s| s.set(GuestEfer, 1 << 8 | 1 << 10);
        fails real: |s| s.set(GuestEfer, 1 << 10);
        passes long: |s| { s.no_entry(entry::LOAD_EFER); s.set(GuestEfer, 0) };
    }
    c1_g3_guest_efer_lme "guest-efer-lme" {
        fails long: |s| s.set(GuestEfer, 1 << 10);
        fails pae: |s| s.set(GuestEfer, 1 << 8);
        passes real: |s| s.set(GuestEfer, 1 << 8);
    }
    g3_guest_table_base_canonical "guest-table-base-canonical" {
        fails long: |s| s.set(GuestGdtrBase, CROOKED);
        fails real: |s| s.set(GuestIdtrBase, CROOKED);
        passes long: |s| s.set(GuestGdtrBase, 0xffff_fe00_0000_0000);
    }
    g3_guest_table_limit "guest-table-limit" {
        fails long: |s| s.set(GuestGdtrLimit, 0x1_0000);
        fails long: |s| s.set(GuestIdtrLimit, 0x8000_0000);
        passes long: |s| s.set(GuestIdtrLimit, 0xffff);
    }
    g3_guest_rip_32_bit "guest-rip-32-bit" {
        fails pae: |s| s.set(GuestRip, 1 << 32);
        fails long: |s| { s.set(GuestCsAccessRights, 0xc09b); s.set(GuestRip, 1 << 32) };
        fails real: |s| s.set(GuestRip, 1 << 63);
        passes pae: |s| s.set(GuestRip, 0xffff_ffff);
        passes long: |s| s.set(GuestRip, 1 << 32);
    }
    g3_guest_rip_canonical "guest-rip-canonical" {
        fails long: |s| s.set(GuestRip, 1 << 57);
        fails long: |s| s.set(GuestRip, 1 << 63);
        // Not canonical, but bits 63:57 are all alike: entry succeeds and the fetch faults.
        passes long: |s| s.set(GuestRip, 1 << 56);
        passes long: |s| s.set(GuestRip, u64::MAX << 56);
    }
    g3_guest_rflags_reserved "guest-rflags-reserved" {
        fails long: |s| s.or(GuestRflags, 1 << 3);
        fails long: |s| s.or(GuestRflags, 1 << 5);
        fails long: |s| s.or(GuestRflags, 1 << 15);
        fails long: |s| s.or(GuestRflags, 1 << 22);
        fails long: |s| s.or(GuestRflags, 1 << 63);
        fails long: |s| s.clear(GuestRflags, 2);
        passes long: |s| s.set(GuestRflags, 0x3d_7fd7);
    }
    g3_guest_rflags_vm "guest-rflags-vm" {
        fails v86: |s| { s.entry(entry::IA32E_MODE_GUEST); s.or(GuestCr4, 1 << 5) };
        fails v86: |s| { s.proc2(proc2::UNRESTRICTED_GUEST); s.clear(GuestCr0, 1 << 31 | 1) };
        passes v86: |s| { s.proc2(proc2::UNRESTRICTED_GUEST); s.clear(GuestCr0, 1 << 31) };
        passes v86: |s| { s.clear(GuestRflags, VM); s.set(GuestRflags, VM | 2) };
    }
    g3_guest_rflags_if "guest-rflags-if" {
        fails long: |s| s.inject(0x8000_0020);
        passes long: |s| { s.or(GuestRflags, IF); s.inject(0x8000_0020) };
        passes long: |s| s.inject(0x8000_0202);
    }
}
