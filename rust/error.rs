//! What can be wrong with the input, said once.

/// An input that breaks a rule. The message names the argument, the rule and the value found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An array's size does not fit the sizes stated for it.
    #[error("{what} must have {rule}, got {got}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// What would be right.
        rule: String,
        /// What was found.
        got: String,
    },
    /// An expert id that the model does not have, or that a token has twice in one layer.
    #[error("expert_ids: token {0}, layer {1}: expert id {2}")]
    Id(u64, usize, String),
    /// An expert that no device can take, whatever the others do.
    #[error(
        "layer {layer}: no slot is left for expert {expert}; it needs more slots, fewer pins or fewer forbidden devices"
    )]
    NoSlot {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// More than memory can hold.
    #[error("{what} would need {} MiB, more than memory can hold", bytes >> 20)]
    Memory {
        /// What is to be held.
        what: &'static str,
        /// How much that is; [`usize::MAX`] where it cannot be counted.
        bytes: usize,
    },
}

impl Error {
    /// Builds the error of an argument that breaks a rule; `got` is its value.
    pub fn shape(what: &'static str, rule: impl Into<String>, got: &dyn ToString) -> Self {
        Self::Shape { what, rule: rule.into(), got: got.to_string() }
    }
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Slots that a layer has at most, all devices as wide as the widest: they are counted in 16 bits.
pub const SLOTS: usize = 1 << 16;

/// Refuses what memory cannot hold, `sizes` times each other in bytes, before any of it is asked for.
///
/// An allocation that fails ends the process, whoever else lives in it. So whatever is made of sizes that come from
/// input asks here first.
pub fn room_for(what: &'static str, sizes: &[usize]) -> Result<()> {
    let bytes = sizes.iter().fold(1usize, |product, &size| product.saturating_mul(size));
    let reserved = Vec::<u8>::new().try_reserve_exact(bytes);
    reserved.map_err(|_| Error::Memory { what, bytes })
}
