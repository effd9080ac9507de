//! C3, C4: PDPTE registers across exits; F9: EPTP switching; F10: sub-page write permissions.

use twofold_arch::LinearAddr;
use twofold_arch::vmx::control::vmfunc;
use twofold_arch::vmx::ept::SUB_PAGE_WRITE;
use twofold_arch::vmx::qualification::spp;
use twofold_mmu::PagingMode;

use super::*;
use crate::vcpu::MemAs;

/// L1's PDPT when it uses PAE paging, below 4 GiB; another one; L2's.
pub(super) const HOST_PDPT: u64 = 0x12_0000;
const OTHER_PDPT: u64 = 0x12_0100;
const GUEST_PDPT: u64 = 0x12_0200;
/// The page directory that maps memory to itself in 2 MiB pages: that of 64-bit mode.
const DIRECTORY: u64 = 0x3000;

fn pdpt(v: &Vcpu, at: u64, entries: [u64; 4]) {
    for (i, e) in (0..).zip(entries) {
        poke64(v, at + 8 * i, e);
    }
}

/// VMX operation in PAE paging, with a guest in real mode under EPT.
pub(super) fn pae_host() -> Box<Vcpu> {
    let mut v = with_real_guest();
    pdpt(&v, HOST_PDPT, [DIRECTORY | 1, 0, 0, DIRECTORY | 1]);
    pdpt(&v, OTHER_PDPT, [DIRECTORY | 1, DIRECTORY | 9, 0, 0]);
    // As after leaving IA-32e mode: this test has no code of its own that would.
    v.state.efer &= !(efer::LMA | efer::LME);
    v.state.seg[1].attr = v.state.seg[1].attr & !attr::L | attr::DB;
    v.state.cr3 = HOST_PDPT;
    v.state.pdpte = [DIRECTORY | 1, 0, 0, DIRECTORY | 1];
    crate::cpu::refresh_space(&mut v);
    let space = v.space;
    v.mmu.reset(&space).store(&mut v.state);
    assert_eq!(v.space.mode, PagingMode::Pae);
    let efer = v.state.efer;
    for (field, value) in [(Field::HostCr3, HOST_PDPT), (Field::HostEfer, efer)] {
        set(&mut v, field, value);
    }
    let controls = get(&v, Field::ExitControls) & !u64::from(exit::HOST_ADDRESS_SPACE_SIZE);
    set(&mut v, Field::ExitControls, controls);
    set(&mut v, Field::GuestEfer, efer & efer::SCE);
    v
}

#[test]
fn c3_exit_into_a_pae_host_loads_its_pdptes() {
    let mut v = pae_host();
    code(&v, &[0xf4]);
    // HOST_CR3 names another table than the one in the registers: that one is loaded, from memory as it is at the exit.
    set(&mut v, Field::HostCr3, OTHER_PDPT);
    enter(&mut v);
    assert_eq!(v.space.mode, PagingMode::None);
    poke64(&v, OTHER_PDPT + 16, DIRECTORY | 1);
    assert_eq!(run_to_exit(&mut v), ExitReason::Hlt);
    assert_eq!((v.space.mode, v.state.cr3), (PagingMode::Pae, OTHER_PDPT));
    assert_eq!(v.state.pdpte, [DIRECTORY | 1, DIRECTORY | 9, DIRECTORY | 1, 0]);
    assert_eq!((v.state.rip, v.state.seg[1].attr & (attr::L | attr::DB)), (HANDLER, attr::DB));
    // The registers are what translates.
    poke64(&v, OTHER_PDPT + 8, 0);
    assert!(v.read(LinearAddr(0x4000_0000 + CODE), 4, MemAs::System).is_ok());
    assert!(v.read(LinearAddr(0xc000_0000), 4, MemAs::System).is_err());
}

/// A guest in PAE paging under EPT, in 32-bit code.
fn pae_guest() -> Box<Vcpu> {
    let mut v = with_real_guest();
    set(&mut v, Field::GuestCr0, cr0::NE | cr0::ET | cr0::PE | cr0::PG);
    set(&mut v, Field::GuestCr4, cr4::VMXE | cr4::PAE);
    set(&mut v, Field::GuestCr3, GUEST_PDPT);
    for n in 0..4 {
        set(&mut v, Field::guest_pdpte(n), if n == 0 { DIRECTORY | 1 } else { 0 });
    }
    for n in 0..6 {
        let rights = get(&v, Field::guest_access_rights(n)) | u64::from(attr::DB);
        set(&mut v, Field::guest_access_rights(n), rights);
    }
    set(&mut v, Field::guest_access_rights(7), u64::from(attr::P | 11));
    v
}

#[test]
fn c2_c4_exit_saves_the_pdptes() {
    let mut v = pae_guest();
    // Memory at CR3 has nothing present: entry under EPT takes the fields.
    pdpt(&v, GUEST_PDPT, [0; 4]);
    pdpt(&v, OTHER_PDPT, [DIRECTORY | 1, 0x1000 | 1 | 1 << 9, 0, DIRECTORY | 1 | 1 << 3]);
    // cpuid; mov cr3, esi; hlt
    code(&v, &[0x0f, 0xa2, 0x0f, 0x22, 0xde, 0xf4]);
    v.state.gpr[6] = OTHER_PDPT;
    assert_eq!(go(&mut v), ExitReason::Cpuid);
    assert_eq!([0, 1, 2, 3].map(|n| get(&v, Field::guest_pdpte(n))), [DIRECTORY | 1, 0, 0, 0]);
    skip(&mut v);
    enter(&mut v);
    assert_eq!(v.space.mode, PagingMode::Pae);
    assert_eq!(run_to_exit(&mut v), ExitReason::Hlt);
    // What MOV to CR3 loaded is what the exit saves; memory may have changed since.
    let loaded = [DIRECTORY | 1, 0x1000 | 1 | 1 << 9, 0, DIRECTORY | 1 | 1 << 3];
    assert_eq!([0, 1, 2, 3].map(|n| get(&v, Field::guest_pdpte(n))), loaded);
    assert_eq!(get(&v, Field::GuestCr3), OTHER_PDPT);
}

#[test]
fn c4_without_ept_the_pdpte_fields_stay() {
    let mut v = pae_guest();
    let proc2 = get(&v, Field::Proc2Controls) & !u64::from(proc2::EPT | proc2::UNRESTRICTED_GUEST);
    set(&mut v, Field::Proc2Controls, proc2);
    pdpt(&v, GUEST_PDPT, [DIRECTORY | 1, 0, 0, 0]);
    for n in 0..4 {
        set(&mut v, Field::guest_pdpte(n), 0xdead_0000 + n as u64);
    }
    code(&v, &[0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!([0, 1, 2, 3].map(|n| get(&v, Field::guest_pdpte(n))), [0, 1, 2, 3].map(|n| 0xdead_0000 + n));
}

/// Two EPTs: guest-physical 2 MiB is at 2 MiB in the one and at 0 in the other.
const LIST: u64 = 0x12_3000;
const SECOND: u64 = 0x12_4000;
const AT: u64 = 0x27_8000;

/// An unpaged protected-mode guest with both in its list, that switches to entry ECX and reads.
fn switching_guest() -> Box<Vcpu> {
    let mut v = with_real_guest();
    let page = 7 | 6 << 3 | 1 << 7;
    for (top, second) in [(EPT, 0x20_0000), (SECOND, 0)] {
        poke64(&v, top, (top + 0x1000) | 7);
        poke64(&v, top + 0x1000, (top + 0x2000) | 7);
        poke64(&v, top + 0x2000, page);
        poke64(&v, top + 0x2008, second | page);
    }
    poke64(&v, AT, 0x1111);
    poke64(&v, AT - 0x20_0000, 0x2222);
    set(&mut v, Field::GuestCr0, cr0::NE | cr0::ET | cr0::PE);
    set(&mut v, Field::guest_access_rights(7), u64::from(attr::P | 11));
    set(&mut v, Field::guest_base(3), AT - 0x10);
    set_bits(&mut v, Field::Proc2Controls, proc2::VM_FUNCTIONS | proc2::VPID);
    set(&mut v, Field::Vpid, 1);
    set(&mut v, Field::VmFunctionControls, vmfunc::EPTP_SWITCHING);
    set(&mut v, Field::EptpListAddress, LIST);
    poke64(&v, LIST, EPT | 6 | 3 << 3);
    poke64(&v, LIST + 8, SECOND | 6 | 3 << 3);
    // Not a valid EPTP: memory type 1.
    poke64(&v, LIST + 511 * 8, SECOND | 1 | 3 << 3);
    // mov bx, [0x10]; vmfunc; mov dx, [0x10]; hlt
    code(&v, &[0x8b, 0x1e, 0x10, 0, 0x0f, 0x01, 0xd4, 0x8b, 0x16, 0x10, 0, 0xf4]);
    (v.state.gpr[0], v.state.gpr[1]) = (0, 1);
    v
}

#[test]
fn f9_eptp_switching() {
    let mut v = switching_guest();
    let flags = v.state.rflags();
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!((v.state.gpr[3] & 0xffff, v.state.gpr[2] & 0xffff), (0x1111, 0x2222));
    assert_eq!(get(&v, Field::Eptp), SECOND | 6 | 3 << 3);
    assert_eq!(get(&v, Field::GuestRflags) & rflags::ARITH, flags & rflags::ARITH);
    // Back, and again: both stay cached under their EP4TA, and nothing is walked.
    let mut before = 0;
    for round in 0..4 {
        v.state.gpr[1] = round & 1;
        set(&mut v, Field::GuestRip, 4);
        assert_eq!(go(&mut v), ExitReason::Hlt);
        assert_eq!(v.state.gpr[2] & 0xffff, if round & 1 == 0 { 0x1111 } else { 0x2222 });
        if round < 2 {
            before = v.mmu.stats().misses;
        }
    }
    assert_eq!(v.mmu.stats().misses, before);
}

#[test]
fn f9_what_vmfunc_refuses_exits() {
    // Index beyond the list, an EPTP that VM entry would refuse.
    for index in [512, u64::from(u32::MAX), 511] {
        let mut v = switching_guest();
        v.state.gpr[1] = index;
        assert_eq!(go(&mut v), ExitReason::Vmfunc, "{index}");
        assert_eq!((get(&v, Field::GuestRip), get(&v, Field::ExitInstructionLength)), (4, 3));
        assert_eq!(get(&v, Field::Eptp), EPT | 6 | 3 << 3);
    }
    // Functions that are not enabled exit, those that cannot be are #UD.
    for (function, reason) in [(1, ExitReason::Vmfunc), (63, ExitReason::Vmfunc), (64, ExitReason::ExceptionOrNmi)] {
        let mut v = switching_guest();
        set(&mut v, Field::ExceptionBitmap, 1 << 6);
        v.state.gpr[0] = function;
        assert_eq!(go(&mut v), reason, "{function}");
    }
    let mut v = switching_guest();
    set(&mut v, Field::ExceptionBitmap, 1 << 6);
    set(&mut v, Field::VmFunctionControls, 0);
    assert_eq!(go(&mut v), ExitReason::Vmfunc);
    let proc2 = get(&v, Field::Proc2Controls) & !u64::from(proc2::VM_FUNCTIONS);
    set(&mut v, Field::Proc2Controls, proc2);
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
}

#[test]
fn f9_the_eptp_index_goes_to_the_virtualization_exception() {
    let mut v = switching_guest();
    set_bits(&mut v, Field::Proc2Controls, proc2::EPT_VIOLATION_VE);
    set(&mut v, Field::VeInformationAddress, AREA);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::EptpIndex), 1);
}

/// The sub-page-permission table.
const SPPT: u64 = EPT + 0x4000;
const VECTOR: u64 = SPPT + 0x3000 + 0x48 * 8;
/// The page with sub-page write permissions.
const PAGE: u64 = 0x4_8000;

/// A real-mode guest with `bytes` as its code, DS and ES at `CODE`, that may write to the first two sub-pages of the page at
/// offset 0x8000 there.
fn sub_page_guest(bytes: &[u8]) -> Box<Vcpu> {
    let mut v = with_real_guest();
    poke64(&v, EPT + 0x1000, (EPT + 0x2000) | 7);
    poke64(&v, EPT + 0x2000, (EPT + 0x3000) | 7);
    for i in 0..512 {
        let rights = if i << 12 == PAGE { 5 | SUB_PAGE_WRITE } else { 7 };
        poke64(&v, EPT + 0x3000 + 8 * i, i << 12 | 6 << 3 | rights);
    }
    for at in [SPPT, SPPT + 0x1000, SPPT + 0x2000] {
        poke64(&v, at, (at + 0x1000) | 1);
    }
    poke64(&v, VECTOR, 1 | 1 << 2);
    set_bits(&mut v, Field::Proc2Controls, proc2::SUB_PAGE_WRITE);
    set(&mut v, Field::SubPagePermissionTable, SPPT);
    for n in [0, 3] {
        set(&mut v, Field::guest_base(n), CODE);
        set(&mut v, Field::guest_selector(n), CODE >> 4);
    }
    code(&v, bytes);
    v.state.gpr[0] = 0x5a5a;
    v
}

/// The guest's addresses of the last exit, which restarts the instruction at `rip`.
fn exit_addresses(v: &Vcpu, rip: u64) -> (u64, u64) {
    assert_eq!(get(v, Field::GuestRip), rip);
    (get(v, Field::GuestPhysicalAddress), get(v, Field::GuestLinearAddress))
}

/// F10: writes that the sub-pages allow and refuse, plain, read-modify-write and across.
#[test]
fn f10_sub_page_writes() {
    // mov [at], ax; add [at], ax; xchg [at], ax; cmpxchg [at], cx; each with hlt.
    let instructions: [&[u8]; 4] = [&[0xa3], &[0x01, 0x06], &[0x87, 0x06], &[0x0f, 0xb1, 0x0e]];
    for op in instructions {
        for (at, refused) in [(0, None), (0x7f, None), (0xfe, None), (0xff, Some(0x100)), (0x100, Some(0x100))] {
            let mut v = sub_page_guest(&[op, &(0x8000u16 + at).to_le_bytes(), &[0xf4]].concat());
            let data = PAGE + u64::from(at);
            poke64(&v, data, 0x5a5a);
            v.state.gpr[1] = 0x1234;
            v.state.gpr[0] = 0x5a5a;
            let reason = go(&mut v);
            if let Some(first) = refused {
                assert_eq!((reason, peek64(&v, data)), (ExitReason::EptViolation, 0x5a5a), "{op:x?} {at:#x}");
                assert_eq!(exit_addresses(&v, 0), (PAGE + first, PAGE + first));
                assert_eq!(get(&v, Field::ExitQualification) & 0x1bb, 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8);
            } else {
                let stored = match op[0] {
                    0x01 => 0xb4b4,
                    0x0f => 0x1234,
                    _ => 0x5a5a,
                };
                assert_eq!((reason, peek64(&v, data)), (ExitReason::Hlt, stored), "{op:x?} {at:#x}");
            }
        }
    }
    // Without the control the bit in the entry means nothing.
    let mut v = sub_page_guest(&[0xa2, 0x00, 0x80, 0xf4]);
    let proc2 = get(&v, Field::Proc2Controls) & !u64::from(proc2::SUB_PAGE_WRITE);
    set(&mut v, Field::Proc2Controls, proc2);
    assert_eq!(go(&mut v), ExitReason::EptViolation);
}

/// F10: a repeated string instruction goes as far as the sub-pages allow, in either direction.
#[test]
fn f10_sub_page_string_writes() {
    // rep stosw; hlt, and rep movsb; hlt
    let mut v = sub_page_guest(&[0xf3, 0xab, 0xf4]);
    (v.state.gpr[1], v.state.gpr[7]) = (0x40, 0x80e0);
    assert_eq!(go(&mut v), ExitReason::EptViolation);
    assert_eq!(exit_addresses(&v, 0), (PAGE + 0x100, PAGE + 0x100));
    assert_eq!((v.state.gpr[1], v.state.gpr[7]), (0x30, 0x8100));
    assert_eq!((peek64(&v, PAGE + 0xd8), peek64(&v, PAGE + 0xf8)), (0, 0x5a5a_5a5a_5a5a_5a5a));
    assert_eq!(peek64(&v, PAGE + 0x100), 0);
    // L1 lets the next one be written; the instruction goes on from where it was, to the end of it.
    poke64(&v, VECTOR, 1 | 1 << 2 | 1 << 4);
    v.state.gpr[1] = 0x40;
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(peek64(&v, PAGE + 0x178), 0x5a5a_5a5a_5a5a_5a5a);
    let mut v = sub_page_guest(&[0xfd, 0xf3, 0xa4, 0xf4]);
    poke64(&v, VECTOR, 1 << 2);
    (v.state.gpr[1], v.state.gpr[6], v.state.gpr[7]) = (0x100, 0x50ff, 0x80ff);
    poke64(&v, CODE + 0x5080, 0x1122_3344_5566_7788);
    assert_eq!(go(&mut v), ExitReason::EptViolation);
    assert_eq!(exit_addresses(&v, 1), (PAGE + 0x7f, PAGE + 0x7f));
    assert_eq!((v.state.gpr[1], v.state.gpr[6], v.state.gpr[7]), (0x80, 0x507f, 0x807f));
    assert_eq!(peek64(&v, PAGE + 0x80), 0x1122_3344_5566_7788);
}

/// F10: the exits of SPP misses and misconfigurations, and that the write is made once L1 has mended the table.
#[test]
fn f10_sub_page_exits() {
    let mut v = sub_page_guest(&[0xa2, 0x00, 0x80, 0xf4]);
    for at in [SPPT, SPPT + 0x1000, SPPT + 0x2000] {
        for (entry, qualification) in [(0, spp::MISS), ((at + 0x1000) | 3, 0)] {
            poke64(&v, at, entry);
            assert_eq!(go(&mut v), ExitReason::SubPagePermission);
            assert_eq!(
                (ExitReason::SubPagePermission.number(), get(&v, Field::ExitQualification)),
                (66, qualification)
            );
            assert_eq!(exit_addresses(&v, 0), (PAGE, PAGE));
        }
        poke64(&v, at, (at + 0x1000) | 1);
    }
    poke64(&v, VECTOR, 1 | 2);
    assert_eq!((go(&mut v), get(&v, Field::ExitQualification)), (ExitReason::SubPagePermission, 0));
    poke64(&v, VECTOR, 1);
    assert_eq!((go(&mut v), peek64(&v, PAGE)), (ExitReason::Hlt, 0x5a));
}
