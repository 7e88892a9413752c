//! Terms of a layer's cost: each knows what a move changes, exactly, and how to apply it.

pub(super) mod balance;
pub(super) mod caps;
pub mod divided;
pub mod fanout;
pub(super) mod linear;
mod loads;
pub mod losses;
mod norm;
mod peak;
mod ports;
pub mod reading;
pub mod together;
pub mod windows;

use super::slots::{Looked, Share};
use crate::layer::{Layer, Move, Slots};
use crate::random::Random;
use balance::Balance;
use caps::Caps;
use divided::Divided;
use fanout::Fanout;
use losses::{LeftOver, Losses};
use reading::Reading;
use together::{Pairs, Together};

/// What costs in a layer besides its windows.
#[derive(Debug, Clone, Default)]
pub struct Costs {
    /// Weights that are read in the windows, where that may take longer than the tokens.
    pub reading: Option<Reading>,
    /// What a row at the busiest port costs, in tokens; 0 for nothing.
    pub row: f64,
    /// Cost of a copy of an expert on a device, whatever it serves `[E, D]`; empty for none.
    pub copy_cost: Vec<f64>,
    /// Cost of serving all of an expert's tokens from a device; a copy pays its share `[E, D]`; empty for none.
    pub serve_cost: Vec<f64>,
    /// Expert sets, where visits of devices and nodes cost.
    pub sets: Option<fanout::Lazy>,
    /// Co-activated pairs, where those that are apart cost.
    pub pairs: Option<Pairs>,
    /// Where it costs what lost devices leave to others.
    pub losses: Option<Losses>,
    /// Windows whose tokens a dispatcher divides over copies as is best.
    pub divided: Option<divided::Loads>,
}

impl Costs {
    /// Whether a cost is asked which shares of tokens a move changes, even if copies exchange places and keep them.
    ///
    /// All are named: a new one does not compile until it is said here what it asks.
    #[inline(always)]
    fn ask_for_shares(&self) -> bool {
        let Self { reading, row, copy_cost: _, serve_cost, sets: _, pairs, losses: _, divided: _ } = self;
        reading.is_some() || *row > 0.0 || !serve_cost.is_empty() || pairs.is_some()
    }

    /// Whether something is linear: a copy costs what it does, whoever else is there.
    pub(super) fn has_linear(&self) -> bool {
        !(self.serve_cost.is_empty() && self.copy_cost.is_empty())
    }
}

/// The terms of a layer's cost, for the slots as they stand.
#[derive(Debug)]
pub(super) struct Terms {
    /// None where no window weighs anything.
    pub(super) balance: Option<Balance>,
    /// None where visits cost nothing.
    fanout: Option<Fanout>,
    /// None where pairs cost nothing.
    together: Option<Together>,
    /// None where lost devices cost nothing.
    left_over: Option<LeftOver>,
    /// None where no window's tokens are divided as is best.
    divided: Option<Divided>,
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
        let fanout = layer.costs.sets.as_ref().map(|sets| Fanout::new(layer, sets, slots));
        let pairs = layer.costs.pairs.as_ref();
        let together = pairs.map(|pairs| Together::new(layer, pairs, slots));
        let by_pairs = || together.as_ref().zip(pairs).map(|(together, pairs)| together.met(pairs));
        let met = || fanout.as_ref().map(Fanout::met).or_else(by_pairs);
        Self {
            balance: (!weightless).then(|| Balance::of_time(layer, slots, met())),
            fanout,
            together,
            left_over: layer.costs.losses.as_ref().map(|losses| LeftOver::new(layer, losses, slots)),
            divided: layer.costs.divided.as_ref().map(|loads| Divided::new(layer, loads, slots)),
            caps: Caps::new(layer, slots),
            linear: linear::cost(layer, slots),
            shares: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// Whether tokens of the slowest devices, and what is linear, are all that costs: those bound what a move gains.
    ///
    /// All terms are named: a new one does not compile until it is said here whether it may cost then.
    pub(super) fn are_of_slowest(&self) -> bool {
        let Self { balance, fanout, together, left_over, divided, caps: _, linear: _, shares: _, devices: _ } =
            self;
        let of_tokens = |balance: &Balance| balance.peak().is_some() && balance.is_of_tokens();
        balance.as_ref().is_some_and(of_tokens)
            && fanout.is_none()
            && together.is_none()
            && left_over.is_none()
            && divided.is_none()
    }

    pub(super) fn cost(&self, layer: &Layer) -> f64 {
        let balance = self.balance.as_ref().map_or(0.0, Balance::cost);
        let fanout = self
            .fanout
            .as_ref()
            .zip(layer.costs.sets.as_ref())
            .map_or(0.0, |(fanout, sets)| fanout.cost(sets));
        let together = self
            .together
            .as_ref()
            .zip(layer.costs.pairs.as_ref())
            .map_or(0.0, |(together, pairs)| together.cost(pairs));
        let left_over = self
            .left_over
            .as_ref()
            .zip(layer.costs.losses.as_ref())
            .map_or(0.0, |(left_over, losses)| left_over.cost(losses));
        balance + fanout + together + left_over + self.of_divided() + self.linear
    }

    /// What the slowest devices cost, whatever stands for them, of windows and after losses, and what is linear.
    pub(super) fn slowest(&self, layer: &Layer) -> f64 {
        let balance = self.balance.as_ref().map_or(0.0, |balance| balance.slowest(layer));
        let left_over = self.left_over.as_ref().zip(layer.costs.losses.as_ref());
        let after = left_over.map_or(0.0, |(left_over, losses)| left_over.slowest(losses));
        balance + after + self.of_divided() + self.linear
    }

    /// Time of the slowest devices where a dispatcher divides tokens over copies.
    fn of_divided(&self) -> f64 {
        self.divided.as_ref().map_or(0.0, Divided::cost)
    }

    /// A device that costs most where losses count: the slowest in a window, or the one to which losses do most.
    pub(super) fn costliest(&self, layer: &Layer, random: &mut Random) -> Option<usize> {
        let left_over = self.left_over.as_ref()?;
        let peak = self.balance.as_ref().and_then(Balance::peak).filter(|_| random.below(2) == 0);
        let slowest = peak.and_then(|peak| peak.slowest_in(random.below(layer.windows.count.max(1))));
        Some(slowest.unwrap_or_else(|| left_over.busiest()))
    }

    /// What a move would add to the cost; nothing if it breaks the cap, or if that is surely more than a limit.
    pub(super) fn change(&mut self, layer: &Layer, slots: &Slots, step: Move, limit: f64) -> Option<f64> {
        self.look(layer, slots, step);
        if self.caps.allows(layer, &self.shares) { self.added(layer, slots, step, limit) } else { None }
    }

    /// Notes which shares a move changes, unless no term asks.
    #[inline(always)]
    fn look(&mut self, layer: &Layer, slots: &Slots, step: Move) {
        let by_share = layer.site.rules.cap < f64::INFINITY || layer.costs.ask_for_shares();
        if by_share || balance::exchange(layer, slots, step).is_none() {
            slots.shares(&layer.site, step, &mut self.shares, &mut self.devices);
        }
    }

    /// What a move would add to excess over the caps, and to the cost: infinitely much if that is surely more than a limit.
    pub(super) fn rise(&mut self, layer: &Layer, slots: &Slots, step: Move, limit: f64) -> (f64, f64) {
        self.look(layer, slots, step);
        let rise = self.caps.rise(layer, &self.shares);
        (rise, self.added(layer, slots, step, limit).unwrap_or(f64::INFINITY))
    }

    /// How much every device counts after losses `[D]`, where these and the slowest devices are nearly all that costs.
    pub(super) fn after_losses(&self) -> Option<&[f64]> {
        let is_alone = self.fanout.is_none() && self.together.is_none() && self.divided.is_none();
        let has_slowest = self.balance.as_ref().is_none_or(|balance| balance.peak().is_some());
        self.left_over.as_ref().filter(|_| is_alone && has_slowest).map(LeftOver::powers)
    }

    /// What a move would add to the linear costs alone.
    pub(super) fn linear_change(&mut self, layer: &Layer, slots: &Slots, step: Move) -> f64 {
        self.look(layer, slots, step);
        linear::change(layer, Looked { slots, step, shares: &self.shares })
    }

    /// What a move adds to the cost, unless that is surely more than a limit.
    fn added(&mut self, layer: &Layer, slots: &Slots, step: Move, limit: f64) -> Option<f64> {
        let looked = Looked { slots, step, shares: &self.shares };
        let mut change = linear::change(layer, looked);
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.costs.sets) {
            change += fanout.change(layer, sets, slots, step);
            fanout.meet(layer, sets, looked.shares);
        }
        if let (Some(together), Some(pairs)) = (&mut self.together, &layer.costs.pairs) {
            change += together.change(pairs, looked.shares);
            if layer.costs.row > 0.0 {
                together.meet(pairs);
            }
        }
        if let Some(balance) = &mut self.balance {
            change += balance.change(layer, looked, met_then(self.fanout.as_ref(), self.together.as_ref()));
        }
        if let (Some(left_over), Some(losses)) = (&mut self.left_over, &layer.costs.losses) {
            // Most moves add more to the slowest device than losses could gain: what these are takes longer.
            if self.divided.is_none() && change - left_over.gain(losses, slots, step) > limit {
                return None;
            }
            change += left_over.change(layer, losses, slots, step);
        }
        if let Some(divided) = &mut self.divided {
            change += divided.change(slots, step);
        }
        Some(change)
    }

    /// Makes a move that is allowed.
    pub(super) fn apply(&mut self, layer: &Layer, slots: &mut Slots, step: Move) {
        slots.shares(&layer.site, step, &mut self.shares, &mut self.devices);
        self.caps.apply(layer, &self.shares);
        self.linear += linear::change(layer, Looked { slots, step, shares: &self.shares });
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.costs.sets)
            && layer.costs.row > 0.0
        {
            // Which visits there are then: what a move adds was asked for some moves ago.
            fanout.change(layer, sets, slots, step);
            fanout.meet(layer, sets, &self.shares);
        }
        if let (Some(together), Some(pairs)) = (&mut self.together, &layer.costs.pairs)
            && layer.costs.row > 0.0
        {
            together.change(pairs, &self.shares);
            together.meet(pairs);
        }
        if let Some(balance) = &mut self.balance {
            let met = met_then(self.fanout.as_ref(), self.together.as_ref());
            balance.apply(layer, Looked { slots, step, shares: &self.shares }, met);
        }
        if let (Some(together), Some(pairs)) = (&mut self.together, &layer.costs.pairs) {
            together.apply(pairs, &self.shares);
        }
        if let Some(left_over) = &mut self.left_over {
            left_over.apply(layer, slots, step);
        }
        if let Some(divided) = &mut self.divided {
            divided.apply(slots, step);
        }
        if let (Some(fanout), Some(sets)) = (&mut self.fanout, &layer.costs.sets) {
            fanout.serve(sets, &self.shares);
        }
        let touched = self.fanout.is_some().then(|| fanout::touched(slots, step));
        slots.apply(step);
        if let (Some(fanout), Some(sets), Some(touched)) = (&mut self.fanout, &layer.costs.sets, touched) {
            fanout.refresh(layer, sets, slots, &touched);
        }
    }
}

/// Visits for each token of load of the devices that a move changes: by expert sets, or by pairs where those are not known.
fn met_then<'a>(fanout: Option<&'a Fanout>, together: Option<&'a Together>) -> &'a [(u16, f32)] {
    let by_pairs = together.map_or(&[][..], Together::met_then);
    fanout.map_or(by_pairs, Fanout::met_then)
}
