//! x87 instructions: on the host's x87 unit while all exceptions are masked, else by a helper.
//!
//! Under `X87_HOST` an instruction is its loads, `Helper::X87Do`, which the back end makes the host's own instruction of, and its
//! store; the registers have been brought into the host's unit before (`X87Ready`, once a block). A store's page is checked
//! before the instruction runs, so that nothing has happened when it faults, or when it would write to the block's own code and
//! so has to run on its own.
//!
//! Otherwise it is one call of `Helper::X87`, which reads its operands and does all checks but #NM. The helper gets the opcode, the linear address of the memory operand, the instruction's RIP and a word of
//! [`twofold_arch::fpu::x87`]. FNSTSW AX takes its result from the helper.

use iced_x86::{Mnemonic, OpKind};
use twofold_arch::cpuid::Feature;
use twofold_arch::fpu::{X87Op, X87Operand, fsw, x87 as word};
use twofold_arch::{Exception, Loc, TbFlags, Vector};
use twofold_ir::{BinOp, Exit, Helper, IntCc, MemFlags, Ty, Value};

use crate::table::{Need, Row};
use crate::translator::{Access, Translator, X87Place};

macro_rules! rows {
    ($($feature:ident: $($m:ident)*;)*) => {
        /// Every x87 instruction, and WAIT.
        pub const ROWS: &[Row] = &[
            $($(Row::all(Mnemonic::$m, x87).feature(Feature::$feature).need(Need::X87),)*)*
            Row::all(Mnemonic::Wait, wait).need(Need::WAIT),
        ];
    };
}

rows! {
    X87: F2xm1 Fabs Fadd Faddp Fbld Fbstp Fchs Fcom Fcomp Fcompp Fcos Fdecstp Fdiv Fdivp Fdivr Fdivrp Ffree Ffreep
        Fiadd Ficom Ficomp Fidiv Fidivr Fild Fimul Fincstp Fist Fistp Fisub Fisubr Fld Fld1 Fldcw Fldenv
        Fldl2e Fldl2t Fldlg2 Fldln2 Fldpi Fldz Fmul Fmulp Fnclex Fndisi Fneni Fninit Fnop Fnsave Fnsetpm Fnstcw Fnstenv
        Fnstsw Fpatan Fprem Fprem1 Fptan Frndint Frstor Fscale Fsin Fsincos Fsqrt Fst Fstp Fstpnce Fsub Fsubp Fsubr
        Fsubrp Ftst Fucom Fucomp Fucompp Fxam Fxch Fxtract Fyl2x Fyl2xp1;
    Cmov: Fcmovb Fcmovbe Fcmove Fcmovnb Fcmovnbe Fcmovne Fcmovnu Fcmovu Fcomi Fcomip Fucomi Fucomip;
    Sse3: Fisttp;
}

/// Index of the opcode byte (D8 … DF) after the prefixes.
fn opcode_index(bytes: &[u8]) -> usize {
    bytes.iter().position(|b| (0xd8..=0xdf).contains(b)).unwrap_or(0)
}

/// Whether the memory operand is written.
fn stores(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fnstcw | Fnstsw | Fnstenv | Fnsave)
}

/// Whether the memory operand of an instruction that waits can fault before it is accessed.
fn address_may_fault(t: &Translator<'_>) -> bool {
    use Mnemonic::*;
    let waits = !matches!(t.insn.mnemonic(), Fnstcw | Fnstsw | Fnstenv | Fnsave);
    let limit = !t.is64() && !t.flags.no_limit(t.mem_segment());
    waits && (limit || t.flags.has(TbFlags::ALIGN_CHECK))
}

fn x87(t: &mut Translator<'_>) {
    let bytes = t.insn_bytes();
    let at = opcode_index(bytes);
    let byte = |i: usize| u16::from(bytes.get(i).copied().unwrap_or(0));
    let opcode = (byte(at) & 7) << 8 | byte(at + 1);
    let memory = (0..t.insn.op_count()).any(|n| t.is_mem(n));
    if t.flags.has(TbFlags::X87_HOST) && on_host(t, opcode, memory) {
        return;
    }
    let operand16 = bytes[..at].contains(&0x66) != (t.rip_ty() == Ty::I16);
    let mut how = if operand16 { word::OPERAND16 } else { 0 };
    let addr = if memory {
        how |= word::MEMORY | u64::from(t.mem_segment());
        if address_may_fault(t) && !t.flags.has(TbFlags::X87_HOST) {
            // A pending exception comes first: FNOP waits for it.
            let (fnop, none, rip) = (t.c64(0x1d0), t.c64(0), t.b.rip(i32::from(t.off)));
            t.call(Helper::X87, &[fnop, none, rip, none]);
        }
        address(t)
    } else {
        t.c64(0)
    };
    let opcode = t.c64(opcode.into());
    let rip = t.b.rip(i32::from(t.off));
    let how = t.c64(how);
    let r = t.call(Helper::X87, &[opcode, addr, rip, how]);
    if t.insn.op_count() > 0 && t.insn.op_kind(0) == OpKind::Register && t.insn.op_register(0).is_gpr() {
        let ax = t.b.trunc(Ty::I16, r);
        t.put_gpr(0, ax);
    }
    if matches!(t.insn.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor) {
        t.end_dispatch();
    }
}

/// The linear address of the memory operand.
fn address(t: &mut Translator<'_>) -> Value {
    let access = if stores(t.insn.mnemonic()) { Access::Write } else { Access::Read };
    let size = t.insn.memory_size().size() as u32;
    if size.is_power_of_two() { t.mem_addr(size, access) } else { t.mem_addr_unaligned(size, access) }
}

/// The instruction without `Helper::X87`, if it is one of those.
fn on_host(t: &mut Translator<'_>, opcode: u16, memory: bool) -> bool {
    match t.insn.mnemonic() {
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => return true,
        Mnemonic::Fnstcw => {
            let w = t.b.get(Ty::I16, Loc::FCW);
            t.store_mem(w);
            return true;
        }
        Mnemonic::Fldcw => {
            let w = t.load_mem(Ty::I16);
            let changed = t.call(Helper::X87LoadControl, &[w]);
            let changed = t.b.trunc(Ty::I8, changed);
            let off = t.next;
            t.b.exit_if(changed, Exit::Dispatch { off }, true);
            return true;
        }
        _ => {}
    }
    let status = t.insn.mnemonic() == Mnemonic::Fnstsw;
    let op = if status { X87Op::STATUS } else { X87Op::new(opcode, memory) };
    let Some(operand) = op.operand() else { return false };
    let addr = if op.memory() { address(t) } else { t.c64(0) };
    let (mut lo, mut hi) = (t.c64(0), t.c64(0));
    match operand {
        X87Operand::Load(n) => (lo, hi) = load(t, addr, n, MemFlags::NONE),
        X87Operand::Store(n) => drop(load(t, addr, n, MemFlags::WRITE_INTENT)),
        X87Operand::ReadsFlags => lo = t.b.flags(),
        X87Operand::None | X87Operand::Status | X87Operand::WritesFlags => {}
    }
    t.want_x87(X87Place::Host);
    let word = t.c64(op.0.into());
    let r = t.call(Helper::X87Do, &[word, lo, hi]);
    match operand {
        X87Operand::Store(n) => store(t, addr, n, r),
        X87Operand::WritesFlags => t.b.set_flags(r),
        X87Operand::Status => {
            let w = t.b.trunc(Ty::I16, r);
            if memory { t.store_mem(w) } else { t.put_gpr(0, w) }
        }
        _ => {}
    }
    if !status && t.insn.mnemonic() != Mnemonic::Fnclex {
        note_pointers(t, opcode, memory.then_some(addr));
    }
    true
}

/// A memory operand of 2, 4, 8 or 10 bytes, as two words.
fn load(t: &mut Translator<'_>, addr: Value, bytes: u8, flags: MemFlags) -> (Value, Value) {
    let flags = flags.or(t.mem_flags());
    let lo = t.b.load(Ty::int(u32::from(bytes).min(8)), flags, addr);
    let hi = if bytes == 10 {
        let addr = t.b.bin_imm(BinOp::Add, addr, 8);
        t.b.load(Ty::I16, flags, addr)
    } else {
        t.b.iconst(Ty::I64, 0)
    };
    (lo, hi)
}

fn store(t: &mut Translator<'_>, addr: Value, bytes: u8, v: Value) {
    let lo = t.b.trunc(Ty::int(u32::from(bytes).min(8)), v);
    t.b.store(t.mem_flags(), addr, lo);
    if bytes == 10 {
        let hi = t.b.get(Ty::I16, Loc(Loc::X87_OPERAND.0 + 8));
        let addr = t.b.bin_imm(BinOp::Add, addr, 8);
        t.b.store(t.mem_flags(), addr, hi);
    }
}

/// Records the last instruction's opcode and pointers.
fn note_pointers(t: &mut Translator<'_>, opcode: u16, addr: Option<Value>) {
    let selectors = !t.has(Feature::ZeroFcsFds);
    let rip = t.b.rip(i32::from(t.off));
    let opcode = t.b.iconst(Ty::I16, opcode.into());
    t.b.put(Loc::FOP, opcode);
    t.b.put(Loc::FIP, rip);
    let selector = |t: &mut Translator<'_>, n: u8| {
        if selectors { t.b.get(Ty::I16, Loc::seg_selector(n)) } else { t.b.iconst(Ty::I16, 0) }
    };
    let cs = selector(t, 1);
    t.b.put(Loc::FCS, cs);
    let Some(addr) = addr else { return };
    let seg = t.mem_segment();
    let flat = if t.is64() { seg < 4 } else { t.flags.zero_base(seg) };
    let offset = if flat {
        addr
    } else {
        let base = t.b.get(Ty::I64, Loc::seg_base(seg));
        t.b.sub(addr, base)
    };
    t.b.put(Loc::FDP, offset);
    let ds = selector(t, seg);
    t.b.put(Loc::FDS, ds);
}

/// WAIT: #MF for a pending x87 exception.
fn wait(t: &mut Translator<'_>) {
    if t.flags.has(TbFlags::X87_HOST) {
        return;
    }
    let w = t.b.get(Ty::I16, Loc::FSW);
    let es = t.b.bin_imm(BinOp::And, w, u64::from(fsw::ES));
    let pending = t.b.cmp_imm(IntCc::Ne, es, 0);
    t.raise_if(pending, Exception::new(Vector::X87Fault));
}
