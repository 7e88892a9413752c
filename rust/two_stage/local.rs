//! Local search for a chain of permutations, where it is too long for exact ways or totals must be level.

use super::{Cost, PERMUTED, Table};
use crate::assignment::assign_max;
use crate::control::Control;

/// Sweeps at most; it usually ends at a local optimum within ten.
const SWEEPS: usize = 50;
/// Pairs of clusters that are looked at for less traffic, at most: below a second. Totals are made level in any case.
const WORK: usize = 1 << 28;

impl Table<'_> {
    /// Each layer in turn at the least total cost, given the one before.
    pub(super) fn chained(&self) -> Vec<u16> {
        let n = self.n;
        let mut device: Vec<u16> = (0..n as u16).collect();
        for l in 0..self.layers - 1 {
            let before = &device[l * n..];
            let time = |c: usize, d: usize| -> u64 {
                let from = |b: usize| self.boundary(l)[b * n + c] * self.cost[usize::from(before[b]) * n + d];
                (0..n).map(from).sum()
            };
            let saved: Vec<i64> = (0..n * n).map(|i| -(time(i / n, i % n) as i64)).collect();
            let next = assign_max(&saved, n);
            device.extend(next.into_iter().map(|d| d as u16));
        }
        device
    }

    /// A local optimum, or what is found in time. Totals of experts per device come first where `sizes` are given.
    pub(super) fn by_local_search<'b>(
        &'b self,
        start: Vec<u16>,
        sizes: Option<&'b [u64]>,
        control: &Control,
    ) -> Local<'b> {
        let mut search = Local::new(self, start, sizes);
        for _ in 0..SWEEPS {
            if !search.sweep(control) {
                break;
            }
        }
        search
    }
}

/// The state of a local search: clusters on devices, cost per boundary, experts per device.
pub(super) struct Local<'a> {
    table: &'a Table<'a>,
    pub(super) device: Vec<u16>,
    costs: Vec<Cost>,
    sizes: Option<&'a [u64]>,
    pub(super) totals: Vec<u64>,
    /// What is left of [`WORK`].
    work: usize,
}

impl<'a> Local<'a> {
    pub(super) fn new(table: &'a Table<'a>, device: Vec<u16>, sizes: Option<&'a [u64]>) -> Self {
        let mut local =
            Self { table, device, costs: Vec::new(), sizes, totals: vec![0; table.n], work: WORK };
        local.costs = (0..table.layers - 1).map(|l| local.boundary(l)).collect();
        for (i, &d) in local.device.iter().enumerate() {
            local.totals[usize::from(d)] += local.size(i);
        }
        local
    }

    /// How uneven the totals are, then the cost.
    pub(super) fn value(&self) -> (u128, Cost) {
        let uneven = self.totals.iter().map(|&total| u128::from(total).pow(2)).sum();
        (uneven, self.costs.iter().sum())
    }

    fn size(&self, i: usize) -> u64 {
        self.sizes.map_or(0, |sizes| sizes[i])
    }

    fn boundary(&self, l: usize) -> Cost {
        let n = self.table.n;
        self.table.boundary_cost(l, &self.device[l * n..][..n], &self.device[(l + 1) * n..][..n])
    }

    /// Tries every exchange of two devices: in one layer, in two layers at once, and in all layers from one on. Where
    /// the links of the two are alike, that last exchange changes one boundary alone; otherwise it is worth trying
    /// for few devices only.
    fn sweep(&mut self, control: &Control) -> bool {
        let (n, layers) = (self.table.n, self.table.layers);
        let all: Vec<usize> = (0..layers).collect();
        let mut improved = false;
        for i in 0..n as u16 {
            for j in i + 1..n as u16 {
                if control.stopped() {
                    return false;
                }
                let alike = self.table.is_symmetry(&transposition(i, j, n));
                for l in 0..layers {
                    improved |= self.attempt(i, j, &[l], &[l.wrapping_sub(1), l]);
                    if l > 0 && (alike || n <= PERMUTED) {
                        let changed = if alike { &all[l - 1..l] } else { &all[l - 1..] };
                        improved |= self.attempt(i, j, &all[l..], changed);
                    }
                }
                if self.sizes.is_some() {
                    improved |= self.trade(i, j);
                }
            }
        }
        improved
    }

    /// Exchanges in two layers that leave the totals as they are, or bring them closer.
    fn trade(&mut self, i: u16, j: u16) -> bool {
        let mut improved = false;
        for l in 0..self.table.layers {
            for m in l + 1..self.table.layers {
                let (a, b) = (self.more(i, j, l), self.more(i, j, m));
                let apart = self.totals[usize::from(i)] as i64 - self.totals[usize::from(j)] as i64;
                if a + b == 0 || (apart - 2 * (a + b)).abs() < apart.abs() {
                    improved |= self.attempt(i, j, &[l, m], &[l.wrapping_sub(1), l, m - 1, m]);
                }
            }
        }
        improved
    }

    /// How many more experts device `i` holds than `j` in layer `l`.
    pub(super) fn more(&self, i: u16, j: u16, l: usize) -> i64 {
        let n = self.table.n;
        let held =
            |d: u16| (0..n).find(|&c| self.device[l * n + c] == d).map_or(0, |c| self.size(l * n + c)) as i64;
        held(i) - held(j)
    }

    /// Exchanges devices `i` and `j` in some layers, which changes some boundaries; undone unless that is better.
    fn attempt(&mut self, i: u16, j: u16, layers: &[usize], boundaries: &[usize]) -> bool {
        let more: i64 =
            if self.sizes.is_some() { layers.iter().map(|&l| self.more(i, j, l)).sum() } else { 0 };
        let apart = self.totals[usize::from(i)] as i64 - self.totals[usize::from(j)] as i64;
        let level = (apart - 2 * more).abs() - apart.abs();
        if level > 0 || (level == 0 && self.work == 0) {
            return false;
        }
        let mut touched = boundaries.to_vec();
        touched.retain(|&l| l < self.costs.len());
        touched.dedup();
        self.work = self.work.saturating_sub(touched.len() * self.table.n * self.table.n);
        let before: Cost = touched.iter().map(|&l| self.costs[l]).sum();
        self.exchange(i, j, layers);
        let costs: Vec<Cost> = touched.iter().map(|&l| self.boundary(l)).collect();
        if level < 0 || costs.iter().sum::<Cost>() < before {
            touched.iter().zip(costs).for_each(|(&l, cost)| self.costs[l] = cost);
            self.totals[usize::from(i)] = self.totals[usize::from(i)].wrapping_add_signed(-more);
            self.totals[usize::from(j)] = self.totals[usize::from(j)].wrapping_add_signed(more);
            return true;
        }
        self.exchange(i, j, layers);
        false
    }

    fn exchange(&mut self, i: u16, j: u16, layers: &[usize]) {
        let n = self.table.n;
        for &l in layers {
            for d in &mut self.device[l * n..][..n] {
                *d = if *d == i {
                    j
                } else if *d == j {
                    i
                } else {
                    *d
                };
            }
        }
    }
}

fn transposition(i: u16, j: u16, n: usize) -> Vec<u16> {
    let mut p: Vec<u16> = (0..n as u16).collect();
    p.swap(i.into(), j.into());
    p
}
