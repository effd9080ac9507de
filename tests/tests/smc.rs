//! Code that changes code, and instructions across pages: what runs is what memory holds, in every tier.
//!
//! Each guest loops long enough for its blocks to be compiled, and counts in a way that says which version of the code ran.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use twofold_tests::guest::{Bits, CODE, DATA, END, Guest, MAPPED, RESUME, pte};

const ROUNDS: u32 = 2000;

/// Assembles a loop of [`ROUNDS`] rounds, with the round's number in R15D, around `body`.
fn looped(
    g: &mut Guest,
    mut body: impl FnMut(&mut CodeAssembler) -> Result<(), IcedError>,
) -> iced_x86::code_asm::CodeAssemblerResult {
    let ((), code) = g.assemble(CODE, |a| {
        let mut again = a.create_label();
        a.xor(r15d, r15d)?;
        a.set_label(&mut again)?;
        body(a)?;
        a.inc(r15d)?;
        a.cmp(r15d, ROUNDS as i32)?;
        a.jne(again)?;
        a.int(END)
    });
    code
}

/// The sum of 0, 1, … below [`ROUNDS`].
const SUM: u64 = ROUNDS as u64 * (ROUNDS as u64 - 1) / 2;
/// The same with each number cut to a byte.
fn sum_of_bytes() -> u64 {
    (0..u64::from(ROUNDS)).map(|i| i & 0xff).sum()
}

/// The very next instruction is changed.
#[test]
fn the_next_instruction() {
    let mut g = Guest::new(Bits::B64);
    looped(&mut g, |a| {
        let mut next = a.create_label();
        a.lea(rbx, ptr(next))?;
        // mov ecx, imm32: the immediate is behind the opcode.
        a.mov(dword_ptr(rbx + 1), r15d)?;
        a.set_label(&mut next)?;
        a.mov(ecx, 0)?;
        a.add(rax, rcx)
    });
    assert_eq!(g.run_in_all_tiers().last.gpr[0], SUM);
}

/// An instruction of the block that runs is changed, some instructions on, and then one that has run already.
#[test]
fn the_own_block() {
    let mut g = Guest::new(Bits::B64);
    looped(&mut g, |a| {
        let (mut before, mut behind) = (a.create_label(), a.create_label());
        a.nop()?;
        a.set_label(&mut before)?;
        a.add(rdx, 0)?;
        a.lea(rbx, ptr(behind))?;
        a.mov(byte_ptr(rbx + 1), r15b)?;
        a.lea(rsi, ptr(rsi + rdi * 2))?;
        a.nop()?;
        a.set_label(&mut behind)?;
        a.mov(cl, 0)?;
        a.movzx(ecx, cl)?;
        a.add(rax, rcx)?;
        a.lea(rbx, ptr(before))?;
        // add rdx, imm8: counts by 1 in odd rounds from here on.
        a.mov(ecx, r15d)?;
        a.and(ecx, 1)?;
        a.mov(byte_ptr(rbx + 3), cl)
    });
    let ran = g.run_in_all_tiers();
    assert_eq!(ran.last.gpr[0], sum_of_bytes());
    // The change of round i counts in round i + 1.
    assert_eq!(ran.last.gpr[2], u64::from(ROUNDS / 2 - 1));
}

/// A popping x87 store into its own block runs on its own, and pops once.
#[test]
fn a_popping_store_into_the_own_block_pops_once() {
    let mut g = Guest::new(Bits::B64);
    looped(&mut g, |a| {
        let mut behind = a.create_label();
        a.fninit()?;
        a.fld1()?;
        a.fld1()?;
        a.mov(r14, u64::from(DATA))?;
        a.mov(dword_ptr(r14), r15d)?;
        a.fild(dword_ptr(r14))?;
        a.lea(rbx, ptr(behind))?;
        a.fstp(dword_ptr(rbx + 1))?;
        a.nop()?;
        a.set_label(&mut behind)?;
        a.mov(ecx, 0)?;
        a.add(rsi, rcx)?;
        a.fnstsw(ax)?;
        a.shr(eax, 11)?;
        a.and(eax, 7)?;
        a.add(rdx, rax)
    });
    let ran = g.run_in_all_tiers();
    // Two registers stay: TOP is 6.
    assert_eq!(ran.last.gpr[2], 6 * u64::from(ROUNDS));
    assert_eq!(ran.last.gpr[6], (0..ROUNDS).map(|i| u64::from((i as f32).to_bits())).sum::<u64>());
}

/// A function in another page is changed by every kind of store there is.
#[test]
fn another_page_by_every_kind_of_store() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    // RBX is where the immediate of the function's MOV EAX, imm32 is; R15D has what to put there.
    let stores: [(&str, Emit); 16] = [
        ("mov", |a| a.mov(dword_ptr(rbx), r15d)),
        ("mov, wide", |a| {
            a.mov(rcx, 0xc3u64 << 32)?;
            a.or(rcx, r15)?;
            a.mov(qword_ptr(rbx), rcx)
        }),
        ("two halves", |a| {
            a.mov(word_ptr(rbx), r15w)?;
            a.mov(ecx, r15d)?;
            a.shr(ecx, 16)?;
            a.mov(word_ptr(rbx + 2), cx)
        }),
        ("xchg", |a| {
            a.mov(ecx, r15d)?;
            a.xchg(dword_ptr(rbx), ecx)
        }),
        ("add", |a| {
            a.mov(ecx, r15d)?;
            a.sub(ecx, dword_ptr(rbx))?;
            a.add(dword_ptr(rbx), ecx)
        }),
        ("lock xadd", |a| {
            a.mov(ecx, r15d)?;
            a.sub(ecx, dword_ptr(rbx))?;
            a.lock().xadd(dword_ptr(rbx), ecx)
        }),
        ("lock cmpxchg", |a| {
            a.mov(eax, dword_ptr(rbx))?;
            a.lock().cmpxchg(dword_ptr(rbx), r15d)
        }),
        ("cmpxchg8b", |a| {
            a.mov(r14, rbx)?;
            a.mov(eax, dword_ptr(rbx))?;
            a.mov(edx, dword_ptr(rbx + 4))?;
            a.mov(ecx, edx)?;
            a.mov(ebx, r15d)?;
            a.lock().cmpxchg8b(qword_ptr(r14))
        }),
        ("stosd", |a| {
            a.mov(rdi, rbx)?;
            a.mov(eax, r15d)?;
            a.stosd()
        }),
        ("rep movsb", |a| {
            a.mov(dword_ptr(DATA), r15d)?;
            a.mov(rdi, rbx)?;
            a.mov(esi, DATA)?;
            a.mov(ecx, 4)?;
            a.rep().movsb()
        }),
        ("rep movsb backwards", |a| {
            a.mov(dword_ptr(DATA), r15d)?;
            a.lea(rdi, ptr(rbx + 3))?;
            a.mov(esi, DATA + 3)?;
            a.mov(ecx, 4)?;
            a.std()?;
            a.rep().movsb()?;
            a.cld()
        }),
        ("push", |a| {
            a.mov(rcx, 0xc3u64 << 32)?;
            a.or(rcx, r15)?;
            a.mov(r14, rsp)?;
            a.lea(rsp, ptr(rbx + 8))?;
            a.push(rcx)?;
            a.mov(rsp, r14)
        }),
        ("movups", |a| {
            a.movups(xmm0, xmmword_ptr(rbx))?;
            a.movd(xmm1, r15d)?;
            a.movss(xmm0, xmm1)?;
            a.movups(xmmword_ptr(rbx), xmm0)
        }),
        ("movd", |a| {
            a.movd(xmm0, r15d)?;
            a.movd(dword_ptr(rbx), xmm0)
        }),
        ("fistp", |a| {
            a.mov(dword_ptr(DATA), r15d)?;
            a.fild(dword_ptr(DATA))?;
            a.fistp(dword_ptr(rbx))
        }),
        ("bts and btr", |a| {
            // The immediate is 0: bit 4 is set in odd rounds and cleared in even ones.
            a.mov(dword_ptr(rbx), r15d)?;
            a.mov(ecx, 4)?;
            a.btc(dword_ptr(rbx), ecx)?;
            a.mov(ecx, 4)?;
            a.lock().btc(dword_ptr(rbx), ecx)
        }),
    ];
    for (name, store) in stores {
        let mut g = Guest::new(Bits::B64);
        let function = CODE + 0x3ff0;
        g.assemble(function, |a| {
            a.mov(eax, -1)?;
            a.ret()
        });
        looped(&mut g, |a| {
            a.mov(ebx, function + 1)?;
            store(a)?;
            a.call(u64::from(function))?;
            a.add(r13, rax)
        });
        assert_eq!(g.run_in_all_tiers().last.gpr[13], SUM, "{name}");
    }
}

/// A store across two pages that both hold code changes both.
#[test]
fn a_store_across_two_code_pages() {
    let mut g = Guest::new(Bits::B64);
    let edge = CODE + 0x5000;
    // mov al, imm; ret ends the one page, mov cl, imm; ret begins the next.
    g.put(edge - 3, &[0xb0, 0, 0xc3, 0xb1, 0, 0xc3]);
    looped(&mut g, |a| {
        a.mov(ebx, edge)?;
        a.xor(eax, eax)?;
        a.xor(ecx, ecx)?;
        // Bytes -2..2 around the edge: imm, ret, mov cl, imm.
        a.mov(edx, r15d)?;
        a.and(edx, 0xff)?;
        a.mov(edi, edx)?;
        a.shl(edi, 24)?;
        a.or(edx, edi)?;
        a.or(edx, 0x00b1_c300)?;
        a.mov(dword_ptr(rbx - 2), edx)?;
        a.call(u64::from(edge - 3))?;
        a.call(u64::from(edge))?;
        a.add(r13, rax)?;
        a.add(r14, rcx)
    });
    let ran = g.run_in_all_tiers();
    assert_eq!((ran.last.gpr[13], ran.last.gpr[14]), (sum_of_bytes(), sum_of_bytes()));
}

/// Data beside code, in the same page and the same 64 bytes: the code goes on, the data is right.
#[test]
fn data_in_a_code_page() {
    let mut g = Guest::new(Bits::B64);
    let place = CODE + 0x4000;
    g.assemble(place, |a| {
        a.add(rax, qword_ptr(place + 0x20))?;
        a.ret()
    });
    looped(&mut g, |a| {
        a.mov(dword_ptr(place + 0x20), r15d)?;
        a.inc(qword_ptr(place + 0x800))?;
        a.call(u64::from(place))
    });
    g.dump(place + 0x800, 8);
    let ran = g.run_in_all_tiers();
    assert_eq!((ran.last.gpr[0], ran.qword(0, 0)), (SUM, u64::from(ROUNDS)));
}

/// Code is changed through another linear address of its page.
#[test]
fn by_another_mapping() {
    let mut g = Guest::new(Bits::B64);
    let (function, alias) = (CODE + 0x3000, 0x30_0000);
    g.map(alias, u64::from(function) | pte::P | pte::RW);
    g.assemble(function, |a| {
        a.mov(eax, -1)?;
        a.ret()
    });
    looped(&mut g, |a| {
        a.mov(dword_ptr(alias + 1), r15d)?;
        a.call(u64::from(function))?;
        a.add(r13, rax)?;
        // And runs there, too.
        a.call(u64::from(alias))?;
        a.add(r13, rax)
    });
    assert_eq!(g.run_in_all_tiers().last.gpr[13], 2 * SUM);
}

/// The page of a function is exchanged for another with other code.
#[test]
fn a_page_is_remapped() {
    let mut g = Guest::new(Bits::B64);
    let at = 0x30_0000;
    let pages = [CODE + 0x3000, CODE + 0x4000];
    for (i, page) in pages.into_iter().enumerate() {
        g.assemble(page, |a| {
            a.mov(eax, 1000 * i as u32 + 1)?;
            a.ret()
        });
    }
    let entry = g.pte_at(at);
    looped(&mut g, |a| {
        a.mov(ecx, r15d)?;
        a.and(ecx, 1)?;
        a.shl(ecx, 12)?;
        a.add(ecx, (pages[0] | 3) as i32)?;
        a.mov(dword_ptr(entry), ecx)?;
        a.invlpg(byte_ptr(at))?;
        a.call(u64::from(at))?;
        a.add(r13, rax)
    });
    assert_eq!(g.run_in_all_tiers().last.gpr[13], u64::from(ROUNDS / 2) * (1 + 1001));
}

/// An instruction across two pages, the second of which is remapped to one with another rest of it.
#[test]
fn an_instruction_across_pages_whose_rest_changes() {
    let mut g = Guest::new(Bits::B64);
    // Two linear pages; the physical page of the second is one of two.
    let at = 0x30_1000;
    let (first, rests) = (CODE + 0x3000, [CODE + 0x4000, CODE + 0x5000]);
    g.map(at - 0x1000, u64::from(first) | pte::P);
    // mov eax, imm32 with one byte of the immediate in the first page; ret.
    g.put(first + 0xffe, &[0xb8, 0x11]);
    g.put(rests[0], &[0x22, 0x00, 0x00, 0xc3]);
    g.put(rests[1], &[0x33, 0x44, 0x00, 0xc3]);
    let entry = g.pte_at(at);
    looped(&mut g, |a| {
        a.mov(ecx, r15d)?;
        a.and(ecx, 1)?;
        a.shl(ecx, 12)?;
        a.add(ecx, (rests[0] | 3) as i32)?;
        a.mov(dword_ptr(entry), ecx)?;
        a.invlpg(byte_ptr(at))?;
        a.call(u64::from(at - 2))?;
        a.add(r13, rax)
    });
    assert_eq!(g.run_in_all_tiers().last.gpr[13], u64::from(ROUNDS / 2) * (0x2211 + 0x44_3311));
}

/// An instruction across two pages, changed in either of them.
#[test]
fn an_instruction_across_pages_is_changed() {
    let mut g = Guest::new(Bits::B64);
    let edge = CODE + 0x5000;
    g.put(edge - 3, &[0xb8, 0, 0, 0, 0, 0xc3]);
    looped(&mut g, |a| {
        // The low byte lies before the edge, the high one behind.
        a.mov(byte_ptr(edge - 2), r15b)?;
        a.mov(ecx, r15d)?;
        a.shr(ecx, 8)?;
        a.mov(byte_ptr(edge - 1), cl)?;
        a.mov(byte_ptr(edge), r15b)?;
        a.call(u64::from(edge - 3))?;
        a.add(r13, rax)
    });
    let wanted: u64 = (0..u64::from(ROUNDS)).map(|i| i | (i & 0xff) << 16).sum();
    assert_eq!(g.run_in_all_tiers().last.gpr[13], wanted);
}

/// An instruction across two pages, the second of which is not there: #PF for the fetch, at the instruction, with CR2 the first
/// byte that is missing; mapped and run again.
#[test]
fn an_instruction_across_pages_faults_and_goes_on() {
    const ROUNDS: u32 = 200;
    let mut g = Guest::new(Bits::B64);
    let edge = CODE + 0x6000;
    // inc rbx; mov eax, imm32 across the edge; ret
    g.put(edge - 5, &[0x48, 0xff, 0xc3, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3]);
    let entry = g.pte_at(edge);
    let whole = edge | 3;
    g.assemble(CODE, |a| {
        let (mut again, mut mapped) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(dword_ptr(entry), 0)?;
        a.invlpg(byte_ptr(edge))?;
        a.lea(rdx, ptr(mapped))?;
        a.mov(qword_ptr(RESUME), rdx)?;
        a.mov(eax, 1)?;
        a.call(u64::from(edge - 5))?;
        a.ud2()?;
        a.set_label(&mut mapped)?;
        a.add(rsp, 8)?;
        a.mov(dword_ptr(entry), whole as i32)?;
        a.call(u64::from(edge - 5))?;
        a.add(r13, rax)?;
        a.inc(r15d)?;
        a.cmp(r15d, ROUNDS as i32)?;
        a.jne(again)?;
        a.int(END)
    });
    let ran = g.run_in_all_tiers();
    assert_eq!(ran.log.len(), ROUNDS as usize);
    for (i, r) in ran.log.iter().enumerate() {
        let fetch = 0x10;
        assert_eq!((r.vector, r.error, r.cr2, r.rip), (14, fetch, u64::from(edge), u64::from(edge - 2)), "{r:x?}");
        // What came before in the block has happened, nothing of the rest has.
        assert_eq!((r.gpr[0], r.gpr[3]), (1, 2 * i as u64 + 1));
    }
    assert_eq!(ran.last.gpr[13], u64::from(ROUNDS) * 0x1234_5678);
    assert_eq!(ran.last.gpr[3], 2 * u64::from(ROUNDS));
}

/// Execution runs off the end of a page into one that may not be executed, in the middle of straight-line code.
#[test]
fn the_next_page_is_not_executable() {
    let mut g = Guest::new(Bits::B64);
    let edge = CODE + 0x6000;
    g.map(edge, u64::from(edge) | pte::P | pte::NX);
    g.put(edge - 4, &[0xff, 0xc3, 0xff, 0xc3]); // inc ebx, twice
    g.put(edge, &[0xff, 0xc3]);
    g.assemble(CODE, |a| {
        let mut back = a.create_label();
        a.lea(rdx, ptr(back))?;
        a.mov(qword_ptr(RESUME), rdx)?;
        a.jmp(u64::from(edge - 4))?;
        a.set_label(&mut back)?;
        a.int(END)
    });
    let ran = g.run_in_all_tiers();
    let r = ran.log[0];
    assert_eq!((r.vector, r.error, r.cr2, r.rip, r.gpr[3]), (14, 0x11, u64::from(edge), u64::from(edge), 2));
}

/// REP STOS runs over the instruction behind it.
#[test]
fn a_string_store_over_the_next_instruction() {
    let mut g = Guest::new(Bits::B64);
    looped(&mut g, |a| {
        let mut behind = a.create_label();
        a.lea(rdi, ptr(behind))?;
        // Eight NOPs in odd rounds, eight times INC RAX's last byte otherwise made whole again.
        a.mov(eax, 0x90)?;
        a.mov(ecx, 6)?;
        a.test(r15b, 1)?;
        let mut odd = a.create_label();
        a.jne(odd)?;
        a.mov(dword_ptr(rdi), 0x48c3_ff48u32)?;
        a.mov(word_ptr(rdi + 4), 0xc3ffu32)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut odd)?;
        a.rep().stosb()?;
        a.set_label(&mut behind)?;
        // inc rbx; inc rbx
        a.db(&[0x48, 0xff, 0xc3, 0x48, 0xff, 0xc3])
    });
    assert_eq!(g.run_in_all_tiers().last.gpr[3], u64::from(ROUNDS));
}

/// Devices and page walks write, too: an accessed flag set in a page that holds code.
#[test]
fn a_walk_writes_into_a_code_page() {
    let mut g = Guest::new(Bits::B64);
    // The table of 4 MiB..6 MiB is a page with a function behind its entries.
    let table = CODE + 0x7000;
    let target = MAPPED;
    let directory = g.pte_at(0) - 0x1000;
    g.put(directory + 16, &u64::from(table | 3).to_le_bytes());
    g.assemble(table + 0x800, |a| {
        // The entry's accessed flag, as an operand beside it.
        a.mov(eax, dword_ptr(table))?;
        a.ret()
    });
    let entry = DATA | 3;
    looped(&mut g, |a| {
        a.mov(dword_ptr(table), entry as i32)?;
        a.invlpg(byte_ptr(target))?;
        a.call(u64::from(table + 0x800))?;
        a.and(eax, 0x20)?;
        a.add(r13, rax)?;
        a.mov(ecx, dword_ptr(target))?;
        a.call(u64::from(table + 0x800))?;
        a.and(eax, 0x20)?;
        a.add(r14, rax)
    });
    let ran = g.run_in_all_tiers();
    assert_eq!((ran.last.gpr[13], ran.last.gpr[14]), (0, 0x20 * u64::from(ROUNDS)));
}
