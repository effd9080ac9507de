//! System instructions: control, debug and model-specific registers, ports, TLB and cache control, time, identification,
//! random numbers, fences and hints.
//!
//! Place: a family of the instruction table. What they do is the runtime's; here are the checks, the operands, and
//! whether the block ends because the key, translations or event delivery may have changed.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use twofold_arch::Exception;
use twofold_arch::cpuid::Feature;
use twofold_ir::{Helper, MemFlags, Ty};

use crate::moves::nop;
use crate::table::{Need, Row};
use crate::translator::{Access, Translator};

pub(crate) const ROWS: &[Row] = &[
    Row::one(Code::Mov_r32_cr, |t| read_numbered(t, Helper::ReadCr)).need(Need::CPL0),
    Row::one(Code::Mov_r64_cr, |t| read_numbered(t, Helper::ReadCr)).need(Need::CPL0),
    Row::one(Code::Mov_cr_r32, |t| write_numbered(t, Helper::WriteCr)).need(Need::CPL0),
    Row::one(Code::Mov_cr_r64, |t| write_numbered(t, Helper::WriteCr)).need(Need::CPL0),
    Row::one(Code::Mov_r32_dr, |t| read_numbered(t, Helper::ReadDr)).need(Need::CPL0),
    Row::one(Code::Mov_r64_dr, |t| read_numbered(t, Helper::ReadDr)).need(Need::CPL0),
    Row::one(Code::Mov_dr_r32, |t| write_numbered(t, Helper::WriteDr)).need(Need::CPL0),
    Row::one(Code::Mov_dr_r64, |t| write_numbered(t, Helper::WriteDr)).need(Need::CPL0),
    Row::one(Code::Mov_r32_tr, ud),
    Row::one(Code::Mov_tr_r32, ud),
    Row::all(Mnemonic::Lmsw, lmsw).need(Need::CPL0),
    Row::all(Mnemonic::Clts, |t| then_dispatch(t, Helper::Clts)).need(Need::CPL0),
    Row::all(Mnemonic::Hlt, |t| then_dispatch(t, Helper::Hlt)).need(Need::CPL0),
    Row::all(Mnemonic::Pause, |t| plain(t, Helper::Pause)),
    Row::all(Mnemonic::Rdmsr, |t| plain(t, Helper::Rdmsr)).need(Need::CPL0),
    Row::all(Mnemonic::Wrmsr, |t| then_dispatch(t, Helper::Wrmsr)).need(Need::CPL0),
    Row::all(Mnemonic::Rdtsc, |t| plain(t, Helper::Rdtsc)),
    Row::all(Mnemonic::Rdtscp, |t| plain(t, Helper::Rdtscp)).feature(Feature::Rdtscp),
    Row::all(Mnemonic::Rdpmc, |t| plain(t, Helper::Rdpmc)),
    Row::all(Mnemonic::Rdpid, rdpid).feature(Feature::Rdpid),
    Row::all(Mnemonic::Cpuid, |t| plain(t, Helper::Cpuid)),
    Row::all(Mnemonic::Xgetbv, |t| plain(t, Helper::Xgetbv)).feature(Feature::Xsave),
    Row::all(Mnemonic::Xsetbv, |t| then_dispatch(t, Helper::Xsetbv)).feature(Feature::Xsave),
    Row::all(Mnemonic::Rdpkru, |t| plain(t, Helper::Rdpkru)).feature(Feature::Pku),
    Row::all(Mnemonic::Wrpkru, |t| plain(t, Helper::Wrpkru)).feature(Feature::Pku),
    Row::all(Mnemonic::Rdrand, |t| random(t, Helper::Rdrand)).feature(Feature::Rdrand),
    Row::all(Mnemonic::Rdseed, |t| random(t, Helper::Rdseed)).feature(Feature::Rdseed),
    Row::all(Mnemonic::Invlpg, invlpg).need(Need::CPL0),
    Row::all(Mnemonic::Invpcid, invpcid).feature(Feature::Invpcid).need(Need::CPL0),
    Row::all(Mnemonic::Invd, |t| cache(t, 0)).need(Need::CPL0),
    Row::all(Mnemonic::Wbinvd, |t| cache(t, 1)).need(Need::CPL0),
    Row::all(Mnemonic::Wbnoinvd, |t| cache(t, 1)).need(Need::CPL0),
    Row::all(Mnemonic::Clflush, touch).feature(Feature::Clflush),
    Row::all(Mnemonic::Clflushopt, touch).feature(Feature::Clflushopt),
    Row::all(Mnemonic::Clwb, touch).feature(Feature::Clwb),
    Row::all(Mnemonic::Monitor, monitor).feature(Feature::Monitor),
    Row::all(Mnemonic::Mwait, |t| then_dispatch(t, Helper::Mwait)).feature(Feature::Monitor),
    Row::all(Mnemonic::Sfence, nop).feature(Feature::Sse),
    Row::all(Mnemonic::Lfence, nop).feature(Feature::Sse2),
    Row::all(Mnemonic::Mfence, nop).feature(Feature::Sse2),
    Row::all(Mnemonic::Serialize, nop).feature(Feature::Serialize),
    Row::all(Mnemonic::In, port_in),
    Row::all(Mnemonic::Out, port_out),
    Row::all(Mnemonic::Bound, bound),
];

fn ud(t: &mut Translator<'_>) {
    t.raise(Exception::UD);
}

/// A helper without operands.
fn plain(t: &mut Translator<'_>, helper: Helper) {
    t.call(helper, &[]);
}

/// A helper without operands that may change the key, translations, or whether events are due.
fn then_dispatch(t: &mut Translator<'_>, helper: Helper) {
    t.call(helper, &[]);
    t.end_dispatch();
}

/// The number of a control or debug register; `None` for one that does not exist.
fn number(t: &Translator<'_>, r: Register, cr: bool) -> Option<u64> {
    let first = if cr { Register::CR0 } else { Register::DR0 };
    let n = (r as u32).wrapping_sub(first as u32);
    let exists = if cr { matches!(n, 0 | 2 | 3 | 4) || n == 8 && t.is64() } else { n < 8 };
    exists.then_some(u64::from(n))
}

fn read_numbered(t: &mut Translator<'_>, helper: Helper) {
    let Some(n) = number(t, t.insn.op1_register(), helper == Helper::ReadCr) else {
        return t.raise(Exception::UD);
    };
    let ty = t.op_ty(0);
    let n = t.c64(n);
    let v = t.call(helper, &[n]);
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

fn write_numbered(t: &mut Translator<'_>, helper: Helper) {
    let Some(n) = number(t, t.insn.op0_register(), helper == Helper::WriteCr) else {
        return t.raise(Exception::UD);
    };
    let v = t.read_op(1);
    let n = t.c64(n);
    t.call(helper, &[n, v]);
    t.end_dispatch();
}

fn lmsw(t: &mut Translator<'_>) {
    // Its exit depends on the operand, so that is read first.
    let v = t.read_op_as(0, Ty::I16);
    let la = if t.is_mem(0) { t.mem_addr_unaligned(1, Access::Read) } else { t.c64(0) };
    t.call(Helper::Lmsw, &[v, la]);
    t.end_dispatch();
}

fn rdpid(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let v = t.call(Helper::Rdpid, &[]);
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

/// RDRAND and RDSEED: the helper sets the flags.
fn random(t: &mut Translator<'_>, helper: Helper) {
    let ty = t.op_ty(0);
    let size = t.c64(u64::from(ty.log2_bytes()));
    let v = t.call(helper, &[size]);
    let v = t.b.trunc(ty, v);
    t.write_op(0, v);
}

fn invlpg(t: &mut Translator<'_>) {
    let addr = t.mem_addr_unaligned(1, Access::Read);
    t.call(Helper::Invlpg, &[addr]);
    t.end_dispatch();
}

fn invpcid(t: &mut Translator<'_>) {
    let kind = t.read_op(0);
    let addr = t.mem_addr_unaligned(16, Access::Read);
    t.call(Helper::Invpcid, &[kind, addr]);
    t.end_dispatch();
}

fn cache(t: &mut Translator<'_>, what: u64) {
    let what = t.c64(what);
    t.call(Helper::CacheControl, &[what]);
}

/// Cache-line instructions fault as a load of a byte does; there is no cache to act on.
fn touch(t: &mut Translator<'_>) {
    let addr = t.mem_addr_unaligned(1, Access::Read);
    t.b.load(Ty::I8, MemFlags::NONE, addr);
}

fn monitor(t: &mut Translator<'_>) {
    let ty = match t.insn.code() {
        Code::Monitorw => Ty::I16,
        Code::Monitord => Ty::I32,
        _ => Ty::I64,
    };
    let ax = t.get_gpr(ty, 0);
    let seg = t.mem_segment();
    let addr = t.linear(seg, ax, 1, Access::Read);
    t.call(Helper::Monitor, &[addr]);
}

/// A port operand: an immediate byte or DX.
fn port(t: &mut Translator<'_>, n: u32) -> twofold_ir::Value {
    if t.insn.op_kind(n) == OpKind::Register {
        return t.get_gpr(Ty::I16, 2);
    }
    let p = u64::from(t.insn.immediate8());
    t.c64(p)
}

fn port_in(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let p = port(t, 1);
    let bytes = t.c64(u64::from(ty.bytes()));
    let v = t.call(Helper::In, &[p, bytes]);
    let v = t.b.trunc(ty, v);
    t.put_gpr(0, v);
}

fn port_out(t: &mut Translator<'_>) {
    let (_, ty, _) = crate::translator::gpr(t.insn.op1_register());
    let p = port(t, 0);
    let v = t.get_gpr(ty, 0);
    let bytes = t.c64(u64::from(ty.bytes()));
    t.call(Helper::Out, &[p, bytes, v]);
    t.end_dispatch();
}

fn bound(t: &mut Translator<'_>) {
    let ty = t.op_ty(0);
    let index = t.read_op(0);
    let addr = t.mem_addr_unaligned(ty.bytes() * 2, Access::Read);
    let size = t.c64(u64::from(ty.log2_bytes()));
    t.call(Helper::Bound, &[index, addr, size]);
}
