//! Places all layers: each on its own where nothing joins them, in turns where transitions do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::anneal::{Effort, HOT, WARM, search};
use super::{Layer, Placement};
use crate::control::Control;
use crate::random::Random;

/// The part of the time left that searches may take.
const SAFE: f64 = 0.95;
/// Searches of a layer after which no more are made if most of them found the same best cost.
const SURE: u64 = 4;
/// Costs that differ by less of themselves are the same: devices in another order are summed up in another one.
const ALIKE: f64 = 1e-6;

/// What joins neighbouring layers.
#[derive(Debug, Clone, Copy)]
pub struct Links<'a> {
    /// Transitions `[L - 1, E, E]`; empty where nothing joins the layers.
    pub transitions: &'a [u64],
    /// Cost of a transition between devices `[D, D]`, in the unit of each layer's balance when multiplied by its scale.
    pub cost: &'a [f64],
}

/// Anneals every layer from its start; with links, layer after layer given its neighbours, `rounds` times.
///
/// One seed gives one answer on any number of threads: every layer has its own random stream, and layers that are
/// searched at once are no neighbours.
#[must_use]
pub fn place(
    layers: &mut [Layer],
    start: Vec<Placement>,
    links: Links<'_>,
    effort: Effort,
    rounds: u64,
    seed: u64,
    control: &Control,
) -> Vec<Placement> {
    if links.transitions.is_empty() {
        let all: Vec<usize> = (0..layers.len()).collect();
        return turn(layers, &all, &start, effort, 1, seed, 0, control);
    }
    let mut now = start;
    for round in 0..2 * rounds {
        if control.stopped() {
            break;
        }
        let these: Vec<usize> = (round as usize % 2..layers.len()).step_by(2).collect();
        let price = |&l: &usize| (!control.stopped()).then(|| prices(layers, &now, links, l));
        let Some(priced) = these.par_iter().map(price).collect::<Option<Vec<_>>>() else { break };
        for (&l, price) in these.iter().zip(priced) {
            layers[l].serve = price;
        }
        let stream = (round / 2 + 1) * layers.len() as u64;
        let found = turn(layers, &these, &now, effort, 2 * rounds - round, seed, stream, control);
        for (l, placement) in these.into_iter().zip(found) {
            now[l] = placement;
        }
    }
    now
}

/// Placements of `these` layers after a turn, of which so many are to come in what is left of the time.
///
/// Every layer is searched once before any is searched again, and again only where there is time for it: a search that
/// is cut short costs more than another one brings. Where most of a few searches end at the same cost, others would, too.
fn turn(
    layers: &[Layer],
    these: &[usize],
    now: &[Placement],
    effort: Effort,
    turns: u64,
    seed: u64,
    stream: u64,
    control: &Control,
) -> Vec<Placement> {
    let left = |end: Instant| end.saturating_duration_since(Instant::now());
    let end = control.deadline().map(|end| Instant::now() + left(end).mul_f64(SAFE / turns as f64));
    // Every other search of a layer is hot.
    let run = |l: usize, restart: u64, time: Option<Duration>| {
        let seed = seed.wrapping_add(restart.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let hot = if restart.is_multiple_of(2) { WARM } else { HOT };
        search(
            &layers[l],
            now[l].clone(),
            effort,
            hot,
            time,
            &mut Random::new(seed, stream + l as u64),
            control,
        )
    };
    let waiting = AtomicUsize::new(these.len());
    let first = |&l: &usize| {
        // Layers that have not begun share the time with this one.
        let waves = waiting.fetch_sub(1, Ordering::Relaxed).div_ceil(rayon::current_num_threads());
        let begin = Instant::now();
        let found = run(l, 0, end.map(|end| left(end) / waves as u32));
        (found, begin.elapsed())
    };
    let (mut best, took): (Vec<_>, Vec<_>) = these.par_iter().map(first).unzip();
    let again = |&(i, restart): &(usize, u64)| {
        let time = end.map(left);
        let in_time = time.is_none_or(|time| time >= took[i]) && !control.stopped();
        in_time.then(|| run(these[i], restart, time))
    };
    let mut costs: Vec<Vec<f64>> = best.iter().map(|found| vec![found.0]).collect();
    let visits_alone = these.iter().all(|&l| layers[l].windows.is_weightless());
    let few = if visits_alone { 2 } else { SURE }.min(effort.restarts);
    let (mut from, mut to) = (1, few);
    while from < effort.restarts {
        let open = (from..to).flat_map(|restart| (0..these.len()).map(move |i| (i, restart)));
        let open: Vec<(usize, u64)> = open.filter(|(i, _)| !agree(&costs[*i], visits_alone)).collect();
        let others: Vec<_> = open.par_iter().map(again).collect();
        for ((i, _), found) in open.into_iter().zip(others) {
            let Some(found) = found else { continue };
            costs[i].push(found.0);
            if found.0 < best[i].0 {
                best[i] = found;
            }
        }
        (from, to) = (to, if visits_alone { to + 1 } else { effort.restarts });
    }
    best.into_iter().map(|(_, placement)| placement).collect()
}

/// Whether most searches of a layer found the best one's cost.
///
/// Visits are whole numbers: where two searches end at the same one, others hardly ever end below it.
fn agree(costs: &[f64], visits_alone: bool) -> bool {
    let best = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let alike = if visits_alone { 0.0 } else { ALIKE };
    let same = costs.iter().filter(|&&cost| cost <= best + alike * best.abs()).count();
    if visits_alone { same >= 2 } else { costs.len() as u64 >= SURE && 2 * same > costs.len() }
}

/// What serving an expert of layer `l` costs on a device `[E, D]`, given where the neighbours' experts are: copies of
/// those take equal parts.
pub(super) fn prices(layers: &[Layer], now: &[Placement], links: Links<'_>, l: usize) -> Vec<f64> {
    let (e, d) = (layers[l].experts, layers[l].devices());
    let table = e * e;
    // Tokens between every expert and the devices of a neighbour.
    let mut tokens = vec![0.0; e * d];
    let mut meet = |expert: usize, devices: &[u16], count: u64| {
        if count > 0 {
            for &device in devices {
                tokens[expert * d + usize::from(device)] += count as f64 / devices.len() as f64;
            }
        }
    };
    for x in 0..e {
        if l > 0 {
            for y in 0..e {
                meet(x, now[l - 1].devices(y as u16), links.transitions[(l - 1) * table + y * e + x]);
            }
        }
        if l + 1 < layers.len() {
            for y in 0..e {
                meet(x, now[l + 1].devices(y as u16), links.transitions[l * table + x * e + y]);
            }
        }
    }
    let scale = layers[l].windows.scale;
    let mut prices = vec![0.0; e * d];
    for (price, tokens) in prices.chunks_exact_mut(d).zip(tokens.chunks_exact(d)) {
        for (device, price) in price.iter_mut().enumerate() {
            let row = &links.cost[device * d..][..d];
            *price = row.iter().zip(tokens).map(|(cost, tokens)| cost * tokens).sum::<f64>() * scale;
        }
    }
    prices
}
