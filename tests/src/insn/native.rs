//! The native oracle: runs one user-mode instruction on the host CPU, and compares the evaluator with it.
//!
//! [`check`] runs a [`Form`] on many register values. Memory operands point into a scratch area that both sides see at the same
//! address. Invariant: one native run at a time ([`Native::lock`]); signals (#DE, #UD, #GP, #PF) of the tested
//! instruction are caught and compared too.
#![allow(unsafe_code)] // It jumps into bytes it has written.

use std::sync::{Mutex, MutexGuard, OnceLock};

use twofold_arch::control::rflags;
use twofold_ir::Block;

use super::compare::{Scope, difference, show};
use super::env::{Runner, TestEnv, run_block, translate_one};
use super::form::{Form, Rng, randomize};
use super::regs::{CODE, LIMIT16, Mode, Outcome, Raised, Regs, SCRATCH, SCRATCH_LEN, TAKEN};

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
        if let Some(what) =
            difference(&Scope::of(form, undefined), (&a, native_outcome, &native_mem), (&b, outcome, &env.mem))
        {
            return Err(Mismatch { text: format!("{} run {i}: {what}\n  input {}", form.name, show(&input)) });
        }
        compared += 1;
    }
    Ok(compared)
}
