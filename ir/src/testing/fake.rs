//! An environment whose memory holds a function of the address until it is written, and which records what it is asked for.

use std::collections::HashMap;

use twofold_arch::flags::arith_flags;
use twofold_arch::{CcOp, Loc};

use super::{Rng, mix};
use crate::eval::{Abandon, Env, FILE_BASE, FILE_WORDS, File, scalar};
use crate::helper::Helper;
use crate::op::{MemFlags, RmwOp, Ty};

/// Something that a block did that others can see, with a digest of the guest state at that moment.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Event {
    Load {
        bytes: u32,
        flags: MemFlags,
        addr: u64,
        state: u64,
    },
    Store {
        bytes: u32,
        flags: MemFlags,
        addr: u64,
        v: u128,
        state: u64,
    },
    Rmw {
        op: RmwOp,
        ty: Ty,
        addr: u64,
        v: u64,
        state: u64,
    },
    CmpXchg {
        ty: Ty,
        addr: u64,
        expected: u64,
        new: u64,
        state: u64,
    },
    /// Calls of pure helpers are not recorded.
    Call {
        helper: Helper,
        args: [u64; 4],
        state: u64,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub struct FakeEnv {
    /// The words of the guest state the evaluator addresses.
    pub file: Box<File>,
    /// The guest state behind them, by byte offset.
    pub rest: HashMap<u16, u8>,
    /// Bytes of memory that were written.
    pub memory: HashMap<u64, u8>,
    /// What happened.
    pub trace: Vec<Event>,
    /// The event with this number faults.
    pub fault_at: usize,
    /// Digests see the lazy flags' words, not just the flags.
    pub exact_flags: bool,
    seed: u64,
}

impl FakeEnv {
    /// An environment with random registers and memory; nothing faults.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let mut file = Box::new([0; FILE_WORDS]);
        file.iter_mut().for_each(|w| *w = rng.value());
        let mut env = Self {
            file,
            rest: HashMap::new(),
            memory: HashMap::new(),
            trace: Vec::new(),
            fault_at: usize::MAX,
            exact_flags: false,
            seed,
        };
        // Some valid kind of flags, most of the time.
        let op = rng.below(14 * 4) as u64;
        env.put(Ty::I32, Loc::CC_OP, op);
        env
    }

    /// A digest of the guest state, without the evaluator's temporaries.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let word = |loc: Loc| ((loc.0 - FILE_BASE) / 8) as usize;
        let temps = word(Loc::TEMPS);
        let cc = [Loc::CC_DST, Loc::CC_SRC, Loc::CC_SRC2, Loc::CC_OP].map(word);
        let field = |i: usize| self.file[cc[i]];
        let flags = arith_flags(CcOp(field(3) as u8), field(0), field(1), field(2));
        let file = self.file.iter().enumerate().fold(flags, |h, (i, &w)| match i {
            _ if (temps..temps + 64).contains(&i) => h,
            _ if self.exact_flags || !cc.contains(&i) => mix(h ^ w),
            // The upper half is another field.
            _ if i == cc[3] => mix(h ^ w >> 32),
            _ => h,
        });
        self.rest.iter().fold(file, |h, (&k, &v)| h.wrapping_add(mix(u64::from(k) << 8 | u64::from(v))))
    }

    fn byte(&self, loc: u16) -> u8 {
        match loc.checked_sub(FILE_BASE) {
            Some(rel) if (rel as usize) < FILE_WORDS * 8 => (self.file[rel as usize / 8] >> (rel % 8 * 8)) as u8,
            _ => self.rest.get(&loc).copied().unwrap_or(mix(self.seed ^ u64::from(loc)) as u8),
        }
    }
    fn set_byte(&mut self, loc: u16, v: u8) {
        match loc.checked_sub(FILE_BASE) {
            Some(rel) if (rel as usize) < FILE_WORDS * 8 => {
                let shift = rel % 8 * 8;
                let w = &mut self.file[rel as usize / 8];
                *w = *w & !(0xff << shift) | u64::from(v) << shift;
            }
            _ => {
                self.rest.insert(loc, v);
            }
        }
    }

    fn event(&mut self, e: Event) -> Result<(), Abandon> {
        self.trace.push(e);
        if self.trace.len() - 1 == self.fault_at { Err(Abandon) } else { Ok(()) }
    }
    fn read(&self, addr: u64, bytes: u32) -> u128 {
        (0..u64::from(bytes)).fold(0, |v, i| {
            let a = addr.wrapping_add(i);
            let b = self.memory.get(&a).copied().unwrap_or(mix(a ^ self.seed) as u8);
            v | u128::from(b) << (8 * i)
        })
    }
    fn write(&mut self, addr: u64, bytes: u32, v: u128) {
        for i in 0..u64::from(bytes) {
            self.memory.insert(addr.wrapping_add(i), (v >> (8 * i)) as u8);
        }
    }
}

impl Env for FakeEnv {
    fn file(&mut self) -> &mut File {
        &mut self.file
    }
    fn get(&mut self, ty: Ty, loc: Loc) -> u64 {
        (0..ty.bytes() as u16).fold(0, |v, i| v | u64::from(self.byte(loc.0.wrapping_add(i))) << (8 * i))
    }
    fn put(&mut self, ty: Ty, loc: Loc, v: u64) {
        assert_eq!(v, v & ty.mask());
        for i in 0..ty.bytes() as u16 {
            self.set_byte(loc.0.wrapping_add(i), (v >> (8 * i)) as u8);
        }
    }
    fn load(&mut self, ty: Ty, flags: MemFlags, addr: u64) -> Result<u64, Abandon> {
        self.event(Event::Load { bytes: ty.bytes(), flags, addr, state: self.digest() })?;
        Ok(self.read(addr, ty.bytes()) as u64)
    }
    fn load128(&mut self, flags: MemFlags, addr: u64) -> Result<u128, Abandon> {
        self.event(Event::Load { bytes: 16, flags, addr, state: self.digest() })?;
        Ok(self.read(addr, 16))
    }
    fn store(&mut self, ty: Ty, flags: MemFlags, addr: u64, v: u64) -> Result<(), Abandon> {
        let v = u128::from(v & ty.mask());
        self.event(Event::Store { bytes: ty.bytes(), flags, addr, v, state: self.digest() })?;
        self.write(addr, ty.bytes(), v);
        Ok(())
    }
    fn store128(&mut self, flags: MemFlags, addr: u64, v: u128) -> Result<(), Abandon> {
        self.event(Event::Store { bytes: 16, flags, addr, v, state: self.digest() })?;
        self.write(addr, 16, v);
        Ok(())
    }
    fn rmw(&mut self, op: RmwOp, ty: Ty, addr: u64, v: u64) -> Result<u64, Abandon> {
        assert_eq!(v, v & ty.mask());
        self.event(Event::Rmw { op, ty, addr, v, state: self.digest() })?;
        let old = self.read(addr, ty.bytes()) as u64;
        self.write(addr, ty.bytes(), u128::from(scalar::rmw(op, ty, old, v)));
        Ok(old)
    }
    fn cmpxchg(&mut self, ty: Ty, addr: u64, expected: u64, new: u64) -> Result<u64, Abandon> {
        assert_eq!((expected, new), (expected & ty.mask(), new & ty.mask()));
        self.event(Event::CmpXchg { ty, addr, expected, new, state: self.digest() })?;
        let old = self.read(addr, ty.bytes()) as u64;
        self.write(addr, ty.bytes(), u128::from(if old == expected { new } else { old }));
        Ok(old)
    }
    fn call(&mut self, helper: Helper, args: [u64; 4]) -> Result<u64, Abandon> {
        let r = args.iter().fold(helper as u64, |h, &a| mix(h ^ a));
        if helper.info().pure {
            return Ok(super::pure_helper(helper, args));
        }
        let faults = helper.info().faults;
        let result = self.event(Event::Call { helper, args, state: self.digest() });
        if faults {
            result?;
        }
        // A helper changes what it likes.
        let mut rng = Rng(r ^ self.trace.len() as u64);
        for _ in 0..3 {
            let v = rng.value();
            self.put(Ty::I64, Loc::gpr(rng.below(16) as u8), v);
        }
        let (dst, src, src2, op) = (rng.value(), rng.value(), rng.value(), rng.below(13 * 4) as u64);
        self.put(Ty::I64, Loc::CC_DST, dst);
        self.put(Ty::I64, Loc::CC_SRC, src);
        self.put(Ty::I64, Loc::CC_SRC2, src2);
        self.put(Ty::I32, Loc::CC_OP, op);
        Ok(mix(r ^ self.seed))
    }
}
