//! From a running placement to better ones by few moves: always the step that gains most for a copy that has to be brought.
//!
//! Load above the caps comes before all else, as everywhere. The best exchange of every two devices is kept; a step looks
//! again only at the pairs of devices that it touches, and at others when it is their turn.

use rayon::prelude::*;

use super::terms::balance::Balance;
use super::terms::{Terms, linear};
use super::turns::{Links, prices};
use super::{EMPTY, Layer, Move, Placement, Split};
use crate::control::Control;

/// A step, and what is so after it.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Layer of the step.
    pub layer: usize,
    /// Its change of slots.
    pub step: Move,
    /// Copies that have to be brought in all.
    pub moved: i64,
    /// By what part layers exceed their caps, summed.
    pub excess: f64,
    /// What the cost of all layers has changed by since the start, in weighted tokens.
    pub change: f64,
}

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Copies that may be brought at the most.
    pub most: i64,
    /// Whether an expert's number of copies may change.
    pub copies: bool,
}

/// What is gained below these is rounding: as a part of a cap, and of a layer's cost.
const LEAST_RELIEF: f64 = 1e-12;
const LEAST_GAIN: f64 = 1e-9;
/// Moves that a step counts as which brings nothing, or takes back what was brought.
const FREE: f64 = 1e-3;

/// What a step is worth, for each copy that it brings: less load above caps first, then less cost.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Worth {
    relief: f64,
    gain: f64,
}

impl Worth {
    fn beats(self, other: Self) -> bool {
        (self.relief, self.gain) > (other.relief, other.gain)
    }
}

/// A step that is worth something.
#[derive(Debug, Clone, Copy)]
struct Choice {
    step: Move,
    moves: i64,
    gain: f64,
    worth: Worth,
}

/// What gains of a step that brings so many copies are divided by.
fn each(moves: i64) -> f64 {
    if moves > 0 { moves as f64 } else { FREE }
}

/// A layer on its way down.
struct Walk<'a> {
    placement: Placement,
    terms: Terms,
    /// Where the running placement has experts `[E, D]`.
    held: &'a [bool],
    /// First slot of every device, and the number of slots `[D + 1]`.
    first: Vec<usize>,
    /// Best exchange of two devices, and on the diagonal the best new content of a slot `[D, D]`.
    best: Vec<Option<Choice>>,
    /// Whether all of them are of the placement as it stands.
    fresh: bool,
    /// The best of all that may be done.
    top: Option<Choice>,
    copies: bool,
    /// Windows in which a device is the slowest, and by how much in all: what can be gained there at the most `[D]`.
    slow: Vec<(Vec<usize>, f64)>,
    control: &'a Control,
}

impl<'a> Walk<'a> {
    fn new(
        layer: &Layer,
        placement: Placement,
        held: &'a [bool],
        copies: bool,
        control: &'a Control,
    ) -> Self {
        let d = layer.devices();
        let mut first = vec![0];
        first.extend(layer.room.iter().scan(0, |slots, &room| {
            *slots += room;
            Some(*slots)
        }));
        let terms = Terms::new(layer, &placement);
        let copies = copies && layer.slots() > layer.experts;
        let best = vec![None; d * d];
        let (fresh, top, slow) = (false, None, vec![]);
        let mut walk = Self { placement, terms, held, first, best, fresh, top, copies, slow, control };
        walk.find_slow(layer);
        walk
    }

    /// Finds the slowest devices; the ones of other windows than before, or where there is more to gain.
    fn find_slow(&mut self, layer: &Layer) -> Vec<u16> {
        let mut slow = vec![(vec![], 0.0); layer.devices()];
        if let Some(peak) = self.terms.balance.as_ref().and_then(Balance::peak) {
            for (window, device, lead) in peak.slowest() {
                slow[device].0.push(window);
                slow[device].1 += lead;
            }
        }
        let before = std::mem::replace(&mut self.slow, slow);
        let changed = |(g, now): (usize, &(Vec<usize>, f64))| {
            before.get(g).is_none_or(|before| before.0 != now.0 || before.1 < now.1).then_some(g as u16)
        };
        self.slow.iter().enumerate().filter_map(changed).collect()
    }

    /// Whether the slowest devices bound what a step gains: where they, and what is linear, are all that costs.
    fn is_bounded(&self, layer: &Layer) -> bool {
        let shares = layer.split == Split::Even || layer.slots() == layer.experts;
        let peaks = self.terms.balance.as_ref().is_some_and(|balance| balance.peak().is_some());
        shares && peaks && layer.sets.is_none() && self.terms.caps.peak_excess(layer) == 0.0
    }

    /// What taking an expert from device `g` to `h` gains at the most where one of them is the slowest: there, the
    /// largest load falls by no more than that device's, and elsewhere not at all.
    fn relieves(&self, layer: &Layer, expert: u16, g: usize, h: usize) -> f64 {
        if expert == EMPTY {
            return 0.0;
        }
        let devices = self.placement.devices(expert);
        let here = if devices.contains(&(g as u16)) { g } else { h };
        let share = f64::from(layer.share(devices, here as u16));
        (self.slowest_part(layer, expert, g) - self.slowest_part(layer, expert, h)) * share
    }

    /// What a slot's new content gains at the most where a device is the slowest, likewise: equal shares of `expert`,
    /// one more of them, and none of what was there.
    fn put_relieves(&self, layer: &Layer, slot: usize, expert: u16) -> f64 {
        let (device, here) = (usize::from(self.placement.device_of(slot)), self.placement.expert_in[slot]);
        let holders = self.placement.devices(expert);
        let (before, after) = (1.0 / holders.len() as f64, 1.0 / (holders.len() + 1) as f64);
        let part = |device: usize| self.slowest_part(layer, expert, device);
        let elsewhere: f64 = holders.iter().map(|&holder| part(usize::from(holder))).sum();
        let gone = if here == EMPTY {
            0.0
        } else {
            self.slowest_part(layer, here, device) / self.placement.devices(here).len() as f64
        };
        gone + elsewhere * (before - after) - part(device) * after
    }

    /// Load of an expert in the windows in which a device is the slowest, as the time that the device takes for it.
    fn slowest_part(&self, layer: &Layer, expert: u16, device: usize) -> f64 {
        let (load, _) = layer.windows.of(expert);
        let all: f64 = self.slow[device].0.iter().map(|&window| f64::from(load[window])).sum();
        all * f64::from(layer.time[device])
    }

    /// Copies that a step brings, less those that it takes back.
    fn brings(&self, layer: &Layer, step: Move) -> i64 {
        let new = |expert: u16, device: Option<u16>| {
            let at = |device: u16| usize::from(expert) * layer.devices() + usize::from(device);
            i64::from(device.is_some_and(|device| !self.held[at(device)]))
        };
        self.placement.edits(step).map(|edit| new(edit.expert, edit.to) - new(edit.expert, edit.from)).sum()
    }

    /// What a step is worth, if that is something.
    fn judge(&mut self, layer: &Layer, step: Move) -> Option<Choice> {
        if !self.placement.allows(layer, step) {
            return None;
        }
        let rise = self.terms.caps.rise(layer, &self.placement, step);
        if rise > LEAST_RELIEF {
            return None;
        }
        let relief = if rise < -LEAST_RELIEF { -rise } else { 0.0 };
        let gain = -self.terms.added(layer, &self.placement, step) / layer.windows.scale;
        if relief == 0.0 && gain * layer.windows.scale <= LEAST_GAIN * self.terms.cost(layer) {
            return None;
        }
        let moves = self.brings(layer, step);
        let each = each(moves);
        Some(Choice { step, moves, gain, worth: Worth { relief: relief / each, gain: gain / each } })
    }

    /// Looks at all exchanges of two devices, or (of one) at all contents of its slots.
    fn look(&mut self, layer: &Layer, g: usize, h: usize) {
        let mut best: Option<Choice> = None;
        let try_one = |walk: &mut Self, step: Move, best: &mut Option<Choice>| {
            if let Some(choice) = walk.judge(layer, step)
                && best.is_none_or(|best| choice.worth.beats(best.worth))
            {
                *best = Some(choice);
            }
        };
        let bounded = self.is_bounded(layer);
        // Parts of loads are rounded to whole numbers, in every window.
        let rounding = 2.0 * layer.windows.width as f64;
        let linear = !(layer.serve.is_empty() && layer.hold.is_empty());
        if g == h {
            for p in self.first[g]..self.first[g + 1] {
                let here = self.placement.expert_in[p];
                if here != EMPTY && self.placement.devices(here).len() < 2 {
                    continue;
                }
                for e in 0..layer.experts as u16 {
                    if self.control.stopped() {
                        return;
                    }
                    let step = Move::Put(p, e);
                    if bounded {
                        // Nothing where no slowest device feels it.
                        let relief = self.put_relieves(layer, p, e);
                        let mut gain = if relief == 0.0 { 0.0 } else { relief + rounding };
                        if linear {
                            gain -= linear::change(layer, &self.placement, step);
                        }
                        let worth = gain / layer.windows.scale / each(self.brings(layer, step));
                        if gain <= 0.0 || best.is_some_and(|best| worth <= best.worth.gain) {
                            continue;
                        }
                    }
                    try_one(self, step, &mut best);
                }
            }
        } else if !bounded {
            for p in self.first[g]..self.first[g + 1] {
                for q in self.first[h]..self.first[h + 1] {
                    try_one(self, Move::Swap(p, q), &mut best);
                }
            }
        } else if linear || self.slow[g].1 + self.slow[h].1 > 0.0 {
            let most = self.slow[g].1 + self.slow[h].1;
            let relieves = |walk: &Self, p: usize| walk.relieves(layer, walk.placement.expert_in[p], g, h);
            let goes = |walk: &Self, slot: usize, from: usize, to: usize| {
                let expert = walk.placement.expert_in[slot];
                let new = |device: usize| {
                    i64::from(expert != EMPTY && !walk.held[usize::from(expert) * layer.devices() + device])
                };
                new(to) - new(from)
            };
            let theirs: Vec<(f64, i64)> = (self.first[h]..self.first[h + 1])
                .map(|q| (relieves(self, q), goes(self, q, h, g)))
                .collect();
            for p in self.first[g]..self.first[g + 1] {
                let (mine, brings) = (relieves(self, p), goes(self, p, g, h));
                for (q, &(theirs, also)) in (self.first[h]..).zip(&theirs) {
                    let step = Move::Swap(p, q);
                    let mut gain = most.min(mine - theirs + rounding);
                    if linear {
                        gain -= linear::change(layer, &self.placement, step);
                    }
                    if gain <= 0.0 {
                        continue;
                    }
                    let gain = gain / layer.windows.scale / each(brings + also);
                    if best.is_none_or(|best| gain > best.worth.gain) {
                        try_one(self, step, &mut best);
                    }
                }
            }
        }
        self.best[g * layer.devices() + h] = best;
    }

    fn look_at_all(&mut self, layer: &Layer) {
        let d = layer.devices();
        for g in 0..d {
            for h in g + usize::from(!self.copies)..d {
                if self.control.stopped() {
                    return;
                }
                self.look(layer, g, h);
            }
        }
        self.fresh = true;
    }

    /// Looks again at what devices are part of.
    fn look_at(&mut self, layer: &Layer, devices: &[u16]) {
        let d = layer.devices();
        for g in 0..d {
            for h in g + usize::from(!self.copies)..d {
                if devices.iter().any(|&device| usize::from(device) == g || usize::from(device) == h) {
                    self.look(layer, g, h);
                }
            }
        }
        self.fresh = false;
    }

    /// Finds the step that is worth most of those that bring at most `left` copies.
    fn choose(&mut self, layer: &Layer, left: i64) {
        loop {
            let mut top: Option<(usize, Choice)> = None;
            for (at, choice) in self.best.iter().enumerate() {
                if let Some(choice) = choice
                    && choice.moves <= left
                    && top.is_none_or(|(_, best)| choice.worth.beats(best.worth))
                {
                    top = Some((at, *choice));
                }
            }
            let Some((at, choice)) = top else {
                if self.fresh || self.control.stopped() {
                    self.top = None;
                    return;
                }
                self.look_at_all(layer);
                continue;
            };
            // What was found earlier may be worth less by now: then it stands back.
            let now = self.judge(layer, choice.step);
            self.best[at] = now;
            if now.is_some_and(|now| !choice.worth.beats(now.worth)) {
                self.top = now;
                return;
            }
        }
    }

    /// Makes a step; the devices whose loads it changes, and those that are the slowest now or were.
    fn make(&mut self, layer: &Layer, step: Move) -> Vec<u16> {
        let mut touched = Vec::new();
        for edit in self.placement.edits(step) {
            let shared = self.placement.devices(edit.expert).len() > 1;
            let others = if shared { self.placement.devices(edit.expert) } else { &[] };
            touched.extend(others.iter().copied().chain(edit.from).chain(edit.to));
        }
        // What is applied is what was asked about last.
        self.terms.added(layer, &self.placement, step);
        self.terms.apply(layer, &mut self.placement, step);
        touched.extend(self.find_slow(layer));
        touched
    }
}

/// Goes from `start` down to where no step is worth anything, or as far as `reach` allows.
///
/// The answer does not depend on the number of threads.
#[must_use]
pub fn descend(
    layers: &mut [Layer],
    start: Vec<Placement>,
    held: &[Vec<bool>],
    links: Links<'_>,
    reach: Reach,
    control: &Control,
) -> Vec<Step> {
    let linked = !links.transitions.is_empty();
    if linked {
        let all = &*layers;
        let price = |l: usize| if control.stopped() { vec![] } else { prices(all, &start, links, l) };
        let priced: Vec<Vec<f64>> = (0..all.len()).into_par_iter().map(price).collect();
        for (layer, price) in layers.iter_mut().zip(priced) {
            layer.serve = price;
        }
    }
    let mut moved: i64 =
        start.iter().zip(held).zip(&*layers).map(|((now, held), layer)| brought(layer, now, held)).sum();
    let walks: Option<Vec<Walk<'_>>> = layers
        .par_iter()
        .zip(start)
        .zip(held)
        .map(|((layer, placement), held)| {
            if control.stopped() {
                return None;
            }
            let mut walk = Walk::new(layer, placement, held, reach.copies, control);
            walk.look_at_all(layer);
            walk.choose(layer, reach.most - moved);
            Some(walk)
        })
        .collect();
    let (mut steps, mut change) = (Vec::new(), 0.0);
    // Where the time is over before all layers were looked at, no step is known to be the best.
    let mut walks = walks.unwrap_or_default();
    while !control.stopped() {
        let left = reach.most - moved;
        for (walk, layer) in walks.iter_mut().zip(&*layers) {
            if walk.top.is_some_and(|top| top.moves > left) {
                walk.choose(layer, left);
            }
        }
        let mut best: Option<(usize, Choice)> = None;
        for (l, walk) in walks.iter().enumerate() {
            if let Some(top) = walk.top
                && best.is_none_or(|(_, best)| top.worth.beats(best.worth))
            {
                best = Some((l, top));
            }
        }
        let Some((l, Choice { step, moves, gain, .. })) = best else { break };
        control.count(1);
        moved += moves;
        change -= gain;
        let left = reach.most - moved;
        if linked {
            relink(layers, &mut walks, links, l, step);
        }
        let touched = walks[l].make(&layers[l], step);
        let neighbours = if linked { l.saturating_sub(1)..(l + 2).min(layers.len()) } else { l..l + 1 };
        for l in neighbours {
            walks[l].look_at(&layers[l], &touched);
            walks[l].choose(&layers[l], left);
        }
        let excess = layers.iter().zip(&walks).map(|(layer, walk)| walk.terms.caps.peak_excess(layer)).sum();
        steps.push(Step { layer: l, step, moved, excess, change });
    }
    for layer in layers.iter_mut() {
        layer.serve = vec![];
    }
    steps
}

/// Copies that are where none were.
fn brought(layer: &Layer, now: &Placement, held: &[bool]) -> i64 {
    let of = |e: u16| {
        let new = |&&device: &&u16| !held[usize::from(e) * layer.devices() + usize::from(device)];
        now.devices(e).iter().filter(new).count() as i64
    };
    (0..layer.experts as u16).map(of).sum()
}

/// Tells a layer's neighbours what a step, not yet made, changes for them.
fn relink(layers: &mut [Layer], walks: &mut [Walk<'_>], links: Links<'_>, l: usize, step: Move) {
    let (e, d) = (layers[l].experts, layers[l].devices());
    let table = e * e;
    for edit in walks[l].placement.edits(step) {
        let before = walks[l].placement.devices(edit.expert);
        let after: Vec<u16> = edit.after(before).collect();
        let mean = |device: usize, to: &[u16]| {
            to.iter().map(|&to| links.cost[device * d + usize::from(to)]).sum::<f64>()
                / to.len().max(1) as f64
        };
        let dearer: Vec<f64> = (0..d).map(|device| mean(device, &after) - mean(device, before)).collect();
        let expert = usize::from(edit.expert);
        let mut tell = |m: usize, count: &dyn Fn(usize) -> u64| {
            let scale = layers[m].windows.scale;
            for (x, prices) in layers[m].serve.chunks_exact_mut(d).enumerate() {
                let tokens = count(x) as f64 * scale;
                prices.iter_mut().zip(&dearer).for_each(|(price, dearer)| *price += tokens * dearer);
            }
        };
        if l > 0 {
            tell(l - 1, &|x| links.transitions[(l - 1) * table + x * e + expert]);
        }
        if l + 1 < walks.len() {
            tell(l + 1, &|x| links.transitions[l * table + expert * e + x]);
        }
    }
    for m in [l.wrapping_sub(1), l + 1] {
        if let (Some(walk), Some(layer)) = (walks.get_mut(m), layers.get(m)) {
            walk.terms.linear = linear::cost(layer, &walk.placement);
        }
    }
}
