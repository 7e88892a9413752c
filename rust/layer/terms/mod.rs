//! Terms of a layer's cost: each knows what a move changes, exactly, and how to apply it.

pub(super) mod balance;
pub(super) mod caps;
pub mod fanout;
pub(super) mod linear;
mod loads;
mod norm;
mod peak;
mod ports;
pub mod reading;
pub mod together;
pub mod windows;

use super::slots::Share;
use crate::layer::{Layer, Move, Slots};
use balance::Balance;
use caps::Caps;
use fanout::Fanout;
use together::Together;

/// The terms of a layer's cost, for the slots as they stand.
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
    /// What the move changes that is looked at.
    shares: Vec<Share>,
    devices: Vec<u16>,
}

impl Terms {
    pub(super) fn new(layer: &Layer, slots: &Slots) -> Self {
        let weightless = layer.windows.is_weightless();
        let fanout = layer.sets.as_ref().map(|sets| Fanout::new(layer, sets, slots));
        let met = || fanout.as_ref().map(Fanout::met);
        Self {
            balance: (!weightless).then(|| Balance::of_time(layer, slots, met())),
            fanout,
            together: layer.pairs.as_ref().map(|pairs| Together::new(layer, pairs, slots)),
            caps: Caps::new(layer, slots),
            linear: linear::cost(layer, slots),
            shares: Vec::new(),
            devices: Vec::new(),
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
    pub(super) fn change(&mut self, layer: &Layer, slots: &Slots, step: Move) -> Option<f64> {
        self.look(layer, slots, step);
        self.caps.allows(layer, &self.shares).then(|| self.added(layer, slots, step))
    }

    /// Notes which shares a move changes, unless no term asks.
    #[inline(always)]
    fn look(&mut self, layer: &Layer, slots: &Slots, step: Move) {
        let of_time = layer.reading.is_some() || layer.row > 0.0;
        let by_share = of_time
            || layer.site.rules.cap < f64::INFINITY
            || !layer.serve_cost.is_empty()
            || layer.pairs.is_some();
        if by_share || balance::exchange(layer, slots, step).is_none() {
            slots.shares(&layer.site, step, &mut self.shares, &mut self.devices);
        }
    }

    /// What a move would add to excess over the caps, and to the cost.
    pub(super) fn rise(&mut self, layer: &Layer, slots: &Slots, step: Move) -> (f64, f64) {
        self.look(layer, slots, step);
        (self.caps.rise(layer, &self.shares), self.added(layer, slots, step))
    }

    /// What a move would add to the linear costs alone.
    pub(super) fn linear_change(&mut self, layer: &Layer, slots: &Slots, step: Move) -> f64 {
        self.look(layer, slots, step);
        linear::change(layer, slots, step, &self.shares)
    }

    fn added(&mut self, layer: &Layer, slots: &Slots, step: Move) -> f64 {
        let shares = &self.shares;
        let mut change = linear::change(layer, slots, step, shares);
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.sets) {
            change += fanout.change(layer, sets, slots, step);
            fanout.meet(layer, sets, shares);
        }
        if let Some(balance) = &mut self.balance {
            let met = self.fanout.as_ref().map_or(&[][..], Fanout::met_then);
            change += balance.change(layer, slots, step, shares, met);
        }
        if let (Some(together), Some(pairs)) = (&self.together, &layer.pairs) {
            change += together.change(pairs, shares);
        }
        change
    }

    /// Makes a move that is allowed.
    pub(super) fn apply(&mut self, layer: &Layer, slots: &mut Slots, step: Move) {
        slots.shares(&layer.site, step, &mut self.shares, &mut self.devices);
        self.caps.apply(layer, &self.shares);
        self.linear += linear::change(layer, slots, step, &self.shares);
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.sets)
            && layer.row > 0.0
        {
            // Which visits there are then: what a move adds was asked for some moves ago.
            fanout.change(layer, sets, slots, step);
            fanout.meet(layer, sets, &self.shares);
        }
        if let Some(balance) = &mut self.balance {
            let met = self.fanout.as_ref().map_or(&[][..], Fanout::met_then);
            balance.apply(layer, slots, step, &self.shares, met);
        }
        if let (Some(together), Some(pairs)) = (&mut self.together, &layer.pairs) {
            together.apply(pairs, &self.shares);
        }
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.sets) {
            fanout.serve(sets, &self.shares);
        }
        let touched = self.fanout.is_some().then(|| fanout::touched(slots, step));
        slots.apply(step);
        if let (Some(fanout), Some(sets), Some(touched)) = (&mut self.fanout, &layer.sets, touched) {
            fanout.refresh(layer, sets, slots, &touched);
        }
    }
}
