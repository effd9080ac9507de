//! Small guests that run one kind of loop in 64-bit mode with paging on: what `guest-speed` times.
//!
//! Each is a Multiboot image made here: 32-bit code maps the first gigabyte with 2 MiB pages and enters 64-bit mode, the
//! loop runs its body a given number of times, and isa-debug-exit ends the machine with status 1.

use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction};

const BASE: u32 = 0x10_0000;
const ENTRY: u32 = BASE + 0x20;
const GDT: u32 = BASE + 0x200;
const CODE64: u32 = BASE + 0x400;
/// PML4, PDPT and page directory, zero as loaded.
const TABLES: u32 = BASE + 0x10_0000;
/// What loops work on.
const DATA: u32 = BASE + 0x20_0000;
const END: u32 = BASE + 0x40_0000;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A loop: its name, how many guest instructions one turn retires (with the loop's own two), and its body.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// For the table.
    pub name: &'static str,
    /// What it stands for.
    pub what: &'static str,
    /// Guest instructions in one turn, on average.
    pub instructions: f64,
    pub(crate) body: Emit,
}

/// All kernels. RCX counts; RSI points to 1 MiB of data; the other registers are the body's.
pub const KERNELS: [Kernel; 14] = [
    Kernel { name: "alu", what: "register arithmetic", instructions: 10.0, body: alu },
    Kernel { name: "memory", what: "loads and stores, 16 KiB", instructions: 10.0, body: memory },
    Kernel { name: "bignum", what: "MUL and ADC chains", instructions: 14.0, body: bignum },
    Kernel { name: "branches", what: "data-dependent branches", instructions: 8.5, body: branches },
    Kernel { name: "calls", what: "CALL and RET", instructions: 10.0, body: calls },
    Kernel { name: "indirect", what: "indirect calls", instructions: 11.0, body: indirect },
    Kernel { name: "scalar-fp", what: "scalar SSE2: MULSD, ADDSD, SUBSD, SQRTSD", instructions: 11.0, body: scalar_fp },
    Kernel { name: "sse-fp", what: "MULPS and ADDPS from memory", instructions: 11.0, body: sse_fp },
    Kernel { name: "fma", what: "256-bit VFMADD231PS from memory", instructions: 8.0, body: fma },
    Kernel { name: "x87", what: "an x87 loop: FILD, FDIV, FADDP, FMUL, FXCH", instructions: 12.0, body: x87 },
    Kernel { name: "sha", what: "SHA-NI rounds", instructions: 10.0, body: sha },
    Kernel { name: "aes", what: "AESENC rounds", instructions: 10.0, body: aes },
    Kernel { name: "pclmul", what: "PCLMULQDQ folding, CRC32", instructions: 10.0, body: pclmul },
    Kernel { name: "mulx", what: "MULX with ADCX and ADOX chains", instructions: 17.0, body: mulx },
];

fn alu(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.add(rax, rbx)?;
    a.xor(rdx, rax)?;
    a.lea(rdi, ptr(rax + rdx * 2))?;
    a.rol(rdi, 3)?;
    a.sub(rbx, rdi)?;
    a.and(rax, 0x7fff_ffff)?;
    a.imul_2(rdx, rdi)?;
    a.shr(rdi, 7)
}

fn memory(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rdi, rcx)?;
    a.and(edi, 0x3ff8)?;
    a.mov(rax, qword_ptr(rsi + rdi))?;
    a.add(rax, qword_ptr(rsi + rdi + 8))?;
    a.mov(qword_ptr(rsi + rdi), rax)?;
    a.movzx(edx, byte_ptr(rsi + rdi + 3))?;
    a.add(byte_ptr(rsi + rdi + 5), dl)?;
    a.mov(dword_ptr(rsi + rdi + 16), edx)
}

fn bignum(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for i in 0..2 {
        a.mov(rax, qword_ptr(rsi + 16 * i))?;
        a.mul(rbx)?;
        a.add(rax, rdi)?;
        a.adc(rdx, 0)?;
        a.mov(qword_ptr(rsi + 16 * i + 8), rax)?;
        a.mov(rdi, rdx)?;
    }
    Ok(())
}

/// A linear congruential generator decides, one way or the other by turns: eight or nine instructions with
/// the loop's own.
fn branches(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut odd, mut join) = (a.create_label(), a.create_label());
    a.imul_3(eax, eax, 1_664_525)?;
    a.add(eax, 1_013_904_223)?;
    a.test(eax, 0x0100_0000)?;
    a.jne(odd)?;
    a.add(rbx, 1)?;
    a.jmp(join)?;
    a.set_label(&mut odd)?;
    a.sub(rdx, 1)?;
    a.set_label(&mut join)?;
    a.add(rdi, rax)
}

fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut function, mut over) = (a.create_label(), a.create_label());
    a.call(function)?;
    a.call(function)?;
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.add(rax, 1)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.add(rdi, rax)
}

fn indirect(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut function, mut over) = (a.create_label(), a.create_label());
    a.lea(rbx, ptr(function))?;
    a.call(rbx)?;
    a.call(rbx)?;
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.add(rax, 1)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.nop()
}

fn scalar_fp(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.movsd_2(xmm1, qword_ptr(rsi))?;
    a.subsd(xmm1, qword_ptr(rsi + 8))?;
    a.movapd(xmm2, xmm1)?;
    a.mulsd(xmm2, xmm1)?;
    a.addsd(xmm2, qword_ptr(rsi + 16))?;
    a.sqrtsd(xmm3, xmm2)?;
    a.mulsd(xmm3, xmm2)?;
    a.addsd(xmm0, xmm3)?;
    a.movsd_2(qword_ptr(rsi + 24), xmm0)
}

fn sse_fp(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (i, (x, y)) in [(xmm0, xmm4), (xmm1, xmm5), (xmm2, xmm6)].into_iter().enumerate() {
        a.movaps(y, xmmword_ptr(rsi + 32 * i))?;
        a.mulps(y, xmmword_ptr(rsi + 32 * i + 16))?;
        a.addps(x, y)?;
    }
    Ok(())
}

fn fma(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.vmovups(ymm4, ymmword_ptr(rsi))?;
    a.vfmadd231ps(ymm0, ymm4, ymmword_ptr(rsi + 32))?;
    a.vfmadd231ps(ymm1, ymm4, ymmword_ptr(rsi + 64))?;
    a.vfmadd231ps(ymm2, ymm4, ymmword_ptr(rsi + 96))?;
    a.vaddps(ymm3, ymm3, ymm0)?;
    a.vmovups(ymmword_ptr(rsi + 128), ymm3)
}

/// `s += x / i; x = x * a + b / i` as a compiler has it, with the stack as deep after a turn as before.
fn x87(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(rsi), ecx)?;
    // fild dword [rsi]; fld st(1); fdiv st, st(1); faddp st(3), st; fxch st(1)
    a.db(&[0xdb, 0x06, 0xd9, 0xc1, 0xd8, 0xf1, 0xde, 0xc3, 0xd9, 0xc9])?;
    // fmul dword [rsi + 64]; fxch st(1); fdivr dword [rsi + 64]; faddp st(1), st
    a.db(&[0xd8, 0x4e, 0x40, 0xd9, 0xc9, 0xd8, 0x7e, 0x40, 0xde, 0xc1])
}

fn sha(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sha256rnds2(xmm1, xmm2)?;
    a.pshufd(xmm0, xmm0, 0x0e)?;
    a.sha256rnds2(xmm2, xmm1)?;
    a.sha256msg1(xmm3, xmm4)?;
    a.movdqa(xmm5, xmm4)?;
    a.palignr(xmm5, xmm3, 4)?;
    a.paddd(xmm3, xmm5)?;
    a.sha256msg2(xmm3, xmm4)
}

fn aes(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for i in 0..4 {
        a.aesenc(xmm0, xmm4)?;
        a.aesenc(xmm1, xmmword_ptr(rsi + 16 * i))?;
    }
    Ok(())
}

fn pclmul(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.movdqa(xmm1, xmm0)?;
    a.pclmulqdq(xmm0, xmm2, 0x11)?;
    a.pclmulqdq(xmm1, xmm2, 0)?;
    a.pxor(xmm0, xmm1)?;
    a.pxor(xmm0, xmmword_ptr(rsi))?;
    a.crc32(rax, rbx)?;
    a.crc32(rax, qword_ptr(rsi + 8))?;
    a.crc32(rbx, rax)
}

fn mulx(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.xor(edi, edi)?;
    for i in 0..3 {
        a.mulx(rbx, rax, qword_ptr(rsi + 8 * i))?;
        a.adcx(rax, qword_ptr(rsi + 64 + 8 * i))?;
        a.adox(rdi, rax)?;
        a.mov(qword_ptr(rsi + 64 + 8 * i), rdi)?;
    }
    a.adc(rdi, rbx)?;
    a.sbb(rdx, rdi)
}

impl Kernel {
    /// The guest that runs this loop `turns` times.
    ///
    /// # Errors
    /// When iced cannot encode it: a mistake here.
    pub fn image(&self, turns: u64) -> Result<Vec<u8>, IcedError> {
        let mut image = vec![0; (CODE64 - BASE) as usize];
        let mut put = |at: u32, bytes: &[u8]| {
            let at = (at - BASE) as usize;
            if image.len() < at + bytes.len() {
                image.resize(at + bytes.len(), 0);
            }
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(ENTRY, &entry()?);
        // Null, 64-bit code, data.
        for (i, descriptor) in [0u64, 0x0020_9b00_0000_0000, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            put(GDT + 8 * i as u32, &descriptor.to_le_bytes());
        }
        put(GDT + 0x20, &[0x17, 0]);
        put(GDT + 0x22, &u64::from(GDT).to_le_bytes());
        let mut a = CodeAssembler::new(64)?;
        a.mov(rsp, u64::from(TABLES))?;
        a.mov(rsi, u64::from(DATA))?;
        for register in [rax, rbx, rdx, rdi] {
            a.mov(register, 0x0123_4567_89ab_cdefu64)?;
        }
        // XCR0: x87, SSE, AVX.
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        a.mov(rax, 0x0123_4567_89ab_cdefu64)?;
        a.mov(rdx, rax)?;
        // Numbers near 1, and fninit; fld1; fldz.
        for i in 0..64 {
            a.mov(dword_ptr(rsi + 4 * i), 0x3f80_0000 + i)?;
        }
        a.db(&[0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0xee, 0xd9, 0xc9])?;
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.mov(rcx, turns)?;
        a.test(rcx, rcx)?;
        a.je(done)?;
        a.set_label(&mut again)?;
        (self.body)(&mut a)?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.set_label(&mut done)?;
        a.xor(eax, eax)?;
        a.mov(edx, 0xf4)?;
        a.out(dx, eax)?;
        a.hlt()?;
        put(CODE64, &a.assemble(CODE64.into())?);
        let end = BASE + image.len() as u32;
        let flags = 1 << 16;
        let header = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags), BASE, BASE, end, END, ENTRY];
        for (i, word) in header.into_iter().enumerate() {
            image[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
        Ok(image)
    }
}

/// From Multiboot's 32-bit mode to 64-bit mode: one page directory of 2 MiB pages.
fn entry() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut next = a.create_label();
    a.mov(dword_ptr(TABLES), (TABLES + 0x1003) as i32)?;
    a.mov(dword_ptr(TABLES + 0x1000), (TABLES + 0x2003) as i32)?;
    a.mov(edi, TABLES + 0x2000)?;
    a.mov(eax, 0x183)?;
    a.set_label(&mut next)?;
    a.mov(dword_ptr(edi), eax)?;
    a.add(edi, 8)?;
    a.add(eax, 0x20_0000)?;
    a.cmp(edi, (TABLES + 0x3000) as i32)?;
    a.jne(next)?;
    // PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    a.mov(eax, 0x4_06a0)?;
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.mov(eax, 0x100)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(eax, 0x8001_0031u32)?;
    a.mov(cr0, eax)?;
    a.lgdt(ptr(GDT + 0x20))?;
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, 8, CODE64)?)?;
    a.assemble(ENTRY.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kernels_assemble() {
        for kernel in KERNELS {
            let image = kernel.image(1000).expect(kernel.name);
            assert!(image.len() > (CODE64 - BASE) as usize && image.len() < 0x1_0000);
        }
    }
}
