//! One user-mode instruction at a time: what is run, on what, how it ends, and what of that counts.
//!
//! The instruction tests of `frontend` include this file by path, so everything here depends on `arch`, `ir`, `frontend` and
//! `libc` alone. All but the host's own processor ([`native`]) is there on every host.
#![allow(dead_code, unused_imports)] // Each includer uses a part.

mod compare;
mod env;
mod form;
mod models;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod native;
mod regs;

pub use compare::*;
pub use env::*;
pub use form::*;
pub use regs::*;
