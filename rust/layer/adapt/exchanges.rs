//! The best exchange of a slot of a slow device with a slot elsewhere: gather the partners, price all exchanges at once,
//! take the best one that the rules allow.

use std::ops::Range;

use super::super::budget::factor_per_copy;
use super::super::{EMPTY, Slots};
use super::loads::{Loads, one_if, power};

/// Exchanges that are priced together.
const LANES: usize = 8;

/// A layer's slots as they stand, the slots that run, and the loads of the former.
#[derive(Clone, Copy)]
pub(super) struct State<'a> {
    pub(super) slots: &'a Slots,
    pub(super) running: &'a Slots,
    pub(super) loads: &'a Loads,
}

/// Slots elsewhere that a slow device may exchange one of its own with: one row each, so that vectors can price them.
pub(super) struct Partners {
    /// The slots `[row]`, and the rows of every device `[D]`.
    slot: Vec<usize>,
    rows: Vec<Range<usize>>,
    /// Time of the slot's device, infinite where the exchange is not allowed, and its time per token `[row]`.
    time: Vec<f64>,
    per_token: Vec<f64>,
    /// The device's time to the power of the norm `[row]`.
    power: Vec<f64>,
    /// Load in the slot `[row]`, and the least of them.
    load: Vec<f64>,
    least_load: f64,
    /// Moves that an exchange adds, of the copy that comes from the partner and of the one that goes there: 1, 0, or -1 where
    /// a copy goes back to where it runs `[row]`.
    copies_in: Vec<f64>,
    copies_out: Vec<f64>,
    /// Gain of every exchange per moved copy `[row]`.
    gain_per_copy: Vec<f64>,
}

impl Partners {
    /// Makes room for all slots of a layer.
    pub(super) fn new(slots: usize, devices: usize) -> Self {
        let rows = slots.next_multiple_of(LANES);
        let [time, per_token, power, load, copies_in, copies_out, gain_per_copy] =
            std::array::from_fn(|_| vec![0.0; rows]);
        let (slot, rows, least_load) = (vec![], vec![0..0; devices], f64::INFINITY);
        Self { slot, rows, time, per_token, power, load, least_load, copies_in, copies_out, gain_per_copy }
    }

    /// Gathers the slots of devices for exchanges with a slow one.
    pub(super) fn gather(&mut self, state: State<'_>, slow: usize, devices: &[usize]) {
        let State { slots, running, loads } = state;
        self.slot.clear();
        self.rows.fill(0..0);
        for &g in devices.iter().filter(|&&g| g != slow) {
            let (begin, slots_there) = (self.slot.len(), slots.of(g));
            let rows = begin..begin + slots_there.len();
            self.slot.extend(slots_there.clone());
            self.time[rows.clone()].fill(loads.times[g]);
            self.power[rows.clone()].fill(power(loads.times[g]));
            self.per_token[rows.clone()].fill(loads.per_token[g]);
            self.load[rows.clone()].copy_from_slice(&loads.load_in[slots_there.clone()]);
            for (row, slot) in rows.clone().zip(slots_there) {
                self.copies_in[row] =
                    one_if(running.lacks(slots.expert_in[slot], slow)) - loads.is_moved[slot];
            }
            self.rows[g] = rows;
        }
        let count = self.slot.len();
        // Rows beyond the slots fill the last vector.
        self.time[count..].fill(f64::INFINITY);
        self.least_load = self.load[..count].iter().copied().fold(f64::INFINITY, f64::min);
    }

    /// Returns the gain per copy and the partner of the best exchange of a slot that is allowed; nothing if none gains more
    /// than `limit`.
    pub(super) fn best_allowed(
        &mut self,
        state: State<'_>,
        slot: usize,
        limit: f64,
        is_allowed: impl Fn(usize) -> bool,
    ) -> Option<(f64, usize)> {
        let State { slots, running, loads } = state;
        let device = slots.device(slot);
        let (load, time, per_token) = (loads.load_in[slot], loads.times[device], loads.per_token[device]);
        // The lightest partner relieves this device most: no exchange that moves one copy gains more than this.
        let least_time = time - (load - self.least_load) * per_token;
        if power(time) - power(least_time) <= limit {
            return None;
        }
        self.count_moves(slots.expert_in[slot], running, loads.is_moved[slot]);
        let (mut best, mut forbidden) = (None, vec![]);
        loop {
            let gain = price(self, load, time, per_token);
            if gain <= limit {
                break;
            }
            let row = self.gain_per_copy.iter().position(|&other| other >= gain).unwrap_or_default();
            if is_allowed(self.slot[row]) {
                best = Some((gain, self.slot[row]));
                break;
            }
            forbidden.push(row);
            self.time[row] = f64::INFINITY;
        }
        // The rules may allow these rows to the next slot.
        for row in forbidden {
            self.time[row] = loads.times[slots.device(self.slot[row])];
        }
        best
    }

    /// Counts the moves that an expert, or an empty slot's nothing, adds where it goes; `is_moved` if it is away already.
    fn count_moves(&mut self, expert: u16, running: &Slots, is_moved: f64) {
        let count = self.slot.len();
        self.copies_out[..count].fill(one_if(expert != EMPTY) - is_moved);
        let holders =
            (expert != EMPTY).then(|| running.devices(expert).map(usize::from)).into_iter().flatten();
        for device in holders {
            self.copies_out[self.rows[device].clone()].fill(-is_moved);
        }
    }
}

/// Prices all exchanges of a slot that has a load, on a device with a time; returns the largest gain per moved copy.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn price(partners: &mut Partners, load_here: f64, time_here: f64, per_token: f64) -> f64 {
    // Rows beyond the slots, up to a full vector, are infinitely slow.
    let rows = partners.slot.len().next_multiple_of(LANES);
    partners.gain_per_copy[rows..].fill(0.0);
    let (time, per_token_there, load) =
        (&partners.time[..rows], &partners.per_token[..rows], &partners.load[..rows]);
    let power_there = &partners.power[..rows];
    let (copies_in, copies_out) = (&partners.copies_in[..rows], &partners.copies_out[..rows]);
    let gain_per_copy = &mut partners.gain_per_copy[..rows];
    let power_here = power(time_here);
    for q in 0..rows {
        let moved = load_here - load[q];
        let (here, there) = (time_here - moved * per_token, time[q] + moved * per_token_there[q]);
        let gain = (power_here - power(here)) + (power_there[q] - power(there));
        gain_per_copy[q] = gain * factor_per_copy(copies_in[q] + copies_out[q]);
    }
    let mut best = [0.0; LANES];
    for gain in gain_per_copy.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            best[lane] = if gain[lane] > best[lane] { gain[lane] } else { best[lane] };
        }
    }
    best.into_iter().fold(0.0, f64::max)
}
