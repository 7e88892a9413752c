//! How many of a token's experts are on each device, as bits.
//!
//! The counts of all devices lie side by side in a few words, so one addition per expert counts a token. The bits of
//! 64 tokens, transposed, are rows like those of ids: load, traffic and visits are numbers of ones.

use super::Copies;
use crate::counting::pairs::{MOST_UNITS, NO_UNIT, Side, Units};
use crate::counting::windows::Number;
use crate::trace::{ExpertId, Routing};

/// Rows at the most: for more, counting pairs of slots is as fast or faster (measured: docs/experiments.md, Counting and replay).
const ROWS: usize = 256;

/// Where the counts are.
#[derive(Debug)]
pub(super) struct Planes {
    devices: usize,
    /// Bits of a count.
    bits: usize,
    /// Devices whose counts share a word.
    per_word: usize,
    /// For every layer what an expert (or, where experts have copies, a slot) adds to the counts.
    units: Vec<Units>,
}

impl Planes {
    /// None where there would be too many rows or ids.
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

    /// The lowest bit of a device's count, 64 to a word.
    fn bit(&self, device: usize) -> usize {
        device / self.per_word * 64 + device % self.per_word * self.bits
    }

    /// Columns: the lowest bits of all devices' counts, then the next ones.
    pub(super) fn columns(&self) -> usize {
        self.devices * self.bits
    }

    /// The device of every column, and how much its bit is worth.
    pub(super) fn weights(&self) -> Vec<(usize, u64)> {
        (0..self.columns()).map(|column| (column % self.devices, 1 << (column / self.devices))).collect()
    }

    /// The column of every bit.
    fn columns_of_bits(&self) -> Vec<usize> {
        let mut columns = vec![NO_UNIT; self.bit(self.devices - 1) + self.bits];
        for column in 0..self.columns() {
            columns[self.bit(column % self.devices) + column / self.devices] = column;
        }
        columns
    }

    /// Takes the device of every id.
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

    /// Adds what tokens do to their rows of a table `[rows, size]`: load of devices and, where a row has places for them,
    /// visits of devices and nodes; and pairs that stay with those of the layer before. `rows` are of these tokens and of
    /// those after them.
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
            count(side.words(tokens.clone()), &copies.devices_of_node, ones, visits);
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

/// Counts pairs of a one on the left and one on the right of the same device, each by what its bit is worth.
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

/// Adds the ones of every column, and visits of devices and nodes. `rows` are the columns of 64 tokens at a time, and
/// which of the 64 are meant.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
fn count<'a>(
    rows: impl Iterator<Item = (&'a [u64], u64)>,
    devices_of_node: &[Vec<u16>],
    ones: &mut [u64],
    visits: &mut [u64],
) {
    let (visits, node_visits) = visits.split_at_mut(visits.len() - devices_of_node.len());
    let devices = visits.len();
    // Which tokens visit a device.
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
