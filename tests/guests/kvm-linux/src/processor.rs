//! The processor's state at the kernel's entry points, and what KVM says when it gives up.
#![allow(unsafe_code)] // a union in what KVM shares

use crate::because;
use crate::load::Entry;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
/// How much is mapped to itself at the 64-bit entry, in GiB.
const MAPPED: u64 = 4;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// A flat segment, as the descriptor table has it and as KVM wants it.
fn segment(selector: u16, type_: u8, long: bool) -> (u64, kvm_segment) {
    let long_bits = if long { 1 << 53 } else { 1 << 54 };
    let descriptor = 0x008f_9000_0000_ffff | u64::from(type_) << 40 | long_bits;
    let (l, db) = (u8::from(long), u8::from(!long));
    let hidden = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    (descriptor, hidden)
}

fn identity_map(memory: &GuestMemoryMmap<()>) -> Result<(), String> {
    let write = |at: u64, entry: u64| memory.write_obj(entry, GuestAddress(at)).map_err(because("page tables"));
    write(PML4, PDPT | 3)?;
    for i in 0..MAPPED {
        write(PDPT + i * 8, (PAGE_DIRECTORIES + i * 0x1000) | 3)?;
    }
    for i in 0..MAPPED * 512 {
        write(PAGE_DIRECTORIES + i * 8, i << 21 | 0x83)?;
    }
    Ok(())
}

/// What KVM supports, with what only a VMM can say: a hypervisor and the TSC-deadline timer are there, the APIC is number 0.
fn cpuid(kvm: &Kvm) -> Result<CpuId, String> {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut all = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(because("KVM_GET_SUPPORTED_CPUID"))?;
    for leaf in all.as_mut_slice() {
        match leaf.function {
            1 => {
                leaf.ebx &= 0x00ff_ffff;
                leaf.ecx |= HYPERVISOR | TSC_DEADLINE;
            }
            0xb | 0x1f => leaf.edx = 0,
            _ => {}
        }
    }
    Ok(all)
}

/// Fast strings are on, as firmware leaves them. Without, Linux 6.1 takes away ERMS but not FSRM, and its memmove then has no
/// code for short copies: the kernel runs into the end of its mappings at the first one.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), String> {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    let msrs = [kvm_msr_entry { index: MISC_ENABLE, data: FAST_STRINGS, ..Default::default() }];
    let msrs = Msrs::from_entries(&msrs).map_err(because("MSRs"))?;
    match vcpu.set_msrs(&msrs).map_err(because("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err("KVM_SET_MSRS: IA32_MISC_ENABLE refused".to_owned()),
    }
}

/// The state that the boot protocol wants: 64-bit mode with everything mapped to itself, or 32-bit mode without paging.
pub fn set_up(kvm: &Kvm, vcpu: &VcpuFd, memory: &GuestMemoryMmap<()>, entry: &Entry) -> Result<(), String> {
    vcpu.set_cpuid2(&cpuid(kvm)?).map_err(because("KVM_SET_CPUID2"))?;
    set_msrs(vcpu)?;
    let mut s = vcpu.get_sregs().map_err(because("KVM_GET_SREGS"))?;
    let (code_descriptor, code) = segment(CODE, 0xb, entry.long);
    let (data_descriptor, data) = segment(DATA, 3, false);
    s.cs = code;
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    for (at, descriptor) in [(CODE, code_descriptor), (DATA, data_descriptor)] {
        memory.write_obj(descriptor, GuestAddress(GDT + u64::from(at))).map_err(because("GDT"))?;
    }
    (s.gdt.base, s.gdt.limit) = (GDT, DATA + 7);
    s.cr0 |= CR0_PE;
    if entry.long {
        identity_map(memory)?;
        s.cr0 |= CR0_PG;
        s.cr4 |= CR4_PAE;
        s.cr3 = PML4;
        s.efer |= EFER_LME_LMA;
    }
    vcpu.set_sregs(&s).map_err(because("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: entry.rip, rsi: entry.parameters, rsp: GDT, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(because("KVM_SET_REGS"))
}

/// The suberror and data of KVM_EXIT_INTERNAL_ERROR; nothing for other exits.
pub fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return String::new();
    }
    // SAFETY: the exit reason says that this is the union's member, and it is made of numbers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let n = internal.data.len().min(internal.ndata as usize);
    format!(", suberror {} data {:x?}", internal.suberror, &internal.data[..n])
}
