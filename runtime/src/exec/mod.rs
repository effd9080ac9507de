//! Execution: finding, making and running translation blocks, tier by tier.
//!
//! The pipeline: [`dispatch`] decides what runs next; [`translate`] makes a block (frontend → passes → host code);
//! [`tb`] keeps it; [`region`] chooses what becomes one function of several blocks, which [`compile`] has made on a background thread;
//! [`slow`] is where host code and evaluator come for memory that the inline probe does not reach; [`env`] is the world the
//! evaluator sees.

pub mod cache;
pub mod compile;
pub mod counters;
pub mod counts;
pub mod dispatch;
pub mod env;
pub mod jit;
mod listing;
pub mod region;
pub mod slow;
pub mod tb;
pub mod translate;
pub mod turns;
pub mod wake;

pub use counters::Counters;
pub use dispatch::{RunEnd, run};
pub use jit::Jit;
pub use wake::Waker;
