//! PUSH and POP in all forms, PUSHA POPA, ENTER and LEAVE.
//!
//! Place: a family of the instruction table. PUSHF and POPF are in `flags`, CALL and RET in `branch`.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use twofold_ir::{BinOp, Helper, Ty};

use crate::segments::load_segment;
use crate::table::Row;
use crate::translator::{Translator, segment};

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Push, push),
    Row::all(Mnemonic::Pop, pop),
    Row::all(Mnemonic::Pusha, |t| pusha(t, Ty::I16)),
    Row::all(Mnemonic::Pushad, |t| pusha(t, Ty::I32)),
    Row::all(Mnemonic::Popa, |t| popa(t, Ty::I16)),
    Row::all(Mnemonic::Popad, |t| popa(t, Ty::I32)),
    Row::all(Mnemonic::Enter, enter),
    Row::all(Mnemonic::Leave, leave),
];

fn push(t: &mut Translator<'_>) {
    let size = t.insn.stack_pointer_increment().unsigned_abs();
    let ty = Ty::int(size);
    if t.insn.op0_kind() == OpKind::Register && t.insn.op0_register().is_segment_register() {
        // A 16-bit move into the slot, whatever its size (SDM Vol 2B, PUSH).
        let n = segment(t.insn.op0_register());
        let v = t.b.get(Ty::I16, twofold_arch::Loc::seg_selector(n));
        let sp = t.sp();
        let sp = t.b.bin_imm(BinOp::Sub, sp, u64::from(size));
        t.store_stack(sp, v);
        return t.put_sp(sp);
    }
    let v = t.read_op_as(0, ty);
    t.push(v);
}

fn pop(t: &mut Translator<'_>) {
    let size = t.insn.stack_pointer_increment().unsigned_abs();
    let ty = Ty::int(size);
    if t.is_mem(0) {
        return pop_memory(t, ty);
    }
    let r = t.insn.op0_register();
    if r.is_segment_register() {
        let sp = t.sp();
        let selector = t.load_stack(Ty::I16, sp);
        let sp = t.b.bin_imm(BinOp::Add, sp, u64::from(size));
        load_segment(t, segment(r), selector, true);
        return t.put_sp(sp);
    }
    let (v, sp) = t.pop(ty);
    // POP rSP: the value popped wins over the increment.
    t.put_sp(sp);
    t.write_gpr(r, v);
}

/// POP to memory: an address on rSP uses the value after the increment (SDM Vol 2B, POP).
fn pop_memory(t: &mut Translator<'_>, ty: Ty) {
    let (v, sp) = t.pop(ty);
    let on_sp = matches!(t.insn.memory_base(), Register::SP | Register::ESP | Register::RSP);
    let ea = t.effective_address();
    let ea = if on_sp { t.b.bin_imm(BinOp::Add, ea, u64::from(ty.bytes())) } else { ea };
    let (seg, flags) = (t.mem_segment(), t.mem_flags());
    let addr = t.linear(seg, ea, ty.bytes(), crate::translator::Access::Write);
    t.b.store(flags, addr, v);
    t.put_sp(sp);
}

fn pusha(t: &mut Translator<'_>, ty: Ty) {
    let sp = t.sp();
    let step = u64::from(ty.bytes());
    for n in 0..8u8 {
        let v = t.get_gpr(ty, n);
        let at = t.b.bin_imm(BinOp::Sub, sp, step * u64::from(n + 1));
        t.store_stack(at, v);
    }
    let sp = t.b.bin_imm(BinOp::Sub, sp, step * 8);
    t.put_sp(sp);
}

fn popa(t: &mut Translator<'_>, ty: Ty) {
    let sp = t.sp();
    let step = u64::from(ty.bytes());
    let mut values = [sp; 8];
    for n in 0..8u8 {
        if n != 4 {
            let at = t.b.bin_imm(BinOp::Add, sp, step * u64::from(7 - n));
            values[usize::from(n)] = t.load_stack(ty, at);
        }
    }
    for n in 0..8u8 {
        if n != 4 {
            t.put_gpr(n, values[usize::from(n)]);
        }
    }
    let sp = t.b.bin_imm(BinOp::Add, sp, step * 8);
    t.put_sp(sp);
}

fn enter(t: &mut Translator<'_>) {
    let ty = match t.insn.code() {
        Code::Enterw_imm16_imm8 => Ty::I16,
        Code::Enterd_imm16_imm8 => Ty::I32,
        _ => Ty::I64,
    };
    let frame = t.c64(u64::from(t.insn.immediate16()));
    let level = t.c64(u64::from(t.insn.immediate8_2nd()));
    let size = t.c64(u64::from(ty.log2_bytes()));
    t.call(Helper::Enter, &[frame, level, size]);
}

fn leave(t: &mut Translator<'_>) {
    let ty = match t.insn.code() {
        Code::Leavew => Ty::I16,
        Code::Leaved => Ty::I32,
        _ => Ty::I64,
    };
    let sp_ty = t.stack_ty();
    let bp = t.get_gpr(sp_ty, 5);
    let v = t.load_stack(ty, bp);
    let sp = t.b.bin_imm(BinOp::Add, bp, u64::from(ty.bytes()));
    t.put_sp(sp);
    t.put_gpr(5, v);
}
