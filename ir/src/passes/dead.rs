//! The backward walk: removes puts nobody can see and ops nobody uses, then renumbers.
//!
//! A put is dead when all its bytes are written again before anything reads them, can fault or can leave. A `cc_*` word is
//! also dead where `cc_op` becomes a kind that does not use it, until one that does is put. (Who else changes `cc_op`, a
//! helper, must therefore write all words that the new kind uses.)

use twofold_arch::{CcKind, CcOp, Loc};

use super::Options;
use crate::block::{Block, Exit};
use crate::op::{Op, Ty, Value};

/// Words of the guest state that are tracked.
const WORDS: usize = 512;
const DST: usize = Loc::CC_DST.0 as usize / 8;
const SRC: usize = Loc::CC_SRC.0 as usize / 8;
const SRC2: usize = Loc::CC_SRC2.0 as usize / 8;
const OP: usize = Loc::CC_OP.0 as usize / 8;

/// Memory kept from block to block.
#[derive(Debug)]
pub(super) struct Scratch {
    live: Vec<bool>,
    map: Vec<Value>,
    /// Bytes of each word that are written again before anything sees them; counts when the epoch is the current one.
    over: Box<[(u32, u8); WORDS]>,
    epoch: u32,
    /// A later op sees DST, SRC, SRC2 as they are here, whatever `cc_op` says in between.
    exposed: [bool; 3],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { live: Vec::new(), map: Vec::new(), over: Box::new([(0, 0); WORDS]), epoch: 0, exposed: [false; 3] }
    }
}

/// Which of DST, SRC, SRC2 a kind uses.
const fn uses(kind: CcKind) -> [bool; 3] {
    match kind {
        CcKind::Flags => [false, true, false],
        CcKind::Logic => [true, false, false],
        CcKind::Adc | CcKind::Sbb => [true, true, true],
        _ => [true, true, false],
    }
}

impl Scratch {
    fn over(&self, w: usize) -> u8 {
        self.over.get(w).filter(|e| e.0 == self.epoch).map_or(0, |e| e.1)
    }
    fn set_over(&mut self, w: usize, bytes: u8) {
        let epoch = self.epoch;
        if let Some(e) = self.over.get_mut(w) {
            *e = (epoch, bytes);
        }
    }
    /// Forgets: everything may be seen here.
    fn barrier(&mut self) {
        if self.epoch == u32::MAX {
            self.over.fill((0, 0));
            self.epoch = 0;
        }
        self.epoch += 1;
    }
    /// Leaves with the flags dead or alive.
    fn exit(&mut self, flags_dead: bool) {
        let flags = [DST, SRC, SRC2, OP].map(|w| (w, self.over(w)));
        self.barrier();
        if flags_dead {
            flags.iter().for_each(|&(w, bytes)| self.set_over(w, bytes));
        }
    }
    fn read(&mut self, ty: Ty, loc: Loc) {
        let mut part = |w: usize, bytes: u8| {
            self.set_over(w, self.over(w) & !bytes);
            if let Some(i) = cc_word(w) {
                self.exposed[i] = true;
            }
        };
        match single(ty, loc) {
            Some((w, bytes)) => part(w, bytes),
            None => parts(ty, loc).for_each(|(w, bytes)| part(w, bytes)),
        }
    }
    /// A put; whether it is dead.
    fn put(&mut self, ops: &[Op], ty: Ty, loc: Loc, v: Value) -> bool {
        let mut dead = true;
        let mut part = |w: usize, bytes: u8| {
            let over = self.over(w);
            dead &= over & bytes == bytes && w < WORDS;
            self.set_over(w, over | bytes);
            if bytes == 0xff
                && let Some(i) = cc_word(w)
            {
                self.exposed[i] = false;
            }
        };
        match single(ty, loc) {
            Some((w, bytes)) => part(w, bytes),
            None => parts(ty, loc).for_each(|(w, bytes)| part(w, bytes)),
        }
        if loc == Loc::CC_OP && !dead {
            let kind = match ops[v.index()] {
                Op::Const { imm, .. } => Some(CcOp(imm as u8).kind()),
                _ => None,
            };
            self.put_kind(kind);
        }
        dead
    }
    /// From here on the flags are of this kind (`None`: any).
    fn put_kind(&mut self, kind: Option<CcKind>) {
        let used = kind.map_or([true; 3], uses);
        for (i, w) in [DST, SRC, SRC2].into_iter().enumerate() {
            if used[i] {
                self.exposed[i] |= self.over(w) != 0xff;
            } else if !self.exposed[i] {
                self.set_over(w, 0xff);
            }
        }
    }
}

/// Which of DST, SRC, SRC2 a word is.
#[inline]
fn cc_word(w: usize) -> Option<usize> {
    (DST..=SRC2).contains(&w).then(|| w - DST)
}
const _: () = assert!(SRC == DST + 1 && SRC2 == DST + 2);

/// The one word a field is in, with its bytes, if it is one.
#[inline]
fn single(ty: Ty, loc: Loc) -> Option<(usize, u8)> {
    let (byte, n) = (u32::from(loc.0 % 8), ty.bytes());
    (byte + n <= 8).then(|| (loc.0 as usize / 8, (((1u32 << n) - 1) << byte) as u8))
}

/// The words a field has bytes in, with the bytes.
fn parts(ty: Ty, loc: Loc) -> impl Iterator<Item = (usize, u8)> {
    let (start, n) = (loc.0 as usize, ty.bytes() as usize);
    let bits = ((1u32 << n) - 1) << (start % 8);
    let first = start / 8;
    (0..3).map(move |k| (first + k, (bits >> (8 * k)) as u8)).filter(|x| x.1 != 0)
}

/// Runs the pass.
pub(super) fn run(block: &mut Block, options: &Options<'_>, s: &mut Scratch) {
    let dead_at = |exit: &Exit| options.flags_dead_at_exit.is_some_and(|f| f(exit));
    s.live.clear();
    s.live.resize(block.ops.len(), false);
    s.exposed = [false; 3];
    s.barrier();
    if let Some(end) = &block.end {
        if let Exit::Indirect { rip, .. } = *end {
            s.live[rip.index()] = true;
        }
        if dead_at(end) {
            [DST, SRC, SRC2].iter().for_each(|&w| s.set_over(w, 0xff));
            s.set_over(OP, 0xf);
        }
    }
    for i in (0..block.ops.len()).rev() {
        if !visit(block, i, s, &dead_at) {
            block.ops[i] = Op::Nop;
        }
    }
    compact(block, &mut s.map);
}

/// Looks at op `i`: what it keeps alive and what it sees. Whether it stays.
#[inline]
fn visit(block: &Block, i: usize, s: &mut Scratch, dead_at: &impl Fn(&Exit) -> bool) -> bool {
    let op = &block.ops[i];
    match *op {
        Op::Put { ty, loc, v } => {
            let stays = !s.put(&block.ops, ty, loc, v);
            s.live[v.index()] |= stays;
            return stays;
        }
        // Without an effect of their own.
        Op::Nop | Op::Const { .. } | Op::Rip { .. } => return s.live[i],
        Op::Get { ty, loc } => {
            if s.live[i] {
                s.read(ty, loc);
            }
            return s.live[i];
        }
        Op::Bin { a, b, .. } | Op::Cmp { a, b, .. } => {
            let live = s.live[i];
            s.live[a.index()] |= live;
            s.live[b.index()] |= live;
            return live;
        }
        Op::Zext { a, .. } | Op::Trunc { a, .. } => {
            let live = s.live[i];
            s.live[a.index()] |= live;
            return live;
        }
        Op::Load { addr, .. } => {
            s.barrier();
            s.live[addr.index()] = true;
            return true;
        }
        Op::Store { addr, v, .. } => {
            s.barrier();
            s.live[addr.index()] = true;
            s.live[v.index()] = true;
            return true;
        }
        _ if !s.live[i] && !op.has_effect() => return false,
        Op::Cond { .. } | Op::Flags => {
            for w in [DST, SRC, SRC2, OP] {
                s.set_over(w, 0);
            }
        }
        Op::ExitIf { exit, .. } => {
            let side = block.exits.get(exit as usize).map(|e| e.exit);
            if let Some(Exit::Indirect { rip, .. }) = side {
                s.live[rip.index()] = true;
            }
            s.exit(side.is_some_and(|e| dead_at(&e)));
        }
        Op::Call { helper, .. } if helper.info().quiet => {
            for byte in Loc::X87.into_iter().flatten() {
                let w = usize::from(byte / 8);
                s.set_over(w, s.over(w) & !(1 << (byte % 8)));
            }
        }
        Op::Call { helper, .. } if !helper.info().pure => s.barrier(),
        _ if op.can_fault() => s.barrier(),
        _ => {}
    }
    op.for_each_operand(|v| s.live[v.index()] = true);
    true
}

/// Removes the `Nop`s and renumbers.
fn compact(block: &mut Block, map: &mut Vec<Value>) {
    map.clear();
    map.reserve(block.ops.len());
    let mut kept = 0;
    let mut insns = block.insns.iter_mut();
    let mut insn = insns.next();
    for i in 0..block.ops.len() {
        while let Some(next) = insn.take_if(|x| x.first as usize <= i) {
            next.first = kept as u16;
            insn = insns.next();
        }
        let mut op = block.ops[i];
        match &mut op {
            Op::Nop => {
                map.push(Value::NONE);
                continue;
            }
            Op::Const { .. } | Op::Get { .. } => {}
            Op::Put { v, .. } => *v = map[v.index()],
            Op::ExitIf { c, exit } => {
                *c = map[c.index()];
                if let Some(Exit::Indirect { rip, .. }) = block.exits.get_mut(*exit as usize).map(|e| &mut e.exit) {
                    *rip = map[rip.index()];
                }
            }
            op => op.map_operands(|v| map[v.index()]),
        }
        map.push(Value(kept as u16));
        block.ops[kept] = op;
        kept += 1;
    }
    for insn in insn.into_iter().chain(insns) {
        insn.first = kept as u16;
    }
    if let Some(Exit::Indirect { rip, .. }) = &mut block.end {
        *rip = map[rip.index()];
    }
    block.ops.truncate(kept);
}
