//! The least peak by enumeration of all packings, up to a number of steps; for layers of few experts.

use super::ClusterSizes;

/// Largest number of experts that a search puts into clusters: this takes a few milliseconds.
const STEPS: u64 = 500_000;

/// A depth-first search that puts experts into clusters, the heaviest first, and keeps the peak below the best one.
struct Tree<'a> {
    load: &'a [u128],
    sizes: ClusterSizes,
    /// Load and number of experts of every cluster.
    sums: Vec<u128>,
    used: Vec<usize>,
    /// Smallest peak so far, and a lower bound on it.
    best: u128,
    bound: u128,
    /// Experts put into clusters so far.
    steps: u64,
}

/// Returns the smallest peak that was found and a proven lower bound on it; they are equal if all packings were tried.
///
/// `load` falls; `best` and `bound` are a peak that is reached and a bound. Clusters may be empty.
pub(super) fn tighten(
    load: &[u128],
    clusters: usize,
    sizes: ClusterSizes,
    bound: u128,
    best: u128,
) -> (u128, u128) {
    let (sums, used) = (vec![0; clusters], vec![0; clusters]);
    let mut tree = Tree { load, sizes, sums, used, best, bound, steps: 0 };
    tree.put(0);
    (tree.best, if tree.steps < STEPS { tree.best } else { bound })
}

impl Tree<'_> {
    /// Tries all clusters for expert `e` and those after it.
    fn put(&mut self, e: usize) {
        if e == self.load.len() {
            self.best = self.sums.iter().copied().max().unwrap_or(0);
            return;
        }
        for c in 0..self.sums.len() {
            // Of clusters with equal load and size only the first is tried.
            let (sum, size) = (self.sums[c], self.used[c]);
            let new = sum + self.load[e];
            let is_repeated = (0..c).any(|b| self.sums[b] == sum && self.used[b] == size);
            if is_repeated || size == self.sizes.largest || new >= self.best {
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
