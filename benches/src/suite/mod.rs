//! The benchmark suite: builds its guest, runs it in twofold, in QEMU and on the host, and shows what came out.

pub mod chart;
pub mod image;
pub mod report;
pub mod sample;
