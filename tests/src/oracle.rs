//! What the SSE and x87 oracle tests share: the runtime's floating-point helpers on a test environment, floating-point
//! values that matter, and running a list of forms.

use twofold_arch::control::{cr0, cr4};
use twofold_arch::fpu::X87Op;
use twofold_arch::segment::attr;
use twofold_arch::{CpuState, Segment, TbFlags};
use twofold_ir::Helper;
use twofold_ir::eval::{Abandon, Program};
use twofold_ir::passes::{Options, Passes};
use twofold_runtime::fpu::{self, Guest};
use twofold_runtime::{MemAs, Trap};

use crate::native::{Form, Native, Regs, Rng, TestEnv, check_block, reference, translate_one};

/// The key of 64-bit user code.
pub const USER64: TbFlags = TbFlags(2 | 3 << TbFlags::CPL_SHIFT | TbFlags::PROTECTED | TbFlags::LONG);

/// The key of flat 32-bit user code.
pub const USER32: TbFlags = TbFlags(
    1 | 3 << TbFlags::CPL_SHIFT
        | TbFlags::PROTECTED
        | TbFlags::LONG
        | 0xf << TbFlags::NOLIMIT_SHIFT
        | 0xf << TbFlags::ZERO_BASE_SHIFT
        | TbFlags::SS32,
);

/// [`USER64`] with AVX enabled.
pub const AVX64: TbFlags = TbFlags(USER64.0 | TbFlags::AVX);

/// [`USER32`] with AVX enabled.
pub const AVX32: TbFlags = TbFlags(USER32.0 | TbFlags::AVX);

impl Guest for TestEnv {
    fn state(&mut self) -> &mut CpuState {
        &mut self.state
    }
    fn load(&mut self, la: u64, buf: &mut [u8], _: MemAs) -> Result<(), Trap> {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = self.read(la.wrapping_add(i as u64), 1).map_err(|_| Trap::from_record(&self.state.fault))? as u8;
        }
        Ok(())
    }
    fn store(&mut self, la: u64, data: &[u8], behalf: MemAs) -> Result<(), Trap> {
        self.check_store(la, data.len() as u32, behalf)?;
        for (i, &b) in data.iter().enumerate() {
            self.write(la.wrapping_add(i as u64), 1, b.into()).map_err(|_| Trap::from_record(&self.state.fault))?;
        }
        Ok(())
    }
    fn check_store(&mut self, la: u64, bytes: u32, _: MemAs) -> Result<(), Trap> {
        for i in 0..u64::from(bytes) {
            self.writable(la.wrapping_add(i)).map_err(|_| Trap::from_record(&self.state.fault))?;
        }
        Ok(())
    }
    fn zero_selectors(&self) -> bool {
        true
    }
}

/// The runtime's helpers, as a Linux process of 64-bit code sees them.
pub fn helpers(env: &mut TestEnv, helper: Helper, a: [u64; 4]) -> Option<Result<u64, Abandon>> {
    helpers_of::<{ USER64.0 }>(env, helper, a)
}

/// The same for code of another key.
pub fn helpers_of<const KEY: u32>(env: &mut TestEnv, helper: Helper, a: [u64; 4]) -> Option<Result<u64, Abandon>> {
    env.state.tb_flags = KEY;
    env.state.cr0 = cr0::PE | cr0::NE | cr0::PG;
    env.state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    env.state.xcr0 = if TbFlags(KEY).has(TbFlags::AVX) { 7 } else { 3 };
    env.state.cpl = 3;
    // Flat segments.
    let attr = attr::P | attr::S | attr::RW | attr::DB | attr::G;
    env.state.seg[..4].fill(Segment { base: 0, limit: u32::MAX, attr, ..Segment::default() });
    let r = match helper {
        Helper::X87 => fpu::x87(env, a[0], a[1], a[2], a[3]),
        Helper::X87Ready => {
            fpu::host::load(&mut env.state);
            Ok(0)
        }
        Helper::X87Do => Ok(fpu::host::execute(&mut env.state, X87Op(a[0] as u16), a[1], a[2])),
        Helper::X87Park => {
            fpu::host::park(&mut env.state);
            Ok(0)
        }
        Helper::X87LoadControl => Ok(fpu::x87_load_control(env, a[0])),
        Helper::SaveState => fpu::save_state(env, a[0], a[1]),
        Helper::RestoreState => fpu::restore_state(env, a[0], a[1]),
        Helper::Ldmxcsr => fpu::ldmxcsr(env, a[0]),
        Helper::Stmxcsr => Ok(fpu::stmxcsr(env)),
        Helper::MaskedMove => fpu::vector::masked_move(env, a[0], a[1]),
        Helper::Gather => fpu::vector::gather(env, a[0], a[1]),
        Helper::SseCheck => fpu::sse_check(env, a[0]),
        _ => return None,
    };
    Some(r.map_err(|t| {
        t.record(&mut env.state.fault);
        env.state.fault.pending = 1;
        Abandon
    }))
}

/// 32 bits as a float's.
pub fn float32(rng: &mut Rng) -> u32 {
    const EDGES: [u32; 26] = [
        0,
        0x8000_0000,
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x3fc0_0000,
        0x3f00_0000,
        0x4020_0000,
        0x4eff_ffff,
        0x4f00_0000,
        0xcf00_0000,
        0xcf00_0001,
        0x5f00_0000,
        0xdf00_0000,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc1_2345,
        0x7f80_0001,
        0xffa5_5aa5,
        0x3eaa_aaab,
    ];
    match rng.below(4) {
        0 => EDGES[rng.below(26) as usize],
        1 => (rng.next() as u32 & 0x807f_ffff) | (120 + rng.below(40) as u32) << 23,
        2 => (rng.next() as i16 as f32 / 4.0).to_bits(),
        _ => rng.next() as u32,
    }
}

/// 64 bits as a double's.
pub fn float64(rng: &mut Rng) -> u64 {
    const EDGES: [u64; 28] = [
        0,
        0x8000_0000_0000_0000,
        1,
        0x8000_0000_0000_0001,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x3ff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x3fe0_0000_0000_0000,
        0x4004_0000_0000_0000,
        0x41df_ffff_ffc0_0000,
        0x41df_ffff_ffe0_0000,
        0x41e0_0000_0000_0000,
        0xc1e0_0000_0000_0000,
        0xc1e0_0000_0020_0000,
        0x43df_ffff_ffff_ffff,
        0x43e0_0000_0000_0000,
        0xc3e0_0000_0000_0000,
        0x47ef_ffff_f000_0000,
        0x3690_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0xfff8_1234_5678_9abc,
        0x7ff0_0000_0000_0001,
        0xfff4_0000_dead_beef,
        0x3fd5_5555_5555_5555,
    ];
    match rng.below(4) {
        0 => EDGES[rng.below(28) as usize],
        1 => (rng.next() & 0x800f_ffff_ffff_ffff) | (1000 + rng.below(60)) << 52,
        2 => (rng.next() as i32 as f64 / 4.0).to_bits(),
        _ => rng.next(),
    }
}

/// 64 bits: a double, two floats, or an integer.
pub fn lanes(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => float64(rng),
        1 => u64::from(float32(rng)) | u64::from(float32(rng)) << 32,
        _ => rng.value(),
    }
}

/// Runs forms in the reference evaluator and, simplified, in the fast one; prints the counts, fails with all differences.
pub fn run_forms(what: &str, forms: &[Form], flags: TbFlags, times: usize) {
    let mut native = Native::lock();
    let mut passes = Passes::default();
    let (mut runs, mut failures) = (0, Vec::new());
    let mut fast = |block: &twofold_ir::Block, env: &mut TestEnv| Program::new(block).run(env);
    for form in forms {
        let mut block = translate_one(&form.bytes, TbFlags(flags.0));
        if let Err(e) = twofold_ir::verify::verify(&block) {
            failures.push(format!("{}: {e:?}", form.name));
            continue;
        }
        match check_block(&mut native, form, &block, times, &mut reference) {
            Ok(n) => runs += n,
            Err(m) => failures.push(m.text),
        }
        passes.run(&mut block, &Options::default());
        match check_block(&mut native, form, &block, times.div_ceil(4), &mut fast) {
            Ok(n) => runs += n,
            Err(m) => failures.push(format!("simplified: {}", m.text)),
        }
    }
    println!("{what}: {} forms, {runs} runs compared, {} differ", forms.len(), failures.len());
    let shown = failures.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {} forms differ:\n{shown}", failures.len(), forms.len());
}

/// Random x87 registers, tags and TOP; now and then an exception that is pending.
pub fn random_x87(r: &mut Regs, rng: &mut Rng) {
    for i in 0..8 {
        let mut v = [0; 10];
        v[..8].copy_from_slice(&rng.value().to_le_bytes());
        v[8..].copy_from_slice(&(rng.next() as u16).to_le_bytes());
        r.set_st(i, v);
    }
    r.set_ftw(rng.next() as u8);
    let pending = rng.below(16) == 0;
    r.set_fcw(if pending { 0x37e } else { 0x37f });
    r.set_fsw((rng.next() as u16 & 0x7800) | if pending { 0x8081 } else { 0 });
}
