//! String instructions: MOVS STOS LODS CMPS SCAS, INS OUTS, with their repeat prefixes.
//!
//! Place: a family of the instruction table. One element is inline; a repeat prefix, and ports, go to a helper that gets
//! the packed [`StringOp`] and does it in bulk. Helper result 1: it stopped between elements, with the registers saying how
//! far it came, and the same instruction runs again.

use iced_x86::{Code, Mnemonic};
use twofold_arch::string_op::{Repeat, StringKind, StringOp};
use twofold_arch::{CcKind, Loc};
use twofold_ir::{BinOp, Helper, Ty, Value};

use crate::address::ES;
use crate::table::Row;
use crate::translator::{Access, Translator};

pub(crate) const ROWS: &[Row] = &[
    Row::all(Mnemonic::Movsb, |t| string(t, StringKind::Movs, Ty::I8)),
    Row::all(Mnemonic::Movsw, |t| string(t, StringKind::Movs, Ty::I16)),
    Row::one(Code::Movsd_m32_m32, |t| string(t, StringKind::Movs, Ty::I32)),
    Row::all(Mnemonic::Movsq, |t| string(t, StringKind::Movs, Ty::I64)),
    Row::all(Mnemonic::Stosb, |t| string(t, StringKind::Stos, Ty::I8)),
    Row::all(Mnemonic::Stosw, |t| string(t, StringKind::Stos, Ty::I16)),
    Row::all(Mnemonic::Stosd, |t| string(t, StringKind::Stos, Ty::I32)),
    Row::all(Mnemonic::Stosq, |t| string(t, StringKind::Stos, Ty::I64)),
    Row::all(Mnemonic::Lodsb, |t| string(t, StringKind::Lods, Ty::I8)),
    Row::all(Mnemonic::Lodsw, |t| string(t, StringKind::Lods, Ty::I16)),
    Row::all(Mnemonic::Lodsd, |t| string(t, StringKind::Lods, Ty::I32)),
    Row::all(Mnemonic::Lodsq, |t| string(t, StringKind::Lods, Ty::I64)),
    Row::all(Mnemonic::Cmpsb, |t| string(t, StringKind::Cmps, Ty::I8)),
    Row::all(Mnemonic::Cmpsw, |t| string(t, StringKind::Cmps, Ty::I16)),
    Row::one(Code::Cmpsd_m32_m32, |t| string(t, StringKind::Cmps, Ty::I32)),
    Row::all(Mnemonic::Cmpsq, |t| string(t, StringKind::Cmps, Ty::I64)),
    Row::all(Mnemonic::Scasb, |t| string(t, StringKind::Scas, Ty::I8)),
    Row::all(Mnemonic::Scasw, |t| string(t, StringKind::Scas, Ty::I16)),
    Row::all(Mnemonic::Scasd, |t| string(t, StringKind::Scas, Ty::I32)),
    Row::all(Mnemonic::Scasq, |t| string(t, StringKind::Scas, Ty::I64)),
    Row::all(Mnemonic::Insb, |t| ports(t, StringKind::Ins, Ty::I8)),
    Row::all(Mnemonic::Insw, |t| ports(t, StringKind::Ins, Ty::I16)),
    Row::all(Mnemonic::Insd, |t| ports(t, StringKind::Ins, Ty::I32)),
    Row::all(Mnemonic::Outsb, |t| ports(t, StringKind::Outs, Ty::I8)),
    Row::all(Mnemonic::Outsw, |t| ports(t, StringKind::Outs, Ty::I16)),
    Row::all(Mnemonic::Outsd, |t| ports(t, StringKind::Outs, Ty::I32)),
];

fn packed(t: &Translator<'_>, kind: StringKind, ty: Ty) -> StringOp {
    let compares = matches!(kind, StringKind::Cmps | StringKind::Scas);
    let repeat = if t.insn.has_repne_prefix() {
        if compares { Repeat::Repne } else { Repeat::Rep }
    } else if t.insn.has_rep_prefix() {
        Repeat::Rep
    } else {
        Repeat::None
    };
    StringOp {
        kind,
        repeat,
        log2_bytes: ty.log2_bytes(),
        log2_addr: t.string_addr_ty().log2_bytes(),
        segment: t.mem_segment(),
    }
}

fn string(t: &mut Translator<'_>, kind: StringKind, ty: Ty) {
    let op = packed(t, kind, ty);
    if op.repeat == Repeat::None {
        return once(t, op, ty);
    }
    let word = t.c64(op.pack());
    let more = t.call(Helper::StringOp, &[word]);
    let more = t.b.trunc(Ty::I8, more);
    t.again_if(more);
}

fn ports(t: &mut Translator<'_>, kind: StringKind, ty: Ty) {
    let op = packed(t, kind, ty);
    let word = t.c64(op.pack());
    let more = t.call(Helper::StringIo, &[word]);
    let more = t.b.trunc(Ty::I8, more);
    t.again_if(more);
    t.end_dispatch();
}

/// One element.
fn once(t: &mut Translator<'_>, op: StringOp, ty: Ty) {
    use StringKind::{Cmps, Lods, Movs, Scas, Stos};
    let at = t.string_addr_ty();
    let (reads_si, uses_di) = (matches!(op.kind, Movs | Lods | Cmps), op.kind != Lods);
    let si = reads_si.then(|| t.get_gpr(at, 6));
    let di = uses_di.then(|| t.get_gpr(at, 7));
    let source = si.map(|si| {
        let addr = t.linear(op.segment, si, ty.bytes(), Access::Read);
        t.b.load(ty, twofold_ir::MemFlags::NONE, addr)
    });
    let access = if matches!(op.kind, Movs | Stos) { Access::Write } else { Access::Read };
    let dest = di.map(|di| t.linear(ES, di, ty.bytes(), access));
    let mut compared = None;
    match (op.kind, source, dest) {
        (Movs, Some(v), Some(addr)) => t.b.store(twofold_ir::MemFlags::NONE, addr, v),
        (Stos, _, Some(addr)) => {
            let v = t.get_gpr(ty, 0);
            t.b.store(twofold_ir::MemFlags::NONE, addr, v);
        }
        (Cmps | Scas, a, Some(addr)) => {
            let a = a.unwrap_or_else(|| t.get_gpr(ty, 0));
            let b = t.b.load(ty, twofold_ir::MemFlags::NONE, addr);
            compared = Some((t.b.sub(a, b), b));
        }
        _ => {}
    }
    let step = step(t, ty, at);
    for (n, reg) in [(6, si), (7, di)] {
        if let Some(v) = reg {
            let v = t.b.add(v, step);
            t.put_gpr(n, v);
        }
    }
    if let (Lods, Some(v)) = (op.kind, source) {
        t.put_gpr(0, v);
    }
    if let Some((r, b)) = compared {
        t.b.set_cc(CcKind::Sub, r, Some(b), None);
    }
}

/// The element size, negative when DF is set, at the address size.
fn step(t: &mut Translator<'_>, ty: Ty, at: Ty) -> Value {
    let f = t.b.get(Ty::I64, Loc::RFLAGS_SYS);
    // DF is bit 10; move it to the place of twice the element size.
    let twice = u64::from(ty.bytes()) * 2;
    let df = t.b.bin_imm(BinOp::Shr, f, u64::from(10 - twice.trailing_zeros()));
    let df = t.b.bin_imm(BinOp::And, df, twice);
    let df = t.b.trunc(at, df);
    let size = t.b.iconst(at, u64::from(ty.bytes()));
    t.b.sub(size, df)
}
