//! Exchanges of experts between pairs of clusters, and random kicks when no exchange helps.

use super::bounds::Bounds;
use super::{ClusterSizes, Goal, Improve, peak_and_deviation_of};
use crate::arrays::bits_beyond;
use crate::random::Random;

/// Largest number of kicks. The search ends earlier when its goal is close enough to the bound.
const KICKS: u64 = 400;
/// Number of kicks without gain after which the search ends.
const IDLE: u64 = 80;
/// Swaps of a kick.
const SWAPS: usize = 3;
/// Clusters of more experts than this exchange one expert at a time, which is choice enough.
const PAIRED: usize = 64;

/// Up to two experts of a cluster, and their load.
#[derive(Debug, Clone, Copy)]
struct Subset {
    load: i64,
    experts: [u16; 2],
}

/// A cluster under search.
#[derive(Debug, Clone, Default)]
struct Cluster {
    experts: Vec<u16>,
    load: i64,
    /// Subsets of no, one and two experts, in rising order of load.
    subsets: [Vec<Subset>; 3],
}

/// A packing that is being improved.
pub(super) struct Exchanges<'a> {
    load: Vec<i64>,
    clusters: Vec<Cluster>,
    sizes: ClusterSizes,
    improve: Improve<'a>,
    /// Peak and deviation at which the search stops.
    enough: (u128, u128),
    /// Clusters whose exchanges have not all been tried since they changed. No exchange between other clusters helps.
    open: Vec<usize>,
    /// Clusters that differ from the best packing.
    changed: Vec<usize>,
}

impl<'a> Exchanges<'a> {
    /// Builds the search that starts from the cluster of every expert `[E]`.
    pub(super) fn new(
        load: &[u64],
        start: &[u16],
        clusters: usize,
        sizes: ClusterSizes,
        improve: Improve<'a>,
        bounds: &Bounds,
    ) -> Self {
        // Counts so large that sums could overflow lose their lowest bits.
        let total: u128 = load.iter().map(|&load| u128::from(load)).sum();
        let shift = bits_beyond(total, 62);
        let slack = improve.goal.slack(total, clusters);
        let least = |bound: u128, slack: u128| (bound >> shift) + (slack >> shift);
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

    /// Searches; returns the cluster of every expert `[E]` in the best packing.
    pub(super) fn run(mut self) -> Vec<u16> {
        self.descend();
        let mut best = self.clusters.clone();
        let mut value = self.rank();
        self.changed.clear();
        let mut random = Random::new(0, self.load.len() as u64);
        let mut idle = 0;
        for _ in 0..KICKS {
            if self.clusters.len() < 2 || !value.0 || idle == IDLE || (self.improve.is_over)() {
                break;
            }
            self.kick(&mut random);
            self.descend();
            let new = self.rank();
            let is_better = new < value;
            value = value.min(new);
            idle = if is_better { 0 } else { idle + 1 };
            for c in self.changed.drain(..) {
                let (from, to) =
                    if is_better { (&self.clusters, &mut best) } else { (&best, &mut self.clusters) };
                to[c].clone_from(&from[c]);
            }
            self.open.clear();
        }
        let mut cluster = vec![0; self.load.len()];
        for (c, members) in best.iter().enumerate() {
            members.experts.iter().for_each(|&e| cluster[usize::from(e)] = c as u16);
        }
        cluster
    }

    /// Recomputes the load and the subsets of a cluster after its experts have changed.
    fn refresh(&mut self, c: usize) {
        let cluster = &mut self.clusters[c];
        let load = &self.load;
        let load_of = |e: u16| load[usize::from(e)];
        cluster.load = cluster.experts.iter().map(|&e| load_of(e)).sum();
        let [none, one, two] = &mut cluster.subsets;
        *none = vec![Subset { load: 0, experts: [0, 0] }];
        one.clear();
        two.clear();
        for (i, &e) in cluster.experts.iter().enumerate() {
            one.push(Subset { load: load_of(e), experts: [e, 0] });
            if cluster.experts.len() <= PAIRED {
                two.extend(
                    cluster.experts[..i]
                        .iter()
                        .map(|&f| Subset { load: load_of(e) + load_of(f), experts: [e, f] }),
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

    /// Returns the rank of the packing: whether it is not good enough yet, the goal, then the other of the two goals.
    fn rank(&self) -> (bool, u128, u128) {
        let loads = self.clusters.iter().map(|cluster| u128::from(cluster.load.unsigned_abs()));
        let (peak, deviation) = peak_and_deviation_of(loads);
        let is_insufficient = peak > self.enough.0 || deviation > self.enough.1;
        match self.improve.goal {
            Goal::Peak => (is_insufficient, peak, deviation),
            Goal::Deviation { .. } => (is_insufficient, deviation, peak),
        }
    }

    /// Makes exchanges between all pairs of clusters until none brings two loads closer.
    fn descend(&mut self) {
        while let Some(a) = self.open.pop() {
            if !self.rank().0 || (self.improve.is_over)() {
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

    /// Makes the exchange that brings the loads of two clusters closest, if there is one that brings them closer.
    fn bring_closer(&mut self, a: usize, b: usize) {
        let (a, b) = if self.clusters[a].load >= self.clusters[b].load { (a, b) } else { (b, a) };
        let (from, to) = (&self.clusters[a], &self.clusters[b]);
        let difference = from.load - to.load;
        let mut best = (difference, None);
        for i in 0..3 {
            for j in 0..3 {
                let experts = [from.experts.len() + j, to.experts.len() + i];
                let is_allowed = |size: usize, leaving: usize| {
                    size >= leaving && (self.sizes.smallest..=self.sizes.largest).contains(&(size - leaving))
                };
                if i + j > 0 && (i == j || (is_allowed(experts[0], i) && is_allowed(experts[1], j))) {
                    find_closest(&from.subsets[i], &to.subsets[j], difference, (i, j), &mut best);
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

    /// Swaps a few random experts, so that the next descent ends in another local optimum.
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

/// The difference of two loads after an exchange, and the numbers of experts and subsets that are given and taken.
type Exchange = (i64, Option<((usize, Subset), (usize, Subset))>);

/// Finds the subsets of `i` and `j` experts whose exchange brings two loads closest, if they are closer than by `best`.
///
/// The exchange moves a load near half of the `difference`. Both lists rise in load, so one sweep finds it.
fn find_closest(
    give: &[Subset],
    take: &[Subset],
    difference: i64,
    (i, j): (usize, usize),
    best: &mut Exchange,
) {
    let (mut g, mut t) = (0, 0);
    while g < give.len() && t < take.len() {
        let moved = give[g].load - take[t].load;
        let remaining = difference - 2 * moved;
        if remaining.abs() < best.0 {
            *best = (remaining.abs(), Some(((i, give[g]), (j, take[t]))));
        }
        if remaining > 0 {
            g += 1;
        } else {
            t += 1;
        }
    }
}
