//! Loads of devices in windows, and what copies serve of them.

use super::windows::{add, deviation};
use crate::layer::{Layer, Slots, Split};

/// Tokens of devices and of copies, and variances of their own.
#[derive(Debug, Clone)]
pub(super) struct Loads {
    /// Windows, in full vectors.
    pub(super) width: usize,
    /// Tokens of devices, whole numbers `[D, width]`, and their own variances `[D]`.
    pub(super) load: Vec<f32>,
    pub(super) own: Vec<i64>,
    /// What a copy serves of its expert where all serve alike: a row each `[E + 1, width]`, and own variances `[E]`.
    served: Vec<f32>,
    own_served: Vec<i64>,
    /// Time of a device per token `[D]`.
    pub(super) time: Vec<f32>,
}

impl Loads {
    /// Counts the loads of slots; `copies` says of how many each expert's copies are, or will be.
    pub(super) fn new(layer: &Layer, slots: &Slots, copies: &[u32]) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let mut loads = Self {
            width,
            load: vec![0.0; d * width],
            own: vec![0; d],
            served: vec![0.0; (layer.experts + 1) * width],
            own_served: vec![0; layer.experts + 1],
            time: layer.site.time.iter().map(|&time| time as f32).collect(),
        };
        for (e, &copies) in (0..).zip(copies) {
            loads.serve(layer, e, copies);
            let devices: Vec<u16> = slots.devices(e).collect();
            for &device in &devices {
                let nearest = layer.site.split == Split::Nearest;
                let share =
                    if nearest { layer.site.share(&devices, device) } else { 1.0 / f64::from(copies) };
                loads.own[usize::from(device)] += layer.windows.own(e, share);
                let load = &mut loads.load[usize::from(device) * width..][..width];
                add(load, layer.windows.of(e), share as f32, 1.0);
            }
        }
        loads
    }

    /// Notes how many copies share an expert's tokens.
    pub(super) fn serve(&mut self, layer: &Layer, expert: u16, copies: u32) {
        let (e, part) = (usize::from(expert), 1.0 / f64::from(copies.max(1)));
        let row = &mut self.served[e * self.width..][..self.width];
        row.fill(0.0);
        add(row, layer.windows.of(expert), part as f32, 1.0);
        self.own_served[e] = layer.windows.own(expert, part);
    }

    /// Adds a copy of an expert to a device.
    pub(super) fn enter(&mut self, device: usize, expert: usize) {
        self.own[device] += self.own_served[expert];
        let load = &mut self.load[device * self.width..][..self.width];
        add(load, &self.served[expert * self.width..][..self.width], 1.0, 1.0);
    }

    /// A device's tokens, and a row of them that copies serve.
    #[inline(always)]
    pub(super) fn rows(&self, device: usize, row: usize) -> (&[f32], &[f32]) {
        (&self.load[device * self.width..][..self.width], &self.served[row * self.width..][..self.width])
    }

    /// The row of an empty slot.
    pub(super) fn nobody(&self) -> usize {
        self.own_served.len() - 1
    }

    /// A device's own variance if it had one copy more and one less.
    #[inline(always)]
    pub(super) fn own(&self, device: usize, more: usize, less: usize) -> i64 {
        self.own[device] + self.own_served[more] - self.own_served[less]
    }

    /// A device's time per token, and the standard deviation of its time with an own variance.
    #[inline(always)]
    pub(super) fn unit(&self, device: usize, own: i64) -> (f32, f32) {
        (self.time[device], deviation(own) * self.time[device])
    }
}

/// An exchange: devices, and the rows of what they give.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) devices: [usize; 2],
    pub(super) rows: [usize; 2],
}
