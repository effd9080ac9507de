//! Floating-point values that matter, and registers full of them.

use crate::insn::{Regs, Rng};

/// 32 bits as a float's.
pub fn float32(rng: &mut Rng) -> u32 {
    const EDGES: [u32; 26] = [
        0,
        0x8000_0000,
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x3fc0_0000,
        0x3f00_0000,
        0x4020_0000,
        0x4eff_ffff,
        0x4f00_0000,
        0xcf00_0000,
        0xcf00_0001,
        0x5f00_0000,
        0xdf00_0000,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc1_2345,
        0x7f80_0001,
        0xffa5_5aa5,
        0x3eaa_aaab,
    ];
    match rng.below(4) {
        0 => EDGES[rng.below(26) as usize],
        1 => (rng.next() as u32 & 0x807f_ffff) | (120 + rng.below(40) as u32) << 23,
        2 => (rng.next() as i16 as f32 / 4.0).to_bits(),
        _ => rng.next() as u32,
    }
}

/// 64 bits as a double's.
pub fn float64(rng: &mut Rng) -> u64 {
    const EDGES: [u64; 28] = [
        0,
        0x8000_0000_0000_0000,
        1,
        0x8000_0000_0000_0001,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x3ff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x3fe0_0000_0000_0000,
        0x4004_0000_0000_0000,
        0x41df_ffff_ffc0_0000,
        0x41df_ffff_ffe0_0000,
        0x41e0_0000_0000_0000,
        0xc1e0_0000_0000_0000,
        0xc1e0_0000_0020_0000,
        0x43df_ffff_ffff_ffff,
        0x43e0_0000_0000_0000,
        0xc3e0_0000_0000_0000,
        0x47ef_ffff_f000_0000,
        0x3690_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0xfff8_1234_5678_9abc,
        0x7ff0_0000_0000_0001,
        0xfff4_0000_dead_beef,
        0x3fd5_5555_5555_5555,
    ];
    match rng.below(4) {
        0 => EDGES[rng.below(28) as usize],
        1 => (rng.next() & 0x800f_ffff_ffff_ffff) | (1000 + rng.below(60)) << 52,
        2 => (rng.next() as i32 as f64 / 4.0).to_bits(),
        _ => rng.next(),
    }
}

/// 64 bits: a double, two floats, or an integer.
pub fn lanes(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => float64(rng),
        1 => u64::from(float32(rng)) | u64::from(float32(rng)) << 32,
        _ => rng.value(),
    }
}

/// Random x87 registers, tags and TOP; now and then an exception that is pending.
pub fn random_x87(r: &mut Regs, rng: &mut Rng) {
    for i in 0..8 {
        let mut v = [0; 10];
        v[..8].copy_from_slice(&rng.value().to_le_bytes());
        v[8..].copy_from_slice(&(rng.next() as u16).to_le_bytes());
        r.set_st(i, v);
    }
    r.set_ftw(rng.next() as u8);
    let pending = rng.below(16) == 0;
    r.set_fcw(if pending { 0x37e } else { 0x37f });
    r.set_fsw((rng.next() as u16 & 0x7800) | if pending { 0x8081 } else { 0 });
}
