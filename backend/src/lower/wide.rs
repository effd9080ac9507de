//! Ops that are one in 128 bits: additions and subtractions whose carry another one takes in, and both halves of a product.
//!
//! Place in the pipeline: looked for before a block is lowered, in both tiers. The IR has a carry as a comparison (`sum < operand`)
//! that is added as a number. A 128-bit addition of Cranelift's is an ADD and an ADC, so the operations that belong together become
//! one: where the low half is, if the operands of the high half are known there; else a low half is made up that carries when the
//! number is 1. The carry out is SETB of the same.
//! A product is one MUL. (Not so a signed one: its upper half mostly is for flags that only cold code looks at.)

use std::collections::HashMap;

use cranelift_codegen::ir::{InstBuilder, Value as Clif, types};
use twofold_ir::{BinOp, Block, IntCc, Op, Ty, Value};

use super::Lowering;
use crate::compiler::CompileError;

/// An addition or subtraction with a carry in.
#[derive(Clone, Copy, Debug)]
struct Chained {
    sub: bool,
    a: Value,
    b: Option<Value>,
    /// The carry in, as I8, and as the number that is added.
    carry: Value,
    number: Value,
}

/// What is computed at an op of the block beside its own value, or in another way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fused {
    Sum(Sum),
    /// Of these; the op that is the high half.
    Product(Value, Value, usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Sum {
    sub: bool,
    /// Operands of the low half; the number that is to become a carry when there is none.
    low: Result<(Value, Value), Value>,
    /// Of the high half.
    a: Value,
    b: Option<Value>,
    /// The op that is the high half, and the one that is its carry.
    high: usize,
    out: Option<usize>,
}

/// By the index of the op where they are computed.
fn plan(block: &Block) -> HashMap<usize, Fused> {
    // What all of them have.
    let wide = |op: &Op| {
        matches!(op, Op::Zext { to: Ty::I64, a } if block.ty(*a) == Ty::I8)
            || matches!(op, Op::Bin { op: BinOp::UMulHi, ty: Ty::I64, .. })
    };
    if !block.ops.iter().any(wide) {
        return HashMap::new();
    }
    let mut fused: HashMap<usize, Sum> = HashMap::new();
    let mut products: HashMap<(Value, Value), (usize, Option<usize>)> = HashMap::new();
    let mut chained: HashMap<usize, Chained> = HashMap::new();
    // The subtraction of two values, the carry (an I8) of a chained op.
    let mut differences: HashMap<(Value, Value), usize> = HashMap::new();
    let mut places: HashMap<usize, usize> = HashMap::new();
    for (i, op) in block.ops.iter().enumerate() {
        match *op {
            Op::Bin { op: op @ (BinOp::Add | BinOp::Sub), ty: Ty::I64, a, b } => {
                if op == BinOp::Sub {
                    differences.insert((a, b), i);
                }
                let Some(c) = chain(block, op, a, b) else { continue };
                chained.insert(i, c);
                let before = |v: Value, at: usize| v.index() < at;
                let low = carried(block, &differences, c.carry).filter(|l| {
                    l.1 == c.sub && before(c.a, l.0) && c.b.is_none_or(|b| before(b, l.0)) && !fused.contains_key(&l.0)
                });
                let Some((at, sub)) = low else { continue };
                let Op::Bin { a: x, b: y, .. } = block.ops[at] else { continue };
                places.insert(i, at);
                fused.insert(at, Sum { sub, low: Ok((x, y)), a: c.a, b: c.b, high: i, out: None });
            }
            Op::Bin { op: BinOp::Or | BinOp::And, ty: Ty::I8, .. } => {
                let Some(of) = carry_out(block, &chained, i) else { continue };
                let c = chained[&of];
                let at = *places.entry(of).or_insert(of);
                let (sub, low) = (c.sub, Err(c.number));
                let f = fused.entry(at).or_insert(Sum { sub, low, a: c.a, b: c.b, high: of, out: None });
                if f.high == of {
                    f.out = f.out.or(Some(i));
                }
            }
            Op::Bin { op: BinOp::Mul, ty: Ty::I64, a, b } => {
                products.entry((a, b)).or_insert((i, None));
            }
            Op::Bin { op: BinOp::UMulHi, ty: Ty::I64, a, b } => {
                if let Some(p) = products.get_mut(&(a, b)) {
                    p.1 = p.1.or(Some(i));
                }
            }
            _ => {}
        }
    }
    let products = products.into_iter().filter_map(|((a, b), (lo, hi))| Some((lo, Fused::Product(a, b, hi?))));
    fused.into_iter().map(|(at, sum)| (at, Fused::Sum(sum))).chain(products).collect()
}

/// `a op b` as a chained operation: one operand is a carry.
fn chain(block: &Block, op: BinOp, a: Value, b: Value) -> Option<Chained> {
    let carry = |v: Value| match *block.op(v) {
        Op::Zext { to: Ty::I64, a } if block.ty(a) == Ty::I8 && boolean(block, a) => Some(a),
        _ => None,
    };
    let (rest, number, carry) = match (carry(b), carry(a)) {
        (Some(c), _) => (a, b, c),
        (None, Some(c)) if op == BinOp::Add => (b, a, c),
        _ => return None,
    };
    let sub = op == BinOp::Sub;
    match *block.op(rest) {
        Op::Bin { op: inner, ty: Ty::I64, a, b } if inner == op => Some(Chained { sub, a, b: Some(b), carry, number }),
        _ => Some(Chained { sub, a: rest, b: None, carry, number }),
    }
}

/// Whether an I8 is 0 or 1 for certain.
fn boolean(block: &Block, v: Value) -> bool {
    match *block.op(v) {
        Op::Cmp { .. } => true,
        Op::Bin { op: BinOp::Or | BinOp::And, a, b, .. } => boolean(block, a) && boolean(block, b),
        _ => false,
    }
}

/// The addition or subtraction (true) whose carry `v` is.
fn carried(block: &Block, differences: &HashMap<(Value, Value), usize>, v: Value) -> Option<(usize, bool)> {
    let Op::Cmp { cc: IntCc::Ult, ty: Ty::I64, a: s, b: y } = *block.op(v) else { return None };
    match *block.op(s) {
        Op::Bin { op: BinOp::Add, a, b, .. } if y == a || y == b => Some((s.index(), false)),
        _ => differences.get(&(s, y)).map(|&at| (at, true)),
    }
}

/// The chained operation whose carry out op `i` is: `r < b | r == b & c`, of a subtraction the same with `a` for `r`; `r == 0 & c`
/// when there is no `b`; or `s < x | r < s` where `s` is the sum without the carry.
fn carry_out(block: &Block, chained: &HashMap<usize, Chained>, i: usize) -> Option<usize> {
    let Op::Bin { op, a, b, .. } = block.ops[i] else { return None };
    let compare = |v: Value, wanted: IntCc| match *block.op(v) {
        Op::Cmp { cc, ty: Ty::I64, a, b } if cc == wanted => Some((a, b)),
        _ => None,
    };
    if op == BinOp::And {
        let (r, zero) = compare(a, IntCc::Eq)?;
        let c = chained.get(&r.index())?;
        let fits = !c.sub && c.b.is_none() && c.carry == b && matches!(*block.op(zero), Op::Const { imm: 0, .. });
        return fits.then_some(r.index());
    }
    let (x, y) = compare(a, IntCc::Ult)?;
    if let Some((r, s)) = compare(b, IntCc::Ult) {
        let c = chained.get(&r.index())?;
        let Op::Bin { op: BinOp::Add, a: p, b: q, .. } = *block.op(s) else { return None };
        let fits = !c.sub && x == s && (y == p || y == q) && (c.a, c.b) == (p, Some(q));
        return fits.then_some(r.index());
    }
    let Op::Bin { op: BinOp::And, a: equal, b: carry, .. } = *block.op(b) else { return None };
    if compare(equal, IntCc::Eq)? != (x, y) {
        return None;
    }
    let addition = chained.get(&x.index()).filter(|c| !c.sub && (c.b == Some(y) || c.b.is_some() && c.a == y));
    if let Some(c) = addition {
        return (c.carry == carry).then_some(x.index());
    }
    // Of several subtractions of these, the one with this carry.
    let of = |c: &Chained| c.sub && (c.a, c.b, c.carry) == (x, Some(y), carry);
    chained.iter().filter(|(_, c)| of(c)).map(|(&r, _)| r).min()
}

impl Lowering<'_> {
    /// Looks for what can be computed together in the block that is to be lowered.
    pub(super) fn plan(&mut self) {
        self.fused = plan(self.block);
        self.done.clear();
    }

    /// Computes what is planned at op `i`. `true` if that is the op itself, or it has been computed before.
    pub(super) fn fuse(&mut self, i: usize) -> Result<bool, CompileError> {
        if self.done.contains(&i) {
            return Ok(true);
        }
        let f = match self.fused.get(&i) {
            Some(&Fused::Sum(f)) => f,
            Some(&Fused::Product(a, b, high)) => return self.product(i, a, b, high),
            None => return Ok(false),
        };
        let zero = self.const64(0);
        let (x, y) = match f.low {
            Ok((x, y)) => (self.get(x)?, self.get(y)?),
            Err(number) if f.sub => (zero, self.get(number)?),
            Err(number) => (self.get(number)?, self.const64(u64::MAX)),
        };
        let (a, b) = (self.get(f.a)?, f.b.map_or(Ok(zero), |b| self.get(b))?);
        let imm = f.b.is_none() && f.out.is_none();
        let x = self.wide(x, a);
        let y = if imm { self.cur.ins().uextend(types::I128, y) } else { self.wide(y, b) };
        let ins = self.cur.ins();
        let sum = match (f.out, f.sub) {
            (None, false) => ins.iadd(x, y),
            (None, true) => ins.isub(x, y),
            (Some(out), sub) => {
                let (sum, carry) = if sub { ins.usub_overflow(x, y) } else { ins.uadd_overflow(x, y) };
                self.set(out, carry);
                self.done.push(out);
                sum
            }
        };
        let (low, high) = self.cur.ins().isplit(sum);
        self.set(f.high, high);
        if f.low.is_ok() {
            self.set(i, low);
        }
        self.done.push(f.high);
        Ok(true)
    }

    fn product(&mut self, i: usize, a: Value, b: Value, high: usize) -> Result<bool, CompileError> {
        let (a, b) = (self.get(a)?, self.get(b)?);
        let a = self.cur.ins().uextend(types::I128, a);
        let b = self.cur.ins().uextend(types::I128, b);
        let product = self.cur.ins().imul(a, b);
        let (low, hi) = self.cur.ins().isplit(product);
        self.set(i, low);
        self.set(high, hi);
        self.done.push(high);
        Ok(true)
    }

    fn wide(&mut self, low: Clif, high: Clif) -> Clif {
        debug_assert_eq!(self.cur.func.dfg.value_type(low), types::I64);
        self.cur.ins().iconcat(low, high)
    }
}
