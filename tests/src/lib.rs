//! What the integration tests share: the native oracle for single instructions, and encodings to run on it.

#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod fuzz;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod generate;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod machine;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod native;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod oracle;
#[cfg(all(target_arch = "x86_64", not(portable_host)))]
pub mod pages;

pub mod guest;
