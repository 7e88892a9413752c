//! Stage 2 of the paper: which device gets which cluster, so that the busiest pair of devices is least busy.
//!
//! Clusters of every layer are given. A boundary is two neighbouring layers; its cost is a pair, compared in this
//! order: the largest `traffic(d, d') * cost(d, d')` over `d != d'`, and the sum of all of them. Costs of boundaries
//! add up. Where all links are alike only who stays with whom matters, so boundaries are independent bottleneck
//! assignments, and the answer is exact. Elsewhere, and where devices must hold equally many experts over all layers,
//! a local search exchanges devices.

use rayon::prelude::*;

use crate::assignment::assign_max;
use crate::control::Control;

/// Devices up to which an exchange in all layers from one on is tried where it changes all their boundaries.
const FEW: usize = 8;
/// Sweeps at most; the search usually ends at a local optimum within ten.
const SWEEPS: usize = 50;
/// Pairs of clusters that are looked at for less traffic, at most: below a second. Totals are made level in any case.
const WORK: usize = 1 << 28;

/// Traffic between clusters, and what moving it costs.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// Tokens from cluster to cluster of the next layer, `[layers - 1, D, D]`.
    pub traffic: &'a [u64],
    /// Cost of a token from device to device, `[D, D]`; symmetric, zero on the diagonal.
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

/// Clusters on devices.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The device of every cluster, `[layers, D]`.
    pub device: Vec<u16>,
    /// Whether it is the optimum; else it is a local one.
    pub exact: bool,
    /// Proven: no placement has a smaller sum of the boundaries' largest times.
    pub bound: u128,
}

/// A boundary's largest time above its total, so that whole chains compare and add up as single numbers.
type Cost = u128;

impl Chain<'_> {
    /// Places the clusters.
    #[must_use]
    pub fn place(&self, control: &Control) -> Placed {
        // Counts so huge that sums could overflow lose their lowest bits.
        let dearest = u128::from(self.cost.iter().copied().max().unwrap_or(0));
        let dearest_of_all = self.traffic.iter().map(|&t| u128::from(t)).sum::<u128>() * dearest.max(1);
        let shift = (128 - dearest_of_all.leading_zeros()).saturating_sub(62);
        let traffic: Vec<u64> = self.traffic.iter().map(|&t| t >> shift).collect();
        let chain = Chain { traffic: &traffic, ..*self };
        let alone = chain.independent();
        let n = self.devices;
        let links = || (0..n * n).filter(|i| i / n != i % n).map(|i| self.cost[i]);
        let (cheapest, dearest) = (links().min().unwrap_or(0), links().max().unwrap_or(0));
        // As if all links were as good as the best one.
        let bound = (0..self.layers - 1).map(|l| u128::from(chain.left(l, &alone)) * u128::from(cheapest));
        let bound = bound.sum::<u128>() << shift;
        if cheapest == dearest && self.sizes.is_none() {
            return Placed { device: alone, exact: true, bound };
        }
        let starts = [Some(alone), self.start.map(<[u16]>::to_vec), Some(chain.chained())];
        let ends = starts.into_iter().flatten().map(|start| chain.by_local_search(start, control));
        let best = ends.min_by_key(Local::value);
        Placed { device: best.map_or_else(Vec::new, |best| best.device), exact: false, bound }
    }

    fn boundary(&self, l: usize) -> &[u64] {
        &self.traffic[l * self.devices * self.devices..][..self.devices * self.devices]
    }

    /// Cost of boundary `l` with the clusters of its two layers on devices `[layers, D]`.
    fn boundary_cost(&self, l: usize, device: &[u16]) -> Cost {
        let n = self.devices;
        let (here, next) = device[l * n..][..2 * n].split_at(n);
        let (mut largest, mut total) = (0, 0);
        for (row, &a) in self.boundary(l).chunks_exact(n).zip(here) {
            let cost = &self.cost[usize::from(a) * n..][..n];
            for (&tokens, &b) in row.iter().zip(next) {
                let time = tokens * cost[usize::from(b)];
                largest = largest.max(time);
                total += time;
            }
        }
        u128::from(largest) << 64 | u128::from(total)
    }

    /// The most tokens of boundary `l` from one device to another.
    fn left(&self, l: usize, device: &[u16]) -> u64 {
        let n = self.devices;
        let apart = |i: &usize| device[l * n + i / n] != device[(l + 1) * n + i % n];
        (0..n * n).filter(apart).map(|i| self.boundary(l)[i]).max().unwrap_or(0)
    }

    /// The optimum where all links are alike: each boundary on its own, labels carried along.
    fn independent(&self) -> Vec<u16> {
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

    /// Each layer in turn at the least total cost, given the one before.
    fn chained(&self) -> Vec<u16> {
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

    /// A local optimum, or what is reached in time. Totals of experts per device come first where sizes are given.
    fn by_local_search(&self, start: Vec<u16>, control: &Control) -> Local<'_> {
        let mut search = Local::new(self, start);
        for _ in 0..SWEEPS {
            if !search.sweep(control) {
                break;
            }
        }
        search
    }

    /// Whether exchanging two devices leaves all link costs, which are symmetric, as they are.
    fn are_alike(&self, i: usize, j: usize) -> bool {
        let row = |d: usize| &self.cost[d * self.devices..][..self.devices];
        let same = |(d, costs): (usize, (&u64, &u64))| d == i || d == j || costs.0 == costs.1;
        row(i).iter().zip(row(j)).enumerate().all(same)
    }
}

/// The state of a local search: clusters on devices, cost per boundary, experts per device.
struct Local<'a> {
    chain: &'a Chain<'a>,
    device: Vec<u16>,
    costs: Vec<Cost>,
    totals: Vec<u64>,
    /// What is left of [`WORK`].
    work: usize,
}

impl<'a> Local<'a> {
    fn new(chain: &'a Chain<'a>, device: Vec<u16>) -> Self {
        let costs = (0..chain.layers - 1).map(|l| chain.boundary_cost(l, &device)).collect();
        let mut totals = vec![0; chain.devices];
        for (&d, &size) in device.iter().zip(chain.sizes.unwrap_or_default()) {
            totals[usize::from(d)] += size;
        }
        Self { chain, device, costs, totals, work: WORK }
    }

    /// How uneven the totals are, then the cost.
    fn value(&self) -> (u128, Cost) {
        let uneven = self.totals.iter().map(|&total| u128::from(total).pow(2)).sum();
        (uneven, self.costs.iter().sum())
    }

    /// Tries every exchange of two devices: in one layer, in two layers at once, and in all layers from one on. Where
    /// the links of the two are alike, that last exchange changes one boundary alone.
    fn sweep(&mut self, control: &Control) -> bool {
        let (n, layers) = (self.chain.devices, self.chain.layers);
        let all: Vec<usize> = (0..layers).collect();
        let mut improved = false;
        for (i, j) in (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))) {
            if control.stopped() {
                return false;
            }
            let alike = self.chain.are_alike(i, j);
            for l in 0..layers {
                improved |= self.attempt(i, j, &[l], &[l.wrapping_sub(1), l]);
                if l > 0 && (alike || n <= FEW) {
                    let changed = if alike { &all[l - 1..l] } else { &all[l - 1..] };
                    improved |= self.attempt(i, j, &all[l..], changed);
                }
            }
            // Exchanges that leave the totals as they are, or bring them closer.
            let pairs = (0..layers).flat_map(|l| (l + 1..layers).map(move |m| (l, m)));
            let sized = self.chain.sizes.is_some();
            for (l, m) in pairs.filter(|_| sized) {
                let moved = self.more(i, j, l) + self.more(i, j, m);
                if moved == 0 || self.spread(i, j, moved) < 0 {
                    improved |= self.attempt(i, j, &[l, m], &[l.wrapping_sub(1), l, m - 1, m]);
                }
            }
        }
        improved
    }

    /// How many more experts device `i` holds than `j` in layer `l`.
    fn more(&self, i: usize, j: usize, l: usize) -> i64 {
        let n = self.chain.devices;
        let Some(sizes) = self.chain.sizes else { return 0 };
        let layer = self.device[l * n..][..n].iter().zip(&sizes[l * n..]);
        let size = |d: usize| {
            layer.clone().find(|&(&on, _)| usize::from(on) == d).map_or(0, |(_, &size)| size as i64)
        };
        size(i) - size(j)
    }

    /// How much further apart the totals of two devices are if the first gives the other so many experts.
    fn spread(&self, i: usize, j: usize, moved: i64) -> i64 {
        let apart = self.totals[i] as i64 - self.totals[j] as i64;
        (apart - 2 * moved).abs() - apart.abs()
    }

    /// Exchanges devices `i` and `j` in some layers, which changes some boundaries; undone unless that is better.
    fn attempt(&mut self, i: usize, j: usize, layers: &[usize], boundaries: &[usize]) -> bool {
        let moved: i64 = layers.iter().map(|&l| self.more(i, j, l)).sum();
        let spread = self.spread(i, j, moved);
        if spread > 0 || (spread == 0 && self.work == 0) {
            return false;
        }
        let mut touched = boundaries.to_vec();
        touched.retain(|&l| l < self.costs.len());
        touched.dedup();
        self.work = self.work.saturating_sub(touched.len() * self.chain.devices.pow(2));
        let before: Cost = touched.iter().map(|&l| self.costs[l]).sum();
        self.exchange(i, j, layers);
        let costs: Vec<Cost> = touched.iter().map(|&l| self.chain.boundary_cost(l, &self.device)).collect();
        if spread < 0 || costs.iter().sum::<Cost>() < before {
            touched.iter().zip(costs).for_each(|(&l, cost)| self.costs[l] = cost);
            self.totals[i] = self.totals[i].wrapping_add_signed(-moved);
            self.totals[j] = self.totals[j].wrapping_add_signed(moved);
            return true;
        }
        self.exchange(i, j, layers);
        false
    }

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

/// Matches rows to columns so that the largest unmatched entry is least, then the matched sum largest.
///
/// Two entries in one row or column cannot both be matched. Taken in descending order, entries can all be matched up
/// to the first that shares a row or column with an earlier one; its value is the optimum. Those above it are matched.
fn bottleneck_assignment(entries: &[u64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n * n).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(entries[i]), i));
    let shares =
        |at: &usize| order[..*at].iter().any(|&f| f / n == order[*at] / n || f % n == order[*at] % n);
    let largest = (1..n * n).find(shares).map_or(0, |at| entries[order[at]]);
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
