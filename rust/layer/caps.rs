//! The cap on a device's load over all windows: a rule of loads, as [`super::rules`] has those of where copies are.
//!
//! It is no term: excess over it comes before all cost, so it adds nothing to one. [`super::terms::Terms`] asks it first.

use super::slots::Share;
use super::{Layer, Slots};

/// Loads of devices over all windows `[D]`, in time of the slowest.
#[derive(Debug)]
pub(super) struct Caps<'a> {
    layer: &'a Layer,
    load: Vec<f64>,
}

/// A load that exceeds the cap by less than this part of it keeps it.
const ROUNDING: f64 = 1e-9;

impl<'a> Caps<'a> {
    /// Counts loads; none where no load is too large.
    pub(super) fn new(layer: &'a Layer, slots: &Slots) -> Option<Self> {
        if layer.site.rules.cap == f64::INFINITY {
            return None;
        }
        let mut load = vec![0.0; layer.devices()];
        for Share { expert, device, after, .. } in layer.copies(slots) {
            let share = after * layer.site.time[usize::from(device)];
            load[usize::from(device)] += layer.load[usize::from(expert)] * share;
        }
        Some(Self { layer, load })
    }

    /// Returns the loads of the devices that a move touches, before and after it.
    fn changes<'b>(&'b self, shares: &'b [Share]) -> impl Iterator<Item = (f64, f64)> + 'b {
        let layer = self.layer;
        let by = |share: &Share| {
            let change = (share.after - share.before) * layer.site.time[usize::from(share.device)];
            layer.load[usize::from(share.expert)] * change
        };
        let first = |(i, share): (usize, &'b Share)| {
            shares[..i].iter().all(|earlier| earlier.device != share.device).then_some(share.device)
        };
        shares.iter().enumerate().filter_map(first).map(move |device| {
            let added: f64 = shares.iter().filter(|share| share.device == device).map(by).sum();
            let load = self.load[usize::from(device)];
            (load, load + added)
        })
    }

    /// Returns whether every device that a move gives load to stays within the cap, or the worst of them gets less.
    pub(super) fn allows(&self, shares: &[Share]) -> bool {
        let (mut before, mut worst) = (0.0f64, 0.0f64);
        for (load, then) in self.changes(shares) {
            (before, worst) = (before.max(load), worst.max(then));
        }
        worst <= self.layer.site.rules.cap * (1.0 + ROUNDING) || worst < before
    }

    /// Returns the part by which the worst device exceeds the cap.
    pub(super) fn excess(&self) -> f64 {
        self.load.iter().map(|&load| self.above(load)).fold(0.0, f64::max)
    }

    /// Returns what a move adds to the sum of the parts by which devices exceed the cap.
    pub(super) fn excess_change(&self, shares: &[Share]) -> f64 {
        self.changes(shares).map(|(load, then)| self.above(then) - self.above(load)).sum()
    }

    /// Updates the loads for a move that is about to be made.
    pub(super) fn apply(&mut self, shares: &[Share]) {
        for share in shares {
            let g = usize::from(share.device);
            let load = self.layer.load[usize::from(share.expert)];
            self.load[g] += load * (share.after - share.before) * self.layer.site.time[g];
        }
    }

    /// Returns the part by which a load exceeds the cap; 0 if only by rounding.
    fn above(&self, load: f64) -> f64 {
        let excess = load / self.layer.site.rules.cap.max(f64::MIN_POSITIVE) - 1.0;
        if excess > ROUNDING { excess } else { 0.0 }
    }
}
