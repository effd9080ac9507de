//! The assembly between Rust and translated code, for x86-64 System V hosts.
//!
//! Place in the pipeline: [`enter`] calls translated code; blocks end by jumping to the exit thunks, and call the others.
//! All of it but [`enter`] is position-independent and copied to the start of code memory, where blocks reach it with
//! near calls.
//!
//! Registers in translated code: RBP is the state at entry of a block and of an exit thunk, and all through a block that has
//! no frame; RDI is the state for a called thunk. The stack pointer at a block's entry points to the return address into
//! [`enter`]. An exit thunk is jumped to with the block's frame gone. A called thunk takes arguments like a System V function, returns in RAX or XMM0 and keeps every other register, so that a call
//! in a cold path costs the hot path nothing (Cranelift's `PreserveAll`). `full` thunks also keep XMM0 … XMM15; blocks
//! without vector values use those that do not bother.
//!
//! A call that faults does not return: the stack pointer is set back to where [`enter`] left it.
#![allow(unsafe_code)] // assembly, and the call into translated code

use core::arch::{global_asm, naked_asm};

use twofold_arch::CpuState;
use twofold_arch::tbflags::MemMode;
use twofold_ir::MemFlags;

use crate::abi::{AccessKind, Leave, MemInfo, reason};
use crate::layout;
use crate::thunk::FIRST_VEC;

#[path = "thunks_vec.rs"]
mod vec;

pub(crate) use vec::OPS as VEC_OPS;

/// Whether this host runs translated code.
#[must_use]
pub fn available() -> bool {
    cfg!(target_os = "linux")
}

/// Whether the host has the instructions of the vector thunks.
pub(crate) fn has_vec_ops() -> bool {
    std::arch::is_x86_feature_detected!("sse4.2") && std::arch::is_x86_feature_detected!("ssse3")
}

/// Runs translated code until it leaves.
///
/// # Safety
/// `entry` is the entry of a block installed in a live `CodeMemory`, translated for the code that `state.rip` and
/// `state.tb_flags` stand for. `state` is exclusively the caller's, its `tlb`, `jump_cache`, `helpers` and `rip_base` are
/// valid, and what those functions do may invalidate no reference that the caller holds across the call.
pub unsafe fn enter(state: *mut CpuState, entry: u64) -> Leave {
    // SAFETY: the caller's promise.
    Leave::decode(unsafe { enter_raw(state, entry) })
}

/// Saves what the System V convention wants kept, notes the stack pointer for faults, calls.
#[unsafe(naked)]
unsafe extern "C" fn enter_raw(state: *mut CpuState, entry: u64) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        // The stack is now 8 bytes off a multiple of 16; the return address makes it one at a block's entry.
        "sub rsp, 8",
        "lea rax, [rsp - 8]",
        "mov [rdi + {host_sp}], rax",
        "mov rbp, rdi",
        "call rsi",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        host_sp = const layout::HOST_SP,
    )
}

/// The thunks' bytes, to be copied anywhere, and the offset of each by [`Thunk::index`].
pub(crate) fn image() -> (Vec<u8>, Vec<u32>) {
    unsafe extern "C" {
        static twofold_thunks_start: u8;
        static twofold_thunks_end: u8;
        static twofold_thunks_table: u32;
        static twofold_vec_start: u8;
        static twofold_vec_end: u8;
        static twofold_vec_table: u32;
    }
    // SAFETY: the symbols delimit code and tables that the assembly below defines; nobody writes them.
    unsafe fn part(start: *const u8, end: *const u8, table: *const u32, n: usize) -> (Vec<u8>, Vec<u32>) {
        // SAFETY: as above.
        unsafe {
            let len = end.offset_from_unsigned(start);
            let code = std::slice::from_raw_parts(start, len).to_vec();
            (code, std::slice::from_raw_parts(table, n).to_vec())
        }
    }
    // SAFETY: as above; the tables have as many entries as there are thunks.
    let (mut code, mut offsets) = unsafe {
        part(
            &raw const twofold_thunks_start,
            &raw const twofold_thunks_end,
            &raw const twofold_thunks_table,
            FIRST_VEC.into(),
        )
    };
    // SAFETY: as above.
    let (vec_code, vec_offsets) = unsafe {
        part(&raw const twofold_vec_start, &raw const twofold_vec_end, &raw const twofold_vec_table, vec::OPS.len())
    };
    code.resize(code.len().next_multiple_of(16), 0xcc);
    let base = code.len() as u32;
    code.extend(vec_code);
    offsets.extend(vec_offsets.into_iter().map(|o| base + o));
    (code, offsets)
}

const LOAD_KIND: u64 = MemInfo::new(AccessKind::Load, 0, MemFlags::NONE, MemMode::User).0;
const STORE_KIND: u64 = MemInfo::new(AccessKind::Store, 0, MemFlags::NONE, MemMode::User).0;

global_asm!(
    ".section .text.twofold_thunks,\"ax\",@progbits",
    ".globl twofold_thunks_start",
    ".globl twofold_thunks_end",
    ".globl twofold_thunks_table",
    ".hidden twofold_thunks_start",
    ".hidden twofold_thunks_end",
    ".hidden twofold_thunks_table",
    ".pushsection .rodata.twofold_thunks,\"a\",@progbits",
    ".p2align 2",
    "twofold_thunks_table:",
    ".popsection",
    ".p2align 4",
    "twofold_thunks_start:",
    // Begins a thunk: aligned, its offset noted.
    ".macro tf_thunk",
    ".p2align 4, 0xcc",
    "771:",
    ".pushsection .rodata.twofold_thunks,\"a\",@progbits",
    ".long 771b - twofold_thunks_start",
    ".popsection",
    ".endm",
    // `reg` += rip_base, truncated to the code size; to state.rip.
    ".macro tf_rip size reg reg32 reg16",
    "add \\reg, [rdi + {rip_base}]",
    ".if \\size == 32",
    "mov \\reg32, \\reg32",
    ".elseif \\size == 16",
    "movzx \\reg32, \\reg16",
    ".endif",
    "mov [rdi + {rip}], \\reg",
    ".endm",
    // Saves what Rust may clobber (the frame holds RDI at rbp - 32), notes the return address.
    ".macro tf_save full",
    "push rbp",
    "mov rbp, rsp",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    ".if \\full",
    "sub rsp, 256",
    "and rsp, -16",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movaps [rsp + 16 * \\n], xmm\\n",
    ".endr",
    ".else",
    "and rsp, -16",
    ".endif",
    "mov rax, [rbp + 8]",
    "mov [rdi + {host_ret}], rax",
    ".endm",
    ".macro tf_restore full",
    ".if \\full",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movaps xmm\\n, [rsp + 16 * \\n]",
    ".endr",
    ".endif",
    "lea rsp, [rbp - 64]",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbp",
    ".endm",
    // After a call that may fault.
    ".macro tf_check_fault",
    "mov rdi, [rbp - 32]",
    "cmp dword ptr [rdi + {fault_pending}], 0",
    "jne twofold_fault_exit",
    ".endm",
    //
    // 0: unlinked slot, called by its stub: [return address] is the word, then the target's offset.
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "pop rax",
    "mov ecx, [rax + 8]",
    "tf_rip \\size, rcx, ecx, cx",
    "mov rax, [rax]",
    "ret",
    ".endr",
    // 3: budget.
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "mov eax, esi",
    "shr eax, 16",
    "add [rdi], eax",
    "movzx esi, si",
    "tf_rip \\size, rsi, esi, si",
    "mov eax, {r_budget}",
    "ret",
    ".endr",
    // 6: dispatch.
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "tf_rip \\size, rsi, esi, si",
    "mov eax, {r_dispatch}",
    "ret",
    ".endr",
    // 9: raise.
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "mov eax, esi",
    "shr eax, 24",
    "mov [rdi + {fault_has_error}], eax",
    "mov eax, esi",
    "shr eax, 16",
    "movzx eax, al",
    "mov [rdi + {fault_vector}], eax",
    "mov [rdi + {fault_error}], edx",
    "mov [rdi + {fault_cr2}], rcx",
    "mov dword ptr [rdi + {fault_pending}], 1",
    "movzx esi, si",
    "tf_rip \\size, rsi, esi, si",
    "mov eax, {r_raise}",
    "ret",
    ".endr",
    // 12: far and 15: indirect: through the jump cache.
    ".macro tf_jump_cache",
    "mov rax, rsi",
    "shr rax, 12",
    "xor rax, rsi",
    "and eax, {jc_mask}",
    "shl eax, 5",
    "add rax, [rdi + {jump_cache}]",
    "cmp [rax + {jc_rip}], rsi",
    "jne 772f",
    "mov ecx, [rdi + {tb_flags}]",
    "cmp [rax + {jc_flags}], rcx",
    "jne 772f",
    "mov rcx, [rax + {jc_rip_base}]",
    "mov [rdi + {rip_base}], rcx",
    "jmp qword ptr [rax + {jc_code}]",
    "772:",
    "mov eax, {r_lookup}",
    "ret",
    ".endm",
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "tf_rip \\size, rsi, esi, si",
    "tf_jump_cache",
    ".endr",
    "tf_thunk",
    "mov rdi, rbp",
    "mov [rdi + {rip}], rsi",
    "tf_jump_cache",
    // 16: helped.
    "tf_thunk",
    "mov eax, {r_helped}",
    "ret",
    // 17: helper.
    ".irp full, 0, 1",
    "tf_thunk",
    "tf_save \\full",
    "mov rax, [rdi + {helpers}]",
    "add rax, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov rcx, r8",
    "mov r8, r9",
    "call [rax]",
    "tf_check_fault",
    "tf_restore \\full",
    "ret",
    ".endr",
    // 19: cond, 21: flags.
    ".irp off, {fn_cond}, {fn_flags}",
    ".irp full, 0, 1",
    "tf_thunk",
    "tf_save \\full",
    "mov rax, [rdi + {helpers}]",
    "call [rax + \\off]",
    "tf_restore \\full",
    "ret",
    ".endr",
    ".endr",
    // 23: slow load, 25: slow store, 27: atomic, which gives the place of the old value.
    ".macro tf_slow name off full address",
    "tf_thunk",
    "\\name\\full\\():",
    "tf_save \\full",
    "mov rax, [rdi + {helpers}]",
    "call [rax + \\off]",
    "tf_check_fault",
    "tf_restore \\full",
    ".if \\address",
    "mov [rdi + {mem_result}], rax",
    "lea rax, [rdi + {mem_result}]",
    ".endif",
    "ret",
    ".endm",
    "tf_slow twofold_slow_load, {fn_load}, 0, 0",
    "tf_slow twofold_slow_load, {fn_load}, 1, 0",
    "tf_slow twofold_slow_store, {fn_store}, 0, 0",
    "tf_slow twofold_slow_store, {fn_store}, 1, 0",
    "tf_slow twofold_slow_atomic, {fn_atomic}, 0, 1",
    "tf_slow twofold_slow_atomic, {fn_atomic}, 1, 1",
    // 29, 30: 16 bytes.
    "tf_thunk",
    "twofold_slow_load_vec:",
    "tf_save 1",
    "mov rax, [rdi + {helpers}]",
    "call [rax + {fn_load}]",
    "tf_check_fault",
    "tf_restore 1",
    "movups xmm0, [rdi + {mem_result}]",
    "ret",
    "tf_thunk",
    "twofold_slow_store_vec:",
    "movups [rdi + {mem_result}], xmm0",
    "jmp twofold_slow_store1",
    // 31: vector op by number.
    "tf_thunk",
    "tf_save 1",
    "sub rsp, 48",
    "movups [rsp], xmm0",
    "movups [rsp + 16], xmm1",
    "movups [rsp + 32], xmm2",
    "mov rax, [rdi + {helpers}]",
    "mov rdi, rsi",
    "mov rsi, rsp",
    "call [rax + {fn_vec}]",
    "movups xmm0, [rsp]",
    "add rsp, 48",
    "movaps [rsp], xmm0",
    "tf_restore 1",
    "ret",
    // 32: slot that leads through the jump cache, called by its stub like an unlinked one.
    ".irp size, 16, 32, 64",
    "tf_thunk",
    "mov rdi, rbp",
    "pop rax",
    "mov esi, [rax + 8]",
    "tf_rip \\size, rsi, esi, si",
    "tf_jump_cache",
    ".endr",
    // 35: x87 ready.
    ".irp full, 0, 1",
    "tf_thunk",
    "cmp dword ptr [rdi + {x87_live}], 0",
    "je 772f",
    "ret",
    "772:",
    "tf_save \\full",
    "mov rax, [rdi + {helpers}]",
    "call [rax + {fn_x87_ready}]",
    "tf_restore \\full",
    "ret",
    ".endr",
    // The end of every access or helper that faulted. RDI is the state.
    ".p2align 4, 0xcc",
    "twofold_fault_exit:",
    "mov rsp, [rdi + {host_sp}]",
    "mov eax, {r_fault}",
    "ret",
    //
    // 37: probe and access, by mode, stack flag, full, and size.
    ".macro tf_entry mode",
    "mov rax, rsi",
    "shr rax, {tlb_shift}",
    "and rax, [rdi + {view} + 16 * \\mode + {view_mask}]",
    "add rax, [rdi + {view} + 16 * \\mode + {view_table}]",
    ".endm",
    ".macro tf_load mode stack full log2 insn",
    "tf_thunk",
    "tf_entry \\mode",
    "lea rdx, [rsi + (1 << \\log2) - 1]",
    "and rdx, -4096",
    "cmp rdx, [rax + {tlb_read}]",
    "jne 772f",
    "mov rax, [rax + {tlb_addend}]",
    "\\insn [rax + rsi]",
    "ret",
    "772:",
    "mov edx, {load_kind} + \\log2 + (\\stack << 8) + (\\mode << 16)",
    ".if \\log2 == 4",
    "jmp twofold_slow_load_vec",
    ".else",
    "jmp twofold_slow_load\\full",
    ".endif",
    ".endm",
    ".macro tf_store mode stack full log2 reg",
    "tf_thunk",
    "tf_entry \\mode",
    "lea rcx, [rsi + (1 << \\log2) - 1]",
    "and rcx, -4096",
    "cmp rcx, [rax + {tlb_write}]",
    "jne 772f",
    "mov rax, [rax + {tlb_addend}]",
    ".if \\log2 == 4",
    "movups [rax + rsi], \\reg",
    ".else",
    "mov [rax + rsi], \\reg",
    ".endif",
    "ret",
    "772:",
    "mov rcx, rdx",
    "mov edx, {store_kind} + \\log2 + (\\stack << 8) + (\\mode << 16)",
    ".if \\log2 == 4",
    "jmp twofold_slow_store_vec",
    ".else",
    "jmp twofold_slow_store\\full",
    ".endif",
    ".endm",
    ".irp mode, 0, 1, 2",
    ".irp stack, 0, 1",
    ".irp full, 0, 1",
    "tf_load \\mode, \\stack, \\full, 0, \"movzx eax, byte ptr\"",
    "tf_load \\mode, \\stack, \\full, 1, \"movzx eax, word ptr\"",
    "tf_load \\mode, \\stack, \\full, 2, \"mov eax,\"",
    "tf_load \\mode, \\stack, \\full, 3, \"mov rax,\"",
    "tf_load \\mode, \\stack, \\full, 4, \"movups xmm0,\"",
    "tf_store \\mode, \\stack, \\full, 0, dl",
    "tf_store \\mode, \\stack, \\full, 1, dx",
    "tf_store \\mode, \\stack, \\full, 2, edx",
    "tf_store \\mode, \\stack, \\full, 3, rdx",
    "tf_store \\mode, \\stack, \\full, 4, xmm0",
    ".endr",
    ".endr",
    ".endr",
    "twofold_thunks_end:",
    ".purgem tf_thunk",
    ".purgem tf_rip",
    ".purgem tf_save",
    ".purgem tf_restore",
    ".purgem tf_check_fault",
    ".purgem tf_jump_cache",
    ".purgem tf_slow",
    ".purgem tf_entry",
    ".purgem tf_load",
    ".purgem tf_store",
    ".previous",
    rip_base = const layout::RIP_BASE,
    rip = const layout::RIP,
    host_ret = const layout::HOST_RET,
    host_sp = const layout::HOST_SP,
    fault_pending = const layout::FAULT_PENDING,
    fault_vector = const layout::FAULT_VECTOR,
    fault_error = const layout::FAULT_ERROR,
    fault_has_error = const layout::FAULT_HAS_ERROR,
    fault_cr2 = const layout::FAULT_CR2,
    jump_cache = const layout::JUMP_CACHE,
    tb_flags = const layout::TB_FLAGS,
    helpers = const layout::HELPERS,
    mem_result = const layout::MEM_RESULT,
    jc_mask = const layout::JC_MASK,
    jc_rip = const layout::JC_RIP,
    jc_flags = const layout::JC_FLAGS,
    jc_code = const layout::JC_CODE,
    jc_rip_base = const layout::JC_RIP_BASE,
    tlb_shift = const layout::TLB_SHIFT,
    tlb_read = const layout::TLB_READ,
    tlb_write = const layout::TLB_WRITE,
    tlb_addend = const layout::TLB_ADDEND,
    view = const layout::tlb_view(0),
    view_mask = const layout::VIEW_MASK,
    view_table = const layout::VIEW_TABLE,
    fn_load = const layout::FN_LOAD,
    fn_store = const layout::FN_STORE,
    fn_atomic = const layout::FN_ATOMIC,
    fn_cond = const layout::FN_COND,
    fn_flags = const layout::FN_FLAGS,
    fn_vec = const layout::FN_VEC,
    x87_live = const layout::X87_LIVE,
    fn_x87_ready = const layout::FN_X87_READY,
    load_kind = const LOAD_KIND,
    store_kind = const STORE_KIND,
    r_budget = const reason::BUDGET,
    r_dispatch = const reason::DISPATCH,
    r_raise = const reason::RAISE,
    r_lookup = const reason::LOOKUP,
    r_helped = const reason::HELPED,
    r_fault = const reason::FAULT,
);
