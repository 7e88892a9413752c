//! A device's time where weights have to be read: either reading the experts that have tokens, or computing, whichever takes
//! longer.
//!
//! The unit is a token of the slowest device. An expert is active in a window if it has tokens there. A copy that serves a
//! part of them is idle if all tokens go to other copies. Active experts are counted in whole numbers of 2^-16, so that sums
//! are exact.

use super::loads::Loads;
use super::windows::{Windows, chunks, deviation, lanes};
use crate::layer::slots::Share;
use crate::layer::{LANES, Layer, Site, Slots};

/// Units that one active expert counts as.
const ACTIVE: f32 = 65536.0;
/// One more than the number of copies up to which it is cached how active each copy is.
const CACHED: usize = 9;
/// A copy that expects more tokens than this is active for certain, as far as whole numbers tell.
const CERTAIN: f64 = 12.0;

/// Time that weights take, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// Time of a layer, beyond the time to begin with tokens.
    pub base: f64,
    /// Time of every expert that has tokens.
    pub expert: f64,
    /// Share of a token's time that reading does not hide.
    pub exposed: f64,
    /// Time to begin with tokens, on the slowest device.
    pub start: f64,
}

/// Time that weights take in the windows of a layer.
#[derive(Debug, Clone)]
pub struct Reading {
    exposed: f32,
    /// Time to begin with tokens, beyond that of the fastest device `[D]`.
    start: Vec<f32>,
    /// Time of a layer, of a unit of an active expert, and of a token `[width]`.
    base: Vec<f32>,
    expert: Vec<f32>,
    unit: Vec<f32>,
    /// Tokens of a device if all devices end at the same time `[width]`.
    mean: Vec<f32>,
    /// One over the time of a device if all devices end at the same time; zero in empty windows `[width]`.
    pub(super) per_mean: Vec<f32>,
    /// Cost of a norm of one: that time, times the weight of the window `[width]`.
    pub(super) price: Vec<f32>,
}

impl Reading {
    /// Computes the times; nothing where reading never takes longer than the slowest device's tokens and all devices begin
    /// at the same time.
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

/// Active experts of devices, and the longer of reading them and computing their tokens.
#[derive(Debug, Clone)]
pub(super) struct Busy<'a> {
    reading: &'a Reading,
    /// Active experts `[D, width]`.
    active: Vec<f32>,
    /// Time `[D, width]`.
    pub(super) time: Vec<f32>,
    /// Active experts and times of the devices that a candidate touches, in their order `[touched, width]`.
    active_then: Vec<f32>,
    pub(super) time_then: Vec<f32>,
    /// Time per unit of `time` `[D]`: times have the speeds of devices in them already.
    pub(super) ones: Vec<f32>,
    parts: ActiveParts,
}

/// Cache of how active a copy is in every window, by its expert and the number of copies that share evenly `[E, CACHED]`;
/// empty where it was never needed.
#[derive(Debug, Clone)]
struct ActiveParts(Vec<Vec<f32>>);

impl<'a> Busy<'a> {
    /// Counts active experts and times for slots, whose loads are counted already.
    pub(super) fn new(layer: &Layer, reading: &'a Reading, slots: &Slots, loads: &Loads) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let rows = || vec![0.0; d * width];
        let [active, time, active_then, time_then] = [rows(), rows(), rows(), rows()];
        let parts = ActiveParts(vec![vec![]; layer.experts * CACHED]);
        let mut busy = Self { reading, active, time, active_then, time_then, ones: vec![1.0; d], parts };
        for Share { expert, device, after, .. } in layer.copies(slots) {
            let row = &mut busy.active[usize::from(device) * width..][..width];
            busy.parts.add(row, &layer.windows, expert, after, 1.0);
        }
        for g in 0..d {
            let (load, _) = loads.rows(g, 0);
            let (active, time) = (&busy.active[g * width..][..width], &mut busy.time[g * width..][..width]);
            write_times(time, load, active, reading, (g, loads.time[g], loads.variance[g]));
        }
        busy
    }

    /// Counts the devices that a candidate touches, given their tokens then `[touched, width]` and the changed shares.
    pub(super) fn stage(
        &mut self,
        layer: &Layer,
        loads: &Loads,
        (rows, touched): (&[f32], &[(u16, i64)]),
        shares: &[Share],
    ) {
        let width = loads.width;
        for (at, &(device, variance)) in touched.iter().enumerate() {
            let g = usize::from(device);
            let active = &mut self.active_then[at * width..][..width];
            active.copy_from_slice(&self.active[g * width..][..width]);
            for share in shares.iter().filter(|share| share.device == device) {
                self.parts.add(active, &layer.windows, share.expert, share.before, -1.0);
                self.parts.add(active, &layer.windows, share.expert, share.after, 1.0);
            }
            let (load, time) = (&rows[at * width..][..width], &mut self.time_then[at * width..][..width]);
            write_times(time, load, active, self.reading, (g, loads.time[g], variance));
        }
    }

    /// Returns what the time of a device depends on in its `n` vectors of windows.
    #[inline(always)]
    pub(super) fn device(&self, g: usize, n: usize, time: f32, variance: i64) -> Device<'_> {
        let width = n * LANES;
        Device::new(self.reading, lanes(&self.active[g * width..][..width], n), (g, time, variance))
    }

    /// Applies the candidate that was staged.
    pub(super) fn apply(&mut self, touched: &[(u16, i64)], width: usize) {
        for (at, &(device, _)) in touched.iter().enumerate() {
            let [from, to] = [at * width, usize::from(device) * width];
            self.active[to..to + width].copy_from_slice(&self.active_then[from..from + width]);
            self.time[to..to + width].copy_from_slice(&self.time_then[from..from + width]);
        }
    }
}

impl ActiveParts {
    /// Adds to a row how active a copy is that serves a share of its expert's tokens, times a sign.
    fn add(&mut self, to: &mut [f32], windows: &Windows, expert: u16, share: f64, sign: f32) {
        let load = windows.of(expert);
        if share >= 1.0 {
            return add_present(to, load, sign * ACTIVE);
        }
        if share <= 0.0 {
            return;
        }
        let copies = libm::rint(1.0 / share) as usize;
        let is_even = copies < CACHED && share.to_bits() == (1.0 / copies as f64).to_bits();
        let cached = is_even.then(|| &mut self.0[usize::from(expert) * CACHED + copies]);
        if let Some(row) = cached.as_ref().filter(|row| !row.is_empty()) {
            return add_row(to, row, sign);
        }
        let idle = libm::log1p(-share);
        let row = load.iter().zip(&windows.unit).map(|(&load, &unit)| active_part(load, unit, share, idle));
        let row: Vec<f32> = row.collect();
        add_row(to, &row, sign);
        if let Some(cached) = cached {
            *cached = row;
        }
    }
}

/// Returns how active a copy is in a window with a load, of which it serves a share; `idle` is the logarithm of the
/// probability that a token goes to another copy.
fn active_part(load: f32, unit: f32, share: f64, idle: f64) -> f32 {
    if load <= 0.0 {
        return 0.0;
    }
    let tokens = f64::from(load) / f64::from(unit);
    let busy = if tokens * share > CERTAIN { 1.0 } else { 1.0 - libm::exp(tokens * idle) };
    libm::rint(busy * f64::from(ACTIVE)) as f32
}

/// Adds a row, times a sign.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_row(to: &mut [f32], row: &[f32], sign: f32) {
    for (to, &row) in to.iter_mut().zip(row) {
        *to += sign * row;
    }
}

/// Adds an amount in every window in which an expert has load.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_present(to: &mut [f32], load: &[f32], amount: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        *to += if load > 0.0 { amount } else { 0.0 };
    }
}

/// Writes the time of a device in every window, its own deviation included: the longer of computing and reading.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn write_times(
    to: &mut [f32],
    load: &[f32],
    active: &[f32],
    reading: &Reading,
    (g, time, variance): (usize, f32, i64),
) {
    let n = chunks(to);
    let (load, device) = (lanes(load, n), Device::new(reading, lanes(active, n), (g, time, variance)));
    for (at, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for k in 0..LANES {
            to[k] = device.time([at, k], load[at][k], device.active[at][k]);
        }
    }
}

/// What a device's time depends on, beside its tokens.
#[derive(Clone, Copy)]
pub(super) struct Device<'a> {
    active: &'a [[f32; LANES]],
    base: &'a [[f32; LANES]],
    expert: &'a [[f32; LANES]],
    unit: &'a [[f32; LANES]],
    mean: &'a [[f32; LANES]],
    deviation: f32,
    exposed: f32,
    start: f32,
    time: f32,
}

impl<'a> Device<'a> {
    #[inline(always)]
    fn new(reading: &'a Reading, active: &'a [[f32; LANES]], (g, time, variance): (usize, f32, i64)) -> Self {
        let n = active.len();
        Self {
            active,
            base: lanes(&reading.base, n),
            expert: lanes(&reading.expert, n),
            unit: lanes(&reading.unit, n),
            mean: lanes(&reading.mean, n),
            deviation: deviation(variance),
            exposed: reading.exposed,
            start: reading.start[g],
            time,
        }
    }

    /// Returns the time in a window, by its vector and lane, with these tokens and active experts.
    #[inline(always)]
    fn time(&self, [at, k]: [usize; 2], load: f32, active: f32) -> f32 {
        let computed = load + self.deviation * self.mean[at][k];
        let read = self.base[at][k] + self.expert[at][k] * active + self.exposed * load;
        let longer = if computed > read { computed } else { read };
        longer * self.time + self.start * self.unit[at][k]
    }

    /// Returns the time with these tokens after a single copy was exchanged for another one, with tokens of both.
    #[inline(always)]
    pub(super) fn time_after(&self, [at, k]: [usize; 2], load: f32, leaves: f32, enters: f32) -> f32 {
        let is_active = |tokens: f32| if tokens > 0.0 { ACTIVE } else { 0.0 };
        self.time([at, k], load, self.active[at][k] - is_active(leaves) + is_active(enters))
    }
}
