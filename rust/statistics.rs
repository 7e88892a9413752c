//! Load windows, transitions and co-activation of a trace, shard by shard.
//!
//! All three are plain counts, so they add up: the result does not depend on how a trace was cut into shards
//! or on the number of threads. Work is split by layer; each layer's tables have one writer.

use rayon::prelude::*;

use crate::error::Result;
use crate::pairs::{BLOCK, Pairs};
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
    /// Tokens per window; `None` counts the whole trace as one window.
    window: Option<u64>,
    tokens: u64,
    layers: Vec<Layer>,
}

#[derive(Debug, Default)]
struct Layer {
    /// `[windows so far, experts]`.
    load: Vec<u64>,
    /// `[experts, experts]` from the layer before to this one; empty where not wanted.
    transitions: Vec<u64>,
    coactivation: Vec<u64>,
    pairs: Pairs,
    ids: Vec<u16>,
    ids_before: Vec<u16>,
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
    /// An empty counter.
    #[must_use]
    pub fn new(routing: Routing, window: Option<u64>, wanted: Wanted) -> Self {
        let table = routing.experts * routing.experts;
        let layers = (0..routing.layers)
            .map(|l| Layer {
                transitions: vec![0; if wanted.transitions && l > 0 { table } else { 0 }],
                coactivation: vec![0; if wanted.coactivation { table } else { 0 }],
                ..Layer::default()
            })
            .collect();
        Self { routing, window, tokens: 0, layers }
    }

    /// Validates and counts the next tokens of the trace, `[tokens, layers, top_k]`.
    ///
    /// A shard that does not pass leaves the counter as it was.
    pub fn push<I: ExpertId>(&mut self, ids: &[I]) -> Result<()> {
        validate(ids, self.routing, self.tokens)?;
        let row = self.routing.row();
        for block in ids.chunks(BLOCK * row) {
            let (routing, window, first) = (self.routing, self.window, self.tokens);
            self.layers
                .par_iter_mut()
                .enumerate()
                .for_each(|(l, layer)| layer.count(block, l, routing, window, first));
            self.tokens += (block.len() / row) as u64;
        }
        Ok(())
    }

    /// The counts so far.
    #[must_use]
    pub fn finish(self) -> Statistics {
        let Routing { layers, experts, .. } = self.routing;
        let windows = self.window.map_or(1, |window| self.tokens.div_ceil(window).max(1)) as usize;
        let mut load = vec![0; windows * layers * experts];
        for (l, layer) in self.layers.iter().enumerate() {
            for (w, counts) in layer.load.chunks_exact(experts).enumerate() {
                load[(w * layers + l) * experts..][..experts].copy_from_slice(counts);
            }
        }
        let gather = |table: fn(&Layer) -> &Vec<u64>, skip: usize| -> Option<Vec<u64>> {
            let tables = self.layers.iter().skip(skip).map(table);
            let whole: Vec<u64> = tables.flatten().copied().collect();
            (!whole.is_empty() || layers == skip).then_some(whole)
        };
        let mut coactivation = gather(|layer| &layer.coactivation, 0);
        for (e, tables) in coactivation.iter_mut().flat_map(|c| c.chunks_exact_mut(experts).enumerate()) {
            // An expert meets itself once per token: that is its load, not a co-activation.
            tables[e % experts] = 0;
        }
        Statistics {
            tokens: self.tokens,
            windows,
            load,
            transitions: gather(|layer| &layer.transitions, 1),
            coactivation,
        }
    }
}

impl Layer {
    fn count<I: ExpertId>(
        &mut self,
        block: &[I],
        l: usize,
        routing: Routing,
        window: Option<u64>,
        first: u64,
    ) {
        let Routing { experts, top_k, .. } = routing;
        gather(block, l, routing, &mut self.ids);
        let ids = &self.ids;
        if !self.coactivation.is_empty() {
            self.pairs.count(ids, ids, top_k, experts, &mut self.coactivation);
        }
        if !self.transitions.is_empty() {
            gather(block, l - 1, routing, &mut self.ids_before);
            self.pairs.count(&self.ids_before, ids, top_k, experts, &mut self.transitions);
        }
        in_windows(ids, top_k, experts, window, first, &mut self.load);
    }
}

/// Adds ids, `top_k` per token from token `first` on, to their windows' counts `[windows so far, size]`.
pub(crate) fn in_windows(
    ids: &[u16],
    top_k: usize,
    size: usize,
    window: Option<u64>,
    first: u64,
    counts: &mut Vec<u64>,
) {
    let mut token = first;
    let mut rest = ids;
    while !rest.is_empty() {
        let (w, left) = match window {
            None => (0, u64::MAX),
            Some(window) => (token / window, window - token % window),
        };
        let now = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX).saturating_mul(top_k));
        let end = (w as usize + 1) * size;
        if counts.len() < end {
            counts.resize(end, 0);
        }
        let counts = &mut counts[end - size..];
        for &id in &rest[..now] {
            counts[usize::from(id)] += 1;
        }
        token += (now / top_k) as u64;
        rest = &rest[now..];
    }
}

/// The ids of one layer, close together.
pub(crate) fn gather<I: ExpertId>(block: &[I], l: usize, routing: Routing, ids: &mut Vec<u16>) {
    fn of<I: ExpertId, const K: usize>(block: &[I], l: usize, row: usize, ids: &mut Vec<u16>) {
        for token in block.chunks_exact(row) {
            let here: &[I; K] = token[l * K..].first_chunk().expect("a row holds every layer");
            ids.extend_from_slice(&here.map(|id| id.index() as u16));
        }
    }
    let (k, row) = (routing.top_k, routing.row());
    ids.clear();
    ids.reserve(block.len() / routing.layers);
    match k {
        1 => of::<I, 1>(block, l, row, ids),
        2 => of::<I, 2>(block, l, row, ids),
        4 => of::<I, 4>(block, l, row, ids),
        8 => of::<I, 8>(block, l, row, ids),
        _ => {
            for token in block.chunks_exact(row) {
                ids.extend(token[l * k..][..k].iter().map(|id| id.index() as u16));
            }
        }
    }
}
