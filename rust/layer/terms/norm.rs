//! The norm over devices that stands for the largest load of a window.
//!
//! A window costs its maximum. A search that minimises it on the windows seen fits their noise: it leaves all other devices
//! just below the slowest one of each window. The norm of order P counts those, too, and does better on unseen windows
//! ("Unseen windows" in docs/experiments.md). It is minimised by majorisation: the root is concave, so
//! its tangent at the present placement bounds what a move adds from above, and only the powers of two devices need to be
//! known.
//!
//! The load of a window is mostly a mixture of the loads of other windows: a placement that balances those balances every
//! mixture. The rest is each expert's own and adds up on a device like noise: variances add, times the squares of the
//! copies' shares. So in every window a device counts its load plus the standard deviation of that rest. `FlashLB` of
//! `vllm-ascend` scores devices in the same way, by the mean plus z standard deviations.

use super::loads::Loads;
use super::windows::{chunks, lanes, total};
use crate::layer::LANES;

/// Order of the norm.
const ORDER: f32 = 8.0;
/// Beyond this many times the mean, a load counts as this: powers stay finite.
const MOST: f32 = 128.0;

/// Powers of loads over their window's mean, deviations included, and the tangent of the norms.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    /// One over the mean of every window `[width]`.
    pub(super) per_mean: Vec<f32>,
    /// Powers of all devices `[D, width]`.
    power: Vec<f32>,
    /// Slope of the norm in the sum of powers, times its price `[width]`.
    pub(super) slope: Vec<f32>,
    cost: f64,
}

impl Norm {
    /// Builds the norm of so many devices, with one over the mean of every window `[width]`.
    pub(super) fn new(devices: usize, per_mean: &[f32]) -> Self {
        let width = per_mean.len();
        let power = vec![0.0; devices * width];
        Self { per_mean: per_mean.to_vec(), power, slope: vec![0.0; width], cost: 0.0 }
    }

    /// Returns the sum of norms, each times the price of its window.
    pub(super) fn cost(&self) -> f64 {
        self.cost
    }

    /// Returns the powers of a device `[width]`.
    #[inline(always)]
    pub(super) fn of(&self, device: usize) -> &[f32] {
        &self.power[device * self.slope.len()..][..self.slope.len()]
    }

    /// Returns the cost that is added if the touched devices have other rows of tokens and own variances; `unit` returns a
    /// device's time per token and its deviation.
    pub(super) fn change(
        &self,
        rows: &[f32],
        touched: &[(u16, i64)],
        unit: impl Fn(u16, i64) -> (f32, f32),
    ) -> f64 {
        let mut sums = [0.0; LANES];
        for (row, &(device, variance)) in rows.chunks_exact(self.slope.len()).zip(touched) {
            let power = self.of(usize::from(device));
            add_rise(&mut sums, row, [power, &self.per_mean, &self.slope], unit(device, variance));
        }
        f64::from(total(sums))
    }

    /// Recomputes a device's powers from its tokens, its time per token and its deviation.
    pub(super) fn set_load(&mut self, device: usize, load: &[f32], unit: (f32, f32)) {
        let power = &mut self.power[device * load.len()..][..load.len()];
        compute_powers(power, load, &self.per_mean, unit);
    }

    /// Recomputes slopes and cost.
    pub(super) fn refresh(&mut self, price: &[f32]) {
        self.cost = slopes(&mut self.slope, &self.power, price);
    }
}

/// Returns a time to the power of the norm's order.
#[inline(always)]
pub(super) fn power_of(x: f32) -> f32 {
    let x = if x < MOST { x } else { MOST };
    let square = x * x;
    let fourth = square * square;
    fourth * fourth
}

/// Adds to `sums` the rise of the powers of a device's row, times slopes; `rows` are its powers, one over the windows' means,
/// and slopes.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_rise(sums: &mut [f32; LANES], load: &[f32], rows: [&[f32]; 3], (time, deviation): (f32, f32)) {
    let n = chunks(load);
    let (load, power) = (lanes(load, n), lanes(rows[0], n));
    let (per_mean, slope) = (lanes(rows[1], n), lanes(rows[2], n));
    for at in 0..n {
        for k in 0..LANES {
            let now = power_of(load[at][k] * per_mean[at][k] * time + deviation);
            sums[k] += (now - power[at][k]) * slope[at][k];
        }
    }
}

/// Returns the device, of those that `may` take a copy of an expert, whose powers times the windows' prices rise least.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(super) fn best_device(
    norm: &Norm,
    loads: &Loads,
    expert: usize,
    price: &[f32],
    may: &[bool],
) -> Option<usize> {
    let n = chunks(price);
    let (per_mean, price) = (lanes(&norm.per_mean, n), lanes(price, n));
    let empty = loads.empty_row();
    let mut best = (f32::INFINITY, None);
    for device in 0..may.len() {
        if !may[device] {
            continue;
        }
        let (load, served) = loads.rows(device, expert);
        let (load, served, power) = (lanes(load, n), lanes(served, n), lanes(norm.of(device), n));
        let (time, deviation) = loads.unit(device, loads.variance_after(device, expert, empty));
        let mut sums = [0.0f32; LANES];
        for at in 0..n {
            for k in 0..LANES {
                let then = power_of((load[at][k] + served[at][k]) * per_mean[at][k] * time + deviation);
                sums[k] += (then - power[at][k]) * price[at][k];
            }
        }
        let rise = total(sums);
        if rise < best.0 {
            best = (rise, Some(device));
        }
    }
    best.1
}

/// Writes the powers of a device's loads over the windows' means.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn compute_powers(power: &mut [f32], load: &[f32], per_mean: &[f32], (time, deviation): (f32, f32)) {
    let (load, per_mean) = (&load[..power.len()], &per_mean[..power.len()]);
    for w in 0..power.len() {
        power[w] = power_of(load[w] * per_mean[w] * time + deviation);
    }
}

/// Writes every window's slope and returns the sum of norms: with s the sum of powers, `price * s^(1/p)`, whose slope in s
/// is `price * s^(1/p) / (p * s)`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn slopes(slope: &mut [f32], power: &[f32], price: &[f32]) -> f64 {
    let mut cost = [0.0f64; LANES];
    let (width, n) = (slope.len(), chunks(slope));
    let (slope, price) = (&mut slope.as_chunks_mut::<LANES>().0[..n], lanes(price, n));
    for at in 0..n {
        let mut sums = [0.0f32; LANES];
        for device in power.chunks_exact(width) {
            let powers = &lanes(device, n)[at];
            for k in 0..LANES {
                sums[k] += powers[k];
            }
        }
        for k in 0..LANES {
            let norm = sums[k].sqrt().sqrt().sqrt() * price[at][k];
            slope[at][k] = if sums[k] > 0.0 { norm / (ORDER * sums[k]) } else { 0.0 };
            cost[k] += f64::from(norm);
        }
    }
    total(cost)
}
