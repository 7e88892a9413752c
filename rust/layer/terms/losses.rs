//! The term of lost devices: what the others get on top where the devices of a failure domain, a device or a node, are lost.
//!
//! An expert with `c` copies, `k` of them in a domain that is lost, brings each of the others
//! `load (1 / (c - k) - 1 / c)` more, if copies share tokens evenly. The more partners share what a domain leaves, the less
//! the busiest of them gets: so what a domain leaves to a device counts by a power, in parts of a device's mean load.
//! Experts that are lost as a whole leave nothing to anybody; that they are not is a rule (`super::super::rules`).

use crate::layer::slots::Edit;
use crate::layer::{Layer, Move, Slots};

/// Power by which it counts what a domain leaves to a device: the busiest one matters.
pub const POWER: i32 = 3;

/// What it costs that devices may be lost.
#[derive(Debug, Clone)]
pub struct Losses {
    /// Failure domain of every device `[D]`.
    pub domain: Vec<u16>,
    /// Of a mean device's load that one domain leaves to one device.
    pub cost: f64,
}

/// What counts of what a domain leaves to a device.
fn power(left: f64) -> f64 {
    left.powi(POWER)
}

/// By how much more that counts if it grows.
fn grown(left: f64, more: f64) -> f64 {
    power(left + more) - power(left)
}

/// What every domain leaves to every device, for the slots as they stand.
#[derive(Debug, Clone)]
pub(crate) struct LeftOver {
    /// In mean loads of a device `[F, D]`.
    left: Vec<f64>,
    /// Load of every expert, in mean loads of a device `[E]`.
    load: Vec<f64>,
    /// Sum of powers.
    powers: f64,
    /// What the move changes that is looked at: where, and by how much.
    changed: Vec<(usize, f64)>,
    before: Vec<u16>,
    after: Vec<u16>,
}

impl LeftOver {
    pub(crate) fn new(layer: &Layer, losses: &Losses, slots: &Slots) -> Self {
        let domains = losses.domain.iter().max().map_or(0, |&last| usize::from(last) + 1);
        let left = vec![0.0; domains * layer.devices()];
        let mean = layer.load.iter().sum::<f64>() / layer.devices() as f64;
        let load = layer.load.iter().map(|load| load / mean.max(f64::MIN_POSITIVE)).collect();
        let (changed, before, after) = (vec![], vec![], vec![]);
        let mut fresh = Self { left, load, powers: 0.0, changed, before, after };
        for expert in 0..layer.experts as u16 {
            let devices: Vec<u16> = slots.devices(expert).collect();
            fresh.leave(layer, losses, expert, &devices, 1.0);
            fresh.settle();
        }
        fresh
    }

    pub(crate) fn cost(&self, losses: &Losses) -> f64 {
        self.powers * losses.cost
    }

    /// What a move would add to the cost.
    pub(crate) fn change(&mut self, layer: &Layer, losses: &Losses, slots: &Slots, step: Move) -> f64 {
        self.look(layer, losses, slots, step);
        self.changed.iter().map(|&(at, more)| grown(self.left[at], more)).sum::<f64>() * losses.cost
    }

    /// Follows a move that is not made yet.
    pub(crate) fn apply(&mut self, layer: &Layer, losses: &Losses, slots: &Slots, step: Move) {
        self.look(layer, losses, slots, step);
        self.settle();
    }

    /// Notes what a move changes.
    fn look(&mut self, layer: &Layer, losses: &Losses, slots: &Slots, step: Move) {
        self.changed.clear();
        for Edit { expert, from, to } in slots.edits(step) {
            let (mut before, mut after) = (std::mem::take(&mut self.before), std::mem::take(&mut self.after));
            before.clear();
            before.extend(slots.devices(expert));
            after.clear();
            after.extend(before.iter().copied().filter(|&device| Some(device) != from).chain(to));
            self.leave(layer, losses, expert, &before, -1.0);
            self.leave(layer, losses, expert, &after, 1.0);
            (self.before, self.after) = (before, after);
        }
        self.changed.retain(|&(_, more)| more != 0.0);
    }

    /// Adds what the domains of an expert's copies leave to its other copies, times a sign, to what changes.
    fn leave(&mut self, layer: &Layer, losses: &Losses, expert: u16, devices: &[u16], sign: f64) {
        let domain = |device: u16| losses.domain[usize::from(device)];
        let load = self.load[usize::from(expert)];
        let copies = devices.len();
        for (n, &lost) in devices.iter().enumerate() {
            let is_first = devices[..n].iter().all(|&other| domain(other) != domain(lost));
            let gone = devices.iter().filter(|&&other| domain(other) == domain(lost)).count();
            if !is_first || gone == copies {
                continue;
            }
            let more = sign * load * (1.0 / (copies - gone) as f64 - 1.0 / copies as f64);
            for &device in devices.iter().filter(|&&device| domain(device) != domain(lost)) {
                let at = usize::from(domain(lost)) * layer.devices() + usize::from(device);
                match self.changed.iter_mut().find(|(place, _)| *place == at) {
                    Some((_, sum)) => *sum += more,
                    None => self.changed.push((at, more)),
                }
            }
        }
    }

    /// Takes over what changes.
    fn settle(&mut self) {
        for &(at, more) in &self.changed {
            self.powers += grown(self.left[at], more);
            self.left[at] += more;
        }
        self.changed.clear();
    }
}
