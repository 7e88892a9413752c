//! Terms of a layer's cost. Each computes exactly what a move changes, and applies it.
//!
//! A new term is a module here: its prices, a struct that implements [`Term`], and its definition for the test of all terms.
//! This file gets a field of [`Costs`], a line in [`Terms::with_serving`] and one in `DEFINITIONS`. Searches go through the
//! list of terms and know none of them by name.

pub(super) mod balance;
pub mod fanout;
mod linear;
mod loads;
pub mod losses;
pub mod lp_split;
mod norm;
mod peak;
mod ports;
pub mod reading;
pub mod together;
pub mod windows;

use std::borrow::Cow;
use std::fmt::Debug;

use super::slots::Share;
use crate::layer::caps::Caps;
use crate::layer::{Layer, Move, Slots};
use crate::random::Random;
use balance::Balance;
use fanout::Fanout;
use linear::Linear;
use losses::{LossNorm, Losses};
use lp_split::LpSplit;
use peak::Peak;
use reading::Reading;
use together::{Pairs, Together};

/// Prices of a layer, besides those of its windows.
#[derive(Debug, Clone, Default)]
pub struct Costs {
    /// Weights that are read in the windows, where that may take longer than the tokens.
    pub reading: Option<Reading>,
    /// Cost of a row at the busiest port, in tokens; 0 for none.
    pub row: f64,
    /// Cost of holding a copy of an expert on a device, whatever it serves `[E, D]`; empty for none.
    pub copy_cost: Vec<f64>,
    /// Cost of serving all of an expert's tokens from a device; a copy pays its share `[E, D]`; empty for none.
    pub serve_cost: Vec<f64>,
    /// Expert sets, where visits of devices and nodes cost.
    pub sets: Option<fanout::Lazy>,
    /// Co-activated pairs, where those that are apart cost.
    pub pairs: Option<Pairs>,
    /// Failure domains, where it costs how busy devices are after a loss.
    pub losses: Option<Losses>,
    /// Windows whose tokens a dispatcher divides over copies by split `lp`.
    pub lp_split: Option<lp_split::Loads>,
}

/// A term for tests: random prices on weighted loads of windows `[W, E]`, and the cost of slots by its definition.
#[cfg(test)]
pub(super) struct Definition {
    pub(super) price: fn(&mut Random, &mut Layer, &[f64]),
    pub(super) cost: fn(&Layer, &Slots) -> f64,
}

/// Definitions of the terms that a layer alone defines; traffic defines windows and expert sets.
#[cfg(test)]
pub(super) const DEFINITIONS: [Definition; 4] =
    [linear::DEFINITION, together::DEFINITION, losses::DEFINITION, lp_split::DEFINITION];

/// Returns the share of an expert's tokens that a device serves.
#[cfg(test)]
pub(super) fn share(layer: &Layer, slots: &Slots, expert: usize, device: usize) -> f64 {
    let devices: Vec<u16> = slots.devices(expert as u16).collect();
    if devices.contains(&(device as u16)) { layer.site.share(&devices, device as u16) } else { 0.0 }
}

/// A move that is priced before it is made: the slots it changes, and the shares of tokens that it changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) slots: &'a Slots,
    pub(super) step: Move,
    /// Unset where copies exchange places and keep their shares, and no term needs them.
    pub(super) shares: &'a [Share],
}

/// Devices whose visits a candidate changes, with their visits per token of load then.
pub(super) type Visits = Vec<(u16, f32)>;

/// A part of a layer's cost. It holds its own prices, and its counts of the slots as they stand.
///
/// Only the first three methods are required. The others let searches skip work; by default they skip none.
pub(super) trait Term: Debug + Send {
    /// Returns the cost of the slots as they stand.
    fn cost(&self) -> f64;

    /// Returns the cost that a candidate adds. A term that counts visits writes those by which rows are priced.
    fn change(&mut self, candidate: Candidate<'_>, visits: &mut Visits) -> f64;

    /// Applies a candidate, before the slots change.
    fn apply(&mut self, candidate: Candidate<'_>, visits: &mut Visits);

    /// Returns the cost of the slowest devices by this term, whatever stands for them in [`Self::cost`].
    fn slowest(&self) -> f64 {
        0.0
    }

    /// Updates the term after the slots have changed by the candidate that was applied.
    fn finish_apply(&mut self, _slots: &Slots) {}

    /// Returns the visits of every device per token of its load `[D]`, if this term counts them.
    fn visits_per_load(&self) -> Option<Vec<f32>> {
        None
    }

    /// Returns whether this term needs the shares of an exchange in which copies keep theirs.
    fn needs_shares(&self) -> bool {
        true
    }

    /// Returns whether [`Self::max_gain`] is a finite bound that takes less time than [`Self::change`].
    fn bounds_gain(&self) -> bool {
        false
    }

    /// Returns an upper bound on what a candidate takes from the cost.
    fn max_gain(&mut self, _candidate: Candidate<'_>) -> f64 {
        f64::INFINITY
    }

    /// Returns whether a candidate gains at most the tokens that it takes from the slowest devices.
    fn is_of_slowest_alone(&self) -> bool {
        false
    }

    /// Returns whether the cost of a copy does not depend on other experts: then [`Self::change`] is fast.
    fn is_separable(&self) -> bool {
        false
    }

    /// Returns whether many calls of [`Self::change`] may take longer than a user waits after Ctrl-C.
    fn takes_long(&self) -> bool {
        false
    }

    /// Returns the slowest devices of every window, where they alone are the cost of a window.
    fn peak(&self) -> Option<&Peak> {
        None
    }

    /// Returns the powers of every device over losses `[D]`, and the device with the largest.
    fn after_losses(&self) -> Option<(&[f64], usize)> {
        None
    }
}

/// The terms of a layer's cost for the slots as they stand, and the cap, which comes before all cost.
#[derive(Debug)]
pub(super) struct Terms<'a> {
    layer: &'a Layer,
    /// Terms that count visits come first: others price rows by the visits that they write.
    all: Vec<Box<dyn Term + 'a>>,
    caps: Option<Caps<'a>>,
    /// True if some term needs the shares of every candidate, and true if the last term bounds its gain.
    needs_shares: bool,
    bounds_gain: bool,
    /// Shares and visits of the last candidate; devices are memory for counting the shares.
    shares: Vec<Share>,
    visits: Visits,
    devices: Vec<u16>,
}

impl<'a> Terms<'a> {
    /// Builds the terms of a layer for slots.
    pub(super) fn new(layer: &'a Layer, slots: &Slots) -> Self {
        Self::with_serving(layer, slots, Cow::from(&layer.costs.serve_cost))
    }

    /// Builds terms with other prices of serving `[E, D]` than the layer's: by where the neighbouring layers are by now.
    pub(super) fn with_serving(layer: &'a Layer, slots: &Slots, serve_cost: Cow<'a, [f64]>) -> Self {
        let costs = &layer.costs;
        let mut all: Vec<Box<dyn Term + 'a>> = vec![];
        if let Some(linear) = Linear::new(layer, serve_cost, slots) {
            all.push(Box::new(linear));
        }
        if let Some(sets) = &costs.sets {
            all.push(Box::new(Fanout::new(layer, sets, slots)));
        }
        if let Some(pairs) = &costs.pairs {
            all.push(Box::new(Together::new(layer, pairs, slots)));
        }
        if !layer.windows.is_weightless() {
            let visits = all.iter().find_map(|term| term.visits_per_load());
            all.push(Box::new(Balance::of_time(layer, slots, visits)));
        }
        if let Some(losses) = &costs.losses {
            all.push(Box::new(LossNorm::new(layer, losses, slots)));
        }
        if let Some(loads) = &costs.lp_split {
            all.push(Box::new(LpSplit::new(layer, loads, slots)));
        }
        let caps = Caps::new(layer, slots);
        Self {
            layer,
            bounds_gain: all.last().is_some_and(|term| term.bounds_gain()),
            needs_shares: caps.is_some() || all.iter().any(|term| term.needs_shares()),
            all,
            caps,
            shares: Vec::new(),
            visits: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// Returns the cost of the slots as they stand.
    pub(super) fn cost(&self) -> f64 {
        self.all.iter().map(|term| term.cost()).sum()
    }

    /// Returns the cost of the slowest devices, in windows and after losses, and of separable terms.
    pub(super) fn slowest(&self) -> f64 {
        self.all.iter().map(|term| term.slowest()).sum()
    }

    /// Returns the slowest devices of every window, where they alone are the cost of a window.
    pub(super) fn peak(&self) -> Option<&Peak> {
        self.all.iter().find_map(|term| term.peak())
    }

    /// Returns whether the cost is that of the slowest devices' tokens and of separable terms: they bound a move's gain.
    pub(super) fn are_of_slowest(&self) -> bool {
        self.all.iter().any(|term| term.is_of_slowest_alone())
            && self.all.iter().all(|term| term.is_of_slowest_alone() || term.is_separable())
    }

    /// Returns whether many changes may take longer than a user waits after Ctrl-C.
    pub(super) fn take_long(&self) -> bool {
        self.all.iter().any(|term| term.takes_long())
    }

    /// Returns the powers of every device over losses `[D]`, where losses and the slowest devices are all that costs.
    pub(super) fn after_losses(&self) -> Option<&[f64]> {
        let mut terms = self.all.iter();
        let are_of_devices = terms.all(|term| term.peak().is_some() || term.after_losses().is_some());
        let after = self.all.iter().find_map(|term| term.after_losses());
        after.filter(|_| are_of_devices).map(|(powers, _)| powers)
    }

    /// Returns a device that costs most where losses count: the slowest in a random window, or the busiest after losses.
    pub(super) fn costliest(&self, random: &mut Random) -> Option<usize> {
        let (_, busiest) = self.all.iter().find_map(|term| term.after_losses())?;
        let peak = self.peak().filter(|_| random.below(2) == 0);
        let slowest = peak.and_then(|peak| peak.slowest_in(random.below(self.layer.windows.count.max(1))));
        Some(slowest.unwrap_or(busiest))
    }

    /// Returns the part by which the worst device exceeds the cap.
    pub(super) fn excess(&self) -> f64 {
        self.caps.as_ref().map_or(0.0, Caps::excess)
    }

    /// Returns whether some term is separable.
    pub(super) fn has_separable(&self) -> bool {
        self.all.iter().any(|term| term.is_separable())
    }

    /// Returns the cost that a move adds; nothing if it breaks the cap, or surely adds more than a limit.
    pub(super) fn change(&mut self, slots: &Slots, step: Move, limit: f64) -> Option<f64> {
        self.update_shares(slots, step);
        let is_allowed = self.caps.as_ref().is_none_or(|caps| caps.allows(&self.shares));
        if is_allowed { self.added(slots, step, limit) } else { None }
    }

    /// Returns what a move adds to the excess over the cap, and to the cost: infinity if that is surely above a limit.
    pub(super) fn excess_and_change(&mut self, slots: &Slots, step: Move, limit: f64) -> (f64, f64) {
        self.update_shares(slots, step);
        let excess_change = self.caps.as_ref().map_or(0.0, |caps| caps.excess_change(&self.shares));
        (excess_change, self.added(slots, step, limit).unwrap_or(f64::INFINITY))
    }

    /// Returns what a move adds to the separable terms alone.
    pub(super) fn separable_change(&mut self, slots: &Slots, step: Move) -> f64 {
        self.update_shares(slots, step);
        let candidate = Candidate { slots, step, shares: &self.shares };
        let separable = self.all.iter_mut().filter(|term| term.is_separable());
        separable.map(|term| term.change(candidate, &mut self.visits)).sum()
    }

    /// Computes the shares that a move changes, unless no term needs them.
    #[inline(always)]
    fn update_shares(&mut self, slots: &Slots, step: Move) {
        if self.needs_shares || balance::exchange(self.layer, slots, step).is_none() {
            slots.shares(&self.layer.site, step, &mut self.shares, &mut self.devices);
        }
    }

    /// Returns the cost that a move adds, unless it is surely more than a limit.
    fn added(&mut self, slots: &Slots, step: Move, limit: f64) -> Option<f64> {
        let candidate = Candidate { slots, step, shares: &self.shares };
        let mut change = 0.0;
        self.visits.clear();
        let (count, bounds_gain) = (self.all.len(), self.bounds_gain);
        for (at, term) in self.all.iter_mut().enumerate() {
            // Most moves add more to the slowest device than the last term can gain, and that term takes longest to compute.
            if bounds_gain && at + 1 == count && change - term.max_gain(candidate) > limit {
                return None;
            }
            change += term.change(candidate, &mut self.visits);
        }
        Some(change)
    }

    /// Makes a move that is allowed.
    pub(super) fn apply(&mut self, slots: &mut Slots, step: Move) {
        slots.shares(&self.layer.site, step, &mut self.shares, &mut self.devices);
        let candidate = Candidate { slots, step, shares: &self.shares };
        if let Some(caps) = &mut self.caps {
            caps.apply(&self.shares);
        }
        self.visits.clear();
        for term in &mut self.all {
            term.apply(candidate, &mut self.visits);
        }
        slots.apply(step);
        for term in &mut self.all {
            term.finish_apply(slots);
        }
    }
}
