//! The third walk of lowering, forward: writes the words.
//!
//! A sunk op is written before the op that first uses it; temporaries are handed out as values are made and taken back
//! after their last use.

use twofold_arch::{CodeSize, Loc};

use super::super::reference::word_of;
use super::super::word::{code, record, word, word_bytes};
use super::{Base, CC_OP, CC_SRC, Lowerer, NONE, RIP_BASE, State, TEMPS, TRASH, full_word, sinks};
use crate::block::{Block, Exit, IndirectKind};
use crate::op::{BinOp, Op, Ty, Value};
use crate::text::VECTORS;

impl Lowerer {
    pub(super) fn emit(&mut self, block: &Block) {
        let n = block.ops.len();
        // The terminal's record must come first, and its value is known only at the end.
        let end = block.end.unwrap_or(Exit::Helped);
        self.records.push(0);
        self.records.extend(raise_words(&end).into_iter().flatten());
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
        let r = self.record(&end, block.retired, block.exits.len() as u16);
        self.records[0] = r;
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
                let size = block.flags.size();
                self.push(word(
                    if size == CodeSize::Bits32 { code::ADDI32 } else { code::ADDI },
                    d,
                    RIP_BASE,
                    d,
                    off as u32,
                ));
                if size == CodeSize::Bits16 {
                    self.push(word(code::ZX16, d, d, 0, 0));
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
        self.records.extend(raise_words(&side.exit).into_iter().flatten());
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
                let vector = VECTORS.iter().position(|x| x.0 == exception.vector).unwrap_or_default() as u32;
                (record::RAISE, u32::from(off) | vector << 16)
            }
        };
        kind | u64::from(retired.min(record::MAX_RETIRED)) << 3 | u64::from(index) << 16 | u64::from(payload) << 32
    }
}

/// What follows the record of a `Raise`.
fn raise_words(exit: &Exit) -> Option<[u64; 2]> {
    let Exit::Raise { exception, .. } = exit else { return None };
    Some([exception.error.map_or(0, |e| 1 << 32 | u64::from(e)), exception.cr2])
}
