//! The quick tier's compiler: one block in, position-independent host code out.
//!
//! Place in the pipeline: `lower` makes the CLIF, Cranelift the code; what comes out is independent of where it will lie
//! and of any runtime address, so a compiler runs on any thread. Nothing in a block can make it panic: what Cranelift
//! cannot do comes back as an error, and the block stays in the evaluator.

use twofold_arch::CodeSize;
use twofold_ir::Block;

use crate::thunks::Thunk;

/// How a memory access finds its host address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Probe {
    /// The TLB probe is emitted in the block, with a cold call for a miss.
    Inline,
    /// A call of a thunk that probes and accesses.
    #[default]
    OutOfLine,
}

/// Switches of the compiler.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// How memory accesses are emitted.
    pub probe: Probe,
    /// Run Cranelift's verifier on every block (doubles compile time).
    pub verify: bool,
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
}

impl CompiledTb {
    /// Bytes of host code.
    #[must_use]
    pub fn len(&self) -> usize {
        self.code.len()
    }
    /// Whether there is no code; never so for a compiled block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.code.is_empty()
    }
}

/// Compiles blocks; keeps its buffers from one to the next.
pub struct Compiler {
    options: Options,
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
        Ok(Self { options })
    }

    /// Compiles a block.
    ///
    /// # Errors
    /// See [`CompileError`]; the block then stays in the evaluator.
    pub fn compile(&mut self, block: &Block) -> Result<CompiledTb, CompileError> {
        let _ = block;
        Err(CompileError::Unavailable)
    }

    /// The CLIF text of a block (`-d clif`).
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn clif_text(&mut self, block: &Block) -> Result<String, CompileError> {
        let _ = block;
        Err(CompileError::Unavailable)
    }
}
