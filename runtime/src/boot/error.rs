//! Why a guest cannot be started: typed, and one line for a person.
//!
//! Place in the pipeline: returned by the loaders, shown by the `twofold` command with exit status 2. Invariant: `Display` has no line
//! break and says what is wrong, where, and what to do about it.

use std::fmt;

/// A file that cannot be used, and why.
#[derive(Debug)]
pub struct BootError {
    /// The file, as the user named it.
    pub file: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What can be wrong.
#[derive(Debug)]
pub enum Problem {
    /// Neither kernel nor firmware was given.
    NoKernel,
    /// The file cannot be read.
    Read(std::io::Error),
    /// The file has no bytes.
    Empty,
    /// The file is larger than the guest's memory (both in bytes).
    TooLarge {
        /// File size.
        size: u64,
        /// Guest memory.
        memory: u64,
    },
    /// The file ends too early.
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it would end, bytes from the start of the file.
        needed: u64,
        /// File size.
        size: u64,
    },
    /// The format is not one we start; what it looks like, and what to do.
    Foreign {
        /// What it looks like.
        looks_like: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A field has a value that makes no sense.
    BadField {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Something does not fit into guest memory, or lies where the machine's own data is.
    NoRoom {
        /// What.
        what: &'static str,
        /// Where it would go.
        addr: u64,
        /// Its size in bytes.
        len: u64,
        /// Guest memory in bytes.
        memory: u64,
    },
    /// The command line is longer than the kernel takes.
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// The command line has a NUL byte in it.
    CommandLineNul,
    /// The kernel's format cannot be given this many modules.
    TooManyModules(usize),
    /// A ROM of a size that cannot be mapped.
    RomSize(u64),
}

impl BootError {
    /// An error about `file`.
    #[must_use]
    pub fn new(file: &str, problem: Problem) -> Self {
        Self { file: file.to_owned(), problem }
    }
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A file name can hold anything, a line break too.
        let file: String = self.file.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        write!(f, "{file}: {}", self.problem)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKernel => write!(f, "no kernel and no firmware; give --kernel FILE or --firmware FILE"),
            Self::Read(e) => write!(f, "cannot be read: {e}; check the path and its permissions"),
            Self::Empty => write!(f, "the file is empty; fetch or build it again"),
            Self::TooLarge { size, memory } => write!(
                f,
                "the file has {} MiB and the guest {} MiB of memory; give it more with --memory",
                size.div_ceil(1 << 20),
                memory >> 20
            ),
            Self::Truncated { what, needed, size } => write!(
                f,
                "the file ends at byte {size}, but its {what} would end at byte {needed}; it is truncated or damaged, fetch or build it again"
            ),
            Self::Foreign { looks_like, advice } => write!(f, "{looks_like}; {advice}"),
            Self::BadField { what, value } => {
                write!(f, "{what} is {value:#x}, which makes no sense; the file is damaged, fetch or build it again")
            }
            Self::NoRoom { what, addr, len, memory } => write!(
                f,
                "no room for {what} ({} KiB at {addr:#x}) in {} MiB of guest memory; give it more with --memory",
                len.div_ceil(1024),
                memory >> 20
            ),
            Self::CommandLineTooLong { len, max } => {
                write!(f, "the command line has {len} characters and this kernel takes {max}; shorten --append")
            }
            Self::CommandLineNul => write!(f, "the command line has a NUL character in it; take it out of --append"),
            Self::TooManyModules(n) => {
                write!(f, "{n} modules are too many for the module list; give fewer with --initrd")
            }
            Self::RomSize(size) => write!(
                f,
                "a firmware image of {size} bytes cannot be mapped; it must be 64 KiB to 16 MiB, a multiple of 4 KiB"
            ),
        }
    }
}

impl std::error::Error for BootError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.problem {
            Problem::Read(e) => Some(e),
            _ => None,
        }
    }
}

impl From<BootError> for crate::run::Error {
    fn from(e: BootError) -> Self {
        crate::run::Error::Usage(e.to_string())
    }
}
