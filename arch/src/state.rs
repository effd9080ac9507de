//! The guest state of one virtual processor, laid out for translated code.
//!
//! `repr(C)`: translated code addresses fields by byte offset ([`Loc`]), so the order is an interface; the asserts at the
//! end pin what the back end and the assembly thunks rely on. Hot fields come first.

use core::mem::offset_of;
use core::sync::atomic::AtomicI32;

use crate::segment::Segment;

/// One softmmu table as translated code sees it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbView {
    /// `(entries - 1) * 32`: the index of `addr` is `addr >> 7 & mask`, in bytes.
    pub mask: u64,
    /// Host address of the first 32-byte entry.
    pub table: u64,
}

/// A pending exception or exit raised by a helper, read by whoever called it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct FaultRecord {
    /// Nonzero: the helper did not complete, the instruction must be abandoned. See `runtime::fault`.
    pub pending: u32,
    /// Exception vector.
    pub vector: u32,
    /// Error code.
    pub error: u32,
    /// Nonzero when `error` is pushed.
    pub has_error: u32,
    /// CR2 for a page fault.
    pub cr2: u64,
}

/// Everything translated code reads or writes of one virtual processor.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct CpuState {
    /// Instructions left before the dispatcher wants control. A block subtracts its length from the 64-bit word formed
    /// with `attention`, stores the low half back and leaves when the 64-bit result is negative.
    pub budget: i32,
    /// 0, or -1 when somebody wants the dispatcher's attention; other threads set it.
    pub attention: AtomicI32,
    /// RIP of byte 0 of the page that is executed from: an instruction at page offset `off` has RIP `rip_base + off`,
    /// truncated to the code size. (Page offset is that of the *linear* address; with a CS base, RIP differs from it.)
    pub rip_base: u64,
    /// RAX … R15 in encoding order.
    pub gpr: [u64; 16],
    /// Lazy flags: result.
    pub cc_dst: u64,
    /// Lazy flags: operand.
    pub cc_src: u64,
    /// Lazy flags: second operand.
    pub cc_src2: u64,
    /// Lazy flags: a `CcOp`, in the low byte.
    pub cc_op: u32,
    /// Not 0: the helper that set `rip` has set `tb_flags` for what is there, which may run without the dispatcher between.
    pub onward: u32,
    /// Full RIP; valid outside translated code only.
    pub rip: u64,
    /// RFLAGS without the arithmetic flags (`control::rflags::SYS`).
    pub rflags_sys: u64,
    /// Softmmu tables by `MemMode`.
    pub tlb: [TlbView; 3],
    /// Host address of the current context's jump cache.
    pub jump_cache: u64,
    /// Host stack pointer at entry to translated code.
    pub host_sp: u64,
    /// Return address of the last helper call, in translated code.
    pub host_ret: u64,
    /// Result of an out-of-line memory access.
    pub mem_result: [u64; 2],
    /// What the last helper raised.
    pub fault: FaultRecord,
    /// Host address of the runtime's table of helper functions.
    pub helpers: u64,
    /// Host address of the runtime's vCPU; opaque here.
    pub vcpu: u64,
    /// Current `TbFlags` word.
    pub tb_flags: u32,
    /// MXCSR.
    pub mxcsr: u32,
    /// Host address of the table of execution counts, a u64 a block, for code that was compiled to count.
    pub exec_counts: u64,
    /// What an x87 instruction has just stored, before it goes to memory. Aligns what follows to 32 bytes.
    pub x87_operand: [u64; 2],
    /// Vector scratch for operations that are called out to.
    pub scratch: [[u64; 4]; 4],
    /// YMM0 … YMM15; XMM is the low half.
    pub vec: [[u64; 4]; 16],
    /// Physical x87 registers R0 … R7: 80-bit value in the low ten bytes. MMX registers are the low eight.
    pub fpr: [[u64; 2]; 8],
    /// Temporaries of the IR evaluator; they live here so that its operands address registers and temporaries alike. Not
    /// guest state: their content means nothing outside a block.
    pub temps: [u64; 64],
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word, TOP included.
    pub fsw: u16,
    /// Abridged tag word: bit i set when physical register i is in use.
    pub ftw: u16,
    /// Last x87 opcode, 11 bits.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 operand pointer.
    pub fdp: u64,
    /// Last x87 code selector.
    pub fcs: u16,
    /// Last x87 operand selector.
    pub fds: u16,
    /// Nonzero: the host's x87 unit has the registers, tags and status word; `fpr`, `ftw` and `fsw` are out of date. Only
    /// while guest code runs, and only with all exceptions masked. `fcw` is right always.
    pub x87_live: u32,
    /// ES CS SS DS FS GS LDTR TR.
    pub seg: [Segment; 8],
    /// GDTR base and limit.
    pub gdtr: Table,
    /// IDTR base and limit.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8 lives in the APIC's TPR; this is a copy kept by the runtime.
    pub cr8: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// PKRU.
    pub pkru: u32,
    /// Current privilege level.
    pub cpl: u32,
    /// DR0 … DR7.
    pub dr: [u64; 8],
    /// SYSCALL and SYSENTER registers and other MSRs that instructions use.
    pub msrs: Msrs,
    /// Nonzero after STI or MOV SS: events are blocked for one instruction. Bit 0: STI, bit 1: MOV SS.
    pub shadow: u32,
    /// Nonzero while NMIs are blocked.
    pub nmi_blocked: u32,
    /// Nonzero: HLT waits for an interrupt.
    pub halted: u32,
    /// Alignment.
    pub pad: u32,
    /// Guest instructions retired, not counting what `budget` has not yet been settled for.
    pub retired: u64,
    /// The PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u64,
}

/// MSRs that instructions other than RDMSR/WRMSR use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_offset: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
}

/// A field of [`CpuState`] by byte offset; what `get` and `put` in the IR name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Loc(pub u16);

impl Loc {
    #![allow(missing_docs)]
    pub const RIP_BASE: Loc = Loc(offset_of!(CpuState, rip_base) as u16);
    pub const RIP: Loc = Loc(offset_of!(CpuState, rip) as u16);
    pub const CC_DST: Loc = Loc(offset_of!(CpuState, cc_dst) as u16);
    pub const CC_SRC: Loc = Loc(offset_of!(CpuState, cc_src) as u16);
    pub const CC_SRC2: Loc = Loc(offset_of!(CpuState, cc_src2) as u16);
    /// Read and written as I32.
    pub const CC_OP: Loc = Loc(offset_of!(CpuState, cc_op) as u16);
    pub const RFLAGS_SYS: Loc = Loc(offset_of!(CpuState, rflags_sys) as u16);
    pub const MXCSR: Loc = Loc(offset_of!(CpuState, mxcsr) as u16);
    pub const FCW: Loc = Loc(offset_of!(CpuState, fcw) as u16);
    pub const FSW: Loc = Loc(offset_of!(CpuState, fsw) as u16);
    pub const FTW: Loc = Loc(offset_of!(CpuState, ftw) as u16);
    pub const FOP: Loc = Loc(offset_of!(CpuState, fop) as u16);
    pub const FIP: Loc = Loc(offset_of!(CpuState, fip) as u16);
    pub const FDP: Loc = Loc(offset_of!(CpuState, fdp) as u16);
    pub const FCS: Loc = Loc(offset_of!(CpuState, fcs) as u16);
    pub const FDS: Loc = Loc(offset_of!(CpuState, fds) as u16);
    pub const X87_OPERAND: Loc = Loc(offset_of!(CpuState, x87_operand) as u16);
    /// What helpers that are `quiet` may read and write: bytes of the x87 registers, of the status, tag and control word, and
    /// of the x87 operand.
    pub const X87: [core::ops::Range<u16>; 3] = [
        Self::fpr(0).0..Self::fpr(7).0 + 16,
        Self::FCW.0..Self::FTW.0 + 2,
        Self::X87_OPERAND.0..Self::X87_OPERAND.0 + 16,
    ];
    pub const CR0: Loc = Loc(offset_of!(CpuState, cr0) as u16);
    pub const PKRU: Loc = Loc(offset_of!(CpuState, pkru) as u16);
    /// The first of the evaluator's temporaries.
    pub const TEMPS: Loc = Loc(offset_of!(CpuState, temps) as u16);
    pub const KERNEL_GS_BASE: Loc = Loc((offset_of!(CpuState, msrs) + offset_of!(Msrs, kernel_gs_base)) as u16);

    /// General-purpose register `n` by encoding, 64 bits.
    #[must_use]
    pub const fn gpr(n: u8) -> Loc {
        Loc((offset_of!(CpuState, gpr) + (n & 15) as usize * 8) as u16)
    }
    /// The low half of vector register `n`, 128 bits.
    #[must_use]
    pub const fn xmm(n: u8) -> Loc {
        Loc((offset_of!(CpuState, vec) + (n & 15) as usize * 32) as u16)
    }
    /// The high half of vector register `n`, 128 bits.
    #[must_use]
    pub const fn ymm_high(n: u8) -> Loc {
        Loc(Self::xmm(n).0 + 16)
    }
    /// *Physical* x87 register `n` (MMX register `n`), 16 bytes apart.
    #[must_use]
    pub const fn fpr(n: u8) -> Loc {
        Loc((offset_of!(CpuState, fpr) + (n & 7) as usize * 16) as u16)
    }
    /// Base of segment register `n` (encoding order), 64 bits.
    #[must_use]
    pub const fn seg_base(n: u8) -> Loc {
        Loc((offset_of!(CpuState, seg) + (n & 7) as usize * size_of::<Segment>() + offset_of!(Segment, base)) as u16)
    }
    /// Selector of segment register `n` (encoding order), 16 bits.
    #[must_use]
    pub const fn seg_selector(n: u8) -> Loc {
        Loc((offset_of!(CpuState, seg) + (n & 7) as usize * size_of::<Segment>() + offset_of!(Segment, selector))
            as u16)
    }
    /// Vector scratch `n` (0..4), 256 bits.
    #[must_use]
    pub const fn scratch(n: u8) -> Loc {
        Loc((offset_of!(CpuState, scratch) + (n & 3) as usize * 32) as u16)
    }
}

impl CpuState {
    /// A state of zeroes; `runtime` gives it its reset values.
    #[must_use]
    pub fn zeroed() -> Box<Self> {
        Box::new(Self {
            budget: 0,
            attention: AtomicI32::new(0),
            rip_base: 0,
            gpr: [0; 16],
            cc_dst: 0,
            cc_src: 0,
            cc_src2: 0,
            cc_op: crate::flags::CcOp::FLAGS.0 as u32,
            onward: 0,
            rip: 0,
            rflags_sys: 0,
            tlb: [TlbView { mask: 0, table: 0 }; 3],
            jump_cache: 0,
            host_sp: 0,
            host_ret: 0,
            mem_result: [0; 2],
            fault: FaultRecord::default(),
            helpers: 0,
            vcpu: 0,
            tb_flags: 0,
            mxcsr: 0x1f80,
            exec_counts: 0,
            x87_operand: [0; 2],
            scratch: [[0; 4]; 4],
            vec: [[0; 4]; 16],
            fpr: [[0; 2]; 8],
            temps: [0; 64],
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            fcs: 0,
            fds: 0,
            x87_live: 0,
            seg: [Segment::default(); 8],
            gdtr: Table::default(),
            idtr: Table::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            xcr0: 1,
            efer: 0,
            xss: 0,
            pkru: 0,
            cpl: 0,
            dr: [0; 8],
            msrs: Msrs::default(),
            shadow: 0,
            nmi_blocked: 0,
            halted: 0,
            pad: 0,
            retired: 0,
            pdpte: [0; 4],
        })
    }

    /// The whole RFLAGS register: the lazy flags made, the rest from `rflags_sys`.
    #[inline]
    #[must_use]
    pub fn rflags(&self) -> u64 {
        use crate::control::rflags;
        let arith =
            crate::flags::arith_flags(crate::flags::CcOp(self.cc_op as u8), self.cc_dst, self.cc_src, self.cc_src2);
        arith | (self.rflags_sys & rflags::SYS) | rflags::FIXED1
    }

    /// Sets the whole RFLAGS register, as given; no privilege rule is applied.
    pub fn set_rflags(&mut self, value: u64) {
        use crate::control::rflags;
        self.cc_op = crate::flags::CcOp::FLAGS.0 as u32;
        self.cc_src = value & rflags::ARITH;
        self.rflags_sys = value & rflags::SYS;
    }
}

// What translated code and the thunks rely on.
const _: () = {
    assert!(offset_of!(CpuState, budget) == 0);
    assert!(offset_of!(CpuState, attention) == 4);
    assert!(offset_of!(CpuState, rip_base) == 8);
    assert!(offset_of!(CpuState, gpr) == 16);
    assert!(offset_of!(CpuState, vec) % 32 == 0);
    assert!(offset_of!(CpuState, scratch) % 32 == 0);
    assert!(offset_of!(CpuState, fpr) % 16 == 0);
    // The evaluator addresses words 8 .. 8 + 2048 by a one-byte index.
    assert!(offset_of!(CpuState, temps) % 16 == 8 || offset_of!(CpuState, temps) % 16 == 0);
    assert!(offset_of!(CpuState, gdtr) <= 8 + 2048);
    assert!(size_of::<CpuState>() < 65536);
};
