//! Terms of a layer's cost: each knows what a move changes, exactly, and how to apply it.

pub mod balance;
pub(super) mod caps;
pub mod fanout;
pub(super) mod linear;
mod measure;
pub mod noise;
pub mod together;
pub mod windows;
