//! The second walk of lowering, backward: where each value is used, and where it lives.
//!
//! Finds each value's first and last position of use, sinks pure ops to their first use, and decides which values live in
//! words of the guest state. Invariant: a decision about a word holds because every op between has been seen: what is decided
//! at an op never changes what was decided at a later one.

use twofold_arch::Loc;

use super::super::reference::word_of;
use super::{Base, CC_WORDS, Lowerer, NONE, Pending, State, full_word, is_barrier, sinks, words_touched};
use crate::block::{Block, Exit};
use crate::op::{BinOp, Op, Ty, Value};

impl Lowerer {
    fn use_at(&mut self, v: Value, p: u16) {
        let r = self.root(v);
        self.use_root(r, p);
    }
    fn use_root(&mut self, r: u16, p: u16) {
        let x = &mut self.vals[r as usize];
        x.first = x.first.min(p);
        x.last = x.last.max(p);
    }

    pub(super) fn place(&mut self, block: &Block) {
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
}
