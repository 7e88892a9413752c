//! The best exchange of a slot of a slow device with a slot elsewhere: choose the partners, price all exchanges at once,
//! take the best one that the rules allow.

use super::super::budget::factor_per_copy;
use super::super::{EMPTY, Slots};
use super::loads::{Loads, largest, one_if, power};

/// Devices that a slow one may exchange slots with: the fastest, so many quarters of all.
const PARTNER_QUARTERS: usize = 3;

/// A layer's slots as they stand, the slots that run, and the loads of the former, given what experts are expected to have.
#[derive(Clone, Copy)]
pub(super) struct State<'a> {
    pub(super) slots: &'a Slots,
    pub(super) running: &'a Slots,
    pub(super) loads: &'a Loads,
    pub(super) expected: &'a [f64],
}

/// Slots that a slow device may exchange one of its own with. Tables have a row for every slot of the layer, so that vectors
/// can price them.
#[derive(Default)]
pub(super) struct Partners {
    /// Devices `[D]`, the slowest first, of equals the first.
    pub(super) order: Vec<usize>,
    /// Time of the slot's device, that to the power of the norm, and the device's time per token `[P]`.
    time_in: Vec<f64>,
    power_in: Vec<f64>,
    per_token_in: Vec<f64>,
    /// 1 if the slot's content runs on its device, 0 if it has moved there or there is none `[P]`.
    is_home: Vec<f64>,
    /// For one slow device: time of the slot's device, infinite where the exchange is not allowed `[P]`.
    time: Vec<f64>,
    /// Moves that an exchange adds, beyond those of the slow device's own slot: 1 to -1 `[P]`.
    copies: Vec<f64>,
    /// The least load of a partner.
    least_load: f64,
    /// Gain of every exchange per moved copy `[P]`.
    gain_per_copy: Vec<f64>,
}

impl Partners {
    /// Gathers all slots of a layer.
    pub(super) fn new(state: State<'_>) -> Self {
        let mut partners = Self::default();
        let Self { time_in, power_in, per_token_in, is_home, time, copies, gain_per_copy, .. } =
            &mut partners;
        for table in [time_in, power_in, per_token_in, is_home, time, copies, gain_per_copy] {
            table.resize(state.slots.expert_in.len(), 0.0);
        }
        partners.update(state, &(0..state.loads.times.len()).collect::<Vec<_>>());
        partners
    }

    /// Gathers the slots of devices that have changed.
    pub(super) fn update(&mut self, State { slots, running, loads, .. }: State<'_>, devices: &[usize]) {
        self.order.retain(|device| !devices.contains(device));
        for &device in devices {
            let time = loads.times[device];
            let is_slower =
                |other: &usize| time.total_cmp(&loads.times[*other]).then(other.cmp(&device)).is_lt();
            let at = self.order.partition_point(is_slower);
            self.order.insert(at, device);
            self.time_in[slots.of(device)].fill(loads.times[device]);
            self.power_in[slots.of(device)].fill(loads.powers[device]);
            self.per_token_in[slots.of(device)].fill(loads.per_token[device]);
            for slot in slots.of(device) {
                let expert = slots.expert_in[slot];
                self.is_home[slot] = one_if(expert != EMPTY && running.holds(expert, device));
            }
        }
    }

    /// Chooses the slots of the fastest devices, for exchanges with a slow one.
    pub(super) fn choose(&mut self, state: State<'_>, slow: usize) {
        let State { slots, running, loads, .. } = state;
        let slowest = self.order.len() - (self.order.len() * PARTNER_QUARTERS).div_ceil(4);
        self.time.copy_from_slice(&self.time_in);
        for &device in self.order[..slowest].iter().chain([&slow]) {
            self.time[slots.of(device)].fill(f64::INFINITY);
        }
        self.least_load = least_load(&self.time, &loads.load_in, &mut self.gain_per_copy);
        // What comes is a move, unless it had moved already or runs on the slow device.
        self.copies.copy_from_slice(&self.is_home);
        for &expert in running.expert_in[running.of(slow)].iter().filter(|e| **e != EMPTY) {
            for slot in slots.slots_with(expert) {
                self.copies[slot] -= 1.0;
            }
        }
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
        let State { slots, running, loads, .. } = state;
        let (device, expert) = (slots.device(slot), slots.expert_in[slot]);
        let (load, time, per_token) = (loads.load_in[slot], loads.times[device], loads.per_token[device]);
        // The lightest partner relieves this device most: no exchange that moves one copy gains more than this.
        let least_time = time - (load - self.least_load) * per_token;
        if power(time) - power(least_time) <= limit {
            return None;
        }
        // Where the slot's expert runs it is no move.
        let runs_on = (expert != EMPTY).then(|| running.devices(expert)).into_iter().flatten();
        let runs_in = runs_on.flat_map(|device| slots.of(usize::from(device)));
        for row in runs_in.clone() {
            self.copies[row] -= 1.0;
        }
        let (mut best, mut forbidden) = (None, vec![]);
        loop {
            let gain = price(self, loads, slot, [time, per_token]);
            if gain <= limit {
                break;
            }
            // Of equals the first one of the slowest device.
            let equals = (0..self.time.len()).filter(|&row| self.gain_per_copy[row] >= gain);
            let row =
                equals.reduce(|a, b| if self.time[b] > self.time[a] { b } else { a }).unwrap_or_default();
            if is_allowed(row) {
                best = Some((gain, row));
                break;
            }
            forbidden.push(row);
            self.time[row] = f64::INFINITY;
        }
        // The rules may allow these rows to the next slot.
        for row in forbidden {
            self.time[row] = self.time_in[row];
        }
        for row in runs_in {
            self.copies[row] += 1.0;
        }
        best
    }
}

/// Returns the least load of slots whose time is finite; `negative` is scratch memory.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn least_load(time: &[f64], load: &[f64], negative: &mut [f64]) -> f64 {
    for ((&time, &load), negative) in time.iter().zip(load).zip(&mut *negative) {
        *negative = if time < f64::INFINITY { -load } else { f64::NEG_INFINITY };
    }
    -largest(negative, f64::NEG_INFINITY)
}

/// Prices all exchanges of a slot, on a device with a time and a time per token; returns the largest gain per moved copy.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn price(partners: &mut Partners, loads: &Loads, slot: usize, [time_here, per_token]: [f64; 2]) -> f64 {
    let Partners { power_in, per_token_in, is_home, time, copies, gain_per_copy, .. } = partners;
    let rows = gain_per_copy.len();
    let (time, power_there, per_token_there) = (&time[..rows], &power_in[..rows], &per_token_in[..rows]);
    let (load, copies) = (&loads.load_in[..rows], &copies[..rows]);
    let (load_here, power_here, copies_here) = (load[slot], power(time_here), is_home[slot]);
    for q in 0..rows {
        let moved = load_here - load[q];
        let (here, there) = (time_here - moved * per_token, time[q] + moved * per_token_there[q]);
        let gain = (power_here - power(here)) + (power_there[q] - power(there));
        gain_per_copy[q] = gain * factor_per_copy(copies[q] + copies_here);
    }
    largest(gain_per_copy, 0.0)
}
