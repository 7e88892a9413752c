//! What a placement is expected to make of counts, without a token being replayed: loads, visits, pairs.
//!
//! Copies share the tokens of an expert. They are chosen independently of each other; visits also as by one hash of the
//! token, of which every expert takes the remainder by its number of copies ([`missed_by_hash`]). Sums run over experts, or sets,
//! in their order, so that they are the same on any number of threads; with one copy of each expert they are sums of
//! whole numbers, and exact.

use rayon::prelude::*;

use super::copies::by_expert;
use crate::error::Result;
use crate::random::choose_copy;
use crate::urn::visits_of_load;

/// Makes something of every number from 0: by threads within a pool, else in the calling one.
fn made_of<T: Send>(count: usize, make: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    let is_alone = rayon::current_thread_index().is_none();
    if is_alone { (0..count).map(make).collect() } else { (0..count).into_par_iter().map(make).collect() }
}

/// Remainders that are tried one by one; numbers of copies with longer periods are taken to be independent.
const PERIOD: u32 = 1 << 12;
/// The longest period of which all hashes are known of every part: that of up to eight copies, 840, is shorter.
const LONGEST: u32 = 1 << 10;
/// Bits in a word.
const WORD: usize = 64;

/// Where the experts of a layer are: units (devices or nodes) of every expert, in their order, and its share of them.
#[derive(Debug)]
struct Holders {
    first: Vec<u32>,
    unit: Vec<u32>,
    share: Vec<f64>,
}

impl Holders {
    fn of(&self, expert: usize) -> impl Iterator<Item = (usize, f64)> + Clone + '_ {
        let range = self.first[expert] as usize..self.first[expert + 1] as usize;
        self.unit[range.clone()].iter().map(|&unit| unit as usize).zip(self.share[range].iter().copied())
    }

    /// The unit of every expert, where each has one that takes all of it.
    fn single(&self) -> Option<&[u32]> {
        let alone =
            self.unit.len() + 1 == self.first.len() && self.first.windows(2).all(|w| w[1] == w[0] + 1);
        #[allow(clippy::float_cmp)] // one is one
        (alone && self.share.iter().all(|&share| share == 1.0)).then_some(&self.unit[..])
    }

    /// The copies of an expert, with their units.
    fn copies(&self, expert: usize) -> impl Iterator<Item = (usize, Holder)> + '_ {
        let copies = self.first[expert + 1] - self.first[expert];
        (0..)
            .zip(self.of(expert))
            .map(move |(number, (unit, share))| (unit, Holder { copies, number, share }))
    }

    /// Tokens that visit every device and every node `[D, N]`, of sets; `node` of every device is one of `nodes`.
    fn visits(&self, node: &[u16], nodes: usize, sets: Sets<'_>, hashed: bool) -> (Vec<f64>, Vec<f64>) {
        if let Some(device) = self.single() {
            return visits_of_single(device, node, nodes, sets);
        }
        let in_nodes = |e: usize| self.copies(e).map(|(device, copy)| (usize::from(node[device]), copy));
        let experts = self.first.len() - 1;
        let visits = visits_of_copies(experts, node.len(), sets, |e| self.copies(e), hashed);
        if nodes == 1 {
            let all: u64 = sets.iter().map(|(_, count)| count).sum();
            return (visits, vec![all as f64]);
        }
        (visits, visits_of_copies(experts, nodes, sets, in_nodes, hashed))
    }
}

/// A copy of an expert: which it is of how many, and its share of the expert's tokens.
#[derive(Debug, Clone, Copy)]
struct Holder {
    copies: u32,
    number: u32,
    share: f64,
}

/// Tokens that visit every unit, of sets of experts with several copies: the `copies` of an expert by unit, chosen by one
/// hash of a token or independently.
fn visits_of_copies<Copies: Iterator<Item = (usize, Holder)>>(
    experts: usize,
    units: usize,
    sets: Sets<'_>,
    copies: impl Fn(usize) -> Copies,
    hashed: bool,
) -> Vec<f64> {
    let mut parts = Parts::new(experts, copies, hashed);
    let nowhere = Visited { tokens: 0.0, set: u32::MAX, perhaps: u32::MAX, part: 0 };
    let mut units = vec![nowhere; units];
    // Of a set: parts of experts that are in several units, units of which it may be in one, and further parts there.
    let (mut shared, mut met, mut further, mut both) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (set, (ids, count)) in (0..).zip(sets.iter()) {
        let count = count as f64;
        for &e in ids {
            let range = parts.range(usize::from(e));
            if range.len() != 1 {
                shared.push(range);
                continue;
            }
            let here = &mut units[parts.unit[range.start] as usize];
            if here.set != set {
                here.set = set;
                here.tokens += count;
            }
        }
        for part in shared.drain(..).flatten() {
            let unit = parts.unit[part];
            let here = &mut units[unit as usize];
            if here.set == set {
                continue;
            }
            if here.perhaps == set {
                further.push((unit, part as u32));
            } else {
                (here.perhaps, here.part) = (set, part as u32);
                met.push(unit);
            }
        }
        for unit in met.drain(..) {
            let here = &mut units[unit as usize];
            let mut missed = parts.missed[here.part as usize];
            if further.iter().any(|&(there, _)| there == unit) {
                both.clear();
                both.push(here.part);
                both.extend(further.iter().filter(|&&(there, _)| there == unit).map(|&(_, part)| part));
                missed = parts.missed(&both);
            }
            here.tokens += count * (1.0 - missed);
        }
        further.clear();
    }
    units.into_iter().map(|unit| unit.tokens).collect()
}

/// A unit, and how a set visits it.
#[derive(Clone)]
struct Visited {
    tokens: f64,
    /// The last set that was there for certain, and the last that may have been there.
    set: u32,
    perhaps: u32,
    /// The first part that may have served that one there.
    part: u32,
}

/// The copies of every expert of a layer by unit: all those of an expert in one unit are a part of it.
struct Parts {
    /// Where the parts of every expert begin `[E + 1]`.
    first: Vec<usize>,
    /// Unit of every part.
    unit: Vec<u32>,
    /// Copies of every part.
    copies: Vec<Vec<Holder>>,
    /// Share of an expert's tokens that every part has none of.
    missed: Vec<f64>,
    chosen: Chosen,
}

/// How the experts of a token choose among their copies.
enum Chosen {
    Independently,
    /// By the remainders of one hash: which of a period of hashes, bits of words, every part serves.
    ByHash(Hits),
    /// The same, where the numbers of copies have a longer period.
    ByLongHash,
}

/// The hashes of a period that every part serves, a bit each.
struct Hits {
    period: u32,
    /// Words of every part.
    words: usize,
    bits: Vec<u64>,
    /// Those that some parts serve together.
    served: Vec<u64>,
}

impl Hits {
    fn new(period: u32, copies: &[Vec<Holder>]) -> Self {
        let words = (period as usize).div_ceil(WORD);
        let mut bits = vec![0; words * copies.len()];
        for (bits, copies) in bits.chunks_exact_mut(words).zip(copies) {
            for hash in 0..period as usize {
                let is_hit = |copy: &Holder| choose_copy(hash, copy.copies as usize) == copy.number as usize;
                bits[hash / WORD] |= u64::from(copies.iter().any(is_hit)) << (hash % WORD);
            }
        }
        Self { period, words, bits, served: vec![0; words] }
    }

    /// The share of the period that none of some parts serves.
    fn missed(&mut self, parts: &[u32]) -> f64 {
        let words = self.words;
        self.served.fill(0);
        for &part in parts {
            let bits = &self.bits[part as usize * words..][..words];
            self.served.iter_mut().zip(bits).for_each(|(served, bits)| *served |= bits);
        }
        let served: u32 = self.served.iter().map(|word| word.count_ones()).sum();
        f64::from(self.period - served) / f64::from(self.period)
    }
}

impl Parts {
    fn new<Copies: Iterator<Item = (usize, Holder)>>(
        experts: usize,
        copies: impl Fn(usize) -> Copies,
        hashed: bool,
    ) -> Self {
        let (mut first, mut unit, mut held) = (vec![0], Vec::new(), Vec::<Vec<Holder>>::new());
        for expert in 0..experts {
            let begin = unit.len();
            for (there, copy) in copies(expert) {
                if let Some(part) = unit[begin..].iter().position(|&unit| unit == there as u32) {
                    held[begin + part].push(copy);
                } else {
                    unit.push(there as u32);
                    held.push(vec![copy]);
                }
            }
            first.push(unit.len());
        }
        let alone = |copies: &Vec<Holder>| {
            if hashed { missed_by_hash(&mut copies.clone()) } else { missed_independently(copies) }
        };
        let missed = held.iter().map(alone).collect();
        let all = || held.iter().flatten();
        let period = all().try_fold(1u32, |period, copy| {
            let both = period / gcd(period, copy.copies) * copy.copies;
            (both <= LONGEST).then_some(both)
        });
        let chosen = match period {
            _ if !hashed => Chosen::Independently,
            None => Chosen::ByLongHash,
            Some(period) => Chosen::ByHash(Hits::new(period, &held)),
        };
        Self { first, unit, copies: held, missed, chosen }
    }

    /// The parts of an expert.
    fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.first[expert]..self.first[expert + 1]
    }

    /// The share of tokens that none of some parts in a unit serves, each of another expert.
    fn missed(&mut self, parts: &[u32]) -> f64 {
        if let [part] = parts {
            return self.missed[*part as usize];
        }
        match &mut self.chosen {
            Chosen::Independently => parts.iter().map(|&part| self.missed[part as usize]).product(),
            Chosen::ByHash(hits) => hits.missed(parts),
            Chosen::ByLongHash => {
                let copies = parts.iter().flat_map(|&part| self.copies[part as usize].iter().copied());
                missed_by_hash(&mut copies.collect())
            }
        }
    }
}

/// The share of an expert's tokens that none of its copies in a unit serves, where it chooses independently.
fn missed_independently(copies: &[Holder]) -> f64 {
    1.0 - copies.iter().map(|copy| copy.share).sum::<f64>()
}

/// The share of tokens that none of some copies serves, where one hash of the token chooses for all experts, each by its
/// remainder; copies are taken away.
fn missed_by_hash(copies: &mut Vec<Holder>) -> f64 {
    copies.sort_unstable_by_key(|copy| (copy.copies, copy.number));
    copies.dedup_by_key(|copy| (copy.copies, copy.number));
    let mut missed = 1.0;
    while let Some(&Holder { copies: first, .. }) = copies.first() {
        // Divisors without a common factor are independent; those with one are tried together, up to their period.
        let mut period = first;
        loop {
            let longer = copies.iter().fold(period, |period, copy| {
                let common = gcd(period, copy.copies);
                let both = period / common * copy.copies;
                if common > 1 && both <= PERIOD { both } else { period }
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

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Tokens that visit every device and every node, of experts that are on one device each.
fn visits_of_single(device: &[u32], node: &[u16], nodes: usize, sets: Sets<'_>) -> (Vec<f64>, Vec<f64>) {
    // The last set that was there, and the tokens so far.
    let mut devices = vec![(u32::MAX, 0u64); node.len()];
    let mut of_nodes = vec![(u32::MAX, 0u64); nodes];
    for (set, (ids, count)) in (0..).zip(sets.iter()) {
        for &e in ids {
            let device = device[usize::from(e)] as usize;
            let here = &mut devices[device];
            if here.0 != set {
                *here = (set, here.1 + count);
                let here = &mut of_nodes[usize::from(node[device])];
                *here = (set, here.1 + if here.0 == set { 0 } else { count });
            }
        }
    }
    let tokens = |parts: Vec<(u32, u64)>| parts.into_iter().map(|(_, tokens)| tokens as f64).collect();
    (tokens(devices), tokens(of_nodes))
}

/// Expert sets of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Sets<'a> {
    /// Experts of every set `[N, K]`.
    pub ids: &'a [u16],
    /// Tokens of every set `[N]`; they add up to less than 2^63.
    pub counts: &'a [u64],
}

/// Where experts are, and their tokens: for what is expected of a placement.
#[derive(Debug)]
pub struct Shared {
    devices: usize,
    experts: usize,
    layers: Vec<Holders>,
}

impl<'a> Sets<'a> {
    fn iter(self) -> impl Iterator<Item = (&'a [u16], u64)> {
        let k = (self.ids.len() / self.counts.len().max(1)).max(1);
        self.ids.chunks_exact(k).zip(self.counts.iter().copied())
    }
}

impl Shared {
    /// Takes slots `[L, D, S]` (expert ids, -1 for empty) and the share of its expert's tokens that each serves.
    pub fn new(
        slots: &[i32],
        share: &[f64],
        [layers, devices, per_device]: [usize; 3],
        experts: usize,
    ) -> Result<Self> {
        let size = devices * per_device;
        let layer = |l: usize| {
            let (first, slots) = by_expert(&slots[l * size..][..size], experts)?;
            let unit = slots.iter().map(|&slot| u32::from(slot) / per_device as u32).collect();
            let share = slots.iter().map(|&slot| share[l * size + usize::from(slot)]).collect();
            Ok(Holders { first, unit, share })
        };
        Ok(Self { devices, experts, layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    /// Tokens of every device in every window `[W, L, D]`, of those of experts `[W, L, E]`.
    #[must_use]
    pub fn load(&self, load: &[f64]) -> Vec<f64> {
        let single: Vec<_> = self.layers.iter().map(Holders::single).collect();
        self.by_device(load, |l, load, tokens| {
            if let Some(device) = single[l] {
                load.iter().zip(device).for_each(|(load, &device)| tokens[device as usize] += load);
                return;
            }
            for (expert, &load) in load.iter().enumerate() {
                for (device, share) in self.layers[l].of(expert) {
                    tokens[device] += share * load;
                }
            }
        })
    }

    /// Copies of every device that are expected to have a token in every window `[W, L, D]`, of tokens of experts
    /// `[W, L, E]`: one with a share of them is idle if all go to others.
    #[must_use]
    pub fn active(&self, load: &[f64]) -> Vec<f64> {
        let idle: Vec<Idle> = self.layers.iter().map(|holders| Idle::new(&holders.share)).collect();
        self.by_device(load, |l, load, active| {
            let holders = &self.layers[l];
            for (expert, &tokens) in load.iter().enumerate().filter(|&(_, &tokens)| tokens > 0.0) {
                for copy in holders.first[expert] as usize..holders.first[expert + 1] as usize {
                    active[holders.unit[copy] as usize] += 1.0 - idle[l].chance(copy, tokens);
                }
            }
        })
    }

    /// What a layer of a window adds to its devices, of its tokens of experts: of all windows `[W, L, D]`.
    fn by_device(&self, load: &[f64], add: impl Fn(usize, &[f64], &mut [f64]) + Sync) -> Vec<f64> {
        let (layers, e, d) = (self.layers.len(), self.experts, self.devices);
        let mut table = vec![0.0; load.len() / e.max(1) * d];
        let window = |(table, load): (&mut [f64], &[f64])| {
            for (l, (row, load)) in table.chunks_exact_mut(d).zip(load.chunks_exact(e)).enumerate() {
                add(l, load, row);
            }
        };
        let (rows, size) = ((layers * d).max(1), (layers * e).max(1));
        if rayon::current_thread_index().is_none() {
            table.chunks_mut(rows).zip(load.chunks(size)).for_each(window);
        } else {
            table.par_chunks_mut(rows).zip(load.par_chunks(size)).for_each(window);
        }
        table
    }

    /// Tokens that visit every device `[L, D]` and every node `[L, N]`, of sets of every layer and the node of every
    /// device `[D]`; `hashed` says whether one hash of a token chooses the copies of all its experts.
    #[must_use]
    pub fn visits(&self, node: &[u16], sets: &[Sets<'_>], hashed: bool) -> (Vec<f64>, Vec<f64>) {
        let nodes = node.iter().max().map_or(0, |&node| usize::from(node) + 1);
        let layer = |l: usize| self.layers[l].visits(node, nodes, sets[l], hashed);
        let (devices, nodes): (Vec<_>, Vec<_>) = made_of(sets.len(), layer).into_iter().unzip();
        (devices.concat(), nodes.concat())
    }

    /// Pairs of every layer `[L]` whose experts are not served by one device, of counts `[L, E, E]` with both orders.
    #[must_use]
    pub fn apart(&self, pairs: &[u64]) -> Vec<f64> {
        let (e, d) = (self.experts, self.devices);
        let layer = |l: usize| {
            let (holders, pairs) = (&self.layers[l], &pairs[l * e * e..][..e * e]);
            if let Some(device) = holders.single() {
                let row = |(row, &here): (&[u64], &u32)| -> u128 {
                    let apart =
                        row.iter().zip(device).map(|(&count, &there)| if there == here { 0 } else { count });
                    apart.map(u128::from).sum()
                };
                return pairs.chunks_exact(e).zip(device).map(row).sum::<u128>() as f64 / 2.0;
            }
            let mut part = vec![0.0; d];
            let mut sum = 0.0;
            for (here, row) in pairs.chunks_exact(e).enumerate() {
                holders.of(here).for_each(|(device, share)| part[device] = share);
                for (there, &count) in row.iter().enumerate() {
                    let together: f64 = holders.of(there).map(|(device, share)| part[device] * share).sum();
                    sum += count as f64 * (1.0 - together);
                }
                holders.of(here).for_each(|(device, _)| part[device] = 0.0);
            }
            sum / 2.0
        };
        made_of(self.layers.len(), layer)
    }

    /// Visits for each token of load of every device `[L, D]` and every node `[L, N]`, as pairs tell: of counts
    /// `[L, E, E]` with both orders, the node of every device `[D]`, and the experts of a token `[L]`.
    #[must_use]
    pub fn met(&self, node: &[u16], pairs: &[u64], top_k: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let e = self.experts;
        let nodes = node.iter().max().map_or(0, |&node| usize::from(node) + 1);
        let layer = |l: usize| {
            let (holders, pairs) = (&self.layers[l], &pairs[l * e * e..][..e * e]);
            let in_nodes = |e: usize| holders.of(e).map(|(device, share)| (usize::from(node[device]), share));
            let devices = met_by_pairs(node.len(), pairs, e, |e| holders.of(e), top_k[l]);
            (devices, met_by_pairs(nodes, pairs, e, in_nodes, top_k[l]))
        };
        let (devices, nodes): (Vec<_>, Vec<_>) = made_of(self.layers.len(), layer).into_iter().unzip();
        (devices.concat(), nodes.concat())
    }

    /// Pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`, of counts `[L - 1, E, E]`.
    #[must_use]
    pub fn followed(&self, transitions: &[u64]) -> Vec<f64> {
        let (e, d) = (self.experts, self.devices);
        let boundary = |l: usize| {
            let (two, table) = (&self.layers[l..l + 2], &transitions[l * e * e..][..e * e]);
            let mut from = vec![0.0; d * e];
            for (expert, row) in table.chunks_exact(e).enumerate() {
                for (device, share) in two[0].of(expert) {
                    let to = from[device * e..][..e].iter_mut();
                    to.zip(row).for_each(|(to, &count)| *to += share * count as f64);
                }
            }
            let mut pairs = vec![0.0; d * d];
            for (pairs, from) in pairs.chunks_exact_mut(d).zip(from.chunks_exact(e)) {
                for (expert, &tokens) in from.iter().enumerate() {
                    two[1].of(expert).for_each(|(device, share)| pairs[device] += tokens * share);
                }
            }
            pairs
        };
        made_of(self.layers.len().saturating_sub(1), boundary).concat()
    }
}

/// Visits of every unit for each token of its load, as pairs `[E, E]` tell, of experts in units by shares.
fn met_by_pairs<Copies: Iterator<Item = (usize, f64)>>(
    units: usize,
    pairs: &[u64],
    experts: usize,
    copies: impl Fn(usize) -> Copies,
    top_k: u32,
) -> Vec<f64> {
    let mut held: Vec<Vec<(usize, f64)>> = vec![Vec::new(); units];
    for expert in 0..experts {
        for (unit, share) in copies(expert) {
            match held[unit].last_mut() {
                // Of a node several devices have a copy.
                Some(last) if last.0 == expert => last.1 += share,
                _ => held[unit].push((expert, share)),
            }
        }
    }
    let row = |expert: usize| &pairs[expert * experts..][..experts];
    let sum = |expert| row(expert).iter().map(|&count| count as f64).sum::<f64>();
    let load: Vec<f64> = (0..experts).map(sum).collect();
    let all = load.iter().sum::<f64>().max(1.0);
    let met = |held: &Vec<(usize, f64)>| {
        let (mut served, mut together) = (0.0, 0.0);
        for &(here, share) in held {
            served += share * load[here];
            let beside = held.iter().map(|&(there, other)| row(here)[there] as f64 * other);
            together += share * beside.sum::<f64>();
        }
        visits_of_load(served / all, together / all, top_k)
    };
    held.iter().map(met).collect()
}

/// Tokens of which the chance is looked up: beyond, with copies as few as are usual, a copy has one for certain.
const LOOKED_UP: usize = 1 << 10;

/// How likely copies of a layer are to have none of some tokens.
#[derive(Debug)]
struct Idle {
    /// Logarithm of the share of others, by copy.
    others: Vec<f64>,
    /// Where a copy's chances begin in `chances`: copies of one share have the same.
    begin: Vec<usize>,
    /// For each share the chance of 0 tokens, 1 and so on, `LOOKED_UP` of them.
    chances: Vec<f64>,
}

impl Idle {
    fn new(shares: &[f64]) -> Self {
        let others: Vec<f64> = shares.iter().map(|share| (-share).ln_1p()).collect();
        let mut different: Vec<f64> = others.clone();
        different.sort_unstable_by(f64::total_cmp);
        different.dedup();
        let place = |other: &f64| different.partition_point(|one| one.total_cmp(other).is_lt());
        let begin = others.iter().map(|other| LOOKED_UP * place(other)).collect();
        let chances = different.iter().flat_map(|other| {
            (0..LOOKED_UP).map(move |tokens| if tokens == 0 { 1.0 } else { (tokens as f64 * other).exp() })
        });
        let chances = chances.collect();
        Self { others, begin, chances }
    }

    /// The chance that a copy has none of so many tokens, which in means of windows are no whole number.
    fn chance(&self, copy: usize, tokens: f64) -> f64 {
        let number = tokens as usize;
        #[allow(clippy::float_cmp)] // a whole number is one
        if number < LOOKED_UP && number as f64 == tokens {
            return self.chances[self.begin[copy] + number];
        }
        (tokens * self.others[copy]).exp()
    }
}

/// What counted pairs cost, with experts on devices `[N, E]`: `here` for the first of a pair and `there` for the other, of
/// counts `[N, E, E]` and costs `[D, D]`.
#[must_use]
pub fn cost(here: &[u16], there: &[u16], pairs: &[u64], cost: &[u64], experts: usize) -> u128 {
    let devices = cost.len().isqrt();
    let table = |l: usize| -> u128 {
        let [here, there] = [here, there].map(|all| &all[l * experts..][..experts]);
        let row = |(row, &here): (&[u64], &u16)| -> u128 {
            let cost = &cost[usize::from(here) * devices..][..devices];
            let product =
                |(&count, &there): (&u64, &u16)| u128::from(count) * u128::from(cost[usize::from(there)]);
            row.iter().zip(there).map(product).sum()
        };
        pairs[l * experts * experts..][..experts * experts].chunks_exact(experts).zip(here).map(row).sum()
    };
    made_of(here.len() / experts.max(1), table).into_iter().sum()
}

/// Rows at the busiest port of every tier `[W, L, T]`, of visits `[W, L, D]`: a device is visited from every home by a
/// share of its tokens `[L, D, D]`, home first, over the links of their tier `[D, D]`, of which 0 is no link.
#[must_use]
pub fn busiest(visits: &[f64], share: &[f64], tier: &[u16], tiers: usize) -> Vec<f64> {
    let d = tier.len().isqrt();
    let layers = share.len() / (d * d);
    // What a visit of a device makes homes send `[L, T, D, D]`, device first, and what in all `[L, T, D]`.
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
    made_of(visits.len() / (layers * d), window).concat()
}
