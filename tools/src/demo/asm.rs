//! A piece of the demo guest's code of one operand size: printing on COM1, the fault handlers, and checks.
//!
//! The same emitters serve 32- and 64-bit pieces: they use 32-bit registers and absolute addresses below 2 GiB only, which
//! both encode. Each piece carries its own copy of the few routines, so pieces need only each other's start addresses.

use super::layout::var;
use super::tables::{idt_pointer, put_idt};
use super::{Memory, PowerOff};
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

/// Strings of all pieces, each ended by a zero byte.
#[derive(Default)]
pub struct Text {
    pub bytes: Vec<u8>,
}

impl Text {
    fn add(&mut self, text: &str) -> u32 {
        let whole = [text.as_bytes(), &[0]].concat();
        let known = self.bytes.windows(whole.len()).position(|bytes| bytes == whole);
        let offset = known.unwrap_or(self.bytes.len());
        if known.is_none() {
            self.bytes.extend(whole);
        }
        super::layout::TEXT + offset as u32
    }
}

/// A piece of code.
pub struct Piece<'t> {
    /// For what has no name here.
    pub a: CodeAssembler,
    base: u32,
    wide: bool,
    text: &'t mut Text,
    print: CodeLabel,
    hex: CodeLabel,
    decimal: CodeLabel,
    gp: CodeLabel,
    pf: CodeLabel,
}

type Emit = Result<(), IcedError>;

impl<'t> Piece<'t> {
    /// A piece of 32-bit code, or 64-bit (`wide`), that will start at `base` with what is emitted next.
    pub fn new(base: u32, wide: bool, text: &'t mut Text) -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(if wide { 64 } else { 32 })?;
        let (print, hex, decimal) = (a.create_label(), a.create_label(), a.create_label());
        let (gp, pf) = (a.create_label(), a.create_label());
        let mut piece = Piece { a, base, wide, text, print, hex, decimal, gp, pf };
        let mut start = piece.a.create_label();
        piece.a.jmp(start)?;
        piece.emit_print()?;
        piece.emit_hex()?;
        piece.emit_decimal()?;
        piece.emit_fault_handlers()?;
        piece.a.set_label(&mut start)?;
        Ok(piece)
    }

    /// Assembles the piece into memory, with the `idt`th IDT for its handlers. It must end before `end`.
    pub fn finish(mut self, memory: &mut Memory, end: u32, idt: u32) -> Result<(), String> {
        let code = self
            .a
            .assemble_options(self.base.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .map_err(|e| e.to_string())?;
        let ip = |label: &CodeLabel| code.label_ip(label).map(|ip| ip as u32).map_err(|e| e.to_string());
        put_idt(memory, idt, self.wide, ip(&self.gp)?, ip(&self.pf)?)?;
        let bytes = &code.inner.code_buffer;
        if bytes.len() > (end - self.base) as usize {
            return Err(format!("{} bytes from {:#x} do not fit before {end:#x}", bytes.len(), self.base));
        }
        memory.put(self.base, bytes)
    }

    /// Loads this piece's IDT.
    pub fn load_idt(&mut self, idt: u32) -> Emit {
        self.a.lidt(ptr(idt_pointer(idt)))
    }

    /// Sends AL to COM1; clobbers EDX and AH.
    fn emit_put(&mut self) -> Emit {
        let a = &mut self.a;
        let mut wait = a.create_label();
        a.mov(ah, al)?;
        a.mov(edx, 0x3fd)?;
        a.set_label(&mut wait)?;
        a.in_(al, dx)?;
        a.test(al, 0x20)?;
        a.je(wait)?;
        a.mov(al, ah)?;
        a.mov(edx, 0x3f8)?;
        a.out(dx, al)
    }

    /// `print`: the string at ESI. Clobbers EAX, EDX, ESI.
    fn emit_print(&mut self) -> Emit {
        let mut print = self.print;
        let mut done = self.a.create_label();
        self.a.set_label(&mut print)?;
        self.a.mov(al, byte_ptr(esi))?;
        self.a.test(al, al)?;
        self.a.je(done)?;
        self.emit_put()?;
        self.a.inc(esi)?;
        self.a.jmp(print)?;
        self.a.set_label(&mut done)?;
        self.a.ret()?;
        self.print = print;
        Ok(())
    }

    /// `hex`: the low ECX digits of the number at ESI. Clobbers EAX, ECX, EDX.
    fn emit_hex(&mut self) -> Emit {
        let mut hex = self.hex;
        let (mut done, mut low, mut digit) = (self.a.create_label(), self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut hex)?;
        self.a.sub(ecx, 1)?;
        self.a.jb(done)?;
        self.a.mov(eax, ecx)?;
        self.a.shr(eax, 1)?;
        self.a.movzx(eax, byte_ptr(esi + eax))?;
        self.a.test(cl, 1)?;
        self.a.je(low)?;
        self.a.shr(eax, 4)?;
        self.a.set_label(&mut low)?;
        self.a.and(eax, 15)?;
        self.a.cmp(al, 10)?;
        self.a.jb(digit)?;
        self.a.add(al, i32::from(b'a' - 10 - b'0'))?;
        self.a.set_label(&mut digit)?;
        self.a.add(al, i32::from(b'0'))?;
        self.emit_put()?;
        self.a.jmp(hex)?;
        self.a.set_label(&mut done)?;
        self.a.ret()?;
        self.hex = hex;
        Ok(())
    }

    /// `decimal`: the number below 1000 at ESI, three columns wide. Clobbers EAX, EBX, ECX, EDX, ESI.
    fn emit_decimal(&mut self) -> Emit {
        let mut decimal = self.decimal;
        self.a.set_label(&mut decimal)?;
        self.a.mov(ebx, dword_ptr(esi))?;
        // Not zero once a digit has been printed.
        self.a.xor(esi, esi)?;
        for place in [100, 10, 1] {
            let (mut digit, mut put) = (self.a.create_label(), self.a.create_label());
            self.a.mov(eax, ebx)?;
            self.a.xor(edx, edx)?;
            self.a.mov(ecx, place)?;
            self.a.div(ecx)?;
            self.a.mov(ebx, edx)?;
            self.a.or(esi, eax)?;
            if place > 1 {
                self.a.test(esi, esi)?;
                self.a.jne(digit)?;
                self.a.mov(al, i32::from(b' '))?;
                self.a.jmp(put)?;
            }
            self.a.set_label(&mut digit)?;
            self.a.add(al, i32::from(b'0'))?;
            self.a.set_label(&mut put)?;
            self.emit_put()?;
        }
        self.a.ret()?;
        self.decimal = decimal;
        Ok(())
    }

    /// #GP and #PF: note what happened, then resume elsewhere (`RESUME`), or repair the entry and run the access again.
    fn emit_fault_handlers(&mut self) -> Emit {
        let (mut gp, mut pf) = (self.gp, self.pf);
        let a = &mut self.a;
        let (mut common, mut fix, mut out) = (a.create_label(), a.create_label(), a.create_label());
        let mut going = a.create_label();
        // Bytes of a stack slot; two registers are saved below the error code.
        let slot = if self.wide { 8 } else { 4 };
        let save = |a: &mut CodeAssembler| {
            if slot == 8 { a.push(rax).and_then(|()| a.push(rdi)) } else { a.push(eax).and_then(|()| a.push(edi)) }
        };
        a.set_label(&mut pf)?;
        save(a)?;
        a.mov(dword_ptr(var::VECTOR), 14)?;
        if slot == 8 {
            a.mov(rax, cr2)?;
            a.mov(qword_ptr(var::CR2), rax)?;
        } else {
            a.mov(eax, cr2)?;
            a.mov(dword_ptr(var::CR2), eax)?;
        }
        a.jmp(common)?;
        a.set_label(&mut gp)?;
        save(a)?;
        a.mov(dword_ptr(var::VECTOR), 13)?;
        a.set_label(&mut common)?;
        let (error, ip) = (2 * slot, 3 * slot);
        if slot == 8 {
            a.mov(eax, dword_ptr(rsp + error))?
        } else {
            a.mov(eax, dword_ptr(esp + error))?
        }
        a.mov(dword_ptr(var::ERROR), eax)?;
        a.inc(dword_ptr(var::COUNT))?;
        a.inc(dword_ptr(var::TOTAL))?;
        // A repair that does not help would fault for ever.
        a.cmp(dword_ptr(var::TOTAL), 50)?;
        a.jb(going)?;
        a.mov(eax, 2)?;
        a.mov(edx, 0xf4)?;
        a.out(dx, eax)?;
        a.set_label(&mut going)?;
        a.mov(eax, dword_ptr(var::RESUME))?;
        a.test(eax, eax)?;
        a.je(fix)?;
        if slot == 8 {
            a.mov(qword_ptr(rsp + ip), rax)?
        } else {
            a.mov(dword_ptr(esp + ip), eax)?
        }
        a.jmp(out)?;
        a.set_label(&mut fix)?;
        a.mov(edi, dword_ptr(var::FIX_AT))?;
        a.mov(eax, dword_ptr(var::FIX))?;
        a.mov(dword_ptr(edi), eax)?;
        // In 32-bit paging this is the next entry, which the rows leave unused.
        a.mov(eax, dword_ptr(var::FIX + 4))?;
        a.mov(dword_ptr(edi + 4), eax)?;
        if slot == 8 {
            a.mov(rax, cr2)?;
            a.invlpg(byte_ptr(rax))?;
        } else {
            a.mov(eax, cr2)?;
            a.invlpg(byte_ptr(eax))?;
        }
        a.set_label(&mut out)?;
        if slot == 8 {
            a.pop(rdi)?;
            a.pop(rax)?;
            a.add(rsp, slot)?;
            a.iretq()?;
        } else {
            a.pop(edi)?;
            a.pop(eax)?;
            a.add(esp, slot)?;
            a.iretd()?;
        }
        (self.gp, self.pf) = (gp, pf);
        Ok(())
    }

    /// Prints a string.
    pub fn say(&mut self, text: &str) -> Emit {
        let at = self.text.add(text);
        self.say_at(at)
    }

    /// Prints the zero-ended string at `address`.
    pub fn say_at(&mut self, address: u32) -> Emit {
        self.a.mov(esi, address)?;
        self.a.call(self.print)
    }

    /// Prints the number at `address` in `digits` hexadecimal digits.
    pub fn say_hex(&mut self, address: u32, digits: u32) -> Emit {
        self.a.mov(esi, address)?;
        self.a.mov(ecx, digits)?;
        self.a.call(self.hex)
    }

    /// Prints the number below 1000 at `address` in decimal, three columns wide.
    pub fn say_decimal(&mut self, address: u32) -> Emit {
        self.a.mov(esi, address)?;
        self.a.call(self.decimal)
    }

    /// Emits `body` so that it runs only when the 32-bit variable is `value`.
    pub fn when(&mut self, variable: u32, value: u32, body: impl FnOnce(&mut Self) -> Emit) -> Emit {
        let mut skip = self.a.create_label();
        self.a.cmp(dword_ptr(variable), value as i32)?;
        self.a.jne(skip)?;
        body(self)?;
        self.a.set_label(&mut skip)?;
        // A label needs an instruction of its own.
        self.a.nop()
    }

    /// Emits `body` so that it runs only when the 32-bit variable is not `value`.
    pub fn unless(&mut self, variable: u32, value: u32, body: impl FnOnce(&mut Self) -> Emit) -> Emit {
        let mut skip = self.a.create_label();
        self.a.cmp(dword_ptr(variable), value as i32)?;
        self.a.je(skip)?;
        body(self)?;
        self.a.set_label(&mut skip)?;
        self.a.nop()
    }

    /// Sets an eight-byte variable.
    pub fn set(&mut self, variable: u32, value: u64) -> Emit {
        self.a.mov(dword_ptr(variable), value as u32 as i32)?;
        self.a.mov(dword_ptr(variable + 4), (value >> 32) as u32 as i32)
    }

    /// Marks the row as wrong unless the eight-byte variable is `value`.
    pub fn expect(&mut self, variable: u32, value: u64) -> Emit {
        let (mut wrong, mut right) = (self.a.create_label(), self.a.create_label());
        self.a.cmp(dword_ptr(variable), value as u32 as i32)?;
        self.a.jne(wrong)?;
        self.a.cmp(dword_ptr(variable + 4), (value >> 32) as u32 as i32)?;
        self.a.je(right)?;
        self.a.set_label(&mut wrong)?;
        self.a.mov(dword_ptr(var::ROW_WRONG), 1)?;
        self.a.set_label(&mut right)?;
        self.a.nop()
    }

    /// Ends a printed row; says so when it was wrong.
    pub fn end_row(&mut self) -> Emit {
        self.when(var::ROW_WRONG, 1, |p| {
            p.a.mov(dword_ptr(var::ROW_WRONG), 0)?;
            p.a.inc(dword_ptr(var::WRONG))?;
            p.say("  <- WRONG")
        })?;
        self.say("\r\n")
    }

    /// The end: isa-debug-exit when a row was wrong, else ACPI S5; isa-debug-exit too where S5 did nothing.
    pub fn end_machine(&mut self, off: PowerOff) -> Emit {
        let mut bad = self.a.create_label();
        let mut halt = self.a.create_label();
        self.a.cmp(dword_ptr(var::WRONG), 0)?;
        self.a.jne(bad)?;
        self.a.mov(edx, u32::from(off.port))?;
        self.a.mov(eax, u32::from(off.value))?;
        self.a.out(dx, ax)?;
        self.a.set_label(&mut bad)?;
        self.a.mov(eax, 1)?;
        self.a.mov(edx, 0xf4)?;
        self.a.out(dx, eax)?;
        self.a.set_label(&mut halt)?;
        self.a.cli()?;
        self.a.hlt()?;
        self.a.jmp(halt)
    }
}
