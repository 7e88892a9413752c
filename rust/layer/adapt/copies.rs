//! The best additional copy that relieves a slow device: gather what one more copy of each of its experts would relieve,
//! price it in place of every other copy, take the best one that the rules allow.
//!
//! Prices leave out that the other copies of the expert get less load, too, so a step may turn out better than its price.

use super::super::budget::factor_per_copy;
use super::super::{EMPTY, Move};
use super::loads::{Loads, one_if, power};
use super::{Best, Steps};

/// Load and time that one more copy of an expert, elsewhere, takes from a slow device that holds it.
struct Relief {
    expert: u16,
    /// Load of each copy then.
    load: f64,
    /// Time that the slow device saves.
    time: f64,
}

/// A slot whose content may be removed, and what its removal changes.
struct Target {
    slot: usize,
    device: usize,
    /// 1 if its content counts as a move, otherwise 0.
    is_moved: f64,
    /// Time of the slot's device without the content, its power, and the power with the content.
    time_without: f64,
    power_without: f64,
    power: f64,
    /// Powers that the removal adds to devices other than the slow one, and time that it adds to the slow one: other copies
    /// take over the load.
    added_elsewhere: f64,
    added_to_slowest: f64,
}

/// Looks for an additional copy, on the slow device or elsewhere, that gains more per copy than the best step so far.
pub(super) fn find_copy(steps: &Steps<'_>, slow: usize, removal: &Removal, best: &mut Best) {
    let reliefs = find_reliefs(steps, slow);
    let slots = (0..steps.slots.expert_in.len()).filter(|&slot| steps.slots.may_lose(steps.site, slot));
    for slot in slots {
        let target = removal.target(steps, slot, slow);
        if target.device == slow {
            find_copy_here(steps, &target, removal, best);
        } else {
            find_copy_elsewhere(steps, &target, removal, (slow, &reliefs), best);
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
fn find_copy_here(steps: &Steps<'_>, target: &Target, removal: &Removal, best: &mut Best) {
    let per_token = steps.loads.per_token[target.device];
    // The gain if the new copy had no load.
    let largest_gain = target.power - target.power_without - target.added_elsewhere;
    if largest_gain * factor_per_copy(1.0 - target.is_moved) <= best.gain_per_copy {
        return;
    }
    for (expert, &load) in (0..).zip(&steps.loads.with_one_more) {
        let gain = target.power - power(target.time_without + load * per_token) - target.added_elsewhere;
        if gain * factor_per_copy(1.0 - target.is_moved) > best.gain_per_copy {
            consider(steps, target, removal, (expert, gain), best);
        }
    }
}

/// Prices copies of the slow device's experts in a slot elsewhere.
fn find_copy_elsewhere(
    steps: &Steps<'_>,
    target: &Target,
    removal: &Removal,
    (slow, reliefs): (usize, &[Relief]),
    best: &mut Best,
) {
    let (slow_time, per_token) = (steps.loads.times[slow], steps.loads.per_token[target.device]);
    let slow_power = power(slow_time);
    for &Relief { expert, load, time } in reliefs {
        let relieved =
            slow_power - power(slow_time - time + target.added_to_slowest) - target.added_elsewhere
                + target.power;
        // Even without the load of the copy this gains too little, and reliefs further on are smaller.
        if target.is_moved == 0.0 && relieved - target.power_without <= best.gain_per_copy {
            break;
        }
        let gain = relieved - power(target.time_without + load * per_token);
        if gain > 0.0 {
            consider(steps, target, removal, (expert, gain), best);
        }
    }
}

/// Takes a copy of an expert in place of a slot's content as the best step, if it gains more per copy and is allowed.
///
/// The copies that stay of the removed expert must not become heavier than the new one is.
fn consider(
    steps: &Steps<'_>,
    target: &Target,
    removal: &Removal,
    (expert, gain): (u16, f64),
    best: &mut Best,
) {
    let slots = &steps.slots;
    let is_move = one_if(steps.running.lacks(expert, target.device));
    let gain_per_copy = gain * factor_per_copy(is_move - target.is_moved);
    let fits = || {
        slots.may_take(steps.site, expert, target.device)
            && slots.load_per_copy(&steps.expected, expert) >= removal.tokens_left[target.slot]
    };
    if gain_per_copy > best.gain_per_copy && fits() {
        *best = Best { gain_per_copy, step: Some(Move::Put(target.slot, expert)) };
    }
}

/// Changes of the other copies of an expert if the copy in a slot is removed.
pub(super) struct Removal {
    /// Tokens of each of the other copies then `[P]`.
    tokens_left: Vec<f64>,
    /// Load that each of them takes over, with its variance `[P]`.
    added_load: Vec<f64>,
    /// Power that this adds to a slot's device if another copy of its expert is removed `[P]`; sum over all slots of an
    /// expert `[E]`.
    added_power: Vec<f64>,
    added_by_expert: Vec<f64>,
}

impl Removal {
    /// Computes what every removal would change.
    pub(super) fn new(steps: &Steps<'_>) -> Self {
        let (slots, loads) = (&steps.slots, &steps.loads);
        let [mut tokens_left, mut added_load, mut added_power] =
            std::array::from_fn(|_| vec![0.0; slots.expert_in.len()]);
        let mut added_by_expert = vec![0.0; steps.expected.len()];
        for (slot, &e) in slots.expert_in.iter().enumerate().filter(|(_, e)| slots.copies(**e) > 1) {
            let tokens = steps.expected[usize::from(e)] / f64::from(slots.copies(e) - 1);
            tokens_left[slot] = tokens;
            added_load[slot] = loads.with_variance(tokens) - loads.load_in[slot];
            added_power[slot] = loads.added_power(slots.device(slot), added_load[slot]);
            added_by_expert[usize::from(e)] += added_power[slot];
        }
        Self { tokens_left, added_load, added_power, added_by_expert }
    }

    /// Returns a slot with what the removal of its content changes.
    fn target(&self, steps: &Steps<'_>, slot: usize, slow: usize) -> Target {
        let (slots, loads) = (&steps.slots, &steps.loads);
        let (device, expert) = (slots.device(slot), slots.expert_in[slot]);
        let time_without = loads.times[device] - loads.load_in[slot] * loads.per_token[device];
        let (added_elsewhere, added_to_slowest) =
            if expert == EMPTY { (0.0, 0.0) } else { self.added(steps, slot, slow) };
        Target {
            slot,
            device,
            is_moved: one_if(steps.running.lacks(expert, device)),
            time_without,
            power_without: power(time_without),
            power: power(loads.times[device]),
            added_elsewhere,
            added_to_slowest,
        }
    }

    /// Returns what a removal adds to the powers of devices other than the slow one, and to the time of the slow one.
    fn added(&self, steps: &Steps<'_>, slot: usize, slow: usize) -> (f64, f64) {
        let (slots, expert) = (&steps.slots, steps.slots.expert_in[slot]);
        let elsewhere = self.added_by_expert[usize::from(expert)] - self.added_power[slot];
        let on_slow = (slots.device(slot) != slow && slots.holds(expert, slow))
            .then(|| slots.of(slow).find(|&other| slots.expert_in[other] == expert))
            .flatten();
        match on_slow {
            Some(other) => {
                (elsewhere - self.added_power[other], self.added_load[slot] * steps.loads.per_token[slow])
            }
            None => (elsewhere, 0.0),
        }
    }
}

impl Loads {
    /// Returns what more load adds to the power of a device's time.
    fn added_power(&self, device: usize, load: f64) -> f64 {
        power(self.times[device] + load * self.per_token[device]) - power(self.times[device])
    }
}
