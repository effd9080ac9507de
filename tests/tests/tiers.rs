//! The tiers agree: faults leave exactly the state the SDM says, traps and interrupts come at the right instruction, and
//! random code does the same in each.

use std::collections::BTreeMap;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use twofold_tests::guest::{Bits, CODE, DATA, END, Guest, RESUME, Record, STACK, pte};

/// A page that is not there.
const NP: u32 = 0x30_0000;
/// A page that is read-only.
const RO: u32 = 0x30_2000;

/// The guest itself works.
#[test]
fn a_guest_counts_to_ten() {
    for bits in [Bits::B64, Bits::B32, Bits::B16] {
        let mut g = Guest::new(bits);
        g.assemble(CODE, |a| {
            let mut again = a.create_label();
            a.mov(ecx, 10)?;
            a.set_label(&mut again)?;
            a.add(eax, ecx)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.int(END)
        });
        g.dump(DATA, 16);
        let ran = g.run_in_all_tiers();
        assert_eq!(ran.last.gpr[0], 55, "{bits:?}");
        assert!(ran.log.is_empty());
    }
}

// ---- faults ---------------------------------------------------------------------------------------------------------

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A fault: the instruction, the vector, the error code, CR2.
struct Fault(&'static str, Emit, u8, u64, u64);

const READ: u64 = 0;
const WRITE: u64 = 2;
const WRITE_RO: u64 = 3;
const NP64: u64 = NP as u64;
const RO64: u64 = RO as u64;
const PF: u8 = 14;
const GP: u8 = 13;

/// 64-bit code. Where registers point: R10 to [`NP`], R11 to [`RO`], R9 four bytes before [`NP`], R8 is not canonical, RSI
/// and RDI into [`DATA`], aligned. RCX is 3, RBX 0.
#[rustfmt::skip]
fn faults64() -> Vec<Fault> {
    vec![
        Fault("ud2", |a| a.ud2(), 6, 0, 0),
        Fault("mov r, [np]", |a| a.mov(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("mov [np], r", |a| a.mov(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("mov [np], imm8", |a| a.mov(byte_ptr(r10 + 5), 1), PF, WRITE, NP64 + 5),
        Fault("mov r16, [np]", |a| a.mov(ax, word_ptr(r10 + 2)), PF, READ, NP64 + 2),
        Fault("mov r8, [np]", |a| a.mov(ah, byte_ptr(rcx + NP - 3)), PF, READ, NP64),
        Fault("mov [ro], r", |a| a.mov(dword_ptr(r11), eax), PF, WRITE_RO, RO64),
        Fault("add r, [np]", |a| a.add(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("add [np], r", |a| a.add(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("add [ro], r", |a| a.add(qword_ptr(r11), rax), PF, WRITE_RO, RO64),
        Fault("adc [ro], imm", |a| a.adc(dword_ptr(r11), 5), PF, WRITE_RO, RO64),
        Fault("sbb r, [np]", |a| a.sbb(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("cmp [np], r", |a| a.cmp(byte_ptr(r10), al), PF, READ, NP64),
        Fault("test [np], r", |a| a.test(dword_ptr(r10), eax), PF, READ, NP64),
        Fault("inc [np]", |a| a.inc(qword_ptr(r10)), PF, WRITE, NP64),
        Fault("dec [ro]", |a| a.dec(byte_ptr(r11)), PF, WRITE_RO, RO64),
        Fault("neg [np]", |a| a.neg(dword_ptr(r10)), PF, WRITE, NP64),
        Fault("not [ro]", |a| a.not(word_ptr(r11)), PF, WRITE_RO, RO64),
        Fault("shl [np], cl", |a| a.shl(qword_ptr(r10), cl), PF, WRITE, NP64),
        Fault("rcr [ro], 1", |a| a.rcr(dword_ptr(r11), 1), PF, WRITE_RO, RO64),
        Fault("shld [np], r, cl", |a| a.shld(qword_ptr(r10), rax, cl), PF, WRITE, NP64),
        Fault("lock add [np], r", |a| a.lock().add(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("lock inc [ro]", |a| a.lock().inc(dword_ptr(r11)), PF, WRITE_RO, RO64),
        Fault("lock bts [ro], r", |a| a.lock().bts(qword_ptr(r11), rcx), PF, WRITE_RO, RO64),
        Fault("xchg [np], r", |a| a.xchg(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("xchg [ro], r", |a| a.xchg(byte_ptr(r11), al), PF, WRITE_RO, RO64),
        Fault("xadd [np], r", |a| a.xadd(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("cmpxchg [ro], r", |a| a.cmpxchg(qword_ptr(r11), rdx), PF, WRITE_RO, RO64),
        Fault("lock cmpxchg [np], r", |a| a.lock().cmpxchg(dword_ptr(r10), edx), PF, WRITE, NP64),
        Fault("cmpxchg8b [np]", |a| a.cmpxchg8b(qword_ptr(r10)), PF, WRITE, NP64),
        Fault("cmpxchg16b [ro]", |a| a.cmpxchg16b(xmmword_ptr(r11)), PF, WRITE_RO, RO64),
        Fault("cmpxchg16b misaligned", |a| a.cmpxchg16b(xmmword_ptr(rsi + 8)), GP, 0, 0),
        Fault("bt [np], r", |a| a.bt(qword_ptr(r10), rcx), PF, READ, NP64),
        Fault("btc [ro], r, far", |a| a.btc(dword_ptr(r11 - 4), r13d), PF, WRITE_RO, RO64),
        Fault("bsf r, [np]", |a| a.bsf(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("imul r, [np]", |a| a.imul_2(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("imul r, [np], imm", |a| a.imul_3(rax, qword_ptr(r10), 7), PF, READ, NP64),
        Fault("mul [np]", |a| a.mul(qword_ptr(r10)), PF, READ, NP64),
        Fault("div [np]", |a| a.div(qword_ptr(r10)), PF, READ, NP64),
        Fault("div 0", |a| a.div(rbx), 0, 0, 0),
        Fault("div overflow", |a| a.div(cl), 0, 0, 0),
        Fault("idiv overflow", |a| a.idiv(ecx), 0, 0, 0),
        Fault("cmove r, [np]", |a| a.cmove(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("cmovne r, [np]", |a| a.cmovne(eax, dword_ptr(r10)), PF, READ, NP64),
        Fault("sete [np]", |a| a.sete(byte_ptr(r10)), PF, WRITE, NP64),
        Fault("movzx r, [np]", |a| a.movzx(eax, byte_ptr(r10)), PF, READ, NP64),
        Fault("movsxd r, [np]", |a| a.movsxd(rax, dword_ptr(r10)), PF, READ, NP64),
        Fault("movbe r, [np]", |a| a.movbe(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("movbe [np], r", |a| a.movbe(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("popcnt r, [np]", |a| a.popcnt(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("crc32 r, [np]", |a| a.crc32(eax, byte_ptr(r10)), PF, READ, NP64),
        Fault("movnti [np], r", |a| a.movnti(qword_ptr(r10), rax), PF, WRITE, NP64),
        Fault("xlat", |a| { a.mov(rbx, r10)?; a.xor(eax, eax)?; a.xlatb() }, PF, READ, NP64),
        // Strings without a prefix.
        Fault("lodsq", |a| { a.mov(rsi, r10)?; a.lodsq() }, PF, READ, NP64),
        Fault("stosd", |a| { a.mov(rdi, r10)?; a.stosd() }, PF, WRITE, NP64),
        Fault("movsb, source", |a| { a.mov(rsi, r10)?; a.movsb() }, PF, READ, NP64),
        Fault("movsq, destination", |a| { a.mov(rdi, r11)?; a.movsq() }, PF, WRITE_RO, RO64),
        Fault("cmpsb", |a| { a.mov(rdi, r10)?; a.cmpsb() }, PF, READ, NP64),
        Fault("scasw", |a| { a.mov(rdi, r10)?; a.scasw() }, PF, READ, NP64),
        // The stack.
        Fault("push [np]", |a| a.push(qword_ptr(r10)), PF, READ, NP64),
        Fault("pop [np]", |a| a.pop(qword_ptr(r10)), PF, WRITE, NP64),
        Fault("push r, bad stack", |a| { a.lea(rsp, ptr(r10 + 8))?; a.push(rax) }, PF, WRITE, NP64),
        Fault("push r16, read-only stack", |a| { a.lea(rsp, ptr(r11 + 8))?; a.push(ax) }, PF, WRITE_RO, RO64 + 6),
        Fault("pop r, bad stack", |a| { a.mov(rsp, r10)?; a.pop(rax) }, PF, READ, NP64),
        Fault("call, bad stack", |a| { a.lea(rsp, ptr(r10 + 8))?; a.call(u64::from(CODE)) }, PF, WRITE, NP64),
        Fault("call r, bad stack", |a| { a.lea(rsp, ptr(r10 + 8))?; a.call(rsi) }, PF, WRITE, NP64),
        Fault("call [np]", |a| a.call(qword_ptr(r10)), PF, READ, NP64),
        Fault("jmp [np]", |a| a.jmp(qword_ptr(r10)), PF, READ, NP64),
        Fault("jmp r, not canonical", |a| a.jmp(r8), GP, 0, 0),
        Fault("jmp r, first not canonical", |a| { a.mov(rbx, 1u64 << 47)?; a.jmp(rbx) }, GP, 0, 0),
        Fault("jmp r, last not canonical", |a| { a.mov(rbx, (-1i64 << 47) - 1)?; a.jmp(rbx) }, GP, 0, 0),
        Fault("jmp [m], not canonical", |a| { a.mov(qword_ptr(rsi + 64), r8)?; a.jmp(qword_ptr(rsi + 64)) }, GP, 0, 0),
        Fault("call r, not canonical", |a| a.call(r8), GP, 0, 0),
        Fault("call [m], not canonical", |a| { a.mov(qword_ptr(rsi + 64), r8)?; a.call(qword_ptr(rsi + 64)) }, GP, 0, 0),
        Fault("ret, not canonical", |a| { a.push(r8)?; a.ret() }, GP, 0, 0),
        Fault("ret n, not canonical", |a| { a.push(r8)?; a.ret_1(8) }, GP, 0, 0),
        Fault("ret, bad stack", |a| { a.mov(rsp, r10)?; a.ret() }, PF, READ, NP64),
        Fault("ret n, bad stack", |a| { a.mov(rsp, r10)?; a.ret_1(16) }, PF, READ, NP64),
        Fault("enter, bad stack", |a| { a.lea(rsp, ptr(r10 + 8))?; a.enter(16, 0) }, PF, WRITE, NP64),
        Fault("leave, bad frame", |a| { a.mov(rbp, r10)?; a.leave() }, PF, READ, NP64),
        Fault("pushfq, bad stack", |a| { a.lea(rsp, ptr(r10 + 8))?; a.pushfq() }, PF, WRITE, NP64),
        Fault("popfq, bad stack", |a| { a.mov(rsp, r10)?; a.popfq() }, PF, READ, NP64),
        Fault("iretq, bad stack", |a| { a.mov(rsp, r10)?; a.iretq() }, PF, READ, NP64),
        Fault("push, stack not canonical", |a| { a.mov(rsp, r8)?; a.push(rax) }, 12, 0, 0),
        Fault("mov [rsp], not canonical", |a| { a.mov(rsp, r8)?; a.mov(qword_ptr(rsp), rax) }, 12, 0, 0),
        Fault("mov [r], not canonical", |a| a.mov(qword_ptr(r8), rax), GP, 0, 0),
        Fault("mov r, [r], not canonical", |a| a.mov(rax, qword_ptr(r8 + 16)), GP, 0, 0),
        // Across the page's end: nothing of it happens, and CR2 is the first byte that is not there.
        Fault("mov [cross], r", |a| a.mov(qword_ptr(r9), rax), PF, WRITE, NP64),
        Fault("mov r, [cross]", |a| a.mov(rax, qword_ptr(r9)), PF, READ, NP64),
        Fault("mov [cross], r32", |a| a.mov(dword_ptr(r9 + 1), eax), PF, WRITE, NP64),
        Fault("add [cross], r", |a| a.add(qword_ptr(r9), rax), PF, WRITE, NP64),
        Fault("xchg [cross], r", |a| a.xchg(qword_ptr(r9), rax), PF, WRITE, NP64),
        Fault("lock cmpxchg [cross], r", |a| a.lock().cmpxchg(qword_ptr(r9), rdx), PF, WRITE, NP64),
        Fault("push, cross", |a| { a.lea(rsp, ptr(r9 + 8))?; a.push(rax) }, PF, WRITE, NP64),
        Fault("movups [cross], x", |a| a.movups(xmmword_ptr(r9), xmm0), PF, WRITE, NP64),
        Fault("movups x, [cross]", |a| a.movups(xmm0, xmmword_ptr(r9)), PF, READ, NP64),
        Fault("fstp tbyte [cross]", |a| a.fstp(tword_ptr(r9)), PF, WRITE, NP64),
        Fault("fld tbyte [cross]", |a| a.fld(tword_ptr(r9)), PF, READ, NP64),
        // SSE, MMX and x87.
        Fault("movaps x, misaligned", |a| a.movaps(xmm0, xmmword_ptr(rsi + 8)), GP, 0, 0),
        Fault("movaps misaligned, x", |a| a.movaps(xmmword_ptr(rsi + 1), xmm0), GP, 0, 0),
        Fault("paddb x, misaligned", |a| a.paddb(xmm0, xmmword_ptr(rsi + 8)), GP, 0, 0),
        Fault("movaps x, [np]", |a| a.movaps(xmm0, xmmword_ptr(r10)), PF, READ, NP64),
        Fault("movaps [ro], x", |a| a.movaps(xmmword_ptr(r11), xmm0), PF, WRITE_RO, RO64),
        Fault("movss x, [np]", |a| a.movss(xmm0, dword_ptr(r10)), PF, READ, NP64),
        Fault("movsd [np], x", |a| a.movsd_2(qword_ptr(r10), xmm0), PF, WRITE, NP64),
        Fault("addsd x, [np]", |a| a.addsd(xmm0, qword_ptr(r10)), PF, READ, NP64),
        Fault("ucomisd x, [np]", |a| a.ucomisd(xmm0, qword_ptr(r10)), PF, READ, NP64),
        Fault("cvttsd2si r, [np]", |a| a.cvttsd2si(rax, qword_ptr(r10)), PF, READ, NP64),
        Fault("pshufb x, [np]", |a| a.pshufb(xmm0, xmmword_ptr(r10)), PF, READ, NP64),
        Fault("ldmxcsr [np]", |a| a.ldmxcsr(dword_ptr(r10)), PF, READ, NP64),
        Fault("ldmxcsr, reserved bits", |a| { a.mov(dword_ptr(rsi), -1)?; a.ldmxcsr(dword_ptr(rsi)) }, GP, 0, 0),
        Fault("stmxcsr [np]", |a| a.stmxcsr(dword_ptr(r10)), PF, WRITE, NP64),
        Fault("movq mm, [np]", |a| a.movq(mm0, qword_ptr(r10)), PF, READ, NP64),
        Fault("movq [np], mm", |a| a.movq(qword_ptr(r10), mm0), PF, WRITE, NP64),
        Fault("paddb mm, [np]", |a| a.paddb(mm0, qword_ptr(r10)), PF, READ, NP64),
        Fault("fld [np]", |a| a.fld(qword_ptr(r10)), PF, READ, NP64),
        Fault("fild [np]", |a| a.fild(dword_ptr(r10)), PF, READ, NP64),
        Fault("fstp [np]", |a| a.fstp(qword_ptr(r10)), PF, WRITE, NP64),
        Fault("fistp [ro]", |a| a.fistp(qword_ptr(r11)), PF, WRITE_RO, RO64),
        Fault("fadd [np]", |a| a.fadd(dword_ptr(r10)), PF, READ, NP64),
        Fault("fldcw [np]", |a| a.fldcw(word_ptr(r10)), PF, READ, NP64),
        Fault("fnstcw [np]", |a| a.fnstcw(word_ptr(r10)), PF, WRITE, NP64),
        Fault("fxsave misaligned", |a| a.fxsave(ptr(rsi + 8)), GP, 0, 0),
        Fault("fxrstor [np]", |a| a.fxrstor(ptr(r10)), PF, READ, NP64),
        // System instructions.
        Fault("lgdt [np]", |a| a.lgdt(ptr(r10)), PF, READ, NP64),
        Fault("sidt [np]", |a| a.sidt(ptr(r10)), PF, WRITE, NP64),
        Fault("wrmsr, unknown", |a| { a.mov(ecx, 0x1234_5678)?; a.wrmsr() }, GP, 0, 0),
        Fault("mov cr4, reserved bits", |a| { a.mov(rdx, 1u64 << 40)?; a.mov(cr4, rdx) }, GP, 0, 0),
        Fault("mov cr0, PG without PE", |a| { a.mov(edx, 0x8000_0000u32)?; a.mov(cr0, rdx) }, GP, 0, 0),
        Fault("xsetbv, not x87", |a| { a.xor(ecx, ecx)?; a.xor(eax, eax)?; a.xor(edx, edx)?; a.xsetbv() }, GP, 0, 0),
        Fault("mov ds, beyond the table", |a| { a.mov(edx, 0x1238)?; a.mov(ds, edx) }, GP, 0x1238, 0),
        Fault("lock mov", |a| a.db(&[0xf0, 0x48, 0x89, 0x06]), 6, 0, 0),
        Fault("ud0", |a| a.db(&[0x0f, 0xff, 0xc0]), 6, 0, 0),
    ]
}

/// 32-bit code; ESI points into [`DATA`], EDI to [`NP`], EBP to [`RO`], ECX is 3, EBX 0.
#[rustfmt::skip]
fn faults32() -> Vec<Fault> {
    vec![
        Fault("mov r, [np]", |a| a.mov(eax, dword_ptr(edi)), PF, READ, NP64),
        Fault("mov [ro], r", |a| a.mov(byte_ptr(ebp), al), PF, WRITE_RO, RO64),
        Fault("add [np], r", |a| a.add(dword_ptr(edi), eax), PF, WRITE, NP64),
        Fault("adc [ro], r16", |a| a.adc(word_ptr(ebp), ax), PF, WRITE_RO, RO64),
        Fault("xchg [ro], r", |a| a.xchg(dword_ptr(ebp), eax), PF, WRITE_RO, RO64),
        Fault("cmpxchg8b [np]", |a| a.cmpxchg8b(qword_ptr(edi)), PF, WRITE, NP64),
        Fault("push [np]", |a| a.push(dword_ptr(edi)), PF, READ, NP64),
        Fault("pop [ro]", |a| a.pop(dword_ptr(ebp)), PF, WRITE_RO, RO64),
        Fault("bound", |a| { a.mov(dword_ptr(esi), 5)?; a.mov(dword_ptr(esi + 4), 9)?; a.bound(ecx, dword_ptr(esi)) }, 5, 0, 0),
        Fault("bound [np]", |a| a.bound(ecx, dword_ptr(edi)), PF, READ, NP64),
        Fault("aam 0", |a| a.aam(0), 0, 0, 0),
        Fault("div 0", |a| a.div(bx), 0, 0, 0),
        Fault("idiv overflow", |a| { a.mov(edx, 0x7fff_ffff)?; a.idiv(ecx) }, 0, 0, 0),
        Fault("les r, [np]", |a| a.les(eax, ptr(edi)), PF, READ, NP64),
        Fault("lds r, bad selector", |a| { a.mov(word_ptr(esi + 4), 0x1238)?; a.lds(eax, ptr(esi)) }, GP, 0x1238, 0),
        Fault("mov ss, null", |a| a.mov(ss, ebx), GP, 0, 0),
        Fault("mov cs, r", |a| a.db(&[0x8e, 0xc9]), 6, 0, 0),
        Fault("jmp far [np]", |a| a.db(&[0xff, 0x2f]), PF, READ, NP64),
        Fault("jmp far, null", |a| a.db(&[0xea, 0, 0, 0, 0, 0, 0]), GP, 0, 0),
        Fault("call far, data", |a| a.db(&[0x9a, 0, 0, 0, 0, 0x10, 0]), GP, 0x10, 0),
        Fault("movs, destination", |a| a.movsd(), PF, WRITE, NP64),
        Fault("fstp [np]", |a| a.fstp(dword_ptr(edi)), PF, WRITE, NP64),
        Fault("fnsave [ro]", |a| a.fnsave(ptr(ebp)), PF, WRITE_RO, RO64),
        Fault("movaps x, [np]", |a| a.movaps(xmm0, xmmword_ptr(edi)), PF, READ, NP64),
        Fault("sysexit, no SYSENTER_CS", |a| a.sysexit(), GP, 0, 0),
        Fault("syscall", |a| a.syscall(), 6, 0, 0),
        Fault("vmcall", |a| a.vmcall(), 6, 0, 0),
    ]
}

const STRIDE: u32 = 0x200;
/// Where a case goes on after its fault.
const GO_ON: u32 = 0x1e0;
const ROUNDS: u32 = 40;

/// A guest that goes through all faults many times. As its own twin it has UD2 in the place of each faulting instruction,
/// which faults there and does nothing else: what it leaves is what the faulting instruction must leave.
fn fault_guest(bits: Bits, faults: &[Fault], twin: bool) -> Guest {
    let mut g = Guest::new(bits);
    g.map(NP, 0);
    g.map(RO, u64::from(RO) | pte::P);
    for (i, fault) in faults.iter().enumerate() {
        let at = CODE + STRIDE * i as u32;
        g.assemble(at, |a| {
            // The same state each time, x87 and SSE included.
            a.mov(dword_ptr(RESUME), at + GO_ON)?;
            a.fninit()?;
            a.fld1()?;
            a.fldpi()?;
            a.mov(esi, DATA)?;
            a.mov(ecx, 3)?;
            a.xor(ebx, ebx)?;
            a.mov(esp, STACK - 0x200)?;
            // In the block with the fault: registers, flags, memory and vector registers change before it.
            if bits == Bits::B64 {
                a.mov(edi, DATA + 64)?;
                a.mov(r10d, NP)?;
                a.mov(r11d, RO)?;
                a.mov(r9d, NP - 4)?;
                a.mov(r13d, 32)?;
                a.mov(r8, 0x8000_1234_5678_0000u64)?;
                a.mov(ebp, STACK - 0x100)?;
                a.mov(rdx, 0x0123_4567_89ab_cdefu64)?;
                a.lea(rax, ptr(rdx + rdx * 2))?;
                a.movq(xmm0, rdx)?;
                a.add(dword_ptr(rsi + 32), 1)?;
                a.mov(r12, rax)?;
                a.sub(r12, 5)?;
            } else {
                a.mov(edi, NP)?;
                a.mov(ebp, RO)?;
                a.mov(edx, 0x89ab_cdefu32)?;
                a.lea(eax, ptr(edx + edx * 2))?;
                a.movd(xmm0, edx)?;
                a.add(dword_ptr(esi + 32), 1)?;
            }
            a.paddq(xmm0, xmm0)?;
            a.add(al, 0x7f)?;
            if twin {
                // What the case does before its faulting instruction is done here, too.
                let mut alone = CodeAssembler::new(a.bitness())?;
                (fault.1)(&mut alone)?;
                let all = alone.take_instructions();
                for insn in &all[..all.len().saturating_sub(1)] {
                    a.add_instruction(*insn)?;
                }
                a.ud2()?;
            } else {
                (fault.1)(a)?;
            }
            // And after it, which must not be seen.
            a.mov(eax, 0x5555)?;
            a.stc()?;
            a.pxor(xmm0, xmm0)?;
            a.mov(esi, DATA)?;
            if bits == Bits::B64 {
                a.add(dword_ptr(rsi + 36), 1)?;
            } else {
                a.add(dword_ptr(esi + 36), 1)?;
            }
            a.fldz()?;
            a.ud2()
        });
        g.assemble(at + GO_ON, |a| {
            if i + 1 < faults.len() {
                return a.jmp(u64::from(at + STRIDE));
            }
            let mut end = a.create_label();
            a.inc(dword_ptr(DATA + 0x1000))?;
            a.cmp(dword_ptr(DATA + 0x1000), ROUNDS as i32)?;
            a.je(end)?;
            a.jmp(u64::from(CODE))?;
            a.set_label(&mut end)?;
            a.int(END)
        });
    }
    g.dump(DATA, 128);
    g.dump(NP - 16, 16);
    g
}

fn check_faults(bits: Bits, faults: &[Fault]) {
    let ran = fault_guest(bits, faults, false).run_in_all_tiers();
    let twin = fault_guest(bits, faults, true).run_in_all_tiers();
    assert_eq!(ran.log.len(), faults.len() * ROUNDS as usize);
    assert_eq!(twin.log.len(), ran.log.len());
    let mut wrong = BTreeMap::new();
    for (i, (record, wanted)) in ran.log.iter().zip(&twin.log).enumerate() {
        let Fault(name, _, vector, error, address) = faults[i % faults.len()];
        let right = Record { vector, error, cr2: address, ..*wanted };
        if *record != right {
            wrong.entry(name).or_insert((*record, right));
        }
    }
    for (name, (was, right)) in &wrong {
        eprintln!("{name}:\n  was   {was:x?}\n  right {right:x?}");
    }
    assert!(wrong.is_empty());
    assert_eq!(ran.memory, twin.memory);
    assert_eq!(ran.fx, twin.fx);
    assert_eq!(ran.dword(0, 32), ROUNDS * faults.len() as u32);
    assert_eq!(ran.dword(0, 36), 0);
}

#[test]
fn faults_leave_the_state_before_the_instruction_64() {
    check_faults(Bits::B64, &faults64());
}

#[test]
fn faults_leave_the_state_before_the_instruction_32() {
    check_faults(Bits::B32, &faults32());
}

/// The low bits that misalign an address were once those that mark a device's page in the TLB: the probe of an aligned access
/// took it for plain memory.
#[test]
fn misaligned_accesses_to_device_pages_fault() {
    // Local APIC registers, and an address where nothing is.
    for page in [0xfee0_0000_u64, 0xf000_0000] {
        for offset in [1, 2, 3] {
            let mut g = Guest::new(Bits::B64);
            g.map(NP, page | pte::P | pte::RW);
            g.assemble(CODE, |a| {
                let (mut again, mut go_on) = (a.create_label(), a.create_label());
                a.mov(ecx, 100)?;
                a.mov(esi, NP as i32)?;
                a.set_label(&mut again)?;
                a.lea(rax, ptr(go_on))?;
                a.mov(qword_ptr(RESUME as i32), rax)?;
                // Puts the page in the TLB.
                a.mov(eax, dword_ptr(rsi + 0x20))?;
                a.sqrtps(xmm0, xmmword_ptr(rsi + offset))?;
                a.set_label(&mut go_on)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.int(END)
            });
            let ran = g.run_in_all_tiers();
            assert!(ran.log.len() == 100 && ran.log.iter().all(|r| r.vector == GP), "{page:#x} + {offset}");
        }
    }
}

/// What a repeated string instruction has done before it faults stays done: its registers say how far it came.
#[test]
fn a_repeated_string_faults_after_what_it_did() {
    let mut g = Guest::new(Bits::B64);
    g.map(NP, 0);
    // (emit, RSI step, RDI step) with 100 to do and the 10th or later beyond the page's end.
    let cases: [(Emit, u64, u64, u64); 6] = [
        (|a| a.repe().cmpsb(), 1, 1, 10),
        (|a| a.repne().scasd(), 0, 4, 10),
        (|a| a.rep().lodsw(), 2, 0, 10),
        (|a| a.rep().stosb(), 0, 1, 10),
        (|a| a.rep().movsb(), 1, 1, 10),
        (|a| a.rep().stosq(), 0, 8, 10),
    ];
    for (i, (emit, src, dst, n)) in cases.iter().enumerate() {
        let at = CODE + STRIDE * i as u32;
        g.assemble(at, |a| {
            let mut go_on = a.create_label();
            a.lea(rax, ptr(go_on))?;
            a.mov(qword_ptr(RESUME), rax)?;
            a.mov(eax, 0x7777)?;
            a.mov(ecx, 100)?;
            // The side that does not move toward the edge stays in DATA.
            a.mov(esi, if *dst == 0 { NP - (src * n) as u32 } else { DATA })?;
            a.mov(edi, if *dst != 0 { NP - (dst * n) as u32 } else { DATA })?;
            emit(a)?;
            a.ud2()?;
            a.set_label(&mut go_on)?;
            if i + 1 < cases.len() { a.jmp(u64::from(at + STRIDE)) } else { a.int(END) }
        });
    }
    g.dump(NP - 0x100, 0x100);
    let ran = g.run_in_all_tiers();
    assert_eq!(ran.log.len(), cases.len());
    for (i, (r, (_, src, dst, n))) in ran.log.iter().zip(&cases).enumerate() {
        let write = i >= 3;
        assert_eq!((r.vector, r.error, r.cr2), (PF, if write { WRITE } else { READ }, NP64), "case {i}");
        assert_eq!(r.gpr[1], 100 - n, "case {i}: RCX");
        let from = |step: u64, edge: bool| if edge { NP64 } else { u64::from(DATA) + step * n };
        assert_eq!(r.gpr[7], if *dst != 0 { NP64 } else { u64::from(DATA) }, "case {i}: RDI");
        assert_eq!(r.gpr[6], from(*src, *dst == 0), "case {i}: RSI");
    }
}

// ---- traps and interrupts -------------------------------------------------------------------------------------------

/// TF: a #DB after each instruction, with the RIPs the SDM says: after each iteration of a repeated string, not after a load
/// of SS, after the instruction behind POPF, and after the POPF that clears TF.
#[test]
fn single_step() {
    let mut g = Guest::new(Bits::B64);
    let (labels, code) = g.assemble(CODE, |a| {
        let mut at: [CodeLabel; 16] = std::array::from_fn(|_| a.create_label());
        let (mut skip, mut f) = (a.create_label(), a.create_label());
        a.mov(edi, DATA)?;
        a.mov(eax, ss)?;
        a.mov(r8d, eax)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        a.set_label(&mut at[0])?;
        a.mov(eax, 1)?;
        a.set_label(&mut at[1])?;
        a.jmp(skip)?;
        a.nop()?;
        a.set_label(&mut skip)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut at[2])?;
        a.rep().stosb()?;
        a.set_label(&mut at[3])?;
        a.mov(ss, r8d)?;
        a.nop()?;
        a.set_label(&mut at[4])?;
        a.cmp(eax, 1)?;
        a.set_label(&mut at[5])?;
        a.jne(f)?;
        a.set_label(&mut at[6])?;
        a.call(f)?;
        a.set_label(&mut at[7])?;
        a.add(qword_ptr(DATA + 8), 5)?;
        a.set_label(&mut at[8])?;
        a.int3()?;
        a.set_label(&mut at[9])?;
        a.movaps(xmm0, xmm1)?;
        a.set_label(&mut at[10])?;
        a.pushfq()?;
        a.set_label(&mut at[11])?;
        a.and(dword_ptr(rsp), !0x100)?;
        a.set_label(&mut at[12])?;
        a.popfq()?;
        a.set_label(&mut at[13])?;
        a.nop()?;
        a.int(END)?;
        a.set_label(&mut f)?;
        a.ret()?;
        Ok((at, skip, f))
    });
    let (at, skip, f) = labels;
    let ip = |l: &CodeLabel| code.label_ip(l).expect("a label");
    let l = |i: usize| ip(&at[i]);
    let wanted = [
        (1, l(0)),
        (1, l(1)),
        (1, ip(&skip)),
        (1, l(2)),
        (1, l(2)),
        (1, l(2)),
        (1, l(3)),
        (1, l(4)),
        (1, l(5)),
        (1, l(6)),
        (1, ip(&f)),
        (1, l(7)),
        (1, l(8)),
        (3, l(9)),
        (1, l(10)),
        (1, l(11)),
        (1, l(12)),
        (1, l(13)),
    ];
    let ran = g.run_in_all_tiers();
    let got: Vec<(u8, u64)> = ran.log.iter().map(|r| (r.vector, r.rip)).collect();
    assert_eq!(got, wanted, "{got:x?}\n{wanted:x?}");
    for r in ran.log.iter().filter(|r| r.vector == 1) {
        assert_eq!(r.cr2 & 0x400f, 0x4000, "DR6 says BS alone: {r:x?}");
    }
}

/// Masks the PICs, as the timer that a BIOS leaves running must not interfere, and enables the local APIC in x2APIC mode.
fn use_x2apic_alone(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    a.mov(ecx, 0x80f)?;
    a.xor(edx, edx)?;
    a.mov(eax, 0x1ff)?;
    a.wrmsr()
}

/// STI holds interrupts off for one instruction, POPF does not; CLI behind STI wins; HLT ends by the interrupt.
#[test]
fn interrupts_come_at_the_right_instruction() {
    let mut g = Guest::new(Bits::B64);
    let (labels, code) = g.assemble(CODE, |a| {
        let mut at: [CodeLabel; 6] = std::array::from_fn(|_| a.create_label());
        let ipi = |a: &mut CodeAssembler| {
            a.cli()?;
            a.mov(ecx, 0x83f)?;
            a.xor(edx, edx)?;
            a.mov(eax, 0x41)?;
            a.wrmsr()
        };
        use_x2apic_alone(a)?;

        ipi(a)?;
        a.sti()?;
        a.inc(ebx)?;
        a.set_label(&mut at[0])?;
        a.inc(ebx)?;

        ipi(a)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x200)?;
        a.popfq()?;
        a.set_label(&mut at[1])?;
        a.inc(ebx)?;

        ipi(a)?;
        a.sti()?;
        a.cli()?;
        a.inc(ebx)?;
        a.sti()?;
        a.nop()?;
        a.set_label(&mut at[2])?;
        a.nop()?;

        ipi(a)?;
        a.sti()?;
        a.hlt()?;
        a.set_label(&mut at[3])?;
        a.nop()?;

        // Interrupts are on: the one that is asked for comes behind the WRMSR.
        a.mov(eax, 0x42)?;
        a.mov(ecx, 0x83f)?;
        a.wrmsr()?;
        a.set_label(&mut at[4])?;
        a.inc(ebx)?;
        a.cli()?;
        a.int(END)?;
        Ok(at)
    });
    let ip = |i: usize| code.label_ip(&labels[i]).expect("a label");
    let ran = g.run_in_all_tiers();
    let got: Vec<(u8, u64)> = ran.log.iter().map(|r| (r.vector, r.rip)).collect();
    assert_eq!(got, [(0x41, ip(0)), (0x41, ip(1)), (0x41, ip(2)), (0x41, ip(3)), (0x42, ip(4))]);
    assert_eq!(ran.log.iter().map(|r| r.gpr[3]).collect::<Vec<_>>(), [1, 2, 4, 4, 4]);
}

/// An IRET that sets IF lets in the interrupt that waits before the next instruction, also when translated code goes on by itself.
#[test]
fn an_iret_lets_in_the_interrupt_that_waits() {
    const TIMES: i32 = 60;
    let mut g = Guest::new(Bits::B64);
    let (back, code) = g.assemble(CODE, |a| {
        let (mut again, mut back) = (a.create_label(), a.create_label());
        use_x2apic_alone(a)?;
        a.mov(r12d, TIMES)?;
        a.set_label(&mut again)?;
        a.cli()?;
        a.mov(ecx, 0x83f)?;
        a.mov(eax, 0x41)?;
        // Every other time nothing waits.
        a.test(r12d, 1)?;
        let mut quiet = a.create_label();
        a.je(quiet)?;
        a.wrmsr()?;
        a.set_label(&mut quiet)?;
        a.mov(rax, rsp)?;
        a.mov(ecx, ss)?;
        a.push(rcx)?;
        a.push(rax)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x200)?;
        a.mov(ecx, cs)?;
        a.push(rcx)?;
        a.lea(rcx, ptr(back))?;
        a.push(rcx)?;
        a.iretq()?;
        a.set_label(&mut back)?;
        a.inc(ebx)?;
        a.dec(r12d)?;
        a.jne(again)?;
        a.cli()?;
        a.int(END)?;
        Ok(back)
    });
    let at = code.label_ip(&back).expect("a label");
    let ran = g.run_in_all_tiers();
    assert_eq!(ran.last.gpr[3], TIMES as u64);
    let got: Vec<_> = ran.log.iter().map(|r| (r.vector, r.rip, r.gpr[3])).collect();
    let wanted: Vec<_> = (0..TIMES as u64).filter(|n| n % 2 == 1).map(|n| (0x41, at, n)).collect();
    assert_eq!(got, wanted);
}
