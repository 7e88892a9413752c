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
    /// Slots of a layer, D * S. Experts `experts..slots` stand for nothing: an empty slot holds one of them, so that
    /// moving an expert into an empty slot is a swap like any other.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.devices * self.per_device
    }

    /// Whether there are so many slots that a search looks at all swaps of an expert at once.
    pub(crate) fn is_wide(&self) -> bool {
        self.slots() >= WIDE
    }

    /// Slots `[L, D, S]` as they are told: -1 for what stands for nothing.
    #[must_use]
    pub fn unfill(&self, filled: &[u16]) -> Vec<i32> {
        let expert = |&entry: &u16| if usize::from(entry) < self.experts { i32::from(entry) } else { -1 };
        filled.iter().map(expert).collect()
    }
}

/// Slots of a layer from which on all swaps of an expert are looked at at once (measured: docs/experiments.md).
const WIDE: usize = 100;

/// A placement problem with one copy of each expert.
#[derive(Debug, Clone, Default)]
pub struct Instance {
    /// The sizes.
    pub sizes: Sizes,
    /// Load `[L, P]`, zero for empty slots.
    pub load: Vec<u64>,
    /// Largest load of a device `[L]`.
    pub cap: Vec<u64>,
    /// Cost of moving between devices `[D, D]`, symmetric, zero diagonal.
    pub cost: Vec<i64>,
    /// Where costs differ: for devices g, h the devices c and `cost[h,c] - cost[g,c]`, if not zero.
    changes: Vec<Vec<(u32, i32)>>,
    /// Cost of the dearest pair of devices.
    pub dearest: i32,
    /// Devices that are nearer to each than the dearest, and by how much: itself, and those of its node.
    pub nearer: Vec<Vec<(u32, i32)>>,
    /// Exchanges of labels that change no cost: of two devices, and of nodes that are alike, device by device.
    pub exchanges: Vec<Vec<(u16, u16)>>,
    /// Transitions `[L - 1, P, P]`, right-shifted by `shift`, and the same with each table transposed.
    forward: Vec<i32>,
    backward: Vec<i32>,
    /// Co-activation `[L, P, P]`, likewise; empty where it does not count.
    together: Vec<i32>,
    /// Bits cut from every count so that sums fit 32 bits; 0 unless counts are huge. The search then works on
    /// counts that are off by less than `2^shift` each.
    pub shift: u32,
    /// Mean of all pair costs, the unit of temperature.
    pub unit: f64,
    /// The cheapest link as a share of the mean one: of two tiers, temperatures end where the cheaper one is decided.
    pub finest: f64,
}

/// Largest cost of one expert on one device, twice over: leaves room for the sum of four.
const LARGEST: u128 = 1 << 28;

impl Instance {
    /// Takes counts as they come: `load` `[L, E]`, `transitions` `[L - 1, E, E]` or empty, `coactivation` `[L, E, E]`
    /// or empty, `cap` `[L]`, `cost` `[D, D]`.
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
        let dearest = cost.iter().copied().max().unwrap_or(0).max(1) as u128;
        let heaviest = heaviest(transitions, experts) + heaviest(coactivation, experts);
        let mut shift = 0;
        while (heaviest * dearest) >> shift > LARGEST {
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
        let together = pad(coactivation, false);
        let pairs = (transitions.len() + coactivation.len()).max(1);
        let sum: f64 = forward.iter().chain(&together).map(|&count| f64::from(count)).sum();
        let instance = Self {
            sizes,
            load: padded_load,
            cap: cap.to_vec(),
            forward,
            backward: pad(transitions, true),
            together,
            shift,
            unit: (sum / pairs as f64 * mean(devices, cost).max(1.0)).max(1e-9),
            ..Self::default()
        };
        Ok(instance.with_cost(cost.to_vec()))
    }

    /// The same where pairs of devices have this cost `[D, D]`.
    fn with_cost(self, cost: Vec<i64>) -> Self {
        let devices = self.sizes.devices;
        let (dearest, nearer, changes) = paths(devices, &cost);
        let (mean, cheapest) = (mean(devices, &cost), cost.iter().filter(|&&cost| cost > 0).min());
        let finest = cheapest.map_or(1.0, |&cheapest| (cheapest as f64 / mean).clamp(1e-3, 1.0));
        Self {
            exchanges: exchanges(devices, &cost, &changes),
            cost,
            dearest,
            nearer,
            changes,
            finest,
            ..self
        }
    }

    /// Raises the caps as far as a placement `[L, P]` needs it.
    pub fn allow(&mut self, expert_in: &[u16]) {
        for (l, layer) in expert_in.chunks_exact(self.sizes.slots().max(1)).enumerate() {
            self.cap[l] = self.cap[l].max(self.peak(l, layer));
        }
    }

    /// The same where all links cost one.
    #[must_use]
    pub fn flat(&self) -> Self {
        let devices = self.sizes.devices;
        let cost: Vec<i64> =
            (0..devices * devices).map(|at| i64::from(at / devices != at % devices)).collect();
        let unit = self.unit / mean(devices, &self.cost).max(1.0);
        Self { unit, ..self.clone() }.with_cost(cost)
    }

    /// Load of every device of a layer's placement `[P]`.
    fn loads(&self, l: usize, expert_in: &[u16]) -> impl Iterator<Item = u64> {
        let load = &self.load[l * self.sizes.slots()..];
        let devices = expert_in.chunks_exact(self.sizes.per_device);
        devices.map(|experts| experts.iter().map(|&e| load[usize::from(e)]).sum())
    }

    /// Largest load of a device of a layer's placement `[P]`.
    #[must_use]
    pub fn peak(&self, l: usize, expert_in: &[u16]) -> u64 {
        self.loads(l, expert_in).max().unwrap_or(0)
    }

    /// Tokens above caps of a layer's placement `[P]`.
    #[must_use]
    pub fn excess(&self, l: usize, expert_in: &[u16]) -> u128 {
        self.loads(l, expert_in).map(|load| u128::from(load.saturating_sub(self.cap[l]))).sum()
    }

    /// Transitions of expert `e` in layer `l` to all experts of layer `l + 1`.
    #[inline]
    #[must_use]
    pub fn to_next(&self, l: usize, e: usize) -> &[i32] {
        let p = self.sizes.slots();
        &self.forward[(l * p + e) * p..][..p]
    }

    /// Transitions from all experts of layer `l - 1` to expert `e` of layer `l`.
    #[inline]
    #[must_use]
    pub fn from_previous(&self, l: usize, e: usize) -> &[i32] {
        let p = self.sizes.slots();
        &self.backward[((l - 1) * p + e) * p..][..p]
    }

    /// Co-activations of expert `e` in layer `l`, where they count.
    #[inline]
    #[must_use]
    pub fn with(&self, l: usize, e: usize) -> Option<&[i32]> {
        let p = self.sizes.slots();
        (!self.together.is_empty()).then(|| &self.together[(l * p + e) * p..][..p])
    }

    /// What a layer's placement `[P]` costs on its own: co-activated experts apart.
    #[must_use]
    pub fn apart(&self, l: usize, expert_in: &[u16]) -> i64 {
        let (d, s) = (self.sizes.devices, self.sizes.per_device);
        let mut cost = 0;
        for (slot, &e) in expert_in.iter().enumerate() {
            let Some(with) = self.with(l, e.into()) else { return 0 };
            let row = &self.cost[slot / s * d..][..d];
            let later = expert_in.iter().enumerate().skip(slot + 1);
            cost += later.map(|(at, &f)| i64::from(with[usize::from(f)]) * row[at / s]).sum::<i64>();
        }
        cost
    }

    /// Whether anything counts, so that placements differ in what they cost.
    #[must_use]
    pub fn has_pairs(&self) -> bool {
        self.has_transitions() || !self.together.is_empty()
    }

    /// Whether transitions count.
    #[must_use]
    pub fn has_transitions(&self) -> bool {
        !self.forward.is_empty()
    }

    /// Devices c where being on `h` instead of `g` changes the cost of a pair with a partner on c, and by how much.
    #[inline]
    #[must_use]
    pub fn changes(&self, g: usize, h: usize) -> &[(u32, i32)] {
        &self.changes[g * self.sizes.devices + h]
    }

    /// Whether all pairs of different devices cost the same, so that only the partition of a layer matters.
    #[must_use]
    pub fn uniform(&self) -> bool {
        self.nearer.iter().all(|nearer| nearer.len() <= 1)
    }
}

/// Lists of devices and what their costs differ by.
type Differences = Vec<Vec<(u32, i32)>>;

/// Cost of the dearest pair, what is nearer to each device, and where costs to two devices differ.
fn paths(devices: usize, cost: &[i64]) -> (i32, Differences, Differences) {
    let dearest = cost.iter().copied().max().unwrap_or(0) as i32;
    let nearer: Differences = cost
        .chunks_exact(devices.max(1))
        .map(|row| {
            let nearer = |(c, &cost): (u32, &i64)| (c, dearest - cost as i32);
            (0..).zip(row).map(nearer).filter(|&(_, by)| by != 0).collect()
        })
        .collect();
    let changes =
        (0..devices * devices).map(|at| difference(&nearer[at / devices], &nearer[at % devices])).collect();
    (dearest, nearer, changes)
}

/// Mean cost of two different devices.
fn mean(devices: usize, cost: &[i64]) -> f64 {
    cost.iter().sum::<i64>() as f64 / (devices * devices).saturating_sub(devices).max(1) as f64
}

/// Refuses more slots than are counted in 16 bits, fewer than experts, and what would not fit into memory.
fn check_sizes(sizes: Sizes, transitions: &[u64], coactivation: &[u64]) -> Result<()> {
    let Sizes { layers, experts, devices, .. } = sizes;
    let slots = sizes.slots();
    let table = experts * experts;
    if slots > SLOTS || slots < experts {
        let rule = format!("slots for all {experts} experts, at most {SLOTS} in a layer");
        return Err(Error::shape("slots", rule, &slots));
    }
    // Padded pairs, the differences of devices, and the prices of a search.
    let tables = [transitions, coactivation].map(|counts| counts.len() / table.max(1));
    room_for("pairs of slots", &[(tables[0] + tables[1]) * slots, slots, size_of::<i32>()])?;
    room_for("pairs of devices", &[devices, devices, size_of::<Vec<(u32, i32)>>()])?;
    room_for("prices", &[layers, devices, slots, size_of::<i64>()])
}

/// Largest sum of a row plus a column of any table: no expert can cost more.
fn heaviest(tables: &[u64], experts: usize) -> u128 {
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
    // A layer has two neighbours.
    2 * largest
}

/// Where costs to `h` and to `g` differ and by how much, from what is nearer to each: both in order, and short.
fn difference(g: &[(u32, i32)], h: &[(u32, i32)]) -> Vec<(u32, i32)> {
    let mut both: Vec<(u32, i32)> = g.iter().copied().chain(h.iter().map(|&(c, by)| (c, -by))).collect();
    both.sort_by_key(|&(c, _)| c);
    both.dedup_by(|later, first| {
        let same = later.0 == first.0;
        first.1 += if same { later.1 } else { 0 };
        same
    });
    both.retain(|&(_, by)| by != 0);
    both
}

/// Pairs of devices that can exchange their labels without changing any cost, and the pairs of all devices of two such
/// nodes. Nodes are devices that are nearer to each other than to others, at every distance that there is.
fn exchanges(devices: usize, cost: &[i64], changes: &Differences) -> Vec<Vec<(u16, u16)>> {
    let mut exchanges = Vec::new();
    for (g, h) in (0..devices).flat_map(|g| (g + 1..devices).map(move |h| (g, h))) {
        if changes[g * devices + h].iter().all(|&(c, _)| c as usize == g || c as usize == h) {
            exchanges.push(vec![(g as u16, h as u16)]);
        }
    }
    let mut distances: Vec<i64> = cost.iter().copied().filter(|&cost| cost > 0).collect();
    distances.sort_unstable();
    distances.dedup();
    // The largest joins all devices to one node.
    distances.pop();
    for reach in distances {
        let members = |g: usize| -> Vec<usize> {
            (0..devices).filter(|&h| h == g || cost[g * devices + h] <= reach).collect()
        };
        let blocks: Vec<Vec<usize>> = (0..devices).map(members).collect();
        if blocks.iter().any(|block| block.iter().any(|&g| blocks[g] != *block)) {
            continue;
        }
        let heads: Vec<usize> = (0..devices).filter(|&g| blocks[g][0] == g && blocks[g].len() > 1).collect();
        for (at, &a) in heads.iter().enumerate() {
            for &b in &heads[at + 1..] {
                let pairs: Vec<(usize, usize)> =
                    blocks[a].iter().copied().zip(blocks[b].iter().copied()).collect();
                if blocks[a].len() == blocks[b].len() && are_alike(devices, cost, &pairs) {
                    exchanges.push(pairs.iter().map(|&(g, h)| (g as u16, h as u16)).collect());
                }
            }
        }
    }
    exchanges
}

/// Whether exchanging the labels of all these pairs of devices changes no cost.
fn are_alike(devices: usize, cost: &[i64], pairs: &[(usize, usize)]) -> bool {
    let mut to: Vec<usize> = (0..devices).collect();
    for &(g, h) in pairs {
        to.swap(g, h);
    }
    let same = |g: usize, h: usize| (0..devices).all(|c| cost[g * devices + c] == cost[h * devices + to[c]]);
    pairs.iter().all(|&(g, h)| same(g, h) && same(h, g))
}

/// Counts below a number; devices in nodes of a size, with what a pair costs within and between them; caps a fifth above
/// the mean.
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
