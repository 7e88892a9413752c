//! Errors of the input.

/// An input that breaks a rule. The message names the argument, the rule and the value found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An array's size does not fit the sizes stated for it.
    #[error("{what} must have {rule}, got {got}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// The rule that it breaks.
        rule: String,
        /// Its value.
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
        /// The tables that need it.
        what: &'static str,
        /// Their size; [`usize::MAX`] if it cannot be counted.
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

/// Largest number of slots of a layer, with all devices as wide as the widest one: 16 bits count them.
pub const SLOTS: usize = 1 << 16;

/// Refuses tables that memory cannot hold, before any of them is allocated; their bytes are the product of `sizes`.
///
/// An allocation that fails ends the process. So every table whose size depends on input is checked here first.
pub fn room_for(what: &'static str, sizes: &[usize]) -> Result<()> {
    let bytes = sizes.iter().fold(1usize, |product, &size| product.saturating_mul(size));
    let reserved = Vec::<u8>::new().try_reserve_exact(bytes);
    reserved.map_err(|_| Error::Memory { what, bytes })
}
