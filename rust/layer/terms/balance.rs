//! The balance term: over windows, how long the slowest device takes, which all others wait for.
//!
//! A window costs what its [`Peak`] is, the largest time, or what the norm of order P over devices is that stands for it
//! ([`Norm`]): `(sum_d time[d]^p)^(1/p)`.

use super::norm::{Norm, exchanged};
use super::peak::Peak;
use super::windows::{Measure, add, deviation};
use crate::layer::slots::Share;
use crate::layer::{Layer, Move, Slots, Split};

/// Loads of devices, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Balance {
    /// Windows, in full vectors.
    width: usize,
    /// Tokens of devices, whole numbers `[D, width]`, and their own variances `[D]`.
    pub(super) load: Vec<f32>,
    own: Vec<i64>,
    /// What a copy serves of its expert where all serve alike: a row each `[E + 1, width]`, and own variances `[E]`.
    served: Vec<f32>,
    own_served: Vec<i64>,
    /// Time of a device per token `[D]`.
    time: Vec<f32>,
    peak: Option<Peak>,
    norm: Option<Norm>,
    /// What devices have that a move touches: tokens `[touched, width]`, and own variances.
    rows: Vec<f32>,
    touched: Vec<(u16, i64)>,
}

impl Balance {
    /// Builds the term for slots; `copies` says of how many each expert's copies are, or will be.
    pub(crate) fn new(layer: &Layer, slots: &Slots, copies: &[u32]) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let is_norm = layer.windows.measure != Measure::Peak;
        let mut balance = Self {
            width,
            load: vec![0.0; d * width],
            own: vec![0; d],
            served: vec![0.0; (layer.experts + 1) * width],
            own_served: vec![0; layer.experts],
            time: layer.site.time.iter().map(|&time| time as f32).collect(),
            peak: (!is_norm).then(|| Peak::new(width)),
            norm: is_norm.then(|| Norm::new(layer)),
            rows: vec![0.0; d * width],
            touched: Vec::new(),
        };
        for (e, &copies) in (0..).zip(copies) {
            balance.serve(layer, e, copies);
            let devices: Vec<u16> = slots.devices(e).collect();
            for &device in &devices {
                let nearest = layer.site.split == Split::Nearest;
                let share =
                    if nearest { layer.site.share(&devices, device) } else { 1.0 / f64::from(copies) };
                balance.own[usize::from(device)] += layer.windows.own(e, share);
                let load = &mut balance.load[usize::from(device) * width..][..width];
                add(load, layer.windows.of(e), share as f32, 1.0);
            }
        }
        let all: Vec<u16> = (0..d as u16).collect();
        balance.follow(layer, &all);
        balance
    }

    /// Notes how many copies share an expert's tokens.
    fn serve(&mut self, layer: &Layer, expert: u16, copies: u32) {
        let (e, part) = (usize::from(expert), 1.0 / f64::from(copies.max(1)));
        let row = &mut self.served[e * self.width..][..self.width];
        row.fill(0.0);
        add(row, layer.windows.of(expert), part as f32, 1.0);
        self.own_served[e] = layer.windows.own(expert, part);
    }

    /// The slowest devices, where they alone are what a window costs.
    pub(in crate::layer) fn peak(&self) -> Option<&Peak> {
        self.peak.as_ref()
    }

    /// Of the placement as it stands.
    pub(crate) fn cost(&self) -> f64 {
        self.peak.as_ref().map_or(0.0, Peak::cost) + self.norm.as_ref().map_or(0.0, Norm::cost)
    }

    /// What the slowest devices cost, whatever stands for them.
    pub(in crate::layer) fn slowest(&self, layer: &Layer) -> f64 {
        let mut peak = Peak::new(self.width);
        peak.refresh(&self.load, &self.time);
        let counts = layer.windows.per_mean.iter().zip(&layer.windows.price);
        peak.times().zip(counts).map(|(time, (per, price))| f64::from(time * per) * f64::from(*price)).sum()
    }

    /// What a move would add to the cost, given the shares that it changes.
    pub(crate) fn change(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) -> f64 {
        if let (Some(norm), Some(pair)) = (&self.norm, exchange(layer, slots, step)) {
            return exchanged(norm, self, pair);
        }
        self.stage(layer, slots, step, shares);
        if let Some(peak) = &self.peak {
            return peak.cost_of(&self.load, &self.rows, &self.touched, &self.time) - peak.cost();
        }
        self.norm.as_ref().map_or(0.0, |norm| norm.change(&self.rows, &self.touched, &self.time))
    }

    /// Follows a move that is to be made, given the shares that it changes.
    pub(crate) fn apply(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) {
        self.stage(layer, slots, step, shares);
        for (row, &(device, own)) in self.rows.chunks_exact(self.width).zip(&self.touched) {
            self.load[usize::from(device) * self.width..][..self.width].copy_from_slice(row);
            self.own[usize::from(device)] = own;
        }
        if let Move::Put(..) = step {
            for edit in slots.edits(step) {
                let copies = slots.copies(edit.expert);
                self.serve(layer, edit.expert, if edit.to.is_some() { copies + 1 } else { copies - 1 });
            }
        }
        let touched: Vec<u16> = self.touched.iter().map(|&(device, _)| device).collect();
        self.follow(layer, &touched);
    }

    /// Of the devices with a free slot, the one whose powers rise least if a copy of an expert comes.
    pub(in crate::layer) fn best_device(
        &self,
        layer: &Layer,
        slots: &Slots,
        e: u16,
        open: &[bool],
    ) -> Option<usize> {
        let norm = self.norm.as_ref()?;
        let mut best = (f32::INFINITY, None);
        for device in (0..open.len()).filter(|&g| open[g] && slots.takes(&layer.site, e, g)) {
            let rise = norm.rise(self, device, usize::from(e), &layer.windows.price);
            if rise < best.0 {
                best = (rise, Some(device));
            }
        }
        best.1
    }

    /// Adds a copy of an expert to a device.
    pub(in crate::layer) fn enter(&mut self, device: usize, expert: u16) {
        let e = usize::from(expert);
        self.own[device] += self.own_served[e];
        let load = &mut self.load[device * self.width..][..self.width];
        add(load, &self.served[e * self.width..][..self.width], 1.0, 1.0);
        if let Some(norm) = &mut self.norm {
            norm.raise(device, load, self.time[device], deviation(self.own[device]) * self.time[device]);
        }
    }

    fn follow(&mut self, layer: &Layer, touched: &[u16]) {
        if let Some(peak) = &mut self.peak {
            peak.refresh(&self.load, &self.time);
        }
        if let Some(norm) = &mut self.norm {
            for &device in touched {
                let g = usize::from(device);
                let load = &self.load[g * self.width..][..self.width];
                norm.raise(g, load, self.time[g], deviation(self.own[g]) * self.time[g]);
            }
            norm.refresh(&layer.windows.price);
        }
    }

    /// Puts the loads of all devices that a move touches into `rows`.
    fn stage(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) {
        self.touched.clear();
        let width = self.width;
        if let Some(Pair { devices: [g, h], rows: [a, b] }) = exchange(layer, slots, step) {
            let own = |row: usize| self.own_served.get(row).copied().unwrap_or(0);
            let more = own(b) - own(a);
            self.touched.extend([(g as u16, self.own[g] + more), (h as u16, self.own[h] - more)]);
            let served = [a, b].map(|row| &self.served[row * width..][..width]);
            let (here, there) = self.rows[..2 * width].split_at_mut(width);
            replace(here, &self.load[g * width..][..width], served);
            replace(there, &self.load[h * width..][..width], [served[1], served[0]]);
            return;
        }
        for &Share { expert, device, before, after } in shares {
            let g = usize::from(device);
            let at = self.touched.iter().position(|of| of.0 == device).unwrap_or_else(|| {
                self.touched.push((device, self.own[g]));
                let at = self.touched.len() - 1;
                self.rows[at * width..][..width].copy_from_slice(&self.load[g * width..][..width]);
                at
            });
            self.touched[at].1 += layer.windows.own(expert, after) - layer.windows.own(expert, before);
            let row = &mut self.rows[at * width..][..width];
            for (part, sign) in [(before, -1.0), (after, 1.0)] {
                if part > 0.0 {
                    add(row, layer.windows.of(expert), part as f32, sign);
                }
            }
        }
    }

    /// A device's tokens, and a row of them that copies serve.
    #[inline(always)]
    pub(super) fn rows(&self, device: usize, row: usize) -> (&[f32], &[f32]) {
        (&self.load[device * self.width..][..self.width], &self.served[row * self.width..][..self.width])
    }

    /// A device's time per token, and the standard deviation of its time if it had one copy more and one less.
    #[inline(always)]
    pub(super) fn unit(&self, device: usize, more: usize, less: usize) -> (f32, f32) {
        let own = |row: usize| self.own_served.get(row).copied().unwrap_or(0);
        let time = self.time[device];
        (time, deviation(self.own[device] + own(more) - own(less)) * time)
    }
}

/// An exchange: devices, and the rows of what they give.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) devices: [usize; 2],
    pub(super) rows: [usize; 2],
}

/// The two devices and experts of an exchange in which copies keep their shares: most moves are one.
#[inline(always)]
pub(super) fn exchange(layer: &Layer, slots: &Slots, step: Move) -> Option<Pair> {
    let Move::Swap(p, q) = step else { return None };
    let experts = [p, q].map(|slot| slots.expert_in[slot]);
    let alike = |e: u16| layer.site.split != Split::Nearest || slots.copies(e) < 2;
    let row = |e: u16| usize::from(e).min(layer.experts);
    (alike(experts[0]) && alike(experts[1]))
        .then(|| Pair { devices: [p, q].map(|slot| slots.device(slot)), rows: experts.map(row) })
}

/// Writes a device's `load` with one row less and another more.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn replace(to: &mut [f32], load: &[f32], served: [&[f32]; 2]) {
    let width = to.len();
    let (load, leaves, enters) = (&load[..width], &served[0][..width], &served[1][..width]);
    for w in 0..width {
        to[w] = load[w] - leaves[w] + enters[w];
    }
}
