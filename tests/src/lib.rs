//! What the integration tests share: the native oracle for single instructions, and encodings to run on it.

#[cfg(target_arch = "x86_64")]
pub mod fuzz;
#[cfg(target_arch = "x86_64")]
pub mod generate;
#[cfg(target_arch = "x86_64")]
pub mod machine;
#[cfg(target_arch = "x86_64")]
pub mod native;
#[cfg(target_arch = "x86_64")]
pub mod oracle;
#[cfg(target_arch = "x86_64")]
pub mod pages;

pub mod guest;
