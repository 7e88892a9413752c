//! Packing the experts of one layer into clusters of even load: longest processing time first, then exchanges.
//!
//! Two goals share one search. Replacing a few experts of one cluster by a few of another so that the two loads come
//! closer lowers the sum of squares, and never raises the largest load or the sum of deviations from the mean; so the
//! search descends on pairs of clusters, and only judges whole packings by the goal. Everything is an integer, ties
//! go to the lowest index, and the random kicks have a fixed stream: the same loads always give the same packing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::random::Random;

/// How many experts a cluster may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// At least.
    pub fewest: usize,
    /// At most.
    pub most: usize,
}

impl Room {
    /// As many experts in every cluster, or as near to it as `experts / clusters` allows.
    #[must_use]
    pub fn equal(experts: usize, clusters: usize) -> Self {
        Self { fewest: experts / clusters, most: experts.div_ceil(clusters) }
    }

    /// Up to `slots` experts, none empty unless there are fewer experts than clusters.
    #[must_use]
    pub fn free(experts: usize, clusters: usize, slots: usize) -> Self {
        Self { fewest: usize::from(experts >= clusters), most: slots }
    }
}

/// What makes one packing better than another; the other of the two decides between equals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The load of the heaviest cluster.
    Peak,
    /// The sum over clusters of |load - mean|.
    Deviation,
}

/// Descents from a kicked packing, at most; the search ends earlier when the bound is as good as reached.
const KICKS: u64 = 400;
/// A packing this close to its bound, as a share of the mean load, is not searched further.
const CLOSE: i128 = 4096;
/// Clusters of more experts than this exchange one expert at a time: that is already a wide choice.
const PAIRED: usize = 64;

/// A packed layer.
#[derive(Debug, Clone)]
pub struct Packing {
    /// The cluster of every expert.
    pub cluster: Vec<u16>,
    /// Load of the heaviest cluster, and what no packing can be below.
    pub peak: (u128, u128),
    /// `clusters` times the sum of deviations from the mean, and what no packing can be below.
    pub deviation: (u128, u128),
}

/// Packs every layer of `load`, `[layers, experts]`: `improve` is false for longest processing time first alone.
pub fn pack(
    load: &[u64],
    experts: usize,
    clusters: usize,
    room: Room,
    goal: Goal,
    improve: bool,
) -> Result<Vec<Packing>> {
    let fault = |what, rule: &str, found: usize| {
        Err(Error::Shape { what, rule: rule.to_owned(), found: found.to_string() })
    };
    if experts == 0 || !load.len().is_multiple_of(experts) {
        return fault("load", "at least one expert per layer", experts);
    }
    if clusters == 0 || clusters > usize::from(u16::MAX) {
        return fault("devices", "from 1 to 65535 devices", clusters);
    }
    if room.most.saturating_mul(clusters) < experts {
        let rule = format!(
            "at least {} slots for {experts} experts on {clusters} devices",
            experts.div_ceil(clusters)
        );
        return fault("slots", &rule, room.most);
    }
    let room = Room { most: room.most.min(experts), ..room };
    Ok(load.par_chunks(experts).map(|load| pack_layer(load, clusters, room, goal, improve)).collect())
}

fn pack_layer(load: &[u64], clusters: usize, room: Room, goal: Goal, improve: bool) -> Packing {
    let order = heaviest_first(load);
    let mut cluster = longest_first(load, &order, clusters, room);
    let bounds = Bounds::new(load, &order, clusters, room);
    if improve {
        cluster = Search::new(load, &cluster, clusters, room, goal, &bounds).run();
    }
    let (peak, deviation) = measure(load, &cluster, clusters);
    Packing { cluster, peak: (peak, bounds.peak), deviation: (deviation, bounds.deviation) }
}

/// The experts by falling load, equal ones by rising index.
fn heaviest_first(load: &[u64]) -> Vec<usize> {
    // As one number each, the load above the index, they sort without branches.
    let mut keys: Vec<u128> = load.iter().zip(0..).map(|(&load, e)| u128::from(!load) << 64 | e).collect();
    keys.sort_unstable();
    keys.into_iter().map(|key| key as u64 as usize).collect()
}

/// Longest processing time first: the heaviest expert to the least loaded cluster that may still take one.
fn longest_first(load: &[u64], order: &[usize], clusters: usize, room: Room) -> Vec<u16> {
    // Clusters that may still take one, the least loaded on top: its load, and its index in the lowest bits.
    let mut open: BinaryHeap<Reverse<u128>> = (0..clusters as u128).map(Reverse).collect();
    let mut sizes = vec![0; clusters];
    let mut missing = clusters * room.fewest;
    let mut cluster = vec![0; load.len()];
    for (placed, &e) in order.iter().enumerate() {
        // The last experts go where the fewest are not reached yet.
        let most = if load.len() - placed > missing { room.most } else { room.fewest };
        let (mut top, c) = loop {
            let top = open.peek_mut().expect("there is room for every expert");
            let c = top.0 as u16;
            if sizes[usize::from(c)] < most {
                break (top, c);
            }
            PeekMut::pop(top);
        };
        top.0 += u128::from(load[e]) << u16::BITS;
        let size = &mut sizes[usize::from(c)];
        missing -= usize::from(*size < room.fewest);
        *size += 1;
        cluster[e] = c;
    }
    cluster
}

/// Load of the heaviest cluster, and `clusters` times the sum of deviations from the mean.
#[must_use]
pub fn measure(load: &[u64], cluster: &[u16], clusters: usize) -> (u128, u128) {
    let mut sums = vec![0u128; clusters];
    for (&load, &c) in load.iter().zip(cluster) {
        sums[usize::from(c)] += u128::from(load);
    }
    let total: u128 = sums.iter().sum();
    let deviation = sums.iter().map(|&sum| (sum * clusters as u128).abs_diff(total)).sum();
    (sums.into_iter().max().unwrap_or(0), deviation)
}

/// What no packing can be below, by counting: no search.
struct Bounds {
    peak: u128,
    deviation: u128,
}

impl Bounds {
    fn new(load: &[u64], order: &[usize], clusters: usize, room: Room) -> Self {
        let experts = load.len();
        let sorted: Vec<u128> = order.iter().map(|&e| load[e].into()).collect();
        let sums = |loads: &mut dyn Iterator<Item = &u128>| -> Vec<u128> {
            let add = |sum: &mut u128, &load: &u128| {
                *sum += load;
                Some(*sum)
            };
            std::iter::once(0).chain(loads.scan(0, add)).collect()
        };
        let heaviest = sums(&mut sorted.iter());
        let lightest = sums(&mut sorted.iter().rev());
        let total = heaviest[experts];
        let d = clusters as u128;
        let rest = total % d;
        let mut peak = total.div_ceil(d);
        // Loads are whole: `rest` clusters one above the floor of the mean is the best there is.
        let mut deviation = 2 * rest * (d - rest);
        for j in 1..=experts.min(clusters) {
            // The j heaviest lie in some number a of clusters, which hold more experts where sizes ask for it.
            // What those clusters carry above the mean, the others lack.
            let mut least_peak = u128::MAX;
            let mut least_excess = u128::MAX;
            for a in j.div_ceil(room.most)..=j {
                let held = j.max(a * room.fewest).max(experts.saturating_sub((clusters - a) * room.most));
                let carried = heaviest[j] + lightest[(held - j).min(experts - j)];
                least_peak = least_peak.min(carried.div_ceil(a as u128));
                least_excess = least_excess.min((carried * d).saturating_sub(total * a as u128));
            }
            peak = peak.max(least_peak);
            deviation = deviation.max(2 * least_excess);
        }
        for together in 2..=experts.div_ceil(clusters) {
            // Of the (together - 1) * clusters + 1 heaviest, `together` share a cluster.
            let last = (together - 1) * clusters + 1;
            if last <= experts {
                let shared = heaviest[last] - heaviest[last - together];
                let beside = room.fewest.saturating_sub(together).min(experts - last);
                peak = peak.max(shared + lightest[beside]);
            }
        }
        Self { peak, deviation: deviation.max(2 * (peak * d - total)) }
    }
}

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
    few: [Vec<Few>; 3],
}

struct Search<'a> {
    load: Vec<i64>,
    clusters: Vec<Cluster>,
    room: Room,
    goal: Goal,
    /// A goal value at which to stop.
    enough: i128,
    original: &'a [u64],
}

impl<'a> Search<'a> {
    fn new(load: &'a [u64], start: &[u16], clusters: usize, room: Room, goal: Goal, bounds: &Bounds) -> Self {
        // Sums of huge counts are searched with their lowest bits cut off.
        let total: u128 = load.iter().map(|&load| u128::from(load)).sum();
        let shift = (128 - total.leading_zeros()).saturating_sub(62);
        let cut: Vec<i64> = load.iter().map(|&load| (load >> shift) as i64).collect();
        let bound = match goal {
            Goal::Peak => bounds.peak,
            Goal::Deviation => bounds.deviation,
        };
        let slack = match goal {
            Goal::Peak => total as i128 / clusters as i128 / CLOSE,
            Goal::Deviation => total as i128 / CLOSE,
        };
        let enough = ((bound as i128) >> shift) + (slack >> shift);
        let mut members = vec![Cluster::default(); clusters];
        for (e, &c) in start.iter().enumerate() {
            members[usize::from(c)].experts.push(e as u16);
        }
        let mut search = Self { load: cut, clusters: members, room, goal, enough, original: load };
        (0..clusters).for_each(|c| search.refresh(c));
        search
    }

    fn run(mut self) -> Vec<u16> {
        self.descend();
        let mut best = self.clusters.clone();
        let mut value = self.value();
        let mut random = Random::new(0, self.original.len() as u64);
        for _ in 0..KICKS {
            if value.0 <= self.enough || self.clusters.len() < 2 {
                break;
            }
            self.kick(&mut random);
            self.descend();
            let new = self.value();
            if new < value {
                value = new;
                best.clone_from(&self.clusters);
            } else {
                self.clusters.clone_from(&best);
            }
        }
        let mut cluster = vec![0; self.original.len()];
        for (c, of) in best.iter().enumerate() {
            of.experts.iter().for_each(|&e| cluster[usize::from(e)] = c as u16);
        }
        cluster
    }

    /// Recomputes what depends on the experts of a cluster.
    fn refresh(&mut self, c: usize) {
        let cluster = &mut self.clusters[c];
        let load = &self.load;
        let of = |e: u16| load[usize::from(e)];
        cluster.load = cluster.experts.iter().map(|&e| of(e)).sum();
        let [none, one, two] = &mut cluster.few;
        *none = vec![Few { load: 0, experts: [0, 0] }];
        one.clear();
        two.clear();
        for (i, &e) in cluster.experts.iter().enumerate() {
            one.push(Few { load: of(e), experts: [e, 0] });
            if cluster.experts.len() <= PAIRED {
                two.extend(
                    cluster.experts[..i].iter().map(|&f| Few { load: of(e) + of(f), experts: [e, f] }),
                );
            }
        }
        one.sort_unstable_by_key(|few| (few.load, few.experts));
        two.sort_unstable_by_key(|few| (few.load, few.experts));
    }

    fn value(&self) -> (i128, i128) {
        let d = self.clusters.len() as i128;
        let total: i128 = self.clusters.iter().map(|cluster| i128::from(cluster.load)).sum();
        let loads = || self.clusters.iter().map(|cluster| i128::from(cluster.load));
        let peak = loads().max().unwrap_or(0);
        let deviation = loads().map(|load| (load * d - total).abs()).sum();
        match self.goal {
            Goal::Peak => (peak, deviation),
            Goal::Deviation => (deviation, peak),
        }
    }

    /// Exchanges between all pairs of clusters until no exchange brings two loads closer.
    fn descend(&mut self) {
        let d = self.clusters.len();
        let mut changed = true;
        while changed && self.value().0 > self.enough {
            changed = false;
            for a in 0..d {
                for b in a + 1..d {
                    changed |= self.level(a, b);
                }
            }
        }
    }

    /// The exchange that brings the loads of two clusters closest; false if there is none that brings them closer.
    fn level(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = if self.clusters[a].load >= self.clusters[b].load { (a, b) } else { (b, a) };
        let (from, to) = (&self.clusters[a], &self.clusters[b]);
        let apart = from.load - to.load;
        let mut best = (apart, None);
        for i in 0..3 {
            for j in 0..3 {
                let sizes = [from.experts.len() + j, to.experts.len() + i];
                let allowed = |size: usize, given: usize| {
                    size >= given && (self.room.fewest..=self.room.most).contains(&(size - given))
                };
                if i + j > 0 && (i == j || (allowed(sizes[0], i) && allowed(sizes[1], j))) {
                    nearest(&from.few[i], &to.few[j], apart, (i, j), &mut best);
                }
            }
        }
        let (_, Some(((i, give), (j, take)))) = best else { return false };
        let (give, take) = (&give.experts[..i], &take.experts[..j]);
        self.clusters[a].experts.retain(|e| !give.contains(e));
        self.clusters[a].experts.extend_from_slice(take);
        self.clusters[b].experts.retain(|e| !take.contains(e));
        self.clusters[b].experts.extend_from_slice(give);
        self.refresh(a);
        self.refresh(b);
        true
    }

    /// Swaps a few experts at random, so that the next descent ends elsewhere.
    fn kick(&mut self, random: &mut Random) {
        for _ in 0..3 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every packing within the room, by trying all of them: least peak and least deviation.
    fn brute(load: &[u64], clusters: usize, room: Room) -> (u128, u128) {
        let mut best = (u128::MAX, u128::MAX);
        for code in 0..clusters.pow(load.len() as u32) {
            let cluster: Vec<u16> =
                (0..load.len()).map(|e| (code / clusters.pow(e as u32) % clusters) as u16).collect();
            if fits(&cluster, clusters, room) {
                let (peak, deviation) = measure(load, &cluster, clusters);
                best = (best.0.min(peak), best.1.min(deviation));
            }
        }
        best
    }

    fn fits(cluster: &[u16], clusters: usize, room: Room) -> bool {
        (0..clusters).all(|c| {
            let size = cluster.iter().filter(|&&of| usize::from(of) == c).count();
            (room.fewest..=room.most).contains(&size)
        })
    }

    proptest! {
        /// Bounds hold, packings fit, and the search ends near the optimum of either goal.
        #[test]
        fn lies_between_bound_and_optimum(
            load in prop::collection::vec(prop_oneof![0u64..20, 0u64..200, Just(1000)], 1..9),
            clusters in 1usize..4, equal: bool, extra in 0usize..3,
        ) {
            let experts = load.len();
            let room = if equal { Room::equal(experts, clusters) } else {
                Room::free(experts, clusters, experts.div_ceil(clusters) + extra)
            };
            let (peak, deviation) = brute(&load, clusters, room);
            for (goal, optimum) in [(Goal::Peak, peak), (Goal::Deviation, deviation)] {
                let packing = &pack(&load, experts, clusters, room, goal, true).expect("fits")[0];
                prop_assert!(fits(&packing.cluster, clusters, room));
                prop_assert_eq!(measure(&load, &packing.cluster, clusters), (packing.peak.0, packing.deviation.0));
                prop_assert!(packing.peak.1 <= peak && packing.deviation.1 <= deviation);
                let found = if goal == Goal::Peak { packing.peak.0 } else { packing.deviation.0 };
                let total: u128 = load.iter().map(|&l| u128::from(l)).sum();
                prop_assert!(found <= optimum + total / 1000, "{} {}", found, optimum);
            }
        }
    }

    #[test]
    fn packs_the_longest_first() {
        let packed =
            |load: &[u64], clusters, room| longest_first(load, &heaviest_first(load), clusters, room);
        assert_eq!(packed(&[1, 5, 3, 3], 2, Room { fewest: 0, most: 2 }), [0, 0, 1, 1]);
        // Nothing to balance: still no cluster is empty.
        assert_eq!(packed(&[0; 4], 3, Room::free(4, 3, 4)), [0, 0, 1, 2]);
    }

    #[test]
    fn sums_of_huge_counts_do_not_overflow() {
        let load = [u64::MAX; 6];
        let packing = &pack(&load, 6, 2, Room::equal(6, 2), Goal::Deviation, true).expect("fits")[0];
        assert_eq!(packing.peak, (3 * u128::from(u64::MAX), 3 * u128::from(u64::MAX)));
        assert_eq!(packing.deviation, (0, 0));
    }

    /// Skewed loads of the sizes in use come within 0.1 % of the bound, in every layer.
    #[test]
    fn evens_out_models_of_today() {
        for (layers, experts, clusters) in [(94, 128, 8), (58, 256, 32), (26, 64, 8)] {
            let mut random = Random::new(1, experts as u64);
            let load: Vec<u64> = (0..layers * experts)
                .map(|_| {
                    let x = random.below(1 << 20) as f64 / f64::from(1 << 20);
                    (1000.0 * (2.5 * x * x).exp()) as u64
                })
                .collect();
            let packed =
                pack(&load, experts, clusters, Room::equal(experts, clusters), Goal::Deviation, true);
            let packed = packed.expect("fits");
            let ratio = |p: &Packing| p.peak.0 as f64 / p.peak.1 as f64;
            let worst = packed.iter().map(ratio).fold(0.0, f64::max);
            assert!(worst < 1.001, "{layers} x {experts} on {clusters}: {worst}");
        }
    }
}
