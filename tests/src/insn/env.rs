//! One instruction in an evaluator, on a `CpuState` and a flat memory.
#![allow(unsafe_code)] // The evaluator's file is a view of `CpuState`.

use twofold_arch::cpuid::Features;
use twofold_arch::{CpuState, Loc, TbFlags, Vector};
use twofold_frontend::{Request, translate_block};
use twofold_ir::eval::{Abandon, Env, FILE_BASE, FILE_WORDS, File, Leave, Target};
use twofold_ir::{Block, Helper, MemFlags, RmwOp, Ty};

use super::models::helper_model;
use super::regs::{CODE, LIMIT16, Mode, Outcome, Raised, Regs, SCRATCH, TAKEN};

/// Extra helpers of a test: `None` means "not mine".
pub type Helpers = fn(&mut TestEnv, Helper, [u64; 4]) -> Option<Result<u64, Abandon>>;

/// An [`Env`] over a `CpuState` and a flat memory; helpers are the simple ones of [`helper_model`].
pub struct TestEnv {
    /// The guest state.
    pub state: Box<CpuState>,
    /// Guest memory from linear address `base`.
    pub mem: Vec<u8>,
    /// Its first address.
    pub base: u64,
    /// Whether CS is flat.
    pub flat: bool,
    /// Extra helpers: asked first; `None` means "not mine".
    pub helpers: Helpers,
}

impl TestEnv {
    /// A state of zeroes and memory at `base`.
    #[must_use]
    pub fn new(base: u64, mem: Vec<u8>) -> Self {
        Self { state: CpuState::zeroed(), mem, base, flat: true, helpers: |_, _, _| None }
    }
    /// Records an exception, as a helper does.
    pub fn fault(&mut self, vector: Vector) -> Abandon {
        self.state.fault.pending = 1;
        self.state.fault.vector = vector as u32;
        Abandon
    }
    fn at(&mut self, flags: MemFlags, addr: u64, bytes: usize) -> Result<usize, Abandon> {
        let bytes = flags.checked_bytes(bytes as u32) as usize;
        if flags.has(MemFlags::ALIGNED) && !addr.is_multiple_of(bytes as u64) {
            return Err(self.fault(Vector::GeneralProtection));
        }
        if (addr as i64) << 16 >> 16 != addr as i64 {
            let stack = flags.has(MemFlags::STACK);
            return Err(self.fault(if stack { Vector::StackFault } else { Vector::GeneralProtection }));
        }
        let at = addr.wrapping_sub(self.base) as usize;
        match at.checked_add(bytes) {
            Some(end) if end <= self.mem.len() => Ok(at),
            _ => {
                let end = self.base + self.mem.len() as u64;
                // The first byte that is not there.
                self.state.fault.cr2 = if (self.base..end).contains(&addr) { end } else { addr };
                self.state.fault.has_error = 1;
                self.state.fault.error = 4 | if flags.has(MemFlags::WRITE_INTENT) { 2 } else { 0 };
                Err(self.fault(Vector::PageFault))
            }
        }
    }
    /// Whether a byte can be written.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn writable(&mut self, addr: u64) -> Result<(), Abandon> {
        self.at(MemFlags::WRITE_INTENT, addr, 1).map(drop)
    }
    /// Reads memory.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn read(&mut self, addr: u64, bytes: usize) -> Result<u64, Abandon> {
        let at = self.at(MemFlags::NONE, addr, bytes)?;
        let mut b = [0; 8];
        b[..bytes].copy_from_slice(&self.mem[at..at + bytes]);
        Ok(u64::from_le_bytes(b))
    }
    /// Writes memory.
    ///
    /// # Errors
    /// Outside the memory.
    pub fn write(&mut self, addr: u64, bytes: usize, v: u64) -> Result<(), Abandon> {
        let at = self.at(MemFlags::WRITE_INTENT, addr, bytes)?;
        self.mem[at..at + bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
        Ok(())
    }
    fn field(&mut self, loc: Loc, bytes: u32) -> *mut u8 {
        assert!(usize::from(loc.0) + bytes as usize <= size_of::<CpuState>());
        // SAFETY: inside the state, as asserted.
        unsafe { (&raw mut *self.state).cast::<u8>().add(usize::from(loc.0)) }
    }
}

impl Env for TestEnv {
    fn file(&mut self) -> &mut File {
        let p = self.field(Loc(FILE_BASE), FILE_WORDS as u32 * 8);
        // SAFETY: FILE_WORDS words of the state are plain integers (the evaluator's interface asserts the range).
        unsafe { &mut *p.cast::<File>() }
    }
    fn get(&mut self, ty: Ty, loc: Loc) -> u64 {
        let p = self.field(loc, ty.bytes());
        let mut b = [0u8; 8];
        // SAFETY: `field` has checked the range.
        unsafe { core::ptr::copy_nonoverlapping(p, b.as_mut_ptr(), ty.bytes().min(8) as usize) };
        u64::from_le_bytes(b)
    }
    fn put(&mut self, ty: Ty, loc: Loc, v: u64) {
        let p = self.field(loc, ty.bytes());
        // SAFETY: `field` has checked the range.
        unsafe { core::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, ty.bytes().min(8) as usize) };
    }
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon> {
        self.at(flags, addr, ty.bytes() as usize)?;
        self.read(addr, ty.bytes() as usize)
    }
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon> {
        let at = self.at(flags, addr, 16)?;
        Ok(u128::from_le_bytes(self.mem[at..at + 16].try_into().unwrap_or([0; 16])))
    }
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        self.at(flags.or(MemFlags::WRITE_INTENT), addr, ty.bytes() as usize)?;
        self.write(addr, ty.bytes() as usize, v)
    }
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon> {
        let at = self.at(flags.or(MemFlags::WRITE_INTENT), addr, 16)?;
        self.mem[at..at + 16].copy_from_slice(&v.to_le_bytes());
        Ok(())
    }
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon> {
        let n = ty.bytes() as usize;
        self.at(MemFlags::WRITE_INTENT, addr, n)?;
        let old = self.read(addr, n)?;
        let new = match op {
            RmwOp::Add => old.wrapping_add(v),
            RmwOp::Sub => old.wrapping_sub(v),
            RmwOp::And => old & v,
            RmwOp::Or => old | v,
            RmwOp::Xor => old ^ v,
            RmwOp::Xchg => v,
        };
        self.write(addr, n, new)?;
        Ok(old)
    }
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon> {
        let n = ty.bytes() as usize;
        self.at(MemFlags::WRITE_INTENT, addr, n)?;
        let old = self.read(addr, n)?;
        if old == expected & ty.mask() {
            self.write(addr, n, new)?;
        }
        Ok(old)
    }
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon> {
        if let Some(r) = (self.helpers)(self, helper, args) {
            return r;
        }
        helper_model(self, helper, args)
    }
}

/// Translates one instruction placed at page offset 0.
#[must_use]
pub fn translate_one(insn: &[u8], flags: TbFlags) -> Block {
    let mut page = [0x90u8; 64];
    page[..insn.len()].copy_from_slice(insn);
    let mut none = || None;
    let req = Request { flags, off: 0, page: &page, next_page: &mut none, features: Features::ALL, max_insns: 1 };
    translate_block(req).unwrap_or_default()
}

/// What runs a block: the reference evaluator, or a tier under test.
pub type Runner<'a> = dyn FnMut(&Block, &mut TestEnv) -> Leave + 'a;

/// The reference evaluator.
pub fn reference(block: &Block, env: &mut TestEnv) -> Leave {
    twofold_ir::eval::reference::run(block, env)
}

/// Runs a block of one instruction of `len` bytes on `regs` and the memory at [`SCRATCH`], both updated.
pub fn run_block(block: &Block, len: usize, regs: &mut Regs, env: &mut TestEnv, run: &mut Runner<'_>) -> Outcome {
    regs.to_state(&mut env.state);
    let mode = match block.flags.size() {
        twofold_arch::CodeSize::Bits16 => Mode::Bits16,
        twofold_arch::CodeSize::Bits32 => Mode::Bits32,
        twofold_arch::CodeSize::Bits64 => Mode::Bits64,
    };
    env.state.rip_base = mode.rip();
    env.flat = mode != Mode::Bits16;
    if !env.flat {
        let data = twofold_arch::Segment { base: SCRATCH, limit: LIMIT16, ..Default::default() };
        let code = twofold_arch::Segment { base: CODE, limit: 0xffff, ..Default::default() };
        env.state.seg[..4].copy_from_slice(&[data, code, data, data]);
    }
    env.state.fault = Default::default();
    let host = twofold_ir::vecop::host_mxcsr();
    twofold_ir::vecop::set_host_mxcsr(env.state.mxcsr);
    let left = run(block, env);
    let after = twofold_ir::vecop::host_mxcsr();
    twofold_ir::vecop::set_host_mxcsr(host);
    if env.state.x87_live != 0 {
        (env.helpers)(env, twofold_ir::Helper::X87Park, [0; 4]);
    }
    env.state.mxcsr = env.state.mxcsr & !0x3f | (env.state.mxcsr | after) & 0x3f;
    regs.take_state(&env.state);
    regs.taken = 0;
    regs.raised = match left {
        Leave::Abandoned { .. } => {
            let f = env.state.fault;
            Some(Raised::new(f.vector as u8, f.error, f.cr2))
        }
        Leave::Exit { to: Target::Raise { exception, .. }, .. } => Some(Raised::new(exception.vector as u8, 0, 0)),
        Leave::Exit { .. } => None,
    };
    let at = |off: i64| -> (Outcome, u64) { (Outcome::Done, u64::from(off == (len + TAKEN) as i64)) };
    let (outcome, taken) = match left {
        Leave::Abandoned { .. } => (Outcome::of_vector(env.state.fault.vector), 0),
        Leave::Exit { to, .. } => match to {
            Target::Jump { off } => at(i64::from(off)),
            Target::JumpFar { off } | Target::Dispatch { off } => at(i64::from(off)),
            Target::Indirect { rip, .. } => at(rip.wrapping_sub(mode.rip()) as i64),
            Target::Helped => (Outcome::Done, 0),
            Target::Raise { exception, .. } => (Outcome::of_vector(exception.vector as u32), 0),
        },
    };
    regs.taken = taken;
    outcome
}
