//! Rows of the co-location programme that values of its columns break.
//!
//! The columns say which experts share a device (or a node): `s_l(e, e')` in one layer, `z_l(e, f)` in two neighbouring
//! ones. Sharing is an equivalence whose classes hold C experts of every layer, so for three items `i, j, k`, and for
//! any choice of one of three terms for each k of a layer:
//!
//! ```text
//! triangle:  x(i, j) + x(i, k) - x(j, k) <= 1
//! gathering: (C - items among i, j in the layer) x(i, j) <= sum over the other k of the layer of x(i, j) | x(i, k) | x(j, k)
//! ```
//!
//! since all three are 1 for the rest of a class that holds i and j. Choosing the smallest is the strongest: on routing
//! of the paper's size gatherings close two thirds of the gap that all triangles leave.

use rayon::prelude::*;

/// How columns are numbered: s `[tiers, L, pairs of P]`, then z `[tiers, boundaries, P, P]`.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Experts of a layer in one class, C, per tier.
    pub sizes: Vec<usize>,
    /// Layers, L.
    pub layers: usize,
    /// Experts of a layer, P, with those that stand for empty slots.
    pub entries: usize,
    /// Pairs of neighbouring layers, L - 1 or none.
    pub boundaries: usize,
}

/// `x(i, j) + x(i, k) - x(j, k) <= 1` as the columns of the three.
pub type Triangle = [usize; 3];

/// A row `sum <= 0` as columns with their factors.
pub type Gathering = Vec<(usize, f64)>;

/// A broken row, and by how much.
type Broken<T> = (f64, T);

impl Layout {
    /// Columns in all.
    #[must_use]
    pub fn columns(&self) -> usize {
        let tables = self.boundaries * self.entries * self.entries;
        self.sizes.len() * (self.layers * self.pairs() + tables)
    }

    fn pairs(&self) -> usize {
        self.entries * self.entries.saturating_sub(1) / 2
    }

    /// The triangles that are broken by more than `slack`, the `most` worst of them, worst first; ties in a fixed order.
    #[must_use]
    pub fn triangles(&self, values: &[f64], slack: f64, most: usize) -> Vec<Triangle> {
        worst(self.views(), most, |view, found| view.triangles(values, slack, found))
    }

    /// The gatherings that are broken by more than `slack`, likewise; only the strongest choices are looked at.
    #[must_use]
    pub fn gatherings(&self, values: &[f64], slack: f64, most: usize) -> Vec<Gathering> {
        worst(self.views(), most, |view, found| view.gatherings(values, slack, found))
    }

    /// Every layer of every tier, with the next layer where there is one that matters.
    fn views(&self) -> Vec<View<'_>> {
        let tiers = 0..self.sizes.len();
        tiers.flat_map(|tier| (0..self.layers).map(move |layer| View { layout: self, tier, layer })).collect()
    }
}

/// Looks through the views in parallel; keeps the worst in an order that does not depend on threads.
fn worst<T: Send>(
    views: Vec<View<'_>>,
    most: usize,
    look: impl Fn(&View<'_>, &mut Vec<Broken<T>>) + Sync,
) -> Vec<T> {
    let found = views.into_par_iter().map(|view| {
        let mut found = Vec::new();
        look(&view, &mut found);
        sort(&mut found, most);
        found
    });
    let mut all: Vec<Broken<T>> = found.collect::<Vec<_>>().into_iter().flatten().collect();
    sort(&mut all, most);
    all.into_iter().map(|(_, row)| row).collect()
}

fn sort<T>(found: &mut Vec<Broken<T>>, most: usize) {
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.truncate(most);
}

/// A layer of a tier: items 0..P are its experts, P..2P those of the next layer.
#[derive(Debug, Clone, Copy)]
struct View<'a> {
    layout: &'a Layout,
    tier: usize,
    layer: usize,
}

impl View<'_> {
    fn items(&self) -> usize {
        if self.layer < self.layout.boundaries { 2 * self.layout.entries } else { self.layout.entries }
    }

    /// Column of two different items.
    fn column(&self, i: usize, j: usize) -> usize {
        let Layout { layers, entries: p, boundaries, ref sizes } = *self.layout;
        let (i, j) = (i.min(j), i.max(j));
        if i < p && j >= p {
            let tables = sizes.len() * layers * self.layout.pairs();
            return tables + ((self.tier * boundaries + self.layer) * p + i) * p + j - p;
        }
        let (layer, e, f) = (self.layer + i / p, i % p, j % p);
        (self.tier * layers + layer) * self.layout.pairs() + e * (2 * p - e - 1) / 2 + f - e - 1
    }

    /// Values of all pairs of items, `[items, items]`, symmetric.
    fn table(&self, values: &[f64]) -> Vec<f64> {
        let n = self.items();
        let mut table = vec![1.0; n * n];
        for i in 0..n {
            for j in i + 1..n {
                let x = values[self.column(i, j)];
                (table[i * n + j], table[j * n + i]) = (x, x);
            }
        }
        table
    }

    fn triangles(&self, values: &[f64], slack: f64, found: &mut Vec<Broken<Triangle>>) {
        let (n, p) = (self.items(), self.layout.entries);
        let x = self.table(values);
        // Triangles of the next layer alone are its own.
        for i in 0..p {
            for j in i + 1..n {
                for k in j + 1..n {
                    let sides = [x[i * n + j], x[i * n + k], x[j * n + k]];
                    let sum = sides[0] + sides[1] + sides[2] - 1.0;
                    for (at, side) in sides.into_iter().enumerate() {
                        if sum - 2.0 * side > slack {
                            let mut row = [self.column(i, j), self.column(i, k), self.column(j, k)];
                            row.swap(at, 2);
                            found.push((sum - 2.0 * side, row));
                        }
                    }
                }
            }
        }
    }

    fn gatherings(&self, values: &[f64], slack: f64, found: &mut Vec<Broken<Gathering>>) {
        let (n, p) = (self.items(), self.layout.entries);
        let x = self.table(values);
        for (i, j) in (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))) {
            for side in 0..n / p {
                let within = |item: usize| item / p == side;
                let inside = usize::from(within(i)) + usize::from(within(j));
                // What lies in the next layer alone is its own.
                if i >= p && side == 1 || self.layout.sizes[self.tier] <= inside {
                    continue;
                }
                let left = (self.layout.sizes[self.tier] - inside) as f64;
                let own = x[i * n + j];
                let others = || (side * p..(side + 1) * p).filter(|&k| k != i && k != j);
                let least = |k: usize| own.min(x[i * n + k]).min(x[j * n + k]);
                let violation = left * own - others().map(least).sum::<f64>();
                if violation > slack {
                    found.push((violation, self.gathering(&x, i, j, left, others())));
                }
            }
        }
    }

    fn gathering(
        &self,
        x: &[f64],
        i: usize,
        j: usize,
        left: f64,
        others: impl Iterator<Item = usize>,
    ) -> Gathering {
        let n = self.items();
        let mut row = vec![(self.column(i, j), left)];
        for k in others {
            let (own, a, b) = (x[i * n + j], x[i * n + k], x[j * n + k]);
            if own <= a && own <= b {
                row[0].1 -= 1.0;
            } else {
                row.push((self.column(if a <= b { i } else { j }, k), -1.0));
            }
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;

    fn layout(tiers: usize, layers: usize, follow: bool) -> Layout {
        let sizes = if tiers == 2 { vec![4, 2] } else { vec![2] };
        Layout { sizes, layers, entries: 8, boundaries: if follow { layers - 1 } else { 0 } }
    }

    /// Values of a random placement: devices of two slots, nodes of two devices.
    fn placed(layout: &Layout, seed: u64) -> Vec<f64> {
        let mut values = vec![f64::NAN; layout.columns()];
        let mut random = Random::new(seed, 0);
        let of: Vec<Vec<usize>> = (0..layout.layers)
            .map(|_| {
                let mut slots: Vec<usize> = (0..8).collect();
                random.shuffle(&mut slots);
                slots
            })
            .collect();
        for view in layout.views() {
            let class = |item: usize| of[view.layer + item / 8][item % 8] / layout.sizes[view.tier];
            for i in 0..view.items() {
                for j in i + 1..view.items() {
                    values[view.column(i, j)] = f64::from(u8::from(class(i) == class(j)));
                }
            }
        }
        values
    }

    proptest! {
        /// Columns are used once each, and no placement breaks a row that was found at any values.
        #[test]
        fn rows_are_valid(seed: u64, tiers in 1usize..3, layers in 1usize..4, follow: bool) {
            let layout = layout(tiers, layers, follow);
            let placement = placed(&layout, seed);
            prop_assert!(placement.iter().all(|x| !x.is_nan()));
            prop_assert!(layout.triangles(&placement, 1e-9, 1).is_empty());
            prop_assert!(layout.gatherings(&placement, 1e-9, 1).is_empty());
            let mut random = Random::new(seed, 1);
            // Dyadic, so that every sum is exact in any order, and no row lies at the slack.
            let values: Vec<f64> = placement.iter().map(|_| random.below(1025) as f64 / 1024.0).collect();
            let slack = 1.0 / 2048.0;
            for [a, b, c] in layout.triangles(&values, slack, usize::MAX) {
                prop_assert!(values[a] + values[b] - values[c] > 1.0 + slack);
                prop_assert!(placement[a] + placement[b] - placement[c] <= 1.0);
            }
            for row in layout.gatherings(&values, slack, usize::MAX) {
                let sum = |x: &[f64]| row.iter().map(|&(column, factor)| factor * x[column]).sum::<f64>();
                prop_assert!(sum(&values) > slack);
                prop_assert!(sum(&placement) <= 0.0);
            }
        }
    }

    #[test]
    fn the_worst_come_first_and_no_more_than_asked() {
        let layout = layout(1, 2, true);
        let mut random = Random::new(3, 0);
        let values: Vec<f64> = (0..layout.columns()).map(|_| random.below(8) as f64 / 7.0).collect();
        let all = layout.triangles(&values, 1e-3, usize::MAX);
        let by = |[a, b, c]: &Triangle| values[*a] + values[*b] - values[*c];
        assert!(all.windows(2).all(|two| by(&two[0]) >= by(&two[1]) - 1e-12));
        assert_eq!(layout.triangles(&values, 1e-3, 5), all[..5]);
    }
}
