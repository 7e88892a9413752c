//! The least peak by trying every packing, as far as a number of steps reaches: for layers of few experts.

use super::Sizes;

/// Experts put somewhere in one search: a few milliseconds.
const STEPS: u64 = 500_000;

/// Puts the experts one by one, heaviest first, wherever they leave the peak below the best known.
struct Tree<'a> {
    load: &'a [u128],
    sizes: Sizes,
    sums: Vec<u128>,
    used: Vec<usize>,
    /// Peak to stay below, and what none can be below.
    best: u128,
    bound: u128,
    steps: u64,
}

/// The least peak known and a proven bound of it, from what is known before; equal if all packings were tried.
///
/// `load` from heavy to light; clusters may be empty.
pub(super) fn tighten(load: &[u128], clusters: usize, sizes: Sizes, bound: u128, best: u128) -> (u128, u128) {
    let (sums, used) = (vec![0; clusters], vec![0; clusters]);
    let mut tree = Tree { load, sizes, sums, used, best, bound, steps: 0 };
    tree.put(0);
    (tree.best, if tree.steps < STEPS { tree.best } else { bound })
}

impl Tree<'_> {
    fn put(&mut self, e: usize) {
        if e == self.load.len() {
            self.best = self.sums.iter().copied().max().unwrap_or(0);
            return;
        }
        for c in 0..self.sums.len() {
            // Clusters that are alike are one choice.
            let (sum, size) = (self.sums[c], self.used[c]);
            let new = sum + self.load[e];
            let again = (0..c).any(|b| self.sums[b] == sum && self.used[b] == size);
            if again || size == self.sizes.largest || new >= self.best {
                continue;
            }
            self.steps += 1;
            if self.best <= self.bound || self.steps >= STEPS {
                return;
            }
            (self.sums[c], self.used[c]) = (new, size + 1);
            self.put(e + 1);
            (self.sums[c], self.used[c]) = (sum, size);
        }
    }
}
