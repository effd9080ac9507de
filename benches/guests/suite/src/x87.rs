//! The x87 unit: polynomials, and division with square roots, in extended precision.
#![allow(unsafe_code)] // inline assembly

use crate::mix;
use std::arch::asm;

pub fn polynomial(units: u64) -> Option<u64> {
    let coefficients: [f64; 8] = std::array::from_fn(|i| 1.0 / (i as f64 + 1.5));
    let (mut x, mut sum) = (0.25f64, 0);
    for _ in 0..units * 1000 {
        let mut y = 0.0f64;
        // SAFETY: eight doubles are read, one is written; the stack is empty before and after.
        unsafe {
            asm!(
                "fld qword ptr [{x}]",
                "fld qword ptr [{c}]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 8]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 16]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 24]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 32]",
                "fmul st(0), st(1)", "fsub qword ptr [{c} + 40]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 48]",
                "fmul st(0), st(1)", "fadd qword ptr [{c} + 56]",
                "fxch st(1)",
                "fstp st(0)",
                "fstp qword ptr [{y}]",
                x = in(reg) &raw const x, c = in(reg) coefficients.as_ptr(), y = in(reg) &raw mut y,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        sum = mix(sum, y.to_bits());
        x = if y > 1.0 { y - 1.0 } else { y };
    }
    Some(sum)
}

pub fn divide(units: u64) -> Option<u64> {
    let (mut x, mut sum) = (2.0f64, 0);
    for i in 0..units * 1000 {
        let (n, mut y) = ((i % 1000 + 1) as i64, 0.0f64);
        // SAFETY: one integer and one double are read, one double is written; the stack is empty before and after.
        unsafe {
            asm!(
                "fild qword ptr [{n}]",
                "fld qword ptr [{x}]",
                "fld1",
                "faddp st(1), st(0)",
                "fdiv st(0), st(1)",
                "fabs",
                "fsqrt",
                "fcomi st(0), st(1)",
                "fcmovnb st(0), st(1)",
                "fsubrp st(1), st(0)",
                "fchs",
                "fstp qword ptr [{y}]",
                n = in(reg) &raw const n, x = in(reg) &raw const x, y = in(reg) &raw mut y,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        sum = mix(sum, y.to_bits());
        x = y.abs().min(1e6);
    }
    Some(sum)
}
