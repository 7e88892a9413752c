//! Lower bounds on peak and deviation of any packing, by counting alone.

use super::ClusterSizes;
use crate::arrays::prefix_sums;

/// Lower bounds for one layer.
pub(super) struct Bounds {
    /// Bound on the heaviest cluster's load.
    pub(super) peak: u128,
    /// Bound on `clusters` times the sum of deviations from the mean.
    pub(super) deviation: u128,
}

/// Returns loads in falling order.
pub(super) fn sort_falling(load: &[u64]) -> Vec<u128> {
    let mut sorted: Vec<u128> = load.iter().map(|&load| load.into()).collect();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    sorted
}

impl Bounds {
    /// Computes the bounds from the loads of experts `[E]`.
    pub(super) fn new(load: &[u64], clusters: usize, sizes: ClusterSizes) -> Self {
        let experts = load.len();
        let sorted = sort_falling(load);
        // Loads of the so many heaviest, and of the so many lightest experts.
        let heaviest = prefix_sums(sorted.iter().copied());
        let lightest = prefix_sums(sorted.iter().rev().copied());
        let total = heaviest[experts];
        let d = clusters as u128;
        let rest = total % d;
        let mut peak = total.div_ceil(d);
        // Loads are integers: the least deviation has `rest` clusters one above the floor of the mean.
        let mut deviation = 2 * rest * (d - rest);
        for j in 1..=experts.min(clusters) {
            // The j heaviest experts lie in some number a of clusters, which hold further experts where sizes require it. The
            // load of these clusters above the mean is missing in the others.
            let mut least_peak = u128::MAX;
            let mut least_excess = u128::MAX;
            for a in j.div_ceil(sizes.largest)..=j {
                let count =
                    j.max(a * sizes.smallest).max(experts.saturating_sub((clusters - a) * sizes.largest));
                let carried = heaviest[j] + lightest[(count - j).min(experts - j)];
                least_peak = least_peak.min(carried.div_ceil(a as u128));
                least_excess = least_excess.min((carried * d).saturating_sub(total * a as u128));
            }
            peak = peak.max(least_peak);
            deviation = deviation.max(2 * least_excess);
        }
        for together in 2..=experts.div_ceil(clusters) {
            // At least `together` of the (together - 1) * clusters + 1 heaviest experts share a cluster.
            let last = (together - 1) * clusters + 1;
            if last <= experts {
                let shared = heaviest[last] - heaviest[last - together];
                let beside = sizes.smallest.saturating_sub(together).min(experts - last);
                peak = peak.max(shared + lightest[beside]);
            }
        }
        Self { peak, deviation: deviation.max(2 * (peak * d - total)) }
    }
}
