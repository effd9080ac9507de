//! A virtual processor with a code page and the scratch area, on which one instruction runs in the tier that is asked for.
//!
//! Unlike [`crate::insn::TestEnv`] this is the real thing: the runtime's helpers, the softmmu TLB with page tables, the
//! front end's blocks simplified by the passes, in the evaluator or as host code of the quick or the optimising tier. Only the dispatcher is
//! replaced, so that an exception can be looked at instead of being delivered.
#![allow(unsafe_code)] // Enters host code.

use std::sync::Arc;

use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::{PhysAddr, Segment, TbFlags};
use twofold_backend::{CodeMemory, CompiledTb, Compiler, InstalledTb, Leave as CodeLeave, Options, RegionCompiler};
use twofold_frontend::{Request, translate_block};
use twofold_ir::Block;
use twofold_ir::eval::{Leave, Program, Target};
use twofold_ir::passes::{Options as PassOptions, Passes};
use twofold_mmu::{CodePages, FlushPolicy, GuestRam, LegacyHole, Mmu, PhysMap};
use twofold_runtime::config::Tier as ConfigTier;
use twofold_runtime::cpu::cpuid::CpuModel;
use twofold_runtime::cpu::{self, ColdState, mode};
use twofold_runtime::exec::Jit;
use twofold_runtime::exec::env::Env;
use twofold_runtime::fpu;
use twofold_runtime::platform::{Clock, Platform, Setup};
use twofold_runtime::{Shared, Trap, Vcpu};

use crate::insn::{CODE, Mode, Outcome, Raised, Regs, SCRATCH, SCRATCH_LEN, TAKEN};

/// Guest-physical addresses.
const RAM: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
const CODE_PA: u64 = 0x10_0000;
const SCRATCH_PA: u64 = 0x10_1000;

/// How an instruction is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tier {
    /// The evaluator, on a simplified block.
    Eval,
    /// Host code of the quick tier.
    Quick,
    /// A region of the optimising tier, with nothing but the instruction in it.
    Region,
}

impl Tier {
    /// All of them.
    pub const ALL: [Tier; 3] = [Tier::Eval, Tier::Quick, Tier::Region];
}

/// An instruction made ready for all tiers.
pub struct Ready {
    len: usize,
    /// The block before the passes.
    pub block: Block,
    program: Program,
    code: Option<InstalledTb>,
    region: Option<InstalledTb>,
}

/// The processor.
pub struct Machine {
    vcpu: Box<Vcpu>,
    mode: Mode,
    passes: Passes,
    compiler: Option<(Compiler, RegionCompiler, CodeMemory)>,
    serial: u32,
    /// Blocks that the optimising tier did not take.
    pub refused: u64,
}

impl Machine {
    /// A processor of the model `max` at CPL 3.
    ///
    /// # Panics
    /// When the host has no memory for it.
    #[must_use]
    pub fn new() -> Self {
        let ram = GuestRam::new(RAM).expect("guest memory");
        let map = Arc::new(PhysMap::new(Arc::new(ram), LegacyHole::default()));
        let clock = Clock::manual();
        let platform = Platform::new(Setup::quiet(1, RAM, clock.clone()));
        let code = Arc::new(CodePages::new(PhysAddr(RAM)));
        let mmu = Mmu::new(map.clone(), code, FlushPolicy::Tagged).expect("mmu");
        let shared = Arc::new(Shared::new(map, platform, clock));
        let jit = Jit::new(ConfigTier::Eval, Options::default());
        let mut vcpu = Vcpu::new(0, shared, Arc::new(CpuModel::max()), mmu, jit);
        vcpu.cold = ColdState::new(1);
        cpu::reset(&mut vcpu);
        let options = Options::default();
        let compilers = Compiler::new(options).ok().zip(RegionCompiler::new(options).ok());
        let compiler = compilers.zip(CodeMemory::new(8 << 20).ok()).map(|((c, r), m)| (c, r, m));
        let mut m = Self { vcpu, mode: Mode::Bits64, passes: Passes::default(), compiler, serial: 0, refused: 0 };
        m.tables();
        let s = &mut m.vcpu.state;
        s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        s.cr3 = TABLES;
        s.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        s.xcr0 = 7;
        s.cpl = 3;
        // A TSS too short for an I/O permission map: no port is allowed.
        s.seg[7] = Segment { attr: attr::P | 0xb, limit: 0x20, ..Segment::default() };
        m.set_mode(Mode::Bits64);
        mode::refresh_space(&mut m.vcpu);
        m.vcpu.mmu.view().store(&mut m.vcpu.state);
        m
    }

    fn poke(&self, pa: u64, data: &[u8]) {
        self.vcpu.shared.map.write(PhysAddr(pa), data);
    }

    /// Page tables that map the code page and the scratch area, for users.
    fn tables(&self) {
        let entry = |pa: u64, value: u64| self.poke(pa, &value.to_le_bytes());
        const FLAGS: u64 = 0x67;
        let index = |la: u64, level: u32| (la >> (12 + 9 * level) & 511) * 8;
        entry(TABLES + index(CODE, 3), (TABLES + 0x1000) | FLAGS);
        entry(TABLES + 0x1000 + index(CODE, 2), (TABLES + 0x2000) | FLAGS);
        entry(TABLES + 0x2000 + index(CODE, 1), (TABLES + 0x3000) | FLAGS);
        // As on the host, code cannot be written.
        entry(TABLES + 0x3000 + index(CODE, 0), CODE_PA | FLAGS & !2);
        for i in 0..SCRATCH_LEN as u64 / 0x1000 {
            entry(TABLES + 0x3000 + index(SCRATCH + i * 0x1000, 0), (SCRATCH_PA + i * 0x1000) | FLAGS);
        }
    }

    /// Sets the segments for a code size, as on the host ([`crate::insn`]).
    pub fn set_mode(&mut self, mode: Mode) {
        let base = attr::P | attr::S | attr::DPL | attr::ACCESSED | attr::RW;
        let (code, data) = (base | attr::CODE, base);
        let flat = |attr| Segment { selector: 0x2b, attr, limit: u32::MAX, ..Segment::default() };
        let s = &mut self.vcpu.state;
        let data_segment = match mode {
            Mode::Bits16 => Segment {
                selector: 0x0f,
                attr: data,
                limit: SCRATCH_LEN as u32 - 1,
                base: SCRATCH,
                ..Segment::default()
            },
            _ => flat(data | attr::DB | attr::G),
        };
        s.seg[..6].fill(data_segment);
        s.seg[1] = match mode {
            Mode::Bits64 => Segment { selector: 0x33, ..flat(code | attr::L | attr::G) },
            Mode::Bits32 => Segment { selector: 0x23, ..flat(code | attr::DB | attr::G) },
            Mode::Bits16 => Segment { selector: 0x07, attr: code, limit: 0xffff, base: CODE, ..Segment::default() },
        };
        for seg in &mut s.seg[4..6] {
            *seg = Segment { base: 0, ..*seg };
        }
        self.mode = mode;
    }

    /// The key that blocks run under with these registers.
    fn key(&mut self, regs: &Regs) -> TbFlags {
        self.vcpu.state.mxcsr = regs.mxcsr();
        (self.vcpu.state.fcw, self.vcpu.state.fsw) = (regs.fcw(), regs.fsw());
        self.vcpu.state.rflags_sys = rflags::IF;
        mode::tb_flags(&self.vcpu.state)
    }

    /// What an instruction finds when it reads the code page. (It runs from its translation.)
    pub fn show_code(&self, page: &[u8; 0x1000]) {
        self.poke(CODE_PA, page);
    }

    /// Translates an instruction, for runs whose MXCSR masks what `like`'s does.
    ///
    /// # Panics
    /// When a tier refuses the block.
    pub fn prepare(&mut self, bytes: &[u8], like: &Regs) -> Ready {
        let flags = self.key(like);
        let mut page = [0x90u8; 64];
        page[..bytes.len()].copy_from_slice(bytes);
        let features = self.vcpu.model.features;
        let mut none = || None;
        let req = Request { flags, off: 0, page: &page, next_page: &mut none, features, max_insns: 1 };
        let block = translate_block(req).unwrap_or_default();
        let mut simple = block.clone();
        self.passes.run(&mut simple, &PassOptions::default());
        let program = Program::new(&simple);
        self.serial += 1;
        let serial = self.serial;
        let mut ready = Ready { len: bytes.len(), block, program, code: None, region: None };
        let Some((compiler, regions, memory)) = &mut self.compiler else { return ready };
        let compiled = compiler.compile(&simple).unwrap_or_else(|e| panic!("{bytes:02x?}: {e}"));
        ready.code = Some(install(memory, &compiled, serial));
        match regions.compile(std::slice::from_ref(&simple), None, None) {
            // What is evicted is the oldest, of several MiB: never the block's own code.
            Ok(region) => ready.region = Some(install(memory, &region, serial)),
            Err(_) => self.refused += 1,
        }
        ready
    }

    /// Runs it on `regs` and the scratch memory `mem`, both updated. `None`: the host has no such tier.
    pub fn run(&mut self, ready: &Ready, tier: Tier, regs: &mut Regs, mem: &mut [u8]) -> Option<Outcome> {
        let code = match tier {
            Tier::Eval => None,
            Tier::Quick => Some(ready.code.as_ref()?),
            Tier::Region => Some(ready.region.as_ref()?),
        };
        let flags = self.key(regs);
        self.poke(SCRATCH_PA, mem);
        let v = &mut *self.vcpu;
        regs.to_state(&mut v.state);
        v.state.tb_flags = flags.0;
        (v.state.rip, v.state.rip_base) = (self.mode.rip(), self.mode.rip());
        v.state.budget = 1000;
        v.state.attention.store(0, std::sync::atomic::Ordering::Relaxed);
        v.state.fault = Default::default();
        fpu::enter(&v.state);
        let left = match code {
            Some(code) => host_code(v, code.entry),
            None => eval(v, &ready.program),
        };
        fpu::leave(&mut v.state);
        regs.take_state(&v.state);
        (regs.taken, regs.raised) = (0, None);
        let outcome = match left {
            Left::At(rip) => {
                regs.taken = u64::from(rip == self.mode.rip() + (ready.len + TAKEN) as u64);
                Outcome::Done
            }
            Left::Trap(Trap::Exception(e)) => {
                regs.raised = Some(Raised::new(e.vector as u8, e.error.unwrap_or(0), e.cr2));
                Outcome::of_vector(e.vector as u32)
            }
            Left::Trap(_) => Outcome::Other,
        };
        self.vcpu.shared.map.read(PhysAddr(SCRATCH_PA), mem);
        Some(outcome)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

/// Puts code into memory, in the place of the oldest if need be.
fn install(memory: &mut CodeMemory, compiled: &CompiledTb, serial: u32) -> InstalledTb {
    loop {
        match memory.install(compiled, serial) {
            Ok(tb) => return tb,
            Err(_) => drop(memory.evict_oldest()),
        }
    }
}

/// How a run ended.
enum Left {
    /// Control goes on at this RIP.
    At(u64),
    /// An exception.
    Trap(Trap),
}

fn eval(v: &mut Vcpu, program: &Program) -> Left {
    let base = v.state.rip_base;
    let left = program.run(&mut Env::new(v));
    let at = |off: i64| Left::At(base.wrapping_add_signed(off));
    match left {
        Leave::Abandoned { .. } => Left::Trap(Trap::from_record(&v.state.fault)),
        Leave::Exit { to, .. } => match to {
            Target::Jump { off } => at(off.into()),
            Target::JumpFar { off } | Target::Dispatch { off } => at(off.into()),
            Target::Indirect { rip, .. } => Left::At(rip),
            Target::Helped => Left::At(v.state.rip),
            Target::Raise { exception, .. } => Left::Trap(exception.into()),
        },
    }
}

fn host_code(v: &mut Vcpu, entry: u64) -> Left {
    let state: *mut twofold_arch::CpuState = &mut *v.state;
    // SAFETY: `entry` is the code of a block that is installed, the state is this processor's with its helper table and TLB.
    match unsafe { twofold_backend::enter(state, entry) } {
        CodeLeave::Raise | CodeLeave::Fault => Left::Trap(Trap::from_record(&v.state.fault)),
        _ => Left::At(v.state.rip),
    }
}
