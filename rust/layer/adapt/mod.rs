//! Live rebalancing on a single load: from running slots to better ones, by few moved copies.
//!
//! A balancer is called again and again while a model serves. It starts from the running slots and relieves the slowest
//! device by the step that gains most per moved copy. After every step it records how many copies have moved and how slow
//! the slowest device still is: these are the choices of a layer. In the end a [budget](super::budget) of moves is spent
//! on the layers where a copy gains most.
//!
//! A step is an exchange of two slots ([`exchanges`]) or one more copy of an expert in place of another copy ([`copies`]).
//! Both gather candidates, price all of them at once, and take the best one that the rules allow.
//!
//! Packing a layer from scratch is one more choice. It is the only one where no load has shaped the running slots.
//! [`super::descend`] takes the same steps by all terms of a cost. This module sees one load only, so that it can price the
//! exchanges of a slot with all others in microseconds.

mod change;
mod copies;
mod exchanges;
mod loads;

use super::budget::{Choice, Spending, choose};
use super::construct::{LEAST, Placed, check, complete, fill};
use super::{EMPTY, Move, Site, Slots, root};
use crate::assignment::assign_pairs;
use crate::error::Result;
pub(super) use change::LoadChange;
use copies::{Removals, find_copy};
use exchanges::{Partners, State};
use loads::{DOUBLINGS, Loads, NORM, largest};

/// Limits on the work of adapting, and on moves.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Limit of moves, and the gain that they must have.
    pub spending: Spending,
    /// Most steps of a layer, for each of its devices.
    pub steps: usize,
    /// Trials of the polish after packing from scratch.
    pub trials: usize,
    /// True if empty slots are filled, even if that gains nothing.
    pub full: bool,
}

/// A copy goes from one expert to another only if the copies of the other are heavier, by this part, than the remaining
/// copies of the first will be.
const HEAVIER_BY: f64 = 0.05;
/// Least relief per moved copy, as a part of the mean device's time: before the heaviest experts get more copies, and
/// after that.
const COARSE_GAIN: f64 = 1e-3;
const FINE_GAIN: f64 = 2e-6;
/// Least gain of packing from scratch over steps, as a part of the cost, where loads have shaped the running slots: this if
/// it moves a copy more for every slot of the layer, in proportion less if it moves fewer.
const REPACK_GAIN: f64 = 0.002;
/// Devices that a step may relieve: the slowest; the next one only if no step relieves those before it.
const SLOWEST: usize = 3;

/// Returns better slots than those that run `[L][P]`, for loads `[L, E]`: for every layer the new contents of its slots,
/// with the choice that it was and the one that it became.
///
/// Experts without a slot get one, and empty slots are filled, even if that gains nothing. An expert that stays on a
/// device keeps its slot. Layers in `repack` `[L]` are packed from scratch: no load has shaped what runs there.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn adapt_layers(
    load: &[f64],
    experts: usize,
    sites: &[Site],
    running: &[Vec<u16>],
    repack: &[bool],
    effort: Effort,
) -> Result<Vec<(Vec<u16>, [Choice; 2])>> {
    check(load, experts)?;
    let idle = vec![0.0; experts];
    // Loads that sum to too little to divide by are none.
    let is_idle = |load: &[f64]| load.iter().sum::<f64>() < LEAST;
    let layers = || load.chunks_exact(experts).map(|load| if is_idle(load) { &idle[..] } else { load });
    let slots = running.iter().zip(sites).map(|(running, site)| Slots::new(&site.capacity, experts, running));
    let running: Vec<Slots> = slots.collect();
    let has_all = |slots: &Slots| slots.copies.iter().all(|&copies| copies > 0);
    let is_shaped = running.iter().zip(repack).map(|(slots, repack)| !repack && has_all(slots));
    let is_shaped: Vec<bool> = is_shaped.collect();
    let shaped = layers().zip(sites).zip(&running).zip(&is_shaped).filter(|(_, shaped)| **shaped);
    let change =
        LoadChange::estimate_from_imbalance(shaped.map(|(layer, _)| layer), effort.spending.deviations);
    let expect = |(layer, shaped): (((&[f64], &Site), &Slots), &bool)| {
        let ((load, site), slots) = layer;
        if *shaped { change.expected_load(load, site, slots) } else { load.to_vec() }
    };
    let expected: Vec<Vec<f64>> = layers().zip(sites).zip(&running).zip(&is_shaped).map(expect).collect();
    let all = layers().zip(expected).zip(sites).zip(running).zip(repack).enumerate();
    let improved = all.map(|(layer, ((((measured, expected), site), running), &repack))| {
        improve(site, measured, expected, running, repack, change.variance, effort)
            .map_err(|fault| fault.of(layer))
    });
    let all: Vec<Steps<'_>> = improved.collect::<Result<_>>()?;
    let choices: Vec<&[Choice]> = all.iter().map(|steps| &steps.choices[..]).collect();
    let chosen = choose(&choices, change.require_gain_beyond_chance(effort.spending));
    let end = |(steps, at): (&Steps<'_>, usize)| {
        (steps.running.keep_slots(&steps.end(at).expert_in), [steps.choices[0], steps.choices[at]])
    };
    Ok(all.iter().zip(chosen).map(end).collect())
}

/// Takes steps from running slots as long as they gain, and adds a packing from scratch as one more choice.
///
/// The packing is the only choice where nothing runs yet.
fn improve<'a>(
    site: &'a Site,
    measured: &'a [f64],
    expected: Vec<f64>,
    running: Slots,
    repack: bool,
    variance: f64,
    effort: Effort,
) -> Placed<Steps<'a>> {
    let devices = site.devices();
    let is_new = running.expert_in.iter().all(|&e| e == EMPTY);
    let mut packed = None;
    let is_even = site.has_equal_speeds() && site.capacity.iter().all(|slots| *slots == site.capacity[0]);
    if is_new || effort.steps > 0 && is_even {
        packed = Some(fill(site, &expected, effort.trials)?);
    }
    let mut first = packed.take_if(|_| is_new).unwrap_or_else(|| running.clone());
    complete(&mut first, site, &expected, effort.full)?;
    // The mean of the n-th power of a time that varies is larger by n (n - 1) / 2 of its variances, as if the device took
    // (n - 1) / 2 of them longer.
    let mean = expected.iter().sum::<f64>() / devices as f64;
    let square = if mean > 0.0 { (NORM - 1.0) / 2.0 * variance / mean } else { 0.0 };
    let loads = Loads::new(site, [measured, &expected], &first, square);
    let mut steps = Steps {
        site,
        measured,
        start: first.clone(),
        candidates: None,
        moves: first.moved_from(&running),
        slots: first,
        expected,
        running,
        loads,
        choices: vec![],
        taken: vec![],
    };
    steps.record();
    // No step starts from slots that no load has shaped: experts that are neighbours there are often busy together, which
    // a single load does not show.
    let is_repacked = repack && packed.is_some();
    if !is_new && !is_repacked {
        steps.descend(effort.steps * devices);
    }
    if let Some(packed) = packed {
        steps.add_packing(&packed, if repack { 0.0 } else { REPACK_GAIN }, effort.full)?;
    }
    Ok(steps)
}

/// Returns packed slots with devices renamed so that the fewest copies move; the devices are alike.
///
/// Every packed device becomes one that already holds much of its content.
#[must_use]
pub fn keep_devices(packed: &Slots, running: &Slots, capacity: &[usize]) -> Slots {
    // The devices that hold some of a packed device's content, with the number of its copies that stay there: few of all,
    // where devices have few slots.
    let stays = |from: usize| {
        let contents = packed.expert_in[packed.of(from)].iter().filter(|e| **e != EMPTY);
        let mut holders: Vec<_> = contents.flat_map(|&e| running.devices(e)).map(usize::from).collect();
        holders.sort_unstable();
        let same = holders.chunk_by(|a, b| a == b);
        same.map(|same| (same[0], same.len() as i64)).collect::<Vec<_>>()
    };
    let stays: Vec<_> = (0..capacity.len()).map(stays).collect();
    let mut slots = Slots::empty(capacity, packed.copies.len());
    let matched = assign_pairs(stays.len(), |from| stays[from].iter().copied());
    for (from, to) in matched.into_iter().enumerate() {
        for (slot, there) in packed.of(from).zip(slots.of(to)) {
            slots.put(there, packed.expert_in[slot]);
        }
    }
    slots
}

/// The best step so far, and its gain per moved copy.
struct Best {
    gain_per_copy: f64,
    step: Option<Move>,
}

/// A layer under search: its slots as they stand, and what was recorded at the start and after every step.
struct Steps<'a> {
    site: &'a Site,
    /// Load of every expert, as measured and as expected next `[E]`.
    measured: &'a [f64],
    expected: Vec<f64>,
    /// The slots that run, from which moves are counted.
    running: Slots,
    /// The slots after the steps so far, and how many of their copies have moved.
    slots: Slots,
    moves: i64,
    loads: Loads,
    /// What steps choose among, in one part by [`exchanges`] and one by [`copies`]; nothing once copies were added.
    candidates: Option<(Partners, Removals)>,
    /// The start, the steps from there, and what was recorded of it and after every step.
    start: Slots,
    taken: Vec<Move>,
    choices: Vec<Choice>,
}

impl Steps<'_> {
    /// Records the slots as they stand as a choice.
    fn record(&mut self) {
        let slowest = largest(&self.loads.measured_times, 0.0);
        let norm = root(self.loads.total / self.loads.times.len() as f64, DOUBLINGS);
        let moves = self.moves as usize;
        self.choices.push(Choice { moves, slowest, cost: norm * self.loads.mean });
    }

    /// Returns the slots of a choice: after so many steps or, if it comes after all steps, packed from scratch.
    fn end(&self, choice: usize) -> Slots {
        let Some(steps) = self.taken.get(..choice) else { return self.slots.clone() };
        let mut slots = self.start.clone();
        for &step in steps {
            slots.apply(step);
        }
        slots
    }

    /// Takes steps as long as they gain, up to a number of them.
    fn descend(&mut self, mut steps_left: usize) {
        let phases: [fn(&mut Self) -> bool; 3] =
            [|steps| steps.relieve(COARSE_GAIN), Self::copy_heaviest, |steps| steps.relieve(FINE_GAIN)];
        for phase in phases {
            while steps_left > 0 && phase(self) {
                self.record();
                steps_left -= 1;
            }
        }
    }

    /// Adds a packing from scratch as the last choice, if it costs less than every other one: by a part of at least
    /// `min_gain` for as many further moves as there are slots.
    fn add_packing(&mut self, packed: &Slots, min_gain: f64, full: bool) -> Placed<()> {
        let best = self.choices.iter().copied().reduce(|a, b| if b.cost < a.cost { b } else { a });
        self.slots = keep_devices(packed, &self.running, &self.site.capacity);
        complete(&mut self.slots, self.site, &self.expected, full)?;
        let loads = [self.measured, &self.expected];
        self.loads = Loads::new(self.site, loads, &self.slots, self.loads.square);
        self.moves = self.slots.moved_from(&self.running);
        self.record();
        let slots = self.slots.expert_in.len() as f64;
        let is_behind = |packing: &mut Choice| {
            best.is_some_and(|best| {
                let further_moves = packing.moves.saturating_sub(best.moves) as f64;
                packing.cost >= best.cost * (1.0 - min_gain * further_moves / slots)
            })
        };
        self.choices.pop_if(is_behind);
        Ok(())
    }

    /// Gives one more copy to the expert with the heaviest copies, in place of a copy whose expert is lightest without it;
    /// returns false if no expert's copies are heavy enough for that.
    fn copy_heaviest(&mut self) -> bool {
        let (slots, site, expected) = (&self.slots, self.site, &self.expected[..]);
        // Load of each copy of an expert if it had one copy less.
        let load_without = |(&load, &copies): (&f64, &u32)| {
            if copies > 1 { load / f64::from(copies - 1) } else { f64::INFINITY }
        };
        let load_without: Vec<f64> = expected.iter().zip(&slots.copies).map(load_without).collect();
        let least = load_without.iter().copied().fold(f64::INFINITY, f64::min) * (1.0 + HEAVIER_BY);
        let load_per_copy = |e: u16| slots.load_per_copy(expected, e);
        let mut heavy: Vec<u16> = (0..expected.len() as u16).filter(|&e| load_per_copy(e) > least).collect();
        heavy.sort_by(|&e, &f| load_per_copy(f).total_cmp(&load_per_copy(e)));
        let best = heavy.into_iter().find_map(|e| {
            let limit = load_per_copy(e) / (1.0 + HEAVIER_BY);
            let open = |&q: &usize| {
                let f = slots.expert_in[q];
                let may_give = f != EMPTY && load_without[usize::from(f)] < limit && slots.may_lose(site, q);
                may_give && slots.may_take(site, e, slots.device(q))
            };
            let key = |q: usize| {
                let (g, f) = (slots.device(q), slots.expert_in[q]);
                let added = self.loads.with_one_more[usize::from(e)] - self.loads.load_in[q];
                (load_without[usize::from(f)], self.loads.times[g] + added * self.loads.per_token[g])
            };
            let open = (0..slots.expert_in.len()).filter(open).map(|q| (key(q), q));
            let slot = open.reduce(|a, b| if b.0 < a.0 { b } else { a });
            slot.map(|(_, q)| (e, q))
        });
        best.is_some_and(|(e, slot)| self.take(Move::Put(slot, e)))
    }

    /// Takes the step that relieves one of the slowest devices most per moved copy; returns false if no step gains
    /// `min_gain`.
    fn relieve(&mut self, min_gain: f64) -> bool {
        let mut best = Best { gain_per_copy: self.loads.total * NORM * min_gain, step: None };
        let candidates = self.candidates.take();
        let (mut partners, removals) =
            candidates.unwrap_or_else(|| (Partners::new(self.state()), Removals::new(self.state())));
        for at in 0..SLOWEST.min(partners.order.len()) {
            let slow = partners.order[at];
            if self.loads.times[slow] <= 1.0 {
                break;
            }
            self.find_exchange(slow, &mut partners, &mut best);
            find_copy(self, slow, &removals, &mut best);
            if best.step.is_some() {
                break;
            }
        }
        self.candidates = Some((partners, removals));
        best.step.is_some_and(|step| self.take(step))
    }

    /// Returns the slots as they stand, for what steps choose among.
    fn state(&self) -> State<'_> {
        State { slots: &self.slots, running: &self.running, loads: &self.loads, expected: &self.expected }
    }

    /// Looks for an exchange between a slow device and faster ones that gains more per copy than the best step so far.
    fn find_exchange(&self, slow: usize, partners: &mut Partners, best: &mut Best) {
        let (slots, state) = (&self.slots, self.state());
        partners.choose(state, slow);
        for p in slots.of(slow) {
            let is_allowed = |q: usize| slots.allows(self.site, Move::Swap(p, q));
            let exchange = partners.best_allowed(state, p, best.gain_per_copy, is_allowed);
            if let Some((gain_per_copy, q)) = exchange {
                *best = Best { gain_per_copy, step: Some(Move::Swap(p, q)) };
            }
        }
    }

    /// Takes a step that is allowed, and updates the loads.
    fn take(&mut self, step: Move) -> bool {
        self.moves += self.slots.brings(&self.running, step);
        self.slots.apply(step);
        self.taken.push(step);
        let mut candidates = self.candidates.take();
        match step {
            Move::Swap(p, q) => {
                self.loads.exchange([p, q], self.site, self.measured, &self.slots);
                if let Some((partners, removals)) = &mut candidates {
                    let devices = [p, q].map(|slot| self.slots.device(slot));
                    partners.update(self.state(), &devices);
                    removals.update(self.state(), devices.into_iter().flat_map(|g| self.slots.of(g)));
                }
                self.candidates = candidates;
            }
            Move::Put(..) => {
                let (loads, square) = ([self.measured, &self.expected], self.loads.square);
                self.loads = Loads::new(self.site, loads, &self.slots, square);
            }
        }
        true
    }
}
