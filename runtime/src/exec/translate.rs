//! Making a block: fetch, front end, passes, evaluator program, and its place in the store.
//!
//! Invariant: the bytes of a block are watched for writes from before they are read, so none is ever stale.

use twofold_arch::{LinearAddr, PAGE_MASK, PhysAddr, TbFlags};
use twofold_frontend::{FetchFault, MAX_INSN_LEN, Request, translate_block_in};
use twofold_ir::Block;
use twofold_ir::eval::Program;
use twofold_ir::passes::Options as PassOptions;

use super::cache::{Cached, Source};
use super::compile::Piece;
use super::counters::Phase;
use super::tb::{NO_SUCCESSOR, Tb, TbId, TbKey, TierState};
use super::turns::Broadcast;
use crate::config::DebugItem;
use crate::vcpu::{Trap, Vcpu};

/// Most guest instructions in a block.
pub const MAX_INSNS: usize = 48;

/// More bytes than a block's instructions can have: to it, this is the end of the page.
const MOST_BYTES: usize = (MAX_INSNS + 1) * MAX_INSN_LEN;

/// Translates the block at `key`, whose first byte has linear address `la`, and stores it.
///
/// # Errors
/// When its first instruction goes on in a page that cannot be fetched.
pub fn translate(vcpu: &mut Vcpu, key: TbKey, la: LinearAddr) -> Result<TbId, Trap> {
    let was = vcpu.enter_phase(Phase::Translate);
    let made = translate_at(vcpu, key, la);
    vcpu.enter_phase(was);
    made
}

fn translate_at(vcpu: &mut Vcpu, key: TbKey, la: LinearAddr) -> Result<TbId, Trap> {
    let mut bytes = [0u8; MOST_BYTES];
    let off = key.pa.page_offset() as usize;
    let page = &mut bytes[..MOST_BYTES.min(4096 - off)];
    vcpu.shared.map.read(key.pa, page);
    let source = Source { flags: key.flags, off: off as u16, bytes: page };
    if let Some(cached) = vcpu.jit.cache.as_mut().and_then(|cache| cache.find(source)) {
        return Ok(store_cached(vcpu, key, cached));
    }
    let next_la = LinearAddr((la.0 & PAGE_MASK).wrapping_add(0x1000));
    let mut second = None;
    let mut fault = None;
    let features = vcpu.model.features;
    let spare = std::mem::take(&mut vcpu.jit.spare);
    let mut next_page = || match vcpu.fetch_address(next_la) {
        Ok(pa) => {
            second = Some(pa);
            let mut tail = [0u8; MAX_INSN_LEN];
            vcpu.shared.map.read(pa, &mut tail);
            Some(tail)
        }
        Err(trap) => {
            fault = Some(trap);
            None
        }
    };
    let request =
        Request { flags: key.flags, off: off as u16, page, next_page: &mut next_page, features, max_insns: MAX_INSNS };
    let mut block = match translate_block_in(request, spare) {
        Ok(block) => block,
        Err(FetchFault) => return Err(fault.unwrap_or(twofold_arch::Exception::GP0.into())),
    };
    if !block.crosses_page {
        second = None;
    }
    let rip = vcpu.state.rip_base.wrapping_add(off as u64);
    if !vcpu.debug.is_empty() {
        trace(vcpu, &block, page, rip, DebugItem::Ir);
    }
    let at_once = vcpu.jit.policy.at_once && !key.flags.has(TbFlags::ONE_INSN);
    let options = if at_once { PassOptions::HOST } else { PassOptions::default() };
    vcpu.jit.passes.run(&mut block, &options);
    if !vcpu.debug.is_empty() {
        trace(vcpu, &block, page, rip, DebugItem::IrOpt);
    }
    let insn_offs = block.insns.iter().map(|i| i.off).collect();
    let program = (!at_once).then(|| Box::new(Program::new(&block)));
    let id = insert(vcpu, key, (second, rip), block.byte_len() as u64, insn_offs, program);
    if at_once && !super::compile::emit(vcpu, id, &block) {
        vcpu.jit.tbs.get_mut(id).program = Some(Box::new(Program::new(&block)));
    }
    vcpu.counters.tbs_translated += 1;
    vcpu.counters.insns_translated += block.insns.len() as u64;
    vcpu.counters.bytes_translated += block.byte_len() as u64;
    vcpu.jit.spare = block;
    Ok(id)
}

/// A block that an earlier run has compiled: with its host code, and without anything for the evaluator.
fn store_cached(vcpu: &mut Vcpu, key: TbKey, cached: Cached) -> TbId {
    let rip = vcpu.state.rip_base.wrapping_add(key.pa.page_offset());
    let id = insert(vcpu, key, (None, rip), cached.len.into(), cached.insn_offs, None);
    super::compile::install(vcpu, id, &cached.code);
    if vcpu.debug.has(DebugItem::OutAsm) {
        super::compile::show_cached(vcpu, id, &cached.code);
    }
    id
}

/// Block `id`'s form for the evaluator, made now if it came from the cache.
pub fn ensure_program(vcpu: &mut Vcpu, id: TbId) {
    if vcpu.jit.tbs.get(id).program.is_some() {
        return;
    }
    let features = vcpu.model.features;
    let flags = vcpu.jit.tbs.get(id).key.flags;
    // What the front end made of these bytes once it makes of them again.
    let Some(mut block) = Piece::of(vcpu, id).translate(flags, features) else { return };
    vcpu.jit.passes.run(&mut block, &PassOptions::default());
    vcpu.jit.tbs.get_mut(id).program = Some(Box::new(Program::new(&block)));
}

fn insert(
    vcpu: &mut Vcpu,
    key: TbKey,
    (second, rip): (Option<PhysAddr>, u64),
    len: u64,
    insn_offs: Box<[u16]>,
    program: Option<Box<Program>>,
) -> TbId {
    let first_len = len.min(0x1000 - key.pa.page_offset());
    watch(vcpu, key.pa, first_len);
    if let Some(page) = second {
        watch(vcpu, page, len - first_len);
    }
    vcpu.jit.serial += 1;
    let tb = Tb {
        key,
        second_page: second,
        len: len as u16,
        insns: insn_offs.len() as u16,
        tier: TierState::Cold,
        live: true,
        runs: 0,
        serial: vcpu.jit.serial,
        rip,
        program,
        successors: [NO_SUCCESSOR; 2],
        insn_offs,
        code: None,
        region: None,
        region_state: Default::default(),
        samples: 0,
        in_regions: Vec::new(),
        edges: Vec::new(),
        incoming: Vec::new(),
        cached_rips: Vec::new(),
    };
    let id = vcpu.jit.tbs.insert(tb);
    vcpu.jit.counts.begin(id, &mut vcpu.state);
    id
}

/// From now on writes to these bytes, all in one page, are noticed on every vCPU.
fn watch(vcpu: &mut Vcpu, pa: PhysAddr, len: u64) {
    if vcpu.mmu.protect(pa, len) {
        vcpu.tell_others(Broadcast::Protect(pa.page()));
    }
}

/// `-d in_asm,ir,ir_opt`.
#[cold]
fn trace(vcpu: &mut Vcpu, block: &Block, bytes: &[u8], rip: u64, stage: DebugItem) {
    if stage == DebugItem::Ir && vcpu.debug.has(DebugItem::InAsm) {
        let text = twofold_frontend::disassemble(block.flags, rip, &bytes[..block.byte_len().min(bytes.len())]);
        vcpu.trace.write(&text);
    }
    if vcpu.debug.has(stage) {
        let text = format!("{:016x}:\n{}", rip, block);
        vcpu.trace.write(&text);
    }
}
