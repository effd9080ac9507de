//! Linux's own symbol table, found in the memory of the running guest.
//!
//! Place in the pipeline: under [`super::Symbols`]. The kernel keeps its symbols (`kallsyms`) compressed in read-only data:
//! names as bytes that each stand for one of 256 tokens, addresses as 32-bit offsets from a base. Nothing points to them
//! that could be found from outside, but the table of tokens has a shape: those of the ten digits are the digits
//! themselves, one after another. From there the neighbours follow, each checked against the others:
//!
//! ```text
//! up to 6.1: offsets, relative_base, num_syms, names, markers, token_table, token_index
//! from 6.2:  the same with seqs_of_names before token_table (Debian's 6.1, too)
//! from 6.4:  num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names
//! ```
//!
//! Invariant: guest memory is untrusted, so every index is checked and every loop bounded; what is inconsistent is skipped.
//! The base has been relocated by the kernel itself, so the addresses are those of the running kernel.

use twofold_arch::PhysAddr;
use twofold_mmu::PhysMap;
use twofold_mmu::physmap::HIGH_RAM_BASE;

use super::SymbolTable;

/// The tokens of the digits.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
/// Memory looked at in one go, and how much of it is looked at again with the next, so that nothing is cut.
const CHUNK: usize = 1 << 20;
const OVERLAP: usize = 8 << 10;
/// What may lie before and behind the token table and belong to it.
const BEFORE: u64 = 24 << 20;
const BEHIND: u64 = 16 << 20;
/// The kernel's code and read-only data are not farther apart.
const NEAR: u64 = 64 << 20;
/// Memory looked at when the kernel is not where it was expected.
const MOST_SCANNED: u64 = 8 << 30;
/// Candidates looked at closely.
const MOST_TRIED: usize = 16;
/// Symbols in a kernel, at most.
const MOST_SYMBOLS: usize = 4 << 20;
/// A longer token or name is none.
const LONGEST_TOKEN: usize = 256;

/// Finds the table in guest memory, first around `near`, physical addresses of kernel code. `wide`: 64-bit pointers.
#[must_use]
pub fn find(map: &PhysMap, near: &[PhysAddr], wide: bool) -> Option<SymbolTable> {
    let (low, high) = ((0, map.low_ram_end().0), (HIGH_RAM_BASE, map.high_ram_end().0));
    let around = near.iter().map(|hint| (hint.0.saturating_sub(NEAR) & !0xfff, hint.0.saturating_add(NEAR)));
    let everywhere = std::iter::once((0, MOST_SCANNED));
    let mut tried = 0;
    around.chain(everywhere).find_map(|(from, to)| {
        let in_low = scan(map, from.max(low.0), to.min(low.1), wide, &mut tried);
        in_low.or_else(|| scan(map, from.max(high.0), to.min(high.1), wide, &mut tried))
    })
}

fn scan(map: &PhysMap, from: u64, to: u64, wide: bool, tried: &mut usize) -> Option<SymbolTable> {
    let mut chunk = vec![0; CHUNK + OVERLAP];
    let mut at = from;
    while at < to {
        map.read(PhysAddr(at), &mut chunk);
        let mut start = 0;
        while let Some(i) = chunk.get(start..).and_then(|rest| position(rest, DIGITS)) {
            let here = start + i;
            start = here + 1;
            if here >= CHUNK || tokens(&chunk, here).is_none() {
                continue;
            }
            *tried += 1;
            if *tried > MOST_TRIED {
                return None;
            }
            let pa = at + here as u64;
            let low = pa.saturating_sub(BEFORE) & !0xfff;
            let mut window = vec![0; (pa + BEHIND - low) as usize];
            map.read(PhysAddr(low), &mut window);
            if let Some(table) = parse(&window, (pa - low) as usize, wide) {
                return Some(table);
            }
        }
        at += CHUNK as u64;
    }
    None
}

fn position(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    // The first byte by a quick search, the rest by comparison.
    let mut at = 0;
    loop {
        at += bytes.get(at..)?.iter().position(|&b| b == needle[0])?;
        if bytes[at..].starts_with(needle) {
            return Some(at);
        }
        at += 1;
    }
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    b.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes)
}
fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    b.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}
fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    b.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

/// The token table: offsets in the memory looked at.
struct Tokens {
    start: usize,
    index: [u16; 256],
    /// Where the index ends.
    end: usize,
}

impl Tokens {
    fn get<'a>(&self, b: &'a [u8], token: u8) -> Option<&'a [u8]> {
        let rest = b.get(self.start + self.index[token as usize] as usize..)?;
        rest.get(..rest.iter().take(LONGEST_TOKEN).position(|&c| c == 0)?)
    }
}

/// The token table in which the digits' tokens are at `digits`, if the index behind it agrees.
fn tokens(b: &[u8], digits: usize) -> Option<Tokens> {
    const FIRST: usize = b'0' as usize;
    let mut places = [0usize; 256];
    let mut at = digits;
    for place in &mut places[FIRST..] {
        *place = at - digits;
        let token = b.get(at..)?;
        at += token.iter().take(LONGEST_TOKEN).position(|&c| c == 0)? + 1;
    }
    for align in [4, 8] {
        let table = at.next_multiple_of(align);
        let mut index = [0u16; 256];
        for (i, n) in index.iter_mut().enumerate() {
            *n = u16_at(b, table + 2 * i)?;
        }
        let first = index[FIRST];
        let agrees = index[0] == 0
            && index.windows(2).all(|w| w[0] < w[1])
            && (FIRST..256).all(|i| (index[i] - first) as usize == places[i]);
        if agrees && digits >= first as usize {
            return Some(Tokens { start: digits - first as usize, index, end: table + 512 });
        }
    }
    None
}

/// The whole table, with the digits' tokens at `digits` of `b`, which begins at a page boundary.
fn parse(b: &[u8], digits: usize, wide: bool) -> Option<SymbolTable> {
    let tokens = tokens(b, digits)?;
    let names = find_names(b, tokens.start)?;
    let pointer = if wide { 8 } else { 4 };
    // Before 6.4, then since.
    let base_at = names.count_at.checked_sub(pointer);
    let size = names.count * 4;
    let before = base_at.and_then(|base| Some((base.checked_sub(size.next_multiple_of(pointer))?, base)));
    let offsets = tokens.end.next_multiple_of(pointer);
    let behind = Some((offsets, (offsets + size).next_multiple_of(pointer)));
    let addresses = [before, behind].into_iter().flatten().find_map(|(offsets, base)| {
        let base = if wide { u64_at(b, base)? } else { u64::from(u32_at(b, base)?) };
        addresses(b, offsets, names.count, base, wide)
    })?;
    let mut table = SymbolTable::default();
    let mut at = names.start;
    let mut name = Vec::new();
    for addr in addresses {
        let (len, first) = name_len(b, at)?;
        name.clear();
        for &token in b.get(first..first + len)? {
            name.extend(tokens.get(b, token)?);
            if name.len() > 2 * LONGEST_TOKEN {
                return None;
            }
        }
        at = first + len;
        if let (Some(&kind), Some(text)) = (name.first(), name.get(1..).and_then(|n| std::str::from_utf8(n).ok())) {
            // Absolute symbols are numbers, and low ones per-CPU offsets.
            if !kind.eq_ignore_ascii_case(&b'a') && addr >= 1 << 20 {
                table.push(addr, kind, text);
            }
        }
    }
    table.finish()
}

/// The names before the token table at `tokens`; between them are the markers and perhaps three bytes for each name.
fn find_names(b: &[u8], tokens: usize) -> Option<Names> {
    let farthest = tokens.saturating_sub(3 * MOST_SYMBOLS);
    let mut end = tokens & !3;
    while end > farthest {
        if let Some((at, markers)) = markers(b, end) {
            let between = tokens - end;
            let (least, most) = (768 * (markers.len() - 1), 768 * markers.len() + 8);
            if (between == 0 || (between > least && between < most))
                && let Some(names) = names(b, at, &markers)
            {
                return Some(names);
            }
        }
        end -= 4;
    }
    None
}

/// The offsets of every 256th name, which end at `end`: where they are, and they.
fn markers(b: &[u8], end: usize) -> Option<(usize, Vec<u32>)> {
    let mut at = end & !3;
    let mut markers = Vec::new();
    // At most one word of padding.
    if u32_at(b, at.checked_sub(4)?)? == 0 {
        at -= 4;
    }
    loop {
        at = at.checked_sub(4)?;
        let m = u32_at(b, at)?;
        if markers.last().is_some_and(|&next| m >= next) || markers.len() > MOST_SYMBOLS / 256 {
            return None;
        }
        markers.push(m);
        if m == 0 {
            markers.reverse();
            return Some((at, markers));
        }
    }
}

struct Names {
    start: usize,
    count: usize,
    /// Where the number of names is.
    count_at: usize,
}

/// Length in tokens of the name at `at`, and where its tokens begin. (Two bytes of length for a long one since 6.1.)
fn name_len(b: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = *b.get(at)? as usize;
    if low & 0x80 == 0 {
        return Some((low, at + 1));
    }
    let high = *b.get(at + 1)? as usize;
    Some((low & 0x7f | high << 7, at + 2))
}

/// The names, which end before the markers: their number is before them, and they agree with the markers.
fn names(b: &[u8], end: usize, markers: &[u32]) -> Option<Names> {
    let last = *markers.last()? as usize;
    let mut start = end.checked_sub(last)? & !3;
    // Behind the last marker are at most 256 names.
    let lowest = start.saturating_sub(256 * (LONGEST_TOKEN + 2));
    while start >= 8 && start >= lowest {
        for count_at in [start - 8, start - 4] {
            let count = u32_at(b, count_at)? as usize;
            if count.div_ceil(256) == markers.len() && agree(b, start, end, count, markers) {
                return Some(Names { start, count, count_at });
            }
        }
        start -= 4;
    }
    None
}

fn agree(b: &[u8], start: usize, end: usize, count: usize, markers: &[u32]) -> bool {
    let mut at = start;
    for i in 0..count {
        if i % 256 == 0 && markers.get(i / 256).is_none_or(|&m| m as usize != at - start) {
            return false;
        }
        match name_len(b, at) {
            Some((len @ 1.., first)) if first + len <= end => at = first + len,
            _ => return false,
        }
    }
    end - at < 8
}

/// The addresses of all symbols, if they ascend as they should.
fn addresses(b: &[u8], offsets: usize, count: usize, base: u64, wide: bool) -> Option<Vec<u64>> {
    let lowest = if wide { super::UPPER_HALF } else { 1 << 20 };
    if base < lowest || base & 0xfff != 0 || count > MOST_SYMBOLS {
        return None;
    }
    let offset = |i: usize| u32_at(b, offsets + 4 * i);
    // With per-CPU symbols as numbers of their own, those are positive and the rest is counted from base - 1 downwards.
    let mut negative = 0;
    for i in 0..count {
        negative += usize::from(offset(i)? >> 31 != 0);
    }
    let split = wide && negative > count / 2;
    let mut all = Vec::with_capacity(count);
    for i in 0..count {
        let o = offset(i)?;
        all.push(match (split, o as i32) {
            (true, o @ 0..) => o as u64,
            (true, o) => base.wrapping_sub(1).wrapping_add(i64::from(o).unsigned_abs()),
            (false, _) => base.wrapping_add(u64::from(o)),
        });
    }
    let differ = all.windows(2).filter(|w| w[0] != w[1]).count();
    (all.is_sorted() && differ > count / 2).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the offsets are.
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Layout {
        Linux60,
        Linux62,
        Linux64,
    }

    fn align(out: &mut Vec<u8>, to: usize) {
        out.resize(out.len().next_multiple_of(to), 0);
    }

    /// A kernel's tables for `symbols` (address, type and name), as its build makes them: each character is its own token,
    /// and a few tokens are longer.
    fn image(symbols: &[(u64, String)], base: u64, layout: Layout, wide: bool) -> (Vec<u8>, usize) {
        let p = if wide { 8 } else { 4 };
        let mut out = vec![0x55; 4096 * 3 + 64];
        let mut names = Vec::new();
        let mut markers = Vec::new();
        for (i, (_, name)) in symbols.iter().enumerate() {
            if i % 256 == 0 {
                markers.push(names.len() as u32);
            }
            let mut tokens: Vec<u8> = Vec::new();
            let mut rest = name.as_bytes();
            while let Some((&c, tail)) = rest.split_first() {
                if let Some(tail) = rest.strip_prefix(b"do_") {
                    tokens.push(1);
                    rest = tail;
                } else {
                    tokens.push(c);
                    rest = tail;
                }
            }
            if tokens.len() < 128 {
                names.push(tokens.len() as u8);
            } else {
                names.push(tokens.len() as u8 & 0x7f | 0x80);
                names.push((tokens.len() >> 7) as u8);
            }
            names.extend(tokens);
        }
        let offset = |addr: u64| -> u32 {
            match (wide, addr < 1 << 20) {
                (true, true) => addr as u32,
                (true, false) => (base.wrapping_sub(1).wrapping_sub(addr)) as u32,
                (false, _) => (addr - base) as u32,
            }
        };
        let offsets = |out: &mut Vec<u8>| {
            align(out, p);
            for (addr, _) in symbols {
                out.extend(offset(*addr).to_le_bytes());
            }
            align(out, p);
            out.extend(&base.to_le_bytes()[..p]);
        };
        if layout != Layout::Linux64 {
            offsets(&mut out);
        }
        align(&mut out, p);
        out.extend((symbols.len() as u32).to_le_bytes());
        align(&mut out, p);
        out.extend(names);
        align(&mut out, p);
        for m in markers {
            out.extend(m.to_le_bytes());
        }
        align(&mut out, p);
        if layout == Layout::Linux62 {
            // In the order of the names: any permutation will do.
            for i in 0..symbols.len() {
                out.extend(&((i * 7919 % symbols.len()) as u32).to_be_bytes()[1..]);
            }
            align(&mut out, p);
        }
        let start = out.len();
        let mut index = Vec::new();
        for t in 0..=255u8 {
            index.push((out.len() - start) as u16);
            match t {
                1 => out.extend(b"do_"),
                b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'.' => out.push(t),
                2 | 3 | 200..=255 => out.extend(format!("tok{t}").bytes()),
                _ => {}
            }
            out.push(0);
        }
        let digits = start + index[b'0' as usize] as usize;
        align(&mut out, p);
        for i in index {
            out.extend(i.to_le_bytes());
        }
        if layout == Layout::Linux64 {
            offsets(&mut out);
        }
        out.extend([0xaa; 4096]);
        (out, digits)
    }

    fn symbols(base: u64, n: u64, percpu: bool) -> Vec<(u64, String)> {
        let mut all = Vec::new();
        if percpu {
            all.extend((0..10).map(|i| (i * 64, format!("Apercpu_{i}"))));
        }
        all.push((base, String::from("T_text")));
        all.extend((1..n).map(|i| (base + i * 32, format!("tdo_function_{i}"))));
        all.push((base + n * 32, format!("T{}", "long_".repeat(60))));
        all.push((base + n * 32 + 32, String::from("B_end")));
        all
    }

    #[test]
    fn every_layout_in_both_widths() {
        for layout in [Layout::Linux60, Layout::Linux62, Layout::Linux64] {
            for (wide, base) in [(true, 0xffff_ffff_a2e0_0000u64), (false, 0xc100_0000)] {
                for n in [700, 701, 1200] {
                    let all = symbols(base, n, wide);
                    let (image, digits) = image(&all, base, layout, wide);
                    let t = parse(&image, digits, wide).unwrap_or_else(|| panic!("{layout:?} {wide} {n}"));
                    assert_eq!(t.address_of("_text"), Some(base), "{layout:?} {wide} {n}");
                    assert_eq!(t.lookup(base + 32 * 300 + 5), Some(("do_function_300", 5)));
                    assert_eq!(t.lookup(base + n * 32).unwrap().0.len(), 300);
                    assert_eq!(t.lookup(64), None, "per-CPU offsets are left out");
                }
            }
        }
    }

    #[test]
    fn found_in_guest_memory_wherever_it_is() {
        let base = 0xffff_ffff_8100_0000;
        let (image, _) = image(&symbols(base, 900, true), base, Layout::Linux62, true);
        for at in [0x10_0000u64, 0x1f_f000, 0x3f_0000] {
            let ram = twofold_mmu::GuestRam::new(8 << 20).unwrap();
            let map = PhysMap::new(std::sync::Arc::new(ram), Default::default());
            map.write(PhysAddr(at), &image);
            // A pattern that is none, before it.
            map.write(PhysAddr(0x8000), DIGITS);
            let t = find(&map, &[PhysAddr(0x1000)], true).unwrap();
            assert_eq!(t.lookup(base + 64), Some(("do_function_2", 0)));
        }
    }

    #[test]
    fn garbage_is_no_table_and_no_panic() {
        let base = 0xffff_ffff_8100_0000;
        let (good, digits) = image(&symbols(base, 600, true), base, Layout::Linux60, true);
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize
        };
        for _ in 0..3000 {
            let mut b = good.clone();
            for _ in 0..1 + random() % 8 {
                let at = random() % b.len();
                b[at] = random() as u8;
            }
            let cut = b.len() - random() % 64 * 32;
            let _ = parse(&b[..cut], digits, random() % 2 == 0);
        }
        let zeroes = vec![0; 1 << 16];
        assert!(parse(&zeroes, 1 << 15, true).is_none());
        assert!(parse(&[], 0, true).is_none());
        assert!(parse(DIGITS, 0, true).is_none());
    }
}
