//! The linear programme that covers every expert once with contents it knows, and its dual prices.
//!
//! `min sum_C f(C) x_C` with `sum of x_C over C that hold e = 1` for every expert, and `sum x_C` = devices; x is not negative.
//! Solved by the revised simplex method with a dense inverse (Dantzig, 1963). To leave an expert uncovered or cover it
//! twice is allowed, at costs that keep its price within a box. Right sides that differ a little keep the method from
//! going round in circles. Nothing here is proven: prices are good or bad, never wrong.

use super::contents::Table;

/// Perturbation of right sides, so that no two are equal.
const PERTURBATION: f64 = 1e-5;
/// Reduced costs above this, as a share of the largest cost, do not count.
const TOLERANCE: f64 = 1e-9;
/// Entries of a direction below this are zeros.
const PIVOT: f64 = 1e-9;
/// A price that is so near to the end of its box, as a share of its width, is there.
const NEARLY: f64 = 1.0 - 1e-6;
/// Steps of one solve, by experts; contents beyond which the least useful are forgotten.
const STEPS: usize = 60;
const MOST: usize = 4000;

/// A programme that grows.
pub(super) struct Programme {
    experts: usize,
    devices: f64,
    /// Members and cost of every content.
    columns: Vec<(Vec<u16>, f64)>,
}

/// A column of a basis.
#[derive(Clone, Copy)]
enum Column {
    Content(usize),
    /// One more (or less) of a row.
    Slack(usize, f64),
}

impl Programme {
    /// Builds a programme without contents.
    pub(super) fn new(experts: usize, devices: usize) -> Self {
        Self { experts, devices: devices as f64, columns: Vec::new() }
    }

    /// Adds contents that a device can hold.
    pub(super) fn add_contents(&mut self, table: &Table, contents: Vec<Vec<u16>>) {
        for content in contents {
            if let Some(visits) = table.visits(&content) {
                self.columns.push((content, visits as f64));
            }
        }
    }

    /// Returns the least cost with prices no further than `width` from the centre, the prices of experts, and whether all
    /// are nearer.
    pub(super) fn solve(&mut self, centre: &[f64], width: f64) -> (f64, Vec<f64>, bool) {
        let rows = self.experts + 1;
        let large: f64 = self.columns.iter().map(|column| column.1).fold(1.0, f64::max);
        // The last row counts contents; its price is free, as far as anything is.
        let bounds = |row: usize, sign: f64| {
            if row < self.experts { width + sign * centre[row] } else { large * 16.0 }
        };
        let right: Vec<f64> = (0..rows)
            .map(|row| {
                let limit = if row < self.experts { 1.0 } else { self.devices };
                limit + PERTURBATION * (1.0 + (row as f64 * 0.618_033_988_75).fract())
            })
            .collect();
        let mut basis: Vec<Column> = (0..rows).map(|row| Column::Slack(row, 1.0)).collect();
        let mut cost: Vec<f64> = (0..rows).map(|row| bounds(row, 1.0)).collect();
        let mut inverse = vec![0.0; rows * rows];
        (0..rows).for_each(|row| inverse[row * rows + row] = 1.0);
        let mut value = right;
        let mut prices = vec![0.0; rows];
        let mut direction = vec![0.0; rows];
        for _ in 0..STEPS * rows {
            prices.fill(0.0);
            for (row, &cost) in inverse.chunks_exact(rows).zip(&cost) {
                if cost != 0.0 {
                    prices.iter_mut().zip(row).for_each(|(price, x)| *price += cost * x);
                }
            }
            let Some((entering, entering_cost)) = self.entering(&prices, large, &bounds) else { break };
            self.direction(entering, &inverse, &mut direction);
            let leaving = (0..rows)
                .filter(|&row| direction[row] > PIVOT)
                .min_by(|&a, &b| (value[a] / direction[a]).total_cmp(&(value[b] / direction[b])));
            let Some(leaving) = leaving else { break };
            let step = value[leaving] / direction[leaving];
            for row in 0..rows {
                value[row] =
                    if row == leaving { step } else { (value[row] - step * direction[row]).max(0.0) };
            }
            let (before, rest) = inverse.split_at_mut(leaving * rows);
            let (pivot, after) = rest.split_at_mut(rows);
            for x in pivot.iter_mut() {
                *x /= direction[leaving];
            }
            let others = before.chunks_exact_mut(rows).zip(&direction[..leaving]);
            for (row, &factor) in others.chain(after.chunks_exact_mut(rows).zip(&direction[leaving + 1..])) {
                if factor != 0.0 {
                    row.iter_mut().zip(&*pivot).for_each(|(x, pivot)| *x -= factor * pivot);
                }
            }
            (basis[leaving], cost[leaving]) = (entering, entering_cost);
        }
        let least = value.iter().zip(&cost).map(|(value, cost)| value * cost).sum();
        self.forget(&prices);
        let price = |row: usize| prices[row].clamp(centre[row] - width, centre[row] + width);
        let inside = prices.iter().zip(centre).all(|(price, centre)| (price - centre).abs() < width * NEARLY);
        (least, (0..self.experts).map(price).collect(), inside)
    }

    /// Returns the column with the least reduced cost, and its cost; None if no reduced cost is negative.
    fn entering(
        &self,
        prices: &[f64],
        large: f64,
        bounds: &impl Fn(usize, f64) -> f64,
    ) -> Option<(Column, f64)> {
        let mut best = (-TOLERANCE * large, None);
        for (number, (content, cost)) in self.columns.iter().enumerate() {
            let reduced = cost - worth(content, prices);
            if reduced < best.0 {
                best = (reduced, Some((Column::Content(number), *cost)));
            }
        }
        for (row, price) in prices.iter().enumerate() {
            for sign in [1.0, -1.0] {
                let cost = bounds(row, sign);
                if cost - sign * price < best.0 {
                    best = (cost - sign * price, Some((Column::Slack(row, sign), cost)));
                }
            }
        }
        best.1
    }

    /// Writes a column in terms of the basis.
    fn direction(&self, column: Column, inverse: &[f64], direction: &mut [f64]) {
        for (row, out) in inverse.chunks_exact(direction.len()).zip(direction.iter_mut()) {
            *out = match column {
                Column::Content(number) => worth(&self.columns[number].0, row),
                Column::Slack(slack, sign) => sign * row[slack],
            };
        }
    }

    /// Drops the contents with the highest reduced costs if there are too many contents.
    fn forget(&mut self, prices: &[f64]) {
        if self.columns.len() <= MOST {
            return;
        }
        let reduced = |(content, cost): &(Vec<u16>, f64)| cost - worth(content, prices);
        self.columns.sort_by(|a, b| reduced(a).total_cmp(&reduced(b)));
        self.columns.truncate(MOST / 2);
    }
}

/// Returns the prices of what a content covers: its experts, and one content.
fn worth(content: &[u16], prices: &[f64]) -> f64 {
    content.iter().map(|&e| prices[usize::from(e)]).sum::<f64>() + prices[prices.len() - 1]
}
