//! Replays a trace under a placement, token by token: who works, what moves, how far it fans out.
//!
//! Nothing asks which of its experts a token met on a device, only how many. So these counts are counted, as bits
//! ([`planes`]); where there are too many devices for that, slots are, and added up by device in the end.

pub mod expected;
pub mod labels;
mod planes;

use std::ops::AddAssign;

use planes::Planes;
use rayon::prelude::*;

use crate::counting::by_layers;
use crate::counting::pairs::{Cuts, SHORT_BLOCK, Side, block};
use crate::counting::windows::{Narrow, WindowCounts, by_window};
use crate::error::{Error, Result, SLOTS, room_for};
use crate::random::{choose_copy, mixed, scale};
use crate::trace::{ExpertId, Routing, validate};

/// Which copy of an expert serves a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// By a hash of the token's position ([`mixed`]), the same in all layers.
    Even,
    /// The one on the token's home device; else by hash among those of the home's node; else by hash among all. The
    /// home is the hash's leading bits, which spreads homes evenly.
    Nearest,
    /// An expert's copies take turns.
    RoundRobin,
}

/// A placement as the replay needs it: copies of every expert, layer by layer.
#[derive(Debug, Clone)]
pub struct Copies {
    /// Devices.
    pub devices: usize,
    slots: usize,
    node_of_device: Vec<u16>,
    devices_of_node: Vec<Vec<u16>>,
    device_of_slot: Vec<u16>,
    /// Slots of every expert, one after the other `[L, filled slots]`.
    slots_of: Vec<Vec<u16>>,
    /// Where an expert's slots begin in `slots_of` `[L, E + 1]`.
    begin: Vec<Vec<u32>>,
    split: Split,
    /// Tokens of every expert before the block at hand `[L, E]`; counted where copies take turns.
    served: Vec<Vec<u64>>,
}

impl Copies {
    /// Nodes, numbered from 0.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.devices_of_node.len()
    }

    /// Takes slots `[L, D, S]` (expert ids, -1 for empty) and the node of every device `[D]`.
    pub fn new(
        slots: &[i32],
        routing: Routing,
        per_device: usize,
        node_of_device: &[u16],
        split: Split,
    ) -> Result<Self> {
        let Routing { layers, experts, .. } = routing;
        let devices = node_of_device.len();
        let p = devices * per_device;
        if p == 0 || p > SLOTS {
            return Err(Error::shape("slots", format!("from 1 to {SLOTS} slots in a layer"), &p));
        }
        let mut copies = Vec::with_capacity(layers);
        let mut begin = Vec::with_capacity(layers);
        for layer in slots.chunks_exact(p) {
            let (starts, slots_of) = by_expert(layer, experts)?;
            if let Some(e) = starts.windows(2).position(|ends| ends[0] == ends[1]) {
                return Err(Error::shape(
                    "slots",
                    "a slot for every expert",
                    &format!("none for expert {e}"),
                ));
            }
            copies.push(slots_of);
            begin.push(starts);
        }
        let nodes = node_of_device.iter().max().map_or(0, |&last| usize::from(last) + 1);
        let mut devices_of_node = vec![Vec::new(); nodes];
        for (device, &node) in (0..).zip(node_of_device) {
            devices_of_node[usize::from(node)].push(device);
        }
        Ok(Self {
            devices,
            slots: p,
            node_of_device: node_of_device.to_vec(),
            devices_of_node,
            device_of_slot: (0..p).map(|slot| (slot / per_device) as u16).collect(),
            slots_of: copies,
            begin,
            split,
            served: vec![vec![0; experts]; if split == Split::RoundRobin { layers } else { 0 }],
        })
    }

    /// The slots that serve the ids of a layer, of tokens at these positions and homes, which are the hashes' by default.
    fn route<I: ExpertId>(
        &self,
        l: usize,
        ids: &[I],
        top_k: usize,
        positions: impl Iterator<Item = u64>,
        homes: Option<&[u16]>,
    ) -> Vec<u16> {
        let (copies, begin) = (&self.slots_of[l], &self.begin[l]);
        if self.is_single(l) {
            return ids.iter().map(|id| copies[id.index()]).collect();
        }
        let devices_of = |id: &I| &copies[begin[id.index()] as usize..begin[id.index() + 1] as usize];
        if self.split == Split::RoundRobin {
            let mut served = self.served[l].clone();
            let turn = |id: &I| {
                let turn = served[id.index()];
                served[id.index()] += 1;
                devices_of(id)[(turn % devices_of(id).len() as u64) as usize]
            };
            return ids.iter().map(turn).collect();
        }
        let mut slots = Vec::with_capacity(ids.len());
        for (token, (position, ids)) in positions.zip(ids.chunks_exact(top_k)).enumerate() {
            let hash = mixed(position as u32) as usize;
            if self.split == Split::Even {
                slots.extend(ids.iter().map(|id| devices_of(id)[choose_copy(hash, devices_of(id).len())]));
            } else {
                let home =
                    homes.map_or_else(|| scale(hash as u64, self.devices), |homes| homes[token].into());
                slots.extend(ids.iter().map(|id| self.nearest(devices_of(id), home, hash)));
            }
        }
        slots
    }

    /// The copy that serves a token of this home.
    fn nearest(&self, slots: &[u16], home: usize, hash: usize) -> u16 {
        let device = |slot: u16| usize::from(self.device_of_slot[usize::from(slot)]);
        if let Some(&own) = slots.iter().find(|&&slot| device(slot) == home) {
            return own;
        }
        let node = self.node_of_device[home];
        let is_near = |slot: &&u16| self.node_of_device[device(**slot)] == node;
        match slots.iter().filter(is_near).count() {
            0 => slots[choose_copy(hash, slots.len())],
            count => *slots
                .iter()
                .filter(is_near)
                .nth(choose_copy(hash, count))
                .expect("a number below their count"),
        }
    }

    /// Counts a block's tokens, for whose turn it is in the next one.
    fn count_served<I: ExpertId>(&mut self, block: &[I], routing: Routing) {
        let top_k = routing.top_k;
        self.served.par_iter_mut().enumerate().for_each(|(l, served)| {
            for token in block.chunks_exact(routing.row()) {
                for id in &token[l * top_k..(l + 1) * top_k] {
                    served[id.index()] += 1;
                }
            }
        });
    }

    /// Adds what tokens do that these slots serve, each in its row of a table `[rows, size]`: load of devices and, where
    /// a row has places for them, visits of devices, visits of nodes and load of slots.
    fn count<T: Copy + AddAssign + From<bool>>(
        &self,
        slots: &[u16],
        top_k: usize,
        table: &mut [T],
        size: usize,
        row_of: impl Fn(usize) -> usize,
    ) {
        let device_of = |slot: u16| usize::from(self.device_of_slot[usize::from(slot)]);
        if size == self.devices {
            for (token, slots) in slots.chunks_exact(top_k).enumerate() {
                let load = &mut table[row_of(token) * size..][..size];
                for &slot in slots {
                    load[device_of(slot)] += true.into();
                }
            }
            return;
        }
        // Which token visited a device or, behind them, a node last; tokens are numbered from 1.
        let places = self.devices + self.nodes();
        let mut last = vec![0; places];
        for (token, slots) in slots.chunks_exact(top_k).enumerate() {
            let (load, visits) = table[row_of(token) * size..][..size].split_at_mut(self.devices);
            let (visits, of_slots) = visits.split_at_mut(places);
            let token = token as u32 + 1;
            for &slot in slots {
                let device = device_of(slot);
                load[device] += true.into();
                if let Some(load) = of_slots.get_mut(usize::from(slot)) {
                    *load += true.into();
                }
                for place in [device, self.devices + usize::from(self.node_of_device[device])] {
                    visits[place] += (std::mem::replace(&mut last[place], token) != token).into();
                }
            }
        }
    }

    /// Whether every expert of a layer has one slot.
    fn is_single(&self, l: usize) -> bool {
        self.slots_of[l].len() + 1 == self.begin[l].len()
    }
}

/// Where the slots of every expert begin `[E + 1]`, and the slots of a layer, expert by expert.
fn by_expert(slots: &[i32], experts: usize) -> Result<(Vec<u32>, Vec<u16>)> {
    let filled =
        || (0..).zip(slots).filter_map(|(slot, &expert)| Some((slot, usize::try_from(expert).ok()?)));
    let mut begin = vec![0; experts + 1];
    for (_, expert) in filled() {
        let Some(count) = begin.get_mut(expert + 1) else {
            return Err(Error::shape("slots", format!("expert ids below {experts}"), &expert));
        };
        *count += 1;
    }
    (0..experts).for_each(|e| begin[e + 1] += begin[e]);
    let (mut next, mut slots_of) = (begin.clone(), vec![0; begin[experts] as usize]);
    for (slot, expert) in filled() {
        slots_of[next[expert] as usize] = slot;
        next[expert] += 1;
    }
    Ok((begin, slots_of))
}

/// What a placement does to a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Tokens replayed.
    pub tokens: u64,
    /// Windows, at least one.
    pub windows: usize,
    /// Tokens arriving at every device, once per expert `[W, L, D]`.
    pub load: Narrow,
    /// Pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`.
    pub traffic: Vec<u64>,
    /// Tokens with at least one expert on the device `[W, L, D]`. Their sum is the fanout of all tokens.
    pub visits: Narrow,
    /// Tokens with at least one expert on the node `[W, L, N]`.
    pub node_visits: Narrow,
    /// Tokens of every slot `[W, L, P]`; none where they were not wanted.
    pub slots: Narrow,
}

/// Replays a trace shard by shard. Push its shards in order, then [`Replay::finish`].
#[derive(Debug)]
pub struct Replay {
    routing: Routing,
    copies: Copies,
    planes: Option<Planes>,
    /// Load of every device, visits of every device, visits of every node and, where wanted, load of every slot.
    windows: WindowCounts,
    size: usize,
    /// For every layer the pairs of columns, bits of the planes or slots, of the layer before and of this one; empty in
    /// the first layer.
    pairs: Vec<Vec<u64>>,
}

impl Replay {
    /// Nothing replayed yet; `window` tokens make a window, the whole trace where there is no number. Without `with_pairs`
    /// no traffic is counted, and with `with_slots` the load of slots is.
    pub fn new(
        routing: Routing,
        copies: Copies,
        window: Option<u64>,
        with_pairs: bool,
        with_slots: bool,
    ) -> Result<Self> {
        let planes = if with_slots { None } else { Planes::new(&copies, routing) };
        let size = 2 * copies.devices + copies.nodes() + if with_slots { copies.slots } else { 0 };
        let columns = planes.as_ref().map_or(copies.slots, Planes::columns);
        let table = if with_pairs { columns * columns } else { 0 };
        let layers = routing.layers - 1;
        room_for("traffic", &[layers, table.saturating_add(copies.devices * copies.devices), 8])?;
        Ok(Self {
            pairs: (0..routing.layers).map(|l| vec![0; if l > 0 { table } else { 0 }]).collect(),
            windows: WindowCounts::new(routing.layers, size, window, routing.top_k),
            size,
            planes,
            routing,
            copies,
        })
    }

    /// Replays the next tokens of the trace, `[tokens, layers, top_k]`. Those that are `checked` have passed [`validate`]
    /// since nobody could change them.
    pub fn push<I: ExpertId>(&mut self, ids: &[I], checked: bool) -> Result<()> {
        if !checked {
            validate(ids, self.routing, self.windows.tokens)?;
        }
        let Self { routing, copies, planes, windows, size, pairs } = self;
        windows.room_for(ids.len() / routing.row())?;
        let (top_k, planes) = (routing.top_k, planes.as_ref());
        let size = *size;
        let columns = planes.map_or(copies.slots, Planes::columns);
        let tokens = if planes.is_some() { SHORT_BLOCK } else { block(copies.slots, top_k) };
        let length = windows.length;
        // Whose turn it is in a block depends on the one before.
        let step = if copies.split == Split::RoundRobin { tokens * routing.row() } else { ids.len().max(1) };
        for ids in ids.chunks(step) {
            let (first, open) = (windows.tokens, windows.begin());
            by_layers(
                &mut pairs.iter_mut().zip(&mut windows.counts).collect::<Vec<_>>(),
                ids,
                tokens,
                *routing,
                || (Side::new(top_k, columns), Vec::new()),
                |l, at, ids: &mut Vec<I>, (side, slots): &mut (Side<u16>, Vec<u16>)| {
                    if let Some(planes) = planes {
                        planes.fill(copies, l, ids, first + at, side);
                    } else {
                        *slots = copies.route(l, ids, top_k, first + at.., None);
                        side.fill(&mut slots.clone(), Cuts::NONE);
                    }
                },
                |(pairs, counts), at, before, (here, slots)| {
                    if let Some((before, _)) = before.filter(|_| !pairs.is_empty()) {
                        here.count_pairs(Some((before, pairs)), None, false);
                    }
                    by_window(length, open + at, here.tokens, size, counts, |tokens, counts| {
                        if let Some(planes) = planes {
                            planes.count(here, tokens, copies, counts);
                        } else {
                            let slots = &slots[tokens.start * top_k..tokens.end * top_k];
                            copies.count(slots, top_k, counts, size, |_| 0);
                        }
                    });
                },
            );
            copies.count_served(ids, *routing);
            windows.advance((ids.len() / routing.row()) as u64);
        }
        Ok(())
    }

    /// What was counted.
    #[must_use]
    pub fn finish(self) -> Tally {
        let Self { routing, copies, planes, windows, size, pairs } = self;
        let d = copies.devices;
        let of_slot = || copies.device_of_slot.iter().map(|&device| (usize::from(device), 1)).collect();
        // The device of every column, and how much one in it counts.
        let columns: Vec<(usize, u64)> = planes.map_or_else(of_slot, |planes| planes.weights());
        let mut traffic = vec![0; (routing.layers - 1) * d * d];
        for (traffic, pairs) in traffic.chunks_exact_mut(d * d).zip(&pairs[1..]) {
            for (&(from, weight), row) in columns.iter().zip(pairs.chunks_exact(columns.len())) {
                for (&(to, times), count) in columns.iter().zip(row) {
                    traffic[from * d + to] += weight * times * count;
                }
            }
        }
        let (tokens, number) = (windows.tokens, windows.number());
        let nodes = 2 * d..2 * d + copies.nodes();
        let columns = [0..d, d..2 * d, nodes.clone(), nodes.end..size];
        let [load, visits, node_visits, slots] = Narrow::columns(vec![windows.finish()], size, &columns);
        Tally { tokens, windows: number, load, traffic, visits, node_visits, slots }
    }
}
