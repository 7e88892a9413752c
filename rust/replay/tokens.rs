//! Counts token by token, for tokens that follow each other in different rows.

use std::ops::AddAssign;

use super::Copies;
use crate::trace::ExpertId;

/// Devices whose counts share a word, a byte each; and the largest number of words: with more devices single ids are counted.
const BYTES: usize = 8;
const WORDS: usize = 8;
/// Least mean length of a run of tokens in one row for which several words are faster than single ids.
const RUN: usize = 4;
/// Largest number of ids of a token that bytes may count: [`are_not_zero`] needs the highest bit of a byte.
const IDS: usize = 1 << 7;

/// Returns the number of words that hold a token's counts of all devices, a byte each; 0 if single ids are faster.
pub(super) fn words(devices: usize, tokens: usize, runs: usize, top_k: usize) -> usize {
    let words = devices.div_ceil(BYTES).next_power_of_two();
    let pays = words == 1 || (words <= WORDS && runs * RUN <= tokens);
    if top_k <= IDS && pays { words } else { 0 }
}

/// The devices or slots that serve the ids of a layer, for a block of tokens.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Slot of every id; empty unless experts have copies or slots are counted.
    pub(super) slots: Vec<u16>,
    /// Device of every id; empty where counts are used.
    devices: Vec<u16>,
    /// Number of a token's experts on every device, a byte each `[tokens, words]`.
    counts: Vec<u64>,
    top_k: usize,
}

impl Served {
    /// Finds the devices of ids, which are experts or slots; counts them in so many words per token if there are any.
    pub(super) fn find_devices<I: ExpertId>(
        &mut self,
        ids: &[I],
        device_of: &[u16],
        top_k: usize,
        words: usize,
    ) {
        self.top_k = top_k;
        self.devices.clear();
        self.counts.clear();
        match words {
            0 => self.devices.extend(ids.iter().map(|id| device_of[id.index()])),
            1 => {
                let one = |id: &I| 1u64 << (device_of[id.index()] * 8);
                self.counts.extend(ids.chunks_exact(top_k).map(|ids| ids.iter().map(one).sum::<u64>()));
            }
            words => {
                self.counts.resize(ids.len() / top_k * words, 0);
                for (counts, ids) in self.counts.chunks_exact_mut(words).zip(ids.chunks_exact(top_k)) {
                    for id in ids {
                        let device = usize::from(device_of[id.index()]);
                        counts[device / BYTES] += 1u64 << (device % BYTES * 8);
                    }
                }
            }
        }
    }

    /// Finds the devices of the slots that serve this layer.
    pub(super) fn find_devices_of_slots(&mut self, copies: &Copies, top_k: usize, words: usize) {
        let slots = std::mem::take(&mut self.slots);
        self.find_devices(&slots, &copies.device_of_slot, top_k, words);
        self.slots = slots;
    }

    /// Adds the tokens to their rows of a table `[rows, size]`, and pairs on one device with the layer `before` to `stays`.
    pub(super) fn count<T: Copy + AddAssign + From<u8>>(
        &self,
        before: Option<&Self>,
        rows: &[u32],
        copies: &Copies,
        table: (&mut [T], usize),
        stays: &mut [u64],
        words: usize,
    ) {
        match words {
            1 => self.count_words::<T, 1>(before, rows, copies, table, stays),
            2 => self.count_words::<T, 2>(before, rows, copies, table, stays),
            4 => self.count_words::<T, 4>(before, rows, copies, table, stays),
            WORDS => self.count_words::<T, WORDS>(before, rows, copies, table, stays),
            _ => {
                self.count_ids(rows, copies, table);
                if let Some(before) = before {
                    self.count_stays(before, rows, stays);
                }
            }
        }
    }

    /// Adds the load of devices and, where rows have places for them, visits of devices, visits of nodes and load of slots, one
    /// id after the other.
    fn count_ids<T: Copy + AddAssign + From<u8>>(
        &self,
        rows: &[u32],
        copies: &Copies,
        (table, size): (&mut [T], usize),
    ) {
        let tokens = self.devices.chunks_exact(self.top_k).zip(rows);
        if size == copies.devices {
            for (devices, &row) in tokens {
                let load = &mut table[row as usize * size..][..size];
                for &device in devices {
                    load[usize::from(device)] += 1.into();
                }
            }
            return;
        }
        // The last token that visited a device and, after the devices, a node; tokens are numbered from 1.
        let places = copies.devices + copies.nodes();
        let mut last = vec![0; places];
        for (token, (devices, &row)) in (1..).zip(tokens) {
            let (load, visits) = table[row as usize * size..][..size].split_at_mut(copies.devices);
            for &device in devices {
                let device = usize::from(device);
                load[device] += 1.into();
                for place in [device, copies.devices + usize::from(copies.node_of_device[device])] {
                    visits[place] += u8::from(std::mem::replace(&mut last[place], token) != token).into();
                }
            }
        }
        let first_slot = copies.devices + places;
        if size > first_slot {
            for (slots, &row) in self.slots.chunks_exact(self.top_k).zip(rows) {
                let of_slots = &mut table[row as usize * size..][first_slot..size];
                for &slot in slots {
                    of_slots[usize::from(slot)] += 1.into();
                }
            }
        }
    }

    /// Adds the load of devices, visits of devices, visits of nodes, and pairs on one device.
    ///
    /// Tokens that follow each other in one row are added up in words first.
    fn count_words<T: Copy + AddAssign + From<u8>, const W: usize>(
        &self,
        before: Option<&Self>,
        rows: &[u32],
        copies: &Copies,
        (table, size): (&mut [T], usize),
        stays: &mut [u64],
    ) {
        let counts = self.counts.as_chunks::<W>().0;
        let (d, nodes) = (copies.devices, copies.nodes());
        let bits = |devices: &Vec<u16>| devices.iter().fold(0u64, |bits, device| bits | 1 << device);
        let devices_of_node: Vec<u64> = copies.devices_of_node.iter().map(bits).collect();
        let mut from = 0;
        while from < counts.len() {
            let row = rows[from] as usize;
            let end = counts.len().min(from + usize::from(u8::MAX) / self.top_k);
            let other = rows[from..end].iter().position(|&other| other as usize != row);
            let run = from..other.map_or(end, |tokens| from + tokens);
            let (loads, places) = table[row * size..][..size].split_at_mut(d);
            let (visitors, of_nodes) = places.split_at_mut(d);
            let (mut load, mut visits) = ([0u64; W], [0u64; W]);
            for counts in &counts[run.clone()] {
                let visited = counts.map(are_not_zero);
                for w in 0..W {
                    load[w] += counts[w];
                    visits[w] += visited[w];
                }
                if nodes > 1 {
                    let visited =
                        (0..).zip(visited).fold(0, |bits, (w, word)| bits | first_bits(word) << (8 * w));
                    for (visits, devices) in of_nodes.iter_mut().zip(&devices_of_node) {
                        *visits += u8::from(visited & devices != 0).into();
                    }
                }
            }
            add(loads, &load);
            add(visitors, &visits);
            if nodes == 1 {
                of_nodes[0] += (run.len() as u8).into();
            }
            if let Some(before) = before {
                let before = &before.counts.as_chunks::<W>().0[run.clone()];
                let pairs = before.iter().zip(&counts[run.clone()]);
                stays[row] += pairs.map(|(before, here)| multiply(before, here, self.top_k)).sum::<u64>();
            }
            from = run.end;
        }
    }

    /// Adds pairs on one device, from the devices of single ids.
    fn count_stays(&self, before: &Self, rows: &[u32], stays: &mut [u64]) {
        let pairs = before.devices.chunks_exact(self.top_k).zip(self.devices.chunks_exact(self.top_k));
        for (&row, (before, here)) in rows.iter().zip(pairs) {
            let same = |device: &u16| here.iter().filter(|&other| other == device).count();
            stays[row as usize] += before.iter().map(same).sum::<usize>() as u64;
        }
    }
}

/// Returns a word whose bytes are 1 where the bytes of `word`, at most [`IDS`], are not 0.
#[inline(always)]
fn are_not_zero(word: u64) -> u64 {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    ((word + (HIGH - (HIGH >> 7))) & HIGH) >> 7
}

/// Packs the first bits of a word's bytes side by side; other bits must be 0.
#[inline(always)]
fn first_bits(word: u64) -> u64 {
    word.wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// Computes the sum of products of the bytes of two rows of words; the bytes of either row add up to `top_k`.
#[inline(always)]
fn multiply<const W: usize>(left: &[u64; W], right: &[u64; W], top_k: usize) -> u64 {
    let words = left.iter().zip(right);
    if top_k * top_k < 1 << 8 {
        // The last byte of a product is the sum of first byte times last one, second times last but one, and so on.
        return words.map(|(left, right)| left.wrapping_mul(right.swap_bytes()) >> 56).sum();
    }
    let bytes = words.flat_map(|(left, right)| left.to_le_bytes().into_iter().zip(right.to_le_bytes()));
    bytes.map(|(left, right)| u64::from(left) * u64::from(right)).sum()
}

/// Adds the bytes of words to counts.
#[inline(always)]
fn add<T: Copy + AddAssign + From<u8>>(to: &mut [T], words: &[u64]) {
    let add = |(to, byte): (&mut T, u8)| *to += byte.into();
    for (to, word) in to.chunks_mut(BYTES).zip(words) {
        // A loop of a known length is one addition of all bytes.
        match <&mut [T; BYTES]>::try_from(&mut *to) {
            Ok(to) => to.iter_mut().zip(word.to_le_bytes()).for_each(add),
            Err(_) => to.iter_mut().zip(word.to_le_bytes()).for_each(add),
        }
    }
}
