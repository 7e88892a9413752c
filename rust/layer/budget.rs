//! Spends a budget of moved copies on the layers where a moved copy gains most.

/// A state that a layer may end in: as it runs, or after some steps.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// Copies that have to move for it.
    pub moves: usize,
    /// Time of the slowest device.
    pub slowest: f64,
    /// Cost that the search minimises.
    pub cost: f64,
}

/// How many copies may move, and what a move must gain.
#[derive(Debug, Clone, Copy)]
pub struct Spending {
    /// Most copies that move, in all layers together.
    pub max_moves: usize,
    /// Least that a copy must gain, in cost.
    pub min_gain: f64,
    /// A layer stays as it is unless the time of its slowest device falls by more than this part of it.
    pub dead_zone: f64,
    /// Standard deviations of a count, by which the time must fall as well; the slowest of many devices is further from
    /// the mean, which [`Spending::is_enough`] adds.
    pub deviations: f64,
    /// Devices of a layer.
    pub devices: usize,
}

impl Spending {
    /// Returns whether a layer's slowest device gains enough.
    ///
    /// The slowest of D devices that differ by chance alone is sqrt(2 ln D) standard deviations above their mean.
    fn is_enough(&self, before: f64, after: f64) -> bool {
        // In single precision, as logarithms end in other bits elsewhere and every rank must choose alike.
        let slowest = f64::from((2.0 * (self.devices as f64).ln()) as f32).sqrt();
        let chance = self.deviations * slowest * f64::midpoint(before, after).sqrt();
        before - after > (self.dead_zone * before).max(chance)
    }
}

/// The number of copies by which the gain of a step is divided that moves none, or brings some back to where they run:
/// such a step comes first unless another gains a thousand times as much per copy.
const COPIES_OF_FREE_STEP: f64 = 1e-3;
/// A choice may be slower than the running slots by this part: sums of floats can be off by it.
const ROUNDING: f64 = 1e-12;

/// Returns the factor that makes a step's gain a gain per moved copy; a step moves two copies at most.
///
/// That is one over the number of copies, which are whole numbers as floats.
#[inline(always)]
pub(super) fn factor_per_copy(copies: f64) -> f64 {
    if copies > 1.5 {
        0.5
    } else if copies > 0.5 {
        1.0
    } else {
        1.0 / COPIES_OF_FREE_STEP
    }
}

/// Returns the number of every layer's choice, so that the budget gains much; a layer's first choice is to stay as it runs.
///
/// The search is greedy: the budget goes to the layer whose next choice gains most per moved copy, until no choice gains or
/// fits.
#[must_use]
pub fn choose(layers: &[&[Choice]], spending: Spending) -> Vec<usize> {
    let mut chosen = vec![0; layers.len()];
    let mut moves_left =
        spending.max_moves.saturating_sub(layers.iter().map(|choices| choices[0].moves).sum());
    let mut offers: Vec<_> = layers.iter().map(|choices| steepest(choices, 0, spending.min_gain)).collect();
    let best = |offers: &[Option<(f64, usize)>]| {
        let open = offers.iter().enumerate().filter_map(|(layer, offer)| Some((layer, (*offer)?)));
        open.reduce(|best, other| if other.1.0 > best.1.0 { other } else { best })
    };
    while let Some((layer, (_, to))) = best(&offers) {
        let choices = layers[layer];
        let needs = choices[to].moves.saturating_sub(choices[chosen[layer]].moves);
        offers[layer] = None;
        if needs <= moves_left {
            (moves_left, chosen[layer], offers[layer]) =
                (moves_left - needs, to, steepest(choices, to, spending.min_gain));
        }
    }
    for (choices, choice) in layers.iter().zip(&mut chosen) {
        if !spending.is_enough(choices[0].slowest, choices[*choice].slowest) {
            *choice = 0;
        }
    }
    chosen
}

/// Returns the largest gain per moved copy over the choice at `from`, and the choice that has it; of equals the one that
/// moves most.
///
/// A choice whose slowest device is slower than if the layer stayed is not taken.
fn steepest(choices: &[Choice], from: usize, min_gain: f64) -> Option<(f64, usize)> {
    let (limit, Choice { moves, cost, .. }) = (choices[0].slowest * (1.0 + ROUNDING), choices[from]);
    let open = (0..choices.len()).filter(|&to| choices[to].slowest <= limit && choices[to].cost < cost);
    let (mut best, mut top) = (None, (0.0, 0));
    for to in open {
        let Choice { moves: moves_then, cost: cost_then, .. } = choices[to];
        let (gain, copies) = (cost - cost_then, moves_then.saturating_sub(moves) as f64);
        if (gain / copies.max(COPIES_OF_FREE_STEP), moves_then) > top {
            (best, top) =
                (Some((gain / copies.max(1.0), to)), (gain / copies.max(COPIES_OF_FREE_STEP), moves_then));
        }
    }
    best.filter(|&(gain, _)| gain > min_gain)
}
