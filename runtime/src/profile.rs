//! `--perf`: what `perf` is told of translated code, with names of guest functions.
//!
//! Place in the pipeline: the compile queue tells it of every block it installs; the run ends it. The kernel's symbols are
//! not there yet when its first blocks are compiled, so names are made as late as possible: a map at the end of the run; a
//! dump, which keeps the time of each installation, at the end or when much code has come together.
//!
//! Invariant: what is noted here never changes what runs; a file that cannot be written ends the profile, not the guest.

use std::collections::BTreeMap;
use std::path::PathBuf;

use twofold_backend::perf::{Profile, ProfileKind, timestamp};
use twofold_backend::{CodeMemory, InstalledTb};

use crate::config::PerfMode;
use crate::symbols::Symbols;
use crate::vcpu::Vcpu;

/// Bytes of code that wait for their names before a dump is written in between.
const MOST_CODE: usize = 64 << 20;
/// Blocks that wait for the end of the run; of more, the older half is forgotten.
const MOST_BLOCKS: usize = 4 << 20;

/// A piece of host code.
struct Piece {
    /// When it came, for a dump.
    at: u64,
    start: u64,
    len: u32,
    /// Its bytes, for a dump.
    code: Vec<u8>,
    what: What,
}

enum What {
    /// A thunk of this name.
    Thunk(String),
    /// The block of the guest code at this address, or the region that begins there; its tier.
    Block(u64, &'static str),
}

/// A profile that is being gathered.
pub struct PerfLog {
    kind: PerfMode,
    out: Profile,
    pieces: Vec<Piece>,
    code: usize,
    /// Names for guest addresses.
    pub symbols: Symbols,
    failed: Option<std::io::Error>,
}

impl PerfLog {
    /// Begins a profile; with the names of the thunks in `memory`.
    ///
    /// # Errors
    /// When its file cannot be created.
    pub fn create(kind: PerfMode, symbols: Symbols, memory: Option<&CodeMemory>) -> std::io::Result<Self> {
        let out = Profile::create(match kind {
            PerfMode::Map => ProfileKind::Map,
            PerfMode::Jitdump => ProfileKind::Jitdump,
        })?;
        let mut log = Self { kind, out, pieces: Vec::new(), code: 0, symbols, failed: None };
        if let Some(memory) = memory {
            let mut thunks = memory.thunk_symbols();
            thunks.sort();
            thunks.dedup_by_key(|t| t.0);
            let ends: Vec<u64> = thunks.iter().skip(1).map(|t| t.0).collect();
            for (i, (start, name)) in thunks.into_iter().enumerate() {
                // The last one has no successor to end at.
                let end = ends.get(i).copied().unwrap_or(start + 64);
                log.note(memory, start..end, What::Thunk(name));
            }
        }
        Ok(log)
    }

    fn note(&mut self, memory: &CodeMemory, code: std::ops::Range<u64>, what: What) {
        let len = (code.end - code.start) as u32;
        let start = code.start;
        let bytes = if self.kind == PerfMode::Jitdump { memory.bytes(code) } else { Vec::new() };
        self.code += bytes.len();
        if self.pieces.len() >= MOST_BLOCKS {
            self.pieces.drain(..MOST_BLOCKS / 2);
        }
        self.pieces.push(Piece { at: timestamp(), start, len, code: bytes, what });
    }

    /// Notes a block or region that has been installed in `memory`. True when it is time for [`PerfLog::write`].
    pub fn installed(&mut self, memory: &CodeMemory, tb: &InstalledTb, rip: u64, tier: &'static str) -> bool {
        self.note(memory, tb.code.clone(), What::Block(rip, tier));
        self.code >= MOST_CODE
    }

    /// Writes what has come together; `vcpu` is asked for symbols.
    pub fn write(&mut self, vcpu: &Vcpu) {
        self.symbols.resolve(vcpu);
        self.code = 0;
        let pieces = std::mem::take(&mut self.pieces);
        let result = match self.kind {
            PerfMode::Jitdump => pieces.iter().try_for_each(|p| self.add(p)),
            // Code memory may have been used again: the last block at a place has it.
            PerfMode::Map => last_of_each(&pieces).into_iter().try_for_each(|p| self.add(p)),
        };
        if let Err(e) = result.and_then(|()| self.out.flush()) {
            self.failed.get_or_insert(e);
        }
    }

    fn add(&mut self, p: &Piece) -> std::io::Result<()> {
        let name = match &p.what {
            What::Thunk(name) => format!("twofold:{name}"),
            What::Block(rip, tier) => match self.symbols.name(*rip) {
                Some(name) => format!("guest:{name} [{tier}]"),
                None => format!("guest:{rip:#x} [{tier}]"),
            },
        };
        self.out.add_at(p.at, p.start, p.len, &p.code, &name)
    }

    /// Ends the profile: where it is, and the symbols that were found for it.
    ///
    /// # Errors
    /// When something could not be written.
    pub fn finish(mut self, vcpu: &Vcpu) -> (std::io::Result<PathBuf>, Symbols) {
        self.write(vcpu);
        let path = self.out.path().to_owned();
        (self.failed.map_or(Ok(path), Err), self.symbols)
    }
}

/// The pieces that no later one lies over, by address.
fn last_of_each(pieces: &[Piece]) -> Vec<&Piece> {
    let mut by_start: BTreeMap<u64, &Piece> = BTreeMap::new();
    for p in pieces.iter().rev() {
        let end = p.start + u64::from(p.len);
        let before = by_start.range(..end).next_back();
        if before.is_none_or(|(_, b)| b.start + u64::from(b.len) <= p.start) {
            by_start.insert(p.start, p);
        }
    }
    by_start.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_at_a_place_has_it() {
        let piece = |start, len, rip| Piece { at: 0, start, len, code: Vec::new(), what: What::Block(rip, "quick") };
        let pieces = [piece(0x100, 0x40, 1), piece(0x140, 0x20, 2), piece(0x160, 0x20, 3), piece(0x120, 0x30, 4)];
        let left: Vec<u64> =
            last_of_each(&pieces).iter().map(|p| if let What::Block(rip, _) = p.what { rip } else { 0 }).collect();
        assert_eq!(left, [4, 3]);
    }
}
