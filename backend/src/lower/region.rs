//! A region to CLIF: several blocks with the jumps between them, one function; guest registers are SSA values.
//!
//! Place in the pipeline: called by `region` (the optimising tier's compiler) for blocks of one page and one key that lead to
//! each other; each op that does not touch guest state or memory is lowered as in the quick tier.
//!
//! Invariants: a field that is kept in a value (a slot, see `slots`) is written back before anything outside can see it: at
//! exits, before helpers and in the cold path of every memory access. Which of them need it is known statically: `dirty`.
//! Every cycle has an edge that looks at the budget and at the attention word. The budget is charged at the start of each
//! block and is exact wherever the region is left. A source location is an index in [`LoweredRegion::sites`].

mod live;
mod mem;
mod slots;
mod windows;

use std::collections::HashMap;

use cranelift_codegen::cursor::{Cursor, FuncCursor};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AliasRegionData, Block as ClifBlock, BlockArg, Function, InstBuilder, MemFlagsData, SourceLoc, Value as Clif, types,
};
use twofold_ir::passes::place_of;
use twofold_ir::{Block, Exit, GuestInsn, Helper, Op, Ty};

use super::{Buffers, Lowered, Lowering, Shape, V, signature};
use crate::compiler::CompileError;
use crate::layout;
use crate::origin::Role as Part;
use crate::region::{Counter, Guard};
use crate::thunk::Thunk;
use live::Live;
use slots::Slots;
use windows::{Place, Role};

/// What a region's lowering leaves beside the function.
#[derive(Debug, Default)]
pub(crate) struct LoweredRegion {
    /// Page offset of each direct exit's target, in the order of their external indexes.
    pub slots: Vec<u16>,
    /// And its page, in bytes from the root's.
    pub slot_pages: Vec<i32>,
    /// For each guest instruction: its RIP minus `rip_base`, and what its abandonment gives back to the budget.
    pub sites: Vec<(i32, u16)>,
    /// And which it is: the block's index, and its own in there.
    pub site_insns: Vec<(u16, u16)>,
}

/// How the blocks hang together.
#[derive(Debug)]
struct Graph {
    /// Block by where its first instruction is.
    by_place: HashMap<i32, usize>,
    /// Edges that look at the budget.
    checked: Vec<(usize, usize)>,
    /// Slots that may be dirty at the start of each block.
    dirty: Vec<u64>,
}

impl Graph {
    /// The block of the region that an exit leads to. One before any instruction is complete leaves: a cycle of such exits would
    /// use up no budget.
    fn target(&self, exit: &Exit, retired: u16) -> Option<usize> {
        if retired == 0 {
            return None;
        }
        self.by_place.get(&place_of(exit)?).copied()
    }

    fn new(blocks: &[Block], slots: &Slots) -> Self {
        let by_place = blocks.iter().enumerate().map(|(i, b)| (b.place(), i)).collect();
        let mut g = Self { by_place, checked: Vec::new(), dirty: vec![0; blocks.len()] };
        let edges: Vec<Vec<usize>> =
            blocks.iter().map(|b| exits(b).filter_map(|(e, n)| g.target(e, n)).collect()).collect();
        // Depth first from the root: an edge to a block that is still open closes a cycle.
        let (mut color, mut stack) = (vec![0u8; blocks.len()], vec![(0, 0)]);
        color[0] = 1;
        while let Some((b, next)) = stack.last_mut() {
            let from = *b;
            let Some(&to) = edges[from].get(*next) else {
                color[from] = 2;
                stack.pop();
                continue;
            };
            *next += 1;
            if color[to] == 1 {
                g.checked.push((from, to));
            } else if color[to] == 0 {
                color[to] = 1;
                stack.push((to, 0));
            }
        }
        // What a helper does may end the region.
        for (i, b) in blocks.iter().enumerate() {
            if b.ops.iter().any(impure) {
                g.checked.extend(edges[i].iter().map(|&to| (i, to)));
            }
        }
        let mut changed = true;
        while changed {
            changed = false;
            for (i, b) in blocks.iter().enumerate() {
                let mut now = g.dirty[i];
                let mut flow = |exit: &Exit, retired: u16, now: u64| {
                    if let Some(to) = g.target(exit, retired) {
                        changed |= g.dirty[to] | now != g.dirty[to];
                        g.dirty[to] |= now;
                    }
                };
                for op in &b.ops {
                    if let Op::ExitIf { exit, .. } = *op
                        && let Some(side) = b.exits.get(exit as usize)
                    {
                        flow(&side.exit, side.retired, now);
                    }
                    now = dirty_after(slots, op, now);
                }
                if let Some(end) = &b.end {
                    flow(end, b.retired, now);
                }
            }
        }
        g
    }
}

/// Every way out of a block, with the instructions complete there.
fn exits(b: &Block) -> impl Iterator<Item = (&Exit, u16)> {
    b.exits.iter().map(|s| (&s.exit, s.retired)).chain(b.end.iter().map(|e| (e, b.retired)))
}

/// Whether an op may change any of the guest state.
fn impure(op: &Op) -> bool {
    matches!(op, Op::Call { helper, .. } if !helper.info().keeps_state())
}

fn dirty_after(slots: &Slots, op: &Op, dirty: u64) -> u64 {
    match *op {
        Op::Put { ty, loc, .. } => {
            slots.find(ty, loc).filter(|p| slots.lazy(p.slot)).map_or(dirty, |p| dirty | 1 << p.slot)
        }
        _ if impure(op) => 0,
        _ => dirty,
    }
}

struct RegionLowering<'a> {
    l: Lowering<'a>,
    blocks: &'a [Block],
    graph: Graph,
    slots: Slots,
    live: Live,
    sites: Vec<(i32, u16)>,
    site_insns: Vec<(u16, u16)>,
    /// The pages with blocks, in bytes from the root's.
    pages: Vec<i32>,
    slot_pages: Vec<i32>,
    /// The page of the guest instruction that is being lowered.
    page: i32,
    heads: Vec<ClifBlock>,
    /// The value of each slot that is live here.
    values: Vec<Option<Clif>>,
    /// What is left of the budget here.
    budget: Clif,
    /// Slots whose field may be out of date here.
    dirty: u64,
    /// The block that is being lowered.
    at: usize,
    /// What each op of the block has to do with windows, and the addend of each window, 0 where it is none.
    roles: Vec<Role>,
    /// Each of its values as something and a distance from it.
    places: Vec<Place>,
    windows: HashMap<usize, Clif>,
    /// Flags of accesses to guest memory and to the softmmu tables.
    guest: MemFlagsData,
    tlb: MemFlagsData,
}

/// Fills `func` (cleared) with the region's CLIF. `counters`: what each block counts.
pub(crate) fn lower_region(
    func: &mut Function,
    blocks: &[Block],
    guard: Option<Guard>,
    counters: Option<&[Vec<Counter>]>,
    buf: &mut Buffers,
) -> Result<LoweredRegion, CompileError> {
    let root = blocks.first().ok_or(CompileError::Malformed)?;
    let mut out = Lowered::default();
    func.signature = signature(Shape::tail(1));
    let entry = func.dfg.make_block();
    func.layout.append_block(entry);
    let state = func.dfg.append_block_param(entry, types::I64);
    let mut alias = |id: u32, name: &'static str| {
        Some(func.dfg.alias_regions.insert(AliasRegionData { user_id: id, description: name.into() }))
    };
    let (of_state, of_guest, of_tlb) = (alias(1, "state"), alias(2, "guest"), alias(3, "tlb"));
    let trusted = func.dfg.mem_flags.insert_unchecked(MemFlagsData::trusted().with_alias_region(of_state));
    let unaligned = MemFlagsData::new().with_notrap();
    let vector = func.dfg.mem_flags.insert_unchecked(unaligned.with_alias_region(of_state));
    buf.functions.clear();
    let slots = Slots::new(blocks);
    let full = slots.has_vectors() || blocks.iter().flat_map(|b| &b.ops).any(|op| op.result() == Some(Ty::V128));
    let graph = Graph::new(blocks, &slots);
    let live = Live::new(blocks, &graph, &slots);
    let mut cur = FuncCursor::new(func);
    cur.goto_bottom(entry);
    cur.set_srcloc(SourceLoc::new(0));
    let l = Lowering {
        cur,
        block: root,
        buf,
        out: &mut out,
        state,
        full,
        trusted,
        guest: vector,
        signatures: Vec::new(),
        fused: HashMap::new(),
        done: Vec::new(),
    };
    let mut r = RegionLowering {
        l,
        blocks,
        graph,
        slots,
        live,
        sites: Vec::new(),
        site_insns: Vec::new(),
        pages: Vec::new(),
        slot_pages: Vec::new(),
        page: 0,
        heads: Vec::new(),
        values: Vec::new(),
        budget: state,
        dirty: 0,
        at: 0,
        roles: Vec::new(),
        places: Vec::new(),
        windows: HashMap::new(),
        guest: unaligned.with_alias_region(of_guest),
        tlb: MemFlagsData::trusted().with_alias_region(of_tlb),
    };
    r.sites.push((root.place(), 0));
    r.site_insns.push((0, 0));
    r.part(Part::Entry);
    for insn in blocks.iter().flat_map(|b| &b.insns) {
        if !r.pages.contains(&insn.page) {
            r.pages.push(insn.page);
        }
    }
    r.heads = (0..blocks.len()).map(|_| r.l.new_block(false)).collect();
    r.entry(guard)?;
    for i in 0..blocks.len() {
        r.block(i, counters.and_then(|c| c.get(i)).map_or(&[], Vec::as_slice))?;
    }
    let (sites, site_insns, slot_pages) = (r.sites, r.site_insns, r.slot_pages);
    Ok(LoweredRegion { slots: out.slots, slot_pages, sites, site_insns })
}

impl RegionLowering<'_> {
    /// Loads everything and goes to the root, if there is a budget.
    fn entry(&mut self, guard: Option<Guard>) -> Result<(), CompileError> {
        if let Some(guard) = guard {
            self.check(guard);
        }
        self.reload(self.live.head[0]);
        self.jump_checked(0)
    }

    /// Asks the runtime whether the region's pages are still where they were, unless nothing has changed since it last did.
    fn check(&mut self, guard: Guard) {
        let flags = MemFlagsData::trusted();
        let jumps = self.l.load_state(types::I64, layout::JUMP_CACHE);
        let epoch = self.l.cur.ins().load(types::I64, flags, jumps, layout::JC_EPOCH as i32);
        let base = self.l.load_state(types::I64, layout::RIP_BASE);
        let cell = self.l.const64(guard.cell);
        let known = self.l.cur.ins().load(types::I64, flags, cell, 0);
        let at = self.l.cur.ins().load(types::I64, flags, cell, 8);
        let (x, y) = (self.l.cur.ins().bxor(epoch, known), self.l.cur.ins().bxor(base, at));
        let changed = self.l.cur.ins().bor(x, y);
        let (ask, go, leave) = (self.l.new_block(true), self.l.new_block(false), self.l.new_block(true));
        self.l.cur.ins().brif(changed, ask, &[], go, &[]);
        self.l.cur.goto_bottom(ask);
        let function = self.l.const64((layout::FN_HELPERS + Helper::EnterRegion as usize * 8) as u64);
        let number = self.l.const64(guard.number.into());
        let answer = self.l.call_results(Thunk::helper(self.l.full), Shape::call(3, 1), &[function, number])[0];
        self.l.cur.ins().brif(answer, go, &[], leave, &[]);
        self.l.cur.goto_bottom(leave);
        let off = self.l.const64(self.blocks[0].start().into());
        self.l.tail(Thunk::dispatch(self.l.block.flags.size()), &[off]);
        self.l.cur.goto_bottom(go);
    }

    /// Reads the budget and the fields of the slots in `live`.
    fn reload(&mut self, live: u64) {
        self.budget = self.l.load_state(types::I32, layout::BUDGET);
        self.values = (0..self.slots.len())
            .map(|i| {
                let (loc, ty) = self.slots.field(i);
                (live >> i & 1 != 0).then(|| self.l.load_state(ty, loc))
            })
            .collect();
        self.dirty = 0;
    }
    /// The value of a slot.
    fn value(&self, slot: usize) -> Result<Clif, CompileError> {
        self.values.get(slot).copied().flatten().ok_or(CompileError::Malformed)
    }

    /// Writes back what may be out of date, and the budget.
    fn write_back(&mut self) -> Result<(), CompileError> {
        self.l.store_state(self.budget, layout::BUDGET);
        self.write_back_slots(self.dirty)
    }
    fn write_back_slots(&mut self, mask: u64) -> Result<(), CompileError> {
        for i in members(mask, self.slots.len()) {
            let v = self.value(i)?;
            self.l.store_state(v, self.slots.field(i).0);
        }
        Ok(())
    }

    /// What is handed on to block `to`: its live slots and the budget.
    fn arguments(&self, to: usize) -> Result<Vec<BlockArg>, CompileError> {
        let mut values = Vec::new();
        for i in members(self.live.head[to], self.slots.len()) {
            values.push(self.value(i)?);
        }
        Ok(values.into_iter().chain([self.budget]).map(BlockArg::Value).collect())
    }

    /// One block.
    fn block(&mut self, i: usize, counters: &[Counter]) -> Result<(), CompileError> {
        let b = &self.blocks[i];
        self.at = i;
        self.l.block = b;
        (self.roles, self.places) = windows::plan(b);
        self.windows.clear();
        self.l.plan();
        for list in [&mut self.l.buf.values, &mut self.l.buf.wide] {
            list.clear();
            list.resize(b.ops.len(), None);
        }
        let head = self.heads[i];
        self.l.cur.goto_bottom(head);
        let dfg = &mut self.l.cur.func.dfg;
        let live = self.live.head[i];
        self.values = (0..self.slots.len())
            .map(|s| (live >> s & 1 != 0).then(|| dfg.append_block_param(head, self.slots.field(s).1)))
            .collect();
        self.budget = dfg.append_block_param(head, types::I32);
        self.dirty = self.graph.dirty[i];
        self.budget = self.l.cur.ins().iadd_imm_s(self.budget, -i64::from(b.retired));
        let end = b.end.ok_or(CompileError::Malformed)?;
        let mut next_insn = 0;
        for (n, op) in b.ops.iter().enumerate() {
            while let Some(insn) = b.insns.get(next_insn).filter(|insn| insn.first as usize <= n) {
                self.begin_insn(insn, next_insn);
                next_insn += 1;
                counters.iter().filter(|c| c.0 == insn.place()).for_each(|c| self.count(c.1));
            }
            self.op(n, op)?;
        }
        for (n, insn) in b.insns.iter().enumerate().skip(next_insn) {
            self.begin_insn(insn, n);
            counters.iter().filter(|c| c.0 == insn.place()).for_each(|c| self.count(c.1));
        }
        self.leave(&end, b.retired)
    }

    /// What is emitted from here on belongs to instruction `n` of the block.
    fn begin_insn(&mut self, insn: &GuestInsn, n: usize) {
        self.page = insn.page;
        self.sites.push((insn.place(), self.l.block.retired.saturating_sub(n as u16)));
        self.site_insns.push((self.at as u16, n as u16));
        self.part(Part::Body);
    }

    /// What is emitted from here on has this part in the instruction.
    fn part(&mut self, role: Part) {
        self.l.cur.set_srcloc(SourceLoc::new(role.location(self.sites.len() as u32 - 1)));
    }

    /// Adds one to an execution count.
    fn count(&mut self, counter: u32) {
        let table = self.l.load_state(types::I64, layout::EXEC_COUNTS);
        let (flags, at) = (MemFlagsData::trusted(), counter.wrapping_mul(8) as i32);
        let n = self.l.cur.ins().load(types::I64, flags, table, at);
        let n = self.l.cur.ins().iadd_imm_s(n, 1);
        self.l.cur.ins().store(flags, n, table, at);
    }

    fn op(&mut self, i: usize, op: &Op) -> Result<(), CompileError> {
        if self.l.fuse(i)? {
            return Ok(());
        }
        match *op {
            Op::Get { ty, loc } => {
                let v = self.get(ty, loc)?;
                self.l.set(i, v);
            }
            Op::Put { ty, loc, v } => {
                let v = self.l.get(v)?;
                self.put(ty, loc, v)?;
            }
            Op::Cond { .. } | Op::Flags => {
                self.write_back_slots(self.dirty & self.slots.flags())?;
                self.l.op(i, op)?;
            }
            Op::Load { ty, flags, addr } => self.load(i, ty, flags, addr)?,
            Op::Store { ty, flags, addr, v } => self.store(i, ty, flags, addr, v)?,
            Op::Rmw { op, ty, addr, v } => self.rmw(i, op, ty, addr, v)?,
            Op::CmpXchg { ty, addr, expected, new } => self.cmpxchg(i, ty, addr, expected, new)?,
            Op::Call { .. } if impure(op) => {
                self.write_back()?;
                self.l.op(i, op)?;
                let live = self.live.after.iter().find(|a| (a.0, a.1) == (self.at, i)).map_or(0, |a| a.2);
                self.reload(live);
            }
            Op::ExitIf { c, exit } => {
                let side = *self.l.block.exits.get(exit as usize).ok_or(CompileError::Malformed)?;
                let c = self.l.get(c)?;
                self.side_exit(c, &side.exit, side.retired)?;
            }
            _ => self.l.op(i, op)?,
        }
        debug_assert_eq!(self.dirty, dirty_after(&self.slots, op, self.dirty));
        Ok(())
    }

    fn side_exit(&mut self, c: Clif, exit: &Exit, retired: u16) -> Result<(), CompileError> {
        let inside = self.graph.target(exit, retired).is_some();
        let out = self.l.new_block(!inside);
        let next = self.l.new_block(false);
        self.l.cur.ins().brif(c, out, &[], next, &[]);
        self.l.cur.goto_bottom(out);
        let budget = self.budget;
        self.leave(exit, retired)?;
        self.budget = budget;
        self.part(Part::Body);
        self.l.cur.goto_bottom(next);
        Ok(())
    }

    /// Goes to another block of the region or out of it, with `retired` guest instructions of this one complete.
    fn leave(&mut self, exit: &Exit, retired: u16) -> Result<(), CompileError> {
        let back = i64::from(self.l.block.retired) - i64::from(retired);
        if back != 0 {
            self.budget = self.l.cur.ins().iadd_imm_s(self.budget, back);
        }
        match self.graph.target(exit, retired) {
            Some(to) if self.graph.checked.contains(&(self.at, to)) => self.jump_checked(to)?,
            Some(to) => {
                let args = self.arguments(to)?;
                self.l.cur.ins().jump(self.heads[to], &args);
            }
            None => {
                self.part(Part::Exit);
                self.write_back()?;
                self.outside(exit)?;
            }
        }
        Ok(())
    }

    /// Leaves, by a slot where the target's page is known.
    fn outside(&mut self, exit: &Exit) -> Result<(), CompileError> {
        let mut exit = *exit;
        let place = place_of(&exit);
        if let Some(page) = place.map(|p| p & !0xfff).filter(|p| self.pages.contains(p)) {
            self.set_page(page);
            self.slot_pages.push(page);
            exit = Exit::Jump { off: (place.unwrap_or_default() & 0xfff) as u16 };
        } else if let Exit::Raise { .. } = exit {
            self.set_page(self.page);
        }
        self.l.exit(&exit, self.l.block.retired)
    }

    /// On the way out: `rip_base` is that of another page than the root's.
    fn set_page(&mut self, page: i32) {
        if page != 0 {
            let base = self.l.load_state(types::I64, layout::RIP_BASE);
            let base = self.l.cur.ins().iadd_imm_s(base, i64::from(page));
            self.l.store_state(base, layout::RIP_BASE);
        }
    }

    /// To block `to`, unless the budget has run out or somebody wants attention.
    fn jump_checked(&mut self, to: usize) -> Result<(), CompileError> {
        self.part(Part::Budget);
        // Atomic so that every time round looks again.
        let at = self.l.cur.ins().iadd_imm_s(self.l.state, layout::ATTENTION as i64);
        let attention = self.l.cur.ins().atomic_load(types::I32, MemFlagsData::trusted(), at);
        let word = self.l.cur.ins().bor(attention, self.budget);
        let c = self.l.cur.ins().icmp_imm_s(IntCC::SignedLessThan, word, 0);
        let out = self.l.new_block(true);
        let args = self.arguments(to)?;
        self.l.cur.ins().brif(c, out, &[], self.heads[to], &args);
        self.l.cur.goto_bottom(out);
        self.write_back()?;
        let target = &self.blocks[to];
        self.set_page(target.place() & !0xfff);
        let off = self.l.const64(target.start().into());
        self.l.tail(Thunk::budget(target.flags.size()), &[off]);
        Ok(())
    }
}

/// The members of a set of slots.
fn members(set: u64, slots: usize) -> impl Iterator<Item = usize> {
    (0..slots).filter(move |i| set >> i & 1 != 0)
}

/// Whether a slot holds a vector.
fn is_vector(ty: cranelift_codegen::ir::Type) -> bool {
    ty == V
}
