//! Packing of the experts of one layer into clusters of balanced load: longest processing time first, then exchanges.
//!
//! Two goals share one search. An exchange of a few experts of two clusters that brings their loads closer lowers the sum of
//! squares, and never raises the largest load or the sum of deviations from the mean. So the search descends on pairs of
//! clusters, and compares only complete packings by the goal. All numbers are integers, ties go to the lowest index, and the
//! random kicks have a fixed stream: the same loads always give the same packing.

mod bounds;
mod exact;
mod exchange;

use rayon::prelude::*;

use crate::arrays::bits_beyond;
use crate::error::{Error, Result};
use crate::tournament::Tournament;
use bounds::{Bounds, sort_falling};
use exchange::Exchanges;

/// Limits on the number of experts in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterSizes {
    /// Smallest number.
    pub smallest: usize,
    /// Largest number.
    pub largest: usize,
}

/// The goal of a packing; between equals the other goal decides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// The load of the heaviest cluster.
    Peak,
    /// The sum over clusters of |load - mean|, until it is small enough.
    Deviation {
        /// Deviation that is small enough, as a share of the mean load.
        tolerance: f64,
    },
}

/// The search ends when peak and deviation are above their bounds by less than one part in so many of the mean load.
const CLOSE: u128 = 4096;

impl Goal {
    /// Returns how far peak and deviation (times `clusters`) may be above their bounds when the search ends.
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

/// The goal and the end of a search that starts from longest processing time first.
#[derive(Clone, Copy)]
pub struct Improve<'a> {
    /// The goal.
    pub goal: Goal,
    /// Returns whether the search is to end; it is called often.
    pub is_over: &'a (dyn Fn() -> bool + Sync),
}

/// A packed layer.
#[derive(Debug, Clone)]
pub struct Packing {
    /// The cluster of every expert.
    pub cluster: Vec<u16>,
    /// Load of the heaviest cluster, and a lower bound for any packing.
    pub peak: (u128, u128),
    /// `clusters` times the sum of deviations from the mean, and a lower bound for any packing.
    pub deviation: (u128, u128),
}

/// Packs every layer of `load` `[layers, experts]` by longest processing time first, and improves the packing if asked to.
pub fn pack(
    load: &[u64],
    experts: usize,
    clusters: usize,
    sizes: ClusterSizes,
    improve: Option<Improve<'_>>,
) -> Result<Vec<Packing>> {
    let sizes = check_sizes(experts, clusters, sizes)?;
    Ok(load.par_chunks(experts).map(|load| pack_layer(load, clusters, sizes, improve)).collect())
}

/// Checks that clusters hold all experts; returns the sizes, limited to the number of experts.
fn check_sizes(experts: usize, clusters: usize, sizes: ClusterSizes) -> Result<ClusterSizes> {
    if experts == 0 || experts > 1 << u16::BITS {
        return Err(Error::shape("load", "from 1 to 65536 experts per layer", &experts));
    }
    if clusters == 0 || clusters > usize::from(u16::MAX) {
        return Err(Error::shape("devices", "from 1 to 65535 devices", &clusters));
    }
    if sizes.largest.saturating_mul(clusters) < experts {
        let least = experts.div_ceil(clusters);
        let rule = format!("at least {least} slots for {experts} experts on {clusters} devices");
        return Err(Error::shape("slots", rule, &sizes.largest));
    }
    Ok(ClusterSizes { largest: sizes.largest.min(experts), ..sizes })
}

/// Packs one layer.
fn pack_layer(load: &[u64], clusters: usize, sizes: ClusterSizes, improve: Option<Improve<'_>>) -> Packing {
    let mut cluster = longest_first(load, clusters, sizes);
    let bounds = Bounds::new(load, clusters, sizes);
    if let Some(improve) = improve {
        cluster = Exchanges::new(load, &cluster, clusters, sizes, improve, &bounds).run();
    }
    let (peak, deviation) = peak_and_deviation(load, &cluster, clusters);
    Packing { cluster, peak: (peak, bounds.peak), deviation: (deviation, bounds.deviation) }
}

/// Returns the smallest load of the heaviest cluster that was found for a layer, and a proven lower bound on it.
///
/// They are equal if the bound is reached or if there are few packings. `peak` is a load that the caller has reached.
///
/// # Errors
/// If `slots` per cluster do not hold all experts.
pub fn smallest_peak(load: &[u64], clusters: usize, slots: usize, peak: u128) -> Result<(u128, u128)> {
    let sizes = ClusterSizes { smallest: 0, largest: slots.min(load.len()) };
    let reached = pack(load, load.len(), clusters, sizes, None)?[0].peak;
    let peak = peak.min(reached.0);
    Ok(exact::tighten(&sort_falling(load), clusters, sizes, reached.1, peak))
}

/// Packs by longest processing time first: the heaviest expert goes to the least loaded cluster that may still take one.
///
/// Experts of equal load go in rising order.
fn longest_first(load: &[u64], clusters: usize, sizes: ClusterSizes) -> Vec<u16> {
    // A load and the index of an expert or a cluster share a word, which sorts and compares fast. Counts so large that their
    // sums do not fit lose their lowest bits.
    let total: u128 = load.iter().map(|&load| u128::from(load)).sum();
    let shift = bits_beyond(total, u64::BITS - u16::BITS);
    let mut order: Vec<u64> =
        load.iter().zip(0..).map(|(&load, e)| !(load >> shift) << u16::BITS | e).collect();
    order.sort_unstable();
    let mut open = Tournament::new((0..clusters).map(|c| c as u64), u64::MAX);
    let mut used = vec![0; clusters];
    let mut missing = clusters * sizes.smallest;
    let mut cluster = vec![0; load.len()];
    for (placed, e) in order.iter().map(|&key| usize::from(key as u16)).enumerate() {
        // The last experts go to clusters that do not have their smallest number yet.
        let limit = if order.len() - placed > missing { sizes.largest } else { sizes.smallest };
        let mut c = open.get() as u16;
        while used[usize::from(c)] >= limit {
            open.set(usize::from(c), u64::MAX);
            c = open.get() as u16;
        }
        open.set(usize::from(c), open.get() + (load[e] >> shift << u16::BITS));
        let size = &mut used[usize::from(c)];
        missing -= usize::from(*size < sizes.smallest);
        *size += 1;
        cluster[e] = c;
    }
    cluster
}

/// Computes the load of the heaviest cluster, and `clusters` times the sum of deviations from the mean.
#[must_use]
pub fn peak_and_deviation(load: &[u64], cluster: &[u16], clusters: usize) -> (u128, u128) {
    let mut sums = vec![0u128; clusters];
    for (&load, &c) in load.iter().zip(cluster) {
        sums[usize::from(c)] += u128::from(load);
    }
    peak_and_deviation_of(sums.iter().copied())
}

/// Computes the largest of the loads of clusters, and their number times the sum of deviations from the mean.
fn peak_and_deviation_of(loads: impl ExactSizeIterator<Item = u128> + Clone) -> (u128, u128) {
    let (clusters, total) = (loads.len() as u128, loads.clone().sum::<u128>());
    let deviation = loads.clone().map(|load| (load * clusters).abs_diff(total)).sum();
    (loads.max().unwrap_or(0), deviation)
}
