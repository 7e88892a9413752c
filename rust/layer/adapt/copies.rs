//! The best additional copy that relieves a slow device: gather what one more copy of each of its experts would relieve,
//! price it in place of every other copy, take the best one that the rules allow.
//!
//! Prices leave out that the other copies of the expert get less load, too, so a step may turn out better than its price.

use super::super::budget::factor_per_copy;
use super::super::{EMPTY, Move};
use super::exchanges::State;
use super::loads::{Loads, one_if, power};
use super::{Best, Steps};

/// Load and time that one more copy of an expert, elsewhere, takes from a slow device that holds it.
struct Relief {
    expert: u16,
    /// Load of each copy then.
    load: f64,
    /// Time that the slow device saves, and the power.
    time: f64,
    power: f64,
}

/// A slot, and what changes if its content is removed.
#[derive(Clone, Copy)]
struct Target {
    slot: usize,
    device: usize,
    expert: u16,
    /// 1 if its content counts as a move, otherwise 0.
    is_moved: f64,
    /// Time of the slot's device without the content, its power, and the power with the content.
    time_without: f64,
    power_without: f64,
    power: f64,
    /// Tokens of each of the expert's other copies then, and the load that each of them takes over, with its variance.
    tokens_left: f64,
    added_load: f64,
    /// Power that a load so much larger adds to the slot's own device: where another copy of the expert is removed.
    added_power: f64,
}

/// Powers that a removal adds to devices other than the slow one, and time that it adds to the slow one: other copies take
/// over the load.
struct Added {
    elsewhere: f64,
    to_slowest: f64,
}

/// Looks for an additional copy, on the slow device or elsewhere, that gains more per copy than the best step so far.
pub(super) fn find_copy(steps: &Steps<'_>, slow: usize, removals: &Removals, best: &mut Best) {
    let reliefs = find_reliefs(steps, slow);
    for target in removals.spare.iter().map(|&slot| &removals.targets[slot]) {
        let added = removals.added(steps, target, slow);
        if target.device == slow {
            find_copy_here(steps, target, &added, best);
        } else {
            find_copy_elsewhere(steps, target, &added, (slow, &reliefs), best);
        }
    }
}

/// Returns what one more copy of each expert on the slow device would relieve, the largest relief first.
fn find_reliefs(steps: &Steps<'_>, slow: usize) -> Vec<Relief> {
    let (slots, loads) = (&steps.slots, &steps.loads);
    let relief = |slot: usize| {
        let expert = slots.expert_in[slot];
        let load = loads.with_one_more[usize::from(expert)];
        let time = (loads.load_in[slot] - load) * loads.per_token[slow];
        Relief { expert, load, time, power: loads.powers[slow] - power(loads.times[slow] - time) }
    };
    let filled = slots.of(slow).filter(|&slot| slots.expert_in[slot] != EMPTY);
    let mut reliefs: Vec<Relief> = filled.map(relief).collect();
    reliefs.sort_by(|a, b| b.time.total_cmp(&a.time));
    reliefs
}

/// Prices copies of all experts in a slot of the slow device itself, in place of something heavier.
fn find_copy_here(steps: &Steps<'_>, target: &Target, added: &Added, best: &mut Best) {
    let per_token = steps.loads.per_token[target.device];
    // The gain if the new copy had no load.
    let largest_gain = target.power - target.power_without - added.elsewhere;
    if largest_gain * factor_per_copy(1.0 - target.is_moved) <= best.gain_per_copy {
        return;
    }
    for (expert, &load) in (0..).zip(&steps.loads.with_one_more) {
        let gain = target.power - power(target.time_without + load * per_token) - added.elsewhere;
        if gain * factor_per_copy(1.0 - target.is_moved) > best.gain_per_copy {
            consider(steps, target, (expert, gain), best);
        }
    }
}

/// Prices copies of the slow device's experts in a slot elsewhere.
fn find_copy_elsewhere(
    steps: &Steps<'_>,
    target: &Target,
    added: &Added,
    (slow, reliefs): (usize, &[Relief]),
    best: &mut Best,
) {
    let loads = &steps.loads;
    let per_token = loads.per_token[target.device];
    for &Relief { expert, load, time, power: relief } in reliefs {
        let relief = if added.to_slowest == 0.0 {
            relief
        } else {
            loads.powers[slow] - power(loads.times[slow] - time + added.to_slowest)
        };
        let relieved = relief - added.elsewhere + target.power;
        // Even without the load of the copy this gains too little, and reliefs further on are smaller.
        if target.is_moved == 0.0 && relieved - target.power_without <= best.gain_per_copy {
            break;
        }
        let gain = relieved - power(target.time_without + load * per_token);
        if gain > 0.0 {
            consider(steps, target, (expert, gain), best);
        }
    }
}

/// Takes a copy of an expert in place of a slot's content as the best step, if it gains more per copy and is allowed.
///
/// The copies that stay of the removed expert must not become heavier than the new one is.
fn consider(steps: &Steps<'_>, target: &Target, (expert, gain): (u16, f64), best: &mut Best) {
    let slots = &steps.slots;
    let is_move = one_if(steps.running.lacks(expert, target.device));
    let gain_per_copy = gain * factor_per_copy(is_move - target.is_moved);
    let fits = || {
        slots.may_lose(steps.site, target.slot)
            && slots.may_take(steps.site, expert, target.device)
            && slots.load_per_copy(&steps.expected, expert) >= target.tokens_left
    };
    if gain_per_copy > best.gain_per_copy && fits() {
        *best = Best { gain_per_copy, step: Some(Move::Put(target.slot, expert)) };
    }
}

/// What changes if the content of a slot is removed.
pub(super) struct Removals {
    /// Every slot `[P]`.
    targets: Vec<Target>,
    /// The slots that are empty, or whose expert has other copies, in rising order.
    spare: Vec<usize>,
    /// Sum of `added_power` over the slots of an expert `[E]`.
    added_by_expert: Vec<f64>,
}

impl Removals {
    /// Computes what every removal would change, given the expected load of every expert `[E]`.
    pub(super) fn new(state: State<'_>, expected: &[f64]) -> Self {
        let slots = state.slots;
        let all = 0..slots.expert_in.len();
        let targets: Vec<Target> = all.clone().map(|slot| Target::new(state, slot, expected)).collect();
        let is_spare = |&slot: &usize| slots.copies(slots.expert_in[slot]) != 1;
        let mut added_by_expert = vec![0.0; expected.len()];
        for target in targets.iter().filter(|target| target.expert != EMPTY) {
            added_by_expert[usize::from(target.expert)] += target.added_power;
        }
        Self { targets, spare: all.filter(is_spare).collect(), added_by_expert }
    }

    /// Computes anew what an exchange of slots `p` and `q` has changed.
    pub(super) fn exchange(&mut self, state: State<'_>, [p, q]: [usize; 2], expected: &[f64]) {
        let slots = state.slots;
        let place = |slot: usize| self.spare.binary_search(&slot);
        let spare_moved = match (place(p), place(q)) {
            (Ok(at), Err(_)) => Some((at, q)),
            (Err(_), Ok(at)) => Some((at, p)),
            _ => None,
        };
        if let Some((at, slot)) = spare_moved {
            self.spare.remove(at);
            self.spare.insert(self.spare.partition_point(|&other| other < slot), slot);
        }
        let changed = || [p, q].into_iter().flat_map(|slot| slots.of(slots.device(slot)));
        for slot in changed() {
            self.targets[slot] = Target::new(state, slot, expected);
        }
        for expert in changed().map(|slot| slots.expert_in[slot]).filter(|&e| slots.copies(e) > 1) {
            let added = slots.slots_with(expert).map(|slot| self.targets[slot].added_power);
            self.added_by_expert[usize::from(expert)] = added.sum();
        }
    }

    /// Returns what a removal adds to other devices.
    fn added(&self, steps: &Steps<'_>, target: &Target, slow: usize) -> Added {
        let (slots, expert) = (&steps.slots, target.expert);
        if expert == EMPTY {
            return Added { elsewhere: 0.0, to_slowest: 0.0 };
        }
        let elsewhere = self.added_by_expert[usize::from(expert)] - target.added_power;
        let on_slow = (target.device != slow && slots.holds(expert, slow))
            .then(|| slots.of(slow).find(|&other| slots.expert_in[other] == expert))
            .flatten();
        match on_slow {
            Some(other) => Added {
                elsewhere: elsewhere - self.targets[other].added_power,
                to_slowest: target.added_load * steps.loads.per_token[slow],
            },
            None => Added { elsewhere, to_slowest: 0.0 },
        }
    }
}

impl Target {
    /// Computes what the removal of a slot's content would change.
    fn new(state: State<'_>, slot: usize, expected: &[f64]) -> Self {
        let State { slots, running, loads } = state;
        let (device, expert) = (slots.device(slot), slots.expert_in[slot]);
        let (mut tokens_left, mut added_load, mut added_power) = (0.0, 0.0, 0.0);
        if slots.copies(expert) > 1 {
            tokens_left = expected[usize::from(expert)] / f64::from(slots.copies(expert) - 1);
            added_load = loads.with_variance(tokens_left) - loads.load_in[slot];
            added_power = loads.added_power(device, added_load);
        }
        let time_without = loads.times[device] - loads.load_in[slot] * loads.per_token[device];
        let is_moved = one_if(running.lacks(expert, device));
        let (power_without, power) = (power(time_without), loads.powers[device]);
        Self {
            slot,
            device,
            expert,
            is_moved,
            time_without,
            power_without,
            power,
            tokens_left,
            added_load,
            added_power,
        }
    }
}

impl Loads {
    /// Returns what more load adds to the power of a device's time.
    fn added_power(&self, device: usize, load: f64) -> f64 {
        power(self.times[device] + load * self.per_token[device]) - self.powers[device]
    }
}
