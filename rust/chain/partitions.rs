//! The chain, complete: dynamic programming over *all* partitions of every layer. Its answer is a proven optimum.
//!
//! Where devices are interchangeable (within nodes, and nodes with each other) a layer is a partition of its experts;
//! the cost of two neighbouring layers is that of the best matching of their groups, nodes first and devices within
//! them. 8 experts on 4 devices have 105 partitions. [`crate::chain`] does the same over a pool of partitions.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::assignment::assign_max;
use crate::chain::instance::{Instance, Sizes};
use crate::chain::path::shortest;
use crate::control::Control;

/// Partitions of a layer, at the most.
const LARGEST: usize = 20_000;
/// Additions in a step.
const ADDITIONS: usize = 4;

/// A proven optimum.
#[derive(Debug, PartialEq, Eq)]
pub struct Optimum {
    /// Expert in every slot `[L, P]`.
    pub expert_in: Vec<u16>,
    /// Its cost.
    pub cost: i64,
    /// The caps that were kept `[L]`: the instance's, or where no placement keeps it the least that one does keep.
    pub cap: Vec<u64>,
}

/// The optimum of an instance; None where devices differ, where counts do not fit exactly, or where this would take
/// more than `work` steps (about a nanosecond each), or is stopped.
#[must_use]
pub fn optimum(instance: &Instance, work: u64, control: &Control) -> Option<Optimum> {
    let tiers = Tiers::of(instance).filter(|_| instance.shift == 0)?;
    let all = all_partitions(instance, tiers)?;
    let groups = Groups::new(&all, instance.sizes.devices);
    let layers: Vec<LayerPartitions> =
        (0..instance.sizes.layers).map(|l| LayerPartitions::new(instance, &all, &groups, l)).collect();
    let steps = layers.windows(2).map(|pair| {
        let (left, right) = (&pair[0], &pair[1]);
        let flows = right.groups.len() * instance.sizes.slots() / ADDITIONS;
        let matched = (right.allowed.len() as u64).saturating_mul(tiers.steps());
        (left.allowed.len() as u64).saturating_mul(matched.saturating_add(flows as u64))
    });
    if instance.has_transitions() && steps.fold(0, u64::saturating_add) > work {
        return None;
    }

    let own: Vec<Vec<i64>> = layers.iter().map(|layer| layer.own.clone()).collect();
    let through = |l: usize, value: &[i64]| {
        (!control.stopped()).then(|| step(instance, tiers, &groups, l, value, &layers[l - 1..=l]))
    };
    let (cost, choices) = shortest(&own, through)?;
    let chosen: Vec<usize> =
        choices.iter().zip(&layers).map(|(&choice, layer)| layer.allowed[choice]).collect();
    let expert_in = labelled(instance, tiers, &groups, &chosen);
    Some(Optimum { expert_in, cost, cap: layers.iter().map(|layer| layer.cap).collect() })
}

/// Devices in nodes of equal size: what a pair costs within a node and between nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiers {
    devices: usize,
    node_size: usize,
    within: i64,
    between: i64,
}

impl Tiers {
    pub(crate) fn of(instance: &Instance) -> Option<Self> {
        let devices = instance.sizes.devices;
        let cost = |g: usize, h: usize| instance.cost[g * devices + h];
        let alike = instance.cap.chunks_exact(devices.max(1)).all(|caps| caps.iter().all(|&c| c == caps[0]));
        let of_size = |node_size: usize| {
            let within = if node_size > 1 { cost(0, 1) } else { 0 };
            let between = if node_size < devices { cost(0, devices - 1) } else { within };
            let tiers = Self { devices, node_size, within, between };
            let stated = |g: usize, h: usize| if g / node_size == h / node_size { within } else { between };
            let mut pairs = (0..devices).flat_map(|g| (0..g).map(move |h| (g, h)));
            pairs.all(|(g, h)| cost(g, h) == stated(g, h)).then_some(tiers)
        };
        // The largest nodes that fit: one node where all links are alike.
        (1..=devices).rev().filter(|size| alike && devices.is_multiple_of(*size)).find_map(of_size)
    }

    fn nodes(self) -> usize {
        self.devices / self.node_size
    }

    /// What one pair of partitions takes, roughly.
    fn steps(self) -> u64 {
        let matching = |n: usize| if n <= 4 { n << n.saturating_sub(1) } else { 4 * n * n * n } as u64;
        let nodes = self.nodes() as u64;
        (self.devices * self.devices) as u64
            + nodes * nodes * matching(self.node_size)
            + matching(self.nodes())
    }

    /// Cost saved by the best matching of groups with flows `[D, D]`, against all pairs between nodes; and the group
    /// that every device takes.
    pub(crate) fn matched(self, flow: &[i64]) -> (i64, Vec<usize>) {
        let (d, size, nodes) = (self.devices, self.node_size, self.nodes());
        let mut saved = vec![0; nodes * nodes];
        let mut inner = Vec::with_capacity(nodes * nodes);
        for (at, saved) in saved.iter_mut().enumerate() {
            let block = self.block(flow, at);
            let group_of = assign_max(&block, size);
            let together: i64 = group_of.iter().enumerate().map(|(g, &h)| block[g * size + h]).sum();
            *saved = self.saved(block.iter().sum(), together);
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

    /// Flows `[size, size]` between the devices of two nodes, `at` = node * nodes + node.
    fn block(self, flow: &[i64], at: usize) -> Vec<i64> {
        let (a, b) = (at / self.nodes() * self.node_size, at % self.nodes() * self.node_size);
        (0..self.node_size)
            .flat_map(|g| flow[(a + g) * self.devices + b..][..self.node_size].iter().copied())
            .collect()
    }

    fn saved(self, in_node: i64, on_device: i64) -> i64 {
        (self.between - self.within) * in_node + self.within * on_device
    }

    /// The first value of [`Tiers::matched`], faster where devices are few.
    fn saving(self, flow: &[i64]) -> i64 {
        match (self.nodes(), self.node_size) {
            (1, 1) => self.within * flow[0],
            (1, 2) => self.within * best_matching::<2>(flow),
            (1, 3) => self.within * best_matching::<3>(flow),
            (1, 4) => self.within * best_matching::<4>(flow),
            (2, 2) => {
                let mut saved = [0; 4];
                for (at, saved) in saved.iter_mut().enumerate() {
                    let first = at / 2 * 8 + at % 2 * 2;
                    let block = [flow[first], flow[first + 1], flow[first + 4], flow[first + 5]];
                    *saved = self.saved(block.iter().sum(), best_matching::<2>(&block));
                }
                best_matching::<2>(&saved)
            }
            _ => self.matched(flow).0,
        }
    }
}

/// Largest sum of a matching of rows with columns: over the sets of columns that the first rows take.
#[inline]
fn best_matching<const N: usize>(weight: &[i64]) -> i64 {
    let weight = &weight[..N * N];
    let mut best = [i64::MIN; 16];
    best[0] = 0;
    for set in 1..1usize << N {
        let row = set.count_ones() as usize - 1;
        for column in 0..N {
            if set >> column & 1 == 1 {
                best[set] = best[set].max(best[set ^ 1 << column] + weight[row * N + column]);
            }
        }
    }
    best[(1 << N) - 1]
}

/// Whether there are more partitions than can be listed, told by counting: of large layers even the beginning of the
/// list takes long. Nodes only add to the count.
#[must_use]
pub fn are_too_many(sizes: Sizes) -> bool {
    let Sizes { experts, devices, per_device, .. } = sizes;
    // Ways to partition the last n experts onto at most so many devices: the first of them chooses its companions.
    let mut ways = vec![0.0; experts + 1];
    ways[0] = 1.0;
    for _ in 0..devices {
        let fewer = std::mem::replace(&mut ways, vec![0.0; experts + 1]);
        ways[0] = 1.0;
        for n in 1..=experts {
            let mut choices = 1.0;
            for companions in 0..per_device.min(n) {
                ways[n] += choices * fewer[n - 1 - companions];
                choices *= (n - 1 - companions) as f64 / (companions + 1) as f64;
            }
        }
    }
    ways[experts] > LARGEST as f64
}

/// Every partition of experts onto devices, as the device of every expert `[E]`, once: devices of a node, and nodes,
/// are taken into use in order. Empty slots have no names. None if there are too many.
fn all_partitions(instance: &Instance, tiers: Tiers) -> Option<Vec<Vec<u16>>> {
    let sizes = instance.sizes;
    let mut all = Vec::new();
    let mut device_of = Vec::with_capacity(sizes.experts);
    let mut filled = vec![0; sizes.devices];
    extend(sizes.experts, sizes.per_device, tiers, &mut device_of, &mut filled, &mut all).then_some(all)
}

fn extend(
    experts: usize,
    per_device: usize,
    tiers: Tiers,
    device_of: &mut Vec<u16>,
    filled: &mut [usize],
    all: &mut Vec<Vec<u16>>,
) -> bool {
    if device_of.len() == experts {
        all.push(device_of.clone());
        return all.len() <= LARGEST;
    }
    let size = tiers.node_size;
    // Whatever is placed so far can be completed, so the number of steps is at most that of partitions times experts.
    for device in 0..tiers.devices {
        let new_device = filled[device] == 0;
        let before_in_node = device % size > 0 && filled[device - 1] == 0;
        let before_node = device >= size && device % size == 0 && filled[device - size] == 0;
        if filled[device] == per_device || (new_device && (before_in_node || before_node)) {
            continue;
        }
        filled[device] += 1;
        device_of.push(device as u16);
        let few = extend(experts, per_device, tiers, device_of, filled, all);
        device_of.pop();
        filled[device] -= 1;
        if !few {
            return false;
        }
    }
    true
}

/// The partitions that a layer may take.
struct LayerPartitions {
    /// Among all.
    allowed: Vec<usize>,
    /// The groups that occur in them.
    groups: Vec<u32>,
    /// What each costs on its own: co-activated experts apart.
    own: Vec<i64>,
    cap: u64,
}

impl LayerPartitions {
    fn new(instance: &Instance, all: &[Vec<u16>], groups: &Groups, l: usize) -> Self {
        let sizes = instance.sizes;
        let load = &instance.load[l * sizes.slots()..][..sizes.experts];
        let mut sums = vec![0; sizes.devices];
        let mut heaviest = |partition: &Vec<u16>| {
            sums.fill(0);
            partition.iter().zip(load).for_each(|(&d, load)| sums[usize::from(d)] += load);
            sums.iter().copied().max().unwrap_or(0)
        };
        let peak: Vec<u64> = all.iter().map(&mut heaviest).collect();
        let cap = instance.cap[l * sizes.devices].max(peak.iter().copied().min().unwrap_or(0));
        let allowed: Vec<usize> = (0..all.len()).filter(|&a| peak[a] <= cap).collect();
        let on = |of: &[u16]| -> Vec<(usize, usize)> { of.iter().map(|&d| d.into()).enumerate().collect() };
        let own = allowed.iter().map(|&a| instance.apart(l, &on(&all[a]))).collect();
        let mut occurs = vec![false; groups.members.len()];
        allowed.iter().flat_map(|&a| groups.of(a)).for_each(|&group| occurs[group as usize] = true);
        let groups = (0u32..).zip(occurs).filter(|&(_, occurs)| occurs).map(|(group, _)| group).collect();
        Self { allowed, groups, own, cap }
    }
}

/// The groups that occur in any partition: far fewer than partitions.
struct Groups {
    /// Experts of every group.
    members: Vec<Vec<u16>>,
    /// Group of every partition and device `[partitions, D]`.
    of: Vec<u32>,
    devices: usize,
}

impl Groups {
    fn new(all: &[Vec<u16>], devices: usize) -> Self {
        let mut number: BTreeMap<Vec<u16>, u32> = BTreeMap::new();
        let mut of = Vec::with_capacity(all.len() * devices);
        for partition in all {
            let mut members = vec![Vec::new(); devices];
            (0u16..).zip(partition).for_each(|(e, &d)| members[usize::from(d)].push(e));
            for group in members {
                let next = number.len() as u32;
                of.push(*number.entry(group).or_insert(next));
            }
        }
        let mut members = vec![Vec::new(); number.len()];
        for (group, at) in number {
            members[at as usize] = group;
        }
        Self { members, of, devices }
    }

    fn of(&self, partition: usize) -> &[u32] {
        &self.of[partition * self.devices..][..self.devices]
    }

    /// Transitions from every device of a partition of layer `l` to some groups of the next, `[groups, D]`.
    fn flows(&self, instance: &Instance, l: usize, partition: usize, to: &[u32]) -> Vec<i64> {
        let p = instance.sizes.slots();
        let mut flows = vec![0; self.members.len() * self.devices];
        let mut to_expert = vec![0i64; p];
        for (device, &group) in self.of(partition).iter().enumerate() {
            to_expert.fill(0);
            for &e in &self.members[group as usize] {
                let row = instance.to_next(l, e.into());
                to_expert.iter_mut().zip(row).for_each(|(sum, &count)| *sum += i64::from(count));
            }
            for at in to.iter().map(|&group| group as usize) {
                let members = self.members[at].iter();
                flows[at * self.devices + device] = members.map(|&f| to_expert[usize::from(f)]).sum();
            }
        }
        flows
    }

    /// Flows `[D, D]` transposed: from every device, to every group of a partition.
    fn gather(&self, flows: &[i64], partition: usize, table: &mut [i64]) {
        for (to, &group) in table.chunks_exact_mut(self.devices).zip(self.of(partition)) {
            to.copy_from_slice(&flows[group as usize * self.devices..][..self.devices]);
        }
    }
}

/// For every partition of layer `l` the least cost of the layers before and of the boundary, and the partition of
/// layer `l - 1` it comes from; ties go to the earlier one.
fn step(
    instance: &Instance,
    tiers: Tiers,
    groups: &Groups,
    l: usize,
    value: &[i64],
    layers: &[LayerPartitions],
) -> Vec<(i64, u32)> {
    let (left, right) = (&layers[0].allowed, &layers[1].allowed);
    let nothing = || vec![(i64::MAX, u32::MAX); right.len()];
    if !instance.has_transitions() {
        let best = (0u32..).zip(value).map(|(a, &cost)| (cost, a)).min();
        return vec![best.unwrap_or((i64::MAX, 0)); right.len()];
    }
    let rows = (0..instance.sizes.experts).flat_map(|e| instance.to_next(l - 1, e));
    let all: i64 = tiers.between * rows.map(|&count| i64::from(count)).sum::<i64>();
    let through = |mut best: Vec<(i64, u32)>, a: usize| {
        let flows = groups.flows(instance, l - 1, left[a], &layers[1].groups);
        let mut table = vec![0; groups.devices * groups.devices];
        for (best, &b) in best.iter_mut().zip(right) {
            // Transposed, the best matching is worth the same.
            groups.gather(&flows, b, &mut table);
            *best = (*best).min((value[a] + all - tiers.saving(&table), a as u32));
        }
        best
    };
    let least = |mut one: Vec<(i64, u32)>, other: Vec<(i64, u32)>| {
        one.iter_mut().zip(other).for_each(|(a, b)| *a = (*a).min(b));
        one
    };
    (0..left.len()).into_par_iter().fold(nothing, through).reduce(nothing, least)
}

/// Gives the groups of chosen partitions to devices, and their experts to slots `[L, P]`.
fn labelled(instance: &Instance, tiers: Tiers, groups: &Groups, chosen: &[usize]) -> Vec<u16> {
    let sizes = instance.sizes;
    let mut group_on: Vec<usize> = (0..sizes.devices).collect();
    let mut expert_in = Vec::with_capacity(sizes.layers * sizes.slots());
    let mut table = vec![0; sizes.devices * sizes.devices];
    for (l, &partition) in chosen.iter().enumerate() {
        if l > 0 && instance.has_transitions() {
            let flows = groups.flows(instance, l - 1, chosen[l - 1], groups.of(partition));
            // Rows of the table are this layer's groups, columns the last layer's: take the inverse of the matching.
            groups.gather(&flows, partition, &mut table);
            let mut follower = vec![0; sizes.devices];
            tiers
                .matched(&table)
                .1
                .into_iter()
                .enumerate()
                .for_each(|(here, before)| follower[before] = here);
            group_on = group_on.iter().map(|&before| follower[before]).collect();
        }
        let mut nothing = (sizes.experts..).map(|e| e as u16);
        for &group in &group_on {
            let members = &groups.members[groups.of(partition)[group] as usize];
            expert_in.extend_from_slice(members);
            expert_in.extend(nothing.by_ref().take(sizes.per_device - members.len()));
        }
    }
    expert_in
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::cost_of;
    use crate::chain::instance::random;
    use crate::random::Random;
    use proptest::prelude::*;

    fn instance(sizes: Sizes, seed: u64, tiers: (usize, i64, i64), together: bool) -> Instance {
        random(sizes, tiers, together, 20, &mut Random::new(seed, 0))
    }

    /// The least cost by trying every device of every expert under given caps.
    fn brute(instance: &Instance, cap: &[u64]) -> i64 {
        let Sizes { layers, experts, devices, per_device } = instance.sizes;
        let p = instance.sizes.slots();
        let choices = |l: usize| -> Vec<Vec<u16>> {
            let decode = |code: usize| (0..experts).map(move |e| code / devices.pow(e as u32) % devices);
            let mut placements = Vec::new();
            for code in 0..devices.pow(experts as u32) {
                let (mut filled, mut load) = (vec![Vec::new(); devices], vec![0; devices]);
                decode(code).enumerate().for_each(|(e, d)| {
                    filled[d].push(e as u16);
                    load[d] += instance.load[l * p + e];
                });
                if filled.iter().all(|filled| filled.len() <= per_device) && load.iter().all(|&x| x <= cap[l])
                {
                    let mut nothing = experts as u16..;
                    for filled in &mut filled {
                        let free = per_device - filled.len();
                        filled.extend(nothing.by_ref().take(free));
                    }
                    placements.push(filled.concat());
                }
            }
            placements
        };
        let all: Vec<Vec<Vec<u16>>> = (0..layers).map(choices).collect();
        let mut least = i64::MAX;
        let total: usize = all.iter().map(Vec::len).product();
        for mut code in 0..total {
            let mut placement = Vec::new();
            for choices in &all {
                placement.extend_from_slice(&choices[code % choices.len()]);
                code /= choices.len();
            }
            least = least.min(cost_of(instance, &placement));
        }
        least
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// The optimum of every placement, with empty slots, two tiers and co-activation.
        #[test]
        fn is_the_optimum(
            seed: u64, layers in 1usize..3, spare in 0usize..2, nodes: bool, together: bool,
        ) {
            let (sizes, tiers) = if nodes {
                (Sizes { layers, experts: 4 + spare, devices: 4, per_device: 1 + spare }, (2, 1, 5))
            } else {
                (Sizes { layers, experts: 6 - spare, devices: 3, per_device: 2 }, (3, 2, 2))
            };
            let instance = instance(sizes, seed, tiers, together);
            let best = optimum(&instance, u64::MAX, &Control::new(None)).expect("few");
            prop_assert_eq!(best.cost, cost_of(&instance, &best.expert_in));
            prop_assert_eq!(best.cost, brute(&instance, &best.cap));
        }
    }

    #[test]
    fn counts_every_partition_once() {
        for (experts, devices, per_device, node_size, count) in [
            (8, 4, 2, 4, 105),
            (8, 4, 2, 2, 315),
            (8, 2, 4, 2, 35),
            (9, 3, 3, 3, 280),
            (4, 4, 1, 4, 1),
            // Two devices of three slots: 1 + 3, 2 + 2.
            (4, 2, 3, 2, 7),
        ] {
            let sizes = Sizes { layers: 1, experts, devices, per_device };
            let instance = instance(sizes, 0, (node_size, 1, 3), false);
            let all = all_partitions(&instance, Tiers::of(&instance).expect("alike")).expect("few");
            assert_eq!(all.len(), count, "{experts} on {devices}");
            assert!(!are_too_many(sizes));
        }
        let many = instance(Sizes { layers: 1, experts: 16, devices: 4, per_device: 4 }, 0, (4, 1, 1), false);
        assert!(optimum(&many, u64::MAX, &Control::new(None)).is_none());
    }

    /// The count says the same as the list, also with empty slots.
    #[test]
    fn counts_too_many_as_the_list_does() {
        for experts in 1..=18 {
            for (devices, per_device) in [(2, 9), (2, 10), (3, 6), (4, 5), (6, 4), (9, 2), (18, 1)] {
                let sizes = Sizes { layers: 1, experts, devices, per_device };
                if experts <= devices * per_device {
                    let instance = instance(sizes, 0, (devices, 1, 1), false);
                    let list = all_partitions(&instance, Tiers::of(&instance).expect("alike"));
                    assert_eq!(list.is_none(), are_too_many(sizes), "{experts} on {devices} x {per_device}");
                }
            }
        }
        assert!(are_too_many(Sizes { layers: 1, experts: 2000, devices: 1000, per_device: 2 }));
    }

    #[test]
    fn devices_that_differ_are_not_its_business() {
        let sizes = Sizes { layers: 2, experts: 4, devices: 2, per_device: 2 };
        let mut unequal = instance(sizes, 0, (2, 1, 1), false);
        unequal.cap[0] += 1;
        assert!(optimum(&unequal, u64::MAX, &Control::new(None)).is_none());
    }
}
