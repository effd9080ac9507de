//! Names for guest addresses: from a kernel's ELF file, a System.map, or the tables inside the running kernel's memory.
//!
//! Place in the pipeline: asked at the end of a run by the statistics and by profiles; nothing here runs while a guest does.
//! Invariants: files and guest memory are untrusted bytes, so a table that does not make sense is no table, and every
//! search is bounded; a name is a guess for people, never an input to execution.
//!
//! A kernel that was moved (KASLR) has other addresses than its file says. The difference is found by registers that hold
//! the address of a function with a known name: the entry of system calls.

pub mod kallsyms;

use std::path::Path;

use object::{Object, ObjectSection, ObjectSymbol, SectionFlags, SymbolKind};
use twofold_arch::{LinearAddr, PhysAddr};

use crate::vcpu::Vcpu;

/// Symbols read from one source; more are dropped.
const MOST_SYMBOLS: usize = 4 << 20;
/// A file larger than this is not read.
const LARGEST_FILE: u64 = 4 << 30;
/// A longer name is cut.
const LONGEST_NAME: usize = 512;
/// An address this far behind the nearest symbol belongs to something else.
const FARTHEST: u64 = 1 << 20;
/// Where the upper half of 64-bit linear addresses begins.
const UPPER_HALF: u64 = 0xffff_8000_0000_0000;

#[derive(Clone, Copy, Debug)]
struct Symbol {
    addr: u64,
    name: u32,
    len: u16,
    /// Of several symbols with one address, the lowest names it.
    rank: u8,
}

/// The symbols of one source, by address.
#[derive(Clone, Debug, Default)]
pub struct SymbolTable {
    symbols: Vec<Symbol>,
    names: String,
}

impl SymbolTable {
    /// Adds a symbol. `kind` is as in a System.map: `t` and `w` are functions, upper case is global.
    fn push(&mut self, addr: u64, kind: u8, name: &str) {
        if self.symbols.len() >= MOST_SYMBOLS || name.is_empty() {
            return;
        }
        let name = name.get(..LONGEST_NAME).unwrap_or(name);
        let Ok(at) = u32::try_from(self.names.len()) else { return };
        let text = u8::from(!matches!(kind.to_ascii_lowercase(), b't' | b'w' | b'i'));
        let local = u8::from(!kind.is_ascii_uppercase());
        let padding = u8::from(name.starts_with("__pfx_") || name.starts_with("__cfi_"));
        let rank = text << 3 | padding << 2 | local << 1 | u8::from(name.starts_with('_'));
        self.names.push_str(name);
        self.symbols.push(Symbol { addr, name: at, len: name.len() as u16, rank });
    }

    /// Makes the table ready to be asked.
    fn finish(mut self) -> Option<Self> {
        // Per-CPU offsets and constants have low addresses in a kernel that lies high.
        let high = self.symbols.iter().filter(|s| s.addr >= UPPER_HALF).count();
        if high > self.symbols.len() / 2 {
            self.symbols.retain(|s| s.addr >= UPPER_HALF);
        }
        self.symbols.sort_by_key(|s| (s.addr, s.rank));
        self.symbols.dedup_by_key(|s| s.addr);
        self.symbols.shrink_to_fit();
        (!self.symbols.is_empty()).then_some(self)
    }

    /// Number of addresses with a name.
    #[must_use]
    pub fn len(&self) -> usize {
        self.symbols.len()
    }
    /// Whether there are none; never so for a table that a constructor gave.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }

    fn text(&self, s: &Symbol) -> &str {
        self.names.get(s.name as usize..s.name as usize + s.len as usize).unwrap_or("?")
    }

    /// The symbol at or before `addr` and how far `addr` is behind it.
    #[must_use]
    pub fn lookup(&self, addr: u64) -> Option<(&str, u64)> {
        let i = self.symbols.partition_point(|s| s.addr <= addr);
        let s = self.symbols.get(i.checked_sub(1)?)?;
        let off = addr - s.addr;
        // Behind the last one is what the table knows nothing of.
        let inside = if i == self.symbols.len() { off == 0 } else { off < FARTHEST };
        inside.then(|| (self.text(s), off))
    }

    /// The address of the symbol called `name`.
    #[must_use]
    pub fn address_of(&self, name: &str) -> Option<u64> {
        self.symbols.iter().find(|s| self.text(s) == name).map(|s| s.addr)
    }

    /// The symbols of an ELF file; `None` when it is none or has none.
    #[must_use]
    pub fn from_elf<'a, R: object::ReadRef<'a>>(data: R) -> Option<Self> {
        let file = object::File::parse(data).ok()?;
        let mut table = Self::default();
        for s in file.symbols() {
            let kind = match s.kind() {
                SymbolKind::Text => b't',
                SymbolKind::Data => b'd',
                // Labels of assembly code have no type; those in code are functions for us.
                SymbolKind::Unknown | SymbolKind::Label => match s.section_index().map(|i| file.section_by_index(i)) {
                    Some(Ok(section)) if is_code(section.flags()) => b't',
                    _ => continue,
                },
                _ => continue,
            };
            let (true, Ok(name)) = (s.is_definition(), s.name()) else { continue };
            table.push(s.address(), if s.is_local() { kind } else { kind.to_ascii_uppercase() }, name);
        }
        // The end of the code is a boundary, so that the last function has one.
        for section in file.sections().filter(|s| is_code(s.flags())) {
            table.push(section.address().saturating_add(section.size()), b'n', "(end)");
        }
        table.finish().filter(|t| t.len() > 1)
    }

    /// The symbols of a System.map (lines of address, type, name); `None` when it is none.
    #[must_use]
    pub fn from_system_map(text: &str) -> Option<Self> {
        let mut table = Self::default();
        for (i, line) in text.lines().enumerate() {
            let mut fields = line.split_whitespace();
            let parsed = (|| {
                let addr = u64::from_str_radix(fields.next()?, 16).ok()?;
                let [kind] = *fields.next()?.as_bytes() else { return None };
                Some((addr, kind, fields.next()?))
            })();
            match parsed {
                Some((addr, kind, name)) => table.push(addr, kind, name),
                None if i == 0 => return None,
                None => {}
            }
        }
        table.finish()
    }

    /// The symbols of an ELF file; `None` when it cannot be read, is none or has none.
    #[must_use]
    pub fn from_elf_file(path: &Path) -> Option<Self> {
        Self::from_elf(&object::ReadCache::new(std::fs::File::open(path).ok()?))
    }

    /// The symbols in a file, an ELF or a System.map.
    ///
    /// # Errors
    /// One line: what is wrong with it.
    pub fn from_file(path: &Path) -> Result<Self, String> {
        let name = path.display();
        let fail = |e: std::io::Error| format!("{name}: cannot be read: {e}; check the path");
        let file = std::fs::File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() || meta.len() > LARGEST_FILE {
            return Err(format!("{name}: not a file of symbols; give a vmlinux with a symbol table or a System.map"));
        }
        let map = || std::fs::read_to_string(path).ok().and_then(|text| Self::from_system_map(&text));
        let table = Self::from_elf(&object::ReadCache::new(&file)).or_else(map);
        table.ok_or_else(|| format!("{name}: no symbols in it; give a vmlinux with a symbol table or a System.map"))
    }
}

fn is_code(flags: SectionFlags) -> bool {
    matches!(flags, SectionFlags::Elf { sh_flags } if sh_flags & u64::from(object::elf::SHF_EXECINSTR) != 0)
}

/// A function whose run-time address a register holds, by its names in different kernels.
struct Anchor {
    names: &'static [&'static str],
    address: u64,
}

/// All that is known about the names of a guest.
#[derive(Debug, Default)]
pub struct Symbols {
    /// From files, with the difference between run-time addresses and theirs.
    files: Vec<(SymbolTable, u64)>,
    /// From the running kernel; none when it has been looked for in vain.
    kallsyms: Option<Option<SymbolTable>>,
}

impl Symbols {
    /// Names from `table`, whose addresses are those of its file.
    pub fn add_file(&mut self, table: SymbolTable) {
        self.files.push((table, 0));
    }

    /// Whether nothing is known, not even that there is nothing.
    #[must_use]
    pub fn is_resolved(&self) -> bool {
        self.kallsyms.is_some()
    }

    /// Looks at the running guest: where its kernel is, and what its memory says of names. Once it has found the kernel's
    /// own tables, it does nothing.
    pub fn resolve(&mut self, vcpu: &Vcpu) {
        if matches!(self.kallsyms, Some(Some(_))) {
            return;
        }
        let s = &vcpu.state;
        let anchors = [
            Anchor { names: &["entry_SYSCALL_64"], address: s.msrs.lstar },
            Anchor { names: &["entry_SYSENTER_compat", "entry_SYSENTER_32"], address: s.msrs.sysenter_eip },
        ];
        for (table, slide) in &mut self.files {
            *slide = slide_of(table, &anchors).unwrap_or(0);
        }
        let near: Vec<PhysAddr> = [s.msrs.lstar, s.msrs.sysenter_eip, s.rip]
            .into_iter()
            .filter(|&la| la != 0)
            .filter_map(|la| vcpu.mmu.probe(&vcpu.space, LinearAddr(la)).ok().map(|m| m.page))
            .collect();
        let wide = vcpu.state.efer & twofold_arch::control::efer::LMA != 0;
        let own = if vcpu.space.mode == twofold_mmu::PagingMode::None {
            None
        } else {
            kallsyms::find(&vcpu.shared.map, &near, wide)
        };
        if let Some(own) = &own {
            for (table, slide) in &mut self.files {
                if let (0, Some(there), Some(here)) = (*slide, table.address_of("_text"), own.address_of("_text")) {
                    *slide = here.wrapping_sub(there);
                }
            }
        }
        self.kallsyms = Some(own);
    }

    /// `function+0x1a` for the linear address `addr`, if it is known.
    #[must_use]
    pub fn name(&self, addr: u64) -> Option<String> {
        let in_files = self.files.iter().filter_map(|(table, slide)| table.lookup(addr.wrapping_sub(*slide)));
        let in_kernel = self.kallsyms.iter().flatten().filter_map(|table| table.lookup(addr));
        let (name, off) = in_files.chain(in_kernel).find(|(name, _)| *name != "(end)")?;
        Some(if off == 0 { name.to_owned() } else { format!("{name}+{off:#x}") })
    }
}

/// What to add to the file's addresses.
fn slide_of(table: &SymbolTable, anchors: &[Anchor]) -> Option<u64> {
    anchors.iter().filter(|a| a.address != 0).find_map(|a| {
        let there = a.names.iter().find_map(|n| table.address_of(n))?;
        let slide = a.address.wrapping_sub(there);
        // Kernels move by whole pages.
        (slide & 0xfff == 0).then_some(slide)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
0000000000000000 D __per_cpu_start
ffffffff81000000 T _text
ffffffff81000000 t startup_64
ffffffff81000100 t __pfx_do_idle
ffffffff81000110 T do_idle
ffffffff81000110 t __do_idle_alias
ffffffff81000200 T entry_SYSCALL_64
ffffffff81000300 B _end
";

    #[test]
    fn a_system_map() {
        let t = SymbolTable::from_system_map(MAP).unwrap();
        assert_eq!(t.lookup(0xffff_ffff_8100_0112), Some(("do_idle", 2)));
        assert_eq!(t.lookup(0xffff_ffff_8100_0105), Some(("__pfx_do_idle", 5)));
        assert_eq!(t.lookup(0xffff_ffff_80ff_ffff), None);
        assert_eq!(t.lookup(0xffff_ffff_8100_0301), None, "behind the last symbol");
        assert_eq!(t.lookup(5), None, "per-CPU offsets are no addresses");
    }

    #[test]
    fn a_moved_kernel_is_found_by_its_system_call_entry() {
        let t = SymbolTable::from_system_map(MAP).unwrap();
        let anchors = |address| [Anchor { names: &["entry_SYSCALL_64"], address }];
        assert_eq!(slide_of(&t, &anchors(0xffff_ffff_9c00_0200)), Some(0x1b00_0000));
        assert_eq!(slide_of(&t, &anchors(0xffff_ffff_9c00_0201)), None);
        assert_eq!(slide_of(&t, &anchors(0)), None);
        let symbols = Symbols { files: vec![(t, 0x1b00_0000)], kallsyms: Some(None) };
        assert_eq!(symbols.name(0xffff_ffff_9c00_0110).as_deref(), Some("do_idle"));
        assert_eq!(symbols.name(0xffff_ffff_9c00_0114).as_deref(), Some("do_idle+0x4"));
        assert_eq!(symbols.name(0xffff_ffff_8100_0114), None);
    }

    #[test]
    fn this_program_has_a_symbol_table() {
        let path = std::env::current_exe().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let Some(t) = SymbolTable::from_elf(&bytes[..]) else { panic!("no symbols in {}", path.display()) };
        assert!(t.address_of("main").is_some());
        assert!(SymbolTable::from_file(&path).unwrap().len() > 100);
    }

    #[test]
    fn garbage_is_no_table() {
        assert!(SymbolTable::from_system_map("").is_none());
        assert!(SymbolTable::from_system_map("#!/bin/sh\n").is_none());
        assert!(SymbolTable::from_elf(&b"\x7fELF"[..]).is_none());
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for i in 0..64 {
            // Every field of the header spoilt in turn, and the file cut at many places.
            let mut b = bytes[..bytes.len().min(1 << 16)].to_vec();
            b[i] ^= 0xff;
            let _ = SymbolTable::from_elf(&b[..]);
            let _ = SymbolTable::from_elf(&bytes[..bytes.len() / 64 * i]);
        }
        assert!(SymbolTable::from_file(Path::new("/nonexistent")).unwrap_err().contains("/nonexistent"));
        assert!(SymbolTable::from_file(Path::new("/")).is_err());
    }
}
