//! Slots for experts that have none, as after the loss of a device, by one copy brought for each of them.
//!
//! Each takes an empty slot, or that of a copy which its expert can do without; then each is taken out again and put
//! where it is best, and two change places, as long as the slowest devices gain.

use super::{NoSlot, Placed, squeeze};
use crate::layer::{EMPTY, Move, Site, Slots};

/// Times count to the power of two to the power of this: the slowest devices are all that counts.
const DOUBLINGS: u32 = 4;
/// Times that every expert is looked at again.
const ROUNDS: usize = 4;
/// What a change must gain, as a part of the sum of powers: more than sums of floats can be off.
const ROUNDING: f64 = 1e-9;

/// An expert that had no slot: the slot that it took, and what was there.
#[derive(Debug, Clone, Copy)]
struct Taken {
    expert: u16,
    slot: usize,
    before: u16,
}

/// Gives experts that lack copies slots, the heaviest first.
pub(super) fn repair(slots: &mut Slots, site: &Site, load: &[f64]) -> Placed<()> {
    let mut missing: Vec<u16> = (0..load.len() as u16).filter(|&e| slots.is_short(site, e)).collect();
    missing.sort_by(|&a, &b| load[usize::from(b)].total_cmp(&load[usize::from(a)]));
    let (mut taken, mut is_shifted) = (vec![], false);
    for expert in missing {
        while slots.is_short(site, expert) {
            let search = Search::new(slots, site, load);
            if let Some(slot) = search.best_slot(expert) {
                taken.push(Taken { expert, slot, before: slots.expert_in[slot] });
                slots.put(slot, expert);
            } else if squeeze(slots, site, expert).is_ok() {
                is_shifted = true;
            } else {
                return Err(NoSlot(usize::from(expert)));
            }
        }
    }
    // What made room is elsewhere now.
    let rounds = if is_shifted { 0 } else { ROUNDS };
    for _ in 0..rounds {
        if !reseat(slots, site, load, &mut taken) & !exchange(slots, site, load, &mut taken) {
            break;
        }
    }
    Ok(())
}

/// The first empty slot of a device.
pub(super) fn vacant(slots: &Slots, device: usize) -> Option<usize> {
    slots.of(device).find(|&slot| slots.expert_in[slot] == EMPTY)
}

/// Takes every expert out, and puts it where it is best; whether that gains.
fn reseat(slots: &mut Slots, site: &Site, load: &[f64], taken: &mut [Taken]) -> bool {
    let (mut gains, mut total) = (false, Search::new(slots, site, load).total());
    for each in taken {
        slots.put(each.slot, each.before);
        let best = Search::new(slots, site, load).best_slot(each.expert).unwrap_or(each.slot);
        let before = slots.expert_in[best];
        slots.put(best, each.expert);
        let then = if best == each.slot { total } else { Search::new(slots, site, load).total() };
        if then < total * (1.0 - ROUNDING) {
            (each.slot, each.before, gains, total) = (best, before, true, then);
        } else {
            slots.put(best, before);
            slots.put(each.slot, each.expert);
        }
    }
    gains
}

/// Lets two experts change places wherever that gains; whether it does.
fn exchange(slots: &mut Slots, site: &Site, load: &[f64], taken: &mut [Taken]) -> bool {
    let mut gains = false;
    for first in 0..taken.len() {
        for second in 0..first {
            let (p, q) = (taken[first].slot, taken[second].slot);
            if !slots.allows(site, Move::Swap(p, q)) {
                continue;
            }
            let search = Search::new(slots, site, load);
            if search.swapped(p, q) < -ROUNDING * search.total() {
                slots.apply(Move::Swap(p, q));
                let (one, other) = (taken[first], taken[second]);
                taken[first] = Taken { expert: one.expert, ..other };
                taken[second] = Taken { expert: other.expert, ..one };
                gains = true;
            }
        }
    }
    gains
}

/// A layer as it is, for all places of an expert at once.
struct Search<'a> {
    slots: &'a Slots,
    site: &'a Site,
    load: &'a [f64],
    /// Time of every device `[D]`, in means of all.
    times: Vec<f64>,
    /// One over the mean.
    unit: f64,
}

impl<'a> Search<'a> {
    fn new(slots: &'a Slots, site: &'a Site, load: &'a [f64]) -> Self {
        let mut times = slots.times_and_loads(site, load).0;
        let mean = load.iter().sum::<f64>() / site.rate();
        let unit = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        for time in &mut times {
            *time *= unit;
        }
        Self { slots, site, load, times, unit }
    }

    /// Powers of all times.
    fn total(&self) -> f64 {
        self.times.iter().map(|&time| power(time)).sum()
    }

    /// What more load adds to the power of a device's time.
    fn lifted(&self, device: usize, load: f64) -> f64 {
        let time = self.times[device];
        power(time + load * self.site.time[device] * self.unit) - power(time)
    }

    /// The slot with which an expert costs least: an empty one, if there is one that it may take.
    fn best_slot(&self, expert: u16) -> Option<usize> {
        let open = (0..self.times.len()).filter(|&g| self.slots.may_take(self.site, expert, g));
        let empty: Vec<usize> = open.clone().filter_map(|g| vacant(self.slots, g)).collect();
        let spare =
            || open.flat_map(|g| self.slots.of(g)).filter(|&slot| self.slots.may_lose(self.site, slot));
        let places = if empty.is_empty() { spare().collect() } else { empty };
        let costs = places.into_iter().map(|slot| (slot, self.cost(expert, slot)));
        costs.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(slot, _)| slot)
    }

    /// What an expert in a slot adds to powers of times, in place of what is there; its other copies, if there are any,
    /// are not relieved.
    fn cost(&self, expert: u16, slot: usize) -> f64 {
        let part = |e: u16, copies: u32| self.load[usize::from(e)] / f64::from(copies.max(1));
        let (gone, device) = (self.slots.expert_in[slot], self.slots.device(slot));
        let comes = part(expert, self.slots.copies(expert) + 1);
        if gone == EMPTY {
            return self.lifted(device, comes);
        }
        let copies = self.slots.copies(gone);
        let more = part(gone, copies - 1) - part(gone, copies);
        let others = self.slots.devices(gone).map(usize::from).filter(|&other| other != device);
        let beside: f64 = others.map(|other| self.lifted(other, more)).sum();
        self.lifted(device, comes - part(gone, copies)) + beside
    }

    /// What an exchange of two slots adds to powers of times.
    fn swapped(&self, p: usize, q: usize) -> f64 {
        let part = |slot: usize| self.slots.part(self.load, self.slots.expert_in[slot]);
        let more = part(q) - part(p);
        self.lifted(self.slots.device(p), more) + self.lifted(self.slots.device(q), -more)
    }
}

/// A time to the power of the norm.
fn power(time: f64) -> f64 {
    (0..DOUBLINGS).fold(time, |power, _| power * power)
}
