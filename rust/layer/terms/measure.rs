//! What the loads of devices cost in a window: the largest of them, or a norm that comes close to it.
//!
//! The maximum is what a window costs. A search that minimises it on the windows that it has seen fits their noise: it
//! leaves all other devices just below the slowest one of each window. The norm of order p, `(sum_d load[d]^p)^(1/p)`,
//! also sees those, and does better on windows that nobody has seen (bench/RESULTS.md). It is minimised by
//! majorisation: the root is concave, so its tangent at the present placement bounds what a move adds from above, and
//! only the powers of two devices need to be known.

// Numbers of devices are compared, which are whole.
#![allow(clippy::float_cmp)]

use super::windows::{LANES, Windows, sum, total};

#[derive(Debug, Clone)]
pub(crate) enum Measure {
    Peak(Peak),
    Norm(Norm),
}

impl Measure {
    /// Of devices' loads `[D, row]` in windows with as many tokens as `totals` says `[width]`.
    pub(crate) fn new(windows: &Windows, load: &[f32], totals: &[f32]) -> Self {
        if windows.norm == 0 {
            Self::Peak(Peak::new(load, totals.len()))
        } else {
            Self::Norm(Norm::new(windows, load, totals))
        }
    }

    pub(crate) fn cost(&self) -> f64 {
        match self {
            Self::Peak(peak) => peak.cost,
            Self::Norm(norm) => norm.cost,
        }
    }

    /// What it adds to the cost when devices `touched` have loads `rows` instead.
    pub(crate) fn change(&self, load: &[f32], rows: &[f32], touched: &[u16]) -> f64 {
        match self {
            Self::Peak(peak) => peak.cost_of(load, rows, touched) - peak.cost,
            Self::Norm(norm) => norm.change(rows, touched),
        }
    }

    /// Follows a change of the loads of devices `touched`.
    pub(crate) fn follow(&mut self, load: &[f32], touched: &[u16]) {
        match self {
            Self::Peak(peak) => peak.refresh(load),
            Self::Norm(norm) => norm.refresh(load, touched),
        }
    }
}

/// The three largest loads of every window and the devices of the first two: what is left when two devices change.
#[derive(Debug, Clone)]
pub(crate) struct Peak {
    first: Vec<f32>,
    second: Vec<f32>,
    third: Vec<f32>,
    first_device: Vec<f32>,
    second_device: Vec<f32>,
    cost: f64,
}

impl Peak {
    fn new(load: &[f32], width: usize) -> Self {
        let zero = || vec![0.0; width];
        let mut peak = Self {
            first: zero(),
            second: zero(),
            third: zero(),
            first_device: zero(),
            second_device: zero(),
            cost: 0.0,
        };
        peak.refresh(load);
        peak
    }

    /// Windows with the device that is the slowest there, and by how much it is.
    pub(crate) fn slowest(&self) -> impl Iterator<Item = (usize, usize, f64)> + '_ {
        let lead = self.first.iter().zip(&self.second).map(|(&first, &second)| f64::from(first - second));
        let all = self.first_device.iter().zip(lead).enumerate();
        all.filter(|(_, (device, _))| **device >= 0.0)
            .map(|(window, (&device, lead))| (window, device as usize, lead))
    }

    fn refresh(&mut self, load: &[f32]) {
        largest_three(self, load);
        self.cost = sum(&self.first);
    }

    fn cost_of(&self, load: &[f32], rows: &[f32], touched: &[u16]) -> f64 {
        let width = self.first.len();
        match touched {
            [] => self.cost,
            &[g] => one_changed(self, &rows[..width], f32::from(g)),
            &[g, h] => two_changed(self, &rows[..width], &rows[width..][..width], f32::from(g), f32::from(h)),
            _ => {
                let mut most = vec![0.0; width];
                for (device, row) in load.chunks_exact(width).enumerate() {
                    let at = touched.iter().position(|&touched| usize::from(touched) == device);
                    raise(&mut most, at.map_or(row, |at| &rows[at * width..][..width]));
                }
                sum(&most)
            }
        }
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn raise(to: &mut [f32], from: &[f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = if from > *to { from } else { *to };
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn one_changed(peak: &Peak, row: &[f32], g: f32) -> f64 {
    let mut sums = [0.0f64; LANES];
    let width = row.len() / LANES * LANES;
    let (first, second, first_device) =
        (&peak.first[..width], &peak.second[..width], &peak.first_device[..width]);
    for at in (0..width).step_by(LANES) {
        for lane in 0..LANES {
            let w = at + lane;
            let rest = if first_device[w] == g { second[w] } else { first[w] };
            sums[lane] += f64::from(if row[w] > rest { row[w] } else { rest });
        }
    }
    total(sums)
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn two_changed(peak: &Peak, here: &[f32], there: &[f32], g: f32, h: f32) -> f64 {
    let mut sums = [0.0f64; LANES];
    let width = here.len() / LANES * LANES;
    let there = &there[..width];
    let (first, second, third) = (&peak.first[..width], &peak.second[..width], &peak.third[..width]);
    let (first_device, second_device) = (&peak.first_device[..width], &peak.second_device[..width]);
    for at in (0..width).step_by(LANES) {
        let mut most = [0.0f32; LANES];
        for lane in 0..LANES {
            let w = at + lane;
            let (f, s) = (first_device[w], second_device[w]);
            let rest = if s != g && s != h { second[w] } else { third[w] };
            let rest = if f != g && f != h { first[w] } else { rest };
            let new = if here[w] > there[w] { here[w] } else { there[w] };
            most[lane] = if new > rest { new } else { rest };
        }
        for lane in 0..LANES {
            sums[lane] += f64::from(most[lane]);
        }
    }
    total(sums)
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn largest_three(peak: &mut Peak, load: &[f32]) {
    let width = peak.first.len();
    for at in (0..width).step_by(LANES) {
        let mut value = [[0.0f32; LANES]; 3];
        let mut device = [[-1.0f32; LANES]; 2];
        for (d, row) in load.chunks_exact(width).enumerate() {
            let row = &row[at..][..LANES];
            let d = d as f32;
            for lane in 0..LANES {
                let x = row[lane];
                let [one, two, three] = [value[0][lane], value[1][lane], value[2][lane]];
                let (beats_one, beats_two) = (x > one, x > two);
                let third = if x > three { x } else { three };
                let second = if beats_two { x } else { two };
                let of_second = if beats_two { d } else { device[1][lane] };
                value[2][lane] = if beats_two { two } else { third };
                value[1][lane] = if beats_one { one } else { second };
                device[1][lane] = if beats_one { device[0][lane] } else { of_second };
                value[0][lane] = if beats_one { x } else { one };
                device[0][lane] = if beats_one { d } else { device[0][lane] };
            }
        }
        peak.first[at..][..LANES].copy_from_slice(&value[0]);
        peak.second[at..][..LANES].copy_from_slice(&value[1]);
        peak.third[at..][..LANES].copy_from_slice(&value[2]);
        peak.first_device[at..][..LANES].copy_from_slice(&device[0]);
        peak.second_device[at..][..LANES].copy_from_slice(&device[1]);
    }
}

/// Powers of loads over their window's mean; with noise, of loads and a deviation.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    order: u32,
    /// One over the mean load of every window; zero in empty ones `[width]`.
    per_mean: Vec<f32>,
    /// Variance in squares of the mean load, per unit `[width]`; empty without noise.
    per_own: Vec<f32>,
    /// `(load / mean)^order` `[D, width]`.
    power: Vec<f32>,
    /// What a norm of one costs: the mean load, and how much the window counts `[width]`.
    price: Vec<f32>,
    /// Slope of the norm in the sum of powers, times its price `[width]`.
    slope: Vec<f32>,
    cost: f64,
}

impl Norm {
    fn new(windows: &Windows, load: &[f32], totals: &[f32]) -> Self {
        let (width, devices) = (totals.len(), load.len() / windows.row);
        let per_mean =
            totals.iter().map(|&total| if total > 0.0 { devices as f32 / total } else { 0.0 }).collect();
        let per_own =
            windows.own_unit.iter().map(|unit| (unit * (devices * devices) as f64) as f32).collect();
        let price = totals
            .iter()
            .zip(&windows.emphasis)
            .map(|(&total, emphasis)| (f64::from(total) / devices as f64 * emphasis) as f32)
            .collect();
        let (power, slope) = (vec![0.0; devices * width], vec![0.0; width]);
        let mut norm = Self { order: windows.norm, per_mean, per_own, power, price, slope, cost: 0.0 };
        let all: Vec<u16> = (0..devices as u16).collect();
        norm.refresh(load, &all);
        norm
    }

    /// Length of a device's row.
    fn row(&self) -> usize {
        self.per_mean.len() + self.per_own.len()
    }

    fn change(&self, rows: &[f32], touched: &[u16]) -> f64 {
        let width = self.slope.len();
        let mut sums = [0.0; LANES];
        for (row, &device) in rows.chunks_exact(self.row()).zip(touched) {
            let power = &self.power[usize::from(device) * width..][..width];
            let (units, slope) = ((&self.per_mean[..], &self.per_own[..]), &self.slope[..]);
            let sums = &mut sums;
            match (self.order, self.per_own.is_empty()) {
                (2, true) => risen::<2, false>(sums, row, power, units, slope),
                (2, false) => risen::<2, true>(sums, row, power, units, slope),
                (4, true) => risen::<4, false>(sums, row, power, units, slope),
                (4, false) => risen::<4, true>(sums, row, power, units, slope),
                (8, true) => risen::<8, false>(sums, row, power, units, slope),
                (8, false) => risen::<8, true>(sums, row, power, units, slope),
                (_, true) => risen::<16, false>(sums, row, power, units, slope),
                (_, false) => risen::<16, true>(sums, row, power, units, slope),
            }
        }
        total(sums.map(f64::from))
    }

    fn refresh(&mut self, load: &[f32], touched: &[u16]) {
        let (width, length) = (self.slope.len(), self.row());
        for &device in touched {
            let row = &load[usize::from(device) * length..][..length];
            let power = &mut self.power[usize::from(device) * width..][..width];
            let units = (&self.per_mean[..], &self.per_own[..]);
            match self.order {
                2 => raised::<2>(power, row, units),
                4 => raised::<4>(power, row, units),
                8 => raised::<8>(power, row, units),
                _ => raised::<16>(power, row, units),
            }
        }
        self.cost = slopes(&mut self.slope, &self.power, &self.price, self.order);
    }
}

/// Beyond this many times the mean, a load counts as this: powers of order 16 stay finite.
const MOST: f32 = 128.0;

/// x^P by squaring.
#[inline(always)]
fn raise_to<const P: u32>(x: f32) -> f32 {
    let x = if x < MOST { x } else { MOST };
    let square = x * x;
    let fourth = square * square;
    match P {
        2 => square,
        4 => fourth,
        8 => fourth * fourth,
        _ => (fourth * fourth) * (fourth * fourth),
    }
}

/// Adds to `sums` what the powers of a device's row rise by, times their slopes; `units` are those of loads and of
/// variances.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn risen<const P: u32, const NOISY: bool>(
    sums: &mut [f32; LANES],
    row: &[f32],
    power: &[f32],
    units: (&[f32], &[f32]),
    slope: &[f32],
) {
    let width = power.len() / LANES * LANES;
    let (load, own) = row.split_at(width);
    // Without noise these are not looked at.
    let (own, per_own) = if NOISY { (own, units.1) } else { (load, units.0) };
    let (own, per_own) = (&own[..width], &per_own[..width]);
    let (power, per_mean, slope) = (&power[..width], &units.0[..width], &slope[..width]);
    for at in (0..width).step_by(LANES) {
        for lane in 0..LANES {
            let w = at + lane;
            let deviation = if NOISY { (own[w] * per_own[w]).sqrt() } else { 0.0 };
            sums[lane] += (raise_to::<P>(load[w] * per_mean[w] + deviation) - power[w]) * slope[w];
        }
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn raised<const P: u32>(power: &mut [f32], row: &[f32], units: (&[f32], &[f32])) {
    let width = power.len();
    let (load, own) = row.split_at(width);
    for w in 0..width {
        let deviation = if own.is_empty() { 0.0 } else { (own[w] * units.1[w]).sqrt() };
        power[w] = raise_to::<P>(load[w] * units.0[w] + deviation);
    }
}

/// Writes every window's slope and gives the sum of norms: with s the sum of powers, `price * s^(1/p)`, whose slope in s
/// is `price * s^(1/p) / (p * s)`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn slopes(slope: &mut [f32], power: &[f32], price: &[f32], order: u32) -> f64 {
    let mut cost = [0.0f64; LANES];
    let width = slope.len() / LANES * LANES;
    let price = &price[..width];
    for at in (0..width).step_by(LANES) {
        let mut sums = [0.0f32; LANES];
        for device in power.chunks_exact(width) {
            let powers = &device[at..][..LANES];
            for lane in 0..LANES {
                sums[lane] += powers[lane];
            }
        }
        for lane in 0..LANES {
            let w = at + lane;
            let square = sums[lane].sqrt();
            let fourth = square.sqrt();
            let eighth = fourth.sqrt();
            let root = match order {
                2 => square,
                4 => fourth,
                8 => eighth,
                _ => eighth.sqrt(),
            };
            let norm = root * price[w];
            slope[w] = if price[w] > 0.0 { norm / (order as f32 * sums[lane]) } else { 0.0 };
            cost[lane] += f64::from(norm);
        }
    }
    total(cost)
}
