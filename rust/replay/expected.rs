//! Expected loads, visits and pairs of a placement, computed from counts without replaying tokens.
//!
//! The copies of an expert share its tokens. Experts of a token choose their copies independently or, for visits, by one hash of
//! the token, of which every expert takes the remainder by its number of copies ([`missed_by_hash`]). Sums run over experts
//! or sets in a fixed order, so that they are the same on any number of threads. With one copy of each expert they are sums
//! of integers, and exact.

use rayon::prelude::*;

use super::copies::slots_by_expert;
use crate::arrays::count_groups;
use crate::error::Result;
use crate::random::choose_copy;
use crate::urn::visits_of_load;

/// Returns the results of `make` for all numbers below `count`: computed by threads inside a pool, otherwise in the calling
/// thread.
fn map_numbers<T: Send>(count: usize, make: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    let is_alone = rayon::current_thread_index().is_none();
    if is_alone { (0..count).map(make).collect() } else { (0..count).into_par_iter().map(make).collect() }
}

/// Longest period whose hashes are tried one by one; numbers of copies with a longer common period are treated as independent.
const PERIOD: u32 = 1 << 12;
/// Longest period for which [`Tries`] list what every hash serves; that of up to eight copies, 840, is shorter.
const LISTED_PERIOD: u32 = 1 << 10;
/// Words of a row of bits, one for each of some sets; a row is a line of the cache.
const WORDS: usize = 8;
/// Bits in a word.
const WORD: usize = 64;

/// The copies of a layer's experts: the unit (device or node) of every copy, and its share of the expert's tokens.
#[derive(Debug)]
struct Holders {
    /// Index of every expert's first copy `[E + 1]`.
    first: Vec<u32>,
    /// Unit and share of every copy, expert by expert.
    unit: Vec<u32>,
    share: Vec<f64>,
}

impl Holders {
    /// Iterates over the units of an expert's copies, and their shares.
    fn of(&self, expert: usize) -> impl Iterator<Item = (usize, f64)> + Clone + '_ {
        let range = self.first[expert] as usize..self.first[expert + 1] as usize;
        self.unit[range.clone()].iter().map(|&unit| unit as usize).zip(self.share[range].iter().copied())
    }

    /// Returns the unit of every expert `[E]` if each has a single copy that serves all of its tokens.
    fn single(&self) -> Option<&[u32]> {
        let alone =
            self.unit.len() + 1 == self.first.len() && self.first.windows(2).all(|w| w[1] == w[0] + 1);
        #[allow(clippy::float_cmp)] // one is one
        (alone && self.share.iter().all(|&share| share == 1.0)).then_some(&self.unit[..])
    }

    /// Iterates over the units of an expert's copies, and the copies.
    fn copies(&self, expert: usize) -> impl Iterator<Item = (usize, Holder)> + '_ {
        let copies = self.first[expert + 1] - self.first[expert];
        (0..)
            .zip(self.of(expert))
            .map(move |(number, (unit, share))| (unit, Holder { copies, number, share }))
    }

    /// Computes the tokens of sets that visit every device `[D]` and every node `[N]`; `node` has the node of every device `[D]`.
    fn visits(&self, node: &[u16], nodes: usize, sets: Sets<'_>, hashed: bool) -> (Vec<f64>, Vec<f64>) {
        let in_nodes = |e: usize| self.copies(e).map(|(device, copy)| (usize::from(node[device]), copy));
        let experts = self.first.len() - 1;
        let visits = visits_of_units(experts, node.len(), sets, |e| self.copies(e), hashed);
        if nodes == 1 {
            let all: u64 = sets.iter().map(|(_, count)| count).sum();
            return (visits, vec![all as f64]);
        }
        (visits, visits_of_units(experts, nodes, sets, in_nodes, hashed))
    }
}

/// A copy of an expert: its number among the expert's copies, and its share of the expert's tokens.
#[derive(Debug, Clone, Copy)]
struct Holder {
    copies: u32,
    number: u32,
    share: f64,
}

/// Computes the tokens that visit every unit, a device or a node.
///
/// `copies` iterates over the units and copies of an expert. A token's experts choose copies by one hash, or independently.
fn visits_of_units<Copies: Iterator<Item = (usize, Holder)>>(
    experts: usize,
    units: usize,
    sets: Sets<'_>,
    copies: impl Fn(usize) -> Copies,
    hashed: bool,
) -> Vec<f64> {
    let parts = Parts::new(experts, copies, hashed);
    match parts.tries(units) {
        Some(tries) => visits_of_tries(experts, &tries, sets),
        None => visits_set_by_set(&parts, units, sets),
    }
}

/// Computes the tokens that visit every unit from what each hash makes the units serve: a sum of integers.
///
/// For some sets at a time, an expert has a bit for every set that it is in. The bits of experts that a unit serves together are
/// the sets that visit it.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
fn visits_of_tries(experts: usize, tries: &[Tries], sets: Sets<'_>) -> Vec<f64> {
    let mut visited = vec![0u128; tries.len()];
    let mut sets_of = vec![[0u64; WORDS]; experts];
    // Sets whose number of tokens has a bit, bit by bit.
    let mut planes: Vec<[u64; WORDS]> = Vec::new();
    for sets in sets.chunks(WORDS * WORD) {
        sets_of.fill([0; WORDS]);
        planes.clear();
        for (n, (ids, count)) in sets.iter().enumerate() {
            let (word, bit) = (n / WORD, 1 << (n % WORD));
            for &e in ids {
                sets_of[usize::from(e)][word] |= bit;
            }
            planes.resize(planes.len().max((u64::BITS - count.leading_zeros()) as usize), [0; WORDS]);
            for (b, plane) in planes.iter_mut().enumerate() {
                plane[word] |= (count >> b & 1) << (n % WORD);
            }
        }
        for (visited, tries) in visited.iter_mut().zip(tries) {
            let mut always = [0; WORDS];
            for &e in &tries.always {
                for word in 0..WORDS {
                    always[word] |= sets_of[usize::from(e)][word];
                }
            }
            for (hashes, served) in &tries.served {
                let mut any = always;
                for &e in served {
                    for word in 0..WORDS {
                        any[word] |= sets_of[usize::from(e)][word];
                    }
                }
                let mut tokens = 0;
                for (b, plane) in planes.iter().enumerate() {
                    let mut ones = 0;
                    for word in 0..WORDS {
                        ones += u64::from((any[word] & plane[word]).count_ones());
                    }
                    tokens += ones << b;
                }
                *visited += u128::from(*hashes) * u128::from(tokens);
            }
        }
    }
    let mean = |(visited, tries): (u128, &Tries)| visited as f64 / f64::from(tries.period);
    visited.into_iter().zip(tries).map(mean).collect()
}

/// Computes the tokens that visit every unit set by set, where choices are independent or have a long period.
fn visits_set_by_set(parts: &Parts, units: usize, sets: Sets<'_>) -> Vec<f64> {
    let mut visits = vec![0.0; units];
    // The last set that visits a unit for certain, and the units that the set at hand may visit, with parts there.
    let (mut last, mut possible) = (vec![u32::MAX; units], Vec::new());
    for (set, (ids, count)) in (0..).zip(sets.iter()) {
        let count = count as f64;
        for &e in ids {
            let range = parts.range(usize::from(e));
            if range.len() > 1 {
                possible.extend(range.map(|part| (parts.unit[part], part as u32)));
                continue;
            }
            let unit = parts.unit[range.start] as usize;
            if last[unit] != set {
                last[unit] = set;
                visits[unit] += count;
            }
        }
        possible.retain(|&(unit, _)| last[unit as usize] != set);
        possible.sort_unstable();
        possible.dedup();
        for there in possible.chunk_by(|(a, _), (b, _)| a == b) {
            visits[there[0].0 as usize] += count * (1.0 - parts.missed(there));
        }
        possible.clear();
    }
    visits
}

/// The copies of every expert of a layer by unit. All copies of an expert in one unit are a part of the expert.
struct Parts {
    /// Index of every expert's first part `[E + 1]`.
    first: Vec<usize>,
    /// Unit of every part.
    unit: Vec<u32>,
    /// Copies of every part.
    copies: Vec<Vec<Holder>>,
    /// Share of the expert's tokens that a part does not serve.
    missed: Vec<f64>,
    /// True if one hash of a token chooses the copies of all experts, not each independently.
    hashed: bool,
}

/// What the hashes of a period make a unit serve.
struct Tries {
    period: u32,
    /// Experts with all of their copies in the unit.
    always: Vec<u16>,
    /// Numbers of hashes, and the further experts that these serve in the unit.
    served: Vec<(u32, Vec<u16>)>,
}

impl Tries {
    /// Lists what hashes make a unit with such parts of experts serve; None if the hashes have a long period.
    fn new(parts: Vec<(u16, &[Holder])>) -> Option<Self> {
        let (always, by_hash): (Vec<_>, Vec<_>) =
            parts.into_iter().partition(|&(_, copies)| has_all_copies(copies));
        let period = by_hash.iter().try_fold(1, |period, (_, copies)| {
            let longer = common_period(period, copies[0].copies);
            (longer <= LISTED_PERIOD).then_some(longer)
        })?;
        let serves = |hash, copies: &[Holder]| {
            copies.iter().any(|copy| choose_copy(hash, copy.copies as usize) == copy.number as usize)
        };
        let of_hash = |hash: u32| -> Vec<u16> {
            let served = by_hash.iter().filter(|(_, copies)| serves(hash as usize, copies));
            served.map(|&(expert, _)| expert).collect()
        };
        let mut served: Vec<Vec<u16>> = (0..period).map(of_hash).collect();
        served.sort_unstable();
        let equal = served.chunk_by(Vec::eq).map(|equal| (equal.len() as u32, equal[0].clone()));
        Some(Self { period, always: always.into_iter().map(|(e, _)| e).collect(), served: equal.collect() })
    }
}

/// Returns true if the copies of an expert in one unit are all that it has.
fn has_all_copies(copies: &[Holder]) -> bool {
    copies.len() == copies[0].copies as usize
}

impl Parts {
    /// Groups the copies of experts by unit; with `hashed` one hash of a token chooses the copies of all experts.
    fn new<Copies: Iterator<Item = (usize, Holder)>>(
        experts: usize,
        copies: impl Fn(usize) -> Copies,
        hashed: bool,
    ) -> Self {
        let (mut first, mut unit, mut members) = (vec![0], Vec::new(), Vec::<Vec<Holder>>::new());
        for expert in 0..experts {
            let begin = unit.len();
            for (there, copy) in copies(expert) {
                if let Some(part) = unit[begin..].iter().position(|&unit| unit == there as u32) {
                    members[begin + part].push(copy);
                } else {
                    unit.push(there as u32);
                    members.push(vec![copy]);
                }
            }
            first.push(unit.len());
        }
        let alone = |copies: &Vec<Holder>| {
            if hashed { missed_by_hash(&mut copies.clone()) } else { missed_independently(copies) }
        };
        let missed = members.iter().map(alone).collect();
        Self { first, unit, copies: members, missed, hashed }
    }

    /// Returns what hashes make every unit serve; None if choices are independent of hashes or a period is long.
    fn tries(&self, units: usize) -> Option<Vec<Tries>> {
        if !self.hashed && !self.copies.iter().all(|copies| has_all_copies(copies)) {
            return None;
        }
        let mut parts_in: Vec<Vec<(u16, &[Holder])>> = vec![Vec::new(); units];
        for expert in 0..self.first.len() - 1 {
            for part in self.range(expert) {
                parts_in[self.unit[part] as usize].push((expert as u16, &self.copies[part]));
            }
        }
        parts_in.into_iter().map(Tries::new).collect()
    }

    /// Returns the indices of an expert's parts.
    fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.first[expert]..self.first[expert + 1]
    }

    /// Returns the share of tokens that none of some parts serves, given with their unit; they are of different experts.
    fn missed(&self, parts: &[(u32, u32)]) -> f64 {
        if !self.hashed || parts.len() == 1 {
            return parts.iter().map(|&(_, part)| self.missed[part as usize]).product();
        }
        let copies = parts.iter().flat_map(|&(_, part)| &self.copies[part as usize]);
        missed_by_hash(&mut copies.copied().collect())
    }
}

/// Returns the share of an expert's tokens that none of its copies in a unit serves, if copies are chosen by their shares.
fn missed_independently(copies: &[Holder]) -> f64 {
    1.0 - copies.iter().map(|copy| copy.share).sum::<f64>()
}

/// Returns the share of tokens that none of some copies serves, if experts choose by the remainders of one hash of the token;
/// empties the list of copies.
fn missed_by_hash(copies: &mut Vec<Holder>) -> f64 {
    copies.sort_unstable_by_key(|copy| (copy.copies, copy.number));
    copies.dedup_by_key(|copy| (copy.copies, copy.number));
    let mut missed = 1.0;
    while let Some(&Holder { copies: first, .. }) = copies.first() {
        // Remainders by divisors without a common factor are independent. Others are tried together, up to a common period.
        let mut period = first;
        loop {
            let longer = copies.iter().fold(period, |period, copy| {
                let longer = common_period(period, copy.copies);
                if gcd(period, copy.copies) > 1 && longer <= PERIOD { longer } else { period }
            });
            if longer == period {
                break;
            }
            period = longer;
        }
        let is_tried = |copy: &Holder| period.is_multiple_of(copy.copies);
        let takes = |copy: &Holder, hash| choose_copy(hash, copy.copies as usize) == copy.number as usize;
        let hit = |hash| copies.iter().any(|copy| is_tried(copy) && takes(copy, hash));
        let none = (0..period as usize).filter(|&hash| !hit(hash)).count();
        missed *= none as f64 / f64::from(period);
        copies.retain(|copy| !is_tried(copy));
    }
    missed
}

/// Returns the greatest common divisor.
fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Returns the least common multiple.
fn common_period(a: u32, b: u32) -> u32 {
    a / gcd(a, b) * b
}

/// Expert sets of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Sets<'a> {
    /// Experts of every set `[N, K]`.
    pub ids: &'a [u16],
    /// Experts of a set, K.
    pub top_k: usize,
    /// Tokens of every set `[N]`; they add up to less than 2^63.
    pub counts: &'a [u64],
}

/// The copies of all layers, from which the figures of a placement are expected.
#[derive(Debug)]
pub struct Expectation {
    devices: usize,
    experts: usize,
    layers: Vec<Holders>,
}

impl<'a> Sets<'a> {
    /// Iterates over the sets in pieces of up to so many.
    fn chunks(self, number: usize) -> impl Iterator<Item = Self> {
        let ids = self.ids.chunks(number * self.top_k);
        ids.zip(self.counts.chunks(number)).map(move |(ids, counts)| Self { ids, counts, ..self })
    }

    /// Iterates over the experts of sets, and their tokens.
    fn iter(self) -> impl Iterator<Item = (&'a [u16], u64)> {
        self.ids.chunks_exact(self.top_k).zip(self.counts.iter().copied())
    }
}

impl Expectation {
    /// Builds the copies of slots `[L, D, S]` (expert ids, -1 for empty), with the share of its expert's tokens that each slot
    /// serves.
    pub fn new(
        slots: &[i32],
        share: &[f64],
        [layers, devices, per_device]: [usize; 3],
        experts: usize,
    ) -> Result<Self> {
        let size = devices * per_device;
        let layer = |l: usize| {
            let (first, slots) = slots_by_expert(&slots[l * size..][..size], experts)?;
            let unit = slots.iter().map(|&slot| u32::from(slot) / per_device as u32).collect();
            let share = slots.iter().map(|&slot| share[l * size + usize::from(slot)]).collect();
            Ok(Holders { first, unit, share })
        };
        Ok(Self { devices, experts, layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    /// Computes the tokens of every device in every window `[W, L, D]` from those of experts `[W, L, E]`.
    #[must_use]
    pub fn load(&self, load: &[f64]) -> Vec<f64> {
        let single: Vec<_> = self.layers.iter().map(Holders::single).collect();
        self.by_device(load, |l, load, tokens| {
            if let Some(device) = single[l] {
                load.iter().zip(device).for_each(|(load, &device)| tokens[device as usize] += load);
                return;
            }
            for (expert, &load) in load.iter().enumerate() {
                self.layers[l].of(expert).for_each(|(device, share)| tokens[device] += share * load);
            }
        })
    }

    /// Computes the expected number of copies on every device that serve a token in every window `[W, L, D]`, from the tokens of
    /// experts `[W, L, E]`.
    #[must_use]
    pub fn active(&self, load: &[f64]) -> Vec<f64> {
        let single: Vec<_> = self.layers.iter().map(Holders::single).collect();
        let idle: Vec<Idle> = self.layers.iter().map(|holders| Idle::new(&holders.share)).collect();
        self.by_device(load, |l, load, active| {
            let holders = &self.layers[l];
            if let Some(device) = single[l] {
                let is_active = load.iter().map(|&tokens| f64::from(u8::from(tokens > 0.0)));
                is_active.zip(device).for_each(|(one, &device)| active[device as usize] += one);
                return;
            }
            for (expert, &tokens) in load.iter().enumerate().filter(|&(_, &tokens)| tokens > 0.0) {
                for copy in holders.first[expert] as usize..holders.first[expert + 1] as usize {
                    active[holders.unit[copy] as usize] += 1.0 - idle[l].probability(copy, tokens);
                }
            }
        })
    }

    /// Returns a table of devices `[W, L, D]`, whose rows `add` computes from the rows of `load` `[W, L, E]`.
    fn by_device(&self, load: &[f64], add: impl Fn(usize, &[f64], &mut [f64]) + Sync) -> Vec<f64> {
        let (layers, e, d) = (self.layers.len(), self.experts, self.devices);
        let mut table = vec![0.0; load.len() / e.max(1) * d];
        let window = |(table, load): (&mut [f64], &[f64])| {
            (0..layers).for_each(|l| add(l, &load[l * e..][..e], &mut table[l * d..][..d]));
        };
        let (rows, size) = ((layers * d).max(1), (layers * e).max(1));
        if rayon::current_thread_index().is_none() {
            table.chunks_mut(rows).zip(load.chunks(size)).for_each(window);
        } else {
            table.par_chunks_mut(rows).zip(load.par_chunks(size)).for_each(window);
        }
        table
    }

    /// Computes the tokens that visit every device `[L, D]` and every node `[L, N]`, from the sets of every layer `[L]`.
    ///
    /// `node` has the node of every device `[D]`; with `hashed` one hash of a token chooses the copies of all its experts.
    #[must_use]
    pub fn visits(&self, node: &[u16], sets: &[Sets<'_>], hashed: bool) -> (Vec<f64>, Vec<f64>) {
        let nodes = count_groups(node);
        let layer = |l: usize| self.layers[l].visits(node, nodes, sets[l], hashed);
        let (devices, nodes): (Vec<_>, Vec<_>) = map_numbers(sets.len(), layer).into_iter().unzip();
        (devices.concat(), nodes.concat())
    }

    /// Computes the pairs of every layer `[L]` whose experts are served on different devices, from symmetric counts `[L, E, E]`.
    #[must_use]
    pub fn apart(&self, pairs: &[u64]) -> Vec<f64> {
        let (e, d) = (self.experts, self.devices);
        let layer = |l: usize| {
            let (holders, pairs) = (&self.layers[l], &pairs[l * e * e..][..e * e]);
            if let Some(device) = holders.single() {
                let row = |(row, &first): (&[u64], &u32)| -> u128 {
                    let apart = row
                        .iter()
                        .zip(device)
                        .map(|(&count, &second)| if second == first { 0 } else { count });
                    apart.map(u128::from).sum()
                };
                return pairs.chunks_exact(e).zip(device).map(row).sum::<u128>() as f64 / 2.0;
            }
            // Share of the first expert's tokens that every device serves.
            let mut share_on = vec![0.0; d];
            let mut sum = 0.0;
            for (first, row) in pairs.chunks_exact(e).enumerate() {
                holders.of(first).for_each(|(device, share)| share_on[device] = share);
                for (second, &count) in row.iter().enumerate() {
                    let together: f64 =
                        holders.of(second).map(|(device, share)| share_on[device] * share).sum();
                    sum += count as f64 * (1.0 - together);
                }
                holders.of(first).for_each(|(device, _)| share_on[device] = 0.0);
            }
            sum / 2.0
        };
        map_numbers(self.layers.len(), layer)
    }

    /// Estimates the visits per token of load of every device `[L, D]` and every node `[L, N]` from pairs.
    ///
    /// `pairs` has symmetric counts `[L, E, E]`, `node` the node of every device `[D]`, `top_k` the experts of a token `[L]`.
    #[must_use]
    pub fn visits_of_pairs(&self, node: &[u16], pairs: &[u64], top_k: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let e = self.experts;
        let nodes = count_groups(node);
        let layer = |l: usize| {
            let (holders, pairs) = (&self.layers[l], &pairs[l * e * e..][..e * e]);
            let in_nodes = |e: usize| holders.of(e).map(|(device, share)| (usize::from(node[device]), share));
            let devices = estimate_visits(node.len(), pairs, e, |e| holders.of(e), top_k[l]);
            (devices, estimate_visits(nodes, pairs, e, in_nodes, top_k[l]))
        };
        let (devices, nodes): (Vec<_>, Vec<_>) = map_numbers(self.layers.len(), layer).into_iter().unzip();
        (devices.concat(), nodes.concat())
    }

    /// Computes the pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`, from counts `[L - 1, E, E]`.
    #[must_use]
    pub fn transitions(&self, counts: &[u64]) -> Vec<f64> {
        let (e, d) = (self.experts, self.devices);
        let boundary = |l: usize| {
            let (left, right) = (&self.layers[l], &self.layers[l + 1]);
            let table = &counts[l * e * e..][..e * e];
            // Transitions from every device to every expert of the next layer.
            let mut from = vec![0.0; d * e];
            for (expert, row) in table.chunks_exact(e).enumerate() {
                for (device, share) in left.of(expert) {
                    let to = from[device * e..][..e].iter_mut();
                    to.zip(row).for_each(|(to, &count)| *to += share * count as f64);
                }
            }
            let mut pairs = vec![0.0; d * d];
            for (pairs, from) in pairs.chunks_exact_mut(d).zip(from.chunks_exact(e)) {
                for (expert, &tokens) in from.iter().enumerate() {
                    right.of(expert).for_each(|(device, share)| pairs[device] += tokens * share);
                }
            }
            pairs
        };
        map_numbers(self.layers.len().saturating_sub(1), boundary).concat()
    }
}

/// Estimates the visits of every unit per token of its load, from pairs `[E, E]` and the units and shares of experts' copies.
fn estimate_visits<Copies: Iterator<Item = (usize, f64)>>(
    units: usize,
    pairs: &[u64],
    experts: usize,
    copies: impl Fn(usize) -> Copies,
    top_k: u32,
) -> Vec<f64> {
    let mut experts_in: Vec<Vec<(usize, f64)>> = vec![Vec::new(); units];
    for expert in 0..experts {
        for (unit, share) in copies(expert) {
            match experts_in[unit].last_mut() {
                // Several devices of a node may have copies.
                Some(last) if last.0 == expert => last.1 += share,
                _ => experts_in[unit].push((expert, share)),
            }
        }
    }
    let row = |expert: usize| &pairs[expert * experts..][..experts];
    let sum = |expert| row(expert).iter().map(|&count| count as f64).sum::<f64>();
    let load: Vec<f64> = (0..experts).map(sum).collect();
    let all = load.iter().sum::<f64>().max(1.0);
    let visits = |members: &Vec<(usize, f64)>| {
        let (mut served, mut together) = (0.0, 0.0);
        for &(first, share) in members {
            served += share * load[first];
            let pairs_of_first = members.iter().map(|&(second, other)| row(first)[second] as f64 * other);
            together += share * pairs_of_first.sum::<f64>();
        }
        visits_of_load(served / all, together / all, top_k)
    };
    experts_in.iter().map(visits).collect()
}

/// Numbers of tokens for which probabilities are tabulated. With more tokens, a copy of the usual shares is hardly ever idle.
const TABULATED: usize = 1 << 10;

/// Probabilities that the copies of a layer serve none of some tokens.
#[derive(Debug)]
struct Idle {
    /// Logarithm of the share of other copies, by copy.
    log_others: Vec<f64>,
    /// Index of a copy's first probability in `probabilities`, which copies of one share have in common.
    begin: Vec<usize>,
    /// Probabilities for 0, 1, ... tokens, [`TABULATED`] of them for each share.
    probabilities: Vec<f64>,
}

impl Idle {
    /// Tabulates the probabilities of copies with these shares.
    fn new(shares: &[f64]) -> Self {
        let log_others: Vec<f64> = shares.iter().map(|share| (-share).ln_1p()).collect();
        let mut distinct: Vec<f64> = log_others.clone();
        distinct.sort_unstable_by(f64::total_cmp);
        distinct.dedup();
        let place = |log: &f64| distinct.partition_point(|other| other.total_cmp(log).is_lt());
        let begin = log_others.iter().map(|log| TABULATED * place(log)).collect();
        let probabilities = distinct.iter().flat_map(|log| {
            (0..TABULATED).map(move |tokens| if tokens == 0 { 1.0 } else { exp_or_zero(tokens as f64 * log) })
        });
        Self { log_others, begin, probabilities: probabilities.collect() }
    }

    /// Returns the probability that a copy serves none of so many tokens, which may be fractional in means of windows.
    fn probability(&self, copy: usize, tokens: f64) -> f64 {
        let number = tokens as usize;
        #[allow(clippy::float_cmp)] // integers compare exactly
        if number < TABULATED && number as f64 == tokens {
            return self.probabilities[self.begin[copy] + number];
        }
        exp_or_zero(tokens * self.log_others[copy])
    }
}

/// Returns `exp(log)`, or zero where one less that is one anyway: most copies have tokens for certain.
fn exp_or_zero(log: f64) -> f64 {
    if log < -40.0 { 0.0 } else { log.exp() }
}

/// Computes the cost of counted pairs `[N, E, E]` with costs of links `[D, D]`.
///
/// The first expert of a pair is on the device that `first` `[N, E]` has for it, the second one on that of `second`.
#[must_use]
pub fn pair_cost(first: &[u16], second: &[u16], pairs: &[u64], cost: &[u64], experts: usize) -> u128 {
    let devices = cost.len().isqrt();
    let table = |l: usize| -> u128 {
        let [first, second] = [first, second].map(|devices| &devices[l * experts..][..experts]);
        let row = |(row, &from): (&[u64], &u16)| -> u128 {
            let cost = &cost[usize::from(from) * devices..][..devices];
            let product = |(&count, &to): (&u64, &u16)| u128::from(count) * u128::from(cost[usize::from(to)]);
            row.iter().zip(second).map(product).sum()
        };
        pairs[l * experts * experts..][..experts * experts].chunks_exact(experts).zip(first).map(row).sum()
    };
    map_numbers(first.len() / experts.max(1), table).into_iter().sum()
}

/// Computes the rows at the busiest port of every tier `[W, L, T]` from visits `[W, L, D]`.
///
/// `share` `[L, D, D]` has the share of a device's visits that come from every home, home first. `tier` `[D, D]` has the tier of
/// every link, 0 for none.
#[must_use]
pub fn busiest_rows(visits: &[f64], share: &[f64], tier: &[u16], tiers: usize) -> Vec<f64> {
    let d = tier.len().isqrt();
    let layers = share.len() / (d * d);
    // Rows that homes send for a visit of a device `[L, T, D, D]`, device first, and their sum over homes `[L, T, D]`.
    let mut sent = vec![0.0; layers * tiers * d * d];
    let mut sum = vec![0.0; layers * tiers * d];
    for (l, share) in share.chunks_exact(d * d).enumerate() {
        for (at, (&share, &tier)) in share.iter().zip(tier).enumerate().filter(|&(_, (_, &tier))| tier > 0) {
            let (home, device, row) = (at / d, at % d, l * tiers + usize::from(tier) - 1);
            sent[(row * d + device) * d + home] = share;
            sum[row * d + device] += share;
        }
    }
    let window = |w: usize| {
        let (mut rows, mut out) = (vec![0.0; layers * tiers], vec![0.0; d]);
        for (row, rows) in rows.iter_mut().enumerate() {
            let visits = &visits[(w * layers + row / tiers) * d..][..d];
            out.fill(0.0);
            for (sent, &tokens) in sent[row * d * d..][..d * d].chunks_exact(d).zip(visits) {
                out.iter_mut().zip(sent).for_each(|(out, share)| *out += tokens * share);
            }
            let into = visits.iter().zip(&sum[row * d..]).map(|(tokens, share)| tokens * share);
            *rows = into.chain(out.iter().copied()).fold(0.0, f64::max);
        }
        rows
    };
    map_numbers(visits.len() / (layers * d), window).concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::Random;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Experts of one copy and of several; sets that fill a word, a chunk and more; copies of one expert in one unit.
        #[test]
        fn visits_by_bits_are_those_set_by_set(
            seed: u64,
            units in 1..6usize,
            experts in 1..20usize,
            copies in 1..5usize,
            sets in prop::sample::select(vec![0usize, 1, 63, 64, 65, 512, 513, 700]),
            hashed: bool,
        ) {
            let mut random = Random::new(seed, 0);
            let mut unit_of_copy = || (0..=random.below(copies)).map(|_| random.below(units)).collect();
            let units_of: Vec<Vec<usize>> = (0..experts).map(|_| unit_of_copy()).collect();
            let top_k = 1 + random.below(experts);
            let ids: Vec<u16> = (0..sets * top_k).map(|_| random.below(experts) as u16).collect();
            let counts: Vec<u64> = (0..sets).map(|_| 1 << random.below(40)).collect();
            let copies = |e: usize| {
                let units = units_of[e].clone();
                let copy = move |number: usize| {
                    let share = 1.0 / units.len() as f64;
                    (units[number], Holder { copies: units.len() as u32, number: number as u32, share })
                };
                (0..units_of[e].len()).map(copy)
            };
            let parts = Parts::new(experts, copies, hashed);
            let sets = Sets { ids: &ids, top_k, counts: &counts };
            let by_set = visits_set_by_set(&parts, units, sets);
            match parts.tries(units) {
                Some(tries) => {
                    for (bits, expected) in visits_of_tries(experts, &tries, sets).iter().zip(by_set) {
                        prop_assert!((bits - expected).abs() <= 1e-12 * expected, "{bits} {expected}");
                    }
                }
                None => prop_assert!(!hashed),
            }
        }
    }
}
