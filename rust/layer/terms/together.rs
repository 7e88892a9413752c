//! The pairs term: how many co-activated pairs are not on one device, and how many tokens visit a device by them.
//!
//! Pairs stand for visits where expert sets are not known. With copies, the chance that a pair is on one device is the sum
//! over devices of the product of both shares there: copies are chosen independently. Every device keeps each expert's
//! *affinity*, its pairs with the experts there. So a candidate is priced by a few numbers, and applied by adding rows.

use super::{Candidate, Term, Visits};
use crate::layer::slots::Share;
use crate::layer::{Layer, Slots};
use crate::urn::visits_of_load;

/// Co-activated pairs of a layer, and the cost of a pair that is apart.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// Symmetric `[E, E]`, zero on the diagonal.
    pub counts: Vec<f32>,
    /// Pairs of every expert `[E]`, in proportion to its load.
    load: Vec<f64>,
    /// All pairs, in both orders.
    all: f64,
    /// Experts of a token.
    top_k: u32,
    /// Cost of a pair that is not on one device.
    pub cost: f64,
}

impl Pairs {
    /// Builds the pairs from counts `[E, E]`, symmetric with a zero diagonal, the experts of a token, and the cost of a pair
    /// apart.
    #[must_use]
    pub fn new(counts: Vec<f32>, top_k: u32, cost: f64) -> Self {
        let sum = |counts: &[f32]| counts.iter().map(|&count| f64::from(count)).sum::<f64>();
        let load: Vec<f64> = counts.chunks_exact(counts.len().isqrt().max(1)).map(sum).collect();
        let all = load.iter().sum();
        Self { counts, load, all, top_k, cost }
    }

    /// Returns the pairs of an expert `[E]`.
    fn row(&self, expert: u16) -> &[f32] {
        let n = self.load.len();
        &self.counts[usize::from(expert) * n..][..n]
    }
}

/// Pairs that a device serves: of its experts with any expert, and with one another, in both orders.
#[derive(Debug, Clone, Copy, Default)]
struct Served {
    load: f64,
    pairs: f64,
}

impl Served {
    /// Returns the sum of two.
    fn plus(self, added: Self) -> Self {
        Self { load: self.load + added.load, pairs: self.pairs + added.pairs }
    }

    /// Returns visits per token of load.
    fn visits(self, pairs: &Pairs) -> f32 {
        let all = pairs.all.max(1.0);
        visits_of_load(self.load / all, self.pairs / all, pairs.top_k) as f32
    }
}

/// The term: pairs of every expert with the experts on a device.
#[derive(Debug, Clone)]
pub(crate) struct Together<'a> {
    pairs: &'a Pairs,
    /// True if this term estimates visits of devices: rows have a price, and expert sets are not known.
    estimates_visits: bool,
    /// Pairs of an expert with the experts of a device `[D, E]`.
    affinity: Vec<f64>,
    /// Pairs that every device serves `[D]`.
    served: Vec<Served>,
    /// Pairs that are not on one device.
    pairs_apart: f64,
    /// Pairs that the last candidate brings together.
    pairs_gained: f64,
    /// Pairs that the last candidate adds to devices.
    changes: Vec<(u16, Served)>,
}

impl<'a> Together<'a> {
    /// Builds the term for slots.
    pub(crate) fn new(layer: &Layer, pairs: &'a Pairs, slots: &Slots) -> Self {
        let devices = layer.devices();
        let mut together = Self {
            pairs,
            estimates_visits: layer.costs.row > 0.0 && layer.costs.sets.is_none(),
            affinity: vec![0.0; devices * layer.experts],
            served: vec![Served::default(); devices],
            pairs_apart: pairs.all / 2.0,
            pairs_gained: 0.0,
            changes: Vec::new(),
        };
        let copies: Vec<Share> = layer.copies(slots).collect();
        for of_expert in copies.chunk_by(|a, b| a.expert == b.expert) {
            together.apply_shares(of_expert);
        }
        together
    }

    /// Returns the visits of every device per token of its load `[D]`.
    pub(super) fn visits_per_load(&self) -> Vec<f32> {
        self.served.iter().map(|served| served.visits(self.pairs)).collect()
    }

    /// Writes the visits per token of load after the last candidate.
    fn write_visits(&self, visits: &mut Visits) {
        if self.estimates_visits {
            let then =
                |device: u16, added: Served| self.served[usize::from(device)].plus(added).visits(self.pairs);
            visits.extend(self.changes.iter().map(|&(device, added)| (device, then(device, added))));
        }
    }

    /// Applies changes of shares.
    fn apply_shares(&mut self, shares: &[Share]) {
        self.compute_changes(shares);
        self.pairs_apart -= self.pairs_gained;
        for &(device, added) in &self.changes {
            let served = &mut self.served[usize::from(device)];
            *served = served.plus(added);
        }
        for share in shares {
            let row = self.pairs.row(share.expert);
            let affinity = &mut self.affinity[usize::from(share.device) * row.len()..][..row.len()];
            for (affinity, &count) in affinity.iter_mut().zip(row) {
                *affinity += (share.after - share.before) * f64::from(count);
            }
        }
    }

    /// Computes what devices gain by changes of shares: load, and pairs with the experts that are there or come there.
    fn compute_changes(&mut self, shares: &[Share]) {
        let pairs = self.pairs;
        self.changes.clear();
        self.pairs_gained = 0.0;
        for (n, share) in shares.iter().enumerate() {
            let (row, change) = (pairs.row(share.expert), share.after - share.before);
            let mut pairs_there =
                self.affinity[usize::from(share.device) * row.len() + usize::from(share.expert)];
            for other in shares[..n].iter().filter(|other| other.device == share.device) {
                pairs_there += (other.after - other.before) * f64::from(row[usize::from(other.expert)]);
            }
            self.pairs_gained += change * pairs_there;
            let added = Served {
                load: change * pairs.load[usize::from(share.expert)],
                pairs: 2.0 * change * pairs_there,
            };
            let at = self.changes.iter().position(|(device, _)| *device == share.device);
            let at = at.unwrap_or_else(|| {
                self.changes.push((share.device, Served::default()));
                self.changes.len() - 1
            });
            self.changes[at].1 = self.changes[at].1.plus(added);
        }
    }
}

impl Term for Together<'_> {
    fn cost(&self) -> f64 {
        self.pairs_apart * self.pairs.cost
    }

    fn change(&mut self, &Candidate { shares, .. }: &Candidate<'_>, visits: &mut Visits) -> f64 {
        self.compute_changes(shares);
        self.write_visits(visits);
        -self.pairs_gained * self.pairs.cost
    }

    fn apply(&mut self, &Candidate { shares, .. }: &Candidate<'_>, visits: &mut Visits) {
        if self.estimates_visits {
            self.compute_changes(shares);
            self.write_visits(visits);
        }
        self.apply_shares(shares);
    }
}

#[cfg(test)]
pub(super) const DEFINITION: super::Definition = super::Definition {
    price: |random, layer, _| {
        let experts = layer.experts;
        let mut counts = vec![0.0; experts * experts];
        for (e, f) in (0..experts).flat_map(|e| (0..e).map(move |f| (e, f))) {
            counts[e * experts + f] = random.below(1000) as f32;
            counts[f * experts + e] = counts[e * experts + f];
        }
        layer.costs.pairs = Some(Pairs::new(counts, 4, 2.0));
    },
    cost: |layer, slots| {
        let pairs = layer.costs.pairs.as_ref().expect("pairs are priced");
        let share = |e, g| super::share(layer, slots, e, g);
        let cost = |(e, f): (usize, usize)| {
            let together: f64 = (0..layer.devices()).map(|g| share(e, g) * share(f, g)).sum();
            pairs.cost * f64::from(pairs.counts[e * layer.experts + f]) * (1.0 - together)
        };
        (0..layer.experts).flat_map(|e| (0..e).map(move |f| (e, f))).map(cost).sum()
    },
};

/// Builds the pairs of experts in the sets of traffic.
#[cfg(test)]
pub(in crate::layer) fn pairs_of(ids: &[u16], counts: &[u64], experts: usize) -> Pairs {
    let k = (ids.len() / counts.len().max(1)).max(1);
    let mut table = vec![0.0; experts * experts];
    for (ids, &count) in ids.chunks_exact(k).zip(counts) {
        for (&e, &f) in ids.iter().flat_map(|e| ids.iter().map(move |f| (e, f))).filter(|(e, f)| e != f) {
            table[usize::from(e) * experts + usize::from(f)] += count as f32;
        }
    }
    Pairs::new(table, k as u32, 0.0)
}
