//! Makes encodings of instruction forms from the decoder's table, and register and memory values to run them on.
//!
//! Used by the oracle tests and the soak. [`encode`] builds bytes for one `Code`: prefixes, registers, addressing and
//! immediates at random, checked by decoding them. [`Sample::prepare`] then gives the registers that form the address of a
//! memory operand such values that it points into the scratch area (or, now and then, past its end). Invariant: the same
//! seed makes the same samples.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, EncodingKind, FlowControl, Instruction, MandatoryPrefix,
    Mnemonic, OpCodeInfo, OpCodeOperandKind as K, OpCodeTableKind, Register,
};

use crate::insn::{MIDDLE, Mode, Rng, SCRATCH, SCRATCH_LEN, TAKEN};

mod undefined;
mod values;

pub use undefined::{is_sse_float, is_x87, processors_differ, undefined_status};

/// An encoded instruction.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its form.
    pub code: Code,
    /// What the decoder says of it, at the address it runs at.
    pub insn: Instruction,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The code size.
    pub mode: Mode,
}

/// Why a form of a feature that twofold has is not run on the host; `None` when it is.
#[must_use]
pub fn not_run(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    let info = code.op_code();
    if info.fwait() {
        return Some("WAIT and another instruction");
    }
    if format!("{code:?}").contains("_0F0D") {
        return Some("a NOP on Intel processors, #UD on AMD's");
    }
    match code.mnemonic() {
        Int | Into | Int1 | Int3 | Syscall | Sysenter | Sysexit | Sysret | Sysexitq | Sysretq => {
            Some("enters the host's kernel")
        }
        Iret | Iretd | Iretq | Retf | Lds | Les | Lfs | Lgs | Lss | Loadall => Some("loads the host's segments"),
        Jmp | Call
            if matches!(
                code.flow_control(),
                FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Call
                    | FlowControl::IndirectCall
            ) && far(info) =>
        {
            Some("loads the host's segments")
        }
        Mov | Pop
            if info
                .op_kinds()
                .iter()
                .any(|k| matches!(k, K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs)) =>
        {
            Some("loads the host's segments")
        }
        Push if info.op_kinds().iter().any(|k| matches!(k, K::es | K::cs | K::ss | K::ds | K::fs | K::gs)) => {
            Some("shows the host's segments")
        }
        Wrfsbase | Wrgsbase | Rdfsbase | Rdgsbase | Swapgs => Some("the host's segment bases"),
        Rdtsc | Rdtscp | Rdpmc | Rdrand | Rdseed | Rdpid | Cpuid | Xgetbv | Rdpru => {
            Some("differs from run to run or host to host")
        }
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64
        | Xrstor | Xrstor64 => Some("save areas have a test of their own"),
        Sgdt | Sidt | Sldt | Str | Smsw | Lar | Lsl | Verr | Verw | Arpl => Some("shows the host's system state"),
        Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq => Some("the integer test has it: TF must stay 0"),
        Fnsave | Frstor | Fnstenv | Fldenv | Fsave | Fstenv => Some("the x87 test has it: instruction pointers"),
        Rdpkru | Wrpkru | Xsetbv => Some("not enabled on every host"),
        Movsxd if info.operand_size() == 16 => Some("AMD processors read 32 bits"),
        Bswap if info.operand_size() == 16 => Some("undefined"),
        Ud0 if code == Code::Ud0 => Some("another form has its bytes"),
        _ if near16(info) && !info.mode16() => Some("16-bit branches outside 16-bit code"),
        Bound => Some("only in 32-bit code; #BR is no signal of its own"),
        _ if virtualization(code.mnemonic()) => Some("VMX: the host may have none, or patch VMCALL"),
        _ => None,
    }
}

fn far(info: &OpCodeInfo) -> bool {
    let text = info.op_code_string();
    matches!(text, t if t.contains("/3") && t.contains("FF") || t.contains("/5") && t.contains("FF"))
        || info.op_kinds().iter().any(|k| matches!(k, K::farbr2_2 | K::farbr4_2))
}

/// Whether a branch truncates RIP to 16 bits: in 64-bit code processors differ, and outside 16-bit code it leads nowhere.
fn near16(info: &OpCodeInfo) -> bool {
    let branch =
        !matches!(info.code().flow_control(), FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt);
    branch && info.operand_size() == 16
}

fn virtualization(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Vmcall
            | Vmlaunch
            | Vmresume
            | Vmxoff
            | Vmxon
            | Vmread
            | Vmwrite
            | Vmptrld
            | Vmptrst
            | Vmclear
            | Vmfunc
            | Invept
            | Invvpid
            | Getsec
    )
}

/// Builds an encoding of `code`; `None` when an attempt fails (try again) or the code size does not have it.
#[must_use]
pub fn encode(code: Code, mode: Mode, rng: &mut Rng) -> Option<Sample> {
    let info = code.op_code();
    let fits = match mode {
        Mode::Bits64 => info.mode64(),
        Mode::Bits32 => info.mode32(),
        Mode::Bits16 => info.mode16(),
    };
    if !fits || mode != Mode::Bits16 && near16(info) {
        return None;
    }
    let mut bytes = Encoder { info, mode, rng, out: Vec::with_capacity(16), rex: [false; 3] }.run()?;
    let (insn, displacement) = decode(&bytes, mode)?;
    if insn.code() != code || insn.len() != bytes.len() {
        return None;
    }
    // Operands that are at a fixed place get a displacement that leads there.
    let fixed = matches!(insn.memory_base(), Register::RIP | Register::EIP)
        || insn.memory_base() == Register::None && !insn.memory_index().is_gpr() && !insn.is_vsib();
    let vector_only = insn.is_vsib() && insn.memory_base() == Register::None;
    if let Some((at, size)) = displacement
        && (fixed || vector_only)
    {
        let target = target(&insn, mode, rng);
        let rip = matches!(insn.memory_base(), Register::RIP | Register::EIP);
        let value = if rip { target.wrapping_sub(mode.rip() + bytes.len() as u64) } else { target };
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    let (insn, _) = decode(&bytes, mode)?;
    (insn.code() == code).then_some(Sample { code, insn, bytes, mode })
}

fn bitness(mode: Mode) -> u32 {
    match mode {
        Mode::Bits64 => 64,
        Mode::Bits32 => 32,
        Mode::Bits16 => 16,
    }
}

/// The instruction, and where its displacement is.
fn decode(bytes: &[u8], mode: Mode) -> Option<(Instruction, Option<(usize, usize)>)> {
    let mut d = Decoder::with_ip(bitness(mode), bytes, mode.rip(), DecoderOptions::NONE);
    let insn = d.decode();
    if d.last_error() != DecoderError::None {
        return None;
    }
    let c = d.get_constant_offsets(&insn);
    let displacement = c.has_displacement().then(|| (c.displacement_offset(), c.displacement_size()));
    Some((insn, displacement))
}

/// Where a memory operand is to be.
fn target(insn: &Instruction, mode: Mode, rng: &mut Rng) -> u64 {
    let size = insn.memory_size().size().max(1) as u64;
    let (start, middle) = if mode == Mode::Bits16 { (0, SCRATCH_LEN as u64 / 2) } else { (SCRATCH, MIDDLE) };
    let end = start + SCRATCH_LEN as u64;
    match rng.below(64) {
        // Over the end, or before the start (which 16-bit code cannot say). Whether alignment or limit comes first differs.
        0 if mode == Mode::Bits16 && size >= 16 => middle,
        0 => end - rng.below(size + 1),
        1 if mode != Mode::Bits16 => start.wrapping_sub(rng.below(size) + 1),
        2..=9 => middle + rng.below(48),
        10 => end - 0x1000 - rng.below(size.max(2)),
        _ => middle + rng.below(3) * 64,
    }
}

struct Encoder<'a> {
    info: &'static OpCodeInfo,
    mode: Mode,
    rng: &'a mut Rng,
    out: Vec<u8>,
    /// REX.R, X, B.
    rex: [bool; 3],
}

impl Encoder<'_> {
    fn has(&self, f: impl Fn(&K) -> bool) -> bool {
        self.info.op_kinds().iter().any(f)
    }
    fn chance(&mut self, one_in: u64) -> bool {
        self.rng.below(one_in) == 0
    }

    fn run(mut self) -> Option<Vec<u8>> {
        let vex = self.info.encoding() == EncodingKind::VEX;
        if !vex && self.info.encoding() != EncodingKind::Legacy {
            return None;
        }
        let long = self.mode == Mode::Bits64;
        let own = if self.mode == Mode::Bits16 { 16 } else { 32 };
        let own_address = bitness(self.mode);
        if self.chance(16) {
            // Segment overrides. The host's FS and GS are its own; outside 64-bit code CS cannot be written.
            let n = self.rng.below(if long { 4 } else { 3 }) as usize;
            self.out.push([0x26, 0x36, 0x3e, 0x2e][n]);
        }
        let address = match self.info.address_size() {
            0 if self.memory() && self.chance(8) => {
                if own_address == 32 {
                    16
                } else {
                    32
                }
            }
            0 => own_address,
            n => n,
        };
        if address != own_address {
            self.out.push(0x67);
        }
        if !vex {
            match self.info.operand_size() {
                16 if own != 16 => self.out.push(0x66),
                32 if own != 32 => self.out.push(0x66),
                _ => {}
            }
            match self.info.mandatory_prefix() {
                MandatoryPrefix::P66 => self.out.push(0x66),
                MandatoryPrefix::PF3 => self.out.push(0xf3),
                MandatoryPrefix::PF2 => self.out.push(0xf2),
                _ => {}
            }
            let string = self.has(|k| matches!(k, K::seg_rSI | K::es_rDI));
            if string && self.chance(2) {
                let repne = self.rng.below(2) as u8;
                self.out.push(0xf2 | repne);
            }
            if self.info.can_use_lock_prefix() && self.chance(3) {
                self.out.push(0xf0);
            }
        }
        let fields: [bool; 3] = core::array::from_fn(|_| self.rng.below(2) != 0);
        self.rex = if long { fields } else { [false; 3] };
        let modrm_at = if vex { self.vex()? } else { self.legacy(long)? };
        if modrm_at {
            self.modrm(address);
        }
        self.immediates();
        (self.out.len() <= 15).then_some(self.out)
    }

    fn memory(&self) -> bool {
        self.has(|k| {
            use K::*;
            matches!(
                k,
                mem | mem_mib
                    | mem_offs
                    | r8_or_mem
                    | r16_or_mem
                    | r32_or_mem
                    | r64_or_mem
                    | mm_or_mem
                    | xmm_or_mem
                    | ymm_or_mem
                    | mem_vsib32x
                    | mem_vsib64x
                    | mem_vsib32y
                    | mem_vsib64y
            )
        })
    }

    /// REX, opcode map, opcode. Whether a ModRM byte follows.
    fn legacy(&mut self, long: bool) -> Option<bool> {
        if long {
            let wide = self.info.operand_size() == 64 && !self.info.default_op_size64()
                || self.info.operand_size() == 64 && self.chance(2);
            let rex = u8::from(wide) << 3 | self.rex_bits();
            // With REX.B it is XCHG with R8 on AMD processors, whatever F3 says.
            let rex = if self.info.code() == Code::Pause { rex & !1 } else { rex };
            if rex != 0 || self.chance(2) {
                self.out.push(0x40 | rex);
            }
        }
        match self.info.table() {
            OpCodeTableKind::Normal => {}
            OpCodeTableKind::T0F => self.out.push(0x0f),
            OpCodeTableKind::T0F38 => self.out.extend([0x0f, 0x38]),
            OpCodeTableKind::T0F3A => self.out.extend([0x0f, 0x3a]),
            _ => return None,
        }
        let two = self.info.op_code_len() == 2;
        let mut op = self.info.op_code();
        if self.has(|k| matches!(k, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)) {
            op |= self.rng.below(8) as u32;
        }
        if two {
            self.out.push((op >> 8) as u8);
        }
        self.out.push(op as u8);
        Some(!two && self.needs_modrm())
    }

    fn needs_modrm(&self) -> bool {
        self.info.group_index() >= 0
            || self.has(|k| {
                use K::*;
                matches!(
                    k,
                    mem | mem_mib
                        | r8_or_mem
                        | r16_or_mem
                        | r32_or_mem
                        | r64_or_mem
                        | mm_or_mem
                        | xmm_or_mem
                        | ymm_or_mem
                        | r8_reg
                        | r16_reg
                        | r16_reg_mem
                        | r16_rm
                        | r32_reg
                        | r32_reg_mem
                        | r32_rm
                        | r64_reg
                        | r64_reg_mem
                        | r64_rm
                        | seg_reg
                        | mm_reg
                        | mm_rm
                        | xmm_reg
                        | xmm_rm
                        | ymm_reg
                        | ymm_rm
                        | cr_reg
                        | dr_reg
                        | mem_vsib32x
                        | mem_vsib64x
                        | mem_vsib32y
                        | mem_vsib64y
                )
            })
    }

    fn rex_bits(&self) -> u8 {
        u8::from(self.rex[0]) << 2 | u8::from(self.rex[1]) << 1 | u8::from(self.rex[2])
    }

    /// VEX prefix and opcode.
    fn vex(&mut self) -> Option<bool> {
        let map = match self.info.table() {
            OpCodeTableKind::T0F => 1,
            OpCodeTableKind::T0F38 => 2,
            OpCodeTableKind::T0F3A => 3,
            _ => return None,
        };
        let pp = match self.info.mandatory_prefix() {
            MandatoryPrefix::P66 => 1,
            MandatoryPrefix::PF3 => 2,
            MandatoryPrefix::PF2 => 3,
            _ => 0,
        };
        // Outside 64-bit code Intel ignores W of VPEXTRD and VPINSRD, AMD does not: it stays 0 there.
        let w = if self.info.is_wig() { self.rng.below(2) as u8 } else { self.info.w() as u8 };
        let l = if self.info.is_lig() { self.rng.below(2) as u8 } else { self.info.l() as u8 };
        let v = self.has(|k| matches!(k, K::r32_vvvv | K::r64_vvvv | K::xmm_vvvv | K::ymm_vvvv));
        let vvvv = match v {
            false => 15,
            true if self.mode == Mode::Bits64 => self.rng.below(16) as u8,
            // The top bit is inverted 1, or the prefix would be another instruction.
            true => 8 | self.rng.below(8) as u8,
        };
        let low = vvvv << 3 | l << 2 | pp;
        if map == 1 && w == 0 && !self.rex[1] && !self.rex[2] && self.chance(2) {
            self.out.extend([0xc5, u8::from(!self.rex[0]) << 7 | low]);
        } else {
            self.out.extend([0xc4, !self.rex_bits() << 5 | map, w << 7 | low]);
        }
        self.out.push(self.info.op_code() as u8);
        Some(self.needs_modrm())
    }

    fn modrm(&mut self, address: u32) {
        let register_only = !self.memory();
        let memory_only = self.has(|k| matches!(k, K::mem | K::mem_mib)) || self.vsib();
        let register = register_only || !memory_only && self.chance(2);
        let reg = match self.info.group_index() {
            n @ 0.. => n as u8,
            _ => self.rng.below(8) as u8,
        };
        let mut rm = match self.info.rm_group_index() {
            n @ 0.. => n as u8,
            _ => self.rng.below(8) as u8,
        };
        if register {
            return self.out.push(0xc0 | reg << 3 | rm);
        }
        if self.vsib() {
            rm = 4;
        }
        let mode = self.rng.below(3) as u8;
        self.out.push(mode << 6 | reg << 3 | rm);
        let mut base = rm;
        if address != 16 && rm == 4 {
            let sib = self.rng.next() as u8;
            self.out.push(sib);
            base = sib & 7;
        }
        let displacement = match (mode, address) {
            (1, _) => 1,
            (2, 16) => 2,
            (2, _) => 4,
            (_, 16) if rm == 6 => 2,
            (_, 16) => 0,
            _ if base == 5 => 4,
            _ => 0,
        };
        // Large displacements wrap; small ones keep the solved base plausible.
        let value = if self.chance(4) { self.rng.next() } else { self.rng.below(256).wrapping_sub(128) };
        self.out.extend(&value.to_le_bytes()[..displacement]);
    }

    fn vsib(&self) -> bool {
        self.has(|k| matches!(k, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y))
    }

    fn immediates(&mut self) {
        let kinds: Vec<K> = self.info.op_kinds().to_vec();
        let mut is4 = None;
        for kind in kinds {
            let n = match kind {
                K::imm8 | K::imm8sex16 | K::imm8sex32 | K::imm8sex64 => 1,
                K::imm16 => 2,
                K::imm32 | K::imm32sex64 => 4,
                K::imm64 => 8,
                K::mem_offs => match self.info.address_size() {
                    0 => bitness(self.mode) as usize / 8,
                    n => n as usize / 8,
                },
                K::br16_1 | K::br32_1 | K::br64_1 => {
                    self.out.push(TAKEN as u8);
                    continue;
                }
                K::br16_2 => {
                    self.out.extend((TAKEN as u16).to_le_bytes());
                    continue;
                }
                K::br32_4 | K::br64_4 => {
                    self.out.extend((TAKEN as u32).to_le_bytes());
                    continue;
                }
                K::xmm_is4 | K::ymm_is4 => {
                    is4 = Some(self.rng.next() as u8 & 0xf0);
                    continue;
                }
                _ => continue,
            };
            let v = self.rng.value();
            self.out.extend(&v.to_le_bytes()[..n]);
        }
        if let Some(b) = is4 {
            self.out.push(b);
        }
    }
}

/// Whether a form belongs to features for which `has` holds, all of them.
#[must_use]
pub fn of_features(code: Code, has: impl Fn(CpuidFeature) -> bool) -> bool {
    code.op_code().is_instruction() && code.cpuid_features().iter().all(|&f| has(f))
}
