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
pub struct Rules {
    /// Copies that are brought at the most, in all layers.
    pub most: usize,
    /// What a copy must gain, in cost.
    pub price: f64,
    /// A layer stays as it is unless the time of its slowest device falls by more than this part,
    pub dead_zone: f64,
    /// and by more than so many standard deviations of counts as large.
    pub deviations: f64,
}

/// Copies that a move counts as which brings none, or takes some back.
const FREE: f64 = 1e-3;
/// A way must not be slower by more than sums of floats can be off.
const ROUNDING: f64 = 1e-12;

/// What gains of a move that brings so many copies are divided by.
#[inline(always)]
pub(super) fn per_copy(moves: i64) -> f64 {
    if moves > 0 { moves as f64 } else { FREE }
}

/// The way of every layer with which a budget gains most; the first of a layer's ways is to stay.
#[must_use]
pub fn choose(layers: &[Vec<Way>], rules: Rules) -> Vec<usize> {
    let hulls: Vec<Vec<usize>> = layers.iter().map(|ways| hull(ways)).collect();
    let mut chosen = vec![0; layers.len()];
    let mut left = rules.most.saturating_sub(layers.iter().map(|ways| ways[0].moves).sum());
    // What a copy gains from one of a layer's hull on to the next, and which that is.
    let offer = |layer: usize, from: usize| {
        let (ways, hull) = (&layers[layer], &hulls[layer]);
        let (a, b) = (ways[hull[from]], ways[*hull.get(from + 1)?]);
        let slope = (a.cost - b.cost) / b.moves.saturating_sub(a.moves).max(1) as f64;
        (slope > rules.price).then_some((slope, from + 1))
    };
    let mut offers: Vec<Option<(f64, usize)>> = (0..layers.len()).map(|layer| offer(layer, 0)).collect();
    let best = |offers: &[Option<(f64, usize)>]| {
        let open = offers.iter().enumerate().filter_map(|(layer, offer)| Some((layer, (*offer)?)));
        open.reduce(|best, other| if other.1.0 > best.1.0 { other } else { best })
    };
    while let Some((layer, (_, to))) = best(&offers) {
        let (ways, next) = (&layers[layer], hulls[layer][to]);
        let needs = ways[next].moves.saturating_sub(ways[chosen[layer]].moves);
        offers[layer] = if needs <= left { offer(layer, to) } else { None };
        if needs <= left {
            (left, chosen[layer]) = (left - needs, next);
        }
    }
    for (ways, way) in layers.iter().zip(&mut chosen) {
        let (before, after) = (ways[0].slowest, ways[*way].slowest);
        let chance = rules.deviations * (before + after).sqrt();
        if before - after <= (rules.dead_zone * before).max(chance) {
            *way = 0;
        }
    }
    chosen
}

/// The ways where a line from the first one bends that lies under all of them.
fn hull(ways: &[Way]) -> Vec<usize> {
    let most = ways[0].slowest * (1.0 + ROUNDING);
    let mut order: Vec<usize> = (0..ways.len()).filter(|&at| ways[at].slowest <= most).collect();
    // To stay is first, whatever another way takes back.
    order[1..]
        .sort_by(|&a, &b| ways[a].moves.cmp(&ways[b].moves).then(ways[a].cost.total_cmp(&ways[b].cost)));
    let mut hull: Vec<usize> = vec![];
    let slope = |a: usize, b: usize| {
        let moves = ways[b].moves.saturating_sub(ways[a].moves);
        (ways[a].cost - ways[b].cost) / (moves as f64).max(FREE)
    };
    for at in order {
        if hull.last().is_some_and(|&last| ways[last].cost <= ways[at].cost) {
            continue;
        }
        while hull.len() > 1
            && slope(hull[hull.len() - 2], hull[hull.len() - 1]) <= slope(hull[hull.len() - 1], at)
        {
            hull.pop();
        }
        hull.push(at);
    }
    hull
}
