//! The term of split `lp`: the time of the slowest device, summed over windows, if a dispatcher divides every window's
//! tokens over copies so that this time is least (`crate::division`).
//!
//! So the cost depends on which devices share copies, not only on the number of copies of each expert.

use super::{Candidate, Term, Visits};
use crate::division::{Copies, Division, Notes};
use crate::layer::{EMPTY, Layer, Move, Slots};

/// Weighted loads of experts in windows `[W, E]`, whose tokens a dispatcher divides.
#[derive(Debug, Clone)]
pub struct Loads(pub Vec<f64>);

/// The term: the tokens of all windows, divided over the slots as they stand.
#[derive(Debug, Clone)]
pub(crate) struct LpSplit {
    copies: Copies,
    windows: Vec<Division>,
    notes: Notes,
    cost: f64,
}

/// Returns the expert in a slot as `crate::division` has it.
fn expert_of(expert: u16) -> Option<u32> {
    (expert != EMPTY).then(|| u32::from(expert))
}

/// Returns the copies in slots as `crate::division` has them; `time` is that of a token on every device `[D]`.
pub(super) fn copies_of(slots: &Slots, time: &[f64]) -> Copies {
    let rate = time.iter().map(|time| 1.0 / time).collect();
    let capacity = (0..time.len()).map(|device| slots.of(device).len());
    let mut copies = Copies::empty(capacity, slots.copies.len(), rate);
    for (slot, &expert) in slots.expert_in.iter().enumerate() {
        copies.put(slot, expert_of(expert));
    }
    copies
}

impl LpSplit {
    /// Builds the term for slots.
    pub(crate) fn new(layer: &Layer, loads: &Loads, slots: &Slots) -> Self {
        let copies = copies_of(slots, &layer.site.time);
        let mut notes = Notes::default();
        let rows = loads.0.chunks_exact(layer.experts);
        let windows: Vec<Division> = rows.map(|load| Division::new(&copies, load, &mut notes)).collect();
        let cost = windows.iter().map(Division::time).sum();
        Self { copies, windows, notes, cost }
    }

    /// Writes what a move puts into slots, and returns what they held before.
    fn put(&mut self, slots: &Slots, step: Move) -> Vec<(usize, Option<u32>)> {
        let after = match step {
            Move::Swap(p, q) => vec![(p, slots.expert_in[q]), (q, slots.expert_in[p])],
            Move::Put(p, expert) => vec![(p, expert)],
        };
        let before = after.iter().map(|&(slot, _)| (slot, self.copies.expert(slot))).collect();
        for (slot, expert) in after {
            self.copies.put(slot, expert_of(expert));
        }
        before
    }
}

impl Term for LpSplit {
    fn cost(&self) -> f64 {
        self.cost
    }

    fn slowest(&self) -> f64 {
        self.cost
    }

    fn needs_shares(&self, _: bool) -> bool {
        false
    }

    fn change(&mut self, &Candidate { slots, step, .. }: &Candidate<'_>, _: &mut Visits) -> f64 {
        let before = self.put(slots, step);
        let mut change = 0.0;
        for window in &mut self.windows {
            change += window.update(&self.copies, &before, &mut self.notes) - window.time();
            window.restore(&self.copies, &mut self.notes);
        }
        for (slot, expert) in before {
            self.copies.put(slot, expert);
        }
        change
    }

    fn apply(&mut self, &Candidate { slots, step, .. }: &Candidate<'_>, _: &mut Visits) {
        let before = self.put(slots, step);
        self.cost = 0.0;
        for window in &mut self.windows {
            self.cost += window.update(&self.copies, &before, &mut self.notes);
            window.accept(&mut self.notes);
        }
    }
}

/// The least time of the slowest devices over all ways to divide tokens: the largest over all sets of devices of the load
/// that only the set can serve (Hall, 1935).
#[cfg(test)]
pub(in crate::layer) const DEFINITION: super::Definition = super::Definition {
    price: |random, layer, loads| {
        layer.costs.lp_split = (random.below(2) == 0).then(|| Loads(loads.to_vec()));
    },
    cost: |layer, slots| {
        let Some(Loads(loads)) = &layer.costs.lp_split else { return 0.0 };
        let longest = |load: &[f64]| -> f64 {
            let sets = 1u32..1 << layer.devices();
            let time = |set: u32| {
                let is_inside = |g: usize| set >> g & 1 == 1;
                let stays = |&e: &usize| slots.devices(e as u16).all(|g| is_inside(usize::from(g)));
                let inside: f64 = (0..layer.experts).filter(stays).map(|e| load[e]).sum();
                let rates = (0..layer.devices()).filter(|&g| is_inside(g)).map(|g| 1.0 / layer.site.time[g]);
                inside / rates.sum::<f64>()
            };
            sets.map(time).fold(0.0, f64::max)
        };
        loads.chunks(layer.experts).map(longest).sum()
    },
};
