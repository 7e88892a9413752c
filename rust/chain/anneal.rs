//! Simulated annealing by swaps, one by one or all of an expert at once, and by relabelling suffixes.

use std::sync::LazyLock;

use super::state::State;
use crate::anneal::{self, Blocks, Length, Ramp};
use crate::control::Control;
use crate::random::{Random, scale};

/// A cooling schedule, with temperatures in units of the mean pair cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    pub(crate) length: Length,
    pub(crate) hot: f64,
    pub(crate) cold: f64,
    /// Whether the search may exceed caps on its way: where hardly any swap keeps them, it cannot reach other placements
    /// otherwise.
    pub(crate) exceeds_caps: bool,
}

/// First and last price of a token above its cap, as a multiple of the mean cost of a token in its layer: the price rises
/// while a run cools.
const FIRST_PRICE: f64 = 0.5;
const LAST_PRICE: f64 = 16.0;

/// Every block also tries one relabelling: by swaps alone the search gets stuck.
const BLOCKS: Blocks = Blocks { trials: 512, check: 64 };
/// Blocks where a trial evaluates all swaps of an expert. Such a block stays in one layer, so that its tables stay in the
/// cache.
const WIDE_BLOCKS: Blocks = Blocks { trials: 64, check: 16 };

/// -ln(u) at the middle of 4096 equal parts of (0, 1): the thresholds of the Metropolis rule.
static THRESHOLDS: LazyLock<Vec<f64>> =
    LazyLock::new(|| (0..4096).map(|i| -libm::log((f64::from(i) + 0.5) / 4096.0)).collect());

/// Quantiles of Gumbel's distribution at the middle of 4096 equal parts of (0, 1). The smallest of several cost changes, each
/// reduced by such a number times the temperature, is a sample of their Boltzmann distribution (Gumbel, 1954).
static GUMBEL: LazyLock<Vec<f32>> = LazyLock::new(|| {
    (0..4096).map(|i| -libm::log(-libm::log((f64::from(i) + 0.5) / 4096.0)) as f32).collect()
});
/// Offsets in a run's noise at which the noise of a trial may begin.
const OFFSETS: usize = 4096;
/// Largest number of passes over all experts at the end of a run.
const QUENCH_PASSES: usize = 8;

/// Anneals a state in place; stops early if `control` is stopped.
///
/// The state may then have any temperature between the first and the last.
pub(crate) fn anneal(state: &mut State<'_>, schedule: Schedule, random: &mut Random, control: &Control) {
    let instance = state.instance;
    let slots = instance.sizes.slots();
    // Mean cost of a token in every layer: that of the pairs of an expert, by the expert's tokens.
    let token_cost =
        |tokens: u64| instance.unit * slots as f64 * instance.sizes.experts as f64 / tokens.max(1) as f64;
    let token_cost: Vec<f64> =
        instance.load.chunks_exact(slots.max(1)).map(|load| token_cost(load.iter().sum())).collect();
    let ramps = [
        Ramp {
            first: schedule.hot * instance.unit,
            change: schedule.cold * instance.cheapest_share / schedule.hot,
        },
        Ramp { first: FIRST_PRICE, change: LAST_PRICE / FIRST_PRICE },
    ];
    let last_price = schedule.exceeds_caps.then_some(LAST_PRICE);
    if instance.sizes.is_wide() {
        let noise: Vec<f32> = (0..OFFSETS + slots).map(|_| GUMBEL[random.below(GUMBEL.len())]).collect();
        anneal::anneal(schedule.length, WIDE_BLOCKS, ramps, control, |[temperature, price]| {
            wide_block(
                state,
                temperature,
                schedule.exceeds_caps.then_some(price),
                &token_cost,
                &noise,
                random,
            );
            try_relabelling(state, temperature, random);
        });
        // A run that cools ends in a local optimum of swaps.
        if schedule.cold < schedule.hot {
            quench(state, last_price, &token_cost, &noise, control);
        }
    } else {
        anneal::anneal(schedule.length, BLOCKS, ramps, control, |[temperature, price]| {
            block(state, temperature, schedule.exceeds_caps.then_some(price), &token_cost, random);
            try_relabelling(state, temperature, random);
        });
    }
    if schedule.exceeds_caps {
        let price: Vec<f64> = token_cost.iter().map(|token_cost| LAST_PRICE * token_cost).collect();
        state.repair_caps(&price);
    }
}

/// Makes trials at a temperature, each of a single swap. With a price of tokens above caps, loads may exceed caps.
fn block(
    state: &mut State<'_>,
    temperature: f64,
    price: Option<f64>,
    token_cost: &[f64],
    random: &mut Random,
) {
    let instance = state.instance;
    let (layers, slots) = (instance.sizes.layers, instance.sizes.slots());
    let thresholds: &[f64; 4096] = THRESHOLDS.as_slice().try_into().expect("4096 thresholds");
    for _ in 0..BLOCKS.trials {
        let bits = random.bits();
        // The high half chooses the layer and, by what remains after that, the expert; the low half chooses the slot.
        let place = (bits >> 32) * layers as u64;
        let (layer, expert) = ((place >> 32) as usize, scale(place & 0xFFFF_FFFF, slots));
        let slot = scale(bits & 0xFFFF_FFFF, slots);
        let Some(swap) = state.swap_with_slot(layer, expert, slot) else { continue };
        let change = state.cost_change(swap) as f64;
        // The lowest bits hardly matter for the slot, so they choose the threshold.
        let allowed = temperature * thresholds[(bits & 4095) as usize];
        let accepted = if let Some(price) = price {
            change + price * token_cost[layer] * state.excess_change(swap) as f64 <= allowed
        } else {
            change <= allowed && state.fits(swap)
        };
        if accepted {
            state.apply(swap);
        }
    }
}

/// Makes trials at a temperature, each of which draws one of all swaps of an expert by its probability at that temperature.
///
/// With many devices nearly all single swaps are rejected, so that trying them one by one takes far longer.
fn wide_block(
    state: &mut State<'_>,
    temperature: f64,
    price: Option<f64>,
    token_cost: &[f64],
    noise: &[f32],
    random: &mut Random,
) {
    let slots = state.instance.sizes.slots();
    let layer = random.below(state.instance.sizes.layers);
    let price = price.map(|price| (price * token_cost[layer]) as f32);
    for _ in 0..WIDE_BLOCKS.trials {
        let bits = random.bits();
        // The high half chooses the expert, the low half where its noise begins.
        let (expert, offset) = (scale(bits >> 32, slots), scale(bits & 0xFFFF_FFFF, OFFSETS));
        let noise = &noise[offset..][..=slots];
        if let Some(swap) = state.choose(layer, expert, temperature as f32, noise, price) {
            state.apply(swap);
        }
    }
}

/// Makes the best swap of every expert in turn, until no swap improves the state.
fn quench(state: &mut State<'_>, price: Option<f64>, token_cost: &[f64], noise: &[f32], control: &Control) {
    let (layers, slots) = (state.instance.sizes.layers, state.instance.sizes.slots());
    let mut improved = true;
    for _ in 0..QUENCH_PASSES {
        if !improved {
            break;
        }
        improved = false;
        for (layer, token_cost) in (0..layers).zip(token_cost) {
            if control.stopped() {
                return;
            }
            let price = price.map(|price| (price * token_cost) as f32);
            for expert in 0..slots {
                if let Some(swap) = state.choose(layer, expert, 0.0, &noise[..=slots], price) {
                    state.apply(swap);
                    improved = true;
                }
            }
        }
    }
}

/// Tries one exchange of device labels, in all layers from a random one on.
fn try_relabelling(state: &mut State<'_>, temperature: f64, random: &mut Random) {
    let (instance, layers) = (state.instance, state.instance.sizes.layers);
    if layers > 1 && !instance.exchanges.is_empty() {
        let l = 1 + random.below(layers - 1);
        let pairs = &instance.exchanges[random.below(instance.exchanges.len())];
        let change: i64 = pairs.iter().map(|&(g, h)| state.relabel_change(l, g.into(), h.into())).sum();
        if change as f64 <= temperature * THRESHOLDS[(random.bits() & 4095) as usize] {
            for &(g, h) in pairs {
                state.relabel(l, g.into(), h.into());
            }
        }
    }
}
