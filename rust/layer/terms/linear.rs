//! The linear term: the cost of holding or serving an expert on a device, whatever else the device holds.
//!
//! Moved bytes are a cost of holding. Traffic with neighbouring layers, while these stay as they are, is a cost of serving.

use std::borrow::Cow;

use super::{Candidate, Term, Visits};
use crate::layer::slots::Share;
use crate::layer::{Layer, Slots};

/// The term: prices of experts on devices, and the cost of the slots as they stand.
#[derive(Debug)]
pub(super) struct Linear<'a> {
    layer: &'a Layer,
    /// Prices of a copy, and of all of an expert's tokens `[E, D]`; empty for none.
    copy_cost: &'a [f64],
    serve_cost: Cow<'a, [f64]>,
    cost: f64,
}

impl<'a> Linear<'a> {
    /// Builds the term; none where nothing costs.
    pub(super) fn new(layer: &'a Layer, serve_cost: Cow<'a, [f64]>, slots: &Slots) -> Option<Self> {
        let copy_cost = &layer.costs.copy_cost[..];
        if copy_cost.is_empty() && serve_cost.is_empty() {
            return None;
        }
        let mut linear = Self { layer, copy_cost, serve_cost, cost: 0.0 };
        linear.cost = linear.count(slots);
        Some(linear)
    }

    /// Returns the cost that a candidate adds.
    fn added(&self, &Candidate { slots, step, shares, .. }: &Candidate<'_>) -> f64 {
        let at = |expert: u16, device: u16| usize::from(expert) * self.layer.devices() + usize::from(device);
        let mut change = 0.0;
        if !self.copy_cost.is_empty() {
            for edit in slots.edits(step) {
                let cost = |device: Option<u16>| {
                    device.map_or(0.0, |device| self.copy_cost[at(edit.expert, device)])
                };
                change += cost(edit.to) - cost(edit.from);
            }
        }
        if !self.serve_cost.is_empty() {
            let added = |share: &Share| {
                (share.after - share.before) * self.serve_cost[at(share.expert, share.device)]
            };
            change += shares.iter().map(added).sum::<f64>();
        }
        change
    }

    /// Sums the cost of all experts.
    fn count(&self, slots: &Slots) -> f64 {
        let mut cost = 0.0;
        for Share { expert, device, after, .. } in self.layer.copies(slots) {
            let at = usize::from(expert) * self.layer.devices() + usize::from(device);
            cost += self.copy_cost.get(at).copied().unwrap_or(0.0);
            cost += self.serve_cost.get(at).map_or(0.0, |serve| after * serve);
        }
        cost
    }
}

impl Term for Linear<'_> {
    fn cost(&self) -> f64 {
        self.cost
    }

    fn change(&mut self, candidate: &Candidate<'_>, _: &mut Visits) -> f64 {
        self.added(candidate)
    }

    fn apply(&mut self, candidate: &Candidate<'_>, _: &mut Visits) {
        self.cost += self.added(candidate);
    }

    fn slowest(&self) -> f64 {
        self.cost
    }

    fn needs_shares(&self, _: bool) -> bool {
        !self.serve_cost.is_empty()
    }
}

#[cfg(test)]
pub(super) const DEFINITION: super::Definition = super::Definition {
    price: |random, layer, _| {
        let mut table = || (0..layer.experts * layer.devices()).map(|_| random.below(1000) as f64).collect();
        (layer.costs.copy_cost, layer.costs.serve_cost) = (table(), table());
    },
    cost: |layer, slots| {
        let cells = (0..layer.experts).flat_map(|e| (0..layer.devices()).map(move |g| (e, g)));
        let cost = |(at, (e, g)): (usize, (usize, usize))| {
            let copy = if slots.holds(e as u16, g) { layer.costs.copy_cost[at] } else { 0.0 };
            copy + super::share(layer, slots, e, g) * layer.costs.serve_cost[at]
        };
        cells.enumerate().map(cost).sum()
    },
};
