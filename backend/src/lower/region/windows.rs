//! Which accesses of a block can share a probe: those at constant distances from the same base.
//!
//! Part of region lowering. The first access of a window probes, and checks that the whole window lies in its page; the others
//! use the host address found, after one test. What a helper does ends all windows. (A slow access does not: what it may
//! change of the TLB leaves a page that has been found where it was.) A window that a load opens is probed for writing when a store
//! is certain to follow.

use std::collections::HashMap;

use twofold_ir::{BinOp, Block, Exit, MemFlags, Op, Ty, Value};

/// The most bytes of a window.
const SPAN: i64 = 256;

/// What an access has to do with windows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// It probes for itself.
    Alone,
    /// It opens this window: the first byte and the byte after the last, relative to its own address; whether some are written.
    First(usize, i64, i64, bool),
    /// It uses this window.
    Member(usize),
}

/// A window while it is found.
struct Window {
    first: usize,
    /// The offset of the first access, and the range of all.
    at: i64,
    min: i64,
    end: i64,
    write: bool,
    members: Vec<usize>,
}

/// An address as something and a distance from it.
pub(super) type Place = (Base, i64);

/// What is the same for equal values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Base {
    Zero,
    Rip,
    Value(u16),
}

/// The role of each op of a block that accesses memory, and each value as a place.
pub(super) fn plan(block: &Block) -> (Vec<Role>, Vec<Place>) {
    let mut roles = vec![Role::Alone; block.ops.len()];
    let mut places: Vec<Place> = Vec::with_capacity(block.ops.len());
    let mut sums: HashMap<(BinOp, Place, Place), u16> = HashMap::new();
    let mut windows: Vec<Window> = Vec::new();
    // The open windows by base and whether they are for writes too.
    let mut open: HashMap<(Base, bool), usize> = HashMap::new();
    // The last way out that is not an exception.
    let mut way_out = 0;
    for (i, op) in block.ops.iter().enumerate() {
        places.push(place(i, op, &places, &mut sums));
        let (ty, flags, addr, store) = match *op {
            Op::Load { ty, flags, addr } => (ty, flags, addr, false),
            Op::Store { ty, flags, addr, .. } => (ty, flags, addr, true),
            Op::ExitIf { exit, .. } => {
                let raises = block.exits.get(exit as usize).is_some_and(|s| matches!(s.exit, Exit::Raise { .. }));
                way_out = if raises { way_out } else { i };
                continue;
            }
            Op::Call { helper, .. } if !helper.info().keeps_state() => {
                open.clear();
                continue;
            }
            _ => continue,
        };
        if flags.has(MemFlags::ALIGNED) {
            continue;
        }
        let (base, at) = places[addr.index()];
        let (write, end) =
            (store || flags.has(MemFlags::WRITE_INTENT), at.saturating_add(flags.checked_bytes(ty.bytes()).into()));
        let fits = |n: &&usize| {
            let w: &Window = &windows[**n];
            w.end.max(end).saturating_sub(w.min.min(at)) <= SPAN
        };
        let for_writes = open.get(&(base, true)).filter(fits);
        let read = open.get(&(base, false)).filter(|n| !write || windows[**n].first > way_out).filter(fits);
        let found = for_writes.or(read).copied();
        match found {
            Some(n) => {
                let w = &mut windows[n];
                (w.min, w.end) = (w.min.min(at), w.end.max(end));
                w.members.push(i);
                if write && !w.write {
                    w.write = true;
                    open.remove(&(base, false));
                    open.insert((base, true), n);
                }
            }
            None => {
                open.insert((base, write), windows.len());
                windows.push(Window { first: i, at, min: at, end, write, members: Vec::new() });
            }
        }
    }
    for (n, w) in windows.iter().enumerate().filter(|(_, w)| !w.members.is_empty()) {
        roles[w.first] = Role::First(n, w.min - w.at, w.end - w.at, w.write);
        w.members.iter().for_each(|&m| roles[m] = Role::Member(n));
    }
    (roles, places)
}

fn place(i: usize, op: &Op, places: &[Place], sums: &mut HashMap<(BinOp, Place, Place), u16>) -> Place {
    let of = |v: Value| places[v.index()];
    let own = (Base::Value(i as u16), 0);
    match *op {
        Op::Const { ty: Ty::I64, imm } => (Base::Zero, imm as i64),
        Op::Rip { off } => (Base::Rip, off.into()),
        Op::Bin { op, ty: Ty::I64, a, b } => {
            let (x, y) = (of(a), of(b));
            match (op, x.0, y.0) {
                (BinOp::Add, _, Base::Zero) => return (x.0, x.1.wrapping_add(y.1)),
                (BinOp::Add, Base::Zero, _) => return (y.0, x.1.wrapping_add(y.1)),
                (BinOp::Sub, _, Base::Zero) => return (x.0, x.1.wrapping_sub(y.1)),
                _ => {}
            }
            let (key, off) = match op {
                BinOp::Add => ((op, (x.0, 0), (y.0, 0)), x.1.wrapping_add(y.1)),
                _ => ((op, x, y), 0),
            };
            (Base::Value(*sums.entry(key).or_insert(i as u16)), off)
        }
        _ => own,
    }
}
