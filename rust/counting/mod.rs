//! Load windows, transitions, co-activation and expert sets of a trace, shard by shard.
//!
//! All are plain counts, so they add up: the result does not depend on how a trace was cut into shards
//! or on the number of threads. Work is split by layer; each layer's tables have one writer.

mod bits;
mod lists;
pub mod pairs;
pub mod recency;
mod rows;
pub mod sets;
mod transpose;
pub mod windows;

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::trace::{ExpertId, Routing, validate};
use pairs::{Cuts, SHORT_BLOCK, Side, block};
use sets::Sets;
use windows::{Narrow, WindowCounts, by_window};

/// Tables that pairs are added to. They are large, so the caller allocates them. A counter overwrites them at its first
/// token.
#[derive(Debug, Default)]
pub struct Tables<'a> {
    /// Pairs of experts in neighbouring layers `[layers - 1, experts, experts]`.
    pub transitions: Option<&'a mut [u64]>,
    /// Pairs of experts in one layer `[layers, experts, experts]`. An expert meets itself once per token that it
    /// serves: the diagonal is its load.
    pub coactivation: Option<&'a mut [u64]>,
}

/// Counts a trace. Push its shards in order, then [`Counter::finish`].
#[derive(Debug)]
pub struct Counter {
    routing: Routing,
    windows: WindowCounts,
    /// Sets of every layer; empty where they are not wanted.
    sets: Vec<Sets>,
    /// One token of so many has its sets counted, for all of them.
    every: u64,
}

/// The counts of a trace.
#[derive(Debug)]
pub struct Counted {
    /// Tokens.
    pub tokens: u64,
    /// Windows, at least one, the last one possibly shorter.
    pub windows: usize,
    /// Load `[windows, layers, experts]`.
    pub load: Narrow,
    /// Distinct expert sets of every layer `[N, K]` and their tokens `[N]`, where they were wanted.
    pub sets: Vec<(Vec<u16>, Vec<u64>)>,
}

impl Counter {
    /// Builds an empty counter; `window` tokens make a window, the whole trace where there is no number.
    ///
    /// Sets are counted of one token in so many as `sets` says, the first of them, which stands for all.
    #[must_use]
    pub fn new(routing: Routing, window: Option<u64>, sets: Option<u64>) -> Self {
        let Routing { layers, experts, top_k } = routing;
        let every = sets.unwrap_or(1);
        let sets = vec![Sets::new(experts, top_k, every); if sets.is_some() { layers } else { 0 }];
        Self { routing, windows: WindowCounts::new(layers, experts, window, 1), sets, every }
    }

    /// Counts the next tokens of the trace, `[tokens, layers, top_k]`. Those that are `checked` have passed [`validate`]
    /// since nobody could change them; a shard that does not pass leaves everything as it was.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], tables: &mut Tables<'_>, checked: bool) -> Result<()> {
        if !checked {
            validate(ids, self.routing, self.windows.tokens)?;
        }
        let Self { routing, windows, sets, every } = self;
        windows.room_for(ids.len() / routing.row())?;
        let Routing { experts, top_k, .. } = *routing;
        let table = experts * experts;
        let (begin, first) = (windows.tokens, windows.begin());
        let mut transitions = by_layer(&mut tables.transitions, table);
        let mut coactivation = by_layer(&mut tables.coactivation, table);
        let mut sets = sets.iter_mut();
        let mut layers: Vec<LayerTables<'_>> = (windows.counts.iter_mut().enumerate())
            .map(|(l, load)| LayerTables {
                load,
                // The transitions of a layer are those that lead to it: the first layer has none.
                transitions: l.checked_sub(1).and_then(|at| transitions.get_mut(at)?.take()),
                coactivation: coactivation.get_mut(l).and_then(Option::take),
                sets: sets.next(),
            })
            .collect();
        by_layers(
            &mut layers,
            ids,
            block(experts, top_k),
            *routing,
            || Side::new(top_k, experts),
            |_, at, ids, side| side.fill(ids, Cuts::new(windows.length, first + at)),
            |layer, at, before, here| {
                by_window(windows.length, first + at, here.tokens, experts, layer.load, |tokens, load| {
                    here.count(tokens, load);
                });
                let before = before.zip(layer.transitions.as_deref_mut());
                here.count_pairs(before, layer.coactivation.as_deref_mut(), begin + at == 0);
                if let Some(sets) = &mut layer.sets {
                    // Place of the block's first token whose set is counted.
                    let skip = (*every - (begin + at) % *every) % *every;
                    sets.add(here.rows().skip(skip as usize).step_by(*every as usize));
                }
            },
        );
        windows.advance((ids.len() / routing.row()) as u64);
        Ok(())
    }

    /// Returns everything that was counted.
    #[must_use]
    pub fn finish(self) -> Counted {
        let Self { windows, sets, every, .. } = self;
        let beyond = windows.tokens.next_multiple_of(every) - windows.tokens;
        let sets = sets.into_par_iter().map(|sets| sets.finish(beyond)).collect();
        Counted { tokens: windows.tokens, windows: windows.number(), load: windows.finish(), sets }
    }
}

/// Splits a table by layer; each part may be taken once.
fn by_layer<'a>(tables: &'a mut Option<&mut [u64]>, size: usize) -> Vec<Option<&'a mut [u64]>> {
    tables.iter_mut().flat_map(|tables| tables.chunks_exact_mut(size)).map(Some).collect()
}

/// One layer's tables.
struct LayerTables<'a> {
    load: &'a mut Vec<u64>,
    transitions: Option<&'a mut [u64]>,
    coactivation: Option<&'a mut [u64]>,
    sets: Option<&'a mut Sets>,
}

/// Layers whose ids are gathered together: they stay in the second-level cache.
const LAYERS: usize = 4;

/// Visits all layers of the tokens `ids`, one run of layers per thread, `tokens` at a time: threads wait for each other
/// only in the end. `fill` turns a layer's ids `[tokens, top_k]` into what `visit` then sees of the layer before (if
/// there is one) and of the layer itself; both are told where among the tokens these begin. The ids and what `make` made
/// are used again for other layers and tokens.
pub(crate) fn by_layers<I: ExpertId, T: Send, S>(
    layers: &mut [T],
    ids: &[I],
    tokens: usize,
    routing: Routing,
    make: impl Fn() -> S + Sync,
    fill: impl Fn(usize, u64, &mut Vec<I>, &mut S) + Sync,
    visit: impl Fn(&mut T, u64, Option<&S>, &mut S) + Sync,
) {
    let per_task = layers.len().div_ceil(rayon::current_num_threads());
    // Blocks of about the same size: a short one costs as much beside its tokens as a long one.
    let all = ids.len() / routing.row();
    let tokens = all.div_ceil(all.div_ceil(tokens).max(1)).max(1).next_multiple_of(SHORT_BLOCK);
    layers.par_chunks_mut(per_task).enumerate().for_each(|(task, layers)| {
        let (first, end) = (task * per_task, task * per_task + layers.len());
        let mut of_layer = vec![Vec::new(); LAYERS];
        let (mut before, mut here) = (make(), make());
        for (at, block) in (0..).step_by(tokens).zip(ids.chunks(tokens * routing.row())) {
            // The last layer of the task before is this task's first neighbour.
            for from in (first.saturating_sub(1)..end).step_by(LAYERS) {
                let to = end.min(from + LAYERS);
                gather(block, from..to, routing, &mut of_layer);
                for (l, ids) in (from..to).zip(&mut of_layer) {
                    fill(l, at, ids, &mut here);
                    if let Some(layer) = l.checked_sub(first) {
                        visit(&mut layers[layer], at, (l > 0).then_some(&before), &mut here);
                    }
                    std::mem::swap(&mut before, &mut here);
                }
            }
        }
    });
}

/// Tokens that stay in the first-level cache while all layers are taken from them.
const TOKENS: usize = 64;

/// Copies the ids of some layers, so that those of a layer are contiguous.
fn gather<I: ExpertId>(block: &[I], layers: Range<usize>, routing: Routing, all: &mut [Vec<I>]) {
    /// Copies K ids of every token, inlined for constant K.
    #[inline(always)]
    fn copy<I: ExpertId, const K: usize>(tokens: &[I], at: usize, row: usize, ids: &mut [I]) {
        for (ids, token) in ids.as_chunks_mut::<K>().0.iter_mut().zip(tokens.chunks_exact(row)) {
            *ids = *token[at..].first_chunk().expect("a row holds every layer");
        }
    }
    let (k, row) = (routing.top_k, routing.row());
    for ids in &mut *all {
        ids.resize(block.len() / routing.layers, block[0]);
    }
    for (batch, tokens) in block.chunks(TOKENS * row).enumerate() {
        for (l, ids) in layers.clone().zip(&mut *all) {
            let ids = &mut ids[batch * TOKENS * k..];
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
}
