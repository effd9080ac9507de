//! What a block may call out to: the runtime's helpers, with the attributes passes and back end need.
//!
//! A helper gets up to four I64 arguments and makes one I64. One that `faults` may set `state.fault`; whoever called it
//! then abandons the guest instruction. One that is `pure` looks at its arguments only, one that is `quiet` at x87 state too. All
//! others may read and write any field of the guest state, so values read before the call are read again after it.

/// Attributes of a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelperInfo {
    /// Name in the text form.
    pub name: &'static str,
    /// Number of arguments, 0..=4.
    pub args: u8,
    /// Whether it may raise an exception (or a VM exit) instead of completing.
    pub faults: bool,
    /// Whether its result depends on its arguments alone and it changes nothing.
    pub pure: bool,
    /// Whether it reads and changes nothing of the guest state but [`twofold_arch::Loc::X87`], and never faults.
    pub quiet: bool,
}

impl HelperInfo {
    /// Whether fields outside [`twofold_arch::Loc::X87`] are out of its reach.
    #[must_use]
    pub const fn keeps_state(&self) -> bool {
        self.pure || self.quiet
    }
}

macro_rules! helpers {
    ($($(#[$doc:meta])* $variant:ident $name:literal ($args:literal) $($attr:ident)*;)*) => {
        /// A helper. The doc comment gives its arguments and result.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum Helper { $($(#[$doc])* $variant,)* }

        impl Helper {
            /// Every helper, in the order of its number.
            pub const ALL: &'static [Helper] = &[$(Helper::$variant),*];
            const INFO: &'static [HelperInfo] = &[$(
                {
                    #[allow(unused_mut)]
                    let mut info = HelperInfo { name: $name, args: $args, faults: false, pure: false, quiet: false };
                    $(info.$attr = true;)*
                    info
                }
            ),*];
            /// The helper's attributes.
            #[must_use]
            pub const fn info(self) -> &'static HelperInfo {
                &Self::INFO[self as usize]
            }
        }
    };
}

helpers! {
    // ---- addresses -------------------------------------------------------------------------------------------------
    /// (segment 0..6, offset, bytes | write << 8): limit, rights and canonical checks; the linear address. For segments without `NOLIMIT`.
    SegAddr "seg_addr" (3) faults;
    /// (new RIP): CS-limit or canonical check of a near transfer; the RIP. #GP(0) when outside.
    CheckTarget "check_target" (1) faults;
    /// (linear address, bytes): #AC when unaligned; only emitted under `ALIGN_CHECK`.
    AlignCheck "align_check" (2) faults;

    // ---- control ---------------------------------------------------------------------------------------------------
    /// (number of a region): 1 when its pages are mapped as when it was made, else 0. Not in IR: regions call it.
    EnterRegion "enter_region" (1);

    // ---- integer ---------------------------------------------------------------------------------------------------
    /// (low, high, divisor): the quotient of 128 bits by 64, if it fits in 64 (high < divisor); else low.
    DivideWide "divide_wide" (3) pure;
    /// (value, count, log2 bytes | right << 8): RCL or RCR through CF with lazy flags updated; the result.
    RotateCarry "rotate_carry" (3);
    /// (kind 0 DAA 1 DAS 2 AAA 3 AAS 4 AAM 5 AAD, imm8): BCD adjustment of AX and flags; #DE for AAM 0.
    Bcd "bcd" (2) faults;
    /// (crc, value, log2 bytes): CRC-32C.
    Crc32 "crc32" (3) pure;
    /// (value, mask): BMI2 PDEP.
    Pdep "pdep" (2) pure;
    /// (value, mask): BMI2 PEXT.
    Pext "pext" (2) pure;
    /// (linear address): CMPXCHG8B with flags (locked always).
    Cmpxchg8b "cmpxchg8b" (1) faults;
    /// (linear address): CMPXCHG16B with flags (locked always); #GP when unaligned.
    Cmpxchg16b "cmpxchg16b" (1) faults;
    /// (log2 bytes): RDRAND value, CF set.
    Rdrand "rdrand" (1);
    /// (log2 bytes): RDSEED value, CF set.
    Rdseed "rdseed" (1);
    /// (string op, see `string_op`; next RIP minus rip_base unused): MOVS STOS LODS CMPS SCAS with or without REP, all of it or up to an
    /// interruption; 0 when done, 1 when the same instruction must run again.
    StringOp "string_op" (1) faults;
    /// (string op): INS or OUTS, like `StringOp`.
    StringIo "string_io" (1) faults;
    /// (frame bytes, nesting level, log2 bytes of operand): ENTER.
    Enter "enter" (3) faults;
    /// (index, linear address of the bounds, log2 bytes): BOUND; #BR.
    Bound "bound" (3) faults;

    // ---- ports -----------------------------------------------------------------------------------------------------
    /// (port, bytes): IN.
    In "in" (2) faults;
    /// (port, bytes, value): OUT.
    Out "out" (3) faults;

    // ---- flags and interrupts --------------------------------------------------------------------------------------
    /// (value, log2 bytes): POPF with its privilege rules.
    Popf "popf" (2) faults;
    /// (log2 bytes): the image PUSHF pushes (RF, VM clear; VME rules); #GP in virtual-8086 mode with IOPL < 3.
    Pushf "pushf" (1) faults;
    /// CLI.
    Cli "cli" (0) faults;
    /// (whether the next instruction is in the same block and its last): STI. When it set IF, that instruction is in its shadow.
    Sti "sti" (1) faults;
    /// HLT.
    Hlt "hlt" (0) faults;
    /// PAUSE: a hint.
    Pause "pause" (0) faults;
    /// (vector, next RIP, kind 0 INT n 1 INT3 2 INTO 3 INT1): software interrupt; sets state.rip.
    SoftInt "soft_int" (3) faults;
    /// (log2 bytes of operand, next RIP): IRET; sets state.rip. The next RIP is where a task left by IRET resumes.
    Iret "iret" (2) faults;

    // ---- far transfers and segments ---------------------------------------------------------------------------------
    /// (segment 0..6, selector): MOV/POP/LxS to a segment register with the mode's checks.
    LoadSeg "load_seg" (2) faults;
    /// (selector, offset, log2 bytes, next RIP): far JMP; sets state.rip.
    FarJmp "far_jmp" (4) faults;
    /// (selector, offset, log2 bytes, next RIP): far CALL; sets state.rip.
    FarCall "far_call" (4) faults;
    /// (log2 bytes of operand, bytes to release): far RET; sets state.rip.
    FarRet "far_ret" (2) faults;
    /// (next RIP): SYSCALL; sets state.rip.
    Syscall "syscall" (1) faults;
    /// (log2 bytes of operand): SYSRET; sets state.rip.
    Sysret "sysret" (1) faults;
    /// SYSENTER; sets state.rip.
    Sysenter "sysenter" (0) faults;
    /// (log2 bytes of operand): SYSEXIT; sets state.rip.
    Sysexit "sysexit" (1) faults;
    /// SWAPGS.
    Swapgs "swapgs" (0) faults;
    /// (which: 0 RDFSBASE 1 RDGSBASE 2 WRFSBASE 3 WRGSBASE, value): FSGSBASE with its checks; the value read.
    FsGsBase "fsgsbase" (2) faults;

    // ---- system tables and registers ---------------------------------------------------------------------------------
    /// (linear address, idt, bytes of the base loaded (3, 4 or 8)): LGDT or LIDT.
    LoadTable "load_table" (3) faults;
    /// (linear address, idt, bytes of the base stored (4 or 8)): SGDT or SIDT.
    StoreTable "store_table" (3) faults;
    /// (selector): LLDT.
    Lldt "lldt" (1) faults;
    /// (selector): LTR.
    Ltr "ltr" (1) faults;
    /// (what: 0 SLDT 1 STR 2 SMSW): the value, with UMIP and VMX checks.
    StoreSystem "store_system" (1) faults;
    /// (selector, kind 0 LAR 1 LSL 2 VERR 3 VERW): ZF set through the lazy flags; the rights or limit.
    ProbeSelector "probe_selector" (2) faults;
    /// (register number, source-is-cr8 handled alike): MOV from CRn.
    ReadCr "read_cr" (1) faults;
    /// (register number, value): MOV to CRn.
    WriteCr "write_cr" (2) faults;
    /// (value, linear address of its memory operand or 0): LMSW.
    Lmsw "lmsw" (2) faults;
    /// CLTS.
    Clts "clts" (0) faults;
    /// (register number): MOV from DRn.
    ReadDr "read_dr" (1) faults;
    /// (register number, value): MOV to DRn.
    WriteDr "write_dr" (2) faults;
    /// RDMSR.
    Rdmsr "rdmsr" (0) faults;
    /// WRMSR.
    Wrmsr "wrmsr" (0) faults;
    /// RDTSC.
    Rdtsc "rdtsc" (0) faults;
    /// RDTSCP.
    Rdtscp "rdtscp" (0) faults;
    /// RDPID: the value.
    Rdpid "rdpid" (0) faults;
    /// RDPMC.
    Rdpmc "rdpmc" (0) faults;
    /// CPUID.
    Cpuid "cpuid" (0) faults;
    /// XGETBV.
    Xgetbv "xgetbv" (0) faults;
    /// XSETBV.
    Xsetbv "xsetbv" (0) faults;
    /// RDPKRU.
    Rdpkru "rdpkru" (0) faults;
    /// WRPKRU.
    Wrpkru "wrpkru" (0) faults;
    /// (linear address): INVLPG.
    Invlpg "invlpg" (1) faults;
    /// (type, linear address of the descriptor): INVPCID.
    Invpcid "invpcid" (2) faults;
    /// (what: 0 INVD 1 WBINVD): cache control.
    CacheControl "cache_control" (1) faults;
    /// (linear address): MONITOR.
    Monitor "monitor" (1) faults;
    /// MWAIT.
    Mwait "mwait" (0) faults;
    /// (set): CLAC or STAC.
    SetAc "set_ac" (1) faults;
    /// (instruction word, linear address, register number, next RIP): VMX instructions, see `frontend::vmx::word`.
    /// VMLAUNCH and VMRESUME set state.rip.
    Vmx "vmx" (4) faults;
    /// RSM: #UD outside SMM. Sets state.rip.
    Rsm "rsm" (0) faults;

    // ---- floating point state -----------------------------------------------------------------------------------------
    /// (opcode: first byte & 7 << 8 | ModRM, linear address of a memory operand, RIP of the instruction, selectors and prefixes): any x87 instruction. The I64 is what FNSTSW AX and the like return.
    X87 "x87" (4) faults;
    /// Brings the x87 registers into the host's unit. Under `X87_HOST` only.
    X87Ready "x87_ready" (0) quiet;
    /// (instruction, see `arch::fpu::X87Op`, operand, its bytes from 8 on): one instruction on the host's unit, after `X87Ready`.
    X87Do "x87_do" (3) quiet;
    /// Brings the x87 registers back into the guest state.
    X87Park "x87_park" (0) quiet;
    /// (value): FLDCW; whether the key changes. Under `X87_HOST` only.
    X87LoadControl "x87_load_control" (1);
    /// (linear address, form, see `frontend`): FXSAVE, XSAVE, XSAVEC, XSAVEOPT, XSAVES.
    SaveState "save_state" (2) faults;
    /// (linear address, form): FXRSTOR, XRSTOR, XRSTORS.
    RestoreState "restore_state" (2) faults;
    /// (value): LDMXCSR; #GP for reserved bits.
    Ldmxcsr "ldmxcsr" (1) faults;
    /// STMXCSR: the value.
    Stmxcsr "stmxcsr" (0);
    /// (effective address, move, see `arch::vector_op`): VMASKMOVPS and its kin.
    MaskedMove "masked_move" (2) faults;
    /// (base and displacement, gather, see `arch::vector_op`): VGATHERDPS and its kin.
    Gather "gather" (2) faults;
    /// (operation): an SSE floating-point instruction under unmasked exceptions: raises #XM when one is due after a vector op.
    SseCheck "sse_check" (1) faults;
}
