//! The balance term: over windows, how long the slowest device takes, which all others wait for.
//!
//! A window costs what its [`Peak`] is, the largest time, or what the norm of order P over devices is that stands for it
//! ([`Norm`]): `(sum_d time[d]^p)^(1/p)`.

use super::loads::{Loads, Pair};
use super::norm::{Norm, entered, exchanged};
use super::peak::Peak;
use super::windows::{Measure, add};
use crate::layer::slots::Share;
use crate::layer::{Layer, Move, Slots, Split};

/// Loads of devices, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Balance {
    loads: Loads,
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
            loads: Loads::new(layer, slots, copies),
            peak: (!is_norm).then(|| Peak::new(width)),
            norm: is_norm.then(|| Norm::new(layer)),
            rows: vec![0.0; d * width],
            touched: Vec::new(),
        };
        balance.follow(layer, 0..d);
        balance
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
        let mut peak = Peak::new(self.loads.width);
        peak.refresh(&self.loads.load, &self.loads.time);
        let counts = layer.windows.per_mean.iter().zip(&layer.windows.price);
        peak.times().zip(counts).map(|(time, (per, price))| f64::from(time * per) * f64::from(*price)).sum()
    }

    /// What a move would add to the cost, given the shares that it changes.
    pub(crate) fn change(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) -> f64 {
        if let (Some(norm), Some(pair)) = (&self.norm, exchange(layer, slots, step)) {
            return exchanged(norm, &self.loads, pair);
        }
        self.stage(layer, slots, step, shares);
        if let Some(peak) = &self.peak {
            let Loads { load, time, .. } = &self.loads;
            return peak.cost_of(load, &self.rows, &self.touched, time) - peak.cost();
        }
        self.norm.as_ref().map_or(0.0, |norm| norm.change(&self.rows, &self.touched, &self.loads))
    }

    /// Follows a move that is to be made, given the shares that it changes.
    pub(crate) fn apply(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) {
        self.stage(layer, slots, step, shares);
        let width = self.loads.width;
        for (row, &(device, own)) in self.rows.chunks_exact(width).zip(&self.touched) {
            self.loads.load[usize::from(device) * width..][..width].copy_from_slice(row);
            self.loads.own[usize::from(device)] = own;
        }
        if let Move::Put(..) = step {
            for edit in slots.edits(step) {
                let copies = slots.copies(edit.expert);
                self.loads.serve(layer, edit.expert, if edit.to.is_some() { copies + 1 } else { copies - 1 });
            }
        }
        let touched: Vec<usize> = self.touched.iter().map(|&(device, _)| usize::from(device)).collect();
        self.follow(layer, touched);
    }

    /// Of the devices that `may` take a copy of an expert, the one whose powers then rise least.
    pub(in crate::layer) fn best_device(&self, layer: &Layer, expert: u16, may: &[bool]) -> Option<usize> {
        let price = &layer.windows.price;
        self.norm.as_ref().and_then(|norm| entered(norm, &self.loads, usize::from(expert), price, may))
    }

    /// Adds a copy of an expert to a device.
    pub(in crate::layer) fn enter(&mut self, device: usize, expert: u16) {
        self.loads.enter(device, usize::from(expert));
        if let Some(norm) = &mut self.norm {
            norm.raise(device, &self.loads);
        }
    }

    fn follow(&mut self, layer: &Layer, touched: impl IntoIterator<Item = usize>) {
        if let Some(peak) = &mut self.peak {
            peak.refresh(&self.loads.load, &self.loads.time);
        }
        if let Some(norm) = &mut self.norm {
            touched.into_iter().for_each(|device| norm.raise(device, &self.loads));
            norm.refresh(&layer.windows.price);
        }
    }

    /// Puts the loads of all devices that a move touches into `rows`.
    fn stage(&mut self, layer: &Layer, slots: &Slots, step: Move, shares: &[Share]) {
        self.touched.clear();
        let (loads, width) = (&self.loads, self.loads.width);
        if let Some(Pair { devices: [g, h], rows: [a, b] }) = exchange(layer, slots, step) {
            self.touched.extend([(g as u16, loads.own(g, b, a)), (h as u16, loads.own(h, a, b))]);
            let ((load_g, of_a), (load_h, of_b)) = (loads.rows(g, a), loads.rows(h, b));
            let (here, there) = self.rows[..2 * width].split_at_mut(width);
            replace(here, load_g, of_a, of_b);
            replace(there, load_h, of_b, of_a);
            return;
        }
        for &Share { expert, device, before, after } in shares {
            let g = usize::from(device);
            let at = self.touched.iter().position(|of| of.0 == device).unwrap_or_else(|| {
                self.touched.push((device, loads.own[g]));
                let at = self.touched.len() - 1;
                self.rows[at * width..][..width].copy_from_slice(loads.rows(g, 0).0);
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
fn replace(to: &mut [f32], load: &[f32], leaves: &[f32], enters: &[f32]) {
    let width = to.len();
    let (load, leaves, enters) = (&load[..width], &leaves[..width], &enters[..width]);
    for w in 0..width {
        to[w] = load[w] - leaves[w] + enters[w];
    }
}
