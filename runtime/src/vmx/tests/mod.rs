//! Tests of VMX on a bare vCPU: L1 is this test, in 64-bit mode with memory mapped to itself; L2 is real code that the
//! evaluator runs. Names begin with the row of the table in `docs/` that they stand for.

mod apic;
mod events;
mod guests;
mod instructions;
mod mutation;
mod numbers;
mod paging;
mod policies;
mod processors;
mod signals;
mod smm;

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::vmx::control::{entry, exit, pin, proc, proc2};
use twofold_arch::vmx::{ExitReason, Field, InterruptionInfo, Word};
use twofold_arch::{Exception, PhysAddr};
use twofold_frontend::vmx::word;

use super::caps::REVISION;
use crate::cpu::control as cr;
use crate::cpu::tests::{GDT, IDT, KERNEL_CS, KERNEL_DS, PML4, TSS, TSS_SEL, long_mode, peek64, poke, poke64};
use crate::exec::dispatch;
use crate::vcpu::{Trap, Vcpu};

/// Where the regions are.
const VMXON: u64 = 0x10_0000;
const VMCS: u64 = 0x10_1000;
const OTHER: u64 = 0x10_2000;
/// A pointer operand.
const POINTER: u64 = 0x10_3000;
/// The MSR bitmaps, I/O bitmaps and MSR areas.
const BITMAP: u64 = 0x10_4000;
const AREA: u64 = 0x10_8000;
/// EPT: PML4, PDPT, PD.
const EPT: u64 = 0x11_0000;
/// L2's code and stack; L1's handler.
const CODE: u64 = 0x4_0000;
const STACK: u64 = 0x5_0000;
const HANDLER: u64 = 0x6_0000;
/// RIP after a VMX instruction that does not enter.
const NEXT: u64 = 0x7_0000;

/// L1 with CR4.VMXE.
fn l1() -> Box<Vcpu> {
    let mut v = long_mode();
    let value = v.state.cr4 | cr4::VMXE;
    cr::write_cr4(&mut v, value).unwrap();
    for region in [VMXON, VMCS, OTHER] {
        poke(&v, region, &REVISION.to_le_bytes());
    }
    v
}

/// Runs a VMX instruction with a memory operand of these bytes.
fn run(v: &mut Vcpu, which: u64, pointer: u64) -> Result<u64, Trap> {
    poke64(v, POINTER, pointer);
    super::instructions::vmx(v, which | word::MEMORY, POINTER, 0, NEXT)
}

/// What an instruction left in the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Result_ {
    Succeed,
    Invalid,
    Valid(u64),
}

fn outcome(v: &Vcpu) -> Result_ {
    let flags = v.state.rflags() & rflags::ARITH;
    match flags {
        0 => Result_::Succeed,
        rflags::CF => Result_::Invalid,
        rflags::ZF => Result_::Valid(v.vmx.vmcs.get(Field::InstructionError)),
        other => panic!("flags {other:#x}"),
    }
}

fn pointer(v: &mut Vcpu, which: u64, at: u64) -> Result_ {
    run(v, which, at).unwrap();
    outcome(v)
}

fn plain(v: &mut Vcpu, which: u64) -> Result_ {
    super::instructions::vmx(v, which, 0, 0, NEXT).unwrap();
    outcome(v)
}

/// In VMX operation with a current VMCS of zeroes.
fn vmx_operation() -> Box<Vcpu> {
    let mut v = l1();
    assert_eq!(pointer(&mut v, word::VMXON, VMXON), Result_::Succeed);
    assert_eq!(pointer(&mut v, word::VMCLEAR, VMCS), Result_::Succeed);
    assert_eq!(pointer(&mut v, word::VMPTRLD, VMCS), Result_::Succeed);
    v
}

fn set(v: &mut Vcpu, field: Field, value: u64) {
    v.vmx.vmcs.set(field, value);
}
fn get(v: &Vcpu, field: Field) -> u64 {
    v.vmx.vmcs.get(field)
}
fn set_bits(v: &mut Vcpu, field: Field, bits: u32) {
    let value = get(v, field) | u64::from(bits);
    set(v, field, value);
}

/// VMX operation with a VMCS whose guest is 64-bit code at `CODE` in L1's own address space, and whose host is L1.
fn with_guest() -> Box<Vcpu> {
    let mut v = vmx_operation();
    let must = |word: Word| v.model.vmx.allowed(word).must;
    let words = [
        (Field::PinControls, must(Word::Pin)),
        (Field::ProcControls, must(Word::Proc) | u64::from(proc::HLT_EXITING | proc::SECONDARY)),
        (
            Field::ExitControls,
            must(Word::Exit) | u64::from(exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_EFER | exit::LOAD_EFER),
        ),
        (Field::EntryControls, must(Word::Entry) | u64::from(entry::IA32E_MODE_GUEST | entry::LOAD_EFER)),
    ];
    for (field, value) in words {
        set(&mut v, field, value);
    }
    let (cr0, cr3, cr4, efer_) = (v.state.cr0, v.state.cr3, v.state.cr4, v.state.efer);
    for (field, value) in [
        (Field::VmcsLinkPointer, u64::MAX),
        (Field::HostCr0, cr0),
        (Field::HostCr3, cr3),
        (Field::HostCr4, cr4),
        (Field::HostEfer, efer_),
        (Field::HostCsSelector, u64::from(KERNEL_CS)),
        (Field::HostSsSelector, u64::from(KERNEL_DS)),
        (Field::HostTrSelector, u64::from(TSS_SEL)),
        (Field::HostTrBase, TSS),
        (Field::HostGdtrBase, GDT),
        (Field::HostIdtrBase, IDT),
        (Field::HostRip, HANDLER),
        (Field::HostRsp, 0x1_f000),
        (Field::GuestCr0, cr0),
        (Field::GuestCr3, cr3),
        (Field::GuestCr4, cr4),
        (Field::GuestEfer, efer_),
        (Field::GuestDr7, 0x400),
        (Field::GuestRflags, 2),
        (Field::GuestRip, CODE),
        (Field::GuestRsp, STACK),
        (Field::GuestGdtrBase, GDT),
        (Field::GuestGdtrLimit, 0x4f),
        (Field::GuestIdtrBase, IDT),
        (Field::GuestIdtrLimit, 0xfff),
    ] {
        set(&mut v, field, value);
    }
    let flat = attr::P | attr::S | attr::G | attr::ACCESSED | attr::RW;
    for n in 0..6 {
        let code = n == 1;
        set(&mut v, Field::guest_selector(n), u64::from(if code { KERNEL_CS } else { KERNEL_DS }));
        set(&mut v, Field::guest_limit(n), 0xffff_ffff);
        set(
            &mut v,
            Field::guest_access_rights(n),
            u64::from(flat | if code { attr::CODE | attr::L } else { attr::DB }),
        );
    }
    set(&mut v, Field::guest_access_rights(6), u64::from(attr::UNUSABLE));
    set(&mut v, Field::guest_selector(7), u64::from(TSS_SEL));
    set(&mut v, Field::guest_base(7), TSS);
    set(&mut v, Field::guest_limit(7), 0x67);
    set(&mut v, Field::guest_access_rights(7), u64::from(attr::P | 11));
    v
}

/// The guest of [`with_guest`] in real mode under EPT, at `CODE` with CS base 0.
fn with_real_guest() -> Box<Vcpu> {
    let mut v = with_guest();
    // Memory is itself: 1 GiB in one page, write-back.
    poke64(&v, EPT, (EPT + 0x1000) | 7);
    poke64(&v, EPT + 0x1000, 7 | 6 << 3 | 1 << 7);
    set_bits(&mut v, Field::Proc2Controls, proc2::EPT | proc2::UNRESTRICTED_GUEST);
    set(&mut v, Field::Eptp, EPT | 6 | 3 << 3);
    let controls = get(&v, Field::EntryControls) & !u64::from(entry::IA32E_MODE_GUEST);
    set(&mut v, Field::EntryControls, controls);
    set(&mut v, Field::GuestCr0, cr0::NE | cr0::ET);
    set(&mut v, Field::GuestCr4, cr4::VMXE);
    set(&mut v, Field::GuestEfer, efer::SCE);
    for n in 0..6 {
        let code = n == 1;
        let rights = attr::P | attr::S | attr::ACCESSED | attr::RW | if code { attr::CODE } else { 0 };
        set(&mut v, Field::guest_selector(n), if code { CODE >> 4 } else { 0 });
        set(&mut v, Field::guest_base(n), if code { CODE } else { 0 });
        set(&mut v, Field::guest_limit(n), 0xffff);
        set(&mut v, Field::guest_access_rights(n), u64::from(rights));
    }
    set(&mut v, Field::GuestRip, 0);
    set(&mut v, Field::GuestRsp, 0x8000);
    set(&mut v, Field::GuestIdtrBase, 0);
    set(&mut v, Field::GuestIdtrLimit, 0x3ff);
    v
}

/// Puts code where L2 begins.
fn code(v: &Vcpu, bytes: &[u8]) {
    poke(v, CODE, bytes);
}

/// Enters the guest.
fn enter(v: &mut Vcpu) {
    let which = if v.vmx.vmcs.launched { word::VMRESUME } else { word::VMLAUNCH };
    super::instructions::vmx(v, which, 0, 0, NEXT).unwrap();
    assert!(v.vmx.non_root, "entry failed: {:?}, reason {:#x}", outcome(v), get(v, Field::ExitReason));
}

/// Runs the guest to its next exit; the reason.
fn run_to_exit(v: &mut Vcpu) -> ExitReason {
    for _ in 0..10_000 {
        if !v.vmx.non_root {
            return ExitReason::from_number(get(v, Field::ExitReason) as u16).unwrap();
        }
        dispatch::step(v).unwrap();
    }
    panic!("no exit; rip {:#x}", v.state.rip);
}

/// Enters and runs to the next exit.
fn go(v: &mut Vcpu) -> ExitReason {
    enter(v);
    run_to_exit(v)
}

/// Moves the saved RIP past the instruction that exited.
fn skip(v: &mut Vcpu) {
    let rip = get(v, Field::GuestRip) + get(v, Field::ExitInstructionLength);
    set(v, Field::GuestRip, rip);
}
