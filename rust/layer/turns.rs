//! Anneals all layers: each by itself where nothing joins them, in turns where transitions do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::anneal::{COOL, HOT, WARM, search};
pub use super::anneal::{Effort, Heat};
use super::{Layer, Slots};
use crate::control::Control;
use crate::random::Random;

/// Part of the time left that searches may take.
const SAFE: f64 = 0.95;
/// Searches of a layer after which no more follow if most of them found the same best cost.
const SURE: u64 = 4;
/// Costs within this part of each other are the same: other orders of devices round sums in another way.
const ALIKE: f64 = 1e-6;

/// Links that join neighbouring layers.
#[derive(Debug, Clone, Copy)]
pub struct Links<'a> {
    /// Transitions `[L - 1, E, E]`; empty where nothing joins the layers.
    pub transitions: &'a [u64],
    /// Cost of a transition between devices `[D, D]`, in the unit of each layer's balance when multiplied by its scale.
    pub cost: &'a [f64],
}

/// Returns the slots of every layer, annealed from its start; with links in rounds, each layer while its neighbours stay.
/// Without links, only the `chosen` layers change, if some are.
///
/// One seed gives one answer on any number of threads: every layer has its own random stream, and layers that are
/// searched at once are no neighbours.
#[must_use]
pub fn place(
    layers: &mut [Layer],
    start: Vec<Slots>,
    links: Links<'_>,
    effort: Effort,
    chosen: Option<&[usize]>,
    seed: u64,
    control: &Control,
) -> Vec<Slots> {
    let mut now = start;
    if links.transitions.is_empty() {
        let all: Vec<usize> = (0..layers.len()).collect();
        let chosen = chosen.unwrap_or(&all);
        for (&l, slots) in chosen.iter().zip(turn(layers, chosen, &now, effort, 1, seed, 0, control)) {
            now[l] = slots;
        }
        return now;
    }
    for round in 0..2 * effort.rounds {
        if control.stopped() {
            break;
        }
        let turn_layers: Vec<usize> = (round as usize % 2..layers.len()).step_by(2).collect();
        let price =
            |&l: &usize| (!control.stopped()).then(|| prices(&layers[l], neighbours(&now, l), links, l));
        let Some(priced) = turn_layers.par_iter().map(price).collect::<Option<Vec<_>>>() else { break };
        for (&l, price) in turn_layers.iter().zip(priced) {
            layers[l].costs.serve_cost = price;
        }
        let stream = (round / 2 + 1) * layers.len() as u64;
        let turned =
            turn(layers, &turn_layers, &now, effort, 2 * effort.rounds - round, seed, stream, control);
        for (l, slots) in turn_layers.into_iter().zip(turned) {
            now[l] = slots;
        }
    }
    // These prices hold only for where the neighbours were.
    for layer in layers {
        layer.costs.serve_cost.clear();
    }
    now
}

/// Returns the slots of `turn_layers` after a turn; `turns` is how many turns share the time left.
///
/// Every layer is searched once before any is searched again, and again only where there is time for it: a search that
/// is cut short costs more than another one brings. Where most of a few searches end at the same cost, others would, too.
fn turn(
    layers: &[Layer],
    turn_layers: &[usize],
    now: &[Slots],
    effort: Effort,
    turns: u64,
    seed: u64,
    stream: u64,
    control: &Control,
) -> Vec<Slots> {
    let time_left = |end: Instant| end.saturating_duration_since(Instant::now());
    let end = control.deadline.map(|end| Instant::now() + time_left(end).mul_f64(SAFE / turns as f64));
    // By default every other search of a layer is hot.
    let run = |l: usize, restart: u64, time: Option<Duration>| {
        let seed = seed.wrapping_add(restart.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let schedule = match effort.heat {
            _ if effort.quick => COOL,
            Heat::InTurn if restart.is_multiple_of(2) => WARM,
            Heat::Warm => WARM,
            Heat::InTurn | Heat::Hot => HOT,
            Heat::Cool => COOL,
        };
        let mut random = Random::new(seed, stream + l as u64);
        search(&layers[l], &now[l], effort, schedule, time, &mut random, control)
    };
    let waiting = AtomicUsize::new(turn_layers.len());
    let first = |&l: &usize| {
        // Layers that have not begun share the time with this one.
        let threads = if effort.parallel { rayon::current_num_threads() } else { 1 };
        let waves = waiting.fetch_sub(1, Ordering::Relaxed).div_ceil(threads);
        let begin = Instant::now();
        let result = run(l, 0, end.map(|end| time_left(end) / waves as u32));
        (result, begin.elapsed())
    };
    let (mut best, took): (Vec<_>, Vec<_>) = for_all(effort, turn_layers, first).into_iter().unzip();
    let again = |&(i, restart): &(usize, u64)| {
        let time = end.map(time_left);
        let in_time = time.is_none_or(|time| time >= took[i]) && !control.stopped();
        in_time.then(|| run(turn_layers[i], restart, time))
    };
    let mut costs: Vec<Vec<f64>> = best.iter().map(|(cost, _)| vec![*cost]).collect();
    let visits_alone = turn_layers.iter().all(|&l| layers[l].windows.is_weightless());
    let first_searches = if visits_alone { 2 } else { SURE }.min(effort.restarts);
    let (mut from, mut to) = (1, first_searches);
    while from < effort.restarts {
        let open = (from..to).flat_map(|restart| (0..turn_layers.len()).map(move |i| (i, restart)));
        let open: Vec<(usize, u64)> = open.filter(|(i, _)| !agree(&costs[*i], visits_alone)).collect();
        let others = for_all(effort, &open, again);
        for ((i, _), other) in open.into_iter().zip(others) {
            let Some(other) = other else { continue };
            costs[i].push(other.0);
            if other.0 < best[i].0 {
                best[i] = other;
            }
        }
        (from, to) = (to, if visits_alone { to + 1 } else { effort.restarts });
    }
    best.into_iter().map(|(_, slots)| slots).collect()
}

/// Returns results for all items, in their order.
fn for_all<T: Sync, R: Send>(effort: Effort, items: &[T], result: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if effort.parallel { items.par_iter().map(result).collect() } else { items.iter().map(result).collect() }
}

/// Returns whether most searches of a layer found the best cost.
///
/// Visits are whole numbers: where two searches end at the same one, others hardly ever end below it.
fn agree(costs: &[f64], visits_alone: bool) -> bool {
    let best = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let alike = if visits_alone { 0.0 } else { ALIKE };
    let same = costs.iter().filter(|&&cost| cost <= best + alike * best.abs()).count();
    if visits_alone { same >= 2 } else { costs.len() as u64 >= SURE && 2 * same > costs.len() }
}

/// Returns the layers before and after a layer, if there are any.
pub(super) fn neighbours<T>(layers: &[T], l: usize) -> [Option<&T>; 2] {
    [l.checked_sub(1).map(|l| &layers[l]), layers.get(l + 1)]
}

/// Returns the cost of serving an expert of layer `l` on a device `[E, D]`, given where the neighbours' experts are; copies
/// of those share tokens evenly.
pub(super) fn prices(layer: &Layer, neighbours: [Option<&Slots>; 2], links: Links<'_>, l: usize) -> Vec<f64> {
    let (e, d) = (layer.experts, layer.devices());
    // Tokens between every expert and the devices of a neighbour.
    let mut tokens = vec![0.0; e * d];
    for (after, slots) in neighbours.into_iter().enumerate().filter_map(|(n, slots)| Some((n > 0, slots?))) {
        let table = &links.transitions[(l - usize::from(!after)) * e * e..][..e * e];
        for (x, tokens) in tokens.chunks_exact_mut(d).enumerate() {
            for y in 0..e {
                let count = if after { table[x * e + y] } else { table[y * e + x] };
                let per_copy = count as f64 / f64::from(slots.copies[y]);
                for device in slots.devices(y as u16).filter(|_| count > 0) {
                    tokens[usize::from(device)] += per_copy;
                }
            }
        }
    }
    let scale = layer.windows.scale;
    let mut prices = vec![0.0; e * d];
    for (price, tokens) in prices.chunks_exact_mut(d).zip(tokens.chunks_exact(d)) {
        for (device, price) in price.iter_mut().enumerate() {
            let row = &links.cost[device * d..][..d];
            *price = row.iter().zip(tokens).map(|(cost, tokens)| cost * tokens).sum::<f64>() * scale;
        }
    }
    prices
}
