//! The quick tier's compiler: one block in, position-independent host code out; by the direct emitter, or Cranelift.
//!
//! Place in the pipeline: `direct` writes the code, or `lower` makes the CLIF and Cranelift the code; what comes out is independent of where it will lie
//! and of any runtime address, so a compiler runs on any thread. Nothing in a block can make it panic: what Cranelift
//! cannot do comes back as an error, and the block stays in the evaluator.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{ExternalName, Function};
use cranelift_codegen::isa::{self, CallConv, OwnedTargetIsa, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, Final, FinalizedRelocTarget, MachBufferFinalized};
use twofold_arch::CodeSize;
use twofold_ir::Block;

use crate::assemble::{Emitted, Target, assemble};
use crate::code::MAX_TB_BYTES;
use crate::direct::DirectEmitter;
use crate::lower::{self, Buffers};
use crate::native::Native;
use crate::origin::Origin;
use crate::thunk::Thunk;

/// How a memory access finds its host address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Probe {
    /// The TLB probe is emitted in the block, with a cold call for a miss. Costs up to twice the compile time of the
    /// other and saves about 0.8 ns an access.
    #[default]
    Inline,
    /// A call of a thunk that probes and accesses.
    OutOfLine,
}

/// Who writes a block's code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Emitter {
    /// The direct emitter, and Cranelift what it refuses.
    #[default]
    Direct,
    /// Cranelift alone.
    Cranelift,
}

/// Switches of the compiler.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// How memory accesses are emitted.
    pub probe: Probe,
    /// Run Cranelift's verifier on every block (doubles compile time).
    pub verify: bool,
    /// Who writes the code.
    pub emitter: Emitter,
}

/// Why a block was not compiled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CompileError {
    /// This host has no compile tier.
    Unavailable,
    /// Cranelift refused, or the verifier did.
    Codegen(String),
    /// Cranelift panicked: an op that it does not lower.
    Panic(String),
    /// The code is larger than code memory takes.
    TooLarge,
    /// The block has no terminal or uses a value that is none.
    Malformed,
}

impl std::fmt::Display for CompileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CompileError::Unavailable => f.write_str("no compile tier on this host"),
            CompileError::Codegen(s) => write!(f, "code generation: {s}"),
            CompileError::Panic(s) => write!(f, "code generation panicked: {s}"),
            CompileError::TooLarge => f.write_str("the block's code is too large"),
            CompileError::Malformed => f.write_str("malformed block"),
        }
    }
}
impl std::error::Error for CompileError {}

/// A direct exit in compiled code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CompiledSlot {
    /// Where the 32-bit displacement is.
    pub at: u32,
    /// Page offset of the target.
    pub off: u16,
    /// Its page, in bytes from the block's, or the region's root's.
    pub page: i32,
}

/// A compiled block, not yet anywhere.
#[derive(Clone, Debug)]
pub struct CompiledTb {
    pub(crate) code: Vec<u8>,
    pub(crate) entry: u32,
    pub(crate) calls: Vec<(u32, Thunk)>,
    pub(crate) slots: Vec<CompiledSlot>,
    /// (offset of a return address, index of its guest instruction), ascending.
    pub(crate) returns: Vec<(u32, u16)>,
    pub(crate) charged: u16,
    pub(crate) size: CodeSize,
    pub(crate) fixed: bool,
    pub(crate) framed: bool,
    /// The number of the first slot.
    pub(crate) first_slot: u16,
    /// Of a region: what `returns` refers to, see [`crate::InstalledTb::site`].
    pub(crate) sites: Vec<(i32, u16)>,
    /// What the code is for, if the compiler was to note it. Ascending.
    pub(crate) origins: Vec<Origin>,
}

impl CompiledTb {
    /// Bytes of host code.
    #[must_use]
    pub fn len(&self) -> usize {
        self.code.len()
    }
    /// Whether code memory takes it.
    pub(crate) fn fits(&self) -> bool {
        self.code.len() + self.slots.len() * 32 <= MAX_TB_BYTES
    }
    /// Whether there is no code; never so for a compiled block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.code.is_empty()
    }
}

/// Counters of a compiler.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CompileStats {
    /// Blocks compiled.
    pub blocks: u64,
    /// Of those, blocks that the direct emitter left to Cranelift.
    pub refused: u64,
    /// Of those, blocks whose accesses are out of line because Cranelift's code could not be taken apart.
    pub fixed: u64,
    /// Of those, blocks with a frame: values were spilled.
    pub framed: u64,
    /// Blocks refused.
    pub failed: u64,
}

/// Compiles blocks; keeps its buffers from one to the next.
pub struct Compiler {
    options: Options,
    isa: OwnedTargetIsa,
    context: Context,
    control: ControlPlane,
    buffers: Buffers,
    direct: DirectEmitter,
    stats: CompileStats,
    annotate: bool,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Compiler {
    /// A compiler for this host.
    ///
    /// # Errors
    /// [`CompileError::Unavailable`] when the host has no compile tier.
    pub fn new(options: Options) -> Result<Self, CompileError> {
        if !crate::available() {
            return Err(CompileError::Unavailable);
        }
        let isa = host_isa("none").ok_or(CompileError::Unavailable)?;
        let (context, control, buffers) = (Context::new(), ControlPlane::default(), Buffers::default());
        let (direct, stats) = (DirectEmitter::default(), CompileStats::default());
        Ok(Self { options, isa, context, control, buffers, direct, stats, annotate: false })
    }

    /// From now on, whether to note what guest instruction each piece of host code is from ([`CompiledTb::pieces`]).
    pub fn annotate(&mut self, wanted: bool) {
        self.annotate = wanted;
    }

    /// Compiles a block.
    ///
    /// # Errors
    /// See [`CompileError`]; the block then stays in the evaluator.
    pub fn compile(&mut self, block: &Block) -> Result<CompiledTb, CompileError> {
        self.compile_counted(block, None)
    }

    /// Compiles a block; with `counter` its code adds one to that entry of the table at `CpuState::exec_counts` each time
    /// the block is executed, which costs one to two instructions' time a block.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn compile_counted(&mut self, block: &Block, counter: Option<u32>) -> Result<CompiledTb, CompileError> {
        let result = catch_unwind(AssertUnwindSafe(|| self.compile_inner(block, counter)));
        let result = result.unwrap_or_else(|payload| {
            // What a panic left behind is not to be trusted.
            self.context = Context::new();
            self.control = ControlPlane::default();
            self.buffers = Buffers::default();
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Err(CompileError::Panic(text.unwrap_or("?").to_owned()))
        });
        match &result {
            Ok(tb) => {
                self.stats.blocks += 1;
                self.stats.fixed += u64::from(tb.fixed);
                self.stats.framed += u64::from(tb.framed);
            }
            Err(_) => self.stats.failed += 1,
        }
        result
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> CompileStats {
        self.stats
    }

    /// The CLIF text of a block (`-d clif`).
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn clif_text(&mut self, block: &Block) -> Result<String, CompileError> {
        self.context.clear();
        lower::lower(&mut self.context.func, block, &mut self.buffers)?;
        Ok(self.context.func.display().to_string())
    }

    fn compile_inner(&mut self, block: &Block, counter: Option<u32>) -> Result<CompiledTb, CompileError> {
        if self.options.emitter == Emitter::Direct && self.options.probe == Probe::Inline {
            self.direct.annotate(self.annotate);
            if let Some(tb) = self.direct.emit(block, counter) {
                return Ok(tb);
            }
            self.stats.refused += 1;
        }
        self.context.clear();
        let lowered = lower::lower(&mut self.context.func, block, &mut self.buffers)?;
        if self.options.verify {
            verify(&self.context.func, &*self.isa)?;
        }
        let compiled = self.context.compile(&*self.isa, &mut self.control);
        compiled.map_err(|e| CompileError::Codegen(format!("{:?}", e.inner)))?;
        let buffer = &self.context.compiled_code().ok_or(CompileError::Malformed)?.buffer;
        if buffer.data().len() > MAX_TB_BYTES / 4 {
            return Err(CompileError::TooLarge);
        }
        let emitted = emitted(&self.context.func, buffer, lowered.exits.len(), self.annotate)?;
        let tb = assemble(&emitted, &lowered, block, self.options.probe, counter)?;
        if tb.fits() { Ok(tb) } else { Err(CompileError::TooLarge) }
    }
}

/// Takes out of Cranelift's buffer what `assemble` needs.
pub(crate) fn emitted(
    func: &Function,
    buffer: &MachBufferFinalized<Final>,
    exits: usize,
    annotate: bool,
) -> Result<Emitted, CompileError> {
    let names = func.params.user_named_funcs();
    let locations = buffer.get_srclocs_sorted();
    let mut e = Emitted { code: buffer.data().to_vec(), ..Emitted::default() };
    if annotate {
        let known = locations.iter().filter(|l| !l.loc.is_default());
        e.locations = Some(known.map(|l| (l.start, l.end, l.loc.bits())).collect());
    }
    for reloc in buffer.relocs() {
        let unexpected = || CompileError::Codegen(format!("relocation {:?}", reloc.kind));
        let FinalizedRelocTarget::ExternalName(ExternalName::User(name)) = reloc.target else {
            return Err(unexpected());
        };
        if reloc.kind != Reloc::X86CallPCRel4 || reloc.addend != -4 {
            return Err(unexpected());
        }
        let name = &names[name];
        let target = match name.namespace {
            lower::NAME_THUNK => Target::Thunk(Thunk::from_index(name.index as usize)),
            lower::NAME_SLOT => Target::Slot(name.index),
            lower::NAME_NATIVE => Target::Native(Native(name.index)),
            _ => Target::Probe(name.index),
        };
        let i = locations.partition_point(|l| l.end <= reloc.offset);
        let insn = locations.get(i).filter(|l| l.start <= reloc.offset && !l.loc.is_default());
        e.relocs.push((reloc.offset, target, insn.map_or(0, |l| l.loc.bits() as u16)));
    }
    e.relocs.sort_unstable_by_key(|r| r.0);
    e.traps = vec![u32::MAX; exits];
    for trap in buffer.traps() {
        let index = usize::from(trap.code.as_raw().get()) - 1;
        if let Some(t) = e.traps.get_mut(index) {
            *t = trap.offset;
        }
    }
    for l in locations.iter().filter(|l| !l.loc.is_default()) {
        let Some(index) = (l.loc.bits() >> lower::EXIT_SHIFT).checked_sub(1) else { continue };
        // The trap instruction itself has the location too.
        if e.traps.get(index as usize).is_none_or(|&t| l.start >= t) {
            continue;
        }
        match e.exits.iter_mut().find(|x| x.2 == index) {
            Some(x) => x.1 = l.end,
            None => e.exits.push((l.start, l.end, index)),
        }
    }
    e.exits.sort_unstable();
    if e.exits.len() != exits { Err(CompileError::Codegen("a side exit is gone".into())) } else { Ok(e) }
}

/// Checks the function as Cranelift wants it, but for the results that our called thunks have: its own functions of that
/// convention could not have any.
pub(crate) fn verify(func: &Function, isa: &dyn TargetIsa) -> Result<(), CompileError> {
    let mut copy = func.clone();
    for (_, signature) in &mut copy.dfg.signatures {
        if signature.call_conv == CallConv::PreserveAll {
            signature.call_conv = CallConv::SystemV;
        }
    }
    cranelift_codegen::verify_function(&copy, isa).map_err(|e| CompileError::Codegen(format!("{e}\n{copy}")))
}

pub(crate) fn host_isa(opt_level: &str) -> Option<OwnedTargetIsa> {
    let mut shared = settings::builder();
    for (name, value) in [
        ("opt_level", opt_level),
        ("regalloc_algorithm", "backtracking"),
        // Tail calls need them on x86-64; see `assemble` for what becomes of them.
        ("preserve_frame_pointers", "true"),
        // A third result register, which is a third register that a probe may change.
        ("enable_llvm_abi_extensions", "true"),
        ("unwind_info", "false"),
        ("enable_verifier", "false"),
        ("enable_probestack", "false"),
    ] {
        shared.set(name, value).ok()?;
    }
    let mut isa = isa::lookup(target_lexicon::Triple::host()).ok()?;
    for &name in host_features().iter() {
        isa.enable(name).ok()?;
    }
    isa.finish(settings::Flags::new(shared)).ok()
}

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
fn host_features() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let all = [
        ("has_cmpxchg16b", has!("cmpxchg16b")),
        ("has_sse3", has!("sse3")),
        ("has_ssse3", has!("ssse3")),
        ("has_sse41", has!("sse4.1")),
        ("has_sse42", has!("sse4.2")),
        ("has_avx", has!("avx")),
        ("has_avx2", has!("avx2")),
        ("has_popcnt", has!("popcnt")),
        ("has_bmi1", has!("bmi1")),
        ("has_bmi2", has!("bmi2")),
        ("has_lzcnt", has!("lzcnt")),
    ];
    all.into_iter().filter(|f| f.1).map(|f| f.0).collect()
}

#[cfg(not(all(target_arch = "x86_64", not(portable_host))))]
fn host_features() -> Vec<&'static str> {
    Vec::new()
}
