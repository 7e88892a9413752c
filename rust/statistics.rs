//! Load windows, transitions and co-activation of a trace, shard by shard.
//!
//! All three are plain counts, so they add up: the result does not depend on how a trace was cut into shards
//! or on the number of threads. Work is split by layer; each layer's tables have one writer.

use rayon::prelude::*;

use crate::error::Result;
use crate::pairs::{BLOCK, Side};
use crate::trace::{ExpertId, Routing, validate};

/// What to count besides load.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Pairs of experts in neighbouring layers.
    pub transitions: bool,
    /// Pairs of experts in one layer.
    pub coactivation: bool,
}

/// Counts a trace. Push its shards in order, then [`Counter::finish`].
#[derive(Debug)]
pub struct Counter {
    routing: Routing,
    windows: Windows,
    transitions: Option<Vec<u64>>,
    coactivation: Option<Vec<u64>>,
}

/// The counts of a whole trace, in row-major order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statistics {
    /// Tokens counted.
    pub tokens: u64,
    /// Windows: runs of tokens, the last one possibly shorter. At least one.
    pub windows: usize,
    /// `[windows, layers, experts]`.
    pub load: Vec<u64>,
    /// `[layers - 1, experts, experts]`, if wanted.
    pub transitions: Option<Vec<u64>>,
    /// `[layers, experts, experts]`, symmetric with a zero diagonal, if wanted.
    pub coactivation: Option<Vec<u64>>,
}

impl Counter {
    /// An empty counter; `window` tokens make a window, the whole trace where there is no number.
    #[must_use]
    pub fn new(routing: Routing, window: Option<u64>, wanted: Wanted) -> Self {
        let table = routing.experts * routing.experts;
        Self {
            routing,
            windows: Windows::new(routing.layers, routing.experts, window),
            transitions: wanted.transitions.then(|| vec![0; (routing.layers - 1) * table]),
            coactivation: wanted.coactivation.then(|| vec![0; routing.layers * table]),
        }
    }

    /// Validates and counts the next tokens of the trace, `[tokens, layers, top_k]`.
    ///
    /// A shard that does not pass leaves the counter as it was.
    pub fn push<I: ExpertId>(&mut self, ids: &[I]) -> Result<()> {
        let Self { routing, windows, transitions, coactivation } = self;
        validate(ids, *routing, windows.tokens)?;
        let Routing { experts, top_k, .. } = *routing;
        let table = experts * experts;
        for block in ids.chunks(BLOCK * routing.row()) {
            let first = windows.tokens;
            let mut transitions = transitions.iter_mut().flat_map(|tables| tables.chunks_exact_mut(table));
            let mut coactivation = coactivation.iter_mut().flat_map(|tables| tables.chunks_exact_mut(table));
            // The transitions of a layer are those that lead to it: the first layer has none.
            let mut layers: Vec<Layer<'_>> = (windows.load.iter_mut().enumerate())
                .map(|(l, load)| Layer {
                    load,
                    transitions: if l > 0 { transitions.next() } else { None },
                    coactivation: coactivation.next(),
                })
                .collect();
            by_layers(
                &mut layers,
                block,
                *routing,
                |_, ids| Side::new(ids, top_k, experts),
                |layer, before, here| {
                    here.count_windows(windows.length, first, layer.load);
                    if let (Some(before), Some(counts)) = (before, &mut layer.transitions) {
                        before.count_pairs(here, counts);
                    }
                    if let Some(counts) = &mut layer.coactivation {
                        here.count_pairs(here, counts);
                    }
                },
            );
            windows.tokens += (block.len() / routing.row()) as u64;
        }
        Ok(())
    }

    /// The counts so far.
    #[must_use]
    pub fn finish(mut self) -> Statistics {
        let experts = self.routing.experts;
        for table in self.coactivation.iter_mut().flat_map(|c| c.chunks_exact_mut(experts * experts)) {
            // An expert meets itself once per token: that is its load, not a co-activation.
            table.iter_mut().step_by(experts + 1).for_each(|count| *count = 0);
        }
        let (tokens, windows, load) = self.windows.finish();
        let Self { transitions, coactivation, .. } = self;
        Statistics { tokens, windows, load, transitions, coactivation }
    }
}

/// One layer's tables.
struct Layer<'a> {
    load: &'a mut Vec<u64>,
    transitions: Option<&'a mut [u64]>,
    coactivation: Option<&'a mut [u64]>,
}

/// Loads by window: runs of `length` tokens, or the whole trace.
#[derive(Debug)]
pub(crate) struct Windows {
    pub(crate) length: Option<u64>,
    pub(crate) tokens: u64,
    size: usize,
    /// For every layer `[windows so far, size]`.
    pub(crate) load: Vec<Vec<u64>>,
}

impl Windows {
    pub(crate) fn new(layers: usize, size: usize, length: Option<u64>) -> Self {
        Self { length, tokens: 0, size, load: vec![Vec::new(); layers] }
    }

    /// Tokens, windows (at least one), and loads `[windows, layers, size]`.
    pub(crate) fn finish(self) -> (u64, usize, Vec<u64>) {
        let (layers, size) = (self.load.len(), self.size);
        let windows = self.length.map_or(1, |length| self.tokens.div_ceil(length).max(1)) as usize;
        let mut load = vec![0; windows * layers * size];
        for (l, of_layer) in self.load.iter().enumerate() {
            for (w, counts) in of_layer.chunks_exact(size).enumerate() {
                load[(w * layers + l) * size..][..size].copy_from_slice(counts);
            }
        }
        (self.tokens, windows, load)
    }
}

/// Layers per task: enough to prepare each layer's ids about once, few enough for all threads to have work.
const LAYERS: usize = 8;

/// Visits all layers of a block, several at once: `prepare` turns a layer's ids `[tokens, top_k]` into what `visit`
/// then sees of the layer before (if there is one) and of the layer itself.
pub(crate) fn by_layers<I: ExpertId, T: Send, S>(
    layers: &mut [T],
    block: &[I],
    routing: Routing,
    prepare: impl Fn(usize, Vec<I>) -> S + Sync,
    visit: impl Fn(&mut T, Option<&S>, &S) + Sync,
) {
    let per_task = LAYERS.min(layers.len().div_ceil(rayon::current_num_threads())).max(1);
    layers.par_chunks_mut(per_task).enumerate().for_each(|(task, layers)| {
        let first = task * per_task;
        // The last layer of the task before is this task's first neighbour.
        let from = first.saturating_sub(1);
        let ids = gather(block, from, first + layers.len(), routing);
        let sides: Vec<S> = ids.into_iter().enumerate().map(|(i, ids)| prepare(from + i, ids)).collect();
        for (i, layer) in layers.iter_mut().enumerate() {
            let here = first + i - from;
            visit(layer, here.checked_sub(1).map(|before| &sides[before]), &sides[here]);
        }
    });
}

/// Tokens that stay in the first-level cache while all layers are taken from them.
const TOKENS: usize = 64;

/// The ids of layers `from..to`, each layer's together.
fn gather<I: ExpertId>(block: &[I], from: usize, to: usize, routing: Routing) -> Vec<Vec<I>> {
    /// Copies K ids of every token, inlined for constant K.
    #[inline(always)]
    fn copy<I: ExpertId, const K: usize>(tokens: &[I], at: usize, row: usize, ids: &mut [I]) {
        for (ids, token) in ids.as_chunks_mut::<K>().0.iter_mut().zip(tokens.chunks_exact(row)) {
            *ids = *token[at..].first_chunk().expect("a row holds every layer");
        }
    }
    let (k, row) = (routing.top_k, routing.row());
    let mut layers = vec![vec![block[0]; block.len() / routing.layers]; to - from];
    for (part, tokens) in block.chunks(TOKENS * row).enumerate() {
        for (l, ids) in (from..to).zip(&mut layers) {
            let ids = &mut ids[part * TOKENS * k..];
            match k {
                1 => copy::<I, 1>(tokens, l, row, ids),
                2 => copy::<I, 2>(tokens, l * 2, row, ids),
                4 => copy::<I, 4>(tokens, l * 4, row, ids),
                6 => copy::<I, 6>(tokens, l * 6, row, ids),
                8 => copy::<I, 8>(tokens, l * 8, row, ids),
                _ => {
                    for (ids, token) in ids.chunks_exact_mut(k).zip(tokens.chunks_exact(row)) {
                        ids.copy_from_slice(&token[l * k..][..k]);
                    }
                }
            }
        }
    }
    layers
}
