//! A budget of moved copies: spent on the layers where a copy gains most.

/// A way for a layer.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// Copies that it brings.
    pub moves: usize,
    /// Time of the slowest device.
    pub slowest: f64,
    /// What it costs: what is to be made small.
    pub cost: f64,
}

/// When a budget is spent.
#[derive(Debug, Clone, Copy)]
pub struct Spending {
    /// Copies that are brought at the most, in all layers.
    pub max_moves: usize,
    /// What a copy must gain, in cost.
    pub min_gain: f64,
    /// A layer stays as it is unless the time of its slowest device falls by more than this part,
    pub dead_zone: f64,
    /// and by more than so many standard deviations of counts as large, as the slowest of all devices has them.
    pub deviations: f64,
    /// Devices of a layer.
    pub devices: usize,
}

impl Spending {
    /// Whether a layer's slowest device gains enough.
    ///
    /// The slowest of D devices that differ by chance alone is sqrt(2 ln D) standard deviations above their mean.
    fn is_enough(&self, before: f64, after: f64) -> bool {
        // In single precision, as logarithms end in other bits elsewhere and every rank must choose alike.
        let slowest = f64::from((2.0 * (self.devices as f64).ln()) as f32).sqrt();
        let chance = self.deviations * slowest * f64::midpoint(before, after).sqrt();
        before - after > (self.dead_zone * before).max(chance)
    }
}

/// Copies that a move counts as which brings none, or takes some back.
const FREE: f64 = 1e-3;
/// A way must not be slower by more than sums of floats can be off.
const ROUNDING: f64 = 1e-12;

/// What a gain counts for each copy, of a move that brings up to two of them.
#[inline(always)]
pub(super) fn per_copy(copies: f64) -> f64 {
    if copies > 1.5 {
        0.5
    } else if copies > 0.5 {
        1.0
    } else {
        1.0 / FREE
    }
}

/// The way of every layer with which a budget gains most; the first of a layer's ways is to stay.
#[must_use]
pub fn choose(layers: &[&[Way]], spending: Spending) -> Vec<usize> {
    let mut chosen = vec![0; layers.len()];
    let mut left = spending.max_moves.saturating_sub(layers.iter().map(|ways| ways[0].moves).sum());
    let mut offers: Vec<_> = layers.iter().map(|ways| next(ways, 0, spending.min_gain)).collect();
    let best = |offers: &[Option<(f64, usize)>]| {
        let open = offers.iter().enumerate().filter_map(|(layer, offer)| Some((layer, (*offer)?)));
        open.reduce(|best, other| if other.1.0 > best.1.0 { other } else { best })
    };
    while let Some((layer, (_, to))) = best(&offers) {
        let ways = layers[layer];
        let needs = ways[to].moves.saturating_sub(ways[chosen[layer]].moves);
        offers[layer] = None;
        if needs <= left {
            (left, chosen[layer], offers[layer]) = (left - needs, to, next(ways, to, spending.min_gain));
        }
    }
    for (ways, way) in layers.iter().zip(&mut chosen) {
        if !spending.is_enough(ways[0].slowest, ways[*way].slowest) {
            *way = 0;
        }
    }
    chosen
}

/// What a copy gains on the way from one of a layer's ways on which it gains most, and where that leads: the farthest of
/// equals, none slower than to stay.
fn next(ways: &[Way], from: usize, min_gain: f64) -> Option<(f64, usize)> {
    let (limit, Way { moves, cost, .. }) = (ways[0].slowest * (1.0 + ROUNDING), ways[from]);
    let open = (0..ways.len()).filter(|&to| ways[to].slowest <= limit && ways[to].cost < cost);
    let (mut best, mut top) = (None, (0.0, 0));
    for to in open {
        let Way { moves: then, cost: less, .. } = ways[to];
        let (gain, copies) = (cost - less, then.saturating_sub(moves) as f64);
        if (gain / copies.max(FREE), then) > top {
            (best, top) = (Some((gain / copies.max(1.0), to)), (gain / copies.max(FREE), then));
        }
    }
    best.filter(|&(gain, _)| gain > min_gain)
}
