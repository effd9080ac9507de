//! What the integration tests share: the native oracle for single instructions.

#[cfg(target_arch = "x86_64")]
pub mod native;
