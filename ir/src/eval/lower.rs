//! Lowers a block to the words of the register machine.
//!
//! Three walks. `resolve` (forward) finds which values need no code because they are another value's word
//! (extensions of values already extended, truncations, halves), and how many bits of each word can be set. `place`
//! (backward) finds where each value is first and last used, sinks pure ops to their first use, and decides which values live in
//! a word of the guest state: a get whose field is not written while the value is used, a value on its way to a put. `emit`
//! (forward) writes the words and gives the other values temporaries. Invariant: all writes to the guest state
//! outside the temporaries happen in the order of the puts, except that a put may move up where no op in between could
//! see the difference.

use twofold_arch::{Exception, Loc};

use super::env::FILE_BASE;
use super::reference::word_of;
use super::word::{code, record, word, word_bytes};
use super::{Extra, Program};
use crate::block::{Block, Exit, IndirectKind};
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
    raises: Vec<Exception>,
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
            raises: Vec::new(),
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
        if !fits || self.overflow || self.code.len() > 0xffff {
            let extra = Extra { fallback: Some(block.clone()), raises: Vec::new() };
            return Program { words: Box::default(), code: 0, records: 0, insns: 0, extra: Some(Box::new(extra)) };
        }
        let (code, records) = (self.code.len(), self.records.len());
        let mut words = Vec::with_capacity(code + records + self.starts.len().div_ceil(4));
        words.extend_from_slice(&self.code);
        words.extend_from_slice(&self.records);
        words.extend(self.starts.chunks(4).map(|c| c.iter().rev().fold(0, |acc, &s| acc << 16 | u64::from(s))));
        let extra = (!self.raises.is_empty())
            .then(|| Box::new(Extra { fallback: None, raises: core::mem::take(&mut self.raises) }));
        Program {
            words: words.into_boxed_slice(),
            code: code as u16,
            records: records as u16,
            insns: self.starts.len() as u16,
            extra,
        }
    }

    fn begin(&mut self, block: &Block) {
        self.vals.clear();
        self.vals.resize(block.ops.len() + 1, FRESH);
        self.code.clear();
        self.records.clear();
        self.starts.clear();
        self.raises.clear();
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

    // ---- second walk: where values live ----------------------------------------------------------------------------

    fn use_at(&mut self, v: Value, p: u16) {
        let r = self.root(v);
        self.use_root(r, p);
    }
    fn use_root(&mut self, r: u16, p: u16) {
        let x = &mut self.vals[r as usize];
        x.first = x.first.min(p);
        x.last = x.last.max(p);
    }

    fn place(&mut self, block: &Block) {
        let n = block.ops.len() as u16;
        if let Some(Exit::Indirect { rip, .. }) = block.end {
            self.use_at(rip, n);
        }
        for (i, op) in block.ops.iter().enumerate().rev() {
            let i = i as u16;
            let v = self.vals[i as usize];
            match *op {
                Op::Nop | Op::Trunc { .. } | Op::Half { .. } => {}
                Op::Put { ty, loc, v } => self.place_put(block, i, ty, loc, v),
                Op::Get { ty, loc } => self.place_get(i, ty, loc),
                Op::Cond { .. } | Op::Flags => {
                    CC_WORDS.iter().for_each(|&w| self.kill(w));
                    if v.first != NONE && !self.fuses_cond(block, i) {
                        self.vals[i as usize].state = State::Temp;
                    }
                }
                Op::ExitIf { c, exit } => {
                    self.epoch += 1;
                    self.place_exit(block, i, c, exit);
                }
                _ if v.root != i => {}
                _ => self.place_value(block, i, op),
            }
        }
    }

    fn kill(&mut self, w: u8) {
        self.pending[w as usize].epoch = 0;
    }
    fn writes(&mut self, w: u8, p: u16) {
        self.next_write[w as usize] = p;
    }
    /// Where word `w` (and the next, for a vector) may be written next.
    fn written(&self, w: u8, ty: Ty) -> u16 {
        let mut p = self.next_write[w as usize].min(self.next_clobber);
        if ty == Ty::V128 {
            p = p.min(self.next_write[w.wrapping_add(1) as usize]);
        }
        p
    }

    fn place_put(&mut self, block: &Block, i: u16, ty: Ty, loc: Loc, v: Value) {
        let Some(w) = full_word(ty, loc) else {
            // Part of a word, or outside the file.
            for w in words_touched(ty, loc) {
                self.kill(w);
                self.writes(w, i);
            }
            if self.constant(block, v, ty).is_none() || word_of(loc, ty.bytes()).is_none() {
                self.use_at(v, i);
            }
            return;
        };
        let next = self.written(w, ty);
        self.vals[i as usize].first = next;
        let r = self.root(v);
        let whole =
            self.vals[v.index()].half == 0 && block.ops[r as usize].result() != Some(Ty::V128) || ty == Ty::V128;
        let words = if ty == Ty::V128 { 2 } else { 1 };
        for k in 0..words {
            self.writes(w + k, i);
            self.kill(w + k);
        }
        if !matches!(block.ops[r as usize], Op::Const { .. }) {
            self.use_root(r, i);
            if whole {
                let epoch = self.epoch;
                for k in 0..words {
                    self.pending[(w + k) as usize] = Pending { epoch, put: i };
                }
                let x = &mut self.vals[r as usize];
                x.puts = [i, x.puts[0]];
            }
        }
    }

    fn place_get(&mut self, i: u16, ty: Ty, loc: Loc) {
        let v = self.vals[i as usize];
        if v.first == NONE {
            return;
        }
        let state = match word_of(loc, ty.bytes().min(8)) {
            Some((w, shift)) => {
                let w = w as u8;
                self.kill(w);
                if ty == Ty::V128 {
                    self.kill(w.wrapping_add(1));
                }
                let aligned = shift == 0 && (ty != Ty::V128 || w < 255);
                if aligned && v.last <= self.written(w, ty) {
                    self.vals[i as usize].home = w;
                    State::None
                } else {
                    State::Temp
                }
            }
            None => {
                // May overlap words of the file all the same.
                words_touched(ty, loc).for_each(|w| self.kill(w));
                State::Temp
            }
        };
        self.vals[i as usize].state = state;
    }

    /// The condition at `i` is emitted by the exit behind it.
    fn fuses_cond(&self, block: &Block, i: u16) -> bool {
        let v = &self.vals[i as usize];
        v.first == i + 1
            && v.last == i + 1
            && matches!(block.ops.get(i as usize + 1), Some(&Op::ExitIf { c, .. }) if c.0 == i)
            && matches!(block.ops[i as usize], Op::Cond { .. })
    }

    fn place_exit(&mut self, block: &Block, i: u16, c: Value, exit: u16) {
        if let Some(Exit::Indirect { rip, .. }) = block.exits.get(exit as usize).map(|e| e.exit) {
            self.use_at(rip, i);
        }
        match block.ops[self.root(c) as usize] {
            Op::Cmp { cc, ty, a, b } => {
                let (_, a, b) = self.order(block, cc, ty, a, b);
                self.use_at(a, i);
                if self.exit_imm(block, b, ty, exit).is_none() {
                    self.use_at(b, i);
                }
            }
            _ => self.use_at(c, i),
        }
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

    /// A value with an op of its own.
    fn place_value(&mut self, block: &Block, i: u16, op: &Op) {
        let v = self.vals[i as usize];
        let sinks = sinks(op);
        if sinks && v.first == NONE {
            return;
        }
        let p = if sinks { v.first } else { i };
        self.vals[i as usize].state = State::Temp;
        self.claim(block, i, p, op);
        if sinks {
            let head = &mut self.vals[p as usize].sunk;
            let next = core::mem::replace(head, i);
            self.vals[i as usize].next_sunk = next;
        }
        if is_barrier(op) {
            self.epoch += 1;
            if matches!(op, Op::Call { .. }) {
                self.next_clobber = i;
            }
        }
        self.place_operands(block, p, op);
    }

    /// Finds puts that the op of value `i`, emitted at `p`, can do itself.
    fn claim(&mut self, block: &Block, i: u16, p: u16, op: &Op) {
        let v = self.vals[i as usize];
        let two = matches!(op, Op::Bin { op, ty, .. } if Self::has_second(*op, *ty));
        // Sunk ops go before another's op would read what a put moved there has changed.
        if p != i && !v.puts.contains(&p) {
            return;
        }
        for put in v.puts {
            let Some(&Op::Put { ty, loc, .. }) = block.ops.get(put as usize) else { continue };
            let Some(w) = full_word(ty, loc) else { continue };
            let live = |x: &Pending| x.put == put && x.epoch == self.epoch;
            let pending =
                live(&self.pending[w as usize]) && (ty != Ty::V128 || live(&self.pending[w.wrapping_add(1) as usize]));
            if put != p && !pending {
                continue;
            }
            let x = self.vals[i as usize];
            if x.state == State::Temp && v.last <= self.vals[put as usize].first {
                self.vals[i as usize].home = w;
                self.vals[i as usize].state = State::Home;
            } else if two && x.also == 0 {
                self.vals[i as usize].also = w;
            } else {
                continue;
            }
            self.vals[put as usize].state = State::Elided;
            for k in 0..if ty == Ty::V128 && put != p { 2 } else { u8::from(put != p) } {
                // Moved up: nothing in between writes or reads the word, or the put would not be pending.
                self.writes(w + k, p);
                self.kill(w + k);
            }
        }
    }

    /// Whether the op's word can write a second destination.
    fn has_second(op: BinOp, ty: Ty) -> bool {
        match op {
            BinOp::Add | BinOp::Sub | BinOp::And | BinOp::Or | BinOp::Xor | BinOp::Mul => true,
            BinOp::Shl | BinOp::Shr | BinOp::Sar | BinOp::Rotl | BinOp::Rotr => matches!(ty, Ty::I32 | Ty::I64),
            _ => false,
        }
    }

    fn place_operands(&mut self, block: &Block, p: u16, op: &Op) {
        match *op {
            Op::Bin { op, ty, a, b } => {
                let (a, b) = self.bin_order(block, op, ty, a, b);
                self.use_at(a, p);
                if self.bin_imm(block, op, ty, a, b).is_none() {
                    match self.scaled(block, ty, b).filter(|_| op == BinOp::Add) {
                        Some((x, _)) => self.use_at(x, p),
                        None => self.use_at(b, p),
                    }
                }
            }
            Op::Cmp { cc, ty, a, b } => {
                let (_, a, b) = self.order(block, cc, ty, a, b);
                self.use_at(a, p);
                if self.imm(block, b, ty).is_none() {
                    self.use_at(b, p);
                }
            }
            Op::Load { addr, .. } => self.place_address(block, p, addr),
            Op::Store { addr, v, .. } => {
                self.place_address(block, p, addr);
                self.use_at(v, p);
            }
            _ => {
                let mut copy = *op;
                copy.map_operands(|v| {
                    self.use_at(v, p);
                    v
                });
            }
        }
    }
    fn place_address(&mut self, block: &Block, p: u16, addr: Value) {
        if let (Base::Value(v), _) = self.address(block, addr) {
            self.use_at(v, p);
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

    // ---- third walk: words -----------------------------------------------------------------------------------------

    fn emit(&mut self, block: &Block) {
        let n = block.ops.len();
        // The terminal's record must come first, and its value is known only at the end.
        self.records.push(0);
        let mut insns = block.insns.iter().peekable();
        for i in 0..=n {
            while insns.next_if(|x| x.first as usize <= i && i < n).is_some() {
                self.starts.push(self.code.len() as u16);
            }
            self.emit_sunk(block, i as u16);
            if let Some(op) = block.ops.get(i) {
                self.emit_fixed(block, i as u16, op);
            }
            self.release(i as u16);
        }
        let end = block.end.unwrap_or(Exit::Helped);
        self.records[0] = self.record(&end, block.retired, block.exits.len() as u16);
    }

    fn emit_sunk(&mut self, block: &Block, p: u16) {
        let mut next = self.vals[p as usize].sunk;
        while next != NONE {
            self.emit_value(block, next, &block.ops[next as usize]);
            next = self.vals[next as usize].next_sunk;
        }
    }

    /// Frees the temporaries of values last used at `p`.
    fn release(&mut self, p: u16) {
        let mut next = self.vals[p as usize].dead;
        while next != NONE {
            let v = &self.vals[next as usize];
            let bits = if v.pair { 3 } else { 1 };
            self.free |= bits << (v.home - TEMPS);
            next = v.next_dead;
        }
    }

    /// The word a value is to be written to.
    fn destination(&mut self, i: u16, ty: Ty) -> u8 {
        let v = self.vals[i as usize];
        if v.state == State::Home {
            return v.home;
        }
        if v.first == NONE {
            return TRASH;
        }
        let free = if ty == Ty::V128 { self.free & self.free >> 1 & 0x5555_5555_5555_5555 } else { self.free };
        if free == 0 {
            self.overflow = true;
            return TEMPS;
        }
        let bit = free.trailing_zeros();
        self.free &= !(if ty == Ty::V128 { 3 } else { 1 } << bit);
        let end = v.last.max(i) as usize;
        let next = core::mem::replace(&mut self.vals[end].dead, i);
        let v = &mut self.vals[i as usize];
        v.next_dead = next;
        v.home = TEMPS + bit as u8;
        v.pair = ty == Ty::V128;
        v.home
    }

    fn at(&self, v: Value) -> u8 {
        self.vals[self.root(v) as usize].home + self.half(v)
    }
    fn push(&mut self, w: u64) {
        self.last = self.code.len();
        self.code.push(w);
    }

    /// An op that is emitted at its own place.
    fn emit_fixed(&mut self, block: &Block, i: u16, op: &Op) {
        match *op {
            Op::Put { ty, loc, v } => {
                if self.vals[i as usize].state != State::Elided {
                    self.emit_put(block, ty, loc, v);
                }
            }
            Op::Store { ty, flags, addr, v } => {
                let (base, disp) = self.base(block, addr);
                let c = code::ST8 + ty as u8;
                let v = self.at(v);
                self.push(word(c, flags.0, base, v, disp));
            }
            Op::ExitIf { c, exit } => self.emit_exit(block, i, c, exit),
            _ if self.vals[i as usize].state == State::None || sinks(op) => {}
            _ => self.emit_value(block, i, op),
        }
    }

    fn base(&self, block: &Block, addr: Value) -> (u8, u32) {
        match self.address(block, addr) {
            (Base::Value(v), d) => (self.at(v), d as u32),
            (Base::Word(w), d) => (w, d as u32),
        }
    }

    fn emit_value(&mut self, block: &Block, i: u16, op: &Op) {
        let ty = op.result().unwrap_or(Ty::I64);
        let d = self.destination(i, ty);
        match *op {
            Op::Const { imm, .. } => self.emit_const(d, d, imm),
            Op::Get { ty, loc } => self.emit_get(d, ty, loc),
            Op::Rip { off } => {
                use twofold_arch::CodeSize::{Bits16, Bits32, Bits64};
                let size = block.flags.size();
                self.push(word(if size == Bits32 { code::ADDI32 } else { code::ADDI }, d, RIP_BASE, d, off as u32));
                match size {
                    Bits16 => self.push(word(code::ZX16, d, d, 0, 0)),
                    Bits32 | Bits64 => {}
                }
            }
            Op::Bin { op, ty, a, b } => self.emit_bin(block, i, d, (op, ty, a, b)),
            Op::Un { op, ty, a } => {
                let a = self.at(a);
                self.push(word_bytes(code::UN, d, a, 0, [op as u8, ty as u8, 0, 0]));
            }
            Op::Cmp { cc, ty, a, b } => {
                let (cc, a, b) = self.order(block, cc, ty, a, b);
                let x = self.at(a);
                match self.imm(block, b, ty) {
                    Some(imm) => self.push(word(code::CMPI, d, x, cc as u8 | (ty as u8) << 4, imm as u32)),
                    None => {
                        let y = self.at(b);
                        self.push(word_bytes(code::CMP, d, x, y, [cc as u8, ty as u8, 0, 0]));
                    }
                }
            }
            Op::Select { ty, c, a, b } => {
                let op = if ty == Ty::V128 { code::SELECT128 } else { code::SELECT };
                let w = word_bytes(op, d, self.at(a), self.at(b), [self.at(c), 0, 0, 0]);
                self.push(w);
            }
            Op::Zext { a, .. } => {
                let c = code::ZX8 + block.ty(a) as u8;
                let a = self.at(a);
                self.push(word(c, d, a, 0, 0));
            }
            Op::Sext { to, a } => {
                let from = block.ty(a);
                let c = if to == Ty::I32 { code::SX8D } else { code::SX8 } + from as u8;
                let a = self.at(a);
                self.push(word(c, d, a, 0, 0));
            }
            Op::Pair { lo, hi } => {
                let w = word(code::PAIR, d, self.at(lo), self.at(hi), 0);
                self.push(w);
            }
            Op::Cond { cc } => self.push(word(code::COND, d, cc as u8, 0, 0)),
            Op::Flags => self.push(word(code::FLAGS, d, 0, 0, 0)),
            Op::Load { ty, flags, addr } => {
                let (base, disp) = self.base(block, addr);
                self.push(word(code::LD8 + ty as u8, d, base, flags.0, disp));
            }
            Op::Rmw { op, ty, addr, v } => {
                let w = word_bytes(code::RMW, d, self.at(addr), self.at(v), [op as u8, ty as u8, 0, 0]);
                self.push(w);
            }
            Op::CmpXchg { ty, addr, expected, new } => {
                let rest = [self.at(new), ty as u8, 0, 0];
                let w = word_bytes(code::CMPXCHG, d, self.at(addr), self.at(expected), rest);
                self.push(w);
            }
            Op::Vec { op, imm, a, b, c } => {
                let x = |v: Value| if v == Value::NONE { TRASH } else { self.at(v) };
                let all = op.sig().result == Ty::V128 && op.sig().args.iter().all(|t| *t != Some(Ty::I64));
                let [lo, hi] = (op as u16).to_le_bytes();
                let kind = if all { code::VEC } else { code::VECX };
                let w = word_bytes(kind, d, x(a), x(b), [x(c), lo, hi, imm]);
                self.push(w);
            }
            Op::Call { helper, args } => {
                let x = args.map(|v| if v == Value::NONE { TRASH } else { self.at(v) });
                self.push(word_bytes(code::CALL, d, helper as u8, x[0], [x[1], x[2], x[3], 0]));
            }
            Op::Nop | Op::Put { .. } | Op::Store { .. } | Op::ExitIf { .. } | Op::Trunc { .. } | Op::Half { .. } => {}
        }
    }

    fn emit_const(&mut self, d: u8, also: u8, imm: u64) {
        match i32::try_from(imm as i64) {
            Ok(x) => self.push(word(code::MOVI, d, 0, also, x as u32)),
            Err(_) => {
                self.push(word(code::MOVX, d, 0, 0, 0));
                self.code.push(imm);
            }
        }
    }

    fn emit_get(&mut self, d: u8, ty: Ty, loc: Loc) {
        match (word_of(loc, ty.bytes().min(8)), full_word(ty, loc)) {
            (Some(_), Some(w)) => self.push(word(if ty == Ty::V128 { code::MOV128 } else { code::MOV }, d, w, 0, 0)),
            (Some((w, shift)), None) if ty != Ty::V128 => {
                self.push(word(code::EXTRACT, d, w as u8, 0, shift));
            }
            _ => self.each_half(ty, loc, |s, half, ty, loc| {
                s.push(word(code::GETE, d + half, 0, 0, u32::from(loc.0) | u32::from(ty as u8) << 16));
            }),
        }
    }

    /// Calls `f` for an integer field, or for both halves of a vector.
    fn each_half(&mut self, ty: Ty, loc: Loc, f: impl Fn(&mut Self, u8, Ty, Loc)) {
        if ty == Ty::V128 {
            f(self, 0, Ty::I64, loc);
            f(self, 1, Ty::I64, Loc(loc.0.wrapping_add(8)));
        } else {
            f(self, 0, ty, loc);
        }
    }

    fn emit_put(&mut self, block: &Block, ty: Ty, loc: Loc, v: Value) {
        let constant = self.constant(block, v, ty);
        if let Some(w) = full_word(ty, loc) {
            match constant {
                Some(imm) => self.emit_const(w, w, imm),
                None => {
                    let h = self.at(v);
                    if h != w {
                        self.push(word(if ty == Ty::V128 { code::MOV128 } else { code::MOV }, w, h, 0, 0));
                    }
                }
            }
            return;
        }
        match (word_of(loc, ty.bytes()), constant) {
            (Some((w, 0)), Some(c)) if ty == Ty::I32 => {
                if !(w == CC_OP as usize && self.join_cc(c)) {
                    self.push(word(code::PUTI32, w as u8, 0, 0, c as u32));
                }
            }
            (Some((w, shift)), Some(c)) => {
                self.push(word(code::PUTIN, w as u8, shift as u8, ty.bits() as u8, c as u32));
            }
            (Some((w, shift)), None) => {
                let (w, h) = (w as u8, self.at(v));
                let op = match (ty, shift) {
                    (Ty::I8, 0) => code::PUT8,
                    (Ty::I8, 8) => code::PUT8H,
                    (Ty::I16, 0) => code::PUT16,
                    (Ty::I32, 0) => code::PUT32,
                    _ => code::PUTN,
                };
                self.push(word_bytes(op, w, h, 0, [shift as u8, ty.bits() as u8, 0, 0]));
            }
            (None, _) => {
                let h = self.at(v);
                self.each_half(ty, loc, |s, half, ty, loc| {
                    s.push(word(code::PUTE, 0, h + half, 0, u32::from(loc.0) | u32::from(ty as u8) << 16));
                });
            }
        }
    }

    /// Puts a constant `cc_op` by the word that has just put `cc_src`, if it is that.
    fn join_cc(&mut self, op: u64) -> bool {
        let Ok(op) = u8::try_from(op) else { return false };
        let last = self.last;
        let Some(w) = self.code.get_mut(last) else { return false };
        let [c, d, a, b, ..] = w.to_le_bytes();
        let imm = (*w >> 32) as u32;
        match c {
            code::MOV if d == CC_SRC => *w = word(code::CC, 0, a, op, 0),
            code::MOVI if d == CC_SRC && b == CC_SRC => *w = word(code::CCI, 0, 0, op, imm),
            _ => return false,
        }
        true
    }

    fn emit_bin(&mut self, block: &Block, i: u16, d: u8, (op, ty, a, b): (BinOp, Ty, Value, Value)) {
        let (a, b) = self.bin_order(block, op, ty, a, b);
        let also = match self.vals[i as usize].also {
            0 => d,
            w => w,
        };
        let x = self.at(a);
        if let Some((code, imm)) = self.bin_imm(block, op, ty, a, b) {
            return self.push(word(code, d, x, also, imm as u32));
        }
        if let Some((index, shift)) = self.scaled(block, ty, b).filter(|_| op == BinOp::Add) {
            let w = word_bytes(code::ADDSHL, d, x, self.at(index), [also, shift, 0, 0]);
            return self.push(w);
        }
        let y = self.at(b);
        match Self::bin_code(op, ty) {
            Some(code) => self.push(word_bytes(code, d, x, y, [also, 0, 0, 0])),
            None => self.push(word_bytes(code::BIN, d, x, y, [op as u8, ty as u8, 0, 0])),
        }
    }

    fn emit_exit(&mut self, block: &Block, i: u16, c: Value, exit: u16) {
        let Some(side) = block.exits.get(exit as usize) else { return };
        let index = self.records.len() as u32;
        let r = self.record(&side.exit, side.retired, exit);
        self.records.push(r);
        let root = self.root(c);
        match block.ops[root as usize] {
            Op::Cmp { cc, ty, a, b } => {
                let (cc, a, b) = self.order(block, cc, ty, a, b);
                let shift = (64 - ty.bits()) as u8;
                let x = self.at(a);
                match self.exit_imm(block, b, ty, exit) {
                    Some(imm) if index < 256 => {
                        self.push(word(code::XEQI + cc as u8, shift, x, index as u8, imm as u32));
                    }
                    // One side exit has several conditions: more records than side exits.
                    Some(_) => self.overflow = true,
                    None => {
                        let y = self.at(b);
                        self.push(word(code::XEQ + cc as u8, shift, x, y, index));
                    }
                }
            }
            Op::Cond { cc } if root + 1 == i && self.fuses_cond(block, root) => {
                self.push(word(code::XCOND, cc as u8, 0, 0, index));
            }
            _ => {
                let x = self.at(c);
                if index < 256 {
                    self.push(word(code::XNEI, 56, x, index as u8, 0));
                } else {
                    // Compares the value with itself shifted out: not worth a code of its own.
                    self.overflow = true;
                }
            }
        }
    }

    fn record(&mut self, exit: &Exit, retired: u16, index: u16) -> u64 {
        let (kind, payload) = match *exit {
            Exit::Jump { off } => (record::JUMP, u32::from(off)),
            Exit::JumpFar { off } => (record::JUMP_FAR, off as u32),
            Exit::Indirect { rip, kind } => {
                let kind = match kind {
                    IndirectKind::Jump => 0,
                    IndirectKind::Call => 1,
                    IndirectKind::Return => 2,
                };
                (record::INDIRECT, u32::from(self.at(rip)) | kind << 8)
            }
            Exit::Dispatch { off } => (record::DISPATCH, off as u32),
            Exit::Helped => (record::HELPED, 0),
            Exit::Raise { off, exception } => {
                self.raises.push(exception);
                (record::RAISE, u32::from(off) | (self.raises.len() as u32 - 1) << 16)
            }
        };
        kind | u64::from(retired.min(record::MAX_RETIRED)) << 3 | u64::from(index) << 16 | u64::from(payload) << 32
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
