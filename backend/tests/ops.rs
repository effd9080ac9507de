//! Every op at every type on edge values, against the reference evaluator; every vector op against its definition.
#![allow(missing_docs)]
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

mod common;

use common::{Machine, Rig, enter};
use twofold_arch::flags::{arith_flags, eval_cond};
use twofold_arch::{CcKind, CcOp, CondCode, Loc, TbFlags};
use twofold_backend::{Emitter, Leave, Options};
use twofold_ir::testing::Rng;
use twofold_ir::{BinOp, Builder, Exit, IntCc, Ty, UnOp, VecOp, vecop};

const INTS: [Ty; 4] = [Ty::I8, Ty::I16, Ty::I32, Ty::I64];
const FLAGS: TbFlags = TbFlags(2);

/// One whose blocks the direct emitter writes, and one whose Cranelift does.
fn rigs() -> [Rig; 2] {
    let of = |emitter| Rig::new(Options { emitter, verify: true, ..Options::default() });
    [of(Emitter::Direct), of(Emitter::Cranelift)]
}

fn edge(ty: Ty) -> Vec<u64> {
    let top = 1u64 << (ty.bits() - 1);
    let mut v = vec![0, 1, 2, 7, 8, 15, 16, 31, 33, 63, 0x55, top - 1, top, top + 1, ty.mask() - 1, ty.mask()];
    v.iter_mut().for_each(|x| *x &= ty.mask());
    v.sort_unstable();
    v.dedup();
    v
}

/// One block a builder function makes, run for each input by the compiled code and the reference.
fn compare(rig: &mut Rig, what: &str, inputs: &[(u64, u64)], build: impl FnOnce(&mut Builder)) {
    let mut b = Builder::new(FLAGS);
    b.begin_insn(0, 1);
    build(&mut b);
    let block = b.finish(Exit::Helped, true);
    let tb = rig.install(&block);
    let (mut m, mut model) = (Machine::new(3), Machine::new(3));
    for &(x, y) in inputs {
        for m in [&mut m, &mut model] {
            m.state.gpr[0] = x;
            m.state.gpr[1] = y;
            m.state.gpr[2] = 0;
            m.state.budget = 10;
        }
        assert_eq!(enter(&mut m, tb.entry), Leave::Helped);
        twofold_ir::eval::reference::run(&block, &mut *model);
        assert_eq!(m.state.gpr, model.state.gpr, "{what} {x:#x} {y:#x}");
    }
}

fn pairs(ty: Ty) -> Vec<(u64, u64)> {
    let e = edge(ty);
    e.iter().flat_map(|&x| e.iter().map(move |&y| (x, y))).collect()
}

#[test]
fn two_operand_ops() {
    for rig in &mut rigs() {
        for ty in INTS {
            for op in BinOp::ALL {
                compare(rig, &format!("{op:?} {ty:?}"), &pairs(ty), |b| {
                    let (x, y) = (b.get(ty, Loc::gpr(0)), b.get(ty, Loc::gpr(1)));
                    let v = b.bin(op, x, y);
                    b.put(Loc::gpr(2), v);
                });
                // And with a constant, where other instructions are chosen.
                for imm in edge(ty) {
                    let inputs: Vec<_> = edge(ty).into_iter().map(|x| (x, 0)).collect();
                    compare(rig, &format!("{op:?} {ty:?} imm {imm:#x}"), &inputs, |b| {
                        let x = b.get(ty, Loc::gpr(0));
                        let v = b.bin_imm(op, x, imm);
                        b.put(Loc::gpr(2), v);
                    });
                }
            }
        }
    }
}

#[test]
fn comparisons_and_selects() {
    for rig in &mut rigs() {
        for ty in INTS {
            for cc in IntCc::ALL {
                compare(rig, &format!("{cc:?} {ty:?}"), &pairs(ty), |b| {
                    let (x, y) = (b.get(ty, Loc::gpr(0)), b.get(ty, Loc::gpr(1)));
                    let c = b.cmp(cc, x, y);
                    b.put(Loc::gpr(2), c);
                    let v = b.select(c, y, x);
                    b.put(Loc::gpr(3), v);
                });
            }
        }
    }
}

#[test]
fn one_operand_ops_and_extensions() {
    for rig in &mut rigs() {
        for ty in INTS {
            let inputs: Vec<_> = edge(ty).into_iter().map(|x| (x, 0)).collect();
            for op in UnOp::ALL {
                if op == UnOp::Bswap && ty == Ty::I8 {
                    continue;
                }
                compare(rig, &format!("{op:?} {ty:?}"), &inputs, |b| {
                    let x = b.get(ty, Loc::gpr(0));
                    let v = b.un(op, x);
                    b.put(Loc::gpr(2), v);
                });
            }
            for to in INTS {
                compare(rig, &format!("extend {ty:?} {to:?}"), &inputs, |b| {
                    let x = b.get(ty, Loc::gpr(0));
                    let values = if to.bits() > ty.bits() {
                        [b.zext(to, x), b.sext(to, x)]
                    } else if to == ty {
                        [x; 2]
                    } else {
                        [b.trunc(to, x); 2]
                    };
                    b.put(Loc::gpr(2), values[0]);
                    b.put(Loc::gpr(3), values[1]);
                    let again = b.zext(Ty::I64, values[0]);
                    b.put(Loc::gpr(4), again);
                });
            }
        }
    }
}

#[test]
fn conditions_and_flags_from_the_state() {
    for rig in &mut rigs() {
        let conditions: Vec<_> = CondCode::ALL
            .iter()
            .map(|&cc| {
                let mut b = Builder::new(FLAGS);
                b.begin_insn(0, 1);
                // A vector value alive across the call, in one of two.
                let x = b.get(Ty::V128, Loc::xmm(1));
                let c = b.cond(cc);
                b.put(Loc::gpr(2), c);
                let f = b.flags();
                b.put(Loc::gpr(3), f);
                if cc as u8 & 1 != 0 {
                    b.put(Loc::xmm(2), x);
                }
                rig.install(&b.finish(Exit::Helped, true))
            })
            .collect();
        let mut rng = Rng(5);
        let mut m = Machine::new(9);
        for kind in CcKind::ALL {
            for log2 in 0..4 {
                for _ in 0..10 {
                    let op = CcOp::new(kind, log2);
                    let s = &mut m.state;
                    (s.cc_dst, s.cc_src, s.cc_src2, s.cc_op) = (rng.value(), rng.value(), rng.value() & 1, op.0.into());
                    for (cc, tb) in CondCode::ALL.iter().zip(&conditions) {
                        m.state.gpr[2] = 0;
                        assert_eq!(enter(&mut m, tb.entry), Leave::Helped);
                        let s = &m.state;
                        let want = eval_cond(*cc, op, s.cc_dst, s.cc_src, s.cc_src2);
                        assert_eq!((s.gpr[2], s.gpr[3]), (want.into(), arith_flags(op, s.cc_dst, s.cc_src, s.cc_src2)));
                        if *cc as u8 & 1 != 0 {
                            assert_eq!(s.vec[1][..2], s.vec[2][..2]);
                        }
                    }
                }
            }
        }
    }
}

fn float_like(rng: &mut Rng) -> u128 {
    const F64: [f64; 10] = [0.0, -0.0, 1.0, -1.5, 1e300, -1e-310, f64::INFINITY, f64::NEG_INFINITY, 3e9, -2.5];
    const F32: [f32; 10] = [0.0, -0.0, 1.0, -1.5, 1e38, -1e-40, f32::INFINITY, f32::NEG_INFINITY, 3e9, 2.5];
    let word = |rng: &mut Rng| match rng.below(6) {
        0 => rng.pick(&F64).to_bits(),
        1 => 0x7ff0_0000_0000_0000 | rng.bits() & 0x800f_ffff_ffff_ffff,
        2 => u64::from(rng.pick(&F32).to_bits()) | u64::from(rng.pick(&F32).to_bits()) << 32,
        3 => rng.bits() & 0x807f_ffff_807f_ffff | 0x7f80_0000_7f80_0000,
        4 => rng.value(),
        _ => rng.bits(),
    };
    u128::from(word(rng)) | u128::from(word(rng)) << 64
}

#[test]
fn every_vector_op() {
    for rig in &mut rigs() {
        let mut rng = Rng(11);
        for &op in VecOp::ALL {
            let sig = op.sig();
            let takes_imm = op.name().ends_with("_imm");
            let imms: Vec<u8> = match op {
                _ if takes_imm => vec![0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 255],
                _ => (0..8).chain((0..10).map(|_| rng.bits() as u8)).chain([15, 16, 17, 31, 32, 255]).collect(),
            };
            for imm in imms {
                for swap in [false, true] {
                    let mut b = Builder::new(FLAGS);
                    b.begin_insn(0, 1);
                    // Operands from the state, in one case alive afterwards.
                    let mut args = Vec::new();
                    for (i, ty) in sig.args.iter().flatten().enumerate() {
                        args.push(b.get(*ty, Loc::xmm(i as u8)));
                    }
                    let v = b.vec(op, imm, &args);
                    b.put(Loc::xmm(4), v);
                    if swap {
                        for (i, &a) in args.iter().enumerate() {
                            b.put(Loc::xmm(5 + i as u8), a);
                        }
                    }
                    let tb = rig.install(&b.finish(Exit::Helped, true));
                    let mut m = Machine::new(rng.bits());
                    for _ in 0..12 {
                        let x = [(); 3].map(|()| float_like(&mut rng));
                        for (i, v) in x.iter().enumerate() {
                            m.state.vec[i] = [*v as u64, (*v >> 64) as u64, 1, 2];
                        }
                        m.state.vec[4] = [0; 4];
                        m.state.vec[5] = [0; 4];
                        let arg =
                            |i: usize| if sig.args[i] == Some(Ty::I64) { x[i] & u128::from(u64::MAX) } else { x[i] };
                        let want = vecop::eval(op, imm, arg(0), arg(1), arg(2));
                        assert_eq!(enter(&mut m, tb.entry), Leave::Helped);
                        let got = u128::from(m.state.vec[4][0]) | u128::from(m.state.vec[4][1]) << 64;
                        assert_eq!(got, want, "{op:?} imm {imm} {:x?}", x);
                        if swap && sig.args[0] == Some(Ty::V128) {
                            assert_eq!(m.state.vec[5][..2], m.state.vec[0][..2], "{op:?}");
                        }
                        assert_eq!(m.state.vec[4][2..], [0, 0]);
                    }
                }
            }
        }
    }
}
