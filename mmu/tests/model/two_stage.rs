//! The slow model's second stage, written from the SDM (Vol 3C, "The Extended Page Table Mechanism (EPT)"), and the two
//! stages together. It looks at EPT entries one bit at a time.

use super::{Cpu, Memory, Mode, Op, Page, Stop, Who, allowed, bit, error_code, follow_by, key_forbids, page_of};

/// What governs EPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ept {
    pub eptp: u64,
    pub mode_based: bool,
    pub execute_only: bool,
    pub maxphyaddr: u32,
    /// Address and index of the page-modification log.
    pub pml: Option<(u64, u16)>,
}

/// Why the second stage refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Qualification, guest-physical address, and bit 63 of the entry that decides about #VE.
    Violation {
        qualification: u32,
        gpa: u64,
        suppress_ve: bool,
    },
    Misconfiguration {
        gpa: u64,
    },
    LogFull {
        gpa: u64,
    },
}

/// Why an access was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Page(u32),
    Ept(Refused),
}

/// What is asked of a guest-physical address.
#[derive(Clone, Copy, Default)]
pub struct Request {
    pub read: bool,
    pub write: bool,
    /// A fetch, and whether the linear address is a user-mode one.
    pub fetch: Option<bool>,
    /// A linear address is being translated.
    pub linear: bool,
    /// This is its translation, from a page with these rights; otherwise a guest paging-structure entry.
    pub translation: Option<Page>,
}

/// Where a guest-physical address is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub hpa: u64,
    pub size: u32,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
    pub user_executable: bool,
    /// The leaf's D flag is set, or there are none.
    pub dirty: bool,
    pub memory_type: u64,
    pub ignore_pat: bool,
}

/// Whether bit `n` is reserved in an EPT entry at `level` that does or does not map a page.
fn reserved(ept: &Ept, level: u32, page: bool, n: u32) -> bool {
    if n >= ept.maxphyaddr && n <= 51 {
        return true;
    }
    match (level, page) {
        (5 | 4, _) => (3..=7).contains(&n),
        (3, true) => (12..=29).contains(&n),
        (2, true) => (12..=20).contains(&n),
        (3 | 2, false) => (3..=6).contains(&n),
        _ => false,
    }
}

fn misconfigured(ept: &Ept, e: u64, level: u32, page: bool) -> bool {
    let (r, w, x) = (bit(e, 0), bit(e, 1), bit(e, 2));
    let xu = ept.mode_based && bit(e, 10);
    if !r && w {
        return true;
    }
    if !r && (x || xu) && !ept.execute_only {
        return true;
    }
    if (0..64).any(|n| bit(e, n) && reserved(ept, level, page, n)) {
        return true;
    }
    page && matches!(e >> 3 & 7, 2 | 3 | 7)
}

/// The rights of the guest's page that qualification bits 11:9 report.
fn advanced(page: Page) -> u32 {
    u32::from(page.user_mode_address) << 9 | u32::from(page.writable) << 10 | u32::from(page.execute_disabled) << 11
}

/// An access to a guest-physical address.
pub fn access_gpa(ept: &mut Ept, mem: &mut Memory, gpa: u64, want: Request) -> Result<Place, Refused> {
    let ad = bit(ept.eptp, 6);
    let levels = (ept.eptp >> 3 & 7) as u32 + 1;
    let mut qualification = 0;
    if want.read {
        qualification |= 1;
    }
    if want.write {
        qualification |= 2;
    }
    if want.fetch.is_some() {
        qualification |= 4;
    }
    if want.linear {
        qualification |= 1 << 7;
        if let Some(page) = want.translation {
            qualification |= 1 << 8 | advanced(page);
        }
    }
    if gpa >> if levels == 4 { 48 } else { 57 } != 0 {
        return Err(Refused::Violation { qualification, gpa, suppress_ve: false });
    }
    let mut table = ept.eptp >> 12 & ((1 << 40) - 1);
    let mut used = Vec::new();
    let mut level = levels;
    let leaf = loop {
        let at = (table << 12) + 8 * (gpa >> (12 + 9 * (level - 1)) & 511);
        let e = mem.read(at, 8);
        let present = bit(e, 0) || bit(e, 1) || bit(e, 2) || (ept.mode_based && bit(e, 10));
        if !present {
            return Err(Refused::Violation { qualification, gpa, suppress_ve: bit(e, 63) });
        }
        let page = level == 1 || (level <= 3 && bit(e, 7));
        if misconfigured(ept, e, level, page) {
            return Err(Refused::Misconfiguration { gpa });
        }
        used.push((at, e));
        if page {
            break e;
        }
        table = e >> 12 & ((1 << 40) - 1);
        level -= 1;
    };
    let all = |n: u32| used.iter().all(|&(_, e)| bit(e, n));
    let (readable, writable, executable) = (all(0), all(1), all(2));
    let user_executable = ept.mode_based && all(10);
    let fetch_ok = |user: bool| if ept.mode_based && user { user_executable } else { executable };
    let ok = (!want.read || readable) && (!want.write || writable) && want.fetch.is_none_or(fetch_ok);
    if !ok {
        qualification |= u32::from(readable) << 3
            | u32::from(writable) << 4
            | u32::from(executable) << 5
            | u32::from(user_executable) << 6;
        return Err(Refused::Violation { qualification, gpa, suppress_ve: bit(leaf, 63) });
    }
    if ad {
        let last = used.len() - 1;
        let missing = used.iter().any(|&(_, e)| !bit(e, 8)) || (want.write && !bit(leaf, 9));
        if missing && ept.pml.is_some_and(|(_, index)| index > 511) {
            return Err(Refused::LogFull { gpa });
        }
        for (i, &(at, _)) in used.iter().enumerate() {
            let mut e = mem.read(at, 8) | 1 << 8;
            if i == last && want.write {
                e |= 1 << 9;
            }
            mem.write(at, 8, e);
        }
        if want.write
            && !bit(leaf, 9)
            && let Some((address, index)) = &mut ept.pml
        {
            mem.write(*address + 8 * u64::from(*index), 8, gpa >> 12 << 12);
            *index = index.wrapping_sub(1);
        }
    }
    let size = 12 + 9 * (level - 1);
    let base = (leaf & ((1 << 52) - 1)) >> size << size;
    Ok(Place {
        hpa: base + (gpa & ((1 << size) - 1)),
        size,
        readable,
        writable,
        executable,
        user_executable,
        dirty: !ad || want.write || bit(leaf, 9),
        memory_type: leaf >> 3 & 7,
        ignore_pat: bit(leaf, 6),
    })
}

/// What a linear address was translated to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub gpa: u64,
    pub place: Place,
    /// log2 of the guest's page size.
    pub size: u32,
    pub global: bool,
    pub dirty: bool,
    pub pat: u64,
    pub page_user: bool,
}

/// An access by linear address through both stages, flags set in both.
pub fn access(cpu: &Cpu, ept: &mut Ept, mem: &mut Memory, la: u64, op: Op, who: Who) -> Result<Found, Fault> {
    let ad = bit(ept.eptp, 6);
    let translate = |ept: &mut Ept, mem: &mut Memory, gpa: u64, page: Page| {
        let want = Request {
            read: op == Op::Read,
            write: op == Op::Write,
            fetch: (op == Op::Fetch).then_some(page.user_mode_address),
            linear: true,
            translation: Some(page),
        };
        access_gpa(ept, mem, gpa, want).map_err(Fault::Ept)
    };
    if cpu.mode == Mode::None {
        // Every linear address is a user-mode, read/write and executable one.
        let page = Page { user_mode_address: true, writable: true, execute_disabled: false, key: 0 };
        let place = translate(ept, mem, la, page)?;
        return Ok(Found { gpa: la, place, size: 12, global: false, dirty: true, pat: 0, page_user: true });
    }
    let reference = Request { read: true, write: ad, linear: true, ..Request::default() };
    let mut read = |at: u64, bytes: u64| {
        let place = access_gpa(ept, mem, at, reference)?;
        Ok(mem.read(place.hpa, bytes))
    };
    let chain = match follow_by(cpu, &mut read, la) {
        Ok(c) => c,
        Err(Stop::NotPresent) => return Err(Fault::Page(error_code(cpu, false, false, op, who, false))),
        Err(Stop::Reserved) => return Err(Fault::Page(error_code(cpu, true, true, op, who, false))),
        Err(Stop::SecondStage(refused)) => return Err(Fault::Ept(refused)),
    };
    let page = page_of(cpu, &chain);
    if !allowed(cpu, page, op, who) {
        let key = op != Op::Fetch && key_forbids(cpu, page, op, who);
        return Err(Fault::Page(error_code(cpu, true, false, op, who, key)));
    }
    let last = chain.used.len() - 1;
    for (i, u) in chain.used.iter().enumerate() {
        let wants = 1 << 5 | if i == last && op == Op::Write { 1 << 6 } else { 0 };
        if u.entry & wants != wants {
            let update = Request { read: true, write: true, linear: true, ..Request::default() };
            let place = access_gpa(ept, mem, u.at, update).map_err(Fault::Ept)?;
            let e = mem.read(place.hpa, u.bytes);
            mem.write(place.hpa, u.bytes, e | wants);
        }
    }
    let leaf = chain.used[last].entry;
    let gpa = chain.base + (la & ((1 << chain.size) - 1));
    let place = translate(ept, mem, gpa, page)?;
    Ok(Found {
        gpa,
        place,
        size: chain.size,
        global: cpu.pge && bit(leaf, 8),
        dirty: bit(leaf, 6) || op == Op::Write,
        pat: u64::from(bit(leaf, chain.pat_bit)) * 4 + (leaf >> 3 & 3),
        page_user: page.user_mode_address,
    })
}

/// The PDPTE registers that MOV to CR3 loads under EPT: plain reads for no linear address. `None` for #GP.
pub fn load_pdptes(ept: &mut Ept, mem: &mut Memory, cr3: u64) -> Result<Option<[u64; 4]>, Refused> {
    let table = cr3 & 0xffff_ffff & !31;
    let mut all = [0; 4];
    for (i, e) in all.iter_mut().enumerate() {
        let place = access_gpa(ept, mem, table + 8 * i as u64, Request { read: true, ..Request::default() })?;
        *e = mem.read(place.hpa, 8);
        let reserved = |n: u32| n == 1 || n == 2 || (5..=8).contains(&n) || n >= ept.maxphyaddr;
        if bit(*e, 0) && (0..64).any(|n| bit(*e, n) && reserved(n)) {
            return Ok(None);
        }
    }
    Ok(Some(all))
}

/// What both stages map `la` to now, rights as in memory, nothing changed: for the coherence model.
pub fn peek(cpu: &Cpu, ept: &Ept, mem: &Memory, la: u64) -> Option<(Page, u64, bool, Place)> {
    let mut ept = Ept { eptp: ept.eptp & !(1 << 6), pml: None, ..*ept };
    let mut mem = mem.clone();
    let plain = Request { read: false, linear: true, ..Request::default() };
    if cpu.mode == Mode::None {
        let page = Page { user_mode_address: true, writable: true, execute_disabled: false, key: 0 };
        return Some((page, la, false, access_gpa(&mut ept, &mut mem, la, plain).ok()?));
    }
    let mut read = |at: u64, bytes: u64| {
        let place = access_gpa(&mut ept, &mut mem, at, plain)?;
        Ok(mem.read(place.hpa, bytes))
    };
    let chain = follow_by(cpu, &mut read, la).ok()?;
    let leaf = chain.used[chain.used.len() - 1].entry;
    let gpa = chain.base + (la & ((1 << chain.size) - 1));
    let place = access_gpa(&mut ept, &mut mem, gpa, plain).ok()?;
    Some((page_of(cpu, &chain), gpa, cpu.pge && bit(leaf, 8), place))
}
