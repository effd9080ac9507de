//! Control transfers: Jcc, JMP, CALL and RET near and far, LOOP, JCXZ, software interrupts, IRET, and the fast system calls.
//!
//! Place: a family of the instruction table. Every instruction here ends the block. A near target outside the code segment
//! is #GP at the branch where the key does not rule it out, and so is a non-canonical target.

use iced_x86::{Code, Mnemonic, OpKind};
use twofold_arch::cpuid::Feature;
use twofold_arch::{CodeSize, CondCode, Exception, TbFlags};
use twofold_ir::{BinOp, Helper, IndirectKind, IntCc, Ty, Value};

use crate::moves::condition;
use crate::table::{Need, Row};
use crate::translator::{Access, Translator};

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Jo, jcc),
    Row::all(Mnemonic::Jno, jcc),
    Row::all(Mnemonic::Jb, jcc),
    Row::all(Mnemonic::Jae, jcc),
    Row::all(Mnemonic::Je, jcc),
    Row::all(Mnemonic::Jne, jcc),
    Row::all(Mnemonic::Jbe, jcc),
    Row::all(Mnemonic::Ja, jcc),
    Row::all(Mnemonic::Js, jcc),
    Row::all(Mnemonic::Jns, jcc),
    Row::all(Mnemonic::Jp, jcc),
    Row::all(Mnemonic::Jnp, jcc),
    Row::all(Mnemonic::Jl, jcc),
    Row::all(Mnemonic::Jge, jcc),
    Row::all(Mnemonic::Jle, jcc),
    Row::all(Mnemonic::Jg, jcc),
    Row::all(Mnemonic::Jcxz, |t| jcxz(t, Ty::I16)),
    Row::all(Mnemonic::Jecxz, |t| jcxz(t, Ty::I32)),
    Row::all(Mnemonic::Jrcxz, |t| jcxz(t, Ty::I64)),
    Row::all(Mnemonic::Loop, |t| repeat(t, None)),
    Row::all(Mnemonic::Loope, |t| repeat(t, Some(CondCode::Z))),
    Row::all(Mnemonic::Loopne, |t| repeat(t, Some(CondCode::Nz))),
    Row::all(Mnemonic::Jmp, jmp),
    Row::all(Mnemonic::Call, call),
    Row::all(Mnemonic::Ret, ret),
    Row::one(Code::Jmp_ptr1616, |t| far_pointer(t, Helper::FarJmp)),
    Row::one(Code::Jmp_ptr1632, |t| far_pointer(t, Helper::FarJmp)),
    Row::one(Code::Jmp_m1616, |t| far_memory(t, Helper::FarJmp, Ty::I16)),
    Row::one(Code::Jmp_m1632, |t| far_memory(t, Helper::FarJmp, Ty::I32)),
    Row::one(Code::Jmp_m1664, |t| far_memory(t, Helper::FarJmp, Ty::I64)),
    Row::one(Code::Call_ptr1616, |t| far_pointer(t, Helper::FarCall)),
    Row::one(Code::Call_ptr1632, |t| far_pointer(t, Helper::FarCall)),
    Row::one(Code::Call_m1616, |t| far_memory(t, Helper::FarCall, Ty::I16)),
    Row::one(Code::Call_m1632, |t| far_memory(t, Helper::FarCall, Ty::I32)),
    Row::one(Code::Call_m1664, |t| far_memory(t, Helper::FarCall, Ty::I64)),
    Row::all(Mnemonic::Retf, far_ret),
    Row::all(Mnemonic::Int, |t| soft_int(t, 0)),
    Row::all(Mnemonic::Int3, |t| soft_int(t, 1)),
    Row::all(Mnemonic::Into, |t| soft_int(t, 2)),
    Row::all(Mnemonic::Int1, |t| soft_int(t, 3)),
    Row::all(Mnemonic::Iret, |t| iret(t, Ty::I16)),
    Row::all(Mnemonic::Iretd, |t| iret(t, Ty::I32)),
    Row::all(Mnemonic::Iretq, |t| iret(t, Ty::I64)),
    Row::all(Mnemonic::Syscall, syscall).feature(Feature::Syscall).need(Need::BITS64),
    Row::all(Mnemonic::Sysret, |t| sized(t, Helper::Sysret, Ty::I32)).feature(Feature::Syscall).need(SYSRET),
    Row::all(Mnemonic::Sysretq, |t| sized(t, Helper::Sysret, Ty::I64)).feature(Feature::Syscall).need(SYSRET),
    Row::all(Mnemonic::Sysenter, sysenter).feature(Feature::Sysenter),
    Row::all(Mnemonic::Sysexit, |t| sized(t, Helper::Sysexit, Ty::I32)).feature(Feature::Sysenter),
    Row::all(Mnemonic::Sysexitq, |t| sized(t, Helper::Sysexit, Ty::I64)).feature(Feature::Sysenter),
    Row::all(Mnemonic::Rsm, rsm),
    Row::all(Mnemonic::Ud0, ud),
    Row::all(Mnemonic::Ud1, ud),
    Row::all(Mnemonic::Ud2, ud),
];

const SYSRET: Need = Need::BITS64.and(Need::CPL0);

/// Where a direct near branch goes.
#[derive(Clone, Copy)]
enum Target {
    /// `rip_base` plus this.
    Offset(i32),
    /// A RIP computed at run time (the operand size is not the code size).
    Rip(Value),
}

/// The target of a direct near branch. iced decoded with the page offset for RIP.
fn near_target(t: &mut Translator<'_>) -> Target {
    let next = t.next;
    let size = t.flags.size();
    match t.insn.op0_kind() {
        OpKind::NearBranch16 => {
            let disp = t.insn.near_branch16().wrapping_sub(next as u16) as i16;
            let off = next + i32::from(disp);
            if size == CodeSize::Bits16 && !t.flags.high_ip() {
                return Target::Offset(off);
            }
            let rip = t.b.rip(off);
            Target::Rip(t.b.bin_imm(BinOp::And, rip, 0xffff))
        }
        OpKind::NearBranch32 if size == CodeSize::Bits16 => {
            let disp = t.insn.near_branch32().wrapping_sub(next as u32);
            let rip = t.b.rip(next);
            let sum = t.b.bin_imm(BinOp::Add, rip, u64::from(disp));
            Target::Rip(t.b.bin_imm(BinOp::And, sum, 0xffff_ffff))
        }
        OpKind::NearBranch32 => Target::Offset(t.insn.near_branch32() as i32),
        _ => match i32::try_from(t.insn.near_branch64() as i64) {
            Ok(off) => Target::Offset(off),
            Err(_) => {
                let base = t.b.rip(0);
                let target = t.insn.near_branch64();
                Target::Rip(t.b.bin_imm(BinOp::Add, base, target))
            }
        },
    }
}

/// Whether a near transfer to a RIP of `bits` must be checked against the limit of CS.
fn needs_check(t: &Translator<'_>, bits: u32) -> bool {
    !t.is64() && !t.flags.no_limit(1) && (t.flags.has(TbFlags::PROTECTED) || bits > 16)
}

/// Whether a direct branch must look at its target before it does anything.
fn is_suspect(t: &Translator<'_>, target: Target) -> bool {
    match target {
        // What is in the same page is canonical as this is.
        Target::Offset(off) if t.is64() => t.flags.near_edge() && !(0..4096).contains(&off),
        Target::Rip(_) if t.is64() => true,
        Target::Offset(_) => needs_check(t, t.rip_ty().bits()),
        Target::Rip(_) => needs_check(t, 32),
    }
}

/// #GP(0) unless the target is inside the code segment, or canonical.
fn check_target(t: &mut Translator<'_>, target: Target) {
    match target {
        Target::Offset(off) => {
            if is_suspect(t, target) {
                let rip = t.b.rip(off);
                let bits = t.rip_ty().bits();
                check_rip(t, rip, bits);
            }
        }
        Target::Rip(rip) => check_rip(t, rip, widest(t)),
    }
}

/// Bits of a RIP that was computed.
fn widest(t: &Translator<'_>) -> u32 {
    if t.is64() { 64 } else { 32 }
}

fn check_rip(t: &mut Translator<'_>, rip: Value, bits: u32) {
    if needs_check(t, bits) {
        t.call(Helper::CheckTarget, &[rip]);
    }
    if t.is64() && bits == 64 {
        check_canonical(t, rip);
    }
}

/// #GP(0) unless all bits from the highest of a linear address on are the same. No constant of 64 bits is needed for it.
fn check_canonical(t: &mut Translator<'_>, rip: Value) {
    let highest = if t.flags.has(TbFlags::WIDE_LINEAR) { 56 } else { 47 };
    let high = t.b.bin_imm(BinOp::Sar, rip, highest);
    let high = t.b.bin_imm(BinOp::Add, high, 1);
    let bad = t.b.cmp_imm(IntCc::Ugt, high, 1);
    t.raise_if(bad, Exception::GP0);
}

fn end_at(t: &mut Translator<'_>, target: Target, kind: IndirectKind) {
    match target {
        Target::Offset(off) => {
            let exit = t.direct_exit(off);
            t.end(exit, true);
        }
        Target::Rip(rip) => t.end_indirect(rip, kind),
    }
}

/// Branches to the near target when `c` (I8) is not 0; `update` runs before anything leaves.
fn branch_if(t: &mut Translator<'_>, c: Value) {
    let target = near_target(t);
    match target {
        Target::Offset(off) if !is_suspect(t, target) => {
            let taken = t.direct_exit(off);
            t.b.exit_if(c, taken, true);
            let exit = t.direct_exit(t.next);
            t.end(exit, true);
        }
        _ => {
            let not = t.b.cmp_imm(IntCc::Eq, c, 0);
            let exit = t.direct_exit(t.next);
            t.b.exit_if(not, exit, true);
            check_target(t, target);
            end_at(t, target, IndirectKind::Jump);
        }
    }
}

fn jcc(t: &mut Translator<'_>) {
    let c = t.b.cond(condition(t));
    branch_if(t, c);
}

fn jcxz(t: &mut Translator<'_>, ty: Ty) {
    let cx = t.get_gpr(ty, 1);
    let c = t.b.cmp_imm(IntCc::Eq, cx, 0);
    branch_if(t, c);
}

fn repeat(t: &mut Translator<'_>, cc: Option<CondCode>) {
    use Code::*;
    let ty = match t.insn.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => Ty::I16,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX => Ty::I64,
        _ => Ty::I32,
    };
    let cx = t.get_gpr(ty, 1);
    let cx = t.b.bin_imm(BinOp::Sub, cx, 1);
    let mut c = t.b.cmp_imm(IntCc::Ne, cx, 0);
    if let Some(cc) = cc {
        let z = t.b.cond(cc);
        c = t.b.and(c, z);
    }
    // A target outside the segment must fault before the count is put: then the order is check, count, leave.
    let target = near_target(t);
    if let (Target::Offset(off), false) = (target, is_suspect(t, target)) {
        t.put_gpr(1, cx);
        let taken = t.direct_exit(off);
        t.b.exit_if(c, taken, true);
        let exit = t.direct_exit(t.next);
        return t.end(exit, true);
    }
    let rip = match target {
        Target::Offset(off) => t.b.rip(off),
        Target::Rip(rip) => rip,
    };
    let next = t.next_rip();
    let to = t.b.select(c, rip, next);
    check_rip(t, to, widest(t));
    t.put_gpr(1, cx);
    t.end_indirect(to, IndirectKind::Jump);
}

fn jmp(t: &mut Translator<'_>) {
    if matches!(t.insn.op0_kind(), OpKind::Register | OpKind::Memory) {
        let v = t.read_op(0);
        let bits = t.b.ty(v).bits();
        let rip = t.b.zext(Ty::I64, v);
        check_rip(t, rip, bits);
        return t.end_indirect(rip, IndirectKind::Jump);
    }
    let target = near_target(t);
    check_target(t, target);
    end_at(t, target, IndirectKind::Jump);
}

fn call(t: &mut Translator<'_>) {
    let ty = Ty::int(t.insn.stack_pointer_increment().unsigned_abs());
    if matches!(t.insn.op0_kind(), OpKind::Register | OpKind::Memory) {
        let v = t.read_op(0);
        let rip = t.b.zext(Ty::I64, v);
        check_rip(t, rip, ty.bits());
        push_next(t, ty);
        return t.end_indirect(rip, IndirectKind::Call);
    }
    let target = near_target(t);
    check_target(t, target);
    push_next(t, ty);
    end_at(t, target, IndirectKind::Call);
}

fn push_next(t: &mut Translator<'_>, ty: Ty) {
    let next = t.next_rip();
    let next = t.b.trunc(ty, next);
    t.push(next);
}

fn ret(t: &mut Translator<'_>) {
    use Code::*;
    let ty = match t.insn.code() {
        Retnw | Retnw_imm16 => Ty::I16,
        Retnd | Retnd_imm16 => Ty::I32,
        _ => Ty::I64,
    };
    let (v, mut sp) = t.pop(ty);
    let rip = t.b.zext(Ty::I64, v);
    check_rip(t, rip, ty.bits());
    if t.insn.op_count() == 1 {
        let n = u64::from(t.insn.immediate16());
        sp = t.b.bin_imm(BinOp::Add, sp, n);
    }
    t.put_sp(sp);
    t.end_indirect(rip, IndirectKind::Return);
}

/// JMP and CALL ptr16:16, ptr16:32.
fn far_pointer(t: &mut Translator<'_>, helper: Helper) {
    let (ty, off) = if t.insn.op0_kind() == OpKind::FarBranch16 {
        (Ty::I16, u64::from(t.insn.far_branch16()))
    } else {
        (Ty::I32, u64::from(t.insn.far_branch32()))
    };
    let selector = u64::from(t.insn.far_branch_selector());
    let (selector, off) = (t.c64(selector), t.c64(off));
    far(t, helper, selector, off, ty);
}

/// JMP and CALL through memory: the offset, then the selector.
fn far_memory(t: &mut Translator<'_>, helper: Helper, ty: Ty) {
    let (off, selector) = load_far(t, ty);
    far(t, helper, selector, off, ty);
}

/// Loads a far pointer from the memory operand: (offset of type `ty`, selector).
pub(crate) fn load_far(t: &mut Translator<'_>, ty: Ty) -> (Value, Value) {
    let ea = t.effective_address();
    let (seg, flags) = (t.mem_segment(), t.mem_flags());
    let addr = t.linear(seg, ea, ty.bytes(), Access::Read);
    let off = t.b.load(ty, flags, addr);
    let ea = t.b.bin_imm(BinOp::Add, ea, u64::from(ty.bytes()));
    let addr = t.linear(seg, ea, 2, Access::Read);
    let selector = t.b.load(Ty::I16, flags, addr);
    (off, selector)
}

fn far(t: &mut Translator<'_>, helper: Helper, selector: Value, off: Value, ty: Ty) {
    let size = t.c64(u64::from(ty.log2_bytes()));
    let next = t.next_rip();
    t.call(helper, &[selector, off, size, next]);
    t.end_helped();
}

fn far_ret(t: &mut Translator<'_>) {
    use Code::*;
    let ty = match t.insn.code() {
        Retfw | Retfw_imm16 => Ty::I16,
        Retfq | Retfq_imm16 => Ty::I64,
        _ => Ty::I32,
    };
    let release = if t.insn.op_count() == 1 { t.insn.immediate16() } else { 0 };
    let size = t.c64(u64::from(ty.log2_bytes()));
    let release = t.c64(u64::from(release));
    t.call(Helper::FarRet, &[size, release]);
    t.end_helped();
}

/// INT n (0), INT3 (1), INTO (2), INT1 (3).
fn soft_int(t: &mut Translator<'_>, kind: u64) {
    let vector = match kind {
        0 => u64::from(t.insn.immediate8()),
        1 => 3,
        2 => 4,
        _ => 1,
    };
    if kind == 2 {
        let no = t.b.cond(CondCode::No);
        let exit = t.direct_exit(t.next);
        t.b.exit_if(no, exit, true);
    }
    let vector = t.c64(vector);
    let next = t.next_rip();
    let kind = t.c64(kind);
    t.call(Helper::SoftInt, &[vector, next, kind]);
    t.end_helped();
}

/// An instruction that is one helper call with the operand size, and sets `state.rip`.
fn sized(t: &mut Translator<'_>, helper: Helper, ty: Ty) {
    let size = t.c64(u64::from(ty.log2_bytes()));
    t.call(helper, &[size]);
    t.end_helped();
}

fn iret(t: &mut Translator<'_>, ty: Ty) {
    let size = t.c64(u64::from(ty.log2_bytes()));
    let next = t.next_rip();
    t.call(Helper::Iret, &[size, next]);
    t.end_helped();
}

fn syscall(t: &mut Translator<'_>) {
    let next = t.next_rip();
    t.call(Helper::Syscall, &[next]);
    t.end_helped();
}

fn sysenter(t: &mut Translator<'_>) {
    t.call(Helper::Sysenter, &[]);
    t.end_helped();
}

fn rsm(t: &mut Translator<'_>) {
    t.call(Helper::Rsm, &[]);
    t.end_helped();
}

fn ud(t: &mut Translator<'_>) {
    t.raise(Exception::UD);
}
