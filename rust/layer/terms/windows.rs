//! Loads of experts in windows, as whole numbers whose sums are exact.
//!
//! Loads are whole numbers kept as `f32`, scaled so that a window's total stays below 2^22, where sums are exact. The
//! loads of devices are therefore a function of the placement alone, whatever moves led to it, on any machine. The scale is
//! the only loss: every part of a load is off by at most one unit, 2^-22 of the heaviest window's total.

use crate::layer::{LANES, Site};

const LARGEST_TOTAL: f64 = (1 << 22) as f64;
/// Windows that the mean expert's variance counts as, beside an expert's own: few windows estimate that poorly.
const FEW: f64 = 4.0;
/// Units of an own variance of one, in whole numbers.
const VARIANCE: f64 = (1u64 << 40) as f64;

/// The measure that stands for the largest load of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// The largest load itself.
    Peak,
    /// The norm of order 8 over devices.
    ///
    /// It counts the own variance of experts, which one window does not repeat from another: `noise` is the part of an
    /// expert's variance between windows that counts as its own. And it counts the mean of all windows, which stands for
    /// traffic of all kinds at once, with a weight of `mixed` times all windows.
    Norm {
        /// The part of an expert's variance among windows that is its own.
        noise: f64,
        /// Weight of the mean of all windows, in weights of all windows.
        mixed: f64,
    },
}

/// Loads of experts in windows, weighted and scaled.
#[derive(Debug, Clone)]
pub struct Windows {
    pub(in crate::layer) count: usize,
    /// Windows, rounded up to full vectors.
    pub(in crate::layer) width: usize,
    /// Whole numbers `[E + 1, width]`; the last row is that of an empty slot.
    values: Vec<f32>,
    experts: usize,
    /// Units per weighted token.
    pub scale: f64,
    /// Units of a token in every window; zero in windows that weigh nothing `[width]`.
    pub(in crate::layer) unit: Vec<f32>,
    /// The measure of the largest load.
    pub(in crate::layer) measure: Measure,
    /// One over the time of a device if all devices end at the same time; zero in empty windows `[width]`.
    pub(in crate::layer) per_mean: Vec<f32>,
    /// Cost of a norm of one: that time, times the weight of the window `[width]`.
    pub(in crate::layer) price: Vec<f32>,
    /// Own variance, in squares of the mean, as a whole number `[E]`.
    pub(in crate::layer) variance: Vec<f64>,
    /// Heaviness of an expert: the root of its mean square plus its own deviation, in means `[E]`.
    pub(in crate::layer) heaviness: Vec<f64>,
}

impl Windows {
    /// Builds windows from loads `[W, E]`, weighted by the weight of every window `[W]` and scaled.
    #[must_use]
    pub fn new(load: &[f64], weight: &[f64], experts: usize, site: &Site, measure: Measure) -> Self {
        let count = weight.len();
        let (noise, mixed) = match measure {
            Measure::Norm { noise, mixed } => (noise, if count < 2 { 0.0 } else { mixed }),
            Measure::Peak => (0.0, 0.0),
        };
        let mut weights = weight.to_vec();
        let weighted = load.chunks_exact(experts).zip(weight);
        let mut rows: Vec<f64> = weighted.flat_map(|(row, w)| row.iter().map(move |x| x * w)).collect();
        let mut counts: Vec<f64> = vec![1.0 / (1.0 + mixed); count];
        let rate = site.rate();
        let (variance, heaviness) = moments(&rows, experts, rate, noise);
        if mixed > 0.0 {
            let mean = |e: usize| rows[e..].iter().step_by(experts).sum::<f64>() / count as f64;
            let mean: Vec<f64> = (0..experts).map(mean).collect();
            rows.extend(mean);
            weights.push(weight.iter().sum::<f64>() / count as f64);
            counts.push(mixed / (1.0 + mixed) * count as f64);
        }
        let width = counts.len().next_multiple_of(LANES).max(LANES);
        let totals: Vec<f64> = rows.chunks_exact(experts).map(|row| row.iter().sum()).collect();
        let heaviest = totals.iter().copied().fold(0.0, f64::max);
        let scale = if heaviest > 0.0 { (LARGEST_TOTAL - 1.0) / heaviest } else { 1.0 };
        let mut values = vec![0.0; (experts + 1) * width];
        for (e, values) in values.chunks_exact_mut(width).take(experts).enumerate() {
            for (value, row) in values.iter_mut().zip(rows.chunks_exact(experts)) {
                // Values are rounded down, so that the total keeps its bound.
                *value = (row[e] * scale) as u32 as f32;
            }
        }
        let mut unit: Vec<f32> = weights.iter().map(|weight| (weight * scale) as f32).collect();
        unit.resize(width, 0.0);
        let (mut per_mean, mut price) = (vec![0.0; width], vec![0.0; width]);
        for (w, (&total, counts)) in
            totals.iter().zip(&counts).enumerate().filter(|(_, window)| *window.0 > 0.0)
        {
            per_mean[w] = (rate / (total * scale)) as f32;
            price[w] = (total * scale / rate * counts) as f32;
        }
        Self { count, width, values, experts, scale, unit, measure, per_mean, price, variance, heaviness }
    }

    /// Returns the loads of an expert in all windows; zeros for an empty slot.
    pub(in crate::layer) fn of(&self, expert: u16) -> &[f32] {
        &self.values[usize::from(expert).min(self.experts) * self.width..][..self.width]
    }

    /// Returns the own variance of a copy that serves a share of its expert's tokens, as a whole number.
    pub(in crate::layer) fn variance(&self, expert: u16, share: f64) -> i64 {
        self.variance.get(usize::from(expert)).map_or(0, |variance| (variance * share * share) as i64)
    }

    /// Returns whether windows cost nothing.
    pub(in crate::layer) fn is_weightless(&self) -> bool {
        self.values.iter().all(|&value| value == 0.0)
    }
}

/// Returns the standard deviation of an own variance, in means.
#[inline(always)]
pub(in crate::layer) fn deviation(variance: i64) -> f32 {
    (variance as f64 / VARIANCE).sqrt() as f32
}

/// Computes own variances and heaviness of experts `[E]` from weighted loads `[W, E]`, in units of a window's mean.
fn moments(rows: &[f64], experts: usize, rate: f64, noise: f64) -> (Vec<f64>, Vec<f64>) {
    let [mut mean, mut square] = [vec![0.0; experts], vec![0.0; experts]];
    let (mut all, mut used) = (0.0, 0usize);
    for row in rows.chunks_exact(experts) {
        let total: f64 = row.iter().sum();
        if total > 0.0 {
            (all, used) = (all + total, used + 1);
            for (e, tokens) in row.iter().enumerate() {
                let load = tokens * (rate / total);
                mean[e] += total * load;
                square[e] += total * load * load;
            }
        }
    }
    let unit = if all > 0.0 { 1.0 / all } else { 0.0 };
    mean.iter_mut().chain(&mut square).for_each(|sum| *sum *= unit);
    let variance = |e: usize| noise * (square[e] - mean[e] * mean[e]).max(0.0);
    let pooled = (0..experts).map(variance).sum::<f64>() / experts as f64;
    let prior = pooled * FEW / used.max(1) as f64;
    let own_variance = (0..experts).map(|e| libm::rint((variance(e) + prior) * VARIANCE)).collect();
    let heaviness = (0..experts).map(|e| square[e].sqrt() + variance(e).sqrt()).collect();
    (own_variance, heaviness)
}

/// Rounds a number below 2^22 to an integer: added to 1.5 * 2^23, its mantissa holds no fraction.
#[inline(always)]
fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

/// Adds `sign` times a part of an expert's load to a row.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(in crate::layer) fn add(to: &mut [f32], load: &[f32], share: f32, sign: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        *to += sign * round(load * share);
    }
}

/// Returns the number of full vectors of a row.
#[inline(always)]
pub(super) fn chunks(row: &[f32]) -> usize {
    row.len() / LANES
}

/// Returns the first `n` vectors of a row: loops over them need no checks, so the compiler vectorises them.
#[inline(always)]
pub(super) fn lanes(row: &[f32], n: usize) -> &[[f32; LANES]] {
    &row.as_chunks::<LANES>().0[..n]
}

/// Sums values in an order of additions that is the same with all instruction sets.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(in crate::layer) fn sum(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    for chunk in values.chunks_exact(LANES) {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]);
        }
    }
    total(sums)
}

/// Sums lanes, halves added to halves: the processor need not wait for one addition after the other.
#[inline(always)]
pub(in crate::layer) fn total<T: Copy + std::ops::Add<Output = T>>(lanes: [T; LANES]) -> T {
    let eight: [T; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [T; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
