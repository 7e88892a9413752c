//! The contents of one layer that a device can hold, and the best of them.
//!
//! The contents of a device are C experts whose loads keep the cap, and which leave the other devices no more than
//! theirs.

/// A set of experts of a layer.
pub(super) type Set = u128;

/// More members than any content that can be searched: C of 2C experts are too many long before.
pub(super) const DEEPEST: usize = 32;

/// Sets of C experts up to which a search costs no more than a few iterations of everything else.
const MOST: f64 = 1.5e7;

/// Gains below this, in units of the weights, are rounding.
const TINY: f64 = 1e-9;

/// Returns the members of a set.
pub(super) fn members(set: Set) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(set), |rest| Some(rest & rest.wrapping_sub(1)))
        .take_while(|&rest| rest != 0)
        .map(|rest| rest.trailing_zeros() as usize)
}

/// Returns whether contents are so few that all of them can be searched.
pub(super) fn are_few(experts: usize, slots: usize) -> bool {
    let all: f64 = (0..slots).map(|i| (experts - i) as f64 / (i + 1) as f64).product();
    // With two experts the bound of the pair is already exact.
    slots > 2 && slots < DEEPEST && experts <= Set::BITS as usize && all <= MOST
}

/// The feasible contents of one layer.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    pub(super) experts: usize,
    pub(super) slots: usize,
    pub(super) load: Vec<u128>,
    pub(super) lower: u128,
    pub(super) upper: u128,
}

impl Contents {
    /// Improves a content by exchanging one member at a time, best first; returns the gain too.
    pub(super) fn climb(&self, g: &[f64], mut set: Set) -> (f64, Set) {
        let e = self.experts;
        let mut sums = vec![0.0; e];
        let mut load = 0;
        for i in members(set) {
            load += self.load[i];
            sums.iter_mut().zip(&g[i * e..][..e]).for_each(|(sum, g)| *sum += g);
        }
        let mut gained = 0.0;
        loop {
            let (mut best, mut swap) = (TINY, None);
            for i in members(set) {
                let row = &g[i * e..][..e];
                for j in 0..e {
                    let gain = sums[j] - row[j] + g[j * e + j] - sums[i];
                    if gain > best
                        && set >> j & 1 == 0
                        && self.keeps_limits(load - self.load[i] + self.load[j])
                    {
                        (best, swap) = (gain, Some((i, j)));
                    }
                }
            }
            let Some((i, j)) = swap else { return (gained, set) };
            gained += best;
            load = load - self.load[i] + self.load[j];
            set = (set & !(1 << i)) | 1 << j;
            for (k, sum) in sums.iter_mut().enumerate() {
                *sum += g[j * e + k] - g[i * e + k];
            }
        }
    }

    /// Returns whether a device may have this load.
    pub(super) fn keeps_limits(&self, load: u128) -> bool {
        self.lower <= load && load <= self.upper
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(g: &[f64], set: Set) -> f64 {
        members(set).map(|i| members(set).filter(|&j| j <= i).map(|j| g[i * 10 + j]).sum::<f64>()).sum()
    }

    proptest! {
        /// Branch and bound finds the same contents as enumeration, and climbing keeps contents feasible.
        #[test]
        fn finds_the_best(
            half in prop::collection::vec(-3.0f64..3.0, 100),
            load in prop::collection::vec(0u128..50, 10),
            slots in 3usize..6,
            width in 0u128..60,
            floor in prop_oneof![Just(f64::NEG_INFINITY), -5.0f64..5.0],
        ) {
            let g: Vec<f64> = (0..100).map(|x| half[(x / 10).max(x % 10) * 10 + (x / 10).min(x % 10)]).collect();
            let middle = load.iter().sum::<u128>() * slots as u128 / 10;
            let (lower, upper) = (middle.saturating_sub(width), middle + width);
            let contents = Contents { experts: 10, slots, load, lower, upper };
            let fits = |set: Set| contents.keeps_limits(members(set).map(|i| contents.load[i]).sum());
            let sets = (0..1u128 << 10).filter(|&set| set.count_ones() as usize == slots && fits(set));
            let best = sets.map(|set| value(&g, set)).fold(f64::NEG_INFINITY, f64::max);
            let harvest = contents.search(&g, floor);
            prop_assert!(harvest.bound.max(floor) >= best);
            if best > floor + 1e-9 {
                prop_assert!((harvest.sets[0].0 - best).abs() < 1e-9 && harvest.bound - best < 1e-9);
                for &(claimed, set) in &harvest.sets {
                    let (gain, better) = contents.climb(&g, set);
                    prop_assert!((value(&g, set) - claimed).abs() < 1e-9 && fits(better));
                    prop_assert!((value(&g, better) - claimed - gain).abs() < 1e-9);
                }
            }
        }
    }
}
