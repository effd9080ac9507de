//! A machine for the back end's tests: a guest state, memory, helpers that are a function of their arguments, a trace of
//! everything observable. The same machine runs blocks by the reference evaluator and as compiled code.
#![allow(unsafe_code, dead_code, missing_docs)] // raw state words, callbacks from translated code

use std::collections::HashMap;

use twofold_arch::state::TlbView;
use twofold_arch::{CpuState, Loc};
use twofold_backend::{AccessKind, CodeMemory, CompiledTb, Compiler, HelperTable, InstalledTb, MemInfo, Options};
use twofold_ir::eval::{Abandon, Env, FILE_BASE, FILE_WORDS, File, scalar};
use twofold_ir::testing::{Rng, mix, pure_helper};
use twofold_ir::{Block, Helper, MemFlags, RmwOp, Ty};

pub const PAGE: u64 = 4096;
pub const RIP_BASE: u64 = 0x7000;
const TLB_ENTRIES: usize = 256;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Load { bytes: u32, flags: u8, addr: u64, state: u64 },
    Store { bytes: u32, flags: u8, addr: u64, v: u128, state: u64 },
    Rmw { op: RmwOp, bytes: u32, addr: u64, v: u64, state: u64 },
    CmpXchg { bytes: u32, addr: u64, expected: u64, new: u64, state: u64 },
    Call { helper: Helper, args: [u64; 4], state: u64 },
}

#[repr(C, align(64))]
pub struct Tlb(pub [[u64; 4]; TLB_ENTRIES]);
pub type Page = Box<[u8; 4096]>;

pub struct Machine {
    pub state: Box<CpuState>,
    pub pages: HashMap<u64, Page>,
    pub trace: Vec<Event>,
    pub snapshots: Vec<Vec<u64>>,
    pub fault_at: usize,
    /// Slow accesses fill the TLB.
    pub fill: bool,
    /// Slow accesses so far.
    pub slow: usize,
    pub calls: u64,
    pub tlb: Box<Tlb>,
    pub jumps: Vec<[u64; 4]>,
    pub seed: u64,
    /// Return address noted by each helper call.
    pub rets: Vec<u64>,
}

pub fn table() -> &'static HelperTable {
    static TABLE: std::sync::OnceLock<HelperTable> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| {
        macro_rules! fns {
            ($($n:literal)*) => { [$(helper::<$n>),*] };
        }
        // More than there are helpers; the first of them are used.
        let all: [twofold_backend::HelperFn; 128] = fns!(
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
            40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76
            77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109
            110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127
        );
        let mut some = [all[0]; Helper::ALL.len()];
        some.copy_from_slice(&all[..Helper::ALL.len()]);
        HelperTable::new([slow; 3], lookup, some)
    })
}

/// Overwrites what a thunk must not rely on the callee to keep.
fn trash() {
    #[cfg(all(target_arch = "x86_64", not(portable_host)))]
    // SAFETY: caller-saved registers, declared as clobbered.
    unsafe {
        core::arch::asm!(
            "mov rcx, 0x1111",
            "mov rdx, 0x2222",
            "mov rsi, 0x3333",
            "mov rdi, 0x4444",
            "mov r8, 0x5555",
            "mov r9, 0x6666",
            "mov r10, 0x7777",
            "mov r11, 0x8888",
            "pcmpeqd xmm0, xmm0",
            "pcmpeqd xmm1, xmm1",
            "pcmpeqd xmm2, xmm2",
            "pcmpeqd xmm3, xmm3",
            "pcmpeqd xmm4, xmm4",
            "pcmpeqd xmm5, xmm5",
            "pcmpeqd xmm6, xmm6",
            "pcmpeqd xmm7, xmm7",
            "pcmpeqd xmm8, xmm8",
            "pcmpeqd xmm9, xmm9",
            "pcmpeqd xmm10, xmm10",
            "pcmpeqd xmm11, xmm11",
            "pcmpeqd xmm12, xmm12",
            "pcmpeqd xmm13, xmm13",
            "pcmpeqd xmm14, xmm14",
            "pcmpeqd xmm15, xmm15",
            clobber_abi("C")
        );
    }
}

unsafe extern "C" fn slow(state: *mut CpuState, addr: u64, info: u64, lo: u64, hi: u64) -> u64 {
    // SAFETY: the state belongs to the machine that its `vcpu` points to, and nobody else uses that now.
    let m = unsafe { &mut *((*state).vcpu as *mut Machine) };
    let info = MemInfo(info);
    let ty = match info.bytes() {
        16 => Ty::V128,
        n => Ty::int(n),
    };
    assert_eq!(info.mode() as u32, m.state.tb_flags >> 4 & 3);
    m.slow += 1;
    let r = match (info.kind(), ty) {
        (AccessKind::Load, Ty::V128) => m.load128(info.flags(), addr).map(|v| {
            m.state.mem_result = [v as u64, (v >> 64) as u64];
            v as u64
        }),
        (AccessKind::Load, _) => m.load(ty, info.flags(), addr),
        (AccessKind::Store, Ty::V128) => {
            let v = u128::from(m.state.mem_result[0]) | u128::from(m.state.mem_result[1]) << 64;
            m.store128(info.flags(), addr, v).map(|()| 0)
        }
        (AccessKind::Store, _) => m.store(ty, info.flags(), addr, lo).map(|()| 0),
        (AccessKind::Rmw(op), _) => m.rmw(op, ty, addr, lo & ty.mask()),
        (AccessKind::CmpXchg, _) => m.cmpxchg(ty, addr, lo & ty.mask(), hi & ty.mask()),
    };
    if m.fill && r.is_ok() {
        m.fill_tlb(addr);
    }
    if r.is_err() {
        m.state.fault.pending = 7;
    }
    trash();
    r.unwrap_or(0xdead)
}

/// Nothing is known here that is not in the jump cache.
unsafe extern "C" fn lookup(_: *mut CpuState) -> u64 {
    trash();
    0
}

unsafe extern "C" fn helper<const N: usize>(state: *mut CpuState, a: u64, b: u64, c: u64, d: u64) -> u64 {
    // SAFETY: as in `slow`.
    let m = unsafe { &mut *((*state).vcpu as *mut Machine) };
    let h = Helper::ALL[N.min(Helper::ALL.len() - 1)];
    m.rets.push(m.state.host_ret);
    let mut args = [a, b, c, d];
    args[h.info().args as usize..].fill(0);
    let r = m.call(h, args);
    if r.is_err() {
        m.state.fault.pending = 7;
    }
    trash();
    r.unwrap_or(0xdead)
}

impl Machine {
    pub fn new(seed: u64) -> Box<Self> {
        let mut rng = Rng(seed);
        let mut m = Box::new(Self {
            state: CpuState::zeroed(),
            pages: HashMap::new(),
            trace: Vec::new(),
            snapshots: Vec::new(),
            fault_at: usize::MAX,
            fill: false,
            slow: 0,
            calls: 0,
            tlb: Box::new(Tlb(std::array::from_fn(|i| [absent(i); 4]))),
            jumps: vec![[u64::MAX; 4]; twofold_mmu::JUMP_CACHE_ENTRIES],
            seed,
            rets: Vec::new(),
        });
        let s = &mut m.state;
        s.rip_base = RIP_BASE;
        s.gpr.iter_mut().for_each(|v| *v = rng.value());
        s.vec.iter_mut().flatten().for_each(|v| *v = rng.value());
        s.seg.iter_mut().for_each(|g| g.base = rng.value());
        (s.cc_dst, s.cc_src, s.cc_src2) = (rng.value(), rng.value(), rng.value());
        s.cc_op = rng.below(13 * 4) as u32;
        s.rflags_sys = rng.value();
        s.cr0 = rng.value();
        s.budget = 1_000_000;
        s.helpers = std::ptr::from_ref(table()) as u64;
        m.connect();
        m
    }

    /// Sets the state's host addresses.
    pub fn connect(&mut self) {
        let mask = (TLB_ENTRIES as u64 - 1) * 32;
        let view = TlbView { mask, table: self.tlb.0.as_ptr() as u64 };
        self.state.tlb = [view; 3];
        self.state.jump_cache = self.jumps.as_ptr() as u64;
        self.state.vcpu = std::ptr::from_mut(self) as u64;
    }

    /// A digest of what the guest can see of the state.
    pub fn digest(&self) -> u64 {
        self.words().into_iter().fold(0, |h, w| mix(h ^ w).wrapping_add(h << 1))
    }
    /// What the guest can see of the state: GPRs, then vector registers, then the rest.
    pub fn words(&self) -> Vec<u64> {
        let s = &self.state;
        let words = s.gpr.iter().chain(s.vec.iter().flatten()).chain(s.fpr.iter().flatten());
        let more = [s.cc_dst, s.cc_src, s.cc_src2, s.cc_op.into(), s.rflags_sys, s.cr0, s.rip_base];
        let bases = s.seg.iter().map(|g| g.base);
        words.copied().chain(more).chain(bases).collect()
    }

    fn page(&mut self, n: u64) -> &mut Page {
        let seed = self.seed;
        self.pages.entry(n).or_insert_with(|| {
            let mut p = Box::new([0u8; 4096]);
            let mut rng = Rng(seed ^ n);
            p.iter_mut().for_each(|b| *b = rng.bits() as u8);
            p
        })
    }
    pub fn fill_tlb(&mut self, addr: u64) {
        let n = addr / PAGE;
        let host = self.page(n).as_ptr() as u64;
        let tag = n * PAGE;
        self.tlb.0[(n as usize) % TLB_ENTRIES] = [tag, tag, absent(n as usize % TLB_ENTRIES), host.wrapping_sub(tag)];
    }
    pub fn read(&mut self, addr: u64, bytes: u32) -> u128 {
        (0..u64::from(bytes)).fold(0, |v, i| {
            let a = addr.wrapping_add(i);
            v | u128::from(self.page(a / PAGE)[(a % PAGE) as usize]) << (8 * i)
        })
    }
    pub fn write(&mut self, addr: u64, bytes: u32, v: u128) {
        for i in 0..u64::from(bytes) {
            let a = addr.wrapping_add(i);
            self.page(a / PAGE)[(a % PAGE) as usize] = (v >> (8 * i)) as u8;
        }
    }
    fn event(&mut self, e: Event) -> Result<(), Abandon> {
        self.trace.push(e);
        self.snapshots.push(self.words());
        if self.trace.len() - 1 == self.fault_at { Err(Abandon) } else { Ok(()) }
    }
    fn bytes(&mut self) -> *mut u8 {
        std::ptr::from_mut(&mut *self.state).cast()
    }
}

impl Env for Machine {
    fn file(&mut self) -> &mut File {
        const { assert!(size_of::<CpuState>() >= FILE_BASE as usize + FILE_WORDS * 8) };
        // SAFETY: in bounds, aligned, plain words; borrowed with `self`.
        unsafe { &mut *self.bytes().add(FILE_BASE as usize).cast() }
    }
    fn get(&mut self, ty: Ty, loc: Loc) -> u64 {
        let mut v = [0u8; 8];
        let n = ty.bytes() as usize;
        assert!(loc.0 as usize + n <= size_of::<CpuState>());
        // SAFETY: in bounds.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes().add(loc.0 as usize), v.as_mut_ptr(), n) };
        u64::from_le_bytes(v)
    }
    fn put(&mut self, ty: Ty, loc: Loc, v: u64) {
        let n = ty.bytes() as usize;
        assert!(loc.0 as usize + n <= size_of::<CpuState>());
        // SAFETY: in bounds.
        unsafe { std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), self.bytes().add(loc.0 as usize), n) };
    }
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon> {
        let state = self.digest();
        self.event(Event::Load { bytes: ty.bytes(), flags: flags.0, addr, state })?;
        Ok(self.read(addr, ty.bytes()) as u64)
    }
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon> {
        let state = self.digest();
        self.event(Event::Load { bytes: 16, flags: flags.0, addr, state })?;
        Ok(self.read(addr, 16))
    }
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        let v = u128::from(v & ty.mask());
        let state = self.digest();
        self.event(Event::Store { bytes: ty.bytes(), flags: flags.0, addr, v, state })?;
        self.write(addr, ty.bytes(), v);
        Ok(())
    }
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon> {
        let state = self.digest();
        self.event(Event::Store { bytes: 16, flags: flags.0, addr, v, state })?;
        self.write(addr, 16, v);
        Ok(())
    }
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon> {
        let state = self.digest();
        self.event(Event::Rmw { op, bytes: ty.bytes(), addr, v, state })?;
        let old = self.read(addr, ty.bytes()) as u64;
        self.write(addr, ty.bytes(), scalar::rmw(op, ty, old, v).into());
        Ok(old)
    }
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon> {
        let state = self.digest();
        self.event(Event::CmpXchg { bytes: ty.bytes(), addr, expected, new, state })?;
        let old = self.read(addr, ty.bytes()) as u64;
        self.write(addr, ty.bytes(), if old == expected { new } else { old }.into());
        Ok(old)
    }
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon> {
        let r = args.iter().fold(helper as u64, |h, &a| mix(h ^ a));
        if helper.info().pure {
            return Ok(pure_helper(helper, args));
        }
        self.calls += 1;
        let state = self.digest();
        let result = self.event(Event::Call { helper, args, state });
        if helper.info().faults {
            result?;
        }
        let mut rng = Rng(r ^ self.calls);
        for _ in 0..3 {
            let v = rng.value();
            self.state.gpr[rng.below(16)] = v;
        }
        (self.state.cc_dst, self.state.cc_src) = (rng.value(), rng.value());
        self.state.cc_op = rng.below(13 * 4) as u32;
        Ok(mix(r ^ self.seed))
    }
}

/// Compiles, installs, and keeps what is needed to run.
pub struct Rig {
    pub compiler: Compiler,
    pub memory: CodeMemory,
    pub next: u32,
}

impl Rig {
    pub fn new(options: Options) -> Self {
        let compiler = Compiler::new(options).expect("compiler");
        Self { compiler, memory: CodeMemory::new(8 << 20).expect("code memory"), next: 1 }
    }
    pub fn compile(&mut self, block: &Block) -> CompiledTb {
        match self.compiler.compile(block) {
            Ok(tb) => tb,
            Err(e) => panic!("{e}\n{block:?}"),
        }
    }
    pub fn install(&mut self, block: &Block) -> InstalledTb {
        let tb = self.compile(block);
        self.next += 1;
        loop {
            match self.memory.install(&tb, self.next) {
                Ok(tb) => return tb,
                Err(_) => drop(self.memory.evict_oldest()),
            }
        }
    }
}

pub fn enter(m: &mut Machine, entry: u64) -> twofold_backend::Leave {
    m.connect();
    let state = std::ptr::from_mut(&mut *m.state);
    // SAFETY: the state is set up for the code installed at `entry`; `m` is reached through `state.vcpu` only.
    unsafe { twofold_backend::enter(state, entry) }
}

/// A tag of entry `i` that stands for nothing: the address of a page whose entry is elsewhere.
fn absent(i: usize) -> u64 {
    (i ^ (TLB_ENTRIES / 2)) as u64 * PAGE
}
