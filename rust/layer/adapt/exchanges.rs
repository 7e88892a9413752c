//! The best exchange of a slot of a slow device with one elsewhere: gather the others, price all of them at once, take the
//! best that is allowed.

use std::ops::Range;

use super::super::budget::per_copy;
use super::super::{EMPTY, Slots};
use super::loads::{Loads, one_if, power};

/// Slots that are priced together.
const LANES: usize = 8;

/// Slots that a slow device may exchange one of its own with, side by side.
pub(super) struct Others {
    /// The slots `[row]`, and the rows of every device `[D]`.
    slot: Vec<usize>,
    rows: Vec<Range<usize>>,
    /// Time of the slot's device, infinite where an exchange is out of the question, and its time per token `[row]`.
    time: Vec<f64>,
    per_token: Vec<f64>,
    /// The device's time to the power of the norm `[row]`.
    power: Vec<f64>,
    /// Load in the slot `[row]`, and the least of all.
    load: Vec<f64>,
    least_load: f64,
    /// Copies that what comes from the slot brings, and what goes there, less those that it takes back `[row]`.
    comes: Vec<f64>,
    goes: Vec<f64>,
    /// What each exchange is worth `[row]`.
    worth: Vec<f64>,
}

impl Others {
    pub(super) fn new(slots: usize, devices: usize) -> Self {
        let row = slots.next_multiple_of(LANES);
        let [time, per_token, power, load, comes, goes, worth] = std::array::from_fn(|_| vec![0.0; row]);
        let (slot, rows, least_load) = (vec![], vec![0..0; devices], f64::INFINITY);
        Self { slot, rows, time, per_token, power, load, least_load, comes, goes, worth }
    }

    /// Gathers the slots of some devices for exchanges with a slow one.
    pub(super) fn gather(
        &mut self,
        slots: &Slots,
        running: &Slots,
        loads: &Loads,
        slow: usize,
        devices: &[usize],
    ) {
        self.slot.clear();
        self.rows.fill(0..0);
        for &g in devices.iter().filter(|&&g| g != slow) {
            let (begin, from) = (self.slot.len(), slots.of(g));
            let rows = begin..begin + from.len();
            self.slot.extend(from.clone());
            self.time[rows.clone()].fill(loads.times[g]);
            self.power[rows.clone()].fill(power(loads.times[g]));
            self.per_token[rows.clone()].fill(loads.per_token[g]);
            self.load[rows.clone()].copy_from_slice(&loads.load_in[from.clone()]);
            for (row, slot) in rows.clone().zip(from) {
                self.comes[row] = one_if(running.lacks(slots.expert_in[slot], slow)) - loads.is_moved[slot];
            }
            self.rows[g] = rows;
        }
        let count = self.slot.len();
        // Rows beyond the slots fill the last vector.
        self.time[count..].fill(f64::INFINITY);
        self.least_load = self.load[..count].iter().copied().fold(f64::INFINITY, f64::min);
    }

    /// The exchange of a slot with one of those that were gathered that is worth most, more than a limit, and is allowed.
    pub(super) fn best_allowed(
        &mut self,
        slot: usize,
        (slots, running, loads): (&Slots, &Slots, &Loads),
        limit: f64,
        is_allowed: impl Fn(usize) -> bool,
    ) -> Option<(f64, usize)> {
        let device = slots.device(slot);
        let (load, time, per_token) = (loads.load_in[slot], loads.times[device], loads.per_token[device]);
        // The least that an exchange can leave, if it brings one copy.
        let rest = time - (load - self.least_load) * per_token;
        if power(time) - power(rest) <= limit {
            return None;
        }
        self.count_moves(slots.expert_in[slot], running, loads.is_moved[slot]);
        let (mut best, mut barred) = (None, vec![]);
        loop {
            let worth = price(self, load, time, per_token);
            if worth <= limit {
                break;
            }
            let row = self.worth.iter().position(|&other| other >= worth).unwrap_or_default();
            if is_allowed(self.slot[row]) {
                best = Some((worth, self.slot[row]));
                break;
            }
            barred.push(row);
            self.time[row] = f64::INFINITY;
        }
        // What is not allowed for this slot may be for the next.
        for row in barred {
            self.time[row] = loads.times[slots.device(self.slot[row])];
        }
        best
    }

    /// Counts the copies that an expert, or nothing, brings to each of the others, where its own slot was moved or not.
    fn count_moves(&mut self, expert: u16, running: &Slots, is_moved: f64) {
        let count = self.slot.len();
        self.goes[..count].fill(one_if(expert != EMPTY) - is_moved);
        let had = (expert != EMPTY).then(|| running.devices(expert).map(usize::from)).into_iter().flatten();
        for device in had {
            self.goes[self.rows[device].clone()].fill(-is_moved);
        }
    }
}

/// Prices all exchanges with a slot of a load, on a device of a time; returns the most that one is worth.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn price(others: &mut Others, load_here: f64, before: f64, per_token: f64) -> f64 {
    // Rows beyond the slots are infinitely slow, as far as they are priced.
    let row = others.slot.len().next_multiple_of(LANES);
    others.worth[row..].fill(0.0);
    let (time, per, load) = (&others.time[..row], &others.per_token[..row], &others.load[..row]);
    let powers = &others.power[..row];
    let (comes, goes, worth) = (&others.comes[..row], &others.goes[..row], &mut others.worth[..row]);
    let now = power(before);
    for q in 0..row {
        let moved = load_here - load[q];
        let (here, there) = (before - moved * per_token, time[q] + moved * per[q]);
        let gain = (now - power(here)) + (powers[q] - power(there));
        worth[q] = gain * per_copy(comes[q] + goes[q]);
    }
    let mut best = [0.0; LANES];
    for worth in worth.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            best[lane] = if worth[lane] > best[lane] { worth[lane] } else { best[lane] };
        }
    }
    best.into_iter().fold(0.0, f64::max)
}
