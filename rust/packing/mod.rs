//! Packing the experts of one layer into clusters of even load: longest processing time first, then exchanges.
//!
//! Two goals share one search. Replacing a few experts of one cluster by a few of another so that the two loads come
//! closer lowers the sum of squares, and never raises the largest load or the sum of deviations from the mean; so the
//! search descends on pairs of clusters, and only judges whole packings by the goal. Everything is an integer, ties
//! go to the lowest index, and the random kicks have a fixed stream: the same loads always give the same packing.

mod bounds;
mod exact;
mod exchange;

use std::cmp::Reverse;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tournament::Tournament;
use bounds::Bounds;
use exchange::Exchanges;

/// How many experts a cluster may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// At least.
    pub fewest: usize,
    /// At most.
    pub most: usize,
}

impl Sizes {
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// The load of the heaviest cluster.
    Peak,
    /// The sum over clusters of |load - mean|, to within `tolerance` of the mean.
    Deviation {
        /// As a share of the mean load.
        tolerance: f64,
    },
}

/// Packings this close to their bounds, as a share of the mean load, are not searched further.
const CLOSE: u128 = 4096;

impl Goal {
    /// How far peak and deviation (times `clusters`) may stay above their bounds.
    fn slack(self, total: u128, clusters: usize) -> (u128, u128) {
        let peak = total / clusters as u128 / CLOSE;
        match self {
            Self::Peak => (peak, u128::MAX >> 2),
            Self::Deviation { tolerance } => {
                (2 * peak, (total / CLOSE).max((total as f64 * tolerance) as u128))
            }
        }
    }
}

/// How far to go after longest processing time first.
#[derive(Clone, Copy)]
pub struct Improve<'a> {
    /// What to improve.
    pub goal: Goal,
    /// Asked often: whether to be content with what is there.
    pub is_over: &'a (dyn Fn() -> bool + Sync),
}

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

/// Packs every layer of `load`, `[layers, experts]`: longest processing time first, alone or with an effort to improve.
pub fn pack(
    load: &[u64],
    experts: usize,
    clusters: usize,
    sizes: Sizes,
    improve: Option<Improve<'_>>,
) -> Result<Vec<Packing>> {
    let sizes = checked(load, experts, clusters, sizes)?;
    Ok(load.par_chunks(experts).map(|load| pack_layer(load, clusters, sizes, improve)).collect())
}

/// The cluster of every expert `[layers, experts]`, longest processing time first: without bounds, which take longer, and
/// without threads, which a call of less than a millisecond does not repay.
pub fn pack_quickly(load: &[u64], experts: usize, clusters: usize, sizes: Sizes) -> Result<Vec<u16>> {
    let sizes = checked(load, experts, clusters, sizes)?;
    let pack = |load| longest_first(load, &heaviest_first(load), clusters, sizes);
    Ok(load.chunks_exact(experts).flat_map(pack).collect())
}

/// The sizes, at most as many as there are experts.
fn checked(load: &[u64], experts: usize, clusters: usize, sizes: Sizes) -> Result<Sizes> {
    let fault = |what, rule: &str, found: usize| {
        Err(Error::Shape { what, rule: rule.to_owned(), found: found.to_string() })
    };
    if experts == 0 || !load.len().is_multiple_of(experts) {
        return fault("load", "at least one expert per layer", experts);
    }
    if clusters == 0 || clusters > usize::from(u16::MAX) {
        return fault("devices", "from 1 to 65535 devices", clusters);
    }
    if sizes.most.saturating_mul(clusters) < experts {
        let rule = format!(
            "at least {} slots for {experts} experts on {clusters} devices",
            experts.div_ceil(clusters)
        );
        return fault("slots", &rule, sizes.most);
    }
    Ok(Sizes { most: sizes.most.min(experts), ..sizes })
}

fn pack_layer(load: &[u64], clusters: usize, sizes: Sizes, improve: Option<Improve<'_>>) -> Packing {
    let order = heaviest_first(load);
    let mut cluster = longest_first(load, &order, clusters, sizes);
    let bounds = Bounds::new(load, &order, clusters, sizes);
    if let Some(effort) = improve {
        cluster = Exchanges::new(load, &cluster, clusters, sizes, effort, &bounds).run();
    }
    let (peak, deviation) = peak_and_deviation(load, &cluster, clusters);
    Packing { cluster, peak: (peak, bounds.peak), deviation: (deviation, bounds.deviation) }
}

/// The least load of the heaviest cluster that any packing of a layer has: what is known to be reached, and a proven
/// bound. Equal where the bound is met or the packings are few; `peak` is what the caller has reached.
///
/// # Errors
/// When `slots` per cluster do not hold all experts.
pub fn smallest_peak(load: &[u64], clusters: usize, slots: usize, peak: u128) -> Result<(u128, u128)> {
    let sizes = Sizes { fewest: 0, most: slots.min(load.len()) };
    let reached = pack(load, load.len(), clusters, sizes, None)?[0].peak;
    let peak = peak.min(reached.0);
    let sorted: Vec<u128> = heaviest_first(load).into_iter().map(|e| load[e].into()).collect();
    Ok(exact::tighten(&sorted, clusters, sizes, reached.1, peak))
}

/// The experts by falling load, equal ones by rising index.
fn heaviest_first(load: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..load.len()).collect();
    order.sort_by_key(|&e| Reverse(load[e]));
    order
}

/// Longest processing time first: the heaviest expert to the least loaded cluster that may still take one.
fn longest_first(load: &[u64], order: &[usize], clusters: usize, sizes: Sizes) -> Vec<u16> {
    // A cluster's key is its load, and its index in the lowest bits.
    let mut open = Tournament::new((0..clusters).map(|c| c as u128), u128::MAX);
    let mut used = vec![0; clusters];
    let mut missing = clusters * sizes.fewest;
    let mut cluster = vec![0; load.len()];
    for (placed, &e) in order.iter().enumerate() {
        // The last experts go where the fewest are not reached yet.
        let most = if order.len() - placed > missing { sizes.most } else { sizes.fewest };
        let mut c = open.get() as u16;
        while used[usize::from(c)] >= most {
            open.set(usize::from(c), u128::MAX);
            c = open.get() as u16;
        }
        open.set(usize::from(c), open.get() + (u128::from(load[e]) << u16::BITS));
        let size = &mut used[usize::from(c)];
        missing -= usize::from(*size < sizes.fewest);
        *size += 1;
        cluster[e] = c;
    }
    cluster
}

/// Load of the heaviest cluster, and `clusters` times the sum of deviations from the mean.
#[must_use]
pub fn peak_and_deviation(load: &[u64], cluster: &[u16], clusters: usize) -> (u128, u128) {
    let mut sums = vec![0u128; clusters];
    for (&load, &c) in load.iter().zip(cluster) {
        sums[usize::from(c)] += u128::from(load);
    }
    let total: u128 = sums.iter().sum();
    let deviation = sums.iter().map(|&sum| (sum * clusters as u128).abs_diff(total)).sum();
    (sums.into_iter().max().unwrap_or(0), deviation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;

    fn improved(load: &[u64], experts: usize, clusters: usize, sizes: Sizes, goal: Goal) -> Vec<Packing> {
        pack(load, experts, clusters, sizes, Some(Improve { goal, is_over: &|| false })).expect("fits")
    }

    /// Every packing within the sizes, by trying all of them: least peak and least deviation.
    fn brute(load: &[u64], clusters: usize, sizes: Sizes) -> (u128, u128) {
        let mut best = (u128::MAX, u128::MAX);
        for code in 0..clusters.pow(load.len() as u32) {
            let cluster: Vec<u16> =
                (0..load.len()).map(|e| (code / clusters.pow(e as u32) % clusters) as u16).collect();
            if fits(&cluster, clusters, sizes) {
                let (peak, deviation) = peak_and_deviation(load, &cluster, clusters);
                best = (best.0.min(peak), best.1.min(deviation));
            }
        }
        best
    }

    fn fits(cluster: &[u16], clusters: usize, sizes: Sizes) -> bool {
        (0..clusters).all(|c| {
            let size = cluster.iter().filter(|&&of| usize::from(of) == c).count();
            (sizes.fewest..=sizes.most).contains(&size)
        })
    }

    proptest! {
        /// Bounds hold, packings fit, and the search ends near the optimum of either goal.
        #[test]
        fn lies_between_bound_and_optimum(
            load in prop::collection::vec(prop_oneof![0u64..20, 0u64..200, Just(1000)], 1..9),
            clusters in 1usize..4, kind in 0usize..3, extra in 0usize..3,
        ) {
            let experts = load.len();
            let most = experts.div_ceil(clusters) + extra;
            let sizes = match kind {
                0 => Sizes::equal(experts, clusters),
                1 => Sizes::free(experts, clusters, most),
                _ => Sizes { fewest: 0, most: most.min(experts) },
            };
            let (peak, deviation) = brute(&load, clusters, sizes);
            for (goal, optimum) in [(Goal::Peak, peak), (Goal::Deviation { tolerance: 0.0 }, deviation)] {
                let packing = &improved(&load, experts, clusters, sizes, goal)[0];
                prop_assert!(fits(&packing.cluster, clusters, sizes));
                prop_assert_eq!(peak_and_deviation(&load, &packing.cluster, clusters), (packing.peak.0, packing.deviation.0));
                prop_assert!(packing.peak.1 <= peak && packing.deviation.1 <= deviation);
                let value = if goal == Goal::Peak { packing.peak.0 } else { packing.deviation.0 };
                let total: u128 = load.iter().map(|&l| u128::from(l)).sum();
                if goal == Goal::Peak && sizes.fewest == 0 {
                    prop_assert_eq!(smallest_peak(&load, clusters, sizes.most, value).expect("fits"), (peak, peak));
                }
                prop_assert!(value <= optimum + total / 1000, "{} {}", value, optimum);
            }
        }
    }

    #[test]
    fn packs_the_longest_first() {
        let packed =
            |load: &[u64], clusters, sizes| longest_first(load, &heaviest_first(load), clusters, sizes);
        assert_eq!(packed(&[1, 5, 3, 3], 2, Sizes { fewest: 0, most: 2 }), [0, 0, 1, 1]);
        // Nothing to balance: still no cluster is empty.
        assert_eq!(packed(&[0; 4], 3, Sizes::free(4, 3, 4)), [0, 0, 1, 2]);
    }

    #[test]
    fn sums_of_huge_counts_do_not_overflow() {
        let load = [u64::MAX; 6];
        let packing = &improved(&load, 6, 2, Sizes::equal(6, 2), Goal::Deviation { tolerance: 0.0 })[0];
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
            let goal = Goal::Deviation { tolerance: 0.025 };
            let packed = improved(&load, experts, clusters, Sizes::equal(experts, clusters), goal);
            let ratio = |p: &Packing| p.peak.0 as f64 / p.peak.1 as f64;
            let worst = packed.iter().map(ratio).fold(0.0, f64::max);
            assert!(worst < 1.001, "{layers} x {experts} on {clusters}: {worst}");
        }
    }
}
