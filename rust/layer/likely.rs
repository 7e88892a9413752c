//! What windows that nobody has seen may bring: a window in which every device has its mean load and a multiple of the
//! standard deviation of it.
//!
//! Loads of experts that rise together in the windows seen will do so again, so a device's deviation is taken from its
//! own loads in all windows, covariances and all. Besides, experts surprise on their own: one that no window used may be
//! busy in the next, so each one's variance grows by something. A deviation of the mean plus z standard deviations is
//! what `vllm-ascend`'s `FlashLB` scores devices by, without the last.

use super::balance::{LANES, LARGEST_TOTAL, total};
use super::measure::raise_to;

/// Standard deviations that count.
const DEVIATIONS: f32 = 2.0;
/// An expert's own standard deviation: a part of the mean expert's load, and of its own deviation in the windows seen.
const OF_MEAN: f64 = 1.0;
const OF_DEVIATION: f64 = 0.5;
/// Order of the norm over devices.
const ORDER: u32 = 8;

/// What windows seen say of others.
#[derive(Debug, Clone)]
pub(crate) struct Likely {
    /// Share of the cost; windows seen have the rest.
    pub(super) weight: f64,
    /// How much a window counts in the mean `[W]`; in all one.
    part: Vec<f32>,
    /// Makes the variance among windows that of others: the mean was taken from these.
    unbiased: f32,
    /// Own variance of every expert, in units `[E]`; in all below 2^22, whole numbers, as loads are.
    pub(super) own: Vec<f32>,
    /// Units of an own variance, in squares of all tokens' load.
    own_unit: f64,
    /// Where a device's row has the sum of them, behind the windows.
    pub(super) column: usize,
}

impl Likely {
    /// Of loads `[W, E]` and weights `[W]`; none where fewer than two windows have tokens.
    pub(super) fn new(load: &[f64], weight: &[f64], experts: usize, likely: f64) -> Option<Self> {
        let totals: Vec<f64> = load.chunks_exact(experts).map(|row| row.iter().sum()).collect();
        let mass: f64 = totals.iter().zip(weight).map(|(total, weight)| total * weight).sum();
        let part: Vec<f64> = totals
            .iter()
            .zip(weight)
            .map(|(total, weight)| if mass > 0.0 { total * weight / mass } else { 0.0 })
            .collect();
        let repeated: f64 = part.iter().map(|part| part * part).sum();
        if likely <= 0.0 || mass <= 0.0 || part.iter().filter(|&&part| part > 0.0).count() < 2 {
            return None;
        }
        let unbiased = 1.0 / (1.0 - repeated);
        let own: Vec<f64> = (0..experts)
            .map(|e| {
                let share = |w: usize| if totals[w] > 0.0 { load[w * experts + e] / totals[w] } else { 0.0 };
                let mean: f64 = part.iter().enumerate().map(|(w, part)| part * share(w)).sum();
                let square: f64 =
                    part.iter().enumerate().map(|(w, part)| part * (share(w) - mean).powi(2)).sum();
                (OF_MEAN / experts as f64).powi(2) + OF_DEVIATION.powi(2) * unbiased * square
            })
            .collect();
        let own_unit = own.iter().sum::<f64>() / (LARGEST_TOTAL - 1.0);
        Some(Self {
            weight: likely,
            part: part.iter().map(|&part| part as f32).collect(),
            unbiased: unbiased as f32,
            own: own.iter().map(|own| libm::floor(own / own_unit) as f32).collect(),
            own_unit,
            column: weight.len(),
        })
    }
}

/// The norm over devices of what is likely, and its slope.
#[derive(Debug, Clone)]
pub(super) struct Spread {
    /// Part of a window in the mean, over its mean load; nothing behind the windows `[width]`.
    mean: Vec<f32>,
    /// The same for squares.
    square: Vec<f32>,
    unbiased: f32,
    column: usize,
    /// Variance in squares of the mean load, per unit of `column`.
    per_own: f32,
    /// Power of every device `[D]`.
    power: Vec<f32>,
    /// Cost of a device that has all the mean.
    price: f64,
    slope: f64,
}

impl Spread {
    /// One over the mean load of every window is `per_mean` `[width]`.
    pub(super) fn new(likely: &Likely, per_mean: &[f32], devices: usize) -> Self {
        let windows = || per_mean.iter().zip(likely.part.iter().chain(std::iter::repeat(&0.0)));
        let tokens: f64 = per_mean.iter().filter(|&&per| per > 0.0).map(|&per| 1.0 / f64::from(per)).sum();
        Self {
            mean: windows().map(|(per, part)| per * part).collect(),
            square: windows().map(|(per, part)| per * per * part).collect(),
            unbiased: likely.unbiased,
            column: likely.column,
            per_own: (likely.own_unit * (devices * devices) as f64) as f32,
            power: vec![0.0; devices],
            price: likely.weight * tokens,
            slope: 0.0,
        }
    }

    /// Power of a device's likely load, from its loads in windows.
    fn power(&self, row: &[f32]) -> f32 {
        let (mean, square) = moments(row, &self.mean, &self.square);
        let among = self.unbiased * (square - mean * mean).max(0.0);
        raise_to::<ORDER>(mean + DEVIATIONS * (among + self.per_own * row[self.column]).sqrt())
    }

    /// See [`super::measure::Measure::change`].
    pub(super) fn change(&self, row: &[f32], device: u16) -> f64 {
        f64::from(self.power(row) - self.power[usize::from(device)]) * self.slope
    }

    /// Follows a change of a device.
    pub(super) fn follow(&mut self, row: &[f32], device: u16) {
        self.power[usize::from(device)] = self.power(row);
    }

    /// The cost, whose slope is kept.
    pub(super) fn cost(&mut self) -> f64 {
        let sum: f64 = self.power.iter().map(|&power| f64::from(power)).sum();
        let cost = self.price * sum.sqrt().sqrt().sqrt();
        self.slope = cost / (f64::from(ORDER) * sum);
        cost
    }
}

/// Weighted sums of loads and of their squares.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn moments(row: &[f32], mean: &[f32], square: &[f32]) -> (f32, f32) {
    let mut sums = [[0.0f32; LANES]; 2];
    let width = row.len() / LANES * LANES;
    let (mean, square) = (&mean[..width], &square[..width]);
    for at in (0..width).step_by(LANES) {
        for lane in 0..LANES {
            let w = at + lane;
            sums[0][lane] += row[w] * mean[w];
            sums[1][lane] += row[w] * row[w] * square[w];
        }
    }
    let [mean, square] = sums.map(|sums| total(sums.map(f64::from)));
    (mean as f32, square as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::balance::Windows;
    use proptest::prelude::*;

    proptest! {
        /// The cost is that of the definition, in double precision, for any shares of experts on devices.
        #[test]
        fn cost_is_as_defined(
            load in prop::collection::vec(prop::collection::vec(0u32..1000, 6), 2..20),
            share in prop::collection::vec(prop::sample::select(vec![0.0f32, 0.5, 1.0]), 18),
        ) {
            let devices = 3;
            let rows: Vec<f64> = load.iter().flatten().map(|&tokens| f64::from(tokens) + 1.0).collect();
            let windows = Windows::new(&rows, &vec![1.0; load.len()], 6, 8, 0.5);
            let per_mean: Vec<f32> = (0..windows.width)
                .map(|w| rows.chunks(6).nth(w).map_or(0.0, |row| (3.0 / (row.iter().sum::<f64>() * windows.scale)) as f32))
                .collect();
            let mut spread = Spread::new(windows.likely.as_ref().expect("windows differ"), &per_mean, devices);
            let total: f64 = rows.iter().sum();
            let part: Vec<f64> = rows.chunks(6).map(|row| row.iter().sum::<f64>() / total).collect();
            let unbiased = 1.0 / (1.0 - part.iter().map(|part| part * part).sum::<f64>());
            let moments = |of: &dyn Fn(&[f64]) -> f64| {
                let values: Vec<f64> = rows.chunks(6).map(|row| of(row) / row.iter().sum::<f64>()).collect();
                let mean: f64 = values.iter().zip(&part).map(|(value, part)| value * part).sum();
                let square: f64 = values.iter().zip(&part).map(|(v, part)| (v - mean).powi(2) * part).sum();
                (mean, unbiased * square)
            };
            let mut powers = 0.0;
            for device in 0..devices {
                let share = &share[device * 6..][..6];
                let mut row = vec![0.0; windows.width];
                for (e, &share) in share.iter().enumerate() {
                    windows.add(&mut row, e as u16, share, 1.0);
                }
                spread.follow(&row, device as u16);
                let (mean, variance) = moments(&|row| row.iter().zip(share).map(|(x, &share)| x * f64::from(share)).sum());
                let own: f64 = (0..6)
                    .map(|e| f64::from(share[e]).powi(2) * (1.0 / 36.0 + 0.25 * moments(&|row| row[e]).1))
                    .sum();
                powers += (3.0 * (mean + 2.0 * (variance + own).sqrt())).powi(8);
            }
            let expected = 0.5 * total * windows.scale / 3.0 * powers.powf(0.125);
            prop_assert!((spread.cost() - expected).abs() <= 1e-3 * expected, "{} {expected}", spread.cost());
        }
    }
}
