//! G3: the checks on the host-state area and on address-space size.

use Field::*;
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{entry, exit};

use super::checks;
use super::states::{BEYOND, CROOKED};

checks! {
    /// G2, G3: CR0 and CR4 obey the fixed-bits MSRs.
    g3_host_cr0_fixed "host-cr0-fixed" {
        fails long: |s| s.clear(HostCr0, 1);
        fails long: |s| s.clear(HostCr0, 1 << 5);
        fails long: |s| s.clear(HostCr0, 1 << 31);
        fails long: |s| s.or(HostCr0, 1 << 32);
        passes long: |s| s.or(HostCr0, 3 << 29);
    }
    g3_host_cr4_fixed "host-cr4-fixed" {
        fails long: |s| s.clear(HostCr4, 1 << 13);
        fails long: |s| s.or(HostCr4, 1 << 23);
        fails long: |s| s.or(HostCr4, 1 << 63);
        passes long: |s| s.or(HostCr4, 1 << 17);
    }
    g3_host_cr3_width "host-cr3-width" {
        fails long: |s| s.or(HostCr3, BEYOND);
        fails long: |s| s.or(HostCr3, 1 << 63);
        passes long: |s| s.or(HostCr3, BEYOND >> 1 | 0xfff);
    }
    g3_host_sysenter_canonical "host-sysenter-canonical" {
        fails long: |s| s.set(HostSysenterEsp, CROOKED);
        fails long: |s| s.set(HostSysenterEip, CROOKED);
        // The width of the processor counts, not that of the paging mode.
        passes long: |s| s.set(HostSysenterEip, 1 << 50);
    }
    g3_host_pat "host-pat" {
        fails long: |s| s.set(HostPat, 2);
        fails long: |s| s.set(HostPat, 3 << 56);
        fails long: |s| s.set(HostPat, 8 << 8);
        passes long: |s| s.set(HostPat, 0x0706_0504_0100_0001);
        passes long: |s| { s.no_exit(exit::LOAD_PAT); s.set(HostPat, 2) };
    }
    g3_host_efer_reserved "host-efer-reserved" {
        fails long: |s| s.or(HostEfer, 1 << 1);
        fails long: |s| s.or(HostEfer, 1 << 63);
        passes long: |s| { s.no_exit(exit::LOAD_EFER); s.or(HostEfer, 1 << 1) };
    }
    g3_host_efer_mode "host-efer-mode" {
        fails long: |s| s.clear(HostEfer, 1 << 10);
        fails long: |s| s.clear(HostEfer, 1 << 8);
        fails long: |s| s.set(HostEfer, 0);
        fails host_32: |s| s.exit(exit::LOAD_EFER);
        passes host_32: |s| { s.exit(exit::LOAD_EFER); s.set(HostEfer, 1) };
        passes long: |s| { s.no_exit(exit::LOAD_EFER); s.set(HostEfer, 0) };
    }
    g3_host_selector_rpl_ti "host-selector-rpl-ti" {
        fails long: |s| s.set(HostCsSelector, 0x13);
        fails long: |s| s.set(HostSsSelector, 0x1c);
        fails long: |s| s.set(HostDsSelector, 1);
        fails long: |s| s.set(HostEsSelector, 2);
        fails long: |s| s.set(HostFsSelector, 4);
        fails long: |s| s.set(HostGsSelector, 3);
        fails long: |s| s.set(HostTrSelector, 0x44);
        passes long: |s| s.set(HostDsSelector, 0xfff8);
    }
    g3_host_cs_null "host-cs-null" {
        fails long: |s| s.set(HostCsSelector, 0);
    }
    g3_host_tr_null "host-tr-null" {
        fails long: |s| s.set(HostTrSelector, 0);
    }
    g3_host_ss_null "host-ss-null" {
        fails host_32: |s| s.set(HostSsSelector, 0);
        passes long: |s| s.set(HostSsSelector, 0);
    }
    g3_host_base_canonical "host-base-canonical" {
        fails long: |s| s.set(HostFsBase, CROOKED);
        fails long: |s| s.set(HostGsBase, CROOKED);
        fails long: |s| s.set(HostTrBase, CROOKED);
        fails long: |s| s.set(HostGdtrBase, CROOKED);
        fails long: |s| s.set(HostIdtrBase, CROOKED);
        passes long: |s| s.set(HostGsBase, 0xffff_8880_0000_0000);
    }
    /// C1, G3: VM exit and entry may not leave or enter IA-32e mode of the host.
    c1_g3_outside_ia32e_mode "outside-ia32e-mode" {
        fails host_32: |s| s.exit(exit::HOST_ADDRESS_SPACE_SIZE);
        fails host_32: |s| s.entry(entry::IA32E_MODE_GUEST);
    }
    c1_g3_inside_ia32e_mode "inside-ia32e-mode" {
        fails pae: |s| s.no_exit(exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER);
        fails long: |s| s.no_exit(exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER);
    }
    g3_host_32_bit_pcide "host-32-bit-pcide" {
        fails host_32: |s| s.or(HostCr4, 1 << 17);
        passes long: |s| s.or(HostCr4, 1 << 17);
    }
    g3_host_32_bit_rip "host-32-bit-rip" {
        fails host_32: |s| s.set(HostRip, 1 << 32);
        passes host_32: |s| s.set(HostRip, 0xffff_ffff);
    }
    g3_host_64_bit_pae "host-64-bit-pae" {
        fails long: |s| s.clear(HostCr4, 1 << 5);
        passes host_32: |s| s.clear(HostCr4, 1 << 5);
    }
    g3_host_64_bit_rip "host-64-bit-rip" {
        fails long: |s| s.set(HostRip, 1 << 47);
        fails long: |s| { s.or(HostCr4, 1 << 12); s.set(HostRip, 1 << 56) };
        passes long: |s| { s.or(HostCr4, 1 << 12); s.set(HostRip, 1 << 47) };
        passes long: |s| s.set(HostRip, 0xffff_8000_0000_0000);
    }
}
