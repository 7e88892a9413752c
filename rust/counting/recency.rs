//! Recency of the experts that tokens choose: hits of caches of any size that drop the least recently used expert.

use rayon::prelude::*;

use crate::trace::{ExpertId, Routing};

/// Counts the ids of tokens `[T, L, K]` by place: how many other experts of the layer were used since the expert's last use.
///
/// A cache of so many experts of a layer holds those of lower places. `orders` `[L, E]` are experts by their last use, the
/// latest first, and move on, id by id in their order. Adds to `counts` `[L, E]`.
pub fn count<I: ExpertId>(ids: &[I], routing: Routing, orders: &mut [u16], counts: &mut [u64]) {
    let Routing { layers, experts, top_k } = routing;
    let of_layers = orders.par_chunks_exact_mut(experts).zip(counts.par_chunks_exact_mut(experts));
    of_layers.enumerate().for_each(|(layer, (order, counts))| {
        for token in ids.chunks_exact(layers * top_k) {
            for id in &token[layer * top_k..][..top_k] {
                // Ids are valid, so each has a place.
                if let Some(place) = order.iter().position(|&e| usize::from(e) == id.index()) {
                    counts[place] += 1;
                    order[..=place].rotate_right(1);
                }
            }
        }
    });
}
