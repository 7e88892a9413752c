//! What no packing can be below, by counting: no search.

use super::Sizes;

/// Lower bounds of one layer.
pub(super) struct Bounds {
    /// Of the heaviest cluster's load.
    pub(super) peak: u128,
    /// Of `clusters` times the sum of deviations from the mean.
    pub(super) deviation: u128,
}

/// Loads from the heaviest on.
pub(super) fn falling(load: &[u64]) -> Vec<u128> {
    let mut sorted: Vec<u128> = load.iter().map(|&load| load.into()).collect();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    sorted
}

impl Bounds {
    pub(super) fn new(load: &[u64], clusters: usize, sizes: Sizes) -> Self {
        let experts = load.len();
        let sorted = falling(load);
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
            // Of the (together - 1) * clusters + 1 heaviest, `together` share a cluster.
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
