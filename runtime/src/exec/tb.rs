//! The store of translation blocks: found by physical address and key bits, dropped when their bytes change.
//!
//! Place in the pipeline: between the dispatcher and the tiers. Invariants: a live block is in `by_key`, in the page list of
//! every physical page its bytes lie in, and those pages are write-protected by the mmu; a dead block is in none of them, and
//! its id is not reused before the dispatcher has left it.

use hashbrown::HashMap;
use twofold_arch::{PAGE_MASK, PhysAddr, TbFlags};
use twofold_backend::InstalledTb;
use twofold_ir::eval::Program;

use super::region::{Region, RegionState};

/// Identifies a block in the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct TbId(pub u32);

/// What a block is found by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TbKey {
    /// Physical address of its first byte.
    pub pa: PhysAddr,
    /// The state that shaped it.
    pub flags: TbFlags,
}

/// How far a block has come through the tiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TierState {
    /// Run by the evaluator.
    Cold,
    /// Waiting for the compile thread; still run by the evaluator.
    Queued,
    /// Has host code.
    Compiled,
    /// The compiler refused it; stays in the evaluator.
    Refused,
}

/// Where a block led in the evaluator: a page offset and the block found there. To be checked before it is used.
pub type Successor = (u16, TbId);

/// A way out of a block that was taken while paths were recorded.
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    /// The block it leads to.
    pub to: TbId,
    /// That block's serial number then.
    pub serial: u64,
    /// The distance to its page, in bytes.
    pub page: i32,
    /// Times it was taken.
    pub count: u32,
}

/// A translation block. What the dispatcher looks at comes first, in as few cache lines as it fits.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Tb {
    /// What it is found by.
    pub key: TbKey,
    /// Guest instructions.
    pub insns: u16,
    /// Still in the store.
    pub live: bool,
    /// Where it is in its life.
    pub tier: TierState,
    /// Times the evaluator ran it.
    pub runs: u32,
    /// Its form for the evaluator; none when it came from the cache and has not been in the evaluator.
    pub program: Option<Box<Program>>,
    /// The last two places it led to in its page.
    pub successors: [Successor; 2],
    /// The physical page of its last byte, when that is another than the first's.
    pub second_page: Option<PhysAddr>,
    /// Its host code.
    pub code: Option<InstalledTb>,
    /// The region that it is the root of.
    pub region: Option<Box<Region>>,
    /// Where it is on its way there.
    pub region_state: RegionState,
    /// Times the budget ran out where it begins.
    pub samples: u32,
    /// The roots of the regions that it is a member of.
    pub in_regions: Vec<TbId>,
    /// Where it has been seen to lead.
    pub edges: Vec<Edge>,
    /// Bytes of guest code.
    pub len: u16,
    /// Distinguishes it from others that had its id.
    pub serial: u64,
    /// Linear RIP at its first translation, for people.
    pub rip: u64,
    /// Page offsets of its guest instructions, for exact RIPs after a fault.
    pub insn_offs: Box<[u16]>,
    /// Slots that were linked to this block: (block, slot).
    pub incoming: Vec<(TbId, u16)>,
    /// RIPs under which jump caches may hold it.
    pub cached_rips: Vec<u64>,
}

/// No successor known yet.
pub const NO_SUCCESSOR: Successor = (u16::MAX, TbId(0));

impl Tb {
    /// Its pages in a region, where the first is `page` bytes from the root's.
    pub fn pages(&self, page: i32) -> impl Iterator<Item = (i32, PhysAddr)> + Clone + use<> {
        let second = self.second_page.map(|pa| (page.wrapping_add(0x1000), pa));
        std::iter::once((page, self.key.pa.page())).chain(second)
    }

    /// Where its host code is entered.
    #[inline]
    #[must_use]
    pub fn entry(&self) -> Option<u64> {
        match &self.region {
            Some(region) => Some(region.code.entry),
            None => self.code.as_ref().map(|c| c.entry),
        }
    }
}

/// What led to a block that was taken out.
#[derive(Debug, Default)]
pub struct Removed {
    /// Slots that are linked to it.
    pub incoming: Vec<(TbId, u16)>,
    /// RIPs under which jump caches may hold it.
    pub cached_rips: Vec<u64>,
}

/// Blocks in a chunk of the store.
const CHUNK: usize = 256;
/// log2 of the entries of the front table: at first, and at most.
const FRONT_BITS: std::ops::RangeInclusive<u32> = 14..=20;

/// A block by the hash of its key: physical address + 1 (0: nothing), key bits, id, and the host code that may be entered without
/// looking at anything else, or 0.
type FrontEntry = [u64; 4];

/// All translation blocks of a machine.
pub struct TbStore {
    /// By number, [`CHUNK`] to a chunk: blocks stay where they are.
    slab: Vec<Vec<Tb>>,
    by_key: HashMap<TbKey, TbId>,
    by_page: HashMap<u64, Vec<TbId>>,
    /// What was found last, a power of two of entries: at least twice as many as there are blocks, up to the most.
    front: Box<[FrontEntry]>,
    /// Slab places whose blocks died and may be reused.
    free: Vec<TbId>,
    /// Slab places whose blocks died since the dispatcher was last between blocks.
    dying: Vec<TbId>,
    live: usize,
}

impl Default for TbStore {
    fn default() -> Self {
        Self {
            slab: Vec::new(),
            by_key: HashMap::new(),
            by_page: HashMap::new(),
            front: front(*FRONT_BITS.start()),
            free: Vec::new(),
            dying: Vec::new(),
            live: 0,
        }
    }
}

/// An empty front table.
fn front(bits: u32) -> Box<[FrontEntry]> {
    vec![[0; 4]; 1 << bits].into_boxed_slice()
}

/// The place of a key among so many, a power of two. The blocks of a page have places near one another, and four bytes share one:
/// few blocks are shorter.
#[inline]
fn front_index(len: usize, key: TbKey) -> usize {
    let page = (key.pa.0 >> 12 ^ u64::from(key.flags.0) << 36).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (page >> 32 ^ (key.pa.0 & 0xfff) >> 2) as usize & (len - 1)
}

impl TbStore {
    /// Live blocks.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live
    }
    /// The block `id`.
    #[inline]
    #[must_use]
    pub fn get(&self, id: TbId) -> &Tb {
        &self.slab[id.0 as usize / CHUNK][id.0 as usize % CHUNK]
    }
    /// The block `id`, to change.
    #[inline]
    pub fn get_mut(&mut self, id: TbId) -> &mut Tb {
        &mut self.slab[id.0 as usize / CHUNK][id.0 as usize % CHUNK]
    }
    /// Every live block.
    pub fn iter(&self) -> impl Iterator<Item = (TbId, &Tb)> {
        self.slab.iter().flatten().enumerate().filter(|(_, t)| t.live).map(|(i, t)| (TbId(i as u32), t))
    }

    /// Finds a block by key.
    #[inline]
    pub fn find(&mut self, key: TbKey) -> Option<TbId> {
        self.find_entry(key).map(|e| TbId(e[2] as u32))
    }

    /// The host code of a block that lies in one page.
    #[inline]
    pub fn find_code(&mut self, key: TbKey) -> Option<u64> {
        self.find_entry(key).map(|e| e[3]).filter(|&code| code != 0)
    }

    #[inline]
    fn find_entry(&mut self, key: TbKey) -> Option<FrontEntry> {
        let i = front_index(self.front.len(), key);
        let e = self.front[i];
        if e[0] == key.pa.0.wrapping_add(1) && e[1] == u64::from(key.flags.0) {
            return Some(e);
        }
        let id = *self.by_key.get(&key)?;
        Some(self.remember(i, id))
    }

    /// Puts block `id` in place `i` of the front.
    fn remember(&mut self, i: usize, id: TbId) -> FrontEntry {
        let tb = self.get(id);
        let code = if tb.second_page.is_none() { tb.entry() } else { None };
        let e = [tb.key.pa.0.wrapping_add(1), tb.key.flags.0.into(), id.0.into(), code.unwrap_or(0)];
        self.front[i] = e;
        e
    }

    /// Block `id` is to be entered elsewhere from now on, or not at all.
    pub fn entry_changed(&mut self, id: TbId) {
        let tb = self.get(id);
        let i = front_index(self.front.len(), tb.key);
        if tb.live {
            self.remember(i, id);
        } else if self.front[i][2] == u64::from(id.0) {
            self.front[i] = [0; 4];
        }
    }

    /// Adds a block.
    pub fn insert(&mut self, tb: Tb) -> TbId {
        let (key, second) = (tb.key, tb.second_page);
        let id = match self.free.pop() {
            Some(id) => {
                *self.get_mut(id) = tb;
                id
            }
            None => self.append(tb),
        };
        self.live += 1;
        if self.live * 2 > self.front.len() && self.front.len() < 1 << FRONT_BITS.end() {
            self.front = front(self.front.len().ilog2() + 1);
        }
        self.by_key.insert(key, id);
        self.by_page.entry(key.pa.0 & PAGE_MASK).or_default().push(id);
        if let Some(p) = second {
            self.by_page.entry(p.0).or_default().push(id);
        }
        id
    }

    fn append(&mut self, tb: Tb) -> TbId {
        if self.slab.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.slab.push(Vec::with_capacity(CHUNK));
        }
        let full = (self.slab.len() - 1) * CHUNK;
        let chunk = &mut self.slab[full / CHUNK];
        chunk.push(tb);
        TbId((full + chunk.len() - 1) as u32)
    }

    /// The block with this key, if there is one.
    #[must_use]
    pub fn peek(&self, key: TbKey) -> Option<TbId> {
        self.by_key.get(&key).copied()
    }

    /// Gives block `id` host code.
    pub fn set_code(&mut self, id: TbId, code: InstalledTb) {
        let tb = self.get_mut(id);
        tb.code = Some(code);
        tb.tier = TierState::Compiled;
        self.entry_changed(id);
    }

    /// Ids of the blocks with bytes in `[pa, pa + len)`, which must not cross a page.
    pub fn touching(&self, pa: PhysAddr, len: u64) -> Vec<TbId> {
        let Some(list) = self.by_page.get(&(pa.0 & PAGE_MASK)) else { return Vec::new() };
        let (lo, hi) = (pa.0, pa.0 + len);
        let hit = |id: &TbId| {
            let tb = self.get(*id);
            let first = tb.key.pa.0;
            let in_first = first < hi && (first + u64::from(tb.len)).min((first & PAGE_MASK) + 0x1000) > lo;
            let in_second = tb.second_page.is_some_and(|p| {
                let end = p.0 + ((first + u64::from(tb.len)) & !PAGE_MASK);
                p.0 < hi && end > lo
            });
            in_first || in_second
        };
        list.iter().copied().filter(hit).collect()
    }

    /// Takes a block out. The caller unlinks the slots that lead to it and takes it out of the jump caches.
    pub fn remove(&mut self, id: TbId) -> Removed {
        if !self.get(id).live {
            return Removed::default();
        }
        self.live -= 1;
        let tb = self.get_mut(id);
        tb.live = false;
        tb.code = None;
        let (key, second) = (tb.key, tb.second_page);
        let removed =
            Removed { incoming: std::mem::take(&mut tb.incoming), cached_rips: std::mem::take(&mut tb.cached_rips) };
        self.by_key.remove(&key);
        self.entry_changed(id);
        for page in [Some(PhysAddr(key.pa.0 & PAGE_MASK)), second].into_iter().flatten() {
            if let Some(list) = self.by_page.get_mut(&page.0) {
                list.retain(|&x| x != id);
                if list.is_empty() {
                    self.by_page.remove(&page.0);
                }
            }
        }
        self.dying.push(id);
        removed
    }

    /// Says that no block is being run: places of dead blocks may be used again.
    pub fn quiescent(&mut self) {
        self.free.append(&mut self.dying);
    }

    /// Whether blocks died since the last [`TbStore::quiescent`].
    #[must_use]
    pub fn has_dying(&self) -> bool {
        !self.dying.is_empty()
    }
}
