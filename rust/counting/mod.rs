//! Load windows, transitions, co-activation and expert sets of a trace, shard by shard.
//!
//! All are plain counts, so they add up: the result does not depend on how a trace was cut into shards
//! or on the number of threads. Work is split by layer; each layer's tables have one writer.

mod bits;
mod lists;
pub mod pairs;
mod rows;
pub mod sets;
mod transpose;

use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Result, room_for};
use crate::trace::{ExpertId, Routing, validate};
use pairs::{Cuts, SHORT_BLOCK, Side, block};
use sets::Sets;

/// Where pairs are added up, by the caller's leave: the tables are large, and whose memory they are is his choice. What
/// is in them before a counter's first token is not read.
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
    /// Of every layer; none where they are not wanted.
    sets: Vec<Sets>,
}

/// What a counter has counted.
#[derive(Debug)]
pub struct Counted {
    /// Tokens.
    pub tokens: u64,
    /// Windows, at least one, the last one possibly shorter.
    pub windows: usize,
    /// Load `[windows, layers, experts]`.
    pub load: Vec<u64>,
    /// Distinct expert sets of every layer, where they were wanted.
    pub sets: Vec<Sets>,
}

impl Counter {
    /// An empty counter; `window` tokens make a window, the whole trace where there is no number.
    #[must_use]
    pub fn new(routing: Routing, window: Option<u64>, sets: bool) -> Self {
        let Routing { layers, experts, top_k } = routing;
        let sets = vec![Sets::new(top_k); if sets { layers } else { 0 }];
        Self { routing, windows: WindowCounts::new(layers, experts, window), sets }
    }

    /// Validates and counts the next tokens of the trace, `[tokens, layers, top_k]`.
    ///
    /// A shard that does not pass leaves everything as it was.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], tables: &mut Tables<'_>) -> Result<()> {
        validate(ids, self.routing, self.windows.tokens)?;
        self.push_valid(ids, tables)
    }

    /// Counts the next tokens of the trace, which have passed [`validate`] since nobody could change them.
    pub fn push_valid<I: ExpertId>(&mut self, ids: &[I], tables: &mut Tables<'_>) -> Result<()> {
        let Self { routing, windows, sets } = self;
        windows.room_for(ids.len() / routing.row())?;
        let Routing { experts, top_k, .. } = *routing;
        let table = experts * experts;
        let first = windows.tokens;
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
                by_window(windows.length, first + at, here.tokens(), experts, layer.load, |tokens, load| {
                    here.count(tokens, load);
                });
                let before = before.zip(layer.transitions.as_deref_mut());
                here.count_pairs(before, layer.coactivation.as_deref_mut(), first + at == 0);
                if let Some(sets) = &mut layer.sets {
                    for ids in here.rows() {
                        sets.add(ids.iter().map(|id| id.index() as u16), 1);
                    }
                }
            },
        );
        windows.tokens += (ids.len() / routing.row()) as u64;
        Ok(())
    }

    /// Everything that was counted.
    #[must_use]
    pub fn finish(self) -> Counted {
        let Self { routing, windows, sets } = self;
        let load = windows.columns(0..routing.experts);
        Counted { tokens: windows.tokens, windows: windows.number(), load, sets }
    }
}

/// A table per layer, each to be taken once.
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

/// Counts by window: runs of `length` tokens, or the whole trace.
#[derive(Debug)]
pub(crate) struct WindowCounts {
    pub(crate) length: Option<u64>,
    pub(crate) tokens: u64,
    /// Counts of a layer in a window.
    size: usize,
    /// For every layer `[windows so far, size]`.
    pub(crate) counts: Vec<Vec<u64>>,
}

impl WindowCounts {
    pub(crate) fn new(layers: usize, size: usize, length: Option<u64>) -> Self {
        Self { length, tokens: 0, size, counts: vec![Vec::new(); layers] }
    }

    /// Refuses so many more tokens if their windows, and a copy of them in the end, are more than memory can hold.
    pub(crate) fn room_for(&self, tokens: usize) -> Result<()> {
        let tokens = self.tokens.saturating_add(tokens as u64);
        let windows = self.length.map_or(1, |length| tokens.div_ceil(length).max(1)) as usize;
        // Tables grow by doubling.
        room_for("windows", &[windows, self.counts.len(), self.size, 3 * size_of::<u64>()])
    }

    /// Windows, at least one.
    pub(crate) fn number(&self) -> usize {
        self.length.map_or(1, |length| self.tokens.div_ceil(length).max(1)) as usize
    }

    /// Some of the counts, `[windows, layers, columns]`.
    pub(crate) fn columns(&self, columns: Range<usize>) -> Vec<u64> {
        let layers = self.counts.len();
        let mut taken = vec![0; self.number() * layers * columns.len()];
        for (l, counts) in self.counts.iter().enumerate() {
            for (w, counts) in counts.chunks_exact(self.size).enumerate() {
                let at = (w * layers + l) * columns.len();
                taken[at..at + columns.len()].copy_from_slice(&counts[columns.clone()]);
            }
        }
        taken
    }
}

/// Gives `visit` each run of a block's tokens that share a window, and the window's counts.
///
/// The block's `tokens` tokens begin with token `first` of the trace; `counts`, `[windows so far, size]`, grows.
pub(crate) fn by_window(
    length: Option<u64>,
    first: u64,
    tokens: usize,
    size: usize,
    counts: &mut Vec<u64>,
    mut visit: impl FnMut(Range<usize>, &mut [u64]),
) {
    let mut from = 0;
    while from < tokens {
        let token = first + from as u64;
        let (window, left) = length.map_or((0, u64::MAX), |n| (token / n, n - token % n));
        let to = tokens.min(from.saturating_add(usize::try_from(left).unwrap_or(usize::MAX)));
        let end = (window as usize + 1) * size;
        if counts.len() < end {
            counts.resize(end, 0);
        }
        visit(from..to, &mut counts[end - size..end]);
        from = to;
    }
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

/// The ids of some layers, each layer's together.
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
    for (part, tokens) in block.chunks(TOKENS * row).enumerate() {
        for (l, ids) in layers.clone().zip(&mut *all) {
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
}
