//! Runs one x87 instruction of the guest on the host's x87 unit.
//!
//! FRSTOR loads the guest's registers, the instruction runs from a table of all x87 encodings, FNSAVE takes the registers
//! back and leaves the host's unit initialised as the ABI wants it. Unmasked exceptions are safe: they stay pending and
//! FNSAVE clears them before any waiting instruction. Only encodings that [`super::x87::decode`] knows get here.
#![allow(unsafe_code)] // Inline assembly is the only way to run an x87 instruction.

/// The part of the x87 state that computing instructions read and write.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    /// Physical registers.
    pub fpr: [[u64; 2]; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word.
    pub ftw: u16,
}

/// Runs an instruction: `first` is its first byte less 0xd8, a memory form uses only ModRM's `reg`. `flags` are the
/// guest's arithmetic flags, and the returned ones what it made of them. `None` on hosts without an x87.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn run(
    _r: Registers,
    _first: u16,
    _modrm: u8,
    _memory: bool,
    _flags: u64,
    _operand: &mut [u8; 16],
) -> Option<(Registers, u64)> {
    None
}

#[cfg(target_arch = "x86_64")]
pub use x86_64::run;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use core::arch::{asm, global_asm};

    use super::Registers;

    // Register forms: first byte, ModRM C0 … FF, RET, a byte of padding. Memory forms: first byte, ModRM with [rdi].
    global_asm!(
        ".pushsection .text.twofold_x87,\"ax\",@progbits",
        ".balign 16",
        "twofold_x87_registers:",
        ".set twofold_x87_first, 0xd8",
        ".rept 8",
        ".set twofold_x87_modrm, 0xc0",
        ".rept 64",
        ".byte twofold_x87_first, twofold_x87_modrm, 0xc3, 0xcc",
        ".set twofold_x87_modrm, twofold_x87_modrm + 1",
        ".endr",
        ".set twofold_x87_first, twofold_x87_first + 1",
        ".endr",
        "twofold_x87_memory:",
        ".set twofold_x87_first, 0xd8",
        ".rept 8",
        ".set twofold_x87_modrm, 0x07",
        ".rept 8",
        ".byte twofold_x87_first, twofold_x87_modrm, 0xc3, 0xcc",
        ".set twofold_x87_modrm, twofold_x87_modrm + 8",
        ".endr",
        ".set twofold_x87_first, twofold_x87_first + 1",
        ".endr",
        ".popsection",
    );

    unsafe extern "C" {
        safe static twofold_x87_registers: [[u8; 4]; 512];
        safe static twofold_x87_memory: [[u8; 4]; 64];
    }

    /// What FRSTOR loads and FNSAVE stores, in the 32-bit protected-mode layout.
    #[repr(C)]
    struct Image {
        fcw: u32,
        fsw: u32,
        tags: u32,
        pointers: [u32; 4],
        st: [[u8; 10]; 8],
    }
    const _: () = assert!(size_of::<Image>() == 108);

    /// See the module.
    #[must_use]
    pub fn run(
        mut r: Registers,
        first: u16,
        modrm: u8,
        memory: bool,
        flags: u64,
        operand: &mut [u8; 16],
    ) -> Option<(Registers, u64)> {
        let first = usize::from(first & 7);
        let stub = if memory {
            &raw const twofold_x87_memory[first * 8 + usize::from(modrm >> 3 & 7)]
        } else {
            &raw const twofold_x87_registers[first * 64 + usize::from(modrm & 63)]
        };
        let top = r.fsw >> 11 & 7;
        let physical = |top: u16, i: usize| (usize::from(top) + i) & 7;
        let mut image = Image { fcw: r.fcw.into(), fsw: r.fsw.into(), tags: 0, pointers: [0; 4], st: [[0; 10]; 8] };
        for i in 0..8 {
            image.tags |= if r.ftw >> i & 1 != 0 { 0 } else { 3 << (2 * i) };
            let [lo, hi] = r.fpr[physical(top, i)];
            image.st[i][..8].copy_from_slice(&lo.to_le_bytes());
            image.st[i][8..].copy_from_slice(&(hi as u16).to_le_bytes());
        }
        let mut flags = flags & twofold_arch::control::rflags::ARITH | 2;
        // SAFETY: the image is 108 bytes; the stub is one x87 instruction that touches the x87 unit, the arithmetic flags and at
        // most ten bytes at RDI, then returns. FNSAVE leaves the unit as the ABI wants it at function boundaries.
        unsafe {
            asm!(
                "frstor [{image}]",
                "push {flags}",
                "popfq",
                "call {stub}",
                "fnsave [{image}]",
                "pushfq",
                "pop {flags}",
                image = in(reg) &raw mut image,
                stub = in(reg) stub,
                flags = inout(reg) flags,
                in("rdi") operand.as_mut_ptr(),
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        (r.fcw, r.fsw, r.ftw) = (image.fcw as u16, image.fsw as u16, 0);
        let top = r.fsw >> 11 & 7;
        for i in 0..8 {
            if image.tags >> (2 * i) & 3 != 3 {
                r.ftw |= 1 << i;
            }
            let [b0, b1, b2, b3, b4, b5, b6, b7, h0, h1] = image.st[i];
            r.fpr[physical(top, i)] =
                [u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]), u64::from(u16::from_le_bytes([h0, h1]))];
        }
        Some((r, flags))
    }
}
