//! Integer code: sorting, backtracking, division, dynamic programming, recursion and virtual calls.

use crate::{Random, mix};
use std::hint::black_box;

fn quicksort(v: &mut [u32]) {
    if v.len() < 12 {
        for i in 1..v.len() {
            let mut j = i;
            while j > 0 && v[j - 1] > v[j] {
                v.swap(j - 1, j);
                j -= 1;
            }
        }
        return;
    }
    let pivot = v[v.len() / 2];
    let (mut i, mut j) = (0, v.len() - 1);
    loop {
        while v[i] < pivot {
            i += 1;
        }
        while v[j] > pivot {
            j -= 1;
        }
        if i >= j {
            break;
        }
        v.swap(i, j);
        i += 1;
        j -= 1;
    }
    let (low, high) = v.split_at_mut(i);
    quicksort(low);
    quicksort(high);
}

pub fn sort(units: u64) -> Option<u64> {
    let (mut random, mut sum) = (Random::new(1), 0);
    for _ in 0..units {
        let mut v: Vec<u32> = (0..10_000).map(|_| random.next() as u32).collect();
        quicksort(&mut v);
        for _ in 0..4000 {
            let wanted = random.next() as u32;
            sum = mix(sum, v.partition_point(|&x| x < wanted) as u64);
        }
    }
    Some(sum)
}

fn place(all: u32, columns: u32, left: u32, right: u32) -> u64 {
    if columns == all {
        return 1;
    }
    let (mut free, mut found) = (all & !(columns | left | right), 0);
    while free != 0 {
        let bit = free & free.wrapping_neg();
        free ^= bit;
        found += place(all, columns | bit, (left | bit) << 1, (right | bit) >> 1);
    }
    found
}

pub fn queens(units: u64) -> Option<u64> {
    Some((0..units).fold(0, |sum, _| mix(sum, place(black_box((1 << 9) - 1), 0, 0, 0))))
}

pub fn divide(units: u64) -> Option<u64> {
    let (mut random, mut sum) = (Random::new(2), 0);
    for _ in 0..units {
        let (mut a, mut b) = (random.next() >> 8, random.next() >> 20);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        sum = mix(sum, a);
        let n = (random.next() as u32 >> 8) | 1;
        let mut d = 3u32;
        while d * d <= n && !n.is_multiple_of(d) {
            d += 2;
        }
        sum = mix(sum, u64::from(d));
    }
    Some(sum)
}

pub fn edit_distance(units: u64) -> Option<u64> {
    let (mut random, mut sum) = (Random::new(3), 0);
    for _ in 0..units {
        let mut word = || -> Vec<u8> { (0..500).map(|_| b'a' + (random.next() % 8) as u8).collect() };
        let (a, b) = (word(), word());
        let mut row: Vec<u32> = (0..=b.len() as u32).collect();
        for (i, x) in a.iter().enumerate() {
            let (mut corner, mut left) = (i as u32, i as u32 + 1);
            row[0] = left;
            for (j, y) in b.iter().enumerate() {
                let up = row[j + 1];
                left = if x == y { corner } else { 1 + corner.min(up).min(left) };
                corner = up;
                row[j + 1] = left;
            }
        }
        sum = mix(sum, u64::from(row[b.len()]));
    }
    Some(sum)
}

#[inline(never)]
fn fibonacci(n: u64) -> u64 {
    if n < 2 { n } else { black_box(fibonacci(n - 1)) + fibonacci(n - 2) }
}

pub fn recursion(units: u64) -> Option<u64> {
    Some(fibonacci(black_box(units)))
}

trait Shape {
    fn grow(&mut self, by: u32) -> u32;
}

struct Square(u32);
struct Circle(u32, u32);
struct Line(u32, u32, u32);

impl Shape for Square {
    fn grow(&mut self, by: u32) -> u32 {
        self.0 = self.0.wrapping_add(by);
        self.0.wrapping_mul(self.0)
    }
}

impl Shape for Circle {
    fn grow(&mut self, by: u32) -> u32 {
        self.1 = self.1.wrapping_add(by ^ self.0);
        self.1.wrapping_mul(3)
    }
}

impl Shape for Line {
    fn grow(&mut self, by: u32) -> u32 {
        self.2 = self.2.rotate_left(3) ^ by;
        self.0.wrapping_sub(self.1).wrapping_add(self.2)
    }
}

pub fn virtual_calls(units: u64) -> Option<u64> {
    let mut random = Random::new(4);
    let mut shapes: Vec<Box<dyn Shape>> = (0..1000)
        .map(|i| -> Box<dyn Shape> {
            match random.next() % 3 {
                0 => Box::new(Square(i)),
                1 => Box::new(Circle(i, i + 1)),
                _ => Box::new(Line(i, 7, i + 2)),
            }
        })
        .collect();
    let mut sum = 0u32;
    for _ in 0..units {
        for shape in &mut shapes {
            sum = sum.wrapping_mul(31).wrapping_add(shape.grow(sum));
        }
    }
    Some(u64::from(sum))
}
