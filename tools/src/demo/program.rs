//! The demo guest's pieces in order, and the switches of mode between them (SDM Vol 3A, "Mode Switching").

use super::asm::{Piece, Text};
use super::guests::Guests;
use super::l1;
use super::layout::{self, real, selector, var};
use super::rows::{Cause, FaultRow, ModeRows, SWITCHES, put_frames};
use super::tables::{Paging, Tables, put_gdt};
use super::{Memory, PowerOff};
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction};
use twofold_arch::control::{cr0, cr4, efer};

const EFER: u32 = 0xc000_0080;
/// Under paging: protection, the FPU's native errors, write protection for the supervisor too.
const CR0_PAGED: u32 = (cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::PE) as u32;
const CR0_FLAT: u32 = (cr0::NE | cr0::ET | cr0::PE) as u32;

/// Builds everything but the Multiboot header.
pub fn build(memory: &mut Memory, off: PowerOff) -> Result<(), String> {
    use Cause::{NoExecute, NonCanonical, NotPresent, ReadOnly, Reserved};
    let mut tables = Tables::new();
    let mut mode = |memory: &mut Memory, paging, name, faults: &[(Cause, u64)], switch_at| {
        let faults: Vec<FaultRow> = faults.iter().map(|&(cause, linear)| FaultRow { cause, linear }).collect();
        ModeRows::new(memory, &mut tables, paging, name, &faults, switch_at)
    };
    let bits32 =
        mode(memory, Paging::Bits32, "32-bit", &[(NotPresent, 0xc0de_1234), (ReadOnly, 0xc0de_5678)], 0xc000_0000)?;
    let pae = [(NotPresent, 0xc0de_1234), (NoExecute, 0xc0de_5000), (Reserved, 0xc0de_7001)];
    let pae = mode(memory, Paging::Pae, "PAE", &pae, 0xc000_0000)?;
    let four =
        [(NotPresent, 0xffff_c0de_0000_1234), (Reserved, 0xffff_d000_0000_0001), (NonCanonical, 0x00ff_8000_0000_1234)];
    let four = mode(memory, Paging::Four, "4-level", &four, 0x0000_7fff_ffff_f000)?;
    let five =
        [(NotPresent, 0x00ff_8000_0000_1234), (NoExecute, 0xff00_c0de_0000_5000), (Reserved, 0xff42_0000_0000_0001)];
    let five = mode(memory, Paging::Five, "5-level", &five, 0x00ff_ffff_ffff_f000)?;

    put_gdt(memory)?;
    put_frames(memory)?;
    let mut text = Text::default();
    put_entry(memory)?;
    put_real(memory)?;
    main32(&mut text, [&bits32, &pae, &four]).map_err(text_of)?.finish(memory, layout::FOUR, 0)?;
    self::four(&mut text, &four).map_err(text_of)?.finish(memory, layout::BETWEEN, 1)?;
    between(&mut text, &five).map_err(text_of)?.finish(memory, layout::FIVE, 2)?;
    self::five(&mut text, &five).map_err(text_of)?.finish(memory, layout::GDT, 3)?;
    let guests = Guests::new(memory, &mut tables)?;
    l1::emit(&mut text, &five, &guests, off).map_err(text_of)?.finish(memory, layout::L2, 4)?;
    if tables.next() > layout::L1 {
        return Err(format!("page tables up to {:#x} do not fit", tables.next()));
    }
    if text.bytes.len() > (layout::TEXT_END - layout::TEXT) as usize {
        return Err(format!("{} bytes of text do not fit", text.bytes.len()));
    }
    memory.put(layout::TEXT, &text.bytes)
}

fn text_of(e: IcedError) -> String {
    e.to_string()
}

/// A direct far jump with a 32-bit offset.
fn jmp_far(a: &mut CodeAssembler, selector: u16, offset: u32) -> Result<(), IcedError> {
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, selector, offset)?)
}

/// Loads all data segment registers.
fn load_data_segments(a: &mut CodeAssembler, selector: u16) -> Result<(), IcedError> {
    a.mov(eax, u32::from(selector))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(fs, eax)?;
    a.mov(gs, eax)
}

/// The entry: our own GDT, the real-mode piece copied to where real mode reaches it, and on to a 16-bit segment.
fn put_entry(memory: &mut Memory) -> Result<(), String> {
    let emit = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        a.cli()?;
        a.cld()?;
        a.lgdt(ptr(layout::POINTERS))?;
        load_data_segments(&mut a, selector::DATA)?;
        a.mov(esi, layout::REAL_STORED)?;
        a.mov(edi, layout::REAL)?;
        a.mov(ecx, layout::REAL_SIZE / 4)?;
        a.rep().movsd()?;
        jmp_far(&mut a, selector::CODE16, layout::REAL)?;
        a.assemble(layout::ENTRY.into())
    };
    memory.put(layout::ENTRY, &emit().map_err(text_of)?)
}

/// Real mode: a divide error through the interrupt vector table, and two segments as two address spaces.
fn put_real(memory: &mut Memory) -> Result<(), String> {
    let pieces = [
        (layout::REAL, layout::REAL_POINTER, real_entry()),
        (layout::REAL_HANDLER, layout::REAL_MAIN, real_divide_error()),
        (layout::REAL_MAIN, layout::REAL + layout::REAL_SIZE, real_main()),
    ];
    for (start, end, piece) in pieces {
        let bytes = piece.map_err(text_of)?;
        if bytes.len() > (end - start) as usize {
            return Err(format!("{} bytes of real-mode code do not fit before {end:#x}", bytes.len()));
        }
        memory.put(layout::REAL_STORED + start - layout::REAL, &bytes)?;
    }
    // The interrupt vector table: limit 0x3ff, base 0.
    memory.put(layout::REAL_STORED + layout::REAL_POINTER - layout::REAL, &[0xff, 0x03, 0, 0, 0, 0])
}

/// Protected mode in 16-bit segments, which leave real mode's limits behind, then CR0.PE off.
fn real_entry() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    load_data_segments(&mut a, selector::DATA16)?;
    a.lidt(ptr(layout::REAL_POINTER))?;
    a.mov(eax, cr0)?;
    a.and(al, !1)?;
    a.mov(cr0, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1616, 0, layout::REAL_MAIN)?)?;
    a.assemble(layout::REAL.into())
}

/// #DE: notes the return address and the bytes there, and steps over the two-byte DIV.
fn real_divide_error() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.push(bp)?;
    a.mov(bp, sp)?;
    a.mov(bx, word_ptr(bp + 2))?;
    a.mov(word_ptr(real::FAULT_IP), bx)?;
    a.mov(ax, word_ptr(bx))?;
    a.mov(word_ptr(real::FAULT_BYTES), ax)?;
    a.mov(ax, word_ptr(bp + 4))?;
    a.mov(word_ptr(real::FAULT_CS), ax)?;
    a.inc(word_ptr(real::FAULTS))?;
    a.add(word_ptr(bp + 2), 2)?;
    a.pop(bp)?;
    a.iret()?;
    a.assemble(layout::REAL_HANDLER.into())
}

fn real_main() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    a.mov(sp, layout::REAL)?;

    // Vector 0 of the table at linear address 0.
    a.mov(word_ptr(0), layout::REAL_HANDLER)?;
    a.mov(word_ptr(2), 0)?;
    a.mov(word_ptr(real::FAULTS), 0)?;
    a.mov(word_ptr(real::MISSES), 0)?;
    a.xor(dx, dx)?;
    a.xor(cx, cx)?;
    a.mov(ax, 1)?;
    a.div(cx)?;

    // One offset, two segments.
    for (segment, value) in [(0x2000, 0xaaaa), (0x3000, 0xbbbb)] {
        a.mov(ax, segment)?;
        a.mov(ds, ax)?;
        a.mov(word_ptr(0x10), value)?;
    }
    let mut again = a.create_label();
    a.mov(cx, SWITCHES)?;
    a.set_label(&mut again)?;
    for (segment, value, seen) in [(0x2000, 0xaaaa, real::SEEN_A), (0x3000, 0xbbbb, real::SEEN_B)] {
        let mut right = a.create_label();
        a.mov(ax, segment)?;
        a.mov(ds, ax)?;
        a.mov(ax, word_ptr(0x10))?;
        a.mov(word_ptr(seen).es(), ax)?;
        a.cmp(ax, value)?;
        a.je(right)?;
        a.inc(word_ptr(real::MISSES).es())?;
        a.set_label(&mut right)?;
        a.nop()?;
    }
    a.loop_(again)?;

    // Back to protected mode: GDTR still holds what the entry loaded.
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    jmp_far(&mut a, selector::CODE32, layout::MAIN32)?;
    a.assemble(layout::REAL_MAIN.into())
}

/// Vendor and brand string from CPUID, and which of PCIDs there are.
fn emit_cpuid(p: &mut Piece) -> Result<(), IcedError> {
    p.a.xor(eax, eax)?;
    p.a.cpuid()?;
    for (i, register) in [ebx, edx, ecx].into_iter().enumerate() {
        p.a.mov(dword_ptr(var::VENDOR + 4 * i as u32), register)?;
    }
    for leaf in 0..3u32 {
        p.a.mov(eax, 0x8000_0002 + leaf)?;
        p.a.cpuid()?;
        for (i, register) in [eax, ebx, ecx, edx].into_iter().enumerate() {
            p.a.mov(dword_ptr(var::BRAND + 16 * leaf + 4 * i as u32), register)?;
        }
    }
    p.a.mov(eax, 1)?;
    p.a.cpuid()?;
    p.a.shr(ecx, 17)?;
    p.a.and(ecx, 1)?;
    p.a.mov(dword_ptr(var::PCID), ecx)
}

fn emit_heading(p: &mut Piece) -> Result<(), IcedError> {
    p.say("One processor through every mode: ")?;
    p.say_at(var::VENDOR)?;
    p.say(", ")?;
    p.say_at(var::BRAND)?;
    p.say("\r\n\r\n")?;
    p.say("mode     access                 fault     CR2               the handler, and what was seen then\r\n")?;
    p.say("-------- ---------------------- --------- ----------------- -----------------------------------\r\n")
}

/// What real mode left.
fn emit_real_rows(p: &mut Piece) -> Result<(), IcedError> {
    let word = |p: &mut Piece, from: u32, to: u32| {
        p.a.movzx(eax, word_ptr(from))?;
        p.a.mov(dword_ptr(to), eax)
    };
    word(p, real::FAULTS, var::COUNT)?;
    word(p, real::FAULT_IP, var::VALUE)?;
    word(p, real::FAULT_CS, var::ERROR)?;
    word(p, real::FAULT_BYTES, var::CR2)?;
    p.say("real     divide by 0            #DE       -                 at ")?;
    p.say_hex(var::ERROR, 4)?;
    p.say(":")?;
    p.say_hex(var::VALUE, 4)?;
    p.say(", by the IVT; skipped")?;
    p.expect(var::COUNT, 1)?;
    p.expect(var::ERROR, 0)?;
    // The bytes of DIV CX.
    p.expect(var::CR2, 0xf1f7)?;
    p.end_row()?;
    word(p, real::SEEN_A, var::VALUE)?;
    word(p, real::SEEN_B, var::CR2)?;
    word(p, real::MISSES, var::COUNT)?;
    p.say("         DS    2000:10, 3000:10 -         -                 A ")?;
    p.say_hex(var::VALUE, 4)?;
    p.say(", B ")?;
    p.say_hex(var::CR2, 4)?;
    p.say(&format!("; {SWITCHES} times"))?;
    p.expect(var::COUNT, 0)?;
    p.expect(var::VALUE, 0xaaaa)?;
    p.expect(var::CR2, 0xbbbb)?;
    p.end_row()
}

/// From 32-bit code without paging: CR4, CR3, then CR0.PG.
fn emit_paging_on(a: &mut CodeAssembler, bits: u64, root: u32) -> Result<(), IcedError> {
    a.mov(eax, bits as u32)?;
    a.mov(cr4, eax)?;
    a.mov(eax, root)?;
    a.mov(cr3, eax)?;
    a.mov(eax, CR0_PAGED)?;
    a.mov(cr0, eax)
}

fn emit_paging_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, CR0_FLAT)?;
    a.mov(cr0, eax)
}

/// Sets EFER to exactly `bits`.
fn emit_efer(a: &mut CodeAssembler, bits: u64) -> Result<(), IcedError> {
    a.mov(ecx, EFER)?;
    a.mov(eax, bits as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Segments, stack and IDT at the start of a 32-bit piece.
fn emit_start32(p: &mut Piece, idt: u32) -> Result<(), IcedError> {
    load_data_segments(&mut p.a, selector::DATA)?;
    p.a.mov(esp, layout::STACK)?;
    p.load_idt(idt)
}

/// Prints what real mode left, does 32-bit paging and PAE, and enters IA-32e mode.
fn main32<'t>(text: &'t mut Text, [bits32, pae, four]: [&ModeRows; 3]) -> Result<Piece<'t>, IcedError> {
    let mut p = Piece::new(layout::MAIN32, false, text)?;
    emit_start32(&mut p, 0)?;
    // COM1: 8 data bits, which not every machine has from reset.
    p.a.mov(edx, 0x3fb)?;
    p.a.mov(al, 3)?;
    p.a.out(dx, al)?;
    emit_cpuid(&mut p)?;
    emit_heading(&mut p)?;
    emit_real_rows(&mut p)?;

    emit_paging_on(&mut p.a, cr4::PSE | cr4::PGE, bits32.roots[0])?;
    bits32.emit(&mut p)?;
    emit_paging_off(&mut p.a)?;

    emit_efer(&mut p.a, efer::NXE)?;
    emit_paging_on(&mut p.a, cr4::PAE | cr4::PGE, pae.roots[0])?;
    pae.emit(&mut p)?;
    emit_paging_off(&mut p.a)?;

    emit_efer(&mut p.a, efer::NXE | efer::LME)?;
    emit_paging_on(&mut p.a, cr4::PAE | cr4::PGE, four.roots[0])?;
    jmp_far(&mut p.a, selector::CODE64, layout::FOUR)?;
    Ok(p)
}

/// 4-level paging, then compatibility mode, which may leave IA-32e mode.
fn four<'t>(text: &'t mut Text, rows: &ModeRows) -> Result<Piece<'t>, IcedError> {
    let mut p = Piece::new(layout::FOUR, true, text)?;
    p.a.mov(rsp, u64::from(layout::STACK))?;
    p.load_idt(1)?;
    rows.emit(&mut p)?;
    // To compatibility mode, which may leave IA-32e mode.
    p.a.push(i32::from(selector::CODE32))?;
    p.a.push(layout::BETWEEN as i32)?;
    p.a.add_instruction(Instruction::with(Code::Retfq))?;
    Ok(p)
}

/// Out of IA-32e mode, because CR4.LA57 cannot change inside, and in again with five levels.
fn between<'t>(text: &'t mut Text, five: &ModeRows) -> Result<Piece<'t>, IcedError> {
    let mut p = Piece::new(layout::BETWEEN, false, text)?;
    let mut no_la57 = p.a.create_label();
    emit_paging_off(&mut p.a)?;
    emit_start32(&mut p, 2)?;
    p.a.mov(eax, 7)?;
    p.a.xor(ecx, ecx)?;
    p.a.cpuid()?;
    p.a.bt(ecx, 16)?;
    p.a.jae(no_la57)?;
    emit_paging_on(&mut p.a, cr4::PAE | cr4::PGE | cr4::LA57, five.roots[0])?;
    jmp_far(&mut p.a, selector::CODE64, layout::FIVE)?;
    p.a.set_label(&mut no_la57)?;
    p.a.nop()?;
    p.say("5-level  this processor has no LA57\r\n")?;
    p.a.mov(dword_ptr(var::WRONG), 1)?;
    p.end_machine(PowerOff { port: 0x80, value: 0 })?;
    Ok(p)
}

/// 5-level paging.
fn five<'t>(text: &'t mut Text, rows: &ModeRows) -> Result<Piece<'t>, IcedError> {
    let mut p = Piece::new(layout::FIVE, true, text)?;
    p.a.mov(rsp, u64::from(layout::STACK))?;
    p.load_idt(3)?;
    rows.emit(&mut p)?;
    p.a.jmp(u64::from(layout::L1))?;
    Ok(p)
}
