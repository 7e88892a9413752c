//! The pairs term: how many co-activated pairs are not on one device.
//!
//! What stands for visits where expert sets are not known. With copies, a pair is together as often as the shares of
//! its copies on one device say, copies being chosen independently. Every device knows each expert's *affinity*, the
//! pairs that it has with what is there; so a move is judged by a few numbers, and followed by adding rows.

use crate::layer::{Layer, Move, Placement};

/// Co-activated pairs of a layer and what one costs that is apart.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// Symmetric `[E, E]`, zero on the diagonal.
    pub counts: Vec<f32>,
    /// Of a pair that is not on one device.
    pub cost: f64,
}

impl Pairs {
    fn row(&self, expert: u16) -> &[f32] {
        let n = self.counts.len().isqrt();
        &self.counts[usize::from(expert) * n..][..n]
    }
}

/// A device's share of an expert's tokens changes.
struct Change {
    device: u16,
    expert: u16,
    by: f64,
}

/// Pairs of every expert with what is on a device.
#[derive(Debug, Clone)]
pub(crate) struct Together {
    /// `[D, E]`.
    affinity: Vec<f64>,
    /// Pairs that are not on one device.
    apart: f64,
}

impl Together {
    pub(crate) fn new(layer: &Layer, pairs: &Pairs, placement: &Placement) -> Self {
        let apart = pairs.counts.iter().map(|&count| f64::from(count)).sum::<f64>() / 2.0;
        let mut together = Self { affinity: vec![0.0; layer.devices() * layer.experts], apart };
        for expert in 0..layer.experts as u16 {
            let devices = placement.devices(expert);
            let each = |&device: &u16| Change { device, expert, by: share(layer, devices, device) };
            together.follow(pairs, &devices.iter().map(each).collect::<Vec<_>>());
        }
        together
    }

    pub(crate) fn cost(&self, pairs: &Pairs) -> f64 {
        self.apart * pairs.cost
    }

    /// What a move would add to the cost.
    pub(crate) fn change(&self, layer: &Layer, pairs: &Pairs, placement: &Placement, step: Move) -> f64 {
        -self.joined(pairs, &changes(layer, placement, step)) * pairs.cost
    }

    /// Follows a move that is to be made of `before`.
    pub(crate) fn apply(&mut self, layer: &Layer, pairs: &Pairs, before: &Placement, step: Move) {
        self.follow(pairs, &changes(layer, before, step));
    }

    fn follow(&mut self, pairs: &Pairs, changes: &[Change]) {
        self.apart -= self.joined(pairs, changes);
        for &Change { device, expert, by } in changes {
            let row = pairs.row(expert);
            let affinity = &mut self.affinity[usize::from(device) * row.len()..][..row.len()];
            for (affinity, &count) in affinity.iter_mut().zip(row) {
                *affinity += by * f64::from(count);
            }
        }
    }

    /// Pairs that changes of shares bring together: each with what is there, and with each other.
    fn joined(&self, pairs: &Pairs, changes: &[Change]) -> f64 {
        let mut joined = 0.0;
        for (n, change) in changes.iter().enumerate() {
            let row = pairs.row(change.expert);
            let mut met = self.affinity[usize::from(change.device) * row.len() + usize::from(change.expert)];
            for other in changes[..n].iter().filter(|other| other.device == change.device) {
                met += other.by * f64::from(row[usize::from(other.expert)]);
            }
            joined += change.by * met;
        }
        joined
    }
}

fn share(layer: &Layer, devices: &[u16], device: u16) -> f64 {
    // In double precision where it can be: the parts of an even split then add up to one.
    match layer.split {
        crate::layer::Split::Even => 1.0 / devices.len() as f64,
        crate::layer::Split::Nearest => f64::from(layer.share(devices, device)),
    }
}

fn changes(layer: &Layer, placement: &Placement, step: Move) -> Vec<Change> {
    let mut changes = Vec::with_capacity(4);
    for edit in placement.edits(step) {
        let expert = edit.expert;
        let before = placement.devices(expert);
        if let ([_], Some(from), Some(to)) = (before, edit.from, edit.to) {
            changes.push(Change { device: from, expert, by: -1.0 });
            changes.push(Change { device: to, expert, by: 1.0 });
            continue;
        }
        let after: Vec<u16> = edit.after(before).collect();
        let of = |devices: &[u16], device: u16, sign: f64| Change {
            device,
            expert,
            by: sign * share(layer, devices, device),
        };
        changes.extend(before.iter().map(|&device| of(before, device, -1.0)));
        changes.extend(after.iter().map(|&device| of(&after, device, 1.0)));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Split;
    use crate::layer::terms::windows::Windows;
    use crate::random::Random;
    use proptest::prelude::*;

    /// Pairs that are apart, by a plain loop.
    fn plain(layer: &Layer, pairs: &Pairs, placement: &Placement) -> f64 {
        let mut apart = 0.0;
        for e in 0..layer.experts as u16 {
            for f in 0..e {
                let [mine, theirs] = [e, f].map(|expert| placement.devices(expert));
                let both = mine.iter().filter(|device| theirs.contains(device));
                let met: f64 =
                    both.map(|&device| share(layer, mine, device) * share(layer, theirs, device)).sum();
                apart += f64::from(pairs.row(e)[usize::from(f)]) * (1.0 - met);
            }
        }
        apart * pairs.cost
    }

    proptest! {
        /// Pairs apart are what a plain loop finds, whatever moves led there and were said to add.
        #[test]
        fn pairs_are_counted(
            experts in 2usize..9,
            devices in 2usize..5,
            spare in 0usize..5,
            nearest in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut random = Random::new(seed, 0);
            let mut room = vec![experts.div_ceil(devices); devices];
            room[0] += spare;
            let windows = Windows::new(&vec![0.0; experts], &[1.0], experts, 0, None, 0.0);
            let node = (0..devices as u16).map(|device| device / 2).collect();
            let split = if nearest { Split::Nearest } else { Split::Even };
            let layer = Layer { node, split, ..Layer::plain(room, experts, windows) };
            let mut counts = vec![0.0; experts * experts];
            for e in 0..experts {
                for f in 0..e {
                    counts[e * experts + f] = random.below(1000) as f32;
                    counts[f * experts + e] = counts[e * experts + f];
                }
            }
            let pairs = Pairs { counts, cost: 3.0 };
            let slots = layer.slots();
            let mut expert_in: Vec<u16> = (0..experts as u16).collect();
            expert_in.resize(slots, crate::layer::EMPTY);
            random.shuffle(&mut expert_in);
            let mut placement = Placement::new(&layer, expert_in);
            let mut together = Together::new(&layer, &pairs, &placement);
            for _ in 0..40 {
                let step = if random.below(2) == 0 {
                    Move::Put(random.below(slots), random.below(experts) as u16)
                } else {
                    Move::Swap(random.below(slots), random.below(slots))
                };
                if !placement.allows(&layer, step) {
                    continue;
                }
                let said = together.cost(&pairs) + together.change(&layer, &pairs, &placement, step);
                together.apply(&layer, &pairs, &placement, step);
                placement.apply(&layer, step);
                let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1e3);
                prop_assert!(close(said, together.cost(&pairs)));
                let counted = plain(&layer, &pairs, &placement);
                prop_assert!(close(said, counted), "{} {}", said, counted);
            }
        }
    }
}
