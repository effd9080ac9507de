//! What the integration tests share: single instructions on the host CPU, recorded, and in our tiers; encodings to run so; guests.

pub mod cases;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod fuzz;
pub mod generate;
pub mod guest;
pub mod insn;
pub mod machine;
pub mod oracle;
pub mod pages;
pub mod values;
pub mod vectors;
