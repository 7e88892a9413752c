//! The best additional copy that relieves a slow device: gather what one more copy of each of its experts would relieve,
//! price it in place of every other copy, take the best one that the rules allow.
//!
//! Prices leave out that the other copies of the expert get less load, too, so a step may turn out better than its price.

use super::super::budget::factor_per_copy;
use super::super::{EMPTY, Move};
use super::exchanges::State;
use super::loads::{one_if, power};
use super::{Best, Steps};

/// Load and time that one more copy of an expert, elsewhere, takes from a slow device that holds it.
struct Relief {
    expert: u16,
    /// Load of each copy then.
    load: f64,
    /// Time that the slow device saves.
    time: f64,
}

/// A slot, and what changes if its content is removed.
#[derive(Clone, Default)]
struct Target {
    slot: usize,
    device: usize,
    expert: u16,
    /// True if there is no content, or other copies of it.
    is_spare: bool,
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

/// Looks for an additional copy, on the slow device or elsewhere, that gains more per copy than the best step so far.
pub(super) fn find_copy(steps: &Steps<'_>, slow: usize, removals: &Removals, best: &mut Best) {
    let reliefs = find_reliefs(steps, slow);
    for target in removals.targets.iter().filter(|target| target.is_spare) {
        let added = removals.added(steps, target, slow);
        if target.device == slow {
            find_copy_here(steps, target, added.0, best);
        } else {
            find_copy_elsewhere(steps, target, added, (slow, &reliefs), best);
        }
    }
}

/// Returns what one more copy of each expert on the slow device would relieve, the largest relief first.
fn find_reliefs(steps: &Steps<'_>, slow: usize) -> Vec<Relief> {
    let (slots, loads) = (&steps.slots, &steps.loads);
    let relief = |slot: usize| {
        let expert = slots.expert_in[slot];
        let load = loads.with_one_more[usize::from(expert)];
        Relief { expert, load, time: (loads.load_in[slot] - load) * loads.per_token[slow] }
    };
    let filled = slots.of(slow).filter(|&slot| slots.expert_in[slot] != EMPTY);
    let mut reliefs: Vec<Relief> = filled.map(relief).collect();
    reliefs.sort_by(|a, b| b.time.total_cmp(&a.time));
    reliefs
}

/// Prices copies of all experts in a slot of the slow device itself, in place of something heavier.
fn find_copy_here(steps: &Steps<'_>, target: &Target, added_elsewhere: f64, best: &mut Best) {
    let per_token = steps.loads.per_token[target.device];
    // The gain if the new copy had no load.
    let largest_gain = target.power - target.power_without - added_elsewhere;
    if largest_gain * factor_per_copy(1.0 - target.is_moved) <= best.gain_per_copy {
        return;
    }
    for (expert, &load) in (0..).zip(&steps.loads.with_one_more) {
        let gain = target.power - power(target.time_without + load * per_token) - added_elsewhere;
        if gain * factor_per_copy(1.0 - target.is_moved) > best.gain_per_copy {
            consider(steps, target, (expert, gain), best);
        }
    }
}

/// Prices copies of the slow device's experts in a slot elsewhere.
fn find_copy_elsewhere(
    steps: &Steps<'_>,
    target: &Target,
    (added_elsewhere, added_to_slowest): (f64, f64),
    (slow, reliefs): (usize, &[Relief]),
    best: &mut Best,
) {
    let loads = &steps.loads;
    let (slow_time, slow_power) = (loads.times[slow], loads.powers[slow]);
    for &Relief { expert, load, time } in reliefs {
        let relieved =
            slow_power - power(slow_time - time + added_to_slowest) - added_elsewhere + target.power;
        // Even without the load of the copy this gains too little, and reliefs further on are smaller.
        if target.is_moved == 0.0 && relieved - target.power_without <= best.gain_per_copy {
            break;
        }
        let gain = relieved - power(target.time_without + load * loads.per_token[target.device]);
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
    /// Sum of `added_power` over the slots of an expert `[E]`.
    added_by_expert: Vec<f64>,
}

impl Removals {
    /// Computes what every removal would change.
    pub(super) fn new(state: State<'_>) -> Self {
        let targets = vec![Target::default(); state.slots.expert_in.len()];
        let mut removals = Self { targets, added_by_expert: vec![0.0; state.expected.len()] };
        removals.update(state, 0..state.slots.expert_in.len());
        removals
    }

    /// Computes anew the slots of devices that have changed.
    pub(super) fn update(&mut self, state: State<'_>, changed: impl Iterator<Item = usize> + Clone) {
        let slots = state.slots;
        for slot in changed.clone() {
            self.targets[slot] = Target::new(state, slot);
        }
        for expert in changed.map(|slot| slots.expert_in[slot]).filter(|&e| slots.copies(e) > 1) {
            let added = slots.slots_with(expert).map(|slot| self.targets[slot].added_power);
            self.added_by_expert[usize::from(expert)] = added.sum();
        }
    }

    /// Returns what a removal adds to the powers of devices other than the slow one, and to the time of the slow one.
    fn added(&self, steps: &Steps<'_>, target: &Target, slow: usize) -> (f64, f64) {
        let (slots, expert) = (&steps.slots, target.expert);
        if expert == EMPTY {
            return (0.0, 0.0);
        }
        let elsewhere = self.added_by_expert[usize::from(expert)] - target.added_power;
        let on_slow = (target.device != slow && slots.holds(expert, slow))
            .then(|| slots.of(slow).find(|&other| slots.expert_in[other] == expert))
            .flatten();
        on_slow.map_or((elsewhere, 0.0), |other| {
            let added_to_slowest = target.added_load * steps.loads.per_token[slow];
            (elsewhere - self.targets[other].added_power, added_to_slowest)
        })
    }
}

impl Target {
    /// Computes what the removal of a slot's content would change.
    fn new(State { slots, running, loads, expected }: State<'_>, slot: usize) -> Self {
        let (device, expert) = (slots.device(slot), slots.expert_in[slot]);
        let time_without = loads.times[device] - loads.load_in[slot] * loads.per_token[device];
        let mut target = Self {
            slot,
            device,
            expert,
            is_spare: slots.copies(expert) != 1,
            is_moved: one_if(running.lacks(expert, device)),
            time_without,
            power_without: power(time_without),
            power: loads.powers[device],
            ..Self::default()
        };
        if slots.copies(expert) > 1 {
            target.tokens_left = expected[usize::from(expert)] / f64::from(slots.copies(expert) - 1);
            target.added_load = loads.with_variance(target.tokens_left) - loads.load_in[slot];
            let time = loads.times[device] + target.added_load * loads.per_token[device];
            target.added_power = power(time) - target.power;
        }
        target
    }
}
