//! FXSAVE, XSAVE and their kin, the x87 environment and MXCSR: the memory images and what they load, on the host CPU against
//! translation and the runtime's helpers, in 64- and 32-bit code.
//!
//! Not compared: the x87 instruction and operand pointers and the opcode (the harness's own code changes them, and AMD
//! processors store them only with an exception pending), and MXCSR_MASK (the host has one bit more).
#![cfg(all(target_arch = "x86_64", not(portable_host)))]
#![allow(missing_docs)]

use twofold_tests::insn::native::Native;
use twofold_tests::insn::{
    MIDDLE, Mode, Outcome, Regs, Rng, SCRATCH, SCRATCH_LEN, TestEnv, reference, run_block, translate_one,
};
use twofold_tests::oracle::{self, helpers_of};

const KEY64: u32 = oracle::AVX64.0;
const KEY32: u32 = oracle::AVX32.0;

/// A kind of image, for what is not compared.
#[derive(Clone, Copy, PartialEq)]
enum Image {
    Area,
    Env32,
    Env16,
    None,
}

struct Case {
    name: &'static str,
    bytes: &'static [u8],
    image: Image,
    only64: bool,
}

const fn case(name: &'static str, bytes: &'static [u8], image: Image) -> Case {
    Case { name, bytes, image, only64: false }
}
const fn wide(name: &'static str, bytes: &'static [u8]) -> Case {
    Case { name, bytes, image: Image::Area, only64: true }
}

const CASES: &[Case] = &[
    case("fxsave", &[0x0f, 0xae, 0x03], Image::Area),
    case("fxrstor", &[0x0f, 0xae, 0x0b], Image::Area),
    case("xsave", &[0x0f, 0xae, 0x23], Image::Area),
    case("xrstor", &[0x0f, 0xae, 0x2b], Image::Area),
    case("xsaveopt", &[0x0f, 0xae, 0x33], Image::Area),
    case("xsavec", &[0x0f, 0xc7, 0x23], Image::Area),
    wide("fxsave64", &[0x48, 0x0f, 0xae, 0x03]),
    wide("fxrstor64", &[0x48, 0x0f, 0xae, 0x0b]),
    wide("xsave64", &[0x48, 0x0f, 0xae, 0x23]),
    wide("xrstor64", &[0x48, 0x0f, 0xae, 0x2b]),
    wide("xsaveopt64", &[0x48, 0x0f, 0xae, 0x33]),
    wide("xsavec64", &[0x48, 0x0f, 0xc7, 0x23]),
    case("ldmxcsr", &[0x0f, 0xae, 0x53, 24], Image::None),
    case("stmxcsr", &[0x0f, 0xae, 0x5b, 24], Image::None),
    case("fnstenv", &[0xd9, 0x33], Image::Env32),
    case("fldenv", &[0xd9, 0x23], Image::None),
    case("fnsave", &[0xdd, 0x33], Image::Env32),
    case("frstor", &[0xdd, 0x23], Image::None),
    case("fnstenv 16", &[0x66, 0xd9, 0x33], Image::Env16),
    case("fldenv 16", &[0x66, 0xd9, 0x23], Image::None),
    case("fnsave 16", &[0x66, 0xdd, 0x33], Image::Env16),
    case("frstor 16", &[0x66, 0xdd, 0x23], Image::None),
];

fn randomize(r: &mut Regs, rng: &mut Rng) {
    for i in 0..8 {
        let mut v = [0; 10];
        v[..8].copy_from_slice(&rng.value().to_le_bytes());
        v[8..].copy_from_slice(&[rng.next() as u8, [0, 0x80, 0x7f, 0xff, 0x40][rng.below(5) as usize]]);
        r.set_st(i, v);
    }
    for i in 0..16 {
        r.set_xmm(i, u128::from(rng.next() | 1) << 64 | u128::from(rng.value()));
    }
    let avx = rng.below(4) != 0;
    r.high = core::array::from_fn(|_| if avx { u128::from(rng.next()) << 40 } else { 0 });
    r.set_ftw(rng.next() as u8);
    r.set_fcw(0x37f & !(rng.next() as u16 & 0x300));
    r.set_fsw(rng.next() as u16 & 0x7f7f);
    r.set_mxcsr(0x1f80 | rng.next() as u32 & 0xffff);
    r.gpr[0] = rng.below(8);
    r.gpr[2] = 0;
    r.gpr[3] = MIDDLE + if rng.below(16) == 0 { 16 * rng.below(4) + rng.below(16) } else { 0 };
}

/// An image to load: control words with few reserved bits, a header that is right more often than not.
fn random_image(mem: &mut [u8], rng: &mut Rng, env: bool) {
    let at = SCRATCH_LEN / 2;
    for b in &mut mem[at - 64..at + 1024] {
        *b = rng.next() as u8;
    }
    let fcw = if rng.below(2) == 0 { 0x37f } else { rng.next() as u16 };
    mem[at..at + 2].copy_from_slice(&fcw.to_le_bytes());
    if env && rng.below(2) == 0 {
        mem[at + 4..at + 6].copy_from_slice(&(rng.next() as u16 & 0x3800).to_le_bytes());
    }
    let reserved = if rng.below(8) == 0 { 1 << (18 + rng.below(8)) } else { 0 };
    mem[at + 24..at + 28].copy_from_slice(&(rng.next() as u32 & 0xffff | reserved).to_le_bytes());
    let (mut bv, mut comp) = (rng.below(8), 0);
    if rng.below(3) == 0 {
        comp = 1 << 63 | rng.below(8);
        bv &= comp;
    }
    match rng.below(12) {
        0 => bv |= 1 << 40,
        1 => comp |= 1 << (20 + rng.below(30)),
        2 => bv = rng.below(8),
        _ => {}
    }
    let header = at + 512;
    mem[header..header + 64].fill(0);
    mem[header..header + 8].copy_from_slice(&bv.to_le_bytes());
    mem[header + 8..header + 16].copy_from_slice(&comp.to_le_bytes());
    if rng.below(12) == 0 {
        mem[header + 16 + rng.below(48) as usize] = 1;
    }
}

/// Makes what is not compared equal.
fn forget(case: &Case, mem: &mut [u8], at: usize) {
    match case.image {
        Image::Area => {
            mem[at + 6..at + 24].fill(0);
            mem[at + 28..at + 32].fill(0);
        }
        Image::Env32 => mem[at + 12..at + 28].fill(0),
        Image::Env16 => mem[at + 6..at + 14].fill(0),
        Image::None => {}
    }
}

fn run(case: &Case, mode: Mode, key: u32, times: usize) -> Result<usize, String> {
    let mut native = Native::lock();
    let block = translate_one(case.bytes, twofold_arch::TbFlags(key));
    native.set_code(case.bytes, mode);
    let mut rng = Rng(0x1234_5678_9abc_def1 ^ u64::from(key));
    let mut mem: Vec<u8> = vec![0; SCRATCH_LEN];
    let mut env = TestEnv::new(SCRATCH, mem.clone());
    env.helpers = if mode == Mode::Bits64 { helpers_of::<KEY64> } else { helpers_of::<KEY32> };
    let registers = if mode == Mode::Bits64 { 16 } else { 8 };
    let mut done = 0;
    for i in 0..times {
        let mut input = Regs::new();
        input.gpr[4] = mode.middle();
        randomize(&mut input, &mut rng);
        random_image(&mut mem, &mut rng, case.image == Image::None);
        let (mut a, mut b, mut mem_a) = (input.clone(), input.clone(), mem.clone());
        env.mem.copy_from_slice(&mem);
        let host = native.run(&mut a, &mut mem_a);
        let ours = run_block(&block, case.bytes.len(), &mut b, &mut env, &mut reference);
        let fail = |what: String| Err(format!("{} {mode:?} run {i}: {what}", case.name));
        if host != ours {
            return fail(format!("host {host:?}, ours {ours:?}; header {:x?}", &mem[SCRATCH_LEN / 2 + 512..][..24]));
        }
        let at = (input.gpr[3] - SCRATCH) as usize;
        forget(case, &mut mem_a, at);
        forget(case, &mut env.mem, at);
        if let Some(p) = (0..SCRATCH_LEN).find(|&p| mem_a[p] != env.mem[p]) {
            let off = p as i64 - at as i64;
            return fail(format!(
                "byte {off} is {:x?} on the host, {:x?} here",
                &mem_a[p..p + 16],
                &env.mem[p..p + 16]
            ));
        }
        if a.fx[..5] != b.fx[..5] {
            return fail(format!("fcw fsw ftw {:x?} on the host, {:x?} here", &a.fx[..5], &b.fx[..5]));
        }
        if a.mxcsr() != b.mxcsr() {
            return fail(format!("mxcsr {:x} on the host, {:x} here", a.mxcsr(), b.mxcsr()));
        }
        if let Some(n) = (0..8).find(|&n| a.st(n) != b.st(n)) {
            return fail(format!("st{n} {:x?} on the host, {:x?} here", a.st(n), b.st(n)));
        }
        if let Some(n) = (0..registers).find(|&n| a.xmm(n) != b.xmm(n)) {
            return fail(format!("xmm{n} {:x} on the host, {:x} here", a.xmm(n), b.xmm(n)));
        }
        if let Some(n) = (0..registers).find(|&n| a.high[n] != b.high[n]) {
            return fail(format!("ymm{n}'s high half {:x} on the host, {:x} here", a.high[n], b.high[n]));
        }
        done += usize::from(host == Outcome::Done);
    }
    Ok(done)
}

#[test]
fn images_and_loads() {
    let (mut done, mut failures) = (0, Vec::new());
    for case in CASES {
        for (mode, key) in [(Mode::Bits64, KEY64), (Mode::Bits32, KEY32)] {
            if mode == Mode::Bits32 && case.only64 {
                continue;
            }
            match run(case, mode, key, 500) {
                Ok(n) => done += n,
                Err(e) => failures.push(e),
            }
        }
    }
    println!("save areas: {} instructions, {done} completed runs compared", CASES.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
