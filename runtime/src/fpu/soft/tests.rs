//! The x87 in integers against the host's own, over all encodings, register contents, control words and memory operands.

use super::*;
use crate::fpu::{host, x87};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// A register's contents: anything, numbers near one another, near the ends, whole ones, and what is special.
    fn real(&mut self) -> [u64; 2] {
        let significand = match self.below(5) {
            0 => 1 << 63,
            1 => self.next() | 1 << 63,
            2 => (self.next() | 1 << 63) & u64::MAX << self.below(64),
            3 => u64::MAX << self.below(3) | 1 << 63,
            _ => self.next(),
        };
        let sign = (self.next() & 1) << 15;
        let field = match self.below(8) {
            0 => [0, 0, 0x7fff, 0x7fff, 1, 0x7ffe][self.below(6) as usize],
            1..=3 => 0x3fff - 4 + self.below(8),
            4 => 0x3fff - 70 + self.below(140),
            5 => self.below(140),
            6 => 0x7ffe - self.below(140),
            _ => self.below(0x8000),
        };
        [if self.below(12) == 0 { 0 } else { significand }, sign | field]
    }
    fn registers(&mut self) -> Registers {
        let masked = self.below(2) == 0;
        let fcw = 0x40 | if masked { 0x3f } else { self.next() as u16 & 0x3f } | self.next() as u16 & 0xc00;
        let fcw = fcw | [0, 0x200, 0x300, 0x300][self.below(4) as usize];
        let ftw = if self.below(2) == 0 { self.next() as u16 & 0xff } else { 0x7f };
        Registers { fpr: core::array::from_fn(|_| self.real()), fcw, fsw: self.next() as u16 & 0x7f00, ftw }
    }
    fn operand(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let word = match self.below(4) {
            0 => self.next() & 0x807f_ffff_807f_ffff | (120 + self.below(16)) << 23 | (1016 + self.below(16)) << 52,
            1 => [0, 1, 0x7f80_0000, 0x7f80_0001, 0x7ff0 << 48, 0x7ff0_0000_0000_0001, 1 << 63, 1 << 31]
                [self.below(8) as usize],
            2 => self.next() >> self.below(64),
            _ => self.next(),
        };
        bytes[..8].copy_from_slice(&word.to_le_bytes());
        bytes[8..].copy_from_slice(&self.next().to_le_bytes());
        bytes
    }
}

fn is_function(first: u16, modrm: u8, memory: bool) -> bool {
    !memory && first == 1 && matches!(modrm, 0xf0..=0xf3 | 0xf9 | 0xfb | 0xfe | 0xff)
}

/// FCOM and kin, and FTST.
fn compares(first: u16, modrm: u8, memory: bool) -> bool {
    let op = modrm >> 3 & 7;
    match first {
        _ if memory => matches!((first, op), (0 | 2 | 4 | 6, 2 | 3)),
        0 | 4 | 6 => matches!(op, 2 | 3),
        1 => modrm == 0xe4,
        2 => op == 5,
        3 | 7 => matches!(op, 5 | 6),
        _ => matches!(op, 4 | 5),
    }
}

/// FLD ST(i), FNOP, FCMOVcc, FCOMI and kin.
fn keeps_c1(first: u16, modrm: u8, memory: bool) -> bool {
    let op = modrm >> 3 & 7;
    !memory && matches!((first, op), (1, 0 | 2) | (2 | 3, 0..=3) | (3 | 7, 5 | 6))
}

#[test]
fn every_instruction_as_on_the_host() {
    let mut rng = Rng(20_261_122);
    let (mut compared, mut wrong) = (0, Vec::new());
    for (memory, first, modrm) in (0..8)
        .flat_map(|first| (0..8).map(move |reg| (true, first, reg << 3)))
        .chain((0..8).flat_map(|first| (0xc0..=0xff).map(move |modrm| (false, first, modrm))))
    {
        let known = x87::decode(first << 8 | u16::from(modrm), memory);
        if !matches!(known.map(|i| i.kind), Some(x87::Kind::Compute { .. })) || is_function(first, modrm, memory) {
            continue;
        }
        // FBLD of digits beyond 9 is undefined.
        let decimal = memory && (first, modrm >> 3) == (7, 4);
        let mut shown = 0;
        for _ in 0..4000 {
            let (r, mut operand) = (rng.registers(), rng.operand());
            if decimal {
                operand.iter_mut().for_each(|b| *b = (*b >> 4).min(9) << 4 | (*b & 15).min(9));
            }
            let flags = rng.next() & 0x8d5;
            let (mut a, mut b) = (operand, operand);
            let host = host::run(r, first, modrm, memory, flags, &mut a);
            let ours = run(r, first, modrm, memory, flags, &mut b);
            compared += 1;
            let invalid = host.0.fsw & !r.fcw & fsw::IE != 0;
            let key = |(r, flags): (Registers, u64)| {
                // Only the 80 bits of a register; ES and B follow from the rest.
                let mut status = r.fsw & 0x7f7f;
                let mut flags = flags & rflags::ARITH;
                // With an unmasked invalid exception the SDM has comparisons set nothing, and C1 0 after these; AMD has not.
                if compares(first, modrm, memory) && invalid {
                    (status, flags) = (status & !(fsw::C0 | fsw::C2 | fsw::C3), 0);
                }
                if keeps_c1(first, modrm, memory) && status & fsw::SF == 0 {
                    status &= !fsw::C1;
                }
                (r.fpr.map(|[lo, hi]| [lo, hi & 0xffff]), status, r.ftw, flags)
            };
            if (key(host), a) != (key(ours), b) && shown < 3 {
                shown += 1;
                let (h, o) = (key(host), key(ours));
                let what = format!(
                    "DIFF {:02x} {:02x} {memory} fsw {:x} fpr {} ftw {} flags {:x} mem {}",
                    first + 0xd8,
                    modrm,
                    h.1 ^ o.1,
                    h.0 != o.0,
                    h.2 != o.2,
                    h.3 ^ o.3,
                    a != b
                );
                wrong.push(format!(
                    "{what}\n{:02x} {modrm:02x} memory {memory} operand {operand:02x?} flags {flags:x}\n  in   {}\n  host {} {:x} {a:02x?}\n  ours {} {:x} {b:02x?}",
                    first + 0xd8, show(&r), show(&host.0), host.1, show(&ours.0), ours.1
                ));
            }
        }
    }
    println!("x87: {compared} runs compared with the host");
    assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n"));
}

/// Control, status and tag word, then the registers in the order of the stack.
fn show(r: &Registers) -> String {
    let top = usize::from(r.fsw >> 11 & 7);
    let st: Vec<String> = (0..8)
        .map(|i| {
            let p = (top + i) & 7;
            let [lo, hi] = r.fpr[p];
            format!("{}{:04x}:{lo:016x}", if r.ftw >> p & 1 == 0 { "-" } else { "" }, hi & 0xffff)
        })
        .collect();
    format!("fcw {:x} fsw {:x} {}", r.fcw, r.fsw, st[..3].join(" "))
}

/// How far apart two results are, in units of the first one's last place.
fn distance(a: [u64; 2], b: [u64; 2]) -> u128 {
    let whole = |[lo, hi]: [u64; 2]| u128::from(hi & 0x7fff) << 63 | u128::from(lo & u64::MAX >> 1);
    if (a[1] ^ b[1]) & 0x8000 != 0 { u128::MAX } else { whole(a).abs_diff(whole(b)) }
}

/// Sines, tangents, powers and logarithms: exceptions, tags and what has no error as on the host, the rest near it.
#[test]
fn functions_near_the_hosts() {
    let mut rng = Rng(7);
    let (mut compared, mut wrong) = (0, Vec::new());
    for modrm in [0xf0, 0xf1, 0xf2, 0xf3, 0xf9, 0xfb, 0xfe, 0xff] {
        let (mut shown, mut most) = (0, 0);
        for _ in 0..4000 {
            // Whatever the operand, there is a result.
            let _ = run(rng.registers(), 1, modrm, false, 0, &mut [0; 16]);
            let mut r = rng.registers();
            // All results are rounded as the host's are when that is to the nearest.
            r.fcw = r.fcw & 0xf0ff | 0x300;
            let exponent = |r: &Registers, i: usize| r.fpr[(usize::from(r.fsw >> 11 & 7) + i) & 7][1] & 0x7fff;
            let top = usize::from(r.fsw >> 11 & 7);
            // F2XM1 and FYL2XP1 are defined near zero only; the others' errors grow with the operand.
            let limit = match modrm {
                0xf0 => Some(0x3ffe),
                0xf9 => Some(0x3ffc),
                0xf2 | 0xfb | 0xfe | 0xff => Some(0x4005),
                _ => None,
            };
            if let Some(limit) = limit.filter(|&l| exponent(&r, 0) > l && exponent(&r, 0) != 0x7fff) {
                r.fpr[top][1] = r.fpr[top][1] & 0x8000 | (limit - rng.below(20));
            }
            let mut none = [0; 16];
            let (a, _) = host::run(r, 1, modrm, false, 0, &mut none);
            let (b, _) = run(r, 1, modrm, false, 0, &mut none);
            compared += 1;
            // C1 and PE, OE, UE of an approximation are its own; so are C0, C2 (but out of range) and C3.
            let key = |r: &Registers| (r.fsw & 0x3847, r.ftw);
            let apart = (0..8).map(|i| distance(a.fpr[i], b.fpr[i])).max().unwrap_or(0);
            most = most.max(if apart < 1 << 40 { apart } else { 0 });
            if (key(&a) != key(&b) || apart > 1) && shown < 6 {
                shown += 1;
                wrong.push(format!(
                    "{modrm:02x} apart {apart:x}\n  in   {}\n  host {}\n  ours {}",
                    show(&r),
                    show(&a),
                    show(&b)
                ));
            }
        }
        println!("{modrm:02x}: at most {most} units apart");
    }
    println!("x87 functions: {compared} runs compared with the host");
    assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n"));
}
