//! What can be wrong with the input, said once.

/// An input that breaks a rule. The message names the argument, the rule and the value found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An array's size does not fit the sizes stated for it.
    #[error("{what} must have {rule}, got {found}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// What would be right.
        rule: String,
        /// What was found.
        found: String,
    },
    /// An expert id that the model does not have.
    #[error(
        "expert_ids: token {token}, layer {layer}: expert id {expert} is not below num_experts {experts}"
    )]
    ExpertOutOfRange {
        /// Position of the token in the trace.
        token: u64,
        /// The layer.
        layer: usize,
        /// The id found.
        expert: usize,
        /// The number of experts in a layer.
        experts: usize,
    },
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
    /// A token that visits one expert twice in one layer.
    #[error(
        "expert_ids: token {token}, layer {layer}: expert id {expert} appears twice; a token's experts must differ"
    )]
    ExpertTwice {
        /// Position of the token in the trace.
        token: u64,
        /// The layer.
        layer: usize,
        /// The id found.
        expert: usize,
    },
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
