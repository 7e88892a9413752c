//! The placement problem as the search sees it: pair costs in 32 bits, loads and caps in 64.

use crate::error::{Error, Result, SLOTS, room_for};

/// Sizes of a placement problem. Slots are numbered device by device; slot p is on device `p / per_device`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Mixture-of-Experts layers, L.
    pub layers: usize,
    /// Experts per layer, E.
    pub experts: usize,
    /// Devices, D.
    pub devices: usize,
    /// Slots of a device in a layer, S.
    pub per_device: usize,
}

impl Sizes {
    /// Returns the number of slots of a layer, P = D * S.
    ///
    /// Ids `experts..slots` are placeholders. An empty slot holds one of them, so that moving an expert into an empty slot
    /// is a swap like any other.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.devices * self.per_device
    }

    /// Returns whether there are so many slots that a trial evaluates all swaps of an expert at once.
    pub(crate) fn is_wide(&self) -> bool {
        self.slots() >= WIDE
    }

    /// Returns slots `[L, D, S]` with -1 in place of placeholders.
    #[must_use]
    pub fn without_placeholders(&self, filled: &[u16]) -> Vec<i32> {
        let expert = |&id: &u16| if usize::from(id) < self.experts { i32::from(id) } else { -1 };
        filled.iter().map(expert).collect()
    }
}

/// Smallest number of slots of a layer for which a trial evaluates all swaps of an expert (measured: docs/experiments.md).
const WIDE: usize = 100;

/// A placement problem with one copy of each expert.
#[derive(Debug, Clone, Default)]
pub struct Instance {
    /// The sizes.
    pub sizes: Sizes,
    /// Load of every expert `[L, P]`, zero for placeholders.
    pub load: Vec<u64>,
    /// Largest load of a device `[L]`.
    pub cap: Vec<u64>,
    /// Cost of moving between devices `[D, D]`, symmetric, zero diagonal.
    pub cost: Vec<i64>,
    /// For devices g and h the devices c with `cost[h,c] - cost[g,c]`, where that is not zero `[D * D]`.
    differences: Differences,
    /// Cost of the most expensive pair of devices.
    pub max_cost: i32,
    /// For every device the devices with a lower cost than `max_cost`, itself included, and how much lower it is `[D]`.
    pub cheaper: Differences,
    /// Exchanges of labels that change no cost: pairs of devices, or all pairs of devices of two nodes.
    pub exchanges: Vec<Vec<(u16, u16)>>,
    /// Transitions `[L - 1, P, P]`, right-shifted by `shift`; `backward` has the transposed tables.
    forward: Vec<i32>,
    backward: Vec<i32>,
    /// Co-activations `[L, P, P]`, right-shifted by `shift`; empty where they do not count.
    coactivations: Vec<i32>,
    /// Lowest bits that are cut from every count so that sums fit 32 bits; 0 unless counts are huge. Every count is then
    /// off by less than `2^shift`.
    pub shift: u32,
    /// Mean cost of a pair of experts, the unit of temperature.
    pub unit: f64,
    /// Cost of the cheapest link as a share of the mean cost. Temperatures end where the cheapest tier is decided.
    pub cheapest_share: f64,
}

/// Limit on twice the cost of an expert on a device: a sum of four such costs fits 32 bits.
const MAX_EXPERT_COST: u128 = 1 << 28;

impl Instance {
    /// Builds an instance from `load` `[L, E]`, `transitions` `[L - 1, E, E]` or none, `coactivation` `[L, E, E]` or none,
    /// `cap` `[L]` and `cost` `[D, D]`.
    pub fn new(
        sizes: Sizes,
        load: &[u64],
        transitions: &[u64],
        coactivation: &[u64],
        cap: &[u64],
        cost: &[i64],
    ) -> Result<Self> {
        check_sizes(sizes, transitions, coactivation)?;
        let Sizes { layers, experts, devices, .. } = sizes;
        let slots = sizes.slots();
        let table = experts * experts;
        let max_cost = cost.iter().copied().max().unwrap_or(0).max(1) as u128;
        let max_count = max_count(transitions, experts) + max_count(coactivation, experts);
        let mut shift = 0;
        while (max_count * max_cost) >> shift > MAX_EXPERT_COST {
            shift += 1;
        }
        let pad = |counts: &[u64], transpose: bool| {
            let mut padded = vec![0; counts.len() / table.max(1) * slots * slots];
            for (to, from) in padded.chunks_exact_mut(slots * slots).zip(counts.chunks_exact(table)) {
                for e in 0..experts {
                    for f in 0..experts {
                        let at = if transpose { f * slots + e } else { e * slots + f };
                        to[at] = (from[e * experts + f] >> shift) as i32;
                    }
                }
            }
            padded
        };
        let mut padded_load = vec![0; layers * slots];
        for (to, from) in padded_load.chunks_exact_mut(slots).zip(load.chunks_exact(experts)) {
            to[..experts].copy_from_slice(from);
        }
        let forward = pad(transitions, false);
        let coactivations = pad(coactivation, false);
        let pairs = (transitions.len() + coactivation.len()).max(1);
        let sum: f64 = forward.iter().chain(&coactivations).map(|&count| f64::from(count)).sum();
        let instance = Self {
            sizes,
            load: padded_load,
            cap: cap.to_vec(),
            forward,
            backward: pad(transitions, true),
            coactivations,
            shift,
            unit: (sum / pairs as f64 * mean_cost(devices, cost).max(1.0)).max(1e-9),
            ..Self::default()
        };
        Ok(instance.with_cost(cost.to_vec()))
    }

    /// Returns the instance with other costs of links `[D, D]`.
    fn with_cost(self, cost: Vec<i64>) -> Self {
        let devices = self.sizes.devices;
        let (max_cost, cheaper, differences) = cost_differences(devices, &cost);
        let (mean, cheapest) = (mean_cost(devices, &cost), cost.iter().filter(|&&cost| cost > 0).min());
        let cheapest_share = cheapest.map_or(1.0, |&cheapest| (cheapest as f64 / mean).clamp(1e-3, 1.0));
        Self {
            exchanges: exchanges(devices, &cost, &differences),
            cost,
            max_cost,
            cheaper,
            differences,
            cheapest_share,
            ..self
        }
    }

    /// Raises the caps to the largest loads of a placement `[L, P]`, where these are higher.
    pub fn raise_caps(&mut self, expert_in: &[u16]) {
        for (l, layer) in expert_in.chunks_exact(self.sizes.slots().max(1)).enumerate() {
            self.cap[l] = self.cap[l].max(self.peak(l, layer));
        }
    }

    /// Returns the instance with a cost of one for all links.
    #[must_use]
    pub fn with_uniform_links(&self) -> Self {
        let devices = self.sizes.devices;
        let cost: Vec<i64> =
            (0..devices * devices).map(|at| i64::from(at / devices != at % devices)).collect();
        let unit = self.unit / mean_cost(devices, &self.cost).max(1.0);
        Self { unit, ..self.clone() }.with_cost(cost)
    }

    /// Iterates over the loads of devices `[D]` under a layer's placement `[P]`.
    fn loads(&self, l: usize, expert_in: &[u16]) -> impl Iterator<Item = u64> {
        let load = &self.load[l * self.sizes.slots()..];
        let devices = expert_in.chunks_exact(self.sizes.per_device);
        devices.map(|experts| experts.iter().map(|&e| load[usize::from(e)]).sum())
    }

    /// Returns the largest load of a device under a layer's placement `[P]`.
    #[must_use]
    pub fn peak(&self, l: usize, expert_in: &[u16]) -> u64 {
        self.loads(l, expert_in).max().unwrap_or(0)
    }

    /// Returns the tokens above the cap under a layer's placement `[P]`, summed over devices.
    #[must_use]
    pub fn excess(&self, l: usize, expert_in: &[u16]) -> u128 {
        self.loads(l, expert_in).map(|load| u128::from(load.saturating_sub(self.cap[l]))).sum()
    }

    /// Returns the transitions from expert `e` of layer `l` to all experts of layer `l + 1` `[P]`.
    #[inline]
    #[must_use]
    pub fn to_next(&self, l: usize, e: usize) -> &[i32] {
        let p = self.sizes.slots();
        &self.forward[(l * p + e) * p..][..p]
    }

    /// Returns the transitions from all experts of layer `l - 1` `[P]` to expert `e` of layer `l`.
    #[inline]
    #[must_use]
    pub fn from_previous(&self, l: usize, e: usize) -> &[i32] {
        let p = self.sizes.slots();
        &self.backward[((l - 1) * p + e) * p..][..p]
    }

    /// Returns the co-activations of expert `e` of layer `l` with all experts `[P]`; None where they do not count.
    #[inline]
    #[must_use]
    pub fn coactivations_of(&self, l: usize, e: usize) -> Option<&[i32]> {
        let p = self.sizes.slots();
        (!self.coactivations.is_empty()).then(|| &self.coactivations[(l * p + e) * p..][..p])
    }

    /// Computes the cost of co-activated experts on different devices under a layer's placement `[P]`.
    #[must_use]
    pub fn coactivation_cost(&self, l: usize, expert_in: &[u16]) -> i64 {
        let (d, s) = (self.sizes.devices, self.sizes.per_device);
        let mut cost = 0;
        for (slot, &e) in expert_in.iter().enumerate() {
            let Some(coactivations) = self.coactivations_of(l, e.into()) else { return 0 };
            let row = &self.cost[slot / s * d..][..d];
            let later = expert_in.iter().enumerate().skip(slot + 1);
            cost += later.map(|(at, &f)| i64::from(coactivations[usize::from(f)]) * row[at / s]).sum::<i64>();
        }
        cost
    }

    /// Returns whether transitions or co-activations count; otherwise all placements cost the same.
    #[must_use]
    pub fn has_pairs(&self) -> bool {
        self.has_transitions() || !self.coactivations.is_empty()
    }

    /// Returns whether transitions count.
    #[must_use]
    pub fn has_transitions(&self) -> bool {
        !self.forward.is_empty()
    }

    /// Returns the devices c with `cost[h,c] - cost[g,c]`, where that is not zero: the change of the cost of a pair with a
    /// partner on c when an expert moves from `g` to `h`.
    #[inline]
    #[must_use]
    pub fn differences(&self, g: usize, h: usize) -> &[(u32, i32)] {
        &self.differences[g * self.sizes.devices + h]
    }

    /// Returns whether all pairs of different devices cost the same, so that only the partition of a layer matters.
    #[must_use]
    pub fn has_uniform_links(&self) -> bool {
        self.cheaper.iter().all(|cheaper| cheaper.len() <= 1)
    }
}

/// Lists of devices with a difference of costs, which is not zero.
type Differences = Vec<Vec<(u32, i32)>>;

/// Returns the fields `max_cost`, `cheaper` and `differences` of an [`Instance`] for costs of links `[D, D]`.
fn cost_differences(devices: usize, cost: &[i64]) -> (i32, Differences, Differences) {
    let max_cost = cost.iter().copied().max().unwrap_or(0) as i32;
    let cheaper: Differences = cost
        .chunks_exact(devices.max(1))
        .map(|row| {
            let saving = |(c, &cost): (u32, &i64)| (c, max_cost - cost as i32);
            (0..).zip(row).map(saving).filter(|&(_, by)| by != 0).collect()
        })
        .collect();
    let differences =
        (0..devices * devices).map(|at| difference(&cheaper[at / devices], &cheaper[at % devices])).collect();
    (max_cost, cheaper, differences)
}

/// Returns the mean cost of two different devices.
fn mean_cost(devices: usize, cost: &[i64]) -> f64 {
    cost.iter().sum::<i64>() as f64 / (devices * devices).saturating_sub(devices).max(1) as f64
}

/// Refuses more slots than 16 bits count, fewer slots than experts, and tables that would not fit into memory.
fn check_sizes(sizes: Sizes, transitions: &[u64], coactivation: &[u64]) -> Result<()> {
    let Sizes { layers, experts, devices, .. } = sizes;
    let slots = sizes.slots();
    let table = experts * experts;
    if slots > SLOTS || slots < experts {
        let rule = format!("slots for all {experts} experts, at most {SLOTS} in a layer");
        return Err(Error::shape("slots", rule, &slots));
    }
    // These tables are the padded pairs, the differences of devices, and the prices of a search.
    let tables = [transitions, coactivation].map(|counts| counts.len() / table.max(1));
    room_for("pairs of slots", &[(tables[0] + tables[1]) * slots, slots, size_of::<i32>()])?;
    room_for("pairs of devices", &[devices, devices, size_of::<Vec<(u32, i32)>>()])?;
    room_for("prices", &[layers, devices, slots, size_of::<i64>()])
}

/// Returns the largest sum of an expert's row and column in any table, times two for the two neighbours of a layer: no
/// expert has more pairs.
fn max_count(tables: &[u64], experts: usize) -> u128 {
    let mut largest = 0;
    for table in tables.chunks_exact((experts * experts).max(1)) {
        let mut sums = vec![0u128; experts];
        for (e, row) in table.chunks_exact(experts).enumerate() {
            for (f, &count) in row.iter().enumerate() {
                sums[e] += u128::from(count);
                sums[f] += u128::from(count);
            }
        }
        largest = sums.into_iter().fold(largest, u128::max);
    }
    2 * largest
}

/// Subtracts the savings `h` from the savings `g`, both sorted by device; leaves out differences of zero.
fn difference(g: &[(u32, i32)], h: &[(u32, i32)]) -> Vec<(u32, i32)> {
    let mut differences: Vec<(u32, i32)> =
        g.iter().copied().chain(h.iter().map(|&(c, by)| (c, -by))).collect();
    differences.sort_by_key(|&(c, _)| c);
    differences.dedup_by(|later, first| {
        let is_same = later.0 == first.0;
        first.1 += if is_same { later.1 } else { 0 };
        is_same
    });
    differences.retain(|&(_, by)| by != 0);
    differences
}

/// Returns the exchanges of labels that change no cost: single pairs of devices, and all pairs of devices of two nodes.
///
/// A node is a set of devices whose costs among each other are at most one of the costs that occur, and whose costs to all
/// other devices are higher.
fn exchanges(devices: usize, cost: &[i64], differences: &Differences) -> Vec<Vec<(u16, u16)>> {
    let mut exchanges = Vec::new();
    for (g, h) in (0..devices).flat_map(|g| (g + 1..devices).map(move |h| (g, h))) {
        if differences[g * devices + h].iter().all(|&(c, _)| c as usize == g || c as usize == h) {
            exchanges.push(vec![(g as u16, h as u16)]);
        }
    }
    let mut limits: Vec<i64> = cost.iter().copied().filter(|&cost| cost > 0).collect();
    limits.sort_unstable();
    limits.dedup();
    // The highest cost joins all devices to one node.
    limits.pop();
    for limit in limits {
        let members = |g: usize| -> Vec<usize> {
            (0..devices).filter(|&h| h == g || cost[g * devices + h] <= limit).collect()
        };
        let node_of: Vec<Vec<usize>> = (0..devices).map(members).collect();
        if node_of.iter().any(|node| node.iter().any(|&g| node_of[g] != *node)) {
            continue;
        }
        let is_first = |&g: &usize| node_of[g][0] == g && node_of[g].len() > 1;
        let firsts: Vec<usize> = (0..devices).filter(is_first).collect();
        for (at, &a) in firsts.iter().enumerate() {
            for &b in &firsts[at + 1..] {
                let pairs: Vec<(usize, usize)> =
                    node_of[a].iter().copied().zip(node_of[b].iter().copied()).collect();
                if node_of[a].len() == node_of[b].len() && are_interchangeable(devices, cost, &pairs) {
                    exchanges.push(pairs.iter().map(|&(g, h)| (g as u16, h as u16)).collect());
                }
            }
        }
    }
    exchanges
}

/// Returns whether no cost changes when all these pairs of devices exchange their labels.
fn are_interchangeable(devices: usize, cost: &[i64], pairs: &[(usize, usize)]) -> bool {
    let mut to: Vec<usize> = (0..devices).collect();
    for &(g, h) in pairs {
        to.swap(g, h);
    }
    let is_same =
        |g: usize, h: usize| (0..devices).all(|c| cost[g * devices + c] == cost[h * devices + to[c]]);
    pairs.iter().all(|&(g, h)| is_same(g, h) && is_same(h, g))
}

/// Builds an instance of random counts below a number, on devices in nodes of a size, with the cost of a pair within and
/// between nodes, and with caps a fifth above the mean load.
#[cfg(test)]
pub(crate) fn random(
    sizes: Sizes,
    (node, within, between): (usize, i64, i64),
    together: bool,
    below: usize,
    numbers: &mut crate::random::Random,
) -> Instance {
    let Sizes { layers, experts, devices, .. } = sizes;
    let table = experts * experts;
    let mut counts = |n: usize| -> Vec<u64> { (0..n).map(|_| numbers.below(below) as u64).collect() };
    let load = counts(layers * experts);
    let transitions = counts((layers - 1) * table);
    let mut coactivation = counts(if together { layers * table } else { 0 });
    for at in 0..coactivation.len() {
        let (first, e, f) = (at / table * table, at % table / experts, at % experts);
        coactivation[at] = if e == f { 0 } else { coactivation[first + e.max(f) * experts + e.min(f)] };
    }
    let mean = |load: &[u64]| load.iter().sum::<u64>() * 12 / (10 * devices as u64);
    let cap: Vec<u64> = load.chunks_exact(experts).map(mean).collect();
    let cost = |at: usize| match (at / devices, at % devices) {
        (g, h) if g == h => 0,
        (g, h) if g / node == h / node => within,
        _ => between,
    };
    let cost: Vec<i64> = (0..devices * devices).map(cost).collect();
    Instance::new(sizes, &load, &transitions, &coactivation, &cap, &cost).expect("valid")
}
