//! How loads have changed since they shaped what runs, and how much of that is chance.

use super::super::budget::Spending;
use super::super::{Site, Slots};

/// Largest variance that is expected of the next window.
const LARGEST_VARIANCE: f64 = 0.25;
/// Standard deviations of what counts differ by chance, within which loads are taken for what they were.
const SURE: f64 = 2.0;
/// Part of the differences that is no chance where no loads have shaped what runs: nothing tells.
const UNKNOWN: f64 = 0.5;
/// Part of a device's slots in which something else comes when its layer changes.
const REPLACED: f64 = 0.25;

/// How loads have changed since they shaped what runs.
///
/// What runs was even on the loads that it was chosen by. If each load has changed by a part of its own since, with a
/// variance, the time of a device has by the sum of the squares of what is in its slots; and besides it differs by
/// chance, as few tokens are counted.
#[derive(Debug, Clone, Copy)]
pub(in crate::layer) struct Change {
    /// Variance of an expert's load from window to window, as a part of its square.
    pub(in crate::layer) variance: f64,
    /// Part of the differences of devices that is no chance: about n / (n + m) of n tokens, where chance is half of the
    /// differences of m.
    pub(in crate::layer) real_part: f64,
}

impl Change {
    /// Estimates the change from all layers; counts scatter by so many standard deviations of their own.
    pub(in crate::layer) fn estimate<'a>(
        layers: impl Iterator<Item = ((&'a [f64], &'a Site), &'a Slots)>,
        deviations: f64,
    ) -> Self {
        let (mut seen, mut squares, mut chance, mut freedom) = (0.0, 0.0, 0.0, 0.0);
        for ((load, site), slots) in layers {
            let (times, loads) = slots.times_and_loads(site, load);
            let devices = times.len() as f64;
            let mean = times.iter().sum::<f64>() / devices;
            if mean > 0.0 {
                let time = |slot: usize| site.time[slots.device(slot)] / mean;
                squares += (0..loads.len()).map(|slot| (loads[slot] * time(slot)).powi(2)).sum::<f64>();
                seen += times.iter().map(|time| (time / mean - 1.0).powi(2)).sum::<f64>();
                // Copies divide the counts of their expert, chance among them.
                let copies = |slot: usize| f64::from(slots.copies(slots.expert_in[slot]).max(1));
                let counted = |slot: usize| loads[slot] / copies(slot) * time(slot).powi(2);
                chance += (0..loads.len()).map(counted).sum::<f64>() * (devices - 1.0) / devices;
                freedom += devices - 1.0;
            }
        }
        let chance = chance * deviations * deviations;
        let variance = (seen - chance).max(0.0) / squares;
        let real_part = match (deviations > 0.0, freedom > 0.0) {
            (false, _) => 1.0,
            (_, false) => UNKNOWN,
            _ if seen > 0.0 => (1.0 - chance * (1.0 + SURE * (2.0 / freedom).sqrt()) / seen).max(0.0),
            _ => 0.0,
        };
        Self { variance: if squares > 0.0 { variance.min(LARGEST_VARIANCE) } else { 0.0 }, real_part }
    }

    /// The gain that layers must have, the more of it the more may be chance.
    ///
    /// Of a device that differs by x, the part p x is expected to stay if nothing moves, with a variance of p c, where c is
    /// that of counts. What comes in place of the part f of its slots brings f (1 - p) c with it. So the slowest is
    /// expected to gain where p x is more than sqrt(f (1 - p) c) times as many standard deviations as it has of many.
    pub(super) fn raise_threshold(self, spending: Spending) -> Spending {
        let factor = if self.real_part < 1.0 {
            ((1.0 - self.real_part) * REPLACED).sqrt() / self.real_part
        } else {
            0.0
        };
        Spending { deviations: factor * spending.deviations, ..spending }
    }

    /// The load that a layer is expected to have next, where what runs was chosen so that devices are even: what a device
    /// has more than others stays as far as it is no chance.
    pub(super) fn expected_load(self, load: &[f64], site: &Site, running: &Slots) -> Vec<f64> {
        let (times, _) = running.times_and_loads(site, load);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let factor = |device: u16| {
            let time = times[usize::from(device)];
            if time > 0.0 { self.real_part + (1.0 - self.real_part) * mean / time } else { 1.0 }
        };
        let expected = |(&load, e): (&f64, u16)| {
            let (sum, count) = running
                .devices(e)
                .map(factor)
                .fold((0.0, 0.0), |(sum, count), factor| (sum + factor, count + 1.0));
            if count > 0.0 { load * sum / count } else { load }
        };
        load.iter().zip(0..).map(expected).collect()
    }
}
