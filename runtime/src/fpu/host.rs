//! Runs x87 instructions of the guest on the host's x87 unit.
//!
//! Two ways. With all exceptions masked the registers stay in the host's unit from one instruction to the next ([`load`],
//! [`execute`], [`park`]); nothing else in this process uses that unit. Otherwise each instruction is on its own ([`run`]):
//!
//! FRSTOR loads the guest's registers, the instruction runs from a table of all x87 encodings, FNSAVE takes the registers
//! back and leaves the host's unit initialised as the ABI wants it. Unmasked exceptions are safe: they stay pending and
//! FNSAVE clears them before any waiting instruction. Only encodings that [`super::x87::decode`] knows get here.
#![allow(unsafe_code)] // Inline assembly is the only way to run an x87 instruction.

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
use twofold_arch::{CpuState, fpu::X87Op};

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

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
pub use super::soft::run;

/// Brings the guest's x87 registers into the host's unit. All exceptions are masked.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
pub fn load(_s: &mut CpuState) {}

/// Brings them back, and leaves the unit initialised.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
pub fn park(_s: &mut CpuState) {}

/// Runs one instruction on what [`load`] has brought; the result is as [`X87Op`] says.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
pub fn execute(_s: &mut CpuState, _op: X87Op, _lo: u64, _hi: u64) -> u64 {
    0
}

/// Gives the host's unit a control word that masks all exceptions.
#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
pub fn set_control(_control: u16) {}

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub use x86_64::{execute, load, park, run, set_control};

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
mod x86_64 {
    use core::arch::{asm, global_asm};

    use twofold_arch::CpuState;
    use twofold_arch::control::rflags;
    use twofold_arch::fpu::{X87Op, X87Operand};

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

    fn physical(top: u16, i: usize) -> usize {
        (usize::from(top) + i) & 7
    }

    impl Image {
        fn new(r: &Registers) -> Self {
            let top = r.fsw >> 11 & 7;
            let mut image = Self { fcw: r.fcw.into(), fsw: r.fsw.into(), tags: 0, pointers: [0; 4], st: [[0; 10]; 8] };
            for i in 0..8 {
                image.tags |= if r.ftw >> i & 1 != 0 { 0 } else { 3 << (2 * i) };
                let [lo, hi] = r.fpr[physical(top, i)];
                image.st[i][..8].copy_from_slice(&lo.to_le_bytes());
                image.st[i][8..].copy_from_slice(&(hi as u16).to_le_bytes());
            }
            image
        }

        fn registers(&self) -> Registers {
            let mut r = Registers { fpr: [[0; 2]; 8], fcw: self.fcw as u16, fsw: self.fsw as u16, ftw: 0 };
            let top = r.fsw >> 11 & 7;
            for i in 0..8 {
                if self.tags >> (2 * i) & 3 != 3 {
                    r.ftw |= 1 << i;
                }
                let [b0, b1, b2, b3, b4, b5, b6, b7, h0, h1] = self.st[i];
                r.fpr[physical(top, i)] =
                    [u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]), u64::from(u16::from_le_bytes([h0, h1]))];
            }
            r
        }
    }

    fn stub(first: u8, modrm: u8, memory: bool) -> *const [u8; 4] {
        let first = usize::from(first & 7);
        if memory {
            &raw const twofold_x87_memory[first * 8 + usize::from(modrm >> 3 & 7)]
        } else {
            &raw const twofold_x87_registers[first * 64 + usize::from(modrm & 63)]
        }
    }

    /// Runs an instruction: `first` is its first byte less 0xd8, a memory form uses only ModRM's `reg`. `flags` are the guest's
    /// arithmetic flags, and the returned ones what it made of them.
    #[must_use]
    pub fn run(
        r: Registers,
        first: u16,
        modrm: u8,
        memory: bool,
        flags: u64,
        operand: &mut [u8; 16],
    ) -> (Registers, u64) {
        let stub = stub(first as u8, modrm, memory);
        let mut image = Image::new(&r);
        let mut flags = flags & rflags::ARITH | 2;
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
        (Registers { fcw: r.fcw, ..image.registers() }, flags)
    }

    /// Brings the guest's x87 registers into the host's unit. All exceptions are masked.
    pub fn load(s: &mut CpuState) {
        if s.x87_live != 0 {
            return;
        }
        let r = Registers { fpr: s.fpr, fcw: s.fcw | 0x3f, fsw: s.fsw, ftw: s.ftw };
        let image = Image::new(&r);
        // SAFETY: reads 108 bytes. The compiler does not use the x87 unit; `park` leaves it as the ABI wants it before anybody
        // who might gets to run.
        unsafe { asm!("frstor [{}]", in(reg) &raw const image, options(nostack, preserves_flags)) };
        s.x87_live = 1;
    }

    /// Brings them back, and leaves the unit initialised.
    pub fn park(s: &mut CpuState) {
        if s.x87_live == 0 {
            return;
        }
        let mut image = Image::new(&Registers { fpr: [[0; 2]; 8], fcw: 0, fsw: 0, ftw: 0 });
        // SAFETY: writes 108 bytes.
        unsafe { asm!("fnsave [{}]", in(reg) &raw mut image, options(nostack, preserves_flags)) };
        let r = image.registers();
        (s.fpr, s.fsw, s.ftw, s.x87_live) = (r.fpr, r.fsw, r.ftw, 0);
    }

    /// Runs one instruction on what [`load`] has brought; the result is as [`X87Op`] says.
    pub fn execute(s: &mut CpuState, op: X87Op, lo: u64, hi: u64) -> u64 {
        let Some(kind) = op.operand() else { return 0 };
        let mut operand = [lo, hi];
        let flags_in = if kind == X87Operand::ReadsFlags { lo & rflags::ARITH } else { 0 } | 2;
        let (flags, ax): (u64, u64);
        // SAFETY: the stub is one x87 instruction that touches the x87 unit, the arithmetic flags, AX and at most ten bytes at
        // RDI, then returns. All exceptions are masked.
        unsafe {
            asm!(
                "push {flags}",
                "popfq",
                "call {stub}",
                "pushfq",
                "pop {flags}",
                stub = in(reg) stub(op.first(), op.modrm(), op.memory()),
                flags = inout(reg) flags_in => flags,
                inout("rax") 0u64 => ax,
                in("rdi") operand.as_mut_ptr(),
            );
        }
        match kind {
            X87Operand::Store(10) => {
                s.x87_operand = operand;
                operand[0]
            }
            X87Operand::Store(n) => operand[0] & u64::MAX >> (64 - 8 * u32::from(n)),
            X87Operand::Status => ax & 0xffff,
            X87Operand::WritesFlags => flags & rflags::ARITH,
            _ => 0,
        }
    }

    /// Gives the host's unit a control word that masks all exceptions.
    pub fn set_control(control: u16) {
        let control = control | 0x3f;
        // SAFETY: reads two bytes.
        unsafe { asm!("fldcw [{}]", in(reg) &raw const control, options(nostack, preserves_flags)) };
    }
}
