//! Scalar floating point: gravity, the Mandelbrot set, a Fourier transform.

use crate::mix;
use std::hint::black_box;

#[derive(Clone, Copy)]
struct Body {
    at: [f64; 3],
    v: [f64; 3],
    mass: f64,
}

fn step(bodies: &mut [Body; 5], dt: f64) {
    for i in 0..5 {
        for j in i + 1..5 {
            let d: [f64; 3] = std::array::from_fn(|k| bodies[i].at[k] - bodies[j].at[k]);
            let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
            let pull = dt / (square * square.sqrt());
            let (mi, mj) = (bodies[i].mass, bodies[j].mass);
            for (k, d) in d.iter().enumerate() {
                bodies[i].v[k] -= d * mj * pull;
                bodies[j].v[k] += d * mi * pull;
            }
        }
    }
    for b in bodies {
        for k in 0..3 {
            b.at[k] += dt * b.v[k];
        }
    }
}

pub fn nbody(units: u64) -> Option<u64> {
    let mut bodies: [Body; 5] = std::array::from_fn(|i| {
        let r = i as f64 * 5.0 + 0.1;
        Body {
            at: [r, r * 0.3, 0.1 * i as f64],
            v: [0.1 * i as f64, 1.0 / (r + 1.0), 0.01],
            mass: 40.0 / (1.0 + r * r),
        }
    });
    (0..units * 100).for_each(|_| step(&mut bodies, 0.001));
    Some(bodies.iter().flat_map(|b| b.at).fold(0, |s, x| mix(s, x.to_bits())))
}

pub fn mandelbrot(units: u64) -> Option<u64> {
    let mut sum = 0;
    for row in 0..units {
        let y = (row % 40) as f64 / 20.0 - 1.0;
        for column in 0..100 {
            let x = f64::from(column) / 40.0 - 2.0;
            let (mut a, mut b, mut n) = (0.0f64, 0.0f64, 0u64);
            while n < 200 && a * a + b * b < 4.0 {
                (a, b) = (a * a - b * b + x, 2.0 * a * b + y);
                n += 1;
            }
            sum = mix(sum, n);
        }
    }
    Some(sum)
}

/// In place, of `re` and `im`, with tables of sines.
fn transform(re: &mut [f64], im: &mut [f64], cos: &[f64], sin: &[f64]) {
    let n = re.len();
    let shift = n.leading_zeros() + 1;
    for i in 0..n {
        let j = i.reverse_bits() >> shift;
        if i < j {
            re.swap(i, j);
            im.swap(i, j);
        }
    }
    let mut half = 1;
    while half < n {
        for start in (0..n).step_by(2 * half) {
            for k in 0..half {
                let (c, s) = (cos[k * (n / 2 / half)], sin[k * (n / 2 / half)]);
                let (i, j) = (start + k, start + k + half);
                let (tr, ti) = (re[j] * c - im[j] * s, re[j] * s + im[j] * c);
                (re[j], im[j]) = (re[i] - tr, im[i] - ti);
                (re[i], im[i]) = (re[i] + tr, im[i] + ti);
            }
        }
        half *= 2;
    }
}

pub fn fft(units: u64) -> Option<u64> {
    const N: usize = 1024;
    // Rotations of a fixed step rather than the C library's sine, whose last bit depends on the processor.
    let (c, s) = (0.999_981_175_282_601_1, -0.006_135_884_649_154_475);
    let (mut cos, mut sin) = (vec![1.0], vec![0.0]);
    for i in 1..N / 2 {
        cos.push(cos[i - 1] * c - sin[i - 1] * s);
        sin.push(cos[i - 1] * s + sin[i - 1] * c);
    }
    let mut re: Vec<f64> = (0..N).map(|i| (i * 7919 % 1000) as f64 / 1000.0).collect();
    let mut im = vec![0.0; N];
    for _ in 0..units {
        transform(&mut re, &mut im, &cos, &sin);
        re.iter_mut().chain(&mut im).for_each(|x| *x *= black_box(1.0 / 32.0));
    }
    Some(re.iter().fold(0, |s, x| mix(s, x.to_bits())))
}
