//! Descends from a placement by few moves: each step is the one that gains most per copy that it moves.
//!
//! Load above the caps comes before cost, as everywhere. The best step of every two devices is kept; after a step only the
//! pairs with a device that it changed are searched again, and all others when no step is left.

use rayon::prelude::*;

use super::budget::factor_per_copy;
use super::slots::{EMPTY, Share};
use super::terms::Terms;
use super::turns::{Links, neighbours, prices};
use super::{Layer, Move, Slots, Split};
use crate::control::Control;

/// A step of the descent, and the state after it.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Layer of the step.
    pub layer: usize,
    /// Slots that the step writes, and their contents after it; a single slot stands here twice.
    pub written: [(usize, u16); 2],
    /// Copies of all layers that are not where they run.
    pub moved: i64,
    /// Load above the caps, as parts of the caps, summed over layers.
    pub excess: f64,
    /// Change of the cost of all layers since the start, in weighted tokens.
    pub change: f64,
}

/// Gains below these are rounding errors: of load above caps, as a part of a cap, and of cost, as a part of a layer's cost.
const LEAST_RELIEF: f64 = 1e-12;
const LEAST_GAIN: f64 = 1e-9;
/// A step is left out if it gains less than this part of the best step's gain: sums of floats may be off by the rest.
const ALMOST_ALL: f64 = 1.0 - 1e-9;

/// Number of devices that steps try to relieve, of those to which the loss of another device adds most.
const COSTLIEST: usize = 3;

/// A budget of moves that allows any number: more copies than there are, and far from where sums overflow.
pub const UNLIMITED: i64 = i64::MAX / 2;

/// A step that gains something.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    step: Move,
    moves: i64,
    gain: f64,
    /// Gain per moved copy: less load above caps counts first, then less cost.
    per_copy: (f64, f64),
}

/// Limits of what steps between two devices, or in one, gain: known before single steps are evaluated.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Largest gain that the slowest devices allow, where they bound it.
    largest: Option<f64>,
    /// Smallest gain in cost that counts.
    smallest: f64,
    /// True if no device exceeds its cap.
    is_under: bool,
}

/// The descent of one layer.
struct Descent<'a> {
    layer: &'a Layer,
    slots: Slots,
    terms: Terms<'a>,
    /// The slots that run.
    running: &'a Slots,
    /// Best exchange of every two devices, and on the diagonal the best new content of a device's slot `[D, D]`.
    best: Vec<Option<Candidate>>,
    /// True if all of them were searched since the last step.
    is_fresh: bool,
    /// The best of these that the budget allows.
    top: Option<Candidate>,
    /// Windows in which a device is the slowest, and the sum of its leads there: the most that its relief gains `[D]`.
    slowest: Vec<(Vec<usize>, f64)>,
    /// Where losses count: whether a device is among those to which they add most, or the slowest in a window `[D]`.
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
        let (is_fresh, top, slowest, is_costly) = (false, None, vec![], None);
        let mut descent =
            Self { layer, slots, terms, running, best, is_fresh, top, slowest, is_costly, control };
        descent.update_slowest();
        descent
    }

    /// Finds the slowest devices; returns those that are it in other windows than before, or with a larger lead.
    fn update_slowest(&mut self) -> Vec<u16> {
        let mut slowest = vec![(vec![], 0.0); self.layer.devices()];
        if let Some(peak) = self.terms.peak() {
            for (window, device, lead) in peak.slowest() {
                slowest[device].0.push(window);
                slowest[device].1 += lead;
            }
        }
        let before = std::mem::replace(&mut self.slowest, slowest);
        let changed = |(g, now): (usize, &(Vec<usize>, f64))| {
            before.get(g).is_none_or(|before| before.0 != now.0 || before.1 < now.1).then_some(g as u16)
        };
        let mut changed: Vec<u16> = self.slowest.iter().enumerate().filter_map(changed).collect();
        changed.extend(self.update_costly());
        changed
    }

    /// Finds the devices that cost most where losses count; returns those that were not among them before.
    fn update_costly(&mut self) -> Vec<u16> {
        let costly = self.terms.after_losses().map(|powers| {
            let mut order: Vec<usize> = (0..powers.len()).collect();
            order.sort_by(|&g, &h| powers[h].total_cmp(&powers[g]));
            let mut costly: Vec<bool> = self.slowest.iter().map(|slow| slow.1 > 0.0).collect();
            order.iter().take(COSTLIEST).for_each(|&device| costly[device] = true);
            costly
        });
        let before = std::mem::replace(&mut self.is_costly, costly);
        let was = |g: usize| before.as_ref().is_some_and(|before| before[g]);
        let now = self.is_costly.iter().flatten().enumerate();
        now.filter(|&(g, is_costly)| *is_costly && !was(g)).map(|(g, _)| g as u16).collect()
    }

    /// Returns whether a step may relieve a device that costs most; in large layers the others are many, and gain little.
    fn may_relieve(&self, step: Move) -> bool {
        let Some(is_costly) = &self.is_costly else { return true };
        match step {
            Move::Swap(p, q) => is_costly[self.slots.device(p)] || is_costly[self.slots.device(q)],
            Move::Put(p, e) => {
                let relieves = |device: u16| is_costly[usize::from(device)];
                is_costly[self.slots.device(p)] || e != EMPTY && self.slots.devices(e).any(relieves)
            }
        }
    }

    /// Returns whether the slowest devices bound what a step gains: no other cost counts but theirs and separable ones.
    fn is_bounded(&self) -> bool {
        let layer = self.layer;
        let shares = layer.site.split != Split::Nearest || layer.slots() == layer.experts;
        shares && self.terms.are_of_slowest() && self.terms.excess() == 0.0
    }

    /// Returns an upper bound on a step's gain by the slowest devices. In the windows where a device is the slowest, the
    /// largest load falls by no more than that device's load; in other windows it does not fall. 0 if the step changes no
    /// slowest device.
    fn bound_gain(&self, step: Move) -> f64 {
        let mut shares = Vec::with_capacity(4);
        self.slots.shares(&self.layer.site, step, &mut shares, &mut vec![]);
        // Load of an expert in the windows in which a device is the slowest, as the time that the device takes for it.
        let less = |share: &Share| {
            let (load, g) = (self.layer.windows.of(share.expert), usize::from(share.device));
            let all: f64 = self.slowest[g].0.iter().map(|&window| f64::from(load[window])).sum();
            (share.before - share.after) * (all * self.layer.site.time[g])
        };
        let relief = shares.iter().map(less).sum::<f64>();
        // Parts of loads are rounded to whole numbers, in every window.
        if relief == 0.0 { 0.0 } else { relief + 2.0 * self.layer.windows.width as f64 }
    }

    /// Returns the smallest gain in cost that counts.
    fn smallest_gain(&self) -> f64 {
        LEAST_GAIN * self.terms.cost()
    }

    /// Evaluates an allowed step; none if it neither relieves caps nor gains more than `smallest` in cost. Under the caps
    /// the evaluation may end as soon as the step surely gains less.
    fn evaluate(&mut self, step: Move, smallest: f64, is_under: bool) -> Option<Candidate> {
        let limit = if is_under { -smallest } else { f64::INFINITY };
        let (excess_change, added) = self.terms.excess_and_change(&self.slots, step, limit);
        if excess_change > LEAST_RELIEF {
            return None;
        }
        let relief = if excess_change < -LEAST_RELIEF { -excess_change } else { 0.0 };
        if relief == 0.0 && -added <= smallest {
            return None;
        }
        let (moves, gain) = (self.slots.brings(self.running, step), -added / self.layer.windows.scale);
        let factor = factor_per_copy(moves as f64);
        let per_copy = (relief * factor, gain * factor);
        Some(Candidate { step, moves, gain, per_copy })
    }

    /// Evaluates a step, unless it cannot gain more than the best one.
    fn try_step(&mut self, step: Move, limits: Limits, best: &mut Option<Candidate>) {
        if !self.may_relieve(step) || !self.slots.allows(&self.layer.site, step) {
            return;
        }
        let mut smallest = limits.smallest;
        if limits.is_under
            && let Some(best) = best
        {
            let factor = factor_per_copy(self.slots.brings(self.running, step) as f64);
            smallest = smallest.max(best.per_copy.1 / factor * self.layer.windows.scale * ALMOST_ALL);
        }
        if let Some(largest) = limits.largest {
            let mut gain = largest.min(self.bound_gain(step));
            if self.terms.has_separable() {
                gain -= self.terms.separable_change(&self.slots, step);
            }
            if gain <= smallest {
                return;
            }
        }
        if let Some(choice) = self.evaluate(step, smallest, limits.is_under)
            && best.is_none_or(|best| choice.per_copy > best.per_copy)
        {
            *best = Some(choice);
        }
    }

    /// Searches all exchanges of two devices, or of one device all contents of its slots.
    fn search_pair(&mut self, g: usize, h: usize) {
        let mut best: Option<Candidate> = None;
        let bounded = self.is_bounded();
        let largest = if g == h { f64::INFINITY } else { self.slowest[g].1 + self.slowest[h].1 };
        let is_under = self.terms.excess() == 0.0;
        let limits = Limits { largest: bounded.then_some(largest), smallest: self.smallest_gain(), is_under };
        if !bounded || largest > 0.0 || self.terms.has_separable() {
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
                    if self.layer.charges_copies() {
                        self.try_step(Move::Put(p, EMPTY), limits, &mut best);
                    }
                }
            }
        }
        self.best[g * self.layer.devices() + h] = best;
    }

    /// Searches all pairs with a device for which `is_concerned` holds.
    fn search_pairs(&mut self, is_concerned: impl Fn(usize) -> bool) {
        let d = self.layer.devices();
        for g in 0..d {
            for h in g + usize::from(!self.layer.has_spare())..d {
                if is_concerned(g) || is_concerned(h) {
                    self.search_pair(g, h);
                }
                if self.control.stopped() {
                    return;
                }
            }
        }
    }

    /// Finds the step that gains most per copy, of those that move at most `moves_left` copies.
    fn choose(&mut self, moves_left: i64) {
        loop {
            let mut top: Option<(usize, Candidate)> = None;
            for (at, choice) in self.best.iter().enumerate() {
                if let Some(choice) = choice
                    && choice.moves <= moves_left
                    && top.is_none_or(|(_, best)| choice.per_copy > best.per_copy)
                {
                    top = Some((at, *choice));
                }
            }
            let Some((at, choice)) = top else {
                self.top = None;
                if self.is_fresh || self.control.stopped() {
                    return;
                }
                self.search_pairs(|_| true);
                self.is_fresh = !self.control.stopped();
                continue;
            };
            // A step that was the best may gain less by now: then it is compared again.
            let is_allowed = self.slots.allows(&self.layer.site, choice.step);
            let now = is_allowed.then(|| self.evaluate(choice.step, self.smallest_gain(), false)).flatten();
            self.best[at] = now;
            if now.is_some_and(|now| choice.per_copy <= now.per_copy) {
                self.top = now;
                return;
            }
        }
    }

    /// Takes a step; returns the devices whose loads it changes, and those that became or ceased to be the slowest.
    fn take(&mut self, step: Move) -> Vec<u16> {
        let mut touched = Vec::new();
        for edit in self.slots.edits(step) {
            if self.slots.copies(edit.expert) > 1 {
                touched.extend(self.slots.devices(edit.expert));
            }
            touched.extend(edit.from.into_iter().chain(edit.to));
        }
        self.terms.apply(&mut self.slots, step);
        touched.extend(self.update_slowest());
        touched
    }

    /// Returns the slots that a step has written, and their contents after it.
    fn written(&self, step: Move) -> [(usize, u16); 2] {
        let slots = match step {
            Move::Swap(p, q) => [p, q],
            Move::Put(p, _) => [p, p],
        };
        slots.map(|slot| (slot, self.slots.expert_in[slot]))
    }

    /// Finds the next step after one that has changed these devices.
    fn choose_next(&mut self, touched: &[u16], moves_left: i64) {
        self.is_fresh = false;
        self.search_pairs(|g| touched.contains(&(g as u16)));
        self.choose(moves_left);
    }

    /// Takes all steps of the layer, where other layers do not change what they gain.
    ///
    /// Where copies cost, only the devices whose slots a step changes are searched again after it: the tokens of an expert
    /// with many copies change on most devices. All are searched when no step is left.
    fn descend(mut self) -> LayerSteps {
        let (excess, mut taken) = (self.terms.excess(), Vec::new());
        let is_lazy = self.layer.charges_copies() && self.layer.has_spare();
        while let Some(choice) = self.top.filter(|_| !self.control.stopped()) {
            self.control.count(1);
            let mut touched = self.take(choice.step);
            let written = self.written(choice.step);
            if is_lazy {
                touched = written.map(|(slot, _)| self.slots.device(slot) as u16).to_vec();
            }
            self.choose_next(&touched, UNLIMITED);
            taken.push(Taken { choice, written, excess: self.terms.excess() });
        }
        LayerSteps { excess, taken }
    }
}

/// A step that a layer has taken by itself, and its load above the cap after it.
struct Taken {
    choice: Candidate,
    written: [(usize, u16); 2],
    excess: f64,
}

/// The steps of a layer, and its load above the cap before them.
struct LayerSteps {
    excess: f64,
    taken: Vec<Taken>,
}

/// Returns the steps of all layers in one order: always the one, of those that are next in their layers, that gains most.
fn merge_steps(layers: Vec<LayerSteps>, mut moved: i64) -> Vec<Step> {
    let mut excess: Vec<f64> = layers.iter().map(|layer| layer.excess).collect();
    let mut next: Vec<_> = layers.into_iter().map(|layer| layer.taken.into_iter().peekable()).collect();
    let (mut steps, mut change) = (Vec::new(), 0.0);
    loop {
        let tops =
            next.iter_mut().enumerate().filter_map(|(l, steps)| Some((l, steps.peek()?.choice.per_copy)));
        let best = tops.reduce(|best, other| if other.1 > best.1 { other } else { best });
        let Some((l, _)) = best else { break };
        let Some(Taken { choice, written, excess: after }) = next[l].next() else { break };
        excess[l] = after;
        moved += choice.moves;
        change -= choice.gain;
        steps.push(Step { layer: l, written, moved, excess: excess.iter().sum(), change });
    }
    steps
}

/// Descends from `start` until no step gains, or until `max_moves` copies are on devices where they do not run.
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
    // If the time is over before all layers were searched, no step is known to be the best.
    let mut all = all.unwrap_or_default();
    if !linked && control.deadline.is_none() && max_moves == UNLIMITED {
        return merge_steps(all.into_par_iter().map(Descent::descend).collect(), moved);
    }
    let (mut steps, mut change) = (Vec::new(), 0.0);
    while !control.stopped() {
        for descent in &mut all {
            if descent.top.is_some_and(|top| top.moves > max_moves - moved) {
                descent.choose(max_moves - moved);
            }
        }
        let tops = all.iter().enumerate().filter_map(|(l, descent)| descent.top.map(|top| (l, top)));
        let best = tops.reduce(|best, other| if other.1.per_copy > best.1.per_copy { other } else { best });
        let Some((l, Candidate { step, moves, gain, .. })) = best else { break };
        control.count(1);
        moved += moves;
        change -= gain;
        let touched = all[l].take(step);
        let written = all[l].written(step);
        let neighbours = if linked { l.saturating_sub(1)..(l + 2).min(all.len()) } else { l..l + 1 };
        for m in neighbours.clone().filter(|&m| m != l) {
            update_prices(&mut all, links, m);
        }
        for descent in &mut all[neighbours] {
            descent.choose_next(&touched, max_moves - moved);
        }
        let excess = all.iter().map(|descent| descent.terms.excess()).sum();
        steps.push(Step { layer: l, written, moved, excess, change });
    }
    steps
}

/// Updates the prices of serving in a layer after a neighbour has changed.
fn update_prices(all: &mut [Descent<'_>], links: Links<'_>, l: usize) {
    let neighbours = neighbours(all, l).map(|neighbour| neighbour.map(|descent| &descent.slots));
    let serve_cost = prices(all[l].layer, neighbours, links, l);
    let descent = &mut all[l];
    descent.terms = Terms::with_serving(descent.layer, &descent.slots, serve_cost.into());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::terms::losses::Losses;
    use super::super::terms::windows::{Measure, Windows};
    use super::super::{Rules, Site};
    use super::*;
    use crate::random::Random;

    proptest! {
        /// Above the caps the best exchange of two devices relieves most and, of those that relieve as much, costs least.
        #[test]
        fn exchanges_above_the_caps_are_the_best(seed: u64) {
            let mut random = Random::new(seed, 0);
            let (experts, devices) = (8, 4);
            let load: Vec<f64> = (0..experts).map(|_| (2 + random.below(2)) as f64).collect();
            let rules = Rules { cap: load.iter().sum::<f64>() / devices as f64, ..Rules::default() };
            let site = Site { rules, ..Site::plain(vec![4; devices], vec![1.0; devices]) };
            let domain = (0..devices as u16).collect();
            // The window has other loads than the sum, so what relieves caps may cost.
            let of_window: Vec<f64> = load.iter().map(|_| random.below(100) as f64).collect();
            let windows = Windows::new(&of_window, &[1.0], experts, &site, Measure::Peak);
            let mut layer = Layer::plain(site, load, windows);
            layer.costs.losses = Some(Losses { domain, cost: layer.windows.scale });
            // Two devices hold each expert once, and so do the two others.
            let halves = [0u16; 2].map(|_| {
                let mut half: Vec<u16> = (0..experts as u16).collect();
                random.shuffle(&mut half);
                half
            });
            let slots = Slots::new(&layer.site.capacity, experts, &halves.concat());
            let control = Control::new(None);
            let mut descent = Descent::new(&layer, slots.clone(), &slots, None, &control);
            prop_assume!(descent.terms.excess() > 0.0);
            descent.search_pairs(|_| true);
            let smallest = descent.smallest_gain();
            for (g, h) in (0..devices).flat_map(|g| (g + 1..devices).map(move |h| (g, h))) {
                let found = descent.best[g * devices + h].map(|best| best.per_copy);
                let mut best: Option<(f64, f64)> = None;
                for (p, q) in slots.of(g).flat_map(|p| slots.of(h).map(move |q| (p, q))) {
                    let step = Move::Swap(p, q);
                    if descent.may_relieve(step)
                        && slots.allows(&layer.site, step)
                        && let Some(choice) = descent.evaluate(step, smallest, false)
                        && best.is_none_or(|best| choice.per_copy > best)
                    {
                        best = Some(choice.per_copy);
                    }
                }
                prop_assert_eq!(found, best);
            }
        }
    }
}
