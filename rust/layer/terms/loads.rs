//! Loads of devices in windows, and the loads that copies serve.

use super::windows::{add, deviation};
use crate::layer::{Layer, Slots, Split};

/// Tokens of devices and of copies, and their own variances.
#[derive(Debug, Clone)]
pub(super) struct Loads {
    /// Windows, in full vectors.
    pub(super) width: usize,
    /// Tokens of devices, whole numbers `[D, width]`, and their own variances `[D]`.
    pub(super) load: Vec<f32>,
    pub(super) variance: Vec<i64>,
    /// Tokens of each copy of an expert under an even split, a row each `[E + 1, width]`, and its own variance `[E + 1]`.
    served: Vec<f32>,
    served_variance: Vec<i64>,
    /// Time of a device per token `[D]`.
    pub(super) time: Vec<f32>,
}

impl Loads {
    /// Counts the loads of slots; `copies` is how many copies each expert has in the end.
    pub(super) fn new(layer: &Layer, slots: &Slots, copies: &[u32]) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let mut loads = Self {
            width,
            load: vec![0.0; d * width],
            variance: vec![0; d],
            served: vec![0.0; (layer.experts + 1) * width],
            served_variance: vec![0; layer.experts + 1],
            time: layer.site.time.iter().map(|&time| time as f32).collect(),
        };
        for (e, &copies) in (0..).zip(copies) {
            loads.set_copies(layer, e, copies);
            let devices: Vec<u16> = slots.devices(e).collect();
            for &device in &devices {
                let nearest = layer.site.split == Split::Nearest;
                let share =
                    if nearest { layer.site.share(&devices, device) } else { 1.0 / f64::from(copies) };
                loads.variance[usize::from(device)] += layer.windows.variance(e, share);
                let load = &mut loads.load[usize::from(device) * width..][..width];
                add(load, layer.windows.of(e), share as f32, 1.0);
            }
        }
        loads
    }

    /// Computes the tokens of a copy and their own variance, given how many copies share the expert's tokens.
    pub(super) fn set_copies(&mut self, layer: &Layer, expert: u16, copies: u32) {
        let (e, share) = (usize::from(expert), 1.0 / f64::from(copies.max(1)));
        let row = &mut self.served[e * self.width..][..self.width];
        row.fill(0.0);
        add(row, layer.windows.of(expert), share as f32, 1.0);
        self.served_variance[e] = layer.windows.variance(expert, share);
    }

    /// Adds a copy of an expert to a device.
    pub(super) fn add_copy(&mut self, device: usize, expert: usize) {
        self.variance[device] += self.served_variance[expert];
        let load = &mut self.load[device * self.width..][..self.width];
        add(load, &self.served[expert * self.width..][..self.width], 1.0, 1.0);
    }

    /// Returns the tokens of a device, and those of a copy of the expert in `row`.
    #[inline(always)]
    pub(super) fn rows(&self, device: usize, row: usize) -> (&[f32], &[f32]) {
        (&self.load[device * self.width..][..self.width], &self.served[row * self.width..][..self.width])
    }

    /// Returns the row of an empty slot.
    pub(super) fn empty_row(&self) -> usize {
        self.served_variance.len() - 1
    }

    /// Returns a device's own variance after it gets a copy of one expert and loses a copy of another.
    #[inline(always)]
    pub(super) fn variance_after(&self, device: usize, added: usize, removed: usize) -> i64 {
        self.variance[device] + self.served_variance[added] - self.served_variance[removed]
    }

    /// Returns a device's time per token, and the standard deviation of its time, given its own variance.
    #[inline(always)]
    pub(super) fn unit(&self, device: usize, variance: i64) -> (f32, f32) {
        (self.time[device], deviation(variance) * self.time[device])
    }
}
