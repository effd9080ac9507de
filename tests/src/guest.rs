//! Bare-metal guests for tests: a few instructions with paging, handlers for all exceptions, and a record of each.
//!
//! A [`Guest`] is a Multiboot image made here: it switches to the mode that is wanted, with identity-mapped 4 KiB pages, and
//! jumps to [`CODE`]. Every exception and interrupt leaves a [`Record`] of all registers as they were pushed; the code ends by
//! [`END`], which leaves one too. The records and what memory was asked for come out of the debug console, so a run in one
//! tier can be compared with another's bit by bit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use twofold_runtime::config::{Config, Console, Output, Tier};
use twofold_runtime::{Ending, run};

/// Where the guest's own code begins; in 16-bit guests the base of CS.
pub const CODE: u32 = 0x12_0000;
/// The end of the place for code.
pub const CODE_END: u32 = 0x14_0000;
/// 128 KiB of data, zero at first.
pub const DATA: u32 = 0x14_0000;
/// Data that 16-bit addresses reach: 16 KiB, zero at first.
pub const DATA16: u32 = 0x8000;
/// The initial stack pointer.
pub const STACK: u32 = 0x18_0000;
/// All of this is identity-mapped with 4 KiB pages; what lies above the image is zero.
pub const MAPPED: u32 = 0x40_0000;
/// Ends the guest: `int END`.
pub const END: i32 = 0xfe;

/// Set to not 0: exceptions leave no record but are folded into a hash.
pub const HASHING: u32 = VARS;
/// Set to not 0: execution goes on at the next multiple of 16 after an exception.
pub const SKIP: u32 = VARS + 8;
/// Set to not 0: execution goes on there after the next exception, once.
pub const RESUME: u32 = VARS + 16;
/// The hash.
pub const HASH: u32 = VARS + 24;

/// The error code of the last record when there was no room for more.
const FULL: i32 = 0xbad;

const COUNT: u32 = VARS + 32;
const LOG_AT: u32 = VARS + 40;
const FX: u32 = VARS + 0x200;

const LOAD: u32 = 0x10_0000;
const HEADER: u32 = 32;
const GDT: u32 = 0x10_1000;
const POINTERS: u32 = 0x10_1f00;
const IDT: u32 = 0x10_2000;
const START: u32 = 0x10_3000;
const STUBS: u32 = 0x10_4000;
const STUB: u32 = 16;
const COMMON: u32 = 0x10_6000;
const TABLES: u32 = 0x11_0000;
const VARS: u32 = 0x16_0000;
const RANGES: u32 = VARS + 0x800;
const LOG: u32 = 0x18_0000;
const LOG_END: u32 = 0x2c_0000;
/// The image ends here; what follows is zero.
const IMAGE_END: u32 = LOG;
const TSS: u32 = 0x10_7000;
/// The stack of all handlers of a 64-bit guest, so that bad stack pointers can be tested.
const HANDLER_STACK: u32 = 0x17_8000;

const CODE32_SEL: u16 = 8;
const DATA_SEL: u16 = 0x10;
const CODE64_SEL: u16 = 0x18;
const CODE16_SEL: u16 = 0x20;
const TSS_SEL: u16 = 0x28;

/// Bits of a paging entry.
pub mod pte {
    /// Present.
    pub const P: u64 = 1;
    /// Writable.
    pub const RW: u64 = 2;
    /// No execution, in 64-bit guests.
    pub const NX: u64 = 1 << 63;
}

/// The size of the code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// 16-bit protected mode: CS based at [`CODE`], the other segments flat, 32-bit paging.
    B16,
    /// 32-bit code, flat, 32-bit paging.
    B32,
    /// 64-bit code, 4-level paging.
    B64,
}

/// All tiers that a guest can be run in.
pub const TIERS: [Tier; 4] = [Tier::Eval, Tier::Quick, Tier::Auto, Tier::Opt];

/// A guest under construction.
#[derive(Clone)]
pub struct Guest {
    /// The size of its code.
    pub bits: Bits,
    image: Vec<u8>,
    ranges: Vec<(u32, u32)>,
}

/// The registers at an exception, an interrupt or the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Record {
    /// Vector.
    pub vector: u8,
    /// Error code, 0 if there is none.
    pub error: u64,
    /// As pushed.
    pub rip: u64,
    /// As pushed.
    pub cs: u64,
    /// As pushed.
    pub rflags: u64,
    /// By encoding. RSP is as pushed in 64-bit guests, and 0 in others.
    pub gpr: [u64; 16],
    /// CR2 of a page fault, DR6 of a debug exception, else 0.
    pub cr2: u64,
}

/// What a guest left behind.
#[derive(Clone, Debug)]
pub struct Ran {
    /// All exceptions and interrupts, without the last record.
    pub log: Vec<Record>,
    /// The registers at the end.
    pub last: Record,
    /// The hash of exceptions.
    pub hash: u64,
    /// Exceptions that were hashed.
    pub hashed: u64,
    /// The FXSAVE image at the end.
    pub fx: Vec<u8>,
    /// The memory that was asked for.
    pub memory: Vec<Vec<u8>>,
    /// Guest instructions retired.
    pub retired: u64,
    /// The statistics.
    pub stats: serde_json::Value,
}

impl Guest {
    /// A guest without code.
    #[must_use]
    pub fn new(bits: Bits) -> Self {
        let mut guest = Self { bits, image: vec![0; (IMAGE_END - LOAD) as usize], ranges: Vec::new() };
        guest.put_header();
        guest.put_gdt();
        guest.put_tables();
        guest.put_start();
        guest.put_handlers();
        guest
    }

    /// Puts bytes at a physical address of the image.
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        let start = (at - LOAD) as usize;
        self.image[start..start + bytes.len()].copy_from_slice(bytes);
    }
    fn put32(&mut self, at: u32, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.put(at, &bytes);
    }
    fn put64(&mut self, at: u32, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.put(at, &bytes);
    }

    /// Bytes a paging entry takes.
    #[must_use]
    pub fn pte_size(&self) -> u32 {
        if self.bits == Bits::B64 { 8 } else { 4 }
    }
    /// Where the paging entry of linear address `at` is; below [`MAPPED`].
    #[must_use]
    pub fn pte_at(&self, at: u32) -> u32 {
        let first = if self.bits == Bits::B64 { TABLES + 0x3000 } else { TABLES + 0x1000 };
        first + (at >> 12) * self.pte_size()
    }
    /// Sets the paging entry of the page of linear address `at`.
    pub fn map(&mut self, at: u32, entry: u64) {
        let place = self.pte_at(at);
        if self.bits == Bits::B64 { self.put64(place, &[entry]) } else { self.put32(place, &[entry as u32]) }
    }

    /// Assembles code at `at`; what `build` returns comes back with it, labels to be looked up among it.
    pub fn assemble<T>(
        &mut self,
        at: u32,
        build: impl FnOnce(&mut CodeAssembler) -> Result<T, IcedError>,
    ) -> (T, CodeAssemblerResult) {
        self.assemble_bits(at, self.bits, build)
    }

    fn assemble_bits<T>(
        &mut self,
        at: u32,
        bits: Bits,
        build: impl FnOnce(&mut CodeAssembler) -> Result<T, IcedError>,
    ) -> (T, CodeAssemblerResult) {
        let (width, ip) = match bits {
            Bits::B16 => (16, at - CODE),
            Bits::B32 => (32, at),
            Bits::B64 => (64, at),
        };
        let mut a = CodeAssembler::new(width).expect("a code size");
        let made = build(&mut a).expect("instructions");
        let code = a
            .assemble_options(ip.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .expect("code that can be encoded");
        self.put(at, &code.inner.code_buffer);
        (made, code)
    }

    /// Asks for memory at the end of the run.
    pub fn dump(&mut self, at: u32, len: u32) {
        self.ranges.push((at, len));
    }

    /// The guest as a Multiboot image.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        let mut whole = self.clone();
        for (i, &(at, len)) in self.ranges.iter().enumerate() {
            whole.put32(RANGES + 8 * i as u32, &[at, len]);
        }
        whole.image
    }

    /// Runs the guest to its end.
    ///
    /// # Panics
    /// When it does not end as it should.
    #[must_use]
    #[track_caller]
    pub fn run(&self, tier: Tier) -> Ran {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let image = self.image();
        if let Some(path) = std::env::var_os("TWOFOLD_GUEST_IMAGE") {
            // For a look at the guest with `twofold run`.
            std::fs::write(path, &image).expect("the image is written");
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("twofold-guest-{}-{number}", std::process::id()));
        let outcome = run(&Config {
            kernel_image: Some(Arc::from(image)),
            memory: 16 << 20,
            tier,
            serial: Console::None,
            debugcon: Console::File(file.clone()),
            stats: Some(Output::Stdout),
            timeout: Some(Duration::from_secs(120)),
            ..Config::default()
        })
        .expect("the guest starts");
        let bytes = std::fs::read(&file).expect("the console's file");
        let _ = std::fs::remove_file(&file);
        assert_eq!(
            outcome.ending,
            Ending::DebugExit(0x10),
            "{tier:?}: the guest's own end\n{}",
            outcome.registers.unwrap_or_default()
        );
        let stats = outcome.stats.expect("asked for");
        let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
        self.parse(&bytes, stats)
    }

    /// Runs the guest in every tier and checks that all agree, retired instructions included; what it left.
    ///
    /// # Panics
    /// When they do not.
    #[must_use]
    #[track_caller]
    pub fn run_in_all_tiers(&self) -> Ran {
        let first = self.run(TIERS[0]);
        for tier in &TIERS[1..] {
            self.run(*tier).expect_same(&first, &format!("{tier:?}"));
        }
        first
    }

    fn parse(&self, mut bytes: &[u8], stats: serde_json::Value) -> Ran {
        let mut take = |n: usize| {
            let (head, tail) = bytes.split_at(n);
            bytes = tail;
            head
        };
        let word = |b: &[u8], i: usize| u64::from_le_bytes(b[8 * i..8 * i + 8].try_into().expect("8 bytes"));
        let vars = take(64).to_vec();
        let log = take((word(&vars, 5) as u32 - LOG) as usize);
        let size = if self.bits == Bits::B64 { 23 * 8 } else { 14 * 4 };
        let mut log: Vec<Record> = log.chunks(size).map(|r| self.record(r)).collect();
        let last = log.pop().expect("the last record");
        assert_eq!(i32::from(last.vector), END, "{last:x?}");
        if last.error == FULL as u64 {
            let some: Vec<_> = log.iter().take(40).map(|r| (r.vector, r.rip)).collect();
            panic!("too many exceptions, among them {some:x?}\n{last:x?}");
        }
        let fx = take(512).to_vec();
        let memory = self.ranges.iter().map(|&(_, len)| take(len as usize).to_vec()).collect();
        let retired = stats["execution"]["guest_instructions"].as_u64().expect("a number");
        Ran { log, last, hash: word(&vars, 3), hashed: word(&vars, 4), fx, memory, retired, stats }
    }

    fn record(&self, r: &[u8]) -> Record {
        let mut record = Record::default();
        if self.bits == Bits::B64 {
            let w = |i: usize| u64::from_le_bytes(r[8 * i..8 * i + 8].try_into().expect("8 bytes"));
            for (i, reg) in [15, 14, 13, 12, 11, 10, 9, 8, 5, 7, 6, 3, 2, 1, 0].into_iter().enumerate() {
                record.gpr[reg] = w(i);
            }
            record.gpr[4] = w(20);
            (record.vector, record.error, record.rip) = (w(15) as u8, w(16), w(17));
            (record.cs, record.rflags, record.cr2) = (w(18), w(19), w(22));
        } else {
            let w = |i: usize| u64::from(u32::from_le_bytes(r[4 * i..4 * i + 4].try_into().expect("4 bytes")));
            for (i, reg) in [7, 6, 5, 4, 3, 2, 1, 0].into_iter().enumerate() {
                record.gpr[reg] = w(i);
            }
            record.gpr[4] = 0;
            (record.vector, record.error, record.rip) = (w(8) as u8, w(9), w(10));
            (record.cs, record.rflags, record.cr2) = (w(11), w(12), w(13));
        }
        record
    }

    fn put_header(&mut self) {
        const MAGIC: u32 = 0x1bad_b002;
        const ADDRESSES: u32 = 1 << 16;
        let sum = 0u32.wrapping_sub(MAGIC + ADDRESSES);
        self.put32(LOAD, &[MAGIC, ADDRESSES, sum, LOAD, LOAD, IMAGE_END, MAPPED, LOAD + HEADER]);
    }

    fn put_gdt(&mut self) {
        let code16 = 0x0000_9b00_0000_ffff | u64::from(CODE & 0xff_ffff) << 16;
        self.put64(GDT, &[0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff, code16]);
        // An available TSS, of which only IST1 is used.
        self.put64(GDT + 0x28, &[0x0000_8900_0000_0067 | u64::from(TSS & 0xff_ffff) << 16, 0]);
        self.put64(TSS + 36, &[HANDLER_STACK.into()]);
        let pointer = |limit: u16, base: u32| {
            let mut b = limit.to_le_bytes().to_vec();
            b.extend(u64::from(base).to_le_bytes());
            b
        };
        self.put(POINTERS, &pointer(0x37, GDT));
        self.put(POINTERS + 16, &pointer(0xfff, IDT));
        for vector in 0..256 {
            let at = STUBS + STUB * vector;
            if self.bits == Bits::B64 {
                let low = at & 0xffff | u32::from(CODE64_SEL) << 16;
                self.put32(IDT + 16 * vector, &[low, at & 0xffff_0000 | 0x8e01, 0, 0]);
            } else {
                let low = at & 0xffff | u32::from(CODE32_SEL) << 16;
                self.put32(IDT + 8 * vector, &[low, at & 0xffff_0000 | 0x8e00]);
            }
        }
    }

    fn put_tables(&mut self) {
        let rw = pte::P | pte::RW;
        if self.bits == Bits::B64 {
            for (i, next) in [(0, TABLES + 0x1000), (1, TABLES + 0x2000)] {
                self.put64(TABLES + 0x1000 * i, &[u64::from(next) | rw]);
            }
            self.put64(TABLES + 0x2000, &[u64::from(TABLES + 0x3000) | rw, u64::from(TABLES + 0x4000) | rw]);
        } else {
            self.put32(TABLES, &[(TABLES + 0x1000) | rw as u32]);
        }
        for page in (0..MAPPED).step_by(0x1000) {
            self.map(page, u64::from(page) | rw);
        }
    }

    fn put_start(&mut self) {
        let bits = self.bits;
        self.assemble_bits(LOAD + HEADER, Bits::B32, |a| {
            const OSFXSR_OSXMMEXCPT_OSXSAVE: i32 = 1 << 9 | 1 << 10 | 1 << 18;
            a.lgdt(ptr(POINTERS))?;
            a.lidt(ptr(POINTERS + 16))?;
            a.mov(eax, cr4)?;
            a.or(eax, OSFXSR_OSXMMEXCPT_OSXSAVE | if bits == Bits::B64 { 1 << 5 } else { 0 })?;
            a.mov(cr4, eax)?;
            // x87, SSE and AVX, as far as they are there.
            a.mov(eax, 0xd)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.and(eax, 7)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.xsetbv()?;
            a.mov(eax, TABLES as i32)?;
            a.mov(cr3, eax)?;
            if bits == Bits::B64 {
                // LME and NXE.
                a.mov(ecx, 0xc000_0080u32 as i32)?;
                a.xor(edx, edx)?;
                a.mov(eax, 0x900)?;
                a.wrmsr()?;
            }
            // PG, WP, NE, MP, PE.
            a.mov(eax, 0x8001_0033u32 as i32)?;
            a.mov(cr0, eax)?;
            let selector = if bits == Bits::B64 { CODE64_SEL } else { CODE32_SEL };
            let [b0, b1, b2, b3] = START.to_le_bytes();
            let [s0, s1] = selector.to_le_bytes();
            a.db(&[0xea, b0, b1, b2, b3, s0, s1])
        });
        let wide = if bits == Bits::B64 { Bits::B64 } else { Bits::B32 };
        self.assemble_bits(START, wide, |a| {
            a.mov(eax, i32::from(DATA_SEL))?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.mov(ss, eax)?;
            a.mov(fs, eax)?;
            a.mov(gs, eax)?;
            a.mov(esp, STACK as i32)?;
            if bits == Bits::B64 {
                a.mov(eax, i32::from(TSS_SEL))?;
                a.ltr(eax)?;
            }
            a.mov(dword_ptr(LOG_AT), LOG)?;
            a.fninit()?;
            for r in [eax, ecx, edx, ebx, ebp, esi, edi] {
                a.xor(r, r)?;
            }
            if bits == Bits::B64 {
                for r in [r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d] {
                    a.xor(r, r)?;
                }
            }
            if bits == Bits::B16 {
                let [s0, s1] = CODE16_SEL.to_le_bytes();
                return a.db(&[0xea, 0, 0, 0, 0, s0, s1]);
            }
            a.jmp(u64::from(CODE))
        });
    }

    fn put_handlers(&mut self) {
        let wide = if self.bits == Bits::B64 { Bits::B64 } else { Bits::B32 };
        for vector in 0..256u32 {
            self.assemble_bits(STUBS + STUB * vector, wide, |a| {
                if !matches!(vector, 8 | 10..=14 | 17 | 21) {
                    a.push(0)?;
                }
                a.push(vector as i32)?;
                a.jmp(u64::from(COMMON))
            });
        }
        if wide == Bits::B64 {
            self.assemble_bits(COMMON, wide, common64);
        } else {
            self.assemble_bits(COMMON, wide, common32);
        }
    }
}

fn common64(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let regs = [rax, rcx, rdx, rbx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
    for r in regs {
        a.push(r)?;
    }
    a.mov(rbp, rsp)?;
    a.cld()?;
    let (vector, rip) = (qword_ptr(rbp + 15 * 8), qword_ptr(rbp + 17 * 8));
    let (mut not_pf, mut not_db, mut hash, mut next) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let (mut more, mut resume, mut not_end, mut once) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let (mut out, mut no_eoi) = (a.create_label(), a.create_label());
    a.xor(edx, edx)?;
    a.cmp(vector, 14)?;
    a.jne(not_pf)?;
    a.mov(rdx, cr2)?;
    a.set_label(&mut not_pf)?;
    a.cmp(vector, 1)?;
    a.jne(not_db)?;
    a.mov(rdx, dr6)?;
    a.mov(eax, 0xffff_0ff0u32 as i32)?;
    a.mov(dr6, rax)?;
    a.set_label(&mut not_db)?;
    a.cmp(vector, END)?;
    a.je(next)?;
    a.cmp(dword_ptr(HASHING), 0)?;
    a.jne(hash)?;
    a.set_label(&mut next)?;
    a.mov(rdi, qword_ptr(LOG_AT))?;
    full(a, vector, qword_ptr(rbp + 16 * 8))?;
    a.mov(rsi, rbp)?;
    a.mov(ecx, 22)?;
    a.rep().movsq()?;
    a.mov(qword_ptr(rdi), rdx)?;
    a.add(rdi, 8)?;
    a.mov(qword_ptr(LOG_AT), rdi)?;
    a.jmp(resume)?;
    a.set_label(&mut hash)?;
    a.mov(rax, qword_ptr(HASH))?;
    a.mov(rsi, rbp)?;
    a.mov(ecx, 22)?;
    a.set_label(&mut more)?;
    a.rol(rax, 7)?;
    a.xor(rax, qword_ptr(rsi))?;
    a.add(rsi, 8)?;
    a.dec(ecx)?;
    a.jne(more)?;
    a.rol(rax, 7)?;
    a.xor(rax, rdx)?;
    a.mov(qword_ptr(HASH), rax)?;
    a.inc(qword_ptr(COUNT))?;
    a.set_label(&mut resume)?;
    a.cmp(vector, END)?;
    a.jne(not_end)?;
    finish(a, true)?;
    a.set_label(&mut not_end)?;
    a.cmp(dword_ptr(SKIP), 0)?;
    a.je(once)?;
    a.mov(rax, rip)?;
    a.and(rax, -16)?;
    a.add(rax, 16)?;
    a.mov(rip, rax)?;
    a.jmp(out)?;
    a.set_label(&mut once)?;
    a.mov(rax, qword_ptr(RESUME))?;
    a.test(rax, rax)?;
    a.je(out)?;
    a.mov(rip, rax)?;
    a.mov(qword_ptr(RESUME), 0)?;
    a.set_label(&mut out)?;
    // Vectors 0x40..0x4f are interrupts of the local APIC.
    a.mov(rax, vector)?;
    a.and(eax, !15)?;
    a.cmp(eax, 0x40)?;
    a.jne(no_eoi)?;
    a.mov(ecx, 0x80b)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.set_label(&mut no_eoi)?;
    a.nop()?;
    for r in regs.into_iter().rev() {
        a.pop(r)?;
    }
    a.add(rsp, 16)?;
    a.iretq()
}

fn common32(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushad()?;
    a.mov(ebp, esp)?;
    a.cld()?;
    let (vector, eip) = (dword_ptr(ebp + 8 * 4), dword_ptr(ebp + 10 * 4));
    let (mut not_pf, mut not_db, mut hash, mut next) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let (mut more, mut resume, mut not_end, mut once) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let mut out = a.create_label();
    a.xor(edx, edx)?;
    a.cmp(vector, 14)?;
    a.jne(not_pf)?;
    a.mov(edx, cr2)?;
    a.set_label(&mut not_pf)?;
    a.cmp(vector, 1)?;
    a.jne(not_db)?;
    a.mov(edx, dr6)?;
    a.mov(eax, 0xffff_0ff0u32 as i32)?;
    a.mov(dr6, eax)?;
    a.set_label(&mut not_db)?;
    a.cmp(vector, END)?;
    a.je(next)?;
    a.cmp(dword_ptr(HASHING), 0)?;
    a.jne(hash)?;
    a.set_label(&mut next)?;
    a.mov(edi, dword_ptr(LOG_AT))?;
    full(a, vector, dword_ptr(ebp + 9 * 4))?;
    a.mov(esi, ebp)?;
    a.mov(ecx, 13)?;
    a.rep().movsd()?;
    a.mov(dword_ptr(edi), edx)?;
    a.add(edi, 4)?;
    a.mov(dword_ptr(LOG_AT), edi)?;
    a.jmp(resume)?;
    a.set_label(&mut hash)?;
    a.mov(eax, dword_ptr(HASH))?;
    a.mov(esi, ebp)?;
    a.mov(ecx, 13)?;
    a.set_label(&mut more)?;
    a.rol(eax, 7)?;
    a.xor(eax, dword_ptr(esi))?;
    a.add(esi, 4)?;
    a.dec(ecx)?;
    a.jne(more)?;
    a.rol(eax, 7)?;
    a.xor(eax, edx)?;
    a.mov(dword_ptr(HASH), eax)?;
    a.inc(dword_ptr(COUNT))?;
    a.set_label(&mut resume)?;
    a.cmp(vector, END)?;
    a.jne(not_end)?;
    finish(a, false)?;
    a.set_label(&mut not_end)?;
    a.cmp(dword_ptr(SKIP), 0)?;
    a.je(once)?;
    a.mov(eax, eip)?;
    a.and(eax, -16)?;
    a.add(eax, 16)?;
    a.mov(eip, eax)?;
    a.jmp(out)?;
    a.set_label(&mut once)?;
    a.mov(eax, dword_ptr(RESUME))?;
    a.test(eax, eax)?;
    a.je(out)?;
    a.mov(eip, eax)?;
    a.mov(dword_ptr(RESUME), 0)?;
    a.set_label(&mut out)?;
    a.popad()?;
    a.add(esp, 8)?;
    a.iretd()
}

/// Makes a record the last when there is no more room for others; their place is in EDI.
fn full(a: &mut CodeAssembler, vector: AsmMemoryOperand, error: AsmMemoryOperand) -> Result<(), IcedError> {
    let mut room = a.create_label();
    a.cmp(edi, (LOG_END - 512) as i32)?;
    a.jb(room)?;
    a.mov(vector, END)?;
    a.mov(error, FULL)?;
    a.set_label(&mut room)?;
    a.nop()
}

/// Sends everything out and ends the machine.
fn finish(a: &mut CodeAssembler, wide: bool) -> Result<(), IcedError> {
    let (mut more, mut done) = (a.create_label(), a.create_label());
    a.fxsave(ptr(FX))?;
    a.mov(edx, 0xe9)?;
    a.mov(esi, VARS as i32)?;
    a.mov(ecx, 64)?;
    a.rep().outsb()?;
    a.mov(esi, LOG as i32)?;
    a.mov(ecx, dword_ptr(LOG_AT))?;
    a.sub(ecx, esi)?;
    a.rep().outsb()?;
    a.mov(esi, FX as i32)?;
    a.mov(ecx, 512)?;
    a.rep().outsb()?;
    a.mov(ebx, RANGES as i32)?;
    a.set_label(&mut more)?;
    if wide {
        a.mov(esi, dword_ptr(rbx))?;
        a.mov(ecx, dword_ptr(rbx + 4))?;
    } else {
        a.mov(esi, dword_ptr(ebx))?;
        a.mov(ecx, dword_ptr(ebx + 4))?;
    }
    a.test(ecx, ecx)?;
    a.je(done)?;
    a.rep().outsb()?;
    a.add(ebx, 8)?;
    a.jmp(more)?;
    a.set_label(&mut done)?;
    a.mov(eax, 0x10)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()
}

impl Ran {
    /// Checks that another run left the same.
    ///
    /// # Panics
    /// When it did not; the first difference is named.
    #[track_caller]
    pub fn expect_same(&self, other: &Ran, name: &str) {
        for (i, (a, b)) in self.log.iter().zip(&other.log).enumerate() {
            assert_eq!(a, b, "{name}: record {i} (left: {name})");
        }
        assert_eq!(self.log.len(), other.log.len(), "{name}: number of records");
        assert_eq!((self.hash, self.hashed), (other.hash, other.hashed), "{name}: exceptions");
        assert_eq!(self.last, other.last, "{name}: registers at the end");
        for (i, (a, b)) in self.memory.iter().zip(&other.memory).enumerate() {
            let at = a.iter().zip(b).position(|(x, y)| x != y);
            assert_eq!(at, None, "{name}: memory {i} differs at this offset");
        }
        let at = self.fx.iter().zip(&other.fx).position(|(x, y)| x != y);
        assert_eq!(at, None, "{name}: x87 or SSE state differs at this offset of the FXSAVE image");
        assert_eq!(self.retired, other.retired, "{name}: instructions retired");
    }

    /// A doubleword of dumped memory.
    #[must_use]
    pub fn dword(&self, range: usize, at: usize) -> u32 {
        u32::from_le_bytes(self.memory[range][at..at + 4].try_into().expect("4 bytes"))
    }
    /// A quadword of dumped memory.
    #[must_use]
    pub fn qword(&self, range: usize, at: usize) -> u64 {
        u64::from_le_bytes(self.memory[range][at..at + 8].try_into().expect("8 bytes"))
    }
}
