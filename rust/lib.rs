//! The core of moetuner: routing statistics, placement search, bounds and replay.
//!
//! Data flows one way: a trace of expert ids is validated ([`trace`]) and counted ([`counting`]);
//! searches ([`chain`], [`layer`]) turn the counts into an assignment of experts to devices; a replay
//! ([`replay`]) measures an assignment on a trace. Nothing here knows Python except `python`.

mod anneal;
mod arrays;
pub mod assignment;
pub mod bound;
pub mod chain;
pub mod control;
pub mod counting;
pub mod division;
pub mod error;
pub mod layer;
pub mod lines;
pub mod packing;
#[cfg(feature = "python")]
mod python;
pub mod random;
pub mod replay;
mod tournament;
pub mod trace;
pub mod two_stage;
mod urn;
