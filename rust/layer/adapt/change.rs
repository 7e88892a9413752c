//! Estimates how loads have changed since they shaped the running slots, and how much of the difference is chance.

use super::super::budget::Spending;
use super::super::{Site, Slots};

/// Largest variance that is expected for the next window.
const LARGEST_VARIANCE: f64 = 0.25;
/// Standard deviations by which a difference must exceed what chance explains; below that, loads count as unchanged.
const CONFIDENCE: f64 = 2.0;
/// Part of the differences that lasts where no loads have shaped what runs, so that it cannot be estimated.
const LASTING_IF_UNKNOWN: f64 = 0.5;
/// Part of a device's slots that get another expert when its layer changes.
const REPLACED: f64 = 0.25;

/// An estimate of how loads have changed since they shaped the running slots.
///
/// The running slots were balanced on the loads that they were chosen for. Devices differ now for two reasons. Each load has
/// changed since, by a part of itself: then the variance of a device's time is that part's variance times the sum of the
/// squares of the loads in its slots. And few tokens are counted, so counts differ by chance.
#[derive(Debug, Clone, Copy)]
pub(in crate::layer) struct LoadChange {
    /// Variance of an expert's load from window to window, as a part of the load's square.
    pub(in crate::layer) variance: f64,
    /// Part of the differences between devices that is no chance and lasts: about n / (n + m) with n tokens, where chance
    /// explains half of the differences with m tokens.
    pub(in crate::layer) lasting_part: f64,
}

impl LoadChange {
    /// Estimates the change from the imbalance of devices in all layers, given the loads of their experts `[E]`, their sites, and
    /// their running slots.
    ///
    /// `deviations` is the standard deviation of a count, over that of a count of independent tokens; 0 if counts are exact.
    pub(in crate::layer) fn estimate_from_imbalance<'a>(
        layers: impl Iterator<Item = ((&'a [f64], &'a Site), &'a Slots)>,
        deviations: f64,
    ) -> Self {
        // Sums over devices and slots of squares, in units of a layer's mean time.
        let (mut differences, mut squared_loads, mut chance, mut freedom) = (0.0, 0.0, 0.0, 0.0);
        for ((load, site), slots) in layers {
            let (times, loads) = slots.times_and_loads(site, load);
            let devices = times.len() as f64;
            let mean = times.iter().sum::<f64>() / devices;
            if mean > 0.0 {
                let time = |slot: usize| site.time[slots.device(slot)] / mean;
                squared_loads += (0..loads.len()).map(|slot| (loads[slot] * time(slot)).powi(2)).sum::<f64>();
                differences += times.iter().map(|time| (time / mean - 1.0).powi(2)).sum::<f64>();
                // The variance of a count is its mean. Copies divide the tokens of their expert, and so their variance.
                let copies = |slot: usize| f64::from(slots.copies(slots.expert_in[slot]).max(1));
                let count_variance = |slot: usize| loads[slot] / copies(slot) * time(slot).powi(2);
                chance += (0..loads.len()).map(count_variance).sum::<f64>() * (devices - 1.0) / devices;
                freedom += devices - 1.0;
            }
        }
        let chance = chance * deviations * deviations;
        let variance = (differences - chance).max(0.0) / squared_loads;
        let lasting_part = match (deviations > 0.0, freedom > 0.0) {
            (false, _) => 1.0,
            (_, false) => LASTING_IF_UNKNOWN,
            _ if differences > 0.0 => {
                (1.0 - chance * (1.0 + CONFIDENCE * (2.0 / freedom).sqrt()) / differences).max(0.0)
            }
            _ => 0.0,
        };
        Self {
            variance: if squared_loads > 0.0 { variance.min(LARGEST_VARIANCE) } else { 0.0 },
            lasting_part,
        }
    }

    /// Returns the spending with the gain that a layer must have: the more of the differences may be chance, the more.
    ///
    /// A device differs from the mean by x. If nothing moves, p x of that is expected to last, where p is the lasting part,
    /// with a variance of p c, where c is the variance of counts. Experts that replace the part f of its slots bring a
    /// variance of f (1 - p) c. So the slowest device is expected to gain where p x is more than sqrt(f (1 - p) c), times the
    /// standard deviations by which the slowest of many devices is above their mean.
    pub(super) fn require_gain_beyond_chance(self, spending: Spending) -> Spending {
        let factor = if self.lasting_part < 1.0 {
            ((1.0 - self.lasting_part) * REPLACED).sqrt() / self.lasting_part
        } else {
            0.0
        };
        Spending { deviations: factor * spending.deviations, ..spending }
    }

    /// Returns the load that a layer is expected to have next: of a device's difference from the mean, the lasting part stays.
    pub(super) fn expected_load(self, load: &[f64], site: &Site, running: &Slots) -> Vec<f64> {
        let (times, _) = running.times_and_loads(site, load);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let factor = |device: u16| {
            let time = times[usize::from(device)];
            if time > 0.0 { self.lasting_part + (1.0 - self.lasting_part) * mean / time } else { 1.0 }
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
