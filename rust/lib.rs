//! The core of moetuner: routing statistics, placement search, bounds and replay.
//!
//! Data flows one way: a trace of expert ids is validated ([`trace`]) and counted ([`statistics`]);
//! searches ([`search`]) turn the counts into an assignment of experts to devices; a replay
//! ([`replay`]) measures an assignment on a trace. Nothing here knows Python except `python`.

pub mod assignment;
pub mod bottleneck;
pub mod bound;
pub mod chain;
pub mod colocation;
pub mod error;
pub mod instance;
pub mod layer;
mod least;
pub mod packing;
pub mod pairs;
pub mod partitions;
#[cfg(feature = "python")]
mod python;
pub mod random;
pub mod replay;
pub mod search;
pub mod sets;
pub mod statistics;
pub mod trace;
