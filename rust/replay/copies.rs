//! The choice of the copy of an expert that serves a token.

use rayon::prelude::*;

use crate::arrays::{count_groups, prefix_sums};
use crate::error::{Error, Result, SLOTS};
use crate::random::{choose_copy, hash, scale};
use crate::trace::{ExpertId, Routing};

/// The rule by which a copy of an expert is chosen for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The copy is chosen by a hash of the token's position ([`hash`]), the same in all layers.
    Even,
    /// The copy on the token's home device; else one on the home's node, by hash; else any one, by hash. By default the home
    /// is chosen by the leading bits of the hash, so that homes are spread evenly.
    Nearest,
    /// The copies of an expert take turns.
    RoundRobin,
}

/// A placement as the replay needs it: copies of every expert, layer by layer.
#[derive(Debug, Clone)]
pub struct Copies {
    /// Number of devices.
    pub devices: usize,
    /// Number of slots of a layer, P.
    pub(super) slots: usize,
    /// Node of every device `[D]`, and devices of every node `[N]`.
    pub(super) node_of_device: Vec<u16>,
    pub(super) devices_of_node: Vec<Vec<u16>>,
    /// Device of every slot `[P]`.
    pub(super) device_of_slot: Vec<u16>,
    /// Device of every expert, that of its first copy if it has several `[L, E]`.
    pub(super) device_of_expert: Vec<Vec<u16>>,
    /// Slots of every expert, expert by expert `[L, filled slots]`.
    pub(super) slots_of: Vec<Vec<u16>>,
    /// Index of an expert's first slot in `slots_of` `[L, E + 1]`.
    begin: Vec<Vec<u32>>,
    split: Split,
    /// Tokens of every expert before the block at hand `[L, E]`; empty unless copies take turns.
    served: Vec<Vec<u64>>,
}

impl Copies {
    /// Returns the number of nodes.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.devices_of_node.len()
    }

    /// Builds the copies of slots `[L, D, S]` (expert ids, -1 for empty), with the node of every device `[D]`.
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
            let (starts, slots_of) = slots_by_expert(layer, experts)?;
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
        let device_of_slot: Vec<u16> = (0..p).map(|slot| (slot / per_device) as u16).collect();
        let first_device = |(slots, begin): (&Vec<u16>, &Vec<u32>)| {
            let first = begin[..experts].iter().map(|&first| slots[first as usize]);
            first.map(|slot| device_of_slot[usize::from(slot)]).collect()
        };
        let device_of_expert = copies.iter().zip(&begin).map(first_device).collect();
        let mut devices_of_node = vec![Vec::new(); count_groups(node_of_device)];
        for (device, &node) in (0..).zip(node_of_device) {
            devices_of_node[usize::from(node)].push(device);
        }
        Ok(Self {
            devices,
            slots: p,
            node_of_device: node_of_device.to_vec(),
            devices_of_node,
            device_of_slot,
            device_of_expert,
            slots_of: copies,
            begin,
            split,
            served: vec![vec![0; experts]; if split == Split::RoundRobin { layers } else { 0 }],
        })
    }

    /// Returns the slots that serve the ids of a layer `[T, K]`.
    ///
    /// Tokens have positions and, if given, homes `[T]`; by default the hash of the position chooses the home.
    pub(super) fn route<I: ExpertId>(
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
        let slots_of = |id: &I| &copies[begin[id.index()] as usize..begin[id.index() + 1] as usize];
        if self.split == Split::RoundRobin {
            let mut served = self.served[l].clone();
            let turn = |id: &I| {
                let turn = served[id.index()];
                served[id.index()] += 1;
                slots_of(id)[(turn % slots_of(id).len() as u64) as usize]
            };
            return ids.iter().map(turn).collect();
        }
        let mut slots = Vec::with_capacity(ids.len());
        for (token, (position, ids)) in positions.zip(ids.chunks_exact(top_k)).enumerate() {
            let hash = hash(position as u32) as usize;
            if self.split == Split::Even {
                slots.extend(ids.iter().map(|id| slots_of(id)[choose_copy(hash, slots_of(id).len())]));
            } else {
                let home =
                    homes.map_or_else(|| scale(hash as u64, self.devices), |homes| homes[token].into());
                slots.extend(ids.iter().map(|id| self.nearest(slots_of(id), home, hash)));
            }
        }
        slots
    }

    /// Returns the slot that serves a token of this home, of the `slots` of an expert.
    fn nearest(&self, slots: &[u16], home: usize, hash: usize) -> u16 {
        let device = |slot: u16| usize::from(self.device_of_slot[usize::from(slot)]);
        if let Some(&slot) = slots.iter().find(|&&slot| device(slot) == home) {
            return slot;
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

    /// Returns whether the copy that serves a token depends on earlier tokens.
    pub(super) fn takes_turns(&self) -> bool {
        self.split == Split::RoundRobin && (0..self.slots_of.len()).any(|l| !self.is_single(l))
    }

    /// Counts the tokens of every expert in a block, on which turns in the next block depend.
    pub(super) fn count_served<I: ExpertId>(&mut self, block: &[I], routing: Routing) {
        let top_k = routing.top_k;
        self.served.par_iter_mut().enumerate().for_each(|(l, served)| {
            for token in block.chunks_exact(routing.row()) {
                for id in &token[l * top_k..(l + 1) * top_k] {
                    served[id.index()] += 1;
                }
            }
        });
    }

    /// Returns whether every expert of a layer has a single slot.
    pub(super) fn is_single(&self, l: usize) -> bool {
        self.slots_of[l].len() + 1 == self.begin[l].len()
    }
}

/// Sorts the filled slots of a layer by expert; returns the index of every expert's first slot `[E + 1]`, and the slots.
pub(super) fn slots_by_expert(slots: &[i32], experts: usize) -> Result<(Vec<u32>, Vec<u16>)> {
    let filled =
        || (0..).zip(slots).filter_map(|(slot, &expert)| Some((slot, usize::try_from(expert).ok()?)));
    let mut counts = vec![0; experts];
    for (_, expert) in filled() {
        let Some(count) = counts.get_mut(expert) else {
            return Err(Error::shape("slots", format!("expert ids below {experts}"), &expert));
        };
        *count += 1;
    }
    let begin: Vec<u32> = prefix_sums(counts.into_iter());
    let (mut next, mut slots_of) = (begin.clone(), vec![0; begin[experts] as usize]);
    for (slot, expert) in filled() {
        slots_of[next[expert] as usize] = slot;
        next[expert] += 1;
    }
    Ok((begin, slots_of))
}
