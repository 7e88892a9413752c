//! From a running placement to better ones by few moves: always the step that gains most for a copy that it brings.
//!
//! Load above the caps comes before all else, as everywhere. The best exchange of every two devices is noted; a step looks
//! again only at the pairs of devices that it touches, and at others when it is their turn.

use rayon::prelude::*;

use super::budget::per_copy;
use super::slots::Share;
use super::terms::Terms;
use super::turns::{Links, neighbours, prices};
use super::{Layer, Move, Slots, Split};
use crate::control::Control;

/// A step, and what is so after it.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Layer of the step.
    pub layer: usize,
    /// Slots that it writes, and what is in them then; one twice where it writes no other.
    pub written: [(usize, u16); 2],
    /// Copies that are brought in all.
    pub moved: i64,
    /// By what part layers exceed their caps, summed.
    pub excess: f64,
    /// What the cost of all layers has changed by since the start, in weighted tokens.
    pub change: f64,
}

/// What is gained below these is rounding: as a part of a cap, and of a layer's cost.
const LEAST_RELIEF: f64 = 1e-12;
const LEAST_GAIN: f64 = 1e-9;
/// The part of the best step's gain below which others are left out: sums of floats may be off by as much.
const NEARLY: f64 = 1.0 - 1e-9;

/// Devices to which losses do most whose relief is looked at.
const COSTLIEST: usize = 3;

/// Copies that may be brought where any number may: more than there are, and far from where sums overflow.
pub const UNLIMITED: i64 = i64::MAX / 2;

/// A step that is worth something.
#[derive(Debug, Clone, Copy)]
struct Choice {
    step: Move,
    moves: i64,
    gain: f64,
    /// What it is worth for a copy that it brings: less load above caps first, then less cost.
    worth: (f64, f64),
}

/// What is known of steps between two devices, or in one, before they are looked at.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// What the slowest devices gain at the most, where they bound it.
    relief: Option<f64>,
    /// What a step gains at the least, in cost, to be worth something.
    least: f64,
    /// Whether no device exceeds its cap.
    is_under: bool,
}

/// A layer on its way down.
struct Descent<'a> {
    layer: &'a Layer,
    slots: Slots,
    terms: Terms<'a>,
    /// What runs.
    running: &'a Slots,
    /// Best exchange of two devices, and on the diagonal the best new content of a slot `[D, D]`.
    best: Vec<Option<Choice>>,
    /// Whether all of them are of the slots as they stand.
    fresh: bool,
    /// The best of all that may be done.
    top: Option<Choice>,
    /// Windows in which a device is the slowest, and by how much in all: what can be gained there at the most `[D]`.
    slow: Vec<(Vec<usize>, f64)>,
    /// Where losses count: whether a device is among those to which they do most, or the slowest in a window `[D]`.
    is_costly: Option<Vec<bool>>,
    control: &'a Control,
}

impl<'a> Descent<'a> {
    fn new(
        layer: &'a Layer,
        slots: Slots,
        running: &'a Slots,
        serve_cost: Option<Vec<f64>>,
        control: &'a Control,
    ) -> Self {
        let terms = match serve_cost {
            Some(serve_cost) => Terms::with_serving(layer, &slots, serve_cost.into()),
            None => Terms::new(layer, &slots),
        };
        let best = vec![None; layer.devices() * layer.devices()];
        let (fresh, top, slow, is_costly) = (false, None, vec![], None);
        let mut descent = Self { layer, slots, terms, running, best, fresh, top, slow, is_costly, control };
        descent.find_slow();
        descent
    }

    /// Finds the slowest devices; the ones of other windows than before, or where there is more to gain now.
    fn find_slow(&mut self) -> Vec<u16> {
        let mut slow = vec![(vec![], 0.0); self.layer.devices()];
        if let Some(peak) = self.terms.peak() {
            for (window, device, lead) in peak.slowest() {
                slow[device].0.push(window);
                slow[device].1 += lead;
            }
        }
        let before = std::mem::replace(&mut self.slow, slow);
        let changed = |(g, now): (usize, &(Vec<usize>, f64))| {
            before.get(g).is_none_or(|before| before.0 != now.0 || before.1 < now.1).then_some(g as u16)
        };
        let mut changed: Vec<u16> = self.slow.iter().enumerate().filter_map(changed).collect();
        changed.extend(self.find_costly());
        changed
    }

    /// Finds the devices that cost most where losses count; those that did not before.
    fn find_costly(&mut self) -> Vec<u16> {
        let costly = self.terms.after_losses().map(|powers| {
            let mut order: Vec<usize> = (0..powers.len()).collect();
            order.sort_by(|&g, &h| powers[h].total_cmp(&powers[g]));
            let mut costly: Vec<bool> = self.slow.iter().map(|slow| slow.1 > 0.0).collect();
            order.iter().take(COSTLIEST).for_each(|&device| costly[device] = true);
            costly
        });
        let before = std::mem::replace(&mut self.is_costly, costly);
        let was = |g: usize| before.as_ref().is_some_and(|before| before[g]);
        let now = self.is_costly.iter().flatten().enumerate();
        now.filter(|&(g, is_costly)| *is_costly && !was(g)).map(|(g, _)| g as u16).collect()
    }

    /// Whether a step may relieve a device that costs most: of large layers others gain little, and are many.
    fn is_worth_a_look(&self, step: Move) -> bool {
        let Some(is_costly) = &self.is_costly else { return true };
        match step {
            Move::Swap(p, q) => is_costly[self.slots.device(p)] || is_costly[self.slots.device(q)],
            Move::Put(p, e) => {
                let relieves = |device: u16| is_costly[usize::from(device)];
                is_costly[self.slots.device(p)] || self.slots.devices(e).any(relieves)
            }
        }
    }

    /// Whether the slowest devices bound what a step gains: where they, and what is separable, are all that costs.
    fn is_bounded(&self) -> bool {
        let layer = self.layer;
        let shares = layer.site.split != Split::Nearest || layer.slots() == layer.experts;
        shares && self.terms.are_of_slowest() && self.terms.excess() == 0.0
    }

    /// What a step gains at the most where a device is the slowest: there, the largest load falls by no more than that
    /// device's, and elsewhere not at all. Nothing where no slowest device feels it.
    fn relieves(&self, step: Move) -> f64 {
        let mut shares = Vec::with_capacity(4);
        self.slots.shares(&self.layer.site, step, &mut shares, &mut vec![]);
        // Load of an expert in the windows in which a device is the slowest, as the time that the device takes for it.
        let less = |share: &Share| {
            let (load, g) = (self.layer.windows.of(share.expert), usize::from(share.device));
            let all: f64 = self.slow[g].0.iter().map(|&window| f64::from(load[window])).sum();
            (share.before - share.after) * (all * self.layer.site.time[g])
        };
        let relief = shares.iter().map(less).sum::<f64>();
        // Parts of loads are rounded to whole numbers, in every window.
        if relief == 0.0 { 0.0 } else { relief + 2.0 * self.layer.windows.width as f64 }
    }

    /// What a step gains at the least, in cost, to be worth something.
    fn least_gain(&self) -> f64 {
        LEAST_GAIN * self.terms.cost()
    }

    /// What an allowed step is worth, if it relieves caps or gains more than this; what surely gains less may be left out
    /// where nothing is above the caps.
    fn judge(&mut self, step: Move, least: f64, is_under: bool) -> Option<Choice> {
        let limit = if is_under { -least } else { f64::INFINITY };
        let (rise, added) = self.terms.rise(&self.slots, step, limit);
        if rise > LEAST_RELIEF {
            return None;
        }
        let relief = if rise < -LEAST_RELIEF { -rise } else { 0.0 };
        if relief == 0.0 && -added <= least {
            return None;
        }
        let (moves, gain) = (self.slots.brings(self.running, step), -added / self.layer.windows.scale);
        let part = per_copy(moves as f64);
        let worth = (relief * part, gain * part);
        Some(Choice { step, moves, gain, worth })
    }

    /// Judges a step, unless it gains less than the best.
    fn try_step(&mut self, step: Move, limits: Limits, best: &mut Option<Choice>) {
        if !self.is_worth_a_look(step) || !self.slots.allows(&self.layer.site, step) {
            return;
        }
        let mut least = limits.least;
        if limits.is_under
            && let Some(best) = best
        {
            let part = per_copy(self.slots.brings(self.running, step) as f64);
            least = least.max(best.worth.1 / part * self.layer.windows.scale * NEARLY);
        }
        if let Some(relief) = limits.relief {
            let mut gain = relief.min(self.relieves(step));
            if self.terms.has_separable() {
                gain -= self.terms.separable_change(&self.slots, step);
            }
            if gain <= least {
                return;
            }
        }
        if let Some(choice) = self.judge(step, least, limits.is_under)
            && best.is_none_or(|best| choice.worth > best.worth)
        {
            *best = Some(choice);
        }
    }

    /// Looks at all exchanges of two devices, or (of one) at all contents of its slots.
    fn look(&mut self, g: usize, h: usize) {
        let mut best: Option<Choice> = None;
        let bounded = self.is_bounded();
        let relief = if g == h { f64::INFINITY } else { self.slow[g].1 + self.slow[h].1 };
        let is_under = self.terms.excess() == 0.0;
        let limits = Limits { relief: bounded.then_some(relief), least: self.least_gain(), is_under };
        if !bounded || relief > 0.0 || self.terms.has_separable() {
            for p in self.slots.of(g) {
                if self.control.stopped() {
                    return;
                }
                if g != h {
                    self.slots.of(h).for_each(|q| self.try_step(Move::Swap(p, q), limits, &mut best));
                } else if self.slots.may_lose(&self.layer.site, p) {
                    for e in 0..self.layer.experts as u16 {
                        self.try_step(Move::Put(p, e), limits, &mut best);
                    }
                }
            }
        }
        self.best[g * self.layer.devices() + h] = best;
    }

    /// Looks at all pairs of devices that `concern` says yes to.
    fn look_at(&mut self, concern: impl Fn(usize) -> bool) {
        let d = self.layer.devices();
        for g in 0..d {
            for h in g + usize::from(!self.layer.has_spare())..d {
                if concern(g) || concern(h) {
                    self.look(g, h);
                }
                if self.control.stopped() {
                    return;
                }
            }
        }
    }

    /// Finds the step that is worth most of those that bring at most `left` copies.
    fn choose(&mut self, left: i64) {
        loop {
            let mut top: Option<(usize, Choice)> = None;
            for (at, choice) in self.best.iter().enumerate() {
                if let Some(choice) = choice
                    && choice.moves <= left
                    && top.is_none_or(|(_, best)| choice.worth > best.worth)
                {
                    top = Some((at, *choice));
                }
            }
            let Some((at, choice)) = top else {
                self.top = None;
                if self.fresh || self.control.stopped() {
                    return;
                }
                self.look_at(|_| true);
                self.fresh = !self.control.stopped();
                continue;
            };
            // What was best earlier may be worth less by now: then it stands back.
            let is_allowed = self.slots.allows(&self.layer.site, choice.step);
            let now = is_allowed.then(|| self.judge(choice.step, self.least_gain(), false)).flatten();
            self.best[at] = now;
            if now.is_some_and(|now| choice.worth <= now.worth) {
                self.top = now;
                return;
            }
        }
    }

    /// Makes a step; the devices whose loads it changes, and those that are the slowest now or were.
    fn make(&mut self, step: Move) -> Vec<u16> {
        let mut touched = Vec::new();
        for edit in self.slots.edits(step) {
            if self.slots.copies(edit.expert) > 1 {
                touched.extend(self.slots.devices(edit.expert));
            }
            touched.extend(edit.from.into_iter().chain(edit.to));
        }
        self.terms.apply(&mut self.slots, step);
        touched.extend(self.find_slow());
        touched
    }

    /// The slots that a step that was made has written, and what is in them.
    fn written(&self, step: Move) -> [(usize, u16); 2] {
        let slots = match step {
            Move::Swap(p, q) => [p, q],
            Move::Put(p, _) => [p, p],
        };
        slots.map(|slot| (slot, self.slots.expert_in[slot]))
    }

    /// Finds the next step after one that has touched these devices.
    fn look_again(&mut self, touched: &[u16], left: i64) {
        self.fresh = false;
        self.look_at(|g| touched.contains(&(g as u16)));
        self.choose(left);
    }

    /// By what part the layer exceeds its cap.
    fn excess(&self) -> f64 {
        self.terms.excess()
    }

    /// All steps of the layer, where nothing that other layers do matters to it.
    fn all_steps(mut self) -> Steps {
        let (before, mut made) = (self.excess(), Vec::new());
        while let Some(choice) = self.top.filter(|_| !self.control.stopped()) {
            self.control.count(1);
            let touched = self.make(choice.step);
            let written = self.written(choice.step);
            self.look_again(&touched, UNLIMITED);
            made.push(Made { choice, written, excess: self.excess() });
        }
        Steps { before, made }
    }
}

/// A step that a layer has made by itself, and by what part it exceeds its cap then.
struct Made {
    choice: Choice,
    written: [(usize, u16); 2],
    excess: f64,
}

/// The steps of a layer, and by what part it exceeded its cap before.
struct Steps {
    before: f64,
    made: Vec<Made>,
}

/// The steps of all layers in the order in which each is worth most of those that come next in their layers.
fn join(layers: Vec<Steps>, mut moved: i64) -> Vec<Step> {
    let mut excess: Vec<f64> = layers.iter().map(|layer| layer.before).collect();
    let mut next: Vec<_> = layers.into_iter().map(|layer| layer.made.into_iter().peekable()).collect();
    let (mut steps, mut change) = (Vec::new(), 0.0);
    loop {
        let tops = next.iter_mut().enumerate().filter_map(|(l, made)| Some((l, made.peek()?.choice.worth)));
        let best = tops.reduce(|best, other| if other.1 > best.1 { other } else { best });
        let Some((l, _)) = best else { break };
        let Some(Made { choice, written, excess: after }) = next[l].next() else { break };
        excess[l] = after;
        moved += choice.moves;
        change -= choice.gain;
        steps.push(Step { layer: l, written, moved, excess: excess.iter().sum(), change });
    }
    steps
}

/// Goes from `start` down to where no step is worth anything, or until `most` copies are where none are
/// `running`.
///
/// The answer does not depend on the number of threads.
#[must_use]
pub fn descend(
    layers: &[Layer],
    start: Vec<Slots>,
    running: &[Slots],
    links: Links<'_>,
    max_moves: i64,
    control: &Control,
) -> Vec<Step> {
    let linked = !links.transitions.is_empty();
    let serving = |l: usize| prices(&layers[l], neighbours(&start, l), links, l);
    let priced = (0..layers.len()).map(|l| (linked && !control.stopped()).then(|| serving(l)));
    let priced: Vec<Option<Vec<f64>>> = priced.collect();
    let mut moved: i64 = start.iter().zip(running).map(|(slots, running)| slots.moved_from(running)).sum();
    let begin = |(((layer, slots), running), serve_cost)| {
        if control.stopped() {
            return None;
        }
        let mut descent = Descent::new(layer, slots, running, serve_cost, control);
        descent.choose(max_moves - moved);
        Some(descent)
    };
    let all: Option<Vec<Descent<'_>>> =
        layers.par_iter().zip(start).zip(running).zip(priced).map(begin).collect();
    // Where the time is over before all layers were looked at, no step is known to be the best.
    let mut all = all.unwrap_or_default();
    if !linked && control.deadline.is_none() && max_moves == UNLIMITED {
        return join(all.into_par_iter().map(Descent::all_steps).collect(), moved);
    }
    let (mut steps, mut change) = (Vec::new(), 0.0);
    while !control.stopped() {
        for descent in &mut all {
            if descent.top.is_some_and(|top| top.moves > max_moves - moved) {
                descent.choose(max_moves - moved);
            }
        }
        let tops = all.iter().enumerate().filter_map(|(l, descent)| descent.top.map(|top| (l, top)));
        let best = tops.reduce(|best, other| if other.1.worth > best.1.worth { other } else { best });
        let Some((l, Choice { step, moves, gain, .. })) = best else { break };
        control.count(1);
        moved += moves;
        change -= gain;
        let touched = all[l].make(step);
        let written = all[l].written(step);
        let neighbours = if linked { l.saturating_sub(1)..(l + 2).min(all.len()) } else { l..l + 1 };
        for m in neighbours.clone().filter(|&m| m != l) {
            price(&mut all, links, m);
        }
        for descent in &mut all[neighbours] {
            descent.look_again(&touched, max_moves - moved);
        }
        let excess = all.iter().map(Descent::excess).sum();
        steps.push(Step { layer: l, written, moved, excess, change });
    }
    steps
}

/// Prices serving in a layer, given its neighbours.
fn price(all: &mut [Descent<'_>], links: Links<'_>, l: usize) {
    let neighbours = neighbours(all, l).map(|neighbour| neighbour.map(|descent| &descent.slots));
    let serve_cost = prices(all[l].layer, neighbours, links, l);
    let descent = &mut all[l];
    descent.terms = Terms::with_serving(descent.layer, &descent.slots, serve_cost.into());
}
