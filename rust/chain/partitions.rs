//! Dynamic programming over the layers: the best chain of given choices of every layer.
//!
//! The cost of a placement is a chain: it couples neighbouring layers only. Given several choices for every layer, the
//! best sequence of choices is a shortest path. Where devices are interchangeable (within nodes, and nodes with each
//! other) a choice is a *partition* of the experts into groups. The cost of two neighbouring partitions is that of the best
//! matching of their groups, a linear assignment problem for devices within every pair of nodes and one for nodes. The
//! labels of devices follow from the first layer on.
//!
//! With the layers of a pool of placements as choices, the answer recombines these placements. With *all* partitions as
//! choices, it is a proven optimum; 8 experts on 4 devices have 105 partitions.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::assignment::assign_max;
use crate::chain::instance::{Instance, Sizes};
use crate::control::Control;

/// Largest number of partitions of a layer.
const MAX_PARTITIONS: usize = 20_000;
/// Largest number of experts of a layer: more experts have too many partitions, unless every device has a single one.
pub const MOST_EXPERTS: usize = 64;
/// Number of additions that take as long as a step.
const ADDITIONS: usize = 4;
/// Largest numbers of devices of a node, and of nodes, for which matchings are found without allocating memory.
const FEW: usize = 4;

/// A proven optimum.
#[derive(Debug, PartialEq, Eq)]
pub struct Optimum {
    /// Expert in every slot `[L, P]`.
    pub expert_in: Vec<u16>,
    /// Its cost.
    pub cost: i64,
    /// Caps that the optimum keeps `[L]`: those of the instance or, where no placement keeps one, the lowest cap that a
    /// placement does keep.
    pub cap: Vec<u64>,
}

/// Returns the optimum of an instance.
///
/// Returns None where links differ other than by node, where counts do not fit exactly, where the computation would take
/// more than `work` steps (about a nanosecond each), or if it is stopped.
#[must_use]
pub fn optimum(instance: &Instance, work: u64, control: &Control) -> Option<Optimum> {
    let sizes = instance.sizes;
    let tiers = Tiers::detect(instance).filter(|_| instance.shift == 0)?;
    let partitions = all_partitions(sizes, tiers)?;
    let mut cap = instance.cap.clone();
    let choices = |(l, cap): (usize, &mut u64)| {
        let peaks: Vec<u64> = partitions.iter().map(|slots| instance.peak(l, slots)).collect();
        *cap = peaks.iter().copied().min().unwrap_or(0).max(*cap);
        let allowed = partitions.iter().zip(peaks).filter(|&(_, peak)| peak <= *cap);
        Choices::new(instance, l, allowed.map(|(slots, _)| slots.as_slice()).collect())
    };
    let layers: Vec<Choices<'_>> = cap.iter_mut().enumerate().map(choices).collect();
    let steps = layers.windows(2).map(|pair| {
        let (left, right) = (&pair[0].slots, &pair[1]);
        let flows = right.groups.len() * sizes.slots() / ADDITIONS;
        let matchings = (right.slots.len() as u64).saturating_mul(tiers.steps());
        (left.len() as u64).saturating_mul(matchings.saturating_add(flows as u64))
    });
    if instance.has_transitions() && steps.fold(0, u64::saturating_add) > work {
        return None;
    }
    let (cost, expert_in) = best_chain(instance, Some(tiers), &layers, control)?;
    Some(Optimum { expert_in, cost, cap })
}

/// Returns the best placement `[L, P]` (expert in every slot) whose layers all come from placements of `pool`.
///
/// It is never worse than the best of the pool, by tokens above caps and then by cost. Ties go to the earlier choice.
#[must_use]
pub fn recombine(instance: &Instance, pool: &[Vec<u16>]) -> Vec<u16> {
    let choices = |l: usize| Choices::new(instance, l, distinct_layers(instance, pool, l));
    let layers: Vec<Choices<'_>> = (0..instance.sizes.layers).into_par_iter().map(choices).collect();
    best_chain(instance, Tiers::detect(instance), &layers, &Control::new(None)).unwrap_or_default().1
}

/// Returns the placements `[P]` of layer `l` in a pool that keep its cap, or exceed it least, in order of appearance.
///
/// Of placements with equal partitions only the first is returned, or with equal devices where links differ.
fn distinct_layers<'a>(instance: &Instance, pool: &'a [Vec<u16>], l: usize) -> Vec<&'a [u16]> {
    let (p, mut seen) = (instance.sizes.slots(), BTreeSet::new());
    let mut is_new = |slots: &[u16]| {
        let mut groups: Vec<Vec<u16>> = slots.chunks_exact(instance.sizes.per_device).map(sorted).collect();
        if instance.has_uniform_links() {
            groups.sort_unstable();
        }
        seen.insert(groups)
    };
    let layer = pool.iter().map(|placement| &placement[l * p..][..p]).filter(|slots| is_new(slots));
    let mut choices: Vec<(u128, &[u16])> = layer.map(|slots| (instance.excess(l, slots), slots)).collect();
    let least = choices.iter().map(|choice| choice.0).min();
    choices.retain(|choice| Some(choice.0) == least);
    choices.into_iter().map(|choice| choice.1).collect()
}

/// Returns a group of experts in rising order.
fn sorted(group: &[u16]) -> Vec<u16> {
    let mut group = group.to_vec();
    group.sort_unstable();
    group
}

/// Devices in nodes of equal size, and the cost of a pair within a node and between nodes.
#[derive(Debug, Clone, Copy)]
struct Tiers {
    devices: usize,
    node_size: usize,
    within: i64,
    between: i64,
}

impl Tiers {
    /// Returns the tiers of an instance's links; None where links differ other than by node.
    fn detect(instance: &Instance) -> Option<Self> {
        let devices = instance.sizes.devices;
        let cost = |g: usize, h: usize| instance.cost[g * devices + h];
        let with_size = |node_size: usize| {
            let within = if node_size > 1 { cost(0, 1) } else { 0 };
            let between = if node_size < devices { cost(0, devices - 1) } else { within };
            let tiers = Self { devices, node_size, within, between };
            let expected = |g: usize, h: usize| if g / node_size == h / node_size { within } else { between };
            let mut pairs = (0..devices).flat_map(|g| (0..g).map(move |h| (g, h)));
            pairs.all(|(g, h)| cost(g, h) == expected(g, h)).then_some(tiers)
        };
        // The largest nodes that fit are taken: one node where all links are alike.
        (1..=devices).rev().filter(|size| devices.is_multiple_of(*size)).find_map(with_size)
    }

    /// Returns the number of nodes.
    fn nodes(self) -> usize {
        self.devices / self.node_size
    }

    /// Estimates the steps of matching one pair of partitions.
    fn steps(self) -> u64 {
        let matching = |n: usize| if n <= FEW { n << n.saturating_sub(1) } else { 4 * n * n * n } as u64;
        let nodes = self.nodes() as u64;
        (self.devices * self.devices) as u64
            + nodes * nodes * matching(self.node_size)
            + matching(self.nodes())
    }

    /// Returns the cost that the best matching of groups to devices saves, and the group of every device `[D]`.
    ///
    /// `flow` `[D, D]` has the tokens between devices and groups. The saving is relative to all pairs between nodes.
    fn match_groups(self, flow: &[i64]) -> (i64, Vec<usize>) {
        let (d, size, nodes) = (self.devices, self.node_size, self.nodes());
        let mut saved = vec![0; nodes * nodes];
        let mut inner = Vec::with_capacity(nodes * nodes);
        let mut block = vec![0; size * size];
        for (at, saved) in saved.iter_mut().enumerate() {
            self.copy_block(flow, at, &mut block);
            let group_of = assign_max(&block, size);
            let on_device: i64 = group_of.iter().enumerate().map(|(g, &h)| block[g * size + h]).sum();
            *saved = self.node_saving(&block, on_device);
            inner.push(group_of);
        }
        let node_of = assign_max(&saved, nodes);
        let total = node_of.iter().enumerate().map(|(a, &b)| saved[a * nodes + b]).sum();
        let group = |device: usize| {
            let (node, to) = (device / size, node_of[device / size]);
            to * size + inner[node * nodes + to][device % size]
        };
        (total, (0..d).map(group).collect())
    }

    /// Copies flows `[size, size]` between the devices of two nodes, `at` = node * nodes + node.
    fn copy_block(self, flow: &[i64], at: usize, block: &mut [i64]) {
        let (a, b) = (at / self.nodes() * self.node_size, at % self.nodes() * self.node_size);
        for (g, row) in block.chunks_exact_mut(self.node_size).enumerate() {
            row.copy_from_slice(&flow[(a + g) * self.devices + b..][..self.node_size]);
        }
    }

    /// Returns the cost that two nodes save when they are matched, if so many of their pairs are on one device.
    fn node_saving(self, block: &[i64], on_device: i64) -> i64 {
        (self.between - self.within) * block.iter().sum::<i64>() + self.within * on_device
    }

    /// Returns the first value of [`Tiers::match_groups`]; faster where devices are few.
    fn best_saving(self, flow: &[i64]) -> i64 {
        let (size, nodes) = (self.node_size, self.nodes());
        if size > FEW || nodes > FEW {
            return self.match_groups(flow).0;
        }
        let (mut saved, mut block) = ([0; FEW * FEW], [0; FEW * FEW]);
        let block = &mut block[..size * size];
        for (at, saved) in saved[..nodes * nodes].iter_mut().enumerate() {
            self.copy_block(flow, at, block);
            *saved = self.node_saving(block, best_matching(block, size));
        }
        best_matching(&saved[..nodes * nodes], nodes)
    }
}

/// Returns the largest sum of a matching of rows to columns of `weight` `[n, n]`, n at most [`FEW`].
///
/// This is dynamic programming over the sets of columns that the first rows take.
#[inline]
fn best_matching(weight: &[i64], n: usize) -> i64 {
    let mut best = [i64::MIN; 1 << FEW];
    best[0] = 0;
    for set in 1..1usize << n {
        let row = &weight[(set.count_ones() as usize - 1) * n..][..n];
        for (column, weight) in row.iter().enumerate() {
            if set >> column & 1 == 1 {
                best[set] = best[set].max(best[set ^ 1 << column] + weight);
            }
        }
    }
    best[(1 << n) - 1]
}

/// Returns every partition of the experts once, as the expert in every slot `[P]`; None if there are too many.
///
/// Partitions differ by more than the order of devices in a node and the order of nodes: experts fill both in order.
fn all_partitions(sizes: Sizes, tiers: Tiers) -> Option<Vec<Vec<u16>>> {
    let mut all = Vec::new();
    let mut groups = vec![Vec::with_capacity(sizes.per_device); sizes.devices];
    extend_partitions(sizes, 0, tiers.node_size, &mut groups, &mut all).then_some(all)
}

/// Adds to `all` every completion of `groups`, which hold the experts below `expert`, on nodes of so many devices; returns
/// false as soon as there are too many.
fn extend_partitions(
    sizes: Sizes,
    expert: usize,
    node_size: usize,
    groups: &mut [Vec<u16>],
    all: &mut Vec<Vec<u16>>,
) -> bool {
    if expert == sizes.experts {
        let mut placeholders = expert as u16..;
        let filled = |group: &Vec<u16>| {
            let rest = placeholders.by_ref().take(sizes.per_device - group.len());
            group.iter().copied().chain(rest).collect::<Vec<_>>()
        };
        all.push(groups.iter().flat_map(filled).collect());
        return all.len() <= MAX_PARTITIONS;
    }
    // Every partial partition can be completed, so the number of steps is at most partitions times experts.
    for device in 0..sizes.devices {
        let is_new = groups[device].is_empty();
        let skips_device = device % node_size > 0 && groups[device.saturating_sub(1)].is_empty();
        let skips_node =
            device >= node_size && device % node_size == 0 && groups[device - node_size].is_empty();
        if groups[device].len() == sizes.per_device || (is_new && (skips_device || skips_node)) {
            continue;
        }
        groups[device].push(expert as u16);
        let is_within = extend_partitions(sizes, expert + 1, node_size, groups, all);
        groups[device].pop();
        if !is_within {
            return false;
        }
    }
    true
}

/// The choices of a layer.
struct Choices<'a> {
    /// The expert in every slot `[P]` of every choice.
    slots: Vec<&'a [u16]>,
    /// The distinct groups of experts that share a device in any choice; far fewer than choices times devices.
    groups: Vec<&'a [u16]>,
    /// Group of every choice and device `[choices, D]`.
    group_on: Vec<u32>,
    /// Cost of the co-activations of every choice, on different devices.
    coactivation_cost: Vec<i64>,
}

impl<'a> Choices<'a> {
    /// Builds the choices of layer `l` from the expert in every slot `[P]` of each.
    fn new(instance: &Instance, l: usize, slots: Vec<&'a [u16]>) -> Self {
        let (mut number, mut groups) = (BTreeMap::new(), Vec::new());
        let mut number_of = |group: &'a [u16]| {
            *number.entry(sorted(group)).or_insert_with(|| {
                groups.push(group);
                groups.len() as u32 - 1
            })
        };
        let devices = slots.iter().flat_map(|slots| slots.chunks_exact(instance.sizes.per_device));
        let group_on = devices.map(&mut number_of).collect();
        let coactivation_cost = slots.iter().map(|slots| instance.coactivation_cost(l, slots)).collect();
        Self { slots, groups, group_on, coactivation_cost }
    }

    /// Sums the transitions from every device of layer `l`, placed as `placed` `[P]`, to every group of this layer, the next
    /// one `[groups, D]`.
    fn flows(&self, instance: &Instance, l: usize, placed: &[u16]) -> Vec<i64> {
        let sizes = instance.sizes;
        let mut flows = vec![0; self.groups.len() * sizes.devices];
        let mut to_expert = vec![0i64; sizes.slots()];
        for (device, from) in placed.chunks_exact(sizes.per_device).enumerate() {
            to_expert.fill(0);
            for &e in from.iter().filter(|_| instance.has_transitions()) {
                let row = instance.to_next(l, e.into());
                to_expert.iter_mut().zip(row).for_each(|(sum, &count)| *sum += i64::from(count));
            }
            for (group, flows) in self.groups.iter().zip(flows.chunks_exact_mut(sizes.devices)) {
                flows[device] = group.iter().map(|&f| to_expert[usize::from(f)]).sum();
            }
        }
        flows
    }

    /// Copies the flows from every device to the groups of a choice into `table` `[group, device]`, from `flows` `[groups, D]`.
    fn gather(&self, flows: &[i64], choice: usize, devices: usize, table: &mut [i64]) {
        let groups = &self.group_on[choice * devices..][..devices];
        for (to, &group) in table.chunks_exact_mut(devices).zip(groups) {
            to.copy_from_slice(&flows[group as usize * devices..][..devices]);
        }
    }
}

/// Returns the cost of the cheapest chain of choices, and its placement `[L, P]`; None if there is none, or if it is stopped.
///
/// Ties go to the earlier choice. Without tiers, group d stays on device d.
fn best_chain(
    instance: &Instance,
    tiers: Option<Tiers>,
    layers: &[Choices<'_>],
    control: &Control,
) -> Option<(i64, Vec<u16>)> {
    // Least cost of the layers so far, by the choice of the last one.
    let mut value = layers.first()?.coactivation_cost.clone();
    let mut predecessors = Vec::with_capacity(layers.len());
    for l in 1..layers.len() {
        if control.stopped() {
            return None;
        }
        let best = best_predecessors(instance, tiers, l, &value, layers);
        let coactivations = layers[l].coactivation_cost.iter();
        value =
            best.iter().zip(coactivations).map(|(&(cost, _), coactivation)| cost + coactivation).collect();
        predecessors.push(best);
    }
    let mut choice = (0..value.len()).min_by_key(|&b| (value[b], b))?;
    let cost = value[choice];
    let mut chosen = vec![choice];
    for best in predecessors.iter().rev() {
        choice = best[choice].1 as usize;
        chosen.push(choice);
    }
    chosen.reverse();
    Some((cost, label_devices(instance, tiers, layers, &chosen)))
}

/// Returns for every choice of layer `l` the least cost of the layers before it and of the boundary, and the choice of layer
/// `l - 1` that has it.
///
/// `value` has the least cost up to layer `l - 1`, by its choice. Ties go to the earlier choice.
fn best_predecessors(
    instance: &Instance,
    tiers: Option<Tiers>,
    l: usize,
    value: &[i64],
    layers: &[Choices<'_>],
) -> Vec<(i64, u32)> {
    let (left, right, d) = (&layers[l - 1].slots, &layers[l], instance.sizes.devices);
    let none = || vec![(i64::MAX, u32::MAX); right.slots.len()];
    if !instance.has_transitions() {
        let best = (0u32..).zip(value).map(|(a, &cost)| (cost, a)).min();
        return vec![best.unwrap_or((i64::MAX, 0)); right.slots.len()];
    }
    let rows = (0..instance.sizes.experts).flat_map(|e| instance.to_next(l - 1, e));
    let all: i64 = rows.map(|&count| i64::from(count)).sum();
    // The table is transposed, which changes neither the best matching nor the cost of links.
    let cost = |table: &[i64]| match tiers {
        Some(tiers) => tiers.between * all - tiers.best_saving(table),
        None => table.iter().zip(&instance.cost).map(|(flow, cost)| flow * cost).sum(),
    };
    let through = |mut best: Vec<(i64, u32)>, a: usize| {
        let flows = right.flows(instance, l - 1, left[a]);
        let mut table = vec![0; d * d];
        for (b, best) in best.iter_mut().enumerate() {
            right.gather(&flows, b, d, &mut table);
            *best = (*best).min((value[a] + cost(&table), a as u32));
        }
        best
    };
    let least = |mut one: Vec<(i64, u32)>, other: Vec<(i64, u32)>| {
        one.iter_mut().zip(other).for_each(|(a, b)| *a = (*a).min(b));
        one
    };
    (0..left.len()).into_par_iter().fold(none, through).reduce(none, least)
}

/// Assigns the groups of the chosen layers to devices; returns the expert in every slot `[L, P]`.
fn label_devices(
    instance: &Instance,
    tiers: Option<Tiers>,
    layers: &[Choices<'_>],
    chosen: &[usize],
) -> Vec<u16> {
    let (d, s) = (instance.sizes.devices, instance.sizes.per_device);
    let mut placement: Vec<u16> = Vec::with_capacity(layers.len() * d * s);
    for (l, (layer, &choice)) in layers.iter().zip(chosen).enumerate() {
        let slots = layer.slots[choice];
        let mut group_of: Vec<usize> = (0..d).collect();
        if let (Some(tiers), Some(before)) = (tiers, placement.len().checked_sub(d * s)) {
            let flows = layer.flows(instance, l - 1, &placement[before..]);
            let mut table = vec![0; d * d];
            layer.gather(&flows, choice, d, &mut table);
            let by_device: Vec<i64> = (0..d * d).map(|at| table[at % d * d + at / d]).collect();
            group_of = tiers.match_groups(&by_device).1;
        }
        placement.extend(group_of.into_iter().flat_map(|group| &slots[group * s..][..s]));
    }
    placement
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::instance::random;
    use crate::chain::state::State;
    use crate::random::Random;
    use proptest::prelude::*;

    proptest! {
        /// Recombination finds the best of all mixtures of layers and labels, so that it is never worse than any member.
        #[test]
        fn is_the_best_mixture(seed in any::<u64>(), layers in 1usize..4, members in 1usize..4) {
            let mut numbers = Random::new(seed, 0);
            let sizes = Sizes { layers, experts: 6, devices: 3, per_device: 2 };
            let mut instance = random(sizes, (3, 1, 1), false, 20, &mut numbers);
            instance.cap.fill(u64::MAX);
            let mut layer: Vec<u16> = (0..6).collect();
            let mut placement = || -> Vec<u16> {
                let mut shuffled = || {
                    numbers.shuffle(&mut layer);
                    layer.clone()
                };
                (0..layers).flat_map(|_| shuffled()).collect()
            };
            let pool: Vec<Vec<u16>> = (0..members).map(|_| placement()).collect();
            let cost = |placement: Vec<u16>| State::new(&instance, placement).cost();
            let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
            let mixture = |number: usize| -> Vec<u16> {
                let digit = |l: usize| number / (members * 6).pow(l as u32) % (members * 6);
                let group = |l: usize, group: usize| pool[digit(l) % members][l * 6 + group * 2..][..2].to_vec();
                let layer = |l: usize| orders[digit(l) / members].into_iter().flat_map(move |place| group(l, place));
                (0..layers).flat_map(layer).collect()
            };
            let least = (0..(members * 6).pow(layers as u32)).map(|number| cost(mixture(number))).min();
            prop_assert_eq!(Some(cost(recombine(&instance, &pool))), least);
        }
    }
}
