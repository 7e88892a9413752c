//! Counts by a label of the token: a window of another order of arrival, its home, its part of a sequence.
//!
//! Counts add up, so a trace is read in its own order: every token says the row that it counts in. Nothing is put in
//! order, and nothing read twice.

use std::ops::AddAssign;

use super::{Copies, Split};
use crate::counting::by_layers;
use crate::counting::windows::{Narrow, of_any_type};
use crate::error::{Error, Result, room_for};
use crate::trace::{ExpertId, Routing, validate};

/// What some tokens are labelled with.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// The row that each counts in.
    pub row: &'a [u32],
    /// The position whose hash chooses between copies; by default its number in the trace.
    pub position: Option<&'a [u64]>,
    /// Its home, which the nearest copy is near to; by default the hash's.
    pub home: Option<&'a [u16]>,
}

/// Counts the tokens of devices by label. Push the shards of a trace in order, then [`Labelled::finish`].
#[derive(Debug)]
pub struct Labelled {
    routing: Routing,
    copies: Copies,
    /// Load of every device and, where they are wanted, visits of every device and node.
    size: usize,
    tokens: u64,
    /// Of every layer `[rows, size]`.
    tables: Vec<Narrow>,
    /// Of every layer, where they are wanted: pairs of an expert of the layer before and one of this that a device serves
    /// both `[rows]`.
    stays: Vec<Vec<u64>>,
}

/// Tokens whose ids of a layer, devices and rows stay in the first-level cache.
const BLOCK: usize = 1 << 10;
/// Devices whose counts share a word, a byte each, and words at the most: of more devices a token's counts are not added
/// as words.
const BYTES: usize = 8;
const WORDS: usize = 8;
/// Tokens of a run in one row, on average, from which it pays to add them up in several words.
const RUN: usize = 4;
/// Ids of a token at the most that bytes may count: a byte's highest bit says that it is not zero.
const IDS: usize = 1 << 7;

impl Labelled {
    /// Nothing counted yet in so many `rows`, none of which gets more than `most` tokens; `visits` and `stays` say whether
    /// these are counted. Where copies take turns, whose turn it is depends on all tokens before: that is an error.
    pub fn new(
        routing: Routing,
        copies: Copies,
        rows: usize,
        most_tokens: u64,
        visits: bool,
        stays: bool,
    ) -> Result<Self> {
        if copies.split == Split::RoundRobin && (0..routing.layers).any(|l| !copies.is_single(l)) {
            let rule = "one slot of every expert where copies take turns";
            return Err(Error::shape("slots", rule, &"copies"));
        }
        let size = copies.devices + if visits { copies.devices + copies.nodes() } else { 0 };
        let count = Narrow::zeros(most_tokens.saturating_mul(routing.top_k as u64), 1);
        room_for("rows", &[rows, routing.layers, size, count.width()])?;
        let tables = (0..routing.layers).map(|_| count.zeros_like(rows * size)).collect();
        let stays = (0..routing.layers).map(|_| vec![0; if stays { rows } else { 0 }]).collect();
        Ok(Self { routing, copies, size, tokens: 0, tables, stays })
    }

    /// Counts the next tokens `[tokens, layers, top_k]`, each by its labels.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], labels: Labels<'_>, checked: bool) -> Result<()> {
        let Self { routing, copies, size, tokens: first, tables, stays } = self;
        let (top_k, size) = (routing.top_k, *size);
        if !checked {
            validate(ids, *routing, *first)?;
        }
        let from = *first;
        let position = |at: usize| labels.position.map_or(from + at as u64, |numbers| numbers[at]);
        let words = copies.devices.div_ceil(BYTES).next_power_of_two();
        let runs = labels.row.chunk_by(|row, next| row == next).count();
        let pays = words == 1 || (words <= WORDS && runs * RUN <= labels.row.len());
        let words = if size > copies.devices && top_k <= IDS && pays { words } else { 0 };
        // Loads alone are counted by slots.
        let with_devices = words > 0 || stays.iter().any(|rows| !rows.is_empty());
        let copies = &*copies;
        by_layers(
            &mut tables.iter_mut().zip(stays).collect::<Vec<_>>(),
            ids,
            BLOCK,
            *routing,
            Served::default,
            |l, at, ids: &mut Vec<I>, served: &mut Served| {
                let at = at as usize;
                let positions = (at..at + ids.len() / top_k).map(position);
                let slots = copies.route(l, ids, top_k, positions, labels.home.map(|numbers| &numbers[at..]));
                if with_devices {
                    served.find_devices(&slots, copies, top_k, words);
                }
                served.slots = slots;
            },
            |(table, stays), at, before, served| {
                let rows = &labels.row[at as usize..];
                let block = Block { rows, served, before, top_k };
                match words {
                    1 => of_any_type!(&mut **table, table => block.count::<_, 1>(copies, table, size, stays)),
                    2 => of_any_type!(&mut **table, table => block.count::<_, 2>(copies, table, size, stays)),
                    4 => of_any_type!(&mut **table, table => block.count::<_, 4>(copies, table, size, stays)),
                    WORDS => {
                        of_any_type!(&mut **table, table => block.count::<_, WORDS>(copies, table, size, stays));
                    }
                    _ => {
                        let row_of = |token: usize| rows[token] as usize;
                        of_any_type!(&mut **table, table => {
                            copies.count(&served.slots, top_k, table, size, row_of);
                        });
                        block.count_stays(stays);
                    }
                }
            },
        );
        *first += (ids.len() / routing.row()) as u64;
        Ok(())
    }

    /// Load `[layers, rows, devices]`, visits of devices and visits of nodes, and the pairs of neighbouring layers' experts
    /// that one device serves both `[rows]`; what was not wanted is empty.
    #[must_use]
    pub fn finish(self) -> ([Narrow; 3], Vec<u64>) {
        let (d, size) = (self.copies.devices, self.size);
        let mut stays = self.stays.into_iter();
        let mut all = stays.next().unwrap_or_default();
        for layer in stays {
            all.iter_mut().zip(layer).for_each(|(all, stays)| *all += stays);
        }
        let columns = [0..d, d..size.min(2 * d), size.min(2 * d)..size];
        (Narrow::columns(self.tables, size, &columns), all)
    }
}

/// What serves the ids of a layer, of a block of tokens.
#[derive(Debug, Default)]
struct Served {
    slots: Vec<u16>,
    /// The device of every slot; none where nothing asks for it.
    devices: Vec<u16>,
    /// How many of a token's experts are on every device, a byte for each `[tokens, words]`.
    counts: Vec<u64>,
}

impl Served {
    fn find_devices(&mut self, slots: &[u16], copies: &Copies, top_k: usize, words: usize) {
        self.devices.clear();
        self.devices.extend(slots.iter().map(|&slot| copies.device_of_slot[usize::from(slot)]));
        self.counts.clear();
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
}

/// A block of tokens in one layer.
struct Block<'a> {
    /// The row of every token, and of those after them.
    rows: &'a [u32],
    served: &'a Served,
    /// What served them in the layer before.
    before: Option<&'a Served>,
    top_k: usize,
}

impl Block<'_> {
    /// Adds load of devices, visits of devices and visits of nodes to rows of a table `[rows, size]`, and pairs that stay.
    ///
    /// Tokens that follow each other in one row are added up in words before.
    fn count<T: Copy + AddAssign + From<u8>, const W: usize>(
        &self,
        copies: &Copies,
        table: &mut [T],
        size: usize,
        stays: &mut [u64],
    ) {
        const HIGH: u64 = 0x8080_8080_8080_8080;
        let Self { rows, served, before, top_k } = *self;
        let before = before.filter(|_| !stays.is_empty());
        let (counts, devices) = (served.counts.as_chunks::<W>().0, served.devices.chunks_exact(top_k));
        let (d, nodes) = (copies.devices, copies.nodes());
        let mut from = 0;
        while from < counts.len() {
            let row = rows[from] as usize;
            let end = counts.len().min(from + usize::from(u8::MAX) / top_k);
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
    fn count_stays(&self, stays: &mut [u64]) {
        let Some(before) = self.before.filter(|_| !stays.is_empty()) else { return };
        let pairs = before.devices.chunks_exact(self.top_k).zip(self.served.devices.chunks_exact(self.top_k));
        for (&row, (before, here)) in self.rows.iter().zip(pairs) {
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
