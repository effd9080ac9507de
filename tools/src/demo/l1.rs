//! The demo's hypervisor L1: enters guests in every paging mode, with EPT, VPID, both or neither, and prints what was kept.
//!
//! What a transition or an invalidation drops shows in the accessed flags: L1 clears them in all tables, its own, L2's and
//! EPT's, with nothing invalidated; a translation that is still cached sets none, one that is walked again sets one in each
//! entry that the walk reads. The first round of a row fills the caches, the second is looked at. Where the SDM says that a
//! translation is dropped, the row is wrong when it was kept; the reverse is the processor's choice.

use super::PowerOff;
use super::asm::{Piece, Text};
use super::guests::{Guest, Guests, Mode, SEEN, SEEN_NEXT, VPID, With, program};
use super::layout::{self, l1, var};
use super::rows::{ModeRows, SWITCHES};
use super::tables::Paging;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use twofold_arch::control::{cr0, cr4};
use twofold_arch::msr;
use twofold_arch::paging::A;
use twofold_arch::vmx::msr as vmx_msr;
use twofold_arch::vmx::{ExitReason, Field, ept, invept, invvpid};

type Emit = Result<(), IcedError>;

/// What happens between the two rounds of a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    /// Nothing but the VM entry and the VM exit.
    None,
    /// L2 begins its second round with a program of its own.
    Program(u32),
    /// L1 does INVVPID of this type.
    Invvpid(u64),
    /// L1 does INVEPT of this type.
    Invept(u64),
    /// L2 reads another page, that EPT does not map; L1 maps it and resumes.
    Violation,
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Event::None => "entry, exit",
            Event::Program(program::MOV_CR3) => "L2: MOV CR3",
            Event::Program(_) => "L2: INVLPG",
            Event::Invvpid(invvpid::ADDRESS) => "INVVPID 0",
            Event::Invvpid(invvpid::SINGLE_CONTEXT) => "INVVPID 1",
            Event::Invvpid(invvpid::ALL_CONTEXTS) => "INVVPID 2",
            Event::Invvpid(_) => "INVVPID 3",
            Event::Invept(invept::SINGLE_CONTEXT) => "INVEPT 1",
            Event::Invept(_) => "INVEPT 2",
            Event::Violation => "EPT violation",
        }
    }
    /// Whether L1's linear, L2's and the guest-physical translations must be dropped by the event and a transition.
    fn must_drop(self, with: With) -> [bool; 3] {
        let invept = matches!(self, Event::Invept(_));
        let linear = !matches!(self, Event::None | Event::Violation);
        [!with.vpid, !with.vpid || (linear && (with.ept || !invept)), invept]
    }
}

/// The routines that rows call.
struct Routines {
    begin: CodeLabel,
    fields: CodeLabel,
    round: CodeLabel,
    count: CodeLabel,
    enter: CodeLabel,
    exited: CodeLabel,
}

/// The whole piece: VMXON, the rows, VMXOFF, and the demo's end. L1 runs in the address space of `home`.
pub fn emit<'t>(text: &'t mut Text, home: &ModeRows, guests: &Guests, off: PowerOff) -> Result<Piece<'t>, IcedError> {
    let mut p = Piece::new(layout::L1, true, text)?;
    p.load_idt(4)?;
    let (mut end, mut start) = (p.a.create_label(), p.a.create_label());
    let mut label = || p.a.create_label();
    let mut r =
        Routines { begin: label(), fields: label(), round: label(), count: label(), enter: label(), exited: label() };
    p.a.jmp(start)?;
    emit_routines(&mut p, &mut r, home, guests)?;
    p.a.set_label(&mut start)?;
    emit_vmxon(&mut p, end)?;
    emit_heading(&mut p)?;
    for guest in &guests.guests {
        for &(with, _) in &guests.with {
            if matches!(guest.mode, Mode::Paged(_)) || with.ept {
                emit_row(&mut p, &r, guests, guest, with, Event::None)?;
            }
        }
    }
    p.say("\r\n")?;
    let both = With { ept: true, vpid: true };
    let events = [
        Event::Program(program::MOV_CR3),
        Event::Program(program::INVLPG),
        Event::Invvpid(invvpid::ADDRESS),
        Event::Invvpid(invvpid::SINGLE_RETAINING_GLOBALS),
        Event::Invvpid(invvpid::SINGLE_CONTEXT),
        Event::Invvpid(invvpid::ALL_CONTEXTS),
        Event::Invept(invept::SINGLE_CONTEXT),
        Event::Invept(invept::ALL_CONTEXTS),
        Event::Violation,
    ];
    for (paging, with) in [(Paging::Four, both), (Paging::Pae, With { ept: false, ..both })] {
        for event in events {
            if let Some(guest) = guests.guest(Mode::Paged(paging))
                && (with.ept || !matches!(event, Event::Invept(_) | Event::Violation))
            {
                emit_row(&mut p, &r, guests, guest, with, event)?;
            }
        }
    }
    p.a.vmxoff()?;
    p.a.set_label(&mut end)?;
    emit_end(&mut p, off)?;
    Ok(p)
}

/// The demo's last words.
fn emit_end(p: &mut Piece, off: PowerOff) -> Emit {
    p.say("\r\n")?;
    p.when(var::WRONG, 0, |p| {
        let switches = 2 * SWITCHES * 4;
        p.say(&format!("All as expected: every fault handled once, {switches} CR3 switches without a shootdown.\r\n"))
    })?;
    p.unless(var::WRONG, 0, |p| {
        p.say("Rows that were wrong: ")?;
        p.say_hex(var::WRONG, 2)?;
        p.say("\r\n")
    })?;
    p.end_machine(off)
}

fn emit_heading(p: &mut Piece) -> Emit {
    p.say("\r\nA hypervisor under 5-level paging and its guests: which translations each event kept or dropped, and how\r\n")?;
    p.say("many paging-structure entries the next access read again.\r\n\r\n")?;
    p.say("                                                 translations           entries read again\r\n")?;
    p.say("event         paging                L2 has       L1's    L2's    EPT's  L1's L2's EPT's\r\n")?;
    p.say("------------- --------------------- ------------ ------- ------- ------- ---- ---- -----\r\n")
}

// ---- into VMX operation -----------------------------------------------------------------------------------------------

fn emit_rdmsr(p: &mut Piece, number: u32) -> Emit {
    p.a.mov(ecx, number)?;
    p.a.rdmsr()
}

/// Notes an MSR's halves.
fn emit_note(p: &mut Piece, to: u32) -> Emit {
    p.a.mov(dword_ptr(to), eax)?;
    p.a.mov(dword_ptr(to + 4), edx)
}

/// Leaves for `end` where there is no VMX; else reads its capabilities and executes VMXON.
fn emit_vmxon(p: &mut Piece, end: CodeLabel) -> Emit {
    let (mut there, mut on, mut plain, mut known, mut no_second) = {
        let mut label = || p.a.create_label();
        (label(), label(), label(), label(), label())
    };
    p.a.mov(eax, 1)?;
    p.a.cpuid()?;
    p.a.bt(ecx, 5)?;
    p.a.jb(there)?;
    p.say("\r\nThis processor has no VMX.\r\n")?;
    p.a.jmp(end)?;
    p.a.set_label(&mut there)?;
    emit_rdmsr(p, msr::FEATURE_CONTROL)?;
    p.a.and(eax, 5)?;
    p.a.cmp(eax, 5)?;
    p.a.je(on)?;
    p.say("\r\nIA32_FEATURE_CONTROL does not allow VMXON.\r\n")?;
    p.a.jmp(end)?;
    p.a.set_label(&mut on)?;
    emit_rdmsr(p, vmx_msr::BASIC)?;
    p.a.and(eax, 0x7fff_ffff)?;
    p.a.mov(dword_ptr(layout::VMXON), eax)?;
    p.a.mov(dword_ptr(layout::VMCS), eax)?;
    // The TRUE capabilities where there are such.
    p.a.bt(edx, vmx_msr::basic::TRUE_CONTROLS.trailing_zeros() as i32 - 32)?;
    p.a.jae(plain)?;
    for (i, number) in (vmx_msr::TRUE_PINBASED_CTLS..=vmx_msr::TRUE_ENTRY_CTLS).enumerate() {
        emit_rdmsr(p, number)?;
        emit_note(p, l1::CAPABILITIES + 8 * i as u32)?;
    }
    p.a.jmp(known)?;
    p.a.set_label(&mut plain)?;
    for (i, number) in (vmx_msr::PINBASED_CTLS..=vmx_msr::ENTRY_CTLS).enumerate() {
        emit_rdmsr(p, number)?;
        emit_note(p, l1::CAPABILITIES + 8 * i as u32)?;
    }
    p.a.set_label(&mut known)?;
    p.a.cmp(dword_ptr(l1::CAPABILITIES + 12), 0)?;
    p.a.jns(no_second)?;
    emit_rdmsr(p, vmx_msr::PROCBASED_CTLS2)?;
    emit_note(p, l1::CAPABILITIES + 32)?;
    p.a.set_label(&mut no_second)?;
    p.a.mov(rax, cr0)?;
    p.a.or(eax, cr0::NE as i32)?;
    p.a.mov(cr0, rax)?;
    p.a.mov(rax, cr4)?;
    p.a.or(eax, cr4::VMXE as i32)?;
    p.a.mov(cr4, rax)?;
    p.a.vmxon(qword_ptr(l1::VMXON_POINTER))
}

// ---- routines ---------------------------------------------------------------------------------------------------------

/// VMWRITE of RAX.
fn emit_vmwrite(p: &mut Piece, field: Field) -> Emit {
    p.a.mov(ecx, field.encoding())?;
    p.a.vmwrite(rcx, rax)
}

/// VMREAD to RAX.
fn emit_vmread(p: &mut Piece, field: Field) -> Emit {
    p.a.mov(ecx, field.encoding())?;
    p.a.vmread(rax, rcx)
}

fn emit_routines(p: &mut Piece, r: &mut Routines, home: &ModeRows, guests: &Guests) -> Emit {
    emit_begin(p, r)?;
    emit_fields(p, r)?;
    emit_enter(p, r)?;
    emit_count(p, r)?;
    p.a.set_label(&mut r.round)?;
    p.a.call(r.enter)?;
    // L1's own translation, of a page that is neither global nor large.
    p.a.mov(rbx, home.switch_at())?;
    p.a.mov(eax, dword_ptr(rbx))?;
    let ranges = [(home.tables, A), ([0, 0], A), (guests.ept_tables, ept::A)];
    for (([start, end], flag), to) in ranges.into_iter().zip(l1::WALKED) {
        if start == 0 {
            p.a.mov(esi, dword_ptr(l1::L2_TABLES))?;
            p.a.mov(edi, dword_ptr(l1::L2_TABLES_END))?;
        } else {
            p.a.mov(esi, start)?;
            p.a.mov(edi, end)?;
        }
        p.a.mov(edx, flag as u32)?;
        p.a.call(r.count)?;
        p.a.mov(dword_ptr(to), eax)?;
    }
    p.a.ret()
}

/// `begin`: a clear VMCS is current, with what of the host state comes from registers.
fn emit_begin(p: &mut Piece, r: &mut Routines) -> Emit {
    p.a.set_label(&mut r.begin)?;
    p.a.vmclear(qword_ptr(l1::VMCS_POINTER))?;
    p.a.vmptrld(qword_ptr(l1::VMCS_POINTER))?;
    p.a.mov(dword_ptr(l1::LAUNCHED), 0)?;
    p.a.mov(dword_ptr(l1::LACKING), 0)?;
    p.a.mov(rax, cr0)?;
    emit_vmwrite(p, Field::HostCr0)?;
    p.a.mov(rax, cr3)?;
    emit_vmwrite(p, Field::HostCr3)?;
    p.a.mov(rax, cr4)?;
    emit_vmwrite(p, Field::HostCr4)?;
    p.a.lea(rax, ptr(r.exited))?;
    emit_vmwrite(p, Field::HostRip)?;
    p.a.ret()
}

/// `fields`: writes the table at ESI. A control that must be 1 is; one that may not be is noted.
fn emit_fields(p: &mut Piece, r: &mut Routines) -> Emit {
    let (mut again, mut write, mut allowed, mut written, mut done) = {
        let mut label = || p.a.create_label();
        (label(), label(), label(), label(), label())
    };
    let a = &mut p.a;
    a.set_label(&mut r.fields)?;
    // A label needs an instruction of its own.
    a.nop()?;
    a.set_label(&mut again)?;
    a.mov(ecx, dword_ptr(esi))?;
    a.cmp(ecx, -1)?;
    a.je(done)?;
    a.mov(rax, qword_ptr(esi + 8))?;
    a.mov(edx, dword_ptr(esi + 4))?;
    a.test(edx, edx)?;
    a.je(write)?;
    a.mov(edi, eax)?;
    a.or(eax, dword_ptr(edx))?;
    a.and(eax, dword_ptr(edx + 4))?;
    // What was asked for and is not there.
    a.not(eax)?;
    a.test(edi, eax)?;
    a.je(allowed)?;
    a.mov(dword_ptr(l1::LACKING), 1)?;
    a.set_label(&mut allowed)?;
    a.not(eax)?;
    a.set_label(&mut write)?;
    a.vmwrite(rcx, rax)?;
    a.ja(written)?;
    a.mov(dword_ptr(l1::LACKING), 1)?;
    a.set_label(&mut written)?;
    a.add(esi, 16)?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.ret()
}

/// `enter`: VM entry; returns after the VM exit, or at once when the entry failed. Keeps no register but RSP.
fn emit_enter(p: &mut Piece, r: &mut Routines) -> Emit {
    let mut resume = p.a.create_label();
    p.a.set_label(&mut r.enter)?;
    p.a.mov(rax, rsp)?;
    emit_vmwrite(p, Field::HostRsp)?;
    p.a.mov(dword_ptr(l1::REASON), -1)?;
    p.a.mov(rbx, qword_ptr(l1::L2_PROBE))?;
    p.a.xor(eax, eax)?;
    p.a.cmp(dword_ptr(l1::LAUNCHED), 0)?;
    p.a.jne(resume)?;
    p.a.vmlaunch()?;
    p.a.ret()?;
    p.a.set_label(&mut resume)?;
    p.a.vmresume()?;
    p.a.ret()?;
    p.a.set_label(&mut r.exited)?;
    p.a.mov(dword_ptr(l1::VALUE), eax)?;
    p.a.mov(dword_ptr(l1::LAUNCHED), 1)?;
    emit_vmread(p, Field::ExitReason)?;
    p.a.mov(dword_ptr(l1::REASON), eax)?;
    p.a.ret()
}

/// `count`: clears the flags EDX in the entries from ESI to EDI; EAX says in how many.
fn emit_count(p: &mut Piece, r: &mut Routines) -> Emit {
    let (mut again, mut clear, mut done) = {
        let mut label = || p.a.create_label();
        (label(), label(), label())
    };
    let a = &mut p.a;
    a.set_label(&mut r.count)?;
    a.xor(eax, eax)?;
    a.mov(ecx, edx)?;
    a.not(ecx)?;
    a.set_label(&mut again)?;
    a.cmp(esi, edi)?;
    a.jae(done)?;
    // Half an entry at a time where entries have eight bytes: the flags are in the low half, and the high halves are 0.
    a.test(dword_ptr(esi), edx)?;
    a.je(clear)?;
    a.inc(eax)?;
    a.and(dword_ptr(esi), ecx)?;
    a.set_label(&mut clear)?;
    a.add(esi, 4)?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.ret()
}

// ---- rows -------------------------------------------------------------------------------------------------------------

fn emit_row(p: &mut Piece, r: &Routines, guests: &Guests, guest: &Guest, with: With, event: Event) -> Emit {
    let paging = format!("5-level <-> {}", guest.mode.name());
    let has = match (with.ept, with.vpid) {
        (false, false) => "-",
        (false, true) => "VPID",
        (true, false) => "EPT",
        (true, true) => "EPT, VPID",
    };
    p.a.call(r.begin)?;
    for table in guests.fields(guest, with) {
        p.a.mov(esi, table)?;
        p.a.call(r.fields)?;
    }
    p.set(l1::L2_PROBE, guest.mode.probe())?;
    p.set(l1::L2_TABLES, guest.tables[0].into())?;
    p.set(l1::L2_TABLES_END, guest.tables[1].into())?;
    p.say(&format!("{:<14}{paging:<22}{has:<13}", event.name()))?;
    p.when(l1::LACKING, 1, |p| p.say("this processor has not got that\r\n"))?;
    p.when(l1::LACKING, 0, |p| {
        // All of it twice: the first time L1 reaches pages of its own code that it had no translations of.
        let mut again = p.a.create_label();
        p.a.mov(dword_ptr(l1::PASSES), 2)?;
        p.a.set_label(&mut again)?;
        emit_round(p, r, guest, program::READ)?;
        emit_event(p, r, guests, guest, event)?;
        p.a.dec(dword_ptr(l1::PASSES))?;
        p.a.jne(again)?;
        emit_result(p, guest, with, event)
    })
}

fn emit_round(p: &mut Piece, r: &Routines, guest: &Guest, which: u32) -> Emit {
    p.a.mov(eax, guest.mode.rip(which))?;
    emit_vmwrite(p, Field::GuestRip)?;
    p.a.call(r.round)
}

/// The event and the second round.
fn emit_event(p: &mut Piece, r: &Routines, guests: &Guests, guest: &Guest, event: Event) -> Emit {
    match event {
        Event::None => emit_round(p, r, guest, program::READ),
        Event::Program(which) => emit_round(p, r, guest, which),
        Event::Invvpid(kind) => {
            p.set(l1::DESCRIPTOR, VPID.into())?;
            p.set(l1::DESCRIPTOR + 8, guest.mode.probe())?;
            p.a.mov(eax, kind as u32)?;
            p.a.invvpid(rax, xmmword_ptr(l1::DESCRIPTOR))?;
            emit_round(p, r, guest, program::READ)
        }
        Event::Invept(kind) => {
            emit_invept(p, guests, kind)?;
            emit_round(p, r, guest, program::READ)
        }
        Event::Violation => {
            let (entry, mapped) = guests.ept_next;
            emit_invept(p, guests, invept::SINGLE_CONTEXT)?;
            emit_round(p, r, guest, program::READ)?;
            p.a.mov(eax, guest.mode.rip(program::READ_NEXT))?;
            emit_vmwrite(p, Field::GuestRip)?;
            p.a.call(r.enter)?;
            p.expect(l1::REASON, ExitReason::EptViolation.number().into())?;
            emit_vmread(p, Field::GuestPhysicalAddress)?;
            p.a.mov(qword_ptr(l1::GUEST_PHYSICAL), rax)?;
            p.expect(l1::GUEST_PHYSICAL, (layout::L2_FRAMES + 0x1000).into())?;
            // Mapped, with nothing invalidated; RIP is still at the instruction.
            p.set(entry, mapped)?;
            p.a.call(r.round)?;
            p.expect(l1::VALUE, SEEN_NEXT.into())?;
            p.set(entry, 0)?;
            emit_round(p, r, guest, program::READ)
        }
    }
}

fn emit_invept(p: &mut Piece, guests: &Guests, kind: u64) -> Emit {
    p.set(l1::DESCRIPTOR, guests.eptp)?;
    p.set(l1::DESCRIPTOR + 8, 0)?;
    p.a.mov(eax, kind as u32)?;
    p.a.invept(rax, xmmword_ptr(l1::DESCRIPTOR))
}

/// The rest of the line.
fn emit_result(p: &mut Piece, guest: &Guest, with: With, event: Event) -> Emit {
    p.expect(l1::VALUE, SEEN.into())?;
    p.expect(l1::REASON, ExitReason::Vmcall.number().into())?;
    let paged = matches!(guest.mode, Mode::Paged(_));
    let shown = [true, paged, with.ept];
    let widths = [8, 8, 7];
    let must_drop = event.must_drop(with);
    for i in 0..3 {
        let (count, width) = (l1::WALKED[i], widths[i]);
        if !shown[i] {
            p.say(&format!("{:<width$}", "-"))?;
            continue;
        }
        p.unless(count, 0, |p| p.say(&format!("{:<width$}", "dropped")))?;
        p.when(count, 0, |p| {
            if must_drop[i] {
                p.a.mov(dword_ptr(var::ROW_WRONG), 1)?;
            }
            p.say(&format!("{:<width$}", "kept"))
        })?;
    }
    for (count, gap) in l1::WALKED.into_iter().zip(["  ", "  ", "   "]) {
        p.say(gap)?;
        p.say_decimal(count)?;
    }
    p.end_row()
}
