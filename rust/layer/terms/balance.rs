//! The balance term: the time of the slowest device, for which all others wait, and of the busiest port, summed over windows.
//!
//! A window costs its largest time ([`Peak`]), or the norm of order P over devices that stands for it ([`Norm`]):
//! `(sum_d time[d]^p)^(1/p)`. A device takes the time of its tokens or, where weights are read, of tokens or reading,
//! whichever is longer ([`Busy`]).

use super::exchange::{Pair, change_of_times, change_of_tokens};
use super::loads::Loads;
use super::norm::{Norm, best_device};
use super::peak::Peak;
use super::ports::Ports;
use super::reading::Busy;
use super::windows::{Measure, add};
use super::{Candidate, Term, Visits};
use crate::layer::slots::Share;
use crate::layer::{Layer, Move, Slots};

/// The term: loads of devices, and their cost.
#[derive(Debug, Clone)]
pub(crate) struct Balance<'a> {
    layer: &'a Layer,
    loads: Loads,
    peak: Option<Peak>,
    norm: Option<Norm>,
    /// None where reading weights never takes longer than tokens.
    busy: Option<Busy<'a>>,
    /// None where rows cost nothing.
    ports: Option<Ports>,
    /// Tokens `[touched, width]` and own variances of the devices that a candidate touches.
    rows: Vec<f32>,
    touched: Vec<(u16, i64)>,
}

impl<'a> Balance<'a> {
    /// Builds the term of tokens alone; `copies` is how many copies each expert has in the end.
    pub(crate) fn new(layer: &'a Layer, slots: &Slots, copies: &[u32]) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let is_norm = layer.windows.measure != Measure::Peak;
        let mut balance = Self {
            layer,
            loads: Loads::new(layer, slots, copies),
            peak: (!is_norm).then(|| Peak::new(width)),
            norm: is_norm.then(|| Norm::new(d, &layer.windows.per_mean)),
            busy: None,
            ports: None,
            rows: vec![0.0; d * width],
            touched: Vec::new(),
        };
        balance.refresh(0..d);
        balance
    }

    /// Builds the term of all that takes time, given the visits of every device per token of its load `[D]`.
    pub(super) fn of_time(layer: &'a Layer, slots: &Slots, visits: Option<Vec<f32>>) -> Self {
        let mut balance = Self::new(layer, slots, &slots.copies);
        let (d, is_norm) = (layer.devices(), balance.norm.is_some());
        if let Some(reading) = &layer.costs.reading {
            balance.busy = Some(Busy::new(layer, reading, slots, &balance.loads));
            balance.norm = is_norm.then(|| Norm::new(d, &reading.per_mean));
            balance.refresh(0..d);
        }
        if layer.costs.row > 0.0 {
            let visits = visits.unwrap_or_else(|| vec![1.0; d]);
            balance.ports = Some(Ports::new(layer, &balance.loads, visits, is_norm));
        }
        balance
    }

    /// Returns whether tokens of devices are all that takes time.
    fn is_of_tokens(&self) -> bool {
        self.busy.is_none() && self.ports.is_none()
    }

    /// Returns the slowest devices of every window, where they alone are the cost of a window.
    pub(super) fn peak(&self) -> Option<&Peak> {
        self.peak.as_ref()
    }

    /// Returns whether a candidate gains at most the tokens that it takes from the slowest devices.
    pub(super) fn is_of_slowest_alone(&self) -> bool {
        self.peak.is_some() && self.is_of_tokens()
    }

    /// Returns the device, of those that `may` take a copy of an expert, whose powers then rise least.
    pub(in crate::layer) fn best_device(&self, expert: u16, may: &[bool]) -> Option<usize> {
        let price = &self.layer.windows.price;
        self.norm.as_ref().and_then(|norm| best_device(norm, &self.loads, usize::from(expert), price, may))
    }

    /// Adds a copy of an expert to a device.
    pub(in crate::layer) fn add_copy(&mut self, device: usize, expert: u16) {
        self.loads.add_copy(device, usize::from(expert));
        if let Some(norm) = &mut self.norm {
            let loads = &self.loads;
            norm.set_load(device, loads.rows(device, 0).0, loads.unit(device, loads.variance[device]));
        }
    }

    /// Recomputes the devices that a move has touched, and the cost of the slowest.
    fn refresh(&mut self, touched: impl IntoIterator<Item = usize>) {
        let (loads, width) = (&self.loads, self.loads.width);
        if let Some(peak) = &mut self.peak {
            match &self.busy {
                Some(busy) => peak.refresh(&busy.time, &busy.ones),
                None => peak.refresh(&loads.load, &loads.time),
            }
        }
        if let Some(norm) = &mut self.norm {
            for g in touched {
                match &self.busy {
                    Some(busy) => norm.set_load(g, &busy.time[g * width..][..width], (1.0, 0.0)),
                    None => norm.set_load(g, loads.rows(g, 0).0, loads.unit(g, loads.variance[g])),
                }
            }
            let layer = self.layer;
            norm.refresh(layer.costs.reading.as_ref().map_or(&layer.windows.price, |reading| &reading.price));
        }
    }

    /// Writes into `rows` the loads of all devices that a candidate touches, or whose visits it changes.
    fn stage(&mut self, candidate: &Candidate<'_>, visits: &Visits) {
        self.stage_loads(candidate);
        let (loads, width) = (&self.loads, self.loads.width);
        for &(device, _) in visits {
            let g = usize::from(device);
            if self.touched.iter().all(|touched| touched.0 != device) {
                let at = self.touched.len();
                self.touched.push((device, loads.variance[g]));
                self.rows[at * width..][..width].copy_from_slice(loads.rows(g, 0).0);
            }
        }
        if let Some(busy) = &mut self.busy {
            busy.stage(self.layer, loads, (&self.rows, &self.touched), candidate.shares);
        }
    }

    /// Writes into `rows` the loads of the devices whose shares a candidate changes.
    fn stage_loads(&mut self, &Candidate { pair, shares, .. }: &Candidate<'_>) {
        let layer = self.layer;
        self.touched.clear();
        let (loads, width) = (&self.loads, self.loads.width);
        if let Some(&Pair { devices: [g, h], rows: [a, b] }) = pair {
            self.touched.extend([
                (g as u16, loads.variance_after(g, b, a)),
                (h as u16, loads.variance_after(h, a, b)),
            ]);
            let ((load_g, of_a), (load_h, of_b)) = (loads.rows(g, a), loads.rows(h, b));
            let (row_g, row_h) = self.rows[..2 * width].split_at_mut(width);
            replace(row_g, load_g, of_a, of_b);
            replace(row_h, load_h, of_b, of_a);
            return;
        }
        for &Share { expert, device, before, after } in shares {
            let g = usize::from(device);
            let at = self.touched.iter().position(|touched| touched.0 == device).unwrap_or_else(|| {
                self.touched.push((device, loads.variance[g]));
                let at = self.touched.len() - 1;
                self.rows[at * width..][..width].copy_from_slice(loads.rows(g, 0).0);
                at
            });
            self.touched[at].1 +=
                layer.windows.variance(expert, after) - layer.windows.variance(expert, before);
            let row = &mut self.rows[at * width..][..width];
            for (share, sign) in [(before, -1.0), (after, 1.0)] {
                if share > 0.0 {
                    add(row, layer.windows.of(expert), share as f32, sign);
                }
            }
        }
    }
}

impl Term for Balance<'_> {
    fn cost(&self) -> f64 {
        let devices = self.peak.as_ref().map_or(0.0, Peak::cost) + self.norm.as_ref().map_or(0.0, Norm::cost);
        devices + self.ports.as_ref().map_or(0.0, Ports::cost)
    }

    fn change(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) -> f64 {
        if let (Some(norm), Some(pair)) = (&self.norm, candidate.pair) {
            if self.is_of_tokens() {
                return change_of_tokens(norm, &self.loads, pair);
            }
            if let (Some(busy), true) = (&self.busy, candidate.is_single) {
                let ports = self.ports.as_ref().and_then(|ports| ports.norm_after(visits, pair.devices));
                let [time, rows] = change_of_times(norm, ports, busy, &self.loads, pair);
                return self.ports.as_ref().map_or(0.0, |ports| ports.price_of(rows)) + time;
            }
        }
        self.stage(candidate, visits);
        let (loads, staged) = (&self.loads, (&self.rows[..], &self.touched[..]));
        let ports = self.ports.as_mut().map_or(0.0, |ports| ports.change(loads, staged, visits));
        let (times, of_one, rows, is_busy) = match &self.busy {
            Some(busy) => (&busy.time, &busy.ones, &busy.time_then, true),
            None => (&loads.load, &loads.time, &self.rows, false),
        };
        let unit = |device: u16, variance: i64| {
            // Times have their deviation already.
            if is_busy { (1.0, 0.0) } else { loads.unit(usize::from(device), variance) }
        };
        let norm = self.norm.as_ref().map_or(0.0, |norm| norm.change(rows, &self.touched, unit));
        let peak = |peak: &Peak| peak.cost_of(times, rows, &self.touched, of_one) - peak.cost();
        ports + norm + self.peak.as_ref().map_or(0.0, peak)
    }

    fn apply(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) {
        self.stage(candidate, visits);
        let &Candidate { slots, step, .. } = candidate;
        let width = self.loads.width;
        for (row, &(device, variance)) in self.rows.chunks_exact(width).zip(&self.touched) {
            self.loads.load[usize::from(device) * width..][..width].copy_from_slice(row);
            self.loads.variance[usize::from(device)] = variance;
        }
        if let Move::Put(..) = step {
            for edit in slots.edits(step) {
                let copies = slots.copies(edit.expert);
                let then = if edit.to.is_some() { copies + 1 } else { copies - 1 };
                self.loads.set_copies(self.layer, edit.expert, then);
            }
        }
        if let Some(busy) = &mut self.busy {
            busy.apply(&self.touched, width);
        }
        if let Some(ports) = &mut self.ports {
            ports.apply(self.layer, &self.loads, &self.touched, visits);
        }
        let touched: Vec<usize> = self.touched.iter().map(|&(device, _)| usize::from(device)).collect();
        self.refresh(touched);
    }

    fn slowest(&self) -> f64 {
        let windows = &self.layer.windows;
        let mut peak = Peak::new(self.loads.width);
        peak.refresh(&self.loads.load, &self.loads.time);
        let counts = windows.per_mean.iter().zip(&windows.price);
        peak.times().zip(counts).map(|(time, (per, price))| f64::from(time * per) * f64::from(*price)).sum()
    }

    fn needs_shares(&self, are_single: bool) -> bool {
        self.busy.is_some() && (self.norm.is_none() || !are_single)
    }
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
