//! Lowers a block to the words of the register machine.
//!
//! Three walks. `resolve` (forward) finds which values need no code because they are another value's word
//! (extensions of values already extended, truncations, halves), and how many bits of each word can be set. `place`
//! (backward) finds where each value is first and last used, sinks pure ops to their first use, and decides which values live in
//! a word of the guest state: a get whose field is not written while the value is used, a value on its way to a put. `emit`
//! (forward) writes the words and gives the other values temporaries. Invariant: all writes to the guest state
//! outside the temporaries happen in the order of the puts, except that a put may move up where no op in between could
//! see the difference.

mod emit;
mod place;

use twofold_arch::Loc;

use super::Program;
use super::env::FILE_BASE;
use super::reference::word_of;
use super::word::{code, record};
use crate::block::Block;
use crate::op::{BinOp, IntCc, Op, Ty, Value};

const NONE: u16 = u16::MAX;
/// File index of the first temporary; there are 63, and the last word takes results nobody reads.
const TEMPS: u8 = ((Loc::TEMPS.0 - FILE_BASE) / 8) as u8;
const TRASH: u8 = TEMPS + 62;
const FREE: u64 = (1 << 62) - 1;
const fn file_word(loc: Loc) -> u8 {
    ((loc.0 - FILE_BASE) / 8) as u8
}
const RIP_BASE: u8 = file_word(Loc::RIP_BASE);
const CC_SRC: u8 = file_word(Loc::CC_SRC);
const CC_OP: u8 = file_word(Loc::CC_OP);
const CC_WORDS: [u8; 4] = [file_word(Loc::CC_DST), CC_SRC, file_word(Loc::CC_SRC2), CC_OP];

/// What is known of the value (or effect) at an op's index, and of the position of that index.
#[derive(Clone, Copy, Debug)]
struct Val {
    /// The value whose word this one is in.
    root: u16,
    /// First and last position of use; `NONE`: unused. For a put, `first` is where its word is written next.
    first: u16,
    last: u16,
    /// Next op sunk to the same position, next value that dies there.
    next_sunk: u16,
    next_dead: u16,
    /// Heads of those lists for this position.
    sunk: u16,
    dead: u16,
    /// Candidate puts of the value, latest found first.
    puts: [u16; 2],
    /// The upper half of the root.
    half: u8,
    /// How many low bits of the word can be set.
    width: u8,
    /// The word.
    home: u8,
    /// A second word to write; 0: none.
    also: u8,
    /// The temporary is two words.
    pair: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Not decided, or nothing to emit.
    None,
    /// A value that gets a temporary when it is emitted.
    Temp,
    /// A value that is written to `home` (and `also`).
    Home,
    /// A put done by the value's op.
    Elided,
}

const FRESH: Val = Val {
    root: NONE,
    first: NONE,
    last: 0,
    next_sunk: NONE,
    next_dead: NONE,
    sunk: NONE,
    dead: NONE,
    puts: [NONE; 2],
    half: 0,
    width: 64,
    home: TRASH,
    also: 0,
    pair: false,
    state: State::None,
};

/// A put that could move up to its value's op: nothing seen since can tell.
#[derive(Clone, Copy, Debug)]
struct Pending {
    epoch: u32,
    put: u16,
}

/// Where an address comes from.
enum Base {
    Value(Value),
    Word(u8),
}

/// Lowers blocks; keeps its scratch memory from one to the next.
#[derive(Debug)]
pub struct Lowerer {
    vals: Vec<Val>,
    code: Vec<u64>,
    records: Vec<u64>,
    starts: Vec<u16>,
    /// Where each word is written next.
    next_write: [u16; 256],
    /// Position of the next op that may change any word.
    next_clobber: u16,
    pending: [Pending; 256],
    epoch: u32,
    free: u64,
    /// Where the last word that is a code is.
    last: usize,
    /// Ran out of temporaries.
    overflow: bool,
}

impl Default for Lowerer {
    fn default() -> Self {
        Self {
            vals: Vec::new(),
            code: Vec::new(),
            records: Vec::new(),
            starts: Vec::new(),
            next_write: [NONE; 256],
            next_clobber: NONE,
            pending: [Pending { epoch: 0, put: 0 }; 256],
            epoch: 0,
            free: FREE,
            last: 0,
            overflow: false,
        }
    }
}

/// A pure op is emitted where its value is first used.
fn sinks(op: &Op) -> bool {
    match op {
        Op::Const { .. }
        | Op::Rip { .. }
        | Op::Bin { .. }
        | Op::Un { .. }
        | Op::Cmp { .. }
        | Op::Select { .. }
        | Op::Zext { .. }
        | Op::Sext { .. }
        | Op::Pair { .. } => true,
        Op::Vec { op, .. } => !op.sig().touches_mxcsr,
        _ => false,
    }
}

/// The op can leave the block, or reads guest state that puts must have reached.
fn is_barrier(op: &Op) -> bool {
    match op {
        Op::ExitIf { .. } => true,
        Op::Call { helper, .. } => !helper.info().pure,
        _ => op.can_fault(),
    }
}

/// The file word of a whole-word field.
fn full_word(ty: Ty, loc: Loc) -> Option<u8> {
    let (w, shift) = word_of(loc, ty.bytes().min(8))?;
    match ty {
        Ty::I64 => Some(w as u8),
        Ty::V128 if shift == 0 && w < 255 => Some(w as u8),
        _ => None,
    }
}

/// The file words that a field has bytes in.
fn words_touched(ty: Ty, loc: Loc) -> impl Iterator<Item = u8> {
    (0..ty.bytes() as u16).filter_map(move |k| word_of(Loc(loc.0.saturating_add(k)), 1)).map(|(w, _)| w as u8)
}

impl Lowerer {
    /// Lowers a block, which must be valid.
    pub fn lower(&mut self, block: &Block) -> Program {
        self.begin(block);
        let fits = block.ops.len() < 0x7fff && block.retired <= record::MAX_RETIRED;
        if fits {
            self.resolve(block);
            self.place(block);
            self.emit(block);
        }
        if !fits || self.overflow || self.code.len().max(self.records.len()) > 0xffff {
            return Program { words: Box::default(), fallback: Some(Box::new(block.clone())) };
        }
        let (code, records, insns) = (self.code.len(), self.records.len(), self.starts.len());
        let mut words = Vec::with_capacity(1 + code + records + insns.div_ceil(4));
        words.push(code as u64 | (records as u64) << 16 | (insns as u64) << 32);
        words.extend_from_slice(&self.code);
        words.extend_from_slice(&self.records);
        words.extend(self.starts.chunks(4).map(|c| c.iter().rev().fold(0, |acc, &s| acc << 16 | u64::from(s))));
        Program { words: words.into_boxed_slice(), fallback: None }
    }

    fn begin(&mut self, block: &Block) {
        self.vals.clear();
        self.vals.resize(block.ops.len() + 1, FRESH);
        self.code.clear();
        self.records.clear();
        self.starts.clear();
        self.next_write = [NONE; 256];
        self.next_clobber = NONE;
        self.free = FREE;
        self.overflow = false;
        if self.epoch > u32::MAX / 2 {
            self.pending = [Pending { epoch: 0, put: 0 }; 256];
            self.epoch = 0;
        }
        self.epoch += 1;
    }

    // ---- values ----------------------------------------------------------------------------------------------------

    fn root(&self, v: Value) -> u16 {
        self.vals.get(v.index()).map_or(0, |x| x.root)
    }
    fn half(&self, v: Value) -> u8 {
        self.vals.get(v.index()).map_or(0, |x| x.half)
    }
    fn width(&self, v: Value) -> u32 {
        u32::from(self.vals[self.root(v) as usize].width)
    }
    /// The constant a value is, modulo its type.
    fn constant(&self, block: &Block, v: Value, ty: Ty) -> Option<u64> {
        match block.ops[self.root(v) as usize] {
            Op::Const { imm, .. } => Some(imm & ty.mask()),
            _ => None,
        }
    }
    /// The constant as an immediate of an op of type `ty`.
    fn imm(&self, block: &Block, v: Value, ty: Ty) -> Option<i32> {
        let c = self.constant(block, v, ty)?;
        match ty {
            Ty::I64 | Ty::V128 => i32::try_from(c as i64).ok(),
            _ => Some(c as u32 as i32),
        }
    }
    /// An address as a base and a displacement.
    fn address(&self, block: &Block, addr: Value) -> (Base, i32) {
        let r = self.root(addr);
        match block.ops[r as usize] {
            Op::Bin { op: BinOp::Add, ty: Ty::I64, a, b } => {
                if let Some(d) = self.imm(block, b, Ty::I64) {
                    return (Base::Value(a), d);
                }
                if let Some(d) = self.imm(block, a, Ty::I64) {
                    return (Base::Value(b), d);
                }
            }
            Op::Bin { op: BinOp::Sub, ty: Ty::I64, a, b } => {
                if let Some(d) = self.imm(block, b, Ty::I64).and_then(i32::checked_neg) {
                    return (Base::Value(a), d);
                }
            }
            Op::Rip { off } if block.flags.is64() => return (Base::Word(RIP_BASE), off),
            _ => {}
        }
        (Base::Value(addr), 0)
    }
    /// The index register and scale of `b` in `a + b`, when `b` is a shift by a constant.
    fn scaled(&self, block: &Block, ty: Ty, b: Value) -> Option<(Value, u8)> {
        match block.ops[self.root(b) as usize] {
            Op::Bin { op: BinOp::Shl, ty: Ty::I64, a, b } if ty == Ty::I64 => {
                Some((a, (self.constant(block, b, Ty::I64)? & 63) as u8))
            }
            _ => None,
        }
    }

    // ---- first walk: which values are whose words ------------------------------------------------------------------

    fn resolve(&mut self, block: &Block) {
        for (i, op) in block.ops.iter().enumerate() {
            let mut root = i as u16;
            let mut half = 0;
            let mut width = 64u32;
            match *op {
                Op::Const { imm, .. } => width = 64 - imm.leading_zeros(),
                Op::Bin { op, ty, a, b } => width = self.bin_width(block, op, ty, a, b),
                Op::Un { ty, .. } => width = ty.bits(),
                Op::Cmp { .. } | Op::Cond { .. } => width = 1,
                Op::Select { ty, a, b, .. } if ty != Ty::V128 => width = self.width(a).max(self.width(b)),
                Op::Zext { a, .. } => {
                    let from = block.ty(a).bits();
                    if self.width(a) <= from {
                        root = self.root(a);
                        half = self.half(a);
                    }
                    width = from;
                }
                Op::Trunc { a, .. } => {
                    root = self.root(a);
                    half = self.half(a);
                }
                Op::Sext { to: Ty::I32, .. } => width = 32,
                Op::Half { a, hi } => {
                    root = self.root(a);
                    half = u8::from(hi);
                }
                Op::Load { ty, .. } | Op::Rmw { ty, .. } | Op::CmpXchg { ty, .. } if ty != Ty::V128 => {
                    width = ty.bits()
                }
                _ => {}
            }
            let v = &mut self.vals[i];
            v.root = root;
            v.half = half;
            v.width = width as u8;
        }
    }

    fn bin_width(&self, block: &Block, op: BinOp, ty: Ty, a: Value, b: Value) -> u32 {
        let (wa, wb) = (self.width(a), self.width(b));
        let max = if ty == Ty::I32 { 32 } else { 64 };
        match op {
            BinOp::And => wa.min(wb).min(max),
            BinOp::Or | BinOp::Xor => wa.max(wb).min(max),
            // Emitted as 64-bit ops for narrow types.
            BinOp::Add | BinOp::Sub | BinOp::Mul => max,
            BinOp::Shl if self.constant(block, b, ty).is_some() => max,
            _ => ty.bits(),
        }
    }

    // ---- what an op becomes, for both walks that follow ------------------------------------------------------------

    /// The condition at `i` is emitted by the exit behind it.
    fn fuses_cond(&self, block: &Block, i: u16) -> bool {
        let v = &self.vals[i as usize];
        v.first == i + 1
            && v.last == i + 1
            && matches!(block.ops.get(i as usize + 1), Some(&Op::ExitIf { c, .. }) if c.0 == i)
            && matches!(block.ops[i as usize], Op::Cond { .. })
    }
    /// The operands of a comparison with a constant on the right.
    fn order(&self, block: &Block, cc: IntCc, ty: Ty, a: Value, b: Value) -> (IntCc, Value, Value) {
        if self.constant(block, a, ty).is_some() && self.constant(block, b, ty).is_none() {
            (cc.swapped(), b, a)
        } else {
            (cc, a, b)
        }
    }
    /// The immediate of a fused comparison, whose exit record must have a small index.
    fn exit_imm(&self, block: &Block, b: Value, ty: Ty, exit: u16) -> Option<i32> {
        if exit < 255 { self.imm(block, b, ty) } else { None }
    }
    /// Whether the op's word can write a second destination.
    fn has_second(op: BinOp, ty: Ty) -> bool {
        match op {
            BinOp::Add | BinOp::Sub | BinOp::And | BinOp::Or | BinOp::Xor | BinOp::Mul => true,
            BinOp::Shl | BinOp::Shr | BinOp::Sar | BinOp::Rotl | BinOp::Rotr => matches!(ty, Ty::I32 | Ty::I64),
            _ => false,
        }
    }
    fn bin_order(&self, block: &Block, op: BinOp, ty: Ty, a: Value, b: Value) -> (Value, Value) {
        if op.commutes() {
            let left = self.constant(block, a, ty).is_some() && self.constant(block, b, ty).is_none();
            let scaled =
                op == BinOp::Add && self.scaled(block, ty, a).is_some() && self.constant(block, b, ty).is_none();
            if left || scaled {
                return (b, a);
            }
        }
        (a, b)
    }
    /// The code and immediate of a two-operand op with a constant on the right.
    fn bin_imm(&self, block: &Block, op: BinOp, ty: Ty, a: Value, b: Value) -> Option<(u8, i32)> {
        let imm = self.imm(block, b, ty)?;
        let count = imm & (ty.bits() as i32 - 1);
        let narrow = matches!(ty, Ty::I8 | Ty::I16);
        Some(match op {
            BinOp::Shl if narrow => (code::SHLI, count),
            BinOp::Shr if narrow && self.width(a) <= ty.bits() => (code::SHRI, count),
            BinOp::Shl | BinOp::Shr | BinOp::Sar | BinOp::Rotl | BinOp::Rotr => {
                (Self::bin_code(op, ty)? + (code::ADDI - code::ADD), count)
            }
            _ => (Self::bin_code(op, ty)? + (code::ADDI - code::ADD), imm),
        })
    }
    /// The code of a two-operand op that has one of its own.
    fn bin_code(op: BinOp, ty: Ty) -> Option<u8> {
        let any = match op {
            BinOp::Add => Some(code::ADD),
            BinOp::Sub => Some(code::SUB),
            BinOp::And => Some(code::AND),
            BinOp::Or => Some(code::OR),
            BinOp::Xor => Some(code::XOR),
            BinOp::Mul => Some(code::MUL),
            _ => None,
        };
        let wide = match op {
            BinOp::Shl => Some(code::SHL),
            BinOp::Shr => Some(code::SHR),
            BinOp::Sar => Some(code::SAR),
            BinOp::Rotl => Some(code::ROTL),
            BinOp::Rotr => Some(code::ROTR),
            _ => any,
        };
        match ty {
            Ty::I64 | Ty::V128 => wide,
            Ty::I32 => Some(wide? + (code::ADD32 - code::ADD)),
            Ty::I8 | Ty::I16 => any,
        }
    }
}

// The numbers of these are used as offsets between codes.
const _: () = {
    assert!(code::ADD32 - code::ADD == code::ADDI - code::ADD - 11 && code::ADDI32 - code::ADDI == 11);
    assert!(code::ADDI - code::ADD == 22 && code::ADDI32 - code::ADD32 == 22);
    assert!(code::XSGE - code::XEQ == IntCc::Sge as u8 && code::XSGEI - code::XEQI == IntCc::Sge as u8);
    assert!(code::LD128 - code::LD8 == Ty::V128 as u8 && code::ST128 - code::ST8 == Ty::V128 as u8);
    assert!(code::ZX32 - code::ZX8 == Ty::I32 as u8 && code::SX32 - code::SX8 == Ty::I32 as u8);
};
