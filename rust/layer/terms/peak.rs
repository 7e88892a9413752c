//! The largest device time of every window, and what it becomes when some devices change.

// Numbers of devices are compared, which are whole.
#![allow(clippy::float_cmp)]

use super::windows::{chunks, lanes, sum, total};
use crate::layer::LANES;

type Vector = [f32; LANES];

/// The three largest times of every window, and the devices of the first two: enough to price a change of two devices.
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
    /// Builds the peak of so many windows without load.
    pub(super) fn new(width: usize) -> Self {
        let [first, second, third] = std::array::from_fn(|_| vec![0.0; width]);
        let (first_device, second_device) = (vec![-1.0; width], vec![-1.0; width]);
        Self { first, second, third, first_device, second_device, cost: 0.0 }
    }

    /// Returns the sum of the largest times.
    pub(super) fn cost(&self) -> f64 {
        self.cost
    }

    /// Returns the time of the slowest device of every window.
    pub(super) fn times(&self) -> impl Iterator<Item = f32> + '_ {
        self.first.iter().copied()
    }

    /// Returns the slowest device of a window, if the window has load.
    pub(in crate::layer) fn slowest_in(&self, window: usize) -> Option<usize> {
        let device = self.first_device[window];
        (device >= 0.0).then_some(device as usize)
    }

    /// Returns windows with their slowest device, and its lead over the second.
    pub(in crate::layer) fn slowest(&self) -> impl Iterator<Item = (usize, usize, f64)> + '_ {
        let lead = self.first.iter().zip(&self.second).map(|(&first, &second)| f64::from(first - second));
        let all = self.first_device.iter().zip(lead).enumerate();
        all.filter(|(_, (device, _))| **device >= 0.0)
            .map(|(window, (&device, lead))| (window, device as usize, lead))
    }

    /// Recomputes the peak from tokens of devices `[D, width]` and their times per token `[D]`.
    pub(super) fn refresh(&mut self, load: &[f32], time: &[f32]) {
        largest_three(self, load, time);
        self.cost = sum(&self.first);
    }

    /// Returns the cost if the `touched` devices have `rows` of tokens instead.
    pub(super) fn cost_of(&self, load: &[f32], rows: &[f32], touched: &[(u16, i64)], time: &[f32]) -> f64 {
        let width = self.first.len();
        let time_at = |at: usize| {
            let device = touched[at].0;
            (&rows[at * width..][..width], f32::from(device), time[usize::from(device)])
        };
        match touched.len() {
            // One changed device is passed twice.
            1 => cost_of_two(self, time_at(0), time_at(0)),
            2 => cost_of_two(self, time_at(0), time_at(1)),
            _ => {
                let mut largest = vec![0.0; width];
                for (device, (row, &time)) in load.chunks_exact(width).zip(time).enumerate() {
                    let at = touched.iter().position(|row_of| usize::from(row_of.0) == device);
                    raise(&mut largest, at.map_or(row, |at| &rows[at * width..][..width]), time);
                }
                sum(&largest)
            }
        }
    }
}

/// Raises values to the times of a device where these are larger.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn raise(to: &mut [f32], load: &[f32], time: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        let from = load * time;
        *to = if from > *to { from } else { *to };
    }
}

/// Returns the cost if two devices have other rows of tokens; each comes with its number and time per token.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn cost_of_two(peak: &Peak, one: (&[f32], f32, f32), other: (&[f32], f32, f32)) -> f64 {
    let ((load_g, g, time_g), (load_h, h, time_h)) = (one, other);
    let n = chunks(load_g);
    let (load_g, load_h) = (lanes(load_g, n), lanes(load_h, n));
    let (first, second, third) = (lanes(&peak.first, n), lanes(&peak.second, n), lanes(&peak.third, n));
    let (first_device, second_device) = (lanes(&peak.first_device, n), lanes(&peak.second_device, n));
    let mut sums = [0.0f64; LANES];
    for at in 0..n {
        let mut largest = [0.0f32; LANES];
        for k in 0..LANES {
            // All are read: a choice of what to read is no vector instruction.
            let [one, two, three] = [first[at][k], second[at][k], third[at][k]];
            let (f, s) = (first_device[at][k], second_device[at][k]);
            let rest = if s != g && s != h { two } else { three };
            let rest = if f != g && f != h { one } else { rest };
            let (then_g, then_h) = (load_g[at][k] * time_g, load_h[at][k] * time_h);
            let new = if then_g > then_h { then_g } else { then_h };
            largest[k] = if new > rest { new } else { rest };
        }
        for k in 0..LANES {
            sums[k] += f64::from(largest[k]);
        }
    }
    total(sums)
}

/// Writes the three largest times of every window, and the devices of the first two.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn largest_three(peak: &mut Peak, load: &[f32], time: &[f32]) {
    let (width, n) = (peak.first.len(), chunks(&peak.first));
    for at in 0..n {
        let [mut one, mut two, mut three] = [[0.0f32; LANES]; 3];
        let [mut of_one, mut of_two] = [[-1.0f32; LANES]; 2];
        for (d, (row, &time)) in load.chunks_exact(width).zip(time).enumerate() {
            let (row, mut x, d) = (&lanes(row, n)[at], [0.0; LANES], [d as f32; LANES]);
            for k in 0..LANES {
                x[k] = row[k] * time;
            }
            three = choose(&x, &two, two, choose(&x, &three, x, three));
            of_two = choose(&x, &one, of_one, choose(&x, &two, d, of_two));
            two = choose(&x, &one, one, choose(&x, &two, x, two));
            of_one = choose(&x, &one, d, of_one);
            one = choose(&x, &one, x, one);
        }
        let rows = [&mut peak.first, &mut peak.second, &mut peak.third];
        let devices = [&mut peak.first_device, &mut peak.second_device];
        for (row, values) in rows.into_iter().chain(devices).zip([one, two, three, of_one, of_two]) {
            row[at * LANES..][..LANES].copy_from_slice(&values);
        }
    }
}

/// Returns the numbers of one vector where `x` is larger than `than`, else those of another.
///
/// Steps that are loops over a vector leave all in registers; one loop over all steps, or a closure, takes five times as long.
#[inline(always)]
fn choose(x: &Vector, than: &Vector, mut one: Vector, other: Vector) -> Vector {
    for k in 0..LANES {
        one[k] = if x[k] > than[k] { one[k] } else { other[k] };
    }
    one
}
