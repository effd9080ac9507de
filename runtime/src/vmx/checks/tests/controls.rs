//! G3: the checks on VMX controls.

use Field::*;
use twofold_arch::vmx::Field;
use twofold_arch::vmx::control::{exit, exit2, pin, proc, proc2, proc3, vmfunc};

use super::checks;
use super::states::BEYOND;

const TPR: u32 = proc::TPR_SHADOW;
const VID: u32 = proc2::VIRTUAL_INTERRUPT_DELIVERY;
const STI_IF: u64 = 1 << 9;

checks! {
    /// G2, G3: the reserved bits of every word are those the capability MSRs say.
    g3_pin_reserved "pin-reserved" {
        fails long: |s| s.pin(1 << 8);
        fails long: |s| s.no_pin(1 << 1);
        fails long: |s| { s.without("vmx-preemption-timer"); s.pin(pin::PREEMPTION_TIMER) };
        passes long: |s| s.pin(pin::PREEMPTION_TIMER);
    }
    g3_proc_reserved "proc-reserved" {
        fails long: |s| s.proc(1 << 0);
        fails long: |s| s.no_proc(1 << 1);
        fails long: |s| { s.without("vmx-true-ctls"); s.entry(0x11ff); s.exit(0x36dff) };
        passes long: |s| { s.without("vmx-true-ctls"); s.proc(0x18000); s.entry(0x11ff); s.exit(0x36dff) };
        passes long: |s| s.proc(proc::CR3_LOAD_EXITING | proc::CR3_STORE_EXITING);
    }
    g3_proc2_reserved "proc2-reserved" {
        fails long: |s| s.proc2(proc2::PCONFIG);
        fails long: |s| { s.without("vmx-rdtscp-exit"); s.proc2(proc2::RDTSCP) };
        passes long: |s| { s.proc2(u32::MAX); s.no_proc(proc::SECONDARY) };
    }
    g3_proc3_reserved "proc3-reserved" {
        fails long: |s| { s.proc(proc::TERTIARY); s.set(Proc3Controls, 1 << 63) };
        passes long: |s| s.set(Proc3Controls, u64::MAX);
        passes long: |s| s.proc(proc::TERTIARY);
    }
    g3_cr3_target_count "cr3-target-count" {
        fails long: |s| s.set(Cr3TargetCount, 5);
        fails long: |s| s.set(Cr3TargetCount, 0xffff_ffff);
        passes long: |s| s.set(Cr3TargetCount, 4);
    }
    g3_io_bitmap_address "io-bitmap-address" {
        fails long: |s| { s.proc(proc::IO_BITMAPS); s.set(IoBitmapA, 0x1001) };
        fails long: |s| { s.proc(proc::IO_BITMAPS); s.set(IoBitmapB, 0x1800) };
        fails long: |s| { s.proc(proc::IO_BITMAPS); s.set(IoBitmapB, BEYOND) };
        passes long: |s| { s.proc(proc::IO_BITMAPS); s.set(IoBitmapA, BEYOND - 0x1000) };
        passes long: |s| { s.set(IoBitmapA, 1); s.set(IoBitmapB, BEYOND) };
    }
    g3_msr_bitmap_address "msr-bitmap-address" {
        fails long: |s| s.set(MsrBitmap, 0x1800);
        fails long: |s| s.set(MsrBitmap, BEYOND);
        passes long: |s| { s.no_proc(proc::MSR_BITMAPS); s.set(MsrBitmap, 1) };
    }
    g3_virtual_apic_address "virtual-apic-address" {
        fails long: |s| { s.proc(TPR); s.set(VirtualApicAddress, 0x2001) };
        fails long: |s| { s.proc(TPR); s.set(VirtualApicAddress, BEYOND) };
        passes long: |s| { s.proc(TPR); s.set(VirtualApicAddress, BEYOND - 0x1000) };
        passes long: |s| s.set(VirtualApicAddress, 1);
    }
    g3_tpr_threshold_reserved "tpr-threshold-reserved" {
        fails long: |s| { s.proc(TPR); s.set(TprThreshold, 0x10) };
        passes long: |s| { s.proc(TPR); s.proc2(VID); s.set(TprThreshold, 0x10) };
        passes long: |s| s.set(TprThreshold, 0x10);
    }
    g3_tpr_threshold_above_vtpr "tpr-threshold-above-vtpr" {
        fails long: |s| { s.proc(TPR); s.put(0x2080, &[0x4f]); s.set(TprThreshold, 5) };
        passes long: |s| { s.proc(TPR); s.put(0x2080, &[0x50]); s.set(TprThreshold, 5) };
        passes long: |s| { s.proc(TPR); s.proc2(proc2::APIC_ACCESSES); s.set(TprThreshold, 5) };
        passes long: |s| { s.proc(TPR); s.proc2(VID); s.set(TprThreshold, 5) };
    }
    g3_virtual_nmis_need_nmi_exiting "virtual-nmis-need-nmi-exiting" {
        fails long: |s| s.no_pin(pin::NMI_EXITING);
        passes long: |s| s.no_pin(pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    }
    g3_nmi_window_needs_virtual_nmis "nmi-window-needs-virtual-nmis" {
        fails long: |s| { s.no_pin(pin::VIRTUAL_NMIS); s.proc(proc::NMI_WINDOW_EXITING) };
        passes long: |s| s.proc(proc::NMI_WINDOW_EXITING);
    }
    g3_apic_access_address "apic-access-address" {
        fails long: |s| { s.proc2(proc2::APIC_ACCESSES); s.set(ApicAccessAddress, 0x800) };
        fails long: |s| { s.proc2(proc2::APIC_ACCESSES); s.set(ApicAccessAddress, BEYOND) };
        passes long: |s| { s.proc2(proc2::APIC_ACCESSES); s.set(ApicAccessAddress, 0xfee0_0000) };
    }
    g3_apic_virtualization_needs_tpr_shadow "apic-virtualization-needs-tpr-shadow" {
        fails long: |s| s.proc2(proc2::X2APIC_MODE);
        fails long: |s| s.proc2(proc2::APIC_REGISTERS);
        fails long: |s| s.proc2(VID);
        passes long: |s| { s.proc(TPR); s.proc2(proc2::APIC_REGISTERS | VID | proc2::X2APIC_MODE) };
    }
    g3_x2apic_mode_excludes_apic_accesses "x2apic-mode-excludes-apic-accesses" {
        fails long: |s| { s.proc(TPR); s.proc2(proc2::X2APIC_MODE | proc2::APIC_ACCESSES) };
    }
    g3_interrupt_delivery_needs_interrupt_exiting "interrupt-delivery-needs-interrupt-exiting" {
        fails long: |s| { s.proc(TPR); s.proc2(VID); s.no_pin(pin::EXTERNAL_INTERRUPT_EXITING) };
        passes long: |s| s.no_pin(pin::EXTERNAL_INTERRUPT_EXITING);
    }
    g3_posted_interrupts_need_delivery "posted-interrupts-need-delivery" {
        fails long: |s| s.pin(pin::POSTED_INTERRUPTS);
        passes long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS) };
    }
    g3_posted_interrupt_vector "posted-interrupt-vector" {
        fails long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS); s.set(PostedInterruptVector, 0x100) };
        passes long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS); s.set(PostedInterruptVector, 0xff) };
        passes long: |s| s.set(PostedInterruptVector, 0x100);
    }
    g3_posted_interrupt_descriptor "posted-interrupt-descriptor" {
        fails long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS); s.set(PostedInterruptDescriptor, 0x20) };
        fails long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS); s.set(PostedInterruptDescriptor, BEYOND) };
        passes long: |s| { s.proc(TPR); s.proc2(VID); s.pin(pin::POSTED_INTERRUPTS); s.set(PostedInterruptDescriptor, 0x40) };
    }
    g3_vpid_zero "vpid-zero" {
        fails long: |s| s.set(Vpid, 0);
        passes long: |s| { s.set(Vpid, 0); s.no_proc2(proc2::VPID) };
        passes long: |s| s.set(Vpid, 0xffff);
    }
    g3_eptp_memory_type "eptp-memory-type" {
        fails long: |s| s.set(Eptp, 0x10_0000 | 3 << 3 | 1);
        fails long: |s| s.set(Eptp, 0x10_0000 | 3 << 3 | 7);
        fails long: |s| { s.without("vmx-ept-uc"); s.set(Eptp, 0x10_0000 | 3 << 3) };
        passes long: |s| s.set(Eptp, 0x10_0000 | 3 << 3);
        passes long: |s| { s.no_ept(); s.set(Eptp, u64::MAX) };
    }
    g3_eptp_walk_length "eptp-walk-length" {
        fails long: |s| s.set(Eptp, 0x10_0000 | 2 << 3 | 6);
        fails long: |s| s.set(Eptp, 0x10_0000 | 5 << 3 | 6);
        fails long: |s| { s.without("vmx-page-walk-5"); s.set(Eptp, 0x10_0000 | 4 << 3 | 6) };
        passes long: |s| s.set(Eptp, 0x10_0000 | 4 << 3 | 6);
    }
    g3_eptp_accessed_dirty "eptp-accessed-dirty" {
        fails long: |s| s.without("vmx-eptad");
        passes long: |s| { s.without("vmx-eptad"); s.clear(Eptp, 1 << 6) };
    }
    g3_eptp_reserved "eptp-reserved" {
        fails long: |s| s.or(Eptp, 1 << 7);
        fails long: |s| s.or(Eptp, 1 << 11);
        fails long: |s| s.or(Eptp, BEYOND);
        fails long: |s| s.or(Eptp, 1 << 63);
        passes long: |s| s.or(Eptp, BEYOND >> 1);
    }
    g3_pml_needs_ept "pml-needs-ept" {
        fails long: |s| { s.no_ept(); s.proc2(proc2::PML) };
        passes long: |s| s.proc2(proc2::PML);
    }
    g3_pml_address "pml-address" {
        fails long: |s| { s.proc2(proc2::PML); s.set(PmlAddress, 0x10) };
        fails long: |s| { s.proc2(proc2::PML); s.set(PmlAddress, BEYOND) };
        passes long: |s| s.set(PmlAddress, 0x10);
    }
    g3_unrestricted_guest_needs_ept "unrestricted-guest-needs-ept" {
        fails long: |s| s.no_proc2(proc2::EPT);
        passes long: |s| s.no_ept();
    }
    g3_mode_based_execute_needs_ept "mode-based-execute-needs-ept" {
        fails long: |s| { s.no_ept(); s.proc2(proc2::MODE_BASED_EXECUTE) };
        passes long: |s| s.proc2(proc2::MODE_BASED_EXECUTE);
    }
    g3_sub_page_write_needs_ept "sub-page-write-needs-ept" {
        fails long: |s| { s.no_ept(); s.proc2(proc2::SUB_PAGE_WRITE) };
        passes long: |s| s.proc2(proc2::SUB_PAGE_WRITE);
    }
    g3_sub_page_permission_table "sub-page-permission-table" {
        fails long: |s| { s.proc2(proc2::SUB_PAGE_WRITE); s.set(SubPagePermissionTable, 0x10) };
        fails long: |s| { s.proc2(proc2::SUB_PAGE_WRITE); s.set(SubPagePermissionTable, BEYOND) };
        passes long: |s| s.set(SubPagePermissionTable, 0x10);
    }
    g3_vm_functions_reserved "vm-functions-reserved" {
        fails long: |s| { s.proc2(proc2::VM_FUNCTIONS); s.set(VmFunctionControls, 2) };
        passes long: |s| { s.proc2(proc2::VM_FUNCTIONS); s.set(VmFunctionControls, vmfunc::EPTP_SWITCHING) };
        passes long: |s| s.set(VmFunctionControls, 2);
    }
    g3_eptp_switching_needs_ept "eptp-switching-needs-ept" {
        fails long: |s| { s.no_ept(); s.proc2(proc2::VM_FUNCTIONS); s.set(VmFunctionControls, vmfunc::EPTP_SWITCHING) };
        passes long: |s| { s.no_ept(); s.proc2(proc2::VM_FUNCTIONS) };
    }
    g3_eptp_list_address "eptp-list-address" {
        fails long: |s| { s.proc2(proc2::VM_FUNCTIONS); s.set(VmFunctionControls, 1); s.set(EptpListAddress, 8) };
        fails long: |s| { s.proc2(proc2::VM_FUNCTIONS); s.set(VmFunctionControls, 1); s.set(EptpListAddress, BEYOND) };
        passes long: |s| { s.proc2(proc2::VM_FUNCTIONS); s.set(EptpListAddress, 8) };
    }
    g3_vmread_bitmap_address "vmread-bitmap-address" {
        fails long: |s| { s.proc2(proc2::VMCS_SHADOWING); s.set(VmreadBitmap, 8) };
        fails long: |s| { s.proc2(proc2::VMCS_SHADOWING); s.set(VmreadBitmap, BEYOND) };
        passes long: |s| { s.proc2(proc2::VMCS_SHADOWING); s.set(VmreadBitmap, 0x3000) };
        passes long: |s| s.set(VmreadBitmap, 8);
    }
    g3_vmwrite_bitmap_address "vmwrite-bitmap-address" {
        fails long: |s| { s.proc2(proc2::VMCS_SHADOWING); s.set(VmwriteBitmap, 8) };
        fails long: |s| { s.proc2(proc2::VMCS_SHADOWING); s.set(VmwriteBitmap, BEYOND) };
        passes long: |s| s.set(VmwriteBitmap, 8);
    }
    g3_ve_information_address "ve-information-address" {
        fails long: |s| { s.proc2(proc2::EPT_VIOLATION_VE); s.set(VeInformationAddress, 8) };
        fails long: |s| { s.proc2(proc2::EPT_VIOLATION_VE); s.set(VeInformationAddress, BEYOND) };
        passes long: |s| s.proc2(proc2::EPT_VIOLATION_VE);
    }
    g3_tsc_multiplier_zero "tsc-multiplier-zero" {
        fails long: |s| { s.proc2(proc2::TSC_SCALING); s.set(TscMultiplier, 0) };
        passes long: |s| s.proc2(proc2::TSC_SCALING);
        passes long: |s| s.set(TscMultiplier, 0);
    }
    g3_ipi_virtualization_needs_tpr_shadow "ipi-virtualization-needs-tpr-shadow" {
        fails long: |s| { s.proc(proc::TERTIARY); s.set(Proc3Controls, proc3::IPI_VIRTUALIZATION) };
        passes long: |s| { s.proc(proc::TERTIARY | TPR); s.set(Proc3Controls, proc3::IPI_VIRTUALIZATION) };
    }
    g3_pid_pointer_table "pid-pointer-table" {
        fails long: |s| { s.proc(proc::TERTIARY | TPR); s.set(Proc3Controls, 16); s.set(PidPointerTable, 4) };
        fails long: |s| {
            s.proc(proc::TERTIARY | TPR);
            s.set(Proc3Controls, 16);
            s.set(PidPointerTable, BEYOND - 8);
            s.set(LastPidPointerIndex, 1)
        };
        passes long: |s| { s.proc(proc::TERTIARY | TPR); s.set(Proc3Controls, 16); s.set(PidPointerTable, BEYOND - 8) };
    }
    g3_exit_reserved "exit-reserved" {
        fails long: |s| s.exit(exit::LOAD_PERF_GLOBAL_CTRL);
        fails long: |s| s.no_exit(1);
        passes long: |s| s.no_exit(exit::SAVE_DEBUG_CONTROLS);
    }
    g3_exit2_reserved "exit2-reserved" {
        fails long: |s| { s.exit(exit::SECONDARY); s.set(Exit2Controls, exit2::SAVE_FRED) };
        passes long: |s| { s.exit(exit::SECONDARY); s.set(Exit2Controls, exit2::PREMATURELY_BUSY_SHADOW_STACK) };
        passes long: |s| s.set(Exit2Controls, u64::MAX);
    }
    g3_save_preemption_timer "save-preemption-timer" {
        fails long: |s| s.exit(exit::SAVE_PREEMPTION_TIMER);
        passes long: |s| { s.exit(exit::SAVE_PREEMPTION_TIMER); s.pin(pin::PREEMPTION_TIMER) };
    }
    g3_posted_interrupts_need_acknowledge "posted-interrupts-need-acknowledge" {
        fails long: |s| {
            s.proc(TPR);
            s.proc2(VID);
            s.pin(pin::POSTED_INTERRUPTS);
            s.no_exit(exit::ACKNOWLEDGE_INTERRUPT)
        };
        passes long: |s| s.no_exit(exit::ACKNOWLEDGE_INTERRUPT);
    }
    g3_exit_msr_store_area "exit-msr-store-area" {
        fails long: |s| { s.set(ExitMsrStoreCount, 1); s.set(ExitMsrStoreAddress, 8) };
        fails long: |s| { s.set(ExitMsrStoreCount, 1); s.set(ExitMsrStoreAddress, BEYOND) };
        fails long: |s| { s.set(ExitMsrStoreCount, 2); s.set(ExitMsrStoreAddress, BEYOND - 16) };
        passes long: |s| { s.set(ExitMsrStoreCount, 1); s.set(ExitMsrStoreAddress, BEYOND - 16) };
        passes long: |s| s.set(ExitMsrStoreAddress, 8);
    }
    g3_exit_msr_load_area "exit-msr-load-area" {
        fails long: |s| { s.set(ExitMsrLoadCount, 1); s.set(ExitMsrLoadAddress, 8) };
        fails long: |s| { s.set(ExitMsrLoadCount, 0xffff_ffff); s.set(ExitMsrLoadAddress, BEYOND - 0x1000) };
        passes long: |s| { s.set(ExitMsrLoadCount, 256); s.set(ExitMsrLoadAddress, BEYOND - 0x1000) };
    }
    g3_entry_reserved "entry-reserved" {
        fails long: |s| s.entry(1 << 13);
        fails long: |s| s.no_entry(1);
        // There is no dual-monitor treatment.
        fails long: |s| s.entry(1 << 10);
        fails long: |s| s.entry(1 << 11);
    }
    g3_event_type "event-type" {
        fails long: |s| s.inject(0x8000_0100);
        fails long: |s| { s.without("vmx-mtf"); s.inject(0x8000_0700) };
        passes long: |s| s.inject(0x8000_0700);
        passes long: |s| s.inject(0x100);
    }
    g3_event_vector "event-vector" {
        fails long: |s| s.inject(0x8000_0203);
        fails long: |s| s.inject(0x8000_0320);
        fails long: |s| s.inject(0x8000_0701);
        passes long: |s| s.inject(0x8000_0202);
        passes long: |s| s.inject(0x8000_031f);
        passes long: |s| { s.or(GuestRflags, STI_IF); s.inject(0x8000_00ff) };
    }
    g3_event_error_code_valid "event-error-code-valid" {
        fails long: |s| s.inject(0x8000_0b06);
        fails long: |s| s.inject(0x8000_030d);
        fails long: |s| { s.or(GuestRflags, STI_IF); s.inject(0x8000_0820) };
        fails real: |s| s.inject(0x8000_0b0d);
        fails real: |s| { s.with("vmx-any-errcode"); s.inject(0x8000_0b0d) };
        // CET is not there, so #CP has no error code.
        fails long: |s| s.inject(0x8000_0b15);
        passes real: |s| s.inject(0x8000_030d);
        passes long: |s| { s.with("vmx-any-errcode"); s.inject(0x8000_0b06) };
        passes long: |s| { s.with("vmx-any-errcode"); s.inject(0x8000_030d) };
        passes long: |s| s.inject(0x8000_0b11);
        passes long: |s| s.inject(0x8000_0306);
    }
    g3_event_reserved "event-reserved" {
        fails long: |s| s.inject(0x8000_1b0e);
        fails long: |s| s.inject(0xc000_0b0e);
        passes long: |s| s.inject(0x7fff_ffff);
    }
    g3_event_error_code "event-error-code" {
        fails long: |s| { s.inject(0x8000_0b0e); s.set(EntryErrorCode, 0x1_0000) };
        passes long: |s| { s.inject(0x8000_0b0e); s.set(EntryErrorCode, 0xffff) };
        passes long: |s| { s.inject(0x8000_0306); s.set(EntryErrorCode, 0x1_0000) };
    }
    g3_event_instruction_length "event-instruction-length" {
        fails long: |s| { s.inject(0x8000_0480); s.set(EntryInstructionLength, 16) };
        fails long: |s| { s.without("vmx-zero-len-inject"); s.inject(0x8000_0603) };
        fails long: |s| { s.inject(0x8000_0501); s.set(EntryInstructionLength, 0xffff_ffff) };
        passes long: |s| { s.inject(0x8000_0480); s.set(EntryInstructionLength, 15) };
        passes long: |s| s.inject(0x8000_0603);
        passes long: |s| { s.inject(0x8000_0306); s.set(EntryInstructionLength, 16) };
    }
    g3_entry_msr_load_area "entry-msr-load-area" {
        fails long: |s| { s.set(EntryMsrLoadCount, 1); s.set(EntryMsrLoadAddress, 8) };
        fails long: |s| { s.set(EntryMsrLoadCount, 2); s.set(EntryMsrLoadAddress, BEYOND - 16) };
        passes long: |s| { s.set(EntryMsrLoadCount, 1); s.set(EntryMsrLoadAddress, 0x10) };
    }
}
