//! Stage 2 of the paper: which device gets which cluster, so that the busiest pair of devices is least busy.
//!
//! Clusters of every layer are given. A boundary is two neighbouring layers; its cost is a pair, compared in this
//! order: the largest `traffic(d, d') * cost(d, d')` over `d != d'`, and the sum of all of them. Costs of boundaries
//! add up, and a boundary depends on its two layers alone, so the problem is a chain of permutations:
//!
//! * all links alike: only who stays with whom matters, boundaries are independent bottleneck assignments: exact;
//! * few permutations, divided by the symmetries of the links: dynamic programming, exact;
//! * otherwise, or where totals of experts per device must be level: local search from a chain of assignments.

mod local;

use rayon::prelude::*;

use crate::assignment::assign_max;
use crate::control::Control;
use crate::error::{Error, Result};

/// Transitions of the dynamic programme between two layers, at most: about half a second on two cores. Four nodes of
/// two have 4 million, seven devices without any symmetry 25 million.
const TRANSITIONS: usize = 30_000_000;
/// Devices of the dynamic programme, at most: 8! = 40320.
const PERMUTED: usize = 8;

/// Traffic between clusters, and what moving it costs.
#[derive(Debug)]
pub struct Chain<'a> {
    /// Tokens from cluster to cluster of the next layer, `[layers - 1, D, D]`.
    pub traffic: &'a [u64],
    /// Cost of a token from device to device, `[D, D]`; zero on the diagonal.
    pub cost: &'a [u64],
    /// Experts of every cluster, `[layers, D]`; given where the devices' totals must be level.
    pub sizes: Option<&'a [u64]>,
    /// Devices of the clusters, `[layers, D]`, to start the local search from as well.
    pub start: Option<&'a [u16]>,
    /// Number of layers.
    pub layers: usize,
    /// Number of devices, and of clusters in a layer.
    pub devices: usize,
}

/// How a chain was solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Exact: all links alike.
    Uniform,
    /// Exact: dynamic programming over permutations.
    DynamicProgramming,
    /// A local optimum.
    LocalSearch,
}

/// Clusters on devices.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The device of every cluster, `[layers, D]`.
    pub device: Vec<u16>,
    /// How it was found.
    pub way: Way,
    /// Proven: no placement has a smaller sum of the boundaries' largest times.
    pub bound: u128,
}

/// A boundary's largest time above its total, so that whole chains compare and add up as single numbers.
type Cost = u128;

fn cost_of(largest: u64, total: u64) -> Cost {
    u128::from(largest) << 64 | u128::from(total)
}

impl Chain<'_> {
    /// Places the clusters.
    ///
    /// # Panics
    /// Never: there is always a start.
    pub fn place(&self, control: &Control) -> Result<Placed> {
        self.check()?;
        // Counts so huge that sums could overflow lose their lowest bits.
        let dearest = u128::from(self.cost.iter().copied().max().unwrap_or(0));
        let most = self.traffic.iter().map(|&t| u128::from(t)).sum::<u128>() * dearest.max(1);
        let shift = (128 - most.leading_zeros()).saturating_sub(62);
        let traffic: Vec<u64> = self.traffic.iter().map(|&t| t >> shift).collect();
        let table = Table { traffic: &traffic, cost: self.cost, layers: self.layers, n: self.devices };
        let off_diagonal = self.off_diagonal();
        let uniform = off_diagonal.windows(2).all(|w| w[0] == w[1]);
        let exact = if uniform {
            Some((table.independent(), Way::Uniform))
        } else {
            table.by_dynamic_programming().map(|device| (device, Way::DynamicProgramming))
        };
        // Whatever is exact without level totals bounds, and starts, the search for level ones.
        let bound =
            exact.as_ref().map_or_else(|| self.relaxed(table), |(device, _)| table.value(device)) >> 64;
        let (device, way) = match (exact, self.sizes) {
            (Some(exact), None) => exact,
            (exact, sizes) => {
                let exact = exact.map(|(device, _)| device);
                let given = self.start.map(<[u16]>::to_vec);
                let starts = exact.into_iter().chain(given).chain([table.chained()]);
                let ends = starts.map(|start| table.by_local_search(start, sizes, control));
                let best = ends.min_by_key(local::Local::value).expect("there is a start");
                (best.device, Way::LocalSearch)
            }
        };
        Ok(Placed { device, way, bound: bound << shift })
    }

    /// What no placement can cost less than, boundary by boundary: the larger of two relaxations.
    ///
    /// Every link as good as the best one; and every cluster on its own: wherever it is, its most tokens go to the
    /// nearest device (itself), the next most to the next nearest, and so on.
    fn relaxed(&self, table: Table<'_>) -> Cost {
        let n = self.devices;
        let cheapest = self.off_diagonal().into_iter().min().unwrap_or(0);
        let sorted = |values: &mut dyn Iterator<Item = u64>| {
            let mut values: Vec<u64> = values.collect();
            values.sort_unstable();
            values
        };
        let row = |values: &[u64], i: usize| sorted(&mut (0..n).map(|j| values[i * n + j]));
        let column = |values: &[u64], j: usize| sorted(&mut (0..n).map(|i| values[i * n + j]));
        let nearest: Vec<[Vec<u64>; 2]> = (0..n).map(|d| [row(self.cost, d), column(self.cost, d)]).collect();
        let alone = |tokens: &[u64], side: usize| {
            let at = |d: usize| nearest[d][side].iter().zip(tokens.iter().rev()).map(|(c, t)| c * t).max();
            (0..n).filter_map(at).min().unwrap_or(0)
        };
        let bound = |l: usize| {
            let traffic = table.boundary(l);
            let clusters = (0..n).map(|c| alone(&row(traffic, c), 0).max(alone(&column(traffic, c), 1)));
            let matched = bottleneck_assignment(traffic, n);
            let left = (0..n * n).filter(|i| matched[i / n] != i % n).map(|i| traffic[i]).max().unwrap_or(0);
            cost_of((left * cheapest).max(clusters.max().unwrap_or(0)), 0)
        };
        (0..table.layers - 1).map(bound).sum()
    }

    fn off_diagonal(&self) -> Vec<u64> {
        let n = self.devices;
        (0..n * n).filter(|i| i / n != i % n).map(|i| self.cost[i]).collect()
    }

    fn check(&self) -> Result<()> {
        let n = self.devices;
        let shape = |what, wanted: usize, found: usize| {
            let error = || Error::Shape { what, rule: format!("{wanted} entries"), found: found.to_string() };
            (wanted == found).then_some(()).ok_or_else(error)
        };
        if self.layers == 0 || n == 0 {
            let found = format!("{} layers, {n} devices", self.layers);
            return Err(Error::Shape {
                what: "traffic",
                rule: "at least one layer and device".into(),
                found,
            });
        }
        shape("traffic", (self.layers - 1) * n * n, self.traffic.len())?;
        shape("cost", n * n, self.cost.len())?;
        shape("sizes", self.layers * n, self.sizes.map_or(self.layers * n, <[u64]>::len))?;
        if let Some(start) = self.start {
            shape("start", self.layers * n, start.len())?;
            for (l, layer) in start.chunks_exact(n).enumerate() {
                if (0..n as u16).any(|d| !layer.contains(&d)) {
                    let found = format!("{layer:?} in layer {l}");
                    return Err(Error::Shape { what: "start", rule: "every device once".into(), found });
                }
            }
        }
        let fault = |rule: &str, i: usize| {
            let found = format!("{} from device {} to {}", self.cost[i], i / n, i % n);
            Err(Error::Shape { what: "cost", rule: rule.into(), found })
        };
        for i in 0..n * n {
            if (i / n == i % n) != (self.cost[i] == 0) {
                return fault("zeros on the diagonal alone", i);
            }
            if self.cost[i] >= 1 << 32 {
                return fault("entries below 2^32", i);
            }
        }
        Ok(())
    }
}

/// Traffic whose weighted sum fits in 62 bits.
#[derive(Clone, Copy)]
struct Table<'a> {
    traffic: &'a [u64],
    cost: &'a [u64],
    layers: usize,
    n: usize,
}

impl<'a> Table<'a> {
    fn boundary(&self, l: usize) -> &'a [u64] {
        &self.traffic[l * self.n * self.n..][..self.n * self.n]
    }

    /// Cost of boundary `l` with the clusters of its two layers on devices `a` and `b`.
    fn boundary_cost(&self, l: usize, a: &[u16], b: &[u16]) -> Cost {
        let (mut largest, mut total) = (0, 0);
        for (row, &a) in self.boundary(l).chunks_exact(self.n).zip(a) {
            let cost = &self.cost[usize::from(a) * self.n..][..self.n];
            for (&tokens, &b) in row.iter().zip(b) {
                let time = tokens * cost[usize::from(b)];
                largest = largest.max(time);
                total += time;
            }
        }
        cost_of(largest, total)
    }

    fn value(&self, device: &[u16]) -> Cost {
        let of = |l: usize| &device[l * self.n..][..self.n];
        (0..self.layers - 1).map(|l| self.boundary_cost(l, of(l), of(l + 1))).sum()
    }

    /// All links alike: each boundary on its own, labels carried along.
    fn independent(&self) -> Vec<u16> {
        let n = self.n;
        let next: Vec<Vec<usize>> = (0..self.layers - 1)
            .into_par_iter()
            .map(|l| bottleneck_assignment(self.boundary(l), n))
            .collect();
        let mut device: Vec<u16> = (0..n as u16).collect();
        for (l, next) in next.iter().enumerate() {
            device.resize((l + 2) * n, 0);
            for (c, &to) in next.iter().enumerate() {
                device[(l + 1) * n + to] = device[l * n + c];
            }
        }
        device
    }

    /// The best chain of permutations, or None where they are too many.
    fn by_dynamic_programming(&self) -> Option<Vec<u16>> {
        let n = self.n;
        if n > PERMUTED {
            return None;
        }
        let all = permutations(n);
        let (class_of, classes) = self.classes(&all);
        if all.len() * classes.len() > TRANSITIONS {
            return None;
        }
        let mut value = vec![0; classes.len()];
        let mut came_from = Vec::with_capacity(self.layers - 1);
        for l in 0..self.layers - 1 {
            // Cheapest predecessors first: once one of them alone costs as much as the best found, no later one helps.
            let mut order: Vec<u32> = (0..all.len() as u32).collect();
            order.sort_by_key(|&p| (value[class_of[p as usize] as usize], p));
            let steps: Vec<(Cost, u32)> = classes
                .par_iter()
                .map(|&class| {
                    let (largest, total) = self.arrivals(l, &all[class as usize]);
                    let mut best = (Cost::MAX, 0);
                    for &p in &order {
                        let so_far = value[class_of[p as usize] as usize];
                        if so_far >= best.0 {
                            break;
                        }
                        let at = all[p as usize].iter().enumerate().map(|(c, &d)| c * n + usize::from(d));
                        let (big, sum) = at.fold((0, 0), |(b, s), i| (largest[i].max(b), s + total[i]));
                        best = best.min((so_far + cost_of(big, sum), p));
                    }
                    best
                })
                .collect();
            value = steps.iter().map(|&(cost, _)| cost).collect();
            came_from.push(steps.into_iter().map(|(_, p)| p as usize).collect::<Vec<_>>());
        }
        // Backwards, carrying along the symmetry that turns a class's representative into the layer at hand.
        let last = (0..value.len()).min_by_key(|&class| (value[class], class))?;
        let mut layer = all[classes[last] as usize].clone();
        let mut class = last;
        let mut device = vec![layer.clone()];
        for from in came_from.iter().rev() {
            let before = &all[from[class]];
            let representative = &all[classes[class] as usize];
            let mut symmetry = vec![0; n];
            for (&r, &d) in representative.iter().zip(&layer) {
                symmetry[usize::from(r)] = d;
            }
            layer = before.iter().map(|&d| symmetry[usize::from(d)]).collect();
            class = class_of[from[class]] as usize;
            device.push(layer.clone());
        }
        device.reverse();
        Some(device.concat())
    }

    /// For a cluster of layer `l` on a device, `[n, n]`: the largest and the total time of its tokens to layer l + 1.
    fn arrivals(&self, l: usize, next: &[u16]) -> (Vec<u64>, Vec<u64>) {
        let n = self.n;
        let times = |i: usize| {
            let (row, cost) = (&self.boundary(l)[i / n * n..][..n], &self.cost[i % n * n..][..n]);
            row.iter().zip(next).map(|(&tokens, &d)| tokens * cost[usize::from(d)])
        };
        let largest = (0..n * n).map(|i| times(i).max().unwrap_or(0)).collect();
        (largest, (0..n * n).map(|i| times(i).sum()).collect())
    }

    /// Whether exchanging devices by `p` leaves all link costs as they are.
    fn is_symmetry(&self, p: &[u16]) -> bool {
        let n = self.n;
        let moved = |i: usize| self.cost[usize::from(p[i / n]) * n + usize::from(p[i % n])];
        (0..n * n).all(|i| moved(i) == self.cost[i])
    }

    /// Class of every permutation up to symmetries of the links, and the first permutation of every class.
    fn classes(&self, all: &[Vec<u16>]) -> (Vec<u32>, Vec<u32>) {
        let symmetries: Vec<&Vec<u16>> = all.iter().filter(|p| self.is_symmetry(p)).collect();
        let mut class_of = vec![u32::MAX; all.len()];
        let mut classes = Vec::new();
        for (first, p) in all.iter().enumerate() {
            if class_of[first] == u32::MAX {
                for symmetry in &symmetries {
                    let image = p.iter().map(|&d| symmetry[usize::from(d)]);
                    class_of[rank(&image.collect::<Vec<_>>())] = classes.len() as u32;
                }
                classes.push(first as u32);
            }
        }
        (class_of, classes)
    }
}

/// Matches rows to columns so that the largest unmatched entry is least, then the matched sum largest.
///
/// Two entries in one row or column cannot both be matched. Taken in descending order, entries can all be matched up
/// to the first that shares a row or column with an earlier one; its value is the optimum.
fn bottleneck_assignment(entries: &[u64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n * n).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(entries[i]), i));
    let mut column_of = vec![None; n];
    let mut taken = vec![false; n];
    let mut forced = Vec::new();
    for i in order {
        let (row, column) = (i / n, i % n);
        if column_of[row].is_some() || taken[column] {
            // Entries equal to this one may be left unmatched after all.
            forced.retain(|&f: &usize| entries[f] > entries[i]);
            break;
        }
        column_of[row] = Some(column);
        taken[column] = true;
        forced.push(i);
    }
    column_of.fill(None);
    taken.fill(false);
    for &i in &forced {
        column_of[i / n] = Some(i % n);
        taken[i % n] = true;
    }
    let rows: Vec<usize> = (0..n).filter(|&r| column_of[r].is_none()).collect();
    let columns: Vec<usize> = (0..n).filter(|&c| !taken[c]).collect();
    let weight: Vec<i64> =
        rows.iter().flat_map(|r| columns.iter().map(move |c| entries[r * n + c] as i64)).collect();
    for (&row, column) in rows.iter().zip(assign_max(&weight, rows.len())) {
        column_of[row] = Some(columns[column]);
    }
    column_of.into_iter().map(|column| column.expect("every row is matched")).collect()
}

/// All permutations of 0..n in lexicographic order.
fn permutations(n: usize) -> Vec<Vec<u16>> {
    let mut p: Vec<u16> = (0..n as u16).collect();
    let mut all = vec![p.clone()];
    while let Some(i) = (1..n).rev().find(|&i| p[i - 1] < p[i]) {
        let j = (i..n).rev().find(|&j| p[j] > p[i - 1]).expect("p[i] is one");
        p.swap(i - 1, j);
        p[i..].reverse();
        all.push(p.clone());
    }
    all
}

/// Position of a permutation among all of them.
fn rank(p: &[u16]) -> usize {
    let smaller_later = |i: usize| p[i + 1..].iter().filter(|&&later| later < p[i]).count();
    (0..p.len()).fold(0, |rank, i| rank * (p.len() - i) + smaller_later(i))
}

#[cfg(test)]
mod tests {
    use super::local::Local;
    use super::*;
    use proptest::prelude::*;

    fn brute(table: &Table<'_>) -> Cost {
        let all = permutations(table.n);
        let mut value = vec![0; all.len()];
        for l in 0..table.layers - 1 {
            let best = |q: &Vec<u16>| {
                all.iter().zip(&value).map(|(p, v)| v + table.boundary_cost(l, p, q)).min().expect("one")
            };
            value = all.iter().map(best).collect();
        }
        value.into_iter().min().expect("one")
    }

    fn links(n: usize, per_node: usize, far: u64) -> Vec<u64> {
        let cost = |i: usize, j: usize| match (i == j, i / per_node == j / per_node) {
            (true, _) => 0,
            (_, true) => 2,
            _ => far,
        };
        (0..n * n).map(|i| cost(i / n, i % n)).collect()
    }

    fn is_a_chain_of_permutations(device: &[u16], n: usize) -> bool {
        device.chunks_exact(n).all(|layer| {
            let mut seen = layer.to_vec();
            seen.sort_unstable();
            seen.into_iter().eq(0..n as u16)
        })
    }

    proptest! {
        /// Both exact ways find the least bottleneck and, among those, the least total; their bound is met.
        #[test]
        fn exact_ways_are_exact(
            n in 1usize..6, layers in 1usize..5, per_node in 1usize..4, far in 2u64..9,
            entries in prop::collection::vec(prop_oneof![0u64..6, 0u64..1000], 4 * 25),
        ) {
            let (traffic, cost) = (&entries[..(layers - 1) * n * n], &links(n, per_node, far));
            let placed = Chain { traffic, cost, sizes: None, start: None, layers, devices: n }.place(&Control::new(None)).expect("valid");
            let table = Table { traffic, cost, layers, n };
            prop_assert!(is_a_chain_of_permutations(&placed.device, n));
            prop_assert_ne!(placed.way, Way::LocalSearch);
            let best = brute(&table);
            prop_assert_eq!(table.value(&placed.device), best);
            prop_assert_eq!(placed.bound, best >> 64);
            prop_assert_eq!(table.value(&table.by_dynamic_programming().expect("small")), best);
            let local = table.by_local_search(table.chained(), None, &Control::new(None)).device;
            prop_assert!(is_a_chain_of_permutations(&local, n));
            prop_assert!(table.value(&local) >= best);
            let chain = Chain { traffic, cost, sizes: None, start: None, layers, devices: n };
            prop_assert!(chain.relaxed(table) <= best);
        }

        /// Where totals count, they come first: no single exchange could level them further.
        #[test]
        fn totals_are_level(
            n in 2usize..5, layers in 3usize..7,
            entries in prop::collection::vec(0u64..100, 6 * 16), experts in prop::collection::vec(1u64..4, 6 * 4),
        ) {
            let (traffic, cost) = (&entries[..(layers - 1) * n * n], &links(n, n, 2));
            let sizes = &experts[..layers * n];
            let placed = Chain { traffic, cost, sizes: Some(sizes), start: None, layers, devices: n }.place(&Control::new(None)).expect("valid");
            prop_assert!(is_a_chain_of_permutations(&placed.device, n));
            let table = Table { traffic, cost, layers, n };
            prop_assert!(table.value(&placed.device) >> 64 >= placed.bound);
            let local = Local::new(&table, placed.device, Some(sizes));
            for (i, j) in (0..n).flat_map(|i| (0..i).map(move |j| (i, j))) {
                let apart = local.totals[i] as i64 - local.totals[j] as i64;
                for l in 0..layers {
                    prop_assert!((apart - 2 * local.more(i as u16, j as u16, l)).abs() >= apart.abs());
                }
            }
        }
    }

    #[test]
    fn two_nodes_of_four_have_35_classes() {
        let cost = links(8, 4, 9);
        let table = Table { traffic: &[], cost: &cost, layers: 1, n: 8 };
        assert_eq!(table.classes(&permutations(8)).1.len(), 35);
    }

    #[test]
    fn huge_counts_do_not_overflow() {
        let traffic = [u64::MAX, 1, 1, u64::MAX];
        let cost = links(2, 1, 9);
        let placed =
            Chain { traffic: &traffic, cost: &cost, sizes: None, start: None, layers: 2, devices: 2 }
                .place(&Control::new(None));
        assert_eq!(placed.expect("valid").device, [0, 1, 0, 1]);
    }
}
