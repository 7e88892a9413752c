//! Counts token by token, each in its row, where tokens that follow each other are of different ones.

use std::ops::AddAssign;

use super::Copies;

/// Devices whose counts share a word, a byte each, and words at the most: of more devices a token's counts are not added
/// as words.
const BYTES: usize = 8;
const WORDS: usize = 8;
/// Tokens of a run in one row, on average, from which it pays to add them up in several words.
const RUN: usize = 4;
/// Ids of a token at the most that bytes may count: a byte's highest bit says that it is not zero.
const IDS: usize = 1 << 7;

/// Words that hold a token's counts of all devices, a byte each; 0 where single ids are added faster.
pub(super) fn words(devices: usize, tokens: usize, runs: usize, top_k: usize) -> usize {
    let words = devices.div_ceil(BYTES).next_power_of_two();
    let pays = words == 1 || (words <= WORDS && runs * RUN <= tokens);
    if top_k <= IDS && pays { words } else { 0 }
}

/// What serves the ids of a layer, of a block of tokens.
#[derive(Debug, Default)]
pub(super) struct Served {
    pub(super) slots: Vec<u16>,
    /// The device of every slot; none where nothing asks for it.
    devices: Vec<u16>,
    /// How many of a token's experts are on every device, a byte for each `[tokens, words]`.
    counts: Vec<u64>,
    top_k: usize,
}

impl Served {
    /// Finds the devices of slots where they are asked for, and counts them in so many words of a token.
    pub(super) fn find_devices(&mut self, copies: &Copies, top_k: usize, words: usize, stays: bool) {
        self.top_k = top_k;
        self.devices.clear();
        self.counts.clear();
        if words > 0 || stays {
            self.devices.extend(self.slots.iter().map(|&slot| copies.device_of_slot[usize::from(slot)]));
        }
        let one = |device: u16| 1u64 << (usize::from(device) % BYTES * 8);
        if words == 1 {
            let tokens = self.devices.chunks_exact(top_k);
            self.counts.extend(tokens.map(|devices| devices.iter().map(|&device| one(device)).sum::<u64>()));
        } else if words > 1 {
            self.counts.resize(self.devices.len() / top_k * words, 0);
            for (counts, devices) in self.counts.chunks_exact_mut(words).zip(self.devices.chunks_exact(top_k))
            {
                for &device in devices {
                    counts[usize::from(device) / BYTES] += one(device);
                }
            }
        }
    }

    /// Adds what tokens do to their rows of a table `[rows, size]`, and pairs that stay with those of the layer before.
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

    /// Adds load of devices and, where a row has places for them, visits of devices, visits of nodes and load of slots,
    /// one id after the other.
    fn count_ids<T: Copy + AddAssign + From<u8>>(
        &self,
        rows: &[u32],
        copies: &Copies,
        (table, size): (&mut [T], usize),
    ) {
        let device_of = |slot: u16| usize::from(copies.device_of_slot[usize::from(slot)]);
        let tokens = self.slots.chunks_exact(self.top_k).zip(rows);
        if size == copies.devices {
            for (slots, &row) in tokens {
                let load = &mut table[row as usize * size..][..size];
                for &slot in slots {
                    load[device_of(slot)] += 1.into();
                }
            }
            return;
        }
        // Which token visited a device or, behind them, a node last; tokens are numbered from 1.
        let places = copies.devices + copies.nodes();
        let mut last = vec![0; places];
        for (token, (slots, &row)) in (1..).zip(tokens) {
            let (load, visits) = table[row as usize * size..][..size].split_at_mut(copies.devices);
            let (visits, of_slots) = visits.split_at_mut(places);
            for &slot in slots {
                let device = device_of(slot);
                load[device] += 1.into();
                if let Some(load) = of_slots.get_mut(usize::from(slot)) {
                    *load += 1.into();
                }
                for place in [device, copies.devices + usize::from(copies.node_of_device[device])] {
                    visits[place] += u8::from(std::mem::replace(&mut last[place], token) != token).into();
                }
            }
        }
    }

    /// Adds load of devices, visits of devices and visits of nodes, and pairs that stay.
    ///
    /// Tokens that follow each other in one row are added up in words before.
    fn count_words<T: Copy + AddAssign + From<u8>, const W: usize>(
        &self,
        before: Option<&Self>,
        rows: &[u32],
        copies: &Copies,
        (table, size): (&mut [T], usize),
        stays: &mut [u64],
    ) {
        const HIGH: u64 = 0x8080_8080_8080_8080;
        let (counts, devices) = (self.counts.as_chunks::<W>().0, self.devices.chunks_exact(self.top_k));
        let (d, nodes) = (copies.devices, copies.nodes());
        let mut from = 0;
        while from < counts.len() {
            let row = rows[from] as usize;
            let end = counts.len().min(from + usize::from(u8::MAX) / self.top_k);
            let other = rows[from..end].iter().position(|&other| other as usize != row);
            let run = from..other.map_or(end, |tokens| from + tokens);
            let (mut load, mut visits) = ([0u64; W], [0u64; W]);
            for counts in &counts[run.clone()] {
                for w in 0..W {
                    load[w] += counts[w];
                    visits[w] += ((counts[w] + (HIGH - (HIGH >> 7))) & HIGH) >> 7;
                }
            }
            let (loads, places) = table[row * size..][..size].split_at_mut(d);
            let (visitors, of_nodes) = places.split_at_mut(d);
            add(loads, &load);
            add(visitors, &visits);
            if nodes > 1 {
                for devices in devices.clone().skip(run.start).take(run.len()) {
                    let node = |&device: &u16| 1u64 << copies.node_of_device[usize::from(device)];
                    let mut visited = devices.iter().map(node).fold(0, |all, node| all | node);
                    while visited != 0 {
                        of_nodes[visited.trailing_zeros() as usize] += 1.into();
                        visited &= visited - 1;
                    }
                }
            } else {
                of_nodes[0] += (run.len() as u8).into();
            }
            if let Some(before) = before {
                let tokens = before.counts.as_chunks::<W>().0[run.clone()].iter();
                let stay = |(counts, devices): (&[u64; W], &[u16])| {
                    let count = |&device: &u16| {
                        let device = usize::from(device);
                        counts[device / BYTES % W] >> (device % BYTES * 8) & 0xff
                    };
                    devices.iter().map(count).sum::<u64>()
                };
                stays[row] += tokens.zip(devices.clone().skip(run.start)).map(stay).sum::<u64>();
            }
            from = run.end;
        }
    }

    /// Adds pairs that stay, where no counts of a token are known.
    fn count_stays(&self, before: &Self, rows: &[u32], stays: &mut [u64]) {
        let pairs = before.devices.chunks_exact(self.top_k).zip(self.devices.chunks_exact(self.top_k));
        for (&row, (before, here)) in rows.iter().zip(pairs) {
            let same = |device: &u16| here.iter().filter(|&other| other == device).count();
            stays[row as usize] += before.iter().map(same).sum::<usize>() as u64;
        }
    }
}

/// Adds the bytes of words.
#[inline(always)]
fn add<T: AddAssign + From<u8>>(to: &mut [T], words: &[u64]) {
    for (to, word) in to.chunks_mut(BYTES).zip(words) {
        for (to, byte) in to.iter_mut().zip(word.to_le_bytes()) {
            *to += byte.into();
        }
    }
}
