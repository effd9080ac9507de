//! What the SSE and x87 oracle tests share: the runtime's floating-point helpers on a test environment, and
//! running a list of forms.

use twofold_arch::control::{cr0, cr4};
use twofold_arch::fpu::X87Op;
use twofold_arch::segment::attr;
use twofold_arch::{CpuState, Segment, TbFlags};
use twofold_ir::Helper;
use twofold_ir::eval::Abandon;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
use twofold_ir::{
    eval::Program,
    passes::{Options, Passes},
};
use twofold_runtime::fpu::{self, Guest};
use twofold_runtime::{MemAs, Trap};

use crate::insn::TestEnv;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
use crate::insn::{
    Form,
    native::{Native, check_block},
    reference, translate_one,
};

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

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
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
