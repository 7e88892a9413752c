//! Loads of experts in windows, as whole numbers, and sums of them that are exact.
//!
//! Loads are whole numbers kept as `f32`, scaled so that a window's total stays below 2^22, where sums are exact. The
//! loads of devices are therefore a function of the placement alone, whatever moves led to it, on any machine. The scale is
//! the only loss: every part of a load is off by at most one unit, 2^-22 of the heaviest window's total.

use super::noise::{self, Noise};

/// Vectors are whole.
pub(in crate::layer) const LANES: usize = 16;
pub(in crate::layer) const LARGEST_TOTAL: f64 = (1 << 22) as f64;

/// Loads of experts in windows, weighted and scaled.
#[derive(Debug, Clone)]
pub struct Windows {
    pub(in crate::layer) count: usize,
    /// Windows, rounded up to full vectors.
    pub(in crate::layer) width: usize,
    /// Length of a row: `width`, and as much again for variances where there is noise.
    pub(in crate::layer) row: usize,
    /// `[E + 1, row]`, whole numbers: loads, then own variances; the last row is that of an empty slot.
    values: Vec<f32>,
    experts: usize,
    /// Units per weighted token.
    pub scale: f64,
    /// Order of the norm over devices that stands for the maximum: 2, 4, 8, 16, or 0 for the maximum itself.
    pub norm: u32,
    /// A unit of own variance, in squares of a window's load `[width]`; empty where there is no noise.
    pub(in crate::layer) own_unit: Vec<f64>,
    /// What a norm counts a window by `[width]`; one, unless there is a mixed window.
    pub(in crate::layer) emphasis: Vec<f64>,
}

impl Windows {
    /// Takes loads `[W, E]` and the weight of every window `[W]`. A norm also counts what experts do on their own, and
    /// the mean of all windows, which is what traffic of all kinds at once looks like, as `mixed` times them all.
    #[must_use]
    pub fn new(
        load: &[f64],
        weight: &[f64],
        experts: usize,
        norm: u32,
        noise: Option<Noise>,
        mixed: f64,
    ) -> Self {
        let noise = noise.filter(|_| norm != 0);
        let count = weight.len();
        let mixed = if norm == 0 || count < 2 { 0.0 } else { mixed };
        let mut rows: Vec<f64> = load
            .chunks_exact(experts)
            .zip(weight)
            .flat_map(|(row, w)| row.iter().map(move |x| x * w))
            .collect();
        let part = parts(&rows, experts);
        let mut variances = noise.map_or(vec![], |noise| noise::variances(&rows, &part, experts, noise));
        if mixed > 0.0 {
            if noise.is_some() {
                let own = combined(&variances, experts, |w| part[w].powi(2));
                variances.extend(own);
            }
            let mean = combined(&rows, experts, |_| 1.0 / count as f64);
            rows.extend(mean);
        }
        let windows = rows.len() / experts;
        let width = windows.next_multiple_of(LANES).max(LANES);
        let row = if noise.is_some() { 2 * width } else { width };
        let heaviest = rows.chunks_exact(experts).map(|row| row.iter().sum()).fold(0.0, f64::max);
        let scale = if heaviest > 0.0 { (LARGEST_TOTAL - 1.0) / heaviest } else { 1.0 };
        let mut values = vec![0.0; (experts + 1) * row];
        for (w, tokens) in rows.chunks_exact(experts).enumerate() {
            for (e, &tokens) in tokens.iter().enumerate() {
                // Down, so that the total keeps its bound.
                values[e * row + w] = libm::floor(tokens * scale) as f32;
            }
        }
        let mut own_unit = vec![0.0; row - width];
        for (w, variances) in variances.chunks_exact(experts).enumerate() {
            own_unit[w] = variances.iter().sum::<f64>() / (LARGEST_TOTAL - 1.0);
            for (e, variance) in variances.iter().enumerate().filter(|&(_, &variance)| variance > 0.0) {
                values[e * row + width + w] = libm::floor(variance / own_unit[w]) as f32;
            }
        }
        let mut emphasis = vec![1.0 / (1.0 + mixed); width];
        emphasis[count..windows].fill(mixed / (1.0 + mixed) * count as f64);
        Self { count, width, row, values, experts, scale, norm, own_unit, emphasis }
    }

    /// Loads of an expert in all windows and its variances; none where a slot is empty.
    pub(in crate::layer) fn of(&self, expert: u16) -> (&[f32], &[f32]) {
        self.values[usize::from(expert).min(self.experts) * self.row..][..self.row].split_at(self.width)
    }

    /// Adds `sign` times a part of an expert's load to a device's row, and the square of that part of its variance.
    pub(in crate::layer) fn add(&self, to: &mut [f32], expert: u16, part: f32, sign: f32) {
        let (load, own) = self.of(expert);
        let (loads, variances) = to.split_at_mut(self.width);
        add(loads, load, part, sign);
        add(variances, own, part * part, sign);
    }

    /// Writes a device's row, `before`, with parts of one expert less and of another more.
    pub(super) fn replace(&self, to: &mut [f32], before: &[f32], experts: [u16; 2], parts: [f32; 2]) {
        let [(leaves, leaves_own), (enters, enters_own)] = experts.map(|expert| self.of(expert));
        let (loads, variances) = to.split_at_mut(self.width);
        let (load, variance) = before.split_at(self.width);
        replace(loads, load, leaves, enters, parts);
        if !variances.is_empty() {
            replace(variances, variance, leaves_own, enters_own, parts.map(|part| part * part));
        }
    }

    /// Whether balance costs nothing.
    pub(in crate::layer) fn is_weightless(&self) -> bool {
        self.values.iter().all(|&value| value == 0.0)
    }
}

/// Every window's part of all tokens `[W]`, of loads `[W, E]`.
fn parts(rows: &[f64], experts: usize) -> Vec<f64> {
    let totals: Vec<f64> = rows.chunks_exact(experts).map(|row| row.iter().sum()).collect();
    let all: f64 = totals.iter().sum();
    totals.iter().map(|total| if all > 0.0 { total / all } else { 0.0 }).collect()
}

/// Sum over windows of rows `[W, E]`, each times its factor.
fn combined(rows: &[f64], experts: usize, factor: impl Fn(usize) -> f64) -> Vec<f64> {
    let mut sum = vec![0.0; experts];
    for (w, row) in rows.chunks_exact(experts).enumerate() {
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += factor(w) * value;
        }
    }
    sum
}

/// Rounds to a whole number what is below 2^22: added to 1.5 * 2^23, nothing else fits the mantissa.
#[inline(always)]
fn whole(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add(to: &mut [f32], load: &[f32], part: f32, sign: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        *to += sign * whole(load * part);
    }
}

/// Writes a device's `load` with one expert's part less and another's more.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn replace(to: &mut [f32], load: &[f32], leaves: &[f32], enters: &[f32], parts: [f32; 2]) {
    let width = to.len();
    let (load, leaves, enters) = (&load[..width], &leaves[..width], &enters[..width]);
    for w in 0..width {
        to[w] = load[w] - whole(leaves[w] * parts[0]) + whole(enters[w] * parts[1]);
    }
}

/// Sum in an order of additions that no instruction set changes; exact, as values are whole.
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

/// Sum of lanes, halves added to halves: the processor need not wait for one addition after the other.
#[inline(always)]
pub(in crate::layer) fn total(lanes: [f64; LANES]) -> f64 {
    let eight: [f64; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f64; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
