//! Terms of a layer's cost. Each computes exactly what a move changes, and applies it.
//!
//! A new term is a module here: its prices, a struct that implements [`Term`], and its definition for the test of all terms.
//! This file gets a field of [`Costs`], a line in [`Terms::with_serving`] and one in `DEFINITIONS`. Searches know [`Terms`]
//! alone; that names those terms of which a search asks more than their cost.

pub(super) mod balance;
mod exchange;
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
use exchange::Pair;
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
#[derive(Debug)]
pub(super) struct Candidate<'a> {
    pub(super) slots: &'a Slots,
    pub(super) step: Move,
    /// The move, if it is an exchange in which copies keep their shares.
    pub(super) pair: Option<&'a Pair>,
    /// True if neither expert of that exchange has another copy; false where no term asks.
    pub(super) is_single: bool,
    /// Unset where copies exchange places and keep their shares, and no term needs them.
    pub(super) shares: &'a [Share],
}

/// Devices whose visits a candidate changes, with their visits per token of load then.
pub(super) type Visits = Vec<(u16, f32)>;

/// A part of a layer's cost. It holds its own prices, and its counts of the slots as they stand.
pub(super) trait Term: Debug + Send {
    /// Returns the cost of the slots as they stand.
    fn cost(&self) -> f64;

    /// Returns the cost that a candidate adds. A term that counts visits writes those by which rows are priced.
    fn change(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) -> f64;

    /// Applies a candidate, before the slots change.
    fn apply(&mut self, candidate: &Candidate<'_>, visits: &mut Visits);

    /// Returns the cost of the slowest devices by this term, whatever stands for them in [`Self::cost`].
    fn slowest(&self) -> f64 {
        0.0
    }

    /// Returns whether this term needs the shares of an exchange in which copies keep theirs; of single copies, or others.
    fn needs_shares(&self, _are_single: bool) -> bool {
        true
    }
}

/// A term that a layer may lack: then it costs nothing.
impl<T: Term> Term for Option<T> {
    fn cost(&self) -> f64 {
        self.as_ref().map_or(0.0, T::cost)
    }

    #[inline(always)]
    fn change(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) -> f64 {
        self.as_mut().map_or(0.0, |term| term.change(candidate, visits))
    }

    fn apply(&mut self, candidate: &Candidate<'_>, visits: &mut Visits) {
        if let Some(term) = self {
            term.apply(candidate, visits);
        }
    }

    fn slowest(&self) -> f64 {
        self.as_ref().map_or(0.0, T::slowest)
    }

    fn needs_shares(&self, are_single: bool) -> bool {
        self.as_ref().is_some_and(|term| term.needs_shares(are_single))
    }
}

/// The terms of a layer's cost for the slots as they stand, and the cap, which comes before all cost.
#[derive(Debug)]
pub(super) struct Terms<'a> {
    layer: &'a Layer,
    /// Cost of single copies, which does not depend on other experts.
    linear: Option<Linear<'a>>,
    fanout: Option<Fanout<'a>>,
    /// Terms of which searches ask no more than their cost.
    others: Vec<Box<dyn Term + 'a>>,
    /// Comes after the terms that count visits: rows are priced by the visits that they write.
    balance: Option<Balance<'a>>,
    /// Comes last, as it takes longest.
    losses: Option<LossNorm<'a>>,
    caps: Option<Caps<'a>>,
    /// True if the cap or some term needs the shares of exchanges in which copies keep theirs, and if those are single.
    needs_shares: [bool; 2],
    /// True if some term asks if copies are single.
    asks_single: bool,
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
        let fanout = costs.sets.as_ref().map(|sets| Fanout::new(layer, sets, slots));
        let mut visits = fanout.as_ref().map(Fanout::visits_per_load);
        let mut others: Vec<Box<dyn Term + 'a>> = vec![];
        if let Some(pairs) = &costs.pairs {
            let together = Together::new(layer, pairs, slots);
            visits = visits.or_else(|| Some(together.visits_per_load()));
            others.push(Box::new(together));
        }
        if let Some(loads) = &costs.lp_split {
            others.push(Box::new(LpSplit::new(layer, loads, slots)));
        }
        let has_load = !layer.windows.is_weightless();
        let mut terms = Self {
            layer,
            linear: Linear::new(layer, serve_cost, slots),
            fanout,
            others,
            balance: has_load.then(|| Balance::of_time(layer, slots, visits)),
            losses: costs.losses.as_ref().map(|losses| LossNorm::new(layer, losses, slots)),
            caps: Caps::new(layer, slots),
            needs_shares: [true; 2],
            asks_single: false,
            shares: Vec::new(),
            visits: Vec::new(),
            devices: Vec::new(),
        };
        let needs =
            |are_single| terms.caps.is_some() || terms.all().any(|term| term.needs_shares(are_single));
        terms.needs_shares = [needs(false), needs(true)];
        terms.asks_single = terms.fanout.is_some() || terms.needs_shares == [true, false];
        terms
    }

    /// Iterates over all terms.
    fn all(&self) -> impl Iterator<Item = &(dyn Term + 'a)> {
        let first: [&(dyn Term + 'a); 2] = [&self.linear, &self.fanout];
        let last: [&(dyn Term + 'a); 2] = [&self.balance, &self.losses];
        first.into_iter().chain(self.others.iter().map(Box::as_ref)).chain(last)
    }

    /// Returns the cost of the slots as they stand.
    pub(super) fn cost(&self) -> f64 {
        self.all().map(Term::cost).sum()
    }

    /// Returns the cost of the slowest devices, in windows and after losses, and of separable terms.
    pub(super) fn slowest(&self) -> f64 {
        self.all().map(Term::slowest).sum()
    }

    /// Returns the slowest devices of every window, where they alone are the cost of a window.
    pub(super) fn peak(&self) -> Option<&Peak> {
        self.balance.as_ref().and_then(Balance::peak)
    }

    /// Returns whether there is a cost besides those of single copies and of devices' load.
    fn has_others(&self) -> bool {
        self.fanout.is_some() || !self.others.is_empty()
    }

    /// Returns whether the cost is that of the slowest devices' tokens and of separable terms: they bound a move's gain.
    pub(super) fn are_of_slowest(&self) -> bool {
        let is_of_slowest = self.balance.as_ref().is_some_and(Balance::is_of_slowest_alone);
        is_of_slowest && self.losses.is_none() && !self.has_others()
    }

    /// Returns the powers of every device over losses `[D]`, where losses and the slowest devices are all that costs.
    pub(super) fn after_losses(&self) -> Option<&[f64]> {
        let is_of_devices = self.linear.is_none() && !self.has_others();
        let is_of_slowest = self.balance.is_none() || self.peak().is_some();
        self.losses.as_ref().filter(|_| is_of_devices && is_of_slowest).map(LossNorm::powers)
    }

    /// Returns a device that costs most where losses count: the slowest in a random window, or the busiest after losses.
    pub(super) fn costliest(&self, random: &mut Random) -> Option<usize> {
        let busiest = self.losses.as_ref()?.busiest();
        let peak = self.peak().filter(|_| random.below(2) == 0);
        let slowest = peak.and_then(|peak| peak.slowest_in(random.below(self.layer.windows.count.max(1))));
        Some(slowest.unwrap_or(busiest))
    }

    /// Returns the part by which the worst device exceeds the cap.
    pub(super) fn excess(&self) -> f64 {
        self.caps.as_ref().map_or(0.0, Caps::excess)
    }

    /// Returns whether there is a cost of copies that does not depend on other experts.
    pub(super) fn has_separable(&self) -> bool {
        self.linear.is_some()
    }

    /// Returns the cost that a move adds; nothing if it breaks the cap, or surely adds more than a limit.
    pub(super) fn change(&mut self, slots: &Slots, step: Move, limit: f64) -> Option<f64> {
        let (pair, is_single) = self.update_shares(slots, step);
        let is_allowed = self.caps.as_ref().is_none_or(|caps| caps.allows(&self.shares));
        if is_allowed { self.added(slots, step, (&pair, is_single), limit) } else { None }
    }

    /// Returns the cost that a move adds, from the shares that it changes, as if it were no exchange.
    #[cfg(test)]
    pub(super) fn change_by_shares(&mut self, slots: &Slots, step: Move) -> f64 {
        slots.shares(&self.layer.site, step, &mut self.shares, &mut self.devices);
        self.added(slots, step, (&None, false), f64::INFINITY).expect("no limit")
    }

    /// Returns what a move adds to the excess over the cap, and to the cost: infinity if that is surely above a limit.
    pub(super) fn excess_and_change(&mut self, slots: &Slots, step: Move, limit: f64) -> (f64, f64) {
        let (pair, is_single) = self.update_shares(slots, step);
        let excess_change = self.caps.as_ref().map_or(0.0, |caps| caps.excess_change(&self.shares));
        (excess_change, self.added(slots, step, (&pair, is_single), limit).unwrap_or(f64::INFINITY))
    }

    /// Returns what a move adds to the separable cost alone.
    pub(super) fn separable_change(&mut self, slots: &Slots, step: Move) -> f64 {
        let (pair, is_single) = self.update_shares(slots, step);
        let candidate = &Candidate { slots, step, pair: pair.as_ref(), is_single, shares: &self.shares };
        self.linear.change(candidate, &mut self.visits)
    }

    /// Computes the shares that a move changes, unless no term needs them; returns the exchange that keeps shares, if it is.
    #[inline(always)]
    fn update_shares(&mut self, slots: &Slots, step: Move) -> (Option<Pair>, bool) {
        let (pair, is_single) = self.find_pair(slots, step);
        if pair.is_none() || self.needs_shares[usize::from(is_single)] {
            slots.shares(&self.layer.site, step, &mut self.shares, &mut self.devices);
        }
        (pair, is_single)
    }

    /// Returns the exchange in which copies keep their shares that a move is, and whether a term asks and they are single.
    #[inline(always)]
    fn find_pair(&self, slots: &Slots, step: Move) -> (Option<Pair>, bool) {
        let pair = Pair::of(self.layer, slots, step);
        (pair, self.asks_single && pair.is_some_and(|pair| pair.is_single(slots)))
    }

    /// Returns the cost that a move adds, unless it is surely more than a limit.
    fn added(
        &mut self,
        slots: &Slots,
        step: Move,
        (pair, is_single): (&Option<Pair>, bool),
        limit: f64,
    ) -> Option<f64> {
        let candidate = &Candidate { slots, step, pair: pair.as_ref(), is_single, shares: &self.shares };
        let visits = &mut self.visits;
        visits.clear();
        let mut change = self.linear.change(candidate, visits) + self.fanout.change(candidate, visits);
        for term in &mut self.others {
            change += term.change(candidate, visits);
        }
        change += self.balance.change(candidate, visits);
        if let Some(losses) = &mut self.losses {
            // Most moves add more to the slowest device than they can gain after losses.
            if change - losses.max_gain(candidate) > limit {
                return None;
            }
            change += losses.change(candidate, visits);
        }
        Some(change)
    }

    /// Makes a move that is allowed.
    pub(super) fn apply(&mut self, slots: &mut Slots, step: Move) {
        slots.shares(&self.layer.site, step, &mut self.shares, &mut self.devices);
        let (pair, is_single) = self.find_pair(slots, step);
        let candidate = &Candidate { slots, step, pair: pair.as_ref(), is_single, shares: &self.shares };
        if let Some(caps) = &mut self.caps {
            caps.apply(&self.shares);
        }
        let visits = &mut self.visits;
        visits.clear();
        self.linear.apply(candidate, visits);
        self.fanout.apply(candidate, visits);
        for term in &mut self.others {
            term.apply(candidate, visits);
        }
        self.balance.apply(candidate, visits);
        self.losses.apply(candidate, visits);
        slots.apply(step);
        if let Some(fanout) = &mut self.fanout {
            fanout.finish_apply(slots);
        }
    }
}
