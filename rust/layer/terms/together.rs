//! The pairs term: how many co-activated pairs are not on one device.
//!
//! What stands for visits where expert sets are not known. With copies, a pair is together as often as the shares of
//! its copies on one device say, copies being chosen independently. Every device knows each expert's *affinity*, the
//! pairs that it has with what is there; so a move is judged by a few numbers, and followed by adding rows.

use crate::layer::slots::Share;
use crate::layer::{Layer, Slots};

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

/// Pairs of every expert with what is on a device.
#[derive(Debug, Clone)]
pub(crate) struct Together {
    /// `[D, E]`.
    affinity: Vec<f64>,
    /// Pairs that are not on one device.
    apart: f64,
}

impl Together {
    pub(crate) fn new(layer: &Layer, pairs: &Pairs, slots: &Slots) -> Self {
        let apart = pairs.counts.iter().map(|&count| f64::from(count)).sum::<f64>() / 2.0;
        let mut together = Self { affinity: vec![0.0; layer.devices() * layer.experts], apart };
        for expert in 0..layer.experts as u16 {
            let devices: Vec<u16> = slots.devices(expert).collect();
            let come = |&device: &u16| Share {
                expert,
                device,
                before: 0.0,
                after: layer.site.share(&devices, device),
            };
            together.apply(pairs, &devices.iter().map(come).collect::<Vec<_>>());
        }
        together
    }

    pub(crate) fn cost(&self, pairs: &Pairs) -> f64 {
        self.apart * pairs.cost
    }

    /// What changes of shares would add to the cost.
    pub(crate) fn change(&self, pairs: &Pairs, shares: &[Share]) -> f64 {
        -self.joined(pairs, shares) * pairs.cost
    }

    /// Follows changes of shares.
    pub(crate) fn apply(&mut self, pairs: &Pairs, shares: &[Share]) {
        self.apart -= self.joined(pairs, shares);
        for share in shares {
            let row = pairs.row(share.expert);
            let affinity = &mut self.affinity[usize::from(share.device) * row.len()..][..row.len()];
            for (affinity, &count) in affinity.iter_mut().zip(row) {
                *affinity += (share.after - share.before) * f64::from(count);
            }
        }
    }

    /// Pairs that changes of shares bring together: each with what is there, and with each other.
    fn joined(&self, pairs: &Pairs, shares: &[Share]) -> f64 {
        let mut joined = 0.0;
        for (n, share) in shares.iter().enumerate() {
            let row = pairs.row(share.expert);
            let mut met = self.affinity[usize::from(share.device) * row.len() + usize::from(share.expert)];
            for other in shares[..n].iter().filter(|other| other.device == share.device) {
                met += (other.after - other.before) * f64::from(row[usize::from(other.expert)]);
            }
            joined += (share.after - share.before) * met;
        }
        joined
    }
}
