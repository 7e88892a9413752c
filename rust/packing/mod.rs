//! Packing the experts of one layer into clusters of even load: longest processing time first, then exchanges.
//!
//! Two goals share one search. Replacing a few experts of one cluster by a few of another so that the two loads come
//! closer lowers the sum of squares, and never raises the largest load or the sum of deviations from the mean; so the
//! search descends on pairs of clusters, and only judges whole packings by the goal. Everything is an integer, ties
//! go to the lowest index, and the random kicks have a fixed stream: the same loads always give the same packing.

mod bounds;
mod exact;
mod exchange;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tournament::Tournament;
use bounds::{Bounds, falling};
use exchange::Exchanges;

/// How many experts a cluster may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// At least.
    pub smallest: usize,
    /// At most.
    pub largest: usize,
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
    let sizes = checked(experts, clusters, sizes)?;
    Ok(load.par_chunks(experts).map(|load| pack_layer(load, clusters, sizes, improve)).collect())
}

/// The sizes, at most as many as there are experts.
fn checked(experts: usize, clusters: usize, sizes: Sizes) -> Result<Sizes> {
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
    Ok(Sizes { largest: sizes.largest.min(experts), ..sizes })
}

fn pack_layer(load: &[u64], clusters: usize, sizes: Sizes, improve: Option<Improve<'_>>) -> Packing {
    let mut cluster = longest_first(load, clusters, sizes);
    let bounds = Bounds::new(load, clusters, sizes);
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
    let sizes = Sizes { smallest: 0, largest: slots.min(load.len()) };
    let reached = pack(load, load.len(), clusters, sizes, None)?[0].peak;
    let peak = peak.min(reached.0);
    Ok(exact::tighten(&falling(load), clusters, sizes, reached.1, peak))
}

/// Longest processing time first: the heaviest expert to the least loaded cluster that may still take one; equal experts
/// by rising index.
fn longest_first(load: &[u64], clusters: usize, sizes: Sizes) -> Vec<u16> {
    // A load and the index of an expert or a cluster are one word, which sorts and compares fast: sums of huge counts
    // lose their lowest bits.
    let total: u128 = load.iter().map(|&load| u128::from(load)).sum();
    let shift = (u128::BITS - total.leading_zeros()).saturating_sub(u64::BITS - u16::BITS);
    let mut order: Vec<u64> =
        load.iter().zip(0..).map(|(&load, e)| !(load >> shift) << u16::BITS | e).collect();
    order.sort_unstable();
    let mut open = Tournament::new((0..clusters).map(|c| c as u64), u64::MAX);
    let mut used = vec![0; clusters];
    let mut missing = clusters * sizes.smallest;
    let mut cluster = vec![0; load.len()];
    for (placed, e) in order.iter().map(|&key| usize::from(key as u16)).enumerate() {
        // The last experts go where the fewest are not reached yet.
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
