//! Loops over several pages under the optimising tier: calls and returns, direct and indirect, an instruction in two pages, and
//! pages that are mapped anew while the loop runs, by INVLPG, by a load of CR3, and by going to another address space.

mod support;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::loops::{BASE, ENTRY, digits, finish, in_every_tier};
use support::scratch;

/// Two page directories, each with a page table for the first 4 MiB.
const DIRECTORY: u32 = 0x20_0000;
const TABLE: u32 = DIRECTORY + 0x1000;
const OTHER: u32 = DIRECTORY + 0x2000;
const OTHER_TABLE: u32 = DIRECTORY + 0x3000;
/// A function in one page. The next physical page holds another that takes its place.
const F: u32 = 0x30_0000;
/// A function whose first instruction goes into page `SECOND`. The next physical page takes the place of that one, too.
const G: u32 = 0x30_fffe;
const SECOND: u32 = 0x31_0000;
/// Holds the address of G.
const POINTER: u32 = 0x20_8000;
const TURNS: u32 = 2_000_000;

/// How the pages are changed, that of F every 4,096 turns, the other every 8,192.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Change {
    Invlpg,
    Cr3,
    AddressSpace,
}

fn pte(table: u32, page: u32) -> u32 {
    table + (page >> 12) * 4
}

fn prepare(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(esp, (BASE - 16) as i32)?;
    // F: add eax, 3; ret, or add eax, 5; xor eax, 0x55; ret.
    a.mov(dword_ptr(F), 0xc303_c083u32)?;
    a.mov(dword_ptr(F + 0x1000), 0x8305_c083u32)?;
    a.mov(dword_ptr(F + 0x1004), 0x00c3_55f0u32)?;
    // G: add eax, 0x44332211; ret, or 0x45332211.
    a.mov(dword_ptr(G), 0x3322_1105u32)?;
    a.mov(word_ptr(SECOND + 2), 0xc344u32)?;
    a.mov(word_ptr(SECOND + 0x1000), 0x3322u32)?;
    a.mov(word_ptr(SECOND + 0x1002), 0xc345u32)?;
    a.mov(dword_ptr(POINTER), G)?;
    for (directory, table) in [(DIRECTORY, TABLE), (OTHER, OTHER_TABLE)] {
        a.mov(dword_ptr(directory), table | 3)?;
        let mut next = a.create_label();
        a.mov(ecx, 0x3ff)?;
        a.set_label(&mut next)?;
        a.mov(eax, ecx)?;
        a.shl(eax, 12)?;
        a.or(eax, 3)?;
        a.mov(dword_ptr(table + ecx * 4), eax)?;
        a.dec(ecx)?;
        a.jns(next)?;
    }
    a.xor(dword_ptr(pte(OTHER_TABLE, F)), 0x1000)?;
    a.mov(eax, DIRECTORY)?;
    a.mov(cr3, eax)?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0000u32 as i32)?;
    a.mov(cr0, eax)
}

fn guest(change: Change) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut again, mut same, mut one) = (a.create_label(), a.create_label(), a.create_label());
    prepare(&mut a)?;
    a.xor(eax, eax)?;
    a.mov(ebx, TURNS)?;
    a.mov(ecx, F)?;
    a.set_label(&mut again)?;
    a.call(ecx)?;
    a.call(u64::from(F))?;
    a.call(dword_ptr(POINTER))?;
    a.test(ebx, 0xfff)?;
    a.jne(same)?;
    if change != Change::AddressSpace {
        a.xor(dword_ptr(pte(TABLE, F)), 0x1000)?;
    }
    a.test(ebx, 0x1fff)?;
    a.jne(one)?;
    for table in [TABLE, OTHER_TABLE] {
        a.xor(dword_ptr(pte(table, SECOND)), 0x1000)?;
    }
    a.set_label(&mut one)?;
    match change {
        Change::Invlpg => {
            a.invlpg(byte_ptr(F))?;
            a.invlpg(byte_ptr(SECOND))?;
        }
        Change::Cr3 => {
            a.mov(edi, cr3)?;
            a.mov(cr3, edi)?;
        }
        Change::AddressSpace => {
            a.mov(edi, cr3)?;
            a.xor(edi, (DIRECTORY ^ OTHER) as i32)?;
            a.mov(cr3, edi)?;
        }
    }
    a.set_label(&mut same)?;
    a.dec(ebx)?;
    a.jne(again)?;
    finish(&mut a)?;
    a.assemble(ENTRY.into())
}

/// What it prints, by the same loop here.
fn expected() -> String {
    let (mut sum, mut other, mut second) = (0u32, false, false);
    for turn in (1..=TURNS).rev() {
        for _ in 0..2 {
            sum = if other { sum.wrapping_add(5) ^ 0x55 } else { sum.wrapping_add(3) };
        }
        sum = sum.wrapping_add(if second { 0x4533_2211 } else { 0x4433_2211 });
        other ^= turn & 0xfff == 0;
        second ^= turn & 0x1fff == 0;
    }
    digits(sum)
}

#[track_caller]
fn check(change: Change) {
    let name = format!("region-pages-{change:?}");
    let stats = scratch(&format!("{name}-stats")).join("stats");
    let code = guest(change).expect("it assembles");
    let more = ["--stats", stats.to_str().expect("UTF-8 path")];
    in_every_tier(&name, &code, &expected(), &more, |tier| {
        if tier == "auto" && twofold_backend::available() {
            let text = std::fs::read_to_string(&stats).expect("statistics");
            let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let checks = &stats["translation"]["regions"]["checks"];
            assert!(checks.as_u64() > Some(0), "no region in several pages was entered: {text}");
        }
    });
}

#[test]
fn pages_change_by_invlpg() {
    check(Change::Invlpg);
}

#[test]
fn pages_change_by_a_load_of_cr3() {
    check(Change::Cr3);
}

#[test]
fn pages_change_with_the_address_space() {
    check(Change::AddressSpace);
}
