//! Annealing of one layer by swaps and, where slots are to spare, by other copies.

use std::time::{Duration, Instant};

use super::terms::Terms;
use super::{EMPTY, Layer, Move, Placement};
use crate::anneal::{self, Blocks, Length, Ramp};
use crate::control::Control;
use crate::random::{Random, scale};

/// How much to search.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Trials.
    pub trials: u64,
    /// Whether an expert's number of copies may change, where slots are to spare.
    pub copies: bool,
    /// Whether a slot that holds an expert may be emptied.
    pub empties: bool,
    /// Searches from one start, of which the best counts.
    pub restarts: u64,
}

const BLOCKS: Blocks = Blocks { trials: 256, check: 1 };
/// First temperature, in typical changes of the cost: what suits layers of 12 slots and of 288, of one window and of
/// 400 (bench/RESULTS.md).
pub(super) const WARM: f64 = 0.3;
/// A first temperature at which copies of heavy experts are given up and taken again, as layers of few slots may need.
pub(super) const HOT: f64 = 3.0;
/// Last temperature, in the same unit.
const COLD: f64 = 0.01;
/// Of few windows, which can be made nearly level: what is left to gain is small.
const COLDEST: f64 = 1e-4;
const FEW_WINDOWS: usize = 3;
/// However short the time, a layer gets this part of its trials: a start that was not annealed is worth nothing.
const QUICK: u64 = 50;
/// Proposals that are looked at to find the typical change.
const SAMPLE: usize = 255;
/// Trials between two looks at the clock where one looks at thousands of expert sets.
const DEAR: u64 = 16;

/// The best placement that annealing finds from `start` and the first temperature `hot`, and their cost.
///
/// Where the time is over before it begins that is the start, at an infinite cost: what a search needs takes time, too.
#[must_use]
pub(super) fn search(
    layer: &Layer,
    start: Placement,
    effort: Effort,
    hot: f64,
    time: Option<Duration>,
    random: &mut Random,
    control: &Control,
) -> (f64, Placement) {
    if control.stopped() {
        return (f64::INFINITY, start);
    }
    let begin = Instant::now();
    let mut placement = start;
    let mut terms = Terms::new(layer, &placement);
    let mut best = (terms.cost(layer), placement.expert_in.clone());
    // What a slot may hold instead, where slots are to spare: any expert or, as the last of them, nothing.
    let spare = effort.copies && layer.slots() > layer.experts;
    let kinds = if spare { layer.experts + usize::from(effort.empties) } else { 0 };
    let cold = if terms.balance.is_some() && layer.windows.count <= FEW_WINDOWS { COLDEST } else { COLD };
    let typical = typical_change(layer, &mut terms, &placement, kinds, random, control);
    let time = time.map(|time| time.saturating_sub(begin.elapsed()));
    let length = Length { trials: effort.trials, least: effort.trials / QUICK, time };
    let ramp = Ramp { first: hot * typical, change: cold / hot };
    anneal::anneal(length, BLOCKS, [ramp], control, |[temperature]| {
        for trial in 0..BLOCKS.trials {
            if trial % DEAR == DEAR - 1 && layer.sets.is_some() && control.stopped() {
                break;
            }
            let step = proposal(layer, kinds, random);
            if !placement.allows(layer, step) {
                continue;
            }
            let Some(change) = terms.change(layer, &placement, step) else { continue };
            if accepts(change, temperature, random.bits()) {
                terms.apply(layer, &mut placement, step);
                let cost = terms.cost(layer);
                if cost < best.0 {
                    best.0 = cost;
                    best.1.clone_from(&placement.expert_in);
                }
            }
        }
    });
    (best.0, Placement::new(layer, best.1))
}

/// A random exchange of two slots or, every eighth time where there are `kinds` of contents, others of one.
#[inline]
fn proposal(layer: &Layer, kinds: usize, random: &mut Random) -> Move {
    let bits = random.bits();
    let (p, other) = (scale(bits >> 32, layer.slots()), random.bits() >> 32);
    if kinds > 0 && bits.is_multiple_of(8) {
        let e = scale(other, kinds);
        Move::Put(p, if e == layer.experts { EMPTY } else { e as u16 })
    } else {
        Move::Swap(p, scale(other, layer.slots()))
    }
}

/// The median of what proposals would change the cost by, up or down; those that change nothing left out.
fn typical_change(
    layer: &Layer,
    terms: &mut Terms,
    placement: &Placement,
    kinds: usize,
    random: &mut Random,
    control: &Control,
) -> f64 {
    let mut changes: Vec<f64> = (0..SAMPLE)
        .take_while(|_| !control.stopped())
        .filter_map(|_| {
            let step = proposal(layer, kinds, random);
            let change = placement.allows(layer, step).then(|| terms.change(layer, placement, step))??;
            (change != 0.0).then_some(change.abs())
        })
        .collect();
    changes.sort_by(f64::total_cmp);
    changes.get(changes.len() / 2).copied().unwrap_or(0.0)
}

/// Whether a change is made: one that adds nothing always, else with probability exp(-change / temperature).
fn accepts(change: f64, temperature: f64, bits: u64) -> bool {
    if change <= 0.0 {
        return true;
    }
    // A number u from 0 to 1. Most changes are out of the question before the logarithm of it is known: u is at least
    // 2^-(z + 1) with z zeros in front.
    let zeros = (bits | 1 << 39).leading_zeros();
    if change > temperature * (f64::from(zeros + 1) * std::f64::consts::LN_2 * (1.0 + 1e-9)) {
        return false;
    }
    let uniform = ((bits >> 40) as f64 + 0.5) / (1u64 << 24) as f64;
    change <= -temperature * libm::log(uniform)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Split;
    use crate::layer::construct::{self, replicate};
    use crate::layer::terms::fanout;
    use crate::layer::terms::noise::Noise;
    use crate::layer::terms::together::Pairs;
    use crate::layer::terms::windows::Windows;
    use proptest::prelude::*;

    fn layer(random: &mut Random, experts: usize, devices: usize, norm: u32, nearest: bool) -> Layer {
        let windows = 1 + random.below(20);
        let load: Vec<f64> = (0..windows * experts).map(|_| random.below(100) as f64).collect();
        let weight: Vec<f64> = (0..windows).map(|_| 1.0 + random.below(3) as f64).collect();
        let mut room = vec![experts.div_ceil(devices); devices];
        for _ in 0..random.below(4) {
            room[random.below(devices)] += 1;
        }
        let random_costs = |random: &mut Random| -> Vec<f64> {
            (0..experts * devices).map(|_| random.below(1000) as f64).collect()
        };
        let top_k = 1 + random.below(experts.min(4));
        let sets = (0..random.below(200)).flat_map(|_| {
            let mut all: Vec<u16> = (0..experts as u16).collect();
            random.shuffle(&mut all);
            all.truncate(top_k);
            all
        });
        let ids: Vec<u16> = sets.collect();
        let counts: Vec<u64> = (0..ids.len() / top_k).map(|_| random.below(30) as u64).collect();
        let noise = (random.below(2) == 0).then_some(Noise { even: 0.1, share: 0.1, variance: 0.5 });
        let mixed = [0.0, 0.7][random.below(2)];
        let copies = room.iter().sum::<usize>() > experts;
        let mut sets = fanout::Sets::new(&ids, &counts, experts, copies);
        (sets.device_cost, sets.node_cost) = (3.0, [0.0, 7.0][random.below(2)]);
        let mut pairs = Pairs { counts: vec![0.0; experts * experts], cost: 2.0 };
        for (e, f) in (0..experts).flat_map(|e| (0..e).map(move |f| (e, f))) {
            let count = random.below(100) as f32;
            (pairs.counts[e * experts + f], pairs.counts[f * experts + e]) = (count, count);
        }
        Layer {
            experts,
            room,
            node: (0..devices as u16).map(|device| device / 2).collect(),
            time: (0..devices).map(|_| if random.below(2) == 0 { 1.0 } else { 0.5 }).collect(),
            split: if nearest { Split::Nearest } else { Split::Even },
            load: (0..experts).map(|e| load.iter().skip(e).step_by(experts).sum()).collect(),
            windows: Windows::new(&load, &weight, experts, norm, noise, mixed),
            cap: f64::INFINITY,
            hold: random_costs(random),
            serve: random_costs(random),
            sets: Some(fanout::Sets::later(move || sets)),
            pairs: Some(pairs),
            forbidden: vec![],
            pinned: vec![],
        }
    }

    proptest! {
        /// What is decided without the logarithm is what it would decide.
        #[test]
        fn acceptance_is_the_rule(bits in any::<u64>(), shift in 0u32..64, change in -1.0f64..30.0) {
            let bits = bits >> shift;
            let uniform = ((bits >> 40) as f64 + 0.5) / (1u64 << 24) as f64;
            prop_assert_eq!(accepts(change, 1.5, bits), change <= -1.5 * libm::log(uniform));
        }

        /// What every term says of a move is what a fresh count says; for a norm, no less.
        #[test]
        fn changes_are_exact(
            experts in 1usize..8,
            devices in 1usize..5,
            norm in prop::sample::select(vec![0u32, 2, 4, 8, 16]),
            nearest in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut random = Random::new(seed, 0);
            let layer = layer(&mut random, experts, devices, norm, nearest);
            let start = replicate(&layer, construct::QUICK, true).expect("slots suffice");
            let mut placement = Placement::new(&layer, start);
            let mut terms = Terms::new(&layer, &placement);
            let slots = layer.slots();
            for _ in 0..60 {
                let step = if random.below(2) == 0 {
                    Move::Swap(random.below(slots), random.below(slots))
                } else {
                    let e = random.below(experts + 1);
                    Move::Put(random.below(slots), if e == experts { EMPTY } else { e as u16 })
                };
                if !placement.allows(&layer, step) {
                    continue;
                }
                let before = terms.cost(&layer);
                let change = terms.change(&layer, &placement, step).expect("no cap");
                terms.apply(&layer, &mut placement, step);
                let fresh = Terms::new(&layer, &placement);
                let fresh_cost = fresh.cost(&layer);
                let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs().max(1.0);
                prop_assert!(close(terms.cost(&layer), fresh_cost));
                if norm == 0 {
                    prop_assert!(close(before + change, fresh_cost), "{} {}", before + change, fresh_cost);
                } else {
                    // The powers are single precision.
                    prop_assert!(fresh_cost <= before + change + 1e-3 * fresh_cost.abs());
                }
                prop_assert!(placement.expert_in.iter().all(|&e| e == EMPTY || !placement.devices(e).is_empty()));
            }
        }
    }
}
