//! Any bytes under any key translate to a valid block, quickly.
#![allow(missing_docs)]

use twofold_arch::TbFlags;
use twofold_arch::cpuid::Features;
use twofold_frontend::{Request, translate_block};
use twofold_ir::Exit;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn key(rng: &mut Rng) -> TbFlags {
    let f = rng.next() as u32;
    let f = if f & 3 == 3 { f & !1 } else { f };
    TbFlags(f & if f >> 31 != 0 { !0 } else { !(TbFlags::TF | TbFlags::ONE_INSN) })
}

#[test]
fn random_bytes_translate() {
    let mut rng = Rng(0x1234_5678_9abc_def1);
    let (mut blocks, mut insns, mut unimplemented) = (0u32, 0usize, std::collections::BTreeMap::new());
    for round in 0..60_000u32 {
        let len = 1 + (rng.next() % 200) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        // Prefixes and the two-byte map, often.
        match round % 4 {
            0 => bytes[0] = 0x0f,
            1 => bytes[0] = [0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x2e, 0x48, 0xc5][rng.next() as usize % 8],
            _ => {}
        }
        let off = 4096 - len as u16;
        let flags = key(&mut rng);
        let features = if round % 3 == 0 { Features(u128::from(rng.next())) } else { Features::ALL };
        let tail = rng.next().to_le_bytes();
        let fetchable = rng.next() & 1 != 0;
        let mut next_page = || {
            let mut t = [0u8; 15];
            t[..8].copy_from_slice(&tail);
            fetchable.then_some(t)
        };
        let req = Request { flags, off, page: &bytes, next_page: &mut next_page, features, max_insns: 48 };
        let Ok(block) = translate_block(req) else {
            assert!(!fetchable);
            continue;
        };
        twofold_ir::verify::verify(&block).unwrap_or_else(|e| panic!("{bytes:02x?} {flags:?}: {e}"));
        assert!(block.end.is_some() && !block.insns.is_empty());
        if flags.0 & (TbFlags::TF | TbFlags::ONE_INSN) != 0 {
            assert_eq!(block.insns.len(), 1);
            let chained = |e: &Exit| matches!(e, Exit::Jump { .. } | Exit::JumpFar { .. } | Exit::Indirect { .. });
            assert!(!block.end.iter().chain(block.exits.iter().map(|e| &e.exit)).any(chained), "{bytes:02x?}");
        }
        if block.unimplemented != 0 {
            *unimplemented.entry(twofold_frontend::code_name(block.unimplemented)).or_insert(0u32) += 1;
        }
        blocks += 1;
        insns += block.insns.len();
    }
    println!("{blocks} blocks, {insns} instructions");
    let names: Vec<_> =
        unimplemented.keys().filter(|n| !n.starts_with("EVEX") && !n.starts_with("VEX")).cloned().collect();
    println!("forms that exist on some CPU and not here: {}", names.join(" "));
}

#[test]
fn crossing_instructions() {
    let flags = TbFlags(2 | TbFlags::PROTECTED | TbFlags::LONG);
    // nop; nop; then `mov eax, imm32` whose immediate is in the next page.
    let bytes = [0x90u8, 0x90, 0xb8, 0x11];
    let tail = |n: u8| {
        let mut t = [0u8; 15];
        t[0] = n;
        Some(t)
    };
    let mut asked = false;
    let mut never = || {
        asked = true;
        None
    };
    let req = |off: u16, page: &'static [u8], next: &mut dyn FnMut() -> Option<[u8; 15]>| {
        translate_block(Request { flags, off, page, next_page: next, features: Features::ALL, max_insns: 32 })
    };
    let page: &'static [u8] = Box::leak(Box::new(bytes));
    let block = req(4092, page, &mut never).unwrap();
    assert_eq!((block.insns.len(), block.end), (2, Some(Exit::JumpFar { off: 4094 })));
    assert!(!asked && !block.crosses_page);
    assert!(req(4094, &page[2..], &mut || None).is_err());
    let block = req(4094, &page[2..], &mut || tail(0x22)).unwrap();
    assert!(block.crosses_page);
    assert_eq!((block.insns[0].len, block.end), (5, Some(Exit::JumpFar { off: 4099 })));
}

#[test]
fn too_long_is_general_protection() {
    let flags = TbFlags(2 | TbFlags::PROTECTED | TbFlags::LONG);
    let bytes = [0x66u8; 64];
    let mut none = || None;
    let req = Request { flags, off: 0, page: &bytes, next_page: &mut none, features: Features::ALL, max_insns: 32 };
    let block = translate_block(req).unwrap();
    assert_eq!(block.end, Some(Exit::Raise { off: 0, exception: twofold_arch::Exception::GP0 }));
    assert_eq!((block.insns.len(), block.retired), (1, 0));
}

/// Prints what translating costs; the assertion is generous, for debug builds and busy machines.
#[test]
fn translation_is_cheap() {
    // mov rax, [rdi+8]; add rax, rcx; mov [rdi+16], rax; test rax, rax; jne
    let bytes = [0x48u8, 0x8b, 0x47, 8, 0x48, 1, 0xc8, 0x48, 0x89, 0x47, 16, 0x48, 0x85, 0xc0, 0x75, 0x10, 0x90];
    let flags = TbFlags(2 | TbFlags::PROTECTED | TbFlags::LONG);
    let once = || {
        let mut none = || None;
        let req = Request { flags, off: 0, page: &bytes, next_page: &mut none, features: Features::ALL, max_insns: 48 };
        translate_block(req).unwrap()
    };
    let block = once();
    assert_eq!(block.insns.len(), 5);
    let n = 100_000;
    let start = std::time::Instant::now();
    for _ in 0..n {
        std::hint::black_box(once());
    }
    let each = start.elapsed() / n;
    println!("{each:?} for a block of 5 instructions, {} ops", block.ops.len());
    assert!(each.as_micros() < 100);
}
