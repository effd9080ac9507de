//! A guest that runs a loop in L1 or in L2: L1's loop with paging, or L1 as a hypervisor of one guest under VMX or SVM.
//!
//! One Multiboot image each. Page tables and EPT are made here, not by the guest: 2 MiB pages, but for the data, which has
//! 4 KiB pages; EPT has 4 KiB pages throughout. L1 and L2 run the loop from the same place under the same tables. The VMX
//! controls are what Linux's KVM sets. isa-debug-exit ends the machine with status 1.

use crate::kernels::Kernel;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction};
use twofold_arch::control::cr4;
use twofold_arch::msr;
use twofold_arch::vmx::control::{entry, exit, pin, proc, proc2};
use twofold_arch::vmx::msr as vmx_msr;
use twofold_arch::vmx::{ExitReason, Field};

const BASE: u32 = 0x10_0000;
const ENTRY: u32 = BASE + 0x20;
const GDT: u32 = BASE + 0x200;
/// L1's code.
const CODE64: u32 = BASE + 0x1000;
/// The loop.
const LOOP: u32 = BASE + 0x4000;
const STACK: u32 = BASE + 0x8000;
const VMXON: u32 = BASE + 0x8000;
const VMCS: u32 = BASE + 0x9000;
const MSR_BITMAP: u32 = BASE + 0xa000;
const VIRTUAL_APIC: u32 = BASE + 0xb000;
const APIC_ACCESS: u32 = BASE + 0xc000;
const POSTED: u32 = BASE + 0xd000;
const PML: u32 = BASE + 0xe000;
/// Operands of VMXON and VMPTRLD.
const POINTERS: u32 = BASE + 0xf000;
const VMCB: u32 = BASE + 0x1_0000;
const HSAVE: u32 = BASE + 0x1_1000;
/// PML4, PDPT, page directory, and the page tables of the data.
const TABLES: u32 = BASE + 0x20_0000;
/// The same for guest-physical memory: SVM's large pages, and EPT.
const NESTED: u32 = BASE + 0x6_0000;
const EPT: u32 = BASE + 0x8_0000;
const END: u32 = BASE + 0x40_0000;

/// Where the data is.
const DATA: u32 = 0x100_0000;
/// Pages of data in linear memory; they share fewer frames.
pub const DATA_PAGES: u32 = 0x2_0000;
/// The most frames.
pub const FRAMES: u32 = 0x4000;
/// RAM the guest needs.
pub const MEMORY_MIB: u32 = 96;

const EFER: u32 = msr::EFER;
const EFER_LONG: u64 = 0x500;
const PAT: u64 = 0x0007_0406_0007_0406;

/// Where a loop runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Under no hypervisor.
    L1,
    /// Under VMX, with EPT and VPID.
    Vmx,
    /// Under SVM, with nested paging.
    Svm,
}

/// What a loop does. RCX counts the turns.
#[derive(Clone, Copy, Debug)]
pub enum Work<'a> {
    /// One of the loops of `guest-speed`.
    Kernel(&'a Kernel),
    /// A read from each of `pages` pages in `frames` frames (powers of two) by turns, in an order that looks random.
    Pages {
        /// At most [`DATA_PAGES`].
        pages: u32,
        /// At most [`FRAMES`].
        frames: u32,
    },
    /// CPUID, which the hypervisor skips.
    Exit,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Work<'_> {
    fn emit(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Work::Kernel(kernel) => (kernel.body)(a),
            Work::Pages { pages, .. } => {
                // Once in so many turns all of the TLB goes: it may hold every page.
                let mut go_on = a.create_label();
                a.test(ecx, DATA_PAGES as i32 - 1)?;
                a.jne(go_on)?;
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
                a.set_label(&mut go_on)?;
                a.lea(edi, ptr(rdi + rdi * 4 + 1))?;
                a.and(edi, pages - 1)?;
                a.mov(eax, edi)?;
                a.shl(eax, 12)?;
                a.add(rbx, qword_ptr(rsi + rax))
            }
            Work::Exit => a.cpuid(),
        }
    }
}

/// The bytes of an image, from [`BASE`].
struct Memory(Vec<u8>);

impl Memory {
    fn put(&mut self, at: u32, bytes: &[u8]) {
        let at = (at - BASE) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put64(&mut self, at: u32, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Maps the first GiB to itself by 2 MiB pages: PML4, PDPT and page directory at `at`.
    fn map(&mut self, at: u32, table: u64, large: u64) {
        self.put64(at, u64::from(at + 0x1000) | table);
        self.put64(at + 0x1000, u64::from(at + 0x2000) | table);
        for i in 0..512 {
            self.put64(at + 0x2000 + 8 * i, u64::from(i) << 21 | large);
        }
    }

    /// Page tables behind the page directory at `directory` for `pages` pages from `first`, in the first `frames` of them.
    fn map_small(&mut self, directory: u32, first: u32, [pages, frames]: [u32; 2], table: u64, leaf: u64) {
        let tables = directory + 0x1000;
        for i in 0..pages / 512 {
            self.put64(directory + 8 * ((first >> 21) + i), u64::from(tables + 0x1000 * i) | table);
        }
        for i in 0..pages {
            self.put64(tables + 8 * i, u64::from(first + 0x1000 * (i % frames)) | leaf);
        }
    }
}

/// The guest that does `work` in `place`, `turns` times.
///
/// # Errors
/// When iced cannot encode it: a mistake here.
pub fn image(place: Place, work: Work<'_>, turns: u64) -> Result<Vec<u8>, IcedError> {
    let mut m = Memory(vec![0; (END - BASE) as usize]);
    let flags = 1 << 16;
    let header = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags), BASE, BASE, END, END, ENTRY];
    for (i, word) in (0..).zip(header) {
        m.put(BASE + 4 * i, &word.to_le_bytes());
    }
    m.put(ENTRY, &enter_64_bit()?);
    // Null, 64-bit code, data.
    for (i, descriptor) in (0..).zip([0u64, 0x0020_9b00_0000_0000, 0x00cf_9300_0000_ffff]) {
        m.put64(GDT + 8 * i, descriptor);
    }
    m.put(GDT + 0x20, &[0x17, 0]);
    m.put64(GDT + 0x22, GDT.into());
    m.map(TABLES, 0x63, 0x1e3);
    let frames = if let Work::Pages { frames, .. } = work { frames } else { FRAMES };
    m.map_small(TABLES + 0x2000, DATA, [DATA_PAGES, frames], 0x63, 0x63);
    m.map(NESTED, 0x67, 0xe7);
    // Read, write, execute, write-back, accessed and dirty.
    m.map(EPT, 0x107, 0x3b7 | 0x80);
    m.map_small(EPT + 0x2000, 0, [MEMORY_MIB << 8; 2], 0x107, 0x337);
    m.put64(POINTERS, VMXON.into());
    m.put64(POINTERS + 8, VMCS.into());
    put_vmcb(&mut m);
    let code = match place {
        Place::L1 => {
            let mut a = CodeAssembler::new(64)?;
            a.mov(rax, u64::from(LOOP))?;
            a.jmp(rax)?;
            a.assemble(CODE64.into())?
        }
        Place::Vmx => vmx_hypervisor()?,
        Place::Svm => svm_hypervisor()?,
    };
    m.put(CODE64, &code);
    m.put(LOOP, &emit_loop(place, work, turns)?);
    Ok(m.0)
}

/// From Multiboot's 32-bit mode to 64-bit mode, with the interrupt controllers masked: firmware may have left a timer running.
fn enter_64_bit() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(eax, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    a.mov(eax, 0xa0)?;
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.mov(eax, 0x100)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(eax, 0x8001_0031u32)?;
    a.mov(cr0, eax)?;
    a.lgdt(ptr(GDT + 0x20))?;
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, 8, CODE64)?)?;
    a.assemble(ENTRY.into())
}

/// Ends the machine: isa-debug-exit makes of `value` the exit status `value << 1 | 1`.
fn emit_end(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()
}

fn emit_loop(place: Place, work: Work<'_>, turns: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(rsp, u64::from(STACK))?;
    a.mov(rsi, u64::from(DATA))?;
    for register in [rax, rbx, rdx, rdi] {
        a.mov(register, 0x0123_4567_89ab_cdefu64)?;
    }
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.mov(rcx, turns)?;
    a.test(rcx, rcx)?;
    a.je(done)?;
    a.set_label(&mut again)?;
    work.emit(&mut a)?;
    a.dec(rcx)?;
    a.jne(again)?;
    a.set_label(&mut done)?;
    match place {
        Place::L1 => emit_end(&mut a, 0)?,
        Place::Vmx | Place::Svm => a.hlt()?,
    }
    a.assemble(LOOP.into())
}

/// VMWRITE of RAX.
fn emit_vmwrite(a: &mut CodeAssembler, field: Field) -> Result<(), IcedError> {
    a.mov(edx, field.encoding())?;
    a.vmwrite(rdx, rax)
}

/// A control word: what is wanted, what must be, and nothing that may not be.
fn emit_controls(a: &mut CodeAssembler, field: Field, capability: u32, wanted: u32) -> Result<(), IcedError> {
    a.mov(ecx, capability)?;
    a.rdmsr()?;
    a.or(eax, wanted as i32)?;
    a.and(eax, edx)?;
    emit_vmwrite(a, field)
}

fn vmx_hypervisor() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut exited, mut resume, mut failed) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rax, cr4)?;
    a.or(eax, cr4::VMXE as i32)?;
    a.mov(cr4, rax)?;
    a.mov(ecx, vmx_msr::BASIC)?;
    a.rdmsr()?;
    a.and(eax, 0x7fff_ffff)?;
    a.mov(dword_ptr(VMXON), eax)?;
    a.mov(dword_ptr(VMCS), eax)?;
    a.vmxon(qword_ptr(POINTERS))?;
    a.jbe(failed)?;
    a.vmclear(qword_ptr(POINTERS + 8))?;
    a.vmptrld(qword_ptr(POINTERS + 8))?;
    for (field, capability, wanted) in kvms_controls() {
        emit_controls(&mut a, field, capability, wanted)?;
    }
    for (field, value) in fields() {
        a.mov(rax, value)?;
        emit_vmwrite(&mut a, field)?;
    }
    a.mov(rax, cr0)?;
    emit_vmwrite(&mut a, Field::HostCr0)?;
    emit_vmwrite(&mut a, Field::GuestCr0)?;
    a.mov(rax, cr4)?;
    emit_vmwrite(&mut a, Field::HostCr4)?;
    emit_vmwrite(&mut a, Field::GuestCr4)?;
    a.lea(rax, ptr(exited))?;
    emit_vmwrite(&mut a, Field::HostRip)?;
    a.vmlaunch()?;
    a.set_label(&mut failed)?;
    emit_end(&mut a, 5)?;
    // An exit: RCX counts in the guest and stays.
    a.set_label(&mut exited)?;
    a.mov(edx, Field::ExitReason.encoding())?;
    a.vmread(rax, rdx)?;
    a.cmp(eax, ExitReason::Cpuid as i32)?;
    a.je(resume)?;
    a.cmp(eax, ExitReason::Hlt as i32)?;
    a.jne(failed)?;
    emit_end(&mut a, 0)?;
    a.set_label(&mut resume)?;
    a.mov(edx, Field::ExitInstructionLength.encoding())?;
    a.vmread(rbx, rdx)?;
    a.mov(edx, Field::GuestRip.encoding())?;
    a.vmread(rax, rdx)?;
    a.add(rax, rbx)?;
    a.vmwrite(rdx, rax)?;
    a.vmresume()?;
    emit_end(&mut a, 6)?;
    a.assemble(CODE64.into())
}

/// The controls that Linux's KVM sets, with the capability MSR of each word.
fn kvms_controls() -> [(Field, u32, u32); 5] {
    [
        (
            Field::PinControls,
            vmx_msr::TRUE_PINBASED_CTLS,
            pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS | pin::POSTED_INTERRUPTS,
        ),
        (
            Field::ProcControls,
            vmx_msr::TRUE_PROCBASED_CTLS,
            proc::TSC_OFFSETTING
                | proc::HLT_EXITING
                | proc::MWAIT_EXITING
                | proc::MONITOR_EXITING
                | proc::RDPMC_EXITING
                | proc::MOV_DR_EXITING
                | proc::TPR_SHADOW
                | proc::UNCONDITIONAL_IO_EXITING
                | proc::MSR_BITMAPS
                | proc::SECONDARY,
        ),
        (
            Field::Proc2Controls,
            vmx_msr::PROCBASED_CTLS2,
            proc2::APIC_ACCESSES
                | proc2::EPT
                | proc2::RDTSCP
                | proc2::VPID
                | proc2::WBINVD_EXITING
                | proc2::UNRESTRICTED_GUEST
                | proc2::APIC_REGISTERS
                | proc2::VIRTUAL_INTERRUPT_DELIVERY
                | proc2::PAUSE_LOOP_EXITING
                | proc2::INVPCID
                | proc2::PML
                | proc2::XSAVES,
        ),
        (
            Field::ExitControls,
            vmx_msr::TRUE_EXIT_CTLS,
            exit::SAVE_DEBUG_CONTROLS
                | exit::HOST_ADDRESS_SPACE_SIZE
                | exit::ACKNOWLEDGE_INTERRUPT
                | exit::SAVE_PAT
                | exit::LOAD_PAT
                | exit::LOAD_EFER,
        ),
        (
            Field::EntryControls,
            vmx_msr::TRUE_ENTRY_CTLS,
            entry::LOAD_DEBUG_CONTROLS | entry::IA32E_MODE_GUEST | entry::LOAD_PAT | entry::LOAD_EFER,
        ),
    ]
}

/// The other fields, except for what the guest reads from its registers.
fn fields() -> Vec<(Field, u64)> {
    let mut all = vec![
        (Field::VmcsLinkPointer, u64::MAX),
        (Field::Vpid, 1),
        (Field::Eptp, u64::from(EPT) | 0x5e),
        (Field::MsrBitmap, MSR_BITMAP.into()),
        (Field::VirtualApicAddress, VIRTUAL_APIC.into()),
        (Field::ApicAccessAddress, APIC_ACCESS.into()),
        (Field::PostedInterruptVector, 0xf2),
        (Field::PostedInterruptDescriptor, POSTED.into()),
        (Field::PmlAddress, PML.into()),
        (Field::PmlIndex, 511),
        (Field::HostCr3, TABLES.into()),
        (Field::HostRsp, STACK.into()),
        (Field::HostEfer, EFER_LONG),
        (Field::HostPat, PAT),
        (Field::HostCsSelector, 8),
        (Field::HostSsSelector, 0x10),
        (Field::HostDsSelector, 0x10),
        (Field::HostEsSelector, 0x10),
        (Field::HostTrSelector, 0x10),
        (Field::HostGdtrBase, GDT.into()),
        (Field::GuestCr3, TABLES.into()),
        (Field::GuestEfer, EFER_LONG),
        (Field::GuestPat, PAT),
        (Field::GuestDr7, 0x400),
        (Field::GuestRflags, 2),
        (Field::GuestRip, LOOP.into()),
        (Field::GuestGdtrBase, GDT.into()),
        (Field::GuestGdtrLimit, 0x17),
    ];
    for n in 0..6 {
        let (selector, rights) = if n == 1 { (8, 0xa09b) } else { (0x10, 0xc093) };
        all.extend([
            (Field::guest_selector(n), selector),
            (Field::guest_limit(n), 0xffff_ffff),
            (Field::guest_access_rights(n), rights),
        ]);
    }
    all.extend([
        (Field::guest_access_rights(6), 0x1_0000),
        (Field::guest_selector(7), 0x10),
        (Field::guest_limit(7), 0x67),
        (Field::guest_access_rights(7), 0x8b),
    ]);
    all
}

/// Offsets in the VMCB (AMD64 Architecture Programmer's Manual, volume 2, "VMCB Layout").
mod vmcb {
    pub const INTERCEPT_3: u32 = 0xc;
    pub const INTERCEPT_4: u32 = 0x10;
    pub const ASID: u32 = 0x58;
    pub const EXITCODE: u32 = 0x70;
    pub const NESTED_PAGING: u32 = 0x90;
    pub const NESTED_CR3: u32 = 0xb0;
    pub const SEGMENTS: u32 = 0x400;
    pub const EFER: u32 = 0x4d0;
    pub const CR4: u32 = 0x548;
    pub const CR3: u32 = 0x550;
    pub const CR0: u32 = 0x558;
    pub const DR7: u32 = 0x560;
    pub const DR6: u32 = 0x568;
    pub const RFLAGS: u32 = 0x570;
    pub const RIP: u32 = 0x578;
    pub const PAT: u32 = 0x668;

    pub const INTERCEPT_CPUID: u32 = 1 << 18;
    pub const INTERCEPT_HLT: u32 = 1 << 24;
    pub const INTERCEPT_VMRUN: u32 = 1;
    pub const EXIT_CPUID: u32 = 0x72;
    pub const EXIT_HLT: u32 = 0x78;
}

fn put_vmcb(m: &mut Memory) {
    const SVME: u64 = 1 << 12;
    m.put(VMCB + vmcb::INTERCEPT_3, &(vmcb::INTERCEPT_CPUID | vmcb::INTERCEPT_HLT).to_le_bytes());
    m.put(VMCB + vmcb::INTERCEPT_4, &vmcb::INTERCEPT_VMRUN.to_le_bytes());
    m.put(VMCB + vmcb::ASID, &1u32.to_le_bytes());
    // ES, CS, SS, DS: selector, attributes, limit, base.
    for n in 0..4 {
        let (selector, attributes) = if n == 1 { (8u64, 0xa9bu64) } else { (0x10, 0xc93) };
        m.put64(VMCB + vmcb::SEGMENTS + 16 * n, selector | attributes << 16 | 0xffff_ffff << 32);
    }
    for (at, value) in [
        (vmcb::NESTED_PAGING, 1),
        (vmcb::NESTED_CR3, NESTED.into()),
        (vmcb::EFER, EFER_LONG | SVME),
        (vmcb::CR4, 0xa0),
        (vmcb::CR3, TABLES.into()),
        (vmcb::CR0, 0x8001_0031),
        (vmcb::DR7, 0x400),
        (vmcb::DR6, 0xffff_0ff0),
        (vmcb::RFLAGS, 2),
        (vmcb::RIP, LOOP.into()),
        (vmcb::PAT, PAT),
    ] {
        m.put64(VMCB + at, value);
    }
}

fn svm_hypervisor() -> Result<Vec<u8>, IcedError> {
    const VM_HSAVE_PA: u32 = 0xc001_0117;
    let mut a = CodeAssembler::new(64)?;
    let (mut run, mut hlt) = (a.create_label(), a.create_label());
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, 1 << 12)?;
    a.wrmsr()?;
    a.mov(ecx, VM_HSAVE_PA)?;
    a.mov(eax, HSAVE)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.set_label(&mut run)?;
    a.mov(eax, VMCB)?;
    a.vmrun()?;
    a.cmp(dword_ptr(VMCB + vmcb::EXITCODE), vmcb::EXIT_CPUID as i32)?;
    a.jne(hlt)?;
    a.add(qword_ptr(VMCB + vmcb::RIP), 2)?;
    a.jmp(run)?;
    a.set_label(&mut hlt)?;
    a.mov(eax, dword_ptr(VMCB + vmcb::EXITCODE))?;
    a.sub(eax, vmcb::EXIT_HLT as i32)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()?;
    a.assemble(CODE64.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::KERNELS;

    #[test]
    fn all_places_and_works_assemble() {
        assert_eq!(EFER, msr::EFER);
        for place in [Place::L1, Place::Vmx, Place::Svm] {
            for work in [Work::Kernel(&KERNELS[0]), Work::Pages { pages: DATA_PAGES, frames: FRAMES }, Work::Exit] {
                let image = image(place, work, 1000).expect("it assembles");
                let code = &image[(CODE64 - BASE) as usize..(LOOP - BASE) as usize];
                assert_eq!(code.last(), Some(&0), "{place:?}: L1's code ends before the loop");
            }
        }
    }
}
