//! The persistent translation cache (`--code-cache DIR`): compiled blocks of earlier runs, found by the bytes they were made of.
//!
//! Place in the pipeline: in front of the front end. A block that is in the cache starts with its host code: nothing is decoded,
//! interpreted or compiled. What the compile thread makes is added, and goes into the file when the run ends.
//!
//! An entry holds all that its translation depended on besides the identity of the file: key bits, page offset and the block's
//! bytes, which are compared, not hashed. The file's identity is this build of the program, the host's instructions and the CPU
//! model's features.
//!
//! A file is a head that names its identity and segments, one for each run that added something, with a checksum each. A run appends
//! its segment with one write; a file that is damaged, foreign or too large is replaced as a whole by renaming. So runs need no lock
//! among each other.
//!
//! Invariants: what does not check out is not used, with one warning; whatever an entry holds, installing it writes nowhere but
//! to its own place. (Whoever can write to DIR can run code as us all the same.)

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use hashbrown::HashMap;
use twofold_arch::TbFlags;
use twofold_arch::cpuid::Features;
use twofold_backend::CompiledTb;

const MAGIC: &[u8; 16] = b"twofold-code/1\r\n";
/// Bytes by which an entry is found before all of its bytes are compared.
const PREFIX: usize = 16;
/// A larger file is made anew of what this run used.
const MAX_FILE: usize = 256 << 20;
/// Bytes of a segment before its entries.
const SEGMENT: usize = 16;
const NONE: u32 = u32::MAX;

/// A block as it is found in the cache.
#[derive(Debug)]
pub struct Cached {
    /// Page offsets of its guest instructions.
    pub insn_offs: Box<[u16]>,
    /// Bytes of guest code.
    pub len: u16,
    /// Its host code.
    pub code: CompiledTb,
}

/// What identifies a block before it is translated.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its key bits.
    pub flags: TbFlags,
    /// Its page offset.
    pub off: u16,
    /// The bytes from there on, to the page's end or as many as a block can have.
    pub bytes: &'a [u8],
}

/// An entry's head, as it lies in the file. The bytes, the instructions' offsets and the host code follow.
struct Head {
    total: usize,
    flags: u32,
    off: u16,
    /// Bytes of the block.
    len: u16,
    /// Bytes that must be the same.
    guard: u16,
    insns: u16,
}

const HEAD: usize = 16;

impl Head {
    fn read(bytes: &[u8]) -> Option<Self> {
        let h: &[u8; HEAD] = bytes.get(..HEAD)?.try_into().ok()?;
        let u16_at = |i: usize| u16::from_le_bytes([h[i], h[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
        let head = Self {
            total: u32_at(0) as usize,
            flags: u32_at(4),
            off: u16_at(8),
            len: u16_at(10),
            guard: u16_at(12),
            insns: u16_at(14),
        };
        let least = HEAD + usize::from(head.guard) + 2 * usize::from(head.insns);
        let in_page = usize::from(head.off) + usize::from(head.guard) <= 0x1000;
        let good = head.total >= least && head.total <= bytes.len() && in_page && head.len <= head.guard;
        (good && head.insns != 0 && head.len != 0).then_some(head)
    }
}

fn hash(seed: u64, bytes: &[u8]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut chunks = bytes.chunks_exact(8);
    let step = |h: u64, w: u64| {
        let wide = u128::from(h ^ w) * u128::from(K);
        (wide as u64) ^ (wide >> 64) as u64
    };
    let h = chunks.by_ref().fold(seed ^ K, |h, c| step(h, u64::from_le_bytes(c.try_into().unwrap_or_default())));
    let mut last = [0; 8];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    step(step(h, u64::from_le_bytes(last)), bytes.len() as u64)
}

/// By what entries are found: key bits, offset and the first bytes.
fn find_by(flags: u32, off: u16, bytes: &[u8]) -> u64 {
    hash(u64::from(flags) << 16 | u64::from(off), &bytes[..bytes.len().min(PREFIX)])
}

/// How many bytes are compared for a block of `len`.
#[must_use]
pub fn wanted(len: u16) -> usize {
    usize::from(len).max(PREFIX)
}

#[derive(Clone, Copy)]
struct Place {
    /// Where in `file` or, from its end on, in `fresh`.
    at: u32,
    /// The next with the same prefix.
    next: u32,
    used: bool,
}

/// Counters of the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheStats {
    /// Entries when the run began.
    pub loaded: u64,
    /// Blocks that were found.
    pub hits: u64,
    /// Blocks that were not.
    pub misses: u64,
    /// Entries added.
    pub added: u64,
}

/// The cache of one run.
pub struct CodeCache {
    path: PathBuf,
    /// What a file of ours begins with.
    head: Vec<u8>,
    file: Vec<u8>,
    /// The file is to be replaced, not added to.
    replace: bool,
    /// Entries of this run.
    fresh: Vec<u8>,
    places: Vec<Place>,
    heads: HashMap<u64, u32>,
    stats: CacheStats,
}

impl std::fmt::Debug for CodeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeCache").field("path", &self.path).field("stats", &self.stats).finish_non_exhaustive()
    }
}

/// This build, this host, this CPU model.
fn identity(features: Features) -> String {
    let exe = std::env::current_exe().and_then(std::fs::metadata).ok();
    let (size, time) = exe.map_or((0, 0), |m| {
        let time = m.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        (m.len(), time.map_or(0, |t| t.as_nanos()))
    });
    let (version, host) = (env!("CARGO_PKG_VERSION"), twofold_backend::host_instructions());
    format!("twofold {version} {size} {time}; host {host}; model {:x}", features.0)
}

impl CodeCache {
    /// Opens the cache in `dir`, which is made if it is not there. A file that cannot be used is a warning.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(dir: &Path, features: Features) -> std::io::Result<(Self, Option<String>)> {
        std::fs::create_dir_all(dir)?;
        let identity = identity(features);
        let path = dir.join(format!("{:016x}.code", hash(0, identity.as_bytes())));
        let head = [&MAGIC[..], &(identity.len() as u32).to_le_bytes(), identity.as_bytes()].concat();
        let mut cache = Self {
            path,
            head,
            file: Vec::new(),
            replace: true,
            fresh: Vec::new(),
            places: Vec::new(),
            heads: HashMap::new(),
            stats: CacheStats::default(),
        };
        let warning = match std::fs::read(&cache.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => Some(e.to_string()),
            Ok(file) => {
                cache.file = file;
                cache.take().err().map(str::to_owned)
            }
        };
        cache.replace = warning.is_some() || cache.file.is_empty();
        let warning = warning.map(|why| format!("code cache {}: {why}", cache.path.display()));
        Ok((cache, warning))
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        self.stats
    }

    /// Takes in the segments of the file, up to the first that is not whole.
    fn take(&mut self) -> Result<(), &'static str> {
        let file = std::mem::take(&mut self.file);
        if file.len() > 2 * MAX_FILE {
            return Err("too large; it is made anew");
        }
        if !file.starts_with(MAGIC) {
            return Err("not a code cache; it is made anew");
        }
        if !file.starts_with(&self.head) {
            return Err("cut short, or made by another build or for another host; it is made anew");
        }
        let mut at = self.head.len();
        self.places.reserve(file.len() / 512);
        let mut outcome = Ok(());
        while at < file.len() {
            let Some(end) = self.take_segment(&file, at) else {
                outcome = Err("damaged or cut short; what is good of it is used");
                break;
            };
            at = end;
        }
        self.file = file;
        self.file.truncate(at);
        self.stats.loaded = self.places.len() as u64;
        outcome
    }

    /// Takes in the segment at `at`; where the next begins.
    fn take_segment(&mut self, file: &[u8], at: usize) -> Option<usize> {
        let (len, rest) = file[at..].split_first_chunk::<8>()?;
        let (sum, rest) = rest.split_first_chunk::<8>()?;
        let segment = rest.get(..usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        if u64::from_le_bytes(*sum) != hash(1, segment) {
            return None;
        }
        let start = at + SEGMENT;
        let mut at = 0;
        while at < segment.len() {
            let head = Head::read(&segment[at..])?;
            let bytes = &segment[at + HEAD..][..usize::from(head.guard)];
            self.index(find_by(head.flags, head.off, bytes), (start + at) as u32);
            at += head.total;
        }
        Some(start + segment.len())
    }

    fn index(&mut self, key: u64, at: u32) {
        let number = self.places.len() as u32;
        let next = self.heads.insert(key, number).unwrap_or(NONE);
        self.places.push(Place { at, next, used: false });
    }

    fn at(&self, at: u32) -> &[u8] {
        let at = at as usize;
        match at.checked_sub(self.file.len()) {
            Some(fresh) => &self.fresh[fresh..],
            None => &self.file[at..],
        }
    }

    fn place_of(&self, source: Source) -> Option<(usize, Head)> {
        let mut number = *self.heads.get(&find_by(source.flags.0, source.off, source.bytes))?;
        while let Some(place) = self.places.get(number as usize) {
            let entry = self.at(place.at);
            if let Some(head) = Head::read(entry)
                && (head.flags, head.off) == (source.flags.0, source.off)
                && source.bytes.get(..usize::from(head.guard)) == Some(&entry[HEAD..][..usize::from(head.guard)])
            {
                return Some((number as usize, head));
            }
            number = place.next;
        }
        None
    }

    /// The block that begins with these bytes.
    pub fn find(&mut self, source: Source) -> Option<Cached> {
        let Some((number, head)) = self.place_of(source) else {
            self.stats.misses += 1;
            return None;
        };
        let entry = &self.at(self.places[number].at)[..head.total];
        let offs = &entry[HEAD + usize::from(head.guard)..];
        let (offs, code) = offs.split_at(2 * usize::from(head.insns));
        let code = CompiledTb::load(code)?;
        let insn_offs = offs.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
        self.places[number].used = true;
        self.stats.hits += 1;
        Some(Cached { insn_offs, len: head.len, code })
    }

    /// Keeps a block of `len` bytes at the start of `source`, which lies in one page.
    pub fn add(&mut self, source: Source, len: u16, insn_offs: &[u16], code: &CompiledTb) {
        let guard = wanted(len).min(source.bytes.len());
        let source = Source { bytes: &source.bytes[..guard], ..source };
        if usize::from(len) > guard || self.file.len() + self.fresh.len() > MAX_FILE || self.place_of(source).is_some()
        {
            return;
        }
        let start = self.fresh.len();
        self.fresh.extend([0; HEAD]);
        self.fresh.extend(source.bytes);
        insn_offs.iter().for_each(|o| self.fresh.extend(o.to_le_bytes()));
        if !code.store(&mut self.fresh) {
            self.fresh.truncate(start);
            return;
        }
        let total = (self.fresh.len() - start) as u32;
        let head = &mut self.fresh[start..start + HEAD];
        head[..4].copy_from_slice(&total.to_le_bytes());
        head[4..8].copy_from_slice(&source.flags.0.to_le_bytes());
        for (i, field) in [source.off, len, guard as u16, insn_offs.len() as u16].into_iter().enumerate() {
            head[8 + 2 * i..][..2].copy_from_slice(&field.to_le_bytes());
        }
        self.index(find_by(source.flags.0, source.off, source.bytes), (self.file.len() + start) as u32);
        if let Some(place) = self.places.last_mut() {
            place.used = true;
        }
        self.stats.added += 1;
    }

    /// Writes what is new, if there is anything.
    ///
    /// # Errors
    /// When the file cannot be written. One that was to be replaced is then as it was.
    pub fn save(&mut self) -> std::io::Result<()> {
        // A file that was damaged is made good even if nothing is new.
        if self.stats.added == 0 && !(self.replace && self.stats.loaded != 0) {
            return Ok(());
        }
        if !self.replace && self.file.len() + self.fresh.len() <= MAX_FILE {
            return self.append();
        }
        // Into a new file goes what this run used.
        let used = self.places.iter().filter(|p| p.used).map(|p| self.at(p.at));
        let payload: Vec<&[u8]> = used.filter_map(|e| e.get(..Head::read(e)?.total)).collect();
        let bytes = [&self.head[..], &segment(&payload.concat())].concat();
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options.open(&temporary).and_then(|mut file| file.write_all(&bytes));
        let written = written.and_then(|()| std::fs::rename(&temporary, &self.path));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    /// Adds a segment to the file, with one write so that another run's does not come between.
    fn append(&self) -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new().read(true).append(true).open(&self.path)?;
        let mut head = vec![0; self.head.len()];
        file.read_exact(&mut head)?;
        if head != self.head {
            return Err(std::io::Error::other("it has become another file"));
        }
        file.write_all(&segment(&self.fresh))
    }
}

/// A segment of these entries.
fn segment(entries: &[u8]) -> Vec<u8> {
    [&(entries.len() as u64).to_le_bytes()[..], &hash(1, entries).to_le_bytes(), entries].concat()
}
