//! Random machines: pages of random code, in random modes, with random page tables and descriptor tables, and in system-management
//! mode and back. Nothing is expected of them but that L0 stays up: no panic, no end but the documented ones.
//!
//! One [`Pages`] serves the test with its fixed seed and the long run (`examples/pages.rs`).

use std::sync::Arc;

use iced_x86::{Code, EncodingKind};
use twofold_arch::control::{cr0, cr4, efer, rflags};
use twofold_arch::segment::attr;
use twofold_arch::state::Table;
use twofold_arch::{PhysAddr, Segment};
use twofold_backend::Options;
use twofold_mmu::{CodePages, FlushPolicy, GuestRam, LegacyHole, Mmu, PhysMap};
use twofold_runtime::config::{Control, Tier};
use twofold_runtime::cpu::{self, ColdState, CpuModel};
use twofold_runtime::exec::{self, Jit, RunEnd};
use twofold_runtime::platform::{Clock, Platform, Setup, smi};
use twofold_runtime::{Shared, Vcpu};

use crate::generate::encode;
use crate::insn::{Mode, Rng};

/// Bytes of memory: 1 MiB with a hole for devices in it, so that a third of all random addresses are not RAM.
const RAM: u64 = 1 << 20;
/// Pages of paging structures, from the second page on.
const TABLES: u64 = 24;
/// Turns of 50,000 instructions that a machine may take.
const TURNS: usize = 2;

/// What became of the machines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Machines run.
    pub machines: u64,
    /// Ended in shutdown: a triple fault.
    pub shutdowns: u64,
    /// Halted, for ever or until an interrupt.
    pub halted: u64,
    /// Powered off, reset or ended by a device.
    pub ended: u64,
    /// Still running when their time was up.
    pub running: u64,
    /// Guest instructions.
    pub instructions: u64,
}

/// Makes machines and runs them.
pub struct Pages {
    rng: Rng,
    codes: Vec<Code>,
    /// The counts so far.
    pub tally: Tally,
}

impl Pages {
    /// Machines that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let encodings = |c: &Code| matches!(c.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX);
        let codes = Code::values().filter(encodings).collect();
        Self { rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1), codes, tally: Tally::default() }
    }

    /// Makes one machine and runs it for a while in `tier`.
    pub fn step(&mut self, tier: Tier) {
        let mut v = self.machine(tier);
        self.fill(&mut v);
        self.registers(&mut v);
        if self.rng.below(4) == 0 {
            self.system_management(&mut v);
        }
        let control = Control::default();
        v.in_turn = true;
        self.tally.machines += 1;
        let mut end = RunEnd::TurnOver;
        for _ in 0..TURNS {
            end = exec::run(&mut v, &control);
            if end != RunEnd::TurnOver {
                break;
            }
        }
        self.tally.instructions += v.state.retired;
        match end {
            RunEnd::Shutdown(_) => self.tally.shutdowns += 1,
            RunEnd::Halted | RunEnd::Asleep => self.tally.halted += 1,
            RunEnd::Outcome(_) | RunEnd::Stopped(_) => self.tally.ended += 1,
            RunEnd::TurnOver => self.tally.running += 1,
        }
    }

    fn machine(&mut self, tier: Tier) -> Box<Vcpu> {
        let hole = if self.rng.below(2) == 0 { LegacyHole::Ram } else { LegacyHole::default() };
        let map = Arc::new(PhysMap::new(Arc::new(GuestRam::new(RAM).expect("guest memory")), hole));
        let clock = Clock::manual();
        let platform = Platform::new(Setup::quiet(1, RAM, clock.clone()));
        let policy = if self.rng.below(2) == 0 { FlushPolicy::Tagged } else { FlushPolicy::Full };
        let mmu = Mmu::new(map.clone(), Arc::new(CodePages::new(PhysAddr(RAM))), policy).expect("mmu");
        let shared = Arc::new(Shared::new(map, platform, clock));
        let mut v = Vcpu::new(0, shared, Arc::new(CpuModel::max()), mmu, Jit::new(tier, Options::default()));
        v.cold = ColdState::new(1);
        cpu::reset(&mut v);
        v
    }

    /// An SMI before the first instruction, whose handler damages what it returns to.
    fn system_management(&mut self, v: &mut Vcpu) {
        v.smm.base = self.rng.below(RAM - 0x1_0000) as u32 & !0xf;
        let base = u64::from(v.smm.base);
        let mut handler = Vec::new();
        for _ in 0..self.rng.below(3) {
            // mov dword [somewhere in the save area], something
            let at = base + 0xfe00 + (self.rng.below(0x200) & !3);
            handler.extend([0x66, 0x67, 0xc7, 0x05]);
            handler.extend((at as u32).to_le_bytes());
            handler.extend((self.rng.next() as u32 & self.rng.next() as u32).to_le_bytes());
        }
        handler.extend([0x0f, 0xaa]);
        v.shared.map.write(PhysAddr(base + 0x8000), &handler);
        v.io_write(smi::FIRST_PORT, 1, 0x21);
        v.io_write(smi::COMMAND_PORT, 1, 0);
    }

    /// Memory: paging structures, then code, then anything.
    fn fill(&mut self, v: &mut Vcpu) {
        for page in 0..RAM / 0x1000 {
            let mut bytes = [0u8; 0x1000];
            match page {
                1..=TABLES => self.entries(&mut bytes),
                _ => self.code(&mut bytes),
            }
            v.shared.map.write(PhysAddr(page * 0x1000), &bytes);
        }
    }

    /// Paging entries: mostly present, mostly of pages there are.
    fn entries(&mut self, page: &mut [u8]) {
        for entry in page.chunks_exact_mut(8) {
            let r = self.rng.next();
            let target = match r & 3 {
                0 | 1 => 1 + (r >> 8) % TABLES,
                _ => (r >> 8) % (RAM / 0x1000 + 8),
            };
            let flags = if r & 0x70 == 0 { r >> 20 & 0xfff } else { 0x27 | r >> 20 & 0x148 };
            let high = if r & 0xf00_0000 == 0 { r & 0xfff0_0000_0000_0000 } else { 0 };
            entry.copy_from_slice(&(target << 12 | flags | high).to_le_bytes());
        }
    }

    /// Code: instructions of one mode, random bytes, or descriptors.
    fn code(&mut self, page: &mut [u8]) {
        let kind = self.rng.below(6);
        if kind == 0 {
            return page.fill_with(|| self.rng.next() as u8);
        }
        if kind == 1 {
            return self.descriptors(page);
        }
        let mode = [Mode::Bits64, Mode::Bits32, Mode::Bits16, Mode::Bits64][self.rng.below(4) as usize];
        let mut at = 0;
        while at < page.len() {
            let code = self.codes[self.rng.below(self.codes.len() as u64) as usize];
            let Some(sample) = encode(code, mode, &mut self.rng) else { continue };
            let n = sample.bytes.len().min(page.len() - at);
            page[at..at + n].copy_from_slice(&sample.bytes[..n]);
            at += n;
        }
    }

    /// Descriptors that may be present segments and gates.
    fn descriptors(&mut self, page: &mut [u8]) {
        for entry in page.chunks_exact_mut(8) {
            let r = self.rng.next();
            let access = 0x80 | r >> 8 & 0x7f;
            entry.copy_from_slice(
                &(r & 0xffff | (r >> 16 & 0xf_ffff) << 16 | access << 40 | (r >> 36 & 0xcf) << 48).to_le_bytes(),
            );
        }
    }

    /// Registers: one of the modes a processor can be in, the rest at random.
    fn registers(&mut self, v: &mut Vcpu) {
        let r = self.rng.next();
        let (protected, paging, long) = (r & 7 != 0, r & 8 != 0, r & 0x30 != 0);
        let s = &mut v.state;
        s.cr0 = cr0::ET | self.rng.next() & (cr0::WP | cr0::AM | cr0::NE | cr0::MP);
        s.cr4 = self.rng.next()
            & (cr4::VME | cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::DE | cr4::PKE)
            | cr4::OSFXSR
            | cr4::OSXSAVE;
        s.xcr0 = if r & 0x400 == 0 { 7 } else { 0x207 };
        s.rflags_sys = self.rng.next() & (rflags::IF | rflags::AC | rflags::RF | rflags::TF & (r << 3));
        s.cpl = 0;
        s.cr3 = (1 + self.rng.below(TABLES)) << 12;
        if protected {
            s.cr0 |= cr0::PE;
            s.cpl = if r & 0x40 == 0 { 3 } else { 0 };
        }
        if protected && paging {
            s.cr0 |= cr0::PG;
        }
        if protected && paging && long {
            s.cr4 |= cr4::PAE | if r & 0x80 == 0 { cr4::LA57 } else { 0 };
            s.efer = efer::LME | efer::LMA;
        }
        s.efer |= self.rng.next() & (efer::SCE | efer::NXE);
        if s.cr4 & cr4::PAE != 0 && !long {
            s.pdpte = core::array::from_fn(|_| (1 + self.rng.below(TABLES)) << 12 | 1);
        }
        let is64 = s.efer & efer::LMA != 0 && r & 0x300 != 0;
        for i in 0..8 {
            let limit = if self.rng.below(3) == 0 { self.rng.next() as u32 } else { u32::MAX };
            let dpl = if s.cpl == 3 { attr::DPL } else { 0 };
            let base = if protected && self.rng.below(3) != 0 { 0 } else { self.rng.below(RAM) & 0xf_fff0 };
            let mut a = attr::P | attr::S | attr::ACCESSED | attr::RW | attr::DB | attr::G | dpl;
            if i == 1 {
                a |= attr::CODE;
                if is64 {
                    a = a & !attr::DB | attr::L;
                }
            }
            if !protected || self.rng.below(4) == 0 && !(i == 1 && is64) {
                a &= !attr::DB;
            }
            if i >= 6 {
                a = attr::P | if i == 6 { 2 } else { 0xb };
            }
            s.seg[i] = Segment {
                selector: self.rng.next() as u16 & 0xf8 | s.cpl as u16,
                base,
                limit,
                attr: a,
                ..Segment::default()
            };
        }
        let mut table = || Table { base: self.rng.below(RAM), limit: 0xfff };
        (s.gdtr, s.idtr) = (table(), table());
        s.gpr = core::array::from_fn(|_| if self.rng.below(3) == 0 { self.rng.next() } else { self.rng.below(RAM) });
        s.rip = if is64 { self.rng.below(RAM) } else { self.rng.below(0x1_0000) };
        cpu::refresh_space(v);
        let view = v.mmu.reset(&v.space);
        view.store(&mut v.state);
    }
}
