//! How many of a token's experts are on each device, as bits.
//!
//! The counts of all devices lie side by side in a few words, so one addition per expert counts a token. The bits of
//! 64 tokens, transposed, are rows like those of ids: load, traffic and visits are numbers of ones.

use super::{Copies, Layer};
use crate::pairs::{MOST_UNITS, Side};
use crate::trace::{ExpertId, Routing};

/// Rows at the most: for more, counting pairs of slots is as fast or faster (measured: bench/RESULTS.md, Replay).
const ROWS: usize = 256;

/// Where the counts are.
#[derive(Debug)]
pub(super) struct Planes {
    devices: usize,
    /// Bits of a count.
    bits: usize,
    /// Devices whose counts share a word.
    per_word: usize,
    /// For every layer what an expert (or, where experts have copies, a slot) adds to each word `[words, ids]`.
    units: Vec<Vec<u64>>,
}

impl Planes {
    /// None where there would be too many rows or ids.
    pub(super) fn new(copies: &Copies, routing: Routing) -> Option<Self> {
        let most = routing.top_k.min(copies.slots / copies.devices);
        let bits = (usize::BITS - most.leading_zeros()) as usize;
        let mut planes = Self { devices: copies.devices, bits, per_word: 64 / bits, units: Vec::new() };
        if planes.columns() > ROWS || routing.experts.max(copies.slots) > MOST_UNITS {
            return None;
        }
        let device_of_slot: Vec<usize> = copies.device_of_slot.iter().map(|&device| device.into()).collect();
        planes.units = (copies.slots_of.iter().enumerate())
            .map(|(l, slots)| {
                if copies.is_single(l) {
                    let of_expert = slots.iter().map(|&slot| device_of_slot[usize::from(slot)]);
                    planes.units_of(&of_expert.collect::<Vec<_>>())
                } else {
                    planes.units_of(&device_of_slot)
                }
            })
            .collect();
        Some(planes)
    }

    /// The lowest bit of a device's count, 64 to a word.
    fn column(&self, device: usize) -> usize {
        device / self.per_word * 64 + device % self.per_word * self.bits
    }

    pub(super) fn columns(&self) -> usize {
        self.column(self.devices - 1) + self.bits
    }

    /// The device of every column, and how much its bit is worth; bits that no count uses are worth nothing.
    pub(super) fn weights(&self) -> Vec<(usize, u64)> {
        let mut weights = vec![(0, 0); self.columns()];
        for device in 0..self.devices {
            for bit in 0..self.bits {
                weights[self.column(device) + bit] = (device, 1 << bit);
            }
        }
        weights
    }

    /// Takes the device of every id; gives `[words, ids]`.
    fn units_of(&self, device_of: &[usize]) -> Vec<u64> {
        let mut units = vec![0; self.columns().div_ceil(64) * device_of.len()];
        for (id, &device) in device_of.iter().enumerate() {
            let column = self.column(device);
            units[column / 64 * device_of.len() + id] = 1 << (column % 64);
        }
        units
    }

    /// The counts of the ids of a layer; the block begins with token `first` of the trace.
    pub(super) fn side<I: ExpertId>(
        &self,
        copies: &Copies,
        l: usize,
        ids: &[I],
        top_k: usize,
        first: u64,
    ) -> Side<u16> {
        let (columns, units) = (self.columns(), &self.units[l]);
        if copies.is_single(l) {
            return Side::of_sums(ids, top_k, columns, units);
        }
        Side::of_sums(&copies.route(l, ids, top_k, first), top_k, columns, units)
    }

    /// Counts the distinct devices and nodes that every token of a block visits.
    pub(super) fn fan_out(&self, side: &Side<u16>, copies: &Copies, layer: &mut Layer) {
        let counts: Vec<usize> = (0..self.devices).map(|device| self.column(device)).collect();
        fan_out(side.words(), &counts, self.bits, &copies.node_of_device, layer);
    }
}

/// `counts` is the lowest column of every device's count, `rows` the columns of 64 tokens at a time.
#[multiversion::multiversion(targets("x86_64+avx2+bmi2+popcnt"))]
fn fan_out<'a>(
    rows: impl Iterator<Item = &'a [u64]>,
    counts: &[usize],
    bits: usize,
    node_of_device: &[u16],
    layer: &mut Layer,
) {
    let mut nodes = vec![0u64; counts.len()];
    for rows in rows {
        nodes.fill(0);
        for ((&column, visits), &node) in counts.iter().zip(&mut layer.visits).zip(node_of_device) {
            let visitors = rows[column..column + bits].iter().fold(0, |any, row| any | row);
            *visits += u64::from(visitors.count_ones());
            layer.fanout += u64::from(visitors.count_ones());
            nodes[usize::from(node)] |= visitors;
        }
        layer.node_fanout += nodes.iter().map(|visitors| u64::from(visitors.count_ones())).sum::<u64>();
    }
}
