//! Finds slots for experts that have none, as after the loss of a device; one copy moves for each of them.
//!
//! An expert takes an empty slot, or that of a copy which its expert can do without. Then every such expert is moved to its
//! best slot, and two exchange their slots, as long as the slowest devices gain.

use super::squeeze::squeeze;
use super::{NoSlot, Placed};
use crate::layer::{EMPTY, Move, Site, Slots, power};

/// Number of squarings of a time: powers so high that the slowest devices decide their sum.
const DOUBLINGS: u32 = 4;
/// Rounds in which every expert may move again.
const ROUNDS: usize = 4;
/// Smallest gain, as a part of the sum of powers: sums of floats may be off by as much.
const ROUNDING: f64 = 1e-9;

/// An expert that had no slot, the slot that it took, and the content of that slot before.
#[derive(Debug, Clone, Copy)]
struct Taken {
    expert: u16,
    slot: usize,
    before: u16,
}

/// Gives slots to experts that lack copies, the heaviest first.
pub(super) fn repair(slots: &mut Slots, site: &Site, load: &[f64]) -> Placed<()> {
    let mut missing: Vec<u16> = (0..load.len() as u16).filter(|&e| slots.is_short(site, e)).collect();
    missing.sort_by(|&a, &b| load[usize::from(b)].total_cmp(&load[usize::from(a)]));
    let (mut taken, mut is_shifted) = (vec![], false);
    let mut search = Search::new(slots, site, load);
    for expert in missing {
        while search.slots.is_short(site, expert) {
            if let Some(slot) = search.best_slot(expert) {
                taken.push(Taken { expert, slot, before: search.slots.expert_in[slot] });
                search.put(slot, expert);
            } else if squeeze(search.slots, site, expert).is_ok() {
                is_shifted = true;
                search.count_all();
            } else {
                return Err(NoSlot(usize::from(expert)));
            }
        }
    }
    // After a shift, the contents that `taken` remembers are elsewhere.
    let rounds = if is_shifted { 0 } else { ROUNDS };
    for _ in 0..rounds {
        if !search.relocate(&mut taken) & !search.exchange(&mut taken) {
            break;
        }
    }
    Ok(())
}

/// Returns the first empty slot of a device.
pub(super) fn vacant(slots: &Slots, device: usize) -> Option<usize> {
    slots.of(device).find(|&slot| slots.expert_in[slot] == EMPTY)
}

/// The state of a layer, from which the cost of an expert in any slot is computed.
struct Search<'a> {
    slots: &'a mut Slots,
    site: &'a Site,
    load: &'a [f64],
    /// Time of every device `[D]`, in means of all, and its power.
    times: Vec<f64>,
    powers: Vec<f64>,
    /// Tokens of every copy of an expert `[E + 1]`; the last one, of an empty slot, is 0.
    per_copy: Vec<f64>,
    /// One over the mean.
    unit: f64,
    /// First empty slot of every device, and the slots whose experts have more copies than they must `[D]`.
    empty: Vec<Option<usize>>,
    spare: Vec<Vec<usize>>,
    /// Devices that a change of a slot touches.
    touched: Vec<usize>,
}

impl<'a> Search<'a> {
    fn new(slots: &'a mut Slots, site: &'a Site, load: &'a [f64]) -> Self {
        let mean = load.iter().sum::<f64>() / site.rate();
        let unit = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let [times, powers] = [vec![0.0; site.devices()], vec![0.0; site.devices()]];
        let per_copy = vec![0.0; load.len() + 1];
        let (empty, spare) = (vec![None; site.devices()], vec![vec![]; site.devices()]);
        let mut search =
            Self { slots, site, load, times, powers, per_copy, unit, empty, spare, touched: vec![] };
        search.count_all();
        search
    }

    /// Computes loads of all copies and times of all devices.
    fn count_all(&mut self) {
        for expert in 0..self.load.len() as u16 {
            self.per_copy[usize::from(expert)] = self.load_per_copy(expert, self.slots.copies(expert));
        }
        self.count(0..self.site.devices());
    }

    /// Computes times of devices, and their slots that another copy may take.
    fn count(&mut self, devices: impl Iterator<Item = usize>) {
        let fewest = self.site.rules.min_copies;
        for device in devices {
            let load = self.slots.of(device).map(|slot| self.load_in(slot)).sum::<f64>();
            let has_more = |slot: &usize| self.slots.copies(self.slots.expert_in[*slot]) > fewest;
            self.empty[device] = vacant(self.slots, device);
            self.spare[device].clear();
            self.spare[device].extend(self.slots.of(device).filter(has_more));
            self.times[device] = load * self.site.time[device] * self.unit;
            self.powers[device] = power(self.times[device], DOUBLINGS);
        }
    }

    /// Returns the tokens of each of so many copies of an expert.
    fn load_per_copy(&self, expert: u16, copies: u32) -> f64 {
        self.load[usize::from(expert)] / f64::from(copies.max(1))
    }

    /// Returns the tokens of a slot's content.
    fn load_in(&self, slot: usize) -> f64 {
        self.per_copy[usize::from(self.slots.expert_in[slot]).min(self.load.len())]
    }

    /// Puts an expert into a slot, or empties it.
    fn put(&mut self, slot: usize, expert: u16) {
        let experts = [self.slots.expert_in[slot], expert].into_iter().filter(|&expert| expert != EMPTY);
        self.slots.put(slot, expert);
        for expert in experts.clone() {
            self.per_copy[usize::from(expert)] = self.load_per_copy(expert, self.slots.copies(expert));
        }
        let mut touched = std::mem::take(&mut self.touched);
        touched.clear();
        touched.push(self.slots.device(slot));
        touched.extend(experts.flat_map(|expert| self.slots.devices(expert)).map(usize::from));
        self.count(touched.iter().copied());
        self.touched = touched;
    }

    /// Returns the sum of the powers of all times.
    fn total(&self) -> f64 {
        self.powers.iter().sum()
    }

    /// Returns what more load adds to the power of a device's time.
    fn added_power(&self, device: usize, load: f64) -> f64 {
        let time = self.times[device] + load * self.site.time[device] * self.unit;
        power(time, DOUBLINGS) - self.powers[device]
    }

    /// Moves every expert to its best slot; returns whether that gains.
    fn relocate(&mut self, taken: &mut [Taken]) -> bool {
        let (mut gains, mut total) = (false, self.total());
        for place in taken {
            self.put(place.slot, place.before);
            let best = self.best_slot(place.expert).unwrap_or(place.slot);
            let before = self.slots.expert_in[best];
            self.put(best, place.expert);
            let then = if best == place.slot { total } else { self.total() };
            if then < total * (1.0 - ROUNDING) {
                (place.slot, place.before, gains, total) = (best, before, true, then);
            } else if best != place.slot {
                self.put(best, before);
                self.put(place.slot, place.expert);
            }
        }
        gains
    }

    /// Exchanges the slots of two experts wherever that gains; returns whether it does.
    fn exchange(&mut self, taken: &mut [Taken]) -> bool {
        let (mut gains, mut least) = (false, ROUNDING * self.total());
        for first in 0..taken.len() {
            for second in 0..first {
                let (p, q) = (taken[first].slot, taken[second].slot);
                let devices = [p, q].map(|slot| self.slots.device(slot));
                let added_load = self.load_in(q) - self.load_in(p);
                let added =
                    self.added_power(devices[0], added_load) + self.added_power(devices[1], -added_load);
                if added >= -least || !self.slots.allows(self.site, Move::Swap(p, q)) {
                    continue;
                }
                self.slots.apply(Move::Swap(p, q));
                self.count(devices.into_iter());
                let (one, other) = (taken[first], taken[second]);
                taken[first] = Taken { expert: one.expert, ..other };
                taken[second] = Taken { expert: other.expert, ..one };
                (gains, least) = (true, ROUNDING * self.total());
            }
        }
        gains
    }

    /// Returns the slot in which an expert costs least: an empty one, if there is one that it may take.
    fn best_slot(&self, expert: u16) -> Option<usize> {
        let tokens = self.load_per_copy(expert, self.slots.copies(expert) + 1);
        let open = (0..self.times.len()).filter(|&g| self.slots.may_take(self.site, expert, g));
        let empty = open.clone().filter_map(|g| self.empty[g]);
        let priced = empty.map(|slot| (self.added_power(self.slots.device(slot), tokens), slot));
        if let Some((_, slot)) = priced.reduce(|a, b| if b.0 < a.0 { b } else { a }) {
            return Some(slot);
        }
        let mut best = (f64::INFINITY, None);
        for &slot in open.flat_map(|g| &self.spare[g]) {
            if self.slots.may_lose(self.site, slot) {
                let cost = self.added_by_replacing(tokens, slot, best.0);
                if best.1.is_none() || cost < best.0 {
                    best = (cost, Some(slot));
                }
            }
        }
        best.1
    }

    /// Returns what a copy of so many tokens adds to the powers of times if it replaces the content of a slot; if that is at
    /// least `limit`, a lower bound of it. The other copies of its expert, if there are any, count as before.
    fn added_by_replacing(&self, tokens: f64, slot: usize, limit: f64) -> f64 {
        let (gone, device) = (self.slots.expert_in[slot], self.slots.device(slot));
        let added_power = self.added_power(device, tokens - self.load_in(slot));
        if added_power >= limit {
            return added_power;
        }
        let added_load = self.load_per_copy(gone, self.slots.copies(gone) - 1) - self.load_in(slot);
        let others = self.slots.devices(gone).map(usize::from).filter(|&other| other != device);
        added_power + others.map(|other| self.added_power(other, added_load)).sum::<f64>()
    }
}
