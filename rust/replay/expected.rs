//! What a placement is expected to make of counts, without a token being replayed: loads, visits, pairs.
//!
//! Copies share the tokens of an expert and are chosen independently of each other. Sums run over experts, or sets, in
//! their order, so that they are the same on any number of threads; with one copy of each expert they are sums of whole
//! numbers, and exact.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Fewer steps than this are made in the calling thread.
const FEW: usize = 1 << 18;

/// A number of tokens.
pub trait Tokens: Copy + Send + Sync {
    /// As a number that shares can be taken of.
    fn tokens(self) -> f64;
}

impl Tokens for f64 {
    fn tokens(self) -> f64 {
        self
    }
}

impl Tokens for u64 {
    fn tokens(self) -> f64 {
        self as f64
    }
}

impl Tokens for bool {
    fn tokens(self) -> f64 {
        f64::from(u8::from(self))
    }
}

/// Where the experts of a layer are: units (devices or nodes) of every expert, in their order, and its share of them.
#[derive(Debug)]
struct Holders {
    first: Vec<usize>,
    unit: Vec<u32>,
    share: Vec<f64>,
}

impl Holders {
    fn of(&self, expert: usize) -> impl Iterator<Item = (usize, f64)> + Clone + '_ {
        let mine = self.first[expert]..self.first[expert + 1];
        self.unit[mine.clone()].iter().map(|&unit| unit as usize).zip(self.share[mine].iter().copied())
    }

    /// The unit of every expert, where each has one that takes all of it.
    fn single(&self) -> Option<&[u32]> {
        let alone =
            self.unit.len() + 1 == self.first.len() && self.first.windows(2).all(|w| w[1] == w[0] + 1);
        #[allow(clippy::float_cmp)] // one is one
        (alone && self.share.iter().all(|&share| share == 1.0)).then_some(&self.unit[..])
    }

    /// The same, with the units of units: shares add up.
    fn within(&self, outer: &[u16]) -> Self {
        let (mut first, mut unit, mut share) = (vec![0], Vec::new(), Vec::new());
        for e in 0..self.first.len() - 1 {
            let begin = unit.len();
            for (inner, part) in self.of(e) {
                let outer = u32::from(outer[inner]);
                if let Some(at) = unit[begin..].iter().position(|&unit| unit == outer) {
                    share[begin + at] += part;
                } else {
                    unit.push(outer);
                    share.push(part);
                }
            }
            first.push(unit.len());
        }
        Self { first, unit, share }
    }

    /// Tokens that visit every unit, of sets `[N, K]` and the tokens of each `[N]`.
    fn visits(&self, units: usize, sets: Sets<'_>) -> Vec<f64> {
        let k = (sets.ids.len() / sets.counts.len().max(1)).max(1);
        let sets = sets.ids.chunks_exact(k).zip(sets.counts).enumerate();
        let mut last = vec![usize::MAX; units];
        if let Some(unit) = self.single() {
            let mut tokens = vec![0u64; units];
            for (set, (ids, &count)) in sets {
                for &e in ids {
                    let unit = unit[usize::from(e)] as usize;
                    if last[unit] != set {
                        last[unit] = set;
                        tokens[unit] += count;
                    }
                }
            }
            return tokens.into_iter().map(|tokens| tokens as f64).collect();
        }
        // Share of the set's tokens that miss a unit, of the units that it meets.
        let (mut tokens, mut missed, mut met) = (vec![0.0; units], vec![0.0; units], Vec::new());
        for (set, (ids, &count)) in sets {
            for &e in ids {
                for (unit, share) in self.of(usize::from(e)) {
                    if last[unit] == set {
                        missed[unit] *= 1.0 - share;
                    } else {
                        last[unit] = set;
                        missed[unit] = 1.0 - share;
                        met.push(unit);
                    }
                }
            }
            for unit in met.drain(..) {
                tokens[unit] += count as f64 * (1.0 - missed[unit]);
            }
        }
        tokens
    }
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

fn wrong<T>(what: &'static str, rule: String, found: usize) -> Result<T> {
    Err(Error::Shape { what, rule, found: format!("{found} values") })
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
        if slots.len() != layers * size || share.len() != slots.len() {
            return wrong("share", format!("[{layers}, {devices}, {per_device}]"), share.len());
        }
        if let Some(&expert) = slots.iter().find(|&&e| e >= 0 && e as usize >= experts) {
            return wrong("slots", format!("ids below {experts}"), expert as usize);
        }
        let layer = |l: usize| {
            let (slots, share) = (&slots[l * size..][..size], &share[l * size..][..size]);
            let mut first = vec![0; experts + 1];
            for &e in slots.iter().filter(|&&e| e >= 0) {
                first[e as usize + 1] += 1;
            }
            (0..experts).for_each(|e| first[e + 1] += first[e]);
            let (mut unit, mut part) = (vec![0; first[experts]], vec![0.0; first[experts]]);
            let mut next = first.clone();
            for (at, &e) in slots.iter().enumerate().filter(|&(_, &e)| e >= 0) {
                let place = &mut next[e as usize];
                (unit[*place], part[*place]) = ((at / per_device) as u32, share[at]);
                *place += 1;
            }
            Holders { first, unit, share: part }
        };
        Ok(Self { devices, experts, layers: (0..layers).map(layer).collect() })
    }

    /// Tokens of every device in every window `[W, L, D]`, of those of experts `[W, L, E]`.
    pub fn load<T: Tokens>(&self, load: &[T]) -> Result<Vec<f64>> {
        let (layers, e, d) = (self.layers.len(), self.experts, self.devices);
        if !load.len().is_multiple_of((layers * e).max(1)) {
            return wrong("load", format!("[windows, {layers}, {e}]"), load.len());
        }
        let mut found = vec![0.0; load.len() / e.max(1) * d];
        let window = |(found, load): (&mut [f64], &[T])| {
            for ((found, load), holders) in
                found.chunks_exact_mut(d).zip(load.chunks_exact(e)).zip(&self.layers)
            {
                for (expert, &load) in load.iter().enumerate() {
                    for (device, share) in holders.of(expert) {
                        found[device] += share * load.tokens();
                    }
                }
            }
        };
        if load.len() < FEW {
            found
                .chunks_exact_mut((layers * d).max(1))
                .zip(load.chunks_exact((layers * e).max(1)))
                .for_each(window);
        } else {
            found.par_chunks_exact_mut(layers * d).zip(load.par_chunks_exact(layers * e)).for_each(window);
        }
        Ok(found)
    }

    /// Tokens that visit every device `[L, D]` and every node `[L, N]`, of sets of every layer and the node of every
    /// device `[D]`.
    pub fn visits(&self, node: &[u16], sets: &[Sets<'_>]) -> Result<(Vec<f64>, Vec<f64>)> {
        let (e, d) = (self.experts, self.devices);
        if sets.len() != self.layers.len() || node.len() != d {
            return wrong("sets", format!("one for each of {} layers", self.layers.len()), sets.len());
        }
        let known = |of: &Sets<'_>| {
            let k = of.ids.len() / of.counts.len().max(1);
            k * of.counts.len() == of.ids.len() && of.ids.iter().all(|&id| usize::from(id) < e)
        };
        let nodes = node.iter().max().map_or(0, |&node| usize::from(node) + 1);
        let layer = |(holders, &of): (&Holders, &Sets<'_>)| {
            known(&of).then(|| (holders.visits(d, of), holders.within(node).visits(nodes, of)))
        };
        let all = self.layers.par_iter().zip(sets);
        let Some(found) = all.map(layer).collect::<Option<Vec<_>>>() else {
            return wrong("sets", format!("ids [N, K] below {e} and counts [N]"), 0);
        };
        let (devices, nodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        Ok((devices.concat(), nodes.concat()))
    }

    /// Pairs of every layer `[L]` whose experts are not served by one device, of counts `[L, E, E]` with both orders.
    pub fn apart(&self, pairs: &[u64]) -> Result<Vec<f64>> {
        let (e, d) = (self.experts, self.devices);
        if pairs.len() != self.layers.len() * e * e {
            return wrong("pairs", format!("[{}, {e}, {e}]", self.layers.len()), pairs.len());
        }
        let layer = |(holders, pairs): (&Holders, &[u64])| {
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
        Ok(self.layers.par_iter().zip(pairs.par_chunks_exact((e * e).max(1))).map(layer).collect())
    }

    /// Pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`, of counts `[L - 1, E, E]`.
    pub fn followed(&self, transitions: &[u64]) -> Result<Vec<f64>> {
        let (e, d) = (self.experts, self.devices);
        let boundaries = self.layers.len().saturating_sub(1);
        if transitions.len() != boundaries * e * e {
            return wrong("transitions", format!("[{boundaries}, {e}, {e}]"), transitions.len());
        }
        let boundary = |(two, table): (&[Holders], &[u64])| {
            let mut from = vec![0.0; d * e];
            for (expert, row) in table.chunks_exact(e).enumerate() {
                for (device, share) in two[0].of(expert) {
                    let to = from[device * e..][..e].iter_mut();
                    to.zip(row).for_each(|(to, &count)| *to += share * count as f64);
                }
            }
            let mut found = vec![0.0; d * d];
            for (found, from) in found.chunks_exact_mut(d).zip(from.chunks_exact(e)) {
                for (expert, &tokens) in from.iter().enumerate() {
                    two[1].of(expert).for_each(|(device, share)| found[device] += tokens * share);
                }
            }
            found
        };
        let tables = transitions.par_chunks_exact((e * e).max(1));
        Ok(self.layers.par_windows(2).zip(tables).map(boundary).collect::<Vec<_>>().concat())
    }
}

/// What counted pairs cost, with experts on devices `[N, E]`: `here` for the first of a pair and `there` for the other, of
/// counts `[N, E, E]` and costs `[D, D]`.
pub fn cost(here: &[u16], there: &[u16], pairs: &[u64], cost: &[u64], experts: usize) -> Result<u128> {
    let devices = cost.len().isqrt();
    let known = |device: &u16| usize::from(*device) < devices;
    if here.len() != there.len() || pairs.len() != here.len() * experts || devices * devices != cost.len() {
        return wrong("pairs", format!("[{}, {experts}]", here.len()), pairs.len());
    }
    if !here.iter().chain(there).all(known) {
        return wrong("device_of", format!("devices below {devices}"), here.len());
    }
    let table = |((pairs, here), there): ((&[u64], &[u16]), &[u16])| -> u128 {
        let row = |(row, &here): (&[u64], &u16)| -> u128 {
            let cost = &cost[usize::from(here) * devices..][..devices];
            let of =
                |(&count, &there): (&u64, &u16)| u128::from(count) * u128::from(cost[usize::from(there)]);
            row.iter().zip(there).map(of).sum()
        };
        pairs.chunks_exact(experts).zip(here).map(row).sum()
    };
    let experts = experts.max(1);
    let layers = pairs.par_chunks_exact(experts * experts).zip(here.par_chunks_exact(experts));
    Ok(layers.zip(there.par_chunks_exact(experts)).map(table).sum())
}

#[cfg(test)]
// Sums of whole numbers and halves are exact.
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    /// Expert 0 on both devices of node 0, expert 1 on device 1, expert 2 on device 2 of node 1.
    fn shared() -> Shared {
        let (slots, share) = ([0, -1, 1, 0, 2, -1], [0.5, 0.0, 1.0, 0.5, 1.0, 0.0]);
        Shared::new(&slots, &share, [1, 3, 2], 3).expect("valid")
    }

    #[test]
    fn copies_are_chosen_independently() {
        let sets = Sets { ids: &[0, 2, 0, 1], counts: &[10, 100] };
        let (devices, nodes) = shared().visits(&[0, 0, 1], &[sets]).expect("valid");
        assert_eq!(devices, [55.0, 105.0, 10.0]);
        assert_eq!(nodes, [110.0, 10.0]);
        assert_eq!(shared().load(&[10.0, 1.0, 100.0]).expect("valid"), [5.0, 6.0, 100.0]);
        // 0 with 1, 0 with 2, 1 with 2.
        let pairs = [0, 8, 16, 8, 0, 100, 16, 100, 0];
        assert_eq!(shared().apart(&pairs).expect("valid"), [4.0 + 16.0 + 100.0]);
    }

    #[test]
    fn pairs_follow_their_experts() {
        // Layer 0: both on device 0; layer 1: expert 0 on both devices, expert 1 on device 1.
        let (slots, share) = ([0, 1, -1, -1, 0, -1, 0, 1], [1.0, 1.0, 0.0, 0.0, 0.5, 0.0, 0.5, 1.0]);
        let shared = Shared::new(&slots, &share, [2, 2, 2], 2).expect("valid");
        assert_eq!(shared.followed(&[2, 10, 4, 100]).expect("valid"), [3.0, 113.0, 0.0, 0.0]);
        let all = cost(&[0, 0], &[0, 1], &[2, 10, 4, u64::MAX], &[0, 7, 7, 0], 2).expect("valid");
        assert_eq!(all, 7 * (10 + u128::from(u64::MAX)));
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let shared = shared();
        let sets = |ids| [Sets { ids, counts: &[1] }];
        assert!(shared.visits(&[0, 0, 1], &sets(&[2])).is_ok());
        assert!(shared.visits(&[0, 0, 1], &sets(&[3])).is_err());
        assert!(shared.visits(&[0, 0], &sets(&[2])).is_err());
        assert!(shared.load(&[1.0; 4]).is_err());
        assert!(shared.apart(&[1; 8]).is_err());
        assert!(shared.followed(&[1]).is_err());
        assert!(Shared::new(&[3], &[1.0], [1, 1, 1], 3).is_err());
        assert!(cost(&[0], &[2], &[1], &[0, 1, 1, 0], 1).is_err());
    }
}
