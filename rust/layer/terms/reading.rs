//! A device's time where weights have to be read: the longer of reading the experts that have tokens, and of computing.
//!
//! All is in tokens of the slowest device. An expert is active in a window if it has tokens there; a copy that serves a part
//! of them is idle if all of them go to others. Active experts are whole numbers of 2^-16, so that sums are exact.

use super::loads::Loads;
use super::windows::{Windows, deviation};
use crate::layer::slots::Share;
use crate::layer::{Layer, Site, Slots};

/// What an active expert counts.
const ACTIVE: f32 = 65536.0;
/// Copies of an expert for which it is kept how active each is, and one more.
const KEPT: usize = 9;
/// A copy that expects more tokens than this is active for certain, as far as whole numbers tell.
const CERTAIN: f64 = 12.0;

/// What weights take.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// Of a layer, beyond what it takes to begin with tokens.
    pub base: f64,
    /// Of every expert that has tokens.
    pub expert: f64,
    /// Share of a token's time that reading does not hide.
    pub exposed: f64,
    /// What it takes to begin with tokens, on the slowest device.
    pub start: f64,
}

/// What weights take in the windows of a layer.
#[derive(Debug, Clone)]
pub struct Reading {
    exposed: f32,
    /// Beyond what the fastest device takes to begin with tokens `[D]`.
    start: Vec<f32>,
    /// Of a layer, of an active expert's part, and of a token `[width]`.
    base: Vec<f32>,
    expert: Vec<f32>,
    unit: Vec<f32>,
    /// Tokens of a device where all are done at once `[width]`.
    mean: Vec<f32>,
    /// One over the time of a device where all are done at once; zero in empty windows `[width]`.
    pub(super) per_mean: Vec<f32>,
    /// What a norm of one costs: that time, and how much the window counts `[width]`.
    pub(super) price: Vec<f32>,
}

impl Reading {
    /// Nothing where reading never takes longer than the slowest device's tokens, and devices begin at once.
    #[must_use]
    pub fn new(weights: Weights, windows: &Windows, experts: usize, site: &Site) -> Option<Self> {
        let Weights { base, expert, exposed, start } = weights;
        let (width, rate) = (windows.width, site.rate());
        let used = site.capacity.iter().filter(|&&slots| slots > 0).count().max(1) as f64;
        let largest = site.capacity.iter().copied().max().unwrap_or(0).min(experts) as f64;
        let least = site.time.iter().copied().fold(f64::INFINITY, f64::min);
        let mut reading = Self {
            exposed: exposed as f32,
            start: site.time.iter().map(|time| (start * (time - least)) as f32).collect(),
            base: vec![0.0; width],
            expert: vec![0.0; width],
            unit: vec![0.0; width],
            mean: vec![0.0; width],
            per_mean: vec![0.0; width],
            price: vec![0.0; width],
        };
        let mut matters = reading.start.iter().any(|&start| start > 0.0);
        for w in (0..width).filter(|&w| windows.per_mean[w] > 0.0 && windows.unit[w] > 0.0) {
            let (unit, mean) = (f64::from(windows.unit[w]), 1.0 / f64::from(windows.per_mean[w]));
            let active = (0..experts as u16).filter(|&e| windows.of(e)[w] > 0.0).count() as f64;
            matters |= (base + expert * largest) * unit > (1.0 - exposed) * mean;
            reading.unit[w] = windows.unit[w];
            reading.base[w] = (base * unit) as f32;
            reading.expert[w] = (expert * unit / f64::from(ACTIVE)) as f32;
            reading.mean[w] = mean as f32;
            let read = (base + expert * active / used) * unit * (used / rate) + exposed * mean;
            let even = mean.max(read);
            reading.per_mean[w] = (1.0 / even) as f32;
            reading.price[w] = (even / mean * f64::from(windows.price[w])) as f32;
        }
        matters.then_some(reading)
    }
}

/// Active experts of devices, and what takes longer: reading them, or their tokens.
#[derive(Debug, Clone)]
pub(super) struct Busy<'a> {
    reading: &'a Reading,
    /// `[D, width]`.
    active: Vec<f32>,
    /// `[D, width]`.
    pub(super) time: Vec<f32>,
    /// The same of the devices that a move touches.
    active_then: Vec<f32>,
    pub(super) time_then: Vec<f32>,
    /// Times are of devices of one speed `[D]`.
    pub(super) alike: Vec<f32>,
    parts: Parts,
}

/// How active a copy is in every window, of so many that share an expert's tokens evenly `[E, KEPT]`; empty where nobody
/// has asked. A search asks the same again and again.
#[derive(Debug, Clone)]
struct Parts(Vec<Vec<f32>>);

impl<'a> Busy<'a> {
    /// Of slots, whose tokens are known.
    pub(super) fn new(layer: &Layer, reading: &'a Reading, slots: &Slots, loads: &Loads) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let rows = || vec![0.0; d * width];
        let [active, time, active_then, time_then] = [rows(), rows(), rows(), rows()];
        let parts = Parts(vec![vec![]; layer.experts * KEPT]);
        let mut busy = Self { reading, active, time, active_then, time_then, alike: vec![1.0; d], parts };
        for e in 0..layer.experts as u16 {
            let devices: Vec<u16> = slots.devices(e).collect();
            for &device in &devices {
                let row = &mut busy.active[usize::from(device) * width..][..width];
                busy.parts.add(row, &layer.windows, e, layer.site.share(&devices, device), 1.0);
            }
        }
        for g in 0..d {
            let (load, _) = loads.rows(g, 0);
            let (active, time) = (&busy.active[g * width..][..width], &mut busy.time[g * width..][..width]);
            longer(time, load, active, reading, (g, loads.time[g], loads.own[g]));
        }
        busy
    }

    /// Counts the devices that a move touches, given their tokens then `[touched, width]` and the shares that it changes.
    pub(super) fn stage(
        &mut self,
        layer: &Layer,
        loads: &Loads,
        (rows, touched): (&[f32], &[(u16, i64)]),
        shares: &[Share],
    ) {
        let width = loads.width;
        for (at, &(device, own)) in touched.iter().enumerate() {
            let g = usize::from(device);
            let active = &mut self.active_then[at * width..][..width];
            active.copy_from_slice(&self.active[g * width..][..width]);
            for share in shares.iter().filter(|share| share.device == device) {
                self.parts.add(active, &layer.windows, share.expert, share.before, -1.0);
                self.parts.add(active, &layer.windows, share.expert, share.after, 1.0);
            }
            let (load, time) = (&rows[at * width..][..width], &mut self.time_then[at * width..][..width]);
            longer(time, load, active, self.reading, (g, loads.time[g], own));
        }
    }

    /// Follows the move that was looked at.
    pub(super) fn apply(&mut self, touched: &[(u16, i64)], width: usize) {
        for (at, &(device, _)) in touched.iter().enumerate() {
            let [from, to] = [at * width, usize::from(device) * width];
            self.active[to..to + width].copy_from_slice(&self.active_then[from..from + width]);
            self.time[to..to + width].copy_from_slice(&self.time_then[from..from + width]);
        }
    }
}

impl Parts {
    /// Adds `sign` times how active a copy is that serves a share of its expert's tokens.
    fn add(&mut self, to: &mut [f32], windows: &Windows, expert: u16, share: f64, sign: f32) {
        let load = windows.of(expert);
        if share >= 1.0 {
            return add_present(to, load, sign * ACTIVE);
        }
        if share <= 0.0 {
            return;
        }
        let idle = libm::log1p(-share);
        let part = |(&load, &unit): (&f32, &f32)| active_part(load, unit, share, idle);
        let copies = libm::rint(1.0 / share) as usize;
        if copies < KEPT && share.to_bits() == (1.0 / copies as f64).to_bits() {
            let row = &mut self.0[usize::from(expert) * KEPT + copies];
            if row.is_empty() {
                row.extend(load.iter().zip(&windows.unit).map(part));
            }
            return add_row(to, row, sign);
        }
        for (to, active) in to.iter_mut().zip(load.iter().zip(&windows.unit).map(part)) {
            *to += sign * active;
        }
    }
}

/// How active a copy is in a window that serves a share of so much load; of a token it is `idle` by so much, a logarithm.
fn active_part(load: f32, unit: f32, share: f64, idle: f64) -> f32 {
    if load <= 0.0 {
        return 0.0;
    }
    let tokens = f64::from(load) / f64::from(unit);
    let busy = if tokens * share > CERTAIN { 1.0 } else { 1.0 - libm::exp(tokens * idle) };
    libm::rint(busy * f64::from(ACTIVE)) as f32
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_row(to: &mut [f32], row: &[f32], sign: f32) {
    for (to, &row) in to.iter_mut().zip(row) {
        *to += sign * row;
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_present(to: &mut [f32], load: &[f32], amount: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        *to += if load > 0.0 { amount } else { 0.0 };
    }
}

/// Writes the time of a device, with its own deviation, in every window: of its tokens, or of reading what is active.
fn longer(
    to: &mut [f32],
    load: &[f32],
    active: &[f32],
    reading: &Reading,
    (g, time, own): (usize, f32, i64),
) {
    let Reading { base, expert, unit, mean, .. } = reading;
    longer_of(
        to,
        [load, active, base, expert, unit, mean],
        [time, deviation(own), reading.exposed, reading.start[g]],
    );
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn longer_of(to: &mut [f32], rows: [&[f32]; 6], factors: [f32; 4]) {
    let width = to.len();
    // No closure: it would be compiled for these instruction sets, and `map` for none, so neither into the other.
    let mut rows = rows;
    for row in &mut rows {
        *row = &row[..width];
    }
    let [load, active, base, expert, unit, mean] = rows;
    let [time, deviation, exposed, start] = factors;
    for w in 0..width {
        let computed = load[w] + deviation * mean[w];
        let read = base[w] + expert[w] * active[w] + exposed * load[w];
        let longer = if computed > read { computed } else { read };
        to[w] = longer * time + start * unit[w];
    }
}
