//! Stage 2 of the paper: assigns clusters to devices so that the busiest pair of devices has the least traffic.
//!
//! The clusters of every layer are given. A boundary is two neighbouring layers. Its cost is a pair of numbers, compared in
//! this order: the largest `traffic(d, d') * cost(d, d')` over `d != d'`, and the sum of all of them. Costs of boundaries add
//! up. Where all links are alike, only the matching of neighbouring clusters matters. The boundaries are then independent
//! bottleneck assignments, and the answer is exact. Otherwise, and where devices must hold equally many experts over all
//! layers, a local search exchanges devices.

use rayon::prelude::*;

use crate::arrays::bits_beyond;
use crate::assignment::assign_max;
use crate::control::Control;

/// Largest number of devices for which exchanges in all layers from one on are tried even if they change all boundaries from
/// there on.
const FEW: usize = 8;
/// Largest number of sweeps; the search usually ends at a local optimum within ten.
const SWEEPS: usize = 50;
/// Largest number of pairs of clusters that are evaluated for less traffic: this takes less than a second. Totals of experts
/// are balanced in any case.
const WORK: usize = 1 << 28;

/// Traffic between clusters, and the cost of links.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// Tokens from cluster to cluster of the next layer, `[layers - 1, D, D]`.
    pub traffic: &'a [u64],
    /// Cost of a token from device to device, `[D, D]`; symmetric, zero on the diagonal.
    pub cost: &'a [u64],
    /// Experts of every cluster, `[layers, D]`; given where the devices' totals must be balanced.
    pub sizes: Option<&'a [u64]>,
    /// Devices of the clusters, `[layers, D]`, to start the local search from as well.
    pub start: Option<&'a [u16]>,
    /// Number of layers.
    pub layers: usize,
    /// Number of devices, and of clusters in a layer.
    pub devices: usize,
}

/// A placement of clusters on devices.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The device of every cluster, `[layers, D]`.
    pub device: Vec<u16>,
    /// Whether the placement is proven optimal; otherwise it is a local optimum.
    pub exact: bool,
    /// Proven lower bound on the sum of the boundaries' largest times.
    pub bound: u128,
}

/// Cost of a boundary: its largest time in the upper 64 bits, its total in the lower ones. So costs compare and add up as
/// single numbers.
type Cost = u128;

impl Chain<'_> {
    /// Returns the best placement of the clusters that was found.
    #[must_use]
    pub fn place(&self, control: &Control) -> Placed {
        // Counts so large that sums could overflow lose their lowest bits.
        let max_cost = u128::from(self.cost.iter().copied().max().unwrap_or(0));
        let max_total = self.traffic.iter().map(|&t| u128::from(t)).sum::<u128>() * max_cost.max(1);
        let shift = bits_beyond(max_total, 62);
        let traffic: Vec<u64> = self.traffic.iter().map(|&t| t >> shift).collect();
        let chain = Chain { traffic: &traffic, ..*self };
        let independent = chain.match_boundaries();
        let n = self.devices;
        let links = || (0..n * n).filter(|i| i / n != i % n).map(|i| self.cost[i]);
        let (cheapest, most_expensive) = (links().min().unwrap_or(0), links().max().unwrap_or(0));
        // This is the optimum if all links are as cheap as the cheapest one.
        let largest = |l: usize| u128::from(chain.largest_transfer(l, &independent));
        let bound = (0..self.layers - 1).map(|l| largest(l) * u128::from(cheapest));
        let bound = bound.sum::<u128>() << shift;
        if cheapest == most_expensive && self.sizes.is_none() {
            return Placed { device: independent, exact: true, bound };
        }
        let starts = [Some(independent), self.start.map(<[u16]>::to_vec), Some(chain.place_in_turn())];
        let ends = starts.into_iter().flatten().map(|start| chain.search_locally(start, control));
        let best = ends.min_by_key(LocalSearch::rank);
        Placed { device: best.map_or_else(Vec::new, |best| best.device), exact: false, bound }
    }

    /// Returns the traffic of boundary `l` `[D, D]`.
    fn boundary(&self, l: usize) -> &[u64] {
        &self.traffic[l * self.devices * self.devices..][..self.devices * self.devices]
    }

    /// Computes the cost of boundary `l` with clusters on devices `[layers, D]`.
    fn boundary_cost(&self, l: usize, device: &[u16]) -> Cost {
        let n = self.devices;
        let (device_of_row, device_of_column) = device[l * n..][..2 * n].split_at(n);
        let (mut largest, mut total) = (0, 0);
        for (row, &a) in self.boundary(l).chunks_exact(n).zip(device_of_row) {
            let cost = &self.cost[usize::from(a) * n..][..n];
            for (&tokens, &b) in row.iter().zip(device_of_column) {
                let time = tokens * cost[usize::from(b)];
                largest = largest.max(time);
                total += time;
            }
        }
        u128::from(largest) << 64 | u128::from(total)
    }

    /// Returns the largest number of tokens of boundary `l` between two different devices.
    fn largest_transfer(&self, l: usize, device: &[u16]) -> u64 {
        let n = self.devices;
        let apart = |i: &usize| device[l * n + i / n] != device[(l + 1) * n + i % n];
        (0..n * n).filter(apart).map(|i| self.boundary(l)[i]).max().unwrap_or(0)
    }

    /// Returns the optimum for links that are alike: every boundary is matched on its own, and labels follow from the first
    /// layer on.
    fn match_boundaries(&self) -> Vec<u16> {
        let n = self.devices;
        let matched =
            (0..self.layers - 1).into_par_iter().map(|l| bottleneck_assignment(self.boundary(l), n));
        let mut device: Vec<u16> = (0..n as u16).collect();
        for (l, next) in matched.collect::<Vec<_>>().into_iter().enumerate() {
            device.resize((l + 2) * n, 0);
            for (c, to) in next.into_iter().enumerate() {
                device[(l + 1) * n + to] = device[l * n + c];
            }
        }
        device
    }

    /// Places one layer after the other at the least total cost, given the layer before.
    fn place_in_turn(&self) -> Vec<u16> {
        let n = self.devices;
        let mut device: Vec<u16> = (0..n as u16).collect();
        for l in 0..self.layers - 1 {
            let before = &device[l * n..];
            let time = |c: usize, d: usize| -> u64 {
                let from = |b: usize| self.boundary(l)[b * n + c] * self.cost[usize::from(before[b]) * n + d];
                (0..n).map(from).sum()
            };
            let saved: Vec<i64> = (0..n * n).map(|i| -(time(i / n, i % n) as i64)).collect();
            device.extend(assign_max(&saved, n).into_iter().map(|d| d as u16));
        }
        device
    }

    /// Searches from `start` until a local optimum is found or the time is over.
    ///
    /// Where sizes are given, balanced totals of experts per device come before cost.
    fn search_locally(&self, start: Vec<u16>, control: &Control) -> LocalSearch<'_> {
        let mut search = LocalSearch::new(self, start);
        for _ in 0..SWEEPS {
            if !search.sweep(control) {
                break;
            }
        }
        search
    }

    /// Returns whether an exchange of two devices changes no cost of a link; costs are symmetric.
    fn are_interchangeable(&self, i: usize, j: usize) -> bool {
        let row = |d: usize| &self.cost[d * self.devices..][..self.devices];
        let is_same = |(d, costs): (usize, (&u64, &u64))| d == i || d == j || costs.0 == costs.1;
        row(i).iter().zip(row(j)).enumerate().all(is_same)
    }
}

/// The state of a local search.
struct LocalSearch<'a> {
    chain: &'a Chain<'a>,
    /// Device of every cluster `[layers, D]`.
    device: Vec<u16>,
    /// Cost of every boundary.
    costs: Vec<Cost>,
    /// Experts of every device over all layers `[D]`.
    totals: Vec<u64>,
    /// Pairs of clusters that may still be evaluated, of [`WORK`].
    work: usize,
}

impl<'a> LocalSearch<'a> {
    /// Builds the state of a search that starts from clusters on devices `[layers, D]`.
    fn new(chain: &'a Chain<'a>, device: Vec<u16>) -> Self {
        let costs = (0..chain.layers - 1).map(|l| chain.boundary_cost(l, &device)).collect();
        let mut totals = vec![0; chain.devices];
        for (&d, &size) in device.iter().zip(chain.sizes.unwrap_or_default()) {
            totals[usize::from(d)] += size;
        }
        Self { chain, device, costs, totals, work: WORK }
    }

    /// Returns the sum of squared totals, which is least if they are balanced, and the cost.
    fn rank(&self) -> (u128, Cost) {
        let squares = self.totals.iter().map(|&total| u128::from(total).pow(2)).sum();
        (squares, self.costs.iter().sum())
    }

    /// Tries every exchange of two devices: in one layer, in two layers at once, and in all layers from one on; returns
    /// whether that improved the placement.
    ///
    /// If the two devices are interchangeable, an exchange in all layers from one on changes a single boundary.
    fn sweep(&mut self, control: &Control) -> bool {
        let (n, layers) = (self.chain.devices, self.chain.layers);
        let all: Vec<usize> = (0..layers).collect();
        let mut improved = false;
        for (i, j) in (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))) {
            if control.stopped() {
                return false;
            }
            let alike = self.chain.are_interchangeable(i, j);
            for l in 0..layers {
                improved |= self.attempt(i, j, &[l], &[l.wrapping_sub(1), l]);
                if l > 0 && (alike || n <= FEW) {
                    let changed = if alike { &all[l - 1..l] } else { &all[l - 1..] };
                    improved |= self.attempt(i, j, &all[l..], changed);
                }
            }
            // Exchanges in two layers may keep the totals as they are, or bring them closer.
            let pairs = (0..layers).flat_map(|l| (l + 1..layers).map(move |m| (l, m)));
            let has_sizes = self.chain.sizes.is_some();
            for (l, m) in pairs.filter(|_| has_sizes) {
                let moved = self.size_difference(i, j, l) + self.size_difference(i, j, m);
                if moved == 0 || self.imbalance_change(i, j, moved) < 0 {
                    improved |= self.attempt(i, j, &[l, m], &[l.wrapping_sub(1), l, m - 1, m]);
                }
            }
        }
        improved
    }

    /// Returns the experts of device `i` less those of device `j` in layer `l`.
    fn size_difference(&self, i: usize, j: usize, l: usize) -> i64 {
        let n = self.chain.devices;
        let Some(sizes) = self.chain.sizes else { return 0 };
        let layer = self.device[l * n..][..n].iter().zip(&sizes[l * n..]);
        let size = |d: usize| {
            layer.clone().find(|&(&on, _)| usize::from(on) == d).map_or(0, |(_, &size)| size as i64)
        };
        size(i) - size(j)
    }

    /// Returns how much further apart the totals of two devices are if so many experts move from the first to the second.
    fn imbalance_change(&self, i: usize, j: usize, moved: i64) -> i64 {
        let difference = self.totals[i] as i64 - self.totals[j] as i64;
        (difference - 2 * moved).abs() - difference.abs()
    }

    /// Exchanges devices `i` and `j` in some layers if that improves the placement; returns whether it does.
    ///
    /// The exchange changes the cost of some boundaries; numbers of boundaries that do not exist are skipped.
    fn attempt(&mut self, i: usize, j: usize, layers: &[usize], boundaries: &[usize]) -> bool {
        let moved: i64 = layers.iter().map(|&l| self.size_difference(i, j, l)).sum();
        let imbalance_change = self.imbalance_change(i, j, moved);
        if imbalance_change > 0 || (imbalance_change == 0 && self.work == 0) {
            return false;
        }
        let mut touched = boundaries.to_vec();
        touched.retain(|&l| l < self.costs.len());
        touched.dedup();
        self.work = self.work.saturating_sub(touched.len() * self.chain.devices.pow(2));
        let before: Cost = touched.iter().map(|&l| self.costs[l]).sum();
        self.exchange(i, j, layers);
        let costs: Vec<Cost> = touched.iter().map(|&l| self.chain.boundary_cost(l, &self.device)).collect();
        if imbalance_change < 0 || costs.iter().sum::<Cost>() < before {
            touched.iter().zip(costs).for_each(|(&l, cost)| self.costs[l] = cost);
            self.totals[i] = self.totals[i].wrapping_add_signed(-moved);
            self.totals[j] = self.totals[j].wrapping_add_signed(moved);
            return true;
        }
        self.exchange(i, j, layers);
        false
    }

    /// Exchanges devices `i` and `j` in some layers.
    fn exchange(&mut self, i: usize, j: usize, layers: &[usize]) {
        let n = self.chain.devices;
        for &l in layers {
            for d in &mut self.device[l * n..][..n] {
                *d = match usize::from(*d) {
                    d if d == i => j as u16,
                    d if d == j => i as u16,
                    d => d as u16,
                };
            }
        }
    }
}

/// Returns the column of every row in a matching with the least largest unmatched entry, and then the largest matched sum.
///
/// Two entries in one row or column cannot both be matched. In falling order, all entries can be matched up to the first one
/// that shares a row or column with an earlier entry. Its value is the optimum, and all larger entries are matched.
fn bottleneck_assignment(entries: &[u64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n * n).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(entries[i]), i));
    let conflicts =
        |at: &usize| order[..*at].iter().any(|&f| f / n == order[*at] / n || f % n == order[*at] % n);
    let largest = (1..n * n).find(conflicts).map_or(0, |at| entries[order[at]]);
    let matched: Vec<usize> = order.iter().copied().take_while(|&i| entries[i] > largest).collect();
    let rows: Vec<usize> = (0..n).filter(|&r| matched.iter().all(|i| i / n != r)).collect();
    let columns: Vec<usize> = (0..n).filter(|&c| matched.iter().all(|i| i % n != c)).collect();
    let weight: Vec<i64> =
        rows.iter().flat_map(|r| columns.iter().map(move |c| entries[r * n + c] as i64)).collect();
    let mut column_of = vec![0; n];
    for i in matched {
        column_of[i / n] = i % n;
    }
    for (&row, column) in rows.iter().zip(assign_max(&weight, rows.len())) {
        column_of[row] = columns[column];
    }
    column_of
}
