//! Dynamic programming over the layers: the best chain that can be put together from given layers.
//!
//! The cost of a placement is a chain: it couples neighbouring layers only. Given several choices for every layer,
//! the best sequence of choices is a shortest path. Where all devices cost the same, or those of a node and all nodes do,
//! a choice is a *partition* of the experts: how the groups of two neighbouring layers are matched to each other is a
//! linear assignment problem, or one for every pair of nodes and one of nodes, solved exactly for every pair of choices;
//! labels of devices follow from the first layer on.

use rayon::prelude::*;

use crate::chain::instance::Instance;
use crate::chain::partitions::Tiers;
use crate::chain::path::shortest;

/// The best placement `[L, P]` (expert in every slot) whose layers all come from `pool`, itself placements.
///
/// Never worse than the best of the pool, by tokens above caps and then by cost. Deterministic: ties go to the earlier choice.
#[must_use]
pub fn recombine(instance: &Instance, pool: &[Vec<u16>]) -> Vec<u16> {
    let sizes = instance.sizes;
    let (layers, p) = (sizes.layers, sizes.slots());
    let tiers = Tiers::of(instance);
    let choices: Vec<Vec<&[u16]>> = (0..layers).map(|l| choices_of(instance, pool, l)).collect();
    // costs[l][a * n + b]: choice a of layer l followed by choice b of layer l + 1, with b's devices matched to a's.
    let costs: Vec<Vec<i64>> = (0..layers.saturating_sub(1))
        .into_par_iter()
        .map(|l| {
            let (left, right) = (&choices[l], &choices[l + 1]);
            let from = |a: &&[u16]| {
                let flows = Flows::new(instance, l, a);
                right.iter().map(|b| flows.matched(instance, tiers, b).0).collect::<Vec<i64>>()
            };
            left.par_iter().flat_map_iter(from).collect()
        })
        .collect();

    let own: Vec<Vec<i64>> = (0..layers)
        .map(|l| {
            let on = |choice: &[u16]| -> Vec<(usize, usize)> {
                choice.iter().enumerate().map(|(slot, &e)| (e.into(), slot / sizes.per_device)).collect()
            };
            choices[l].iter().map(|choice| instance.apart(l, &on(choice))).collect()
        })
        .collect();
    let step = |l: usize, value: &[i64]| {
        let n = choices[l].len();
        let best = |b: usize| {
            (0u32..).zip(value).map(|(a, cost)| (cost + costs[l - 1][a as usize * n + b], a)).min()
        };
        (0..n).map(best).collect()
    };
    let chosen = shortest(&own, step).map_or_else(Vec::new, |(_, chosen)| chosen);

    let mut placement = Vec::with_capacity(layers * p);
    for (l, &choice) in chosen.iter().enumerate() {
        let here = choices[l][choice];
        if l == 0 {
            placement.extend_from_slice(here);
            continue;
        }
        let before = &placement[(l - 1) * p..][..p];
        let (_, group_of) = Flows::new(instance, l - 1, before).matched(instance, tiers, here);
        for group in group_of {
            placement.extend_from_slice(&here[group * sizes.per_device..][..sizes.per_device]);
        }
    }
    placement
}

/// The choices of layer `l` that keep the caps, or exceed them least.
fn choices_of<'a>(instance: &Instance, pool: &'a [Vec<u16>], l: usize) -> Vec<&'a [u16]> {
    let p = instance.sizes.slots();
    let choices = distinct(pool.iter().map(|placement| &placement[l * p..][..p]), instance);
    let excess: Vec<u128> = choices.iter().map(|choice| instance.excess(l, choice)).collect();
    let least = excess.iter().min().copied();
    choices.into_iter().zip(excess).filter(|&(_, excess)| Some(excess) == least).map(|(c, _)| c).collect()
}

/// Choices that differ as partitions (or, where devices differ, as placements), in order of appearance.
fn distinct<'a>(choices: impl Iterator<Item = &'a [u16]>, instance: &Instance) -> Vec<&'a [u16]> {
    let mut seen = std::collections::BTreeSet::new();
    choices.filter(|choice| seen.insert(groups(choice, instance))).collect()
}

fn groups(choice: &[u16], instance: &Instance) -> Vec<Vec<u16>> {
    let sorted = |group: &[u16]| {
        let mut group = group.to_vec();
        group.sort_unstable();
        group
    };
    let mut groups: Vec<Vec<u16>> = choice.chunks_exact(instance.sizes.per_device).map(sorted).collect();
    if instance.uniform() {
        groups.sort_unstable();
    }
    groups
}

/// Transitions from every device of a placed layer to every expert of the next, `[D, P]`.
struct Flows(Vec<i64>);

impl Flows {
    fn new(instance: &Instance, l: usize, placed: &[u16]) -> Self {
        let sizes = instance.sizes;
        let p = sizes.slots();
        let mut flows = vec![0; sizes.devices * p];
        if instance.has_transitions() {
            for (device, group) in placed.chunks_exact(sizes.per_device).enumerate() {
                let row = &mut flows[device * p..][..p];
                for &e in group {
                    for (sum, &count) in row.iter_mut().zip(instance.to_next(l, e.into())) {
                        *sum += i64::from(count);
                    }
                }
            }
        }
        Self(flows)
    }

    /// Cost of the boundary, and the group of `next` that every device takes.
    ///
    /// Where devices and nodes are interchangeable the groups are matched for the least cost; elsewhere group d stays on
    /// device d.
    fn matched(&self, instance: &Instance, tiers: Option<Tiers>, next: &[u16]) -> (i64, Vec<usize>) {
        let sizes = instance.sizes;
        let (d, p) = (sizes.devices, sizes.slots());
        let mut between = vec![0; d * d];
        for (group, members) in next.chunks_exact(sizes.per_device).enumerate() {
            for device in 0..d {
                let row = &self.0[device * p..][..p];
                between[device * d + group] = members.iter().map(|&f| row[usize::from(f)]).sum();
            }
        }
        let group_of = tiers.map_or_else(|| (0..d).collect(), |tiers| tiers.matched(&between).1);
        let cost_of = |device: usize| -> i64 {
            (0..d).map(|to| between[device * d + group_of[to]] * instance.cost[device * d + to]).sum()
        };
        ((0..d).map(cost_of).sum(), group_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::cost_of;
    use crate::chain::instance::Sizes;
    use crate::random::Random;
    use proptest::prelude::*;

    proptest! {
        /// Recombining is never worse than any member, and finds the best of all mixtures of layers and labels.
        #[test]
        fn is_the_best_mixture(seed in any::<u64>(), layers in 1usize..4, members in 1usize..4) {
            let sizes = Sizes { layers, experts: 6, devices: 3, per_device: 2 };
            let mut random = Random::new(seed, 0);
            let transitions: Vec<u64> = (0..(layers - 1) * 36).map(|_| random.below(20) as u64).collect();
            let cost = [0, 1, 1, 1, 0, 1, 1, 1, 0];
            let (load, cap) = (vec![1; layers * 6], vec![9; layers * 3]);
            let instance = Instance::new(sizes, &load, &transitions, &[], &cap, &cost).expect("valid");
            let pool: Vec<Vec<u16>> = (0..members)
                .map(|_| {
                    let mut placement = Vec::new();
                    for _ in 0..layers {
                        let mut layer: Vec<u16> = (0..6).collect();
                        random.shuffle(&mut layer);
                        placement.extend(layer);
                    }
                    placement
                })
                .collect();
            let best = cost_of(&instance, &recombine(&instance, &pool));
            let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
            let mut least = i64::MAX;
            for mixture in 0..(members * 6).pow(layers as u32) {
                let mut code = mixture;
                let mut placement = Vec::new();
                for l in 0..layers {
                    let (member, order) = (code % members, orders[code / members % 6]);
                    code /= members * 6;
                    for group in order {
                        placement.extend_from_slice(&pool[member][l * 6 + group * 2..][..2]);
                    }
                }
                least = least.min(cost_of(&instance, &placement));
            }
            prop_assert_eq!(best, least);
        }
    }
}
