//! Terms of a layer's cost: each knows what a move changes, exactly, and how to apply it.

pub mod balance;
pub(super) mod caps;
pub mod fanout;
pub(super) mod linear;
mod measure;
pub mod noise;
pub mod together;
pub mod windows;

use crate::layer::{Layer, Move, Placement};
use balance::Balance;
use caps::Caps;
use fanout::Fanout;
use together::Together;

/// The terms of a layer's cost, for the placement as it stands.
#[derive(Debug)]
pub(super) struct Terms {
    /// None where no window weighs anything.
    pub(super) balance: Option<Balance>,
    /// None where visits cost nothing.
    fanout: Option<Fanout>,
    /// None where pairs cost nothing.
    together: Option<Together>,
    pub(super) caps: Caps,
    /// Of [`linear`].
    pub(super) linear: f64,
}

impl Terms {
    pub(super) fn new(layer: &Layer, placement: &Placement) -> Self {
        Self {
            balance: (!layer.windows.is_weightless()).then(|| Balance::new(layer, placement)),
            fanout: layer.sets.as_ref().map(|sets| Fanout::new(layer, sets, placement)),
            together: layer.pairs.as_ref().map(|pairs| Together::new(layer, pairs, placement)),
            caps: Caps::new(layer, placement),
            linear: linear::cost(layer, placement),
        }
    }

    pub(super) fn cost(&self, layer: &Layer) -> f64 {
        let balance = self.balance.as_ref().map_or(0.0, Balance::cost);
        let fanout =
            self.fanout.as_ref().zip(layer.sets.as_ref()).map_or(0.0, |(fanout, sets)| fanout.cost(sets));
        let together =
            self.together.as_ref().zip(layer.pairs.as_ref()).map_or(0.0, |(pairs, of)| pairs.cost(of));
        balance + fanout + together + self.linear
    }

    /// What a move would add to the cost; nothing if it breaks the cap.
    pub(super) fn change(&mut self, layer: &Layer, placement: &Placement, step: Move) -> Option<f64> {
        if !self.caps.allows(layer, placement, step) {
            return None;
        }
        Some(self.added(layer, placement, step))
    }

    /// What a move would add to the cost, whatever the cap.
    pub(super) fn added(&mut self, layer: &Layer, placement: &Placement, step: Move) -> f64 {
        let mut change = linear::change(layer, placement, step);
        if let Some(balance) = &mut self.balance {
            change += balance.change(layer, placement, step);
        }
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.sets) {
            change += fanout.change(layer, sets, placement, step);
        }
        if let (Some(together), Some(pairs)) = (&self.together, &layer.pairs) {
            change += together.change(layer, pairs, placement, step);
        }
        change
    }

    /// Makes the move that [`Terms::change`] or [`Terms::added`] was last asked about.
    pub(super) fn apply(&mut self, layer: &Layer, placement: &mut Placement, step: Move) {
        self.caps.apply(layer, placement, step);
        self.linear += linear::change(layer, placement, step);
        if let Some(balance) = &mut self.balance {
            balance.apply();
        }
        if let (Some(together), Some(pairs)) = (&mut self.together, &layer.pairs) {
            together.apply(layer, pairs, placement, step);
        }
        let touched = self.fanout.is_some().then(|| fanout::touched(placement, step));
        placement.apply(layer, step);
        if let (Some(fanout), Some(sets), Some(touched)) = (&mut self.fanout, &layer.sets, touched) {
            fanout.refresh(layer, sets, placement, &touched);
        }
    }
}
