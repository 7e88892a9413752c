//! Replays a trace under a placement, token by token: who works, what moves, how far it fans out.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::pairs::{BLOCK, Pairs};
use crate::statistics::{gather, in_windows};
use crate::trace::{ExpertId, Routing, validate};

/// A placement as the replay needs it: copies of every expert, layer by layer.
#[derive(Debug, Clone)]
pub struct Copies {
    devices: usize,
    slots: usize,
    node_of_device: Vec<u16>,
    device_of_slot: Vec<u16>,
    /// Slots of every expert, one after the other `[L, filled slots]`.
    copies: Vec<Vec<u16>>,
    /// Where an expert's slots begin in `copies` `[L, E + 1]`.
    begin: Vec<Vec<u32>>,
}

impl Copies {
    /// Takes slots `[L, D, S]` (expert ids, -1 for empty) and the node of every device `[D]`.
    pub fn new(slots: &[i32], routing: Routing, per_device: usize, node_of_device: &[u16]) -> Result<Self> {
        let Routing { layers, experts, .. } = routing;
        let devices = node_of_device.len();
        let p = devices * per_device;
        if slots.len() != layers * p || p == 0 || p > 1 << 16 {
            let rule = format!("{layers} layers x {devices} devices x {per_device} slots, at most 65536 a layer");
            return Err(Error::Shape { what: "slots", rule, found: format!("{} values", slots.len()) });
        }
        let mut copies = Vec::with_capacity(layers);
        let mut begin = Vec::with_capacity(layers);
        for layer in slots.chunks_exact(p) {
            let mut of_expert: Vec<Vec<u16>> = vec![Vec::new(); experts];
            for (slot, &expert) in layer.iter().enumerate() {
                match usize::try_from(expert) {
                    Err(_) => {}
                    Ok(e) if e < experts => of_expert[e].push(slot as u16),
                    Ok(e) => {
                        let rule = format!("expert ids below {experts}");
                        return Err(Error::Shape { what: "slots", rule, found: e.to_string() });
                    }
                }
            }
            if let Some(e) = of_expert.iter().position(Vec::is_empty) {
                let rule = "a slot for every expert".to_string();
                return Err(Error::Shape { what: "slots", rule, found: format!("none for expert {e}") });
            }
            let mut at = 0;
            let mut starts = vec![0];
            for copies in &of_expert {
                at += copies.len() as u32;
                starts.push(at);
            }
            copies.push(of_expert.concat());
            begin.push(starts);
        }
        Ok(Self {
            devices,
            slots: p,
            node_of_device: node_of_device.to_vec(),
            device_of_slot: (0..p).map(|slot| (slot / per_device) as u16).collect(),
            copies,
            begin,
        })
    }

    /// Replaces expert ids by the slots that serve them. Copies share an expert's tokens evenly, by a hash of the
    /// token's position (Knuth's multiplicative one), the same in all layers.
    fn route(&self, l: usize, ids: &mut [u16], top_k: usize, first_token: u64) {
        let (copies, begin) = (&self.copies[l], &self.begin[l]);
        if copies.len() + 1 == begin.len() {
            for id in ids {
                *id = copies[usize::from(*id)];
            }
            return;
        }
        for (token, ids) in ids.chunks_exact_mut(top_k).enumerate() {
            let hash = (first_token + token as u64).wrapping_mul(2_654_435_761) as u32;
            for id in ids {
                let e = usize::from(*id);
                let (from, to) = (begin[e], begin[e + 1]);
                *id = copies[(from + hash % (to - from)) as usize];
            }
        }
    }
}

/// What a placement does to a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Tokens replayed.
    pub tokens: u64,
    /// Windows, at least one.
    pub windows: usize,
    /// Tokens arriving at every device, once per expert `[W, L, D]`.
    pub load: Vec<u64>,
    /// Pairs of neighbouring layers' experts by their devices `[L - 1, D, D]`.
    pub traffic: Vec<u64>,
    /// Tokens with at least one expert on the device `[L, D]`.
    pub visits: Vec<u64>,
    /// Distinct devices, summed over tokens `[L]`.
    pub fanout: Vec<u64>,
    /// Distinct nodes, summed over tokens `[L]`.
    pub node_fanout: Vec<u64>,
}

/// Replays a trace shard by shard. Push its shards in order, then [`Replay::finish`].
#[derive(Debug)]
pub struct Replay {
    routing: Routing,
    copies: Copies,
    window: Option<u64>,
    tokens: u64,
    layers: Vec<Layer>,
}

#[derive(Debug, Default)]
struct Layer {
    load: Vec<u64>,
    /// Pairs of slots `[P, P]`.
    pairs: Vec<u64>,
    visits: Vec<u64>,
    fanout: u64,
    node_fanout: u64,
    scratch: Pairs,
    slots: Vec<u16>,
    slots_before: Vec<u16>,
    /// Token that visited a device or node last, for more of them than bits in a word.
    seen: Vec<u32>,
}

impl Replay {
    /// Nothing replayed yet.
    #[must_use]
    pub fn new(routing: Routing, copies: Copies, window: Option<u64>) -> Self {
        let table = copies.slots * copies.slots;
        let layer = |l: usize| Layer {
            pairs: vec![0; if l > 0 { table } else { 0 }],
            visits: vec![0; copies.devices],
            ..Layer::default()
        };
        Self { layers: (0..routing.layers).map(layer).collect(), routing, copies, window, tokens: 0 }
    }

    /// Validates and replays the next tokens of the trace, `[tokens, layers, top_k]`.
    pub fn push<I: ExpertId>(&mut self, ids: &[I]) -> Result<()> {
        validate(ids, self.routing, self.tokens)?;
        let row = self.routing.row();
        for block in ids.chunks(BLOCK * row) {
            let Self { routing, copies, window, tokens, layers } = self;
            layers
                .par_iter_mut()
                .enumerate()
                .for_each(|(l, layer)| layer.replay(block, l, *routing, copies, *window, *tokens));
            self.tokens += (block.len() / row) as u64;
        }
        Ok(())
    }

    /// What was counted.
    #[must_use]
    pub fn finish(self) -> Tally {
        let (layers, d) = (self.routing.layers, self.copies.devices);
        let windows = self.window.map_or(1, |window| self.tokens.div_ceil(window).max(1)) as usize;
        let mut load = vec![0; windows * layers * d];
        for (l, layer) in self.layers.iter().enumerate() {
            for (w, counts) in layer.load.chunks_exact(d).enumerate() {
                load[(w * layers + l) * d..][..d].copy_from_slice(counts);
            }
        }
        let device = |slot: usize| usize::from(self.copies.device_of_slot[slot]);
        let mut traffic = vec![0; (layers - 1) * d * d];
        for (traffic, layer) in traffic.chunks_exact_mut(d * d).zip(&self.layers[1..]) {
            for (from, row) in layer.pairs.chunks_exact(self.copies.slots).enumerate() {
                for (to, &count) in row.iter().enumerate() {
                    traffic[device(from) * d + device(to)] += count;
                }
            }
        }
        Tally {
            tokens: self.tokens,
            windows,
            load,
            traffic,
            visits: self.layers.iter().flat_map(|layer| layer.visits.iter().copied()).collect(),
            fanout: self.layers.iter().map(|layer| layer.fanout).collect(),
            node_fanout: self.layers.iter().map(|layer| layer.node_fanout).collect(),
        }
    }
}

impl Layer {
    fn replay<I: ExpertId>(
        &mut self,
        block: &[I],
        l: usize,
        routing: Routing,
        copies: &Copies,
        window: Option<u64>,
        first: u64,
    ) {
        let k = routing.top_k;
        gather(block, l, routing, &mut self.slots);
        copies.route(l, &mut self.slots, k, first);
        if l > 0 {
            gather(block, l - 1, routing, &mut self.slots_before);
            copies.route(l - 1, &mut self.slots_before, k, first);
            self.scratch.count(&self.slots_before, &self.slots, k, copies.slots, &mut self.pairs);
        }
        for slot in &mut self.slots {
            *slot = copies.device_of_slot[usize::from(*slot)];
        }
        let devices = &self.slots;
        in_windows(devices, k, copies.devices, window, first, &mut self.load);
        if copies.devices <= 64 {
            for devices in devices.chunks_exact(k) {
                let (mut visited, mut nodes) = (0u64, 0u64);
                for &device in devices {
                    let bit = 1 << device;
                    self.visits[usize::from(device)] += u64::from(visited & bit == 0);
                    visited |= bit;
                    nodes |= 1 << copies.node_of_device[usize::from(device)];
                }
                self.fanout += u64::from(visited.count_ones());
                self.node_fanout += u64::from(nodes.count_ones());
            }
        } else {
            // Devices first, nodes behind them; tokens of a block are numbered from 1.
            self.seen.clear();
            self.seen.resize(2 * copies.devices, 0);
            for (token, devices) in devices.chunks_exact(k).enumerate() {
                let mut first_time = |at: usize| std::mem::replace(&mut self.seen[at], token as u32 + 1) <= token as u32;
                for &device in devices {
                    let device = usize::from(device);
                    let new = u64::from(first_time(device));
                    self.visits[device] += new;
                    self.fanout += new;
                    let node = usize::from(copies.node_of_device[device]);
                    self.node_fanout += u64::from(first_time(copies.devices + node));
                }
            }
        }
    }
}
