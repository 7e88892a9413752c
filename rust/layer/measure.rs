//! What the loads of devices cost in a window: the largest of them, or a norm that comes close to it.
//!
//! The maximum is what a window costs. A search that minimises it on the windows that it has seen fits their noise: it
//! leaves all other devices just below the slowest one of each window. The norm of order p, `(sum_d load[d]^p)^(1/p)`,
//! also sees those, and does better on windows that nobody has seen (bench/RESULTS.md). It is minimised by
//! majorisation: the root is concave, so its tangent at the present placement bounds what a move adds from above, and
//! only the powers of two devices need to be known.

// Numbers of devices are compared, which are whole.
#![allow(clippy::float_cmp)]

use super::balance::{LANES, sum, total};
use super::likely::{Likely, Spread};

#[derive(Debug, Clone)]
pub(crate) enum Measure {
    Peak(Peak),
    Norm(Norm),
}

impl Measure {
    /// Of devices' loads `[D, width]` in windows with as many tokens as `totals` says `[width]`; a norm also of what
    /// other windows may bring.
    pub(crate) fn new(norm: u32, load: &[f32], totals: &[f32], likely: Option<&Likely>) -> Self {
        match norm {
            0 => Self::Peak(Peak::new(load, totals.len())),
            order => Self::Norm(Norm::new(order, load, totals, likely)),
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

/// Powers of loads over their window's mean.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    order: u32,
    /// One over the mean load of every window; zero in empty ones.
    per_mean: Vec<f32>,
    /// `(load / mean)^order` `[D, width]`.
    power: Vec<f32>,
    /// Slope of the norm in the sum of powers, times the mean `[width]`.
    slope: Vec<f32>,
    /// Of what other windows may bring.
    spread: Option<Spread>,
    /// Share of the cost that those seen have.
    seen: f32,
    cost: f64,
}

impl Norm {
    fn new(order: u32, load: &[f32], totals: &[f32], likely: Option<&Likely>) -> Self {
        let width = totals.len();
        let devices = load.len() / width;
        let per_mean: Vec<f32> =
            totals.iter().map(|&total| if total > 0.0 { devices as f32 / total } else { 0.0 }).collect();
        let spread = likely.map(|likely| Spread::new(likely, &per_mean, devices));
        let (power, slope) = (vec![0.0; load.len()], vec![0.0; width]);
        let seen = likely.map_or(1.0, |likely| 1.0 - likely.weight as f32);
        let mut norm = Self { order, per_mean, power, slope, spread, seen, cost: 0.0 };
        let all: Vec<u16> = (0..devices as u16).collect();
        norm.refresh(load, &all);
        norm
    }

    fn change(&self, rows: &[f32], touched: &[u16]) -> f64 {
        let width = self.slope.len();
        let mut change = 0.0;
        for (row, &device) in rows.chunks_exact(width).zip(touched) {
            let power = &self.power[usize::from(device) * width..][..width];
            change += match self.order {
                4 => risen::<4>(row, power, &self.per_mean, &self.slope),
                8 => risen::<8>(row, power, &self.per_mean, &self.slope),
                _ => risen::<16>(row, power, &self.per_mean, &self.slope),
            };
            if let Some(spread) = &self.spread {
                change += spread.change(row, device);
            }
        }
        change
    }

    fn refresh(&mut self, load: &[f32], touched: &[u16]) {
        let width = self.slope.len();
        for &device in touched {
            let at = usize::from(device) * width;
            let (row, power) = (&load[at..][..width], &mut self.power[at..][..width]);
            match self.order {
                4 => raised::<4>(power, row, &self.per_mean),
                8 => raised::<8>(power, row, &self.per_mean),
                _ => raised::<16>(power, row, &self.per_mean),
            }
            if let Some(spread) = &mut self.spread {
                spread.follow(row, device);
            }
        }
        self.cost = slopes(&mut self.slope, &self.power, &self.per_mean, self.order, self.seen);
        if let Some(spread) = &mut self.spread {
            self.cost += spread.cost();
        }
    }
}

/// Beyond this many times the mean, a load counts as this: powers of order 16 stay finite.
const MOST: f32 = 128.0;

/// x^P by squaring.
#[inline(always)]
pub(super) fn raise_to<const P: u32>(x: f32) -> f32 {
    let x = if x < MOST { x } else { MOST };
    let square = x * x;
    let fourth = square * square;
    match P {
        4 => fourth,
        8 => fourth * fourth,
        _ => (fourth * fourth) * (fourth * fourth),
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn risen<const P: u32>(row: &[f32], power: &[f32], per_mean: &[f32], slope: &[f32]) -> f64 {
    let mut sums = [0.0f32; LANES];
    let width = row.len() / LANES * LANES;
    let (power, per_mean, slope) = (&power[..width], &per_mean[..width], &slope[..width]);
    for at in (0..width).step_by(LANES) {
        for lane in 0..LANES {
            let w = at + lane;
            sums[lane] += (raise_to::<P>(row[w] * per_mean[w]) - power[w]) * slope[w];
        }
    }
    total(sums.map(f64::from))
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn raised<const P: u32>(power: &mut [f32], row: &[f32], per_mean: &[f32]) {
    for ((power, &x), &per_mean) in power.iter_mut().zip(row).zip(per_mean) {
        *power = raise_to::<P>(x * per_mean);
    }
}

/// Writes every window's slope and gives the sum of norms, times `price`: with s the sum of powers, `mean * s^(1/p)`,
/// whose slope in s is `mean * s^(1/p) / (p * s)`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn slopes(slope: &mut [f32], power: &[f32], per_mean: &[f32], order: u32, price: f32) -> f64 {
    let mut cost = [0.0f64; LANES];
    let width = slope.len() / LANES * LANES;
    let per_mean = &per_mean[..width];
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
            let fourth = sums[lane].sqrt().sqrt();
            let eighth = fourth.sqrt();
            let root = match order {
                4 => fourth,
                8 => eighth,
                _ => eighth.sqrt(),
            };
            let used = per_mean[w] > 0.0;
            let norm = if used { price * root / per_mean[w] } else { 0.0 };
            slope[w] = if used { norm / (order as f32 * sums[lane]) } else { 0.0 };
            cost[lane] += f64::from(norm);
        }
    }
    total(cost)
}
