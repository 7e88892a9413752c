//! Exchanges between pairs of clusters, and kicks where they no longer help.

use super::bounds::Bounds;
use super::{Goal, Improve, Sizes};
use crate::random::Random;

/// Descents from a kicked packing, at most, and without gain; the search ends earlier when it is as near to the bound
/// as asked.
const KICKS: u64 = 400;
const IDLE: u64 = 80;
/// Swaps of a kick.
const SWAPS: usize = 3;
/// Clusters of more experts than this exchange one expert at a time: that is already a wide choice.
const PAIRED: usize = 64;

/// Up to two experts of a cluster, and their load.
#[derive(Debug, Clone, Copy)]
struct Few {
    load: i64,
    experts: [u16; 2],
}

#[derive(Debug, Clone, Default)]
struct Cluster {
    experts: Vec<u16>,
    load: i64,
    /// None, one or two of the experts, by load.
    small: [Vec<Few>; 3],
}

/// A packing that is being improved.
pub(super) struct Exchanges<'a> {
    load: Vec<i64>,
    clusters: Vec<Cluster>,
    sizes: Sizes,
    improve: Improve<'a>,
    /// Peak and deviation at which to stop.
    enough: (i128, i128),
    /// Clusters whose exchanges have not all been tried since they changed: all other pairs are at rest.
    open: Vec<usize>,
    /// Clusters that differ from the best packing.
    changed: Vec<usize>,
}

impl<'a> Exchanges<'a> {
    pub(super) fn new(
        load: &[u64],
        start: &[u16],
        clusters: usize,
        sizes: Sizes,
        improve: Improve<'a>,
        bounds: &Bounds,
    ) -> Self {
        // Sums of huge counts are searched with their lowest bits cut off.
        let total: u128 = load.iter().map(|&load| u128::from(load)).sum();
        let shift = (128 - total.leading_zeros()).saturating_sub(62);
        let slack = improve.goal.slack(total, clusters);
        let least = |bound: u128, slack: u128| ((bound >> shift) + (slack >> shift)) as i128;
        let mut members = vec![Cluster::default(); clusters];
        for (e, &c) in start.iter().enumerate() {
            members[usize::from(c)].experts.push(e as u16);
        }
        let mut exchanges = Self {
            load: load.iter().map(|&load| (load >> shift) as i64).collect(),
            clusters: members,
            sizes,
            improve,
            enough: (least(bounds.peak, slack.0), least(bounds.deviation, slack.1)),
            open: Vec::new(),
            changed: Vec::new(),
        };
        (0..clusters).for_each(|c| exchanges.refresh(c));
        exchanges
    }

    /// The cluster of every expert in the best packing found.
    pub(super) fn run(mut self) -> Vec<u16> {
        self.descend();
        let mut best = self.clusters.clone();
        let mut value = self.value();
        self.changed.clear();
        let mut random = Random::new(0, self.load.len() as u64);
        let mut idle = 0;
        for _ in 0..KICKS {
            if self.clusters.len() < 2 || !value.0 || idle == IDLE || (self.improve.is_over)() {
                break;
            }
            self.kick(&mut random);
            self.descend();
            let new = self.value();
            let better = new < value;
            value = value.min(new);
            idle = if better { 0 } else { idle + 1 };
            for c in self.changed.drain(..) {
                let (from, to) =
                    if better { (&self.clusters, &mut best) } else { (&best, &mut self.clusters) };
                to[c].clone_from(&from[c]);
            }
            self.open.clear();
        }
        let mut cluster = vec![0; self.load.len()];
        for (c, half) in best.iter().enumerate() {
            half.experts.iter().for_each(|&e| cluster[usize::from(e)] = c as u16);
        }
        cluster
    }

    /// Recomputes what depends on the experts of a cluster.
    fn refresh(&mut self, c: usize) {
        let cluster = &mut self.clusters[c];
        let load = &self.load;
        let load_of = |e: u16| load[usize::from(e)];
        cluster.load = cluster.experts.iter().map(|&e| load_of(e)).sum();
        let [none, one, two] = &mut cluster.small;
        *none = vec![Few { load: 0, experts: [0, 0] }];
        one.clear();
        two.clear();
        for (i, &e) in cluster.experts.iter().enumerate() {
            one.push(Few { load: load_of(e), experts: [e, 0] });
            if cluster.experts.len() <= PAIRED {
                two.extend(
                    cluster.experts[..i]
                        .iter()
                        .map(|&f| Few { load: load_of(e) + load_of(f), experts: [e, f] }),
                );
            }
        }
        one.sort_unstable_by_key(|group| (group.load, group.experts));
        two.sort_unstable_by_key(|group| (group.load, group.experts));
        if !self.open.contains(&c) {
            self.open.push(c);
        }
        if !self.changed.contains(&c) {
            self.changed.push(c);
        }
    }

    /// Peak and deviation.
    fn peak_and_deviation(&self) -> (i128, i128) {
        let d = self.clusters.len() as i128;
        let loads = || self.clusters.iter().map(|cluster| i128::from(cluster.load));
        let total: i128 = loads().sum();
        (loads().max().unwrap_or(0), loads().map(|load| (load * d - total).abs()).sum())
    }

    /// Whether it is not enough yet, what the goal asks for, then the other.
    fn value(&self) -> (bool, i128, i128) {
        let (peak, deviation) = self.peak_and_deviation();
        let short = peak > self.enough.0 || deviation > self.enough.1;
        match self.improve.goal {
            Goal::Peak => (short, peak, deviation),
            Goal::Deviation { .. } => (short, deviation, peak),
        }
    }

    /// Exchanges between all pairs of clusters until no exchange brings two loads closer.
    fn descend(&mut self) {
        while let Some(a) = self.open.pop() {
            if !self.value().0 || (self.improve.is_over)() {
                return;
            }
            for b in 0..self.clusters.len() {
                // A change opens both again.
                if a != b {
                    self.bring_closer(a, b);
                }
            }
        }
    }

    /// The exchange that brings the loads of two clusters closest, if there is one that brings them closer.
    fn bring_closer(&mut self, a: usize, b: usize) {
        let (a, b) = if self.clusters[a].load >= self.clusters[b].load { (a, b) } else { (b, a) };
        let (from, to) = (&self.clusters[a], &self.clusters[b]);
        let apart = from.load - to.load;
        let mut best = (apart, None);
        for i in 0..3 {
            for j in 0..3 {
                let experts = [from.experts.len() + j, to.experts.len() + i];
                let allowed = |size: usize, leaving: usize| {
                    size >= leaving && (self.sizes.smallest..=self.sizes.largest).contains(&(size - leaving))
                };
                if i + j > 0 && (i == j || (allowed(experts[0], i) && allowed(experts[1], j))) {
                    nearest(&from.small[i], &to.small[j], apart, (i, j), &mut best);
                }
            }
        }
        let (_, Some(((i, give), (j, take)))) = best else { return };
        let (give, take) = (&give.experts[..i], &take.experts[..j]);
        self.clusters[a].experts.retain(|e| !give.contains(e));
        self.clusters[a].experts.extend_from_slice(take);
        self.clusters[b].experts.retain(|e| !take.contains(e));
        self.clusters[b].experts.extend_from_slice(give);
        self.refresh(a);
        self.refresh(b);
    }

    /// Swaps a few experts at random, so that the next descent ends elsewhere.
    fn kick(&mut self, random: &mut Random) {
        for _ in 0..SWAPS {
            let a = random.below(self.clusters.len());
            let b = random.below(self.clusters.len());
            let (n, m) = (self.clusters[a].experts.len(), self.clusters[b].experts.len());
            if a == b || n == 0 || m == 0 {
                continue;
            }
            let (i, j) = (random.below(n), random.below(m));
            let (e, f) = (self.clusters[a].experts[i], self.clusters[b].experts[j]);
            self.clusters[a].experts[i] = f;
            self.clusters[b].experts[j] = e;
            self.refresh(a);
            self.refresh(b);
        }
    }
}

/// How far apart an exchange leaves two loads, and what is given and taken.
type Exchange = (i64, Option<((usize, Few), (usize, Few))>);

/// Finds the subsets whose exchange moves a load nearest to half of `apart`: both lists rise, so one sweep does it.
fn nearest(give: &[Few], take: &[Few], apart: i64, (i, j): (usize, usize), best: &mut Exchange) {
    let (mut g, mut t) = (0, 0);
    while g < give.len() && t < take.len() {
        let moved = give[g].load - take[t].load;
        let left = apart - 2 * moved;
        if left.abs() < best.0 {
            *best = (left.abs(), Some(((i, give[g]), (j, take[t]))));
        }
        if left > 0 {
            g += 1;
        } else {
            t += 1;
        }
    }
}
