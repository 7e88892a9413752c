//! The numbers of a token's experts on every device, as bits.
//!
//! The numbers of all devices lie side by side in a few words, so that one addition per expert counts a token. The bits of
//! 64 tokens, transposed, are rows like those of ids: load, traffic and visits are numbers of ones.

use super::Copies;
use crate::counting::pairs::{MOST_UNITS, NO_UNIT, Side, Units};
use crate::counting::windows::Number;
use crate::trace::{ExpertId, Routing};

/// Largest number of rows: with more rows, counting pairs of slots is as fast or faster (measured: docs/experiments.md,
/// Counting and replay).
const ROWS: usize = 256;

/// The places of the counts of devices in words.
#[derive(Debug)]
pub(super) struct Planes {
    devices: usize,
    /// Bits of a count.
    bits: usize,
    /// Devices whose counts share a word.
    per_word: usize,
    /// What every expert (or every slot, where experts have copies) adds to the counts `[L]`.
    units: Vec<Units>,
}

impl Planes {
    /// Builds the planes; returns None if there would be too many rows or ids.
    pub(super) fn new(copies: &Copies, routing: Routing) -> Option<Self> {
        let largest = routing.top_k.min(copies.slots / copies.devices);
        let bits = (usize::BITS - largest.leading_zeros()) as usize;
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

    /// Returns the lowest bit of a device's count; a word has 64 bits.
    fn bit(&self, device: usize) -> usize {
        device / self.per_word * 64 + device % self.per_word * self.bits
    }

    /// Returns the number of columns: first those of the lowest bits of all devices' counts, then those of the next bits.
    pub(super) fn columns(&self) -> usize {
        self.devices * self.bits
    }

    /// Returns the device of every column, and the value of its bit.
    pub(super) fn weights(&self) -> Vec<(usize, u64)> {
        (0..self.columns()).map(|column| (column % self.devices, 1 << (column / self.devices))).collect()
    }

    /// Returns the column of every bit; [`NO_UNIT`] for bits that are not used.
    fn columns_of_bits(&self) -> Vec<usize> {
        let mut columns = vec![NO_UNIT; self.bit(self.devices - 1) + self.bits];
        for column in 0..self.columns() {
            columns[self.bit(column % self.devices) + column / self.devices] = column;
        }
        columns
    }

    /// Returns what every id adds to the counts, from its device.
    fn units_of(&self, device_of: &[usize]) -> Units {
        let mut units = vec![0; self.devices.div_ceil(self.per_word) * device_of.len()];
        for (id, &device) in device_of.iter().enumerate() {
            let bit = self.bit(device);
            units[bit / 64 * device_of.len() + id] = 1 << (bit % 64);
        }
        Units::new(&units, self.columns_of_bits(), self.columns())
    }

    /// Fills `side` with the counts of the ids of a layer or, where experts have copies, of the slots that serve them.
    pub(super) fn fill<I: ExpertId>(&self, l: usize, ids: &[I], side: &mut Side<u16>) {
        side.fill_sums(ids, &self.units[l]);
    }

    /// Adds the tokens of `side` to their rows of a table `[rows, size]`: load of devices and, where rows have places for them,
    /// visits of devices and nodes. Adds pairs on one device with the layer `before` to `stays`.
    ///
    /// `rows` begins with the rows of these tokens and may go on.
    pub(super) fn count<T: Number>(
        &self,
        side: &Side<u16>,
        before: Option<&Side<u16>>,
        rows: &[u32],
        copies: &Copies,
        (table, size): (&mut [T], usize),
        stays: &mut [u64],
    ) {
        let mut sums = vec![0; self.columns() + self.devices + copies.nodes()];
        let mut from = 0;
        for run in rows[..side.tokens].chunk_by(|row, next| row == next) {
            let (row, tokens) = (run[0] as usize, from..from + run.len());
            sums.fill(0);
            let (ones, visits) = sums.split_at_mut(self.columns());
            count_visits(side.words(tokens.clone()), &copies.devices_of_node, ones, visits);
            let (load, places) = table[row * size..][..size].split_at_mut(self.devices);
            for (bit, ones) in ones.chunks_exact(self.devices).enumerate() {
                load.iter_mut().zip(ones).for_each(|(load, ones)| load.add(ones << bit));
            }
            places.iter_mut().zip(visits).for_each(|(place, visits)| place.add(*visits));
            if let Some(before) = before {
                stays[row] +=
                    count_same(before.words(tokens.clone()), side.words(tokens.clone()), self.devices);
            }
            from = tokens.end;
        }
    }
}

/// Counts pairs of experts on one device, from the columns of two layers: every pair of ones counts the values of its bits.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
fn count_same<'a>(
    left: impl Iterator<Item = (&'a [u64], u64)>,
    right: impl Iterator<Item = (&'a [u64], u64)>,
    devices: usize,
) -> u64 {
    let mut all = 0;
    for ((left, within), (right, _)) in left.zip(right) {
        for (bit, left) in left.chunks_exact(devices).enumerate() {
            for (other, right) in right.chunks_exact(devices).enumerate() {
                let mut ones = 0;
                for (left, right) in left.iter().zip(right) {
                    ones += u64::from((left & right & within).count_ones());
                }
                all += ones << (bit + other);
            }
        }
    }
    all
}

/// Adds the ones of every column to `ones`, and the visits of devices and nodes to `visits`.
///
/// `rows` has the columns of 64 tokens at a time, and a bit for each of these tokens that counts.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
fn count_visits<'a>(
    rows: impl Iterator<Item = (&'a [u64], u64)>,
    devices_of_node: &[Vec<u16>],
    ones: &mut [u64],
    visits: &mut [u64],
) {
    let (visits, node_visits) = visits.split_at_mut(visits.len() - devices_of_node.len());
    let devices = visits.len();
    // A bit for every token that visits a device.
    let mut visitors = vec![0u64; devices];
    for (rows, within) in rows {
        visitors.fill(0);
        for (ones, rows) in ones.chunks_exact_mut(devices).zip(rows.chunks_exact(devices)) {
            for ((ones, row), any) in ones.iter_mut().zip(rows).zip(&mut visitors) {
                *ones += u64::from((row & within).count_ones());
                *any |= row & within;
            }
        }
        for (visits, visitors) in visits.iter_mut().zip(&visitors) {
            *visits += u64::from(visitors.count_ones());
        }
        for (visits, devices) in node_visits.iter_mut().zip(devices_of_node) {
            let mut any = 0;
            for &device in devices {
                any |= visitors[usize::from(device)];
            }
            *visits += u64::from(any.count_ones());
        }
    }
}
