//! Code that changes: an instruction patched again and again, and functions made, run some times, and made anew.
#![allow(unsafe_code)] // code made at run time

use crate::{Random, mix};

/// Memory that may be written and run.
pub struct CodeBuffer {
    start: *mut u8,
    length: usize,
}

impl CodeBuffer {
    pub fn new(length: usize) -> Option<Self> {
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping wherever the kernel likes.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
        (p != libc::MAP_FAILED).then_some(Self { start: p.cast(), length })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: all of the mapping, borrowed from its owner.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    /// Calls the function that lies at `offset`.
    ///
    /// # Safety
    /// A whole function in the System V convention lies there.
    pub unsafe fn call(&self, offset: usize, argument: u64) -> u64 {
        // SAFETY: as above.
        let function: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(self.start.add(offset)) };
        function(argument)
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// A function: RAX = RDI, then some operations with constants, then RET. Its length.
pub fn write_function(out: &mut [u8], random: &mut Random, operations: usize) -> usize {
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
        at
    };
    put(&[0x48, 0x89, 0xf8]); // mov rax, rdi
    for _ in 0..operations {
        let bits = random.next();
        let constant = (bits as u32 >> 4).to_le_bytes();
        match bits & 3 {
            0 => put(&[0x48, 0x05]),                      // add rax, imm32
            1 => put(&[0x48, 0x35]),                      // xor rax, imm32
            2 => put(&[0x48, 0x69, 0xc0]),                // imul rax, rax, imm32
            _ => put(&[0x48, 0xc1, 0xc0, 7, 0x48, 0x2d]), // rol rax, 7; sub rax, imm32
        };
        put(&constant);
    }
    put(&[0xc3])
}

pub fn patch(units: u64) -> Option<u64> {
    let mut code = CodeBuffer::new(4096)?;
    let (mut random, mut sum) = (Random::new(16), 0);
    write_function(code.bytes(), &mut random, 1);
    code.bytes()[..8].copy_from_slice(&[0x48, 0x8d, 0x87, 0, 0, 0, 0, 0xc3]); // lea rax, [rdi + disp32]; ret
    for i in 0..units * 100 {
        code.bytes()[3..7].copy_from_slice(&(i as u32 & 0x7fff_ffff).to_le_bytes());
        for j in 0..20 {
            // SAFETY: the function written above.
            sum = mix(sum, unsafe { code.call(0, j) });
        }
    }
    Some(sum)
}

pub fn generate(units: u64) -> Option<u64> {
    let mut code = CodeBuffer::new(1 << 16)?;
    let (mut random, mut sum) = (Random::new(17), 0);
    for _ in 0..units {
        let mut starts = Vec::new();
        let mut at = 0;
        for _ in 0..64 {
            starts.push(at);
            let operations = 4 + (random.next() % 24) as usize;
            at += write_function(&mut code.bytes()[at..], &mut random, operations);
            at = at.next_multiple_of(16);
        }
        for i in 0..100 {
            for &start in &starts {
                // SAFETY: functions written above.
                sum ^= unsafe { code.call(start, i) };
            }
        }
    }
    Some(sum)
}
