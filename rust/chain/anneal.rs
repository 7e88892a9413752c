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
    /// Whether caps may be crossed on the way: where hardly any swap keeps them, only so can others be reached.
    pub(crate) crosses: bool,
}

/// Price of a token above its cap, in what a token of its layer costs on average: it rises while a run cools.
const LENIENT: f64 = 0.5;
const FIRM: f64 = 16.0;

/// Each block also tries one relabelling, without which swaps get stuck.
const BLOCKS: Blocks = Blocks { trials: 512, check: 64 };
/// The same where a trial looks at all swaps of an expert; such a block is of one layer, whose tables then are at hand.
const WIDE_BLOCKS: Blocks = Blocks { trials: 64, check: 16 };

/// -ln(u) at the middle of 4096 equal parts of (0, 1): the thresholds of the Metropolis rule.
static THRESHOLDS: LazyLock<Vec<f64>> =
    LazyLock::new(|| (0..4096).map(|i| -libm::log((f64::from(i) + 0.5) / 4096.0)).collect());

/// Gumbel's distribution at the middle of 4096 equal parts of (0, 1). The least of some changes, each less such a number
/// times the temperature, is chosen as often as heat would choose it (Gumbel, 1954).
static GUMBEL: LazyLock<Vec<f32>> = LazyLock::new(|| {
    (0..4096).map(|i| -libm::log(-libm::log((f64::from(i) + 0.5) / 4096.0)) as f32).collect()
});
/// A trial's numbers begin anywhere among so many of its run's.
const NUMBERS: usize = 4096;
/// Times that all experts are looked at, at the most, when a run is cold.
const LAST: usize = 8;

/// Anneals in place; stops early, somewhere in between, when told to.
pub(crate) fn anneal(state: &mut State<'_>, schedule: Schedule, random: &mut Random, control: &Control) {
    let instance = state.instance;
    let slots = instance.sizes.slots();
    // What the pairs of an expert cost on average, by its tokens.
    let worth =
        |tokens: u64| instance.unit * slots as f64 * instance.sizes.experts as f64 / tokens.max(1) as f64;
    let worth: Vec<f64> =
        instance.load.chunks_exact(slots.max(1)).map(|load| worth(load.iter().sum())).collect();
    let ramps = [
        Ramp { first: schedule.hot * instance.unit, change: schedule.cold * instance.finest / schedule.hot },
        Ramp { first: LENIENT, change: FIRM / LENIENT },
    ];
    let firm = schedule.crosses.then_some(FIRM);
    if instance.sizes.is_wide() {
        let noise: Vec<f32> = (0..NUMBERS + slots).map(|_| GUMBEL[random.below(GUMBEL.len())]).collect();
        anneal::anneal(schedule.length, WIDE_BLOCKS, ramps, control, |[temperature, price]| {
            wide_block(state, temperature, schedule.crosses.then_some(price), &worth, &noise, random);
            exchange(state, temperature, random);
        });
        // A run that cools ends where no swap of an expert gains anything.
        if schedule.cold < schedule.hot {
            quench(state, firm, &worth, &noise, control);
        }
    } else {
        anneal::anneal(schedule.length, BLOCKS, ramps, control, |[temperature, price]| {
            block(state, temperature, schedule.crosses.then_some(price), &worth, random);
            exchange(state, temperature, random);
        });
    }
    if schedule.crosses {
        let price: Vec<f64> = worth.iter().map(|worth| FIRM * worth).collect();
        state.repair_caps(&price);
    }
}

/// Makes trials at a temperature; with a price of tokens above caps they may be crossed.
fn block(state: &mut State<'_>, temperature: f64, price: Option<f64>, worth: &[f64], random: &mut Random) {
    let instance = state.instance;
    let (layers, slots) = (instance.sizes.layers, instance.sizes.slots());
    let thresholds: &[f64; 4096] = THRESHOLDS.as_slice().try_into().expect("4096 thresholds");
    for _ in 0..BLOCKS.trials {
        let bits = random.bits();
        // Layer and expert from the high half (what the layer leaves over chooses the expert), slot from the low.
        let place = (bits >> 32) * layers as u64;
        let (layer, expert) = ((place >> 32) as usize, scale(place & 0xFFFF_FFFF, slots));
        let slot = scale(bits & 0xFFFF_FFFF, slots);
        let Some(swap) = state.swap_with_slot(layer, expert, slot) else { continue };
        let change = state.change(swap) as f64;
        // The low bits hardly matter for the slot: they are free to choose the threshold.
        let allowed = temperature * thresholds[(bits & 4095) as usize];
        let accepted = if let Some(price) = price {
            change + price * worth[layer] * state.rise(swap) as f64 <= allowed
        } else {
            change <= allowed && state.fits(swap)
        };
        if accepted {
            state.apply(swap);
        }
    }
}

/// Makes trials at a temperature, each of which looks at all swaps of an expert and makes the one that heat would. Where
/// devices are many nearly all swaps are refused, and to try them one by one takes far longer.
fn wide_block(
    state: &mut State<'_>,
    temperature: f64,
    price: Option<f64>,
    worth: &[f64],
    noise: &[f32],
    random: &mut Random,
) {
    let slots = state.instance.sizes.slots();
    let layer = random.below(state.instance.sizes.layers);
    let price = price.map(|price| (price * worth[layer]) as f32);
    for _ in 0..WIDE_BLOCKS.trials {
        let bits = random.bits();
        // The expert from the high half, its numbers from the low.
        let (expert, at) = (scale(bits >> 32, slots), scale(bits & 0xFFFF_FFFF, NUMBERS));
        let noise = &noise[at..][..=slots];
        if let Some(swap) = state.choose(layer, expert, temperature as f32, noise, price) {
            state.apply(swap);
        }
    }
}

/// Makes the best swap of every expert in turn, until none is left.
fn quench(state: &mut State<'_>, price: Option<f64>, worth: &[f64], noise: &[f32], control: &Control) {
    let (layers, slots) = (state.instance.sizes.layers, state.instance.sizes.slots());
    let mut left = true;
    for _ in 0..LAST {
        if !left {
            break;
        }
        left = false;
        for (layer, worth) in (0..layers).zip(worth) {
            if control.stopped() {
                return;
            }
            let price = price.map(|price| (price * worth) as f32);
            for expert in 0..slots {
                if let Some(swap) = state.choose(layer, expert, 0.0, &noise[..=slots], price) {
                    state.apply(swap);
                    left = true;
                }
            }
        }
    }
}

/// Tries to exchange labels.
fn exchange(state: &mut State<'_>, temperature: f64, random: &mut Random) {
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
