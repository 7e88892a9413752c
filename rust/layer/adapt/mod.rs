//! From running slots to better ones on a single load, by few copies that are brought.
//!
//! What a balancer does that is called again and again while it serves: it starts where it is, relieves the slowest
//! device by the step that gains most for a copy brought, and notes after every step what was brought and how slow the
//! slowest device still is. A [budget](super::budget) is then spent on the steps of those layers where it gains most.
//!
//! A step is an exchange of two slots ([`exchanges`]) or a further copy in place of another one ([`copies`]): each gathers
//! what may be done, prices all of it at once, and takes the best that is allowed.
//!
//! Packing anew is one more way for every layer, and where no load has shaped what runs it is all that is looked at.
//! [`super::descend`] does the same by all terms of a cost; on one load, exchanges of a slot with all others at once
//! take microseconds.

mod change;
mod copies;
mod exchanges;
mod loads;

use super::budget::{Spending, Way, choose};
use super::construct::{LEAST, Placed, check, complete, fill};
use super::{EMPTY, Move, Site, Slots};
use crate::assignment::assign_max;
use crate::error::Result;
pub(super) use change::Change;
use copies::{Removal, find_copy};
use exchanges::Others;
use loads::{DOUBLINGS, Loads, NORM};

/// How far running slots are changed.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Which steps are taken in the end.
    pub spending: Spending,
    /// Steps of a layer at the most, for each of its devices.
    pub steps: usize,
    /// Trials of the polish where nothing runs yet.
    pub trials: usize,
    /// Whether empty slots are filled, whatever that brings.
    pub full: bool,
}

/// A copy moves to an expert whose copies are heavier by this part than those that it leaves will be.
const HEAVIER: f64 = 0.05;
/// What a copy must relieve, as a part of the mean device's time: before the heaviest experts get more copies, and after.
const COARSE: f64 = 1e-3;
const FINE: f64 = 2e-6;
/// What packing anew must gain over steps, as a part of the cost, where loads have shaped what runs.
const ANEW: f64 = 0.01;
/// Devices that are looked at, the slowest first, until a step is found.
const SLOWEST: usize = 3;
/// The slowest exchange slots with the fastest, of all devices so many quarters.
const QUARTERS: usize = 3;

/// Goes from running slots `[L][P]` to better ones on loads `[L, E]`: of every layer what is then in its slots, and what
/// it was and became. Experts without a slot get one and empty slots are filled, whatever they bring; what stays on a
/// device keeps its slot. In a layer that is `fresh` `[L]` no load has shaped what runs.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn adapt_layers(
    load: &[f64],
    experts: usize,
    sites: &[Site],
    running: &[Vec<u16>],
    fresh: &[bool],
    effort: Effort,
) -> Result<Vec<(Vec<u16>, [Way; 2])>> {
    check(load, experts)?;
    let idle = vec![0.0; experts];
    let layers = || load.chunks_exact(experts).map(|load| if is_idle(load) { &idle[..] } else { load });
    let slots = running.iter().zip(sites).map(|(running, site)| Slots::new(&site.capacity, experts, running));
    let running: Vec<Slots> = slots.collect();
    let is_shaped: Vec<bool> = running
        .iter()
        .zip(fresh)
        .map(|(slots, fresh)| !fresh && slots.copies.iter().all(|&copies| copies > 0))
        .collect();
    let shaped = layers().zip(sites).zip(&running).zip(&is_shaped).filter(|(_, shaped)| **shaped);
    let change = Change::estimate(shaped.map(|(layer, _)| layer), effort.spending.deviations);
    let expect = |(layer, shaped): (((&[f64], &Site), &Slots), &bool)| {
        let ((load, site), slots) = layer;
        if *shaped { change.expected_load(load, site, slots) } else { load.to_vec() }
    };
    let expected: Vec<Vec<f64>> = layers().zip(sites).zip(&running).zip(&is_shaped).map(expect).collect();
    let all = layers().zip(expected).zip(sites).zip(running).zip(fresh).enumerate();
    let improved = all.map(|(layer, ((((measured, expected), site), running), &fresh))| {
        improve(site, measured, expected, running, fresh, change.variance, effort)
            .map_err(|fault| fault.of(layer))
    });
    let all: Vec<Steps<'_>> = improved.collect::<Result<_>>()?;
    let ways: Vec<&[Way]> = all.iter().map(|steps| &steps.ways[..]).collect();
    let chosen = choose(&ways, change.raise_threshold(effort.spending));
    let end = |(steps, at): (&Steps<'_>, usize)| {
        (steps.running.keep_slots(&steps.contents[at]), [steps.ways[0], steps.ways[at]])
    };
    Ok(all.iter().zip(chosen).map(end).collect())
}

/// Whether a layer's loads are none, or too small to be divided by.
fn is_idle(load: &[f64]) -> bool {
    load.iter().sum::<f64>() < LEAST
}

/// Goes from running slots as far as steps gain, and packs anew; where nothing runs yet, a packing is all there is.
fn improve<'a>(
    site: &'a Site,
    measured: &'a [f64],
    expected: Vec<f64>,
    running: Slots,
    is_fresh: bool,
    variance: f64,
    effort: Effort,
) -> Placed<Steps<'a>> {
    let (slots, devices) = (running.expert_in.len(), site.devices());
    let is_new = running.expert_in.iter().all(|&e| e == EMPTY);
    let mut packed = None;
    if is_new || effort.steps > 0 && site.has_equal_devices() {
        packed = Some(fill(site, &expected, effort.trials)?);
    }
    let mut first = packed.take_if(|_| is_new).unwrap_or_else(|| running.clone());
    complete(&mut first, site, &expected, effort.full)?;
    // Of a time that varies, the power's mean is larger by n (n - 1) / 2 variances: as if it took (n - 1) / 2 longer.
    let mean = expected.iter().sum::<f64>() / devices as f64;
    let square = if mean > 0.0 { (NORM - 1.0) / 2.0 * variance / mean } else { 0.0 };
    let loads = Loads::new(site, [measured, &expected], &first, &running, square);
    let (ways, contents, others) = (vec![], vec![], Others::new(slots, devices));
    let mut steps = Steps { site, measured, expected, running, slots: first, loads, others, ways, contents };
    steps.note();
    // What no load has shaped is left at once: experts that are neighbours there are often busy together, which a single
    // load does not show.
    let is_left = is_fresh && packed.is_some();
    if !is_new && !is_left {
        steps.descend(effort.steps * devices);
    }
    if let Some(packed) = packed {
        steps.offer(&packed, if is_fresh { 0.0 } else { ANEW }, effort.full)?;
    }
    Ok(steps)
}

/// Gives what was packed for a device to one that holds much of it, of devices that are alike: fewest copies move.
#[must_use]
pub fn keep_devices(packed: &Slots, running: &Slots, capacity: &[usize]) -> Slots {
    let devices = capacity.len();
    let mut same = vec![0; devices * devices];
    for (slot, &e) in packed.expert_in.iter().enumerate().filter(|(_, e)| **e != EMPTY) {
        for device in running.devices(e) {
            same[packed.device(slot) * devices + usize::from(device)] += 1;
        }
    }
    let mut slots = Slots::empty(capacity, packed.copies.len());
    for (from, to) in assign_max(&same, devices).into_iter().enumerate() {
        for (slot, there) in packed.of(from).zip(slots.of(to)) {
            slots.put(there, packed.expert_in[slot]);
        }
    }
    slots
}

/// The best step so far, and what it is worth for a copy that it brings.
struct Best {
    worth: f64,
    step: Option<Move>,
}

/// A layer and the steps that were taken: what is so after every one, and the contents of slots `[P]` then.
struct Steps<'a> {
    site: &'a Site,
    /// Load of every expert, as it was measured and as it is expected next `[E]`.
    measured: &'a [f64],
    expected: Vec<f64>,
    /// What ran at the start.
    running: Slots,
    slots: Slots,
    loads: Loads,
    others: Others,
    ways: Vec<Way>,
    contents: Vec<Vec<u16>>,
}

impl Steps<'_> {
    fn note(&mut self) {
        let slowest = self.loads.measured_times.iter().copied().fold(0.0, f64::max);
        let moves = self.loads.is_moved.iter().sum::<f64>() as usize;
        let mut norm = self.loads.total() / self.loads.times.len() as f64;
        for _ in 0..DOUBLINGS {
            norm = norm.sqrt();
        }
        self.ways.push(Way { moves, slowest, cost: norm * self.loads.mean });
        self.contents.push(self.slots.expert_in.clone());
    }

    /// Makes so many steps at the most, as long as they gain.
    fn descend(&mut self, mut left: usize) {
        let phases: [fn(&mut Self) -> bool; 3] =
            [|steps| steps.relieve(COARSE), Self::copy_heaviest, |steps| steps.relieve(FINE)];
        for phase in phases {
            while left > 0 && phase(self) {
                self.note();
                left -= 1;
            }
        }
    }

    /// Notes a packing as the last way, if it costs less than all others by more than a part.
    fn offer(&mut self, packed: &Slots, part: f64, full: bool) -> Placed<()> {
        let least = self.ways.iter().map(|way| way.cost).fold(f64::INFINITY, f64::min);
        self.slots = keep_devices(packed, &self.running, &self.site.capacity);
        complete(&mut self.slots, self.site, &self.expected, full)?;
        let loads = [self.measured, &self.expected];
        self.loads = Loads::new(self.site, loads, &self.slots, &self.running, self.loads.square);
        self.note();
        if self.ways.pop_if(|way| way.cost >= least * (1.0 - part)).is_some() {
            self.contents.pop();
        }
        Ok(())
    }

    /// Gives the expert with the heaviest copies one more, in place of one whose expert has the lightest without it; false
    /// where none is heavier by enough.
    fn copy_heaviest(&mut self) -> bool {
        let (slots, site, expected) = (&self.slots, self.site, &self.expected[..]);
        // Load of every copy, were there one less of its expert.
        let without = |(&load, &copies): (&f64, &u32)| {
            if copies > 1 { load / f64::from(copies - 1) } else { f64::INFINITY }
        };
        let without: Vec<f64> = expected.iter().zip(&slots.copies).map(without).collect();
        let least = without.iter().copied().fold(f64::INFINITY, f64::min) * (1.0 + HEAVIER);
        let part = |e: u16| slots.part(expected, e);
        let mut heavy: Vec<u16> = (0..expected.len() as u16).filter(|&e| part(e) > least).collect();
        heavy.sort_by(|&e, &f| part(f).total_cmp(&part(e)));
        let best = heavy.into_iter().find_map(|e| {
            let limit = part(e) / (1.0 + HEAVIER);
            let open = |&q: &usize| {
                let f = slots.expert_in[q];
                let gives = f != EMPTY && without[usize::from(f)] < limit && slots.may_lose(site, q);
                gives && slots.may_take(site, e, slots.device(q))
            };
            let key = |q: usize| {
                let (g, f) = (slots.device(q), slots.expert_in[q]);
                let more = self.loads.with_one_more[usize::from(e)] - self.loads.load_in[q];
                (without[usize::from(f)], self.loads.times[g] + more * self.loads.per_token[g])
            };
            let open = (0..slots.expert_in.len()).filter(open).map(|q| (key(q), q));
            let slot = open.reduce(|a, b| if b.0 < a.0 { b } else { a });
            slot.map(|(_, q)| (e, q))
        });
        best.is_some_and(|(e, slot)| self.make(Move::Put(slot, e)))
    }

    /// Makes the step that relieves one of the slowest devices most for a copy that it brings; false where none is worth
    /// as much.
    fn relieve(&mut self, min_gain: f64) -> bool {
        let mut order: Vec<usize> = (0..self.loads.times.len()).collect();
        order.sort_by(|&g, &h| self.loads.times[h].total_cmp(&self.loads.times[g]));
        let fastest = &order[order.len() - (order.len() * QUARTERS).div_ceil(4)..];
        let mut best = Best { worth: self.loads.total() * NORM * min_gain, step: None };
        let removal = Removal::new(self);
        for &slow in order.iter().take(SLOWEST) {
            if self.loads.times[slow] <= 1.0 {
                break;
            }
            self.find_exchange(slow, fastest, &mut best);
            find_copy(self, slow, &removal, &mut best);
            if best.step.is_some() {
                break;
            }
        }
        best.step.is_some_and(|step| self.make(step))
    }

    /// Looks for an exchange of a slot of the slow device with one of others that is worth more than the best step so far.
    fn find_exchange(&mut self, slow: usize, devices: &[usize], best: &mut Best) {
        let Self { site, slots, running, loads, others, .. } = self;
        others.gather(slots, running, loads, slow, devices);
        for p in slots.of(slow) {
            let is_allowed = |q: usize| slots.allows(site, Move::Swap(p, q));
            let found = others.best_allowed(p, (slots, running, loads), best.worth, is_allowed);
            if let Some((worth, q)) = found {
                *best = Best { worth, step: Some(Move::Swap(p, q)) };
            }
        }
    }

    /// Makes a step that is allowed, and follows.
    fn make(&mut self, step: Move) -> bool {
        self.slots.apply(step);
        let (slots, running) = (&self.slots, &self.running);
        match step {
            Move::Swap(p, q) => self.loads.exchange([p, q], self.site, self.measured, slots, running),
            Move::Put(..) => {
                let (loads, square) = ([self.measured, &self.expected], self.loads.square);
                self.loads = Loads::new(self.site, loads, slots, running, square);
            }
        }
        true
    }
}
