//! The native oracle: runs one user-mode instruction on the host CPU and in the evaluator, and compares everything.
//!
//! Used by the instruction tests of `frontend` and `backend` (which include this file by path, so that it depends on
//! `arch`, `ir`, `frontend` and `libc` alone). A [`Form`] is an instruction's bytes with what is special about it; [`check`]
//! runs it on many register values. Memory operands point into a scratch area that both sides see at the same address.
//! Invariant: one native run at a time ([`Native::lock`]); signals (#DE, #UD, #GP, #PF) of the tested instruction are
//! caught and compared too.
#![allow(unsafe_code)] // It jumps into bytes it has written, and the evaluator's file is a view of `CpuState`.
#![allow(dead_code)] // Each includer uses a part.

use std::sync::{Mutex, MutexGuard, OnceLock};

use twofold_arch::control::rflags;
use twofold_arch::cpuid::Features;
use twofold_arch::{CpuState, Loc, TbFlags, Vector};
use twofold_frontend::{Request, translate_block};
use twofold_ir::eval::{Abandon, Env, FILE_BASE, FILE_WORDS, File, Leave, Target};
use twofold_ir::{Block, Helper, MemFlags, RmwOp, Ty};

/// Linear address of the code page.
pub const CODE: u64 = 0x1000_0000;
/// Linear address of the scratch area; the pages before and after it are not mapped.
pub const SCRATCH: u64 = 0x1001_0000;
/// Its size.
pub const SCRATCH_LEN: usize = 0x4000;
/// Where pointer registers point by default: its middle.
pub const MIDDLE: u64 = SCRATCH + SCRATCH_LEN as u64 / 2;

/// The user-visible registers, as both sides take and give them.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Regs {
    /// An FXSAVE image.
    pub fx: [u8; 512],
    /// In encoding order.
    pub gpr: [u64; 16],
    /// RFLAGS: the six arithmetic flags and DF.
    pub flags: u64,
    /// 1 when a branch was taken (to [`TAKEN`] bytes after the instruction).
    pub taken: u64,
    /// The high halves of the vector registers; not on hosts without AVX.
    pub high: [u128; 16],
    /// What was raised: vector, error code and CR2 (of a page fault).
    pub raised: Option<Raised>,
}

/// An exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raised {
    /// Its vector.
    pub vector: u8,
    /// The error code of a page fault, else 0.
    pub error: u32,
    /// The address of a page fault, else 0.
    pub cr2: u64,
}

impl Raised {
    /// With what only page faults have dropped for others.
    #[must_use]
    pub fn new(vector: u8, error: u32, cr2: u64) -> Self {
        // Linux says "present" of all of its own half.
        let error = if cr2 >> 63 != 0 { error & !1 } else { error };
        if vector == 14 { Self { vector, error, cr2 } } else { Self { vector, error: 0, cr2: 0 } }
    }
}

/// What a run ended with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The instruction completed.
    Done,
    /// #DE.
    Divide,
    /// #UD.
    Undefined,
    /// #GP or #PF (a SIGSEGV natively).
    Protection,
    /// #SS or #AC (a SIGBUS natively).
    Bus,
    /// #XM or #MF: also SIGFPE natively, with #DE.
    Other,
}

/// Branch forms jump over this many bytes when taken: `jcc` and the like end in rel8 or rel32 = `TAKEN`.
pub const TAKEN: usize = 14;

impl Regs {
    /// All zero but the control words, which have their usual values.
    #[must_use]
    pub fn new() -> Self {
        let mut r = Self { fx: [0; 512], gpr: [0; 16], flags: 0, taken: 0, high: [0; 16], raised: None };
        r.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        r.set_mxcsr(0x1f80);
        r.gpr[4] = MIDDLE;
        r
    }
    /// MXCSR.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx[24], self.fx[25], self.fx[26], self.fx[27]])
    }
    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, v: u32) {
        self.fx[24..28].copy_from_slice(&v.to_le_bytes());
    }
    /// XMM register `n`.
    #[must_use]
    pub fn xmm(&self, n: usize) -> u128 {
        u128::from_le_bytes(self.fx[160 + 16 * n..176 + 16 * n].try_into().unwrap_or([0; 16]))
    }
    /// Sets XMM register `n`.
    pub fn set_xmm(&mut self, n: usize, v: u128) {
        self.fx[160 + 16 * n..176 + 16 * n].copy_from_slice(&v.to_le_bytes());
    }
    /// ST(`n`) (MMX: with TOP 0, MMn), 10 bytes.
    #[must_use]
    pub fn st(&self, n: usize) -> [u8; 10] {
        self.fx[32 + 16 * n..42 + 16 * n].try_into().unwrap_or([0; 10])
    }
    /// Sets ST(`n`) and marks nothing in the tag word.
    pub fn set_st(&mut self, n: usize, v: [u8; 10]) {
        self.fx[32 + 16 * n..42 + 16 * n].copy_from_slice(&v);
    }
    /// The status word.
    #[must_use]
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.fx[2], self.fx[3]])
    }
    /// Sets the control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.fx[0], self.fx[1]])
    }
    /// Sets the x87 control word.
    pub fn set_fcw(&mut self, v: u16) {
        self.fx[0..2].copy_from_slice(&v.to_le_bytes());
    }
    /// Sets the status word.
    pub fn set_fsw(&mut self, v: u16) {
        self.fx[2..4].copy_from_slice(&v.to_le_bytes());
    }
    /// Sets the abridged tag word.
    pub fn set_ftw(&mut self, v: u8) {
        self.fx[4] = v;
    }

    /// Puts the registers into a guest state.
    pub fn to_state(&self, s: &mut CpuState) {
        s.gpr = self.gpr;
        s.set_rflags(self.flags & (rflags::ARITH | rflags::DF) | rflags::IF);
        s.mxcsr = self.mxcsr();
        let word = |at: usize| u16::from_le_bytes([self.fx[at], self.fx[at + 1]]);
        (s.fcw, s.fsw, s.ftw, s.fop) = (word(0), word(2), word(4) & 0xff, word(6) & 0x7ff);
        s.fip = u64::from_le_bytes(self.fx[8..16].try_into().unwrap_or([0; 8]));
        s.fdp = u64::from_le_bytes(self.fx[16..24].try_into().unwrap_or([0; 8]));
        let top = usize::from(s.fsw >> 11 & 7);
        for i in 0..8 {
            let mut b = [0u8; 16];
            b[..10].copy_from_slice(&self.st(i));
            let v = u128::from_le_bytes(b);
            s.fpr[(top + i) & 7] = [v as u64, (v >> 64) as u64];
        }
        for i in 0..16 {
            let v = self.xmm(i);
            let high = self.high[i];
            s.vec[i] = [v as u64, (v >> 64) as u64, high as u64, (high >> 64) as u64];
        }
    }

    /// Takes the registers from a guest state.
    pub fn take_state(&mut self, s: &CpuState) {
        self.gpr = s.gpr;
        self.flags = s.rflags() & (rflags::ARITH | rflags::DF);
        self.set_mxcsr(s.mxcsr);
        self.set_fcw(s.fcw);
        self.set_fsw(s.fsw);
        self.set_ftw(s.ftw as u8);
        self.fx[6..8].copy_from_slice(&s.fop.to_le_bytes());
        self.fx[8..16].copy_from_slice(&s.fip.to_le_bytes());
        self.fx[16..24].copy_from_slice(&s.fdp.to_le_bytes());
        let top = usize::from(s.fsw >> 11 & 7);
        for i in 0..8 {
            let [lo, hi] = s.fpr[(top + i) & 7];
            let v = (u128::from(lo) | u128::from(hi) << 64).to_le_bytes();
            self.set_st(i, v[..10].try_into().unwrap_or([0; 10]));
        }
        for i in 0..16 {
            let [a, b, c, d] = s.vec[i].map(u128::from);
            self.set_xmm(i, a | b << 64);
            self.high[i] = c | d << 64;
        }
    }
}

impl Default for Regs {
    fn default() -> Self {
        Self::new()
    }
}

// ---- the host side ---------------------------------------------------------------------------------------------------

/// What the trampoline and the signal handler share; the lock guards it.
#[repr(C)]
struct Shared {
    host_rsp: u64,
    regs: *mut Regs,
    temp: u64,
    /// 1 while guest code runs natively.
    running: u64,
    signal: u64,
    code: u64,
    flat_ss: u64,
    ss: u64,
    ds: u64,
    /// 0: the host has no AVX; 1: it has; 2: and all high halves are 0.
    avx: u64,
    trap: u64,
    error: u64,
    cr2: u64,
}

static mut SHARED: Shared = Shared {
    host_rsp: 0,
    regs: core::ptr::null_mut(),
    temp: 0,
    running: 0,
    signal: 0,
    code: 0,
    flat_ss: FLAT,
    ss: FLAT,
    ds: FLAT,
    avx: 0,
    trap: 0,
    error: 0,
    cr2: 0,
};

/// Linux's flat user data segment, its 32-bit and 64-bit code segments.
const FLAT: u64 = 0x2b;
const CODE32: u16 = 0x23;
const CODE64: u16 = 0x33;
/// Our 16-bit code and data segments in the LDT.
const LDT_CODE: u16 = 0x07;
const LDT_DATA: u16 = 0x0f;
/// Limit of the 16-bit data segment: the scratch area.
const LIMIT16: u32 = SCRATCH_LEN as u32 - 1;

/// The code size a form runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit code.
    Bits64,
    /// 32-bit code with flat segments.
    Bits32,
    /// 16-bit protected-mode code: CS is based at the code page, DS, ES and SS at the scratch area with its size for limit.
    Bits16,
}

impl Mode {
    /// Where pointer registers point by default.
    #[must_use]
    pub fn middle(self) -> u64 {
        if self == Mode::Bits16 { SCRATCH_LEN as u64 / 2 } else { MIDDLE }
    }
    /// RIP of the instruction.
    #[must_use]
    pub fn rip(self) -> u64 {
        if self == Mode::Bits16 { 0 } else { CODE }
    }
    /// The key it is translated under.
    #[must_use]
    pub fn key(self) -> TbFlags {
        let user = 3 << TbFlags::CPL_SHIFT | TbFlags::PROTECTED | TbFlags::LONG;
        let flat = 0xf << TbFlags::NOLIMIT_SHIFT | 0xf << TbFlags::ZERO_BASE_SHIFT | TbFlags::SS32;
        TbFlags(match self {
            Mode::Bits64 => user | 2,
            Mode::Bits32 => user | 1 | flat,
            Mode::Bits16 => user,
        })
    }
}

/// Loads all registers from `regs` and jumps to `SHARED.code`.
///
/// # Safety
/// `SHARED.code` must end in a jump to `come_back`, and the signals be handled.
#[unsafe(naked)]
unsafe extern "C" fn run_native(regs: *mut Regs) {
    core::arch::naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "sub rsp, 8",
        "mov [rip + {s}], rsp",
        "mov [rip + {s} + 8], rdi",
        "fxrstor64 [rdi]",
        "cmp qword ptr [rip + {s} + 72], 1",
        "jb 2f",
        // All 0: the host has to know that the component is unused.
        "vzeroupper",
        "ja 2f",
        "vinsertf128 ymm0, ymm0, [rdi + 656], 1",
        "vinsertf128 ymm1, ymm1, [rdi + 672], 1",
        "vinsertf128 ymm2, ymm2, [rdi + 688], 1",
        "vinsertf128 ymm3, ymm3, [rdi + 704], 1",
        "vinsertf128 ymm4, ymm4, [rdi + 720], 1",
        "vinsertf128 ymm5, ymm5, [rdi + 736], 1",
        "vinsertf128 ymm6, ymm6, [rdi + 752], 1",
        "vinsertf128 ymm7, ymm7, [rdi + 768], 1",
        "vinsertf128 ymm8, ymm8, [rdi + 784], 1",
        "vinsertf128 ymm9, ymm9, [rdi + 800], 1",
        "vinsertf128 ymm10, ymm10, [rdi + 816], 1",
        "vinsertf128 ymm11, ymm11, [rdi + 832], 1",
        "vinsertf128 ymm12, ymm12, [rdi + 848], 1",
        "vinsertf128 ymm13, ymm13, [rdi + 864], 1",
        "vinsertf128 ymm14, ymm14, [rdi + 880], 1",
        "vinsertf128 ymm15, ymm15, [rdi + 896], 1",
        "2:",
        "push qword ptr [rdi + 640]",
        "popfq",
        "mov qword ptr [rip + {s} + 24], 1",
        "mov ds, [rip + {s} + 64]",
        "mov es, [rip + {s} + 64]",
        "mov ss, [rip + {s} + 56]",
        "mov rax, [rdi + 512]", "mov rcx, [rdi + 520]", "mov rdx, [rdi + 528]", "mov rbx, [rdi + 536]",
        "mov rsp, [rdi + 544]", "mov rbp, [rdi + 552]", "mov rsi, [rdi + 560]",
        "mov r8, [rdi + 576]", "mov r9, [rdi + 584]", "mov r10, [rdi + 592]", "mov r11, [rdi + 600]",
        "mov r12, [rdi + 608]", "mov r13, [rdi + 616]", "mov r14, [rdi + 624]", "mov r15, [rdi + 632]",
        "mov rdi, [rdi + 568]",
        "jmp qword ptr [rip + {s} + 40]",
        s = sym SHARED,
    )
}

/// Where generated code, and the signal handler, go back to.
#[unsafe(naked)]
unsafe extern "C" fn come_back() {
    core::arch::naked_asm!(
        "mov ss, [rip + {s} + 48]",
        "mov [rip + {s} + 16], rax",
        "mov rax, [rip + {s} + 8]",
        "mov [rax + 520], rcx", "mov [rax + 528], rdx", "mov [rax + 536], rbx", "mov [rax + 544], rsp",
        "mov [rax + 552], rbp", "mov [rax + 560], rsi", "mov [rax + 568], rdi", "mov [rax + 576], r8",
        "mov [rax + 584], r9", "mov [rax + 592], r10", "mov [rax + 600], r11", "mov [rax + 608], r12",
        "mov [rax + 616], r13", "mov [rax + 624], r14", "mov [rax + 632], r15",
        "mov rcx, [rip + {s} + 16]",
        "mov [rax + 512], rcx",
        "mov rsp, [rip + {s}]",
        "mov qword ptr [rip + {s} + 24], 0",
        "pushfq",
        "pop qword ptr [rax + 640]",
        "cld",
        "fxsave64 [rax]",
        "cmp qword ptr [rip + {s} + 72], 0",
        "je 2f",
        "vextractf128 [rax + 656], ymm0, 1",
        "vextractf128 [rax + 672], ymm1, 1",
        "vextractf128 [rax + 688], ymm2, 1",
        "vextractf128 [rax + 704], ymm3, 1",
        "vextractf128 [rax + 720], ymm4, 1",
        "vextractf128 [rax + 736], ymm5, 1",
        "vextractf128 [rax + 752], ymm6, 1",
        "vextractf128 [rax + 768], ymm7, 1",
        "vextractf128 [rax + 784], ymm8, 1",
        "vextractf128 [rax + 800], ymm9, 1",
        "vextractf128 [rax + 816], ymm10, 1",
        "vextractf128 [rax + 832], ymm11, 1",
        "vextractf128 [rax + 848], ymm12, 1",
        "vextractf128 [rax + 864], ymm13, 1",
        "vextractf128 [rax + 880], ymm14, 1",
        "vextractf128 [rax + 896], ymm15, 1",
        "vzeroupper",
        "2:",
        "fninit",
        "push 0x1f80",
        "ldmxcsr [rsp]",
        "add rsp, 16",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        s = sym SHARED,
    )
}

extern "C" fn on_signal(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid ucontext; only the thread with the lock sets `running`.
    unsafe {
        let shared = &raw mut SHARED;
        if (*shared).running == 0 {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        (*shared).signal = signal as u64;
        let uc = context.cast::<libc::ucontext_t>();
        let gregs = &mut (*uc).uc_mcontext.gregs;
        (*shared).trap = gregs[libc::REG_TRAPNO as usize] as u64;
        (*shared).error = gregs[libc::REG_ERR as usize] as u64;
        (*shared).cr2 = gregs[libc::REG_CR2 as usize] as u64;
        gregs[libc::REG_RIP as usize] = come_back as *const () as i64;
        // CS, GS, FS, SS, 16 bits each.
        let segments = gregs[libc::REG_CSGSFS as usize] as u64;
        gregs[libc::REG_CSGSFS as usize] = (segments & 0x0000_ffff_ffff_0000 | u64::from(CODE64) | FLAT << 48) as i64;
    }
}

/// The host side: code page and scratch area.
pub struct Native {
    mode: Mode,
}

static NATIVE: OnceLock<Mutex<Native>> = OnceLock::new();

impl Native {
    /// The one instance, for as long as the guard lives.
    ///
    /// # Panics
    /// When the memory cannot be mapped.
    pub fn lock() -> MutexGuard<'static, Native> {
        let m = NATIVE.get_or_init(|| {
            map(CODE, 0x1000);
            map(SCRATCH, SCRATCH_LEN);
            ldt(0, CODE, 0xffff, 2);
            ldt(1, SCRATCH, LIMIT16, 0);
            Mutex::new(Native { mode: Mode::Bits64 })
        });
        let guard = m.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        signals();
        guard
    }

    /// Places an instruction: a fall-through and, [`TAKEN`] bytes further, a taken path go back.
    pub fn set_code(&mut self, insn: &[u8], mode: Mode) {
        let mut code = vec![0x90u8; 0x300];
        code[..insn.len()].copy_from_slice(insn);
        let (done, taken) = (0x200usize, 0x240usize);
        // SAFETY: only addresses are taken.
        let (mark, temp) = unsafe { (&raw mut SHARED.signal as u64, &raw mut SHARED.temp as u64) };
        let mut put = |at: usize, parts: &[&[u8]]| {
            let bytes = parts.concat();
            code[at..at + bytes.len()].copy_from_slice(&bytes);
        };
        let back = (come_back as *const () as u64).to_le_bytes();
        let jump_back: &[&[u8]] = &[&[0xff, 0x25, 0, 0, 0, 0], &back];
        put(done, jump_back);
        // The mark goes through RAX, kept in SHARED.temp meanwhile; flags stay.
        put(taken, &[&[0x48, 0xa3], &temp.to_le_bytes(), &[0x48, 0xb8], &0x100u64.to_le_bytes()]);
        put(taken + 20, &[&[0x48, 0xa3], &mark.to_le_bytes(), &[0x48, 0xa1], &temp.to_le_bytes()]);
        put(taken + 40, jump_back);
        for (at, to) in [(insn.len(), done), (insn.len() + TAKEN, taken)] {
            let far = [(CODE as u32 + to as u32).to_le_bytes().as_slice(), &CODE64.to_le_bytes()].concat();
            match mode {
                Mode::Bits64 => put(at, &[&[0xe9], &((to - at - 5) as u32).to_le_bytes()]),
                Mode::Bits32 => put(at, &[&[0xea], &far]),
                Mode::Bits16 => put(at, &[&[0x66, 0xea], &far]),
            }
        }
        // The way in from 64-bit code: JMP m16:32.
        let selector = if mode == Mode::Bits32 { CODE32 } else { LDT_CODE };
        put(0x100, &[&[0xff, 0x2d, 0, 0, 0, 0], &(mode.rip() as u32).to_le_bytes(), &selector.to_le_bytes()]);
        // SAFETY: the code page is ours, 4096 bytes, mapped for the life of the program; the lock is held.
        unsafe {
            libc::mprotect(CODE as *mut _, 0x1000, libc::PROT_READ | libc::PROT_WRITE);
            core::ptr::copy_nonoverlapping(code.as_ptr(), CODE as *mut u8, code.len());
            libc::mprotect(CODE as *mut _, 0x1000, libc::PROT_READ | libc::PROT_EXEC);
            let shared = &raw mut SHARED;
            (*shared).code = if mode == Mode::Bits64 { CODE } else { CODE + 0x100 };
            let data = if mode == Mode::Bits16 { u64::from(LDT_DATA) } else { FLAT };
            ((*shared).ss, (*shared).ds) = (data, data);
        }
        self.mode = mode;
    }

    /// The code page, which the instruction may read.
    pub fn code_page(&self) -> [u8; 0x1000] {
        // SAFETY: it is mapped for the life of the program, and only `set_code` writes it, with the lock that `self` stands for.
        unsafe { (CODE as *const [u8; 0x1000]).read() }
    }

    /// Runs it on `regs` and the scratch memory `mem`, both updated.
    pub fn run(&mut self, regs: &mut Regs, mem: &mut [u8]) -> Outcome {
        assert_eq!(mem.len(), SCRATCH_LEN);
        regs.flags = regs.flags & (rflags::ARITH | rflags::DF) | rflags::FIXED1 | rflags::IF;
        // SAFETY: the scratch area is ours; the code page holds an instruction and ways back; the lock is held.
        let signal = unsafe {
            core::ptr::copy_nonoverlapping(mem.as_ptr(), SCRATCH as *mut u8, SCRATCH_LEN);
            let shared = &raw mut SHARED;
            (*shared).signal = 0;
            let avx = std::arch::is_x86_feature_detected!("avx");
            (*shared).avx = u64::from(avx) << u32::from(regs.high == [0; 16]);
            run_native(regs);
            let fault = Raised::new((*shared).trap as u8, (*shared).error as u32, (*shared).cr2);
            regs.raised = (!matches!((*shared).signal, 0 | 0x100)).then_some(fault);
            core::ptr::copy_nonoverlapping(SCRATCH as *const u8, mem.as_mut_ptr(), SCRATCH_LEN);
            (*shared).signal
        };
        regs.flags &= rflags::ARITH | rflags::DF;
        regs.taken = u64::from(signal == 0x100);
        match signal as i32 {
            0 | 0x100 => Outcome::Done,
            libc::SIGFPE => Outcome::Divide,
            libc::SIGILL => Outcome::Undefined,
            libc::SIGSEGV => Outcome::Protection,
            libc::SIGBUS => Outcome::Bus,
            _ => Outcome::Other,
        }
    }
}

fn map(at: u64, len: usize) {
    // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping.
    let p = unsafe {
        libc::mmap(
            at as *mut _,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as u64, at, "the test's fixed addresses are taken");
}

/// Sets an entry of the LDT: a 16-bit segment; contents 0 data, 2 code.
fn ldt(entry: u32, base: u64, limit: u32, contents: u32) {
    #[repr(C)]
    struct UserDesc {
        entry: u32,
        base: u32,
        limit: u32,
        bits: u32,
    }
    // Bits: seg_32bit 0, contents 1..3, read_exec_only 3, limit_in_pages 4, seg_not_present 5, useable 6.
    let desc = UserDesc { entry, base: base as u32, limit, bits: contents << 1 | 1 << 6 };
    // SAFETY: the kernel reads the structure; where it refuses, 16-bit forms fail to run.
    unsafe { libc::syscall(libc::SYS_modify_ldt, 1, &raw const desc, size_of::<UserDesc>()) };
}

/// Handlers and this thread's signal stack.
fn signals() {
    // SAFETY: plain libc calls on memory that lives forever.
    unsafe {
        let stack = libc::mmap(
            core::ptr::null_mut(),
            0x10000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let ss = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: 0x10000 };
        libc::sigaltstack(&ss, core::ptr::null_mut());
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGTRAP] {
            libc::sigaction(signal, &action, core::ptr::null_mut());
        }
    }
}

// ---- the evaluator's side ---------------------------------------------------------------------------------------------

/// Extra helpers of a test: `None` means "not mine".
pub type Helpers = fn(&mut TestEnv, Helper, [u64; 4]) -> Option<Result<u64, Abandon>>;

/// An [`Env`] over a `CpuState` and a flat memory; helpers are the simple ones of [`helper`].
pub struct TestEnv {
    /// The guest state.
    pub state: Box<CpuState>,
    /// Guest memory from linear address `base`.
    pub mem: Vec<u8>,
    /// Its first address.
    pub base: u64,
    /// Whether CS is flat.
    pub flat: bool,
    /// Extra helpers: asked first; `None` means "not mine".
    pub helpers: Helpers,
}

impl TestEnv {
    /// A state of zeroes and memory at `base`.
    #[must_use]
    pub fn new(base: u64, mem: Vec<u8>) -> Self {
        Self { state: CpuState::zeroed(), mem, base, flat: true, helpers: |_, _, _| None }
    }
    /// Records an exception, as a helper does.
    pub fn fault(&mut self, vector: Vector) -> Abandon {
        self.state.fault.pending = 1;
        self.state.fault.vector = vector as u32;
        Abandon
    }
    fn at(&mut self, flags: MemFlags, addr: u64, bytes: usize) -> Result<usize, Abandon> {
        let bytes = flags.checked_bytes(bytes as u32) as usize;
        if flags.has(MemFlags::ALIGNED) && !addr.is_multiple_of(bytes as u64) {
            return Err(self.fault(Vector::GeneralProtection));
        }
        if (addr as i64) << 16 >> 16 != addr as i64 {
            let stack = flags.has(MemFlags::STACK);
            return Err(self.fault(if stack { Vector::StackFault } else { Vector::GeneralProtection }));
        }
        let at = addr.wrapping_sub(self.base) as usize;
        match at.checked_add(bytes) {
            Some(end) if end <= self.mem.len() => Ok(at),
            _ => {
                let end = self.base + self.mem.len() as u64;
                // The first byte that is not there.
                self.state.fault.cr2 = if (self.base..end).contains(&addr) { end } else { addr };
                self.state.fault.has_error = 1;
                self.state.fault.error = 4 | if flags.has(MemFlags::WRITE_INTENT) { 2 } else { 0 };
                Err(self.fault(Vector::PageFault))
            }
        }
    }
    /// Whether a byte can be written.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn writable(&mut self, addr: u64) -> Result<(), Abandon> {
        self.at(MemFlags::WRITE_INTENT, addr, 1).map(drop)
    }
    /// Reads memory.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn read(&mut self, addr: u64, bytes: usize) -> Result<u64, Abandon> {
        let at = self.at(MemFlags::NONE, addr, bytes)?;
        let mut b = [0; 8];
        b[..bytes].copy_from_slice(&self.mem[at..at + bytes]);
        Ok(u64::from_le_bytes(b))
    }
    /// Writes memory.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn write(&mut self, addr: u64, bytes: usize, v: u64) -> Result<(), Abandon> {
        let at = self.at(MemFlags::WRITE_INTENT, addr, bytes)?;
        self.mem[at..at + bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
        Ok(())
    }
    fn field(&mut self, loc: Loc, bytes: u32) -> *mut u8 {
        assert!(usize::from(loc.0) + bytes as usize <= size_of::<CpuState>());
        // SAFETY: inside the state, as asserted.
        unsafe { (&raw mut *self.state).cast::<u8>().add(usize::from(loc.0)) }
    }
}

impl Env for TestEnv {
    fn file(&mut self) -> &mut File {
        let p = self.field(Loc(FILE_BASE), FILE_WORDS as u32 * 8);
        // SAFETY: FILE_WORDS words of the state are plain integers (the evaluator's interface asserts the range).
        unsafe { &mut *p.cast::<File>() }
    }
    fn get(&mut self, ty: Ty, loc: Loc) -> u64 {
        let p = self.field(loc, ty.bytes());
        let mut b = [0u8; 8];
        // SAFETY: `field` has checked the range.
        unsafe { core::ptr::copy_nonoverlapping(p, b.as_mut_ptr(), ty.bytes().min(8) as usize) };
        u64::from_le_bytes(b)
    }
    fn put(&mut self, ty: Ty, loc: Loc, v: u64) {
        let p = self.field(loc, ty.bytes());
        // SAFETY: `field` has checked the range.
        unsafe { core::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, ty.bytes().min(8) as usize) };
    }
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon> {
        self.at(flags, addr, ty.bytes() as usize)?;
        self.read(addr, ty.bytes() as usize)
    }
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon> {
        let at = self.at(flags, addr, 16)?;
        Ok(u128::from_le_bytes(self.mem[at..at + 16].try_into().unwrap_or([0; 16])))
    }
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        self.at(flags.or(MemFlags::WRITE_INTENT), addr, ty.bytes() as usize)?;
        self.write(addr, ty.bytes() as usize, v)
    }
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon> {
        let at = self.at(flags.or(MemFlags::WRITE_INTENT), addr, 16)?;
        self.mem[at..at + 16].copy_from_slice(&v.to_le_bytes());
        Ok(())
    }
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon> {
        let n = ty.bytes() as usize;
        self.at(MemFlags::WRITE_INTENT, addr, n)?;
        let old = self.read(addr, n)?;
        let new = match op {
            RmwOp::Add => old.wrapping_add(v),
            RmwOp::Sub => old.wrapping_sub(v),
            RmwOp::And => old & v,
            RmwOp::Or => old | v,
            RmwOp::Xor => old ^ v,
            RmwOp::Xchg => v,
        };
        self.write(addr, n, new)?;
        Ok(old)
    }
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon> {
        let n = ty.bytes() as usize;
        self.at(MemFlags::WRITE_INTENT, addr, n)?;
        let old = self.read(addr, n)?;
        if old == expected & ty.mask() {
            self.write(addr, n, new)?;
        }
        Ok(old)
    }
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon> {
        if let Some(r) = (self.helpers)(self, helper, args) {
            return r;
        }
        helper_model(self, helper, args)
    }
}

/// Simple models of the helpers that user-mode integer instructions call, so that the front end can be tested by itself.
fn helper_model(env: &mut TestEnv, helper: Helper, a: [u64; 4]) -> Result<u64, Abandon> {
    match helper {
        Helper::DivideWide => {
            let n = u128::from(a[1]) << 64 | u128::from(a[0]);
            Ok(if a[1] < a[2] { (n / u128::from(a[2])) as u64 } else { a[0] })
        }
        Helper::RotateCarry => Ok(rotate_carry(env, a[0], a[1], a[2])),
        Helper::Crc32 => Ok(crc32(a[0] as u32, a[1], 1 << a[2])),
        Helper::Pdep => Ok(pdep(a[0], a[1])),
        Helper::Pext => Ok(pext(a[0], a[1])),
        Helper::Cmpxchg8b | Helper::Cmpxchg16b => cmpxchg_wide(env, a[0], helper == Helper::Cmpxchg16b),
        Helper::StringOp => string(env, a[0]),
        Helper::Popf => {
            let keep = env.state.rflags() & !(rflags::ARITH | rflags::DF);
            env.state.set_rflags(keep | a[0] & (rflags::ARITH | rflags::DF));
            Ok(0)
        }
        Helper::Enter => enter(env, a[0], a[1], 1 << a[2]),
        Helper::Pause | Helper::AlignCheck => Ok(0),
        Helper::Bcd => bcd(env, a[0], a[1]),
        Helper::SegAddr => {
            let seg = env.state.seg[a[0] as usize & 7];
            let bytes = a[2] & 0xff;
            if a[1] + bytes - 1 > u64::from(seg.limit) {
                return Err(env.fault(if a[0] == 2 { Vector::StackFault } else { Vector::GeneralProtection }));
            }
            Ok(seg.base + a[1])
        }
        Helper::CheckTarget if a[0] > u64::from(env.state.seg[1].limit) && !env.flat => {
            Err(env.fault(Vector::GeneralProtection))
        }
        Helper::CheckTarget => Ok(a[0]),
        _ => panic!("no model of {helper:?}"),
    }
}

fn rotate_carry(env: &mut TestEnv, value: u64, count: u64, how: u64) -> u64 {
    let bits = 8u32 << (how & 3);
    let right = how >> 8 != 0;
    let mask = u64::MAX >> (64 - bits);
    let mut v = value & mask;
    let f = env.state.rflags();
    let mut cf = f & 1;
    if count == 0 {
        return v;
    }
    for _ in 0..count {
        if right {
            let out = v & 1;
            v = v >> 1 | cf << (bits - 1);
            cf = out;
        } else {
            let out = v >> (bits - 1) & 1;
            v = (v << 1 | cf) & mask;
            cf = out;
        }
    }
    let top = v >> (bits - 1) & 1;
    let of = if right { top ^ (v >> (bits - 2) & 1) } else { top ^ cf };
    env.state.set_rflags(f & !(rflags::CF | rflags::OF) | cf | of << 11);
    v
}

fn crc32(mut crc: u32, v: u64, bytes: u32) -> u64 {
    for i in 0..bytes {
        crc ^= (v >> (8 * i)) as u32 & 0xff;
        for _ in 0..8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    u64::from(crc)
}

fn pdep(v: u64, mask: u64) -> u64 {
    let (mut out, mut n) = (0, 0);
    for i in 0..64 {
        if mask >> i & 1 != 0 {
            out |= (v >> n & 1) << i;
            n += 1;
        }
    }
    out
}

fn pext(v: u64, mask: u64) -> u64 {
    let (mut out, mut n) = (0, 0);
    for i in 0..64 {
        if mask >> i & 1 != 0 {
            out |= (v >> i & 1) << n;
            n += 1;
        }
    }
    out
}

fn cmpxchg_wide(env: &mut TestEnv, addr: u64, wide: bool) -> Result<u64, Abandon> {
    let n = if wide { 8 } else { 4 };
    if wide && !addr.is_multiple_of(16) {
        return Err(env.fault(Vector::GeneralProtection));
    }
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    let (lo, hi) = (env.read(addr, n)?, env.read(addr + n as u64, n)?);
    let g = env.state.gpr;
    let f = env.state.rflags();
    if lo == g[0] & mask && hi == g[2] & mask {
        env.write(addr, n, g[3])?;
        env.write(addr + n as u64, n, g[1])?;
        env.state.set_rflags(f | rflags::ZF);
    } else {
        env.state.gpr[0] = lo;
        env.state.gpr[2] = hi;
        env.state.set_rflags(f & !rflags::ZF);
    }
    Ok(0)
}

fn enter(env: &mut TestEnv, frame: u64, level: u64, bytes: u64) -> Result<u64, Abandon> {
    // The stack is 16 bits wide exactly when it is not flat.
    let (base, mask) = if env.flat { (0, u64::MAX) } else { (env.state.seg[2].base, 0xffff) };
    let (old_sp, old_bp) = (env.state.gpr[4], env.state.gpr[5]);
    let n = bytes as usize;
    let mut sp = old_sp.wrapping_sub(bytes) & mask;
    let mut bp = old_bp;
    env.write(base + sp, n, old_bp)?;
    let top = sp;
    for i in 0..level & 31 {
        let v = if i + 1 == level & 31 {
            top
        } else {
            bp = bp.wrapping_sub(bytes) & mask;
            env.read(base + bp, n)?
        };
        sp = sp.wrapping_sub(bytes) & mask;
        env.write(base + sp, n, v)?;
    }
    env.state.gpr[4] = old_sp & !mask | sp.wrapping_sub(frame) & mask;
    env.state.gpr[5] = if bytes == 2 { old_bp & !0xffff | top & 0xffff } else { old_bp & !mask & !0xffff_ffff | top };
    Ok(0)
}

fn string(env: &mut TestEnv, word: u64) -> Result<u64, Abandon> {
    use twofold_arch::string_op::{Repeat, StringKind, StringOp};
    let op = StringOp::unpack(word);
    let n = 1usize << op.log2_bytes;
    let am = if op.log2_addr == 3 { u64::MAX } else { (1 << (8 << op.log2_addr)) - 1 };
    let step = if env.state.rflags_sys & rflags::DF != 0 { (n as u64).wrapping_neg() } else { n as u64 };
    let wrap = |old: u64, new: u64| if op.log2_addr == 1 { old & !0xffff | new & am } else { new & am };
    let base = |env: &TestEnv, seg: u8| if env.flat { 0 } else { env.state.seg[usize::from(seg)].base };
    while env.state.gpr[1] & am != 0 {
        let (from, to) = (env.state.gpr[6] & am, env.state.gpr[7] & am);
        let (si, di) = (from + base(env, op.segment), to + base(env, 0));
        let mut stop = false;
        match op.kind {
            StringKind::Movs => {
                let v = env.read(si, n)?;
                env.write(di, n, v)?;
            }
            StringKind::Stos => {
                let v = env.state.gpr[0];
                env.write(di, n, v)?;
            }
            StringKind::Lods => {
                let v = env.read(si, n)?;
                let rax = &mut env.state.gpr[0];
                *rax = if n >= 4 { v } else { *rax & !((1 << (8 * n)) - 1) | v };
            }
            _ => {
                let a = if op.kind == StringKind::Cmps { env.read(si, n)? } else { env.state.gpr[0] };
                let b = env.read(di, n)?;
                let cc = twofold_arch::CcOp::new(twofold_arch::CcKind::Sub, op.log2_bytes);
                env.state.cc_op = u32::from(cc.0);
                env.state.cc_dst = a.wrapping_sub(b);
                env.state.cc_src = b;
                let equal = env.state.rflags() & rflags::ZF != 0;
                stop = equal == (op.repeat == Repeat::Repne);
            }
        }
        let g = &mut env.state.gpr;
        if !matches!(op.kind, StringKind::Stos | StringKind::Scas) {
            g[6] = wrap(g[6], from.wrapping_add(step));
        }
        if op.kind != StringKind::Lods {
            g[7] = wrap(g[7], to.wrapping_add(step));
        }
        g[1] = wrap(g[1], (g[1] & am).wrapping_sub(1));
        if stop {
            break;
        }
    }
    Ok(0)
}

fn bcd(env: &mut TestEnv, kind: u64, imm: u64) -> Result<u64, Abandon> {
    use rflags::{AF, CF, PF, SF, ZF};
    let f = env.state.rflags();
    let ax = env.state.gpr[0] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let (mut cf, mut af) = (f & CF != 0, f & AF != 0);
    let low = al & 15 > 9 || af;
    let new = match kind {
        0 | 1 => {
            let high = al > 0x99 || cf;
            let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
            cf = high || kind == 1 && low && al < 6;
            af = low;
            u16::from(if kind == 0 { al.wrapping_add(by) } else { al.wrapping_sub(by) }) | ax & 0xff00
        }
        2 | 3 => {
            (cf, af) = (low, low);
            let by = if low { 0x106 } else { 0 };
            // AAS subtracts 6 from AX, then 1 from AH.
            (if kind == 2 { ax.wrapping_add(by) } else { ax.wrapping_sub(by) }) & 0xff0f
        }
        4 if imm as u8 == 0 => return Err(env.fault(Vector::DivideError)),
        4 => u16::from(al / imm as u8) << 8 | u16::from(al % imm as u8),
        _ => u16::from(al.wrapping_add(ah.wrapping_mul(imm as u8))),
    };
    let low = new as u8;
    let bit = |on: bool, b: u64| if on { b } else { 0 };
    let image = bit(cf, CF)
        | bit(af, AF)
        | bit(low == 0, ZF)
        | bit(low > 127, SF)
        | bit(low.count_ones().is_multiple_of(2), PF);
    env.state.gpr[0] = env.state.gpr[0] & !0xffff | u64::from(new);
    env.state.set_rflags(f & !rflags::ARITH | image);
    Ok(0)
}

/// Translates one instruction placed at page offset 0.
#[must_use]
pub fn translate_one(insn: &[u8], flags: TbFlags) -> Block {
    let mut page = [0x90u8; 64];
    page[..insn.len()].copy_from_slice(insn);
    let mut none = || None;
    let req = Request { flags, off: 0, page: &page, next_page: &mut none, features: Features::ALL, max_insns: 1 };
    translate_block(req).unwrap_or_default()
}

/// What runs a block: the reference evaluator, or a tier under test.
pub type Runner<'a> = dyn FnMut(&Block, &mut TestEnv) -> Leave + 'a;

/// The reference evaluator.
pub fn reference(block: &Block, env: &mut TestEnv) -> Leave {
    twofold_ir::eval::reference::run(block, env)
}

/// Runs a block of one instruction of `len` bytes on `regs` and the memory at [`SCRATCH`], both updated.
pub fn run_block(block: &Block, len: usize, regs: &mut Regs, env: &mut TestEnv, run: &mut Runner<'_>) -> Outcome {
    regs.to_state(&mut env.state);
    let mode = match block.flags.size() {
        twofold_arch::CodeSize::Bits16 => Mode::Bits16,
        twofold_arch::CodeSize::Bits32 => Mode::Bits32,
        twofold_arch::CodeSize::Bits64 => Mode::Bits64,
    };
    env.state.rip_base = mode.rip();
    env.flat = mode != Mode::Bits16;
    if !env.flat {
        let data = twofold_arch::Segment { base: SCRATCH, limit: LIMIT16, ..Default::default() };
        let code = twofold_arch::Segment { base: CODE, limit: 0xffff, ..Default::default() };
        env.state.seg[..4].copy_from_slice(&[data, code, data, data]);
    }
    env.state.fault = Default::default();
    let host = twofold_ir::vecop::host_mxcsr();
    twofold_ir::vecop::set_host_mxcsr(env.state.mxcsr);
    let left = run(block, env);
    let after = twofold_ir::vecop::host_mxcsr();
    twofold_ir::vecop::set_host_mxcsr(host);
    if env.state.x87_live != 0 {
        (env.helpers)(env, twofold_ir::Helper::X87Park, [0; 4]);
    }
    env.state.mxcsr = env.state.mxcsr & !0x3f | (env.state.mxcsr | after) & 0x3f;
    regs.take_state(&env.state);
    regs.taken = 0;
    regs.raised = match left {
        Leave::Abandoned { .. } => {
            let f = env.state.fault;
            Some(Raised::new(f.vector as u8, f.error, f.cr2))
        }
        Leave::Exit { to: Target::Raise { exception, .. }, .. } => Some(Raised::new(exception.vector as u8, 0, 0)),
        Leave::Exit { .. } => None,
    };
    let at = |off: i64| -> (Outcome, u64) { (Outcome::Done, u64::from(off == (len + TAKEN) as i64)) };
    let (outcome, taken) = match left {
        Leave::Abandoned { .. } => (Outcome::of_vector(env.state.fault.vector), 0),
        Leave::Exit { to, .. } => match to {
            Target::Jump { off } => at(i64::from(off)),
            Target::JumpFar { off } | Target::Dispatch { off } => at(i64::from(off)),
            Target::Indirect { rip, .. } => at(rip.wrapping_sub(mode.rip()) as i64),
            Target::Helped => (Outcome::Done, 0),
            Target::Raise { exception, .. } => (Outcome::of_vector(exception.vector as u32), 0),
        },
    };
    regs.taken = taken;
    outcome
}

impl Outcome {
    /// What an exception is natively: a signal.
    #[must_use]
    pub fn of_vector(vector: u32) -> Self {
        match vector {
            0 => Outcome::Divide,
            6 => Outcome::Undefined,
            13 | 14 => Outcome::Protection,
            12 | 17 => Outcome::Bus,
            16 | 19 => Outcome::Divide,
            _ => Outcome::Other,
        }
    }
}

// ---- forms and values -------------------------------------------------------------------------------------------------

/// A small fast generator (xorshift*), so that a failure can be repeated.
#[derive(Clone, Copy)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // a generator of numbers, not of a sequence with an end
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    /// A value as tests want it: a boundary, a small number, or anything.
    pub fn value(&mut self) -> u64 {
        const EDGES: [u64; 22] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x100,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            u64::MAX,
            u64::MAX - 1,
            0xaaaa_aaaa_aaaa_aaaa,
            0x5555_5555_5555_5555,
            0x0f,
            0x1234_5678_9abc_def0,
        ];
        match self.below(8) {
            0..=2 => EDGES[self.below(EDGES.len() as u64) as usize],
            3 => self.below(256),
            4 => EDGES[self.below(EDGES.len() as u64) as usize].wrapping_add(self.below(5)).wrapping_sub(2),
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
}

/// Changes registers before a run.
pub type Prepare = dyn Fn(&mut Regs, &mut Rng);
/// Changes the scratch memory before a run.
pub type PrepareMem = dyn Fn(&mut [u8], &mut Rng);

/// An instruction to check.
pub struct Form {
    /// What to call it in a failure.
    pub name: String,
    /// The code size it runs in.
    pub mode: Mode,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Flags it leaves undefined.
    pub undefined: u64,
    /// Registers that point into the scratch area, by encoding; rSP always does.
    pub pointers: Vec<u8>,
    /// Changes the random registers before the run.
    pub prepare: Box<Prepare>,
    /// Changes the scratch memory before the run.
    pub prepare_mem: Box<PrepareMem>,
    /// Says which flags are undefined for these inputs, beside `undefined`.
    pub undefined_for: Box<dyn Fn(&Regs) -> u64>,
    /// Whether x87 and MMX registers and instruction pointers are compared.
    pub compare_x87: bool,
    /// Whether the destination is undefined for these inputs: such a run is skipped.
    pub skip: Box<dyn Fn(&Regs) -> bool>,
    /// Extra helpers.
    pub helpers: Helpers,
}

#[allow(missing_docs)]
impl Form {
    /// Builder methods for the fields.
    #[must_use]
    pub fn undefined(mut self, flags: u64) -> Self {
        self.undefined |= flags;
        self
    }
    #[must_use]
    pub fn undefined_for(mut self, f: impl Fn(&Regs) -> u64 + 'static) -> Self {
        self.undefined_for = Box::new(f);
        self
    }
    #[must_use]
    pub fn prepare(mut self, f: impl Fn(&mut Regs, &mut Rng) + 'static) -> Self {
        self.prepare = Box::new(f);
        self
    }
    #[must_use]
    pub fn prepare_mem(mut self, f: impl Fn(&mut [u8], &mut Rng) + 'static) -> Self {
        self.prepare_mem = Box::new(f);
        self
    }
    #[must_use]
    pub fn skip(mut self, f: impl Fn(&Regs) -> bool + 'static) -> Self {
        self.skip = Box::new(f);
        self
    }
    #[must_use]
    pub fn pointers(mut self, regs: &[u8]) -> Self {
        self.pointers = regs.to_vec();
        self
    }
    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }
    /// A form with nothing special about it; memory operands are on RBX.
    #[must_use]
    pub fn new(name: impl Into<String>, bytes: &[u8]) -> Self {
        Self {
            name: name.into(),
            mode: Mode::Bits64,
            bytes: bytes.to_vec(),
            undefined: 0,
            pointers: vec![3],
            prepare: Box::new(|_, _| {}),
            prepare_mem: Box::new(|_, _| {}),
            undefined_for: Box::new(|_| 0),
            compare_x87: false,
            skip: Box::new(|_| false),
            helpers: |_, _, _| None,
        }
    }
}

/// What differed first.
#[derive(Debug)]
pub struct Mismatch {
    /// The form's name and the difference, with inputs.
    pub text: String,
}

/// Runs a form `times` times on both sides; the number of runs compared.
///
/// # Errors
/// The first difference.
pub fn check(native: &mut Native, form: &Form, times: usize, run: &mut Runner<'_>) -> Result<usize, Mismatch> {
    let block = translate_one(&form.bytes, form.mode.key());
    check_block(native, form, &block, times, run)
}

/// [`check`] with a block already translated (and perhaps simplified).
///
/// # Errors
/// The first difference.
pub fn check_block(
    native: &mut Native,
    form: &Form,
    block: &Block,
    times: usize,
    run: &mut Runner<'_>,
) -> Result<usize, Mismatch> {
    native.set_code(&form.bytes, form.mode);
    let seed =
        form.bytes.iter().fold(0x9e37_79b9_7f4a_7c15u64, |s, &b| (s ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = Rng(seed | 1);
    let mut mem: Vec<u8> = (0..SCRATCH_LEN).map(|_| rng.next() as u8).collect();
    let mut env = TestEnv::new(SCRATCH, mem.clone());
    env.helpers = form.helpers;
    let mut native_mem = mem.clone();
    let mut compared = 0;
    for i in 0..times {
        let mut input = Regs::new();
        randomize(&mut input, form, &mut rng);
        // Fresh bytes near the pointers, edges among them.
        for at in (SCRATCH_LEN / 2 - 64..SCRATCH_LEN / 2 + 64).step_by(8) {
            mem[at..at + 8].copy_from_slice(&rng.value().to_le_bytes());
        }
        (form.prepare_mem)(&mut mem, &mut rng);
        if (form.skip)(&input) {
            continue;
        }
        native_mem.copy_from_slice(&mem);
        env.mem.copy_from_slice(&mem);
        let (mut a, mut b) = (input.clone(), input.clone());
        let native_outcome = native.run(&mut a, &mut native_mem);
        let outcome = run_block(block, form.bytes.len(), &mut b, &mut env, run);
        let undefined = form.undefined | (form.undefined_for)(&input);
        if let Some(what) = difference(form, undefined, (&a, native_outcome, &native_mem), (&b, outcome, &env.mem)) {
            return Err(Mismatch { text: format!("{} run {i}: {what}\n  input {}", form.name, show(&input)) });
        }
        compared += 1;
    }
    Ok(compared)
}

/// Random registers, then what the form makes of them.
pub fn randomize(r: &mut Regs, form: &Form, rng: &mut Rng) {
    for (n, g) in r.gpr.iter_mut().enumerate() {
        if n == 4 || form.pointers.contains(&(n as u8)) {
            *g = form.mode.middle() + rng.below(8) * u64::from(n != 4);
        } else {
            *g = rng.value();
        }
        if form.mode != Mode::Bits64 && n < 8 {
            *g &= 0xffff_ffff;
        }
    }
    r.flags = rng.next() & rflags::ARITH;
    for i in 0..16 {
        r.set_xmm(i, u128::from(rng.value()) | u128::from(rng.value()) << 64);
    }
    for h in &mut r.high {
        *h = u128::from(rng.value()) | u128::from(rng.value()) << 64;
    }
    (form.prepare)(r, rng);
}

/// How a run ended: registers, outcome, scratch memory.
pub type Side<'a> = (&'a Regs, Outcome, &'a [u8]);

/// What differs first between a native run and one of ours, in one line.
#[must_use]
pub fn difference(form: &Form, undefined: u64, native: Side<'_>, ours: Side<'_>) -> Option<String> {
    if native.1 != ours.1 {
        return Some(format!("host {:?}, ours {:?}", native.1, ours.1));
    }
    let (a, b) = (native.0, ours.0);
    if a.raised != b.raised {
        return Some(format!("host {:x?}, ours {:x?}", a.raised, b.raised));
    }
    // Outside 64-bit code the upper halves are nobody's.
    let (count, mask) = if form.mode == Mode::Bits64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
    for n in 0..count {
        if a.gpr[n] & mask != b.gpr[n] & mask {
            return Some(format!(
                "{} is {:#x} on the host, {:#x} here",
                twofold_arch::Gpr::NAMES[n],
                a.gpr[n],
                b.gpr[n]
            ));
        }
    }
    if native.1 == Outcome::Done {
        let (fa, fb) = (a.flags & !undefined, b.flags & !undefined);
        if fa != fb {
            return Some(format!("flags are {fa:#x} on the host, {fb:#x} here"));
        }
        if a.taken != b.taken {
            return Some(format!("taken {} on the host, {} here", a.taken, b.taken));
        }
    }
    for n in 0..count {
        if a.xmm(n) != b.xmm(n) {
            return Some(format!("xmm{n} is {:#034x} on the host, {:#034x} here", a.xmm(n), b.xmm(n)));
        }
    }
    for n in 0..count {
        if a.high[n] != b.high[n] {
            return Some(format!("ymm{n}'s high half is {:#034x} on the host, {:#034x} here", a.high[n], b.high[n]));
        }
    }
    if a.mxcsr() != b.mxcsr() {
        return Some(format!("mxcsr is {:#x} on the host, {:#x} here", a.mxcsr(), b.mxcsr()));
    }
    if form.compare_x87 {
        if a.fx[..6] != b.fx[..6] {
            return Some(format!("fcw fsw ftw are {:x?} on the host, {:x?} here", &a.fx[..6], &b.fx[..6]));
        }
        for n in 0..8 {
            if a.st(n) != b.st(n) {
                return Some(format!("st{n} is {:x?} on the host, {:x?} here", a.st(n), b.st(n)));
            }
        }
    }
    let at = native.2.iter().zip(ours.2).position(|(x, y)| x != y)?;
    let (x, y) = (&native.2[at..(at + 8).min(SCRATCH_LEN)], &ours.2[at..(at + 8).min(SCRATCH_LEN)]);
    Some(format!("memory at {:#x} is {x:x?} on the host, {y:x?} here", SCRATCH + at as u64))
}

/// The registers in one line.
#[must_use]
pub fn show(r: &Regs) -> String {
    let mut s = String::new();
    for n in 0..16 {
        s += &format!("{}={:x} ", twofold_arch::Gpr::NAMES[n], r.gpr[n]);
    }
    s + &format!("flags={:x} mxcsr={:x} xmm0={:x} xmm1={:x}", r.flags, r.mxcsr(), r.xmm(0), r.xmm(1))
}
