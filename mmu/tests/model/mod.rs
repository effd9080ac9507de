//! A second, slow model of the page walk, written from the SDM (Vol 3A, "Paging") and sharing no code with the crate.
//!
//! It reads entries a byte at a time, checks reserved bits one bit at a time from the SDM's tables of entry formats, and
//! spells out the access-rights lists as the manual does. Clarity over speed.
#![allow(dead_code)] // Each test program uses its own part.

pub mod two_stage;

/// Guest-physical memory; absent bytes read as all ones and drop writes.
#[derive(Clone, PartialEq, Eq)]
pub struct Memory(pub Vec<u8>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({} bytes)", self.0.len())
    }
}

impl Memory {
    pub fn read(&self, at: u64, bytes: u64) -> u64 {
        (0..bytes).fold(0, |v, i| v | u64::from(*self.0.get((at + i) as usize).unwrap_or(&0xff)) << (8 * i))
    }
    pub fn write(&mut self, at: u64, bytes: u64, value: u64) {
        for i in 0..bytes {
            if let Some(b) = self.0.get_mut((at + i) as usize) {
                *b = (value >> (8 * i)) as u8;
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    None,
    ThirtyTwo,
    Pae,
    Four,
    Five,
}

/// The registers that paging reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    pub mode: Mode,
    pub cr3: u64,
    pub pdptes: [u64; 4],
    pub wp: bool,
    pub pse: bool,
    pub pge: bool,
    pub smep: bool,
    pub smap: bool,
    pub pke: bool,
    pub pks: bool,
    pub nxe: bool,
    pub pkru: u32,
    pub pkrs: u32,
    pub maxphyaddr: u32,
    pub page1gb: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Fetch,
}

/// Who makes the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// User-mode access.
    User,
    /// Explicit supervisor-mode access with this EFLAGS.AC.
    Explicit { ac: bool },
    /// Implicit supervisor-mode access.
    Implicit,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub pa: u64,
    /// log2 of the page size.
    pub size: u32,
    pub global: bool,
    pub dirty: bool,
    pub pat: u64,
}

fn bit(v: u64, n: u32) -> bool {
    v >> n & 1 == 1
}

/// What kind of entry, by the SDM's figure of formats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Pde32Table,
    Pde32Page,
    Pte32,
    PaePdeTable,
    PaePdePage,
    PaePte,
    Pml5e,
    Pml4e,
    PdpteTable,
    PdptePage,
    PdeTable,
    PdePage,
    Pte,
}

/// Whether bit `n` of an entry of this format is reserved.
fn reserved(cpu: &Cpu, f: Format, n: u32) -> bool {
    use Format::*;
    let m = cpu.maxphyaddr;
    match f {
        Pde32Table | Pte32 => false,
        // Bits (M–20):13 are address bits, bits 21:(M–19) are reserved, M being at most 40.
        Pde32Page => n <= 21 && n >= m.min(40) - 19,
        PaePdeTable | PaePte => (n >= m && n <= 62) || (n == 63 && !cpu.nxe),
        PaePdePage => (13..=20).contains(&n) || (n >= m && n <= 62) || (n == 63 && !cpu.nxe),
        Pml5e | Pml4e => n == 7 || (n >= m && n <= 51) || (n == 63 && !cpu.nxe),
        PdpteTable => (n == 7 && !cpu.page1gb) || (n >= m && n <= 51) || (n == 63 && !cpu.nxe),
        PdptePage => (13..=29).contains(&n) || (n >= m && n <= 51) || (n == 63 && !cpu.nxe),
        PdeTable | Pte => (n >= m && n <= 51) || (n == 63 && !cpu.nxe),
        PdePage => (13..=20).contains(&n) || (n >= m && n <= 51) || (n == 63 && !cpu.nxe),
    }
}

fn any_reserved(cpu: &Cpu, f: Format, entry: u64) -> bool {
    (0..64).any(|n| bit(entry, n) && reserved(cpu, f, n))
}

/// An entry that took part in a translation.
#[derive(Clone, Copy)]
struct Used {
    at: u64,
    bytes: u64,
    entry: u64,
}

struct Chain {
    used: Vec<Used>,
    base: u64,
    size: u32,
    pat_bit: u32,
}

enum Stop {
    NotPresent,
    Reserved,
    /// The second stage did not let the entry be read.
    SecondStage(two_stage::Refused),
}

/// Follows the paging structures for `la` without looking at access rights.
fn follow(cpu: &Cpu, mem: &Memory, la: u64) -> Result<Chain, Stop> {
    follow_by(cpu, &mut |at, bytes| Ok(mem.read(at, bytes)), la)
}

/// Reads an entry at a guest-physical address, of so many bytes.
type Reader<'a> = &'a mut dyn FnMut(u64, u64) -> Result<u64, two_stage::Refused>;

/// As [`follow`], with entries read by `read`.
fn follow_by(cpu: &Cpu, read: Reader<'_>, la: u64) -> Result<Chain, Stop> {
    let mut used = Vec::new();
    let mut take = |at: u64, bytes: u64, format: &dyn Fn(u64) -> Format| -> Result<(u64, Format), Stop> {
        let entry = read(at, bytes).map_err(Stop::SecondStage)?;
        if !bit(entry, 0) {
            return Err(Stop::NotPresent);
        }
        let f = format(entry);
        if any_reserved(cpu, f, entry) {
            return Err(Stop::Reserved);
        }
        used.push(Used { at, bytes, entry });
        Ok((entry, f))
    };
    let field = |hi: u32, lo: u32| (la >> lo) & ((1 << (hi - lo + 1)) - 1);
    let address = |e: u64, lo: u32| (e & ((1 << 52) - 1)) >> lo << lo;
    let (base, size, pat_bit);
    match cpu.mode {
        Mode::None => unreachable!("no paging"),
        Mode::ThirtyTwo => {
            let format = |e| if cpu.pse && bit(e, 7) { Format::Pde32Page } else { Format::Pde32Table };
            let (pde, f) = take((cpu.cr3 & 0xffff_f000) + 4 * field(31, 22), 4, &format)?;
            if f == Format::Pde32Page {
                // Address bits 39:32 come from bits 20:13, 31:22 from the same bits.
                (base, size, pat_bit) = (((pde >> 13 & 0xff) << 32) + (pde >> 22 << 22), 22, 12);
            } else {
                let (pte, _) = take((pde >> 12 << 12) + 4 * field(21, 12), 4, &|_| Format::Pte32)?;
                (base, size, pat_bit) = (pte >> 12 << 12, 12, 7);
            }
        }
        Mode::Pae => {
            let pdpte = cpu.pdptes[field(31, 30) as usize];
            if !bit(pdpte, 0) {
                return Err(Stop::NotPresent);
            }
            let format = |e| if bit(e, 7) { Format::PaePdePage } else { Format::PaePdeTable };
            let (pde, f) = take(address(pdpte, 12) + 8 * field(29, 21), 8, &format)?;
            if f == Format::PaePdePage {
                (base, size, pat_bit) = (address(pde, 21), 21, 12);
            } else {
                let (pte, _) = take(address(pde, 12) + 8 * field(20, 12), 8, &|_| Format::PaePte)?;
                (base, size, pat_bit) = (address(pte, 12), 12, 7);
            }
        }
        Mode::Four | Mode::Five => {
            let mut table = address(cpu.cr3, 12);
            if cpu.mode == Mode::Five {
                let (e, _) = take(table + 8 * field(56, 48), 8, &|_| Format::Pml5e)?;
                table = address(e, 12);
            }
            let (e, _) = take(table + 8 * field(47, 39), 8, &|_| Format::Pml4e)?;
            let format = |e| if cpu.page1gb && bit(e, 7) { Format::PdptePage } else { Format::PdpteTable };
            let (e, f) = take(address(e, 12) + 8 * field(38, 30), 8, &format)?;
            if f == Format::PdptePage {
                (base, size, pat_bit) = (address(e, 30), 30, 12);
            } else {
                let format = |e| if bit(e, 7) { Format::PdePage } else { Format::PdeTable };
                let (e, f) = take(address(e, 12) + 8 * field(29, 21), 8, &format)?;
                if f == Format::PdePage {
                    (base, size, pat_bit) = (address(e, 21), 21, 12);
                } else {
                    let (e, _) = take(address(e, 12) + 8 * field(20, 12), 8, &|_| Format::Pte)?;
                    (base, size, pat_bit) = (address(e, 12), 12, 7);
                }
            }
        }
    }
    Ok(Chain { used, base, size, pat_bit })
}

/// What the rights in the paging structures say of one translation.
#[derive(Clone, Copy)]
pub struct Page {
    pub user_mode_address: bool,
    pub writable: bool,
    pub execute_disabled: bool,
    pub key: u32,
}

/// Whether the protection key forbids a data access to `page`.
fn key_forbids(cpu: &Cpu, page: Page, op: Op, who: Who) -> bool {
    let long = matches!(cpu.mode, Mode::Four | Mode::Five);
    let register = match (page.user_mode_address, cpu.pke, cpu.pks) {
        (true, true, _) => cpu.pkru,
        (false, _, true) => cpu.pkrs,
        _ => return false,
    };
    if !long || op == Op::Fetch {
        return false;
    }
    let ad = bit(u64::from(register), 2 * page.key);
    let wd = bit(u64::from(register), 2 * page.key + 1);
    ad || (wd && op == Op::Write && (cpu.wp || who == Who::User))
}

/// The list in "Determination of Access Rights", item by item.
pub fn allowed(cpu: &Cpu, page: Page, op: Op, who: Who) -> bool {
    if op != Op::Fetch && key_forbids(cpu, page, op, who) {
        return false;
    }
    match (who, page.user_mode_address, op) {
        // Supervisor-mode accesses to supervisor-mode addresses.
        (Who::Explicit { .. } | Who::Implicit, false, Op::Read) => true,
        (Who::Explicit { .. } | Who::Implicit, false, Op::Write) => {
            if cpu.wp {
                page.writable
            } else {
                true
            }
        }
        (Who::Explicit { .. } | Who::Implicit, false, Op::Fetch) => {
            // For 32-bit paging or if EFER.NXE = 0: any supervisor-mode address.
            !(cpu.nxe && cpu.mode != Mode::ThirtyTwo && page.execute_disabled)
        }
        // Supervisor-mode accesses to user-mode addresses.
        (Who::Explicit { ac }, true, Op::Read) => !cpu.smap || ac,
        (Who::Implicit, true, Op::Read) => !cpu.smap,
        (Who::Explicit { ac }, true, Op::Write) => (!cpu.smap || ac) && (!cpu.wp || page.writable),
        (Who::Implicit, true, Op::Write) => !cpu.smap && (!cpu.wp || page.writable),
        (Who::Explicit { .. } | Who::Implicit, true, Op::Fetch) => {
            if cpu.smep {
                false
            } else {
                !(cpu.nxe && cpu.mode != Mode::ThirtyTwo && page.execute_disabled)
            }
        }
        // User-mode accesses.
        (Who::User, false, _) => false,
        (Who::User, true, Op::Read) => true,
        (Who::User, true, Op::Write) => page.writable,
        (Who::User, true, Op::Fetch) => !(cpu.nxe && cpu.mode != Mode::ThirtyTwo && page.execute_disabled),
    }
}

fn page_of(cpu: &Cpu, chain: &Chain) -> Page {
    let leaf = chain.used[chain.used.len() - 1].entry;
    Page {
        user_mode_address: chain.used.iter().all(|u| bit(u.entry, 2)),
        writable: chain.used.iter().all(|u| bit(u.entry, 1)),
        execute_disabled: chain.used.iter().any(|u| bit(u.entry, 63)),
        key: if matches!(cpu.mode, Mode::Four | Mode::Five) { (leaf >> 59 & 15) as u32 } else { 0 },
    }
}

/// Page-fault error code, from the description of each bit.
fn error_code(cpu: &Cpu, present: bool, reserved: bool, op: Op, who: Who, key: bool) -> u32 {
    let pae_like = cpu.mode != Mode::ThirtyTwo;
    let mut e = 0;
    if present {
        e |= 1;
    }
    if op == Op::Write {
        e |= 2;
    }
    if who == Who::User {
        e |= 4;
    }
    if reserved {
        e |= 8;
    }
    if op == Op::Fetch && (cpu.smep || (pae_like && cpu.nxe)) {
        e |= 16;
    }
    if key {
        e |= 32;
    }
    e
}

/// Translates and sets accessed and dirty flags; the error code if it cannot.
pub fn access(cpu: &Cpu, mem: &mut Memory, la: u64, op: Op, who: Who) -> Result<Found, u32> {
    if cpu.mode == Mode::None {
        return Ok(Found { pa: la, size: 12, global: false, dirty: true, pat: 0 });
    }
    let chain = match follow(cpu, mem, la) {
        Ok(c) => c,
        Err(Stop::NotPresent) => return Err(error_code(cpu, false, false, op, who, false)),
        Err(Stop::Reserved) => return Err(error_code(cpu, true, true, op, who, false)),
        Err(Stop::SecondStage(_)) => unreachable!("there is none"),
    };
    let page = page_of(cpu, &chain);
    if !allowed(cpu, page, op, who) {
        let key = op != Op::Fetch && key_forbids(cpu, page, op, who);
        return Err(error_code(cpu, true, false, op, who, key));
    }
    for (i, u) in chain.used.iter().enumerate() {
        // Read again: two levels may be the same entry.
        let mut e = mem.read(u.at, u.bytes) | 1 << 5;
        if op == Op::Write && i + 1 == chain.used.len() {
            e |= 1 << 6;
        }
        mem.write(u.at, u.bytes, e);
    }
    let last = chain.used[chain.used.len() - 1];
    let leaf = mem.read(last.at, last.bytes);
    let offset = la & ((1 << chain.size) - 1);
    Ok(Found {
        pa: chain.base + offset,
        size: chain.size,
        global: cpu.pge && bit(leaf, 8),
        dirty: bit(leaf, 6),
        pat: u64::from(bit(leaf, chain.pat_bit)) * 4 + (leaf >> 3 & 3),
    })
}

/// The page that `la` is mapped to, rights as in memory, nothing changed: for the coherence model.
pub fn peek(cpu: &Cpu, mem: &Memory, la: u64) -> Option<(Page, u64, bool)> {
    let chain = follow(cpu, mem, la).ok()?;
    let leaf = chain.used[chain.used.len() - 1].entry;
    Some((page_of(cpu, &chain), chain.base + (la & ((1 << chain.size) - 1)), cpu.pge && bit(leaf, 8)))
}

/// The PDPTE registers that a load from the table at `cr3` gives, or `None` for #GP.
pub fn load_pdptes(cr3: u64, maxphyaddr: u32, mem: &Memory) -> Option<[u64; 4]> {
    let table = cr3 & 0xffff_ffff & !31;
    let all = [0, 1, 2, 3].map(|i| mem.read(table + 8 * i, 8));
    let bad = |e: u64| {
        bit(e, 0) && (0..64).any(|n| bit(e, n) && (n == 1 || n == 2 || (5..=8).contains(&n) || n >= maxphyaddr))
    };
    if all.into_iter().any(bad) { None } else { Some(all) }
}
